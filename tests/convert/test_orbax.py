import json
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import orbax.checkpoint as ocp
import pytest

from bertjax.convert import rules
from bertjax.convert.orbax import METADATA_FILE, OrbaxArray, read_orbax, write_orbax
from bertjax.convert.tensors import DTYPES
from bertjax.errors import BertjaxError, CheckpointError, SourceError


def example():
    """An array of every dtype; random bytes, so NaNs too."""
    rng = np.random.default_rng(0)
    leaves = {}
    for name, dtype in DTYPES.items():
        data = np.frombuffer(rng.bytes(6 * dtype.itemsize), np.uint8)
        leaves["encoder", name, "kernel"] = (data & 1 if dtype.kind == "b" else data).view(dtype).reshape(2, 3)
    leaves["bias",] = np.array(np.pi)
    leaves["zeros",] = np.zeros((2, 3), np.float32)  # a chunk of nothing but the fill value
    leaves["transposed",] = np.arange(6, dtype=np.float32).reshape(2, 3).T
    leaves["strided",] = np.arange(24, dtype=np.float64).reshape(4, 6)[::2, ::3]
    return leaves


@pytest.fixture
def folder(tmp_path):
    write_orbax(tmp_path / "model", example().items())
    return tmp_path / "model"


def same(a, b):
    return isinstance(a, np.ndarray) and (a.dtype, a.shape, a.tobytes()) == (b.dtype, b.shape, b.tobytes())


def test_what_is_written_is_read(folder):
    found, expected = read_orbax(folder), example()
    assert found.keys() == expected.keys()
    for path, info in found.items():
        assert info == OrbaxArray(folder, path, expected[path].shape, expected[path].dtype, info.spec)
        assert same(info.read(), expected[path])


def test_programs_that_use_orbax_restore_it(folder):
    expected = example()
    for checkpointer in (ocp.StandardCheckpointer(), ocp.PyTreeCheckpointer()):
        with checkpointer:
            restored = dict(rules.flatten(checkpointer.restore(folder)))
        assert restored.keys() == expected.keys()
        assert all(same(restored[path], array) for path, array in expected.items())


@pytest.mark.parametrize("options", [{}, {"use_ocdbt": False}, {"use_zarr3": True}, {"use_compression": False}])
def test_what_orbax_writes_itself_is_read(options, tmp_path):
    expected = example()
    with ocp.PyTreeCheckpointer(**options) as checkpointer:
        checkpointer.save(tmp_path / "t", rules.unflatten(expected.items()))
    assert all(same(info.read(), expected[path]) for path, info in read_orbax(tmp_path / "t").items())


def test_what_was_saved_from_a_device_is_read(tmp_path):
    import jax.numpy as jnp

    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "t", {"a": {"b": jnp.arange(3, dtype=jnp.bfloat16)}})
    (info,) = read_orbax(tmp_path / "t").values()
    assert same(info.read(), np.arange(3).astype(DTYPES["BF16"]))


def test_relative_paths_work(folder, monkeypatch):
    monkeypatch.chdir(folder.parent)
    folder = folder.relative_to(folder.parent)
    assert read_orbax(folder)["bias",].read() == np.pi
    write_orbax(folder.with_name("other"), [(("a",), np.ones(1))])
    assert read_orbax(folder.with_name("other"))["a",].read() == 1


def test_nothing_is_logged_and_no_thread_is_left(tmp_path, caplog):
    threads, level = threading.active_count(), logging.getLogger("absl").level
    with caplog.at_level(logging.INFO):
        write_orbax(tmp_path / "t", [(("a",), np.ones(1))])
        read_orbax(tmp_path / "t")["a",].read()
    assert not caplog.records
    assert logging.getLogger("absl").level == level
    assert threading.active_count() <= threads + 1  # the event loop of tensorstore may stay


def test_orbax_is_not_imported_before_it_is_needed():
    code = "import sys, bertjax.convert.orbax; sys.exit(bool({'orbax', 'tensorstore'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_nothing_is_written_over(folder):
    with pytest.raises(SourceError, match="model: already exists"):
        write_orbax(folder, [(("a",), np.ones(1))])
    assert len(read_orbax(folder)) == len(example())


