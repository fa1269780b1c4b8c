"""Rows of a file, in blocks, whatever its format."""

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import pyarrow as pa

from bertjax.errors import BertjaxError, SourceError

#: Rows that are read, and tokenized, together.
BLOCK_ROWS = 1024


@dataclasses.dataclass(frozen=True)
class Block:
    """Some consecutive rows.

    Attributes:
        items: a text for each row, or a tuple of texts where several columns are read; None for a bad row.
        kept: the columns that are carried to the output, one array each.
        bad: why a row is bad, by its index in the block.
    """

    items: list[Any]
    kept: tuple[pa.Array, ...]
    bad: dict[int, str]

    def __len__(self) -> int:
        """The number of rows."""
        return len(self.items)

    def slice(self, start: int, stop: int) -> "Block":
        """The rows from `start` to before `stop`."""
        bad = {index - start: why for index, why in self.bad.items() if start <= index < stop}
        kept = tuple(array.slice(start, stop - start) for array in self.kept)
        return Block(self.items[start:stop], kept, bad)

    @classmethod
    def join(cls, parts: Sequence["Block"]) -> "Block":
        """The rows of several, one after another."""
        if len(parts) == 1:
            return parts[0]
        bad: dict[int, str] = {}
        first = 0
        for part in parts:
            bad |= {first + index: why for index, why in part.bad.items()}
            first += len(part)
        kept = tuple(map(pa.concat_arrays, zip(*(part.kept for part in parts), strict=True)))
        return cls([item for part in parts for item in part.items], kept, bad)


@dataclasses.dataclass(frozen=True)
class Columns:
    """What is read of a row.

    Attributes:
        text: the columns that hold the text, one for most work.
        kept: the columns that are carried to the output, with their types.
    """

    text: tuple[str, ...]
    kept: pa.Schema

    def no_rows(self) -> Block:
        """A block of none."""
        return Block([], tuple(pa.array([], field.type) for field in self.kept), {})


class Source(Protocol):
    """One file of rows."""

    def text_columns(self) -> list[str]:
        """The columns that hold text, as far as the file's head says; a name that several have comes several times."""

    def schema(self, names: Sequence[str]) -> pa.Schema:
        """The types of columns. Raises `InputError` for one that is not there."""

    def count(self) -> int:
        """The number of rows."""

    def blocks(self, columns: Columns, start: int) -> Iterator[Block]:
        """The rows from `start` on, in blocks of at most `BLOCK_ROWS`."""


@contextlib.contextmanager
def reading(path: str) -> Iterator[None]:
    """Makes what a damaged or unreadable file raises a `SourceError` that names it."""
    try:
        yield
    except BertjaxError:
        raise
    except (OSError, EOFError, pa.ArrowException) as problem:
        why = getattr(problem, "strerror", None) or " ".join(str(problem).split())
        raise SourceError(f"{path}: can't be read ({why}); is it whole?") from None


def as_items(columns: Sequence[list[Any]], count: int, bad: dict[int, str]) -> list[Any]:
    """The items of a block of `count` rows, of its columns of texts, if any; a row that is bad has none."""
    # Rows without a column of texts have nothing for an item.
    several = list(zip(*columns, strict=True)) or [()] * count
    items: list[Any] = list(columns[0]) if len(columns) == 1 else several
    for index in bad:
        items[index] = None
    return items
