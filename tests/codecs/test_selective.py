"""selective4: wire and values against an independent oracle, both backends bit for bit, ranges of every rank's own."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import megatron_lowbit as lowbit
from megatron_lowbit.codecs.statistics import Statistics
from tests.codecs import oracle_selective, samples
from tests.codecs.samples import DTYPES, same, same_bits

SHAPES = [(1, 1), (2, 2), (3, 31), (1, 33), (2, 64), (4, 100), (2, 300)]


def bound(features: int, senders: int, rank: int = 0, fraction: str = "1/64") -> tuple[lowbit.codecs.Codec, Statistics]:
    codec = lowbit.codec(f"selective4:outliers={fraction}")
    facts = samples.statistics(features, codec.count(features), senders, seed=features)
    return codec.bind(facts, rank), facts


@pytest.fixture(params=["reference", "numba"])
def backend(request, monkeypatch):
    monkeypatch.setenv("LOWBIT_BACKEND", request.param)
    return request.param


def within(facts: Statistics, rank: int, rows: int, seed: int = 0) -> torch.Tensor:
    """Values a bit wider than the ranges, a few of them halfway between two codes."""
    low, high = facts.low[rank], facts.high[rank]
    steps = torch.randint(-4, 35, (rows, facts.features), generator=torch.Generator().manual_seed(seed))
    noise = torch.rand(rows, facts.features, generator=torch.Generator().manual_seed(seed + 1)) < 0.7
    return low + (steps / 2 + noise * 0.37) * ((high - low) / 15)


@pytest.mark.parametrize("senders", [1, 3])
@pytest.mark.parametrize("fraction", ["1/64", "1/3", "1"])
def test_wire_and_values_match_the_oracle(backend, senders, fraction):
    for rows, features in SHAPES:
        facts, wires, encoded = bound(features, senders, 0, fraction)[1], [], []
        low, high = facts.low.expand(3, -1).numpy(), facts.high.expand(3, -1).numpy()
        for rank in range(3):
            codec = bound(features, senders, rank, fraction)[0]
            x = within(facts, rank % senders, rows, rank) if rank else samples.some_rows(features, rows, features)
            wires.append(codec.encode(x))
            encoded.append(oracle_selective.encode(x.numpy(), low[rank], high[rank], facts.outliers))
            assert bytes(wires[-1].tolist()) == encoded[-1], (features, rank)
            bounds = low[rank : rank + 1], high[rank : rank + 1]
            expected = oracle_selective.decode(encoded[-1:], rows, *bounds, facts.outliers)
            assert same(codec.decode(wires[-1], x.shape, torch.float32), torch.from_numpy(expected))
            assert same(codec.sent_by(rank).decode(wires[-1], x.shape, torch.float32), torch.from_numpy(expected))
        total = torch.empty(rows, features)
        codec.reduce_rows(torch.stack(wires), total)
        expected = oracle_selective.decode(encoded, rows, low, high, facts.outliers)
        assert same(total, torch.from_numpy(expected)), features


def test_backends_agree_bit_for_bit(monkeypatch):
    for seed, features in enumerate([*samples.FEATURES, 4032]):
        for dtype in DTYPES:
            codec, facts = bound(features, 3, seed % 3, ("1/64", "1/5", "1/2", "1")[seed % 4])
            codec = codec.inner if seed % 3 == 2 else codec
            x = torch.cat([samples.some_rows(features, 5, 3 * seed), within(facts, seed % 3, 2)]).to(dtype)
            results = []
            for name in ("reference", "numba"):
                monkeypatch.setenv("LOWBIT_BACKEND", name)
                wires, total = torch.stack([codec.encode(part) for part in (x, -x, x.flip(0))]), torch.empty_like(x)
                codec.reduce_rows(wires, total)
                results.append((wires, codec.decode(wires[0], x.shape, dtype), total))
            assert all(same_bits(a, b) for a, b in zip(*results, strict=True)), (features, dtype)


def test_the_inner_codec_does_the_same_on_split_rows(backend):
    codec, facts = bound(100, 2, 1, "1/10")
    x = torch.cat([within(facts, 1, 5), samples.rows(100, 3)])
    split = torch.cat([torch.from_numpy(part) for part in oracle_selective.split(x.numpy(), facts.outliers)], 1)
    assert same_bits(codec.encode(x), codec.inner.encode(split))
    y = codec.decode(codec.encode(x), x.shape, torch.float32)
    split = torch.cat([torch.from_numpy(part) for part in oracle_selective.split(y.numpy(), facts.outliers)], 1)
    assert same(codec.inner.decode(codec.encode(x), x.shape, torch.float32), split)


def test_error_is_half_a_step_within_the_range_and_the_rest_is_cut_off(backend):
    codec, facts = bound(300, 1)
    kept = [feature for feature in range(300) if feature not in facts.outliers]
    low, high, step = facts.low[0], facts.high[0], (facts.high[0] - facts.low[0]) / 15
    x = within(facts, 0, 200)
    y = codec.decode(codec.encode(x), x.shape, torch.float32)
    error = (y - torch.minimum(torch.maximum(x, low), high)).abs()[:, kept]
    assert (error <= (step / 2 + 2e-6)[kept]).all()
    assert same_bits(y[:, facts.outliers], x[:, facts.outliers].bfloat16().float())


def test_bits_per_value():
    codec = lowbit.codec("selective4")
    assert codec.bits_per_value((512, 4096)) == 4.1875
    assert codec.bits_per_value((512, 4096)) == 8 * bound(4096, 2)[0].encode(torch.zeros(2, 4096)).numel() / (2 * 4096)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_with_a_non_finite_value_is_nan(backend, value, dtype):
    codec, facts = bound(100, 1, 0, "1/20")
    places = [facts.outliers[-1], next(feature for feature in range(100) if feature not in facts.outliers), 99]
    x = torch.zeros(4, 100).to(dtype)
    for row, place in enumerate(places):
        x[row, place] = value
    y = codec.decode(codec.encode(x), x.shape, dtype)
    assert y[:3].isnan().all() and y[3].isfinite().all()
    total = torch.empty_like(x)
    codec.reduce_rows(torch.stack([codec.encode(torch.zeros_like(x)), codec.encode(x)]), total)
    assert total[:3].isnan().all() and total[3].isfinite().all()


def test_every_rank_has_its_own_ranges(backend):
    """Codes of one rank, read with another's ranges, are other values; on the gather leg all have the sum's."""
    codec, facts = bound(64, 4)
    x = within(facts, 2, 3)
    wire = codec.sent_by(2).encode(x)
    own, others = (codec.sent_by(rank).decode(wire, x.shape, torch.float32) for rank in (2, 1))
    assert not torch.equal(own, others)
    assert codec.sent_by(0) is codec
    alike, _ = bound(64, 1)
    assert same_bits(alike.sent_by(3).encode(x), alike.encode(x))


def test_more_ranks_than_ranges_are_refused(backend):
    codec, facts = bound(64, 2)
    wires = torch.stack(3 * [codec.encode(torch.zeros(2, 64))])
    for attempt in (
        lambda: codec.sent_by(2),
        lambda: lowbit.codec("selective4").bind(facts, 5),
        lambda: codec.reduce_rows(wires, torch.empty(2, 64)),
    ):
        with pytest.raises(lowbit.ConfigError, match="ranks or more at a site that was calibrated with 2"):
            attempt()


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 3), st.integers(1, 200), st.sampled_from(["1/64", "1/3", "1"]), st.randoms())
def test_any_bytes_decode_alike_and_lengths_are_exact(rows, features, fraction, random):
    codec, _ = bound(features, 2, 1, fraction)
    size = codec.wire_nbytes((rows, features))
    wires = torch.tensor([list(random.randbytes(size)) for _ in range(2)], dtype=torch.uint8)
    for some, dtype in ((codec, torch.float32), (codec, torch.bfloat16), (codec.inner, torch.float16)):
        results = []
        for name in ("reference", "numba"):
            with pytest.MonkeyPatch.context() as patch:
                patch.setenv("LOWBIT_BACKEND", name)
                out = torch.empty(rows, features, dtype=dtype)
                if out.numel():
                    some.reduce_rows(wires, out)
                results.append((some.decode(wires[0], (rows, features), dtype), out))
                assert some.encode(torch.ones(rows, features)).numel() == size
        assert all(same(a, b) for a, b in zip(*results, strict=True))
    with pytest.raises(lowbit.LowBitError, match=f"needs {size} bytes"):
        codec.decode(torch.zeros(size + 16, dtype=torch.uint8), (rows, features), torch.float32)


def test_a_senders_inner_codec_is_its_own(backend):
    codec, facts = bound(64, 3)
    split = torch.cat(oracle_selective.split(within(facts, 2, 3), facts.outliers), 1)
    assert codec.inner is not None  # kept from now on
    assert same_bits(codec.sent_by(2).inner.encode(split), codec.bind(facts, 2).inner.encode(split))
