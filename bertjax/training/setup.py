"""Settings to a run: files to examples, a checkpoint or a preset to a model."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
from flax import nnx

from bertjax import hub
from bertjax.checkpoints import open_checkpoint
from bertjax.config import BertConfig
from bertjax.convert import bert
from bertjax.embedder import SentenceEncoder
from bertjax.errors import ConfigError, InputError
from bertjax.fresh import PARTS
from bertjax.labels import placeholders, with_labels
from bertjax.pretrained import from_pretrained
from bertjax.pretrained_text import load_sentence_encoder, load_tokenizer
from bertjax.tasks.base import check_reads_pairs
from bertjax.tokenizer import Tokenizer
from bertjax.training.loop import Trainer
from bertjax.training.lora import add_lora
from bertjax.training.masking import Masking
from bertjax.training.rows import Rows, read_rows
from bertjax.training.settings import Settings
from bertjax.training.tasks.answering import AnswerQuestions
from bertjax.training.tasks.base import Examples, LearningTask
from bertjax.training.tasks.choosing import ChooseTexts
from bertjax.training.tasks.classification import ClassifyTexts, names_of
from bertjax.training.tasks.sentences import NEGATIVES, CompareTexts, RankPassages
from bertjax.training.tasks.tagging import TagWords
from bertjax.training.tasks.words import FindMaskedWords, PreTrain

_NEGATIVES = ("negative", *(f"negative_{number}" for number in range(2, NEGATIVES + 1)))
# What each kind of task reads of a row; with "?" only where the settings name a column for it.
_COLUMNS = {
    "text-classification": ("text", "pair?", "label"),
    "token-classification": ("tokens", "tags"),
    "question-answering": ("question", "context", "answers"),
    "multiple-choice": ("text", "choices", "label"),
    "masked-lm": ("text",),
    "pre-training": ("text",),
    "ranking": ("query", "passage", *(f"{name}?" for name in _NEGATIVES)),
    "similarity": ("text", "pair", "score"),
}
_SENTENCES = ("ranking", "similarity")
# Those that put two texts into a row; text classification may, too.
_PAIRS = ("question-answering", "multiple-choice", "pre-training")
_WINDOW, _STRIDE = 384, 128
_SINGLE = "single_label_classification"


def trainer_of(settings: Settings) -> Trainer:
    """Reads everything that a run needs.

    Raises:
        SourceError, ConfigError, CheckpointError, TokenizerError: see `from_pretrained`.
        InputError: a row can't be used.
    """
    source = _encoder(settings) if settings.task.kind in _SENTENCES else _tokenizer(settings)
    columns = _columns(settings)
    rows = read_rows(settings.data.train, columns, optional=_NEGATIVES)
    held_out = read_rows(settings.data.eval, columns, optional=_NEGATIVES) if settings.data.eval else None
    model, task = _model_and_task(settings, source, rows)
    kind = settings.task.kind
    if kind in _PAIRS or (kind == "text-classification" and "pair" in columns):
        check_reads_pairs(model.config)
    if settings.lora is not None:
        model = add_lora(model, settings.lora, settings.run.seed)
    examples, evaluation = _examples(settings, task, rows, held_out)
    return Trainer(
        model, task, examples, settings.run, optimizer=settings.optimizer, evaluation=evaluation, settings=settings
    )


def _columns(settings: Settings) -> dict[str, str]:
    """The name of each column, by what it is for."""
    given, needed = dict(settings.data.columns), {}
    for purpose in _COLUMNS[settings.task.kind]:
        name = purpose.removesuffix("?")
        if name == purpose or name in given:
            needed[name] = given.pop(name, name)
    if given:
        known = ", ".join(purpose.removesuffix("?") for purpose in _COLUMNS[settings.task.kind][:4])
        raise ConfigError(f"data.columns has {next(iter(given))!r}; {settings.task.kind} reads {known}")
    return needed


def _examples(
    settings: Settings, task: LearningTask, rows: Rows, held_out: Rows | None
) -> tuple[Examples, Examples | None]:
    """The examples to learn from and to evaluate on; of bad rows, all are named in a file."""
    examples, rows = task.examples(rows)
    evaluation, held_out = (None, Rows()) if held_out is None else task.examples(held_out)
    bad = Rows(bad=[*rows.bad, *held_out.bad])
    path = Path(settings.run.output) / "bad_rows.jsonl"
    path.unlink(missing_ok=True)  # of an earlier attempt
    if bad.bad:
        path.parent.mkdir(parents=True, exist_ok=True)
        bad.write_bad(path)
        if settings.data.on_bad == "stop":
            raise InputError(f'{bad.describe_bad()}; {path} names them all; data.on_bad = "skip" leaves them out')
    if not len(examples) or (evaluation is not None and not len(evaluation)):
        raise InputError(f"{'data.eval' if len(examples) else 'data.train'} has no example that can be used")
    # Only an evaluation reads the rows again.
    return dataclasses.replace(examples, records=()), evaluation


def _tokenizer(settings: Settings) -> Tokenizer:
    model = settings.model
    if (model.name is None) == (model.preset is None):
        raise ConfigError("[model] needs a name, to go on from a checkpoint, or a preset, for a new model; not both")
    source = model.tokenizer or model.name
    if source is None:
        raise ConfigError("[model] has a preset, so it needs a tokenizer: a model's folder, or a vocab.txt")
    if model.pooling is not None:
        raise ConfigError(f"[model] pooling has no meaning for {settings.task.kind}, only for {', '.join(_SENTENCES)}")
    if Path(source).is_file():
        return Tokenizer.from_vocab(source)
    # The revision is the model's, where the tokenizer is from elsewhere.
    own = model.name is None or model.tokenizer is None
    return load_tokenizer(source, revision=model.revision if own else None)


def _encoder(settings: Settings) -> SentenceEncoder:
    model = settings.model
    unused = [name for name in ("preset", "config", "tokenizer", "fresh", "remat") if getattr(model, name)]
    if model.name is None or unused:
        without = f", without {unused[0]}" if unused else ""
        raise ConfigError(f"[model] {settings.task.kind} goes on from a name{without}")
    return load_sentence_encoder(
        model.name,
        pooling=model.pooling,
        revision=model.revision,
        dtype=model.dtype,
        param_dtype="float32",
        max_seq_length=settings.task.max_length,
    )


def _model_and_task(
    settings: Settings, source: Tokenizer | SentenceEncoder, rows: Rows
) -> tuple[nnx.Module, LearningTask]:
    kind, asked = settings.task.kind, settings.task
    if isinstance(source, SentenceEncoder):
        return _sentence_task(settings, source)
    tokenizer = source
    if kind in ("text-classification", "token-classification"):
        return _labelled_task(settings, tokenizer, rows)
    if kind == "question-answering":
        model = _model(settings, AnswerQuestions, tokenizer)
        length = min(_max_length(settings, model, tokenizer), asked.max_length or _WINDOW)
        stride = min(_STRIDE, length // 2) if asked.doc_stride is None else asked.doc_stride
        return model, AnswerQuestions(tokenizer, length, doc_stride=stride)
    if kind == "multiple-choice":
        model = _model(settings, ChooseTexts, tokenizer)
        return model, ChooseTexts(tokenizer, _max_length(settings, model, tokenizer))
    masking = Masking.of(tokenizer, probability=asked.mask_probability, whole_words=asked.whole_words)
    of = FindMaskedWords if kind == "masked-lm" else PreTrain
    model = _model(settings, of, tokenizer)
    more = {} if kind == "masked-lm" else {"seed": settings.run.seed}
    return model, of(tokenizer, _max_length(settings, model, tokenizer), masking=masking, **more)


def _sentence_task(settings: Settings, encoder: SentenceEncoder) -> tuple[nnx.Module, LearningTask]:
    columns = list(_columns(settings))
    options: dict[str, Any] = {"spec": encoder.spec, "dims": settings.task.dims}
    wrong = [dim for dim in settings.task.dims if not 1 <= dim <= encoder.model.embedding_dimension]
    if wrong:
        raise ConfigError(f"task.dims has {wrong[0]}; the vectors have {encoder.model.embedding_dimension} numbers")
    args = (encoder.tokenizer, encoder.max_seq_length)
    if settings.task.kind == "ranking":
        return encoder.model, RankPassages(*args, columns=columns, **options)
    return encoder.model, CompareTexts(*args, columns=columns[:2], scale=settings.task.scale, **options)


def _labelled_task(settings: Settings, tokenizer: Tokenizer, rows: Rows) -> tuple[nnx.Module, LearningTask]:
    tags = settings.task.kind == "token-classification"
    of, problem = TagWords if tags else ClassifyTexts, None if tags else settings.task.problem
    labels: dict[str, Any] = {}
    if settings.task.labels is not None:
        labels["id2label"] = dict(enumerate(settings.task.labels))
    elif "classifier" in _absent_parts(settings, of.model_class):
        labels["id2label"] = dict(enumerate(_names(settings, rows, tags)))
    if problem is not None:
        labels["problem_type"] = problem
    model = _model(settings, of, tokenizer, **labels)
    names, length = list(model.config.id2label.values()), _max_length(settings, model, tokenizer)
    if tags:
        return model, TagWords(tokenizer, length, names=names)
    problem, paired = model.config.problem_type or _SINGLE, "pair" in _columns(settings)
    return model, ClassifyTexts(tokenizer, length, names=names, problem=problem, paired=paired)


def _names(settings: Settings, rows: Rows, tags: bool) -> list[str]:
    """The names of the labels of a new classifier."""
    if settings.task.problem == "regression":
        return list(placeholders(1).values())
    column = "tags" if tags else "label"
    values = [record[column] for record in rows.records]
    if not tags and settings.task.problem != "multi_label_classification":
        values = [[value] for value in values]
    return names_of(values)


def _absent_parts(settings: Settings, kind: type) -> list[str]:
    """The parts of a class of models that are made anew: those asked for, or those that the checkpoint lacks."""
    has = [part for part in PARTS if part in kind.heads or (part == "pooler" and kind.pooled)]
    if settings.model.preset is not None:
        return has
    if settings.model.fresh is not None:
        return list(settings.model.fresh)
    _, survey = open_checkpoint(hub.resolve(settings.model.name, revision=settings.model.revision))
    there = {bert.part_of(name) for name in survey.tensors}
    return [part for part in has if part not in there]


def _model(settings: Settings, of: type[LearningTask], tokenizer: Tokenizer, **labels: Any) -> nnx.Module:
    """The model, new or from a checkpoint."""
    asked, kind, seed = settings.model, of.model_class, settings.run.seed
    options = {"dtype": asked.dtype, "param_dtype": "float32", "remat": asked.remat}
    options["unroll"] = True if jax.default_backend() == "gpu" and not asked.remat else 1  # see `BertModel`
    if asked.preset is None:
        if asked.config:
            raise ConfigError("[model] config is of a new model, made of a preset; a name has its own")
        fresh = _absent_parts(settings, kind)
        return from_pretrained(asked.name, kind, fresh=fresh, rngs=seed, revision=asked.revision, **labels, **options)
    config = BertConfig.preset(asked.preset, **{"vocab_size": tokenizer.backend.get_vocab_size(), **asked.config})
    return kind(with_labels(config, **labels) if labels else config, rngs=nnx.Rngs(seed), **options)


def _max_length(settings: Settings, model: nnx.Module, tokenizer: Tokenizer) -> int:
    """The longest text in tokens."""
    most = min(model.config.max_position_embeddings, tokenizer.model_max_length or 1 << 30)
    asked = settings.task.max_length
    if asked is not None and not 3 <= asked <= most:
        raise ConfigError(f"task.max_length is {asked}, expected 3 to {most}, which this model takes")
    return asked or most
