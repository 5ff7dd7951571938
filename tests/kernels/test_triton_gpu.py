"""The kernels on a GPU, where Triton compiles them: every codec against its definition on the CPU, bit for bit, and
what an interpreter cannot show: streams, graphs, memory, addresses beyond 2**31, ranks that share a device.

`make test-gpu`. Most of the time goes into compiling, so several processes pay: PYTEST_ARGS="-q -n 8".
"""

from __future__ import annotations

import os

import pytest
import torch

import megatron_lowbit as lowbit
from megatron_lowbit.codecs import fused
from tests.codecs import samples
from tests.codecs.test_every_codec import bound, fits
from tests.kernels.test_triton import ALL, DTYPES, encoded, fast_and_slow, launch
from tests.ranks import run_ranks
from tests.tensors import sample

INTERPRETED = os.environ.get("TRITON_INTERPRET", "") == "1"
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
    pytest.mark.skipif(INTERPRETED, reason="Triton interprets its kernels: choose these tests with -m gpu"),
]
DEVICE = "cuda"
ODD = (292, 100, 33, 7)
MARGIN = 32
TYPICAL = ["int4:g32", "int8:g128:sym", "int5:g32:spike", "gauss4:g128", "gauss3:g256:trellis", "nvfp4", "fp8:g128"]
TYPICAL = [spec for spec in TYPICAL if spec in ALL]


@pytest.fixture(autouse=True)
def codecs_on_the_cpu_run_as_defined(monkeypatch):
    monkeypatch.setenv("LOWBIT_BACKEND", "reference")


@pytest.fixture
def as_users_do(monkeypatch):
    monkeypatch.delenv("LOWBIT_BACKEND")


def cases(spec: str):
    """(number, codec, features, dtype): rows of whole groups and others, every dtype, other pairs for each spec."""
    first = ALL.index(spec)
    for n, features in enumerate((512, ODD[first % 4], ODD[(first + 1) % 4] if first % 2 else 512)):
        features = features if fits(lowbit.codec(spec), features) else 256
        yield n, bound(spec, features), features, DTYPES[(n + first) % 3]


def within(tensor: torch.Tensor, value: int) -> torch.Tensor:
    """A place of that size and kind on the GPU with a margin around it, all filled with `value`."""
    buffer = torch.full((tensor.numel() + 2 * MARGIN,), value, dtype=tensor.dtype, device=DEVICE)
    return buffer[MARGIN:-MARGIN].view(tensor.shape)


def untouched(tensor: torch.Tensor, value: int) -> bool:
    """Whether the margin around it is as `within` left it."""
    buffer = torch.as_strided(tensor, (tensor.numel() + 2 * MARGIN,), (1,), tensor.storage_offset() - MARGIN)
    return bool((buffer[:MARGIN] == value).all() and (buffer[-MARGIN:] == value).all())


@pytest.mark.parametrize("spec", fast_and_slow)
def test_encode(spec):
    for n, codec, features, dtype in cases(spec):
        x = samples.rows(features, n).to(dtype)
        for own in {codec, codec.inner}:
            expected = encoded(own, x)
            wire = within(expected, 0xA5)
            launch.encode(own, x.to(DEVICE), wire)()
            assert torch.equal(wire.cpu(), expected) and untouched(wire, 0xA5), (own, features, dtype)


@pytest.mark.parametrize("spec", fast_and_slow)
def test_reduce(spec):
    for n, codec, features, dtype in cases(spec):
        parts = [samples.rows(features, n + seed) for seed in range(1 + n)]
        for own in {codec, codec.inner}:
            wires = torch.stack([encoded(own.sent_by(rank), x) for rank, x in enumerate(parts)])
            expected = torch.empty(parts[0].shape, dtype=dtype)
            own.define_reduce(wires, expected)
            values = within(expected, 7)
            launch.reduce(own, wires.to(DEVICE), values)()
            assert samples.same_bits(values.cpu(), expected) and untouched(values, 7), (own, features, dtype)


@pytest.mark.parametrize("spec", fast_and_slow)
def test_reduce_encode(spec):
    """With the same codec, and into that of the next spec which has room for the same rows."""
    others = [other for other in ALL if lowbit.codec(other).granularity(7) != 7]
    other = others[ALL.index(spec) % len(others)]
    for n, codec, features, _ in list(cases(spec))[:2]:
        targets = [codec, bound(other, features)] if n and fits(lowbit.codec(other), features) else [codec]
        for source, target in ((codec, target) for target in targets):
            if source.transform == target.transform:
                source, target = source.inner, target.inner
            parts = [samples.rows(features, n + seed) for seed in range(3)]
            wires = torch.stack([encoded(source.sent_by(rank), x) for rank, x in enumerate(parts)])
            total = torch.empty(parts[0].shape)
            source.define_reduce(wires, total)
            expected = encoded(target, total)
            wire = within(expected, 0xA5)
            launch.reduce_encode(source, wires.to(DEVICE), target, tuple(total.shape), wire)()
            assert torch.equal(wire.cpu(), expected) and untouched(wire, 0xA5), (source, target, features)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("features", [4096, 292])
