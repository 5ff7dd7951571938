"""What every inference engine offers, whatever framework runs underneath."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from ..config import CommConfig
from ..errors import ConfigError
from .model_facts import UNTRUSTED, ModelFacts, Trust

OnText = Callable[[int, str], None]
"""Called as `on_text(prompt_index, piece)`; the pieces of a prompt, joined, are its `Generation.text`."""


@dataclass(frozen=True)
class Sampling:
    """How to choose tokens. `top_k=1` is greedy; `top_k=0` samples from all tokens, or from the `top_p` nucleus.

    Raises `ConfigError` for a value out of range, and for top-k and top-p together.
    """

    max_new_tokens: int = 64
    temperature: float = 1.0
    top_k: int = 1
    top_p: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ConfigError(f"max_new_tokens is {self.max_new_tokens}; it must be at least 1")
        if not (math.isfinite(self.temperature) and self.temperature > 0):
            raise ConfigError(f"temperature is {self.temperature}; it must be above 0 (for greedy use top_k=1)")
        if self.top_k < 0:
            raise ConfigError(f"top_k is {self.top_k}; use 0 for all tokens, 1 for greedy, or more")
        if not 0.0 <= self.top_p <= 1.0:
            raise ConfigError(f"top_p is {self.top_p}; it must lie between 0 (off) and 1")
        if self.top_k and self.top_p:
            raise ConfigError(f"top_k={self.top_k} and top_p={self.top_p} exclude each other; set top_k=0 to use top_p")


@dataclass(frozen=True)
class Generation:
    """One prompt's continuation: `text` and `tokens` without the prompt and without the end-of-sequence token."""

    prompt: str
    text: str
    tokens: tuple[int, ...]


@dataclass(frozen=True)
class Perplexity:
    """`value` is exp(`nll`); `nll` is the mean negative log-likelihood, in nats, of `tokens` predicted tokens."""

    value: float
    nll: float
    tokens: int

    def __float__(self) -> float:
        return self.value


class Engine(Protocol):
    """A loaded model that generates text and measures perplexity. Every rank calls every method, in the same order."""

    tokenizer: Any
    model: Any

    @staticmethod
    def read(folder: str | Path, trust: Trust = UNTRUSTED) -> ModelFacts:
        """What is known of a folder before it is loaded. Raises `ModelError` for what the engine cannot run."""
        ...

    def enable(self, config: CommConfig) -> Any:
        """Sends partial sums as `config` says; a context manager whose `disable()` restores everything."""
        ...

    def generate(self, prompts: Sequence[str], sampling: Sampling, on_text: OnText | None = None) -> list[Generation]:
        """Continues each prompt. `on_text` is called on rank 0 alone, as text arrives."""
        ...

    def check(self, prompts: Sequence[str], sampling: Sampling) -> None:
        """Raises `ConfigError` for what `generate` would refuse."""
        ...

    def perplexity(self, text: str, window: int | None = None) -> Perplexity:
        """Perplexity of `text` in consecutive, non-overlapping windows of `window` tokens."""
        ...


class TextStream:
    """Turns the tokens of one continuation into text, piece by piece.

    A token need not be text by itself: it may hold half a character, or lose its leading space when decoded alone. So
    each token is decoded behind the tokens that were shown last, and kept back until its characters are whole.
    """

    def __init__(self, decode: Callable[[list[int]], str], prompt: Sequence[int]) -> None:
        self._decode = decode
        self._shown, self._new = list(prompt), []

    def push(self, token: int) -> str:
        """The text that `token` completes; empty while a character is unfinished."""
        self._new.append(token)
        piece = self._pending()
        if not piece or piece.endswith("\ufffd"):  # the replacement character: bytes that are not (yet) a character
            return ""
        self._shown, self._new = self._new, []
        return piece

    def finish(self) -> str:
        """What `push` still kept back; call it once, at the end."""
        return self._pending()

    def _pending(self) -> str:
        return self._decode(self._shown + self._new)[len(self._decode(self._shown)) :]
