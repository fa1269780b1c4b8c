"""Where tokens come from in the text, and windows over long texts."""

import itertools
import json
import re

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from test_tokenizer import GOLDEN, HARD, TOKENS, VOCAB, lists, load_oracle, tokenizer_json, write
from tokenizers import models, pre_tokenizers, processors

from bertjax.errors import InputError
from bertjax.tokenizer import Tokenizer
from bertjax.tokens import Alignment

N = len(TOKENS)
ADDED = {"Sun River": N, "[E1]": N + 1}
KINDS = {
    "uncased": {"do_lower_case": True},
    "cased": {"do_lower_case": False},
    "uncased with accents": {"do_lower_case": True, "strip_accents": False},
    "cased without accents": {"do_lower_case": False, "strip_accents": True},
}
HARD = [*HARD, "\ufeff", "👩\u200d👩\u200d👧", "🇫🇷", "\U0001d11e", "a\u0300\u0323", "\r\n", " \t\xa0"]
HARD += ["ﬃ", "Σς", "\x7f"]
TEXT = st.lists(st.one_of(st.sampled_from(TOKENS + HARD), st.text(max_size=6)), max_size=12).flatmap(
    lambda parts: st.sampled_from([" ".join(parts), "".join(parts)])
)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    files = {"vocab.txt": VOCAB, "added_tokens.json": ADDED}
    root = tmp_path_factory.mktemp("kinds")
    return {
        name: write(root / name, files | {"tokenizer_config.json": flags | {"additional_special_tokens": ["[E1]"]}})
        for name, flags in KINDS.items()
    }


@pytest.fixture(scope="module")
def kinds(folders):
    """Tokenizers of every kind of normalizer, among them the chain that sentence-transformers' own setting makes."""
    found = {name: Tokenizer.from_folder(folder) for name, folder in folders.items()}
    return found | {"lowercased first": Tokenizer.from_folder(folders["cased"], do_lower_case=True)}


@pytest.fixture(scope="module")
def both(kinds, folders):
    return kinds["uncased"], load_oracle(folders["uncased"])


# Offsets


def rows_of(alignments):
    """Alignments as transformers gives them: lists, with None instead of -1."""
    ids = [[None if index < 0 else index for index in row.word_ids.tolist()] for row in alignments]
    sequences = [[None if index < 0 else index for index in row.sequence_ids.tolist()] for row in alignments]
    return [[tuple(pair) for pair in row.offsets.tolist()] for row in alignments], ids, sequences


def oracle_rows(theirs):
    rows = range(len(theirs["input_ids"]))
    return (
        [list(map(tuple, row)) for row in theirs["offset_mapping"]],
        [theirs.word_ids(row) for row in rows],
        [theirs.sequence_ids(row) for row in rows],
    )


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(TEXT, TEXT), min_size=1, max_size=3), st.one_of(st.none(), st.integers(3, 16)), st.booleans())
def test_any_text_has_transformers_alignment(both, inputs, max_length, pair):
    ours, oracle = both
    texts, pairs = [first for first, _ in inputs], [second for _, second in inputs] if pair else None
    tokens = ours(texts, pairs, max_length=max_length, return_alignment=True)
    cut = {"truncation": max_length is not None, "max_length": max_length}
    theirs = oracle(texts, pairs, return_offsets_mapping=True, **cut)
    assert rows_of(tokens.alignments) == oracle_rows(theirs)
    assert lists(tokens.input_ids) == theirs["input_ids"] == lists(ours(texts, pairs, max_length=max_length).input_ids)
    assert lists(tokens.token_type_ids) == theirs["token_type_ids"]


def surface(tokenizer, token_id, continues):
    token = tokenizer.id_to_token(token_id)
    return token.removeprefix("##") if continues else token


def normalized(tokenizer, text):
    """What a text comes to, without the white space that separates words."""
    return "".join(tokenizer.backend.normalizer.normalize_str(text).split())


