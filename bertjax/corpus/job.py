"""A job, and the plan that everyone who works on it goes by."""

import base64
import bisect
import dataclasses
import functools
import itertools
import os
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa

from bertjax.checks import check_choice, check_count
from bertjax.corpus.inputs import InputFile
from bertjax.corpus.rows import Columns
from bertjax.corpus.shapes import JobShapes
from bertjax.corpus.work import Work
from bertjax.errors import InputError

#: Rows of a shard: large enough for a file that is worth opening, small enough that one is soon finished.
SHARD_ROWS = 16384

Format = Literal["parquet", "npy"]
OnBad = Literal["skip", "stop"]


@dataclasses.dataclass(frozen=True)
class Job:
    """What is to be made of which files; picklable.

    Args:
        inputs: files, folders and patterns; see `find_inputs`.
        out: the folder to make.
        work: what is computed of a row.
        text: the column or columns that hold the text. Default: the only column of texts that there is.
        id: a column that takes the place of the row number in the output. It is carried, never looked at: the same id
            may come twice, or be null.
        keep: more columns that are carried to the output.
        format: "parquet", or "npy" for arrays of vectors and nothing beside them.
        shard_rows: rows of an output file.
        on_bad: what becomes of a row that has no text, is no UTF-8 or can't be parsed: "stop" stops the job with an
            error, "skip" leaves its results null (of vectors, each number; in .npy files they are NaN, or zero where
            numbers are whole) and says why in `_bad/`. Not part of what a job is: one that stopped can go on with
            "skip".

    Raises:
        InputError: something of this is not usable.
    """

    inputs: tuple[str, ...]
    out: str
    work: Work
    text: tuple[str, ...] | None = None
    id: str | None = None
    keep: tuple[str, ...] = ()
    format: Format = "parquet"
    shard_rows: int = SHARD_ROWS
    on_bad: OnBad = "stop"

    def __post_init__(self):
        # Whoever works on it may have another working directory.
        inputs = [self.inputs] if isinstance(self.inputs, str | os.PathLike) else self.inputs
        set_ = object.__setattr__
        set_(self, "inputs", tuple(os.path.abspath(os.path.expanduser(each)) for each in inputs))
        set_(self, "out", os.path.abspath(os.path.expanduser(self.out)))
        set_(self, "text", (self.text,) if isinstance(self.text, str) else self.text and tuple(self.text))
        set_(self, "keep", (self.keep,) if isinstance(self.keep, str) else tuple(self.keep))
        check_choice("format", self.format, ["parquet", "npy"])
        check_choice("on_bad", self.on_bad, ["skip", "stop"])
        check_count("shard_rows", self.shard_rows)
        if self.text is not None and len(self.text) != self.work.text_columns:
            raise InputError(f"text names {len(self.text)} columns, and the work reads {self.work.text_columns}")
        if self.format == "npy" and self.carried:
            raise InputError(f"a .npy file has no room for {', '.join(self.carried)}; its rows are those of the inputs")
        if len(set(self.carried)) != len(self.carried):
            raise InputError(f"a column is to be kept twice: {', '.join(self.carried)}")

    @property
    def carried(self) -> tuple[str, ...]:
        """The columns that are carried to the output, the id first."""
        return (*([] if self.id is None else [self.id]), *self.keep)

    @property
    def folder(self) -> Path:
        """`out`, as a path."""
        return Path(self.out)


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is settled when a job is first started, and kept in its folder; see `bertjax.corpus.plan`.

    Attributes:
        files: the inputs, in order.
        rows: how many rows each has.
        text: the columns that hold the text.
        kept: the columns that are carried, with their types.
        shard_rows: rows of a shard.
        shapes: the shapes that rows of tokens are packed into.
        sample: what a sample of the rows is like: tokens of a text, and the fill that is to be expected.
        calibration: what the work wants to know of the corpus before.
    """

    files: tuple[InputFile, ...]
    rows: tuple[int, ...]
    text: tuple[str, ...]
    kept: pa.Schema
    shard_rows: int
    shapes: JobShapes
    sample: dict[str, Any]
    calibration: Any = None

    @functools.cached_property
    def firsts(self) -> list[int]:
        """The number of the first row of each file, and behind them how many rows there are."""
        return [0, *itertools.accumulate(self.rows)]

    @property
    def num_rows(self) -> int:
        """The rows of all files."""
        return self.firsts[-1]

    @property
    def num_shards(self) -> int:
        """How many shards there are; one even where there is no row, so that there is a file to read."""
        return max(1, -(-self.num_rows // self.shard_rows))

    @property
    def columns(self) -> Columns:
        """What is read of a row."""
        return Columns(self.text, self.kept)

    def shard(self, index: int) -> range:
        """The rows of a shard, numbered through all files."""
        return range(index * self.shard_rows, min((index + 1) * self.shard_rows, self.num_rows))

    def pieces(self, rows: range) -> list[tuple[int, int, int]]:
        """Where rows are: for each file that has some, its index, the first row in it and the one after the last."""
        firsts, found = self.firsts, []
        at = rows.start
        while at < rows.stop:
            index = bisect.bisect_right(self.firsts, at, hi=len(self.rows)) - 1
            stop = min(rows.stop, firsts[index] + self.rows[index])
            found.append((index, at - firsts[index], stop - firsts[index]))
            at = stop
        return found

    def to_json(self) -> dict[str, Any]:
        """The plan as JSON."""
        return {
            "files": [
                {**dataclasses.asdict(file), "rows": rows} for file, rows in zip(self.files, self.rows, strict=True)
            ],
            "rows": self.num_rows,
            "shards": self.num_shards,
            "shard_rows": self.shard_rows,
            "text": list(self.text),
            "kept": {field.name: str(field.type) for field in self.kept},
            "kept_schema": base64.b64encode(self.kept.serialize().to_pybytes()).decode(),
            "shapes": dataclasses.asdict(self.shapes),
            "sample": self.sample,
            "calibration": self.calibration,
        }

    @classmethod
    def from_json(cls, saved: dict[str, Any]) -> "Plan":
        """The plan that `to_json` saved."""
        files = [dict(file) for file in saved["files"]]
        rows = tuple(file.pop("rows") for file in files)
        return cls(
            files=tuple(InputFile(**file) for file in files),
            rows=rows,
            text=tuple(saved["text"]),
            kept=pa.ipc.read_schema(pa.py_buffer(base64.b64decode(saved["kept_schema"]))),
            shard_rows=saved["shard_rows"],
            shapes=JobShapes(**{**saved["shapes"], "lengths": tuple(saved["shapes"]["lengths"])}),
            sample=saved["sample"],
            calibration=saved["calibration"],
        )
