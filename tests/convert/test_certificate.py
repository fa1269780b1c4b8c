"""The certificate: what it says is so, all that changes afterwards is caught, and it may itself come from anyone."""

import hashlib
import json
import os
import shutil

import ml_dtypes
import numpy as np
import pytest
from conftest import DATA
from safetensors.numpy import load_file, save_file

from bertjax import convert_checkpoint
from bertjax.convert import certificate
from bertjax.convert.layout import LAYOUT_FILE
from bertjax.convert.sources import open_weights
from bertjax.errors import BertjaxError, CheckpointError, SourceError

PLAIN = DATA / "golden" / "plain"
TENSORS = load_file(PLAIN / "model.safetensors")
CONFIG = json.loads((PLAIN / "config.json").read_text())
WORDS, TARGETS = "bert.embeddings.word_embeddings.weight", ("safetensors", "msgpack", "orbax")
DECODER, POSITIONS = "cls.predictions.decoder.weight", "bert.embeddings.position_ids"


def put(folder, tensors, **fields):
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(CONFIG | fields))
    (folder / "vocab.txt").write_text("[PAD]\n[UNK]\n")
    return folder


def convert(source, target, **options):
    """Converts, and returns the certificate."""
    path = target.with_suffix(".json")
    convert_checkpoint(source, target, certify=path, force=True, **options)
    return json.loads(path.read_text())


def fates(content):
    return {tensor["name"]: tensor for tensor in content["tensors"]}


@pytest.fixture(scope="module")
def tied(tmp_path_factory):
    """A masked language model with both repetitions and a buffer among its tensors, spelt as in 2019."""
    width, vocabulary = CONFIG["hidden_size"], CONFIG["vocab_size"]
    tensors = {f"bert.{name}": array for name, array in TENSORS.items() if not name.startswith("pooler")}
    tensors |= {
        DECODER: tensors[WORDS],
        "cls.predictions.bias": np.arange(vocabulary, dtype=np.float32),
        "cls.predictions.decoder.bias": np.arange(vocabulary, dtype=np.float32),
        "cls.predictions.transform.dense.weight": np.eye(width, dtype=np.float32),
        "cls.predictions.transform.dense.bias": np.zeros(width, np.float32),
        "cls.predictions.transform.LayerNorm.weight": np.ones(width, np.float32),
        "cls.predictions.transform.LayerNorm.bias": np.zeros(width, np.float32),
        POSITIONS: np.arange(CONFIG["max_position_embeddings"])[None],
    }
    tensors = {name.replace("LayerNorm.weight", "LayerNorm.gamma"): array for name, array in tensors.items()}
    tensors = {name.replace("LayerNorm.bias", "LayerNorm.beta"): array for name, array in tensors.items()}
    return put(tmp_path_factory.mktemp("tied") / "source", tensors, architectures=["BertForMaskedLM"])


@pytest.fixture(scope="module")
def made(tied, tmp_path_factory):
    """The model above in every format, each with its certificate beside it."""
    folder = tmp_path_factory.mktemp("made")
    for to in TARGETS:
        convert(tied, folder / to, to=to)
    return folder


@pytest.fixture(params=TARGETS)
def copy(request, made, tmp_path):
    """A converted folder to tamper with, and its certificate."""
    shutil.copytree(made / request.param, tmp_path / "model")
    shutil.copy(made / f"{request.param}.json", tmp_path / "certificate.json")
    return tmp_path / "model", tmp_path / "certificate.json"


@pytest.mark.parametrize("to", TARGETS)
def test_every_tensor_is_accounted_for_in_every_format(to, tied, made):
    content = json.loads((made / f"{to}.json").read_text())
    source = load_file(tied / "model.safetensors")
    found = fates(content)
    assert found.keys() == source.keys()
    for name, tensor in found.items():
        digest = hashlib.sha256(source[name].tobytes()).hexdigest()
        assert tensor["before"] == {
            "dtype": source[name].dtype.name, "shape": list(source[name].shape), "sha256": digest
        }  # fmt: skip
        if tensor["after"] is not None:
            assert tensor["after"]["sha256"] == digest
    others = {name: tensor for name, tensor in found.items() if tensor["fate"] != "kept"}
    assert {name: (tensor["fate"], tensor.get("of")) for name, tensor in others.items()} == {
        DECODER: ("repeated", WORDS),
        "cls.predictions.decoder.bias": ("repeated", "cls.predictions.bias"),
        POSITIONS: ("buffer", None),
    }
    if to == "safetensors":
        assert all(tensor["after"]["name"] == name for name, tensor in found.items())
    else:
        assert all(tensor["after"] is None and tensor["why"] == f"{LAYOUT_FILE} says so" for tensor in others.values())
    assert content["totals"]["tensors"] == len(source)
    assert content["totals"]["byte_for_byte_the_same"] == len(source) - (0 if to == "safetensors" else 3)
    assert content["casts"] == {}
    assert content["aliases"]["read"]["layer_norm"] == "gamma, beta"
    assert content["aliases"]["written"]["repeated"] == [DECODER, "cls.predictions.decoder.bias"]