@pytest.mark.parametrize("kind", [*KINDS, "lowercased first"])
@settings(max_examples=100, deadline=None)
@given(text=TEXT)
def test_offsets_are_the_characters_that_became_the_token(kinds, kind, text):
    tokenizer = kinds[kind]
    tokens = tokenizer([text], return_alignment=True)
    ids, alignment = tokens.input_ids[0][1:-1].tolist(), tokens.alignments[0]
    spans, words = alignment.offsets[1:-1].tolist(), alignment.word_ids[1:-1].tolist()
    end = index = 0
    while index < len(ids):
        start, stop = spans[index]
        assert end <= start < stop <= len(text)
        assert normalized(tokenizer, text[end:start]) == "", "characters that belong to no token, but to a word"
        first = index  # pieces of one character, such as the letters of a Korean syllable, share its offsets
        while index < len(ids) and spans[index][0] < stop:
            stop = max(stop, spans[index][1])
            index += 1
        if tokenizer.unk_token_id not in ids[first:index]:
            pieces = [surface(tokenizer, ids[i], i > 0 and words[i] == words[i - 1]) for i in range(first, index)]
            assert normalized(tokenizer, "".join(pieces)) == normalized(tokenizer, text[start:stop])
        end = stop
    assert normalized(tokenizer, text[end:]) == ""


@pytest.mark.parametrize(
    ("kind", "text", "pieces"),
    [
        ("uncased", "\ufeffThe\x00 sun\u3000 NAÏVE", ["The", "sun", "NAÏVE"]),
        ("uncased", "cafe\u0301 the", ["cafe", "the"]),  # the accent, a character by itself, belongs to no token
        ("uncased", "İstanbul the", ["İstanbul", "the"]),
        ("lowercased first", "İsé", ["İsé"]),  # an i, and a dot above, which no piece has: [UNK]
        ("lowercased first", "Straße É", ["Straße", "É"]),
        ("uncased", "中文😀the", ["中", "文", "😀", "t", "h", "e"]),
        ("uncased", "a [MASK] sun  river, sun", ["a", "[MASK]", "sun", "river", ",", "sun"]),
        ("uncased", "a sun river.", ["a", "sun river", "."]),
        ("cased", "Xy sun", ["X", "y", "sun"]),
    ],
)
def test_slices_of_the_text(kinds, kind, text, pieces):
    alignment = kinds[kind]([text], return_alignment=True).alignments[0]
    assert [text[start:end] for start, end in alignment.offsets[1:-1]] == pieces


def test_the_arrays(kinds):
    tokens = kinds["uncased"](["the sun", ""], ["", "xy."], return_alignment=True)
    first, second = tokens.alignments
    for alignment, row in zip(tokens.alignments, tokens.input_ids, strict=True):
        assert {array.dtype for array in vars(alignment).values()} == {np.dtype(np.int32)}
        assert [array.shape for array in vars(alignment).values()] == [(len(row), 2), (len(row),), (len(row),)]
    assert first.offsets.tolist() == [[0, 0], [0, 3], [4, 7], [0, 0], [0, 0]]
    assert first.word_ids.tolist() == [-1, 0, 1, -1, -1] and first.sequence_ids.tolist() == [-1, 0, 0, -1, -1]
    assert second.offsets.tolist() == [[0, 0], [0, 0], [0, 1], [1, 2], [2, 3], [0, 0]]
    assert second.word_ids.tolist() == [-1, -1, 0, 0, 1, -1]
    assert second.sequence_ids.tolist() == [-1, -1, 1, 1, 1, -1]
    assert kinds["uncased"](["the"]).alignments is None
    assert kinds["uncased"]([], return_alignment=True).alignments == []


def test_a_row_without_tokens(tmp_path):
    files = {"tokenizer.json": tokenizer_json(post_processor=None), "tokenizer_config.json": {}}
    tokenizer = Tokenizer.from_folder(write(tmp_path, files))
    empty, pair = tokenizer([""], return_alignment=True), tokenizer(["a"], ["b"], return_alignment=True)
    assert empty.alignments[0].offsets.shape == (0, 2) and empty.alignments[0].offsets.dtype == np.int32
    assert pair.alignments[0].sequence_ids.tolist() == [0, 1]


