"""The settings of a training run: what a TOML file may say, checked, and documented where it is defined."""

import dataclasses
import difflib
import inspect
import json
import math
import re
import tomllib
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from bertjax.checks import check_count, check_number
from bertjax.errors import ConfigError, SourceError
from bertjax.training.lora_settings import LoRA
from bertjax.training.optimizer import AdamW

Kind = Literal[
    "text-classification",
    "token-classification",
    "question-answering",
    "multiple-choice",
    "masked-lm",
    "pre-training",
    "ranking",
    "similarity",
]

# Options of some kinds of task; with another kind they would do nothing.
_OPTIONS_OF = {
    "labels": ("text-classification", "token-classification"),
    "problem": ("text-classification",),
    "doc_stride": ("question-answering",),
    "mask_probability": ("masked-lm", "pre-training"),
    "whole_words": ("masked-lm", "pre-training"),
    "dims": ("ranking", "similarity"),
    "scale": ("similarity",),
}
# The least that a count may be.
_LEAST = {"seed": 0} | dict.fromkeys(
    ("steps", "batch_size", "accumulate", "row_length", "log_every", "evaluate_every", "checkpoint_every", "keep"), 1
)
_MOST = 2**31 - 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelSettings:
    """What is trained.

    Args:
        name: a model's folder, or a repository on the Hugging Face Hub.
        revision: for the Hub: a branch, a tag or a commit.
        preset: instead of a name: a new model of this size (tiny, mini, small, medium, base or large).
        config: for a new model: fields of config.json that differ from the preset's.
        tokenizer: a folder or repository with the tokenizer, or a vocab.txt; default: the model's own.
        fresh: parts to make anew ("classifier", "pooler", ...); default: those that the checkpoint lacks.
        pooling: for ranking and similarity: how token states become a vector, where the folder does not say.
        dtype: what products are computed in: "float32" or "bfloat16". Parameters are float32 either way.
        remat: compute all of a layer anew in the backward pass, instead of keeping the results of its products.
    """

    name: str | None = None
    revision: str | None = None
    preset: str | None = None
    config: dict[str, Any] = dataclasses.field(default_factory=dict)
    tokenizer: str | None = None
    fresh: tuple[str, ...] | None = None
    pooling: str | None = None
    dtype: Literal["float32", "bfloat16"] = "float32"
    remat: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class TaskSettings:
    """What it is trained for.

    Args:
        kind: text-classification, token-classification, question-answering, multiple-choice, masked-lm, pre-training
            (masked-lm and next sentence), ranking (vectors; queries find passages), or similarity (vectors; cosines of
            pairs).
        max_length: the longest text in tokens; default: what the model takes, and 384 for question-answering.
        labels: for classification: the labels' names in the order of their numbers; default: the model's, or, where
            its classifier is new, those in the data, sorted.
        problem: for text-classification: "single_label_classification", "multi_label_classification" or "regression".
        doc_stride: for question-answering: tokens that two windows of a context share; default: 128, or half of
            max_length where that is less.
        mask_probability: for masked-lm and pre-training: how much of a text is to be found again.
        whole_words: for masked-lm and pre-training: mask all pieces of a word or none.
        dims: for ranking and similarity: the loss is the sum of those of vectors cut to so many numbers each.
        scale: for similarity: the score of texts that mean the same.
    """

    kind: Kind
    max_length: int | None = None
    labels: tuple[str, ...] | None = None
    problem: Literal["single_label_classification", "multi_label_classification", "regression"] | None = None
    doc_stride: int | None = None
    mask_probability: float = 0.15
    whole_words: bool = False
    dims: tuple[int, ...] = ()
    scale: float = 1.0

    def __post_init__(self):
        for name, kinds in _OPTIONS_OF.items():
            if self.kind not in kinds and getattr(self, name) != type(self).__dataclass_fields__[name].default:
                raise ConfigError(f"{name} is of {' and '.join(kinds)}, and has no meaning for {self.kind}")
        if self.doc_stride is not None:
            check_count("doc_stride", self.doc_stride, least=0, error=ConfigError)
        for dim in self.dims:
            check_count("dims", dim, error=ConfigError)
        check_number("scale", self.scale, lambda value: 0 < value < math.inf, "a number above 0", ConfigError)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataSettings:
    """What it is trained and evaluated on.

    Args:
        train: files, folders and patterns: .jsonl, .csv, .txt (compressed or not), .parquet, .arrow, .conll.
        eval: the same, to evaluate on.
        columns: the name of each column that differs from what it is for: text, pair and label for
            text-classification; tokens and tags; question, context and answers; text, choices and label for
            multiple-choice; query, passage, negative, negative_2, ...; text, pair and score for similarity. The pair
            of text-classification and the negatives are read only if they are named here: pair = "pair".
        on_bad: what to do with rows that can't be used: "stop", or "skip" them. Either way OUTPUT/bad_rows.jsonl names
            them all.
    """

    train: tuple[str, ...]
    eval: tuple[str, ...] = ()
    columns: dict[str, str] = dataclasses.field(default_factory=dict)
    on_bad: Literal["stop", "skip"] = "stop"


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunSettings:
    """How.

    Args:
        output: the folder of the run: checkpoints, metrics and, in the end, the model.
        epochs: how often every example is seen.
        steps: how many steps are made; in the place of epochs.
        batch_size: examples of a step.
        accumulate: into how many parts a step is divided; takes less memory, learns the same, except that in ranking
            a query meets only the passages of its part.
        row_length: tokens of a row, which holds as many texts as fit; default: as long as the longest text.
        seed: of the order of examples, of dropout, of masks and of new parameters.
        sharding: with several devices, "replicated" parameters, or parameters and optimiser state "full"y divided.
        log_every: steps between two lines of metrics.
        evaluate_every: steps between two evaluations; default: an epoch.
        checkpoint_every: steps between two checkpoints; default: an epoch. An evaluation has one, too.
        keep: how many checkpoints are kept, beside the best.
        best: the metric that the best checkpoint has the most of (a loss: the least); default: by the task.
        save: which state becomes the model in the end, "best" or "last".
    """

    output: str
    epochs: float = 3.0
    steps: int | None = None
    batch_size: int = 32
    accumulate: int = 1
    row_length: int | None = None
    seed: int = 0
    sharding: Literal["replicated", "full"] = "replicated"
    log_every: int = 10
    evaluate_every: int | None = None
    checkpoint_every: int | None = None
    keep: int = 2
    best: str | None = None
    save: Literal["best", "last"] = "best"

    def __post_init__(self):
        for name, least in _LEAST.items():
            if getattr(self, name) is not None:
                check_count(name, getattr(self, name), least, _MOST, ConfigError)
        check_number("epochs", self.epochs, lambda value: 0 < value < math.inf, "a number above 0", ConfigError)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """All settings; each attribute is a table of the file."""

    model: ModelSettings
    task: TaskSettings
    data: DataSettings
    run: RunSettings
    optimizer: AdamW = dataclasses.field(default_factory=AdamW)
    lora: LoRA | None = None

    def to_json(self) -> dict[str, Any]:
        """As a file would say them, defaults included."""
        return json.loads(json.dumps(dataclasses.asdict(self)))


