"""BERT by hand: every step from ids to a word's score in plain jax.numpy, on the tensors of the checkpoint.

At each step the result is compared with the library's. Equations are those of Vaswani et al. 2017 (arXiv:1706.03762)
and Devlin et al. 2018 (arXiv:1810.04805).

Run it as `python tests/tutorials/tutorial_5_by_hand.py`; `starting_point.py` says what happens offline.
"""

import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import starting_point
from safetensors import safe_open

from bertjax import BertConfig, BertForPreTraining, Tokenizer

SENTENCE = "BERT is [MASK] a model for NLP tasks."

# Accelerators multiply float32 in a shorter format unless they are told not to.
matmul = functools.partial(jnp.matmul, precision="highest")


class Checkpoint:
    """A safetensors file, of which a tensor is read when it is asked for by its PyTorch name."""

    def __init__(self, folder: Path):
        self.file = safe_open(folder / "model.safetensors", "numpy")

    def __call__(self, name: str) -> np.ndarray:
        return self.file.get_tensor(name)

    def dense(self, name: str, x: jax.Array, outputs: slice = slice(None)) -> jax.Array:
        """x Wᵀ + b: PyTorch stores a weight as [outputs, inputs], so that some outputs are some of its rows."""
        return matmul(x, self(f"{name}.weight")[outputs].T) + self(f"{name}.bias")[outputs]

    def layer_norm(self, name: str, x: jax.Array, epsilon: float) -> jax.Array:
        """Every vector to mean 0 and variance 1, then scaled and shifted."""
        # The oldest checkpoints, bert-base-uncased among them, call the two gamma and beta.
        old = f"{name}.gamma" in self.file.keys()  # noqa: SIM118
        scale, shift = (self(f"{name}.{part}") for part in (("gamma", "beta") if old else ("weight", "bias")))
        centred = x - x.mean(axis=-1, keepdims=True)
        variance = (centred**2).mean(axis=-1, keepdims=True)
        return centred / jnp.sqrt(variance + epsilon) * scale + shift


def gelu(x: jax.Array) -> jax.Array:
    """x Φ(x), with the distribution function Φ of the standard normal distribution."""
    return x * (1 + jax.lax.erf(x / jnp.sqrt(2.0))) / 2


def embed(tensors: Checkpoint, config: BertConfig, ids: np.ndarray) -> jax.Array:
    """A token's vector is the sum of three: which word, which place, and which of two texts (here: the first)."""
    words = tensors("bert.embeddings.word_embeddings.weight")[ids]
    places = tensors("bert.embeddings.position_embeddings.weight")[: len(ids)]
    first_text = tensors("bert.embeddings.token_type_embeddings.weight")[0]
    return tensors.layer_norm("bert.embeddings.LayerNorm", words + places + first_text, config.layer_norm_eps)


def attention_head(
    tensors: Checkpoint, config: BertConfig, layer: int, head: int, x: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """softmax(Q Kᵀ / √d) V: how much each token looks at each other, [length, length], and what it takes from there."""
    own = slice(head * config.head_dim, (head + 1) * config.head_dim)  # the d outputs that are this head's
    name = f"bert.encoder.layer.{layer}.attention.self"
    query, key, value = (tensors.dense(f"{name}.{role}", x, own) for role in ("query", "key", "value"))
    weights = jax.nn.softmax(matmul(query, key.T) / jnp.sqrt(config.head_dim), axis=-1)
    return weights, matmul(weights, value)


def encoder_layer(tensors: Checkpoint, config: BertConfig, layer: int, x: jax.Array) -> jax.Array:
    """Attention lets tokens see each other; the feed-forward block then works on each alone.

    What either computes is added to its input, and the sum is normalised.
    """
    name = f"bert.encoder.layer.{layer}"
    heads = [attention_head(tensors, config, layer, head, x)[1] for head in range(config.num_attention_heads)]
    attended = tensors.dense(f"{name}.attention.output.dense", jnp.concatenate(heads, axis=-1))
    x = tensors.layer_norm(f"{name}.attention.output.LayerNorm", x + attended, config.layer_norm_eps)
    wide = gelu(tensors.dense(f"{name}.intermediate.dense", x))
    return tensors.layer_norm(
        f"{name}.output.LayerNorm", x + tensors.dense(f"{name}.output.dense", wide), config.layer_norm_eps
    )


def word_scores(tensors: Checkpoint, config: BertConfig, x: jax.Array) -> jax.Array:
    """The masked-LM head: a word scores by how much its embedding is like what the encoder expects in a place."""
    name = "cls.predictions.transform"
    expected = tensors.layer_norm(f"{name}.LayerNorm", gelu(tensors.dense(f"{name}.dense", x)), config.layer_norm_eps)
    words = tensors("bert.embeddings.word_embeddings.weight")  # "tied": the table that the ids were looked up in
    return matmul(expected, words.T) + tensors("cls.predictions.bias")


def difference(by_hand: jax.Array, library: jax.Array) -> float:
    """The largest difference, as a part of the largest number (or of 1, if all are smaller)."""
    return float(abs(by_hand - library).max() / jnp.maximum(1, abs(library).max()))


def main(source: Path) -> dict[str, Any]:
    # What the library says.
    config = BertConfig.from_file(source / "config.json")
    tokenizer = Tokenizer.from_folder(source)
    model = BertForPreTraining.from_pretrained(source)
    (ids,) = tokenizer([SENTENCE]).input_ids
    library = model([ids], output_hidden_states=True, output_attentions=True)

    # The same from the tensors alone. There is one sentence and no padding, so neither a batch axis nor a mask.
    tensors = Checkpoint(source)
    x = embed(tensors, config, ids)
    steps = {"embeddings": difference(x, library.hidden_states[0, 0])}

    weights, _ = attention_head(tensors, config, layer=0, head=0, x=x)
    steps["one attention head"] = difference(weights, library.attentions[0, 0, 0])

    for layer in range(config.num_hidden_layers):
        x = encoder_layer(tensors, config, layer, x)
        steps[f"layer {layer}"] = difference(x, library.hidden_states[layer + 1, 0])

    scores = word_scores(tensors, config, x)
    steps["MLM logits"] = difference(scores, library.prediction_logits[0])
    for name, value in steps.items():
        print(f"{name:18}  differs by {value:.1e}")
    assert max(steps.values()) < 1e-5

    # The word for [MASK] is the one with the highest score.
    place = list(ids).index(tokenizer.mask_token_id)
    filled = int(scores[place].argmax())
    print(SENTENCE, "->", tokenizer.id_to_token(filled))
    return {"input_ids": ids, "steps": steps, "attention": weights, "logits": scores, "filled": filled}


KNOWN = {"input_ids": [101, 14324, 2003, 103, 1037, 2944, 2005, 17953, 2361, 8518, 1012, 102]}
PUBLISHED = {"filled": 2036}


if __name__ == "__main__":
    results = starting_point.run(main, KNOWN, PUBLISHED)
