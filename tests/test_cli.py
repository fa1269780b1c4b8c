import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from click.testing import CliRunner
from conftest import DATA, GOLDEN
from safetensors.numpy import load_file, save_file

from bertjax import SentenceEncoder, __version__
from bertjax.cli import main
from bertjax.convert.sources import open_weights

TEXTS = ["a cat sat on the mat .", "", "the dog ran fast", "it is"]


@pytest.fixture(scope="module")
def vectors(sentence_folder) -> np.ndarray:
    return SentenceEncoder.from_pretrained(sentence_folder).encode(TEXTS)


def run(*arguments, stdin=None, code=0):
    result = CliRunner().invoke(main, [str(argument) for argument in arguments], input=stdin)
    assert result.exit_code == code, result.output
    return result


def lines_of(result) -> np.ndarray:
    return np.array([json.loads(line) for line in result.stdout.splitlines()], np.float32)


def test_embeds_a_file_and_says_what_was_in_it(sentence_folder, vectors, tmp_path):
    (tmp_path / "texts.txt").write_text("\n".join(TEXTS) + "\n")
    result = run("embed", "--model", sentence_folder, tmp_path / "texts.txt")
    np.testing.assert_allclose(lines_of(result), vectors, rtol=0, atol=1e-6)
    assert result.stderr.startswith("4 text(s), 21 tokens, ")
    assert result.stderr.endswith(" 0 truncated\n")


def test_embeds_standard_input_and_writes_json_lines(sentence_folder, vectors):
    result = run("embed", "-m", sentence_folder, stdin="\n".join(TEXTS))
    np.testing.assert_allclose(lines_of(result), vectors, rtol=0, atol=1e-6)


def test_json_lines_hold_every_digit(sentence_folder):
    arguments = [part for text in TEXTS for part in ("-t", text)]
    found = lines_of(run("embed", "-m", sentence_folder, *arguments))
    np.testing.assert_array_equal(found, SentenceEncoder.from_pretrained(sentence_folder).encode(TEXTS))


def test_embeds_a_field_of_json_lines_from_several_files(sentence_folder, vectors, tmp_path):
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"id": 1, "body": text}) for text in TEXTS[:2]))
    (tmp_path / "b.jsonl").write_text("\n".join(json.dumps({"body": text}) for text in TEXTS[2:]))
    files = [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]
    found = lines_of(run("embed", "-m", sentence_folder, "--field", "body", *files))
    np.testing.assert_allclose(found, vectors, rtol=0, atol=1e-6)


def test_only_line_feeds_end_a_text(sentence_folder):
    result = run("embed", "-m", sentence_folder, stdin="a cat\x0cthe dog\u2028it is\r\nhe\n")
    assert len(result.stdout.splitlines()) == 2


def test_options_reach_the_encoder(sentence_folder):
    encoder = SentenceEncoder.from_pretrained(sentence_folder, pooling=("cls", "max"), max_seq_length=6)
    expected = encoder.encode(TEXTS, prompt_name="query", truncate_dim=20, normalize_embeddings=True)
    options = "--pooling cls --pooling max --max-seq-length 6 --prompt-name query --truncate-dim 20 --normalize"
    arguments = [part for text in TEXTS for part in ("-t", text)]
    result = run("embed", "-m", sentence_folder, *options.split(), *arguments)
    np.testing.assert_allclose(lines_of(result), expected, rtol=0, atol=1e-6)
    assert "2 truncated" in result.stderr  # 'she was' and two special tokens leave room for two


def test_no_texts_make_no_vectors(sentence_folder, tmp_path):
    (tmp_path / "empty.txt").write_text("")
    result = run("embed", "-m", sentence_folder, tmp_path / "empty.txt")
    assert result.stdout == ""
    assert result.stderr == "0 text(s), 0 tokens, no positions, 0 truncated\n"


