"""Checkpoints to models and back: the only place where models, the Hub and the converter meet."""

import json
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from bertjax import hub
from bertjax.atomic import atomic_folder
from bertjax.config import BertConfig, read_json_object
from bertjax.convert import bert, files, rules
from bertjax.errors import CheckpointError
from bertjax.layers import DType
from bertjax.model import BertModel, check_dtype

#: Files that belong to a model but hold no encoder weights; a conversion copies them byte for byte.
_SIDE_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.txt",
    "modules.json",
    "config_sentence_transformers.json",
    "sentence_*_config.json",
    "[0-9]_*/*.json",
    "[0-9]_*/model.safetensors",
)


def load_model(
    path_or_hub_id: str | Path,
    *,
    revision: str | None = None,
    dtype: DType = jnp.float32,
    param_dtype: DType | None = None,
    add_pooling_layer: bool | None = None,
    remat: bool = False,
    unroll: int | bool = 1,
    sharding: jax.sharding.Sharding | jax.Device | None = None,
    prefix: str | None = None,
    ignore: Iterable[str] = (),
    **hub_options: Any,
) -> BertModel:
    """Loads BERT's encoder from a folder or from the Hub.

    Tensors are read, converted and placed on the device one array at a time; nothing is initialised first, so the
    peak memory stays near one copy of the weights.

    Args:
        path_or_hub_id: a folder in Hugging Face's layout, or a repository on the Hub.
        revision: for the Hub: a branch, a tag or a commit.
        dtype: dtype of the matmuls' inputs; see `BertModel`.
        param_dtype: dtype of the parameters; default: `dtype`.
        add_pooling_layer: whether the model has a pooler; default: if the checkpoint has one.
        remat: see `BertModel`.
        unroll: see `BertModel`.
        sharding: where the parameters go: a device, or a sharding that fits every one of them; default: JAX's default
            device.
        prefix: what stands before the encoder's tensor names, for a file that holds several encoders.
        ignore: unknown fields of config.json that the caller knows to have no effect on the encoder.
        **hub_options: token, cache_dir, local_files_only; see `hub.resolve`.

    Raises:
        SourceError: files are missing or can't be read or fetched.
        ConfigError: the configuration is not a BERT encoder's, or not usable.
        CheckpointError: the tensors do not form the model. One error names every problem.
    """
    folder = hub.resolve(path_or_hub_id, revision=revision, **hub_options)
    config = BertConfig.from_file(folder / "config.json", ignore=ignore)
    dtype = check_dtype("dtype", dtype)
    param_dtype = dtype if param_dtype is None else check_dtype("param_dtype", param_dtype)
    weights = files.open_weights(folder)
    pooled = bert.has_pooler(weights) if add_pooling_layer is None else add_pooling_layer
    options = {"dtype": dtype, "param_dtype": param_dtype, "remat": remat, "unroll": unroll}
    graphdef, shapes = _abstract(config, add_pooling_layer=pooled, **options)
    plan = bert.match(weights, shapes, prefix)
    arrays = ((path, jax.device_put(array, sharding)) for path, array in plan.arrays(param_dtype))
    model = nnx.merge(graphdef, rules.unflatten(arrays))
    model.layout = plan.layout
    return model


