"""What is installed, and what importing it costs. Runs outside the checkout, as a user would."""

import json
import os
import platform
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FORBIDDEN = {"torch", "transformers", "tensorflow", "sentence_transformers"}


def python(code: str, cwd: Path) -> str:
    done = subprocess.run([sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """A copy of the checkout without anything that was built, so that nothing is left in the checkout."""
    folder = tmp_path_factory.mktemp("source") / "bertjax"
    built = (".git", ".venv", "build", "*.egg-info", "__pycache__", ".*_cache", ".hypothesis", "*.so")
    shutil.copytree(ROOT, folder, ignore=shutil.ignore_patterns(*built))
    return folder


def build(source: Path, out: Path, kind: str, **environment: str) -> tuple[Path, str]:
    """Builds a wheel or an sdist; returns its path and what was printed."""
    command = [sys.executable, "-m", "build", f"--{kind}", "--no-isolation", "-o", out, source]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | environment)
    assert done.returncode == 0, done.stdout + done.stderr
    shutil.rmtree(source / "build", ignore_errors=True)
    return next(path for path in out.iterdir() if path.suffix in (".whl", ".gz")), done.stdout + done.stderr


@pytest.fixture(scope="module")
def wheel(source, tmp_path_factory) -> Path:
    return build(source, tmp_path_factory.mktemp("wheel"), "wheel")[0]


def test_the_wheel_holds_bertjax_and_nothing_else(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names} == {"bertjax", "bertjax-0.1.0.dist-info"}
    assert "bertjax/convert/rules.py" in names
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_the_native_encoder_is_compiled_where_it_can_be(wheel):
    compiled = platform.system() == "Linux" and platform.machine() == "x86_64" and shutil.which("c++") is not None
    names = zipfile.ZipFile(wheel).namelist()
    assert ("bertjax/cpu/libencoder.so" in names) == compiled
    assert wheel.name == f"bertjax-0.1.0-py3-none-{'linux_x86_64' if compiled else 'any'}.whl"


def test_without_a_compiler_the_wheel_is_pure_and_says_so(source, tmp_path):
    path, printed = build(source, tmp_path, "wheel", CC="no-such-compiler", CXX="no-such-compiler")
    assert path.name == "bertjax-0.1.0-py3-none-any.whl"
    assert not any(name.endswith(".so") for name in zipfile.ZipFile(path).namelist())
    assert "bertjax: " in printed
    assert "XLA alone will be used" in printed


def test_the_sdist_has_what_is_compiled(source, tmp_path):
    with tarfile.open(build(source, tmp_path, "sdist")[0]) as archive:
        names = archive.getnames()
    native = [path.name for path in (ROOT / "bertjax" / "cpu").iterdir() if path.suffix in (".cc", ".h")]
    assert "encoder.cc" in native
    assert {f"bertjax-0.1.0/bertjax/cpu/{name}" for name in native} < set(names)
    assert "bertjax-0.1.0/setup.py" in names
    assert not any(name.endswith(".so") for name in names)


def test_the_wheel_works_elsewhere(wheel, tmp_path):
    """Unpacked alone, without the checkout, in a folder with a `convert.py` of the user's own."""
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    (tmp_path / "convert.py").write_text("raise RuntimeError('the user's own module was imported')")
    code = f"""
import sys
sys.path.insert(0, {str(tmp_path / "site")!r})
import bertjax
assert bertjax.__file__.startswith({str(tmp_path)!r}), bertjax.__file__
from bertjax import *
model = BertModel.from_pretrained({str(ROOT / "tests" / "data" / "golden" / "plain")!r})
print(model([[1, 2, 3]]).last_hidden_state.shape)
"""
    assert python(code, tmp_path).strip() == "(1, 3, 16)"


def test_importing_starts_no_backend_and_is_light(tmp_path):
    code = """
import json, sys
import bertjax
heavy = sorted(name for name in ("flax", "tokenizers", "huggingface_hub", "optax") if name in sys.modules)
for name in bertjax.__all__:
    getattr(bertjax, name)
from jax._src import xla_bridge
print(json.dumps({"heavy": heavy, "backends": list(xla_bridge._backends), "modules": sorted(sys.modules)}))
"""
    found = json.loads(python(code, tmp_path))
    assert found["heavy"] == []
    assert found["backends"] == []
    assert FORBIDDEN.isdisjoint(found["modules"])


def test_loading_and_running_imports_no_oracle(tmp_path):
    code = f"""
import sys
from bertjax import BertModel, convert_checkpoint
golden = {str(ROOT / "tests" / "data" / "golden" / "plain")!r}
BertModel.from_pretrained(golden)([[1, 2, 3]])
convert_checkpoint(golden, "out")
print(sorted({FORBIDDEN!r} & set(sys.modules)))
"""
    assert python(code, tmp_path).strip() == "[]"


def test_every_public_name_exists_and_others_do_not(tmp_path):
    import bertjax

    for name in bertjax.__all__:
        assert getattr(bertjax, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = bertjax.nonsense
    assert set(bertjax.__all__) <= set(dir(bertjax))
