"""BERT's mapping: the table, and the plan that matches a file's tensors to a model's parameters.

Every tensor of a file ends up loaded, tied to another, kept aside as a buffer, or named as unused; anything else is an
error, and one error names everything that is wrong.
"""

import dataclasses
import functools
import itertools
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping

import ml_dtypes
import numpy as np

from bertjax.convert.layout import POSITION_IDS, TIES, TOKEN_TYPE_IDS, Layout, is_buffer_shape
from bertjax.convert.names import Survey, check_layout
from bertjax.convert.rules import BIAS, EMBED, KERNEL, LINEAR, NORM, Path, Row, Shape, Slot, by_array, expand
from bertjax.convert.tensors import (
    DTYPE_NAMES,
    TensorInfo,
    TensorToWrite,
    WeightFiles,
    ahead,
    assign,
    contiguous,
    enumerate_problems,
)
from bertjax.errors import CheckpointError

_LAYER = "encoder.layer.{layer}"
# Maps rows of a weight, float32 [out, in], to int8 of that shape and their scales, float32 [out].
Quantizer = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]
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
    Row(f"{_LAYER}.attention.self.distance_embedding", (*_STACK, "attention", "distance_embedding"), EMBED),
    Row(f"{_LAYER}.attention.output.dense", (*_STACK, "attention", "output"), LINEAR),
    Row(f"{_LAYER}.attention.output.LayerNorm", (*_STACK, "attention_norm"), NORM),
    Row(f"{_LAYER}.intermediate.dense", (*_STACK, "feed_forward", "intermediate"), LINEAR),
    Row(f"{_LAYER}.output.dense", (*_STACK, "feed_forward", "output"), LINEAR),
    Row(f"{_LAYER}.output.LayerNorm", (*_STACK, "feed_forward_norm"), NORM),
    Row("pooler.dense", ("pooler", "dense"), LINEAR),
)

_HEADS = (
    Row("cls.predictions.transform.dense", ("predictions", "transform", "dense"), LINEAR),
    Row("cls.predictions.transform.LayerNorm", ("predictions", "transform", "layer_norm"), NORM),
    Row("cls.predictions", ("predictions",), BIAS),
    Row("cls.predictions.decoder", ("predictions", "decoder"), KERNEL),  # only where it is not the word embeddings
    Row("cls.seq_relationship", ("seq_relationship",), LINEAR),
    Row("classifier", ("classifier",), LINEAR),
    Row("qa_outputs", ("qa_outputs",), LINEAR),
)

#: BERT with heads, whose tree has the encoder under "bert".
HEADS_TABLE = tuple(row._replace(path=("bert", *row.path)) for row in TABLE) + _HEADS

#: A sentence-transformers Dense module.
DENSE_TABLE = (Row("linear", ("linear",), LINEAR), Row("residual", ("residual",), LINEAR))

_POOLER = ("pooler.dense.weight", "pooler.dense.bias")
_DECODER = "cls.predictions.decoder.weight"
_PREDICTIONS = "cls.predictions.bias"  # the tensor that every masked-language-model head has
_HEAD_OF = {f"{row.torch}.{leaf.torch}": row.path[0] for row in _HEADS for leaf in row.kind}
_QUANTISED = {"SCB", "weight_format", "qweight", "qzeros", "scales", "g_idx", "absmax", "quant_map"}


def heads_in(survey: Survey) -> frozenset[str]:
    """The heads of which a checkpoint has a tensor: predictions, seq_relationship, classifier, qa_outputs."""
    return frozenset(_HEAD_OF[name] for name in survey.tensors if name in _HEAD_OF)


def has_pooler(survey: Survey) -> bool:
    """Whether the checkpoint's encoder has a pooler, or a part of one."""
    return any(name in survey.tensors for name in _POOLER)


def part_of(name: str) -> str | None:
    """The part beside embeddings and layers that a tensor is of, by bertjax's name: "pooler" or a head; or None."""
    if name in _POOLER:
        return "pooler"
    return "predictions" if name in TIES else _HEAD_OF.get(name)


