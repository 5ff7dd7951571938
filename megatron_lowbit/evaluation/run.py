"""Running a model over windows of text, exactly and in every case, in one process.

Windows are the outer loop: a window's exact logits, which can be large, are made once, compared with those of every
case and forgotten. What remains is a few numbers per token (metrics.py).
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Sequence

import torch

from .. import simulate
from ..engines.simulated_tp import Reduce, simulated_tp
from ..errors import ModelError
from .cases import Case
from .metrics import ROWS, Tokens, compare
from .windows import Window


@torch.inference_mode()
def evaluate(
    model: torch.nn.Module,
    windows: Sequence[Window],
    cases: Sequence[Case],
    done: Callable[[Case, int], bool] = lambda case, window: False,
) -> Iterator[tuple[int, Case, Tokens]]:
    """(number of the window, case, what its scored tokens tell) of all windows and cases but those that are `done`.

    model: of Transformers with its head, on its device, in evaluation mode; windows: of the kind that it can predict.
    Raises ModelError naming the site where it began if a case's logits are not finite, or the exact ones already.
    """
    device = next(model.parameters()).device
    for number, window in enumerate(windows):
        todo = [case for case in cases if not done(case, number)]
        if not todo:
            continue
        targets, exact = window.targets.to(device), predictions(model, window)
        if not all(logits.isfinite().all() for logits in exact.split(ROWS)):
            began = _began(model, window, todo[0].tp, lambda _, partials: sum(partials))
            raise ModelError(
                f"window {number}: the model's own logits are not finite; it began {began}. Evaluate it in fp32, or "
                "mend it"
            )
        for case in todo:
            with simulated_tp(model, case.tp, _reduce(case)):
                tokens = compare(exact, predictions(model, window), targets)
            if not math.isfinite((tokens.nll + tokens.kl).sum().item()):  # one logit of -inf is seen in KL alone
                began = _began(model, window, case.tp, _reduce(case))
                raise ModelError(
                    f"window {number}, {case.config.spec}, TP={case.tp}: the loss is not finite; it began {began}. "
                    "Leave that site exact with --comm-sites, or use another spec"
                )
            yield number, case, Tokens(*(getattr(tokens, name).cpu() for name in Tokens.__dataclass_fields__))


def predictions(model: torch.nn.Module, window: Window) -> torch.Tensor:
    """Logits [scored, vocabulary] of a window, in the model's dtype."""
    known = inspect.signature(model.forward).parameters
    constant = {"use_cache": False} if "use_cache" in known else {}  # an encoder has none
    logits = model(**window.inputs(next(model.parameters()).device), **constant).logits[0]
    first, last = window.positions[[0, -1]].tolist()
    if last - first + 1 == window.scored:
        return logits[first : last + 1]  # no copy of what can be gigabytes
    return logits[window.positions.to(logits.device)]


def _reduce(case: Case):
    return lambda site, partials: simulate.reduced(partials, case.config, site, case.nodes)


def _began(model: torch.nn.Module, window: Window, tp: int, reduce: Reduce) -> str:
    """Where the first value came from that is not finite."""
    first: list[str] = []

    def watched(site: str, partials: list[torch.Tensor]) -> torch.Tensor:
        total = reduce(site, partials)
        if not first and not total.isfinite().all():
            made = all(partial.isfinite().all() for partial in partials)
            first.append(
                f"at {site}, whose sum is not finite though its partial sums are"
                if made
                else f"before the sum of {site}"
            )
        return total

    with simulated_tp(model, tp, watched):
        predictions(model, window)
    return first[0] if first else "behind the last site"
