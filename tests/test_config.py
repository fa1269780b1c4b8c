import dataclasses
import json
import math

import pytest
from conftest import DATA, GOLDEN
from hypothesis import given
from hypothesis import strategies as st
from oracle import require

from bertjax import BertConfig
from bertjax.config import ACTIVATIONS, POSITION_EMBEDDING_TYPES, PRESETS
from bertjax.errors import CheckpointError, ConfigError, SourceError
from bertjax.json_files import read_json
from bertjax.pretrained import abstract_model

WRITTEN = {path.stem: json.loads(path.read_text()) for path in sorted((DATA / "configs").glob("*.json"))}


@pytest.mark.parametrize("version", ["transformers-4.57.1", "transformers-5.23.0"])
def test_what_transformers_writes_is_read_and_comes_back(version):
    for written in WRITTEN[version]:
        config = BertConfig.from_hf(written)
        again = config.to_hf()
        assert {name: again[name] for name in written} == written
        # transformers 5 no longer has the field, and positions are always absolute there
        assert again.keys() - written.keys() <= {"position_embedding_type"}
        assert BertConfig.from_hf(again) == config
        assert BertConfig.from_hf(again).extra == config.extra


def test_what_transformers_writes_today_is_read(tmp_path):
    transformers = require("transformers")
    options = {"hidden_size": 24, "num_attention_heads": 3, "layer_norm_eps": 1e-3, "hidden_act": "relu"}
    options |= {"num_labels": 3, "output_attentions": True}
    transformers.BertConfig(**options).save_pretrained(tmp_path)
    config = BertConfig.from_file(tmp_path / "config.json")
    assert (config.hidden_size, config.head_dim, config.layer_norm_eps, config.hidden_act) == (24, 8, 1e-3, "relu")
    (tmp_path / "config.json").write_text(json.dumps(config.to_hf()))
    theirs = transformers.BertConfig.from_pretrained(tmp_path)
    assert {name: getattr(theirs, name) for name in options} == options
    for field in dataclasses.fields(BertConfig):
        if field.name not in ("extra", "position_embedding_type"):
            assert getattr(theirs, field.name) == getattr(config, field.name), field.name


def test_defaults_are_those_of_transformers():
    theirs, ours = require("transformers").BertConfig().to_dict(), BertConfig().to_hf()
    shared = ours.keys() & theirs.keys()
    assert {name: theirs[name] for name in shared} == {name: ours[name] for name in shared}
    assert ours.keys() - theirs.keys() == {"position_embedding_type"}


SIZES = st.integers(1, 64)


@given(
    st.builds(
        lambda heads, width, **fields: BertConfig(num_attention_heads=heads, hidden_size=heads * width, **fields),
        heads=SIZES,
        width=SIZES,
        vocab_size=st.integers(1, 1 << 24),
        num_hidden_layers=SIZES,
        intermediate_size=SIZES,
        hidden_act=st.sampled_from(ACTIVATIONS),
        hidden_dropout_prob=st.floats(0, 1, exclude_max=True),
        layer_norm_eps=st.floats(0, 1, exclude_min=True, exclude_max=True),
        type_vocab_size=SIZES,
        pad_token_id=st.sampled_from([None, 0]),
        extra=st.dictionaries(st.sampled_from(["id2label", "torch_dtype"]), st.integers()),
    )
)
def test_every_configuration_survives_json(config):
    again = BertConfig.from_hf(json.loads(json.dumps(config.to_hf())))
    assert again == config
    assert hash(again) == hash(config)
    assert again.extra == config.extra


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("tiny", 4_385_920),
        ("mini", 11_170_560),
        ("small", 28_763_648),
        ("medium", 41_373_184),
        ("base", 109_482_240),
        ("large", 335_141_888),
    ],
)
def test_presets_have_the_published_number_of_parameters(name, parameters):
    shapes = abstract_model(BertConfig.preset(name))[1]
    assert sum(map(math.prod, shapes.values())) == parameters


