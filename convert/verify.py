"""`python -m convert.verify SRC`: torch and bertjax side by side on the same inputs.

Prints the largest difference after the embeddings, after each layer, and in the outputs. Needs torch and transformers.
"""

import sys
import tempfile
import warnings
from pathlib import Path

import click
import numpy as np

from bertjax import BertModel, convert_checkpoint
from bertjax.atomic import atomic_file
from bertjax.conversion import Checkpoint, architecture, read_checkpoint
from bertjax.convert import pickles
from bertjax.convert.certificate import dumps
from bertjax.errors import BertjaxError, CheckpointError
from bertjax.json_files import read_json

# What transformers itself can read.
_TORCH_FORMATS = ("safetensors", pickles.ZIP, pickles.LEGACY)


@click.command()
@click.argument("source", type=click.Path(path_type=Path))
@click.option("--rows", default=4, show_default=True, help="How many random rows of tokens to compare.")
@click.option("--length", default=64, show_default=True, help="Length of the rows; half of them are padded.")
@click.option("--seed", default=0, show_default=True)
@click.option("--tolerance", default=1e-4, show_default=True, help="Exit with an error above this difference.")
@click.option("--certificate", type=click.Path(exists=True, dir_okay=False, path_type=Path), metavar="FILE",
              help="Add the largest difference to this certificate of a conversion.")  # fmt: skip
def verify(source: Path, rows: int, length: int, seed: int, tolerance: float, certificate: Path | None) -> None:
    """Runs the checkpoint SOURCE through torch and bertjax, in float32, and prints the largest differences.

    SOURCE is whatever `bertjax convert` reads. What transformers can't load itself is converted for it first.
    """
    try:
        import torch
        import transformers
    except ImportError as problem:
        hint = "pip install 'bertjax[torch]'"
        raise click.ClickException(f"{problem.name} is needed for the comparison: {hint}") from None
    try:
        content = None if certificate is None else read_json(certificate, CheckpointError)
        checkpoint = read_checkpoint(source)
        model = (architecture(checkpoint.config) or BertModel).from_pretrained(source)
        reference, how = _reference(source, checkpoint, model)
    except BertjaxError as problem:
        raise click.ClickException(str(problem)) from None
    inputs = _inputs(model.config, rows, min(length, model.config.max_position_embeddings), seed)
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    print(f"{', '.join(f'{name} {version}' for name, version in versions.items())}, {how}")
    print(f"{type(model).__name__}, {rows} x {inputs[0].shape[-1]} tokens, float32")
    worst = _compare(model, reference, inputs)
    print(f"{'all':<24} largest difference {worst:.2e}")
    if content is not None:
        content["torch"] = {**versions, "rows": rows, "length": inputs[0].shape[-1], "largest_difference": worst}
        with atomic_file(certificate) as temporary:
            temporary.write_text(dumps(content) + "\n", encoding="utf-8")
    if not worst <= tolerance:
        sys.exit(f"differs by more than {tolerance:g}")


def _reference(source: Path, checkpoint: Checkpoint, model):
    """The same checkpoint in transformers, and a word on how it got there."""
    from transformers import __version__ as version

    if checkpoint.config.position_embedding_type != "absolute" and not version.startswith("4."):
        raise CheckpointError(
            f"{source}: has relative positions, which transformers {version} ignores; compare with transformers 4.57"
        )
    if source.is_dir() and checkpoint.weights.format in _TORCH_FORMATS:
        reference = _load(source, model)
        if reference is not None:
            return reference, "which loaded the checkpoint itself"
    with tempfile.TemporaryDirectory() as folder:
        convert_checkpoint(source, Path(folder, "converted"), standard_names=True)
        reference = _load(Path(folder, "converted"), model)
    if reference is None:
        raise CheckpointError(f"{source}: transformers can't load it, converted or not")
    return reference, "which loaded it after conversion to safetensors"


def _load(folder: Path, model):
    """The model in transformers, or None where it would make up weights."""
    import torch
    import transformers

    options = {"dtype": torch.float32, "attn_implementation": "eager", "output_loading_info": True}
    if isinstance(model, BertModel):
        options["add_pooling_layer"] = model.pooler is not None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        kind = getattr(transformers, type(model).__name__)
        reference, info = kind.from_pretrained(folder, **options)
    return None if info["missing_keys"] or info["mismatched_keys"] else reference.eval()


def _inputs(config, rows: int, length: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Random ids, a mask that pads every second row, and random token types; each int64 [rows, length]."""
    rng = np.random.default_rng(seed)
    mask = np.ones((rows, length), np.int64)
    for row in range(1, rows, 2):
        mask[row, rng.integers(1, length + 1) :] = 0
    ids = rng.integers(0, config.vocab_size, (rows, length))
    return ids, mask, rng.integers(0, config.type_vocab_size, (rows, length))


def _compare(model, reference, inputs: tuple[np.ndarray, ...]) -> float:
    """Prints the largest difference in every hidden state, attention and output; returns the largest of all."""
    import torch

    if type(model).__name__ == "BertForMultipleChoice":  # one example, whose choices are the rows
        inputs = tuple(array[None] for array in inputs)
    options = {"output_hidden_states": True, "output_attentions": True}
    ours = model(*inputs, **options)
    with torch.no_grad():
        theirs = reference(*map(torch.tensor, inputs), **options)
    worst = 0.0
    for name, a, b in _pairs(ours, theirs):
        difference = float(np.abs(np.asarray(a) - b.numpy()).max())
        worst = max(worst, difference)
        print(f"{name:<24} largest difference {difference:.2e}   largest value {float(np.abs(b.numpy()).max()):.2e}")
    return worst


def _pairs(ours, theirs):
    yield "embeddings", ours.hidden_states[0], theirs.hidden_states[0]
    for layer, attention in enumerate(theirs.attentions):
        yield f"layer {layer} attention", ours.attentions[layer], attention
        yield f"layer {layer}", ours.hidden_states[layer + 1], theirs.hidden_states[layer + 1]
    for name in theirs:
        if name not in ("hidden_states", "attentions") and getattr(ours, name, None) is not None:
            yield name, getattr(ours, name), theirs[name]


if __name__ == "__main__":
    verify(prog_name="python -m convert.verify")
