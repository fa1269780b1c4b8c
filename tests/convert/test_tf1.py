import os
import random
import re
import time
import tracemalloc
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bertjax.convert.sstable import is_table, masked_crc32c, read_table, read_varint
from bertjax.convert.tensors import DTYPES
from bertjax.convert.tf1 import find_prefix, read_checkpoint, torch_name
from bertjax.errors import BertjaxError, CheckpointError, SourceError

DATA = Path(__file__).parents[1] / "data" / "tf1"
MAGIC = 0xDB4775248B80FB57
FLOAT = 1
NUMBERS = {
    1: "<f4",
    2: "<f8",
    3: "<i4",
    4: "u1",
    5: "<i2",
    6: "i1",
    9: "<i8",
    10: "?",
    14: ml_dtypes.bfloat16,
    19: "<f2",
}
DTYPE_NUMBERS = {np.dtype(dtype): number for number, dtype in NUMBERS.items()}


# A writer of tables and bundles, after the same documents as the readers.


def varint(value):
    value %= 1 << 64
    groups = []
    while value >= 0x80:
        groups.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*groups, value])


def number(field, value):
    return varint(field << 3) + varint(value)


def message(field, value):
    return varint(field << 3 | 2) + varint(len(value)) + value


def entry(shape=(2,), dtype=FLOAT, shard=0, offset=0, size=8, more=b""):
    dims = b"".join(message(2, number(1, dim)) for dim in shape)
    numbers = number(1, dtype) + number(3, shard) + number(4, offset) + number(5, size)
    return numbers + message(2, dims) + varint(6 << 3 | 5) + bytes(4) + more


def header(shards=1, big_endian=0, consumer=0):
    return number(1, shards) + number(2, big_endian) + message(3, number(1, 1) + number(2, consumer))


def seal(contents, compression=0):
    """A block with its trailer."""
    contents += bytes([compression])
    return contents + masked_crc32c(contents).to_bytes(4, "little")


def block(items, restart=16):
    contents, restarts, last = b"", [], b""
    for index, (key, value) in enumerate(items):
        if index % restart == 0:
            restarts.append(len(contents))
            last = b""
        shared = next((at for at, pair in enumerate(zip(key, last, strict=False)) if pair[0] != pair[1]), None)
        shared = min(len(key), len(last)) if shared is None else shared
        contents += varint(shared) + varint(len(key) - shared) + varint(len(value)) + key[shared:] + value
        last = key
    return contents + b"".join(each.to_bytes(4, "little") for each in [*(restarts or [0]), len(restarts) or 1])


def assemble(blocks, compression=0, handles=None):
    """A table of ready blocks, each with a key that none of its own is after."""
    data, found = b"", []
    for key, contents in blocks:
        found.append((key, varint(len(data)) + varint(len(contents))))
        data += seal(contents, compression)
    footer = varint(len(data)) + varint(len(block([])))
    data += seal(block([]))
    index = block(found if handles is None else handles, 1)
    footer += varint(len(data)) + varint(len(index))
    return data + seal(index) + footer.ljust(40, b"\0") + MAGIC.to_bytes(8, "little")


def table(items, per_block=1000, restart=16, mutate=lambda contents: contents, **options):
    items = list(items.items()) if isinstance(items, dict) else items
    parts = [items[start : start + per_block] for start in range(0, len(items), per_block)]
    return assemble([(part[-1][0], mutate(block(part, restart))) for part in parts], **options)


def index_of(entries, **options):
    return table({b"": header()} | {name.encode(): value for name, value in sorted(entries.items())}, **options)


def write(folder, entries, data=bytes(8), prefix="model.ckpt", **options):
    (folder / f"{prefix}.index").write_bytes(index_of(entries, **options))
    (folder / f"{prefix}.data-00000-of-00001").write_bytes(data)
    return folder / prefix


def write_arrays(folder, arrays, shards=1, big_endian=False, **options):
    data, items = [b""] * shards, {b"": header(shards, big_endian)}
    for index, (name, array) in enumerate(sorted(arrays.items(), key=lambda item: item[0].encode())):
        shard = index % shards
        swapped = array.view(f"u{array.itemsize}").byteswap() if big_endian and array.size else array
        dtype = DTYPE_NUMBERS[array.dtype]
        items[name.encode()] = entry(array.shape, dtype, shard, len(data[shard]), array.nbytes)
        data[shard] += swapped.tobytes()
    (folder / "x.ckpt.index").write_bytes(table(items, **options))
    for shard, content in enumerate(data):
        (folder / f"x.ckpt.data-{shard:05}-of-{shards:05}").write_bytes(content)
    return folder / "x.ckpt"


