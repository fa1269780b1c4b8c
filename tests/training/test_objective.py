"""Training of sentence vectors: the losses and the steps of sentence-transformers, and packed rows."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracle import require
from test_step import ADAM as USUAL
from test_step import assert_close, torch_trained, trained

from bertjax import SentenceEncoder, functional
from bertjax.losses import cosine_loss, ranking_loss
from bertjax.packing import Shapes, pack
from bertjax.training.objective import cosine_objective, ranking_objective

pytestmark = pytest.mark.usefixtures("little_optimisation")

ADAM = dataclasses.replace(USUAL, learning_rate=3e-4)
LOSSES = "sentence_transformers.sentence_transformer.losses"
TRIPLETS = [
    ("the cat sat on the mat", "a cat sat", "the dog ran"),
    ("dogs ran fast", "a fast dog and a slow cat", "she was slow"),
    ("is it a tree ?", "it is under the tree .", "he ran , she sat !"),
    ("she was here", "he and she", "a mat"),
]
TARGETS = np.array([0.9, 0.1, 0.4, 0.0], np.float32)


def vectors(seed, count=5):
    return np.random.default_rng(seed).normal(size=(count, 8)).astype(np.float32)


class Given:
    """Embeddings in the place of a model that computes them."""

    def __new__(cls, torch):
        class Model(torch.nn.Module):
            def forward(self, features):
                return {"sentence_embedding": features["vectors"]}

        return Model()


@pytest.mark.parametrize("columns", [2, 3, 4])
def test_ranking_is_that_of_sentence_transformers(columns):
    torch, losses = require("torch"), require(LOSSES)
    given = [vectors(seed) for seed in range(columns)]
    tensors = [torch.tensor(each, requires_grad=True) for each in given]
    loss = losses.MultipleNegativesRankingLoss(Given(torch), scale=10.0)
    expected = loss([{"vectors": each} for each in tensors], None)
    expected.backward()

    def ours(queries, *passages):
        return ranking_loss(queries, jnp.concatenate(passages), jnp.arange(5), 10.0)

    value, gradients = jax.value_and_grad(ours, tuple(range(columns)))(*given)
    np.testing.assert_allclose(value, expected.item(), rtol=1e-6)
    for found, tensor in zip(gradients, tensors, strict=True):
        np.testing.assert_allclose(found, tensor.grad.numpy(), rtol=0, atol=1e-6)


def test_cosines_are_those_of_sentence_transformers():
    torch, losses = require("torch"), require(LOSSES)
    first, second, targets = vectors(0), vectors(1), np.linspace(0, 1, 5, dtype=np.float32)
    features = [{"vectors": torch.tensor(each)} for each in (first, second)]
    expected = losses.CosineSimilarityLoss(Given(torch))(features, torch.tensor(targets)).item()
    np.testing.assert_allclose(cosine_loss(first, second, targets), expected, rtol=1e-6)


def test_padding_is_nobodys_candidate():
    queries, passages = vectors(0), vectors(1)
    expected = ranking_loss(queries, passages, np.arange(5))
    padded = [np.concatenate([each, np.zeros((3, 8), np.float32)]) for each in (queries, passages)]
    labels = np.array([0, 1, 2, 3, 4, -100, -100, -100])
    value, gradients = jax.value_and_grad(ranking_loss, (0, 1))(*padded, labels)
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    for gradient in gradients:
        assert np.isfinite(gradient).all()
        assert not gradient[5:].any()


def rows_of(tokens, size):
    """Rows of one text, and where each column's texts are."""
    length = max(map(len, tokens.input_ids))
    inputs = {name: np.zeros((len(tokens), length), np.int32) for name in ("input_ids", "attention_mask")}
    for row, ids in enumerate(tokens.input_ids):
        inputs["input_ids"][row, : len(ids)] = ids
        inputs["attention_mask"][row, : len(ids)] = 1
    return inputs | {"places": np.arange(len(tokens), dtype=np.int32).reshape(-1, size)}


