"""Files of columns: Parquet, and Arrow's IPC formats, one of which is Feather."""

from collections.abc import Iterator, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from bertjax.corpus.rows import BLOCK_ROWS, Block, Columns, as_items, reading
from bertjax.errors import InputError

_ARROW_FILE = b"ARROW1"


class _Table:
    """What Parquet and Arrow files share."""

    def __init__(self, path: str):
        self.path = path

    def text_columns(self) -> list[str]:
        """See `Source`."""
        schema = self._schema()
        texts = {field.name for field in schema if is_text(field.type)}
        return [name for name in schema.names if name in texts]  # also of another type, where two have one name

    def schema(self, names: Sequence[str]) -> pa.Schema:
        """See `Source`."""
        schema = self._schema()
        for name in names:
            if len(schema.get_all_field_indices(name)) != 1:
                many = "more than one column" if name in schema.names else "no column"
                raise InputError(f"{self.path}: has {many} {name!r}; {describe(schema)}")
        return pa.schema([schema.field(name).remove_metadata() for name in names])

    def blocks(self, columns: Columns, start: int) -> Iterator[Block]:
        """See `Source`."""
        names = list(dict.fromkeys([*columns.text, *columns.kept.names]))
        with reading(self.path):
            for batch in self._batches(names, start):
                for first in range(0, batch.num_rows, BLOCK_ROWS):
                    yield block_of(batch.slice(first, BLOCK_ROWS), columns)

    def _schema(self) -> pa.Schema:
        raise NotImplementedError

    def _batches(self, names: list[str], start: int) -> Iterator[pa.RecordBatch]:
        raise NotImplementedError


class ParquetFile(_Table):
    """A Parquet file."""

    def count(self) -> int:
        """See `Source`."""
        with reading(self.path):
            return pq.read_metadata(self.path).num_rows

    def _schema(self) -> pa.Schema:
        with reading(self.path):
            return pq.read_schema(self.path)

    def _batches(self, names: list[str], start: int) -> Iterator[pa.RecordBatch]:
        with pq.ParquetFile(self.path) as file:
            for group in range(file.num_row_groups):
                rows = file.metadata.row_group(group).num_rows
                if start < rows:
                    batches = file.iter_batches(BLOCK_ROWS, row_groups=[group], columns=names, use_threads=False)
                    yield from _skip(batches, max(0, start))
                start -= rows


class ArrowFile(_Table):
    """An Arrow IPC file or stream; the first bytes say which."""

    def count(self) -> int:
        """See `Source`."""
        return sum(batch.num_rows for batch in self._all())

    def _schema(self) -> pa.Schema:
        with reading(self.path), pa.memory_map(self.path) as file:
            if file.read(4) == b"FEA1":
                raise InputError(f"{self.path}: is Feather of version 1, which is not read; write it as version 2")
            file.seek(0)
            return self._reader(file).schema

    def _reader(self, file: pa.NativeFile) -> Any:
        is_file = file.read(len(_ARROW_FILE)) == _ARROW_FILE
        file.seek(0)
        return pa.ipc.open_file(file) if is_file else pa.ipc.open_stream(file)

    def _all(self) -> Iterator[pa.RecordBatch]:
        with reading(self.path), pa.memory_map(self.path) as file:
            reader = self._reader(file)
            if isinstance(reader, pa.ipc.RecordBatchFileReader):
                yield from (reader.get_batch(index) for index in range(reader.num_record_batches))
            else:
                yield from reader

    def _batches(self, names: list[str], start: int) -> Iterator[pa.RecordBatch]:
        for batch in _skip(self._all(), start):
            yield batch.select(names)


def is_text(kind: pa.DataType) -> bool:
    """Whether values of this type are texts."""
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)


def describe(schema: pa.Schema) -> str:
    """The columns there are, for a message."""
    return "its columns are " + ", ".join(f"{field.name!r} ({field.type})" for field in schema)


def block_of(batch: pa.RecordBatch, columns: Columns) -> Block:
    """The rows of a record batch, of which a row is bad where it has no text, or one that is not UTF-8."""
    bad: dict[int, str] = {}
    texts = [_texts(batch.column(name), name, bad) for name in columns.text]
    kept = tuple(_cast(batch.column(field.name), field) for field in columns.kept)
    return Block(as_items(texts, batch.num_rows, bad), kept, bad)


def _cast(column: pa.Array, field: pa.Field) -> pa.Array:
    try:
        return column.cast(field.type)
    except pa.ArrowException as problem:
        raise InputError(
            f"column {field.name!r} is {column.type} in one file and {field.type} over all of them, which can't hold "
            f"every value ({problem}); make the files alike, or don't keep the column"
        ) from None


def _texts(column: pa.Array, name: str, bad: dict[int, str]) -> list[str | None]:
    try:
        texts = column.to_pylist()
    except UnicodeDecodeError:  # nothing checks a column of text for UTF-8 before it is read
        texts = [_text(value, index, bad) for index, value in enumerate(column)]
    for index, text in enumerate(texts):
        if text is None and index not in bad:
            bad[index] = f"{name!r} is null"
    return texts


def _text(value: pa.Scalar, index: int, bad: dict[int, str]) -> str | None:
    try:
        return value.as_py()
    except UnicodeDecodeError as problem:
        bad[index] = f"not UTF-8 text ({problem.reason} at byte {problem.start})"
        return None


def _skip(batches: Any, rows: int) -> Iterator[pa.RecordBatch]:
    """The batches without the first `rows` rows."""
    for batch in batches:
        if rows < batch.num_rows:
            yield batch.slice(max(0, rows))
        rows -= batch.num_rows
