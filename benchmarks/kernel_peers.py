"""Other people's quantizers on the same job, where they can be had. Only DeepSpeed comes with an extra of this project.

    deepspeed     swizzle_quant, dequantize, quantized_reduction (csrc/quantization): int4 and int8, symmetric, fp16 in
                  and out, which they take for granted. Compiled here, with DeepSpeed's own flags, from the sources that
                  its package carries; needs nvcc. With the spec's groups, and as `deepspeed-own` with those that
                  ZeRO++ would choose (coalesced_collectives.py).
    torchao       fp8_blockwise_act_quant: fp8 with an fp32 scale per 128 values
    transformer-engine    Float8BlockQuantizer, one-dimensional: likewise

A peer's job is its calls, what one of them reads and writes, and a check: the greatest error over the greatest value.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import torch
from kernel_cases import WORLD, Case

FP8 = 0.07  # half of E4M3's coarsest step, relative to the greatest value, for scales that are powers of two


@dataclass(frozen=True)
class Job:
    """error: of the first call's outcome, relative to the greatest value; bound: what the format allows."""

    calls: list[Callable[[], object]]
    moved: int
    error: Callable[[], float]
    bound: float


def peers(case: Case, spec: str) -> dict[str, Callable[[torch.device, int], Job]]:
    """Those that do the same job as `spec`: name -> what makes it. Nothing is imported yet."""
    found = {}
    if integer := re.fullmatch(r"int([48]):g(\d+)(:sym)?", spec):
        bits, group = int(integer[1]), int(integer[2])
        own = case.rows * case.features // max(case.rows, case.features, WORLD)
        if case.name in ("encode", "decode", "decode_reduce_encode"):
            found["deepspeed"] = lambda *where: _deepspeed(case, bits, group, *where)
            if own >= 128:
                found["deepspeed-own"] = lambda *where: _deepspeed(case, bits, own, *where)
    if spec == "fp8:g128" and case.name == "encode":
        found["torchao"] = lambda *where: _torchao(case, *where)
    if spec == "fp8:g128" and case.name in ("encode", "decode"):
        found["transformer-engine"] = lambda *where: _transformer_engine(case, *where)
    return found


@cache
def deepspeed_module():
    """DeepSpeed's quantizer, compiled. Raises ImportError where it is not to be had."""
    spec = find_spec("deepspeed")
    if spec is None or not spec.origin:
        raise ImportError("deepspeed is not installed")
    if not torch.cuda.is_available():
        raise ImportError("DeepSpeed's quantizer is CUDA only")
    from torch.utils.cpp_extension import load

    folder = Path(spec.origin).parent / "ops" / "csrc"
    names = ("quantize", "quantize_intX", "dequantize", "swizzled_quantize", "quant_reduce")
    sources = [folder / "quantization" / f"{name}.cu" for name in names]
    halves = [f"-U__CUDA_NO_HALF{kind}__" for kind in ("_OPERATORS", "_CONVERSIONS", "2_OPERATORS")]
    os.environ.setdefault("TORCH_CUDA_ARCH_LIST", "{}.{}".format(*torch.cuda.get_device_capability()))
    return load(
        "deepspeed_quantizer",
        [str(path) for path in [folder / "quantization" / "pt_binding.cpp", *sources]],
        extra_include_paths=[str(folder / "includes")],
        extra_cflags=["-O3"],
        extra_cuda_cflags=["-O3", "--use_fast_math", *halves],
    )


def _deepspeed(case: Case, bits: int, group: int, device: torch.device, sets: int) -> Job:
    module = deepspeed_module()
    symmetric, groups = module.Symmetric, case.rows * case.features // group
    parts = _parts(case, device).half()
    bound = 2.0 ** (1 - bits) + 2**-10  # a code's range ends one step before the greatest value
    encode = lambda x: module.swizzle_quant(x, groups, bits, symmetric, 1, 1, WORLD)  # noqa: E731
    decode = lambda codes, scales: module.dequantize(codes, scales, groups, bits, symmetric)  # noqa: E731
    if case.name == "encode":
        inputs = _copies(parts[:1], sets)
        calls = [lambda x=x: encode(x[0]) for x in inputs]
        wire = encode(parts[0])
        error = lambda: _error(decode(*calls[0]()), parts[0])  # noqa: E731
        return Job(calls, parts[0].nbytes + _nbytes(wire), error, bound)
    if case.name == "decode":
        wire = encode(parts[0])
        inputs = [(wire[0].clone(), wire[1].clone()) for _ in range(sets)]
        calls = [lambda wire=wire: decode(*wire) for wire in inputs]
        return Job(calls, parts[0].nbytes + _nbytes(wire), lambda: _error(calls[0](), parts[0]), bound)
    wires = [encode(part) for part in parts]
    codes, scales = (torch.cat([wire[n] for wire in wires]) for n in (0, 1))
    inputs = [(codes.clone(), scales.clone()) for _ in range(sets)]
    calls = [
        lambda wire=wire: module.quantized_reduction(*wire, WORLD * groups, groups, bits, symmetric, WORLD)
        for wire in inputs
    ]
    total = parts.float().sum(0)
    # each summand is off by a step of its own, of which the greatest value of all is the measure
    bound = bound * (1 + WORLD * float(parts.abs().max() / total.abs().max()))
    moved = _nbytes((codes, scales)) * (WORLD + 1) // WORLD
    return Job(calls, moved, lambda: _error(decode(*calls[0]()), total), bound)


def _torchao(case: Case, device: torch.device, sets: int) -> Job:
    from torchao.kernel.blockwise_quantization import fp8_blockwise_act_quant

    x = _parts(case, device)[0]
    calls = [lambda x=x: fp8_blockwise_act_quant(x[0], 128) for x in _copies(x[None], sets)]

    def error() -> float:
        codes, scales = calls[0]()
        return _error(codes.float() * scales.repeat_interleave(128, -1), x)

    return Job(calls, x.nbytes + x.numel() + x.numel() // 128 * 4, error, FP8)


def _transformer_engine(case: Case, device: torch.device, sets: int) -> Job:
    import transformer_engine_torch as tex
    from transformer_engine.pytorch.tensor.float8_blockwise_tensor import Float8BlockQuantizer

    quantizer = Float8BlockQuantizer(tex.DType.kFloat8E4M3, rowwise=True, columnwise=False, block_scaling_dim=1)
    x = _parts(case, device)[0]
    moved = x.nbytes + x.numel() + x.numel() // 128 * 4
    if case.name == "encode":
        calls = [lambda x=x: quantizer(x[0]) for x in _copies(x[None], sets)]
        return Job(calls, moved, lambda: _error(calls[0]().dequantize(), x), FP8)
    wires = [quantizer(x) for _ in range(sets)]
    calls = [lambda wire=wire: wire.dequantize() for wire in wires]
    return Job(calls, moved, lambda: _error(calls[0](), x), FP8)


def _parts(case: Case, device: torch.device) -> torch.Tensor:
    """What every rank has, [WORLD, rows, features] bf16."""
    index = torch.arange(case.rows, device=device) % len(case.small.residual)
    return case.small.parts.to(device)[:, index]


def _copies(x: torch.Tensor, sets: int) -> torch.Tensor:
    return x.expand(sets, *x.shape[-2:])[:, None].contiguous()


def _nbytes(tensors) -> int:
    return sum(x.nbytes for x in tensors)


def _error(found: torch.Tensor, exact: torch.Tensor) -> float:
    difference = (found.view(exact.shape).float() - exact.float()).abs().max() / exact.abs().max()
    return float(difference) if difference == difference else torch.inf
