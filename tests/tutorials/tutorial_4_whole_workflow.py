"""The whole workflow: tokenize, encode, fill in a word, ask whether a sentence follows, and train a classifier.

Run it as `python tests/tutorials/tutorial_4_whole_workflow.py`; `starting_point.py` says what happens offline.
"""

from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
import starting_point

from bertjax import BertForPreTraining, BertForSequenceClassification, Tokenizer, functional

FIRST, SECOND = "BERT is a transformer model.", "It is used for various NLP tasks."
MASKED = "BERT is [MASK] a model for NLP tasks."
LENGTH = 20  # one for all that a model is called with: it compiles once for every shape
REVIEWS = {
    "I would watch it again tomorrow.": "positive",
    "Two hours that I want back.": "negative",
    "Warm, funny and a little sad.": "positive",
    "The plot is as thin as the popcorn bag.": "negative",
}


def encode(model: BertForPreTraining, tokenizer: Tokenizer) -> dict[str, Any]:
    """Text to vectors. A model with heads has its encoder in `bert`."""
    batch = tokenizer([f"{FIRST} {SECOND}"]).padded()
    hidden = model.bert(**batch).last_hidden_state
    print("last_hidden_state", hidden.shape, hidden[0, 0, :3])
    return {"input_ids": batch["input_ids"], "hidden": hidden, "cls": hidden[0, 0, :3]}


def fill_mask(model: BertForPreTraining, tokenizer: Tokenizer) -> dict[str, Any]:
    """The masked-LM head scores every word of the vocabulary in every place; the best for [MASK] fills it."""
    batch = tokenizer([MASKED]).padded(LENGTH)
    logits = model(**batch).prediction_logits
    (place,) = np.flatnonzero(batch["input_ids"][0] == tokenizer.mask_token_id)
    filled = int(logits[0, place].argmax())
    print(MASKED, "->", tokenizer.id_to_token(filled))
    return {"masked_ids": batch["input_ids"], "prediction": logits, "mlm": logits[0, 0, :3], "filled": filled}


def next_sentence(model: BertForPreTraining, tokenizer: Tokenizer) -> dict[str, Any]:
    """The next-sentence head has two scores: that the second text follows the first, and that it does not."""
    # A pair is one row, [CLS] first [SEP] second [SEP]; token_type_ids say which text a token belongs to.
    batch = tokenizer([FIRST], [SECOND]).padded(LENGTH)
    logits = model(**batch).seq_relationship_logits[0]
    follows, does_not = jax.nn.softmax(logits)
    print(f"it follows: {follows:.4f}, it does not: {does_not:.4f}, of logits {logits}")
    return {"pair_types": batch["token_type_ids"], "next_sentence": logits}


def train(source: Path, tokenizer: Tokenizer) -> dict[str, Any]:
    """A classifier has a new head on the pre-trained encoder, and labelled texts train both."""
    # The checkpoint has no classifier; `fresh` says that a random one is wanted. A warning says that it is untrained.
    model = BertForSequenceClassification.from_pretrained(
        source, fresh="classifier", id2label={0: "negative", 1: "positive"}
    )
    batch = tokenizer(list(REVIEWS)).padded()
    labels = np.array([model.config.label2id[label] for label in REVIEWS.values()])

    # JAX differentiates functions, so the model becomes a function of its parameters. With labels the output has a
    # loss: the cross entropy, log 2 = 0.69 for a classifier that can't tell two classes apart.
    apply, params = functional(model)

    def loss(params):
        return apply(params, **batch, labels=labels).loss

    optimizer = optax.adamw(learning_rate=2e-5, weight_decay=0.01)

    @jax.jit
    def step(params, state):
        value, gradients = jax.value_and_grad(loss)(params)
        updates, state = optimizer.update(gradients, state, params)
        return value, optax.apply_updates(params, updates), state

    # A step gives the loss before it. Real training takes thousands, over batches that differ, with dropout
    # (`dropout_key=`) and a learning rate that rises first and falls after.
    before, params, state = step(params, jax.jit(optimizer.init)(params))
    after, _, _ = step(params, state)
    print(f"the loss is {before:.4f}, and {after:.4f} after one step")
    assert after < before
    return {"classifier": model, "batch": batch, "labels": labels, "before": before, "after": after}


def main(source: Path) -> dict[str, Any]:
    tokenizer = Tokenizer.from_folder(source)
    # Pre-training left two heads, so one model does for all but the classifier.
    model = BertForPreTraining.from_pretrained(source)
    return {
        "source": source,
        **encode(model, tokenizer),
        **fill_mask(model, tokenizer),
        **next_sentence(model, tokenizer),
        **train(source, tokenizer),
    }


KNOWN = {
    "input_ids": [
        [101, 14324, 2003, 1037, 10938, 2121, 2944, 1012, 2009, 2003, 2109, 2005, 2536, 17953, 2361, 8518, 1012, 102]
    ],
    "masked_ids": [[101, 14324, 2003, 103, 1037, 2944, 2005, 17953, 2361, 8518, 1012, 102] + [0] * 8],
    "pair_types": [[0] * 9 + [1] * 10 + [0]],
    "labels": [1, 0, 1, 0],
}
PUBLISHED = {
    "cls": [-0.6356, -0.5310, -0.0545],
    "filled": 2036,
    "mlm": [-6.5931, -6.5281, -6.5194],
    "next_sentence": [5.8095, -5.0802],
}


if __name__ == "__main__":
    results = starting_point.run(main, KNOWN, PUBLISHED)