@dataclasses.dataclass(frozen=True)
class Plan:
    """What becomes of every tensor of a file.

    Attributes:
        slots: the model's tensors and where each lives in the parameter tree.
        tensors: the file's tensor for each slot, in the same order.
        unused: the file's names of tensors that the model has no use for (heads, other encoders).
        layout: the file's spelling, with its ties and buffers.
    """

    slots: tuple[Slot, ...]
    tensors: tuple[TensorInfo, ...]
    unused: tuple[str, ...]
    layout: Layout

    def pairs(self) -> Iterator[tuple[Slot, TensorInfo]]:
        """Every slot with its tensor."""
        return zip(self.slots, self.tensors, strict=True)

    def arrays(
        self, dtype: np.dtype | None = None, quantized: Mapping[Path, Quantizer] | None = None
    ) -> Iterator[tuple[Path, np.ndarray]]:
        """Reads the parameter tree, one array at a time, so that little more than one copy is ever in memory.

        Args:
            dtype: dtype of the arrays; None keeps the file's (the widest, where a stack mixes several).
            quantized: the kernels to read as int8, and how; with each one comes its `scale`. See `bertjax.int8`.

        Raises:
            CheckpointError: a tensor holds NaN or infinity, or does so once it is cast.
        """
        tensors = {slot.name: tensor for slot, tensor in self.pairs()}

        def jobs() -> Iterator[Callable[[], list[tuple[Path, np.ndarray]]]]:
            for path, slots in by_array(self.slots).items():
                infos = [tensors[slot.name] for slot in slots]
                if quantized and path in quantized:
                    arrays = _empty_int8(path, slots)
                    read = functools.partial(_quantize_slot, quantized[path])
                else:
                    wanted = dtype or widest({info.dtype for info in infos})
                    arrays, read = [(path, _empty_array(slots, wanted))], _read_slot
                for slot, info in zip(slots, infos, strict=True):
                    yield functools.partial(read, slot, info, arrays, last=slot is slots[-1])

        # Results come in the order of the jobs: with an array's last tensor all of it is there.
        return itertools.chain.from_iterable(ahead(jobs()))

    def to_write(self, dtype: np.dtype | None = None) -> dict[str, TensorToWrite]:
        """The model's tensors by bertjax's names, in the file's order, each to be read when its turn comes.

        Args:
            dtype: dtype to write; None keeps each tensor's.
        """
        ordered = sorted(self.pairs(), key=lambda pair: (pair[1].file, pair[1].offset))
        return {slot.name: copied(slot.name, info, dtype) for slot, info in ordered}

    def summary(self) -> str:
        """A report of what was mapped, tied and left unused, with a total, for a person to read."""
        infos = {slot.name: tensor for slot, tensor in self.pairs()}
        groups = by_array(self.slots)
        lines = [_describe_group(path, slots, infos) for path, slots in groups.items()]
        total = sum(info.count for info in self.tensors)
        dtypes = ", ".join(sorted({DTYPE_NAMES[info.dtype] for info in self.tensors}))
        norms = "gamma and beta" if self.layout.legacy_norm else "weight and bias"
        buffers = ", ".join(name for name, _, _ in self.layout.buffers)
        ties = ", ".join(f"{self.layout.spell(name)} to {self.layout.spell(TIES[name])}" for name in self.layout.ties)
        odd = a_few([f"{spelling} for {name}" for name, spelling in self.layout.spellings])
        return "\n".join(
            [
                *lines,
                "",
                f"mapped   {len(self.slots)} tensors to {len(groups)} arrays, {total:,} parameters, {dtypes}",
                f"spelling prefix {self.layout.prefix!r}, LayerNorm {norms}, others {odd}",
                f"tied     {ties or 'none'}",
                f"buffers  {buffers or 'none'}",
                f"unused   {a_few(self.unused)}",
            ]
        )


