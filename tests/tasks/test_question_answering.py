import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
from conftest import DATA, compiles
from flax import nnx

from bertjax import ConfigError, InputError, Tokenizer, TokenizerError
from bertjax.heads import BertForQuestionAnswering
from bertjax.tasks.question_answering import Answer, QuestionAnswering

GOLDEN = DATA / "tasks" / "question_answering"
EXPECTED = json.loads((GOLDEN / "expected.json").read_text(encoding="utf-8"))
DOCUMENTS = EXPECTED["documents"]
ASKED = [(question, DOCUMENTS[i]) for question, i in EXPECTED["calls"][0]["inputs"]]
LETTERS = "a b c d e f g h i j"


@pytest.fixture(scope="module")
def task() -> QuestionAnswering:
    """The golden model; small steps, so that a call has many."""
    model = BertForQuestionAnswering.from_pretrained(GOLDEN / "model")
    return QuestionAnswering(model, Tokenizer.from_folder(GOLDEN / "model"), step_tokens=400)


@pytest.fixture(scope="module")
def even(task) -> QuestionAnswering:
    """The same with all logits equal: of t tokens of context and [CLS], each has the probability 1 / (t + 1)."""
    model = nnx.clone(task.model)
    kernel, bias = model.qa_outputs.kernel, model.qa_outputs.bias
    kernel[...], bias[...] = jnp.zeros_like(kernel[...]), jnp.zeros_like(bias[...])
    return QuestionAnswering(model, task.tokenizer)


def assert_close(answers, expected):
    assert [(a.start, a.end, a.answer) for a in answers] == [(a.start, a.end, a.answer) for a in expected]
    np.testing.assert_allclose([a.score for a in answers], [a.score for a in expected], rtol=0, atol=1e-6)


@pytest.mark.parametrize("call", EXPECTED["calls"], ids=lambda call: ",".join(call["options"]) or "defaults")
def test_answers_are_those_of_the_pipeline(task, call):
    inputs = [{"question": question, "context": DOCUMENTS[i]} for question, i in call["inputs"]]
    answers = task(inputs, **call["options"])
    assert len(answers) == len(inputs)
    for given, expected in zip(answers, call["answers"], strict=True):
        given = given if isinstance(given, list) else [given]
        expected = expected if isinstance(expected, list) else [expected]
        for answer, wanted in zip(given, expected, strict=True):
            assert (answer.start, answer.end, answer.answer) == (wanted["start"], wanted["end"], wanted["answer"])
            assert abs(answer.score - wanted["score"]) < 1e-5


def test_the_golden_answers_tell_right_from_wrong():
    every, impossible, pieces, *_ = (call["answers"] for call in EXPECTED["calls"])
    assert len({(answer["start"], answer["end"]) for answer in every}) > 30
    assert 0 < sum(answer["answer"] == "" for answer in impossible) < len(impossible)
    cut = [(a["end"], document) for a, document in zip(pieces, DOCUMENTS, strict=True) if a["end"] < len(document)]
    assert any(document[end - 1].isalpha() and document[end].isalpha() for end, document in cut)


def test_an_answer_does_not_depend_on_company_or_place(task):
    together = task(ASKED, top_k=3)
    order = np.random.default_rng(0).permutation(len(ASKED))
    shuffled = task([ASKED[i] for i in order], top_k=3)
    for place, i in enumerate(order):
        assert_close(shuffled[place], together[i])
    for i in (0, 7, 8):
        assert_close(task(ASKED[i], top_k=3), together[i])


def test_an_answer_is_a_part_of_its_context_in_plain_types(task):
    for (_, context), answer in zip(ASKED, task(ASKED), strict=True):
        assert answer.answer == context[answer.start : answer.end] != ""
        assert [type(value) for value in dataclasses.astuple(answer)] == [float, int, int, str]


def test_one_input_gives_one_answer_and_several_a_list(task):
    question, context = ASKED[0]
    answer = task((question, context))
    assert isinstance(answer, Answer)
    assert task({"question": question, "context": context}) == answer
    assert task([(question, context)]) == [answer]
    assert task(iter([(question, context)])) == [answer]
    assert task([]) == []
    assert task((question, context), top_k=2)[0] == answer


def test_equal_spans_come_in_the_order_of_the_context(even):
    answers = even(("who?", "a b c"), top_k=10, align_to_words=False)
    assert [answer.answer for answer in answers] == ["a", "a b", "a b c", "b", "b c", "c"]  # and none more
    assert [answer.score for answer in answers] == [1 / 16] * 6
    answers = even(("who?", "a b c"), top_k=3, max_answer_len=1)
    assert [(answer.start, answer.end) for answer in answers] == [(0, 1), (2, 3), (4, 5)]


