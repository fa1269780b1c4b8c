"""Folders to what takes text: models together with their tokenizers, and back."""

import dataclasses
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from bertjax import hub
from bertjax.atomic import atomic_folder
from bertjax.checkpoints import architecture, config_file, read_config
from bertjax.checks import check_count
from bertjax.convert import bert, rules, sources, targets
from bertjax.convert.layout import Layout
from bertjax.embedder import SentenceEncoder
from bertjax.errors import ConfigError, SourceError
from bertjax.folders import find
from bertjax.heads import BertForPreTraining
from bertjax.json_files import read_json
from bertjax.layers import DType
from bertjax.model import BertModel
from bertjax.pretrained import abstract, fill, from_pretrained, parameters, to_dtype, write_model
from bertjax.sentence import Dense, Normalize, SentenceModel
from bertjax.sentence_files import DenseSpec, read_spec, spec_files
from bertjax.tasks.base import Task
from bertjax.tokenizer import Tokenizer

AnyTask = TypeVar("AnyTask", bound=Task)


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
    attention: str = "auto",
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
        param_dtype: dtype of the encoder's parameters; default: `dtype`, and float32 for int8.
        attention: see `BertModel`.
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
            check_count(name, value, error=ConfigError)
    spec = dataclasses.replace(spec, **{name: value for name, value in asked.items() if value is not None})
    tokenizer = Tokenizer.from_folder(
        spec.transformer, normalizer=tokenizer_normalizer, do_lower_case=spec.do_lower_case
    )
    bert_model = from_pretrained(
        spec.transformer,
        BertModel,
        dtype=dtype,
        param_dtype=param_dtype,
        attention=attention,
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
    return fill(graphdef, plan.arrays(np.dtype(np.float32)), sharding)


def save_sentence_encoder(encoder: SentenceEncoder, folder: str | Path, *, force: bool = False) -> None:
    """Writes a sentence-transformers folder, which that library reads from version 2 on.

    A pooler, which the checkpoint may have had and vectors are made without, is not loaded and not written.

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
        write_model(model.bert, temporary, encoder.tokenizer, None, model.bert.layout)
        _write_json(temporary, spec_files(encoder.spec, model.config.hidden_size, encoder.max_seq_length))
        for position, module in enumerate(model.modules, start=2):
            if isinstance(module, Dense):
                _write_dense(module, temporary / f"{position}_Dense")


def save_task(task: Task, folder: str | Path, *, force: bool = False) -> None:
    """Writes a Hugging Face folder of a task's model and tokenizer, with all that its answers depend on.

    A cross-encoder's and a sparse encoder's are folders of sentence-transformers, too.

    Args:
        task: the task; its longest input is written down as the tokenizer's model_max_length.
        folder: the folder to make; it appears complete or not at all.
        force: replace an existing model folder.

    Raises:
        SourceError: the folder exists already, or can't be written.
        CheckpointError: see `save_pretrained`.
    """
    with atomic_folder(folder, force=force) as temporary:
        write_model(task.model, temporary, None, None, task.model.layout)
        task.tokenizer.save_pretrained(temporary, model_max_length=task.max_length)
        files = task.folder_files()
        added = files.pop("config.json", {})
        if added:
            files["config.json"] = read_json(temporary / "config.json", ConfigError) | added
        _write_json(temporary, files)


def _write_json(folder: Path, files: Mapping[str, Any]) -> None:
    for name, content in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _write_dense(module: Dense, folder: Path) -> None:
    tree = {path: to_dtype(path, np.asarray(array), None) for path, array in parameters(module)}
    slots = rules.expand(bert.DENSE_TABLE, {path: array.shape for path, array in tree.items()})
    targets.write_torch(folder, bert.tensors_of(slots, tree), Layout())


def load_tokenizer(
    path_or_hub_id: str | Path,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
    **options: Any,
) -> Tokenizer:
    """Loads a tokenizer alone; of a repository on the Hub only small files are fetched.

    Args:
        path_or_hub_id: a model's folder, or a repository on the Hub.
        revision: see `hub.resolve`.
        token: see `hub.resolve`.
        cache_dir: see `hub.resolve`.
        local_files_only: see `hub.resolve`.
        **options: see `Tokenizer.from_folder`, also for the errors.

    Raises:
        SourceError: there is no such folder or repository, or the Hub can't be reached.
    """
    folder = hub.resolve(
        path_or_hub_id,
        revision=revision,
        token=token,
        cache_dir=cache_dir,
        local_files_only=local_files_only,
        weights=False,
    )
    return Tokenizer.from_folder(folder, **options)


def load_task(
    path_or_hub_id: str | Path,
    task: type[AnyTask],
    *,
    revision: str | None = None,
    dtype: DType = jnp.float32,
    param_dtype: DType | None = None,
    attention: str = "auto",
    sharding: jax.sharding.Sharding | jax.Device | None = None,
    tokenizer_normalizer: str | None = None,
    ignore: Iterable[str] = (),
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
    **options: Any,
) -> AnyTask:
    """Loads the model that a task needs, and its tokenizer.

    Args:
        path_or_hub_id: a model's folder, or a repository on the Hub.
        task: the class of the task.
        revision: see `from_pretrained`.
        dtype: see `BertModel`.
        param_dtype: dtype of the parameters; default: `dtype`, and float32 for int8.
        attention: see `BertModel`.
        sharding: see `from_pretrained`.
        tokenizer_normalizer: which of the tokenizer's files to believe where they disagree; see `Tokenizer`.
        ignore: see `from_pretrained`.
        token: see `hub.resolve`.
        cache_dir: see `hub.resolve`.
        local_files_only: see `hub.resolve`.
        **options: more arguments for the class, such as max_length; they win over what the folder says.

    Raises:
        SourceError, ConfigError, CheckpointError: see `from_pretrained`; or the folder asks for what the task does
            not do.
        TokenizerError: the tokenizer's files are malformed or contradict one another.
    """
    path = hub.resolve(
        path_or_hub_id, revision=revision, token=token, cache_dir=cache_dir, local_files_only=local_files_only
    )
    found = task.read_folder(path if path.is_dir() else path.parent)
    _check_class(task, found.transformer, ignore)
    model = from_pretrained(
        found.transformer if path.is_dir() else path,
        task.kind,
        dtype=dtype,
        param_dtype=param_dtype,
        attention=attention,
        sharding=sharding,
        ignore=ignore,
    )
    tokenizer = Tokenizer.from_folder(
        found.transformer, normalizer=tokenizer_normalizer, do_lower_case=found.do_lower_case
    )
    given = {name: value for name, value in options.items() if value is not None}
    return task(model, tokenizer, **{**found.options, **given}, source=found.transformer)


def _check_class(task: type[Task], folder: Path, ignore: Iterable[str]) -> None:
    """Refuses a model of another class, whose tensors may happen to fit: a tagger's pass for a text classifier's."""
    if not config_file(folder).exists():
        return  # the error that follows says best what is missing
    named = architecture(read_config(folder, ignore))
    if named in (None, task.kind) or (named is BertForPreTraining and set(task.kind.heads) <= set(named.heads)):
        return
    raise ConfigError(f"{folder}: is a {named.__name__}, and {task.__name__} takes a {task.kind.__name__}")
