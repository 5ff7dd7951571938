"""Names of sites in a Transformers model: "layers.3.attention", from a module's path.

The number is that of the transformer layer in its stack. Of a model with an encoder and a decoder, the encoder's layers
are "encoder.layers.3", as with Megatron. A family without a policy is named by what paths usually say. What lies in no
layer of the language model, such as a vision tower, keeps its path for a name.

Paths and class names decide, never what a module computes with: a model that was sharded, whose linear layers are other
objects by then, has the same sites as before.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping

import torch

from .policies import POLICIES, Policy

LOGITS = "logits"
_LAYER = re.compile(r"(?P<before>.*?)\.?\b(?P<stack>\w+)\.(?P<index>\d+)\.(?P<within>.+)")
_ATTENTION = re.compile(r"attn|attention", re.IGNORECASE)
_CROSS = re.compile(r"cross|encdec|enc_attn|encoder_attn", re.IGNORECASE)
_BESIDE = re.compile(r"vision|visual|image|audio", re.IGNORECASE)  # stacks beside the language model's
# How row-parallel layers are usually called: what DeepSpeed's AutoTP looks for, and the other names of policies.py.
_USUAL = re.compile(
    r"(.+\.)?(o_proj|out_proj|down_proj|c_proj|dense_4h_to_h|fc2|fc_out|wo|w2|out_lin|lin2|output\.dense"
    r"|\w*(attn|attention)\.dense)"
)


def policy_of(model: torch.nn.Module) -> Policy | None:
    """The policy of the model's family, of its text part if it has several, or None for a family that has none."""
    config = getattr(model, "config", None)
    kinds = [getattr(part, "model_type", None) for part in (config, getattr(config, "text_config", None))]
    return next((POLICIES[kind] for kind in kinds if kind in POLICIES), None)


def named(model: torch.nn.Module) -> Iterator[tuple[str, str, torch.nn.Module]]:
    """(site, path, module) of every module that makes partial sums, in the order of the modules.

    These are what the family's policy lists or, without one, the linear layers with usual names.
    """
    policy = policy_of(model)
    for path, module in model.named_modules():
        match = _LAYER.fullmatch(path)
        if match is None or next(module.parameters(recurse=False), None) is None:
            continue  # also "mlp.experts", where that is but a list of modules
        if policy is None:
            usual = _USUAL.fullmatch(match["within"]) and not _BESIDE.search(match["before"])
            part = _guess(match["within"]) if usual else None
        else:
            part = _part(match["within"], policy.rows)
            part = part if part and _in_layer(model, match, policy) else None
        if part:
            yield _site(match, part, model), path, module


def site_of(model: torch.nn.Module, path: str) -> str:
    """The site of the row-parallel module at `path`; the path itself if it lies in no layer of the language model."""
    match = _LAYER.fullmatch(path)
    policy = policy_of(model)
    if match is None or _BESIDE.search(match["before"]) or (policy and not _in_layer(model, match, policy)):
        return path
    part = policy and _part(match["within"], policy.rows)
    return _site(match, part or _guess(match["within"]), model)


def half_found(sites: Iterable[str]) -> str | None:
    """Of sites that were found by their names: the first layer without one for its attention or for its MLP, in words.

    Each transformer layer sums twice, so what the other layer is called is not known.
    """
    sites = set(sites)
    for layer in sorted({site.rsplit(".", 1)[0].removesuffix(".moe") for site in sites}):
        kinds = {site.removeprefix(f"{layer}.") for site in sites if site.startswith(f"{layer}.")}
        if "attention" not in kinds or kinds <= {"attention", "cross_attention"}:
            return f"of {layer} only {', '.join(sorted(kinds))} has a usual name for a row-parallel layer"
    return None


def _in_layer(model: torch.nn.Module, match: re.Match, policy: Policy) -> bool:
    layer = model.get_submodule(match.string[: match.start("within") - 1])
    return any(kind.__name__ in policy.layers for kind in type(layer).__mro__)  # FSDP puts a class of its own on top


def _part(within: str, rows: Mapping[str, str]) -> str | None:
    """The end of the site's name: of the row whose path, "*" standing for one part, this is."""
    for pattern, part in rows.items():
        if re.fullmatch(re.escape(pattern).replace(r"\*", r"[^.]+"), within):
            return part
    return None


def _guess(within: str) -> str:
    if _CROSS.search(within):
        return "cross_attention"
    if _ATTENTION.search(within):
        return "attention"
    if "shared_expert" in within:
        return "moe.shared_experts"
    return "moe.experts" if "expert" in within else "mlp"


def _site(match: re.Match, part: str, model: torch.nn.Module) -> str:
    return f"{'encoder.' if _beside_decoder(match['before'], model) else ''}layers.{match['index']}.{part}"


def _beside_decoder(before: str, model: torch.nn.Module) -> bool:
    """Whether the stack is an encoder with a decoder next to it: T5's is, BERT's and that of T5EncoderModel are not."""
    above, found, _ = f".{before}.".partition(".encoder.")
    return bool(found) and hasattr(model.get_submodule(above.strip(".")), "decoder")
