"""Explicit SIMD for numba: vectors of 32 lanes that live in registers, for any processor LLVM knows.

numba's own loops over 32 values do not vectorize reliably (every store might alias every load) and array arguments cost
reference counts in the innermost loop. So the CPU kernels are written with these few operations on plain addresses.
`Vector` is <32 x i32>; a lane is an integer or the bits of an fp32, as the operation says. LLVM splits it into whatever
registers the machine has. IEEE arithmetic: no contraction, no fast-math.

Hazard: an address is an int from `tensor.data_ptr()`. Nothing is bounds-checked and nothing keeps the memory alive but
the caller's tensor.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import numba
import numpy as np
from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic, models, register_model

LANES = 32
_SOURCES = hashlib.sha256(b"".join(path.read_bytes() for path in sorted(Path(__file__).parent.glob("cpu_*.py"))))


def jit(function):
    """Compile for reuse across runs, until one of the kernels' files changes."""
    dispatcher = numba.njit(cache=True, nogil=True, error_model="numpy")(function)
    # numba looks at the function's own file only, and would go on running what was compiled from an older cpu_simd.py.
    file = dispatcher._cache._cache_file
    file._source_stamp = (file._source_stamp, _SOURCES.hexdigest())
    return dispatcher


inline = numba.njit(inline="always", error_model="numpy")
separate = numba.njit(
    error_model="numpy"
)  # for long functions that run once per 32 groups: sooner compiled than inline

_i8, _i32, _f32 = ir.IntType(8), ir.IntType(32), ir.FloatType()
_ints, _floats = ir.VectorType(_i32, LANES), ir.VectorType(_f32, LANES)


class _Vector(types.Type):
    def __init__(self) -> None:
        super().__init__(name="lowbit_i32x32")


Vector = _Vector()


@register_model(_Vector)
class _VectorModel(models.PrimitiveModel):
    def __init__(self, manager, frontend_type) -> None:
        super().__init__(manager, frontend_type, _ints)


def _constants(values) -> ir.Constant:
    values = list(values)
    return ir.Constant(ir.VectorType(_i32, len(values)), values)


def _shuffle(builder, vector, order):
    return builder.shuffle_vector(vector, ir.Constant(vector.type, ir.Undefined), _constants(order))


def _splat(builder, scalar):
    if isinstance(scalar, int):
        return _constants([scalar] * LANES)
    undefined = ir.Constant(ir.VectorType(scalar.type, LANES), ir.Undefined)
    return _shuffle(builder, builder.insert_element(undefined, scalar, ir.Constant(_i32, 0)), [0] * LANES)


def _round_to_bf16(builder, bits):
    """fp32 bits -> bf16 bits in the low half, to nearest even; NaN becomes 0x7FC0."""
    odd = builder.and_(builder.lshr(bits, _splat(builder, 16)), _splat(builder, 1))
    rounded = builder.lshr(builder.add(builder.add(bits, _splat(builder, 0x7FFF)), odd), _splat(builder, 16))
    floats = builder.bitcast(bits, _floats)
    return builder.select(builder.fcmp_unordered("uno", floats, floats), _splat(builder, 0x7FC0), rounded)


