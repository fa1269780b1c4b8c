import dataclasses
import json
import random
import re

import jax
import numpy as np
import pytest
from conftest import WORDS, compiles
from oracle import require
from test_heads import TINY, random_heads

from bertjax import Tokenizer, convert_checkpoint, engine
from bertjax.errors import ConfigError, InputError, SourceError
from bertjax.sparse_files import SparseSpec, read_sparse_spec
from bertjax.tasks import sparse
from bertjax.tasks.sparse import SparseEncoder, SparseVector, splade

CONFIG = dataclasses.replace(TINY, vocab_size=5 + len(WORDS) + 3, hidden_size=16, max_position_embeddings=32)
PROMPTS = {"query": "she was ", "document": ""}
TEXTS = [
    "the cat sat on the mat.",
    "",
    "fast, slow?",
    "a dog and " * 30,  # is cut
    "it is unknown: ☃",
    "he ran",
    "trees " * 9,
    "[MASK] the dogs [SEP] [PAD]",
]
OLD, NEW = "sentence_transformers.sparse_encoder.models", "sentence_transformers.sparse_encoder.modules"
TRANSFORMER = "sentence_transformers.base.modules.transformer.Transformer"


@pytest.fixture(scope="module")
def model():
    return random_heads("BertForMaskedLM", CONFIG)


@pytest.fixture(scope="module")
def tokenizer(vocab_file):
    return Tokenizer.from_vocab(vocab_file)


@pytest.fixture(scope="module")
def folder(model, tokenizer, tmp_path_factory):
    """A masked language model without anything of sentence-transformers."""
    path = tmp_path_factory.mktemp("sparse") / "model"
    model.save_pretrained(path, tokenizer=tokenizer)
    return path


@pytest.fixture
def task(model, tokenizer):
    return SparseEncoder(model, tokenizer, step_tokens=160)


def dense(vectors, words=CONFIG.vocab_size):
    """Sparse vectors as [texts, vocab], each checked to be well formed."""
    rows = np.zeros((len(vectors), words), np.float32)
    for row, vector in zip(rows, vectors, strict=True):
        assert vector.indices.dtype == np.int32
        assert vector.values.dtype == np.float32
        assert (np.diff(vector.indices) > 0).all()
        assert (vector.values > 0).all()
        row[vector.indices] = vector.values
    return rows


@pytest.mark.slow
@pytest.mark.parametrize(
    ("strategy", "activation", "chunk"), [("max", "relu", 7), ("sum", "relu", 2048), ("max", "log1p_relu", 7)]
)
def test_vectors_are_those_of_sentence_transformers(folder, tmp_path, monkeypatch, strategy, activation, chunk):
    reference = reference_encoder(folder, strategy, activation)
    reference.save(str(tmp_path / "saved"), create_model_card=False)
    spec = read_sparse_spec(tmp_path / "saved")
    assert spec == SparseSpec(tmp_path / "saved", strategy, activation, max_active_dims=13, prompts=PROMPTS)
    monkeypatch.setattr(sparse, "_CHUNK", chunk)
    ours = SparseEncoder.from_pretrained(tmp_path / "saved", step_tokens=160)
    assert ours.spec == spec
    convert_checkpoint(tmp_path / "saved", tmp_path / "converted", to="msgpack")
    converted = read_sparse_spec(tmp_path / "converted")
    assert converted == dataclasses.replace(spec, transformer=tmp_path / "converted")
    # Numbers that are added in another order may differ by a rounding of the sum for each, of which there are 32.
    relative = 32 * np.finfo(np.float32).eps if strategy == "sum" else 0
    for options in ({}, {"prompt_name": "query"}, {"prompt": "is it "}):
        vectors, theirs = ours(TEXTS, **options), reference.encode(TEXTS, **options)
        np.testing.assert_allclose(dense(vectors), theirs.to_dense().numpy(), rtol=relative, atol=1e-5)
    decoded, theirs = ours.decode(vectors[0], 4), reference.decode(theirs[0], top_k=4)
    assert [token for token, _ in decoded] == [token for token, _ in theirs]
    np.testing.assert_allclose([weight for _, weight in decoded], [weight for _, weight in theirs], rtol=0, atol=1e-5)


