import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bertjax.errors import InputError
from bertjax.training.pretraining import blocks, sentence_pairs

CLS, SEP = 1, 2


def rng_of(seed=0):
    return np.random.default_rng(seed)


def numbered(lengths):
    """Documents of sentences of these lengths; each token has a number of its own, in order, with a gap of one
    between documents."""
    count, documents = 10, []
    for of_document in lengths:
        documents.append([])
        for length in of_document:
            documents[-1].append(np.arange(count, count + length))
            count += length
        count += 1
    return documents


def segments(pairs):
    """A, B and label of each pair, whose form is checked."""
    for ids, types, label in zip(pairs.input_ids, pairs.token_type_ids, pairs.next_sentence_label, strict=True):
        assert ids.dtype == types.dtype == np.int32
        (first, last), length = np.flatnonzero(ids == SEP), len(ids)
        assert ids[0] == CLS and last == length - 1 and 1 < first < last - 1
        np.testing.assert_array_equal(types, np.arange(length) > first)
        yield ids[1:first], ids[first + 1 : last], int(label)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 30), max_size=8), st.integers(3, 20))
def test_blocks_lose_nothing(lengths, max_length):
    rows = [np.arange(10, 10 + length) for length in lengths]
    found = blocks(rows, max_length, CLS, SEP)
    assert all(len(block) <= max_length and block.dtype == np.int32 for block in found)
    assert all(block[0] == CLS and block[-1] == SEP and len(block) > 2 for block in found)
    texts = [[]]
    for block in found:
        if block[1] == 10:
            texts.append([])
        elif texts[-1]:
            assert len(texts[-1]) % (max_length - 2) == 0, "only the last block of a text is not full"
        texts[-1] += block[1:-1].tolist()
    assert texts[1:] == [row.tolist() for row in rows if len(row)]


LENGTHS = st.lists(st.lists(st.integers(0, 12), max_size=12), max_size=5)
ONES = st.lists(st.lists(st.just(1), max_size=40), max_size=4)


@settings(max_examples=400, deadline=None)
@given(LENGTHS | ONES, st.integers(5, 24), st.sampled_from([0, 0.5, 1]), st.integers(0, 999))
def test_pairs_are_of_one_document_or_of_two_and_lose_nothing(lengths, max_length, short, seed):
    lengths += [[1, 0, 1], [1]]  # two documents that have tokens, at least
    documents = numbered(lengths)
    fits_exactly = all(length <= 1 for of_document in lengths for length in of_document)
    pairs = sentence_pairs(rng_of(seed), documents, max_length, CLS, SEP, short)
    again = sentence_pairs(rng_of(seed), documents, max_length, CLS, SEP, short)
    assert [ids.tolist() for ids in pairs.input_ids] == [ids.tolist() for ids in again.input_ids]
    owner = {int(token): index for index, rows in enumerate(documents) for row in rows for token in row}
    edges = {int(row[end]) for rows in documents for row in rows if len(row) for end in (0, -1)}
    own, is_whole = [[] for _ in documents], [True] * len(documents)
    for a, b, label in segments(pairs):
        assert len(a) + len(b) + 3 <= max_length
        assert (np.diff(a) == 1).all() and (np.diff(b) == 1).all(), "each is one piece of one document"
        document = owner[int(a[0])]
        own[document] += [*a, *b] if label == 0 else [*a]
        assert (owner[int(b[0])] == document) == (label == 0)
        if len(a) + len(b) + 3 < max_length or fits_exactly:
            assert {a[0], a[-1], b[0], b[-1]} <= edges, "whole sentences"
            assert label or b[0] == a[-1] + 1
        else:
            is_whole[document] = False
    for rows, found, whole in zip(documents, own, is_whole, strict=True):
        expected = [token for row in rows for token in row]
        if whole:
            assert found == expected, "what was not used is put back, and used once"
        else:
            assert sorted(set(found) & set(expected)) == found, "in order, and nothing twice"


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 60), st.integers(1, 60), st.integers(5, 64))
def test_the_longer_segment_is_cut(of_a, of_b, max_length):
    expected = [of_a, of_b]
    while sum(expected) > max_length - 3:
        expected[0 if expected[0] > expected[1] else 1] -= 1
    (a, b, label), _ = segments(sentence_pairs(rng_of(), numbered([[of_a], [of_b]]), max_length, CLS, SEP))
    assert [len(a), len(b), label] == [*expected, 1]


