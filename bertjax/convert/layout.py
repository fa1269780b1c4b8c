"""How a checkpoint spells and divides its tensors: what is needed to give the same names back.

Inside bertjax a tensor has one name, the one that transformers' `BertModel` gives it ("encoder.layer.0...") or, for a
head, that of `BertForPreTraining` and its like ("cls.predictions.bias"). Formats that can't hold the rest (an alias, a
buffer, a prefix) carry the layout beside them, in a small JSON file.
"""

import dataclasses
import functools
import json
import re
import reprlib
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from bertjax.convert.tensors import DTYPES
from bertjax.errors import CheckpointError
from bertjax.json_files import read_json

#: The file that carries the layout beside weights in another format.
LAYOUT_FILE = "bertjax_layout.json"

#: Tensors that repeat another one where a checkpoint holds them at all, and which one they repeat.
TIES: Mapping[str, str] = {
    "cls.predictions.decoder.weight": "embeddings.word_embeddings.weight",
    "cls.predictions.decoder.bias": "cls.predictions.bias",
}

#: LayerNorm's parameters in TensorFlow and in the checkpoints of 2018 and 2019, and today.
LEGACY_NORM: Mapping[str, str] = {"LayerNorm.gamma": "LayerNorm.weight", "LayerNorm.beta": "LayerNorm.bias"}

#: Buffers that old versions of transformers saved among the weights: each position's number, and zeros. They hold no
#: information, which is checked.
POSITION_IDS = "embeddings.position_ids"
TOKEN_TYPE_IDS = "embeddings.token_type_ids"

_HEADS = ("cls.", "classifier.", "qa_outputs.")
_DTYPES = {dtype.name for dtype in DTYPES.values()}
_INTEGERS = {dtype.name for dtype in DTYPES.values() if dtype.kind in "iu"}

# A BERT of 1024 layers, the most that a configuration may ask for, has 16 tensors in each.
_MAX_SPELLINGS = 1 << 14
_SHARD = re.compile(r"[\w.-]{1,200}\.safetensors")

Pairs = tuple[tuple[str, str], ...]


def is_head(name: str) -> bool:
    """Whether a tensor belongs to a head, which stands beside the encoder and not in it."""
    return name.startswith(_HEADS)


@dataclasses.dataclass(frozen=True)
class Layout:
    """How a checkpoint spells and divides its tensors.

    Attributes:
        prefix: what stands before the encoder's names, for instance "bert."; heads stand outside its last "bert.".
        legacy_norm: LayerNorm parameters are called gamma and beta.
        spellings: tensors whose name does not follow from these two: our name and the file's.
        ties: tensors that are there although they repeat another, by our names; see `TIES`.
        buffers: buffers saved among the weights: the file's name, shape and dtype.
        shards: for a sharded checkpoint, the file of every tensor, by the file's name for the tensor.
        metadata: the free-form strings of the file's header.
    """

    prefix: str = ""
    legacy_norm: bool = False
    spellings: Pairs = ()
    ties: tuple[str, ...] = ()
    buffers: tuple[tuple[str, tuple[int, ...], str], ...] = ()
    shards: Pairs = dataclasses.field(default=(), repr=False)
    metadata: Pairs = (("format", "pt"),)

    @property
    def outer(self) -> str:
        """What stands before the names of heads."""
        return self.prefix.removesuffix("bert.")

    @functools.cached_property
    def _spelt(self) -> dict[str, str]:
        return dict(self.spellings)

    def spell(self, name: str) -> str:
        """The file's name for one of our names."""
        if name in self._spelt:
            return self._spelt[name]
        prefix = self.outer if is_head(name) else self.prefix
        if self.legacy_norm:
            for legacy, modern in LEGACY_NORM.items():
                if name.endswith(modern):
                    name = name.removesuffix(modern) + legacy
        return prefix + name


def standard_layout(names: Collection[str]) -> Layout:
    """The layout that transformers itself writes.

    A decoder that is not tied has a bias of its own in transformers 5, which makes one up where it finds none; it is
    written under both names, and so as well for transformers 4, which knows `cls.predictions.bias` only.

    Args:
        names: the model's tensors, by bertjax's names. Beside a head, the encoder is called "bert.".
    """
    untied = "cls.predictions.decoder.weight" in names
    return Layout(
        prefix="bert." if any(map(is_head, names)) else "", ties=("cls.predictions.decoder.bias",) if untied else ()
    )


