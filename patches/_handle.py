"""What the patches share: what they are given and return, and which sites are exact unless asked for."""

from __future__ import annotations

from collections.abc import Callable
from fnmatch import fnmatchcase

from megatron_lowbit.config import CommConfig
from megatron_lowbit.errors import ConfigError


def check_config(config: object) -> None:
    """Raise ConfigError for what is no CommConfig, such as the spec alone."""
    if not isinstance(config, CommConfig):
        raise ConfigError(f"config is {config!r}: pass a CommConfig, such as CommConfig(spec='int4:g32')")


def asks_for(config: CommConfig, site: str) -> bool:
    """Whether `sites` names this one by more than a wildcard at its beginning: "*" speaks of layers alone."""
    return any(fnmatchcase(site, pattern) and pattern[:1] not in "*?[" for pattern in config.sites or ())


class Handle:
    """What `enable` did. `disable()`, or leaving it as a context manager, restores everything."""

    def __init__(self, config: CommConfig) -> None:
        self.config = config
        self.sites: list[str] = []  # in the order of the forward pass
        self._undo: list[Callable[[], None]] = []

    def add(self, sites: str | list[str], undo: Callable[[], None]) -> None:
        """Note that a site, or some, are hooked, and what takes the hook away again."""
        for site in [sites] if isinstance(sites, str) else sites:
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