def _loader(element: ir.Type, numba_type: types.Type, lanes: int):
    """address -> `lanes` elements there, integers zero-extended to i32."""

    @intrinsic
    def load(context, address):
        def generate(context, builder, signature, arguments):
            memory = element if lanes == 1 else ir.VectorType(element, lanes)
            value = builder.load(builder.inttoptr(arguments[0], memory.as_pointer()), align=element.width // 8)
            wide = _i32 if lanes == 1 else _ints
            return value if memory == wide else builder.zext(value, wide)

        return numba_type(types.int64), generate

    return load


def _storer(element: ir.Type, numba_type: types.Type, lanes: int, convert=None):
    """Write the low bits of a value to an address, after `convert`."""

    @intrinsic
    def store(context, address, value):
        def generate(context, builder, signature, arguments):
            memory = element if lanes == 1 else ir.VectorType(element, lanes)
            value = convert(builder, arguments[1]) if convert else arguments[1]
            value = value if value.type == memory else builder.trunc(value, memory)
            builder.store(value, builder.inttoptr(arguments[0], memory.as_pointer()), align=element.width // 8)
            return context.get_dummy_value()

        return types.void(types.int64, numba_type), generate

    return store


load_byte, store_byte = _loader(_i8, types.int32, 1), _storer(_i8, types.int32, 1)
load_half, store_half = _loader(ir.IntType(16), types.int32, 1), _storer(ir.IntType(16), types.int32, 1)
load_word, store_word = _loader(_i32, types.int32, 1), _storer(_i32, types.int32, 1)
load_fp32, store_fp32 = _loader(_i32, Vector, LANES), _storer(_i32, Vector, LANES)
store_bf16 = _storer(ir.IntType(16), Vector, LANES, _round_to_bf16)
load_bytes = _loader(_i8, Vector, LANES)
_load_halves = _loader(ir.IntType(16), Vector, LANES)


@inline
def load_bf16(address):
    """32 bf16 values -> their fp32 bits."""
    return shift_left(_load_halves(address), 16)


@intrinsic
def store_plane(context, address, codes, width, shift):
    """Write bits [shift, shift + width) of 32 codes as 4 * width bytes; layout of codecs/packing.py. width: literal."""

    def generate(context, builder, signature, arguments):
        address, value, _, shift = arguments
        bits = signature.args[2].literal_value
        size = LANES * bits // 8  # bytes written; byte j holds lanes j, j + size, ...
        value = builder.and_(builder.lshr(value, _splat(builder, shift)), _splat(builder, 2**bits - 1))
        value = builder.shl(value, _constants(lane // size * bits for lane in range(LANES)))
        lanes = LANES
        while lanes > size:  # fold the upper half onto the lower
            lanes //= 2
            value = builder.or_(
                _shuffle(builder, value, range(lanes)), _shuffle(builder, value, range(lanes, 2 * lanes))
            )
        memory = ir.VectorType(_i8, size)
        builder.store(builder.trunc(value, memory), builder.inttoptr(address, memory.as_pointer()), align=1)
        return context.get_dummy_value()

    if isinstance(width, types.IntegerLiteral):
        return types.void(types.int64, Vector, width, types.int32), generate


@intrinsic
def load_plane(context, address, width, shift):
    """The inverse of `store_plane`: 32 codes' bits [shift, shift + width), other bits zero."""

    def generate(context, builder, signature, arguments):
        address, _, shift = arguments
        bits = signature.args[1].literal_value
        size = LANES * bits // 8
        memory = ir.VectorType(_i8, size)
        value = builder.load(builder.inttoptr(address, memory.as_pointer()), align=1)
        value = builder.zext(_shuffle(builder, value, [lane % size for lane in range(LANES)]), _ints)
        value = builder.lshr(value, _constants(lane // size * bits for lane in range(LANES)))
        return builder.shl(builder.and_(value, _splat(builder, 2**bits - 1)), _splat(builder, shift))

    if isinstance(width, types.IntegerLiteral):
        return Vector(types.int64, width, types.int32), generate


def _elementwise(floating: bool, generate_lanes):
    """Lane by lane, vector with vector or with a scalar; floating: the lanes are fp32."""

    @intrinsic
    def apply(context, left, right):
        def generate(context, builder, signature, arguments):
            operands = []
            for kind, operand in zip(signature.args, arguments, strict=True):
                operand = operand if kind == Vector else _splat(builder, operand)
                operands.append(builder.bitcast(operand, _floats) if floating and operand.type == _ints else operand)
            return builder.bitcast(generate_lanes(builder, *operands), _ints)

        scalar = types.float32 if floating else types.int32
        return Vector(*(Vector if kind == Vector else scalar for kind in (left, right))), generate

    return apply


fadd = _elementwise(True, lambda builder, a, b: builder.fadd(a, b))
fsub = _elementwise(True, lambda builder, a, b: builder.fsub(a, b))
fmul = _elementwise(True, lambda builder, a, b: builder.fmul(a, b))
fdiv = _elementwise(True, lambda builder, a, b: builder.fdiv(a, b))
at_least = _elementwise(True, lambda builder, a, b: builder.select(builder.fcmp_ordered("<", a, b), b, a))  # NaN: a
at_most = _elementwise(True, lambda builder, a, b: builder.select(builder.fcmp_ordered("<", b, a), b, a))
add = _elementwise(False, lambda builder, a, b: builder.add(a, b))
sub = _elementwise(False, lambda builder, a, b: builder.sub(a, b))
or_ = _elementwise(False, lambda builder, a, b: builder.or_(a, b))
xor = _elementwise(False, lambda builder, a, b: builder.xor(a, b))
shift_left = _elementwise(False, lambda builder, a, b: builder.shl(a, b))
shift_right = _elementwise(False, lambda builder, a, b: builder.ashr(a, b))
and_ = _elementwise(False, lambda builder, a, b: builder.and_(a, b))
less = _elementwise(False, lambda builder, a, b: builder.sext(builder.icmp_signed("<", a, b), _ints))  # -1 or 0
equal = _elementwise(False, lambda builder, a, b: builder.sext(builder.icmp_signed("==", a, b), _ints))
fless = _elementwise(True, lambda builder, a, b: builder.sext(builder.fcmp_ordered("<", a, b), _ints))
minimum = _elementwise(False, lambda builder, a, b: builder.select(builder.icmp_signed("<", a, b), a, b))
maximum = _elementwise(False, lambda builder, a, b: builder.select(builder.icmp_signed(">", a, b), a, b))


@inline
def choose(mask, yes, no):
    """Lanes of `yes` where the mask is -1, of `no` where it is 0."""
    return or_(and_(mask, yes), and_(sub(splat(np.int32(-1)), mask), no))


def _unary(result: types.Type, argument: types.Type, generate_value):
    @intrinsic
    def apply(context, value):
        def generate(context, builder, signature, arguments):
            return generate_value(builder, arguments[0])

        return result(argument), generate

    return apply


def _reduction(operation: str):
    def generate(builder, value):
        function = cgutils.get_or_insert_function(
            builder.module, ir.FunctionType(_i32, [_ints]), f"llvm.vector.reduce.{operation}.v{LANES}i32"
        )
        return builder.call(function, [value])

    return _unary(types.int32, Vector, generate)


smallest, largest = _reduction("smin"), _reduction("smax")  # over the lanes, as signed integers
splat = _unary(Vector, types.int32, _splat)
to_float = _unary(Vector, Vector, lambda builder, value: builder.bitcast(builder.sitofp(value, _floats), _ints))
round_bf16 = _unary(Vector, Vector, _round_to_bf16)  # fp32 bits -> bf16 bits in the low half
as_float = _unary(types.float32, types.int32, lambda builder, value: builder.bitcast(value, _f32))
as_int = _unary(types.int32, types.float32, lambda builder, value: builder.bitcast(value, _i32))


@intrinsic
def ordered(context, bits):
    """fp32 bits, scalar or vector -> integers that sort like the floats; its own inverse. NaNs lie outside the Infs."""

    def generate(context, builder, signature, arguments):
        width, mask = (
            ir.Constant(_i32, n) if signature.return_type != Vector else _splat(builder, n) for n in (31, 0x7FFFFFFF)
        )
        return builder.xor(arguments[0], builder.and_(builder.ashr(arguments[0], width), mask))

    kind = Vector if bits == Vector else types.int32
    return kind(kind), generate


def _canonical(builder, value):
    """fp32 bits with every NaN the same."""
    floats = builder.bitcast(value, _floats)
    return builder.select(builder.fcmp_unordered("uno", floats, floats), _splat(builder, 0x7FC00000), value)


canonical = _unary(Vector, Vector, _canonical)
