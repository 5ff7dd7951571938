"""What is evaluated: a model and a text."""

import json
import shutil

from megatron_lowbit.__main__ import parser
from megatron_lowbit.cli.files import BUNDLED
from megatron_lowbit.cli.subject import WINDOWS, Subject
from megatron_lowbit.evaluation import windows


def subject(*argv: str) -> Subject:
    return Subject.check(parser().parse_args(["evaluate", *argv]))


def test_only_the_windows_that_are_used_are_made(monkeypatch):
    """With a stride of 1 a text has as many as tokens: of a book, gigabytes."""
    made, consecutive = [], windows.consecutive

    def counted(*given):
        made.append(consecutive(*given))
        return made[-1]

    monkeypatch.setattr(windows, "consecutive", counted)
    for stride in (1, 7, 16):
        of = subject("--window-length", "16", "--stride", str(stride))
        ids = of.tokens(of.text)
        assert len(of.windows) == len(made[-1]) == WINDOWS
        assert of.windows[-1].ids.tolist() == ids[63 * stride : 63 * stride + 16]
    assert len(subject("--window-length", "512").windows) == len(ids) // 512  # all there are
    assert len(subject("--window-length", "16", "--windows", "100").windows) == 100


def test_another_tokenizer_is_another_evaluation(tmp_path):
    """The fingerprint is of the model alone: results of other tokens must not be put together."""
    folder = shutil.copytree(BUNDLED / "model", tmp_path / "model")
    before = subject("--model", str(folder)).facts
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text())
    content["model"]["merges"] = content["model"]["merges"][:-500]
    path.write_text(json.dumps(content))
    after = subject("--model", str(folder)).facts
    assert {name for name in before if before[name] != after[name]} == {"tokens_sha256"}
