"""The command as a user gives it, on the bundled model and text: plans are judged by bits and by what is measured."""

import json
import random
import string

import pytest

pytest.importorskip("scipy")

import megatron_lowbit as lowbit
from megatron_lowbit.__main__ import main
from megatron_lowbit.plan_file import Plan

FAST = ["--window-length", "48", "--dtype", "fp32", "--tp", "4"]
FEW = ["--windows", "4", "--held-out-windows", "2"]
CANDIDATES = ["--candidates", "int2:g32,int4:g32", "int6:g32"]


def plan(*argv: str, windows=FEW) -> int:
    return main(["plan", *FAST, *windows, *CANDIDATES, *argv])


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plan")
    argv = ["--progress", str(folder / "progress.safetensors")]
    found = {}
    for name, budget in (("bits", ("--budget-bits", "6")), ("kl", ("--budget-kl", "0.05"))):
        assert plan(*argv, *budget, "--out", str(folder / f"{name}.json"), "--json", str(folder / "all.json")) == 0
        found[name] = Plan.load(folder / f"{name}.json")
    return folder, argv, found, json.loads((folder / "all.json").read_text())


def held_out(loaded):
    return loaded.metadata["held_out"]


def test_the_least_loss_for_its_bits(results):
    found = results[2]["bits"]
    assert (found.tp, found.algorithm, len(found.sites)) == (4, "two-step", 12)
    assert 5.8 < found.metadata["bits_per_value"] <= 6 and len({*found.sites.values()}) > 1
    uniform = {row["spec"]: row for row in found.metadata["uniform"]}
    assert list(uniform) == ["int2:g32", "int4:g32", "int6:g32"]
    assert held_out(found)["kl_mean"] < uniform["int4:g32"]["kl_mean"] < uniform["int2:g32"]["kl_mean"]
    assert found.metadata["holds"] is True


def test_the_fewest_bytes_for_a_loss(results):
    found = results[2]["kl"].metadata
    cheaper = [row for row in found["uniform"] if row["bits_per_value"] <= found["bits_per_value"]]
    assert cheaper and all(row["kl_planning"] > 0.05 for row in cheaper)
    assert found["planning"]["kl_mean"] + found["planning"]["kl_error"] <= 0.05 and found["holds"] is True
    assert 0.6 < found["planning"]["predicted_by_measured"] < 1.6


def test_says_where_it_came_from(results):
    folder, _, found, text = results
    facts = found["kl"].metadata
    assert facts["model"] == "model" and facts["text"] == "sample_text.txt" and len(facts["fingerprint"]) == 64
    assert facts["text_sha256"] == held_out(found["kl"])["text_sha256"] and facts["megatron_lowbit"]
    assert facts["budget"] == {"kind": "kl", "value": 0.05} and facts["probe"] == "gauss3:g256:trellis"
    assert facts["candidates"] == ["int2:g32", "int4:g32", "int6:g32"] and facts["torch"]
    assert text["sites"] == dict(found["kl"].sites) and len(text["effects"]) == 12 * 2 * 3
    assert str(folder) not in (folder / "kl.json").read_text()  # names, never paths


def test_what_it_says_is_what_evaluate_measures(results, tmp_path):
    """On the fifth and sixth window, which it was not chosen on."""
    folder, _, found, _ = results
    argv = ["--tp", "4", "--comm-plan", str(folder / "kl.json"), "--window-length", "48", "--dtype", "fp32"]
    means = []
    for windows in (4, 6):
        path = tmp_path / f"{windows}.json"
        assert main(["evaluate", *argv, "--windows", str(windows), "--json", str(path)]) == 0
        means.append(json.loads(path.read_text())["rows"][0])
    first, both = means
    assert first["kl_mean"] == pytest.approx(found["kl"].metadata["planning"]["kl_mean"], rel=1e-6)
    rest = (both["kl_mean"] * both["tokens"] - first["kl_mean"] * first["tokens"]) / (both["tokens"] - first["tokens"])
    assert held_out(found["kl"])["kl_mean"] == pytest.approx(rest, rel=1e-4)
    assert both["bits_per_value"] == found["kl"].metadata["bits_per_value"]


def test_every_patch_takes_it(results):
    config = lowbit.CommConfig(plan=results[0] / "bits.json")
    assert config.planned.sites == results[2]["bits"].sites and config.plan_digest == results[2]["bits"].digest


def test_goes_on_where_it_stopped(results, monkeypatch, tmp_path):
    monkeypatch.setattr("megatron_lowbit.evaluation.run.compare", None)  # nothing is left to do
    assert plan(*results[1], "--budget-kl", "0.05", "--out", str(tmp_path / "again.json")) == 0
    assert Plan.load(tmp_path / "again.json").sites == results[2]["kl"].sites


