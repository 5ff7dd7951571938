"""Commands that a launcher would start, called within ranks that the tests started (tests/ranks.py)."""

from __future__ import annotations

import contextlib
import os
import sys
import types
from collections.abc import Iterator
from unittest import mock

from megatron_lowbit.cli import launch


@contextlib.contextmanager
def launched() -> Iterator[None]:
    """As under torchrun, in a group that exists already, and with a cost model that expects nothing in particular."""
    expectation = types.ModuleType("megatron_lowbit.tuning.expectation")
    expectation.lines = lambda device, gbit, world, nodes: [f"modelled: {device}, {gbit > 0}, {world} in {nodes}"]
    sys.modules[expectation.__name__] = expectation  # mock.patch.dict would forget all modules imported meanwhile
    with (
        mock.patch.dict(os.environ, {"MASTER_ADDR": "localhost", "LOCAL_RANK": os.environ["RANK"]}),
        mock.patch("megatron_lowbit.tuning.expectation", expectation, create=True),
        mock.patch.object(launch, "process_group", lambda *_: contextlib.nullcontext()),
    ):
        yield
