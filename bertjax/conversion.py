"""Checkpoints from one format to another, with an account of every tensor."""

import contextlib
import dataclasses
import os
import shutil
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
from flax import nnx
from tqdm import tqdm

from bertjax import __version__, hub
from bertjax.atomic import atomic_file, atomic_folder, resolved
from bertjax.checkpoints import architecture, check_head_fields, config_file, match, open_checkpoint
from bertjax.config import BertConfig
from bertjax.convert import bert, certificate, files, names, rules, targets
from bertjax.convert.layout import Layout, standard_layout
from bertjax.convert.tensors import TensorToWrite, WeightFiles, inside
from bertjax.errors import CheckpointError, ConfigError, InputError, SourceError
from bertjax.heads import BertWithHeads
from bertjax.json_files import read_json
from bertjax.layers import DType
from bertjax.model import check_dtype
from bertjax.pretrained import abstract, abstract_model, write_config
from bertjax.side_files import copy_side_files, encoder_folder


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that was found to be a BERT, with or without heads; no tensor is read yet.

    Attributes:
        survey: its tensors by bertjax's names.
        config: its configuration.
        plan: which parameter each tensor is.
        untied: the decoder was untied against the configuration's word.
    """

    survey: names.Survey
    config: BertConfig
    plan: bert.Plan
    untied: bool = False

    @property
    def weights(self) -> WeightFiles:
        """Its files."""
        return self.survey.weights


@dataclasses.dataclass(frozen=True)
class Conversion:
    """What a conversion did.

    Attributes:
        checkpoint: what was read.
        target: the folder that was written.
        to: its format.
        dtype: the dtype that the weights were cast to, or None.
        layout: the names that were written.
    """

    checkpoint: Checkpoint
    target: Path
    to: str
    dtype: np.dtype | None
    layout: Layout

    def summary(self) -> str:
        """A report for a person to read: what was mapped, tied and left out, what was read and written."""
        weights = self.checkpoint.weights
        lines = [
            self.checkpoint.plan.summary(),
            f"left out {bert.a_few(weights.left_out, 5)}",
            f"cast     {'none' if self.dtype is None else f'the weights to {self.dtype.name}'}",
            f"read     {weights.format}, {bert.a_few(weights.files, 5)} of {weights.folder}, {weights.nbytes:,} bytes",
            f"written  {self.to}, {self.target}",
        ]
        if self.layout != self.checkpoint.plan.layout:
            lines.insert(-1, f"names    those of transformers, prefix {self.layout.prefix!r}")
        return "\n".join([*lines, *self._warnings()])

    def _warnings(self) -> list[str]:
        """What another library would do wrong with what was written, silently."""
        if self.to == "safetensors" and self.layout.prefix not in ("", "bert."):
            found = f"names that begin with {self.layout.prefix!r}"
            return [f"warning  transformers does not know {found} and would make the weights up; see --standard-names"]
        if self.to == "msgpack" and self.checkpoint.config.position_embedding_type != "absolute":
            return ["warning  FlaxBert takes relative positions for absolute ones, and computes something else"]
        return []


def read_checkpoint(
    path: Path, *, prefix: str | None = None, untie: bool = False, ignore: Iterable[str] = ()
) -> Checkpoint:
    """Finds a checkpoint's files and matches its tensors to a BERT with the heads that are there.

    Args:
        path: a model's folder, one of the weight files in it, or the prefix of a TensorFlow checkpoint.
        prefix: what stands before the encoder's names, for a file that holds several encoders.
        untie: see `convert_checkpoint`.
        ignore: unknown fields of the configuration that have no effect on the encoder.

    Raises:
        SourceError, ConfigError, CheckpointError: see `bertjax.pretrained.from_pretrained`.
    """
    config, survey = open_checkpoint(path, prefix=prefix, untie=untie, ignore=ignore)
    _check_architecture(config, survey)
    if bert.heads_in(survey):
        check_head_fields(config, survey.weights.folder)
    survey, plan = match(survey, _shapes(config, survey), untie)
    return Checkpoint(survey, config, plan, untie)


def _check_architecture(config: BertConfig, survey: names.Survey) -> None:
    """Refuses an architecture whose head is wholly absent; a part of a head is for `bert.match` to name."""
    kind = architecture(config)
    absent = sorted(set(kind.heads) - bert.heads_in(survey)) if kind else []
    if absent:
        raise CheckpointError(
            f"{survey.weights.folder}: the config's architecture is {kind.__name__}, but the weights have no "
            f'{" and no ".join(absent)} head; if the encoder is all there is, set architectures to ["BertModel"]'
        )


def _shapes(config: BertConfig, survey: names.Survey) -> dict[rules.Path, rules.Shape]:
    """The parameter tree of a BERT with the heads that the checkpoint has or its architecture needs."""
    heads, pooled, kind = bert.heads_in(survey), bert.has_pooler(survey), architecture(config)
    if kind is not None:
        heads, pooled = heads | set(kind.heads), pooled or kind.pooled
    if not heads:
        return abstract_model(config, add_pooling_layer=pooled)[1]
    options = {
        "add_pooling_layer": pooled,
        "tied": config.tie_word_embeddings or "predictions" not in heads,
        "num_labels": kind.labels if kind else None,
    }
    return abstract(lambda: BertWithHeads(config, tuple(sorted(heads)), rngs=nnx.Rngs(0), **options))[1]


def convert_checkpoint(
    source: str | Path,
    target: str | Path,
    *,
    to: str = "safetensors",
    dtype: DType | None = None,
    max_shard_size: int | str | None = None,
    standard_names: bool = False,
    untie: bool = False,
    certify: str | Path | None = None,
    progress: bool = False,
    force: bool = False,
    revision: str | None = None,
    prefix: str | None = None,
    ignore: Iterable[str] = (),
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
) -> Conversion:
    """Reads a checkpoint in any format, checks it against its configuration, and writes it in another.

    Names, dtypes and numbers of the tensors come out as they went in; where the format can't hold them (an alias, a
    buffer, a prefix), `bertjax_layout.json` beside the weights does, so that the way back gives the same file. The
    tokenizer and the sentence-transformers modules are copied, around an encoder that stands at the top. A few tensors
    are in memory at a time, except for Orbax, which takes all of them.

    Args:
        source: a model's folder, one of the weight files in it, the prefix of a TensorFlow checkpoint, or a repository
            on the Hub.
        target: the folder to make; it appears complete or not at all.
        to: "safetensors", as transformers reads it; "msgpack", as FlaxBert does; or "orbax", an Orbax checkpoint of
            bertjax's parameter tree in `params`.
        dtype: cast the weights; default: keep each tensor's dtype.
        max_shard_size: divide safetensors into files of at most this size, in bytes or as "5GB"; default: as the
            source is divided, if it is safetensors and its names are kept, or one file.
        standard_names: write the names that transformers itself writes, without repetitions and buffers, instead of the
            checkpoint's own.
        untie: keep a decoder that differs from the word embeddings, though the config ties the two, and say so in the
            config that is written.
        certify: where to write a certificate, a JSON file; see `bertjax.convert.certificate`.
        progress: show a bar on standard error when it takes longer than a few seconds.
        force: replace an existing model folder.
        revision: for the Hub: a branch, a tag or a commit.
        prefix: what stands before the encoder's tensor names, for a file that holds several encoders; the others are
            left out.
        ignore: unknown fields of config.json that the caller knows to have no effect on the encoder.
        token: see `hub.resolve`.
        cache_dir: see `hub.resolve`.
        local_files_only: see `hub.resolve`.

    Raises:
        SourceError, ConfigError, CheckpointError: see `bertjax.pretrained.from_pretrained`.
        InputError: an option is not usable.
    """
    if to not in targets.TARGETS:
        raise InputError(f"to={to!r} is not a format that is written; expected one of {', '.join(targets.TARGETS)}")
    if max_shard_size is not None and to != "safetensors":
        raise InputError(f"max_shard_size applies to safetensors, not to {to}")
    target = Path(target)
    place = resolved(target)
    path = hub.resolve(source, revision=revision, token=token, cache_dir=cache_dir, local_files_only=local_files_only)
    folder = path if path.is_dir() else path.parent
    if folder.resolve().is_relative_to(place):
        raise SourceError(f"{target}: is or holds the source, which is never replaced; choose another folder")
    if target.exists() and place.is_relative_to(folder.resolve()):
        raise SourceError(f"{target}: is a part of the source, which is never replaced; choose another folder")
    if certify is not None:
        _check_certificate_path(Path(certify), folder, target, force)
    path = encoder_folder(path) if path.is_dir() else path
    checkpoint = read_checkpoint(path, prefix=prefix, untie=untie, ignore=ignore)
    plan = checkpoint.plan
    layout = standard_layout([slot.name for slot in plan.slots]) if standard_names else plan.layout
    conversion = Conversion(checkpoint, target, to, None if dtype is None else check_dtype("dtype", dtype), layout)
    with contextlib.ExitStack() as outputs:
        proof = None if certify is None else outputs.enter_context(atomic_file(certify))
        temporary = outputs.enter_context(atomic_folder(target, force=force))
        _write_weights(conversion, temporary, max_shard_size, progress)
        _write_config(conversion, temporary)
        copy_side_files(folder, checkpoint.weights.folder, temporary)
        if proof is not None:
            proof.write_text(certificate.dumps(_certificate(conversion, temporary)) + "\n", encoding="utf-8")
    return conversion


def _check_certificate_path(path: Path, source: Path, target: Path, force: bool) -> None:
    """Refuses to put a certificate where it can't be, or in the place of something else."""
    found = resolved(path)
    if not path.parent.is_dir():
        raise SourceError(f"{path}: can't be written (there is no folder {path.parent})")
    if any(found.is_relative_to(os.path.realpath(folder)) for folder in (source, target)):
        raise SourceError(f"{path}: is inside the source or the target; put the certificate beside them")
    if path.exists() and not force:
        raise SourceError(f"{path}: already exists; choose another name, or replace it with force=True (or --force)")


