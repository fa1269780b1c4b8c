"""Whether one text follows another: the probability that transformers' model gives."""

import numpy as np
import pytest
from conftest import compiles
from oracle import require
from test_classification import EXPECTED, FOLDER, TOKENIZER
from test_heads import random_heads

from bertjax import BertForNextSentencePrediction, from_pretrained
from bertjax.errors import ConfigError, InputError
from bertjax.tasks.next_sentence import NextSentence

PAIRS = [*map(tuple, EXPECTED["pairs"]), ("the game", ""), ("she was happy", "the song is sad")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model with both heads of pre-training, as most published checkpoints have them."""
    config = from_pretrained(FOLDER).config
    folder = tmp_path_factory.mktemp("pretraining") / "model"
    random_heads("BertForPreTraining", config).save_pretrained(folder, tokenizer=TOKENIZER)
    return folder


@pytest.fixture(scope="module")
def task(folder):
    return NextSentence(from_pretrained(folder, BertForNextSentencePrediction), TOKENIZER, step_tokens=160)


def test_probabilities_are_those_of_transformers(folder, task):
    torch, transformers = require("torch"), require("transformers")
    model = transformers.BertForNextSentencePrediction.from_pretrained(folder).eval()
    first, second = map(list, zip(*PAIRS, strict=True))
    inputs = transformers.AutoTokenizer.from_pretrained(folder)(
        first, second, truncation=True, padding=True, return_tensors="pt"
    )
    with torch.no_grad():
        expected = model(**inputs).logits.softmax(-1)[:, 0].numpy()
    assert np.ptp(expected) > 0.1
    found = task(PAIRS)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)
    order = np.random.default_rng(0).permutation(len(PAIRS))
    np.testing.assert_allclose(task([PAIRS[place] for place in order]), expected[order], rtol=0, atol=1e-5)


def test_one_pair_gives_one_probability(task):
    first, second = PAIRS[0]
    together, alone = task(PAIRS), task((first, second))
    assert isinstance(alone, float)
    assert alone == pytest.approx(together[0], abs=1e-5)
    assert task([{"text": first, "text_pair": second}]) == [alone]
    assert task([]) == []


def test_a_second_call_compiles_nothing(task):
    task(PAIRS * 4)
    assert compiles(lambda: task([(second, first) for first, second in PAIRS] * 4)) == 0


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ("one text", r"inputs\[0\] is no pair of texts; pass a tuple"),
        ([("a", "b"), "one text"], r"inputs\[1\] is no pair of texts"),
        (["a", "b"], r"inputs\[0\] is no pair of texts; pass a tuple, \(text, text_pair\), or a mapping"),
        ([["a", "b", "c"]], r"inputs\[0\] is a list of 3, expected a pair"),
        ([("a", "b"), ("a", 3)], r"inputs\[1\]\[1\] is 3 of type int"),
        ([("a", None)], r"inputs\[0\]\[1\] is None of type NoneType"),
        ([{"text": "a"}], r"inputs\[0\] has the keys \['text'\], expected 'text' and 'text_pair'"),
    ],
)
def test_what_is_no_pair_is_refused(task, inputs, message):
    with pytest.raises(InputError, match=message):
        task(inputs)


def test_another_model_is_refused():
    with pytest.raises(ConfigError, match="takes a BertForNextSentencePrediction, not a BertForSequenceClassification"):
        NextSentence(from_pretrained(FOLDER), TOKENIZER)
