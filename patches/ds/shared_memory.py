"""DeepSpeed's shared-memory sum for CPUs, which is switched off where `init_inference` starts its communication.

`deepspeed.init_distributed` compiles that C++ operation on every machine without an accelerator: 47 s on two cores, an
error where ninja is missing. With torchrun it crashes in fp32, as it counts the ranks of a machine by LOCAL_SIZE, which
only DeepSpeed's launcher sets. And it sums over all ranks, whatever group is asked for. Compressed sums make no use of
it. `LOWBIT_DEEPSPEED_SHM=1` keeps it, and then sets LOCAL_SIZE as torchrun knows it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import deepspeed.ops
from deepspeed.accelerator import get_accelerator

from megatron_lowbit.errors import ConfigError

VARIABLE = "LOWBIT_DEEPSPEED_SHM"
OP = "deepspeed_shm_comm"


@contextmanager
def without_shared_memory() -> Iterator[None]:
    """A deepspeed.init_distributed() in here compiles nothing. The setting is DeepSpeed's own, and put back."""
    compatible = deepspeed.ops.__compatible_ops__
    if get_accelerator().device_name() != "cpu" or _kept() or OP not in compatible:
        yield
        return
    original, compatible[OP] = compatible[OP], False
    try:
        yield
    finally:
        compatible[OP] = original


def _kept() -> bool:
    value = os.environ.get(VARIABLE, "")
    if value not in ("", "0", "1"):
        raise ConfigError(f"{VARIABLE}={value!r} is unknown: set it to 1 to keep DeepSpeed's shared-memory operation")
    if value == "1" and "LOCAL_WORLD_SIZE" in os.environ:
        os.environ.setdefault("LOCAL_SIZE", os.environ["LOCAL_WORLD_SIZE"])
    return value == "1"
