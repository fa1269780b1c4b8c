"""The certificate of a conversion: every tensor before and after, so that anyone can see that nothing changed.

It holds no times and no random numbers: the same conversion of the same files gives the same certificate.
"""

import dataclasses
import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from bertjax.convert import names, sources
from bertjax.convert.bert import Plan
from bertjax.convert.layout import LAYOUT_FILE, POSITION_IDS, TIES, TOKEN_TYPE_IDS, Layout
from bertjax.convert.tensors import DTYPES, TensorInfo, WeightFiles, contiguous, enumerate_problems, inside
from bertjax.errors import BertjaxError, CheckpointError, SourceError
from bertjax.json_files import read_json

_VERSION = 1
# So that a hash is the same in every format that holds the same numbers, and needs only numpy to be recomputed.
_HASHES = "sha256; a file's of its bytes, a tensor's of its numbers, little-endian, in C order of the shape given here"
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
        The certificate, ready for `dumps`.

    Raises:
        CheckpointError: a tensor was not written as it should have been.
    """
    weights = survey.weights
    written = names.survey(sources.open_weights(target))
    comparison = _Comparison({slot.name for slot in plan.slots}, survey, written, layout, dtype)
    target_names = sorted(path.relative_to(target).as_posix() for path in target.rglob("*") if path.is_file())
    tensors = _map(comparison.fate, {**survey.tensors, **written.tensors})
    others = set(survey.others)
    tensors += _map(_left_out, (info for info in weights.tensors.values() if info.name in others))
    tensors += [{"name": name, "fate": "left out", "why": why} for name, why in weights.left_out.items()]
    wrong = [tensor["name"] for tensor in tensors if tensor["fate"] == "lost"]
    wrong += [info.name for info in written.strange] + list(written.others)
    if wrong:
        raise CheckpointError(f"{weights.folder}: what was written is not what was read: {enumerate_problems(wrong)}")
    source_files = _map(lambda name: _file(weights.folder, name), _source_names(weights, config, target_names))
    target_files = _map(lambda name: _file(target, name), target_names)
    return {
        "bertjax_certificate": _VERSION,
        "hashes": _HASHES,
        "source": {**_origin(weights.folder), "format": weights.format, "files": source_files},
        "target": {
            "format": written.weights.format,
            "files": target_files,
            "same_as_source": [file["name"] for file in target_files if file in source_files],
        },
        "aliases": {"read": _spelling(plan.layout), "written": _spelling(layout)},
        "casts": dict(Counter(tensor["cast"] for tensor in tensors if "cast" in tensor)),
        "totals": _totals(tensors, plan),
        "tensors": tensors,
    }


def dumps(value: Any, indent: str = "") -> str:
    """A certificate as JSON, with a line for each file and each tensor: BERT-base's fills four screens, not forty."""
    inner = indent + " "
    if isinstance(value, dict) and value and len(indent) < 2:
        items = [f"{inner}{json.dumps(name)}: {dumps(each, inner)}" for name, each in value.items()]
        return "{\n" + ",\n".join(items) + f"\n{indent}}}"
    if isinstance(value, list) and value:
        return "[\n" + ",\n".join(inner + json.dumps(each) for each in value) + f"\n{indent}]"
    return json.dumps(value)


def _map(function: Callable[[Any], Any], items: Iterable[Any]) -> list[Any]:
    with ThreadPoolExecutor(_THREADS) as pool:
        return list(pool.map(function, items))


@dataclasses.dataclass(frozen=True)
class _Comparison:
    """What was read and what was written, tensor by tensor.

    Attributes:
        slots: bertjax's names of the model's tensors; the others repeat one of them or are buffers.
        read: what was read.
        written: what was written.
        layout: the names that were to be written.
        dtype: the dtype that the weights were cast to, or None.
    """

    slots: set[str]
    read: names.Survey
    written: names.Survey
    layout: Layout
    dtype: np.dtype | None

    def fate(self, name: str) -> dict[str, Any]:
        """What became of one tensor, by bertjax's name."""
        before, after = self.read.tensors.get(name), self.written.tensors.get(name)
        array = None if before is None else before.read()
        found = None if after is None else after.read()
        entry = {"name": (before or after).name, **self._kind(name)}
        if before is None:
            entry["why"] = f"{LAYOUT_FILE} of the source says so"
            sound = self._is_known(name, found)
        elif after is None:
            noted = name in self.layout.ties or before.name in {buffer for buffer, _, _ in self.layout.buffers}
            entry["why"] = f"{LAYOUT_FILE} says so" if noted else "standard names go without"
            sound = name not in self.slots
        else:
            cast = self.dtype is not None and TIES.get(name, name) in self.slots and array.dtype != self.dtype
            if cast:
                entry["cast"] = f"{array.dtype.name} to {self.dtype.name}"
            sound = _look(array.astype(self.dtype) if cast else array) == _look(found)
        entry["before"] = None if before is None else {**_called(before), **_look(array)}
        entry["after"] = None if after is None else {"name": after.name, **_called(after), **_look(found)}
        return entry if sound else entry | {"fate": "lost"}

    def _kind(self, name: str) -> dict[str, str]:
        if name in self.slots:
            return {"fate": "kept"}
        if name in TIES:
            return {"fate": "repeated", "of": self.read.tensors[TIES[name]].name}
        return {"fate": "buffer"}

    def _is_known(self, name: str, array: np.ndarray) -> bool:
        """Whether a tensor that was written, but not read, says nothing new."""
        if name in (POSITION_IDS, TOKEN_TYPE_IDS):
            return np.array_equal(array, np.arange(array.size)[None] * (name == POSITION_IDS))
        tied = self.written.tensors.get(TIES.get(name, ""))
        return tied is not None and _look(array) == _look(tied.read())


