"""The options of `generate`, and everything about them that can be checked before a model is loaded."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..config import ALGORITHMS, DEFAULT_SPEC, CommConfig
from ..engines.registry import ENGINES, check_framework, engine_class
from ..errors import ConfigError
from . import launch
from .files import BUNDLED, bundled, check_output, read_text

if TYPE_CHECKING:
    from ..engines.base import Sampling
    from ..engines.model_facts import ModelFacts, Trust

EXACT = "exact"
DTYPES = {"auto": None, "bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}


def add_model_arguments(group: argparse._ArgumentGroup, engine: bool = True) -> None:
    """Add the options that say which model, how far to trust its folder and, if it matters, which engine runs it."""
    group.add_argument("--model", type=Path, metavar="DIR", help="Hugging Face folder (default: the bundled model)")
    if engine:
        engines = ", ".join(ENGINES)
        group.add_argument(
            "--engine", default="megatron", help=f"framework that runs the model: {engines} (default: megatron)"
        )
    group.add_argument(
        "--trust-remote-code", action="store_true", help="run Python files that the folder brings for its model"
    )
    group.add_argument(
        "--allow-pickled-weights", action="store_true", help="read *.bin weights where there are no safetensors"
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `generate`."""
    what = parser.add_argument_group("model")
    add_model_arguments(what)
    what.add_argument(
        "--tp", type=int, metavar="N", help="tensor-parallel ranks (default: 2, or as many as torchrun started)"
    )
    what.add_argument(
        "--dtype", choices=DTYPES, default="auto", help="of weights and activations (default: the checkpoint's)"
    )
    comm = parser.add_argument_group("communication")
    comm.add_argument(
        "--comm",
        metavar="SPEC",
        help=f"what partial sums travel as, such as int4:g32/int8:g128; '{EXACT}': as it is (default: {DEFAULT_SPEC})",
    )
    comm.add_argument(
        "--comm-algorithm", metavar="NAME", default="auto", help=f"one of {', '.join(ALGORITHMS)} (default: auto)"
    )
    comm.add_argument(
        "--comm-outer", metavar="SPEC", help="what travels between nodes in hierarchical (default: what --comm says)"
    )
    comm.add_argument(
        "--comm-min-bytes",
        type=int,
        metavar="N",
        default=0,
        help="leave smaller messages uncompressed (default: 0, so that every message shows its cost in accuracy; "
        "for speed, decode messages are better left exact)",
    )
    comm.add_argument(
        "--comm-sites", metavar="GLOB", action="append", help="compress these sites only, such as 'layers.*.mlp'"
    )
    comm.add_argument(
        "--comm-calibration",
        type=Path,
        metavar="FILE",
        help="what 'calibrate' wrote for this model and --tp; selective4 and outliers= need it",
    )
    comm.add_argument(
        "--comm-plan",
        "--lowbit-comm-plan",  # as in Megatron's scripts
        type=Path,
        metavar="FILE",
        help="a spec for each site, as plan chooses them",
    )
    comm.add_argument("--compare", action="store_true", help="run exactly as well, and compare")
    comm.add_argument(
        "--timeout", type=float, metavar="SECONDS", default=300, help="give up on a silent rank (default: 300)"
    )
    text = parser.add_argument_group("text")
    text.add_argument("--prompt", action="append", metavar="TEXT", help="prompt; may be repeated")
    text.add_argument("--prompts", type=Path, metavar="FILE", help="prompts, one per line")
    text.add_argument("--max-new-tokens", type=int, metavar="N", default=48, help="per prompt (default: %(default)s)")
    text.add_argument(
        "--temperature", type=float, metavar="T", help="0: greedy (default: greedy, or 1 with --top-k or --top-p)"
    )
    text.add_argument("--top-k", type=int, metavar="K", help="sample among the K likeliest tokens")
    text.add_argument(
        "--top-p", type=float, metavar="P", help="sample from the likeliest tokens that hold probability P"
    )
    text.add_argument("--seed", type=int, default=0, help="of the sampling (default: 0)")
    text.add_argument(
        "--text", type=Path, metavar="FILE", help="text to measure perplexity on (default: the bundled one)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result as JSON")


@dataclass(frozen=True)
class Job:
    """The checked arguments."""

    model: Path
    engine: str
    trust: Trust
    tp: int
    dtype: str | None
    config: CommConfig | None  # None: exact only
    compare: bool
    prompts: tuple[str, ...]
    sampling: Sampling
    text: str | None  # None: no perplexity
    json: Path | None
    debug: bool


