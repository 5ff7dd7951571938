"""Codes of 2 to 8 bits as planes of whole bytes (bit splitting, Flash Communication V2, section 3).

A code of b bits is cut, low bits first, into planes of 8, 4, 2 and 1 bits: int7 = 4 + 2 + 1. Every plane is dense.
Layout of one plane of width w: values are taken in blocks of 32 (a row's last block may be shorter; it is padded with
zero codes to a multiple of 8). A block of n values is s = n*w/8 bytes; byte j holds the values j, j + s, j + 2s, ... ,
the first in its lowest bits. So neighbouring bytes come from neighbouring values: no shuffles on any processor.
"""

from __future__ import annotations

import torch

BLOCK = 32
_PLANES = {2: (2,), 3: (2, 1), 4: (4,), 5: (4, 1), 6: (4, 2), 7: (4, 2, 1), 8: (8,)}


def planes(bits: int) -> tuple[int, ...]:
    """Widths of the planes of a b-bit code, lowest bits first."""
    return _PLANES[bits]


def padded_features(features: int) -> int:
    """Values of a row as stored: a multiple of 8, so that every plane ends on a byte."""
    return -(-features // 8) * 8


def plane_nbytes(rows: int, features: int, width: int) -> int:
    """Bytes of one plane."""
    return rows * padded_features(features) * width // 8


def pack(codes: torch.Tensor, width: int) -> torch.Tensor:
    """codes [rows, features] uint8, each below 2**width -> plane, uint8 [rows, bytes per row]."""
    features = codes.shape[1]
    codes = torch.nn.functional.pad(codes, (0, padded_features(features) - features))
    full = features // BLOCK * BLOCK
    return torch.cat(
        [_pack_blocks(codes[:, :full], BLOCK, width), _pack_blocks(codes[:, full:], codes.shape[1] - full, width)],
        dim=1,
    )


def unpack(plane: torch.Tensor, features: int, width: int) -> torch.Tensor:
    """The inverse of `pack`: plane uint8 [rows, bytes per row] -> codes [rows, features] uint8."""
    full = features // BLOCK * BLOCK
    cut = full * width // 8
    codes = torch.cat(
        [
            _unpack_blocks(plane[:, :cut], BLOCK, width),
            _unpack_blocks(plane[:, cut:], padded_features(features) - full, width),
        ],
        dim=1,
    )
    return codes[:, :features]


def store(views: dict[str, torch.Tensor], name: str, codes: torch.Tensor, bits: int) -> None:
    """codes [rows, values] uint8 -> the sections `name` + width of a wire (`Codec.split`)."""
    shift = 0
    for width in planes(bits):
        views[f"{name}{width}"].copy_(pack((codes >> shift) & (2**width - 1), width).flatten())
        shift += width


def load(views: dict[str, torch.Tensor], name: str, rows: int, values: int, bits: int) -> torch.Tensor:
    """The inverse of `store`: -> codes [rows, values] uint8."""
    codes, shift = torch.zeros(rows, values, dtype=torch.uint8, device=views[f"{name}{planes(bits)[0]}"].device), 0
    for width in planes(bits):
        codes |= unpack(views[f"{name}{width}"].view(rows, -1), values, width) << shift
        shift += width
    return codes


def _pack_blocks(codes: torch.Tensor, block: int, width: int) -> torch.Tensor:
    if codes.numel() == 0:
        return codes.new_empty(codes.shape[0], 0)
    per_byte = 8 // width
    parts = codes.reshape(codes.shape[0], -1, per_byte, block // per_byte)
    out = torch.zeros_like(parts[:, :, 0])
    for k in range(per_byte):
        out |= parts[:, :, k] << (k * width)
    return out.flatten(1)


def _unpack_blocks(plane: torch.Tensor, block: int, width: int) -> torch.Tensor:
    if plane.numel() == 0:
        return plane.new_empty(plane.shape[0], 0)
    per_byte = 8 // width
    parts = plane.reshape(plane.shape[0], -1, 1, block // per_byte)
    shifts = torch.arange(per_byte, dtype=torch.uint8, device=plane.device).view(1, 1, -1, 1) * width
    return ((parts >> shifts) & (2**width - 1)).flatten(1)
