"""The errors bertjax raises on purpose.

Each message says what is wrong, where (file, key or position) and what the caller can do about it. Everything derives
from `BertjaxError`, so one `except` catches whatever this package refuses; each also derives from the built-in
exception a reader would expect.
"""


class BertjaxError(Exception):
    """Base class of every error that bertjax raises on purpose."""


class ConfigError(BertjaxError, ValueError):
    """A model configuration is malformed, inconsistent, or asks for something bertjax does not implement."""


class CheckpointError(BertjaxError, ValueError):
    """A checkpoint's tensors or files do not form the model they claim to be."""


class TokenizerError(BertjaxError, ValueError):
    """A tokenizer's files are malformed or contradict one another."""


class InputError(BertjaxError, ValueError):
    """What the caller passed to a model, a tokenizer or an encoder is not usable; says at which position."""


class SourceError(BertjaxError, OSError):
    """A folder, a file or a repository on the Hub can't be found, reached, read or written."""


class JobError(BertjaxError, ValueError):
    """A job over a corpus does not go with what is in its folder."""


class TrainingError(BertjaxError, ArithmeticError):
    """A training run can't go on: its numbers are no numbers any more."""