def test_presets_take_overrides_and_unknown_names_are_refused():
    assert set(PRESETS) == {"tiny", "mini", "small", "medium", "base", "large"}
    assert BertConfig.preset("base") == BertConfig()
    assert BertConfig.preset("tiny", vocab_size=99).vocab_size == 99
    with pytest.raises(ConfigError, match=r"'huge'.*tiny, mini"):
        BertConfig.preset("huge")
    with pytest.raises(ConfigError, match=r"unknown preset \['tiny'\]"):
        BertConfig.preset(["tiny"])
    with pytest.raises(ConfigError, match="unknown field 'hidden'"):
        BertConfig.preset("tiny", hidden=99)
    with pytest.raises(ConfigError, match="vocab_size=0"):
        BertConfig.preset("tiny", vocab_size=0)


HUGE = 10**400  # JSON has no limit, and this fits in no float
REFUSED = [
    *(("vocab_size", value) for value in (0, -1, 1.5, "30522", None, True, [1], 10**12, HUGE)),
    *(("hidden_size", value) for value in (-1, 0, "768", 10**12, 768.0, math.nan, True)),
    *(("num_hidden_layers", value) for value in (0, 10**9, None, {})),
    *(("num_attention_heads", value) for value in (0, -12, 7, "12")),
    *(("intermediate_size", value) for value in (0, HUGE)),
    *(("max_position_embeddings", value) for value in (0, -1, HUGE)),
    *(("type_vocab_size", value) for value in (0, None)),
    *(("hidden_act", value) for value in ("gelu_python", "Gelu", "", None, 1, ["gelu"], {"gelu": 1})),
    *(
        (name, value)
        for name in ("hidden_dropout_prob", "attention_probs_dropout_prob")
        for value in (1, -0.1, math.nan, math.inf, "0.1", None, True, HUGE)
    ),
    *(("initializer_range", value) for value in (-1e-9, math.inf, math.nan, "0.02", HUGE)),
    *(("layer_norm_eps", value) for value in (0, -1e-12, 1, math.nan, "1e-12", None, HUGE, -HUGE)),
    *(("pad_token_id", value) for value in (-1, 30522, 0.0, "0", True)),
    *(("position_embedding_type", value) for value in ("relative", "rotary", None, 1, ["relative_key"])),
]
FOREIGN = [
    *(("model_type", value) for value in ("roberta", "xlm-roberta", "distilbert", "electra", None, 1, ["bert"])),
    *((name, True) for name in ("is_decoder", "add_cross_attention", "is_encoder_decoder", "tie_encoder_decoder")),
    ("cross_attention_hidden_size", 64),
    ("pruned_heads", {"0": [1]}),
    ("pruned_heads", [1]),
    ("quantization_config", {"bits": 4}),
    *((name, 1) for name in ("embedding_size", "rotary_emb_base", "n_layers", "ünknown")),
]


def identify(value):
    return json.dumps(value)[:30]


@pytest.mark.parametrize(("name", "value"), REFUSED, ids=identify)
def test_an_unusable_value_is_refused_by_name(name, value, tmp_path):
    with pytest.raises(ConfigError, match=f"{name}="):
        BertConfig(**{name: value})
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert", name: value}))
    with pytest.raises(ConfigError, match=f"config.json: .*{name}=") as error:
        BertConfig.from_file(tmp_path / "config.json")
    assert len(str(error.value)) < 1000


@pytest.mark.parametrize(("name", "value"), FOREIGN, ids=identify)
def test_another_model_is_refused_by_the_field_that_gives_it_away(name, value):
    with pytest.raises(ConfigError, match=name):
        BertConfig.from_hf({"model_type": "bert", "vocab_size": 9, name: value})


def test_every_problem_is_in_one_message():
    wrong = {"model_type": "gpt2", "is_decoder": True, "hidden_size": -1, "hidden_act": "x", "n_ctx": 1, "n_embd": 2}
    with pytest.raises(ConfigError) as error:
        BertConfig.from_hf(wrong)
    for name in wrong:
        assert name in str(error.value)


def test_sizes_must_divide_and_fit():
    with pytest.raises(ConfigError, match="hidden_size=770 is not divisible by num_attention_heads=12"):
        BertConfig(hidden_size=770)
    with pytest.raises(ConfigError, match="pad_token_id=5 is outside the vocabulary of 5"):
        BertConfig(vocab_size=5, pad_token_id=5)


