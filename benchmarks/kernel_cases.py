"""What the kernel benchmark runs: operations on a message, buffers to run them on, and whether the outcome is right.

Rows repeat after PERIOD, which is no power of two: what the definition makes of so few rows on the CPU says, bit for
bit, what a message of any length must become, and a kernel whose offset is off by 2**31 meets another row. That works
for wires whose sections go row by row, as they do where a row has a multiple of 32 groups.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache

import torch

import megatron_lowbit as lowbit
from megatron_lowbit.codecs import Codec, fused
from megatron_lowbit.codecs.statistics import Statistics
from megatron_lowbit.spec import parse_leg

WORLD, PERIOD, FEATURES, EPS = 8, 7, 8192, 1e-5
MOST_DIFFERENCE = 0.05  # of a candidate that need not be the definition bit for bit; a wrong one is about 1 off
WRITTEN = {"target", "normed"}
Buffers = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Operation:
    """wires: how many are read, 0 if a tensor is; to_wire: writes a wire; norm: adds a residual, and RMSNorm."""

    wires: int
    to_wire: bool
    norm: bool = False


OPERATIONS = {
    "encode": Operation(0, True),
    "decode": Operation(1, False),
    "decode_reduce_encode": Operation(WORLD, True),
    "accumulate": Operation(WORLD, False),
    "decode_add_rmsnorm": Operation(1, False, norm=True),
}


class Message:
    """A few rows on the CPU: what every rank has, and the wires of that."""

    def __init__(self, spec: str, rows: int, features: int) -> None:
        random = torch.Generator().manual_seed(0)
        self.codec = bound(spec, features)
        self.parts = torch.randn(WORLD, rows, features, generator=random).bfloat16()
        self.residual = torch.randn(rows, features, generator=random).bfloat16()
        self.weight = torch.randn(features, generator=random).bfloat16()
        self.wires = torch.empty(WORLD, self.codec.wire_nbytes((rows, features)), dtype=torch.uint8)
        self.expected: dict[str, Buffers] = {}  # by operation
        with as_defined():
            for rank, (part, wire) in enumerate(zip(self.parts, self.wires)):
                self.codec.sent_by(rank).define_encode(part, wire)

    def buffers(self, operation: Operation) -> Buffers:
        """The tensors of one call."""
        source = self.wires[: operation.wires] if operation.wires else self.parts[0]
        target = torch.empty_like(self.wires[0] if operation.to_wire else self.residual)
        norm = {"residual": self.residual, "weight": self.weight, "normed": torch.empty_like(self.residual)}
        return {"source": source, "target": target} | (norm if operation.norm else {})


message = cache(Message)


@contextmanager
def as_defined() -> Iterator[None]:
    """Codecs that others are parts of run as defined, too."""
    before, os.environ["LOWBIT_BACKEND"] = os.environ.get("LOWBIT_BACKEND", ""), "reference"
    try:
        yield
    finally:
        os.environ["LOWBIT_BACKEND"] = before


@cache
def bound(spec: str, features: int) -> Codec:
    """The codec, as rank 0 has it; with outliers and ranges out of thin air if it wants any."""
    codec = lowbit.codec(spec)
    if not parse_leg(spec).calibrated:
        return codec
    count = codec.count(features)
    high = torch.full((WORLD, features), 4.0)
    return codec.bind(Statistics(tuple(range(0, features, features // count))[:count], -high, high), 0)


class Case:
    """An operation on a message of `nbytes` bytes of bf16; of what is summed, each summand has as many."""

    def __init__(self, spec: str, name: str, nbytes: int) -> None:
        self.name, self.operation = name, OPERATIONS[name]
        self.features = min(FEATURES, nbytes // 2)
        self.rows = nbytes // 2 // self.features
        self.small = message(spec, min(PERIOD, self.rows), self.features)
        self.codec = self.small.codec
        wire, values = self.codec.wire_nbytes((self.rows, self.features)), 2 * self.rows * self.features
        read = self.operation.wires * wire or values
        self.moved = read + (wire if self.operation.to_wire else values)
        self.moved += 2 * values + 2 * self.features if self.operation.norm else 0

    def buffers(self, device: torch.device, sets: int) -> list[Buffers]:
        """As many sets that share nothing; where a call writes, there is what nobody would write."""
        tall = {key: self._tall(x, device) for key, x in self.small.buffers(self.operation).items()}
        many = {key: x.expand(sets, *x.shape).contiguous() for key, x in tall.items()}
        for key in WRITTEN & many.keys():
            many[key].fill_(0xA5 if many[key].dtype == torch.uint8 else 7)
        return [{key: x[index] for key, x in many.items()} for index in range(sets)]

    def ours(self, source, target, residual=None, weight=None, normed=None) -> None:
        """As collectives do it; LOWBIT_BACKEND says with what."""
        codec = self.codec
        if not self.operation.wires:
            codec.encode_rows(source, target)
        elif self.operation.to_wire:
            fused.reduce_encode(codec, source, codec, (self.rows, self.features), target, self._no_scratch)
        elif self.operation.norm:
            fused.reduce_add_rmsnorm(codec, source, None, residual, weight, EPS, 0.0, normed, target)
        else:
            codec.reduce_rows(source, target)

    def defined(self, source, target, residual=None, weight=None, normed=None, rows: int = 0) -> None:
        """The definition, on whatever device the tensors are; rows: if not the case's own."""
        codec = self.codec
        if not self.operation.wires:
            codec.define_encode(source, target)
        elif self.operation.to_wire:
            total = torch.empty(rows or self.rows, self.features, device=source.device)
            codec.inner.define_reduce(source, total)
            codec.inner.define_encode(total, target)
        else:
            codec.define_reduce(source, target)
            if self.operation.norm:
                fused.add_rmsnorm(target, residual, weight, EPS, 0.0, normed)

    def differences(self, buffers: Buffers) -> tuple[bool, float]:
        """Whether the outcome is the definition's bit for bit, and how far it is off: an error relative to its norm."""
        expected = self._expected()
        same, worst = True, 0.0
        for key, small in expected.items():
            found = buffers[key]
            same = same and torch.equal(_bytes(self._tall(small, found.device)), _bytes(found))
            pair = [self._values(x) for x in (small, self._head(found))]
            worst = max(worst, float((pair[1] - pair[0]).norm() / pair[0].norm()))
        return same, worst if worst == worst else torch.inf

    def _expected(self) -> Buffers:
        if self.name not in self.small.expected:
            buffers = self.small.buffers(self.operation)
            with as_defined():
                self.defined(**buffers, rows=len(self.small.residual))
            self.small.expected[self.name] = {key: buffers[key] for key in WRITTEN & buffers.keys()}
        return self.small.expected[self.name]

    def _tall(self, small: torch.Tensor, device: torch.device) -> torch.Tensor:
        """The whole message's, of what is a few rows': values [rows, features], a weight, wires [..., bytes]."""
        if small.dim() == 1 and small.dtype != torch.uint8:
            return small.to(device)
        count = len(self.small.residual)
        index = torch.arange(self.rows, device=device) % count
        if small.dtype != torch.uint8:
            return small.to(device)[index]
        wires = torch.zeros(*small.shape[:-1], self._wire_nbytes(self.rows), dtype=torch.uint8, device=device)
        for view, few in zip(self._sections(wires, self.rows), self._sections(small.to(device), count)):
            view.copy_(few[..., index, :])
        return wires

    def _head(self, found: torch.Tensor) -> torch.Tensor:
        """The first rows, on the CPU: the inverse of `_tall`."""
        count = len(self.small.residual)
        if found.dtype != torch.uint8:
            return found[:count].cpu()
        wire = torch.zeros(self._wire_nbytes(count), dtype=torch.uint8)
        for view, whole in zip(self._sections(wire, count), self._sections(found, self.rows)):
            view.copy_(whole[..., :count, :])
        return wire

    def _values(self, few: torch.Tensor) -> torch.Tensor:
        """Of values or a wire of a few rows: fp32."""
        if few.dtype != torch.uint8:
            return few.float()
        values = torch.empty(self.small.residual.shape)
        with as_defined():
            self.codec.define_reduce(few[None], values)
        return values

    def _sections(self, wires: torch.Tensor, rows: int) -> list[torch.Tensor]:
        """Views [..., parts, rows, bytes of a row]; of spikes there are two parts, all minima first."""
        views = []
        for name, x in self.codec.split(wires, rows, self.features).items():
            parts = 2 if name.startswith(("spikes", "position")) else 1
            views.append(x.view(*x.shape[:-1], parts, rows, -1))
            width = int(name.removeprefix("position") or 0) if name.startswith("position") else 0
            if rows > 1 and width and views[-1].shape[-1] % (4 * width):
                raise lowbit.ConfigError(
                    f"{self.codec.spec} with {self.features} features has blocks of positions that span rows, which "
                    "this benchmark cannot check: choose larger messages' specs without outliers, or smaller groups"
                )
        return views

    def _wire_nbytes(self, rows: int) -> int:
        return self.codec.wire_nbytes((rows, self.features))

    @staticmethod
    def _no_scratch() -> torch.Tensor:
        raise RuntimeError("this codec has no kernel that sums and encodes in one")


def function(name: str, case: Case) -> Callable[..., None]:
    """What is timed: `ours`, the `definition`, or that `compiled` by PyTorch."""
    os.environ["LOWBIT_BACKEND"] = "triton" if name == "ours" else "reference"
    if name == "ours":
        return case.ours
    if name == "definition":
        return case.defined
    torch._dynamo.reset()
    return torch.compile(case.defined, dynamic=False, backend="inductor" if torch.cuda.is_available() else "eager")


def _bytes(x: torch.Tensor) -> torch.Tensor:
    return x.contiguous().view(-1).view(torch.uint8)
