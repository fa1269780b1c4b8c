"""Forty inputs to refuse well, through the public doors; resource limits, an audit hook, and mutated checkpoints.

What a reader says of each fault is tested beside that reader. Here each fault stands in an otherwise valid folder, and
the whole of what a caller does with such a folder is shown to end in one error that says what is wrong and leaves
nothing behind; then all of it again in a process that is limited and watched.
"""

import dataclasses
import io
import json
import os
import re
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import fuzz
import numpy as np
import pytest

import bertjax
from bertjax import BertModel, CheckpointError, ConfigError, SentenceEncoder, SourceError, Tokenizer, TokenizerError

LAYERS = 12
STATE = fuzz.tensors(LAYERS)
WORD, BIAS = "embeddings.word_embeddings.weight", "encoder.layer.3.output.dense.bias"

DOORS = {
    "convert": lambda folder: bertjax.convert_checkpoint(folder, folder.parent / "converted"),
    "load": BertModel.from_pretrained,
    "encode": SentenceEncoder.from_pretrained,
    "tokenize": Tokenizer.from_folder,
}


@dataclasses.dataclass(frozen=True)
class Case:
    """A fault.

    Attributes:
        damage: puts it into a valid folder.
        error: the class that it raises; None: such a folder is accepted.
        message: what the error says.
        doors: where it is met.
    """

    damage: Callable[[Path], object]
    error: type[bertjax.BertjaxError] | None
    message: str = ""
    doors: tuple[str, ...] = ("convert", "load", "encode")


def weights(content: bytes, message: str, name: str = "model.safetensors") -> Case:
    """Weights of one file with a fault in it."""

    def damage(folder):
        (folder / "model.safetensors").unlink()
        fuzz.put(folder, {name: content})

    return Case(damage, CheckpointError, message)


def state(changes: dict[str, np.ndarray | None], message: str) -> Case:
    """Tensors that are not those of the model; None leaves one out."""
    tensors = {name: array for name, array in (STATE | changes).items() if array is not None}
    return weights(fuzz.safetensors(tensors), message)


def header(change: Callable[[dict], object], message: str, tail: bytes = b"") -> Case:
    """A safetensors file whose header says something else than the data."""
    good = fuzz.safetensors(STATE)
    size = int.from_bytes(good[:8], "little")
    content = json.loads(good[8 : 8 + size])
    change(content)
    return weights(fuzz.with_header(json.dumps(content).encode(), good[8 + size :] + tail), message)


def pickled(body: bytes, message: str, protocol: int = 2) -> Case:
    """A PyTorch file with this program for a pickle."""
    content = fuzz.torch_zip(fuzz.program(body, protocol), [bytes(24)])
    return weights(content, rf"pytorch_model\.bin: .*{message}", "pytorch_model.bin")


def tensor(message: str, key: str = "0", shape=(2, 3), **options) -> Case:
    """A state dict of one tensor; storage 0 has six numbers."""
    return pickled(fuzz.state_dict({"a": fuzz.torch_tensor(key, shape, **options)}), message)


def container(content: bytes, message: str) -> Case:
    """A PyTorch file as a whole."""
    return weights(content, rf"pytorch_model\.bin: .*{message}", "pytorch_model.bin")


def index(shard: str, message: str, error=CheckpointError, link: bool = False) -> Case:
    """An index that names this file."""

    def damage(folder):
        (folder / "model.safetensors").rename(folder.parent / "elsewhere.safetensors")
        fuzz.put(folder, {"model.safetensors.index.json": {"weight_map": dict.fromkeys(STATE, shard)}})
        if link:
            (folder / shard).symlink_to(folder.parent / "elsewhere.safetensors")

    return Case(damage, error, message)


def files(contents: dict, error, message: str = "", doors=("convert", "load", "encode")) -> Case:
    """Files that replace those of a valid folder."""
    return Case(lambda folder: fuzz.put(folder, contents), error, message, doors)


def config(message: str, **fields) -> Case:
    return files({"config.json": {**fuzz.config(LAYERS), **fields}}, ConfigError, rf"config\.json: .*{message}")


def vocabulary(lines: list[str], error, message: str = "", end: str = "\n", start: str = "") -> Case:
    return files({"vocab.txt": start + end.join([*lines, ""])}, error, message, ("tokenize", "encode"))


def adapter(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "adapter_model.safetensors")
    fuzz.put(folder, {"adapter_config.json": {"peft_type": "LORA"}})


