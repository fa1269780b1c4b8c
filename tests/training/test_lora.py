"""Adapters: those of PEFT, in what they compute, in what they learn and in files."""

import functools
import json
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import random_model
from flax import nnx
from jax.sharding import AxisType, Mesh, PartitionSpec
from oracle import require
from safetensors.numpy import load_file, save_file
from test_heads import LOGITS, TINY, from_torch, inputs_of, random_heads, torch_model
from test_step import ADAM, CLASSES, QUICK, assert_close, batches, cast, setting, torch_trained, trained

from bertjax import BertModel, from_pretrained, functional
from bertjax.errors import CheckpointError, ConfigError, InputError, SourceError
from bertjax.sentence import Dense, SentenceModel
from bertjax.sharding import FULLY_SHARDED, shardings_of
from bertjax.training import AdamW, new_state
from bertjax.training.lora import adapters_of, add_lora, merge_lora
from bertjax.training.lora_files import load_adapter, save_adapter
from bertjax.training.lora_settings import TARGETS, LoRA

pytestmark = pytest.mark.usefixtures("little_optimisation")

CLASSIFIER = "BertForSequenceClassification"
EVERYWHERE = LoRA(rank=3, alpha=5, targets=tuple(TARGETS))
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


@functools.cache
def plain(name=CLASSIFIER, **options):
    """A model without dropout; one for all tests, as nothing here changes the model that it is given."""
    return random_heads(name, setting(name)[1], **options)


def adapted(model, lora=EVERYWHERE):
    """A model with adapters that do something."""
    model = add_lora(model, lora)
    rng = np.random.default_rng(1)
    for dense in adapters_of(model).values():
        dense.lora_b[...] = jnp.asarray(rng.normal(0.0, 0.3, dense.lora_b.shape), jnp.float32)
    return model


def results(model, name):
    """What a model of this name says of some rows."""
    output = model(*inputs_of(name))
    return [np.asarray(getattr(output, field)) for field in fields_of(name)]


def fields_of(name):
    return LOGITS.get(name, ("last_hidden_state",))


def by_torch(model, name):
    torch = require("torch")
    names = ("input_ids", "attention_mask", "token_type_ids")
    given = dict(zip(names, map(torch.tensor, inputs_of(name)), strict=True))
    with torch.no_grad():
        output = model.eval()(**given)
    return [getattr(output, field).numpy() for field in fields_of(name)]


def quietly(call, *args, **options):
    """What a reference warns of is its own business."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return call(*args, **options)


def opened_by_peft(model, folder, **options):
    """PEFT's model, and in it the one to call: around it PEFT forgets the token types of questions and contexts."""
    made = quietly(require("peft").PeftModel.from_pretrained, model, str(folder), **options)
    return made, made.get_base_model()


def made_by_peft(model, folder, **options):
    """An adapter of PEFT in a folder, all of its numbers random."""
    torch, peft = require("torch"), require("peft")
    made = quietly(peft.get_peft_model, model, peft.LoraConfig(**options))
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if parameter.requires_grad:
                torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(len(name)))
    quietly(made.save_pretrained, str(folder))
    return made.get_base_model()


def test_new_adapters_change_nothing():
    model = plain()
    made = add_lora(model, EVERYWHERE)
    np.testing.assert_allclose(results(made, CLASSIFIER), results(model, CLASSIFIER), rtol=0, atol=1e-6)
    assert list(adapters_of(made)) == list(TARGETS)
    assert not adapters_of(model)
    for target, dense in adapters_of(made).items():
        a, bound = np.asarray(dense.lora_a), (64 if target == "feed_forward.output" else 32) ** -0.5
        assert np.abs(a).max() <= bound
        # That of a uniform distribution.
        np.testing.assert_allclose(a.std(), bound / 3**0.5, rtol=0.1)
    assert len({float(dense.lora_a[0, 0, 0]) for dense in adapters_of(made).values()}) == 6


