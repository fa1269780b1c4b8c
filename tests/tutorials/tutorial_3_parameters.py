"""What BERT's parameters are called and how many there are, from tiny to large.

Run it as `python tests/tutorials/tutorial_3_parameters.py`; `starting_point.py` says what happens offline.
"""

import math
from pathlib import Path
from typing import Any

import starting_point
from flax import nnx

from bertjax import BertConfig, BertModel, Tokenizer, named_parameters, parameter_table

SENTENCE = "Sinan loves a beautiful day"


def blueprint(config: BertConfig) -> BertModel:
    """A model that has shapes but no numbers: even BERT-large then costs no memory."""
    return nnx.eval_shape(lambda: BertModel(config, rngs=nnx.Rngs(0)))


def count(model: BertModel) -> int:
    return sum(math.prod(struct.shape) for struct in named_parameters(model).values())


def main(source: Path) -> dict[str, Any]:
    # bertjax stacks the layers, but names its parameters as PyTorch does, layer by layer, for everybody knows them by
    # these names. A dense layer's weight is [outputs, inputs] there.
    base = blueprint(BertConfig())
    print(parameter_table(base), "\n")

    # The names fall into three parts: the tables of embeddings, twelve layers of the same 16 tensors, and the pooler.
    parameters = named_parameters(base)
    layer = [name for name in parameters if name.startswith("encoder.layer.0.")]
    print(f"{len(parameters)} = 5 for the embeddings + 12 * {len(layer)} for the layers + 2 for the pooler\n")

    # Most of a small model is its vocabulary, most of a large one its layers.
    sizes = {}
    for name in ("tiny", "small", "base", "large"):
        config = BertConfig.preset(name)
        sizes[name] = count(blueprint(config))
        share = config.vocab_size * config.hidden_size / sizes[name]
        shape = f"{config.num_hidden_layers:2} layers of width {config.hidden_size:4}"
        print(f"{name:5}  {shape}  {sizes[name]:11,} parameters, {share:.0%} of them word embeddings")

    # A model that was loaded from a checkpoint has names and shapes of the same kind.
    loaded = named_parameters(BertModel.from_pretrained(source))
    print(f"\nthe checkpoint's encoder has {len(loaded)} tensors")

    # The vocabulary's rows are those of the first table: an id is a row number.
    tokenizer = Tokenizer.from_folder(source)
    (ids,) = tokenizer([SENTENCE]).input_ids
    print(SENTENCE, "->", ids.tolist(), [tokenizer.id_to_token(int(index)) for index in ids])
    return {
        "parameters": parameters,
        "tensors": len(parameters),
        "sizes": sizes,
        "input_ids": ids,
        "loaded": len(loaded),
    }


KNOWN = {"input_ids": [101, 8254, 2319, 7459, 1037, 3376, 2154, 102], "tensors": 199}
PUBLISHED = {"loaded": 199}


if __name__ == "__main__":
    results = starting_point.run(main, KNOWN, PUBLISHED)
