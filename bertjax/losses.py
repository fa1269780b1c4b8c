"""The losses that BERT's heads are trained with: pure functions of float32 logits, for `jit`, `grad` and `vmap`.

Values are PyTorch's, each the mean over what is scored. A loss that has nothing to average, or a cross entropy with a
label that no class has, is NaN, and its gradient is zero: the loss says so, and no parameter is spoilt.
"""

from collections.abc import Callable
from types import ModuleType

import jax
import jax.numpy as jnp
from jax import lax

from bertjax.config import BertConfig

#: The label of what is not scored.
IGNORED = -100


def cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """The mean of -log softmax(logits)[label] over the labels that are not `IGNORED`.

    Args:
        logits: float32 [..., classes].
        labels: int [...], 0 to classes - 1 or `IGNORED`.

    Returns:
        float32 []; NaN, with a zero gradient, if no label is kept or one is out of range.
    """
    labels, classes = labels.astype(jnp.int32), logits.shape[-1]
    kept = labels != IGNORED
    known = (labels >= 0) & (labels < classes)
    # What is ignored is left out before the softmax, not after: zero times its gradient would be NaN for an infinity.
    logits = jnp.where(known[..., None], logits, 0.0)
    losses = _optax().softmax_cross_entropy_with_integer_labels(logits, jnp.where(known, labels, 0))
    count = kept.sum()
    mean = jnp.sum(losses, where=known) / jnp.maximum(count, 1).astype(jnp.float32)
    return jnp.where((count > 0) & (known | ~kept).all(), mean, jnp.nan)


def binary_cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """The mean of -y log sigmoid(x) - (1 - y) log(1 - sigmoid(x)).

    Args:
        logits: float32 of any shape.
        labels: same shape, 0 to 1, or NaN for what is not scored.

    Returns:
        float32 []; NaN, with a zero gradient, if nothing is scored.
    """
    return _mean_of_scored(_optax().sigmoid_binary_cross_entropy, logits, labels)


def mean_squared_error(predictions: jax.Array, targets: jax.Array) -> jax.Array:
    """The mean of (x - y)^2.

    Args:
        predictions: float32 of any shape.
        targets: same shape; NaN for what is not scored.

    Returns:
        float32 []; NaN, with a zero gradient, if nothing is scored.
    """
    return _mean_of_scored(_optax().squared_error, predictions, targets)


def _mean_of_scored(loss: Callable[..., jax.Array], predictions: jax.Array, targets: jax.Array) -> jax.Array:
    targets = targets.astype(jnp.float32)
    scored = ~jnp.isnan(targets)
    # As above: what is not scored is left out before the loss.
    losses = loss(jnp.where(scored, predictions, 0.0), jnp.where(scored, targets, 0.0))
    count = scored.sum()
    mean = jnp.sum(losses, where=scored) / jnp.maximum(count, 1).astype(jnp.float32)
    return jnp.where(count > 0, mean, jnp.nan)


def span_loss(
    start_logits: jax.Array, end_logits: jax.Array, start_positions: jax.Array, end_positions: jax.Array
) -> jax.Array:
    """Half the sum of the cross entropies of a span's two ends (Devlin et al. 2018, section 4.2).

    Args:
        start_logits: float32 [..., length].
        end_logits: same shape.
        start_positions: int [...]; below 0 counts as 0, and `length` or more, a span that was cut off, is not scored.
        end_positions: likewise.

    Returns:
        float32 []; NaN, with a zero gradient, if no start or no end is scored.
    """

    def one(logits: jax.Array, positions: jax.Array) -> jax.Array:
        inside = positions < logits.shape[-1]
        return cross_entropy(logits, jnp.where(inside, jnp.maximum(positions, 0), IGNORED))

    return (one(start_logits, start_positions) + one(end_logits, end_positions)) / 2


def ranking_loss(queries: jax.Array, candidates: jax.Array, labels: jax.Array, scale: float = 20.0) -> jax.Array:
    """The cross entropy of which candidate is a query's own, by their cosines.

    The formula is that of Henderson et al. 2017 (arXiv:1705.00652, section 4.4); sentence-transformers calls it
    MultipleNegativesRankingLoss. Every candidate of the batch is a negative of all queries but its own.

    Args:
        queries: float32 [queries, dim].
        candidates: float32 [candidates, dim]. One of all zeros is padding, and nobody's candidate.
        labels: int [queries], the index of each one's own candidate, or `IGNORED`.
        scale: what cosines are multiplied by.

    Returns:
        float32 []; NaN, with a zero gradient, if no query is scored.
    """
    scores = scale * jnp.matmul(_unit(queries), _unit(candidates).T, precision=lax.Precision.HIGHEST)
    # A finite number that no cosine comes near: an infinity would be NaN in the gradient of a row of padding.
    scores = jnp.where((candidates != 0).any(-1), scores, -1e9)
    return cross_entropy(scores, labels)


def cosine_loss(first: jax.Array, second: jax.Array, targets: jax.Array) -> jax.Array:
    """The mean of (cos(u, v) - y)^2 over pairs of vectors: sentence-transformers' CosineSimilarityLoss.

    Args:
        first: float32 [pairs, dim].
        second: same shape.
        targets: float32 [pairs], or NaN for what is not scored.

    Returns:
        float32 []; NaN, with a zero gradient, if nothing is scored.
    """
    return mean_squared_error((_unit(first) * _unit(second)).sum(-1), targets)


def _unit(vectors: jax.Array) -> jax.Array:
    """Vectors scaled to length 1; zero stays zero, and its gradient is finite."""
    return vectors * lax.rsqrt(jnp.maximum(jnp.sum(vectors * vectors, axis=-1, keepdims=True), 1e-24))


def problem_type(config: BertConfig, num_labels: int, integers: bool) -> str:
    """Which of `labels.PROBLEM_TYPES` a sequence classifier is trained for.

    It is the configuration's. If that has none, it is, as in transformers, regression for a single label, else
    single_label_classification for labels that are integers, else multi_label_classification.

    Args:
        config: the model's configuration.
        num_labels: width of the classifier.
        integers: whether the labels have an integer dtype.

    Raises:
        ConfigError: the configured type is not one of them.
    """
    if config.problem_type is not None:
        return config.problem_type
    by_labels = "single_label_classification" if integers else "multi_label_classification"
    return "regression" if num_labels == 1 else by_labels


def _optax() -> ModuleType:
    """Imported when a loss is first computed: it takes a third of a second, and inference does without."""
    import optax

    return optax
