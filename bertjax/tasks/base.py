"""What all tasks share: a model and its tokenizer, inputs of any number, answers in their order."""

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Self

import jax
import numpy as np
from flax import nnx

from bertjax.config import BertConfig
from bertjax.engine import Encoded, Engine, Samples, Window, progress_bar
from bertjax.errors import ConfigError, InputError
from bertjax.packing import PackedBatch, Shapes, max_segments
from bertjax.text_inputs import check_iterable, check_text
from bertjax.tokenizer import Tokenizer
from bertjax.tokens import Tokens

#: A text, or two of them that the model reads together.
TextOrPair = str | tuple[str, str] | Mapping[str, str]


class Plan(NamedTuple):
    """How one call is computed.

    Attributes:
        encode: makes rows of tokens of some items, given them and the position of the first.
        run: starts the computation on a packed batch.
        read: turns a computed window into answers, one for each of its items.
        chunk: how many items are encoded at a time.
        max_length: the longest row of tokens, where that is less than the task's.
        samples: batches that together need every program that a batch of their shape may need, where that is more
            than one.
    """

    encode: Callable[[list[Any], int], Encoded]
    run: Callable[[PackedBatch], Any]
    read: Callable[[Window], list[Any]]
    chunk: int = 256
    max_length: int | None = None
    samples: Samples | None = None


@dataclasses.dataclass(frozen=True)
class TaskFolder:
    """What a model's folder says of a task.

    Attributes:
        transformer: the folder that holds the model and the tokenizer.
        do_lower_case: lower-case texts before they are tokenized, whatever the tokenizer's files say.
        options: more arguments for the task's class.
    """

    transformer: Path
    do_lower_case: bool = False
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class AnsweredBatch:
    """The answers to some consecutive inputs.

    Attributes:
        answers: one for each input, in order; what a call of the task returns.
        tokens: how many tokens were computed, special tokens included.
        truncated: how many inputs were longer than the model takes, and lost their end.
        positions: how many positions were computed, padding included; `tokens / positions` is the fill.
    """

    answers: list[Any]
    tokens: int
    truncated: int
    positions: int


class Task:
    """From text to answers, through a model with a head.

    Inputs of any lengths are packed into a few fixed shapes, so that a corpus compiles a handful of times. An answer
    depends on nothing but its input: neither on its company nor on its place in the call, but for rounding.

    Args:
        model: a model of the class that the task needs.
        tokenizer: the tokenizer that belongs to it.
        max_length: the longest input in tokens, special tokens included; default: what tokenizer and model allow.
        step_tokens: tokens in one step of the device; default: by the kind of device.
        source: where the model comes from, for messages.

    Raises:
        ConfigError: model and tokenizer do not belong together or to the task, or a size is not usable.
    """

    #: The model class.
    kind: ClassVar[type[nnx.Module]]
    #: What is one input to a call; whatever else is iterable is several.
    single: ClassVar[tuple[type, ...]] = (str,)

    def __init__(
        self,
        model: nnx.Module,
        tokenizer: Tokenizer,
        *,
        max_length: int | None = None,
        step_tokens: int | None = None,
        source: Any = "the model",
    ):
        if not isinstance(model, self.kind):
            raise ConfigError(f"{type(self).__name__} takes a {self.kind.__name__}, not a {type(model).__name__}")
        self.model = model
        self.tokenizer = tokenizer
        self._engine = Engine(model.config, tokenizer, max_length=max_length, step_tokens=step_tokens, source=source)

    @classmethod
    def from_pretrained(cls, path_or_hub_id: str | Path, **options: Any) -> Self:
        """Loads a model and its tokenizer; see `bertjax.pretrained_text.load_task` for the options and the errors."""
        from bertjax.pretrained_text import load_task

        return load_task(path_or_hub_id, cls, **options)

    @classmethod
    def read_folder(cls, folder: Path) -> TaskFolder:
        """Reads what a model's folder says of the task.

        Raises:
            ConfigError: it asks for what the task does not do.
        """
        return TaskFolder(folder)

    def save_pretrained(self, folder: str | Path, *, force: bool = False) -> None:
        """Writes a folder that `from_pretrained` reads as this task; see `bertjax.pretrained_text.save_task`."""
        from bertjax.pretrained_text import save_task

        save_task(self, folder, force=force)

    def folder_files(self) -> dict[str, dict[str, Any] | list[Any]]:
        """What `read_folder` reads: JSON files by name, and of config.json what is added to the model's."""
        return {}

    @property
    def max_length(self) -> int:
        """The longest input in tokens, special tokens included."""
        return self._engine.max_length

    @property
    def shapes(self) -> Shapes:
        """The shapes that inputs are packed into."""
        return self._engine.shapes

    def stream(self, inputs: Iterable[Any], **options: Any) -> Iterator[AnsweredBatch]:
        """Answers a stream of inputs of any length, in order; memory does not grow with it.

        Where `inputs` itself fails, or holds something that can't be answered, the batches before it are given first
        and the error is raised then.

        Args:
            inputs: a list, a generator or another iterable.
            **options: those of a call.
        """
        plan = self.plan(**options)
        check_iterable("inputs", inputs)
        for window in self._engine.windows(inputs, plan.encode, plan.run, chunk=plan.chunk, max_length=plan.max_length):
            encoded = window.encoded
            yield AnsweredBatch(
                answers=plan.read(window),
                tokens=window.num_tokens,
                truncated=len(np.unique(encoded.owners[encoded.tokens.truncated])),
                positions=window.num_positions,
            )

    def warm_up(self, **options: Any) -> float:
        """Compiles everything that calls will run, in all of `shapes`, for a server that must not wait for it later.

        Without it each shape is compiled when it first comes up.

        Args:
            **options: those of the calls to come.

        Returns:
            How long it took, in seconds.
        """
        plan = self.plan(**options)
        return self._engine.warm_up(plan.run, plan.samples, max_length=plan.max_length)

    def plan(self, **options: Any) -> Plan:
        """Checks the options of a call and says how to compute it."""
        raise NotImplementedError

    def _answer(self, inputs: Any, show_progress_bar: bool | None, **options: Any) -> Any:
        """The answer to one input, of the types in `single`, or the list of answers to several."""
        if isinstance(inputs, self.single):
            return next(self.stream([inputs], **options)).answers[0]
        answers = []
        with progress_bar(inputs, "input", show_progress_bar) as bar:
            for window in self.stream(inputs, **options):
                answers += window.answers
                bar.update(len(window.answers))
        return answers

    def _check_texts(self, items: list[Any], position: int) -> None:
        """Raises `InputError` for the first item that is no text; `position` is that of the first item."""
        for index, item in enumerate(items, position):
            check_text(f"inputs[{index}]", item)

    def _encode_texts(self, items: list[TextOrPair], position: int) -> Encoded:
        """A row for each text or pair; what is longer than the model takes loses its end."""
        return self._encode_parsed(items, position, least=1)

    def _encode_pairs(self, items: list[TextOrPair], position: int) -> Encoded:
        """`_encode_texts` for tasks that take pairs only."""
        return self._encode_parsed(items, position, least=2)

    def _encode_parsed(self, items: list[TextOrPair], position: int, least: int) -> Encoded:
        inputs = [as_pair(item, index, least=least) for index, item in enumerate(items, position)]
        parts = []
        for _, group in itertools.groupby(inputs, len):
            columns = list(map(list, zip(*group, strict=True)))
            if len(columns) > 1:
                check_reads_pairs(self.model.config)
            parts.append(self.tokenizer(*columns, max_length=self.max_length, first_position=position))
            position += len(columns[0])
        return Encoded(items, Tokens.join(parts), np.arange(len(items)))

    def _run_pooled(self, batch: PackedBatch) -> jax.Array:
        """Logits [rows, segments, labels] of a head that reads a text's first token."""
        return self._call(batch, max_segments=max_segments(batch.input_ids.shape[1])).logits

    def _call(self, batch: PackedBatch, **options: Any) -> Any:
        """The model's output for a packed batch."""
        return self.model(**batch.inputs(), **options)


