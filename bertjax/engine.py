"""Texts through a model as a stream: tokenize, pack into a few fixed shapes, run, unpack, in input order.

What the rows of tokens are made of and what is computed of a packed batch is up to the caller: sentence vectors, and
every task from text to answer, go through here.
"""

import dataclasses
import itertools
import logging
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from bertjax.checks import check_count
from bertjax.config import BertConfig
from bertjax.errors import ConfigError, InputError
from bertjax.packing import PackedBatch, Shapes, pack, pack_batch
from bertjax.tokenizer import Tokenizer
from bertjax.tokens import Tokens

#: Makes, for a shape [rows, length], batches to warm up with: each is a list of rows of ids, int [tokens].
Samples = Callable[[tuple[int, int]], list[list[np.ndarray]]]

logger = logging.getLogger(__name__)

# Tokens in one step. On a CPU a step has to be large enough for full-size matmuls and small enough that what passes
# between them stays in the cache; an accelerator wants more work per launch.
_STEP_TOKENS = {"cpu": 2048}
_STEP_TOKENS_ACCELERATOR = 32768
# A window is what is packed together: enough steps that the last, partly filled ones do not matter, and few enough
# rows that memory stays flat on a corpus of any length.
_WINDOW_STEPS = 32
_WINDOW_ROWS = 65536
_TOKENIZE_ITEMS = 1024
# Making one takes as long as tokenizing a short text.
_HIDDEN = tqdm(disable=True)


@dataclasses.dataclass(frozen=True)
class Encoded:
    """Some consecutive items as rows of tokens.

    Attributes:
        items: what they were made from.
        tokens: the rows, one or more for each item, in order.
        owners: int [rows]; which of the items a row belongs to.
    """

    items: list[Any]
    tokens: Tokens
    owners: np.ndarray

    @classmethod
    def join(cls, parts: Sequence["Encoded"]) -> "Encoded":
        """The items of several, one after another, with their rows."""
        if len(parts) == 1:
            return parts[0]
        firsts = np.cumsum([0, *(len(part.items) for part in parts[:-1])])
        return cls(
            items=[item for part in parts for item in part.items],
            tokens=Tokens.join([part.tokens for part in parts]),
            owners=np.concatenate([part.owners + first for part, first in zip(parts, firsts, strict=True)]),
        )


@dataclasses.dataclass(frozen=True)
class Window:
    """Some consecutive items with what was computed of them; the device may still be at it.

    Attributes:
        encoded: the items and their rows of tokens.
        steps: the packed batches, and what the caller's function made of each.
    """

    encoded: Encoded
    steps: list[tuple[PackedBatch, Any]]

    @property
    def num_tokens(self) -> int:
        """How many tokens the rows have, special tokens included."""
        return sum(map(len, self.encoded.tokens.input_ids))

    @property
    def num_positions(self) -> int:
        """How many positions were computed, padding included; `num_tokens / num_positions` is the fill."""
        return sum(batch.input_ids.size for batch, _ in self.steps)

    def per_row(self) -> np.ndarray:
        """Results [batch rows, segments, ...] of the steps as [rows, ...], in the order of the rows of tokens."""
        parts = [(batch.items, np.asarray(result)[batch.rows, batch.segments]) for batch, result in self.steps]
        ordered = np.empty((len(self.encoded.tokens), *parts[0][1].shape[1:]), parts[0][1].dtype)
        for items, values in parts:
            ordered[items] = values
        return ordered

    def per_token(self) -> list[np.ndarray]:
        """Results [batch rows, length, ...] of the steps as [tokens, ...] for each row of tokens, in order."""
        ids = self.encoded.tokens.input_ids
        ordered: list[Any] = [None] * len(ids)
        for batch, result in self.steps:
            array = np.asarray(result)
            for item, row, start in zip(batch.items, batch.rows, batch.starts, strict=True):
                ordered[item] = array[row, start : start + len(ids[item])]
        return ordered


