"""Texts as they come: broken lines, headings, verse, abbreviations."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_lowbit.evaluation.prose import joined, sections, sentences

BOOK = """\ufeffThe Project Gutenberg eBook of Nothing\r
\r
*** START OF THE PROJECT GUTENBERG EBOOK NOTHING ***\r
\r
CHAPTER I. The Rabbit-Hole

Alice had peeped into the waistcoat-
pocket of Mr. Rabbit, and there--
or so she thought--was a watch. "Is it late?" she
said to him.

"Very."

Chapter II

    How doth the little crocodile
    Improve his shining tail,
    And pour the waters of the Nile.

        *       *       *       *

It was the end of it.

*** END OF THE PROJECT GUTENBERG EBOOK NOTHING ***

This is a licence.
"""


def test_a_book():
    found = [[(sentence.text, sentence.opens) for sentence in section] for section in sections(BOOK)]
    assert found == [
        [
            (
                "Alice had peeped into the waistcoat-pocket of Mr. Rabbit, and there--or so she thought--was a watch.",
                True,
            ),
            ('"Is it late?" she said to him.', False),
            ('"Very."', True),
        ],
        [("It was the end of it.", True)],
    ]


def test_paragraphs_may_be_lines():
    long = "The rain fell on the house and on the river. " * 5
    text = f"= Title =\n{long}\n{long}\n"
    (section,) = sections(text)
    assert [sentence.opens for sentence in section] == ([True] + [False] * 4) * 2


@pytest.mark.parametrize(
    ("paragraph", "parts"),
    [
        ("He saw Dr. Brown. She did not.", ["He saw Dr. Brown.", "She did not."]),
        ("So did I. Then J. Smith left!", ["So did I.", "Then J. Smith left!"]),
        ("“No!” said he. ‘Why?’ — “Go.”", ["“No!” said he.", "‘Why?’", "— “Go.”"]),
        ("It was 3.5 miles. And then . . . nothing", ["It was 3.5 miles.", "And then . . . nothing"]),
        ("Это дом. Он стар.", ["Это дом.", "Он стар."]),
    ],
)
def test_sentences(paragraph, parts):
    assert sentences(paragraph) == parts


@given(st.lists(st.text("aB.!?'\" -", max_size=12), max_size=12))
def test_nothing_is_lost(lines):
    paragraph = joined(lines)
    assert " ".join(sentences(paragraph)) == paragraph
    assert paragraph.replace(" ", "") == "".join(lines).replace(" ", "")
