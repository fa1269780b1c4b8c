"""Checkpoints to models and back, byte for byte, with transformers on the other side where it is installed."""

import hashlib
import json
import os
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from conftest import DATA, random_model, tolerance
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from oracle import require
from safetensors.numpy import load_file, save_file

import bertjax
from bertjax import BertConfig, BertForMaskedLM, BertModel, SentenceEncoder, describe
from bertjax.checkpoints import class_of, open_checkpoint
from bertjax.conversion import convert_checkpoint
from bertjax.convert.files import INDEX_FILE, SINGLE_FILE
from bertjax.convert.layout import LAYOUT_FILE, Layout, is_head
from bertjax.convert.sources import open_weights
from bertjax.errors import CheckpointError, ConfigError, SourceError
from bertjax.pretrained import from_pretrained, parameters

PLAIN = DATA / "golden" / "plain"
CONFIG = BertConfig.from_file(PLAIN / "config.json")
IDS = np.random.default_rng(0).integers(0, CONFIG.vocab_size, (2, 9))
SIZES = {
    "vocab_size": 40,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 24,
}


def digests(folder):
    """The SHA-256 of every file."""
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


def weights_of(folder):
    """Every tensor of a folder: dtype, shape and bytes, by name."""
    return {
        name: (info.dtype, info.shape, info.read().tobytes()) for name, info in open_weights(folder).tensors.items()
    }


def make_folder(folder, tensors, config=None):
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config or CONFIG.to_hf()))
    save_file(tensors, folder / SINGLE_FILE, {"format": "pt"})
    return folder


def plain_tensors(change=lambda name: name):
    return {change(name): array for name, array in load_file(PLAIN / SINGLE_FILE).items()}


def torch_model(kind, folder, dtype="float32", **options):
    """Saves a random model of this class by transformers; returns it and its folder."""
    torch, transformers = require("torch"), require("transformers")
    torch.manual_seed(0)
    config = transformers.BertConfig(**SIZES, initializer_range=0.3, attn_implementation="eager")
    arguments = {"add_pooling_layer": False} if kind == "BertModel without pooler" else {}
    model = getattr(transformers, kind.split()[0])(config, **arguments).eval().to(getattr(torch, dtype))
    model.save_pretrained(folder, **options)
    return model


KINDS = ("BertModel", "BertModel without pooler", "BertForMaskedLM", "BertForPreTraining",
         "BertForSequenceClassification", "BertForQuestionAnswering")  # fmt: skip
CASES = [(kind, "float32") for kind in KINDS]
CASES += [(kind, dtype) for kind in ("BertModel", "BertForMaskedLM") for dtype in ("bfloat16", "float16", "float64")]


@pytest.mark.parametrize("options", [{}, {"max_shard_size": "4KB"}], ids=["one file", "shards"])
@pytest.mark.parametrize(("kind", "dtype"), CASES)
def test_torch_to_bertjax_to_torch_keeps_every_byte(kind, options, dtype, tmp_path):
    model = torch_model(kind, tmp_path / "torch", dtype, **options)
    plan = convert_checkpoint(tmp_path / "torch", tmp_path / "converted").checkpoint.plan
    assert (len(list((tmp_path / "torch").glob("*.safetensors"))) > 1) == bool(options)
    assert digests(tmp_path / "converted") == digests(tmp_path / "torch")
    assert plan.unused == ()

    if dtype == "float64":  # no model computes in it
        return
    loaded = BertModel.from_pretrained(tmp_path / "torch", param_dtype=dtype)
    assert (loaded.pooler is None) == (model.base_model.pooler is None)
    loaded.save_pretrained(tmp_path / "saved")
    before = weights_of(tmp_path / "torch")
    encoder = [name for name in before if not is_head(name)]
    assert weights_of(tmp_path / "saved") == {name: before[name] for name in encoder}
    if kind.startswith("BertModel"):
        files = digests(tmp_path / "torch")
        saved = digests(tmp_path / "saved")
        assert saved.keys() == files.keys()
        assert all(saved[name] == files[name] for name in files if name.endswith(".safetensors"))


