"""Names of sites in a Transformers model: "layers.3.attention", from a module's path.

The number is that of the transformer layer in its stack. Of a model with an encoder and a decoder, the encoder's layers
are "encoder.layers.3", as with Megatron. A family without a policy is named by what paths usually say.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

import torch

from .policies import POLICIES, Policy

LOGITS = "logits"
_LAYER = re.compile(r"(?P<before>.*?)\.?\b(?P<stack>\w+)\.(?P<index>\d+)\.(?P<within>.+)")
_ATTENTION = re.compile(r"attn|attention", re.IGNORECASE)
_CROSS = re.compile(r"cross|encdec|enc_attn|encoder_attn", re.IGNORECASE)


def policy_of(model: torch.nn.Module) -> Policy | None:
    """The policy of the model's family, or None for a family that has none."""
    return POLICIES.get(getattr(getattr(model, "config", None), "model_type", ""))


def named(model: torch.nn.Module) -> Iterator[tuple[str, str, torch.nn.Module]]:
    """(site, path, module) of every module that a policy lists, in the order of the modules."""
    policy = policy_of(model)
    if policy is None:
        return
    layers = {path for path, module in model.named_modules() if type(module).__name__ in policy.layers}
    for path, module in model.named_modules():
        match = _LAYER.fullmatch(path)
        if match and path[: match.start("within") - 1] in layers and (part := _part(match["within"], policy.rows)):
            yield _site(match, part, model), path, module


def site_of(model: torch.nn.Module, path: str) -> str:
    """The site of the row-parallel module at `path`; the path itself if it lies in no numbered layer."""
    match = _LAYER.fullmatch(path)
    if match is None:
        return path
    policy = policy_of(model)
    part = policy and _part(match["within"], policy.rows)
    return _site(match, part or _guess(match["within"]), model)


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
    return "moe.experts" if "expert" in within else "mlp"


def _site(match: re.Match, part: str, model: torch.nn.Module) -> str:
    stacks = match["before"].split(".")
    beside = "encoder" in stacks and getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    return f"{'encoder.' if beside else ''}layers.{match['index']}.{part}"
