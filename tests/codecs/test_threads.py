"""Codecs in several threads at once, with rows that need the scratch block, under an allocator that reuses at once."""

import os
import subprocess
import sys

SCRIPT = """
import threading, torch, megatron_lowbit as lowbit
codec, x = lowbit.codec("int5:g32"), torch.randn(2000, 17)
expected = codec.decode(codec.encode(x), x.shape, x.dtype)
wrong = []
def work():
    for _ in range(30):
        if not torch.equal(codec.decode(codec.encode(x), x.shape, x.dtype), expected):
            wrong.append(1)
threads = [threading.Thread(target=work) for _ in range(3)]
[t.start() for t in threads], [t.join() for t in threads]
print("wrong", len(wrong))
"""


def test_threads_do_not_share_scratch_memory():
    tunables = "glibc.malloc.tcache_count=0:glibc.malloc.arena_max=1"
    environment = os.environ | {"GLIBC_TUNABLES": tunables, "LOWBIT_BACKEND": "numba"}
    done = subprocess.run([sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and done.stdout == "wrong 0\n", done.stderr
