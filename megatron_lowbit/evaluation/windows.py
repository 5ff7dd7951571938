"""Consecutive windows of a text, and which of their tokens count.

With a stride below the window's length, windows overlap: a token is scored once, in the first window that holds it, so
that it is predicted from at least `length - stride` tokens (the first window's excepted).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..errors import ConfigError


@dataclass(frozen=True)
class Window:
    """ids: int64 [length]. Tokens from `first` on are scored; each is predicted from those before it."""

    ids: torch.Tensor
    first: int

    @property
    def scored(self) -> int:
        return len(self.ids) - self.first


def consecutive(
    ids: Sequence[int], length: int, stride: int | None = None, count: int | None = None, prefix: Sequence[int] = ()
) -> list[Window]:
    """The text's windows in order, `count` of them at most; what is left of the text at its end is not used.

    ids: the text's, without special tokens. prefix: what the tokenizer puts in front of every text; it is part of each
    window and never scored. stride: how far a window is behind the one before, None: no overlap. Raises ConfigError for
    lengths and strides that make no sense, and for a text that is too short for the windows that were asked for.
    """
    body = length - len(prefix)
    stride = body if stride is None else stride
    if body < 2:
        raise ConfigError(f"a window of {length} tokens has {body} behind {len(prefix)} special ones: give 2 or more")
    if not 1 <= stride <= body:
        raise ConfigError(f"the stride is {stride}: give 1 to {body} tokens, or leave it out for windows side by side")
    if count is not None and count < 1:
        raise ConfigError(f"{count} windows were asked for: give 1 or more")
    there = (len(ids) - body) // stride + 1 if len(ids) >= body else 0
    if there < (count or 1):
        need = body + ((count or 1) - 1) * stride
        raise ConfigError(
            f"the text has {len(ids)} tokens, and {count or 1} windows of {body} need {need}: give a longer text, or "
            "fewer or shorter windows"
        )
    text, front = torch.tensor(ids, dtype=torch.int64), torch.tensor(prefix, dtype=torch.int64)
    windows = []
    for index in range(there if count is None else count):
        part = text[index * stride : index * stride + body]
        overlap = body - stride if index else (0 if prefix else 1)  # nothing precedes the very first token
        windows.append(Window(torch.cat([front, part]), len(prefix) + max(overlap, 0 if prefix else 1)))
    return windows
