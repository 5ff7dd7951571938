"""The flags of low-bit communication for scripts that parse their arguments with Megatron-LM, and what they mean.

    initialize_megatron(extra_args_provider=add_lowbit_args)      # or parse_and_validate_args(extra_args_provider=...)
    enable_from_args(get_args())                                  # before the model is built

A script with a provider of its own passes `lambda parser: add_lowbit_args(its_own(parser))`. Megatron is imported by
`enable_from_args` only, so that flags can be checked, and shown, where it is not installed.
"""

from __future__ import annotations

import argparse
import os
import warnings
from typing import TYPE_CHECKING

from megatron_lowbit.config import ALGORITHMS, CommConfig
from megatron_lowbit.errors import ConfigError

from . import apex

if TYPE_CHECKING:
    from megatron_lowbit.patches.megatron_core import Handle

EXACT = "exact"  # a "spec" that hooks and counts everything and compresses nothing, to compare with
FLAG = "--lowbit-comm"
OPTIONS = {  # flag: keywords of add_argument; each takes one value, on which cli/run.py relies
    FLAG: {"metavar": "SPEC", "help": f"what partial sums travel as, such as int4:g32/int8:g128, or '{EXACT}'"},
    f"{FLAG}-algorithm": {"metavar": "NAME", "help": f"one of {', '.join(ALGORITHMS)} (default: auto)"},
    f"{FLAG}-outer": {"metavar": "SPEC", "help": f"what travels between nodes in hierarchical (default: as {FLAG})"},
    f"{FLAG}-min-bytes": {
        "metavar": "N",
        "type": int,
        "help": "leave smaller messages uncompressed (default: the measured threshold, or 0 with a named algorithm)",
    },
    f"{FLAG}-sites": {
        "metavar": "GLOB",
        "action": "append",
        "help": "compress these sites only, such as 'layers.*.mlp'; may be repeated",
    },
    f"{FLAG}-calibration": {"metavar": "FILE", "help": "what 'megatron-lowbit calibrate' wrote for this model and TP"},
    f"{FLAG}-plan": {"metavar": "FILE", "help": f"a spec for each site, in place of {FLAG}"},
}


class _Once(argparse.Action):
    """Refuses to be given twice, where argparse would silently take the last."""

    _seen: argparse.Namespace | None = None

    def __call__(self, parser, namespace, values, option_string=None) -> None:
        if namespace is self._seen:
            parser.error(f"{option_string} is given twice: give it once")
        self._seen = namespace
        setattr(namespace, self.dest, values)


def add_lowbit_args(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add the flags to a parser, once however often this is called -> the parser. Values land in args.lowbit_comm…"""
    if FLAG not in parser._option_string_actions:
        group = parser.add_argument_group("low-bit communication")
        for flag, keywords in OPTIONS.items():
            group.add_argument(flag, **{"action": _Once} | keywords)
    return parser


def config_from_args(args: argparse.Namespace) -> CommConfig | None:
    """What the flags ask for; None without a spec and a plan. Raises ConfigError for values that cannot be used."""
    given = {flag: getattr(args, flag[2:].replace("-", "_"), None) for flag in OPTIONS}
    if given[FLAG] is None and given[f"{FLAG}-plan"] is None:
        if not hasattr(args, "lowbit_comm"):
            raise ConfigError(
                "args has no lowbit_comm: parse the arguments with extra_args_provider=add_lowbit_args, or with "
                "--yaml-cfg set lowbit_comm in that file"
            )
        if idle := [flag for flag, value in given.items() if value is not None]:
            raise ConfigError(f"{idle[0]} does nothing without {FLAG}: give {FLAG} SPEC too, such as int4:g32")
        return None
    spec, algorithm, outer, min_bytes, sites, calibration, plan = given.values()
    if spec == EXACT:
        for name, value in (("algorithm", None if algorithm == EXACT else algorithm), ("outer", outer)):
            if value is not None:
                raise ConfigError(f"{FLAG} {EXACT} and {FLAG}-{name} {value} exclude each other: leave one out")
        return CommConfig(algorithm=EXACT, min_bytes=min_bytes, sites=sites, calibration=calibration, plan=plan)
    return CommConfig(spec, algorithm or "auto", min_bytes, sites, calibration, plan, outer_spec=outer)


def enable_from_args(args: argparse.Namespace) -> Handle | None:
    """`enable` for the whole process as the flags say; call it before the model is built.

    args: as Megatron parsed and validated them. Returns None without --lowbit-comm, and with a tensor-parallel size of
    1, of which it warns. Raises ConfigError for flags that cannot be used, also for a plan or calibration of another TP
    size.
    """
    config = config_from_args(args)
    if config is None or not fits(config, args.tensor_model_parallel_size):
        return None
    from megatron_lowbit.patches.megatron_core import enable

    from . import hooks

    apex.warn_if_foreign()
    if hooks.process_wide is not None and hooks.process_wide.config == config:
        return hooks.process_wide  # the launcher was given the same flags
    return enable(config)


def fits(config: CommConfig, tp: int) -> bool:
    """Whether there is anything to compress at this tensor-parallel size; warns if not.

    Raises ConfigError if the plan or the calibration was made for another.
    """
    if tp == 1:
        if os.environ.get("RANK", "0") == "0":
            warnings.warn(
                f"{FLAG} {config.spec} compresses nothing with a tensor-parallel size of 1, as nothing is sent: give "
                "--tensor-model-parallel-size 2 or more, or leave the flag out",
                stacklevel=3,
            )
        return False
    config.check(tp=tp)
    return True