@pytest.mark.parametrize(
    ("arguments", "stdin", "message"),
    [
        (["-m", "{model}", "missing.txt"], None, "missing.txt: no such file; to pass a text itself, use --text"),
        (["-m", "/no/such", "-t", "x"], None, "/no/such: no such folder"),
        (["-m", "{model}", "-f", "a"], '{"a": "x"}\nnonsense', "standard input:2: not a line of JSON"),
        (["-m", "{model}", "-f", "a"], '{"b": "x"}', "standard input:1: a JSON object with a field 'a' was expected"),
        (["-m", "{model}", "-f", "a"], '{"a": null}', "standard input:1: field 'a' is null, expected a text"),
        (["-m", "{model}"], b"a\n" * 9999 + b"ab\xff\n", "standard input:10000: not UTF-8 text (invalid start byte at"),
        (["-m", "{model}", "-f", "a"], '{"a": "\\ud800"}', "standard input:1: field 'a' is"),
        (["-m", "{model}", "."], None, ".: is a folder, expected a file of texts"),
        (["-m", "{model}", "README.md", "--out", "/dev/null/out"], None, "/dev/null/out: can't be written"),
        (["-m", "{golden}", "-t", "x"], None, "pass pooling= (or --pooling) with one of"),
    ],
)
def test_errors_are_one_line_without_a_traceback(sentence_folder, arguments, stdin, message):
    filled = [argument.format(model=sentence_folder, golden=GOLDEN[0]) for argument in arguments]
    result = run("embed", *filled, stdin=stdin, code=1)
    (line,) = result.stderr.splitlines()
    assert line.startswith("Error: ")
    assert message in line


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-m", "x", "-t", "a", "file"], "not both"),
        (["-m", "x", "-t", "a", "--out", "out"], "--text does not go with --out"),
        (["-m", "x", "a.txt", "--format", "npy"], "--format goes with --out"),
        (["-m", "x", "a.txt", "--vectors", "int8"], "--vectors goes with --out"),
        (["-m", "x", "-", "--out", "out"], "not standard input, which can't be resumed"),
        (["-m", "x", "--out", "out"], "not standard input, which can't be resumed"),
        (["-t", "a"], "Missing option '-m'"),
        (["-m", "x", "-t", "a", "-f", "body"], "not to --text"),
        (["-m", "x", "-t", "a", "--truncate-dim", "0"], "0 is not in the range"),
        (["-m", "x", "-t", "a", "--dtype", "int4"], "'int4' is not one of"),
    ],
)
def test_mistaken_options_are_usage_errors(arguments, message):
    assert message in run("embed", *arguments, code=2).stderr


def test_a_failed_run_leaves_an_old_result_alone(tmp_path):
    (tmp_path / "out.jsonl").write_text("old")
    model = DATA / "tasks" / "classification" / "model"
    result = run("classify", "-m", model, "-f", "a", "-o", tmp_path / "out.jsonl", stdin="{}", code=1)
    assert "field 'a'" in result.stderr
    assert (tmp_path / "out.jsonl").read_text() == "old"
    assert os.listdir(tmp_path) == ["out.jsonl"]


