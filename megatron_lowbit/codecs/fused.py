"""Several steps of a collective in one go: what a backend may do in one kernel, and its definition out of single steps.

A message [rows, features] is cut into shards of whole rows: rank r's are the rows from bounds[r] to bounds[r + 1].
Wherever Triton runs and has a kernel for the codec, each function here is one launch; else it is a loop.

RMSNorm (Zhang and Sennrich, 2019) as transformer blocks do it after an all-reduce, defined in fp32:

    h      = dtype(dtype(sum) + residual), the new residual
    scale  = 1 / sqrt(mean(h * h) + eps), IEEE division and root; the mean in the order of `_squares`
    normed = dtype((h * scale) * (weight + offset)), offset 1 where weights are stored around zero (Gemma, apex's 1p)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch

from ..errors import ConfigError
from . import backend, ops
from .base import DTYPES, Codec, quotient, rounded

BLOCK = 32


def encode_shards(codec: Codec, x: torch.Tensor, bounds: Sequence[int], wires: torch.Tensor) -> None:
    """x [rows, features] contiguous -> the shards' wires, one behind the other, each of its own length."""
    rows, world = [b - a for a, b in pairwise(bounds)], len(bounds) - 1
    sizes = [codec.wire_nbytes((n, x.shape[1])) for n in rows]
    if not sum(sizes):
        return
    if backend.fuses(codec, x.device) and _even(bounds):
        return ops.encode(codec, x, wires, world, min(sizes), max(sizes))
    for part, wire in zip(x.split(rows), wires.split(sizes)):
        if wire.numel():
            codec.encode_rows(part, wire)


def decode_shards(codec: Codec, wires: torch.Tensor, bounds: Sequence[int], out: torch.Tensor) -> None:
    """wires uint8 [world, slot], each holding its shard's wire at its start -> out [rows, features] contiguous."""
    rows, world = [b - a for a, b in pairwise(bounds)], len(bounds) - 1
    if backend.fuses(codec, out.device) and _even(bounds) and _one_codec(codec, world):
        return ops.reduce(codec, wires.view(1, -1), out, world, wires.stride(0), wires.stride(0))
    for rank, (part, wire) in enumerate(zip(out.split(rows), wires)):
        if size := codec.wire_nbytes(part.shape):
            codec.sent_by(rank).reduce_rows(wire[:size].view(1, size), part)


def reduce_encode(
    source: Codec,
    wires: torch.Tensor,
    target: Codec,
    shape: tuple[int, int],
    out: torch.Tensor,
    scratch: Callable[[], torch.Tensor],
) -> None:
    """wires uint8 [n, bytes] in `source`, of tensors of one shape -> the wire in `target` of their fp32 sum.

    scratch: gives a place for that sum, fp32 [shape], where it has to be written.
    """
    if source.transform == target.transform:  # a transform that both legs share stays on in between
        source, target = source.inner, target.inner
    if backend.fuses(source, out.device, target) and source.kernel.meets(target.kernel):
        return ops.reduce_encode(source, wires, target, shape, out)
    total = scratch()
    source.reduce_rows(wires, total)
    target.encode_rows(total, out)


def reduce_encode_shards(
    source: Codec,
    wires: torch.Tensor,
    target: Codec,
    bounds: Sequence[int],
    out: torch.Tensor,
    scratch: torch.Tensor,
) -> None:
    """As `reduce_encode`, to the wires of the sum's shards, one behind the other as `encode_shards` makes them.

    scratch: fp32 of the tensors' shape.
    """
    if source.transform == target.transform:
        source, target = source.inner, target.inner
    source.reduce_rows(wires, scratch)
    encode_shards(target, scratch, bounds, out)


def reduce_add_rmsnorm(
    codec: Codec,
    wires: torch.Tensor,
    bounds: Sequence[int] | None,
    residual: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    offset: float,
    normed: torch.Tensor,
    summed: torch.Tensor,
) -> None:
    """wires + residual [rows, features] -> normed and summed, the new residual, both of its shape and dtype.

    bounds: those of the shards (of the message, maybe seen with other rows) that wires, uint8 [world, slot], hold;
    None: wires, uint8 [ranks, bytes], are one message of each rank, to be summed.
    """
    rows, features = residual.shape
    if backend.fuses(codec, residual.device) and codec.kernel.fits(features):
        if bounds is None:
            return ops.reduce_add_rmsnorm(codec, wires, rows, 1, 0, residual, weight, eps, offset, normed, summed)
        if _even(bounds) and _one_codec(codec, len(wires)):
            slot = wires.stride(0)
            return ops.reduce_add_rmsnorm(
                codec, wires.view(1, -1), bounds[-1], len(wires), slot, residual, weight, eps, offset, normed, summed
            )
    if bounds is None:
        codec.reduce_rows(wires, summed)
    else:
        decode_shards(codec, wires, bounds, summed.view(bounds[-1], -1))
    add_rmsnorm(summed, residual, weight, eps, offset, normed)


def add_rmsnorm(
    summed: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float, offset: float, normed: torch.Tensor
) -> None:
    """The definition: summed [rows, features], rounded already, becomes the new residual; normed is written."""
    h = rounded(summed.float() + residual.float(), residual.dtype)
    summed.copy_(h)
    h = h.float()
    mean = quotient(_squares(h), h.shape[-1])
    scale = 1.0 / (mean + torch.full_like(mean, eps)).double().sqrt().float()  # MKL's fp32 root is not IEEE's
    normed.copy_(rounded((h * scale) * (weight.float() + offset), normed.dtype))


def check_norm(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor) -> None:
    """Raise ConfigError unless residual is like x and weight has a number for each of its features."""
    if residual.shape != x.shape or residual.dtype != x.dtype or residual.device != x.device:
        raise ConfigError(
            f"residual is {tuple(residual.shape)} of {residual.dtype} on {residual.device}, x {tuple(x.shape)} of "
            f"{x.dtype} on {x.device}: pass tensors that are alike"
        )
    if weight.shape != x.shape[-1:] or weight.dtype not in DTYPES or weight.device != x.device:
        raise ConfigError(
            f"weight is {tuple(weight.shape)} of {weight.dtype} on {weight.device}: pass one bf16, fp16 or fp32 number "
            f"for each of the {x.shape[-1]} features, on {x.device}"
        )


def _squares(h: torch.Tensor) -> torch.Tensor:
    """Sum of squares of each row, [rows, 1]: blocks of 32, their halves folded together, then the blocks' halves."""
    blocks = 1 << (-(-h.shape[1] // BLOCK) - 1).bit_length()
    x = torch.nn.functional.pad(h * h, (0, blocks * BLOCK - h.shape[1])).view(len(h), blocks, BLOCK)
    while x.shape[2] > 1:
        x = x[:, :, : x.shape[2] // 2] + x[:, :, x.shape[2] // 2 :]
    x = x.squeeze(2)
    while x.shape[1] > 1:
        x = x[:, : x.shape[1] // 2] + x[:, x.shape[1] // 2 :]
    return x


def _even(bounds: Sequence[int]) -> bool:
    """Whether shards are cut as kernels think they are."""
    world = len(bounds) - 1
    return all(bound == bounds[-1] * rank // world for rank, bound in enumerate(bounds))


def _one_codec(codec: Codec, world: int) -> bool:
    return all(codec.sent_by(rank) is codec for rank in range(world))
