"""Files that are written whole or not at all, so that an interruption leaves what there was."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from .errors import ConfigError


def write(path: str | os.PathLike, content: bytes, what: str) -> None:
    """Write `content` to `path`. what: the kind of file, for messages. Raises ConfigError if it cannot be written."""
    path = Path(path)
    if path.exists() and not path.is_file():
        raise ConfigError(f"{path} is a folder or a device: give the name of a file")
    part = path.with_name(f".{path.name}.part")
    try:
        part.write_bytes(content)
        part.replace(path)
    except OSError as error:
        with suppress(OSError):
            part.unlink()
        raise ConfigError(f"{what} {path} cannot be written ({error}): give another file") from error
