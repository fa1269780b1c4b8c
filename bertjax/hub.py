"""A local folder, or a snapshot of a repository on the Hugging Face Hub: either way a folder of files.

The Hub client's own cache, tokens, offline mode and environment variables apply unchanged.
"""

import logging
import os
import re
from collections.abc import Sequence
from pathlib import Path

from bertjax.errors import SourceError

logger = logging.getLogger(__name__)

# What is fetched: configuration, tokenizer and weights, at the top or in a sentence-transformers module's folder. What
# else a repository holds stays where it is.
_CONFIGURATION = (
    "config.json",
    "bert_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.txt",
    "modules.json",
    "bertjax_layout.json",
    "config_sentence_transformers.json",
    "sentence_*_config.json",
    "[0-9]*_*/*.json",
    "[0-9]*_*/vocab.txt",
    "[1-9]*_*/model.safetensors",
    "[1-9]*_*/pytorch_model.bin",
)

# The encoder's weights in each format, in the order of preference: the first that a repository has is fetched, and no
# other. Old sentence-transformers repositories have them in 0_Transformer.
_WEIGHTS = (
    ("model.safetensors", "model.safetensors.index.json", "model-*-of-*.safetensors", "0_*/model*.safetensors"),
    ("pytorch_model.bin", "pytorch_model.bin.index.json", "pytorch_model-*-of-*.bin", "0_*/pytorch_model*.bin"),
    ("flax_model.msgpack", "flax_model.msgpack.index.json", "flax_model-*-of-*.msgpack"),
    ("*.ckpt.index", "*.ckpt.data-*", "*.ckpt-*.index", "*.ckpt-*.data-*"),
    ("params/*",),
)

_REPOSITORY = re.compile(r"[\w.-]+(/[\w.-]+)?")


def resolve(
    path_or_hub_id: str | Path,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
    weights: bool = True,
) -> Path:
    """Returns a folder that holds a model's files, or one of its weight files if that is what was named.

    Args:
        path_or_hub_id: a folder, a file of weights, the prefix of a TensorFlow checkpoint, or a repository on the Hub
            such as "sentence-transformers/all-MiniLM-L6-v2".
        revision: for the Hub: a branch, a tag or a commit.
        token: for the Hub: an access token, True for the stored one, or None for the client's default.
        cache_dir: for the Hub: where to keep the files; default: the client's cache.
        local_files_only: for the Hub: use what is in the cache, ask nobody.
        weights: whether the weights are needed; without them only small files are fetched.

    Raises:
        SourceError: there is no such folder or repository, or the Hub can't be reached.
    """
    if not isinstance(path_or_hub_id, str | os.PathLike):
        raise SourceError(f"{path_or_hub_id!r:.80} is not the name of a model; expected a folder or a Hub repository")
    folder = Path(os.path.expanduser(path_or_hub_id))
    if not os.fspath(path_or_hub_id):
        raise SourceError("the name of the model is empty; expected a folder or a repository on the Hub")
    # os.path.exists has an answer where Path.exists raises: for a name that is too long, or holds a NUL.
    if os.path.exists(folder) or os.path.exists(f"{folder}.index"):
        if revision is not None:
            raise SourceError(f"{folder}: is a local path; revision={revision!r} applies to the Hub only")
        return folder
    name = os.fspath(path_or_hub_id)
    if isinstance(path_or_hub_id, Path) or not _REPOSITORY.fullmatch(name) or ".." in name or name.startswith("."):
        raise SourceError(f"{name}: no such folder (and not the name of a repository, like organisation/model)")
    return _snapshot(name, revision, token, cache_dir, local_files_only, _WEIGHTS if weights else ())


def _snapshot(
    name: str,
    revision: str | None,
    token: str | bool | None,
    cache_dir: str | Path | None,
    local_files_only: bool,
    weights: Sequence[Sequence[str]],
) -> Path:
    # The client takes a while to import, and a local folder does not need it.
    from huggingface_hub import errors, snapshot_download

    at = f" at revision {revision!r}" if revision else ""
    options = {"token": token, "cache_dir": cache_dir, "local_files_only": local_files_only}
    try:
        patterns = [*_CONFIGURATION, *(weights[0] if weights else ())]
        path = Path(snapshot_download(name, revision=revision, allow_patterns=patterns, **options))
        for patterns in weights[1:]:
            if _has_weights(path):
                break
            # The commit that was fetched first, whatever the branch says by now.
            snapshot_download(name, revision=path.name, allow_patterns=list(patterns), **options)
    except errors.GatedRepoError:
        raise SourceError(f"{name}: this repository is gated; accept its terms on the Hub and pass a token") from None
    except errors.RepositoryNotFoundError:
        raise SourceError(
            f"{name}: neither a folder here nor a repository on the Hub; a private one needs a token"
        ) from None
    except errors.RevisionNotFoundError:
        raise SourceError(f"{name}: the Hub has no revision {revision!r} of it") from None
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled):
        raise SourceError(
            f"{name}{at}: no such folder, not in the cache of the Hub, and the Hub can't be asked; "
            "check the name and the connection, whether offline mode is on, or pass a local folder"
        ) from None
    except errors.HFValidationError as problem:
        raise SourceError(f"{name}: not a repository's name ({problem})") from None
    except Exception as problem:  # the client's transport has error classes of its own, other ones in each version
        raise SourceError(f"{name}{at}: can't be fetched from the Hub ({problem})") from None
    logger.info("%s%s resolved to %s", name, at, path)
    return path


def _has_weights(folder: Path) -> bool:
    """Whether the encoder's weights are there, in some format."""
    return any(True for patterns in _WEIGHTS for pattern in patterns for _ in folder.glob(pattern))
