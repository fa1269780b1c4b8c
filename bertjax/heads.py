"""BERT with the heads it is pre-trained and fine-tuned with: the forward pass, up to the logits.

Every head is a dense layer on the encoder's output or on its pooler's, except that of the masked language model, which
has a layer of its own before it and usually the word embeddings for a kernel (Devlin et al. 2018, arXiv:1810.04805,
sections 3.1 and 4). Names and results are those of transformers. Dtypes are as in `BertModel`; logits are float32.
"""

import dataclasses
import functools
from collections.abc import Collection
from typing import TYPE_CHECKING, Any, ClassVar, Self

import jax
import jax.numpy as jnp
from flax import nnx

from bertjax.config import BertConfig
from bertjax.errors import ConfigError
from bertjax.inputs import check_inputs, flatten_choices
from bertjax.layers import BertPredictionHead, DType, dropout, linear
from bertjax.model import BertModel, BertOutput, check_dtype, encode, module_tree

if TYPE_CHECKING:
    from pathlib import Path

#: What a `BertWithHeads` can have besides the encoder.
HEADS = ("predictions", "seq_relationship", "classifier", "qa_outputs")


@dataclasses.dataclass(frozen=True, kw_only=True)
class _HeadOutput:
    """What every model with heads returns besides logits; a pytree. Everything is float32.

    Attributes:
        hidden_states: as in `BertOutput`; for multiple choice, every choice is a row of the batch.
        attentions: likewise.
    """

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
        prediction_logits: [batch, length, vocab].
        seq_relationship_logits: [batch, 2]; class 0 says that the second text follows the first.
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
        dtype, param_dtype, remat, unroll, rngs: see `BertModel`.

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
        rngs: nnx.Rngs,
    ):
        unknown = sorted(set(heads) - set(HEADS))
        if unknown:
            raise ConfigError(f"unknown head(s) {', '.join(map(repr, unknown))}; expected {', '.join(HEADS)}")
        if num_labels is not None and (not isinstance(num_labels, int) or num_labels < 1):
            raise ConfigError(f"num_labels is {num_labels!r}, expected a positive integer")
        dtypes = {"dtype": check_dtype("dtype", dtype), "param_dtype": check_dtype("param_dtype", param_dtype)}
        options = dtypes | {"rngs": rngs}
        dense = functools.partial(linear, config.hidden_size, initializer_range=config.initializer_range, **options)
        self.config = config
        self.bert = BertModel(config, add_pooling_layer=add_pooling_layer, remat=remat, unroll=unroll, **options)
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


class _TaskModel(BertWithHeads):
    """A BERT for one task: the class fixes the heads, the configuration says the rest (labels, tying).

    Calling one compiles it, once per shape; inside a caller's own `jit` the call is simply traced. The options are
    `BertModel`'s dtype, param_dtype, remat and unroll.
    """

    heads: ClassVar[tuple[str, ...]]
    pooled: ClassVar[bool] = False
    labels: ClassVar[int | None] = None  # width of the classifier; None leaves it to the configuration

    def __init__(self, config: BertConfig, *, rngs: nnx.Rngs, **options: Any):
        fixed = {"add_pooling_layer": self.pooled, "tied": config.tie_word_embeddings, "num_labels": self.labels}
        super().__init__(config, self.heads, rngs=rngs, **fixed, **options)

    def __call__(
        self,
        input_ids: Any,
        attention_mask: Any = None,
        token_type_ids: Any = None,
        position_ids: Any = None,
        segment_ids: Any = None,
        *,
        output_hidden_states: bool = False,
        output_attentions: bool = False,
        dropout_key: jax.Array | None = None,
    ) -> Any:
        """Computes the logits of a batch.

        Arguments and errors are those of `BertModel`; the class says which output it returns and what is in it.
        """
        inputs = check_inputs(self.config, input_ids, attention_mask, token_type_ids, position_ids, segment_ids)
        return _compiled_logits(self, inputs, dropout_key, output_hidden_states, output_attentions)

    def _read(self, encoded: BertOutput, dropout_key: jax.Array | None) -> Any:
        """Maps the encoder's output to the model's, its hidden states and attentions left out."""
        raise NotImplementedError

    def _predict(self, hidden: jax.Array) -> jax.Array:
        """Maps float32 [batch, length, hidden] to logits [batch, length, vocab]."""
        return self.predictions(hidden, self.bert.embeddings.word_embeddings.embedding[...])

    def _classify(self, x: jax.Array, dropout_key: jax.Array | None) -> jax.Array:
        """Maps float32 [..., hidden] to logits [..., labels]."""
        return self.classifier(dropout(x, self.classifier_dropout, dropout_key))


