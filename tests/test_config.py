"""CommConfig: validated once, frozen, every wrong value named."""

import dataclasses

import pytest

import megatron_lowbit as lowbit


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
        ({"algorithm": "hierarchical"}, "'hierarchical' is not available in this version"),
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
