import dataclasses
import itertools
import warnings

import numpy as np
import pytest
from conftest import WORDS, compiles, random_model
from flax import nnx
from oracle import require

from bertjax import BertConfig, ConfigError, InputError, SentenceEncoder, SentenceModel, SourceError, Tokenizer
from bertjax.packing import pack
from bertjax.sentence import Dense, Normalize
from bertjax.sentence_files import DenseSpec
from bertjax.similarity import SIMILARITIES, similarity

PLAIN_WORDS = [word for word in WORDS if not word.startswith("##")]


@pytest.fixture(scope="module")
def encoder(sentence_folder) -> SentenceEncoder:
    return SentenceEncoder.from_pretrained(sentence_folder, step_tokens=512)


def some_texts(count, seed=0, longest=60):
    rng = np.random.default_rng(seed)
    return [" ".join(rng.choice(PLAIN_WORDS, rng.integers(0, longest))) for _ in range(count)]


def test_a_texts_vector_does_not_depend_on_its_company_or_place(encoder):
    texts = some_texts(300)
    together = encoder.encode(texts)
    assert together.dtype == np.float32
    assert together.shape == (300, 16)
    np.testing.assert_allclose(np.linalg.norm(together, axis=1), 1.0, atol=1e-6)
    order = np.random.default_rng(1).permutation(300)
    shuffled = encoder.encode([texts[i] for i in order] + some_texts(41, seed=2))
    np.testing.assert_allclose(shuffled[:300], together[order], rtol=0, atol=1e-6)
    alone = np.stack([encoder.encode(text) for text in texts[:20]])
    np.testing.assert_allclose(alone, together[:20], rtol=0, atol=1e-6)
    assert np.abs(together[0] - together[1]).max() > 0.01  # vectors do differ between texts


def test_packing_gives_what_padding_gives(encoder):
    texts = some_texts(30)
    padded = encoder.model(**encoder.tokenize(texts))
    np.testing.assert_allclose(encoder.encode(texts), padded, rtol=0, atol=1e-6)


def test_lists_tuples_and_generators_are_alike(encoder):
    texts = some_texts(30)
    expected = encoder.encode(texts)
    np.testing.assert_array_equal(encoder.encode(tuple(texts)), expected)
    np.testing.assert_array_equal(encoder.encode(text for text in texts), expected)
    np.testing.assert_array_equal(encoder.encode(np.array(texts, object)), expected)


def test_no_texts(encoder):
    assert encoder.encode([]).shape == (0, 16)
    assert encoder.encode([], truncate_dim=3).shape == (0, 3)
    assert list(encoder.encode_stream(iter(()))) == []


def test_empty_duplicate_and_over_long_texts(encoder):
    long = " ".join(["cat"] * 1000)
    (window,) = encoder.encode_stream(["", "a cat", "", "a cat", long, " ".join(["cat"] * 148)])
    np.testing.assert_allclose(window.vectors[0], window.vectors[2], rtol=0, atol=1e-6)
    np.testing.assert_allclose(window.vectors[1], window.vectors[3], rtol=0, atol=1e-6)
    assert window.truncated.tolist() == [False, False, False, False, True, False]
    np.testing.assert_allclose(window.vectors[4], window.vectors[5], rtol=0, atol=1e-6)  # 150 tokens, [CLS] and [SEP]
    assert window.tokens == 2 + 4 + 2 + 4 + 150 + 150
    assert np.isfinite(window.vectors).all()


@pytest.mark.parametrize(
    ("bad", "name"), [(None, "None"), (7, "7"), (b"x", "b'x'"), (float("nan"), "nan"), (["a"], r"\['a'\]")]
)
@pytest.mark.parametrize("prompt", ["", "she was "])
def test_what_is_not_a_text_is_refused_with_its_position(encoder, bad, name, prompt):
    texts = ["a cat"] * 2500
    texts[2100] = bad
    with pytest.raises(InputError, match=rf"texts\[2100\] is {name}"):
        encoder.encode(texts, prompt=prompt)


def test_a_lone_surrogate_is_refused_with_its_position(encoder):
    with pytest.raises(InputError, match=r"texts\[1025\] has a lone surrogate"):
        encoder.encode(["a"] * 1025 + ["\ud800"])


@pytest.mark.parametrize("texts", [5, None, b"bytes", {"text": "a"}, {"a", "b"}])
def test_what_is_not_a_list_of_texts_is_refused(encoder, texts):
    with pytest.raises(InputError, match=f"texts is a {type(texts).__name__}, expected a list"):
        encoder.encode(texts)


def test_a_stream_is_read_as_it_is_encoded(encoder):
    taken = itertools.count()
    endless = ("a cat sat" for _ in taken)
    windows = encoder.encode_stream(endless)
    first, second = next(windows), next(windows)
    assert len(first.vectors) == len(second.vectors) >= 1024
    assert next(taken) < 20_000


