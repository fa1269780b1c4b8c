"""Steps of training: those of PyTorch, whatever of a model learns, however the batch is cut."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracle import require
from test_heads import TINY, from_torch, inputs_of, random_heads, torch_model

from bertjax import functional
from bertjax.errors import ConfigError
from bertjax.training import AdamW, new_state, train_step

pytestmark = pytest.mark.usefixtures("little_optimisation")

STEPS = 10
CLASSES, TAGS = np.array([2, 0, 1, 1]), np.random.default_rng(2).integers(0, 3, (4, 9))
SPANS = {"start_positions": np.array([1, 3, 0, 2]), "end_positions": np.array([4, 3, 0, 8])}
WORDS = np.random.default_rng(3).integers(0, TINY.vocab_size, (4, 9))
WORDS[:, ::2] = TAGS[:, 1::4] = -100
# What every model is trained for, and how the configuration differs.
LABELS = {
    "BertForSequenceClassification": ({"labels": CLASSES}, {}),
    "multi-label": ({"labels": (CLASSES[:, None] == [[0, 1, 2]]).astype(np.float32)}, {}),
    "regression": ({"labels": CLASSES * 0.7 - 0.3}, {"num_labels": 1}),
    "BertForTokenClassification": ({"labels": TAGS}, {}),
    "BertForQuestionAnswering": (SPANS, {"num_labels": 2}),  # transformers takes as many as there are labels
    "BertForMaskedLM": ({"labels": WORDS}, {}),
    "BertForNextSentencePrediction": ({"labels": CLASSES % 2}, {}),
    "BertForPreTraining": ({"labels": WORDS, "next_sentence_label": CLASSES % 2}, {}),
    "BertForMultipleChoice": ({"labels": CLASSES[:2] % 2}, {}),
}
QUICK = ("BertForSequenceClassification", "BertForMaskedLM")
DROPOUTS = ("hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout")
# BERT's own rate and eps, of its pre-training. Some gradients are zero but for rounding (a softmax does not see the
# bias of the keys), and Adam divides them by their own size; an eps above the rounding keeps that noise out of it.
ADAM = AdamW(learning_rate=1e-4, warmup_steps=3, weight_decay=0.1, clip_norm=0.5, eps=1e-6)


def setting(case):
    """The name of the model, its configuration without dropout, the labels."""
    labels, more = LABELS[case]
    name = case if case.startswith("Bert") else "BertForSequenceClassification"
    fields = TINY.to_hf() | dict.fromkeys(DROPOUTS, 0.0) | more
    if more:
        fields = {key: value for key, value in fields.items() if key not in ("id2label", "label2id")}
    return name, type(TINY).from_hf(fields), labels


def batches(name, labels, count=STEPS):
    """Batches of different words and one set of labels."""
    for seed in range(count):
        names = ("input_ids", "attention_mask", "token_type_ids")
        yield dict(zip(names, inputs_of(name, seed), strict=True)) | labels


def trained(model, settings, made, total=STEPS, **options):
    """The parameters after all batches, and the metrics of each step."""
    optimizer = settings.build(model, total)
    state, step, metrics = new_state(model, optimizer), train_step(model, optimizer, **options), []
    for batch in made:
        state, found = step(state, jax.tree.map(jnp.asarray, batch))
        metrics.append(found)
    return state.params, metrics


def torch_trained(model, settings, made):
    """The losses of torch's own training by the same recipe; the model is changed."""
    torch, transformers = require("torch"), require("transformers")
    groups = [{"params": [], "weight_decay": settings.weight_decay}, {"params": [], "weight_decay": 0.0}]
    for name, parameter in model.named_parameters():
        groups[name.endswith("bias") or "LayerNorm" in name]["params"].append(parameter)
    options = {"lr": settings.learning_rate, "betas": (settings.b1, settings.b2), "eps": settings.eps}
    optimizer = torch.optim.AdamW(groups, **options)
    schedule = transformers.get_scheduler(settings.schedule, optimizer, settings.warmup_steps, STEPS)
    losses = []
    for batch in made:
        loss = model(**{key: torch.tensor(value) for key, value in batch.items()}).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), settings.clip_norm)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    return losses