# Checkpoints that TensorFlow wrote


def encoder_names(layers=2):
    norm, dense = ("weight", "bias"), ("weight", "bias")
    yield from (f"bert.embeddings.{kind}_embeddings.weight" for kind in ("word", "position", "token_type"))
    yield from (f"bert.embeddings.LayerNorm.{leaf}" for leaf in norm)
    for layer in range(layers):
        for part in ("attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense"):
            yield from (f"bert.encoder.layer.{layer}.{part}.{leaf}" for leaf in dense)
        for part in ("attention.output.LayerNorm", "intermediate.dense", "output.dense", "output.LayerNorm"):
            yield from (f"bert.encoder.layer.{layer}.{part}.{leaf}" for leaf in norm)
    yield from (f"bert.pooler.dense.{leaf}" for leaf in dense)


HEADS = {
    "pretrained": [
        *(f"cls.predictions.transform.{part}.{leaf}" for part in ("dense", "LayerNorm") for leaf in ("weight", "bias")),
        "cls.predictions.bias",
        "cls.seq_relationship.weight",
        "cls.seq_relationship.bias",
    ],
    "classifier": ["classifier.weight", "classifier.bias"],
}


@pytest.mark.parametrize("case", HEADS)
def test_what_tensorflow_wrote_is_read_under_pytorchs_names(case):
    contents = read_checkpoint(find_prefix(DATA / case))
    assert contents.format == "TensorFlow 1 checkpoint"
    assert contents.tensors.keys() == {*encoder_names(), *HEADS[case]}
    with np.load(DATA / case / "expected.npz") as expected:
        assert {tensor.source for tensor in contents.tensors.values()} == set(expected)
        for name, tensor in contents.tensors.items():
            array = expected[tensor.source]
            array = array.T if tensor.source.endswith("kernel") else array
            assert (tensor.name, tensor.dtype, tensor.shape) == (name, array.dtype, array.shape)
            np.testing.assert_array_equal(tensor.read(), array)


def test_the_optimisers_state_is_left_out_and_named():
    contents = read_checkpoint(DATA / "pretrained" / "bert_model.ckpt")
    slots = {f"{tensor.source}/adam_{slot}" for tensor in contents.tensors.values() for slot in "mv"}
    assert contents.left_out == dict.fromkeys([*slots, "global_step"], "optimiser state")
    assert read_checkpoint(DATA / "classifier" / "model.ckpt-30").left_out == {}


def test_tensors_come_in_the_order_of_the_files():
    tensors = read_checkpoint(DATA / "classifier" / "model.ckpt-30").tensors.values()
    places = [(tensor.file.name, tensor.offset) for tensor in tensors]
    assert places == sorted(places)
    assert {name for name, _ in places} == {f"model.ckpt-30.data-0000{shard}-of-00002" for shard in (0, 1)}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("partitioned.ckpt", "'part': is partitioned.*without a partitioner"),
        ("objects.ckpt", "TensorFlow 2 object checkpoint.*save the model as safetensors"),
        ("first_format.ckpt", "V1 format.*save it again with"),
    ],
)
def test_the_other_kinds_that_tensorflow_writes_are_refused_by_name(name, message):
    with pytest.raises(CheckpointError, match=rf"refused/{re.escape(name)}\S*: .*{message}"):
        read_checkpoint(find_prefix(DATA / "refused" / name))


