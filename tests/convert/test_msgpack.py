import dataclasses
import json
import os
import random
import time
from pathlib import Path

import ml_dtypes
import msgpack
import numpy as np
import pytest
from flax import serialization
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file

from bertjax.convert import msgpack as ours
from bertjax.convert import rules
from bertjax.convert.msgpack import INDEX_FILE, SINGLE_FILE, flax_path, read_msgpack, torch_name, write_msgpack
from bertjax.convert.tensors import DTYPES, TensorToWrite
from bertjax.errors import BertjaxError, CheckpointError, SourceError

DATA = Path(__file__).parents[1] / "data" / "flax"

KEYS = st.sampled_from(["LayerNorm", "x_embeddings"]) | st.text(
    st.characters(exclude_categories=["Cs"], exclude_characters="./"), min_size=1, max_size=12
)
LEAVES = st.sampled_from(["kernel", "scale", "embedding", "bias", "anything"])


@st.composite
def arrays(draw):
    dtype, shape = draw(st.sampled_from(list(DTYPES.values()))), tuple(draw(st.lists(st.integers(0, 5), max_size=4)))
    size = int(np.prod(shape)) * dtype.itemsize
    data = np.frombuffer(draw(st.binary(min_size=size, max_size=size)), np.uint8)
    return (data & 1 if dtype.kind == "b" else data).view(dtype).reshape(shape)


TREES = st.recursive(
    st.dictionaries(LEAVES, arrays(), max_size=3), lambda below: st.dictionaries(KEYS, below, max_size=4), max_leaves=8
)


def expected_names(tree):
    """Every array of a tree of Flax's, by PyTorch's name and in PyTorch's layout."""
    result = {}
    for path, array in rules.flatten(tree):
        result[torch_name(path)] = array.T if path[-1] == "kernel" and array.ndim == 2 else array
    return result


def same(a, b):
    return (a.dtype, a.shape, a.tobytes()) == (b.dtype, b.shape, b.tobytes())


def to_write(named):
    return [TensorToWrite(name, a.dtype, a.shape, lambda a=a: a) for name, a in named.items()]


def in_order(tree):
    """A copy of nested dicts; Flax's writer changes them, where arrays are in pieces."""
    return {key: in_order(value) if isinstance(value, dict) else value for key, value in tree.items()}


@pytest.fixture(params=[1 << 30, 16], ids=["whole", "pieces"])
def piece_bytes(request, monkeypatch):
    monkeypatch.setattr(serialization, "MAX_CHUNK_SIZE", request.param)
    monkeypatch.setattr(ours, "_PIECE_BYTES", request.param)
    monkeypatch.setattr(ours, "_BLOCK_BYTES", 8)


def test_any_tree_of_flax_is_read(piece_bytes, tmp_path):
    @settings(deadline=None, max_examples=200)
    @given(TREES)
    def check(tree):
        file = tmp_path / SINGLE_FILE
        file.write_bytes(serialization.to_bytes(in_order(tree)))
        if any(flax_path(torch_name(path))[0] != path for path, _ in rules.flatten(tree)):
            with pytest.raises(CheckpointError, match="is not a name of FlaxBert's, expected"):
                read_msgpack(file)
            tree = rules.unflatten((flax_path(torch_name(path))[0], array) for path, array in rules.flatten(tree))
            file.write_bytes(serialization.to_bytes(in_order(tree)))
        expected = expected_names(tree)
        found = read_msgpack(file).tensors
        assert list(found) == list(expected)
        assert [info.source for info in found.values()] == ["/".join(path) for path, _ in rules.flatten(tree)]
        for name, info in found.items():
            assert same(info.read(), expected[name])
            assert (info.dtype, info.shape) == (expected[name].dtype, expected[name].shape)

    check()


