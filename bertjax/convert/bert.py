"""BERT's mapping: the table, the spellings found in the wild, and the plan that matches a file to a model.

A file is read under one spelling, decided once for the whole file and kept in a `Layout`, so that an export can give
the same names back. Every tensor of a file ends up loaded, kept aside as a buffer, or named as unused; anything else
is an error, and one error names everything that is wrong.
"""

import dataclasses
import re
from collections.abc import Iterable, Iterator, Mapping

import numpy as np

from bertjax.convert.rules import EMBED, LINEAR, NORM, Path, Row, Shape, Slot, by_array, expand
from bertjax.convert.tensors import DTYPE_NAMES, TensorInfo, TensorToWrite, WeightFiles, enumerate_problems
from bertjax.errors import CheckpointError

_LAYER = "encoder.layer.{layer}"
_STACK = ("encoder", "layers")

#: BERT's encoder, one row per module.
TABLE = (
    Row("embeddings.word_embeddings", ("embeddings", "word_embeddings"), EMBED),
    Row("embeddings.position_embeddings", ("embeddings", "position_embeddings"), EMBED),
    Row("embeddings.token_type_embeddings", ("embeddings", "token_type_embeddings"), EMBED),
    Row("embeddings.LayerNorm", ("embeddings", "layer_norm"), NORM),
    Row(f"{_LAYER}.attention.self.query", (*_STACK, "attention", "query"), LINEAR),
    Row(f"{_LAYER}.attention.self.key", (*_STACK, "attention", "key"), LINEAR),
    Row(f"{_LAYER}.attention.self.value", (*_STACK, "attention", "value"), LINEAR),
    Row(f"{_LAYER}.attention.output.dense", (*_STACK, "attention", "output"), LINEAR),
    Row(f"{_LAYER}.attention.output.LayerNorm", (*_STACK, "attention_norm"), NORM),
    Row(f"{_LAYER}.intermediate.dense", (*_STACK, "feed_forward", "intermediate"), LINEAR),
    Row(f"{_LAYER}.output.dense", (*_STACK, "feed_forward", "output"), LINEAR),
    Row(f"{_LAYER}.output.LayerNorm", (*_STACK, "feed_forward_norm"), NORM),
    Row("pooler.dense", ("pooler", "dense"), LINEAR),
)

#: A sentence-transformers Dense module.
DENSE_TABLE = (Row("linear", ("linear",), LINEAR), Row("residual", ("residual",), LINEAR))

# Buffers that old versions of transformers saved among the weights. They hold no information, which is checked.
_POSITION_IDS = "embeddings.position_ids"
_TOKEN_TYPE_IDS = "embeddings.token_type_ids"

# Tensors of BERT's heads, outside the encoder.
_HEAD = re.compile(
    r"cls\.predictions\.(bias|decoder\.(weight|bias)|transform\.(dense|LayerNorm)\.(weight|bias))"
    r"|cls\.seq_relationship\.(weight|bias)|classifier\.(weight|bias)|qa_outputs\.(weight|bias)"
)
_POOLER = ("pooler.dense.weight", "pooler.dense.bias")
_ANCHOR = "embeddings.word_embeddings.weight"
_LEGACY = {"LayerNorm.gamma": "LayerNorm.weight", "LayerNorm.beta": "LayerNorm.bias"}
_MAX_ENCODERS = 16  # in one file; a limit only so that looking for them takes linear time
_MAX_BUFFER = 1 << 20  # positions
_QUANTISED = re.compile(r"\.(SCB|weight_format|qweight|qzeros|scales|g_idx|absmax|quant_map|quant_state\S*)$")


@dataclasses.dataclass(frozen=True)
class Layout:
    """How a checkpoint spells and divides its tensors; what an export needs to give the same file back.

    Attributes:
        prefix: what stands before the encoder's names, for instance "bert.".
        legacy_norm: LayerNorm parameters are called gamma and beta.
        buffers: buffers saved among the weights: full name, shape and dtype.
        shards: for a sharded checkpoint, the file of every tensor by full name.
        metadata: the free-form strings of the file's header.
    """

    prefix: str = ""
    legacy_norm: bool = False
    buffers: tuple[tuple[str, Shape, str], ...] = ()
    shards: tuple[tuple[str, str], ...] = dataclasses.field(default=(), repr=False)
    metadata: tuple[tuple[str, str], ...] = (("format", "pt"),)

    def spell(self, name: str) -> str:
        """The file's name for one of the encoder's tensors."""
        if self.legacy_norm:
            for legacy, modern in _LEGACY.items():
                if name.endswith(modern):
                    name = name.removesuffix(modern) + legacy
        return self.prefix + name

    def canonical(self, name: str) -> str:
        """The inverse of `spell`; heads stand outside the encoder's "bert." and keep their own names."""
        outer = self.prefix.removesuffix("bert.")
        name = name.removeprefix(self.prefix) if name.startswith(self.prefix) else name.removeprefix(outer)
        if self.legacy_norm:
            for legacy, modern in _LEGACY.items():
                if name.endswith(legacy):
                    name = name.removesuffix(legacy) + modern
        return name


