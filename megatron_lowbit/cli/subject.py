"""What is evaluated: a model and a text, shared by all commands that compare predictions."""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..engines.registry import check_framework
from ..errors import ConfigError, ModelError
from .files import bundled, read_text
from .job import DTYPES, add_model_arguments, trust_of

if TYPE_CHECKING:
    import torch

    from ..engines.hf_folder import HfFolder
    from ..evaluation.windows import Window

LENGTH = 512  # of a window, at most
WINDOWS = 64  # of the text, at most


def add_arguments(parser: argparse.ArgumentParser, windows: int = WINDOWS) -> None:
    """Add the options of the model and the text. windows: at most so many of it, unless asked for."""
    what = parser.add_argument_group("model and text")
    add_model_arguments(what, engine=False)  # Transformers computes what any engine's ranks would
    what.add_argument("--dtype", choices=DTYPES, default="auto", help="to compute in (default: the checkpoint's)")
    what.add_argument("--text", type=Path, metavar="FILE", help="text to predict (default: the bundled one)")
    what.add_argument("--windows", type=int, metavar="N", help=f"of the text (default: what it has, at most {windows})")
    what.add_argument(
        "--window-length", type=int, metavar="N", help=f"tokens (default: {LENGTH}, or the model's positions if fewer)"
    )
    what.add_argument("--stride", type=int, metavar="N", help="tokens between windows (default: they do not overlap)")
    what.set_defaults(most_windows=windows)


@dataclass(frozen=True)
class Subject:
    """The checked arguments; what is read of them is read once."""

    folder: HfFolder
    dtype: torch.dtype | None
    path: Path
    count: int | None
    most: int
    length: int
    stride: int | None

    @classmethod
    def check(cls, arguments: argparse.Namespace) -> Subject:
        """Raises ConfigError or ModelError for anything that can be known before a model is loaded."""
        if arguments.windows is not None and arguments.windows < 1:
            raise ConfigError(f"--windows is {arguments.windows}: give 1 or more")
        check_framework("transformers")
        from ..engines.hf_folder import read_folder

        model = bundled(arguments.model, "model", "--model DIR")
        folder = read_folder(model, trust_of(arguments), encoders=True)
        import torch

        positions, length = folder.max_positions, arguments.window_length
        length = min(LENGTH, positions or LENGTH) if length is None else length
        if positions is not None and length > positions:
            raise ConfigError(f"--window-length is {length}: give at most {positions} tokens, the model's positions")
        dtype = DTYPES[arguments.dtype] and getattr(torch, DTYPES[arguments.dtype])
        path = arguments.text or bundled(None, "sample_text.txt", "--text FILE")
        return cls(folder, dtype, path, arguments.windows, arguments.most_windows, length, arguments.stride)

    def reading(self, path: Path, count: int | None, most: int) -> Subject:
        """The same model with other windows: of the text at `path`, `count` or at most `most`."""
        other = replace(self, path=path, count=count, most=most)
        same = ("model", "tokenizer", "features", "digests", *(("text", "ids") if path == self.path else ()))
        vars(other).update({name: vars(self)[name] for name in same if name in vars(self)})
        return other

    @cached_property
    def text(self) -> str:
        return read_text(self.path, "--text")

    @cached_property
    def tokenizer(self) -> Any:
        from ..engines.hf_folder import hushed
        from ..engines.text_model import load_tokenizer

        with hushed():
            return load_tokenizer(self.folder.folder, self.folder.trust.remote_code)

    def tokens(self, text: str) -> list[int]:
        """Without special tokens."""
        return self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]

    @cached_property
    def ids(self) -> list[int]:
        """The text's tokens."""
        return self.tokens(self.text)

    @property
    def prefix(self) -> list[int]:
        """What the tokenizer puts in front of every text."""
        return self._special[0]

    @cached_property
    def _special(self) -> tuple[list[int], list[int]]:
        """What the tokenizer puts in front of every text, and behind it."""
        text = self.tokens("a")
        whole = self.tokenizer("a")["input_ids"]
        start = next((n for n in range(len(whole)) if whole[n : n + len(text)] == text), len(whole))
        return whole[:start], whole[start + len(text) :]

    @cached_property
    def windows(self) -> list[Window]:
        """Raises ConfigError if the text has fewer than were asked for, ModelError for a tokenizer that lacks a token
        which questions need."""
        from ..evaluation.windows import consecutive, continued, masked

        ids = self.ids
        if self.count is None:  # with a stride of 1 there are as many windows as tokens: gigabytes, to be forgotten
            ids = ids[: self.length + (self.most - 1) * (self.stride or self.length)]
        how = ids, self.length, self.stride, self.count
        try:
            if self.folder.predicts == "next":
                found = consecutive(*how, self.prefix)
            elif self.folder.predicts == "masked":
                mask, spared = self._token("mask_token_id"), self.tokenizer.all_special_ids
                found = masked(*how, *self._special, mask=mask, spared=spared)
            else:
                found = continued(*how, *self._special, start=self._token("decoder_start_token_id"))
        except ConfigError as error:
            raise ConfigError(f"{self.path}: {error}") from error  # a command may read several texts
        return found[: self.count or self.most]

    def _token(self, name: str) -> int:
        """A special token, which the tokenizer knows or the model's config."""
        found = getattr(self.tokenizer, name, None)
        found = getattr(self.folder.config, name, None) if found is None else found
        if found is None:
            raise ModelError(f"{self.folder.folder} says no {name}, without which it predicts nothing: add it there")
        return found

    @cached_property
    def digests(self) -> dict[str, str]:
        """Tensor -> a short hash of its sample."""
        from ..engines.fingerprint import tensor_digests

        return tensor_digests(self.folder.folder)

    @cached_property
    def model(self) -> torch.nn.Module:
        """On the GPU, if there is one."""
        import torch

        from ..engines.hf_folder import hushed

        with hushed():
            model = self.folder.load(self.dtype)
        return model.to("cuda" if torch.cuda.is_available() else "cpu")

    @cached_property
    def features(self) -> dict[str, int]:
        """Site -> the features of its messages."""
        from ..engines.simulated_tp import features

        return features(self.model)

    def notes(self, tps: Iterable[int]) -> list[str]:
        """What a reader of results at these TP sizes must know."""
        from ..engines.simulated_tp import whole_experts

        whole = whole_experts(self.model)
        experts = f"{whole} stays whole, as no policy lists such experts: what ranks would sum there is exact here"
        uneven = {tp: self.folder.uneven_heads(tp) for tp in sorted(set(tps))}
        return ([experts] if whole else []) + [
            f"TP {tp} divides the features of every site, but not {heads}: no engine here runs it; what is said of it "
            "is what such sums would lose"
            for tp, heads in uneven.items()
            if heads
        ]

    @cached_property
    def facts(self) -> dict[str, str]:
        """What results depend on beside the case; names, never paths."""
        from .. import __version__
        from ..engines.fingerprint import fingerprint

        return {
            "model": self.folder.folder.resolve().name,
            "fingerprint": fingerprint(self.folder.folder),
            "text": self.path.name,
            "text_sha256": hashlib.sha256(self.text.encode()).hexdigest(),
            "tokens_sha256": hashlib.sha256(json.dumps([*self._special, self.ids]).encode()).hexdigest(),
            "window_length": str(self.length),
            "stride": str(self.stride or self.length),
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "predicts": self.folder.predicts,
            "megatron_lowbit": __version__,
        }
