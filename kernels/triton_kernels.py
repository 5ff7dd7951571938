"""What a GPU does with wires: five kernels, each for every codec and any pair of codecs.

    encode                tensor -> one wire for each destination
    reduce                wires of all ranks -> their fp32 sum, in rank order, rounded to the tensor's dtype; or, of one
                          wire for each shard, the whole tensor
    reduce_encode         wires of all ranks -> their fp32 sum -> its wire, nothing written in between
    reduce_add_rmsnorm    as reduce, then + residual, and RMSNorm of that

A codec is four constants: FAMILY, the name of a file here, and what BITS, GROUP and FLAG mean to it. The files'
`encode` and `decode` work on tiles (triton_tiles.py); `_encode` and `_decode` choose between them.

Geometry: a program has a tile of NB blocks, and the second axis of the grid counts destinations or shards. Rank r's
shard is the rows [rows * r // world, rows * (r + 1) // world); its wire lies `small` bytes, and `extra` for each shard
with a row more, behind the one before.

ROWWISE, if what is encoded wants to know the largest value of a row before any code: a program has one row. 1: it is
one tile; 2: it is several, which are gone through twice.

Outlier features (triton_outliers.py) come on top of a family: `features` are then the ordinary ones of a row of
`pitch`, `index` says which, and `count` outliers follow at `section` bytes of a wire, `more` further on for a shard
with a row more.
"""

from __future__ import annotations

import triton
import triton.language as tl

from . import triton_affine as affine
from . import triton_gauss as gauss
from . import triton_microscaling as microscaling
from . import triton_outliers as outliers
from . import triton_passthrough as passthrough
from . import triton_selective as selective
from . import triton_spike as spike
from . import triton_trellis as trellis
from .triton_rotation import group_sizes, unrotate
from .triton_tiles import (
    div_rn,
    fold,
    fold_rows,
    inside,
    live_blocks,
    load_values,
    round_to,
    sqrt_rn,
    store_rounded,
)


@triton.jit
def shard_of(part, quotient, remainder, world, small, extra):
    """First row, int64, rows and byte offset, int64, of a shard; quotient, remainder: of all rows by world."""
    longer = part * remainder // world  # how many shards before it have a row more; 32 bits, as these divisions cost
    own = (part + 1) * remainder // world - longer + quotient
    return part.to(tl.int64) * quotient + longer, own, part.to(tl.int64) * small + longer.to(tl.int64) * extra


@triton.jit
def section_of(wire, own, quotient, section, more):
    """Where the outliers of a shard of `own` rows begin in its wire."""
    return wire + (section + (own - quotient).to(tl.int64) * more)


@triton.jit
def _encode(
    x, live, peak, wire, table, scratch, sender, rows, features, blocks_per_row, start, low, high,
    FAMILY: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr, FLAG: tl.constexpr,
    RAGGED: tl.constexpr, SHARED: tl.constexpr, NB: tl.constexpr,
):  # fmt: skip
    """scratch: for trellis, int32, a tile's worth for each program. SHARED: tiles may begin at any of the codec's
    groups, as rows are tiles, or are filled up to larger groups."""
    if FAMILY == "affine":
        affine.encode(x, live, wire, rows, features, blocks_per_row, start, low, high, BITS, GROUP, FLAG, RAGGED, NB)
    elif FAMILY == "microscaling":
        microscaling.encode(
            x, live, peak, wire, rows, features, blocks_per_row, start, low, high, BITS, GROUP, FLAG, RAGGED, NB
        )
    elif FAMILY == "passthrough":
        passthrough.encode(x, live, wire, rows, features, blocks_per_row, start, BITS, FLAG, RAGGED, NB)
    elif FAMILY == "spike":
        spike.encode(
            x, live, wire, rows, features, blocks_per_row, start, low, high, BITS, GROUP, FLAG, RAGGED, SHARED, NB
        )
    elif FAMILY == "gauss":
        gauss.encode(x, wire, table, rows, features, blocks_per_row, start, low, high, BITS, GROUP, FLAG, RAGGED, NB)
    elif FAMILY == "trellis":
        program = tl.program_id(1).to(tl.int64) * tl.num_programs(0) + tl.program_id(0)
        trellis.encode(
            x, wire, table, scratch + program * (NB * 32), rows, features, blocks_per_row, start, low, high,
            BITS, GROUP, FLAG, RAGGED, NB,
        )  # fmt: skip
    elif FAMILY == "selective":
        selective.encode(
            x, table, sender, wire, rows, features, blocks_per_row, start, low, high, BITS, FLAG, RAGGED, NB
        )


