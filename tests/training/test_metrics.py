"""Metrics: those of hand, of definitions, and of what a diverged or a lazy model answers."""

import math
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bertjax.errors import InputError, SourceError
from bertjax.training import metrics

NAN, INF = math.nan, math.inf


def one_hot(classes, count):
    return np.eye(count, dtype=np.float32)[classes]


def same(found, expected):
    """Also the names and their order, and that NaN is NaN."""
    assert list(found) == list(expected)
    assert all(type(value) is float for value in found.values())
    np.testing.assert_allclose([*found.values()], [*expected.values()], rtol=1e-12)


def test_two_classes():
    """Of class 1: two of three found, and two of three right; of class 0, one of two each."""
    found = metrics.classification_metrics(one_hot([0, 1, 1, 1, 0], 2), np.array([0, 0, 1, 1, 1]))
    same(found, {"accuracy": 3 / 5, "f1": (2 / 3 + 1 / 2) / 2, "f1_positive": 2 / 3, "matthews_correlation": 1 / 6})


def test_several_classes_of_which_some_do_not_occur():
    found = metrics.classification_metrics(one_hot([3, 3, 0, 0], 5), np.array([3, 3, 3, 0]))
    same(found, {"accuracy": 3 / 4, "f1": (4 / 5 + 2 / 3) / 2, "matthews_correlation": 1 / math.sqrt(3)})


@pytest.mark.parametrize("label", [0, 1])
def test_one_class_for_everything(label):
    logits = one_hot([label] * 3, 2)
    right = metrics.classification_metrics(logits, [label] * 3)
    same(right, {"accuracy": 1, "f1": 1, "f1_positive": label, "matthews_correlation": 0})
    half = metrics.classification_metrics(logits, [label, 1 - label, 1 - label])
    same(half, {"accuracy": 1 / 3, "f1": 1 / 4, "f1_positive": label / 2, "matthews_correlation": 0})


def test_several_labels():
    logits = np.array([[2, -1, -3], [0.1, 0.2, -1], [-1, -1, -1]])
    labels = np.array([[1, 0, 0], [1, 0, 0], [0, 1, 0]], np.float32)
    found = metrics.multilabel_metrics(logits, labels)
    same(found, {"f1_micro": 4 / 6, "f1_macro": 1 / 3, "accuracy": 1 / 3})
    same(metrics.multilabel_metrics(logits[:, :1], labels[:, :1]), dict.fromkeys(found, 1))
    same(metrics.multilabel_metrics(logits[:, 1:2], labels[:, 1:2]), {"f1_micro": 0, "f1_macro": 0, "accuracy": 1 / 3})
    same(metrics.multilabel_metrics(-np.ones((2, 2)), np.zeros((2, 2), int)), dict.fromkeys(found, 0) | {"accuracy": 1})


def test_choices():
    scores = [[0.1, 0.3], [2, 1, 0], [-1, -2, -3, 0]]
    same(metrics.choice_metrics(scores, [1, 0, 0]), {"accuracy": 2 / 3})
    same(metrics.choice_metrics([[0, NAN]], [1]), {"accuracy": NAN})
    with pytest.raises(InputError, match=r"labels has 2 at \[0\], expected one of the choices"):
        metrics.choice_metrics(scores, [2, 0, 0])
    with pytest.raises(InputError, match="no scores"):
        metrics.choice_metrics([], [])


def test_passages_of_queries():
    queries = np.eye(3)
    same(metrics.ranking_metrics(queries, queries), {"accuracy": 1, "mrr": 1})
    # The second query's own passage comes behind another; the third's has the score of another.
    passages = np.array([[1, 2, 0], [0, 1, 5], [0, 0, 5]])
    same(metrics.ranking_metrics(queries, passages), {"accuracy": 1 / 3, "mrr": (1 + 1 / 2 + 1 / 2) / 3})
    same(metrics.ranking_metrics(np.full((2, 2), NAN), np.ones((2, 2))), {"accuracy": NAN, "mrr": NAN})
    many = np.random.default_rng(0).normal(size=(2500, 8))
    unit = many / np.linalg.norm(many, axis=-1, keepdims=True)
    same(metrics.ranking_metrics(many, unit), {"accuracy": 1, "mrr": 1})


def test_numbers():
    """A monotone curve has the ranks of a line."""
    values, targets = np.array([1, 2, 3, 4.0]), np.array([1, 4, 9, 16])
    pearson = 25 / math.sqrt(5 * 129)
    found = metrics.regression_metrics(values, targets)
    same(found, {"pearson": pearson, "spearman": 1, "mean_squared_error": (0 + 4 + 36 + 144) / 4})
    same(metrics.similarity_metrics(-values, targets), {"pearson": -pearson, "spearman": -1})