@pytest.mark.parametrize("bad", [None, OSError("the disk is gone")])
def test_a_stream_that_fails_gives_what_was_before(encoder, bad):
    def texts():
        yield from some_texts(1024)
        if isinstance(bad, Exception):
            raise bad
        yield bad

    windows = encoder.encode_stream(texts())
    found = [next(windows).vectors]
    with pytest.raises((InputError, OSError), match=r"the disk is gone|texts\[1024\] is None"):
        while True:
            found.append(next(windows).vectors)
    np.testing.assert_allclose(np.concatenate(found), encoder.encode(some_texts(1024)), rtol=0, atol=1e-6)


def test_any_corpus_compiles_a_handful_of_shapes(sentence_folder):
    encoder = SentenceEncoder.from_pretrained(sentence_folder, step_tokens=768)  # shapes that no other test compiled
    shapes = encoder.shapes.all()
    assert len(shapes) <= 8

    def corpus():
        for count, longest in [(1, 5), (3, 60), (700, 30), (90, 200), (1, 200), (2, 140), (17, 3)]:
            encoder.encode(some_texts(count, seed=count, longest=longest))

    assert 0 < compiles(corpus) <= len(shapes)
    assert compiles(corpus) == 0


def test_every_shape_of_a_batch_is_announced(encoder):
    tokens = encoder.tokenizer(some_texts(500, longest=140), max_length=encoder.max_seq_length)
    shapes = {batch.input_ids.shape for batch in pack(tokens.input_ids, tokens.token_type_ids, encoder.shapes)}
    assert shapes <= set(encoder.shapes.all())


def test_prompts(encoder):
    texts = some_texts(5)
    by_hand = encoder.encode(["she was " + text for text in texts])
    np.testing.assert_allclose(encoder.encode(texts, prompt_name="query"), by_hand, rtol=0, atol=1e-6)
    np.testing.assert_allclose(encoder.encode(texts, prompt="she was "), by_hand, rtol=0, atol=1e-6)
    assert np.abs(encoder.encode(texts) - by_hand).max() > 1e-3
    with pytest.raises(InputError, match=r"'passage' is not one of .* \('query', 'document', 'none'\)"):
        encoder.encode(texts, prompt_name="passage")
    np.testing.assert_array_equal(encoder.encode(texts, prompt="", prompt_name="query"), encoder.encode(texts))
    with pytest.raises(InputError, match="prompt is 3, expected a text"):
        encoder.encode(texts, prompt=3)
    with pytest.raises(InputError, match=r"prompt_name \['query'\] is not one"):
        encoder.encode(texts, prompt_name=["query"])


def test_queries_and_documents_have_their_prompts(encoder):
    texts = some_texts(5)
    spec = dataclasses.replace(encoder.spec, prompts=encoder.spec.prompts | {"document": "it is "})
    encoder = SentenceEncoder(encoder.model, encoder.tokenizer, dataclasses.replace(spec, default_prompt_name="query"))
    query, document = (encoder.encode(texts, prompt_name=name) for name in ("query", "document"))
    assert np.abs(query - document).max() > 1e-3
    np.testing.assert_array_equal(encoder.encode_query(texts, truncate_dim=4), query[:, :4])
    np.testing.assert_array_equal(encoder.encode_document(texts), document)
    np.testing.assert_array_equal(encoder.encode_document(texts[0], prompt=""), encoder.encode(texts, prompt="")[0])
    np.testing.assert_array_equal(encoder.encode_document(texts, prompt_name="query"), query)


def test_truncation_and_normalisation_of_vectors(encoder):
    texts = some_texts(5)
    full = encoder.encode(texts)
    cut = encoder.encode(texts, truncate_dim=4)
    np.testing.assert_array_equal(cut, full[:, :4])
    unit = encoder.encode(texts, truncate_dim=4, normalize_embeddings=True)
    np.testing.assert_allclose(unit, cut / np.linalg.norm(cut, axis=1, keepdims=True), rtol=0, atol=1e-6)
    for bad in (0, -1, 17, 1.5, "3", True):
        with pytest.raises(InputError, match=f"truncate_dim is {bad!r}, the vectors have 16 numbers"):
            encoder.encode(texts, truncate_dim=bad)


def test_progress_is_shown_when_asked_for(encoder, capsys):
    encoder.encode(some_texts(3), show_progress_bar=True)
    assert "3/3" in capsys.readouterr().err
    encoder.encode(some_texts(3))
    assert capsys.readouterr().err == ""


