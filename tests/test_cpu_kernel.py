"""The native encoder beside the scan over layers that defines what it computes."""

import dataclasses
import os
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import random_model, tolerance
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from bertjax import BertConfig, cpu, functional
from bertjax.cpu import library

SMALL = BertConfig(
    vocab_size=50,
    hidden_size=64,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=96,
    max_position_embeddings=512,
)
WIDE = dataclasses.replace(SMALL, hidden_size=128, intermediate_size=256)  # heads of 64
TARGET = library.TARGET

# What this CPU can run must be there, wherever it can have been compiled; what it can't run is not tested.
COMPILER = shutil.which("c++") or library.LIBRARY.exists()
DTYPES = [dtype for dtype in ("float32", "bfloat16") if COMPILER and library.possible_ways(dtype)]
FLOAT32 = DTYPES[:1]
# Not only the way that is taken: this CPU may be able to do it in others, too, which are another CPU's.
WAYS = [(dtype, way) for dtype in DTYPES for way in library.possible_ways(dtype)]


def draw(shape, *, lengths=None, packed=False, holes=False, nothing=False):
    """Ids, with a mask or several texts to the row; `nothing` hides all tokens of the second text."""
    rng = np.random.default_rng(0)
    inputs = {"input_ids": rng.integers(1, SMALL.vocab_size, shape)}
    index = np.arange(shape[1])
    if lengths:
        inputs["attention_mask"] = (index < np.array(lengths)[:, None]).astype(int)
    if holes:
        inputs["attention_mask"] = ((index + np.arange(shape[0])[:, None]) % 3 != 1).astype(int)
    if packed:
        # The first is so short that by itself it is computed in another way.
        ends = [shape[1] // 14, shape[1] // 2, shape[1] - 7]
        number = 1 + np.searchsorted(ends, index, side="right")
        inputs["segment_ids"] = np.tile(np.where(number > len(ends), 0, number), (shape[0], 1))
    if nothing:
        inputs["attention_mask"] = (inputs["segment_ids"] != 2).astype(int)
    return inputs


# Nothing, one token, two texts with padding between them, and a full row.
EMPTY_ROWS = np.zeros((4, 40), int)
EMPTY_ROWS[1, 39] = 1
EMPTY_ROWS[2, :9], EMPTY_ROWS[2, 20:33] = 1, 2
EMPTY_ROWS[3] = 1

CASES = {
    "one token": (SMALL, draw((1, 1))),
    "9 tokens": (WIDE, draw((1, 9))),
    "33 tokens": (WIDE, draw((1, 33))),
    "65 tokens": (WIDE, draw((1, 65))),
    "padded": (SMALL, draw((3, 128), lengths=[128, 77, 5])),
    "packed": (WIDE, draw((2, 128), packed=True)),
    "holes": (SMALL, draw((3, 41), holes=True)),
    "a query without a key": (SMALL, draw((2, 128), packed=True, nothing=True)),
    "rows of padding": (SMALL, {"input_ids": draw((4, 40))["input_ids"], "segment_ids": EMPTY_ROWS}),
    "511 tokens": (SMALL, draw((2, 511), lengths=[511, 300])),
}


def model_of(config, **options):
    """A model with random weights, whose attention is about as sharp in both configurations, and not very.

    As they are drawn, scores are so large that softmax makes several times as much of any rounding; the scan is then as
    far from an exact result as the native encoder, and both are far.
    """
    model = random_model(config, **options)
    for part in (model.encoder.layers.attention.query, model.encoder.layers.attention.key):
        part.kernel[...] = part.kernel[...] * (0.5 * SMALL.hidden_size / config.hidden_size)
    return model


@pytest.fixture(scope="module")
def models():
    """By configuration, dtype and attention: models with the same parameters."""
    return {
        (config, dtype, attention): model_of(config, dtype=jnp.dtype(dtype), attention=attention)
        for config in (SMALL, WIDE)
        for dtype in ("float32", "bfloat16")
        for attention in ("auto", "xla")
    }


def states(model, inputs):
    """The states of what is no padding in packed rows, zero for the rest: there they mean nothing."""
    found = np.asarray(model(**inputs).last_hidden_state)
    return found if "segment_ids" not in inputs else np.where(inputs["segment_ids"][..., None] > 0, found, 0)


def states_by(way, model, inputs, monkeypatch):
    """The same, by one of the library's ways."""
    apply, params = functional(model)
    run = jax.jit(lambda params, inputs: apply(params, **inputs).last_hidden_state)
    with monkeypatch.context() as patch:
        patch.setattr("bertjax.cpu.encoder.ways", lambda dtype: [way])
        compiled = run.lower(params, inputs)
        assert f"way = {way:d} : i64" in compiled.as_text()
        found = np.asarray(compiled.compile()(params, inputs))
    return found if "segment_ids" not in inputs else np.where(inputs["segment_ids"][..., None] > 0, found, 0)


def program(model, inputs, **options):
    """The program of a call, before XLA compiles it."""
    apply, params = functional(model)
    return jax.jit(lambda params, inputs: apply(params, **inputs, **options)).lower(params, inputs).as_text()


def angles(a, b):
    """1 - cosine between the states of each token."""
    lengths = np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1)
    return np.where(lengths > 0, 1 - (a * b).sum(-1) / np.maximum(lengths, 1e-9), 0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_it_is_there_where_the_cpu_can_run_it(dtype):
    assert library.library_problem(dtype) is None
    assert cpu.available(dtype)


@pytest.mark.parametrize("case", CASES if FLOAT32 else ())
def test_float32_equals_the_scan(case, models):
    config, inputs = CASES[case]
    expected = states(models[config, "float32", "xla"], inputs)
    bound = tolerance(expected, config.num_hidden_layers)
    np.testing.assert_allclose(states(models[config, "float32", "auto"], inputs), expected, rtol=0, atol=bound)


@pytest.mark.parametrize("way", [way for dtype, way in WAYS if dtype == "bfloat16"])
@pytest.mark.parametrize("case", CASES)
def test_bfloat16_is_as_close_to_float32_as_the_scan_is(case, way, models, monkeypatch):
    config, inputs = CASES[case]
    exact = states(models[config, "float32", "xla"], inputs)
    scan = states(models[config, "bfloat16", "xla"], inputs)
    found = states_by(way, models[config, "bfloat16", "auto"], inputs, monkeypatch)
    # Both round the same numbers to 8 bits, and once more each the attention weights, at another point.
    assert np.median(angles(found, exact)) <= 1.5 * np.median(angles(scan, exact)) + 1e-7
    assert angles(found, exact).max() <= 2 * angles(scan, exact).max() + 1e-7
    assert angles(found, scan).max() <= 2 * angles(scan, exact).max() + 1e-7
    assert not np.array_equal(found, states(models[config, "float32", "auto"], inputs))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("param_dtype", ["bfloat16", "float16"])
def test_parameters_may_have_another_dtype(dtype, param_dtype, models):
    """Parameters that are exact in it, so that nothing else differs."""
    inputs = CASES["33 tokens"][1]
    _, params = functional(models[SMALL, "float32", "auto"])
    kinds = [
        random_model(SMALL, dtype=jnp.dtype(dtype), param_dtype=jnp.dtype(kind)) for kind in (param_dtype, "float32")
    ]
    for model in kinds:
        old = nnx.state(model)
        exact = jax.tree.map(lambda x, y: x.astype(jnp.float8_e4m3fn).astype(y.dtype), params, nnx.to_pure_dict(old))
        nnx.update(model, exact)
        assert TARGET in program(model, inputs)
    np.testing.assert_array_equal(states(kinds[0], inputs), states(kinds[1], inputs))


@pytest.mark.parametrize(("dtype", "way"), WAYS)
def test_segments_do_not_leak(dtype, way, models, monkeypatch):
    inputs = CASES["packed"][1]
    others = inputs["segment_ids"] != 2
    changed = inputs | {"input_ids": np.where(others, inputs["input_ids"], inputs["input_ids"][:, ::-1])}
    model = models[WIDE, dtype, "auto"]
    before, after = (states_by(way, model, given, monkeypatch) for given in (inputs, changed))
    np.testing.assert_array_equal(before[others], after[others])
    assert (before[~others] != after[~others]).any(-1).all()


@pytest.mark.parametrize("attention", ["auto"] * len(FLOAT32))
def test_a_text_is_the_same_alone_and_in_company(attention, models):
    inputs = CASES["packed"][1]
    model = models[WIDE, "float32", attention]
    together = states(model, inputs)
    for segment in (1, 2, 3):
        where = inputs["segment_ids"][1] == segment
        alone = states(model, {"input_ids": inputs["input_ids"][1:, where]})[0]
        np.testing.assert_allclose(alone, together[1, where], rtol=0, atol=tolerance(alone, 2))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", FLOAT32)
def test_derivatives_are_the_scans(dtype, models):
    inputs = CASES["holes"][1]

    def gradients(model):
        apply, params = functional(model)
        return jax.jit(jax.grad(lambda params: (apply(params, **inputs).last_hidden_state ** 2)[:, 0].sum()))(params)

    found, expected = (gradients(models[SMALL, dtype, attention]) for attention in ("auto", "xla"))
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    assert max(float(jnp.abs(array).max()) for array in jax.tree.leaves(found)) > 0.01


@pytest.mark.parametrize("dtype", DTYPES)
def test_it_works_under_vmap_and_jit(dtype, models):
    inputs = CASES["padded"][1]
    apply, params = functional(models[SMALL, dtype, "auto"])

    def each(params, inputs):
        return apply(params, **{name: array[None] for name, array in inputs.items()}).last_hidden_state[0]

    over_rows = jax.jit(jax.vmap(each, (None, 0)))
    assert TARGET in over_rows.lower(params, inputs).as_text()
    twice = jax.tree.map(lambda array: jnp.stack([array, array * 0.5]), params)
    over_models = jax.jit(jax.vmap(lambda params: apply(params, **inputs).last_hidden_state))
    expected = states(models[SMALL, dtype, "auto"], inputs)
    bound = tolerance(expected, 2)
    np.testing.assert_allclose(over_rows(params, inputs), expected, rtol=0, atol=bound)
    np.testing.assert_allclose(over_models(twice)[0], expected, rtol=0, atol=bound)


@pytest.mark.parametrize("attention", ["auto"] * len(FLOAT32))
def test_the_call_is_in_a_program_for_one_cpu_and_in_no_other(attention, models):
    inputs = {"input_ids": np.ones((8, 4), int)}
    model = models[SMALL, "float32", attention]
    assert program(model, inputs).count(f"@{TARGET}") == 1
    assert TARGET not in program(models[SMALL, "float32", "xla"], inputs)
    assert TARGET not in program(model, inputs, output_attentions=True)
    assert TARGET not in program(model, inputs, output_hidden_states=True)
    assert TARGET not in program(model, inputs, head_mask=np.ones(2))
    assert TARGET not in program(model, inputs, dropout_key=jax.random.key(0))
    assert TARGET not in program(random_model(SMALL, remat=True), inputs)
    apply, params = functional(model)
    f = jax.jit(lambda params, ids: apply(params, ids).last_hidden_state)
    ids = inputs["input_ids"]
    assert TARGET not in f.trace(params, ids).lower(lowering_platforms=("tpu",)).as_text()
    for platforms in (["cpu"], ["cpu", "cuda", "tpu"]):
        exported = jax.export.export(f, platforms=platforms)(params, ids)
        assert TARGET not in exported.mlir_module()


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit] if FLOAT32 else ())
def test_what_is_spread_over_devices_is_a_scan(kind, models):
    mesh = Mesh(np.array(jax.devices()), ("data",), axis_types=(kind,))
    ids = jnp.asarray(np.random.default_rng(0).integers(0, 50, (len(jax.devices()), 6)), jnp.int32)
    apply, params = functional(models[SMALL, "float32", "auto"])
    f = jax.jit(lambda params, ids: apply(params, ids).last_hidden_state)
    expected = f(params, ids)
    spread = jax.device_put(ids, NamedSharding(mesh, PartitionSpec("data")))
    params = jax.device_put(params, NamedSharding(mesh, PartitionSpec()))
    assert TARGET not in f.lower(params, spread).as_text()
    found = f(params, spread)
    assert len(found.sharding.device_set) == len(jax.devices()) == 8
    np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance(np.asarray(expected), 2))
    if kind is AxisType.Auto:
        inside = jax.shard_map(
            f, mesh=mesh, in_specs=(PartitionSpec(), PartitionSpec("data")), out_specs=PartitionSpec("data")
        )
        assert TARGET not in jax.jit(inside).lower(params, spread).as_text()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_act": "relu"}, "activation gelu only, not relu"),
        ({"hidden_act": "gelu_new"}, "activation gelu only, not gelu_new"),
        ({"position_embedding_type": "relative_key"}, "no relative positions"),
        ({"intermediate_size": 100}, "multiples of 32, not intermediate_size=100"),
        ({"num_attention_heads": 4}, "multiples of 32, not head_dim=16"),
        ({"hidden_size": 48, "num_attention_heads": 3}, "32, not hidden_size=48, head_dim=16"),
    ],
)
def test_what_it_cannot_compute_is_named_and_left_to_the_scan(change, message):
    config = dataclasses.replace(SMALL, **change)
    assert message in cpu.problem(config, "float32")
    assert TARGET not in program(random_model(config), {"input_ids": np.ones((1, 4), int)})


