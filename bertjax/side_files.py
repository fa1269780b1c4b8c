"""What stands beside the encoder's weights in a model's folder: the tokenizer, the sentence-transformers modules."""

import json
import os
import shutil
from pathlib import Path

from bertjax.convert import bert, files, sources
from bertjax.convert.tensors import inside
from bertjax.errors import CheckpointError, ConfigError
from bertjax.folders import find
from bertjax.json_files import read_file, read_json
from bertjax.sentence_files import SentenceSpec
from bertjax.specs import read_any_spec

#: Beside the encoder, wherever that is.
_TOKENIZER = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.txt",
    "sentence_*_config.json",
)
# At the top; folders only where no modules.json names them.
_SETTINGS = "config_sentence_transformers.json"
_UNNAMED_MODULES = "[1-9]*_*/*.json"

# The largest are the tokenizers of many languages, 20 MB or less.
_MAX_BYTES = 1 << 27


def encoder_folder(folder: Path) -> Path:
    """The folder that holds the encoder: the one that modules.json names or, where there is none, this one.

    Raises:
        SourceError, ConfigError: see `specs.read_any_spec`.
    """
    return read_any_spec(folder).transformer if find(folder, "modules.json") else folder


def copy_side_files(source: Path, encoder: Path, target: Path) -> None:
    """Copies the files, byte for byte but for two: the encoder moves to the top, and Dense weights become safetensors.

    The modules are left out where they belong to another encoder than this one.

    Args:
        source: the model's folder.
        encoder: the folder in it that holds the encoder; see `encoder_folder`.
        target: the folder that the encoder was written to.

    Raises:
        SourceError: a file can't be read or written, or is a link out of the model's folder.
        ConfigError: modules.json, or a file that it needs, is malformed or names something that is not known.
        CheckpointError: a module's weights are damaged.
    """
    _copy(encoder, _TOKENIZER, target)
    if find(source, "modules.json") is None:
        _copy(source, (_SETTINGS, _UNNAMED_MODULES), target)
        return
    spec = read_any_spec(source)
    if os.path.realpath(spec.transformer) != os.path.realpath(encoder):
        return
    _copy(source, (_SETTINGS,), target)
    _copy_modules(source, encoder, target)
    for dense in spec.modules if isinstance(spec, SentenceSpec) else ():
        if dense is not None:
            _write_weights(dense.folder, target / dense.folder.relative_to(source))


def _copy_modules(source: Path, encoder: Path, target: Path) -> None:
    """Copies modules.json and the settings of the modules that it names, around an encoder that stands at the top."""
    modules = read_json(inside(source, "modules.json"), ConfigError, list)
    for module in modules[1:]:
        path = Path(module["path"])
        if path == Path():
            problem = f"module {module['type']!r} stands at the top, where the encoder goes"
            raise ConfigError(f"{source / 'modules.json'}: {problem}; give it a folder of its own")
        for file in sorted((source / path).glob("*.json")):
            if not file.name.endswith(".index.json"):  # of weights, which are written as one file
                _copy_file(source, path / file.name, target)
    if encoder == source:
        _copy_file(source, Path("modules.json"), target)
        return
    moved = [modules[0] | {"path": ""}, *modules[1:]]
    (target / "modules.json").write_text(json.dumps(moved, indent=2) + "\n", encoding="utf-8")


def _copy(source: Path, patterns: tuple[str, ...], target: Path) -> None:
    for pattern in patterns:
        found = sorted(source.glob(pattern)) if "*" in pattern else [find(source, pattern)]
        for path in found:
            if path is not None:
                _copy_file(source, path.relative_to(source), target)


def _copy_file(source: Path, name: Path, target: Path) -> None:
    data = read_file(inside(source, name), _MAX_BYTES, CheckpointError)
    (target / name).parent.mkdir(parents=True, exist_ok=True)
    (target / name).write_bytes(data)


def _write_weights(source: Path, target: Path) -> None:
    """Writes a module's weights as one file of safetensors, under the same names."""
    weights = sources.open_weights(source)
    target.mkdir(parents=True, exist_ok=True)
    if weights.files == (files.SINGLE_FILE,) and weights.index is None:
        shutil.copyfile(inside(source, files.SINGLE_FILE), target / files.SINGLE_FILE)
        return
    tensors = [bert.copied(name, info, None) for name, info in weights.tensors.items()]
    files.write_safetensors(target / files.SINGLE_FILE, tensors, {"format": "pt"})
