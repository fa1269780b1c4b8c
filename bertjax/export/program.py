"""The program: token ids to vectors, with everything after the encoder inside."""

import contextlib
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import export

from bertjax.model import functional
from bertjax.quantization import quantize
from bertjax.sentence import Normalize, SentenceModel

PLATFORMS = ("cpu", "cuda", "tpu")


def trace(
    model: SentenceModel,
    *,
    max_length: int,
    dim: int,
    normalize: bool,
    precision: str,
    ranges: np.ndarray | None,
) -> tuple[export.Exported, dict[str, jax.Array]]:
    """Exports a model; attention is XLA's, whatever the model has, because a kernel runs on one platform only.

    Args:
        model: the model.
        max_length: the longest row, in tokens.
        dim: how many leading numbers of a vector are kept.
        normalize: scale what is kept to unit length.
        precision: what the vectors are quantised to; see `bertjax.quantization`.
        ranges: for int8; see there.

    Returns:
        The program, and its weights by name. It takes the dict of weights; input_ids, attention_mask and
        token_type_ids, each int32 [batch, length]; and prompt_length, int32 []. See `SentenceModel` for all of them.
    """
    apply, params = functional(_portable(model))
    leaves, tree = jax.tree.flatten_with_path(params)
    weights = {".".join(str(key.key) for key in path): leaf for path, leaf in leaves}
    names = tuple(weights)

    def encode(weights, input_ids, attention_mask, token_type_ids, prompt_length):
        params = jax.tree.unflatten(tree, [weights[name] for name in names])
        vectors = apply(params, input_ids, attention_mask, token_type_ids, prompt_length=prompt_length)[:, :dim]
        return quantize(Normalize()(vectors) if normalize else vectors, precision, ranges)

    shape = export.symbolic_shape("batch, length", constraints=[f"length <= {max_length}"])
    rows = jax.ShapeDtypeStruct(shape, jnp.int32)
    structs = {name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for name, leaf in weights.items()}
    with _without_locations():
        exported = export.export(jax.jit(encode), platforms=PLATFORMS)(
            structs, rows, rows, rows, jax.ShapeDtypeStruct((), jnp.int32)
        )
    return exported, weights


def _portable(model: SentenceModel) -> SentenceModel:
    """The same parameters, with attention that runs everywhere and without a pooler, which nobody reads."""
    copy = nnx.merge(*nnx.split(model))
    copy.bert.encoder.attention = "xla"
    copy.bert.pooler = None
    return copy


@contextlib.contextmanager
def _without_locations() -> Iterator[None]:
    """Leaves out which lines of which files a program comes from, so that the same model gives the same bytes."""
    before: int = jax.config.jax_traceback_in_locations_limit
    jax.config.update("jax_traceback_in_locations_limit", 0)
    try:
        yield
    finally:
        jax.config.update("jax_traceback_in_locations_limit", before)
