"""Adapters in files, as PEFT lays them out: adapter_config.json and adapter_model.safetensors.

The layout is that of `PeftModel.save_pretrained` (huggingface/peft, src/peft/utils/save_and_load.py): every adapter by
the name of its dense layer, and the heads that learnt beside them.
"""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from flax import nnx

from bertjax import heads
from bertjax.atomic import atomic_folder
from bertjax.convert import bert, files, rules, sources
from bertjax.errors import InputError, SourceError
from bertjax.folders import find
from bertjax.model import BertModel
from bertjax.pretrained import parameters, to_dtype
from bertjax.sentence import SentenceModel
from bertjax.training.lora import (
    HEADS,
    check_plain,
    encoder_of,
    learns_with_adapters,
    settings_of,
    with_adapters,
)
from bertjax.training.lora_config import config_of, read_config
from bertjax.training.lora_settings import PLACES, TARGETS, LoRA

_CONFIG = "adapter_config.json"
_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
# What PEFT puts in front of every name.
_PREFIX = "base_model.model."
_ADAPTER = (rules.Leaf("lora_A.weight", "lora_a", True), rules.Leaf("lora_B.weight", "lora_b", True))

# PEFT's names for what a model is for; there are none for the rest.
_TASKS: Mapping[type, str] = {
    BertModel: "FEATURE_EXTRACTION",
    SentenceModel: "FEATURE_EXTRACTION",
    heads.BertForSequenceClassification: "SEQ_CLS",
    heads.BertForTokenClassification: "TOKEN_CLS",
    heads.BertForQuestionAnswering: "QUESTION_ANS",
}


def save_adapter(model: nnx.Module, folder: str | Path, *, base: str | Path | None = None, force: bool = False) -> None:
    """Writes a model's adapters, and those heads of it that are in `lora.HEADS`, as a folder that PEFT reads.

    Args:
        model: a model with adapters: `BertModel`, one with heads, or `SentenceModel`, of which PEFT has the encoder.
        folder: the folder to make; it appears complete or not at all.
        base: the folder or the name on the Hub of the model that was adapted, for the configuration to name.
        force: replace an existing folder of an adapter or of a model.

    Raises:
        InputError: the model has no adapters, or is another one.
        CheckpointError: a parameter is NaN or infinite.
        SourceError: the folder exists already, or can't be written.
    """
    lora = settings_of(model)
    if lora is None:
        raise InputError("the model has no adapters to save; see add_lora, or save all of it with save_pretrained")
    learnt = ((path, np.asarray(array)) for path, array in parameters(model) if learns_with_adapters(path))
    tree = {path: to_dtype(path, array, None) for path, array in learnt}
    slots = rules.expand(_table(model), {path: array.shape for path, array in tree.items()})
    saved = [head for head in HEADS if any(path[0] == head for path in tree)]
    config = config_of(lora, _task_of(model), saved, base, type(model).__name__)
    with atomic_folder(folder, force=force) as temporary:
        (temporary / _CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        tensors = bert.tensors_of(slots, tree).values()
        files.write_safetensors(temporary / _WEIGHTS[0], tensors, {"format": "pt"})


def load_adapter(model: nnx.Module, folder: str | Path) -> nnx.Module:
    """The model with the adapters, and the heads, of a folder that `save_adapter` or PEFT wrote.

    Args:
        model: the model that was adapted, without adapters; it stays as it is.
        folder: the folder. Dropout that its configuration asks for concerns training only, and is not done here.

    Raises:
        InputError: the model computes in int8, has adapters already, or is none that adapters are saved of.
        SourceError: the folder is no adapter's, or can't be read.
        ConfigError: the configuration is malformed, is of another task, or asks for what is not supported: other
            methods than LoRA, its variants, other ranks for some layers, biases that learn.
        CheckpointError: the tensors are not those of such adapters. One error names every problem.
    """
    check_plain(model)
    table, folder = _table(model), Path(folder)
    file, weights = _find(folder, _CONFIG), sources.open_weights(_find(folder, *_WEIGHTS))
    prefix = _prefix(model)
    found = _targets_in(weights.tensors, prefix)
    lora, saved = read_config(file, _task_of(model), found, f"{prefix.removeprefix(_PREFIX)}0")
    whole = {row.path[0] for row in table if any(f".{row.torch}".endswith(f".{name}") for name in saved)}
    of_heads = {path: array.shape for path, array in parameters(model) if path[0] in whole}
    plan = bert.match_exactly(weights, rules.expand(table, _shapes(model, lora) | of_heads))
    arrays = {path: jnp.asarray(array) for path, array in plan.arrays(np.dtype(np.float32))}
    model = with_adapters(model, lora, lambda target, _: tuple(arrays[path] for path in _paths(model, target)))
    for head, leaf in of_heads:
        parameter = getattr(getattr(model, head), leaf)
        parameter[...] = arrays[head, leaf].astype(parameter.dtype)
    return model


def _find(folder: Path, *names: str) -> Path:
    for name in names:
        if (found := find(folder, name)) is not None:
            return found
    raise SourceError(f"{folder}: not a PEFT adapter's folder, it has no {' or '.join(names)}")


def _table(model: nnx.Module) -> list[rules.Row]:
    """PEFT's names of whatever may be saved of a model."""
    if not isinstance(model, BertModel | heads.BertWithHeads | SentenceModel):
        raise InputError(f"PEFT has no layout for adapters of a {type(model).__name__}; take the BertModel in it")
    rows = [
        rules.Row(f"{_prefix(model)}{{layer}}.{torch}", (*_root(model), *PLACES[target]), _ADAPTER)
        for target, torch in TARGETS.items()
    ]
    return rows + [row._replace(torch=_PREFIX + row.torch) for row in bert.HEADS_TABLE if row.path[0] in HEADS]


def _root(model: nnx.Module) -> rules.Path:
    """Where the encoder's layers are in the parameter tree."""
    return ("encoder", "layers") if isinstance(model, BertModel) else ("bert", "encoder", "layers")


def _prefix(model: nnx.Module) -> str:
    """What stands in front of a layer's number in PEFT's names."""
    return f"{_PREFIX}{'bert.' if isinstance(model, heads.BertWithHeads) else ''}encoder.layer."


def _targets_in(names: Iterable[str], prefix: str) -> set[str]:
    """The targets that tensors with these names are of."""
    parts = [name.removeprefix(prefix).partition(".")[2] for name in names if name.startswith(prefix)]
    return {target for target, torch in TARGETS.items() if any(part.startswith(f"{torch}.lora_") for part in parts)}


def _paths(model: nnx.Module, target: str) -> list[rules.Path]:
    """The paths of A and B."""
    return [(*_root(model), *PLACES[target], leaf.ours) for leaf in _ADAPTER]


def _shapes(model: nnx.Module, lora: LoRA) -> dict[rules.Path, rules.Shape]:
    """The shapes of the adapters that a model is to be given."""
    layers, shapes = encoder_of(model).layers, {}
    for target in lora.targets:
        block, name = PLACES[target]
        depth, into, out = getattr(getattr(layers, block), name).kernel.shape
        shapes |= dict(zip(_paths(model, target), ((depth, into, lora.rank), (depth, lora.rank, out)), strict=True))
    return shapes


def _task_of(model: nnx.Module) -> str | None:
    return next((task for kind, task in _TASKS.items() if isinstance(model, kind)), None)
