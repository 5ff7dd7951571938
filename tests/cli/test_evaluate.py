"""The command as a user gives it, on the bundled model and text."""

import json
import math
import signal
import subprocess
import sys
import time

import pytest
from safetensors import safe_open

from megatron_lowbit.__main__ import main
from megatron_lowbit.cli.files import BUNDLED
from megatron_lowbit.engines.fingerprint import tensor_digests
from megatron_lowbit.plan_file import Plan
from tests import hf_folders

FAST = ["--windows", "2", "--window-length", "64", "--dtype", "fp32"]
SITES = [f"layers.{i}.{kind}" for i in range(6) for kind in ("attention", "mlp")]


def evaluate(*argv: str) -> int:
    return main(["evaluate", *FAST, *argv])


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("evaluate")
    plan = Plan(dict.fromkeys(SITES, "exact") | {"layers.0.mlp": "int2:g32:sym"}, tp=2)
    plan.save(folder / "plan.json")
    argv = ["--tp", "2,4", "--comm", "int8:g128", "int2:g32:sym", "--comm-plan", str(folder / "plan.json")]
    argv += ["--plot", str(folder / "all.png")]
    argv += ["--json", str(folder / "all.json"), "--progress", str(folder / "progress.safetensors")]
    assert evaluate(*argv) == 0
    return folder, argv, json.loads((folder / "all.json").read_text())


def test_the_json_is_as_documented(results):
    found = results[2]
    assert found["model"] == "model" and found["text"] == "sample_text.txt" and len(found["tensors"]) > 10
    cases = [(row["spec"], row["tp"], row["algorithm"]) for row in found["rows"]]
    assert cases == [
        ("int8:g128", 2, "one-shot"), ("int2:g32:sym", 2, "one-shot"), ("int8:g128", 4, "two-step"),
        ("int2:g32:sym", 4, "two-step"), ("plan", 2, "one-shot"),
    ]  # fmt: skip
    for row in found["rows"]:
        assert row["windows"] == 2 and row["tokens"] == 126 and row["perplexity_exact"] > 1
        assert row["loss"] == pytest.approx(row["perplexity"] / row["perplexity_exact"] - 1, abs=1e-9)
        low, high = row["loss_interval"]
        assert low <= row["loss"] <= high and row["kl_p99"] >= row["kl_mean"] > 0
    assert (results[0] / "all.png").read_bytes().startswith(b"\x89PNG")
    assert {row["perplexity_exact"] for row in found["rows"]} == {found["rows"][0]["perplexity_exact"]}


def test_a_bad_spec_is_reported_as_bad(results):
    good, bad, _, bad4, planned = results[2]["rows"]
    assert good["kl_mean"] < 0.001 and good["top1_agreement"] > 0.97 and good["bits_per_value"] == 8.25
    assert bad["kl_mean"] > 50 * good["kl_mean"] and bad4["kl_mean"] > bad["kl_mean"]
    assert good["kl_mean"] < planned["kl_mean"] < bad["kl_mean"]
    assert planned["bits_per_value"] == pytest.approx((11 * 16 + 2.5) / 12)


def test_goes_on_where_it_stopped(results, monkeypatch):
    folder, argv, found = results
    monkeypatch.setattr("megatron_lowbit.evaluation.run.compare", None)  # nothing is left to do
    argv = [str(folder / "again.json") if arg.endswith("all.json") else arg for arg in argv]
    assert evaluate(*argv) == 0
    again = json.loads((folder / "again.json").read_text())
    assert again["rows"] == found["rows"]


def test_the_gate(results, capsys):
    folder, argv, _ = results
    baseline = ["--baseline", str(folder / "all.json"), "--fail-above", "0.1%"]
    assert evaluate(*argv, *baseline) == 0
    assert evaluate(*argv, "--fail-above", "1%") == 3
    assert "too much worse: int2:g32:sym, TP 4: perplexity +" in capsys.readouterr().out


