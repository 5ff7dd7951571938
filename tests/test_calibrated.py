"""Codecs that depend on site and rank: ranks compute what the simulation does, and refuse what does not fit."""

import copy

import pytest
import torch

import megatron_lowbit as lowbit
from tests.calibrations import random_calibration
from tests.ranks import run_ranks
from tests.tensors import same_bits, sample

SITES, FEATURES = ("layers.0.attention", "layers.0.mlp"), 96
SPECS = (
    "selective4:outliers=1/16",
    "int5:g32:outliers=1/16",
    "gauss4:g64:trellis:outliers=1/16",
    "selective4:outliers=1/16/gauss6:outliers=1/16",
    "int6:g32/selective4:outliers=1/16",
)


def _tensor(rank: int, seed: int) -> torch.Tensor:
    return sample(100 * seed + rank, (2, 6, FEATURES), torch.bfloat16)


def _everything(rank, world, path):
    results = {}
    for spec in SPECS:
        for algorithm in ("one-shot", "two-step"):
            config = lowbit.CommConfig(spec=spec, algorithm=algorithm, calibration=path)
            communicator = lowbit.Communicator(None, config)
            for seed, site in enumerate(SITES):
                results[f"{spec} {algorithm} {site}"] = communicator.all_reduce(_tensor(rank, seed), site)
        for seed, site in enumerate(SITES):
            results[f"{spec} reduce_scatter {site}"] = communicator.reduce_scatter(_tensor(rank, seed), 1, site)
            results[f"{spec} all_gather {site}"] = communicator.all_gather(_tensor(rank, seed), 1, site)
            x = _tensor(rank, seed).flatten(0, 1)
            splits = [[12 - world + 1] + [1] * (world - 1)] * world
            received = [s[rank] for s in splits]
            results[f"{spec} all_to_all {site}"] = communicator.all_to_all(x, received, splits[rank], site)
    results["stats"] = lowbit.stats()
    return results


@pytest.mark.parametrize("world", [2, 3])
def test_ranks_compute_what_the_simulation_does(world, tmp_path):
    path = tmp_path / "ranges.safetensors"
    random_calibration(SITES, world, FEATURES).save(path)
    ranks = run_ranks(world, _everything, str(path), timeout=280)  # the first to run compile the kernels
    simulate = lowbit.simulate
    for spec in SPECS:
        for seed, site in enumerate(SITES):
            tensors, known = [_tensor(rank, seed) for rank in range(world)], (str(path), site)
            rows = [x.flatten(0, 1) for x in tensors]
            splits = [[12 - world + 1] + [1] * (world - 1)] * world
            scattered = simulate.reduce_scatter(tensors, spec, 1, *known)
            gathered = simulate.all_gather(tensors, spec, 1, *known)
            exchanged = simulate.all_to_all(rows, spec, splits, *known)
            for rank, result in enumerate(ranks):
                for algorithm in ("one-shot", "two-step"):
                    total = simulate.all_reduce(tensors, spec, algorithm, *known)
                    assert same_bits(result[f"{spec} {algorithm} {site}"], total)
                    exact = sum(x.float() for x in tensors)
                    assert (total.float() - exact).square().mean() < 0.1 * exact.square().mean()  # ranges cut some off
                assert same_bits(result[f"{spec} reduce_scatter {site}"], scattered[rank])
                assert same_bits(result[f"{spec} all_gather {site}"], gathered)
                assert same_bits(result[f"{spec} all_to_all {site}"], exchanged[rank])
    for rank in ranks:
        assert all(
            site["fallbacks"] == {} and site["paths"]["one-shot"] == len(SPECS) for site in rank["stats"].values()
        )


def test_the_site_and_the_sender_decide_what_comes_out(tmp_path):
    """With other ranges the same values come out differently: statistics are really those of the site and the rank."""
    calibration = random_calibration(SITES, 2, FEATURES)
    x, spec = [_tensor(rank, 0) for rank in range(2)], "selective4:outliers=1/16"
    here, there = (lowbit.simulate.all_reduce(x, spec, "one-shot", calibration, site) for site in SITES)
    assert not torch.equal(here, there)
    swapped = lowbit.simulate.all_reduce(x[::-1], spec, "one-shot", calibration, SITES[0])
    assert not torch.equal(here, swapped)


def _refusals(rank, world, folder):
    messages = {}

    def attempt(name, function):
        try:
            function()
        except lowbit.LowBitError as error:
            messages[name] = f"{type(error).__name__}: {error}"

    spec, x = "selective4:outliers=1/16", torch.zeros(4, FEATURES)

    def communicator(name):
        return lowbit.Communicator(None, lowbit.CommConfig(spec=spec, calibration=f"{folder}/{name}", min_bytes=0))

    good = communicator("two")
    attempt("site", lambda: good.all_reduce(x, "layers.7.mlp"))
    attempt("features", lambda: good.all_reduce(torch.zeros(4, 2 * FEATURES), SITES[0]))
    attempt("last dimension", lambda: good.reduce_scatter(x, -1, SITES[0]))
    attempt("ranks", lambda: communicator("three"))
    attempt("differ", lambda: communicator("two" if rank else "other"))
    attempt("functional", lambda: lowbit.all_reduce(x, spec))
    one_shot_only = lowbit.CommConfig(spec=spec, algorithm="one-shot", calibration=f"{folder}/one-shot")
    attempt("gather", lambda: lowbit.Communicator(None, one_shot_only).all_gather(x, 0, SITES[0]))
    messages["still works"] = good.all_reduce(x, SITES[0]).shape == x.shape
    return messages