def check(arguments: argparse.Namespace) -> Job:
    """Arguments -> Job. Raises ConfigError or ModelError for anything that can be known before a model is loaded."""
    check_framework(arguments.engine)
    sites = arguments.comm_sites and tuple(arguments.comm_sites)
    spec = None if arguments.comm == EXACT else arguments.comm
    files = {"calibration": arguments.comm_calibration, "plan": arguments.comm_plan}
    for name, value in {**files, "outer": arguments.comm_outer}.items():
        if arguments.comm == EXACT and value:
            raise ConfigError(f"--comm {EXACT} makes no use of --comm-{name} {value}: leave it out")
    more = files | {"outer_spec": arguments.comm_outer}
    config = CommConfig(spec, arguments.comm_algorithm, arguments.comm_min_bytes, sites, **more)
    if config.algorithm == EXACT and arguments.comm != EXACT:
        raise ConfigError(f"--comm-algorithm {EXACT} compresses nothing: give --comm {EXACT} if that is meant")
    if arguments.comm == EXACT:
        config = None
        if arguments.compare:
            raise ConfigError(
                f"--compare with --comm {EXACT} compares exact with exact: give a spec such as {DEFAULT_SPEC}"
            )
    tp = arguments.tp if arguments.tp is not None else launch.world_size() or 2
    if tp < 1:
        raise ConfigError(f"--tp is {tp}: give 1 or more ranks")
    if config is not None and tp == 1:
        raise ConfigError(
            f"--tp 1 has nothing to communicate, so nothing to compress: give --tp 2 or more, or --comm {EXACT}"
        )
    model = bundled(arguments.model, "model", "--model DIR")
    trust, facts = read_model(model, arguments, tp)
    if config is not None:
        _check_sites(config, facts, model, tp)
    sampling = _sampling(arguments)
    if facts.max_positions is not None and sampling.max_new_tokens >= facts.max_positions:
        raise ConfigError(
            f"--max-new-tokens is {sampling.max_new_tokens}, and the model has {facts.max_positions} positions for the "
            "prompt and the new tokens together: lower it"
        )
    if sampling.top_k >= facts.vocab:
        raise ConfigError(f"--top-k is {sampling.top_k}: it must stay below the vocabulary size, {facts.vocab}")
    check_output(arguments.json, "--json")
    if not 0 < arguments.timeout <= 1e6:
        raise ConfigError(f"--timeout is {arguments.timeout}: give seconds above 0, at most a million")
    if not 0 <= arguments.seed < 2**63:
        raise ConfigError(f"--seed is {arguments.seed}: give a number from 0 to 2**63 - 1")
    return Job(
        model,
        arguments.engine,
        trust,
        tp,
        DTYPES[arguments.dtype],
        config,
        arguments.compare,
        tuple(_prompts(arguments)),
        sampling,
        _text(arguments.text, facts),
        arguments.json,
        arguments.debug,
    )


def trust_of(arguments: argparse.Namespace) -> Trust:
    """How far the user trusts the model's folder."""
    from ..engines.model_facts import Trust

    return Trust(arguments.trust_remote_code, arguments.allow_pickled_weights)


def read_model(model: Path, arguments: argparse.Namespace, tp: int) -> tuple[Trust, ModelFacts]:
    """What the engine knows of a folder before it loads it, and how far it may trust it. Raises ModelError
    for a folder that it cannot run on `tp` ranks, ConfigError for options that it does not have."""
    trust = trust_of(arguments)
    facts = engine_class(arguments.engine).read(model, trust)
    facts.check_tensor_parallel(tp)
    return trust, facts


def _check_sites(config: CommConfig, facts: ModelFacts, model: Path, tp: int) -> None:
    """Raise ConfigError if nothing is selected, or the plan or the calibration is another's."""
    sites = facts.sites
    if sites and not any(map(config.selects, sites)):
        raise ConfigError(
            f"--comm-sites {' '.join(config.sites)} selects none of {sites[0]}, {sites[1]} … {sites[-1]}: give "
            "other globs"
        )
    if config.per_site:
        from ..engines.fingerprint import fingerprint, tensor_digests

        tensors = tensor_digests(model) if config.planned else {}
        config.check(sites, tp, fingerprint(model), tensors)


def _text(given: Path | None, facts: ModelFacts) -> str | None:
    """The text to score: the user's, else the bundled one, if the model can score any."""
    if not facts.scores:
        if given:
            raise ConfigError(f"an encoder-decoder has no perplexity of --text {given} alone: leave it out")
        return None
    path = given or BUNDLED / "sample_text.txt"
    return read_text(path, "--text") if given or path.is_file() else None


def _prompts(arguments: argparse.Namespace) -> list[str]:
    prompts = list(arguments.prompt or [])
    if any(not prompt.strip() for prompt in prompts):
        raise ConfigError("--prompt is empty: give at least one word")
    if arguments.prompts or not prompts:
        path = arguments.prompts or bundled(None, "prompts.txt", "--prompt TEXT")
        prompts += [line.strip() for line in read_text(path, "--prompts").splitlines() if line.strip()]
    return prompts


def _sampling(arguments: argparse.Namespace) -> Sampling:
    from ..engines.base import Sampling

    if arguments.temperature == 0 and (arguments.top_k is not None or arguments.top_p is not None):
        raise ConfigError("--temperature 0 is greedy, and --top-k or --top-p would do nothing: leave one of them out")
    if arguments.temperature is not None and not arguments.temperature >= 0:
        raise ConfigError(f"--temperature is {arguments.temperature}: give 0 for greedy, or a number above it")
    asked = bool(arguments.top_k or arguments.top_p)
    temperature = arguments.temperature if arguments.temperature is not None else float(asked)
    common = {"max_new_tokens": arguments.max_new_tokens, "seed": arguments.seed}
    if temperature == 0:
        return Sampling(**common)
    return Sampling(temperature=temperature, top_k=arguments.top_k or 0, top_p=arguments.top_p or 0.0, **common)
