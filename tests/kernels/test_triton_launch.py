"""What launchers refuse: whatever their kernels would misread or overrun."""

from __future__ import annotations

import pytest
import torch

import megatron_lowbit as lowbit
from tests.tensors import sample

launch = pytest.importorskip("megatron_lowbit.kernels.triton_launch")
CODEC = lowbit.codec("int4:g32")
X = sample(0, (6, 64), torch.float32)
SIZE = CODEC.wire_nbytes(X.shape)


def buffer(*shape: int) -> torch.Tensor:
    return torch.zeros(shape, dtype=torch.uint8)


@pytest.mark.parametrize("x", [X.double(), X.t(), X[:, ::2], X.int()])
def test_tensors_that_would_be_misread(x):
    with pytest.raises(lowbit.ConfigError, match="pass bf16, fp16 or fp32, contiguous"):
        launch.encode(CODEC, x, buffer(10 * SIZE))
    with pytest.raises(lowbit.ConfigError, match="pass bf16, fp16 or fp32, contiguous"):
        launch.reduce(CODEC, buffer(2, 10 * SIZE), x)


@pytest.mark.parametrize("wires", [buffer(4 * SIZE)[1:], buffer(4 * SIZE)[::2], buffer(4 * SIZE).view(torch.int8)])
def test_wires_that_would_be_misread(wires):
    with pytest.raises(lowbit.ConfigError, match="kernels need uint8 at multiples of 16; copy them"):
        launch.encode(CODEC, X, wires)


def test_wires_that_are_too_short():
    message = f"{SIZE - 16} bytes for 1 wires .* int4:g32 needs {SIZE} .*allocate codec.wire_nbytes"
    with pytest.raises(lowbit.ConfigError, match=message):
        launch.encode(CODEC, X, buffer(SIZE - 16))
    with pytest.raises(lowbit.ConfigError, match=message):
        launch.reduce(CODEC, buffer(3, SIZE - 16), X)
    with pytest.raises(lowbit.ConfigError, match=message):
        launch.reduce_encode(CODEC, buffer(3, SIZE), CODEC, X.shape, buffer(SIZE - 16))
    with pytest.raises(lowbit.ConfigError, match="needs"):
        launch.reduce_encode(CODEC, buffer(3, SIZE - 16), CODEC, X.shape, buffer(SIZE))
    with pytest.raises(lowbit.ConfigError, match="4 wires of 16 or 16 bytes: int4:g32 needs 64 or 96 for 4 shards"):
        launch.encode(CODEC, X, buffer(10 * SIZE), 4, (16, 16))
    with pytest.raises(lowbit.ConfigError, match="needs"):
        launch.reduce(CODEC, buffer(1, 3 * 96), X, 4, (96, 96))
    tensors = X, X[0].clone(), 1e-6, 0.0, X.clone(), X.clone()
    with pytest.raises(lowbit.ConfigError, match="needs"):
        launch.reduce_add_rmsnorm(CODEC, buffer(1, SIZE - 16), 6, 1, 0, *tensors)


def test_operators_refuse_what_launchers_refuse(monkeypatch):
    monkeypatch.setenv("LOWBIT_BACKEND", "triton")
    with pytest.raises(lowbit.ConfigError, match="needs"):
        torch.ops.megatron_lowbit.encode(X, buffer(SIZE - 16), CODEC.handle, 1, 0, 0)
