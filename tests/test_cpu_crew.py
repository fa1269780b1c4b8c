"""The threads that share the native encoder's work, in a program of their own, where cores are what the test says."""

import platform
import shutil
import subprocess
from pathlib import Path

import pytest

HERE = Path(__file__).parent
COMPILER = shutil.which("c++")
pytestmark = pytest.mark.skipif(
    COMPILER is None or platform.machine() != "x86_64", reason="needs a C++ compiler for x86-64, as the library does"
)


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    built = tmp_path_factory.mktemp("crew") / "crew"
    headers = HERE.parent / "bertjax" / "cpu"
    command = [COMPILER, "-std=c++17", "-O1", "-pthread", f"-I{headers}", HERE / "crew.cc", "-o", built]
    subprocess.run(command, check=True)
    return built


@pytest.mark.parametrize(
    ("caller", "helper", "cores", "asked"),
    [
        (2, 2, "0123", ["013", "0123"]),  # it moves, and is free to be moved again
        (2, 1, "0123", []),
        (2, 2, "2", []),
    ],
)
def test_a_helper_on_its_callers_core_moves_to_another(program, caller, helper, cores, asked):
    command = [program, str(caller), str(helper), cores]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.split() == asked
