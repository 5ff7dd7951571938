"""An `apex` that is not NVIDIA's: the one on the package index is a web framework, which Megatron takes for NVIDIA's.

Megatron-Core believes any `apex` it can import, chooses fused layer norms because of it, and fails where a model is
built with a message that does not name the cause.
"""

from __future__ import annotations

import os
import warnings
from importlib.machinery import PathFinder
from importlib.util import find_spec


def foreign() -> str | None:
    """Where an importable `apex` without NVIDIA's parts lies, or None. Imports nothing."""
    try:
        found = find_spec("apex")
    except (ImportError, ValueError):  # a module that was put into sys.modules by hand
        return None
    if found is None:
        return None
    places = found.submodule_search_locations
    if places is not None and PathFinder.find_spec("apex.normalization", list(places)) is not None:
        return None
    return found.origin or ", ".join(places or ()) or "unknown place"


def warn_if_foreign() -> None:
    """Say on rank 0 that the importable `apex` is not NVIDIA's, and what to do."""
    if os.environ.get("RANK", "0") == "0" and (place := foreign()) is not None:
        warnings.warn(
            f"the apex at {place} is not NVIDIA's (it has no apex.normalization), but Megatron-Core takes it for that "
            "and fails with the local layer specs: pip uninstall apex, or remove it from the path",
            stacklevel=3,
        )
