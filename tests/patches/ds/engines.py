"""What the tests of the DeepSpeed patch share."""

from __future__ import annotations

import torch
import torch.distributed as dist


def start() -> dist.ProcessGroup:
    """Start DeepSpeed's communication, without compiling anything -> the group of all ranks."""
    import deepspeed

    from megatron_lowbit.patches.ds.shared_memory import without_shared_memory

    with without_shared_memory():
        deepspeed.init_distributed(auto_mpi_discovery=False)
    return dist.group.WORLD


def sharded(model: torch.nn.Module, tp_size: int, **arguments) -> torch.nn.Module:
    """DeepSpeed's engine, with nothing enabled."""
    from megatron_lowbit.patches.deepspeed import init_inference

    return init_inference(model, tp_size, None, dtype=torch.float32, **arguments)


def tokens(rows: int = 2, columns: int = 12) -> torch.Tensor:
    return torch.randint(0, 61, (rows, columns), generator=torch.Generator().manual_seed(0))


def snapshot(model: torch.nn.Module) -> list[tuple]:
    """What a disabled patch must have put back: every module's class and attributes."""
    return [
        (type(module), dict(module.__dict__), dict(module._parameters), dict(module._modules))
        for module in model.modules()
    ]


def unchanged(model: torch.nn.Module, before: list[tuple]) -> bool:
    now = snapshot(model)
    return len(now) == len(before) and all(
        a[0] is b[0]
        and all(x.keys() == y.keys() and all(x[k] is y[k] for k in x) for x, y in zip(a[1:], b[1:], strict=True))
        for a, b in zip(now, before, strict=True)
    )


def paths() -> dict[str, dict]:
    import megatron_lowbit as lowbit

    return {site: counters["paths"] for site, counters in lowbit.stats().items()}
