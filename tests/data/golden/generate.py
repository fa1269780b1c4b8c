"""Makes the golden checkpoints: tiny random BERTs with what PyTorch computes from them.

Run with torch and transformers installed: `python tests/data/golden/generate.py [CASE ...]`. Each case is a Hugging
Face folder (config.json, model.safetensors) and `expected.npz` with inputs and outputs. The cases differ in whatever
changes the numbers: heads, depth, widths, eps, activation, type vocabulary, positions, padding, segments. Relative
positions need transformers 4, the last that implements them; version 5 reads the field and ignores it.
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
import transformers
from safetensors.numpy import save_file

HERE = Path(__file__).parent
BASE = {
    "vocab_size": 40,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 24,
}
CASES = {
    "plain": {},
    "one_head": {"num_attention_heads": 1, "num_hidden_layers": 1, "hidden_act": "gelu_new"},
    "many_heads": {"num_attention_heads": 8, "num_hidden_layers": 3, "hidden_act": "relu"},
    "large_eps": {"layer_norm_eps": 0.5, "hidden_act": "silu"},
    "one_type": {"type_vocab_size": 1, "hidden_act": "gelu_pytorch_tanh"},
    "five_types": {"type_vocab_size": 5, "hidden_act": "quick_gelu"},
    "odd_sizes": {"hidden_size": 15, "num_attention_heads": 3, "intermediate_size": 7, "hidden_act": "tanh"},
    "deep": {"num_hidden_layers": 6, "hidden_act": "gelu_fast", "layer_norm_eps": 1e-5},
    "swish": {"hidden_act": "swish", "pad_token_id": 3},
    "relative_key": {"position_embedding_type": "relative_key"},
    "relative_key_query": {"position_embedding_type": "relative_key_query", "max_position_embeddings": 11},
}


def weights(model: torch.nn.Module, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Random weights, larger than a fresh model's, so that attention is uneven and activations leave their origin."""
    tensors = {}
    for name, parameter in model.state_dict().items():
        if name.endswith(("position_ids", "token_type_ids")):
            continue
        values = rng.normal(0.0, 0.3, tuple(parameter.shape))
        tensors[name] = (values + 1.0 if name.endswith("LayerNorm.weight") else values).astype(np.float32)
    return tensors


def inputs(config: transformers.BertConfig, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Three rows: full, padded, and nearly all padding; types and positions as a caller might choose them.

    Relative positions leave no choice.
    """
    shape = (3, 11)
    mask = np.ones(shape, np.int64)
    mask[1, 7:] = 0
    mask[2, 1:] = 0
    relative = getattr(config, "position_embedding_type", "absolute") != "absolute"
    positions = np.tile(np.arange(shape[1]), (shape[0], 1))
    return {
        "input_ids": rng.integers(0, config.vocab_size, shape),
        "attention_mask": mask,
        "token_type_ids": rng.integers(0, config.type_vocab_size, shape),
        "position_ids": positions if relative else rng.integers(0, config.max_position_embeddings, shape),
    }


def main() -> None:
    """Writes the cases that the command line names, or every one."""
    for seed, (name, overrides) in enumerate(CASES.items()):
        if sys.argv[1:] and name not in sys.argv[1:]:
            continue
        if "position_embedding_type" in overrides and not transformers.__version__.startswith("4."):
            raise SystemExit(f"{name} needs transformers 4, this is {transformers.__version__}")
        rng = np.random.default_rng(seed)
        config = transformers.BertConfig(**(BASE | overrides), attn_implementation="eager")
        model = transformers.BertModel(config).eval()
        tensors = weights(model, rng)
        model.load_state_dict({key: torch.tensor(value) for key, value in tensors.items()}, strict=False)
        batch = inputs(config, rng)
        with torch.no_grad():
            output = model(
                **{key: torch.tensor(value) for key, value in batch.items()},
                output_hidden_states=True,
                output_attentions=True,
            )
        folder = HERE / name
        folder.mkdir(exist_ok=True)
        (folder / "config.json").write_text(json.dumps({"model_type": "bert", **BASE, **overrides}, indent=2) + "\n")
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        np.savez_compressed(
            folder / "expected.npz",
            **batch,
            last_hidden_state=output.last_hidden_state.numpy(),
            pooler_output=output.pooler_output.numpy(),
            hidden_states=np.stack([state.numpy() for state in output.hidden_states]),
            attentions=np.stack([weights.numpy() for weights in output.attentions]),
        )


if __name__ == "__main__":
    main()
