"""The ledger: no tensor is lost, none is made up, and what is wrong is named."""

import json
import re

import ml_dtypes
import numpy as np
import pytest
from conftest import DATA
from safetensors.numpy import load_file, save_file

from bertjax import BertConfig
from bertjax.convert import bert
from bertjax.convert.files import INDEX_FILE, SINGLE_FILE, write_safetensors
from bertjax.convert.names import survey
from bertjax.convert.rules import expand
from bertjax.convert.sources import open_weights
from bertjax.errors import CheckpointError
from bertjax.pretrained import abstract_model

PLAIN = DATA / "golden" / "plain"
CONFIG = BertConfig.from_file(PLAIN / "config.json")
TENSORS = load_file(PLAIN / SINGLE_FILE)
SHAPES = abstract_model(CONFIG)[1]
POSITION_IDS = np.arange(CONFIG.max_position_embeddings)[None]
HEADS = {
    "cls.predictions.bias": np.zeros(40, np.float32),
    "cls.predictions.transform.dense.weight": np.zeros((16, 16), np.float32),
    "cls.predictions.transform.dense.bias": np.zeros(16, np.float32),
    "cls.predictions.transform.LayerNorm.weight": np.ones(16, np.float32),
    "cls.predictions.transform.LayerNorm.bias": np.zeros(16, np.float32),
    "cls.predictions.decoder.weight": np.zeros((40, 16), np.float32),
    "cls.seq_relationship.weight": np.zeros((2, 16), np.float32),
    "classifier.weight": np.zeros((3, 16), np.float32),
    "qa_outputs.bias": np.zeros(2, np.float32),
}
EMBEDDING = "embeddings.word_embeddings.weight"
NORM = "encoder.layer.1.output.LayerNorm.weight"


def matched(folder, tensors, prefix=None, shapes=SHAPES):
    save_file(tensors, folder / SINGLE_FILE, {"format": "pt"})
    return bert.match(survey(open_weights(folder), prefix), shapes)


def refusal(folder, tensors, prefix=None, shapes=SHAPES):
    with pytest.raises(CheckpointError) as error:
        list(matched(folder, tensors, prefix, shapes).arrays(np.dtype(np.float32)))
    assert str(folder) in str(error.value)
    return str(error.value)


def exported(folder, plan):
    """What the plan's parameter tree is written as."""
    return written(folder, bert.tensors_of(plan.slots, dict(plan.arrays())), plan.layout)


def copied(folder, plan):
    """What the plan's tensors are written as without a parameter tree between."""
    return written(folder, plan.to_write(), plan.layout)


def written(folder, tensors, layout):
    (folder / "exported").unlink(missing_ok=True)
    write_safetensors(folder / "exported", bert.export(tensors, layout), {"format": "pt"})
    return load_file(folder / "exported")


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        assert (found[name].dtype, found[name].shape) == (array.dtype, array.shape), name
        assert found[name].tobytes() == array.tobytes(), name


def renamed(change):
    return {change(name): array for name, array in TENSORS.items()}


def test_the_table_names_every_tensor_once():
    names = [slot.name for slot in expand(bert.TABLE, SHAPES)]
    assert sorted(names) == sorted(TENSORS)
    assert len(expand(bert.TABLE, abstract_model(BertConfig())[1])) == 199


def test_every_tensor_reaches_its_place(tmp_path):
    arrays = dict(matched(tmp_path, TENSORS).arrays())
    stack = ("encoder", "layers")
    for layer in (0, 1):
        kernel = arrays[*stack, "attention", "key", "kernel"][layer]
        np.testing.assert_array_equal(kernel, TENSORS[f"encoder.layer.{layer}.attention.self.key.weight"].T)
        scale = arrays[*stack, "feed_forward_norm", "scale"][layer]
        np.testing.assert_array_equal(scale, TENSORS[f"encoder.layer.{layer}.output.LayerNorm.weight"])
    np.testing.assert_array_equal(arrays["pooler", "dense", "kernel"], TENSORS["pooler.dense.weight"].T)
    np.testing.assert_array_equal(arrays["embeddings", "word_embeddings", "embedding"], TENSORS[EMBEDDING])
    assert sum(array.size for array in arrays.values()) == sum(array.size for array in TENSORS.values())


