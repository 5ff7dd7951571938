"""Attributes of a layer that are None for one forward, which then leaves to us what it would have done with them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def hidden(module: torch.nn.Module, *names: str) -> Iterator[None]:
    """Set plain attributes and parameters to None while it lasts. What is None already is left as it is."""
    saved = [
        (home, name, home[name])
        for name in names
        for home in (module.__dict__, module._parameters)
        if home.get(name) is not None
    ]
    for home, name, _ in saved:
        home[name] = None
    try:
        yield
    finally:
        for home, name, value in saved:
            home[name] = value
