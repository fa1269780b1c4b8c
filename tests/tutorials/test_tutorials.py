"""The tutorials run as scripts and say what they should; given the same weights, torch says the same."""

import functools
import runpy
import shutil
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import starting_point
import tutorial_2_bert_base_uncased
import tutorial_3_parameters
import tutorial_4_whole_workflow
import tutorial_5_by_hand
from oracle import require
from safetensors.numpy import load_file, save_file
from test_heads import torch_model

from bertjax import BertConfig, SourceError, Tokenizer

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def play(minilm, tmp_path_factory):
    """Runs a tutorial as Python would run its file and returns its results; all tutorials share one stand-in."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [""])
        if starting_point.find() is None:
            folder = starting_point.stand_in(tmp_path_factory.mktemp("tutorials") / "model", minilm)
            patch.setattr(starting_point, "stand_in", lambda *_: folder)
        yield functools.cache(lambda name: runpy.run_path(str(HERE / f"{name}.py"), run_name="__main__")["results"])


@pytest.fixture(scope="module")
def checkpoint(minilm, tmp_path_factory):
    """A model of transformers with random weights, all of them, and the folder that transformers saved it in."""
    config = BertConfig(hidden_size=48, num_hidden_layers=2, num_attention_heads=4, intermediate_size=96)
    model = torch_model("BertForPreTraining", config)
    folder = tmp_path_factory.mktemp("theirs")
    model.save_pretrained(folder)
    Tokenizer.from_folder(minilm).save_pretrained(folder)
    return model, folder


def agree(found, expected):
    """Compares with torch, to 1e-5 of the largest number (or of 1, if all are smaller)."""
    expected = expected.detach().numpy()
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * max(1, np.abs(expected).max()))


def test_a_first_model(play, capsys):
    results = play("tutorial_1_first_model")
    output = results["output"]
    assert output.last_hidden_state.shape == (1, 6, 128)
    assert output.pooler_output.shape == results["embedding"].shape == (1, 128)
    np.testing.assert_array_equal(results["embedding"], output.last_hidden_state[:, 0])
    printed = capsys.readouterr().out
    assert results["tree"].startswith("BertModel\n  embeddings: BertEmbeddings\n")
    assert results["tree"] in printed
    assert "'[CLS]', 'hello', ',', 'bert', '!', '[SEP]'" in printed


def test_padding_changes_nothing(play):
    assert play("tutorial_2_bert_base_uncased")["padding_difference"] < 1e-5


def test_vectors_are_torchs(checkpoint):
    torch, (model, folder) = require("torch"), checkpoint
    found = tutorial_2_bert_base_uncased.main(folder)
    batch = {name: torch.tensor(found[name]).long() for name in ("input_ids", "attention_mask", "token_type_ids")}
    expected = model.bert(**batch)
    agree(found["output"].last_hidden_state, expected.last_hidden_state)
    agree(found["output"].pooler_output, expected.pooler_output)
    agree(found["cls"], expected.last_hidden_state[0, 0, :3])


def test_parameters_are_torchs(play):
    torch, transformers = require("torch"), require("transformers")
    found = play("tutorial_3_parameters")
    with torch.device("meta"):
        expected = dict(transformers.BertModel(transformers.BertConfig()).named_parameters())
    assert {name: struct.shape for name, struct in found["parameters"].items()} == {
        name: tuple(parameter.shape) for name, parameter in expected.items()
    }
    assert found["sizes"]["base"] == sum(parameter.numel() for parameter in expected.values())
    assert list(found["sizes"]) == ["tiny", "small", "base", "large"]
    assert sorted(found["sizes"].values()) == list(found["sizes"].values())


@pytest.mark.slow
def test_the_whole_workflow_is_torchs(play, capsys, tmp_path):
    found, tutorial = play("tutorial_4_whole_workflow"), tutorial_4_whole_workflow
    assert found["hidden"].shape == (1, 18, 768)
    assert found["prediction"].shape == (1, 20, 30522)
    torch, transformers = require("torch"), require("transformers")
    model = transformers.BertForPreTraining.from_pretrained(found["source"]).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(found["source"])
    with torch.no_grad():
        text = tokenizer(f"{tutorial.FIRST} {tutorial.SECOND}", return_tensors="pt")
        agree(found["hidden"], model.bert(**text).last_hidden_state)
        scores = model(**tokenizer(tutorial.MASKED, return_tensors="pt")).prediction_logits
        agree(found["prediction"][:, : scores.shape[1]], scores)
        pair = tokenizer(tutorial.FIRST, tutorial.SECOND, return_tensors="pt")
        agree(found["next_sentence"], model(**pair).seq_relationship_logits[0])
    before, after = train_in_torch(found, tmp_path / "classifier")
    agree(found["before"], before)
    agree(found["after"], after)
    printed = capsys.readouterr().out
    assert f"{tutorial.MASKED} -> {tokenizer.convert_ids_to_tokens(int(scores[0, 3].argmax()))}\n" in printed
    assert f"the loss is {before:.4f}, and {after:.4f} after one step" in printed


def train_in_torch(found, folder):
    """The losses before and after one step of torch's AdamW, from the tutorial's new classifier on."""
    torch, transformers = require("torch"), require("transformers")
    found["classifier"].save_pretrained(folder)
    model = transformers.BertForSequenceClassification.from_pretrained(folder).eval()
    batch = {name: torch.tensor(array).long() for name, array in found["batch"].items()}
    batch["labels"] = torch.tensor(found["labels"])
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-5, weight_decay=0.01)
    before = model(**batch).loss
    before.backward()
    optimizer.step()
    with torch.no_grad():
        return before.detach(), model(**batch).loss


def test_by_hand_is_the_library(play):
    results = play("tutorial_5_by_hand")
    np.testing.assert_allclose(results["attention"].sum(axis=-1), 1, atol=1e-5)
    assert float(results["attention"].max()) > 2 / len(results["input_ids"])  # so there is something to get wrong


def test_by_hand_is_torch_under_old_names(checkpoint, tmp_path, monkeypatch):
    """LayerNorm's parameters are called gamma and beta in bert-base-uncased."""
    torch, (model, folder) = require("torch"), checkpoint
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    old = {
        name.replace("Norm.weight", "Norm.gamma").replace("Norm.bias", "Norm.beta"): tensor
        for name, tensor in load_file(folder / "model.safetensors").items()
    }
    assert "bert.embeddings.LayerNorm.gamma" in old
    save_file(old, tmp_path / "model.safetensors", {"format": "pt"})
    found = tutorial_5_by_hand.main(tmp_path)
    expected = model(torch.tensor(found["input_ids"])[None].long(), output_attentions=True)
    agree(found["attention"], expected.attentions[0][0, 0])
    agree(found["logits"], expected.prediction_logits[0])

    # One wrong step shows.
    monkeypatch.setattr(tutorial_5_by_hand, "gelu", lambda x: jnp.maximum(x, 0))
    with pytest.raises(AssertionError):
        tutorial_5_by_hand.main(tmp_path)