def test_any_tensors_are_written_as_flax_writes_them(piece_bytes, tmp_path):
    words = st.sampled_from(["weight", "bias", "LayerNorm", "x_embeddings", "0", "dense"])
    names = st.lists(words, min_size=1, max_size=8).map(".".join)

    @settings(deadline=None, max_examples=200)
    @given(st.dictionaries(names, arrays(), max_size=6))
    def check(named):
        paths = {flax_path(name)[0]: name for name in named}
        file = tmp_path / "ours"
        file.unlink(missing_ok=True)
        blocked = any(path[:end] in paths for path in paths for end in range(1, len(path)))
        if blocked or any(torch_name(path) != name for path, name in paths.items()):
            with pytest.raises(CheckpointError, match="in the way of"):
                write_msgpack(file, to_write(named))
            assert not file.exists()
            return
        transposed = {path: path[-1] == "kernel" and named[name].ndim == 2 for path, name in paths.items()}
        tree = rules.unflatten(
            (path, np.asarray(named[name].T if transposed[path] else named[name], order="C"))
            for path, name in paths.items()
        )
        write_msgpack(file, to_write(named))
        assert file.read_bytes() == serialization.to_bytes(in_order(tree))
        restored = dict(rules.flatten(serialization.msgpack_restore(file.read_bytes())))
        assert all(same(np.asarray(restored[path]), array) for path, array in rules.flatten(tree))
        back = read_msgpack(file).tensors
        assert back.keys() == named.keys()
        assert all(same(back[name].read(), array) for name, array in named.items())

    check()


def test_headers_are_those_of_the_msgpack_library():
    """At each limit: where a header becomes longer."""
    sizes = {edge + step for power in range(4, 33) for edge in [1 << power] for step in (-1, 0)} | {0, 1, 2, 4, 8}
    for size in sizes:
        if size < 1 << 32:
            assert ours._header("map", size) == msgpack.Packer().pack_map_header(size)
            assert ours._header("array", size) == msgpack.Packer().pack_array_header(size)
        assert ours._header("int", size) == msgpack.packb(size)
        if size <= 1 << 16:
            for kind, value in {"str": "x" * size, "bin": bytes(size), "ext": msgpack.ExtType(1, bytes(size))}.items():
                assert msgpack.packb(value).startswith(ours._header(kind, size))


@pytest.mark.parametrize(
    ("name", "path"),
    {
        "embeddings.word_embeddings.weight": "embeddings/word_embeddings/embedding",
        "bert.embeddings.token_type_embeddings.weight": "bert/embeddings/token_type_embeddings/embedding",
        "bert.embeddings.LayerNorm.weight": "bert/embeddings/LayerNorm/scale",
        "encoder.layer.11.attention.self.query.weight": "encoder/layer/11/attention/self/query/kernel",
        "encoder.layer.0.attention.self.distance_embedding.weight": (
            "encoder/layer/0/attention/self/distance_embedding/embedding"
        ),
        "encoder.layer.0.output.LayerNorm.bias": "encoder/layer/0/output/LayerNorm/bias",
        "pooler.dense.weight": "pooler/dense/kernel",
        "cls.predictions.bias": "cls/predictions/bias",
        "cls.predictions.transform.dense.weight": "cls/predictions/transform/dense/kernel",
        "cls.predictions.transform.LayerNorm.weight": "cls/predictions/transform/LayerNorm/scale",
        "cls.predictions.decoder.weight": "cls/predictions/decoder/kernel",
        "cls.seq_relationship.weight": "cls/seq_relationship/kernel",
        "classifier.weight": "classifier/kernel",
        "qa_outputs.bias": "qa_outputs/bias",
        "weight": "kernel",
    }.items(),
)
def test_names_and_paths_are_inverse(name, path):
    assert flax_path(name) == (tuple(path.split("/")), path.endswith("kernel"))
    assert torch_name(flax_path(name)[0]) == name


def read_folder(folder):
    return {
        name: info for file in sorted(folder.glob("*.msgpack")) for name, info in read_msgpack(file).tensors.items()
    }


@pytest.mark.parametrize("case", ["single", "sharded"])
def test_what_flaxbert_saved_is_what_transformers_reads_from_it(case):
    expected = load_file(DATA / case / "expected.safetensors")
    found = read_folder(DATA / case)
    assert found.keys() == expected.keys()
    for name, info in found.items():
        np.testing.assert_array_equal(info.read(), expected[name], strict=True)


