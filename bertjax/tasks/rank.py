"""Cross-encoders: scores for pairs of texts that are read together, to rank passages for a query."""

import dataclasses
import reprlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from bertjax.config import BertConfig
from bertjax.engine import Window
from bertjax.errors import ConfigError, InputError
from bertjax.folders import find
from bertjax.heads import BertForSequenceClassification
from bertjax.module_files import PLAIN_SETTINGS, expect, read_modules, read_top, read_transformer, show
from bertjax.tasks.base import Plan, Task, TaskFolder, TextOrPair, check_count, sigmoid, softmax
from bertjax.tokenizer import Tokenizer

_ACTIVATIONS = {"identity": lambda logits: logits, "sigmoid": sigmoid}
# How sentence-transformers writes them down: the paths of PyTorch's classes.
_TORCH_ACTIVATIONS = {
    "torch.nn.modules.linear.Identity": "identity",
    "torch.nn.Identity": "identity",
    "torch.nn.modules.activation.Sigmoid": "sigmoid",
    "torch.nn.Sigmoid": "sigmoid",
}
_MODULE_TYPES = {
    "sentence_transformers.base.modules.transformer.Transformer": "transformer",
    "sentence_transformers.models.Transformer": "transformer",
}
# Settings of the transformer module, with the values that mean nothing but a sequence classifier.
_CLASSIFIER_SETTINGS = PLAIN_SETTINGS | {
    "transformer_task": (None, "sequence-classification"),
    "module_output_name": (None, "scores"),
    "modality_config": (None, {"text": {"method": "forward", "method_output_name": "logits"}}),
}


@dataclasses.dataclass(frozen=True)
class RankedPassage:
    """A passage and its score for a query.

    Attributes:
        corpus_id: its position in the list of passages.
        score: how well it answers the query; more is better.
        text: the passage, or None if it was not asked for.
    """

    corpus_id: int
    score: float
    text: str | None = None


class CrossEncoder(Task):
    """Scores pairs of texts, with a `BertForSequenceClassification`; scores are those of sentence-transformers.

    Args:
        model: the model; one that ranks has one label.
        tokenizer: the tokenizer that belongs to it.
        activation: what makes scores of logits, "identity" or "sigmoid" (or PyTorch's name of its class). Default: what
            the configuration says or, if it says nothing, "sigmoid" for one label and "identity" for several.
        **options: see `Task`.

    Raises:
        ConfigError: the activation is none of these; or see `Task`.
    """

    kind = BertForSequenceClassification

    def __init__(self, model: Any, tokenizer: Tokenizer, *, activation: str | None = None, **options: Any):
        super().__init__(model, tokenizer, **options)
        if activation is None:
            activation = _configured_activation(model.config)
        if activation is None:
            activation = "sigmoid" if model.config.num_labels == 1 else "identity"
        name = _TORCH_ACTIVATIONS.get(activation, activation) if isinstance(activation, str) else None
        if name not in _ACTIVATIONS:
            raise ConfigError(
                f"the activation is {reprlib.repr(activation)}, which is not supported; pass activation='identity' for "
                "the logits themselves, or 'sigmoid'"
            )
        self.activation = name

    @classmethod
    def read_folder(cls, folder: Path) -> TaskFolder:
        """Reads how sentence-transformers saved a cross-encoder, from version 5.4 on; see `Task.read_folder`.

        Before, it had no files of its own, and the configuration named the activation.

        Raises:
            ConfigError: the folder holds more than a sequence classifier, or something else.
        """
        if find(folder, "modules.json") is None:
            return TaskFolder(folder)
        file, top = read_top(folder, "CrossEncoder")
        modules = read_modules(folder, _MODULE_TYPES)
        paths = [path for _, path in modules]
        if paths != [""]:
            raise ConfigError(
                f"{folder / 'modules.json'}: lists {len(paths)} module(s) in {show(paths)}; only a cross-encoder of "
                "one Transformer, whose files stand beside this one, is supported"
            )
        prompt = expect(file, top, "default_prompt_name", str, None)
        if prompt is not None:
            raise ConfigError(f"{file}: default_prompt_name is {show(prompt)}; prompts of pairs are not supported")
        settings, _ = read_transformer(folder, "", _CLASSIFIER_SETTINGS)
        options = {"max_length": settings["max_seq_length"], "activation": top.get("activation_fn")}
        return TaskFolder(folder, do_lower_case=settings["do_lower_case"], options=options)

    def __call__(
        self,
        inputs: TextOrPair | Iterable[TextOrPair],
        *,
        apply_softmax: bool = False,
        show_progress_bar: bool | None = None,
    ) -> float | list[float] | list[list[float]]:
        """Scores a pair of texts or several.

        Args:
            inputs: a pair of texts (a tuple, or a mapping with text and text_pair), or an iterable of them.
            apply_softmax: for a model of several labels: make their scores add up to 1.
            show_progress_bar: default: on a terminal, when it takes more than two seconds.

        Returns:
            For a pair, its score; for a model of several labels, a list of their scores. For several pairs, a list of
            that.

        Raises:
            InputError: an input is no pair of texts, with its position; or `apply_softmax` for a single label.
        """
        return self._answer(inputs, show_progress_bar, apply_softmax=apply_softmax)

    def rank(
        self,
        query: str,
        passages: Iterable[str],
        *,
        top_k: int | None = None,
        return_documents: bool = False,
        show_progress_bar: bool | None = None,
    ) -> list[RankedPassage]:
        """Ranks passages for a query.

        Args:
            query: what is asked.
            passages: the texts to rank.
            top_k: how many to return; None for all of them.
            return_documents: whether the answers have the passages' texts.
            show_progress_bar: default: on a terminal, when it takes more than two seconds.

        Returns:
            The passages, best first; those of one score in the order in which they were given.

        Raises:
            InputError: the query or a passage is no text, or `top_k` is not a positive integer.
            ConfigError: the model has several labels, so that a passage has no one score.
        """
        if self.model.config.num_labels != 1:
            raise ConfigError(f"to rank takes a model of one label, and this one has {self.model.config.num_labels}")
        if top_k is not None:
            check_count("top_k", top_k)
        if isinstance(passages, str | bytes | Mapping) or not isinstance(passages, Iterable):
            raise InputError(f"passages is a {type(passages).__name__}, expected a list or another iterable of texts")
        passages = list(passages)
        scores = self([(query, passage) for passage in passages], show_progress_bar=show_progress_bar)
        order = sorted(range(len(passages)), key=lambda index: -scores[index])[:top_k]
        return [RankedPassage(index, scores[index], passages[index] if return_documents else None) for index in order]

    def _plan(self, *, apply_softmax: bool = False) -> Plan:
        single = self.model.config.num_labels == 1
        if apply_softmax and single:
            raise InputError("apply_softmax is for models of several labels, and this one has a single score")
        activate = _ACTIVATIONS[self.activation]

        def read(window: Window) -> list[Any]:
            scores = activate(window.per_row())
            scores = softmax(scores) if apply_softmax else scores
            return (scores[:, 0] if single else scores).tolist()

        return Plan(self._encode_pairs, self._run_pooled, read)


def _configured_activation(config: BertConfig) -> Any:
    """What config.json says, where sentence-transformers wrote it down before version 5.4, and before 4."""
    settings = config.extra.get("sentence_transformers")
    if settings is not None and not isinstance(settings, Mapping):
        raise ConfigError(f"sentence_transformers is {reprlib.repr(settings)}, expected an object")
    if settings is not None and "activation_fn" in settings:
        return settings["activation_fn"]
    return config.extra.get("sbert_ce_default_activation_function")
