import dataclasses
import json
import re
import subprocess
import sys

import jax
import jax.export
import numpy as np
import pytest
from click.testing import CliRunner
from conftest import GOLDEN, WORDS, random_model
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from bertjax import BertConfig, CheckpointError, ConfigError, InputError, SentenceEncoder, SentenceModel, Tokenizer
from bertjax.cli import main
from bertjax.errors import SourceError
from bertjax.export import export_encoder
from bertjax.export.load import Encoder
from bertjax.quantization import PRECISIONS, calibrate, quantize
from bertjax.sentence import POOLING_MODES, Dense, Normalize

LENGTHS = (12, 30)
PLAIN_WORDS = [word for word in WORDS if not word.startswith("##")]


def some_texts(count, longest, seed=0):
    """Texts of different lengths, one of them the longest: so many words."""
    rng = np.random.default_rng(seed)
    counts = [longest, *rng.integers(0, longest, count - 1)]
    return [" ".join(rng.choice(PLAIN_WORDS, words)) for words in counts]


TEXTS = some_texts(40, LENGTHS[-1] - 2)


@pytest.fixture(scope="module")
def encoder(sentence_folder) -> SentenceEncoder:
    return SentenceEncoder.from_pretrained(sentence_folder, max_seq_length=LENGTHS[-1], step_tokens=512)


