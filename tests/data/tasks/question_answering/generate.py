"""Makes the golden answers: a tiny random BERT for questions, and what the pipeline of transformers 4 answers with it.

Run with transformers 4.57.1 and torch installed: `python tests/data/tasks/question_answering/generate.py`. Version 5
has no such pipeline. `model` is the checkpoint with its tokenizer; `expected.json` holds the documents, and for each
call its options, its inputs (a question, and which document) and its answers.
"""

import json
import shutil
from pathlib import Path

import numpy as np
import torch
import transformers

HERE = Path(__file__).parent
WORDS = """
who what where when which how did the a an is was in on at of to and for by with near from it he she they not one two
river house bridge town tower king queen market harbour winter summer train station garden castle church school
built opened closed burned painted sold bought crossed began ended lived died wrote read found lost
old new red blue great small first last long cold quiet famous north south east west
cafe jose munchen angstrom resume naive zurich 1850 1900 12 7 % $
""".split()
ENDINGS = "s ed ing ly er est burg ton shire ville ness th a e i o u n r t d".split()
LETTERS = [chr(code) for code in range(ord("a"), ord("z") + 1)]
SIGNS = list(".,!?;:'\"()-東京大学")
WRITTEN = (
    "The old bridge of Zürich was opened in 1850, and burned in 1900. José — a famous painter — lived near it.",
    "  Café Ångström\tclosed\u0007 at 12:7; the naïve résumé ended…  ",
    "東京大学 is a great school (in the east), not the first one! 🎉 The Cafés\u0301 of Münchenburg opened.",
    "The king lived. THE KING LIVED! the king lived? King [MASK] lived; xyzzy\u00a0king.",
)


def words(rng: np.random.Generator, count: int) -> str:
    """Random words, some with endings, capitals and signs."""
    made = []
    for word in rng.choice(WORDS, count):
        word += "".join(ending for ending in rng.choice(ENDINGS, rng.integers(0, 3)) if rng.random() < 0.3)
        word = word.capitalize() if rng.random() < 0.2 else word
        made.append(word + (rng.choice(SIGNS[:6]) if rng.random() < 0.15 else ""))
    return " ".join(made)


def tokenizer() -> transformers.BertTokenizerFast:
    """An uncased tokenizer with a vocabulary of its own."""
    pieces = [f"##{ending}" for ending in ENDINGS]
    vocab = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *dict.fromkeys([*WORDS, *pieces, *LETTERS, *SIGNS])]
    path = HERE / "model" / "vocab.txt"
    path.write_text("\n".join(vocab) + "\n", encoding="utf-8")
    made = transformers.BertTokenizerFast(vocab_file=str(path), model_max_length=400)
    path.unlink()
    return made


def model(vocab_size: int) -> transformers.BertForQuestionAnswering:
    """Weights larger than a fresh model's, so that answers differ."""
    config = transformers.BertConfig(
        vocab_size=vocab_size,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=400,
    )
    made = transformers.BertForQuestionAnswering(config).eval()
    rng = np.random.default_rng(7)  # of these weights some answers are "none"
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            scale = 2.0 if name.startswith("qa_outputs") else 0.3
            values = rng.normal(float(name.endswith("LayerNorm.weight")), scale, tuple(parameter.shape))
            parameter.copy_(torch.tensor(values))
    return made


def main() -> None:
    """Writes the model's folder and expected.json."""
    shutil.rmtree(HERE / "model", ignore_errors=True)
    (HERE / "model").mkdir()
    transformers.logging.set_verbosity_error()
    answer = transformers.pipeline("question-answering", model=model(len(tokenizer())), tokenizer=tokenizer())
    answer.model.save_pretrained(HERE / "model")
    answer.tokenizer.save_pretrained(HERE / "model")
    (HERE / "model" / "vocab.txt").unlink()  # it is in tokenizer.json
    rng = np.random.default_rng(1)
    documents = [*WRITTEN, *(words(rng, count) for count in (40, 90, 150, 300, 700))]
    asked = ["Where is the café?", *(words(rng, count) + "?" for count in (3, 6, 9, 14))]
    some = [(asked[i % 5], i) for i in range(len(documents))]
    every = [(question, i) for question in asked for i in range(len(documents))]
    calls = [
        ({}, every),
        ({"handle_impossible_answer": True}, some),
        ({"align_to_words": False, "max_answer_len": 4}, some),
        ({"top_k": 4, "handle_impossible_answer": True}, some),
        ({"top_k": 3, "max_seq_len": 60, "doc_stride": 10}, some),
        ({"top_k": 2, "max_seq_len": 100, "max_answer_len": 100, "align_to_words": False}, some),
        ({"top_k": 2, "max_seq_len": 60, "doc_stride": 0, "handle_impossible_answer": True}, some),
    ]
    expected = []
    for options, inputs in calls:
        answers = [answer(question=question, context=documents[i], **options) for question, i in inputs]
        expected.append({"options": options, "inputs": inputs, "answers": answers})
    text = json.dumps({"documents": documents, "calls": expected}, ensure_ascii=False, indent=1)
    (HERE / "expected.json").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
