"""Checkpoints with heads, from every format to every other and back, and what becomes of their variants.

The references are torch and transformers 5, where they are installed, and what transformers 4 saved and computed; see
tests/data/heads/generate.py.
"""

import errno
import functools
import itertools
import json
import os
import shutil

import flax.serialization
import jax
import ml_dtypes
import numpy as np
import pytest
from conftest import DATA, tolerance
from oracle import require
from safetensors.numpy import load_file, save_file

import bertjax
from bertjax import conversion, convert_checkpoint, functional, pretrained
from bertjax.convert import rules
from bertjax.convert.certificate import check
from bertjax.convert.files import INDEX_FILE, SINGLE_FILE
from bertjax.convert.layout import LAYOUT_FILE
from bertjax.convert.sources import open_weights
from bertjax.convert.targets import TARGETS
from bertjax.convert.tensors import TensorInfo
from bertjax.errors import CheckpointError, InputError, SourceError

GOLDEN = DATA / "heads"
PRETRAINING = GOLDEN / "pretraining"
FLAX, TENSORFLOW = DATA / "flax", DATA / "tf1"
#: By class, the folder in which transformers 4 saved one.
KINDS = {
    "BertModel": "model",
    "BertForPreTraining": "pretraining",
    "BertForMaskedLM": "masked_lm",
    "BertForNextSentencePrediction": "next_sentence",
    "BertForSequenceClassification": "sequence",
    "BertForMultipleChoice": "choice",
    "BertForTokenClassification": "token",
    "BertForQuestionAnswering": "question",
}
SIZES = {
    "vocab_size": 20,
    "hidden_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 12,
    "max_position_embeddings": 10,
}
LABELS = {"BertForSequenceClassification": 5, "BertForTokenClassification": 7}
DECODER, DECODER_BIAS = "cls.predictions.decoder.weight", "cls.predictions.decoder.bias"
BIAS, WORDS = "cls.predictions.bias", "bert.embeddings.word_embeddings.weight"
POOLER = ("bert.pooler.dense.weight", "bert.pooler.dense.bias")

every_kind = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture
def one_structure(monkeypatch):
    """For a test that reads one model many times: its structure is worked out once, which takes most of the time."""
    for module in (conversion, pretrained):
        monkeypatch.setattr(module, "abstract", remembering(module.abstract))


def remembering(function):
    """The function, which returns its first result ever after."""
    results = []

    def call(*arguments):
        if not results:
            results.append(function(*arguments))
        return results[0]

    return call


one_model = pytest.mark.usefixtures("one_structure")


def load(kind, path, **options):
    return getattr(bertjax, kind).from_pretrained(path, **options)


def read_config(folder):
    return json.loads((folder / "config.json").read_text())


def look(tensors):
    """Dtype, shape and bytes of PyTorch's tensors, by name."""
    view = require("torch").uint8
    return {
        name: (str(tensor.dtype), tuple(tensor.shape), tensor.contiguous().reshape(-1).view(view).numpy().tobytes())
        for name, tensor in tensors.items()
    }


def written(folder):
    """What the safetensors library finds in a folder."""
    torch_files = require("safetensors.torch")
    return look(
        {name: tensor for path in folder.glob("*.safetensors") for name, tensor in torch_files.load_file(path).items()}
    )


def parameters(model):
    """The parameter tree, as one dict."""
    return {path: np.asarray(array) for path, array in rules.flatten(functional(model)[1])}


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for path, array in found.items():
        assert (array.dtype, array.shape) == (expected[path].dtype, expected[path].shape), path
        assert array.tobytes() == expected[path].tobytes(), path


# What torch and transformers save, in every format.


