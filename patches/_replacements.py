"""Attributes of other people's classes and modules, replaced for a while."""

from __future__ import annotations

from typing import Any


class Replacements:
    """What was replaced, and how to undo it: the last replacement first, and the very objects that were there."""

    def __init__(self) -> None:
        self._saved: list[tuple[object, str, bool, Any]] = []

    def __bool__(self) -> bool:
        return bool(self._saved)

    def set(self, owner: object, name: str, value: Any) -> None:
        """Set `owner.name`."""
        self._saved.append((owner, name, name in vars(owner), getattr(owner, name)))
        setattr(owner, name, value)

    def undo(self) -> None:
        """Put every original back. Calling it again does nothing."""
        while self._saved:
            owner, name, own, original = self._saved.pop()
            if own:
                setattr(owner, name, original)
            else:  # an inherited attribute, such as torch.Tensor.cuda: uncover it instead of copying it down
                delattr(owner, name)