def test_debug_shows_the_traceback(sentence_folder):
    command = [sys.executable, "-m", "bertjax", "--debug", "info", "/no/such"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1
    assert "Traceback" in done.stderr
    assert "SourceError: /no/such" in done.stderr


def test_info(sentence_folder):
    text = run("info", sentence_folder).stdout
    assert "BERT, 2 layers, hidden 16, 2 heads" in text
    assert "39 tensors, 8,448 parameters, float32, with pooler" in text
    assert "pooling mean, Normalize; at most 150 tokens; prompts 'query'\n" in text
    listed = run("info", "--parameters", sentence_folder).stdout
    assert "encoder.layer.1.attention.self.query.weight float32[16, 16]" in listed


def test_info_of_a_plain_encoder():
    assert "pass pooling= or --pooling" in run("info", GOLDEN[0]).stdout


def test_convert_prints_what_became_of_the_tensors(sentence_folder, tmp_path):
    text = run("convert", sentence_folder, tmp_path / "out").stdout
    query = "encoder.layer.{0..1}.attention.self.query.weight [16x16] -> encoder/layers/attention/query/kernel"
    assert query + "  (stacked, transposed)" in text
    assert "mapped   39 tensors to 23 arrays, 8,448 parameters, F32" in text
    for name in ("model.safetensors", "config.json", "tokenizer.json", "modules.json", "1_Pooling/config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (sentence_folder / name).read_bytes(), name
    again = run("convert", sentence_folder, tmp_path / "out", code=1)
    assert "already exists" in again.stderr
    run("convert", "--force", "--dtype", "bfloat16", sentence_folder, tmp_path / "out")
    assert {str(tensor.dtype) for tensor in open_weights(tmp_path / "out").tensors.values()} == {"bfloat16"}


FORMATS = {"safetensors": "model.safetensors", "msgpack": "flax_model.msgpack", "orbax": "params"}


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    """A golden model in every format, each with its certificate beside it, all by the command."""
    folder = tmp_path_factory.mktemp("converted")
    for to in FORMATS:
        run("convert", GOLDEN[0], folder / to, "--to", to, "--certificate", folder / f"{to}.json")
    return folder


@pytest.mark.parametrize("to", FORMATS)
def test_convert_to_every_format_and_back(converted, to, tmp_path):
    assert (converted / to / FORMATS[to]).exists()
    text = run("convert", converted / to, tmp_path / "back").stdout
    assert f"written  safetensors, {tmp_path / 'back'}" in text
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "back" / name).read_bytes() == (GOLDEN[0] / name).read_bytes()


@pytest.mark.parametrize(
    ("to", "form"), [("safetensors", "safetensors"), ("msgpack", "Flax msgpack"), ("orbax", "Orbax checkpoint")]
)
def test_info_names_the_format(converted, to, form):
    text = run("info", converted / to).stdout
    assert f"files      {form}, " in text
    assert text.splitlines()[1:4] == run("info", GOLDEN[0]).stdout.splitlines()[1:4]


def test_info_of_a_tensorflow_checkpoint():
    text = run("info", DATA / "tf1" / "pretrained").stdout
    assert "files      TensorFlow 1 checkpoint, bert_model.ckpt.index, " in text
    assert "heads      predictions, seq_relationship" in text


@pytest.mark.parametrize("to", FORMATS)
def test_a_certificate_is_written_and_checked(converted, to, tmp_path):
    path = converted / f"{to}.json"
    assert json.loads(path.read_text())["bertjax"] == __version__
    assert f"files are as {path} says" in run("convert", "--check", path, converted / to).stdout
    shutil.copytree(converted / to, tmp_path / "model")
    (tmp_path / "model" / "config.json").write_text("{}")
    result = run("convert", "--check", path, tmp_path / "model", code=1)
    (line,) = result.stderr.splitlines()
    assert line.startswith(f"Error: {tmp_path / 'model'}: 1 difference(s) from {path}: config.json: 2 bytes, expected ")
    assert result.stdout == ""


def test_convert_says_where_the_certificate_is(tmp_path):
    text = run("convert", GOLDEN[0], tmp_path / "out", "--certificate", tmp_path / "c.json").stdout
    assert text.splitlines()[-1] == f"certificate {tmp_path / 'c.json'}"


def test_check_says_what_is_wrong_with_its_arguments(converted):
    path = converted / "msgpack.json"
    for folder, message in (
        (GOLDEN[0], f"is what {path} was converted from"),
        ("/no/such", "/no/such: no such folder"),
    ):
        (line,) = run("convert", "--check", path, folder, code=1).stderr.splitlines()
        assert message in line
    (line,) = run("convert", "--check", GOLDEN[0] / "config.json", GOLDEN[0], code=1).stderr.splitlines()
    assert "not a certificate" in line
    assert "takes one folder" in run("convert", "--check", path, converted / "msgpack", "x", code=2).stderr
    assert "does not exist" in run("convert", "--check", "/no/such", converted / "msgpack", code=2).stderr
    for option in ("--force", "--certificate=x", "--to=orbax"):
        result = run("convert", "--check", path, converted / "msgpack", option, code=2)
        assert "goes with no other option" in result.stderr


def masked(folder, change=0, **fields):
    """A checkpoint with a masked-language-model head and a decoder that is the word embeddings and a change."""
    tensors = {f"module.bert.{name}": array for name, array in load_file(GOLDEN[0] / "model.safetensors").items()}
    config = json.loads((GOLDEN[0] / "config.json").read_text())
    words = tensors["module.bert.embeddings.word_embeddings.weight"]
    head = {
        "bias": np.zeros(len(words), np.float32),
        "decoder.weight": words + np.float32(change),
        "transform.dense.weight": np.eye(words.shape[1], dtype=np.float32),
        **{f"transform.{name}": np.ones(words.shape[1], np.float32)
           for name in ("dense.bias", "LayerNorm.weight", "LayerNorm.bias")},
    }  # fmt: skip
    folder.mkdir()
    save_file(tensors | {f"module.cls.predictions.{name}": array for name, array in head.items()},
              folder / "model.safetensors")  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config | {"architectures": ["BertForMaskedLM"]} | fields))
    return folder


