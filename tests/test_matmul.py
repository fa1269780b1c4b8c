"""Products in a short dtype, and their derivatives."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from bertjax.matmul import dense, matmul
from bertjax.short_product import short_product

SHAPES = [((4, 6), (6, 5)), ((2, 3, 4, 6), (6, 5)), ((2, 3, 4, 6), (2, 3, 6, 5)), ((3, 4, 6), (6, 9))]


def turning(product):
    """The same product by way of a y that is turned."""
    return lambda x, y, *args, **options: product(x, y.swapaxes(-1, -2), *args, turned=True, **options)


#: Products of x and y, straight and by way of a y that is turned.
PRODUCTS = [short_product, turning(short_product)]
MATMULS = [matmul, turning(matmul)]


def drawn(shapes, dtype=np.float32):
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes]


def gradients(x, y, dtype, weight, product=matmul):
    return jax.grad(lambda x, y: (product(x, y, dtype) * weight).sum(), (0, 1))(x, y)


@pytest.mark.parametrize("product", MATMULS)
@pytest.mark.parametrize("shapes", SHAPES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_products_are_those_of_the_rounded_numbers(shapes, dtype, product):
    x, y = drawn(shapes)
    exact = np.matmul(*(np.asarray(each.astype(dtype), np.float64) for each in (x, y)))
    found = product(x, y, dtype)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, exact, rtol=0, atol=1e-5)


@pytest.mark.parametrize("product", MATMULS)
@pytest.mark.parametrize("shapes", SHAPES)
def test_in_bfloat16_gradients_are_products_of_rounded_numbers(shapes, product):
    x, y = drawn(shapes)
    weight = drawn([matmul(x, y, "float32").shape])[0]
    rounded = [each.astype(jnp.bfloat16).astype(jnp.float32) for each in (x, y, weight)]
    expected = gradients(rounded[0], rounded[1], "float32", rounded[2])
    for found, wanted, given in zip(gradients(x, y, "bfloat16", weight, product), expected, (x, y), strict=True):
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


@pytest.mark.parametrize("shapes", SHAPES)
def test_what_is_kept_for_the_backward_pass_is_rounded(shapes):
    x, y = drawn(shapes)
    kept = jax.tree.leaves(jax.vjp(lambda x, y: matmul(x, y, "bfloat16"), x, y)[1])
    assert {(each.shape, each.dtype.name) for each in kept} == {(x.shape, "bfloat16"), (y.shape, "bfloat16")}


@pytest.mark.parametrize("shape", [(1024, 64), (8, 128, 64), (2, 4, 128, 64)])
def test_a_product_whose_result_is_turned_over(shape):
    """As the gradient of word embeddings is that score every position; XLA for CPUs merges that into what it lacks."""
    x, words, weight = drawn([shape, (500, 64), (*shape[:-1], 500)])

    def slope(x, words, weight, dtype):
        return jax.grad(lambda words: (matmul(x, words.T, dtype) * weight).sum())(words)

    found, exact = (jax.jit(slope, static_argnums=3)(x, words, weight, dtype) for dtype in ("bfloat16", "float32"))
    np.testing.assert_allclose(found, exact, rtol=0, atol=0.01 * float(abs(exact).max()))


@pytest.mark.parametrize(("size", "smaller", "larger"), [(5, 5, 40), (90, 40, 90)])
def test_of_two_factors_the_smaller_is_turned_over(size, smaller, larger):
    x, y = drawn([(3, 4, 40), (40, size)])
    slope = jax.jit(jax.grad(lambda y, x: matmul(x, y, "bfloat16").sum()))
    moved = [line for line in slope.lower(y, x).as_text().splitlines() if "stablehlo.transpose" in line]
    assert any(f"-> tensor<{smaller}x3x4x" in line for line in moved)
    assert not any(f"-> tensor<{larger}x3x4x" in line for line in moved)


def plainly(x, y, batch=0):
    """The product by JAX itself, of the same axes."""
    common = tuple(range(batch))
    return jax.lax.dot_general(x, y, (((x.ndim - 1,), (batch,)), (common, common)), precision="highest")


def of_rounded(x, y, batch):
    """What `short_product` computes, by JAX's own product of float32."""
    return plainly(*(each.astype(jnp.bfloat16).astype(jnp.float32) for each in (x, y)), batch)


