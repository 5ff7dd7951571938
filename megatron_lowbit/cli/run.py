"""`run`: an unedited Megatron script with compressed communication, started by torchrun.

The flags are taken out of the script's command line, so that any script runs, and put into Megatron-LM's own parser
with their values, so that they show in `--help` and `args` (patches/megatron/unedited.py). The script is run in this
process as if Python had been given its name. What it would be wrong to hide is an error at its end: nothing compressed.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import sys
import traceback
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from itertools import islice
from pathlib import Path

from .. import telemetry
from ..config import CommConfig
from ..errors import ConfigError, LowBitError, ModelError
from . import launch
from .files import check_output

HELP = "run an unedited Megatron script with compressed communication"
DESCRIPTION = """Run a script that uses Megatron-Core, unedited, with its tensor-parallel communication compressed.
Start it with torchrun. The flags may stand before or after SCRIPT; everything else behind it is the script's own."""
EXAMPLES = """examples:
  torchrun --nproc-per-node 2 -m megatron_lowbit run gpt_static_inference.py --lowbit-comm int8:g128 --load DIR ...
  torchrun --nproc-per-node 2 -m megatron_lowbit run --lowbit-comm exact --lowbit-comm-json exact.json SCRIPT ...
"""
JSON = "--lowbit-comm-json"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `run`; those behind SCRIPT are split off by `split`."""
    from ..patches.megatron.arguments import add_lowbit_args

    add_lowbit_args(parser)
    parser.add_argument(JSON, type=Path, metavar="FILE", help="write what rank 0 sent, per site")
    parser.add_argument("script", metavar="SCRIPT", help="a Python file")
    parser.add_argument("rest", metavar="...", nargs=argparse.REMAINDER, help="the script's own arguments, and flags")


def run(arguments: argparse.Namespace) -> int:
    """Run the script -> exit code. Raises what this package raises inside the script, and ModelError for no effect."""
    from ..patches.megatron.arguments import config_from_args

    flags, script, rest = _parse(arguments.argv[1:])
    if not os.path.isfile(script):
        raise ConfigError(f"there is no script {script}: give the name of a Python file behind the flags")
    check_output(flags.lowbit_comm_json, JSON)
    config = config_from_args(flags)
    with _as_main(script, rest):
        return _run(script, config, flags, arguments.debug)


def split(argv: list[str], flags: tuple[str, ...]) -> tuple[list[str], list[str]]:
    """(our flags with their values, everything else verbatim). Raises ConfigError for a misspelt flag of ours."""
    ours, theirs, rest = [], [], iter(argv)
    for token in rest:
        name, equals, _ = token.partition("=")
        if token == "--":
            theirs += [token, *rest]
        elif name in flags:
            ours += [token] if equals else [token, *islice(rest, 1)]
        elif name.startswith("--lowbit"):
            raise ConfigError(f"unknown flag {name}: use one of {', '.join(flags)}")
        else:
            theirs.append(token)
    return ours, theirs


def _parse(argv: list[str]) -> tuple[argparse.Namespace, str, list[str]]:
    """(the flags' values, SCRIPT, its arguments), of what argparse accepted but would not hand on verbatim."""
    from ..patches.megatron.arguments import OPTIONS, add_lowbit_args

    names, at = (*OPTIONS, JSON), 0
    while argv[at].startswith("-"):
        at += 2 if argv[at] in names else 1
    before, behind = split(argv[:at], names)[0], split(argv[at + 1 :], names)
    parser = add_lowbit_args(_Parser(allow_abbrev=False, add_help=False))
    parser.add_argument(JSON, type=Path)
    return parser.parse_args(before + behind[0]), argv[at], behind[1]


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:
        raise ConfigError(f"{message}; see 'megatron-lowbit run --help'")


def _run(script: str, config: CommConfig | None, flags: argparse.Namespace, debug: bool) -> int:
    # Asked otherwise, CUDA reads CUDA_VISIBLE_DEVICES now, and forks now count as bad; both are the script's to decide.
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
    import torch

    from ..patches import megatron_core, megatron_cpu
    from ..patches.megatron import apex, arguments, unedited

    asked = config
    if config is None:
        _say("no --lowbit-comm: the script runs as it is")
    elif launch.world_size() in (None, 1):
        arguments.fits(config, tp=1)
        config = None
    apex.warn_if_foreign()
    if not torch.cuda.is_available():
        _say("no CUDA here: Megatron's CUDA calls are answered on the CPU, for development only")
    on_cpu = megatron_cpu.enable_training()  # where CUDA exists, it changes nothing
    around = unedited.Surroundings(config, flags)
    handle = megatron_core.enable(config) if config is not None else None

    def conclude(check: bool = True) -> None:
        stats, helping = telemetry.stats(), bool({"-h", "--help"} & set(sys.argv))
        check = check and handle is not None and not helping
        if stats or check or (flags.lowbit_comm_json is not None and not helping):
            _summary(asked, stats, flags.lowbit_comm_json)
        if check and around.tp != 1:
            _check(script, config, handle.sites, stats)

    try:
        with _exits(conclude):
            return _execute(script, conclude, debug)
    finally:
        around.undo()
        on_cpu.disable()
        if handle is not None:
            handle.disable()


def _execute(script: str, conclude: Callable[..., None], debug: bool) -> int:
    """Run the script as __main__. Its errors are shown without the launcher's frames, and end with 1 as in Python."""
    try:
        main = sys.modules["__main__"] = types.ModuleType("__main__")
        main.__file__ = os.path.abspath(script)
        with io.open_code(main.__file__) as file:
            code = compile(file.read(), script, "exec", dont_inherit=True)
        exec(code, main.__dict__)
    except SystemExit as error:
        if error.code not in (None, 0):
            raise
    except KeyboardInterrupt:  # how servers are ended
        conclude(check=False)
        raise
    except LowBitError:
        raise
    except Exception as error:
        if debug:
            raise
        conclude(check=False)
        frame = error.__traceback__
        while frame is not None and frame.tb_frame.f_code.co_filename != script:
            frame = frame.tb_next
        traceback.print_exception(type(error), error, frame)
        return 1
    conclude()
    return 0


@contextmanager
def _exits(conclude: Callable[..., None]) -> Iterator[None]:
    """Scripts with CUDA graphs end by os._exit, which must not pass by the check at the end. Children may do so."""
    original, process = os._exit, os.getpid()

    def leave(status: int) -> None:
        if status == 0 and os.getpid() == process:
            try:
                conclude()
            except LowBitError as error:
                print(f"error: {error}", file=sys.stderr)
                status = 2
            sys.stdout.flush()
            sys.stderr.flush()
        original(status)

    os._exit = leave
    try:
        yield
    finally:
        os._exit = original


@contextmanager
def _as_main(script: str, rest: list[str]) -> Iterator[None]:
    """sys.argv and sys.path as if Python had been given the script; behind its folder the checkout it is part of."""
    argv, path = sys.argv, list(sys.path)
    sys.argv, folder = [script, *rest], Path(script).resolve().parent
    if not getattr(sys.flags, "safe_path", False):
        sys.path[0] = str(folder)
    try:
        if find_spec("megatron") is None or find_spec("megatron.training") is None:
            checkouts = (f for f in (folder, *folder.parents) if (f / "megatron/training").is_dir())
            sys.path[1:1] = [str(found) for found in checkouts][:1]
        yield
    finally:
        sys.argv, sys.path[:] = argv, path


def _check(script: str, config: CommConfig, sites: list[str], stats: dict[str, dict]) -> None:
    """Raise ModelError if the script sent nothing compressed: that must not pass for compression."""
    calls = sum(site["calls"] for site in stats.values())
    if any(set(site["paths"]) - {"exact"} for site in stats.values()) or (config.algorithm == "exact" and calls):
        return
    if not sites and not calls:
        why = "it built no row-parallel layer of Megatron-Core, or none of its processes does so in this one"
    elif not calls:
        why = (
            f"it built layers to compress ({sites[0]} …), but none of them ran with more than one tensor-parallel rank"
        )
    else:
        reasons = sorted({reason for site in stats.values() for reason in site["fallbacks"]})
        why = f"all {calls} calls went exact ({', '.join(reasons)}); lower --lowbit-comm-min-bytes, such as to 0, or "
        why += "give other --lowbit-comm-sites"
    raise ModelError(f"nothing was compressed by {Path(script).name}: {why}; docs/megatron.md says what to look for")


def _summary(config: CommConfig | None, stats: dict[str, dict], file: Path | None) -> None:
    """One line on stderr, and the file, from rank 0."""
    if os.environ.get("RANK", "0") != "0":
        return
    total = {name: sum(site[name] for site in stats.values()) for name in ("calls", "bytes_sent", "bytes_bf16")}
    paths: dict[str, int] = {}
    for site in stats.values():
        for path, calls in site["paths"].items():
            paths[path] = paths.get(path, 0) + calls
    spec = "the script's own" if config is None else "exact" if config.algorithm == "exact" else config.spec
    taken = ", ".join(f"{path} {calls}" for path, calls in sorted(paths.items())) or "none"
    _say(
        f"{spec}: {total['calls']} calls at {len(stats)} sites, {total['bytes_sent']} bytes sent, "
        f"{total['bytes_bf16']} in bf16; paths: {taken}"
    )
    if file is not None:
        file.write_text(json.dumps({"comm": spec} | total | {"paths": paths, "stats": stats}, indent=1) + "\n")


def _say(text: str) -> None:
    if os.environ.get("RANK", "0") == "0":
        print(f"lowbit: {text}", file=sys.stderr, flush=True)
