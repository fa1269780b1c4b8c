"""What is computed: shapes, texts, random checkpoints, and how many operations it takes."""

import csv
import dataclasses
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np

#: Dense shapes [batch, length] by device and the size of the model; what fills a CPU leaves most of a GPU idle.
DENSE_SHAPES = {
    ("cpu", "base"): ((1, 32), (1, 128), (8, 128), (32, 128), (8, 512)),
    ("cpu", "large"): ((8, 384),),
    ("gpu", "base"): ((1, 128), (32, 128), (256, 128), (64, 512)),
    ("gpu", "large"): ((64, 384),),
}
#: How many texts are embedded, by device.
TEXTS = {"cpu": 400, "gpu": 20_000}
#: Shapes of a training step, by device.
TRAINING_SHAPES = {"cpu": ((8, 128), (2, 512)), "gpu": ((128, 128), (32, 512))}
#: The share of positions that masked-language-model training predicts (Devlin et al. 2018, section 3.1).
MASKED = 0.15
#: Rows and columns of the matrices that the probe multiplies.
PROBE_SIZE = {"cpu": 2048, "gpu": 8192}
#: Dense bfloat16 peaks in TFLOP/s without sparsity, as NVIDIA's data sheets give them, by a part of the device's name.
NOMINAL_TFLOPS = {
    "H200": 989.0,
    "H100 PCIe": 756.0,
    "H100": 989.0,
    "A100": 312.0,
    "L40S": 362.0,
    "L4": 121.0,
    "A10G": 70.0,
}


@dataclasses.dataclass(frozen=True)
class Sizes:
    """The sizes of a BERT that say how many operations it takes."""

    layers: int
    hidden: int
    intermediate: int
    vocab: int

    @classmethod
    def of(cls, model: Path) -> "Sizes":
        """Those of a model's folder."""
        config = json.loads((model / "config.json").read_text())
        fields = ("num_hidden_layers", "hidden_size", "intermediate_size", "vocab_size")
        return cls(*(config[field] for field in fields))

    def encoder_flops(self, lengths: Iterable[int]) -> int:
        """Operations of a forward pass over texts of these lengths, a multiplication and an addition being two.

        A token takes, in each of L layers, 8 d^2 for the projections of the attention, 4 d i for the feed-forward
        network, and 4 s d for its scores with the s tokens of its text and their values: L (24 d^2 + 4 s d) where the
        intermediate size i is 4 d. What is not a matmul is left out.
        """
        dense = 8 * self.hidden**2 + 4 * self.hidden * self.intermediate
        return sum(self.layers * length * (dense + 4 * length * self.hidden) for length in lengths)

    def training_flops(self, batch: int, length: int, predictions: int) -> int:
        """Operations of a training step: three forward passes, the head being needed at the predicted positions only.

        The head takes 2 d^2 for its dense layer and 2 d v for the decoder, at each position.
        """
        head = predictions * 2 * self.hidden * (self.hidden + self.vocab)
        return 3 * (self.encoder_flops([length] * batch) + head)


def parse_shape(text: str) -> tuple[int, int]:
    """[batch, length] of "8x128". Raises `ValueError` if it is not that."""
    batch, length = (int(part) for part in text.split("x"))
    if batch < 1 or length < 1:
        raise ValueError(f"{text} is not a shape")
    return batch, length


def random_ids(shape: tuple[int, int], vocab: int, seed: int = 0) -> np.ndarray:
    """Token ids, int32 of this shape, the same for a seed; none is a special token."""
    return np.random.default_rng(seed).integers(100, vocab, shape, dtype=np.int32)


def masked_batch(shape: tuple[int, int], vocab: int, seed: int = 0) -> dict[str, np.ndarray]:
    """A batch to train masked-language models on: input_ids and labels, int32; -100 where nothing is predicted."""
    ids, rng = random_ids(shape, vocab, seed), np.random.default_rng(seed)
    chosen = rng.permutation(ids.size)[: round(MASKED * ids.size)]
    labels = np.full(ids.size, -100, np.int32)
    labels[chosen] = ids.ravel()[chosen]
    masked = ids.ravel().copy()
    masked[chosen] = 103  # [MASK] in BERT's own vocabulary
    return {"input_ids": masked.reshape(shape), "labels": labels.reshape(shape)}


def read_texts(file: Path | None, count: int, least_words: int = 8) -> list[str]:
    """The first distinct texts of at least so many words.

    Args:
        file: a text a line or, if it ends in .csv, a pair of sentences and a score a line, of which the sentences are
            taken; default: the paragraphs of Python's own language reference, which everybody has.
        count: how many at most.
        least_words: how many words a text has at least; sentences of pairs are all taken.
    """
    if file is None:
        texts = [" ".join(part.split()) for name in sorted(topics) for part in topics[name].split("\n\n")]
    elif file.suffix == ".csv":
        with open(file, newline="", encoding="utf-8") as lines:
            texts, least_words = [sentence for row in csv.reader(lines) for sentence in row[:2]], 1
    else:
        texts = [line.strip() for line in file.read_text(encoding="utf-8").splitlines()]
    return [text for text in dict.fromkeys(texts) if len(text.split()) >= least_words][:count]


def texts_near(texts: Sequence[str], words: int, count: int) -> list[str]:
    """The texts whose number of words is nearest to this one."""
    return sorted(texts, key=lambda text: abs(len(text.split()) - words))[:count]


def cache() -> Path:
    """Where what is made once is kept: random checkpoints and exported models."""
    folder = Path(os.environ.get("BENCHMARK_CACHE") or Path(tempfile.gettempdir()) / "bertjax-benchmarks")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def random_checkpoint(size: str) -> Path:
    """A BERT of this size, "base" or "large", in a Hugging Face folder, written at the first call.

    It is a BertForPreTraining in float32, so that it can be loaded with or without its heads; random weights take as
    long as trained ones. They are three times as large as a fresh BERT's, so that attention is not flat.
    """
    from flax import nnx

    from bertjax import BertConfig, BertForPreTraining
    from bertjax.convert import rules
    from bertjax.pretrained import abstract

    folder = cache() / f"bert-{size}-random"
    if folder.exists():
        return folder
    config, rng = BertConfig.preset(size), np.random.default_rng(0)

    def draw(path: tuple[str, ...], shape: tuple[int, ...]) -> np.ndarray:
        values = rng.standard_normal(shape, np.float32) * np.float32(0.06)
        return values + 1 if path[-1] == "scale" else values

    graphdef, shapes = abstract(lambda: BertForPreTraining(config, rngs=nnx.Rngs(0)))
    model = nnx.merge(graphdef, rules.unflatten((path, draw(path, shape)) for path, shape in shapes.items()))
    model.save_pretrained(folder)
    return folder


def with_tanh_gelu(model: Path, folder: Path) -> Path:
    """The same model with the tanh approximation of GELU, for libraries that compute no other; made in `folder`."""
    made = folder / "tanh"
    made.mkdir()
    config = json.loads((model / "config.json").read_text()) | {"hidden_act": "gelu_pytorch_tanh"}
    (made / "config.json").write_text(json.dumps(config))
    shutil.copyfile(model / "model.safetensors", made / "model.safetensors")
    return made
