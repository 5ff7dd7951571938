"""The tuner on real ranks: what is wrong is refused before it is timed, ranks stop together, and its table is used."""

import itertools
import os
from unittest import mock

import pytest
import torch
import torch.distributed as dist

import megatron_lowbit as lowbit
from megatron_lowbit.collectives import pipeline
from megatron_lowbit.tuned_table import TunedTable, fastest
from megatron_lowbit.tuning import tuner
from megatron_lowbit.tuning.candidates import candidates
from megatron_lowbit.tuning.tuner import Job, Tuner
from tests.ranks import run_ranks

SMALL, LARGE = 16 << 10, 2 << 20  # all rows of the small one are computed anew, every other one of the large one


def _tuned(job):
    return Tuner(dist.group.WORLD, job).table()


def _tunes(rank, world, folder):
    made = _tuned(Job(("int4:g32", "selective4"), ("bf16", "fp32"), (SMALL, LARGE), 600.0))
    expected = {str(way) for way in candidates(False, "cpu", LARGE)}
    for rows in made.rows.values():
        assert [row.bytes for row in rows] == [SMALL, LARGE]
        for row in rows:
            assert not row.failed and row.best == fastest(row.ms, made.margin) and "exact" in row.ms
            assert row.bytes == SMALL or row.ms.keys() | row.skipped.keys() == expected
    if rank == 0:
        made.save(f"{folder}/table.json")
    os.environ["LOWBIT_TUNED"] = f"{folder}/table.json"
    dist.barrier()
    taken = []
    for nbytes in (SMALL, LARGE):
        lowbit.reset_stats()
        lowbit.all_reduce(torch.ones(nbytes // 8192, 4096, dtype=torch.bfloat16), "int4:g32")
        taken += lowbit.stats()["all_reduce"]["paths"]
    return [sorted(made.rows), made.digest, taken, [row.algorithm for row in made.rows["int4:g32", "bf16"]]]


@pytest.mark.parametrize("world", [2, 3])
def test_every_candidate_is_accounted_for_and_the_table_is_used(tmp_path, world):
    results = run_ranks(world, _tunes, str(tmp_path))
    for parts, digest, taken, best in results:
        assert parts == [(spec, dtype) for spec in ("int4:g32", "selective4") for dtype in ("bf16", "fp32")]
        assert taken == best and digest == results[0][1]
    read = TunedTable.load(tmp_path / "table.json")
    assert read.digest == results[0][1] and read.key.world == world and 0 < read.seconds < read.budget_seconds


def _on_nodes(rank, world):
    os.environ["LOWBIT_NODE"] = "ab"[rank // 2]
    made = _tuned(Job(("int4:g32", "selective4"), ("bf16",), (SMALL,), 600.0))
    (nested,), (flat,) = made.rows["int4:g32", "bf16"], made.rows["selective4", "bf16"]
    return [
        list(made.key.nodes),
        sorted(nested.ms.keys() | nested.skipped),
        nested.failed,
        sorted(flat.ms | flat.skipped),
    ]


def test_on_several_nodes_hierarchical_is_a_candidate_where_the_codec_allows(monkeypatch):
    for nodes, nested, failed, flat in run_ranks(4, _on_nodes):
        assert nodes == [2, 2] and failed == {}
        assert nested == ["exact", "hierarchical/1", "one-shot/1", "two-step/1"]
        assert flat == ["exact", "one-shot/1", "two-step/1"]


def _wrong_sum(out):
    out *= 1.01


def _wrong_row(out):
    out[1] = 0  # none of those that are computed anew


def _nan(out):
    out[0, 0] = float("nan")


WRONG = {"sum": _wrong_sum, "row": _wrong_row, "nan": _nan}


def _spoils(rank, world, how, culprits):
    calls, honest = [], pipeline.two_step

    def spoiled(x, *args):
        calls.append(x.nbytes)
        out, sent = honest(x, *args)
        if rank in culprits:
            WRONG[how](out)
        return out, sent

    with mock.patch.object(pipeline, "two_step", spoiled):
        made = _tuned(Job(("int4:g32",), ("bf16",), (LARGE,), 600.0))
    (row,) = made.rows["int4:g32", "bf16"]
    return [row.failed, len(calls), row.algorithm, sorted(row.ms), made.digest]


@pytest.mark.parametrize(
    "how, culprits, flaws",
    [
        ("sum", (1,), ["not what one process computes from the same values on rank 1", "other values on rank 1"]),
        ("sum", (0, 1), ["not what one process computes from the same values on rank 0, 1"]),
        ("row", (0, 1), ["too far from the exact sum on rank 0, 1"]),
        ("row", (1,), ["too far from the exact sum on rank 1", "other values on rank 1 than on rank 0"]),
        ("nan", (0,), ["not finite on rank 0", "other values on rank 1 than on rank 0"]),
    ],
)
def test_a_wrong_candidate_is_named_and_neither_timed_nor_chosen(how, culprits, flaws):
    results = run_ranks(2, _spoils, how, culprits)
    for failed, calls, algorithm, timed, digest in results:
        assert list(failed) == ["two-step/1", "two-step/4"] and calls == 2, "once each, to be verified"
        assert all(flaw in why for flaw in flaws for why in failed.values()), failed
        assert algorithm != "two-step" and not any("two-step" in way for way in timed)
        assert digest == results[0][4]


def _spoils_exact(rank, world):
    honest = pipeline.one_shot

    def spoiled(x, codec, *args):
        out, sent = honest(x, codec, *args)
        if rank == 1 and codec.spec == "bf16":
            _wrong_sum(out)
        return out, sent

    with mock.patch.object(pipeline, "one_shot", spoiled):
        try:
            _tuned(Job(("int4:g32",), ("bf16",), (SMALL,), 600.0))
        except lowbit.RankError as error:
            return str(error)


def test_wrong_exact_sums_over_own_connections_end_it_on_every_rank():
    for message in run_ranks(2, _spoils_exact):
        assert "exact sums over the ranks' own connections are not what one process computes" in message
        assert "on rank 1" in message and "LOWBIT_TRANSPORT=torch" in message


def _short_of_time(rank, world, budget):
    """Clocks tick with every look at them; rank 1's runs faster."""
    ticks = itertools.count(0, 1 + rank)
    said = []
    with mock.patch.object(tuner.time, "monotonic", lambda: float(next(ticks))):
        job = Job(("int4:g32", "int8:g128"), ("bf16",), (SMALL, 2 * SMALL, 4 * SMALL, 8 * SMALL), budget)
        try:
            made = Tuner(dist.group.WORLD, job, said.append).table()
        except lowbit.ConfigError as error:
            return str(error)
    rows = {" ".join(part): [row.bytes for row in rows] for part, rows in made.rows.items()}
    return [rows, made.seconds, made.digest, said]


def test_ranks_stop_together_when_the_time_is_over():
    results = run_ranks(2, _short_of_time, 300.0)
    rows, seconds, digest, said = results[0]
    assert [rows, digest] == [results[1][0], results[1][2]]
    assert 300 <= seconds <= 310  # of the faster clock
    assert rows.keys() == {"int4:g32 bf16", "int8:g128 bf16"}, "each has its share of the time"
    for found in rows.values():
        assert found == [SMALL, 2 * SMALL, 4 * SMALL, 8 * SMALL][: len(found)]
    assert sum(map(len, rows.values())) < 8 and said[0] == "int4:g32 bf16 16,384 bytes"


def test_a_time_too_short_for_anything_is_an_error_on_every_rank():
    for message in run_ranks(2, _short_of_time, 8.0):
        assert message.startswith("8 s are too short to measure 16384 bytes: allow more with --budget-seconds")


def _loses_a_rank(rank, world, folder):
    honest = pipeline.one_shot

    def dies(*args):
        if rank == 1:
            os._exit(0)
        return honest(*args)

    with mock.patch.object(pipeline, "one_shot", dies):
        try:
            _tuned(Job(("int4:g32",), ("bf16",), (SMALL,), 60.0))
        except lowbit.RankError as error:
            with open(f"{folder}/said", "w") as file:
                file.write(str(error))
    os._exit(0)


def test_a_lost_rank_is_named_as_such(tmp_path):
    run_ranks(2, _loses_a_rank, str(tmp_path), timeout=60, dead=(0, 1))
    assert "rank 0 lost rank 1 of its group of 2" in (tmp_path / "said").read_text()


@pytest.mark.parametrize(
    "options, message",
    [
        ({"specs": ()}, "nothing to measure"),
        ({"specs": ("int1",)}, "unknown codec 'int1'"),
        ({"dtypes": ("int8",)}, "dtype 'int8' is unknown: use bf16, fp16, fp32"),
        ({"sizes": (8,)}, "size 8: give bytes"),
        ({"sizes": (1 << 40,)}, "size 1099511627776"),
        ({"budget_seconds": 0.0}, "a budget of 0.0 s"),
        ({"budget_seconds": float("nan")}, "a budget of nan s"),
    ],
)
def test_jobs_that_cannot_be(options, message):
    with pytest.raises(lowbit.ConfigError, match=message):
        Job(**{"specs": ("int4:g32",)} | options)


def test_a_job_is_in_order_and_without_repetitions():
    job = Job(("int4", "int8:g128", "int4:g32"), ("bf16", "bf16"), (LARGE, SMALL, LARGE))
    assert (job.parts, job.sizes) == ([("int4:g32", "bf16"), ("int8:g128", "bf16")], (SMALL, LARGE))