def read_settings(path: str | Path) -> Settings:
    """Reads a TOML file.

    Raises:
        SourceError: it can't be read.
        ConfigError: it is no TOML, has an option that there is not, or a value of another type, or lacks one.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
        return settings_of(tomllib.loads(text))
    except OSError as problem:
        raise SourceError(f"{path}: can't be read ({problem.strerror})") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as problem:
        raise ConfigError(f"{path}: not TOML ({problem})") from None
    except ConfigError as problem:
        raise ConfigError(f"{path}: {problem}") from None


def settings_of(tables: dict[str, Any]) -> Settings:
    """The settings of nested dicts; for the errors see `read_settings`."""
    kinds = {field.name: _table_of(field.type) for field in dataclasses.fields(Settings)}
    _refuse_unknown(tables, kinds, "tables")
    made = {}
    for name, kind in kinds.items():
        if name in tables:
            if not isinstance(tables[name], dict):
                raise ConfigError(f"{name} is {tables[name]!r:.60}, expected a table: [{name}]")
            made[name] = _make(kind, tables[name], name)
    absent = [name for name in ("model", "task", "data", "run") if name not in made]
    if absent:
        raise ConfigError(f"has no table [{absent[0]}]; `bertjax train --options` shows what there is")
    return Settings(**made)


def _table_of(annotation: Any) -> type:
    return next((kind for kind in typing.get_args(annotation) if kind is not types.NoneType), annotation)


def _make(kind: type, given: dict[str, Any], table: str) -> Any:
    annotations = typing.get_type_hints(kind)
    _refuse_unknown(given, annotations, f"options of [{table}]")
    values = {name: _value(annotations[name], value, f"{table}.{name}") for name, value in given.items()}
    needed = [field.name for field in dataclasses.fields(kind) if _default_of(field) is dataclasses.MISSING]
    absent = [name for name in needed if name not in values]
    if absent:
        raise ConfigError(f"[{table}] has no {absent[0]}: {describe(kind)[absent[0]]}")
    try:
        return kind(**values)
    except ConfigError as problem:
        raise ConfigError(f"[{table}] {problem}") from None


def _refuse_unknown(given: dict[str, Any], known: Any, what: str) -> None:
    for name in given:
        if name not in known:
            near = difflib.get_close_matches(name, list(known), 1)
            hint = f"; did you mean {near[0]}?" if near else f"; {what}: {', '.join(known)}"
            raise ConfigError(f"{name!r} is not among the {what}{hint}")


def _value(annotation: Any, value: Any, name: str) -> Any:
    """A value of TOML as the type that an option has."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (types.UnionType, typing.Union):  # the latter is what `Literal[...] | None` makes
        kinds = [each for each in arguments if each is not types.NoneType]
        exact = [each for each in kinds if type(value) is each]
        return _value((exact or kinds)[0], value, name)
    if origin is Literal:
        if value not in arguments:
            raise ConfigError(f"{name} is {value!r}, expected one of {', '.join(map(repr, arguments))}")
        return value
    if origin in (tuple, Sequence):
        values = [value] if isinstance(value, str) else value
        if not isinstance(values, list):
            raise ConfigError(f"{name} is {value!r:.60}, expected a list")
        return tuple(_value(arguments[0], each, name) for each in values)
    if origin is dict:
        if not isinstance(value, dict):
            raise ConfigError(f"{name} is {value!r:.60}, expected a table: [{name}]")
        return {key: each if arguments[1] is Any else _value(arguments[1], each, name) for key, each in value.items()}
    if annotation is float and type(value) is int:
        return float(value)
    if type(value) is not annotation:
        raise ConfigError(f"{name} is {value!r:.60}, expected {_SHOWN[annotation]}")
    return value


