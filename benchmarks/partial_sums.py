"""The partial sums of a Hugging Face Llama at TP N, from real text, for the quality benchmark.

The model computes in fp32 with exact sums, so what is measured at one site is not changed by the sites before it; its
partial sums are rounded to bf16, as a model that runs in bf16 would send them. One half of the text calibrates, the
other is measured.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import torch

from megatron_lowbit.calibration import RangeTracker
from megatron_lowbit.calibration_file import Calibration
from megatron_lowbit.engines.simulated_tp import simulated_tp

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
WINDOW = 512


@dataclass(frozen=True)
class Source:
    """A model, and windows of token ids [windows, tokens] of two parts of a text."""

    model: torch.nn.Module
    calibration: torch.Tensor
    measured: torch.Tensor
    facts: dict

    @classmethod
    def load(cls, folder: Path, text: Path, tokens: int) -> Source:
        """tokens: how many of the text's first ones to use, at most."""
        from transformers import AutoModelForCausalLM, AutoTokenizer

        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa").eval()
        words = text.read_text(encoding="utf-8")
        ids = AutoTokenizer.from_pretrained(folder)(words, return_tensors="pt")["input_ids"][0, :tokens]
        length = min(WINDOW, len(ids) // 2)
        windows = ids[: len(ids) // length * length].view(-1, length)
        half = len(windows) // 2
        first, second = windows[:half], windows[half : 2 * half]
        facts = {
            "model": folder.name, "text": text.name, "text_sha256": hashlib.sha256(words.encode()).hexdigest(),
            "window": length, "tokens_calibrated": first.numel(), "tokens_measured": second.numel(),
            "calibrated_on": f"the text's first {first.numel():,} tokens", "measured_on": "those that follow",
        }  # fmt: skip
        return cls(model, first, second, facts)


@torch.inference_mode()
def partial_sums(source: Source, tp: int) -> tuple[dict[str, list[torch.Tensor]], Calibration]:
    """(what `tp` ranks would reduce of the measured half, by site: values of bf16 in fp32 [tokens, features] of every
    rank; the other half's calibration).
    """
    tracker, windows = RangeTracker(), {}

    def calibrate(site: str, partials: list[torch.Tensor]) -> torch.Tensor:
        tracker.observe(site, [x.bfloat16().float() for x in partials])
        return sum(partials)

    def keep(site: str, partials: list[torch.Tensor]) -> torch.Tensor:
        windows.setdefault(site, []).append(torch.cat(partials).bfloat16().float())
        return sum(partials)

    for ids, see in ((source.calibration, calibrate), (source.measured, keep)):
        with simulated_tp(source.model, tp, see):
            for window in ids:
                source.model.model(input_ids=window[None], use_cache=False)
    return {site: list(torch.cat(parts, 1)) for site, parts in windows.items()}, tracker.finish()
