"""Files that are written whole or not at all, so that an interruption leaves what there was; and what JSON can say."""

from __future__ import annotations

import json
import math
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

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


def as_json(found: Any) -> str:
    """JSON that every reader takes: numbers that are not finite, for which it has no word, are null."""
    return json.dumps(_finite(found), indent=1, allow_nan=False) + "\n"


def _finite(found: Any) -> Any:
    if isinstance(found, dict):
        return {name: _finite(value) for name, value in found.items()}
    if isinstance(found, list | tuple):
        return [_finite(value) for value in found]
    return None if isinstance(found, float) and not math.isfinite(found) else found
