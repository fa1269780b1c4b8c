"""Whole folders: the old layout against recorded vectors, the new one against the library itself, and refusals."""

import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from oracle import require

from bertjax import BertjaxError, CheckpointError, ConfigError, InputError, SentenceEncoder, SourceError, TokenizerError
from bertjax.sentence_files import DenseSpec, read_spec

HERE = Path(__file__).parent / "data" / "sentence"
GOLDEN = json.loads((HERE / "expected.json").read_text(encoding="utf-8"))
TEXTS = GOLDEN["texts"]
CASES = sorted({call["case"] for call in GOLDEN["calls"]})
OLD, NEW = "sentence_transformers.models", "sentence_transformers"
TANH = "torch.nn.modules.activation.Tanh"
# All texts together take one step of one shape.
STEP = 24 * len(TEXTS)


def assemble(folder: Path, case: str) -> Path:
    """A golden folder as the old version wrote it; see tests/data/sentence/generate.py."""
    shutil.copytree(HERE / "cases" / case, folder)
    at = folder / json.loads((folder / "modules.json").read_text())[0]["path"]
    for file in (HERE / "transformer").iterdir():
        if not (at / file.name).exists():
            shutil.copyfile(file, at / file.name)
    return folder


def change(file: Path, **fields) -> None:
    """Changes fields of a JSON file; a value of ... removes one. Makes the file if there is none."""
    content = json.loads(file.read_text()) if file.exists() else {}
    content = {name: value for name, value in (content | fields).items() if value is not ...}
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps(content))


@pytest.fixture
def folder(tmp_path) -> Path:
    return assemble(tmp_path / "model", "chain")


def load(folder, **options) -> SentenceEncoder:
    return SentenceEncoder.from_pretrained(folder, step_tokens=STEP, **options)


def assert_close(found, expected):
    """Within 1e-6 of vectors of unit size, and of larger ones (max, mean_sqrt_len_tokens) in proportion.

    That is eight units in the last place for an embedding, an encoder layer, a pooling and what follows it. What is
    expected was computed in float64, so only one side rounds.
    """
    assert found.shape == expected.shape
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6 * max(1.0, float(np.abs(expected).max())))
    spread = np.ptp(expected, axis=0).max() if len(expected) > 1 else 1.0
    assert spread > 0.05  # the vectors tell texts apart, so closeness means something


# The old layout


@pytest.mark.parametrize("case", CASES)
def test_old_folders_give_the_recorded_vectors(tmp_path, case):
    encoder = load(assemble(tmp_path / "model", case))
    arrays = np.load(HERE / "expected.npz")
    calls = [(index, call) for index, call in enumerate(GOLDEN["calls"]) if call["case"] == case]
    assert calls
    for index, call in calls:
        assert_close(encoder.encode(TEXTS, **call["options"]), arrays[str(index)])


def test_what_an_old_folder_says(folder):
    spec = read_spec(folder)
    assert spec.transformer == folder
    assert spec.pooling == ("mean",)
    assert spec.include_prompt
    assert spec.modules == (
        DenseSpec(folder / "2_Dense", 16, 8, use_bias=True, activation=TANH, use_residual=False),
        DenseSpec(folder / "3_Dense", 8, 5, False, "torch.nn.modules.linear.Identity", False),
        None,
    )
    assert spec.prompts == {"query": "query: ", "document": "", "passage": "the passage"}
    assert spec.default_prompt_name == "query"
    assert spec.max_seq_length == 24
    assert (spec.do_lower_case, spec.truncate_dim) == (False, None)


def test_what_a_folder_of_version_1_says(tmp_path):
    folder = assemble(tmp_path / "model", "subfolder")
    spec = read_spec(folder)
    assert spec.transformer == folder / "0_Transformer"
    assert (spec.max_seq_length, spec.do_lower_case) == (7, True)