@pytest.mark.parametrize("options", [{}, {"max_shard_size": "4KB"}], ids=["one file", "shards"])
@pytest.mark.parametrize("kind", ["BertModel", "BertForMaskedLM"])
def test_what_is_written_loads_in_transformers_and_computes_the_same(kind, options, tmp_path):
    torch, transformers = require("torch"), require("transformers")
    model = torch_model(kind, tmp_path / "torch", **options)
    convert_checkpoint(tmp_path / "torch", tmp_path / "converted")
    BertModel.from_pretrained(tmp_path / "torch").save_pretrained(tmp_path / "saved")
    ids = torch.tensor(IDS)
    pooled = model.base_model.pooler is not None
    with torch.no_grad():
        again = getattr(transformers, kind).from_pretrained(tmp_path / "converted", attn_implementation="eager")
        assert torch.equal(again(ids)[0], model(ids)[0])
        encoder, info = transformers.BertModel.from_pretrained(
            tmp_path / "saved", add_pooling_layer=pooled, attn_implementation="eager", output_loading_info=True
        )
        assert not any(info[problem] for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        assert torch.equal(encoder(ids)[0], model.base_model(ids)[0])


def test_a_new_model_is_written_as_transformers_would(tmp_path):
    torch, transformers = require("torch"), require("transformers")
    ours = random_model(BertConfig(**SIZES))
    ours.save_pretrained(tmp_path / "ours")
    theirs = transformers.BertModel.from_pretrained(tmp_path / "ours", attn_implementation="eager").eval()
    with torch.no_grad():
        expected = theirs(torch.tensor(IDS)).last_hidden_state.numpy()
    bound = tolerance(expected, SIZES["num_hidden_layers"])
    np.testing.assert_allclose(ours(IDS).last_hidden_state, expected, rtol=0, atol=bound)
    theirs.save_pretrained(tmp_path / "theirs")
    assert digests(tmp_path / "ours")[SINGLE_FILE] == digests(tmp_path / "theirs")[SINGLE_FILE]


PREDICTIONS = {
    "cls.predictions.bias": np.ones(40, np.float16),
    "cls.predictions.transform.dense.weight": np.ones((16, 16), np.float32),
    "cls.predictions.transform.dense.bias": np.ones(16, np.float32),
    "cls.predictions.transform.LayerNorm.weight": np.ones(16, np.float32),
    "cls.predictions.transform.LayerNorm.bias": np.ones(16, np.float32),
}
SPELLINGS = {
    "modern": lambda name: name,
    "bert.": lambda name: "bert." + name,
    "module.bert.": lambda name: "module.bert." + name,
    "gamma and beta": lambda name: (
        "bert." + name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")
    ),
}


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("buffers", [False, True])
def test_every_spelling_comes_back(spelling, buffers, tmp_path):
    change = SPELLINGS[spelling]
    tensors = plain_tensors(change)
    if buffers:
        tensors[change("embeddings.position_ids")] = np.arange(24)[None]
    heads = {change("").removesuffix("bert.") + change(name).split("bert.")[-1].removeprefix("module."): array
             for name, array in PREDICTIONS.items()}  # fmt: skip
    make_folder(tmp_path / "in", tensors | heads)
    convert_checkpoint(tmp_path / "in", tmp_path / "converted")
    assert digests(tmp_path / "converted") == digests(tmp_path / "in")
    model = BertModel.from_pretrained(tmp_path / "in")
    model.save_pretrained(tmp_path / "saved")
    save_file(tensors, tmp_path / "expected", {"format": "pt"})
    assert (tmp_path / "saved" / SINGLE_FILE).read_bytes() == (tmp_path / "expected").read_bytes()
    # On request, as transformers writes it today.
    model.save_pretrained(tmp_path / "modern", layout=Layout())
    assert (tmp_path / "modern" / SINGLE_FILE).read_bytes() == (PLAIN / SINGLE_FILE).read_bytes()


def test_a_dtype_of_its_own_for_every_tensor_comes_back(tmp_path):
    mixed = {
        name: array if "LayerNorm" in name else array.astype(ml_dtypes.bfloat16 if ".1." in name else np.float16)
        for name, array in plain_tensors().items()
    }
    make_folder(tmp_path / "in", mixed)
    convert_checkpoint(tmp_path / "in", tmp_path / "out")
    assert digests(tmp_path / "out") == digests(tmp_path / "in")


def test_metadata_and_its_absence_come_back(tmp_path):
    for metadata in (None, {"format": "np"}):
        make_folder(tmp_path / f"{metadata}", plain_tensors())
        save_file(plain_tensors(), tmp_path / f"{metadata}" / SINGLE_FILE, metadata)
        convert_checkpoint(tmp_path / f"{metadata}", tmp_path / f"{metadata}-out")
        assert digests(tmp_path / f"{metadata}-out") == digests(tmp_path / f"{metadata}")


def shard(folder, tensors, count=3):
    """Divides tensors over shards, every third one in each."""
    names = sorted(tensors)
    weight_map = {name: f"model-{1 + i % count:05}-of-{count:05}.safetensors" for i, name in enumerate(names)}
    for file in set(weight_map.values()):
        save_file({name: tensors[name] for name in names if weight_map[name] == file}, folder / file, {"format": "pt"})
    (folder / INDEX_FILE).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (folder / SINGLE_FILE).unlink()
    return folder


@pytest.mark.parametrize("count", [1, 3])
def test_shards_without_the_heads_are_a_checkpoint_again(count, tmp_path):
    tensors = plain_tensors(SPELLINGS["bert."])
    folder = make_folder(tmp_path / "in", tensors)
    shard(folder, tensors | PREDICTIONS, count)
    convert_checkpoint(folder, tmp_path / "converted")
    assert digests(tmp_path / "converted") == digests(folder)
    BertModel.from_pretrained(folder).save_pretrained(tmp_path / "saved")
    before = weights_of(folder)
    assert weights_of(tmp_path / "saved") == {name: before[name] for name in tensors}
    index = json.loads((tmp_path / "saved" / INDEX_FILE).read_text())
    assert index["metadata"]["total_size"] == sum(array.nbytes for array in tensors.values())


def test_a_layout_of_another_checkpoint_is_refused(tmp_path):
    layout = Layout(shards=(("embeddings.word_embeddings.weight", "model-1.safetensors"),))
    with pytest.raises(CheckpointError, match=r"no shard for .*pooler.dense.bias.*Layout\(\)"):
        random_model(CONFIG).save_pretrained(tmp_path / "out", layout=layout)
    assert os.listdir(tmp_path) == []


def test_one_of_two_encoders_is_chosen_by_prefix(tmp_path):
    tensors = plain_tensors("query.".__add__) | {
        name: array + 1 for name, array in plain_tensors("passage.".__add__).items() if "pooler" not in name
    }
    folder = make_folder(tmp_path / "in", tensors)
    with pytest.raises(CheckpointError, match="choose one with prefix="):
        BertModel.from_pretrained(folder)
    query = BertModel.from_pretrained(folder, prefix="query.")
    plain = BertModel.from_pretrained(PLAIN)
    np.testing.assert_array_equal(query(IDS).pooler_output, plain(IDS).pooler_output)
    assert BertModel.from_pretrained(folder, prefix="passage.").pooler is None
    query.save_pretrained(tmp_path / "query")
    assert weights_of(tmp_path / "query").keys() == {name for name in tensors if name.startswith("query.")}
    conversion = convert_checkpoint(folder, tmp_path / "out", prefix="passage.")
    before, passage = weights_of(folder), {name for name in tensors if name.startswith("passage.")}
    assert weights_of(tmp_path / "out") == {name: before[name] for name in passage}
    assert set(conversion.checkpoint.plan.unused) == tensors.keys() - passage


def test_a_pooler_is_there_if_the_file_has_one_and_never_made_up(tmp_path):
    assert BertModel.from_pretrained(PLAIN).pooler is not None
    assert BertModel.from_pretrained(PLAIN, add_pooling_layer=False).pooler is None
    without = {name: array for name, array in plain_tensors().items() if "pooler" not in name}
    folder = make_folder(tmp_path / "without", without)
    assert BertModel.from_pretrained(folder).pooler is None
    with pytest.raises(CheckpointError, match=r"pooler.dense.weight: missing"):
        BertModel.from_pretrained(folder, add_pooling_layer=True)
    half = make_folder(tmp_path / "half", without | {"pooler.dense.bias": np.zeros(16, np.float32)})
    for load in (BertModel.from_pretrained, lambda source: convert_checkpoint(source, tmp_path / "out")):
        with pytest.raises(CheckpointError, match=r"pooler.dense.weight: missing"):
            load(half)


def dtypes(model):
    return {array.dtype.name for _, array in parameters(model)}


def test_dtypes_are_what_was_asked_for():
    assert dtypes(BertModel.from_pretrained(PLAIN)) == {"float32"}
    assert dtypes(BertModel.from_pretrained(PLAIN, dtype="bfloat16")) == {"bfloat16"}
    mixed = BertModel.from_pretrained(PLAIN, dtype=jnp.bfloat16, param_dtype=jnp.float32)
    assert dtypes(mixed) == {"float32"}
    exact = BertModel.from_pretrained(PLAIN)(IDS).last_hidden_state
    difference = float(jnp.abs(mixed(IDS).last_hidden_state - exact).max())
    assert 1e-4 < difference < 0.2, "it computes in bfloat16, from float32 parameters"
    for name in ("dtype", "param_dtype"):
        for dtype in ("int16", "float64", "nonsense", 3):
            with pytest.raises(ConfigError, match=f"{name}="):
                BertModel.from_pretrained(PLAIN, **{name: dtype})


def test_writing_in_another_dtype_says_so_in_the_config(tmp_path):
    config = CONFIG.to_hf() | {"torch_dtype": "float32", "id2label": {"0": "a"}}
    folder = make_folder(tmp_path / "in", plain_tensors(), config)
    convert_checkpoint(folder, tmp_path / "converted", dtype="float16")
    BertModel.from_pretrained(folder).save_pretrained(tmp_path / "saved", dtype="float16")
    expected = {name: array.astype(np.float16) for name, array in plain_tensors().items()}
    save_file(expected, tmp_path / "expected", {"format": "pt"})
    for out in (tmp_path / "converted", tmp_path / "saved"):
        assert (out / SINGLE_FILE).read_bytes() == (tmp_path / "expected").read_bytes()
        written = json.loads((out / "config.json").read_text())
        assert written["torch_dtype"] == "float16"
        assert written["id2label"] == {"0": "a"}
    for convert in (convert_checkpoint, lambda *a, **k: BertModel.from_pretrained(PLAIN).save_pretrained(a[1], **k)):
        for dtype in ("int8", "nonsense"):
            with pytest.raises(ConfigError, match=f"dtype='{dtype}'"):
                convert(folder, tmp_path / "out", dtype=dtype)


def test_what_does_not_fit_the_dtype_is_refused_by_name(tmp_path):
    tensors = plain_tensors()
    name = "encoder.layer.1.output.dense.weight"
    tensors[name][2, 3] = 1e6
    folder = make_folder(tmp_path / "in", tensors)
    for convert in (
        lambda: BertModel.from_pretrained(folder, dtype="float16"),
        lambda: convert_checkpoint(folder, tmp_path / "out", dtype="float16"),
    ):
        with pytest.raises(CheckpointError, match=f"tensor '{name}' does not fit in float16"):
            convert()
    with pytest.raises(CheckpointError, match="feed_forward/output/kernel does not fit in float16"):
        BertModel.from_pretrained(folder).save_pretrained(tmp_path / "out", dtype="float16")
    assert os.listdir(tmp_path) == ["in"]


def test_parameters_go_where_the_sharding_says(tmp_path):
    devices = jax.devices()
    assert len(devices) == 8
    everywhere = NamedSharding(Mesh(devices, ("data",)), PartitionSpec())
    model = BertModel.from_pretrained(PLAIN, sharding=everywhere)
    assert all(array.sharding.device_set == set(devices) for _, array in parameters(model))
    model.save_pretrained(tmp_path / "everywhere")
    assert (tmp_path / "everywhere" / SINGLE_FILE).read_bytes() == (PLAIN / SINGLE_FILE).read_bytes()
    last = BertModel.from_pretrained(PLAIN, sharding=devices[7])
    assert all(array.devices() == {devices[7]} for _, array in parameters(last))

    # Every array's first axis divides by eight: an eighth of each on every device.
    config = BertConfig(**SIZES | {"num_hidden_layers": 8}, type_vocab_size=8)
    random_model(config).save_pretrained(tmp_path / "whole")
    first_axis = NamedSharding(Mesh(devices, ("first",)), PartitionSpec("first"))
    divided = BertModel.from_pretrained(tmp_path / "whole", sharding=first_axis)
    for path, array in parameters(divided):
        shards = array.addressable_shards
        assert {shard.device for shard in shards} == set(devices), path
        assert {shard.data.size * 8 for shard in shards} == {array.size}, path
    divided.save_pretrained(tmp_path / "divided")
    assert digests(tmp_path / "divided") == digests(tmp_path / "whole")


LOAD = """
import resource, sys
import jax, numpy
from bertjax import BertConfig, BertForMaskedLM, BertModel, SentenceEncoder
from bertjax.pretrained import abstract_model
BertModel.from_pretrained(sys.argv[1])  # a small one first: what JAX allocates once is not the model's
def peak():
    for line in open("/proc/self/status"):
        if line.startswith("VmHWM"):
            return int(line.split()[1]) * 1024
open("/proc/self/clear_refs", "w").write("5")
before = peak()
model = BertModel.from_pretrained(sys.argv[2])
jax.block_until_ready(model.embeddings.word_embeddings.embedding[...])
print(peak() - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads the peak memory from /proc")
def test_loading_takes_about_one_copy_of_the_weights(tmp_path):
    config = BertConfig(vocab_size=20000, hidden_size=512, num_attention_heads=8, intermediate_size=2048)
    random_model(config).save_pretrained(tmp_path / "large")
    size = (tmp_path / "large" / SINGLE_FILE).stat().st_size
    assert size > 180e6
    run = subprocess.run(
        [sys.executable, "-c", LOAD, str(PLAIN), str(tmp_path / "large")], check=True, capture_output=True, text=True
    )
    growth = int(run.stdout)
    print(f"peak growth {growth / 1e6:.1f} MB for a file of {size / 1e6:.1f} MB, {growth / size:.3f} copies")
    assert 0.9 * size < growth < 1.4 * size


class Disk:
    """A disk that is full, or a person who interrupts, after a number of tensors."""

    def __init__(self, monkeypatch, error, after):
        self.error, self.left, self.fsync = error, after, os.fsync
        monkeypatch.setattr(os, "fsync", self.flush)

    def flush(self, descriptor):
        self.left -= 1
        if self.left < 0:
            raise self.error
        return self.fsync(descriptor)


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()], ids=["full", "Ctrl-C"])
@pytest.mark.parametrize("after", range(6))
@pytest.mark.parametrize("existing", [False, True])
def test_nothing_half_written_is_left(error, after, existing, tmp_path, monkeypatch):
    target = tmp_path / "out"
    if existing:
        shutil.copytree(PLAIN, target, ignore=shutil.ignore_patterns("*.npz"))
        (target / "config.json").write_text(json.dumps(CONFIG.to_hf() | {"name": "the old one"}))
    folder = make_folder(tmp_path / "in", plain_tensors())
    shard(folder, plain_tensors())
    model = BertModel.from_pretrained(folder)
    before = digests(target) if existing else None
    for write in (
        lambda: model.save_pretrained(target, force=True),
        lambda: convert_checkpoint(folder, target, force=True),
    ):
        with monkeypatch.context() as patch:
            Disk(patch, error, after)
            with pytest.raises((SourceError, KeyboardInterrupt)) as caught:
                write()
        if isinstance(error, OSError):
            assert "out" in str(caught.value)
            assert "can't be written (No space left on device)" in str(caught.value)
        assert sorted(os.listdir(tmp_path)) == (["in", "out"] if existing else ["in"])
        assert not existing or digests(target) == before


def test_an_existing_folder_is_replaced_only_by_force_and_only_if_it_is_a_model(tmp_path):
    model = BertModel.from_pretrained(PLAIN)
    for write in (model.save_pretrained, lambda target, **options: convert_checkpoint(PLAIN, target, **options)):
        target, other = tmp_path / "out", tmp_path / "documents"
        write(target)
        first = digests(target)
        with pytest.raises(SourceError, match=r"out: already exists.*force"):
            write(target)
        write(target, force=True)
        assert digests(target) == first
        other.mkdir()
        (other / "thesis.txt").write_text("years of work")
        with pytest.raises(SourceError, match=r"documents: .*will not be replaced"):
            write(other, force=True)
        assert (other / "thesis.txt").read_text() == "years of work"
        shutil.rmtree(target)
        shutil.rmtree(other)


def test_the_source_is_never_replaced(tmp_path):
    shutil.copytree(PLAIN, tmp_path / "run" / "1_model")
    for name in ("config.json", SINGLE_FILE):
        shutil.copy(PLAIN / name, tmp_path / "run")
    (tmp_path / "link").symlink_to("run")
    for source, target in (("run", "run"), ("run/1_model", "run"), ("run", "link"), ("link", "run")):
        with pytest.raises(SourceError, match="is or holds the source"):
            convert_checkpoint(tmp_path / source, tmp_path / target, force=True)
    assert (tmp_path / "run" / "1_model" / "expected.npz").exists()


def test_side_files_are_copied_unless_they_lead_elsewhere(tmp_path):
    folder = make_folder(tmp_path / "in", plain_tensors())
    (folder / "1_Pooling").mkdir()
    files = ("vocab.txt", "tokenizer.json", "1_Pooling/config.json", "sentence_bert_config.json")
    for name in files:
        (folder / name).write_bytes(name.encode() + b"\r\n")
    (folder / "train.py").write_text("not a model's")
    convert_checkpoint(folder, tmp_path / "out")
    assert all((tmp_path / "out" / name).read_bytes() == name.encode() + b"\r\n" for name in files)
    assert not (tmp_path / "out" / "train.py").exists()

    (tmp_path / "secret").write_text("secret")
    (folder / "vocab.txt").unlink()
    (folder / "vocab.txt").symlink_to(tmp_path / "secret")
    with pytest.raises(SourceError, match=r"vocab.txt: is a link out of the model's folder"):
        convert_checkpoint(folder, tmp_path / "again")
    (folder / "vocab.txt").unlink()
    (folder / "vocab.txt").mkdir()
    with pytest.raises(SourceError, match=r"vocab.txt: can't be read \(Is a directory"):
        convert_checkpoint(folder, tmp_path / "again")
    assert not (tmp_path / "again").exists()


def test_a_folder_without_a_config_or_weights_says_what_is_missing(tmp_path):
    with pytest.raises(SourceError, match="no weights found"):
        BertModel.from_pretrained(tmp_path)
    make_folder(tmp_path / "in", plain_tensors())
    (tmp_path / "in" / "config.json").unlink()
    with pytest.raises(SourceError, match=r"config.json: can't be read \(No such file"):
        BertModel.from_pretrained(tmp_path / "in")


def test_sizes_are_compared_before_anything_is_allocated(tmp_path):
    """A config that asks for petabytes, beside a small file."""
    huge = {"hidden_size": 1 << 16, "intermediate_size": 1 << 18, "vocab_size": 1 << 24}
    folder = make_folder(tmp_path / "in", plain_tensors(), CONFIG.to_hf() | huge)
    with pytest.raises(CheckpointError, match=r"shape \[40, 16\], the config asks for \[16777216, 65536"):
        BertModel.from_pretrained(folder)


def test_nan_is_refused(tmp_path):
    tensors = plain_tensors()
    tensors["encoder.layer.0.output.dense.bias"][1] = np.nan
    folder = make_folder(tmp_path / "in", tensors)
    for load in (BertModel.from_pretrained, lambda source: convert_checkpoint(source, tmp_path / "out")):
        with pytest.raises(CheckpointError, match=r"'encoder.layer.0.output.dense.bias' holds NaN"):
            load(folder)
    assert not (tmp_path / "out").exists()


def test_a_model_with_nan_is_not_saved(tmp_path):
    model = BertModel.from_pretrained(make_folder(tmp_path / "in", plain_tensors()))
    bias = model.pooler.dense.bias
    bias[...] = bias[...].at[2].set(np.inf)
    with pytest.raises(CheckpointError, match="pooler/dense/bias holds NaN or infinity"):
        model.save_pretrained(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_unused_tensors_are_named_aloud(tmp_path, caplog):
    tensors = plain_tensors() | {"qa_outputs.weight": np.zeros((2, 16), np.float32)}
    folder = make_folder(tmp_path / "in", tensors)
    BertModel.from_pretrained(folder)
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert record.getMessage() == f"{folder}: not used by BertModel: qa_outputs.weight"


@pytest.mark.parametrize("tied", [True, False])
def test_a_model_with_a_head_is_written_as_transformers_would(tied, tmp_path):
    torch, transformers = require("torch"), require("transformers")
    config = transformers.BertConfig(**SIZES, tie_word_embeddings=tied, initializer_range=0.3)
    theirs = transformers.BertForMaskedLM(config).eval()
    with torch.no_grad():
        theirs.cls.predictions.bias.copy_(torch.arange(40.0))
        if not tied:
            theirs.cls.predictions.decoder.bias.copy_(torch.arange(40.0))
    theirs.save_pretrained(tmp_path / "theirs")
    ours = BertForMaskedLM.from_pretrained(tmp_path / "theirs")
    ours.layout = None  # as of a model that was never read from a file
    ours.save_pretrained(tmp_path / "ours")
    again, info = transformers.BertForMaskedLM.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(info[problem] for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    with torch.no_grad():
        expected = theirs(torch.tensor(IDS)).logits.numpy()
        np.testing.assert_array_equal(again.eval()(torch.tensor(IDS)).logits.numpy(), expected)
    bound = tolerance(expected, SIZES["num_hidden_layers"])
    np.testing.assert_allclose(ours(IDS).logits, expected, rtol=0, atol=bound)


HEADS = DATA / "heads"
BY_NAME = {
    "choice": "BertForMultipleChoice",
    "masked_lm": "BertForMaskedLM",
    "model": "BertModel",
    "next_sentence": "BertForNextSentencePrediction",
    "pretraining": "BertForPreTraining",
    "question": "BertForQuestionAnswering",
    "sequence": "BertForSequenceClassification",
    "token": "BertForTokenClassification",
    "untied": "BertForMaskedLM",
}


def class_found(path):
    return class_of(*open_checkpoint(path)).__name__


def relabelled(source, folder, **fields):
    """A copy of a folder whose config.json has other fields; a field that is None is left out."""
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns("*.bin*"))
    config = json.loads((folder / "config.json").read_text()) | fields
    config = {name: value for name, value in config.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("name", BY_NAME)
def test_the_class_is_the_one_that_the_config_names(name):
    assert class_found(HEADS / name) == BY_NAME[name]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("masked_lm", "BertForMaskedLM"),
        ("model", "BertModel"),
        ("next_sentence", "BertForNextSentencePrediction"),
        ("pretraining", "BertForPreTraining"),
        ("question", "BertForQuestionAnswering"),
        ("token", "BertForTokenClassification"),  # of those with a classifier the only one without a pooler
    ],
)
def test_where_the_config_names_no_class_the_weights_may_settle_it(name, expected, tmp_path):
    assert class_found(relabelled(HEADS / name, tmp_path / "none", architectures=None)) == expected
    assert class_found(relabelled(HEADS / name, tmp_path / "empty", architectures=[])) == expected


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        (DATA / "tf1" / "classifier", "BertForSequenceClassification"),
        (DATA / "tf1" / "pretrained" / "bert_model.ckpt", "BertForPreTraining"),
    ],
    ids=["classifier", "pretrained"],
)
def test_googles_checkpoints_are_what_they_hold(path, expected):
    config, survey = open_checkpoint(path)
    assert class_of(config, survey).__name__ == expected
    classifier = survey.tensors.get("classifier.bias")
    assert classifier is None or config.num_labels == classifier.count


@pytest.mark.parametrize(
    ("name", "architectures", "message"),
    [
        ("masked_lm", ["BertLMHeadModel"], r"old checkpoints.*predictions head.*pass kind=BertForMaskedLM$"),
        ("model", ["BertForJointThings"], r"\['BertForJointThings'\], which names no one class.*pass kind=BertModel$"),
        ("masked_lm", ["BertForMaskedLM", "BertForPreTraining"], "names no one class.*pass kind=BertForMaskedLM$"),
        ("sequence", None, "kind=BertForSequenceClassification or kind=BertForTokenClassification$"),
        (
            "choice",
            None,
            "kind=BertForSequenceClassification or kind=BertForMultipleChoice or kind=BertForTokenClassification$",
        ),
    ],
)
def test_a_class_that_is_not_settled_is_to_be_passed(name, architectures, message, tmp_path):
    folder = relabelled(HEADS / name, tmp_path / "in", architectures=architectures)
    with pytest.raises(ConfigError, match=f"in/config.json: .*{message}"):
        from_pretrained(folder)


def test_heads_of_no_one_class_are_left_to_the_caller(tmp_path):
    folder = relabelled(HEADS / "token", tmp_path / "in", architectures=None)
    more = {"qa_outputs.weight": np.ones((2, 8), np.float32), "qa_outputs.bias": np.ones(2, np.float32)}
    save_file(load_file(folder / SINGLE_FILE) | more, folder / SINGLE_FILE)
    with pytest.raises(ConfigError, match=r"classifier, qa_outputs head.*pass kind=BertModel, which leaves the heads"):
        from_pretrained(folder)


def test_a_head_is_loaded_with_its_class_and_told_by_info(tmp_path):
    model = bertjax.from_pretrained(HEADS / "token")
    assert type(model) is bertjax.BertForTokenClassification
    assert type(BertModel.from_pretrained(HEADS / "token")) is BertModel
    names = {str(label): f"tag{label}" for label in range(7)}
    told = describe(relabelled(HEADS / "token", tmp_path / "in", id2label=names, label2id=None))
    assert "\nclass      BertForTokenClassification\nlabels     7: tag0, tag1, tag2, tag3, tag4, tag5, tag6\n" in told
    assert "\nclass      BertModel\nlabels     none\n" in describe(HEADS / "model")
    unsettled = describe(relabelled(HEADS / "sequence", tmp_path / "unsettled", architectures=None))
    assert "\nclass      not settled: " in unsettled
    assert "\nlabels     none\n" in describe(HEADS / "choice")  # one score, which no label belongs to
    unusable = describe(relabelled(HEADS / "token", tmp_path / "odd", id2label=names | {"6": 6}, label2id=None))
    assert "\nlabels     unusable: id2label names label 6 6" in unusable


def test_an_untied_decoder_from_flax_is_saved_with_the_bias_that_transformers_5_reads(tmp_path, caplog):
    torch, transformers = require("torch"), require("transformers")
    convert_checkpoint(HEADS / "untied", tmp_path / "flax", to="msgpack")
    (tmp_path / "flax" / LAYOUT_FILE).unlink()  # as FlaxBert itself saved it
    model = from_pretrained(tmp_path / "flax")
    model.save_pretrained(tmp_path / "out")
    tensors = load_file(tmp_path / "out" / SINGLE_FILE)
    assert tensors["cls.predictions.bias"].any()
    assert tensors["cls.predictions.decoder.bias"].tobytes() == tensors["cls.predictions.bias"].tobytes()
    theirs, info = transformers.BertForMaskedLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info[problem] for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    ids = IDS[:, :9] % 20
    with torch.no_grad():
        expected = theirs.eval()(torch.tensor(ids)).logits.numpy()
    np.testing.assert_allclose(model(ids).logits, expected, rtol=0, atol=tolerance(expected, 3))
    caplog.clear()
    BertModel.from_pretrained(tmp_path / "flax")
    (message,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert "cls.predictions.bias" in message
    assert "decoder.bias" not in message, "the file has no such tensor"


@pytest.mark.parametrize("weights", ["safetensors", "bin"])
def test_an_encoder_in_a_folder_of_its_own_moves_to_the_top(weights, sentence_folder, tmp_path):
    """As sentence-transformers laid its folders out before 2021, with a pickle for the Dense module as well."""
    source, expected = tmp_path / "source", SentenceEncoder.from_pretrained(sentence_folder).encode(["the cat sat"])
    shutil.copytree(sentence_folder, source)
    (source / "0_Transformer").mkdir()
    for name in ("config.json", SINGLE_FILE, "tokenizer.json", "tokenizer_config.json", "sentence_bert_config.json"):
        (source / name).rename(source / "0_Transformer" / name)
    modules = json.loads((source / "modules.json").read_text())
    modules[0]["path"] = "0_Transformer"
    dense = {"idx": 2, "name": "2", "path": "2_Dense", "type": "sentence_transformers.models.Dense"}
    modules[2:] = [dense, modules[2] | {"path": "3_Normalize"}]
    (source / "modules.json").write_text(json.dumps(modules))
    (source / "2_Dense").mkdir()
    settings = {"in_features": 16, "out_features": 16, "bias": False}
    settings["activation_function"] = "torch.nn.modules.linear.Identity"
    (source / "2_Dense" / "config.json").write_text(json.dumps(settings))
    eye = {"linear.weight": np.eye(16, dtype=np.float32)}
    save_file(eye, source / "2_Dense" / SINGLE_FILE)
    if weights == "bin":
        torch = require("torch")
        (source / "2_Dense" / SINGLE_FILE).unlink()
        torch.save({"linear.weight": torch.eye(16)}, source / "2_Dense" / "pytorch_model.bin")
    convert_checkpoint(source, tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").rglob("*.bin")) == []
    np.testing.assert_array_equal(load_file(tmp_path / "out" / "2_Dense" / SINGLE_FILE)["linear.weight"], np.eye(16))
    for folder in (source, tmp_path / "out"):
        found = SentenceEncoder.from_pretrained(folder).encode(["the cat sat"])
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)
