"""Rows to labelled tokens: what is learnt of each kind of task, and which rows are refused and why."""

import numpy as np
import pytest
from conftest import WORDS
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import require

from bertjax import SentenceEncoder, Tokenizer
from bertjax.errors import ConfigError, InputError
from bertjax.losses import IGNORED
from bertjax.training.batches import Batches
from bertjax.training.masking import Masking
from bertjax.training.rows import Rows
from bertjax.training.tasks.answering import AnswerQuestions
from bertjax.training.tasks.choosing import ChooseTexts
from bertjax.training.tasks.classification import ClassifyTexts, names_of
from bertjax.training.tasks.sentences import CompareTexts, RankPassages
from bertjax.training.tasks.tagging import TagWords
from bertjax.training.tasks.words import FindMaskedWords, PreTrain

TAGS = ["O", "B-X", "I-X"]
SINGLE, SEVERAL = "single_label_classification", "multi_label_classification"


@pytest.fixture(scope="module")
def tokenizer(vocab_file):
    return Tokenizer.from_vocab(vocab_file)


@pytest.fixture(scope="module")
def spec(sentence_folder):
    return SentenceEncoder.from_pretrained(sentence_folder).spec


def rows_of(records):
    return Rows(list(records), [("file", f"row {index}") for index in range(len(records))])


def classify(tokenizer, names=("no", "yes"), problem=SINGLE, paired=False, max_length=16):
    return ClassifyTexts(tokenizer, max_length, names=names, problem=problem, paired=paired)


# Words of several pieces, of unknown characters, with punctuation and spaces within, and one that leaves nothing.
ODD = ["cats", "the", "xyz", "fast.", "sat,on", "a-b", "!", "CAT", "\u00dcnd", "\u4e2d\u56fd", "\u200d", "the cat"]


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(ODD), st.integers(0, 2)), min_size=1, max_size=12))
def test_tags_stand_where_transformers_word_ids_say(tokenizer, vocab_file, pairs):
    theirs = require("transformers").BertTokenizerFast(str(vocab_file))
    words, tags = [word for word, _ in pairs], [tag for _, tag in pairs]
    examples, rows = TagWords(tokenizer, 12, names=TAGS).examples(rows_of([{"tokens": words, "tags": tags}]))
    encoded = theirs(words, is_split_into_words=True, truncation=True, max_length=12)
    owners = encoded.word_ids()
    expected = [
        tags[word] if word is not None and word != before else IGNORED
        for before, word in zip([None, *owners], owners, strict=False)
    ]
    assert examples.input_ids[0].tolist() == encoded["input_ids"]
    assert examples.labels[0].tolist() == expected
    assert not rows.bad


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_spans_of_tokens_are_the_answers(tokenizer, data):
    words = data.draw(st.lists(st.sampled_from([*WORDS[:19], "cats", "sat."]), min_size=1, max_size=40))
    first = data.draw(st.integers(0, len(words) - 1))
    last = data.draw(st.integers(first, min(first + 3, len(words) - 1)))
    context, start = " ".join(words), len(" ".join([*words[:first], ""]))
    answer = " ".join(words[first : last + 1])
    # Spaces around an answer have no tokens.
    before, behind = data.draw(st.booleans()) and start > 0, data.draw(st.booleans())
    text = context[start - before : start + len(answer) + behind]
    answers = {"text": [text], "answer_start": [start - before]}
    task = AnswerQuestions(tokenizer, 24, doc_stride=10)
    examples, rows = task.examples(rows_of([{"question": "a cat", "context": context, "answers": answers}]))
    assert not rows.bad
    tokens, _ = tokenizer.windows(["a cat"], [context], max_length=24, stride=10)
    found = 0
    for alignment, (begin, end) in zip(tokens.alignments, examples.labels, strict=True):
        own = np.flatnonzero(alignment.sequence_ids == 1)
        covered = alignment.char_span(own[0], own[-1])
        whole = covered[0] <= start and start + len(answer) <= covered[1]
        assert whole == bool(begin)
        if whole:
            assert alignment.char_span(begin, end) == (start, start + len(answer))
            found += 1
        else:
            assert (begin, end) == (0, 0)
    # The longest answer has eight tokens, fewer than windows share.
    assert found >= 1


