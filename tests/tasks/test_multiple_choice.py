"""Which of several texts goes with one: the probabilities of transformers' model."""

import numpy as np
import pytest
from conftest import compiles
from oracle import require
from test_classification import FOLDER, TOKENIZER
from test_heads import random_heads

from bertjax import BertForSequenceClassification, from_pretrained
from bertjax.errors import ConfigError, InputError
from bertjax.tasks.multiple_choice import Choice, MultipleChoice

STORIES = [
    ("the game was good", ["she was happy", "the song is sad", "it ran"]),
    ("the film", ["a bad one", ""]),
    ("they won the game and the prize", ["he was sad", "they lost", "they won", "the film is long", "a song"]),
    ("a song", ["a song"]),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("choice") / "model"
    model = random_heads("BertForMultipleChoice", from_pretrained(FOLDER).config)
    model.save_pretrained(folder, tokenizer=TOKENIZER)
    return folder


@pytest.fixture(scope="module")
def task(folder):
    return MultipleChoice.from_pretrained(folder, step_tokens=160)


def test_scores_are_those_of_transformers(folder, task):
    torch, transformers = require("torch"), require("transformers")
    model = transformers.BertForMultipleChoice.from_pretrained(folder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    found, logits = task(STORIES), task(STORIES, apply_softmax=False)
    spread = []
    for (text, choices), answer, raw in zip(STORIES, found, logits, strict=True):
        encoded = tokenizer([text] * len(choices), choices, truncation=True, padding=True, return_tensors="pt")
        with torch.no_grad():
            expected = model(**{name: array[None] for name, array in encoded.items()}).logits[0]
        np.testing.assert_allclose(raw.scores, expected.numpy(), rtol=0, atol=1e-5)
        np.testing.assert_allclose(answer.scores, expected.softmax(-1).numpy(), rtol=0, atol=1e-5)
        assert answer.index == raw.index == int(expected.argmax())
        assert answer.text == choices[answer.index]
        spread.append(np.ptp(expected.numpy()))
    assert max(spread) > 0.1


def test_one_input_and_its_forms(task):
    text, choices = STORIES[0]
    alone = task((text, choices))
    assert isinstance(alone, Choice)
    assert task([{"text": text, "choices": tuple(choices)}]) == [alone]
    assert task([]) == []
    assert task(("a song", ["a song"])) == Choice(0, "a song", [1.0])


def test_packed_choices_are_those_of_rows_of_their_own(task):
    ids = np.arange(2 * 3 * 7).reshape(2, 3, 7) % 30 + 5
    together = task.model(ids).logits
    packed = {
        "input_ids": ids.reshape(2, 21),
        "segment_ids": np.repeat([[1, 2, 3]] * 2, 7, axis=1),
        "position_ids": np.tile(np.arange(7), (2, 3)),
    }
    alone = task.model.score(**packed, max_segments=3).logits
    assert alone.shape == (2, 3, 1)
    np.testing.assert_allclose(alone[..., 0], together, rtol=0, atol=1e-5)


def test_a_second_call_compiles_nothing(task):
    task(STORIES * 4)
    assert compiles(lambda: task(STORIES[::-1] * 4)) == 0


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ("one text", r"inputs\[0\] is no text with choices; pass a tuple, \(text, choices\)"),
        ([("a", ["b"]), ("a", "b")], r"inputs\[1\]: choices is a str, expected a list or another"),
        ([("a", [])], r"inputs\[0\] has no choices"),
        ([("a", ["b", 3])], r"inputs\[0\]: choice 1 is 3 of type int"),
        ([(None, ["b"])], r"inputs\[0\]: the text is None of type NoneType"),
        ([{"text": "a"}], r"inputs\[0\] has the keys \['text'\], expected 'text' and 'choices'"),
        ([("a", ["b"], 0)], r"inputs\[0\] is no text with choices"),
    ],
)
def test_what_is_no_text_with_choices_is_refused(task, inputs, message):
    with pytest.raises(InputError, match=message):
        task(inputs)


def test_softmax_is_asked_for_by_a_bool(task):
    with pytest.raises(InputError, match="apply_softmax is 'no', expected one of True, False"):
        task(STORIES, apply_softmax="no")


def test_another_model_is_refused():
    with pytest.raises(ConfigError, match="takes a BertForMultipleChoice, not a BertForSequenceClassification"):
        MultipleChoice(from_pretrained(FOLDER, BertForSequenceClassification), TOKENIZER)