@pytest.mark.parametrize("prefix", ["", "bert."])
@pytest.mark.parametrize("name", TENSORS)
def test_no_tensor_can_be_missing_renamed_or_misshaped(name, prefix, tmp_path):
    tensors, full = renamed(lambda each: prefix + each), prefix + name
    array = tensors.pop(full)
    assert name in refusal(tmp_path, tensors)
    message = refusal(tmp_path, tensors | {full + "_": array})
    assert name in message
    if name != EMBEDDING:
        assert f"{full}: missing" in message
        assert f"{full}_: unexpected tensor F32{list(array.shape)}" in message
    for wrong in (array[None], array[:-1], np.concatenate([array, array])):
        message = refusal(tmp_path, tensors | {full: np.ascontiguousarray(wrong)})
        assert f"{full}: shape {list(wrong.shape)}, the config asks for {list(array.shape)}" in message
    if array.ndim == 2 and array.shape[0] != array.shape[1]:
        assert f"{full}: shape" in refusal(tmp_path, tensors | {full: np.ascontiguousarray(array.T)})


def test_every_problem_is_in_one_message(tmp_path):
    tensors = dict(TENSORS)
    del tensors[NORM]
    tensors["pooler.dense.bias"] = np.zeros(3, np.float32)
    tensors["encoder.layer.2.output.dense.bias"] = np.zeros(16, np.float32)
    tensors["embeddings.position_ids"] = POSITION_IDS + 1
    tensors["embeddings.LayerNorm.bias"] = TENSORS["embeddings.LayerNorm.bias"].astype(np.int8)
    message = refusal(tmp_path, tensors)
    assert "5 problem(s)" in message
    assert all(name in message for name in tensors.keys() - TENSORS.keys() | {NORM, "pooler.dense.bias"})
    assert "embeddings.LayerNorm.bias: dtype I8" in message


def test_depth_is_checked_both_ways(tmp_path):
    deeper = abstract_model(BertConfig.from_hf(CONFIG.to_hf() | {"num_hidden_layers": 3}))[1]
    assert refusal(tmp_path, TENSORS, shapes=deeper).count("encoder.layer.2.") == 16
    shallower = abstract_model(BertConfig.from_hf(CONFIG.to_hf() | {"num_hidden_layers": 1}))[1]
    assert refusal(tmp_path, TENSORS, shapes=shallower).count("encoder.layer.1.") == 16


def test_a_flood_of_problems_is_cut(tmp_path):
    message = refusal(tmp_path, TENSORS | {f"x{i}": np.zeros(0, np.float32) for i in range(5000)})
    assert message.startswith(f"{tmp_path}: 5000 problem(s)")
    assert message.endswith("; and 4000 more")


@pytest.mark.parametrize("prefix", ["bert.", ""])
def test_heads_are_named_as_unused(prefix, tmp_path):
    plan = matched(tmp_path, renamed(lambda name: prefix + name) | HEADS)
    assert set(plan.unused) == set(HEADS)
    assert all(name in plan.summary() for name in HEADS)
    assert "classifier.weights: unexpected" in refusal(
        tmp_path, renamed(lambda name: prefix + name) | {"classifier.weights": np.zeros(3)}
    )


