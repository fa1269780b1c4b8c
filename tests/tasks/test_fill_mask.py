import dataclasses
import json
import random
import re
from pathlib import Path

import jax
import numpy as np
import pytest
from conftest import compiles
from oracle import require

from bertjax import Tokenizer
from bertjax.errors import ConfigError, InputError
from bertjax.heads import BertForMaskedLM
from bertjax.tasks import fill_mask
from bertjax.tasks.fill_mask import Fill, FillMask, best_words

FOLDER = Path(__file__).parents[1] / "data/tasks/fill_mask"
GOLDEN = json.loads((FOLDER / "expected.json").read_text(encoding="utf-8"))
TEXTS = GOLDEN["texts"]


@pytest.fixture(scope="module")
def model():
    return BertForMaskedLM.from_pretrained(FOLDER / "model")


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.from_folder(FOLDER / "model")


@pytest.fixture(scope="module")
def task(model, tokenizer):
    return FillMask(model, tokenizer, step_tokens=256)


def values(answer):
    """An answer as expected.json has it."""
    return list(dataclasses.astuple(answer)) if isinstance(answer, Fill) else [values(part) for part in answer]


def flat(answer):
    """The fills in an answer's lists, as lists of values."""
    return [answer] if isinstance(answer[0], float) else [fill for part in answer for fill in flat(part)]


def shape(answer):
    """How an answer's lists nest."""
    return () if isinstance(answer[0], float) else (len(answer), [shape(part) for part in answer])


def assert_same(found, expected):
    """Answers are the expected ones, but for the rounding of scores."""
    assert shape(found) == shape(expected)
    assert [fill[1:] for fill in flat(found)] == [fill[1:] for fill in flat(expected)]
    np.testing.assert_allclose(
        [fill[0] for fill in flat(found)], [fill[0] for fill in flat(expected)], rtol=0, atol=1e-6
    )


@pytest.mark.parametrize("call", GOLDEN["calls"], ids=lambda call: str(call["options"]))
def test_fills_are_those_of_transformers_4(task, call):
    assert_same(values(task(TEXTS, **call["options"])), call["fills"])


def test_fills_are_those_of_the_installed_pipeline(model, tokenizer, tmp_path):
    transformers = require("transformers")
    model.save_pretrained(tmp_path / "model", tokenizer=tokenizer)
    task = FillMask.from_pretrained(tmp_path / "model", step_tokens=256)
    pipeline = transformers.pipeline("fill-mask", model=str(tmp_path / "model"), device="cpu")
    for options in ({}, {"targets": ["river", "##ing"]}):
        assert_same(
            values(task(TEXTS, **options)),
            [json.loads(json.dumps([as_lists(part) for part in pipeline(text, **options)])) for text in TEXTS],
        )


def as_lists(answer):
    return list(answer.values()) if isinstance(answer, dict) else [as_lists(part) for part in answer]


def test_one_text_gives_one_answer(task):
    several = task(TEXTS)
    assert_same(values(task(TEXTS[1])), values(several[1]))
    assert [type(fill) for fill in task(TEXTS[1])] == [Fill] * 5
    assert [len(fills) for fills in task(TEXTS[3])] == [5, 5, 5]
    assert task([]) == []
    assert [type(value) for value in values(several[1][0])] == [float, int, str, str]


def test_answers_depend_neither_on_company_nor_on_place(task):
    many = TEXTS * 12  # several batches, and several blocks of masks in one
    assert sum(text.count("[MASK]") for text in many) > 5 * 32
    order = random.Random(0).sample(range(len(many)), len(many))
    alone = [values(task(text, top_k=5)) for text in TEXTS]
    mixed = task([many[index] for index in order], top_k=5)
    for index, answer in zip(order, mixed, strict=True):
        assert_same(values(answer), alone[index % len(TEXTS)])


def test_a_second_call_compiles_nothing(task):
    words = TEXTS[2].split()
    task(TEXTS * 12, top_k=5)
    others = [" ".join(random.Random(seed).sample(words, len(words))) for seed in range(90)]
    assert compiles(lambda: task(others, top_k=5)) == 0


def test_many_masks_are_computed_together(task, monkeypatch):
    expected = values(task(TEXTS * 4))
    sizes = []

    def counted(model, hidden, places, *rest, **options):
        sizes.append(len(places))
        return best_words(model, hidden, places, *rest, **options)

    monkeypatch.setattr(fill_mask, "best_words", counted)
    monkeypatch.setattr(fill_mask, "_BLOCKS", (8, 3))
    assert_same(values(task(TEXTS * 4)), expected)
    assert set(sizes) == {8, 3}