def check_reads_pairs(config: BertConfig) -> None:
    """Raises `ConfigError` if a model of this configuration can't tell two texts apart."""
    if config.type_vocab_size < 2:
        raise ConfigError(
            "the model has one type of tokens (type_vocab_size is 1), so it can't read two texts together"
        )


def as_pair(
    item: Any, position: int, keys: tuple[str, str] = ("text", "text_pair"), *, least: int = 2
) -> tuple[str, ...]:
    """The two texts of an input.

    Args:
        item: a tuple of two texts, or a mapping with `keys`; a list of two texts where nothing else can be meant.
        position: the input's position, for messages.
        keys: what the first text is called, and the second.
        least: 1 where a single text will do: a str, or a mapping with the first key only.

    Raises:
        InputError: the item is not of this form, or something in it is no text.
    """
    name = f"inputs[{position}]"
    if isinstance(item, Mapping):
        if set(item) not in (set(keys), set(keys[:least])):
            raise InputError(f"{name} has the keys {sorted(map(str, item))}, expected {keys[0]!r} and {keys[1]!r}")
        texts = {f"{name}[{key!r}]": item[key] for key in keys if key in item}
    elif isinstance(item, tuple) or (isinstance(item, list) and least == 2):
        if len(item) != 2:
            raise InputError(f"{name} is a {type(item).__name__} of {len(item)}, expected a pair, ({', '.join(keys)})")
        texts = {f"{name}[{index}]": text for index, text in enumerate(item)}
    elif least == 1:
        texts = {name: item}
    else:
        raise InputError(f"{name} is no pair of texts; pass a tuple, ({', '.join(keys)}), or a mapping with these keys")
    for of_text, text in texts.items():
        check_text(of_text, text)
    return tuple(texts.values())


def softmax(logits: np.ndarray) -> np.ndarray:
    """exp(x) / sum(exp(x)) over the last axis, in the dtype of the logits."""
    exp = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return exp / exp.sum(axis=-1, keepdims=True)


def sigmoid(logits: np.ndarray) -> np.ndarray:
    """1 / (1 + exp(-x)), in the dtype of the logits; does not overflow."""
    exp = np.exp(-np.abs(logits))
    return np.where(logits >= 0, 1 / (1 + exp), exp / (1 + exp))
