"""AdamW as BERT is tuned with: what decays, what is frozen, and how fast each layer learns.

The parts are optax's; here they are put together, and told apart by the paths of parameters.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from bertjax.checks import as_integer, check_choice, check_count, check_number
from bertjax.errors import ConfigError
from bertjax.model import functional
from bertjax.training.lora import has_adapters, learns_with_adapters

Schedule = Literal["linear", "cosine", "constant"]
Path = tuple[str, ...]
Params = dict[str, Any]

_SCHEDULES = ("linear", "cosine", "constant")
# Names of parameters that are not decayed: biases, and the gains of LayerNorm.
_NOT_DECAYED = ("bias", "scale")


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdamW:
    """AdamW (Loshchilov & Hutter 2019, arXiv:1711.05101) and what is usually done around it.

    Of a model with adapters, these learn and the heads of `lora.HEADS`, and nothing else does.

    Args:
        learning_rate: the highest.
        schedule: how it falls after the warm-up: "linear" or "cosine" to 0 at the last step, or not at all.
        warmup_steps: over how many steps it rises from 0, the rate of the first one; an int, or a part of all steps.
        weight_decay: of everything but biases and LayerNorm.
        b1, b2, eps: Adam's.
        clip_norm: the greatest norm of all gradients together; longer ones are shortened to it. None for any.
        layer_decay: the rate of each layer as a part of that of the layer above it; heads and pooler have the whole
            rate, and embeddings that of a layer below the lowest (Clark et al. 2020, arXiv:2003.10555, section 3.2; the
            exponents are those of Bao et al. 2021, arXiv:2106.08254).
        freeze: parts that do not learn: "embeddings", "encoder", or what a model has beside these ("pooler").
        freeze_layers: how many layers do not learn, from the lowest.

    Raises:
        ConfigError: a number is not usable.
    """

    learning_rate: float = 2e-5
    schedule: Schedule = "linear"
    warmup_steps: int | float = 0
    weight_decay: float = 0.01
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    clip_norm: float | None = 1.0
    layer_decay: float = 1.0
    freeze: tuple[str, ...] = ()
    freeze_layers: int = 0

    def __post_init__(self):
        check_choice("schedule", self.schedule, _SCHEDULES, error=ConfigError)
        for name in ("learning_rate", "weight_decay", "eps"):
            self._check(name, lambda value: 0 <= value < math.inf, "a number of 0 or more")
        for name in ("b1", "b2"):
            self._check(name, lambda value: 0 <= value < 1, "a number from 0 to below 1")
        self._check("layer_decay", lambda value: 0 < value <= 1, "a number above 0, at most 1")
        if self.clip_norm is not None:
            self._check("clip_norm", lambda value: value > 0, "a number above 0, or None")
        if as_integer(self.warmup_steps) is None:
            self._check("warmup_steps", lambda value: 0 <= value < 1, "a number of steps, or a part of all below 1")
        else:
            check_count("warmup_steps", self.warmup_steps, least=0, error=ConfigError)
        check_count("freeze_layers", self.freeze_layers, least=0, error=ConfigError)

    def _check(self, name: str, is_right: Callable[[float], bool], expected: str) -> None:
        check_number(name, getattr(self, name), is_right, expected, ConfigError)

    def rates(self, total_steps: int) -> optax.Schedule:
        """The learning rate of each step, counted from 0."""
        check_count("total_steps", total_steps, error=ConfigError)
        warmup = as_integer(self.warmup_steps)
        warmup = int(self.warmup_steps * total_steps) if warmup is None else warmup
        left = max(1, total_steps - warmup)
        falling = {
            "linear": optax.linear_schedule(self.learning_rate, 0.0, left),
            "cosine": optax.cosine_decay_schedule(self.learning_rate, left),
            "constant": optax.constant_schedule(self.learning_rate),
        }[self.schedule]
        rising = optax.linear_schedule(0.0, self.learning_rate, max(1, warmup))
        return optax.join_schedules([rising, falling], [warmup])

    def build(self, model: nnx.Module, total_steps: int) -> "Optimizer":
        """The optimiser for a model.

        Args:
            model: a model, or its parameters as `functional` gives them.
            total_steps: at which step the learning rate has come down.

        Raises:
            ConfigError: `freeze` names a part that the model does not have, or nothing is left that learns.
        """
        params = parameters(model)
        factors = self._factors(params)
        learns = jax.tree.map(lambda factor: bool(np.any(factor)), factors)
        if not any(jax.tree.leaves(learns)):
            raise ConfigError("everything is frozen, so there is nothing to train")
        rates = self.rates(total_steps)
        masks = _kept(jax.tree.map(lambda factor: (factor != 0).astype(np.float32), factors), learns)
        decayed = _kept(jax.tree_util.tree_map_with_path(lambda path, _: _is_decayed(path), params), learns)
        parts = [
            _scale_by(masks),
            optax.identity() if self.clip_norm is None else optax.clip_by_global_norm(self.clip_norm),
            optax.scale_by_adam(self.b1, self.b2, self.eps),
            optax.add_decayed_weights(self.weight_decay, decayed),
            _scale_by(_kept(factors, learns)),
            optax.scale_by_learning_rate(rates),
        ]
        return Optimizer(optax.chain(*parts), learns, masks, rates)

    def _factors(self, params: Params) -> Params:
        """By what each parameter's learning rate is multiplied: float32 [], or [layers, 1, ...] in the encoder."""
        paths = [_names(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
        parts = {_part_of(path) for path in paths}
        unknown = sorted(set(self.freeze) - parts)
        if unknown:
            raise ConfigError(f"freeze: the model has no {unknown[0]!r}, only {', '.join(sorted(parts))}")
        layers = next(
            array.shape[0]
            for path, array in jax.tree_util.tree_leaves_with_path(params)
            if _part_of(_names(path)) == "encoder"
        )
        if self.freeze_layers > layers:
            raise ConfigError(f"freeze_layers is {self.freeze_layers}, and the model has {layers}")
        adapted = has_adapters(paths)
        depth = np.arange(layers)
        of_layers = np.where(depth < self.freeze_layers, 0.0, self.layer_decay ** (layers - depth)).astype(np.float32)

        def factor(path: Any, array: jax.Array) -> np.ndarray:
            names = _names(path)
            part = _part_of(names)
            if part in self.freeze or (adapted and not learns_with_adapters(names)):
                return np.float32(0.0)
            if part == "encoder":
                return of_layers.reshape(-1, *[1] * (array.ndim - 1))
            return np.float32(self.layer_decay ** (layers + 1) if part == "embeddings" else 1.0)

        return jax.tree_util.tree_map_with_path(factor, params)


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """An optimiser of a model's parameters.

    Attributes:
        transformation: of the gradients of those that learn; where one does not, its tree has None.
        learns: a tree of bools: which arrays learn.
        masks: what gradients are multiplied by before anything else: 0 where a layer is frozen, which is a part of an
            array, and 1 otherwise.
        rates: the learning rate of each step, counted from 0.
    """

    transformation: optax.GradientTransformation
    learns: Params
    masks: Params
    rates: optax.Schedule

    def masked(self, gradients: Params) -> Params:
        """The gradients that count."""
        return jax.tree.map(jnp.multiply, gradients, self.masks)

    def split(self, params: Params) -> tuple[Params, Params]:
        """The arrays that learn and those that do not; each tree has None in the place of the others."""
        fixed = jax.tree.map(lambda array, learns: None if learns else array, params, self.learns)
        return _kept(params, self.learns), fixed


def join(learnt: Params, fixed: Params) -> Params:
    """The tree that `Optimizer.split` divided."""
    return jax.tree.map(lambda a, b: b if a is None else a, learnt, fixed, is_leaf=lambda node: node is None)


def parameters(model: nnx.Module | Params) -> Params:
    """A model's parameters, as a nested dict."""
    return dict(model) if isinstance(model, Mapping) else functional(model)[1]


def _kept(tree: Params, learns: Params) -> Params:
    return jax.tree.map(lambda leaf, keep: leaf if keep else None, tree, learns)


def _scale_by(factors: Params) -> optax.GradientTransformation:
    """Multiplies each update by its factor."""

    def update(updates: Params, params: Params | None = None) -> Params:
        return jax.tree.map(lambda update, factor: update * factor, updates, factors)

    return optax.identity() if all(np.all(leaf == 1) for leaf in jax.tree.leaves(factors)) else optax.stateless(update)


def _names(path: Any) -> Path:
    return tuple(str(getattr(entry, "key", entry)) for entry in path)


def _part_of(names: Path) -> str:
    """The part of the model that a parameter belongs to: "embeddings", "encoder", "pooler", a head's name."""
    return names[1] if names[0] == "bert" else names[0]


def _is_decayed(path: Any) -> bool:
    return _names(path)[-1] not in _NOT_DECAYED
