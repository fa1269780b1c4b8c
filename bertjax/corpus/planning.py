"""The pass over the corpus before the work: rows, columns, lengths of texts, and so the shapes."""

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from bertjax.corpus.inputs import find_inputs
from bertjax.corpus.job import Job, Plan
from bertjax.corpus.reader import RowReader, source_of
from bertjax.corpus.rows import Block, Source
from bertjax.corpus.shapes import choose_shapes, cost, usual_shapes
from bertjax.corpus.steps import computed
from bertjax.corpus.tables import is_text
from bertjax.corpus.windows import encode_good
from bertjax.corpus.work import Computation
from bertjax.errors import InputError

# Their names have five digits.
_MOST_SHARDS = 100_000
# The sample: places spread evenly over all rows, and how many rows are read at each.
_PLACES = 32
_ROWS_EACH = 128


def make_plan(job: Job, computation: Computation, devices: int) -> Plan:
    """Looks at all of a job's inputs; reads those that do not say how many rows they have.

    Args:
        job: the job.
        computation: its work, loaded.
        devices: how many devices it is loaded on.

    Raises:
        SourceError: a file can't be read.
        InputError: the inputs don't have the columns, or not with types that go together.
    """
    files = find_inputs(job.inputs, without=job.out)
    sources = [source_of(file) for file in files]
    text = job.text or _only_text_column(job, sources)
    kept = _kept_schema(job, sources, text)
    plan = Plan(
        files=tuple(files),
        rows=tuple(source.count() for source in sources),
        text=text,
        kept=kept,
        shard_rows=job.shard_rows,
        shapes=usual_shapes(computation.shapes, devices),
        sample={},
    )
    if plan.num_shards > _MOST_SHARDS:
        raise InputError(
            f"{plan.num_rows:,} rows are {plan.num_shards:,} files of {job.shard_rows:,}, and the names of more than "
            f"{_MOST_SHARDS:,} would not sort; raise shard_rows (--shard-rows)"
        )
    return _with_sample(plan, computation, devices)


def _only_text_column(job: Job, sources: Sequence[Source]) -> tuple[str, ...]:
    names = sources[0].text_columns()
    left = [name for name in names if name not in job.carried]
    if job.work.text_columns == 1 and len(left) == 1:
        return (left[0],)
    need = "one" if job.work.text_columns == 1 else f"{job.work.text_columns}, in order"
    found = f"there are {len(left)} columns of texts ({', '.join(map(repr, left))}) to choose from; name {need}"
    found = found if left else f"there is no column of texts; if it has one that is empty, name {need}"
    raise InputError(f"{job.inputs[0]}: {found} with text= (or --field)")


def _kept_schema(job: Job, sources: Sequence[Source], text: tuple[str, ...]) -> pa.Schema:
    """The columns to carry, with types that hold what every file has."""
    for source in sources:
        _check_text(source, text)
    try:
        kept = pa.unify_schemas([source.schema(job.carried) for source in sources], promote_options="permissive")
    except pa.ArrowException as problem:
        raise InputError(f"the files differ in the types of the columns to keep: {problem}") from None
    # Parquet has no null among lists of one size; see `windows.nothing`.
    return pa.schema([_of_any_size(field) for field in kept])


def _of_any_size(field: pa.Field) -> pa.Field:
    is_fixed = pa.types.is_fixed_size_list(field.type)
    return field.with_type(pa.list_(field.type.value_field)) if is_fixed else field


def _check_text(source: Source, text: tuple[str, ...]) -> None:
    """Refuses a column of another type, of which every row would be bad, and one that is there twice."""
    names = source.text_columns()
    for name in text:
        kind = pa.string() if names.count(name) == 1 else source.schema([name]).field(0).type
        if not is_text(kind) and not pa.types.is_null(kind):
            found = ", ".join(map(repr, names)) or "none"
            raise InputError(f"{source.path}: column {name!r} holds {kind}, not texts; columns of texts: {found}")


def _with_sample(plan: Plan, computation: Computation, devices: int) -> Plan:
    """The plan with what is settled by a sample: the shapes, and what the work wants to know."""
    encoded = [each for block, first in _sample(plan) if (each := encode_good(computation, block, first).encoded)]
    lengths = np.array([len(ids) for each in encoded for ids in each.tokens.input_ids], int)
    shapes = choose_shapes(computation.shapes, lengths, computation.hidden_size, devices)
    plan = dataclasses.replace(plan, shapes=shapes, sample=_describe(lengths, shapes, computation))
    windows = (computed(computation, each, shapes) for each in encoded)
    return dataclasses.replace(plan, calibration=computation.calibrate(windows))


def _describe(lengths: np.ndarray, shapes: Any, computation: Computation) -> dict[str, Any]:
    if not lengths.size:
        return {"texts": 0}
    least, median, most = np.quantile(lengths, [0, 0.5, 1], method="lower").tolist()
    fill = round(cost(shapes, lengths, computation.hidden_size)[1], 4)
    edges = np.arange(0, shapes.max_length + 32, 32)
    histogram = np.histogram(lengths, edges)[0].tolist()
    tokens = {"shortest": least, "median": median, "longest": most, "mean": round(float(lengths.mean()), 2)}
    return {"texts": len(lengths), "tokens": tokens, "histogram_by_32": histogram, "fill": fill}


def _sample(plan: Plan) -> Iterator[tuple[Block, int]]:
    """Blocks of rows spread evenly over the corpus, each with the number of its first row."""
    reader = RowReader(plan.files, plan.columns)
    places = min(_PLACES, -(-plan.num_rows // _ROWS_EACH))
    edges = [place * plan.num_rows // max(1, places) for place in range(places + 1)]
    for first, following in itertools.pairwise(edges):
        for index, start, stop in plan.pieces(range(first, min(first + _ROWS_EACH, following))):
            yield reader.read(index, start, stop), plan.firsts[index] + start
