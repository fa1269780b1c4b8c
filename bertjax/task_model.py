"""What all BERTs with heads have in common: parameters, outputs, checks and the one compiled call.

Every head is a dense layer on the encoder's output or on its pooler's, except that of the masked language model, which
has a layer of its own before it and usually the word embeddings for a kernel (Devlin et al. 2018, arXiv:1810.04805,
sections 3.1 and 4).
"""

import dataclasses
import functools
from collections.abc import Collection
from typing import TYPE_CHECKING, Any, ClassVar, Self

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from bertjax.checks import check_count
from bertjax.config import BertConfig
from bertjax.errors import ConfigError
from bertjax.flat import jit_model
from bertjax.inputs import check_dropout_key, check_inputs, check_label_count, check_labelled_segments
from bertjax.int8 import dtype_within
from bertjax.layers import BertPredictionHead, DType, dropout, linear
from bertjax.losses import IGNORED
from bertjax.model import BertModel, BertOutput, check_dtypes, check_max_segments, encode, module_tree

if TYPE_CHECKING:
    from pathlib import Path

Shape = tuple[int, ...]

#: What a `BertWithHeads` can have besides the encoder.
HEADS = ("predictions", "seq_relationship", "classifier", "qa_outputs")


@dataclasses.dataclass(frozen=True, kw_only=True)
class _HeadOutput:
    """What every model with heads returns besides logits; a pytree. Everything is float32.

    Attributes:
        loss: [], or None if no labels were given.
        hidden_states: as in `BertOutput`; for multiple choice, every choice is a row of the batch.
        attentions: likewise.
    """

    loss: jax.Array | None = None
    hidden_states: jax.Array | None = None
    attentions: jax.Array | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class LogitsOutput(_HeadOutput):
    """The output of a model with one head; float32 `logits`, whose shape the model says."""

    logits: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class PreTrainingOutput(_HeadOutput):
    """The output of `BertForPreTraining`; float32.

    Attributes:
        prediction_logits: [batch, length, vocab] or, with `max_predictions`, [max_predictions, vocab].
        seq_relationship_logits: [batch, 2] or, with `max_segments`, [batch, max_segments, 2]; class 0 says that the
            second text follows the first.
    """

    prediction_logits: jax.Array
    seq_relationship_logits: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class QuestionAnsweringOutput(_HeadOutput):
    """The output of `BertForQuestionAnswering`; float32.

    Attributes:
        start_logits: [batch, length], for the answer's first token.
        end_logits: [batch, length], for its last.
    """

    start_logits: jax.Array
    end_logits: jax.Array


class BertWithHeads(nnx.Module):
    """BERT's encoder and any of its heads: the parameters. What is computed with them is up to the subclass.

    Args:
        config: sizes and constants.
        heads: names out of `HEADS`.
        add_pooling_layer: whether the encoder has a pooler.
        tied: whether "predictions" uses the word embeddings for a kernel instead of having its own.
        num_labels: width of "classifier"; default: `config.num_labels`.
        dtype, param_dtype, remat, unroll, attention, rngs: see `BertModel`.

    Raises:
        ConfigError: there is no such head, or an option is not usable.
    """

    def __init__(
        self,
        config: BertConfig,
        heads: Collection[str],
        *,
        add_pooling_layer: bool,
        tied: bool = True,
        num_labels: int | None = None,
        dtype: DType = jnp.float32,
        param_dtype: DType = jnp.float32,
        remat: bool = False,
        unroll: int | bool = 1,
        attention: str = "auto",
        rngs: nnx.Rngs,
    ):
        unknown = sorted(set(heads) - set(HEADS))
        if unknown:
            raise ConfigError(f"unknown head(s) {', '.join(map(repr, unknown))}; expected {', '.join(HEADS)}")
        if num_labels is not None:
            check_count("num_labels", num_labels, error=ConfigError)
        dtype, param_dtype = check_dtypes(dtype, param_dtype)
        options = {"dtype": dtype_within(dtype), "param_dtype": param_dtype, "rngs": rngs}
        dense = functools.partial(linear, config.hidden_size, initializer_range=config.initializer_range, **options)
        self.config = config
        encoder = {"remat": remat, "unroll": unroll, "attention": attention}
        self.bert = BertModel(config, add_pooling_layer=add_pooling_layer, **encoder, **options | {"dtype": dtype})
        self.predictions = BertPredictionHead(config, tied=tied, **options) if "predictions" in heads else None
        self.seq_relationship = dense(2) if "seq_relationship" in heads else None
        self.classifier = dense(num_labels or config.num_labels) if "classifier" in heads else None
        self.classifier_dropout = config.classifier_dropout if "classifier" in heads else None
        self.qa_outputs = dense(2) if "qa_outputs" in heads else None
        # As in `BertModel`: how the checkpoint spelt its names.
        self.layout = None

    @classmethod
    def from_pretrained(cls, path_or_hub_id: "str | Path", **options: Any) -> Self:
        """Loads a checkpoint; see `bertjax.pretrained.from_pretrained` for the options and the errors."""
        from bertjax.pretrained import from_pretrained  # not at the top, for the reason given in `BertModel`

        return from_pretrained(path_or_hub_id, cls, **options)

    def save_pretrained(self, folder: "str | Path", **options: Any) -> None:
        """Writes a Hugging Face folder; see `bertjax.pretrained.save_pretrained` for the options and the errors."""
        from bertjax.pretrained import save_pretrained

        save_pretrained(self, folder, **options)

    def __str__(self) -> str:
        return module_tree(self)