@pytest.mark.parametrize("to", TARGETS)
def test_every_file_is_listed_with_its_hash(to, tied, made):
    content = json.loads((made / f"{to}.json").read_text())
    for side, folder in (("source", tied), ("target", made / to)):
        for file in content[side]["files"]:
            data = (folder / file["name"]).read_bytes()
            assert (file["bytes"], file["sha256"]) == (len(data), hashlib.sha256(data).hexdigest())
    assert {file["name"] for file in content["source"]["files"]} == {"model.safetensors", "config.json", "vocab.txt"}
    present = {path.relative_to(made / to).as_posix() for path in (made / to).rglob("*") if path.is_file()}
    assert {file["name"] for file in content["target"]["files"]} == present
    assert {"config.json", "vocab.txt"} <= set(content["target"]["same_as_source"])


@pytest.mark.parametrize("to", TARGETS)
def test_an_untouched_folder_passes(to, made):
    path = made / f"{to}.json"
    count = sum(1 for tensor in json.loads(path.read_text())["tensors"] if tensor["after"])
    assert certificate.check(path, made / to).startswith(f"{made / to}: {count} tensors and ")


@pytest.mark.parametrize("to", ["msgpack", "orbax"])
def test_what_the_layout_gives_back_is_certified_too(to, tied, made, tmp_path):
    content = convert(made / to, tmp_path / "back")
    back = {name: tensor for name, tensor in fates(content).items() if tensor["before"] is None}
    assert back.keys() == {DECODER, "cls.predictions.decoder.bias", POSITIONS}
    assert {tensor["why"] for tensor in back.values()} == {f"{LAYOUT_FILE} of the source says so"}
    assert (tmp_path / "back" / "model.safetensors").read_bytes() == (tied / "model.safetensors").read_bytes()
    assert "45 tensors" in certificate.check(tmp_path / "back.json", tmp_path / "back")
    assert LAYOUT_FILE in {file["name"] for file in content["source"]["files"]}


def test_a_cast_is_named_and_its_hash_is_that_of_the_cast_numbers(tied, tmp_path):
    content = convert(tied, tmp_path / "out", dtype="bfloat16")
    assert content["casts"] == {"float32 to bfloat16": 44}  # all but the buffer
    after = fates(content)[WORDS]["after"]
    expected = TENSORS[WORDS.removeprefix("bert.")].astype(ml_dtypes.bfloat16)
    assert after["sha256"] == hashlib.sha256(expected.tobytes()).hexdigest()
    assert after["dtype"] == "bfloat16"
    assert "cast" not in fates(content)[POSITIONS]
    assert content["totals"]["byte_for_byte_the_same"] == 1
    certificate.check(tmp_path / "out.json", tmp_path / "out")
    again = convert(tmp_path / "out", tmp_path / "again", dtype="bfloat16")
    assert again["casts"] == {}


def test_standard_names_go_without_repetitions_and_buffers(tied, tmp_path):
    content = convert(tied, tmp_path / "out", standard_names=True)
    assert content["aliases"]["written"] == {
        "prefix": "bert.", "layer_norm": "weight, bias", "spellings": {}, "repeated": [], "buffers": []
    }  # fmt: skip
    found = fates(content)
    assert found["bert.embeddings.LayerNorm.gamma"]["after"]["name"] == "bert.embeddings.LayerNorm.weight"
    assert found[DECODER]["why"] == "standard names go without"
    certificate.check(tmp_path / "out.json", tmp_path / "out")


def test_another_encoders_tensors_are_left_out_with_their_hashes(tmp_path):
    tensors = {f"{side}.{name}": array for side in "ab" for name, array in TENSORS.items()}
    content = convert(put(tmp_path / "source", tensors), tmp_path / "out", prefix="b.")
    assert content["totals"]["kept"] == content["totals"]["left out"] == len(TENSORS)
    entry = fates(content)["a.pooler.dense.bias"]
    assert entry["before"]["sha256"] == hashlib.sha256(TENSORS["pooler.dense.bias"].tobytes()).hexdigest()
    assert (entry["fate"], entry["why"]) == ("left out", "belongs to another encoder")
    certificate.check(tmp_path / "out.json", tmp_path / "out")


