"""Any Hugging Face folder that Transformers can run: what can be known before it is loaded, and loading it.

The model is built without memory (on torch's meta device) to learn which layers make partial sums. Nothing is
downloaded; code and pickles of the folder's are refused unless the user trusts them.
"""

from __future__ import annotations

import math
import pickle
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch

from ..errors import ModelError
from .hf_model import open_safetensors, read_config_json
from .model_facts import UNTRUSTED, Trust

Keep = Callable[[torch.nn.Module, str, torch.nn.Module], bool]
"""(model, path, module) -> whether the engine shards this module, so that its outputs are partial sums."""


@dataclass(frozen=True)
class HfFolder:
    """`sizes`: what the ranks share, such as {"attention heads": 8}. `kind`: the Auto class that loads the model.
    `predicts`: what it says of a text: "next" tokens, "masked" ones, or how it is "continued" (an encoder-decoder)."""

    folder: Path
    config: Any
    kind: Any
    sites: tuple[str, ...]
    vocab: int
    max_positions: int | None
    predicts: str
    sizes: dict[str, int] = field(default_factory=dict)
    trust: Trust = UNTRUSTED
    obstacle: str = ""  # why more than one rank cannot share it

    DTYPES: ClassVar = (torch.float32, torch.float16, torch.bfloat16)

    @property
    def encoder_decoder(self) -> bool:
        return self.predicts == "continued"

    @property
    def scores(self) -> bool:
        return not self.encoder_decoder

    def check_tensor_parallel(self, tp: int) -> None:
        """Raises ModelError unless `tp` divides the heads and the features that the ranks share."""
        if tp > 1 and self.obstacle:
            raise ModelError(self.obstacle)
        uneven = self._uneven(tp, self.sizes)
        if uneven:
            common = math.gcd(*self.sizes.values())
            possible = ", ".join(str(n) for n in range(1, common + 1) if common % n == 0)
            raise ModelError(f"TP={tp} does not divide {' and '.join(uneven)}; possible TP sizes: {possible}")

    def uneven_heads(self, tp: int) -> str:
        """Which heads `tp` ranks cannot share evenly, in words, or ""."""
        return " and ".join(self._uneven(tp, [what for what in self.sizes if what.endswith("heads")]))

    def _uneven(self, tp: int, names: Iterable[str]) -> list[str]:
        return [f"{self.sizes[name]} {name}" for name in names if tp < 1 or self.sizes[name] % tp]

    def load(self, dtype: torch.dtype | None = None, **options: Any) -> torch.nn.Module:
        """The model in `dtype` (default: the checkpoint's), ready to run. Raises ModelError for what does not fit."""
        from transformers import PretrainedConfig

        if dtype is not None and dtype not in self.DTYPES:
            raise ModelError(f"dtype {dtype} is not supported; supported: {', '.join(map(str, self.DTYPES))}")
        name = "dtype" if hasattr(PretrainedConfig(), "dtype") else "torch_dtype"  # Transformers before 4.56
        options |= {name: dtype or "auto", "use_safetensors": not self._pickled}
        try:
            model, found = self.kind.from_pretrained(
                self.folder,
                local_files_only=True,
                trust_remote_code=self.trust.remote_code,
                output_loading_info=True,
                **options,
            )
        except pickle.UnpicklingError as error:
            raise ModelError(
                f"{self.folder} holds pickles of more than tensors, which could run any code; use safetensors"
            ) from error
        except (OSError, ValueError, RuntimeError) as error:
            raise ModelError(f"Transformers cannot load {self.folder}: {error}") from error
        for what in ("missing_keys", "mismatched_keys"):  # Transformers would go on with random weights
            if names := sorted(map(str, found[what])):
                more = f" and {len(names) - 3} more tensors" if len(names) > 3 else ""
                remedy = "download the model again"
                if self.predicts == "masked":
                    remedy += ", or one with its masked-language-model head if this is an encoder alone"
                raise ModelError(
                    f"{self.folder} lacks {', '.join(names[:3])}{more}, which a {type(model).__name__} has; {remedy}"
                )
        return model.eval()

    @property
    def _pickled(self) -> bool:
        return self.trust.pickled_weights and not _has_safetensors(self.folder)


def read_folder(
    folder: str | Path,
    trust: Trust = UNTRUSTED,
    keep: Keep = lambda *_: True,
    obstacle: Callable[[torch.nn.Module], str] = lambda _: "",
    encoders: bool = False,
) -> HfFolder:
    """Checks a folder and reads what is known of its model. Raises ModelError for what cannot generate text here.

    `obstacle`: of a model without weights, why more than one rank cannot share it, or "". `encoders`: take these too,
    which predict masked tokens.
    """
    folder = Path(folder)
    path, raw = read_config_json(folder)
    if raw.get("quantization_config"):
        raise ModelError(f"{path}: quantized weights are not supported; use an fp32, fp16 or bf16 checkpoint")
    with hushed():
        config = _config(folder, path, raw, trust)
    text = config.get_text_config()
    _check_weights(folder, trust)
    with hushed():
        predicts, kind = _kind(config, path, trust, encoders)
        model = _skeleton(kind, config, path, trust)
    from ..patches.hf.sites import named

    rows = {site: module for site, path, module in named(model) if keep(model, path, module)}
    return HfFolder(
        folder,
        config,
        kind,
        tuple(rows),
        text.vocab_size,
        _positions(text, model),
        predicts,
        _sizes(text, rows),
        trust,
        obstacle(model),
    )