_SHOWN = {str: "a text", int: "a whole number", float: "a number", bool: "true or false"}


def describe(kind: type) -> dict[str, str]:
    """What each option of a table is, as its docstring says."""
    text = inspect.cleandoc(kind.__doc__).partition("Args:\n")[2].partition("\n\nRaises:")[0]
    found: dict[str, str] = {}
    for names, what in re.findall(r"^    ([\w, ]+): ((?:.|\n     )+)", text, re.MULTILINE):
        found |= {name.strip(): " ".join(what.split()) for name in names.split(",")}
    return found


def documentation() -> str:
    """Every option with what it is and its default, as a TOML file; what has none is in a comment."""
    lines = []
    for table in dataclasses.fields(Settings):
        kind = _table_of(table.type)
        # A table without a default for the whole is used if it is there.
        mark, note = ("# ", ["# Used if it is there:"]) if table.default is None else ("", [])
        lines += ["", *note, f"{mark}[{table.name}]"]
        said = describe(kind)
        for field in dataclasses.fields(kind):
            default = _default_of(field)
            needed = " Needed." if default is dataclasses.MISSING else ""
            lines.append(f"# {said[field.name]}{needed}")
            absent = needed or default is None
            lines.append(f"# {field.name} =" if absent else f"{mark}{field.name} = {_toml(default)}")
    return "\n".join(lines[1:]) + "\n"


def _default_of(field: dataclasses.Field) -> Any:
    """An option's default, or `dataclasses.MISSING`."""
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def _toml(value: Any) -> str:
    return json.dumps(value) if not isinstance(value, dict) else "{}"