@functools.cache
def torch_model(kind, dtype="float32", **options):
    """A model of transformers 5 with random weights."""
    torch, transformers = require("torch"), require("transformers")
    labels = {"num_labels": LABELS[kind]} if kind in LABELS else {}
    config = transformers.BertConfig(**SIZES, **labels, **options, architectures=[kind], attn_implementation="eager")
    model = getattr(transformers, kind)(config).eval()
    rng = np.random.default_rng(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            values = rng.normal(float(name.endswith("LayerNorm.weight")), 0.3, tuple(parameter.shape))
            parameter.copy_(torch.tensor(values))
        if kind in ("BertForMaskedLM", "BertForPreTraining"):
            # Where the decoder is not tied, version 5 gives it a bias of its own, and leaves the other without a use.
            model.cls.predictions.bias.copy_(model.cls.predictions.decoder.bias)
    return model.to(getattr(torch, dtype))


def save_safetensors(model, folder):
    model.save_pretrained(folder)
    return written(folder)


def state_dict(model):
    """The state dict with a buffer that versions of transformers up to 4.30 saved."""
    positions = require("torch").arange(SIZES["max_position_embeddings"])[None]
    prefix = "" if model is model.base_model else "bert."
    return {**model.state_dict(), f"{prefix}embeddings.position_ids": positions}


def save_pickle(model, folder, **options):
    state = state_dict(model)
    model.config.save_pretrained(folder)
    require("torch").save(state, folder / "pytorch_model.bin", **options)
    return look(state)


def save_pickled_shards(model, folder):
    state = state_dict(model)
    model.config.save_pretrained(folder)
    shards = {}
    for number, name in enumerate(state):
        shards.setdefault(f"pytorch_model-{1 + number % 3:05}-of-00003.bin", []).append(name)
    for file, names in shards.items():
        require("torch").save({name: state[name] for name in names}, folder / file)
    weight_map = {name: file for file, names in shards.items() for name in names}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return look(state)


SAVE = {
    "safetensors": save_safetensors,
    "zip": save_pickle,
    "legacy": functools.partial(save_pickle, _use_new_zipfile_serialization=False),
    "shards": save_pickled_shards,
}
DTYPES = ("float32", "float16", "bfloat16")
# Every class in every container, each in one dtype; the rest, and each format alone, takes a minute.
ESSENTIAL = [
    (kind, how, DTYPES[(row + column) % 3])
    for (row, kind), (column, how) in itertools.product(enumerate(KINDS), enumerate(SAVE))
]
REST = [case for case in itertools.product(KINDS, SAVE, DTYPES) if case not in ESSENTIAL]


def through(source, folder, formats):
    """Converts from one format to the next, and at last to safetensors; returns that folder."""
    for number, to in enumerate([*formats, "safetensors"]):
        convert_checkpoint(source, folder / f"{number}-{to}", to=to)
        source = folder / f"{number}-{to}"
    return source


@one_model
@pytest.mark.parametrize(
    ("kind", "how", "dtype"), [*ESSENTIAL, *(pytest.param(*case, marks=pytest.mark.slow) for case in REST)]
)
def test_what_torch_saves_comes_back_through_every_format(kind, how, dtype, tmp_path):
    expected = SAVE[how](torch_model(kind, dtype), tmp_path / "in")
    back = through(tmp_path / "in", tmp_path, ["msgpack", "orbax"])
    assert written(back) == expected
    assert (back / "config.json").read_bytes() == (tmp_path / "in" / "config.json").read_bytes()


@one_model
@pytest.mark.slow
@every_kind
@pytest.mark.parametrize("how", SAVE)
@pytest.mark.parametrize("to", TARGETS)
def test_what_torch_saves_comes_back_through_each_format(kind, how, to, tmp_path):
    expected = SAVE[how](torch_model(kind), tmp_path / "in")
    assert written(through(tmp_path / "in", tmp_path, [to])) == expected


def golden_pickle(folder):
    """The pickle, or the index of its shards, that transformers 4 saved."""
    return next(
        path for path in (folder / "pytorch_model.bin", folder / "pytorch_model.bin.index.json") if path.exists()
    )


GOLDENS = [*KINDS.values(), "untied"]


@one_model
@pytest.mark.parametrize("name", GOLDENS)
def test_what_transformers_4_saved_comes_back_through_every_format(name, tmp_path):
    folder, torch = GOLDEN / name, require("torch")
    assert written(through(folder, tmp_path / "safe", ["orbax", "msgpack"])) == written(folder)
    state = {}
    for path in folder.glob("*.bin"):
        state |= torch.load(path)
    assert written(through(golden_pickle(folder), tmp_path / "pickle", ["msgpack", "orbax"])) == look(state)
    if "cls.predictions.bias" in state:
        assert {DECODER, DECODER_BIAS} < state.keys(), "what repeats another tensor is there, and comes back"


SOURCES = {
    "safetensors": PRETRAINING,
    "pickle": PRETRAINING / "pytorch_model.bin",
    "pickled shards": GOLDEN / "masked_lm" / "pytorch_model.bin.index.json",
    "TensorFlow, pre-trained": TENSORFLOW / "pretrained",
    "TensorFlow, classifier": TENSORFLOW / "classifier",
    "FlaxBert": FLAX / "single",
    "FlaxBert in shards": FLAX / "sharded",
}


@pytest.mark.parametrize("to", TARGETS)
@pytest.mark.parametrize("source", SOURCES)
def test_every_format_goes_to_every_format(source, to, tmp_path):
    """By the names that transformers writes, because these can be compared whatever the source calls its tensors."""
    source = SOURCES[source]
    convert_checkpoint(source, tmp_path / "out", to=to)
    convert_checkpoint(tmp_path / "out", tmp_path / "back", standard_names=True)
    convert_checkpoint(source, tmp_path / "expected", standard_names=True)
    assert (tmp_path / "back" / SINGLE_FILE).read_bytes() == (tmp_path / "expected" / SINGLE_FILE).read_bytes()
    if source.is_relative_to(FLAX):
        assert_same(load_file(tmp_path / "back" / SINGLE_FILE), load_file(source / "expected.safetensors"))
    for folder in (tmp_path / "out", tmp_path / "back"):
        assert read_config(folder) == read_config(tmp_path / "expected")


# What is written is what the other libraries read.


def in_transformers(kind, folder):
    """Loads a folder in transformers 5, which must find every tensor and no other."""
    model, found = getattr(require("transformers"), kind).from_pretrained(
        folder, attn_implementation="eager", output_loading_info=True
    )
    assert not any(found[problem] for problem in ("missing_keys", "unexpected_keys", "mismatched_keys")), found
    return model.eval()


def inputs_of(kind):
    """What the logits of a golden checkpoint were computed from."""
    with np.load(GOLDEN / KINDS[kind] / "expected.npz") as file:
        return {name: file[name] for name in ("input_ids", "attention_mask", "token_type_ids")}


def torch_outputs(model, given):
    torch = require("torch")
    with torch.no_grad():
        output = model(**{name: torch.tensor(array) for name, array in given.items()})
    return {name: value.numpy() for name, value in output.items()}


@every_kind
@pytest.mark.parametrize("how", ["safetensors", "legacy"])
def test_what_is_written_loads_in_transformers_and_computes_the_same(kind, how, tmp_path):
    model = torch_model(kind)
    SAVE[how](model, tmp_path / "in")
    expected = torch_outputs(model, inputs_of(kind))
    out = through(tmp_path / "in", tmp_path, ["msgpack"])
    if how == "legacy":  # transformers calls a buffer that it no longer has unexpected
        convert_checkpoint(out, tmp_path / "standard", standard_names=True)
        out = tmp_path / "standard"
    found = torch_outputs(in_transformers(kind, out), inputs_of(kind))
    for name, value in expected.items():
        np.testing.assert_array_equal(found[name], value, err_msg=name)


@every_kind
@pytest.mark.parametrize("how", SAVE)
def test_standard_names_are_those_that_transformers_writes(kind, how, tmp_path):
    SAVE[how](torch_model(kind), tmp_path / "in")
    torch_model(kind).save_pretrained(tmp_path / "expected")
    convert_checkpoint(tmp_path / "in", tmp_path / "out", standard_names=True)
    assert (tmp_path / "out" / SINGLE_FILE).read_bytes() == (tmp_path / "expected" / SINGLE_FILE).read_bytes()


def test_the_file_of_flaxbert_comes_back_byte_for_byte(tmp_path):
    convert_checkpoint(FLAX / "single", tmp_path / "torch")
    convert_checkpoint(tmp_path / "torch", tmp_path / "flax", to="msgpack")
    name = "flax_model.msgpack"
    assert (tmp_path / "flax" / name).read_bytes() == (FLAX / "single" / name).read_bytes()


@every_kind
def test_flax_restores_what_is_written(kind, tmp_path):
    """By the names of FlaxBert, with PyTorch's numbers: kernels transposed, everything else as it is."""
    source = GOLDEN / KINDS[kind]
    tensors = load_file(source / SINGLE_FILE)
    convert_checkpoint(source, tmp_path / "out", to="msgpack")
    tree = flax.serialization.msgpack_restore((tmp_path / "out" / "flax_model.msgpack").read_bytes())
    found = {".".join(path): array for path, array in rules.flatten(tree)}
    expected = {}
    for name, array in tensors.items():
        module, _, leaf = name.rpartition(".")
        if leaf == "weight" and "LayerNorm" in module:
            leaf = "scale"
        elif leaf == "weight":
            leaf = "embedding" if "embedding" in module else "kernel"
        expected[f"{module}.{leaf}"] = array.T if leaf == "kernel" else array
    assert_same(found, expected)


@one_model
@every_kind
def test_orbax_restores_the_parameters_of_the_model(kind, tmp_path):
    import orbax.checkpoint as ocp

    source = GOLDEN / KINDS[kind]
    convert_checkpoint(source, tmp_path / "out", to="orbax")
    with ocp.StandardCheckpointer() as checkpointer:
        restored = checkpointer.restore(tmp_path / "out" / "params")
    assert_same(dict(rules.flatten(restored)), parameters(load(kind, source)))
    assert jax.tree.structure(restored) == jax.tree.structure(functional(load(kind, source))[1])


# What is read computes what torch does.


def assert_close(kind, model, given, expected):
    output = model(**given)
    if kind == "BertModel":
        fields = ("last_hidden_state", "pooler_output")
    else:
        fields = tuple(name for name in expected if name.endswith("logits"))
    assert fields
    for field in fields:
        # A head is one layer more, that of the masked language model two.
        bound = tolerance(expected[field], SIZES["num_hidden_layers"] + 2)
        np.testing.assert_allclose(getattr(output, field), expected[field], rtol=0, atol=bound, err_msg=field)


@one_model
@every_kind
def test_every_format_gives_the_logits_of_transformers_5(kind, tmp_path):
    reference = torch_model(kind)
    sources = [tmp_path / how for how in SAVE]
    for how, save in SAVE.items():
        save(reference, tmp_path / how)
    for to in ("msgpack", "orbax"):
        convert_checkpoint(tmp_path / "zip", tmp_path / to, to=to)
    first = load(kind, tmp_path / "safetensors")
    assert_close(kind, first, inputs_of(kind), torch_outputs(reference, inputs_of(kind)))
    for source in [*sources[1:], tmp_path / "msgpack", tmp_path / "orbax"]:
        assert_same(parameters(load(kind, source)), parameters(first))


@one_model
@pytest.mark.parametrize(("kind", "name"), [*KINDS.items(), ("BertForMaskedLM", "untied")])
def test_every_format_gives_the_logits_of_transformers_4(kind, name, tmp_path):
    source = GOLDEN / name
    with np.load(source / "expected.npz") as file:
        first, expected = load(kind, source), dict(file)
        assert_close(kind, first, {name: expected[name] for name in inputs_of(kind)}, expected)
    for to in ("msgpack", "orbax"):
        convert_checkpoint(source, tmp_path / to, to=to)
    for other in (golden_pickle(source), tmp_path / "msgpack", tmp_path / "orbax"):
        assert_same(parameters(load(kind, other)), parameters(first))


# Variants that are found in the wild: accepted, and given back as they were, or refused by name.


def pretraining():
    """The tensors of a BertForPreTraining, with none repeated."""
    return load_file(PRETRAINING / SINGLE_FILE)


def make_folder(folder, tensors, config=None, **fields):
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps((config or read_config(PRETRAINING)) | fields))
    save_file(tensors, folder / SINGLE_FILE, {"format": "pt"})
    return folder


