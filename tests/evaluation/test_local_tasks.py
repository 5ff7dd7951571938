"""Questions from the project's own text, and from texts that hypothesis makes up."""

import json
import textwrap
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_lowbit.cli.files import BUNDLED
from megatron_lowbit.errors import ConfigError
from megatron_lowbit.evaluation import local_tasks
from megatron_lowbit.evaluation.local_tasks import choice, cloze
from megatron_lowbit.evaluation.prose import joined

OWN = (BUNDLED / "sample_text.txt").read_text(encoding="utf-8")
WORDS = st.sampled_from("the rain river house old man ferry bridge said walked slowly never again water".split())
SENTENCES = st.lists(WORDS, min_size=3, max_size=14).map(lambda words: " ".join(words).capitalize() + ".")
PARAGRAPHS = st.lists(SENTENCES, min_size=2, max_size=9).map(" ".join)
TEXTS = st.lists(PARAGRAPHS, min_size=6, max_size=16).map("\n\n".join)


def plain(text: str) -> str:
    return "\n\n".join(joined(block.split("\n")) for block in text.split("\n\n"))


def check_cloze(text: str) -> None:
    for question in cloze(text):
        context, target = question["context"], question["target"]
        assert context + target in plain(text)  # the prompt ends where the answer begins
        assert target[0] == " " and target[1:].strip(" ") == target[1:] and not context[-1].isspace()
        assert not context.casefold().endswith(target.strip().casefold())
        assert len(context.split()) >= local_tasks.CONTEXT


def check_choice(text: str) -> None:
    for question in choice(text):
        context, choices = question["context"], question["choices"]
        right = choices[question["label"]]
        assert f"{context} {right}" in plain(text)
        assert len({each.casefold() for each in choices}) == local_tasks.CHOICES
        assert all(each not in context for each in choices)
        assert all(f"{context} {each}" not in plain(text) for each in choices if each != right)
        assert len(context.split()) >= local_tasks.CONTEXT and context == context.rstrip()


@settings(max_examples=30)
@given(TEXTS)
def test_any_text(text):
    check_cloze(text)
    check_choice(text)
    assert cloze(text) == cloze(text) and choice(text) == choice(text)


def test_our_own_text():
    check_cloze(OWN)
    check_choice(OWN)
    assert len(cloze(OWN)) > 15 and len(choice(OWN)) > 10
    assert {question["label"] for question in choice(OWN)} == {0, 1, 2, 3}


def test_lines_that_were_broken_make_no_difference():
    broken = "\n\n".join(textwrap.fill(block, 60, break_on_hyphens=False) for block in OWN.split("\n\n"))
    asked = {question["context"] + question["target"] for question in cloze(broken)}
    assert asked == {question["context"] + question["target"] for question in cloze(OWN)}


def test_passages_do_not_overlap():
    for questions in (cloze(OWN), choice(OWN)):
        places = sorted((plain(OWN).index(q["context"]), len(q["context"])) for q in questions)
        assert all(start + length <= following for (start, length), (following, _) in pairwise(places))


def test_the_order_is_the_texts():
    """Golden: the same on every machine. Another text, another order."""
    assert [question["target"] for question in cloze(OWN)][:3] == [" garden", " expense", " innocence"]
    places = [plain(OWN).index(question["context"]) for question in cloze(OWN)]
    assert places != sorted(places)


def test_the_folder_is_lm_evals(tmp_path):
    counts = local_tasks.write(OWN, ["local_cloze"], tmp_path)
    lines = (tmp_path / "local_cloze.jsonl").read_text().splitlines()
    assert counts == {"local_cloze": len(lines)} and json.loads(lines[0]) == cloze(OWN)[0]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["local_cloze.jsonl", "local_cloze.yaml"]


@pytest.mark.parametrize("text", ["", "Too short.", "word " * 500, "# heading\n\n" * 100])
def test_a_text_without_questions(text, tmp_path):
    with pytest.raises(ConfigError, match="the text has no question for local_choice"):
        local_tasks.write(text, ["local_choice"], tmp_path)
