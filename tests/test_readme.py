"""The README's Python examples, run as they stand; what they print is what the README says."""

import contextlib
import io
import re
from pathlib import Path

import pytest

README = (Path(__file__).parent.parent / "README.md").read_text()
EXAMPLES = re.findall(r"```python\n(.*?)```\n(?:\n```text\n(.*?)```)?", README, re.DOTALL)
NAME = "sentence-transformers/all-MiniLM-L6-v2"


@pytest.mark.parametrize(("code", "expected"), EXAMPLES, ids=range(len(EXAMPLES)))
def test_example(code, expected, minilm, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(code.replace(NAME, str(minilm)), "README.md", "exec"), {})
    assert printed.getvalue() == expected


def test_there_are_examples():
    assert len(EXAMPLES) == 6


def test_the_jax_example_is_short():
    code = next(code for code, _ in EXAMPLES if "shard_map" in code)
    assert len([line for line in code.splitlines() if line.strip()]) < 15
