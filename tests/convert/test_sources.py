"""Finding a checkpoint's weights: by folder, file, index or prefix, and what is said where there are none."""

import json
import os
import shutil

import numpy as np
import pytest
from conftest import DATA
from safetensors.numpy import load_file, save_file
from test_pickles import zipped

from bertjax import convert_checkpoint
from bertjax.convert.layout import LAYOUT_FILE, Layout, write_layout
from bertjax.convert.msgpack import write_msgpack
from bertjax.convert.pickles import ZIP
from bertjax.convert.sources import open_weights
from bertjax.convert.tensors import TensorToWrite
from bertjax.errors import BertjaxError, CheckpointError, SourceError

PLAIN = DATA / "golden" / "plain"
TENSORS = load_file(PLAIN / "model.safetensors")
TF1, FLAX = "TensorFlow 1 checkpoint", "Flax msgpack"
SINGLES = {"safetensors": "model.safetensors", ZIP: "pytorch_model.bin", FLAX: "flax_model.msgpack"}


def put(path, *names):
    """Writes tensors of these names in the format of the file's name."""
    arrays = {name: np.full(2, number, np.float32) for number, name in enumerate(names)}
    if path.suffix == ".safetensors":
        save_file(arrays, path)
    elif path.suffix == ".msgpack":
        write_msgpack(path, [TensorToWrite(n, a.dtype, a.shape, lambda a=a: a) for n, a in arrays.items()])
    else:
        path.write_bytes(zipped())


def index(path, weight_map):
    path.write_text(json.dumps({"weight_map": weight_map}))
    return path


@pytest.fixture(scope="module")
def orbax(tmp_path_factory):
    folder = tmp_path_factory.mktemp("orbax") / "model"
    convert_checkpoint(PLAIN, folder, to="orbax")
    return folder


def refusal(path, kind=SourceError):
    with pytest.raises(kind) as error:
        open_weights(path)
    assert str(path) in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("form", SINGLES)
def test_a_file_is_found_by_its_folder_and_by_its_name(form, tmp_path):
    put(tmp_path / SINGLES[form], "a.bias")
    for path in (tmp_path, tmp_path / SINGLES[form]):
        weights = open_weights(path)
        assert (weights.format, weights.folder, weights.index) == (form, tmp_path, None)
        assert weights.files == (SINGLES[form],)
        assert len(weights.tensors) == 1


@pytest.mark.parametrize("name", ["x.safetensors", "x.bin", "x.pt", "x.pth", "x.msgpack", "pytorch_model.v2.bin"])
def test_a_file_of_any_name_is_read_when_it_is_named(name, tmp_path):
    put(tmp_path / name, "a.bias")
    assert open_weights(tmp_path / name).files == (name,)
    assert "no weights found" in refusal(tmp_path)