def test_flags_that_are_absent_or_all_false_mean_mean(folder):
    file = folder / "1_Pooling" / "config.json"
    change(file, pooling_mode_mean_tokens=False)
    assert read_spec(folder).pooling == ("mean",)
    file.write_text('{"word_embedding_dimension": 16, "pooling_mode_cls_token": false}')
    assert read_spec(folder).pooling == ("mean",)
    # The old version takes the mean as well here, where the flag is absent; the new one does not.
    file.write_text('{"word_embedding_dimension": 16, "pooling_mode_cls_token": true}')
    assert read_spec(folder).pooling == ("cls",)
    file.write_text('{"pooling_mode_lasttoken": true, "pooling_mode_max_tokens": true, "include_prompt": false}')
    spec = read_spec(folder)
    assert (spec.pooling, spec.include_prompt) == (("max", "lasttoken"), False)


def test_the_named_mode_goes_before_the_flags(folder):
    change(folder / "1_Pooling" / "config.json", pooling_mode="cls")
    assert read_spec(folder).pooling == ("cls",)


@pytest.mark.parametrize("name", ["bert", "roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet"])
def test_every_name_of_the_settings_file(folder, name):
    (folder / "sentence_bert_config.json").unlink()
    assert read_spec(folder).max_seq_length is None
    change(folder / f"sentence_{name}_config.json", max_seq_length=9, do_lower_case=True)
    spec = read_spec(folder)
    assert (spec.max_seq_length, spec.do_lower_case) == (9, True)


def test_the_first_settings_file_that_says_anything_counts(folder):
    change(folder / "sentence_xlnet_config.json", max_seq_length=5)
    change(folder / "sentence_roberta_config.json", max_seq_length=9)
    assert read_spec(folder).max_seq_length == 24
    (folder / "sentence_bert_config.json").write_text("{}")
    assert read_spec(folder).max_seq_length == 9


def test_a_folder_without_the_optional_files(folder):
    for name in ("sentence_bert_config.json", "config_sentence_transformers.json"):
        (folder / name).unlink()
    spec = read_spec(folder)
    assert (spec.max_seq_length, dict(spec.prompts), spec.default_prompt_name) == (
        None,
        {"query": "", "document": ""},  # those that every model has
        None,
    )
    assert load(folder).max_seq_length == 24  # that of the positions


def test_the_folder_of_normalize_may_be_missing_or_there(folder):
    assert not (folder / "4_Normalize").exists()
    assert read_spec(folder).modules[-1] is None
    names = {"module_input_name": "sentence_embedding", "module_output_name": None}
    change(folder / "4_Normalize" / "config.json", **names)
    assert read_spec(folder).modules[-1] is None


def test_pooling_may_be_chosen_by_the_caller(folder):
    assert read_spec(folder, "cls").pooling == ("cls",)
    assert read_spec(folder, ("max", "cls")).pooling == ("max", "cls")
    assert read_spec(folder, ["max"]).pooling == ("max",)


def test_a_prompt_without_a_text_is_empty(folder):
    change(folder / "config_sentence_transformers.json", prompts={"query": None, "x": "y"})
    assert read_spec(folder).prompts == {"query": "", "document": "", "x": "y"}


# The new layout, and the two libraries side by side


def library():
    """The library's modules."""
    require("sentence_transformers")
    from sentence_transformers.sentence_transformer import modules

    return modules


def save_new(target: Path, *rest, prompts=None, source=HERE / "transformer", in_root=True, **options) -> Path:
    """Saves a model of the golden transformer and the given modules as the library does it today."""
    modules = library()
    from sentence_transformers import SentenceTransformer

    first = modules.Transformer(str(source), **options.pop("transformer", {}))
    first.save_in_root = in_root
    model = SentenceTransformer(modules=[first, *rest], device="cpu", prompts=prompts, **options)
    model.save(str(target), create_model_card=False)
    return target


def load_reference(folder: Path):
    """The folder as the library loads it, computing in float64."""
    library()
    from sentence_transformers import SentenceTransformer

    return SentenceTransformer(str(folder), device="cpu", local_files_only=True).double()


def both(folder: Path, **options):
    """What bertjax, with options for loading, and the library make of the texts."""
    return load(folder, **options).encode(TEXTS), load_reference(folder).encode(TEXTS)


def pooling(*args, **options):
    return library().Pooling(16, *args, **options)


