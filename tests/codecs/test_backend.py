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


def test_wrong_names_are_refused(monkeypatch):
    monkeypatch.setenv("LOWBIT_BACKEND", "fast")
    with pytest.raises(lowbit.ConfigError, match="unknown"):
        lowbit.codec("int4:g32").encode(torch.zeros(1, 32))


def test_triton_runs_its_kernels_where_it_is_asked_for(monkeypatch):
    from megatron_lowbit.kernels import triton_launch

    monkeypatch.setenv("LOWBIT_BACKEND", "triton")
    calls = []
    monkeypatch.setattr(triton_launch, "encode", lambda *a: lambda: calls.append("triton"))
    lowbit.codec("int4:g32").encode(torch.zeros(1, 32))
    assert calls == ["triton"] and backend.of(CPU) == "triton"


def test_what_triton_cannot_run_on_is_refused_by_name(monkeypatch):
    choose = backend._choose
    with pytest.raises(lowbit.ConfigError, match="CPU tensors: move them to a GPU, or set TRITON_INTERPRET=1"):
        choose("cpu", None, "triton", interpreted=False)
    with pytest.raises(lowbit.ConfigError, match="xpu tensors"):
        choose("xpu", 0, "triton", interpreted=False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "Tesla T4")
    with pytest.raises(lowbit.ConfigError, match=r"Tesla T4 has compute capability 7.5 .* 8.0 or higher"):
        choose("cuda", 0, "triton", interpreted=False)
    with pytest.warns(UserWarning, match="plain PyTorch on the GPU, many times slower, because Tesla T4"):
        assert choose("cuda", 0, "", interpreted=False) == "reference"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))
    assert choose("cuda", 0, "", interpreted=False) == choose("cuda", 0, "triton", interpreted=False) == "triton"
    monkeypatch.setattr(backend, "version", lambda name: "3.1.0")
    with pytest.raises(lowbit.ConfigError, match=r"triton 3.1.0 is too old: pip install 'triton>=3.2'"):
        choose("cuda", 0, "triton", interpreted=False)
    monkeypatch.setattr(backend, "version", lambda name: "3.3.1")
    with pytest.raises(lowbit.ConfigError, match=r"triton 3.3.1 cannot compile all .*pip install 'triton>=3.4'"):
        choose("cuda", 0, "triton", interpreted=False)


def test_without_triton_the_user_is_told(monkeypatch):
    def missing(name):
        raise backend.PackageNotFoundError(name)

    monkeypatch.setattr(backend, "version", missing)
    with pytest.raises(lowbit.ConfigError, match=r"not installed: pip install 'megatron-lowbit\[gpu\]'"):
        backend._choose("cuda", 0, "triton", interpreted=False)
    with pytest.warns(UserWarning, match="many times slower"):
        assert backend._choose("cuda", 0, "", interpreted=False) == "reference"


def test_numba_cannot_run_on_cuda(monkeypatch):
    monkeypatch.setenv("LOWBIT_BACKEND", "numba")
    with pytest.raises(lowbit.ConfigError, match="cannot run on cuda"):
        backend.of(torch.device("cuda"))


def test_without_numba_the_user_is_told(monkeypatch):
    monkeypatch.setattr(backend, "find_spec", lambda name: None)
    with pytest.warns(UserWarning, match=r"pip install 'megatron-lowbit\[cpu\]'"):
        assert backend._choose("cpu", None, "", interpreted=False) == "reference"
    with pytest.raises(lowbit.ConfigError, match="not installed"):
        backend._choose("cpu", None, "numba", interpreted=False)
