"""A tokenizer's files, and the `tokenizers` pipelines that are built from them.

What each file may hold, how files that state the same thing are reconciled, and which contents are refused.
"""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors

from bertjax.errors import BertjaxError, TokenizerError
from bertjax.folders import find
from bertjax.json_files import read_file, read_json

BERT_TOKENS = {
    "unk_token": "[UNK]",
    "sep_token": "[SEP]",
    "pad_token": "[PAD]",
    "cls_token": "[CLS]",
    "mask_token": "[MASK]",
}
# In transformers' order, in which it numbers those that a vocabulary lacks.
_ROLES = ("bos_token", "eos_token", *BERT_TOKENS)
# The normalizer flags of tokenizer_config.json, with the defaults of BertTokenizer.
FLAGS: dict[str, bool | None] = {"do_lower_case": True, "strip_accents": None, "tokenize_chinese_chars": True}
# Both transformers 4 and 5 run tokenizer.json as it is for these classes: the flags are leftovers then.
_VERBATIM_CLASSES = ("PreTrainedTokenizerFast", "TokenizersBackend")
# transformers writes int(1e30) for "no limit" and takes whatever is above 1e20 for it.
_NO_LIMIT = 10**20

# Both are read whole, and a vocabulary of short tokens takes sixty times its size in memory. The largest vocab.txt of
# a BERT, of half a million tokens, has 5 MB; the largest tokenizer.json, those of many languages, have 20 MB.
_MAX_VOCAB_BYTES = 1 << 24
_MAX_JSON_BYTES = 1 << 26

# The ids of token types become int32.
_MAX_TYPE_ID = 2**31 - 1


@dataclass(frozen=True)
class DeclaredTokens:
    """The tokens that a folder's JSON files declare.

    `named` has the five roles that BERT uses, `numbered` the added tokens with their ids, `extra` the tokens that are
    added without one.
    """

    named: dict[str, str | None] = field(default_factory=dict)
    numbered: dict[int, AddedToken] = field(default_factory=dict)
    extra: list[AddedToken] = field(default_factory=list)


@contextmanager
def as_tokenizer_error(path: Path) -> Iterator[None]:
    """Turn what `tokenizers` raises into one error that names the file."""
    try:
        yield
    except BertjaxError as error:
        if isinstance(error, TokenizerError) and str(path) not in str(error):
            raise TokenizerError(f"{path}: {error}") from error
        raise
    except BaseException as error:
        # A panic of the library's Rust code derives from BaseException, and its class can't be imported.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise TokenizerError(f"{path}: not a usable tokenizer: {error}") from error


def _read_text(path: Path, limit: int) -> str:
    raw = read_file(path, limit, TokenizerError)
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise TokenizerError(f"{path}: line {line} is not UTF-8 ({error.reason} at byte {error.start})") from error


def _read_json(folder: Path, name: str) -> dict[str, Any]:
    """The JSON object in a folder's file; {} when there is no such file."""
    path = find(folder, name)
    return {} if path is None else read_json(path, TokenizerError)


def read_config(folder: Path) -> dict[str, Any]:
    """The content of tokenizer_config.json, with the flags of `FLAGS` checked; {} when there is no such file."""
    config, path = _read_json(folder, "tokenizer_config.json"), folder / "tokenizer_config.json"
    for name, default in FLAGS.items():
        value = config.get(name, default)
        if not isinstance(value, bool) and not (name == "strip_accents" and value is None):
            raise TokenizerError(f"{path}: {name} must be true or false, not {value!r}")
    if config.get("split_special_tokens"):
        raise TokenizerError(f"{path}: split_special_tokens=true is not implemented")
    return config


