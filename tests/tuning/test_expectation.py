"""Lines for doctor and tune: every one says that it is modelled, and their sizes and gains are the model's."""

import re

import pytest

from megatron_lowbit.errors import ConfigError
from megatron_lowbit.tuning import expectation, machines
from megatron_lowbit.tuning.cost_model import EXACT, Way, all_reduce
from megatron_lowbit.tuning.expectation import SIZES, SPECS, lines, pays_from

ASKED = [
    ("cpu", 1.0, 2, 1), ("cpu", 0.2, 4, 1), ("cpu", 5.0, 6, 2), ("cpu", 5.0, 5, 2), ("cpu", None, 4, 1),
    ("cuda", None, 4, 1), ("cuda", 20.0, 16, 2), ("cuda", None, 16, 2), ("cuda", 8.0, 2, 2), ("cpu", 1.0, 4, 4),
    ("NVIDIA H100 80GB HBM3", None, 8, 1), ("AMD Instinct MI300X", 300.0, 8, 1), ("cpu", 1.0, 1, 1),
]  # fmt: skip


@pytest.mark.parametrize("asked", ASKED, ids=str)
def test_every_line_says_that_it_is_modelled(asked):
    found = lines(*asked)
    assert found and all(line.startswith("modelled") and "\n" not in line for line in found)
    for spec in SPECS if len(found) > 1 else ():
        assert sum(f"modelled: {spec} (" in line for line in found) == 1


def test_figures_are_those_of_the_model():
    machine = machines.shaped(0.2)
    (line,) = [line for line in lines("cpu", 0.2, 2, 1) if "int4:g32" in line]
    exact, low = (all_reduce(machine, way, 8 << 20, 2).total for way in (EXACT, Way.of("int4:g32", "one-shot")))
    assert f"8 MiB take {1e3 * low:.3g} ms instead of {1e3 * exact:.3g}, {exact / low:.2f}x as fast" in line
    assert 2 < exact / low < 4  # 16 / 5 on the wire


def test_the_gpu_is_found_by_its_name():
    assert "H100" in lines("NVIDIA H100 80GB HBM3", None, 8, 1)[0]
    assert "L40S" in lines("NVIDIA L40S", None, 4, 1)[0]
    assert "MI300X" in lines("AMD Instinct MI300X", None, 4, 1)[0]
    assert "A100 NVLink at 20 Gbit/s" in lines("NVIDIA Unheard-of", 20.0, 4, 1)[0]


def test_a_measured_link_is_not_called_a_shaped_one():
    assert "2 ranks, CPUs at 16 Gbit/s;" in lines("cpu", 15.9559, 2, 1)[0]
    assert "CPUs at 5 Gbit/s in nodes of 3, 0.5 Gbit/s between" in lines("cpu", 0.5, 6, 2)[0]


def test_several_nodes_have_the_hierarchical_way():
    (line,) = [line for line in lines("cuda", 20.0, 16, 2) if "int4:g32" in line]
    assert "(hierarchical)" in line
    assert "(hierarchical)" not in str(lines("cuda", 20.0, 2, 2))  # one rank in each node


def test_ranks_of_their_own_nodes_have_one_kind_of_link():
    assert lines("cpu", 1.0, 4, 4)[1:] == lines("cpu", 1.0, 4, 1)[1:]


@pytest.mark.parametrize("asked", [("cpu", None, 4, 1), ("cuda", None, 16, 2)])
def test_nothing_is_guessed_of_links_that_are_not_known(asked):
    assert lines(*asked) == ["modelled: nothing, as it is not known how fast the links are"]


def test_pays_from_is_where_gains_begin_and_stay():
    machine = machines.named("MI300X")
    start = pays_from(machine, "int4:g32", 4)
    way = Way.of("int4:g32", "two-step")
    gains = [all_reduce(machine, EXACT, size, 4).total > all_reduce(machine, way, size, 4).total for size in SIZES]
    assert start == SIZES[gains.index(True)] and gains == sorted(gains)
    assert 1 << 20 <= start <= 4 << 20  # 1 to 2 MB are published: vLLM pull 19744


def test_nothing_pays_on_infinitely_fast_links():
    assert pays_from(machines.limited(machines.named("H100 NVLink"), 1e9), "int4:g32", 4) is None
    assert "does not pay at any size" in str(lines("cuda", 1e9, 4, 1))


@pytest.mark.parametrize(
    "asked", [("cpu", 0.0, 2, 1), ("cpu", float("nan"), 2, 1), ("cpu", 1.0, 0, 1), ("cpu", 1.0, 2, 0)]
)
def test_bad_input(asked):
    with pytest.raises(ConfigError, match="give positive numbers"):
        expectation.lines(*asked)


def test_sizes_are_readable():
    assert re.search(r"pays from \d+ (KiB|MiB) on", str(lines("cpu", 0.2, 4, 1)))
