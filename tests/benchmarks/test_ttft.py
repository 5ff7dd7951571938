"""The benchmark of the time to first token, with a model so small that it takes seconds; no time decides a test."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import torch

from tests.ranks import run_ranks

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
sys.path.append(str(BENCHMARKS))

import random_llama  # noqa: E402
import shaped_network  # noqa: E402
import ttft  # noqa: E402

LAYERS, HIDDEN, TOKENS, LATER = 2, 64, 1024, 3
MESSAGE = 2 * TOKENS * HIDDEN  # bytes in bf16: 128 KiB, from which on the gate compresses where it knows nothing
SIZES = {"layers": LAYERS, "hidden": HIDDEN, "heads": 4, "ffn": 64, "vocab": 96}
SMALL = [f"--{name}={size}" for name, size in SIZES.items()]
PACKAGES = {"megatron": "megatron.core", "transformers": "accelerate", "deepspeed": "deepspeed"}


def rank_body(rank: int, world: int, engine_name: str, folder: str) -> dict:
    sys.path.append(str(BENCHMARKS))
    os.environ["LOCAL_RANK"] = str(rank)
    import ttft_rank

    from megatron_lowbit.engines.registry import engine_class

    engine = engine_class(engine_name)(folder, world, torch.bfloat16)
    job = {"engine": engine_name, "device": "cpu", "tokens": TOKENS, "decode_tokens": LATER, "repeats": 2}
    job |= {"specs": ["int4:g32"], "algorithms": ["gate", "always"]}
    ids = torch.randint(96, (1, TOKENS + LATER), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        alone = engine.logits(ids[:, :TOKENS])[:, -1].float()  # before anything was patched
    events, logits, enable, request = [], [], engine.enable, ttft_rank.one_request

    def enabled(config):
        events.append("enable")
        return enable(config)

    def requested(*args):
        events.append("request")
        found = request(*args)
        logits.append(found["logits"].float())
        return found

    engine.enable, ttft_rank.one_request = enabled, requested
    return ttft_rank.measure(engine, job) | {"events": events, "logits": logits, "alone": alone}


@pytest.mark.parametrize("engine", PACKAGES)
def test_exact_and_compressed_in_turn(engine, tmp_path):
    pytest.importorskip(PACKAGES[engine])
    random_llama.write(tmp_path, **SIZES, positions=TOKENS + LATER)
    found, other = run_ranks(2, rank_body, engine, str(tmp_path))
    assert found["exact"] == other["exact"] and found["rows"] == other["rows"]  # those of the slowest rank, on all
    assert found["events"] == 3 * ["request", *2 * ["enable", "request"]]

    exact, sums = found["exact"], 2 * LAYERS
    others = exact["all_reduces"] - sums  # of the embedding, where the framework shards it
    assert others == 1 if engine == "megatron" else others >= 0
    assert exact["bytes_exact"] >= (sums + (engine == "megatron")) * MESSAGE  # a ring of two sends all of a message
    assert 0 < exact["share"] < 1 and exact["ttft_ms"] > exact["all_reduces_ms"] > 0 and exact["decode_ms"] > 0
    gate, always = found["rows"]
    for row, name in ((gate, "gate"), (always, "always")):
        assert (row["spec"], row["algorithm"], row["paths"]) == ("int4:g32", name, {"one-shot": sums})
        assert row["bytes_sent"] == exact["bytes_exact"] - sums * MESSAGE * 11 / 16  # int4:g32 has 5 bits a value
        assert row["ttft_ms"] > 0 and row["decode_ms"] > 0
    assert gate["decode_paths"] == {"exact": sums * LATER} and always["decode_paths"] == {"one-shot": sums * LATER}

    untouched, *later = found["logits"][::3]
    torch.testing.assert_close(untouched, found["alone"], rtol=0.02, atol=0.02)
    assert all(torch.equal(untouched, logits) for logits in later)  # what was patched in between is undone
    assert not any(torch.equal(untouched, logits) for logits in found["logits"][1::3] + found["logits"][2::3])


def start(tmp_path, *argv: str) -> subprocess.Popen:
    command = [sys.executable, str(BENCHMARKS / "ttft.py"), *SMALL, "--json", str(tmp_path / "ttft.json"), *argv]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ | {"TMPDIR": str(tmp_path)}
    )


def rooted() -> bool:
    try:
        shaped_network.check()
    except shaped_network.NetworkError:
        return False
    return True


def test_as_its_user_starts_it(tmp_path):
    pytest.importorskip("megatron.core")
    running = start(
        tmp_path, "--tokens=256", "--decode-tokens=2", "--repeats=1", "--rate-gbit=1", "--comm=int2:g32",
        "--plot", str(tmp_path / "ttft.png"),
    )  # fmt: skip
    printed, errors = running.communicate(timeout=200)
    assert running.returncode == 0, errors
    written = json.loads((tmp_path / "ttft.json").read_text())
    assert [row["algorithm"] for row in written["rows"]] == ["gate", "always"] and written["hidden"] == HIDDEN
    for row in written["rows"]:
        assert (row["engine"], row["ranks"], row["tokens"], row["spec"]) == ("megatron", 2, 256, "int2:g32")
        assert row["rate_gbit"] == (1.0 if rooted() else None) and row["share_target"] is None
        assert row["ratio"] == pytest.approx(row["ttft_exact_ms"] / row["ttft_ms"]) and 0 < row["share"] < 1
    gate, always = written["rows"]
    assert gate["paths"] == {"exact": 2 * LAYERS} and gate["bytes_sent"] == gate["bytes_exact"]  # 32 KiB each
    assert always["paths"] == {"one-shot": 2 * LAYERS} and always["bytes_sent"] < always["bytes_exact"]
    assert "int2:g32" in printed and ("loopback" in errors) != rooted()
    assert (tmp_path / "ttft.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ttft.json", "ttft.png"]


@pytest.mark.slow
@pytest.mark.skipif(not rooted(), reason="network namespaces need root")
def test_stopped_it_leaves_nothing_behind(tmp_path):
    running = start(tmp_path, "--rate-gbit", "1", "--repeats", "10000")
    mine = f"{shaped_network.PREFIX}-{running.pid}-1"
    names = lambda: subprocess.run(["ip", "netns", "list"], capture_output=True, text=True).stdout  # noqa: E731
    deadline = time.monotonic() + 60
    while mine not in names() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert mine in names()
    time.sleep(2)
    running.send_signal(signal.SIGINT)
    _, errors = running.communicate(timeout=30)
    assert running.returncode == 130 and "stopped" in errors and "Traceback" not in errors
    assert mine[:-2] not in names() and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--ranks", "3"], "TP=3 does not divide"),
        (["--heads", "3"], "--heads 3 do not divide --hidden 64"),
        (["--ranks", "1"], "--ranks 1: it must be at least 2"),
        (["--tokens", "0"], "--tokens 0: it must be at least 1"),
        (["--share", "65"], "--share 65: a share lies between 0 and 1"),
        (["--rate-gbit", "-1"], "--rate-gbit -1: a rate is above 0"),
        (["--comm", "int9"], "int9"),
        (["--comm", "selective4"], "calibration"),
        (["--model", "nowhere"], "nowhere"),
        (["--model", str(random_llama.TOKENIZER), "--tokens", "5000"], "5000 tokens and 32 more are above"),
        (["--device", "cuda", "--ranks", "64", "--heads", "32"], "64 ranks on GPUs need as many"),
    ],
)  # fmt: skip
def test_bad_input_is_refused_before_ranks_start(argv, message, monkeypatch, capsys):
    pytest.importorskip("megatron.core")
    monkeypatch.setattr(sys, "argv", ["ttft.py", *SMALL, *argv])
    monkeypatch.setattr(shaped_network, "run_ranks", lambda *_: pytest.fail("ranks were started"))
    assert ttft.main() == 1
    assert message in capsys.readouterr().err


def test_without_tc_it_measures_on_loopback_and_says_so(monkeypatch, capsys):
    monkeypatch.setattr(shaped_network.os, "geteuid", lambda: 0)
    monkeypatch.setattr(shaped_network.shutil, "which", lambda _: None)
    monkeypatch.setattr(sys, "argv", ["ttft.py", "--share", "0.5"])
    assert ttft.links(ttft.parse()) == [None]
    assert "there is no ip" in (said := capsys.readouterr().err) and "loopback" in said


def test_a_share_leads_to_a_rate():
    trial = {"ttft_ms": 1010.0, "all_reduces_ms": 10.0, "bytes_exact": 10**7, "share": 0.01}
    rate = ttft.rate_for(0.6, trial)
    wire = trial["bytes_exact"] * 8e-6 / rate
    assert (wire + 10) / (1000 + wire + 10) == pytest.approx(0.6)
    beyond = 25  # ms that the first guess did not know of
    again = trial | {"ttft_ms": 1000 + wire + beyond, "all_reduces_ms": wire + beyond}
    wire = trial["bytes_exact"] * 8e-6 / ttft.rate_for(0.6, again, rate)
    assert (wire + beyond) / (1000 + wire + beyond) == pytest.approx(0.6)
    with pytest.raises(ttft.ConfigError, match="--share 0.009 cannot be had"):
        ttft.rate_for(0.009, trial)


def test_help_fits_and_has_examples():
    done = subprocess.run(
        [sys.executable, BENCHMARKS / "ttft.py", "--help"], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0 and "python benchmarks/ttft.py --rate-gbit" in done.stdout
    assert tempfile.gettempdir() not in done.stdout
