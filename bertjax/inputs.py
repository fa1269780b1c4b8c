"""Checks what a caller passes to a model, on the host, before anything is compiled or run.

A JAX gather does not fail on an id that is out of range, it returns something else; so ranges are checked here, with
the position of the first offender. Inside a caller's own `jit`, `grad` or `vmap` values do not exist yet: there shapes
and dtypes are checked, and values are the caller's business.
"""

import reprlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bertjax.checks import check_count
from bertjax.config import BertConfig
from bertjax.errors import InputError
from bertjax.losses import IGNORED

_INPUTS = (
    "input_ids",
    "inputs_embeds",
    "attention_mask",
    "token_type_ids",
    "position_ids",
    "segment_ids",
    "head_mask",
)


def check_dropout_key(key: Any) -> None:
    """Raises `InputError` if `dropout_key` is neither None nor a JAX random key, new style or old."""
    if key is None:
        return
    dtype, shape = getattr(key, "dtype", None), getattr(key, "shape", None)
    is_key = isinstance(key, jax.Array | np.ndarray) and (
        (jnp.issubdtype(dtype, jax.dtypes.prng_key) and shape == ()) or (dtype == jnp.uint32 and len(shape) == 1)
    )
    if not is_key:
        raise InputError(f"dropout_key is {reprlib.repr(key)}, expected one random key, such as jax.random.key(0)")


def check_inputs(
    config: BertConfig,
    input_ids: Any,
    attention_mask: Any = None,
    token_type_ids: Any = None,
    position_ids: Any = None,
    segment_ids: Any = None,
    *,
    inputs_embeds: Any = None,
    head_mask: Any = None,
) -> dict[str, jax.Array | np.ndarray | None]:
    """Checks the inputs of a BERT encoder and returns them as arrays.

    Args:
        config: the model's configuration.
        input_ids: int [batch, length], token ids.
        attention_mask: 0/1 or bool [batch, length]; 0 marks padding, which no token may attend to.
        token_type_ids: int [batch, length].
        position_ids: int [batch, length]. Relative positions are distances in the row, so there the ids of a text can
            only count up one by one, which leaves them without effect.
        segment_ids: int [batch, length]; tokens attend only to tokens of their own segment. 0 marks padding.
        inputs_embeds: float [batch, length, hidden], in the place of `input_ids`; its values are not looked at.
        head_mask: finite float, int or bool [heads] or [layers, heads].

    Returns:
        The same names; what was not given is None. Ids are int32, the attention mask is bool, the embeddings are
        float32, and the head mask is float32 [layers, heads]. What was on the host is still there.

    Raises:
        InputError: a rank, shape, dtype or value is not usable; says which, and at which position.
    """
    tokens = _check_tokens(config, input_ids, inputs_embeds)
    if position_ids is None and segment_ids is None and tokens.shape[1] > config.max_position_embeddings:
        raise InputError(
            f"{tokens.name} is {tokens.shape[1]} tokens long, the model has {config.max_position_embeddings} "
            "positions; truncate the text or split it"
        )
    if segment_ids is not None:
        _check_runs(_as_array("segment_ids", segment_ids))
    if position_ids is None and segment_ids is not None:
        _check_segment_lengths(_as_array("segment_ids", segment_ids), config.max_position_embeddings)
    mask = None if attention_mask is None else _check_mask(attention_mask, tokens)
    inputs = {
        "input_ids": _check_ids("input_ids", input_ids, tokens, config.vocab_size),
        "inputs_embeds": None
        if inputs_embeds is None
        else _cast(_as_array("inputs_embeds", inputs_embeds), np.float32),
        "attention_mask": mask,
        "token_type_ids": _check_ids("token_type_ids", token_type_ids, tokens, config.type_vocab_size),
        "position_ids": _check_ids("position_ids", position_ids, tokens, config.max_position_embeddings),
        "segment_ids": _check_ids("segment_ids", segment_ids, tokens, np.iinfo(np.int32).max),
        "head_mask": None if head_mask is None else _check_head_mask(head_mask, config),
    }
    if config.position_embedding_type != "absolute":
        _check_positions_count(inputs["position_ids"], mask, inputs["segment_ids"])
    return inputs


def known_inputs(**given: jax.Array) -> dict[str, jax.Array | None]:
    """What `check_inputs` returns of the same inputs, for int32 arrays that are known to be right."""
    return dict.fromkeys(_INPUTS) | given


