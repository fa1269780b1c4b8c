"""The parts of a BERT: embeddings, self-attention, feed-forward, one encoder layer, pooler and masked-LM head.

Everything between two matmuls is computed in float32: matmuls take inputs in the compute dtype and accumulate in
float32, and the residual stream, LayerNorm, GELU and softmax stay there. Lower precision thus means inputs, not
accumulators. A layer that is given states in bfloat16 also returns such, and rounds to it what is written to memory in
between: the results of dense layers and of LayerNorms, and what comes back for these in the backward pass. LayerNorm,
softmax, GELU and whatever is summed up over features or tokens are in float32 all the same.

Dropout needs no hidden state: a call that is given a random key drops, one that is not does not.
"""

import contextlib
import contextvars
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from bertjax.activations import ACTIVATION_FUNCTIONS, activation
from bertjax.attention import Segments, attend, relative_bias
from bertjax.config import BertConfig
from bertjax.int8 import Int8Linear, dtype_of_attention, dtype_within, is_int8
from bertjax.layer_norm import layer_norm
from bertjax.matmul import dense, dense_columns, matmul
from bertjax.platforms import on_platform

DType = jax.typing.DTypeLike


_shapes_only = contextvars.ContextVar("shapes_only", default=False)


@contextlib.contextmanager
def shapes_only() -> Iterator[None]:
    """Within it, new parameters are zeros: tracing how they are drawn takes as long as reading a model's file."""
    token = _shapes_only.set(True)
    try:
        yield
    finally:
        _shapes_only.reset(token)


def _initializer(stddev: float) -> nnx.Initializer:
    """A normal distribution cut at two standard deviations, as in the BERT paper's code."""
    return nnx.initializers.zeros if _shapes_only.get() else nnx.initializers.truncated_normal(stddev)


class Linear(nnx.Linear):
    """A dense layer with a kernel [in, out]; see `bertjax.matmul.dense`."""

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps float [..., in] to float32 [..., out], or bfloat16 to bfloat16."""
        return dense(x, self.kernel[...], None if self.bias is None else self.bias[...], self.dtype)


def linear(
    in_features: int,
    out_features: int,
    *,
    dtype: DType,
    param_dtype: DType,
    initializer_range: float,
    use_bias: bool = True,
    rngs: nnx.Rngs,
) -> Linear:
    """A `Linear` that multiplies in `dtype`, with an initial kernel as in the BERT paper's code."""
    return Linear(
        in_features,
        out_features,
        use_bias=use_bias,
        dtype=dtype,
        param_dtype=param_dtype,
        kernel_init=_initializer(initializer_range),
        rngs=rngs,
    )


def _dense(
    in_features: int, out_features: int, config: BertConfig, *, dtype: DType, param_dtype: DType, rngs: nnx.Rngs
) -> Linear | Int8Linear:
    """`linear` with the configuration's initial kernels, or the same in int8."""
    if is_int8(dtype):
        return Int8Linear(in_features, out_features, kernel_init=_initializer(config.initializer_range), rngs=rngs)
    options = {"dtype": dtype, "param_dtype": param_dtype, "initializer_range": config.initializer_range}
    return linear(in_features, out_features, rngs=rngs, **options)


def _square(config: BertConfig, **options: Any) -> Linear | Int8Linear:
    """A dense layer from the hidden axis to itself."""
    return _dense(config.hidden_size, config.hidden_size, config, **options)


def dropout(x: jax.Array, rate: float, key: jax.Array | None) -> jax.Array:
    """Zeroes entries with probability `rate` and scales the rest by 1 / (1 - rate); without a key, returns x."""
    return nnx.Dropout(rate, deterministic=key is None)(x, rngs=key)


def embedding(rows: int, features: int, *, param_dtype: DType, initializer_range: float, rngs: nnx.Rngs) -> nnx.Embed:
    """A table [rows, features], drawn as the kernels of `linear` are."""
    return nnx.Embed(
        rows,
        features,
        param_dtype=param_dtype,
        embedding_init=_initializer(initializer_range),
        rngs=rngs,
    )


