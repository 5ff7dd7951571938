"""Megatron-LM's checkpoints in its "torch" format: written, read back, compared with the Hugging Face model.

    DIR/latest_checkpointed_iteration.txt                   "release"
    DIR/release/mp_rank_00[_000]/model_optim_rng.pt         {"args", "checkpoint_version", "iteration", "model"}
    DIR/hf/                                                 config.json and the tokenizer, so that DIR says all
    DIR/megatron_args.txt                                   one line of flags for Megatron-LM's scripts

Megatron demands pickled files. They hold tensors, numbers, strings and one argparse.Namespace, and are read back by
torch's restricted unpickler, which makes nothing else.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError

import torch

from ..errors import ModelError
from .hf_model import Checkpoint, ModelConfig
from .megatron_flags import Layout, command_line, namespace
from .megatron_names import RELEASE, TRACKER, placed, rank_file
from .weights import Ranks

COPIED = (".json", ".jinja", ".model", ".txt")
Step = Callable[[str], None]
"""Called with a tensor's name when it is done, for a progress bar."""


def write(config: ModelConfig, checkpoint: Checkpoint, folder: Path, layout: Layout, step: Step) -> None:
    """Writes the checkpoint of a Hugging Face model; at most one rank's shard is in memory.

    What an earlier checkpoint left in `folder` is removed. Raises OSError as the file system does.
    """
    shutil.rmtree(folder / RELEASE, ignore_errors=True)
    (folder / TRACKER).unlink(missing_ok=True)
    (folder / "hf").mkdir(parents=True, exist_ok=True)
    for path in checkpoint.folder.iterdir():
        if path.is_file() and path.suffix in COPIED and not path.name.endswith(".index.json"):
            shutil.copy(path, folder / "hf" / path.name)
    ranks, dtype = Ranks(layout.tp, layout.vocab(config)), getattr(torch, layout.dtype)
    plan = list(placed(config, layout.pp, layout.implementation))
    for stage in range(layout.pp):
        for rank in range(layout.tp):
            model = {}
            for at, name, weight in plan:
                if at == stage:
                    model[name] = weight.split(checkpoint.read, config, ranks, rank).to(dtype).contiguous()
                    step(name)
            path = rank_file(folder, RELEASE, rank, stage, layout.pp)
            path.parent.mkdir(parents=True, exist_ok=True)
            state = {"args": namespace(config, layout), "checkpoint_version": 3.0, "iteration": 0, "model": model}
            torch.save(state, path)
    (folder / "megatron_args.txt").write_text(command_line(config, layout, folder.resolve()) + "\n", encoding="utf-8")
    (folder / TRACKER).write_text(RELEASE, encoding="utf-8")  # last: until it is there, Megatron sees no checkpoint


class MegatronCheckpoint:
    """A checkpoint folder, its tensors mapped into memory and not read until they are used.

    Attributes: `tp`, `pp`, `args` (what Megatron saved of its arguments). Raises ModelError for a folder that is none,
    or whose files hold other things than tensors and plain values.
    """

    def __init__(self, folder: Path) -> None:
        tracker = folder / TRACKER
        if not tracker.is_file():
            raise ModelError(f"{folder} has no {TRACKER}; give the folder that Megatron-LM takes as --load")
        said = tracker.read_text(encoding="utf-8", errors="replace").strip()
        iteration = said if said == RELEASE else f"iter_{int(said):07d}" if said.isdecimal() else ""
        found = [
            re.fullmatch(r"mp_rank_(\d+)(?:_(\d+))?", path.name) for path in (folder / iteration).glob("mp_rank_*")
        ]
        places = {(int(m[1]), int(m[2] or 0)) for m in found if m}
        if not iteration or not places:
            raise ModelError(
                f'{folder / (iteration or said)} has no mp_rank_* folders; only the "torch" format is read'
            )
        self.folder = folder
        self.tp, self.pp = (max(each) + 1 for each in zip(*places))
        self._states = {}
        for rank, stage in ((rank, stage) for stage in range(self.pp) for rank in range(self.tp)):
            self._states[rank, stage] = _load(rank_file(folder, iteration, rank, stage, self.pp))
        self.args: argparse.Namespace = self._states[0, 0]["args"]
        made = tuple(getattr(self.args, f"{kind}_model_parallel_size", None) for kind in ("tensor", "pipeline"))
        if None not in made and made != (self.tp, self.pp):
            raise ModelError(
                f"{folder / iteration} has files of TP {self.tp} x PP {self.pp}, and was made for TP {made[0]} x "
                f"PP {made[1]}; convert the model again"
            )

    def parts(self, stage: int, name: str) -> list[torch.Tensor]:
        """All ranks' parts of a tensor, in rank order."""
        try:
            return [self._states[rank, stage]["model"][name] for rank in range(self.tp)]
        except KeyError as error:
            raise ModelError(f"{self.folder}: stage {stage} has no {error}; convert the model again") from error

    def unknown(self, known: set[tuple[int, str]]) -> list[str]:
        """Tensors that are in the files and not among `known` (stage, name)."""
        return [
            name
            for (_, stage), state in self._states.items()
            for name, value in state["model"].items()
            if isinstance(value, torch.Tensor) and (stage, name) not in known
        ]


