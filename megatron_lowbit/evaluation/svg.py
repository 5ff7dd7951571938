"""Figures of matplotlib as SVG inside an HTML page: colours follow the page's, names for those who cannot see them.

Several figures share one page, so what they refer to inside themselves gets names of its own, and what matplotlib says
about the file is dropped: nothing in the page may point elsewhere.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import TYPE_CHECKING
from xml.etree import ElementTree

from .plot import COLORS, FAINT, INK, PAPER

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SVG, LINK = "http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"
VARIABLES = {INK: "var(--ink)", FAINT: "var(--faint)", PAPER: "var(--paper)"} | {
    color: f"var(--series-{i})" for i, color in enumerate(COLORS)
}
STYLE = {
    "svg.fonttype": "none",  # text stays text: searched, read aloud, sharp
    "font.family": "sans-serif",
    "font.size": 12,
    "text.color": INK,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.facecolor": "none",
    "figure.facecolor": "none",
    "savefig.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
}


def inline(name: str, alt: str, size: tuple[float, float], fill: Callable[[Figure], None]) -> str:
    """An <svg> element that `fill` draws. name: of the figure, unlike any other's of the page; alt: what it shows.

    size: in inches, 72 units of the SVG each. fill: gets an empty figure.
    """
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE | {"svg.hashsalt": name}):
        figure, file = Figure(size, layout="constrained", dpi=72), io.BytesIO()
        fill(figure)
        figure.savefig(file, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    root = ElementTree.fromstring(file.getvalue())
    _clean(root, name)
    title = ElementTree.Element(f"{{{SVG}}}title", id=f"{name}-title")
    title.text = alt
    root.insert(0, title)
    root.attrib |= {"role": "img", "aria-labelledby": f"{name}-title"}
    for unwanted in ("width", "height", "version"):
        root.attrib.pop(unwanted, None)
    ElementTree.register_namespace("", SVG)
    ElementTree.register_namespace("xlink", LINK)
    return ElementTree.tostring(root, encoding="unicode")


def _clean(root: ElementTree.Element, name: str) -> None:
    """Drop what is about the file, make ids the figure's own, and colours the page's."""
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag in (f"{{{SVG}}}metadata", f"{{{SVG}}}style"):  # its style would be the whole page's
                parent.remove(child)
    for element in root.iter():
        for key, value in element.attrib.items():
            if key == "id":
                value = f"{name}-{value}"
            elif key == f"{{{LINK}}}href":
                value = value.replace("#", f"#{name}-", 1) if value.startswith("#") else value
            elif key == "style":
                for color, variable in VARIABLES.items():
                    value = value.replace(color.lower(), variable)
            element.attrib[key] = value.replace("url(#", f"url(#{name}-")
