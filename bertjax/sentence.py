"""From token states to one vector per text: pooling, dense layers, normalisation.

Everything is float32. The formulas are those of sentence-transformers' `Pooling`, `Dense` and `Normalize` modules,
written for packed rows: a row may hold several texts, and a vector comes out for each.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax

from bertjax.activations import ACTIVATION_FUNCTIONS
from bertjax.config import BertConfig
from bertjax.errors import ConfigError, InputError
from bertjax.flat import jit_model
from bertjax.inputs import check_dropout_key, check_inputs
from bertjax.layers import linear
from bertjax.model import BertModel, encode, module_tree

#: Pooling modes, in the order in which old Pooling configs, with a flag for each mode, concatenate several of them.
POOLING_MODES = ("cls", "max", "mean", "mean_sqrt_len_tokens", "weightedmean", "lasttoken")

#: Activations of a Dense module, by the class path that sentence-transformers writes.
DENSE_ACTIVATIONS = {
    "torch.nn.modules.linear.Identity": lambda x: x,
    "torch.nn.modules.activation.Tanh": jnp.tanh,
    "torch.nn.modules.activation.ReLU": jax.nn.relu,
    "torch.nn.modules.activation.GELU": ACTIVATION_FUNCTIONS["gelu"],
    "torch.nn.modules.activation.SiLU": jax.nn.silu,
    "torch.nn.modules.activation.Sigmoid": jax.nn.sigmoid,
}


class Dense(nnx.Module):
    """activation(W x + b), plus x or a projection of it if there is a residual."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        use_bias: bool = True,
        activation: str = "torch.nn.modules.activation.Tanh",
        use_residual: bool = False,
        rngs: nnx.Rngs,
    ):
        if activation not in DENSE_ACTIVATIONS:
            raise ConfigError(f"Dense activation {activation!r} is not one of {', '.join(DENSE_ACTIVATIONS)}")
        options = {"dtype": jnp.float32, "param_dtype": jnp.float32, "initializer_range": 0.02, "rngs": rngs}
        self.linear = linear(in_features, out_features, use_bias=use_bias, **options)
        projected = use_residual and in_features != out_features
        self.residual = linear(in_features, out_features, use_bias=False, **options) if projected else None
        self.use_residual = use_residual
        self.activation = activation

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps float32 [..., in_features] to float32 [..., out_features]."""
        y = DENSE_ACTIVATIONS[self.activation](self.linear(x))
        if not self.use_residual:
            return y
        return y + (x if self.residual is None else self.residual(x))


class Normalize(nnx.Module):
    """Scales vectors to unit length."""

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps float32 [..., dim] to the same shape; a zero vector stays zero."""
        # The floor is torch.nn.functional.normalize's 1e-12, under the root so that the gradient at zero is finite.
        return x * lax.rsqrt(jnp.maximum(jnp.sum(x * x, axis=-1, keepdims=True), 1e-24))


def pool(hidden: jax.Array, members: jax.Array, positions: jax.Array, modes: tuple[str, ...]) -> jax.Array:
    """Pools the token states of each text into one vector, or several concatenated.

    Args:
        hidden: float32 [rows, length, hidden].
        members: bool [rows, texts, length]; which tokens of a row count for each of its texts.
        positions: int [rows, length]; each token's place in its text, no two alike in one text.
        modes: names from `POOLING_MODES`.

    Returns:
        float32 [rows, texts, len(modes) * hidden]; zero for a text without tokens.
    """
    members_f32 = members.astype(jnp.float32)
    at = positions[:, None, :]

    def weighted_sum(weights: jax.Array) -> jax.Array:
        return jnp.einsum("rtl,rlh->rth", weights, hidden, precision=lax.Precision.HIGHEST)

    def only(position: jax.Array) -> jax.Array:
        return weighted_sum((members & (at == position[..., None])).astype(jnp.float32))

    def mean(weights: jax.Array, power: float = 1.0) -> jax.Array:
        return weighted_sum(weights) / jnp.maximum(weights.sum(-1, keepdims=True), 1e-9) ** power

    def maximum() -> jax.Array:
        # A text at a time: all at once would take rows x texts x length x hidden numbers.
        def one(member: jax.Array) -> jax.Array:
            return jnp.max(hidden, axis=1, where=member[..., None], initial=-jnp.inf)

        found = lax.map(one, members.transpose(1, 0, 2)).transpose(1, 0, 2)
        return jnp.where(members.any(-1, keepdims=True), found, 0.0)

    compute = {
        "cls": lambda: only(jnp.where(members, at, positions.shape[1]).min(-1)),
        "max": maximum,
        "mean": lambda: mean(members_f32),
        "mean_sqrt_len_tokens": lambda: mean(members_f32, 0.5),
        "weightedmean": lambda: mean(members_f32 * (at + 1).astype(jnp.float32)),
        "lasttoken": lambda: only(jnp.where(members, at, -1).max(-1)),
    }
    return jnp.concatenate([compute[mode]() for mode in modes], axis=-1)


