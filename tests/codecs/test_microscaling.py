"""Float formats: wire and values against an independent oracle, both backends bit for bit, error within the bound."""

import json
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import megatron_lowbit as lowbit
from tests.codecs import oracle_microscaling as oracle

GOLDEN = json.loads((Path(__file__).parent / "golden.json").read_text())
BLOCKS = {"fp8:g32": 1, "fp8:g256": 1, "mxfp8": 32, "mxfp6": 32, "mxfp4": 32, "nvfp4": 16}  # rows are multiples of it
SPECS = sorted(BLOCKS)
MX = ["mxfp8", "mxfp6", "mxfp4"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def shapes_of(spec: str) -> list[tuple[int, ...]]:
    """Whole vectors, tails, many rows of one block, more than the 32 blocks that kernels take at a time."""
    shapes = [(1, 32), (5, 96), (40, 32), (2, 288), (3, 2, 544), (64,)]
    shapes += [(3, 16), (2, 48), (2, 1072)] if BLOCKS[spec] <= 16 else []
    return shapes + ([(1, 1), (1, 7), (2, 31), (5, 33), (2, 300), (3, 3, 129)] if BLOCKS[spec] == 1 else [])


def sample(shape, seed=0) -> torch.Tensor:
    """Rows and blocks of very different size, outliers, ties, zeros of both signs."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=g) * torch.exp2(torch.randint(-20, 12, (*shape[:-1], 1), generator=g))
    blocks = torch.exp2(torch.randint(-12, 1, (*shape[:-1], -(-shape[-1] // 16)), generator=g))
    x = x * blocks.repeat_interleave(16, -1)[..., : shape[-1]]
    kind = torch.rand(shape, generator=g)
    x = torch.where(kind < 0.1, torch.exp2(x.abs().log2().round()) * 1.25 * x.sign(), x)
    x = torch.where(kind > 0.97, x * 50, x)
    return torch.where((kind > 0.2) & (kind < 0.25), 0.0 * x, x)


def extremes() -> torch.Tensor:
    """Rows of 96 around every threshold of the definitions, and at the ends of fp32."""
    ends = [-149, -140, *range(-130, -112), -106, -105, -104, 0, 127]
    grid = torch.tensor([1, -0.5, 0.75, 1.5, -1.75, 1.9375, 0.0, -0.0, 2.0**-6, 2.0**-9, -(2.0**-12), 2.0**-19])
    rows = [torch.ldexp(grid.double(), torch.tensor(float(e))).float().repeat(8) for e in ends]
    rows += [row * factor for row in rows[2:-1] for factor in (1.3125, 1.3124999)]  # 2688 / 2048, 448 / 256, ...
    rows += [torch.full((96,), v) for v in (0.0, -0.0, 1e-45, -(2.0**127) * 1.5, torch.finfo().max)]
    mixed = torch.cat([torch.full((16,), 2.0**e) for e in (0, -9, -18, -19, -20, -40)])
    return torch.stack([*rows, mixed, mixed.flip(0) * 2.0**-105])


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


def round_trip(codec, x: torch.Tensor) -> torch.Tensor:
    return codec.decode(codec.encode(x), x.shape, x.dtype)


def sqnr(x: torch.Tensor, y: torch.Tensor) -> float:
    return 10 * math.log10(x.double().square().sum() / (x.double() - y).square().sum())


@pytest.fixture(params=["reference", "numba"])
def backend(request, monkeypatch):
    monkeypatch.setenv("LOWBIT_BACKEND", request.param)
    return request.param


@pytest.mark.parametrize("spec", SPECS)
def test_wire_and_values_match_the_oracle(backend, spec):
    codec = lowbit.codec(spec)
    for x in [extremes()] + [sample(shape, 3) for shape in shapes_of(spec)]:
        rows = x.reshape(-1, x.shape[-1])
        wire = codec.encode(x)
        assert bytes(wire.tolist()) == oracle.encode(rows.numpy(), spec)
        expected = torch.from_numpy(oracle.decode(bytes(wire.tolist()), *rows.shape, spec)).view(x.shape)
        assert same_bits(codec.decode(wire, x.shape, torch.float32), expected)


@pytest.mark.parametrize("spec", SPECS)
def test_any_bytes_decode_as_the_oracle_says(backend, spec):
    """Every code under every scale, NaNs, infinities and subnormal scales among them."""
    codec, shape = lowbit.codec(spec), (8, 1024)
    size = codec.wire_nbytes(shape)
    wire = torch.randint(0, 256, (size,), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    expected = torch.from_numpy(oracle.decode(bytes(wire.tolist()), *shape, spec))
    expected = expected.masked_fill(expected.isnan(), torch.nan)
    assert same_bits(codec.decode(wire, shape, torch.float32), expected)


@pytest.mark.parametrize("spec", SPECS)
def test_backends_agree_bit_for_bit(monkeypatch, spec):
    codec, g = lowbit.codec(spec), torch.Generator().manual_seed(2)
    bad = torch.tensor([torch.nan, torch.inf, -1e38])
    for shape in [*shapes_of(spec), (64, 512), (7, 1088)]:
        for dtype in DTYPES:
            x = sample(shape, 5).clamp(-6e4, 6e4).to(dtype)
            if x.numel() > 300:
                x.view(-1)[torch.randint(0, x.numel(), (3,), generator=g)] = bad.to(dtype)
            noise = torch.randint(0, 256, (3, codec.wire_nbytes(shape)), dtype=torch.uint8, generator=g)
            results = []
            for name in ("reference", "numba"):
                monkeypatch.setenv("LOWBIT_BACKEND", name)
                wire = codec.encode(x)
                wires = torch.stack([wire, codec.encode(-x), codec.encode(x.flip(-1))])
                totals = torch.empty(2, x.numel() // shape[-1], shape[-1], dtype=dtype)
                codec.reduce_rows(wires, totals[0])
                codec.reduce_rows(noise, totals[1])
                results.append((wire, codec.decode(wire, shape, dtype), totals))
            assert all(same_bits(a, b) for a, b in zip(*results, strict=True)), (shape, dtype)


@pytest.mark.parametrize("name", sorted(GOLDEN["float_wires"]))
def test_golden_wires(backend, name):
    """Bytes on the wire are a format: they may only change together with its version."""
    features = 43 if name.startswith("fp8") else 32
    x = torch.tensor(GOLDEN["input"][: 2 * features]).view(2, features) / 16
    assert bytes(lowbit.codec(name).encode(x).tolist()).hex() == GOLDEN["float_wires"][name]


values = st.floats(width=32, min_value=-(2.0**100), max_value=2.0**100)


@settings(max_examples=200, deadline=None)
@given(st.lists(values, min_size=1, max_size=70), st.sampled_from(SPECS))
def test_error_is_within_the_bound(row, spec):
    """Half a unit in the last place, half the smallest step, or what saturation cuts off; scales rounded beforehand."""
    x = torch.tensor([row + [0.0] * (-len(row) % BLOCKS[spec])])
    codec, form = lowbit.codec(spec), oracle.format_of(spec)
    y = round_trip(codec, x).double()
    mantissa, step = {"e4m3": (3, 2.0**-9), "e2m3": (3, 2.0**-3), "e2m1": (1, 2.0**-1)}[form.element]
    row_scale = float(x.abs().max()) / (448 * 6)
    for start in range(0, x.shape[1], form.block):
        part = x[0, start : start + form.block].double()
        amax = float(part.abs().max())
        if form.scale == "e8m0":
            low = high = 2.0 ** max(-127, math.frexp(amax)[1] - 1 - form.highest)
        elif form.scale == "bf16":
            low, high = amax / 448 * (1 - 2**-8), amax / 448 * (1 + 2**-8)
        else:
            low = amax / 6 * (1 - 2**-4) - row_scale * 2**-10
            high = amax / 6 * (1 + 2**-4) + row_scale * 2**-10
        rounding = torch.maximum(part.abs() * 2.0 ** -(mantissa + 1), torch.tensor(step / 2 * high))
        bound = torch.maximum(rounding, part.abs() - form.largest * low)
        bound += amax * 2.0**-22 + 2.0**-104  # arithmetic; scales that become 0
        error = (part - y[0, start : start + form.block]).abs()
        assert (error <= bound).all(), (error - bound).max()


@settings(max_examples=80, deadline=None)
@given(st.sampled_from(SPECS), st.integers(-100, 100), st.randoms())
def test_representable_grids_are_exact(spec, exponent, random):
    """All numbers of the element, under a power of two and, in nvfp4, under all block scales."""
    form = oracle.format_of(spec)
    numbers = [v for v in form.table if v == v]
    row = []
    for block in range(4):
        scale = 1.0
        if form.scale == "e4m3":
            scale = 448.0 if block == 0 else random.choice(oracle.E4M3_POSITIVE[:-1])
        row += [scale * v for v in [form.largest, *random.choices(numbers, k=form.block - 1)]]
    x = torch.tensor([row]) * 2.0**exponent
    assert torch.equal(round_trip(lowbit.codec(spec), x), x)


@pytest.mark.parametrize("spec", SPECS)
def test_equivariant_under_sign_and_powers_of_two(backend, spec):
    codec, x = lowbit.codec(spec), sample((8, 96), 3)
    y = round_trip(codec, x)
    for factor in (-1.0, 4.0, -0.125, 2.0**40, 2.0**-40):
        assert same_bits(round_trip(codec, factor * x), factor * y)


@pytest.mark.parametrize("spec", SPECS)
def test_zeros_keep_their_sign(backend, spec):
    codec = lowbit.codec(spec)
    zeros = torch.tensor([0.0, -0.0]).repeat(2, 48)
    assert same_bits(round_trip(codec, zeros), zeros)
    beside = torch.where(torch.arange(96) % 16 == 0, 3.0, zeros)
    beside = torch.where(torch.arange(96) % 16 == 1, -1e-9, beside)  # rounds to zero
    y = round_trip(codec, beside)
    assert torch.equal(torch.signbit(y), torch.signbit(beside)) and (y == 0).sum() == 2 * 90


def test_more_bits_lose_less(backend):
    """Where blocks mix large and small values; the best case of mxfp8 (see the next test for its worst)."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(64, 1024, generator=g) * torch.where(torch.arange(1024) % 64 == 0, 30.0, 1.0)
    ordinary = x.abs() < 8
    errors = [((round_trip(lowbit.codec(spec), x) - x) * ordinary).square().mean() for spec in MX]
    assert errors[0] * 4 < errors[1] and errors[1] * 4 < errors[2], errors


@pytest.mark.parametrize("spec, bits, expected", [
    ("fp8", 8.125, 31.8), ("mxfp8", 8.25, 30.7), ("mxfp6", 6.25, 30.9), ("mxfp4", 4.25, 18.8), ("nvfp4", 4.5, 20.4),
])  # fmt: skip
def test_noise_of_gaussian_data(spec, bits, expected):
    codec, x = lowbit.codec(spec), torch.randn(512, 4096, generator=torch.Generator().manual_seed(0))
    assert abs(sqnr(x, round_trip(codec, x)) - expected) < 0.3
    assert codec.bits_per_value(x.shape) == bits + (32 / 4096 if spec == "nvfp4" else 0)


BAD = [(1, 37), (2, 287)]


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_non_finite_stays_non_finite_and_in_its_block(backend, spec, value, dtype):
    codec, x = lowbit.codec(spec), sample((3, 288), 5).clamp(-6e4, 6e4).to(dtype)
    for row, at in BAD:
        x[row, at] = value
    y = round_trip(codec, x)
    blocks = [(row, slice(at // codec.group * codec.group, (at // codec.group + 1) * codec.group)) for row, at in BAD]
    for block in blocks:
        x[block] = 0
    expected = round_trip(codec, x)
    for block in blocks:
        expected[block] = torch.nan
    assert same_bits(y, expected)


def test_a_row_without_any_finite_block(backend):
    x = torch.full((2, 48), torch.nan)
    x[1] = 1
    y = round_trip(lowbit.codec("nvfp4"), x)
    assert y[0].isnan().all() and torch.equal(y[1], x[1])


@pytest.mark.parametrize("spec", SPECS)
def test_a_row_does_not_see_its_neighbours(backend, spec):
    codec, x = lowbit.codec(spec), sample((9, 96), 7)
    x[4, 5] = torch.nan
    together = round_trip(codec, x)
    for row in range(9):
        assert same_bits(round_trip(codec, x[row : row + 1])[0], together[row])


@pytest.mark.parametrize("spec", ["nvfp4", "mxfp4/nvfp4", "nvfp4/fp8:g256", "mxfp6/mxfp8", "fp8/int8:g128"])
def test_two_step_keeps_tokens_apart(spec):
    partials = [sample((3, 320), seed) for seed in range(4)]
    together = lowbit.simulate.all_reduce(partials, spec)
    for row in range(3):
        alone = lowbit.simulate.all_reduce([x[row : row + 1] for x in partials], spec)
        assert same_bits(alone[0], together[row])
    assert sqnr(sum(partials), together) > 12


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 5), st.integers(0, 20), st.sampled_from(SPECS), st.randoms())
def test_lengths_are_exact(rows, blocks, spec, random):
    codec, shape = lowbit.codec(spec), (rows, blocks * BLOCKS[spec])
    size = codec.wire_nbytes(shape)
    wire = torch.tensor(list(random.randbytes(size)), dtype=torch.uint8)
    assert codec.decode(wire, shape, torch.bfloat16).shape == shape
    assert codec.encode(torch.zeros(shape)).numel() == size
    assert lowbit.simulate.all_reduce([torch.zeros(shape)] * 3, spec).shape == shape
    with pytest.raises(lowbit.LowBitError, match=f"needs {size} bytes"):
        codec.decode(torch.zeros(size + 16, dtype=torch.uint8), shape, torch.bfloat16)


@pytest.mark.parametrize("spec", [spec for spec in SPECS if BLOCKS[spec] > 1])
def test_rows_that_are_no_multiple_of_the_block_are_refused(backend, spec):
    codec, block = lowbit.codec(spec), BLOCKS[spec]
    message = f"{spec} takes rows of a multiple of {block} values, got 100: use fp8 or int4"
    calls = [
        lambda: codec.wire_nbytes((2, 100)),
        lambda: codec.encode(torch.zeros(2, 100)),
        lambda: codec.decode(torch.zeros(16, dtype=torch.uint8), (2, 100), torch.float32),
        lambda: lowbit.simulate.all_reduce([torch.zeros(2, 100)] * 2, spec),
    ]
    for call in calls:
        with pytest.raises(lowbit.ConfigError, match=message):
            call()


def test_what_outliers_leave_must_be_a_multiple_too():
    assert lowbit.codec("mxfp4:outliers=1/64").wire_nbytes((1, 4096)) == 4032 * 17 // 32 + 2 + 2 * 64
    with pytest.raises(lowbit.ConfigError, match="5040 of 5120 features are no outliers: .* a multiple of 32"):
        lowbit.codec("mxfp4:outliers=1/64").wire_nbytes((1, 5120))


@pytest.mark.parametrize("spec", SPECS)
def test_flushing_subnormals_changes_nothing_else(backend, spec):
    """Scales whose own value is subnormal (E8M0 byte 0) still give the normal numbers that they stand for."""
    codec, x = lowbit.codec(spec), extremes()
    x = torch.where(x.abs() < 2.0**-126, 0.0, x)
    wire = codec.encode(x)
    y = codec.decode(wire, x.shape, x.dtype)
    assert torch.set_flush_denormal(True), "this processor cannot"
    try:
        wire_flushed = codec.encode(x)
        flushed = codec.decode(wire, x.shape, x.dtype)
    finally:
        torch.set_flush_denormal(False)
    assert torch.equal(wire_flushed, wire)
    assert same_bits(flushed, torch.where(y.abs() < 2.0**-126, torch.copysign(torch.zeros(()), y), y))


def test_all_formats_share_one_compiled_kernel(monkeypatch):
    from megatron_lowbit.kernels import cpu_microscaling

    monkeypatch.setenv("LOWBIT_BACKEND", "numba")
    for spec in SPECS:
        for dtype in DTYPES:
            round_trip(lowbit.codec(spec), torch.ones(2, 64, dtype=dtype))
    assert len(cpu_microscaling._encode.signatures) == len(cpu_microscaling._reduce.signatures) == 1