def twice(name: str) -> bytes:
    """A safetensors file whose header has a key twice."""
    good = fuzz.safetensors(STATE)
    size = int.from_bytes(good[:8], "little")
    entry = json.dumps({name: json.loads(good[8 : 8 + size])[name]})[1:-1].encode()
    return fuzz.with_header(good[8 : 8 + size - 1] + b"," + entry + b"}", good[8 + size :])


def deflated() -> bytes:
    with io.BytesIO() as buffer:
        with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("m/data.pkl", bytes(100 << 20))
        return buffer.getvalue()


def tar() -> bytes:
    with io.BytesIO() as buffer:
        with tarfile.open(fileobj=buffer, mode="w") as file:
            file.addfile(tarfile.TarInfo("storages"), io.BytesIO())
        return buffer.getvalue()


def move(name: str, by: int) -> Callable[[dict], object]:
    return lambda content: content[name].update(data_offsets=[each + by for each in content[name]["data_offsets"]])


def modules(**fields) -> dict:
    return {"modules.json": [fuzz.MODULES[0], {**fuzz.MODULES[1], **fields}]}


GOOD, TORCH = fuzz.safetensors(STATE), fuzz.torch_file(STATE)
LAST = list(STATE)[-1]
CALL = fuzz.group(fuzz.text("true")) + b"R"
# A list that holds the one before twice, a hundred times over: 2^100 leaves.
BOMB = b"](]q\0" + b"".join(b"](h%ch%ceq%c" % (i, i, i + 1) for i in range(100)) + b"e"
ORPHAN = np.zeros((8, 8), "<f4")
ENCODE = ("encode",)

