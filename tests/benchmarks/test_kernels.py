"""The kernel benchmark: its arithmetic, its checks, and all of it from end to end in Triton's interpreter."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tests.test_packaging import make_environment

ROOT = Path(__file__).resolve().parents[2]
BENCHMARKS = ROOT / "benchmarks"
CPU = torch.device("cpu")


@pytest.fixture
def load(monkeypatch):
    """Benchmarks are scripts, which import each other by their bare names."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    monkeypatch.setenv("LOWBIT_BACKEND", "reference")
    return importlib.import_module


def run(*options: str, cwd: Path, bare: Path | None = None) -> subprocess.CompletedProcess:
    """bare: an interpreter that has the package from nowhere but the checkout."""
    command = [str(bare or sys.executable), str(BENCHMARKS / "kernels.py"), *options]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {} if bare else {"PYTHONPATH": str(ROOT)}
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=280)


def test_bytes_by_hand(load):
    case = load("kernel_cases").Case
    wire = (1 << 20) // 2 * 5 // 8  # int4:g32: 5 bits
    norm = 3 * (1 << 20) + 2 * 8192  # the residual twice and the normed values; the weight
    moved = {"encode": (1 << 20) + wire, "decode": (1 << 20) + wire, "decode_reduce_encode": 9 * wire,
             "accumulate": (1 << 20) + 8 * wire, "decode_add_rmsnorm": norm + wire}  # fmt: skip
    for name, expected in moved.items():
        one = case("int4:g32", name, 1 << 20)
        assert (one.rows, one.features, one.moved) == (64, 8192, expected)
        assert sum(x.nbytes for x in one.buffers(CPU, 1)[0].values()) == expected
    assert (case("int4:g32", "encode", 8192).rows, case("int4:g32", "encode", 8192).features) == (1, 4096)


@pytest.mark.parametrize("spec", ["int3:g32", "int4:g32:spike", "nvfp4", "selective4", "int8:g256:outliers=1/64"])
@pytest.mark.parametrize("name", ["encode", "decode", "decode_reduce_encode", "accumulate", "decode_add_rmsnorm"])
def test_a_long_message_is_what_the_definition_makes_of_it(load, spec, name):
    """What is expected of 16 rows comes from 7: the definition on all 16 agrees, and a single wrong bit does not."""
    case = load("kernel_cases").Case(spec, name, 16 * 2**14)
    buffers, other = case.buffers(CPU, 2)
    assert not any(x.data_ptr() == y.data_ptr() for x in buffers.values() for y in other.values())
    assert case.differences(buffers)[0] is False
    case.defined(**buffers)
    assert case.differences(buffers) == (True, 0.0)
    last = buffers["target"].view(-1).view(torch.uint8)[-1:]
    last ^= 1
    assert case.differences(buffers)[0] is False
    last ^= 1
    buffers["target"].view(-1).view(torch.uint8)[: buffers["target"].nbytes // 2] = 0
    same, difference = case.differences(buffers)
    assert not same and difference > load("kernel_cases").MOST_DIFFERENCE


def test_positions_of_spikes_that_span_rows_are_refused(load):
    import megatron_lowbit as lowbit

    case = load("kernel_cases").Case("int4:g32:spike:outliers=1/64", "encode", 2**16)
    with pytest.raises(lowbit.ConfigError, match="blocks of positions that span rows"):
        case.buffers(CPU, 1)


def test_a_wrong_candidate_is_not_timed(load, monkeypatch, tmp_path):
    bench = load("kernel_bench").Bench(tmp_path / "k.json", dry_run=True, again=False)
    cases = load("kernel_cases")
    monkeypatch.setattr(cases.Case, "ours", lambda self, source, target: target.fill_(1))
    bench.run(("ours", "int4:g32", "encode", 2048))
    row = bench.rows["ours", "int4:g32", "encode", 2048]
    assert row["failed"] == "wrong" and "eager_us" not in row
    monkeypatch.setattr(cases.Case, "ours", lambda self, **_: 1 / 0)
    bench.run(("ours", "int4:g32", "encode", 4096))
    assert bench.rows["ours", "int4:g32", "encode", 4096]["failed"] == "ZeroDivisionError: division by zero"
    monkeypatch.undo()
    again = load("kernel_bench").Bench(tmp_path / "k.json", dry_run=True, again=False)
    assert [key[0] for key in again.rows] == ["copy", "copy"]  # what failed is tried anew


def test_peers_within_and_beyond_their_error(load, monkeypatch, tmp_path):
    peers, bench = load("kernel_peers"), load("kernel_bench").Bench(None, dry_run=True, again=False)
    bench.run(("transformer-engine", "fp8:g128", "decode", 2048))
    assert not bench.rows and "transformer" in bench.missing["transformer-engine"]

    def quantize(x, groups, bits, kind, pipeline, nodes, devices):
        assert x.dtype == torch.float16 and (kind, pipeline, nodes, devices) == ("symmetric", 1, 1, 8)
        x = x.float().view(groups, -1)
        scale = x.abs().amax(1, keepdim=True) / 2 ** (bits - 1)
        return (x / scale).round().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1).to(torch.int8), scale

    def dequantize(codes, scales, groups, bits, kind):
        return (codes.view(groups, -1).float() * scales.view(-1, 1)).half()

    def reduce(codes, scales, groups, out_groups, bits, kind, devices):
        total = dequantize(codes, scales, groups, bits, kind).view(devices, -1).float().sum(0)
        return quantize(total.half(), out_groups, bits, kind, 1, 1, devices)

    module = SimpleNamespace(Symmetric="symmetric", swizzle_quant=quantize, dequantize=dequantize,
                             quantized_reduction=reduce)  # fmt: skip
    monkeypatch.setattr(peers, "deepspeed_module", lambda: module)
    operations = ["encode", "decode", "decode_reduce_encode"]
    for operation in operations:
        bench.run(("deepspeed", "int4:g32", operation, 1 << 15))
    assert all(row["error"] <= row["bound"] < 1 and "gb_s" in row for row in bench.rows.values())
    module.dequantize = lambda *given: dequantize(*given) * 1.5
    for operation in operations:
        bench.run(("deepspeed", "int8:g128:sym", operation, 1 << 15))
    assert [row.get("failed") for row in bench.rows.values()] == [None] * 3 + ["wrong"] * 3


