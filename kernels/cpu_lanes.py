"""Operations across the lanes of a vector of cpu_simd.py: sums, shifts, table look-ups, the Hadamard butterfly."""

from __future__ import annotations

import numpy as np
from llvmlite import ir
from numba.core import cgutils, types
from numba.core.registry import cpu_target
from numba.extending import intrinsic

from .cpu_simd import (
    LANES,
    Vector,
    _constants,
    _floats,
    _i32,
    _ints,
    _shuffle,
    _splat,
    _unary,
    add,
    and_,
    fless,
    inline,
    splat,
)

# What numba compiles for, which NUMBA_CPU_NAME or NUMBA_ENABLE_AVX may have made less than this processor.
_HAS_AVX512 = "+avx512f" in cpu_target.target_context.codegen().magic_tuple()[2].split(",")


def _butterfly(builder, value):
    """Hadamard transform of the 32 lanes: lanes at distance 1, 2, 4, 8, 16 become their sum and difference."""
    for distance in (1, 2, 4, 8, 16):
        signs = _constants(-(2**31) if lane & distance else 0 for lane in range(LANES))
        partner = builder.bitcast(_shuffle(builder, value, [lane ^ distance for lane in range(LANES)]), _floats)
        value = builder.bitcast(builder.fadd(partner, builder.bitcast(builder.xor(value, signs), _floats)), _ints)
    return value


def _fold(builder, value):
    """Sum of the lanes as fp32: the upper half added to the lower one, and so on."""
    value, lanes = builder.bitcast(value, _floats), LANES
    while lanes > 1:
        lanes //= 2
        low, high = _shuffle(builder, value, range(lanes)), _shuffle(builder, value, range(lanes, 2 * lanes))
        value = builder.fadd(low, high)
    return builder.extract_element(value, ir.Constant(_i32, 0))


def _is_odd(builder, value):
    """Bit i of the result: whether lane i is odd."""
    return builder.bitcast(builder.trunc(value, ir.VectorType(ir.IntType(1), LANES)), _i32)


@intrinsic
def halves(context, low, high):
    """Lanes 0 to 15 hold one number, lanes 16 to 31 another (both integers or both fp32)."""

    def generate(context, builder, signature, arguments):
        parts = [_splat(builder, argument) for argument in arguments]
        both = builder.shuffle_vector(*parts, _constants([*range(16), *range(48, 64)]))
        return builder.bitcast(both, _ints)

    kind = types.float32 if low == types.float32 else types.int32
    return Vector(kind, kind), generate


swap_halves = _unary(Vector, Vector, lambda builder, value: _shuffle(builder, value, [*range(16, 32), *range(16)]))
butterfly = _unary(Vector, Vector, _butterfly)
fold = _unary(types.float32, Vector, _fold)
is_odd = _unary(types.int32, Vector, _is_odd)


def _shifted(by: int):
    @intrinsic
    def shifted(context, before, value):
        def generate(context, builder, signature, arguments):
            order = _constants(range(LANES - by, 2 * LANES - by))
            return builder.shuffle_vector(arguments[0], arguments[1], order)

        return Vector(Vector, Vector), generate

    return shifted


shifted1, shifted2 = _shifted(1), _shifted(2)  # the lanes one or two places on, after those of the vector before


@intrinsic
def lanes(context):
    """The numbers 0 to 31."""
    return Vector(), lambda context, builder, signature, arguments: _constants(range(LANES))


@intrinsic
def lookup(context, address, indices):
    """32 words at address + 4 * index, without any check."""

    def generate(context, builder, signature, arguments):
        wide = ir.VectorType(ir.IntType(64), LANES)
        offsets = builder.shl(builder.zext(arguments[1], wide), ir.Constant(wide, [2] * LANES))
        pointers = builder.inttoptr(
            builder.add(_splat(builder, arguments[0]), offsets), ir.VectorType(_i32.as_pointer(), LANES)
        )
        everywhere = ir.Constant(ir.VectorType(ir.IntType(1), LANES), [1] * LANES)
        gather = cgutils.get_or_insert_function(
            builder.module,
            ir.FunctionType(_ints, [pointers.type, _i32, everywhere.type, _ints]),
            f"llvm.masked.gather.v{LANES}i32.v{LANES}p0",
        )
        return builder.call(gather, [pointers, ir.Constant(_i32, 4), everywhere, ir.Constant(_ints, ir.Undefined)])

    return Vector(types.int64, Vector), generate


@intrinsic
def lookup16(context, address, indices):
    """32 words of a table of 16, by indices below 16; much faster than `lookup`.

    One instruction per 16 lanes where the processor has AVX-512, else a tree of selections.
    """

    def generate(context, builder, signature, arguments):
        address, indices = arguments
        half = ir.VectorType(_i32, 16)
        if _HAS_AVX512:
            table = builder.load(builder.inttoptr(address, half.as_pointer()), align=4)
            permute = cgutils.get_or_insert_function(
                builder.module, ir.FunctionType(half, [half, half]), "llvm.x86.avx512.permvar.si.512"
            )
            low, high = (
                builder.call(permute, [table, _shuffle(builder, indices, range(start, start + 16))])
                for start in (0, 16)
            )
            return builder.shuffle_vector(low, high, _constants(range(LANES)))
        values = []
        for entry in range(16):
            at = builder.inttoptr(builder.add(address, ir.Constant(ir.IntType(64), 4 * entry)), _i32.as_pointer())
            values.append(_splat(builder, builder.load(at, align=4)))
        for bit in range(4):
            is_set = builder.trunc(builder.lshr(indices, _splat(builder, bit)), ir.VectorType(ir.IntType(1), LANES))
            values = [builder.select(is_set, b, a) for a, b in zip(values[::2], values[1::2], strict=True)]
        return values[0]

    return Vector(types.int64, Vector), generate


@inline
def search16(values, table, count):
    """The number of `table`'s first count - 1 <= 15 ascending fp32 below each value; count: a power of two."""
    found, step = splat(np.int32(0)), count // 2
    while step > 0:
        probe = lookup16(table, add(found, np.int32(step - 1)))
        found = add(found, and_(fless(probe, values), np.int32(step)))
        step //= 2
    return found
