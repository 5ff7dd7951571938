"""The launcher on scripts that know nothing of it, with a stand-in for Megatron-LM's `megatron.training`.

tests/cli/test_run_megatron_lm.py runs Megatron-LM's own scripts, where there is a checkout.
"""

import contextlib
import io
import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from megatron_lowbit.__main__ import main
from megatron_lowbit.cli.run import split
from megatron_lowbit.errors import ConfigError
from megatron_lowbit.patches.megatron.arguments import OPTIONS
from tests.calibrations import random_calibration
from tests.ranks import run_ranks

pytest.importorskip("megatron.core")
if find_spec("megatron.training") is not None:  # wheels from 0.17 on have it, for Python 3.12
    pytest.skip("Megatron-Core brings a megatron.training of its own", allow_module_level=True)

SCRIPT = Path(__file__).parents[1] / "megatron_lm" / "tools" / "logits.py"
SITES = [f"layers.{layer}.{kind}" for layer in range(2) for kind in ("attention", "mlp")]
SPEC = ("--lowbit-comm", "int6:g32", "--lowbit-comm-min-bytes", "0")
TP2 = ("--tensor-model-parallel-size", "2")


def _call(argv):
    """main(argv) in this process -> what it wrote and how it ended; Megatron is left as if new."""
    from megatron.core import parallel_state

    import megatron_lowbit as lowbit

    lowbit.reset_stats()
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = main(argv)
        except SystemExit as error:
            code = f"exit {error.code}"
    parallel_state.destroy_model_parallel()
    return {"code": code, "out": out.getvalue(), "err": err.getvalue()}


def _everything(rank, world, folder):
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "MASTER_ADDR": "localhost"}
    os.environ |= {"CUDA_DEVICE_MAX_CONNECTIONS": "1", "COLUMNS": "200"}
    results = {}

    def run(name, *before, script=SCRIPT, behind=(), own=TP2):
        outputs = ["--out", f"{folder}/{name}"] if script == SCRIPT else []
        results[name] = _call(["run", *before, str(script), *behind, *outputs, *own])
        with contextlib.suppress(OSError):
            results[name] |= json.loads(Path(f"{folder}/{name}.{rank}").read_text())

    run("exact", "--lowbit-comm", "exact", "--lowbit-comm-json", f"{folder}/exact.json")
    run("none")
    run("before", *SPEC, "--lowbit-comm-json", f"{folder}/before.json")
    run("behind", behind=("--prompts", "one", "--lowbit-comm=int6:g32", "--lowbit-comm-min-bytes", "0"))
    run("plain again")
    run("help", *SPEC, own=("--help",))
    run("nothing", *SPEC, own=(*TP2, "--build", "nothing"))
    run("unused", *SPEC, own=(*TP2, "--build", "unused"))
    run("too small", "--lowbit-comm", "int6:g32")
    run("not selected", *SPEC, "--lowbit-comm-sites", "layers.9.*")
    run("te", *SPEC, own=(*TP2, "--build", "te"))
    run("te debug", "--debug", *SPEC, own=(*TP2, "--build", "te"))
    run("tp 1", *SPEC, own=("--tensor-model-parallel-size", "1"))
    run("other tp", *SPEC[:1], "selective4:outliers=1/8", "--lowbit-comm-calibration", f"{folder}/four.safetensors")
    sys.path.append(f"{folder}/not nvidias")
    run("apex", *SPEC)
    sys.path.pop()
    run("unknown", *SPEC, own=("--no-such-option",))
    run("own parser", *SPEC, script=f"{folder}/own_parser.py", own=("--", "--lowbit-comm", "a b"))
    run("raises", script=f"{folder}/raises.py", own=())
    run("syntax", script=f"{folder}/syntax.py", own=())
    run("raises debug", "--debug", script=f"{folder}/raises.py", own=())
    for name, status in (("exit 3", "3"), ("exit text", "text"), ("exit 0", "0")):
        run(name, script=f"{folder}/exits.py", own=(status,))
    return results