def test_a_tokenizer_with_too_many_ids_is_refused(encoder, vocab_file):
    small = BertConfig(vocab_size=9, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
    model = SentenceModel(random_model(small))
    with pytest.raises(ConfigError, match="do not belong together"):
        SentenceEncoder(model, Tokenizer.from_vocab(vocab_file), encoder.spec)


def test_the_length_limit(encoder, sentence_folder):
    assert encoder.max_seq_length == 150
    assert SentenceEncoder.from_pretrained(sentence_folder, max_seq_length=20).max_seq_length == 20
    # never more than the model has positions
    assert SentenceEncoder.from_pretrained(sentence_folder, max_seq_length=900).max_seq_length == 200
    with pytest.raises(InputError, match="truncate_dim is 17, the vectors have 16 numbers"):
        SentenceEncoder.from_pretrained(sentence_folder, truncate_dim=17)
    unsaid = SentenceEncoder(encoder.model, encoder.tokenizer, dataclasses.replace(encoder.spec, max_seq_length=None))
    assert unsaid.max_seq_length == 200


@pytest.mark.parametrize("option", ["max_seq_length", "truncate_dim", "step_tokens"])
@pytest.mark.parametrize("value", [0, -3, "5", 2.5, True])
def test_sizes_that_are_no_positive_integers_are_refused(sentence_folder, option, value):
    with pytest.raises(ConfigError, match=f"{option} is {value!r}, expected a positive integer"):
        SentenceEncoder.from_pretrained(sentence_folder, **{option: value})


def test_a_limit_without_room_for_the_special_tokens_is_refused(sentence_folder):
    with pytest.raises(ConfigError, match="at most 1 tokens leave no room for the 2 special tokens"):
        SentenceEncoder.from_pretrained(sentence_folder, max_seq_length=1)


def test_a_saved_encoder_is_the_same_here_and_in_sentence_transformers(encoder, sentence_folder, tmp_path):
    texts = some_texts(12)
    dense = Dense(32, 5, activation="torch.nn.modules.activation.ReLU", use_residual=True, rngs=nnx.Rngs(0))
    spec = dataclasses.replace(
        encoder.spec,
        pooling=("mean", "cls"),
        modules=(
            DenseSpec(tmp_path, 32, 5, True, "torch.nn.modules.activation.ReLU", True),
            None,
        ),
        default_prompt_name="query",
    )
    model = SentenceModel(encoder.model.bert, pooling=spec.pooling, modules=(dense, Normalize()))
    for name, saved in (("plain", encoder), ("dense", SentenceEncoder(model, encoder.tokenizer, spec))):
        expected = saved.encode(texts)
        saved.save_pretrained(tmp_path / name)
        np.testing.assert_array_equal(SentenceEncoder.from_pretrained(tmp_path / name).encode(texts), expected)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            reference = require("sentence_transformers").SentenceTransformer(str(tmp_path / name), device="cpu")
            theirs = reference.encode(texts, show_progress_bar=False)
        np.testing.assert_allclose(theirs, expected, rtol=0, atol=1e-6)
    with pytest.raises(SourceError, match="already exists"):
        encoder.save_pretrained(tmp_path / "plain")


@pytest.mark.parametrize("name", SIMILARITIES)
def test_similarities_are_those_of_sentence_transformers(encoder, tmp_path, name):
    encoder = SentenceEncoder(
        encoder.model, encoder.tokenizer, dataclasses.replace(encoder.spec, similarity_fn_name=name)
    )
    encoder.save_pretrained(tmp_path / "saved")
    assert SentenceEncoder.from_pretrained(tmp_path / "saved").spec.similarity_fn_name == name
    vectors = encoder.encode(some_texts(5))
    found = encoder.similarity(vectors, vectors[:3])
    assert (found.dtype, found.shape) == (np.float32, (5, 3))
    assert (np.argmax(found, axis=0) == np.arange(3)).all()
    reference = require("sentence_transformers").SentenceTransformer(str(tmp_path / "saved"), device="cpu")
    np.testing.assert_allclose(found, reference.similarity(vectors, vectors[:3]).numpy(), rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(encoder.similarity(vectors[1], vectors), similarity(name, vectors[1:2], vectors))


def test_what_has_no_similarity_is_refused():
    with pytest.raises(InputError, match="similarity_fn_name is 'near', expected one of 'cosine', 'dot'"):
        similarity("near", np.ones(3), np.ones(3))
    with pytest.raises(InputError, match="have 3 and 4 numbers"):
        similarity("dot", np.ones(3), np.ones((2, 4)))
    with pytest.raises(InputError, match=r"second has the shape \(1, 2, 3\)"):
        similarity("dot", np.ones(3), np.ones((1, 2, 3)))


def test_bfloat16_is_near(encoder, sentence_folder):
    texts = some_texts(40)
    half = SentenceEncoder.from_pretrained(sentence_folder, dtype="bfloat16", step_tokens=512)
    cosine = (encoder.encode(texts) * half.encode(texts)).sum(axis=1)
    assert cosine.min() > 0.99
    assert np.abs(encoder.encode(texts) - half.encode(texts)).max() > 1e-4  # it did run in bfloat16


def test_one_text_is_no_list_of_texts_to_tokenize(encoder):
    with pytest.raises(InputError, match=r"texts is one str: pass a list, \[text\]"):
        encoder.tokenize("abc")