def packed_rows_of(tokens, size, segments):
    """The same in packed rows, with an example that is not there."""
    batches = list(pack(tokens.input_ids, tokens.token_type_ids, Shapes(max_length=30, step_tokens=30 * 12)))
    inputs = {name: np.concatenate([batch.inputs()[name] for batch in batches]) for name in batches[0].inputs()}
    firsts = np.cumsum([0, *(len(batch.input_ids) for batch in batches)])
    places = np.empty(len(tokens), np.int32)
    for first, batch in zip(firsts, batches, strict=False):
        places[batch.items] = (batch.rows + first) * segments + batch.segments
    assert len(inputs["input_ids"]) < len(tokens)
    return inputs | {"places": np.pad(places.reshape(-1, size), [(0, 0), (0, 1)], constant_values=-1)}


def without_dropout(folder):
    encoder = SentenceEncoder.from_pretrained(folder)
    for module in (encoder.model.bert.embeddings, encoder.model.bert.encoder.layers.attention):
        module.dropout_rate = 0.0
    encoder.model.bert.encoder.layers.dropout_rate = 0.0
    return encoder


def columns_of(encoder, columns):
    texts = [text for column in list(zip(*TRIPLETS, strict=True))[:columns] for text in column]
    return encoder.tokenizer(texts)


@pytest.mark.parametrize("packed", [False, True])
def test_ten_steps_of_nested_vectors_are_those_of_sentence_transformers(sentence_folder, packed):
    torch, st, of_pairs = require("torch"), require("sentence_transformers"), require(LOSSES)
    encoder = without_dropout(sentence_folder)
    tokens = columns_of(encoder, 3)
    batch = packed_rows_of(tokens, 4, 3) if packed else rows_of(tokens, 4)
    objective = ranking_objective(encoder.model, dims=(16, 4), max_segments=3 if packed else None)
    params, metrics = trained(encoder.model, ADAM, [batch] * 10, objective=objective)

    theirs = st.SentenceTransformer(str(sentence_folder), device="cpu")
    for module in theirs.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    plain = of_pairs.MultipleNegativesRankingLoss(theirs)
    loss = of_pairs.MatryoshkaLoss(theirs, plain, matryoshka_dims=[16, 4])
    bert = theirs[0].auto_model
    features = [bert_inputs(torch, tokens, column) for column in range(3)]

    class Both(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.bert = bert

        def forward(self, **_):
            class Output:
                pass

            Output.loss = loss([dict(each) for each in features], None)
            return Output

    losses = torch_trained(Both(), ADAM, [{}] * 10)
    np.testing.assert_allclose([each.loss for each in metrics], losses, rtol=0, atol=1e-5)
    assert losses[-1] < 0.9 * losses[0]
    theirs.save_pretrained(str(sentence_folder.parent / "tuned"))
    expected = functional(SentenceEncoder.from_pretrained(sentence_folder.parent / "tuned").model)[1]
    assert_close(params, expected)


def bert_inputs(torch, tokens, column):
    rows = rows_of(tokens, 4)
    part = slice(4 * column, 4 * column + 4)
    return {name: torch.tensor(rows[name][part].astype(np.int64)) for name in ("input_ids", "attention_mask")}


def test_cosines_learn_their_targets_packed_or_not(sentence_folder):
    encoder = without_dropout(sentence_folder)
    tokens = columns_of(encoder, 2)
    found = []
    for batch, segments in ((rows_of(tokens, 4), None), (packed_rows_of(tokens, 4, 3), 3)):
        labels = np.pad(TARGETS, (0, batch["places"].shape[1] - 4), constant_values=np.nan)
        objective = cosine_objective(encoder.model, max_segments=segments)
        found.append(trained(encoder.model, ADAM, [batch | {"labels": labels}] * 10, objective=objective))
    np.testing.assert_allclose(*([each.loss for each in metrics] for _, metrics in found), rtol=0, atol=1e-5)
    assert_close(found[0][0], found[1][0])
    assert found[0][1][-1].loss < found[0][1][0].loss
