"""The certificate of a conversion: every tensor before and after, so that anyone can see that nothing changed.

A tensor's hash is the SHA-256 of its numbers in C order, little-endian, in the shape that PyTorch gives it. So it is
the same in every format that holds the same numbers, and can be recomputed with numpy alone.
"""

import hashlib
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from bertjax.convert import names, sources
from bertjax.convert.bert import Plan
from bertjax.convert.layout import TIES, Layout
from bertjax.convert.tensors import TensorInfo, WeightFiles, enumerate_problems, inside
from bertjax.errors import BertjaxError, CheckpointError, SourceError
from bertjax.json_files import read_json

_VERSION = 1
# Hashing lets go of the interpreter's lock; each thread holds one tensor.
_THREADS = 2


def certify(
    plan: Plan,
    survey: names.Survey,
    target: Path,
    *,
    layout: Layout,
    dtype: np.dtype | None,
    config: Path,
) -> dict[str, Any]:
    """Compares what was read with what was written, by reading both.

    Args:
        plan: what was to become of every tensor.
        survey: the checkpoint that was read.
        target: the folder that was written.
        layout: the names that were to be written.
        dtype: the dtype that the weights were cast to, or None.
        config: the checkpoint's configuration file.

    Returns:
        The certificate, ready for JSON.

    Raises:
        CheckpointError: a tensor was not written as it should have been.
    """
    weights = survey.weights
    written = names.survey(sources.open_weights(target))
    slots = {slot.name for slot in plan.slots}
    with ThreadPoolExecutor(_THREADS) as pool:
        pairs = ((name, info, written.tensors.get(name), dtype if _is_cast(name, slots) else None)
                 for name, info in survey.tensors.items())  # fmt: skip
        tensors = list(pool.map(lambda pair: _fate(slots, *pair), pairs))
        source_files = list(pool.map(_file, *zip(*_source_files(weights, config), strict=True)))
        target_files = list(pool.map(_file, *zip(*_all_files(target), strict=True)))
    lost = [tensor["name"] for tensor in tensors if tensor["fate"] == "lost"]
    if lost:
        raise CheckpointError(f"{target}: written, but not the same as was read: {enumerate_problems(lost)}")
    tensors += [{"name": name, "fate": "left out", "why": "belongs to another encoder"} for name in survey.others]
    tensors += [{"name": name, "fate": "left out", "why": why} for name, why in weights.left_out.items()]
    return {
        "bertjax_certificate": _VERSION,
        "source": {"folder": str(weights.folder), "format": weights.format, "files": source_files},
        "target": {"format": written.weights.format, "files": target_files},
        "aliases": _aliases(plan.layout, layout),
        "casts": dict(Counter(tensor["cast"] for tensor in tensors if "cast" in tensor)),
        "totals": _totals(tensors, plan),
        "tensors": tensors,
    }


def _is_cast(name: str, slots: set[str]) -> bool:
    return name in slots or TIES.get(name) in slots


def _fate(
    slots: set[str], name: str, info: TensorInfo, after: TensorInfo | None, dtype: np.dtype | None
) -> dict[str, Any]:
    """What became of one tensor."""
    array = info.read()
    entry: dict[str, Any] = {"name": info.name, "fate": "kept", "before": {**_called(info), **_look(array)}}
    if name not in slots:
        entry["fate"] = f"repeats {TIES[name]}" if name in TIES else "buffer"
    if after is None:  # msgpack and Orbax hold no repetitions and no buffers; the layout beside them does
        entry["after"] = None
        return entry if name not in slots else entry | {"fate": "lost"}
    found = after.read()
    entry["after"] = {"name": after.name, **_called(after), **_look(found)}
    expected = _look(array if dtype is None else array.astype(dtype))
    if dtype is not None and array.dtype != dtype:
        entry["cast"] = f"{array.dtype.name} to {np.dtype(dtype).name}"
    if not expected.items() <= entry["after"].items():
        entry["fate"] = "lost"
    return entry


def _called(info: TensorInfo) -> dict[str, str]:
    """What the file calls a tensor, where that is not its PyTorch name."""
    return {} if info.source is None else {"called": info.source}


def _look(array: np.ndarray) -> dict[str, Any]:
    """A tensor's dtype, shape and hash."""
    data = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    return {"dtype": array.dtype.name, "shape": list(array.shape), "sha256": hashlib.sha256(data).hexdigest()}


def _source_files(weights: WeightFiles, config: Path) -> Iterable[tuple[Path, str]]:
    members = [*weights.files, *([weights.index] if weights.index else []), config.name]
    return [(weights.folder, name) for name in members]


def _all_files(folder: Path) -> Iterable[tuple[Path, str]]:
    return [(folder, path.relative_to(folder).as_posix()) for path in sorted(folder.rglob("*")) if path.is_file()]