def a_few(names: Collection[str], limit: int = 20) -> str:
    """Joins names for a report, which says how many it leaves out."""
    shown = ", ".join(itertools.islice(names, limit))
    return f"{shown} and {len(names) - limit} more" if len(names) > limit else shown or "none"


def _describe_group(path: Path, slots: list[Slot], infos: Mapping[str, TensorInfo]) -> str:
    name, first = slots[0].name, slots[0]
    stacked = first.layer is not None
    if stacked:
        name = name.replace(".0.", f".{{0..{len(slots) - 1}}}.", 1)
    how = ", ".join(["stacked"] * stacked + ["transposed"] * first.transpose)
    shape = "x".join(map(str, infos[first.name].shape))
    return f"{name} [{shape}] -> {'/'.join(path)}{f'  ({how})' if how else ''}"


def widest(dtypes: set[np.dtype]) -> np.dtype:
    """The dtype that holds all of several floating-point dtypes exactly."""
    if len(dtypes) == 1:
        return next(iter(dtypes))
    # float16 and bfloat16 are of one size and neither holds the other; float32 holds both.
    return max(dtypes | {np.dtype(np.float32)}, key=lambda dtype: dtype.itemsize)


def _empty_array(slots: list[Slot], dtype: np.dtype) -> np.ndarray:
    """An uninitialised array for the tensors that make it up."""
    first = slots[0]
    shape = first.shape[::-1] if first.transpose else first.shape
    return aligned_empty(shape if first.layer is None else (len(slots), *shape), dtype)


def _empty_int8(path: Path, slots: list[Slot]) -> list[tuple[Path, np.ndarray]]:
    """Uninitialised arrays for stacked kernels, and for their scales [layers, out]."""
    scales = aligned_empty((len(slots), slots[0].shape[0]), np.dtype(np.float32))
    return [(path, _empty_array(slots, np.dtype(np.int8))), ((*path[:-1], "scale"), scales)]


def _read_slot(
    slot: Slot, info: TensorInfo, arrays: list[tuple[Path, np.ndarray]], last: bool
) -> list[tuple[Path, np.ndarray]]:
    """Reads a tensor to its place in the array; returns what is complete by then, once the last tensor is read."""
    view = slot.view(arrays[0][1])
    for rows, block in info.blocks():
        with np.errstate(over="ignore"):  # an overflow is found, and named, by the next check
            assign(view[rows], block)
        _check_finite(info, block, view[rows])
    return arrays if last else []


def _quantize_slot(
    quantize: Quantizer, slot: Slot, info: TensorInfo, arrays: list[tuple[Path, np.ndarray]], last: bool
) -> list[tuple[Path, np.ndarray]]:
    """The same for a kernel in int8, whose rows, in PyTorch's shape, are what shares a scale."""
    view, scales = slot.view(arrays[0][1]), arrays[1][1][slot.layer]
    for rows, block in info.blocks():
        with np.errstate(over="ignore"):
            exact = block.astype(np.float32, copy=False)
        _check_finite(info, block, exact)
        integers, scales[rows] = quantize(exact)
        assign(view[rows], integers)
    return arrays if last else []


def copied(name: str, info: TensorInfo, dtype: np.dtype | None) -> TensorToWrite:
    """A tensor to be written as it is read, or cast; its data is checked when its turn comes, as in `Plan.arrays`."""
    target = info.dtype if dtype is None else np.dtype(dtype)

    def make() -> np.ndarray:
        tensor = info.read()
        with np.errstate(over="ignore"):
            cast = tensor.astype(target, copy=False)
        _check_finite(info, tensor, cast)
        return cast

    return TensorToWrite(name, target, info.shape, make)


def _check_finite(info: TensorInfo, tensor: np.ndarray, cast: np.ndarray) -> None:
    """Refuses NaN and infinity in what was read, or in what became of it in another dtype."""
    if is_finite(tensor if tensor.dtype == cast.dtype else cast):
        return
    where = f"{info.file}: tensor {info.name!r}"
    if is_finite(tensor):
        raise CheckpointError(f"{where} does not fit in {cast.dtype.name}; load it in a wider dtype")
    raise CheckpointError(f"{where} holds NaN or infinity; the checkpoint is damaged")


