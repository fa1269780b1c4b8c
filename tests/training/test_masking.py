from pathlib import Path

import numpy as np
import pytest
import tokenizers
from conftest import WORDS
from hypothesis import given, settings
from hypothesis import strategies as st

from bertjax import Tokenizer
from bertjax.errors import ConfigError, InputError
from bertjax.training.masking import Masking

VOCAB = 24


def rng_of(seed=0):
    return np.random.default_rng(seed)


@st.composite
def cases(draw):
    """A masking, a seed, and rows of words, special tokens, and pieces that continue either."""
    ids = st.integers(0, VOCAB - 1)
    mask, ordinary = draw(st.permutations(range(VOCAB)))[:2]
    masking = Masking(
        mask_id=mask,
        vocab_size=VOCAB,
        special_ids=draw(st.sets(ids, max_size=VOCAB // 2)) - {ordinary},
        probability=draw(st.floats(0.01, 1) | st.sampled_from([0.15, 0.5, 1])),
        whole_words=draw(st.booleans()),
        continues=np.array(draw(st.lists(st.booleans(), min_size=VOCAB, max_size=VOCAB))),
    )
    rows = draw(st.lists(st.lists(ids, max_size=40), max_size=6))
    dtype = draw(st.sampled_from([np.int32, np.int64, np.uint16]))
    return masking, draw(st.integers(0, 99)), [np.array(row, dtype) for row in rows]


def words_of(masking, row):
    """The positions of each word: a token alone where words are not masked whole."""
    specials = {masking.mask_id, *masking.special_ids}
    words, is_open = [], False
    for place, index in enumerate(row.tolist()):
        if index in specials:
            is_open = False
        elif is_open and masking.whole_words and masking.continues[index]:
            words[-1].append(place)
        else:
            words.append([place])
            is_open = True
    return words


@settings(max_examples=400, deadline=None)
@given(cases())
def test_what_is_chosen_and_what_becomes_of_it(case):
    masking, seed, rows = case
    before = [row.copy() for row in rows]
    masked, labels = masking(rng_of(seed), rows)
    again = masking(rng_of(seed), rows)
    assert len(masked) == len(labels) == len(rows)
    for row, old, ids, label, *same in zip(rows, before, masked, labels, *again, strict=True):
        np.testing.assert_array_equal(row, old)
        np.testing.assert_array_equal([ids, label], same)
        assert ids.dtype == label.dtype == np.int32 and ids.shape == label.shape == row.shape
        chosen = label != -100
        np.testing.assert_array_equal(label[chosen], row[chosen])
        np.testing.assert_array_equal(ids[~chosen], row[~chosen])
        assert not set(ids[chosen].tolist()) & (set(masking.special_ids) - {masking.mask_id})
        words = words_of(masking, row)
        pieces = sum(map(len, words))
        budget = max(1, round(masking.probability * pieces)) if pieces else 0
        taken = [bool(chosen[word].all()) for word in words]
        assert taken == [bool(chosen[word].any()) for word in words], "a word is whole or not there"
        found = int(chosen.sum())
        assert found == sum(len(word) for word, is_taken in zip(words, taken, strict=True) if is_taken), "no special"
        assert found <= budget if masking.whole_words else found == budget
        left_out = [len(word) for word, is_taken in zip(words, taken, strict=True) if not is_taken]
        assert all(size > budget - found for size in left_out), "only what does not fit is left out"
    assert sum((label != -100).sum() for label in labels) <= masking.most([len(row) for row in rows])


def is_binomial(found, trials, probability):
    """Whether counts are within five standard deviations of a binomial's mean: one in two million is not."""
    return bool((abs(found - trials * probability) <= 5 * np.sqrt(trials * probability * (1 - probability))).all())


def test_eight_of_ten_are_masks_one_is_random_and_one_stays():
    masking = Masking(mask_id=4, vocab_size=20, special_ids=frozenset(range(5)))
    rows = [np.full(100, 7, np.int32)] * 4000
    masked, labels = map(np.stack, masking(rng_of(), rows))
    chosen = labels != -100
    assert (chosen.sum(axis=1) == 15).all()
    found = masked[chosen]
    counts = np.bincount(found, minlength=20)
    assert not counts[:4].any() and is_binomial(counts[4], len(found), 0.8)
    # one of the fifteen ordinary tokens is what was there
    assert is_binomial(counts[7], len(found), 0.1 + 0.1 / 15)
    assert is_binomial(np.delete(counts, 7)[5:], len(found), 0.1 / 15)
    assert is_binomial(chosen.sum(axis=0), len(rows), 0.15), "any token is as likely as another"


def test_words_are_chosen_in_random_order():
    # Two of four tokens: the long word if it comes first, which it does in one of three orders, else the short ones.
    continues = np.arange(9) == 8
    masking = Masking(mask_id=0, vocab_size=9, special_ids=[1], probability=0.5, whole_words=True, continues=continues)
    rows = [np.array([1, 5, 8, 6, 7, 1])] * 6000
    labels = np.stack(masking(rng_of(), rows)[1])
    is_long = (labels == [-100, 5, 8, -100, -100, -100]).all(axis=1)
    assert (labels[~is_long] == [-100, -100, -100, 6, 7, -100]).all()
    assert is_binomial(is_long.sum(), len(rows), 1 / 3)


def test_of_a_tokenizer(vocab_file):
    size = 5 + len(WORDS)
    added = [tokenizers.AddedToken("[NEW]", special=True), "plain"]
    tokenizer = Tokenizer.from_vocab(vocab_file, added_tokens=added)
    masking = Masking.of(tokenizer, whole_words=True)
    assert (masking.mask_id, masking.vocab_size) == (4, size + 2)
    assert masking.special_ids == {0, 1, 2, 3, 4, size}
    continuing = [tokenizer.id_to_token(int(index)) for index in np.flatnonzero(masking.continues)]
    assert continuing == ["##ly", "##s"]
    _, labels = masking(rng_of(), tokenizer(["the cats sat slowly"] * 50).input_ids)
    predicted = {" ".join(map(tokenizer.id_to_token, label[label != -100].tolist())) for label in labels}
    assert predicted == {"the", "sat"}, "one prediction a row, for which words of two pieces are too long"


def test_ids_without_a_token_are_special(vocab_file, tmp_path):
    # of a blank line, and of a token that stands on a line below, too
    path = tmp_path / "vocab.txt"
    path.write_text(vocab_file.read_text() + "\ncat\nend\n")
    masking = Masking.of(Tokenizer.from_vocab(path))
    size = 5 + len(WORDS)
    assert masking.vocab_size == size + 3 and masking.continues is None
    assert masking.special_ids == {0, 1, 2, 3, 4, 5 + WORDS.index("cat"), size}


def test_tokenizers_that_can_not_be_masked(vocab_file):
    with pytest.raises(ConfigError, match="no mask token"):
        Masking.of(Tokenizer.from_vocab(vocab_file, mask_token=None))
    vocab = {token: index for index, token in enumerate(Path(vocab_file).read_text().split())}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token="[UNK]"))
    roles = {f"{role}_token": f"[{role.upper()}]" for role in ("unk", "sep", "pad", "cls", "mask")}
    tokenizer = Tokenizer(backend, special_tokens=roles)
    assert Masking.of(tokenizer).special_ids == {0, 1, 2, 3, 4}
    with pytest.raises(ConfigError, match=r"\(WordLevel\) does not mark"):
        Masking.of(tokenizer, whole_words=True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"probability": 0}, "probability is 0"),
        ({"probability": 1.5}, "probability is 1.5"),
        ({"mask_id": 9}, "mask_id is 9"),
        ({"special_ids": [-1]}, "special_ids is -1"),
        ({"special_ids": range(9)}, "every id"),
        ({"whole_words": True}, "continues is object"),
        ({"whole_words": True, "continues": np.zeros(8, bool)}, r"shape \(8,\)"),
    ],
)
def test_options_that_are_not_usable(changes, message):
    with pytest.raises(ConfigError, match=message):
        Masking(**{"mask_id": 0, "vocab_size": 9, "special_ids": [0]} | changes)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ([1, 2, 9], r"rows\[2\]\[2\] is 9"),
        ([-100], r"rows\[2\]\[0\] is -100"),
        ([1.0], r"rows\[2\] is float64"),
        ([[1]], r"of shape \(1, 1\)"),
    ],
)
def test_rows_that_are_not_ids(row, message):
    masking = Masking(mask_id=0, vocab_size=9, special_ids=[])
    with pytest.raises(InputError, match=message):
        masking(rng_of(), [np.array([5]), np.array([], np.int32), np.array(row), np.array([3])])