def save_model(
    model: BertModel,
    folder: str | Path,
    *,
    tokenizer: Any = None,
    dtype: DType | None = None,
    layout: bert.Layout | None = None,
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
        layout: names to write instead of the checkpoint's; `Layout()` is what transformers writes.
        force: replace an existing model folder.

    Raises:
        SourceError: the folder exists already, or can't be written.
        CheckpointError: a parameter does not fit in `dtype`.
    """
    layout = layout or model.layout or bert.Layout()
    tree = {path: _to_dtype(path, np.asarray(array), dtype) for path, array in _parameters(model)}
    slots = rules.expand(bert.TABLE, {path: array.shape for path, array in tree.items()})
    config = model.config.to_hf() | {"architectures": ["BertModel"]}
    with atomic_folder(folder, force=force) as temporary:
        _write_config(temporary, config, tree.values())
        _write_weights(temporary, bert.export(slots, tree, layout), layout)
        if tokenizer is not None:
            tokenizer.save_pretrained(temporary)


def convert_checkpoint(
    source: str | Path,
    target: str | Path,
    *,
    dtype: DType | None = None,
    force: bool = False,
    revision: str | None = None,
    prefix: str | None = None,
    ignore: Iterable[str] = (),
    **hub_options: Any,
) -> bert.Plan:
    """Reads a checkpoint folder, maps it to bertjax's parameter tree, and writes it back as a Hugging Face folder.

    Names, dtypes and bytes of the tensors come out as they went in. Tensors of heads, which the encoder has no use
    for, the tokenizer and the sentence-transformers modules are copied unchanged.

    Args:
        source: a folder or a repository on the Hub.
        target: the folder to make.
        dtype: cast the encoder's weights; default: keep each tensor's dtype.
        force: replace an existing model folder.
        revision: for the Hub: a branch, a tag or a commit.
        prefix: what stands before the encoder's tensor names, for a file that holds several encoders.
        ignore: unknown fields of config.json that the caller knows to have no effect on the encoder.
        **hub_options: token, cache_dir, local_files_only; see `hub.resolve`.

    Returns:
        What was mapped to what; `Plan.summary` prints it.

    Raises:
        SourceError, ConfigError, CheckpointError: see `load_model`.
    """
    folder = hub.resolve(source, revision=revision, **hub_options)
    config = BertConfig.from_file(folder / "config.json", ignore=ignore)
    weights = files.open_weights(folder)
    _, shapes = _abstract(config, add_pooling_layer=bert.has_pooler(weights))
    plan = bert.match(weights, shapes, prefix)
    with atomic_folder(target, force=force) as temporary:
        tree = dict(plan.arrays(None if dtype is None else check_dtype("dtype", dtype)))
        kept = {} if dtype is not None else {tensor.name: tensor.dtype for tensor in plan.tensors}
        unused = [
            files.TensorToWrite(info.name, info.dtype, info.shape, info.read)
            for info in (weights.tensors[name] for name in plan.unused)
        ]
        if dtype is None:
            shutil.copyfile(folder / "config.json", temporary / "config.json")
        else:
            _write_config(temporary, read_json_object(folder / "config.json"), tree.values())
        _write_weights(temporary, [*bert.export(plan.slots, tree, plan.layout, kept), *unused], plan.layout)
        _copy_side_files(folder, temporary)
    return plan


def functional(model: nnx.Module) -> tuple[Any, dict]:
    """Splits a model into a pure function and its parameters, for use inside a JAX program.

    Returns:
        `apply` and `params`: `apply(params, *args, **kwargs)` computes `model(*args, **kwargs)`, has no side effects
        and composes with `jit`, `grad`, `vmap` and `shard_map`; `params` is a nested dict of arrays.
    """
    graphdef, state = nnx.split(model)

    def apply(params: dict, *args: Any, **kwargs: Any) -> Any:
        return nnx.merge(graphdef, params)(*args, **kwargs)

    return apply, nnx.to_pure_dict(state)


def named_parameters(model: BertModel) -> dict[str, jax.ShapeDtypeStruct]:
    """Lists a model's parameters under their PyTorch names, with their PyTorch shapes and their dtypes.

    Stacked arrays are listed layer by layer: BERT-base has 199 tensors.
    """
    arrays = dict(_parameters(model))
    slots = rules.expand(bert.TABLE, {path: array.shape for path, array in arrays.items()})
    return {slot.name: jax.ShapeDtypeStruct(slot.shape, arrays[slot.path].dtype) for slot in slots}


def parameter_table(model: BertModel) -> str:
    """A printable table of `named_parameters`, with the total."""
    parameters = named_parameters(model)
    width = max(map(len, parameters))
    lines = [f"{name:<{width}}  {struct.dtype.name} {list(struct.shape)}" for name, struct in parameters.items()]
    total = sum(int(np.prod(struct.shape, dtype=np.int64)) for struct in parameters.values())
    return "\n".join([*lines, f"{len(parameters)} tensors, {total:,} parameters"])


def _abstract(config: BertConfig, **options: Any) -> tuple[nnx.GraphDef, dict[rules.Path, rules.Shape]]:
    """A model's structure and the shapes of its parameters, without allocating any."""
    model = nnx.eval_shape(lambda: BertModel(config, rngs=nnx.Rngs(0), **options))
    return nnx.split(model)[0], {path: struct.shape for path, struct in _parameters(model)}


def _parameters(model: nnx.Module) -> Iterable[tuple[rules.Path, Any]]:
    return rules.flatten(nnx.to_pure_dict(nnx.state(model, nnx.Param)))


def _to_dtype(path: rules.Path, array: np.ndarray, dtype: DType | None) -> np.ndarray:
    if dtype is None or array.dtype == dtype:
        return array
    with np.errstate(over="ignore"):
        cast = array.astype(check_dtype("dtype", dtype))
    if np.isfinite(array).all() and not np.isfinite(cast).all():
        raise CheckpointError(f"{'/'.join(path)} does not fit in {jnp.dtype(dtype).name}; save it in a wider dtype")
    return cast


def _write_config(folder: Path, config: Mapping[str, Any], arrays: Iterable[np.ndarray]) -> None:
    """Writes config.json; where it names a dtype, it names the one that is written beside it."""
    dtype = next(iter(arrays)).dtype.name
    config = dict(config) | {field: dtype for field in ("dtype", "torch_dtype") if field in config}
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _write_weights(folder: Path, tensors: list[files.TensorToWrite], layout: bert.Layout) -> None:
    """Writes one file, or the shards that the layout names and their index."""
    metadata = dict(layout.metadata)
    if not layout.shards:
        files.write_safetensors(folder / files.SINGLE_FILE, tensors, metadata)
        return
    weight_map = dict(layout.shards)
    for shard in sorted(set(weight_map.values())):
        in_shard = [tensor for tensor in tensors if weight_map[tensor.name] == shard]
        files.write_safetensors(folder / shard, in_shard, metadata)
    total = sum(int(np.prod(tensor.shape, dtype=np.int64)) * tensor.dtype.itemsize for tensor in tensors)
    index = {"metadata": {"total_size": total}, "weight_map": {name: weight_map[name] for name in sorted(weight_map)}}
    (folder / files.INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _copy_side_files(source: Path, target: Path) -> None:
    for pattern in _SIDE_FILES:
        for path in sorted(source.glob(pattern)):
            destination = target / path.relative_to(source)
            destination.parent.mkdir(exist_ok=True)
            shutil.copyfile(path, destination)
