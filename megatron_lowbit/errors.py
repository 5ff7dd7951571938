"""Every error this package raises. A message holds the offending value and the remedy, in one line."""

from __future__ import annotations


class LowBitError(Exception):
    """Base of every error this package raises."""


class ConfigError(LowBitError, ValueError):
    """A spec, option, argument or tensor that cannot be used."""


class ModelError(LowBitError):
    """A model folder, checkpoint or built model that cannot be used."""


class RankError(LowBitError, RuntimeError):
    """Ranks that disagree, or a rank that stopped answering."""