@pytest.fixture(scope="module")
def folder(encoder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("export") / "out"
    export_encoder(encoder, folder, lengths=LENGTHS)
    return folder


@pytest.fixture(scope="module")
def loaded(folder) -> Encoder:
    return Encoder(folder)


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("count", [1, 3, 8])
def test_vectors_are_the_live_models(loaded, encoder, length, count):
    texts = some_texts(count, length - 2, seed=count)
    found = loaded.encode(texts)
    assert (found.dtype, found.shape) == (np.float32, (count, 16))
    np.testing.assert_allclose(found, encoder.encode(texts), rtol=0, atol=1e-6)


def test_each_length_is_compiled_once_for_a_number_of_texts(folder):
    loaded = Encoder(folder)
    for length in (1, 7, 10, 11, 20, 28, 300):
        loaded.encode(some_texts(2, length))
    assert loaded.run._cache_size() == len(LENGTHS)


def test_long_texts_are_cut_and_there_may_be_none(loaded, encoder):
    long = " ".join(["cat"] * 100)
    cut = " ".join(["cat"] * (LENGTHS[-1] - 2))
    np.testing.assert_array_equal(*loaded.encode([long, cut]))
    assert loaded.encode([]).shape == (0, 16)


def test_prompts(loaded, encoder):
    texts = some_texts(3, 8)
    prompted = encoder.encode(texts, prompt_name="query")
    single = loaded.encode(texts[1], prompt_name="query")
    np.testing.assert_allclose(single, prompted[1], rtol=0, atol=1e-6)
    np.testing.assert_allclose(loaded.encode(texts, prompt_name="query"), prompted, rtol=0, atol=1e-6)
    assert loaded.config["prompts"] == {
        "": {"text": "", "tokens": 0},
        "document": {"text": "", "tokens": 0},
        "none": {"text": "", "tokens": 0},
        "query": {"text": "she was ", "tokens": 0},
    }
    with pytest.raises(KeyError, match="passage"):
        loaded.encode(texts, prompt_name="passage")


@pytest.mark.slow
def test_precisions(encoder, tmp_path):
    """What is normalised, cut and quantised inside the program is what the live model's vectors are quantised to."""
    options = {"truncate_dim": 13, "normalize_embeddings": True}
    live = encoder.encode(TEXTS, **options)
    calibrated = calibrate(encoder.encode(some_texts(40, 20, seed=1), **options))
    for precision in ("float16", "int8", "binary"):
        ranges = calibrated if precision == "int8" else None
        config = export_encoder(
            encoder,
            tmp_path / precision,
            lengths=LENGTHS[1:],
            truncate_dim=13,
            normalize=True,
            precision=precision,
            ranges=ranges,
        )
        loaded = Encoder(tmp_path / precision)
        found = loaded.encode(TEXTS)
        assert found.dtype == loaded.encode([]).dtype == PRECISIONS[precision]
        assert found.shape == (len(TEXTS), config["output_width"])
        # The live vectors within 1e-6: nothing but what they are quantised to may come out.
        low, high = (np.asarray(quantize(live + np.float32(shift), precision, ranges)) for shift in (-1e-6, 1e-6))
        if precision == "binary":
            found, low, high = (np.unpackbits(bits, axis=1) for bits in (found, low, high))
        assert ((low <= found) & (found <= high)).all()
        assert precision == "float16" or (low == high).mean() > 0.99
        assert len(np.unique(found, axis=0)) > 5
    np.testing.assert_array_equal(np.load(tmp_path / "int8" / "ranges.npy"), calibrated)


def rich_encoder(encoder, **sizes):
    """An encoder of everything that may come after BERT, with another prompt and truncation than usual."""
    config = BertConfig(vocab_size=5 + len(WORDS), num_hidden_layers=2, max_position_embeddings=60, **sizes)
    width = len(POOLING_MODES) * config.hidden_size
    dense = Dense(width, 12, activation="torch.nn.modules.activation.GELU", use_residual=True, rngs=nnx.Rngs(0))
    model = SentenceModel(
        random_model(config), pooling=POOLING_MODES, include_prompt=False, modules=(Normalize(), dense, Normalize())
    )
    backend = encoder.tokenizer.backend
    named = {f"{name.lower()}_token": f"[{name}]" for name in ("UNK", "SEP", "PAD", "CLS", "MASK")}
    tokenizer = Tokenizer(backend, special_tokens=named, truncation_side="left")
    spec = dataclasses.replace(
        encoder.spec, include_prompt=False, default_prompt_name="query", max_seq_length=20, truncate_dim=9
    )
    return SentenceEncoder(model, tokenizer, spec, step_tokens=256)


@pytest.mark.slow
@pytest.mark.parametrize(
    "sizes",
    [
        # of a size that the native encoder takes
        {"hidden_size": 64, "num_attention_heads": 2, "intermediate_size": 96},
        {
            "hidden_size": 16,
            "num_attention_heads": 2,
            "intermediate_size": 8,
            "position_embedding_type": "relative_key_query",
        },
    ],
    ids=["absolute", "relative"],
)
def test_everything_after_bert_is_inside(encoder, tmp_path, sizes):
    rich = rich_encoder(encoder, **sizes)
    config = export_encoder(rich, tmp_path / "out")
    loaded = Encoder(tmp_path / "out")
    assert config["lengths"] == [20]
    assert config["prompts"]["query"] == {"text": "she was ", "tokens": 3}
    texts = some_texts(5, 40)  # the first is cut, on the left
    np.testing.assert_allclose(loaded.encode(texts), rich.encode(texts), rtol=0, atol=1e-6)
    assert not any("pooler" in name for name in loaded.weights)
    program = jax.export.deserialize(bytearray((tmp_path / "out" / "encoder.jax_export").read_bytes()))
    assert custom_calls(program) == {"shape_assertion"}


def custom_calls(program):
    return set(re.findall(r"custom_call @([\w.$]+)", program.mlir_module()))


def test_the_loader_needs_neither_flax_nor_bertjax(folder, encoder, tmp_path):
    code = f"""
import sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("flax", "bertjax", "torch", "transformers"):
            raise ImportError(f"{{name}} must not be imported")

sys.meta_path.insert(0, Refuse())
sys.path.insert(0, {str(folder)!r})
import numpy
from load import Encoder
numpy.save("vectors.npy", Encoder().encode({TEXTS!r}))
print(sorted({{"flax", "bertjax"}} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"
    np.testing.assert_allclose(np.load(tmp_path / "vectors.npy"), encoder.encode(TEXTS), rtol=0, atol=1e-6)


def test_eight_devices_share_a_batch(loaded, encoder):
    assert jax.device_count() == 8
    texts = TEXTS[:16]
    mesh = Mesh(jax.devices(), ("data",))
    batch = encoder.tokenize(texts, length=LENGTHS[-1])
    rows = jax.device_put([*batch.values()], NamedSharding(mesh, PartitionSpec("data")))
    whole = jax.device_put((loaded.weights, np.int32(0)), NamedSharding(mesh, PartitionSpec()))
    found = loaded.run(whole[0], *rows, whole[1])
    assert found.sharding.spec == PartitionSpec("data")
    np.testing.assert_allclose(found, encoder.encode(texts), rtol=0, atol=1e-6)


def test_what_is_written(folder, loaded, encoder, tmp_path):
    expected = {
        "max_length": 30,
        "lengths": [12, 30],
        "dimension": 16,
        "normalize": False,
        "precision": "float32",
        "output_dtype": "float32",
        "output_width": 16,
        "compute_dtype": "float32",
        "pad_token_id": 0,
        "default_prompt_name": "",
        "platforms": ["cpu", "cuda", "tpu"],
    }
    assert expected.items() <= loaded.config.items()
    assert loaded.config["versions"]["jax"] == jax.__version__
    export_encoder(encoder, tmp_path / "again", lengths=list(LENGTHS))
    files = ["config.json", "encoder.jax_export", "load.py", "tokenizer.json", "tokenizer_config.json"]
    assert sorted(path.name for path in (tmp_path / "again").iterdir()) == [*files, "weights.safetensors"]
    for path in (tmp_path / "again").iterdir():
        assert path.read_bytes() == (folder / path.name).read_bytes(), path.name
    program = (folder / "encoder.jax_export").read_bytes()
    assert b".py" not in program  # no path of this machine
    assert len(program) < 100_000  # no weights


def test_lower_precision_and_another_backend(sentence_folder, encoder, tmp_path):
    half = SentenceEncoder.from_pretrained(sentence_folder, dtype="bfloat16", attention="tpu", max_seq_length=30)
    config = export_encoder(half, tmp_path / "out", lengths=[30])
    loaded = Encoder(tmp_path / "out")
    assert config["compute_dtype"] == "bfloat16"
    assert {str(weight.dtype) for weight in loaded.weights.values()} == {"bfloat16"}
    found = loaded.encode(TEXTS)
    assert found.dtype == np.float32
    difference = np.abs(found - encoder.encode(TEXTS)).max()
    assert 1e-4 < difference < 0.05


def test_rows_that_are_too_long_are_refused_by_the_program(loaded):
    rows = np.ones((1, LENGTHS[-1] + 1), np.int32)
    with pytest.raises(ValueError, match="refining shapes") as refused:
        loaded.run(loaded.weights, rows, rows, rows * 0, np.int32(0))
    assert "symbolic shape constraint length <= 30" in str(refused.value.__cause__)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lengths": [30, 201]}, "lengths: 201 tokens are more than the model's 200 positions"),
        ({"lengths": [1]}, "lengths: 1 tokens leave no room for the 2 special tokens"),
        ({"lengths": [30, 0]}, r"lengths\[1\] is 0, expected a positive integer"),
        ({"lengths": []}, r"lengths are \[\], expected at least one"),
        ({"lengths": 30}, "lengths are 30, expected at least one"),
        ({"truncate_dim": 17}, "truncate_dim is 17, the vectors have 16 numbers"),
        ({"precision": "uint8"}, "precision is 'uint8', expected one of"),
        ({"precision": "int8"}, "precision 'int8' needs ranges"),
        ({"ranges": np.zeros((2, 16))}, "precision 'float32' has no ranges"),
        ({"precision": "int8", "ranges": np.zeros((2, 15))}, r"shape \(2, 15\), expected floats \[2, 16\]"),
    ],
)
def test_what_is_not_usable_is_refused_and_leaves_nothing(encoder, tmp_path, options, message):
    with pytest.raises(InputError, match=message):
        export_encoder(encoder, tmp_path / "out", **options)
    assert list(tmp_path.iterdir()) == []


def test_a_model_without_pooling_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="pass pooling="):
        export_encoder(SentenceEncoder.from_pretrained(GOLDEN[0]), tmp_path / "out")


def test_folders_that_can_not_be_made_are_refused(encoder, tmp_path, monkeypatch):
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "something").write_text("precious")
    with pytest.raises(SourceError, match="taken: already exists; choose another folder, or remove it first"):
        export_encoder(encoder, tmp_path / "taken")
    (tmp_path / "file").write_text("precious")
    with pytest.raises(SourceError, match="file: exists and is not a folder"):
        export_encoder(encoder, tmp_path / "file")
    with pytest.raises(SourceError, match="file/out: can't be written"):
        export_encoder(encoder, tmp_path / "file" / "out")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(SourceError, match="pip install flatbuffers"):
        export_encoder(encoder, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "taken"]


def test_a_model_that_is_not_finite_leaves_nothing(encoder, tmp_path):
    broken = nnx.merge(*nnx.split(encoder.model))
    scale = broken.bert.embeddings.layer_norm.scale
    broken.bert.embeddings.layer_norm.scale = nnx.Param(scale[...] * np.nan)
    with pytest.raises(CheckpointError, match=r"bert.embeddings.layer_norm.scale holds NaN"):
        export_encoder(SentenceEncoder(broken, encoder.tokenizer, encoder.spec), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def run(*arguments, code=0):
    result = CliRunner().invoke(main, ["export", *map(str, arguments)])
    assert result.exit_code == code, result.output
    return result


def test_the_command(sentence_folder, tmp_path):
    (tmp_path / "texts.txt").write_text("\n".join(TEXTS))
    options = "-l 8 -l 30 --pooling cls --pooling max --truncate-dim 20 --normalize --precision int8".split()
    result = run(sentence_folder, tmp_path / "out", *options, "--calibration", tmp_path / "texts.txt")
    encoder = SentenceEncoder.from_pretrained(sentence_folder, pooling=("cls", "max"), max_seq_length=30)
    live = encoder.encode(TEXTS, truncate_dim=20, normalize_embeddings=True)
    np.testing.assert_allclose(np.load(tmp_path / "out" / "ranges.npy"), calibrate(live), rtol=0, atol=1e-6)
    assert Encoder(tmp_path / "out").encode(TEXTS).shape == (40, 20)
    lines = result.stdout.splitlines()
    assert lines[:2] == ["vectors  int8[20], computed in float32", "lengths  8, 30 tokens; longer texts lose their end"]
    assert lines[2].startswith(f"written  {tmp_path / 'out'}: encoder.jax_export ")
    assert lines[3] == f"runs on  cpu, cuda, tpu; jax {jax.__version__} or up to six months newer"
    assert json.loads((tmp_path / "out" / "config.json").read_text())["lengths"] == [8, 30]


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["{model}", "{there}"], 1, "already exists; choose another folder, or remove it first"),
        (["/no/such", "{new}"], 1, "/no/such: no such folder"),
        (["{golden}", "{new}"], 1, "pass pooling= (or --pooling)"),
        (["{model}", "{new}", "-l", "900"], 1, "lengths: 900 tokens are more than the model's 200 positions"),
        (["{model}", "{new}", "--truncate-dim", "17"], 1, "truncate_dim is 17, the vectors have 16 numbers"),
        (["{model}", "{new}", "--precision", "int8", "--calibration", "{empty}"], 1, "there is no text in it"),
        (["{model}", "{new}", "--precision", "int8"], 2, "--precision int8 needs --calibration FILE"),
        (["{model}", "{new}", "--calibration", "{empty}"], 2, "--precision int8 needs --calibration FILE"),
        (["{model}", "{new}", "--precision", "int4"], 2, "'int4' is not one of"),
        (["{model}"], 2, "Missing argument 'FOLDER'"),
    ],
)
def test_errors_of_the_command(sentence_folder, tmp_path, arguments, code, message):
    (tmp_path / "empty").write_text("")
    names = {"there": sentence_folder, "new": tmp_path / "out", "empty": tmp_path / "empty"}
    filled = [argument.format(model=sentence_folder, golden=GOLDEN[0], **names) for argument in arguments]
    assert message in run(*filled, code=code).stderr
    assert [path.name for path in tmp_path.iterdir()] == ["empty"]


@pytest.mark.slow
def test_the_real_model(minilm, tmp_path):
    live = SentenceEncoder.from_pretrained(minilm)
    config = export_encoder(live, tmp_path / "out")
    assert config["lengths"] == [32, 64, 128, 256]
    loaded = Encoder(tmp_path / "out")
    texts = [" ".join(["The cat sat on the mat, and it ran."] * repeats) for repeats in (1, 2, 5, 11, 22, 60)]
    for chosen in (texts[:2], texts[:4], texts):
        np.testing.assert_allclose(loaded.encode(chosen), live.encode(chosen), rtol=0, atol=1e-6)
    program = jax.export.deserialize(bytearray((tmp_path / "out" / "encoder.jax_export").read_bytes()))
    assert custom_calls(program) == {"shape_assertion"}
