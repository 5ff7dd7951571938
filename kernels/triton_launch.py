"""Launchers of the kernels in triton_kernels.py: one per operation, for any codec.

A launcher turns tensors into a `Launch`: a kernel, its grid and its arguments. Calling that runs it, on the current
stream of the tensors' device; it waits for nothing and allocates nothing (but for scratch space, 4 bytes a value, where
trellis encodes), so that it can be captured in a CUDA graph.
With TRITON_INTERPRET=1, set before Triton is imported, it runs on CPU tensors. kernels/triton_ahead.py compiles
launches for GPUs that are not there.

Anything that a kernel would misread or overrun is refused: tensors and wires are contiguous, wires begin at multiples
of 16 bytes and are long enough.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from math import gcd
from typing import TYPE_CHECKING

import torch
import triton

from ..codecs.base import LONGEST_ROW
from ..errors import ConfigError
from . import triton_kernels as kernels

if TYPE_CHECKING:
    from ..codecs.base import Codec, Kernel

# Blocks of 32 values in a tile and warps that share it: a thread has a block. By instructions and registers of the
# compiled kernels (sm_90, Triton 3.9, 2026-11-21); not yet tuned on a GPU.
TILE, WARPS = 128, 4


@dataclass(frozen=True)
class Launch:
    """A kernel with all it is called with. constants: known while compiling."""

    kernel: triton.JITFunction
    grid: tuple[int, int]
    arguments: dict[str, torch.Tensor | int]
    constants: dict[str, int | str]
    warps: int

    def __call__(self) -> None:
        device = next(iter(self.arguments.values())).device
        with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
            self.kernel[self.grid](**self.arguments, **self.constants, **self.options)

    @property
    def options(self) -> dict[str, int]:
        """For Triton's compiler. Fused multiply-adds would round once where the definition rounds twice."""
        return {"num_warps": self.warps, "enable_fp_fusion": False}


