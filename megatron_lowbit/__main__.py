"""The command line: `python -m megatron_lowbit …`, the same as `megatron-lowbit …`."""

from __future__ import annotations

import argparse
import os
import sys
import traceback

from . import __version__
from .cli import calibrate, convert, doctor, evaluate, generate, plan, run, sensitivity, tune
from .errors import ConfigError, LowBitError, ModelError

COMMANDS = {
    "generate": generate,
    "evaluate": evaluate,
    "sensitivity": sensitivity,
    "plan": plan,
    "calibrate": calibrate,
    "convert": convert,
    "run": run,
    "tune": tune,
    "doctor": doctor,
}
EXAMPLES = """examples:
  megatron-lowbit generate --compare                      the bundled model on 2 ranks, exact against compressed
  megatron-lowbit generate --model DIR --tp 4 --comm int4:g32 --prompt "Once upon a time"
  megatron-lowbit generate --engine deepspeed --model DIR --compare
  megatron-lowbit evaluate --model DIR --tp 4 --comm int8:g128 int4:g32   what each costs in accuracy
  megatron-lowbit sensitivity --model DIR --tp 4 --comm int4:g32          which sites that comes from
  megatron-lowbit plan --model DIR --tp 4 --budget-perplexity 1% --out plan.json   a spec for each site
  megatron-lowbit calibrate --model DIR --tp 4 --text FILE --out model-tp4.safetensors
  megatron-lowbit convert --hf DIR --megatron DIR --tp 4  a checkpoint for Megatron-LM's own scripts
  torchrun --nproc-per-node 2 -m megatron_lowbit run SCRIPT --lowbit-comm int8:g128 …   an unedited Megatron script
  torchrun --nproc-per-node 4 -m megatron_lowbit tune     which algorithm is fastest on these ranks, by message size
  megatron-lowbit doctor                                  what this machine can do
  megatron-lowbit COMMAND --help                          all options of a command
"""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:
        """One line and the way on, instead of the whole usage."""
        print(f"error: {message}; see '{self.prog} --help'", file=sys.stderr)
        raise SystemExit(2)


def parser() -> argparse.ArgumentParser:
    """The parser of the whole command line."""
    root = _Parser(
        allow_abbrev=False,
        prog="megatron-lowbit",
        description=__import__("megatron_lowbit").__doc__.splitlines()[0],
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    root.add_argument("--version", action="version", version=f"megatron-lowbit {__version__}")
    commands = root.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, module in COMMANDS.items():
        command = commands.add_parser(
            name,
            allow_abbrev=False,
            help=module.HELP,
            description=module.DESCRIPTION,
            epilog=module.EXAMPLES,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        command.add_argument("--debug", action="store_true", help="show tracebacks and the launcher's own messages")
        module.add_arguments(command)
    return root


def main(argv: list[str] | None = None) -> int:
    """Run one command -> its exit code: 0, 2 for an error of the user's to mend, 1 for any other."""
    argv = sys.argv[1:] if argv is None else argv
    if argv and argv[0].startswith("--local_rank="):  # DeepSpeed's launcher puts it there, and sets LOCAL_RANK too
        argv = argv[1:]
    root = parser()
    arguments, unknown = root.parse_known_args(argv)
    if unknown:
        root.prog += f" {arguments.command}"
        root.error(f"unrecognized arguments: {' '.join(unknown)}")
    arguments.argv = argv
    try:
        return COMMANDS[arguments.command].run(arguments)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        if arguments.debug:
            traceback.print_exc()
        elif os.environ.get("LOCAL_RANK", "0") == "0" or not isinstance(error, ConfigError | ModelError):
            report(error)  # wrong settings and models are the same for all ranks of a machine: said once
        return 2 if isinstance(error, LowBitError) else 1


def report(error: Exception) -> None:
    """One line on stderr: what is wrong and what to do, and on which rank if there are several."""
    where = f"rank {os.environ['RANK']}: " if "RANK" in os.environ and not isinstance(error, LowBitError) else ""
    text = " ".join(str(error).split())
    if not isinstance(error, LowBitError):
        text = f"{type(error).__name__}: {text}; run again with --debug for the traceback"
    print(f"error: {where}{text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
