"""Megatron-LM's own inference scripts, unedited, through the launcher, with the bundled model as their checkpoint.

    MEGATRON_LM=~/Megatron-LM PYTHONPATH=~/packages make test PYTEST_ARGS="-m slow tests/cli/test_run_megatron_lm.py"

MEGATRON_LM holds the paths of checkouts of one or more releases, with ":" between them: Megatron-LM is on no package
index. Its scripts want packages that this one does without; the reason of a skip names those that are missing.
"""

import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from importlib.util import find_spec
from pathlib import Path

import pytest

from megatron_lowbit.cli.files import BUNDLED

ROOT = Path(__file__).parents[2]
CHECKOUTS = [Path(folder) for folder in os.environ.get("MEGATRON_LM", "").split(os.pathsep) if folder]
NEEDED = ("einops", "flask", "flask_restful", "regex", "sentencepiece", "simpy", "six")
MISSING = [name for name in NEEDED if find_spec(name) is None]
SITES = [f"layers.{layer}.{kind}" for layer in range(6) for kind in ("attention", "mlp")]
PROMPTS = (BUNDLED / "prompts.txt").read_text().splitlines()
TOKENS = 24
TEXTS = r"^\d/\d \[\d\]\. (.*?) \.\.\. (.*)$"  # how the static script shows them
# What a machine without CUDA needs beyond the flags that `convert` writes.
ON_CPU = (
    "--distributed-backend gloo --use-cpu-initialization --inference-rng-tracker --no-masked-softmax-fusion "
    "--no-rope-fusion --no-gradient-accumulation-fusion --micro-batch-size 1 --inference-max-seq-length 128"
).split()
GREEDY = ["--temperature", "1.0", "--top_k", "1", "--num-tokens-to-generate", str(TOKENS)]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(not CHECKOUTS, reason="MEGATRON_LM names no checkout of Megatron-LM"),
    pytest.mark.skipif(bool(MISSING), reason=f"Megatron-LM's scripts need {', '.join(MISSING)}"),
]
every_checkout = pytest.mark.parametrize("checkout", CHECKOUTS, ids=[folder.name for folder in CHECKOUTS])


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """The flags that load the bundled model, as `convert` writes it for two ranks."""
    folder = tmp_path_factory.mktemp("megatron") / "bundled"
    _python("convert", "--hf", str(BUNDLED / "model"), "--megatron", str(folder), "--tp", "2", "--dtype", "fp32")
    return (folder / "megatron_args.txt").read_text().split()


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    """What this package's own engine writes, exactly: it knows neither the scripts nor the launcher."""
    file = tmp_path_factory.mktemp("engine") / "exact.json"
    _python(
        "generate", "--comm", "exact", "--tp", "1", "--dtype", "fp32", "--max-new-tokens", str(TOKENS),
        "--prompts", str(BUNDLED / "prompts.txt"), "--json", str(file),
    )  # fmt: skip
    return json.loads(file.read_text())["exact"]["texts"]


