"""Names in a checkpoint: what is BERT's is found under any prefix and wrapper, and nothing is bent to fit."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bertjax.convert.files import FORMAT
from bertjax.convert.names import survey
from bertjax.convert.tensors import TensorInfo, WeightFiles
from bertjax.errors import CheckpointError

ANCHOR = "embeddings.word_embeddings.weight"
ENCODER = (
    ANCHOR,
    "embeddings.LayerNorm.weight",
    "embeddings.LayerNorm.bias",
    "encoder.layer.0.attention.self.query.weight",
    "encoder.layer.0.attention.output.LayerNorm.weight",
    "encoder.layer.0.output.LayerNorm.bias",
    "encoder.layer.11.output.dense.bias",
    "pooler.dense.weight",
)
HEADS = (
    "cls.predictions.bias",
    "cls.predictions.decoder.weight",
    "cls.predictions.transform.LayerNorm.weight",
    "cls.seq_relationship.bias",
    "classifier.weight",
    "qa_outputs.bias",
)
WRAPPERS = ("module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")


def weights(*names, index=None, metadata=()):
    """A checkpoint of these names; no file is ever opened for them."""
    tensors = {
        name: TensorInfo(name, Path("folder", f"{position % 2}.safetensors"), np.dtype("f4"), (1,), position)
        for position, name in enumerate(names)
    }
    return WeightFiles(FORMAT, tensors, dict(metadata), {}, Path("folder"), ("0.safetensors",), index)


def surveyed(*names, prefix=None):
    return survey(weights(*names), prefix)


def canonical(found):
    return {name: info.name for name, info in found.tensors.items()}


def refusal(*names, prefix=None):
    with pytest.raises(CheckpointError) as error:
        surveyed(*names, prefix=prefix)
    assert str(error.value).startswith("folder: ")
    return str(error.value)


def old(name):
    return name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")


parts = st.sampled_from(["model", "0", "auto_model", "student", "net", "bert"])


@given(
    st.lists(parts, max_size=3),
    st.sets(st.sampled_from(HEADS)),
    st.booleans(),
    st.lists(st.tuples(st.sampled_from(WRAPPERS), st.integers(0, 9)), max_size=3),
    st.data(),
)
@settings(max_examples=300, deadline=None)
def test_any_spelling_gives_the_same_names_and_comes_back(prefix, heads, legacy, wrappers, data):
    expected = {}
    outer = prefix[:-1] if prefix and prefix[-1] == "bert" else prefix
    for name in (*ENCODER, *sorted(heads)):
        spelt = [*(outer if name in heads else prefix), *(old(name) if legacy else name).split(".")]
        for wrapper, place in wrappers:
            spelt.insert(min(place, len(spelt) - 1), wrapper)
        expected[name] = ".".join(spelt)
    names = data.draw(st.permutations(list(expected.values())))
    found = surveyed(*names)
    assert canonical(found) == expected
    assert (found.strange, found.others, found.legacy_norm) == ((), (), legacy)
    layout = found.layout()
    assert {name: layout.spell(name) for name in expected} == expected


@pytest.mark.parametrize("prefix", ["", "bert.", "model.bert.", "0.auto_model.", "encoder."])
def test_a_regular_prefix_needs_no_spellings_of_its_own(prefix):
    heads = [prefix.removesuffix("bert.") + name for name in HEADS]
    found = surveyed(*(prefix + name for name in ENCODER), *heads)
    assert found.prefix == prefix
    assert found.layout().spellings == ()
    assert found.tensors.keys() == {*ENCODER, *HEADS}


def test_the_prefix_is_that_of_the_file_where_it_is_one():
    assert surveyed(*(f"module.bert.{name}" for name in ENCODER)).prefix == "module.bert."
    inside = surveyed(*(f"bert.{name.replace('.', '.module.', 1)}" for name in ENCODER))
    assert inside.prefix == "bert."
    assert dict(inside.layout().spellings) == {n: f"bert.{n.replace('.', '.module.', 1)}" for n in ENCODER}


def test_two_names_that_differ_by_wrappers_are_refused_together():
    names = [f"module.{name}" for name in ENCODER] + [
        "_orig_mod.pooler.dense.weight",
        "embeddings.module.LayerNorm.bias",
    ]
    message = refusal(*names)
    assert "module.pooler.dense.weight and _orig_mod.pooler.dense.weight are both 'pooler.dense.weight'" in message
    assert "embeddings.module.LayerNorm.bias are both" in message


def test_what_only_contains_a_wrappers_name_is_left_alone():
    found = surveyed(*ENCODER, "module_list.x", "encoder.modules.y")
    assert "encoder.modules.y" in found.tensors
    assert "module_list.x" in found.tensors


@pytest.mark.parametrize("name", ["other.x", "classifier.weight.bert", "bertx.pooler.dense.bias", "pooler.dense.bias"])
def test_what_stands_beside_the_encoder_is_strange(name):
    found = surveyed(*(f"a.bert.{each}" for each in ENCODER), name)
    assert [info.name for info in found.strange] == [name]


def test_heads_stand_beside_bert_and_not_in_it():
    found = surveyed(*(f"bert.{each}" for each in ENCODER), "bert.classifier.weight", "classifier.bias")
    assert "classifier.bias" in found.tensors
    assert [info.name for info in found.strange] == ["bert.classifier.weight"]


def test_the_anchor_must_be_whole():
    for name in ("xembeddings.word_embeddings.weight", "embeddings.word_embeddings.weight.x", "a"):
        assert f"not a BERT (it has {name}, ...)" in refusal(name)
    assert "not a BERT (it has , ...)" in refusal()


TWO = ("query.bert.", "passage.bert.")


@pytest.mark.parametrize(("chosen", "other"), [TWO, TWO[::-1]])
def test_of_two_encoders_one_is_chosen_with_its_heads(chosen, other):
    names = [prefix + name for prefix in TWO for name in ENCODER]
    names += [prefix.removesuffix("bert.") + name for prefix in TWO for name in HEADS]
    assert "2 encoders in one file, under 'query.bert.', 'passage.bert.'; choose one" in refusal(*names)
    found = surveyed(*names, prefix=chosen)
    assert found.tensors.keys() == {*ENCODER, *HEADS}
    assert all(info.name.startswith(chosen[:6]) for info in found.tensors.values())
    assert found.others == tuple(name for name in names if name.startswith(other[:6])), "in the file's order"


@pytest.mark.parametrize(("prefix", "count"), [("", 1), ("teacher.", 1)])
def test_one_encoder_within_anothers_beginning_owns_what_is_longer(prefix, count):
    found = surveyed(*ENCODER, *(f"teacher.{name}" for name in ENCODER), prefix=prefix)
    assert canonical(found) == {name: prefix + name for name in ENCODER}
    assert len(found.others) == len(ENCODER) * count


def test_a_prefix_is_asked_for_as_the_file_spells_it():
    names = [f"module.{side}.{name}" for side in "ab" for name in ENCODER]
    assert surveyed(*names, prefix="module.b.").prefix == "module.b."
    assert "no encoder under the prefix 'b.', only under 'module.a.', 'module.b.'" in refusal(*names, prefix="b.")


def test_very_many_encoders_are_counted_and_not_listed():
    message = refusal(*(f"{number}.{ANCHOR}" for number in range(5000)))
    assert "5000 encoders in one file" in message
    assert len(message) < 500


def test_a_mixture_of_old_and_new_names_is_refused():
    message = refusal(*ENCODER, "encoder.layer.1.output.LayerNorm.gamma")
    assert "spelt both ways, encoder.layer.1.output.LayerNorm.gamma and embeddings.LayerNorm.weight" in message
    assert "both ways" in refusal(*ENCODER, "embeddings.LayerNorm.beta")
    # What belongs to another encoder is that one's.
    two = surveyed(*(f"a.{name}" for name in ENCODER), *(f"b.{old(name)}" for name in ENCODER), prefix="b.")
    assert two.legacy_norm


def test_a_lone_bias_of_the_decoder_is_the_bias_and_comes_back():
    found = surveyed(*ENCODER, "cls.predictions.decoder.bias")
    assert found.tensors["cls.predictions.bias"].name == "cls.predictions.decoder.bias"
    assert "cls.predictions.decoder.bias" not in found.tensors
    assert found.layout().spell("cls.predictions.bias") == "cls.predictions.decoder.bias"
    both = surveyed(*ENCODER, "cls.predictions.decoder.bias", "cls.predictions.bias")
    assert {"cls.predictions.decoder.bias", "cls.predictions.bias"} <= both.tensors.keys()
    assert both.layout().spellings == ()


def test_shards_and_header_are_kept_for_safetensors_only():
    single = survey(weights(*ENCODER, metadata={"format": "pt", "a": "b"}.items())).layout()
    assert (single.shards, dict(single.metadata)) == ((), {"format": "pt", "a": "b"})
    sharded = survey(weights(*ENCODER, index="x.index.json")).layout()
    assert [shard for _, shard in sharded.shards] == ["0.safetensors", "1.safetensors"] * 4
    other = weights(*ENCODER, index="x.index.json")
    other = WeightFiles(**{**vars(other), "format": "Flax msgpack"})
    assert survey(other).layout().shards == ()


def test_an_encoder_that_another_model_calls_its_own_is_refused():
    for prefix, model in {"roberta.": "RoBERTa", "module.electra.": "ELECTRA", "model.camembert.": "CamemBERT"}.items():
        assert f"this is {model}" in refusal(*(prefix + name for name in ENCODER))