def dense(*sizes, seed=0, **options):
    torch = require("torch")
    module = library().Dense(*sizes, **options)
    rng = np.random.default_rng(seed)
    for parameter in module.parameters():
        parameter.data = torch.tensor(rng.normal(0.0, 0.4, tuple(parameter.shape)), dtype=torch.float32)
    return module


@pytest.mark.parametrize(
    "modes",
    ["cls", "max", "mean", "mean_sqrt_len_tokens", "weightedmean", "lasttoken", ["lasttoken", "cls", "mean"]],
    ids=str,
)
def test_new_folders_give_the_librarys_vectors(tmp_path, modes):
    folder = save_new(tmp_path / "model", pooling(modes))
    assert json.loads((folder / "modules.json").read_text())[1]["type"].startswith(f"{NEW}.sentence_transformer.")
    assert read_spec(folder).pooling == ((modes,) if isinstance(modes, str) else tuple(modes))
    assert_close(*both(folder))


def test_a_new_chain_with_residuals_prompts_and_truncation(tmp_path):
    torch = require("torch")
    rest = (
        dense(16, 8, use_residual=True),
        dense(8, 8, use_residual=True, bias=False, activation_function=torch.nn.GELU(), seed=1),
        library().Normalize(),
    )
    prompts = {"query": "query: ", "passage": "the passage"}
    options = {"prompts": prompts, "default_prompt_name": "query", "truncate_dim": 6}
    folder = save_new(tmp_path / "model", pooling(), *rest, **options)
    spec = read_spec(folder)
    assert (spec.truncate_dim, spec.default_prompt_name, spec.prompts["passage"]) == (6, "query", "the passage")
    assert [module and module.use_residual for module in spec.modules] == [True, True, None]
    encoder, reference = load(folder), load_reference(folder)
    calls = [{}, {"prompt_name": "passage"}, {"prompt": ""}, {"prompt": "a", "prompt_name": "query"}]
    calls += [{"truncate_dim": 3}, {"truncate_dim": 8}, {"truncate_dim": 3, "normalize_embeddings": True}]
    for call in calls:
        assert_close(encoder.encode(TEXTS, **call), reference.encode(TEXTS, **call))


def test_a_prompt_left_out_of_every_mode(tmp_path):
    modes = ["cls", "max", "mean", "mean_sqrt_len_tokens", "weightedmean", "lasttoken"]
    folder = save_new(tmp_path / "model", pooling(modes, include_prompt=False), prompts={"query": "The cat: "})
    encoder, reference = load(folder), load_reference(folder)
    for call in ({}, {"prompt_name": "query"}, {"prompt": "Cat"}, {"prompt": "sat on the mat with 7 dogs, "}):
        assert_close(encoder.encode(TEXTS, **call), reference.encode(TEXTS, **call))


def test_a_new_folder_with_the_transformer_in_a_subfolder(tmp_path):
    folder = save_new(tmp_path / "model", pooling(), in_root=False)
    assert read_spec(folder).transformer == folder / "0_Transformer"
    assert_close(*both(folder))


@pytest.mark.parametrize(
    ("explicit", "tokenizers", "expected"),
    [(None, None, 24), (None, 9, 9), (None, 10**30, 24), (7, None, 7), (7, 9, 7), (11, 9, 11)],
)
def test_where_the_limit_comes_from(tmp_path, explicit, tokenizers, expected):
    folder = assemble(tmp_path / "model", "mean")
    change(folder / "tokenizer_config.json", model_max_length=... if tokenizers is None else tokenizers)
    change(folder / "sentence_bert_config.json", max_seq_length=... if explicit is None else explicit)
    encoder = load(folder)
    assert encoder.max_seq_length == expected
    assert load_reference(folder).max_seq_length == expected
    assert load(folder, max_seq_length=5).max_seq_length == 5


def test_truncated_texts_give_the_librarys_vectors(tmp_path):
    folder = save_new(tmp_path / "model", pooling(), transformer={"processor_kwargs": {"model_max_length": 6}})
    found, expected = both(folder)
    assert_close(found, expected)
    long = load(folder, max_seq_length=24).encode(TEXTS)
    assert np.abs(long - found).max() > 0.01  # texts are in fact cut at 6