class Engine:
    """Runs rows of tokens through a model, packed into a few fixed shapes.

    Args:
        config: the model's configuration.
        tokenizer: the tokenizer that belongs to it.
        max_length: the longest row in tokens; default: what the tokenizer says, or the model's positions, which are
            the limit whatever is asked for.
        step_tokens: tokens in one step of the device; default: by the kind of device.
        source: where the model comes from, for messages.

    Raises:
        ConfigError: the tokenizer does not belong to the model, or a size is not usable.
    """

    def __init__(
        self,
        config: BertConfig,
        tokenizer: Tokenizer,
        *,
        max_length: int | None = None,
        step_tokens: int | None = None,
        source: Any = "the model",
    ):
        if tokenizer.vocab_size > config.vocab_size:
            raise ConfigError(
                f"{source}: the tokenizer has ids up to {tokenizer.vocab_size - 1}, the model's vocabulary "
                f"ends at {config.vocab_size - 1}; they do not belong together"
            )
        max_length = None if max_length is None else check_count("max_length", max_length, error=ConfigError)
        step_tokens = None if step_tokens is None else check_count("step_tokens", step_tokens, error=ConfigError)
        positions = config.max_position_embeddings
        limit = max_length or tokenizer.model_max_length or positions
        special = tokenizer.num_special_tokens(pair=False)
        if min(limit, positions) < special:
            raise ConfigError(
                f"{source}: at most {min(limit, positions)} tokens leave no room for the {special} special tokens"
            )
        if limit > positions:
            logger.warning("texts are cut at the model's %d positions, not at %d tokens", positions, limit)
        self.tokenizer = tokenizer
        self.max_length = min(limit, positions)
        self._step_tokens = step_tokens

    @property
    def shapes(self) -> Shapes:
        """The shapes that rows are packed into."""
        return self._shapes()

    def _shapes(self, max_length: int | None = None) -> Shapes:
        default = _STEP_TOKENS.get(jax.default_backend(), _STEP_TOKENS_ACCELERATOR)
        return Shapes(max_length=max_length or self.max_length, step_tokens=self._step_tokens or default)

    def warm_up(
        self,
        run: Callable[[PackedBatch], Any],
        samples: Samples | None = None,
        *,
        max_length: int | None = None,
    ) -> float:
        """Runs steps of every shape, so that nothing is left to compile.

        Args:
            run: starts the computation on a packed batch.
            samples: what to run, where a shape needs several programs; default: a row of one token.
            max_length: as in `windows`.

        Returns:
            How long it took, in seconds.
        """
        begin, pad = time.perf_counter(), self.tokenizer.pad_token_id
        for shape in self._shapes(max_length).all():
            for rows in samples(shape) if samples else [[np.array([pad])]]:
                jax.block_until_ready(run(pack_batch(rows, [np.zeros_like(ids) for ids in rows], shape, pad)))
        return time.perf_counter() - begin

    def windows(
        self,
        items: Iterable[Any],
        encode: Callable[[list[Any], int], Encoded],
        run: Callable[[PackedBatch], Any],
        *,
        chunk: int = _TOKENIZE_ITEMS,
        max_length: int | None = None,
    ) -> Iterator[Window]:
        """Runs a stream of items of any length; memory does not grow with it.

        The next window is tokenized while the device still works on the last. Where `items` itself fails, or `encode`
        refuses one, the windows before it are given first and the error is raised then.

        Args:
            items: the items.
            encode: makes rows of tokens of some items, given them and the position of the first.
            run: starts the computation on a packed batch.
            chunk: how many items `encode` is given at a time.
            max_length: the longest row that `encode` makes, where that is less than the engine's.
        """
        shapes = self._shapes(max_length)
        running: list[Window] = []
        try:
            for encoded in _encoded(items, encode, chunk, _WINDOW_STEPS * shapes.step_tokens):
                running.append(_start(encoded, run, shapes))
                if len(running) > 1:
                    yield running.pop(0)
        except Exception:
            yield from running
            raise
        yield from running


def _encoded(items: Iterable[Any], encode: Callable, chunk: int, budget: int) -> Iterator[Encoded]:
    """Encodes items by chunks and groups these into windows of about `budget` tokens."""
    parts: list[Encoded] = []
    position = size = 0
    iterator = iter(items)
    try:
        while taken := list(itertools.islice(iterator, chunk)):
            encoded = encode(taken, position)
            _check_rows(encoded, position)
            parts.append(encoded)
            position += len(taken)
            size += sum(map(len, encoded.tokens.input_ids))
            if size >= budget or sum(len(part.tokens) for part in parts) >= _WINDOW_ROWS:
                yield Encoded.join(parts)
                parts, size = [], 0
    except Exception:
        if parts:
            yield Encoded.join(parts)
        raise
    if parts:
        yield Encoded.join(parts)


def _check_rows(encoded: Encoded, position: int) -> None:
    """Refuses a row without tokens, as a tokenizer that adds none of its own makes of a text without any."""
    for owner, ids in zip(encoded.owners, encoded.tokens.input_ids, strict=True):
        if not len(ids):
            raise InputError(f"position {position + owner}: the tokenizer finds no token in the text, and adds none")


def _start(encoded: Encoded, run: Callable[[PackedBatch], Any], shapes: Shapes) -> Window:
    """Packs a window and starts its steps; the results are still being computed when this returns."""
    tokens = encoded.tokens
    batches = pack(tokens.input_ids, tokens.token_type_ids, shapes, tokens.pad_token_id)
    return Window(encoded, [(batch, run(batch)) for batch in batches])


def progress_bar(items: Any, unit: str, show: bool | None) -> tqdm:
    """A progress bar for items that come in windows: `update` it with the length of each.

    Args:
        items: what is gone through; where it has a length, that is the total.
        unit: what one item is called.
        show: whether to show the bar; None for on a terminal, when it takes more than two seconds.
    """
    if not ((sys.stderr and sys.stderr.isatty()) if show is None else show):
        return _HIDDEN
    return tqdm(total=len(items) if hasattr(items, "__len__") else None, unit=unit, delay=2.0 if show is None else 0)