def test_the_file_of_flaxbert_is_written_again_byte_by_byte(tmp_path):
    contents = read_msgpack(DATA / "single" / SINGLE_FILE)
    again = [TensorToWrite(info.name, info.dtype, info.shape, info.read) for info in contents.tensors.values()]
    write_msgpack(tmp_path / "t", again)
    assert (tmp_path / "t").read_bytes() == (DATA / "single" / SINGLE_FILE).read_bytes()


def test_the_index_of_flaxbert_spells_the_sources():
    folder = DATA / "sharded"
    weight_map = json.loads((folder / INDEX_FILE).read_text())["weight_map"]
    assert weight_map == {info.source: info.file.name for info in read_folder(folder).values()}


def test_tensors_are_made_one_at_a_time_and_never_over_another_file(tmp_path):
    alive, most = 0, 0

    class Counted(np.ndarray):
        def __del__(self):
            nonlocal alive
            alive -= self.base is None

    def make():
        nonlocal alive, most
        alive += 1
        most = max(most, alive)
        return np.ndarray.__new__(Counted, (10, 3), np.float32)

    write_msgpack(tmp_path / "t", [TensorToWrite(f"{i}.weight", np.dtype("f4"), (10, 3), make) for i in range(9)])
    assert most == 1
    before = (tmp_path / "t").read_bytes()
    with pytest.raises(SourceError, match="t: can't be written"):
        write_msgpack(tmp_path / "t", [])
    assert (tmp_path / "t").read_bytes() == before


def test_a_kernel_is_read_and_written_without_a_copy(tmp_path):
    kernel = np.arange(6, dtype=np.float32).reshape(2, 3)
    write_msgpack(tmp_path / "t", to_write({"dense.weight": kernel.T}))
    back = read_msgpack(tmp_path / "t").tensors["dense.weight"].read()
    assert back.T.flags.c_contiguous
    np.testing.assert_array_equal(back, kernel.T)


def test_a_source_that_fails_while_it_is_copied_is_named_itself(tmp_path):
    write_msgpack(tmp_path / "source", to_write({"a.weight": np.ones((9, 9), np.float32)}))
    info = read_msgpack(tmp_path / "source").tensors["a.weight"]
    os.truncate(tmp_path / "source", 200)
    with pytest.raises(SourceError, match=r"source: ends inside tensor 'a\.weight'"):
        write_msgpack(tmp_path / "t", [TensorToWrite("a.weight", info.dtype, info.shape, info.read)])


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["a.weight", "a.kernel"], "'a.weight' and 'a.kernel' are both Flax's 'a/kernel'"),
        (["a.bias", "a.bias.b"], "'a.bias' is in the way of 'a.bias.b'"),
        (["a.bias.b", "a.bias"], "'a.bias' is in the way of 'a.bias.b'"),
    ],
)
def test_tensors_without_a_place_of_their_own_are_refused(names, message, tmp_path):
    tensors = [TensorToWrite(name, np.dtype("f4"), (), lambda: np.zeros((), np.float32)) for name in names]
    with pytest.raises(CheckpointError, match=message):
        write_msgpack(tmp_path / "t", tensors)
    assert not (tmp_path / "t").exists()


def array(shape=(2,), dtype="float32", data=bytes(8), number=1, more=()):
    return msgpack.ExtType(number, msgpack.packb((shape, dtype, data, *more)))


def tree(leaf, path="a/bias"):
    """The bytes of a tree with one leaf; as in Flax, which does not take lists for tuples."""
    for key in reversed(path.split("/")):
        leaf = {key: leaf}
    return msgpack.packb(leaf)


def pieces(shape=(4,), chunks=None, **entries):
    chunks = {"0": array(), "1": array()} if chunks is None else chunks
    result = {"__msgpack_chunked_array__": True, "shape": {str(i): n for i, n in enumerate(shape)}, "chunks": chunks}
    return tree(result | entries)