@pytest.mark.parametrize(
    ("values", "targets", "error"),
    [([1, 1, 1], [1, 2, 3], 5 / 3), ([1, 2, 3], [2, 2, 2], 2 / 3), ([5], [3], 4), ([1, NAN], [1, 2], NAN)],
)
def test_correlations_that_are_not_defined(values, targets, error):
    undefined = {"pearson": NAN, "spearman": NAN}
    same(metrics.regression_metrics(values, targets), undefined | {"mean_squared_error": error})
    same(metrics.similarity_metrics(values, targets), undefined)


def test_numbers_at_the_edge_of_their_type():
    for values in ([1.0, 1 + 1e-16, 1 - 1e-16], [1e200, -1e200, 3e200], [INF, 1, 2]):
        assert len(metrics.regression_metrics(values, [1, 2, 3])) == 3


def test_a_diverged_model_is_seen():
    logits = one_hot([0, 1, 1], 2)
    logits[1, 0] = NAN
    for measure, labels in [
        (metrics.classification_metrics, [0, 1, 1]),
        (metrics.multilabel_metrics, one_hot([0, 1, 1], 2)),
    ]:
        found, whole = measure(logits, labels), measure(np.nan_to_num(logits), labels)
        same(found, dict.fromkeys(whole, NAN))
    same(metrics.masked_lm_metrics(np.float32(NAN)), {"loss": NAN, "perplexity": NAN})


def test_perplexity():
    same(metrics.masked_lm_metrics(math.log(7)), {"loss": math.log(7), "perplexity": 7})
    same(metrics.masked_lm_metrics(1000), {"loss": 1000, "perplexity": INF})


LETTERS = {"IOB1": "IIIB", "IOB2": "BIIB", "IOE2": "IIEE", "IOBES": "BIES", "BILOU": "BILU"}


def tagged(scheme, entities, length):
    """The tags of entities (start, end, type), in order and apart from one another."""
    first, inside, last, single = LETTERS[scheme]
    tags = ["O"] * length
    for index, (start, end, kind) in enumerate(entities):
        letters = single if end - start == 1 else first + inside * (end - start - 2) + last
        if scheme in ("IOB1", "IOB2"):  # these do not mark an end
            follows = index and entities[index - 1][1:] == (start, kind)
            letters = ("B" if follows or scheme == "IOB2" else "I") + "I" * (end - start - 1)
        tags[start:end] = [f"{letter}-{kind}" for letter in letters]
    return tags


@st.composite
def entities(draw, length=8):
    """Entities in a text, some of them right beside each other."""
    cuts = sorted(draw(st.sets(st.integers(0, length), min_size=2)))
    kinds = [draw(st.sampled_from([None, "PER", "LOC-X"])) for _ in cuts[1:]]
    return [(*span, kind) for *span, kind in zip(cuts[:-1], cuts[1:], kinds, strict=True) if kind]


@given(st.lists(st.tuples(entities(), entities()), min_size=1, max_size=4), st.sampled_from([*LETTERS]))
def test_entities_are_those_of_sets_in_every_scheme(texts, scheme):
    expected, predicted = (
        {(text, *entity) for text, pair in enumerate(texts) for entity in pair[side]} for side in (0, 1)
    )
    # Without an entity, tags do not tell IOB1.
    if scheme == "IOB1" and not expected:
        predicted = set()
    right = len(expected & predicted)
    precision, recall = right / max(1, len(predicted)), right / max(1, len(expected))
    f1 = 2 * right / max(1, len(predicted) + len(expected))
    tags = [[tagged(scheme, pair[side], 8) for pair in texts] for side in (0, 1)]
    accuracy = np.mean(np.array(tags[0]) == np.array(tags[1]))
    names = {"O", *(f"{letter}-PER" for letter in {"I", *LETTERS[scheme]})}
    found = metrics.tagging_metrics(tags[1], tags[0], names=names)
    same(found, {"accuracy": accuracy, "precision": precision, "recall": recall, "f1": f1})


def test_an_entity_that_does_not_begin_as_it_should_is_none():
    expected = [["B-PER", "I-PER", "O", "B-LOC"], []]
    assert metrics.tagging_metrics([["I-PER", "I-PER", "O", "B-LOC"], []], expected)["f1"] == 2 / 3
    # The same letters in another scheme, in which B is not an entity.
    names = {"O", *(f"{letter}-{kind}" for letter in "BIES" for kind in ("PER", "LOC"))}
    assert metrics.tagging_metrics(expected, expected, names=names)["f1"] == 0
    for letters in (["B", "I", "O"], ["B", "I", "E"], ["B", "L", "O"], ["S", "O"]):  # not all letters of a scheme
        assert metrics.tagging_metrics([letters], [letters])["f1"] == 1


@pytest.mark.parametrize("tags", [["NOUN", "VERB", "NOUN"], ["B-X", "L-X", "E-X"], ["B-X", "I-X", "Other"]])
def test_tags_of_no_scheme(tags):
    found = metrics.tagging_metrics([tags], [[*tags[:-1], "O"]])
    assert list(found) == ["accuracy", "f1"]
    assert found["accuracy"] == 2 / 3
    same(metrics.tagging_metrics([["N", "V", "N"]], [["N", "V", "V"]]), {"accuracy": 2 / 3, "f1": 2 / 3})


