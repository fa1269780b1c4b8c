"""Parts of a model that its checkpoint lacks: made where the caller names them, and never otherwise."""

import contextlib
from collections.abc import Callable, Collection, Iterable, Iterator

import jax
from flax import nnx

from bertjax.config import BertConfig
from bertjax.convert import bert, rules
from bertjax.convert.layout import standard_layout
from bertjax.convert.names import Survey
from bertjax.errors import CheckpointError, InputError
from bertjax.heads import HEADS, BertWithHeads
from bertjax.model import BertModel

#: What can be made afresh.
PARTS = (*HEADS, "pooler")


def check_kind(kind: type) -> type[BertModel] | type[BertWithHeads]:
    """Returns the class if it is one to load. Raises `InputError` otherwise."""
    if isinstance(kind, type) and (issubclass(kind, BertModel) or hasattr(kind, "heads")):
        return kind
    raise InputError(f"kind={kind!r} is not a class to load; expected BertModel or one of the BertFor... classes")


def check_parts(kind: type, fresh: str | Iterable[str]) -> frozenset[str]:
    """Returns the parts to make afresh. Raises `InputError` for one that the class does not have."""
    parts = frozenset([fresh] if isinstance(fresh, str) else fresh)
    has = ("pooler",) if issubclass(kind, BertModel) else (*kind.heads, *(["pooler"] if kind.pooled else []))
    unknown = sorted(map(repr, parts - set(has)))
    if unknown:
        raise InputError(f"fresh: {kind.__name__} has no {' and no '.join(unknown)}, only {', '.join(has)}")
    return parts


def check_labels(kind: type, config: BertConfig, survey: Survey, parts: Collection[str]) -> None:
    """Refuses labels that the caller gave to a class without any, or to a classifier with another number of them."""
    if "classifier" not in getattr(kind, "heads", ()) or kind.labels is not None:
        raise InputError(f"num_labels, id2label and problem_type are a classifier's, and {kind.__name__} has no labels")
    bias = survey.tensors.get("classifier.bias")
    if "classifier" not in parts and bias is not None and bias.count != config.num_labels:
        raise InputError(
            f"{survey.weights.folder}: the classifier has {bias.count} labels, not {config.num_labels}; for a new one "
            'pass fresh="classifier"'
        )


@contextlib.contextmanager
def hinting(survey: Survey, slots: Collection[rules.Slot]) -> Iterator[None]:
    """Adds to an error of the block, if one of the model's parts is wholly absent, how to have it made."""
    try:
        yield
    except CheckpointError as problem:
        needed = {bert.part_of(slot.name) for slot in slots}
        absent = [part for part in PARTS if part in needed - {bert.part_of(name) for name in survey.tensors}]
        if not absent:
            raise
        value = f'"{absent[0]}"' if len(absent) == 1 else str(tuple(absent)).replace("'", '"')
        advice = f"the checkpoint has no {' and no '.join(absent)}; to make and train a new one pass fresh={value}"
        if absent != ["pooler"]:
            advice += ", to do without load BertModel"
        raise CheckpointError(f"{problem}; {advice}") from None


def initialise(
    make: Callable[[nnx.Rngs], nnx.Module], paths: Collection[rules.Path], rngs: nnx.Rngs | int
) -> dict[rules.Path, jax.Array]:
    """Some of a new model's parameters. The others are never allocated: the compiler drops what is not returned.

    Args:
        make: makes the module.
        paths: the parameters to return.
        rngs: random keys, or a seed.

    Raises:
        InputError: `rngs` is neither, or has no key for parameters.
    """
    if not paths:
        return {}

    @jax.jit
    def build(key: jax.Array) -> dict[rules.Path, jax.Array]:
        found = rules.flatten(nnx.to_pure_dict(nnx.state(make(nnx.Rngs(params=key)), nnx.Param)))
        return {path: array for path, array in found if path in paths}

    return build(_key(rngs))


def _key(rngs: nnx.Rngs | int) -> jax.Array:
    if type(rngs) is int:
        rngs = nnx.Rngs(rngs)
    if not isinstance(rngs, nnx.Rngs):
        raise InputError(f"rngs={rngs!r} is neither nnx.Rngs nor a seed")
    try:
        return rngs.params()
    except AttributeError:
        raise InputError("rngs has no stream called params, which draws parameters; pass nnx.Rngs(0)") from None


def names_of(slots: Collection[rules.Slot], parts: Collection[str]) -> list[str]:
    """What transformers calls a model's tensors that belong to these parts."""
    layout = standard_layout([slot.name for slot in slots])
    return [layout.spell(slot.name) for slot in slots if bert.part_of(slot.name) in parts]


def replaced_names(survey: Survey, parts: Collection[str]) -> list[str]:
    """The file's names of a checkpoint's tensors that belong to these parts."""
    return [info.name for name, info in survey.tensors.items() if bert.part_of(name) in parts]
