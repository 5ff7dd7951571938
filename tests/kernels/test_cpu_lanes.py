"""Operations across lanes: against NumPy's fp32, with and without AVX-512."""

import os
import subprocess
import sys

import numba
import numpy as np
import pytest

from megatron_lowbit.kernels import cpu_lanes as across
from megatron_lowbit.kernels import cpu_simd as simd

HOST_HAS_AVX512 = across._HAS_AVX512


@pytest.fixture(params=[False, True], ids=["tree", "avx512"])
def avx512(request, monkeypatch):
    """What is compiled under it must be defined under it: a compiled function keeps its choice."""
    if request.param and not HOST_HAS_AVX512:
        pytest.skip("this processor has no AVX-512")
    monkeypatch.setattr(across, "_HAS_AVX512", request.param)
    return request.param


def random(seed: int, exponents: int = 20) -> np.ndarray:
    """32 fp32 values of very different size: the order of a sum matters."""
    rng = np.random.default_rng(seed)
    return (rng.standard_normal(32) * 2.0 ** rng.integers(-exponents, exponents, 32)).astype(np.float32)


def apply(function, *arguments, dtype=np.float32) -> np.ndarray:
    """A compiled function(out address, argument addresses...) -> the 32 words it writes."""
    out = np.zeros(32, dtype)
    function(out.ctypes.data, *(argument.ctypes.data for argument in arguments))
    return out


def uses_avx512(function) -> bool:
    return any("avx512.permvar" in text for text in function.inspect_llvm().values())


def test_butterfly_adds_and_subtracts_at_distances_1_to_16():
    @numba.njit
    def run(out, x):
        simd.store_fp32(out, across.butterfly(simd.load_fp32(x)))

    for seed in range(20):
        x = random(seed)
        expected = x.copy()
        for h in (1, 2, 4, 8, 16):
            pairs = expected.reshape(-1, 2, h)
            a, b = pairs[:, 0], pairs[:, 1]
            expected = np.stack([a + b, a - b], 1).reshape(32)
        assert np.array_equal(apply(run, x).view(np.int32), expected.view(np.int32))
    unit = np.eye(32, dtype=np.float32)
    matrix = np.stack([apply(run, row) for row in unit])
    assert np.array_equal(matrix @ matrix, 32 * unit) and np.array_equal(matrix[0], np.ones(32))