def assert_refused(folder, message, kind="BertForPreTraining"):
    target = folder.with_name("refused")
    for read in (functools.partial(convert_checkpoint, target=target), functools.partial(load, kind)):
        with pytest.raises(CheckpointError, match=message):
            read(folder)
    assert not target.exists()


def assert_comes_back(folder, to="msgpack"):
    """Through a format that can't hold a checkpoint's spelling, and straight."""
    out = folder.with_name(f"{folder.name}-out")
    assert_same(load_file(through(folder, out, [to]) / SINGLE_FILE), load_file(folder / SINGLE_FILE))
    convert_checkpoint(folder, out / "straight")
    assert (out / "straight" / SINGLE_FILE).read_bytes() == (folder / SINGLE_FILE).read_bytes()


def legacy(name):
    return name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")


SPELLINGS = {
    "no prefix": lambda name: name.removeprefix("bert."),
    "DataParallel": "module.{}".format,
    "compiled": "_orig_mod.{}".format,
    "compiled, then distributed": "module._orig_mod.{}".format,
    "distributed, then compiled, then distributed": "module._orig_mod.module.{}".format,
    "the encoder compiled": lambda name: name.replace("bert.encoder.", "bert._orig_mod.encoder."),
    "a layer compiled": lambda name: name.replace("layer.0.attention", "layer.0._orig_mod.attention"),
    "a head compiled": lambda name: name.replace("cls.predictions.", "cls._orig_mod.predictions."),
    "model.": "model.{}".format,
    "sentence-transformers": "0.auto_model.{}".format,
    "gamma and beta": legacy,
    "gamma and beta, wrapped": lambda name: "module." + legacy(name),
}


