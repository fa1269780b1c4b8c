import dataclasses
import json
import random
from dataclasses import asdict, astuple
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from conftest import compiles
from flax import nnx
from oracle import require

from bertjax import Tokenizer, engine
from bertjax.errors import ConfigError, InputError
from bertjax.heads import BertForTokenClassification
from bertjax.tasks.token_classification import Entity, EntityGroup, TokenClassification, WordLabel

FOLDER = Path(__file__).parents[1] / "data/tasks/token_classification"
GOLDEN = json.loads((FOLDER / "expected.json").read_text(encoding="utf-8"))
TEXTS = GOLDEN["texts"]
STRATEGIES = ("none", "simple", "first", "average", "max")
LONG = " ".join(TEXTS)  # about 300 tokens
# All tasks have shapes in common, so that little is compiled.
STEP = {"step_tokens": 128}
SHORT = {"max_length": 32, "step_tokens": 32}


@pytest.fixture(scope="module")
def model():
    return BertForTokenClassification.from_pretrained(FOLDER / "model")


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.from_folder(FOLDER / "model")


@pytest.fixture(scope="module")
def task(model, tokenizer):
    return TokenClassification(model, tokenizer, **STEP)


@pytest.fixture(scope="module")
def context_free(model):
    """A model to which a token is the same wherever it stands."""
    graphdef, state = nnx.split(model)
    free = nnx.merge(graphdef, state)
    for kernel in (
        free.bert.embeddings.position_embeddings.embedding,
        free.bert.encoder.layers.attention.output.kernel,
    ):
        kernel[...] = 0 * kernel[...]
    return free


def assert_same(entities, expected):
    """Entities are those given as tuples: equal, but for the rounding of scores."""
    entities, expected = [astuple(entity) for entity in entities], list(expected)
    assert [values[:1] + values[2:] for values in entities] == [(e[0], *e[2:]) for e in expected]
    np.testing.assert_allclose([e[1] for e in entities], [e[1] for e in expected], rtol=0, atol=1e-5)


@pytest.mark.parametrize("case", GOLDEN["cases"], ids=lambda case: "-".join(map(str, case["options"].values())))
def test_pipeline_of_transformers_4(task, case):
    found = task(TEXTS, **case["options"])
    kind = Entity if case["options"]["aggregation_strategy"] == "none" else EntityGroup
    assert {type(entity) for entities in found for entity in entities} == {kind}
    for entities, expected in zip(found, case["entities"], strict=True):
        assert_same(entities, expected)


@pytest.fixture(scope="module")
def torch_model():
    require("torch")
    return require("transformers").BertForTokenClassification.from_pretrained(FOLDER / "model")


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_pipeline_of_transformers(task, torch_model, strategy):
    transformers = require("transformers")
    reference = transformers.AutoTokenizer.from_pretrained(FOLDER / "model")
    pipeline = transformers.TokenClassificationPipeline(model=torch_model, tokenizer=reference)
    for text in TEXTS:
        entities, expected = task(text, aggregation_strategy=strategy), pipeline(text, aggregation_strategy=strategy)
        assert [list(asdict(entity)) for entity in entities] == [list(entity) for entity in expected]
        assert_same(entities, [list(entity.values()) for entity in expected])


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_tokenizer_that_marks_no_pieces(model, torch_model, strategy):
    transformers = require("transformers")
    pieces = ["[PAD]", "[UNK]", "▁", "▁the", "▁river", "▁new", "stone", "é", *"abcdefghijklmnopqrstuvwxyz.,"]
    backend = tokenizers.Tokenizer(tokenizers.models.Unigram([(piece, -len(piece)) for piece in pieces], unk_id=1))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    backend.decoder = tokenizers.decoders.Metaspace()
    special = {"unk_token": "[UNK]", "pad_token": "[PAD]"}
    own = TokenClassification(model, Tokenizer(backend, special_tokens=special), **STEP)
    reference = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, model_max_length=128, **special)
    pipeline = transformers.TokenClassificationPipeline(model=torch_model, tokenizer=reference)
    for text in ("the riverstone, a cafés end. Any", "new  stone\tab, new", "☃é the☃ a"):
        if strategy in ("none", "simple"):
            expected = pipeline(text, aggregation_strategy=strategy)
        else:
            with pytest.warns(UserWarning, match="does not support real words"):
                expected = pipeline(text, aggregation_strategy=strategy)
        assert_same(own(text, aggregation_strategy=strategy), [list(entity.values()) for entity in expected])


