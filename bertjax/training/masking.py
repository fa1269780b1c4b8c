"""Masks for masked language modelling: what is hidden in a text, and is to be told from the rest of it.

Devlin et al. 2018 (arXiv:1810.04805), section 3.1 and appendix A.1. Masks are drawn anew whenever a text is seen, as in
Liu et al. 2019 (arXiv:1907.11692), section 4.1. numpy only.
"""

import dataclasses
import functools
from collections.abc import Collection, Sequence
from typing import Any

import numpy as np

from bertjax.checks import check_count, check_number
from bertjax.errors import ConfigError, InputError
from bertjax.losses import IGNORED
from bertjax.tokenizer import Tokenizer

# Of what is to be predicted, the part that is replaced by the mask, and the part that is replaced by another token; the
# rest is left as it is.
_MASKED, _REPLACED = 0.8, 0.1


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Masking:
    """Chooses what is to be predicted, and hides most of it.

    Of a row's `count` tokens that are not special, round(probability * count) are chosen, and at least one: a fixed
    number, as in BERT's own data, and not a coin for each token. Each of these becomes the mask in 8 of 10 cases, a
    random token in 1, and stays as it is in 1.

    Two things differ from google-research/bert's create_pretraining_data.py: there special tokens are counted, too,
    which makes for one prediction more here and there, and the random token may be a special one.

    Args:
        mask_id: the id of the mask.
        vocab_size: ids are below it.
        special_ids: ids that are never chosen, and never the random token; the mask is one of them in any case.
        probability: the part of tokens that is chosen.
        whole_words: choose words, in random order; one with more pieces than are left to choose is passed over. A row
            may then have fewer predictions than above, or none, if it has no word that is short enough. Each piece is
            hidden, or not, for itself.
        continues: bool [vocab_size], which ids continue the word of the token before; needed for `whole_words`.

    Raises:
        ConfigError: a value is not usable, or every id is special.
    """

    mask_id: int
    vocab_size: int
    special_ids: Collection[int]
    probability: float = 0.15
    whole_words: bool = False
    continues: np.ndarray | None = None

    def __post_init__(self):
        check_count("vocab_size", self.vocab_size, error=ConfigError)
        for name, ids in {"mask_id": [self.mask_id], "special_ids": self.special_ids}.items():
            for index in ids:
                check_count(name, index, least=0, most=self.vocab_size - 1, error=ConfigError)
        check_number("probability", self.probability, lambda p: 0 < p <= 1, "a number above 0, at most 1", ConfigError)
        if not len(self._ordinary_ids):
            raise ConfigError(f"special_ids has every id below vocab_size={self.vocab_size}, so nothing can be masked")
        if self.whole_words:
            found = np.asarray(self.continues)
            if found.dtype != bool or found.shape != (self.vocab_size,):
                raise ConfigError(
                    f"continues is {found.dtype} of shape {found.shape}; whole_words needs bool [{self.vocab_size}]"
                )

    @classmethod
    def of(cls, tokenizer: Tokenizer, *, probability: float = 0.15, whole_words: bool = False) -> "Masking":
        """The masking for a tokenizer's ids.

        Special are the tokens in BERT's roles, the unknown token among them, other tokens that the tokenizer calls
        special, and ids that have no token.

        Args:
            tokenizer: the tokenizer.
            probability: see the class.
            whole_words: see the class.

        Raises:
            ConfigError: the tokenizer has no mask token; `whole_words`, but it does not mark pieces that continue a
                word by a prefix, such as "##"; or `probability` is not usable.
        """
        if tokenizer.mask_token_id is None:
            raise ConfigError("the tokenizer has no mask token; name its mask_token in tokenizer_config.json")
        return cls(
            mask_id=tokenizer.mask_token_id,
            vocab_size=tokenizer.vocab_size,
            special_ids=_special_ids(tokenizer),
            probability=probability,
            whole_words=whole_words,
            continues=_continues(tokenizer) if whole_words else None,
        )

    def __call__(
        self, rng: np.random.Generator, rows: Sequence[np.ndarray]
    ) -> tuple[list[np.ndarray], list[np.ndarray]]:
        """Masks rows of token ids; the rows themselves are left as they are.

        Args:
            rng: what is drawn from; in the same state it gives the same masks.
            rows: int [tokens_i] each, special tokens included.

        Returns:
            The ids with masks, and the labels: the id that was there where one is to be predicted, -100 elsewhere.
            int32 [tokens_i] each.

        Raises:
            InputError: a row is none of ids, or an id is out of range; says where.
        """
        flat, lengths = flatten(rows, "rows", self.vocab_size)
        chosen = self._choose(rng, flat, lengths)
        draws = rng.random(len(chosen))
        random_ids = self._ordinary_ids[rng.integers(len(self._ordinary_ids), size=len(chosen))]
        found = flat[chosen]
        replaced = np.where(draws < _MASKED + _REPLACED, random_ids, found)
        masked, labels = flat.copy(), np.full_like(flat, IGNORED)
        masked[chosen] = np.where(draws < _MASKED, self.mask_id, replaced)
        labels[chosen] = found
        ends = np.cumsum(lengths).tolist()
        bounds = list(zip([0, *ends], ends, strict=False))
        return [masked[start:end] for start, end in bounds], [labels[start:end] for start, end in bounds]

    def most(self, lengths: Sequence[int] | np.ndarray) -> int:
        """How many predictions rows of these lengths have at most: what `max_predictions` has to be.

        Args:
            lengths: tokens of each row, special tokens included.
        """
        return int(self._budgets(np.asarray(lengths, np.int64)).sum())

    def _budgets(self, counts: np.ndarray) -> np.ndarray:
        """How many tokens are chosen of rows with so many ordinary ones, int64 [rows]; halves are rounded to even."""
        return np.where(counts > 0, np.maximum(np.rint(self.probability * counts), 1), 0).astype(np.int64)

    def _choose(self, rng: np.random.Generator, flat: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """The positions, ascending, that are to be predicted."""
        owners = np.repeat(np.arange(len(lengths), dtype=np.min_scalar_type(len(lengths))), lengths)
        places = np.flatnonzero(self._is_ordinary[flat])
        owners = owners[places]
        starts = self._word_starts(flat[places], places, owners)
        sizes, owner_of_word = np.diff(starts, append=len(places)), owners[starts]
        order = rng.permutation(len(starts))
        # Of small integers a stable sort takes linear time. It leaves the words of a row in their random order.
        order = order[np.argsort(owner_of_word[order], kind="stable")]
        budgets = self._budgets(np.bincount(owners, minlength=len(lengths)))
        is_chosen = np.zeros(len(starts), bool)
        is_chosen[order] = _taken(sizes[order], owner_of_word[order], budgets)
        return places[np.repeat(is_chosen, sizes)]

    def _word_starts(self, ids: np.ndarray, places: np.ndarray, owners: np.ndarray) -> np.ndarray:
        """Which of the ordinary tokens begin a word, or all where each is chosen for itself; indices, ascending."""
        if not self.whole_words:
            return np.arange(len(ids))
        is_first = ~np.asarray(self.continues)[ids]
        # A piece that stands behind a special token or at a row's beginning has lost what it continues.
        is_first |= (np.diff(places, prepend=-2) != 1) | (np.diff(owners.astype(np.int64), prepend=-1) != 0)
        return np.flatnonzero(is_first)

    @functools.cached_property
    def _is_ordinary(self) -> np.ndarray:
        """Which ids are not special, bool [vocab_size]."""
        is_ordinary = np.ones(self.vocab_size, bool)
        is_ordinary[[self.mask_id, *self.special_ids]] = False
        return is_ordinary

    @functools.cached_property
    def _ordinary_ids(self) -> np.ndarray:
        return np.flatnonzero(self._is_ordinary).astype(np.int32)


def flatten(rows: Sequence[np.ndarray], name: str, limit: int = 2**31) -> tuple[np.ndarray, np.ndarray]:
    """Rows of ids one after another.

    Args:
        rows: int [tokens_i] each.
        name: what a message calls them.
        limit: what ids have to be below.

    Returns:
        int32 [tokens], and the rows' lengths, int64 [rows].

    Raises:
        InputError: a row is none of ids, or an id is out of range; says where.
    """
    arrays = [np.asarray(row) for row in rows]
    for position, array in enumerate(arrays):
        if array.ndim != 1 or array.dtype.kind not in "iu":
            raise InputError(
                f"{name}[{position}] is {array.dtype} of shape {array.shape}, expected token ids: integers, [tokens]"
            )
    lengths = np.array([len(array) for array in arrays], np.int64)
    flat = np.concatenate(arrays, dtype=np.int64) if arrays else np.zeros(0, np.int64)
    wrong = np.flatnonzero((flat < 0) | (flat >= limit))
    if len(wrong):
        ends = np.cumsum(lengths)
        row = int(np.searchsorted(ends, wrong[0], side="right"))
        place = int(wrong[0] - ends[row] + lengths[row])
        raise InputError(f"{name}[{row}][{place}] is {flat[wrong[0]]}, ids are from 0 to {limit - 1}")
    return flat.astype(np.int32), lengths


def _taken(sizes: np.ndarray, owners: np.ndarray, budgets: np.ndarray) -> np.ndarray:
    """Goes through each row's words in order and takes every one that still fits into the row's budget.

    All rows at once, and many words at a time: up to the first that does not fit. What is left is then less than that
    word's size, so the rounds are no more than the longest word has pieces.

    Args:
        sizes: int64 [words], 1 or more.
        owners: int [words], ascending, each word's row.
        budgets: int64 [rows].

    Returns:
        bool [words].
    """
    taken, left, waiting = np.zeros(len(sizes), bool), budgets, np.arange(len(sizes))
    while True:
        waiting = waiting[sizes[waiting] <= left[owners[waiting]]]
        if not len(waiting):
            return taken
        size, owner = sizes[waiting], owners[waiting]
        total = np.cumsum(size)
        before_row = np.append(0, total)[np.searchsorted(owner, np.arange(len(left)))]
        fits = total <= (before_row + left)[owner]
        taken[waiting[fits]] = True
        left = left - np.bincount(owner[fits], size[fits], minlength=len(left)).astype(np.int64)
        waiting = waiting[~fits]


def _special_ids(tokenizer: Tokenizer) -> frozenset[int]:
    roles = (getattr(tokenizer, f"{name}_token_id") for name in ("unk", "sep", "pad", "cls", "mask"))
    added = (index for index, token in tokenizer.backend.get_added_tokens_decoder().items() if token.special)
    # Ids without a token: those of blank lines of vocab.txt, and of all but the last line with the same token.
    tokens = {index for token, index in tokenizer.backend.get_vocab(with_added_tokens=True).items() if token}
    gaps = set(range(tokenizer.vocab_size)) - tokens
    return frozenset({index for index in (*roles, *added) if index is not None} | gaps)


def _continues(tokenizer: Tokenizer) -> np.ndarray:
    """Which ids continue a word, bool [vocab_size]."""
    prefix: Any = getattr(tokenizer.backend.model, "continuing_subword_prefix", None)
    if not prefix:
        raise ConfigError(
            f"whole_words: the tokenizer ({type(tokenizer.backend.model).__name__}) does not mark the pieces that "
            'continue a word, as WordPiece does by "##"; leave whole_words out'
        )
    continues = np.zeros(tokenizer.vocab_size, bool)
    vocab = tokenizer.backend.get_vocab(with_added_tokens=True)
    continues[[index for token, index in vocab.items() if token.startswith(prefix)]] = True
    return continues