@one_model
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_spelling_is_read_and_comes_back(spelling, tmp_path):
    tensors = {SPELLINGS[spelling](name): array for name, array in pretraining().items()}
    folder = make_folder(tmp_path / "in", tensors)
    assert tensors.keys() != pretraining().keys()
    assert_same(parameters(load("BertForPreTraining", folder)), parameters(load("BertForPreTraining", PRETRAINING)))
    assert_comes_back(folder)
    convert_checkpoint(folder, tmp_path / "standard", standard_names=True)
    assert (tmp_path / "standard" / SINGLE_FILE).read_bytes() == (PRETRAINING / SINGLE_FILE).read_bytes()


@pytest.mark.parametrize("name", [WORDS, BIAS, "bert.encoder.layer.1.output.dense.bias"])
@pytest.mark.parametrize("again", ["module.{}", "_orig_mod.module.{}"])
def test_one_name_twice_without_its_wrappers_is_refused(name, again, tmp_path):
    tensors = pretraining()
    folder = make_folder(tmp_path / "in", tensors | {again.format(name): tensors[name]})
    both = {name, again.format(name)}
    with pytest.raises(CheckpointError, match="without their wrappers' names") as caught:
        load("BertForPreTraining", folder)
    assert all(each in str(caught.value) for each in both)
    assert_refused(folder, "remove one of each two")


@one_model
def test_layer_norm_spelt_both_ways_is_refused(tmp_path):
    for number, old in enumerate(("bert.embeddings.LayerNorm.weight", "cls.predictions.transform.LayerNorm.bias")):
        tensors = {legacy(name) if name == old else name: array for name, array in pretraining().items()}
        assert_refused(make_folder(tmp_path / f"renamed{number}" / "in", tensors), f"both ways.*{legacy(old)}")
        tensors[old] = tensors[legacy(old)]
        assert_refused(make_folder(tmp_path / f"added{number}" / "in", tensors), f"both ways.*{legacy(old)}")


def test_one_of_two_towers_is_chosen_with_its_heads(tmp_path):
    tensors = pretraining()
    towers = {f"query.{name}": array for name, array in tensors.items()}
    towers |= {f"passage.{name}": array + 1 for name, array in tensors.items()}
    folder = make_folder(tmp_path / "in", towers)
    assert_refused(folder, r"2 encoders in one file, under '(passage|query)\.bert\.'.*choose one with prefix=")
    query = load("BertForPreTraining", folder, prefix="query.bert.")
    assert_same(parameters(query), parameters(load("BertForPreTraining", PRETRAINING)))
    convert_checkpoint(folder, tmp_path / "query", prefix="query.bert.", standard_names=True)
    assert (tmp_path / "query" / SINGLE_FILE).read_bytes() == (PRETRAINING / SINGLE_FILE).read_bytes()


BUFFERS = {
    "positions": {"bert.embeddings.position_ids": np.arange(10)[None]},
    "types": {"bert.embeddings.token_type_ids": np.zeros((1, 10), np.int64)},
    "positions in int32": {"bert.embeddings.position_ids": np.arange(10, dtype=np.int32)[None]},
}


@one_model
@pytest.mark.parametrize("buffers", BUFFERS)
def test_buffers_are_kept_aside_and_come_back(buffers, tmp_path):
    folder = make_folder(tmp_path / "in", pretraining() | BUFFERS[buffers])
    assert_comes_back(folder)
    for name, array in BUFFERS[buffers].items():
        other = make_folder(tmp_path / "other" / "in", pretraining() | {name: array + 1})
        assert_refused(other, f"{name}: expected")


# The decoder of the masked language model, and what it is tied to.


def with_decoder(**changed):
    """The tensors as a pickle of transformers 4 holds them, some of them changed."""
    tensors = pretraining()
    repeated = {DECODER: tensors[WORDS], DECODER_BIAS: tensors[BIAS]}
    return tensors | repeated | changed


@one_model
def test_tied_tensors_may_be_absent_or_equal(tmp_path):
    plain = parameters(load("BertForPreTraining", PRETRAINING))
    everything = with_decoder()
    for number, absent in enumerate(({DECODER}, {DECODER_BIAS}, {BIAS}, {DECODER, BIAS}, set())):
        tensors = {name: array for name, array in everything.items() if name not in absent}
        folder = make_folder(tmp_path / f"{number}", tensors)
        assert_same(parameters(load("BertForPreTraining", folder)), plain)
        assert_comes_back(folder)


@one_model
def test_tied_tensors_that_differ_are_refused(tmp_path):
    tensors = pretraining()
    weight = make_folder(tmp_path / "weight" / "in", with_decoder(**{DECODER: tensors[WORDS] + 1}))
    assert_refused(weight, f"{DECODER}: differs from {WORDS}; the config ties the two.*untie=True")
    bias = make_folder(tmp_path / "bias" / "in", with_decoder(**{DECODER_BIAS: tensors[BIAS] + 1}))
    assert_refused(bias, f"{DECODER_BIAS}: differs from {BIAS}; one of the two is wrong")
    narrower = make_folder(tmp_path / "narrower" / "in", with_decoder(**{DECODER: tensors[WORDS].astype(np.float16)}))
    assert_refused(narrower, f"{DECODER}: differs from {WORDS}")


def test_no_bias_at_all_is_refused(tmp_path):
    tensors = {name: array for name, array in with_decoder().items() if name not in (BIAS, DECODER_BIAS)}
    assert_refused(make_folder(tmp_path / "in", tensors), f"{BIAS}: missing")


def test_an_untied_decoder_must_be_there(tmp_path):
    folder = make_folder(tmp_path / "in", pretraining(), tie_word_embeddings=False)
    assert_refused(folder, f"{DECODER}: missing")
    other = make_folder(tmp_path / "other", pretraining())
    for read in (
        functools.partial(convert_checkpoint, target=tmp_path / "out"),
        functools.partial(load, "BertForMaskedLM"),
    ):
        with pytest.raises(CheckpointError, match=f"{DECODER}: missing"):
            read(other, untie=True)