def read_options(config: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """The keyword arguments of `Tokenizer` that tokenizer_config.json holds."""
    limit = config.get("model_max_length", config.get("max_len"))
    if limit is not None and (isinstance(limit, bool) or not isinstance(limit, (int, float)) or not limit >= 1):
        raise TokenizerError(f"{path}: model_max_length must be a positive number, not {limit!r}")
    side = config.get("truncation_side", "right")
    if side not in ("right", "left"):
        raise TokenizerError(f"{path}: truncation_side must be 'right' or 'left', not {side!r}")
    clean_up = config.get("clean_up_tokenization_spaces") or False
    if not isinstance(clean_up, bool):
        raise TokenizerError(f"{path}: clean_up_tokenization_spaces must be true or false, not {clean_up!r}")
    return {
        "model_max_length": None if limit is None or limit > _NO_LIMIT else int(limit),
        "truncation_side": side,
        "clean_up_tokenization_spaces": clean_up,
    }


def read_declared(folder: Path, config: Mapping[str, Any]) -> DeclaredTokens:
    """What transformers reads: added_tokens_decoder makes it ignore the two legacy files, here as there."""
    path = folder / "tokenizer_config.json"
    if "added_tokens_decoder" in config:
        named, special = _read_special(config, path)
        return DeclaredTokens(named, _read_numbered(config["added_tokens_decoder"], path), special)
    values = config | _read_json(folder, "special_tokens_map.json")
    named, special = _read_special(values, folder / "special_tokens_map.json or tokenizer_config.json")
    texts = {token.content for token in special}
    path = folder / "added_tokens.json"
    numbered = {
        _token_id(index, path): AddedToken(token, special=token in texts, normalized=token not in texts)
        for token, index in _read_json(folder, path.name).items()
    }
    return DeclaredTokens(named, numbered, special)


def _read_special(values: Mapping[str, Any], path: Path) -> tuple[dict[str, str | None], list[AddedToken]]:
    """The tokens in the roles that are stated, and all special tokens."""
    stated = {name: values[name] for name in _ROLES if name in values}
    roles = {name: None if token is None else _added_token(token, path) for name, token in stated.items()}
    extra = values.get("extra_special_tokens") or values.get("additional_special_tokens") or []
    extra = list(extra.values()) if isinstance(extra, dict) else extra
    if not isinstance(extra, list):
        raise TokenizerError(f"{path}: extra_special_tokens must be a list, not {extra!r}")
    special = [token for token in roles.values() if token is not None]
    special += [_added_token(token, path) for token in extra]
    named = {name: token and token.content for name, token in roles.items() if name in BERT_TOKENS}
    return named, special


def _read_numbered(value: Any, path: Path) -> dict[int, AddedToken]:
    if not isinstance(value, dict):
        raise TokenizerError(f"{path}: added_tokens_decoder must be an object, not {type(value).__name__}")
    return {_token_id(index, path): _added_token(token, path) for index, token in value.items()}


def _token_id(value: Any, path: Path) -> int:
    # The keys of added_tokens_decoder are ids, too, and JSON's keys are strings.
    if isinstance(value, str) and value.isascii() and value.isdigit():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise TokenizerError(f"{path}: an added token's id must be a whole number from 0, not {value!r}")
    return value


def _added_token(value: Any, path: Path) -> AddedToken:
    """A token as these files write it: its text, or an object with its text and how it is matched."""
    state = {"content": value, "special": True} if isinstance(value, str) else value
    if not isinstance(state, dict) or not isinstance(state.get("content"), str) or not state["content"]:
        raise TokenizerError(f"{path}: {value!r} is not a token")
    matching = {name: state[name] for name in ("lstrip", "rstrip", "single_word", "normalized") if name in state}
    if any("\ud800" <= character <= "\udfff" for character in state["content"]):  # JSON can spell half a character
        raise TokenizerError(f"{path}: {shorten(state['content'])} has a lone surrogate, so is no token")
    special = state.get("special", True)
    if not all(isinstance(flag, bool) for flag in (special, *matching.values())):
        raise TokenizerError(f"{path}: the flags of {value!r} must be true or false")
    return AddedToken(state["content"], special=special, **matching)


def read_vocab(path: Path) -> dict[str, int]:
    """The tokens of vocab.txt and their ids, as transformers numbers them, or an error where it is bound to go wrong.

    Refused are a byte-order mark (it would become part of the first token), and what transformers 4 and 5 read
    differently: a bare carriage return (a line's end for 4 only) and a token that ends in white space (5 strips it).
    """
    lines = _read_text(path, _MAX_VOCAB_BYTES).replace("\r\n", "\n").split("\n")
    if lines[-1] == "":
        lines.pop()
    if lines and lines[0].startswith("\ufeff"):
        raise TokenizerError(f"{path}: line 1 begins with a byte-order mark; save the file as UTF-8 without one")
    for number, token in enumerate(lines, 1):
        if "\r" in token:
            raise TokenizerError(f"{path}: line {number}, {shorten(token)}, has a carriage return that ends no line")
        if token and token[-1].isspace() and not token.isspace():
            raise TokenizerError(f"{path}: line {number}, {shorten(token)}, ends in white space")
    return {token: index for index, token in enumerate(lines)}


def describe_missing(path: Path, name: str, token: str | None, vocab: Mapping[str, int]) -> str:
    """What to say of a special token that a vocabulary lacks."""
    first = next(iter(vocab), "")
    return (
        f"{path}: {name} is {token!r}, which is none of its {len(vocab)} tokens (line 1 is {shorten(first)}); "
        "a BERT vocabulary has a token per line, the special tokens included"
    )


def read_tokenizer_json(path: Path) -> tokenizers.Tokenizer:
    """The pipeline in a tokenizer.json, with the ids of its added tokens checked."""
    text = _read_text(path, _MAX_JSON_BYTES)
    with as_tokenizer_error(path):
        backend = tokenizers.Tokenizer.from_str(text)
        for token in json.loads(text).get("added_tokens") or ():
            # The library renumbers an added token that does not follow the vocabulary, and only logs that.
            _check_id(backend, token["content"], token["id"])
    return backend


def build_wordpiece(vocab: Mapping[str, int], flags: Mapping[str, Any], unk_token: str) -> tokenizers.Tokenizer:
    """What `BertTokenizer` builds from a vocabulary, but for the post-processor, which needs the added tokens."""
    backend = tokenizers.Tokenizer(models.WordPiece(dict(vocab), unk_token=unk_token))
    backend.normalizer = _bert_normalizer(flags)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece(prefix="##")
    return backend


def _bert_normalizer(flags: Mapping[str, Any]) -> normalizers.BertNormalizer:
    return normalizers.BertNormalizer(
        clean_text=True,
        handle_chinese_chars=flags["tokenize_chinese_chars"],
        strip_accents=flags["strip_accents"],
        lowercase=flags["do_lower_case"],
    )


def normalizer_flags(normalizer: normalizers.BertNormalizer) -> dict[str, bool | None]:
    """A normalizer's settings, under the names of `FLAGS`."""
    return {
        "do_lower_case": normalizer.lowercase,
        "strip_accents": normalizer.strip_accents,
        "tokenize_chinese_chars": normalizer.handle_chinese_chars,
    }


def build_template(backend: tokenizers.Tokenizer, cls_token: str, sep_token: str) -> processors.TemplateProcessing:
    """BERT's template: [CLS] A [SEP], or [CLS] A [SEP] B [SEP] with token type 1 from B on."""
    return processors.TemplateProcessing(
        single=f"{cls_token}:0 $A:0 {sep_token}:0",
        pair=f"{cls_token}:0 $A:0 {sep_token}:0 $B:1 {sep_token}:1",
        special_tokens=[(token, backend.token_to_id(token)) for token in (cls_token, sep_token)],
    )


def complete_roles(named: Mapping[str, str | None], backend: tokenizers.Tokenizer) -> dict[str, str | None]:
    """Fill in BERT's own names where the folder states none and the vocabulary has them."""
    usual = {name: token for name, token in BERT_TOKENS.items() if backend.token_to_id(token) is not None}
    return {**dict.fromkeys(BERT_TOKENS), **usual, **named}


def register_tokens(backend: tokenizers.Tokenizer, named: Mapping[str, str | None], declared: DeclaredTokens) -> None:
    """Add the declared tokens in transformers' order: by id, then those that have none.

    Where transformers gives a special token that the vocabulary lacks a new id, past the end of the model's embedding
    table, a special token of the five roles is not added: the caller refuses it.
    """
    roles = {token for token in named.values() if token is not None}
    known = {token.content for token in backend.get_added_tokens_decoder().values()}
    numbered = [token for _, token in sorted(declared.numbered.items())]
    usual = [AddedToken(token, special=True) for token in named.values() if token is not None]
    new = []
    for token in [*numbered, *declared.extra, *usual]:
        is_absent_role = token.content in roles and backend.token_to_id(token.content) is None
        if token.content in known or (is_absent_role and token not in numbered):
            continue
        known.add(token.content)
        token.special = token.special or token.content in roles
        new.append(token)
    backend.add_tokens(new)
    for index, token in declared.numbered.items():
        _check_id(backend, token.content, index)


def _check_id(backend: tokenizers.Tokenizer, token: str, index: int) -> None:
    if backend.token_to_id(token) != index:
        raise TokenizerError(
            f"the added token {token!r} is declared with id {index}, but the vocabulary puts it at "
            f"{backend.token_to_id(token)}"
        )


def check_vocab(vocab: Mapping[str, int]) -> None:
    """Refuse ids that are no int32, and two tokens of one id: `tokenizers` itself loses one of them when it saves."""
    tokens: dict[int, str] = {}
    for token, index in vocab.items():
        if index > 2**31 - 2:  # the size of the vocabulary is to be an int32, too
            raise TokenizerError(f"{token!r} has id {index}, which is too large")
        if tokens.setdefault(index, token) != token:
            first, second = sorted((tokens[index], token))
            raise TokenizerError(f"{first!r} and {second!r} have the same id, {index}")


def check_backend(backend: tokenizers.Tokenizer) -> None:
    """Refuse a backend that would fail, or add ids of other tokens, only when it is used."""
    unk_token = getattr(backend.model, "unk_token", None)
    if unk_token is not None and backend.model.token_to_id(unk_token) is None:
        raise TokenizerError(f"the model's unknown token {unk_token!r} is not in its vocabulary")
    for encoding in (backend.encode(""), backend.encode("", "")):
        for token, index in zip(encoding.tokens, encoding.ids, strict=True):
            if backend.token_to_id(token) != index:
                raise TokenizerError(
                    f"the post-processor adds {token!r} as id {index}, but the vocabulary has it as "
                    f"{backend.token_to_id(token)}"
                )
    # A text that has no tokens shows only the types of what is added to it.
    processor = backend.post_processor
    for piece in () if processor is None else _pieces(json.loads(processor.__getstate__())):
        if piece["type_id"] > _MAX_TYPE_ID:
            raise TokenizerError(
                f"the post-processor gives {piece['id']!r} the token type {piece['type_id']}, expected at most "
                f"{_MAX_TYPE_ID}"
            )


def _pieces(processor: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """The pieces of a post-processor's templates, however it is nested."""
    for part in processor.get("processors", ()):
        yield from _pieces(part)
    for piece in [*processor.get("single", ()), *processor.get("pair", ())]:
        yield from piece.values()  # one: a SpecialToken or a Sequence


def resolve_normalizer(
    backend: tokenizers.Tokenizer, config: Mapping[str, Any], choice: str | None, folder: Path
) -> None:
    """Settle do_lower_case, strip_accents and tokenize_chinese_chars where two files state them.

    transformers 4.57 reads tokenizer.json, then `BertTokenizerFast.__init__` replaces the normalizer when it differs
    from the arguments, which come from tokenizer_config.json or are the class's defaults. transformers 5 takes the
    vocabulary out of tokenizer.json and builds the rest from these arguments. So either follows tokenizer_config.json,
    and a key that it lacks is a default which overrules tokenizer.json; but for PreTrainedTokenizerFast either follows
    tokenizer.json. Which one a model was trained with can't be known: where the two state different things, the
    caller chooses. A key that is absent states nothing, and tokenizer.json decides.
    """
    is_wordpiece = isinstance(backend.model, models.WordPiece)
    if choice == "tokenizer_config.json":
        if not is_wordpiece:
            raise TokenizerError(f"{folder}: tokenizer_config.json only describes the normalizer of a WordPiece model")
        backend.normalizer = _bert_normalizer({**FLAGS, **{name: config[name] for name in FLAGS if name in config}})
        return
    if choice == "tokenizer.json" or not is_wordpiece or config.get("tokenizer_class") in _VERBATIM_CLASSES:
        return
    found = normalizer_effects(backend.normalizer)
    stated = {name: config[name] for name in FLAGS if name in config}
    if "strip_accents" in stated and stated["strip_accents"] is None:  # it follows the lowercasing then
        stated["strip_accents"] = stated.get("do_lower_case", found["do_lower_case"])
    conflicts = [
        f"{name} is {json.dumps(found[name])} in tokenizer.json, but {json.dumps(value)} in tokenizer_config.json"
        for name, value in stated.items()
        if value != found[name]
    ]
    if conflicts:
        raise TokenizerError(
            f"{folder}: {'; '.join(conflicts)}; choose by normalizer='tokenizer.json' or "
            "normalizer='tokenizer_config.json' (transformers' BertTokenizer follows the latter)"
        )


def lowercase_first(normalizer: normalizers.Normalizer | None) -> normalizers.Normalizer:
    """Puts lower-casing before a normalizer, as sentence-transformers' own do_lower_case does."""
    if normalizer_effects(normalizer)["do_lower_case"]:
        return normalizer
    return normalizers.Sequence([normalizers.Lowercase(), *([] if normalizer is None else [normalizer])])


def normalizer_effects(normalizer: normalizers.Normalizer | None) -> dict[str, bool]:
    """What a normalizer of any kind does, in BertTokenizer's terms."""

    def normalize(text: str) -> str:
        return text if normalizer is None else normalizer.normalize_str(text)

    return {
        "do_lower_case": "a" in normalize("A"),
        "strip_accents": not {"\u00e9", "\u0301"} & set(normalize("\u00e9")),  # e with an acute, in either form
        "tokenize_chinese_chars": " \u4e2d" in normalize("a\u4e2d"),
    }


def shorten(value: Any) -> str:
    """A value's repr, cut to a length that fits in a message."""
    text = repr(value[:60] if isinstance(value, (str, bytes)) else value)
    return text if len(text) <= 80 else text[:77] + "..."
