"""Reference implementations, which tests compare against where they are installed."""

import importlib
import os
import warnings
from types import ModuleType

import pytest


def require(name: str) -> ModuleType:
    """Import a reference implementation; without it the test is skipped, but fails where CI is set.

    A CI that lost its reference would otherwise go green by comparing nothing.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what it warns of at import is its own business
            return importlib.import_module(name)
    except ImportError as error:
        if os.environ.get("CI"):
            pytest.fail(f"CI must compare with {name}, but it can't be imported: {error}")
        pytest.skip(f"needs {name}: {error}")