@triton.jit
def _decode(
    wire, table, sender, rows, features, blocks_per_row, start, low, high,
    FAMILY: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr, FLAG: tl.constexpr,
    RAGGED: tl.constexpr, NB: tl.constexpr,
):  # fmt: skip
    """sender: whose wire it is."""
    if FAMILY == "affine":
        values = affine.decode(wire, rows, features, blocks_per_row, start, low, high, BITS, GROUP, FLAG, RAGGED, NB)
    elif FAMILY == "microscaling":
        values = microscaling.decode(
            wire, rows, features, blocks_per_row, start, low, high, BITS, GROUP, FLAG, RAGGED, NB
        )
    elif FAMILY == "passthrough":
        values = passthrough.decode(wire, features, blocks_per_row, start, low, high, BITS, FLAG, RAGGED, NB)
    elif FAMILY == "spike":
        values = spike.decode(wire, rows, features, blocks_per_row, start, low, high, BITS, GROUP, FLAG, RAGGED, NB)
    elif FAMILY == "gauss":
        values = gauss.decode(wire, table, rows, features, blocks_per_row, start, low, high, BITS, GROUP, RAGGED, NB)
    elif FAMILY == "trellis":
        values = trellis.decode(wire, table, rows, features, blocks_per_row, start, low, high, BITS, GROUP, RAGGED, NB)
    elif FAMILY == "selective":
        values = selective.decode(
            wire, table, sender, rows, features, blocks_per_row, start, low, high, BITS, FLAG, RAGGED, NB
        )
    return values


@triton.jit
def _finish(
    total, start, features, blocks_per_row,
    FAMILY: tl.constexpr, GROUP: tl.constexpr, FLAG: tl.constexpr, RAGGED: tl.constexpr, NB: tl.constexpr,
):  # fmt: skip
    """Undo the codec's transform."""
    if (FAMILY == "gauss" or FAMILY == "trellis") and FLAG:
        n = group_sizes(start, features, blocks_per_row, GROUP, RAGGED, NB)
        total = unrotate(total, n, GROUP, RAGGED, NB)
    return total


@triton.jit
def _tile(own, features, blocks_per_row, RAGGED: tl.constexpr, ROWWISE: tl.constexpr, NB: tl.constexpr):
    """This program's first block, the end of its blocks, and the rows and features to count with."""
    start = tl.program_id(0) * (blocks_per_row if ROWWISE else NB)
    high = own * blocks_per_row
    if 1 < RAGGED and RAGGED < 32:
        high = (own.to(tl.int64) * features + 31) // 32
    if ROWWISE:
        high = tl.minimum(high, start + blocks_per_row)
    if RAGGED == 1 or RAGGED == 32:
        r, f = own, features + own * 0
    else:
        r, f = own * 0 + 1, own.to(tl.int64) * features
    return start, high, r, f


