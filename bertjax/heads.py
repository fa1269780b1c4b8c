"""BERT with the heads it is pre-trained and fine-tuned with: the forward pass, up to the logits and the loss.

A class for each task, with transformers' name and results. Dtypes are as in `BertModel`; logits and losses are float32.
"""

import dataclasses
from typing import Any

import jax

from bertjax.errors import InputError
from bertjax.inputs import check_labels, check_span_ends, check_targets, flatten_choices, is_integer
from bertjax.losses import binary_cross_entropy, cross_entropy, mean_squared_error, problem_type, span_loss
from bertjax.model import BertOutput
from bertjax.task_model import (
    HEADS,
    BertWithHeads,
    LogitsOutput,
    PreTrainingOutput,
    QuestionAnsweringOutput,
    Shape,
    TaskModel,
)

__all__ = [
    "HEADS",
    "BertForMaskedLM",
    "BertForMultipleChoice",
    "BertForNextSentencePrediction",
    "BertForPreTraining",
    "BertForQuestionAnswering",
    "BertForSequenceClassification",
    "BertForTokenClassification",
    "BertWithHeads",
    "LogitsOutput",
    "PreTrainingOutput",
    "QuestionAnsweringOutput",
]


class BertForPreTraining(TaskModel):
    """Masked-LM and next-sentence heads; returns a `PreTrainingOutput`."""

    heads = ("predictions", "seq_relationship")
    pooled = True
    text_labels = "next_sentence_label"

    def __call__(
        self,
        *inputs: Any,
        labels: Any = None,
        next_sentence_label: Any = None,
        max_predictions: int | None = None,
        **options: Any,
    ) -> PreTrainingOutput:
        """Computes the logits of a batch and, with labels, the loss.

        Args:
            *inputs: as in `BertModel`.
            labels: as in `BertForMaskedLM`.
            next_sentence_label: as `labels` in `BertForNextSentencePrediction`.
            max_predictions: as in `BertForMaskedLM`.
            **options: as in `BertModel`.

        Returns:
            A `PreTrainingOutput`. Its loss is the sum of the two heads', or of the one that has labels;
            transformers has none then.

        Raises:
            InputError: an input is not usable.
        """
        targets = {"labels": labels, "next_sentence_label": next_sentence_label}
        return self._compute(targets, max_predictions, *inputs, **options)

    def _check_targets(self, targets: dict[str, Any], tokens: Shape, texts: Shape) -> dict[str, jax.Array]:
        expected = {"labels": (tokens, self.config.vocab_size), "next_sentence_label": (texts, 2)}
        return {name: check_labels(name, value, *expected[name]) for name, value in targets.items()}

    def _read(
        self, encoded: BertOutput, targets: dict[str, jax.Array], dropout_key: jax.Array | None
    ) -> PreTrainingOutput:
        prediction = self._predict(encoded.last_hidden_state)
        relationship = self.seq_relationship(encoded.pooler_output)
        logits = {"labels": prediction, "next_sentence_label": relationship}
        loss = sum(cross_entropy(logits[name], labels) for name, labels in targets.items()) if targets else None
        return PreTrainingOutput(loss=loss, prediction_logits=prediction, seq_relationship_logits=relationship)


class BertForMaskedLM(TaskModel):
    """Masked-LM head; returns a `LogitsOutput` with logits [batch, length, vocab]."""

    heads = ("predictions",)

    def __call__(
        self, *inputs: Any, labels: Any = None, max_predictions: int | None = None, **options: Any
    ) -> LogitsOutput:
        """Computes the logits of a batch and, with labels, the loss.

        Args:
            *inputs: as in `BertModel`.
            labels: int [batch, length], token ids; -100 where there is nothing to predict.
            max_predictions: with `labels`, and part of what is compiled: how many positions of the batch have a label
                at most. Then only these are compared with every word, and logits are [max_predictions, vocab]: those
                of the labelled positions, row by row, then padding. Inside a caller's `jit`, the loss of a batch that
                has more is NaN.
            **options: as in `BertModel`.

        Raises:
            InputError: an input is not usable, or there are more labels than `max_predictions`.
        """
        return self._compute({"labels": labels}, max_predictions, *inputs, **options)

    def _check_targets(self, targets: dict[str, Any], tokens: Shape, texts: Shape) -> dict[str, jax.Array]:
        return {"labels": check_labels("labels", targets["labels"], tokens, self.config.vocab_size)}

    def _read(self, encoded: BertOutput, targets: dict[str, jax.Array], dropout_key: jax.Array | None) -> LogitsOutput:
        return _classified(self._predict(encoded.last_hidden_state), targets)