def test_without_an_answer_it_is_the_first_token(tokenizer):
    records = [{"question": "a", "context": "the cat", "answers": {"text": [], "answer_start": []}}]
    task = AnswerQuestions(tokenizer, 24, doc_stride=10)
    examples, _ = task.examples(rows_of(records))
    assert examples.labels.tolist() == [[0, 0]]
    arrays = Batches(task, examples, batch_size=3, row_length=64).make(0).arrays
    assert arrays["start_positions"].tolist() == arrays["end_positions"].tolist() == [0, 64, 64]


def labels_of(task, *values):
    examples, rows = task.examples(rows_of([{"text": "a cat", "label": value} for value in values]))
    return examples.labels, [(place, why) for _, place, why in rows.bad]


def test_labels_by_name_and_by_number(tokenizer):
    labels, bad = labels_of(classify(tokenizer), "no", "yes", 1, "0", "2", 2, -1, None, True, 1.0, ["yes"], "9" * 5000)
    assert (labels.tolist(), labels.dtype) == ([0, 1, 1, 0], np.int32)
    assert [place for place, _ in bad] == [f"row {row}" for row in range(4, 12)]
    assert bad[0][1] == "its label is '2', expected one of 'no', 'yes', or a number below 2"
    # A name that looks like a number is a name.
    assert labels_of(classify(tokenizer, ["1", "0"]), "1", "0", 1)[0].tolist() == [0, 1, 1]


def test_several_labels(tokenizer):
    task = classify(tokenizer, ["x", "y", "z"], SEVERAL)
    labels, bad = labels_of(task, ["x", "z"], "y|x", [], "", [2], "x|w", [None])
    assert labels.tolist() == [[1, 0, 1], [1, 1, 0], [0, 0, 0], [0, 0, 0], [0, 0, 1]]
    assert labels.dtype == np.float32
    assert [place for place, _ in bad] == ["row 5", "row 6"]


def test_numbers(tokenizer):
    values = (1, "2.5", -3.0, [4], "one", float("nan"), True, 10**400)
    labels, bad = labels_of(classify(tokenizer, ["x"], "regression"), *values)
    assert labels.tolist() == [1.0, 2.5, -3.0, 4.0]
    assert bad[0] == ("row 4", "its label is 'one', expected a finite number")
    assert len(bad) == 4
    labels, bad = labels_of(classify(tokenizer, ["x", "y"], "regression"), [1, 2], "3|4", [5])
    assert labels.tolist() == [[1, 2], [3, 4]]
    assert bad == [("row 2", "its label is [5], expected 2 finite numbers")]


def test_pairs_have_types_and_long_ones_are_cut(tokenizer):
    records = [{"text": "a cat", "pair": "the dog", "label": 0}, {"text": "cat " * 20, "pair": "dog", "label": 1}]
    examples, _ = classify(tokenizer, paired=True).examples(rows_of(records))
    assert examples.token_type_ids[0].tolist() == [0, 0, 0, 0, 1, 1, 1]
    assert (len(examples.input_ids[1]), examples.truncated) == (16, 1)


def test_names_of_labels_in_rows():
    assert names_of([["b"], ["a"], ["b"]]) == ["a", "b"]
    assert names_of(["b|a", ["c"]]) == ["a", "b", "c"]
    assert names_of([[2], ["0"]]) == ["LABEL_0", "LABEL_1", "LABEL_2"]
    assert names_of([["a"], [None], [True], [0.5], [["x"]]]) == ["a"]
    assert names_of([["9" * 5000], ["1"]]) == ["1", "9" * 5000]
    for values in ([], [[None]], [[10**12]], [[0.5]]):
        with pytest.raises(InputError, match="name them in the settings"):
            names_of(values)


def ranking(tokenizer, spec, columns=("query", "passage", "negative", "negative_2")):
    return RankPassages(tokenizer, 16, spec=spec, columns=columns)


TRIPLES = [
    {"query": "cat", "passage": "a cat sat", "negative": None, "negative_2": "it ran"},
    {"query": "dog", "passage": "the dog", "negative": "tree", "negative_2": None},
    {"query": "mat", "passage": "under", "negative": None, "negative_2": None},
]


def first_batch(task, examples):
    """A batch of four, which examples it has, and what tells the tokens at a place of it."""
    batches = Batches(task, examples, batch_size=4)
    arrays = {name: np.asarray(array) for name, array in batches.make(0).arrays.items()}

    def tokens_at(place):
        row, segment = divmod(int(place), batches.layout.segments)
        return arrays["input_ids"][row, arrays["segment_ids"][row] == segment + 1].tolist()

    return arrays, batches._chosen(0), tokens_at


