"""Work of a job on Apache Beam: a model handler for `RunInference`.

    from apache_beam.ml.inference.base import RunInference
    from bertjax.corpus import SentenceVectors
    from bertjax.corpus.on_beam import TableModelHandler

    vectors = texts | RunInference(TableModelHandler(SentenceVectors("MODEL")))

Needs Apache Beam (the extra `beam`). A key for each example, a batch size by weight, a dead-letter queue for bad rows
and one model for all processes of a machine are options of Beam's own: `KeyedModelHandler`, `with_exception_handling`.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from bertjax.corpus.compute import TableComputer
from bertjax.corpus.job import Plan
from bertjax.corpus.work import Work
from bertjax.errors import InputError, SourceError

try:
    from apache_beam.ml.inference.base import ModelHandler, PredictionResult
except ImportError:
    raise SourceError("Apache Beam is needed for its model handler: pip install 'bertjax[beam]'") from None


class TableModelHandler(ModelHandler[Any, PredictionResult, TableComputer]):
    """Computes what a work makes of examples: a `PredictionResult` for each, in order.

    Its `inference` has a value for each column of the work's results, by name: {"embedding": array [dim]} of sentence
    vectors.

    Args:
        work: what is computed of an example.
        text: the field, or fields, of examples that hold the text; None for examples that are texts themselves, or
            tuples of as many as the work reads.
        plan: a job's plan, for its shapes and its calibration (which int8 vectors need); default: the usual shapes.
        max_batch_size: examples of a batch. Beam makes smaller ones where a bundle has no more. Large ones are packed
            with less padding.
        **options: of `ModelHandler`; `large_model=True` loads one model for all processes of a worker machine, which
            is what a chip needs that only one process can have.
    """

    def __init__(
        self,
        work: Work,
        text: str | Sequence[str] | None = None,
        *,
        plan: Plan | None = None,
        max_batch_size: int = 4096,
        **options: Any,
    ):
        super().__init__(max_batch_size=max_batch_size, **{"min_batch_size": min(max_batch_size, 256), **options})
        self._work, self._plan = work, plan
        self._fields = (text,) if isinstance(text, str) else text and tuple(text)
        self._names = tuple(f"text {index}" for index in range(work.text_columns))
        if self._fields is not None and len(self._fields) != len(self._names):
            raise InputError(f"text names {len(self._fields)} fields, and the work reads {len(self._names)}")

    def load_model(self) -> TableComputer:
        """Loads the work, once in a process."""
        return TableComputer(self._work, self._names, plan=self._plan)

    def run_inference(
        self, batch: Sequence[Any], model: TableComputer, inference_args: dict[str, Any] | None = None
    ) -> Iterable[PredictionResult]:
        """Computes a batch.

        Raises:
            InputError: an example has no text, or is none; says its position in the batch.
        """
        texts = [self._texts(position, example) for position, example in enumerate(batch)]
        try:
            columns = [pa.array(column, pa.string()) for column in zip(*texts, strict=True)]
        except UnicodeEncodeError as problem:
            raise InputError(f"a text of the batch is no Unicode ({problem.reason}): {problem.object!r:.80}") from None
        made = model(pa.table(columns, names=list(self._names))).drop_columns(list(self._names))
        values = [_values(column) for column in made.columns]
        for example, *row in zip(batch, *values, strict=True):
            yield PredictionResult(example, dict(zip(made.column_names, row, strict=True)))

    def get_metrics_namespace(self) -> str:
        """See `ModelHandler`."""
        return "BertJax"

    def validate_inference_args(self, inference_args: dict[str, Any] | None) -> None:
        """Raises `InputError` if there are any."""
        if inference_args:
            raise InputError(f"inference_args {sorted(inference_args)} are not known; options are those of the work")

    def _texts(self, position: int, example: Any) -> tuple[str, ...]:
        if self._fields is not None:
            missing = [name for name in self._fields if not isinstance(example, Mapping) or name not in example]
            if missing:
                raise InputError(f"example {position} of the batch has no field {missing[0]!r}")
            found = tuple(example[name] for name in self._fields)
        else:
            found = example if isinstance(example, tuple) else (example,)
        if len(found) != len(self._names) or not all(isinstance(text, str) for text in found):
            kinds = ", ".join(type(text).__name__ for text in found)
            raise InputError(f"example {position} of the batch is {kinds}, expected {len(self._names)} text(s)")
        return found


def _values(column: pa.ChunkedArray) -> Sequence[Any]:
    """A column's values: arrays [n] where it holds vectors, Python's own otherwise."""
    if not pa.types.is_fixed_size_list(column.type):
        return column.to_pylist()
    # A copy, so that a row which is kept does not keep the batch.
    return [np.array(row) for row in column.combine_chunks().flatten().to_numpy().reshape(len(column), -1)]