class BertForNextSentencePrediction(TaskModel):
    """Next-sentence head; returns a `LogitsOutput` with logits [batch, 2], class 0 for a text that does follow.

    With `max_segments` they are [batch, max_segments, 2]. Labels are int [batch] or [batch, max_segments], 0, 1 or, for
    what is not scored, as a segment that a row does not have, -100.
    """

    heads = ("seq_relationship",)
    pooled = True
    text_labels = "labels"

    def _check_targets(self, targets: dict[str, Any], tokens: Shape, texts: Shape) -> dict[str, jax.Array]:
        return {"labels": check_labels("labels", targets["labels"], texts, 2)}

    def _read(self, encoded: BertOutput, targets: dict[str, jax.Array], dropout_key: jax.Array | None) -> LogitsOutput:
        return _classified(self.seq_relationship(encoded.pooler_output), targets)


class BertForSequenceClassification(TaskModel):
    """A classifier of whole rows; returns a `LogitsOutput` with logits [batch, `config.num_labels`].

    With `max_segments` they are [batch, max_segments, `config.num_labels`]. What the labels are depends on the
    problem, which `losses.problem_type` tells:

    - single_label_classification: int [batch] or [batch, max_segments], -100 for what is not scored.
    - multi_label_classification: [batch, `config.num_labels`], from 0 to 1.
    - regression: finite numbers [batch, `config.num_labels`], or [batch] if there is one label.

    With `max_segments` the last two have an axis for segments after the batch, and NaN for what is not scored.
    """

    heads = ("classifier",)
    pooled = True
    text_labels = "labels"

    def _check_targets(self, targets: dict[str, Any], tokens: Shape, texts: Shape) -> dict[str, jax.Array]:
        labels, width = targets["labels"], self.classifier.out_features
        # The problem is what the labels are called from here on: models that differ in it alone are equal to `jit`.
        problem = problem_type(self.config, width, is_integer(labels))
        if problem == "single_label_classification":
            return {problem: check_labels("labels", labels, texts, width)}
        multi_label = problem == "multi_label_classification"
        shape = texts if width == 1 and not multi_label else (*texts, width)
        return {problem: check_targets("labels", labels, shape, probabilities=multi_label, segments=len(texts) > 1)}

    def _read(self, encoded: BertOutput, targets: dict[str, jax.Array], dropout_key: jax.Array | None) -> LogitsOutput:
        logits = self._classify(encoded.pooler_output, dropout_key)
        if not targets:
            return LogitsOutput(logits=logits)
        [(problem, labels)] = targets.items()
        if problem == "single_label_classification":
            return LogitsOutput(logits=logits, loss=cross_entropy(logits, labels))
        loss = mean_squared_error if problem == "regression" else binary_cross_entropy
        return LogitsOutput(logits=logits, loss=loss(logits.reshape(labels.shape), labels))


