"""What stands beside the encoder's weights in a model's folder: the tokenizer, the sentence-transformers modules."""

import json
from pathlib import Path

from bertjax.convert import bert, files, sources
from bertjax.convert.tensors import inside
from bertjax.errors import CheckpointError, ConfigError
from bertjax.json_files import read_file, read_json
from bertjax.sentence_files import read_spec

#: Beside the encoder, wherever that is.
_TOKENIZER = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.txt",
    "sentence_*_config.json",
)
#: At the top.
_MODULES = ("config_sentence_transformers.json", "[1-9]*_*/*.json", "[1-9]*_*/model.safetensors")

# The largest are a Dense module's weights and the tokenizers of many languages, 20 MB or less.
_MAX_BYTES = 1 << 27


def encoder_folder(folder: Path) -> Path:
    """The folder that holds the encoder: this one or, in a sentence-transformers folder of old, its first module's.

    Raises:
        SourceError, ConfigError: see `sentence_files.read_spec`.
    """
    at_top = any((folder / name).exists() for name in ("config.json", "bert_config.json"))
    return folder if at_top or not (folder / "modules.json").exists() else read_spec(folder).transformer


def copy_side_files(source: Path, encoder: Path, target: Path) -> None:
    """Copies the files, byte for byte but for two: the encoder moves to the top, and Dense weights become safetensors.

    Args:
        source: the model's folder.
        encoder: the folder in it that holds the encoder; see `encoder_folder`.
        target: the folder that the encoder was written to.

    Raises:
        SourceError: a file can't be read or written, or is a link out of the model's folder.
        CheckpointError: a module's weights are damaged.
    """
    _copy(encoder, _TOKENIZER, target)
    _copy(source, _MODULES, target)
    for pickle in sorted(source.glob("[1-9]*_*/pytorch_model.bin")):
        name = pickle.relative_to(source).parent
        if not (target / name / files.SINGLE_FILE).exists():
            _write_module(inside(source, name), target / name)
    if encoder == source:
        _copy(source, ("modules.json",), target)
        return
    modules = read_json(inside(source, "modules.json"), ConfigError, list)
    moved = [module | {"path": ""} if source / module["path"] == encoder else module for module in modules]
    (target / "modules.json").write_text(json.dumps(moved, indent=2) + "\n", encoding="utf-8")


def _copy(source: Path, patterns: tuple[str, ...], target: Path) -> None:
    for pattern in patterns:
        for path in sorted(source.glob(pattern)):
            name = path.relative_to(source)
            data = read_file(inside(source, name), _MAX_BYTES, CheckpointError)
            (target / name).parent.mkdir(exist_ok=True)
            (target / name).write_bytes(data)


def _write_module(source: Path, target: Path) -> None:
    """Writes a module's weights, a pickle, as safetensors under the same names."""
    tensors = [bert.copied(name, info, None) for name, info in sources.open_weights(source).tensors.items()]
    target.mkdir(exist_ok=True)
    files.write_safetensors(target / files.SINGLE_FILE, tensors, {"format": "pt"})
