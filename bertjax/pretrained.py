"""Checkpoints to models and back: where models, the Hub and the converter meet."""

import itertools
import json
import logging
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from bertjax import hub
from bertjax.atomic import atomic_folder
from bertjax.checkpoints import check_head_fields, class_of, match, open_checkpoint
from bertjax.config import BertConfig
from bertjax.convert import bert, names, rules, targets
from bertjax.convert.layout import Layout, standard_layout
from bertjax.errors import CheckpointError, InputError
from bertjax.fresh import check_kind, check_labels, check_parts, hinting, initialise, key_of, names_of, replaced_names
from bertjax.int8 import is_int8, quantize_rows, quantized_kernels
from bertjax.labels import with_labels
from bertjax.layers import DType, shapes_only
from bertjax.model import BertModel, check_dtype, check_dtypes
from bertjax.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

#: `BertModel` or a model with a head.
Model = TypeVar("Model", bound=nnx.Module)


def from_pretrained(
    path_or_hub_id: str | Path,
    kind: type[Model] | None = None,
    *,
    fresh: str | Iterable[str] = (),
    rngs: nnx.Rngs | int = 0,
    num_labels: int | None = None,
    id2label: Mapping[int, str] | None = None,
    problem_type: str | None = None,
    revision: str | None = None,
    dtype: DType = jnp.float32,
    param_dtype: DType | None = None,
    add_pooling_layer: bool | None = None,
    remat: bool = False,
    unroll: int | bool = 1,
    attention: str = "auto",
    sharding: jax.sharding.Sharding | jax.Device | None = None,
    prefix: str | None = None,
    untie: bool = False,
    ignore: Iterable[str] = (),
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
) -> Model:
    """Loads BERT's encoder, or BERT with a head, from a folder or from the Hub, whatever the format of the weights.

    Tensors are read, converted and placed on the device one array at a time; nothing is initialised but what `fresh`
    names, so the peak memory stays near one copy of the weights.

    Args:
        path_or_hub_id: a model's folder, one of the weight files in it, the prefix of a TensorFlow checkpoint, or a
            repository on the Hub.
        kind: the class to load: `BertModel` or one of `bertjax.heads`, whose head the checkpoint must have; default:
            the one that config.json names in `architectures` or, where it names none, that the weights are of.
        fresh: the parts to initialise instead of reading them, to be trained before use: one or several of "pooler"
            and `heads.HEADS`. A warning names their tensors. Such a model is saved as transformers writes a new one.
        rngs: random keys for `fresh`, or a seed.
        num_labels: how many labels the classifier has. Without `fresh` it must have as many already.
        id2label: the labels' names, by number; label2id follows from them.
        problem_type: "regression", "single_label_classification" or "multi_label_classification".
        revision: for the Hub: a branch, a tag or a commit.
        dtype: dtype of the matmuls' inputs; see `BertModel`.
        param_dtype: dtype of the parameters; default: `dtype`, and float32 for int8.
        add_pooling_layer: whether a `BertModel` has a pooler; default: if the checkpoint has one.
        remat: see `BertModel`.
        unroll: see `BertModel`.
        attention: see `BertModel`.
        sharding: where the parameters go: a device, or a sharding that fits every one of them; default: JAX's default
            device.
        prefix: what stands before the encoder's tensor names, for a file that holds several encoders.
        untie: give the masked-language-model head the decoder of the file, though the config ties it to the word
            embeddings.
        ignore: unknown fields of config.json that the caller knows to have no effect on the encoder.
        token: see `hub.resolve`.
        cache_dir: see `hub.resolve`.
        local_files_only: see `hub.resolve`.

    Raises:
        SourceError: files are missing or can't be read or fetched.
        ConfigError: the configuration is not a BERT encoder's, or not usable, or does not settle the class.
        CheckpointError: the tensors do not form the model. One error names every problem.
        InputError: an option does not apply to the class, or the labels are not as many as the classifier has.
    """
    path = hub.resolve(
        path_or_hub_id, revision=revision, token=token, cache_dir=cache_dir, local_files_only=local_files_only
    )
    dtype, param_dtype = check_dtypes(dtype, param_dtype)
    config, survey = open_checkpoint(path, prefix=prefix, untie=untie, ignore=ignore)
    kind = class_of(config, survey) if kind is None else check_kind(kind)
    parts = check_parts(kind, fresh)
    key = key_of(rngs) if parts else None
    if any(option is not None for option in (num_labels, id2label, problem_type)):
        config = with_labels(config, num_labels=num_labels, id2label=id2label, problem_type=problem_type)
        check_labels(kind, config, survey, parts)
    options = {"dtype": dtype, "param_dtype": param_dtype, "remat": remat, "unroll": unroll, "attention": attention}
    if issubclass(kind, BertModel):
        options["add_pooling_layer"] = _has_pooler(survey, parts, add_pooling_layer)
    elif add_pooling_layer is not None:
        raise InputError(f"add_pooling_layer applies to BertModel; whether {kind.__name__} has a pooler is settled")
    else:
        check_head_fields(config, survey.weights.folder)
    graphdef, shapes = abstract(lambda: kind(config, rngs=nnx.Rngs(0), **options))
    slots = bert.slots_of(shapes)
    missing = {slot.path for slot in slots if bert.part_of(slot.name) in parts}
    with hinting(kind, survey, slots):
        survey, plan = match(survey, {path: shapes[path] for path in shapes if path not in missing}, untie)
    _log(kind, survey, plan, names_of(slots, parts), replaced_names(survey, parts))
    new = initialise(lambda rngs: kind(config, rngs=rngs, **options), missing, key)
    quantized = dict.fromkeys(quantized_kernels(shapes), quantize_rows) if is_int8(dtype) else None
    model = fill(graphdef, plan.arrays(param_dtype, quantized), sharding, new)
    # With a new part it is a new model: the checkpoint's names, shards and what they leave out are not its own.
    model.layout = None if parts else plan.layout
    return model