def check_labels(name: str, value: Any, shape: tuple[int, ...], classes: int) -> jax.Array | np.ndarray | None:
    """Checks labels that name a class, -100 where there is none to learn, and returns them as int32.

    Raises:
        InputError: the shape, the dtype or a value is not usable; says which, and at which position.
    """
    if value is None:
        return None
    labels = _check_integers(name, value, shape)
    if _has_values(labels):
        host = np.asarray(labels)
        bad = ((host < 0) | (host >= classes)) & (host != IGNORED)
        _refuse_first(name, host, bad, f"neither {IGNORED} nor inside 0..{classes - 1}")
    return _cast(labels, np.int32)


def check_targets(
    name: str, value: Any, shape: tuple[int, ...], *, probabilities: bool, segments: bool
) -> jax.Array | np.ndarray:
    """Checks labels that are numbers, from 0 to 1 for `probabilities`, else any finite ones; returns float32.

    Those of segments may be NaN, too, as rows have different numbers of segments.

    Raises:
        InputError: the shape, the dtype or a value is not usable; says which, and at which position.
    """
    array = _check_numbers(name, value, (shape,))
    if _has_values(array):
        host = np.asarray(array, np.float32)
        usable = (host >= 0) & (host <= 1) if probabilities else np.isfinite(host)
        usable |= np.isnan(host) & segments
        _refuse_first(name, host, ~usable, "outside 0..1" if probabilities else "not finite")
    return _cast(array, np.float32)


def check_span_ends(name: str, value: Any, shape: tuple[int, ...]) -> jax.Array | np.ndarray:
    """Checks positions of a span's first or last tokens, any int32, and returns them as such.

    Raises:
        InputError: the shape, the dtype or a value is not usable; says which, and at which position.
    """
    positions = _check_integers(name, value, shape)
    if _has_values(positions):
        host, limits = np.asarray(positions), np.iinfo(np.int32)
        _refuse_first(name, host, (host < limits.min) | (host > limits.max), "which is no int32")
    return _cast(positions, np.int32)


def check_label_count(labels: Any, max_predictions: int) -> None:
    """Checks that there are labels, which `check_labels` has passed, and no more to learn than `max_predictions`.

    Raises:
        InputError: that is not so, or `max_predictions` is no positive integer.
    """
    check_count("max_predictions", max_predictions, most=np.iinfo(np.int32).max)
    if labels is None:
        raise InputError("max_predictions is how many labels there are at most; pass labels with it")
    labels = _as_array("labels", labels)
    if _has_values(labels):
        count = int((np.asarray(labels) != IGNORED).sum())
        if count > max_predictions:
            raise InputError(
                f"labels has {count} positions to predict, max_predictions is {max_predictions}; raise it, or set "
                f"labels to {IGNORED}"
            )


def check_labelled_segments(name: str, labels: Any, segment_ids: Any) -> None:
    """Checks that only segments which a row has have a label; both have passed their own checks.

    Raises:
        InputError: another one has; says which.
    """
    labels, segment_ids = _as_array(name, labels), _as_array("segment_ids", segment_ids)
    if _has_values(labels) and _has_values(segment_ids):
        host = np.asarray(labels)
        numbers = np.arange(1, host.shape[1] + 1)
        present = (np.asarray(segment_ids)[:, None, :] == numbers[:, None]).any(-1)
        numeric = np.issubdtype(host.dtype, np.floating)
        scored = ~np.isnan(host) if numeric else host != IGNORED
        present = present.reshape(*present.shape, *[1] * (host.ndim - 2))
        none = "NaN" if numeric else IGNORED
        _refuse_first(name, host, scored & ~present, f"but the row has no such segment; set it to {none}")


def is_integer(value: Any) -> bool:
    """Whether an input's dtype is one of integers."""
    return bool(jnp.issubdtype(_as_array("labels", value).dtype, jnp.integer))


def flatten_choices(input_ids: Any, inputs_embeds: Any = None, **others: Any) -> tuple[tuple[int, int], dict[str, Any]]:
    """Makes a row of every choice of a multiple-choice batch.

    Args:
        input_ids: int [batch, choices, length], or None.
        inputs_embeds: float [batch, choices, length, hidden], or None.
        **others: other inputs by name, each [batch, choices, length] or None.

    Returns:
        The batch size and the number of choices, and the inputs as [batch * choices, length].

    Raises:
        InputError: a rank or a shape is not usable.
    """
    name, value, axes = _only_one(input_ids, inputs_embeds)
    axes = ("batch", "choices", *axes[1:])
    array = _as_array(name, value)
    if array.ndim != len(axes):
        raise InputError(f"{name} has shape {array.shape}, expected [{', '.join(axes)}]")
    tokens = _Tokens(name, array.shape[:3])
    given = {other: _as_array(other, value) for other, value in others.items() if value is not None}
    for other, array_ in given.items():
        # before the axes are merged: after it, [2, 3, length] and [3, 2, length] would pass for equal
        _same_shape(other, array_, tokens)
    batch, choices = array.shape[:2]
    given[name] = array
    rows = {other: array_.reshape(batch * choices, *array_.shape[2:]) for other, array_ in given.items()}
    return (batch, choices), {"input_ids": None, **rows}