@one_model
@pytest.mark.parametrize("absent", [BIAS, DECODER_BIAS, None])
def test_a_decoder_is_untied_on_request_for_transformers_too(absent, tmp_path):
    """transformers 5 gives it a second bias, and makes one up where the file has only the first."""
    kind, given = "BertForPreTraining", inputs_of("BertForPreTraining")
    tensors = with_decoder(**{DECODER: pretraining()[WORDS][::-1].copy()})
    tensors.pop(absent, None)
    folder = make_folder(tmp_path / "in", tensors)
    model = load(kind, folder, untie=True)
    for to in TARGETS:
        untied, out, certificate = tmp_path / to, tmp_path / f"{to}-out", tmp_path / f"{to}.json"
        convert_checkpoint(folder, untied, to=to, untie=True, certify=certificate)
        check(certificate, untied)
        convert_checkpoint(untied, out)
        assert read_config(untied) == read_config(out) == read_config(folder) | {"tie_word_embeddings": False}
        assert load_file(out / SINGLE_FILE).keys() == tensors.keys() | {DECODER_BIAS}
        for converted in (untied, out):
            assert_same(parameters(load(kind, converted)), parameters(model))
    if absent != BIAS:  # which transformers 5 would ask for, and make no use of
        assert_close(kind, model, given, torch_outputs(in_transformers(kind, tmp_path / "orbax-out"), given))


def test_a_decoder_is_untied_in_shards_too(tmp_path):
    untied = with_decoder(**{DECODER: pretraining()[WORDS] + 1})
    del untied[DECODER_BIAS]
    folder = make_folder(tmp_path / "whole", untied, tie_word_embeddings=False)
    convert_checkpoint(folder, tmp_path / "in", max_shard_size="2KB")
    shutil.copy(PRETRAINING / "config.json", tmp_path / "in")
    assert_refused(tmp_path / "in", "untie=True")
    convert_checkpoint(tmp_path / "in", tmp_path / "out", untie=True)
    names = open_weights(tmp_path / "out").tensors.keys()
    assert names == json.loads((tmp_path / "out" / INDEX_FILE).read_text())["weight_map"].keys()
    assert names == untied.keys() | {DECODER_BIAS}


@one_model
def test_standard_names_of_an_untied_model_are_those_that_transformers_writes(tmp_path):
    torch_model("BertForMaskedLM", tie_word_embeddings=False).save_pretrained(tmp_path / "in")
    expected = load_file(tmp_path / "in" / SINGLE_FILE)
    assert {DECODER, DECODER_BIAS, BIAS} < expected.keys()
    for options in ({}, {"standard_names": True}):
        convert_checkpoint(tmp_path / "in", tmp_path / "out", force=True, **options)
        assert_same(load_file(tmp_path / "out" / SINGLE_FILE), expected)
    assert not np.array_equal(expected[DECODER], expected[WORDS])


# Poolers, labels, vocabularies, positions, dtypes.

POOLED = (
    "BertForPreTraining",
    "BertForNextSentencePrediction",
    "BertForSequenceClassification",
    "BertForMultipleChoice",
)


@every_kind
def test_a_pooler_may_be_missing_where_no_head_needs_it(kind, tmp_path):
    source = GOLDEN / KINDS[kind]
    tensors = {name: array for name, array in load_file(source / SINGLE_FILE).items() if "pooler" not in name}
    folder = make_folder(tmp_path / "in", tensors, read_config(source))
    if kind in POOLED:
        assert_refused(folder, "bert.pooler.dense.weight: missing; bert.pooler.dense.bias: missing", kind)
    else:
        assert_comes_back(folder)
        assert not any("pooler" in path for path in parameters(load(kind, folder)))


def test_half_a_pooler_is_refused_by_every_class(tmp_path):
    for absent in POOLER:
        tensors = pretraining()
        del tensors[absent]
        folder = make_folder(tmp_path / absent / "in", tensors)
        assert_refused(folder, f"{absent}: missing")
        assert_refused(folder, f"{absent}: missing", "BertModel")


@pytest.mark.parametrize("kind", ["BertForMaskedLM", "BertForTokenClassification", "BertForQuestionAnswering"])
def test_a_pooler_that_no_head_needs_comes_back(kind, tmp_path, caplog):
    source = GOLDEN / KINDS[kind]
    pooler = {name: array for name, array in pretraining().items() if name in POOLER}
    folder = make_folder(tmp_path / "in", load_file(source / SINGLE_FILE) | pooler, read_config(source))
    assert_comes_back(folder)
    assert_comes_back(folder.rename(tmp_path / "orbax"), "orbax")
    assert_same(parameters(load(kind, tmp_path / "orbax")), parameters(load(kind, source)))
    assert not [record for record in caplog.records if record.levelname == "WARNING"]


@pytest.mark.parametrize("kind", LABELS)
@pytest.mark.parametrize("labels", [2, 6])
def test_a_classifier_of_another_width_is_refused(kind, labels, tmp_path):
    source, width = GOLDEN / KINDS[kind], LABELS[kind]
    names = {str(number): f"LABEL_{number}" for number in range(labels)}
    label2id = {name: int(number) for number, name in names.items()}
    config = read_config(source) | {"id2label": names, "label2id": label2id}
    folder = make_folder(tmp_path / "in", load_file(source / SINGLE_FILE), config)
    assert_refused(folder, rf"classifier.weight: shape \[{width}, 8\], the config asks for \[{labels}, 8\]", kind)


