"""Text in, vectors out: tokenize, pack, run, unpack, in input order."""

import dataclasses
import functools
import itertools
import logging
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from bertjax.errors import ConfigError, InputError
from bertjax.packing import PackedBatch, Shapes, max_segments, pack
from bertjax.sentence import SentenceModel
from bertjax.sentence_files import SentenceSpec
from bertjax.tokenizer import Tokenizer, Tokens

logger = logging.getLogger(__name__)

# Tokens in one step. On a CPU a step has to be large enough for full-size matmuls and small enough that what passes
# between them stays in the cache; an accelerator wants more work per launch.
_STEP_TOKENS = {"cpu": 2048}
_STEP_TOKENS_ACCELERATOR = 32768
# A window is what is packed together: enough steps that the last, partly filled ones do not matter, and few enough
# texts that memory stays flat on a corpus of any length.
_WINDOW_STEPS = 32
_WINDOW_TEXTS = 65536
_TOKENIZE_TEXTS = 1024


@dataclasses.dataclass(frozen=True)
class EncodedWindow:
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
    vector depends on nothing but the text: neither on its company nor on its place in the call.

    Args:
        model: the computation, from token ids to vectors.
        tokenizer: the tokenizer.
        spec: prompts, lengths and truncation.
        step_tokens: tokens in one step of the device; default: by the kind of device.
    """

    def __init__(
        self, model: SentenceModel, tokenizer: Tokenizer, spec: SentenceSpec, *, step_tokens: int | None = None
    ):
        positions = model.config.max_position_embeddings
        limits = [spec.max_seq_length or tokenizer.model_max_length or positions, positions]
        if tokenizer.vocab_size > model.config.vocab_size:
            raise ConfigError(
                f"{spec.transformer}: the tokenizer has ids up to {tokenizer.vocab_size - 1}, the model's vocabulary "
                f"ends at {model.config.vocab_size - 1}; they do not belong together"
            )
        if step_tokens is not None:
            check_positive("step_tokens", step_tokens)
        special = tokenizer.num_special_tokens(pair=False)
        if min(limits) < special:
            raise ConfigError(
                f"{spec.transformer}: at most {min(limits)} tokens leave no room for the {special} special tokens"
            )
        if limits[0] > positions:
            logger.warning("texts are cut at the model's %d positions, not at %d tokens", positions, limits[0])
        self.model = model
        self.tokenizer = tokenizer
        self.spec = spec
        self._max_seq_length = min(limits)
        self._step_tokens = step_tokens

    @classmethod
    def from_pretrained(cls, path_or_hub_id: str | Path, **options: Any) -> "SentenceEncoder":
        """Loads a sentence-transformers model; see `bertjax.pretrained.load_sentence_encoder`."""
        from bertjax.pretrained import load_sentence_encoder

        return load_sentence_encoder(path_or_hub_id, **options)

    @property
    def max_seq_length(self) -> int:
        """The longest text in tokens; longer ones lose their end. Chosen when the encoder is loaded."""
        return self._max_seq_length

    @functools.cached_property
    def shapes(self) -> Shapes:
        """The shapes that texts are packed into."""
        default = _STEP_TOKENS.get(jax.default_backend(), _STEP_TOKENS_ACCELERATOR)
        return Shapes(max_length=self.max_seq_length, step_tokens=self._step_tokens or default)

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
            return self.encode([texts], show_progress_bar=False, **options)[0]
        total = len(texts) if hasattr(texts, "__len__") else None
        hidden = None if show_progress_bar is None else not show_progress_bar
        vectors = []
        with tqdm(total=total, unit="text", disable=hidden, delay=2.0 if show_progress_bar is None else 0) as bar:
            for window in self.encode_windows(texts, **options):
                vectors.append(window.vectors)
                bar.update(len(window.vectors))
        if not vectors:
            return np.zeros((0, self.output_dimension(truncate_dim)), np.float32)
        return np.concatenate(vectors)

    def encode_windows(
        self,
        texts: Iterable[str],
        *,
        prompt_name: str | None = None,
        prompt: str | None = None,
        normalize_embeddings: bool = False,
        truncate_dim: int | None = None,
    ) -> Iterator[EncodedWindow]:
        """Computes vectors as a stream, for more texts than fit in memory; see `encode` for the arguments.

        The next window is tokenized while the device still works on the last. Where `texts` itself fails, or holds
        something that is not a text, the windows before it are given first and the error is raised then.
        """
        if isinstance(texts, str | bytes) or not isinstance(texts, Iterable):
            raise InputError(f"texts is a {type(texts).__name__}, expected a list or another iterable of str")
        prompt = self._prompt(prompt_name, prompt)
        dim = self.output_dimension(truncate_dim)
        running: list[Any] = []
        try:
            for tokens in self._windows(texts, prompt):
                running.append((tokens, self._start(tokens, prompt)))
                if len(running) > 1:
                    yield _finish(*running.pop(0), dim, normalize_embeddings)
        except Exception:
            for window in running:
                yield _finish(*window, dim, normalize_embeddings)
            raise
        for window in running:
            yield _finish(*window, dim, normalize_embeddings)

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
        """Writes a sentence-transformers folder; see `bertjax.pretrained.save_sentence_encoder`."""
        from bertjax.pretrained import save_sentence_encoder

        save_sentence_encoder(self, folder, **options)

    def _windows(self, texts: Iterable[str], prompt: str) -> Iterator[Tokens]:
        """Tokenizes texts and groups them into windows."""
        budget = _WINDOW_STEPS * self.shapes.step_tokens
        parts: list[Tokens] = []
        position = size = 0
        iterator = iter(texts)
        try:
            while chunk := list(itertools.islice(iterator, _TOKENIZE_TEXTS)):
                parts.append(self._tokenize_chunk(chunk, prompt, position))
                position += len(chunk)
                size += sum(map(len, parts[-1].input_ids))
                if size >= budget or sum(map(len, parts)) >= _WINDOW_TEXTS:
                    yield _join(parts)
                    parts, size = [], 0
        except Exception:
            if parts:
                yield _join(parts)
            raise
        if parts:
            yield _join(parts)

    def _tokenize_chunk(self, texts: list[str], prompt: str, position: int) -> Tokens:
        # What is not a text is passed on as it is, for the tokenizer to refuse with its position.
        prompted = [prompt + text if isinstance(text, str) else text for text in texts] if prompt else texts
        return self.tokenizer(prompted, max_length=self.max_seq_length, first_position=position)

    def _start(self, tokens: Tokens, prompt: str) -> list[tuple[PackedBatch, jax.Array]]:
        """Packs a window and starts its steps; the results are still being computed when this returns."""
        prompt_length = self._prompt_length(prompt)
        batches = pack(tokens.input_ids, tokens.token_type_ids, self.shapes, tokens.pad_token_id)
        return [(batch, self._run(batch, prompt_length)) for batch in batches]

    def _run(self, batch: PackedBatch, prompt_length: int) -> jax.Array:
        return self.model(
            batch.input_ids,
            token_type_ids=batch.token_type_ids,
            position_ids=batch.position_ids,
            segment_ids=batch.segment_ids,
            prompt_length=prompt_length,
            max_segments=max_segments(batch.input_ids.shape[1]),
        )

    def _prompt(self, name: str | None, prompt: str | None) -> str:
        if prompt is not None:
            if not isinstance(prompt, str):
                raise InputError(f"prompt is {prompt!r}, expected a text")
            return prompt
        name = self.spec.default_prompt_name if name is None else name
        if name is None:
            return ""
        if name not in self.spec.prompts:
            known = ", ".join(map(repr, self.spec.prompts)) or "none"
            raise InputError(
                f"prompt_name {name!r} is not one of the model's prompts ({known}); pass prompt= (or --prompt)"
            )
        return self.spec.prompts[name]

    def _prompt_length(self, prompt: str) -> int:
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
        if not isinstance(truncate_dim, int) or not 1 <= truncate_dim <= full:
            raise InputError(f"truncate_dim is {truncate_dim!r}, the vectors have {full} numbers")
        return truncate_dim


def check_positive(name: str, value: Any) -> None:
    """Raises `ConfigError` if a size is not an integer of at least one."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ConfigError(f"{name} is {value!r}, expected a positive integer")


def _join(parts: list[Tokens]) -> Tokens:
    return Tokens(
        input_ids=[ids for part in parts for ids in part.input_ids],
        token_type_ids=[ids for part in parts for ids in part.token_type_ids],
        truncated=np.concatenate([part.truncated for part in parts]),
        pad_token_id=parts[0].pad_token_id,
    )


def _finish(tokens: Tokens, steps: list[tuple[PackedBatch, jax.Array]], dim: int, normalize: bool) -> EncodedWindow:
    """Waits for a window's steps and puts its vectors in input order."""
    vectors = np.empty((len(tokens.input_ids), dim), np.float32)
    for batch, result in steps:
        vectors[batch.items] = np.asarray(result)[batch.rows, batch.segments, :dim]
    if normalize:
        vectors /= np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    return EncodedWindow(
        vectors=vectors,
        tokens=sum(map(len, tokens.input_ids)),
        truncated=tokens.truncated,
        positions=sum(batch.input_ids.size for batch, _ in steps),
    )