def test_places_are_those_of_the_texts(tokenizer, spec):
    task = ranking(tokenizer, spec)
    examples, rows = task.examples(rows_of(TRIPLES))
    assert not rows.bad
    arrays, chosen, tokens_at = first_batch(task, examples)
    assert arrays["places"].shape == (4, 4)
    for column, name in enumerate(task.columns):
        for place, example in zip(arrays["places"][column], [*chosen, None], strict=True):
            text = None if example is None else TRIPLES[example][name]
            assert (place == -1) if text is None else (tokens_at(place) == tokenizer([text]).input_ids[0].tolist())


CHOICES = [
    {"text": "the cat", "choices": ["sat", "ran fast"], "label": 1},
    {"text": "it ran", "choices": "on|under|and", "label": "0"},
    {"text": "a dog", "choices": ["she", "he", "it"], "label": 2},
]


def test_choices_stand_at_their_places(tokenizer):
    task = ChooseTexts(tokenizer, 16)
    examples, rows = task.examples(rows_of(CHOICES))
    assert not rows.bad
    arrays, chosen, tokens_at = first_batch(task, examples)
    assert arrays["places"].shape == (3, 4)
    assert arrays["labels"].tolist() == [*(int(CHOICES[example]["label"]) for example in chosen), IGNORED]
    for example, column in zip(chosen, arrays["places"].T, strict=False):
        record = CHOICES[example]
        choices = record["choices"].split("|") if isinstance(record["choices"], str) else record["choices"]
        assert (column >= 0).sum() == len(choices)
        for choice, place in zip(choices, column, strict=False):
            assert tokens_at(place) == tokenizer([record["text"]], [choice]).input_ids[0].tolist()
    assert (arrays["places"][:, 3] == -1).all()


def test_scores_of_pairs(tokenizer, spec):
    task = CompareTexts(tokenizer, 16, spec=spec, columns=["text", "pair"], scale=5.0)
    values = [5, "2.5", -5.0, 6, "x", None, float("nan"), 10**400]
    examples, rows = task.examples(rows_of([{"text": "a", "pair": "it", "score": value} for value in values]))
    assert examples.labels.tolist() == [1.0, 0.5, -1.0]
    assert rows.bad[0] == ("file", "row 3", "its score is 6, expected a number from -5 to 5")
    arrays = Batches(task, examples, batch_size=4).make(0).arrays
    assert np.isnan(arrays["labels"]).tolist() == [False, False, False, True]


def test_masked_words_are_to_be_found_again(tokenizer):
    task = FindMaskedWords(tokenizer, 12, masking=Masking.of(tokenizer, probability=0.4))
    examples, _ = task.examples(rows_of([{"text": "the cat sat on the mat " * 5}, {"text": ""}, {"text": "it ran"}]))
    assert [len(each) for each in examples.input_ids] == [12, 12, 12, 4]
    arrays = {name: np.asarray(each) for name, each in Batches(task, examples, batch_size=4).make(0).arrays.items()}
    chosen = arrays["labels"] != IGNORED
    assert chosen.sum() == 4 + 4 + 4 + 1
    assert (arrays["segment_ids"][chosen] > 0).all()
    restored = np.where(chosen, arrays["labels"], arrays["input_ids"])
    found = [
        ids[segments == segment].tolist()
        for ids, segments in zip(restored, arrays["segment_ids"], strict=True)
        for segment in range(1, segments.max() + 1)
    ]
    assert sorted(found) == sorted(each.tolist() for each in examples.input_ids)
    assert (arrays["input_ids"] == tokenizer.mask_token_id).any()


def test_pairs_of_sentences(tokenizer):
    texts = ["the cat sat .", "it ran .", "the dog", "", "a tree", "she is fast", "", "he was slow", "on a mat"]
    task = PreTrain(tokenizer, 24, masking=Masking.of(tokenizer), seed=0)
    examples, _ = task.examples(rows_of([{"text": text} for text in texts]))
    arrays = Batches(task, examples, batch_size=len(examples)).make(0).arrays
    assert set(np.unique(examples.labels)) <= {0, 1}
    assert (np.asarray(arrays["next_sentence_label"]) != IGNORED).sum() == len(examples) >= 3
    again, _ = task.examples(rows_of([{"text": text} for text in texts]))
    assert [each.tolist() for each in again.input_ids] == [each.tolist() for each in examples.input_ids]