@dataclasses.dataclass(frozen=True)
class Plan:
    """What becomes of every tensor of a file.

    Attributes:
        slots: the encoder's tensors and where each lives in the parameter tree.
        tensors: the file's tensor for each slot, in the same order.
        unused: names of the file's tensors that the model has no use for (heads).
        layout: the file's spelling.
    """

    slots: tuple[Slot, ...]
    tensors: tuple[TensorInfo, ...]
    unused: tuple[str, ...]
    layout: Layout

    def pairs(self) -> Iterator[tuple[Slot, TensorInfo]]:
        """Every slot with its tensor."""
        return zip(self.slots, self.tensors, strict=True)

    def arrays(self, dtype: np.dtype | None = None) -> Iterator[tuple[Path, np.ndarray]]:
        """Reads the parameter tree, one array at a time, so that little more than one copy is ever in memory.

        Args:
            dtype: dtype of the arrays; None keeps the file's (the widest, where a stack mixes several).

        Raises:
            CheckpointError: a tensor holds NaN or infinity, or does so once it is cast.
        """
        tensors = {slot.name: tensor for slot, tensor in self.pairs()}
        for path, slots in by_array(self.slots).items():
            infos = [tensors[slot.name] for slot in slots]
            target = dtype or _widest({info.dtype for info in infos})
            yield path, _read_array(slots, infos, target)

    def summary(self) -> str:
        """A report of what was mapped, tied and left unused, with a total, for a person to read."""
        infos = {slot.name: tensor for slot, tensor in self.pairs()}
        groups = by_array(self.slots)
        lines = [_describe_group(path, slots, infos) for path, slots in groups.items()]
        total = sum(int(np.prod(info.shape, dtype=np.int64)) for info in self.tensors)
        dtypes = ", ".join(sorted({DTYPE_NAMES[info.dtype] for info in self.tensors}))
        norms = "gamma and beta" if self.layout.legacy_norm else "weight and bias"
        buffers = ", ".join(name for name, _, _ in self.layout.buffers)
        return "\n".join(
            [
                *lines,
                "",
                f"mapped   {len(self.slots)} tensors to {len(groups)} arrays, {total:,} parameters, {dtypes}",
                f"spelling prefix {self.layout.prefix!r}, LayerNorm {norms}",
                "tied     none",
                f"buffers  {buffers or 'none'}",
                f"unused   {', '.join(self.unused) or 'none'}",
            ]
        )


def _describe_group(path: Path, slots: list[Slot], infos: Mapping[str, TensorInfo]) -> str:
    name, first = slots[0].name, slots[0]
    stacked = first.layer is not None
    if stacked:
        name = name.replace(".0.", f".{{0..{len(slots) - 1}}}.", 1)
    how = ", ".join(["stacked"] * stacked + ["transposed"] * first.transpose)
    shape = "x".join(map(str, infos[first.name].shape))
    return f"{name} [{shape}] -> {'/'.join(path)}{f'  ({how})' if how else ''}"


def _widest(dtypes: set[np.dtype]) -> np.dtype:
    """The dtype that holds all of several floating-point dtypes exactly."""
    if len(dtypes) == 1:
        return next(iter(dtypes))
    # float16 and bfloat16 are of one size and neither holds the other; float32 holds both.
    return max(dtypes | {np.dtype(np.float32)}, key=lambda dtype: dtype.itemsize)


def _read_array(slots: list[Slot], infos: list[TensorInfo], dtype: np.dtype) -> np.ndarray:
    """Reads the tensors that make up one array and stacks them."""
    first = slots[0]
    shape = first.shape[::-1] if first.transpose else first.shape
    array = aligned_empty(shape if first.layer is None else (len(slots), *shape), dtype)
    for slot, info in zip(slots, infos, strict=True):
        tensor = info.read()
        view = slot.view(array)
        with np.errstate(over="ignore"):  # an overflow is found, and named, by the next check
            view[...] = tensor
        if not np.isfinite(view).all():
            where = f"{info.file}: tensor {info.name!r}"
            if np.isfinite(tensor).all():
                raise CheckpointError(f"{where} does not fit in {np.dtype(dtype).name}; load it in a wider dtype")
            raise CheckpointError(f"{where} holds NaN or infinity; the checkpoint is damaged")
    return array


