"""LoRA: low-rank adapters beside frozen kernels (Hu et al. 2021, arXiv:2106.09685).

`add_lora` gives a model adapters. From then on `AdamW.build` has only these learn, and the head of the task, and keeps
no state for the rest. `merge_lora` adds them into the kernels; `save_adapter` writes them alone.

Dropout in front of an adapter, which is PEFT's `lora_dropout`, is not done.
"""

from collections.abc import Callable, Iterable, Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from bertjax.errors import InputError
from bertjax.fresh import key_of
from bertjax.int8 import is_int8
from bertjax.matmul import dense, matmul
from bertjax.model import BertEncoder
from bertjax.training.lora_settings import PLACES, LoRA

#: The heads that learn beside adapters: those that a task starts afresh. That of the masked language model comes
#: pre-trained, and PEFT has no way to save it without the word embeddings.
HEADS = ("classifier", "qa_outputs", "seq_relationship")
# What the parameters of adapters are called.
_ADAPTERS = ("lora_a", "lora_b")


class LoRALinear(nnx.Module):
    """A dense layer with an adapter: x W + b + (alpha / rank) (x A) B.

    Inputs of the products are in the dtype of the dense layer, and they are accumulated in float32.

    Attributes:
        kernel, bias: those of the dense layer.
        lora_a: A, float32 [..., in_features, rank], the leading axes those of the kernel.
        lora_b: B, float32 [..., rank, out_features].
        alpha: see `LoRA`.
        plain: the structure of the dense layer.
    """

    def __init__(self, layer: nnx.Linear, alpha: float, lora_a: jax.Array, lora_b: jax.Array):
        self.plain = nnx.graphdef(layer)
        self.kernel = nnx.Param(layer.kernel[...])
        self.bias = nnx.Param(layer.bias[...])
        self.lora_a = nnx.Param(lora_a)
        self.lora_b = nnx.Param(lora_b)
        self.alpha = float(alpha)
        self.dtype = layer.dtype

    @property
    def rank(self) -> int:
        """The rank of what is added to the kernel."""
        return self.lora_a.shape[-1]

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps float [..., in_features] to float32 [..., out_features], or bfloat16 to bfloat16."""
        y = dense(x, self.kernel[...], self.bias[...], self.dtype)
        low = matmul(x, self.lora_a[...], self.dtype)
        return y + (self.alpha / self.rank * matmul(low, self.lora_b[...], self.dtype)).astype(y.dtype)

    def merged(self) -> nnx.Linear:
        """The dense layer with the kernel W + (alpha / rank) A B; float32."""
        added = matmul(self.lora_a[...], self.lora_b[...], jnp.float32)
        kernel = self.kernel[...].astype(jnp.float32) + self.alpha / self.rank * added
        return nnx.merge(self.plain, {"kernel": kernel, "bias": self.bias[...]})


def add_lora(model: nnx.Module, lora: LoRA, rngs: nnx.Rngs | int = 0) -> nnx.Module:
    """A model of the same parameters, with adapters that do not change yet what it computes.

    As in PEFT, each A is drawn uniformly from -1 / sqrt(in_features) to 1 / sqrt(in_features), and each B is zero.

    Args:
        model: a model that has an encoder: `BertModel`, one with heads, `SentenceModel`; it stays as it is.
        lora: the settings.
        rngs: random keys for the adapters, or a seed.

    Raises:
        InputError: the model computes in int8, has adapters already, or has no encoder.
    """
    keys = dict(zip(lora.targets, jax.random.split(key_of(rngs), len(lora.targets)), strict=True))

    def draw(target: str, shape: tuple[int, ...]) -> tuple[jax.Array, jax.Array]:
        layers, into, out = shape
        bound = into**-0.5
        drawn = jax.random.uniform(keys[target], (layers, into, lora.rank), jnp.float32, -bound, bound)
        return drawn, jnp.zeros((layers, lora.rank, out), jnp.float32)

    return with_adapters(model, lora, draw)


def with_adapters(
    model: nnx.Module, lora: LoRA, make: Callable[[str, tuple[int, ...]], tuple[jax.Array, jax.Array]]
) -> nnx.Module:
    """A model of the same parameters with these adapters; see `add_lora` for the errors.

    Args:
        model: the model; it stays as it is.
        lora: the settings.
        make: of a name of `TARGETS` and the shape of its kernels [layers, in, out]: A and B, float32 [layers, in, rank]
            and [layers, rank, out].
    """
    check_plain(model)
    model = _copy(model)
    layers = encoder_of(model).layers
    for target in lora.targets:
        part, name = PLACES[target]
        block = getattr(layers, part)
        layer = getattr(block, name)
        setattr(block, name, LoRALinear(layer, lora.alpha, *make(target, layer.kernel.shape)))
    return model


def merge_lora(model: nnx.Module) -> nnx.Module:
    """A model without adapters that computes the same: W + (alpha / rank) A B in the place of W.

    Its parameters are float32, whatever the model's are, so that nothing of what was learnt is rounded away.

    Args:
        model: a model with adapters; it stays as it is.

    Raises:
        InputError: it has none.
    """
    found = adapters_of(model)
    if not found:
        raise InputError("the model has no adapters to merge; see add_lora")
    model = _copy(model)
    layers = encoder_of(model).layers
    for target, adapted in found.items():
        part, name = PLACES[target]
        setattr(getattr(layers, part), name, adapted.merged())
    graphdef, params = nnx.split(model)
    return nnx.merge(graphdef, jax.tree.map(lambda array: array.astype(jnp.float32), nnx.to_pure_dict(params)))


def adapters_of(model: nnx.Module) -> dict[str, LoRALinear]:
    """The adapted dense layers of a model's encoder, by the names of `TARGETS`. See `add_lora` for the error."""
    layers = encoder_of(model).layers
    dense = {target: getattr(getattr(layers, part), name) for target, (part, name) in PLACES.items()}
    return {target: each for target, each in dense.items() if isinstance(each, LoRALinear)}


def settings_of(model: nnx.Module) -> LoRA | None:
    """What a model's adapters were made with, or None for a model without. See `add_lora` for the error."""
    found = adapters_of(model)
    first = next(iter(found.values()), None)
    return None if first is None else LoRA(rank=first.rank, alpha=first.alpha, targets=tuple(found))


def encoder_of(model: nnx.Module) -> BertEncoder:
    """The encoder in a model. Raises `InputError` unless there is one."""
    found = [each for _, each in nnx.iter_modules(model) if isinstance(each, BertEncoder)]
    if len(found) != 1:
        raise InputError(f"a {type(model).__name__} has {len(found)} encoders, and adapters are for a model with one")
    return found[0]


def check_plain(model: nnx.Module) -> None:
    """Refuses a model that adapters can't be added to; see `add_lora`."""
    if adapters_of(model):
        raise InputError("the model has adapters already; merge them first (merge_lora), or begin with the plain model")
    if is_int8(encoder_of(model).dtype):
        raise InputError("a model in int8 is for inference and takes no adapters; load it with another dtype")


def has_adapters(paths: Iterable[Sequence[str]]) -> bool:
    """Whether there are adapters among the parameters with these paths."""
    return any(path[-1] in _ADAPTERS for path in paths)


def learns_with_adapters(path: Sequence[str]) -> bool:
    """Whether the parameter at this path learns in a model with adapters."""
    return path[-1] in _ADAPTERS or path[0] in HEADS


def _copy(model: nnx.Module) -> nnx.Module:
    """A model of the same arrays, whose parts can be replaced."""
    graphdef, params = nnx.split(model)
    return nnx.merge(graphdef, nnx.to_pure_dict(params))
