"""Output that appears whole or not at all: write beside the target, flush, rename."""

import contextlib
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from bertjax.errors import SourceError


@contextlib.contextmanager
def atomic_file(target: str | Path) -> Iterator[Path]:
    """Gives a temporary path in the target's folder, and renames it to the target if the block succeeds.

    Raises:
        SourceError: the folder does not exist, or can't be written, or the target is something other than a file.
    """
    # Resolved, so that a link to a file stays a link.
    target = Path(os.path.realpath(target))
    if target.exists() and not target.is_file():  # a rename would put a file in the place of a device
        raise SourceError(f"{target}: exists and is not a regular file")
    with _named(target):
        handle, name = tempfile.mkstemp(prefix=f".{target.name}.", suffix=".tmp", dir=target.parent)
        os.close(handle)
    temporary = Path(name)
    try:
        with _named(target, temporary):
            yield temporary
            _share(temporary, 0o666)
            _flush(temporary)
            temporary.replace(target)
            _flush(target.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_folder(target: str | Path, *, force: bool = False) -> Iterator[Path]:
    """Gives a temporary folder beside the target, and renames it to the target if the block succeeds.

    Args:
        target: the folder to make; its parents are made too.
        force: replace an existing folder of an earlier model. Nothing else is ever replaced, except an empty folder.

    Raises:
        SourceError: the target exists and may not be replaced, or it can't be written.
    """
    # Resolved, so that a link to a folder stays a link, and "." has a name and a parent.
    target = Path(os.path.realpath(target))
    with _named(target):
        _check_replaceable(target, force)
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".tmp", dir=target.parent))
    try:
        with _named(target, temporary):
            yield temporary
            _share(temporary, 0o777)
            for path in [*temporary.rglob("*"), temporary]:
                _flush(path)
            _check_replaceable(target, force)  # again: someone else may have made it in the meantime
            _swap(temporary, target)
            _flush(target.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _check_replaceable(target: Path, force: bool) -> None:
    """Refuses to replace what is not an earlier model: config.json, weights, and no folders but its modules'."""
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
    names = {path.name for path in entries}
    tree = target / "params" / "_METADATA"  # an Orbax checkpoint's
    strange = sorted(path.name for path in entries if path.is_dir() and not re.match(r"\d_", path.name))
    strange = [name for name in strange if name != "params" or not tree.exists()]
    weights = tree.exists() or any(name.endswith((".safetensors", ".bin", ".msgpack")) for name in names)
    if "config.json" not in names or not weights or strange:
        found = f"it holds {', '.join(strange)}" if strange else "it has no config.json beside weights"
        raise SourceError(f"{target}: is not just a model's folder ({found}) and will not be replaced; remove it first")


def _swap(temporary: Path, target: Path) -> None:
    """Puts one folder in the place of another; the old one is removed only when the new one stands."""
    if not target.exists():
        temporary.rename(target)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".old", dir=target.parent))
    try:
        target.rename(old)
        temporary.rename(target)
    except BaseException:  # an interruption too
        with contextlib.suppress(OSError):
            old.rename(target)  # fails where `target` is not gone or stands already, and then there is nothing to do
        raise
    finally:
        if target.exists():
            shutil.rmtree(old, ignore_errors=True)


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