class _Tokens(NamedTuple):
    """What the other inputs must agree with: the input that holds the tokens, and their shape [batch, length]."""

    name: str
    shape: tuple[int, ...]


def _only_one(input_ids: Any, inputs_embeds: Any) -> tuple[str, Any, tuple[str, ...]]:
    """The input that holds the tokens: its name, itself and its axes."""
    if (input_ids is None) == (inputs_embeds is None):
        raise InputError("pass either input_ids or inputs_embeds, one of the two")
    if inputs_embeds is None:
        return "input_ids", input_ids, ("batch", "length")
    return "inputs_embeds", inputs_embeds, ("batch", "length", "hidden")


def _check_tokens(config: BertConfig, input_ids: Any, inputs_embeds: Any) -> _Tokens:
    """Checks rank and shape of the ids or the embeddings; the ids' values are checked with those of the others."""
    name, value, axes = _only_one(input_ids, inputs_embeds)
    array = _as_array(name, value)
    if array.ndim != len(axes):
        hint = f"; add the batch axis with {name}[None]" if array.ndim == len(axes) - 1 else ""
        raise InputError(f"{name} has shape {array.shape}, expected [{', '.join(axes)}]{hint}")
    if array.shape[1] == 0:
        raise InputError(f"{name} has shape {array.shape}: there are no tokens")
    if inputs_embeds is not None:
        if array.shape[2] != config.hidden_size:
            raise InputError(f"{name} has shape {array.shape}, the model's hidden size is {config.hidden_size}")
        if not jnp.issubdtype(array.dtype, jnp.floating):
            raise InputError(f"{name} has dtype {array.dtype}, expected floats")
    return _Tokens(name, array.shape[:2])


def _as_array(name: str, value: Any) -> Any:
    """A numpy array, a JAX array or a tracer; lists become numpy arrays."""
    if isinstance(value, jax.Array | np.ndarray):
        return value
    try:
        return np.asarray(value)
    except ValueError:
        raise InputError(f"{name} is ragged; pad its rows to one length") from None


def _cast(array: Any, dtype: Any) -> Any:
    """An array of that dtype. On the host it stays there: a compiled function moves it faster than JAX's `asarray`."""
    return np.asarray(array, dtype) if isinstance(array, np.ndarray) else jnp.asarray(array, dtype)


def _same_shape(name: str, array: Any, tokens: _Tokens) -> None:
    if array.shape != tokens.shape:
        aside = "" if tokens.name == "input_ids" else " without its last axis"
        raise InputError(f"{name} has shape {array.shape}, {tokens.name}{aside} has {tokens.shape}; they must be equal")


def _check_ids(name: str, value: Any, tokens: _Tokens, limit: int) -> jax.Array | np.ndarray | None:
    if value is None:
        return None
    array = _as_array(name, value)
    _same_shape(name, array, tokens)
    _refuse_other_than_integers(name, array)
    if _has_values(array):
        host = np.asarray(array)
        if host.size and (host.min() < 0 or host.max() >= limit):
            _refuse_first(name, host, (host < 0) | (host >= limit), f"outside 0..{limit - 1}")
    return _cast(array, np.int32)


def _check_mask(value: Any, tokens: _Tokens) -> jax.Array | np.ndarray:
    mask = _as_array("attention_mask", value)
    _same_shape("attention_mask", mask, tokens)
    if isinstance(mask, jax.core.Tracer) and jnp.issubdtype(mask.dtype, jnp.floating):
        # It may be one to be added to the scores, 0 where a token is seen: the opposite of what is meant here.
        raise InputError(f"attention_mask has dtype {mask.dtype}; inside jit pass 0/1 as bool or as integers")
    if _has_values(mask):
        host = np.asarray(mask)
        _refuse_first("attention_mask", host, (host != 0) & (host != 1), "neither 0 nor 1")
        empty = ~(host != 0).any(axis=1)
        if empty.any():
            raise InputError(f"attention_mask row {int(empty.argmax())} is all padding; leave such rows out")
    return _cast(mask, bool)


