"""What the folders of sentence-transformers have in common, read without importing what they name.

`modules.json` lists modules by Python class path. sentence-transformers imports them; here a table of names says what
each one is, and anything else is refused.
"""

import reprlib
from collections.abc import Mapping
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from bertjax.checks import check_choice
from bertjax.convert.tensors import inside
from bertjax.errors import ConfigError
from bertjax.folders import find
from bertjax.json_files import read_json
from bertjax.similarity import SIMILARITIES

# The transformer module's own settings; the name used to depend on the architecture.
_SETTINGS_FILES = tuple(
    f"sentence_{name}_config.json"
    for name in ("bert", "roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet")
)

# Settings of the transformer module, with the values that leave its output as it is. The rest would change the
# tokens, the weights or the output. What a library merely loads by (`trust_remote_code`) is left aside.
PLAIN_SETTINGS: Mapping[str, tuple[Any, ...]] = {
    "transformer_task": (None, "feature-extraction"),
    "module_output_name": (None, "token_embeddings"),
    "modality_config": (None, {"text": {"method": "forward", "method_output_name": "last_hidden_state"}}),
    "tokenizer_name_or_path": (None,),
    "query_length": (None,),
    "document_length": (None,),
    "query_expansion": (None,),
    "processing_kwargs": (None, {}),
    **{
        f"{what}_{kind}": (None, {}, {"trust_remote_code": True}, {"trust_remote_code": False})
        for what in ("model", "tokenizer", "processor", "config")
        for kind in ("args", "kwargs")
    },
}
_OTHER_SETTINGS = {"max_seq_length", "do_lower_case", "unpad_inputs"}

#: Names of prompts that every model has in sentence-transformers, where the folder gives them no text.
DEFAULT_PROMPTS: Mapping[str, str] = {"query": "", "document": ""}

# Far above any that was ever published.
_MAX_FEATURES = 1 << 20
_MAX_NAME_BYTES = 255

# How values are shown in messages: cut to a length that fits, and never too deep to be shown.
_repr = reprlib.Repr()
_repr.maxstring = 100
show = _repr.repr


def read_modules(folder: Path, types: Mapping[str, str]) -> list[tuple[str, str]]:
    """The kind and the folder of every module in modules.json, each folder inside the model's.

    Args:
        folder: the model's folder.
        types: the kind of each class path that is known.

    Raises:
        SourceError: a module's folder is a link out of the model's; or modules.json can't be read.
        ConfigError: modules.json is malformed or names something else.
    """
    file = folder / "modules.json"
    modules = []
    for name, path in _entries(file):
        if not isinstance(name, str) or name not in types:
            raise ConfigError(f"{file}: module type {show(name)} is not supported; known: {', '.join(types)}")
        if not isinstance(path, str) or not _is_inside(path):
            raise ConfigError(f"{file}: path {show(path)} is not the name of a folder inside the model's")
        inside(folder, path)
        modules.append((types[name], path))
    return modules


def _entries(file: Path) -> list[tuple[Any, Any]]:
    """The type and path of every module, not checked yet."""
    entries = read_json(file, ConfigError, list)
    for position, entry in enumerate(entries):
        if not isinstance(entry, dict) or not {"type", "path"} <= set(entry):
            raise ConfigError(f"{file}: entry {position} is {show(entry)}, expected a module's type and path")
    return [(entry["type"], entry["path"]) for entry in entries]


def _is_inside(path: str) -> bool:
    """Whether a relative path stays in its folder, whatever the system; "" is the folder itself."""
    kinds = PurePosixPath(path), PureWindowsPath(path)
    leads_out = any(kind.anchor or ".." in kind.parts for kind in kinds)
    return not leads_out and path.isprintable() and len(path.encode()) <= _MAX_NAME_BYTES


def read_transformer(
    folder: Path, transformer: str, plain: Mapping[str, tuple[Any, ...]] = PLAIN_SETTINGS
) -> tuple[dict[str, Any], str | None]:
    """The transformer module's settings: of the first of its files that says anything.

    Args:
        folder: the model's folder.
        transformer: the module's folder in it.
        plain: the values at which each setting but the length leaves the output as it is.

    Returns:
        max_seq_length (None where it is not said) and do_lower_case; and the transformer_task that the file names.
    """
    files = [file for name in _SETTINGS_FILES if (file := find(folder, Path(transformer, name))) is not None]
    configs = ((file, read_json(file, ConfigError)) for file in files)
    file, config = next((found for found in configs if found[1]), (folder / "modules.json", {}))
    refuse_unknown(file, config, {*plain, *_OTHER_SETTINGS})
    for name, accepted in plain.items():
        if config.get(name) not in accepted:
            raise ConfigError(f"{file}: {name} is {show(config.get(name))}; only {accepted[-1]!r} is supported")
    length = expect_size(file, config, "max_seq_length", None)
    lower = expect(file, config, "do_lower_case", bool, False)
    return {"max_seq_length": length, "do_lower_case": lower}, config.get("transformer_task")


def read_top(folder: Path, model_type: str) -> tuple[Path, dict[str, Any]]:
    """The whole model's settings, of an optional file.

    Args:
        folder: the model's folder.
        model_type: what the file must call the model, if it says anything.

    Returns:
        The file, and what is in it.
    """
    file = find(folder, "config_sentence_transformers.json")
    config = {} if file is None else read_json(file, ConfigError)
    found = config.get("model_type", model_type)
    if found != model_type:
        raise ConfigError(f"{file}: model_type is {show(found)}; only {model_type!r} will do here")
    return file or folder / "config_sentence_transformers.json", config


def read_prompts(file: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    """prompts and default_prompt_name of the whole model's settings."""
    prompts = expect(file, config, "prompts", dict, {})
    # A name without a text stands for the empty prompt: so the reference reads it.
    prompts = {**DEFAULT_PROMPTS, **{name: expect(file, prompts, name, str, "", "prompts.") for name in prompts}}
    default = expect(file, config, "default_prompt_name", str, None)
    if default is not None and default not in prompts:
        raise ConfigError(
            f"{file}: default_prompt_name {show(default)} is not among the prompts {show(sorted(prompts))}"
        )
    return {"prompts": prompts, "default_prompt_name": default}


def read_similarity(file: Path, config: Mapping[str, Any]) -> str | None:
    """similarity_fn_name of the whole model's settings, or None where they say nothing."""
    name = expect(file, config, "similarity_fn_name", str, None)
    if name is not None:
        check_choice(f"{file}: similarity_fn_name", name, SIMILARITIES, ConfigError)
    return name


def expect(file: Path, config: Mapping[str, Any], name: str, kind: type, default: Any, prefix: str = "") -> Any:
    """A field of the given type; absent or null gives the default."""
    value = config.get(name)
    if value is None:
        return default
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise ConfigError(f"{file}: {prefix}{name} is {show(value)}, expected {kind.__name__}")
    return value


def expect_size(file: Path, config: Mapping[str, Any], name: str, high: int | None = _MAX_FEATURES) -> int | None:
    """A positive integer; absent or null gives None."""
    size = expect(file, config, name, int, None)
    if size is not None and (size < 1 or (high is not None and size > high)):
        expected = "a positive integer" if high is None else f"an integer from 1 to {high}"
        raise ConfigError(f"{file}: {name} is {show(size)}, expected {expected}")
    return size


def refuse_unknown(file: Path, config: Mapping[str, Any], known: set[str]) -> None:
    """Refuses fields that are not known, for any of them may change what comes out."""
    unknown = sorted(set(config) - known)
    if unknown:
        raise ConfigError(f"{file}: unknown field(s) {show(unknown)}; they may change the results")
