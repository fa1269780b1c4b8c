"""BERT's encoder as a Flax NNX module (Devlin et al. 2018, arXiv:1810.04805).

Layers are stacked: every array of the encoder has a leading `layers` axis, and one `lax.scan` runs over it. A model
compiles in the time of one layer, and the parameter tree has a few dozen arrays instead of hundreds.
"""

import dataclasses
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from bertjax import cpu
from bertjax.attention import Segments, check_attention, choose_backend, prepare
from bertjax.checks import check_count
from bertjax.config import BertConfig
from bertjax.errors import ConfigError, InputError
from bertjax.flat import jit_model
from bertjax.inputs import check_dropout_key, check_inputs
from bertjax.int8 import dtype_of_attention, dtype_within, is_int8, refuse_dropout
from bertjax.layers import BertEmbeddings, BertLayer, BertPooler, DType
from bertjax.platforms import on_platform

if TYPE_CHECKING:
    from pathlib import Path

_FLOATS = ("float32", "bfloat16", "float16")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class BertOutput:
    """What the encoder returns; a pytree. Everything is float32.

    Attributes:
        last_hidden_state: [batch, length, hidden].
        pooler_output: [batch, hidden] or, with `max_segments`, [batch, max_segments, hidden]; None for a model
            without a pooler.
        hidden_states: [layers + 1, batch, length, hidden], the embeddings first, or None if not asked for.
        attentions: [layers, batch, heads, length, length], each row summing to 1 unless there is a `head_mask`, or
            None if not asked for.
    """

    last_hidden_state: jax.Array
    pooler_output: jax.Array | None = None
    hidden_states: jax.Array | None = None
    attentions: jax.Array | None = None


# What of a layer is kept for the backward pass, by the names of JAX's primitives: the results of products and of
# cuDNN's attention, and what decides which numbers dropout drops. What lies between is computed again: that takes less
# time than writing it to memory, and half of the memory.
_KEPT = ("dot_general", "short_product", "dot_product_attention_fwd_wrapper", "lt")


def _is_kept(primitive: Any, *_: Any, **__: Any) -> bool:
    """A policy for `jax.checkpoint`."""
    return primitive.name in _KEPT


class BertEncoder(nnx.Module):
    """A stack of identical layers, run by one scan."""

    def __init__(
        self,
        config: BertConfig,
        *,
        dtype: DType,
        param_dtype: DType,
        remat: bool,
        unroll: int,
        attention: str,
        rngs: nnx.Rngs,
    ):
        @nnx.split_rngs(splits=config.num_hidden_layers)
        @nnx.vmap
        def stack(rngs: nnx.Rngs) -> BertLayer:
            return BertLayer(config, dtype=dtype, param_dtype=param_dtype, rngs=rngs)

        self.layers = stack(rngs)
        self.num_layers = config.num_hidden_layers
        self.remat = remat
        self.unroll = unroll
        self.attention = attention
        self.config = config
        self.dtype = dtype

    def __call__(
        self,
        x: jax.Array,
        segments: Segments,
        *,
        head_mask: jax.Array | None = None,
        dropout_key: jax.Array | None = None,
        output_hidden_states: bool = False,
        output_attentions: bool = False,
    ) -> tuple[jax.Array, jax.Array | None, jax.Array | None]:
        """Maps float32 [batch, length, hidden] to the last hidden state, all hidden states and the attentions."""
        refuse_dropout(self.dtype, dropout_key)
        backend = choose_backend(
            self.attention,
            length=x.shape[1],
            head_dim=self.config.head_dim,
            dtype=dtype_of_attention(self.dtype),
            relative=self.config.position_embedding_type != "absolute",
            dropout=dropout_key is not None and self.config.attention_probs_dropout_prob > 0.0,
            return_weights=output_attentions,
        )

        def scan(layers: BertLayer, x: jax.Array, segments: Segments, keys: Any, head_mask: Any) -> Any:
            segments = prepare(segments, backend)

            def step(x, scanned):
                layer, key, heads = scanned
                y, weights = layer(x, segments, key, output_attentions, heads, backend)
                return y, (x if output_hidden_states else None, weights)

            # A kernel of Pallas can't be kept: in its interpret mode it has effects, which `jax.checkpoint` refuses.
            if self.remat or backend != "tpu":
                # In a loop nothing can be merged with the forward pass, so nothing has to be kept from it; and where
                # it matters, for `remat`, there is a loop.
                step = jax.checkpoint(step, prevent_cse=False, policy=None if self.remat else _is_kept)
            last, (hidden, attentions) = lax.scan(step, x, (layers, keys, head_mask), unroll=self.unroll)
            if output_hidden_states:
                hidden = jnp.concatenate([hidden, last[None]]).astype(jnp.float32)
            return last.astype(jnp.float32), hidden, attentions

        def on_gpu(layers: BertLayer, x: jax.Array, *args: Any) -> Any:
            return scan(layers, x.astype(self.dtype), *args)

        def native(layers: BertLayer, x: jax.Array, segments: Segments, *_: None) -> jax.Array:
            return cpu.encode(x, segments, layers, self.config, self.dtype)

        keys = None if dropout_key is None else jax.random.split(dropout_key, self.num_layers)
        args = (self.layers, x, segments, keys, head_mask)
        # A GPU multiplies faster than its memory takes what stands between two products, unless that is short, too.
        run = on_platform(scan, cuda=on_gpu) if jnp.dtype(self.dtype) == jnp.bfloat16 else scan
        more = output_hidden_states or output_attentions or head_mask is not None or dropout_key is not None
        if more or backend != "xla" or not self._native():
            return run(*args)
        return cpu.encoder_or(native, lambda *args: run(*args)[0], *args), None, None

    def _native(self) -> bool:
        """Whether a call for nothing but the last hidden state may be run by `bertjax.cpu`."""
        chosen = self.attention == "auto" and not self.remat and cpu.is_plain(self.layers)
        return chosen and cpu.problem(self.config, self.dtype) is None


