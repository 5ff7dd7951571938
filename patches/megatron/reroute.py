"""Collectives in the middle of somebody else's forward: answered by us while it runs for us, untouched otherwise.

Megatron's layers call some collectives by a global name of their module. That name is replaced once, for as long as
anything is enabled, and the replacement looks here whether the forward that is running is one of ours. The backward
runs later and finds Megatron's own.

Hazard: what is running is known to the process, not to a thread, so two threads must not run such layers at once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch.distributed as dist

from megatron_lowbit.config import CommConfig
from megatron_lowbit.errors import ModelError


class Message(NamedTuple):
    """How and where one forward is to send."""

    group: dist.ProcessGroup
    config: CommConfig
    site: str


class Reroute:
    """The forward of ours that is running, if there is one."""

    def __init__(self) -> None:
        self._message: Message | None = None

    def take(self) -> Message | None:
        """What to send in place of the collective that was called; once, and None outside of our forwards."""
        message, self._message = self._message, None
        return message

    def run(self, message: Message, forward: Callable, *args, **kwargs) -> Any:
        """forward(*args, **kwargs), whose collective will `take` the message. Raises ModelError if it did not."""
        self._message = message
        try:
            out = forward(*args, **kwargs)
        finally:
            left = self.take()
        if left is not None:
            raise ModelError(
                f"{message.site} did not communicate as the releases do that this patch knows, and nothing was "
                "compressed: leave it exact with CommConfig(sites=...), or use megatron-core 0.12 to 0.19"
            )
        return out
