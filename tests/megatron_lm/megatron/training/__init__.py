"""Stands in for Megatron-LM's `megatron.training`, which is on no package index: how it parses and initialises.

The calls, their names and where they look names up are those of core_v0.16.1; what has no part in them is left out.
"""

from .global_vars import get_args
from .initialize import initialize_megatron

__all__ = ["get_args", "initialize_megatron"]