def test_a_limit_beyond_the_positions_is_cut_to_them(tmp_path):
    # The library fails on a text that long.
    folder = assemble(tmp_path / "model", "mean")
    change(folder / "sentence_bert_config.json", max_seq_length=100)
    assert load(folder).max_seq_length == 24


def test_lower_casing_by_the_folders_own_setting(tmp_path):
    folder = assemble(tmp_path / "model", "mean")
    cased = load(folder)
    change(folder / "sentence_bert_config.json", do_lower_case=True)
    found, expected = both(folder)
    assert_close(found, expected)
    assert np.abs(found - cased.encode(TEXTS)).max() > 0.01


def test_a_lower_casing_model_that_the_library_saved_again_must_be_chosen(tmp_path):
    # It writes lower-casing into tokenizer.json and the opposite into tokenizer_config.json, which it then follows.
    folder = save_new(tmp_path / "model", pooling(), transformer={"do_lower_case": True})
    with pytest.raises(TokenizerError, match=r"do_lower_case is true in tokenizer\.json, but false in"):
        load(folder)
    _, expected = both(folder, tokenizer_normalizer="tokenizer.json")
    assert_close(load(folder, tokenizer_normalizer="tokenizer_config.json").encode(TEXTS), expected)


def test_a_plain_bert_folder(tmp_path):
    folder = shutil.copytree(HERE / "transformer", tmp_path / "model")
    with pytest.raises(ConfigError, match=r"no modules\.json.*pass pooling= .*with one of cls, max, mean"):
        load(folder)
    found, expected = both(folder, pooling="mean")  # the library's own guess
    assert_close(found, expected)
    arrays = np.load(HERE / "expected.npz")
    index = next(index for index, call in enumerate(GOLDEN["calls"]) if call["case"] == "cls")
    assert_close(load(folder, pooling="cls").encode(TEXTS), arrays[str(index)])


def test_the_caller_may_cut_the_vectors(folder):
    assert load(folder, truncate_dim=2).encode([]).shape == (0, 2)
    change(folder / "config_sentence_transformers.json", truncate_dim=4)
    encoder = load(folder)
    assert encoder.output_dimension() == 4
    assert encoder.output_dimension(5) == 5
    with pytest.raises(InputError, match="truncate_dim is 6, the vectors have 5"):
        encoder.output_dimension(6)
    change(folder / "config_sentence_transformers.json", truncate_dim=10**30)
    assert load(folder).output_dimension() == 5  # as the library cuts: not at all


# Refusals


def module(kind, path="", *, prefix=OLD, **fields):
    return {"idx": 0, "name": "0", "path": path, "type": f"{prefix}.{kind}"} | fields


FIRST, POOL = module("Transformer"), module("Pooling", "1_Pooling")
DEEP = "[" * 100_000 + "]" * 100_000


