"""`python -m convert.verify SRC`: torch and bertjax side by side on the same inputs.

Prints the largest difference after the embeddings, after each layer, and in the outputs. Needs torch and transformers.
"""

import sys
import warnings
from pathlib import Path

import click
import numpy as np

from bertjax.errors import BertjaxError


@click.command()
@click.argument("source", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--rows", default=4, show_default=True, help="How many random rows of tokens to compare.")
@click.option("--length", default=64, show_default=True, help="Length of the rows; half of them are padded.")
@click.option("--seed", default=0, show_default=True)
@click.option("--tolerance", default=1e-4, show_default=True, help="Exit with an error above this difference.")
def verify(source: Path, rows: int, length: int, seed: int, tolerance: float) -> None:
    """Runs the checkpoint SOURCE through torch and bertjax, in float32, and prints the largest differences."""
    try:
        import torch
        import transformers
    except ImportError as problem:
        hint = "pip install 'bertjax[torch]'"
        raise click.ClickException(f"{problem.name} is needed for the comparison: {hint}") from None
    from bertjax import BertModel

    try:
        model = BertModel.from_pretrained(source)
    except BertjaxError as problem:
        raise click.ClickException(str(problem)) from None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        reference = transformers.BertModel.from_pretrained(
            source,
            dtype=torch.float32,
            attn_implementation="eager",
            add_pooling_layer=model.pooler is not None,
        ).eval()
    ids, mask, types = _inputs(model.config, rows, min(length, model.config.max_position_embeddings), seed)
    ours = model(ids, mask, types, output_hidden_states=True, output_attentions=True)
    with torch.no_grad():
        theirs = reference(
            torch.tensor(ids),
            torch.tensor(mask),
            torch.tensor(types),
            output_hidden_states=True,
            output_attentions=True,
        )
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
    print(f"{versions}, {ids.shape[0]} x {ids.shape[1]} tokens, float32")
    worst = 0.0
    for name, a, b in _pairs(ours, theirs):
        difference = float(np.abs(np.asarray(a) - b.numpy()).max())
        worst = max(worst, difference)
        print(f"{name:<24} largest difference {difference:.2e}   largest value {float(np.abs(b.numpy()).max()):.2e}")
    print(f"{'all':<24} largest difference {worst:.2e}")
    if not worst <= tolerance:
        sys.exit(f"differs by more than {tolerance:g}")


def _inputs(config, rows: int, length: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Random ids, a mask that pads every second row, and random token types; each int64 [rows, length]."""
    rng = np.random.default_rng(seed)
    mask = np.ones((rows, length), np.int64)
    for row in range(1, rows, 2):
        mask[row, rng.integers(1, length + 1) :] = 0
    ids = rng.integers(0, config.vocab_size, (rows, length))
    return ids, mask, rng.integers(0, config.type_vocab_size, (rows, length))


def _pairs(ours, theirs):
    yield "embeddings", ours.hidden_states[0], theirs.hidden_states[0]
    for layer, attention in enumerate(theirs.attentions):
        yield f"layer {layer} attention", ours.attentions[layer], attention
        yield f"layer {layer}", ours.hidden_states[layer + 1], theirs.hidden_states[layer + 1]
    yield "last_hidden_state", ours.last_hidden_state, theirs.last_hidden_state
    if ours.pooler_output is not None:
        yield "pooler_output", ours.pooler_output, theirs.pooler_output


if __name__ == "__main__":
    verify(prog_name="python -m convert.verify")
