"""What is compiled, and when: once for each shape, and nothing more after a warm-up."""

import jax
import numpy as np
import pytest
from conftest import WORDS, compiles
from flax import nnx

from bertjax import (
    BertConfig,
    BertForMaskedLM,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    FillMask,
    QuestionAnswering,
    SentenceEncoder,
    SparseEncoder,
    TextClassification,
    Tokenizer,
)

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


@pytest.mark.parametrize(
    ("kind", "head", "options", "as_input"),
    [
        (TextClassification, BertForSequenceClassification, {"top_k": 2}, lambda text: (text, text)),
        (QuestionAnswering, BertForQuestionAnswering, {"max_seq_len": 70}, lambda text: ("she", text or "was")),
        (FillMask, BertForMaskedLM, {"top_k": 3}, lambda text: text[:300] + " [MASK]" * (1 + len(text) % 60)),
        (SparseEncoder, BertForMaskedLM, {}, lambda text: text),
    ],
)
def test_a_task_that_is_warmed_up_compiles_nothing_more(kind, head, options, as_input, vocab_file):
    config = BertConfig.preset("tiny", vocab_size=5 + len(WORDS), max_position_embeddings=200)
    task = kind(head(config, rngs=nnx.Rngs(0)), Tokenizer.from_vocab(vocab_file), step_tokens=640)
    rng = np.random.default_rng(1)
    calls = [[1], [150], [3] * 400, [40] * 30, [0, 120] * 9, *(rng.integers(1, 150, count) for count in (2, 9, 60))]
    inputs = [[as_input(text) for text in texts_of(lengths)] for lengths in calls]
    assert compiles(lambda: task.warm_up(**options)) > 0
    assert compiles(lambda: [task(each, **options) for each in inputs]) == 0


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
