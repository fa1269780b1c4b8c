"""What all tasks share: a model and its tokenizer, inputs of any number, answers in their order."""

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Self

import jax
import numpy as np
from flax import nnx
from tqdm import tqdm

from bertjax.engine import Encoded, Engine, Window
from bertjax.errors import ConfigError, InputError
from bertjax.packing import PackedBatch, Shapes, max_segments
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
    """

    encode: Callable[[list[Any], int], Encoded]
    run: Callable[[PackedBatch], Any]
    read: Callable[[Window], list[Any]]
    chunk: int = 256
    max_length: int | None = None


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
class AnsweredWindow:
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
    depends on nothing but its input: neither on its company nor on its place in the call.

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

    @property
    def max_length(self) -> int:
        """The longest input in tokens, special tokens included."""
        return self._engine.max_length

    @property
    def shapes(self) -> Shapes:
        """The shapes that inputs are packed into."""
        return self._engine.shapes

    def windows(self, inputs: Iterable[Any], **options: Any) -> Iterator[AnsweredWindow]:
        """Answers a stream of inputs of any length, in order; memory does not grow with it.

        Where `inputs` itself fails, or holds something that can't be answered, the windows before it are given first
        and the error is raised then.

        Args:
            inputs: a list, a generator or another iterable.
            **options: those of a call.
        """
        plan = self._plan(**options)
        if isinstance(inputs, str | bytes | Mapping) or not isinstance(inputs, Iterable):
            raise InputError(f"inputs is a {type(inputs).__name__}, expected a list or another iterable")
        for window in self._engine.windows(inputs, plan.encode, plan.run, chunk=plan.chunk, max_length=plan.max_length):
            encoded = window.encoded
            yield AnsweredWindow(
                answers=plan.read(window),
                tokens=window.num_tokens,
                truncated=len(np.unique(encoded.owners[encoded.tokens.truncated])),
                positions=window.num_positions,
            )

    def _plan(self, **options: Any) -> Plan:
        """Checks the options of a call and says how to compute it."""
        raise NotImplementedError

    def _answer(self, inputs: Any, show_progress_bar: bool | None, **options: Any) -> Any:
        """The answer to one input (a str, a tuple or a mapping), or the list of answers to several."""
        if isinstance(inputs, str | tuple | Mapping):
            return next(self.windows([inputs], **options)).answers[0]
        total = len(inputs) if hasattr(inputs, "__len__") else None
        hidden = None if show_progress_bar is None else not show_progress_bar
        answers = []
        with tqdm(total=total, unit="input", disable=hidden, delay=2.0 if show_progress_bar is None else 0) as bar:
            for window in self.windows(inputs, **options):
                answers += window.answers
                bar.update(len(window.answers))
        return answers

    def _encode_texts(self, items: list[TextOrPair], position: int) -> Encoded:
        """A row for each text or pair; what is longer than the model takes loses its end."""
        pairs = [_as_pair(item, position + index) for index, item in enumerate(items)]
        parts = []
        for is_pair, group in itertools.groupby(pairs, lambda pair: pair[1] is not None):
            firsts, seconds = map(list, zip(*group, strict=True))
            given = (firsts, seconds) if is_pair else (firsts,)
            parts.append(self.tokenizer(*given, max_length=self.max_length, first_position=position))
            position += len(firsts)
        return Encoded(items, Tokens.join(parts), np.arange(len(items)))

    def _encode_pairs(self, items: list[TextOrPair], position: int) -> Encoded:
        """`_encode_texts` for tasks that take pairs only."""
        for index, item in enumerate(items, position):
            if _as_pair(item, index)[1] is None:
                raise InputError(f"inputs[{index}] is no pair of texts; pass a tuple, (first, second)")
        return self._encode_texts(items, position)

    def _run_pooled(self, batch: PackedBatch) -> jax.Array:
        """Logits [rows, segments, labels] of a head that reads a text's first token."""
        return self._call(batch, max_segments=max_segments(batch.input_ids.shape[1])).logits

    def _call(self, batch: PackedBatch, **options: Any) -> Any:
        """The model's output for a packed batch."""
        return self.model(
            batch.input_ids,
            token_type_ids=batch.token_type_ids,
            position_ids=batch.position_ids,
            segment_ids=batch.segment_ids,
            **options,
        )


def _as_pair(item: Any, position: int) -> tuple[Any, Any]:
    """The text and the second text or None; what is no text is passed on, for the tokenizer to refuse."""
    if isinstance(item, Mapping):
        if set(item) - {"text_pair"} != {"text"}:
            raise InputError(f"inputs[{position}] has the keys {sorted(map(str, item))}, expected text and text_pair")
        return item["text"], item.get("text_pair")
    if isinstance(item, tuple):
        if len(item) != 2:
            raise InputError(f"inputs[{position}] is a tuple of {len(item)}, expected a text or a pair of texts")
        return item
    return item, None


def softmax(logits: np.ndarray) -> np.ndarray:
    """exp(x) / sum(exp(x)) over the last axis, in the dtype of the logits."""
    exp = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return exp / exp.sum(axis=-1, keepdims=True)


def sigmoid(logits: np.ndarray) -> np.ndarray:
    """1 / (1 + exp(-x)), in the dtype of the logits; does not overflow."""
    exp = np.exp(-np.abs(logits))
    return np.where(logits >= 0, 1 / (1 + exp), exp / (1 + exp))


def check_choice(name: str, value: Any, choices: Sequence[Any]) -> None:
    """Raises `InputError` if an option is not one of its values."""
    if value not in choices:
        raise InputError(f"{name} is {value!r}, expected one of {', '.join(map(repr, choices))}")


def check_count(name: str, value: Any, least: int = 1) -> None:
    """Raises `InputError` if an option is not an integer of at least `least`."""
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise InputError(f"{name} is {value!r}, expected an integer of at least {least}")