@pytest.mark.parametrize(
    ("masks", "sizes"), [(1, [32]), (32, [32]), (33, [32] * 2), (511, [32] * 16), (512, [512]), (1025, [512, 512, 32])]
)
def test_blocks_have_two_sizes(masks, sizes):
    places = np.arange(1, masks + 1, dtype=np.int32)
    blocks = fill_mask._blocks(places)
    assert [len(block) for block in blocks] == sizes
    assert {block.dtype for block in blocks} == {places.dtype}
    together = np.concatenate(blocks)
    np.testing.assert_array_equal(together[:masks], places)
    assert not together[masks:].any()


def test_only_masked_positions_are_compared_with_the_vocabulary(model):
    hidden, places = np.zeros((8, 64, 16), np.float32), np.zeros(32, np.int32)
    words = model.config.vocab_size
    traced = jax.make_jaxpr(lambda *given: best_words(model, *given, None, top_k=5))(hidden, places)
    shapes = re.findall(r"f32\[([\d,]+)\]", str(traced))
    assert f"32,{words}" in shapes  # the logits are there to be seen
    assert max(np.prod(list(map(int, found.split(",")))) for found in shapes) == max(hidden.size, 32 * words)


def test_a_target_is_one_token(task):
    assert {fill.token_str for fill in task("a [MASK]", targets=("Paris", "##ed", "CAFÉ"))} == {"paris", "##ed", "cafe"}
    assert task("a [MASK]", targets="[UNK]")[0].token_str == "[UNK]"
    for targets, message in (
        (["the", "stones"], r"targets\[1\] 'stones' is stone ##s to the tokenizer; a mask stands for one token"),
        (["☃"], r"targets\[0\] '☃' is \[UNK\] to the tokenizer"),
        ("", r"targets\[0\] '' is no token to the tokenizer"),
        ("the river", r"targets\[0\] 'the river' is the river to"),
        ([], r"targets is \[\], expected a word or a list of words"),
        (7, "targets is 7, expected a word or a list of words"),
        ([7], r"targets\[0\] is 7 of type int, not a str"),
        (["the", "\ud800"], r"targets\[1\] has a lone surrogate, so is no text"),
    ):
        with pytest.raises(InputError, match=message):
            task("a [MASK]", targets=targets)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ("a river", r"inputs\[0\] has no \[MASK\], so there is nothing to fill"),
        (["a [MASK]", "[mask]"], r"inputs\[1\] has no \[MASK\]"),
        (["a [MASK]", "one " * 70 + "[MASK]"], r"inputs\[1\] is longer than 64 tokens and loses 1 of its 1 mask"),
        (["[MASK] " + "one " * 70 + "[MASK]"], r"inputs\[0\] is longer than 64 tokens and loses 1 of its 2 mask"),
        (["a [MASK]", 3], r"inputs\[1\] is 3 of type int, not a str"),
        ([("a [MASK]", "b")], r"inputs\[0\] is \('a \[MASK\]', 'b'\) of type tuple, not a str"),
        (5, "inputs is a int, expected a list or another iterable"),
    ],
)
def test_unusable_inputs_are_refused_with_their_position(task, inputs, message):
    with pytest.raises(InputError, match=message):
        task(inputs)


def test_positions_count_over_a_whole_stream(task):
    with pytest.raises(InputError, match=r"inputs\[300\] has no \[MASK\]"):
        task("a [MASK]" if index != 300 else "a" for index in range(310))


def test_a_long_text_that_keeps_its_masks_is_cut(task):
    window = next(task.stream(["[MASK] " + "one " * 70, "[MASK]"]))
    assert window.truncated == 1
    assert window.answers[0][0].sequence.endswith(" one" * 61)


def test_unusable_options_are_refused(task, model):
    words = model.config.vocab_size
    assert len(task("a [MASK]", top_k=words)) == words
    for top_k in (0, True, 2.0, words + 1):
        with pytest.raises(InputError, match=f"top_k is {top_k}"):
            task("a [MASK]", top_k=top_k)


def test_a_tokenizer_without_a_mask_is_refused(model, tmp_path):
    (tmp_path / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\na\n")
    with pytest.raises(ConfigError, match="the tokenizer has no mask token"):
        FillMask(model, Tokenizer.from_vocab(tmp_path / "vocab.txt", mask_token=None))