def test_unigram_counts_in_characters_too(tmp_path):
    tokenizer = Tokenizer.from_folder(write(tmp_path, GOLDEN["folders"]["unigram"]["files"]))
    text = "the \ufb01sh 中a <mask> river"  # NFKC makes two letters of the ligature
    tokens = tokenizer([text], return_alignment=True)
    alignment = tokens.alignments[0]
    slices = [text[start:end] for start, end in alignment.offsets[1:-1]]
    assert slices[0] == "the" and slices[-1].strip() == "river" and slices[-2].strip() == "<mask>"
    words = [np.flatnonzero(alignment.word_ids == word) for word in dict.fromkeys(alignment.word_ids[1:-1])]
    spans = [alignment.char_span(word[0], word[0], align_to_words=True) for word in words]
    assert [text[start:end].strip() for start, end in spans] == ["the", "\ufb01sh", "中a", "<mask>", "river"]


# Spans


ROW = Alignment(
    offsets=np.array([[0, 0], [0, 1], [1, 4], [0, 0], [0, 2], [2, 3], [4, 9], [0, 0]], np.int32),
    word_ids=np.array([-1, 0, 0, -1, 0, 0, 1, -1], np.int32),
    sequence_ids=np.array([-1, 0, 0, -1, 1, 1, 1, -1], np.int32),
)


@pytest.mark.parametrize(
    ("first", "last", "exact", "whole"),
    [
        (1, 1, (0, 1), (0, 4)),
        (2, 2, (1, 4), (0, 4)),
        (5, 5, (2, 3), (0, 3)),
        (5, 6, (2, 9), (0, 9)),
        (np.int64(4), np.int32(4), (0, 2), (0, 3)),
        (6, 6, (4, 9), (4, 9)),
    ],
)
def test_spans_of_characters(first, last, exact, whole):
    assert ROW.char_span(first, last) == exact
    assert ROW.char_span(first, last, align_to_words=True) == whole
    assert all(type(number) is int for number in ROW.char_span(first, last))


@pytest.mark.parametrize("align_to_words", [True, False])
@pytest.mark.parametrize(
    ("first", "last", "message"),
    [
        (0, 0, "not all of one text"),
        (0, 2, "not all of one text"),
        (2, 5, "tokens 2 to 5 are not all of one text"),
        (6, 7, "not all of one text"),
        (2, 1, "tokens 2 to 1 are no span of a row of 8 tokens"),
        (4, 8, "tokens 4 to 8 are no span"),
        (-1, 2, "first must be a whole number"),
        (1, 2.0, "last must be a whole number"),
    ],
)
def test_spans_that_are_none(first, last, message, align_to_words):
    with pytest.raises(InputError, match=message):
        ROW.char_span(first, last, align_to_words=align_to_words)


def test_the_word_that_a_window_cuts_has_the_part_in_the_row(kinds):
    tokens, _ = kinds["uncased"].windows(["pqrs the"], max_length=4, stride=0)
    assert [row.char_span(1, 1, align_to_words=True) for row in tokens.alignments] == [(0, 2), (2, 4), (5, 8)]


# Windows


def windows_fit(full, pair, max_length, stride):
    """Whether the windows can be made: counted from the untruncated rows."""
    room = max_length - (3 if pair else 2)
    if room <= stride:
        return False
    for row in full.alignments:
        first, second = (int((row.sequence_ids == sequence).sum()) for sequence in (0, 1))
        if pair and first + second > room and room - first <= stride:
            return False
    return True


