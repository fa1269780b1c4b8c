"""Training on eight devices: what is divided, and that it changes nothing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, PartitionSpec
from test_heads import random_heads
from test_step import ADAM, assert_close, setting, trained

from bertjax import functional
from bertjax.sharding import FULLY_SHARDED, RULES, batch_sharding, bytes_per_device, data_mesh, shardings_of, spec_of
from bertjax.training import new_state, train_step

pytestmark = pytest.mark.usefixtures("little_optimisation")

NAME = "BertForSequenceClassification"


def made(count, parts=1):
    """Batches of sixteen rows, or parts of as many."""
    rng = np.random.default_rng(5)
    for _ in range(count):
        shape = (16, 9) if parts == 1 else (parts, 16, 9)
        yield {
            "input_ids": rng.integers(0, 50, shape),
            "attention_mask": np.ones(shape, int),
            "labels": rng.integers(0, 3, shape[:-1]),
        }


def sharded(model, mesh, rules, batches, **options):
    """As `trained`; on a mesh. Also gives the state."""
    optimizer = ADAM.build(model, 10)
    state = new_state(model, optimizer)
    shardings = shardings_of(state, mesh, rules)
    state = jax.device_put(state, shardings)
    step, metrics = train_step(model, optimizer, shardings=shardings, **options), []
    for batch in batches:
        batch = jax.device_put(batch, batch_sharding(mesh, parts=options.get("accumulate", 1) > 1))
        state, found = step(state, batch)
        metrics.append(found)
    assert jax.tree.all(jax.tree.map(lambda array, wanted: array.sharding == wanted, state, shardings))
    return state, metrics


@pytest.mark.parametrize("parts", [pytest.param(1, marks=pytest.mark.slow), 2])
@pytest.mark.parametrize("rules", [RULES, FULLY_SHARDED], ids=["data", "fully sharded"])
def test_eight_devices_learn_what_one_does(rules, parts):
    assert len(jax.devices()) == 8
    model = random_heads(NAME, setting(NAME)[1])
    expected, losses = trained(model, ADAM, made(5, parts), accumulate=parts)
    state, metrics = sharded(model, data_mesh(), rules, made(5, parts), accumulate=parts)
    np.testing.assert_allclose([each.loss for each in metrics], [each.loss for each in losses], rtol=1e-5)
    assert_close(state.params, expected)


@pytest.mark.slow
def test_a_second_axis_divides_heads_and_the_feed_forward_layer():
    model = random_heads(NAME, setting(NAME)[1])
    mesh = Mesh(np.array(jax.devices()).reshape(2, 4), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    expected, _ = trained(model, ADAM, made(3))
    state, _ = sharded(model, mesh, FULLY_SHARDED, made(3))
    assert_close(state.params, expected)
    layers = state.learnt["bert"]["encoder"]["layers"]
    assert layers["attention"]["query"]["kernel"].sharding.spec == PartitionSpec(None, "data", "model")
    assert layers["feed_forward"]["output"]["kernel"].sharding.spec == PartitionSpec(None, "model", "data")


@pytest.mark.slow
def test_fully_sharded_a_device_holds_an_eighth():
    model = random_heads(NAME, setting(NAME)[1])
    states = [sharded(model, data_mesh(), rules, made(1))[0] for rules in (RULES, FULLY_SHARDED)]
    held = [bytes_per_device(state) for state in states]
    assert held[1] < 1.05 * held[0] / 8 + 4096
    # Of a replicated state every device has a copy of all.
    arrays = [leaf for leaf in jax.tree.leaves(states[0]) if not jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)]
    for device in jax.devices():
        there = sum(part.data.nbytes for leaf in arrays for part in leaf.addressable_shards if part.device == device)
        assert 0 <= held[0] - there < 100, "all but a key"


@pytest.mark.slow
def test_dropout_is_the_same_on_any_number_of_devices():
    model = random_heads(NAME)
    _, expected = trained(model, ADAM, made(3))
    _, found = sharded(model, data_mesh(), FULLY_SHARDED, made(3))
    np.testing.assert_allclose([each.loss for each in found], [each.loss for each in expected], rtol=1e-5)


def test_every_parameter_has_axes():
    """All but what has none of a model's large axes is divided."""
    mesh = data_mesh()
    for name in ("BertForPreTraining", "BertForQuestionAnswering", NAME):
        params = functional(random_heads(name))[1]
        for path, sharding in jax.tree.leaves_with_path(shardings_of(params, mesh, FULLY_SHARDED)):
            names = [entry.key for entry in path]
            free = names[-1] == "bias" and names[-2] in (
                *("query", "key", "value", "intermediate", "predictions"),
                *("classifier", "qa_outputs", "seq_relationship"),
            )
            assert ("data" in sharding.spec) != free, names


def test_what_can_not_be_divided_evenly_is_everywhere():
    path = ["bert", "embeddings", "word_embeddings", "embedding"]
    assert spec_of(path, (50, 32), data_mesh(), FULLY_SHARDED) == PartitionSpec(None, "data")
    assert spec_of(path, (50, 30), data_mesh(), FULLY_SHARDED) == PartitionSpec(None, None)
