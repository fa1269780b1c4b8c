"""The sentence-transformers folder layout, old and new, read without importing what it names.

`modules.json` lists modules by Python class path. sentence-transformers imports them; here a fixed table of names says
what each one is, and anything else is refused. The layout changed with version 5.4; both are read.
"""

import dataclasses
import reprlib
from collections.abc import Mapping
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from bertjax.convert.tensors import inside
from bertjax.errors import ConfigError
from bertjax.folders import find
from bertjax.json_files import read_json
from bertjax.sentence import DENSE_ACTIVATIONS, POOLING_MODES

_OLD, _NEW = "sentence_transformers.models", "sentence_transformers"
_MODULE_TYPES: Mapping[str, str] = {
    f"{_OLD}.Transformer": "transformer",
    f"{_OLD}.Pooling": "pooling",
    f"{_OLD}.Dense": "dense",
    f"{_OLD}.Normalize": "normalize",
    f"{_NEW}.base.modules.transformer.Transformer": "transformer",
    f"{_NEW}.sentence_transformer.modules.pooling.Pooling": "pooling",
    f"{_NEW}.base.modules.dense.Dense": "dense",
    f"{_NEW}.base.modules.normalize.Normalize": "normalize",
}

# The transformer module's own settings; the name used to depend on the architecture.
_SETTINGS_FILES = tuple(
    f"sentence_{name}_config.json"
    for name in ("bert", "roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet")
)

# Settings of the transformer module, with the values that leave its output as it is. The rest would change the
# tokens, the weights or the output. What a library merely loads by (`trust_remote_code`) is left aside.
_PLAIN_SETTINGS: Mapping[str, tuple[Any, ...]] = {
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

# Far above any that was ever published.
_MAX_FEATURES = 1 << 20
_MAX_NAME_BYTES = 255

# How values are shown in messages: cut to a length that fits, and never too deep to be shown.
_repr = reprlib.Repr()
_repr.maxstring = 100
_show = _repr.repr

#: Old Pooling configs have one flag per mode.
_POOLING_FLAGS: Mapping[str, str] = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}


@dataclasses.dataclass(frozen=True)
class DenseSpec:
    """A Dense module: its folder and sizes."""

    folder: Path
    in_features: int
    out_features: int
    use_bias: bool
    activation: str
    use_residual: bool


@dataclasses.dataclass(frozen=True)
class SentenceSpec:
    """What a sentence-transformers folder says, checked.

    Attributes:
        transformer: the folder that holds the encoder and the tokenizer.
        pooling: the pooling modes, in the order of concatenation.
        include_prompt: whether a prompt's tokens count in the pooling.
        modules: what follows the pooling: a `DenseSpec`, or None for Normalize.
        max_seq_length: longest text in tokens, or None if the folder does not say.
        do_lower_case: lower-case texts before they are tokenized.
        prompts: text put before every input, by name.
        default_prompt_name: the prompt used when none is asked for.
        truncate_dim: keep only that many leading numbers of every vector.
    """

    transformer: Path
    pooling: tuple[str, ...]
    include_prompt: bool = True
    modules: tuple[DenseSpec | None, ...] = ()
    max_seq_length: int | None = None
    do_lower_case: bool = False
    prompts: Mapping[str, str] = dataclasses.field(default_factory=dict)
    default_prompt_name: str | None = None
    truncate_dim: int | None = None


def read_spec(folder: Path, pooling: str | tuple[str, ...] | None = None) -> SentenceSpec:
    """Reads a sentence-transformers folder, or a plain BERT folder if `pooling` says how to pool.

    Args:
        folder: the folder.
        pooling: pooling mode(s) to use in the place of the folder's.

    Raises:
        SourceError: a file that modules.json needs is missing; or a file is no regular file, can't be read, or is a
            link out of the folder.
        ConfigError: a file is malformed, or names something that is not known here.
    """
    modes = (pooling,) if isinstance(pooling, str) else pooling
    if find(folder, "modules.json") is None:
        if modes is None:
            raise ConfigError(
                f"{folder}: no modules.json, so nothing says how token vectors become a text's vector; pass "
                f"pooling= (or --pooling) with one of {', '.join(POOLING_MODES)}; most such models were trained with "
                "'mean' or 'cls'"
            )
        return SentenceSpec(transformer=folder, pooling=_check_modes("pooling", modes), **_settings(folder, ""))
    # First, because it says most plainly what else a folder is, for instance a cross-encoder.
    top_settings = _top_settings(folder)
    (_, transformer), (_, pooling_name), *rest = _modules(folder)
    found_modes, include_prompt = _read_pooling(inside(folder, Path(pooling_name, "config.json")))
    return SentenceSpec(
        transformer=folder / transformer,
        pooling=found_modes if modes is None else _check_modes("pooling", modes),
        include_prompt=include_prompt,
        modules=tuple(
            _read_dense(folder, name) if kind == "dense" else _read_normalize(folder, name) for kind, name in rest
        ),
        **_settings(folder, transformer),
        **top_settings,
    )