# The bits of the exponent, all of which are set in NaN and infinity and in nothing else (IEEE 754; bfloat16 is the
# upper half of float32).
_EXPONENTS = {np.dtype(np.float16): np.uint16(0x7C00), np.dtype(ml_dtypes.bfloat16): np.uint16(0x7F80)}


def is_finite(array: np.ndarray) -> bool:
    """Whether no element is NaN or infinite."""
    exponent = _EXPONENTS.get(array.dtype)
    if exponent is not None:  # numpy computes in these two dtypes by way of float32, many times slower
        return not bool(((array.view(np.uint16) & exponent) == exponent).any())
    # NaN and infinity survive a sum, so a finite sum says all at the price of one pass; one that is not may also have
    # overflowed, and then every element is looked at.
    with np.errstate(all="ignore"):
        return bool(np.isfinite(array.sum()) or np.isfinite(array).all())


def aligned_empty(shape: Shape, dtype: np.dtype) -> np.ndarray:
    """An uninitialised array on a 64-byte boundary, which JAX's CPU backend can take over without copying."""
    nbytes = int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
    raw = np.empty(nbytes + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + nbytes].view(dtype).reshape(shape)


def slots_of(shapes: Mapping[Path, Shape]) -> tuple[Slot, ...]:
    """The slots of a model with this parameter tree, with or without heads; see `rules.expand` for the errors."""
    return tuple(expand(HEADS_TABLE if any(path[0] == "bert" for path in shapes) else TABLE, shapes))


def match(survey: Survey, shapes: Mapping[Path, Shape]) -> Plan:
    """Matches the tensors of a file to a model's parameter tree.

    Args:
        survey: the file's tensors by bertjax's names.
        shapes: the shape of every array of the parameter tree.

    Raises:
        CheckpointError: a tensor is missing, unexpected, quantised or of another shape, or differs from the one that
            it is tied to. One error names every problem.
    """
    slots = {slot.name: slot for slot in slots_of(shapes)}
    layout = survey.layout()
    ties = tuple(name for name in TIES if name in survey.tensors and name not in slots and _PREDICTIONS in slots)
    buffers = tuple(name for name in (POSITION_IDS, TOKEN_TYPE_IDS) if name in survey.tensors)
    used = {*slots, *ties, *buffers}
    unused = [info.name for name, info in survey.tensors.items() if name not in used]
    problems = [f"{layout.spell(name)}: missing" for name in slots if name not in survey.tensors]
    for name, info in survey.tensors.items():
        if name in slots:
            problems += _tensor_problems(slots[name], info)
        elif name in buffers:
            problems += _buffer_problems(name, info)
        elif name in ties:
            problems += _tie_problems(name, info, survey.tensors.get(TIES[name]))
        elif part_of(name) is None:
            problems.append(_unexpected(info))
    problems += [_unexpected(info) for info in survey.strange]
    raise_if(survey.weights, problems, len(slots))
    found = tuple(
        (survey.tensors[name].name, survey.tensors[name].shape, survey.tensors[name].dtype.name) for name in buffers
    )
    layout = dataclasses.replace(layout, ties=ties, buffers=found)
    if survey.weights.layout is not None:
        layout = survey.weights.layout
        check_layout(survey.weights, layout, slots)
    tensors = tuple(survey.tensors[name] for name in slots)
    return Plan(tuple(slots.values()), tensors, (*unused, *survey.others), layout)


def match_exactly(weights: WeightFiles, slots: list[Slot]) -> Plan:
    """Matches a file that must hold just these tensors, under these names; see `match` for the errors."""
    by_name = {slot.name: slot for slot in slots}
    problems = [f"{name}: missing" for name in by_name if name not in weights.tensors]
    for name, tensor in weights.tensors.items():
        problems += _tensor_problems(by_name[name], tensor) if name in by_name else [_unexpected(tensor)]
    raise_if(weights, problems, len(slots))
    return Plan(tuple(slots), tuple(weights.tensors[name] for name in by_name), (), Layout())


