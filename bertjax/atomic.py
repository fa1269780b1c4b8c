"""Output that appears whole or not at all: write beside the target, flush, rename."""

import contextlib
import os
import re
import secrets
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

from bertjax.errors import SourceError

# What a model's folder may hold, beside folders.
_FILES = re.compile(
    r"(bert_|adapter_|sentence_[\w-]+_)?config\.json|config_sentence_transformers\.json"
    r"|bertjax_layout\.json|.*\.(safetensors|bin|msgpack|index\.json)|modules\.json"
    r"|tokenizer.*\.json|special_tokens_map\.json|added_tokens\.json|vocab\.txt|README\.md|LICENSE.*|\.gitattributes"
)
# A module of sentence-transformers: its folder, and the files in it.
_MODULE = re.compile(r"\d{1,3}_[A-Z]\w*")
_MODULE_FILES = (".json", ".safetensors", ".bin", ".txt")
# An Orbax checkpoint, in an OCDBT store: paths in its folder.
_ORBAX = "params"
_ORBAX_PATHS = re.compile(
    r"_METADATA|_CHECKPOINT_METADATA|_sharding|commit_success\.txt|array_metadatas(/process_\d+)?|ocdbt\.process_\d+"
    r"|(ocdbt\.process_\d+/)?(manifest\.ocdbt|d|d/[0-9a-f]{32})"
)
# Strange names that a message shows.
_MAX_SHOWN = 5

# Seconds before each attempt to remove a folder that threads of a library may still be writing to.
_PAUSES = (0.0, 0.01, 0.05, 0.2, 0.5)


@contextlib.contextmanager
def atomic_file(target: str | Path) -> Iterator[Path]:
    """Gives a temporary path in the target's folder, and renames it to the target if the block succeeds.

    Raises:
        SourceError: the folder does not exist, or can't be written, or the target is something other than a file.
    """
    target = resolved(target)  # so that a link to a file stays a link
    if target.exists() and not target.is_file():  # a rename would put a file in the place of a device
        raise SourceError(f"{target}: exists and is not a regular file")
    temporary = _beside(target, "tmp")
    try:
        with _named(target, temporary):
            os.close(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
            yield temporary
            _share(temporary, 0o666)
            _flush(temporary)
            temporary.replace(target)
            _flush(target.parent)
    finally:
        with contextlib.suppress(OSError):  # it was renamed, or never made
            temporary.unlink()


@contextlib.contextmanager
def atomic_folder(target: str | Path, *, force: bool = False) -> Iterator[Path]:
    """Gives a temporary folder beside the target, and renames it to the target if the block succeeds.

    Args:
        target: the folder to make; its parents are made too.
        force: replace an existing folder of an earlier model. Nothing else is ever replaced, except an empty folder.

    Raises:
        SourceError: the target exists and may not be replaced, or it can't be written.
    """
    target = resolved(target)  # so that a link to a folder stays a link, and "." has a name and a parent
    with _named(target):
        _check_replaceable(target, force)
        target.parent.mkdir(parents=True, exist_ok=True)
    temporary = _beside(target, "tmp")
    try:
        with _named(target, temporary):
            temporary.mkdir(0o700)
            yield temporary
            _share(temporary, 0o777)
            for path in [*temporary.rglob("*"), temporary]:
                _flush(path)
            _check_replaceable(target, force)  # again: someone else may have made it in the meantime
            _swap(temporary, target)
            _flush(target.parent)
    finally:
        _remove(temporary)


def resolved(target: str | Path) -> Path:
    """The target's path without links. Raises `SourceError` for a name that no file can have."""
    try:
        if b"\0" not in os.fsencode(target):
            return Path(os.path.realpath(target))
        problem = "a name can't hold a null character"
    except UnicodeEncodeError:
        problem = "its name is not text"
    raise SourceError(f"{str(target)!r}: can't be written ({problem})")


def _beside(target: Path, suffix: str) -> Path:
    """A path beside the target that nothing has; chosen before it is made, so that an interruption can't lose it."""
    return target.with_name(f".{target.name}.{secrets.token_hex(8)}.{suffix}")


def _remove(folder: Path) -> None:
    """Removes a folder, in several attempts where something still writes to it."""
    for pause in _PAUSES:
        time.sleep(pause)
        shutil.rmtree(folder, ignore_errors=True)
        if not os.path.lexists(folder):
            return


def _check_replaceable(target: Path, force: bool) -> None:
    """Refuses to replace what is no earlier model or adapter: a configuration, weights, and nothing that none has."""
    if not target.exists():
        return
    if not target.is_dir():
        raise SourceError(f"{target}: exists and is not a folder")
    entries = list(target.iterdir())
    if not entries:
        return
    if not force:
        raise SourceError(
            f"{target}: already exists; choose another folder, or replace it with force=True (or --force)"
        )
    strange = sorted(path.name for path in entries if not _is_of_model(path))
    weights = any(path.name == _ORBAX or path.suffix in (".safetensors", ".bin", ".msgpack") for path in entries)
    configured = any((target / name).exists() for name in ("config.json", "adapter_config.json"))
    if strange or not weights or not configured:
        shown = ", ".join(strange[:_MAX_SHOWN]) + (", ..." if len(strange) > _MAX_SHOWN else "")
        found = f"it holds {shown}" if strange else "it has no config.json beside weights"
        raise SourceError(f"{target}: is not just a model's folder ({found}) and will not be replaced; remove it first")


def _is_of_model(path: Path) -> bool:
    """Whether an entry of a folder is, by its name, a part of a model, and holds nothing else."""
    if not path.is_dir():
        return _FILES.fullmatch(path.name) is not None
    if path.name == _ORBAX:
        return _is_orbax(path)
    if not _MODULE.fullmatch(path.name):
        return False
    return all(each.suffix in _MODULE_FILES and not each.is_dir() for each in path.iterdir())


def _is_orbax(folder: Path) -> bool:
    """Whether a folder holds what Orbax writes for a tree, and nothing else."""
    metadata = folder / "_METADATA"
    inner = (path.relative_to(folder).as_posix() for path in folder.rglob("*"))
    return metadata.is_file() and metadata.stat().st_size > 0 and all(map(_ORBAX_PATHS.fullmatch, inner))


def _swap(temporary: Path, target: Path) -> None:
    """Puts one folder in the place of another; the old one is removed only when the new one stands."""
    if not target.exists():
        temporary.rename(target)
        return
    old = _beside(target, "old")
    try:
        target.rename(old)
        temporary.rename(target)
    except BaseException:  # an interruption too
        with contextlib.suppress(OSError):
            old.rename(target)  # fails where `target` is not gone or stands already, and then there is nothing to do
        raise
    finally:
        if target.exists():
            _remove(old)


def _share(path: Path, mode: int) -> None:
    """Gives a temporary file the permissions that an ordinary new file would have."""
    mask = os.umask(0)
    os.umask(mask)
    path.chmod(mode & ~mask)


def _flush(path: Path) -> None:
    """Flushes a file's or a folder's contents to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _named(target: Path, temporary: Path | None = None) -> Iterator[None]:
    """Makes an OSError one that names the target, not the temporary file, which is gone when it is read."""
    try:
        yield
    except SourceError as problem:  # an OSError that already says what it is about
        raise SourceError(str(problem).replace(str(temporary), str(target))) from None
    except OSError as problem:
        raise SourceError(f"{target}: can't be written ({problem.strerror or problem})") from None