def _check_head_mask(value: Any, config: BertConfig) -> jax.Array:
    layers, heads = config.num_hidden_layers, config.num_attention_heads
    mask = _check_numbers("head_mask", value, ((heads,), (layers, heads)))
    if _has_values(mask):
        host = np.asarray(mask, np.float32)
        _refuse_first("head_mask", host, ~np.isfinite(host), "not finite")
    return jnp.broadcast_to(jnp.asarray(mask, jnp.float32), (layers, heads))


def _check_numbers(name: str, value: Any, shapes: tuple[tuple[int, ...], ...]) -> Any:
    """An array of one of the shapes, of floats, integers or booleans."""
    array = _as_array(name, value)
    if array.shape not in shapes:
        raise InputError(f"{name} has shape {array.shape}, expected {' or '.join(map(str, shapes))}")
    if not any(jnp.issubdtype(array.dtype, kind) for kind in (jnp.floating, jnp.integer, jnp.bool_)):
        raise InputError(f"{name} has dtype {array.dtype}, expected numbers")
    return array


def _check_integers(name: str, value: Any, shape: tuple[int, ...]) -> Any:
    array = _as_array(name, value)
    if array.shape != shape:
        raise InputError(f"{name} has shape {array.shape}, expected {shape}")
    _refuse_other_than_integers(name, array)
    return array


def _refuse_other_than_integers(name: str, array: Any) -> None:
    if not jnp.issubdtype(array.dtype, jnp.integer):
        raise InputError(f"{name} has dtype {array.dtype}, expected integers")


def _has_values(array: Any) -> bool:
    """Whether an array can be looked into: it is not being traced, and all of it is on this process's devices."""
    return not isinstance(array, jax.core.Tracer) and getattr(array, "is_fully_addressable", True)


def _check_runs(segments: Any) -> None:
    """Refuses a segment whose tokens do not stand together: they would see one another across what is between."""
    if segments.ndim != 2 or not _has_values(segments):
        return
    host = np.asarray(segments)
    starts = host != 0
    starts[:, 1:] &= host[:, 1:] != host[:, :-1]
    rows, columns = np.nonzero(starts)
    order = np.lexsort((columns, host[starts], rows))
    ids, row = host[starts][order], rows[order]
    again = np.flatnonzero((row[1:] == row[:-1]) & (ids[1:] == ids[:-1])) + 1
    if again.size:
        where = order[again[0]]
        raise InputError(
            f"segment_ids[{rows[where]}, {columns[where]}] is {host[rows[where], columns[where]]} again, after another "
            "segment; the tokens of a segment stand together"
        )


def _check_segment_lengths(segments: Any, positions: int) -> None:
    """Refuses a segment that is longer than the model has positions."""
    if segments.ndim != 2 or not _has_values(segments):
        return
    host = np.asarray(segments)
    if host.shape[1] > positions:
        # A run of more than `positions` equal ids: equal ends, and no change in between.
        changes = np.cumsum(host[:, 1:] != host[:, :-1], axis=1)
        changes = np.pad(changes, ((0, 0), (1, 0)))
        too_long = (changes[:, positions:] == changes[:, :-positions]) & (host[:, positions:] != 0)
        if too_long.any():
            row, column = (int(i) for i in np.argwhere(too_long)[0])
            raise InputError(
                f"segment_ids: the segment at [{row}, {column}] is longer than the model's {positions} positions"
            )


def _check_positions_count(positions: jax.Array | None, mask: jax.Array | None, segments: jax.Array | None) -> None:
    """Refuses positions whose differences are not the tokens' distances; those of padding are nobody's business."""
    if positions is None or not all(given is None or _has_values(given) for given in (positions, mask, segments)):
        return
    host = np.asarray(positions)
    text = np.ones_like(host) if segments is None else np.asarray(segments)
    seen = (text != 0) if mask is None else (text != 0) & np.asarray(mask)
    rows, columns = np.nonzero(seen)
    text, start = text[seen], host[seen] - columns
    jumps = (rows[1:] == rows[:-1]) & (text[1:] == text[:-1]) & (start[1:] != start[:-1])
    bad = np.zeros(host.shape, bool)
    bad[rows[1:], columns[1:]] = jumps
    _refuse_first("position_ids", host, bad, "but the model's positions are relative and count tokens; leave them out")


def _refuse_first(name: str, host: np.ndarray, bad: np.ndarray, why: str) -> None:
    if bad.any():
        place = tuple(int(i) for i in np.argwhere(bad)[0])
        raise InputError(f"{name}{list(place)} is {host[place]}, {why}")