@pytest.mark.parametrize("limit", ["nan", "inf%", "1e999", "%"])
def test_a_gate_that_never_fails_is_none(limit, capsys):
    with pytest.raises(SystemExit):
        evaluate("--fail-above", limit)
    assert "is no percentage such as 1%" in capsys.readouterr().err


def test_one_window_has_no_interval_and_the_json_says_so(tmp_path, capsys):
    path = tmp_path / "result.json"
    assert evaluate("--windows", "1", "--comm", "int8:g128", "--json", str(path)) == 0
    [row] = json.loads(path.read_text(), parse_constant=pytest.fail)["rows"]
    assert row["loss_interval"] == [None, None] and row["kl_error"] is None and row["kl_mean"] > 0


def test_says_that_no_engine_runs_a_size(tmp_path, capsys):
    """16 ranks share the 256 and 1024 features that enter the layers, but not 8 heads."""
    path = tmp_path / "result.json"
    assert evaluate("--tp", "8,16", "--comm", "int8:g128", "--json", str(path)) == 0
    notes = json.loads(path.read_text())["notes"]
    assert notes == [line.removeprefix("note: ") for line in capsys.readouterr().out.splitlines() if "note: " in line]
    assert len(notes) == 1 and notes[0].startswith(
        "TP 16 divides the features of every site, but not 8 attention heads and 8 key-value heads: no engine here"
    )


def test_keeps_what_was_found_before_a_loss_was_not_finite(tmp_path, monkeypatch, capsys):
    from megatron_lowbit.evaluation import run

    calls, compare, path = [], run.compare, tmp_path / "progress"

    def second_is_bad(exact, logits, targets):
        calls.append(1)
        return compare(exact, logits * float("nan") if len(calls) == 2 else logits, targets)

    monkeypatch.setattr(run, "compare", second_is_bad)
    argv = ["--comm", "int8:g128", "--progress", str(path)]
    assert evaluate(*argv) == 2
    assert "window 1, int8:g128, TP=2: the loss is not finite; it began" in capsys.readouterr().err
    assert evaluate(*argv) == 0 and len(calls) == 3  # only the second window was left


INTERRUPTED = """
import sys
from megatron_lowbit.evaluation import progress_file
progress_file.SECONDS = 0  # so that the first window is in the file at once
from megatron_lowbit.__main__ import main
sys.exit(main(sys.argv[1:]))
"""


def test_an_interruption_leaves_the_file_whole(tmp_path):
    path, again, once = tmp_path / "progress", tmp_path / "again.json", tmp_path / "once.json"
    argv = ["evaluate", "--window-length", "32", "--windows", "24", "--tp", "4", "--comm", "int4:g32", "int8:g128"]
    command = [sys.executable, "-c", INTERRUPTED, *argv, "--progress", str(path)]
    running = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    deadline = time.monotonic() + 120
    while not path.exists() and running.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    running.send_signal(signal.SIGINT)
    assert running.wait(120) == 130 and running.stderr.read().endswith("interrupted\n")
    with safe_open(str(path), "pt") as file:
        found = sum(name.endswith(".nll") for name in file.keys())
    assert 0 < found < 48 and not list(tmp_path.glob(".*"))
    assert main([*argv, "--progress", str(path), "--json", str(again)]) == 0
    assert main([*argv, "--json", str(once)]) == 0
    assert json.loads(again.read_text())["rows"] == json.loads(once.read_text())["rows"]


def test_calibrates_on_another_text(tmp_path):
    text = tmp_path / "other.txt"
    text.write_text("It was the best of houses, and the rain fell upon its roof for many a day. " * 60)
    path = tmp_path / "result.json"
    argv = ["--tp", "2", "--comm", "selective4", "--calibration-text", str(text), "--json", str(path)]
    assert evaluate(*argv) == 0
    row = json.loads(path.read_text())["rows"][0]
    assert row["spec"].startswith("selective4") and math.isfinite(row["kl_mean"])