def test_a_folder_that_cant_be_made_is_named(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(SourceError, match="file/model: can't be written"):
        write_orbax(tmp_path / "file" / "model", [(("a",), np.ones(1))])


def test_a_full_disk_is_one_error_and_leaves_no_half_a_checkpoint(tmp_path):
    code = """
import resource, signal, sys
import numpy as np
from pathlib import Path
from bertjax.convert.orbax import write_orbax
from bertjax.errors import SourceError
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
try:
    write_orbax(Path(sys.argv[1], "model"), [((str(i),), np.ones((500, 500))) for i in range(8)])
except SourceError as error:
    print(error)
"""
    result = subprocess.run([sys.executable, "-c", code, tmp_path], check=True, capture_output=True, text=True)
    assert re.match(f"{tmp_path}/model: can't be written .*", result.stdout)
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize("array", [np.ones((0, 3), np.float32), np.ones(3, np.uint32), np.array(["a"])])
def test_what_orbax_cant_hold_is_refused(array, tmp_path):
    with pytest.raises(CheckpointError, match=r"'a/b' has shape .* can't hold"):
        write_orbax(tmp_path / "t", [(("a", "b"), array)])
    assert not (tmp_path / "t").exists()


def test_a_folder_that_is_no_checkpoint_is_named(tmp_path):
    with pytest.raises(SourceError, match=r"missing: can't be read \(No such file"):
        read_orbax(tmp_path / "missing")
    with pytest.raises(CheckpointError, match=f"{tmp_path.name}: not an Orbax checkpoint.*{METADATA_FILE}"):
        read_orbax(tmp_path)


@pytest.mark.parametrize(
    "content", ["", "{", "[]", "{}", '{"tree_metadata": 3}', '{"tree_metadata": {"a": 1}}', '{"a":' * 100_000, "\0"]
)
def test_garbled_metadata_is_refused(content, folder):
    (folder / METADATA_FILE).write_text(content)
    with pytest.raises(CheckpointError, match=f"{METADATA_FILE}: "):
        read_orbax(folder)


def test_a_leaf_that_is_described_twice_is_refused(folder):
    text = (folder / METADATA_FILE).read_text()
    (folder / METADATA_FILE).write_text(text.replace('"key": "bias"', '"key": "zeros"'))
    with pytest.raises(CheckpointError, match=f"{METADATA_FILE}: describes 'zeros' twice"):
        read_orbax(folder)


@pytest.mark.parametrize("key", ["../x", "/etc", "", ".", "..", "a\\b", 3, None])
def test_a_key_that_could_be_a_path_is_refused(key, folder):
    text = (folder / METADATA_FILE).read_text()
    (folder / METADATA_FILE).write_text(text.replace('"key": "bias"', f'"key": {json.dumps(key)}'))
    with pytest.raises(CheckpointError, match=f"has the key {re.escape(repr(key))}"):
        read_orbax(folder)


def files(folder):
    return sorted(path for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize("damage", ["missing", "empty", "cut", "garbled"])
def test_any_damaged_file_gives_typed_errors_or_the_same_arrays(damage, tmp_path):
    """Orbax keeps more than it reads, so damage may be without consequence; silent zeros would be one."""
    write_orbax(tmp_path / "whole", example().items())
    expected, refused = example(), 0
    for number, original in enumerate(files(tmp_path / "whole")):
        copy = tmp_path / str(number)
        shutil.copytree(tmp_path / "whole", copy)
        file = copy / original.relative_to(tmp_path / "whole")
        data = file.read_bytes()
        if damage == "missing":
            file.unlink()
        else:
            file.write_bytes({"empty": b"", "cut": data[: len(data) // 2], "garbled": b"\xa5" * 7 + data[7:]}[damage])
        try:
            assert all(same(info.read(), expected[path]) for path, info in read_orbax(copy).items())
        except BertjaxError as error:
            refused += 1
            assert str(copy) in str(error)
    assert refused >= 3


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("shape", [1 << 30, 1 << 30], "impossible shape"),
        ("chunks", [1 << 40, 3], "is in chunks of"),
        ("dtype", "<u4", "has dtype uint32"),
        ("dtype", "|O", "damaged"),
        ("shape", [-1, 3], "damaged"),
    ],
)
def test_a_hostile_description_of_an_array_is_refused(field, value, message, tmp_path):
    with ocp.PyTreeCheckpointer(use_ocdbt=False) as checkpointer:
        checkpointer.save(tmp_path / "t", {"a": np.ones((2, 3), np.float32)})
    file = tmp_path / "t" / "a" / ".zarray"
    file.write_text(json.dumps(json.loads(file.read_text()) | {field: value}))
    with pytest.raises(CheckpointError, match=f"t: .*{message}"):
        read_orbax(tmp_path / "t")


BLOSC = {"cname": "lz4", "clevel": 5, "shuffle": 1, "blocksize": 0}
CODECS = [
    {"name": "bytes", "configuration": {"endian": "little"}},
    {"name": "blosc", "configuration": BLOSC | {"shuffle": "shuffle", "typesize": 4}},
]
SHARDS = {"chunk_shape": [2, 3], "codecs": CODECS, "index_codecs": CODECS[:1]}


@pytest.mark.parametrize("zarr", ["zarr", "zarr3", "sharded"])
def test_blosc_is_refused_before_it_is_unpacked(zarr, tmp_path):
    """It allocates what a chunk's header says, which may be a gigabyte."""
    with ocp.PyTreeCheckpointer(use_ocdbt=False, use_zarr3=zarr != "zarr") as checkpointer:
        checkpointer.save(tmp_path / "t", {"a": np.ones((2, 3), np.float32)})
    file = tmp_path / "t" / "a" / (".zarray" if zarr == "zarr" else "zarr.json")
    found = json.loads(file.read_text())
    if zarr == "zarr":
        found["compressor"] = {"id": "blosc"} | BLOSC
    else:
        found["codecs"] = CODECS if zarr == "zarr3" else [{"name": "sharding_indexed", "configuration": SHARDS}]
    file.write_text(json.dumps(found))
    with pytest.raises(CheckpointError, match="t: 'a' is compressed with blosc"):
        read_orbax(tmp_path / "t")


def test_nothing_is_being_written_once_it_was_interrupted(tmp_path, monkeypatch):
    save, ended = ocp.Checkpointer.save, []

    def slow(*arguments):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.5)
        save(*arguments)
        ended.append(True)

    monkeypatch.setattr(ocp.Checkpointer, "save", slow)
    with pytest.raises(KeyboardInterrupt):
        write_orbax(tmp_path / "t", [(("a",), np.ones(1))])
    assert ended


def test_data_that_is_missing_is_not_taken_for_zeros(tmp_path):
    with ocp.PyTreeCheckpointer(use_ocdbt=False) as checkpointer:
        checkpointer.save(tmp_path / "t", {"a": np.ones((2, 3), np.float32)})
    (tmp_path / "t" / "a" / "0.0").unlink()
    with pytest.raises(CheckpointError, match=r"t: .*damaged at 'a'"):
        read_orbax(tmp_path / "t")["a",].read()


def test_a_leaf_that_is_no_array_is_refused(tmp_path):
    with ocp.PyTreeCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "t", {"a": {"b": "text"}})
    with pytest.raises(CheckpointError, match="'a/b' is of type 'string', expected an array"):
        read_orbax(tmp_path / "t")


def test_links_and_pipes_are_refused_unless_they_stay_inside(folder, tmp_path):
    file = next(path for path in files(folder) if path.parent.name == "d")
    inner = folder / "moved"
    file.rename(inner)
    file.symlink_to(inner)
    assert read_orbax(folder)["bias",].read() == np.pi
    outer = tmp_path / "outside"
    inner.rename(outer)
    file.unlink()
    file.symlink_to(outer)
    with pytest.raises(SourceError, match=f"{file.name}: is a link out of the model's folder"):
        read_orbax(folder)
    file.unlink()
    file.symlink_to(folder / "nothing")
    with pytest.raises(SourceError, match=f"{file.name}: can't be read"):
        read_orbax(folder)
    file.unlink()
    os.mkfifo(file)
    with pytest.raises(SourceError, match=f"{file.name}: is neither a file nor a folder"):
        read_orbax(folder)
    file.unlink()
    outer.rename(file)
    (folder / "more").symlink_to(tmp_path)
    with pytest.raises(SourceError, match="more: is a link out of the model's folder"):
        read_orbax(folder)


def test_the_arrays_are_not_copied_while_they_are_written(tmp_path):
    """Orbax's defaults would need two more copies of everything."""
    code = """
import sys, resource
import numpy as np, orbax.checkpoint
from pathlib import Path
from bertjax.convert.orbax import write_orbax
rng = np.random.default_rng(0)
arrays = [((str(i),), rng.standard_normal((4, 1024, 1024), np.float32)) for i in range(12)]
write_orbax(Path(sys.argv[1], "small"), [(("a",), np.ones(1))])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
write_orbax(Path(sys.argv[1], "large"), arrays)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    result = subprocess.run([sys.executable, "-c", code, tmp_path], check=True, capture_output=True, text=True)
    assert int(result.stdout) * 1024 < 0.25 * 12 * 4 * (4 << 20)
