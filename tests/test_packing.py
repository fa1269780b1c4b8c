import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bertjax.packing import Shapes, max_segments, pack

SHAPES = st.builds(Shapes, max_length=st.integers(2, 300), step_tokens=st.integers(1, 5000))


@st.composite
def texts_and_shapes(draw):
    shapes = draw(SHAPES)
    lengths = draw(st.lists(st.integers(1, shapes.max_length), max_size=120))
    rng = np.random.default_rng(draw(st.integers(0, 99)))
    return [rng.integers(1, 1000, length) for length in lengths], shapes


@settings(deadline=None, max_examples=300)
@given(texts_and_shapes())
def test_every_token_of_every_text_comes_back_once(case):
    texts, shapes = case
    types = [(ids % 2).astype(np.int32) for ids in texts]
    seen = []
    for batch in pack(texts, types, shapes, pad_id=-7):
        assert batch.input_ids.shape in shapes.all()
        assert batch.segment_ids.max() <= max_segments(batch.input_ids.shape[1])
        used = np.zeros(batch.input_ids.shape, bool)
        for item, row, segment in zip(batch.items, batch.rows, batch.segments, strict=True):
            where = batch.segment_ids[row] == segment + 1
            used[row] |= where
            np.testing.assert_array_equal(batch.input_ids[row][where], texts[item])
            np.testing.assert_array_equal(batch.token_type_ids[row][where], types[item])
            np.testing.assert_array_equal(batch.position_ids[row][where], np.arange(len(texts[item])))
            # one unbroken run
            assert np.ptp(np.flatnonzero(where)) == len(texts[item]) - 1
        owners = batch.owners(padding=-3)
        assert owners.dtype == np.int32
        assert (owners[~used] == -3).all()
        for index, (row, segment) in enumerate(zip(batch.rows, batch.segments, strict=True)):
            np.testing.assert_array_equal(owners[row] == index, batch.segment_ids[row] == segment + 1)
        assert batch.inputs().keys() == {"input_ids", "token_type_ids", "position_ids", "segment_ids"}
        assert all(array is getattr(batch, name) for name, array in batch.inputs().items())
        seen += batch.items.tolist()
        assert (batch.input_ids[~used] == -7).all()
        assert not batch.segment_ids[~used].any()
    assert sorted(seen) == list(range(len(texts)))


LENGTHS = st.sampled_from([2, 8, 16, 17, 64, 100, 127, 128, 129, 255, 256, 257, 384, 512, 2048, 8192])


@settings(max_examples=500)
@given(st.builds(Shapes, max_length=LENGTHS | st.integers(2, 9000), step_tokens=st.integers(1, 70_000)))
def test_shapes_are_few(shapes):
    found = shapes.all()
    assert len(found) == len(set(found)) <= 8
    assert all(1 <= length <= shapes.max_length for _, length in found)
    assert list(shapes.lone_lengths) == sorted(set(shapes.lone_lengths))
    # a lone text is padded to less than twice its length, wherever models are of usual sizes
    pairs = zip(shapes.lone_lengths, shapes.lone_lengths[1:], strict=False)
    assert shapes.max_length > 512 or all(longer <= 2.4 * shorter for shorter, longer in pairs)


@settings(deadline=None, max_examples=100)
@given(LENGTHS, st.sampled_from([1, 300, 2048, 32768]), st.data())
def test_no_mixture_of_lengths_gives_another_shape(max_length, step_tokens, data):
    shapes = Shapes(max_length=max_length, step_tokens=step_tokens)
    longest = data.draw(st.integers(1, max_length))
    runs = st.tuples(st.integers(1, longest), st.integers(1, 150))  # some texts of one length
    lengths = [length for length, count in data.draw(st.lists(runs, max_size=6)) for _ in range(count)]
    texts = [np.ones(length, np.int32) for length in lengths]
    found = {batch.input_ids.shape for batch in pack(texts, texts, shapes)}
    assert found <= set(shapes.all())


def test_fill_is_high_on_mixed_lengths():
    rng = np.random.default_rng(0)
    texts = [np.ones(n, np.int32) for n in np.clip(rng.lognormal(4.5, 0.8, 5000).astype(int), 2, 256)]
    batches = list(pack(texts, texts, Shapes(max_length=256, step_tokens=4096)))
    fill = sum(map(len, texts)) / sum(batch.input_ids.size for batch in batches)
    assert fill > 0.98


@pytest.mark.parametrize(
    ("lengths", "expected"),
    [
        ([9], 16),
        ([17], 32),
        ([40], 64),
        ([100], 128),
        ([129], 256),
        ([5, 5, 5], 32),  # no room for three texts in the shortest
        ([2] * 9, 128),  # nor for nine in the one that their tokens would fit
    ],
)
def test_a_lone_row_is_as_short_as_it_can_be(lengths, expected):
    texts = [np.ones(length, np.int32) for length in lengths]
    (batch,) = pack(texts, texts, Shapes(max_length=256, step_tokens=4096))
    assert batch.input_ids.shape == (1, expected)


@pytest.mark.parametrize(
    ("rows", "steps"), [(1, [1]), (4, [4]), (5, [4, 1]), (15, [16]), (18, [16, 1, 1]), (32, [16, 16])]
)
def test_the_last_rows_go_into_the_steps_that_cost_least(rows, steps):
    texts = [np.ones(128, np.int32)] * rows
    batches = pack(texts, texts, Shapes(max_length=256, step_tokens=2048))
    assert [len(batch.input_ids) for batch in batches] == steps


def test_nothing_to_pack():
    assert list(pack([], [], Shapes(max_length=256, step_tokens=4096))) == []


@pytest.mark.parametrize("length", [0, 257])
def test_unusable_lengths_are_refused(length):
    with pytest.raises(ValueError, match="1 to 256 tokens"):
        list(pack([np.ones(length)], [np.ones(length)], Shapes(max_length=256, step_tokens=4096)))