def _logits(
    model: _TaskModel,
    inputs: dict[str, jax.Array | None],
    dropout_key: jax.Array | None,
    output_hidden_states: bool,
    output_attentions: bool,
) -> Any:
    encoder_key, head_key = (None, None) if dropout_key is None else jax.random.split(dropout_key)
    encoded = encode(model.bert, inputs, encoder_key, output_hidden_states, output_attentions)
    output = model._read(encoded, head_key)
    return dataclasses.replace(output, hidden_states=encoded.hidden_states, attentions=encoded.attentions)


_compiled_logits = jax.jit(_logits, static_argnames=("output_hidden_states", "output_attentions"))


class BertForPreTraining(_TaskModel):
    """Masked-LM and next-sentence heads; returns a `PreTrainingOutput`."""

    heads = ("predictions", "seq_relationship")
    pooled = True

    def _read(self, encoded: BertOutput, dropout_key: jax.Array | None) -> PreTrainingOutput:
        return PreTrainingOutput(
            prediction_logits=self._predict(encoded.last_hidden_state),
            seq_relationship_logits=self.seq_relationship(encoded.pooler_output),
        )


class BertForMaskedLM(_TaskModel):
    """Masked-LM head; returns a `LogitsOutput` with logits [batch, length, vocab]."""

    heads = ("predictions",)

    def _read(self, encoded: BertOutput, dropout_key: jax.Array | None) -> LogitsOutput:
        return LogitsOutput(logits=self._predict(encoded.last_hidden_state))


class BertForNextSentencePrediction(_TaskModel):
    """Next-sentence head; returns a `LogitsOutput` with logits [batch, 2], class 0 for a text that does follow."""

    heads = ("seq_relationship",)
    pooled = True

    def _read(self, encoded: BertOutput, dropout_key: jax.Array | None) -> LogitsOutput:
        return LogitsOutput(logits=self.seq_relationship(encoded.pooler_output))


class BertForSequenceClassification(_TaskModel):
    """A classifier of whole rows; returns a `LogitsOutput` with logits [batch, `config.num_labels`]."""

    heads = ("classifier",)
    pooled = True

    def _read(self, encoded: BertOutput, dropout_key: jax.Array | None) -> LogitsOutput:
        return LogitsOutput(logits=self._classify(encoded.pooler_output, dropout_key))


class BertForMultipleChoice(_TaskModel):
    """A score for each of several texts; returns a `LogitsOutput` with logits [batch, choices].

    Every input is [batch, choices, length]. Errors count rows over the choices of all examples.
    """

    heads = ("classifier",)
    pooled = True
    labels = 1

    def __call__(
        self,
        input_ids: Any,
        attention_mask: Any = None,
        token_type_ids: Any = None,
        position_ids: Any = None,
        segment_ids: Any = None,
        **options: Any,
    ) -> LogitsOutput:
        """Computes the logits of a batch, as in the other models but for the inputs' extra axis."""
        (batch, choices), rows = flatten_choices(
            input_ids=input_ids,
            attention_mask=attention_mask,
            token_type_ids=token_type_ids,
            position_ids=position_ids,
            segment_ids=segment_ids,
        )
        output = super().__call__(**rows, **options)
        return dataclasses.replace(output, logits=output.logits.reshape(batch, choices))

    def _read(self, encoded: BertOutput, dropout_key: jax.Array | None) -> LogitsOutput:
        return LogitsOutput(logits=self._classify(encoded.pooler_output, dropout_key))


class BertForTokenClassification(_TaskModel):
    """A classifier of tokens; returns a `LogitsOutput` with logits [batch, length, `config.num_labels`]."""

    heads = ("classifier",)

    def _read(self, encoded: BertOutput, dropout_key: jax.Array | None) -> LogitsOutput:
        return LogitsOutput(logits=self._classify(encoded.last_hidden_state, dropout_key))


class BertForQuestionAnswering(_TaskModel):
    """Finds a span, the answer, in a row; returns a `QuestionAnsweringOutput`."""

    heads = ("qa_outputs",)

    def _read(self, encoded: BertOutput, dropout_key: jax.Array | None) -> QuestionAnsweringOutput:
        logits = self.qa_outputs(encoded.last_hidden_state)
        return QuestionAnsweringOutput(start_logits=logits[..., 0], end_logits=logits[..., 1])