@pytest.mark.parametrize("strategy", ["simple", "first", "average", "max"])
def test_only_what_is_kept_is_spelt(model, tokenizer, strategy):
    task = TokenClassification(model, tokenizer, **STEP)
    spelt = []
    task.__dict__["_join"] = lambda pieces: spelt.append(pieces) or " ".join(pieces)
    assert task(TEXTS, aggregation_strategy=strategy, ignore_labels=task._group_names) == [[] for _ in TEXTS]
    assert spelt == []
    found = task(TEXTS, aggregation_strategy=strategy)
    tokens = sum(len(ids) for ids in tokenizer(TEXTS).input_ids)
    assert 0 < sum(map(len, found)) <= len(spelt) < tokens


def test_a_few_documents_are_read_at_a_time(task, monkeypatch):
    monkeypatch.setattr(engine, "_WINDOW_ROWS", 1)
    assert [len(window.answers) for window in task.stream(TEXTS[0] for _ in range(70))] == [32, 32, 6]


@pytest.mark.parametrize("strategy", ["none", "average"])
def test_company_and_order_do_not_matter(task, strategy):
    together = task(TEXTS, aggregation_strategy=strategy)
    order = random.Random(0).sample(range(len(TEXTS)), len(TEXTS))
    shuffled = task([TEXTS[i] for i in order], aggregation_strategy=strategy)
    for position, i in enumerate(order):
        assert_same(shuffled[position], map(astuple, together[i]))
        assert_same(task(TEXTS[i], aggregation_strategy=strategy), map(astuple, together[i]))


def test_other_texts_compile_nothing(model, tokenizer):
    task = TokenClassification(model, tokenizer, **STEP)
    task([*TEXTS, LONG], aggregation_strategy="simple")
    assert compiles(lambda: task([LONG[::-1], *TEXTS[3:]], aggregation_strategy="max")) == 0


@pytest.mark.parametrize("stride", [None, 0, 1, 7, 24, 29])
def test_no_boundary_shows(context_free, tokenizer, stride):
    """To a model without context it makes no difference where windows begin and end."""
    text = TEXTS[3] + LONG[:180] + TEXTS[3]
    whole = TokenClassification(context_free, tokenizer, **STEP)
    parts = TokenClassification(context_free, tokenizer, **SHORT)
    assert len(tokenizer([text]).input_ids[0]) < 128
    for strategy in STRATEGIES:
        options = {"aggregation_strategy": strategy, "ignore_labels": []}
        assert_same(parts(text, **options, stride=stride), map(astuple, whole(text, **options)))


@pytest.mark.parametrize("stride", [0, 5, 6, 21, 26])
def test_labels_come_from_the_farthest_from_an_edge(task, model, tokenizer, stride):
    length = SHORT["max_length"]
    ids = tokenizer([LONG]).input_ids[0][1:-1]
    best, logits = np.full(len(ids), -1), np.zeros((len(ids), model.config.num_labels))
    for first in range(0, len(ids) - stride, length - 2 - stride):
        last = min(first + length - 2, len(ids))
        row = np.array([[tokenizer.cls_token_id, *ids[first:last], tokenizer.sep_token_id]])
        padded = np.pad(row, ((0, 0), (0, length - row.shape[1])))
        own = np.asarray(model(padded, np.arange(length)[None] < row.shape[1]).logits)[0, 1 : last - first + 1]
        # The ends of the text are no edges: nothing is missing there.
        left = np.arange(last - first) if first else np.full(last, len(ids))
        right = np.arange(last - first)[::-1] if last < len(ids) else np.full(last - first, len(ids))
        distance = np.minimum(left, right)
        better = distance > best[first:last]
        best[first:last][better] = distance[better]
        logits[first:last][better] = own[better]
    task = TokenClassification(model, tokenizer, **SHORT)
    found = task(LONG, stride=stride, ignore_labels=[])
    assert [entity.index for entity in found] == list(range(1, len(ids) + 1))
    probabilities = np.exp(logits) / np.exp(logits).sum(axis=-1, keepdims=True)
    np.testing.assert_allclose([entity.score for entity in found], probabilities.max(axis=-1), rtol=0, atol=1e-5)
    names = [model.config.id2label[label] for label in probabilities.argmax(axis=-1).tolist()]
    assert [entity.entity for entity in found] == names


