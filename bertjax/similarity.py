"""How near vectors are to one another, by the functions that sentence-transformers names."""

from typing import Any

import numpy as np

from bertjax.checks import check_choice
from bertjax.errors import InputError

#: Names of the functions; distances are negative, so that more is nearer.
SIMILARITIES = ("cosine", "dot", "euclidean", "manhattan")


def similarity(name: str, first: Any, second: Any) -> np.ndarray:
    """How near each vector is to each of others.

    Args:
        name: one of `SIMILARITIES`.
        first: float [n, dim], or [dim] for one.
        second: float [m, dim], or [dim].

    Returns:
        float32 [n, m].

    Raises:
        InputError: the name is none of these, or the vectors are of no common dimension.
    """
    check_choice("similarity_fn_name", name, SIMILARITIES)
    a, b = _matrix("first", first), _matrix("second", second)
    if a.shape[1] != b.shape[1]:
        raise InputError(f"the vectors have {a.shape[1]} and {b.shape[1]} numbers, expected as many")
    if name in ("cosine", "dot"):
        return _unit(a) @ _unit(b).T if name == "cosine" else a @ b.T
    from scipy.spatial.distance import cdist  # imported where it is used: it takes a tenth of a second

    return -cdist(a, b, {"euclidean": "euclidean", "manhattan": "cityblock"}[name]).astype(np.float32)


def _matrix(name: str, vectors: Any) -> np.ndarray:
    array = np.asarray(vectors, np.float32)
    if array.ndim not in (1, 2):
        raise InputError(f"{name} has the shape {array.shape}, expected vectors: [n, dim] or [dim]")
    return np.atleast_2d(array)


def _unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
