"""Making calibrations: which ranges the partial sums of a model usually have. Needs no ranks, and torch only."""

from __future__ import annotations

from .collect import RangeTracker

__all__ = ["RangeTracker"]
