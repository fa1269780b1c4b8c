"""What a checkpoint is, before any of its weights is read: its configuration, its tensors' names, its class."""

import dataclasses
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from bertjax.config import BertConfig
from bertjax.convert import bert, msgpack, names, rules, sources
from bertjax.errors import ConfigError
from bertjax.folders import find
from bertjax.heads import (
    BertForMaskedLM,
    BertForMultipleChoice,
    BertForNextSentencePrediction,
    BertForPreTraining,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertWithHeads,
)
from bertjax.labels import placeholders
from bertjax.model import BertModel

_CLASSES = (
    BertForPreTraining,
    BertForMaskedLM,
    BertForNextSentencePrediction,
    BertForSequenceClassification,
    BertForMultipleChoice,
    BertForTokenClassification,
    BertForQuestionAnswering,
)
_ARCHITECTURES = {kind.__name__: kind for kind in _CLASSES}
# Labels that are given names, where a configuration names none; more than any classifier on BERT has.
_MAX_LABELS = 1 << 16
# The parameter that a masked-language-model head has only where its decoder is not tied.
_DECODER = ("predictions", "decoder", "kernel")


def open_checkpoint(
    path: Path, *, prefix: str | None = None, untie: bool = False, ignore: Iterable[str] = ()
) -> tuple[BertConfig, names.Survey]:
    """Finds a checkpoint's files and what its tensors are called; no tensor is read yet.

    Args:
        path: a model's folder, one of the weight files in it, or the prefix of a TensorFlow checkpoint.
        prefix: what stands before the encoder's names, for a file that holds several encoders.
        untie: the masked-language-model head has a decoder of its own, whatever the configuration says.
        ignore: unknown fields of the configuration that have no effect on the encoder.

    Returns:
        The configuration, with the class and the labels that were found where it is Google's, which knows the encoder
        only; and the tensors by bertjax's names.

    Raises:
        SourceError, ConfigError, CheckpointError: see `bertjax.pretrained.from_pretrained`.
    """
    weights = sources.open_weights(path)  # first, because the format tells most plainly what a folder is
    config = read_config(weights.folder, ignore)
    survey = names.survey(weights, prefix)
    if untie:
        config = dataclasses.replace(config, extra={**config.extra, "tie_word_embeddings": False})
    if config_file(weights.folder).name == "bert_config.json":
        config = _with_found_heads(config, survey)
    return config, survey


def match(
    survey: names.Survey, shapes: Mapping[rules.Path, rules.Shape], untie: bool = False
) -> tuple[names.Survey, bert.Plan]:
    """Matches a checkpoint's tensors to a model's parameter tree; see `bert.match`.

    Returns:
        The survey and the plan. A decoder that is not tied has its bias under both of PyTorch's names in them, where
        the checkpoint has no names of PyTorch's to give back (Flax), or not those that it should have (`untie`).
    """
    flax = survey.weights.format == msgpack.FORMAT and survey.weights.layout is None
    if _DECODER in shapes and (flax or untie):
        survey = survey.with_decoder_bias()
    return survey, bert.match(survey, shapes)


def read_config(folder: Path, ignore: Iterable[str] = ()) -> BertConfig:
    """Reads a folder's config.json or, as Google's checkpoints have it, bert_config.json; see `BertConfig.from_hf`."""
    return BertConfig.from_file(config_file(folder), ignore=ignore)


def config_file(folder: Path) -> Path:
    """The folder's configuration file, which need not exist."""
    found = find(folder, "config.json") or find(folder, "bert_config.json")
    return found or folder / "config.json"


def check_head_fields(config: BertConfig, folder: Path) -> None:
    """Asks for what a head needs of a configuration, so that an unusable value is an error that names the file."""
    try:
        _ = config.num_labels, config.classifier_dropout, config.tie_word_embeddings
    except ConfigError as problem:
        raise ConfigError(f"{config_file(folder)}: {problem}") from None


def architecture(config: BertConfig) -> type[BertWithHeads] | None:
    """The class with heads that a configuration names, or None."""
    return next((_ARCHITECTURES[name] for name in _named(config) if name in _ARCHITECTURES), None)


def class_of(config: BertConfig, survey: names.Survey) -> type[BertModel] | type[BertWithHeads]:
    """The class that a checkpoint is loaded as: the one its configuration names or, where it names none, the only one
    that has just the heads that are there.

    Raises:
        ConfigError: the configuration names several classes or an unknown one, or the heads are those of several
            classes or of none.
    """
    named = _named(config)
    fitting = _fitting(survey)
    kind = {**_ARCHITECTURES, "BertModel": BertModel}.get(named[0]) if len(named) == 1 else None
    if kind is not None:
        return kind
    if not named and len(fitting) == 1:
        return fitting[0]
    heads = ", ".join(sorted(bert.heads_in(survey))) or "no"
    found = f"architectures is {named}, which names no one class of bertjax" if named else "no architectures"
    if "BertLMHeadModel" in named:
        found += " (BertLMHeadModel is the decoder's, and in old checkpoints the masked language model's)"
    choice = " or ".join(f"kind={each.__name__}" for each in fitting or (BertModel,))
    only = "" if fitting else ", which leaves the heads out, or the class whose heads you need"
    raise ConfigError(
        f"{config_file(survey.weights.folder)}: {found}, and the weights have {heads} head(s), so the class is not "
        f"settled; pass {choice}{only}"
    )


def _named(config: BertConfig) -> list[str]:
    """The classes that a configuration names, each once."""
    architectures = config.extra.get("architectures")
    return list(dict.fromkeys(architectures)) if isinstance(architectures, list) else []


def _fitting(survey: names.Survey) -> list[type[BertModel] | type[BertWithHeads]]:
    """The classes that have just the heads that a checkpoint has, as far as pooler and labels do not settle it."""
    heads, pooled = bert.heads_in(survey), bert.has_pooler(survey)
    if not heads:
        return [BertModel]
    bias = survey.tensors.get("classifier.bias")
    same = [kind for kind in _CLASSES if set(kind.heads) == heads]
    able = [kind for kind in same if kind.labels is None or bias is None or bias.count == kind.labels]
    # A head whose pooler is missing is for the matching to name.
    return [kind for kind in able if pooled or not kind.pooled] or able


def _with_found_heads(config: BertConfig, survey: names.Survey) -> BertConfig:
    """Adds to a configuration of Google's, which knows the encoder only, the heads that the checkpoint has.

    Of the classes with a classifier the first is taken, the sequence classifier: that is what Google's own script
    (run_classifier.py) trains.
    """
    kind = next(iter(_fitting(survey)), BertModel)
    fields: dict[str, Any] = {"architectures": [kind.__name__]}
    classifier = survey.tensors.get("classifier.bias")
    if classifier is not None and 0 < classifier.count <= _MAX_LABELS:
        fields["id2label"] = {str(label): name for label, name in placeholders(classifier.count).items()}
        fields["label2id"] = {name: int(label) for label, name in fields["id2label"].items()}
    return dataclasses.replace(config, extra={**config.extra, **fields})
