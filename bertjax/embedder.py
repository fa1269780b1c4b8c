"""Text in, vectors out: tokenize, pack, run, unpack, in input order."""

import dataclasses
import functools
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from bertjax.checks import as_integer
from bertjax.engine import Engine, Window, progress_bar
from bertjax.errors import InputError
from bertjax.flat import jit_model
from bertjax.inputs import known_inputs
from bertjax.packing import PackedBatch, Shapes, max_segments
from bertjax.prompts import choose_prompt, encode_prompted
from bertjax.sentence import SentenceModel, vectors
from bertjax.sentence_files import SentenceSpec
from bertjax.similarity import similarity
from bertjax.text_inputs import check_iterable
from bertjax.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class EncodedBatch:
    """The vectors of some consecutive texts.

    Attributes:
        vectors: float32 [texts, dim], in input order.
        tokens: how many tokens the texts have, special tokens included.
        truncated: bool [texts]; which texts were longer than the model takes, and lost their end.
        positions: how many positions were computed, padding included; `tokens / positions` is the fill.
    """

    vectors: np.ndarray
    tokens: int
    truncated: np.ndarray
    positions: int


class SentenceEncoder:
    """A sentence-transformers model: tokenizer, encoder, pooling and what follows it.

    Texts of any lengths are packed into a few fixed shapes, so that a corpus compiles a handful of times. A text's
    vector depends on nothing but the text: neither on its company nor on its place in the call, but for rounding, which
    is another one in another shape: within 1e-6 in float32, but more than that in shorter dtypes.

    Args:
        model: the computation, from token ids to vectors.
        tokenizer: the tokenizer.
        spec: prompts, lengths and truncation.
        step_tokens: tokens in one step of the device; default: by the kind of device.
    """

    def __init__(
        self, model: SentenceModel, tokenizer: Tokenizer, spec: SentenceSpec, *, step_tokens: int | None = None
    ):
        self._engine = Engine(
            model.config, tokenizer, max_length=spec.max_seq_length, step_tokens=step_tokens, source=spec.transformer
        )
        self.model = model
        self.tokenizer = tokenizer
        self.spec = spec

    @classmethod
    def from_pretrained(cls, path_or_hub_id: str | Path, **options: Any) -> "SentenceEncoder":
        """Loads a sentence-transformers model; see `bertjax.pretrained_text.load_sentence_encoder`."""
        from bertjax.pretrained_text import load_sentence_encoder

        return load_sentence_encoder(path_or_hub_id, **options)

    @property
    def max_seq_length(self) -> int:
        """The longest text in tokens; longer ones lose their end. Chosen when the encoder is loaded."""
        return self._engine.max_length

    @property
    def shapes(self) -> Shapes:
        """The shapes that texts are packed into."""
        return self._engine.shapes

    def warm_up(self) -> float:
        """Compiles everything that `encode` will run, in all of `shapes`, for a server that must not wait for it later.

        Without it each shape is compiled when it first comes up.

        Returns:
            How long it took, in seconds.
        """
        return self._engine.warm_up(functools.partial(self._run, 0))

    def encode(
        self,
        texts: str | Iterable[str],
        *,
        prompt_name: str | None = None,
        prompt: str | None = None,
        normalize_embeddings: bool = False,
        truncate_dim: int | None = None,
        show_progress_bar: bool | None = None,
    ) -> np.ndarray:
        """Computes the vectors of texts.

        Args:
            texts: texts: a list, a generator, or a single text. The empty text is a text.
            prompt_name: name of one of the model's prompts, put before every text.
            prompt: a prompt of your own, put before every text; it wins over `prompt_name`.
            normalize_embeddings: scale the vectors to unit length, after any truncation.
            truncate_dim: keep only that many leading numbers; default: the model's own setting.
            show_progress_bar: default: on a terminal, when it takes more than two seconds.

        Returns:
            float32 [texts, dim], in input order; [dim] for a single text.

        Raises:
            InputError: something in `texts` is not a text, with its position; or a prompt or size is not usable.
        """
        options = {
            "prompt_name": prompt_name,
            "prompt": prompt,
            "normalize_embeddings": normalize_embeddings,
            "truncate_dim": truncate_dim,
        }
        if isinstance(texts, str):
            return next(self.encode_stream([texts], **options)).vectors[0]
        vectors = []
        with progress_bar(texts, "text", show_progress_bar) as bar:
            for window in self.encode_stream(texts, **options):
                vectors.append(window.vectors)
                bar.update(len(window.vectors))
        if not vectors:
            return np.zeros((0, self.output_dimension(truncate_dim)), np.float32)
        return np.concatenate(vectors)

    def encode_query(self, texts: str | Iterable[str], **options: Any) -> np.ndarray:
        """`encode` with the model's prompt "query", unless another one is asked for."""
        return self.encode(texts, **_with_prompt("query", options))

    def encode_document(self, texts: str | Iterable[str], **options: Any) -> np.ndarray:
        """`encode` with the model's prompt "document", unless another one is asked for."""
        return self.encode(texts, **_with_prompt("document", options))

    def similarity(self, first: np.ndarray, second: np.ndarray) -> np.ndarray:
        """How near vectors are, by the function that the model was trained for; see `bertjax.similarity.similarity`."""
        return similarity(self.spec.similarity_fn_name, first, second)

    def encode_stream(
        self,
        texts: Iterable[str],
        *,
        prompt_name: str | None = None,
        prompt: str | None = None,
        normalize_embeddings: bool = False,
        truncate_dim: int | None = None,
    ) -> Iterator[EncodedBatch]:
        """Computes vectors as a stream, for more texts than fit in memory; see `encode` for the arguments.

        Where `texts` itself fails, or holds something that is not a text, the batches before it are given first and the
        error is raised then.
        """
        check_iterable("texts", texts)
        prompt = choose_prompt(self.spec.prompts, self.spec.default_prompt_name, prompt_name, prompt)
        dim = self.output_dimension(truncate_dim)
        prompt_length = self.prompt_length_of(prompt)
        encode = functools.partial(encode_prompted, self.tokenizer, self.max_seq_length, prompt, "texts")
        for window in self._engine.windows(texts, encode, functools.partial(self._run, prompt_length)):
            yield _finish(window, dim, normalize_embeddings)

    def tokenize(self, texts: Iterable[str], *, length: int | None = None) -> dict[str, np.ndarray]:
        """Tokenizes texts for `self.model`, a text a row; no prompt is added.

        Args:
            texts: a list or another iterable of texts; not a single text.
            length: length of the rows; default: that of the longest text.

        Returns:
            input_ids, attention_mask and token_type_ids, each int32 [texts, length].
        """
        return self.tokenizer(texts, max_length=self.max_seq_length).padded(length)

    def save_pretrained(self, folder: str | Path, **options: Any) -> None:
        """Writes a sentence-transformers folder; see `bertjax.pretrained_text.save_sentence_encoder`."""
        from bertjax.pretrained_text import save_sentence_encoder

        save_sentence_encoder(self, folder, **options)

    def _run(self, prompt_length: int, batch: PackedBatch) -> jax.Array:
        segments = max_segments(batch.input_ids.shape[1])
        tokens = np.stack([*batch.inputs().values()])  # a device is sent one array sooner than four
        return _vectors(self.model, tokens, prompt_length, segments)

    def prompt_length_of(self, prompt: str) -> int:
        """How many tokens a prompt takes at the head of a text: all but a closing special token."""
        if not prompt or self.spec.include_prompt:
            return 0
        encoding = self.tokenizer.backend.encode(prompt)
        return len(encoding.ids) - encoding.special_tokens_mask[-1]

    def output_dimension(self, truncate_dim: int | None = None) -> int:
        """Length of the vectors that `encode` returns. Raises `InputError` if they can't be cut to `truncate_dim`."""
        full = self.model.embedding_dimension
        if truncate_dim is None:
            return min(self.spec.truncate_dim or full, full)
        number = as_integer(truncate_dim)
        if number is None or not 1 <= number <= full:
            raise InputError(f"truncate_dim is {truncate_dim!r}, the vectors have {full} numbers")
        return number


@functools.partial(jit_model, static_argnames=("max_segments",))
def _vectors(model: SentenceModel, tokens: jax.Array, prompt_length: int, max_segments: int) -> jax.Array:
    """Vectors, float32 [rows, max_segments, dim], of what `PackedBatch.inputs` gives: int32 [4, rows, length]."""
    input_ids, types, positions, segments = tokens
    inputs = known_inputs(input_ids=input_ids, token_type_ids=types, position_ids=positions, segment_ids=segments)
    return vectors(model, inputs, prompt_length, max_segments)


def _with_prompt(name: str, options: dict[str, Any]) -> dict[str, Any]:
    """Options of a call with the name of a prompt, where they have none."""
    asked = any(options.get(each) is not None for each in ("prompt_name", "prompt"))
    return options if asked else {**options, "prompt_name": name}


def _finish(window: Window, dim: int, normalize: bool) -> EncodedBatch:
    """Waits for a window's steps and takes its vectors."""
    vectors = window.per_row()[:, :dim]
    if normalize:
        vectors = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    return EncodedBatch(
        vectors=vectors,
        tokens=window.num_tokens,
        truncated=window.encoded.tokens.truncated,
        positions=window.num_positions,
    )
