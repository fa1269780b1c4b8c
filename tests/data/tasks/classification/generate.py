"""Writes a tiny model of inference between texts, and expected.json: what the pipelines of transformers 4 answer.

Run with transformers 4.57.1 and torch installed: `python tests/data/tasks/classification/generate.py`. Vocabulary,
weights and texts are made up here.
"""

import json
import string
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

HERE = Path(__file__).parent

WORDS = "the a of in on and she he it was is not went to rain sun storm sport game goal team vote law market price song"
WORDS += " this example about text says never always cafe naive paris new old best worst film book sad happy"
MARKS = ". , ! ? ' - @ # : & 中"
PIECES = "ing ed s ness er ly y ball est"
LABELS = ["contradiction", "neutral", "entailment"]
TEXTS: list[str | tuple[str, str]] = [
    "",
    "The storm was the worst in Paris.",
    "She went to the naïve café, and it was never sunny!",
    "footballer markets & songs @ 中 ☃ the-best-films",
    "a goal " * 30 + "never counted",
    "sad",
]
# None has an empty second text: asked about one at a time, the pipeline takes such a pair for a single text.
PAIRS = [
    ("The team won the game.", "The team was happy."),
    ("", "it rained"),
    ("rain " * 25, "sun " * 25),
    ("sun", "storm " * 40),
]
ZERO_SHOT_TEXTS = [text for text in TEXTS if text]  # the pipeline refuses the empty text
CALLS: list[dict[str, Any]] = [
    {},
    {"top_k": None},
    {"top_k": 2},
    {"top_k": 9, "function_to_apply": "sigmoid"},
    {"function_to_apply": "softmax"},
    {"top_k": None, "function_to_apply": "none"},
]
PROBLEM_TYPES = ["regression", "single_label_classification", "multi_label_classification"]
ZERO_SHOT_CALLS: list[dict[str, Any]] = [
    {"candidate_labels": ["sport", "politics", "weather"]},
    {"candidate_labels": ["sport", "politics", "weather"], "multi_label": True},
    {"candidate_labels": ["rain"]},
    {"candidate_labels": ["rain", "game " * 28]},  # so long that most of a text must go
    {"candidate_labels": ["rain", "sun", "café", "rain and sun, always"], "hypothesis_template": "it says {}!"},
]


def vocabulary() -> list[str]:
    letters = [*string.ascii_lowercase, *string.digits]
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    pieces = [f"##{piece}" for piece in [*letters, *PIECES.split()]]
    return list(dict.fromkeys([*special, *letters, *WORDS.split(), *MARKS.split(), *pieces]))


def write_model(folder: Path) -> None:
    """A model whose random weights are so large that texts differ, and whose labels are all as likely."""
    folder.mkdir(exist_ok=True)
    vocab = vocabulary()
    (folder / "vocab.txt").write_text("\n".join(vocab) + "\n", encoding="utf-8")
    config = transformers.BertConfig(
        vocab_size=len(vocab),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=48,
        id2label=dict(enumerate(LABELS)),
        label2id={name: label for label, name in enumerate(LABELS)},
    )
    model = transformers.BertForSequenceClassification(config).eval()
    rng = np.random.default_rng(7)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            scale = 2.0 if "word_embeddings" in name else 0.5
            values = rng.normal(float(name.endswith("LayerNorm.weight")), scale, tuple(parameter.shape))
            parameter.copy_(torch.tensor(values))
        model.classifier.weight.mul_(3)
    settings = {"do_lower_case": True, "model_max_length": 40, "tokenizer_class": "BertTokenizer"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
    tokenizer = transformers.BertTokenizerFast.from_pretrained(folder)
    with torch.no_grad():
        inputs = tokenizer([text for text in TEXTS if text], truncation=True, padding=True, return_tensors="pt")
        model.classifier.bias.sub_(model(**inputs).logits.mean(0))
    model.save_pretrained(folder)


def classification(folder: Path) -> list[dict[str, Any]]:
    """The answers to texts and to pairs, for every call and every problem_type."""
    answers = []
    inputs = [*TEXTS, *({"text": first, "text_pair": second} for first, second in PAIRS)]
    for problem_type, call in [(None, call) for call in CALLS] + [(each, {"top_k": None}) for each in PROBLEM_TYPES]:
        pipeline = transformers.pipeline("text-classification", model=str(folder), device="cpu")
        pipeline.model.config.problem_type = problem_type
        answers.append(
            {"problem_type": problem_type, "call": call, "answers": pipeline(inputs, truncation=True, **call)}
        )
    return answers


def main() -> None:
    folder = HERE / "model"
    write_model(folder)
    zero_shot = transformers.pipeline("zero-shot-classification", model=str(folder), device="cpu")
    expected = {
        "texts": TEXTS,
        "pairs": PAIRS,
        "classification": classification(folder),
        "zero_shot_texts": ZERO_SHOT_TEXTS,
        "zero_shot": [{"call": call, "answers": zero_shot(ZERO_SHOT_TEXTS, **call)} for call in ZERO_SHOT_CALLS],
    }
    text = json.dumps(expected, indent=1, ensure_ascii=False)
    (HERE / "expected.json").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
