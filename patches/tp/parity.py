"""Whether a plan shards a model rightly: a small random copy of it, sharded and whole, must give the same outputs.

Transformers applies any rules without a word. A row of OPT that is summed twice, or a head that is cut in two, yields
fluent nonsense. The copy has two layers and, where that is known to be possible, narrow ones.
"""

from __future__ import annotations

import tempfile

import torch
import torch.distributed as dist

from megatron_lowbit.errors import ConfigError, ModelError

from .models import Plan, blank, check_keys, unsharded

TOLERANCE = 1e-3  # of the largest output; what is right differs by some 1e-6
_TOKENS = (2, 12)
_checked: set[tuple] = set()


def check_plan(model_config, plan: Plan, tp_size: int | None = None) -> float:
    """Raise ModelError if `plan`, over the model's own, shards it wrongly -> the largest difference seen, relatively.

    All ranks call this. model_config: of the model, as AutoConfig reads it. tp_size: all ranks, which is what
    Transformers can do without other parallelisms. ConfigError if torch.distributed is not initialised.
    """
    if not dist.is_available() or not dist.is_initialized():
        raise ConfigError(
            "a plan is checked on the ranks: start the program with torchrun, or init_process_group first"
        )
    world = dist.get_world_size()
    if world == 1 or tp_size not in (None, world):
        raise ConfigError(f"a plan is checked on all ranks, which are {world}: tp_size={tp_size or world} cannot be")
    model = blank(model_config)
    check_keys(model, plan)
    with torch.random.fork_rng(devices=[]), tempfile.TemporaryDirectory() as folder:
        whole = _small(model_config, world)
        _save(whole, folder)
        difference = torch.tensor([_difference(whole, folder, (model.tp_plan or {}) | plan, world)])
    dist.all_reduce(difference, dist.ReduceOp.MAX)
    if not difference.item() <= TOLERANCE:
        raise ModelError(
            f"this plan shards {type(whole).__name__} wrongly: on {world} ranks a small copy's outputs are off by "
            f"{difference.item():.3g} of the largest. Its column-parallel layers must be cut where heads are, each row "
            "summed once"
        )
    _checked.add(_key(model_config, plan))
    return difference.item()


def was_checked(model_config, plan: Plan) -> bool:
    """Whether `check_plan` has accepted these rules, or more than these, in this process."""
    kind, rules = _key(model_config, plan)
    return any(kind == other and rules <= more for other, more in _checked)


def _key(model_config, plan: Plan) -> tuple:
    return model_config.model_type, frozenset(plan.items())


def _small(model_config, world: int) -> torch.nn.Module:
    """A random model like it, the same on all ranks."""
    torch.manual_seed(0)
    for shrink in (_narrow, _shallow):
        small = shrink(unsharded(model_config), world)
        try:
            kind = type(blank(small))
            model = kind(small).float().eval()
        except Exception:  # sizes that do not go together: the next has those of the model
            if shrink is _shallow:
                raise
            continue
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.1)
        return model


def _shallow(config, world: int):
    text = config.get_text_config()
    text.num_hidden_layers = min(2, text.num_hidden_layers)
    text.vocab_size = 32 * world
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        if isinstance(getattr(text, name, None), int):
            setattr(text, name, 0)
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[: text.num_hidden_layers]
    return config


def _narrow(config, world: int):
    text = _shallow(config, world).get_text_config()
    head = 8
    wide = head * text.num_attention_heads
    for name in ("hidden_size", "word_embed_proj_dim"):
        if getattr(text, name, None):
            setattr(text, name, wide)
    for name in ("intermediate_size", "ffn_dim", "moe_intermediate_size"):
        if getattr(text, name, None):
            setattr(text, name, 16 * world)
    if getattr(text, "head_dim", None):
        text.head_dim = head
    return config


def _save(model: torch.nn.Module, folder: str) -> None:
    """Write the model on every rank; `save_pretrained` does on the first alone."""
    from safetensors.torch import save_file

    tensors = {tensor.data_ptr(): (name, tensor) for name, tensor in reversed(model.state_dict().items())}  # tied: once
    model.config.save_pretrained(folder)
    save_file(dict(tensors.values()), f"{folder}/model.safetensors", {"format": "pt"})


def _difference(whole: torch.nn.Module, folder: str, plan: Plan, world: int) -> float:
    from transformers.distributed import DistributedConfig

    ids = torch.arange(_TOKENS[0] * _TOKENS[1]).view(_TOKENS) % whole.config.get_text_config().vocab_size
    distributed = DistributedConfig(tp_size=world, tp_plan=plan)
    try:
        sharded = type(whole).from_pretrained(folder, distributed_config=distributed, dtype=torch.float32).eval()
        with torch.no_grad():
            expected, got = whole(ids)[0], sharded(ids)[0]
    except Exception as error:
        raise ModelError(f"Transformers cannot run {type(whole).__name__} with this plan: {error}") from error
    return float((got - expected).abs().max() / expected.abs().max())
