"""Code compiled from older files of the kernels must not run again; what is current must not be compiled again."""

import hashlib

from megatron_lowbit.kernels import cpu_affine, cpu_simd


def stamp(function):
    return cpu_simd.jit(function)._cache._cache_file._source_stamp


def test_the_cache_depends_on_the_shared_files(monkeypatch):
    function = cpu_affine._encode.py_func
    assert stamp(function) == stamp(function)
    before = stamp(function)
    monkeypatch.setattr(cpu_simd, "_SOURCES", hashlib.sha256(b"another text"))
    assert stamp(function) != before


def test_compiled_code_is_kept_across_runs():
    import torch

    import megatron_lowbit as lowbit

    codec, x = lowbit.codec("int4:g32"), torch.randn(4, 50)
    codec.decode(codec.encode(x), x.shape, x.dtype)
    for kernel in (cpu_affine._encode, cpu_affine._reduce):
        assert kernel._cache._cache_file._load_index(), "nothing in the cache"
        assert len(kernel.signatures) == 1, "every spec and dtype shares one compiled kernel"
