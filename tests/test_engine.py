import dataclasses

import numpy as np
import pytest
from conftest import WORDS
from hypothesis import given, settings
from hypothesis import strategies as st

from bertjax import BertConfig, Tokenizer
from bertjax.engine import Encoded, Engine, progress_bar
from bertjax.errors import ConfigError, InputError
from bertjax.tokenizer import Tokens

CONFIG = BertConfig(
    vocab_size=5 + len(WORDS),
    hidden_size=8,
    num_hidden_layers=1,
    num_attention_heads=1,
    intermediate_size=8,
    max_position_embeddings=200,
)


@pytest.fixture(scope="module")
def tokenizer(vocab_file):
    return Tokenizer.from_vocab(vocab_file)


@pytest.fixture(scope="module")
def engine(tokenizer):
    return Engine(CONFIG, tokenizer, step_tokens=256)


def rows_of(items, position):
    """Item [a, b, ...] becomes a row of a tokens, one of b tokens, and so on, every id its own."""
    lengths = [length for item in items for length in item]
    ids = np.arange(1, 1 + sum(lengths), dtype=np.int32) + 1000 * position
    rows = np.split(ids, np.cumsum(lengths)[:-1])
    owners = np.repeat(np.arange(len(items)), [len(item) for item in items])
    return Encoded(items, Tokens(rows, [np.zeros_like(row) for row in rows], np.zeros(len(rows), bool), 0), owners)


def totals(batch):
    """The sum of the ids of every segment of every row."""
    segments = batch.segment_ids[:, None, :] == np.arange(1, 1 + batch.segment_ids.shape[1])[:, None]
    return (segments * batch.input_ids[:, None, :]).sum(-1)


items = st.lists(st.lists(st.integers(1, 200), min_size=1, max_size=4), max_size=30)


@settings(max_examples=60, deadline=None)
@given(items=items, chunk=st.integers(1, 7))
def test_results_come_back_to_their_rows_and_items(engine, items, chunk):
    seen = []
    for run, read in ((lambda batch: batch.input_ids, "per_token"), (totals, "per_row")):
        seen = []
        for window in engine.windows(iter(items), rows_of, run, chunk=chunk):
            ids = window.encoded.tokens.input_ids
            expected = ids if read == "per_token" else [row.sum() for row in ids]
            for found, right in zip(getattr(window, read)(), expected, strict=True):
                np.testing.assert_array_equal(found, right)
            lengths = [[] for _ in window.encoded.items]
            for owner, row in zip(window.encoded.owners, ids, strict=True):
                lengths[owner].append(len(row))
            assert lengths == window.encoded.items
            assert window.num_tokens == sum(map(sum, lengths)) <= window.num_positions
            seen += window.encoded.items
        assert seen == items


def test_a_stream_is_read_a_little_ahead_of_what_is_given(engine):
    read = []

    def endless():
        while True:
            read.append(1)
            yield [100]

    windows = engine.windows(endless(), rows_of, lambda batch: batch.input_ids, chunk=8)
    given_back = [len(next(windows).encoded.items) for _ in range(3)]
    assert len(read) < sum(given_back) + 2 * max(given_back)


def test_what_came_before_an_error_is_given_first(engine):
    def failing():
        yield from ([[150]] * 500)
        raise RuntimeError("the stream broke")

    found = 0
    with pytest.raises(RuntimeError, match="the stream broke"):
        for window in engine.windows(failing(), rows_of, lambda batch: batch.input_ids, chunk=16):
            found += len(window.encoded.items)
    assert found == 496  # whole chunks


def test_the_longest_row_is_the_least_of_all_limits(tokenizer, caplog):
    assert Engine(CONFIG, tokenizer).max_length == 200
    assert Engine(CONFIG, tokenizer, max_length=20).max_length == 20
    assert type(Engine(CONFIG, tokenizer, max_length=np.int64(20)).max_length) is int
    assert caplog.records == []
    assert Engine(CONFIG, tokenizer, max_length=201).max_length == 200
    assert "cut at the model's 200 positions, not at 201" in caplog.text


@pytest.mark.parametrize(
    ("config", "options", "message"),
    [
        ({"vocab_size": 20}, {}, "here: the tokenizer has ids up to .*, the model's vocabulary ends at 19"),
        ({}, {"max_length": 1}, "here: at most 1 tokens leave no room for the 2 special tokens"),
        ({}, {"step_tokens": 0}, "step_tokens is 0"),
        ({}, {"step_tokens": True}, "step_tokens is True"),
        ({}, {"max_length": "20"}, "max_length is '20'"),
    ],
)
def test_what_does_not_belong_together_is_refused(tokenizer, config, options, message):
    with pytest.raises(ConfigError, match=message):
        Engine(dataclasses.replace(CONFIG, **config), tokenizer, source="here", **options)


def test_a_progress_bar_has_a_total_where_there_is_one(capsys):
    for items, shown in (([1, 2, 3, 4], "3/4 "), (iter([1, 2, 3, 4]), "3text")):
        with progress_bar(items, "text", show=True) as bar:
            bar.update(3)
        assert shown in capsys.readouterr().err
    for show in (False, None):  # and None shows none where there is no terminal
        with progress_bar([1], "text", show=show) as bar:
            bar.update(1)
        assert capsys.readouterr().err == ""


def test_a_row_without_tokens_is_refused_with_its_position(engine):
    items = [[3]] * 20 + [[2, 0]]
    with pytest.raises(InputError, match="position 20: the tokenizer finds no token in the text"):
        list(engine.windows(items, rows_of, lambda batch: batch.input_ids, chunk=8))
