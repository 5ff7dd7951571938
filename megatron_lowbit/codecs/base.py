"""What a codec is: an immutable value object that turns rows of values into bytes and back.

Subclasses define three things: `granularity`, the sections of the wire, and the arithmetic on rows. A *row* is a run of
values along the last dimension that no quantization group crosses.

A codec may start with a linear *transform* of the rows and end by undoing it. As it commutes with sums, two legs that
share a transform stay in its domain in between: there they use each other's `inner`, which has the same wire.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from math import prod

import torch

from ..errors import ConfigError
from . import ops
from .ops import ALIGNMENT
from .statistics import Statistics

LONGEST_ROW = 1 << 14  # values of a row that one tile holds without spilling registers (sm_90, Triton 3.9)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def check_tensor(x: torch.Tensor) -> None:
    """Raise ConfigError unless x is a tensor of a dtype that partial sums have."""
    if not isinstance(x, torch.Tensor):
        raise ConfigError(f"expected a tensor, got {type(x).__name__}: pass a torch.Tensor of bf16, fp16 or fp32")
    if x.dtype not in DTYPES:
        raise ConfigError(
            f"dtype {str(x.dtype).removeprefix('torch.')} cannot be compressed: pass bfloat16, float16 or "
            "float32, or use torch.distributed directly"
        )
    if x.layout != torch.strided:
        raise ConfigError(f"layout {x.layout} cannot be compressed: pass x.to_dense()")


def rows_of(shape: torch.Size | tuple[int, ...]) -> tuple[int, int]:
    """(rows, features) of a shape; a scalar is one row of one feature."""
    return (prod(shape[:-1]), shape[-1]) if len(shape) else (1, 1)


def check_shape(shape: torch.Size | tuple[int, ...]) -> None:
    """Raise ConfigError unless shape is a sequence of sizes."""
    if not isinstance(shape, tuple | list) or not all(isinstance(n, int) and n >= 0 for n in shape):
        raise ConfigError(f"shape is {shape!r}: pass a tuple of sizes from 0 up, such as x.shape")


def rounded(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """fp32 values -> dtype, with one kind of NaN: conversions make NaNs of different bits."""
    return values.to(dtype, copy=True).masked_fill_(values.isnan(), torch.nan)


def quotient(x: torch.Tensor, divisor: float) -> torch.Tensor:
    """x / divisor, an IEEE division: by a number of Python's, PyTorch multiplies with the reciprocal on CUDA."""
    return x / torch.full((), divisor, dtype=x.dtype, device=x.device)


def copied(
    copies: dict[torch.device, torch.Tensor], device: torch.device, define: Callable[[], torch.Tensor]
) -> torch.Tensor:
    """What `define` makes, on `device`, copied there once: a copy would not survive capture in a CUDA graph."""
    if device not in copies:
        copies[device] = define().to(device)
    return copies[device]


@dataclass(frozen=True)
class Kernel:
    """What a GPU kernel has to know of a codec while it is compiled.

    family: the file, kernels/triton_FAMILY.py; bits, group, flag: what that makes of them, a group being what must lie
    in one tile (a power of two from 32 up, or 0: values stand alone); rowwise: encoding starts with the whole row.
    together: how many groups must lie in one tile when encoding, as bytes of the wire belong to all of them. outliers:
    0 if the codec has none, 1 if rows come as they are, 2 if they are split already; else this describes the codec of
    the ordinary features.
    """

    family: str
    bits: int
    group: int
    flag: int = 0
    rowwise: bool = False
    together: int = 1
    outliers: int = 0

    def fits(self, features: int) -> bool:
        """Whether a row of so many features fits into one tile, in their order."""
        return features <= LONGEST_ROW and not self.outliers

    @property
    def spoils(self) -> bool:
        """Whether one value that is not finite makes its whole row NaN, so that decoding starts with the row too."""
        return self.family == "selective"

    def meets(self, other: Kernel) -> bool:
        """Whether sums of this codec's wires can be encoded by the other before they are written anywhere."""
        return self.outliers == other.outliers != 1