class TaskModel(BertWithHeads):
    """A BERT for one task: the class fixes the heads, the configuration says the rest (labels, tying).

    Calling one compiles it, once per shape; inside a caller's own `jit` the call is simply traced. The options are
    `BertModel`'s dtype, param_dtype, remat, unroll and attention.
    """

    heads: ClassVar[tuple[str, ...]]
    pooled: ClassVar[bool] = False
    text_labels: ClassVar[str | None] = None  # the name of the labels of which every text, or segment, has one
    labels: ClassVar[int | None] = None  # width of the classifier; None leaves it to the configuration

    def __init__(self, config: BertConfig, *, rngs: nnx.Rngs, **options: Any):
        fixed = {"add_pooling_layer": self.pooled, "tied": config.tie_word_embeddings, "num_labels": self.labels}
        super().__init__(config, self.heads, rngs=rngs, **fixed, **options)

    def __call__(self, *inputs: Any, labels: Any = None, **options: Any) -> Any:
        """Computes the logits of a batch and, with labels, the loss.

        Inputs, options and errors are those of `BertModel`; the class says what the labels are, and which output it
        returns and what is in it. Labels are checked as ids are: inside a caller's `jit` only their shape and dtype,
        and there a label that no class has makes the loss NaN and its gradient zero.
        """
        return self._compute({"labels": labels}, None, *inputs, **options)

    def _compute(
        self,
        targets: dict[str, Any],
        max_predictions: int | None,
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
    ) -> Any:
        """Checks everything and runs the compiled model.

        Args:
            targets: what the loss needs, by name, as the caller gave it.
            max_predictions: see `BertForMaskedLM`.
            input_ids, ...: see `BertModel`.
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
        check_max_segments(self.bert, max_segments, segment_ids)
        check_dropout_key(dropout_key)
        given = {name: value for name, value in targets.items() if value is not None}
        if given:
            batch, length = (inputs["inputs_embeds"] if input_ids is None else inputs["input_ids"]).shape[:2]
            texts = (batch,) if max_segments is None else (batch, max_segments)
            given = self._check_targets(given, (batch, length), texts)
            if max_segments is not None and targets.get(self.text_labels) is not None:
                check_labelled_segments(self.text_labels, targets[self.text_labels], segment_ids)
        if max_predictions is not None:
            check_label_count(targets["labels"], max_predictions)
        flags = (output_hidden_states, output_attentions)
        return _compiled_logits(self, inputs, given, dropout_key, *flags, max_segments, max_predictions)

    def _check_targets(self, targets: dict[str, Any], tokens: Shape, texts: Shape) -> dict[str, jax.Array]:
        """Checks what the caller gave to learn from; `tokens` and `texts` are the shapes of a label for each.

        The names it returns are what `_read` knows the labels by, and part of what is compiled.
        """
        raise NotImplementedError

    def _read(self, encoded: BertOutput, targets: dict[str, jax.Array], dropout_key: jax.Array | None) -> Any:
        """Maps the encoder's output to the model's, its hidden states and attentions left out."""
        raise NotImplementedError

    def _predict(self, hidden: jax.Array) -> jax.Array:
        """Maps float32 [..., hidden] to logits [..., vocab]."""
        return self.predictions(hidden, self.bert.embeddings.word_embeddings.embedding[...])

    def _classify(self, x: jax.Array, dropout_key: jax.Array | None) -> jax.Array:
        """Maps float32 [..., hidden] to logits [..., labels]."""
        return self.classifier(dropout(x, self.classifier_dropout, dropout_key))


def _logits(
    model: TaskModel,
    inputs: dict[str, jax.Array | None],
    targets: dict[str, jax.Array],
    dropout_key: jax.Array | None,
    output_hidden_states: bool,
    output_attentions: bool,
    max_segments: int | None,
    max_predictions: int | None,
) -> Any:
    encoder_key, head_key = (None, None) if dropout_key is None else jax.random.split(dropout_key)
    encoded = encode(model.bert, inputs, encoder_key, output_hidden_states, output_attentions, max_segments)
    if max_predictions is not None:
        states, labels = _labelled(encoded.last_hidden_state, targets["labels"], max_predictions)
        encoded, targets = dataclasses.replace(encoded, last_hidden_state=states), targets | {"labels": labels}
    output = model._read(encoded, targets, head_key)
    return dataclasses.replace(output, hidden_states=encoded.hidden_states, attentions=encoded.attentions)


_compiled_logits = jit_model(
    _logits, static_argnames=("output_hidden_states", "output_attentions", "max_segments", "max_predictions")
)


def _labelled(hidden: jax.Array, labels: jax.Array, count: int) -> tuple[jax.Array, jax.Array]:
    """The tokens that have a label, in row-major order, and padding up to `count`.

    Args:
        hidden: float32 [batch, length, hidden].
        labels: int32 [batch, length].
        count: how many there are at most.

    Returns:
        Their states [count, hidden] and labels [count]. If there are more, every label is one that no class has, so
        that the loss is NaN.
    """
    mesh = jax.typeof(hidden).sharding.mesh
    if AxisType.Explicit in mesh.axis_types:
        # JAX does not choose the layout of what is gathered from all over such a mesh; here every device has all.
        everywhere = NamedSharding(mesh, PartitionSpec())
        hidden, labels = jax.sharding.reshard(hidden, everywhere), jax.sharding.reshard(labels, everywhere)
    labels = labels.reshape(-1)
    kept = labels != IGNORED
    places = jnp.nonzero(kept, size=count, fill_value=labels.size)[0]
    states = hidden.reshape(-1, hidden.shape[-1]).at[places].get(mode="fill", fill_value=0.0)
    labels = labels.at[places].get(mode="fill", fill_value=IGNORED)
    return states, jnp.where(kept.sum() > count, -1, labels)