def aligned_empty(shape: Shape, dtype: np.dtype) -> np.ndarray:
    """An uninitialised array on a 64-byte boundary, which JAX's CPU backend can take over without copying."""
    nbytes = int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
    raw = np.empty(nbytes + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + nbytes].view(dtype).reshape(shape)


def match(weights: WeightFiles, shapes: Mapping[Path, Shape], prefix: str | None = None) -> Plan:
    """Matches the tensors of a file to a model's parameter tree.

    Args:
        weights: the file's tensors.
        shapes: the shape of every array of the parameter tree.
        prefix: what stands before the encoder's names, for a file that holds more than one encoder; the tensors of
            the others are unused.

    Raises:
        CheckpointError: a tensor is missing, unexpected, quantised or of another shape, spellings are mixed, or there
            are several encoders. One error names every problem.
    """
    slots = expand(TABLE, shapes)
    prefix = _find_prefix(weights, prefix)
    others = _names_of_others(weights, prefix)
    layout = _layout(weights, prefix, others)
    pooler = {prefix + name for name in _POOLER}
    by_name = {layout.spell(slot.name): slot for slot in slots}
    buffers = {name for name, _, _ in layout.buffers}
    missing = [name for name in by_name if name not in weights.tensors]
    unused, problems = [], []
    for name, tensor in weights.tensors.items():
        canonical = layout.canonical(name)
        if name in by_name:
            problems += _tensor_problems(by_name[name], tensor)
        elif name in buffers:
            problems += _buffer_problems(canonical, tensor)
        elif name in others or name in pooler or _HEAD.fullmatch(canonical):
            unused.append(name)
        elif _QUANTISED.search(name):
            problems.append(f"{name}: quantised weights are not supported; use the original model")
        else:
            problems.append(_unexpected(tensor))
    _raise_if(weights, [f"{name}: missing" for name in missing] + problems, len(slots))
    tensors = tuple(weights.tensors[name] for name in by_name)
    return Plan(tuple(slots), tensors, tuple(unused), layout)


def match_exactly(weights: WeightFiles, slots: list[Slot]) -> Plan:
    """Matches a file that must hold just these tensors, under these names; see `match` for the errors."""
    by_name = {slot.name: slot for slot in slots}
    problems = [f"{name}: missing" for name in by_name if name not in weights.tensors]
    for name, tensor in weights.tensors.items():
        problems += _tensor_problems(by_name[name], tensor) if name in by_name else [_unexpected(tensor)]
    _raise_if(weights, problems, len(slots))
    return Plan(tuple(slots), tuple(weights.tensors[name] for name in by_name), (), Layout())


def has_pooler(weights: WeightFiles, prefix: str | None = None) -> bool:
    """Whether the file's encoder has a pooler, or a part of one; see `match` for the prefix and the errors."""
    prefix = _find_prefix(weights, prefix)
    return any(prefix + name in weights.tensors for name in _POOLER)


def _unexpected(tensor: TensorInfo) -> str:
    return f"{tensor.name}: unexpected tensor {DTYPE_NAMES[tensor.dtype]}{list(tensor.shape)}"


def _raise_if(weights: WeightFiles, problems: list[str], expected: int) -> None:
    if problems:
        raise CheckpointError(
            f"{weights.folder}: {len(problems)} problem(s) with the tensors, against a model of {expected} tensors: "
            + enumerate_problems(problems)
        )


def _tensor_problems(slot: Slot, tensor: TensorInfo) -> list[str]:
    problems = []
    if tensor.shape != slot.shape:
        problems.append(f"{tensor.name}: shape {list(tensor.shape)}, the config asks for {list(slot.shape)}")
    if DTYPE_NAMES[tensor.dtype] not in ("F16", "BF16", "F32", "F64"):
        problems.append(f"{tensor.name}: dtype {DTYPE_NAMES[tensor.dtype]}; quantised weights are not supported")
    return problems


def _buffer_problems(canonical: str, tensor: TensorInfo) -> list[str]:
    if tensor.dtype.kind not in "iu" or tensor.shape[:-1] != (1,) or tensor.shape[-1] > _MAX_BUFFER:
        found = f"{DTYPE_NAMES[tensor.dtype]}{list(tensor.shape)}"
        return [f"{tensor.name}: is {found}, expected integers [1, positions]"]
    if np.array_equal(tensor.read(), _buffer(canonical, tensor.shape, np.dtype(np.int64))):
        return []
    what = "0, 1, 2, ..." if canonical == _POSITION_IDS else "zeros"
    return [f"{tensor.name}: expected {what}; this model numbers its positions or segments in its own way"]


