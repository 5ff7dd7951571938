"""The page: what stands in it, read by a parser; and how it renders, looked at by a real browser."""

import io
import math
import re
from html.parser import HTMLParser

import pytest

pytest.importorskip("matplotlib")
pytest.importorskip("jinja2")

from megatron_lowbit.errors import ConfigError
from megatron_lowbit.evaluation.report import Findings, page, write
from tests import evaluations
from tests.browser import browser, find

VOID = {"meta", "link", "br", "hr", "img", "input"}
EVIL = '<script>alert("x")</script>&amp;'
SECTIONS = ("verdict", "cases", "pareto", "bytes", "sensitivity", "consistency", "tasks", "read")


def findings(**changes) -> Findings:
    given = {
        "facts": evaluations.FACTS,
        "rows": evaluations.rows(),
        "command": "megatron-lowbit evaluate --tp 2,8",
        "sensitivity": evaluations.sensitivity(),
        "consistency": evaluations.consistency(),
        "tasks": evaluations.tasks(),
    }
    return Findings(**given | changes)


@pytest.fixture(scope="module")
def text() -> str:
    return page(findings())


class Reader(HTMLParser):
    """Elements as a tree would have them, and the text of each id's element. Fails for what is nested wrongly."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.stack, self.elements, self.cells, self.text = [], [], [], ""
        self.feed(text)
        self.close()
        assert not self.stack, f"never closed: {self.stack}"

    def handle_starttag(self, tag, attributes):
        names = [name for name, _ in attributes]
        assert len(names) == len(set(names)), (tag, names)
        self.elements.append((tag, dict(attributes), tuple(self.stack)))
        if tag in ("td", "th"):
            self.cells.append("")
        if tag not in VOID:
            self.stack.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in VOID:
            self.stack.pop()

    def handle_endtag(self, tag):
        assert self.stack and self.stack[-1] == tag, f"</{tag}> within {self.stack}"
        self.stack.pop()

    def handle_data(self, data):
        self.text += data
        if self.cells and {"td", "th"} & set(self.stack):
            self.cells[-1] += data

    def all(self, tag):
        return [attributes for name, attributes, _ in self.elements if name == tag]


def test_is_well_formed_and_names_everything(text):
    reader = Reader(text)
    ids = [attributes["id"] for _, attributes, _ in reader.elements if "id" in attributes]
    assert len(ids) == len(set(ids)) and set(SECTIONS) <= set(ids)
    assert reader.all("html") == [{"lang": "en"}] and len(reader.all("h1")) == 1 and len(reader.all("title")) >= 1
    assert all(image.get("alt") for image in reader.all("img"))
    assert len(reader.all("svg")) == 6
    for drawing in reader.all("svg"):
        assert drawing["role"] == "img" and drawing["aria-labelledby"] in ids
    assert len(reader.all("table")) == len(reader.all("caption")) == 5
    for attributes in (*reader.all("section"), *reader.all("div")):
        assert attributes.get("aria-labelledby", ids[0]) in ids


def test_loads_nothing(text):
    reader = Reader(text)
    for tag in ("script", "iframe", "object", "embed", "base", "form", "video", "audio", "source"):
        assert not reader.all(tag), tag
    for tag, attributes, _ in reader.elements:
        assert not any(name.startswith("on") for name in attributes), (tag, attributes)
        for name in ("src", "href", "xlink:href", "srcset", "data", "action"):
            assert attributes.get(name, "#").startswith(("#", "data:")), (tag, attributes)
    assert set(re.findall(r"https?://[^\"' <]+", text)) <= {
        "http://www.w3.org/2000/svg",
        "http://www.w3.org/1999/xlink",
    }
    assert "@import" not in text and not re.search(r"url\((?!#)", text)


def test_holds_the_numbers(text):
    reader = Reader(text)
    cells = [cell.strip() for cell in reader.cells]
    start = cells.index("gauss4:g128")
    assert cells[start - 1 : start + 12] == [
        "8", "gauss4:g128", "two-step", "4.12", "+0.98%", "+0.88% to +1.08%", "undecided", "74%", "90", "0.00491",
        "0.0196", "97.0%", "50.49",
    ]  # fmt: skip
    for expected in (
        "small", "prose.txt", "a" * 12, "TP 2, 8, simulated", "float32", "32,704 tokens, 64 windows", "torch 2.13.0",
        "2026-11-21", "TP 8: int4:g32, two-step, is the cheapest of 5 cases", "layers.2.mlp is the most sensitive",
        "75% of them are the same features\non average, 50% at the worst site; chance would give 2%",
        "75% are outliers here",
        "megatron-lowbit evaluate --tp 2,8",
    ):  # fmt: skip
        assert expected in reader.text, expected
    assert cells[cells.index("cloze") :][:11] == [
        "cloze", "acc", "8", "int4:g32", "two-step", "0.31", "0.305", "-0.0050", "-0.0200 to +0.0100", "0.400", "400"
    ]  # fmt: skip
    assert cells.count("layers.2.mlp") == 1 and "28.571" not in reader.text and "29%" in cells


def test_bars_are_as_long_as_they_say():
    text = page(findings(rows=[evaluations.row("int4:g32", bits=5.0), evaluations.row("int8", bits=8.0)]))
    assert re.findall(r'class="bar" style="width: ([\d.]+)%"', text) == ["31.2", "50.0", "100.0"]
    dear = evaluations.row("int8", bits=8.0, bytes_per_token=600.0)  # twice as many as bf16
    assert re.findall(r'style="width: ([\d.]+)%"', page(findings(rows=[dear]))) == ["100.0", "50.0"]


def test_what_was_not_measured_is_said():
    text = page(findings(sensitivity=None, consistency=None, tasks=()))
    reader = Reader(text)
    assert len(reader.all("svg")) == 2 and reader.text.count("Not measured.") == 2
    assert "--report-sensitivity sites.json" in reader.text and 'id="tasks"' not in text
    one = Reader(page(findings(consistency=evaluations.consistency(1, False))))
    assert "there are no halves to compare" in one.text and len(one.all("svg")) == 5


def test_what_a_user_named_is_text_and_nothing_else():
    facts = evaluations.FACTS | dict.fromkeys(("model", "text", "dtype"), EVIL)
    rows = [row | {"plan": EVIL} for row in evaluations.rows()]
    sensitivity = evaluations.sensitivity() | {"explanation": EVIL, "spec": EVIL}
    sensitivity["rows"] = [row | {"site": EVIL, "kind": EVIL} for row in sensitivity["rows"]]
    consistency = evaluations.consistency()
    consistency["rows"] = [row | {"site": EVIL, "kind": EVIL} for row in consistency["rows"]]
    tasks = [row | {"task": EVIL, "metric": EVIL, "spec": EVIL} for row in evaluations.tasks()]
    found = Findings(facts, rows, f"evaluate --text '{EVIL}'", sensitivity, consistency, tasks)
    reader = Reader(page(found))
    assert not reader.all("script") and reader.text.count(EVIL) > 20


def test_numbers_that_are_unknown(tmp_path):
    rows = [evaluations.row("int4:g32", windows=1, interval=(math.nan, math.nan), perplexity_error=math.nan)]
    text = page(findings(rows=rows))
    assert not re.search(r"\bnan\b", Reader(text).text, re.IGNORECASE) and "– to –" in text


def test_writes_a_folder_once_and_again(tmp_path, text):
    path = write(findings(), tmp_path / "report")
    assert path == tmp_path / "report" / "index.html" and path.read_text() == text
    write(findings(), tmp_path / "report")
    assert path.read_text() == text and [file.name for file in path.parent.iterdir()] == ["index.html"]
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="give another folder"):
        write(findings(), tmp_path / "file")


SCRIPT = """(() => {
  const box = e => e.getBoundingClientRect(), root = document.documentElement;
  return {
    sections: [...document.querySelectorAll("section h2")].filter(e => box(e).height > 0).map(e => e.id),
    drawings: [...document.querySelectorAll("svg")].map(e => [box(e).width, box(e).height]),
    marks: [...document.querySelectorAll("svg")].map(e => [...e.querySelectorAll("path, use, text")]
      .filter(e => box(e).width > 0 && box(e).height > 0).length),
    images: [...document.images].map(e => [e.complete, e.naturalWidth, e.naturalHeight]),
    overflow: root.scrollWidth - root.clientWidth,
    beyond: [...document.querySelectorAll("h1, h2, p, li, figure, dd, pre, caption span")]
      .filter(e => box(e).right > root.clientWidth + 1).map(e => e.textContent.slice(0, 40)),
    bars: [...document.querySelectorAll(".bar")].map(e => box(e).width),
    mode: document.compatMode,
    paper: getComputedStyle(document.body).backgroundColor,
    inks: [...new Set([...document.querySelectorAll("body, caption, dt, figcaption, .good, .bad, code, pre")]
      .map(e => getComputedStyle(e).color)
      .concat([...document.querySelectorAll("svg text")].map(e => getComputedStyle(e).fill))
      .filter(color => !["rgb(0, 0, 0)", "rgb(255, 255, 255)"].includes(color)))],  // those stand on cells of a map
    small: Math.min(...[...document.querySelectorAll("svg text")].map(e => box(e).height)),
  };
})()"""


@pytest.fixture(scope="module")
def many():
    """Forty specs of three TP sizes and two algorithms, and a model of 48 layers."""
    rows = [
        evaluations.row(f"int{bits}:g{group}:trellis", tp, bits + 16 / group, tp * 4.0**-bits, algorithm=algorithm)
        for tp in (2, 4, 8)
        for algorithm in ("one-shot", "two-step")
        for bits in range(2, 9)
        for group in (16, 32, 64, 128, 256)
    ]
    return findings(rows=rows, sensitivity=evaluations.sensitivity(48), tasks=evaluations.tasks() * 20)


def test_renders_in_a_browser(tmp_path, many):
    evil = findings(facts=evaluations.FACTS | {"model": EVIL, "text": "a-very-long-name-of-a-text-" * 6 + EVIL})
    files = {name: write(found, tmp_path / name) for name, found in {"few": evil, "many": many}.items()}
    papers = {}
    with browser(tmp_path / "profile") as running:
        for file in files.values():
            for width, dark, scripts in ((1280, False, True), (390, False, False), (1280, True, True)):
                opened = running.open(file, width, dark=dark, scripts=scripts)
                found = opened.evaluate(SCRIPT)
                assert opened.complaints == [] and opened.requested == [file.as_uri()]
                assert found["mode"] == "CSS1Compat" and tuple(found["sections"]) == SECTIONS
                assert len(found["drawings"]) == 6 and min(map(min, found["drawings"])) > 100
                assert min(found["marks"]) > 10 and all(all(image) for image in found["images"])
                assert found["overflow"] <= 0 and found["beyond"] == []
                assert min(found["bars"]) > 1 and found["small"] >= 7
                papers[dark] = found["paper"]
                assert len(found["inks"]) >= 4
                assert min(contrast(ink, found["paper"]) for ink in found["inks"]) > 4.5, found["inks"]
                assert distinct(opened.screenshot()) > 20
            opened = running.open(file, 718, media="print")  # A4 without its margins
            found = opened.evaluate(SCRIPT)
            assert found["overflow"] <= 0 and found["beyond"] == [] and opened.pdf().startswith(b"%PDF")
            assert opened.evaluate("getComputedStyle(document.querySelector('.scroll')).overflowX") == "visible"
    assert contrast(papers[False], "rgb(0, 0, 0)") > 15 and contrast(papers[True], "rgb(255, 255, 255)") > 15


def test_a_browser_s_complaints_are_seen(tmp_path):
    """The test above would notice: an error, a message, a request and what is too wide are found."""
    bad = tmp_path / "bad.html"
    bad.write_text('<p style="width: 3000px">x<img src="nowhere.png" alt=""><script>console.log("a"); fail()</script>')
    with browser(tmp_path / "profile") as running:
        opened = running.open(bad, 390)
        methods = {event["method"] for event in opened.complaints}
        assert {"Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Network.loadingFailed"} <= methods
        assert opened.requested == [bad.as_uri(), (tmp_path / "nowhere.png").as_uri()]
        assert opened.evaluate("document.documentElement.scrollWidth - innerWidth") > 1000
        assert running.open(bad, 390, scripts=False).evaluate("document.scripts.length") == 1
        assert distinct(opened.screenshot()) < 20


def test_a_browser_that_must_be_there_is_no_reason_to_skip(monkeypatch):
    monkeypatch.setattr("shutil.which", lambda name: None)
    for value, outcome in (("required", pytest.fail.Exception), ("", pytest.skip.Exception)):
        monkeypatch.setenv("LOWBIT_BROWSER", value)
        with pytest.raises(outcome, match="no browser: none of chromium"):
            find()


def distinct(png: bytes) -> int:
    """How many colours a screenshot has."""
    from PIL import Image

    return len(Image.open(io.BytesIO(png)).convert("RGB").getcolors(1 << 24))


def contrast(one: str, other: str) -> float:
    """Of two colours "rgb(r, g, b)", by WCAG 2.1, relative luminance."""

    def luminance(color):
        parts = [int(part) / 255 for part in re.findall(r"\d+", color)[:3]]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    bright, dim = sorted((luminance(one), luminance(other)), reverse=True)
    return (bright + 0.05) / (dim + 0.05)