def test_one_format_is_preferred_where_there_are_several(orbax, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(orbax, folder)
    for path in (DATA / "tf1" / "pretrained").glob("*.ckpt*"):
        shutil.copy(path, folder)
    for name in SINGLES.values():
        put(folder / name, "a.bias")
    for form, name in SINGLES.items():
        assert open_weights(folder).format == form
        (folder / name).unlink()
    assert open_weights(folder).format == TF1
    for path in folder.glob("*.ckpt*"):
        path.unlink()
    assert open_weights(folder).format == "Orbax checkpoint"


def test_a_whole_file_is_preferred_to_shards_of_its_format(tmp_path):
    put(tmp_path / "model-1.safetensors", "a")
    index(tmp_path / "model.safetensors.index.json", {"a": "model-1.safetensors"})
    put(tmp_path / "pytorch_model.bin")
    assert open_weights(tmp_path).index == "model.safetensors.index.json"
    put(tmp_path / "model.safetensors", "b")
    assert list(open_weights(tmp_path).tensors) == ["b"]


@pytest.mark.parametrize("name", ["", "bert_model.ckpt", "bert_model.ckpt.index", "bert_model.ckpt.data-00000-of-00001",
                                  "bert_model.ckpt.meta"])  # fmt: skip
def test_a_tensorflow_checkpoint_is_found_by_folder_prefix_and_file(name):
    folder = DATA / "tf1" / "pretrained"
    weights = open_weights(folder / name)
    assert (weights.format, weights.folder) == (TF1, folder)
    assert weights.files == ("bert_model.ckpt.index", "bert_model.ckpt.data-00000-of-00001")
    assert set(weights.left_out.values()) == {"optimiser state"}


def test_every_shard_of_a_tensorflow_checkpoint_is_listed():
    files = open_weights(DATA / "tf1" / "classifier").files
    assert files == ("model.ckpt-30.index", *(f"model.ckpt-30.data-0000{shard}-of-00002" for shard in (0, 1)))


def test_an_orbax_checkpoint_is_read_as_pytorchs_tensors(orbax):
    weights = open_weights(orbax)
    assert weights.tensors.keys() == TENSORS.keys()
    for name, info in weights.tensors.items():
        assert (info.shape, info.dtype) == (TENSORS[name].shape, TENSORS[name].dtype)
        assert info.read().tobytes() == TENSORS[name].tobytes(), name
    assert "params/_METADATA" in weights.files
    assert weights.layout == Layout()


def test_an_orbax_checkpoint_without_its_layout_is_read_too(orbax, tmp_path):
    shutil.copytree(orbax, tmp_path / "model")
    (tmp_path / "model" / LAYOUT_FILE).unlink()
    weights = open_weights(tmp_path / "model")
    assert weights.layout is None
    assert weights.tensors.keys() == TENSORS.keys()


def test_the_layout_is_read_beside_what_cant_hold_it(tmp_path):
    write_layout(tmp_path / LAYOUT_FILE, Layout(prefix="module."))
    put(tmp_path / "flax_model.msgpack", "a.bias")
    assert open_weights(tmp_path).layout == Layout(prefix="module.")
    (tmp_path / LAYOUT_FILE).write_text("{}")
    with pytest.raises(CheckpointError, match=LAYOUT_FILE):
        open_weights(tmp_path)
    # Safetensors hold all of it themselves.
    put(tmp_path / "model.safetensors", "a.bias")
    assert open_weights(tmp_path).layout is None


@pytest.mark.parametrize("shard", ["../x.safetensors", "/etc/x.safetensors", "a/b.safetensors", "", "x.bin", 1, None])
def test_a_layout_cant_make_a_conversion_write_outside_its_folder(shard, tmp_path):
    write_layout(tmp_path / LAYOUT_FILE, Layout(shards=(("a", shard),)))
    put(tmp_path / "flax_model.msgpack", "a.bias")
    with pytest.raises(CheckpointError, match=LAYOUT_FILE):
        open_weights(tmp_path)


@pytest.mark.parametrize(
    ("name", "advice"),
    [
        ("tf_model.h5", "Keras weights are not read; load them in transformers 4"),
        ("adapter_model.safetensors", "this is a PEFT adapter, not a model; merge it"),
        ("adapter_model.bin", "this is a PEFT adapter"),
        ("onnx/model.onnx", "only ONNX weights found"),
        ("model.onnx", "only ONNX weights found"),
        ("bert.Q4_0.gguf", "GGUF weights are quantised"),
    ],
)
def test_other_weights_are_refused_by_name(name, advice, tmp_path):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_bytes(b"")
    assert f"no model.safetensors, but {name}: {advice}" in refusal(tmp_path)
    put(tmp_path / "model.safetensors", "a")
    assert open_weights(tmp_path).files == ("model.safetensors",)


def test_where_there_is_nothing_all_that_could_be_is_named(tmp_path):
    message = refusal(tmp_path)
    assert all(name in message for name in (*SINGLES.values(), "*.ckpt.index", "params/"))
    assert "no such file or folder" in refusal(tmp_path / "nowhere")
    assert "no such file or folder" in refusal(tmp_path / "nowhere.safetensors")
    (tmp_path / "notes.txt").write_text("x")
    assert "not a file of weights by its name; expected one that ends in .safetensors" in refusal(
        tmp_path / "notes.txt"
    )


SHARDED = {"safetensors": "model", "msgpack": "flax_model"}


@pytest.mark.parametrize("suffix", SHARDED)
def test_shards_and_index_must_agree_both_ways(suffix, tmp_path):
    stem = SHARDED[suffix]
    one, two = (f"{stem}-{number}.{suffix}" for number in (1, 2))
    names = {"safetensors": "ab", "msgpack": ("a/bias", "b/bias")}[suffix]
    put(tmp_path / one, "a" if suffix == "safetensors" else "a.bias")
    put(tmp_path / two, "b" if suffix == "safetensors" else "b.bias")
    path = index(tmp_path / f"{stem}.{suffix}.index.json", dict(zip(names, (one, two), strict=True)))
    for source in (tmp_path, path):
        weights = open_weights(source)
        assert (weights.index, weights.files, len(weights.tensors)) == (path.name, (one, two), 2)
    index(path, dict.fromkeys(names, one))
    assert f"index and shards disagree: {one} lacks {names[1]}" in refusal(path, CheckpointError)
    index(path, {names[0]: two, names[1]: one})
    message = refusal(path, CheckpointError)
    assert f"{one} lacks {names[1]}" in message
    assert f"{one} holds {names[0]}, which the index does not place there" in message
    index(path, {names[0]: one, names[1]: f"{stem}-3.{suffix}"})
    with pytest.raises(SourceError, match=f"{stem}-3"):
        open_weights(path)


def test_sharded_pickles(tmp_path):
    put(tmp_path / "pytorch_model-1.bin")
    (name,) = open_weights(tmp_path / "pytorch_model-1.bin").tensors
    path = index(tmp_path / "pytorch_model.bin.index.json", {name: "pytorch_model-1.bin"})
    assert open_weights(tmp_path).files == ("pytorch_model-1.bin",)
    index(path, {name: "pytorch_model-1.bin", "other": "pytorch_model-1.bin"})
    assert "pytorch_model-1.bin lacks other" in refusal(path, CheckpointError)


@pytest.mark.parametrize("shard", ["../x.safetensors", "/tmp/x.safetensors", "a/x.safetensors", "..", "", "x.bin",
                                   "x.safetensors\n", "x\0.safetensors", "a b.safetensors",
                                   "x" * 5000 + ".safetensors", None, 1, ["x.safetensors"], {}])  # fmt: skip
def test_an_index_names_plain_files_of_its_format(shard, tmp_path):
    put(tmp_path.parent / "x.safetensors", "a")
    message = refusal(index(tmp_path / "model.safetensors.index.json", {"a": shard}), CheckpointError)
    assert "weight_map" in message
    assert "expected a file name" in message
    assert len(message) < 2000


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"weight_map": []}', '{"weight_map": {}}', "[" * 100_000])
def test_what_is_no_index_is_refused(content, tmp_path):
    path = tmp_path / "model.safetensors.index.json"
    path.write_text(content)
    assert path.name in refusal(path, CheckpointError)