@pytest.mark.parametrize(
    ("modules", "message"),
    [
        ([FIRST, module("path", prefix="os")], r"module type 'os\.path' is not supported; known: sentence_"),
        ([FIRST, POOL, module("LSTM", "2_LSTM")], r"'sentence_transformers\.models\.LSTM' is not supported"),
        ([FIRST, POOL, module("WeightedLayerPooling", "2")], "WeightedLayerPooling' is not supported"),
        ([FIRST, POOL | {"type": None}], "module type None is not supported"),
        ([FIRST, POOL | {"type": ["os"]}], r"module type \['os'\] is not supported"),
        ([FIRST, POOL | {"type": {}}], r"module type \{\} is not supported"),
        ([FIRST | {"path": "../x"}, POOL], r"path '\.\./x' is not the name of a folder inside"),
        ([FIRST | {"path": "x/../../y"}, POOL], r"path 'x/\.\./\.\./y'"),
        ([FIRST | {"path": "/etc"}, POOL], "path '/etc'"),
        ([FIRST | {"path": "..\\x"}, POOL], r"path '\.\.\\\\x'"),
        ([FIRST | {"path": "C:\\x"}, POOL], r"path 'C:\\\\x'"),
        ([FIRST | {"path": "C:x"}, POOL], "path 'C:x'"),
        ([FIRST | {"path": "a\0b"}, POOL], r"path 'a\\x00b'"),
        ([FIRST | {"path": "\ud800"}, POOL], r"path '\\ud800'"),
        ([FIRST | {"path": "x" * 10_000}, POOL], "path 'xxx"),
        ([FIRST | {"path": None}, POOL], "path None"),
        ([FIRST | {"path": ["x"]}, POOL], r"path \['x'\]"),
        ([FIRST | {"path": 3}, POOL], "path 3"),
        ([FIRST, POOL, POOL], "modules are transformer, pooling, pooling; expected transformer, pooling, then"),
        ([POOL, FIRST], "modules are pooling, transformer;"),
        ([FIRST], "modules are transformer;"),
        ([FIRST, module("Normalize", "1"), POOL], "modules are transformer, normalize, pooling;"),
        ([FIRST, FIRST, POOL], "modules are transformer, transformer, pooling;"),
        ([], "modules are none;"),
        ({}, "holds a JSON dict, expected a list"),
        ({"0": FIRST, "1": POOL}, "holds a JSON dict"),
        ("modules", "holds a JSON str"),
        (None, "holds a JSON NoneType"),
        (7, "holds a JSON int"),
        ([FIRST, "pooling"], "entry 1 is 'pooling', expected a module's type and path"),
        ([None], "entry 0 is None"),
        ([FIRST, {"type": f"{OLD}.Pooling"}], r"entry 1 is \{'type': "),
        ([FIRST, {"path": "1_Pooling"}], r"entry 1 is \{'path': "),
        ([[f"{OLD}.Transformer", ""]], r"entry 0 is \['sentence"),
    ],
)
def test_unusable_modules_are_refused(folder, modules, message):
    (folder / "modules.json").write_text(json.dumps(modules))
    with pytest.raises(ConfigError, match=rf"modules\.json: .*{message}"):
        read_spec(folder)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'[{"type": "\xff"}]', "not UTF-8 text"),
        (b"", "not valid JSON"),
        (b"\xef\xbb\xbf[]", "not valid JSON"),
        ("[]".encode("utf-16"), "not UTF-8 text"),
        (b"[1,", "not valid JSON"),
        (b"9" * 10_000, "not valid JSON"),
        (DEEP.encode(), "not valid JSON"),
        (b'[{"type": "x", "path": ' + DEEP[:500].encode() + b"]" * 500 + b"}]", "module type 'x'"),
        (b"{}", "holds a JSON dict, expected a list"),
    ],
    ids=["not UTF-8", "empty", "byte order mark", "UTF-16", "cut off", "a long number", "deep", "less deep", "object"],
)
def test_modules_that_are_no_json_are_refused(folder, content, message):
    (folder / "modules.json").write_bytes(content)
    with pytest.raises(ConfigError, match=rf"modules\.json: {message}"):
        read_spec(folder)


def test_modules_that_can_not_be_read_are_refused(folder):
    (folder / "modules.json").unlink()
    (folder / "modules.json").mkdir()
    with pytest.raises(SourceError, match=r"modules\.json: can't be read"):
        read_spec(folder)


ALL_FILES = (
    "modules.json",
    "config_sentence_transformers.json",
    "sentence_bert_config.json",
    "1_Pooling/config.json",
    "2_Dense/config.json",
    "4_Normalize/config.json",
)


@pytest.mark.parametrize("name", ALL_FILES)
def test_what_is_no_file_is_not_taken_for_absent(folder, name):
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).unlink(missing_ok=True)
    os.mkfifo(folder / name)
    with pytest.raises(SourceError, match=rf"{re.escape(name)}: can't be read \(it is not a regular file"):
        read_spec(folder)
    (folder / name).unlink()
    (folder / name).symlink_to("nowhere")
    with pytest.raises(SourceError, match=rf"{re.escape(name)}: can't be read"):
        read_spec(folder)


@pytest.mark.parametrize("name", [*ALL_FILES, "1_Pooling", "2_Dense", "4_Normalize"])
def test_a_link_out_of_the_folder_is_refused(folder, tmp_path, name):
    (folder / "4_Normalize").mkdir()
    (folder / "4_Normalize" / "config.json").write_text("{}")
    (folder / name).rename(tmp_path / "elsewhere")
    (folder / name).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(SourceError, match=rf"{name}: is a link out of the model's folder, to "):
        read_spec(folder)


