"""Words for what is masked in a text: what the masked language model was trained on (Devlin et al. 2018, section 3.1).

Only the masked positions are compared with the vocabulary, in blocks of two fixed sizes: logits of all positions,
[rows, length, vocab], would take forty times the memory of the hidden states.
"""

import dataclasses
import functools
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax

from bertjax.checks import check_count
from bertjax.engine import Encoded, Window
from bertjax.errors import ConfigError, InputError
from bertjax.heads import BertForMaskedLM
from bertjax.packing import PackedBatch
from bertjax.tasks.base import Plan, Task
from bertjax.text_inputs import check_text
from bertjax.tokenizer import Tokenizer
from bertjax.tokenizer_files import shorten

# Masks that are computed together: many where there are many, so that an accelerator is not kept waiting for the next
# block; else enough for a full-size matmul, and no burden on a single text that has one.
_BLOCKS = (512, 32)


@dataclasses.dataclass(frozen=True)
class Fill:
    """A word in the place of a mask.

    Attributes:
        score: its probability.
        token: its id.
        token_str: the token as the tokenizer decodes it.
        sequence: the text with the token in the mask's place, as the tokenizer decodes it, which may differ in case
            and spaces from what was given. Special tokens are left out, unless the text has several masks: then the
            others are kept, and so are all special tokens but padding.
    """

    score: float
    token: int
    token_str: str
    sequence: str


class FillMask(Task):
    """Guesses the words that are masked in a text; the results of transformers' fill-mask pipeline.

    Two things are stricter than there: a target has to be one token, and a text that is cut may not lose a mask.
    Where a text has several masks, each is filled as if the others stayed masked.
    """

    kind = BertForMaskedLM

    def __init__(self, model: BertForMaskedLM, tokenizer: Tokenizer, **options: Any):
        super().__init__(model, tokenizer, **options)
        if tokenizer.mask_token_id is None:
            raise ConfigError(f"{options.get('source', 'the model')}: the tokenizer has no mask token")

    def __call__(
        self,
        inputs: str | Iterable[str],
        *,
        top_k: int = 5,
        targets: str | Sequence[str] | None = None,
        show_progress_bar: bool | None = None,
    ) -> list[Any]:
        """Finds the likeliest words for each mask.

        Args:
            inputs: a text, or several, each with the tokenizer's mask token at least once.
            top_k: how many words for each mask.
            targets: choose among these words only, each of them one token; their scores are still probabilities among
                all words. There may be fewer of them than `top_k`.
            show_progress_bar: default: on a terminal, when it takes more than two seconds.

        Returns:
            For a text with one mask, a list of `Fill`, the likeliest first; for a text with several, such a list for
            each mask, in order. For several texts, a list of these.

        Raises:
            InputError: something in `inputs` is not a text, has no mask, or is so long that a mask is cut off, with
                its position; `top_k` is not from 1 to the vocabulary's size; or a target is not one token.
        """
        return self._answer(inputs, show_progress_bar, top_k=top_k, targets=targets)

    def plan(self, *, top_k: int = 5, targets: str | Sequence[str] | None = None) -> Plan:
        """See `Task.plan`."""
        top_k = check_count("top_k", top_k)
        words = self.model.config.vocab_size
        if top_k > words:
            raise InputError(f"top_k is {top_k}, the model has {words} words to choose from")
        ids = None if targets is None else self._target_ids(targets)
        count = top_k if ids is None else min(top_k, len(ids))
        return Plan(self._encode, functools.partial(self._run, ids, count), self._read, samples=self._samples)

    def _target_ids(self, targets: str | Sequence[str]) -> np.ndarray:
        """The ids of the words to choose among, int32 [words], ascending."""
        targets = [targets] if isinstance(targets, str) else targets
        if not isinstance(targets, Sequence) or not targets:
            raise InputError(f"targets is {targets!r}, expected a word or a list of words")
        return np.unique([self._target_id(word, position) for position, word in enumerate(targets)]).astype(np.int32)

    def _target_id(self, word: Any, position: int) -> int:
        """The id of a word: of the token that is spelt so, else of the one token that the word becomes."""
        check_text(f"targets[{position}]", word)
        index = self.tokenizer.token_to_id(word)
        if index is not None:
            return index
        tokens = self.tokenizer([word], return_alignment=True)
        ids = tokens.input_ids[0][tokens.alignments[0].sequence_ids >= 0]
        if len(ids) == 1 and ids[0] != self.tokenizer.unk_token_id:
            return int(ids[0])
        pieces = " ".join(str(self.tokenizer.id_to_token(int(index))) for index in ids) or "no token"
        raise InputError(
            f"targets[{position}] {shorten(word)} is {pieces} to the tokenizer; a mask stands for one token of the "
            "vocabulary"
        )

    def _encode(self, texts: list[str], position: int) -> Encoded:
        """A row for each text, checked to have all of the text's masks."""
        self._check_texts(texts, position)
        tokens = self.tokenizer(texts, max_length=self.max_length, first_position=position)
        for index, (ids, truncated) in enumerate(zip(tokens.input_ids, tokens.truncated, strict=True)):
            found = self._count(ids)
            if truncated and (masks := self._count(self.tokenizer([texts[index]]).input_ids[0])) > found:
                raise InputError(
                    f"inputs[{position + index}] is longer than {self.max_length} tokens and loses {masks - found} of "
                    f"its {masks} mask(s) where it is cut; shorten it"
                )
            if not found:
                mask = self.tokenizer.id_to_token(self.tokenizer.mask_token_id)
                raise InputError(f"inputs[{position + index}] has no {mask}, so there is nothing to fill")
        return Encoded(texts, tokens, np.arange(len(texts)))

    def _count(self, ids: np.ndarray) -> int:
        """How many masks a row of tokens has."""
        return int(np.count_nonzero(ids == self.tokenizer.mask_token_id))

    def _run(self, targets: np.ndarray | None, top_k: int, batch: PackedBatch) -> list[tuple[jax.Array, jax.Array]]:
        """Scores and ids [block, top_k] of each block of masks, in the order of `_masks`."""
        hidden = self.model.bert(**batch.inputs()).last_hidden_state
        blocks = _blocks(np.flatnonzero(self._masks(batch)).astype(np.int32))
        return [best_words(self.model, hidden, block, targets, top_k=top_k) for block in blocks]

    def _samples(self, shape: tuple[int, int]) -> list[list[np.ndarray]]:
        # As many masks as there can be, for the large blocks, and one, for a small one.
        full = np.full(shape[1], self.tokenizer.mask_token_id)
        return [[full] * shape[0], [full[:1]]]

    def _masks(self, batch: PackedBatch) -> np.ndarray:
        """Which positions are masked, bool [rows, length]."""
        return (batch.input_ids == self.tokenizer.mask_token_id) & (batch.segment_ids > 0)

    def _read(self, window: Window) -> list[Any]:
        owners, scores, words = [], [], []
        for batch, blocks in window.steps:
            owner = batch.items[batch.owners(padding=-1)[self._masks(batch)]]
            owners.append(owner)
            for parts, values in zip((scores, words), zip(*blocks, strict=True), strict=True):
                parts.append(np.concatenate(list(map(np.asarray, values)))[: len(owner)])
        owner, scores, words = map(np.concatenate, (owners, scores, words))
        # Masks are found in the order of their text, and a stable sort leaves them so.
        order = np.argsort(owner, kind="stable")
        groups = np.split(order, np.cumsum(np.bincount(owner))[:-1])
        rows = window.encoded.tokens.input_ids
        return [self._fills(ids, scores[group], words[group]) for ids, group in zip(rows, groups, strict=True)]

    def _fills(self, ids: np.ndarray, scores: np.ndarray, words: np.ndarray) -> list[Any]:
        """The answer to one text: its tokens, and what was found for each of its masks, [masks, top_k]."""
        places = np.flatnonzero(ids == self.tokenizer.mask_token_id)
        single = len(places) == 1
        fills = [
            [
                Fill(
                    score=score,
                    token=word,
                    token_str=self.tokenizer.decode([word], skip_special_tokens=False),
                    sequence=self._filled(ids, place, word, skip_special_tokens=single),
                )
                for score, word in zip(*best, strict=True)
            ]
            for place, *best in zip(places, scores.tolist(), words.tolist(), strict=True)
        ]
        return fills[0] if single else fills

    def _filled(self, ids: np.ndarray, place: int, word: int, skip_special_tokens: bool) -> str:
        filled = ids.copy()
        filled[place] = word
        return self.tokenizer.decode(filled[filled != self.tokenizer.pad_token_id], skip_special_tokens)


