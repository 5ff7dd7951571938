"""Every Triton kernel, compiled for GPUs that are not there: that it can be, and what becomes of it.

The interpreter takes much that the compiler does not. compile_kernels.py compiles, in processes of its own.
"""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import triton

import megatron_lowbit as lowbit
from megatron_lowbit.codecs.backend import BROKEN_TRITON
from megatron_lowbit.spec import parse_leg
from tests.kernels.compile_kernels import SHAPES
from tests.kernels.test_triton import ALL, launch

ahead = pytest.importorskip("megatron_lowbit.kernels.triton_ahead")

ROOT = Path(__file__).resolve().parents[2]
CAPABILITIES = (80, 90, 100)
OPERATIONS = ("encode", "reduce", "reduce_encode", "reduce_add_rmsnorm")
REGISTERS = {"spike": 216, "gauss": 176, "trellis": 255}  # 128 in other families; 255 where a row may end in a block
SPILLED = 16  # bytes: ptxas now and then keeps two or three registers in memory although there are more
SPILLED_BY_SEVEN = 320  # where a row may end in a block: three planes of single bytes, and spikes in large tiles
RELEASE = tuple(int(part) for part in re.findall(r"\d+", triton.__version__)[:2])
OLD = RELEASE < (3, 9)  # other compilers than the one that the kernels were written with
SPILLED_BY_OLD = 2048  # where a row may end in a block
UNKNOWN = "int4:g32 aligned 999 encode"


def few() -> list[str]:
    """Of each family three specs, for one capability each."""
    families: dict[str, list[str]] = {}
    for spec in ALL:
        families.setdefault(lowbit.codec(spec).kernel.family, []).append(spec)
    cases = []
    for specs in families.values():
        plain = [spec for spec in specs if "outliers" not in spec]
        cases += [
            f"{plain[0]} ragged 80 {' '.join(OPERATIONS[:2])}",
            f"{plain[len(plain) // 2]} aligned 90 {' '.join(OPERATIONS)}",
            f"{specs[-1]} token 100 {' '.join(OPERATIONS[:3])}",
        ]
    return cases


def every() -> list[str]:
    """Every spec in several shapes, for other capabilities each, but for the few."""
    cases = []
    for n, spec in enumerate(ALL):
        shapes = (
            [list(SHAPES)[n % 5]] if "outliers" in spec else ["aligned", "ragged", ("token", "tiny", "long")[n % 3]]
        )
        cases += [
            f"{spec} {shape} {CAPABILITIES[(n + m) % 3]} {' '.join(OPERATIONS)}" for m, shape in enumerate(shapes)
        ]
    return [case for case in cases if case not in few()]


@pytest.fixture(scope="module")
def figures(request):
    """Case -> what became of its kernels. All chosen cases are compiled in turn, while the tests wait for theirs."""
    tests = [item for item in request.session.items if item.path == request.path and hasattr(item, "callspec")]
    cases = [item.callspec.params["case"] for item in tests]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_DISABLE_LINE_INFO": "1"}
    command = [sys.executable, "-m", "tests.kernels.compile_kernels"]
    with subprocess.Popen(command, cwd=ROOT, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        process.stdin.write(json.dumps(cases).encode())
        process.stdin.close()
        found: dict[str, dict] = {}

        def wait_for(case: str) -> dict:
            while case not in found:
                line = process.stdout.readline()
                assert line, f"no result for {cases[len(found)]}: compiling it ended the process"
                found[cases[len(found)]] = json.loads(line)
            return found[case]

        yield wait_for
        if len(found) < len(cases):
            process.terminate()


@pytest.mark.parametrize("case", few() + [pytest.param(case, marks=pytest.mark.slow) for case in every()])
def test_compiles_to_what_it_should(case, figures):
    spec, shape, capability = case.split()[:3]
    if RELEASE == BROKEN_TRITON:
        pytest.skip("this Triton cannot compile all of the kernels, and is refused")
    if int(capability) not in ahead.capabilities():
        pytest.skip(f"this Triton does not know capability {capability}")
    kernels = figures(case)
    assert "error" not in kernels, kernels["error"]
    whole = shape in ("aligned", "token", "long")
    registers = REGISTERS.get(lowbit.codec(spec).kernel.family, 128) if whole and not OLD else 255
    spilled = (
        SPILLED if whole else SPILLED_BY_OLD if OLD else SPILLED_BY_SEVEN if spec.startswith("int7:g128") else SPILLED
    )
    for operation, kernel in kernels.items():
        assert kernel["local"] <= spilled and kernel["registers"] <= registers, (operation, kernel)
        assert kernel["shared"] < 48 << 10, (operation, kernel)
        assert not kernel["inexact"], (operation, kernel)
    if whole:
        leg = parse_leg(spec)
        wire = 16 if leg.bits > 3 else 8  # a block has two words of a plane of two bits
        assert max(kernels["encode"]["loads"]) == 16 and max(kernels["encode"]["stores"]) >= wire, kernels["encode"]
        assert max(kernels["reduce"]["loads"]) >= wire, kernels["reduce"]
        assert leg.calibrated or max(kernels["reduce"]["stores"]) == 16, kernels["reduce"]  # outliers come in between


@pytest.mark.parametrize("case", [UNKNOWN])
def test_unknown_capabilities_are_refused(case, figures):
    assert "does not know capability 999: use one of 5" in figures(case)["error"]


def test_nothing_is_compiled_where_triton_interprets():
    codec, x = lowbit.codec("int4:g32"), torch.zeros(4, 64)
    with pytest.raises(lowbit.ConfigError, match="TRITON_INTERPRET=1 was set.*unset it"):
        ahead.compiled(launch.encode(codec, x, codec.encode(x)), 90)


def test_divisions_are_those_that_no_triton_rounds_otherwise():
    """Triton's own are inexact before 3.6, which neither the interpreter nor a newer compiler shows."""
    for file in (ROOT / "kernels").glob("triton_*.py"):
        own = re.findall(r"tl\.(?:div_rn|sqrt_rn|fdiv|math\.\w+)", file.read_text())
        assert not own or file.name == "triton_tiles.py", (file.name, own)


def test_no_chains_of_booleans():
    """Triton 3.2 compiles `a or b` and not `a or b or c`."""
    for file in (ROOT / "kernels").glob("triton_*.py"):
        functions = [node for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.FunctionDef)]
        jitted = [function for function in functions if any("jit" in ast.unparse(d) for d in function.decorator_list)]
        for node in (node for function in jitted for node in ast.walk(function)):
            assert not isinstance(node, ast.BoolOp) or len(node.values) == 2, (file.name, ast.unparse(node))
