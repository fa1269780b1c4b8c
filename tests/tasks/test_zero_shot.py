"""Labels that the model never saw: those of transformers' pipeline."""

import dataclasses

import numpy as np
import pytest
from conftest import compiles
from oracle import require
from test_classification import EXPECTED, FOLDER, TOKENIZER

from bertjax import BertForSequenceClassification, from_pretrained
from bertjax.errors import ConfigError, InputError
from bertjax.tasks.zero_shot import ZeroShotClassification, ZeroShotLabels

TEXTS = EXPECTED["zero_shot_texts"]
LABELS = ["sport", "politics", "weather"]


@pytest.fixture(scope="module")
def model():
    return from_pretrained(FOLDER, BertForSequenceClassification)


@pytest.fixture(scope="module")
def task(model):
    return ZeroShotClassification(model, TOKENIZER, step_tokens=160)


def with_labels(names, **options):
    id2label = dict(enumerate(names))
    extra = {} if len(names) == 3 else {"fresh": "classifier", "num_labels": len(names)}
    return ZeroShotClassification(
        from_pretrained(FOLDER, BertForSequenceClassification, id2label=id2label, **extra), TOKENIZER, **options
    )


def assert_same(found, expected):
    assert len(found) == len(expected)
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours.sequence, ours.labels) == (theirs["sequence"], theirs["labels"])
        np.testing.assert_allclose(ours.scores, theirs["scores"], rtol=0, atol=1e-5)


@pytest.mark.parametrize("case", EXPECTED["zero_shot"], ids=lambda case: str(case["call"])[:60])
def test_answers_are_those_of_the_pipeline(task, case):
    assert_same(task(TEXTS, **case["call"]), case["answers"])


@pytest.mark.parametrize("names", [["Entailed", "neutral", "contradiction"], ["no", "ENTAILMENT", "other"]])
def test_entailment_is_found_by_its_name_as_in_the_pipeline(tmp_path, names):
    transformers = require("transformers")
    task = with_labels(names, step_tokens=160)
    task.model.save_pretrained(tmp_path / "model", tokenizer=TOKENIZER)
    pipeline = transformers.pipeline("zero-shot-classification", model=str(tmp_path / "model"), device="cpu")
    for multi_label in (False, True):
        options = {"candidate_labels": LABELS, "multi_label": multi_label}
        # what the pipeline truncates at is in the golden answers
        assert_same(task(TEXTS[:3], **options), pipeline(TEXTS[:3], **options))


def test_entailment_that_has_no_name_must_be_given(task):
    for names, message in (
        (["LABEL_0", "LABEL_1", "LABEL_2"], "none of the model's labels .*'LABEL_0'.* pass entailment_id="),
        (["entailed", "entails", "neutral"], "several of the model's labels .* pass entailment_id="),
        (["entailment"], "two labels or more"),
    ):
        with pytest.raises(ConfigError, match=message):
            with_labels(names)
    given = with_labels(["x", "y", "z"], entailment_id=2, step_tokens=160)
    options = {"candidate_labels": LABELS, "multi_label": True}
    assert given(TEXTS[1], **options) == task(TEXTS[1], **options)
    for wrong in (3, -1, True, "entailment"):
        with pytest.raises(ConfigError, match=r"entailment_id is .* expected one of the model's labels, 0 to 2"):
            ZeroShotClassification(given.model, TOKENIZER, entailment_id=wrong)


def test_an_answer_does_not_depend_on_company_or_order(task):
    texts = TEXTS * 4
    order = np.random.default_rng(0).permutation(len(texts))
    together = task(texts, candidate_labels=LABELS)
    shuffled = task([texts[index] for index in order], candidate_labels=LABELS[::-1])
    alone = [task(text, candidate_labels=LABELS) for text in TEXTS]
    for others in ([shuffled[place] for place in np.argsort(order)], alone * 4):
        for ours, theirs in zip(together, others, strict=True):
            assert (ours.sequence, ours.labels) == (theirs.sequence, theirs.labels)
            np.testing.assert_allclose(ours.scores, theirs.scores, rtol=0, atol=1e-5)


