"""Consecutive windows of a text, and which of their tokens a model has to predict.

Three kinds of models are asked three kinds of questions, and scored alike: a causal model predicts each token from
those before it, an encoder those that are masked, an encoder-decoder the second half of a window from the first.

With a stride below the window's length, windows overlap: a token is scored in the first window that holds it or never,
so that a causal model has at least `length - stride` tokens before it (the first window's excepted).
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch

from ..errors import ConfigError

MASKED = 0.15  # of the tokens: Devlin et al., BERT (2019), section 3.1


@dataclass(frozen=True)
class Window:
    """ids: int64 [length], what the model reads; of two halves of a model, its encoder. decoder_ids: int64 [length],
    what its decoder reads. positions, targets: int64 [scored], of the predictions that are scored, and the tokens that
    they should be."""

    ids: torch.Tensor
    positions: torch.Tensor
    targets: torch.Tensor
    decoder_ids: torch.Tensor | None = None

    @property
    def scored(self) -> int:
        return len(self.targets)

    def inputs(self, device: torch.device) -> dict[str, torch.Tensor]:
        """The arguments of a model of Transformers, a batch of one."""
        given = {"input_ids": self.ids, "decoder_input_ids": self.decoder_ids}
        return {name: ids[None].to(device) for name, ids in given.items() if ids is not None}


def consecutive(
    ids: Sequence[int], length: int, stride: int | None = None, count: int | None = None, prefix: Sequence[int] = ()
) -> list[Window]:
    """The text's windows in order, `count` of them at most; what is left of the text at its end is not used.

    ids: the text's, without special tokens. prefix: what the tokenizer puts in front of every text; it is part of each
    window and never scored. stride: how far a window is behind the one before, None: no overlap. Raises ConfigError for
    lengths and strides that make no sense, and for a text that is too short for the windows that were asked for.
    """
    front, windows = torch.tensor(prefix, dtype=torch.int64), []
    for part, fresh in _parts(ids, length, stride, count, len(prefix)):
        whole = torch.cat([front, part])
        first = len(prefix) + max(fresh, 0 if prefix else 1)  # nothing precedes the very first token
        windows.append(Window(whole, torch.arange(first - 1, len(whole) - 1), whole[first:]))
    return windows


def masked(
    ids: Sequence[int],
    length: int,
    stride: int | None = None,
    count: int | None = None,
    prefix: Sequence[int] = (),
    suffix: Sequence[int] = (),
    *,
    mask: int,
    spared: Collection[int] = (),
) -> list[Window]:
    """As `consecutive`, for encoders: 15 % of a window's tokens are masked, at least one, and these are scored.

    mask: the token in their place. spared: tokens that are never masked. Which ones are, depends on the number of the
    window alone. All at once, where the pseudo-perplexity of Salazar et al. (2020) masks each token alone: a stride of
    1 does that. Raises ConfigError as `consecutive` does, and for a window without a token that could be masked.
    """
    front, back = (torch.tensor(special, dtype=torch.int64) for special in (prefix, suffix))
    kept, windows = torch.tensor(sorted(spared), dtype=torch.int64), []
    for number, (part, fresh) in enumerate(_parts(ids, length, stride, count, len(prefix) + len(suffix))):
        possible = (~torch.isin(part[fresh:], kept)).nonzero()[:, 0] + fresh
        if not len(possible):
            raise ConfigError(
                f"window {number} has no token that can be masked, only those that stand for what the tokenizer does "
                "not know: give a text in the model's language"
            )
        order = torch.randperm(len(possible), generator=torch.Generator().manual_seed(number))
        chosen = possible[order[: max(1, round(MASKED * len(possible)))]].sort().values
        whole = torch.cat([front, part.index_fill(0, chosen, mask), back])
        windows.append(Window(whole, chosen + len(prefix), part[chosen]))
    return windows


def continued(
    ids: Sequence[int],
    length: int,
    stride: int | None = None,
    count: int | None = None,
    prefix: Sequence[int] = (),
    suffix: Sequence[int] = (),
    *,
    start: int,
) -> list[Window]:
    """As `consecutive`, for encoder-decoders: the encoder reads a window's first half, the decoder predicts the second.

    start: the token with which a decoder begins; each token is predicted from the first half and those of the second
    before it. Raises ConfigError as `consecutive` does.
    """
    front, back, begin = (torch.tensor(special, dtype=torch.int64) for special in (prefix, suffix, [start]))
    windows = []
    for part, fresh in _parts(ids, length, stride, count, len(prefix) + len(suffix)):
        half = len(part) // 2
        first, answer = max(fresh, half) - half, part[half:]
        read = torch.cat([front, part[:half], back])
        windows.append(Window(read, torch.arange(first, len(answer)), answer[first:], torch.cat([begin, answer[:-1]])))
    return windows


def _parts(
    ids: Sequence[int], length: int, stride: int | None, count: int | None, special: int
) -> list[tuple[torch.Tensor, int]]:
    """(tokens of the text in each window, which are `length` but for `special` ones; the first that is new in it)"""
    body = length - special
    stride = body if stride is None else stride
    if body < 2:
        raise ConfigError(f"a window of {length} tokens has {body} behind {special} special ones: give 2 or more")
    if not 1 <= stride <= body:
        raise ConfigError(f"the stride is {stride}: give 1 to {body} tokens, or leave it out for windows side by side")
    if count is not None and count < 1:
        raise ConfigError(f"{count} windows were asked for: give 1 or more")
    there = (len(ids) - body) // stride + 1 if len(ids) >= body else 0
    if there < (count or 1):
        asked = count or 1
        windows = f"{asked} windows of {body} need" if asked > 1 else f"one window of {body} needs"
        raise ConfigError(
            f"the text has {len(ids)} tokens, and {windows} {body + (asked - 1) * stride}: give a longer text, or "
            "fewer or shorter windows"
        )
    text = torch.tensor(ids, dtype=torch.int64)
    starts = (index * stride for index in range(there if count is None else count))
    return [(text[start : start + body], body - stride if start else 0) for start in starts]