def test_bits_that_no_candidate_has_are_refused_before_any_run(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr("megatron_lowbit.evaluation.run.compare", None)
    assert plan("--budget-bits", "2.9", "--out", str(tmp_path / "plan.json")) == 2
    assert capsys.readouterr().err.startswith("error: 2.9 bits per value are fewer than the 3 of")


def test_measures_every_candidate_if_asked_to(results, tmp_path):
    argv = ["--probe", "none", "--budget-bits", "4", "--out", str(tmp_path / "direct.json")]
    assert main(["plan", *FAST, *FEW, "--candidates", "int2:g32,int4:g32", *argv]) == 0
    found = Plan.load(tmp_path / "direct.json")
    assert found.metadata["probe"] is None and found.metadata["bits_per_value"] <= 4
    assert {row["spec"] for row in found.metadata["uniform"]} == {"int2:g32", "int4:g32"}


@pytest.fixture(scope="module")
def gibberish(tmp_path_factory):
    """Text whose perplexity suffers more than prose's does."""
    path = tmp_path_factory.mktemp("text") / "gibberish.txt"
    letters = random.Random(0)
    path.write_text("".join(letters.choice(string.printable) for _ in range(3000)))
    return path


def test_a_budget_that_does_not_hold_is_an_exit_code(results, gibberish, tmp_path, capsys):
    """Quite another text to hold out; the plan is written, marked."""
    out = tmp_path / "broken[1].json"
    argv = ["--progress", str(tmp_path / "p"), "--held-out", str(gibberish), "--budget-kl", "0.05", "--out", str(out)]
    assert plan(*argv) == 3
    found = Plan.load(out)
    assert found.metadata["holds"] is False and held_out(found)["kl_mean"] > 0.05
    assert held_out(found)["text"] == "gibberish.txt" and held_out(found)["windows"] == 2
    assert found.sites == results[2]["kl"].sites
    shown = capsys.readouterr().out
    assert "THE BUDGET DOES NOT HOLD" in shown and "plan broken[1].json: TP 4" in shown  # a name is no markup
    assert (tmp_path / "p.held-out").exists()


def test_a_plan_of_another_model_is_refused(results, tmp_path, capsys):
    """Saying which tensors differ: here one that was there when the plan was made."""
    content = json.loads((results[0] / "bits.json").read_text()) | {"fingerprint": "0" * 64}
    content["tensors"]["model.norm.weight"] = "another"
    (tmp_path / "other.json").write_text(json.dumps(content))
    argv = ["--tp", "4", "--comm-plan", str(tmp_path / "other.json"), "--windows", "1", "--window-length", "48"]
    assert main(["evaluate", *argv]) == 2
    error = capsys.readouterr().err
    assert "was made for another model" in error and "; model.norm.weight differ): make one" in error


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "a plan needs a budget"),
        (["--budget-bits", "5", "--budget-kl", "1"], "two budgets exclude each other"),
        (["--budget-bits", "-1"], "--budget-bits is -1"),
        (["--budget-bits", "2.9"], "2.9 bits per value are fewer than the 3 of the cheapest candidate"),
        (["--budget-bits", "20"], "and 16 compress nothing: give fewer"),
        (["--budget-kl", "1e-12"], "no plan keeps to 1e-12 nats"),
        (["--budget-bits", "5", "--candidates", "int9"], "int9"),
        (["--budget-bits", "5", "--candidates", "int4/int8"], "two legs where one codec is meant"),
        (["--budget-bits", "5", "--candidates", "selective4"], "needs a calibration at TP 4"),
        (["--budget-bits", "5", "--probe", "int9"], "int9"),
        (
            [
                "--budget-bits",
                "5",
                "--candidates",
                "selective4",
                "--calibration-text",
                __file__,
                "--held-out",
                __file__,
            ],
            "--calibration-text is the text that is held out",
        ),
        (["--budget-bits", "5", "--tp", "1"], "--tp is 1"),
        (
            ["--budget-bits", "5", "--windows", "40", "--held-out-windows", "40"],
            "40 to plan on and 40 to hold out need",
        ),
        (["--budget-bits", "5", "--held-out-windows", "0"], "--held-out-windows is 0"),
        (["--budget-bits", "5", "--held-out", "nowhere.txt"], "nowhere.txt"),
        (["--budget-bits", "5", "--json", "/nowhere/x.json"], "there is no folder"),
    ],
)
def test_refuses(results, argv, message, capsys, tmp_path):
    assert plan("--out", str(tmp_path / "plan.json"), *results[1], *argv) == 2
    error = capsys.readouterr().err
    assert "error: " in error and message in error and "Traceback" not in error
    assert not (tmp_path / "plan.json").exists()
