"""The names in a checkpoint: whose tensors they are, and what bertjax calls them.

Nothing is guessed from one name alone. The word embeddings, which every BERT has, say what stands before the names of
an encoder; that is decided once for the file, and a name that does not fit is reported, never bent to fit.
"""

import dataclasses
from collections.abc import Collection, Mapping

import numpy as np

from bertjax.convert.files import FORMAT
from bertjax.convert.layout import LAYOUT_FILE, LEGACY_NORM, POSITION_IDS, TOKEN_TYPE_IDS, Layout, is_head
from bertjax.convert.tensors import TensorInfo, WeightFiles, enumerate_problems
from bertjax.errors import CheckpointError

_ANCHOR = "embeddings.word_embeddings.weight"
_MAX_ENCODERS = 16  # in one file; a limit only so that looking for them takes linear time

# Parts of a name that torch's wrappers add, wherever the wrapped module stands: DataParallel and
# DistributedDataParallel, torch.compile, FSDP, activation checkpointing. No module of BERT's is called so.
_WRAPPERS = frozenset({"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})

# What other models call an encoder whose tensors are called, and shaped, like BERT's.
_FOREIGN = {
    "roberta": "RoBERTa, XLM-R or CamemBERT",
    "electra": "ELECTRA",
    "camembert": "CamemBERT",
    "xlm_roberta": "XLM-R",
    "layoutlm": "LayoutLM",
    "ernie": "ERNIE",
    "esm": "ESM",
}

_BIAS, _DECODER_BIAS = "cls.predictions.bias", "cls.predictions.decoder.bias"


@dataclasses.dataclass(frozen=True)
class Survey:
    """The tensors of a checkpoint under bertjax's names.

    Attributes:
        weights: the checkpoint.
        prefix: what stands before the encoder's names in the file.
        legacy_norm: LayerNorm parameters are called gamma and beta.
        tensors: by bertjax's name, the tensors that stand where those of the encoder or of a head do. Whether they are
            BERT's at all is for the caller to say.
        strange: tensors that stand elsewhere.
        others: names of the tensors of other encoders in the file.
    """

    weights: WeightFiles
    prefix: str
    legacy_norm: bool
    tensors: Mapping[str, TensorInfo]
    strange: tuple[TensorInfo, ...]
    others: tuple[str, ...]

    def with_decoder_bias(self) -> "Survey":
        """The same checkpoint, whose masked-language-model head has its bias under both names.

        transformers 5 gives a decoder that is not tied a bias of its own, and makes one up where the file has only
        `cls.predictions.bias`.
        """
        bias = self.tensors.get(_BIAS)
        if bias is None or _DECODER_BIAS in self.tensors or bias.name.endswith(_DECODER_BIAS):
            return self
        again = dataclasses.replace(bias, name=bias.name.removesuffix("bias") + "decoder.bias")
        weights = dataclasses.replace(self.weights, tensors={**self.weights.tensors, again.name: again})
        return dataclasses.replace(self, weights=weights, tensors={**self.tensors, _DECODER_BIAS: again})

    def layout(self) -> Layout:
        """The file's spelling; ties and buffers are found where the tensors are matched to a model."""
        layout = Layout(prefix=self.prefix, legacy_norm=self.legacy_norm)
        odd = tuple((name, info.name) for name, info in self.tensors.items() if layout.spell(name) != info.name)
        layout = dataclasses.replace(layout, spellings=odd)
        if self.weights.format != FORMAT:  # its shards and what it has for a header are not those of safetensors
            return layout
        shards = tuple((name, info.file.name) for name, info in self.weights.tensors.items())
        return dataclasses.replace(
            layout,
            shards=shards if self.weights.index else (),
            metadata=tuple(sorted(self.weights.metadata.items())),
        )


def survey(weights: WeightFiles, prefix: str | None = None) -> Survey:
    """Finds a file's encoder and gives its tensors, and those of its heads, bertjax's names.

    Args:
        weights: the file's tensors.
        prefix: what stands before the encoder's names, for a file that holds more than one encoder.

    Raises:
        CheckpointError: there is no encoder, or there are several and no prefix, or two tensors have one name once the
            wrappers' parts are taken away, or LayerNorm is spelt both ways.
    """
    bare = _without_wrappers(weights)
    prefixes = _find_prefixes(weights, bare)
    chosen = _choose_prefix(weights, prefixes, prefix)
    _refuse_foreign(weights, chosen)
    others = _names_of_others(bare, list(prefixes), chosen)
    tensors: dict[str, TensorInfo] = {}
    strange = []
    for stripped, info in bare.items():
        if info.name in others:
            continue
        name = _place(stripped, chosen)
        if name is None:
            strange.append(info)
        else:
            tensors[name] = info
    tensors, legacy = _modern(weights, tensors)
    if _DECODER_BIAS in tensors and _BIAS not in tensors:  # transformers has saved the one bias under either name
        tensors = {_BIAS if name == _DECODER_BIAS else name: info for name, info in tensors.items()}
    return Survey(
        weights,
        prefixes[chosen],
        legacy,
        tensors,
        tuple(strange),
        tuple(info.name for info in bare.values() if info.name in others),
    )


def check_layout(weights: WeightFiles, layout: Layout, slots: Collection[str]) -> None:
    """Refuses a layout from a file under whose names the tensors would not be found again, each for what it is.

    Args:
        weights: the weights that the layout stands beside.
        layout: the layout.
        slots: bertjax's names of the model's tensors.

    Raises:
        CheckpointError: the layout does not fit.
    """
    ties = layout.ties if _BIAS in slots else ()
    spelt = {name: layout.spell(name) for name in (*slots, *ties)}
    written = [*spelt.values(), *(name for name, _, _ in layout.buffers)]
    dummies = {name: TensorInfo(name, weights.folder, np.dtype(np.float32), (), 0) for name in written}
    try:
        found = survey(WeightFiles(FORMAT, dummies, folder=weights.folder))
        again = {name: info.name for name, info in found.tensors.items()}
        others = {name: again.pop(name) for name in (POSITION_IDS, TOKEN_TYPE_IDS) if name in again}
        same = (found.prefix, found.legacy_norm) == (layout.prefix, layout.legacy_norm) and again == spelt
        sound = same and len(others) == len(layout.buffers) and len(dummies) == len(written)
    except CheckpointError:
        sound = False
    if not sound or set(ties) & set(slots):
        raise CheckpointError(
            f"{weights.folder / LAYOUT_FILE}: does not fit the weights beside it: under its names they would not be "
            "found again; convert the original again, or remove this file to do without"
        )


def _without_wrappers(weights: WeightFiles) -> dict[str, TensorInfo]:
    """The tensors by their names without the parts that wrappers added."""
    bare: dict[str, TensorInfo] = {}
    problems = []
    for name, info in weights.tensors.items():
        *parts, last = name.split(".")
        stripped = ".".join([*(part for part in parts if part not in _WRAPPERS), last])
        if stripped in bare:
            problems.append(f"{bare[stripped].name} and {name} are both {stripped!r} without their wrappers' names")
        bare[stripped] = info
    if problems:
        raise CheckpointError(f"{weights.folder}: {enumerate_problems(problems)}; remove one of each two")
    return bare


def _find_prefixes(weights: WeightFiles, bare: Mapping[str, TensorInfo]) -> dict[str, str]:
    """What stands before the names of each encoder, without wrappers' parts, and as the file spells it."""
    found = {}
    for stripped, info in bare.items():
        prefix = stripped.removesuffix(_ANCHOR)
        if stripped.endswith(_ANCHOR) and (not prefix or prefix.endswith(".")):
            found[prefix] = info.name.removesuffix(_ANCHOR) if info.name.endswith(_ANCHOR) else prefix
    if not found:
        sample = ", ".join(list(weights.tensors)[:3])
        raise CheckpointError(f"{weights.folder}: no tensor is called ...{_ANCHOR}; not a BERT (it has {sample}, ...)")
    return found


def _choose_prefix(weights: WeightFiles, prefixes: Mapping[str, str], asked: str | None) -> str:
    """The prefix (a key of `prefixes`) of the file's encoder, or of the one asked for."""
    spellings = list(prefixes.values())
    found = ", ".join(map(repr, spellings[:_MAX_ENCODERS]))
    if len(prefixes) > _MAX_ENCODERS:
        raise CheckpointError(f"{weights.folder}: {len(prefixes)} encoders in one file, under {found}, ...; too many")
    if asked is None and len(prefixes) > 1:
        raise CheckpointError(
            f"{weights.folder}: {len(prefixes)} encoders in one file, under {found}; choose one with prefix="
        )
    if asked is None:
        return next(iter(prefixes))
    if asked in spellings:
        return list(prefixes)[spellings.index(asked)]
    raise CheckpointError(f"{weights.folder}: no encoder under the prefix {asked!r}, only under {found}")


def _refuse_foreign(weights: WeightFiles, prefix: str) -> None:
    """Refuses an encoder that by its name is another model's, whatever the configuration says."""
    foreign = [part for part in prefix.split(".") if part in _FOREIGN]
    if foreign:
        raise CheckpointError(
            f"{weights.folder}: the encoder is called {prefix!r}, so this is {_FOREIGN[foreign[0]]}, not BERT; it has "
            "tensors of the same names, but computes something else"
        )


def _names_of_others(bare: Mapping[str, TensorInfo], prefixes: list[str], chosen: str) -> set[str]:
    """The file's names of the tensors that belong to another encoder, or to that one's heads."""
    if prefixes == [chosen]:
        return set()
    # Heads stand outside "bert.", so an encoder owns both; where two claim a name, the longer beginning decides.
    owners = {each.removesuffix("bert."): each for each in prefixes} | {each: each for each in prefixes}
    beginnings = sorted(owners, key=len, reverse=True)

    def owner(stripped: str) -> str:
        return next((owners[each] for each in beginnings if stripped.startswith(each)), chosen)

    return {info.name for stripped, info in bare.items() if owner(stripped) != chosen}


def _place(stripped: str, prefix: str) -> str | None:
    """bertjax's name of a tensor, or None where nothing of a BERT under this prefix can stand."""
    outer = prefix.removesuffix("bert.")
    if stripped.startswith(outer) and is_head(stripped.removeprefix(outer)):
        return stripped.removeprefix(outer)
    inner = stripped.removeprefix(prefix)
    return inner if stripped.startswith(prefix) and not is_head(inner) else None


def _modern(weights: WeightFiles, tensors: Mapping[str, TensorInfo]) -> tuple[dict[str, TensorInfo], bool]:
    """Calls gamma and beta by today's names, and says whether they were called so."""
    legacy = [name for name in tensors if name.endswith(tuple(LEGACY_NORM))]
    modern = [name for name in tensors if name.endswith(tuple(LEGACY_NORM.values()))]
    if legacy and modern:
        raise CheckpointError(
            f"{weights.folder}: LayerNorm parameters are spelt both ways, {tensors[legacy[0]].name} and "
            f"{tensors[modern[0]].name}; the file is a mixture of two"
        )
    result = {}
    for name, info in tensors.items():
        ending = next((each for each in LEGACY_NORM if name.endswith(each)), None)
        result[name if ending is None else name.removesuffix(ending) + LEGACY_NORM[ending]] = info
    return result, bool(legacy)
