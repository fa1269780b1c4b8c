"""Compiled functions of a model that do not walk over the whole model at each call."""

import functools
import weakref
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import jax
from flax import nnx

Function = TypeVar("Function", bound=Callable)


def jit_model(function: Function, **options: Any) -> Function:
    """`jax.jit` of a function whose first argument is a model; what is compiled is shared by models that are alike.

    For each call `jit` looks into every module of a model, in Python, which takes longer than a small model computes.
    Here that is done again only when the model is made of other objects than at the last call; parameters may change.

    Args:
        function: the function.
        **options: those of `jax.jit`, such as `static_argnames`.
    """

    @functools.wraps(function)
    def of_arrays(arrays: _Arrays, *args: Any, **kwargs: Any) -> Any:
        return function(jax.tree.unflatten(arrays.structure.treedef, arrays.leaves), *args, **kwargs)

    compiled = jax.jit(of_arrays, **options)

    @functools.wraps(function)
    def call(model: nnx.Module, *args: Any, **kwargs: Any) -> Any:
        return compiled(_arrays_of(model), *args, **kwargs)

    return call


class _Structure:
    """A model without its arrays; there is one object for all models that are alike, so comparing takes no time."""

    def __init__(self, treedef: jax.tree_util.PyTreeDef):
        self.treedef = treedef


@jax.tree_util.register_pytree_node_class
class _Arrays:
    """A model's arrays and its structure; a pytree."""

    def __init__(self, leaves: list[Any], structure: _Structure):
        self.leaves = leaves
        self.structure = structure

    def tree_flatten(self) -> tuple[list[Any], _Structure]:
        return self.leaves, self.structure

    @classmethod
    def tree_unflatten(cls, structure: _Structure, leaves: Any) -> "_Arrays":
        return cls(leaves, structure)


class _Seen:
    """What a model was made of when it was last walked over."""

    def __init__(self, model: nnx.Module):
        treedef = jax.tree.structure(model)
        self._structure = _structures.setdefault(treedef, _Structure(treedef))
        self._variables = jax.tree.leaves(model, is_leaf=lambda node: isinstance(node, nnx.Variable))
        # The values are kept so that nothing else can get their ids.
        modules = [(vars(module), list(vars(module).values())) for module in _modules(model)]
        self._attributes = [(attributes, values, list(map(id, values))) for attributes, values in modules]
        found = {identity for *_, ids in self._attributes for identity in ids}
        # A variable in a list or a dict could be replaced unseen.
        self._complete = all(id(variable) in found for variable in self._variables)

    def arrays(self) -> _Arrays:
        """What the variables hold now."""
        return _Arrays(jax.tree.leaves([variable.get_raw_value() for variable in self._variables]), self._structure)

    def is_same(self) -> bool:
        """Whether every attribute of every module still is the same object."""
        for attributes, _, ids in self._attributes:
            if list(map(id, attributes.values())) != ids:
                return False
        return self._complete


_structures: dict[jax.tree_util.PyTreeDef, _Structure] = {}
_seen: weakref.WeakKeyDictionary[nnx.Module, _Seen] = weakref.WeakKeyDictionary()


def _arrays_of(model: nnx.Module) -> _Arrays:
    seen = _seen.get(model)
    if seen is None or not seen.is_same():
        seen = _seen[model] = _Seen(model)
    return seen.arrays()


def _modules(module: nnx.Module) -> Iterator[nnx.Module]:
    """The module and all that are part of it."""
    yield module
    for value in vars(module).values():
        if isinstance(value, nnx.Module):
            yield from _modules(value)
