"""bert-base-uncased on one sentence, step by step: pieces, ids, padding, attention mask, vectors.

Run it as `python tests/tutorials/tutorial_2_bert_base_uncased.py`; `starting_point.py` says what happens offline.
"""

from pathlib import Path
from typing import Any

import starting_point

from bertjax import BertModel, Tokenizer

SENTENCE = "She is a MachineLearning Engineer and works in California"


def main(source: Path) -> dict[str, Any]:
    tokenizer = Tokenizer.from_folder(source)
    tokens = tokenizer([SENTENCE])

    # The vocabulary is uncased, so the text is lowercased first. A word that is not in it is cut into pieces that
    # are; all but the first piece of a word begin with ##.
    (row,) = tokens.input_ids
    print([tokenizer.id_to_token(int(index)) for index in row])

    # A batch is a rectangle, so shorter rows are filled up with [PAD], whose id is 0. The attention mask is 1 on
    # tokens and 0 on padding, which no token then looks at.
    batch = tokens.padded(16)
    for name, array in batch.items():
        print(f"{name:15}", array[0].tolist())

    # The checkpoint comes from pre-training and has heads besides the encoder. BertModel is the encoder alone, and
    # says in a log message what it leaves out.
    model = BertModel.from_pretrained(source)
    output = model(**batch)
    print("last_hidden_state", output.last_hidden_state.shape, output.last_hidden_state[0, 0, :3])
    print("pooler_output", output.pooler_output.shape, output.pooler_output[0, :3])

    # A sentence's vectors do not depend on how much padding follows it.
    unpadded = model(**tokens.padded())
    difference = abs(unpadded.last_hidden_state - output.last_hidden_state[:, : len(row)]).max()
    print(f"without the padding, the largest difference is {difference:.1e}")
    return {
        **batch,
        "output": output,
        "last_hidden_state_shape": output.last_hidden_state.shape,
        "pooler_output_shape": output.pooler_output.shape,
        "padding_difference": difference,
        "cls": output.last_hidden_state[0, 0, :3],
        "pooled": output.pooler_output[0, :3],
    }


KNOWN = {
    "input_ids": [[101, 2016, 2003, 1037, 3698, 19738, 6826, 2075, 3992, 1998, 2573, 1999, 2662, 102, 0, 0]],
    "attention_mask": [[1] * 14 + [0] * 2],
    "last_hidden_state_shape": (1, 16, 768),
    "pooler_output_shape": (1, 768),
}
PUBLISHED = {
    "cls": [-0.1925, 0.1684, -0.4252],
    "pooled": [-0.9531, -0.4914, -0.8872],
}


if __name__ == "__main__":
    results = starting_point.run(main, KNOWN, PUBLISHED)
