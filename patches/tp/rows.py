"""The layers of a loaded model whose sums are compressed, and whether a configuration fits them."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from megatron_lowbit.config import CommConfig
from megatron_lowbit.errors import ConfigError, ModelError
from megatron_lowbit.patches._handle import asks_for
from megatron_lowbit.patches.hf.sites import LOGITS, site_of

from .installed import EXPERTS, ROW, UNCOVERED, Installed, installed

_HEADS = ("q_proj", "k_proj", "query_key_value")  # what makes an attention's heads


@dataclass(frozen=True)
class Row:
    """A module whose outputs are partial sums."""

    site: str
    path: str
    module: torch.nn.Module
    installed: Installed


def rows_of(model: torch.nn.Module, config: CommConfig) -> list[Row]:
    """In the order of the modules; logits only if `sites` names them. Raises ModelError if there are none."""
    rows = []
    for path, module in model.named_modules():
        found = installed(module)
        site = site_in(model, path, found.kind) if found and found.mesh.size() > 1 else None
        if site is None or (site == LOGITS and not asks_for(config, LOGITS)):
            continue
        if found.kind in UNCOVERED:
            if config.selects(site):
                raise ModelError(
                    f"{path} is summed by Transformers' style 'gather', which this patch does not cover: leave {site} "
                    "out with sites=(...), or use a newer release"
                )
            continue
        if not found.replicates:
            raise ModelError(
                f"{path} scatters its sum or keeps it a DTensor, which this patch does not cover: "
                "load the model with a plan whose rows are 'rowwise'"
            )
        rows.append(Row(site, path, module, found))
    if not rows:
        raise ModelError(
            f"{type(model).__name__} has no row-parallel layer: load it on two ranks or more with "
            "distributed_config=DistributedConfig(tp_size=2), in Transformers 4 with tp_plan='auto', under torchrun"
        )
    _check_experts(model, config)
    return rows


def _check_experts(model: torch.nn.Module, config: CommConfig) -> None:
    """Raise ModelError if the experts that are to be compressed are spread by Transformers' expert parallelism.

    The configuration says so, as experts are spread after a plan has been applied.
    """
    ranks = getattr(getattr(model.config, "distributed_config", None), "ep_size", None) or 1
    for path, _ in model.named_modules():
        if ranks > 1 and path.endswith("experts") and config.selects(site := site_of(model, path)):
            raise ModelError(
                f"{site} lies on ranks of its own with ep_size={ranks}, and this patch does not cover that sum: load "
                "the model without ep_size, or leave its site out, as with sites=('layers.*.attention',)"
            )


def site_in(model: torch.nn.Module, path: str, kind: type = ROW) -> str | None:
    """The site of the summing module at `path`; None for what is no hidden state, such as an indexer's scores."""
    if kind in EXPERTS and "expert" not in path and not path.endswith("moe"):
        return None
    site = site_of(model, path)
    if site != path:
        return site
    head = getattr(model, "get_output_embeddings", lambda: None)()
    return LOGITS if head is not None and head is dict(model.named_modules()).get(path) else path


def check_sites(config: CommConfig, model: str, sites: list[str]) -> None:
    """Raise ConfigError if `sites` selects none, or names logits that are not summed."""
    if asks_for(config, LOGITS) and LOGITS not in sites:
        raise ConfigError(
            f"Transformers gathers the logits of {model}, they are no partial sums: leave 'logits' out of sites"
        )
    if sites and not any(config.selects(site) for site in sites):
        kinds = sorted({"layers.*." + site.rpartition(".")[2] if "layers." in site else site for site in sites})
        raise ConfigError(f"sites={config.sites!r} selects nothing in {model}: it has {', '.join(kinds)}")


def check_heads(model: torch.nn.Module, tp: int) -> None:
    """Raise ModelError where ranks would share a head, at which Transformers fails in the middle of a forward."""
    config = model.config.get_text_config()
    cut = [key for key, style in (model._tp_plan or {}).items() if style == "colwise" and key.endswith(_HEADS)]
    for name in ("num_attention_heads", "num_key_value_heads"):
        heads = getattr(config, name, None)
        if cut and isinstance(heads, int) and heads % tp:
            raise ModelError(
                f"{tp} ranks cannot share the {name}={heads} of {type(model).__name__}: use another TP size"
            )