def test_an_encoder_behind_a_link_out_of_the_folder_is_refused(tmp_path):
    folder = assemble(tmp_path / "model", "subfolder")
    (folder / "0_Transformer").rename(tmp_path / "elsewhere")
    (folder / "0_Transformer").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(SourceError, match="0_Transformer: is a link out of the model's folder, to "):
        load(folder)


def test_a_folder_in_the_hubs_cache_is_read(folder, tmp_path):
    snapshot, blobs = tmp_path / "snapshots" / "0123", tmp_path / "blobs"
    snapshot.parent.mkdir()
    blobs.mkdir()
    folder.rename(snapshot)
    for number, file in enumerate(sorted(path for path in snapshot.rglob("*") if path.is_file())):
        file.rename(blobs / str(number))
        file.symlink_to(os.path.relpath(blobs / str(number), file.parent))
    assert load(snapshot).spec.pooling == ("mean",)


@pytest.mark.parametrize("name", ["1_Pooling", "2_Dense"])
def test_a_module_without_its_config_is_refused(folder, name):
    (folder / name / "config.json").unlink()
    with pytest.raises(SourceError, match=rf"{name}/config\.json: can't be read"):
        load(folder)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"pooling_mode": "average"}, "pooling_mode 'average' is not one of cls, max"),
        ({"pooling_mode": ["mean", "Mean"]}, "pooling_mode 'Mean' is not one of"),
        ({"pooling_mode": [["mean"]]}, r"pooling_mode \['mean'\] is not one of"),
        ({"pooling_mode": []}, r"pooling_mode is \[\], expected one or more of"),
        ({"pooling_mode": 3}, "pooling_mode is 3, expected"),
        ({"pooling_mode": {"mean": True}}, r"pooling_mode is \{'mean': True\}"),
        ({"pooling_mode_cls_token": "false"}, "pooling_mode_cls_token is 'false', expected bool"),
        ({"pooling_mode_cls_token": 1}, "pooling_mode_cls_token is 1, expected bool"),
        ({"include_prompt": "no"}, "include_prompt is 'no', expected bool"),
        ({"include_prompt": 0}, "include_prompt is 0, expected bool"),
        ({"word_embedding_dimension": "16"}, "word_embedding_dimension is '16', expected int"),
        ({"embedding_dimension": -16}, "embedding_dimension is -16, expected an integer from 1"),
        ({"pooling_mode_median": True}, r"unknown field\(s\) \['pooling_mode_median'\]"),
    ],
)
def test_unusable_pooling_is_refused(folder, fields, message):
    change(folder / "1_Pooling" / "config.json", **fields)
    with pytest.raises(ConfigError, match=rf"1_Pooling/config\.json: {message}"):
        read_spec(folder)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"activation_function": "os.system"}, r"activation_function 'os\.system' is not supported; known: torch\.nn"),
        ({"activation_function": "torch.nn.modules.activation.Softmax"}, r".*Softmax. is not supported"),
        ({"activation_function": ["torch"]}, r"activation_function is \['torch'\], expected str"),
        ({"in_features": ...}, r"in_features and out_features are \[None, 8\]; both are needed"),
        ({"out_features": None}, r"in_features and out_features are \[16, None\]"),
        ({"in_features": "16"}, "in_features is '16', expected int"),
        ({"in_features": 16.0}, r"in_features is 16\.0, expected int"),
        ({"in_features": True}, "in_features is True, expected int"),
        ({"out_features": -8}, "out_features is -8, expected an integer from 1"),
        ({"out_features": 0}, "out_features is 0"),
        ({"out_features": 10**30}, "out_features is 10000"),
        ({"bias": "true"}, "bias is 'true', expected bool"),
        ({"use_residual": 1}, "use_residual is 1, expected bool"),
        ({"module_input_name": "token_embeddings"}, "module_input_name is 'token_embeddings', expected 'sentence_emb"),
        ({"module_output_name": ["x"]}, r"module_output_name is \['x'\]"),
        ({"dropout": 0.1}, r"unknown field\(s\) \['dropout'\]"),
    ],
)
def test_unusable_dense_modules_are_refused(folder, fields, message):
    change(folder / "2_Dense" / "config.json", **fields)
    with pytest.raises(ConfigError, match=rf"2_Dense/config\.json: {message}"):
        read_spec(folder)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"module_input_name": "token_embeddings"}, "module_input_name is 'token_embeddings'"),
        ({"p": 1}, r"unknown field\(s\) \['p'\]"),
    ],
)
def test_an_unusable_normalize_is_refused(folder, fields, message):
    change(folder / "4_Normalize" / "config.json", **fields)
    with pytest.raises(ConfigError, match=rf"4_Normalize/config\.json: {message}"):
        read_spec(folder)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model_type": "CrossEncoder"}, "model_type is 'CrossEncoder'; only 'SentenceTransformer'"),
        ({"model_type": "SparseEncoder"}, "model_type is 'SparseEncoder'"),
        ({"model_type": ["SentenceTransformer"]}, r"model_type is \['SentenceTransformer'\]"),
        ({"prompts": ["query: "]}, r"prompts is \['query: '\], expected dict"),
        ({"prompts": "query: "}, "prompts is 'query: ', expected dict"),
        ({"prompts": {"query": 3}}, r"prompts\.query is 3, expected str"),
        ({"prompts": {"query": ["a"]}}, r"prompts\.query is \['a'\], expected str"),
        ({"default_prompt_name": "quarry"}, "default_prompt_name 'quarry' is not among the prompts"),
        ({"default_prompt_name": 0}, "default_prompt_name is 0, expected str"),
        ({"similarity_fn_name": "maxsim"}, "similarity_fn_name is 'maxsim', expected one of 'cosine'"),
        ({"truncate_dim": "4"}, "truncate_dim is '4', expected int"),
        ({"truncate_dim": -4}, "truncate_dim is -4, expected a positive integer"),
        ({"truncate_dim": 0}, "truncate_dim is 0, expected a positive integer"),
        ({"truncate_dim": 4.5}, r"truncate_dim is 4\.5, expected int"),
    ],
)
def test_unusable_settings_of_the_model_are_refused(folder, fields, message):
    change(folder / "config_sentence_transformers.json", **fields)
    with pytest.raises(ConfigError, match=rf"config_sentence_transformers\.json: {message}"):
        read_spec(folder)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"max_seq_length": "24"}, "max_seq_length is '24', expected int"),
        ({"max_seq_length": -1}, "max_seq_length is -1, expected a positive integer"),
        ({"max_seq_length": True}, "max_seq_length is True, expected int"),
        ({"max_seq_length": [24]}, r"max_seq_length is \[24\], expected int"),
        ({"do_lower_case": "yes"}, "do_lower_case is 'yes', expected bool"),
        ({"transformer_task": "fill-mask"}, "transformer_task is 'fill-mask'; only 'feature-extraction' is supported"),
        ({"module_output_name": "logits"}, "module_output_name is 'logits'"),
        ({"modality_config": {"image": {}}}, r"modality_config is \{'image': \{\}\}"),
        ({"modality_config": [1]}, r"modality_config is \[1\]"),
        ({"processing_kwargs": {"text": {"max_length": 3}}}, "processing_kwargs is"),
        ({"query_length": 8}, "query_length is 8"),
        ({"model_args": {"torch_dtype": "bfloat16"}}, r"model_args is \{'torch_dtype': 'bfloat16'\}"),
        ({"tokenizer_args": {"do_lower_case": True}}, "tokenizer_args is"),
        ({"tokenizer_name_or_path": "x"}, "tokenizer_name_or_path is 'x'"),
        ({"whatever": 1}, r"unknown field\(s\) \['whatever'\]"),
    ],
)
def test_unusable_settings_of_the_transformer_are_refused(folder, fields, message):
    change(folder / "sentence_bert_config.json", **fields)
    with pytest.raises(ConfigError, match=rf"sentence_bert_config\.json: {message}"):
        read_spec(folder)