def test_a_pooler_is_found_used_or_named_as_unused(tmp_path):
    without = abstract_model(CONFIG, add_pooling_layer=False)[1]
    tensors = {name: array for name, array in TENSORS.items() if not name.startswith("pooler")}
    assert matched(tmp_path, tensors, shapes=without).unused == ()
    assert not bert.has_pooler(survey(open_weights(tmp_path)))
    message = refusal(tmp_path, tensors)
    assert "pooler.dense.weight: missing" in message
    assert "pooler.dense.bias: missing" in message
    assert set(matched(tmp_path, TENSORS, shapes=without).unused) == {"pooler.dense.weight", "pooler.dense.bias"}
    for name in ("pooler.dense.weight", "pooler.dense.bias"):
        save_file(tensors | {name: TENSORS[name]}, tmp_path / SINGLE_FILE)
        assert bert.has_pooler(survey(open_weights(tmp_path))), "half a pooler is a damaged one, not none"
    # Outside of the encoder it is not the encoder's.
    odd = {f"bert.{name}": array for name, array in tensors.items()} | {"pooler.dense.bias": np.zeros(16, np.float32)}
    assert "pooler.dense.bias: unexpected" in refusal(tmp_path, odd, shapes=without)


@pytest.mark.parametrize("prefix", ["", "bert.", "module.", "module.bert.", "_orig_mod.bert.", "module._orig_mod.",
                                    "model.", "0.auto_model.", "model.bert."])  # fmt: skip
def test_prefixes_are_recognised_and_come_back(prefix, tmp_path):
    tensors = renamed(lambda name: prefix + name)
    heads = {prefix.removesuffix("bert.") + name: array for name, array in HEADS.items()}
    plan = matched(tmp_path, tensors | heads)
    assert plan.layout.prefix == prefix
    assert set(plan.unused) == set(heads)
    assert_same(exported(tmp_path, plan), tensors)


def test_encoder_is_never_stripped_and_a_name_needs_its_dot(tmp_path):
    assert "embeddings.word_embeddings.weight" in refusal(tmp_path, renamed(lambda name: "x" + name))
    assert matched(tmp_path, renamed(lambda name: "encoder." + name)).layout.prefix == "encoder."
    assert "encoder.layer.0" in refusal(tmp_path, renamed(lambda name: name.removeprefix("encoder.")))


def test_gamma_and_beta_are_recognised_and_come_back(tmp_path):
    legacy = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}

    def old(name):
        for modern, spelling in legacy.items():
            name = name.replace(modern, spelling)
        return name

    tensors = renamed(lambda name: "bert." + old(name))
    heads = {old(name): array for name, array in HEADS.items()}
    plan = matched(tmp_path, tensors | heads)
    assert plan.layout.legacy_norm
    assert set(plan.unused) == set(heads)
    assert_same(exported(tmp_path, plan), tensors)

    gamma = "embeddings.LayerNorm.gamma"
    for mixed in (
        {old(name) if name == NORM else name: array for name, array in TENSORS.items()},
        TENSORS | {gamma: np.ones(16, np.float32)},
        tensors | {"cls.predictions.transform.LayerNorm.weight": np.ones(16, np.float32)},
    ):
        message = refusal(tmp_path, mixed)
        assert "both ways" in message
        assert re.search(r"LayerNorm\.(gamma|beta).*LayerNorm\.(weight|bias)", message)
    # Only a LayerNorm's parameters are ever called so.
    assert "gamma: unexpected" in refusal(tmp_path, TENSORS | {"encoder.layer.0.output.dense.gamma": np.ones(16)})


BUFFERS = {"embeddings.position_ids": POSITION_IDS, "embeddings.token_type_ids": np.zeros_like(POSITION_IDS)}