def _unexpected(tensor: TensorInfo) -> str:
    parts = tensor.name.split(".")[1:]
    if any(part in _QUANTISED or part.startswith("quant_state") for part in parts):
        return f"{tensor.name}: quantised weights are not supported; use the original model"
    return f"{tensor.name}: unexpected tensor {DTYPE_NAMES[tensor.dtype]}{list(tensor.shape)}"


def raise_if(weights: WeightFiles, problems: list[str], expected: int) -> None:
    """Raises a `CheckpointError` that names all problems, if there are any."""
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


def _tie_problems(name: str, tensor: TensorInfo, target: TensorInfo | None) -> list[str]:
    """A tied tensor must repeat its target to the byte."""
    if target is None:
        return []  # named as missing
    if (tensor.shape, tensor.dtype) == (target.shape, target.dtype):
        if (tensor.file, tensor.offset, tensor.strides) == (target.file, target.offset, target.strides):
            return []
        if np.array_equal(*(contiguous(each.read()).reshape(-1).view(np.uint8) for each in (tensor, target))):
            return []
    advice = "one of the two is wrong"
    if name == _DECODER:
        advice = "the config ties the two (tie_word_embeddings); to keep both, untie them (untie=True, --untie)"
    return [f"{tensor.name}: differs from {target.name}; {advice}"]


def _buffer_problems(name: str, tensor: TensorInfo) -> list[str]:
    if tensor.dtype.kind not in "iu" or not is_buffer_shape(tensor.shape):
        found = f"{DTYPE_NAMES[tensor.dtype]}{list(tensor.shape)}"
        return [f"{tensor.name}: is {found}, expected integers [1, positions]"]
    if np.array_equal(tensor.read(), _buffer(name, tensor.shape, np.dtype(np.int64))):
        return []
    what = "0, 1, 2, ..." if name == POSITION_IDS else "zeros"
    return [f"{tensor.name}: expected {what}; this model numbers its positions or segments in its own way"]


def _buffer(name: str, shape: Shape, dtype: np.dtype) -> np.ndarray:
    count = int(np.prod(shape, dtype=np.int64))
    values = np.arange(count) if name.endswith("position_ids") else np.zeros(count)
    return values.astype(dtype).reshape(shape)


def tensors_of(slots: Iterable[Slot], tree: Mapping[Path, np.ndarray]) -> dict[str, TensorToWrite]:
    """The PyTorch tensors of a parameter tree, by bertjax's names.

    Args:
        slots: the model's tensors.
        tree: the arrays of the parameter tree.
    """

    def tensor(slot: Slot) -> TensorToWrite:
        return TensorToWrite(slot.name, tree[slot.path].dtype, slot.shape, lambda: slot.view(tree[slot.path]))

    return {slot.name: tensor(slot) for slot in slots}


def export(tensors: Mapping[str, TensorToWrite], layout: Layout) -> list[TensorToWrite]:
    """Gives tensors the layout's names, and adds its ties and buffers.

    Args:
        tensors: by bertjax's names.
        layout: the spelling.
    """

    def buffer(name: str, shape: Shape, dtype: str) -> TensorToWrite:
        return TensorToWrite(name, np.dtype(dtype), shape, lambda: _buffer(name, shape, np.dtype(dtype)))

    ties = {name: tensors[TIES[name]] for name in layout.ties if _PREDICTIONS in tensors}
    named = [dataclasses.replace(tensor, name=layout.spell(name)) for name, tensor in (tensors | ties).items()]
    result = named + [buffer(*each) for each in layout.buffers]
    counts = Counter(tensor.name for tensor in result)
    twice = [name for name, count in counts.items() if count > 1]
    if twice:
        raise CheckpointError(f"the layout gives several tensors the name {', '.join(map(repr, twice))}")
    return result