class BertModel(nnx.Module):
    """BERT's encoder with embeddings and, optionally, the pooler.

    Calling a model compiles it, once per shape; inside a caller's own `jit` the call is simply traced. For a pure
    function of the parameters see `bertjax.functional`.

    Args:
        config: sizes and constants.
        add_pooling_layer: whether there is a pooler (`pooler_output`).
        dtype: dtype of the matmuls' inputs: float32, bfloat16 or float16. Accumulation, softmax, LayerNorm and the
            residual stream are float32 whatever it is, and so are the outputs; but programs for NVIDIA GPUs in bfloat16
            keep in bfloat16, too, what a layer writes to memory between its matmuls, forwards and backwards. Or int8,
            for inference only: the layers' six dense layers compute in int8 (see `bertjax.int8`), attention in
            bfloat16, the rest in float32.
        param_dtype: dtype of the parameters. In int8, it is that of all but the dense layers' kernels, and float32.
        remat: recompute all of each layer's activations in the backward pass; without it the results of products are
            kept, and only what lies between these is computed again. There has to be a loop over the layers then, so
            at most half of them may be unrolled: outside of one XLA merges what is computed twice, and keeps it.
        unroll: how many layers one step of the scan runs; True unrolls all of them, which takes longer to compile. In
            training, GPUs gain by it: what a scan keeps for the backward pass is copied into stacks and out of them.
        attention: what computes attention: "xla", "cudnn" or "tpu" (see `bertjax.attention`), or "auto", which chooses
            for each call, and on a CPU may run the whole encoder natively (see `bertjax.cpu`). Where one that is asked
            for can't do what a call needs, the call is refused.
        rngs: random keys for the initial parameters.
    """

    def __init__(
        self,
        config: BertConfig,
        *,
        add_pooling_layer: bool = True,
        dtype: DType = jnp.float32,
        param_dtype: DType = jnp.float32,
        remat: bool = False,
        unroll: int | bool = 1,
        attention: str = "auto",
        rngs: nnx.Rngs,
    ):
        dtype, param_dtype = check_dtypes(dtype, param_dtype)
        unroll = _check_unroll(unroll, config.num_hidden_layers, remat)
        relative = config.position_embedding_type != "absolute"
        check_attention(attention, dtype=dtype_of_attention(dtype), head_dim=config.head_dim, relative=relative)
        options = {"dtype": dtype_within(dtype), "param_dtype": param_dtype, "rngs": rngs}
        self.config = config
        self.embeddings = BertEmbeddings(config, **options)
        self.encoder = BertEncoder(
            config,
            dtype=dtype,
            param_dtype=param_dtype,
            remat=remat,
            unroll=unroll,
            attention=attention,
            rngs=rngs,
        )
        self.pooler = BertPooler(config, **options) if add_pooling_layer else None
        # How the checkpoint spelt its names, kept so that `save_pretrained` gives the same file back.
        self.layout = None

    def __call__(
        self,
        input_ids: Any = None,
        attention_mask: Any = None,
        token_type_ids: Any = None,
        position_ids: Any = None,
        segment_ids: Any = None,
        *,
        inputs_embeds: Any = None,
        head_mask: Any = None,
        max_segments: int | None = None,
        output_hidden_states: bool = False,
        output_attentions: bool = False,
        dropout_key: jax.Array | None = None,
    ) -> BertOutput:
        """Encodes a batch of token ids.

        Args:
            input_ids: int [batch, length].
            attention_mask: 0/1 or bool [batch, length]; 0 marks padding. Default: no padding.
            token_type_ids: int [batch, length]; which of two texts a token belongs to. Default: 0.
            position_ids: int [batch, length]. Default: counted from the start of the row or, with `segment_ids`, from
                the start of the segment. Relative positions allow of no others.
            segment_ids: int [batch, length], for several texts packed into a row: a token attends only to tokens of
                its own segment. A segment's tokens stand together; 0 marks padding, whose states mean nothing. Default:
                a row is one text.
            inputs_embeds: float [batch, length, hidden], in the place of `input_ids` and of their word embeddings.
            head_mask: float, int or bool [heads] or [layers, heads]; multiplies each head's attention weights, so that
                0 takes a head out. Default: 1 for every head.
            max_segments: with `segment_ids`, and part of what is compiled: the pooler reads the first position of each
                segment 1 to `max_segments` of a row, instead of the row's.
            output_hidden_states: also return every layer's input and the last one's output.
            output_attentions: also return the attention weights.
            dropout_key: a JAX random key turns dropout on, for training; None, the default, leaves it off.

        Returns:
            A `BertOutput`. `pooler_output` looks at the first position of a row or, with `max_segments`, of a segment;
            what it says of a segment that a row does not have means nothing.

        Raises:
            InputError: a shape, dtype or id is not usable.
        """
        inputs = check_inputs(
            self.config,
            input_ids,
            attention_mask,
            token_type_ids,
            position_ids,
            segment_ids,
            inputs_embeds=inputs_embeds,
            head_mask=head_mask,
        )
        check_max_segments(self, max_segments, segment_ids)
        check_dropout_key(dropout_key)
        return _compiled_encode(
            self,
            inputs,
            dropout_key,
            max_segments=max_segments,
            output_hidden_states=output_hidden_states,
            output_attentions=output_attentions,
        )

    @classmethod
    def from_pretrained(cls, path_or_hub_id: "str | Path", **options: Any) -> "BertModel":
        """Loads a checkpoint; see `bertjax.pretrained.from_pretrained` for the options and the errors."""
        # Imported here because a model knows nothing of files: `pretrained` imports this module, not the reverse.
        from bertjax.pretrained import from_pretrained

        return from_pretrained(path_or_hub_id, cls, **options)

    def save_pretrained(self, folder: "str | Path", **options: Any) -> None:
        """Writes a Hugging Face folder; see `bertjax.pretrained.save_pretrained` for the options and the errors."""
        from bertjax.pretrained import save_pretrained

        save_pretrained(self, folder, **options)

    def __str__(self) -> str:
        return module_tree(self)


