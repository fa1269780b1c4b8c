"""What bfloat16 loses as programs for GPUs round it, tried on a CPU: gradients of a random BERT, and sentence vectors.

    python -m benchmarks.rounding [MODEL] [--text FILE]

Programs for NVIDIA GPUs also round to bfloat16 what a layer writes to memory between its products, both ways. Here the
same is computed on a CPU. Prints how far the gradient of the word embeddings is from float32's after twelve layers,
as |difference| / |gradient|; the same of torch, in bfloat16 as a whole and with autocast; and, with a MODEL, the
largest 1 - cosine between a text's vectors, of sentence-transformers, too. Nothing is timed.
"""

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import click
import jax
import numpy as np
from flax import nnx
from jax import lax

from benchmarks.workloads import read_texts
from bertjax import BertConfig, BertModel, SentenceEncoder, functional

# Kernels drawn twice as large as a fresh BERT's, so that attention is not flat.
CONFIG = BertConfig(
    vocab_size=200, hidden_size=128, num_hidden_layers=12, num_attention_heads=4, intermediate_size=512,
    max_position_embeddings=64, initializer_range=0.04,
)  # fmt: skip


@contextlib.contextmanager
def gpus_way() -> Iterator[None]:
    """Within it, programs for this CPU compute what they would for a GPU, in the way that they would there."""

    def platform_dependent(*args: Any, default: Any, **others: Any) -> Any:
        return others.get("cuda", default)(*args)

    with (
        mock.patch.object(lax, "platform_dependent", platform_dependent),
        mock.patch.object(jax, "default_backend", lambda: "gpu"),
    ):
        jax.clear_caches()
        yield
    jax.clear_caches()


def random_bert(dtype: str) -> BertModel:
    """The same weights in every dtype."""
    options = {"param_dtype": "float32", "attention": "xla", "add_pooling_layer": False}
    return BertModel(CONFIG, dtype=dtype, **options, rngs=nnx.Rngs(0))


def gradient(dtype: str, ids: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """Of the mean of weighted states, by the word embeddings."""
    apply, params = functional(random_bert(dtype))
    slopes = jax.jit(jax.grad(lambda params: (apply(params, ids).last_hidden_state * weight).mean()))(params)
    return np.asarray(slopes["embeddings"]["word_embeddings"]["embedding"])


def torchs_gradient(folder: Path, ids: np.ndarray, weight: np.ndarray, *, whole: bool, autocast: bool) -> np.ndarray:
    """The same of torch, with the model in bfloat16 as a whole, or with autocast."""
    import torch
    import transformers

    model = transformers.BertModel.from_pretrained(folder, add_pooling_layer=False).eval()
    model = model.bfloat16() if whole else model
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        states = model(torch.tensor(ids)).last_hidden_state
    (states.float() * torch.tensor(weight)).mean().backward()
    return model.embeddings.word_embeddings.weight.grad.float().numpy()


def compare_gradients() -> None:
    """Prints how far gradients are from float32's."""
    rng = np.random.default_rng(0)
    ids, weight = rng.integers(1, 200, (16, 48)), rng.normal(size=(16, 48, 128)).astype(np.float32)
    exact, found = gradient("float32", ids, weight), {"bertjax": gradient("bfloat16", ids, weight)}
    with gpus_way():
        found["bertjax, the way of GPUs"] = gradient("bfloat16", ids, weight)
    with tempfile.TemporaryDirectory() as folder:
        random_bert("float32").save_pretrained(folder)
        for name, options in (("torch", {"whole": True, "autocast": False}),
                              ("torch, autocast", {"whole": False, "autocast": True})):  # fmt: skip
            try:
                found[name] = torchs_gradient(Path(folder), ids, weight, **options)
            except ImportError:
                click.echo(f"{name}: not installed")
    for name, each in found.items():
        click.echo(f"gradient, {name}: {np.linalg.norm(each - exact) / np.linalg.norm(exact):.4f}")


def torchs_vectors(model: str, texts: list[str]) -> np.ndarray:
    """The vectors of sentence-transformers in bfloat16."""
    import sentence_transformers
    import torch

    encoder = sentence_transformers.SentenceTransformer(model, device="cpu", model_kwargs={"dtype": torch.bfloat16})
    found = encoder.encode(texts, convert_to_tensor=True).double().numpy()
    return found / np.linalg.norm(found, axis=1, keepdims=True)


def compare_vectors(model: str, file: Path | None) -> None:
    """Prints how far vectors are from float32's."""
    texts = read_texts(file, 1000)

    def vectors(dtype: str) -> np.ndarray:
        encoder = SentenceEncoder.from_pretrained(model, dtype=dtype, param_dtype="float32", attention="xla")
        return encoder.encode(texts, normalize_embeddings=True).astype(np.float64)

    exact, found = vectors("float32"), {"bertjax": vectors("bfloat16")}
    with gpus_way():
        found["bertjax, the way of GPUs"] = vectors("bfloat16")
    try:
        found["sentence-transformers"] = torchs_vectors(model, texts)
    except ImportError:
        click.echo("sentence-transformers: not installed")
    for name, each in found.items():
        click.echo(f"{len(texts)} vectors, {name}: {(1 - (each * exact).sum(1)).max():.1e}")


@click.command()
@click.argument("model", required=False)
@click.option("--text", type=click.Path(exists=True, dir_okay=False, path_type=Path), help="A text a line.")
def main(model: str | None, text: Path | None) -> None:
    """Compares bfloat16 with float32."""
    compare_gradients()
    if model is not None:
        compare_vectors(model, text)


if __name__ == "__main__":
    main(prog_name="python -m benchmarks.rounding")