def test_a_folder_that_was_saved_is_the_same_task_here_and_there(model, tokenizer, tmp_path):
    prompts = {"query": "she was ", "document": "", "own": "is it "}
    spec = SparseSpec(None, "sum", "log1p_relu", 13, prompts=prompts, default_prompt_name="own")
    spec = dataclasses.replace(spec, similarity_fn_name="cosine")
    task = SparseEncoder(model, tokenizer, spec=spec, max_length=9, step_tokens=160)
    task.save_pretrained(tmp_path / "saved")
    again = SparseEncoder.from_pretrained(tmp_path / "saved", step_tokens=160)
    assert again.spec == dataclasses.replace(spec, transformer=tmp_path / "saved")
    assert again.max_length == 9
    expected = dense(task(TEXTS))
    np.testing.assert_array_equal(dense(again(TEXTS)), expected)
    require("sentence_transformers")
    from sentence_transformers import SparseEncoder as Reference

    theirs = Reference(str(tmp_path / "saved"), device="cpu")
    assert (theirs.max_active_dims, theirs.similarity_fn_name, theirs.max_seq_length) == (13, "cosine", 9)
    np.testing.assert_allclose(
        theirs.encode(TEXTS).to_dense().numpy(), expected, rtol=32 * np.finfo(np.float32).eps, atol=1e-5
    )


def reference_encoder(folder, strategy, activation):
    """sentence-transformers' model of a folder."""
    require("sentence_transformers")
    from sentence_transformers import SparseEncoder as Reference
    from sentence_transformers.base.modules import Transformer
    from sentence_transformers.sparse_encoder.modules import SpladePooling

    modules = [Transformer(str(folder), transformer_task="fill-mask"), SpladePooling(strategy, activation)]
    return Reference(modules=modules, prompts=PROMPTS, max_active_dims=13, device="cpu")


def naive(model, hidden, owners, texts, strategy, activation):
    """The formula, with all the logits at once."""
    logits = np.asarray(model.predictions(hidden, model.bert.embeddings.word_embeddings.embedding[...]), np.float64)
    weights = np.log1p(np.maximum(logits, 0))
    weights = np.log1p(weights) if activation == "log1p_relu" else weights
    pool = np.max if strategy == "max" else np.sum
    return np.stack([pool(weights[owners == text], axis=0, initial=0) for text in range(texts)])


@pytest.mark.parametrize(("tied", "chunk"), [(True, 7), (True, 31), (True, 100), (False, 7)])
def test_chunks_of_any_size_are_exact(model, tied, chunk):
    config = dataclasses.replace(CONFIG, extra={"tie_word_embeddings": tied})
    assert config.vocab_size == 32
    model = model if tied else random_heads("BertForMaskedLM", config)
    hidden = np.random.default_rng(1).normal(size=(2, 9, 16)).astype(np.float32)
    owners = np.array([[0] * 4 + [1] * 2 + [4] * 3, [2] * 9], np.int32)  # text 3 has no tokens, 4 is padding
    strategy, activation = ("max", "relu") if chunk == 7 else ("sum", "log1p_relu")
    options = {"texts": 4, "pooling_strategy": strategy, "activation_function": activation}
    values, indices, active = map(np.asarray, splade(model, hidden, owners, count=32, chunk=chunk, **options))
    found = np.zeros((4, 32))
    np.put_along_axis(found, indices, values, axis=1)
    expected = naive(model, hidden, owners, 4, strategy, activation)
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6)
    np.testing.assert_array_equal(active, (expected > 0).sum(axis=1))
    assert active[3] == 0
    assert (np.diff(values, axis=1) <= 0).all()


@pytest.mark.parametrize("strategy", ["max", "sum"])
def test_no_array_of_tokens_and_vocabulary_exists(strategy):
    words, tokens, texts, chunk = 9973, 16 * 64, 32, 256
    model = jax.eval_shape(lambda: random_heads("BertForMaskedLM", dataclasses.replace(TINY, vocab_size=words)))
    arguments = (model, jax.ShapeDtypeStruct((16, 64, 32), np.float32), jax.ShapeDtypeStruct((16, 64), np.int32))
    options = {"texts": texts, "count": 64, "pooling_strategy": strategy, "activation_function": "relu"}
    traced = splade.trace(*arguments, chunk=chunk, **options)
    sizes = {np.prod(list(map(int, found.split(",")))) for found in re.findall(r"\w\d+\[([\d,]+)\]", str(traced.jaxpr))}
    assert tokens * chunk in sizes  # the chunk of logits is there to be seen
    assert max(sizes) == max(texts * words, tokens * chunk)
    memory = traced.lower().compile().memory_analysis()
    # The weights and the logits of a chunk, each at most twice, and what is as small as the tokens' states.
    assert memory.temp_size_in_bytes < 4 * (2 * texts * words + 3 * tokens * chunk + 8 * tokens * 32)
    assert memory.temp_size_in_bytes < 4 * tokens * words / 3


