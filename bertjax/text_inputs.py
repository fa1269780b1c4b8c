"""Checks what a caller passes to a tokenizer, and says at which position an input is not usable."""

from collections.abc import Iterable, Mapping, Sequence, Set
from typing import Any, NoReturn

import tokenizers

from bertjax.checks import as_integer
from bertjax.errors import InputError, TokenizerError
from bertjax.tokenizer_files import shorten


def whole_number(value: Any, name: str) -> int:
    """A number from 0 as an int; whatever has no exact one is refused by `name`."""
    number = as_integer(value)
    if number is None or number < 0:
        raise InputError(f"{name} must be a whole number from 0, not {value!r}")
    return number


def check_text(name: str, text: Any) -> None:
    """Raises `InputError` by `name` if something is no str, or one with a lone surrogate, which no tokenizer takes."""
    _check_str(name, text)
    try:
        text.encode()
    except UnicodeEncodeError:
        raise InputError(f"{name} has a lone surrogate, so is no text: {shorten(text)}") from None


def _check_str(name: str, text: Any) -> None:
    if not isinstance(text, str):
        raise InputError(f"{name} is {shorten(text)} of type {type(text).__name__}, not a str")


def check_iterable(name: str, inputs: Any) -> None:
    """Raises `InputError` by `name` if something is no list of inputs, nor another iterable of them."""
    # Bytes and sets iterate, too, but over numbers and in no order; a mapping over its keys.
    if isinstance(inputs, (str, bytes, bytearray, Mapping, Set)) or not isinstance(inputs, Iterable):
        raise InputError(f"{name} is a {type(inputs).__name__}, expected a list or another iterable that has an order")


def check_texts(
    texts: Sequence[str], pairs: Sequence[str] | None, first_position: int
) -> tuple[list[str], list[str] | None]:
    """The texts, and the second ones of pairs, as two lists of one length."""
    texts = _check_list(texts, "texts", first_position)
    if pairs is None:
        return texts, None
    pairs = _check_list(pairs, "pairs", first_position)
    if len(pairs) != len(texts):
        raise InputError(f"{len(texts)} texts, but {len(pairs)} pairs: each text needs its second one")
    return texts, pairs


def _check_list(texts: Any, name: str, first_position: int) -> list[str]:
    if isinstance(texts, str):
        raise InputError(f"{name} is one str: pass a list, [text]")
    check_iterable(name, texts)
    texts = list(texts)
    for position, text in enumerate(texts, first_position):
        _check_str(f"{name}[{position}]", text)
    return texts


def raise_for_input(
    backend: tokenizers.Tokenizer, inputs: list[Any], error: Exception, first_position: int
) -> NoReturn:
    """Say which input a failed batch failed on: the library doesn't."""
    for position, item in enumerate(inputs, first_position):
        for name, text in zip(("texts", "pairs"), item if isinstance(item, tuple) else (item,), strict=False):
            check_text(f"{name}[{position}]", text)
        try:
            backend.encode_batch_fast([item])
        except Exception as cause:
            if "too short" in str(cause):
                raise InputError(
                    f"position {position}: max_length can't be met by cutting that one text of the pair; "
                    "use a larger max_length, or truncation='longest_first'"
                ) from cause
            raise TokenizerError(f"position {position}: {cause}") from cause
    raise TokenizerError(str(error)) from error