@pytest.mark.parametrize(
    ("name", "expected"),
    {
        "bert/embeddings/word_embeddings": "bert.embeddings.word_embeddings.weight",
        "embeddings/token_type_embeddings": "embeddings.token_type_embeddings.weight",
        "bert/embeddings/LayerNorm/gamma": "bert.embeddings.LayerNorm.weight",
        "bert/embeddings/layer_normalization/gamma": "bert.embeddings.LayerNorm.weight",
        "bert/encoder/layer_11/attention/self/query/kernel": "bert.encoder.layer.11.attention.self.query.weight",
        "bert/encoder/layer_0/output/layer_normalization_24/beta": "bert.encoder.layer.0.output.LayerNorm.bias",
        "module/bert/pooler/dense/bias": "module.bert.pooler.dense.bias",
        "cls/predictions/output_bias": "cls.predictions.bias",
        "module/cls/predictions/output_bias": "module.cls.predictions.bias",
        "cls/predictions/transform/dense/kernel": "cls.predictions.transform.dense.weight",
        "cls/seq_relationship/output_weights": "cls.seq_relationship.weight",
        "cls/squad/output_weights": "qa_outputs.weight",
        "cls/squad/output_bias": "qa_outputs.bias",
        "output_weights": "classifier.weight",
        "output_bias": "classifier.bias",
        # what is not known keeps its name, so that it is refused under it
        "loss/output_weights": "loss.output_weights",
        "mycls/squad/output_bias": "mycls.squad.output_bias",
        "crf_loss/transitions": "crf_loss.transitions",
        "batch_norm/gamma": "batch_norm.gamma",
        "bert/encoder/layer_x/output": "bert.encoder.layer_x.output",
        "project/kernel": "project.weight",
        "": "",
        "//": "..",
    }.items(),
)
def test_names(name, expected):
    assert torch_name(name) == expected


@pytest.mark.parametrize(
    "name",
    "a/adam_m a/adam_v a/lamb_m a/Adam a/Adam_1 a/AdamWeightDecayOptimizer_1 beta1_power beta2_power_1 global_step "
    "loss_scale good_steps learning_rate".split(),
)
def test_optimiser_state_of_any_dtype_is_left_out(name, tmp_path):
    contents = read_checkpoint(
        write(tmp_path, {name: entry((), dtype=7, size=3), "weight": entry(offset=3)}, bytes(11))
    )
    assert list(contents.tensors) == ["weight"]
    assert list(contents.left_out) == [name]


# Checkpoints of any kind

LEAVES = st.sampled_from(["", "/kernel", "/bias", "_embeddings"])
NAMES = st.builds("{}{}".format, st.text("ab/é", min_size=1, max_size=5), LEAVES)


@st.composite
def arrays(draw):
    result = {}
    for name in draw(st.lists(NAMES, unique_by=torch_name, max_size=40)):
        dtype = draw(st.sampled_from(list(DTYPES.values())))
        shape = draw(st.lists(st.integers(0, 3), max_size=3).map(tuple))
        size = int(np.prod(shape)) * dtype.itemsize
        data = np.frombuffer(draw(st.binary(min_size=size, max_size=size)), np.uint8)
        result[name] = (data & 1 if dtype.kind == "b" else data).view(dtype).reshape(shape)
    return result


@settings(deadline=None, max_examples=150)
@given(arrays(), st.integers(1, 3), st.booleans(), st.integers(1, 40), st.integers(1, 17))
def test_any_tensors_in_any_blocks_shards_and_byte_order_are_read(
    tmp_path_factory, arrays, shards, big_endian, per_block, restart
):
    folder = tmp_path_factory.mktemp("any")
    write_arrays(folder, arrays, shards, big_endian, per_block=per_block, restart=restart)
    found = read_checkpoint(find_prefix(folder)).tensors
    assert {tensor.source for tensor in found.values()} == arrays.keys()
    for tensor in found.values():
        array = arrays[tensor.source]
        array = array.transpose() if tensor.source.split("/")[-1] == "kernel" else array
        assert (tensor.dtype, tensor.shape) == (array.dtype, array.shape)
        assert tensor.read().tobytes() == array.tobytes()


@settings(deadline=None, max_examples=100)
@given(
    st.dictionaries(st.binary(max_size=12), st.binary(max_size=300), min_size=1), st.integers(1, 9), st.integers(1, 9)
)
def test_any_table_is_read(tmp_path_factory, items, per_block, restart):
    file = tmp_path_factory.mktemp("table") / "x.index"
    items = dict(sorted(items.items()))
    file.write_bytes(table(items, per_block, restart))
    assert list(read_table(file).items()) == list(items.items())
    assert is_table(file)


