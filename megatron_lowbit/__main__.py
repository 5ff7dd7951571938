"""The command line: `python -m megatron_lowbit …`, the same as `megatron-lowbit …`."""

from __future__ import annotations

import argparse
import os
import sys
import traceback

from . import __version__
from .cli import generate
from .errors import LowBitError, RankError

COMMANDS = {"generate": generate}
EXAMPLES = """examples:
  megatron-lowbit generate --compare                      the bundled model on 2 ranks, exact against compressed
  megatron-lowbit generate --model DIR --tp 4 --comm int4:g32 --prompt "Once upon a time"
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
    arguments = parser().parse_args(argv)
    arguments.argv = argv
    rank = int(os.environ.get("RANK", "0"))
    try:
        return COMMANDS[arguments.command].run(arguments)
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        if arguments.debug:
            traceback.print_exc()
        elif rank == 0 or isinstance(error, RankError):  # the others would only repeat it
            text = " ".join(str(error).split())
            print(
                f"error: {text}"
                if isinstance(error, LowBitError)
                else f"error: {type(error).__name__}: {text}; run again with --debug for the traceback",
                file=sys.stderr,
            )
        sys.stderr.flush()
        return 2 if isinstance(error, LowBitError) else 1


if __name__ == "__main__":
    sys.exit(main())