def assert_close(found, expected, atol=1e-5):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for (path, ours), theirs in zip(jax.tree.leaves_with_path(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=atol, err_msg=jax.tree_util.keystr(path))


@pytest.mark.parametrize(
    "case", [case if case in QUICK else pytest.param(case, marks=pytest.mark.slow) for case in LABELS]
)
def test_ten_steps_are_torchs(case):
    name, config, labels = setting(case)
    theirs = torch_model(name, config).train()
    ours = from_torch(name, config, theirs.state_dict())
    before = functional(ours)[1]
    params, metrics = trained(ours, ADAM, batches(name, labels))
    losses = torch_trained(theirs, ADAM, batches(name, cast(labels)))
    np.testing.assert_allclose([each.loss for each in metrics], losses, rtol=0, atol=1e-5)
    assert_close(params, functional(from_torch(name, config, theirs.state_dict()))[1])
    moved = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), before, params)
    assert sum(np.array(jax.tree.leaves(moved)) > 1e-4) > 0.8 * len(jax.tree.leaves(moved))


def cast(labels):
    """Labels with the dtypes that torch wants."""
    return {key: value.astype(np.float32) if value.dtype.kind == "f" else value for key, value in labels.items()}


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant"])
@pytest.mark.parametrize("warmup", [0, 4, 0.25])
def test_learning_rates_are_those_of_transformers(schedule, warmup):
    torch, transformers = require("torch"), require("transformers")
    steps = 4 if warmup else 0
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.5)
    name = "constant_with_warmup" if schedule == "constant" else schedule
    expected = transformers.get_scheduler(name, optimizer, steps, 16)
    rates = AdamW(learning_rate=0.5, schedule=schedule, warmup_steps=warmup).rates(16)
    for step in range(17):
        np.testing.assert_allclose(rates(step), expected.get_last_lr()[0], rtol=1e-6, atol=1e-8)
        optimizer.step()
        expected.step()


def plain(name="BertForSequenceClassification"):
    """A model without dropout."""
    return random_heads(name, setting(name)[1])


@functools.cache
def in_parts(case, parts):
    """The loss and the parameters after two steps, with batches of twelve rows in so many parts."""
    name, config, labels = setting(case)
    model = random_heads(name, config)
    rows = jax.tree.map(lambda *arrays: np.concatenate(arrays), *batches(name, labels, 6))
    if parts > 1:
        rows = jax.tree.map(lambda array: array.reshape(parts, -1, *array.shape[1:]), rows)
    # Parts with different numbers of labels, and one without any.
    for name in rows.keys() & {"labels", "next_sentence_label"}:
        rows[name] = rows[name].copy()
        rows[name].reshape(6, -1)[0] = -100
        rows[name].reshape(6, -1)[1, :3] = -100
    params, metrics = trained(model, ADAM, [rows, rows], accumulate=parts)
    return params, [float(each.loss) for each in metrics]


@pytest.mark.slow
@pytest.mark.parametrize("case", ["BertForTokenClassification", "BertForPreTraining", "BertForQuestionAnswering"])
def test_parts_of_a_batch_learn_what_the_batch_does(case):
    expected, losses = in_parts(case, 1)
    found, ours = in_parts(case, 3)
    np.testing.assert_allclose(ours, losses, rtol=1e-5)
    assert_close(found, expected, atol=2e-5)
    assert np.isfinite(losses).all()


def moved(model, settings):
    """By how much the parameters have changed after three steps."""
    before = functional(model)[1]
    made = batches("BertForSequenceClassification", {"labels": CLASSES}, 3)
    return jax.tree.map(lambda a, b: np.abs(np.asarray(a - b)), trained(model, settings, made)[0], before)


def test_what_is_frozen_stays_and_the_rest_moves():
    made = moved(plain(), AdamW(learning_rate=1e-2, freeze=("embeddings", "pooler"), freeze_layers=1))
    for part in (made["bert"]["embeddings"], made["bert"]["pooler"]):
        assert all(not array.any() for array in jax.tree.leaves(part))
    for array in jax.tree.leaves(made["bert"]["encoder"]):
        assert not array[0].any()
        assert array[1].any()
    assert all(array.any() for array in jax.tree.leaves(made["classifier"]))


@pytest.mark.slow
def test_what_is_frozen_does_not_count_in_the_norm_nor_take_memory():
    model = plain()
    batch = next(batches("BertForSequenceClassification", {"labels": CLASSES}))
    norms, sizes = [], []
    for settings in (AdamW(), AdamW(freeze=("embeddings",), freeze_layers=1), AdamW(freeze=("embeddings", "encoder"))):
        optimizer = settings.build(model, 3)
        state = new_state(model, optimizer)
        sizes.append(sum(leaf.size for leaf in jax.tree.leaves(state.optimizer)))
        norms.append(float(train_step(model, optimizer)(state, batch)[1].gradient_norm))
    assert norms[0] > norms[1] > norms[2] > 0
    assert sizes[0] > sizes[1] > 10 * sizes[2]


