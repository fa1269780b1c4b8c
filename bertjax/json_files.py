"""Reads files that somebody else wrote, and JSON in them."""

import contextlib
import json
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from bertjax.errors import SourceError

# Such a file is read whole, so its size is limited: JSON of nothing but brackets takes thirty times its size in memory,
# and seconds. The largest that there are, the certificate of a BERT-large and a configuration of ten thousand labels,
# have a tenth of this.
_MAX_BYTES = 1 << 22
# No such file nests deeper than ten. What shows or writes a value recurses into it; Python allows a thousand levels.
_MAX_DEPTH = 512

_NAMES = {dict: "an object", list: "a list"}


def read_json(path: Path, error: type[Exception], kind: type = dict) -> Any:
    """Reads a JSON file.

    Args:
        path: the file.
        error: the class of error to raise when the contents are not what they should be.
        kind: what the file must hold: dict for an object, list for a list.

    Raises:
        SourceError: the file can't be read, or is not a regular file.
    """
    data = read_file(path, _MAX_BYTES, error)
    try:
        value = json.loads(data.decode())
    except UnicodeDecodeError as problem:
        raise error(f"{path}: not UTF-8 text ({problem})") from None
    except (ValueError, RecursionError) as problem:
        raise error(f"{path}: not valid JSON ({problem})") from None
    if _is_deep(value):
        raise error(f"{path}: is nested more than {_MAX_DEPTH} deep, which no such file is")
    if not isinstance(value, kind):
        raise error(f"{path}: holds a JSON {type(value).__name__}, expected {_NAMES[kind]}")
    return value


def read_file(path: Path, limit: int, error: type[Exception]) -> bytes:
    """Reads a whole file of at most `limit` bytes; see `read_json` for the errors."""
    with opened(path) as file:
        data = file.read(limit + 1)
    if len(data) > limit:
        raise error(f"{path}: larger than {limit:,} bytes, which no such file is")
    return data


@contextlib.contextmanager
def opened(path: Path) -> Iterator[BinaryIO]:
    """Opens a file that somebody else wrote; an `OSError` in the block is one that names the file.

    Raises:
        SourceError: the file can't be read, or is not a regular file.
    """
    try:
        check_regular(path)
        with open(path, "rb") as file:
            yield file
    except SourceError:
        raise
    except OSError as problem:
        raise SourceError(f"{path}: can't be read ({problem.strerror or problem})") from None


def check_regular(path: Path) -> None:
    """Refuses what is there but is no regular file: to open a FIFO waits for a writer, and a device may never end.

    Raises:
        SourceError: it is something else.
        OSError: nothing is there.
    """
    mode = os.stat(path).st_mode
    if not stat.S_ISREG(mode):
        what = "Is a directory, not a regular file" if stat.S_ISDIR(mode) else "it is not a regular file"
        raise SourceError(f"{path}: can't be read ({what})")


def _is_deep(value: Any) -> bool:
    level = [value]
    for _ in range(_MAX_DEPTH + 1):
        containers = [each for each in level if isinstance(each, (dict, list))]
        level = [child for each in containers for child in (each.values() if isinstance(each, dict) else each)]
        if not level:
            return False
    return True
