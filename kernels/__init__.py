"""The codecs of `megatron_lowbit.codecs`, fast: numba on the CPU, Triton on the GPU (`megatron_lowbit.kernels`).

This file imports nothing, and must not. With the repository's root on `sys.path` (as `python -m pytest` puts it there),
Transformers looks for the unrelated Hub package `kernels`, finds this folder, and imports it under that name: anything
that fails here, a relative import above this folder included, would break `import transformers`. The version tells
Transformers that this is not the package it wants; without one, Transformers 5.0 stops at an invalid version.
Import the modules in here by their full names, `megatron_lowbit.kernels.…`, or one file is loaded twice.
"""

__version__ = "0"