@pytest.mark.parametrize("dtype", [np.int64, np.int32])
@pytest.mark.parametrize("prefix", ["", "bert."])
def test_buffers_are_checked_kept_and_come_back(prefix, dtype, tmp_path):
    tensors = renamed(lambda name: prefix + name)
    tensors |= {prefix + name: array.astype(dtype) for name, array in BUFFERS.items()}
    plan = matched(tmp_path, tensors)
    assert plan.unused == ()
    assert "embeddings.position_ids, " in plan.summary()
    assert_same(exported(tmp_path, plan), tensors)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("embeddings.position_ids", POSITION_IDS + 1),
        ("embeddings.position_ids", POSITION_IDS[:, ::-1].copy()),
        ("embeddings.position_ids", POSITION_IDS[0]),
        ("embeddings.position_ids", POSITION_IDS.reshape(2, 12)),
        ("embeddings.position_ids", POSITION_IDS[None]),
        ("embeddings.position_ids", np.zeros((), np.int64)),
        ("embeddings.position_ids", POSITION_IDS.astype(np.float32)),
        ("embeddings.position_ids", np.full((1, 24), np.nan)),
        ("embeddings.position_ids", np.arange(300)[None].astype(np.int8)),
        ("embeddings.position_ids", np.zeros((1, (1 << 20) + 1), np.int8)),
        ("embeddings.token_type_ids", np.ones_like(POSITION_IDS)),
        ("embeddings.token_type_ids", POSITION_IDS),
        ("encoder.position_ids", POSITION_IDS),
        ("position_ids", POSITION_IDS),
    ],
)
def test_a_buffer_that_says_something_else_is_refused(name, value, tmp_path):
    assert f"{name}: " in refusal(tmp_path, TENSORS | {name: value})


def towers(*prefixes):
    return {prefix + name: array + index for index, prefix in enumerate(prefixes) for name, array in TENSORS.items()}


@pytest.mark.parametrize(
    "prefixes",
    [("query.", "passage."), ("", "teacher."), ("bert.", "teacher.bert."), ("a.bert.", "b.bert."), ("a.", "a.b.")],
)
def test_two_encoders_are_refused_and_a_prefix_chooses(prefixes, tmp_path):
    tensors = towers(*prefixes)
    message = refusal(tmp_path, tensors)
    assert all(repr(prefix) in message for prefix in prefixes)
    assert "prefix=" in message
    for index, prefix in enumerate(prefixes):
        own = {name: tensors[name] for name in renamed(lambda name, prefix=prefix: prefix + name)}
        plan = matched(tmp_path, tensors, prefix)
        assert set(plan.unused) == tensors.keys() - own.keys()
        bias = dict(plan.arrays())["pooler", "dense", "bias"]
        np.testing.assert_array_equal(bias, TENSORS["pooler.dense.bias"] + index)
        assert_same(exported(tmp_path, plan), own)
        message = refusal(tmp_path, tensors | {prefix + "encoder.odd": np.zeros(2)}, prefix)
        assert "1 problem(s)" in message
        assert f"{prefix}encoder.odd: unexpected" in message
        without = {name: array for name, array in tensors.items() if name != prefix + NORM}
        assert f"{prefix}{NORM}: missing" in refusal(tmp_path, without, prefix)


def test_each_encoder_has_its_own_spelling_and_pooler(tmp_path):
    tensors = {f"a.bert.{name.replace('LayerNorm.weight', 'LayerNorm.gamma')}": x for name, x in TENSORS.items()}
    tensors = {name.replace("LayerNorm.bias", "LayerNorm.beta"): x for name, x in tensors.items()}
    tensors |= {f"b.bert.{name}": x for name, x in TENSORS.items() if "pooler" not in name}
    tensors |= {"a.cls.predictions.bias": np.zeros(40), "b.classifier.bias": np.zeros(2), "b.odd": np.zeros(1)}
    plan = matched(tmp_path, tensors, "a.bert.")
    assert plan.layout.legacy_norm
    assert {"a.cls.predictions.bias", "b.classifier.bias", "b.odd"} <= set(plan.unused)
    weights = open_weights(tmp_path)
    assert bert.has_pooler(survey(weights, "a.bert."))
    assert not bert.has_pooler(survey(weights, "b.bert."))