class BertForMultipleChoice(TaskModel):
    """A score for each of several texts; returns a `LogitsOutput` with logits [batch, choices].

    Every input is [batch, choices, length]. Errors count rows over the choices of all examples.
    """

    heads = ("classifier",)
    pooled = True
    labels = 1

    def __call__(
        self,
        input_ids: Any = None,
        attention_mask: Any = None,
        token_type_ids: Any = None,
        position_ids: Any = None,
        segment_ids: Any = None,
        *,
        inputs_embeds: Any = None,
        labels: Any = None,
        max_segments: None = None,
        **options: Any,
    ) -> LogitsOutput:
        """Computes the logits of a batch, as in the other models but for the inputs' extra axis.

        `inputs_embeds` are [batch, choices, length, hidden]. `labels` are int [batch], the right choice or, for what is
        not scored, -100. There is no `max_segments`: every choice is a row of its own. `score` takes packed rows.
        """
        if max_segments is not None:
            raise InputError("max_segments is not for multiple choice, where every choice is a row; see `score`")
        (batch, choices), rows = flatten_choices(
            input_ids,
            inputs_embeds,
            attention_mask=attention_mask,
            token_type_ids=token_type_ids,
            position_ids=position_ids,
            segment_ids=segment_ids,
        )
        labels = check_labels("labels", labels, (batch,), choices)
        output = self.score(**rows, **options)
        logits = output.logits.reshape(batch, choices)
        loss = None if labels is None else _compiled_cross_entropy(logits, labels)
        return dataclasses.replace(output, logits=logits, loss=loss)

    def score(self, *inputs: Any, **options: Any) -> LogitsOutput:
        """Scores choices by themselves, whatever they are to be compared with.

        Inputs, options and errors are those of `BertModel`: every choice is a row or, with `max_segments`, a segment of
        one. Logits are [batch, 1] or [batch, max_segments, 1].
        """
        return self._compute({}, None, *inputs, **options)

    def _read(self, encoded: BertOutput, targets: dict[str, jax.Array], dropout_key: jax.Array | None) -> LogitsOutput:
        return LogitsOutput(logits=self._classify(encoded.pooler_output, dropout_key))


_compiled_cross_entropy = jax.jit(cross_entropy)


class BertForTokenClassification(TaskModel):
    """A classifier of tokens; returns a `LogitsOutput` with logits [batch, length, `config.num_labels`].

    Labels are int [batch, length], -100 for what is not scored.
    """

    heads = ("classifier",)

    def _check_targets(self, targets: dict[str, Any], tokens: Shape, texts: Shape) -> dict[str, jax.Array]:
        return {"labels": check_labels("labels", targets["labels"], tokens, self.classifier.out_features)}

    def _read(self, encoded: BertOutput, targets: dict[str, jax.Array], dropout_key: jax.Array | None) -> LogitsOutput:
        return _classified(self._classify(encoded.last_hidden_state, dropout_key), targets)


class BertForQuestionAnswering(TaskModel):
    """Finds a span, the answer, in a row; returns a `QuestionAnsweringOutput`."""

    heads = ("qa_outputs",)

    def __call__(
        self, *inputs: Any, start_positions: Any = None, end_positions: Any = None, **options: Any
    ) -> QuestionAnsweringOutput:
        """Computes the logits of a batch and, with positions, the loss.

        Args:
            *inputs: as in `BertModel`.
            start_positions: int [batch], the index of the answer's first token. As in transformers, one below 0 counts
                as 0, and one that is not in the row is not scored.
            end_positions: int [batch], that of its last token, likewise; both are given, or neither.
            **options: as in `BertModel`.

        Raises:
            InputError: an input is not usable.
        """
        targets = {"start_positions": start_positions, "end_positions": end_positions}
        return self._compute(targets, None, *inputs, **options)

    def _check_targets(self, targets: dict[str, Any], tokens: Shape, texts: Shape) -> dict[str, jax.Array]:
        if len(targets) < 2:
            raise InputError("start_positions and end_positions go together: pass both or neither")
        return {name: check_span_ends(name, value, texts) for name, value in targets.items()}

    def _read(
        self, encoded: BertOutput, targets: dict[str, jax.Array], dropout_key: jax.Array | None
    ) -> QuestionAnsweringOutput:
        logits = self.qa_outputs(encoded.last_hidden_state)
        start, end = logits[..., 0], logits[..., 1]
        loss = span_loss(start, end, **targets) if targets else None
        return QuestionAnsweringOutput(loss=loss, start_logits=start, end_logits=end)


def _classified(logits: jax.Array, targets: dict[str, jax.Array]) -> LogitsOutput:
    """The output of a head that puts things into classes."""
    return LogitsOutput(logits=logits, loss=cross_entropy(logits, targets["labels"]) if targets else None)