def test_tensorflows_names_and_the_optimisers_state_are_in_it(tmp_path):
    content = convert(DATA / "tf1" / "pretrained", tmp_path / "out")
    found = fates(content)
    assert found["bert/pooler/dense/kernel/adam_m"] == {
        "name": "bert/pooler/dense/kernel/adam_m", "fate": "left out", "why": "optimiser state"
    }  # fmt: skip
    assert found["bert.pooler.dense.weight"]["before"]["called"] == "bert/pooler/dense/kernel"
    assert "bert_config.json" in {file["name"] for file in content["source"]["files"]}
    certificate.check(tmp_path / "out.json", tmp_path / "out")


def test_a_snapshot_of_the_hub_is_named_with_its_commit(tmp_path):
    folder = tmp_path / "models--some--model" / "snapshots" / "0123abc"
    folder.parent.mkdir(parents=True)
    source = convert(put(folder, TENSORS), tmp_path / "out")["source"]
    assert (source["repository"], source["commit"]) == ("some/model", "0123abc")
    assert "repository" not in convert(tmp_path / "out", tmp_path / "again")["source"]


@pytest.mark.parametrize("to", ["safetensors", "msgpack"])
def test_the_same_conversion_gives_the_same_certificate(to, tied, made, tmp_path):
    convert(tied, tmp_path / to, to=to)
    assert (tmp_path / f"{to}.json").read_bytes() == (made / f"{to}.json").read_bytes()


def test_it_is_printed_with_a_line_for_each_tensor(made):
    content = json.loads((made / "orbax.json").read_text())
    text = certificate.dumps(content)
    assert json.loads(text) == content
    assert sum(line.startswith('  {"name": ') for line in text.splitlines()) == len(content["tensors"])
    assert len(text.splitlines()) < len(content["tensors"]) + 60


