"""Which windows are planned on, and which are held out."""

import pytest

pytest.importorskip("scipy")

from megatron_lowbit.__main__ import parser
from megatron_lowbit.cli.plan_job import check
from megatron_lowbit.errors import ConfigError


def windows(*argv: str):
    arguments = parser().parse_args(["plan", "--budget-bits", "4", "--out", "plan.json", *argv])
    return check(arguments).windows()


def text(words: int, path):
    path.write_text(" ".join(f"number {i}" for i in range(words)))
    return ["--text", str(path)]


@pytest.mark.parametrize(
    ("argv", "planning", "held_out"),
    [
        ([], 16, 32),
        (["--windows", "3"], 3, 32),
        (["--held-out-windows", "5"], 16, 5),
        (["--windows", "3", "--held-out-windows", "40"], 3, 40),
    ],
)
def test_the_first_are_planned_on_and_those_behind_held_out(argv, planning, held_out, tmp_path):
    first, other, rest, number = windows("--window-length", "16", *text(600, tmp_path / "a.txt"), *argv)
    assert (len(first), len(rest), number) == (planning, held_out, planning)
    everything = [token for window in [*first, *rest] for token in window.ids.tolist()]
    assert everything == other.tokens(other.text)[: len(everything)]


def test_a_short_text_is_shared_out(tmp_path):
    length = ["--window-length", "16"]
    first, _, rest, _ = windows(*length, *text(20, tmp_path / "a.txt"))
    there = len(first) + len(rest)
    assert len(first) == there // 3 and there < 48
    assert len(windows(*length, *text(20, tmp_path / "a.txt"), "--held-out-windows", "1")[0]) == there - 1


def test_windows_that_overlap_are_not_shared(tmp_path):
    """A stride of 6: two windows begin before one of 16 tokens is over, and are left out in between."""
    argv = ["--window-length", "16", "--stride", "6", "--windows", "4", "--held-out-windows", "2"]
    first, other, rest, number = windows(*argv, *text(100, tmp_path / "a.txt"))
    ids = other.tokens(other.text)
    assert number == 6 and 6 * 6 >= 3 * 6 + 16
    assert [window.ids.tolist() for window in rest] == [ids[36:52], ids[42:58]]
    assert first[-1].ids.tolist() == ids[18:34]


def test_another_text_is_held_out_whole(tmp_path):
    argv = ["--window-length", "16", *text(100, tmp_path / "a.txt"), "--windows", "2"]
    (tmp_path / "b.txt").write_text("A different story altogether, " * 40)
    first, other, rest, number = windows(*argv, "--held-out", str(tmp_path / "b.txt"), "--held-out-windows", "3")
    assert (len(first), len(rest), number, other.facts["text"]) == (2, 3, 0, "b.txt")
    assert rest[0].ids.tolist() == other.tokens("A different story altogether, " * 40)[:16]
    with pytest.raises(ConfigError, match="the text that is planned on"):
        windows(*argv, "--held-out", str(tmp_path / "a.txt"))