def test_a_padded_vocabulary_is_accepted_if_the_config_says_so(tmp_path):
    tensors = {name: np.pad(array, [(0, 4)] + [(0, 0)] * (array.ndim - 1)) if name in (WORDS, BIAS) else array
               for name, array in pretraining().items()}  # fmt: skip
    folder = make_folder(tmp_path / "in", tensors, vocab_size=24)
    (folder / "vocab.txt").write_text("\n".join(f"word{number}" for number in range(20)) + "\n")
    assert_comes_back(folder)
    assert load("BertForPreTraining", folder)(np.array([[23]])).prediction_logits.shape == (1, 1, 24)
    other = make_folder(tmp_path / "other", tensors)
    assert_refused(other, rf"{WORDS}: shape \[24, 8\], the config asks for \[20, 8\].*{BIAS}: shape \[24\]")


@pytest.mark.parametrize("types", [1, 3])
def test_any_number_of_token_types_is_accepted(types, tmp_path):
    name = "bert.embeddings.token_type_embeddings.weight"
    tensors = pretraining() | {name: np.arange(8 * types, dtype=np.float32).reshape(types, 8)}
    folder = make_folder(tmp_path / "in", tensors, type_vocab_size=types)
    assert_comes_back(folder)
    model = load("BertForPreTraining", folder)
    model([[1, 2]], token_type_ids=[[0, types - 1]])
    with pytest.raises(InputError, match="token_type_ids"):
        model([[1, 2]], token_type_ids=[[0, types]])


def test_relative_positions_are_in_the_file_if_the_config_says_so(tmp_path):
    question, kind = GOLDEN / "question", "BertForQuestionAnswering"
    tensors, config = load_file(question / SINGLE_FILE), read_config(question)
    absolute = make_folder(tmp_path / "absolute", tensors, config, position_embedding_type="absolute")
    assert_refused(absolute, "attention.self.distance_embedding.weight: unexpected tensor", kind)
    relative = make_folder(tmp_path / "relative", pretraining(), position_embedding_type="relative_key")
    assert_refused(relative, "attention.self.distance_embedding.weight: missing")


@one_model
def test_float64_is_kept_and_refused_where_it_does_not_fit(tmp_path):
    tensors = {name: array.astype(np.float64) for name, array in pretraining().items()}
    folder = make_folder(tmp_path / "in", tensors)
    assert_comes_back(folder)
    assert_comes_back(folder.rename(tmp_path / "orbax"), "orbax")
    expected = parameters(load("BertForPreTraining", PRETRAINING))
    assert_same(parameters(load("BertForPreTraining", tmp_path / "orbax")), expected)
    tensors["cls.seq_relationship.weight"][1, 2] = 1e300
    folder = make_folder(tmp_path / "large", tensors)
    with pytest.raises(CheckpointError, match=r"'cls.seq_relationship.weight' does not fit in float32"):
        load("BertForPreTraining", folder)
    for to in TARGETS:
        with pytest.raises(CheckpointError, match=r"'cls.seq_relationship.weight' does not fit in float32"):
            convert_checkpoint(folder, tmp_path / "out", to=to, dtype="float32")


@one_model
def test_a_dtype_of_its_own_for_every_head_comes_back(tmp_path):
    dtypes = {"cls.predictions": np.float16, "cls.seq": np.float64, "bert.encoder.layer.1": ml_dtypes.bfloat16}
    tensors = pretraining()
    for name, array in tensors.items():
        dtype = next((dtype for start, dtype in dtypes.items() if name.startswith(start)), np.float32)
        tensors[name] = array.astype(dtype)
    folder = make_folder(tmp_path / "in", tensors)
    assert_comes_back(folder)
    assert_comes_back(folder.rename(tmp_path / "orbax"), "orbax")


@one_model
def test_quantised_heads_are_refused_as_such(tmp_path):
    name = "cls.predictions.transform.dense.weight"
    tensors = pretraining()
    integers = make_folder(tmp_path / "integers" / "in", tensors | {name: np.ones((8, 8), np.int8)})
    assert_refused(integers, f"{name}: dtype I8; quantised weights are not supported")
    for suffix in ("SCB", "weight_format", "quant_state.bitsandbytes__nf4"):
        extra = {f"cls.seq_relationship.{suffix}": np.ones(2, np.float32)}
        folder = make_folder(tmp_path / suffix / "in", tensors | extra)
        assert_refused(folder, rf"cls.seq_relationship.{suffix}: quantised weights are not supported")


HEADS = {
    "BertForPreTraining": "predictions.* and no seq_relationship",
    "BertForMaskedLM": "predictions",
    "BertForNextSentencePrediction": "seq_relationship",
    "BertForSequenceClassification": "classifier",
    "BertForMultipleChoice": "classifier",
    "BertForTokenClassification": "classifier",
    "BertForQuestionAnswering": "qa_outputs",
}


@pytest.mark.parametrize("kind", HEADS)
def test_a_head_that_the_config_names_must_be_there(kind, tmp_path):
    tensors = {name: array for name, array in pretraining().items() if not name.startswith("cls.")}
    folder = make_folder(tmp_path / "in", tensors, architectures=[kind])
    message = f'architecture is {kind}, but the weights have no {HEADS[kind]} head.*set architectures to ."BertModel"'
    with pytest.raises(CheckpointError, match=message):
        convert_checkpoint(folder, tmp_path / "out")
    with pytest.raises(CheckpointError, match=r"\b(cls|classifier|qa_outputs)\.\S+: missing"):
        load(kind, folder)
    (folder / "config.json").write_text(json.dumps(read_config(PRETRAINING) | {"architectures": ["BertModel"]}))
    assert_comes_back(folder)


