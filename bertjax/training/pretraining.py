"""Texts as BERT is pre-trained on them: rows of one text, and pairs for next sentence prediction.

Devlin et al. 2018 (arXiv:1810.04805), section 3.1; the procedure is that of google-research/bert's
create_pretraining_data.py. Masks are not a part of it: see `bertjax.training.masking`. numpy only.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from bertjax.checks import check_count, check_number
from bertjax.errors import InputError
from bertjax.training.masking import flatten

# The shortest target: a token of each segment.
_SHORTEST = 2


@dataclasses.dataclass(frozen=True, eq=False)
class PairExamples:
    """Pairs of segments, [CLS] A [SEP] B [SEP].

    Attributes:
        input_ids: one int32 [tokens_i] per pair.
        token_type_ids: one int32 [tokens_i] per pair: 1 in B and at the [SEP] behind it, 0 before.
        next_sentence_label: int32 [pairs], 0 where B follows A, 1 where it is from another document.
    """

    input_ids: list[np.ndarray]
    token_type_ids: list[np.ndarray]
    next_sentence_label: np.ndarray

    def __len__(self) -> int:
        """The number of pairs."""
        return len(self.input_ids)


def blocks(rows: Sequence[np.ndarray], max_length: int, cls_id: int, sep_id: int) -> list[np.ndarray]:
    """Texts as [CLS] ... [SEP]; one that is too long becomes several, which follow one another.

    Args:
        rows: int [tokens_i] each, the ids of a text without special tokens.
        max_length: tokens of a block at most, special tokens included; from 3.
        cls_id: the id before each.
        sep_id: the id behind each.

    Returns:
        int32 [tokens_j] each, in the order of the texts. Every token is in one of them, and an empty text in none.

    Raises:
        InputError: a row is none of ids, or another argument is not usable.
    """
    room = check_count("max_length", max_length, least=3) - 2
    cls, sep = _special(cls_id=cls_id, sep_id=sep_id)
    flat, lengths = flatten(rows, "rows")
    ends = np.cumsum(lengths).tolist()
    return [
        np.concatenate((cls, flat[start : min(start + room, end)], sep))
        for first, end in zip([0, *ends], ends, strict=False)
        for start in range(first, end, room)
    ]


def sentence_pairs(
    rng: np.random.Generator,
    documents: Sequence[Sequence[np.ndarray]],
    max_length: int,
    cls_id: int,
    sep_id: int,
    short_probability: float = 0.1,
) -> PairExamples:
    """Pairs of segments, of which the second follows the first in its document, or is from another document.

    A document is gone through once, by chunks of whole sentences that together reach the target length. Of a chunk, a
    random number of sentences is A; B is the others or, in half the cases and where there are no others, sentences of
    another document from a random one on, and the others begin the next chunk. A pair that is too long loses tokens of
    its longer segment, each at the front or the back.

    The reference differs in that it may take B from A's own document, after ten attempts to find another. It goes
    through the documents in random order and several times, which is left to the caller, as is the order of pairs.

    Args:
        rng: what is drawn from; in the same state it gives the same pairs.
        documents: their sentences, int [tokens_i] each, without special tokens. Sentences without tokens are left out.
        max_length: tokens of a pair at most, special tokens included; from 5.
        cls_id: the id before each pair.
        sep_id: the id behind each segment.
        short_probability: of how many documents the target is not `max_length`, but a random length up to it.

    Returns:
        The pairs, in the order of the documents; each document with tokens has at least one.

    Raises:
        InputError: fewer than two documents have tokens, a sentence is none of ids, or another argument is not usable.
    """
    room = check_count("max_length", max_length, least=_SHORTEST + 3) - 3
    cls, sep = _special(cls_id=cls_id, sep_id=sep_id)
    check_number("short_probability", short_probability, lambda p: 0 <= p <= 1, "a number from 0 to 1", InputError)
    flat = (_Document.of(document, f"documents[{index}]") for index, document in enumerate(documents))
    corpus = [document for document in flat if len(document.tokens)]
    if len(corpus) < 2:
        raise InputError(
            f"{len(corpus)} document(s) with tokens; a sentence that does not follow is taken from another document, "
            "so two or more are needed (in a file of lines, an empty line ends a document)"
        )
    input_ids, token_type_ids, labels = [], [], []
    for index in range(len(corpus)):
        is_short = rng.random() < short_probability
        target = int(rng.integers(_SHORTEST, room, endpoint=True)) if is_short else room
        for a, b, label in _pairs(rng, corpus, index, target):
            a, b = _truncate(rng, a, b, room)
            input_ids.append(np.concatenate((cls, a, sep, b, sep)))
            token_type_ids.append(np.repeat(np.array([0, 1], np.int32), (len(a) + 2, len(b) + 1)))
            labels.append(label)
    return PairExamples(input_ids, token_type_ids, np.array(labels, np.int32))


class _Document(NamedTuple):
    """The sentences of a document in one array, as an array for each would take more memory than its tokens.

    Attributes:
        tokens: int32 [tokens].
        bounds: int64 [sentences + 1], where each begins, and the last ends.
    """

    tokens: np.ndarray
    bounds: np.ndarray

    @classmethod
    def of(cls, sentences: Sequence[np.ndarray], name: str) -> "_Document":
        tokens, lengths = flatten(sentences, name)
        return cls(tokens, np.cumsum([0, *lengths[lengths > 0]]))

    def reach(self, first: int, tokens: int) -> int:
        """The sentence behind the fewest from `first` on, at least one, that have so many tokens, or behind the last.

        No sentence is empty, so that bounds are in strict order.
        """
        end = int(np.searchsorted(self.bounds, self.bounds[first] + tokens))
        return min(max(end, first + 1), len(self.bounds) - 1)

    def between(self, first: int, end: int) -> np.ndarray:
        """The tokens of some sentences."""
        return self.tokens[self.bounds[first] : self.bounds[end]]


def _pairs(
    rng: np.random.Generator, corpus: Sequence[_Document], index: int, target: int
) -> Iterator[tuple[np.ndarray, np.ndarray, int]]:
    """A, B and label of each pair whose first segment is of one document."""
    document = corpus[index]
    first, sentences = 0, len(document.bounds) - 1
    while first < sentences:
        end = document.reach(first, target)
        middle = int(rng.integers(first + 1, end)) if end - first > 1 else end
        a = document.between(first, middle)
        if middle == end or rng.random() < 0.5:
            yield a, _from_another(rng, corpus, index, target - len(a)), 1
            first = middle
        else:
            yield a, document.between(middle, end), 0
            first = end


def _from_another(rng: np.random.Generator, corpus: Sequence[_Document], index: int, target: int) -> np.ndarray:
    """Sentences of any document but one."""
    other = int(rng.integers(len(corpus) - 1))
    document = corpus[other + (other >= index)]
    first = int(rng.integers(len(document.bounds) - 1))
    return document.between(first, document.reach(first, target))


def _truncate(rng: np.random.Generator, a: np.ndarray, b: np.ndarray, room: int) -> tuple[np.ndarray, np.ndarray]:
    """What is left when the longer segment, B if both are as long, loses a token until both together fit."""
    kept_a = min(len(a), max(room - len(b), (room + 1) // 2))
    kept_b = min(len(b), max(room - len(a), room // 2))
    return _cut(rng, a, kept_a), _cut(rng, b, kept_b)


def _cut(rng: np.random.Generator, tokens: np.ndarray, kept: int) -> np.ndarray:
    """So many tokens; of the others each was the first or the last of those still there, by a coin of its own."""
    start = int(rng.binomial(len(tokens) - kept, 0.5))
    return tokens[start : start + kept]


def _special(**ids: int) -> list[np.ndarray]:
    """An int32 [1] of each id."""
    return [np.array([check_count(name, value, least=0, most=2**31 - 1)], np.int32) for name, value in ids.items()]