def test_links_may_lead_within_the_hubs_cache_and_nowhere_else(tmp_path):
    blobs, snapshot, outside = (tmp_path / part for part in ("m/blobs", "m/snapshots/0", "outside"))
    for folder in (blobs, snapshot, outside):
        folder.mkdir(parents=True)
        put(folder / "x.safetensors", "a")
    link = snapshot / "model.safetensors"
    link.symlink_to("../../blobs/x.safetensors")
    assert list(open_weights(snapshot).tensors) == ["a"]
    link.unlink()
    link.symlink_to(outside / "x.safetensors")
    with pytest.raises(SourceError, match="link out of the model's folder"):
        open_weights(snapshot)


@pytest.mark.parametrize("name", [*SINGLES.values(), "model.safetensors.index.json", "params/_METADATA"])
def test_a_pipe_is_refused_and_never_waited_for(name, tmp_path):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    os.mkfifo(tmp_path / name)
    with pytest.raises(BertjaxError, match=name):
        open_weights(tmp_path)


def test_two_shards_are_never_one_file(tmp_path):
    for name in ("a", "b"):
        save_file({name: np.zeros(2, np.float32)}, tmp_path / f"{name}.safetensors")
    (tmp_path / "c.safetensors").symlink_to("a.safetensors")
    weight_map = {"a": "a.safetensors", "b": "b.safetensors", "c": "c.safetensors"}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(CheckpointError, match=r"a\.safetensors and c\.safetensors are one file"):
        open_weights(tmp_path)


def test_a_link_to_nothing_is_not_taken_for_absent(tmp_path):
    save_file({"a": np.zeros(2, np.float32)}, tmp_path / "other.safetensors")
    (tmp_path / "model.safetensors").symlink_to("gone.safetensors")
    with pytest.raises(SourceError, match=r"model\.safetensors: can.t be read .it is a link to nothing"):
        open_weights(tmp_path)


def test_a_layout_can_neither_narrow_numbers_nor_tie_a_decoder_of_its_own(tmp_path):
    convert_checkpoint(PLAIN, tmp_path / "tree", to="orbax")
    path = tmp_path / "tree" / LAYOUT_FILE
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content | {"dtypes": {"encoder.layer.0.attention.self.query.weight": "float16"}}))
    with pytest.raises(CheckpointError, match=f"{LAYOUT_FILE}: says that .*query.weight was float16, but its float32"):
        convert_checkpoint(tmp_path / "tree", tmp_path / "back")

    convert_checkpoint(DATA / "heads" / "untied", tmp_path / "untied", to="msgpack")
    path = tmp_path / "untied" / LAYOUT_FILE
    path.write_text(json.dumps(json.loads(path.read_text()) | {"ties": ["cls.predictions.decoder.weight"]}))
    with pytest.raises(CheckpointError, match=f"{LAYOUT_FILE}: does not fit"):
        convert_checkpoint(tmp_path / "untied", tmp_path / "back")