def test_answers_depend_neither_on_company_nor_on_place(task):
    many = TEXTS * 8
    order = random.Random(0).sample(range(len(many)), len(many))
    alone = dense([task(text) for text in TEXTS])
    mixed = dense(task([many[index] for index in order]))
    np.testing.assert_allclose(mixed, alone[np.array(order) % len(TEXTS)], rtol=0, atol=1e-5)
    assert task([]) == []


def test_texts_with_more_words_than_expected_lose_none(task, monkeypatch):
    expected = dense(task(TEXTS))
    assert (expected > 0).sum(axis=1).max() > 16
    monkeypatch.setattr(sparse, "_ACTIVE", 2)
    np.testing.assert_array_equal(dense(task(TEXTS)), expected)
    few = dense(task(TEXTS, max_active_dims=5))
    least = np.sort(expected, axis=1)[:, -5:-4]
    np.testing.assert_array_equal(few, np.where(expected >= least, expected, 0))


def test_room_for_more_words_stays_for_the_rest_of_a_call(task, monkeypatch):
    words = [len(task(text).indices) for text in TEXTS]
    assert 16 < max(words) <= 32
    monkeypatch.setattr(sparse, "_ACTIVE", 2)
    counts = []
    monkeypatch.setattr(
        sparse, "splade", lambda *a, **options: counts.append(options["count"]) or splade(*a, **options)
    )
    monkeypatch.setattr(engine, "_WINDOW_ROWS", 1)
    windows = list(task.stream(TEXTS[:1] * 1024 * 4))
    assert len(windows) == 4
    steps = len(counts) // 6
    # The second window is started before the first is read: both are computed again, and the others once.
    assert counts == [2] * 2 * steps + [32] * (len(counts) - 2 * steps)
    assert len(counts) == 6 * steps
    counts.clear()
    task(TEXTS[0])
    assert counts == [2, 32]


@pytest.mark.parametrize("length", [0, True])
def test_an_unusable_length_is_refused(model, tokenizer, length):
    with pytest.raises(ConfigError, match=f"max_length is {length}, expected a positive integer"):
        SparseEncoder(model, tokenizer, max_length=length)


def test_a_second_call_compiles_nothing(task):
    task(TEXTS * 8)
    others = [" ".join(random.Random(seed).choices(WORDS, k=len(text.split()))) for seed, text in enumerate(TEXTS * 8)]
    assert compiles(lambda: task(others)) == 0


def test_decoding_names_words_by_weight(task):
    vector = SparseVector(np.array([2, 6, 10, 31], np.int32), np.array([0.5, 2.0, 0.5, 1.0], np.float32))
    assert task.decode(vector) == [("a", 2.0), (None, 1.0), ("[CLS]", 0.5), ("on", 0.5)]
    assert task.decode(vector, 1) == [("a", 2.0)]
    with pytest.raises(InputError, match="top_k is 0"):
        task.decode(vector, 0)
    with pytest.raises(InputError, match="vector is a list, expected a SparseVector, one at a time"):
        task.decode([vector])


@pytest.mark.parametrize(
    ("inputs", "options", "message"),
    [
        (["a", None], {}, r"inputs\[1\] is None of type NoneType, not a str"),
        (["a", None], {"prompt": "x "}, r"inputs\[1\] is None of type NoneType"),
        ("a", {"max_active_dims": 0}, "max_active_dims is 0, expected a positive integer"),
        (
            "a",
            {"prompt_name": "passage"},
            r"prompt_name 'passage' is not one of .* \('query', 'document'\)",
        ),
        ("a", {"prompt": 3}, "prompt is 3, expected a text"),
    ],
)
def test_unusable_inputs_are_refused(task, inputs, options, message):
    with pytest.raises(InputError, match=message):
        task(inputs, **options)


def test_a_spec_limits_and_prompts(model, tokenizer, task):
    spec = SparseSpec(max_active_dims=3, prompts=PROMPTS, default_prompt_name="query", max_seq_length=32)
    limited = SparseEncoder(model, tokenizer, spec=spec, step_tokens=160)
    found, all_words = limited("he ran on a mat"), dense([task("she was he ran on a mat")])[0]
    heaviest = np.sort(np.argsort(-all_words, kind="stable")[:3])
    np.testing.assert_array_equal(found.indices, heaviest)
    np.testing.assert_allclose(found.values, all_words[heaviest], rtol=0, atol=1e-5)
    assert len(limited("he", max_active_dims=7, prompt="").indices) == 7
    lengths = dataclasses.replace(spec, max_seq_length=8)
    assert SparseEncoder(model, tokenizer, spec=lengths).max_length == 8
    assert SparseEncoder(model, tokenizer, spec=lengths, max_length=9).max_length == 9
    for wrong in ({"pooling_strategy": "mean"}, {"activation_function": "gelu"}):
        with pytest.raises(ConfigError, match=r"is '(mean|gelu)', expected one of"):
            SparseSpec(**wrong)


