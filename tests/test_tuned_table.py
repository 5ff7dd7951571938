"""A tuned table: read back as it was written, refused by name where it cannot be right, looked up as documented."""

import copy
import itertools
import json
import re
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import megatron_lowbit as lowbit
from megatron_lowbit.tuned_table import Candidate, TunedTable, fastest
from tests.tuned_tables import KEY, row, table

ROWS = {16384: "exact", 65536: "one-shot/1", 1 << 20: "two-step/4"}


def test_reads_back_what_it_wrote(tmp_path):
    made = TunedTable(
        KEY,
        {("int4:g32", "bf16"): [row(16384, "exact", **{"two-step/1": "ranks differ"}), row(65536, "one-shot/3")],
         ("gauss4:g128", "fp32"): [row(1 << 20, "two-step/2")]},
        "2026-11-22T00:00:00+00:00", 60.0, 12.5, margin=0.05,
    )  # fmt: skip
    made.save(tmp_path / "a.json")
    read = TunedTable.load(tmp_path / "a.json")
    assert read.as_json() == made.as_json() and read.digest == made.digest
    assert (read.key, dict(read.rows), read.made, read.margin) == (KEY, dict(made.rows), made.made, 0.05)
    assert copy.deepcopy(read).digest == made.digest and "2 specs and dtypes" in repr(read)
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


def test_the_digest_is_of_what_decides():
    made = table(ROWS)
    assert replace(made, made="another day", seconds=1.0, name="another").digest == made.digest
    assert replace(made, key=replace(KEY, protocol=9)).digest != made.digest  # a config with it is checked anew
    assert table(ROWS | {65536: "exact"}).digest != made.digest != replace(made, margin=0.1).digest


def changed(path, value):
    """A table's JSON with the value at `path` replaced; `...` takes it away."""
    found = table(ROWS).as_json()
    *way, last = path
    at = found
    for step in way:
        at = at[step]
    if value is ...:
        del at[last]
    else:
        at[last] = value
    return found


ROW = ("tables", 0, "rows", 1)


@pytest.mark.parametrize(
    "path, value, message",
    [
        (("format",), "megatron_lowbit.plan", "is none: give a file that 'megatron-lowbit tune' wrote"),
        (("format_version",), 2, "has format 2, this one reads 1: update megatron-lowbit, or run"),
        (("format_version",), True, "has format True"),
        (("more",), 1, "has an unknown field 'more'"),
        (("key",), ..., "lacks field 'key'"),
        (("key", "world"), "2", "has '2' as world, which is no int"),
        (("key", "world"), 1, "is for 1 ranks on nodes of 2"),
        (("key", "nodes"), [1, 2], r"is for 2 ranks on nodes of 1 \+ 2"),
        (("key", "nodes"), [1.0, 1], "has '1.0' as nodes, which is no int"),
        (("key", "versions"), {"torch": 2}, "has '2' as torch, which is no str"),
        (("key", "color"), "red", "has an unknown field 'color'"),
        (("margin",), 1.5, "has margin 1.5"),
        (("seconds",), -1.0, "took -1.0 s"),
        (("budget_seconds",), float("inf"), "Infinity is no number"),
        (("budget_seconds",), 10**400, "as budget_seconds, which is no float"),
        (("tables",), [], "has no rows"),
        (("tables",), {}, "as tables, which is no list"),
        (("tables", 0), [1], r"has '\[1\]' where fields spec, dtype, rows belong"),
        (("tables", 0, "spec"), "int1", "unknown codec 'int1'"),
        (("tables", 0, "spec"), "int4", r"rows for \(int4, bf16\), which is no spec in its own spelling"),
        (("tables", 0, "dtype"), "int8", r"rows for \(int4:g32, int8\)"),
        (("tables", 0, "rows"), [], r"sizes \[\] for"),
        ((*ROW, "bytes"), 16384, r"sizes \[16384, 16384, 1048576\] .* do not ascend"),
        ((*ROW, "bytes"), 2 << 20, r"do not ascend"),
        ((*ROW, "bytes"), 65536.5, "has '65536.5' as bytes"),
        ((*ROW, "algorithm"), "ring", "candidate 'ring/1' is unknown"),
        ((*ROW, "chunks"), -1, "candidate 'one-shot/-1' is unknown"),
        ((*ROW, "chunks"), 4, "has one-shot/4 as the fastest, and times of exact, one-shot/1, two-step/1"),
        ((*ROW, "ms"), {"one-shot/1": 0.5}, "both it and exact need one"),
        ((*ROW, "ms"), {}, "and times of nothing"),
        ((*ROW, "ms", "exact"), float("nan"), "NaN is no number"),
        ((*ROW, "ms", "exact"), 0.0, "which are not all above 0"),
        ((*ROW, "ms", "two-step/01"), 1.0, "candidate 'two-step/01' is unknown"),
        ((*ROW, "ms", "exact/1"), 1.0, "candidate 'exact/1' is unknown"),
        ((*ROW, "failed"), {"one-shot/1": "ranks differ"}, r"one-shot/1 as the fastest, which failed \(ranks differ\)"),
        ((*ROW, "failed"), {"two-step/1": "ranks differ"}, "has times of two-step/1, which failed"),
        ((*ROW, "failed"), {"two-step/1": 3}, "has '3' as two-step/1"),
        (("tables", 0, "rows", 0, "chunks"), 2, "has exact in 2 chunks"),
    ],
)  # fmt: skip
def test_what_cannot_be_right_is_refused_by_name(tmp_path, path, value, message):
    file = tmp_path / "broken.json"
    file.write_text(json.dumps(changed(path, value)))
    with pytest.raises(lowbit.ConfigError, match=message) as caught:
        TunedTable.load(file)
    assert "broken.json" in str(caught.value)