def _config(folder: Path, path: Path, raw: dict[str, Any], trust: Trust) -> Any:
    import transformers
    from transformers import AutoConfig
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    model_type = raw.get("model_type")
    if model_type not in CONFIG_MAPPING and not trust.remote_code:
        if raw.get("auto_map"):
            raise ModelError(
                f"{path}: model_type {model_type!r} needs Python code of the folder's; read it, and then give "
                "--trust-remote-code"
            )
        raise ModelError(
            f"{path}: model_type {model_type!r} is not known to Transformers {transformers.__version__}; upgrade it, "
            "or use another model"
        )
    try:
        return AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=trust.remote_code)
    except Exception as error:  # each kind of wrong value has an exception of its own
        raise ModelError(f"{path} is refused by Transformers ({error}); download the model again") from error


def _check_weights(folder: Path, trust: Trust) -> None:
    if _has_safetensors(folder):
        open_safetensors(folder)
    elif not any(folder.glob("*.bin")):
        raise ModelError(f"{folder} has no weights; download model.safetensors too")
    elif not trust.pickled_weights:
        raise ModelError(
            f"{folder} has no safetensors, only pickled *.bin weights: save the model with save_pretrained, or, if you "
            "trust whoever made them, give --allow-pickled-weights"
        )


def _has_safetensors(folder: Path) -> bool:
    return (folder / "model.safetensors.index.json").is_file() or (folder / "model.safetensors").is_file()


def _kind(config: Any, path: Path, trust: Trust, encoders: bool) -> tuple[str, Any]:
    """What it predicts, and the Auto class of such models. Raises ModelError for one that generates no text."""
    from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, AutoModelForSeq2SeqLM
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING

    if config.is_encoder_decoder:
        predicts, kind = "continued", AutoModelForSeq2SeqLM
    elif type(config) in MODEL_FOR_MASKED_LM_MAPPING and not getattr(config, "is_decoder", False):
        if encoders:
            return "masked", AutoModelForMaskedLM
        raise ModelError(
            f"{path}: a {config.model_type} is an encoder, which generates no text; examples/bert_embeddings.py "
            "compares embeddings"
        )
    else:
        predicts, kind = "next", AutoModelForCausalLM
    remote = trust.remote_code and kind.__name__ in getattr(config, "auto_map", {})
    if type(config) not in kind._model_mapping and not remote:
        raise ModelError(f"{path}: Transformers has no text-generating model of type {config.model_type}; use another")
    return predicts, kind


def _skeleton(kind: Any, config: Any, path: Path, trust: Trust) -> torch.nn.Module:
    try:
        with torch.device("meta"):
            return kind.from_config(config, trust_remote_code=trust.remote_code)
    except Exception as error:  # whatever a model's constructor makes of values that do not fit together
        raise ModelError(f"{path} describes no model that can be built ({error}); download it again") from error


def _positions(config: Any, model: torch.nn.Module) -> int | None:
    """How many tokens a text may have. RoBERTa and its like count from behind the padding's position."""
    positions = getattr(config, "max_position_embeddings", None)
    tables = (part for path, part in model.named_modules() if path.endswith("embeddings.position_embeddings"))
    padding = next((table.padding_idx for table in tables if isinstance(table, torch.nn.Embedding)), None)
    return positions if positions is None or padding is None else positions - padding - 1


def _sizes(config: Any, rows: dict[str, torch.nn.Module]) -> dict[str, int]:
    """What the ranks share: heads, and features that enter a layer with partial sums."""
    sizes = {
        "attention heads": getattr(config, "num_attention_heads", None),
        "key-value heads": getattr(config, "num_key_value_heads", None),
    }
    for site, module in rows.items():
        sizes.setdefault(f"features that enter {site.rpartition('.')[2]}", _features(module))
    return {what: size for what, size in sizes.items() if isinstance(size, int)}


def _features(module: torch.nn.Module) -> int | None:
    if isinstance(module, torch.nn.Linear):
        return module.in_features
    if (weight := getattr(module, "weight", None)) is not None:  # GPT-2's Conv1D, which keeps it the other way round
        return weight.shape[0]
    experts = getattr(module, "down_proj", None)  # all experts of a layer in one tensor
    return experts.shape[-1] if isinstance(experts, torch.Tensor) else None


@contextmanager
def hushed(bars: bool = False) -> Iterator[None]:
    """Without Transformers' warnings and reports of loading, and its bars unless asked for; errors still pass."""
    from transformers.utils import logging

    level, shown = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    if not (bars and sys.stderr.isatty()):
        logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if shown:
            logging.enable_progress_bar()
