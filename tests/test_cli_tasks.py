"""The commands that answer texts: the same as the task's class from Python, a JSON line each."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
from conftest import DATA
from test_cli import run
from test_heads import random_heads

from bertjax import (
    CrossEncoder,
    FillMask,
    NextSentence,
    QuestionAnswering,
    SparseEncoder,
    TextClassification,
    TokenClassification,
    ZeroShotClassification,
    from_pretrained,
)

FOLDERS = {path.name: path / "model" for path in (DATA / "tasks").iterdir() if (path / "model").is_dir()}
TEXTS = ["The storm was the worst in Paris.", "", "She went to the naïve café"]
PAIRS = [("The team won the game.", "The team was happy."), ("it rained", "a goal"), ("sun", "")]
MASKED = ["She went to the [MASK].", "the [MASK] and the [MASK]"]


def as_json(answers):
    return json.loads(json.dumps(answers, default=dataclasses.asdict))


def lines(result):
    return [json.loads(line) for line in result.stdout.splitlines()]


def assert_same(found, expected):
    """Scores may differ by rounding, because a command and a call need not pack alike."""
    if isinstance(expected, dict):
        assert found.keys() == expected.keys()
        found, expected = list(found.values()), list(expected.values())
    if isinstance(expected, list):
        assert len(found) == len(expected)
        for ours, theirs in zip(found, expected, strict=True):
            assert_same(ours, theirs)
    elif isinstance(expected, float):
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)
    else:
        assert found == expected


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Folders of a cross-encoder and of a next-sentence model."""
    folder = tmp_path_factory.mktemp("models")
    config = from_pretrained(FOLDERS["classification"]).config
    config = type(config).from_hf(config.to_hf() | {"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}})
    for name in ("BertForSequenceClassification", "BertForNextSentencePrediction"):
        random_heads(name, config).save_pretrained(folder / name)
        for file in ("vocab.txt", "tokenizer_config.json"):
            shutil.copy(FOLDERS["classification"] / file, folder / name)
    return folder


def pairs_file(tmp_path, first, second):
    file = tmp_path / "pairs.jsonl"
    file.write_text("".join(json.dumps({"id": 1, first: a, second: b}) + "\n" for a, b in PAIRS))
    return file


def test_fill_mask():
    expected = FillMask.from_pretrained(FOLDERS["fill_mask"])(MASKED, top_k=2, targets=["the", "river"])
    options = ["--top-k", "2", "--target", "the", "--target", "river"]
    result = run("fill-mask", "-m", FOLDERS["fill_mask"], *options, stdin="\n".join(MASKED))
    assert_same(lines(result), as_json(expected))
    assert result.stderr.startswith("2 text(s), ")


@pytest.mark.parametrize(
    ("options", "call"),
    [((), {}), (("--top-k", "0", "--function-to-apply", "none"), {"top_k": None, "function_to_apply": "none"})],
)
def test_classify_texts_from_a_file_into_a_file(options, call, tmp_path):
    (tmp_path / "texts.txt").write_text("\n".join(TEXTS) + "\n")
    expected = TextClassification.from_pretrained(FOLDERS["classification"])(TEXTS, **call)
    files = (tmp_path / "texts.txt", "-o", tmp_path / "out.jsonl")
    result = run("classify", "-m", FOLDERS["classification"], *options, *files)
    assert result.stdout == ""
    assert_same([json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()], as_json(expected))


def test_classify_pairs(tmp_path):
    expected = TextClassification.from_pretrained(FOLDERS["classification"])(PAIRS)
    fields = ["--field", "premise", "--pair-field", "hypothesis"]
    result = run("classify", "-m", FOLDERS["classification"], *fields, pairs_file(tmp_path, "premise", "hypothesis"))
    assert_same(lines(result), as_json(expected))


def test_classify_by_candidate_labels():
    call = {"candidate_labels": ["sport", "weather"], "hypothesis_template": "It is {}.", "multi_label": True}
    expected = ZeroShotClassification.from_pretrained(FOLDERS["classification"])([TEXTS[0], TEXTS[2]], **call)
    labels = ["-l", "sport", "-l", "weather", "--hypothesis-template", "It is {}.", "--multi-label"]
    result = run("classify", "-m", FOLDERS["classification"], *labels, "-t", TEXTS[0], "-t", TEXTS[2])
    assert_same(lines(result), as_json(expected))


def test_tag():
    folder = FOLDERS["token_classification"]
    text = "Anna Smith went to New York on Monday. " * 30
    task = TokenClassification.from_pretrained(folder)
    expected = task([text, TEXTS[2]], aggregation_strategy="first", stride=7, ignore_labels=())
    options = ["--aggregation-strategy", "first", "--stride", "7"]
    result = run("tag", "-m", folder, *options, "-t", text, "-t", TEXTS[2])
    kept = [[each for each in entities if each.entity_group != "O"] for entities in expected]
    assert_same(lines(result), as_json(kept))
    default = run("tag", "-m", folder, "-t", text)
    assert_same(lines(default), as_json([task(text, aggregation_strategy="simple")]))


def test_answer(tmp_path):
    folder = FOLDERS["question_answering"]
    question, documents = (
        "Where is the café?",
        ["The king lived in Paris.\nThe café\nis old. " * 40, "A bridge burned."],
    )
    for number, document in enumerate(documents):
        (tmp_path / f"{number}.txt").write_text(document)
    task = QuestionAnswering.from_pretrained(folder)
    call = {"top_k": 3, "max_answer_len": 4, "max_seq_len": 40, "doc_stride": 8, "handle_impossible_answer": True}
    expected = as_json(task([(question, document) for document in documents], **call))
    options = "--top-k 3 --max-answer-len 4 --max-seq-len 40 --doc-stride 8 --handle-impossible-answer".split()
    result = run("answer", "-m", folder, "-q", question, *options, tmp_path / "0.txt", tmp_path / "1.txt")
    assert_same(lines(result), expected)
    (tmp_path / "qa.jsonl").write_text(
        "".join(json.dumps({"question": question, "context": document}) + "\n" for document in documents)
    )
    assert_same(lines(run("answer", "-m", folder, *options, tmp_path / "qa.jsonl")), expected)
    assert_same(lines(run("answer", "-m", folder, "-q", question, *options, stdin=documents[0])), expected[:1])


def test_rank(models, tmp_path):
    folder = models / "BertForSequenceClassification"
    task, query, passages = (
        CrossEncoder.from_pretrained(folder),
        "who won the game?",
        [b for _, b in PAIRS] + TEXTS[::2],
    )
    expected = task.rank(query, passages, top_k=3, return_documents=True)
    result = run("rank", "-m", folder, "-q", query, "--top-k", "3", stdin="\n".join(passages))
    assert_same(lines(result), as_json(expected))
    (tmp_path / "docs.jsonl").write_text("".join(json.dumps({"body": text}) + "\n" for text in passages))
    fields = run("rank", "-m", folder, "-q", query, "--top-k", "3", "-f", "body", tmp_path / "docs.jsonl")
    assert_same(lines(fields), as_json(expected))
    scores = run("rank", "-m", folder, pairs_file(tmp_path, "query", "passage"))
    assert_same(lines(scores), task(PAIRS))


def test_next_sentence(models, tmp_path):
    folder = models / "BertForNextSentencePrediction"
    result = run("next-sentence", "-m", folder, pairs_file(tmp_path, "text", "text_pair"))
    assert_same(lines(result), NextSentence.from_pretrained(folder)(PAIRS))


def test_sparse():
    task = SparseEncoder.from_pretrained(FOLDERS["fill_mask"])
    options = ["--max-active-dims", "4", "--prompt", "the "]
    result = run("sparse", "-m", FOLDERS["fill_mask"], *options, stdin="the river\nstone")
    for found, vector in zip(
        lines(result), task(["the river", "stone"], max_active_dims=4, prompt="the "), strict=True
    ):
        assert found["tokens"] == [token for token, _ in task.decode(vector)]
        np.testing.assert_allclose(found["values"], sorted(vector.values, reverse=True), rtol=0, atol=1e-6)
        assert sorted(found["indices"]) == vector.indices.tolist()
        assert [task.tokenizer.id_to_token(index) for index in found["indices"]] == found["tokens"]


SCRIPT = DATA / "heads" / "generate.py"
MODEL = FOLDERS["classification"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["fill-mask", "-m", FOLDERS["fill_mask"], "-t", "no mask"], "inputs[0] has no [MASK]"),
        (["fill-mask", "-m", MODEL, "-t", "[MASK]"], "a BertForSequenceClassification, and FillMask takes a BertForM"),
        (["tag", "-m", MODEL, "-t", "a"], "is a BertForSequenceClassification, and TokenClassification takes a"),
        (["tag", "-m", MODEL, "missing.txt"], "missing.txt: no such file"),
        (["tag", "-m", DATA / "tasks", "-t", "a"], "tasks: no weights found"),
        (["next-sentence", "-m", FOLDERS["fill_mask"], SCRIPT], "generate.py:1: not a line of JSON"),
    ],
)
def test_what_can_not_be_answered_is_refused_in_one_line(arguments, message):
    result = run(*arguments, code=1)
    assert message in result.stderr
    assert len(result.stderr.splitlines()) == 1 or "not used by" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["classify", "-m", MODEL, "--multi-label", "-t", "x"], "--multi-label goes with"),
        (["classify", "-m", MODEL, "--hypothesis-template", "{}", "-t", "x"], "--hypothesis-template goes with"),
        (["classify", "-m", MODEL, "-l", "a", "--top-k", "2", "-t", "x"], "--top-k does not go with --candidate-label"),
        (["classify", "-m", MODEL, "--pair-field", "x", "-t", "x"], "--pair-field goes with --field"),
        (["answer", "-m", FOLDERS["question_answering"], "-t", "x"], "--text goes with --question"),
        (["rank", "-m", MODEL, "--top-k", "2", SCRIPT], "--top-k goes with --query"),
        (["rank", "-m", MODEL, "-q", "x", "--pair-field", "a", "-t", "x"], "--pair-field does not go with --query"),
        (["answer", "-m", MODEL, "-q", "x", "--context-field", "a", "-t", "x"], "--context-field does not go with"),
        (["tag", "-m", MODEL, "-t", "x", "-o", "out.txt"], "expected a name that ends in .jsonl"),
    ],
)
def test_options_that_contradict_each_other_are_refused(arguments, message):
    assert message in run(*arguments, code=2).stderr
