"""What the launcher changes in Megatron for a script that knows nothing of this package.

The flags appear in the script's `--help` and, with what the launcher was given, in its `args`: Megatron-LM's
`parse_args` looks `add_megatron_arguments` up when it is called, whoever imported it before. A Megatron-LM that cannot
be imported is left alone; the script will say why itself.
"""

from __future__ import annotations

import argparse

from megatron.core import parallel_state

from megatron_lowbit.config import CommConfig

from .._replacements import Replacements
from .arguments import OPTIONS, add_lowbit_args, fits


class Surroundings:
    """In place from when it is made until `undo()`.

    tp: the tensor-parallel size once Megatron's groups stand, else None; that of the last model if there are several.
    flagged: whether Megatron-LM's parser was found.
    """

    def __init__(self, config: CommConfig | None, flags: argparse.Namespace) -> None:
        self.tp: int | None = None
        self._config, self._replacements = config, Replacements()
        self._replacements.set(parallel_state, "initialize_model_parallel", self._watched())
        try:
            from megatron.training import arguments
        except (ImportError, SyntaxError):  # not there, or for a newer Python
            arguments = None
        self.flagged = hasattr(arguments, "add_megatron_arguments")
        if self.flagged:
            self._replacements.set(arguments, "add_megatron_arguments", self._with_flags(arguments, flags))

    def undo(self) -> None:
        self._replacements.undo()

    def _watched(self):
        base = parallel_state.initialize_model_parallel

        def initialize_model_parallel(*args, **kwargs):
            result = base(*args, **kwargs)
            self.tp = parallel_state.get_tensor_model_parallel_world_size()
            if self._config is not None:
                fits(self._config, self.tp)
            return result

        return initialize_model_parallel

    @staticmethod
    def _with_flags(arguments, flags: argparse.Namespace):
        base, names = arguments.add_megatron_arguments, {flag[2:].replace("-", "_") for flag in OPTIONS}

        def add_megatron_arguments(parser):
            parser = add_lowbit_args(base(parser))
            parser.set_defaults(**{name: value for name, value in vars(flags).items() if name in names})
            return parser

        return add_megatron_arguments
