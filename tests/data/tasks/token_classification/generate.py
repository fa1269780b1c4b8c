"""Writes the tiny model of token classification, and expected.json: what the pipeline of transformers 4 makes of texts.

An entity is the list of the values of the pipeline's dict, in its order: entity, score, index, word, start and end; or
entity_group, score, word, start and end.

Run with transformers 4.57.1 and torch installed: `python tests/data/tasks/token_classification/generate.py`. The
vocabulary, the weights and the texts are made up here.
"""

import json
import string
from pathlib import Path

import numpy as np
import torch
import transformers

HERE = Path(__file__).parent

WORDS = "the a of in at on and she he it was is went to from with cafe river stone new york paris anna bob smith monday"
WORDS += " naive istanbul berlin company market green house music band played n't 's do can street acme corp inc"
MARKS = ". , ! ? ' - @ # : & ( ) / $ 中 😀"
PIECES = "ing ed s ness er ly land burg son ville ##' é"
LABELS = "O B-person I-person B-creative-work I-creative-work B-location I-location product S-group".split()
TEXTS = [
    "",
    " ",
    "\x00\u200b",
    "Anna Smith went to New York on Monday.",
    "She was in Paris, with Bob's band: Acme Corp. & The Greens!",
    "the stoneburg musicville houseland companyson was marketed greenly in York-Berlin",
    "Café Istanbul, naïve CAFÉ; İstanbul İ ﬁ e\u0301 cafe\u0301 a\u0301\u0327s anna\u0301smith",
    "don't can't  she's\tit's\r\nthe\u00a0river\u3000street 's n't",
    "中文 中 日本 Ünknown 😀😀 ☃ the☃ stone☃ing",
    "[CLS] Anna [SEP] Bob [MASK] [UNK] x[PAD]y",
    "qwertyuiop asdfghjkl zxcvbnm 12345 @bob #acme http://acme.inc/ $5",
    "x" * 101 + " Anna " + "y" * 40,
    "a b c d e f g h i j k l m n o p q r s t u v w x y z",
    "ri\u0301ver sto\u200bne Anna",
    "Bob Bob Bob Paris Paris Paris Monday Monday . . . ! ! !",
]
CALLS = [{"aggregation_strategy": strategy} for strategy in ("none", "simple", "first", "average", "max")]
CALLS += [
    {"aggregation_strategy": "none", "ignore_labels": []},
    {"aggregation_strategy": "none", "ignore_labels": ["B-person", "person"]},
    {"aggregation_strategy": "simple", "ignore_labels": []},
    {"aggregation_strategy": "max", "ignore_labels": ["person", "B-location", "work"]},
]


def vocabulary() -> list[str]:
    letters = [*string.ascii_lowercase, *string.digits]
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    pieces = [f"##{piece}" for piece in [*letters, *PIECES.split()]]
    return list(dict.fromkeys([*special, *letters, *WORDS.split(), *MARKS.split(), *pieces]))


def fill(model: torch.nn.Module, rng: np.random.Generator) -> None:
    """Gives every parameter random numbers, so large that attention is uneven and tokens get different labels."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            values = rng.normal(float(name.endswith("LayerNorm.weight")), 0.3, tuple(parameter.shape))
            parameter.copy_(torch.tensor(values * (0.1 if name.endswith("bias") else 1)))
        model.bert.embeddings.word_embeddings.weight.mul_(3)
        model.classifier.weight.mul_(2)
        model.classifier.bias[0] += 1


def main() -> None:
    folder = HERE / "model"
    folder.mkdir(exist_ok=True)
    vocab = vocabulary()
    (folder / "vocab.txt").write_text("\n".join(vocab) + "\n", encoding="utf-8")
    config = transformers.BertConfig(
        vocab_size=len(vocab),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=128,
        id2label=dict(enumerate(LABELS)),
        label2id={name: index for index, name in enumerate(LABELS)},
    )
    model = transformers.BertForTokenClassification(config).eval()
    fill(model, np.random.default_rng(0))
    tokenizer = transformers.BertTokenizerFast(str(folder / "vocab.txt"), model_max_length=128)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "special_tokens_map.json").unlink()
    pipeline = transformers.TokenClassificationPipeline(model=model, tokenizer=tokenizer)
    cases = [
        {"options": call, "entities": [[list(entity.values()) for entity in pipeline(text, **call)] for text in TEXTS]}
        for call in CALLS
    ]
    content = json.dumps({"texts": TEXTS, "cases": cases}, default=lambda score: round(float(score), 8))
    (HERE / "expected.json").write_text(content.replace("]], [[", "]],\n[[") + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