def test_a_calibration_of_the_predicted_text_is_refused(tmp_path, capsys):
    text, made = str(BUNDLED / "sample_text.txt"), str(tmp_path / "made.safetensors")
    assert main(["calibrate", "--text", text, "--tp", "2", "--samples", "2", "--out", made]) == 0
    for given in (["--calibration-text", text], ["--comm-calibration", made]):
        assert evaluate("--comm", "selective4", *given) == 2
        error = capsys.readouterr().err
        assert "the text that is predicted" in error and "would flatter" in error


def test_a_plan_whose_specs_need_a_calibration(tmp_path, capsys):
    """Of the plan's TP size."""
    text, path = tmp_path / "other.txt", tmp_path / "result.json"
    text.write_text("It was the best of houses, and the rain fell upon its roof for many a day. " * 60)
    Plan(dict.fromkeys(SITES, "int8") | {"layers.0.mlp": "selective4"}, tp=4).save(tmp_path / "plan.json")
    argv = ["--comm-plan", str(tmp_path / "plan.json"), "--json", str(path)]
    assert evaluate(*argv) == 2
    assert "plan plan.json needs a calibration at TP 4" in capsys.readouterr().err
    assert evaluate(*argv, "--calibration-text", str(text)) == 0
    [row] = json.loads(path.read_text())["rows"]
    assert (row["plan"], row["tp"]) == ("plan plan.json", 4) and math.isfinite(row["kl_mean"])


def test_any_family_that_is_known(tmp_path):
    """Not only Megatron's: no engine is asked."""
    import torch
    from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

    AutoTokenizer.from_pretrained(BUNDLED / "model").save_pretrained(tmp_path)
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=4096, n_embd=64, n_layer=2, n_head=4, n_positions=128)
    GPT2LMHeadModel(config).save_pretrained(tmp_path)
    path = tmp_path / "result.json"
    assert evaluate("--model", str(tmp_path), "--comm", "int4:g32", "--json", str(path)) == 0
    row = json.loads(path.read_text())["rows"][0]
    assert row["bits_per_value"] == 5 and row["kl_mean"] > 1e-6 and row["bytes_per_token"] == 2 * 2 * 64 * 5 / 8


@pytest.mark.parametrize("name", ["bert", "roberta"])
def test_an_encoder_predicts_what_is_masked(name, tmp_path):
    """Against the definition: windows of [CLS] … [SEP] with the same tokens masked, scored by Transformers alone."""
    import torch
    import transformers

    folder, path, window = hf_folders.save(name, tmp_path / "model"), tmp_path / "result.json", 32
    argv = ["--model", str(folder), "--window-length", str(window), "--comm", "int8:g32", "int2:g32:sym"]
    assert evaluate(*argv, "--tp", "4", "--json", str(path)) == 0
    found = json.loads(path.read_text())
    assert found["predicts"] == "masked"
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForMaskedLM.from_pretrained(folder, dtype=torch.float32).eval()
    text = tokenizer((BUNDLED / "sample_text.txt").read_text(), add_special_tokens=False)["input_ids"]
    total, count = 0.0, 0
    for number in range(2):
        part = torch.tensor([2, *text[number * 30 : number * 30 + 30], 3])
        possible = [i for i, token in enumerate(part.tolist()) if token > 4]
        order = torch.randperm(len(possible), generator=torch.Generator().manual_seed(number))
        chosen = [possible[i] for i in order[: round(0.15 * len(possible))]]
        read = part.clone()
        read[chosen] = tokenizer.mask_token_id
        with torch.no_grad():
            logits = model(read[None]).logits[0].log_softmax(-1)
        total, count = total - sum(logits[at, part[at]].item() for at in chosen), count + len(chosen)
    good, bad = found["rows"]
    assert good["tokens"] == count and good["perplexity_exact"] == pytest.approx(math.exp(total / count), rel=1e-4)
    assert bad["kl_mean"] > 20 * good["kl_mean"] > 0