def test_a_checkpoint_of_2019_gets_the_config_of_today(tmp_path):
    """A pickle with gamma and beta, and Google's configuration, which knows no heads."""
    torch, folder = require("torch"), tmp_path / "in"
    folder.mkdir()
    state = {legacy(name): torch.tensor(array) for name, array in with_decoder().items()}
    torch.save(state, folder / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    shutil.copy(TENSORFLOW / "pretrained" / "bert_config.json", folder)
    assert written(through(folder, tmp_path / "out", ["msgpack"])) == look(state)
    convert_checkpoint(folder, tmp_path / "standard", standard_names=True)
    assert read_config(tmp_path / "standard")["architectures"] == ["BertForPreTraining"]
    assert (tmp_path / "standard" / SINGLE_FILE).read_bytes() == (PRETRAINING / SINGLE_FILE).read_bytes()
    assert_same(parameters(load("BertForPreTraining", folder)), parameters(load("BertForPreTraining", PRETRAINING)))


# Files of a size.


def test_shards_of_a_size_load_in_transformers(tmp_path):
    convert_checkpoint(PRETRAINING / "pytorch_model.bin", tmp_path / "out", max_shard_size="3KB", standard_names=True)
    shards = sorted((tmp_path / "out").glob("model-*.safetensors"))
    assert len(shards) > 2
    sizes = [sum(array.nbytes for array in load_file(path).values()) for path in shards]
    assert max(sizes) <= 3000
    index = json.loads((tmp_path / "out" / INDEX_FILE).read_text())
    assert index["metadata"]["total_size"] == sum(sizes)
    assert index["weight_map"] == {name: path.name for path in shards for name in load_file(path)}
    given = inputs_of("BertForPreTraining")
    found = torch_outputs(in_transformers("BertForPreTraining", tmp_path / "out"), given)
    expected = torch_outputs(in_transformers("BertForPreTraining", PRETRAINING), given)
    for name, value in expected.items():
        np.testing.assert_array_equal(found[name], value, err_msg=name)
    convert_checkpoint(tmp_path / "out", tmp_path / "whole", max_shard_size="1.5 gb")
    assert (tmp_path / "whole" / SINGLE_FILE).read_bytes() == (PRETRAINING / SINGLE_FILE).read_bytes()


@one_model
@pytest.mark.parametrize("size", [0, -1, True, 2.5, "", "5", "5XB", "-4KB", "0KB", "infGB", "4KiB", b"4KB", ["4KB"]])
def test_what_is_no_size_is_refused(size, tmp_path):
    with pytest.raises(InputError, match="max_shard_size="):
        convert_checkpoint(PRETRAINING, tmp_path / "out", max_shard_size=size)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("to", ["msgpack", "orbax"])
def test_only_safetensors_are_divided(to, tmp_path):
    with pytest.raises(InputError, match=f"max_shard_size applies to safetensors, not to {to}"):
        convert_checkpoint(PRETRAINING, tmp_path / "out", to=to, max_shard_size="5GB")


# Nothing that is missing goes unnoticed.


def one_layer():
    """A pre-training checkpoint with what a pickle repeats, one layer deep: tensors enough to take each in turn."""
    return {name: array for name, array in with_decoder().items() if ".layer.1." not in name}


def write_flax(folder, tensors):
    """Writes tensors by FlaxBert's names, which `test_flax_restores_what_is_written` compares with PyTorch's."""
    tree = {}
    for name, array in tensors.items():
        module, _, leaf = name.rpartition(".")
        if leaf == "weight" and array.ndim == 1:
            leaf = "scale"
        elif leaf == "weight":
            leaf, array = ("embedding", array) if "_embeddings" in module else ("kernel", array.T.copy())
        tree[(*module.split("."), leaf)] = array
    (folder / "flax_model.msgpack").write_bytes(flax.serialization.msgpack_serialize(rules.unflatten(tree.items())))


def write_pickle(folder, tensors):
    torch = require("torch")
    torch.save({name: torch.tensor(array) for name, array in tensors.items()}, folder / "pytorch_model.bin")


WRITE = {
    "safetensors": lambda folder, tensors: save_file(tensors, folder / SINGLE_FILE),
    "pickle": write_pickle,
    "msgpack": write_flax,
}
TIED = {DECODER, DECODER_BIAS, BIAS}


@one_model
@pytest.mark.parametrize("change", ["removed", "renamed"])
@pytest.mark.parametrize("form", WRITE)
def test_no_tensor_can_be_missing(form, change, tmp_path):
    everything = one_layer()
    if form == "msgpack":  # FlaxBert repeats nothing
        everything = {name: array for name, array in everything.items() if name not in (DECODER, DECODER_BIAS)}
    config = read_config(PRETRAINING) | {"num_hidden_layers": 1}
    accepted = set()
    for name in everything:
        module, _, leaf = name.rpartition(".")
        tensors = dict(everything)
        array = tensors.pop(name)
        if change == "renamed":
            tensors[f"{module}_.{leaf}"] = array
        folder = tmp_path / name
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(config))
        WRITE[form](folder, tensors)
        missing = name.removeprefix("bert.")  # the word embeddings are named without the prefix, which they tell
        try:
            convert_checkpoint(folder, tmp_path / "out")
        except CheckpointError as problem:
            assert missing in str(problem)
            with pytest.raises(CheckpointError, match=missing):
                load("BertForPreTraining", folder)
        else:
            accepted.add(name)
            shutil.rmtree(tmp_path / "out")
            load("BertForPreTraining", folder)
    assert accepted == (TIED if change == "removed" and form != "msgpack" else set())


@one_model
def test_no_tensor_can_be_missing_from_the_encoder(tmp_path):
    source = GOLDEN / "model"
    everything, config = load_file(source / SINGLE_FILE), read_config(source)
    for name in everything:
        tensors = {other: array for other, array in everything.items() if other != name}
        assert_refused(make_folder(tmp_path / name, tensors, config), name, "BertModel")


def test_the_encoders_pooler_can_be_missing_as_a_whole(tmp_path):
    source = GOLDEN / "model"
    tensors = {name: array for name, array in load_file(source / SINGLE_FILE).items() if "pooler" not in name}
    assert load("BertModel", make_folder(tmp_path / "in", tensors, read_config(source))).pooler is None
    assert_comes_back(tmp_path / "in")


