"""What a checkpoint's names were, kept beside formats that can't hold them; the file may come from anyone."""

import json
import os

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bertjax.convert.bert import export
from bertjax.convert.layout import (
    LAYOUT_FILE,
    TIES,
    Layout,
    is_buffer_shape,
    is_head,
    read_layout,
    standard_layout,
    write_layout,
)
from bertjax.convert.tensors import DTYPES, TensorToWrite
from bertjax.errors import BertjaxError, CheckpointError, SourceError

DTYPE_NAMES = [dtype.name for dtype in DTYPES.values()]
# Half a surrogate is in no file that was read as JSON or as a pickle.
text = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
pairs = st.lists(st.tuples(text, text), max_size=4).map(tuple)
buffers = st.tuples(
    st.tuples(text, st.sampled_from(["position_ids", "embeddings.token_type_ids"])).map(".".join),
    st.tuples(st.just(1), st.integers(0, 1 << 20)),
    st.sampled_from(["int32", "int64"]),
)
layouts = st.builds(
    Layout,
    prefix=text,
    legacy_norm=st.booleans(),
    spellings=pairs,
    ties=st.lists(st.sampled_from(sorted(TIES)), max_size=2).map(tuple),
    buffers=st.lists(buffers, max_size=4).map(tuple),
    shards=st.lists(st.tuples(text, st.from_regex(r"[\w.-]{1,9}\.safetensors", fullmatch=True)), max_size=4).map(tuple),
    metadata=pairs,
)


@given(layouts, st.dictionaries(text, st.sampled_from(DTYPE_NAMES), max_size=3))
@settings(max_examples=200, deadline=None)
def test_what_is_written_is_read(tmp_path_factory, layout, dtypes):
    path = tmp_path_factory.getbasetemp() / LAYOUT_FILE
    write_layout(path, layout, dtypes)
    assert read_layout(path) == (layout, dtypes)


def test_the_same_layout_is_the_same_file(tmp_path):
    for name in "ab":
        write_layout(tmp_path / name, Layout(spellings=(("b", "x"), ("a", "y"))), {"b": "float16", "a": "float32"})
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


@pytest.mark.parametrize(
    ("prefix", "legacy", "name", "spelling"),
    [
        ("", False, "embeddings.LayerNorm.weight", "embeddings.LayerNorm.weight"),
        ("bert.", True, "embeddings.LayerNorm.weight", "bert.embeddings.LayerNorm.gamma"),
        ("a.bert.", True, "cls.predictions.transform.LayerNorm.bias", "a.cls.predictions.transform.LayerNorm.beta"),
        ("a.bert.", False, "classifier.weight", "a.classifier.weight"),
        ("model.", False, "qa_outputs.bias", "model.qa_outputs.bias"),
        ("bert.", True, "pooler.dense.weight", "bert.pooler.dense.weight"),
        ("bert.", True, "odd", "spelt.otherwise"),
    ],
)
def test_spelling(prefix, legacy, name, spelling):
    layout = Layout(prefix=prefix, legacy_norm=legacy, spellings=(("odd", "spelt.otherwise"),))
    assert layout.spell(name) == spelling


def test_transformers_own_names():
    pooler, classifier = "pooler.dense.bias", "classifier.bias"
    assert standard_layout([pooler]).spell(pooler) == pooler
    assert standard_layout([pooler, classifier]).spell(pooler) == "bert.pooler.dense.bias"
    assert standard_layout([pooler, classifier]).spell(classifier) == classifier
    assert standard_layout([pooler, classifier]).ties == ()
    # transformers 5 gives a decoder of its own a bias of its own.
    assert standard_layout(["cls.predictions.decoder.weight"]).ties == ("cls.predictions.decoder.bias",)


def test_only_names_of_heads_are_heads():
    heads = ("cls.predictions.bias", "cls.seq_relationship.weight", "classifier.bias", "qa_outputs.weight")
    assert all(map(is_head, heads))
    assert not any(map(is_head, ("pooler.dense.weight", "classifiers.x", "encoder.cls.x", "cls", "bert.classifier.x")))


@pytest.mark.parametrize(
    ("shape", "possible"),
    [((1, 0), True), ((1, 512), True), ((1, 1 << 20), True), ((1, (1 << 20) + 1), False), ((1, -1), False),
     ((512,), False), ((2, 3), False), ((1, 1, 5), False), ((), False)],
)  # fmt: skip
def test_shapes_of_buffers(shape, possible):
    assert is_buffer_shape(shape) == possible


GOOD = {"bertjax_layout": 1, "prefix": "", "legacy_norm": False, "spellings": [], "ties": [], "buffers": [],
        "shards": [], "metadata": [], "dtypes": {}}  # fmt: skip