def test_the_checksum_is_crc32c_as_its_standard_tests_it():
    """The vectors of RFC 3720, appendix B.4, and the mask undone as LevelDB's crc32c.h does it."""
    for data, expected in (
        (bytes(32), 0x8A9136AA),
        (b"\xff" * 32, 0x62A8AB43),
        (bytes(range(32)), 0x46DD794E),
        (b"123456789", 0xE3069283),
    ):
        rotated = (masked_crc32c(data) - 0xA282EAD8) % (1 << 32)
        assert (rotated >> 17 | rotated << 15) % (1 << 32) == expected


@given(st.integers(0, (1 << 64) - 1), st.binary(max_size=3))
def test_varints(value, before):
    data = before + varint(value)
    assert read_varint(data, len(before), len(data)) == (value, len(data))
    with pytest.raises(ValueError, match="cut off"):
        read_varint(data, len(before), len(data) - 1)


@pytest.mark.parametrize("data", [b"\xff" * 9 + b"\x02", b"\x80" * 10 + b"\0", b"\x80" * 100_000])
def test_a_varint_of_more_than_64_bits_is_refused(data):
    with pytest.raises(ValueError, match="exceeds 64 bits"):
        read_varint(data, 0, len(data))


# Finding a checkpoint


def test_a_checkpoint_is_found_by_its_folder_and_by_any_of_its_files(tmp_path):
    prefix = write(tmp_path, {"a": entry()})
    for name in ("", "model.ckpt", "model.ckpt.index", "model.ckpt.meta", "model.ckpt.data-00000-of-00001"):
        assert find_prefix(tmp_path / name) == prefix
    (tmp_path / "model.ckpt").write_bytes(b"")
    assert find_prefix(tmp_path / "model.ckpt") == prefix


def test_several_checkpoints_in_a_folder_are_listed(tmp_path):
    for step in (10, 20):
        write(tmp_path, {"a": entry()}, prefix=f"model.ckpt-{step}")
    with pytest.raises(
        SourceError, match=r"2 TensorFlow checkpoints \(model.ckpt-10.index; model.ckpt-20.index\).*name"
    ):
        find_prefix(tmp_path)
    assert find_prefix(tmp_path / "model.ckpt-20") == tmp_path / "model.ckpt-20"


def test_what_is_no_checkpoint_of_tensorflow_is_not_found(tmp_path):
    for name in (
        "model.safetensors.index.json",
        "pytorch_model.bin.index.json",
        "lightning.ckpt",
        "x.meta",
        "x.index.txt",
    ):
        (tmp_path / name).write_bytes(b"{}")
    assert find_prefix(tmp_path) is None
    for name in ("lightning.ckpt", "model.safetensors.index.json", "missing", "missing/missing", "missing.index"):
        assert find_prefix(tmp_path / name) is None


@pytest.mark.parametrize("name", ["model.ckpt.data-00000-of-00001", "model.ckpt.meta"])
def test_a_checkpoint_without_its_index_is_named(name, tmp_path):
    (tmp_path / name).write_bytes(b"x")
    for path in ("", name, "model.ckpt", "model.ckpt.index"):
        with pytest.raises(SourceError, match=f"{re.escape(name)}: .*lacks model.ckpt.index"):
            find_prefix(tmp_path / path)


def test_the_first_format_is_refused_in_a_folder_and_beside_its_graph(tmp_path):
    (tmp_path / "model.ckpt").write_bytes((DATA / "refused" / "first_format.ckpt").read_bytes())
    (tmp_path / "model.ckpt.meta").write_bytes(b"x")
    for name in ("", "model.ckpt", "model.ckpt.meta"):
        with pytest.raises(CheckpointError, match=r"model.ckpt: is in TensorFlow's V1 format"):
            find_prefix(tmp_path / name)


