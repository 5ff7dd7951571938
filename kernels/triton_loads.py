"""Loading tiles so that a thread gets whole blocks, which is what the arithmetic of groups and planes wants.

Triton spreads a load over threads in pieces of 16 bytes, and everything that follows keeps its layout. So a tile is
loaded in parts, one of every block at a time: nothing moves between threads then, and a group of 32 is one thread's.
What cannot be loaded so, as neighbouring threads have to load neighbouring values, moves once, by `settled`.

All this is about speed alone. Compiled for sm_90 (Triton 3.9, 2026-11-21), int4 is encoded by 21 instructions for a
value where one load for the tile would make it 30; with outliers, whose gathered values are settled, by 33 and not 51.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .triton_tiles import block_lengths, block_places, from_bf16_bits


@triton.jit
def load_tile(
    x, pitch, features, blocks_per_row, start, low, high, APART: tl.constexpr, RAGGED: tl.constexpr, NB: tl.constexpr
):
    """The tile's values of x, fp32 [32, NB], 0 where there are none."""
    length = block_lengths(start, features, blocks_per_row, low, high, RAGGED, NB)
    place = block_places(start, pitch, blocks_per_row, APART, NB)
    if x.dtype.element_ty == tl.bfloat16:
        values = from_bf16_bits(load_parts(x.to(tl.pointer_type(tl.uint16)) + place, length, 8, RAGGED))
    elif x.dtype.element_ty == tl.float16:
        values = load_parts(x + place, length, 8, RAGGED).to(tl.float32)
    else:
        values = load_parts(x + place, length, 4, RAGGED)
    return values


@triton.jit
def load_parts(pointer, length, step, RAGGED: tl.constexpr):
    """Blocks that begin at `pointer` [NB], in parts of 16 bytes, `step` values apart -> [32, NB].

    length: `block_lengths`; blocks are whole or not there unless RAGGED is 1.
    """
    if pointer.dtype.element_ty == tl.float32:
        first = _load_four(pointer, length, step, 0, 4, RAGGED)
        second = _load_four(pointer + 4 * step, length, step, 16, 4, RAGGED)
        values = tl.reshape(tl.permute(tl.join(first, second), (2, 0, 1)), (32, pointer.shape[0]))
    else:
        values = _load_four(pointer, length, step, 0, 8, RAGGED)
    return values


@triton.jit
def _load_four(pointer, length, step, FIRST: tl.constexpr, N: tl.constexpr, RAGGED: tl.constexpr):
    """Four parts of N values each, the first of which is value FIRST of its block: [4 * N, NB]."""
    i, left = tl.arange(0, N)[:, None], length[None, :] - FIRST
    pointer, live = pointer[None, :] + i, (length > 0)[None, :]
    a = tl.load(pointer, mask=i < left if RAGGED == 1 else live, other=0)
    b = tl.load(pointer + step, mask=i + N < left if RAGGED == 1 else live, other=0)
    c = tl.load(pointer + 2 * step, mask=i + 2 * N < left if RAGGED == 1 else live, other=0)
    d = tl.load(pointer + 3 * step, mask=i + 3 * N < left if RAGGED == 1 else live, other=0)
    return tl.reshape(tl.permute(tl.join(tl.join(a, c), tl.join(b, d)), (2, 3, 0, 1)), (4 * N, length.shape[0]))


@triton.jit
def hidden_zero(x):
    """Anything of 32 bits -> 0, uint32. Triton does not know that, the compiler behind it does and leaves x out.

    What is combined with it looks to Triton as if it depended on x: on its layout, or without any order.
    """
    return (x.to(tl.uint32, bitcast=True) >> 16) >> 16


@triton.jit
def settled(x, pointer, NB: tl.constexpr):
    """x fp32 [32, NB], dealt out with a block to a thread from here on, however it was loaded. pointer: to any fp32.

    Triton goes by the last load of what comes together, in this case one that deals out blocks singly.
    """
    zero = hidden_zero(tl.load(pointer + tl.zeros([1, NB], tl.int32)))
    return (x.to(tl.uint32, bitcast=True) | zero).to(tl.float32, bitcast=True)


@triton.jit
def whole_words(words, NB: tl.constexpr):
    """words uint32 [8, NB] themselves, but each block's in one thread: `split` wants to find halves together."""
    first, second = tl.split(tl.permute(tl.reshape(words, (2, 4, NB)), (1, 2, 0)))
    both = tl.join(first.to(tl.float32, bitcast=True), second.to(tl.float32, bitcast=True))  # or Triton omits all this
    return tl.reshape(tl.permute(both, (2, 0, 1)), (8, NB)).to(tl.uint32, bitcast=True)