def test_convert_with_standard_names(tmp_path):
    run("convert", masked(tmp_path / "source"), tmp_path / "out", "--standard-names")
    names = open_weights(tmp_path / "out").tensors
    assert "bert.pooler.dense.weight" in names
    assert "cls.predictions.bias" in names
    assert "cls.predictions.decoder.weight" not in names


def test_convert_unties_only_when_it_is_asked_to(tmp_path):
    source = masked(tmp_path / "source", change=1)
    (line,) = run("convert", source, tmp_path / "out", code=1).stderr.splitlines()
    assert "--untie" in line
    assert os.listdir(tmp_path) == ["source"]
    run("convert", source, tmp_path / "out", "--untie")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is False
    assert "module.cls.predictions.decoder.weight" in open_weights(tmp_path / "out").tensors


def test_convert_into_shards(tmp_path):
    run("convert", GOLDEN[0], tmp_path / "out", "--max-shard-size", "8KB")
    weights = open_weights(tmp_path / "out")
    assert len(weights.files) > 1
    assert weights.index == "model.safetensors.index.json"
    for arguments, message in (
        (["--max-shard-size", "much"], "'much' is not a size"),
        (["--max-shard-size", "1GB", "--to", "orbax"], "applies to safetensors"),
    ):
        (line,) = run("convert", GOLDEN[0], tmp_path / "no", *arguments, code=1).stderr.splitlines()
        assert message in line
    assert os.listdir(tmp_path) == ["out"]


def test_convert_one_of_two_encoders(tmp_path):
    (tmp_path / "two").mkdir()
    shutil.copy(GOLDEN[0] / "config.json", tmp_path / "two")
    tensors = load_file(GOLDEN[0] / "model.safetensors")
    both = {f"{side}.{name}": array + number for number, side in enumerate("ab") for name, array in tensors.items()}
    save_file(both, tmp_path / "two" / "model.safetensors")
    for command in (["convert", tmp_path / "two", tmp_path / "out"], ["info", tmp_path / "two"]):
        (line,) = run(*command, code=1).stderr.splitlines()
        assert "2 encoders in one file, under 'a.', 'b.'" in line
        run(*command, "--prefix", "b.")
    assert open_weights(tmp_path / "out").tensors.keys() == {f"b.{name}" for name in tensors}


