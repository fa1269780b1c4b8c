import itertools
import json

import jax
import numpy as np
import pyarrow as pa
import pytest
from corpora import a_job, some_texts, write
from hypothesis import given, settings
from hypothesis import strategies as st

from bertjax import Tokenizer
from bertjax.corpus import plan
from bertjax.corpus.inputs import InputFile
from bertjax.corpus.job import Plan
from bertjax.corpus.planning import _sample
from bertjax.corpus.shapes import MAX_SHAPES, JobShapes, choose_shapes, cost, usual_shapes
from bertjax.packing import Shapes, pack

ONE = jax.devices()[:1]


def a_plan(rows, shard_rows=10):
    files = tuple(InputFile(f"/{index}.txt", "text", 0, 0) for index in range(len(rows)))
    kept = pa.schema([("id", pa.int16()), ("tags", pa.list_(pa.string()))])
    shapes = usual_shapes(Shapes(512, 2048), 2)
    return Plan(files, tuple(rows), ("text",), kept, shard_rows, shapes, {"texts": 3}, [[0.1, 1e-9]])


@given(rows=st.lists(st.integers(0, 30), min_size=1, max_size=8), shard_rows=st.integers(1, 20))
def test_shards_hold_every_row_once_and_in_order(rows, shard_rows):
    made = a_plan(rows, shard_rows)
    expected = [(file, row) for file, count in enumerate(rows) for row in range(count)]
    found = [
        (file, row)
        for shard in range(made.num_shards)
        for file, start, stop in made.pieces(made.shard(shard))
        for row in range(start, stop)
    ]
    assert found == expected
    assert made.num_shards == max(1, -(-sum(rows) // shard_rows))
    assert all(len(made.shard(shard)) == shard_rows for shard in range(made.num_shards - 1))


def test_a_plan_is_the_same_after_it_was_saved():
    made = a_plan([3, 0, 5])
    assert Plan.from_json(json.loads(json.dumps(made.to_json()))) == made


@given(rows=st.lists(st.integers(0, 9000), min_size=1, max_size=4))
@settings(max_examples=20, deadline=None)
def test_the_sample_is_bounded_and_spread_over_all_rows(rows):
    made = a_plan(rows)
    taken = []

    class Reader:
        def __init__(self, *_):
            pass

        def read(self, file, start, stop):
            taken.extend(sum(rows[:file]) + row for row in range(start, stop))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("bertjax.corpus.planning.RowReader", Reader)
        list(_sample(made))
    assert taken == sorted(set(taken))
    assert len(taken) <= 4096
    assert len(taken) == sum(rows) or len(taken) == 4096
    gaps = np.diff([-1, *taken, sum(rows)])
    assert gaps.max(initial=0) <= sum(rows) // 32 + 2


LENGTHS = {
    "none": [],
    "one": [7],
    "short": np.random.default_rng(0).integers(2, 30, 3000),
    "long": np.random.default_rng(0).integers(200, 513, 1000),
    "mixed": np.minimum(512, np.random.default_rng(0).lognormal(4, 1, 3000).astype(int) + 2),
    "two kinds": [12] * 2000 + [300] * 100,
}


@pytest.mark.parametrize("name", LENGTHS)
@pytest.mark.parametrize(
    ("longest", "step_tokens", "devices"), [(512, 2048, 1), (512, 32768, 8), (256, 2048, 8), (64, 512, 1)]
)
def test_shapes_of_any_corpus_are_few_and_cost_no_more_than_the_usual_ones(name, longest, step_tokens, devices):
    lengths = np.minimum(np.array(LENGTHS[name], int), longest)
    usual = Shapes(longest, step_tokens)
    chosen = choose_shapes(usual, lengths, 384, devices)
    assert chosen.row_lengths[-1] == longest
    assert len(chosen.all()) <= MAX_SHAPES
    assert all(rows % devices == 0 for rows, _ in chosen.all())
    if lengths.size:
        assert cost(chosen, lengths, 384)[0] <= cost(usual_shapes(usual, devices), lengths, 384)[0]
        rows = [np.full(length, 5, np.int32) for length in lengths]
        batches = list(pack(rows, rows, chosen))
        assert {batch.input_ids.shape for batch in batches} <= set(chosen.all())
        assert sorted(itertools.chain(*(batch.items for batch in batches))) == list(range(len(lengths)))


def test_shapes_go_by_the_lengths_of_the_texts():
    usual = Shapes(512, 2048)
    assert choose_shapes(usual, np.full(3000, 150), 384, 1).row_lengths != usual.row_lengths
    assert choose_shapes(usual, np.full(3000, 150), 384, 1).row_lengths[0] in (160, 320)
    assert JobShapes(512, 2048, (64, 128, 512)).row_counts(64) == (1, 32)


def test_a_plan_tells_what_the_texts_are_like(sentence_folder, tmp_path):
    texts = some_texts(500, longest=30)
    write(tmp_path / "a.txt", texts)
    longest = max(map(len, Tokenizer.from_folder(sentence_folder)(texts).input_ids))
    found = plan(a_job(tmp_path, sentence_folder, tmp_path / "a.txt"), ONE)
    assert (found.num_rows, found.rows, found.num_shards) == (500, (500,), 8)
    assert found.sample["texts"] == 500
    tokens = found.sample["tokens"]
    assert (tokens["shortest"], tokens["longest"]) == (2, longest)
    assert sum(found.sample["histogram_by_32"]) == 500
    assert 0.5 < found.sample["fill"] <= 1
    assert plan(a_job(tmp_path, sentence_folder, tmp_path / "a.txt"), ONE) == found
