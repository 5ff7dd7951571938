"""Which implementation runs, and that a wish that cannot be met is an error."""

import pytest
import torch

import megatron_lowbit as lowbit
from megatron_lowbit import kernels
from megatron_lowbit.codecs import backend

CPU = torch.device("cpu")


def test_default_is_numba_on_cpu_and_it_is_really_called(monkeypatch):
    from megatron_lowbit.kernels import cpu_affine

    monkeypatch.delenv("LOWBIT_BACKEND", raising=False)
    assert backend.of(CPU) == "numba"
    calls = []
    monkeypatch.setattr(cpu_affine, "encode_rows", lambda *a: calls.append("numba"))
    lowbit.codec("int4:g32").encode(torch.zeros(1, 32))
    assert calls == ["numba"]
    monkeypatch.setenv("LOWBIT_BACKEND", "reference")
    lowbit.codec("int4:g32").encode(torch.zeros(1, 32))
    assert calls == ["numba"] and backend.of(CPU) == "reference"
    assert kernels.__version__ == "0"


@pytest.mark.parametrize("name, message", [("fast", "unknown"), ("triton", "not available in this version")])
def test_wrong_names_are_refused(monkeypatch, name, message):
    monkeypatch.setenv("LOWBIT_BACKEND", name)
    with pytest.raises(lowbit.ConfigError, match=message):
        lowbit.codec("int4:g32").encode(torch.zeros(1, 32))


def test_numba_cannot_run_on_cuda(monkeypatch):
    monkeypatch.setenv("LOWBIT_BACKEND", "numba")
    with pytest.raises(lowbit.ConfigError, match="cannot run on cuda"):
        backend.of(torch.device("cuda"))


def test_without_numba_the_user_is_told(monkeypatch):
    monkeypatch.setattr(backend, "find_spec", lambda name: None)
    with pytest.warns(UserWarning, match=r"pip install 'megatron-lowbit\[cpu\]'"):
        assert backend._choose.__wrapped__("cpu", "") == "reference"
    with pytest.raises(lowbit.ConfigError, match="not installed"):
        backend._choose.__wrapped__("cpu", "numba")
