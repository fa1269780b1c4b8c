"""Texts, and several of which one goes with each."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from bertjax.heads import BertForMultipleChoice
from bertjax.tasks.multiple_choice import MultipleChoice
from bertjax.training.metrics import choice_metrics
from bertjax.training.objective import Objective, choice_objective
from bertjax.training.rows import Rows
from bertjax.training.tasks.base import Draft, Examples, Layout, LearningTask, check_texts, of_examples, places_of
from bertjax.training.tasks.classification import number_below, parts


class ChooseTexts(LearningTask):
    """Multiple choice; rows may have different numbers of choices.

    Columns: text; choices, a list of texts (in CSV, which has no lists, separated by "|"); label, the place of the
    right one, counted from 0.
    """

    model_class = BertForMultipleChoice
    of_examples = ("places", "labels")
    best = ("accuracy", True)

    def examples(self, rows: Rows) -> tuple[Examples, Rows]:
        """See `LearningTask`."""
        rows = check_texts(rows, "text")
        reasons = {index: _reason(record) for index, record in enumerate(rows.records)}
        rows = rows.refuse({index: reason for index, reason in reasons.items() if reason})
        choices = [parts(record["choices"]) for record in rows.records]
        counts = [len(each) for each in choices]
        owners = np.repeat(np.arange(len(rows)), counts)
        tokens = self._tokenize(
            [rows.records[owner]["text"] for owner in owners], [choice for each in choices for choice in each]
        )
        texts = np.full((len(rows), max(counts, default=0)), -1, np.int64)
        texts[np.arange(texts.shape[1]) < np.array(counts, int)[:, None]] = np.arange(len(owners))
        labels = np.array([int(record["label"]) for record in rows.records], np.int32)
        truncated = int(tokens.truncated.sum())
        return Examples(tokens.input_ids, tokens.token_type_ids, texts, labels, truncated, rows.records), rows

    def labels(self, draft: Draft) -> dict[str, np.ndarray]:
        """See `LearningTask`."""
        return {"places": places_of(draft), "labels": of_examples(draft, draft.examples.labels[draft.chosen])}

    def objective(self, model: BertForMultipleChoice, layout: Layout) -> Objective:
        """See `LearningTask`."""
        return choice_objective(model, max_segments=layout.segments)

    def metrics(self, model: BertForMultipleChoice, examples: Examples, losses: dict[str, float]) -> dict[str, float]:
        """See `metrics.choice_metrics`."""
        choose = MultipleChoice(model, self.tokenizer, max_length=self.max_length)
        inputs = [(record["text"], parts(record["choices"])) for record in examples.records]
        return choice_metrics([answer.scores for answer in choose(inputs, apply_softmax=False)], examples.labels)


def _reason(record: Mapping[str, Any]) -> str | None:
    """Why a row can't be used, or None."""
    choices, label = parts(record["choices"]), record["label"]
    if len(choices) < 2 or not all(isinstance(choice, str) for choice in choices):
        return f"its choices are {record['choices']!r:.60}, expected a list of two texts or more"
    if number_below(len(choices), label) is None:
        return f"its label is {label!r:.60}, expected the place of one of {len(choices)} choices, counted from 0"
    return None
