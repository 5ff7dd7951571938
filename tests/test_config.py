"""CommConfig: validated once, frozen, every wrong value named."""

import dataclasses

import pytest

import megatron_lowbit as lowbit
from megatron_lowbit.plan_file import Plan
from tests.calibrations import random_calibration


def test_defaults_and_normal_forms():
    config = lowbit.CommConfig(spec="int4", sites=["layers.*.mlp"])
    assert (config.spec, config.algorithm, config.min_bytes, config.sites) == (
        "int4:g32",
        "auto",
        None,
        ("layers.*.mlp",),
    )
    assert config == lowbit.CommConfig(spec="int4:g32", sites="layers.*.mlp")
    assert hash(config) == hash(lowbit.CommConfig(spec="int4:g32", sites="layers.*.mlp"))
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.spec = "int8"


def test_between_nodes_something_else_may_travel():
    config = lowbit.CommConfig("int4/int8", "hierarchical", outer_spec="int3")
    assert config.outer_spec == "int3:g32"
    legs = ("scatter", "gather", "outer scatter", "outer gather")
    assert [config.codec(leg, None, 0).spec for leg in legs] == ["int4:g32", "int8:g32", "int3:g32", "int3:g32"]
    config = lowbit.CommConfig(plan=Plan({"a": "int4/int8", "b": "int5"}, 4), outer_spec=None)
    assert [config.codec(leg, "a", 0).spec for leg in legs] == ["int4:g32", "int8:g32"] * 2
    assert lowbit.CommConfig(outer_spec="int3") != lowbit.CommConfig(outer_spec="int2")
    # selective4 on the spec's second leg: not used where something else travels between nodes
    calibration = random_calibration(["a"], 4, 128, "1/64")
    config = lowbit.CommConfig("int4/selective4", "hierarchical", calibration=calibration, outer_spec="int3")
    assert config.codec("outer gather", "a", 0).spec == "int3:g32"


def test_sites_are_glob_patterns():
    config = lowbit.CommConfig(sites=("layers.*.mlp", "layers.0.attention"))
    assert config.selects("layers.11.mlp") and config.selects("layers.0.attention")
    assert not config.selects("layers.1.attention")
    assert lowbit.CommConfig().selects("anything")


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"spec": "int1"}, "unknown codec 'int1'"),
        ({"algorithm": "ring"}, "unknown algorithm 'ring': use one of auto"),
        ({"outer_spec": "int1"}, "unknown codec 'int1'"),
        ({"outer_spec": 3}, "a spec is a string, not int"),
        ({"outer_spec": "int3", "algorithm": "two-step"}, "algorithm 'two-step' makes no use of outer_spec='int3:g32'"),
        ({"outer_spec": "int3", "plan": Plan({"a": "int8"}, 4, "one-shot")}, "'one-shot' makes no use of outer_spec"),
        ({"outer_spec": "selective4"}, "'selective4' cannot travel hierarchically"),
        ({"spec": "selective4/int4", "algorithm": "hierarchical"}, "'selective4' cannot travel hierarchically"),
        ({"plan": Plan({"a": "selective4"}, 4), "algorithm": "hierarchical"}, "'selective4' cannot travel"),
        ({"outer_spec": "int4:outliers=1/64"}, "'int4:g32:outliers=1/64' needs a calibration"),
        ({"min_bytes": -1}, "min_bytes is -1"),
        ({"min_bytes": 1.5}, "min_bytes is 1.5"),
        ({"min_bytes": True}, "min_bytes is True"),
        ({"sites": ()}, "sites is"),
        ({"sites": 3}, "sites is 3"),
        ({"sites": [1]}, "sites is"),
        ({"calibration": "x.safetensors"}, "makes no use of calibration='x.safetensors': leave it out"),
        ({"spec": "selective4"}, "'selective4' needs a calibration"),
        ({"spec": "int4:outliers=1/64", "calibration": "absent.safetensors"}, "there is no calibration file"),
        ({"plan": "x.json"}, "there is no plan file x.json"),
        ({"plan": "x.json", "spec": "int4"}, "spec 'int4' and a plan exclude each other"),
        ({"plan": 3}, "plan is 3: give the name of a plan file"),
        ({"tuned": "x.json"}, "there is no tuned table x.json: make one with 'megatron-lowbit tune'"),
        ({"tuned": 3}, "tuned is 3: give the name of a file that tune wrote"),
        ({"tuned": "x.json", "min_bytes": 0}, "with min_bytes=0 leaves nothing to decide by tuned='x.json'"),
        ({"tuned": "x.json", "algorithm": "one-shot"}, "algorithm 'one-shot' with .* leaves nothing to decide"),
    ],
)
def test_wrong_values_are_named(arguments, message):
    with pytest.raises(lowbit.ConfigError, match=message):
        lowbit.CommConfig(**arguments)
