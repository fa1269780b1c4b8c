"""Makes the Flax checkpoints: a tiny FlaxBertForPreTraining, saved in one file and in shards, and PyTorch's reading.

Run with transformers 4 (the last with FlaxBert), flax and torch installed: `python tests/data/flax/generate.py`. In
each folder, the msgpack files and their index are as save_pretrained wrote them; expected.safetensors holds the tensors
that transformers makes of them for PyTorch.
"""

import json
import shutil
from pathlib import Path

import jax
import numpy as np
import transformers
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors.numpy import save_file
from transformers.modeling_flax_pytorch_utils import load_flax_weights_in_pytorch_model

HERE = Path(__file__).parent
CONFIG = {
    "architectures": ["BertForPreTraining"],
    "vocab_size": 19,
    "hidden_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 12,
    "max_position_embeddings": 9,
}
# By folder, how many bytes a file may have.
FOLDERS = {"single": 1_000_000, "sharded": 2_000}


def main() -> None:
    """Writes both folders."""
    model = transformers.FlaxBertForPreTraining(transformers.BertConfig(**CONFIG), dtype=np.float32)
    rng = np.random.default_rng(0)
    flat = flatten_dict(jax.device_get(model.params))
    params = unflatten_dict({path: rng.normal(0, 0.3, a.shape).astype(np.float32) for path, a in flat.items()})
    for name, size in FOLDERS.items():
        folder = HERE / name
        shutil.rmtree(folder, ignore_errors=True)
        model.save_pretrained(folder, params=params, max_shard_size=size)
        (folder / "config.json").write_text(json.dumps({"model_type": "bert", **CONFIG}, indent=2) + "\n")
        theirs = transformers.BertForPreTraining(model.config)
        load_flax_weights_in_pytorch_model(theirs, params)  # from_pretrained(from_flax=True) leaves them without data
        tied = ("cls.predictions.decoder.weight", "cls.predictions.decoder.bias")
        tensors = {key: value.numpy() for key, value in theirs.state_dict().items() if key not in tied}
        save_file(tensors, folder / "expected.safetensors")


if __name__ == "__main__":
    main()
