"""lm-evaluation-harness (lm_eval) on a model whose ranks are simulated: each question's scores, exact or compressed.

lm_eval builds the prompts, runs the model through its own HFLM and judges the answers; here the model's row-parallel
layers are split meanwhile (engines/simulated_tp.py). Nothing is kept on disk, and with tasks made of a text alone
nothing is asked of the network. What lm_eval would hide is looked for: logits that are not finite make it choose the
first answer, silently.
"""

from __future__ import annotations

import difflib
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from .. import simulate
from ..engines.simulated_tp import simulated_tp
from ..errors import ConfigError, LowBitError, ModelError
from . import local_tasks
from .cases import Case

SEED = 1234  # lm_eval's own, of everything that a task draws


@dataclass(frozen=True)
class Scores:
    """What one run made of a metric of a task. value: over all questions, as lm_eval aggregates them. each: of the
    questions, in order; None if they are no numbers, such as pairs of a sum and a weight. log: whether `each` are log
    likelihoods, and `value` their perplexity."""

    value: float
    each: list[float] | None
    log: bool


Found = dict[str, dict[str, Scores]]
"""Task (several of a group) -> metric -> scores."""


def check_installed() -> None:
    """Raise ConfigError unless lm_eval and scipy can be imported."""
    for package in ("lm_eval", "scipy"):
        if find_spec(package) is None:
            raise ConfigError(f"--tasks needs {package}: pip install 'megatron-lowbit[eval]'")


def installed() -> str:
    """lm_eval's version."""
    return version("lm_eval")


def manager(names: Sequence[str], folder: Path) -> Any:
    """lm_eval's TaskManager. folder: of the local tasks that are named, as local_tasks.write made it.

    Raises ConfigError for a name that nobody knows, with those that are like it.
    """
    from lm_eval.tasks import TaskManager

    others = [name for name in names if name not in local_tasks.TASKS]
    found = TaskManager(include_path=str(folder), include_defaults=bool(others))  # its own are many: seconds
    for name in others:
        if name not in found.all_tasks:
            like = difflib.get_close_matches(name, {*local_tasks.TASKS, *found.all_tasks}, n=4)
            hint = f"did you mean {' or '.join(like)}?" if like else "'lm_eval ls tasks' lists them"
            raise ConfigError(f"--tasks has {name!r}, which lm_eval {installed()} does not know: {hint}")
    return found


def load(manager: Any, name: str, unsafe: bool = False) -> dict[str, Any]:
    """Name -> lm_eval's Task of a task, or of all tasks of a group or tag. unsafe: whether tasks may run the code that
    the model writes. Raises ConfigError for one that would, and for one whose data cannot be had."""
    try:
        tasks = _tasks(manager, name)
    except Exception as error:  # of datasets, of the network, of a task's own code
        raise ConfigError(
            f"the task {name} cannot be loaded ({type(error).__name__}: {str(error)[:300]}): its data must be in the "
            "cache of datasets, or within reach; local_cloze and local_choice need none"
        ) from error
    for task in tasks.values():
        if getattr(task, "UNSAFE_CODE", False) and not unsafe:
            raise ConfigError(
                f"the task {name} runs code that the model writes: give --confirm-run-unsafe-code if it may"
            )
        if getattr(task, "MULTIMODAL", False):
            raise ConfigError(f"the task {name} has more than text in its prompts: use another")
        if task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)
    return tasks


def _tasks(manager: Any, name: str) -> dict[str, Any]:
    if hasattr(manager, "load"):
        return manager.load(name)["tasks"]
    from lm_eval.tasks import get_task_dict  # releases before that, such as 0.4.9

    return dict(_flat(get_task_dict([name], manager)))


def _flat(tasks: dict) -> Iterator[tuple[str, Any]]:
    for name, task in tasks.items():
        yield from _flat(task) if isinstance(task, dict) else [(name, task)]


