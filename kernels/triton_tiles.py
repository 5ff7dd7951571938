"""Tiles of values: where they lie in a tensor, and how they are loaded, rounded and stored.

A tile is [32, NB] fp32: NB blocks of 32 neighbouring values of a row, in the order of the wire's planes. Blocks are
counted through the rows of one message; every row is filled up to whole units (the largest group of the codecs at
work), so that no group crosses a row or a tile. A tile begins at block `start` and owns the blocks from `low` to
`high`; the others are masked at every load and store.

Blocks are the last axis because Triton spreads that over the threads of a warp where no load says otherwise: a thread
then has whole blocks, and neither codes nor extremes of 32 values move between threads.

RAGGED: 0 where rows are whole units, so that the message is one run of values and (rows, features) is (1, all of them);
else how many values a row is a multiple of: 32 where it may end within a unit, though with a whole block, so that a
mask for each block will do; 1 where it may end anywhere and there is a mask for each value. 2, 4 or 8 where there are
no units, which is so for passthrough alone: the message is one run again, and ends after any multiple of that many.

Offsets are 64 bits wide wherever they count through a message. Rounding is done in integers: the interpreter truncates
to bf16, processors make NaNs of different bits, and sm_80 has no fp8.
"""

from __future__ import annotations

import re

import triton
import triton.language as tl


@triton.jit
def align(nbytes):
    """The next multiple of 16."""
    return (nbytes + 15) // 16 * 16


_COMPILED = tl.constexpr(isinstance(align, triton.JITFunction))  # and not interpreted
# Before 3.6, compiled code takes subnormal operands and results of these two operations for 0.
_FLUSHES = tl.constexpr(tuple(int(part) for part in re.findall(r"\d+", triton.__version__)[:2]) < (3, 6) and _COMPILED)


@triton.jit
def div_rn(x, y):
    """fp32 x / y, an IEEE division; tensors of one shape, or scalars."""
    if _FLUSHES:
        return tl.inline_asm_elementwise("div.rn.f32 $0, $1, $2;", "=f,f,f", [x, y], tl.float32, is_pure=True, pack=1)
    else:
        return tl.div_rn(x, y)


@triton.jit
def sqrt_rn(x):
    """fp32 -> its square root, as IEEE has it."""
    if _FLUSHES:
        return tl.inline_asm_elementwise("sqrt.rn.f32 $0, $1;", "=f,f", [x], tl.float32, is_pure=True, pack=1)
    else:
        return tl.sqrt_rn(x)


@triton.jit
def lesser(x, limit):
    """The lesser of two fp32, `limit` if x is NaN. So is tl.minimum on GPUs, but not in interpreters before 3.8."""
    if _COMPILED:
        return tl.minimum(x, limit)
    else:
        return tl.where(x < limit, x, limit)


@triton.jit
def greater(x, limit):
    """The greater of two fp32, `limit` if x is NaN."""
    if _COMPILED:
        return tl.maximum(x, limit)
    else:
        return tl.where(x > limit, x, limit)


@triton.jit
def numbers_of_bytes(words, NB: tl.constexpr):
    """Words uint32 [8, NB] -> the number that each of their bytes is, lowest first: fp32 [32, NB].

    As 2**23 + byte, whose bits are 0x4B0000 and the byte: one instruction on GPUs, where a shift and two masks would be
    three.
    """
    byte = tl.arange(0, 4).to(tl.uint32)[None, :, None]
    words = words[:, None, :]
    if _COMPILED:
        words, byte = tl.broadcast(words, byte)
        bits = tl.inline_asm_elementwise(
            "prmt.b32 $0, $1, 0x4B000000, $2;", "=r,r,r", [words, byte + 0x7440], tl.uint32, is_pure=True, pack=1
        )  # fmt: skip
    else:
        bits = ((words >> (8 * byte)) & 0xFF) | 0x4B000000
    return tl.reshape(bits.to(tl.float32, bitcast=True) - 8388608.0, (32, NB))