def _python(*arguments):
    done = subprocess.run(
        [sys.executable, "-m", "megatron_lowbit", *arguments], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr


def _command(checkout, script, spec, stats, *arguments):
    """(command, environment) of a script on two ranks through the launcher."""
    if not (checkout / script).is_file():
        pytest.skip(f"{checkout.name} has no {script}")
    try:
        compile((checkout / script).read_bytes(), script, "exec")
    except SyntaxError as error:
        pytest.skip(f"{script} of {checkout.name} is not for this Python: {error}")
    paths = [str(ROOT), str(ROOT / "tests" / "flash_attention"), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"CUDA_DEVICE_MAX_CONNECTIONS": "1", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    environment |= {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    command += ["-m", "megatron_lowbit", "run", str(checkout / script)]
    command += ["--lowbit-comm-json", str(stats)]
    command += ["--lowbit-comm", spec, "--lowbit-comm-min-bytes", "0"] if spec else []
    return [*command, *ON_CPU, *GREEDY, *arguments], environment


def _run(*arguments):
    return _run_command(*_command(*arguments))


def _run_command(command, environment):
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def _paths(stats, path):
    """Calls of each site, all of which went this way."""
    sites = json.loads(stats.read_text())["stats"]
    assert sorted(sites) == SITES
    for site in sites.values():
        assert site["paths"] == {path: site["calls"]} and not site["fallbacks"]
    return [sites[name]["calls"] for name in SITES]


@every_checkout
def test_the_static_engines_text_is_that_of_the_exact_run(checkout, model, expected, tmp_path):
    texts, calls = {}, {}
    for spec, path in (("exact", "exact"), ("int8:g128", "one-shot")):
        stats = tmp_path / f"{path}.json"
        script = "examples/inference/gpt/gpt_static_inference.py"
        shown = _run(checkout, script, spec, stats, *model, "--prompts", *PROMPTS)
        found = dict(re.findall(TEXTS, shown, re.MULTILINE))
        texts[path] = [found[prompt].replace("\\n", "\n") for prompt in PROMPTS]
        calls[path] = _paths(stats, path)
    assert texts["one-shot"] == texts["exact"]
    # 0.12 goes on with a short prompt for as long as a longer one beside it runs.
    assert all(text.startswith(first) for text, first in zip(texts["exact"], expected, strict=True))
    assert calls["one-shot"] == calls["exact"] and len(set(calls["exact"])) == 1 and calls["exact"][0] >= TOKENS


@every_checkout
def test_a_rewritten_spec_compresses_without_any_flag(checkout, model, expected, tmp_path):
    """examples/megatron_spec.py. The launcher is given no flag: it only answers what the script asks of CUDA."""
    script, stats = "examples/inference/gpt/gpt_static_inference.py", tmp_path / "stats.json"
    command, environment = _command(checkout, script, None, stats, *model, "--spec", "megatron_spec", "lowbit_layer")
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT / "examples"), environment["PYTHONPATH"]])
    shown = _run_command([*command, "--prompts", *PROMPTS], environment)
    found = dict(re.findall(TEXTS, shown, re.MULTILINE))
    texts = [found[prompt].replace("\\n", "\n") for prompt in PROMPTS]
    assert all(text.startswith(first) for text, first in zip(texts, expected, strict=True))
    assert len(set(_paths(stats, "one-shot"))) == 1


@every_checkout
def test_the_dynamic_engines_text_is_that_of_the_exact_run(checkout, model, expected, tmp_path):
    """With a stand-in for flash-attn, which exists for GPUs only."""
    script = "examples/inference/gpt/gpt_dynamic_inference.py"
    if (checkout / script).is_file() and "from .utils" in (checkout / script).read_text():
        pytest.skip(f"{script} of {checkout.name} runs as a module only, not as a script")
    stats, out = tmp_path / "stats.json", tmp_path / "out.json"
    _run(
        checkout, script, "int8:g128", stats, *model, "--inference-dynamic-batching-buffer-size-gb", "0.05",
        "--output-path", str(out), "--prompts", *PROMPTS,
    )  # fmt: skip
    results = [value for key, value in json.loads(out.read_text()).items() if key.isdecimal()]
    # 0.16 writes the last of the requests only, unless asked otherwise.
    found = {result["input_prompt"]: result["generated_text"] for result in results}
    assert found and all(expected[PROMPTS.index(prompt)] == text for prompt, text in found.items())
    assert len(set(_paths(stats, "one-shot"))) == 1


@every_checkout
def test_the_text_generation_servers_answer_is_that_of_the_exact_run(checkout, model, expected, tmp_path):
    stats, port = tmp_path / "stats.json", 5300 + CHECKOUTS.index(checkout)
    script = "tools/run_text_generation_server.py"
    command, environment = _command(checkout, script, "int8:g128", stats, *model, "--port", str(port))
    with open(tmp_path / "log", "w") as log:
        server = subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)
    try:
        answer = _ask(server, port, {"prompts": PROMPTS[:1], "tokens_to_generate": TOKENS, "top_k": 1})
    finally:
        server.send_signal(signal.SIGINT)
        server.wait(90)
    assert answer["text"] == [PROMPTS[0] + expected[0]], (tmp_path / "log").read_text()[-4000:]
    assert set(_paths(stats, "one-shot")) == {TOKENS}


def _ask(server, port, question):
    request = urllib.request.Request(
        f"http://localhost:{port}/api",
        json.dumps(question).encode(),
        {"Content-Type": "application/json"},
        method="PUT",
    )
    deadline = time.monotonic() + 200
    while server.poll() is None and time.monotonic() < deadline:
        try:
            return json.load(urllib.request.urlopen(request, timeout=150))
        except urllib.error.HTTPError as error:
            return {"text": error.read().decode()}
        except urllib.error.URLError:  # it is still loading
            time.sleep(1)
    return {"text": "no answer"}
