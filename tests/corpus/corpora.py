"""Corpora of every format, for tests."""

import csv
import gzip
import io
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet as pq
from conftest import WORDS

from bertjax.corpus import Job, SentenceVectors

#: Names of files, one for each way of writing one.
NAMES = (
    "a.parquet a.arrow a.stream.arrow a.feather a.ipc a.jsonl a.ndjson a.jsonl.gz a.jsonl.zst a.csv a.csv.gz a.csv.zst "
    "a.txt a.txt.gz a.txt.zst"
).split()


def some_texts(count: int, seed: int = 0, longest: int = 40) -> list[str]:
    rng = np.random.default_rng(seed)
    return [" ".join(rng.choice(WORDS, rng.integers(0, longest + 1))) for _ in range(count)]


def ids(count: int, start: int = 0) -> list[str]:
    return [f"id-{start + index}" for index in range(count)]


def packed(path: Path, data: bytes) -> None:
    """Writes bytes, compressed by the suffix."""
    if path.suffix == ".gz":
        middle = len(data) // 2  # two members, as `cat a.gz b.gz` makes
        data = gzip.compress(data[:middle]) + gzip.compress(data[middle:])
    elif path.suffix == ".zst":
        with pa.CompressedOutputStream(str(path), "zstd") as file:
            file.write(data)
        return
    path.write_bytes(data)


def write(path: Path, texts: Sequence[str], start: int = 0, rows: int = 7) -> Path:
    """Writes texts as the column `text`, with an `id` where the format has columns; `rows` in a group or batch."""
    table = pa.table({"id": ids(len(texts), start), "text": list(texts)})
    kind = path.name.split(".", 1)[1]
    if kind == "parquet":
        pq.write_table(table, path, row_group_size=rows)
    elif kind == "feather":
        pyarrow.feather.write_feather(table, path, chunksize=rows)
    elif kind in ("arrow", "ipc", "stream.arrow"):
        new = pa.ipc.new_stream if kind == "stream.arrow" else pa.ipc.new_file
        with new(path, table.schema) as writer:
            writer.write_table(table, max_chunksize=rows)
    else:
        packed(path, lines(kind.split(".")[0], texts, start))
    return path


def lines(kind: str, texts: Sequence[str], start: int = 0) -> bytes:
    if kind == "txt":
        return "".join(text + "\n" for text in texts).encode()
    rows = list(zip(ids(len(texts), start), texts, strict=True))
    if kind == "csv":
        buffer = io.StringIO(newline="")
        csv.writer(buffer).writerows([("id", "text"), *rows])
        return buffer.getvalue().encode()
    return "".join(json.dumps({"id": name, "text": text}) + "\n" for name, text in rows).encode()


def a_job(folder: Path, model: Path, *inputs: Path, **options) -> Job:
    """A job with small shards, in the folder `out`."""
    of_work = {name: options.pop(name) for name in ("vectors", "prompt_name", "max_seq_length") if name in options}
    options = {"text": "text", "shard_rows": 64, **options}
    return Job(tuple(map(str, inputs)), str(folder / "out"), SentenceVectors(str(model), **of_work), **options)


def shards(folder: Path) -> dict[str, bytes]:
    """The bytes of everything that a job promises to make the same again."""
    names = [*folder.glob("part-*"), *folder.glob("_bad/*"), *folder.glob("_job/part-*")]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in names}


def vectors(folder: Path) -> np.ndarray:
    """All vectors of a job that wrote Parquet, [rows, dim]."""
    column = pq.read_table(folder)["embedding"].combine_chunks()
    return column.flatten().to_numpy().reshape(len(column), -1)