def write(folder, files):
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(json.dumps(content))


def files_of(first=f"{OLD}.MLMTransformer", second=f"{OLD}.SpladePooling", **changed):
    """The files of a folder in the layout of version 5.0, some of them changed."""
    files = {
        "modules.json": [{"path": "mlm", "type": first}, {"path": "1_SpladePooling", "type": second}],
        "mlm/sentence_bert_config.json": {"max_seq_length": 256, "do_lower_case": True},
        "1_SpladePooling/config.json": {
            "pooling_strategy": "sum",
            "activation_function": "log1p_relu",
            "word_embedding_dimension": None,
        },
        "config_sentence_transformers.json": {
            "model_type": "SparseEncoder",
            "__version__": {},
            "prompts": {"query": None},
            "default_prompt_name": "query",
            "similarity_fn_name": "dot",
        },
    }
    return {name: content for name, content in (files | changed).items() if content is not None}


@pytest.mark.parametrize("doubled", ["", "doubled"])
def test_folders_of_older_versions_are_read(tmp_path, doubled):
    names = [f"{OLD}.{name}" + (f".{name}" if doubled else "") for name in ("MLMTransformer", "SpladePooling")]
    write(tmp_path, files_of(*names))
    assert read_sparse_spec(tmp_path) == SparseSpec(
        transformer=tmp_path / "mlm",
        pooling_strategy="sum",
        activation_function="log1p_relu",
        max_seq_length=256,
        do_lower_case=True,
        default_prompt_name="query",
        similarity_fn_name="dot",
    )


def test_a_masked_language_model_alone_has_the_defaults(folder):
    assert read_sparse_spec(folder) == SparseSpec(transformer=folder)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (files_of(second="sentence_transformers.models.Pooling"), "type 'sentence_transformers.models.Pooling' is not"),
        (files_of("sentence_transformers.models.Router"), "is not supported; known: "),
        (files_of(second=f"{NEW}.mlm_transformer.MLMTransformer"), "modules are transformer, transformer; expected"),
        (files_of(**{"modules.json": []}), "modules are none; expected transformer, then splade"),
        (
            files_of(**{"modules.json": [{"path": "../x", "type": f"{OLD}.MLMTransformer"}] * 2}),
            "path '../x' is not the name of a folder inside",
        ),
        (files_of(TRANSFORMER), "a Transformer before SpladePooling needs transformer_task 'fill-mask', has none"),
        (
            files_of(TRANSFORMER, **{"mlm/sentence_bert_config.json": {"transformer_task": "feature-extraction"}}),
            "transformer_task is 'feature-extraction'; only 'fill-mask' is supported",
        ),
        (files_of(**{"mlm/sentence_bert_config.json": {"pad": 1}}), r"unknown field\(s\) \['pad'\]"),
        (
            files_of(**{"1_SpladePooling/config.json": {"pooling_strategy": "mean"}}),
            "pooling_strategy is 'mean', expected one of 'max', 'sum'",
        ),
        (
            files_of(**{"1_SpladePooling/config.json": {"activation_function": 3}}),
            "activation_function is 3, expected str",
        ),
        (files_of(**{"1_SpladePooling/config.json": {"temperature": 2}}), r"unknown field\(s\) \['temperature'\]"),
        (
            files_of(**{"config_sentence_transformers.json": {"model_type": "SentenceTransformer"}}),
            "model_type is 'SentenceTransformer'; only 'SparseEncoder' will do",
        ),
        (
            files_of(**{"config_sentence_transformers.json": {"default_prompt_name": "passage"}}),
            "default_prompt_name 'passage' is not among the prompts",
        ),
        (
            files_of(**{"config_sentence_transformers.json": {"max_active_dims": 0}}),
            "max_active_dims is 0, expected an integer from 1",
        ),
    ],
)
def test_what_is_not_known_is_refused(tmp_path, files, message):
    write(tmp_path, files)
    with pytest.raises(ConfigError, match=message):
        read_sparse_spec(tmp_path)


def test_a_missing_pooling_is_refused(tmp_path):
    write(tmp_path, files_of(**{"1_SpladePooling/config.json": None}))
    with pytest.raises(SourceError, match=r"1_SpladePooling/config\.json"):
        read_sparse_spec(tmp_path)
