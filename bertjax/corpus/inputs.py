"""Which files a job reads, in which order."""

import dataclasses
import glob
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from bertjax.errors import InputError, SourceError

#: Formats by the end of a file's name.
SUFFIXES = {
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".feather": "arrow",
    ".ipc": "arrow",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".csv": "csv",
    ".txt": "text",
}
# These may follow the suffix of a format that is made of lines.
_COMPRESSED = (".gz", ".zst")
_LINES = ("jsonl", "csv", "text")


@dataclasses.dataclass(frozen=True)
class InputFile:
    """One file of a job, as it was when it was looked at.

    Attributes:
        path: its absolute path.
        format: "parquet", "arrow", "jsonl", "csv" or "text".
        size: in bytes.
        mtime_ns: when it was last changed, in nanoseconds.
    """

    path: str
    format: str
    size: int
    mtime_ns: int


def format_of(path: str | Path) -> str | None:
    """The format that a file has by its name, or None for a name that says none."""
    path = Path(path)
    suffixes = [suffix.lower() for suffix in path.suffixes]
    packed = bool(suffixes) and suffixes[-1] in _COMPRESSED
    found = SUFFIXES.get(suffixes[-2] if packed and len(suffixes) > 1 else suffixes[-1] if suffixes else "")
    return None if packed and found not in _LINES else found


def find_inputs(inputs: Sequence[str | Path], without: str | Path | None = None) -> list[InputFile]:
    """The files that inputs stand for: in the order given, those of a folder or a pattern by their paths.

    Of a folder, and of the folders in it, every file counts whose name says a format, unless the name, or that of a
    folder on the way, begins with "." or "_".

    Args:
        inputs: files, folders, and patterns as the shell has them, with ** for any folders.
        without: a folder whose files do not count: the job's own output.

    Raises:
        SourceError: there is no such file, or nothing that matches.
        InputError: a file's name says no format, or a file is there twice.
    """
    hidden = None if without is None else Path(os.path.realpath(without))
    paths = [Path(path) for each in inputs for path in _expand(str(each))]
    paths = [path for path in paths if hidden is None or hidden not in Path(os.path.realpath(path)).parents]
    if not paths:
        raise SourceError(f"{', '.join(map(str, inputs)) or 'no inputs'}: no files to read")
    seen: set[Path] = set()
    for path in paths:
        if path in seen:
            raise InputError(f"{path}: is among the inputs twice; its rows would be, too")
        seen.add(path)
    return [look_at(path) for path in paths]


def look_at(path: Path) -> InputFile:
    """A file as it is now; for the errors see `find_inputs`."""
    found = format_of(path)
    if found is None:
        known = ", ".join(SUFFIXES)
        raise InputError(f"{path}: its name says no format; expected one of {known} (of lines: .gz or .zst behind it)")
    try:
        str(path).encode()
        status = path.stat()
    except UnicodeEncodeError:
        raise InputError(f"{str(path)!r}: its name is no UTF-8; rename it") from None
    except OSError as problem:
        raise SourceError(f"{path}: can't be read ({problem.strerror})") from None
    return InputFile(str(path), found, status.st_size, status.st_mtime_ns)


def _expand(given: str) -> Iterator[str]:
    path = os.path.abspath(os.path.expanduser(given))
    if os.path.isdir(path):
        found = sorted(_files_in(path))
        if not found:
            raise SourceError(f"{given}: no file in this folder has a name that ends in one of {', '.join(SUFFIXES)}")
        yield from found
    elif os.path.exists(path):
        yield path
    elif glob.has_magic(given):
        found = sorted(name for name in glob.glob(path, recursive=True) if os.path.isfile(name))
        if not found:
            raise SourceError(f"{given}: no file matches")
        yield from found
    else:
        raise SourceError(f"{given}: no such file; to pass a text itself, use --text")


def _files_in(folder: str) -> Iterator[str]:
    seen: set[str] = set()

    def refuse(problem: OSError) -> None:
        raise SourceError(f"{problem.filename}: can't be read ({problem.strerror})") from None

    for parent, folders, names in os.walk(folder, onerror=refuse, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith((".", "_"))]
        real = os.path.realpath(parent)
        if real in seen:
            raise InputError(f"{parent}: links to a folder that is among the inputs anyway ({real})")
        seen.add(real)
        yield from (os.path.join(parent, name) for name in names if not name.startswith((".", "_")) and format_of(name))
