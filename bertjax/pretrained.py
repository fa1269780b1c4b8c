"""Checkpoints to models and back: the only place where models, the Hub and the converter meet."""

import dataclasses
import json
import logging
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from bertjax import hub
from bertjax.atomic import atomic_folder
from bertjax.config import BertConfig
from bertjax.convert import bert, names, rules, sources, targets
from bertjax.convert.layout import Layout, standard_layout
from bertjax.embedder import SentenceEncoder, check_positive
from bertjax.errors import CheckpointError, ConfigError, InputError, SourceError
from bertjax.folders import find
from bertjax.layers import DType
from bertjax.model import BertModel, check_dtype
from bertjax.sentence import Dense, Normalize, SentenceModel
from bertjax.sentence_files import DenseSpec, read_spec, spec_files
from bertjax.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

#: `BertModel` or a model with a head.
Model = TypeVar("Model", bound=nnx.Module)


def from_pretrained(
    path_or_hub_id: str | Path,
    kind: type[Model] = BertModel,
    *,
    revision: str | None = None,
    dtype: DType = jnp.float32,
    param_dtype: DType | None = None,
    add_pooling_layer: bool | None = None,
    remat: bool = False,
    unroll: int | bool = 1,
    sharding: jax.sharding.Sharding | jax.Device | None = None,
    prefix: str | None = None,
    untie: bool = False,
    ignore: Iterable[str] = (),
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
) -> Model:
    """Loads BERT's encoder, or BERT with a head, from a folder or from the Hub, whatever the format of the weights.

    Tensors are read, converted and placed on the device one array at a time; nothing is initialised first, so the
    peak memory stays near one copy of the weights.

    Args:
        path_or_hub_id: a model's folder, one of the weight files in it, the prefix of a TensorFlow checkpoint, or a
            repository on the Hub.
        kind: the class to load: `BertModel` or one of `bertjax.heads`, whose head the checkpoint must have.
        revision: for the Hub: a branch, a tag or a commit.
        dtype: dtype of the matmuls' inputs; see `BertModel`.
        param_dtype: dtype of the parameters; default: `dtype`.
        add_pooling_layer: whether a `BertModel` has a pooler; default: if the checkpoint has one.
        remat: see `BertModel`.
        unroll: see `BertModel`.
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
        ConfigError: the configuration is not a BERT encoder's, or not usable.
        CheckpointError: the tensors do not form the model. One error names every problem.
    """
    path = hub.resolve(
        path_or_hub_id, revision=revision, token=token, cache_dir=cache_dir, local_files_only=local_files_only
    )
    dtype = check_dtype("dtype", dtype)
    param_dtype = dtype if param_dtype is None else check_dtype("param_dtype", param_dtype)
    # The weights first: their format tells most plainly what a folder is.
    weights = sources.open_weights(path)
    config = read_config(weights.folder, ignore)
    survey = names.survey(weights, prefix)
    options = {"dtype": dtype, "param_dtype": param_dtype, "remat": remat, "unroll": unroll}
    if kind is BertModel:
        options["add_pooling_layer"] = bert.has_pooler(survey) if add_pooling_layer is None else add_pooling_layer
    elif add_pooling_layer is not None:
        raise InputError(f"add_pooling_layer applies to BertModel; whether {kind.__name__} has a pooler is settled")
    else:
        check_head_fields(config, weights.folder)
    if untie:
        config, survey = untied(config, survey)
    graphdef, shapes = abstract(lambda: kind(config, rngs=nnx.Rngs(0), **options))
    plan = bert.match(survey, shapes)
    # A pooler is left out only where the caller asks for it; a head is left out because there is nowhere to put it.
    level = logging.WARNING if any("pooler" not in name for name in plan.unused) else logging.INFO
    if weights.left_out:
        logger.info("%s: left out: %s", weights.folder, ", ".join(weights.left_out))
    if plan.unused:
        logger.log(level, "%s: not used by %s: %s", weights.folder, kind.__name__, ", ".join(plan.unused))
    model = _fill(graphdef, plan, param_dtype, sharding)
    model.layout = plan.layout
    return model


def read_config(folder: Path, ignore: Iterable[str] = ()) -> BertConfig:
    """Reads a folder's config.json or, as Google's checkpoints have it, bert_config.json; see `BertConfig.from_hf`."""
    return BertConfig.from_file(config_file(folder), ignore=ignore)


