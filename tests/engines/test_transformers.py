"""The engine of Transformers' own tensor parallelism: what holds for DeepSpeed's holds for it."""

import pytest

from tests.engines.test_deepspeed import agreement, check_engine, run_engine
from tests.ranks import run_ranks


@pytest.fixture(scope="module")
def found():
    return run_ranks(2, run_engine, "transformers", timeout=200)


def test_compresses_every_row_parallel_layer_and_says_nothing(found):
    check_engine(found, [])


def test_eight_bits_keep_the_text(found):
    assert agreement(found[0]) >= 0.95