BUFFER = ["embeddings.position_ids", [1, 4], "int64"]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("prefix", 1),
        ("prefix", None),
        ("legacy_norm", "yes"),
        ("legacy_norm", 1),
        *((field, value) for field in ("spellings", "shards", "metadata")
          for value in (None, {}, "ab", ["ab"], [["a"]], [["a", "b", "c"]], [["a", 1]], [[["a"], "b"]])),
        ("ties", ["pooler.dense.weight"]),
        ("ties", [1]),
        ("ties", [[]]),
        ("ties", "cls.predictions.decoder.weight"),
        ("ties", {"cls.predictions.decoder.weight": 1}),
        ("buffers", [BUFFER] * 5),
        ("buffers", [BUFFER[:2]]),
        ("buffers", ["abc"]),
        ("buffers", {}),
        *(("buffers", [[name, *BUFFER[1:]]]) for name in (1, None, [], "", "pooler.dense.weight", "xposition_ids")),
        *(("buffers", [[BUFFER[0], shape, "int64"]]) for shape in
          (4, [4], [2, 4], [1, 1, 4], [1, -1], [1, 1 << 62], [1, True], [1, 4.0], [1, None], [1, "4"], [[1], 4], [])),
        *(("buffers", [[*BUFFER[:2], dtype]]) for dtype in ("object", "U9", "<i8", 1, None, [])),
        ("dtypes", []),
        ("dtypes", {"a": "object"}),
        ("dtypes", {"a": 1}),
        ("dtypes", {"a": []}),
        ("new", 1),
    ],
)  # fmt: skip
def test_what_is_no_layout_is_refused_by_field(field, value, tmp_path):
    path = tmp_path / LAYOUT_FILE
    path.write_text(json.dumps(GOOD))
    assert read_layout(path) == (Layout(metadata=()), {})
    path.write_text(json.dumps(GOOD | {field: value}))
    with pytest.raises(CheckpointError, match=f"{LAYOUT_FILE}: unusable '{field}'; convert the original"):
        read_layout(path)


@pytest.mark.parametrize("field", GOOD)
def test_every_field_is_needed(field, tmp_path):
    path = tmp_path / LAYOUT_FILE
    path.write_text(json.dumps({name: value for name, value in GOOD.items() if name != field}))
    with pytest.raises(CheckpointError, match=f"{LAYOUT_FILE}: .*{field}"):
        read_layout(path)


@pytest.mark.parametrize("content", ["", "[]", "1", "null", "{", '"x"', '{"bertjax_layout": 2}', "[" * 200_000, "\xff"])
def test_what_is_no_json_object_is_refused(content, tmp_path):
    path = tmp_path / LAYOUT_FILE
    path.write_text(content, encoding="latin-1")
    with pytest.raises(CheckpointError, match=LAYOUT_FILE):
        read_layout(path)


def test_a_file_that_cant_be_read_is_named_and_never_waited_for(tmp_path):
    with pytest.raises(SourceError, match="nowhere"):
        read_layout(tmp_path / "nowhere")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(BertjaxError, match="pipe"):
        read_layout(tmp_path / "pipe")


def tensors(*names):
    return {name: TensorToWrite(name, np.dtype("float32"), (2,), lambda: np.ones(2, np.float32)) for name in names}


HEAD = tensors("embeddings.word_embeddings.weight", "cls.predictions.bias", "pooler.dense.bias")


@pytest.mark.parametrize(
    "lie",
    [
        Layout(spellings=(("pooler.dense.bias", "cls.predictions.bias"),)),
        Layout(spellings=(("pooler.dense.bias", "x"), ("cls.predictions.bias", "x"))),
        Layout(ties=("cls.predictions.decoder.bias", "cls.predictions.decoder.weight"),
               spellings=(("cls.predictions.decoder.bias", "cls.predictions.decoder.weight"),)),
        Layout(buffers=(("a.position_ids", (1, 2), "int64"),) * 2),
        Layout(buffers=(("position_ids", (1, 2), "int64"),), spellings=(("pooler.dense.bias", "position_ids"),)),
    ],
)  # fmt: skip
def test_one_name_for_two_tensors_is_refused_when_they_are_written(lie):
    with pytest.raises(CheckpointError, match="the layout gives several tensors the name"):
        export(HEAD, lie)


def test_ties_and_buffers_are_added_with_what_they_must_hold():
    buffer = ("bert.embeddings.position_ids", (1, 3), "int32")
    found = {
        tensor.name: tensor for tensor in export(HEAD, Layout(prefix="bert.", ties=tuple(TIES), buffers=(buffer,)))
    }
    assert found.keys() == {f"bert.{name}" for name in HEAD if not is_head(name)} | {
        "cls.predictions.bias", *TIES, buffer[0]
    }  # fmt: skip
    np.testing.assert_array_equal(found[buffer[0]].data(), [[0, 1, 2]])
    assert found[buffer[0]].dtype == np.int32
    # Without the head there is nothing to repeat it, whatever the layout says.
    assert [tensor.name for tensor in export(tensors("a"), Layout(ties=tuple(TIES)))] == ["a"]


@pytest.mark.parametrize("buffer", [["embeddings.position_ids", [1, 300], "int8"], ["position_ids", [1, 3], "int64"],
                                    ["embeddings.position_ids", [1, 3], "float32"]])  # fmt: skip
def test_a_buffer_that_no_checkpoint_has_is_refused(buffer, tmp_path):
    write_layout(tmp_path / LAYOUT_FILE, Layout())
    content = json.loads((tmp_path / LAYOUT_FILE).read_text())
    (tmp_path / LAYOUT_FILE).write_text(json.dumps(content | {"buffers": [buffer]}))
    if buffer[2] == "int64":  # its name is for the weights beside it to refuse
        assert read_layout(tmp_path / LAYOUT_FILE)[0].buffers
        return
    with pytest.raises(CheckpointError, match="unusable 'buffers'"):
        read_layout(tmp_path / LAYOUT_FILE)
