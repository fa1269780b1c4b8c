"""Writes a tiny pre-trained model, and expected.json: what the fill-mask pipeline of transformers 4 makes of texts.

A fill is the list of the values of the pipeline's dict, in its order: score, token, token_str and sequence. The model
is a BertForPreTraining, which the pipeline loads as a BertForMaskedLM.

Run with transformers 4.57.1 and torch installed: `python tests/data/tasks/fill_mask/generate.py`. Vocabulary, weights
and texts are made up here.
"""

import json
import string
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

HERE = Path(__file__).parent

WORDS = "the a of in at on and she he it was is went to from with river stone paris cafe naive green house music played"
WORDS += " slow fast bread market old new n't can do we they read book song street one two three"
MARKS = ". , ! ? ' - @ # : ( ) $ 中"
PIECES = "ing ed s ness er ly y land é"
TEXTS = [
    "[MASK]",
    "She went to the [MASK].",
    "The [MASK] café in Paris, naïve & OLD!",
    "the river[MASK]ing and [MASK] , [MASK] !",
    "[MASK] [MASK]",
    "don't [MASK] can't  he's\tslow\u00a0中 日本 ☃ ?",
    "[CLS] a [MASK] [SEP] of [UNK] x[PAD]y",
    "[CLS] a [MASK] [SEP] of [MASK] [UNK] x[PAD]y",
    "stone " * 40 + "[MASK] market",
    "we read [mask] and [MASK]ed",
]
CALLS: list[dict[str, Any]] = [
    {},
    {"top_k": 1},
    {"top_k": 40},
    {"targets": "music"},
    {"targets": ["music", "##ing", "Café", "music", "[SEP]", "[PAD]"]},
    {"top_k": 2, "targets": ["one", "two", "three"]},
]


def vocabulary() -> list[str]:
    letters = [*string.ascii_lowercase, *string.digits]
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    pieces = [f"##{piece}" for piece in [*letters, *PIECES.split()]]
    return list(dict.fromkeys([*special, *letters, *WORDS.split(), *MARKS.split(), *pieces]))


def write_model(folder: Path) -> None:
    """A model whose random weights are so large that masks get different words."""
    folder.mkdir(exist_ok=True)
    vocab = vocabulary()
    (folder / "vocab.txt").write_text("\n".join(vocab) + "\n", encoding="utf-8")
    config = transformers.BertConfig(
        vocab_size=len(vocab) + 3,  # as in many checkpoints, there are rows that no token has
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=64,
    )
    model = transformers.BertForPreTraining(config).eval()
    rng = np.random.default_rng(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            values = rng.normal(float(name.endswith("LayerNorm.weight")), 0.4, tuple(parameter.shape))
            parameter.copy_(torch.tensor(values))
    model.save_pretrained(folder)
    # Versions differ in what they do where the last is not said.
    settings = {"do_lower_case": True, "model_max_length": 64, "clean_up_tokenization_spaces": True}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")


def values(answer: Any) -> Any:
    """A fill's values, in lists as the pipeline nests them."""
    return list(answer.values()) if isinstance(answer, dict) else [values(part) for part in answer]


def main() -> None:
    folder = HERE / "model"
    write_model(folder)
    transformers.logging.set_verbosity_error()
    pipeline = transformers.pipeline("fill-mask", model=str(folder), device="cpu")
    assert type(pipeline.model).__name__ == "BertForMaskedLM"
    answers = [
        {"options": options, "fills": [values(pipeline(text, **options)) for text in TEXTS]} for options in CALLS
    ]
    expected = {"transformers": transformers.__version__, "texts": TEXTS, "calls": answers}
    (HERE / "expected.json").write_text(json.dumps(expected, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
