"""Which configuration holds for a module, and what its site is called.

Two attributes of modules say so: `lowbit_site` stays once it is known, as it only names; `lowbit_config` is there while
`enable(config, model)` holds. Where it is not, the process-wide configuration holds, if there is one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from megatron_lowbit.config import CommConfig

if TYPE_CHECKING:
    from megatron_lowbit.patches.megatron_core import Handle

UNNAMED = "row_parallel"  # the site of modules that were built before a process-wide enable
process_wide: Handle | None = None


def config_of(module: torch.nn.Module) -> CommConfig | None:
    """What is enabled for this module."""
    own = module.__dict__.get("lowbit_config")
    return own if own is not None or process_wide is None else process_wide.config


def site_of(module: torch.nn.Module, unnamed: str = UNNAMED, suffix: str = "") -> str:
    """The module's site with `suffix`, counted as hooked under a process-wide enable if it was not yet."""
    site = module.__dict__.get("lowbit_site", unnamed) + suffix
    count(module, site)
    return site


def count(module: torch.nn.Module, site: str) -> None:
    """Note `site` as hooked if it is the process-wide configuration that holds for the module."""
    if process_wide is not None and "lowbit_config" not in module.__dict__:
        process_wide.count(site)
