"""Products in a short dtype, and their derivatives."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, PartitionSpec

from bertjax.matmul import matmul

SHAPES = [((4, 6), (6, 5)), ((2, 3, 4, 6), (6, 5)), ((2, 3, 4, 6), (2, 3, 6, 5))]


def drawn(shapes, dtype=np.float32):
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes]


def gradients(x, y, dtype, weight):
    return jax.grad(lambda x, y: (matmul(x, y, dtype) * weight).sum(), (0, 1))(x, y)


@pytest.mark.parametrize("shapes", SHAPES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_products_are_those_of_the_rounded_numbers(shapes, dtype):
    x, y = drawn(shapes)
    exact = np.matmul(*(np.asarray(each.astype(dtype), np.float64) for each in (x, y)))
    found = matmul(x, y, dtype)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, exact, rtol=0, atol=1e-5)


@pytest.mark.parametrize("shapes", SHAPES)
def test_in_bfloat16_gradients_are_products_of_rounded_numbers(shapes):
    x, y = drawn(shapes)
    weight = drawn([matmul(x, y, "float32").shape])[0]
    rounded = [each.astype(jnp.bfloat16).astype(jnp.float32) for each in (x, y, weight)]
    expected = gradients(rounded[0], rounded[1], "float32", rounded[2])
    for found, wanted, given in zip(gradients(x, y, "bfloat16", weight), expected, (x, y), strict=True):
        assert found.dtype == given.dtype
        np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-5)


def test_a_program_of_gradients_multiplies_nothing_in_float32():
    x, y = drawn(SHAPES[1])
    text = jax.jit(lambda x, y: gradients(x, y, "bfloat16", 1.0)).lower(x, y).as_text()
    products = [line for line in text.splitlines() if "dot_general" in line]
    assert len(products) >= 2
    for line in products:
        inputs = line[line.rindex(":") :].split("->")[0]
        assert inputs.count("bf16") == 2, line


def test_gradients_of_inputs_in_bfloat16_stay_there():
    x, y = drawn(SHAPES[2], jnp.bfloat16)
    assert [each.dtype for each in gradients(x, y, "bfloat16", 1.0)] == [jnp.bfloat16] * 2


def test_in_a_shard_map_gradients_are_summed_over_devices():
    mesh = Mesh(np.array(jax.devices()), ("data",), axis_types=(AxisType.Auto,))
    x, y = drawn([(16, 6), (6, 5)])

    def on_each(x, y):
        return jax.grad(lambda y: jax.lax.psum((matmul(x, y, "bfloat16") ** 2).sum(), "data"))(y)

    found = jax.shard_map(
        on_each, mesh=mesh, in_specs=(PartitionSpec("data"), PartitionSpec()), out_specs=PartitionSpec()
    )(x, y)
    expected = jax.grad(lambda y: (matmul(x, y, "bfloat16") ** 2).sum())(y)
    np.testing.assert_allclose(found, expected, rtol=1e-5)
