"""Folders of sentence-transformers, of whatever kind."""

from pathlib import Path

from bertjax.cross_encoder_files import CrossEncoderSpec, read_cross_encoder_spec
from bertjax.errors import ConfigError
from bertjax.folders import find
from bertjax.json_files import read_json
from bertjax.sentence_files import SentenceSpec, read_spec
from bertjax.sparse_files import SparseSpec, read_sparse_spec


def read_any_spec(folder: Path) -> SentenceSpec | SparseSpec | CrossEncoderSpec:
    """Reads a folder with a modules.json as the kind of model that it says it is.

    Raises:
        SourceError, ConfigError: see `read_spec`, `read_sparse_spec` and `read_cross_encoder_spec`.
    """
    file = find(folder, "config_sentence_transformers.json")
    model_type = None if file is None else read_json(file, ConfigError).get("model_type")
    if model_type == "SparseEncoder":
        return read_sparse_spec(folder)
    return read_cross_encoder_spec(folder) if model_type == "CrossEncoder" else read_spec(folder)