CASES = {
    "1-zero bytes": weights(b"", r"model\.safetensors: the file is empty; the download did not finish"),
    "2-LFS pointer": weights(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "run `git lfs pull`"),
    "3-HTML": weights(b"<!DOCTYPE html><html>Not found", r"model\.safetensors: this is an HTML page, not weights"),
    "4-truncated by one byte": weights(GOOD[:-1], r"model\.safetensors: not a safetensors file"),
    "5-header length 2^63": weights((1 << 63).to_bytes(8, "little") + GOOD[8:], r"model\.safetensors: not a safetens"),
    "6-duplicate JSON key": weights(twice(WORD), rf"model\.safetensors: the header names '{WORD}' twice"),
    "7-overlapping offsets": header(move(LAST, -4), r"model\.safetensors: not a safetensors file"),
    "8-hole": header(move(LAST, 4), r"model\.safetensors: not a safetensors file", bytes(4)),
    "9-trailing bytes": weights(GOOD + b"\0", r"model\.safetensors: not a safetensors file"),
    "10-shape overflow": header(lambda each: each[LAST].update(shape=[1 << 62, 4]), "not a safetensors file"),
    "11-zero beside 2^60": header(
        lambda each: each.update(x={"dtype": "F32", "shape": [0, 1 << 60], "data_offsets": [0, 0]}),
        r"tensor 'x' has the impossible shape \[0, 1152921504606846976\]",
    ),
    "12-unknown dtype": header(lambda each: each[LAST].update(dtype="F31"), "not a safetensors file .*F31"),
    "13-rank 300": header(
        lambda each: each[LAST].update(shape=[1] * 299 + each[LAST]["shape"]), f"tensor '{LAST}' has the impossible sh"
    ),
    "14-NaN": state({BIAS: np.full(8, np.nan, "<f4")}, f"tensor '{BIAS}' holds NaN or infinity"),
    "14-infinity": state({WORD: np.full((12, 8), np.inf, "<f4")}, f"tensor '{WORD}' holds NaN or infinity"),
    "15-layer 7 missing": state(
        {name: None for name in STATE if "layer.7." in name}, r"layer\.7\.attention\.self\.query\.weight: missing"
    ),
    "16-layer 12 extra": state(
        {"encoder.layer.12.output.dense.weight": ORPHAN}, r"layer\.12\.output\.dense\.weight: unexpected tensor F32"
    ),
    "17-gamma and weight": state(
        {"embeddings.LayerNorm.gamma": np.ones(8, "<f4")}, r"spelt both ways, embeddings\.LayerNorm\.gamma and "
    ),
    "18-two towers": weights(
        fuzz.safetensors({f"{tower}.{name}": array for tower in "ab" for name, array in STATE.items()}),
        "2 encoders in one file, under 'a.', 'b.'; choose one with prefix=",
    ),
    "19-adapter only": Case(adapter, SourceError, "adapter_model.safetensors: this is a PEFT adapter.*merge it"),
    "20-int8 weights": state({WORD: np.ones((12, 8), "<i1")}, f"{WORD}: dtype I8; quantised weights are not supp"),
    "21-os.system global": pickled(fuzz.symbol("os", "system") + CALL, "wants to import 'os.system'.*nothing of it"),
    "21-legacy": container(
        fuzz.legacy_file(STATE, fuzz.symbol("os", "system") + CALL), "wants to import 'os.system'.*nothing of it"
    ),
    "22-STACK_GLOBAL": pickled(b"\x8c\2os\x8c\6system\x93" + CALL, "wants to import 'os.system'", 4),
    "23-memo bomb": pickled(fuzz.state_dict({"a": fuzz.torch_tensor("0", (2, 3)), "b": BOMB}), "'b' is a list"),
    "24-string of 4 GiB": pickled(b"X\xff\xff\xff\xff", "a string of 4294967295 bytes"),
    "25-SETITEM on a tuple": pickled(b")" + fuzz.text("a") + b"Ns", "sets items of a tuple"),
    "26-short storage": tensor("tensor 'a' .*24 bytes, but 28 by its description", count=7),
    "27-stride out of range": tensor("tensor 'a' reaches beyond the 6 elements", strides=(4, 1)),
    "27-negative stride": tensor("tensor 'a' has an offset, shape or strides.*negative", strides=(-3, 1)),
    "27-offset out of range": tensor("tensor 'a' reaches beyond the 6 elements", offset=1),
    "27-negative offset": tensor("tensor 'a' has an offset, shape or strides.*negative", offset=-1),
    "28-persistent id": tensor(r"key of a storage is '\.\./\.\./x', expected decimal digits", key="../../x"),
    "29-two data.pkl": container(
        fuzz.torch_zip(b"", [], {"m/x/data.pkl": b""}), r"2 members called data\.pkl, expected one"
    ),
    "30-deflate bomb": container(deflated(), "is compressed, which torch never does"),
    "31-flag": container(TORCH[:6] + b"\1" + TORCH[7:], "its local header and the directory contradict each other"),
    "31-CRC": container(TORCH.replace(b"cpu", b"gpu", 1), "does not have the checksum"),
    "32-tar": container(tar(), "this is a tar archive.*load it with torch"),
    "33-zip behind a pickle": container(
        fuzz.legacy_file(STATE) + TORCH, "bytes follow the last storage; it may be two"
    ),
    "33-pickle behind a zip": container(TORCH + fuzz.legacy_file(STATE), "does not end with the record of its end"),
    "34-dots": index("../elsewhere.safetensors", r"weight_map\['.*'\] is '\.\./else.*', expected a file name in this"),
    "34-absolute": index("/elsewhere.safetensors", r"weight_map\['.*'\] is '/elsewhere.*', expected a file name"),
    "34-escaping link": index("a.safetensors", r"a\.safetensors: is a link out of the model's", SourceError, True),
    "35-hidden_size -1": config("hidden_size=-1: expected an integer from 1 to", hidden_size=-1),
    "35-hidden_size 10^12": config("hidden_size=1000000000000: expected an integer from 1 to", hidden_size=10**12),
    "35-hidden_size text": config("hidden_size='768': expected an integer from 1 to", hidden_size="768"),
    "35-hidden_size NaN": config("hidden_size=nan: expected an integer from 1 to", hidden_size=float("nan")),
    "36-deep config": files({"config.json": '{"a":' * 200_000}, ConfigError, r"config\.json: not valid JSON"),
    "36-deep index": Case(
        lambda folder: (
            fuzz.put(folder, {"pytorch_model.bin.index.json": "[" * 200_000})
            and (folder / "model.safetensors").unlink()
        ),
        CheckpointError,
        r"pytorch_model\.bin\.index\.json: not valid JSON",
    ),
    "36-deep modules": files({"modules.json": "[" * 200_000}, ConfigError, r"modules\.json: not valid JSON", ENCODE),
    "36-deep tokenizer": files(
        {"tokenizer.json": "[" * 200_000}, TokenizerError, r"tokenizer\.json: not a usable tokenizer", ENCODE
    ),
    "37-roberta": config("model_type is 'roberta', bertjax reads 'bert' only", model_type="roberta"),
    "37-roberta relabelled": config(
        "architectures names 'RobertaModel', which is no BERT", architectures=["RobertaModel"]
    ),
    "38-module os.path": files(
        modules(type="os.path"), ConfigError, r"modules\.json: module type 'os\.path' is not supported; known: ", ENCODE
    ),
    "38-module outside": files(modules(path="../x"), ConfigError, r"modules\.json: path '\.\./x' is not the n", ENCODE),
    "38-unknown pooling": files(
        {"1_Pooling/config.json": {"pooling_mode": "best"}}, ConfigError, "pooling_mode 'best' is not one of", ENCODE
    ),
    # As transformers reads them: of a token on two lines the last counts, and CRLF ends a line.
    "39-duplicates": vocabulary([*fuzz.VOCAB[:-1], "a"], None),
    "39-CRLF": vocabulary(fuzz.VOCAB, None, end="\r\n"),
    "39-byte-order mark": vocabulary(
        fuzz.VOCAB, TokenizerError, r"vocab\.txt: line 1 .*byte-order mark", start="\ufeff"
    ),
    "39-no [UNK]": vocabulary(
        ["[PAD]", "x", *fuzz.VOCAB[2:]], TokenizerError, r"vocab\.txt: unk_token is '\[UNK\]', which is none of its 12"
    ),
    "40-more ids than rows": files(
        {"vocab.txt": "\n".join([*fuzz.VOCAB, "more", ""])},
        ConfigError,
        "the tokenizer has ids up to 12, the model's vocabulary ends at 11",
        ENCODE,
    ),
    "40-conflict": Case(
        lambda folder: (
            Tokenizer.from_folder(folder).save_pretrained(folder)
            or fuzz.put(folder, {"tokenizer_config.json": {"do_lower_case": False}})
        ),
        TokenizerError,
        r"do_lower_case is true in tokenizer\.json, but false in tokenizer_config\.json; choose by normalizer=",
        ("tokenize", "encode"),
    ),
}