def test_what_may_be_of_the_first_format_is_not_opened_through_a_link_out_of_the_folder(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    (tmp_path / "outside").write_bytes((DATA / "refused" / "first_format.ckpt").read_bytes())
    (folder / "model.ckpt").symlink_to(tmp_path / "outside")
    for name in ("", "model.ckpt", "model.ckpt.meta"):
        with pytest.raises(SourceError, match=r"model.ckpt: is a link out of the model's folder"):
            find_prefix(folder / name)


# Malformed checkpoints

GOOD = {"a": entry(), "b": entry(offset=8), "c/kernel": entry((1, 2), offset=16)}
GOOD_INDEX = index_of(GOOD, per_block=2)
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n"
BLOCK = block([(b"", header()), (b"a", entry())])


def raw(*blocks, **options):
    return assemble([(b"z", contents) for contents in blocks], **options)


FILES = {
    "empty": (b"", "the file is empty"),
    "lfs": (LFS, "Git LFS pointer"),
    "html": (b"<!DOCTYPE html>" + bytes(100), "HTML page"),
    "truncated by one byte": (GOOD_INDEX[:-1], "not a TensorFlow index, or is cut off"),
    "footer only": (GOOD_INDEX[-48:], "a block ends at byte .*outside"),
    "too large": (bytes(1 << 18) + GOOD_INDEX, "larger than 262,144 bytes"),
    "checksum": (bytes([GOOD_INDEX[0] ^ 1]) + GOOD_INDEX[1:], "block at byte 0 fails its checksum"),
    "snappy": (index_of(GOOD, compression=1), "compressed with snappy, expected none"),
    "compression 9": (index_of(GOOD, compression=9), "compressed with compression 9"),
    "no keys": (raw(block([])[:0] + bytes(4)), "block at byte 0 holds no keys"),
    "no blocks": (raw(), "holds no keys"),
    "block without restarts": (raw(b"abc"), "holds no keys"),
    "more restarts than bytes": (raw(BLOCK[:-4] + b"\xff" * 4), "holds no keys"),
    "shares more than there is": (raw(varint(9) + varint(0) * 2 + BLOCK[-8:]), "malformed at its byte"),
    "value past the end": (raw(varint(0) * 2 + varint(99) + BLOCK[-8:]), "malformed at its byte"),
    "long key": (raw(block([(b"k" * 600, b"")])), "a key has 600 bytes, expected at most 512"),
    "keys out of order": (table([(b"b", b""), (b"a", b"")]), "key b'a' is not in order after b'b'"),
    "key twice": (table([(b"a", b""), (b"a", b"")], per_block=1), "key b'a' is not in order"),
    "one block twice": (raw(BLOCK, handles=[(b"a", varint(0) + varint(len(BLOCK)))] * 2), "overlaps the one before"),
    "block outside": (raw(BLOCK, handles=[(b"a", varint(1 << 62) + varint(1 << 62))]), "outside the file's"),
    "handle cut off": (raw(BLOCK, handles=[(b"a", b"\x80")]), "cut off"),
    "no header": (table({b"a": entry()}), "table without a header"),
    "header cut off": (table({b"": b"\x08"}), "header is malformed .*cut off"),
    "header of the first format": (table({b"": message(1, b"x")}), "num_shards has wire type 2, expected 0"),
    "no shards": (table({b"": b""}), "header gives 0 data files"),
    "too many shards": (table({b"": header(100_000)}), "header gives 100000 data files"),
    "negative shards": (table({b"": header(-1)}), "header gives -1 data files"),
    "endianness": (table({b"": header(1, 2)}), "endianness 2"),
    "version": (table({b"": header(1, 0, 2)}), "format version 2, expected at most 1"),
    "version malformed": (table({b"": number(1, 1) + message(3, b"\xff")}), "header is malformed"),
}


@pytest.mark.parametrize("case", FILES)
def test_a_malformed_index_is_one_typed_error_that_names_it(case, tmp_path):
    prefix = write(tmp_path, GOOD, bytes(24))
    assert list(read_checkpoint(prefix).tensors) == ["a", "b", "c.weight"]  # differs by the case's fault alone
    content, expected = FILES[case]
    (tmp_path / "model.ckpt.index").write_bytes(content)
    with pytest.raises(CheckpointError, match=f"model.ckpt.index: .*{expected}"):
        read_checkpoint(prefix)


VARIABLES = {
    "field cut off": (b"\x2a\x09", "'a': the entry is malformed .*field 5 is cut off"),
    "no such wire type": (b"\x0b", "field 1 has wire type 3"),
    "wire type of another": (b"\x0d" + bytes(4), "dtype has wire type 5, expected 0"),
    "shape malformed": (message(2, b"\xff"), "'a': the entry is malformed"),
    "dimension malformed": (message(2, message(2, b"\x08")), "'a': the entry is malformed"),
    "unknown rank": (message(2, number(3, 1)), "its shape is unknown"),
    "string": (entry(dtype=7), "'a': has TensorFlow's dtype 7"),
    "no dtype": (entry(dtype=0), "'a': has TensorFlow's dtype 0"),
    "negative dtype": (entry(dtype=-1), "'a': has TensorFlow's dtype -1"),
    "partitioned": (entry(more=message(7, b"")), "'a': is partitioned"),
    "shard": (entry(shard=1), "'a': lies in data file 1 of 1"),
    "negative shard": (entry(shard=-1), "'a': lies in data file -1 of 1"),
    "negative offset": (entry(offset=-8), "'a': has offset -8"),
    "negative size": (entry(size=-8), "'a': has offset 0, size -8"),
    "negative dimension": (entry((-2,)), r"'a': has .*shape \[-2\]; one is negative"),
    "two negative dimensions": (entry((-2, -1)), "one is negative"),
    "size and shape differ": (entry((3,)), r"'a': has 8 bytes, expected 12 for F32\[3\]"),
    "shape overflows": (entry((1 << 62, 4)), "'a' has the impossible shape"),
    "zero beside 2^60": (entry((0, 1 << 60), size=0), "'a' has the impossible shape"),
    "rank 300": (entry((1,) * 299 + (2,)), "'a' has the impossible shape"),
    "overlap": (entry(offset=4), "'b': overlaps 'a' in data file 0"),
}


@pytest.mark.parametrize("case", VARIABLES)
def test_a_malformed_variable_is_named_beside_all_others(case, tmp_path):
    value, expected = VARIABLES[case]
    prefix = write(tmp_path, GOOD | {"a": value, "z": entry(dtype=7, offset=24)}, bytes(32))
    with pytest.raises(CheckpointError, match=r"model.ckpt.index: 2 problem\(s\).*: ") as error:
        read_checkpoint(prefix)
    assert re.search(expected, str(error.value))
    assert "'z': has TensorFlow's dtype 7" in str(error.value)


def test_a_name_that_is_no_text_is_refused(tmp_path):
    prefix = write(tmp_path, GOOD)
    (tmp_path / "model.ckpt.index").write_bytes(table({b"": header(), b"\xff": entry()}))
    with pytest.raises(CheckpointError, match=r"b'\\xff': is not UTF-8"):
        read_checkpoint(prefix)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("a/layer_normalization/gamma", "a/layer_normalization_1/gamma"),
        ("a/LayerNorm/gamma", "a/layer_normalization/gamma"),
        ("a/kernel", "a/weight"),
        ("a.b", "a/b"),
        ("cls/predictions/bias", "cls/predictions/output_bias"),
        ("classifier/weight", "output_weights"),
    ],
)
def test_two_variables_of_one_pytorch_name_are_refused(first, second, tmp_path):
    prefix = write(tmp_path, {first: entry((2, 1)), second: entry((2, 1), offset=8)}, bytes(16))
    with pytest.raises(CheckpointError, match=f"{torch_name(first)}: is '{first}' and '{second}'"):
        read_checkpoint(prefix)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (bytes(23), "has 23 bytes, but 'c/kernel' ends at 24; it is cut off"),
        (b"", "the file is empty"),
        (LFS[:23], "Git LFS pointer"),
    ],
)
def test_data_that_is_not_all_there_is_refused(data, message, tmp_path):
    prefix = write(tmp_path, GOOD, data)
    with pytest.raises(CheckpointError, match=f"model.ckpt.data-00000-of-00001: .*{message}"):
        read_checkpoint(prefix)