@pytest.mark.parametrize("spec", TYPICAL[:2])
def test_reduce_add_rmsnorm(spec, features, dtype, monkeypatch):
    codec, tensors = lowbit.codec(spec), {}
    wires = torch.stack([codec.encode(sample(seed, (5, features), dtype)) for seed in range(3)])
    residual, weight = sample(7, (5, features), dtype), sample(8, (features,), torch.bfloat16)
    for device, backend in (("cpu", "reference"), (DEVICE, "triton")):
        monkeypatch.setenv("LOWBIT_BACKEND", backend)
        outcome = torch.empty(2, 5, features, dtype=dtype, device=device)
        given = (x.to(device) for x in (residual, weight))
        fused.reduce_add_rmsnorm(codec, wires.to(device), None, *given, 1e-5, 1.0, *outcome)
        tensors[backend] = outcome.cpu()
    assert samples.same_bits(tensors["triton"], tensors["reference"])


@pytest.mark.parametrize("offset", [1, 3])
@pytest.mark.parametrize("spec", TYPICAL)
def test_tensors_that_begin_anywhere(spec, offset):
    """A view that starts at an odd element cannot be read 16 bytes at a time."""
    codec, x = bound(spec, 512), sample(0, (6, 512), torch.bfloat16)
    expected, values = encoded(codec, x), torch.empty_like(x)
    codec.define_reduce(expected[None], values)
    buffer = torch.zeros(x.numel() + 2 * MARGIN, dtype=x.dtype, device=DEVICE)
    view = buffer[offset : offset + x.numel()].view(x.shape)
    view.copy_(x)
    assert view.data_ptr() % 16
    wire = torch.empty(expected.shape, dtype=torch.uint8, device=DEVICE)
    codec.encode_rows(view, wire)
    launch.encode(codec, view, wire)()
    assert torch.equal(wire.cpu(), expected)
    view.zero_()
    launch.reduce(codec, wire[None], view)()
    assert samples.same_bits(view.cpu(), values)
    assert not buffer[:offset].any() and not buffer[offset + x.numel() :].any()


class Steps:
    """What two ranks of a two-step all-reduce do on one device, without the network, as users get it."""

    def __init__(self, spec: str, shape: tuple[int, int]) -> None:
        self.codec, self.shape = bound(spec, shape[1]), shape
        nbytes = self.codec.wire_nbytes(shape)
        self.inputs = torch.zeros(2, *shape, dtype=torch.bfloat16, device=DEVICE)
        self.wires = torch.zeros(2, nbytes, dtype=torch.uint8, device=DEVICE)
        self.wire = torch.zeros(nbytes, dtype=torch.uint8, device=DEVICE)
        self.out = torch.zeros(shape, dtype=torch.bfloat16, device=DEVICE)

    def __call__(self) -> None:
        codec = self.codec
        for x, wire in zip(self.inputs, self.wires):
            codec.encode_rows(x, wire)
        fused.reduce_encode(codec, self.wires, codec, self.shape, self.wire, lambda: pytest.fail("no kernel"))
        codec.reduce_rows(self.wire[None], self.out)

    def check(self, inputs: torch.Tensor) -> None:
        """Whether out is what the definition makes of `inputs` on the CPU."""
        codec, total, out = self.codec, torch.empty(self.shape), torch.empty(self.shape, dtype=torch.bfloat16)
        codec.inner.define_reduce(torch.stack([encoded(codec, x) for x in inputs]), total)
        codec.define_reduce(encoded(codec.inner, total)[None], out)
        assert samples.same_bits(self.out.cpu(), out)


def pair(seed: int, shape: tuple[int, int]) -> torch.Tensor:
    return torch.stack([sample(2 * seed + n, shape, torch.bfloat16) for n in range(2)])


@pytest.mark.usefixtures("as_users_do")
@pytest.mark.parametrize("spec", TYPICAL)
def test_graphs_replay_with_other_inputs(spec, monkeypatch):
    steps = Steps(spec, (33, 512))
    steps()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        steps()
    for seed in range(3):
        steps.inputs.copy_(pair(seed, steps.shape))
        graph.replay()
        torch.cuda.synchronize()
        monkeypatch.setenv("LOWBIT_BACKEND", "reference")
        steps.check(pair(seed, steps.shape))
        monkeypatch.delenv("LOWBIT_BACKEND")


