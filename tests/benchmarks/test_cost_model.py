"""The benchmark of the cost model: what it holds the model against, its errors, and that machines.json is what fits."""

import importlib
import json
import subprocess
import sys
from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest

from megatron_lowbit.tuning import cost_model, machines

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
RECORDED = BENCHMARKS / "results" / "link.json"
FITTED, HELD_OUT = 0.2, 0.2  # median errors on shaped links that are not to be exceeded; the goal is 0.2 for both


@pytest.fixture
def load(monkeypatch):
    """Benchmarks are scripts, which import each other by their bare names."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module


def row(**changes) -> dict:
    fields = {"rate_gbit": 1.0, "ranks": 2, "bytes": 65536, "spec": "int4:g32", "algorithm": "auto"}
    return fields | {"path": "one-shot", "median_ms": 2.0} | changes


def test_rows_that_are_compared(load):
    rows = [
        row(), row(spec="bf16", algorithm="exact", path="exact"), row(spec="fp32", algorithm="exact", path="exact"),
        row(algorithm="gate"), row(algorithm="4 chunks"), row(rate_gbit=None), row(path="exact", algorithm="gate"),
        row(ranks=4, path="two-step"),
    ]  # fmt: skip
    found = load("cost_model_cases").shaped(rows)
    assert [(case.way.algorithm, case.world) for case in found] == [("one-shot", 2), ("exact", 2), ("two-step", 4)]
    assert {case.source for case in found} == {"shaped links"} and {case.nodes for case in found} == {1}
    assert str(found[0].way.spec) == "int4:g32" and found[0].seconds == 2e-3 and found[0].rate == 1.0
    assert found[0].machine == "shaped 1 Gbit/s"


def test_rows_of_several_nodes(load):
    place = {"rate_gbit": 5.0, "nodes": 2, "outer_gbit": 0.5, "ranks": 6, "bytes": 8 << 20}
    rows = [row(path="hierarchical", algorithm="hierarchical int3:g32", **place),
            row(path="two-step", algorithm="two-step", **place),
            row(spec="bf16", algorithm="exact", path="exact", **place)]  # fmt: skip
    outer, flat, exact = load("cost_model_cases").shaped(rows)
    assert (str(outer.way.spec), str(outer.way.outer), outer.source) == ("int4:g32", "int3:g32", "shaped nodes")
    machine = outer.within(machines.shaped(5))
    assert machine.node == 3 and machine.outer.rate == pytest.approx(machines.shaped(0.5).link.rate)
    rate = machine.outer.rate  # three ranks of a node share it: 8 MiB / 6 to three others, twice; shards, once each way
    assert cost_model.all_reduce(machine, exact.way, 8 << 20, 6).wire == pytest.approx(2 * 5 / 6 * (8 << 20) / rate)
    assert cost_model.all_reduce(machine, flat.way, 8 << 20, 6).wire == pytest.approx(
        3 * 3 * 2 * (8 << 20) / 6 * 5 / 16 / rate
    )
    inside = 2 * (8 << 20) / 3 * (5 + 4) / 16 / machine.link.rate
    assert cost_model.all_reduce(machine, outer.way, 8 << 20, 6).wire == pytest.approx(
        inside + 3 * 2 * (8 << 20) / 6 * 4 / 16 / rate
    )
    rows, cases = load("cost_model").compared(
        load("cost_model_cases").shaped([row(), row(bytes=1 << 20, ranks=4, rate_gbit=5.0, path="two-step")]),
        [outer, flat],
    )
    (several,) = [one for one in rows if one["source"] == "shaped links, several nodes"]
    assert several["held_out"] and several["cases"] == 2 and len(cases) > 100


def test_prefills(load):
    measured = {"rate_gbit": 0.1, "ranks": 2, "tokens": 1024, "spec": "int4:g32", "paths": {"one-shot": 32},
                "ttft_ms": 3000.0, "ttft_exact_ms": 5000.0, "share": 0.6}  # fmt: skip
    facts = {"model": "Llama of random weights", "layers": 16, "hidden": 512, "ffn": 1408}
    rows = [measured, measured | {"paths": {"exact": 32}}, measured | {"rate_gbit": None}]
    (case,) = load("cost_model_cases").prefills(facts | {"rows": rows})
    assert case.seconds == 3.0 and case.bytes == 1 << 20
    one = cost_model.all_reduce(machines.shaped(0.1), case.way, 1 << 20, 2).total
    assert case.modelled(machines.shaped(0.1)) == pytest.approx(0.4 * 5.0 + 2 * 16 * one)
    assert load("cost_model_cases").prefills({"rows": []}) == []
    assert load("cost_model_cases").prefills(facts | {"model": "somebody's", "rows": rows}) == []


def test_published_tables_are_those_of_the_sources(load):
    cases = {
        (c.source, c.world, c.bytes, str(c.way.spec), c.way.algorithm): c for c in load("cost_model_cases").published()
    }
    assert cases["QuickReduce, TP 8", 8, 64 << 20, "fp8:g32", "two-step"].seconds == pytest.approx(490e-6)
    assert cases["QuickReduce, TP 2", 2, 64 << 20, "int4:g32:sym", "two-step"].seconds == pytest.approx(468e-6)
    assert cases["aiter, TP 2", 2, 512 << 20, "bf16", "exact"].seconds == pytest.approx(11126e-6)
    assert cases["vLLM on ROCm, TP 4", 4, 8 << 20, "int6:g32:sym", "two-step"].seconds == pytest.approx(99.4e-6)
    assert {case.machine for case in cases.values()} <= set(machines.described())
    # Bits as published: Q4 4.5, Q6 6.5, Q8 and FP8 8.5, NVFP4 4.5, TensorRT-LLM's FP8 8.26.
    for spec, bits in (("int4:g32:sym", 4.5), ("int6:g32:sym", 6.5), ("int8:g32:sym", 8.5), ("fp8:g32", 8.5),
                       ("nvfp4", 4.5), ("fp8:g64", 8.26)):  # fmt: skip
        way = cost_model.Way.of(spec, "two-step")
        assert cost_model.bits(way.spec.scatter) == pytest.approx(bits, rel=0.01)


def test_a_fit_finds_the_parameters_that_made_the_times(load):
    fit, cases = load("cost_model_fit"), load("cost_model_cases")
    wanted = {"rate": 0.9, "encode": 1.5e9, "codec_start": 8e-4, "exact_start": 5e-4, "exact_step": 1e-4,
              "exact_overhead": 1e-9, "call": 3e-4, "byte": 1e-9}  # fmt: skip
    base, made = machines.shaped(1), []
    for rate in (0.2, 1.0, 5.0, 40.0):
        for ranks in (2, 4):
            for nbytes in (1 << 12, 1 << 16, 1 << 20, 1 << 23):
                for spec, path in (("bf16", "exact"), ("int4:g32", "one-shot"), ("gauss4:g128:trellis", "two-step")):
                    (case,) = cases.shaped([row(rate_gbit=rate, ranks=ranks, bytes=nbytes, spec=spec, path=path,
                                                algorithm="exact" if path == "exact" else "auto")])  # fmt: skip
                    seconds = case.modelled(fit.shaped(base, rate, wanted))
                    made.append(replace(case, seconds=seconds))
    found = fit.fit_shaped(made)
    for name in ("rate", "encode", "codec_start", "call"):
        assert found[name] == pytest.approx(wanted[name], rel=0.05), name


def test_machines_are_what_fits_the_recorded_measurements(load):
    """After `benchmarks/link.py` recorded anew: python benchmarks/cost_model.py --fit --write."""
    links = load("cost_model_cases").shaped(json.loads(RECORDED.read_text())["rows"])
    for fitted in load("cost_model").fitted(links):
        known = machines.named(fitted.name)
        assert fitted.source == known.source
        for part in ("link", "codec", "exact", "host"):
            for name, value in vars(getattr(fitted, part)).items():
                expected = getattr(getattr(known, part), name)
                assert value == (expected and pytest.approx(expected, rel=0.05)), (fitted.name, part, name)


def test_errors_on_recorded_measurements(load):
    links = load("cost_model_cases").shaped(json.loads(RECORDED.read_text())["rows"])
    rows, cases = load("cost_model").compared(links)
    found, left = {row["source"]: row for row in rows}, iter(cases)
    assert found["shaped links, all"]["median_error"] < FITTED
    assert found["shaped links, 1 Gbit/s"]["held_out"] and found["shaped links, 1 Gbit/s"]["median_error"] < HELD_OUT
    assert sum(row["cases"] for row in rows) == len(cases)
    for row in rows:
        own = sorted(abs(c["modelled_ms"] / c["measured_ms"] - 1) for c in islice(left, row["cases"]))
        assert own[-1] == pytest.approx(row["worst_error"])
        assert row["median_error"] == pytest.approx((own[(len(own) - 1) // 2] + own[len(own) // 2]) / 2)
        if row["source"].startswith(("MI300X", "8 B200")) and "alone" not in row["source"]:
            assert row["median_error"] < 0.3, row["source"]


def test_as_its_user_starts_it(tmp_path):
    command = [sys.executable, str(BENCHMARKS / "cost_model.py")]
    figures, own = tmp_path / "cost_model.json", tmp_path / "own.json"
    own.write_text(json.dumps(machines.as_json(machines.named("A100 NVLink")) | {"name": "mine"}))
    command += ["--machine", str(own)]
    done = subprocess.run(
        [*command, "--json", str(figures), "--plot", str(tmp_path / "p.png")], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "modelled: int4:g32" in done.stdout and "held out" in done.stdout
    assert (tmp_path / "p.png").read_bytes()[:4] == b"\x89PNG"
    result = json.loads(figures.read_text())
    assert [row["machine"] for row in result["machines"]] == [*machines.described(), "mine"]
    for row in result["machines"]:
        assert all(name in ("machine", "source", "ranks", "algorithm") or name.startswith("modelled_") for name in row)
    refused = subprocess.run([*command, "--write"], capture_output=True, text=True)
    assert refused.returncode == 2 and "give both" in refused.stderr


@pytest.mark.parametrize("rate", [None, 1.0])
def test_without_several_shaped_links_nothing_is_fitted_or_written(rate, load, tmp_path, monkeypatch, capsys):
    benchmark, fit = load("cost_model"), load("cost_model_fit")
    row = {"rate_gbit": rate, "ranks": 2, "bytes": 1 << 20, "spec": "bf16", "algorithm": "exact", "path": "exact"}
    link, out = tmp_path / "link.json", tmp_path / "out.json"
    link.write_text(json.dumps({"machine": {}, "rows": [row | {"median_ms": 1.0}]}))
    monkeypatch.setattr(fit, "write", lambda _: pytest.fail("was written"))
    for options in (["--fit", "--write"], ["--json", str(out)]):
        monkeypatch.setattr(sys, "argv", ["cost_model.py", "--link", str(link), *options])
        assert benchmark.main() == 0 and "lacks shaped links" in capsys.readouterr().err
    assert not out.exists()
