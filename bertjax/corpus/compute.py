"""Tables to tables: a job's work without its files, for engines that bring rows themselves."""

from collections.abc import Sequence
from typing import Any

import jax
import pyarrow as pa

from bertjax.checks import check_choice
from bertjax.corpus.job import OnBad, Plan
from bertjax.corpus.rows import BLOCK_ROWS, Columns
from bertjax.corpus.shapes import usual_shapes
from bertjax.corpus.stages import WINDOW_STEPS
from bertjax.corpus.steps import Runner, Step, pack_all
from bertjax.corpus.tables import block_of, describe, is_text
from bertjax.corpus.windows import EncodedBlock, encode_good, nothing, spread
from bertjax.corpus.work import Work
from bertjax.engine import Window
from bertjax.errors import InputError


class TableComputer:
    """Computes tables: rows in, the same rows with their results out, in order.

    Args:
        work: what is computed of a row.
        text: the column or columns that hold the text.
        plan: a job's plan, for its shapes and its calibration (which int8 vectors need); default: the usual shapes.
        on_bad: what becomes of a row without a text: "stop" raises an `InputError`, "skip" leaves its results null.
        devices: what to run on; default: all devices of this process.
    """

    def __init__(
        self,
        work: Work,
        text: str | Sequence[str],
        *,
        plan: Plan | None = None,
        on_bad: OnBad = "stop",
        devices: Sequence[jax.Device] | None = None,
    ):
        check_choice("on_bad", on_bad, ["skip", "stop"])
        self._text = (text,) if isinstance(text, str) else tuple(text)
        if len(self._text) != work.text_columns:
            raise InputError(f"text names {len(self._text)} columns, and the work reads {work.text_columns}")
        self._on_bad = on_bad
        devices = list(devices or jax.local_devices())
        self._computation = work.load(devices).calibrated(plan and plan.calibration)
        self._shapes = plan.shapes if plan else usual_shapes(self._computation.shapes, len(devices))
        self._runner = Runner(self._computation.run)

    def __call__(self, table: pa.Table) -> pa.Table:
        """Computes a table.

        Args:
            table: any rows, with the columns of text.

        Returns:
            The table with the columns of the results behind its own.

        Raises:
            InputError: it has no such columns of texts, or one of the name of a result; or a row is bad, with its
                position.
        """
        _check(table, self._text, [field.name for field in self._computation.fields])
        started = list(self._started(table))
        made = [self._finish(encoded, steps) for encoded, steps in started]
        for place, field in enumerate(self._computation.fields):
            table = table.append_column(field, pa.chunked_array([columns[place] for columns in made], field.type))
        return table

    def _started(self, table: pa.Table) -> Any:
        """Windows of the table, tokenized while the device is at those before."""
        columns = Columns(self._text, pa.schema([]))
        parts: list[EncodedBlock] = []
        first = 0
        for batch in table.select(list(dict.fromkeys(self._text))).to_batches(BLOCK_ROWS):
            encoded = encode_good(self._computation, block_of(batch, columns), first)
            for row, why in sorted(encoded.bad.items()) if self._on_bad == "stop" else ():
                raise InputError(f"row {first + row} of the table: {why}; on_bad='skip' goes on without such rows")
            parts.append(encoded)
            first += batch.num_rows
            if sum(part.num_tokens for part in parts) >= WINDOW_STEPS * self._shapes.step_tokens:
                yield self._start(parts)
                parts = []
        if parts:
            yield self._start(parts)

    def _start(self, parts: list[EncodedBlock]) -> tuple[EncodedBlock, list[Step]]:
        joined = EncodedBlock.join(parts)
        batches = [] if joined.encoded is None else pack_all(self._computation, joined.encoded, self._shapes)
        return joined, [self._runner.start(batch) for batch in batches]

    def _finish(self, joined: EncodedBlock, steps: list[Step]) -> list[pa.Array]:
        rows = len(joined.block)
        finished = self._runner.finish(steps)
        if joined.encoded is None:
            return [nothing(field.type, rows) for field in self._computation.fields]
        return spread(self._computation.columns(Window(joined.encoded, finished)), joined.good, rows)


def _check(table: pa.Table, text: Sequence[str], results: Sequence[str]) -> None:
    for name in text:
        if len(table.schema.get_all_field_indices(name)) != 1 or not is_text(table.schema.field(name).type):
            raise InputError(f"{name!r} is no column of texts; {describe(table.schema)}")
    for name in results:
        if name in table.column_names:
            raise InputError(f"the table has a column {name!r} already, which the results would be called")