def test_fold_adds_the_upper_half_to_the_lower_one():
    @numba.njit
    def run(out, x):
        simd.store_word(out, simd.as_int(across.fold(simd.load_fp32(x))))

    differ = 0
    for seed in range(30):
        x = random(seed)
        sums = x
        while len(sums) > 1:
            sums = sums[: len(sums) // 2] + sums[len(sums) // 2 :]
        result = apply(run, x)
        assert result[0].tobytes() == sums[0].tobytes()
        differ += result[0] != np.add.accumulate(x)[-1]
    assert differ > 5, "these values do not tell one order from another"
    assert np.signbit(apply(run, np.full(32, -0.0, np.float32))[0]), "the sum of minus zeros is one"


def test_is_odd_collects_the_lowest_bits():
    @numba.njit
    def run(out, x):
        simd.store_word(out, across.is_odd(simd.load_fp32(x)))

    for seed in range(10):
        x = np.random.default_rng(seed).integers(-(2**31), 2**31, 32).astype(np.int32)
        expected = sum(int(v & 1) << lane for lane, v in enumerate(x))
        assert apply(run, x, dtype=np.uint32)[0] == expected


def test_lanes_halves_and_shifts():
    @numba.njit
    def run(out, before, x):
        before, value = simd.load_fp32(before), simd.load_fp32(x)
        simd.store_fp32(out, across.lanes())
        simd.store_fp32(out + 128, across.halves(np.int32(7), np.int32(-9)))
        simd.store_fp32(out + 256, across.halves(np.float32(1), np.float32(-2)))
        simd.store_fp32(out + 384, across.swap_halves(value))
        simd.store_fp32(out + 512, across.shifted1(before, value))
        simd.store_fp32(out + 640, across.shifted2(before, value))

    before, x, out = np.arange(100, 132, dtype=np.int32), np.arange(32, dtype=np.int32), np.zeros((6, 32), np.int32)
    run(out.ctypes.data, before.ctypes.data, x.ctypes.data)
    assert out[0].tolist() == list(range(32))
    assert out[1].tolist() == [7] * 16 + [-9] * 16
    assert out[2].view(np.float32).tolist() == [1.0] * 16 + [-2.0] * 16
    assert out[3].tolist() == [*range(16, 32), *range(16)]
    assert out[4].tolist() == [131, *range(31)]
    assert out[5].tolist() == [130, 131, *range(30)]


def test_lookup_reads_anywhere():
    @numba.njit
    def run(out, table, indices):
        simd.store_fp32(out, across.lookup(table, simd.load_fp32(indices)))

    table = np.random.default_rng(0).integers(-(2**31), 2**31, 20000).astype(np.int32)
    for seed in range(5):
        indices = np.random.default_rng(seed).integers(0, 20000, 32).astype(np.int32)
        assert np.array_equal(apply(run, table, indices, dtype=np.int32), table[indices])


def test_lookup16_reads_a_table_of_16_words(avx512):
    @numba.njit
    def run(out, table, indices):
        simd.store_fp32(out, across.lookup16(table, simd.load_fp32(indices)))

    rng = np.random.default_rng(1)
    memory = rng.integers(-(2**31), 2**31, 19).astype(np.int32)
    for start in range(4):  # tables lie at multiples of 4 bytes
        for indices in (np.arange(32) % 16, np.full(32, 15), *rng.integers(0, 16, (4, 32))):
            found = apply(run, memory[start:], indices.astype(np.int32), dtype=np.int32)
            assert np.array_equal(found, memory[start:][indices])
    assert uses_avx512(run) == avx512


def test_search16_counts_the_thresholds_below(avx512):
    @numba.njit
    def run(out, x, table, count):
        simd.store_fp32(out, across.search16(simd.load_fp32(x), table, count))

    for count in (1, 2, 4, 8, 16):
        table = np.full(16, -99, np.float32)  # what lies behind the thresholds is not looked at
        table[: count - 1] = np.sort(random(count, 3)[: count - 1])
        own = table[: count - 1]
        around = np.concatenate([own, np.nextafter(own, np.float32(9e9)), np.nextafter(own, np.float32(-9e9))])
        for x in (random(count, 4), np.resize(np.append(around, np.float32([0, -0.0, np.inf, -np.inf])), (64,))):
            for part in np.split(x, len(x) // 32):
                out, part = np.zeros(32, np.int32), np.ascontiguousarray(part)
                run(out.ctypes.data, part.ctypes.data, table.ctypes.data, count)
                assert out.tolist() == [int((own < v).sum()) for v in part]
        out, nans = np.full(32, 9, np.int32), np.full(32, np.nan, np.float32)
        run(out.ctypes.data, nans.ctypes.data, table.ctypes.data, count)
        assert not out.any(), "a NaN is above nothing"
    assert uses_avx512(run) == avx512


def test_what_numba_compiles_for_counts():
    """Not what the processor has: LLVM ends the process over an instruction that its target lacks."""
    script = """
import numba, numpy as np
from megatron_lowbit.kernels import cpu_lanes as across, cpu_simd as simd

@numba.njit
def run(out, table):
    simd.store_fp32(out, across.lookup16(table, simd.and_(across.lanes(), np.int32(15))))

out, table = np.zeros(32, np.int32), np.arange(16, dtype=np.int32) * 3
run(out.ctypes.data, table.ctypes.data)
print(across._HAS_AVX512, out.tolist() == [*table, *table])
"""
    environment = os.environ | {"NUMBA_ENABLE_AVX": "0"}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert done.stdout == "False True\n", done.stderr
