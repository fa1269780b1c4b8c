"""A folder of checkpoints on the disk, which Orbax writes in the background, and which one process has at a time.

    FOLDER/120/state/arrays.safetensors  the arrays
    FOLDER/120/contents/metadata         what they are, and what else is told of them; JSON
    FOLDER/90.damaged                    a checkpoint that could not be read when one before it could
    FOLDER/.lock                         locked by the process that has the folder, until it ends, however it ends

Orbax takes half a second to import, so this module is imported when a folder is opened.
"""

import contextlib
import fcntl
import json
import os
import shutil
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from bertjax.errors import SourceError
from bertjax.json_files import read_json
from bertjax.training import orbax
from bertjax.training.digests import DamagedError

# Folders that Orbax has not finished.
_UNFINISHED = "*.orbax-checkpoint-tmp*"
# Seconds before each attempt to remove a folder that a thread of Orbax may still be writing to.
_PAUSES = (0.0, 0.01, 0.05, 0.2, 0.5)


class Store:
    """A folder of checkpoints. Everything that goes on in it goes through here.

    Args:
        folder: the folder, which is made if need be; what was left unfinished in it is removed.
        stay: of the steps that there are, in order: which are not to be removed.

    Raises:
        SourceError: another process has the folder, or it can't be written.
    """

    def __init__(self, folder: Path, stay: Callable[[Sequence[int]], Sequence[bool]]):
        self.folder = folder
        self._lock = _lock(folder)
        self._quiet = orbax.Quiet()
        try:
            self.sweep()
            self._manager = orbax.manager(folder, stay)
        except BaseException:
            self._let_go()
            raise

    def steps(self) -> list[int]:
        """The steps on the disk in order, of whatever condition; Orbax does not list all that are damaged."""
        return sorted(int(path.name) for path in self.folder.iterdir() if path.name.isdecimal())

    def path(self, step: int) -> Path:
        """The folder of a step."""
        return self.folder / str(step)

    def start(self, step: int, arrays: Mapping[str, jax.Array], contents: Mapping[str, Any]) -> None:
        """Starts to write a checkpoint; returns when the arrays are copied. Raises `SourceError`: why it can't."""
        try:
            self._manager.reload()  # after a failure, Orbax has forgotten what it was going to remove
            self._manager.save(step, args=orbax.items(arrays, _signed(contents)), force=True)
        except Exception as problem:  # SafetensorError is none of the built-in ones
            raise SourceError(_reason(problem)) from None

    def wait(self) -> None:
        """Waits until what was started is written. Raises `SourceError`: why it is not."""
        try:
            self._manager.wait_until_finished()
        except Exception as problem:
            raise SourceError(_reason(problem)) from None

    def contents(self, step: int) -> dict[str, Any]:
        """What was told of a checkpoint. Raises `DamagedError`."""
        path = self.path(step) / orbax.CONTENTS / "metadata"
        try:
            found = read_json(path, DamagedError)
        except SourceError as problem:
            raise DamagedError(str(problem)) from None
        contents = {name: value for name, value in found.items() if name != "crc32"}
        if found.get("crc32") != _signed(contents)["crc32"]:
            raise DamagedError(f"{path}: is not as it was written")
        return contents

    def read(self, step: int, structs: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, jax.Array]:
        """The arrays of a checkpoint, with these shapes and dtypes, and placed so. Raises `DamagedError`."""
        arrays = {}
        try:
            for name, array in orbax.read(self.path(step), structs):
                # Copied, because a step that takes the memory of one device must not write to what others have too.
                arrays[name] = jax.device_put(array, structs[name].sharding, may_alias=False)
        except jax.errors.JaxRuntimeError:  # the devices' trouble, such as want of memory
            raise
        except Exception as problem:
            raise DamagedError(f"{self.path(step)}: can't be read ({_reason(problem)})") from None
        return arrays

    def set_aside(self, step: int) -> None:
        """Takes a checkpoint out of the way of another at its step. Raises `SourceError`."""
        target = self.folder / f"{step}.damaged"
        try:
            if target.exists():
                shutil.rmtree(target)
            self.path(step).rename(target)
        except OSError as problem:
            raise SourceError(f"{target}: can't be made ({_reason(problem)})") from None

    def sweep(self) -> None:
        """Removes what was left unfinished; what can't be removed stays until it is called again."""
        for pause in _PAUSES:
            time.sleep(pause)
            with contextlib.suppress(OSError):
                found = list(self.folder.glob(_UNFINISHED))
                for left in found:
                    shutil.rmtree(left)
                if not found:
                    return

    def close(self) -> None:
        """Lets go of the folder."""
        try:
            self._manager.close()
        finally:
            self._let_go()

    def _let_go(self) -> None:
        self._quiet.close()
        os.close(self._lock)


def _reason(problem: Exception) -> str:
    """Why something failed, in a line."""
    text = getattr(problem, "strerror", None) or str(problem).strip() or type(problem).__name__
    return text.splitlines()[0][:300]


def _signed(contents: Mapping[str, Any]) -> dict[str, Any]:
    """With a check sum of it, so that a description that is damaged is not taken for that of something else."""
    return {**contents, "crc32": zlib.crc32(json.dumps(contents, sort_keys=True).encode())}


def _lock(folder: Path) -> int:
    """Makes a folder and takes it for this process; gives the descriptor of its lock file, which is never removed."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as problem:
        raise SourceError(f"{folder}: can't be written ({_reason(problem)})") from None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as problem:
        os.close(descriptor)
        if isinstance(problem, BlockingIOError):
            raise SourceError(f"{folder}: another run saves its checkpoints here; give another folder") from None
        raise SourceError(f"{folder}: can't be locked ({_reason(problem)})") from None
    return descriptor