@pytest.mark.usefixtures("as_users_do")
@pytest.mark.parametrize("spec", TYPICAL)
def test_the_current_stream_is_used(spec, monkeypatch):
    """Inputs arrive late on a stream: kernels on another one would read what was there before."""
    steps, stream = Steps(spec, (33, 512)), torch.cuda.Stream()
    steps()
    torch.cuda.synchronize()
    late = pair(5, steps.shape).to(DEVICE)
    with torch.cuda.stream(stream):
        torch.cuda._sleep(200_000_000)  # clock cycles: some tenth of a second
        steps.inputs.copy_(late)
        steps()
    stream.synchronize()
    monkeypatch.setenv("LOWBIT_BACKEND", "reference")
    steps.check(pair(5, steps.shape))


@pytest.mark.usefixtures("as_users_do")
@pytest.mark.parametrize("spec", TYPICAL)
def test_nothing_is_allocated_and_nobody_waits(spec):
    steps = Steps(spec, (33, 512))
    steps()
    torch.cuda.synchronize()
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            steps()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == before


@pytest.mark.usefixtures("as_users_do")
@pytest.mark.parametrize("spec", TYPICAL[:2])
def test_compiled_by_pytorch(spec):
    codec, x = lowbit.codec(spec), sample(0, (33, 512), torch.bfloat16).to(DEVICE)
    torch._dynamo.reset()
    there_and_back = torch.compile(lambda x: codec.decode(codec.encode(x * 2), x.shape, x.dtype) + 1, fullgraph=True)
    assert samples.same_bits(there_and_back(x), codec.decode(codec.encode(x * 2), x.shape, x.dtype) + 1)


@pytest.mark.parametrize("spec", ["int8:g128", "int4:g32"])
def test_beyond_2_to_the_31(spec):
    """More than 2**31 values, and as int8 more bytes than that: rows repeat after 7, which no power of two does."""
    period, features = 7, 8192
    rows = 2**31 // features + 5
    if torch.cuda.mem_get_info()[0] < 16 << 30:
        pytest.skip("needs 16 GiB of free memory on the GPU")
    codec, few = lowbit.codec(spec), sample(0, (period, features), torch.bfloat16)
    few_wire, few_out = encoded(codec, few), torch.empty_like(few)
    codec.define_reduce(few_wire[None], few_out)
    x = few.to(DEVICE).repeat(rows // period + 1, 1)[:rows]
    wire = torch.full((codec.wire_nbytes(x.shape),), 0xA5, dtype=torch.uint8, device=DEVICE)
    launch.encode(codec, x, wire)()
    whole, part = codec.split(wire, *x.shape), codec.split(few_wire.to(DEVICE), *few.shape)
    for name in part:
        assert repeats(whole[name].view(rows, -1), part[name].view(period, -1)), name
    x.zero_()
    launch.reduce(codec, wire[None], x)()
    assert repeats(x, few_out.to(DEVICE))


def repeats(tall: torch.Tensor, few: torch.Tensor) -> bool:
    """Whether the rows of `tall` are those of `few`, again and again; without a copy of it all."""
    return all(bool((tall[first :: len(few)] == row).all()) for first, row in enumerate(few))


def _sum(rank: int, world: int, spec: str, algorithm: str) -> dict:
    x, residual, weight = (tensor.to(DEVICE) for tensor in _given(rank))
    result = lowbit.all_reduce(x, spec, algorithm=algorithm, min_bytes=0)
    normed, _ = lowbit.all_reduce_add_rmsnorm(x, residual, weight, spec, algorithm=algorithm, min_bytes=0)
    return {"sum": result.cpu(), "normed": normed.cpu(), "backends": list(lowbit.stats()["all_reduce"]["backends"])}


def _given(rank: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """This rank's partial sum; residual and weight of all."""
    return (
        sample(rank, (37, 256), torch.bfloat16),
        sample(8, (37, 256), torch.bfloat16),
        sample(9, (256,), torch.float32),
    )


@pytest.mark.usefixtures("as_users_do")
@pytest.mark.parametrize("algorithm", ["one-shot", "two-step"])
@pytest.mark.parametrize("spec", ["int4:g32", "int4:g32/int8:g128"])
def test_ranks_that_share_the_gpu(spec, algorithm, monkeypatch):
    ranks = run_ranks(3, _sum, spec, algorithm)
    monkeypatch.setenv("LOWBIT_BACKEND", "reference")
    expected = lowbit.simulate.all_reduce([_given(rank)[0] for rank in range(3)], spec, algorithm)
    _, residual, weight = _given(0)
    normed = torch.empty_like(residual)
    fused.add_rmsnorm(expected.clone(), residual, weight, 1e-6, 0.0, normed)
    for result in ranks:
        assert samples.same_bits(result["sum"], expected) and samples.same_bits(result["normed"], normed)
        assert result["backends"] == ["triton"]