def test_tables_by_hand(load, monkeypatch, tmp_path):
    def row(name: str, kib: int, us: float, **more) -> dict:
        task = {"candidate": name, "spec": "s", "operation": "encode", "bytes": kib << 10}
        return task | {"graph_us": [us, 0, 0], "gb_s": 10.0} | more

    rows = [row("ours", 1024, 5.0), row("ours", 65536, 20.0), row("copy", 65536, 18.0), row("compiled", 65536, 50.0),
            row("definition", 65536, 0, failed="OutOfMemoryError: no"), row("deepspeed", 65536, 30.0)]  # fmt: skip
    report, tables = load("kernel_report"), load("tables")
    line = ["encode", "s", "5.0", "20.0", "10", "90%", "failed", "2.50×", "deepspeed 1.50×"]
    assert report.comparison(rows) == [line]
    (tmp_path / "benchmarks" / "results").mkdir(parents=True)
    monkeypatch.setattr(tables, "ROOT", tmp_path)
    assert "Nothing has been measured yet" in tables.kernels()
    facts = {name: "?" for name in ("gpu", "driver", "torch", "triton", "date", "command")}
    measured = {"machine": facts, "missing": {"torchao": "not there"}, "rows": rows}
    (tmp_path / "benchmarks" / "results" / "kernels.json").write_text(json.dumps(measured))
    assert "| `encode` | `s` | 5.0 | 20.0 | 10 | 90% | failed | 2.50× | deepspeed 1.50× |" in tables.kernels()
    assert "(kernels.png)" in tables.kernels() and "Not installed there: torchao." in tables.kernels()


SASS = """
        /*0000*/                   LDG.E.128 R4, desc[UR4][R2.64] ;                /* 0x0 */
                                                                                   /* 0x1 */
        /*0010*/              @!P0 BRA 0x0030 ;                                    /* 0x0 */
        /*0020*/                   CALL.REL.NOINC 0x0090 ;                         /* 0x0 */
        /*0030*/                   LOP3.LUT R0, R1, 0xf, RZ, 0xc0, !PT ;           /* 0x0 */
        /*0040*/               @P1 FADD R0, R1, R2 ;                               /* 0x0 */
        /*0050*/               @P0 BRA 0x0030 ;                                    /* 0x0 */
        /*0060*/                   STG.E.128 desc[UR4][R2.64], R4 ;                /* 0x0 */
        /*0070*/               @P2 EXIT ;                                          /* 0x0 */
        /*0080*/                   EXIT ;                                          /* 0x0 */
        /*0090*/                   MUFU.RCP R0, R1 ;                               /* 0x0 */
        /*00a0*/                   BRA 0xa0 ;                                      /* 0x0 */
"""