def _has_pooler(survey: names.Survey, parts: Collection[str], asked: bool | None) -> bool:
    """Whether a `BertModel` has a pooler: as the caller asks, or if there is one to read or to make."""
    if "pooler" in parts and asked is False:
        raise InputError("fresh='pooler' and add_pooling_layer=False contradict each other; leave one of them out")
    return "pooler" in parts or bert.has_pooler(survey) if asked is None else asked


def _log(kind: type, survey: names.Survey, plan: bert.Plan, new: list[str], replaced: list[str]) -> None:
    """Says what of a checkpoint is not in the model, and what of the model is not from the checkpoint."""
    folder, left_out = survey.weights.folder, survey.weights.left_out
    unused = [name for name in plan.unused if name not in replaced]
    # A pooler is left out only where the caller asks for it; a head is left out because there is nowhere to put it.
    level = logging.WARNING if any("pooler" not in name for name in unused) else logging.INFO
    if left_out:
        logger.info("%s: left out: %s", folder, ", ".join(left_out))
    if unused:
        logger.log(level, "%s: not used by %s: %s", folder, kind.__name__, ", ".join(unused))
    if new:
        instead = f", in the place of {', '.join(replaced)}" if replaced else ""
        logger.warning("%s: new in %s, train before use: %s%s", folder, kind.__name__, ", ".join(new), instead)


def save_pretrained(
    model: Model,
    folder: str | Path,
    *,
    tokenizer: Tokenizer | None = None,
    dtype: DType | None = None,
    layout: Layout | None = None,
    max_shard_size: int | str | None = None,
    force: bool = False,
) -> None:
    """Writes a model as a Hugging Face folder: config.json, safetensors weights and, if given, the tokenizer's files.

    A model that was loaded from a checkpoint is written with that checkpoint's names, buffers and shards; a new one as
    transformers itself would write it. The folder appears complete or not at all.

    Args:
        model: the model.
        folder: the folder to make.
        tokenizer: a `Tokenizer` to save beside the weights.
        dtype: dtype to write; default: the parameters'.
        layout: names to write instead of the checkpoint's; `Layout()` is what transformers writes for a `BertModel`.
        max_shard_size: divide the weights into files of at most this size, in bytes or as "5GB".
        force: replace an existing model folder.

    Raises:
        SourceError: the folder exists already, or can't be written.
        CheckpointError: a parameter is NaN or infinite, or does not fit in `dtype`; or the model computes in int8, or
            has adapters.
    """
    with atomic_folder(folder, force=force) as temporary:
        write_model(model, temporary, tokenizer, dtype, layout or model.layout, max_shard_size)


