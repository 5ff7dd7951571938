"""The list of what is compared: written out, and the same whenever it is asked for."""

import pytest

from megatron_lowbit.tuning.candidates import SIZES, candidates


@pytest.mark.parametrize(
    "nested, device, nbytes, expected",
    [
        (False, "cpu", 16384, "exact one-shot/1 two-step/1"),
        (True, "cpu", 16384, "exact one-shot/1 two-step/1 hierarchical/1"),
        (False, "cpu", 1 << 20, "exact one-shot/1 one-shot/2 two-step/1 two-step/2"),
        (False, "cpu", 1 << 19, "exact one-shot/1 two-step/1"),
        (False, "cpu", 4 << 20, "exact one-shot/1 one-shot/2 one-shot/8 two-step/1 two-step/2 two-step/8"),
        (False, "cpu", 64 << 20, "exact one-shot/1 one-shot/32 one-shot/128 two-step/1 two-step/32 two-step/128"),
        (False, "cpu", 5 << 20, "exact one-shot/1 one-shot/2 one-shot/10 two-step/1 two-step/2 two-step/10"),
        (False, "cuda", 16384, "exact one-shot/0 two-step/0"),
        (True, "cuda", 2 << 20, "exact one-shot/0 one-shot/4 two-step/0 two-step/4 hierarchical/0 hierarchical/4"),
    ],
)
def test_exact_first_and_then_what_the_nodes_allow(nested, device, nbytes, expected):
    assert [str(one) for one in candidates(nested, device, nbytes)] == expected.split()
    assert candidates(nested, device, nbytes) == candidates(nested, device, nbytes)


def test_sizes_are_those_of_decoding_up_to_those_of_long_prompts():
    assert SIZES[0] == 16 << 10 and SIZES[-1] == 64 << 20 and list(SIZES) == sorted(SIZES)
