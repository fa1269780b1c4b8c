"""Makes the checkpoints with heads: tiny random BERTs saved by transformers 4, and the logits that it computes.

Run with transformers 4.57.1 and torch installed: `python tests/data/heads/generate.py`. Each folder holds one model as
save_pretrained wrote it, in safetensors and, with safe_serialization=False, in a pickle or in shards of one. They
differ from what version 5 writes: the pickles repeat the tied tensors, and relative positions have their embeddings.
`expected.npz` holds the inputs and the logits.

`training_*.npz` hold what version 5 can't compute any more: a model with each kind of position, masked heads, and the
gradients of its loss. Parameters and gradients are one after another in the order of `names`.
"""

import json
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


HEAD_MASK = ((1.0, 0.25), (0.0, 1.5))


def training(kind: str, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """A model's configuration, parameters, inputs and labels, and what comes of them, its gradients included."""
    overrides = {"num_hidden_layers": 2, "position_embedding_type": kind}
    config = transformers.BertConfig(**BASE | overrides, attn_implementation="eager")
    model = transformers.BertForPreTraining(config).eval()
    fill(model, rng)
    given = inputs("BertForPreTraining", rng)
    ids = given["input_ids"]
    given["labels"] = np.where(rng.random(ids.shape) < 0.4, rng.integers(0, BASE["vocab_size"], ids.shape), -100)
    given["next_sentence_label"] = np.array([0, 1, -100, 1])
    head_mask = torch.tensor(HEAD_MASK, requires_grad=True)
    arguments = {name: torch.tensor(array) for name, array in given.items()}
    output = model(**arguments, head_mask=head_mask, output_attentions=True)
    output.loss.backward()
    parameters = dict(model.named_parameters())
    # Where positions are relative, the table of absolute ones has no gradient: it is not used.
    zeros = {name: torch.zeros_like(parameter) for name, parameter in parameters.items()}
    gradients = [zeros[name] if parameter.grad is None else parameter.grad for name, parameter in parameters.items()]
    return {
        "config": np.array(json.dumps(config.to_diff_dict())),
        "names": np.array(list(parameters)),
        "parameters": torch.cat([parameter.detach().flatten() for parameter in parameters.values()]).numpy(),
        "gradients": torch.cat([gradient.flatten() for gradient in gradients]).numpy(),
        **given,
        "head_mask": head_mask.detach().numpy(),
        "head_mask_gradient": head_mask.grad.numpy(),
        "loss": output.loss.detach().numpy(),
        "prediction_logits": output.prediction_logits.detach().numpy(),
        "attentions": np.stack([weights.detach().numpy() for weights in output.attentions]),
    }


def main() -> None:
    """Writes every folder and every file."""
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
    for seed, kind in enumerate(("absolute", "relative_key", "relative_key_query")):
        np.savez_compressed(HERE / f"training_{kind}.npz", **training(kind, np.random.default_rng(seed)))


if __name__ == "__main__":
    main()
