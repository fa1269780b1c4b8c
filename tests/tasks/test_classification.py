"""Labels for texts: those of transformers' pipeline, whatever the company a text is in."""

import json
from collections.abc import Mapping

import numpy as np
import pytest
from conftest import DATA, compiles
from oracle import require
from test_heads import random_heads

from bertjax import BertForSequenceClassification, Tokenizer, from_pretrained
from bertjax.errors import ConfigError, InputError
from bertjax.tasks.classification import Label, TextClassification

FOLDER = DATA / "tasks" / "classification" / "model"
EXPECTED = json.loads((FOLDER.parent / "expected.json").read_text())
TEXTS = EXPECTED["texts"]
PAIRS = [tuple(pair) for pair in EXPECTED["pairs"]]
TOKENIZER = Tokenizer.from_folder(FOLDER)


def load(**options):
    """The task; with few shapes, so that little is compiled."""
    model = from_pretrained(FOLDER, BertForSequenceClassification, **options)
    return TextClassification(model, TOKENIZER, step_tokens=160)


@pytest.fixture(scope="module")
def task():
    return load()


def assert_same(found, expected):
    """Compares answers with those of a pipeline: the labels exactly, the scores to 1e-5."""
    assert len(found) == len(expected)
    for ours, theirs in zip(found, expected, strict=True):
        if isinstance(theirs, Mapping):
            ours, theirs = [ours], [theirs]
        assert [each.label for each in ours] == [each["label"] for each in theirs]
        scores = [each.score for each in ours]
        np.testing.assert_allclose(scores, [each["score"] for each in theirs], rtol=0, atol=1e-5)


@pytest.mark.parametrize("case", EXPECTED["classification"], ids=lambda case: f"{case['problem_type']} {case['call']}")
def test_answers_are_those_of_the_pipeline(task, case):
    if case["problem_type"]:
        task = load(problem_type=case["problem_type"])
    call, answers = case["call"], case["answers"]
    assert_same(task(TEXTS, **call), answers[: len(TEXTS)])
    assert_same(task(PAIRS, **call), answers[len(TEXTS) :])


def test_one_label_has_a_sigmoid_as_in_the_pipeline(tmp_path):
    transformers = require("transformers")
    task = load(fresh="classifier", num_labels=1)
    task.model.save_pretrained(tmp_path / "model", tokenizer=TOKENIZER)
    pipeline = transformers.pipeline("text-classification", model=str(tmp_path / "model"), device="cpu")
    assert_same(task(TEXTS), pipeline(TEXTS, truncation=True))
    logit, score = task(TEXTS[1], function_to_apply="none").score, task(TEXTS[1]).score
    assert score == pytest.approx(1 / (1 + np.exp(-logit)), abs=1e-6)
    assert task(TEXTS[1], function_to_apply="softmax") == Label("LABEL_0", 1.0)


def test_packed_logits_are_those_of_rows_of_one_text(task):
    pairs = [*PAIRS, (TEXTS[1], "")]
    parts = [TOKENIZER(TEXTS, max_length=40), TOKENIZER(*map(list, zip(*pairs, strict=True)), max_length=40)]
    padded = [part.padded(40) for part in parts]
    alone = task.model(**{name: np.concatenate([part[name] for part in padded]) for name in padded[0]}).logits
    answers = [answer for inputs in (TEXTS, pairs) for answer in task(inputs, top_k=None, function_to_apply="none")]
    names = list(task.model.config.id2label.values())
    packed = [[{each.label: each.score for each in answer}[name] for name in names] for answer in answers]
    np.testing.assert_allclose(packed, alone, rtol=0, atol=1e-5)


def test_an_answer_does_not_depend_on_company_or_order(task):
    texts = [*TEXTS, *(" ".join(TEXTS[1].split()[:count]) for count in range(1, 6))] * 3
    order = np.random.default_rng(0).permutation(len(texts))
    together, shuffled = task(texts), task([texts[index] for index in order])
    for place, index in enumerate(order):
        assert shuffled[place].label == together[index].label
        assert shuffled[place].score == pytest.approx(together[index].score, abs=1e-5)
    for text, answer in zip(TEXTS, together, strict=False):
        alone = task(text)
        assert (alone.label, alone.score) == (answer.label, pytest.approx(answer.score, abs=1e-5))


def test_a_second_call_compiles_nothing(task):
    texts = [text for text in TEXTS if text] * 4
    task(texts)
    assert compiles(lambda: task([text[::-1] for text in texts], top_k=2)) == 0


def test_inputs_of_every_kind(task):
    first, second = PAIRS[0]
    pair = task((first, second))
    assert isinstance(pair, Label)
    assert task([{"text": first, "text_pair": second}]) == [pair]
    assert task({"text": first}) == task(first) != pair
    assert task([first], top_k=1) == [task(first)]
    assert task(first, top_k=np.int64(2)) == task(first, top_k=2)
    assert task([]) == []
    assert task(text for text in [first, first]) == task([first, first])


def test_texts_and_pairs_may_come_mixed(task):
    mixed = [TEXTS[1], PAIRS[0], PAIRS[1], TEXTS[2], PAIRS[2]]
    alone = [task(each) for each in mixed]
    found = task(mixed)
    assert [each.label for each in found] == [each.label for each in alone]
    np.testing.assert_allclose([each.score for each in found], [each.score for each in alone], rtol=0, atol=1e-6)


def test_windows_say_what_was_truncated(task):
    (window,) = task.stream(TEXTS, top_k=None)
    lengths = [len(ids) for ids in TOKENIZER(TEXTS).input_ids]
    assert window.truncated == sum(length > 40 for length in lengths) > 0
    assert window.tokens == sum(min(length, 40) for length in lengths)
    assert window.answers == task(TEXTS, top_k=None)


@pytest.mark.parametrize(
    ("inputs", "options", "message"),
    [
        (["fine", 3], {}, r"^inputs\[1\] is 3 of type int, not a str"),
        (["fine", ("a", "b"), "fine", ("a", 3)], {}, r"inputs\[3\]\[1\] is 3 of type int"),
        (["fine", {"text": "a", "text_pair": 3}], {}, r"inputs\[1\]\['text_pair'\] is 3 of type int"),
        (("a", None), {}, r"inputs\[0\]\[1\] is None of type NoneType"),
        ({"text": "a", "pair": "b"}, {}, r"inputs\[0\] has the keys \['pair', 'text'\], expected 'text' and"),
        (["fine", "\ud800"], {}, r"inputs\[1\] has a lone surrogate"),
        ([("a", "b", "c")], {}, r"inputs\[0\] is a tuple of 3"),
        (["fine"], {"top_k": 0}, "top_k is 0, expected a positive integer"),
        (["fine"], {"top_k": True}, "top_k is True"),
        (["fine"], {"top_k": 1.0}, "top_k is 1.0"),
        (["fine"], {"function_to_apply": "SOFTMAX"}, "function_to_apply is 'SOFTMAX', expected one of None, 'softmax'"),
    ],
)
def test_unusable_inputs_and_options_are_refused(task, inputs, options, message):
    with pytest.raises(InputError, match=message):
        task(inputs, **options)


def test_other_models_and_unusable_labels_are_refused(task):
    with pytest.raises(ConfigError, match="takes a BertForSequenceClassification, not a BertForMaskedLM"):
        TextClassification(random_heads("BertForMaskedLM"), TOKENIZER)
    model = from_pretrained(FOLDER, BertForSequenceClassification)
    model.config.extra["problem_type"] = "guessing"
    with pytest.raises(ConfigError, match="problem_type='guessing'"):
        TextClassification(model, TOKENIZER)("a")
