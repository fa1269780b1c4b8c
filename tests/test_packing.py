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


@given(SHAPES)
def test_shapes_are_few(shapes):
    assert len(shapes.all()) <= 8
    assert all(length <= max(shapes.max_length, 32) for _, length in shapes.all())


def test_fill_is_high_on_mixed_lengths():
    rng = np.random.default_rng(0)
    texts = [np.ones(n, np.int32) for n in np.clip(rng.lognormal(4.5, 0.8, 5000).astype(int), 2, 256)]
    batches = list(pack(texts, texts, Shapes(max_length=256, step_tokens=4096)))
    fill = sum(map(len, texts)) / sum(batch.input_ids.size for batch in batches)
    assert fill > 0.98


def test_one_short_text_gets_the_small_shape():
    (batch,) = pack([np.ones(9, np.int32)], [np.zeros(9, np.int32)], Shapes(max_length=256, step_tokens=4096))
    assert batch.input_ids.shape == (1, 32)


def test_nothing_to_pack():
    assert list(pack([], [], Shapes(max_length=256, step_tokens=4096))) == []


@pytest.mark.parametrize("length", [0, 257])
def test_unusable_lengths_are_refused(length):
    with pytest.raises(ValueError, match="1 to 256 tokens"):
        list(pack([np.ones(length)], [np.ones(length)], Shapes(max_length=256, step_tokens=4096)))
