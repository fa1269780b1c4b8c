"""Sparse vectors over the vocabulary: SPLADE (Formal et al. 2021, arXiv:2109.10086, section 3).

A text's weight for a word is log(1 + relu(x)), the largest over its tokens, where x is the masked language model's
logit. The logits of all tokens, [tokens, vocab], are never there at once: the vocabulary is gone through in chunks.
"""

import dataclasses
import functools
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax

from bertjax.checks import check_count
from bertjax.engine import Window
from bertjax.errors import InputError
from bertjax.heads import BertForMaskedLM
from bertjax.packing import PackedBatch, max_segments
from bertjax.prompts import choose_prompt, encode_prompted
from bertjax.sparse_files import SparseSpec, read_sparse_spec, spec_files
from bertjax.tasks.base import Plan, Task, TaskFolder
from bertjax.tokenizer import Tokenizer

# Words of the vocabulary that are computed together: enough for a full-size matmul.
_CHUNK = 2048
# Words that are brought from the device for each text, to begin with. Models that were trained to be sparse rarely have
# more in one; where a text has, its batch is computed once more, and the rest of the call brings more.
_ACTIVE = 512

Found = tuple[jax.Array, jax.Array, jax.Array]


@dataclasses.dataclass(frozen=True, eq=False)
class SparseVector:
    """A vector over the vocabulary, most of whose entries are zero.

    Attributes:
        indices: int32 [active], the ids of the words that weigh something, ascending.
        values: float32 [active], their weights, above zero.
    """

    indices: np.ndarray
    values: np.ndarray


@dataclasses.dataclass
class _Room:
    """For how many words of a text there is room in what a call brings from the device; it only grows."""

    words: int


class SparseEncoder(Task):
    """Texts to sparse vectors over the vocabulary; the results of sentence-transformers' `SparseEncoder`.

    Args:
        model, tokenizer, max_length, step_tokens, source: see `Task`.
        spec: the pooling, prompts and limits; default: SPLADE's maximum over log(1 + relu(x)), without a limit.

    Raises:
        ConfigError: see `Task`.
    """

    kind = BertForMaskedLM

    def __init__(
        self,
        model: BertForMaskedLM,
        tokenizer: Tokenizer,
        *,
        spec: SparseSpec | None = None,
        max_length: int | None = None,
        **options: Any,
    ):
        self.spec = spec or SparseSpec()
        max_length = self.spec.max_seq_length if max_length is None else max_length
        super().__init__(model, tokenizer, max_length=max_length, **options)

    @classmethod
    def read_folder(cls, folder: Path) -> TaskFolder:
        """Reads how sentence-transformers saved a sparse encoder; see `sparse_files.read_sparse_spec`."""
        spec = read_sparse_spec(folder)
        return TaskFolder(spec.transformer, spec.do_lower_case, {"spec": spec})

    def folder_files(self) -> dict[str, Any]:
        """See `Task.folder_files`."""
        return spec_files(self.spec)

    def __call__(
        self,
        inputs: str | Iterable[str],
        *,
        max_active_dims: int | None = None,
        prompt_name: str | None = None,
        prompt: str | None = None,
        show_progress_bar: bool | None = None,
    ) -> Any:
        """Computes the vectors of texts.

        Args:
            inputs: a text, or several. The empty text is a text. What is longer than the model takes loses its end.
            max_active_dims: keep that many words, those that weigh most; of equal ones those of lower ids. Default:
                the model's own setting.
            prompt_name: name of one of the model's prompts, put before every text.
            prompt: a prompt of your own, put before every text; it wins over `prompt_name`.
            show_progress_bar: default: on a terminal, when it takes more than two seconds.

        Returns:
            A `SparseVector`; for several texts, a list of them.

        Raises:
            InputError: something in `inputs` is not a text, with its position; or an option is not usable.
        """
        options = {"max_active_dims": max_active_dims, "prompt_name": prompt_name, "prompt": prompt}
        return self._answer(inputs, show_progress_bar, **options)

    def decode(self, vector: SparseVector, top_k: int | None = None) -> list[tuple[str | None, float]]:
        """The words of a vector and their weights, the weightiest first.

        Args:
            vector: what a call returned.
            top_k: how many words; default: all.

        Returns:
            Pairs of a token and its weight. The token is None where the tokenizer has none for an id that the model
            has a row for.

        Raises:
            InputError: `top_k` is not an integer of at least 1, or `vector` is no `SparseVector`.
        """
        if top_k is not None:
            top_k = check_count("top_k", top_k)
        if not isinstance(vector, SparseVector):
            raise InputError(f"vector is a {type(vector).__name__}, expected a SparseVector, one at a time")
        order = np.argsort(-vector.values, kind="stable")[:top_k]
        words = map(self.tokenizer.id_to_token, vector.indices[order].tolist())
        return list(zip(words, vector.values[order].tolist(), strict=True))

    def plan(
        self, *, max_active_dims: int | None = None, prompt_name: str | None = None, prompt: str | None = None
    ) -> Plan:
        """See `Task.plan`."""
        if max_active_dims is not None:
            max_active_dims = check_count("max_active_dims", max_active_dims)
        prompt = choose_prompt(self.spec.prompts, self.spec.default_prompt_name, prompt_name, prompt)
        words = self.model.config.vocab_size
        limit = min(max_active_dims or self.spec.max_active_dims or words, words)
        room = _Room(min(limit, _ACTIVE))
        encode = functools.partial(encode_prompted, self.tokenizer, self.max_length, prompt, "inputs")
        run, read = functools.partial(self._run, room), functools.partial(self._read, room, limit)
        return Plan(encode, run, read, chunk=1024, samples=self._samples)

    def _run(self, room: _Room, batch: PackedBatch) -> Found:
        """What `splade` finds for the batch's texts, in their order in it, and for no texts after them."""
        hidden = self.model.bert(**batch.inputs()).last_hidden_state
        texts = _text_slots(batch)
        return splade(
            self.model,
            hidden,
            batch.owners(padding=texts),
            texts=texts,
            count=room.words,
            pooling_strategy=self.spec.pooling_strategy,
            activation_function=self.spec.activation_function,
            chunk=_CHUNK,
        )

    def _samples(self, shape: tuple[int, int]) -> list[list[np.ndarray]]:
        # Few texts, and as many as there can be; see `_text_slots`. More room is compiled when some text needs it.
        one = np.array([self.tokenizer.pad_token_id])
        return [[one], [one] * (shape[0] * max_segments(shape[1]))]

    def _read(self, room: _Room, limit: int, window: Window) -> list[SparseVector]:
        vectors: list[Any] = [None] * len(window.encoded.items)
        # What had no room is started again for all batches before the first of these is waited for.
        steps = [(batch, self._complete(room, limit, batch, found)) for batch, found in window.steps]
        for batch, found in steps:
            values, indices, active = map(np.asarray, found)
            for item, weights, words, size in zip(batch.items, values, indices, active, strict=False):
                words, weights = words[: min(size, limit)], weights[: min(size, limit)]
                order = np.argsort(words)
                vectors[item] = SparseVector(words[order], weights[order])
        return vectors

    def _complete(self, room: _Room, limit: int, batch: PackedBatch, found: Found) -> Found:
        """What was found, with all the words that count; if that needs more room, it stays for the rest of the call."""
        values, _, active = found
        needed = min(limit, int(np.asarray(active).max()))
        if needed <= values.shape[1]:
            return found
        if needed > room.words:
            # A power of two, so that few sizes are compiled.
            room.words = min(self.model.config.vocab_size, 1 << (needed - 1).bit_length())
        return self._run(room, batch)