@pytest.mark.parametrize("product", PRODUCTS)
@pytest.mark.parametrize("axes", [(0, None), (None, 0), (0, 0), (2, None), (None, 2), (1, 2)])
@pytest.mark.parametrize("shapes", SHAPES)
def test_mapped_over_any_axis_of_either(shapes, axes, product):
    batch = len(shapes[1]) - 2
    shapes = [
        shape if axis is None else (*shape[:axis], 7, *shape[axis:]) for shape, axis in zip(shapes, axes, strict=True)
    ]
    x, y = drawn(shapes)
    found, expected = (jax.vmap(functools.partial(each, batch=batch), axes)(x, y) for each in (product, of_rounded))
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)
    weight = drawn([expected.shape])[0].astype(jnp.bfloat16).astype(jnp.float32)

    def slopes(product):
        mapped = jax.vmap(functools.partial(product, batch=batch), axes)
        return jax.grad(lambda x, y: (mapped(x, y) * weight).sum(), (0, 1))(x, y)

    for one, two in zip(slopes(product), slopes(of_rounded), strict=True):
        # JAX rounds the slope of a cast, too; a gradient in bfloat16 is 2^-9 from what it stands for.
        np.testing.assert_allclose(one, two, rtol=2.0**-8, atol=1e-5)


@pytest.mark.parametrize("shapes", SHAPES)
def test_every_derivative_is_there(shapes):
    """Forwards, backwards, one in the other, and the slopes of a mapped function."""
    x, y = drawn(shapes)
    dx, dy = (each[::-1] for each in (x, y))

    def total(x, y):
        return jnp.tanh(0.1 * matmul(x, y, "bfloat16")).sum()

    gradient = jax.grad(total, (0, 1))
    slope = jax.jvp(total, (x, y), (dx, dy))[1]
    backwards = sum(jnp.vdot(one, two) for one, two in zip(gradient(x, y), (dx, dy), strict=True))
    np.testing.assert_allclose(slope, backwards, rtol=0.02, atol=0.02)
    curved = jax.jvp(lambda *at: jax.jvp(total, at, (dx, dy))[1], (x, y), (dx, dy))[1]
    along = jax.jvp(gradient, (x, y), (dx, dy))[1]
    np.testing.assert_allclose(
        curved, sum(jnp.vdot(one, two) for one, two in zip(along, (dx, dy), strict=True)), rtol=0.03, atol=0.03
    )
    rows = jnp.stack([x, dx])
    mapped = jax.grad(lambda y: jax.vmap(total, (0, None))(rows, y).sum())(y)
    np.testing.assert_allclose(mapped, gradient(x, y)[1] + gradient(dx, y)[1], rtol=0, atol=0.02)


@pytest.mark.parametrize("product", PRODUCTS)
@pytest.mark.parametrize("axes", [None, (0, None), (1, None), (2, None), (None, 0), (None, 2), (0, 0), (1, 2)])
@pytest.mark.parametrize("specs", [("data", None), ("data", (None, "model")), (None, ("model", None))])
def test_over_a_mesh_of_explicit_axes_all_is_laid_out_as_by_jax(axes, specs, product):
    """Of plain, and of mapped products, whether the axis that is mapped is laid out over devices or not."""
    mesh = jax.make_mesh((2, 2), ("data", "model"), axis_types=(AxisType.Explicit,) * 2)
    shapes, parts = [[4, 8, 6], [6, 8]], [list(each) if isinstance(each, tuple) else [each] for each in specs]
    # The axis that is mapped over is laid out itself, unless that of rows is.
    mapped = None if "data" in parts[0] else "data"
    for shape, part, axis in zip(shapes, parts, axes or (None, None), strict=True):
        part += [None] * (len(shape) - len(part))
        if axis is not None:
            shape.insert(axis, 4)
            part.insert(axis, mapped)
    x, y = (each.astype(jnp.bfloat16).astype(jnp.float32) for each in drawn(shapes))

    def slopes(x, y, product):
        return jax.grad(lambda x, y: product(x, y).sum(), (0, 1))(x, y)

    def run(product):
        each = functools.partial(slopes, product=product)
        each = each if axes is None else jax.vmap(each, axes)
        with jax.set_mesh(mesh):
            given = (
                jax.device_put(x, NamedSharding(mesh, PartitionSpec(*part)))
                for x, part in zip((x, y), parts, strict=True)
            )
            return jax.jit(each)(*given)

    for found, expected in zip(run(product), run(plainly), strict=True):
        assert found.sharding.is_equivalent_to(expected.sharding, found.ndim)
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)