@pytest.mark.parametrize(
    "name", [name if name in QUICK[:1] else pytest.param(name, marks=pytest.mark.slow) for name in LOGITS][3:]
)
def test_ten_steps_are_pefts(name, tmp_path):
    _, config, labels = setting(name)
    theirs = torch_model(name, config)
    model = from_torch(name, config, theirs.state_dict())
    ours = adapted(model, LoRA(rank=4, alpha=6, targets=("query", "value", "feed_forward.output")))
    save_adapter(ours, tmp_path / "start")
    theirs, inner = opened_by_peft(theirs, tmp_path / "start", is_trainable=True)
    before = functional(ours)[1]
    params, metrics = trained(ours, ADAM, batches(name, labels))
    losses = torch_trained(inner.train(), ADAM, batches(name, cast(labels)))
    np.testing.assert_allclose([each.loss for each in metrics], losses, rtol=0, atol=1e-5)
    quietly(theirs.save_pretrained, str(tmp_path / "end"))
    assert_close(params, functional(load_adapter(model, tmp_path / "end"))[1])
    moved = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), before, params)
    for path, distance in jax.tree.leaves_with_path(moved):
        learns = path[-1].key in ("lora_a", "lora_b") or path[0].key in ("classifier", "qa_outputs")
        assert (distance > 0) == learns, jax.tree_util.keystr(path)


# What is adapted, and what PEFT calls it.
BOTH = {
    "classifier": (CLASSIFIER, ("query", "value"), ["query", "value"], "SEQ_CLS"),
    "spans": ("BertForQuestionAnswering", tuple(TARGETS), [*TARGETS.values()], "QUESTION_ANS"),
    "bare": ("BertModel", ("feed_forward.output",), r".*\.layer\.\d+\.output\.dense", "FEATURE_EXTRACTION"),
    "tags": ("BertForTokenClassification", ("attention.output", "feed_forward.output"), ["output.dense"], "TOKEN_CLS"),
    "masked": ("BertForMaskedLM", ("key", "intermediate"), ["key", "intermediate.dense"], None),
    "pairs": ("BertForNextSentencePrediction", ("key",), ["self.key"], None),
}
every_case = pytest.mark.parametrize(
    "case", [case if case in ("classifier", "bare") else pytest.param(case, marks=pytest.mark.slow) for case in BOTH]
)


def pair(case, folder):
    """A model of transformers, and ours."""
    name = BOTH[case][0]
    theirs = torch_model(name, TINY if name == "BertModel" else setting(name)[1])
    quietly(theirs.save_pretrained, folder)
    return theirs, from_pretrained(folder)


@every_case
def test_peft_opens_what_is_saved_here(case, tmp_path):
    name, targets, _, task = BOTH[case]
    theirs, ours = pair(case, tmp_path / "base")
    expected = by_torch(theirs, name)
    ours = adapted(ours, LoRA(rank=3, alpha=5, targets=targets))
    save_adapter(ours, tmp_path / "adapter", base=tmp_path / "base")
    found = results(ours, name)
    theirs, inner = opened_by_peft(theirs, tmp_path / "adapter")
    np.testing.assert_allclose(found, by_torch(inner, name), rtol=0, atol=1e-5)
    assert np.abs(np.subtract(found, expected)).max() > 0.1
    # What PEFT would have written, but for fields that only some of its versions have.
    quietly(theirs.save_pretrained, str(tmp_path / "again"))
    written, again = (json.loads((tmp_path / each / CONFIG).read_text()) for each in ("adapter", "again"))
    for config in (written, again):
        for field in ("modules_to_save", "target_modules"):
            if isinstance(config[field], list):
                config[field] = set(config[field])
    assert written == {field: again[field] for field in written}
    assert (written["task_type"], written["base_model_name_or_path"]) == (task, str(tmp_path / "base"))
    ours, theirs = (load_file(tmp_path / each / WEIGHTS) for each in ("adapter", "again"))
    assert ours.keys() == theirs.keys()
    assert all(np.array_equal(ours[key], theirs[key]) for key in ours)


