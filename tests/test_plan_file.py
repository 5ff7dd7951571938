"""Plans: what they refuse, their file, and ranks that follow one."""

import copy

import pytest
import torch

import megatron_lowbit as lowbit
from megatron_lowbit.plan_file import Plan
from tests.ranks import run_ranks

SITES = {"layers.0.attention": "int4:g32/int8:g128", "layers.0.mlp": "int8", "layers.1.mlp": "exact"}


def test_a_file_holds_what_was_planned(tmp_path):
    plan = Plan(SITES, tp=4, algorithm="two-step", metadata={"fingerprint": "abc", "predicted": {"kl": 0.1}})
    plan.save(tmp_path / "plan.json")
    found = Plan.load(tmp_path / "plan.json")
    assert (dict(found.sites), found.tp, found.algorithm) == (dict(plan.sites), 4, "two-step")
    assert found.sites["layers.0.mlp"] == str(lowbit.CommConfig("int8").spec)  # as it is always written
    assert (found.fingerprint, found.metadata["predicted"]) == ("abc", {"kl": 0.1})
    assert found.digest == plan.digest == copy.deepcopy(found).digest and found.name == "plan plan.json"
    assert not list(tmp_path.glob(".*"))


def test_the_digest_is_of_what_travels():
    one = Plan(SITES, tp=4)
    assert one.digest == Plan(SITES, tp=4, metadata={"date": "x"}, name="other").digest
    assert one.digest != Plan(SITES | {"layers.1.mlp": "int2"}, tp=4).digest
    assert one.digest != Plan(SITES, tp=4, algorithm="one-shot" if one.algorithm != "one-shot" else "two-step").digest


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (({}, 2), "has no sites"),
        (({"a": "int9"}, 2), "int9"),
        (({"a": 4}, 2), "gives 'a' the spec 4"),
        ((SITES, 1), "for TP 1"),
        ((SITES, 2, "ring"), "algorithm 'ring'"),
    ],
)
def test_refuses_what_cannot_be_a_plan(arguments, message):
    with pytest.raises(lowbit.ConfigError, match=message):
        Plan(*arguments)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("nonsense", "cannot be read"),
        ("[]", "is no plan"),
        ('{"format": "megatron_lowbit.calibration"}', "is no plan"),
        ('{"format": "megatron_lowbit.plan", "format_version": 2}', "has format 2, this one reads 1"),
        ('{"format": "megatron_lowbit.plan", "format_version": 1, "tp": 2}', "lacks algorithm, sites"),
    ],
)
def test_refuses_files_that_hold_none(content, message, tmp_path):
    path = tmp_path / "plan.json"
    path.write_text(content)
    with pytest.raises(lowbit.ConfigError, match=message):
        Plan.load(path)


def test_says_what_does_not_fit():
    plan = Plan(SITES, tp=4, metadata={"fingerprint": "a" * 64, "model": "small"})
    for facts, message in (
        ({"tp": 2}, "made for TP 4, this group has 2 ranks"),
        ({"fingerprint": "b" * 64}, "made for another model .small, fingerprint aaaaaaaaaaaa"),
        ({"sites": ["layers.7.mlp"]}, "lacks layers.7.mlp, and has layers.0.attention"),
    ):
        with pytest.raises(lowbit.ConfigError, match=message):
            plan.check(**facts)
    plan.check(tp=4, fingerprint="a" * 64, sites=["layers.1.mlp"])
    tensors = {name: "0" for name in "abcdefg"}
    named = Plan(SITES, tp=4, metadata={"fingerprint": "a" * 64, "tensors": tensors})
    with pytest.raises(lowbit.ConfigError, match="this one has bbbbbbbbbbbb; a, b, c and 1 more differ.: make one"):
        named.check(fingerprint="b" * 64, tensors=dict.fromkeys("abch", "1") | dict.fromkeys("defg", "0"))
    with pytest.raises(lowbit.ConfigError, match="this one has bbbbbbbbbbbb.: make one"):
        named.check(fingerprint="b" * 64)


def test_a_configuration_knows_each_site():
    config = lowbit.CommConfig(plan=Plan(SITES, tp=2))
    assert config.spec == "plan" and config.per_site and config.keeps_exact("layers.1.mlp")
    assert str(config.legs_at("layers.0.attention")) == SITES["layers.0.attention"]
    with pytest.raises(lowbit.ConfigError, match="lacks layers.9.mlp"):
        config.legs_at("layers.9.mlp")
    assert config != lowbit.CommConfig(plan=Plan({"layers.0.mlp": "int8"}, tp=2))
    assert config == lowbit.CommConfig(plan=Plan(SITES, tp=2)) and hash(config)
    with pytest.raises(lowbit.ConfigError, match="needs a calibration"):
        lowbit.CommConfig(plan=Plan({"layers.0.mlp": "selective4"}, tp=2))


def partials(world: int) -> list[torch.Tensor]:
    torch.manual_seed(1)
    return [torch.randn(6, 256) for _ in range(world)]


def follow(rank: int, world: int) -> dict:
    comm = lowbit.Communicator(None, lowbit.CommConfig(plan=Plan(SITES, tp=world), min_bytes=0))
    found = {site: comm.all_reduce(partials(world)[rank], site) for site in SITES}
    found["paths"] = {site: counters["paths"] for site, counters in lowbit.stats().items()}
    found["why"] = lowbit.stats()["layers.1.mlp"]["fallbacks"]
    try:
        comm.all_reduce(partials(world)[rank], "layers.9.mlp")
    except lowbit.ConfigError as error:
        found["unknown"] = str(error)
    other = Plan(SITES | {"layers.0.mlp": "int4" if rank else "int8"}, tp=world)
    try:
        lowbit.Communicator(None, lowbit.CommConfig(plan=other))
    except lowbit.RankError as error:
        found["disagree"] = str(error)
    try:
        lowbit.Communicator(None, lowbit.CommConfig(plan=Plan(SITES, tp=world + 1)))
    except lowbit.ConfigError as error:
        found["ranks"] = str(error)
    return found


def test_ranks_follow_a_plan():
    found = run_ranks(2, follow)
    config = lowbit.CommConfig(plan=Plan(SITES, tp=2), min_bytes=0)
    for site in SITES:
        assert found[0][site].equal(found[1][site])
        if site == "layers.1.mlp":
            torch.testing.assert_close(found[0][site], sum(partials(2)))
        else:
            assert found[0][site].equal(lowbit.simulate.reduced(partials(2), config, site))
            assert found[0][site].equal(lowbit.simulate.all_reduce(partials(2), SITES[site], "auto"))
    assert found[0]["paths"] == {
        "layers.0.attention": {"one-shot": 1}, "layers.0.mlp": {"one-shot": 1}, "layers.1.mlp": {"exact": 1}
    }  # fmt: skip
    assert found[0]["why"] == {"exact in the plan": 1}
    assert "lacks layers.9.mlp" in found[0]["unknown"]
    assert "plan" in found[0]["disagree"] and "this group has 2 ranks" in found[0]["ranks"]
