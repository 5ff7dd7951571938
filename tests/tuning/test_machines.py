"""Descriptions of machines: those that are known have sources, and what is wrong in one's own is named."""

import json

import pytest

from megatron_lowbit.errors import ConfigError
from megatron_lowbit.tuning import machines

OWN = {
    "name": "two workstations", "source": "iperf3, 2026-11-22", "device": "cuda",
    "link": {"rate": 1.18e9, "start": 3e-5},
    "codec": {"encode": 4e11, "decode": 4e11, "start": 2e-5, "overlap": False},
    "exact": {"start": 4e-5}, "flops": 1.5e14, "memory": 7e11,
}  # fmt: skip


def written(tmp_path, content) -> str:
    file = tmp_path / "machine.json"
    file.write_text(content if isinstance(content, str) else json.dumps(content))
    return str(file)


def test_what_is_described():
    known = machines.described()
    for part in ("L40S", "A100", "H100", "H200", "MI300X", "25 GbE", "100 GbE", "200 GbE"):
        assert any(part in name for name in known), part
    for rate in (0.2, 1, 5):
        assert known[f"shaped {rate:g} Gbit/s"].link.rate == pytest.approx(rate * machines.GBIT, rel=0.25)
    for name, machine in known.items():
        assert machine.name == name and len(machine.source) > 20
        assert machine.device == ("cpu" if "shaped" in name else "cuda")
        assert (machine.outer is not None) == ("GbE" in name)
    assert known["MI300X"].link.mesh and known["shaped 1 Gbit/s"].host.cores == 2


def test_callers_cannot_change_what_is_described():
    machines.described().clear()
    assert machines.described()


def test_names_of_machines_are_checked():
    assert machines.named("MI300X").name == "MI300X"
    with pytest.raises(ConfigError, match="'M1' is not described: use one of '4x L40S"):
        machines.named("M1")


def test_a_machine_of_ones_own(tmp_path):
    machine = machines.load(written(tmp_path, OWN))
    assert machine.link == machines.Link(1.18e9, 3e-5) and machine.codec.decode == 4e11
    assert machine.host == machines.Host() and machine.outer is None
    assert machines.load(written(tmp_path, machines.as_json(machine))) == machine
    several = OWN | {"node": 4, "outer": {"rate": 3e9, "start": 0}}
    assert machines.load(written(tmp_path, several)).outer == machines.Link(3e9, 0.0)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"rank": 3}, "unknown field 'rank': use name, source"),
        ({"link": {"rate": 1e9}}, "link: 'start' is missing: give rate, start, mesh"),
        ({"link": {"rate": 0, "start": 0}}, "rate is 0: give a number above 0"),
        ({"link": {"rate": -1.0, "start": 0}}, "rate is -1.0: give a number above 0"),
        ({"link": {"rate": 1e9, "start": -1}}, "start is -1: give a number from 0 up"),
        ({"link": {"rate": True, "start": 0}}, "rate is True"),
        ({"link": {"rate": "fast", "start": 0}}, "rate is 'fast'"),
        ({"link": {"rate": 1e9, "start": 0, "mesh": 1}}, "mesh is 1: give true or false"),
        ({"link": [1e9, 0]}, "link: expected an object with rate, start, mesh, found list"),
        ({"flops": 0}, "flops is 0: give a number above 0"),
        ({"host": {"cores": 1.5}}, "cores is 1.5: give a whole number above 0"),
        ({"host": {"cores": 0}}, "cores is 0: give a whole number above 0"),
        ({"device": "tpu"}, "device is 'tpu': use cpu or cuda"),
        ({"name": 7}, "name is 7: give a text"),
        ({"source": " "}, "source is empty"),
        ({"node": 4}, "give both or neither"),
        ({"outer": {"rate": 1e9, "start": 0}}, "give both or neither"),
    ],
)
def test_what_is_wrong_is_named(tmp_path, change, message):
    with pytest.raises(ConfigError, match=message):
        machines.load(written(tmp_path, OWN | change))


@pytest.mark.parametrize("number", ["NaN", "Infinity", "1e999"])
def test_numbers_must_be_finite(tmp_path, number):
    with pytest.raises(ConfigError, match="flops is (nan|inf)"):
        machines.load(written(tmp_path, json.dumps(OWN).replace("150000000000000.0", number)))


@pytest.mark.parametrize("missing", ["name", "source", "device", "link", "codec", "exact"])
def test_what_is_missing_is_named(tmp_path, missing):
    with pytest.raises(ConfigError, match=f"'{missing}' is missing"):
        machines.load(written(tmp_path, {name: value for name, value in OWN.items() if name != missing}))


@pytest.mark.parametrize("content", ["", "{", "[" * 100000, "7", "[]"])
def test_files_that_hold_no_machine(tmp_path, content):
    with pytest.raises(ConfigError, match="is not JSON|expected an object"):
        machines.load(written(tmp_path, content))


def test_files_that_cannot_be_read(tmp_path):
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    for name in ("absent.json", "", "binary"):
        with pytest.raises(ConfigError, match="cannot be read"):
            machines.load(tmp_path / name)


def test_links_of_any_rate():
    one, two = machines.shaped(1), machines.shaped(2.5)
    assert two.name == "shaped 2.5 Gbit/s" and two.link.rate == pytest.approx(2.5 * one.link.rate)
    assert (two.codec, two.exact, two.host) == (one.codec, one.exact, one.host)
    assert machines.shaped(5).link.rate == pytest.approx(machines.named("shaped 5 Gbit/s").link.rate, rel=1e-2)


def test_contention():
    assert [machines.Host(cores=2).contention(world) for world in (1, 2, 3, 8)] == [1, 1, 1.5, 4]
    assert machines.Host().contention(64) == 1
