"""What Transformers' tensor parallelism installed on a module, read off the module itself.

A plan says what was meant; some releases drop its entries when they are done. What runs is a closure that every release
leaves on the module: since 5.12 or so in place of `forward`, before that as a forward hook. It holds the parallel style
(the oldest releases: a function of it) and the device mesh. Nothing here compares version numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh

try:  # Transformers 5.12 or so, and newer
    from transformers.distributed import tensor_parallel
except ImportError:
    from transformers.integrations import tensor_parallel

from megatron_lowbit.errors import ModelError

if not hasattr(tensor_parallel, "RowwiseParallel"):
    raise ModelError("this Transformers has no RowwiseParallel: use a release from 4.51 on")

ROW = tensor_parallel.RowwiseParallel
# Experts of a layer, whose partial sums are added up in the module and reduced together.
EXPERTS = tuple(
    getattr(tensor_parallel, name)
    for name in ("MoeExpertsParallel", "MoeTensorParalellExperts", "AllReduceParallel")
    if hasattr(tensor_parallel, name)
)
# Of Transformers 4.5x and 5.0: it sums in place over all ranks of the process, not those of a mesh.
UNCOVERED = tuple(kind for kind in (getattr(tensor_parallel, "GatherParallel", None),) if kind)
WRAPS_FORWARD = hasattr(ROW, "transform_output_post_forward")  # else it registers forward hooks
POST = "transform_output_post_forward" if WRAPS_FORWARD else "_prepare_output_fn"


@dataclass(frozen=True)
class Installed:
    """A module's parallel style. kind: the class of `ROW`, `EXPERTS` or `UNCOVERED` whose output function it runs."""

    kind: type
    style: Any  # None where the release keeps only a function of it
    mesh: DeviceMesh
    hook: int | None  # its key among the module's forward hooks, if it is one
    output: Callable | None  # what that hook calls with (module, outputs, mesh)

    @property
    def group(self) -> ProcessGroup:
        return group_of(self.mesh)

    @property
    def replicates(self) -> bool:
        """Whether the sum ends whole on every rank, as an ordinary tensor."""
        layout = getattr(self.style, "output_layouts", None)
        if self.style is None:
            layout = self.output.args[0] if getattr(self.output, "args", ()) else None
        layouts = layout if isinstance(layout, tuple) else (layout,)
        whole = all(one is None or one.is_replicate() for one in layouts)
        return whole and getattr(self.style, "use_local_output", True)


def group_of(mesh: DeviceMesh) -> ProcessGroup:
    """The process group of the ranks that share a layer."""
    return mesh.get_group() if mesh.ndim == 1 else mesh.get_group("tp")


def installed(module: torch.nn.Module) -> Installed | None:
    """What sums this module's outputs over the ranks, or None if nothing does."""
    if isinstance(module, torch.nn.Embedding):  # of its terms all but one are zero, so the exact sum loses nothing
        return None
    cells = _cells(module.__dict__.get("forward"))
    if "mesh" in cells and (kind := kind_of(getattr(type(cells.get("self")), POST, None))):
        return Installed(kind, cells["self"], cells["mesh"], None, None)
    for key, hook in module._forward_hooks.items():
        if hasattr(hook, "lowbit_installed"):  # exchanged for one of ours
            return hook.lowbit_installed
        cells = _cells(hook)
        output = cells.get("output_fn")
        function = getattr(output, "func", getattr(output, "__func__", None))  # of a partial, or of a bound method
        if "device_mesh" in cells and (kind := kind_of(function)):
            return Installed(kind, getattr(output, "__self__", None), cells["device_mesh"], key, output)
    return None


def kind_of(function: Callable | None) -> type | None:
    """The class that this is the output function of."""
    return next(
        (kind for kind in (ROW, *EXPERTS, *UNCOVERED) if function is not None and function is getattr(kind, POST)), None
    )


def _cells(function: Any) -> dict[str, Any]:
    """The variables that a function closes over."""
    names = getattr(getattr(function, "__code__", None), "co_freevars", ())
    return {name: cell.cell_contents for name, cell in zip(names, getattr(function, "__closure__", None) or ())}