def test_layers_learn_at_rates_that_decay_downwards():
    """With Adam and no decay, a first step moves every number that has a gradient by the learning rate."""
    settings = AdamW(learning_rate=1e-2, layer_decay=0.5, weight_decay=0.0, schedule="constant", clip_norm=None)
    model = plain()
    before = functional(model)[1]
    made = batches("BertForSequenceClassification", {"labels": CLASSES}, 1)
    after = trained(model, settings, made)[0]
    step = jax.tree.map(lambda a, b: np.abs(np.asarray(a - b)), after, before)
    assert_rate = functools.partial(np.testing.assert_allclose, rtol=1e-2)
    assert_rate(np.median(step["classifier"]["kernel"]), 1e-2)
    assert_rate(np.median(step["bert"]["pooler"]["dense"]["kernel"]), 1e-2)
    kernel = step["bert"]["encoder"]["layers"]["feed_forward"]["output"]["kernel"]
    assert_rate(np.median(kernel[1]), 5e-3)
    assert_rate(np.median(kernel[0]), 2.5e-3)
    assert_rate(np.median(step["bert"]["embeddings"]["token_type_embeddings"]["embedding"]), 1.25e-3)


def test_biases_and_layer_norms_do_not_decay():
    """All labels are ignored, so that there is no gradient, and what changes has decayed."""
    settings = AdamW(learning_rate=0.1, weight_decay=0.5, schedule="constant")
    model, ignored = plain(), {"labels": np.full(4, -100)}
    before = functional(model)[1]
    after, [metrics] = trained(model, settings, batches("BertForSequenceClassification", ignored, 1))
    assert (metrics.loss, metrics.gradient_norm) == (0, 0)
    for (path, new), old in zip(jax.tree.leaves_with_path(after), jax.tree.leaves(before), strict=True):
        factor = 1.0 if path[-1].key in ("bias", "scale") else 0.95
        np.testing.assert_allclose(new, old * factor, rtol=1e-6, err_msg=jax.tree_util.keystr(path))


def test_dropout_is_another_at_each_step_and_the_same_for_a_seed():
    model = random_heads("BertForSequenceClassification")
    batch = next(batches("BertForSequenceClassification", {"labels": CLASSES}))
    optimizer = AdamW(learning_rate=0.0).build(model, 3)
    step = train_step(model, optimizer)

    def losses(seed):
        state, found = new_state(model, optimizer, seed=seed), []
        for _ in range(3):
            state, metrics = step(state, batch)
            found.append(float(metrics.loss))
        return found

    first = losses(0)
    assert len(set(first)) == 3
    assert losses(0) == first
    assert losses(1) != first


@pytest.mark.slow
def test_recomputing_activations_changes_nothing():
    name, config, labels = setting("BertForTokenClassification")
    made = list(batches(name, labels, 2))
    expected = trained(random_heads(name, config), ADAM, made)
    found = trained(random_heads(name, config, remat=True), ADAM, made)
    assert_close(found[0], expected[0], atol=1e-6)


def test_a_trained_model_is_given_its_parameters():
    model = plain()
    optimizer = AdamW().build(model, 3)
    state = new_state(model, optimizer)
    batch = next(batches("BertForSequenceClassification", {"labels": CLASSES}))
    step = train_step(model, optimizer)
    before = model(**batch).loss
    state, metrics = step(state, batch)
    np.testing.assert_allclose(metrics.loss, before, rtol=1e-6)
    state.update(model)
    _, metrics = step(state, batch)
    np.testing.assert_allclose(metrics.loss, model(**batch).loss, rtol=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"learning_rate": -1}, "learning_rate is -1, expected a number of 0 or more"),
        ({"learning_rate": "fast"}, "learning_rate is 'fast', expected a number of 0 or more"),
        ({"b2": 1.0}, "b2 is 1.0, expected a number from 0 to below 1"),
        ({"warmup_steps": 1.5}, "warmup_steps is 1.5, expected a number of steps, or a part of all below 1"),
        ({"warmup_steps": -1}, "warmup_steps is -1, expected an integer of at least 0"),
        ({"layer_decay": 0}, "layer_decay is 0, expected a number above 0, at most 1"),
        ({"clip_norm": 0.0}, "clip_norm is 0.0, expected a number above 0, or None"),
        ({"schedule": "step"}, "schedule is 'step', expected one of 'linear', 'cosine', 'constant'"),
        ({"freeze": ("head",)}, "freeze: the model has no 'head', only classifier, embeddings, encoder, pooler"),
        ({"freeze_layers": 3}, "freeze_layers is 3, and the model has 2"),
        ({"freeze": ("embeddings", "encoder", "pooler", "classifier")}, "everything is frozen"),
    ],
)
def test_settings_that_make_no_sense_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        AdamW(**options).build(plain(), 10)
