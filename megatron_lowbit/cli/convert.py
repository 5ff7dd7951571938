"""`convert`: a Hugging Face model into a checkpoint that Megatron-LM's own scripts load, proven equal; and back."""

from __future__ import annotations

import argparse
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import ConfigError, ModelError
from .job import DTYPES

if TYPE_CHECKING:
    from ..engines.megatron_flags import Layout

HELP = "convert a Hugging Face model into a Megatron-LM checkpoint, or back"
DESCRIPTION = """Write a Megatron-LM checkpoint of a Hugging Face model, one file per rank, then read every tensor back
and compare it with the model's, bit for bit. Prints the flags with which Megatron-LM's scripts load it, which are also
in MEGATRON/megatron_args.txt. Llama, Mistral, Mixtral, Qwen2, Qwen3 and Gemma 2."""
EXAMPLES = """examples:
  megatron-lowbit convert --hf ~/models/Llama-3.1-8B --megatron ~/models/llama-tp4 --tp 4
  torchrun --nproc-per-node 4 gpt_static_inference.py $(cat ~/models/llama-tp4/megatron_args.txt) --prompts "Hello"
  megatron-lowbit convert --hf ~/models/Llama-3.1-8B --megatron ~/models/llama-tp4 --check
  megatron-lowbit convert --megatron ~/models/llama-tp4 --hf ~/models/llama-again --reverse
"""
MARGIN = 64 << 20  # of the disk, for what is not weights


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `convert`."""
    what = parser.add_argument_group("folders")
    what.add_argument("--hf", type=Path, metavar="DIR", required=True, help="Hugging Face folder, with safetensors")
    what.add_argument("--megatron", type=Path, metavar="DIR", required=True, help="checkpoint, as for --load")
    what.add_argument("--force", action="store_true", help="write into a folder that is not empty")
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--check", action="store_true", help="write nothing: compare --megatron with --hf")
    mode.add_argument("--reverse", action="store_true", help="write --hf from --megatron, which 'convert' once wrote")
    how = parser.add_argument_group("layout of the checkpoint")
    how.add_argument("--tp", type=int, metavar="N", help="tensor-parallel ranks")
    how.add_argument("--pp", type=int, metavar="N", help="pipeline stages (default: 1)")
    how.add_argument("--dtype", choices=DTYPES, default="auto", help="of the weights (default: the model's)")
    how.add_argument(
        "--make-vocab-size-divisible-by",
        type=int,
        metavar="N",
        help="pad the vocabulary to a multiple of N x TP, as Megatron's flag of this name (default: 128)",
    )
    how.add_argument(
        "--transformer-impl",
        choices=("local", "transformer_engine"),
        help="for which of Megatron's layers to name the tensors (default: local)",
    )


@dataclass(frozen=True)
class Job:
    """The checked arguments. `layout`: None unless a Megatron checkpoint is to be written."""

    hf: Path
    megatron: Path
    reverse: bool
    layout: Layout | None


def run(arguments: argparse.Namespace) -> int:
    """Check everything, then write, verify or go back. Returns the exit code."""
    job, start = check(arguments), time.perf_counter()
    try:
        text = back(job) if job.reverse else forth(job)
    except OSError as error:
        raise ConfigError(f"{error}: give a folder on a disk with room and the right to write") from error
    print(f"{text} ({time.perf_counter() - start:.1f} s)")
    if job.layout is not None:
        report(job)
    return 0


def check(arguments: argparse.Namespace) -> Job:
    """Arguments -> Job. Raises ConfigError or ModelError for anything that can be known before work is done."""
    hf, megatron = arguments.hf, arguments.megatron
    if hf.resolve() == megatron.resolve():
        raise ConfigError(f"--hf and --megatron are both {hf}: give two folders")
    layout = ("tp", "pp", "make_vocab_size_divisible_by", "transformer_impl")
    given = [name for name in layout if getattr(arguments, name) is not None]
    if arguments.check or arguments.reverse:
        if given or arguments.dtype != "auto":
            name = (given or ["dtype"])[0].replace("_", "-")
            mode = "--check" if arguments.check else "--reverse"
            raise ConfigError(f"--{name} is read from the checkpoint: leave it out with {mode}")
        if arguments.reverse:
            _check_target(hf, "--hf", arguments.force)
            if hf.is_dir() and any(hf.glob("*.safetensors*")):
                raise ConfigError(f"--hf {hf} holds weights already: remove them, or give another folder")
        elif arguments.force:
            raise ConfigError("--force is for writing: leave it out with --check")
        return Job(hf, megatron, arguments.reverse, None)
    if arguments.tp is None:
        raise ConfigError("--tp is missing: give the number of tensor-parallel ranks that will load the checkpoint")
    _check_target(megatron, "--megatron", arguments.force)
    if megatron.resolve() in [hf.resolve(), *hf.resolve().parents]:
        raise ConfigError(f"--hf {hf} lies within --megatron {megatron}: give another folder")
    if any(character.isspace() for character in str(megatron.resolve())):
        raise ConfigError(f"--megatron {megatron}: $(cat megatron_args.txt) would split its path at spaces: rename it")
    return Job(hf, megatron, False, _layout(arguments))


def _check_target(folder: Path, option: str, force: bool) -> None:
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"{option} {folder} is a file: give a folder to write into")
    if folder.is_dir() and any(folder.iterdir()) and not force:
        raise ConfigError(f"{option} {folder} is not empty: give another folder, or --force to write into this one")


def _layout(arguments: argparse.Namespace) -> Layout:
    from ..engines.hf_model import Checkpoint, check_tensor_parallel, read_config
    from ..engines.megatron_flags import Layout
    from ..engines.weights import expected_tensors

    config = read_config(arguments.hf)
    checkpoint = Checkpoint(arguments.hf, config)
    check_tensor_parallel(config, arguments.tp)
    pp = 1 if arguments.pp is None else arguments.pp
    if pp < 1 or config.layers % pp:
        raise ConfigError(f"--pp is {pp}: give a number that divides the model's {config.layers} layers")
    step = 128 if arguments.make_vocab_size_divisible_by is None else arguments.make_vocab_size_divisible_by
    if step < 1:
        raise ConfigError(f"--make-vocab-size-divisible-by is {step}: give 1 or more")
    implementation = arguments.transformer_impl or "local"
    if config.family.gemma and implementation != "local":
        raise ConfigError(f"--transformer-impl {implementation} has no layers for a {config.family.title}: use local")
    dtype = DTYPES[arguments.dtype] or str(checkpoint.dtype).removeprefix("torch.")
    size = 4 if dtype == "float32" else 2
    need = sum(_count(shape) for shape in expected_tensors(config).values()) * size + MARGIN
    at = next(path for path in [arguments.megatron.resolve(), *arguments.megatron.resolve().parents] if path.is_dir())
    if (free := shutil.disk_usage(at).free) < need:
        raise ConfigError(f"--megatron {arguments.megatron} needs {need >> 20} MB, the disk has {free >> 20} MB free")
    return Layout(arguments.tp, pp, dtype, step, implementation)


def _count(shape: tuple[int, ...]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count


def forth(job: Job) -> str:
    """Write the checkpoint if it is to be written, compare every tensor, and say so."""
    from ..engines.hf_model import Checkpoint, read_config
    from ..engines.megatron_checkpoint import progress, verify, write
    from ..engines.weights import expected_tensors, weights

    config = read_config(job.hf)
    checkpoint = Checkpoint(job.hf, config)
    if job.layout is not None:
        with progress("writing", len(list(weights(config))) * job.layout.tp) as step:
            write(config, checkpoint, job.megatron, job.layout, step)
    with progress("comparing", len(expected_tensors(config))) as step:
        count = verify(config, checkpoint, job.megatron, step)
    return f"{config.family.title}: all {count} tensors of {job.megatron} are those of {job.hf}, bit for bit"


def back(job: Job) -> str:
    """Write the Hugging Face folder, compare every tensor, and say so."""
    from ..engines.hf_model import Checkpoint, read_config
    from ..engines.megatron_checkpoint import MegatronCheckpoint, progress, verify, write_hf
    from ..engines.weights import expected_tensors

    megatron, source = MegatronCheckpoint(job.megatron), job.megatron / "hf"
    if not (source / "config.json").is_file():
        raise ModelError(f"{source} has no config.json; put the Hugging Face model's there, with its tokenizer")
    config = read_config(source)
    with progress("writing", len(expected_tensors(config))) as step:
        write_hf(config, megatron, job.hf, step)
    with progress("comparing", len(expected_tensors(config))) as step:
        count = verify(config, Checkpoint(job.hf, config), job.megatron, step)
    return f"{config.family.title}: all {count} tensors of {job.hf} are those of {job.megatron}, bit for bit"


def report(job: Job) -> None:
    """The flags for Megatron-LM's scripts, and what they cannot be told."""
    from ..engines.hf_model import read_config
    from ..engines.megatron_flags import limits

    print(f"flags for Megatron-LM's scripts, also as $(cat {job.megatron}/megatron_args.txt):")
    print((job.megatron / "megatron_args.txt").read_text(encoding="utf-8").strip())
    for limit in limits(read_config(job.hf), job.layout):
        print(f"note: {limit}")