GOOD = tree(array())
KEY_A = b"\x81\xa1a"
MALFORMED = {
    "empty": (b"", "empty; the download did not finish"),
    "lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n", "Git LFS pointer.*git lfs pull"),
    "html": (b"\n<!DOCTYPE html><html><body>Not Found", "HTML page"),
    "pickle": (b"\x80\x02\x8a\nl\xfc\x9cF\xf9", "it goes on after its end"),
    "zip": (b"PK\x03\x04" + bytes(100), "the whole is of msgpack type int, expected map"),
    "unused byte": (b"\xc1", "the whole is of msgpack type invalid"),
    "an array alone": (msgpack.packb(array()), "the whole is of msgpack type ext, expected map"),
    "truncated": (GOOD[:-1], "ends inside"),
    "truncated header": (b"\xdf\0\0", "ends inside something of 4 bytes"),
    "trailing bytes": (GOOD + b"\0", "it goes on after its end"),
    "two trees": (GOOD + GOOD, "it goes on after its end"),
    "deep": (KEY_A * 200_000, "more than 16 deep"),
    "4 GiB map": (b"\xdf\xff\xff\xff\xff", "ends inside"),
    "4 GiB array": (KEY_A + b"\xdd\xff\xff\xff\xff", "'a' is of msgpack type array"),
    "4 GiB text": (KEY_A + b"\xdb\xff\xff\xff\xff", "'a' is of msgpack type str"),
    "4 GiB bytes": (KEY_A + b"\xc6\xff\xff\xff\xff", "'a' is of msgpack type bin"),
    "4 GiB extension": (KEY_A + b"\xc9\xff\xff\xff\xff\x01", "ends inside"),
    "4 GiB key": (b"\x81\xdb\xff\xff\xff\xff", "a key has 4294967295 bytes"),
    "4 GiB shape": (KEY_A + b"\xc7\x09\x01\x93\xdd\xff\xff\xff\xff", "'a' has 4294967295 dimensions"),
    "4 GiB dtype": (KEY_A + b"\xc7\x0a\x01\x93\x90\xdb\xff\xff\xff\xff", "a dtype has 4294967295 bytes"),
    "4 GiB data": (KEY_A + b"\xc7\x10\x01\x93\x90\xa7float32\xc6\xff\xff\xff\xff", "4294967295 bytes of data"),
    "key twice": (b"\x82\xa1a\x80\xa1a\x80", "the key 'a' twice"),
    "key is a number": (msgpack.packb({1: {}}), "a key is of msgpack type int"),
    "key is bytes": (msgpack.packb({b"a": {}}), "a key is of msgpack type bin"),
    "key is nil": (msgpack.packb({None: {}}), "a key is of msgpack type nil"),
    "key is no text": (b"\x81\xa1\xff\x80", "a key is not UTF-8 text"),
    "key with a dot": (tree(array(), "a.b/bias"), "'a.b'.* without '.' or '/'"),
    "key with a slash": (msgpack.packb({"a/b": {}}), "'a/b'.* without '.' or '/'"),
    "key is empty": (msgpack.packb({"": {}}), "without '.' or '/'"),
    "two readings": (msgpack.packb({"a": {"kernel": array(), "scale": array()}}), "'a/scale' .*expected 'a/kernel'"),
    **{
        f"kernel as {leaf}": (tree(array((2, 2), data=bytes(16)), f"query/{leaf}"), f"'query/{leaf}' .*'query/kernel'")
        for leaf in ("scale", "embedding", "weight")
    },
    "norm as kernel": (tree(array(), "LayerNorm/kernel"), "'LayerNorm/kernel' .*'LayerNorm/scale'"),
    "norm as weight": (tree(array(), "LayerNorm/weight"), "'LayerNorm/weight' .*'LayerNorm/scale'"),
    "a float": (tree(0.5), "'a/bias' is of msgpack type float, expected an array or a map"),
    "a list": (tree([array()]), "'a/bias' is of msgpack type array"),
    "a negative number": (tree(-5), "'a/bias' is of msgpack type signed int"),
    "a complex number": (tree(array(number=2)), "'a/bias' is a complex number"),
    "a scalar": (tree(array(number=3)), "'a/bias' is a scalar"),
    "another extension": (tree(array(number=77)), "'a/bias' is a msgpack extension of type 77"),
    "a time": (tree(msgpack.Timestamp(1)), "'a/bias' is a msgpack extension of type 255"),
    "description is a map": (tree(msgpack.ExtType(1, msgpack.packb({1: 2}))), "description is of msgpack type map"),
    "description is empty": (tree(msgpack.ExtType(1, b"")), "ends inside"),
    "description is too short": (tree(msgpack.ExtType(1, msgpack.packb((1, 2)))), "does not have 3 parts"),
    "description is too long": (tree(array(more=(1,))), "does not have 3 parts"),
    "description goes on": (tree(msgpack.ExtType(1, array().data + b"\0")), "8 bytes of data"),
    "shape is a number": (tree(array(2)), "a shape is of msgpack type int"),
    "shape of text": (tree(array(("2",))), "a dimension is of msgpack type str"),
    "shape of fractions": (tree(array((2.0,))), "a dimension is of msgpack type float"),
    "negative shape": (tree(array((-2,))), "a dimension is of msgpack type signed int"),
    "shape overflows": (tree(array((1 << 62, 4))), "'a/bias' .*impossible shape"),
    "zero beside 2^60": (tree(array((0, 1 << 60), data=b"")), "'a/bias' .*impossible shape"),
    "rank 60": (tree(array((1,) * 59 + (2,))), "'a/bias' .*impossible shape"),
    "rank 300": (tree(array((1,) * 299 + (2,))), "'a/bias' has 300 dimensions"),
    "shape and data differ": (tree(array((3,))), r"shape \[3\] and dtype float32 has 8 bytes"),
    "dtype is bytes": (tree(array(dtype=b"float32")), "a dtype is of msgpack type bin"),
    "dtype O": (tree(array(dtype="O")), "'a/bias' has dtype 'O'"),
    "dtype object": (tree(array(dtype="object")), "'a/bias' has dtype 'object'"),
    "dtype S8": (tree(array((1,), dtype="S8")), "'a/bias' has dtype 'S8'"),
    "dtype garbage": (tree(array(dtype="f4,f4")), "'a/bias' has dtype 'f4,f4'"),
    "dtype uint32": (tree(array(dtype="uint32")), "'a/bias' has dtype 'uint32'"),
    "data is text": (tree(array(data="x" * 8)), "an array's data is of msgpack type str"),
    "pieces too small": (pieces((5,)), r"do not form an array of shape \[5\]"),
    "no pieces": (pieces((), {}), "do not form an array"),
    "pieces of two dtypes": (pieces((4,), {"0": array(), "1": array((2,), "int32")}), "do not form an array"),
    "pieces of another number": (pieces(chunks={"1": array(), "2": array()}), "a tuple of 2 lacks the key '0'"),
    "pieces that are no arrays": (pieces(chunks={"0": 5}), "a piece of an array is of msgpack type int"),
    "pieces of impossible shape": (pieces((1 << 40, 1 << 40)), "impossible shape"),
    "pieces in a list": (pieces(chunks=[array()]), "a tuple is of msgpack type array"),
    "pieces beside others": (pieces(x=array()), "'a/bias/__msgpack_chunked_array__' is of msgpack type bool"),
    "pieces without shape": (tree({"__msgpack_chunked_array__": True, "chunks": {}, "x": 1}), "array in pieces with"),
    "mark is no mark": (pieces(__msgpack_chunked_array__=1), "_array__' is of msgpack type int"),
    "whole is in pieces": (msgpack.packb(msgpack.unpackb(pieces())["a"]["bias"]), "expected an array or a map"),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_a_malformed_file_is_one_typed_error_that_names_it(case, tmp_path):
    content, message = MALFORMED[case]
    (tmp_path / SINGLE_FILE).write_bytes(content)
    with pytest.raises(CheckpointError, match=f"{SINGLE_FILE}: .*{message}"):
        read_msgpack(tmp_path / SINGLE_FILE)