def test_long_text_among_short_ones(model, tokenizer):
    task = TokenClassification(model, tokenizer, **SHORT)
    texts = [TEXTS[3], LONG, "", TEXTS[4], LONG[100:], TEXTS[3]]
    together = task(texts, aggregation_strategy="first")
    for text, entities in zip(texts, together, strict=True):
        assert_same(entities, map(astuple, task(text, aggregation_strategy="first")))
        spans = [(entity.start, entity.end) for entity in entities]
        assert spans == sorted(spans) and all(text[start:end].strip() for start, end in spans)
    windows = list(task.stream(iter(texts), aggregation_strategy="first"))
    assert [answer for window in windows for answer in window.answers] == together
    assert sum(window.truncated for window in windows) == 0


def test_nothing_to_find(task):
    assert task([]) == []
    assert task("") == []
    for strategy in STRATEGIES:
        assert task(["", " "], aggregation_strategy=strategy) == [[], []]


def first_token_labels(task, words):
    """The labels of words, by the spans that they have in their text."""
    tokens = task(" ".join(words), ignore_labels=[])
    starts = np.cumsum([0, *(len(word) + 1 for word in words)])
    labels = []
    for start, word in zip(starts, words, strict=False):
        own = [token for token in tokens if start <= token.start < start + len(word)]
        labels.append(WordLabel(own[0].entity, own[0].score) if own else None)
    return labels


def test_words(task):
    sentences = [text.split() for text in TEXTS] + [["cafés!", "\u200b", "", "Anna"], [], ["a"]]
    found = task.label_words(sentences)
    for words, labels in zip(sentences, found, strict=True):
        expected = first_token_labels(task, words)
        assert [label and label.label for label in labels] == [label and label.label for label in expected]
        scores = [[label.score for label in both if label] for both in (labels, expected)]
        np.testing.assert_allclose(*scores, rtol=0, atol=1e-6)
    assert found[len(TEXTS)][1:3] == [None, None]
    streamed = task.stream((words for words in sentences), words=True)
    assert [answer for window in streamed for answer in window.answers] == found


def test_words_of_one_text(task):
    words = TEXTS[3].split()
    assert task.label_words(words) == task.label_words(tuple(words)) == task.label_words([words])[0]
    assert task.label_words([]) == task.label_words(iter([])) == []
    assert task.label_words([[], []]) == [[], []]


def test_words_of_a_long_text(context_free, tokenizer):
    words = LONG[:250].split()
    whole = TokenClassification(context_free, tokenizer, **STEP).label_words(words)
    parts = TokenClassification(context_free, tokenizer, **SHORT).label_words(words, stride=3)
    assert [label and label.label for label in parts] == [label and label.label for label in whole]


@pytest.mark.parametrize(
    ("inputs", "options", "message"),
    [
        (["a", 1], {}, r"inputs\[1\] is 1 of type int, not a str"),
        ([["a"]], {}, r"inputs\[0\] is \['a'\] of type list, not a str"),
        ([("a", "b")], {}, r"inputs\[0\] is \('a', 'b'\) of type tuple, not a str"),
        (5, {}, "inputs is a int"),
        ("a", {"aggregation_strategy": "last"}, "aggregation_strategy is 'last', expected one of 'none', 'simple'"),
        ("a", {"ignore_labels": "O"}, "ignore_labels is 'O', expected a list of labels"),
        ("a", {"ignore_labels": None}, "ignore_labels is None, expected a list of labels"),
        ("a", {"stride": -1}, "stride must be a whole number from 0, not -1"),
        ("a", {"stride": 126}, "max_length=128 leaves 126 tokens .* stride=126"),
    ],
)
def test_refusals(task, inputs, options, message):
    with pytest.raises(InputError, match=message):
        task(inputs, **options)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ([["a"], "b"], r"inputs\[1\] is 'b', expected the list of a text's words"),
        ([["a"], ["b", 2]], r"inputs\[1\] is \['b', 2\], expected"),
        ("a b", r"inputs\[0\] is 'a b', expected"),
    ],
)
def test_refused_words(task, inputs, message):
    with pytest.raises(InputError, match=message):
        task.label_words(inputs)


def test_unusable_labels(model, tokenizer):
    graphdef, state = nnx.split(model)
    unnamed = nnx.merge(graphdef, state)
    unnamed.config = dataclasses.replace(model.config, extra={"id2label": {"0": "O", "2": "B-a"}})
    with pytest.raises(ConfigError, match="id2label"):
        TokenClassification(unnamed, tokenizer)("a")