def test_the_usual_path_by_hand(load):
    """Over the call, seven times through the loop, to the first exit."""
    path = load("kernel_predict").usual_path
    assert path(SASS, turns=7) == {"LDG": 1, "BRA": 8, "LOP3": 7, "FADD": 7, "STG": 1, "EXIT": 1}
    with pytest.raises(ValueError, match="1 loops, and turns are known of 0"):
        path(SASS)


def test_a_prediction_says_that_it_is_one(tmp_path):
    done = run("--predict", "--spec", "int4:g32", "--op", "accumulate", "--json", "p.json", cwd=tmp_path)
    assert done.returncode == 0 and "PREDICTED for an H200, not measured" in done.stdout, done.stderr
    result = json.loads((tmp_path / "p.json").read_text())
    assert result["predicted"] is True and result["gpu"] == "NVIDIA H200" and result["bytes"] == 64 << 20
    (row,) = result["rows"]
    assert row["moved"] == (64 << 20) * (1 + 8 * 5 / 16)
    assert row["us"]["memory"] == pytest.approx(row["moved"] / 4.3e6, abs=0.01)
    issue = row["instructions_per_value"] * (32 << 20) / 32 / (4 * 132 * 1.98e3)
    assert row["us"]["issue"] == pytest.approx(issue, rel=1e-3) and 20 < row["instructions_per_value"] < 100
    assert row["predicted_us"] == max(row["us"].values()) == row["us"][row["bound_by"]]
    assert row["share_of_copy"] == pytest.approx(row["us"]["memory"] / row["predicted_us"], rel=1e-2)
    assert row["local"] == 0


def test_transformers_does_not_take_it_for_the_hub_package():
    pytest.importorskip("transformers")
    code = (
        "from transformers.utils import is_kernels_available as there; import kernels; print(there(), kernels.__file__)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=BENCHMARKS, capture_output=True, text=True)
    assert done.stdout.split() == ["False", str(BENCHMARKS / "kernels.py")], done.stderr


@pytest.mark.parametrize(
    "options, said",
    [
        (["--bytes", "1000"], "1000 is no power of two"),
        (["--predict", "--spec", "nope"], "unknown codec 'nope'"),
        (["--dry-run", "--json", str(BENCHMARKS / "results" / "kernels.json")], "the times of a dry run mean nothing"),
    ],
)
def test_what_cannot_be_is_refused(options, said, tmp_path):
    done = run(*options, cwd=tmp_path)
    assert done.returncode == 2 and said in done.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_gpu_it_says_what_to_do(tmp_path):
    done = run(cwd=tmp_path)
    assert done.returncode == 1 and "there is no GPU here: use --predict, or --dry-run" in done.stderr


def test_a_dry_run_from_a_bare_checkout(tmp_path):
    """Every code path, with nothing but the checkout; what is compiled is compiled in other processes first."""
    options = ["--dry-run", "--spec", "int4:g32", "--json", "k.json", "--plot", "k.png"]
    options += ["--op", "encode", "--op", "decode_add_rmsnorm", "--jobs", "1"]
    done = run(*options, cwd=tmp_path, bare=make_environment(tmp_path / "environment"))
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "k.json").read_text())
    assert result["dry_run"] and {"gpu", "driver", "triton"} <= result["machine"].keys()
    rows = {(row["candidate"], row["operation"]): row for row in result["rows"]}
    names = [
        (name, op) for name in ("ours", "copy", "definition", "compiled") for op in ("encode", "decode_add_rmsnorm")
    ]
    assert sorted(rows) == sorted(names)
    assert all(row["bytes"] == 2048 and row["gb_s"] >= 0 and len(row["eager_us"]) == 3 for row in rows.values())
    assert all(row["same_bits"] for (name, _), row in rows.items() if name != "copy")
    assert (tmp_path / "k.png").read_bytes().startswith(b"\x89PNG")
    assert "0 failed" in done.stdout and "not here: deepspeed" in done.stdout


@pytest.mark.slow
def test_a_dry_run_of_everything(tmp_path):
    done = run("--dry-run", "--seconds", "150", "--json", "k.json", "--candidate", "ours", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert not [row for row in json.loads((tmp_path / "k.json").read_text())["rows"] if "failed" in row]
