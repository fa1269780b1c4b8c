"""Parts of a model that its checkpoint lacks: made where the caller names them, and never otherwise."""

import contextlib
from collections.abc import Callable, Collection, Iterable, Iterator

import jax
from flax import nnx

from bertjax.checks import as_integer
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
    names = [fresh] if isinstance(fresh, str) or not isinstance(fresh, Iterable) else list(fresh)
    if not all(isinstance(name, str) for name in names):
        raise InputError(f"fresh={fresh!r} is no name of a part of the model, nor several")
    parts = frozenset(names)
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
def hinting(kind: type, survey: Survey, slots: Collection[rules.Slot]) -> Iterator[None]:
    """Adds to an error of the block, if one of the model's parts is wholly absent, how to have it made."""
    try:
        yield
    except CheckpointError as problem:
        needed = {bert.part_of(slot.name) for slot in slots}
        absent = [part for part in PARTS if part in needed - {bert.part_of(name) for name in survey.tensors}]
        if not absent:
            raise
        value = f'"{absent[0]}"' if len(absent) == 1 else str(tuple(absent)).replace("'", '"')
        make = f"{kind.__name__}.from_pretrained(..., fresh={value})"
        advice = f"the checkpoint has no {' and no '.join(absent)}; for a new one, to be trained, call {make}"
        if absent != ["pooler"]:
            advice += "; to do without, load BertModel"
        raise CheckpointError(f"{problem}; {advice}") from None


def initialise(
    make: Callable[[nnx.Rngs], nnx.Module], paths: Collection[rules.Path], key: jax.Array | None
) -> dict[rules.Path, jax.Array]:
    """Some of a new model's parameters. The others are never allocated: the compiler drops what is not returned.

    Args:
        make: makes the module.
        paths: the parameters to return.
        key: a random key, needed if there are any.
    """
    if not paths:
        return {}

    @jax.jit
    def build(key: jax.Array) -> dict[rules.Path, jax.Array]:
        found = rules.flatten(nnx.to_pure_dict(nnx.state(make(nnx.Rngs(params=key)), nnx.Param)))
        return {path: array for path, array in found if path in paths}

    return build(key)


def key_of(rngs: nnx.Rngs | int) -> jax.Array:
    """A random key for parameters, of random keys or a seed. Raises `InputError` for anything else."""
    seed = as_integer(rngs)
    if seed is not None and 0 <= seed < 1 << 32:  # what a key holds: of a larger one the rest would be dropped
        rngs = nnx.Rngs(seed)
    if not isinstance(rngs, nnx.Rngs):
        raise InputError(f"rngs={rngs!r} is neither nnx.Rngs nor a seed from 0 to {(1 << 32) - 1}")
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