def write_model(
    model: Model,
    folder: Path,
    tokenizer: Tokenizer | None,
    dtype: DType | None,
    layout: Layout | None,
    max_shard_size: int | str | None = None,
) -> None:
    """Writes configuration, weights and, if given, the tokenizer's files into a folder; see `save_pretrained`."""
    arrays = dict(parameters(model))
    if any(is_int8(array.dtype) for array in arrays.values()):
        raise CheckpointError(
            "a model in int8 does not have the weights that it was loaded from, and is not saved; copy or convert the "
            "original checkpoint, or load it with another dtype"
        )
    if any(path[-1] in ("lora_a", "lora_b") for path in arrays):
        raise CheckpointError(
            "a model with adapters is not saved as a whole; merge them first (bertjax.training.merge_lora), or write "
            "them alone (bertjax.training.save_adapter)"
        )
    tree = {path: to_dtype(path, np.asarray(array), dtype) for path, array in arrays.items()}
    tensors = bert.tensors_of(bert.slots_of({path: array.shape for path, array in tree.items()}), tree)
    config = model.config.to_hf() | {"architectures": [type(model).__name__]}
    write_config(folder, config, next(iter(tree.values())).dtype.name)
    targets.write_torch(folder, tensors, layout or standard_layout(tensors), max_shard_size)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)


def abstract(make: Callable[[], nnx.Module]) -> tuple[nnx.GraphDef, dict[rules.Path, rules.Shape]]:
    """A module's structure and the shapes of its parameters, without allocating any.

    Args:
        make: makes the module.
    """
    with shapes_only():
        module = nnx.eval_shape(make)
    return nnx.split(module)[0], {path: struct.shape for path, struct in parameters(module)}


def abstract_model(config: BertConfig, **options: Any) -> tuple[nnx.GraphDef, dict[rules.Path, rules.Shape]]:
    """`abstract` of a `BertModel` with these options."""
    return abstract(lambda: BertModel(config, rngs=nnx.Rngs(0), **options))


def fill(
    graphdef: nnx.GraphDef,
    read: Iterable[tuple[rules.Path, np.ndarray]],
    sharding: Any,
    new: Mapping[rules.Path, jax.Array] = MappingProxyType({}),
) -> Any:
    """A module of this structure, its parameters read, but for new ones, and placed one array at a time."""
    everything = itertools.chain(read, new.items())
    arrays = ((path, jax.device_put(array, sharding)) for path, array in everything)
    return nnx.merge(graphdef, rules.unflatten(arrays))


def parameters(model: nnx.Module) -> Iterable[tuple[rules.Path, Any]]:
    """Walks a model's parameters; yields each one's path and value."""
    return rules.flatten(nnx.to_pure_dict(nnx.state(model, nnx.Param)))


def to_dtype(path: rules.Path, array: np.ndarray, dtype: DType | None) -> np.ndarray:
    """A parameter as it is written. Raises `CheckpointError` if it is not finite, or not in `dtype`."""
    if not np.isfinite(array).all():
        raise CheckpointError(f"{'/'.join(path)} holds NaN or infinity; such a model can't be used and is not saved")
    if dtype is None or array.dtype == dtype:
        return array
    with np.errstate(over="ignore"):
        cast = array.astype(check_dtype("dtype", dtype))
    if not np.isfinite(cast).all():
        raise CheckpointError(f"{'/'.join(path)} does not fit in {jnp.dtype(dtype).name}; save it in a wider dtype")
    return cast


def write_config(folder: Path, config: Mapping[str, Any], dtype: str) -> None:
    """Writes config.json; where it names a dtype, it names the one that is written beside it."""
    config = dict(config) | {field: dtype for field in ("dtype", "torch_dtype") if field in config}
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