def test_settings_that_change_nothing_are_accepted(folder):
    spec = read_spec(folder)
    plain = {"unpad_inputs": True, "query_length": None, "model_args": {"trust_remote_code": True}, "config_args": {}}
    change(folder / "sentence_bert_config.json", **plain)
    change(folder / "config_sentence_transformers.json", similarity_fn_name="cosine", requirements=None)
    assert read_spec(folder) == spec


CONFIGS = (
    "1_Pooling/config.json",
    "2_Dense/config.json",
    "4_Normalize/config.json",
    "config_sentence_transformers.json",
    "sentence_bert_config.json",
)


@pytest.mark.parametrize("content", [b"[]", b"null", b"3", b'"x"', b"{", b"", b'{"a": "\xff"}', DEEP.encode()])
@pytest.mark.parametrize("name", CONFIGS)
def test_files_that_hold_no_object_are_refused(folder, name, content):
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_bytes(content)
    with pytest.raises(ConfigError, match=name.replace(".", r"\.")):
        read_spec(folder)


@pytest.mark.parametrize("depth", range(20, 1000, 7))
def test_deep_values_are_refused_whatever_their_depth(folder, depth):
    # To show a value must not fail where to read it did not.
    nested = "[" * depth + "]" * depth
    (folder / "config_sentence_transformers.json").write_text(f'{{"prompts": {nested}}}')
    with pytest.raises(ConfigError, match=r"config_sentence_transformers\.json") as caught:
        read_spec(folder)
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize("pooling", ["average", (), ["mean", 3], 5, {"mean"}])
def test_an_unusable_choice_of_pooling_is_refused(folder, pooling):
    with pytest.raises(ConfigError, match="pooling"):
        read_spec(folder, pooling)
    (folder / "modules.json").unlink()
    with pytest.raises(ConfigError, match="pooling"):
        read_spec(folder, pooling)