def test_other_dtypes_and_cpus_are_named(monkeypatch):
    assert "in float32, bfloat16, int8, not in float16" in cpu.problem(SMALL, jnp.float16)
    monkeypatch.setattr(
        library, "_cpu_flags", lambda: frozenset(["avx512f", "avx512bw", "avx512dq", "fma", "bmi2", "abm", "popcnt"])
    )
    assert library.library_problem.__wrapped__("float32") == "in float32 it needs a CPU with avx512vl"
    assert "needs a CPU with avx512vl, avx512_bf16" in library.library_problem.__wrapped__("bfloat16")


def test_the_fastest_way_that_there_is_is_taken(monkeypatch):
    of_all = "avx512f avx512bw avx512dq avx512vl fma bmi2 abm popcnt avx512_vnni"
    flags = {
        "Ice Lake": of_all,
        "Zen 4": f"{of_all} avx512_bf16",
        "Sapphire Rapids": f"{of_all} avx512_bf16 amx_tile amx_bf16 amx_int8",
    }
    expected = {
        "Ice Lake": [None, library.Way.AVX512_INT8_FLOAT32],
        "Zen 4": [library.Way.AVX512_BFLOAT16, library.Way.AVX512_INT8],
        "Sapphire Rapids": [library.Way.AMX_BFLOAT16, library.Way.AMX_INT8],
    }
    for kind, ways in expected.items():
        monkeypatch.setattr(library, "_cpu_flags", lambda of=flags[kind]: frozenset(of.split()))
        monkeypatch.setattr(library, "_amx_allowed", lambda: True)
        assert [next(iter(library.ways(dtype)), None) for dtype in ("bfloat16", "int8")] == ways
    monkeypatch.setattr(library, "_amx_allowed", lambda: False)  # the CPU has it, the operating system does not give it
    assert [library.ways(dtype)[0] for dtype in ("bfloat16", "int8")] == expected["Zen 4"]