def _left_out(info: TensorInfo) -> dict[str, Any]:
    before = {**_called(info), **_look(info.read())}
    return {"name": info.name, "fate": "left out", "why": "belongs to another encoder", "before": before}


def _called(info: TensorInfo) -> dict[str, str]:
    """What the file calls a tensor, where that is not its PyTorch name."""
    return {} if info.source is None else {"called": info.source}


def _look(array: np.ndarray) -> dict[str, Any]:
    """A tensor's dtype, shape and hash."""
    data = contiguous(array).reshape(-1).view(np.uint8)
    return {"dtype": array.dtype.name, "shape": list(array.shape), "sha256": hashlib.sha256(data).hexdigest()}


def _origin(folder: Path) -> dict[str, str]:
    """The source's folder, and what it is a snapshot of if it lies in the Hub's cache."""
    for path in (folder, *folder.parents):
        if path.parent.name == "snapshots" and path.parents[1].name.startswith("models--"):
            repository = path.parents[1].name.removeprefix("models--").replace("--", "/")
            return {"repository": repository, "commit": path.name, "folder": str(folder)}
    return {"folder": str(folder)}


def _source_names(weights: WeightFiles, config: Path, target_names: list[str]) -> list[str]:
    """The files that were read: weights, index, layout, configuration, and what was copied beside them."""
    read = [*weights.files, config.name]
    read += [weights.index] if weights.index else []
    read += [LAYOUT_FILE] if weights.layout else []
    # What is in both folders was copied, but for an Orbax checkpoint or weights that were not read.
    weight = re.compile(r"(params|[^/]*\.(safetensors|bin|msgpack)(\.index\.json)?)(/|$)|" + re.escape(LAYOUT_FILE))
    read += [name for name in target_names if not weight.match(name) and (weights.folder / name).is_file()]
    return list(dict.fromkeys(read))