def _write_weights(conversion: Conversion, folder: Path, max_shard_size: int | str | None, progress: bool) -> None:
    plan, layout, dtype = conversion.checkpoint.plan, conversion.layout, conversion.dtype
    total = conversion.checkpoint.weights.nbytes
    options = {"unit": "B", "unit_scale": True, "unit_divisor": 1000, "delay": 2.0, "desc": "converting"}
    with tqdm(total=total, disable=not progress, file=sys.stderr, **options) as bar:
        if conversion.to == "orbax":
            targets.write_tree(folder, plan, dtype, layout, bar.update)
            return
        tensors = {name: _reporting(tensor, bar.update) for name, tensor in plan.to_write(dtype).items()}
        if conversion.to == "msgpack":
            targets.write_flax(folder, tensors, layout)
            return
        targets.write_torch(folder, tensors, layout, max_shard_size)
    weights = conversion.checkpoint.weights
    same = dtype is None and max_shard_size is None and not plan.unused and not conversion.checkpoint.untied
    if layout.shards and same and weights.index and weights.format == files.FORMAT:
        # The same tensors in the same places: the same index, with whatever else it says.
        shutil.copyfile(inside(weights.folder, weights.index), folder / weights.index)


def _reporting(tensor: TensorToWrite, report: Callable[[int], Any]) -> TensorToWrite:
    """A tensor that reports its size when it is read."""

    def make() -> np.ndarray:
        data = tensor.make()
        report(tensor.nbytes)
        return data

    return dataclasses.replace(tensor, make=make)


def _write_config(conversion: Conversion, folder: Path) -> None:
    """Copies config.json byte for byte, or writes one where something in it has changed."""
    checkpoint = conversion.checkpoint
    source = config_file(checkpoint.weights.folder)
    google = source.name == "bert_config.json"
    if conversion.dtype is None and not checkpoint.untied and not google:
        shutil.copyfile(source, folder / "config.json")
        return
    config = checkpoint.config.to_hf() if google else read_json(source, ConfigError)
    if checkpoint.untied:
        config = config | {"tie_word_embeddings": False}
    dtypes = {info.dtype for info in checkpoint.plan.tensors}
    write_config(folder, config, (conversion.dtype or bert.widest(dtypes)).name)


def _certificate(conversion: Conversion, folder: Path) -> dict[str, Any]:
    checkpoint = conversion.checkpoint
    content = certificate.certify(
        checkpoint.plan,
        checkpoint.survey,
        folder,
        layout=conversion.layout,
        dtype=conversion.dtype,
        config=config_file(checkpoint.weights.folder),
    )
    return {"bertjax": __version__, **content}
