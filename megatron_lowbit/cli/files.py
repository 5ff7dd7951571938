"""Files that subcommands read and write: what comes with the repository, and checks before any work is done."""

from __future__ import annotations

import os
from pathlib import Path

from .. import whole_file
from ..errors import ConfigError

BUNDLED = Path(__file__).resolve().parents[2] / "examples"


def bundled(given: Path | None, name: str, option: str) -> Path:
    """What the user gave, else the repository's own. Raises ConfigError in an install without it."""
    if given is None and not (BUNDLED / name).exists():
        raise ConfigError(f"this install has no bundled {name}: give {option}, or run from a clone of the repository")
    return given or BUNDLED / name


def read_text(path: Path, option: str) -> str:
    """A text file's text. Raises ConfigError for one that cannot be read, and for an empty one."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{option} {path} cannot be read as UTF-8 text ({error}): give a text file") from error
    if not text.strip():
        raise ConfigError(f"{option} {path} is empty: give a file with text")
    return text


def check_output(path: Path | None, option: str) -> None:
    """Raise ConfigError if a file of this name could not be written."""
    if path and path.is_dir():
        raise ConfigError(f"{option} {path} is a folder: give a file")
    if path and not path.resolve().parent.is_dir():
        raise ConfigError(f"{option} {path}: there is no folder {path.resolve().parent}; make it first")
    if path and not os.access(path if path.exists() else path.resolve().parent, os.W_OK):
        raise ConfigError(f"{option} {path} cannot be written: give a file that you have the right to write")


def check_outputs(**given: Path | None) -> None:
    """`check_output` of each option's file, and that no two are the same. Raises ConfigError."""
    options: dict[Path, str] = {}
    for name, path in given.items():
        option = f"--{name}"
        check_output(path, option)
        if path and path.is_char_device():
            continue
        if path and (other := options.setdefault(path.resolve(), option)) != option:
            raise ConfigError(f"{other} and {option} are both {path}: give two files")


def check_picture(path: Path | None) -> None:
    """Raise ConfigError for a plot that is to be no PNG, and if matplotlib is missing."""
    if path is None:
        return
    if path.suffix.lower() != ".png":
        raise ConfigError(f"--plot {path} is no name of a PNG: give one that ends in .png")
    from ..calibration.plot import check_installed

    check_installed()


def write(path: Path, content: bytes, option: str) -> None:
    """Write a result: a file whole or not at all. Raises ConfigError if that fails."""
    if path.is_char_device():  # such as /dev/stdout
        path.write_bytes(content)
    else:
        whole_file.write(path, content, option)