@triton.jit
def _rows_before(first, pitch, RAGGED: tl.constexpr):
    """Values in the rows before `first`, of which the compiler is told that they are a multiple of 16 bytes' worth."""
    return first * (pitch // RAGGED * RAGGED if 1 < RAGGED and RAGGED < 32 else pitch)


@triton.jit(do_not_specialize=["sender"])
def encode(
    x, wires, table, scratch, index, sender, quotient, remainder, features, pitch, blocks_per_row, world, small, extra,
    count, section, more,
    FAMILY: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr, FLAG: tl.constexpr, OUTLIERS: tl.constexpr,
    SHARE: tl.constexpr, RAGGED: tl.constexpr, ROWWISE: tl.constexpr, NB: tl.constexpr,
):  # fmt: skip
    """x: rows `pitch` apart. sender: whose wires these will be."""
    first, own, offset = shard_of(tl.program_id(1), quotient, remainder, world, small, extra)
    start, high, r, f = _tile(own, features, blocks_per_row, RAGGED, ROWWISE, NB)
    x += _rows_before(first, pitch, RAGGED)
    peak = tl.zeros([], tl.int32)
    if ROWWISE == 2:
        for number in range(0, tl.cdiv(blocks_per_row, NB)):
            tile = start + number * NB
            live = inside(tile, f, blocks_per_row, start, high, RAGGED, NB)
            values = outliers.load(x, table, index, pitch, f, blocks_per_row, tile, start, high, OUTLIERS, RAGGED, NB)
            peak = tl.maximum(peak, microscaling.row_peak(values, live, tile, start, high, RAGGED, NB))
    for number in range(0, tl.cdiv(blocks_per_row, NB) if ROWWISE == 2 else 1):
        tile = start + number * NB
        live = inside(tile, f, blocks_per_row, start, high, RAGGED, NB)
        values = outliers.load(x, table, index, pitch, f, blocks_per_row, tile, start, high, OUTLIERS, RAGGED, NB)
        if ROWWISE == 1 and FAMILY == "microscaling":
            peak = microscaling.row_peak(values, live, tile, start, high, RAGGED, NB)
        _encode(
            values, live, peak, wires + offset, table, scratch, sender, r, f, blocks_per_row, tile, start, high,
            FAMILY, BITS, GROUP, FLAG, RAGGED, 0, NB,
        )  # fmt: skip
        if OUTLIERS:
            target = section_of(wires + offset, own, quotient, section, more)
            outliers.encode(
                x, values, index, target, pitch, own, features, count, blocks_per_row, tile, start, high,
                OUTLIERS, SHARE, FAMILY == "selective", NB,
            )  # fmt: skip


@triton.jit(do_not_specialize=["sender"])
def reduce(
    wires, out, table, index, sender, quotient, remainder, features, pitch, blocks_per_row, world, small, extra,
    count, section, more, stride,
    FAMILY: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr, FLAG: tl.constexpr, OUTLIERS: tl.constexpr,
    SHARE: tl.constexpr, RAGGED: tl.constexpr, ROWWISE: tl.constexpr, NB: tl.constexpr, COUNT: tl.constexpr,
):  # fmt: skip
    """COUNT wires, `stride` bytes apart, are summed; the first is that of `sender`. out: as x of `encode`."""
    SPOILS: tl.constexpr = OUTLIERS and FAMILY == "selective"
    first, own, offset = shard_of(tl.program_id(1), quotient, remainder, world, small, extra)
    start, high, r, f = _tile(own, features, blocks_per_row, RAGGED, ROWWISE, NB)
    total = _sum(
        wires + offset, stride, table, sender, r, f, blocks_per_row, start, start, high,
        FAMILY, BITS, GROUP, FLAG, RAGGED, NB, COUNT,
    )  # fmt: skip
    out += _rows_before(first, pitch, RAGGED)
    spoilt = False
    if OUTLIERS:
        source = section_of(wires + offset, own, quotient, section, more)
        if SPOILS:
            spoilt = outliers.spoils(source, stride, count, blocks_per_row, start, high, COUNT)
            total = tl.where(spoilt, float("nan"), total)
        outliers.reduce(
            source, stride, out, spoilt, index, pitch, features, count, blocks_per_row, start, start, high,
            OUTLIERS, SHARE, SPOILS, NB, COUNT,
        )  # fmt: skip
    outliers.store(out, total, table, index, pitch, f, blocks_per_row, start, start, high, OUTLIERS, RAGGED, NB)


@triton.jit
def _sum(
    wires, stride, table, sender, rows, features, blocks_per_row, start, low, high,
    FAMILY: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr, FLAG: tl.constexpr,
    RAGGED: tl.constexpr, NB: tl.constexpr, COUNT: tl.constexpr,
):  # fmt: skip
    """The sum of COUNT wires, in order: those of the ranks from `sender` on."""
    total = _decode(
        wires, table, sender, rows, features, blocks_per_row, start, low, high, FAMILY, BITS, GROUP, FLAG, RAGGED, NB
    )
    for number in range(1, COUNT):
        wires += stride
        total += _decode(
            wires, table, sender + number, rows, features, blocks_per_row, start, low, high,
            FAMILY, BITS, GROUP, FLAG, RAGGED, NB,
        )  # fmt: skip
    return _finish(total, start, features, blocks_per_row, FAMILY, GROUP, FLAG, RAGGED, NB)


@triton.jit(do_not_specialize=["sender", "target_sender"])
def reduce_encode(
    wires, summed, table, target_table, scratch, sender, target_sender, rows, features, blocks_per_row, stride,
    count, section, target_section,
    FAMILY: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr, FLAG: tl.constexpr, OUTLIERS: tl.constexpr,
    SHARE: tl.constexpr,
    TO_FAMILY: tl.constexpr, TO_BITS: tl.constexpr, TO_GROUP: tl.constexpr, TO_FLAG: tl.constexpr,
    RAGGED: tl.constexpr, ROWWISE: tl.constexpr, NB: tl.constexpr, COUNT: tl.constexpr,
):  # fmt: skip
    """COUNT wires of one message, `stride` bytes apart -> the wire of their sum. Both have outliers, or neither."""
    SPOILS: tl.constexpr = OUTLIERS and FAMILY == "selective"
    SHARED: tl.constexpr = ROWWISE or ((RAGGED == 1 or RAGGED == 32) and GROUP > TO_GROUP)
    own = tl.program_id(1) + rows
    start, high, r, f = _tile(own, features, blocks_per_row, RAGGED, ROWWISE, NB)
    peak = tl.zeros([], tl.int32)
    if ROWWISE == 2:
        for number in range(0, tl.cdiv(blocks_per_row, NB)):
            tile = start + number * NB
            live = inside(tile, f, blocks_per_row, start, high, RAGGED, NB)
            total = _sum(
                wires, stride, table, sender, r, f, blocks_per_row, tile, start, high,
                FAMILY, BITS, GROUP, FLAG, RAGGED, NB, COUNT,
            )  # fmt: skip
            peak = tl.maximum(peak, microscaling.row_peak(total, live, tile, start, high, RAGGED, NB))
    spoilt = False
    if SPOILS:
        spoilt = outliers.spoils(wires + section, stride, count, blocks_per_row, start, high, COUNT)
    for number in range(0, tl.cdiv(blocks_per_row, NB) if ROWWISE == 2 else 1):
        tile = start + number * NB
        live = inside(tile, f, blocks_per_row, start, high, RAGGED, NB)
        total = _sum(
            wires, stride, table, sender, r, f, blocks_per_row, tile, start, high,
            FAMILY, BITS, GROUP, FLAG, RAGGED, NB, COUNT,
        )  # fmt: skip
        if SPOILS:
            total = tl.where(spoilt, float("nan"), total)
        if ROWWISE == 1 and TO_FAMILY == "microscaling":
            peak = microscaling.row_peak(total, live, tile, start, high, RAGGED, NB)
        _encode(
            total, live, peak, summed, target_table, scratch, target_sender, r, f, blocks_per_row, tile, start, high,
            TO_FAMILY, TO_BITS, TO_GROUP, TO_FLAG, RAGGED, SHARED, NB,
        )  # fmt: skip
        if OUTLIERS:
            outliers.reduce_encode(
                wires + section, stride, summed + target_section, tl.where(live, total, 0.0), spoilt, own, count,
                blocks_per_row, tile, start, high, SHARE, SPOILS, TO_FAMILY == "selective", NB, COUNT,
            )  # fmt: skip


@triton.jit
def reduce_add_rmsnorm(
    wires, residual, weight, normed, summed, table, features, quotient, remainder, units, blocks_per_unit, world, slot,
    stride, eps, offset,
    FAMILY: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr, FLAG: tl.constexpr,
    RAGGED: tl.constexpr, NB: tl.constexpr, COUNT: tl.constexpr,
):  # fmt: skip
    """A program has a row of `features` values, which is `units` rows of the `rows` that the shards are cut from.

    A row may begin in one shard and end in another, so that its tile is decoded once for each of them.
    """
    row = tl.program_id(0)
    first_unit, rows = row.to(tl.int64) * units, (row * 0).to(tl.int64) + quotient * world + remainder
    column = tl.arange(0, NB)[None, :] * 32 + tl.arange(0, 32)[:, None]
    live = column < features
    total = tl.zeros([32, NB], tl.float32)
    shard = ((first_unit + 1) * world - 1) // rows
    while shard <= ((first_unit + units) * world - 1) // rows:  # older interpreters have no range of tensors
        first, own, place = shard_of(shard.to(tl.int32), quotient, remainder, world, slot, 0)
        start = ((first_unit - first) * blocks_per_unit).to(tl.int32)
        high = tl.minimum(own * blocks_per_unit, start + units * blocks_per_unit)
        mine = live_blocks(start, 0, high, NB)[None, :]
        if RAGGED == 1 or RAGGED == 32:
            r, f = own, features + own * 0
        elif RAGGED:  # the row may begin anywhere in the shard, and so does what is read
            before = (first - first_unit) * (features // units) // RAGGED * RAGGED
            mine = (column >= before) & (column < before + own * (features // units))
            place -= before * (BITS // 8)
            start, high = start * 0, high * 0 + NB
            r, f = own * 0 + 1, before + own * (features // units)
        else:
            r, f = own * 0 + 1, own * blocks_per_unit * 32
        part = _sum(
            wires + place, stride, table, 0, r, f, blocks_per_unit, start, 0, high,
            FAMILY, BITS, GROUP, FLAG, RAGGED, NB, COUNT,
        )  # fmt: skip
        total = tl.where(mine, part, total)
        shard += 1

    place = row.to(tl.int64) * features + column
    h = round_to(total, summed) + load_values(residual + place, live)
    h = tl.where(live, round_to(h, summed), 0.0)
    store_rounded(summed + place, h, live)
    squares = fold_rows(h * h, NB)
    mean = div_rn(fold(squares, NB), (first_unit * 0 + features).to(tl.float32))
    scale = div_rn(1.0, sqrt_rn(mean + eps))
    gain = load_values(weight + column, live) + offset
    store_rounded(normed + place, (h * scale) * gain, live)
