"""Makes the checkpoints with heads: tiny random BERTs saved by transformers 4, and the logits that it computes.

Run with transformers 4.57.1 and torch installed: `python tests/data/heads/generate.py`. Each folder holds one model as
save_pretrained wrote it, in safetensors and, with safe_serialization=False, in a pickle or in shards of one. They
differ from what version 5 writes: the pickles repeat the tied tensors, and relative positions have their embeddings.
`expected.npz` holds the inputs and the logits.
"""

import shutil
from pathlib import Path

import numpy as np
import torch
import transformers

HERE = Path(__file__).parent
BASE = {
    "vocab_size": 20,
    "hidden_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 12,
    "max_position_embeddings": 10,
}
# Folder, class, what is special about its configuration, and how its pickle is saved.
CASES = (
    ("model", "BertModel", {}, {}),
    ("pretraining", "BertForPreTraining", {"num_hidden_layers": 2}, {}),
    ("masked_lm", "BertForMaskedLM", {}, {"max_shard_size": 2000}),
    ("untied", "BertForMaskedLM", {"tie_word_embeddings": False}, {}),
    ("next_sentence", "BertForNextSentencePrediction", {}, {}),
    ("sequence", "BertForSequenceClassification", {"num_labels": 5}, {}),
    ("choice", "BertForMultipleChoice", {}, {}),
    ("token", "BertForTokenClassification", {"num_labels": 7}, {}),
    ("question", "BertForQuestionAnswering", {"position_embedding_type": "relative_key_query"}, {}),
)


def fill(model: torch.nn.Module, rng: np.random.Generator) -> None:
    """Gives every parameter random numbers, larger than a fresh model's, so that attention is uneven."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            values = rng.normal(float(name.endswith("LayerNorm.weight")), 0.3, tuple(parameter.shape))
            parameter.copy_(torch.tensor(values))


def inputs(kind: str, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Four rows, two of them padded, with tokens of both types; for multiple choice, two examples of two choices."""
    mask = np.ones((4, 9), np.int64)
    mask[1, 5:] = 0
    mask[2, 1:] = 0
    given = {
        "input_ids": rng.integers(0, BASE["vocab_size"], mask.shape),
        "attention_mask": mask,
        "token_type_ids": rng.integers(0, 2, mask.shape),
    }
    shape = (2, 2, 9) if kind == "BertForMultipleChoice" else mask.shape
    return {name: array.reshape(shape) for name, array in given.items()}


def main() -> None:
    """Writes every folder."""
    if transformers.__version__ != "4.57.1":
        raise SystemExit(f"needs transformers 4.57.1, this is {transformers.__version__}")
    for seed, (name, kind, overrides, pickle) in enumerate(CASES):
        rng = np.random.default_rng(seed)
        config = transformers.BertConfig(**BASE | overrides, attn_implementation="eager")
        model = getattr(transformers, kind)(config).eval()
        fill(model, rng)
        given = inputs(kind, rng)
        with torch.no_grad():
            output = model(**{key: torch.tensor(value) for key, value in given.items()})
        folder = HERE / name
        shutil.rmtree(folder, ignore_errors=True)
        model.save_pretrained(folder)
        model.save_pretrained(folder, safe_serialization=False, **pickle)
        np.savez_compressed(folder / "expected.npz", **given, **{key: value.numpy() for key, value in output.items()})


if __name__ == "__main__":
    main()