def test_the_cases_differ_from_good_files_by_their_fault_alone(tmp_path):
    for content, count in ((GOOD, 2), (pieces(), 4)):
        (tmp_path / SINGLE_FILE).write_bytes(content)
        assert read_msgpack(tmp_path / SINGLE_FILE).tensors["a.bias"].read().tolist() == [0] * count


def test_pieces_in_any_order_of_keys_are_read(tmp_path):
    """A writer that sorts keys puts the tenth piece before the second."""
    ramp = np.arange(24, dtype=np.float32).reshape(2, 12)
    chunks = {str(i): array((2,), data=ramp.reshape(-1)[2 * i : 2 * i + 2].tobytes()) for i in range(12)}
    entries = {"chunks": dict(sorted(chunks.items())), "shape": {"0": 2, "1": 12}}
    (tmp_path / "t").write_bytes(tree({"__msgpack_chunked_array__": True} | entries, "a/kernel"))
    info = read_msgpack(tmp_path / "t").tensors["a.weight"]
    np.testing.assert_array_equal(info.read(), ramp.T)
    (tmp_path / "t").write_bytes(b"")
    with pytest.raises(SourceError, match=r"ends inside tensor 'a\.weight'"):
        info.read()


def mutations(content, count):
    """Copies of a file with a byte changed, inserted or removed, bits flipped in several places, or the end missing."""
    rng = random.Random(0)
    for _ in range(count):
        data = bytearray(content)
        for _ in range(rng.choice([1, 1, 1, 3])):
            position, byte = rng.randrange(len(data)), rng.choice([rng.randrange(256), 0xFF, 0xDF, 0xC9, 0x80])
            change = rng.randrange(4)
            if change == 0:
                data[position] = byte
            elif change == 1:
                data.insert(position, byte)
            elif change == 2:
                del data[position]
            else:
                data[position] ^= 1 << rng.randrange(8)
        yield bytes(data[: rng.randrange(len(data))] if rng.random() < 0.1 else data)


