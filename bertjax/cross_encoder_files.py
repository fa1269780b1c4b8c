"""sentence-transformers' folders of cross-encoders: a sequence classifier and, from version 5.4 on, what it is for."""

import dataclasses
from pathlib import Path
from typing import Any

from bertjax.errors import ConfigError
from bertjax.folders import find
from bertjax.module_files import PLAIN_SETTINGS, expect, read_modules, read_top, read_transformer, show

_MODULE_TYPES = {
    "sentence_transformers.base.modules.transformer.Transformer": "transformer",
    "sentence_transformers.models.Transformer": "transformer",
}
# Settings of the transformer module, with the values that mean nothing but a sequence classifier.
_CLASSIFIER_SETTINGS = PLAIN_SETTINGS | {
    "transformer_task": (None, "sequence-classification"),
    "module_output_name": (None, "scores"),
    "modality_config": (None, {"text": {"method": "forward", "method_output_name": "logits"}}),
}


@dataclasses.dataclass(frozen=True)
class CrossEncoderSpec:
    """What a folder says of a cross-encoder.

    Attributes:
        transformer: the folder that holds the model and the tokenizer.
        max_seq_length: longest pair in tokens, or None if the folder does not say.
        do_lower_case: lower-case texts before they are tokenized.
        activation: what makes scores of logits, by PyTorch's name of its class, or None.
    """

    transformer: Path
    max_seq_length: int | None = None
    do_lower_case: bool = False
    activation: str | None = None


def read_cross_encoder_spec(folder: Path) -> CrossEncoderSpec:
    """Reads a folder; before version 5.4 a cross-encoder had no files of its own, and config.json names the activation.

    Raises:
        SourceError: a file is no regular file, can't be read, or is a link out of the folder.
        ConfigError: a file is malformed; or the folder holds more than a sequence classifier, or something else.
    """
    if find(folder, "modules.json") is None:
        return CrossEncoderSpec(folder)
    file, top = read_top(folder, "CrossEncoder")
    paths = [path for _, path in read_modules(folder, _MODULE_TYPES)]
    if paths != [""]:
        raise ConfigError(
            f"{folder / 'modules.json'}: lists {len(paths)} module(s) in {show(paths)}; only a cross-encoder of "
            "one Transformer, whose files stand beside this one, is supported"
        )
    prompt = expect(file, top, "default_prompt_name", str, None)
    if prompt is not None:
        raise ConfigError(f"{file}: default_prompt_name is {show(prompt)}; prompts of pairs are not supported")
    settings, _ = read_transformer(folder, "", _CLASSIFIER_SETTINGS)
    return CrossEncoderSpec(folder, **settings, activation=expect(file, top, "activation_fn", str, None))


def cross_encoder_files(activation: str) -> dict[str, Any]:
    """The JSON files that sentence-transformers reads as a cross-encoder with this activation, by name.

    From version 5.4 on it reads the first three; before, what is added to config.json (from version 4, and before it).
    """
    return {
        "modules.json": [{"idx": 0, "name": "0", "path": "", "type": next(iter(_MODULE_TYPES))}],
        "sentence_bert_config.json": {
            name: _CLASSIFIER_SETTINGS[name][-1]
            for name in ("transformer_task", "modality_config", "module_output_name")
        },
        "config_sentence_transformers.json": {
            "model_type": "CrossEncoder",
            "activation_fn": activation,
            "prompts": {},
            "default_prompt_name": None,
        },
        "config.json": {
            "sentence_transformers": {"activation_fn": activation},
            "sbert_ce_default_activation_function": activation,
        },
    }