def test_a_prefix_without_an_encoder_is_refused(tmp_path):
    for prefix in ("bert", "model.bert.", "embeddings."):
        assert f"{prefix!r}, only under 'bert.'" in refusal(tmp_path, renamed(lambda name: "bert." + name), prefix)
    assert "not a BERT (it has a" in refusal(tmp_path, {"a": np.zeros(1)})
    many = {f"{index}.{EMBEDDING}": np.zeros(0) for index in range(2000)}
    for prefix in (None, "7."):
        message = refusal(tmp_path, many, prefix)
        assert "2000 encoders" in message
        assert len(message) < 2000


@pytest.mark.parametrize("name", ["SCB", "weight_format", "qweight", "g_idx", "absmax", "quant_state.bnb__nf4"])
def test_quantised_checkpoints_are_refused_as_such(name, tmp_path):
    full = f"encoder.layer.0.output.dense.{name}"
    assert f"{full}: quantised weights" in refusal(tmp_path, TENSORS | {full: np.zeros(2, np.uint8)})


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.int32, np.int64, bool])
def test_integer_weights_are_refused(dtype, tmp_path):
    for name in (NORM, EMBEDDING, "encoder.layer.0.output.dense.weight"):
        message = refusal(tmp_path, TENSORS | {name: TENSORS[name].astype(dtype)})
        assert re.search(f"{name}: dtype .*quantised", message)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, ml_dtypes.bfloat16])
@pytest.mark.parametrize("name", [EMBEDDING, NORM, "encoder.layer.1.attention.self.query.weight"])
def test_nan_and_infinity_are_refused_by_name(name, dtype, value, tmp_path):
    array = TENSORS[name].astype(dtype)
    array.flat[-1] = value
    plan = matched(tmp_path, TENSORS | {name: array})
    for target in (None, np.dtype(np.float32), np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16)):
        with pytest.raises(CheckpointError, match=f"{SINGLE_FILE}: tensor '{name}' holds NaN or infinity"):
            list(plan.arrays(target))


@pytest.mark.parametrize(
    ("dtype", "value", "target"),
    [
        (np.float32, 65520, np.float16),
        (np.float32, -1e5, np.float16),
        (np.float64, 1e39, np.float32),
        (np.float64, 1e39, ml_dtypes.bfloat16),
        (np.float32, 3.4e38, ml_dtypes.bfloat16),
        (ml_dtypes.bfloat16, 1e5, np.float16),
    ],
)
def test_a_value_too_large_for_the_dtype_is_refused_by_name(dtype, value, target, tmp_path):
    name = "encoder.layer.1.attention.self.query.weight"
    array = TENSORS[name].astype(dtype)
    array[3, 5] = value
    plan = matched(tmp_path, TENSORS | {name: array})
    assert len(list(plan.arrays())) == len(SHAPES)
    with pytest.raises(CheckpointError, match=f"tensor '{name}' does not fit in {np.dtype(target).name}.*wider"):
        list(plan.arrays(np.dtype(target)))


FLOATS = (np.float16, ml_dtypes.bfloat16, np.float32, np.float64)


def test_any_mixture_of_dtypes_comes_back_per_tensor(tmp_path):
    rng = np.random.default_rng(0)
    for _ in range(10):
        mixed = {name: array.astype(FLOATS[rng.integers(4)]) for name, array in TENSORS.items()}
        plan = matched(tmp_path, mixed)
        assert_same(copied(tmp_path, plan), mixed)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_every_short_number_is_known_to_be_finite_or_not(dtype):
    numbers = np.arange(1 << 16, dtype=np.uint16).view(dtype)
    with np.errstate(invalid="ignore"):
        expected = np.isfinite(numbers)
    assert [bert.is_finite(number) for number in numbers[:, None]] == expected.tolist()
    assert bert.is_finite(numbers[expected])


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_sum_that_overflows_is_finite_all_the_same(dtype):
    largest = np.full((3, 4), np.finfo(dtype).max, dtype)
    assert bert.is_finite(largest)
    assert not bert.is_finite(np.where(np.eye(3, 4), dtype(np.nan), largest))
    assert not bert.is_finite(np.array([np.inf, -np.inf], dtype))