def test_what_is_on_no_mesh_is_everywhere_on_that_of_the_others():
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Explicit,))
    x, y = drawn([(4, 6), (6, 5)])
    with jax.set_mesh(mesh):
        spread = jax.device_put(x, NamedSharding(mesh, PartitionSpec("data")))
        found = jax.jit(lambda y: gradients(spread, y, "bfloat16", 1.0))(np.asarray(y))
    for one, two in zip(found, gradients(x, y, "bfloat16", 1.0), strict=True):
        np.testing.assert_allclose(one, two, rtol=0, atol=1e-5)


@pytest.mark.parametrize("result", ["float32", "bfloat16"])
def test_dtypes_and_weak_types(result):
    weak = jax.lax.full((2, 3), 1.0), jax.lax.full((3, 4), 1.0)
    for run in (short_product, jax.jit(short_product, static_argnames="result")):
        found = run(*weak, result=result)
        assert (found.dtype, found.weak_type) == (result, False)
        short = [each.astype(jnp.bfloat16) for each in weak]
        slopes = jax.grad(lambda *given, run=run: run(*given, result=result).astype(jnp.float32).sum(), (0, 1))
        assert [each.dtype for each in slopes(*short)] == [jnp.bfloat16] * 2
    text = jax.jit(jax.grad(lambda x: short_product(x, weak[1], result=result).astype(jnp.float32).sum()))
    products = [line for line in text.lower(weak[0]).as_text().splitlines() if "dot_general" in line]
    assert products[-1].endswith({"float32": "f32>", "bfloat16": "bf16>"}[result])


@pytest.mark.parametrize("given", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("with_bias", [True, False])
def test_a_dense_layer_stays_in_bfloat16_and_else_in_float32(given, with_bias):
    x, kernel, bias = drawn([(3, 4, 6), (6, 5), (5,)])
    x, bias = x.astype(given), bias if with_bias else None
    y = dense(x, kernel, bias, "bfloat16")
    assert y.dtype == (given if given == "bfloat16" else "float32")
    exact = of_rounded(x, kernel, 0) + (0 if bias is None else bias)
    np.testing.assert_allclose(y.astype(jnp.float32), exact, rtol=2.0**-7 if given == "bfloat16" else 0, atol=0.02)


def test_the_gradient_of_a_bias_is_summed_in_float32():
    """In bfloat16 a sum of ones ends at 256."""
    x, kernel, bias = drawn([(40, 50, 6), (6, 5), (5,)])
    slope = jax.grad(lambda bias: dense(x.astype(jnp.bfloat16), kernel, bias, "bfloat16").astype(jnp.float32).sum())
    np.testing.assert_array_equal(jax.jit(slope)(bias), np.full(5, 2000.0))
    text = jax.jit(slope).lower(bias).as_text()
    assert "optimization_barrier" in text and "across dimensions = [0, 1] : (tensor<40x50x5xf32>" in text


def test_a_dense_layer_in_a_shard_map():
    mesh = Mesh(np.array(jax.devices()), ("data",), axis_types=(AxisType.Auto,))
    x, kernel, bias = drawn([(16, 6), (6, 5), (5,)])
    x = x.astype(jnp.bfloat16)

    def loss(x, kernel, bias):
        return (dense(x, kernel, bias, "bfloat16").astype(jnp.float32) ** 2).sum()

    def on_each(x, kernel, bias):
        return jax.grad(lambda *of: jax.lax.psum(loss(x, *of), "data"), (0, 1))(kernel, bias)

    specs = (PartitionSpec("data"), PartitionSpec(), PartitionSpec())
    found = jax.shard_map(on_each, mesh=mesh, in_specs=specs, out_specs=PartitionSpec())(x, kernel, bias)
    for one, two in zip(found, jax.grad(loss, (1, 2))(x, kernel, bias), strict=True):
        np.testing.assert_allclose(one, two, rtol=1e-5)