def test_no_answer_has_the_least_score_of_all_windows(even):
    *_, last = even(("who?", "a b c"), top_k=10, align_to_words=False, handle_impossible_answer=True)
    assert last == Answer(1 / 16, 0, 0, "")
    # [CLS] who ? [SEP] and [SEP] leave room for 7 letters, and then for the last 3: [CLS] scores 1/8 ** 2 and 1/4 ** 2.
    options = {"max_seq_len": 12, "doc_stride": 0, "max_answer_len": 1, "handle_impossible_answer": True}
    answers = even(("who?", LETTERS), top_k=20, **options)
    assert [answer.score for answer in answers] == [1 / 16] * 3 + [1 / 64] * 8
    assert [answer.answer for answer in answers] == [*"hij", *"abcdefg", ""]


def test_equal_texts_are_merged_and_their_scores_added(even):
    # In each window 2 * top_k + 10 spans are considered, which are all of these.
    answers = even(("who?", "cafe the CAFE, Cafe"), top_k=3, max_answer_len=1)
    assert [(answer.answer, answer.start, answer.end) for answer in answers] == [
        ("cafe", 0, 4),
        ("the", 5, 8),
        (",", 13, 14),
    ]
    assert [answer.score for answer in answers] == pytest.approx([3 / 36, 1 / 36, 1 / 36])
    # The windows abcdefg, efghij share efg.
    answers = even(("who?", LETTERS), top_k=10, max_seq_len=12, doc_stride=3, max_answer_len=1)
    scores = {answer.answer: answer.score for answer in answers}
    assert scores == pytest.approx(
        dict.fromkeys("abcd", 1 / 64) | dict.fromkeys("efg", 1 / 64 + 1 / 49) | dict.fromkeys("hij", 1 / 49)
    )


def test_pieces_of_a_word_become_the_word(even):
    answers = even(("who?", "Closedly"), top_k=9)
    assert answers == [Answer(pytest.approx(3 / 9), 0, 8, "Closedly")]
    answers = even(("who?", "Closedly"), top_k=9, align_to_words=False)
    assert [answer.answer for answer in answers] == ["Closed", "Closedly", "ly"]


@pytest.mark.parametrize("context", [" ", "\u0007", "\n\t"])
def test_a_context_without_tokens_has_no_answer(task, context):
    assert task(("who?", context)) == Answer(0.0, 0, 0, "")
    assert task(("who?", context), top_k=3) == [Answer(0.0, 0, 0, "")]
    assert task(("who?", context), handle_impossible_answer=True) == Answer(1.0, 0, 0, "")


def test_windows_overlap_by_half_of_a_short_one(task):
    document = ("who closed the bridge", DOCUMENTS[-1])
    answers = task(document, top_k=5, max_seq_len=80)
    assert answers == task(document, top_k=5, max_seq_len=80, doc_stride=40)
    assert answers != task(document, top_k=5, max_seq_len=80, doc_stride=39)
    assert task(document, top_k=5) == task(document, top_k=5, max_seq_len=384, doc_stride=128)


def test_a_question_is_cut_after_its_last_whole_word(task):
    question, context = "who closed the bridgeshire in winter", DOCUMENTS[5]  # bridge ##shire
    for count, kept in ((3, "who closed the"), (4, "who closed the"), (5, "who closed the bridgeshire"), (7, question)):
        assert task((question, context), max_question_len=count) == task((kept, context))
    assert task((question, context)) != task(("who closed the", context))
    with pytest.raises(InputError, match=r"inputs\[1\]: the question's first word has more than max_question_len=1"):
        task([("who", context), ("bridgeshire", context)], max_question_len=1)


def test_shapes_are_compiled_once(task):
    rng = np.random.default_rng(0)

    def call():
        order = rng.permutation(len(ASKED))
        task([(ASKED[i][0], ASKED[j][1]) for i, j in enumerate(order)], max_seq_len=100)
        return task(ASKED[int(rng.integers(3))])

    call()
    assert compiles(call) == 0


def test_a_stream_is_read_as_it_is_answered(task):
    read = []

    def stream():
        for i in range(300):
            read.append(i)
            yield ASKED[i % len(ASKED)]
        raise OSError("the stream broke")

    windows = task.stream(stream(), max_answer_len=3)
    first = next(windows)
    assert len(read) < 300
    answers = list(first.answers)
    with pytest.raises(OSError, match="the stream broke"):
        for window in windows:
            answers += window.answers
    assert len(answers) == 300 - 300 % 32  # the rest was not complete when it broke
    every = task(ASKED, max_answer_len=3)
    assert_close(answers, [every[i % len(ASKED)] for i in range(len(answers))])