def write_layout(path: Path, layout: Layout, dtypes: Mapping[str, str] | None = None) -> None:
    """Writes a layout as JSON.

    Args:
        path: the file to write.
        layout: the layout.
        dtypes: by our names, the dtype of tensors that the weights hold in a wider one.
    """
    content = {"bertjax_layout": 1, **dataclasses.asdict(layout), "dtypes": dict(dtypes or {})}
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def read_layout(path: Path) -> tuple[Layout, dict[str, str]]:
    """Reads what `write_layout` wrote.

    Raises:
        SourceError: the file can't be read.
        CheckpointError: it holds something else.
    """
    content = read_json(path, CheckpointError)
    if not isinstance(content, dict) or content.get("bertjax_layout") != 1:
        raise CheckpointError(f'{path}: not a layout that this version reads; expected "bertjax_layout": 1')
    bad = sorted(name for name, accepts in _CHECKS.items() if not accepts(content.get(name)))
    bad += sorted(content.keys() - _CHECKS.keys() - {"bertjax_layout"})
    if bad:
        raise CheckpointError(f"{path}: unusable {', '.join(map(repr, bad))}; convert the original checkpoint again")
    if len(content["spellings"]) > _MAX_SPELLINGS:
        count = len(content["spellings"])
        raise CheckpointError(f"{path}: spells {count} names in its own way; no BERT has as many tensors")
    for name, shard in content["shards"]:
        # A plain file name: anything else could make a conversion write outside its folder.
        if not _SHARD.fullmatch(shard):
            raise CheckpointError(
                f"{path}: the shard of {reprlib.repr(name)} is {reprlib.repr(shard)}, expected a plain file name that "
                f"ends in .safetensors; remove {path.name} to do without"
            )
    fields = {field.name: content[field.name] for field in dataclasses.fields(Layout)}
    for name in ("spellings", "shards", "metadata"):
        fields[name] = tuple(map(tuple, fields[name]))
    fields["ties"] = tuple(fields["ties"])
    fields["buffers"] = tuple((name, tuple(shape), dtype) for name, shape, dtype in fields["buffers"])
    return Layout(**fields), content["dtypes"]


def _is_pairs(value: Any) -> bool:
    return isinstance(value, list) and all(
        isinstance(pair, list) and len(pair) == 2 and all(isinstance(part, str) for part in pair) for pair in value
    )


def _is_buffer(value: Any) -> bool:
    if not isinstance(value, list) or len(value) != 3:
        return False
    name, shape, dtype = value
    sizes = isinstance(shape, list) and all(type(size) is int for size in shape)
    # The same bound as for a buffer in a weight file.
    # The last part only: a wrapper's may stand before it.
    named = isinstance(name, str) and name.split(".")[-1] in ("position_ids", "token_type_ids")
    if not (named and sizes and isinstance(dtype, str) and dtype in _DTYPES and is_buffer_shape(tuple(shape))):
        return False
    kind = np.dtype(dtype) if dtype in _INTEGERS else None
    return kind is not None and shape[-1] - 1 <= np.iinfo(kind).max


#: Positions; far more than any BERT has.
_MAX_BUFFER = 1 << 20


def is_buffer_shape(shape: tuple[int, ...]) -> bool:
    """Whether a buffer may have this shape: [1, positions]."""
    return shape[:-1] == (1,) and 0 <= shape[-1] <= _MAX_BUFFER


_CHECKS = {
    "prefix": lambda value: isinstance(value, str),
    "legacy_norm": lambda value: isinstance(value, bool),
    "spellings": _is_pairs,
    "ties": lambda value: isinstance(value, list) and all(isinstance(name, str) and name in TIES for name in value),
    "buffers": lambda value: isinstance(value, list) and len(value) <= 4 and all(map(_is_buffer, value)),
    "shards": _is_pairs,
    "metadata": _is_pairs,
    "dtypes": lambda value: (
        isinstance(value, dict) and all(isinstance(dtype, str) and dtype in _DTYPES for dtype in value.values())
    ),
}
