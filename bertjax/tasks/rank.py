"""Cross-encoders: scores for pairs of texts that are read together, to rank passages for a query."""

import dataclasses
import reprlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from bertjax.checks import check_choice, check_count
from bertjax.config import BertConfig
from bertjax.cross_encoder_files import cross_encoder_files, read_cross_encoder_spec
from bertjax.engine import Window
from bertjax.errors import ConfigError, InputError
from bertjax.heads import BertForSequenceClassification
from bertjax.tasks.base import Plan, Task, TaskFolder, TextOrPair, sigmoid, softmax
from bertjax.text_inputs import check_iterable, check_text
from bertjax.tokenizer import Tokenizer

_ACTIVATIONS = {"identity": lambda logits: logits, "sigmoid": sigmoid}
# How sentence-transformers writes them down: the paths of PyTorch's classes.
_TORCH_ACTIVATIONS = {
    "torch.nn.modules.linear.Identity": "identity",
    "torch.nn.Identity": "identity",
    "torch.nn.modules.activation.Sigmoid": "sigmoid",
    "torch.nn.Sigmoid": "sigmoid",
}


@dataclasses.dataclass(frozen=True)
class RankedDocument:
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
        activation_fn: what makes scores of logits, "identity" or "sigmoid" (or PyTorch's name of its class). Default:
            what the configuration says or, if it says nothing, "sigmoid" for one label and "identity" for several.
        **options: see `Task`.

    Raises:
        ConfigError: the activation is none of these; or see `Task`.
    """

    kind = BertForSequenceClassification
    single = (str, tuple, Mapping)

    def __init__(self, model: Any, tokenizer: Tokenizer, *, activation_fn: str | None = None, **options: Any):
        super().__init__(model, tokenizer, **options)
        if activation_fn is None:
            activation_fn = _configured_activation(model.config)
        if activation_fn is None:
            activation_fn = "sigmoid" if model.config.num_labels == 1 else "identity"
        name = _TORCH_ACTIVATIONS.get(activation_fn, activation_fn) if isinstance(activation_fn, str) else None
        if name not in _ACTIVATIONS:
            raise ConfigError(
                f"activation_fn is {reprlib.repr(activation_fn)}, which is not supported; pass 'identity' for the "
                "logits themselves, or 'sigmoid'"
            )
        self.activation = name

    @classmethod
    def read_folder(cls, folder: Path) -> TaskFolder:
        """Reads how sentence-transformers saved a cross-encoder; see `cross_encoder_files.read_cross_encoder_spec`."""
        spec = read_cross_encoder_spec(folder)
        options = {"max_length": spec.max_seq_length, "activation_fn": spec.activation}
        return TaskFolder(spec.transformer, do_lower_case=spec.do_lower_case, options=options)

    def folder_files(self) -> dict[str, Any]:
        """See `Task.folder_files`."""
        return cross_encoder_files(next(name for name, known in _TORCH_ACTIVATIONS.items() if known == self.activation))

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
            InputError: an input is no pair of texts, with its position; or `apply_softmax` is no bool, or is True for
                a model of a single label.
        """
        return self._answer(inputs, show_progress_bar, apply_softmax=apply_softmax)

    def rank(
        self,
        query: str,
        documents: Iterable[str],
        *,
        top_k: int | None = None,
        return_documents: bool = False,
        show_progress_bar: bool | None = None,
    ) -> list[RankedDocument]:
        """Ranks passages for a query.

        Args:
            query: what is asked.
            documents: the texts to rank.
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
        top_k = None if top_k is None else check_count("top_k", top_k)
        check_iterable("documents", documents)
        documents = list(documents)
        check_text("query", query)
        for position, text in enumerate(documents):
            check_text(f"documents[{position}]", text)
        scores = self([(query, text) for text in documents], show_progress_bar=show_progress_bar)
        order = sorted(range(len(documents)), key=lambda index: -scores[index])[:top_k]
        return [RankedDocument(index, scores[index], documents[index] if return_documents else None) for index in order]

    def plan(self, *, apply_softmax: bool = False) -> Plan:
        """See `Task.plan`."""
        check_choice("apply_softmax", apply_softmax, (True, False))
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
