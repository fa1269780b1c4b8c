"""Spans that people marked in texts, through a tokenizer and back: what is lost when an answer becomes tokens.

    python -m benchmarks.offsets TOKENIZER FILE... [--max-length 384] [--stride 128] [--show 5]

TOKENIZER is a folder; a FILE that ends in .json has questions and answers as SQuAD lays them out, any other has words
with BIO tags, a word a line and an empty line after each sentence (CoNLL). A span becomes the fewest tokens that cover
it, in the first window that has all of it, and these the characters of their whole words. Prints of how many spans
that gives the very same characters, more of them (the span starts or ends inside a word), or others.
"""

import itertools
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import click
import numpy as np

from bertjax.tokenizer import Tokenizer
from bertjax.tokens import Alignment


class Marked(NamedTuple):
    """A text with the spans that are marked in it, and the question that is asked of it, if any."""

    question: str | None
    text: str
    spans: list[tuple[int, int]]


def read_squad(path: Path) -> Iterator[Marked]:
    """The questions of a SQuAD file, with their answers."""
    for article in json.loads(path.read_text(encoding="utf-8"))["data"]:
        for paragraph in article["paragraphs"]:
            for item in paragraph["qas"]:
                answers = [(answer["answer_start"], answer["text"]) for answer in item["answers"]]
                spans = [(start, start + len(text)) for start, text in answers]
                yield Marked(item["question"], paragraph["context"], spans)


def read_conll(path: Path) -> Iterator[Marked]:
    """The sentences of a CoNLL file, their words joined by spaces, with their entities."""
    lines = path.read_text(encoding="utf-8").split("\n")
    for has_words, rows in itertools.groupby(lines, lambda line: bool(line.strip())):
        text, spans = "", []
        for word, tag in (row.split("\t") for row in rows if has_words):
            start = len(text) + bool(text)
            text = f"{text} {word}" if text else word
            if tag.startswith("B"):
                spans.append((start, len(text)))
            elif tag.startswith("I"):
                spans[-1] = (spans[-1][0], len(text))
        if has_words:
            yield Marked(None, text, spans)


def recovered(windows: list[Alignment], sequence: int, span: tuple[int, int]) -> tuple[int, int] | None:
    """The characters of the words that cover a span, in the first window that has all of it."""
    start, end = span
    for window in windows:
        inside = (window.offsets[:, 1] > start) & (window.offsets[:, 0] < end) & (window.sequence_ids == sequence)
        covering = np.flatnonzero(inside)
        if len(covering) and window.offsets[covering[0], 0] <= start and window.offsets[covering[-1], 1] >= end:
            return window.char_span(covering[0], covering[-1], align_to_words=True)
    return None


def check(tokenizer: Tokenizer, marked: list[Marked], show: int, **sizes: int) -> Counter[str]:
    """Counts the spans by what comes back of them, and prints some that are not exact."""
    texts, questions = [item.text for item in marked], [item.question for item in marked if item.question is not None]
    tokens, owners = tokenizer.windows(questions or texts, texts if questions else None, **sizes)
    counts = Counter(texts=len(texts), windows=len(tokens))
    ends = np.searchsorted(owners, np.arange(len(texts) + 1))
    for item, (first, last) in zip(marked, itertools.pairwise(ends.tolist()), strict=True):
        for start, end in item.spans:
            found = recovered(tokens.alignments[first:last], int(bool(questions)), (start, end))
            kind = "exact" if found == (start, end) else "other"
            if found is not None and found != (start, end) and found[0] <= start and found[1] >= end:
                kind = "inside a word"
            counts[kind] += 1
            if kind != "exact" and counts[kind] <= show:
                got = None if found is None else item.text[slice(*found)]
                click.echo(f"  {kind}: {item.text[start:end]!r} became {got!r}")
    return counts


@click.command()
@click.argument("tokenizer", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.argument("files", nargs=-1, required=True, type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--max-length", default=384, show_default=True)
@click.option("--stride", default=128, show_default=True)
@click.option("--show", default=5, show_default=True, help="How many of each kind to print.")
def main(tokenizer: Path, files: tuple[Path, ...], max_length: int, stride: int, show: int) -> None:
    """Checks the spans of FILES."""
    loaded = Tokenizer.from_folder(tokenizer)
    for path in files:
        marked = list((read_squad if path.suffix == ".json" else read_conll)(path))
        counts = check(loaded, marked, show, max_length=max_length, stride=stride)
        click.echo(f"{path.name}: " + ", ".join(f"{count} {name}" for name, count in counts.items()))


if __name__ == "__main__":
    main(prog_name="python -m benchmarks.offsets")