def test_missing_files_are_named_together(tmp_path):
    prefix = write_arrays(tmp_path, {name: np.ones(2) for name in "abc"}, shards=3)
    for shard in (0, 2):
        (tmp_path / f"x.ckpt.data-0000{shard}-of-00003").unlink()
    with pytest.raises(
        SourceError, match=r"x.ckpt.index: .*x.ckpt.data-00000-of-00003; x.ckpt.data-00002-of-00003 beside"
    ):
        read_checkpoint(prefix)
    with pytest.raises(SourceError, match=r"no.ckpt.index: can't be read \(No such file"):
        read_checkpoint(tmp_path / "no.ckpt")


@pytest.mark.parametrize("name", ["model.ckpt.index", "model.ckpt.data-00000-of-00001"])
def test_only_regular_files_inside_the_folder_are_opened(name, tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    prefix = write(folder, GOOD, bytes(24))
    (folder / name).rename(tmp_path / name)
    (folder / name).symlink_to(tmp_path / name)
    with pytest.raises(SourceError, match=f"{name}: is a link out of the model's folder"):
        read_checkpoint(prefix)
    for make in (os.mkfifo, os.mkdir):
        (folder / name).unlink()
        make(folder / name)
        with pytest.raises(SourceError, match=f"{name}: is not a regular file"):
            read_checkpoint(prefix)


def mutated(data, rng):
    """Data with one to three bytes changed, put in or taken out, or its end cut off."""
    data = bytearray(data)
    for _ in range(rng.randint(1, 3)):
        position, how = rng.randrange(len(data) + 1), rng.randrange(8)
        if how == 0:
            del data[position:]
        elif how == 1:
            del data[position : position + rng.randint(1, 4)]
        elif how == 2:
            data[position:position] = rng.randbytes(rng.randint(1, 4))
        else:
            data[position : position + 1] = bytes([rng.choice([0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)])])
    return bytes(data)


