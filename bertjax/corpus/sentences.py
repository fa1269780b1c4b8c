"""Sentence vectors, quantised where they are computed."""

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

import jax
import numpy as np
import pyarrow as pa

from bertjax import sentence
from bertjax.checks import check_choice
from bertjax.corpus.work import FromPretrained, Placement
from bertjax.embedder import SentenceEncoder
from bertjax.engine import Encoded, Window
from bertjax.errors import ConfigError
from bertjax.flat import jit_model
from bertjax.inputs import known_inputs
from bertjax.packing import PackedBatch, max_segments
from bertjax.prompts import choose_prompt, encode_prompted
from bertjax.quantization import PRECISIONS, calibrate, quantize, quantized_width
from bertjax.sentence import Normalize, SentenceModel
from bertjax.sentence_files import read_spec

VectorType = Literal["float32", "float16", "int8", "binary"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class SentenceVectors(FromPretrained):
    """A vector for each text.

    Args:
        model: a folder, or a repository on the Hub; see `SentenceEncoder.from_pretrained` for `pooling`,
            `max_seq_length`, `dtype`, `tokenizer_normalizer`, `ignore`, `revision` and `local_files_only`. The only
            one that needs no keyword.
        vectors: what numbers become: float32, float16, int8 (256 steps between the least and the greatest number
            that each dimension has in a sample of the corpus) or binary (which are above zero; eight in a byte): the
            "int8" and "ubinary" of sentence-transformers' `quantize_embeddings`.
        prompt, prompt_name, normalize_embeddings, truncate_dim: see `SentenceEncoder.encode`.
    """

    vectors: VectorType = "float32"
    prompt: str | None = None
    prompt_name: str | None = None
    normalize_embeddings: bool = False
    truncate_dim: int | None = None
    pooling: tuple[str, ...] | None = None
    max_seq_length: int | None = None

    text_columns = 1

    def __post_init__(self):
        super().__post_init__()
        check_choice("vectors", self.vectors, list(PRECISIONS))

    def identity(self) -> dict[str, Any]:
        """See `Work`."""
        names = ("vectors", "prompt", "prompt_name", "normalize_embeddings", "truncate_dim", "pooling")
        transformer = read_spec(self.folder(), self.pooling).transformer
        return self.identify("sentence vectors", transformer, *names, "max_seq_length")

    def load(self, devices: Sequence[jax.Device] | None = None) -> "LoadedVectors":
        """See `Work`."""
        placement = Placement.on(devices)
        encoder = SentenceEncoder.from_pretrained(
            self.model,
            pooling=self.pooling,
            max_seq_length=self.max_seq_length,
            **self.load_options(placement),
        )
        return LoadedVectors(encoder, self, placement)


class LoadedVectors:
    """A `Computation` of sentence vectors."""

    def __init__(self, encoder: SentenceEncoder, work: SentenceVectors, placement: Placement):
        spec = encoder.spec
        self._encoder, self._work, self._placement = encoder, work, placement
        self._prompt = choose_prompt(spec.prompts, spec.default_prompt_name, work.prompt_name, work.prompt)
        self._prompt_length = encoder.prompt_length_of(self._prompt)
        self._dim = encoder.output_dimension(work.truncate_dim)
        self._compiled = self._compile("float32" if work.vectors == "int8" else work.vectors)
        self.shapes = encoder.shapes
        self.hidden_size = encoder.model.config.hidden_size
        self.pad_token_id = encoder.tokenizer.pad_token_id

    @property
    def fields(self) -> list[pa.Field]:
        """See `Computation`."""
        stored = pa.from_numpy_dtype(np.dtype(PRECISIONS[self._work.vectors]))
        return [pa.field("embedding", pa.list_(stored, quantized_width(self._dim, self._work.vectors)))]

    def encode(self, items: list[Any], position: int) -> Encoded:
        """See `Computation`."""
        encoder = self._encoder
        return encode_prompted(encoder.tokenizer, encoder.max_seq_length, self._prompt, "texts", items, position)

    def run(self, batch: PackedBatch) -> jax.Array:
        """See `Computation`."""
        segments = max_segments(batch.input_ids.shape[1])
        return self._compiled(self._encoder.model, self._placement.place(batch).inputs(), self._prompt_length, segments)

    def columns(self, window: Window) -> list[pa.Array]:
        """See `Computation`."""
        vectors = window.per_row()
        return [pa.FixedSizeListArray.from_arrays(pa.array(vectors.reshape(-1)), vectors.shape[1])]

    def calibrate(self, windows: Iterable[Window]) -> Any:
        """The least and the greatest number of each dimension, [2, dim], where vectors become int8."""
        if self._work.vectors != "int8":
            return None
        ranges = None
        for window in windows:
            ranges = calibrate(window.per_row(), ranges)
        return [[0.0] * self._dim] * 2 if ranges is None else ranges.tolist()

    def calibrated(self, calibration: Any) -> "LoadedVectors":
        """See `Computation`."""
        if self._work.vectors != "int8":
            return self
        if calibration is None:
            raise ConfigError("int8 vectors go by the ranges of a sample; pass the calibration of a plan")
        loaded = LoadedVectors(self._encoder, self._work, self._placement)
        loaded._compiled = self._compile("int8", np.array(calibration, np.float32))
        return loaded

    def _compile(self, precision: str, ranges: np.ndarray | None = None) -> Callable[..., jax.Array]:
        """A function from inputs to vectors [rows, max_segments, dim] as they are stored; no more leaves the device."""
        dim, normalize = self._dim, Normalize() if self._work.normalize_embeddings else None

        def stored(model: SentenceModel, inputs: dict[str, Any], prompt_length: int, max_segments: int) -> jax.Array:
            vectors = sentence.vectors(model, known_inputs(**inputs), prompt_length, max_segments)[..., :dim]
            return quantize(vectors if normalize is None else normalize(vectors), precision, ranges)

        return jit_model(stored, static_argnames=("max_segments",))
