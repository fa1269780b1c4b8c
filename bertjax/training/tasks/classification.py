"""Texts, or pairs of texts, and what they are called or how much they are worth."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from bertjax.checks import as_integer
from bertjax.errors import InputError
from bertjax.heads import BertForSequenceClassification
from bertjax.tasks.classification import TextClassification
from bertjax.tokenizer import Tokenizer
from bertjax.training.metrics import classification_metrics, multilabel_metrics, regression_metrics
from bertjax.training.objective import Objective, model_objective
from bertjax.training.rows import Rows
from bertjax.training.tasks.base import Draft, Examples, Layout, LearningTask, check_texts, of_segments, single_texts

_BEST = {
    "single_label_classification": "accuracy",
    "multi_label_classification": "f1_micro",
    "regression": "spearman",
}
# Names that are taken from rows; a column that has more is a column of something else.
_MOST_NAMES = 10_000
# Digits of the greatest int64.
_MOST_DIGITS = 19


class ClassifyTexts(LearningTask):
    """Sequence classification of one label, of several, or by numbers.

    Columns: text, pair (optional) and label: a name or a number of a class, a list of these, or a number or a list of
    them. In CSV, which has no lists, several are separated by "|".

    Args:
        tokenizer: the tokenizer.
        max_length: the longest text in tokens; longer ones lose their end.
        names: the labels' names, in the order of their numbers.
        problem: one of `labels.PROBLEM_TYPES`.
        paired: whether rows have a second text.
    """

    model_class = BertForSequenceClassification

    def __init__(self, tokenizer: Tokenizer, max_length: int, *, names: Sequence[str], problem: str, paired: bool):
        super().__init__(tokenizer, max_length)
        self.names, self.problem, self.paired = list(names), problem, paired
        self.best = (_BEST[problem], True)

    def examples(self, rows: Rows) -> tuple[Examples, Rows]:
        """See `LearningTask`."""
        rows = check_texts(rows, "text", *(["pair"] if self.paired else []))
        read = self._reader()
        found = [read(record["label"]) for record in rows.records]
        rows = rows.refuse({index: label for index, label in enumerate(found) if isinstance(label, str)})
        labels = np.array([label for label in found if not isinstance(label, str)], self._dtype())
        texts = [record["text"] for record in rows.records]
        pairs = [record["pair"] for record in rows.records] if self.paired else None
        return single_texts(self._tokenize(texts, pairs), labels, rows), rows

    def labels(self, draft: Draft) -> dict[str, np.ndarray]:
        """See `LearningTask`."""
        return {"labels": of_segments(draft, draft.examples.labels[draft.chosen])}

    def objective(self, model: BertForSequenceClassification, layout: Layout) -> Objective:
        """See `LearningTask`."""
        return model_objective(model, max_segments=layout.segments)

    def metrics(
        self, model: BertForSequenceClassification, examples: Examples, losses: dict[str, float]
    ) -> dict[str, float]:
        """See `metrics`."""
        inputs = [(each["text"], each["pair"]) if self.paired else each["text"] for each in examples.records]
        classify = TextClassification(model, self.tokenizer, max_length=self.max_length)
        ranked = classify(inputs, top_k=None, function_to_apply="none")
        order = {name: place for place, name in enumerate(self.names)}
        logits = np.full((len(inputs), len(self.names)), np.nan, np.float32)
        for row, labels in enumerate(ranked):
            for label in labels:
                logits[row, order[label.label]] = label.score
        if self.problem == "regression":
            return _mean(regression_metrics, logits, examples.labels.reshape(logits.shape))
        measure = multilabel_metrics if self.problem == "multi_label_classification" else classification_metrics
        return measure(logits, examples.labels)

    def _dtype(self) -> type:
        return np.int32 if self.problem == "single_label_classification" else np.float32

    def _reader(self) -> Callable[[Any], Any]:
        """What makes a label of the value in a row, or the reason that it is none."""
        if self.problem == "regression":
            return lambda value: _numbers(value, len(self.names))
        ids = {name: number for number, name in enumerate(self.names)}
        if self.problem == "single_label_classification":
            return lambda value: label_id(value, ids)
        return lambda value: _several(value, ids)


def label_id(value: Any, ids: dict[str, int]) -> int | str:
    """The number of a label that is given by its name or its number, or why it is none."""
    if isinstance(value, str) and value in ids:
        return ids[value]
    number = number_below(len(ids), value)
    if number is not None:
        return number
    names = ", ".join(map(repr, list(ids)[:10])) + (", ..." if len(ids) > 10 else "")
    return f"its label is {value!r:.60}, expected one of {names}, or a number below {len(ids)}"


def number_below(count: int, value: Any) -> int | None:
    """The number from 0 to count - 1 that a value is, or that its digits are; None if it is none."""
    number = int(value) if isinstance(value, str) and _is_number(value) else as_integer(value)
    return number if number is not None and 0 <= number < count else None


def names_of(values: Sequence[Any]) -> list[str]:
    """The names of labels that stand in rows: all there are, sorted, or LABEL_0, ... where they are numbers.

    Raises:
        InputError: there are none, or more than a classifier is likely to have.
    """
    flat = [each for value in values for each in (parts(value) if isinstance(value, str | list) else [value])]
    # Of what can be no label, the row is refused later, by its place.
    found = {str(each) for each in flat if isinstance(each, str | int) and not isinstance(each, bool)}
    numbers = [int(name) for name in found if _is_number(name)]
    are_numbers = len(numbers) == len(found)
    count = max(numbers, default=-1) + 1 if are_numbers else len(found)
    if not 0 < count <= _MOST_NAMES:
        raise InputError(
            f"the labels in the rows make {count} classes, expected 1 to {_MOST_NAMES}; name them in the settings "
            '(labels = [...]), or, for numbers to be predicted, set problem = "regression"'
        )
    return [f"LABEL_{number}" for number in range(count)] if are_numbers else sorted(found)


def _is_number(name: str) -> bool:
    """Whether a label's name is its number; of thousands of digits, Python makes no int."""
    return name.isdecimal() and len(name) <= _MOST_DIGITS


def parts(value: Any) -> list[Any]:
    """The labels of a row that may have several."""
    if isinstance(value, str):
        return [part for part in value.split("|") if part]
    return value if isinstance(value, list) else [value]


def _several(value: Any, ids: dict[str, int]) -> np.ndarray | str:
    table = np.zeros(len(ids), np.float32)
    for part in parts(value):
        number = label_id(part, ids)
        if isinstance(number, str):
            return number
        table[number] = 1.0
    return table


def _numbers(value: Any, count: int) -> float | list[float] | str:
    try:
        numbers = [float(part) for part in parts(value) if not isinstance(part, bool)]
    except (TypeError, ValueError, OverflowError):  # the last one of an int above all floats
        numbers = []
    if len(numbers) != count or not all(map(math.isfinite, numbers)):
        what = "a finite number" if count == 1 else f"{count} finite numbers"
        return f"its label is {value!r:.60}, expected {what}"
    return numbers[0] if count == 1 else numbers


def _mean(measure: Callable[..., dict[str, float]], values: np.ndarray, targets: np.ndarray) -> dict[str, float]:
    """Metrics of each column, averaged."""
    found = [measure(values[:, column], targets[:, column]) for column in range(values.shape[1])]
    return {name: float(np.mean([each[name] for each in found])) for name in found[0]}
