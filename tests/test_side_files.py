"""Conversion of sentence-transformers folders, whose modules stand where modules.json says."""

import json
import shutil

import numpy as np
import oracle
import pytest
from conftest import random_model
from safetensors.numpy import load_file, save_file

from bertjax import BertConfig, SentenceEncoder
from bertjax.conversion import convert_checkpoint
from bertjax.errors import ConfigError, SourceError
from bertjax.side_files import encoder_folder

TEXTS = ["the cat sat on the mat.", "he was slowly"]
ENCODER = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "sentence_bert_config.json")
RNG = np.random.default_rng(0)
DENSE = {
    "linear.weight": RNG.normal(size=(8, 16)).astype(np.float32),
    "linear.bias": RNG.normal(size=8).astype(np.float32),
}
OLD = "sentence_transformers.models"


def save_bin(tensors, path):
    torch = oracle.require("torch")
    torch.save({name: torch.from_numpy(array) for name, array in tensors.items()}, path)


def write_dense(folder, form):
    """Writes a Dense's weights in one file or, as "sharded", in two."""
    suffix = form.removeprefix("sharded ")
    single = {"safetensors": "model.safetensors", "bin": "pytorch_model.bin"}[suffix]
    save = {"safetensors": save_file, "bin": save_bin}[suffix]
    if form == suffix:
        save(DENSE, folder / single)
        return
    shards = {name: f"part-{number}.{suffix}" for number, name in enumerate(DENSE)}
    for name, shard in shards.items():
        save({name: DENSE[name]}, folder / shard)
    (folder / f"{single}.index.json").write_text(json.dumps({"weight_map": shards}))


def edit_modules(folder, change):
    file = folder / "modules.json"
    file.write_text(json.dumps(change(json.loads(file.read_text()))))


def add_dense(folder, path, form):
    """Puts a Dense between pooling and Normalize."""
    (folder / path).mkdir(parents=True)
    write_dense(folder / path, form)
    (folder / path / "config.json").write_text(json.dumps({"in_features": 16, "out_features": 8}))
    dense = {"idx": 2, "name": "2", "path": path, "type": f"{OLD}.Dense"}
    edit_modules(folder, lambda modules: [*modules[:2], dense, *modules[2:]])


def move_encoder(folder, path):
    (folder / path).mkdir(parents=True)
    for name in ENCODER:
        (folder / name).rename(folder / path / name)
    edit_modules(folder, lambda modules: [modules[0] | {"path": path}, *modules[1:]])


@pytest.fixture
def source(sentence_folder, tmp_path):
    return shutil.copytree(sentence_folder, tmp_path / "source")


def assert_converts(source, target, **options):
    """The conversion gives the same vectors, and both differ from zero."""
    convert_checkpoint(source, target, **options)
    expected, found = (SentenceEncoder.from_pretrained(folder).encode(TEXTS) for folder in (source, target))
    np.testing.assert_array_equal(found, expected)
    assert np.abs(expected).max() > 0.1
    return expected


@pytest.mark.parametrize("path, encoder", [("dense", ""), ("0_Dense", "0_Transformer"), ("mods/2_Dense", "mods/bert")])
@pytest.mark.parametrize("form", ["safetensors", "sharded safetensors", "bin", "sharded bin"])
def test_a_dense_is_found_where_modules_json_says(form, path, encoder, source, tmp_path):
    add_dense(source, path, form)
    if encoder:
        move_encoder(source, encoder)
    vectors = assert_converts(source, tmp_path / "out")
    assert vectors.shape == (2, 8)
    written = tmp_path / "out" / path
    assert {file.name for file in written.iterdir()} == {"config.json", "model.safetensors"}
    found = load_file(written / "model.safetensors")
    assert found.keys() == DENSE.keys()
    assert all(np.array_equal(found[name], DENSE[name]) for name in DENSE)
    if form == "safetensors":
        assert (written / "model.safetensors").read_bytes() == (source / path / "model.safetensors").read_bytes()


@pytest.mark.parametrize("to", ["msgpack", "orbax"])
def test_modules_stand_beside_weights_of_any_format(to, source, tmp_path):
    add_dense(source, "dense", "sharded safetensors")
    move_encoder(source, "0_Transformer")
    assert_converts(source, tmp_path / "out", to=to)


def test_the_encoder_of_modules_json_counts_not_the_one_at_the_top(source, tmp_path):
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    move_encoder(source, "0_Transformer")
    random_model(BertConfig(vocab_size=9, **sizes)).save_pretrained(tmp_path / "other")
    for name in ("config.json", "model.safetensors"):
        shutil.copy(tmp_path / "other" / name, source)
    assert encoder_folder(source) == source / "0_Transformer"
    assert_converts(source, tmp_path / "out")
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "out" / name).read_bytes() == (source / "0_Transformer" / name).read_bytes()
    # The other one, asked for by name, is no part of the sentence encoder.
    convert_checkpoint(source / "model.safetensors", tmp_path / "alone")
    assert {path.name for path in (tmp_path / "alone").iterdir()} == {"config.json", "model.safetensors"}


def test_folders_that_modules_json_does_not_name_stay_behind(source, tmp_path):
    (source / "3_Notes").mkdir()
    (source / "3_Notes" / "config.json").write_text("{}")
    assert_converts(source, tmp_path / "out")
    assert not (tmp_path / "out" / "3_Notes").exists()
    (source / "modules.json").unlink()
    convert_checkpoint(source, tmp_path / "plain")
    assert {path.name for path in (tmp_path / "plain").iterdir()} >= {"1_Pooling", "3_Notes", "config.json"}


def test_a_dangling_link_is_refused(source, tmp_path):
    (source / "modules.json").unlink()
    (source / "modules.json").symlink_to("nowhere")
    with pytest.raises(SourceError, match=r"modules.json: can't be read \(it is a link to nothing"):
        convert_checkpoint(source, tmp_path / "out")
    (source / "modules.json").unlink()
    (source / "vocab.txt").unlink(missing_ok=True)
    (source / "vocab.txt").symlink_to("nowhere")
    with pytest.raises(SourceError, match=r"vocab.txt: can't be read \(it is a link to nothing"):
        convert_checkpoint(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_modules_json_that_says_nothing_is_refused(source, tmp_path):
    (source / "modules.json").write_text("garbage")
    for given in (source, source / "model.safetensors"):
        with pytest.raises(ConfigError, match=r"modules.json: not valid JSON"):
            convert_checkpoint(given, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_module_where_the_encoder_goes_is_refused(source, tmp_path):
    move_encoder(source, "0_Transformer")
    shutil.copy(source / "1_Pooling" / "config.json", source)
    edit_modules(source, lambda modules: [modules[0], modules[1] | {"path": ""}, *modules[2:]])
    SentenceEncoder.from_pretrained(source)
    with pytest.raises(ConfigError, match=r"Pooling' stands at the top, where the encoder goes"):
        convert_checkpoint(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()
