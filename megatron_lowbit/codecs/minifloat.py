"""Floating-point numbers of 4 to 8 bits: E4M3, E2M3 and E2M1 (OCP Microscaling Formats v1.0, section 5.3).

A code is, from the top, a sign bit, e bits of exponent field E and m bits of mantissa field M. With the bias
2**(e - 1) - 1, E > 0 is the normal number +-(1 + M / 2**m) * 2**(E - bias), and E = 0 the subnormal
+-M / 2**m * 2**(1 - bias), zero among them. So codes without their sign are ordered like their values. E4M3 is the
"FN" variant: no infinities, NaN where all bits below the sign are set, hence 448 as its largest number. E2M3 and E2M1
have neither.

Encoding rounds to the nearest number, half to the even mantissa, as if the exponent had no upper limit, and then takes
the largest number for whatever lies beyond it: it saturates, and never makes a NaN. The sign is kept, that of a zero
and of what rounds to zero included.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


def power_of_two(exponent: torch.Tensor) -> torch.Tensor:
    """2**exponent, exactly, of integers from -126 to 127 -> fp32."""
    return ((exponent.int() + 127) << 23).view(torch.float32)


def exponent_of(x: torch.Tensor) -> torch.Tensor:
    """floor(log2(|x|)) of fp32, as int32; -127 for anything smaller than a normal number, 128 for NaN and Inf."""
    return ((x.view(torch.int32) >> 23) & 0xFF) - 127


@dataclass(frozen=True)
class Minifloat:
    """exponent, mantissa: bits of each; top: the largest number's code; nan: the code of NaN, if there is one."""

    exponent: int
    mantissa: int
    top: int
    nan: int | None = None

    @property
    def bits(self) -> int:
        return 1 + self.exponent + self.mantissa

    @property
    def lowest(self) -> int:
        """Exponent of the smallest normal number, which the subnormal ones share."""
        return 2 - 2 ** (self.exponent - 1)

    @property
    def highest(self) -> int:
        """Exponent of the largest number."""
        return (self.top >> self.mantissa) - 1 + self.lowest

    @property
    def largest(self) -> float:
        return (1 + self.top % 2**self.mantissa / 2**self.mantissa) * 2.0**self.highest

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        """x fp32, finite -> codes uint8."""
        exponent = exponent_of(x).clamp(min=self.lowest)
        steps = torch.round(x.abs() * power_of_two(self.mantissa - exponent)).int()
        magnitude = ((exponent - self.lowest) << self.mantissa) + steps  # 2**(mantissa + 1) steps: the next exponent
        sign = torch.signbit(x).int() << (self.bits - 1)
        return (magnitude.clamp(max=self.top) | sign).to(torch.uint8)

    def decode(self, codes: torch.Tensor) -> torch.Tensor:
        """Codes uint8, none of them wider than `bits` -> their values, fp32."""
        sign, magnitude = codes >> (self.bits - 1), (codes & (2 ** (self.bits - 1) - 1)).int()
        field, steps = magnitude >> self.mantissa, magnitude & (2**self.mantissa - 1)
        steps = torch.where(field > 0, steps + 2**self.mantissa, steps)
        value = steps * power_of_two(field.clamp(min=1) - 1 + self.lowest - self.mantissa)
        if self.nan is not None:
            value = value.masked_fill(magnitude == self.nan, torch.nan)
        return torch.where(sign > 0, -value, value)


E4M3 = Minifloat(exponent=4, mantissa=3, top=0x7E, nan=0x7F)
E2M3 = Minifloat(exponent=2, mantissa=3, top=0x1F)
E2M1 = Minifloat(exponent=2, mantissa=1, top=0x07)