def encode(
    model: BertModel,
    inputs: dict[str, jax.Array | None],
    dropout_key: jax.Array | None = None,
    output_hidden_states: bool = False,
    output_attentions: bool = False,
    max_segments: int | None = None,
) -> BertOutput:
    """The whole computation, on inputs that `check_inputs` returned; neither checked again nor compiled."""
    input_ids, embeds, segment_ids = inputs["input_ids"], inputs["inputs_embeds"], inputs["segment_ids"]
    # Of the tokens the rest needs the shape [batch, length] only, and how they are laid out over devices.
    tokens = embeds[..., 0] if input_ids is None else input_ids
    types = jnp.zeros_like(tokens, jnp.int32) if inputs["token_type_ids"] is None else inputs["token_type_ids"]
    positions = _counted_positions(tokens, segment_ids) if inputs["position_ids"] is None else inputs["position_ids"]
    embedding_key, encoder_key = (None, None) if dropout_key is None else jax.random.split(dropout_key)
    x = model.embeddings(input_ids, types, positions, embedding_key, inputs_embeds=embeds)
    last, hidden_states, attentions = model.encoder(
        x,
        Segments.of(inputs["attention_mask"], segment_ids),
        head_mask=inputs["head_mask"],
        dropout_key=encoder_key,
        output_hidden_states=output_hidden_states,
        output_attentions=output_attentions,
    )
    pooled = None if model.pooler is None else model.pooler(_first_states(last, segment_ids, max_segments))
    return BertOutput(last, pooled, hidden_states, attentions)


_compiled_encode = jit_model(encode, static_argnames=("output_hidden_states", "output_attentions", "max_segments"))


def check_max_segments(model: BertModel, max_segments: int | None, segment_ids: Any) -> None:
    """Refuses a `max_segments` that is no positive integer or that nothing would read, with an InputError."""
    if max_segments is None:
        return
    check_count("max_segments", max_segments)
    if segment_ids is None:
        raise InputError("max_segments says how many segments of a row are read; pass segment_ids with it")
    if max_segments > (length := jnp.shape(segment_ids)[-1]):
        raise InputError(f"max_segments is {max_segments}, and a row of {length} tokens has no more than {length}")
    if model.pooler is None:
        raise InputError("max_segments says how many segments the pooler reads, and this model has no pooler")