def test_without_a_usable_library_xla_is_used(tmp_path, monkeypatch, caplog, models):
    monkeypatch.setattr(library, "LIBRARY", tmp_path / "libencoder.so")
    assert "for want of a C++ compiler" in library._load.__wrapped__()
    (tmp_path / "libencoder.so").write_bytes(b"no library")
    assert "can't be loaded" in library._load.__wrapped__()
    assert "XLA alone is; reinstall bertjax" in caplog.text
    monkeypatch.setattr("bertjax.cpu.encoder.library_problem", lambda dtype: "it is not there")
    assert TARGET not in program(models[SMALL, "float32", "auto"], {"input_ids": np.ones((1, 3), int)})


def test_an_adapter_is_left_to_the_scan():
    model = random_model(SMALL)
    dense = model.encoder.layers.attention.query
    assert cpu.is_plain(model.encoder.layers)

    class Adapted(nnx.Linear):
        """Stands for any class that computes more than a dense layer."""

    dense.__class__ = Adapted
    assert not cpu.is_plain(model.encoder.layers)
    assert TARGET not in program(model, {"input_ids": np.ones((1, 3), int)})


SQUARE = np.ones((1, 64, 64), np.float32)
KERNELS = [*[SQUARE] * 4, np.ones((1, 64, 96), np.float32), np.ones((1, 96, 64), np.float32)]
VECTORS = [np.ones((1, 96 if place == 4 else 64), np.float32) for place in range(10)]