def test_more_texts_and_labels_than_are_tokenized_at_once(task):
    labels = [f"{first} {second}" for first in "abcdefghij" for second in "abcdefghij"]
    found = task(["rain", "sun", "storm"], candidate_labels=labels)
    assert [answer.sequence for answer in found] == ["rain", "sun", "storm"]
    assert [sorted(answer.labels) == sorted(labels) for answer in found] == [True] * 3
    alone = task("sun", candidate_labels=labels)
    np.testing.assert_allclose(found[1].scores, alone.scores, rtol=0, atol=1e-5)
    assert sum(alone.scores) == pytest.approx(1, abs=1e-5)


def test_equal_scores_keep_the_order_of_the_labels():
    task = ZeroShotClassification(from_pretrained(FOLDER, BertForSequenceClassification), TOKENIZER, step_tokens=160)
    for parameter in (task.model.classifier.kernel, task.model.classifier.bias):
        parameter[...] = 0 * parameter[...]
    for multi_label, score in ((False, 0.25), (True, 0.5)):
        answer = task("rain", candidate_labels=list("dabc"), multi_label=multi_label)
        assert answer == ZeroShotLabels("rain", list("dabc"), [score] * 4)


def test_only_the_text_is_cut(task):
    (window,) = task.stream(["storm " * 60, "sun"], candidate_labels=["game " * 33, "b"], hypothesis_template="{}")
    assert window.truncated == 1
    assert window.tokens == 2 * 40 + (33 + 4) + (1 + 4)


def test_a_second_call_compiles_nothing(task):
    task(TEXTS * 2, candidate_labels=LABELS)
    assert compiles(lambda: task(TEXTS[::-1] * 2, candidate_labels=["best", "worst", "happy"], multi_label=True)) == 0


def test_one_text_gives_one_answer(task):
    answer = task("sun", candidate_labels=("sport",))
    assert isinstance(answer, ZeroShotLabels)
    assert dataclasses.asdict(answer) == {"sequence": "sun", "labels": ["sport"], "scores": [answer.scores[0]]}
    assert 0 < answer.scores[0] < 1
    assert task([], candidate_labels=LABELS) == []


def test_a_tuple_is_several_texts(task):
    assert task(("sun", "rain"), candidate_labels=LABELS) == task(["sun", "rain"], candidate_labels=LABELS)


@pytest.mark.parametrize(
    ("inputs", "options", "message"),
    [
        (["a", ("b", "c")], {}, r"inputs\[1\] is \('b', 'c'\) of type tuple, not a str"),
        (["a", "b\ud800"], {}, r"inputs\[1\] has a lone surrogate"),
        (["a"], {"candidate_labels": "sport, politics"}, "candidate_labels is 'sport, politics', expected a list"),
        (["a"], {"candidate_labels": []}, "candidate_labels is empty"),
        (["a"], {"candidate_labels": ["b", 5]}, r"candidate_labels\[1\] is 5 of type int, not a str"),
        (["a"], {"candidate_labels": ["b\ud800"]}, r"candidate_labels\[0\] has a lone surrogate"),
        (["a"], {"hypothesis_template": "no place"}, "'no place' has no place for the label; write {} there"),
        (["a"], {"hypothesis_template": "{label}"}, "can't be filled in: KeyError"),
        (["a"], {"hypothesis_template": "{"}, "can't be filled in: ValueError"),
        (["a"], {"hypothesis_template": "{[a]}"}, "can't be filled in: TypeError"),
        (["a"], {"hypothesis_template": "{:>99999999999999}"}, "can't be filled in: MemoryError"),
        (["a"], {"hypothesis_template": None}, "hypothesis_template is None of type NoneType, not a str"),
        (["a"], {"hypothesis_template": "{} \ud800"}, "hypothesis_template has a lone surrogate"),
        (["a"], {"multi_label": "yes"}, "multi_label is 'yes', expected one of True, False"),
        ({"text": "a"}, {}, "inputs is a dict, expected a list"),
        (["a"], {"candidate_labels": ["sun", "rain " * 40]}, "hypothesis for 'rain rain .* tokens, .* may have 37"),
    ],
)
def test_unusable_inputs_and_options_are_refused(task, inputs, options, message):
    with pytest.raises(InputError, match=message):
        task(inputs, **{"candidate_labels": LABELS} | options)
