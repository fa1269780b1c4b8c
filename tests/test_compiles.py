"""What is compiled, and when: once for each shape, and nothing more after a warm-up."""

import jax
import numpy as np
import pytest
from conftest import WORDS, compiles

from bertjax import SentenceEncoder

PLAIN_WORDS = [word for word in WORDS if not word.startswith("##")]


@pytest.fixture(scope="module")
def warm(sentence_folder):
    """An encoder that is warmed up, and how many programs that compiled."""
    jax.clear_caches()  # another test in this process may have had some of the shapes
    encoder = SentenceEncoder.from_pretrained(sentence_folder, step_tokens=640)
    seconds = []
    count = compiles(lambda: seconds.append(encoder.warm_up()))
    assert 0 < seconds[0] < 600
    return encoder, count


def texts_of(lengths, seed=0):
    """Texts of so many words each, all of them in the vocabulary."""
    rng = np.random.default_rng(seed)
    return [" ".join(rng.choice(PLAIN_WORDS, length)) for length in lengths]


def test_a_warm_up_compiles_each_shape_once(warm):
    encoder, count = warm
    assert count == len(encoder.shapes.all()) <= 8
    assert compiles(encoder.warm_up) == 0


def test_nothing_is_compiled_after_a_warm_up(warm):
    encoder, _ = warm
    rng = np.random.default_rng(0)
    shapes = set()

    def corpora():
        for length in (*range(20), 30, 31, 62, 63, 100, 126, 127, 148, 300):
            encoder.encode(texts_of([length])[0])
        for seed in range(25):
            lengths = rng.integers(0, rng.integers(1, 200), rng.integers(1, 150))
            encoder.encode(texts_of(lengths, seed))
        encoder.encode(texts_of([20] * 300), prompt_name="query", normalize_embeddings=True, truncate_dim=5)
        list(encoder.encode_stream(iter(texts_of([3] * 40))))

    run = encoder._run
    encoder._run = lambda length, batch: shapes.add(batch.input_ids.shape) or run(length, batch)
    try:
        assert compiles(corpora) == 0
    finally:
        del encoder._run
    assert shapes == set(encoder.shapes.all())  # all of them were needed: none was compiled in vain


def test_inputs_from_anywhere_run_the_same_program(warm):
    encoder, _ = warm
    tokens = encoder.tokenize(texts_of([10, 20, 30]), length=48)
    booleans = tokens | {"attention_mask": tokens["attention_mask"].astype(bool)}
    expected = encoder.model(**tokens)
    kinds = [
        {name: array.astype(np.int64) for name, array in tokens.items()},
        {name: array.tolist() for name, array in tokens.items()},
        {name: jax.numpy.asarray(array) for name, array in booleans.items()},
        booleans,
    ]
    jax.block_until_ready(kinds)

    def calls():
        for inputs in kinds:
            np.testing.assert_array_equal(encoder.model(**inputs), expected)

    assert compiles(calls) == 0
