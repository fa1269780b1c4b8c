"""A file that is on the disk when it is closed."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from bertjax.errors import SourceError


@contextlib.contextmanager
def new_file(path: Path) -> Iterator[BinaryIO]:
    """Opens a file to write to, which must not exist; its data is flushed to the disk when the block ends.

    Raises:
        SourceError: the file can't be written, for instance for want of space.
    """
    try:
        with open(path, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
    except SourceError:  # a tensor that is copied could not be read
        raise
    except OSError as problem:
        raise SourceError(f"{path}: can't be written ({problem.strerror or problem})") from None
