"""Windows over texts that are too long for one row.

They are cut before the special tokens are added, as the library itself does when it truncates. Doing that here, a text
at a time, lets an error name the position: the library panics on a `stride` that is too large for a pair.
"""

from collections.abc import Iterator

import tokenizers

from bertjax.errors import InputError
from bertjax.text_inputs import raise_for_input


def encode_parts(
    bare: tokenizers.Tokenizer, texts: list[str], pairs: list[str] | None, first_position: int
) -> list[tuple[tokenizers.Encoding, ...]]:
    """Each text, or both texts of each pair, encoded by themselves.

    Args:
        bare: a backend without a post-processor, which is to see each encoding once: trimming offsets twice moves them.
        texts: list of n texts.
        pairs: list of n texts, or None.
        first_position: what an error message calls the first text.
    """
    columns = [texts] if pairs is None else [texts, pairs]
    try:
        return list(zip(*map(bare.encode_batch, columns), strict=True))
    except Exception as error:
        raise_for_input(bare, texts if pairs is None else list(zip(*columns, strict=True)), error, first_position)


def cut_windows(
    backend: tokenizers.Tokenizer, parts: tuple[tokenizers.Encoding, ...], room: int, stride: int, position: int
) -> Iterator[tuple[tokenizers.Encoding, list[int]]]:
    """The windows over the last of a row's one or two texts, in order.

    Args:
        backend: adds the special tokens.
        parts: the encodings of the texts, without special tokens; the last one is changed.
        room: how many tokens of text a row may have.
        stride: how many tokens a window shares with the one before.
        position: what an error message calls the row.

    Yields:
        Each window, and its token_type_ids: the library gives only the first window those of the template.
    """
    last = parts[-1]
    left = room - sum(map(len, parts[:-1]))
    if len(last) > left:
        if left <= stride:
            raise InputError(
                f"position {position}: the first text of the pair has {room - left} tokens, which leaves "
                f"{max(left, 0)} for a window over the {len(last)} of the second, and stride={stride} needs more; "
                "use a larger max_length, a smaller stride or a shorter first text"
            )
        last.truncate(left, stride=stride)
    whole = backend.post_process(*parts)
    types = dict(zip(whole.sequence_ids, whole.type_ids, strict=True))
    for window in (whole, *whole.overflowing):
        pieces = zip(window.sequence_ids, window.type_ids, strict=True)
        yield window, [own if sequence is None else types[sequence] for sequence, own in pieces]
