"""How a run's checkpoints go through Orbax: which decides when one is complete, and removes old ones.

Arrays are in a safetensors file. Orbax's own handler of them is not used: where one can't be read or written it goes on
with the others, and they fail aloud in threads after it has returned.
"""

import concurrent.futures
import dataclasses
import json
import logging
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from safetensors.numpy import save_file

#: A checkpoint's two items, as folders in its own.
STATE, CONTENTS = "state", "contents"

_ARRAYS = "arrays.safetensors"


class _ArraysHandler(ocp.AsyncCheckpointHandler):
    """Writes arrays to a file, in a thread; for Orbax."""

    def __init__(self):
        self._executor = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="bertjax-checkpoint")

    async def async_save(self, directory: Path, args: "_SaveArrays") -> list[concurrent.futures.Future]:
        # On a CPU these are no copies: JAX does not give their memory to a step as long as they are there.
        arrays = {name: np.asarray(array, order="C") for name, array in jax.device_get(args.arrays).items()}
        return [self._executor.submit(_write, Path(directory) / _ARRAYS, arrays)]

    def save(self, *args: Any, **options: Any) -> None:
        raise NotImplementedError

    def restore(self, *args: Any, **options: Any) -> None:
        raise NotImplementedError

    def close(self) -> None:
        self._executor.shutdown()


@ocp.args.register_with_handler(_ArraysHandler, for_save=True, for_restore=True)
@dataclasses.dataclass
class _SaveArrays(ocp.args.CheckpointArgs):
    arrays: dict[str, jax.Array]


def items(arrays: Mapping[str, jax.Array], contents: Mapping[str, Any]) -> ocp.args.Composite:
    """What Orbax is given to save."""
    return ocp.args.Composite(**{STATE: _SaveArrays(dict(arrays)), CONTENTS: ocp.args.JsonSave(dict(contents))})


def _write(path: Path, arrays: dict[str, np.ndarray]) -> None:
    save_file(arrays, path)
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def read(checkpoint: Path, structs: Mapping[str, jax.ShapeDtypeStruct]) -> Iterator[tuple[str, np.ndarray]]:
    """The arrays in a checkpoint's folder, of these shapes and dtypes. Raises whatever goes wrong.

    The file is read, and not mapped as the safetensors library does it: a disk that fails ends a process that maps.
    """
    with open(checkpoint / STATE / _ARRAYS, "rb") as file:
        # The format is a length, a JSON header, then the tensors' bytes (huggingface/safetensors, "Format").
        size = int.from_bytes(file.read(8), "little")
        if size > os.fstat(file.fileno()).st_size:
            raise ValueError("the header is cut short")
        header = json.loads(file.read(size))
        for name, struct in structs.items():
            data = np.empty(math.prod(struct.shape) * struct.dtype.itemsize, np.uint8)
            file.seek(8 + size + header[name]["data_offsets"][0])
            if file.readinto(data) != data.size:
                raise ValueError(f"{name!r} is cut short")
            yield name, data.view(struct.dtype).reshape(struct.shape)


@dataclasses.dataclass
class _Policy:
    """Orbax's PreservationPolicy."""

    stay: Callable[[Sequence[int]], Sequence[bool]]

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> Sequence[bool]:
        return self.stay([each.step for each in checkpoints])


def manager(folder: Path, stay: Callable[[Sequence[int]], Sequence[bool]]) -> ocp.CheckpointManager:
    """Orbax's manager of a folder; `stay` says which of the steps, in order, are not to be removed."""
    registry = ocp.handlers.DefaultCheckpointHandlerRegistry()
    registry.add(STATE, _SaveArrays, _ArraysHandler())
    registry.add(CONTENTS, ocp.args.JsonSave, ocp.JsonCheckpointHandler())
    options = ocp.CheckpointManagerOptions(
        preservation_policy=_Policy(stay),
        save_root_metadata=False,
        # Where a folder can't be made in the background, the threads that wait for it do so for twenty minutes.
        async_options=ocp.AsyncOptions(create_directories_asynchronously=False),
    )
    return ocp.CheckpointManager(folder, options=options, handler_registry=registry)


class Quiet(logging.Filter):
    """Keeps Orbax from logging, which it does through absl, in threads too: what matters in it is raised as well."""

    def __init__(self):
        super().__init__()
        logging.getLogger("absl").addFilter(self)

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether a record is not Orbax's."""
        return f"{os.sep}orbax{os.sep}" not in record.pathname

    def close(self) -> None:
        """Lets it log again."""
        logging.getLogger("absl").removeFilter(self)