@every_case
@pytest.mark.parametrize("stabilised", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_what_peft_saved_is_opened_here(case, stabilised, tmp_path):
    name, targets, modules, task = BOTH[case]
    theirs, ours = pair(case, tmp_path / "base")
    heads = {"BertForNextSentencePrediction": ["seq_relationship"]}.get(name)
    options = {"task_type": task, "target_modules": modules, "modules_to_save": heads, "lora_dropout": 0.1}
    theirs = made_by_peft(theirs, tmp_path / "adapter", r=3, lora_alpha=5, use_rslora=stabilised, **options)
    before = functional(ours)[1]
    found = load_adapter(ours, tmp_path / "adapter")
    assert tuple(adapters_of(found)) == targets
    np.testing.assert_allclose(results(found, name), by_torch(theirs, name), rtol=0, atol=1e-5)
    assert_close(functional(ours)[1], before, atol=0)


def test_merged_is_what_was_not_merged(tmp_path):
    model = adapted(plain())
    merged = merge_lora(model)
    expected = results(model, CLASSIFIER)
    np.testing.assert_allclose(results(merged, CLASSIFIER), expected, rtol=0, atol=1e-5)
    # A model like any other, of which nothing is compiled anew.
    assert jax.tree.structure(merged) == jax.tree.structure(plain())
    with pytest.raises(CheckpointError, match=r"merge them first .*save_adapter"):
        model.save_pretrained(tmp_path / "model")
    assert not list(tmp_path.iterdir())
    merged.save_pretrained(tmp_path / "model")
    np.testing.assert_array_equal(results(from_pretrained(tmp_path / "model"), CLASSIFIER), results(merged, CLASSIFIER))


def test_short_parameters_are_not_rounded_when_merged():
    model = plain(dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)
    made = adapted(model)
    assert {dense.lora_a.dtype.name for dense in adapters_of(made).values()} == {"float32"}
    np.testing.assert_allclose(results(add_lora(model, LoRA()), CLASSIFIER), results(model, CLASSIFIER), atol=1e-6)
    dense = adapters_of(made)["intermediate"]
    merged = merge_lora(made)
    assert {array.dtype.name for array in jax.tree.leaves(functional(merged)[1])} == {"float32"}
    arrays = [np.asarray(each, np.float64) for each in (dense.kernel, dense.lora_a, dense.lora_b)]
    expected = arrays[0] + 5 / 3 * arrays[1] @ arrays[2]
    kernel = merged.bert.encoder.layers.feed_forward.intermediate.kernel
    np.testing.assert_allclose(kernel, expected, rtol=0, atol=1e-6)


def test_adapters_of_a_sentence_model_are_those_of_its_encoder(tmp_path):
    dense = Dense(32, 8, rngs=nnx.Rngs(0))
    model = SentenceModel(random_model(TINY, add_pooling_layer=False), modules=(dense,))
    made = adapted(model, LoRA(targets="query"))
    save_adapter(made, tmp_path / "adapter")
    loaded = load_adapter(random_model(TINY), tmp_path / "adapter")
    assert_close(functional(loaded)[1]["encoder"], functional(made)[1]["bert"]["encoder"], atol=0)
    np.testing.assert_array_equal(load_adapter(model, tmp_path / "adapter")(inputs_of("")[0]), made(inputs_of("")[0]))
    optimizer = AdamW().build(made, 3)
    learns = [jax.tree_util.keystr(path) for path, learns in jax.tree.leaves_with_path(optimizer.learns) if learns]
    assert learns == [f"['bert']['encoder']['layers']['attention']['query']['lora_{each}']" for each in "ab"]


def test_what_is_frozen_has_no_state_and_adapters_decay():
    made = adapted(plain(), LoRA(rank=2))
    settings = AdamW(learning_rate=0.1, weight_decay=0.5, schedule="constant")
    state = new_state(made, settings.build(made, 3))
    learnt = jax.tree.leaves(state.learnt)
    assert sum(array.size for array in learnt) == 2 * 2 * (2 * 2 * 32) + 3 * 32 + 3
    # Two moments, and two counts of steps.
    assert sum(array.size for array in jax.tree.leaves(state.optimizer)) == 2 * sum(each.size for each in learnt) + 2
    ignored = {"labels": np.full(4, -100)}
    before = functional(made)[1]
    after = trained(made, settings, batches(CLASSIFIER, ignored, 1))[0]
    for (path, new), old in zip(jax.tree.leaves_with_path(after), jax.tree.leaves(before), strict=True):
        adapter = path[-1].key in ("lora_a", "lora_b")
        factor = 0.95 if adapter or (path[0].key, path[-1].key) == ("classifier", "kernel") else 1.0
        np.testing.assert_allclose(new, old * factor, rtol=1e-6, err_msg=jax.tree_util.keystr(path))


def test_freezing_goes_on_top():
    made = add_lora(plain(), LoRA())
    batch = next(batches(CLASSIFIER, {"labels": CLASSES}))
    settings = AdamW(learning_rate=1e-2, freeze=("classifier",), freeze_layers=1)
    before = functional(made)[1]
    moved = jax.tree.map(lambda a, b: np.abs(np.asarray(a - b)), trained(made, settings, [batch])[0], before)
    assert not any(each.any() for each in jax.tree.leaves(moved["classifier"]))
    b = moved["bert"]["encoder"]["layers"]["attention"]["value"]["lora_b"]
    assert not b[0].any()
    assert b[1].any()


def test_the_rank_is_never_divided():
    mesh = Mesh(np.array(jax.devices()).reshape(2, 4), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    params = functional(add_lora(plain(), LoRA(rank=8, targets=tuple(TARGETS))))[1]
    layers = shardings_of(params, mesh, FULLY_SHARDED)["bert"]["encoder"]["layers"]
    for block in (layers["attention"], layers["feed_forward"]):
        for name, dense in block.items():
            _, into, out = dense["kernel"].spec
            assert {into, out} == {"data", "model"}, name
            assert dense["lora_a"].spec == PartitionSpec(None, into, None), name
            assert dense["lora_b"].spec == PartitionSpec(None, None, out), name


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        ("query", ("query",)),
        (["value", "attention.self.query", "query"], ("query", "value")),
        (["output.dense"], ("attention.output", "feed_forward.output")),
        (["attention.output.dense", "intermediate.dense"], ("attention.output", "intermediate")),
    ],
)
def test_targets_have_pefts_names_too(names, expected):
    assert LoRA(targets=names) == LoRA(targets=expected)
    assert LoRA(targets=names).targets == expected


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "rank is 0, expected a positive integer"),
        ({"alpha": float("nan")}, "alpha is nan, expected a number above 0"),
        ({"targets": ()}, "targets is empty, expected some of query, key, value, attention.output"),
        ({"targets": ("query", "q_proj")}, "targets has 'q_proj', expected some of query"),
        ({"targets": "dense"}, "targets has 'dense'"),
        ({"targets": 5}, "targets has 5"),
    ],
)
def test_settings_that_make_no_sense_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        LoRA(**options)


