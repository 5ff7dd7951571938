"""Uncompressed values on the GPU: tiles of the definition in codecs/passthrough.py.

Layout: the values, row by row. BITS and HALF name the dtype: 32 fp32, 16 bf16, 16 with HALF fp16. Values have nothing
to share, so that a message is one run of them whatever its rows are (RAGGED above 1 in triton_tiles.py). A NaN stays
one, but always the same: which bits one becomes differs between processors.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .triton_tiles import clear_gap, inside, load_values, places, store_rounded


@triton.jit
def encode(
    x, live, wire, rows, features, blocks_per_row, start,
    BITS: tl.constexpr, HALF: tl.constexpr, RAGGED: tl.constexpr, NB: tl.constexpr,
):  # fmt: skip
    """x fp32 [32, NB], of which the values `live` count -> their part of the wire."""
    place = places(start, features, blocks_per_row, RAGGED == 1, NB)
    store_rounded(_values(wire, BITS, HALF) + place, x, live)
    if start == 0:
        clear_gap(wire, rows.to(tl.int64) * features * (BITS // 8))


@triton.jit
def decode(
    wire, features, blocks_per_row, start, low, high,
    BITS: tl.constexpr, HALF: tl.constexpr, RAGGED: tl.constexpr, NB: tl.constexpr,
):  # fmt: skip
    """The tile's part of a wire -> fp32 [32, NB]."""
    live = inside(start, features, blocks_per_row, low, high, RAGGED, NB)
    place = places(start, features, blocks_per_row, RAGGED == 1, NB)
    return load_values(_values(wire, BITS, HALF) + place, live)


@triton.jit
def _values(wire, BITS: tl.constexpr, HALF: tl.constexpr):
    """The wire as values of its dtype."""
    if BITS == 32:
        return wire.to(tl.pointer_type(tl.float32))
    elif HALF:
        return wire.to(tl.pointer_type(tl.float16))
    else:
        return wire.to(tl.pointer_type(tl.bfloat16))