def test_an_encoder_without_its_head(tmp_path, capsys):
    import transformers

    folder = hf_folders.save("bert", tmp_path / "model")
    encoder = transformers.AutoModel.from_pretrained(folder)
    for file in folder.glob("model*.safetensors*"):
        file.unlink()
    encoder.save_pretrained(folder)
    assert evaluate("--model", str(folder)) == 2
    error = capsys.readouterr().err
    assert "lacks cls.predictions" in error and "one with its masked-language-model head" in error


def test_an_encoder_decoder_continues_what_it_reads(tmp_path):
    folder, path = hf_folders.save("t5", tmp_path / "model"), tmp_path / "result.json"
    argv = ["--model", str(folder), "--comm", "int8:g32", "int2:g32:sym", "--json", str(path)]
    assert evaluate(*argv) == 0
    found = json.loads(path.read_text())
    good, bad = found["rows"]
    assert found["predicts"] == "continued" and good["tokens"] == 2 * 32  # 63 and an end: 31 are read
    assert bad["kl_mean"] > 20 * good["kl_mean"] > 0
    only = ["--comm-sites", "encoder.layers.*", "--comm-sites", "layers.1.cross_attention"]
    assert evaluate(*argv, *only) == 0
    assert 0 < json.loads(path.read_text())["rows"][1]["kl_mean"] != bad["kl_mean"]


def test_ranks_on_two_nodes(tmp_path, capsys):
    """Against the model itself, its sums reduced by the simulation."""
    path = tmp_path / "result.json"
    argv = ["--tp", "4", "--nodes", "2", "--comm", "int8:g128", "--comm-outer", "int2:g32:sym", "--json", str(path)]
    argv += ["--comm-algorithm", "hierarchical", "two-step", "auto"]
    assert evaluate(*argv) == 0
    nested, flat = json.loads(path.read_text())["rows"]  # "auto" is the first
    assert nested["algorithm"] == "hierarchical" and (nested["nodes"], nested["outer_spec"]) == (2, "int2:g32:sym")
    assert flat["algorithm"] == "two-step" and (flat["nodes"], flat["outer_spec"]) == (None, None)
    assert nested["kl_mean"] > 20 * flat["kl_mean"] > 0
    # A third of what a rank sends is scattered inside at 8 bits, the other two thirds are of 2.
    assert nested["bits_per_value"] == pytest.approx((8.125 + 2 * 2.5) / 3, rel=0.05)
    assert "hierarchical, 2 nodes" in " ".join(capsys.readouterr().out.split())
    baseline = ["--baseline", str(path), "--fail-above", "1%"]
    assert evaluate(*argv[:4], "--comm", "int8:g128", "--comm-algorithm", "hierarchical", *baseline) == 2
    assert "the baseline lacks int8:g128 at TP 4" in capsys.readouterr().err


def written(content: bytes):
    def make(folder):
        (folder / "bad").write_bytes(content)
        return folder / "bad"

    return make


def mamba(folder):
    import transformers

    transformers.AutoTokenizer.from_pretrained(BUNDLED / "model").save_pretrained(folder)
    config = transformers.MambaConfig(vocab_size=4096, hidden_size=32, state_size=4, num_hidden_layers=1)
    transformers.MambaForCausalLM(config).save_pretrained(folder)
    return folder


def of_another_model(folder):
    tensors = tensor_digests(BUNDLED / "model") | {"model.layers.0.mlp.down_proj.weight": "0", "lm_head.weight": "0"}
    Plan(dict.fromkeys(SITES, "int8"), 2, metadata={"fingerprint": "abc", "tensors": tensors}).save(folder / "plan")
    return folder / "plan"


