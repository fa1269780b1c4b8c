"""Texts to labels that the model never saw, through natural-language inference (Yin et al. 2019, arXiv:1909.00161)."""

import dataclasses
import itertools
import reprlib
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from bertjax.checks import as_integer, check_choice
from bertjax.config import BertConfig
from bertjax.engine import Encoded, Window
from bertjax.errors import ConfigError, InputError
from bertjax.heads import BertForSequenceClassification
from bertjax.tasks.base import Plan, Task, check_reads_pairs, softmax
from bertjax.text_inputs import check_text
from bertjax.tokenizer import Tokenizer
from bertjax.tokens import Tokens

# About how many rows of tokens are made at a time, one for each text and label.
_CHUNK_ROWS = 256


@dataclasses.dataclass(frozen=True)
class ZeroShotLabels:
    """The candidate labels of a text.

    Attributes:
        sequence: the text.
        labels: the labels, most likely first; of equal ones the first that was asked for comes first.
        scores: their probabilities, in the same order.
    """

    sequence: str
    labels: list[str]
    scores: list[float]


class ZeroShotClassification(Task):
    """Chooses among labels of the caller's, with a `BertForSequenceClassification` trained on inference (MNLI, ...).

    Every label is made a hypothesis, and the model judges whether the text entails it. Scores are those of the
    zero-shot-classification pipeline of transformers.

    Args:
        model: the model, of two labels or more.
        tokenizer: the tokenizer that belongs to it.
        entailment_id: which of the model's labels says that a text entails a hypothesis; default: the one whose name
            begins with "entail". Contradiction is taken to be label 0 or, where that is entailment, the last.
        **options: see `Task`.

    Raises:
        ConfigError: the labels do not tell which one is entailment, or there is only one; or see `Task`.
    """

    kind = BertForSequenceClassification

    def __init__(self, model: Any, tokenizer: Tokenizer, *, entailment_id: int | None = None, **options: Any):
        super().__init__(model, tokenizer, **options)
        self._entailment = _entailment(model.config, entailment_id)

    def __call__(
        self,
        inputs: str | Iterable[str],
        *,
        candidate_labels: Sequence[str],
        hypothesis_template: str = "This example is {}.",
        multi_label: bool = False,
        show_progress_bar: bool | None = None,
    ) -> ZeroShotLabels | list[ZeroShotLabels]:
        """Labels a text or several.

        Args:
            inputs: a text, or an iterable of texts. What is too long for the model loses its end, never the hypothesis.
            candidate_labels: the labels to choose among.
            hypothesis_template: what is claimed of a text, with {} where the label goes (`str.format`).
            multi_label: whether several labels may apply: each one's score is then the softmax of its logits of
                entailment and contradiction. Otherwise the scores are the softmax of all labels' logits of entailment,
                and add up to 1. A single label is always scored the first way.
            show_progress_bar: default: on a terminal, when it takes more than two seconds.

        Returns:
            For a text, its `ZeroShotLabels`; for several texts, a list of them.

        Raises:
            InputError: an input is no text, with its position; there is no label, or the template has no place for it;
                a hypothesis leaves no room for a text; or `multi_label` is no bool.
        """
        return self._answer(
            inputs,
            show_progress_bar,
            candidate_labels=candidate_labels,
            hypothesis_template=hypothesis_template,
            multi_label=multi_label,
        )

    def plan(
        self,
        *,
        candidate_labels: Sequence[str],
        hypothesis_template: str = "This example is {}.",
        multi_label: bool = False,
    ) -> Plan:
        """See `Task.plan`."""
        check_choice("multi_label", multi_label, (True, False))
        labels = _check_labels(candidate_labels)
        check_text("hypothesis_template", hypothesis_template)
        hypotheses = [_hypothesis(hypothesis_template, label) for label in labels]
        self._check_room(labels, hypotheses)

        def encode(items: list[Any], position: int) -> Encoded:
            return self._encode_rows(items, hypotheses, position)

        def read(window: Window) -> list[ZeroShotLabels]:
            logits = window.per_row().reshape(len(window.encoded.items), len(labels), -1)
            scores = self._score(logits, multi_label)
            order = np.argsort(-scores, axis=-1, kind="stable")
            return [
                ZeroShotLabels(text, [labels[label] for label in best], row[best].tolist())
                for text, row, best in zip(window.encoded.items, scores, order, strict=True)
            ]

        return Plan(encode, self._run_pooled, read, chunk=max(1, _CHUNK_ROWS // len(labels)))

    def _encode_rows(self, items: list[Any], hypotheses: list[str], position: int) -> Encoded:
        """A row for each text and hypothesis, those of a text one after another."""
        self._check_texts(items, position)
        check_reads_pairs(self.model.config)
        options = {"max_length": self.max_length, "truncation": "only_first", "first_position": position}
        parts = [self.tokenizer(items, [hypothesis] * len(items), **options) for hypothesis in hypotheses]
        tokens = Tokens(
            input_ids=_interleaved([part.input_ids for part in parts]),
            token_type_ids=_interleaved([part.token_type_ids for part in parts]),
            truncated=np.stack([part.truncated for part in parts], axis=1).ravel(),
            pad_token_id=parts[0].pad_token_id,
        )
        return Encoded(items, tokens, np.repeat(np.arange(len(items)), len(hypotheses)))

    def _score(self, logits: np.ndarray, multi_label: bool) -> np.ndarray:
        """The probabilities [texts, labels] of logits [texts, labels, classes]."""
        if multi_label or logits.shape[1] == 1:
            contradiction = -1 if self._entailment == 0 else 0
            return softmax(logits[..., [contradiction, self._entailment]])[..., 1]
        return softmax(logits[..., self._entailment])

    def _check_room(self, labels: list[str], hypotheses: list[str]) -> None:
        """Refuses a hypothesis beside which no token of a text would fit: only texts are cut."""
        encoded = self.tokenizer(hypotheses).input_ids
        room = self.max_length - self.tokenizer.num_special_tokens(pair=True)
        for label, ids in zip(labels, encoded, strict=True):
            length = len(ids) - self.tokenizer.num_special_tokens(pair=False)
            if length >= room:
                raise InputError(
                    f"the hypothesis for {reprlib.repr(label)} has {length} tokens, and text and hypothesis together "
                    f"may have {room}; use a shorter label or hypothesis_template"
                )


def _interleaved(rows_by_hypothesis: list[list[np.ndarray]]) -> list[np.ndarray]:
    return list(itertools.chain.from_iterable(zip(*rows_by_hypothesis, strict=True)))


def _check_labels(labels: Any) -> list[str]:
    """The candidate labels as a list."""
    if isinstance(labels, str) or not isinstance(labels, Iterable):
        raise InputError(f"candidate_labels is {reprlib.repr(labels)}, expected a list of labels")
    labels = list(labels)
    if not labels:
        raise InputError("candidate_labels is empty; there is nothing to choose")
    for position, label in enumerate(labels):
        check_text(f"candidate_labels[{position}]", label)
    return labels


def _hypothesis(template: str, label: str) -> str:
    """What is claimed of a text for a label."""
    try:
        filled, other = template.format(label), template.format(f"{label}.")
    except (AttributeError, LookupError, TypeError, ValueError, MemoryError, OverflowError) as error:
        raise InputError(f"hypothesis_template {reprlib.repr(template)} can't be filled in: {error!r}") from None
    if filled == other:
        raise InputError(f"hypothesis_template {reprlib.repr(template)} has no place for the label; write {{}} there")
    return filled


def _entailment(config: BertConfig, given: Any) -> int:
    """The class of entailment: the one given, or found by its name."""
    count = config.num_labels
    if count < 2:
        raise ConfigError("zero-shot classification needs a model of two labels or more (entailment and others)")
    if given is not None:
        number = as_integer(given)
        if number is None or not 0 <= number < count:
            raise ConfigError(f"entailment_id is {given!r}, expected one of the model's labels, 0 to {count - 1}")
        return number
    found = [label for name, label in config.label2id.items() if name.lower().startswith("entail")]
    if len(found) != 1:
        many = "several of the" if found else "none of the"
        raise ConfigError(
            f"{many} model's labels {reprlib.repr(list(config.id2label.values()))} begin with 'entail'; if it was "
            "trained on natural-language inference, pass entailment_id="
        )
    return found[0]
