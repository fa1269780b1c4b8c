"""A compiled model computes with what it is made of now, and is not compiled again for nothing."""

import jax
import numpy as np
import pytest
from conftest import compiles, random_model
from flax import nnx

from bertjax import BertConfig, BertModel, SentenceModel
from bertjax.flat import jit_model

CONFIG = BertConfig(
    vocab_size=30, hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16, hidden_act="relu"
)
IDS = np.arange(12, dtype=np.int32).reshape(2, 6)


class Doubled(nnx.Linear):
    def __call__(self, x):
        return 2 * super().__call__(x)


@pytest.fixture
def model() -> BertModel:
    return random_model(CONFIG)


def pooled(model):
    return np.asarray(model(IDS).pooler_output)


def expected(model):
    """The same, of a model that no call has seen."""
    return pooled(nnx.clone(model))


def test_new_values_of_a_parameter_are_computed_with(model):
    before = pooled(model)
    model.pooler.dense.kernel[...] = 2 * model.pooler.dense.kernel[...]
    assert compiles(lambda: pooled(model)) == 0
    assert np.abs(pooled(model) - before).max() > 1e-3
    np.testing.assert_array_equal(pooled(model), expected(model))


def test_a_replaced_parameter_is_computed_with(model):
    before = pooled(model)
    model.pooler.dense.kernel = nnx.Param(-model.pooler.dense.kernel[...])
    assert np.abs(pooled(model) - before).max() > 1e-3
    np.testing.assert_array_equal(pooled(model), expected(model))


def test_a_replaced_module_is_computed_with(model):
    before = model.pooler.dense
    vectors = pooled(model)
    model.pooler.dense = Doubled(8, 8, rngs=nnx.Rngs(0))
    model.pooler.dense.kernel, model.pooler.dense.bias = before.kernel, before.bias
    np.testing.assert_allclose(np.arctanh(pooled(model)), 2 * np.arctanh(vectors), rtol=0, atol=1e-4)


def test_a_changed_setting_is_computed_with(model):
    sentences = SentenceModel(model, pooling="mean")
    before = np.asarray(sentences(IDS))
    sentences.pooling = ("cls",)
    np.testing.assert_array_equal(sentences(IDS), SentenceModel(model, pooling="cls")(IDS))
    assert np.abs(np.asarray(sentences(IDS)) - before).max() > 1e-3


def test_models_that_are_alike_share_what_is_compiled(model):
    pooled(model)
    other = random_model(CONFIG)
    assert compiles(lambda: pooled(other)) == 0


def test_a_parameter_in_a_list_may_be_replaced():
    class Listed(nnx.Module):
        def __init__(self):
            self.parts = nnx.data([nnx.Param(jax.numpy.ones(3)), nnx.Param(jax.numpy.ones(3))])

    call = jit_model(lambda model, x: model.parts[0][...] + model.parts[1][...] * x)
    model = Listed()
    np.testing.assert_array_equal(call(model, 2.0), [3, 3, 3])
    model.parts[1] = nnx.Param(jax.numpy.zeros(3))
    np.testing.assert_array_equal(call(model, 2.0), [1, 1, 1])
