"""The folder layout of sentence-transformers' dense models, old and new, as one spec.

The layout changed with version 5.4; both are read, and the one that every version reads is written.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bertjax.convert.tensors import inside
from bertjax.errors import ConfigError
from bertjax.folders import find
from bertjax.json_files import read_json
from bertjax.module_files import (
    DEFAULT_PROMPTS,
    expect,
    expect_size,
    read_modules,
    read_prompts,
    read_similarity,
    read_top,
    read_transformer,
    refuse_unknown,
    show,
)
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
        similarity_fn_name: what tells how near two vectors are, one of `similarity.SIMILARITIES`.
    """

    transformer: Path
    pooling: tuple[str, ...]
    include_prompt: bool = True
    modules: tuple[DenseSpec | None, ...] = ()
    max_seq_length: int | None = None
    do_lower_case: bool = False
    prompts: Mapping[str, str] = dataclasses.field(default_factory=lambda: dict(DEFAULT_PROMPTS))
    default_prompt_name: str | None = None
    truncate_dim: int | None = None
    similarity_fn_name: str = "cosine"


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
        return SentenceSpec(
            transformer=folder, pooling=_check_modes("pooling", modes), **read_transformer(folder, "")[0]
        )
    # First, because it says most plainly what else a folder is, for instance a cross-encoder.
    file, top = read_top(folder, "SentenceTransformer")
    prompts = read_prompts(file, top)
    (_, transformer), (_, pooling_name), *rest = _modules(folder)
    found_modes, include_prompt = _read_pooling(inside(folder, Path(pooling_name, "config.json")))
    return SentenceSpec(
        transformer=folder / transformer,
        pooling=found_modes if modes is None else _check_modes("pooling", modes),
        include_prompt=include_prompt,
        modules=tuple(
            _read_dense(folder, name) if kind == "dense" else _read_normalize(folder, name) for kind, name in rest
        ),
        **read_transformer(folder, transformer)[0],
        **prompts,
        truncate_dim=expect_size(file, top, "truncate_dim", None),
        similarity_fn_name=read_similarity(file, top) or "cosine",
    )


def _modules(folder: Path) -> list[tuple[str, str]]:
    """The kind and folder of every module, checked to be a transformer, a pooling, then Dense and Normalize.

    The folders are relative to the model's, and inside it.
    """
    modules = read_modules(folder, _MODULE_TYPES)
    order = [kind for kind, _ in modules]
    if order[:2] != ["transformer", "pooling"] or not set(order[2:]) <= {"dense", "normalize"}:
        raise ConfigError(
            f"{folder / 'modules.json'}: modules are {', '.join(order) or 'none'}; expected transformer, pooling, then "
            "dense and normalize"
        )
    return modules


def _read_pooling(file: Path) -> tuple[tuple[str, ...], bool]:
    config = read_json(file, ConfigError)
    sizes = ("word_embedding_dimension", "embedding_dimension")
    refuse_unknown(file, config, {*sizes, "pooling_mode", "include_prompt", *_POOLING_FLAGS})
    for name in sizes:
        expect_size(file, config, name)
    modes = config.get("pooling_mode")
    if modes is None:
        # All flags false means mean: so the reference reads it.
        modes = [mode for flag, mode in _POOLING_FLAGS.items() if expect(file, config, flag, bool, False)] or ["mean"]
    modes = [modes] if isinstance(modes, str) else modes
    return _check_modes(f"{file}: pooling_mode", modes), expect(file, config, "include_prompt", bool, True)


def _check_modes(where: str, modes: Any) -> tuple[str, ...]:
    if not isinstance(modes, list | tuple) or not modes:
        raise ConfigError(f"{where} is {show(modes)}, expected one or more of {', '.join(POOLING_MODES)}")
    for mode in modes:
        if mode not in POOLING_MODES:
            raise ConfigError(f"{where} {show(mode)} is not one of {', '.join(POOLING_MODES)}")
    return tuple(modes)


def _read_dense(folder: Path, name: str) -> DenseSpec:
    file = inside(folder, Path(name, "config.json"))
    config = read_json(file, ConfigError)
    names = {"module_input_name", "module_output_name"}
    refuse_unknown(file, config, {"in_features", "out_features", "bias", "activation_function", "use_residual", *names})
    _refuse_renamed(file, config)
    sizes = [expect_size(file, config, name) for name in ("in_features", "out_features")]
    if None in sizes:
        raise ConfigError(f"{file}: in_features and out_features are {sizes}; both are needed")
    activation = expect(file, config, "activation_function", str, "torch.nn.modules.activation.Tanh")
    if activation not in DENSE_ACTIVATIONS:
        raise ConfigError(
            f"{file}: activation_function {show(activation)} is not supported; known: {', '.join(DENSE_ACTIVATIONS)}"
        )
    return DenseSpec(
        folder / name,
        *sizes,
        use_bias=expect(file, config, "bias", bool, True),
        activation=activation,
        use_residual=expect(file, config, "use_residual", bool, False),
    )


def _read_normalize(folder: Path, name: str) -> None:
    """Normalize has no settings of its own, and often no folder."""
    file = find(folder, Path(name, "config.json"))
    if file is not None:
        config = read_json(file, ConfigError)
        refuse_unknown(file, config, {"module_input_name", "module_output_name"})
        _refuse_renamed(file, config)


def _refuse_renamed(file: Path, config: Mapping[str, Any]) -> None:
    """New configs can rewire a module's input and output; only the plain chain is supported."""
    for name in ("module_input_name", "module_output_name"):
        if config.get(name) not in (None, "sentence_embedding"):
            raise ConfigError(f"{file}: {name} is {show(config[name])}, expected 'sentence_embedding'")


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
    files["config_sentence_transformers.json"] = {
        "prompts": dict(spec.prompts),
        "default_prompt_name": spec.default_prompt_name,
        "similarity_fn_name": spec.similarity_fn_name,
    } | ({} if spec.truncate_dim is None else {"truncate_dim": spec.truncate_dim})
    return files


def _pooling_config(spec: SentenceSpec, hidden_size: int) -> dict[str, Any]:
    """Flags, which every version reads; a list of modes only where the order is not that of the flags."""
    prompt = {} if spec.include_prompt else {"include_prompt": False}
    flags = {flag: mode in spec.pooling for flag, mode in _POOLING_FLAGS.items()}
    if tuple(mode for mode in _POOLING_FLAGS.values() if mode in spec.pooling) == spec.pooling:
        return {"word_embedding_dimension": hidden_size, **flags, **prompt}
    return {"embedding_dimension": hidden_size, "pooling_mode": list(spec.pooling), **prompt}
