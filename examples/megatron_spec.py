"""A layer spec with compressed communication, for Megatron-LM's `--spec`; nothing of Megatron is patched.

    PYTHONPATH=examples torchrun --nproc-per-node 2 pretrain_gpt.py --spec megatron_spec lowbit_layer ...

Start from the spec that the script would build: here the local one for models with RMSNorm, such as Llama.
"""

from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec

import megatron_lowbit as lowbit

lowbit_layer = lowbit.patches.megatron_core.lowbit_spec(
    get_gpt_layer_local_spec(normalization="RMSNorm"),
    lowbit.CommConfig("int8:g128", min_bytes=0),  # of any size; for speed leave min_bytes out
)
