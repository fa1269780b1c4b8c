"""What a job computes of its rows.

A `Work` is a description: small, picklable, sent to whoever is to do it. Loaded, it is a `Computation`. Sentence
vectors (`bertjax.corpus.sentences`) are the first; whatever maps a text, or several, to some columns can be another.
"""

import dataclasses
import hashlib
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

import jax
import numpy as np
import pyarrow as pa
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from bertjax import hub
from bertjax.convert.sources import open_weights
from bertjax.engine import Encoded, Window
from bertjax.packing import PackedBatch, Shapes


class Computation(Protocol):
    """Work that is loaded.

    Attributes:
        fields: the columns that it makes.
        shapes: the shapes that it would pack into by itself; they say its longest row, and how much is a step.
        hidden_size: the model's; with it, how much longer rows cost.
        pad_token_id: what rows are padded with.
    """

    fields: list[pa.Field]
    shapes: Shapes
    hidden_size: int
    pad_token_id: int

    def encode(self, items: list[Any], position: int) -> Encoded:
        """Makes rows of tokens of some items; raises `InputError` or `TokenizerError` for one that it can't take."""

    def run(self, batch: PackedBatch) -> Any:
        """Starts the computation on a packed batch."""

    def columns(self, window: Window) -> list[pa.Array]:
        """The columns of a computed window, a value for each of its items."""

    def calibrate(self, windows: Iterable[Window]) -> Any:
        """What has to be known of the corpus before, by a sample, which is computed as it is taken; JSON, or None."""

    def calibrated(self, calibration: Any) -> "Computation":
        """The computation that goes by what `calibrate` found."""


class Work(Protocol):
    """What is to be computed; picklable.

    Attributes:
        text_columns: how many columns of text it reads.
    """

    text_columns: int

    def identity(self) -> dict[str, Any]:
        """Everything that decides the results, by names that a message can use; JSON."""

    def load(self, devices: Sequence[jax.Device] | None = None) -> Computation:
        """Loads the model, onto these devices; default: all there are."""


@dataclasses.dataclass(frozen=True)
class Placement:
    """Where arrays go: parameters to every device, the rows of a step to each its part.

    Args:
        devices: the devices, one or more.
    """

    devices: tuple[jax.Device, ...]

    @classmethod
    def on(cls, devices: Sequence[jax.Device] | None) -> "Placement":
        """A placement on these devices; default: all of this process's."""
        return cls(tuple(devices or jax.local_devices()))

    @property
    def parameters(self) -> jax.sharding.Sharding | jax.Device:
        """For `sharding=` of whatever loads a model."""
        return self.devices[0] if len(self.devices) == 1 else NamedSharding(self._mesh, PartitionSpec())

    @property
    def _mesh(self) -> Mesh:
        return Mesh(np.array(self.devices), ("data",))

    def place(self, batch: PackedBatch) -> PackedBatch:
        """A packed batch whose arrays are on the devices; rows that can't be divided evenly are on every one."""
        if len(self.devices) == 1:
            return batch
        divided = len(batch.input_ids) % len(self.devices) == 0
        where = NamedSharding(self._mesh, PartitionSpec("data") if divided else PartitionSpec())
        return dataclasses.replace(batch, **jax.device_put(batch.inputs(), where))


@dataclasses.dataclass(frozen=True)
class FromPretrained:
    """The arguments of whatever loads a model, which all works have; see `bertjax.pretrained_text.load_task`.

    Args:
        model: a folder, or a repository on the Hub.
        dtype, tokenizer_normalizer, ignore, revision, local_files_only: as everywhere.
    """

    model: str
    _: dataclasses.KW_ONLY
    dtype: str = "float32"
    tokenizer_normalizer: str | None = None
    ignore: tuple[str, ...] = ()
    revision: str | None = None
    local_files_only: bool = False

    def __post_init__(self):
        path = os.path.abspath(os.path.expanduser(self.model))
        # Whoever works on it may have another working directory.
        object.__setattr__(self, "model", path if os.path.exists(path) else os.fspath(self.model))

    def folder(self) -> Path:
        """The model's files. Raises `SourceError` if there are none."""
        return hub.resolve(self.model, revision=self.revision, local_files_only=self.local_files_only)

    def load_options(self, placement: Placement) -> dict[str, Any]:
        """What to load the model with, apart from its name."""
        names = ("dtype", "tokenizer_normalizer", "ignore", "revision", "local_files_only")
        return {name: getattr(self, name) for name in names} | {"sharding": placement.parameters}

    def identify(self, kind: str, transformer: Path, *names: str) -> dict[str, Any]:
        """What tells this work from others: its kind, the model's files, and these fields.

        Args:
            kind: what the work is called.
            transformer: the folder that holds the encoder.
            names: the fields, apart from those that all works have.
        """
        fields = {name: getattr(self, name) for name in (*names, "dtype", "tokenizer_normalizer")}
        return {"work": kind, "model": digest_of_model(self.folder(), transformer), **fields}


def digest_of_model(folder: Path, transformer: Path) -> str:
    """SHA-256 over the files of a model: its weights and every small file that may say how they are used.

    Args:
        folder: the model's folder.
        transformer: the folder in it that holds the encoder.
    """
    weights = open_weights(transformer)
    files = {weights.folder / name for name in weights.files}
    for parent in {folder, transformer, *(path for path in folder.iterdir() if path.is_dir())}:
        files |= {path for path in parent.iterdir() if path.suffix in (".json", ".txt") and path.is_file()}
        if parent not in (folder, transformer):  # a Dense module
            files |= {path for name in ("model.safetensors", "pytorch_model.bin") if (path := parent / name).is_file()}
    whole = hashlib.sha256()
    for path in sorted(files):
        with open(path, "rb") as file:
            whole.update(f"{path.relative_to(folder)}\n{hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    return whole.hexdigest()