def call(**changes):
    """The library's call of one layer in float32 with hidden size 64, with other arguments where these are given."""
    given = {
        "x": np.ones((2, 8, 64), np.float32),
        "query": np.ones((2, 8), np.int32),
        "key": np.ones((2, 8), np.int32),
        "kernels": KERNELS,
        "vectors": VECTORS,
        "heads": 2,
        "way": library.Way.FLOAT32,
        "out": (2, 8, 64),
    } | changes
    assert cpu.available("float32")  # and XLA knows the library
    run = jax.ffi.ffi_call(TARGET, jax.ShapeDtypeStruct(given["out"], jnp.float32))
    options = {"heads": np.int64(given["heads"]), "eps": np.float32(1e-6), "way": np.int64(given["way"])}
    arrays = [given["x"], given["query"], given["key"], *given["kernels"], *given["vectors"]]
    return jax.jit(lambda *arrays: run(*arrays, **options))(*arrays).block_until_ready()


NARROW = [np.ones((1, 48, 48), np.float32)] * 6


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"heads": 0}, "no multiples of a block"),
        ({"heads": -2}, "no multiples of a block"),
        ({"heads": 4}, "no multiples of a block"),
        ({"x": np.ones((2, 8, 48), np.float32), "out": (2, 8, 48), "heads": 1, "kernels": NARROW}, "of a block"),
        ({"x": np.ones((16, 64), np.float32)}, "three dimensions"),
        ({"out": (1, 1, 64)}, "a result of another size"),
        ({"kernels": [np.ones((1, 1, 1), np.float32), *KERNELS[1:]]}, "a wrong number, size or dtype"),
        ({"kernels": [np.ones(1, np.float32)] * 6}, "three dimensions"),
        ({"kernels": [kernel.astype(np.float16) for kernel in KERNELS]}, "multiply like that"),
        ({"vectors": [vector.astype(np.float16) for vector in VECTORS]}, "a wrong number, size or dtype"),
        ({"vectors": []}, "too few parameters"),
        ({"query": np.ones((1, 1), np.int32)}, "segments that are not those"),
        ({"query": np.ones((2, 7), np.int32), "key": np.ones((2, 7), np.int32)}, "segments that are not those"),
        ({"way": library.Way.AVX512_BFLOAT16 + 20}, "no multiples of a block"),
    ],
)
@pytest.mark.skipif(not FLOAT32, reason="this CPU can't run the library")
def test_a_wrong_call_is_refused_and_not_run(changes, message):
    """The library is sent right ones by `encode`; a mistake there must not be one in memory."""
    assert np.isfinite(call()).all()
    with pytest.raises(jax.errors.JaxRuntimeError, match=message):
        call(**changes)