def _load(path: Path) -> dict:
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (OSError, RuntimeError, UnpicklingError) as error:
        reason = str(error).splitlines()[0][:200]
        raise ModelError(f"{path} cannot be read as plain tensors ({reason}); convert the model again") from error
    if not isinstance(state, dict) or not {"args", "model"} <= state.keys() or not isinstance(state["model"], dict):
        raise ModelError(f"{path} holds no args and model; is it a Megatron-LM checkpoint?")
    return state


def tensors(config: ModelConfig, megatron: MegatronCheckpoint) -> Iterator[tuple[str, torch.Tensor]]:
    """(Hugging Face name, tensor) of every tensor of a Megatron checkpoint, joined from all ranks.

    Tied embeddings that lie on two stages come twice. Raises ModelError where something is missing, or is there that
    the model does not have.
    """
    implementation = getattr(megatron.args, "transformer_impl", "local")
    if config.layers % megatron.pp:
        raise ModelError(f"{megatron.folder} has {megatron.pp} stages, which do not divide {config.layers} layers")
    plan = list(placed(config, megatron.pp, implementation))
    if unknown := megatron.unknown({(stage, name) for stage, name, _ in plan}):
        raise ModelError(
            f"{megatron.folder} holds {unknown[0]}, which a {config.family.title} with its config.json lacks"
        )
    for stage, name, weight in plan:
        yield from weight.join(megatron.parts(stage, name), config, Ranks(megatron.tp, config.vocab)).items()


def verify(config: ModelConfig, checkpoint: Checkpoint, folder: Path, step: Step) -> int:
    """Compares every tensor of a Megatron checkpoint with Hugging Face's, bit for bit -> how many there are.

    In the checkpoint's dtype: rounding to it is the only difference that is allowed. Raises ModelError naming the
    first tensor that is another.
    """
    seen = set()
    for name, found in tensors(config, MegatronCheckpoint(folder)):
        expected = checkpoint.read(name).to(found.dtype)
        if found.shape != expected.shape or not torch.equal(_bits(found), _bits(expected)):
            raise ModelError(f"{folder}: {name} is not the model's; convert it again")
        seen.add(name)
        step(name)
    return len(seen)


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.uint8)


def write_hf(config: ModelConfig, megatron: MegatronCheckpoint, folder: Path, step: Step, shard: int = 5 << 30) -> None:
    """The way back: writes a Hugging Face folder from a Megatron checkpoint, in files of about `shard` bytes."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    index, held, size, number, dtype = {}, {}, 0, 0, None

    def flush() -> None:
        nonlocal held, size, number
        number += 1
        save_file(held, folder / f"part-{number:05d}.safetensors", metadata={"format": "pt"})
        index.update(dict.fromkeys(held, number))
        held, size = {}, 0

    for name, tensor in tensors(config, megatron):
        if name in index or name in held:  # tied embeddings of the last stage
            continue
        held[name], dtype = tensor.contiguous().clone(), tensor.dtype
        size += held[name].nbytes
        step(name)
        if size >= shard:
            flush()
    if held:
        flush()
    names = {n: f"model-{n:05d}-of-{number:05d}.safetensors" if number > 1 else "model.safetensors"
             for n in range(1, number + 1)}  # fmt: skip
    for n, name in names.items():
        (folder / f"part-{n:05d}.safetensors").rename(folder / name)
    if number > 1:
        weight_map = {name: names[n] for name, n in index.items()}
        _dump(folder / "model.safetensors.index.json", {"metadata": {}, "weight_map": weight_map})
    for path in (megatron.folder / "hf").iterdir():
        shutil.copy(path, folder / path.name)
    raw = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    said = {key: str(dtype).removeprefix("torch.") for key in ("dtype", "torch_dtype") if key in raw}
    _dump(folder / "config.json", raw | said)


def _dump(path: Path, value: dict) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")


@contextmanager
def progress(title: str, total: int) -> Iterator[Step]:
    """A bar on stderr, where that is a terminal."""
    from tqdm import tqdm

    with tqdm(total=total, desc=title, unit="tensor", disable=None) as bar:
        yield lambda name: bar.update()