def _look_up(table: nnx.Embed, ids: jax.Array) -> jax.Array:
    """Maps int [batch, length] to [batch, length, hidden], laid out over devices as the ids are.

    On a mesh whose axes are explicit, JAX does not choose the layout of a gather's result but wants to be told.
    """
    sharding = jax.typeof(ids).sharding
    if AxisType.Explicit not in sharding.mesh.axis_types:
        return table(ids)
    return table(ids, out_sharding=NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec, None)))


def _split(key: jax.Array | None, count: int) -> list[jax.Array | None]:
    return [None] * count if key is None else list(jax.random.split(key, count))


class BertEmbeddings(nnx.Module):
    """Sum of word, position and token-type embeddings, then LayerNorm and dropout.

    Where positions are relative, the table of positions is kept, as checkpoints have it, but not added.
    """

    def __init__(self, config: BertConfig, *, dtype: DType, param_dtype: DType, rngs: nnx.Rngs):
        def table(rows: int) -> nnx.Embed:
            return embedding(
                rows,
                config.hidden_size,
                param_dtype=param_dtype,
                initializer_range=config.initializer_range,
                rngs=rngs,
            )

        self.word_embeddings = table(config.vocab_size)
        self.position_embeddings = table(config.max_position_embeddings)
        self.token_type_embeddings = table(config.type_vocab_size)
        self.layer_norm = layer_norm(config, dtype, param_dtype, rngs)
        self.pad_token_id = config.pad_token_id
        self.adds_positions = config.position_embedding_type == "absolute"
        self.dropout_rate = config.hidden_dropout_prob

    def __call__(
        self,
        input_ids: jax.Array | None,
        token_type_ids: jax.Array,
        position_ids: jax.Array,
        dropout_key: jax.Array | None = None,
        *,
        inputs_embeds: jax.Array | None = None,
    ) -> jax.Array:
        """Maps ids, each int [batch, length], to float32 [batch, length, hidden].

        `inputs_embeds`, float32 [batch, length, hidden], stands in for the word embeddings of `input_ids`.
        """
        # Rows are cast after they are looked up: casting the tables would touch every row of the vocabulary.
        words = self._words(input_ids) if inputs_embeds is None else inputs_embeds
        types = _look_up(self.token_type_embeddings, token_type_ids).astype(jnp.float32)
        total = words + types
        if self.adds_positions:
            total = total + _look_up(self.position_embeddings, position_ids).astype(jnp.float32)
        return dropout(self.layer_norm(total), self.dropout_rate, dropout_key)

    def _words(self, input_ids: jax.Array) -> jax.Array:
        words = _look_up(self.word_embeddings, input_ids).astype(jnp.float32)
        if self.pad_token_id is None:
            return words
        # As in the reference, no token of padding teaches its embedding anything, not even where it is scored.
        return jnp.where((input_ids == self.pad_token_id)[..., None], lax.stop_gradient(words), words)