@pytest.mark.parametrize(
    "tutorial",
    [tutorial_2_bert_base_uncased, tutorial_3_parameters, tutorial_4_whole_workflow, tutorial_5_by_hand],
)
def test_other_numbers_are_noticed(tutorial):
    expected = {**tutorial.KNOWN, **tutorial.PUBLISHED}
    starting_point.check(expected, expected)
    for name, value in expected.items():
        for wrong in (np.add(value, 2e-3), np.stack([value, value])):
            with pytest.raises(AssertionError, match=name):
                starting_point.check({**expected, name: wrong}, expected)


def test_numbers_are_checked_only_where_the_weights_are(sentence_folder, monkeypatch):
    def run(value):
        return starting_point.run(lambda source: {"id": 1, "number": value}, {"id": 1}, {"number": 0.5})

    monkeypatch.setattr(sys, "argv", [""])
    monkeypatch.setenv("BERTJAX_TUTORIAL_MODEL", str(sentence_folder))
    assert run(0.5) == {"id": 1, "number": 0.5}
    with pytest.raises(AssertionError, match="number"):
        run(0.6)
    monkeypatch.setenv("BERTJAX_TUTORIAL_MODEL", str(sentence_folder / "absent"))
    with pytest.raises(SourceError, match="absent"):
        run(0.5)
    monkeypatch.setattr(sys, "argv", ["", str(sentence_folder)])
    assert run(0.5) == {"id": 1, "number": 0.5}