def _text_slots(batch: PackedBatch) -> int:
    """How many texts to compute a batch for: a quarter of what its shape may hold, if that does, or all of it."""
    rows, length = batch.input_ids.shape
    most = rows * max_segments(length)
    few = max(1, most // 4)
    return few if len(batch.items) <= few else most


@functools.partial(jax.jit, static_argnames=("texts", "count", "pooling_strategy", "activation_function", "chunk"))
def splade(
    model: nnx.Module,
    hidden: jax.Array,
    owners: jax.Array,
    *,
    texts: int,
    count: int,
    pooling_strategy: str,
    activation_function: str,
    chunk: int,
) -> Found:
    """The weightiest words of texts; at no time are there more than [texts, vocab] and [tokens, chunk] numbers.

    Args:
        model: a `BertForMaskedLM`.
        hidden: float32 [rows, length, hidden].
        owners: int32 [rows, length], which text each token belongs to; `texts` marks padding.
        texts: how many texts there are.
        count: how many words to find for each, at most the vocabulary.
        pooling_strategy, activation_function: see `SparseSpec`.
        chunk: how many words of the vocabulary to compute at a time.

    Returns:
        float32 [texts, count], weights in descending order, int32 [texts, count], the ids of their words, and
        int32 [texts], how many words of a text have a weight above zero. A text without tokens has none.
    """
    states = model.predictions.transform(hidden.reshape(-1, hidden.shape[-1]))
    owners = owners.reshape(-1)
    embeddings = model.bert.embeddings.word_embeddings.embedding[...]
    words = model.predictions.bias.shape[0]
    chunk = min(chunk, words)

    def activate(logits: jax.Array) -> jax.Array:
        weights = jnp.log1p(jax.nn.relu(logits))
        return jnp.log1p(weights) if activation_function == "log1p_relu" else weights

    def step(index: jax.Array, weights: jax.Array) -> jax.Array:
        # The last chunk begins early enough to be whole, and computes some words a second time.
        start = jnp.minimum(index * chunk, words - chunk)
        logits = model.predictions.scores(states, embeddings, start, chunk)
        if pooling_strategy == "max":  # it commutes with what only ever grows, which then has less to do
            pooled = activate(jax.ops.segment_max(logits, owners, texts))
        else:
            pooled = jax.ops.segment_sum(activate(logits), owners, texts)
        return lax.dynamic_update_slice_in_dim(weights, pooled, start, axis=1)

    weights = lax.fori_loop(0, -(-words // chunk), step, jnp.zeros((texts, words), jnp.float32))
    return *lax.top_k(weights, count), (weights > 0).sum(axis=1)
