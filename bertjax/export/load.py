"""Runs the encoder that is in this folder. Needs jax, flatbuffers, numpy, safetensors and tokenizers.

from load import Encoder

vectors = Encoder().encode(["a text", "another"])
"""

import json
from pathlib import Path

import jax
import jax.export
import numpy as np
from safetensors.numpy import load_file
from tokenizers import Tokenizer


class Encoder:
    """Texts to vectors; config.json says what they are made of.

    Args:
        folder: the folder of the program; default: that of this file.
    """

    def __init__(self, folder: str | Path = Path(__file__).parent):
        folder = Path(folder)
        self.config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))  # cuts texts at config["max_length"]
        self.weights = jax.device_put(load_file(folder / "weights.safetensors"))
        program = jax.export.deserialize(bytearray((folder / "encoder.jax_export").read_bytes()))
        self.run = jax.jit(program.call)

    def encode(self, texts: str | list[str], prompt_name: str | None = None) -> np.ndarray:
        """The vectors of texts, a row a text; of a single text, its vector.

        Each number of texts is compiled anew, and each of config["lengths"].
        """
        if isinstance(texts, str):
            return self.encode([texts], prompt_name)[0]
        config = self.config
        prompt = config["prompts"][config["default_prompt_name"] if prompt_name is None else prompt_name]
        rows = self.tokenizer.encode_batch([prompt["text"] + text for text in texts])
        if not rows:
            return np.zeros((0, config["output_width"]), config["output_dtype"])
        length = next(length for length in config["lengths"] if length >= max(map(len, rows)))
        for row in rows:
            row.pad(length, pad_id=config["pad_token_id"])
        ids, mask, types = (
            np.array([getattr(row, name) for row in rows], np.int32) for name in ("ids", "attention_mask", "type_ids")
        )
        return np.asarray(self.run(self.weights, ids, mask, types, np.int32(prompt["tokens"])))