def _file(folder: Path, name: str) -> dict[str, Any]:
    """A file's name, size and hash."""
    path = inside(folder, name)
    try:
        with open(path, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            return {"name": name, "bytes": file.tell(), "sha256": digest}
    except OSError as problem:
        raise SourceError(f"{path}: can't be read ({problem.strerror or problem})") from None


def _aliases(read: Layout, written: Layout) -> dict[str, Any]:
    def describe(layout: Layout) -> dict[str, Any]:
        return {
            "prefix": layout.prefix,
            "layer_norm": "gamma, beta" if layout.legacy_norm else "weight, bias",
            "spellings": dict(layout.spellings),
            "repeated": list(layout.ties),
            "buffers": [name for name, _, _ in layout.buffers],
        }

    return {"read": describe(read), "written": describe(written)}


def _totals(tensors: list[dict[str, Any]], plan: Plan) -> dict[str, int]:
    fates = Counter("repeated" if tensor["fate"].startswith("repeats") else tensor["fate"] for tensor in tensors)
    same = sum(
        1 for tensor in tensors if tensor.get("after") and tensor["after"]["sha256"] == tensor["before"]["sha256"]
    )
    parameters = sum(info.count for info in plan.tensors)
    return {"tensors": len(tensors), "parameters": parameters, "byte for byte the same": same, **dict(fates)}


def check(path: Path, folder: Path) -> str:
    """Compares a folder with the certificate of the conversion that made it.

    Args:
        path: the certificate.
        folder: the folder.

    Returns:
        What was compared, in one line.

    Raises:
        SourceError: the certificate or the folder can't be read.
        CheckpointError: the file is no certificate, or the folder is not as it was certified. One error names every
            difference.
    """
    certificate = _read(path)
    problems = []
    for expected in certificate["target"]["files"]:
        problems += _file_problems(folder, expected)
    tensors = [tensor for tensor in certificate["tensors"] if tensor.get("after")]
    try:
        found = sources.open_weights(folder).tensors
        with ThreadPoolExecutor(_THREADS) as pool:
            for some in pool.map(lambda tensor: _tensor_problems(found, tensor["after"]), tensors):
                problems += some
        listed = {tensor["after"]["name"] for tensor in tensors}
        problems += [f"{name}: a tensor that the certificate does not have" for name in found if name not in listed]
    except BertjaxError as problem:
        problems.append(f"the weights can't be read ({problem})")
    if problems:
        raise CheckpointError(
            f"{folder}: {len(problems)} difference(s) from {path}: {enumerate_problems(problems)}; convert again"
        )
    return f"{folder}: {len(tensors)} tensors and {len(certificate['target']['files'])} files are as {path} says"


def _file_problems(folder: Path, expected: Mapping[str, Any]) -> list[str]:
    name = expected["name"]
    if not (folder / name).is_file():
        return [f"{name}: missing"]
    found = _file(folder, name)
    if found == expected:
        return []
    if found["bytes"] != expected["bytes"]:
        return [f"{name}: {found['bytes']:,} bytes, expected {expected['bytes']:,}"]
    return [f"{name}: its bytes have changed"]


def _tensor_problems(found: Mapping[str, TensorInfo], expected: Mapping[str, Any]) -> list[str]:
    name = expected["name"]
    if name not in found:
        return [f"{name}: missing"]
    info = found[name]
    if (info.dtype.name, list(info.shape)) != (expected["dtype"], expected["shape"]):
        was = f"{expected['dtype']}{expected['shape']}"
        return [f"{name}: is {info.dtype.name}{list(info.shape)}, expected {was}"]
    return [] if _look(info.read())["sha256"] == expected["sha256"] else [f"{name}: its numbers have changed"]


_DIGEST = re.compile(r"[0-9a-f]{64}")


def _read(path: Path) -> dict[str, Any]:
    """Reads a certificate and checks that it is one."""
    certificate = read_json(path, CheckpointError)
    if certificate.get("bertjax_certificate") != _VERSION:
        raise CheckpointError(f'{path}: not a certificate of this version; expected "bertjax_certificate": {_VERSION}')
    try:
        files = certificate["target"]["files"]
        looks = [tensor["after"] for tensor in certificate["tensors"] if tensor.get("after")]
        sound = all(_is_sound(file, bytes=int) and _is_local(file["name"]) for file in files)
        sound = sound and all(_is_sound(look, dtype=str, shape=list) for look in looks)
    except (KeyError, TypeError, AttributeError):
        sound = False
    if not sound:
        raise CheckpointError(f"{path}: a damaged certificate; write a new one by converting again")
    return certificate


def _is_sound(entry: Mapping[str, Any], **kinds: type) -> bool:
    kinds |= {"name": str, "sha256": str}
    typed = all(isinstance(entry[name], kind) for name, kind in kinds.items())
    return typed and bool(_DIGEST.fullmatch(entry["sha256"]))


def _is_local(name: str) -> bool:
    """Whether a file's name stays inside the folder."""
    return not Path(name).is_absolute() and ".." not in Path(name).parts
