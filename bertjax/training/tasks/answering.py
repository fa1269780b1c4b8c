"""Questions, contexts, and the spans of these that are answers."""

from typing import Any

import jax.numpy as jnp
import numpy as np

from bertjax.errors import ConfigError, InputError
from bertjax.heads import BertForQuestionAnswering
from bertjax.losses import span_loss
from bertjax.model import functional
from bertjax.tasks.question_answering import QuestionAnswering
from bertjax.tokenizer import Tokenizer
from bertjax.tokens import Alignment
from bertjax.training.metrics import answer_metrics
from bertjax.training.objective import Batch, Objective, Terms, model_objective
from bertjax.training.optimizer import Params
from bertjax.training.rows import Rows
from bertjax.training.tasks.base import Draft, Examples, Layout, LearningTask, check_texts

_BLOCK = 256


class AnswerQuestions(LearningTask):
    """Extractive question answering, on rows as SQuAD's are in Hugging Face datasets.

    Columns: question, context, and answers: {"text": [...], "answer_start": [...]}, of which the first is learnt; with
    none, the answer is [CLS], as in SQuAD 2.0 (Rajpurkar et al. 2018, arXiv:1806.03822). A context that is too long
    becomes several examples, windows that overlap; one that does not hold the whole answer is learnt as without one
    (Devlin et al. 2018, arXiv:1810.04805, section 4.3).

    Args:
        tokenizer: the tokenizer.
        max_length: the longest window in tokens, with the question and the special tokens.
        doc_stride: how many tokens a window shares with the one before.
    """

    model_class = BertForQuestionAnswering
    alone = True
    best = ("f1", True)

    def __init__(self, tokenizer: Tokenizer, max_length: int, *, doc_stride: int):
        super().__init__(tokenizer, max_length)
        self.doc_stride = doc_stride
        if max_length - tokenizer.num_special_tokens(pair=True) <= doc_stride:
            raise ConfigError(f"doc_stride is {doc_stride}, which is too much for windows of max_length={max_length}")

    def examples(self, rows: Rows) -> tuple[Examples, Rows]:
        """See `LearningTask`."""
        rows = check_texts(rows, "question", "context")
        found = [_span(record) for record in rows.records]
        rows = rows.refuse({index: span for index, span in enumerate(found) if isinstance(span, str)})
        rows = rows.refuse(self._too_long(rows))
        spans = [_span(record) for record in rows.records]
        ids: list[np.ndarray] = []
        types: list[np.ndarray] = []
        labels = []
        for first in range(0, len(rows), _BLOCK):
            block = rows.records[first : first + _BLOCK]
            tokens, owners = self.tokenizer.windows(
                [record["question"] for record in block],
                [record["context"] for record in block],
                max_length=self.max_length,
                stride=self.doc_stride,
                first_position=first,
            )
            ids += tokens.input_ids
            types += tokens.token_type_ids
            labels += [_ends(each, spans[first + owner]) for each, owner in zip(tokens.alignments, owners, strict=True)]
        texts = np.arange(len(ids), dtype=np.int64)[:, None]
        return Examples(ids, types, texts, np.array(labels, np.int32).reshape(-1, 2), 0, rows.records), rows

    def _too_long(self, rows: Rows) -> dict[int, str]:
        """The rows whose question leaves too little of a window for their context."""
        special = self.tokenizer.num_special_tokens(pair=False), self.tokenizer.num_special_tokens(pair=True)
        least = self.max_length - special[1] - self.doc_stride + special[0]
        questions = self._tokenize([record["question"] for record in rows.records]).input_ids
        found = {}
        for index in (index for index, ids in enumerate(questions) if len(ids) >= least):
            texts = [rows.records[index]["question"]], [rows.records[index]["context"]]
            try:
                self.tokenizer.windows(*texts, max_length=self.max_length, stride=self.doc_stride)
            except InputError:
                found[index] = f"its question is too long for windows of {self.max_length} tokens over its context"
        return found

    def labels(self, draft: Draft) -> dict[str, np.ndarray]:
        """See `LearningTask`."""
        packed = draft.packed
        rows, length = packed.input_ids.shape
        # A position past the row's end is not scored.
        ends = np.full((rows, 2), length, np.int32)
        ends[packed.rows] = draft.examples.labels[draft.chosen][packed.items]
        return {"start_positions": ends[:, 0], "end_positions": ends[:, 1]}

    def objective(self, model: BertForQuestionAnswering, layout: Layout) -> Objective:
        """See `LearningTask`; padding is no place for an answer, so row lengths do not matter."""
        apply, _ = functional(model)

        def losses(params: Params, batch: Batch, key: Any) -> Terms:
            ends = {name: array for name, array in batch.items() if name.endswith("_positions")}
            output = apply(params, **{name: batch[name] for name in batch if name not in ends}, dropout_key=key)
            logits = (output.start_logits, output.end_logits)
            # A finite number that no logit comes near: rows without a text have nothing else.
            start, end = (jnp.where(batch["segment_ids"] > 0, each, -1e9) for each in logits)
            return (span_loss(start, end, **ends),)

        return Objective(losses, model_objective(model).counts)

    def metrics(
        self, model: BertForQuestionAnswering, examples: Examples, losses: dict[str, float]
    ) -> dict[str, float]:
        """See `metrics.answer_metrics`."""
        expected = [_texts(record) or [""] for record in examples.records]
        answer = QuestionAnswering(model, self.tokenizer)
        found = answer(
            [(record["question"], record["context"]) for record in examples.records],
            max_seq_len=self.max_length,
            doc_stride=self.doc_stride,
            handle_impossible_answer=[""] in expected,
        )
        return answer_metrics([each.answer for each in found], expected)


def _texts(record: dict[str, Any]) -> list[str]:
    return list(record["answers"]["text"])


def _span(record: dict[str, Any]) -> tuple[int, int] | str | None:
    """The characters of a row's first answer, None if it has none, or why the row is bad."""
    answers = record["answers"]
    try:
        texts, starts = answers["text"], answers["answer_start"]
        found = list(zip(texts, map(int, starts), strict=True))
    except (TypeError, KeyError, ValueError, OverflowError):  # the last one of an infinity
        return f'its answers are {answers!r:.80}, expected {{"text": [...], "answer_start": [...]}}, of equal lengths'
    if not record["question"].strip() or not record["context"].strip():
        return "its question or its context is empty"
    for text, start in found:
        there = record["context"][start : start + len(text)] if isinstance(text, str) and start >= 0 else None
        if not text or there != text:
            return f"its answer is {text!r:.60} at character {start}, where the context has {there!r:.60}"
    if not found:
        return None
    text, start = found[0]
    # A space has no token, and an answer that begins with one would seem to be cut off.
    start += len(text) - len(text.lstrip())
    return start, start + len(text.strip())


def _ends(alignment: Alignment, span: tuple[int, int] | None) -> tuple[int, int]:
    """The first and the last token of an answer in a window, or twice 0, the place of [CLS], if it is not all there."""
    own = np.flatnonzero(alignment.sequence_ids == 1)
    if span is None or not own.size:
        return 0, 0
    starts, ends = alignment.offsets[own].T
    inside = np.flatnonzero((ends > span[0]) & (starts < span[1]))
    whole = inside.size and starts[inside[0]] <= span[0] and ends[inside[-1]] >= span[1]
    return (int(own[inside[0]]), int(own[inside[-1]])) if whole else (0, 0)
