"""A calibration: the usual range of every feature at every site, which features are outliers, and the file of both.

After "Towards Low-bit Communication for Tensor Parallel LLM Inference" (arXiv 2411.07942): the outliers of partial sums
sit in the same features whatever the token, so which they are can be written down before inference. A site has one set
of outliers for both legs, so that a sum need not leave its split form between them.

The file is safetensors with metadata; docs/calibration.md has the layout. Nothing is unpickled, and everything is
checked when it is read: a wrong index would write outside of a message.

Statistics belong to one model at one TP size: at another, the partial sums are other numbers. `check` says what does
not fit. All ranks must hold the same statistics, or they would decode different values: they compare `digest`.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from functools import cached_property
from pathlib import Path
from types import MappingProxyType

import torch

from . import whole_file
from .codecs.statistics import Statistics
from .errors import ConfigError
from .ranges import Ranges, check_fraction, kind, outlier_count
from .spec import Spec
from .spec import fraction as parse_fraction

FORMAT, VERSION = "megatron_lowbit.calibration", 1
FRACTION = Fraction(1, 64)  # the paper's
PARTS, SUM_PARTS = ("low", "high"), ("sum_low", "sum_high")


@dataclass(frozen=True, eq=False)
class Calibration:
    """Ranges and outliers of every site. Checked when it is made: raises ConfigError naming what does not fit.

    metadata: what it was made from, as strings ("fingerprint", "model", "samples", ...); nothing that travels depends
    on it. name: what messages call it, never a path.
    """

    ranges: Mapping[str, Ranges]
    outliers: Mapping[str, tuple[int, ...]]
    fraction: Fraction
    metadata: Mapping[str, str] = field(default_factory=dict)
    name: str = "calibration in memory"

    def __post_init__(self) -> None:
        check_fraction(self.fraction)
        if not self.ranges or self.ranges.keys() != self.outliers.keys():
            raise ConfigError(
                f"{len(self.ranges)} sites have ranges, {len(self.outliers)} outliers: give both for each"
            )
        for name in ("ranges", "outliers", "metadata"):
            object.__setattr__(self, name, MappingProxyType(dict(getattr(self, name))))
        for site, ranges in self.ranges.items():
            if (ranges.tp, ranges.has_sum) != (self.tp, self.has_sums):
                raise ConfigError(f"{site} has other ranks or legs than {self.sites[0]}: give the same for each")
            _check_outliers(site, self.outliers[site], ranges.features, self.fraction)

    @classmethod
    def from_ranges(
        cls, ranges: Mapping[str, Ranges], fraction: Fraction = FRACTION, metadata: Mapping[str, str] | None = None
    ) -> Calibration:
        """Choose the outliers of each site, a `fraction` of its features. Raises ConfigError."""
        check_fraction(fraction)
        return cls(ranges, {site: r.outliers(fraction) for site, r in ranges.items()}, fraction, metadata or {})

    def __repr__(self) -> str:
        return f"Calibration({self.name!r}, TP {self.tp}, {len(self.ranges)} sites, digest {self.digest[:12]})"

    def __reduce__(self) -> tuple:  # for copies of a model that holds one: a mapping proxy cannot be copied
        return Calibration, (dict(self.ranges), dict(self.outliers), self.fraction, dict(self.metadata), self.name)

    @property
    def sites(self) -> tuple[str, ...]:
        return tuple(self.ranges)

    @property
    def tp(self) -> int:
        return next(iter(self.ranges.values())).tp

    @property
    def has_sums(self) -> bool:
        """Whether the gather leg of two-step is covered."""
        return next(iter(self.ranges.values())).has_sum

    @property
    def fingerprint(self) -> str:
        """The model's, as engines/fingerprint.py makes it; empty if this was not made from a model."""
        return self.metadata.get("fingerprint", "")

    @cached_property
    def digest(self) -> str:
        """SHA-256 of everything that decides what travels; dates, versions and names are left out."""
        digest = hashlib.sha256(f"{FORMAT} {VERSION} {self.fraction}".encode())
        for name, tensor in sorted(self._tensors().items()):
            digest.update(f"\n{name} {kind(tensor)}\n".encode())
            digest.update(tensor.numpy().tobytes())
        return digest.hexdigest()

    def statistics(self, site: str, leg: str) -> Statistics:
        """What a codec needs at `site` on the "scatter" leg (a sender per rank) or the "gather" leg (the sum's)."""
        if leg not in ("scatter", "gather"):
            raise ConfigError(f"unknown leg {leg!r}: use 'scatter' or 'gather'")
        self.check(sites=[site])
        ranges, outliers = self.ranges[site], self.outliers[site]
        if leg == "scatter":
            return Statistics(outliers, ranges.low, ranges.high)
        self._check_sums()
        return Statistics(outliers, ranges.sum_low[None], ranges.sum_high[None])

    def check(
        self,
        spec: Spec | None = None,
        tp: int | None = None,
        fingerprint: str | None = None,
        sites: Iterable[str] | None = None,
        algorithm: str | None = None,
    ) -> None:
        """Raise ConfigError naming what differs from what is given; None is not compared."""
        if tp is not None and tp != self.tp:
            raise ConfigError(
                f"{self.name} was made for TP {self.tp}, this group has {tp} ranks: run calibrate --tp {tp}"
            )
        if fingerprint and self.fingerprint and fingerprint != self.fingerprint:
            raise ConfigError(
                f"{self.name} was made for another model ({self.metadata.get('model', 'unnamed')}, fingerprint "
                f"{self.fingerprint[:12]}, this one has {fingerprint[:12]}): run calibrate with this model"
            )
        # "auto" is one-shot on two ranks and something of two legs on more (policy.py); one-shot has no gather leg.
        two_step = algorithm in ("two-step", "hierarchical") or (algorithm == "auto" and self.tp > 2)
        legs = [] if spec is None else [spec.scatter] if algorithm and not two_step else [spec.scatter, spec.gather]
        for leg in legs:
            if leg.calibrated and leg.outliers != self.fraction:
                raise ConfigError(
                    f"{self.name} holds a fraction of {self.fraction} outliers, {str(leg)!r} asks for {leg.outliers}: "
                    f"run calibrate --fraction {leg.outliers}, or use outliers={self.fraction}"
                )
        if two_step and (spec is None or spec.gather.calibrated):
            self._check_sums()
        if missing := [site for site in sites or () if site not in self.ranges]:
            raise ConfigError(
                f"{self.name} lacks {_some(missing)}, and has {_some(self.sites)}: run calibrate with this model, or "
                "select other sites"
            )

    def _check_sums(self) -> None:
        if not self.has_sums:
            raise ConfigError(
                f"{self.name} was made for one-shot and says nothing about sums, which two-step sends: run calibrate "
                "--algorithm auto"
            )

    def _tensors(self) -> dict[str, torch.Tensor]:
        tensors, parts = {}, PARTS + SUM_PARTS if self.has_sums else PARTS
        for site, ranges in self.ranges.items():
            tensors |= {f"{site}.{part}": getattr(ranges, part).contiguous() for part in parts}
            tensors[f"{site}.outliers"] = torch.tensor(self.outliers[site], dtype=torch.int32)
        return tensors

    def save(self, path: str | os.PathLike) -> None:
        """Write the file, whole or not at all. Raises ConfigError if it cannot be written."""
        from . import __version__

        made = {"version": __version__, "torch": torch.__version__, "date": datetime.date.today().isoformat()}
        metadata = made | dict(self.metadata)
        metadata["algorithm"] = self.metadata.get("algorithm", "auto") if self.has_sums else "one-shot"
        metadata |= {"tp": str(self.tp), "fraction": str(self.fraction), "sites": json.dumps(self.sites)}
        metadata |= {"format": FORMAT, "format_version": str(VERSION)}
        whole_file.write(path, _safetensors().torch.save(self._tensors(), metadata), "calibration")

    @classmethod
    def load(cls, path: str | os.PathLike) -> Calibration:
        """Read a file. Raises ConfigError for one that is missing, damaged, something else or of a newer version."""
        path = Path(path)
        try:
            path.stat()
        except FileNotFoundError:
            pass
        except OSError as error:
            raise ConfigError(f"calibration {str(path)[:80]} cannot be read ({error.strerror}): give a file") from error
        if path.is_dir():
            raise ConfigError(f"calibration {path} is a folder: give the file that calibrate wrote")
        if not path.is_file():
            raise ConfigError(f"there is no calibration file {path}: make it with calibrate --out {path}")
        safetensors = _safetensors()
        try:
            with safetensors.safe_open(str(path), "pt") as file:
                metadata = file.metadata() or {}
                if not (foreign := _foreign(metadata)):
                    # Copies: what stays in the mapped file would change with it, or end the process.
                    tensors = {name: file.get_tensor(name).clone() for name in file.keys()}
                    return cls(*_parse(metadata, tensors), metadata, f"calibration {path.name}")
        except (OSError, ValueError, RecursionError, safetensors.SafetensorError) as error:
            raise ConfigError(f"calibration {path} cannot be read ({error}): make it again with calibrate") from error
        raise ConfigError(f"{path} {foreign}")