def test_harmless_values_and_ignored_fields_are_accepted():
    harmless = {"is_decoder": False, "pruned_heads": {}, "quantization_config": None, "mystery": [1, {"a": None}]}
    with pytest.raises(ConfigError, match=r"'mystery'.*ignore"):
        BertConfig.from_hf(harmless)
    config = BertConfig.from_hf(harmless, ignore=["mystery"])
    assert config.extra == BertConfig.from_hf(harmless, ignore="mystery").extra == harmless
    assert BertConfig.from_hf({}) == BertConfig()  # the oldest configs name no model_type


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not valid JSON"),
        (b"{", "not valid JSON"),
        (b"\xef\xbb\xbf{}", "not valid JSON"),
        (b'{"a": "\xff"}', "not UTF-8"),
        (b"[]", "holds a JSON list"),
        (b"null", "holds a JSON NoneType"),
        (b'{"a":' * 200_000, "not valid JSON"),
        (b"[" * 200_000 + b"]" * 200_000, "not valid JSON"),
        (b'{"vocab_size": 1' + b"0" * 10_000 + b"}", "not valid JSON"),
        (b'{"is_decoder": ' + b"[" * 500 + b"]" * 500 + b"}", "is_decoder="),
        (b'{"hidden_act": "' + b"x" * 1_000_000 + b'"}', "hidden_act="),
    ],
    ids=lambda value: repr(value)[:20],
)
def test_a_file_that_is_not_a_json_object_is_refused_by_name(content, message, tmp_path):
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ConfigError, match=f"config.json: .*{message}") as error:
        BertConfig.from_file(tmp_path / "config.json")
    assert len(str(error.value)) < 1000


def test_a_missing_or_enormous_file_is_refused(tmp_path):
    with pytest.raises(SourceError, match=r"config.json: can't be read \(No such file"):
        BertConfig.from_file(tmp_path / "config.json")
    (tmp_path / "config.json").mkdir()
    with pytest.raises(SourceError, match=r"config.json: can't be read \(Is a directory"):
        BertConfig.from_file(tmp_path / "config.json")
    with open(tmp_path / "index.json", "wb") as file:
        file.truncate(1 << 40)  # sparse: it takes no space
    with pytest.raises(CheckpointError, match=r"index.json: larger than"):
        read_json(tmp_path / "index.json", CheckpointError)


def test_golden_configurations_are_read():
    assert len({BertConfig.from_file(folder / "config.json") for folder in GOLDEN}) == len(GOLDEN)


@pytest.mark.parametrize("kind", POSITION_EMBEDDING_TYPES)
def test_every_kind_of_position_is_read_and_comes_back(kind):
    config = BertConfig.from_hf({"position_embedding_type": kind})
    assert config.position_embedding_type == config.to_hf()["position_embedding_type"] == kind


LABELS = {"0": "a", "1": "b", "2": "c"}


def test_what_heads_need_is_read_when_it_is_asked():
    config = BertConfig(hidden_dropout_prob=0.3)
    assert (config.num_labels, config.classifier_dropout, config.tie_word_embeddings) == (2, 0.3, True)
    config = BertConfig.from_hf({"id2label": LABELS, "classifier_dropout": 0, "tie_word_embeddings": False})
    assert (config.num_labels, config.classifier_dropout, config.tie_word_embeddings) == (3, 0, False)
    for fields in (
        {"num_labels": 5},
        {"num_labels": 5, "id2label": None},
        {"num_labels": 5, "id2label": LABELS | {"3": "d", "4": "e"}},
    ):
        assert BertConfig.from_hf(fields).num_labels == 5
    assert BertConfig.from_hf({"classifier_dropout": None}).classifier_dropout == 0.1


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        ("num_labels", {"num_labels": 2, "id2label": LABELS}, "num_labels=2 but id2label names 3 labels"),
        *(("num_labels", {"num_labels": value}, "num_labels=") for value in (0, -1, True, 2.0, "2", HUGE)),
        *(("num_labels", {"id2label": value}, "id2label=") for value in ({}, [], ["a"], 3, "abc")),
        *(
            ("classifier_dropout", {"classifier_dropout": value}, "classifier_dropout=")
            for value in (1, -0.1, "0.1", True)
        ),
        *(("tie_word_embeddings", {"tie_word_embeddings": value}, "tie_word_embeddings=") for value in (None, 1, "no")),
    ],
    ids=identify,
)
def test_what_heads_need_is_refused_when_it_is_asked(name, fields, message):
    config = BertConfig.from_hf(fields)  # of no consequence to the encoder
    with pytest.raises(ConfigError, match=message):
        getattr(config, name)


