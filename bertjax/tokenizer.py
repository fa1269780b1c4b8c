"""Text to token ids, and back.

`Tokenizer` gives the ids that the fast `BertTokenizer` of transformers gives (`BertTokenizerFast` in 4.57,
`BertTokenizer` in 5.x): it runs the same Rust pipeline from `tokenizers`, built from the same files. What differs is
deliberate: truncation and padding are never inherited from a file, and files that contradict one another are refused
where transformers silently follows one of them.
"""

import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import tokenizers
from tokenizers import AddedToken

from bertjax.atomic import atomic_file
from bertjax.errors import InputError, SourceError, TokenizerError
from bertjax.folders import find
from bertjax.text_inputs import check_texts, raise_for_input, whole_number
from bertjax.tokenizer_files import (
    BERT_TOKENS,
    FLAGS,
    DeclaredTokens,
    as_tokenizer_error,
    build_template,
    build_wordpiece,
    check_backend,
    check_vocab,
    complete_roles,
    describe_missing,
    lowercase_first,
    read_config,
    read_declared,
    read_options,
    read_tokenizer_json,
    read_vocab,
    register_tokens,
    resolve_normalizer,
)
from bertjax.tokenizer_saving import config_to_save
from bertjax.tokens import Tokens, align, int32_rows
from bertjax.windows import cut_windows, encode_parts

Truncation = Literal["longest_first", "only_first", "only_second"]

# What transformers' `clean_up_tokenization` replaces, in its order.
_CLEAN_UP = {s: s[1:] for s in (" .", " ?", " !", " ,")} | {" ' ": "'"}
_CLEAN_UP |= {s: s[1:] for s in (" n't", " 'm", " 's", " 've", " 're")}


