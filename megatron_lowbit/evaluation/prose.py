"""Paragraphs and sentences of a plain text, as far as they can be told without knowing its language.

Lines that were broken to fit a page are put together again. Headings, verse, tables and what Project Gutenberg says
about itself are left out, and nothing reaches across such a gap. Covers languages that have spaces between words and
. ! ? behind sentences.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass

LONG_LINE = 160  # characters: who writes longer lines writes a paragraph a line
LONG_PARAGRAPH = 20  # words: prose, whatever it ends in
INDENT = 3  # spaces in front of most lines: verse or a table
CLOSING = "\"'”’»)\\]"
ENDS = re.compile(rf"[.!?…][{CLOSING}]*$")
BREAK = re.compile(rf"[.!?…][{CLOSING}]*\s+")
OPENING = "\"'“‘«([_-–—* "
BROKEN = re.compile(r"(\w-|--|[—–])$")  # a line that goes on without a space
HEADING = re.compile(r"(chapter|book|part|volume|act|scene|canto|letter|section)\s+([ivxlc]+|\d+)\b", re.IGNORECASE)
ABBREVIATIONS = frozenset(
    "mr mrs ms dr st prof rev hon capt col gen lieut sergt esq jr sr no vol chap fig messrs mme mlle vs viz".split()
)
GUTENBERG = re.compile(r"^\*\*\* ?(START|END) OF .*$", re.MULTILINE)


@dataclass(frozen=True)
class Sentence:
    """`opens`: whether a paragraph begins with it."""

    text: str
    opens: bool


def sections(text: str) -> Iterator[list[Sentence]]:
    """Runs of paragraphs with nothing left out between them, sentence by sentence."""
    section: list[Sentence] = []
    for lines in _blocks(text):
        paragraph = joined(lines)
        if _is_prose(lines, paragraph):
            section += [Sentence(part, opens=not place) for place, part in enumerate(sentences(paragraph))]
        elif section:
            yield section
            section = []
    if section:
        yield section


def joined(lines: list[str]) -> str:
    """The paragraph that was broken into lines. A hyphen at a line's end stays: whether it belongs to the word or to
    the page cannot be told, and books in plain text break lines at hyphens that are there anyway."""
    paragraph = ""
    for line in filter(None, (" ".join(line.split()) for line in lines)):
        paragraph += line if not paragraph or BROKEN.search(paragraph) else f" {line}"
    return paragraph


def sentences(paragraph: str) -> list[str]:
    """In order; joined by a space they are the paragraph."""
    found, start = [], 0
    for end in BREAK.finditer(paragraph):
        following = paragraph[end.end() :].lstrip(OPENING)[:1]
        before = paragraph[start : end.start()].rpartition(" ")[2].lstrip(OPENING)
        if following.islower() or not following.isalnum():
            continue
        if paragraph[end.start()] == "." and (before.casefold() in ABBREVIATIONS or _is_initial(before)):
            continue
        found.append(paragraph[start : end.end()].rstrip())
        start = end.end()
    rest = paragraph[start:].strip()
    return [*found, rest] if rest else found


def _is_initial(word: str) -> bool:
    return len(word) == 1 and word.isupper() and word != "I"


def _blocks(text: str) -> Iterator[list[str]]:
    """Lines between blank ones; a line each where lines are as long as paragraphs."""
    text = text.lstrip("\ufeff").replace("\r\n", "\n").replace("\r", "\n")
    for mark in GUTENBERG.finditer(text):
        if mark[1] == "END":
            text = text[: mark.start()]
            break
    text = text[max((mark.end() for mark in GUTENBERG.finditer(text)), default=0) :]
    for block in re.split(r"\n\s*\n", textwrap.dedent(text)):
        lines = [line for line in block.splitlines() if line.strip()]
        if any(len(line) > LONG_LINE for line in lines):
            yield from ([line] for line in lines)
        elif lines:
            yield lines


def _is_prose(lines: list[str], paragraph: str) -> bool:
    letters = [char for char in paragraph if char.isalpha()]
    words = len(paragraph.split())
    indented = sum(line.startswith(" " * INDENT) for line in lines)
    if not letters or 2 * sum(char.isupper() for char in letters) > len(letters):
        return False
    if len(lines) > 1 and 2 * indented > len(lines):
        return False
    if HEADING.match(paragraph) and words < LONG_PARAGRAPH:
        return False
    return words >= LONG_PARAGRAPH or bool(ENDS.search(paragraph))