@pytest.mark.parametrize("way", [way for _, way in WAYS])
def test_scores_that_are_huge_are_no_infinities(way):
    """The largest score of a query has the weight one, whatever its size; here they are about 1e13."""
    kernels = [*[np.eye(64, dtype=np.float32)[None]] * 4, *(0 * kernel for kernel in KERNELS[4:])]
    vectors = [vector * (place in (6, 8)) for place, vector in enumerate(VECTORS)]  # the scales of LayerNorm
    x = np.random.default_rng(0).normal(size=(2, 8, 64)).astype(np.float32) * 1e6
    found = np.asarray(call(x=x, kernels=kernels, vectors=vectors, way=way))
    # Each sees hardly anything but itself, so attention doubles it.
    mean, deviation = x.mean(-1, keepdims=True), x.std(-1, keepdims=True)
    np.testing.assert_allclose(found, (x - mean) / deviation, rtol=0, atol=0.05)


MANY_THREADS = """
import sys
import jax.numpy as jnp, numpy as np
from flax import nnx
from bertjax import BertConfig, BertModel
from bertjax.cpu import available

assert available(sys.argv[1])
config = BertConfig(vocab_size=50, hidden_size=256, num_hidden_layers=2, num_attention_heads=4, intermediate_size=512)
models = [
    BertModel(config, dtype=jnp.dtype(sys.argv[1]), attention=attention, rngs=nnx.Rngs(0))
    for attention in ("auto", "xla")
]
for length in (1, 9, 40, 300):
    ids = np.random.default_rng(length).integers(0, 50, (1, length))
    found, expected = (np.asarray(model(ids).last_hidden_state) for model in models)
    print(np.abs(found - expected).max())
"""


