"""What training makes small: the losses of a batch, and over how many labels each is the mean."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from bertjax.heads import BertForMultipleChoice, BertForPreTraining, BertForQuestionAnswering
from bertjax.losses import IGNORED, cosine_loss, cross_entropy, ranking_loss
from bertjax.model import functional
from bertjax.sentence import SentenceModel
from bertjax.training.optimizer import Params

Batch = Mapping[str, jax.Array]
Terms = tuple[jax.Array, ...]

# A logit whose exponential is 0 beside any other; an infinity would have no difference from itself.
_NEVER = -1e30


class Objective(NamedTuple):
    """What is made small: the sum of one or several losses.

    Attributes:
        losses: of parameters, a batch and a random key: for each loss its mean over the batch's labels, float32 [].
        counts: of a batch: over how many labels each is the mean, float32 []. It sees batches with any axes in front.
    """

    losses: Callable[[Params, Batch, jax.Array], Terms]
    counts: Callable[[Batch], Terms]


def model_objective(model: nnx.Module, **options: Any) -> Objective:
    """The loss that a model with a head computes itself, of batches that have its labels.

    Args:
        model: one of the BertFor... classes.
        **options: of its call, such as `max_segments` or `max_predictions`.
    """
    apply, _ = functional(model)

    def losses(params: Params, batch: Batch, key: jax.Array) -> Terms:
        return (apply(params, **batch, **options, dropout_key=key).loss,)

    def both(params: Params, batch: Batch, key: jax.Array) -> Terms:
        batch = dict(batch)
        follows = batch.pop("next_sentence_label")
        output = apply(params, **batch, **options, dropout_key=key)
        return output.loss, cross_entropy(output.seq_relationship_logits, follows)

    if isinstance(model, BertForPreTraining):
        return Objective(both, lambda batch: (_count(batch["labels"]), _count(batch["next_sentence_label"])))
    if isinstance(model, BertForQuestionAnswering):
        return Objective(losses, lambda batch: (_count_spans(batch),))
    return Objective(losses, lambda batch: (_count(batch["labels"]),))


def ranking_objective(
    model: SentenceModel, *, scale: float = 20.0, dims: Sequence[int] = (), max_segments: int | None = None
) -> Objective:
    """Vectors of queries and of their passages are to be near, and those of other passages of the batch far.

    A batch has the model's inputs and `places`, int32 [columns, examples]: where the texts of an example stand among
    the rows, or among their segments if there are `max_segments`: its query, its passage, and any number of passages
    that are not. -1 stands for none, and an example without a query is not there.

    Args:
        model: the model.
        scale: see `losses.ranking_loss`.
        dims: the loss is the sum of those of the vectors cut to so many numbers each (Matryoshka, Kusupati et al. 2022,
            arXiv:2205.13147); default: the whole vectors.
        max_segments: see `SentenceModel`.
    """

    def loss(queries: jax.Array, *passages: jax.Array, places: jax.Array) -> jax.Array:
        own = jnp.where(places[0] < 0, IGNORED, jnp.arange(places.shape[1]))
        return ranking_loss(queries, jnp.concatenate(passages), own, scale)

    return _vector_objective(model, loss, dims, max_segments, ("places",))


def cosine_objective(model: SentenceModel, *, dims: Sequence[int] = (), max_segments: int | None = None) -> Objective:
    """The cosine of two vectors is to be a given number: `labels`, float32 [examples], NaN for an example not there.

    For the rest of a batch, and the arguments, see `ranking_objective`.
    """
    return _vector_objective(model, lambda *pair, labels: cosine_loss(*pair, labels), dims, max_segments, ("labels",))


def choice_objective(model: BertForMultipleChoice, *, max_segments: int | None = None) -> Objective:
    """Of several texts the right one is to have the greatest score.

    A batch has `labels`, int32 [examples], the column of the right text, -100 for an example that is not there; for
    the rest of it, and `max_segments`, see `ranking_objective`: the columns of `places` are the choices.
    """
    graphdef, _ = nnx.split(model)

    def losses(params: Params, batch: Batch, key: jax.Array) -> Terms:
        inputs = _inputs(batch)
        scores = nnx.merge(graphdef, params).score(**inputs, max_segments=max_segments, dropout_key=key).logits
        # What is not there is never chosen, and its gradient is zero.
        return (cross_entropy(_at_places(scores.reshape(-1), batch["places"], _NEVER).T, batch["labels"]),)

    return Objective(losses, lambda batch: (_count(batch["labels"]),))


def _inputs(batch: Batch) -> dict[str, jax.Array]:
    """What a model takes of a batch that says where the texts of its examples are."""
    return {name: array for name, array in batch.items() if name not in ("places", "labels")}


def _at_places(values: jax.Array, places: jax.Array, absent: float) -> jax.Array:
    """The values of texts [texts, ...] at `places`, and `absent` where these are -1."""
    # A place of -1 would be the last one.
    places = jnp.where(places < 0, len(values), places)
    return values.at[places].get(mode="fill", fill_value=absent)


def _vector_objective(
    model: SentenceModel,
    loss: Callable[..., jax.Array],
    dims: Sequence[int],
    max_segments: int | None,
    names: Sequence[str],
) -> Objective:
    apply, _ = functional(model)
    sizes = tuple(dims) or (model.embedding_dimension,)

    def losses(params: Params, batch: Batch, key: jax.Array) -> Terms:
        given = {name: batch[name] for name in names}
        inputs = _inputs(batch)
        vectors = apply(params, **inputs, max_segments=max_segments, dropout_key=key)
        vectors = vectors.reshape(-1, vectors.shape[-1])
        columns = _at_places(vectors, batch["places"], 0.0)
        return tuple(loss(*(column[:, :size] for column in columns), **given) for size in sizes)

    return Objective(losses, lambda batch: ((batch["places"][..., 0, :] >= 0).sum().astype(jnp.float32),) * len(sizes))


def _count(labels: jax.Array) -> jax.Array:
    """How many labels are scored."""
    scored = ~jnp.isnan(labels) if jnp.issubdtype(labels.dtype, jnp.floating) else labels != IGNORED
    return scored.sum().astype(jnp.float32)


def _count_spans(batch: Batch) -> jax.Array:
    """How many spans are in their rows."""
    return (batch["start_positions"] < batch["input_ids"].shape[-1]).sum().astype(jnp.float32)