class BertSelfAttention(nnx.Module):
    """Multi-head self-attention and its output projection, without the residual."""

    def __init__(self, config: BertConfig, *, dtype: DType, param_dtype: DType, rngs: nnx.Rngs):
        options = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.query = _square(config, **options)
        self.key = _square(config, **options)
        self.value = _square(config, **options)
        self.output = _square(config, **options)
        self.position_embedding_type = config.position_embedding_type
        if self.position_embedding_type != "absolute":
            self.distance_embedding = embedding(
                2 * config.max_position_embeddings - 1,
                config.head_dim,
                param_dtype=param_dtype,
                initializer_range=config.initializer_range,
                rngs=rngs,
            )
        self.num_heads = config.num_attention_heads
        self.dropout_rate = config.attention_probs_dropout_prob
        self.dtype = dtype_of_attention(dtype)

    def __call__(
        self,
        x: jax.Array,
        segments: Segments,
        dropout_key: jax.Array | None,
        return_weights: bool,
        head_mask: jax.Array | None,
        backend: str,
    ) -> tuple[jax.Array, jax.Array | None]:
        """Maps [batch, length, hidden] to the same shape and dtype, and to weights [batch, heads, length, length].

        `head_mask`, float32 [heads], multiplies the weights of each head. `segments` and `backend`: see `attend`.
        """
        parts = (self.query, self.key, self.value)
        # Made one product on a GPU, the three would have to be taken apart again, at half the price of the product.
        inputs = [x] * 3 if x.dtype == jnp.float32 else lax.optimization_barrier([x] * 3)
        query, key, value = (self._heads(*each, backend) for each in zip(parts, inputs, strict=True))
        context, weights = attend(
            query,
            key,
            value,
            segments,
            self._bias(query, key),
            backend=backend,
            dropout_rate=self.dropout_rate,
            dropout_key=dropout_key,
            return_weights=return_weights,
        )
        if head_mask is not None:
            # All weights of a head share one factor, which may as well come after their product with the values.
            context = context.astype(jnp.float32) * head_mask.reshape(1, 1, -1, 1)
            weights = None if weights is None else weights * head_mask.reshape(1, -1, 1, 1)
        return self.output(context.reshape(x.shape).astype(x.dtype)), weights

    def _heads(self, project: Callable[[jax.Array], jax.Array], x: jax.Array, backend: str) -> jax.Array:
        """A projection of x, [batch, length, heads, head_dim] in the dtype of attention."""
        rows, sizes = x.shape[:-1], (self.num_heads, x.shape[-1] // self.num_heads)
        if backend != "xla" or type(project) is not Linear:
            return project(x).astype(self.dtype).reshape(*rows, *sizes)

        def by_rows(x: jax.Array, kernel: jax.Array, bias: jax.Array) -> jax.Array:
            return dense(x, kernel, bias, project.dtype).astype(self.dtype).reshape(*rows, *sizes)

        def by_columns(x: jax.Array, kernel: jax.Array, bias: jax.Array) -> jax.Array:
            columns = dense_columns(x, kernel, bias, project.dtype).astype(self.dtype)
            return columns.reshape(*sizes, *rows).transpose(2, 3, 0, 1)

        # For a TPU, XLA wants a head's numbers across the lanes, and would copy all of them to have it so.
        return on_platform(by_rows, tpu=by_columns)(x, project.kernel[...], project.bias[...])

    def _bias(self, query: jax.Array, key: jax.Array) -> jax.Array | None:
        """What relative positions add to the scores, float32 [batch, heads, length, length]."""
        if self.position_embedding_type == "absolute":
            return None
        with_keys = self.position_embedding_type == "relative_key_query"
        return relative_bias(query, key, self.distance_embedding.embedding[...], with_keys=with_keys)


class BertFeedForward(nnx.Module):
    """The position-wise feed-forward block, without the residual."""

    def __init__(self, config: BertConfig, *, dtype: DType, param_dtype: DType, rngs: nnx.Rngs):
        options = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.intermediate = _dense(config.hidden_size, config.intermediate_size, config, **options)
        self.output = _dense(config.intermediate_size, config.hidden_size, config, **options)
        self.activation = config.hidden_act
        self.dtype = dtype_within(dtype)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps [batch, length, hidden] to the same shape and dtype."""
        wide = self.intermediate(x).astype(jnp.float32)
        hidden = activation(self.activation, self.dtype)(wide).astype(self.dtype)
        # For a TPU, XLA would pull both into the next matmul, and compute them anew for each of its tiles.
        hidden = lax.platform_dependent(hidden, tpu=lax.optimization_barrier, default=lambda hidden: hidden)
        return self.output(hidden.astype(x.dtype))


class BertLayer(nnx.Module):
    """One encoder layer: attention and feed-forward, each followed by dropout, residual and LayerNorm (post-LN)."""

    def __init__(self, config: BertConfig, *, dtype: DType, param_dtype: DType, rngs: nnx.Rngs):
        self.attention = BertSelfAttention(config, dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        self.attention_norm = layer_norm(config, dtype, param_dtype, rngs)
        self.feed_forward = BertFeedForward(config, dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        self.feed_forward_norm = layer_norm(config, dtype, param_dtype, rngs)
        self.dropout_rate = config.hidden_dropout_prob

    def __call__(
        self,
        x: jax.Array,
        segments: Segments,
        dropout_key: jax.Array | None = None,
        return_weights: bool = False,
        head_mask: jax.Array | None = None,
        backend: str = "xla",
    ) -> tuple[jax.Array, jax.Array | None]:
        """Maps [batch, length, hidden] to the same shape and dtype, and to weights [batch, heads, length, length].

        What stands between two products is in the dtype of `x`: float32, or bfloat16 where that is what is multiplied.
        """
        attention_key, hidden_key, output_key = _split(dropout_key, 3)
        attended, weights = self.attention(x, segments, attention_key, return_weights, head_mask, backend)
        x = self._add(self.attention_norm, x, attended, hidden_key)
        return self._add(self.feed_forward_norm, x, self.feed_forward(x), output_key), weights

    def _add(self, norm: nnx.LayerNorm, x: jax.Array, more: jax.Array, dropout_key: jax.Array | None) -> jax.Array:
        """Dropout, residual and LayerNorm."""
        more = dropout(more.astype(jnp.float32), self.dropout_rate, dropout_key)
        y = norm(x.astype(jnp.float32) + more).astype(x.dtype)
        # Without the barrier XLA takes two casts that cancel out for none, and computes y anew in float32 for the next.
        return y if y.dtype == jnp.float32 else lax.optimization_barrier(y)


class BertPooler(nnx.Module):
    """tanh(W h + b) of a text's first position, [CLS]: what BERT pre-trained for next-sentence prediction."""

    def __init__(self, config: BertConfig, *, dtype: DType, param_dtype: DType, rngs: nnx.Rngs):
        self.dense = _square(config, dtype=dtype, param_dtype=param_dtype, rngs=rngs)

    def __call__(self, first: jax.Array) -> jax.Array:
        """Maps the states of first positions, float32 [..., hidden], to the same shape."""
        return jnp.tanh(self.dense(first))


class BertPredictionTransform(nnx.Module):
    """What the masked-LM head does to a hidden state before it compares it with every word."""

    def __init__(self, config: BertConfig, *, dtype: DType, param_dtype: DType, rngs: nnx.Rngs):
        self.dense = _square(config, dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        self.layer_norm = layer_norm(config, dtype, param_dtype, rngs)
        self.activation = config.hidden_act

    def __call__(self, hidden: jax.Array) -> jax.Array:
        """Maps float32 [..., hidden] to the same shape."""
        return self.layer_norm(ACTIVATION_FUNCTIONS[self.activation](self.dense(hidden)))


class BertPredictionHead(nnx.Module):
    """The masked-LM head. Tied, it has no kernel and multiplies by the word embeddings."""

    def __init__(self, config: BertConfig, *, tied: bool, dtype: DType, param_dtype: DType, rngs: nnx.Rngs):
        options = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.transform = BertPredictionTransform(config, **options)
        self.bias = nnx.Param(jnp.zeros(config.vocab_size, param_dtype))
        options |= {"initializer_range": config.initializer_range, "use_bias": False}
        self.decoder = None if tied else linear(config.hidden_size, config.vocab_size, **options)
        self.dtype = dtype

    def __call__(self, hidden: jax.Array, words: jax.Array) -> jax.Array:
        """Maps float32 [..., hidden] and the word embeddings [vocab, hidden] to [..., vocab]."""
        return self.scores(self.transform(hidden), words)

    def scores(
        self, states: jax.Array, words: jax.Array, start: jax.Array | int = 0, size: int | None = None
    ) -> jax.Array:
        """Compares transformed states with the words from `start` on.

        Args:
            states: float32 [..., hidden], what `transform` returns.
            words: the word embeddings [vocab, hidden], which a head that is not tied does not read.
            start: the first word; with a size, so that all of them exist.
            size: how many words; default: all of the vocabulary.

        Returns:
            Logits, float32 [..., size].
        """

        def part(x: jax.Array, axis: int) -> jax.Array:
            return x if size is None else lax.dynamic_slice_in_dim(x, start, size, axis)

        # The part is taken before it is cast, which would touch every row of the vocabulary.
        if self.decoder is None:
            y = matmul(states, part(words, 0), self.dtype, turned=True)
        else:
            y = matmul(states, part(self.decoder.kernel[...], 1), self.dtype)
        return y + part(self.bias[...], 0).astype(jnp.float32)
