"""Says what a model or a checkpoint is: its parameters under their PyTorch names, its sizes, its files."""

from collections.abc import Iterable
from pathlib import Path

import jax
import numpy as np

from bertjax import hub
from bertjax.checkpoints import architecture, class_of
from bertjax.conversion import Checkpoint, read_checkpoint
from bertjax.convert import bert
from bertjax.cross_encoder_files import CrossEncoderSpec
from bertjax.errors import ConfigError, InputError
from bertjax.folders import find
from bertjax.heads import BertWithHeads
from bertjax.model import BertModel
from bertjax.pretrained import parameters
from bertjax.sentence_files import SentenceSpec
from bertjax.sparse_files import SparseSpec
from bertjax.specs import read_any_spec


def named_parameters(model: BertModel) -> dict[str, jax.ShapeDtypeStruct]:
    """Lists a model's parameters under their PyTorch names, with their PyTorch shapes and their dtypes.

    Stacked arrays are listed layer by layer: BERT-base has 199 tensors. Raises `InputError` for another module.
    """
    if not isinstance(model, BertModel | BertWithHeads):
        raise InputError(f"expected a BertModel, not a {type(model).__name__}; of an encoder pass encoder.model.bert")
    arrays = dict(parameters(model))
    slots = bert.slots_of({path: array.shape for path, array in arrays.items()})
    return {slot.name: jax.ShapeDtypeStruct(slot.shape, arrays[slot.path].dtype) for slot in slots}


def parameter_table(model: BertModel) -> str:
    """A printable table of `named_parameters`, with the total."""
    parameters = named_parameters(model)
    width = max(map(len, parameters))
    lines = [f"{name:<{width}}  {struct.dtype.name} {list(struct.shape)}" for name, struct in parameters.items()]
    total = sum(int(np.prod(struct.shape, dtype=np.int64)) for struct in parameters.values())
    return "\n".join([*lines, f"{len(parameters)} tensors, {total:,} parameters"])


def describe(
    path_or_hub_id: str | Path,
    *,
    list_parameters: bool = False,
    prefix: str | None = None,
    revision: str | None = None,
    ignore: Iterable[str] = (),
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
) -> str:
    """Says what a checkpoint is, from its configuration and its files' headers; no weights are read.

    Args:
        path_or_hub_id: a folder, or a repository on the Hub.
        list_parameters: also list every tensor.
        prefix: what stands before the encoder's tensor names, for a file that holds several encoders.
        revision: for the Hub: a branch, a tag or a commit.
        ignore: see `from_pretrained`.
        token: see `hub.resolve`.
        cache_dir: see `hub.resolve`.
        local_files_only: see `hub.resolve`.

    Raises:
        SourceError, ConfigError, CheckpointError: see `from_pretrained`.
    """
    path = hub.resolve(
        path_or_hub_id, revision=revision, token=token, cache_dir=cache_dir, local_files_only=local_files_only
    )
    spec = read_any_spec(path) if path.is_dir() and find(path, "modules.json") else None
    checkpoint = read_checkpoint(path if spec is None else spec.transformer, prefix=prefix, ignore=ignore)
    config, plan, weights = checkpoint.config, checkpoint.plan, checkpoint.weights
    total = sum(tensor.count for tensor in plan.tensors)
    dtypes = ", ".join(sorted({tensor.dtype.name for tensor in plan.tensors}))
    lines = [
        f"path       {path}",
        f"encoder    BERT, {config.num_hidden_layers} layers, hidden {config.hidden_size}, "
        f"{config.num_attention_heads} heads, feed-forward {config.intermediate_size}, {config.hidden_act}",
        f"inputs     vocabulary {config.vocab_size}, {config.max_position_embeddings} positions, "
        f"{config.type_vocab_size} token type(s)",
        f"parameters {len(plan.tensors)} tensors, {total:,} parameters, {dtypes}, "
        f"{'with' if bert.has_pooler(checkpoint.survey) else 'without'} pooler",
        f"heads      {', '.join(sorted(bert.heads_in(checkpoint.survey))) or 'none'}",
        f"class      {_describe_class(checkpoint)}",
        f"labels     {_describe_labels(checkpoint)}",
        f"files      {weights.format}, {', '.join(weights.files[:8])}, {weights.nbytes / 1e6:.1f} MB",
        f"unused     {', '.join(plan.unused) or 'none'}",
        _describe_use(spec),
    ]
    if list_parameters:
        lines += [f"{slot.name} {tensor.dtype.name}{list(slot.shape)}" for slot, tensor in plan.pairs()]
    return "\n".join(lines)


def _describe_class(checkpoint: Checkpoint) -> str:
    try:
        return class_of(checkpoint.config, checkpoint.survey).__name__
    except ConfigError as problem:
        return f"not settled: {problem}"


def _describe_labels(checkpoint: Checkpoint) -> str:
    kind = architecture(checkpoint.config)
    if "classifier" not in bert.heads_in(checkpoint.survey) or (kind and kind.labels):
        return "none"
    try:
        names = checkpoint.config.id2label
    except ConfigError as problem:
        return f"unusable: {problem}"
    return f"{len(names)}: {bert.a_few(names.values())}"


def _describe_use(spec: SentenceSpec | SparseSpec | CrossEncoderSpec | None) -> str:
    if spec is None:
        return "sentences  nothing says how to pool (no modules.json); pass pooling= or --pooling"
    if isinstance(spec, CrossEncoderSpec):
        return f"pairs      cross-encoder, {_describe_limit(spec)}, activation {spec.activation or 'by the labels'}"
    if isinstance(spec, SparseSpec):
        return f"sparse     SPLADE, {spec.pooling_strategy}, {spec.activation_function}; {_describe_limit(spec)}"
    steps = ["Normalize" if module is None else f"Dense to {module.out_features}" for module in spec.modules]
    named = [repr(name) for name, text in spec.prompts.items() if text]
    prompts = f"prompts {', '.join(named)}" if named else "no prompts"
    pooling = ", ".join([f"pooling {' + '.join(spec.pooling)}", *steps])
    return f"sentences  {pooling}; {_describe_limit(spec)}; {prompts}"


def _describe_limit(spec: SentenceSpec | SparseSpec | CrossEncoderSpec) -> str:
    return f"at most {spec.max_seq_length} tokens" if spec.max_seq_length else "as long as positions allow"