class SentenceModel(nnx.Module):
    """Token ids to one vector per text: BERT, pooling, then any number of `Dense` and `Normalize` modules.

    Args:
        bert: the encoder; its pooler, if any, is not used.
        pooling: one of `POOLING_MODES`, or several: their vectors are concatenated in the given order.
        include_prompt: whether a prompt's tokens count in the pooling.
        modules: what follows the pooling, in order; in float32, whatever the encoder's dtype.
    """

    def __init__(
        self,
        bert: BertModel,
        *,
        pooling: str | tuple[str, ...] = "mean",
        include_prompt: bool = True,
        modules: tuple[nnx.Module, ...] = (),
    ):
        pooling = (pooling,) if isinstance(pooling, str) else tuple(pooling)
        unknown = [mode for mode in pooling if mode not in POOLING_MODES]
        if unknown or not pooling:
            raise ConfigError(f"unknown pooling {unknown or pooling}; expected one or more of {POOLING_MODES}")
        self.bert = bert
        self.pooling = pooling
        self.include_prompt = include_prompt
        self.modules = nnx.List(modules)

    @property
    def config(self) -> BertConfig:
        """The encoder's configuration."""
        return self.bert.config

    @property
    def embedding_dimension(self) -> int:
        """Length of the vectors."""
        dense = [module for module in self.modules if isinstance(module, Dense)]
        return dense[-1].linear.out_features if dense else len(self.pooling) * self.config.hidden_size

    def __call__(
        self,
        input_ids: Any,
        attention_mask: Any = None,
        token_type_ids: Any = None,
        position_ids: Any = None,
        segment_ids: Any = None,
        *,
        prompt_length: Any = 0,
        max_segments: int | None = None,
        dropout_key: jax.Array | None = None,
    ) -> jax.Array:
        """Computes the vectors of a batch of token ids.

        Args:
            input_ids: int [batch, length].
            attention_mask: 0/1 or bool [batch, length]; 0 marks padding. Default: no padding.
            token_type_ids: int [batch, length]. Default: 0.
            position_ids: int [batch, length]. Default: counted from the start of each text.
            segment_ids: int [batch, length], for several texts packed into a row: 1, 2, ..., with 0 for padding.
            prompt_length: how many leading tokens of every text are a prompt, [CLS] included; they are left out of
                the pooling unless the model includes them.
            max_segments: with `segment_ids`: the highest segment id that gets a vector.
            dropout_key: a JAX random key turns dropout on, for training; None, the default, leaves it off.

        Returns:
            float32 [batch, dim] or, with `segment_ids`, [batch, max_segments, dim].

        Raises:
            InputError: a shape, dtype or id is not usable.
        """
        inputs = check_inputs(self.config, input_ids, attention_mask, token_type_ids, position_ids, segment_ids)
        if (inputs["segment_ids"] is None) != (max_segments is None):
            raise InputError("segment_ids and max_segments go together: pass both or neither")
        if max_segments is not None:
            _check_count("max_segments", max_segments, 1, int | np.integer)
        _check_count("prompt_length", prompt_length, 0, int | np.integer | np.ndarray | jax.Array)
        check_dropout_key(dropout_key)
        return _compiled_vectors(self, inputs, prompt_length, max_segments, dropout_key)

    def __str__(self) -> str:
        return module_tree(self)


def _check_count(name: str, value: Any, least: int, kinds: Any) -> None:
    """Refuses what is not an int32 of at least `least`; of a value that is being traced, only kind and shape."""
    usable = isinstance(value, kinds) and jnp.shape(value) == () and jnp.issubdtype(jnp.result_type(value), jnp.integer)
    if not usable or (not isinstance(value, jax.core.Tracer) and not least <= value <= np.iinfo(np.int32).max):
        raise InputError(f"{name} is {value!r}, expected an int32 of at least {least}")


def vectors(
    model: SentenceModel,
    inputs: dict[str, jax.Array | None],
    prompt_length: Any,
    max_segments: int | None,
    dropout_key: jax.Array | None = None,
) -> jax.Array:
    """The whole computation, on inputs that `check_inputs` returned; neither checked again nor compiled."""
    hidden = encode(model.bert, inputs, dropout_key).last_hidden_state
    segments, mask = inputs["segment_ids"], inputs["attention_mask"]
    members = jnp.ones((hidden.shape[0], 1, hidden.shape[1]), bool)
    if segments is not None:
        members = segments[:, None, :] == jnp.arange(1, max_segments + 1)[None, :, None]
    if mask is not None:
        members = members & mask[:, None, :]
    # Places are counted from a text's first token, wherever that is in its row: a caller's position_ids concern the
    # embeddings only, and padding may stand on the left.
    places = jnp.arange(hidden.shape[1])[None, None, :] - members.argmax(-1, keepdims=True)
    positions = jnp.where(members, places, 0).sum(1)
    if not model.include_prompt:
        members = members & (positions >= prompt_length)[:, None, :]
    pooled = pool(hidden, members, positions, model.pooling)
    for module in model.modules:
        pooled = module(pooled)
    return pooled[:, 0] if segments is None else pooled


_compiled_vectors = jit_model(vectors, static_argnames=("max_segments",))