class Codec(ABC):
    """Base of all codecs. Codecs that write the same wires are equal."""

    spec: str
    handle: int  # of torch.ops.megatron_lowbit
    transform: Hashable = None  # equal for codecs whose inner ones work on the same domain; None: the values' own
    numba: str | None = None  # the module of kernels/ that has `encode_rows` and `reduce_rows` for CPUs; None: none
    kernel: Kernel | None = None  # None: the definition runs on GPUs too
    sender: int = 0  # the rank whose codec this is, where that makes a difference
    outliers: tuple[int, ...] = ()  # features that travel apart from the others

    def __new__(cls, *arguments: object, **options: object) -> Codec:
        codec = super().__new__(cls)
        codec.handle = ops.register(codec)
        return codec

    def __copy__(self) -> Codec:
        """A codec of its own: what is cached for this one stays here."""
        other = type(self).__new__(type(self))
        vars(other).update({name: value for name, value in vars(self).items() if name not in ("handle", "_tables")})
        return other

    @property
    def inner(self) -> Codec:
        """This codec without its transform: encodes transformed rows, and leaves the sum transformed."""
        return self

    def bind(self, statistics: Statistics, rank: int) -> Codec:
        """This codec as `rank` uses it at a site with these statistics; codecs that need none are ready as they are."""
        return self

    def sent_by(self, rank: int) -> Codec:
        """This codec as `rank` uses it; another one only if the ranks' codecs differ."""
        return self

    @abstractmethod
    def granularity(self, features: int) -> int:
        """The number of neighbouring values of a row that must travel together; a power of two, or `features`."""

    @abstractmethod
    def sections(self, rows: int, features: int) -> list[tuple[str, int]]:
        """(name, bytes) of each section of the wire, in order, before alignment."""

    @abstractmethod
    def define_encode(self, x: torch.Tensor, wire: torch.Tensor) -> None:
        """`encode_rows` as it is defined, in plain PyTorch."""

    @abstractmethod
    def define_reduce(self, wires: torch.Tensor, out: torch.Tensor) -> None:
        """`reduce_rows` as it is defined, in plain PyTorch."""

    def define_table(self) -> torch.Tensor:
        """Numbers that kernels look up, fp32, in whatever order the family's file wants them."""
        return torch.zeros(4)

    def check(self, features: int, wires: int = 1) -> None:
        """Raise ConfigError unless rows of `features` values can be encoded, and so many wires of them be reduced."""
        return None

    def encode_rows(self, x: torch.Tensor, wire: torch.Tensor) -> None:
        """x [rows, features] contiguous -> wire, uint8 [wire_nbytes(x.shape)], written in place."""
        ops.encode(self, x, wire)

    def reduce_rows(self, wires: torch.Tensor, out: torch.Tensor) -> None:
        """wires uint8 [n, at least wire_nbytes(out.shape)] -> out [rows, features], written in place.

        out = decode(wires[0]) + decode(wires[1]) + ..., in that order, in fp32, rounded once to out's dtype.
        Several wires are those of ranks 0, 1, ...; a single one is that of the rank whose codec this is.
        """
        ops.reduce(self, wires, out)

    def table(self, device: torch.device) -> torch.Tensor:
        """`define_table` on `device`."""
        return copied(vars(self).setdefault("_tables", {}), device, self.define_table)

    def wire_nbytes(self, shape: torch.Size | tuple[int, ...]) -> int:
        """Exact length of the wire in bytes, known without the data. Raises ConfigError for what is no shape."""
        check_shape(shape)
        return sum(_aligned(size) for _, size in self.sections(*rows_of(shape)))

    def bits_per_value(self, shape: torch.Size | tuple[int, ...]) -> float:
        """8 * wire_nbytes / numel: scales, zeros and padding included; 0 for an empty shape."""
        nbytes = self.wire_nbytes(shape)
        return 8 * nbytes / prod(shape) if prod(shape) else 0.0

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., features] bf16, fp16 or fp32 -> wire, uint8 [wire_nbytes(x.shape)], contiguous, on x's device.

        Raises ConfigError for any other dtype.
        """
        check_tensor(x)
        wire = torch.empty(self.wire_nbytes(x.shape), dtype=torch.uint8, device=x.device)
        if wire.numel():
            self.encode_rows(x.detach().contiguous().view(rows_of(x.shape)), wire)
        return wire

    def decode(self, wire: torch.Tensor, shape: torch.Size | tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """wire, uint8 [wire_nbytes(shape)] -> values of `shape` and `dtype` (bf16, fp16 or fp32).

        Raises ConfigError for a wire of another length or dtype. Any bytes of the right length decode to something.
        """
        if dtype not in DTYPES:
            raise ConfigError(f"cannot decode to {dtype}: use torch.bfloat16, torch.float16 or torch.float32")
        if not isinstance(wire, torch.Tensor):
            raise ConfigError(f"expected a wire, got {type(wire).__name__}: pass the uint8 tensor that encode returned")
        expected = self.wire_nbytes(shape)
        if wire.dtype != torch.uint8 or wire.numel() != expected:
            raise ConfigError(
                f"{self.spec} needs {expected} bytes of uint8 for shape {tuple(shape)}, got {wire.numel()} "
                f"of {str(wire.dtype).removeprefix('torch.')}: pass the shape and the spec it was encoded with"
            )
        out = torch.empty(tuple(shape), dtype=dtype, device=wire.device)
        if expected:
            self.reduce_rows(wire.contiguous().view(1, -1), out.view(rows_of(shape)))
        return out

    def split(self, wire: torch.Tensor, rows: int, features: int) -> dict[str, torch.Tensor]:
        """Views of the wire's sections: wire uint8 [..., n bytes] -> name -> uint8 [..., section bytes]."""
        views, start = {}, 0
        for name, size in self.sections(rows, features):
            views[name] = wire[..., start : start + size]
            start += _aligned(size)
        return views

    def clear_gaps(self, wire: torch.Tensor, rows: int, features: int) -> None:
        """Zero the alignment gaps behind the sections of one wire, so that equal values make equal wires."""
        start = 0
        for _, size in self.sections(rows, features):
            end, start = start + size, start + _aligned(size)
            if end < start:
                wire[end:start] = 0

    @property
    def _key(self) -> tuple:
        """What tells codecs apart: the spec, and what else decides the wire."""
        return (self.spec,)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Codec) and self._key == other._key

    def __hash__(self) -> int:
        return hash(self._key)

    def __repr__(self) -> str:
        return f"codec({self.spec!r})"


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT
