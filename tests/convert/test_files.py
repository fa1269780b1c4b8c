import json
import os
import time
import weakref

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from bertjax.convert.files import INDEX_FILE, SINGLE_FILE, read_header, write_safetensors
from bertjax.convert.sources import open_weights
from bertjax.convert.tensors import AHEAD, DTYPES, TensorToWrite
from bertjax.errors import BertjaxError, CheckpointError, SourceError

# Names with quotes, control characters and letters from all planes, but no surrogates, which are no text.
NAMES = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12).filter("__metadata__".__ne__)
SHAPES = st.lists(st.integers(0, 4), max_size=4).map(tuple)


@st.composite
def tensors(draw):
    """Any mixture of names, dtypes and shapes, with random bytes in them."""
    result = {}
    for name in draw(st.lists(NAMES, unique=True, max_size=8)):
        dtype, shape = draw(st.sampled_from(list(DTYPES.values()))), draw(SHAPES)
        size = int(np.prod(shape))
        data = np.frombuffer(draw(st.binary(min_size=size * dtype.itemsize, max_size=size * dtype.itemsize)), np.uint8)
        # safetensors copies booleans by value, not by byte
        result[name] = (data & 1 if dtype.kind == "b" else data).view(dtype).reshape(shape)
    return result


def to_write(arrays):
    return [TensorToWrite(name, a.dtype, a.shape, lambda a=a: a) for name, a in arrays.items()]


@settings(deadline=None, max_examples=200)
@given(tensors(), st.dictionaries(NAMES, NAMES, max_size=1), st.randoms())
def test_files_are_those_of_the_safetensors_library_both_ways(tmp_path_factory, arrays, metadata, random):
    folder = tmp_path_factory.mktemp("files")
    save_file(arrays, folder / "theirs", metadata or None)
    contents = read_header(folder / "theirs")
    found = contents.tensors
    assert contents.metadata == metadata
    assert found.keys() == arrays.keys()
    for name, info in found.items():
        assert (info.dtype, info.shape) == (arrays[name].dtype, arrays[name].shape)
        assert info.read().tobytes() == arrays[name].tobytes()
        assert info.nbytes == arrays[name].nbytes
    shuffled = to_write(arrays)
    random.shuffle(shuffled)
    write_safetensors(folder / "ours", shuffled, metadata)
    assert (folder / "ours").read_bytes() == (folder / "theirs").read_bytes()


def test_what_is_not_contiguous_is_written_as_its_values(tmp_path):
    array = np.arange(24, dtype=np.float32).reshape(4, 6)
    write_safetensors(tmp_path / "t", to_write({"transposed": array.T, "strided": array[::2, ::3]}), {})
    back = load_file(tmp_path / "t")
    np.testing.assert_array_equal(back["transposed"], array.T)
    np.testing.assert_array_equal(back["strided"], array[::2, ::3])


def test_a_few_tensors_are_made_ahead_and_never_over_another_file(tmp_path):
    alive, most = weakref.WeakSet(), 0

    class Counted(np.ndarray):
        __hash__ = object.__hash__

    def make():
        nonlocal most
        array = np.zeros(10, np.float32).view(Counted)
        alive.add(array)
        most = max(most, len(alive))
        return array

    write_safetensors(tmp_path / "t", [TensorToWrite(str(i), np.dtype("f4"), (10,), make) for i in range(99)], {})
    assert most <= AHEAD + 2  # those, the one that is written, and the one that makes room for the next
    before = (tmp_path / "t").read_bytes()
    with pytest.raises(SourceError, match="t: can't be written"):
        write_safetensors(tmp_path / "t", [], {})
    assert (tmp_path / "t").read_bytes() == before


def test_a_tensor_with_the_name_of_the_metadata_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="t: a tensor is called '__metadata__'"):
        write_safetensors(tmp_path / "t", to_write({"__metadata__": np.zeros(2)}), {"format": "pt"})
    assert not (tmp_path / "t").exists()


def test_a_source_that_fails_while_it_is_copied_is_named_itself(tmp_path):
    save_file({"a": np.zeros(100, np.float32)}, tmp_path / "source")
    info = read_header(tmp_path / "source").tensors["a"]
    os.truncate(tmp_path / "source", 200)
    with pytest.raises(SourceError, match="source: ends inside tensor 'a'"):
        write_safetensors(tmp_path / "t", [TensorToWrite("a", info.dtype, info.shape, info.read)], {})
    (tmp_path / "source").unlink()
    with pytest.raises(SourceError, match="source: can't be read"):
        info.read()


def pack(header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def entry(dtype="F32", shape=(2,), offsets=(0, 8)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


GOOD = pack({"a": entry()}, bytes(8))
A = b'"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}'
EMPTY = b'"%d":{"dtype":"I8","shape":[0],"data_offsets":[0,0]}'
MALFORMED = {
    "empty": (b"", "empty; the download did not finish"),
    "lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n", "Git LFS pointer.*git lfs pull"),
    "html": (b"\n<!DOCTYPE html><html><body>Not Found", "HTML page"),
    "zip": (b"PK\x03\x04" + bytes(100), "PyTorch pickle"),
    "pickle": (b"\x80\x02\x8a\nl\xfc\x9cF\xf9", "PyTorch pickle"),
    "short": (b"abc", "not a safetensors file"),
    "truncated by one byte": (GOOD[:-1], "not a safetensors file"),
    "truncated header": (GOOD[:20], "not a safetensors file"),
    "trailing bytes": (GOOD + b"\0", "not a safetensors file"),
    "header length 2^63": ((1 << 63).to_bytes(8, "little") + GOOD[8:], "not a safetensors file"),
    "header length of a gigabyte": ((1 << 30).to_bytes(8, "little") + GOOD[8:], "not a safetensors file"),
    "not json": (pack(b"{"), "not a safetensors file"),
    "not utf-8": (pack(b'{"\xff":1}'), "not a safetensors file"),
    "not an object": (pack([1]), "not a safetensors file"),
    "deep": (pack(b'{"a":' * 100_000), "not a safetensors file"),
    "duplicate tensor": (pack(b"{" + A + b"," + A + b"}", bytes(8)), "'a' twice"),
    "duplicate by escape": (pack(b"{" + A + b"," + A.replace(b"a", b"\\u0061", 1) + b"}", bytes(8)), "'a' twice"),
    "overlap": (pack({"a": entry(), "b": entry(offsets=(4, 12))}, bytes(12)), "not a safetensors file"),
    "hole": (pack({"a": entry(), "b": entry(offsets=(9, 17))}, bytes(17)), "not a safetensors file"),
    "shape and size differ": (pack({"a": entry(shape=(3,))}, bytes(8)), "not a safetensors file"),
    "shape overflows": (pack({"a": entry(shape=(1 << 62, 4))}, bytes(8)), "not a safetensors file"),
    "negative shape": (pack({"a": entry(shape=(-2,))}, bytes(8)), "not a safetensors file"),
    "negative offset": (pack({"a": entry(offsets=(-8, 0))}, bytes(8)), "not a safetensors file"),
    "fraction": (pack({"a": entry(shape=(2.0,))}, bytes(8)), "not a safetensors file"),
    "unknown dtype": (pack({"a": entry("F31")}, bytes(8)), "not a safetensors file"),
    "metadata not text": (pack({"__metadata__": {"a": 1}}), "not a safetensors file"),
    "float8": (pack({"a": entry("F8_E4M3", (8,))}, bytes(8)), "tensor 'a' has dtype F8_E4M3"),
    "unsigned": (pack({"a": entry("U32")}, bytes(8)), "tensor 'a' has dtype U32"),
    "zero beside 2^60": (pack({"a": entry(shape=(0, 1 << 60), offsets=(0, 0))}), "tensor 'a' .*impossible shape"),
    "dtype as a map": (pack({"a": entry({"F32": None})}, bytes(8)), "entry of tensor 'a' is not an object with"),
    "entry as a list": (pack({"a": ["F32", [2], [0, 8]]}, bytes(8)), "entry of tensor 'a' is not an object with"),
    "long name": (pack({"a" * 513: entry()}, bytes(8)), "called 'a{100}\\.\\.\\.', expected at most 512 characters"),
    "many tensors": (pack(b"{" + b",".join(EMPTY % i for i in range(65_537)) + b"}"), "has 65,537 tensors, .*no BERT"),
    "rank 300": (pack({"a": entry(shape=(1,) * 299 + (2,))}, bytes(8)), "tensor 'a' .*impossible shape"),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_a_malformed_file_is_one_typed_error_that_names_it(case, tmp_path):
    content, message = MALFORMED[case]
    (tmp_path / SINGLE_FILE).write_bytes(content)
    with pytest.raises(CheckpointError, match=f"{SINGLE_FILE}: .*{message}"):
        open_weights(tmp_path)
    # Sanity: the case differs from a good file by its fault alone.
    (tmp_path / SINGLE_FILE).write_bytes(GOOD)
    assert open_weights(tmp_path).tensors["a"].read().tolist() == [0, 0]


@settings(deadline=None, max_examples=300)
@given(st.integers(0, len(GOOD) - 1), st.integers(0, 255), st.booleans())
def test_any_damaged_byte_is_read_or_refused_but_never_anything_else(tmp_path_factory, position, value, cut):
    damaged = bytearray(GOOD[:position] if cut else GOOD)
    if not cut:
        damaged[position] = value
    file = tmp_path_factory.mktemp("damaged") / SINGLE_FILE
    file.write_bytes(damaged)
    try:
        for info in read_header(file).tensors.values():
            assert info.read().nbytes == 8
    except BertjaxError as error:
        assert str(file) in str(error)


@pytest.mark.parametrize("twice", [False, True])
def test_a_header_of_very_many_tensors_takes_linear_time(twice, tmp_path):
    """A hostile header: quadratic code would take hours."""
    count = 30_000
    text = ",".join(f'"{i}":{{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}' for i in range(count))
    (tmp_path / SINGLE_FILE).write_bytes(pack(f"{{{text},{text}}}".encode() if twice else f"{{{text}}}".encode()))
    start = time.process_time()
    if twice:
        with pytest.raises(CheckpointError, match="twice") as error:
            open_weights(tmp_path)
        assert len(str(error.value)) < 100_000
    else:
        assert len(open_weights(tmp_path).tensors) == count
    assert time.process_time() - start < 20


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("tf_model.h5", "tf_model.h5: Keras weights"),
        ("adapter_model.safetensors", "PEFT adapter.*merge"),
        ("onnx/model.onnx", "only ONNX"),
        ("model.onnx", "only ONNX"),
        ("ggml.gguf", "GGUF"),
        ("README.md", "no weights found; expected model.safetensors"),
    ],
)
def test_weights_in_another_format_are_named(name, message, tmp_path):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_bytes(b"x")
    with pytest.raises(SourceError, match=f"{tmp_path.name}: .*{message}"):
        open_weights(tmp_path)


def test_what_cant_be_read_is_named(tmp_path):
    (tmp_path / SINGLE_FILE).mkdir()
    with pytest.raises(SourceError, match=f"{SINGLE_FILE}: can't be read \\(Is a directory"):
        open_weights(tmp_path)


ONE, TWO = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


def write_shards(folder, weight_map=None, **index):
    save_file({"a": np.zeros(2, np.float32), "b": np.ones(3, np.float32)}, folder / ONE, {"format": "pt"})
    save_file({"c": np.ones((), ml_dtypes.bfloat16)}, folder / TWO, {"format": "pt"})
    good = {"a": ONE, "b": ONE, "c": TWO}
    (folder / INDEX_FILE).write_text(json.dumps({"weight_map": good | (weight_map or {})} | index))


def test_shards_are_read_together(tmp_path):
    write_shards(tmp_path)
    weights = open_weights(tmp_path)
    assert weights.files == (ONE, TWO)
    assert weights.metadata == {"format": "pt"}
    assert {name: info.file.name for name, info in weights.tensors.items()} == {"a": ONE, "b": ONE, "c": TWO}
    assert weights.tensors["b"].read().tolist() == [1, 1, 1]
    assert weights.nbytes == 22


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        ({"c": ONE}, f"{ONE} lacks c"),
        ({"d": TWO}, f"{TWO} lacks d"),
        ({"a": TWO}, f"{ONE} holds a, which"),
        ({"c": "model-00003-of-00003.safetensors"}, "model-00003-of-00003.safetensors: can't be read"),
        *(
            ({"c": shard}, "weight_map\\['c'\\] is .*expected a file name")
            for shard in (
                "../model-00002-of-00002.safetensors",
                "/etc/model.safetensors",
                "x/model.safetensors",
                "x\\model.safetensors",
                "..",
                "",
                "model.safetensors\n",
                "pytorch_model.bin",
                "~.safetensors",
                None,
                1,
                [ONE],
                {"file": ONE},
            )
        ),
    ],
)
def test_an_index_that_its_shards_do_not_bear_out_is_refused(weight_map, message, tmp_path):
    write_shards(tmp_path, weight_map)
    with pytest.raises(BertjaxError, match=message) as error:
        open_weights(tmp_path)
    assert str(tmp_path) in str(error.value)


@pytest.mark.parametrize("weight_map", [None, [], {}, "a", 3, [["a", ONE]]])
def test_an_index_without_a_weight_map_is_refused(weight_map, tmp_path):
    write_shards(tmp_path)
    for content in ({"weight_map": weight_map}, {"metadata": {}}, [], None):
        (tmp_path / INDEX_FILE).write_text(json.dumps(content))
        with pytest.raises(CheckpointError, match=f"{INDEX_FILE}: "):
            open_weights(tmp_path)


def test_a_tensor_that_no_index_names_is_refused(tmp_path):
    write_shards(tmp_path)
    save_file({"c": np.ones(2), "stowaway": np.ones(2)}, tmp_path / TWO)
    with pytest.raises(CheckpointError, match=f"{TWO} holds stowaway"):
        open_weights(tmp_path)


def test_a_malformed_shard_is_named(tmp_path):
    write_shards(tmp_path)
    os.truncate(tmp_path / TWO, 10)
    with pytest.raises(CheckpointError, match=f"{TWO}: not a safetensors file"):
        open_weights(tmp_path)


def test_links_are_followed_inside_the_checkpoint_and_in_the_cache_of_the_hub_only(tmp_path):
    repository = tmp_path / "models--acme--bert"
    snapshot, blobs = repository / "snapshots" / "0123", repository / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    write_shards(blobs)
    for name in (ONE, TWO, INDEX_FILE):
        (snapshot / name).symlink_to(f"../../blobs/{name}")
    assert open_weights(snapshot).tensors.keys() == {"a", "b", "c"}
    dense = snapshot / "2_Dense"
    dense.mkdir()
    (dense / SINGLE_FILE).symlink_to(f"../../../blobs/{TWO}")
    assert open_weights(dense).tensors.keys() == {"c"}
    (tmp_path / "link to a folder").symlink_to(snapshot)
    assert open_weights(tmp_path / "link to a folder").tensors.keys() == {"a", "b", "c"}
    (blobs / "inside").symlink_to(TWO)
    (snapshot / TWO).unlink()
    (snapshot / TWO).symlink_to("../../blobs/inside")
    assert open_weights(snapshot).tensors.keys() == {"a", "b", "c"}

    outside = tmp_path / "outside"
    outside.mkdir()
    write_shards(outside)
    for folder, name in ((snapshot, TWO), (blobs, ONE), (dense, SINGLE_FILE)):
        (folder / name).unlink()
        (folder / name).symlink_to(outside / TWO)
        with pytest.raises(SourceError, match=f"{name}: is a link out of the model's folder"):
            open_weights(folder)
