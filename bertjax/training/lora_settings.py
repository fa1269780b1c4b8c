"""What LoRA adapts: the encoder's dense layers by name, and how many numbers are added to each."""

import dataclasses
import math
from collections.abc import Iterable, Sequence
from typing import Any

from bertjax.checks import check_count, check_number
from bertjax.errors import ConfigError

#: The dense layers of the encoder that can be adapted: bertjax's names, and what a layer of transformers calls them.
TARGETS = {
    "query": "attention.self.query",
    "key": "attention.self.key",
    "value": "attention.self.value",
    "attention.output": "attention.output.dense",
    "intermediate": "intermediate.dense",
    "feed_forward.output": "output.dense",
}
#: Where each is in a `BertLayer`: the block, and the dense layer in it.
PLACES = {
    "query": ("attention", "query"),
    "key": ("attention", "key"),
    "value": ("attention", "value"),
    "attention.output": ("attention", "output"),
    "intermediate": ("feed_forward", "intermediate"),
    "feed_forward.output": ("feed_forward", "output"),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoRA:
    """What is adapted, and by how much.

    Args:
        rank: of the products that are added to kernels.
        alpha: what is added is multiplied by alpha / rank.
        targets: which dense layers of every encoder layer: names of `TARGETS`, or PEFT's. As in PEFT, "output.dense"
            stands for both layers whose name ends so. They are kept by bertjax's names, in the order of `TARGETS`.

    Raises:
        ConfigError: a number is not usable, or there is no such layer.
    """

    rank: int = 8
    alpha: float = 16.0
    targets: Sequence[str] = ("query", "value")

    def __post_init__(self):
        check_count("rank", self.rank, error=ConfigError)
        check_number("alpha", self.alpha, lambda value: 0 < value < math.inf, "a number above 0", ConfigError)
        single = isinstance(self.targets, str) or not isinstance(self.targets, Iterable)
        names = [self.targets] if single else list(self.targets)
        found = {each for name in names for each in _named(name)}
        if not found:
            raise ConfigError(f"targets is empty, expected some of {', '.join(TARGETS)}")
        object.__setattr__(self, "targets", tuple(name for name in TARGETS if name in found))


def _named(name: Any) -> list[str]:
    """The layers that a name stands for."""
    found = []
    if isinstance(name, str) and name != "dense":  # which in PEFT is also the pooler's, and that has no adapter here
        found = [name] if name in TARGETS else matching([name])
    if not found:
        raise ConfigError(f"targets has {name!r}, expected some of {', '.join(TARGETS)}, or what PEFT calls them")
    return found


def matching(endings: Iterable[str], module: str = "") -> list[str]:
    """The targets whose name in PyTorch ends in one of these, as PEFT understands its `target_modules`.

    Args:
        endings: ends of names, whole between dots.
        module: the name of the encoder's layer that they are in.
    """
    names = {target: f".{module}.{torch}" for target, torch in TARGETS.items()}
    return [target for target, name in names.items() if any(name.endswith(f".{ending}") for ending in endings)]
