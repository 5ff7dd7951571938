"""Kinds of links: data that cannot contradict itself."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_lowbit.errors import ConfigError
from megatron_lowbit.links import LINKS, UNKNOWN, from_environment, named, reaching
from megatron_lowbit.spec import parse


@pytest.mark.parametrize("device", LINKS)
def test_every_device_has_an_unknown_link_and_every_link_a_source(device):
    assert named(device, UNKNOWN) in LINKS[device]
    for link in LINKS[device]:
        assert link.eligible > 0 and len(link.source) > 20 and link.worth[0][0] == 2


def test_a_measured_rate_is_of_one_kind():
    assert [reaching(gbit).name for gbit in (0.01, 0.5, 0.51, 2.0, 2.1, 1000)] == [
        "slow", "slow", "medium", "medium", "fast", "fast",
    ]  # fmt: skip


def test_thresholds_that_contradict_are_refused():
    link = named("cpu", "slow")
    with pytest.raises(ConfigError, match="eligible only from 1000000"):
        replace(link, eligible=1000000)


def test_codecs_that_search_and_more_ranks_are_worth_it_later():
    for link in LINKS["cpu"]:
        plain, slow, mixed = (
            parse(spec) for spec in ("int4:g32", "gauss4:g128:trellis", "int8:g128/gauss4:g128:trellis")
        )
        for world in (2, 3, 8):
            assert link.worth_from(plain, world) <= link.worth_from(slow, world) == link.worth_from(mixed, world)
        mixed = parse("gauss4:g128:trellis/int4:outliers=1/64")
        assert [link.worth_from(mixed, 2), link.worth_from(parse("selective4"), 2)] == [link.worth[0][3]] * 2
        assert link.worth_from(plain, 2) <= link.worth_from(plain, 3) == link.worth_from(plain, 8)


def test_the_environment_names_a_kind(monkeypatch):
    monkeypatch.delenv("LOWBIT_LINK", raising=False)
    assert from_environment("cpu") is None
    monkeypatch.setenv("LOWBIT_LINK", "fast")
    assert from_environment("cpu") is named("cpu", "fast")
    with pytest.raises(ConfigError, match="link 'fast' is unknown: use one of unknown"):
        from_environment("cuda")


def test_whatever_is_compressed_was_faster_when_it_was_measured():
    recorded = Path(__file__).parents[1] / "benchmarks" / "results" / "link.json"
    rows = [row for row in json.loads(recorded.read_text())["rows"] if row["algorithm"] == "auto"]
    sent = [
        row for row in rows if row["bytes"] >= reaching(row["rate_gbit"]).worth_from(parse(row["spec"]), row["ranks"])
    ]
    assert len(sent) > 30 and {row["rate_gbit"] for row in sent} == {0.2, 1.0, 5.0}
    for row in sent:
        assert row["ratio_to_gloo_bf16"] > 0.97, row