OWN_PARSER = """
import argparse, sys
parser = argparse.ArgumentParser()
parser.add_argument("words", nargs="*")
print(parser.parse_args().words, sys.argv[1:], __name__, __file__, sys.path[0])
"""
RAISES = """x: "annotation" = 1
def inner():
    raise ValueError("of the script")
inner()
"""
EXITS = """import sys
sys.exit(int(sys.argv[1]) if sys.argv[1].isdecimal() else sys.argv[1])
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    for name, text in (("own_parser", OWN_PARSER), ("raises", RAISES), ("exits", EXITS), ("syntax", "1 +")):
        (folder / f"{name}.py").write_text(text)
    (folder / "not nvidias" / "apex").mkdir(parents=True)
    (folder / "not nvidias" / "apex" / "__init__.py").write_text("")
    random_calibration(SITES, 4, 64, "1/8").save(folder / "four.safetensors")
    return folder


@pytest.fixture(scope="module")
def ranks(folder):
    return run_ranks(2, _everything, str(folder), timeout=250)


def test_every_reduce_of_an_unedited_script_is_compressed(ranks, folder):
    exact, compressed = (json.loads((folder / f"{name}.json").read_text()) for name in ("exact", "before"))
    assert sorted(compressed["stats"]) == SITES and compressed["comm"] == "int6:g32"
    for site in compressed["stats"].values():
        assert site["paths"] == {"one-shot": 1} and not site["fallbacks"] and site["values"] == 2 * 7 * 64
    assert compressed["calls"] == exact["calls"] == 4 and exact["paths"] == {"exact": 4}
    assert compressed["bytes_sent"] < 0.5 * compressed["bytes_bf16"] == 0.5 * exact["bytes_bf16"]
    for rank in ranks:
        assert rank["before"]["code"] == rank["behind"]["code"] == rank["exact"]["code"] == rank["none"]["code"] == 0
        assert rank["before"]["logits"] == rank["behind"]["logits"] == ranks[0]["before"]["logits"]
        assert rank["exact"]["logits"] == rank["none"]["logits"] == rank["plain again"]["logits"]
        assert rank["before"]["logits"] != rank["exact"]["logits"]


def test_rank_0_says_in_one_line_what_was_sent(ranks):
    line = "lowbit: int6:g32: 4 calls at 4 sites, 3200 bytes sent, 7168 in bf16; paths: one-shot 4\n"
    assert line in ranks[0]["before"]["err"] and line not in ranks[1]["before"]["err"]
    assert "no --lowbit-comm: the script runs as it is" in ranks[0]["none"]["err"]


def test_flags_show_in_the_scripts_args_and_help(ranks):
    flags = ranks[0]["behind"]["flags"]
    assert flags["lowbit_comm"] == "int6:g32" and flags["lowbit_comm_min_bytes"] == 0
    assert flags["lowbit_comm_sites"] is None and ranks[0]["none"]["flags"]["lowbit_comm"] is None
    shown = ranks[0]["help"]
    assert shown["code"] == 0 and "low-bit communication" in shown["out"] and "error" not in shown["err"]
    assert all(flag in shown["out"] for flag in (*OPTIONS, "--tensor-model-parallel-size", "--build"))


def test_the_script_sees_what_python_would_show_it(ranks, folder):
    seen = ranks[0]["behind"]
    assert seen["argv"] == [str(SCRIPT), "--prompts", "one", "--out", f"{folder}/behind", *TP2]
    assert seen["path"] == str(SCRIPT.parent) and seen["prompts"] == ["one"]
    assert seen["name"] == "__main__" and seen["file"] == str(SCRIPT)


def test_a_script_with_a_parser_of_its_own_never_sees_the_flags(ranks, folder):
    file = folder / "own_parser.py"
    words = ["--lowbit-comm", "a b"]
    assert ranks[0]["own parser"]["out"] == f"{words} {['--', *words]} __main__ {file} {folder}\n"


@pytest.mark.parametrize(
    "name, message",
    [
        ("nothing", "nothing was compressed by logits.py: it built no row-parallel layer of Megatron-Core"),
        ("own parser", "nothing was compressed by own_parser.py: it built no row-parallel layer"),
        ("unused", "it built layers to compress (layers.0.attention …), but none of them ran with more than one"),
        ("too small", "all 4 calls went exact (below min_bytes); lower --lowbit-comm-min-bytes"),
        ("not selected", "all 4 calls went exact (site not selected)"),
        (
            "te",
            "layers.0.mlp is a TEFusedMLP, which reduces among Transformer Engine's fused operations: ",
        ),
        ("other tp", "calibration four.safetensors was made for TP 4, this group has 2 ranks: run calibrate --tp 2"),
    ],
)
def test_what_is_not_compressed_is_one_line_and_exit_code_2(ranks, name, message):
    assert [rank[name]["code"] for rank in ranks] == [2, 2]
    errors = [line for line in ranks[0][name]["err"].splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and message in errors[0]
    assert "Traceback" not in ranks[0][name]["err"] and "error: " not in ranks[1][name]["err"]


def test_debug_shows_the_traceback(ranks):
    assert ranks[1]["te debug"]["code"] == 2 and "Traceback" in ranks[1]["te debug"]["err"]
    assert "cli/run.py" in ranks[0]["raises debug"]["err"]


def test_a_tensor_parallel_size_of_one_warns_and_runs(ranks):
    for rank in ranks:
        assert rank["tp 1"]["code"] == 0 and "logits" in rank["tp 1"]
    assert "compresses nothing with a tensor-parallel size of 1" in ranks[0]["tp 1"]["err"]


def test_an_apex_that_is_not_nvidias_is_named(ranks):
    assert [rank["apex"]["code"] for rank in ranks] == [0, 0]
    assert "apex/__init__.py is not NVIDIA's" in ranks[0]["apex"]["err"] and "apex" not in ranks[1]["apex"]["err"]


def test_errors_and_exit_codes_are_the_scripts_own(ranks, folder):
    raised = ranks[0]["raises"]
    assert raised["code"] == 1 and raised["err"].endswith("ValueError: of the script\n")
    shown = raised["err"].partition("Traceback (most recent call last):\n")[2]
    assert shown.startswith(f'  File "{folder}/raises.py", line 4, in <module>\n') and "cli/run.py" not in shown
    syntax = ranks[0]["syntax"]
    assert syntax["code"] == 1 and "SyntaxError" in syntax["err"] and "cli/run.py" not in syntax["err"]
    assert [ranks[0][name]["code"] for name in ("exit 3", "exit text", "exit 0")] == ["exit 3", "exit text", 0]
    assert ranks[0]["unknown"]["code"] == "exit 2" and "arguments: --no-such-option" in ranks[0]["unknown"]["err"]


@pytest.mark.parametrize(
    "argv, message",
    [
        (["missing.py", *SPEC], "error: there is no script missing.py: give the name of a Python file"),
        ([*SPEC, str(SCRIPT), "--lowbit-comm", "int4"], "--lowbit-comm is given twice: give it once"),
        ([*SPEC, *SPEC, str(SCRIPT)], "--lowbit-comm is given twice: give it once"),
        ([str(SCRIPT), "--lowbit-com", "int4"], "unknown flag --lowbit-com: use one of --lowbit-comm, "),
        ([str(SCRIPT), "--lowbit-comm"], "argument --lowbit-comm: expected one argument"),
        ([str(SCRIPT), "--lowbit-comm-min-bytes", "0"], "--lowbit-comm-min-bytes does nothing without --lowbit-comm"),
        ([str(SCRIPT), "--lowbit-comm", "int99"], "int99"),
        ([str(SCRIPT), *SPEC, "--lowbit-comm-json", "no/such/folder/x.json"], "there is no folder"),
        (["--stream", str(SCRIPT)], "unrecognized arguments: --stream"),
        (SPEC, "the following arguments are required: SCRIPT"),
    ],
)
def test_a_wrong_call_is_one_line_and_exit_code_2(argv, message, capsys):
    try:
        code = main(["run", *argv])
    except SystemExit as error:
        code = error.code
    lines = capsys.readouterr().err.splitlines()
    assert code == 2 and len(lines) == 1 and message in lines[0]


def test_the_json_is_written_though_nothing_was_sent(tmp_path, monkeypatch, capsys):
    script, out = tmp_path / "script.py", tmp_path / "sent.json"
    script.write_text("pass\n")
    assert main(["run", str(script), "--lowbit-comm-json", str(out)]) == 0
    assert json.loads(out.read_text())["calls"] == 0
    with pytest.warns(UserWarning, match="compresses nothing with a tensor-parallel size of 1"):
        assert main(["run", str(script), *SPEC, "--lowbit-comm-json", str(out)]) == 0
    assert json.loads(out.read_text())["comm"] == SPEC[1]
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root has every right
    assert main(["run", str(script), "--lowbit-comm-json", str(out)]) == 2
    assert f"--lowbit-comm-json {out} cannot be written" in capsys.readouterr().err


def test_splitting_keeps_what_is_not_ours_verbatim():
    flags = (*OPTIONS, "--lowbit-comm-json")
    argv = ["--a", "1", "--lowbit-comm", "int4", "-b", "", "--lowbit-comm-sites=x=y", "--", "--lowbit-comm", "int8"]
    expected = ["--lowbit-comm", "int4", "--lowbit-comm-sites=x=y"], ["--a", "1", "-b", "", *argv[7:]]
    assert split(argv, flags) == expected
    with pytest.raises(ConfigError, match="unknown flag --lowbit-plan"):
        split(["--lowbit-plan"], flags)


LEAVES = """
import os
if os.fork() == 0:
    os._exit(0)  # a child that sends nothing is none of the launcher's business
os.wait()
print("done")
os._exit(0)
"""


def test_a_script_that_leaves_by_os_exit_does_not_pass_by_the_check(tmp_path):
    (tmp_path / "leaves.py").write_text(LEAVES)
    environment = os.environ | {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost"}
    done = subprocess.run(
        [sys.executable, "-m", "megatron_lowbit", "run", *SPEC, str(tmp_path / "leaves.py")],
        capture_output=True, text=True, timeout=100, env=environment,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (2, "done\n")
    assert done.stderr.count("error: nothing was compressed by leaves.py") == 1


def test_under_torchrun(tmp_path, ranks):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    command += ["-m", "megatron_lowbit", "run", *SPEC, str(SCRIPT), *TP2, "--distributed-backend", "gloo"]
    environment = os.environ | {"CUDA_DEVICE_MAX_CONNECTIONS": "1"}
    done = subprocess.run(
        [*command, "--out", str(tmp_path / "out")], capture_output=True, text=True, timeout=150, env=environment
    )
    assert done.returncode == 0 and "paths: one-shot 4" in done.stderr, done.stderr
    for rank in range(2):
        assert json.loads((tmp_path / f"out.{rank}").read_text())["logits"] == ranks[0]["before"]["logits"]
