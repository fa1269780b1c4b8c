"""Files made of lines: JSON lines, CSV and plain text, compressed or not.

They are read line by line, not by pyarrow's readers, so that one bad line is one bad row.
"""

import codecs
import csv
import io
import itertools
import json
import os
import reprlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import pyarrow as pa

from bertjax.corpus.rows import BLOCK_ROWS, Block, Columns, as_items, reading
from bertjax.errors import InputError, SourceError

# The longest line, and the longest field of CSV: without a limit, a file that has no line ends, or lost a quote, would
# be read into memory whole.
_LONGEST = 1 << 26
_BUFFER = 1 << 20
# Lines whose fields say which columns there are.
_HEAD = 100


class TextFile:
    """A text a line; a blank line is an empty text. The one column is called "text"."""

    def __init__(self, path: str):
        self.path = path

    def text_columns(self) -> list[str]:
        """See `Source`."""
        return ["text"]

    def schema(self, names: Sequence[str]) -> pa.Schema:
        """See `Source`."""
        for name in names:
            if name != "text":
                raise InputError(f"{self.path}: has no column {name!r}; a text file has one, 'text'")
        return pa.schema([(name, pa.string()) for name in names])

    def count(self) -> int:
        """See `Source`."""
        return _count_lines(self.path)

    def blocks(self, columns: Columns, start: int) -> Iterator[Block]:
        """See `Source`."""
        for lines in _batched(_lines(self.path, start)):
            bad: dict[int, str] = {}
            texts = [_decode(line, index, bad) for index, line in enumerate(lines)]
            kept = tuple(pa.array(texts, field.type) for field in columns.kept)
            yield Block(as_items([texts] * len(columns.text), len(lines), bad), kept, bad)


class JsonLines:
    """A JSON object a line, whose fields are the columns."""

    def __init__(self, path: str):
        self.path = path

    def text_columns(self) -> list[str]:
        """See `Source`."""
        names: dict[str, None] = {}
        for line in itertools.islice(_lines(self.path, 0), _HEAD):
            record = _record(line, 0, {}) or {}
            names |= {name: None for name, value in record.items() if isinstance(value, str)}
        return list(names)

    def schema(self, names: Sequence[str]) -> pa.Schema:
        """See `Source`; the types are those that hold every value of the file, so all of it is read."""
        schema = pa.schema([(name, pa.null()) for name in names])
        found: set[str] = set()
        for lines in _batched(_lines(self.path, 0)) if names else ():
            records = [_record(line, 0, {}) or {} for line in lines]
            found.update(*records)
            schema = self._wider(schema, records)
        for name in names:
            if found and name not in found:  # a file without rows may have any column
                raise InputError(f"{self.path}: no line has a field {name!r}")
        return schema

    def _wider(self, schema: pa.Schema, records: list[dict[str, Any]]) -> pa.Schema:
        for place, field in enumerate(schema):
            try:
                kind = pa.array([value for record in records if _is_storable(value := record.get(field.name))]).type
                merged = pa.unify_schemas(
                    [pa.schema([field]), pa.schema([(field.name, kind)])], promote_options="permissive"
                )
            except (pa.ArrowException, OverflowError, UnicodeError) as problem:
                raise InputError(
                    f"{self.path}: the values of {field.name!r} have no one type ({problem}); make them alike, for "
                    "instance all texts, or don't keep the column"
                ) from None
            schema = schema.set(place, merged.field(0))
        return schema

    def count(self) -> int:
        """See `Source`."""
        return _count_lines(self.path)

    def blocks(self, columns: Columns, start: int) -> Iterator[Block]:
        """See `Source`."""
        for lines in _batched(_lines(self.path, start)):
            bad: dict[int, str] = {}
            records = [_record(line, index, bad) for index, line in enumerate(lines)]
            texts = [[_text(record, name, index, bad) for index, record in enumerate(records)] for name in columns.text]
            kept = tuple(_values(records, field, bad) for field in columns.kept)
            yield Block(as_items(texts, len(lines), bad), kept, bad)


