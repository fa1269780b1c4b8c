"""Texts to labels: sentiment, topic, acceptability, inference between two texts."""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any, Literal

import numpy as np

from bertjax.checks import check_choice, check_count
from bertjax.config import BertConfig
from bertjax.engine import Window
from bertjax.heads import BertForSequenceClassification
from bertjax.tasks.base import Plan, Task, TextOrPair, sigmoid, softmax

Function = Literal["softmax", "sigmoid", "none"]

_FUNCTIONS = {"softmax": softmax, "sigmoid": sigmoid, "none": lambda logits: logits}


@dataclasses.dataclass(frozen=True)
class Label:
    """A label and its score.

    Attributes:
        label: its name, as the configuration has it (`BertConfig.id2label`).
        score: a probability or, where no function is applied, a logit.
    """

    label: str
    score: float


class TextClassification(Task):
    """Labels texts, or pairs of texts, with a `BertForSequenceClassification`.

    Labels and scores are those of transformers' text-classification pipeline, with two differences. What is too long is
    truncated, which the pipeline does only where it is asked to. And an empty second text makes a pair, where the
    pipeline reads the first text alone; in training, on batches, it makes a pair with either library.
    """

    kind = BertForSequenceClassification
    single = (str, tuple, Mapping)

    def __call__(
        self,
        inputs: TextOrPair | Iterable[TextOrPair],
        *,
        top_k: int | None = 1,
        function_to_apply: Function | None = None,
        show_progress_bar: bool | None = None,
    ) -> Label | list[Label] | list[Label | list[Label]]:
        """Labels a text or several.

        Args:
            inputs: a text, a pair of texts (a tuple, or a mapping with text and text_pair), or an iterable of either.
            top_k: how many labels a text gets; None for all of them.
            function_to_apply: what makes scores of logits. Default: "none" for a model whose problem_type is
                regression; "sigmoid" for multi_label_classification and for a model with one label; else "softmax".
            show_progress_bar: default: on a terminal, when it takes more than two seconds.

        Returns:
            For one input, the `Label` with the highest score if `top_k` is 1, and otherwise a list of them, highest
            first; of equal scores the first label comes first. For several inputs, a list of that. (The pipeline gives
            a list for a `top_k` of 1, too, where it is not left to the default.)

        Raises:
            InputError: an input is no text, with its position; or an option is not usable.
            ConfigError: the configuration's labels or its problem_type are not usable.
        """
        return self._answer(inputs, show_progress_bar, top_k=top_k, function_to_apply=function_to_apply)

    def plan(self, *, top_k: int | None = 1, function_to_apply: Function | None = None) -> Plan:
        """See `Task.plan`."""
        top_k = None if top_k is None else check_count("top_k", top_k)
        check_choice("function_to_apply", function_to_apply, [None, *_FUNCTIONS])
        config = self.model.config
        apply = _FUNCTIONS[function_to_apply or _default_function(config)]
        names = list(config.id2label.values())

        def read(window: Window) -> list[Any]:
            answers = _ranked(apply(window.per_row()), names, top_k)
            return [labels[0] for labels in answers] if top_k == 1 else answers

        return Plan(self._encode_texts, self._run_pooled, read)


def _default_function(config: BertConfig) -> Function:
    """What makes scores of the logits of a model that was trained so."""
    problem_type = config.problem_type
    if problem_type == "regression":
        return "none"
    independent = problem_type == "multi_label_classification" or config.num_labels == 1
    return "sigmoid" if independent else "softmax"


def _ranked(scores: np.ndarray, names: list[str], top_k: int | None) -> list[list[Label]]:
    """The labels of each row of scores [rows, labels], highest first."""
    order = np.argsort(-scores, axis=-1, kind="stable")[:, :top_k]
    return [[Label(names[label], float(row[label])) for label in best] for row, best in zip(scores, order, strict=True)]
