"""Running a model over windows of text, exactly and in every case, in one process.

Windows are the outer loop: a window's exact logits, which can be large, are made once, compared with those of every
case and forgotten. What remains is a few numbers per token (metrics.py).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import torch

from .. import simulate
from ..engines.simulated_tp import simulated_tp
from ..errors import ModelError
from .cases import Case
from .metrics import Tokens, compare
from .windows import Window


@torch.inference_mode()
def evaluate(
    model: torch.nn.Module,
    windows: Sequence[Window],
    cases: Sequence[Case],
    done: Callable[[Case, int], bool] = lambda case, window: False,
) -> Iterator[tuple[int, Case, Tokens]]:
    """(number of the window, case, what its scored tokens tell) of all windows and cases but those that are `done`.

    model: a causal language model of Transformers on its device, in evaluation mode. Raises ModelError naming the site
    where it began if a case's logits are not finite, or if the exact ones already are not.
    """
    device = next(model.parameters()).device
    for number, window in enumerate(windows):
        todo = [case for case in cases if not done(case, number)]
        if not todo:
            continue
        ids = window.ids.to(device)
        scored, targets = slice(window.first - 1, -1), ids[window.first :]
        exact = _logits(model, ids)[scored]
        if not exact.isfinite().all():
            raise ModelError(f"window {number}: the model's own logits are not finite; evaluate it in fp32, or mend it")
        for case in todo:
            with simulated_tp(model, case.tp, _reduce(case)):
                logits = _logits(model, ids)[scored]
            tokens = compare(exact, logits, targets)
            if not math.isfinite(tokens.nll.sum().item()):
                raise ModelError(f"window {number}, {case.config.spec}, TP={case.tp}: {_blame(model, ids, case)}")
            yield number, case, Tokens(*(getattr(tokens, name).cpu() for name in Tokens.__dataclass_fields__))


def _logits(model: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    return model(input_ids=ids[None], use_cache=False).logits[0]


def _reduce(case: Case):
    return lambda site, partials: simulate.reduced(partials, case.config, site)


def _blame(model: torch.nn.Module, ids: torch.Tensor, case: Case) -> str:
    """Where the first value came from that is not finite."""
    first: list[str] = []

    def reduce(site: str, partials: list[torch.Tensor]) -> torch.Tensor:
        total = simulate.reduced(partials, case.config, site)
        if not first and not total.isfinite().all():
            made = all(partial.isfinite().all() for partial in partials)
            first.append(
                f"at {site}, whose sum is not finite though its partial sums are" if made else f"before {site}"
            )
        return total

    with simulated_tp(model, case.tp, reduce):
        _logits(model, ids)
    where = first[0] if first else "behind the last site"
    return f"the loss is not finite; it began {where}. Leave that site exact with --comm-sites, or use another spec"