def test_the_same_spec_twice_is_refused():
    found = table(ROWS).as_json()
    with pytest.raises(lowbit.ConfigError, match="has int4:g32 in bf16 twice: run 'megatron-lowbit tune' again"):
        TunedTable.from_json(found | {"tables": found["tables"] * 2}, "a table")


@pytest.mark.parametrize(
    "content, message",
    [
        (b"{", "cannot be read"),
        (b"\xff\xfe", "cannot be read"),
        (b"[" * 100000, "cannot be read"),
        (b"[1]", "is none"),
        (
            json.dumps(changed(("seconds",), 7)).replace("7", "1e999").encode(),
            "has 'inf' as seconds, which is no float",
        ),
        (b'{"format": "megatron_lowbit.tuned", "format_version": NaN}', "NaN is no number"),
        (None, "there is no tuned table"),
    ],
)
def test_damaged_files(tmp_path, content, message):
    path = tmp_path / "a.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(lowbit.ConfigError, match=message):
        TunedTable.load(path)


def test_a_foreign_or_stale_table_is_refused_with_all_that_differs():
    made = table(ROWS, name="tuned table t.json")
    made.check(KEY)
    here = replace(KEY, device="another CPU, 8 cores", versions=KEY.versions | {"torch": "2.14.0"})
    with pytest.raises(lowbit.ConfigError) as caught:
        made.check(here)
    assert str(caught.value) == (
        "tuned table t.json does not fit: made for device a CPU, 2 cores, this is another CPU, 8 cores; "
        "made with torch 2.13.0, this is 2.14.0: run 'megatron-lowbit tune' again"
    )
    for name, value in (
        ("world", 4), ("nodes", (1, 1)), ("backend", "nccl"), ("codecs", "reference"), ("protocol", 3),
        ("versions", KEY.versions | {"triton": "3.4"}),
    ):  # fmt: skip
        named = "triton none" if name == "versions" else f"for {name} "
        with pytest.raises(lowbit.ConfigError, match=re.escape(named)):
            made.check(replace(KEY, **{name: value}))


def test_choose_over_its_whole_input_space():
    """Written out: one row after the other, and what is asked of each."""
    made = table(ROWS)
    for only, nbytes in itertools.product(
        (None, "one-shot", "two-step", "hierarchical"),
        (0, 1, 16383, 16384, 65535, 65536, 100000, (1 << 20) - 1, 1 << 20, 3 << 20, 64 << 20, 1 << 40),
    ):
        found = made.choose("int4:g32", "bf16", nbytes, only)
        expected = Candidate("exact")
        if 65536 <= nbytes < 1 << 20 and only in (None, "one-shot"):
            expected = Candidate("one-shot", round(nbytes / 65536))
        if nbytes >= 1 << 20 and only in (None, "two-step"):
            expected = Candidate("two-step", 4 * nbytes >> 20)
        assert found == expected, (only, nbytes)
    assert made.choose("int8:g128", "bf16", 1 << 20) is None and made.choose("int4:g32", "fp16", 1 << 20) is None


SIZES = st.lists(st.integers(1, 1 << 30), min_size=1, max_size=8, unique=True).map(sorted)
WAYS = ("one-shot/1", "one-shot/4", "two-step/0", "two-step/3")
TIMES = st.dictionaries(st.sampled_from(WAYS), st.floats(0.01, 10), max_size=4)


@settings(deadline=None)
@given(sizes=SIZES, times=st.lists(TIMES, min_size=8, max_size=8), nbytes=st.integers(0, 1 << 31),
       only=st.sampled_from([None, "one-shot", "two-step"]))  # fmt: skip
def test_the_largest_row_that_is_not_larger_decides(sizes, times, nbytes, only):
    rows = []
    for size, ms in zip(sizes, times):
        ms = {"exact": 1.0, **ms}
        best = fastest(ms, 0.03)
        rows.append(replace(row(size, "exact"), algorithm=best.algorithm, chunks=best.chunks, ms=ms))
    made = replace(table(ROWS), rows={("int4:g32", "bf16"): rows})
    found = TunedTable.from_json(json.loads(json.dumps(made.as_json())), "a").choose("int4:g32", "bf16", nbytes, only)
    below = [row for row in rows if row.bytes <= nbytes]
    allowed = {way: ms for way, ms in (below[-1].ms if below else {}).items() if only in (None, way.split("/")[0])}
    quick = {way: ms for way, ms in allowed.items() if way != "exact" and ms * 1.03 < 1}
    assert (found.algorithm == "exact") == (not quick)
    if quick:
        taken = {ms for way, ms in quick.items() if way.startswith(found.algorithm)}
        assert min(quick.values()) in taken and (found.chunks >= 1 or "two-step/0" in quick)


def test_compressed_wins_by_a_margin_only():
    assert fastest({"exact": 1.0, "one-shot/1": 0.98}, 0.03) == Candidate("exact")
    assert fastest({"exact": 1.0, "one-shot/1": 0.96}, 0.03) == Candidate("one-shot", 1)
    assert fastest({"exact": 1.0, "one-shot/1": 0.5, "two-step/2": 0.6}, 0.03, "two-step") == Candidate("two-step", 2)
    assert fastest({"exact": 1.0}, 0.03) == Candidate("exact")
