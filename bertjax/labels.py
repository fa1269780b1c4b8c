"""The names of a classifier's labels, as config.json has them: id2label, label2id and problem_type.

transformers takes whatever is there. Here a name is never made up for a number, nor a number for a name, where the
file says something else.
"""

import dataclasses
import re
import reprlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from bertjax.checks import as_integer
from bertjax.errors import ConfigError

if TYPE_CHECKING:
    from bertjax.config import BertConfig

#: What a sequence classifier is trained for, which decides its loss.
PROBLEM_TYPES = ("regression", "single_label_classification", "multi_label_classification")

_PLACEHOLDER = re.compile(r"LABEL_\d+", re.ASCII)
_NUMBER = re.compile(r"\d{1,9}", re.ASCII)


def placeholders(count: int) -> dict[int, str]:
    """The names that transformers gives to labels without any: LABEL_0, LABEL_1, ..."""
    return {label: f"LABEL_{label}" for label in range(count)}


def names_by_id(id2label: Mapping[Any, Any]) -> dict[int, str]:
    """The names of id2label in the order of their numbers, which JSON can only write as strings.

    Raises:
        ConfigError: a key is no number, a number comes twice or is left out, or a name is not a string.
    """
    names: dict[int, str] = {}
    for key, name in id2label.items():
        label = _number(key)
        if label is None:
            raise ConfigError(f"id2label has the key {reprlib.repr(key)}, expected the number of a label")
        if label in names:
            raise ConfigError(f"id2label names label {label} twice; remove one of the two")
        if not isinstance(name, str):
            raise ConfigError(f"id2label names label {label} {reprlib.repr(name)}, expected a string")
        names[label] = name
    absent = next((label for label in range(len(names)) if label not in names), None)
    if absent is not None:
        raise ConfigError(f"id2label names {len(names)} labels but not label {absent}; number them from 0 on")
    return dict(sorted(names.items()))


def ids_by_name(id2label: Mapping[int, str], label2id: Any) -> dict[str, int]:
    """The inverse of id2label, which label2id must not contradict.

    Args:
        id2label: as `names_by_id` returns it.
        label2id: what the configuration has, or None. It may name fewer labels, and may have kept placeholders
            (LABEL_0, ...) for labels that have names by now, as transformers leaves them there.

    Raises:
        ConfigError: two labels have one name, or label2id says something else than id2label.
    """
    ids = {name: label for label, name in id2label.items()}
    if len(ids) < len(id2label):
        twice = next(name for label, name in id2label.items() if ids[name] != label)
        raise ConfigError(f"id2label gives several labels the name {reprlib.repr(twice)}, so a name has no one number")
    if label2id is None:
        return ids
    if not isinstance(label2id, Mapping):
        raise ConfigError(f"label2id={reprlib.repr(label2id)}: expected an object with a number for every label's name")
    for name, value in label2id.items():
        left_over = name not in ids and _PLACEHOLDER.fullmatch(str(name))
        if not left_over and (name not in ids or _number(value) != ids[name]):
            expected = f"says {ids[name]}" if name in ids else "has no such name"
            raise ConfigError(
                f"label2id says that {reprlib.repr(name)} is label {reprlib.repr(value)}, but id2label {expected}; "
                "correct one of the two, or remove label2id"
            )
    return ids


def _number(value: Any) -> int | None:
    """A label's number, or None for what is none."""
    if isinstance(value, str) and _NUMBER.fullmatch(value):
        return int(value)
    number = as_integer(value)
    return number if number is not None and number >= 0 else None


def with_labels(
    config: "BertConfig",
    *,
    num_labels: int | None = None,
    id2label: Mapping[int, str] | None = None,
    problem_type: str | None = None,
) -> "BertConfig":
    """A configuration with other labels, whose `extra` has id2label and a label2id that fits it.

    Args:
        config: the configuration.
        num_labels: how many labels; they keep their names if there are as many, and are placeholders otherwise.
        id2label: a name for every label, by its number.
        problem_type: one of `PROBLEM_TYPES`.

    Raises:
        ConfigError: a value is not usable, or there are not `num_labels` names.
    """
    extra = dict(config.extra)
    if problem_type is not None:
        extra["problem_type"] = problem_type
    if num_labels is not None or id2label is not None:
        # Counts that transformers believes less than the names, and does not write beside them.
        extra = {name: value for name, value in extra.items() if name not in ("num_labels", "_num_labels")}
        names = _names(extra.get("id2label"), num_labels, id2label)
        extra["id2label"] = {str(label): name for label, name in names.items()}
        extra["label2id"] = ids_by_name(names, None)
    changed = dataclasses.replace(config, extra=extra)
    _ = changed.problem_type  # refused if it is none
    return changed


def _names(old: Any, num_labels: int | None, id2label: Mapping[int, str] | None) -> dict[int, str]:
    """The names to use; see `with_labels`."""
    if num_labels is not None and (type(num_labels) is not int or num_labels < 1):
        raise ConfigError(f"num_labels is {num_labels!r}, expected a positive integer")
    if id2label is None:
        kept = isinstance(old, Mapping) and len(old) == num_labels
        return names_by_id(old) if kept else placeholders(num_labels)
    if not isinstance(id2label, Mapping) or not id2label:
        raise ConfigError(f"id2label={reprlib.repr(id2label)}: expected a name for every label, by its number")
    if num_labels not in (None, len(id2label)):
        raise ConfigError(f"num_labels={num_labels} but id2label names {len(id2label)} labels; correct one of the two")
    return names_by_id(id2label)