def _foreign(metadata: Mapping[str, str]) -> str | None:
    """Why a safetensors file is not ours to read, or None."""
    if metadata.get("format") != FORMAT:
        return "is no calibration file: give one that calibrate wrote"
    version = metadata.get("format_version", "")
    if version.isdecimal() and int(version) > VERSION:
        return f"has format {version}, this version reads {VERSION}: update megatron-lowbit, or run calibrate again"
    if version != str(VERSION):
        raise ConfigError(f"format_version is {version!r}")
    return None


def _parse(
    metadata: Mapping[str, str], tensors: Mapping[str, torch.Tensor]
) -> tuple[dict[str, Ranges], dict[str, tuple[int, ...]], Fraction]:
    """(ranges, outliers, fraction) of a file. Raises ValueError saying what is wrong with it."""
    if missing := {"tp", "fraction", "algorithm", "sites"} - metadata.keys():
        raise ConfigError(f"the metadata lack {_some(sorted(missing))}")
    if (fraction := parse_fraction(metadata["fraction"])) is None:
        raise ConfigError(f"the metadata's fraction is {metadata['fraction']!r}")
    sites = json.loads(metadata["sites"])
    if not isinstance(sites, list) or not sites or not all(isinstance(site, str) for site in sites):
        raise ConfigError("the metadata hold no list of sites")
    parts = PARTS if metadata["algorithm"] == "one-shot" else PARTS + SUM_PARTS
    names = {f"{site}.{part}" for site in sites for part in (*parts, "outliers")}
    if differing := sorted(names ^ tensors.keys()):
        raise ConfigError(f"tensors are missing, or are not those of its sites: {_some(differing)}")
    ranges, outliers = {}, {}
    for site in sites:
        indices = tensors[f"{site}.outliers"]
        if indices.dtype != torch.int32 or indices.dim() != 1:
            raise ConfigError(f"{site}.outliers is {kind(indices)}, not int32 [outliers]")
        outliers[site] = tuple(indices.tolist())
        try:
            ranges[site] = Ranges(*(tensors[f"{site}.{part}"] for part in parts))
        except ConfigError as error:
            raise ConfigError(f"{site}: {error}") from error
    if metadata["tp"] != str(ranges[sites[0]].tp):
        raise ConfigError(f"the metadata say TP {metadata['tp']}, the tensors TP {ranges[sites[0]].tp}")
    return ranges, outliers, fraction


def _check_outliers(site: str, outliers: Sequence[int], features: int, fraction: Fraction) -> None:
    count = outlier_count(features, fraction)
    inside = all(0 <= index < features for index in outliers)
    if len(outliers) != count or not inside or list(outliers) != sorted(set(outliers)):
        raise ConfigError(
            f"{site}: the outliers are not {count} ascending indices ({fraction} of {features} features) from 0 to "
            f"{features - 1}, but {len(outliers)}: {_some(outliers)}"
        )


def _some(things: Sequence[object], limit: int = 3) -> str:
    rest = f" and {len(things) - limit} more" if len(things) > limit else ""
    return ", ".join(map(str, things[:limit])) + rest


def _safetensors():
    try:
        import safetensors.torch
    except ImportError as error:
        raise ConfigError("calibration files need safetensors: pip install 'megatron-lowbit[hf]'") from error
    return safetensors