def _file(folder: Path, name: str) -> dict[str, Any]:
    """A file's name, size and hash."""
    path = inside(folder, name)
    try:
        with open(path, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            return {"name": name, "bytes": file.tell(), "sha256": digest}
    except OSError as problem:
        raise SourceError(f"{path}: can't be read ({problem.strerror or problem})") from None


def _spelling(layout: Layout) -> dict[str, Any]:
    return {
        "prefix": layout.prefix,
        "layer_norm": "gamma, beta" if layout.legacy_norm else "weight, bias",
        "spellings": dict(layout.spellings),
        "repeated": list(layout.ties),
        "buffers": [name for name, _, _ in layout.buffers],
    }


def _totals(tensors: list[dict[str, Any]], plan: Plan) -> dict[str, int]:
    pairs = [(tensor["before"], tensor["after"]) for tensor in tensors if tensor.get("before") and tensor.get("after")]
    return {
        "tensors": len(tensors),
        "parameters": sum(info.count for info in plan.tensors),
        "byte_for_byte_the_same": sum(before["sha256"] == after["sha256"] for before, after in pairs),
        **dict(Counter(tensor["fate"] for tensor in tensors)),
    }


def check(path: Path, folder: Path) -> str:
    """Compares a folder with the certificate of the conversion that made it.

    Every file and every tensor must be as certified, and no other may be there, for one that was put in later may be
    the one that is read: only the certificate, notes (*.md, LICENSE) and hidden files are let pass.

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
    if not folder.is_dir():
        raise SourceError(f"{folder}: no such folder; a certificate is compared with the folder that was written")
    files = certificate["target"]["files"]
    tensors = [tensor["after"] for tensor in certificate["tensors"] if tensor.get("after")]
    problems = _all_file_problems(folder, files)
    origin = certificate["source"]["files"]
    if problems and origin and not _all_file_problems(folder, origin):
        raise CheckpointError(f"{folder}: is what {path} was converted from, unchanged; name the folder that was made")
    listed = {file["name"] for file in files}
    strange = [name for name in _files_not_in(listed, folder) if not _is_same(folder / name, path)]
    problems += [f"{name}: a file that the certificate does not have" for name in strange]
    problems += _all_tensor_problems(folder, tensors)
    if not problems:
        return f"{folder}: {len(tensors)} tensors and {len(files)} files are as {path} says"
    raise CheckpointError(f"{folder}: {len(problems)} difference(s) from {path}: {enumerate_problems(problems)}")


def _is_same(path: Path, other: Path) -> bool:
    return os.path.realpath(path) == os.path.realpath(other)


def _files_not_in(listed: set[str], folder: Path) -> list[str]:
    paths = sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_symlink() or not path.is_dir())
    ignored = re.compile(r"(.*/)?\..*|[^/]*\.md|LICENSE[^/]*")
    return [name for name in map(Path.as_posix, paths) if name not in listed and not ignored.fullmatch(name)]


def _all_file_problems(folder: Path, files: list[dict[str, Any]]) -> list[str]:
    return [problem for problems in _map(lambda file: _file_problems(folder, file), files) for problem in problems]


def _file_problems(folder: Path, expected: Mapping[str, Any]) -> list[str]:
    name = expected["name"]
    if not os.path.isfile(folder / name):  # `Path.is_file` raises for a name that is too long
        return [f"{name}: missing"]
    try:
        found = _file(folder, name)
    except SourceError as problem:
        return [str(problem)]
    if found["bytes"] != expected["bytes"]:
        return [f"{name}: {found['bytes']:,} bytes, expected {expected['bytes']:,}"]
    return [] if found["sha256"] == expected["sha256"] else [f"{name}: its bytes have changed"]


def _all_tensor_problems(folder: Path, tensors: list[dict[str, Any]]) -> list[str]:
    try:
        found = sources.open_weights(folder).tensors
        lists = _map(lambda expected: _tensor_problems(found, expected), tensors)
    except BertjaxError as problem:
        return [f"the weights can't be read ({problem})"]
    listed = {expected["name"] for expected in tensors}
    problems = [problem for problems in lists for problem in problems]
    return problems + [f"{name}: a tensor that the certificate does not have" for name in found if name not in listed]


def _tensor_problems(found: Mapping[str, TensorInfo], expected: Mapping[str, Any]) -> list[str]:
    name = expected["name"]
    if name not in found:
        return [f"{name}: missing"]
    info = found[name]
    if (info.dtype.name, list(info.shape)) != (expected["dtype"], expected["shape"]):
        was = f"{expected['dtype']}{expected['shape']}"
        return [f"{name}: is {info.dtype.name}{list(info.shape)}, expected {was}"]
    return [] if _look(info.read())["sha256"] == expected["sha256"] else [f"{name}: its numbers have changed"]


def _read(path: Path) -> dict[str, Any]:
    """Reads a certificate and checks as much of it as is used: it may come from anyone."""
    certificate = read_json(path, CheckpointError)
    version = certificate.get("bertjax_certificate")
    if version != _VERSION:
        raise CheckpointError(
            f'{path}: not a certificate that this version reads; expected "bertjax_certificate": {_VERSION}'
        )
    try:
        files = [certificate[side]["files"] for side in ("source", "target")]
        tensors = [tensor["after"] for tensor in certificate["tensors"] if tensor.get("after")]
        sound = all(isinstance(each, list) and _are_distinct(each) for each in (*files, tensors))
        sound = sound and all(_is_file(file) for each in files for file in each) and all(map(_is_look, tensors))
    except (KeyError, TypeError, AttributeError):
        sound = False
    if not sound:
        raise CheckpointError(f"{path}: a damaged certificate; convert again to get a new one")
    return certificate


_DIGEST = re.compile(r"[0-9a-f]{64}")
_DTYPES = [dtype.name for dtype in DTYPES.values()]
_MAX_NAME = 1000  # characters; so that no message is a megabyte long


def _are_distinct(entries: list[dict[str, Any]]) -> bool:
    return len({entry["name"] for entry in entries}) == len(entries)


def _is_sound(entry: Mapping[str, Any]) -> bool:
    name, digest = entry["name"], entry["sha256"]
    # What can't be printed, such as half a surrogate, would be an error of Python's own in a message.
    named = isinstance(name, str) and 0 < len(name) <= _MAX_NAME and name.isprintable()
    return named and isinstance(digest, str) and bool(_DIGEST.fullmatch(digest))


def _is_file(entry: Mapping[str, Any]) -> bool:
    """Whether it is a file's entry, whose name stays inside the folder."""
    size = entry["bytes"]
    sized = type(size) is int and 0 <= size < 1 << 63
    return sized and _is_sound(entry) and not {"", ".", ".."} & set(entry["name"].split("/"))


def _is_look(entry: Mapping[str, Any]) -> bool:
    """Whether it is a tensor's entry."""
    dtype, shape = entry["dtype"], entry["shape"]
    sizes = isinstance(shape, list) and len(shape) <= 8 and all(type(size) is int for size in shape)
    return sizes and dtype in _DTYPES and _is_sound(entry)