def untied(config: BertConfig, survey: names.Survey) -> tuple[BertConfig, names.Survey]:
    """A checkpoint whose masked-language-model head has a decoder of its own, whatever its configuration says."""
    extra = {**config.extra, "tie_word_embeddings": False}
    return dataclasses.replace(config, extra=extra), survey.with_decoder_bias()


def check_head_fields(config: BertConfig, folder: Path) -> None:
    """Asks for what a head needs of a configuration, so that an unusable value is an error that names the file."""
    try:
        _ = config.num_labels, config.classifier_dropout, config.tie_word_embeddings
    except ConfigError as problem:
        raise ConfigError(f"{config_file(folder)}: {problem}") from None


def config_file(folder: Path) -> Path:
    """The folder's configuration file, which need not exist."""
    found = find(folder, "config.json") or find(folder, "bert_config.json")
    return found or folder / "config.json"


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
        CheckpointError: a parameter is NaN or infinite, or does not fit in `dtype`.
    """
    with atomic_folder(folder, force=force) as temporary:
        _write_model(model, temporary, tokenizer, dtype, layout or model.layout, max_shard_size)


def _write_model(
    model: Model,
    folder: Path,
    tokenizer: Tokenizer | None,
    dtype: DType | None,
    layout: Layout | None,
    max_shard_size: int | str | None = None,
) -> None:
    tree = {path: _to_dtype(path, np.asarray(array), dtype) for path, array in parameters(model)}
    tensors = bert.tensors_of(bert.slots_of({path: array.shape for path, array in tree.items()}), tree)
    config = model.config.to_hf() | {"architectures": [type(model).__name__]}
    write_config(folder, config, next(iter(tree.values())).dtype.name)
    targets.write_torch(folder, tensors, layout or standard_layout(tensors), max_shard_size)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)


def load_sentence_encoder(
    path_or_hub_id: str | Path,
    *,
    pooling: str | tuple[str, ...] | None = None,
    max_seq_length: int | None = None,
    truncate_dim: int | None = None,
    step_tokens: int | None = None,
    revision: str | None = None,
    dtype: DType = jnp.float32,
    param_dtype: DType | None = None,
    sharding: jax.sharding.Sharding | jax.Device | None = None,
    tokenizer_normalizer: str | None = None,
    ignore: Iterable[str] = (),
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
) -> SentenceEncoder:
    """Loads a sentence-transformers folder, or any BERT folder if `pooling` says how to pool.

    Args:
        path_or_hub_id: a folder, or a repository on the Hub.
        pooling: pooling mode(s) in the place of the folder's; needed where it has no modules.json.
        max_seq_length: longest text in tokens, in the place of the folder's; longer texts lose their end.
        truncate_dim: keep only that many leading numbers of every vector, in the place of the folder's.
        step_tokens: see `SentenceEncoder`.
        revision: see `from_pretrained`.
        dtype: see `BertModel`.
        param_dtype: dtype of the encoder's parameters; default: `dtype`.
        sharding: see `from_pretrained`.
        tokenizer_normalizer: which of the tokenizer's files to believe where they disagree; see `Tokenizer`.
        ignore: see `from_pretrained`.
        token: see `hub.resolve`.
        cache_dir: see `hub.resolve`.
        local_files_only: see `hub.resolve`.

    Raises:
        SourceError, ConfigError, CheckpointError: see `from_pretrained`.
        TokenizerError: the tokenizer's files are malformed or contradict one another.
        InputError: the vectors have fewer than `truncate_dim` numbers.
    """
    folder = hub.resolve(
        path_or_hub_id, revision=revision, token=token, cache_dir=cache_dir, local_files_only=local_files_only
    )
    if not folder.is_dir():
        raise SourceError(f"{folder}: is a file, expected a model's folder, which also says how to pool")
    if not find(folder, "modules.json"):
        # What is no BERT at all is told so, before anybody is asked how to pool it.
        sources.open_weights(folder)
        read_config(folder, ignore)
    spec = read_spec(folder, pooling)
    asked = {"max_seq_length": max_seq_length, "truncate_dim": truncate_dim}
    for name, value in asked.items():
        if value is not None:
            check_positive(name, value)
    spec = dataclasses.replace(spec, **{name: value for name, value in asked.items() if value is not None})
    tokenizer = Tokenizer.from_folder(
        spec.transformer, normalizer=tokenizer_normalizer, do_lower_case=spec.do_lower_case
    )
    bert_model = from_pretrained(
        spec.transformer,
        dtype=dtype,
        param_dtype=param_dtype,
        add_pooling_layer=False,
        sharding=sharding,
        ignore=ignore,
    )
    width = len(spec.pooling) * bert_model.config.hidden_size
    modules = []
    for module in spec.modules:
        if module is not None:
            modules.append(_load_dense(module, width, sharding))
            width = module.out_features
        else:
            modules.append(Normalize())
    model = SentenceModel(bert_model, pooling=spec.pooling, include_prompt=spec.include_prompt, modules=tuple(modules))
    encoder = SentenceEncoder(model, tokenizer, spec, step_tokens=step_tokens)
    encoder.output_dimension(truncate_dim)  # refuses more numbers than there are; a folder may say more and mean all
    return encoder


def _load_dense(spec: DenseSpec, width: int, sharding: Any) -> Dense:
    """Loads a Dense module, whose input is `width` numbers wide."""
    if spec.in_features != width:
        raise ConfigError(f"{spec.folder}: in_features is {spec.in_features}, what comes before it gives {width}")
    options = {"use_bias": spec.use_bias, "activation": spec.activation, "use_residual": spec.use_residual}
    graphdef, shapes = abstract(lambda: Dense(spec.in_features, spec.out_features, rngs=nnx.Rngs(0), **options))
    plan = bert.match_exactly(sources.open_weights(spec.folder), rules.expand(bert.DENSE_TABLE, shapes))
    return _fill(graphdef, plan, np.dtype(np.float32), sharding)


def save_sentence_encoder(encoder: SentenceEncoder, folder: str | Path, *, force: bool = False) -> None:
    """Writes a sentence-transformers folder, which that library reads from version 2 on.

    Args:
        encoder: the encoder.
        folder: the folder to make; it appears complete or not at all.
        force: replace an existing model folder.

    Raises:
        SourceError: the folder exists already, or can't be written.
        CheckpointError: a parameter is NaN or infinite.
    """
    model = encoder.model
    with atomic_folder(folder, force=force) as temporary:
        _write_model(model.bert, temporary, encoder.tokenizer, None, model.bert.layout)
        for name, content in spec_files(encoder.spec, model.config.hidden_size, encoder.max_seq_length).items():
            (temporary / name).parent.mkdir(exist_ok=True)
            (temporary / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        for position, module in enumerate(model.modules, start=2):
            if isinstance(module, Dense):
                _write_dense(module, temporary / f"{position}_Dense")


def _write_dense(module: Dense, folder: Path) -> None:
    tree = {path: _to_dtype(path, np.asarray(array), None) for path, array in parameters(module)}
    slots = rules.expand(bert.DENSE_TABLE, {path: array.shape for path, array in tree.items()})
    targets.write_torch(folder, bert.tensors_of(slots, tree), Layout())


def abstract(make: Callable[[], nnx.Module]) -> tuple[nnx.GraphDef, dict[rules.Path, rules.Shape]]:
    """A module's structure and the shapes of its parameters, without allocating any.

    Args:
        make: makes the module.
    """
    module = nnx.eval_shape(make)
    return nnx.split(module)[0], {path: struct.shape for path, struct in parameters(module)}


def abstract_model(config: BertConfig, **options: Any) -> tuple[nnx.GraphDef, dict[rules.Path, rules.Shape]]:
    """`abstract` of a `BertModel` with these options."""
    return abstract(lambda: BertModel(config, rngs=nnx.Rngs(0), **options))


def _fill(graphdef: nnx.GraphDef, plan: bert.Plan, dtype: np.dtype, sharding: Any) -> Any:
    """A module of this structure, its parameters read and placed one array at a time."""
    arrays = ((path, jax.device_put(array, sharding)) for path, array in plan.arrays(dtype))
    return nnx.merge(graphdef, rules.unflatten(arrays))


def parameters(model: nnx.Module) -> Iterable[tuple[rules.Path, Any]]:
    """Walks a model's parameters; yields each one's path and value."""
    return rules.flatten(nnx.to_pure_dict(nnx.state(model, nnx.Param)))


def _to_dtype(path: rules.Path, array: np.ndarray, dtype: DType | None) -> np.ndarray:
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
