import os
import stat

import pytest

from bertjax.atomic import atomic_file, atomic_folder
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