def test_models_that_have_no_place_for_adapters_are_refused(tmp_path):
    model = add_lora(plain(), LoRA())
    for call in (lambda: add_lora(model, LoRA()), lambda: load_adapter(model, tmp_path)):
        with pytest.raises(InputError, match="has adapters already"):
            call()
    with pytest.raises(InputError, match="int8 is for inference and takes no adapters"):
        add_lora(nnx.eval_shape(lambda: BertModel(TINY, dtype="int8", rngs=nnx.Rngs(0))), LoRA())
    with pytest.raises(InputError, match="a Linear has 0 encoders"):
        add_lora(nnx.Linear(2, 2, rngs=nnx.Rngs(0)), LoRA())
    with pytest.raises(InputError, match="rngs="):
        add_lora(plain(), LoRA(), rngs=-1)
    with pytest.raises(InputError, match="no adapters to merge"):
        merge_lora(plain())
    with pytest.raises(InputError, match="no adapters to save"):
        save_adapter(plain(), tmp_path / "adapter")
    with pytest.raises(InputError, match="no layout for adapters of a BertEncoder"):
        save_adapter(model.bert.encoder, tmp_path / "adapter")
    model.bert.encoder.layers.attention.query.lora_b[0, 0, 0] = jnp.nan
    with pytest.raises(CheckpointError, match="query/lora_b holds NaN"):
        save_adapter(model, tmp_path / "adapter")
    assert not list(tmp_path.iterdir())


@pytest.fixture
def folder(tmp_path):
    """An adapter's folder."""
    save_adapter(adapted(plain(), LoRA(rank=2, targets=("query", "key"))), tmp_path / "adapter")
    return tmp_path / "adapter"


