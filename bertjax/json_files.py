"""Reads JSON files that somebody else wrote."""

import json
from pathlib import Path
from typing import Any

from bertjax.errors import SourceError

# Such a file is read whole, so its size is limited, to what safetensors allows a header.
_MAX_BYTES = 100_000_000

_NAMES = {dict: "an object", list: "a list"}


def read_json(path: Path, error: type[Exception], kind: type = dict) -> Any:
    """Reads a JSON file.

    Args:
        path: the file.
        error: the class of error to raise when the contents are not what they should be.
        kind: what the file must hold: dict for an object, list for a list.

    Raises:
        SourceError: the file can't be read.
    """
    try:
        with open(path, "rb") as file:
            data = file.read(_MAX_BYTES + 1)
    except OSError as problem:
        raise SourceError(f"{path}: can't be read ({problem.strerror or problem})") from None
    if len(data) > _MAX_BYTES:
        raise error(f"{path}: larger than {_MAX_BYTES} bytes, which no such file is")
    try:
        value = json.loads(data.decode())
    except UnicodeDecodeError as problem:
        raise error(f"{path}: not UTF-8 text ({problem})") from None
    except (ValueError, RecursionError) as problem:
        raise error(f"{path}: not valid JSON ({problem})") from None
    if not isinstance(value, kind):
        raise error(f"{path}: holds a JSON {type(value).__name__}, expected {_NAMES[kind]}")
    return value