@pytest.mark.parametrize(
    ("predicted", "answers", "exact", "f1"),
    [
        # Made with SQuAD 2.0's own script, evaluate-v2.0.py.
        ("The Eiffel-Tower!", ["eiffeltower"], 1, 1),
        ("in the year 1905", ["1905", "the year 1906"], 0, 0.5),
        ("a cat and a cat", ["cat", "the cat cat sat"], 0, 2 / 3),
        ("", [""], 1, 1),
        ("", [], 1, 1),
        ("the", [""], 1, 1),
        ("", ["the", "1905"], 0, 0),
        ("", ["the", "..."], 1, 1),
        ("1905", [""], 0, 0),
        ("theatre", ["atre", "the"], 0, 0),
        ("\u00a0Zürich,\tam See ", ["zürich am see"], 1, 1),
    ],
)
def test_answers_are_scored_as_squad_does(predicted, answers, exact, f1):
    same(metrics.answer_metrics([predicted], [answers]), {"exact_match": exact, "f1": f1})
    both = metrics.answer_metrics([predicted, "x"], [answers, ["y"]])
    same(both, {"exact_match": exact / 2, "f1": f1 / 2})


TEXTS = st.lists(st.sampled_from(["The", "a", "cat", "Cat,", "sat", "...", "an\n", "1905"]), max_size=5).map(" ".join)


@given(TEXTS, st.lists(TEXTS, max_size=3), TEXTS)
def test_scores_of_answers_are_bounds_of_one_another(predicted, answers, more):
    found = metrics.answer_metrics([predicted], [answers])
    assert 0 <= found["exact_match"] <= found["f1"] <= 1
    assert metrics.answer_metrics([f"the {predicted.upper()}!"], [answers]) == found
    assert metrics.answer_metrics([predicted], [[more]])["f1"] == metrics.answer_metrics([more], [[predicted]])["f1"]
    if any(char in more for char in "cs1C"):  # more than articles and punctuation
        assert metrics.answer_metrics([more], [[*answers, more]]) == {"exact_match": 1, "f1": 1}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: metrics.classification_metrics([[1.0, 2]], [2]),
            r"labels has 2 at \[0\], expected a class from 0",
        ),
        (lambda: metrics.classification_metrics([[1.0, 2]], [1.0]), "labels has the dtype float64, expected integers"),
        (lambda: metrics.classification_metrics([[1.0, 2]], [1, 1]), r"labels has the shape \[2\], expected \[1\]"),
        (lambda: metrics.classification_metrics([1.0, 2], [1, 1]), r"logits has the shape \[2\], expected 2 axes"),
        (lambda: metrics.classification_metrics([["x"]], [0]), "logits is no array of numbers"),
        (lambda: metrics.multilabel_metrics([[1.0, 2]], [[0, 0.5]]), r"labels has 0.5 at \[0, 1\], expected 0 or 1"),
        (lambda: metrics.multilabel_metrics([[1.0, 2]], [[0]]), r"labels has the shape \[1, 1\], expected \[1, 2\]"),
        (lambda: metrics.regression_metrics([1.0], [INF]), r"targets has inf at \[0\], expected a finite number"),
        (lambda: metrics.similarity_metrics([], []), r"cosines has the shape \[0\], expected 1 axes and something"),
        (lambda: metrics.similarity_metrics([1], [1, 2]), r"cosines has the shape \[1\], expected \[2\]"),
        (lambda: metrics.tagging_metrics([["O"]], [["O"], []]), "have 1 and 2 texts, expected as many tags"),
        (lambda: metrics.tagging_metrics([[], ["O"]], [[], []]), "other lengths in text 1, expected as many tags"),
        (lambda: metrics.tagging_metrics(["OO"], [["O", "O"]]), "predicted: text 0 is 'OO', expected a list of tags"),
        (lambda: metrics.tagging_metrics([[]], [[]]), "there are no tags"),
        (lambda: metrics.answer_metrics(["x"], []), "1 predicted answers and 0 expected"),
        (lambda: metrics.answer_metrics([], []), "0 predicted answers"),
        (lambda: metrics.answer_metrics(["x", "y"], [["x"], "y"]), "question 1: expected a text"),
        (lambda: metrics.answer_metrics([None], [["x"]]), "question 0: expected a text"),
        (lambda: metrics.masked_lm_metrics("much"), "mean_loss is no array of numbers"),
    ],
)
def test_what_can_not_be_measured_is_refused(call, message):
    with pytest.raises(InputError, match=message):
        call()


def test_a_library_that_is_not_there_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "seqeval.metrics.v1", None)
    with pytest.raises(SourceError, match=r"seqeval is needed .* pip install 'bertjax\[train\]'"):
        metrics.tagging_metrics([["B-X"]], [["B-X"]])
    monkeypatch.setitem(sys.modules, "sklearn.metrics", None)
    with pytest.raises(SourceError, match="scikit-learn is needed"):
        metrics.classification_metrics([[1.0, 2]], [1])
