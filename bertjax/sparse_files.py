"""sentence-transformers' folders of sparse encoders: a masked language model, then SPLADE's pooling.

Read without importing what they name, as in `sentence_files`: a fixed table says what each module is.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bertjax.checks import check_choice, check_count
from bertjax.convert.tensors import inside
from bertjax.errors import ConfigError
from bertjax.folders import find
from bertjax.json_files import read_json
from bertjax.module_files import (
    DEFAULT_PROMPTS,
    PLAIN_SETTINGS,
    expect,
    expect_size,
    read_modules,
    read_prompts,
    read_similarity,
    read_top,
    read_transformer,
    refuse_unknown,
)

#: How a text's tokens become one: the largest weight of each word, or their sum.
POOLING_STRATEGIES = ("max", "sum")

#: What is done to a logit x: log(1 + relu(x)), or log(1 + log(1 + relu(x))).
SPLADE_ACTIVATIONS = ("relu", "log1p_relu")

_OLD, _NEW = "sentence_transformers.sparse_encoder.models", "sentence_transformers.sparse_encoder.modules"
# The general module says in its settings that it is a masked language model; the one made for it need not.
_MODULE_TYPES: Mapping[str, str] = {
    "sentence_transformers.base.modules.transformer.Transformer": "general transformer",
    f"{_NEW}.mlm_transformer.MLMTransformer": "transformer",
    f"{_OLD}.MLMTransformer": "transformer",
    f"{_OLD}.MLMTransformer.MLMTransformer": "transformer",
    f"{_NEW}.splade_pooling.SpladePooling": "splade",
    f"{_OLD}.SpladePooling": "splade",
    f"{_OLD}.SpladePooling.SpladePooling": "splade",
}
_FILL_MASK_SETTINGS = PLAIN_SETTINGS | {
    "transformer_task": (None, "fill-mask"),
    "modality_config": (None, {"text": {"method": "forward", "method_output_name": "logits"}}),
}


@dataclasses.dataclass(frozen=True)
class SparseSpec:
    """How a masked language model makes sparse vectors.

    Attributes:
        transformer: the folder that holds the model and the tokenizer, or None for a model from nowhere.
        pooling_strategy: one of `POOLING_STRATEGIES`.
        activation_function: one of `SPLADE_ACTIVATIONS`.
        max_active_dims: how many words a vector has at most, or None for all that weigh anything.
        max_seq_length: longest text in tokens, or None if the folder does not say.
        do_lower_case: lower-case texts before they are tokenized.
        prompts: text put before every input, by name.
        default_prompt_name: the prompt used when none is asked for.
        similarity_fn_name: what tells how near two vectors are, one of `similarity.SIMILARITIES`, or None.
    """

    transformer: Path | None = None
    pooling_strategy: str = "max"
    activation_function: str = "relu"
    max_active_dims: int | None = None
    max_seq_length: int | None = None
    do_lower_case: bool = False
    prompts: Mapping[str, str] = dataclasses.field(default_factory=lambda: dict(DEFAULT_PROMPTS))
    default_prompt_name: str | None = None
    similarity_fn_name: str | None = None

    def __post_init__(self):
        check_choice("pooling_strategy", self.pooling_strategy, POOLING_STRATEGIES, ConfigError)
        check_choice("activation_function", self.activation_function, SPLADE_ACTIVATIONS, ConfigError)
        for name in ("max_active_dims", "max_seq_length"):
            if getattr(self, name) is not None:
                check_count(name, getattr(self, name), error=ConfigError)


def read_sparse_spec(folder: Path) -> SparseSpec:
    """Reads a sentence-transformers folder of a sparse encoder.

    A folder without modules.json is taken for a masked language model alone, with the spec's defaults: so
    sentence-transformers takes it.

    Args:
        folder: the folder.

    Raises:
        SourceError: a file that modules.json needs is missing; or a file is no regular file, can't be read, or is a
            link out of the folder.
        ConfigError: a file is malformed, or names something that is not known here.
    """
    if find(folder, "modules.json") is None:
        return SparseSpec(transformer=folder)
    file, top = read_top(folder, "SparseEncoder")
    (kind, transformer), (_, pooling) = _modules(folder)
    return SparseSpec(
        transformer=folder / transformer,
        **_read_pooling(inside(folder, Path(pooling, "config.json"))),
        **_settings(folder, transformer, is_general=kind == "general transformer"),
        **read_prompts(file, top),
        max_active_dims=expect_size(file, top, "max_active_dims"),
        similarity_fn_name=read_similarity(file, top),
    )


def spec_files(spec: SparseSpec) -> dict[str, Any]:
    """The JSON files that `read_sparse_spec` reads as this spec, by name, but for the length of texts.

    That is the tokenizer's model_max_length, which sentence-transformers reads.
    """
    kinds = (("", "MLMTransformer"), ("1_SpladePooling", "SpladePooling"))
    limit = {} if spec.max_active_dims is None else {"max_active_dims": spec.max_active_dims}
    return {
        "modules.json": [
            {"idx": index, "name": str(index), "path": path, "type": f"{_OLD}.{kind}"}
            for index, (path, kind) in enumerate(kinds)
        ],
        "1_SpladePooling/config.json": {
            "pooling_strategy": spec.pooling_strategy,
            "activation_function": spec.activation_function,
        },
        "config_sentence_transformers.json": {
            "model_type": "SparseEncoder",
            "prompts": dict(spec.prompts),
            "default_prompt_name": spec.default_prompt_name,
            "similarity_fn_name": spec.similarity_fn_name,
            **limit,
        },
    }


def _modules(folder: Path) -> list[tuple[str, str]]:
    """The kind and folder of the two modules, a transformer and SPLADE's pooling."""
    modules = read_modules(folder, _MODULE_TYPES)
    kinds = [kind for kind, _ in modules]
    if kinds not in (["transformer", "splade"], ["general transformer", "splade"]):
        raise ConfigError(
            f"{folder / 'modules.json'}: modules are {', '.join(kinds) or 'none'}; expected transformer, then splade"
        )
    return modules


def _read_pooling(file: Path) -> dict[str, str]:
    config = read_json(file, ConfigError)
    sizes = ("embedding_dimension", "word_embedding_dimension")
    # `chunk_size` bounds memory there, and changes nothing else.
    refuse_unknown(file, config, {"pooling_strategy", "activation_function", "chunk_size", *sizes})
    for name in sizes:
        expect_size(file, config, name)
    options = {"pooling_strategy": POOLING_STRATEGIES, "activation_function": SPLADE_ACTIVATIONS}
    found = {name: expect(file, config, name, str, default) for name, (default, *_) in options.items()}
    for name, choices in options.items():
        check_choice(f"{file}: {name}", found[name], choices, ConfigError)
    return found


def _settings(folder: Path, transformer: str, is_general: bool) -> dict[str, Any]:
    """The transformer module's settings, checked to be a masked language model's."""
    settings, transformer_task = read_transformer(folder, transformer, _FILL_MASK_SETTINGS)
    if is_general and transformer_task is None:
        raise ConfigError(
            f"{folder / transformer}: a Transformer before SpladePooling needs transformer_task 'fill-mask', has none"
        )
    return settings
