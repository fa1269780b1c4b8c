"""Checks what a caller passes to a model, on the host, before anything is compiled or run.

A JAX gather does not fail on an id that is out of range, it returns something else; so ranges are checked here, with
the position of the first offender. Inside a caller's own `jit`, `grad` or `vmap` values do not exist yet: there shapes
and dtypes are checked, and values are the caller's business.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bertjax.config import BertConfig
from bertjax.errors import InputError


def check_inputs(
    config: BertConfig,
    input_ids: Any,
    attention_mask: Any = None,
    token_type_ids: Any = None,
    position_ids: Any = None,
    segment_ids: Any = None,
) -> dict[str, jax.Array | None]:
    """Checks the inputs of a BERT encoder and returns them as arrays.

    Args:
        config: the model's configuration.
        input_ids: int [batch, length], token ids.
        attention_mask: 0/1 or bool [batch, length]; 0 marks padding, which no token may attend to.
        token_type_ids: int [batch, length].
        position_ids: int [batch, length]. Relative positions are distances in the row, so there the ids of a text can
            only count up one by one, which leaves them without effect.
        segment_ids: int [batch, length]; tokens attend only to tokens of their own segment. 0 marks padding.

    Returns:
        The same names; what was not given is None. Ids are int32, the mask is bool.

    Raises:
        InputError: a rank, shape, dtype or value is not usable; says which, and at which position.
    """
    ids = _as_array("input_ids", input_ids)
    if ids.ndim != 2:
        hint = "; add the batch axis with input_ids[None]" if ids.ndim == 1 else ""
        raise InputError(f"input_ids has shape {ids.shape}, expected [batch, length]{hint}")
    if ids.shape[1] == 0:
        raise InputError(f"input_ids has shape {ids.shape}: there are no tokens")
    if position_ids is None and segment_ids is None and ids.shape[1] > config.max_position_embeddings:
        raise InputError(
            f"input_ids is {ids.shape[1]} tokens long, the model has {config.max_position_embeddings} positions; "
            "truncate the text or split it"
        )
    if position_ids is None and segment_ids is not None:
        _check_segment_lengths(_as_array("segment_ids", segment_ids), config.max_position_embeddings)
    mask = None if attention_mask is None else _check_mask(attention_mask, ids.shape)
    inputs = {
        "input_ids": _check_ids("input_ids", ids, ids.shape, config.vocab_size),
        "attention_mask": mask,
        "token_type_ids": _check_ids("token_type_ids", token_type_ids, ids.shape, config.type_vocab_size),
        "position_ids": _check_ids("position_ids", position_ids, ids.shape, config.max_position_embeddings),
        "segment_ids": _check_ids("segment_ids", segment_ids, ids.shape, np.iinfo(np.int32).max),
    }
    if config.position_embedding_type != "absolute":
        _check_positions_count(inputs["position_ids"], mask, inputs["segment_ids"])
    return inputs


def flatten_choices(input_ids: Any, **others: Any) -> tuple[tuple[int, int], dict[str, Any]]:
    """Makes a row of every choice of a multiple-choice batch.

    Args:
        input_ids: int [batch, choices, length].
        **others: other inputs by name, each of the same shape or None.

    Returns:
        The batch size and the number of choices, and the inputs as [batch * choices, length].

    Raises:
        InputError: a rank or a shape is not usable.
    """
    ids = _as_array("input_ids", input_ids)
    if ids.ndim != 3:
        raise InputError(f"input_ids has shape {ids.shape}, expected [batch, choices, length]")
    given = {name: _as_array(name, value) for name, value in others.items() if value is not None}
    for name, array in given.items():
        # before the axes are merged: after it, [2, 3, length] and [3, 2, length] would pass for equal
        _same_shape(name, array, ids.shape)
    batch, choices, length = ids.shape
    rows = {name: array.reshape(batch * choices, length) for name, array in {"input_ids": ids, **given}.items()}
    return (batch, choices), rows


def _as_array(name: str, value: Any) -> Any:
    """A numpy array, a JAX array or a tracer; lists become numpy arrays."""
    if isinstance(value, jax.Array | np.ndarray):
        return value
    try:
        return np.asarray(value)
    except ValueError:
        raise InputError(f"{name} is ragged; pad its rows to one length") from None


def _same_shape(name: str, array: Any, shape: tuple[int, ...]) -> None:
    if array.shape != shape:
        raise InputError(f"{name} has shape {array.shape}, input_ids has {shape}; they must be equal")


def _check_ids(name: str, value: Any, shape: tuple[int, ...], limit: int) -> jax.Array | None:
    if value is None:
        return None
    array = _as_array(name, value)
    _same_shape(name, array, shape)
    if not jnp.issubdtype(array.dtype, jnp.integer):
        raise InputError(f"{name} has dtype {array.dtype}, expected integers")
    if _has_values(array):
        host = np.asarray(array)
        _refuse_first(name, host, (host < 0) | (host >= limit), f"outside 0..{limit - 1}")
    return jnp.asarray(array, jnp.int32)


def _check_mask(value: Any, shape: tuple[int, ...]) -> jax.Array:
    mask = _as_array("attention_mask", value)
    _same_shape("attention_mask", mask, shape)
    if isinstance(mask, jax.core.Tracer) and jnp.issubdtype(mask.dtype, jnp.floating):
        # It may be one to be added to the scores, 0 where a token is seen: the opposite of what is meant here.
        raise InputError(f"attention_mask has dtype {mask.dtype}; inside jit pass 0/1 as bool or as integers")
    if _has_values(mask):
        host = np.asarray(mask)
        _refuse_first("attention_mask", host, (host != 0) & (host != 1), "neither 0 nor 1")
        empty = ~(host != 0).any(axis=1)
        if empty.any():
            raise InputError(f"attention_mask row {int(empty.argmax())} is all padding; leave such rows out")
    return jnp.asarray(mask, bool)


def _has_values(array: Any) -> bool:
    """Whether an array can be looked into: it is not being traced, and all of it is on this process's devices."""
    return not isinstance(array, jax.core.Tracer) and getattr(array, "is_fully_addressable", True)


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
        row, column = (int(i) for i in np.argwhere(bad)[0])
        raise InputError(f"{name}[{row}, {column}] is {host[row, column]}, {why}")