class CsvFile:
    """Comma-separated values with a header. Every column is text, as CSV has no types; an empty field is empty text."""

    def __init__(self, path: str):
        self.path = path

    def text_columns(self) -> list[str]:
        """See `Source`."""
        with reading(self.path):
            return next(self._records(), [])

    def schema(self, names: Sequence[str]) -> pa.Schema:
        """See `Source`."""
        header = self.text_columns()
        for name in names:
            if header.count(name) != 1:
                what = f"has {header.count(name)} columns" if name in header else "has no column"
                raise InputError(f"{self.path}: {what} {name!r}; its columns are {', '.join(map(repr, header))}")
        return pa.schema([(name, pa.string()) for name in names])

    def count(self) -> int:
        """See `Source`."""
        with reading(self.path):
            return max(0, sum(1 for _ in self._records()) - 1)

    def blocks(self, columns: Columns, start: int) -> Iterator[Block]:
        """See `Source`."""
        with reading(self.path):
            records = self._records()
            header = next(records, [])
            for rows in _batched(itertools.islice(records, start, None)):
                bad: dict[int, str] = {}
                for index, row in enumerate(rows):
                    _check_fields(row, header, index, bad)
                places = [header.index(name) for name in columns.text]
                texts = [[None if i in bad else row[place] for i, row in enumerate(rows)] for place in places]
                places = [(header.index(field.name), field.type) for field in columns.kept]
                kept = [
                    pa.array([None if i in bad else row[p] for i, row in enumerate(rows)], kind) for p, kind in places
                ]
                yield Block(as_items(texts, len(rows), bad), tuple(kept), bad)

    def _records(self) -> Iterator[list[str]]:
        """The header and the rows. A byte that is no UTF-8 is half of a surrogate pair, and found by that."""
        csv.field_size_limit(_LONGEST)  # a setting of the whole process; it starts at 128 KiB, less than a long text
        with _open(self.path) as file:
            text = io.TextIOWrapper(file, encoding="utf-8-sig", errors="surrogateescape", newline="")
            reader = csv.reader(text, strict=True)  # or a quote that is not closed takes the rest of the file
            try:
                yield from (row for row in reader if row)
            except csv.Error as problem:
                raise SourceError(f"{self.path}:{reader.line_num}: can't be read as CSV ({problem})") from None


def _open(path: str) -> io.BufferedReader:
    """The file's bytes, decompressed by the suffix of its name."""
    compression = {".gz": "gzip", ".zst": "zstd"}.get(os.path.splitext(path)[1].lower())
    return io.BufferedReader(pa.input_stream(path, compression=compression), _BUFFER)


def _lines(path: str, start: int) -> Iterator[bytes]:
    """The lines from number `start` on, without what ends them."""
    with reading(path), _open(path) as file:
        _skip_mark(file)
        for _ in itertools.islice(file, start):
            pass
        for number, line in enumerate(iter(lambda: file.readline(_LONGEST), b""), start + 1):
            if len(line) == _LONGEST:
                raise SourceError(f"{path}:{number}: a line of more than {_LONGEST >> 20} MiB")
            # At line feeds only, as elsewhere: form feeds and other rare characters are part of a text.
            yield line.rstrip(b"\r\n")


def _skip_mark(file: io.BufferedReader) -> None:
    """Skips the byte order mark that some programs put in front of UTF-8."""
    if file.peek(3)[:3] == codecs.BOM_UTF8:
        file.read(3)


def _count_lines(path: str) -> int:
    count, last = 0, b"\n"
    with reading(path), _open(path) as file:
        _skip_mark(file)
        while data := file.read(_BUFFER):
            count += data.count(b"\n")
            last = data[-1:]
    return count + (last != b"\n")


def _batched(items: Iterable[Any]) -> Iterator[list[Any]]:
    items = iter(items)
    while taken := list(itertools.islice(items, BLOCK_ROWS)):
        yield taken


def _decode(line: bytes, index: int, bad: dict[int, str]) -> str | None:
    try:
        return line.decode()
    except UnicodeDecodeError as problem:
        bad[index] = f"not UTF-8 text ({problem.reason} at byte {problem.start})"
        return None


def _record(line: bytes, index: int, bad: dict[int, str]) -> dict[str, Any] | None:
    text = _decode(line, index, bad)
    try:
        record = {} if text is None else json.loads(text)
    except (ValueError, RecursionError) as problem:
        bad[index] = f"not a line of JSON ({problem})"
        return None
    if isinstance(record, dict):
        return record
    bad[index] = f"{reprlib.repr(record)} is no JSON object with fields"
    return None


def _text(record: dict[str, Any] | None, name: str, index: int, bad: dict[int, str]) -> str | None:
    value = (record or {}).get(name)
    if not isinstance(value, str) and index not in bad:
        what = f"is {reprlib.repr(value)}, expected a text" if record and name in record else "is missing"
        bad[index] = f"field {name!r} {what}"
    return value


def _values(records: list[dict[str, Any] | None], field: pa.Field, bad: dict[int, str]) -> pa.Array:
    """A column that is kept. JSON can spell half of a surrogate pair, which no column can hold."""
    values = [(record or {}).get(field.name) for record in records]
    try:
        return pa.array(values, field.type)
    except UnicodeError:
        for index, value in enumerate(values):
            try:
                pa.array([value], field.type)
            except UnicodeError:
                bad[index], values[index] = f"field {field.name!r} is {reprlib.repr(value)}, which is no text", None
        return pa.array(values, field.type)


def _is_storable(value: Any) -> bool:
    """Whether no text in a value has half of a surrogate pair."""
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeError:
        return False
    return True


def _check_fields(row: list[str], header: list[str], index: int, bad: dict[int, str]) -> None:
    if len(row) != len(header):
        bad[index] = f"{len(row)} fields, the header has {len(header)}"
    elif any(not field.isascii() and any("\ud800" <= character <= "\udfff" for character in field) for field in row):
        bad[index] = "not UTF-8 text"