def test_labels_are_counted_as_transformers_counts_them():
    for written in (*WRITTEN["transformers-4.57.1"], *WRITTEN["transformers-5.23.0"]):
        theirs = require("transformers").BertConfig.from_dict(written)
        assert BertConfig.from_hf(written).num_labels == theirs.num_labels


def test_labels_have_names_and_numbers():
    config = BertConfig.from_hf({"id2label": {"2": "c", "0": "a", "1": "b"}})
    assert list(config.id2label.items()) == [(0, "a"), (1, "b"), (2, "c")]
    assert config.label2id == {"a": 0, "b": 1, "c": 2}
    assert BertConfig(extra={"id2label": {1: "b", 0: "a"}}).id2label == {0: "a", 1: "b"}
    assert BertConfig().id2label == {0: "LABEL_0", 1: "LABEL_1"}
    assert BertConfig(extra={"num_labels": 1}).label2id == {"LABEL_0": 0}
    assert [
        BertConfig(extra={"problem_type": kind}).problem_type
        for kind in (None, "regression", "single_label_classification", "multi_label_classification")
    ] == [None, "regression", "single_label_classification", "multi_label_classification"]


@pytest.mark.parametrize(
    "label2id",
    [
        None,
        {},
        {"a": 0, "b": 1, "c": 2},
        {"a": 0},  # transformers does not mind that there are fewer
        {"a": "0", "b": "1", "c": "2"},
        {"LABEL_0": 0, "LABEL_1": 1},  # left over from before the labels had names
    ],
)
def test_label2id_is_the_inverse_of_id2label(label2id):
    assert BertConfig(extra={"id2label": LABELS, "label2id": label2id}).label2id == {"a": 0, "b": 1, "c": 2}


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        *(
            ("id2label", {"id2label": value}, message)
            for value, message in (
                ({"1": "a", "2": "b"}, "names 2 labels but not label 0"),
                ({"0": "a", "00": "b"}, "names label 0 twice"),
                ({0: "a", "0": "b"}, "names label 0 twice"),
                ({"0": 0, "1": 1}, "names label 0 0, expected a string"),
                ({"0": None}, "names label 0 None, expected a string"),
                ({"a": "0"}, "has the key 'a', expected the number"),
                ({"-1": "a"}, "has the key '-1'"),
                ({"\u0661": "a"}, "has the key"),
                ({True: "a"}, "has the key True"),
                ({"9" * 5000: "a"}, "has the key '999"),
                ([], "expected an object"),
            )
        ),
        ("id2label", {"num_labels": 0}, "num_labels="),
        *(
            ("label2id", {"id2label": LABELS, "label2id": value}, message)
            for value, message in (
                ({"a": 1}, "'a' is label 1, but id2label says 0; correct one of the two"),
                ({"a": None}, "'a' is label None, but id2label says 0"),
                ({"d": 3}, "'d' is label 3, but id2label has no such name"),
                (["a"], r"label2id=\['a'\]: expected an object"),
            )
        ),
        ("label2id", {"label2id": {"good": 1, "bad": 0}}, "'good' is label 1, but id2label has no such name"),
        ("label2id", {"id2label": {"0": "a", "1": "a"}}, "gives several labels the name 'a'"),
        *(("problem_type", {"problem_type": value}, "problem_type=") for value in ("ranking", "", 1, ["regression"])),
    ],
    ids=identify,
)
def test_labels_that_say_two_things_are_refused_when_they_are_asked(name, fields, message):
    config = BertConfig(extra=fields)
    with pytest.raises(ConfigError, match=message) as error:
        getattr(config, name)
    assert len(str(error.value)) < 400


def test_label_names_are_those_of_transformers():
    for written in (*WRITTEN["transformers-4.57.1"], *WRITTEN["transformers-5.23.0"]):
        theirs = require("transformers").BertConfig.from_dict(written)
        ours = BertConfig.from_hf(written)
        assert (ours.id2label, ours.label2id) == (theirs.id2label, theirs.label2id)
        assert ours.problem_type == theirs.problem_type
