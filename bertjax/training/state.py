"""What a training run is at: parameters, optimiser, step, random key. A pytree, to be saved whole."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from bertjax.training.optimizer import Optimizer, Params, join, parameters


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """A training run between two steps; a pytree.

    Attributes:
        step: int32 [], how many steps have been made.
        learnt: the parameters that learn, a nested dict with None in the place of the others.
        fixed: the others, likewise.
        optimizer: the optimiser's state.
        key: the random key that every step's own is made of.
    """

    step: jax.Array
    learnt: Params
    fixed: Params
    optimizer: Any
    key: jax.Array

    @property
    def params(self) -> Params:
        """All parameters, a nested dict of arrays."""
        return join(self.learnt, self.fixed)

    def update(self, model: nnx.Module) -> None:
        """Gives a model these parameters. They are copies: the next step takes the memory of the state's own."""
        nnx.update(model, jax.tree.map(jnp.copy, self.params))


def new_state(model: nnx.Module | Params, optimizer: Optimizer, *, seed: int = 0) -> TrainState:
    """The state of a run that has made no step.

    Args:
        model: a model, or its parameters; copied, as a step takes the memory of the state that it is given.
        optimizer: what `AdamW.build` made for it.
        seed: of dropout, and of whatever else is drawn in a step.
    """
    learnt, fixed = optimizer.split(jax.tree.map(jnp.copy, parameters(model)))
    state = optimizer.transformation.init(learnt)
    return TrainState(jnp.zeros((), jnp.int32), learnt, fixed, state, jax.random.key(seed))
