"""The folder that an encoder is exported to."""

import contextlib
import importlib.util
import json
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jaxlib
import numpy as np
import tokenizers

from bertjax import __version__
from bertjax.atomic import atomic_folder, resolved
from bertjax.checks import check_choice, check_count
from bertjax.convert.files import write_safetensors
from bertjax.convert.tensors import TensorToWrite
from bertjax.embedder import SentenceEncoder
from bertjax.errors import InputError, SourceError
from bertjax.export.program import trace
from bertjax.pretrained import to_dtype
from bertjax.quantization import PRECISIONS, check_ranges, quantized_width

# The loader; it is copied as it stands, and imports nothing of bertjax.
_LOADER = Path(__file__).with_name("load.py")
# The shortest row that is padded to by default; of the longer ones, each is twice as long.
_SHORTEST = 32


def export_encoder(encoder: SentenceEncoder, folder: str | Path, **options: Any) -> dict[str, Any]:
    """Writes an encoder to a folder as a program that needs JAX and neither Flax nor bertjax; see `bertjax.export`.

    JAX runs it with releases up to six months newer than the jaxlib that exported it, and up to three weeks older.

    Args:
        encoder: the encoder. The program has its precision, and XLA's attention whatever the encoder has.
        folder: the folder to make; it appears complete or not at all.
        **options: see `write_export`.

    Returns:
        What config.json says.

    Raises:
        SourceError: the folder exists already, or can't be written; or flatbuffers is not installed.
        InputError, CheckpointError: see `write_export`.
    """
    with export_folder(folder) as temporary:
        return write_export(encoder, temporary, **options)


@contextlib.contextmanager
def export_folder(folder: str | Path) -> Iterator[Path]:
    """Gives a temporary folder, and renames it to `folder` if the block succeeds; see `export_encoder` for the errors.

    It can be entered before the encoder is loaded, so that what can't be written is refused first.
    """
    target = resolved(folder)
    if importlib.util.find_spec("flatbuffers") is None:
        raise SourceError(f"{target}: can't be written without the package flatbuffers; pip install flatbuffers")
    if _is_taken(target):
        raise SourceError(f"{target}: already exists; choose another folder, or remove it first")
    with atomic_folder(target) as temporary:
        yield temporary


def _is_taken(target: Path) -> bool:
    """Whether a folder has something in it; one that can't be looked into is left to `atomic_folder` to refuse."""
    try:
        return target.is_dir() and any(target.iterdir())
    except OSError:
        return False


def write_export(
    encoder: SentenceEncoder,
    folder: Path,
    *,
    lengths: Sequence[int] | None = None,
    normalize: bool = False,
    truncate_dim: int | None = None,
    precision: str = "float32",
    ranges: np.ndarray | None = None,
) -> dict[str, Any]:
    """Writes an encoder's program and what belongs to it into a folder that is there, and empty.

    Args:
        encoder: the encoder.
        folder: the folder.
        lengths: what rows of tokens are padded to; texts are cut at the longest. Default: 32, 64, 128, ... up to where
            the encoder cuts them.
        normalize: scale the vectors to unit length, after any truncation.
        truncate_dim: keep only that many leading numbers; default: the model's own setting.
        precision: "float32", "float16", "int8" or "binary", which is packed bits; see `bertjax.quantization`.
        ranges: for "int8", and only there: float [2, dim], what `bertjax.quantization.calibrate` returns for vectors
            that are normalised and truncated alike.

    Returns:
        What config.json says.

    Raises:
        InputError: a length, size, precision or range is not usable.
        CheckpointError: a parameter is NaN or infinite.
        SourceError: something can't be written.
    """
    lengths = _check_lengths(encoder, lengths)
    dim = encoder.output_dimension(truncate_dim)
    check_choice("precision", precision, tuple(PRECISIONS))
    if ranges is not None:
        ranges = check_ranges(ranges, dim)
    options = {"max_length": lengths[-1], "normalize": normalize, "precision": precision}
    program, weights = trace(encoder.model, dim=dim, ranges=ranges, **options)
    (folder / "encoder.jax_export").write_bytes(program.serialize())
    write_safetensors(folder / "weights.safetensors", [_tensor(name, weights[name]) for name in weights], {})
    if ranges is not None:
        np.save(folder / "ranges.npy", ranges)
    _write_tokenizer(encoder, folder, lengths[-1])
    shutil.copyfile(_LOADER, folder / _LOADER.name)
    config = {
        **options,
        "lengths": lengths,
        "dimension": dim,
        "output_dtype": np.dtype(PRECISIONS[precision]).name,
        "output_width": quantized_width(dim, precision),
        "compute_dtype": np.dtype(encoder.model.bert.encoder.dtype).name,
        "pad_token_id": encoder.tokenizer.pad_token_id,
        **_prompts(encoder),
        "platforms": list(program.platforms),
        "calling_convention_version": program.calling_convention_version,
        "versions": {"bertjax": __version__, "jax": jax.__version__, "jaxlib": jaxlib.__version__},
    }
    text = json.dumps(config, indent=2, ensure_ascii=False)
    (folder / "config.json").write_text(text + "\n", encoding="utf-8")
    return config


def _check_lengths(encoder: SentenceEncoder, lengths: Sequence[int] | None) -> list[int]:
    """The lengths in ascending order, each once."""
    if lengths is None:
        longest = encoder.max_seq_length
        return [*(_SHORTEST << i for i in range(longest.bit_length()) if _SHORTEST << i < longest), longest]
    if isinstance(lengths, str) or not isinstance(lengths, Sequence) or not lengths:
        raise InputError(f"lengths are {lengths!r}, expected at least one number of tokens, in a list")
    counts = sorted({check_count(f"lengths[{place}]", length) for place, length in enumerate(lengths)})
    positions = encoder.model.config.max_position_embeddings
    if counts[-1] > positions:
        raise InputError(f"lengths: {counts[-1]} tokens are more than the model's {positions} positions")
    special = encoder.tokenizer.num_special_tokens(pair=False)
    if counts[0] < special:
        raise InputError(f"lengths: {counts[0]} tokens leave no room for the {special} special tokens")
    return counts


def _tensor(name: str, array: jax.Array) -> TensorToWrite:
    return TensorToWrite(name, np.dtype(array.dtype), array.shape, lambda: to_dtype((name,), np.asarray(array), None))


def _write_tokenizer(encoder: SentenceEncoder, folder: Path, max_length: int) -> None:
    """Writes the tokenizer's files; in tokenizer.json, texts are cut at `max_length`."""
    encoder.tokenizer.save_pretrained(folder)
    side = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))["truncation_side"]
    backend = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    backend.enable_truncation(max_length, direction=side)
    backend.save(str(folder / "tokenizer.json"))


def _prompts(encoder: SentenceEncoder) -> dict[str, Any]:
    """The prompts, each with how many tokens it takes at the head of a text if these are left out of the pooling."""
    prompts = {"": "", **encoder.spec.prompts}
    return {
        "prompts": {
            name: {"text": text, "tokens": encoder.prompt_length_of(text)} for name, text in sorted(prompts.items())
        },
        "default_prompt_name": encoder.spec.default_prompt_name or "",
    }
