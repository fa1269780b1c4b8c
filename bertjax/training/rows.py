"""Rows of files, as what is to be learnt from stands in them, and the bad ones among them by their names."""

import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from bertjax.atomic import atomic_file
from bertjax.errors import InputError, SourceError
from bertjax.training.conll import SUFFIXES, read_conll

# Bad rows that a message shows; the file that it names has all.
_SHOWN = 5


@dataclasses.dataclass
class Rows:
    """Rows in memory.

    Attributes:
        records: the columns of each row that is good so far, by what they are for.
        places: where each of these stands, such as ("train.jsonl", "row 7").
        bad: where each of the others stands, and why it is bad.
    """

    records: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    places: list[tuple[str, str]] = dataclasses.field(default_factory=list)
    bad: list[tuple[str, str, str]] = dataclasses.field(default_factory=list)

    def __len__(self) -> int:
        """The number of rows that are good so far."""
        return len(self.records)

    def add(self, place: tuple[str, str], found: dict[str, Any] | str) -> None:
        """Takes a row: its columns, or why it is bad."""
        if isinstance(found, str):
            self.bad.append((*place, found))
        else:
            self.records.append(found)
            self.places.append(place)

    def refuse(self, reasons: Mapping[int, str]) -> "Rows":
        """The rows without some, by their index, which are bad for these reasons."""
        left = Rows(bad=list(self.bad))
        for index, (record, place) in enumerate(zip(self.records, self.places, strict=True)):
            left.add(place, reasons.get(index, record))
        return left

    def write_bad(self, path: Path) -> None:
        """Writes a JSON line for each bad row: file, place, reason."""
        with atomic_file(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
            for name, place, why in self.bad:
                file.write(json.dumps({"file": name, "place": place, "reason": why}, ensure_ascii=False) + "\n")

    def describe_bad(self) -> str:
        """How many rows are bad, and the first of them."""
        shown = "; ".join(f"{name}, {place}: {why}" for name, place, why in self.bad[:_SHOWN])
        more = f"; and {len(self.bad) - _SHOWN} more" if len(self.bad) > _SHOWN else ""
        return f"{len(self.bad)} bad row(s): {shown}{more}"


def read_rows(inputs: Sequence[str | Path], columns: Mapping[str, str], optional: Sequence[str] = ()) -> Rows:
    """Reads columns of files: JSON lines, CSV, text, Parquet, Arrow (see `bertjax.corpus`), and CoNLL.

    Args:
        inputs: files, folders and patterns.
        columns: the name of each column, by what it is for: {"text": "sentence", "label": "class"}.
        optional: what a row may do without.

    Raises:
        SourceError: a file can't be read, or there is none.
        InputError: a file has no such column, or no format that is known.
    """
    rows = Rows()
    for path in inputs:
        if Path(path).suffix.lower() in SUFFIXES:
            for place, found in read_conll(path):
                rows.add((str(path), place), found if isinstance(found, str) else _named(path, found, columns))
        else:
            _read_corpus(path, columns, rows)
    if not rows.records and not rows.bad:
        raise SourceError(f"{', '.join(map(str, inputs)) or 'no files'}: no rows to learn from")
    needed = [name for name in columns if name not in optional]
    empty = {index: why for index, record in enumerate(rows.records) if (why := _absent(record, needed, columns))}
    return rows.refuse(empty)


def _named(path: str | Path, found: dict[str, Any], columns: Mapping[str, str]) -> dict[str, Any]:
    """A sentence's columns by what they are for."""
    absent = [name for name in columns.values() if name not in found]
    if absent:
        raise InputError(f"{path}: has no column {absent[0]!r}; a CoNLL file has {' and '.join(map(repr, found))}")
    return {purpose: found[name] for purpose, name in columns.items()}


def _read_corpus(given: str | Path, columns: Mapping[str, str], rows: Rows) -> None:
    import pyarrow as pa

    from bertjax.corpus.inputs import find_inputs
    from bertjax.corpus.reader import source_of
    from bertjax.corpus.rows import Columns

    names = list(dict.fromkeys(columns.values()))
    for file in find_inputs([given]):
        source = source_of(file)
        row = 0
        for block in source.blocks(Columns((), pa.schema(list(source.schema(names)))), 0):
            for index, values in enumerate(_values(block.kept, names)):
                found = {purpose: values[name] for purpose, name in columns.items()}
                rows.add((file.path, f"row {row + index}"), block.bad.get(index, found))
            row += len(block)


def _values(arrays: Sequence[Any], names: Sequence[str]) -> Iterator[dict[str, Any]]:
    for values in zip(*(array.to_pylist() for array in arrays), strict=True):
        yield dict(zip(names, values, strict=True))


def _absent(record: dict[str, Any], needed: Sequence[str], columns: Mapping[str, str]) -> str | None:
    absent = [columns[name] for name in needed if record[name] is None]
    return f"{absent[0]!r} is null or missing" if absent else None