def box(parent: Path, name: str) -> Path:
    """A valid folder with the case's fault in it, alone in a folder of its own."""
    folder = fuzz.put(parent / re.sub(r"\W+", "_", name) / "model", fuzz.sentence_files(LAYERS))
    CASES[name].damage(folder)
    return folder


def entries(folder: Path) -> dict[str, int]:
    return {str(path.relative_to(folder)): path.lstat().st_size for path in folder.rglob("*")}


def test_all_forty_are_here():
    assert {int(name.partition("-")[0]) for name in CASES} == set(range(1, 41))


@pytest.mark.parametrize("door", DOORS)
def test_the_folder_without_a_fault_is_accepted(door, tmp_path):
    DOORS[door](fuzz.put(tmp_path / "model", fuzz.sentence_files(LAYERS)))


@pytest.mark.parametrize("name", CASES)
def test_one_of_forty(name, tmp_path):
    case, folder = CASES[name], box(tmp_path, name)
    before = entries(tmp_path)
    for door in case.doors:
        if case.error is None:
            DOORS[door](folder)
            continue
        with pytest.raises(case.error, match=f"(?s){case.message}") as caught:
            DOORS[door](folder)
        assert type(caught.value) is case.error
        assert str(folder) in str(caught.value)
        assert len(str(caught.value)) < 20_000
        assert entries(tmp_path) == before, "something was left"


def test_what_stands_where_a_file_should_be_is_refused_without_waiting_for_it(tmp_path):
    for number, name in enumerate(("config.json", "model.safetensors", "modules.json", "1_Pooling/config.json")):
        folder = fuzz.put(tmp_path / str(number), fuzz.sentence_files())
        (folder / name).unlink()
        os.mkfifo(folder / name)
        with pytest.raises(SourceError, match=f"{re.escape(name)}: can't be read .it is not a regular file"):
            SentenceEncoder.from_pretrained(folder)


@pytest.mark.parametrize("shard", ["../escaped.safetensors", "/tmp/escaped.safetensors", "a/b.safetensors", "x"])
def test_a_layout_does_not_choose_where_a_conversion_writes(shard, tmp_path):
    source = fuzz.put(tmp_path / "model", fuzz.sentence_files())
    bertjax.convert_checkpoint(source, tmp_path / "flax", to="msgpack")
    layout = json.loads((tmp_path / "flax/bertjax_layout.json").read_text())
    layout["shards"] = [[name, shard] for name in fuzz.tensors()]
    fuzz.put(tmp_path / "flax", {"bertjax_layout.json": layout})
    before = entries(tmp_path)
    with pytest.raises(CheckpointError, match=r"bertjax_layout\.json: the shard of .* is .*, expected a plain file na"):
        bertjax.convert_checkpoint(tmp_path / "flax", tmp_path / "back")
    assert entries(tmp_path) == before


