"""Windows are pieces of the text that share no token, and the same for the same seed."""

import pytest
import torch

from megatron_lowbit.calibration.windows import draw
from megatron_lowbit.errors import ConfigError

IDS = list(range(100, 1103))


def test_windows_are_pieces_of_the_text_that_share_nothing():
    windows = draw(IDS, 10, 64, seed=0)
    assert windows.shape == (10, 64) and windows.dtype == torch.int64
    assert (windows.diff(dim=1) == 1).all() and windows.unique().numel() == windows.numel()
    assert windows.min() >= 100 and windows.max() <= 1102


def test_the_seed_decides():
    assert torch.equal(draw(IDS, 8, 32, seed=3), draw(IDS, 8, 32, seed=3))
    assert not torch.equal(draw(IDS, 8, 32, seed=3), draw(IDS, 8, 32, seed=4))


def test_nobody_elses_random_numbers_change():
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    draw(IDS, 8, 32, seed=3)
    assert torch.equal(torch.rand(3), expected)


def test_a_short_text_gives_fewer():
    assert draw(IDS, 64, 500, seed=0).shape == (2, 500)
    assert draw(IDS, 64, 1003, seed=0)[0].tolist() == IDS


def test_every_window_begins_as_a_prompt_does():
    windows = draw(IDS, 4, 16, seed=0, prefix=[7, 8])
    assert windows.shape == (4, 16) and windows[:, :2].tolist() == [[7, 8]] * 4
    assert (windows[:, 2:] >= 100).all()


@pytest.mark.parametrize(
    "length, prefix, message",
    [
        (1004, [], "the text has 1003 tokens, too few for one window of 1004: give a longer text, or shorter windows"),
        (2, [7, 8], "a window of 2 tokens has no room behind 2 special ones: make it longer"),
    ],
)
def test_no_window(length, prefix, message):
    with pytest.raises(ConfigError, match=message):
        draw(IDS, 1, length, seed=0, prefix=prefix)
