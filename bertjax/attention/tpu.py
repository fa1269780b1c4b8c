"""Attention by a Pallas kernel, on TPUs.

JAX's own TPU kernels read [batch, heads, length, head_dim]. From what a dense layer returns that is a transposition
away, and heads of 64 numbers then fill half a vector register; XLA made seven copies of it in every layer. This kernel
reads queries, keys and values as they are, [batch, length, hidden], a few heads side by side in 128 lanes: a query with
the other heads' lanes set to 0 gives its own head's scores, and of a product with the values the own lanes are kept.
The matrix unit is 128 wide, so neither costs more than a head alone would.

All keys of a row are in fast memory at once, which suits rows of up to about a thousand tokens. The softmax is thus an
ordinary one, and the backward pass computes it again from queries and keys instead of keeping anything.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from bertjax.attention.segments import Segments
from bertjax.attention.tpu_only import tpu_only

_LANES = 128  # of a vector register; lengths are padded to a multiple of it
_BLOCK_BYTES = 3 << 20  # for the blocks of one step, which are there twice: a v5e has 16 MiB for a kernel
_SCORES = {"forward": 512 * 512, "backward": 256 * 512}  # of one head at a time; backward there are three of them

Ids = tuple[jax.Array, jax.Array] | None


def attend_tpu(query: jax.Array, key: jax.Array, value: jax.Array, segments: Segments) -> jax.Array:
    """See `bertjax.attention.attend`."""
    batch, queries, heads, head_dim = query.shape
    q, k, v = (_padded(x.reshape(*x.shape[:2], heads * head_dim)) for x in (query, key, value))
    ids = _ids(segments, batch, queries, key.shape[1])
    return _attend(q, k, v, ids, head_dim)[:, :queries].reshape(query.shape)


def _padded(x: jax.Array, fill: int = 0) -> jax.Array:
    """[batch, length, ...] with the length filled up to full vector registers."""
    extra = -x.shape[1] % _LANES
    return jnp.pad(x, [(0, 0), (0, extra)] + [(0, 0)] * (x.ndim - 2), constant_values=fill) if extra else x


def _ids(segments: Segments, batch: int, queries: int, keys: int) -> Ids:
    """The segments as the kernel compares them: int32 [batch, queries, 1] and [batch, 1, keys]; None: all are seen."""
    if segments.query is None and segments.key is None and keys % _LANES == 0:
        return None
    query = jnp.ones((batch, queries), jnp.int32) if segments.query is None else segments.query
    key = jnp.ones((batch, keys), jnp.int32) if segments.key is None else segments.key
    return _padded(query)[:, :, None], _padded(key, fill=-1)[:, None, :]


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _attend(query: jax.Array, key: jax.Array, value: jax.Array, ids: Ids, head_dim: int) -> jax.Array:
    """Attention of [batch, length, hidden], lengths multiples of 128, to the same shape as `query`."""
    tiling = _Tiling.of(query, key, head_dim, "forward")
    return _call(_forward, tiling, (query, key, value), ids, ("query",))[0]


def _attend_forward(query, key, value, ids, head_dim):
    return _attend(query, key, value, ids, head_dim), (query, key, value, ids)


def _attend_backward(head_dim, saved, slope):
    query, key, value, ids = saved
    tiling = _Tiling.of(query, key, head_dim, "backward")
    return *_call(_backward, tiling, (query, key, value, slope), ids, ("query", "key", "key")), None


_attend.defvjp(_attend_forward, _attend_backward)


@dataclasses.dataclass(frozen=True)
class _Tiling:
    """How the work is divided.

    Attributes:
        head_dim: width of one head.
        lanes: the width of the heads that are computed side by side.
        width: that of the heads in a block, a multiple of it.
        rows: rows of the batch in a block.
        queries: queries in a block.
        keys: all of the keys.
    """

    head_dim: int
    lanes: int
    width: int
    rows: int
    queries: int
    keys: int

    @classmethod
    def of(cls, query: jax.Array, key: jax.Array, head_dim: int, direction: str) -> "_Tiling":
        """The largest blocks that fit: fewer steps lose less time between them."""
        batch, length, hidden = query.shape
        keys = key.shape[1]
        lanes = math.lcm(_LANES, head_dim)
        lanes = lanes if hidden % lanes == 0 else hidden
        queries = max(
            n for n in _divisors(length) if n == _LANES or (n % _LANES == 0 and n * keys <= _SCORES[direction])
        )
        count = {"forward": (2, 2), "backward": (3, 4)}[direction]  # blocks along the queries and along the keys
        column = (count[0] * queries + count[1] * keys) * query.dtype.itemsize
        widths = [n * lanes for n in _divisors(hidden // lanes)]
        width = max(n for n in widths if n == lanes or n * column <= _BLOCK_BYTES)
        rows = max(n for n in _divisors(batch) if n == 1 or n * width * column <= _BLOCK_BYTES)
        return cls(head_dim, lanes, width, rows, queries, keys)


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]


def _call(kernel, tiling: _Tiling, arrays: tuple[jax.Array, ...], ids: Ids, results: tuple[str, ...]):
    """Runs a kernel over all blocks.

    Args:
        kernel: `_forward` or `_backward`.
        tiling: the blocks.
        arrays: query, key, value and, backward, the slope of the result.
        ids: see `_ids`.
        results: which shape each result has, that of the "query" or that of the "key".
    """
    query, key = arrays[:2]
    batch, length, hidden = query.shape
    # The first axis of the grid varies slowest. Blocks along the keys stay while the queries pass.
    blocks = {
        "query": pl.BlockSpec((tiling.rows, tiling.queries, tiling.width), lambda row, part, step: (row, step, part)),
        "key": pl.BlockSpec((tiling.rows, tiling.keys, tiling.width), lambda row, part, step: (row, 0, part)),
    }
    specs = [blocks[name] for name in ("query", "key", "key", "query")[: len(arrays)]]
    if ids is not None:
        specs.append(pl.BlockSpec((tiling.rows, tiling.queries, 1), lambda row, part, step: (row, step, 0)))
        specs.append(pl.BlockSpec((tiling.rows, 1, tiling.keys), lambda row, part, step: (row, 0, 0)))
    sums = [pltpu.VMEM((tiling.rows, tiling.keys, tiling.width), jnp.float32) for name in results if name == "key"]
    shapes = {"query": query.shape, "key": key.shape}
    return pl.pallas_call(
        functools.partial(kernel, tiling),
        grid=(batch // tiling.rows, hidden // tiling.width, length // tiling.queries),
        in_specs=specs,
        out_specs=[blocks[name] for name in results],
        out_shape=[jax.ShapeDtypeStruct(shapes[name], query.dtype) for name in results],
        scratch_shapes=sums,
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
        name=f"attention{kernel.__name__}",
    )(tpu_only(query), *arrays[1:], *(() if ids is None else ids))


def _each_part(tiling: _Tiling, refs, compute) -> None:
    """Calls `compute(index, mask)` for every row and every `lanes` of a block, where `ref[index]` are these."""

    def one(row: jax.Array, part: jax.Array) -> None:
        start = 0 if tiling.width == tiling.lanes else pl.multiple_of(part * tiling.lanes, tiling.lanes)
        mask = refs[0][row] == refs[1][row] if refs else None
        compute((row, slice(None), pl.ds(start, tiling.lanes)), mask)

    @pl.loop(0, tiling.rows)
    def _(row):
        @pl.loop(0, tiling.width // tiling.lanes)
        def _(part):
            one(row, part)


def _heads(tiling: _Tiling) -> list[jax.Array]:
    """For each head in these lanes, which of them are its own: float32 [1, lanes] of 0 and 1."""
    lane = lax.broadcasted_iota(jnp.int32, (1, tiling.lanes), 1)
    starts = range(0, tiling.lanes, tiling.head_dim)
    return [((lane >= start) & (lane < start + tiling.head_dim)).astype(jnp.float32) for start in starts]


def _dot(a: jax.Array, b: jax.Array, *, transpose: bool = False) -> jax.Array:
    """a b or a b^T, accumulated in float32."""
    # Said outright, because a caller's `jax.default_matmul_precision` would reach into the kernel.
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else lax.Precision.DEFAULT
    dims = (((1,), (1 if transpose else 0,)), ((), ()))
    return lax.dot_general(a, b, dims, precision=precision, preferred_element_type=jnp.float32)


def _weights(query: jax.Array, key: jax.Array, mask: jax.Array | None, head_dim: int) -> tuple[jax.Array, jax.Array]:
    """exp(scores - max), float32 [queries, keys], and its sums [queries, 1]."""
    scores = _dot(query, key, transpose=True) * (head_dim**-0.5)
    if mask is not None:
        scores = jnp.where(mask, scores, jnp.finfo(jnp.float32).min)
    weights = jnp.exp(scores - scores.max(axis=1, keepdims=True))
    return weights, weights.sum(axis=1, keepdims=True)


def _forward(tiling: _Tiling, query_ref, key_ref, value_ref, *refs) -> None:
    def compute(index, mask):
        query, key, value = query_ref[index], key_ref[index], value_ref[index]
        context = jnp.zeros(query.shape, jnp.float32)
        for own in _heads(tiling):
            weights, total = _weights(query * own.astype(query.dtype), key, mask, tiling.head_dim)
            context += _dot(weights.astype(value.dtype), value) / total * own
        context_ref[index] = context.astype(query.dtype)

    *ids, context_ref = refs
    _each_part(tiling, ids, compute)


def _backward(tiling: _Tiling, query_ref, key_ref, value_ref, slope_ref, *refs) -> None:
    def compute(index, mask):
        query, key, value, slope = query_ref[index], key_ref[index], value_ref[index], slope_ref[index]
        dtype = query.dtype
        dq = jnp.zeros(query.shape, jnp.float32)
        dk = jnp.zeros(key.shape, jnp.float32)
        dv = jnp.zeros(key.shape, jnp.float32)
        for own in _heads(tiling):
            own_query, own_slope = query * own.astype(dtype), slope * own.astype(dtype)
            weights, total = _weights(own_query, key, mask, tiling.head_dim)
            weights = weights / total
            dweights = _dot(own_slope, value, transpose=True)
            dscores = weights * (dweights - (weights * dweights).sum(axis=1, keepdims=True))
            dscores = dscores * (tiling.head_dim**-0.5)
            dq += _dot(dscores.astype(dtype), key) * own
            dk += _dot(dscores.T.astype(dtype), own_query)
            dv += _dot(weights.T.astype(dtype), own_slope)
        dq_ref[index] = dq.astype(dtype)
        dk_sum[index] += dk
        dv_sum[index] += dv

    *ids, dq_ref, dk_ref, dv_ref, dk_sum, dv_sum = refs

    @pl.when(pl.program_id(2) == 0)
    def _clear():
        dk_sum[...] = jnp.zeros_like(dk_sum)
        dv_sum[...] = jnp.zeros_like(dv_sum)

    _each_part(tiling, ids, compute)

    @pl.when(pl.program_id(2) == pl.num_programs(2) - 1)
    def _store():
        dk_ref[...] = dk_sum[...].astype(dk_ref.dtype)
        dv_ref[...] = dv_sum[...].astype(dv_ref.dtype)