def test_tensors_that_share_numbers_do_not_multiply_a_small_file(tmp_path):
    sizes = {8: 1 << 14, 12: 1 << 20}
    shapes = {name: [sizes.get(size, size) for size in array.shape] for name, array in fuzz.tensors().items()}
    entries = {name: fuzz.torch_tensor("0", shape, count=1, strides=[0] * len(shape)) for name, shape in shapes.items()}
    content = fuzz.torch_zip(fuzz.program(fuzz.state_dict(entries)), [bytes(4)])
    large = {**fuzz.config(), "hidden_size": 1 << 14, "vocab_size": 1 << 20}
    folder = fuzz.put(tmp_path / "model", {"config.json": large, "pytorch_model.bin": content})
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin: its tensors take .* times what it holds"):
        BertModel.from_pretrained(folder)


# Under limits, and watched


def run_all() -> None:
    """Every case in this process; prints what each one took and did."""
    with tempfile.TemporaryDirectory() as name:
        folders = {each: box(Path(name), each) for each in CASES}
        good = fuzz.put(Path(name) / "good" / "model", fuzz.sentence_files(LAYERS))
        torch = fuzz.put(
            Path(name) / "torch" / "model", {"config.json": fuzz.config(LAYERS), "pytorch_model.bin": TORCH}
        )
        for door in DOORS.values():
            door(good)  # imports what is imported late
        BertModel.from_pretrained(torch)
        watch = fuzz.Watch()
        fuzz.limit_memory()
        results = {}
        for each, folder in folders.items():
            for door in CASES[each].doors:
                with fuzz.limited(watch, folder.parent) as found:
                    try:
                        DOORS[door](folder)
                        found["outcome"] = None
                    except bertjax.BertjaxError as error:
                        found["outcome"] = type(error).__name__
                results[f"{each} {door}"] = found
        print(json.dumps(results))


def test_all_forty_within_limits_and_without_running_anything():
    done = subprocess.run(
        [sys.executable, __file__], env=fuzz.environment(), capture_output=True, text=True, timeout=300, check=False
    )
    assert not done.returncode, done.stderr[-3000:]
    results = json.loads(done.stdout)
    assert len(results) == sum(len(case.doors) for case in CASES.values())
    for name, found in results.items():
        case = CASES[name.rpartition(" ")[0]]
        assert found["outcome"] == (case.error and case.error.__name__), name
        assert found["seen"] == [], name
        assert found["growth"] <= fuzz.MAX_GROWTH, name


def test_the_watch_sees_what_a_hostile_pickle_would_do(tmp_path):
    code = f"""
import fuzz, json, os, pathlib, socket
watch = fuzz.Watch()
with watch.over(pathlib.Path({str(tmp_path)!r})) as seen:
    os.system("true")
    import tabnanny
    exec("1")
    open("/etc/hostname", "rb").close()
    open({str(tmp_path / "a")!r}, "wb").close()
    socket.socket().close()
print(json.dumps(seen))
"""
    path = {"PYTHONPATH": str(Path(__file__).parent)}
    done = subprocess.run([sys.executable, "-c", code], env=fuzz.environment() | path, capture_output=True, check=True)
    found = "\n".join(json.loads(done.stdout))
    for event in ("os.system", "import ('tabnanny'", "exec", "open ('/etc/hostname'", "socket."):
        assert event in found
    assert str(tmp_path) not in found


def test_mutated_checkpoints_are_read_or_refused():
    results: list[dict] = []
    fuzz.run([*fuzz.FORMATS], "0", range(600), results.append)
    assert [result for result in results if result["outcome"] == "FAILED"] == []
    outcomes = Counter((result["format"], result["outcome"] == "read") for result in results)
    # Sanity: of every format some damage is refused; and damage to numbers alone can't be seen.
    assert len(results) == 600
    assert all(outcomes[name, False] for name in fuzz.FORMATS)
    assert sum(count for (_, read), count in outcomes.items() if read) > 60


def test_inputs_that_failed_once_are_read_or_refused():
    results: list[dict] = []
    fuzz.run([*fuzz.FORMATS], "found", range(len(fuzz.found_cases())), results.append)
    assert [result for result in results if result["outcome"] == "FAILED"] == []
    assert len(results) == len(fuzz.found_cases())


if __name__ == "__main__":
    run_all()