def test_tokens_are_cut_at_both_ends():
    pairs = sentence_pairs(rng_of(), numbered([[40]] * 2000), 23, CLS, SEP)
    starts = np.array([(part[0] - 10) % 41 for a, b, _ in segments(pairs) for part in (a, b)])
    # The sum of 4000 binomials of 30 coins each, and their spread: a coin for all of them would have one of 15.
    assert abs(starts.mean() - 15) <= 5 * math.sqrt(30 / 4 / len(starts))
    assert abs(starts.std() - math.sqrt(30 / 4)) <= 5 * math.sqrt(30 / 4) / math.sqrt(2 * len(starts))


def test_half_of_the_second_segments_are_from_elsewhere():
    documents, room = numbered([[1] * 4000] * 5), 10
    pairs = list(segments(sentence_pairs(rng_of(), documents, room + 3, CLS, SEP, 0)))
    inner = [(a, b, label) for a, b, label in pairs if (a[0] - 10) % 4001 < 4000 - room]
    labels = np.array([label for *_, label in inner])
    assert len(labels) > 2000
    assert abs(labels.mean() - 0.5) <= 5 * 0.5 / math.sqrt(len(labels))
    owners = np.array([[(part[0] - 10) // 4001 for part in (a, b)] for a, b, label in inner if label])
    step = np.bincount((owners[:, 1] - owners[:, 0]) % 5, minlength=5)
    assert step[0] == 0
    assert (abs(step[1:] - len(owners) / 4) <= 5 * math.sqrt(len(owners) * 3 / 16)).all(), "any other document"
    places = np.array([(b[0] - 10) % 4001 for _, b, label in inner if label])
    assert abs(places.mean() - 2000) <= 5 * 4000 / math.sqrt(12 * len(places)), "from any sentence on"
    # A has one to nine of ten sentences.
    sizes = np.bincount([len(a) for a, *_ in inner], minlength=11)
    assert sizes[0] == sizes[10] == 0
    assert (abs(sizes[1:10] - len(inner) / 9) <= 5 * math.sqrt(len(inner) * 8 / 81)).all()
    assert {len(a) + len(b) for a, b, label in inner if label == 0} == {room}


def test_some_documents_have_shorter_pairs():
    documents = numbered([[1] * 60] * 1500)
    pairs = sentence_pairs(rng_of(), documents, 13, CLS, SEP, 0.4)
    targets = [set() for _ in documents]
    for a, b, label in segments(pairs):
        if label == 0 and (b[-1] - 10) % 61 < 59:
            targets[(a[0] - 10) // 61].add(len(a) + len(b))
    assert {len(target) for target in targets} <= {0, 1}, "a document has one target"
    counts = np.bincount([min(target) for target in targets if target], minlength=11)
    # Any from 2 to 10 with 0.4 / 9 each, and 10 for the others.
    probabilities = np.array([0, 0, *[0.4 / 9] * 8, 0.6 + 0.4 / 9])
    spread = np.sqrt(counts.sum() * probabilities * (1 - probabilities))
    assert (abs(counts - counts.sum() * probabilities) <= 5 * spread).all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"documents": numbered([[3, 4], [], [0]])}, r"1 document\(s\) with tokens"),
        ({"documents": [[[5]], [[6], [0.5]]]}, r"documents\[1\]\[1\] is float64"),
        ({"documents": [[[5, -1]], [[6]]]}, r"documents\[0\]\[0\]\[1\] is -1"),
        ({"max_length": 4}, "max_length is 4"),
        ({"cls_id": -1}, "cls_id is -1"),
        ({"short_probability": 1.1}, "short_probability is 1.1"),
    ],
)
def test_what_no_pairs_can_be_made_of(changes, message):
    usable = {"documents": numbered([[1], [1]]), "max_length": 8, "cls_id": CLS, "sep_id": SEP}
    with pytest.raises(InputError, match=message):
        sentence_pairs(rng_of(), **usable | changes)


def test_blocks_need_room():
    with pytest.raises(InputError, match="max_length is 2"):
        blocks([np.array([5])], 2, CLS, SEP)
