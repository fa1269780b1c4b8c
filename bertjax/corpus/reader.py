"""Reads any range of a job's rows; ranges that follow one another cost one pass over each file."""

import os
from collections.abc import Callable, Iterator, Sequence

from bertjax.corpus.inputs import InputFile
from bertjax.corpus.lines import CsvFile, JsonLines, TextFile
from bertjax.corpus.rows import Block, Columns, Source
from bertjax.corpus.tables import ArrowFile, ParquetFile
from bertjax.errors import InputError, SourceError

_SOURCES: dict[str, Callable[[str], Source]] = {
    "parquet": ParquetFile,
    "arrow": ArrowFile,
    "jsonl": JsonLines,
    "csv": CsvFile,
    "text": TextFile,
}
# Rows in between that are read rather than jumped over: to jump is to open the file again.
_NEAR = 65536


def source_of(file: InputFile) -> Source:
    """What reads a file."""
    return _SOURCES[file.format](file.path)


class RowReader:
    """Reads rows of files that are still as they were when the job was planned.

    Args:
        files: the files.
        columns: what is read of a row.
    """

    def __init__(self, files: Sequence[InputFile], columns: Columns):
        self._files, self._columns = files, columns
        self._file = -1
        self._at = 0
        self._blocks: Iterator[Block] = iter(())
        self._rest: Block | None = None

    def read(self, file: int, start: int, stop: int) -> Block:
        """The rows of a file from `start` to before `stop`, as one block.

        Raises:
            SourceError: the file can't be read.
            InputError: it has changed, or has fewer rows than it had.
        """
        if file != self._file or not self._at <= start <= self._at + _NEAR:
            self._open(file, start)
        self._take(start - self._at, file)
        return Block.join(self._take(stop - start, file))

    def _open(self, file: int, start: int) -> None:
        expected = self._files[file]
        check_unchanged(expected)
        self._file, self._at, self._rest = file, start, None
        self._blocks = source_of(expected).blocks(self._columns, start)

    def _take(self, count: int, file: int) -> list[Block]:
        parts = []
        while count:
            block = self._rest or next(self._blocks, None)
            if block is None:
                raise InputError(
                    f"{self._files[file].path}: ends at row {self._at}; it had more when the job was planned"
                )
            part, self._rest = block.slice(0, count), block.slice(count, len(block)) if count < len(block) else None
            parts.append(part)
            count -= len(part)
            self._at += len(part)
        return parts


def check_unchanged(file: InputFile) -> None:
    """Raises `InputError` if a file is no longer what it was, and `SourceError` if it is gone."""
    try:
        status = os.stat(file.path)
    except OSError as problem:
        raise SourceError(f"{file.path}: can't be read ({problem.strerror}); the job was planned with it") from None
    if (status.st_size, status.st_mtime_ns) != (file.size, file.mtime_ns):
        raise InputError(
            f"{file.path}: has changed since the job was planned, so its results would not go together; put the old "
            "file back, or write to another folder"
        )