class Harness:
    """A model to be asked. max_length: its positions, None: of any length. batch: questions at a time."""

    def __init__(
        self, model: torch.nn.Module, tokenizer: Any, max_length: int | None, batch: int, unsafe: bool = False
    ) -> None:
        self._model, self._unsafe = model, unsafe
        self._lm = _lm_class()(
            pretrained=model,
            tokenizer=tokenizer,
            backend="causal",
            max_length=max_length,
            batch_size=batch,
            softmax_dtype="float32",  # log likelihoods rounded to bf16 would tie
            add_bos_token=bool(tokenizer("")["input_ids"]),  # as this tokenizer does; lm_eval's default has changed
        )

    def scores(self, tasks: dict[str, Any], limit: int | None, case: Case | None) -> Found:
        """Ask all questions of `load`ed tasks, the first `limit` of each. case: None for the model as it is.

        Raises ModelError if logits are not finite, naming the site where it began, and if lm_eval fails.
        """
        from lm_eval.evaluator import evaluate

        _seed()
        for task in tasks.values():
            task.set_fewshot_seed(seed=SEED)
        broken: list[str] = []
        self._lm.broken = lambda: _where(broken, case)
        with simulated_tp(self._model, case.tp, _reduce(case, broken)) if case else nullcontext():
            try:
                result = evaluate(
                    self._lm,
                    dict(tasks),
                    limit=limit,
                    bootstrap_iters=0,  # the errors it would give are not paired
                    log_samples=True,
                    confirm_run_unsafe_code=self._unsafe,
                )
            except LowBitError:
                raise
            except Exception as error:  # of a task's own code, of memory, of a prompt that does not fit
                raise ModelError(f"lm_eval fails at {', '.join(tasks)} ({type(error).__name__}: {error})") from error
        scores, samples = result["results"], result["samples"]
        return {name: dict(_metrics(task, scores[name], samples[name])) for name, task in tasks.items()}


def _lm_class() -> type:
    """HFLM that says where it broke, and shows no bars."""
    from lm_eval.models.huggingface import HFLM

    class Checked(HFLM):
        broken: Callable[[], str]

        def _model_call(self, *args: Any, **options: Any) -> torch.Tensor:
            return self._checked(super()._model_call(*args, **options))

        def _model_generate(self, *args: Any, **options: Any) -> torch.Tensor:
            def look(_model, _given, output) -> None:
                self._checked(output.logits[:, -1])  # those before it may be of padding

            with self.model.register_forward_hook(look):
                return super()._model_generate(*args, **options)

        def _checked(self, logits: torch.Tensor) -> torch.Tensor:
            if not logits.isfinite().all():
                raise ModelError(self.broken())
            return logits

    return Checked


def _reduce(case: Case, broken: list[str]) -> Callable:
    def reduce(site: str, partials: list[torch.Tensor]) -> torch.Tensor:
        total = simulate.reduced(partials, case.config, site, case.nodes)
        if not broken and not total.isfinite().all():
            broken.append(site)
        return total

    return reduce


def _where(broken: list[str], case: Case | None) -> str:
    if case is None:
        return "the model's own logits are not finite; evaluate it in fp32, or mend it"
    where = f"at {broken[0]}" if broken else "behind the last site"
    return (
        f"{case.config.spec}, TP={case.tp}: the logits of a task are not finite; it began {where}. Leave that site "
        "exact with --comm-sites, or use another spec"
    )


def _metrics(task: Any, results: dict, samples: list[dict]) -> Iterator[tuple[str, Scores]]:
    """From what lm_eval aggregated, as "metric,filter", and what it noted of each question."""
    for key, value in results.items():
        metric, _, chosen = key.partition(",")
        if not chosen or metric.endswith("_stderr") or not _is_number(value):
            continue
        asked = sorted((one for one in samples if one["filter"] == chosen and metric in one), key=_number)
        each = [one[metric] for one in asked]
        aggregation = getattr(task.aggregation().get(metric), "__name__", "")
        known = all(map(_is_number, each)) and aggregation in ("mean", "nanmean", "perplexity")
        yield (
            metric if chosen == "none" else key,
            Scores(float(value), [float(score) for score in each] if known else None, aggregation == "perplexity"),
        )


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) or getattr(value, "ndim", None) == 0  # numpy's too


def _number(sample: dict) -> int:
    return sample["doc_id"]


def _seed() -> None:
    import numpy as np

    random.seed(0)
    np.random.seed(SEED)
    torch.manual_seed(SEED)
