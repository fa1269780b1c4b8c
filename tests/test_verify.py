"""`python -m convert.verify`, as it is called from a checkout."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import DATA
from oracle import require

from bertjax import convert_checkpoint

ROOT = Path(__file__).parents[1]


def verify(*arguments):
    command = [sys.executable, "-m", "convert.verify", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


@pytest.fixture(autouse=True)
def reference():
    require("transformers")


@pytest.mark.parametrize(
    ("source", "how"),
    [("golden/plain", "loaded the checkpoint itself"), ("tf1/pretrained", "loaded it after conversion")],
)
def test_the_difference_is_printed_and_added_to_a_certificate(source, how, tmp_path):
    certificate = tmp_path / "certificate.json"
    convert_checkpoint(DATA / source, tmp_path / "out", certify=certificate)
    before = json.loads(certificate.read_text())
    done = verify(DATA / source, "--length", "8", "--certificate", certificate)
    assert done.returncode == 0, done.stderr
    assert how in done.stdout
    after = json.loads(certificate.read_text())
    found = after.pop("torch")
    assert after == before
    assert 0 < found["largest_difference"] < 1e-5
    assert f"all                      largest difference {found['largest_difference']:.2e}" in done.stdout


def test_what_differs_too_much_is_an_error():
    done = verify(DATA / "golden" / "plain", "--tolerance", "1e-12")
    assert done.returncode == 1
    assert done.stderr.endswith("differs by more than 1e-12\n")


def test_a_reference_that_computes_something_else_is_not_compared_with():
    done = verify(DATA / "golden" / "relative_key")
    assert done.returncode == 1
    assert "relative positions, which transformers 5" in done.stderr