class Tokenizer:
    """Text to ids, exactly as the fast `BertTokenizer` of transformers; make one by `from_folder` or `from_vocab`.

    A tokenizer is immutable, and one object may be used from several threads.

    Attributes:
        backend: the `tokenizers.Tokenizer` underneath, without truncation or padding. For reading only: to change it
            would change this tokenizer.
        model_max_length: the limit that the tokenizer's files state (never applied by itself), or None.
        vocab_size: the highest id plus one, added tokens included: the rows an embedding table must have. It differs
            from the number of tokens where ids repeat or have gaps.
        pad_token_id: int.
        unk_token_id, cls_token_id, sep_token_id, mask_token_id: int, or None where the tokenizer has no such token.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        special_tokens: Mapping[str, str | None],
        model_max_length: int | None = None,
        truncation_side: Literal["right", "left"] = "right",
        clean_up_tokenization_spaces: bool = False,
    ):
        """Wrap a configured backend; its truncation and padding are dropped, the backend itself is not changed.

        Args:
            backend: any `tokenizers.Tokenizer`.
            special_tokens: the tokens in the roles `unk_token`, `sep_token`, `pad_token`, `cls_token`, `mask_token`.
            model_max_length: see the class.
            truncation_side: which end of a text `max_length` cuts off.
            clean_up_tokenization_spaces: whether `decode` removes the spaces before punctuation and contractions.

        Raises:
            TokenizerError: there is no padding token, a special token is not in the vocabulary, two tokens have the
                same id, or the backend's post-processor contradicts the vocabulary.
        """
        self.backend = _clone(backend)
        # A clone that truncates, kept for the next call, and how it does so.
        self._last_truncating: tuple[tuple[int, Truncation] | None, tokenizers.Tokenizer] = (None, self.backend)
        self.model_max_length = model_max_length
        self._truncation_side = truncation_side
        self._clean_up = clean_up_tokenization_spaces
        self._special_tokens = {name: special_tokens.get(name) for name in BERT_TOKENS}
        for name, token in self._special_tokens.items():
            if token is not None and self.token_to_id(token) is None:
                raise TokenizerError(f"the vocabulary lacks the {name} {token!r}")
        if self._special_tokens["pad_token"] is None:
            raise TokenizerError("no pad_token: name the padding token in tokenizer_config.json")
        self.unk_token_id, self.sep_token_id, self.pad_token_id, self.cls_token_id, self.mask_token_id = (
            None if token is None else self.token_to_id(token) for token in self._special_tokens.values()
        )
        # A blank line of vocab.txt has an id, but no text ever gives it: no embedding is needed for it.
        vocab = self.backend.get_vocab(with_added_tokens=True)
        self.vocab_size = 1 + max((index for token, index in vocab.items() if token), default=-1)
        check_vocab(vocab)
        check_backend(self.backend)

    @classmethod
    def from_pretrained(cls, path_or_hub_id: str | os.PathLike[str], **options: Any) -> "Tokenizer":
        """Loads a folder's or a repository's tokenizer; see `bertjax.pretrained_text.load_tokenizer`."""
        # Imported here because a tokenizer knows nothing of the Hub: `pretrained_text` imports this module.
        from bertjax.pretrained_text import load_tokenizer

        return load_tokenizer(path_or_hub_id, **options)

    @classmethod
    def from_folder(
        cls,
        folder: str | os.PathLike[str],
        *,
        normalizer: Literal["tokenizer.json", "tokenizer_config.json"] | None = None,
        do_lower_case: bool = False,
    ) -> "Tokenizer":
        """Load a tokenizer as `save_pretrained`, transformers and sentence-transformers lay it out.

        `tokenizer.json` decides where it exists, whatever kind of tokenizer it holds (WordPiece, Unigram, ...); of the
        truncation and the padding in it only the side that truncation cuts counts. Otherwise a BERT tokenizer is
        built from `vocab.txt`. Either is completed by `tokenizer_config.json`, `special_tokens_map.json` and
        `added_tokens.json`.

        Args:
            folder: the folder of these files.
            normalizer: which file to follow where tokenizer.json and tokenizer_config.json state different
                `do_lower_case`, `strip_accents` or `tokenize_chinese_chars`; None refuses such a folder.
                transformers follows tokenizer_config.json when it loads a `BertTokenizer`.
            do_lower_case: lowercase texts first, whatever the files say: sentence-transformers has a setting of its
                own for it.

        Raises:
            SourceError: the folder has neither tokenizer.json nor vocab.txt; or one of its files can't be read, is no
                regular file, or is a link out of the folder.
            TokenizerError: a file is malformed, or files contradict one another.
            InputError: `normalizer` is none of the three.
        """
        if normalizer not in (None, "tokenizer.json", "tokenizer_config.json"):
            raise InputError(f"normalizer must be tokenizer.json, tokenizer_config.json or None, not {normalizer!r}")
        folder = Path(folder)
        config = read_config(folder)
        declared = read_declared(folder, config)
        options = read_options(config, folder / "tokenizer_config.json")
        if (source := find(folder, "tokenizer.json")) is not None:
            backend = read_tokenizer_json(source)
            resolve_normalizer(backend, config, normalizer, folder)
            if "truncation_side" not in config and backend.truncation is not None:
                options["truncation_side"] = backend.truncation["direction"]
            named = complete_roles(declared.named, backend)
        elif (vocab := find(folder, "vocab.txt")) is not None:
            flags = {name: config.get(name, default) for name, default in FLAGS.items()}
            named = BERT_TOKENS | declared.named
            return cls._build(vocab, flags, named, declared, options, do_lower_case)
        else:
            raise SourceError(f"{folder} has neither tokenizer.json nor vocab.txt (or is no folder that can be read)")
        with as_tokenizer_error(source):
            register_tokens(backend, named, declared)
            if do_lower_case:
                backend.normalizer = lowercase_first(backend.normalizer)
            return cls(backend, special_tokens=named, **options)

    @classmethod
    def from_vocab(
        cls,
        vocab_file: str | os.PathLike[str],
        *,
        do_lower_case: bool = True,
        strip_accents: bool | None = None,
        tokenize_chinese_chars: bool = True,
        unk_token: str = "[UNK]",
        sep_token: str = "[SEP]",
        pad_token: str = "[PAD]",
        cls_token: str = "[CLS]",
        mask_token: str | None = "[MASK]",
        added_tokens: Sequence[str | AddedToken] = (),
        model_max_length: int | None = None,
    ) -> "Tokenizer":
        """Build a BERT tokenizer from a vocabulary: a token per line, whose id is the line's index.

        Of a token on several lines the last counts, as in transformers.

        Args:
            vocab_file: UTF-8 text, lines ended by LF or CRLF.
            do_lower_case: lowercase the text.
            strip_accents: remove accents; None does so where the text is lowercased.
            tokenize_chinese_chars: make each Chinese character a word.
            unk_token: stands for a word that has no pieces in the vocabulary.
            sep_token: ends each segment.
            pad_token: fills rows up.
            cls_token: begins each text.
            mask_token: the masked token; None for a vocabulary without one.
            added_tokens: tokens matched in the text before it is split; those that the vocabulary lacks get the ids
                after it, in this order.
            model_max_length: see the class.

        Raises:
            SourceError: the file can't be read.
            TokenizerError: the file is no such vocabulary, or lacks a special token.
        """
        flags = dict(zip(FLAGS, (do_lower_case, strip_accents, tokenize_chinese_chars), strict=True))
        named = dict(zip(BERT_TOKENS, (unk_token, sep_token, pad_token, cls_token, mask_token), strict=True))
        extra = [token if isinstance(token, AddedToken) else AddedToken(token) for token in added_tokens]
        options = {"model_max_length": model_max_length}
        return cls._build(Path(vocab_file), flags, named, DeclaredTokens(extra=extra), options)

    @classmethod
    def _build(
        cls,
        path: Path,
        flags: Mapping[str, Any],
        named: Mapping[str, Any],
        declared: DeclaredTokens,
        options: Mapping[str, Any],
        do_lower_case: bool = False,
    ) -> "Tokenizer":
        vocab = read_vocab(path)
        with as_tokenizer_error(path):
            backend = build_wordpiece(vocab, flags, named["unk_token"])
            register_tokens(backend, named, declared)
            for name, token in named.items():
                has_none = name == "mask_token" and token is None  # the one role that encoding does without
                if not has_none and (token is None or backend.token_to_id(token) is None):
                    raise TokenizerError(describe_missing(path, name, token, vocab))
            backend.post_processor = build_template(backend, named["cls_token"], named["sep_token"])
            if do_lower_case:
                backend.normalizer = lowercase_first(backend.normalizer)
            return cls(backend, special_tokens=named, **options)

    def __call__(
        self,
        texts: Sequence[str],
        pairs: Sequence[str] | None = None,
        *,
        max_length: int | None = None,
        truncation: Truncation = "longest_first",
        return_alignment: bool = False,
        first_position: int = 0,
    ) -> Tokens:
        """Tokenize texts, or pairs of texts, and add the special tokens.

        Args:
            texts: list of n texts.
            pairs: the second text of each pair, a list of n, or None.
            max_length: the most tokens in a row, special tokens included; None never truncates.
            truncation: which text of a pair is cut: token by token the longer one, only the first, or only the second.
            return_alignment: give the `alignments`, too: which characters and words the tokens come from. Slower.
            first_position: what an error message calls the first text, for a caller that passes a stream by parts.

        Raises:
            InputError: `texts` or `pairs` is not a list of well-formed strings (the message gives the position),
                `max_length` leaves no room for the special tokens, or the text that may be cut is too short.
        """
        texts, pairs = check_texts(texts, pairs, first_position)
        inputs: list[Any] = texts if pairs is None else list(zip(texts, pairs, strict=True))
        backend = self._truncating(max_length, truncation, pair=pairs is not None)
        try:
            encodings = backend.encode_batch(inputs) if return_alignment else backend.encode_batch_fast(inputs)
        except Exception as error:
            raise_for_input(backend, inputs, error, first_position)
        return Tokens(
            input_ids=int32_rows([encoding.ids for encoding in encodings]),
            token_type_ids=int32_rows([encoding.type_ids for encoding in encodings]),
            truncated=np.array([bool(encoding.overflowing) for encoding in encodings], bool),
            pad_token_id=self.pad_token_id,
            alignments=[align(encoding) for encoding in encodings] if return_alignment else None,
        )

    def windows(
        self,
        texts: Sequence[str],
        pairs: Sequence[str] | None = None,
        *,
        max_length: int,
        stride: int,
        first_position: int = 0,
    ) -> tuple[Tokens, np.ndarray]:
        """Tokenize texts of any length: one that is too long becomes several rows, each a window over it.

        Of pairs, the windows go over the second text, and every row has the whole first. These are the rows of
        transformers' `return_overflowing_tokens=True`, there with `truncation="only_second"` for pairs. Windows start
        at the text's beginning whichever side this tokenizer truncates, as nothing is cut off.

        Args:
            texts: list of n texts.
            pairs: the second text of each pair, a list of n, or None.
            max_length: the most tokens in a row, special tokens included.
            stride: how many tokens a window shares with the one before.
            first_position: as in a call.

        Returns:
            The rows, with their `alignments`, and owners, int64 [rows]: the index of each row's text in `texts`. They
            are in the order of the texts, and a text's windows in the order they have in it. None is `truncated`.

        Raises:
            InputError: `texts` or `pairs` is not a list of well-formed strings, or `max_length` and the first text of
                a pair that is too long leave no room for more than `stride` tokens (the message gives the position).
        """
        texts, pairs = check_texts(texts, pairs, first_position)
        room, stride = whole_number(max_length, "max_length"), whole_number(stride, "stride")
        room -= self.num_special_tokens(pairs is not None)
        if room <= stride:
            raise InputError(
                f"max_length={max_length} leaves {max(room, 0)} tokens besides the special ones, which is too few for "
                f"windows that share stride={stride}; use a larger max_length or a smaller stride"
            )
        bare = _clone(self.backend)
        bare.post_processor = None
        windows = [
            (owner, row, types)
            for owner, parts in enumerate(encode_parts(bare, texts, pairs, first_position))
            for row, types in cut_windows(self.backend, parts, room, stride, owner + first_position)
        ]
        tokens = Tokens(
            input_ids=int32_rows([row.ids for _, row, _ in windows]),
            token_type_ids=int32_rows([types for _, _, types in windows]),
            truncated=np.zeros(len(windows), bool),
            pad_token_id=self.pad_token_id,
            alignments=[align(row) for _, row, _ in windows],
        )
        return tokens, np.array([owner for owner, _, _ in windows], np.int64)

    def _truncating(self, max_length: int | None, truncation: Truncation, pair: bool) -> tokenizers.Tokenizer:
        """A backend that truncates so; backends are shared between threads and stay as they are."""
        if truncation not in ("longest_first", "only_first", "only_second"):
            raise InputError(f"truncation must be longest_first, only_first or only_second, not {truncation!r}")
        if truncation == "only_second" and not pair:
            raise InputError("truncation='only_second' cuts the second text of each pair, but there are no pairs")
        if max_length is None:
            return self.backend
        # What is above what the backend can count, such as the 10^30 that stands for no limit in transformers' files.
        max_length = min(whole_number(max_length, "max_length"), sys.maxsize)
        if max_length < self.num_special_tokens(pair):
            raise InputError(f"max_length={max_length} is less than the {self.num_special_tokens(pair)} special tokens")
        wanted = (max_length, truncation)
        last, backend = self._last_truncating
        if last != wanted:
            backend = _clone(self.backend)
            backend.enable_truncation(max_length, strategy=truncation, direction=self._truncation_side)
            self._last_truncating = (wanted, backend)
        return backend

    def decode(self, ids: Sequence[int] | np.ndarray, skip_special_tokens: bool = True) -> str:
        """The text of one row of ids, [tokens]; ids outside the vocabulary are left out, as transformers does.

        Raises:
            InputError: `ids` is not one row of whole numbers from 0.
        """
        try:
            row = np.asarray(ids)
        except ValueError as error:
            raise InputError(f"ids must be one row of whole numbers: {error}") from error
        if row.ndim != 1 or (row.size and row.dtype.kind not in "iu"):
            raise InputError(f"ids must be one row of whole numbers, not {row.dtype} of shape {row.shape}")
        if row.size and (row.min() < 0 or row.max() >= 2**32):
            raise InputError("ids must be from 0 to 2**32 - 1: drop the positions that carry a label such as -100")
        text = self.backend.decode(row.tolist(), skip_special_tokens=skip_special_tokens)
        for found, replacement in _CLEAN_UP.items() if self._clean_up else ():
            text = text.replace(found, replacement)
        return text

    def token_to_id(self, token: str) -> int | None:
        """The id of a token, or None when the vocabulary lacks it."""
        return self.backend.token_to_id(token)

    def id_to_token(self, index: int) -> str | None:
        """The token of an id, or None when the vocabulary has none."""
        return self.backend.id_to_token(index) if 0 <= index < 2**32 else None

    def num_special_tokens(self, pair: bool) -> int:
        """How many tokens are added to a text, or to a pair of texts."""
        return self.backend.num_special_tokens_to_add(pair)

    def save_pretrained(self, folder: str | os.PathLike[str], *, model_max_length: int | None = None) -> None:
        """Write tokenizer.json and tokenizer_config.json, from which transformers and this class give the same ids.

        Either file appears whole or not at all.

        Args:
            folder: the folder, which is made if need be.
            model_max_length: the longest text in tokens, in the place of the tokenizer's own.

        Raises:
            SourceError: the folder can't be made or written to.
        """
        folder = Path(folder)
        config = config_to_save(
            self.backend,
            self._special_tokens,
            model_max_length=model_max_length or self.model_max_length,
            truncation_side=self._truncation_side,
            clean_up_tokenization_spaces=self._clean_up,
        )
        texts = {
            "tokenizer.json": self.backend.to_str(pretty=True),
            "tokenizer_config.json": json.dumps(config, indent=2, ensure_ascii=False) + "\n",
        }
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise SourceError(f"can't save the tokenizer to {folder}: {error}") from error
        for name, text in texts.items():
            with atomic_file(folder / name) as temporary:
                temporary.write_text(text, encoding="utf-8")


def _clone(backend: tokenizers.Tokenizer) -> tokenizers.Tokenizer:
    """A backend of its own truncation and padding (none yet) that shares the vocabulary: under a millisecond."""
    clone = tokenizers.Tokenizer(backend.model)
    for part in ("normalizer", "pre_tokenizer", "post_processor", "decoder"):
        value = getattr(backend, part)
        if value is not None:
            setattr(clone, part, value)
    clone.add_tokens([token for _, token in sorted(backend.get_added_tokens_decoder().items())])
    return clone
