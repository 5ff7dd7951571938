"""For Megatron-LM's own scripts: `--spec megatron_lowbit.engines.megatron_spec spec` with a converted `--load DIR`.

Needed by models whose layers Megatron's local spec lacks (Gemma 2, sliding windows, most rope scalings). `spec` is made
at import, because scripts take it from the module as it stands; they do so when a model is to be built, with their
arguments parsed.
"""

from __future__ import annotations

from pathlib import Path

from ..errors import ConfigError
from .hf_model import read_config
from .megatron_layers import layer_spec

try:
    from megatron.training import get_args

    _arguments = get_args()
except (ImportError, AssertionError) as error:
    raise ConfigError(
        f"megatron_spec is for --spec of a Megatron-LM script ({error}): call layer_spec instead"
    ) from error

spec = layer_spec(read_config(Path(_arguments.load or ".") / "hf"), _arguments.pipeline_model_parallel_size, rope=True)