GOOD = {"text": ["cat"], "answer_start": [4]}


@pytest.mark.parametrize(
    ("of", "good", "bad", "reason"),
    [
        ("classify", {"text": "a", "label": 0}, {"text": 3}, "its text is 3, expected a text"),
        ("pairs", {"text": "a", "pair": "b", "label": 0}, {"pair": None}, "its pair is None, expected a text"),
        ("tag", {"tokens": ["a"], "tags": ["O"]}, {"tokens": "a"}, "its tokens are 'a', expected a list of words"),
        ("tag", {"tokens": ["a"], "tags": ["O"]}, {"tokens": [""]}, "its tokens are [''], expected a list of words"),
        ("tag", {"tokens": ["a"], "tags": ["O"]}, {"tokens": []}, "its tokens are [], expected a list of words"),
        ("tag", {"tokens": ["a"], "tags": [0]}, {"tags": ["O", "O"]}, "it has 1 tokens and the tags ['O', 'O'], expec"),
        ("tag", {"tokens": ["a"], "tags": [2]}, {"tags": ["B-Y"]}, "its label is 'B-Y', expected one of 'O', 'B-"),
        ("answer", {"answers": GOOD}, {"answers": "cat"}, "its answers are 'cat', expected {"),
        (
            "answer",
            {"answers": GOOD},
            {"answers": GOOD | {"answer_start": []}},
            "its answers are {'text': ['cat'], ",
        ),
        ("answer", {"answers": GOOD}, {"answers": GOOD | {"answer_start": [float("inf")]}}, "its answers are {'text'"),
        (
            "answer",
            {"answers": GOOD},
            {"answers": GOOD | {"answer_start": [3]}},
            "its answer is 'cat' at character 3, ",
        ),
        (
            "answer",
            {"answers": GOOD},
            {"answers": {"text": [""], "answer_start": [4]}},
            "its answer is '' at",
        ),
        ("answer", {"answers": GOOD}, {"context": " "}, "its question or its context is empty"),
        ("answer", {"answers": GOOD}, {"question": "cat " * 30}, "its question is too long for windows of 24 tokens"),
        ("rank", TRIPLES[1], {"passage": 1}, "its passage is 1, expected a text"),
        ("rank", TRIPLES[1], {"negative": 1}, "its negative is 1, expected a text"),
        ("choose", CHOICES[0], {"text": None}, "its text is None, expected a text"),
        ("choose", CHOICES[0], {"choices": ["cat"]}, "its choices are ['cat'], expected a list of two texts or more"),
        ("choose", CHOICES[0], {"choices": ["cat", 3]}, "its choices are ['cat', 3], expected a list of two"),
        ("choose", CHOICES[0], {"label": 2}, "its label is 2, expected the place of one of 2 choices, counted from 0"),
        ("choose", CHOICES[0], {"label": True}, "its label is True, expected the place of one"),
        ("choose", CHOICES[0], {"label": "cat"}, "its label is 'cat', expected the place of one"),
        ("mask", {"text": "a"}, {"text": None}, "its text is None, expected a text"),
    ],
)
def test_bad_rows_are_refused_by_their_place(tokenizer, spec, of, good, bad, reason):
    task = {
        "classify": lambda: classify(tokenizer),
        "pairs": lambda: classify(tokenizer, paired=True),
        "tag": lambda: TagWords(tokenizer, 16, names=TAGS),
        "answer": lambda: AnswerQuestions(tokenizer, 24, doc_stride=8),
        "rank": lambda: ranking(tokenizer, spec),
        "choose": lambda: ChooseTexts(tokenizer, 16),
        "mask": lambda: FindMaskedWords(tokenizer, 16, masking=Masking.of(tokenizer)),
    }[of]()
    good = {"question": "what", "context": "the cat", **good} if of == "answer" else good
    examples, rows = task.examples(rows_of([good, good | bad, good]))
    assert [place for _, place in rows.places] == ["row 0", "row 2"]
    assert len(examples.records) in (0, 2)
    [(file, place, why)] = rows.bad
    assert (file, place) == ("file", "row 1")
    assert why.startswith(reason)


def test_windows_have_to_be_longer_than_what_they_share(tokenizer):
    with pytest.raises(ConfigError, match="doc_stride is 21, which is too much for windows of max_length=24"):
        AnswerQuestions(tokenizer, 24, doc_stride=21)
