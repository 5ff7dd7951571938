"""DeepSpeed's shared-memory operation: not compiled unless it is kept, and no hindrance where it is."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import megatron_lowbit as lowbit

ROOT = Path(__file__).parents[3]
SCRIPT = """
import os, sys, torch
import deepspeed.ops
from deepspeed.ops import op_builder
import megatron_lowbit as lowbit
from tests.llama import tiny_llama
from tests.patches.ds.engines import tokens

built = []
torch.set_num_threads(1)
class Op:
    def initialize(self, *_): built.append(os.environ.get("LOCAL_SIZE"))
    def vector_kernel_level(self): return 0
from deepspeed.accelerator import get_accelerator
builder = type(get_accelerator().create_op_builder("ShareMemCommBuilder"))
builder.load = lambda self, verbose=True: Op()                     # what would have been compiled
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = True
config = lowbit.CommConfig("int8:g32", min_bytes=0)
engine = lowbit.patches.deepspeed.init_inference(tiny_llama(), 2, config)
assert deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] is True
with torch.no_grad():
    engine(tokens())
calls = sum(counters["calls"] for counters in lowbit.stats().values())
if torch.distributed.get_rank() == 0:
    print("built", built, "calls", calls)
torch.distributed.destroy_process_group()
"""


@pytest.mark.parametrize("kept", [False, True], ids=["switched off", "kept"])
def test_under_torchrun(kept, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    environ = os.environ | {"PYTHONPATH": str(ROOT), "GLOO_SOCKET_IFNAME": "lo", "LOWBIT_DEEPSPEED_SHM": str(int(kept))}
    environ.pop("LOCAL_SIZE", None)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", script]
    done = subprocess.run(torchrun, capture_output=True, text=True, env=environ, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"built {['2'] if kept else []} calls 4" in done.stdout


def test_setting(monkeypatch):
    import deepspeed.ops

    from megatron_lowbit.patches.ds.shared_memory import OP, without_shared_memory

    before = deepspeed.ops.__compatible_ops__[OP]
    with without_shared_memory():
        assert deepspeed.ops.__compatible_ops__[OP] is False
    assert deepspeed.ops.__compatible_ops__[OP] is before
    monkeypatch.setenv("LOWBIT_DEEPSPEED_SHM", "yes")
    with pytest.raises(lowbit.ConfigError, match="LOWBIT_DEEPSPEED_SHM='yes' is unknown"), without_shared_memory():
        pass