def _blocks(places: np.ndarray) -> list[np.ndarray]:
    """Positions int32 [places] in blocks of the sizes of `_BLOCKS`, in order; the last one is padded with zeros."""
    large, small = _BLOCKS
    whole = len(places) // large * large
    rest = np.pad(places[whole:], (0, (whole - len(places)) % small))
    return [*places[:whole].reshape(-1, large), *rest.reshape(-1, small)]


@functools.partial(jax.jit, static_argnames="top_k")
def best_words(
    model: nnx.Module, hidden: jax.Array, places: jax.Array, targets: jax.Array | None, *, top_k: int
) -> tuple[jax.Array, jax.Array]:
    """The likeliest words of some positions.

    Args:
        model: a `BertForMaskedLM`.
        hidden: float32 [rows, length, hidden].
        places: int32 [places], positions counted over all rows.
        targets: int32 [words], the ids to choose among, or None for all.
        top_k: how many, at most as many as there are to choose among.

    Returns:
        float32 [places, top_k], the softmax over all words, descending, and int32 [places, top_k], their ids.
    """
    states = hidden.reshape(-1, hidden.shape[-1])[places]
    logits = model.predictions(states, model.bert.embeddings.word_embeddings.embedding[...])
    total = jax.nn.logsumexp(logits, axis=-1, keepdims=True)
    best, words = lax.top_k(logits if targets is None else logits[:, targets], top_k)
    return jnp.exp(best - total), words if targets is None else targets[words]
