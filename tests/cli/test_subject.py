"""What is evaluated: a model and a text."""

from megatron_lowbit.__main__ import parser
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
