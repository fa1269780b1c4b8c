"""Examples to batches: which are in which step, in rows of which shapes, on which devices."""

import itertools

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import PartitionSpec

from bertjax import Tokenizer
from bertjax.errors import ConfigError
from bertjax.losses import IGNORED
from bertjax.sharding import data_mesh
from bertjax.training.batches import Batches
from bertjax.training.masking import Masking
from bertjax.training.tasks.base import Examples
from bertjax.training.tasks.classification import ClassifyTexts
from bertjax.training.tasks.words import FindMaskedWords

LONGEST = 70
INPUTS = {"input_ids", "token_type_ids", "position_ids", "segment_ids"}


@pytest.fixture(scope="module")
def tokenizer(vocab_file):
    return Tokenizer.from_vocab(vocab_file)


@pytest.fixture(scope="module")
def classify(tokenizer):
    return ClassifyTexts(tokenizer, LONGEST, names=["a"], problem="single_label_classification", paired=False)


def numbered(lengths):
    """Texts of these lengths; example k has the label k, and tokens of nothing but 1000 + k."""
    ids = [np.full(length, 1000 + number, np.int32) for number, length in enumerate(lengths)]
    count = len(lengths)
    types = [np.zeros_like(each) for each in ids]
    return Examples(ids, types, np.arange(count)[:, None], np.arange(count, dtype=np.int32))


def texts_in(batch, parts=1):
    """The labels of a batch's texts, by part; that their tokens are whole is asserted."""
    arrays = {name: np.asarray(array) for name, array in batch.arrays.items()}
    assert set(arrays) == {*INPUTS, "labels"}
    found = []
    for part in range(parts):
        one = arrays if parts == 1 else {name: array[part] for name, array in arrays.items()}
        found.append([])
        for row, segment in np.argwhere(one["labels"] != IGNORED):
            label = one["labels"][row, segment]
            inside = one["segment_ids"][row] == segment + 1
            assert set(one["input_ids"][row, inside]) == {1000 + label}
            assert one["position_ids"][row, inside].tolist() == list(range(inside.sum()))
            found[-1].append((int(label), int(inside.sum())))
        assert (one["segment_ids"] > 0).sum() == sum(length for _, length in found[-1])
    return [sorted(each) for each in found]


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.integers(2, LONGEST), min_size=1, max_size=40),
    st.sampled_from([(1, 1), (4, 1), (4, 2), (6, 3), (50, 1), (50, 5)]),
    st.integers(0, 3),
)
def test_every_example_is_seen_once_an_epoch(classify, lengths, size, seed):
    batch_size, parts = size
    batches = Batches(classify, numbered(lengths), batch_size=batch_size, accumulate=parts, seed=seed)
    layout, per_epoch = batches.layout, batches.steps_per_epoch
    expected = [(number, length) for number, length in enumerate(lengths)]
    for epoch in range(2):
        seen = []
        for step in range(epoch * per_epoch, (epoch + 1) * per_epoch):
            batch = batches.make(step)
            texts = list(itertools.chain(*texts_in(batch, parts)))
            shape = batch.arrays["input_ids"].shape
            assert shape[-2] in layout.row_counts
            assert shape[-1] == layout.length
            assert batch.positions == np.prod(shape)
            assert (batch.examples, batch.tokens) == (len(texts), sum(length for _, length in texts))
            assert len(texts) == batch_size or step % per_epoch == per_epoch - 1
            seen += texts
        assert sorted(seen) == expected
    seen = [text for batch in batches.all() for part in texts_in(batch, parts) for text in part]
    assert sorted(seen) == expected


@pytest.fixture(scope="module")
def fifty(classify):
    return numbered(np.random.default_rng(0).integers(2, 20, 50))


def test_a_batch_is_a_function_of_its_number(classify, fifty):
    batches, again = (Batches(classify, fifty, batch_size=8, seed=1) for _ in range(2))
    found = list(batches.from_step(3, 12))
    assert len(found) == 9
    for step, batch in enumerate(found, 3):
        jax.tree.map(np.testing.assert_array_equal, batch.arrays, again.make(step).arrays)


def test_orders_differ_between_epochs_and_seeds(classify, fifty):
    def first(seed, epoch):
        batches = Batches(classify, fifty, batch_size=50, seed=seed)
        return batches._chosen(epoch * batches.steps_per_epoch).tolist()

    orders = [first(seed, epoch) for seed in (0, 1) for epoch in (0, 1)]
    assert len({tuple(order) for order in orders}) == 4
    assert all(sorted(order) == list(range(50)) for order in orders)


def test_parts_have_the_examples_of_the_whole(classify, fifty):
    whole = Batches(classify, fifty, batch_size=12)
    parted = Batches(classify, fifty, batch_size=12, accumulate=4)
    for step in range(whole.steps_per_epoch):
        found = texts_in(parted.make(step), 4)
        assert sorted(itertools.chain(*found)) == texts_in(whole.make(step))[0]
    assert list(map(len, found)) == [2, 0, 0, 0]


def test_rows_are_divided_over_devices(classify, fifty):
    batches = Batches(classify, fifty, batch_size=12, accumulate=2, mesh=data_mesh())
    assert all(count % 8 == 0 for count in batches.layout.row_counts)
    batch = batches.make(0)
    assert all(array.sharding.spec == PartitionSpec(None, "data") for array in batch.arrays.values())
    alone = Batches(classify, fifty, batch_size=12, accumulate=2)
    assert texts_in(batch, 2) == texts_in(alone.make(0), 2)


def test_counts_of_rows_are_few_and_most_batches_fit_tightly(classify):
    lengths = np.random.default_rng(0).integers(2, 40, 3000)
    batches = Batches(classify, numbered(lengths), batch_size=32)
    assert len(batches.layout.row_counts) <= 4
    assert batches.layout.row_counts[-1] == 32
    made = [batches.make(step) for step in range(30)]
    assert sum(batch.tokens for batch in made) > 0.8 * sum(batch.positions for batch in made)


def test_masks_are_new_in_every_step_and_the_same_in_every_evaluation(tokenizer):
    ids = [np.arange(5, 25, dtype=np.int32)] * 6
    examples = Examples(ids, [np.zeros_like(each) for each in ids], np.arange(6)[:, None])
    batches = Batches(FindMaskedWords(tokenizer, 64, masking=Masking.of(tokenizer)), examples, batch_size=6)
    labels = [np.asarray(batches.make(step).arrays["labels"]) for step in (0, 1, 0)]
    assert (labels[0] == labels[2]).all()
    assert (labels[0] != labels[1]).any()
    first, second = (next(batches.all()).arrays for _ in range(2))
    jax.tree.map(np.testing.assert_array_equal, first, second)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size is 0"),
        ({"batch_size": 8, "accumulate": 3}, "batch_size is 8, which can't be divided into 3 parts"),
        ({"batch_size": 8, "row_length": 10}, "row_length is 10, and the longest text has 1. tokens"),
    ],
)
def test_sizes_that_are_not_usable(classify, fifty, options, message):
    with pytest.raises(ConfigError, match=message):
        Batches(classify, fifty, **options)


def test_lengths_of_rows(classify):
    for longest, length in ((5, 64), (65, LONGEST), (LONGEST, LONGEST)):
        assert Batches(classify, numbered([longest]), batch_size=1).layout.length == length
    assert Batches(classify, numbered([20]), batch_size=1, row_length=200).layout.length == 200