BAD = [
    ("who?", r"inputs\[3\] is no pair of texts; pass a tuple, \(question, context\), or a mapping with"),
    (("who?",), r"inputs\[3\] is a tuple of 1"),
    (["who?", "a", "b"], r"inputs\[3\] is a list of 3, expected a pair"),
    ({"question": "who?"}, r"inputs\[3\] has the keys \['question'\]"),
    ({"question": "who?", "context": "a", "id": 7}, r"inputs\[3\] has the keys \['context', 'id', 'question'\]"),
    ({"question": "who?", "context": None}, r"inputs\[3\]\['context'\] is None of type NoneType, not a str"),
    ((7, "a"), r"inputs\[3\]\[0\] is 7 of type int"),
    (("", "a"), r"inputs\[3\]: the question is empty"),
    (("who?", ""), r"inputs\[3\]: the context is empty"),
    (("who?", "a \ud800"), r"inputs\[3\]\[1\] has a lone surrogate"),
    (("the " * 30, "a " * 40), r"inputs\[3\]: the question has 30 tokens, .* max_seq_len=60 .* doc_stride=30"),
    (("the " * 90, "a " * 40), r"inputs\[3\]: the question has 90 tokens"),
]


@pytest.mark.parametrize(("bad", "message"), BAD, ids=[message[11:50] for _, message in BAD])
def test_what_is_no_question_with_its_context_is_refused_with_its_position(task, bad, message):
    good = ("the " * 30, "a b c")  # is not cut, so its question may be as long
    with pytest.raises(InputError, match=message):
        task([good, good, good, bad, good], max_seq_len=60)
    if isinstance(bad, list):
        return  # by itself it is several inputs
    with pytest.raises(InputError, match=message.replace("3", "0", 1)):
        task(bad, max_seq_len=60)


def test_a_position_counts_from_the_start_of_the_call(task):
    good = ("who?", "a b c")  # the tokenizer is given 32 inputs at a time
    for bad, message in (
        (("who?", 7), r"inputs\[40\]\[1\] is 7 of type int"),
        (("the " * 90, "a " * 40), r"inputs\[40\]: the question has 90 tokens"),
    ):
        with pytest.raises(InputError, match=message):
            task([*[good] * 40, bad], max_seq_len=60)


def test_errors_of_the_tokenizer_have_the_position_in_the_call(task):
    # This one fails at what is not in its vocabulary.
    vocab = [("[PAD]", 0.0), ("[CLS]", 0.0), ("a", -1.0)]
    backend = tokenizers.Tokenizer(tokenizers.models.Unigram(vocab, unk_id=None))
    special = {"pad_token": "[PAD]", "cls_token": "[CLS]"}
    with pytest.raises(ConfigError, match=r"the tokenizer puts no \[CLS\] before a question"):
        QuestionAnswering(task.model, Tokenizer(backend, special_tokens=special))
    backend.post_processor = tokenizers.processors.TemplateProcessing(
        single="[CLS] $A", pair="[CLS] $A $B:1", special_tokens=[("[CLS]", 1)]
    )
    strict = QuestionAnswering(task.model, Tokenizer(backend, special_tokens=special))
    for options in ({}, {"max_question_len": 9}):
        with pytest.raises(TokenizerError, match="position 40: "):
            strict([*[("a", "a")] * 40, ("b", "a")], **options)


def test_options_may_be_integers_of_numpy(task):
    options = {"top_k": 2, "max_answer_len": 3, "max_seq_len": 80, "doc_stride": 20, "max_question_len": 5}
    as_numpy = {name: np.int8(value) for name, value in options.items()}
    assert task(ASKED[0], **as_numpy) == task(ASKED[0], **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_seq_len": 401}, "max_seq_len is 401, but this model takes at most 400 tokens"),
        ({"max_seq_len": 0}, "max_seq_len is 0, expected a positive integer"),
        ({"max_seq_len": 3}, "max_seq_len=3 leaves 0 tokens besides the special ones"),
        ({"doc_stride": 381}, "max_seq_len=384 leaves 381 tokens .* doc_stride=381"),
        ({"doc_stride": -1}, "doc_stride is -1, expected an integer of at least 0"),
        ({"top_k": 0}, "top_k is 0"),
        ({"top_k": True}, "top_k is True"),
        ({"max_answer_len": 0}, "max_answer_len is 0"),
        ({"max_question_len": 0}, "max_question_len is 0"),
        ({"align_to_words": "yes"}, "align_to_words is 'yes', expected one of True, False"),
        ({"handle_impossible_answer": None}, "handle_impossible_answer is None"),
    ],
)
def test_unusable_options_are_refused(task, options, message):
    with pytest.raises(InputError, match=message):
        task(ASKED[0], **options)