def test_what_does_not_fit_is_an_error_on_every_rank_and_nothing_hangs(tmp_path):
    random_calibration(SITES, 2, FEATURES).save(tmp_path / "two")
    random_calibration(SITES, 2, FEATURES, seed=1).save(tmp_path / "other")
    random_calibration(SITES, 3, FEATURES).save(tmp_path / "three")
    random_calibration(SITES, 2, FEATURES, sums=False).save(tmp_path / "one-shot")
    for messages in run_ranks(2, _refusals, str(tmp_path)):
        assert "lacks layers.7.mlp, and has layers.0.attention" in messages["site"]
        assert "192 features at a site that was calibrated with 96" in messages["features"]
        assert "48 features at a site that was calibrated with 96" in messages["last dimension"]
        assert "made for TP 3, this group has 2 ranks: run calibrate --tp 2" in messages["ranks"]
        assert "RankError: ranks disagree on calibration" in messages["differ"]
        assert "needs a calibration" in messages["functional"]
        assert "says nothing about sums" in messages["gather"]
        assert messages["still works"]


def test_wrong_configurations_are_refused_when_they_are_made(tmp_path):
    path = tmp_path / "ranges"
    random_calibration(SITES, 4, FEATURES, sums=False).save(path)
    cases = [
        ({"spec": "selective4:outliers=1/16", "algorithm": "two-step"}, "says nothing about sums"),
        ({"spec": "selective4"}, "holds a fraction of 1/16 outliers, 'selective4' asks for 1/64"),
        ({"spec": "int4:g32"}, "makes no use of calibration"),
    ]
    for arguments, message in cases:
        with pytest.raises(lowbit.ConfigError, match=message):
            lowbit.CommConfig(**arguments, calibration=path)
    config = lowbit.CommConfig("selective4:outliers=1/16", "one-shot", calibration=path)
    with pytest.raises(lowbit.ConfigError, match="depends on the site: name one, such as 'layers.0.attention'"):
        config.codec("scatter", None, 0)
    with pytest.raises(lowbit.ConfigError, match="was made for TP 4, this group has 2 ranks"):
        lowbit.simulate.all_reduce([torch.zeros(1, FEATURES)] * 2, config.spec, "one-shot", path, SITES[0])


def test_configurations_are_told_apart_by_what_the_file_holds(tmp_path):
    path, calibration = tmp_path / "ranges", random_calibration(SITES, 2, FEATURES)
    calibration.save(path)
    spec = "selective4:outliers=1/16"
    configs = {lowbit.CommConfig(spec, calibration=given) for given in (path, str(path), calibration)}
    assert len(configs) == 1
    copied = copy.deepcopy(configs.pop())
    assert copied.calibrated.digest == calibration.digest and len(repr(copied)) < 400
    for wrong in (5, b"x", False, ""):
        with pytest.raises(lowbit.ConfigError, match="give the name of a file that calibrate wrote"):
            lowbit.CommConfig(spec, calibration=wrong)


def _nothing_to_send(rank, world, path):
    """Only rank 0 has rows, but all ranks see that they could not be sent."""
    known = lowbit.Communicator(None, lowbit.CommConfig("selective4:outliers=1/16", calibration=path))
    blocks = lowbit.Communicator(None, lowbit.CommConfig("mxfp4"))
    messages = []
    for communicator, x, rows in ((known, torch.zeros(2, 32), 2), (blocks, torch.zeros(37), 37)):
        x = x if rank == 0 else x[:0]
        sends = [rows - 5 if rows > 5 else 0, 5 if rows > 5 else rows, 0] if rank == 0 else [0, 0, 0]
        receives = [[rows - 5 if rows > 5 else 0, 0, 0], [5 if rows > 5 else rows, 0, 0], [0, 0, 0]][rank]
        try:
            communicator.all_to_all(x, receives, sends, SITES[0])
        except lowbit.ConfigError as error:
            messages.append(str(error))
    return messages


def test_a_rank_with_nothing_to_send_is_told_as_well(tmp_path):
    random_calibration(SITES, 3, FEATURES).save(tmp_path / "three")
    for features, blocks in run_ranks(3, _nothing_to_send, str(tmp_path / "three"), timeout=60):
        assert "32 features at a site that was calibrated with 96" in features
        assert "multiple of 32" in blocks


def test_a_file_that_was_written_anew_is_another_configuration(tmp_path):
    path, configs = tmp_path / "ranges", []
    for seed in (0, 1):
        random_calibration(SITES, 2, FEATURES, seed=seed).save(path)
        configs.append(lowbit.CommConfig("selective4:outliers=1/16", calibration=str(path)))
    assert configs[0] != configs[1]
    assert configs[1] == lowbit.CommConfig("selective4:outliers=1/16", calibration=str(path))