@triton.jit
def live_blocks(start, low, high, NB: tl.constexpr):
    """Which of the tile's blocks are its own: bool [NB]."""
    block = start + tl.arange(0, NB)
    return (block >= low) & (block < high)


@triton.jit
def live_groups(start, low, high, GROUP: tl.constexpr, NB: tl.constexpr):
    """Which of the tile's groups are its own: bool [NB * 32 / GROUP]."""
    block = start + tl.arange(0, NB * 32 // GROUP) * (GROUP // 32)
    return (block >= low) & (block < high)


@triton.jit
def row_and_column(start, blocks_per_row, NB: tl.constexpr):
    """Row, int64, and first column, int32, of every block: [NB] each."""
    block = start + tl.arange(0, NB)
    return (block // blocks_per_row).to(tl.int64), (block % blocks_per_row).to(tl.int32) * 32


@triton.jit
def group_numbers(start, features, blocks_per_row, GROUP: tl.constexpr, RAGGED: tl.constexpr, NB: tl.constexpr):
    """For each of the tile's groups: its number on the wire, int64, and whether its row has it: [NB * 32 / GROUP]."""
    here = tl.arange(0, NB * 32 // GROUP)
    if RAGGED:
        row = ((start + here * (GROUP // 32)) // blocks_per_row).to(tl.int64)
        column = (start + here * (GROUP // 32)) % blocks_per_row * 32
        return row * ((features + GROUP - 1) // GROUP) + column // GROUP, column < features
    return (start // (GROUP // 32)).to(tl.int64) + here, here >= 0


@triton.jit
def block_lengths(start, features, blocks_per_row, low, high, RAGGED: tl.constexpr, NB: tl.constexpr):
    """Values from each block of the tile to the end of its row, int32 [NB]; 0 or less: it is not there at all."""
    live = live_blocks(start, low, high, NB)
    if RAGGED:
        _, column = row_and_column(start, blocks_per_row, NB)
        return tl.where(live, features - column, 0)
    return tl.where(live, 32, 0)


@triton.jit
def inside(start, features, blocks_per_row, low, high, RAGGED: tl.constexpr, NB: tl.constexpr):
    """Which values of the tile there are: bool [32, NB]."""
    i = tl.arange(0, 32)[:, None]
    if 1 < RAGGED and RAGGED < 32:
        here = tl.minimum(features - start.to(tl.int64) * 32, NB * 32).to(tl.int32) // RAGGED * RAGGED
        live = live_blocks(start, low, high, NB)[None, :]
        return live & (tl.arange(0, NB)[None, :] * 32 + i < here)
    else:
        length = block_lengths(start, features, blocks_per_row, low, high, RAGGED, NB)[None, :]
        return i < length if RAGGED == 1 else (length > 0) & (i >= 0)


@triton.jit
def block_places(start, pitch, blocks_per_row, APART: tl.constexpr, NB: tl.constexpr):
    """Offset of each block in a tensor: int64 [NB]. APART: its rows are `pitch` apart and not one run of values."""
    if APART:
        row, column = row_and_column(start, blocks_per_row, NB)
        place = row * pitch + column
    else:
        place = start.to(tl.int64) * 32 + tl.arange(0, NB) * 32
    return place


@triton.jit
def places(start, pitch, blocks_per_row, APART: tl.constexpr, NB: tl.constexpr):
    """Offset of each value in a tensor: int64 [32, NB]."""
    return block_places(start, pitch, blocks_per_row, APART, NB)[None, :] + tl.arange(0, 32)[:, None]


@triton.jit
def bf16_bits(x):
    """fp32, no NaN -> bits of the nearest bf16, half to even, uint32."""
    bits = x.to(tl.uint32, bitcast=True)
    return (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16


@triton.jit
def from_bf16_bits(bits):
    """Bits of a bf16 in any integer type -> fp32."""
    return (bits.to(tl.uint32) << 16).to(tl.float32, bitcast=True)


@triton.jit
def load_values(pointer, mask):
    """Values of any dtype -> fp32, exactly; 0 where masked."""
    if pointer.dtype.element_ty == tl.bfloat16:
        return from_bf16_bits(tl.load(pointer.to(tl.pointer_type(tl.uint16)), mask=mask, other=0))
    else:
        return tl.load(pointer, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def rounded_bits(x, dtype: tl.constexpr):
    """fp32 -> bits of `dtype` in an unsigned integer of its size, with one kind of NaN."""
    if dtype == tl.bfloat16 and _COMPILED:  # to nearest, half to even, in one instruction, but for its NaN
        bits = tl.where(x == x, x.to(tl.bfloat16).to(tl.uint16, bitcast=True), 0x7FC0).to(tl.uint16)
    elif dtype == tl.bfloat16:
        bits = tl.where(x == x, bf16_bits(x), 0x7FC0).to(tl.uint16)
    elif dtype == tl.float16:
        bits = tl.where(x == x, x.to(tl.float16).to(tl.uint16, bitcast=True), 0x7E00).to(tl.uint16)
    else:
        bits = tl.where(x == x, x.to(tl.uint32, bitcast=True), 0x7FC00000)
    return bits


@triton.jit
def store_rounded(pointer, x, mask):
    """Store fp32 values rounded to the dtype that `pointer` points to, with one kind of NaN."""
    bits = rounded_bits(x, pointer.dtype.element_ty)
    tl.store(pointer.to(tl.pointer_type(bits.dtype), bitcast=True), bits, mask=mask)


@triton.jit
def round_to(x, pointer):
    """fp32 -> what is left of it in the dtype that `pointer` points to, fp32."""
    if pointer.dtype.element_ty == tl.bfloat16:
        x = from_bf16_bits(rounded_bits(x, tl.bfloat16))
    elif pointer.dtype.element_ty == tl.float16:
        x = rounded_bits(x, tl.float16).to(tl.float16, bitcast=True).to(tl.float32)
    return x


@triton.jit
def fold_rows(x, NB: tl.constexpr):
    """fp32 [32, NB] -> sums [NB], halves added to halves."""
    for step in tl.static_range(5):
        x = tl.sum(tl.reshape(x, (2, 16 >> step, NB)), axis=0)
    return tl.reshape(x, (NB,))


@triton.jit
def fold(x, N: tl.constexpr):
    """fp32 [N], N a power of two -> its sum, a scalar, halves added to halves."""
    for step in tl.static_range(16):
        if N >> step > 1:
            x = tl.sum(tl.reshape(x, (2, N >> (step + 1))), axis=0)
    return tl.sum(x, axis=0)


@triton.jit
def rint(x):
    """Round half to even; right for |x| < 2**22."""
    return (x + 12582912.0) - 12582912.0


@triton.jit
def rounded_integer(x):
    """Round half to even, uint32; right for 0 <= x < 2**22, and modulo 2**32 down to -2**22."""
    return (x + 12582912.0).to(tl.uint32, bitcast=True) - 0x4B400000


@triton.jit
def sum_integers(x, axis: tl.constexpr):
    """32-bit integers -> their sum, uint32: in the interpreter `tl.sum` counts in 64 bits, and that of 3.2 hides it."""
    return tl.sum(x, axis=axis).to(tl.int64).to(tl.uint32)


@triton.jit
def ordered(x):
    """fp32 -> int32 that sorts like the values: -NaN, -Inf, ..., -0, +0, ..., Inf, NaN."""
    bits = x.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def from_ordered(key):
    return (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def clear_gap(wire, end):
    """Zero the bytes from `end` to the next multiple of 16."""
    i = tl.arange(0, 16)
    tl.store(wire + end + i, tl.zeros([16], tl.uint8), mask=end + i < align(end))
