"""Texts whose vectors are to be near or far."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bertjax.embedder import SentenceEncoder
from bertjax.sentence import SentenceModel
from bertjax.sentence_files import SentenceSpec
from bertjax.tokenizer import Tokenizer
from bertjax.training.metrics import ranking_metrics, similarity_metrics
from bertjax.training.objective import Objective, cosine_objective, ranking_objective
from bertjax.training.rows import Rows
from bertjax.training.tasks.base import Draft, Examples, Layout, LearningTask, check_texts, of_examples, places_of

# How many columns of passages that are not a query's there may be; "negative", "negative_2", ...
NEGATIVES = 8


class _Sentences(LearningTask):
    """What is learnt by vectors.

    Args:
        tokenizer: the tokenizer.
        max_length: the longest text in tokens; longer ones lose their end.
        spec: of the encoder that is tuned.
        columns: what is embedded, in order; of a row, the columns behind the first two may be null.
        dims: the loss is the sum of those of the vectors cut to so many numbers each; default: whole vectors.
    """

    model_class = SentenceModel
    of_examples = ("places", "labels")

    def __init__(
        self,
        tokenizer: Tokenizer,
        max_length: int,
        *,
        spec: SentenceSpec,
        columns: Sequence[str],
        dims: Sequence[int] = (),
    ):
        super().__init__(tokenizer, max_length)
        self.spec, self.columns, self.dims = spec, list(columns), tuple(dims)
        self.terms = tuple(f"loss_{dim}" for dim in dims) or ("loss",)

    def _embedded(self, rows: Rows, labels: Any) -> Examples:
        texts = np.full((len(rows), len(self.columns)), -1, np.int64)
        given: list[str] = []
        for row, record in enumerate(rows.records):
            for place, column in enumerate(self.columns):
                if record[column] is not None:
                    texts[row, place] = len(given)
                    given.append(record[column])
        tokens = self._tokenize(given)
        truncated = int(tokens.truncated.sum())
        return Examples(tokens.input_ids, tokens.token_type_ids, texts, labels, truncated, rows.records)

    def _save(self, model: SentenceModel, folder: Path) -> None:
        self._encoder(model).save_pretrained(folder, force=True)

    def _encoder(self, model: SentenceModel) -> SentenceEncoder:
        return SentenceEncoder(model, self.tokenizer, self.spec)

    def _vectors(self, model: SentenceModel, texts: Sequence[str]) -> np.ndarray:
        """Vectors of unit length."""
        return self._encoder(model).encode(texts, normalize_embeddings=True)


class RankPassages(_Sentences):
    """Multiple-negatives ranking: each query is to find its own passage among those of the batch.

    Columns: query, passage and, if there are any, negative, negative_2, ...: passages that are not a query's own.
    """

    best = ("mrr", True)

    def examples(self, rows: Rows) -> tuple[Examples, Rows]:
        """See `LearningTask`."""
        rows = check_texts(rows, *self.columns[:2])
        rows = check_texts(rows, *self.columns[2:], optional=True)
        return self._embedded(rows, None), rows

    def labels(self, draft: Draft) -> dict[str, np.ndarray]:
        """See `LearningTask`."""
        return {"places": places_of(draft)}

    def objective(self, model: SentenceModel, layout: Layout) -> Objective:
        """See `LearningTask`."""
        return ranking_objective(model, dims=self.dims, max_segments=layout.segments)

    def metrics(self, model: SentenceModel, examples: Examples, losses: dict[str, float]) -> dict[str, float]:
        """See `metrics.ranking_metrics`."""
        queries, passages = (
            self._vectors(model, [record[column] for record in examples.records]) for column in self.columns[:2]
        )
        return ranking_metrics(queries, passages)


class CompareTexts(_Sentences):
    """Pairs of texts whose cosine is to be a given number.

    Columns: text, pair, and score, a number, divided by `scale`.

    Args:
        tokenizer, max_length, spec, columns, dims: see above.
        scale: the score of texts that mean the same.
    """

    best = ("spearman", True)

    def __init__(self, *args: Any, scale: float = 1.0, **options: Any):
        super().__init__(*args, **options)
        self.scale = scale

    def examples(self, rows: Rows) -> tuple[Examples, Rows]:
        """See `LearningTask`."""
        rows = check_texts(rows, *self.columns)
        scores = [_score(record["score"], self.scale) for record in rows.records]
        rows = rows.refuse({index: score for index, score in enumerate(scores) if isinstance(score, str)})
        labels = np.array([score for score in scores if not isinstance(score, str)], np.float32)
        return self._embedded(rows, labels), rows

    def labels(self, draft: Draft) -> dict[str, np.ndarray]:
        """See `LearningTask`."""
        return {"places": places_of(draft), "labels": of_examples(draft, draft.examples.labels[draft.chosen])}

    def objective(self, model: SentenceModel, layout: Layout) -> Objective:
        """See `LearningTask`."""
        return cosine_objective(model, dims=self.dims, max_segments=layout.segments)

    def metrics(self, model: SentenceModel, examples: Examples, losses: dict[str, float]) -> dict[str, float]:
        """See `metrics.similarity_metrics`."""
        first, second = (
            self._vectors(model, [record[column] for record in examples.records]) for column in self.columns
        )
        return similarity_metrics((first * second).sum(-1), examples.labels)


def _score(value: Any, scale: float) -> float | str:
    try:
        score = float(value) / scale
    except (TypeError, ValueError, OverflowError):  # the last one of an int above all floats
        score = np.nan
    return score if -1 <= score <= 1 else f"its score is {value!r:.40}, expected a number from {-scale:g} to {scale:g}"
