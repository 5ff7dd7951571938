"""What the command line must know of a model before it is loaded, whichever engine will run it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True)
class Trust:
    """What a model folder may do only if its user says so: both let whoever made it run code here."""

    remote_code: bool = False  # Python files of the folder's
    pickled_weights: bool = False


UNTRUSTED = Trust()


class ModelFacts(Protocol):
    """`sites`: what the engine compresses unless told otherwise, in the order of the forward pass; empty for a family
    of which that shows only when it is loaded. `max_positions`: None for a model that takes texts of any length.
    `scores`: whether a text alone has a perplexity, which it has not for an encoder-decoder."""

    @property
    def sites(self) -> Sequence[str]: ...

    @property
    def vocab(self) -> int: ...

    @property
    def max_positions(self) -> int | None: ...

    @property
    def scores(self) -> bool: ...

    def check_tensor_parallel(self, tp: int) -> None:
        """Raises ModelError unless `tp` ranks can share the model; it names the sizes that could."""
        ...
