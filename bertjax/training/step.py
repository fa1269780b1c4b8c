"""The training step: a pure function of a state and a batch."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax import lax

from bertjax.checks import check_count
from bertjax.training.objective import Batch, Objective, Terms, model_objective
from bertjax.training.optimizer import Optimizer, Params, join
from bertjax.training.state import TrainState


class Metrics(NamedTuple):
    """What a step says of itself; float32 [] each.

    Attributes:
        loss: the mean over the step's labels, before the step.
        gradient_norm: of all gradients together, before they are clipped.
        learning_rate: the step's.
    """

    loss: jax.Array
    gradient_norm: jax.Array
    learning_rate: jax.Array


def train_step(
    model: nnx.Module,
    optimizer: Optimizer,
    *,
    objective: Objective | None = None,
    accumulate: int = 1,
    shardings: Any = None,
    **options: Any,
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """A compiled step of training: from a state and a batch to the next state and what there is to say of it.

    The state that it is given is used up: its memory is taken for the next. The function is pure but for that, and goes
    into a caller's own `jit` or `lax.scan`.

    Args:
        model: what is trained; its parameters are not read, those of the state are.
        optimizer: what `AdamW.build` made for it.
        objective: what is made small; default: the loss that the model computes.
        accumulate: into how many parts a batch is divided: all of its arrays have that many along an axis in front.
            Gradients are those of the mean over the labels of all parts, in the memory that one takes.
        shardings: where the state lies, and is to lie after the step, as `bertjax.sharding.shardings_of` says it of
            the state; default: JAX's choice.
        **options: of the model's call, such as `max_segments` or `max_predictions`.
    """
    check_count("accumulate", accumulate)
    objective = objective or model_objective(model, **options)

    def share(learnt: Params, fixed: Params, batch: Batch, key: jax.Array, counts: Terms) -> jax.Array:
        means = objective.losses(join(learnt, fixed), batch, key)
        shares = zip(means, objective.counts(batch), counts, strict=True)
        # The mean over nothing is NaN, and no part of the sum.
        return sum(jnp.where(here > 0, mean * here / jnp.maximum(count, 1.0), 0.0) for mean, here, count in shares)

    differentiate = jax.value_and_grad(share)

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(state.key, state.step)
        counts = objective.counts(batch)
        if accumulate == 1:
            loss, gradients = differentiate(state.learnt, state.fixed, batch, key, counts)
        else:
            loss, gradients = _accumulated(differentiate, state, batch, jax.random.split(key, accumulate), counts)
        updates, optimizer_state = optimizer.transformation.update(gradients, state.optimizer, state.learnt)
        norm, rate = optax.tree.norm(optimizer.masked(gradients)), optimizer.rates(state.step)
        learnt = optax.apply_updates(state.learnt, updates)
        state = TrainState(state.step + 1, learnt, state.fixed, optimizer_state, state.key)
        return state, Metrics(loss, norm, jnp.asarray(rate, jnp.float32))

    return jax.jit(step, donate_argnums=0, out_shardings=None if shardings is None else (shardings, None))


def _accumulated(
    differentiate: Callable, state: TrainState, batch: Batch, keys: jax.Array, counts: Terms
) -> tuple[jax.Array, Params]:
    """The sums over the parts of a batch, of losses and of gradients."""

    def add(sums: Any, part: tuple[Batch, jax.Array]) -> tuple[Any, None]:
        found = differentiate(state.learnt, state.fixed, *part, counts)
        return jax.tree.map(jnp.add, sums, found), None

    zeros = (jnp.zeros((), jnp.float32), jax.tree.map(jnp.zeros_like, state.learnt))
    return lax.scan(add, zeros, (dict(batch), keys))[0]
