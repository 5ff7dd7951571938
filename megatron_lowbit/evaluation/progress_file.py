"""What an evaluation has found so far, kept in a file, so that one that was interrupted goes on where it stopped.

Safetensors: per case and window the scored tokens' figures (metrics.py), and as metadata the facts that must be the
same for results to be put together: the model's fingerprint, the text's hash, the windows, the dtype.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Mapping
from dataclasses import fields
from pathlib import Path

import torch

from .. import whole_file
from ..errors import ConfigError
from .cases import Case
from .metrics import Tokens

FORMAT, VERSION = "megatron_lowbit.evaluation", "1"
SECONDS = 5.0  # between two savings: what an interruption can cost, beside the window at hand


class Progress:
    """Figures by case and window. As a context manager: saved on exit, whatever ends it.

    path: None keeps them in memory alone. facts: strings. Raises ConfigError for a file of other facts, or of none.
    """

    def __init__(self, path: Path | None, facts: Mapping[str, str]) -> None:
        self._path, self._facts, self._found, self._slabs = path, dict(facts), {}, _Slabs()
        self._saved = time.monotonic()
        if path is not None and path.exists():
            self._load()

    def done(self, case: Case, window: int) -> bool:
        return (case.key, window) in self._found

    def add(self, case: Case, window: int, tokens: Tokens) -> None:
        self._found[case.key, window] = self._slabs.kept(tokens)
        if time.monotonic() - self._saved > SECONDS:
            self.save()

    def tokens(self, case: Case, windows: Iterable[int] | None = None) -> list[Tokens]:
        """Those of the case's windows, in order; windows: of these only, as far as they are there."""
        own = {window: tokens for (key, window), tokens in self._found.items() if key == case.key}
        return [own[window] for window in (sorted(own) if windows is None else windows) if window in own]

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *exception) -> None:
        self.save()

    def save(self) -> None:
        """Write the file, whole or not at all. Raises ConfigError if it cannot be written."""
        if self._path is None or not self._found:
            return
        from safetensors.torch import save

        cases = sorted({key for key, _ in self._found})
        tensors = {
            f"{cases.index(key)}.{window}.{field.name}": getattr(tokens, field.name).contiguous()
            for (key, window), tokens in self._found.items()
            for field in fields(Tokens)
        }
        metadata = {"format": FORMAT, "format_version": VERSION, "cases": json.dumps(cases)} | self._facts
        whole_file.write(self._path, save(tensors, metadata), "progress")
        self._saved = time.monotonic()

    def _load(self) -> None:
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(str(self._path), "pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name).clone() for name in file.keys()}
        except (OSError, SafetensorError) as error:
            raise ConfigError(f"{self._path} cannot be read ({error}): remove it to begin anew") from error
        if (metadata.get("format"), metadata.get("format_version")) != (FORMAT, VERSION):
            raise ConfigError(f"{self._path} holds no evaluation of this version: give another file, or remove it")
        for name, value in self._facts.items():
            if metadata.get(name) != value:
                raise ConfigError(
                    f"{self._path} is of another evaluation: its {name} is {metadata.get(name)!r}, now {value!r}; give "
                    "another file, or remove it to begin anew"
                )
        try:
            cases = json.loads(metadata["cases"])
            for key in {name.rpartition(".")[0] for name in tensors}:
                index, window = map(int, key.split("."))
                found = Tokens(*(tensors[f"{key}.{field.name}"] for field in fields(Tokens)))
                self._found[cases[index], window] = found
        except (KeyError, IndexError, ValueError, TypeError) as error:
            raise ConfigError(f"{self._path} is damaged ({error!r}): remove it to begin anew") from error


class _Slabs:
    """Copies of figures, side by side in large blocks. On the heap, a few kB that stay behind between the logits of one
    run and those of the next keep the allocator from reusing the room of the logits: 6 MB more for every run."""

    SIZE = 1 << 23  # of fp32: 32 MiB, which glibc never puts on the heap; a page is used when it is written

    def __init__(self) -> None:
        self._rest = torch.empty(0)

    def kept(self, tokens: Tokens) -> Tokens:
        return Tokens(*(self._copy(getattr(tokens, field.name)) for field in fields(Tokens)))

    def _copy(self, values: torch.Tensor) -> torch.Tensor:
        if len(self._rest) < len(values):
            self._rest = torch.empty(max(self.SIZE, len(values)))
        copy, self._rest = self._rest.split([len(values), len(self._rest) - len(values)])
        return copy.copy_(values)
