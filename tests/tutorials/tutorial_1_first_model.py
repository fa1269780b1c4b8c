"""A first BERT: from a configuration to a model, and from a sentence to its vectors.

Run it as `python tests/tutorials/tutorial_1_first_model.py`; `starting_point.py` says where the vocabulary comes from.
"""

from pathlib import Path
from typing import Any

import starting_point
from flax import nnx

from bertjax import BertConfig, BertModel, Tokenizer

SENTENCE = "Hello, BERT!"


def main(source: Path) -> dict[str, Any]:
    # A configuration holds the sizes of a model. `BertConfig()` is BERT-base; the other sizes have names.
    config = BertConfig.preset("tiny")
    print(config, "\n")

    # A model made from a configuration has random weights, drawn from the seed: it has learnt nothing yet.
    model = BertModel(config, rngs=nnx.Rngs(0))

    # Printing it shows what it is made of. There is one entry for all layers: their arrays are stacked, so the first
    # axis of everything under `layers` is the layer.
    print(model, "\n")

    # A tokenizer cuts text into pieces of words, which it looks up in a vocabulary; a piece's place there is its id.
    # [CLS] stands before every text and [SEP] ends it.
    tokenizer = Tokenizer.from_folder(source)
    batch = tokenizer([SENTENCE]).padded()
    ids = batch["input_ids"]
    print(SENTENCE, "->", [tokenizer.id_to_token(int(index)) for index in ids[0]])
    print("input_ids", ids.tolist(), "\n")

    # The encoder maps every token to a vector that depends on all the others: [batch, length, hidden].
    output = model(**batch)
    print("last_hidden_state", output.last_hidden_state.shape)

    # The vector of the first token, [CLS], is often taken for the whole sentence. The pooler is a dense layer and a
    # tanh on top of it.
    embedding = output.last_hidden_state[:, 0]
    print("the [CLS] embedding", embedding.shape, embedding[0, :4])
    print("pooler_output", output.pooler_output.shape)
    return {"config": config, "input_ids": ids, "output": output, "embedding": embedding, "tree": str(model)}


KNOWN = {"input_ids": [[101, 7592, 1010, 14324, 999, 102]]}
PUBLISHED = {}  # the weights are random, whatever there is


if __name__ == "__main__":
    results = starting_point.run(main, KNOWN, PUBLISHED)
