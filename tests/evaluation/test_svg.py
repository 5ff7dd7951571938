"""Drawings that share a page: nothing in them points elsewhere, and their colours are the page's."""

import re
from xml.etree import ElementTree

import pytest

pytest.importorskip("matplotlib")

from megatron_lowbit.evaluation.plot import COLORS, INK
from megatron_lowbit.evaluation.svg import inline


def fill(figure):
    axis = figure.subplots()
    axis.plot([0, 1], [0, 1], color=COLORS[0], marker="o")
    axis.set_title("a <b> & c", color=INK)


def test_ids_are_the_drawing_s_own_and_all_that_is_referred_to_is_there():
    found = {name: inline(name, "what", (3, 3), fill) for name in ("one", "two")}
    ids = {name: re.findall(r'\bid="([^"]+)"', svg) for name, svg in found.items()}
    for name, svg in found.items():
        assert len(ids[name]) == len(set(ids[name])) and all(own.startswith(f"{name}-") for own in ids[name])
        used = re.findall(r'(?:url\(#|href="#)([^")]+)', svg)
        assert used and set(used) <= set(ids[name])
    assert not set(ids["one"]) & set(ids["two"])


def test_colours_follow_the_page_and_texts_are_escaped():
    svg = inline("one", "less < more", (3, 3), fill)
    assert "var(--series-0)" in svg and "var(--ink)" in svg
    assert COLORS[0].lower() not in svg.lower() and INK.lower() not in svg.lower()
    root = ElementTree.fromstring(svg)
    assert (
        root.get("role") == "img" and root.get("aria-labelledby") == root[0].get("id") and root[0].text == "less < more"
    )
    assert "a <b> & c" in "".join(root.itertext()) and "<b>" not in svg
    assert "<metadata" not in svg and "<style" not in svg and "purl.org" not in svg
    assert svg == inline("one", "less < more", (3, 3), fill)
