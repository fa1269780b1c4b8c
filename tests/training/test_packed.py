"""Several texts in a row: the loss and the parameters after some steps are those of a text in each row."""

import jax
import numpy as np
import pytest
from test_heads import random_heads
from test_step import ADAM, assert_close, setting, trained

pytestmark = pytest.mark.usefixtures("little_optimisation")

LENGTHS = [9, 3, 5, 2, 7, 4]
SEGMENTS = 3
RNG = np.random.default_rng(11)
TEXTS = [RNG.integers(1, 50, length).astype(np.int32) for length in LENGTHS]
TYPES = [(np.arange(length) > length // 2).astype(np.int32) for length in LENGTHS]
NOT_SCORED = {"i": -100, "f": np.nan}
# By the case of `test_step.LABELS`: the labels of each text, or of its tokens.
OF_TEXTS = {
    "BertForSequenceClassification": np.array([0, 2, 1, -100, 2, 0]),
    "multi-label": RNG.integers(0, 2, (6, 3)).astype(np.float32),
    "regression": RNG.normal(size=6).astype(np.float32),
    "BertForNextSentencePrediction": np.array([0, 1, 1, 0, -100, 1]),
}
OF_TOKENS = {
    "BertForTokenClassification": [RNG.integers(-1, 3, length) for length in LENGTHS],
    "BertForMaskedLM": [RNG.integers(-25, 50, length) for length in LENGTHS],
}


def lone():
    """A batch with a text in each row, and where each text's tokens are in it."""
    inputs = {name: np.zeros((6, 9), np.int32) for name in ("input_ids", "attention_mask", "token_type_ids")}
    for row, (ids, types) in enumerate(zip(TEXTS, TYPES, strict=True)):
        inputs["input_ids"][row, : len(ids)] = ids
        inputs["token_type_ids"][row, : len(ids)] = types
        inputs["attention_mask"][row, : len(ids)] = 1
    return inputs, [(row, 0) for row in range(6)]


def packed():
    """The same texts in three rows; each one's row, first column and segment."""
    inputs = {name: np.zeros((3, 12), np.int32) for name in ("input_ids", "token_type_ids", "segment_ids")}
    places = {}
    for row, texts in enumerate([[1, 0], [2, 4], [3, 5]]):
        start = 0
        for segment, text in enumerate(texts):
            inside = (row, slice(start, start + LENGTHS[text]))
            inputs["input_ids"][inside], inputs["token_type_ids"][inside] = TEXTS[text], TYPES[text]
            inputs["segment_ids"][inside] = segment + 1
            places[text] = (row, start, segment)
            start += LENGTHS[text]
    return inputs, [places[text] for text in range(6)]


def token_labels(case, shape, places):
    labels = np.full(shape, -100)
    for (row, start, *_), of_text in zip(places, OF_TOKENS[case], strict=True):
        labels[row, start : start + len(of_text)] = np.where(of_text < 0, -100, of_text)
    return labels


def segment_labels(case, rows, places):
    given = OF_TEXTS[case]
    labels = np.full((rows, SEGMENTS, *given.shape[1:]), NOT_SCORED[given.dtype.kind], given.dtype)
    for (row, _, segment), label in zip(places, given, strict=True):
        labels[row, segment] = label
    return labels


def compare(case, alone, together, **options):
    name, config, _ = setting(case)
    model = random_heads(name, config)
    expected, losses = trained(model, ADAM, [alone] * 4)
    found, ours = trained(model, ADAM, [together] * 4, **options)
    np.testing.assert_allclose([each.loss for each in ours], [each.loss for each in losses], rtol=0, atol=1e-5)
    np.testing.assert_allclose(ours[0].gradient_norm, losses[0].gradient_norm, rtol=1e-5)
    assert_close(found, expected)
    assert losses[-1].loss < losses[0].loss


@pytest.mark.slow
@pytest.mark.parametrize("case", OF_TEXTS)
def test_labels_of_texts(case):
    alone, _ = lone()
    together, places = packed()
    labels = segment_labels(case, len(together["input_ids"]), places)
    compare(case, alone | {"labels": OF_TEXTS[case]}, together | {"labels": labels}, max_segments=SEGMENTS)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "options"),
    [("BertForTokenClassification", {}), ("BertForMaskedLM", {}), ("BertForMaskedLM", {"max_predictions": 20})],
)
def test_labels_of_tokens(case, options):
    alone, at = lone()
    together, places = packed()
    alone["labels"] = token_labels(case, (6, 9), at)
    together["labels"] = token_labels(case, together["input_ids"].shape, places)
    compare(case, alone, together, **options)


def test_a_segment_that_is_not_there_has_no_number():
    model = random_heads("BertForSequenceClassification", setting("regression")[1])
    together, places = packed()
    labels = segment_labels("regression", 3, places)
    empty = tuple(np.argwhere(np.isnan(labels))[0])
    labels[empty] = 0.5
    with pytest.raises(ValueError, match=r"labels\[\d, \d\] is 0.5, but the row has no such segment; set it to NaN"):
        model(**jax.tree.map(np.asarray, together), labels=labels, max_segments=SEGMENTS)
