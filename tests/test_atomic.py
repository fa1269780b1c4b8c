import os
import shutil
import stat

import numpy as np
import pytest

from bertjax.atomic import atomic_file, atomic_folder
from bertjax.convert.orbax import write_orbax
from bertjax.errors import SourceError


def make_model(folder):
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_text("old")
    return folder


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def test_a_file_appears_whole_with_ordinary_permissions(tmp_path):
    target = tmp_path / "out.bin"
    mask = os.umask(0o027)
    try:
        with atomic_file(target) as temporary:
            temporary.write_bytes(b"data")
            assert not target.exists()
    finally:
        os.umask(mask)
    assert contents(tmp_path) == {"out.bin": b"data"}
    assert stat.S_IMODE(target.stat().st_mode) == 0o640


def test_a_folder_appears_whole_with_ordinary_permissions_and_its_parents(tmp_path):
    target = tmp_path / "a" / "b"
    mask = os.umask(0o022)
    try:
        with atomic_folder(target) as temporary:
            (temporary / "config.json").write_text("{}")
            assert not target.exists()
    finally:
        os.umask(mask)
    assert contents(tmp_path / "a") == {"b": None, "b/config.json": b"{}"}
    assert stat.S_IMODE(target.stat().st_mode) == 0o755


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError, SourceError])
@pytest.mark.parametrize("exists", [False, True])
def test_a_block_that_fails_leaves_everything_as_it_was(tmp_path, error, exists):
    if exists:
        make_model(tmp_path / "model")
        (tmp_path / "file").write_bytes(b"old")
    before = contents(tmp_path)
    with pytest.raises(error), atomic_file(tmp_path / "file") as temporary:
        temporary.write_bytes(b"half")
        raise error("in the middle")
    with pytest.raises(error), atomic_folder(tmp_path / "model", force=True) as temporary:
        (temporary / "config.json").write_text("half")
        raise error("in the middle")
    assert contents(tmp_path) == before


def test_an_oserror_becomes_a_typed_error_that_names_the_target(tmp_path):
    for context in (atomic_file(tmp_path / "out"), atomic_folder(tmp_path / "out")):
        with pytest.raises(SourceError, match=r"out: can't be written \(No space left"), context:
            raise OSError(28, "No space left on device")
    with pytest.raises(SourceError, match="missing/out: can't be written"), atomic_file(tmp_path / "missing" / "out"):
        pass
    (tmp_path / "a file").write_text("")
    with pytest.raises(SourceError, match="can't be written"), atomic_folder(tmp_path / "a file" / "out"):
        pass
    assert list(contents(tmp_path)) == ["a file"]


def write(target, force):
    with atomic_folder(target, force=force) as temporary:
        (temporary / "config.json").write_text("new")


def test_an_empty_folder_is_filled_and_a_model_is_replaced_only_by_force(tmp_path):
    (tmp_path / "empty").mkdir()
    write(tmp_path / "empty", force=False)
    assert contents(tmp_path / "empty") == {"config.json": b"new"}
    model = make_model(tmp_path / "model")
    (model / "1_Pooling").mkdir()
    before = contents(model)
    with pytest.raises(SourceError, match=r"already exists.*force"):
        write(model, force=False)
    assert contents(model) == before
    write(model, force=True)
    assert contents(model) == {"config.json": b"new"}
    assert sorted(os.listdir(tmp_path)) == ["empty", "model"]


@pytest.mark.parametrize("kind", ["file", "no config", "no weights", "git clone"])
def test_what_is_not_just_a_model_is_never_replaced(tmp_path, kind):
    target = tmp_path / "precious"
    if kind == "file":
        target.write_text("precious")
    else:
        make_model(target)
    if kind == "no config":
        (target / "config.json").unlink()
    if kind == "no weights":
        (target / "model.safetensors").rename(target / "notes.txt")
    if kind == "git clone":
        (target / ".git").mkdir()
        (target / ".git" / "HEAD").write_text("precious")
    before = contents(tmp_path)
    with pytest.raises(SourceError, match=r"precious: .*(not a folder|will not be replaced)"):
        write(target, force=True)
    assert contents(tmp_path) == before


def test_a_folder_that_appears_in_the_meantime_is_not_replaced(tmp_path):
    target = tmp_path / "model"
    with pytest.raises(SourceError, match="already exists"), atomic_folder(target) as temporary:
        (temporary / "config.json").write_text("ours")
        make_model(target)
    assert contents(tmp_path).keys() == {"model", "model/config.json", "model/model.safetensors"}
    assert (target / "config.json").read_text() == "{}"


@pytest.mark.parametrize("error", [OSError(5, "Input/output error"), KeyboardInterrupt()])
@pytest.mark.parametrize("step", [0, 1])
def test_the_old_model_comes_back_when_the_swap_fails(tmp_path, monkeypatch, error, step):
    model = make_model(tmp_path / "model")
    before = contents(tmp_path)
    rename, calls = type(model).rename, []

    def failing(path, target):
        calls.append(path)
        if len(calls) == step + 1:
            raise error
        return rename(path, target)

    monkeypatch.setattr(type(model), "rename", failing)
    with pytest.raises((SourceError, KeyboardInterrupt)):
        write(model, force=True)
    monkeypatch.undo()
    assert contents(tmp_path) == before