def _modules(folder: Path) -> list[tuple[str, str]]:
    """The kind and folder of every module, checked to be a transformer, a pooling, then Dense and Normalize.

    The folders are relative to the model's, and inside it.
    """
    file = folder / "modules.json"
    modules = []
    for name, path in _read_modules(file):
        if not isinstance(name, str) or name not in _MODULE_TYPES:
            raise ConfigError(f"{file}: module type {_show(name)} is not supported; known: {', '.join(_MODULE_TYPES)}")
        if not isinstance(path, str) or not _is_inside(path):
            raise ConfigError(f"{file}: path {_show(path)} is not the name of a folder inside the model's")
        inside(folder, path)
        modules.append((_MODULE_TYPES[name], path))
    order = [kind for kind, _ in modules]
    if order[:2] != ["transformer", "pooling"] or not set(order[2:]) <= {"dense", "normalize"}:
        raise ConfigError(
            f"{file}: modules are {', '.join(order) or 'none'}; expected transformer, pooling, then dense and normalize"
        )
    return modules


def _read_modules(file: Path) -> list[tuple[Any, Any]]:
    """The type and path of every module, not checked yet."""
    entries = read_json(file, ConfigError, list)
    for position, entry in enumerate(entries):
        if not isinstance(entry, dict) or not {"type", "path"} <= set(entry):
            raise ConfigError(f"{file}: entry {position} is {_show(entry)}, expected a module's type and path")
    return [(entry["type"], entry["path"]) for entry in entries]


def _is_inside(path: str) -> bool:
    """Whether a relative path stays in its folder, whatever the system; "" is the folder itself."""
    kinds = PurePosixPath(path), PureWindowsPath(path)
    leads_out = any(kind.anchor or ".." in kind.parts for kind in kinds)
    return not leads_out and path.isprintable() and len(path.encode()) <= _MAX_NAME_BYTES


def _read_pooling(file: Path) -> tuple[tuple[str, ...], bool]:
    config = read_json(file, ConfigError)
    sizes = ("word_embedding_dimension", "embedding_dimension")
    _refuse_unknown(file, config, {*sizes, "pooling_mode", "include_prompt", *_POOLING_FLAGS})
    for name in sizes:
        _expect_size(file, config, name)
    modes = config.get("pooling_mode")
    if modes is None:
        # All flags false means mean: so the reference reads it.
        modes = [mode for flag, mode in _POOLING_FLAGS.items() if _expect(file, config, flag, bool, False)] or ["mean"]
    modes = [modes] if isinstance(modes, str) else modes
    return _check_modes(f"{file}: pooling_mode", modes), _expect(file, config, "include_prompt", bool, True)


def _check_modes(where: str, modes: Any) -> tuple[str, ...]:
    if not isinstance(modes, list | tuple) or not modes:
        raise ConfigError(f"{where} is {_show(modes)}, expected one or more of {', '.join(POOLING_MODES)}")
    for mode in modes:
        if mode not in POOLING_MODES:
            raise ConfigError(f"{where} {_show(mode)} is not one of {', '.join(POOLING_MODES)}")
    return tuple(modes)


def _read_dense(folder: Path, name: str) -> DenseSpec:
    file = inside(folder, Path(name, "config.json"))
    config = read_json(file, ConfigError)
    names = {"module_input_name", "module_output_name"}
    _refuse_unknown(
        file, config, {"in_features", "out_features", "bias", "activation_function", "use_residual", *names}
    )
    _refuse_renamed(file, config)
    sizes = [_expect_size(file, config, name) for name in ("in_features", "out_features")]
    if None in sizes:
        raise ConfigError(f"{file}: in_features and out_features are {sizes}; both are needed")
    activation = _expect(file, config, "activation_function", str, "torch.nn.modules.activation.Tanh")
    if activation not in DENSE_ACTIVATIONS:
        raise ConfigError(
            f"{file}: activation_function {_show(activation)} is not supported; known: {', '.join(DENSE_ACTIVATIONS)}"
        )
    return DenseSpec(
        folder / name,
        *sizes,
        use_bias=_expect(file, config, "bias", bool, True),
        activation=activation,
        use_residual=_expect(file, config, "use_residual", bool, False),
    )


def _read_normalize(folder: Path, name: str) -> None:
    """Normalize has no settings of its own, and often no folder."""
    file = find(folder, Path(name, "config.json"))
    if file is not None:
        config = read_json(file, ConfigError)
        _refuse_unknown(file, config, {"module_input_name", "module_output_name"})
        _refuse_renamed(file, config)


def _settings(folder: Path, transformer: str) -> dict[str, Any]:
    """The transformer module's settings that matter here: of the first of the files that says anything."""
    files = [file for name in _SETTINGS_FILES if (file := find(folder, Path(transformer, name))) is not None]
    file, config = next(((file, config) for file in files if (config := read_json(file, ConfigError))), (None, {}))
    if file is None:
        return {}
    _refuse_unknown(file, config, {*_PLAIN_SETTINGS, *_OTHER_SETTINGS})
    for name, accepted in _PLAIN_SETTINGS.items():
        if config.get(name) not in accepted:
            raise ConfigError(f"{file}: {name} is {_show(config[name])}; only {accepted[-1]!r} is supported")
    length = _expect_size(file, config, "max_seq_length", None)
    return {"max_seq_length": length, "do_lower_case": _expect(file, config, "do_lower_case", bool, False)}


