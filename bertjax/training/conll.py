"""Files of tagged words: a word and its tags a line, an empty line behind each sentence (CoNLL 2003 and its like)."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bertjax.errors import SourceError

#: How names of such files end.
SUFFIXES = (".conll", ".iob", ".iob2", ".bio")
# A line of this instead of a word separates documents.
_DOCUMENT = "-DOCSTART-"


def read_conll(path: str | Path) -> Iterator[tuple[str, dict[str, Any] | str]]:
    """Yields for each sentence the number of its first line, from 1, and its columns, or why it is bad.

    Columns are separated by tabs or spaces; the first is the word, the last its tag. Lines that begin with "#" and a
    space are comments where they stand before a sentence.

    Yields:
        "line N", and {"tokens": [...], "tags": [...]} or a reason.

    Raises:
        SourceError: the file can't be read, or is not UTF-8.
    """
    words: list[list[str]] = []
    first = 1
    for number, line in enumerate(_lines(path), 1):
        fields = line.split()
        if fields and not (fields[0] == _DOCUMENT or (not words and line.startswith("# "))):
            first = first if words else number
            words.append(fields)
        elif words:
            yield f"line {first}", _sentence(words, first)
            words = []
    if words:
        yield f"line {first}", _sentence(words, first)


def _sentence(words: list[list[str]], first: int) -> dict[str, Any] | str:
    for number, fields in enumerate(words, first):
        if len(fields) < 2:
            return f"line {number} is {fields[0]!r} alone, expected a word and its tag"
    return {"tokens": [fields[0] for fields in words], "tags": [fields[-1] for fields in words]}


def _lines(path: str | Path) -> Iterator[str]:
    try:
        with open(path, encoding="utf-8-sig") as file:
            yield from file
    except OSError as problem:
        raise SourceError(f"{path}: can't be read ({problem.strerror})") from None
    except UnicodeDecodeError as problem:
        raise SourceError(f"{path}: is not UTF-8 text ({problem.reason} at byte {problem.start})") from None