@pytest.mark.parametrize("first", FLOATS)
@pytest.mark.parametrize("second", FLOATS)
def test_a_stack_of_two_dtypes_holds_both_exactly(first, second, tmp_path):
    """float16 and bfloat16 are of one size, and neither holds the other."""
    names = [f"encoder.layer.{layer}.output.dense.weight" for layer in (0, 1)]
    mixed = dict(TENSORS)
    for name, dtype in zip(names, (first, second), strict=True):
        scale = 1 if dtype == np.float16 else 1e20  # beyond float16, which bfloat16 is not
        mixed[name] = (TENSORS[name] * scale).astype(dtype)
    stack = dict(matched(tmp_path, mixed).arrays())["encoder", "layers", "feed_forward", "output", "kernel"]
    for layer, name in enumerate(names):
        np.testing.assert_array_equal(stack[layer].T.astype(np.float64), mixed[name].astype(np.float64))
    assert first != second or stack.dtype == first


def test_arrays_are_aligned_for_jax_and_casts_are_ieee(tmp_path):
    plan = matched(tmp_path, TENSORS)
    for path, array in plan.arrays(np.dtype(np.float16)):
        assert array.ctypes.data % 64 == 0
        assert array.flags.c_contiguous
        assert array.shape == SHAPES[path]
    bias = dict(plan.arrays(np.dtype(np.float16)))["pooler", "dense", "bias"]
    assert bias.tobytes() == TENSORS["pooler.dense.bias"].astype(np.float16).tobytes()


def test_a_summary_accounts_for_everything(tmp_path):
    text = matched(tmp_path, renamed(lambda name: "bert." + name) | HEADS).summary()
    total = sum(array.size for array in TENSORS.values())
    assert f"mapped   {len(TENSORS)} tensors to {len(SHAPES)} arrays, {total:,} parameters, F32" in text
    assert "prefix 'bert.'" in text
    assert "encoder.layer.{0..1}.output.dense.weight [16x32]" in text
    assert len(re.findall(" -> ", text)) == len(SHAPES)


def test_a_dense_module_is_matched_exactly(tmp_path):
    slots = expand(bert.DENSE_TABLE, {("linear", "kernel"): (3, 2), ("linear", "bias"): (2,)})
    good = {"linear.weight": np.ones((2, 3), np.float32), "linear.bias": np.ones(2, np.float32)}

    def match(tensors):
        save_file(tensors, tmp_path / SINGLE_FILE)
        return bert.match_exactly(open_weights(tmp_path), slots)

    assert dict(match(good).arrays())["linear", "kernel"].shape == (3, 2)
    bad = {"linear.weight": np.ones((3, 2), np.float32), "linear.extra": np.ones(2, np.float32)}
    with pytest.raises(CheckpointError, match=r"3 problem.*linear.bias: missing.*") as error:
        match(bad)
    assert "linear.weight: shape [3, 2], the config asks for [2, 3]" in str(error.value)
    assert "linear.extra: unexpected" in str(error.value)


def test_the_layout_of_shards_is_remembered(tmp_path):
    names = sorted(TENSORS)
    for shard, part in (("model-1.safetensors", names[:7]), ("model-2.safetensors", names[7:])):
        save_file({name: TENSORS[name] for name in part}, tmp_path / shard)
    index = {name: f"model-{1 + (position >= 7)}.safetensors" for position, name in enumerate(names)}
    (tmp_path / INDEX_FILE).write_text(json.dumps({"weight_map": index}))
    plan = bert.match(survey(open_weights(tmp_path)), SHAPES)
    assert dict(plan.layout.shards) == index