def _top_settings(folder: Path) -> dict[str, Any]:
    """Prompts and truncation; the file is optional."""
    file = find(folder, "config_sentence_transformers.json")
    if file is None:
        return {}
    config = read_json(file, ConfigError)
    model_type = config.get("model_type", "SentenceTransformer")
    if model_type != "SentenceTransformer":
        raise ConfigError(
            f"{file}: model_type is {_show(model_type)}; only 'SentenceTransformer' gives one vector per text"
        )
    prompts = _expect(file, config, "prompts", dict, {})
    # A name without a text stands for the empty prompt: so the reference reads it.
    prompts = {name: _expect(file, prompts, name, str, "", "prompts.") for name in prompts}
    default = _expect(file, config, "default_prompt_name", str, None)
    if default is not None and default not in prompts:
        known = _show(sorted(prompts))
        raise ConfigError(f"{file}: default_prompt_name {_show(default)} is not among the prompts {known}")
    truncate = _expect_size(file, config, "truncate_dim", None)
    return {"prompts": prompts, "default_prompt_name": default, "truncate_dim": truncate}


def _expect(file: Path, config: Mapping[str, Any], name: str, kind: type, default: Any, prefix: str = "") -> Any:
    """A field of the given type; absent or null gives the default."""
    value = config.get(name)
    if value is None:
        return default
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise ConfigError(f"{file}: {prefix}{name} is {_show(value)}, expected {kind.__name__}")
    return value


def _expect_size(file: Path, config: Mapping[str, Any], name: str, high: int | None = _MAX_FEATURES) -> int | None:
    """A positive integer; absent or null gives None."""
    size = _expect(file, config, name, int, None)
    if size is not None and (size < 1 or (high is not None and size > high)):
        expected = "a positive integer" if high is None else f"an integer from 1 to {high}"
        raise ConfigError(f"{file}: {name} is {_show(size)}, expected {expected}")
    return size


def _refuse_unknown(file: Path, config: Mapping[str, Any], known: set[str]) -> None:
    unknown = sorted(set(config) - known)
    if unknown:
        raise ConfigError(f"{file}: unknown field(s) {_show(unknown)}; they may change the vectors")


def _refuse_renamed(file: Path, config: Mapping[str, Any]) -> None:
    """New configs can rewire a module's input and output; only the plain chain is supported."""
    for name in ("module_input_name", "module_output_name"):
        if config.get(name) not in (None, "sentence_embedding"):
            raise ConfigError(f"{file}: {name} is {_show(config[name])}, expected 'sentence_embedding'")


def spec_files(spec: SentenceSpec, hidden_size: int, max_seq_length: int) -> dict[str, Any]:
    """The JSON files that `read_spec` reads as this spec, by name, in the layout that every version understands."""
    kinds = [("", "Transformer"), ("1_Pooling", "Pooling")]
    files: dict[str, Any] = {}
    for position, module in enumerate(spec.modules, start=2):
        kinds.append((f"{position}_Normalize", "Normalize") if module is None else (f"{position}_Dense", "Dense"))
        if module is not None:
            files[f"{position}_Dense/config.json"] = {
                "in_features": module.in_features,
                "out_features": module.out_features,
                "bias": module.use_bias,
                "activation_function": module.activation,
            } | ({"use_residual": True} if module.use_residual else {})
    files["modules.json"] = [
        {"idx": index, "name": str(index), "path": path, "type": f"{_OLD}.{kind}"}
        for index, (path, kind) in enumerate(kinds)
    ]
    files["1_Pooling/config.json"] = _pooling_config(spec, hidden_size)
    files["sentence_bert_config.json"] = {"max_seq_length": max_seq_length, "do_lower_case": False}
    prompts = {"prompts": dict(spec.prompts), "default_prompt_name": spec.default_prompt_name}
    truncation = {} if spec.truncate_dim is None else {"truncate_dim": spec.truncate_dim}
    files["config_sentence_transformers.json"] = prompts | truncation
    return files


def _pooling_config(spec: SentenceSpec, hidden_size: int) -> dict[str, Any]:
    """Flags, which every version reads; a list of modes only where the order is not that of the flags."""
    prompt = {} if spec.include_prompt else {"include_prompt": False}
    flags = {flag: mode in spec.pooling for flag, mode in _POOLING_FLAGS.items()}
    if tuple(mode for mode in _POOLING_FLAGS.values() if mode in spec.pooling) == spec.pooling:
        return {"word_embedding_dimension": hidden_size, **flags, **prompt}
    return {"embedding_dimension": hidden_size, "pooling_mode": list(spec.pooling), **prompt}
