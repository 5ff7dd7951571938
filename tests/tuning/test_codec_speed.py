"""Every codec that the grammar knows has a speed on every device."""

import pytest

from megatron_lowbit.spec import NAMES, parse_leg
from megatron_lowbit.tuning.codec_speed import RELATIVE, family


def test_every_name_has_a_family():
    assert {family(parse_leg(name)) for name in NAMES} | {"spike", "trellis", "outliers"} == set(RELATIVE["cpu"])
    assert set(RELATIVE["cpu"]) == set(RELATIVE["cuda"])


@pytest.mark.parametrize(
    "leg, expected",
    [("int4:g32", "int"), ("int4:g32:spike", "spike"), ("gauss4:g128:trellis", "trellis"), ("gauss4", "gauss"),
     ("int4:g32:outliers=1/64", "outliers"), ("selective4", "selective"), ("nvfp4", "float"), ("fp8", "float"),
     ("bf16", "passthrough")],
)  # fmt: skip
def test_families(leg, expected):
    assert family(parse_leg(leg)) == expected


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_speeds(device):
    assert RELATIVE[device]["int"] == (1.0, 1.0)
    assert all(speed > 0 for pair in RELATIVE[device].values() for speed in pair)
    assert RELATIVE[device]["trellis"][0] < RELATIVE[device]["gauss"][0] < RELATIVE[device]["int"][0]