# The folder appears whole or not at all.


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def failing(function, error, after):
    """The function, which fails after a number of calls."""
    calls = itertools.count()

    @functools.wraps(function)
    def call(*arguments, **options):
        if next(calls) >= after:
            raise error
        return function(*arguments, **options)

    return call


FULL = OSError(errno.ENOSPC, "No space left on device")


@one_model
@pytest.mark.parametrize("existing", [False, True])
@pytest.mark.parametrize("after", [0, 2])
@pytest.mark.parametrize("to", TARGETS)
def test_a_full_disk_and_an_interruption_leave_everything_as_it_was(to, after, existing, tmp_path, monkeypatch):
    from orbax.checkpoint.type_handlers import NumpyHandler

    target = tmp_path / "out"
    if existing:
        convert_checkpoint(PRETRAINING, target, to=to, dtype="float16")
    before = contents(tmp_path)
    places = [(os, "fsync", FULL, SourceError), (os, "fsync", KeyboardInterrupt(), KeyboardInterrupt)]
    places += [(TensorInfo, "read", KeyboardInterrupt(), KeyboardInterrupt)]
    if to == "orbax" and after == 0:
        places += [(NumpyHandler, "serialize", FULL, SourceError)]
    for owner, name, error, expected in places:
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, failing(getattr(owner, name), error, after))
            with pytest.raises(expected) as caught:
                convert_checkpoint(PRETRAINING, target, to=to, force=True)
        if expected is SourceError:
            assert str(target) in str(caught.value)
            assert "can't be written" in str(caught.value)
            assert "No space left on device" in str(caught.value)
        assert contents(tmp_path) == before
        assert sorted(os.listdir(tmp_path)) == ["out"] * existing


@one_model
@pytest.mark.parametrize("old", TARGETS)
def test_a_folder_of_any_format_is_replaced_by_force_alone_and_wholly(old, tmp_path):
    target = tmp_path / "out"
    convert_checkpoint(PRETRAINING, target, to=old, dtype="float16")
    before = contents(target)
    for new in TARGETS:
        with pytest.raises(SourceError, match=r"already exists.*force"):
            convert_checkpoint(PRETRAINING, target, to=new)
        assert contents(target) == before
    for new in (*TARGETS, old):
        convert_checkpoint(PRETRAINING, target, to=new, force=True)
        convert_checkpoint(PRETRAINING, tmp_path / "fresh", to=new)
        names = {SINGLE_FILE, "flax_model.msgpack", LAYOUT_FILE, "params"}
        assert set(os.listdir(target)) & names == set(os.listdir(tmp_path / "fresh")) & names
        assert_same(
            parameters(load("BertForPreTraining", target)), parameters(load("BertForPreTraining", tmp_path / "fresh"))
        )
        shutil.rmtree(tmp_path / "fresh")


def test_a_folder_that_holds_more_than_a_model_is_never_replaced(tmp_path):
    convert_checkpoint(GOLDEN / "model", tmp_path / "out", to="orbax")
    (tmp_path / "out" / "thesis").mkdir()
    before = contents(tmp_path)
    with pytest.raises(SourceError, match=r"it holds thesis.*will not be replaced"):
        convert_checkpoint(PRETRAINING, tmp_path / "out", force=True)
    (tmp_path / "out" / "thesis").rmdir()
    (tmp_path / "out" / "params" / "_METADATA").unlink()
    with pytest.raises(SourceError, match=r"it holds params.*will not be replaced"):
        convert_checkpoint(PRETRAINING, tmp_path / "out", force=True)
    assert contents(tmp_path).keys() == before.keys() - {next(path for path in before if path.name == "_METADATA")}


@one_model
@pytest.mark.parametrize("to", TARGETS)
def test_the_target_may_lie_inside_the_source_and_never_the_other_way(to, tmp_path):
    source = tmp_path / "run" / "model"
    convert_checkpoint(PRETRAINING, source)
    before = contents(source)
    convert_checkpoint(source, source / "converted", to=to)
    after = contents(source)
    assert {path: after[path] for path in before} == before
    assert after.keys() - before.keys() == {path for path in after if path.parts[0] == "converted"}
    for given in (source, source / SINGLE_FILE):
        for target in (source, tmp_path / "run"):
            with pytest.raises(SourceError, match="is or holds the source"):
                convert_checkpoint(given, target, to=to, force=True)
    assert contents(source) == after


def test_a_format_that_is_not_written_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"to='onnx' is not a format.*safetensors, msgpack, orbax"):
        convert_checkpoint(PRETRAINING, tmp_path / "out", to="onnx")
    assert os.listdir(tmp_path) == []


def test_names_that_transformers_does_not_know_are_a_warning(tmp_path):
    source = tmp_path / "source"
    shutil.copytree(DATA / "heads" / "token", source)
    tensors = load_file(source / SINGLE_FILE)
    save_file({f"module.{name}": array for name, array in tensors.items()}, source / SINGLE_FILE)
    as_it_is = convert_checkpoint(source, tmp_path / "as it is").summary()
    assert "warning  transformers does not know names that begin with 'module.bert.'" in as_it_is
    assert "warning" not in convert_checkpoint(source, tmp_path / "standard", standard_names=True).summary()
    relative = convert_checkpoint(DATA / "heads" / "question", tmp_path / "flax", to="msgpack")
    assert "warning  FlaxBert takes relative positions for absolute" in relative.summary()


def test_an_untied_decoder_from_flax_has_the_bias_that_transformers_5_reads(tmp_path):
    convert_checkpoint(DATA / "heads" / "untied", tmp_path / "flax", to="msgpack")
    (tmp_path / "flax" / LAYOUT_FILE).unlink()  # as FlaxBert itself saved it
    convert_checkpoint(tmp_path / "flax", tmp_path / "out", certify=tmp_path / "proof.json")
    tensors = load_file(tmp_path / "out" / SINGLE_FILE)
    assert tensors["cls.predictions.decoder.bias"].tobytes() == tensors["cls.predictions.bias"].tobytes()
    check(tmp_path / "proof.json", tmp_path / "out")