def test_links_and_dots_are_followed(tmp_path, monkeypatch):
    make_model(tmp_path / "real")
    (tmp_path / "link").symlink_to("real")
    write(tmp_path / "link", force=True)
    assert (tmp_path / "link").is_symlink()
    assert contents(tmp_path / "real") == {"config.json": b"new"}
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    write(".", force=False)
    assert contents(tmp_path / "here") == {"config.json": b"new"}


def test_everything_is_flushed_before_it_appears(tmp_path, monkeypatch):
    flushed = []
    real = os.fsync
    monkeypatch.setattr(os, "fsync", lambda fd: (flushed.append(os.fstat(fd).st_ino), real(fd)))
    with atomic_folder(tmp_path / "model") as temporary:
        (temporary / "1_Pooling").mkdir()
        (temporary / "1_Pooling" / "config.json").write_text("{}")
    model = tmp_path / "model"
    written = (model / "1_Pooling" / "config.json", model / "1_Pooling", model, tmp_path)
    assert flushed == [path.stat().st_ino for path in (*written[1::-1], *written[2:])]


BESIDE = (
    "bert_config.json bertjax_layout.json model-00001-of-00002.safetensors model.safetensors.index.json "
    "pytorch_model.bin flax_model.msgpack tokenizer.json tokenizer_config.json special_tokens_map.json "
    "added_tokens.json vocab.txt modules.json config_sentence_transformers.json sentence_bert_config.json "
    "sentence_xlm-roberta_config.json README.md LICENSE LICENSE.txt .gitattributes 1_Pooling/config.json "
    "2_Dense/config.json 2_Dense/model.safetensors 2_Dense/pytorch_model.bin 10_Normalize/notes.txt"
).split()
NOT_A_MODELS = (
    "notes.txt train.py config.json.orig xconfig.json data.json optimizer.pt vocab.txt.bak 1_Pooling/train.py "
    "1_Pooling/runs/config.json 1_data/config.json 1_Pooling.bak/config.json weights.bin/config.json 2024_run/x.json "
    "dense/config.json .git/HEAD params/_METADATA/x params/notes.txt params/d/notes.txt params/ocdbt.process_0/e/x"
).split()


def make_orbax(folder):
    """A model's folder with an Orbax checkpoint, and everything else that a model may have."""
    make_model(folder)
    write_orbax(folder / "params", [(("a", "b"), np.zeros((2, 300), np.float32)), (("c",), np.ones(2, np.float16))])
    for name in BESIDE:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("{}")
    return folder


def test_whatever_a_model_has_is_replaced(tmp_path):
    write(make_orbax(tmp_path / "model"), force=True)
    assert contents(tmp_path) == {"model": None, "model/config.json": b"new"}


@pytest.mark.parametrize("name", NOT_A_MODELS)
def test_what_no_model_has_is_never_replaced(name, tmp_path):
    model = make_orbax(tmp_path / "model")
    if name.startswith("params/_METADATA"):
        (model / "params" / "_METADATA").unlink()
    (model / name).parent.mkdir(parents=True, exist_ok=True)
    (model / name).write_text("precious")
    before = contents(tmp_path)
    with pytest.raises(SourceError, match=r"model: .*it holds " + name.split("/")[0] + r"\).*will not be replaced"):
        write(model, force=True)
    assert contents(tmp_path) == before


def test_params_without_metadata_and_many_strange_names(tmp_path):
    model = make_orbax(tmp_path / "model")
    (model / "params" / "_METADATA").write_text("")
    with pytest.raises(SourceError, match=r"it holds params\)"):
        write(model, force=True)
    for number in range(9):
        (model / f"{number}.txt").write_text("precious")
    with pytest.raises(SourceError, match=r"it holds 0.txt, 1.txt, 2.txt, 3.txt, 4.txt, ...\)"):
        write(model, force=True)


@pytest.mark.parametrize("context", [atomic_file, atomic_folder])
@pytest.mark.parametrize("name", ["nul\0", "lone\ud800", "nul\0/out", "lone\ud800/out"])
def test_a_name_that_no_file_can_have_is_a_typed_error(context, name, tmp_path):
    with pytest.raises(SourceError, match="can't be written") as caught, context(tmp_path / name):
        pass
    assert str(caught.value).isprintable()
    assert contents(tmp_path) == {}


@pytest.mark.parametrize("context, name", [(atomic_file, "open"), (atomic_file, "close"), (atomic_folder, "mkdir")])
def test_an_interruption_while_the_temporary_is_made_leaves_nothing(context, name, tmp_path, monkeypatch):
    """The call has done its work, and does not return."""
    real, close = getattr(os, name), os.close

    def interrupted(*arguments):
        made = real(*arguments)
        assert contents(tmp_path)
        if name == "open":
            close(made)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, name, interrupted)
        with pytest.raises(KeyboardInterrupt), context(tmp_path / "out"):
            pass
    assert contents(tmp_path) == {}


def test_a_folder_that_is_still_written_to_is_removed(tmp_path, monkeypatch):
    """A library's thread puts another file there after the first attempt."""
    real, attempts = shutil.rmtree, []

    def rmtree(folder, **options):
        attempts.append(folder)
        real(folder, **options)
        if len(attempts) < 3:
            folder.mkdir()
            (folder / "late").write_text("")

    monkeypatch.setattr(shutil, "rmtree", rmtree)
    with pytest.raises(ValueError, match="halfway"), atomic_folder(tmp_path / "out"):
        raise ValueError("halfway")
    assert len(attempts) == 3
    assert contents(tmp_path) == {}