def of_other_sites(folder):
    Plan({"decoder.layers.0": "int8"}, tp=2).save(folder / "plan")
    return folder / "plan"


BAD = {
    "EMPTY": written(b" \n"),
    "LATIN-1": written("Stra\xdfe ".encode("latin-1") * 500),
    "SHORT": written(b"It was a dark night."),
    "DAMAGED": written(b"no safetensors"),
    "MAMBA": mamba,
    "ANOTHER": of_another_model,
    "ELSEWHERE": of_other_sites,
}


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--tp", "1"], "--tp has 1"),
        (["--tp", "3"], "TP=3 does not divide the 256 features that enter layers.0.attention; possible TP sizes: 2, 4"),
        (["--tp", "2,96"], "TP=96 does not divide the 256 features"),
        (["--text", "EMPTY"], "is empty"),
        (["--text", "LATIN-1"], "cannot be read as UTF-8 text"),
        (["--text", "SHORT"], ": the text has 6 tokens, and 2 windows of 64 need 128"),
        (["--text", "nowhere.txt"], "nowhere.txt cannot be read"),
        (["--model", "MAMBA"], "MambaForCausalLM: of layers.0 only mlp has a usual name for a row-parallel layer"),
        (["--comm-plan", "ANOTHER"], "fingerprint abc, this one has"),
        (["--comm-plan", "ANOTHER"], "lm_head.weight, model.layers.0.mlp.down_proj.weight differ): make one for"),
        (["--comm-plan", "ELSEWHERE"], "lacks layers.0.attention"),
        (["--comm-plan", "ELSEWHERE", "--tp", "4"], "was made for TP 2: add that to --tp"),
        (["--json", "now.json", "--progress", "now.json"], "--json and --progress are both now.json: give two files"),
        (["--json", "/proc/now.json", "--windows", "1"], "--json /proc/now.json cannot be written"),
        (["--plot", "loss.pdf"], "--plot loss.pdf is no name of a PNG"),
        (["--progress", "DAMAGED"], "cannot be read"),
        (["--comm", "int9"], "int9"),
        (["--comm", "exact"], "compared with anyway"),
        (["--comm", "selective4"], "needs a calibration at TP 2"),
        (["--comm-algorithm", "ring"], "'ring'"),
        (
            ["--comm-algorithm", "hierarchical"],
            "hierarchical with --tp 2 and --nodes 1: give 2 nodes or more, of 2 ranks",
        ),
        (["--nodes", "3", "--tp", "4"], "nodes is 3, and 4 ranks cannot be on so many equally"),
        (["--comm-outer", "int3"], "--comm-outer int3 is what travels between nodes: give --nodes 2 or more"),
        (["--comm-outer", "int3", "--tp", "4", "--nodes", "2", "--comm-algorithm", "two-step"], "--comm-outer int3 is"),
        (["--comm-outer", "int1", "--tp", "4", "--nodes", "2"], "unknown codec 'int1'"),
        (["--windows", "9999"], "and 9999 windows of 64 need"),
        (["--window-length", "9999"], "give at most 512"),
        (["--stride", "65"], "the stride is 65"),
        (["--model", "nowhere"], "nowhere does not exist"),
        (["--baseline", "x.json"], "give that too"),
        (["--baseline", "x.json", "--fail-above", "1%"], "is no --json of evaluate"),
        (["--json", "/nowhere/x.json"], "there is no folder"),
        (["--comm-plan", "none.json"], "there is no plan file"),
        (["--comm-sites", "nothing.*"], "selects none of"),
        (["--comm-sites", "layers.*.mlp", "--comm-sites", "layers.0.atention"], "layers.0.atention selects none of"),
    ],
)
def test_refuses(argv, message, capsys, tmp_path):
    argv = [str(BAD[word](tmp_path)) if word in BAD else word for word in argv]
    assert evaluate(*argv) == 2
    error = capsys.readouterr().err
    assert "error: " in error and message in error and "Traceback" not in error