SIZES = st.tuples(st.integers(2, 20), st.integers(0, 9)).map(lambda sizes: {"max_length": sizes[0], "stride": sizes[1]})


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(TEXT, TEXT), min_size=1, max_size=3), SIZES, st.booleans())
def test_windows_are_those_of_transformers(both, inputs, sizes, pair):
    ours, oracle = both
    texts, pairs = [first for first, _ in inputs], [second for _, second in inputs] if pair else None
    full = ours(texts, pairs, return_alignment=True)
    if not windows_fit(full, pair, **sizes):
        with pytest.raises(InputError):
            ours.windows(texts, pairs, **sizes)
        return
    tokens, owners = ours.windows(texts, pairs, **sizes)
    overflow = {"return_overflowing_tokens": True, "return_offsets_mapping": True}
    cut = {"truncation": "only_second" if pair else "only_first"}
    theirs = oracle(texts, pairs, **cut, **overflow, **sizes)
    assert lists(tokens.input_ids) == theirs["input_ids"]
    assert lists(tokens.token_type_ids) == theirs["token_type_ids"]
    assert owners.tolist() == theirs["overflow_to_sample_mapping"]
    assert rows_of(tokens.alignments) == oracle_rows(theirs)
    assert max(map(len, tokens.input_ids)) <= sizes["max_length"] and not tokens.truncated.any()
    assert (owners.dtype, tokens.truncated.shape) == (np.int64, (len(tokens),))


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(TEXT, TEXT), min_size=1, max_size=3), SIZES, st.booleans())
def test_windows_hold_every_token_once_but_for_the_overlap(kinds, inputs, sizes, pair):
    tokenizer = kinds["cased"]
    texts, pairs = [first for first, _ in inputs], [second for _, second in inputs] if pair else None
    full = tokenizer(texts, pairs, return_alignment=True)
    if not windows_fit(full, pair, **sizes):
        return
    tokens, owners = tokenizer.windows(texts, pairs, **sizes)
    assert sorted(set(owners.tolist())) == list(range(len(texts)))

    def table(ids, types, row):
        return np.column_stack([ids, types, row.word_ids, row.sequence_ids, row.offsets])

    rows = list(map(table, tokens.input_ids, tokens.token_type_ids, tokens.alignments))
    for index, whole in enumerate(map(table, full.input_ids, full.token_type_ids, full.alignments)):
        mine = [rows[row] for row in np.flatnonzero(owners == index)]
        parts = [row[row[:, 3] == int(pair)] for row in mine]
        shared = sizes["stride"]
        for before, after in itertools.pairwise(parts):
            assert (before[len(before) - shared :] == after[:shared]).all() and len(after) > shared
        joined = np.concatenate([parts[0], *(part[shared:] for part in parts[1:])])
        assert (joined == whole[whole[:, 3] == int(pair)]).all()
        for row in mine:  # the rest of each row is the same: the first text and the special tokens
            assert (row[row[:, 3] != int(pair)] == whole[whole[:, 3] != int(pair)]).all()


def test_windows_of_texts_around_the_limit(kinds):
    tokenizer = kinds["uncased"]
    texts = ["", "a b", "a b c", "a b c d", "a b c d e f"]
    tokens, owners = tokenizer.windows(texts, max_length=5, stride=1)
    letters = [tokenizer.decode(row) for row in tokens.input_ids]
    assert letters == ["", "a b", "a b c", "a b c", "c d", "a b c", "c d e", "e f"]
    assert owners.tolist() == [0, 1, 2, 3, 3, 4, 4, 4]
    tokens, owners = tokenizer.windows([], max_length=5, stride=1)
    assert (len(tokens), tokens.alignments, owners.shape, owners.dtype) == (0, [], (0,), np.int64)


def test_the_side_that_truncation_cuts_has_no_say(tmp_path):
    config = {"tokenizer_config.json": {"truncation_side": "left"}}
    left = Tokenizer.from_folder(write(tmp_path / "left", {"vocab.txt": VOCAB} | config))
    assert left.decode(left(["a b c d e"], max_length=4).input_ids[0]) == "d e"
    tokens, _ = left.windows(["a b c d e"], max_length=4, stride=0)
    assert [left.decode(row) for row in tokens.input_ids] == ["a b", "c d", "e"]


def test_every_window_has_the_types_of_the_template(tmp_path):
    processor = processors.TemplateProcessing(
        single="[CLS]:2 $A:3 [SEP]:2",
        pair="[CLS]:2 $A:1 [SEP]:0 $B:3 [SEP]:4",
        special_tokens=[("[CLS]", 3), ("[SEP]", 4)],
    )
    section = json.loads(processor.__getstate__())
    files = {"tokenizer.json": tokenizer_json(post_processor=section), "tokenizer_config.json": {}}
    tokenizer = Tokenizer.from_folder(write(tmp_path, files))
    pairs, _ = tokenizer.windows(["a"], ["b c d"], max_length=6, stride=1)
    assert lists(pairs.token_type_ids) == [[2, 1, 0, 3, 3, 4]] * 2
    single, _ = tokenizer.windows(["a b c d"], max_length=5, stride=2)
    assert lists(single.token_type_ids) == [[2, 3, 3, 3, 2]] * 2


