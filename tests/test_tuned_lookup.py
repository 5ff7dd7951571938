"""Tables that are used without being asked for, and those that are named: by real ranks, the table on rank 0 only."""

import os
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import megatron_lowbit as lowbit
from megatron_lowbit import tuned_lookup
from megatron_lowbit.communicator import communicator
from megatron_lowbit.tuned_table import TunedTable
from tests.ranks import run_ranks
from tests.tuned_tables import KEY, table

# As no thresholds would have it: two ranks would take one-shot, from 128 KiB on.
ROWS = {4096: "two-step/2", 16384: "exact", 65536: "two-step/1"}


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("LOWBIT_TUNED", raising=False)
    return tmp_path


def _here(cache):
    """This rank's settings: only rank 0 has a cache."""
    rank = int(os.environ["RANK"])
    os.environ["XDG_CACHE_HOME"] = str(Path(cache) / str(rank))
    os.environ["LOWBIT_TUNED"] = ""


def _key():
    """Of the group, from a communicator that looks for no table."""
    return communicator(None, lowbit.CommConfig("int4:g32", min_bytes=0)).key


def _paths(sizes, dtype=torch.bfloat16, spec="int4:g32", **options):
    """What was taken for messages of `sizes` bytes, and what was warned about."""
    found, group = [], None
    config = lowbit.CommConfig(spec, **options)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for nbytes in sizes:
            lowbit.reset_stats()
            communicator(group, config).all_reduce(torch.ones(nbytes // dtype.itemsize // 64, 64, dtype=dtype))
            (stats,) = lowbit.stats().values()
            found.append([list(stats["paths"]), list(stats["fallbacks"])])
    return found, [str(warning.message) for warning in caught if "tuned table" in str(warning.message)]


def _automatic(rank, world, cache):
    _here(cache)
    if rank == 0:
        path = tuned_lookup.place(_key())
        path.parent.mkdir(parents=True)
        table(ROWS, _key()).save(path)
    else:
        _key()
    torch.distributed.barrier()
    paths, said = _paths([2048, 4096, 16384, 65536, 1 << 20])
    assert rank == 0 or not tuned_lookup.place(_key()).exists()
    other, about = _paths([65536, 1 << 20], torch.float32)
    named, _ = _paths([1 << 20], algorithm="one-shot")
    limited, _ = _paths([4096], min_bytes=8192)
    os.environ["LOWBIT_TUNED"] = "none"
    off, _ = _paths([4096], sites=("*",))
    return [paths, said, other, about, named, limited, off]


@pytest.mark.parametrize("world", [2, 3])
def test_this_users_own_is_used_by_all_ranks_and_only_rank_0_has_it(tmp_path, world):
    results = run_ranks(world, _automatic, str(tmp_path))
    usual = ["one-shot" if world == 2 else "two-step"]
    for rank, (paths, said, other, about, named, limited, off) in enumerate(results):
        exact = [["exact"], ["exact is faster (tuned)"]]
        assert paths == [exact, [["two-step"], []], exact, [["two-step"], []], [["two-step"], []]]
        assert said == []
        # fp32 is not in the table: sizes decide, which rank 0 says once
        assert other == [[["exact"], ["below min_bytes"]], [usual, []]]
        assert len(about) == (rank == 0)
        assert all("nothing about int4:g32 in fp32" in text and "--comm int4:g32" in text for text in about)
        # who names an algorithm or a size has decided
        assert named == [[["one-shot"], []]] and limited == [[["exact"], ["below min_bytes"]]]
        assert off == [[["exact"], ["below min_bytes"]]]


def _of_any_backend(rank, world):
    groups = [dist.new_group([0, 1], backend=name) for name in ("gloo", "cpu:gloo", "gloo")]
    config = lowbit.CommConfig("int4:g32", min_bytes=0)
    found = [communicator(group, config).key.backend for group in groups[:2]]
    os.environ["LOWBIT_TRANSPORT"] = "torch"
    return [*found, communicator(groups[2], config).key.backend]


def test_a_group_is_of_the_backend_that_carries_its_tensors_and_bytes():
    assert run_ranks(2, _of_any_backend) == [["gloo", "gloo", "gloo-torch"]] * 2


def _stale(rank, world, cache):
    _here(cache)
    key = _key()
    if rank == 0:
        stale = replace(key, versions=dict(key.versions) | {"torch": "1.0"})
        path = tuned_lookup.place(key)
        path.parent.mkdir(parents=True)
        table(ROWS, stale).save(path)
    torch.distributed.barrier()
    left_alone = _paths([4096, 1 << 20])
    errors = []

    def attempt(**options):
        try:
            communicator(None, lowbit.CommConfig("int4:g32", **options))
            errors.append("nothing")
        except lowbit.LowBitError as error:
            errors.append(f"{type(error).__name__}: {error}".replace(f"this is rank {rank}", "this is …"))

    attempt(tuned=table(ROWS, replace(key, world=5, nodes=(5,))))
    attempt(tuned=table(ROWS if rank else {4096: "exact"}, key))  # each has another table
    os.environ["LOWBIT_TUNED"] = str(tuned_lookup.place(key)) if rank == 0 else "a name that only rank 0 reads"
    attempt(sites=("a",))  # a communicator is made once for each config
    os.environ["LOWBIT_TUNED"] = "" if rank else "none"
    attempt(sites=("b",))
    return [left_alone, errors]


def test_stale_and_foreign_tables(tmp_path):
    (first, errors), (second, others) = run_ranks(2, _stale, str(tmp_path))
    assert first[0] == second[0] == [[["exact"], ["below min_bytes"]], [["one-shot"], []]]
    assert len(first[1]) == 1 and second[1] == []  # one warning, from rank 0
    assert "2-ranks_1x2_gloo.json does not fit: made with torch 1.0, this is" in first[1][0]
    assert errors == others
    foreign, differ, stale, disagree = errors
    assert "ConfigError" in foreign and "made for nodes 5, this is 2" in foreign and "for world 5, this is 2" in foreign
    assert "RankError: ranks disagree on tuned table" in differ
    assert "ConfigError" in stale and "made with torch 1.0" in stale and "run 'megatron-lowbit tune' again" in stale
    assert "ranks disagree on tuned: rank 0 has 'none', rank 1 has 'automatic'" in disagree


def test_where_it_is_looked_for(home, monkeypatch):
    assert tuned_lookup.place(KEY) == home / "megatron_lowbit/tuned/a-cpu-2-cores_2-ranks_1x2_gloo.json"
    uneven = replace(KEY, world=3, nodes=(1, 2))
    assert tuned_lookup.place(uneven).name == "a-cpu-2-cores_3-ranks_1-2_gloo.json"
    assert len(tuned_lookup.place(replace(KEY, device="x" * 999, nodes=tuple(range(999)))).name) < 200
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")  # which the specification says to ignore
    assert tuned_lookup.folder() == Path.home() / ".cache/megatron_lowbit/tuned"

    def homeless():
        raise RuntimeError("no home")

    monkeypatch.setattr(Path, "home", homeless)
    assert tuned_lookup.place(KEY) is None and tuned_lookup.find(None, KEY) is None


def test_a_cache_that_cannot_be_looked_into_has_no_table(monkeypatch):
    monkeypatch.delenv("LOWBIT_TUNED", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", "/" + "x" * 300)  # as for a folder of another user: not FileNotFoundError
    with pytest.raises(OSError):
        tuned_lookup.place(KEY).exists()
    assert tuned_lookup.find(None, KEY) is None


def test_where_warnings_are_errors_all_ranks_hear_of_it(home):
    path = tuned_lookup.place(KEY)
    path.parent.mkdir(parents=True)
    path.write_text("{")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        message = tuned_lookup.told(None, KEY)
    with pytest.raises(lowbit.ConfigError, match=f"{path} cannot be read"):
        tuned_lookup.heard(message)


def test_a_damaged_one_is_left_alone_with_a_warning_but_not_if_it_was_named(home, monkeypatch):
    path = tuned_lookup.place(KEY)
    assert tuned_lookup.find(None, KEY) is None
    path.parent.mkdir(parents=True)
    path.write_text("{")
    with pytest.warns(UserWarning, match=f"{path} cannot be read"):
        assert tuned_lookup.find(None, KEY) is None
    monkeypatch.setenv("LOWBIT_TUNED", str(path))
    with pytest.raises(lowbit.ConfigError, match=f"{path} cannot be read"):
        tuned_lookup.find(None, KEY)
    table(ROWS).save(path)
    assert tuned_lookup.find(None, KEY).digest == table(ROWS).digest
    monkeypatch.setenv("LOWBIT_TUNED", "absent.json")
    with pytest.raises(lowbit.ConfigError, match=r"no tuned table absent.json: make one with 'megatron-lowbit tune'"):
        tuned_lookup.find(None, KEY)
    assert isinstance(tuned_lookup.find(table(ROWS), KEY), TunedTable)  # a table in hand comes first
