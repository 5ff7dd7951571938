"""Random windows of a text's tokens."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..errors import ConfigError


def draw(ids: Sequence[int], samples: int, length: int, seed: int, prefix: Sequence[int] = ()) -> torch.Tensor:
    """At most `samples` windows of `length` tokens -> ids, int64 [windows, length].

    ids: the text's, without special tokens. prefix: what the tokenizer puts in front of every text; each window starts
    with it, as every prompt does. The text is cut into windows from a random place on and some of them are chosen, so
    that no two share a token: halves of them can be compared. The same seed gives the same windows. Raises ConfigError
    if the text is too short for one.
    """
    step = length - len(prefix)
    if step < 1:
        raise ConfigError(f"a window of {length} tokens has no room behind {len(prefix)} special ones: make it longer")
    if len(ids) < step:
        raise ConfigError(
            f"the text has {len(ids)} tokens, too few for one window of {step}: give a longer text, or shorter windows"
        )
    generator = torch.Generator().manual_seed(seed)
    start = int(torch.randint(len(ids) % step + 1, (), generator=generator))
    count = len(ids) // step
    windows = torch.tensor(ids, dtype=torch.int64)[start : start + count * step].view(count, step)
    windows = windows[torch.randperm(count, generator=generator)[:samples]]
    return torch.cat([torch.tensor(prefix, dtype=torch.int64).expand(len(windows), -1), windows], dim=1)