@pytest.mark.parametrize("base", ["small", "pieces", "flaxbert"])
def test_any_damage_is_read_or_refused_but_never_anything_else(base, tmp_path):
    content = {"small": GOOD, "pieces": pieces(), "flaxbert": (DATA / "single" / SINGLE_FILE).read_bytes()}[base]
    file, refused = tmp_path / SINGLE_FILE, 0
    for damaged in mutations(content, 700):
        file.write_bytes(damaged)
        try:
            for info in read_msgpack(file).tensors.values():
                assert info.read().shape == info.shape
                assert info.nbytes <= len(damaged)
        except BertjaxError as error:
            refused += 1
            assert str(file) in str(error)
    assert refused > 50


def test_a_file_of_very_many_entries_is_refused_soon(tmp_path):
    many = {str(i): {} for i in range(100_000)}
    for content in (msgpack.packb(many), msgpack.packb({str(i): many for i in range(3)})):
        (tmp_path / SINGLE_FILE).write_bytes(content)
        start = time.process_time()
        with pytest.raises(CheckpointError, match="more than 65536 entries"):
            read_msgpack(tmp_path / SINGLE_FILE)
        assert time.process_time() - start < 10


def test_the_deepest_model_that_a_config_may_ask_for_is_read(tmp_path):
    contents = read_msgpack(DATA / "single" / SINGLE_FILE)
    layer = [info for name, info in contents.tensors.items() if "layer.0." in name]
    zero = np.zeros((), np.float16)
    deep = [
        TensorToWrite(info.name.replace("layer.0.", f"layer.{i}."), zero.dtype, (), lambda: zero)
        for i in range(1024)
        for info in [*layer, dataclasses.replace(layer[0], name="layer.0.attention.self.distance_embedding.weight")]
    ]
    write_msgpack(tmp_path / "t", deep)
    assert len(read_msgpack(tmp_path / "t").tensors) == 17 * 1024


def test_what_cant_be_read_is_named_and_never_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    for name in ("pipe", "folder"):
        with pytest.raises(SourceError, match=f"{name}: can't be read .*not a regular file"):
            read_msgpack(tmp_path / name)
    with pytest.raises(SourceError, match=r"missing: can't be read .*No such file"):
        read_msgpack(tmp_path / "missing")


def test_bfloat16_is_kept(tmp_path):
    values = np.array([[1.5, -2.25, 3e38]], ml_dtypes.bfloat16)
    write_msgpack(tmp_path / "t", to_write({"a.weight": values}))
    assert same(read_msgpack(tmp_path / "t").tensors["a.weight"].read(), values)