@dataclass(frozen=True)
class Geometry:
    """How a message is cut into tiles. `ragged`, `rowwise`, `blocks`: RAGGED, ROWWISE, NB of triton_kernels.py.

    threads: for a block.
    """

    features: int
    blocks_per_row: int
    ragged: int
    rowwise: int
    blocks: int
    threads: int

    def grid(self, rows: int, world: int) -> tuple[int, int]:
        """rows: of the largest shard."""
        if self.rowwise:
            return rows, world
        blocks = triton.cdiv(rows * self.features, 32) if self.run else rows * self.blocks_per_row
        return triton.cdiv(blocks, self.blocks), world

    @property
    def run(self) -> bool:
        """Whether a message is one run of values, and ends anywhere."""
        return 1 < self.ragged < 32

    @property
    def warps(self) -> int:
        least, most = (1, 16) if self.rowwise else (WARPS, 8)
        return max(least, min(most, self.blocks * self.threads // 32))

    @property
    def constants(self) -> dict[str, int]:
        return {"RAGGED": self.ragged, "ROWWISE": self.rowwise, "NB": self.blocks}


def geometry(features: int, *codecs: Kernel, rowwise: bool = False) -> Geometry:
    """For rows of `features` ordinary values that all of `codecs` read or write, whole rows if `rowwise`."""
    unit = max(codec.group for codec in codecs)
    blocks_per_row = max(1, triton.cdiv(features, unit or 32)) * (unit or 32) // 32  # outliers alone want a block too
    if not unit:
        ragged = gcd(features, 8)
    else:
        ragged = 0 if features and features % unit == 0 else 32 if features % 32 == 0 else 1
    # Single values are many addresses, all under way at once: more threads for a block, or registers will not do.
    planes = max(codec.bits.bit_count() for codec in codecs)
    threads = 1 if ragged in (0, 32) else 4 if planes == 3 else 2
    group = max(codec.group * codec.together // 32 for codec in codecs)
    if not rowwise:
        return Geometry(features, blocks_per_row, ragged, 0, max(TILE // threads, group), threads)
    blocks = triton.next_power_of_2(blocks_per_row)
    if not any(codec.spoils for codec in codecs):
        blocks = min(blocks, LONGEST_ROW // (64 if ragged else 32))  # masks take registers too
    return Geometry(features, blocks_per_row, ragged, 1 + (blocks < blocks_per_row), blocks, threads)


def encode(
    codec: Codec, x: torch.Tensor, wires: torch.Tensor, world: int = 1, sizes: tuple[int, int] = (0, 0)
) -> Launch:
    """x [rows, features] -> `world` wires, rank r's being that of the rows from rows * r // world on.

    sizes: how far apart wires are, for a shard of rows // world rows and for one with a row more.
    """
    rows, features = x.shape
    ordinary, count = _parts(codec, features)
    g = geometry(ordinary, codec.kernel, rowwise=codec.kernel.rowwise)
    grid = g.grid(triton.cdiv(rows, world), world)
    return Launch(
        kernels.encode,
        grid,
        {"x": _checked(x), "wires": _room(wires, codec, x.shape, world, sizes), **_tables(codec, x, g),
         "scratch": _scratch(codec, g, grid, x), "sender": codec.sender, "features": ordinary, "pitch": features,
         "blocks_per_row": g.blocks_per_row, **_spread(rows, world, sizes), "count": count,
         **_section(codec, rows, ordinary, world)},
        {**_constants(codec.kernel), **_outliers(codec, count, g), **g.constants},
        g.warps,
    )  # fmt: skip


def reduce(
    codec: Codec, wires: torch.Tensor, out: torch.Tensor, world: int = 1, sizes: tuple[int, int] = (0, 0)
) -> Launch:
    """wires uint8 [n, bytes]: their sum -> out [rows, features]. Cut into shards as by `encode`, each row of wires."""
    rows, features = out.shape
    ordinary, count = _parts(codec, features)
    g = geometry(ordinary, codec.kernel, rowwise=codec.kernel.spoils)
    return Launch(
        kernels.reduce,
        g.grid(triton.cdiv(rows, world), world),
        {"wires": _room(wires, codec, out.shape, world, sizes), "out": _checked(out), **_tables(codec, out, g),
         "sender": _first_sender(codec, wires), "features": ordinary, "pitch": features,
         "blocks_per_row": g.blocks_per_row, **_spread(rows, world, sizes), "count": count,
         **_section(codec, rows, ordinary, world), "stride": wires.stride(0)},
        {**_constants(codec.kernel), **_outliers(codec, count, g), **g.constants, "COUNT": len(wires)},
        g.warps,
    )  # fmt: skip


def reduce_encode(
    source: Codec, wires: torch.Tensor, target: Codec, shape: tuple[int, int], out: torch.Tensor
) -> Launch:
    """wires uint8 [n, bytes] of `source`, of tensors of one shape -> out: the wire in `target` of their fp32 sum.

    Of codecs with outliers, both have the same, and both are `inner`, so that rows are split on either side; else
    `reduce` to fp32, then `encode`.
    """
    if not source.kernel.meets(target.kernel) or source.outliers != target.outliers:
        raise ConfigError(
            f"{source.spec} and {target.spec} do not split rows alike, so no kernel can reduce one and encode the "
            "other: pass the inner codecs of two with the same outliers, or reduce to fp32 and encode that"
        )
    rows, features = shape
    ordinary, count = _parts(source, features)
    g = geometry(ordinary, source.kernel, target.kernel, rowwise=target.kernel.rowwise or source.kernel.spoils)
    grid = g.grid(rows, 1)
    return Launch(
        kernels.reduce_encode,
        grid,
        {"wires": _room(wires, source, shape), "summed": _room(out, target, shape), "table": source.table(out.device),
         "target_table": target.table(out.device), "scratch": _scratch(target, g, grid, out),
         "sender": _first_sender(source, wires),
         "target_sender": target.sender, "rows": rows, "features": ordinary, "blocks_per_row": g.blocks_per_row,
         "stride": wires.stride(0), "count": count, "section": _section(source, rows, ordinary)["section"],
         "target_section": _section(target, rows, ordinary)["section"]},
        {**_constants(source.kernel), **{f"TO_{name}": value for name, value in _constants(target.kernel).items()},
         **_outliers(source, count, g), **g.constants, "COUNT": len(wires)},
        g.warps,
    )  # fmt: skip


def reduce_add_rmsnorm(
    codec: Codec,
    wires: torch.Tensor,
    rows: int,
    world: int,
    slot: int,
    residual: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    offset: float,
    normed: torch.Tensor,
    summed: torch.Tensor,
) -> Launch:
    """wires uint8 [n, bytes], to be summed, each `world` shards `slot` bytes apart of a message of `rows` rows.

    residual, normed, summed: [tokens, features]; a token is one row of the message or several.
    """
    tokens, features = residual.shape
    units = rows // tokens
    g = geometry(features // units, codec.kernel)
    blocks = triton.next_power_of_2(triton.cdiv(features, 32) if g.run else units * g.blocks_per_row)
    return Launch(
        kernels.reduce_add_rmsnorm,
        (tokens, 1),
        {"wires": _room(wires, codec, (rows, features // units), world, (slot, slot)), "residual": _checked(residual),
         "weight": _checked(weight), "normed": _checked(normed), "summed": _checked(summed),
         "table": codec.table(wires.device), "features": features, "units": units,
         "quotient": rows // world, "remainder": rows % world, "world": world, "slot": slot, "stride": wires.stride(0),
         "blocks_per_unit": g.blocks_per_row, "eps": eps, "offset": offset},
        {**_constants(codec.kernel), "RAGGED": g.ragged, "NB": blocks, "COUNT": len(wires)},
        max(WARPS, min(16, blocks // 32)),
    )  # fmt: skip


def _constants(codec: Kernel) -> dict[str, int | str]:
    return {"FAMILY": codec.family, "BITS": codec.bits, "GROUP": codec.group, "FLAG": codec.flag}


def _parts(codec: Codec, features: int) -> tuple[int, int]:
    """(ordinary features, outliers) of a row."""
    count = codec.count(features) if codec.kernel.outliers else 0
    return features - count, count


def _outliers(codec: Codec, count: int, g: Geometry) -> dict[str, int]:
    return {"OUTLIERS": codec.kernel.outliers, "SHARE": triton.next_power_of_2(triton.cdiv(count, g.blocks_per_row))}


def _section(codec: Codec, rows: int, ordinary: int, world: int = 1) -> dict[str, int]:
    """Where outliers begin in the wire of rows // world rows, and how much further on in that of a row more."""
    if not codec.kernel.outliers:
        return {"section": 0, "more": 0}
    section, longer = (codec.base.wire_nbytes((n, ordinary)) for n in (rows // world, rows // world + 1))
    return {"section": section, "more": longer - section}


def _first_sender(codec: Codec, wires: torch.Tensor) -> int:
    """Several wires are those of ranks 0, 1, ...; a single one is that of the rank whose codec this is."""
    return codec.sender if len(wires) == 1 else 0


def _tables(codec: Codec, x: torch.Tensor, g: Geometry) -> dict[str, torch.Tensor]:
    index = codec.index(x.device, g.blocks_per_row * 32, g.blocks * 32) if codec.kernel.outliers == 1 else None
    return {"table": codec.table(x.device), "index": codec.table(x.device) if index is None else index}


def _scratch(codec: Codec, g: Geometry, grid: tuple[int, int], x: torch.Tensor) -> torch.Tensor:
    """int32, a tile's worth for each program of a trellis encoder; nobody else needs any."""
    size = grid[0] * grid[1] * g.blocks * 32 if codec.kernel.family == "trellis" else 4
    return torch.empty(size, dtype=torch.int32, device=x.device)


def _spread(rows: int, world: int, sizes: tuple[int, int]) -> dict[str, int]:
    quotient, remainder = divmod(rows, world)
    return {
        "quotient": quotient,
        "remainder": remainder,
        "world": world,
        "small": sizes[0],
        "extra": sizes[1] - sizes[0],
    }


def _checked(x: torch.Tensor) -> torch.Tensor:
    """Raise ConfigError for what kernels would misread."""
    if x.dtype not in (torch.bfloat16, torch.float16, torch.float32) or not x.is_contiguous():
        raise ConfigError(
            f"a kernel got {tuple(x.shape)} of {x.dtype} with strides {x.stride()}: pass bf16, fp16 or fp32, contiguous"
        )
    return x


def _room(wires: torch.Tensor, codec: Codec, shape: tuple[int, int], world: int = 1, sizes=(0, 0)) -> torch.Tensor:
    """Raise ConfigError unless every row of `wires` (or all of it, if it has one dimension) holds the shards' wires."""
    rows, features = shape
    codec.check(features, len(wires) if wires.dim() > 1 else 1)
    lengths = [codec.wire_nbytes((rows // world, features)), codec.wire_nbytes((triton.cdiv(rows, world), features))]
    small, large = sizes if world > 1 else lengths
    needed = small * (world - rows % world) + large * (rows % world) if world > 1 else lengths[0]
    if small < lengths[0] or large < lengths[1] or wires.shape[-1] < needed:
        raise ConfigError(
            f"{wires.shape[-1]} bytes for {world} wires of {small} or {large} bytes: {codec.spec} needs "
            f"{lengths[0]} or {lengths[1]} for {world} shards of {tuple(shape)}; allocate codec.wire_nbytes(shape)"
        )
    apart = wires.stride(0) if wires.dim() > 1 and len(wires) > 1 else 0
    if wires.dtype != torch.uint8 or wires.stride(-1) != 1 or wires.data_ptr() % 16 or apart % 16 or small % 16:
        raise ConfigError(
            f"wires of {wires.dtype} at address {wires.data_ptr():#x}, {apart} bytes apart: kernels need uint8 at "
            "multiples of 16; copy them to a buffer of their own"
        )
    return wires