def tamper(folder, change):
    """Changes the tensors of a folder of safetensors."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def refusal(path, folder, kind=CheckpointError):
    with pytest.raises(kind) as error:
        certificate.check(path, folder)
    return str(error.value)


def test_one_changed_bit_in_any_file_is_caught(copy):
    folder, path = copy
    for file in sorted(each for each in folder.rglob("*") if each.is_file() and each.stat().st_size):
        data = file.read_bytes()
        for place in (0, len(data) // 2, len(data) - 1):
            file.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
            assert f"{file.relative_to(folder).as_posix()}: its bytes have changed" in refusal(path, folder)
        file.write_bytes(data + b" ")
        assert f"{len(data) + 1:,} bytes, expected {len(data):,}" in refusal(path, folder)
        file.unlink()
        assert f"{file.relative_to(folder).as_posix()}: missing" in refusal(path, folder)
        file.write_bytes(data)
    certificate.check(path, folder)


def changed(name, change):
    return lambda tensors: tensors.update({name: change(tensors[name])})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (changed(WORDS, lambda x: x + 1), f"{WORDS}: its numbers have changed"),
        (changed(WORDS, lambda x: x.astype(np.float64)), f"{WORDS}: is float64[40, 16], expected float32[40, 16]"),
        (changed(WORDS, lambda x: x.reshape(16, 40)), f"{WORDS}: is float32[16, 40], expected float32[40, 16]"),
        (lambda tensors: tensors.pop(WORDS), f"{WORDS}: missing"),
        (lambda tensors: tensors.update(x=np.zeros(1)), "x: a tensor that the certificate does not have"),
        (lambda tensors: tensors.update(x=tensors.pop(WORDS)), f"{WORDS}: missing; x: a tensor"),
    ],
)
def test_a_changed_tensor_is_named(change, message, made, tmp_path):
    shutil.copytree(made / "safetensors", tmp_path / "model")
    tamper(tmp_path / "model", change)
    assert message in refusal(made / "safetensors.json", tmp_path / "model")


def test_the_tensors_hashes_are_compared_and_not_only_the_files(made, tmp_path):
    content = json.loads((made / "safetensors.json").read_text())
    fates(content)[WORDS]["after"]["sha256"] = "0" * 64
    (tmp_path / "c.json").write_text(json.dumps(content))
    assert f"1 difference(s) from {tmp_path / 'c.json'}: {WORDS}: its numbers" in refusal(
        tmp_path / "c.json", made / "safetensors"
    )


@pytest.mark.parametrize("name", ["tokenizer.json", "model.safetensors.index.json", "1_Pooling/config.json", "x.py"])
def test_a_file_that_was_put_in_later_is_caught(name, copy):
    folder, path = copy
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_text("{}")
    assert f"{name}: a file that the certificate does not have" in refusal(path, folder)


def test_notes_hidden_files_and_the_certificate_itself_may_be_added(copy):
    folder, path = copy
    for name in ("README.md", "LICENSE", ".gitattributes", ".git/config"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("x")
    shutil.move(path, folder / "certificate.json")
    certificate.check(folder / "certificate.json", folder)


def test_pipes_and_links_are_differences_and_never_waited_for(copy, tmp_path):
    folder, path = copy
    for name in ("config.json", "vocab.txt"):
        shutil.move(folder / name, tmp_path / name)
    os.mkfifo(folder / "config.json")
    os.mkfifo(folder / "other.json")
    (folder / "vocab.txt").symlink_to(tmp_path / "vocab.txt")
    (folder / "dangling").symlink_to("nowhere")
    (folder / "loop").symlink_to("loop")
    message = refusal(path, folder)
    assert "config.json: missing" in message
    assert "vocab.txt: is a link out of the model's folder" in message
    for name in ("other.json", "dangling", "loop"):
        assert f"{name}: a file that the certificate does not have" in message


@pytest.mark.parametrize("name", ["model.safetensors", "flax_model.msgpack", "pytorch_model.bin"])
def test_weights_that_are_a_pipe_are_never_waited_for(name, copy):
    folder, path = copy
    (folder / name).unlink(missing_ok=True)
    os.mkfifo(folder / name)
    assert name in refusal(path, folder)


def test_the_source_is_recognised(tied, made):
    message = refusal(made / "msgpack.json", tied)
    assert message.startswith(f"{tied}: is what {made / 'msgpack.json'} was converted from, unchanged")


def test_what_is_no_folder_is_refused(made):
    for folder in (made / "nowhere", made / "orbax.json"):
        assert f"{folder}: no such folder" in refusal(made / "orbax.json", folder, SourceError)
    assert "nowhere.json" in refusal(made / "nowhere.json", made / "orbax", SourceError)


FILE = {"name": "config.json", "bytes": 1, "sha256": "0" * 64}
LOOK = {"name": "a", "dtype": "float32", "shape": [1], "sha256": "0" * 64}


def content(files=(), looks=(), **fields):
    source = {"files": []}
    tensors = [{"name": "a", "fate": "kept", "after": look} for look in looks]
    return {"bertjax_certificate": 1, "source": source, "target": {"files": list(files)}, "tensors": tensors} | fields


WRONG = (None, True, -1, 1.5, "", "x", [], {}, [[]], {"name": 1})
HOSTILE = [
    *(content([FILE | {key: value}]) for key in FILE for value in WRONG if (key, value) != ("name", "x")),
    *(content(looks=[LOOK | {key: value}]) for key in LOOK for value in WRONG
      if (key, value) not in (("name", "x"), ("shape", []))),
    *(content([{key: value for key, value in FILE.items() if key != missing}]) for missing in FILE),
    *(content(looks=[{key: value for key, value in LOOK.items() if key != missing}]) for missing in LOOK),
    *(content([FILE | {"name": name}]) for name in
      ("../x", "/etc/passwd", "a/../../x", "..", ".", "a//b", "a/", "a\0b", "a\nb", "\x1b[2J", "x" * 5000)),
    *(content(looks=[LOOK | {"shape": shape}]) for shape in ([True], ["1"], [[1]], [1.0], [1] * 9, {"1": 1})),
    *(content(looks=[LOOK | {"name": name}]) for name in ("x" * 5000, "a\nb", "\x1b[2J")),
    content([FILE | {"bytes": 1 << 80}]),
    content([FILE, FILE]),
    content(looks=[LOOK, LOOK]),
    *(content(target=value) for value in (*WRONG, {"files": {}}, {"files": "abc"}, {"files": [1]}, {"files": [[]]})),
    *(content(source=value) for value in (*WRONG, {"files": {"a": 1}}, {"files": [FILE, FILE]}, {"files": [None]})),
    *(content(tensors=value) for value in (None, True, 1, "x", {"a": 1}, [1], [None], ["a"], [[1]])),
    *(content(looks=[look]) for look in ("x", 1, [1], ["name"])),
]  # fmt: skip


@pytest.mark.parametrize("case", range(len(HOSTILE)))
def test_a_damaged_or_hostile_certificate_is_one_typed_error(case, tmp_path):
    path = tmp_path / "certificate.json"
    path.write_text(json.dumps(HOSTILE[case]))
    assert refusal(path, tmp_path) == f"{path}: a damaged certificate; convert again to get a new one"


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"bertjax_certificate": 2}', "[" * 200_000, '{"a": "\\ud800"}', "\xff"]
)
def test_what_is_no_certificate_is_refused(text, tmp_path):
    path = tmp_path / "certificate.json"
    path.write_text(text, encoding="latin-1")
    assert str(path) in refusal(path, tmp_path)


def test_names_that_no_file_system_takes_are_missing(tmp_path):
    path = tmp_path / "certificate.json"
    path.write_text(json.dumps(content([FILE | {"name": "x" * 900}, FILE | {"name": "config.json/a"}])))
    (tmp_path / "config.json").write_text("{}")
    message = refusal(path, tmp_path)
    assert f"{'x' * 900}: missing" in message
    assert "config.json/a: missing" in message


def test_an_empty_certificate_certifies_nothing(made, tmp_path):
    path = tmp_path / "certificate.json"
    path.write_text(json.dumps(content()))
    message = refusal(path, made / "safetensors")
    assert "config.json: a file that the certificate does not have" in message
    assert f"{WORDS}: a tensor that the certificate does not have" in message


def test_a_flood_of_differences_is_cut(tmp_path):
    path = tmp_path / "certificate.json"
    path.write_text(json.dumps(content([FILE | {"name": f"x{number}"} for number in range(3000)])))
    assert "; and " in refusal(path, tmp_path)
    assert len(refusal(path, tmp_path)) < 50_000


@pytest.mark.parametrize("to", TARGETS)
def test_a_conversion_that_changes_a_tensor_is_not_certified(to, tied, tmp_path, monkeypatch):
    """The certificate trusts nothing of the conversion: a writer that errs is found out, and nothing is left."""
    from bertjax.convert import bert

    original = bert.Plan.to_write if to != "orbax" else bert.Plan.arrays

    def wrong(self, dtype=None):
        if to == "orbax":
            return ((path, array + 1 if "pooler" not in path else array) for path, array in original(self, dtype))
        tensors = original(self, dtype)
        name = next(name for name in tensors if name.endswith("query.weight"))
        make = tensors[name].make
        tensors[name] = type(tensors[name])(name, tensors[name].dtype, tensors[name].shape, lambda: make() * 2)
        return tensors

    monkeypatch.setattr(bert.Plan, original.__name__, wrong)
    with pytest.raises(CheckpointError, match=r"source: what was written is not what was read: .*query\.weight"):
        convert(tied, tmp_path / "out", to=to)
    assert os.listdir(tmp_path) == []


def test_a_layout_that_makes_tensors_up_is_refused(made, tmp_path):
    """A layout from elsewhere can ask for names that are not BERT's, or that are another tensor's."""
    shutil.copytree(made / "msgpack", tmp_path / "source")
    path = tmp_path / "source" / LAYOUT_FILE
    layout = json.loads(path.read_text())
    for name in ("position_ids", "x.embeddings.position_ids"):
        path.write_text(json.dumps(layout | {"buffers": [[name, [1, 3], "int64"]]}))
        with pytest.raises(BertjaxError, match=f"{LAYOUT_FILE}: does not fit the weights beside it"):
            convert(tmp_path / "source", tmp_path / "out")
    query, key = (f"encoder.layer.0.attention.self.{part}.weight" for part in ("query", "key"))
    path.write_text(json.dumps(layout | {"spellings": [[query, key], [key, query]]}))
    with pytest.raises(BertjaxError, match=f"{LAYOUT_FILE}: does not fit the weights beside it"):
        convert(tmp_path / "source", tmp_path / "out")


def test_buffers_between_wrappers_keep_their_numbers(tmp_path):
    middle = "embeddings._fsdp_wrapped_module."
    tensors = {name.replace("embeddings.", middle, 1): array for name, array in TENSORS.items()}
    tensors[f"{middle}position_ids"] = np.arange(CONFIG["max_position_embeddings"])[None]
    source = put(tmp_path / "source", tensors)
    convert(source, tmp_path / "flax", to="msgpack")
    convert(tmp_path / "flax", tmp_path / "back")
    found = open_weights(tmp_path / "back").tensors
    assert found.keys() == tensors.keys()
    np.testing.assert_array_equal(found[f"{middle}position_ids"].read(), tensors[f"{middle}position_ids"])


def test_a_certificate_that_cant_be_written_is_known_before_anything_is_converted(tied, tmp_path):
    with pytest.raises(SourceError, match="there is no folder"):
        convert_checkpoint(tied, tmp_path / "out", certify=tmp_path / "nowhere" / "c.json")
    assert os.listdir(tmp_path) == []
