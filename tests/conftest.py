"""Before anything imports Triton: its kernels run in the interpreter, on CPU tensors, unless GPU tests are chosen.

A table that a developer has tuned for this machine decides nothing in tests.
"""

import os
import re


def pytest_configure(config):
    if not re.search(r"(?<!not )\bgpu\b", config.option.markexpr):
        os.environ["TRITON_INTERPRET"] = "1"
    os.environ["LOWBIT_TUNED"] = "none"
