"""Tensors for the tests, and how close two of them are."""

from __future__ import annotations

import torch

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_STRIDES = {
    "contiguous": lambda x: x,
    "transposed": lambda x: x.transpose(0, -1).contiguous().transpose(0, -1),
    "every second": lambda x: x.repeat_interleave(2, 0)[::2],
    "a part": lambda x: torch.nn.functional.pad(x, (3, 2))[..., 3:-2],
}
STRIDES = tuple(_STRIDES)


def sample(seed: int, shape: tuple[int, ...], dtype: torch.dtype, strides: str = "contiguous") -> torch.Tensor:
    """Normal values, the same for the same seed and shape, in memory as `strides` says."""
    return _STRIDES[strides](torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype))


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Of one dtype and shape, and equal to the last bit, NaNs included."""
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def tolerance(x: torch.Tensor, bits: int) -> float:
    """More than the error of one encoding of x: a step of a group that spans all of x, and bf16's rounding."""
    x = x.float()
    return 1.02 * (x.max() - x.min()).item() / (2**bits - 1) + 2**-7 * x.abs().max().item() if x.numel() else 0.0