def _buffer(canonical: str, shape: Shape, dtype: np.dtype) -> np.ndarray:
    count = int(np.prod(shape, dtype=np.int64))
    values = np.arange(count) if canonical == _POSITION_IDS else np.zeros(count)
    return values.astype(dtype).reshape(shape)


def _layout(weights: WeightFiles, prefix: str, others: set[str]) -> Layout:
    """Decides how a file spells the tensors of the encoder under `prefix`; `others` are not this encoder's."""
    names = weights.tensors
    legacy = [name for name in names if name.endswith(tuple(_LEGACY)) and name not in others]
    modern = [name for name in names if name.endswith(tuple(_LEGACY.values())) and name not in others]
    if legacy and modern:
        raise CheckpointError(
            f"{weights.folder}: LayerNorm parameters are spelt both ways, {legacy[0]} and {modern[0]}; "
            "the file is a mixture of two"
        )
    buffers = [name for name in (prefix + _POSITION_IDS, prefix + _TOKEN_TYPE_IDS) if name in names]
    shards = tuple((name, info.file.name) for name, info in names.items()) if weights.index else ()
    return Layout(
        prefix=prefix,
        legacy_norm=bool(legacy),
        buffers=tuple((name, names[name].shape, names[name].dtype.name) for name in buffers),
        shards=shards,
        metadata=tuple(sorted(weights.metadata.items())),
    )


def _prefixes(weights: WeightFiles) -> list[str]:
    """What stands before the names of each of a file's encoders."""
    prefixes = [name.removesuffix(_ANCHOR) for name in weights.tensors if name.endswith(_ANCHOR)]
    return [prefix for prefix in prefixes if prefix == "" or prefix.endswith(".")]


def _find_prefix(weights: WeightFiles, asked: str | None) -> str:
    """The prefix of the file's encoder, or of the one asked for."""
    prefixes = _prefixes(weights)
    if not prefixes:
        sample = ", ".join(list(weights.tensors)[:3])
        raise CheckpointError(f"{weights.folder}: no tensor is called ...{_ANCHOR}; not a BERT (it has {sample}, ...)")
    found = ", ".join(map(repr, prefixes[:_MAX_ENCODERS]))
    if len(prefixes) > _MAX_ENCODERS:
        raise CheckpointError(f"{weights.folder}: {len(prefixes)} encoders in one file, under {found}, ...; too many")
    if asked is None and len(prefixes) > 1:
        raise CheckpointError(
            f"{weights.folder}: {len(prefixes)} encoders in one file, under {found}; choose one with prefix="
        )
    if asked is not None and asked not in prefixes:
        raise CheckpointError(f"{weights.folder}: no encoder under the prefix {asked!r}, only under {found}")
    return prefixes[0] if asked is None else asked


def _names_of_others(weights: WeightFiles, prefix: str) -> set[str]:
    """The tensors that belong to another encoder of the file, or to that one's heads."""
    prefixes = _prefixes(weights)
    if prefixes == [prefix]:
        return set()
    # Heads stand outside "bert.", so an encoder owns both; where two claim a name, the longer beginning decides.
    owners = {each.removesuffix("bert."): each for each in prefixes} | {each: each for each in prefixes}
    beginnings = sorted(owners, key=len, reverse=True)
    return {
        name
        for name in weights.tensors
        if next((owners[each] for each in beginnings if name.startswith(each)), prefix) != prefix
    }


def export(
    slots: Iterable[Slot],
    tree: Mapping[Path, np.ndarray],
    layout: Layout,
    dtypes: Mapping[str, np.dtype] | None = None,
) -> list[TensorToWrite]:
    """Lists the PyTorch tensors of a parameter tree, to be written one at a time.

    Args:
        slots: the encoder's tensors.
        tree: the arrays of the parameter tree.
        layout: the spelling of the names; its buffers are written too.
        dtypes: by full name, the dtype to write; what is not named keeps the array's.
    """
    dtypes = dtypes or {}

    def tensor(slot: Slot) -> TensorToWrite:
        name = layout.spell(slot.name)
        dtype = np.dtype(dtypes.get(name, tree[slot.path].dtype))
        return TensorToWrite(name, dtype, slot.shape, lambda: slot.view(tree[slot.path]).astype(dtype, copy=False))

    def buffer(name: str, shape: Shape, dtype: str) -> TensorToWrite:
        return TensorToWrite(
            name, np.dtype(dtype), shape, lambda: _buffer(layout.canonical(name), shape, np.dtype(dtype))
        )

    return [tensor(slot) for slot in slots] + [buffer(*each) for each in layout.buffers]
