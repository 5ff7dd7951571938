"""The simulation against an independent composition of encode and decode, token by token."""

import pytest
import torch

import megatron_lowbit as lowbit


def through(spec, x):
    codec = lowbit.codec(spec)
    return codec.decode(codec.encode(x), x.shape, torch.float32)


@pytest.mark.parametrize("world", [2, 3, 5, 8])
@pytest.mark.parametrize("features", [32, 96, 100, 512])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_against_the_definition(world, features, dtype):
    partials = [torch.randn(4, features, generator=torch.Generator().manual_seed(r)).to(dtype) for r in range(world)]
    total = through("int4:g32", partials[0])
    for partial in partials[1:]:
        total = total + through("int4:g32", partial)
    assert torch.equal(lowbit.simulate.all_reduce(partials, "int4:g32", "one-shot"), total.to(dtype))
    both = lowbit.simulate.all_reduce(partials, "int4:g32/int8:g32", "two-step")
    assert torch.equal(both, through("int8:g32", total).to(dtype))
    exact = lowbit.simulate.all_reduce(partials, "int4:g32", "exact")
    assert torch.allclose(exact.float(), torch.stack(partials).float().sum(0), atol=0.1)


@pytest.mark.parametrize("algorithm", ["one-shot", "two-step"])
def test_a_token_does_not_depend_on_its_batch(algorithm):
    partials = [torch.randn(6, 96, generator=torch.Generator().manual_seed(r)) for r in range(3)]
    together = lowbit.simulate.all_reduce(partials, "int4:g32/int6:g32", algorithm)
    for token in range(6):
        alone = lowbit.simulate.all_reduce([p[token : token + 1] for p in partials], "int4:g32/int6:g32", algorithm)
        assert torch.equal(alone[0], together[token])


def test_auto_follows_the_policy():
    partials = [torch.randn(4, 64, generator=torch.Generator().manual_seed(r)) for r in range(3)]
    for count, algorithm in ((2, "one-shot"), (3, "two-step")):
        assert torch.equal(
            lowbit.simulate.all_reduce(partials[:count], "int4:g32", "auto"),
            lowbit.simulate.all_reduce(partials[:count], "int4:g32", algorithm),
        )
    assert torch.equal(lowbit.simulate.all_reduce(partials[:1], "int4:g32"), partials[0])


@pytest.mark.parametrize(
    "partials, message",
    [
        ([], "expected partial sums"),
        ([torch.zeros(2, dtype=torch.int32)], "dtype int32"),
        (3, "expected partial sums, got int"),
        ([torch.zeros(2), torch.zeros(3)], "rank 1 has shape"),
        ([torch.zeros(2), torch.zeros(2).half()], "rank 1 has shape"),
    ],
)
def test_bad_input(partials, message):
    with pytest.raises(lowbit.ConfigError, match=message):
        lowbit.simulate.all_reduce(partials, "int4:g32")
