"""What a tokenizer gives: ragged rows of ids, and where in the text each token stands."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import tokenizers

from bertjax.errors import InputError
from bertjax.text_inputs import whole_number


@dataclass(frozen=True, eq=False)
class Alignment:
    """Where the tokens of one row come from.

    Attributes:
        offsets: int32 [tokens, 2], each token's start and end (exclusive) in the characters of its own text, as Python
            counts them; (0, 0) for special tokens that the tokenizer added. Pieces of one character share its offsets,
            and a character that the normalizer drops (a control character, an accent that stands alone) belongs to no
            token. Byte-level BPE and Unigram may count the space before a word as part of it.
        word_ids: int32 [tokens], which word of its text a token belongs to, -1 for special tokens. What a word is, the
            tokenizer's pre-tokenizer decides; BERT's takes punctuation and each Chinese character for one. The ids
            count up, but may leave some out.
        sequence_ids: int32 [tokens], 0 in the first text, 1 in the second of a pair, -1 for special tokens.
    """

    offsets: np.ndarray
    word_ids: np.ndarray
    sequence_ids: np.ndarray

    def char_span(self, first: int, last: int, *, align_to_words: bool = False) -> tuple[int, int]:
        """The characters that a span of tokens covers, as the start and end (exclusive) of a slice of its text.

        Args:
            first: the position of the span's first token in the row.
            last: that of its last, inclusive.
            align_to_words: widen the span to whole words, as far as the row has them: one that a window or
                `max_length` cuts has only the part that is in the row.

        Raises:
            InputError: there are no such tokens, `last` is before `first`, or they are not all of one text.
        """
        first, last = whole_number(first, "first"), whole_number(last, "last")
        if not first <= last < len(self.offsets):
            raise InputError(f"tokens {first} to {last} are no span of a row of {len(self.offsets)} tokens")
        sequences = self.sequence_ids[first : last + 1]
        if sequences[0] < 0 or (sequences != sequences[0]).any():
            raise InputError(f"tokens {first} to {last} are not all of one text: their sequence_ids are {sequences}")
        if align_to_words:
            first, last = self._word(first)[0], self._word(last)[-1]
        return int(self.offsets[first, 0]), int(self.offsets[last, 1])

    def _word(self, token: int) -> np.ndarray:
        """The positions of the tokens of a token's word."""
        same_text = self.sequence_ids == self.sequence_ids[token]
        return np.flatnonzero(same_text & (self.word_ids == self.word_ids[token]))


@dataclass(frozen=True, eq=False)
class Tokens:
    """Ragged token lists: a row for each text in order, or for each window of a text.

    Attributes:
        input_ids: one int32 array [tokens_i] per row, special tokens included.
        token_type_ids: one int32 array [tokens_i] per row: 0 in the first segment, 1 in the second (as the
            tokenizer's template says).
        truncated: bool [n], which rows lost tokens to `max_length`.
        pad_token_id: the id `padded` fills up with.
        alignments: one `Alignment` per row, or None where they were not asked for.
    """

    input_ids: list[np.ndarray]
    token_type_ids: list[np.ndarray]
    truncated: np.ndarray
    pad_token_id: int
    alignments: list[Alignment] | None = None

    def __len__(self) -> int:
        """The number of rows."""
        return len(self.input_ids)

    @classmethod
    def join(cls, parts: Sequence["Tokens"]) -> "Tokens":
        """The rows of several, of one tokenizer and all with alignments or all without, one after another."""
        aligned = parts[0].alignments is not None
        return cls(
            input_ids=[row for part in parts for row in part.input_ids],
            token_type_ids=[row for part in parts for row in part.token_type_ids],
            truncated=np.concatenate([part.truncated for part in parts]),
            pad_token_id=parts[0].pad_token_id,
            alignments=[each for part in parts for each in part.alignments] if aligned else None,
        )

    def padded(self, length: int | None = None) -> dict[str, np.ndarray]:
        """Pad on the right to one rectangle.

        Args:
            length: the number of columns; None for the longest row's.

        Returns:
            `input_ids`, `attention_mask` (1 on tokens, 0 on padding) and `token_type_ids` (0 on padding), each
            int32 [n, length]. Without rows, [0, length] (or [0, 0]).

        Raises:
            InputError: `length` is not a whole number, or shorter than a row.
        """
        lengths = np.array([len(row) for row in self.input_ids], np.int64)
        longest = int(lengths.max(initial=0))
        length = longest if length is None else whole_number(length, "length")
        if length < longest:
            raise InputError(
                f"length={length} is shorter than row {int(lengths.argmax())}, which has {longest} tokens; "
                "pass a larger length, or tokenize with a smaller max_length"
            )
        is_token = np.arange(length) < lengths[:, None]
        return {
            "input_ids": _fill(is_token, self.input_ids, self.pad_token_id),
            "attention_mask": is_token.astype(np.int32),
            "token_type_ids": _fill(is_token, self.token_type_ids, 0),
        }


def _fill(is_token: np.ndarray, rows: list[np.ndarray], padding: int) -> np.ndarray:
    """Lay ragged rows out in the rectangle `is_token`, bool [n, length]."""
    filled = np.full(is_token.shape, padding, np.int32)
    if rows:
        filled[is_token] = np.concatenate(rows)
    return filled


def int32_rows(rows: list[list[int]]) -> list[np.ndarray]:
    """Lists of numbers as int32 arrays."""
    return [np.array(row, np.int32) for row in rows]


def align(encoding: tokenizers.Encoding) -> Alignment:
    """The alignment of one row, of an encoding that has offsets (`encode_batch_fast` leaves them out)."""
    word_ids, sequence_ids = (
        np.array([-1 if index is None else index for index in ids], np.int32)
        for ids in (encoding.word_ids, encoding.sequence_ids)
    )
    return Alignment(np.array(encoding.offsets, np.int32).reshape(-1, 2), word_ids, sequence_ids)