@pytest.mark.parametrize("pair", [False, True])
@pytest.mark.parametrize("prefix", [False, True])
def test_byte_level_windows_are_those_of_the_library(prefix, pair):
    """Its post-processor trims spaces off the offsets, which must happen once."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    ids = {character: index for index, character in enumerate(["<s>", "</s>", "<pad>", *alphabet])}
    backend = tokenizers.Tokenizer(models.BPE(vocab=ids, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix)
    backend.post_processor = processors.RobertaProcessing(("</s>", 1), ("<s>", 0), add_prefix_space=prefix)
    tokenizer = Tokenizer(backend, special_tokens={"pad_token": "<pad>"})
    text = "the é  sun 中 river"
    tokens, _ = tokenizer.windows(["a b"] if pair else [text], [text] if pair else None, max_length=12, stride=2)
    backend.enable_truncation(12, stride=2, strategy="only_second" if pair else "only_first")
    first = backend.encode("a b", text) if pair else backend.encode(text)
    rows = [first, *first.overflowing]
    assert len(rows) > 2 and lists(tokens.input_ids) == [row.ids for row in rows]
    assert [list(map(tuple, row.offsets.tolist())) for row in tokens.alignments] == [row.offsets for row in rows]
    ends = [row.char_span(len(row.offsets) - 2, len(row.offsets) - 2)[1] for row in tokens.alignments]
    assert ends == sorted(ends) and ends[-1] == len(text)


def test_windows_without_room_name_the_position(kinds):
    tokenizer = kinds["uncased"]
    questions, contexts = ["a", "a b c", "a b c d e f"], ["the " * 9, "the " * 9, "the"]
    call = {"max_length": 9, "stride": 3}
    message = re.escape(
        "position 11: the first text of the pair has 3 tokens, which leaves 3 for a window over the 9 of the second, "
        "and stride=3 needs more"
    )
    with pytest.raises(InputError, match=message):
        tokenizer.windows(questions, contexts, first_position=10, **call)
    with pytest.raises(InputError, match=r"position 2: .* has 6 tokens, which leaves 0 for"):
        tokenizer.windows(questions, contexts, max_length=8, stride=0)
    # The third pair is full, too, but fits: windows need no room there.
    questions[1] = "a b"
    tokens, owners = tokenizer.windows(questions, contexts, max_length=10, stride=3)
    assert owners.tolist()[-1] == 2 and len(tokens.input_ids[-1]) == 10


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((5, 3), "max_length=5 leaves 3 tokens .* share stride=3"),
        ((2, 0), "max_length=2 leaves 0 tokens"),
        ((0, 0), "max_length=0 leaves 0 tokens"),
        ((5, -1), "stride must be a whole number"),
        ((5, 1.0), "stride must be a whole number"),
        ((None, 1), "max_length must be a whole number"),
        ((True, 0), "max_length must be a whole number"),
    ],
)
def test_sizes_without_room_are_refused_whatever_the_texts(kinds, sizes, message):
    for texts in ([], [""], ["the sun"]):
        with pytest.raises(InputError, match=message):
            kinds["uncased"].windows(texts, max_length=sizes[0], stride=sizes[1])


def test_texts_are_checked_as_in_a_call(kinds):
    tokenizer = kinds["uncased"]
    for call in (tokenizer.windows, lambda *args, **sizes: tokenizer(*args, return_alignment=True, first_position=5)):
        sizes = {"max_length": 9, "stride": 0} | {"first_position": 5}
        with pytest.raises(InputError, match=r"texts\[6\] has a lone surrogate"):
            call(["a", "\ud800"], **sizes)
        with pytest.raises(InputError, match=r"pairs\[5\] has a lone surrogate"):
            call(["a", "b"], ["a\udc00", "b"], **sizes)
        with pytest.raises(InputError, match=r"pairs\[6\] is None of type NoneType"):
            call(["a", "b"], ["a", None], **sizes)
        with pytest.raises(InputError, match="2 texts, but 1 pairs"):
            call(["a", "b"], ["a"], **sizes)
        with pytest.raises(InputError, match="texts is one str"):
            call("a", **sizes)