def _counted_positions(tokens: jax.Array, segment_ids: jax.Array | None) -> jax.Array:
    """Each token's position, int32 [batch, length], counted from the start of the row or the segment."""
    index = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
    if segment_ids is None:
        return index
    starts = segment_ids != jnp.pad(segment_ids, ((0, 0), (1, 0)), constant_values=-1)[:, :-1]
    positions = index - lax.cummax(jnp.where(starts, index, 0), axis=1)
    # Padding may run on past the last position, and what is looked up there must at least be finite.
    return jnp.where(segment_ids == 0, 0, positions)


def _first_states(hidden: jax.Array, segment_ids: jax.Array | None, max_segments: int | None) -> jax.Array:
    """The states of the rows' first positions [batch, hidden], or the segments' [batch, max_segments, hidden].

    For a segment that a row does not have, it is the state of the row's first position.
    """
    if max_segments is None:
        return hidden[:, 0]
    numbers = jnp.arange(1, max_segments + 1, dtype=segment_ids.dtype)
    first = (segment_ids[:, None, :] == numbers[None, :, None]).argmax(-1)
    return jnp.take_along_axis(hidden, first[..., None], axis=1)


def functional(model: nnx.Module) -> tuple[Any, dict]:
    """Splits a model into a pure function and its parameters, for use inside a JAX program.

    Returns:
        `apply` and `params`: `apply(params, *args, **kwargs)` computes `model(*args, **kwargs)`, an array for a
        `SentenceModel`, a `BertOutput` for a `BertModel`, and what its class says for a model with heads. It has no
        side effects and composes with `jit`, `grad`, `vmap` (over an axis in front of the batch) and `shard_map`; in
        bfloat16 not with forward-mode derivatives (`jvp`), see `bertjax.matmul`;
        `params` is a nested dict of arrays.

    Raises:
        InputError: `model` is not a module.
    """
    if not isinstance(model, nnx.Module):
        raise InputError(f"functional takes a model, not a {type(model).__name__}; of an encoder pass encoder.model")
    graphdef, state = nnx.split(model)

    def apply(params: dict, *args: Any, **kwargs: Any) -> Any:
        return nnx.merge(graphdef, params)(*args, **kwargs)

    return apply, nnx.to_pure_dict(state)


def check_dtype(name: str, dtype: DType, accepted: tuple[str, ...] = _FLOATS) -> jnp.dtype:
    """Returns the dtype if it is one that parameters have. Raises `ConfigError` otherwise."""
    try:
        found = jnp.dtype(dtype)
    except TypeError:
        found = None
    if found is None or found.name not in accepted:
        raise ConfigError(f"{name}={dtype!r} is not supported; expected one of {', '.join(accepted)}")
    return found


def check_dtypes(dtype: DType, param_dtype: DType | None) -> tuple[jnp.dtype, jnp.dtype]:
    """Returns the dtypes that a model computes in and has its parameters in; None is for the one that goes with it.

    Raises:
        ConfigError: there is no such model.
    """
    dtype = check_dtype("dtype", dtype, (*_FLOATS, "int8"))
    param_dtype = dtype_within(dtype) if param_dtype is None else check_dtype("param_dtype", param_dtype)
    if is_int8(dtype) and param_dtype != jnp.float32:
        raise ConfigError(f"param_dtype is {param_dtype.name}; with dtype int8, what is not in int8 is in float32 only")
    return dtype, param_dtype


def _check_unroll(unroll: int | bool, layers: int, remat: bool) -> int:
    """Returns how many layers to unroll. A number: True is equal to 1, and one program would be taken for the other."""
    if unroll is not True and (not isinstance(unroll, int) or unroll < 1):
        raise ConfigError(f"unroll is {unroll!r}, expected a positive integer or True")
    unroll = layers if unroll is True else unroll
    if remat and layers > 1 and layers // unroll < 2:
        raise ConfigError(
            f"unroll is {unroll} of {layers} layers and remat is True: without a loop that runs at least twice, XLA "
            f"merges what is computed twice, and keeps it; unroll at most {layers // 2}, or leave out remat"
        )
    return unroll


def module_tree(module: nnx.Module, name: str = "", indent: int = 0) -> str:
    """A module and what it is made of, a line each, with the shape and dtype of every parameter."""
    lines = [f"{'  ' * indent}{name + ': ' if name else ''}{type(module).__name__}"]
    for child_name, child in vars(module).items():
        if isinstance(child, nnx.Module):
            lines.append(module_tree(child, child_name, indent + 1))
        elif isinstance(child, nnx.Variable):
            lines.append(f"{'  ' * (indent + 1)}{child_name}: {child.dtype.name}{list(child.shape)}")
    return "\n".join(lines)
