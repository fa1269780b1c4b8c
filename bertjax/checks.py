"""Checks of plain options: numbers and choices."""

import operator
import reprlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from bertjax.errors import InputError


def as_integer(value: Any) -> int | None:
    """An integer, numpy's included, as an int; None for a bool and for whatever else has no exact one."""
    if isinstance(value, bool):
        return None
    try:
        return operator.index(value)
    except TypeError:
        return None


def check_count(
    name: str, value: Any, least: int = 1, most: int | None = None, error: type[Exception] = InputError
) -> int:
    """An option as an int. Raises `error` if it is not an integer from `least` to `most`."""
    number = as_integer(value)
    if number is None or number < least or (most is not None and number > most):
        expected = "a positive integer" if least == 1 else f"an integer of at least {least}"
        limit = "" if most is None else f" of at most {most}"
        raise error(f"{name} is {reprlib.repr(value)}, expected {expected}{limit}")
    return number


def check_number(
    name: str, value: Any, is_right: Callable[[float], bool], expected: str, error: type[Exception]
) -> None:
    """Raises `error` if an option is no number, or not one as expected."""
    if isinstance(value, bool) or not isinstance(value, int | float | np.number) or not is_right(value):
        raise error(f"{name} is {reprlib.repr(value)}, expected {expected}")


def check_choice(name: str, value: Any, choices: Sequence[Any], error: type[Exception] = InputError) -> None:
    """Raises `error` if an option is not one of its values."""
    if value not in choices:
        raise error(f"{name} is {reprlib.repr(value)}, expected one of {', '.join(map(repr, choices))}")