def test_dense_sizes_that_do_not_chain_are_refused(folder):
    change(folder / "3_Dense" / "config.json", in_features=9)
    with pytest.raises(ConfigError, match="3_Dense: in_features is 9, what comes before it gives 8"):
        load(folder)
    change(folder / "1_Pooling" / "config.json", pooling_mode_cls_token=True)
    with pytest.raises(ConfigError, match="2_Dense: in_features is 16, what comes before it gives 32"):
        load(folder)


def write_dense(folder, **tensors):
    from safetensors.numpy import save_file

    save_file({name: np.zeros(shape, np.float32) for name, shape in tensors.items()}, folder / "model.safetensors")


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"linear.weight": (8, 16)}, r"linear\.bias: missing"),
        ({"linear.weight": (16, 8), "linear.bias": (8,)}, r"linear\.weight: shape \[16, 8\], the config asks"),
        ({"linear.weight": (8, 16), "linear.bias": (8,), "x": (1,)}, "x: unexpected tensor"),
        ({"weight": (8, 16), "bias": (8,)}, r"linear\.weight: missing"),
    ],
)
def test_dense_weights_that_do_not_fit_are_refused(folder, tensors, message):
    write_dense(folder / "2_Dense", **tensors)
    with pytest.raises(CheckpointError, match=rf"2_Dense: .*{message}"):
        load(folder)


def test_missing_dense_weights_are_refused(folder):
    (folder / "2_Dense" / "model.safetensors").unlink()
    with pytest.raises(BertjaxError, match="2_Dense"):
        load(folder)


def test_a_tokenizer_with_more_ids_than_embeddings_is_refused(folder):
    tokenizer = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    size = len(tokenizer["model"]["vocab"])
    tokenizer["model"]["vocab"]["surplus"] = size
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    message = rf"{folder}: .* ids up to {size}, the model's vocabulary ends at {size - 1}"
    with pytest.raises(ConfigError, match=message):
        load(folder)


def test_a_module_in_a_folder_that_is_missing_is_refused(folder):
    modules = json.loads((folder / "modules.json").read_text())
    modules[0]["path"] = "0_Transformer"
    (folder / "modules.json").write_text(json.dumps(modules))
    with pytest.raises(SourceError, match="0_Transformer"):
        load(folder)