@pytest.mark.parametrize(
    ("arguments", "message", "code"),
    [
        (["{golden}"], "missing argument TARGET, the folder to make", 2),
        ([], "Missing argument 'SOURCE'", 2),
        (["{golden}", "{out}", "--to", "pickle"], "'pickle' is not one of", 2),
        (["{golden}", "{out}", "--dtype", "int8"], "'int8' is not one of", 2),
        (["{golden}", "{out}", "--certificate", "/no/such/c.json"], "there is no folder /no/such", 1),
        (["{golden}", "{golden}"], "is or holds the source", 1),
        (["/no/such", "{out}"], "/no/such: no such folder", 1),
    ],
)
def test_a_conversion_that_cant_be_is_refused_before_it_begins(arguments, message, code, tmp_path):
    filled = [argument.format(golden=GOLDEN[0], out=tmp_path / "out") for argument in arguments]
    assert message in run("convert", *filled, code=code).stderr
    assert os.listdir(tmp_path) == []


def test_the_help_of_convert_names_every_option_and_format():
    text = run("convert", "--help").stdout
    options = (
        "to dtype max-shard-size standard-names untie prefix certificate check force revision offline ignore-field"
    )
    assert all(f"--{option} " in text for option in options.split())
    assert "[safetensors|msgpack|orbax]" in text


def test_the_checkouts_converter_is_the_same(tmp_path):
    root = GOLDEN[0].parents[3]
    command = [sys.executable, "-m", "convert", str(GOLDEN[0]), str(tmp_path / "out")]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "mapped " in done.stdout
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (GOLDEN[0] / "model.safetensors").read_bytes()


def test_version_and_help_answer_without_loading_jax():
    code = "import sys, bertjax.cli; print('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "False"
    assert __version__ in run("--version").stdout
    for command in ("embed", "info", "convert"):
        assert f"Usage: main {command}" in run(command, "--help").stdout


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("command", [["embed", "-m", "{model}", "-t", "a"], ["info", "{model}"]])
def test_a_full_disk_behind_standard_output_is_one_line(sentence_folder, command, unbuffered):
    filled = [part.format(model=sentence_folder) for part in command]
    environment = {**os.environ, "PYTHONUNBUFFERED": unbuffered}
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "bertjax", *filled], stdout=full, stderr=subprocess.PIPE, text=True, env=environment
        )
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1] == "Error: [Errno 28] No space left on device"


def test_a_pipe_is_a_file(sentence_folder, vectors, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    writer = threading.Thread(target=lambda: (tmp_path / "pipe").write_text("\n".join(TEXTS)))
    writer.start()
    result = run("embed", "-m", sentence_folder, tmp_path / "pipe")
    writer.join()
    np.testing.assert_allclose(lines_of(result), vectors, rtol=0, atol=1e-6)


def test_a_byte_order_mark_is_no_text(sentence_folder):
    plain, marked = (run("embed", "-m", sentence_folder, stdin=mark + b"a cat") for mark in (b"", b"\xef\xbb\xbf"))
    assert marked.stdout == plain.stdout


def test_standard_input_twice_is_read_once(sentence_folder):
    assert len(run("embed", "-m", sentence_folder, "-", "-", stdin="a\nb\n").stdout.splitlines()) == 2


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_signal_leaves_nothing_behind(tmp_path, number):
    model = DATA / "tasks" / "classification" / "model"
    command = [sys.executable, "-m", "bertjax", "classify", "-m", model, "-", "-o", tmp_path / "out.jsonl"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdin.write(b"a cat\n")
        process.stdin.flush()
        while not os.listdir(tmp_path):  # the temporary file, made once the model is loaded
            assert process.poll() is None
            time.sleep(0.05)
        process.send_signal(number)
        process.communicate()
    assert process.returncode != 0
    assert os.listdir(tmp_path) == []


def test_the_checkouts_converter_names_itself():
    root = GOLDEN[0].parents[3]
    done = subprocess.run([sys.executable, "-m", "convert", "--help"], cwd=root, capture_output=True, text=True)
    assert done.stdout.startswith("Usage: python -m convert [OPTIONS] SOURCE [TARGET]")
