"""What the patches of built models return: which sites they hooked, and how to undo it."""

from __future__ import annotations

from collections.abc import Callable

from megatron_lowbit.config import CommConfig


class Handle:
    """What `enable` did. `disable()`, or leaving it as a context manager, restores everything."""

    def __init__(self, config: CommConfig) -> None:
        self.config = config
        self.sites: list[str] = []  # in the order of the forward pass
        self._undo: list[Callable[[], None]] = []

    def add(self, site: str, undo: Callable[[], None]) -> None:
        """Note that `site` is hooked, and what takes the hook away again."""
        if site not in self.sites:
            self.sites.append(site)
        self._undo.append(undo)

    def disable(self) -> None:
        """Restore what there was before. Calling it again does nothing."""
        while self._undo:
            self._undo.pop()()

    def __enter__(self) -> Handle:
        return self

    def __exit__(self, *exception) -> None:
        self.disable()