def configure(folder, **fields):
    path = folder / CONFIG
    config = json.loads(path.read_text()) | fields
    path.write_text(json.dumps({field: value for field, value in config.items() if value != "absent"}))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"peft_type": "IA3"}, "peft_type='IA3': not supported; expected LoRA without variants"),
        ({"peft_type": "absent"}, "peft_type=None: not supported"),
        ({"use_dora": True, "bias": "all"}, "bias='all', use_dora=True: not supported"),
        ({"rank_pattern": {"key": 4}, "alpha_pattern": {"key": 4}}, "alpha_pattern=.*, rank_pattern=.*: not supported"),
        ({"layers_to_transform": [0]}, "layers_to_transform=.0.: not supported"),
        ({"some_new_option": 0.5}, "some_new_option=0.5: not supported"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa': not supported"),
        ({"task_type": "TOKEN_CLS"}, "task_type='TOKEN_CLS': not supported; .* for the task SEQ_CLS"),
        ({"r": "absent"}, "r is missing"),
        ({"r": 0}, "r is 0, expected"),
        ({"lora_alpha": "much"}, "lora_alpha is 'much', expected a number above 0"),
        ({"target_modules": {}}, "target_modules is .*, expected a list of names"),
        ({"use_rslora": "yes"}, "use_rslora is 'yes', expected bool"),
    ],
)
def test_configurations_that_ask_for_more_are_refused(folder, fields, message):
    configure(folder, **fields)
    with pytest.raises(ConfigError, match=rf"adapter_config.json: .*{message}"):
        load_adapter(plain(), folder)


@pytest.mark.parametrize("value", ["of a string", 3, float("inf"), [], None])
@pytest.mark.parametrize("field", ["r", "lora_alpha", "target_modules", "modules_to_save", "init_lora_weights", "bias"])
def test_no_field_of_a_configuration_breaks_the_reader(folder, field, value):
    """It reads it, or says with an error of its own what is wrong."""
    configure(folder, **{field: value})
    try:
        load_adapter(plain(), folder)
    except (ConfigError, CheckpointError):
        return
    assert (field, value) in [
        ("target_modules", "of a string"),
        ("target_modules", []),
        ("target_modules", None),
        ("lora_alpha", 3),
        ("init_lora_weights", None),
        ("bias", None),
    ]


def test_every_tensor_is_used_or_named(folder):
    tensors = load_file(folder / WEIGHTS)
    stem = "base_model.model.bert.encoder.layer"
    del tensors[f"{stem}.1.attention.self.query.lora_A.weight"], tensors["base_model.model.classifier.bias"]
    tensors[f"{stem}.0.attention.self.key.lora_B.weight"] = np.zeros((32, 3), np.float32)
    tensors["base_model.model.bert.pooler.dense.lora_A.weight"] = np.zeros((2, 32), np.float32)
    save_file(tensors, folder / WEIGHTS)
    configure(folder, target_modules=["query", "key", "value"])
    with pytest.raises(CheckpointError) as caught:
        load_adapter(plain(), folder)
    for problem in (
        f"{stem}.1.attention.self.query.lora_A.weight: missing",
        "base_model.model.classifier.bias: missing",
        f"{stem}.0.attention.self.value.lora_A.weight: missing",
        f"{stem}.0.attention.self.key.lora_B.weight: shape [32, 3], the config asks for [32, 2]",
        "base_model.model.bert.pooler.dense.lora_A.weight: unexpected tensor",
    ):
        assert problem in str(caught.value)


def test_adapters_of_another_model_are_refused(folder):
    with pytest.raises(ConfigError, match=r"task_type='SEQ_CLS': not supported; .* task FEATURE_EXTRACTION"):
        load_adapter(random_model(TINY), folder)
    configure(folder, task_type=None)
    with pytest.raises(
        CheckpointError, match=r"encoder.layer.0.attention.self.query.lora_A.weight: missing.*unexpected"
    ):
        load_adapter(random_model(TINY), folder)


def test_only_an_adapters_folder_is_opened_and_replaced(folder, tmp_path):
    made = adapted(plain(), LoRA(rank=1, alpha=2.5))
    with pytest.raises(SourceError, match="already exists"):
        save_adapter(made, folder)
    save_adapter(made, folder, force=True)
    assert sorted(path.name for path in folder.iterdir()) == [CONFIG, WEIGHTS]
    assert_close(functional(load_adapter(plain(), folder))[1], functional(made)[1], atol=0)
    assert json.loads((folder / CONFIG).read_text())["lora_alpha"] == 2.5
    (folder / "notes.txt").write_text("precious")
    with pytest.raises(SourceError, match="will not be replaced"):
        save_adapter(made, folder, force=True)
    (folder / WEIGHTS).unlink()
    with pytest.raises(SourceError, match=r"not a PEFT adapter's folder, it has no adapter_model.safetensors or"):
        load_adapter(plain(), folder)
    with pytest.raises(SourceError, match=r"it has no adapter_config.json"):
        load_adapter(plain(), tmp_path / "nothing")