@pytest.mark.parametrize("where", ["file", "block", "value"])
def test_damage_anywhere_is_read_or_refused_but_never_anything_else(where, tmp_path):
    """Damage to a block or to a value is sealed with a good checksum, so that it reaches what lies behind."""
    table_of = read_table(DATA / "classifier" / "model.ckpt-30.index")
    for shard in range(2):
        name = f"model.ckpt-30.data-0000{shard}-of-00002"
        (tmp_path / name).write_bytes((DATA / "classifier" / name).read_bytes())
    outcomes = {True: 0, False: 0}
    for seed in range(400):
        rng, items = random.Random(seed), dict(table_of)
        if where == "value":
            key = rng.choice(list(items))
            items[key] = mutated(items[key], rng)
        victim, done = rng.randrange(6), iter(range(99))

        def mutate(contents, rng=rng, victim=victim, done=done):
            return mutated(contents, rng) if where == "block" and next(done) == victim else contents

        data = table(items, per_block=7, mutate=mutate)
        (tmp_path / "model.ckpt-30.index").write_bytes(mutated(data, rng) if where == "file" else data)
        try:
            for tensor in read_checkpoint(tmp_path / "model.ckpt-30").tensors.values():
                assert tensor.read().nbytes == tensor.nbytes
            outcomes[True] += 1
        except BertjaxError as error:
            assert str(tmp_path) in str(error)
            outcomes[False] += 1
    assert outcomes[False] > 100
    assert outcomes[True] > 0 or where == "file"


def many_keys(count, length):
    """Long keys that share all but their ends, of a few bytes each in the file."""
    keys = [b"k" * (length - 3) + bytes([65 + i // 2500, 65 + i // 50 % 50, 65 + i % 50]) for i in range(count)]
    return [(b"", header()), *((key, b"") for key in keys)]


HOSTILE = {
    "keys": (lambda: table(many_keys(8_000, 512), 100_000, 100_000), "variables: .*and 7[0-9]{3} more"),
    "more keys": (lambda: table(many_keys(8_500, 60), 100_000, 100_000), "more than 8,192 keys"),
    "dimensions": (lambda: index_of({"a": entry((1,) * 50_000)}), "impossible shape"),
    "fields": (lambda: index_of({"a": number(1, 1) * 130_000}), "'a': has 0 bytes, expected 4"),
    "blocks": (lambda: raw(*[bytes(4)] * 12_000), "holds no keys"),
    "length": (lambda: raw(varint(0) * 2 + varint(1 << 63) + bytes(8)), "malformed"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_index_costs_little_time_and_memory(case, tmp_path):
    make, message = HOSTILE[case]
    prefix = write(tmp_path, {"a": entry()})
    (tmp_path / "model.ckpt.index").write_bytes(make())
    start = time.process_time()
    with pytest.raises(CheckpointError, match=message) as error:
        read_checkpoint(prefix)
    assert time.process_time() - start < 2
    assert len(str(error.value)) < 2 << 20


def test_keys_that_share_their_beginnings_do_not_fill_the_memory(tmp_path):
    (tmp_path / "x.index").write_bytes(HOSTILE["keys"][0]())
    tracemalloc.start()
    try:
        read_table(tmp_path / "x.index")
        assert tracemalloc.get_traced_memory()[1] < 16 << 20
    finally:
        tracemalloc.stop()