@pytest.mark.parametrize(("dtype", "bound"), [("float32", 1e-5), ("bfloat16", 0.05)][: len(DTYPES)])
def test_many_threads_share_the_work(dtype, bound):
    """Work is divided by the number of threads; here there are more than this machine may have cores."""
    done = subprocess.run(
        [sys.executable, "-c", MANY_THREADS, dtype],
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"NPROC": "24"},
    )
    assert done.returncode == 0, done.stderr
    errors = [float(line) for line in done.stdout.split()]
    assert len(errors) == 4
    assert max(errors) < bound


BUSY = """
import threading
import jax, numpy as np, jax.numpy as jnp
from bertjax.cpu import available
from bertjax.cpu.library import TARGET

assert available("float32")

def encoder(layers, length, hidden):
    kernels = [jnp.zeros((layers, hidden, hidden))] * 6
    vectors = [jnp.ones((layers, hidden))] * 10
    x, everything = jnp.ones((1, length, hidden)), jnp.zeros((0, 0), jnp.int32)
    call = jax.ffi.ffi_call(TARGET, jax.ShapeDtypeStruct(x.shape, x.dtype))
    run = jax.jit(lambda *args: call(*args, heads=np.int64(1), eps=np.float32(1e-6), way=np.int64(0)))
    return lambda: run(x, everything, everything, *kernels, *vectors).block_until_ready()

long, short = encoder(24, 512, 512), encoder(1, 1, 32)
long(), short()
stop = threading.Event()

def keep_busy():
    while not stop.is_set():
        long()

threads = [threading.Thread(target=keep_busy) for _ in range(2)]
for thread in threads:
    thread.start()
for _ in range(5000):
    short()
stop.set()
for thread in threads:
    thread.join()
print("ended")
"""


@pytest.mark.slow
@pytest.mark.skipif(not FLOAT32, reason="this CPU can't run the library")
def test_calls_end_while_others_keep_every_thread_busy():
    # Helpers that find no thread pile up in XLA's queue, which holds 1024 of them for each thread.
    done = subprocess.run([sys.executable, "-c", BUSY], capture_output=True, text=True, timeout=300)
    assert done.stdout == "ended\n", done.stderr
