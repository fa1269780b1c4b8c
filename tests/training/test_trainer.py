"""The trainer, from files to a model that others load; stopped, killed, divided over devices, and led astray."""

import csv
import json
import os
import random
import signal
import subprocess
import sys
import threading
from pathlib import Path

import jax
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from jax.experimental.compilation_cache import compilation_cache
from oracle import require

import bertjax
from bertjax import from_pretrained
from bertjax.errors import ConfigError, InputError, JobError, TrainingError
from bertjax.losses import IGNORED
from bertjax.training import AdamW, load_adapter, loop, merge_lora
from bertjax.training.checkpoints import Checkpoints
from bertjax.training.loop import Trainer
from bertjax.training.settings import settings_of
from bertjax.training.setup import trainer_of
from bertjax.training.state import new_state
from bertjax.training.tasks.classification import ClassifyTexts

pytestmark = pytest.mark.usefixtures("little_optimisation", "compiled_once")

TINY = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "max_position_embeddings": 96,
}
NO_DROPOUT = TINY | {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
CLASSIFY, TAG, ANSWER, MASK = "text-classification", "token-classification", "question-answering", "masked-lm"
PRETRAIN, RANK, COMPARE, CHOOSE = "pre-training", "ranking", "similarity", "multiple-choice"
#: The kinds of task, and how the files of each are written here.
KINDS = {
    CLASSIFY: "csv",
    TAG: "conll",
    ANSWER: "parquet",
    MASK: "txt",
    PRETRAIN: "txt",
    RANK: "jsonl",
    COMPARE: "jsonl",
    CHOOSE: "jsonl",
}
NOUNS = ("cat", "dog", "mat", "tree")
REST = "the a sat on under and ran fast slow he she it".split()


def rows(kind, count, seed=0):
    """Rows of which each has something to be learnt."""
    rng = np.random.default_rng(seed)

    def words(noun):
        made = [str(word) for word in rng.choice(REST, rng.integers(3, 12))]
        made.insert(rng.integers(len(made) + 1), noun)
        return made

    for number in range(count):
        noun, other = (str(each) for each in rng.choice(NOUNS, 2, replace=False))
        text, place = words(noun), None
        if kind == CLASSIFY:
            yield {"text": " ".join(text), "label": noun}
        elif kind == TAG:
            yield {"tokens": text, "tags": [f"B-{word}" if word in NOUNS else "O" for word in text]}
        elif kind == ANSWER:
            context = " ".join(text)
            place = f" {context} ".index(f" {noun} ")
            yield {"question": "what", "context": context, "answers": {"text": [noun], "answer_start": [place]}}
        elif kind == MASK:
            yield {"text": "the cat sat on the mat and the dog ran"}
        elif kind == PRETRAIN:
            yield {"text": "" if number % 5 == 4 else f"the {NOUNS[number // 5 % 4]} sat ."}
        elif kind == RANK:
            yield {"query": noun, "passage": " ".join(text), "not": other if number % 2 else None}
        elif kind == CHOOSE:
            label = int(rng.integers(2 + number % 2))
            others = [word for word in NOUNS if word != noun]
            choices = [*others[:label], noun, *others[label : 1 + number % 2]]
            yield {"text": " ".join(text), "choices": choices, "label": label}
        else:
            pair = [noun, noun] if number % 2 else [noun, other]
            yield {"text": pair[0], "pair": " ".join(words(pair[1])), "score": 5.0 * (number % 2)}


def write(path, records):
    records = list(records)
    if path.suffix == ".csv":
        with open(path, "w", newline="") as file:
            writer = csv.DictWriter(file, records[0])
            writer.writeheader()
            writer.writerows(records)
    elif path.suffix == ".conll":
        sentences = ("".join(map("{} {}\n".format, each["tokens"], each["tags"])) for each in records)
        path.write_text("\n".join(sentences))
    elif path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(records), path)
    elif path.suffix == ".txt":
        path.write_text("".join(each["text"] + "\n" for each in records))
    else:
        path.write_text("".join(json.dumps(each) + "\n" for each in records))
    return str(path)


@pytest.fixture
def tables(tmp_path, vocab_file, sentence_folder):
    """The tables of a run's settings, with changes."""

    def tables(kind=CLASSIFY, **changes):
        model = {"preset": "tiny", "tokenizer": str(vocab_file), "config": TINY}
        suffix = KINDS[kind]
        made = {
            "model": {"name": str(sentence_folder)} if kind in (RANK, COMPARE) else model,
            "task": {"kind": kind, "mask_probability": 0.3} if kind in (MASK, PRETRAIN) else {"kind": kind},
            "data": {
                "train": [write(tmp_path / f"train.{suffix}", rows(kind, 40))],
                "eval": [write(tmp_path / f"eval.{suffix}", rows(kind, 20, 1))],
                "columns": {"negative": "not"} if kind == RANK else {},
            },
            "run": {"output": str(tmp_path / "out"), "steps": 40, "batch_size": 8, "log_every": 5},
            "optimizer": {"learning_rate": 3e-3, "warmup_steps": 4, "schedule": "constant"},
        }
        for name, options in changes.items():
            made[name] = made.get(name, {}) | options
        return made

    return tables


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return str(tmp_path_factory.mktemp("cache"))


@pytest.fixture
def compiled_once(cache):
    """Compiled programs are kept from one trainer to the next: nearly all that a tiny run takes is compiling."""
    options = {"jax_compilation_cache_dir": cache, "jax_persistent_cache_min_compile_time_secs": 0}
    before = {name: getattr(jax.config, name) for name in options}
    set_options(options)
    yield
    set_options(before)


def set_options(options):
    for name, value in options.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


@pytest.fixture
def one_device(monkeypatch):
    """A trainer that knows of one device, and draws no pictures."""
    devices = jax.devices()[:1]
    monkeypatch.setattr(jax, "devices", lambda *_: devices)
    monkeypatch.setattr(loop, "plot_curves", lambda _: None)


def trained(tables, stop=None):
    return trainer_of(settings_of(tables)).run(stop)


def without(tables, *names):
    """Without evaluation, and the like."""
    return tables | {"data": {name: value for name, value in tables["data"].items() if name not in names}}


def lines(folder, kind="train"):
    found = map(json.loads, (Path(folder) / "metrics.jsonl").read_text().splitlines())
    return [line for line in found if line["kind"] == kind]


def weights(folder):
    """The bytes of a model's weights."""
    return (Path(folder) / "model.safetensors").read_bytes()


class StopAfter(threading.Event):
    """Is set when so many steps have been made."""

    def __init__(self, steps):
        super().__init__()
        self.left = steps

    def is_set(self):
        self.left -= 1
        return self.left <= 0


def transformers_numbers(kind, trainer, folder):
    """The losses, and what else is easily told, of the saved model, by transformers, on the rows to evaluate on."""
    torch, transformers = require("torch"), require("transformers")
    name = type(trainer.model).__name__
    model = getattr(transformers, name).from_pretrained(folder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    records = trainer._evaluation.records
    if kind == CHOOSE:
        return chosen_by_transformers(model, tokenizer, records)
    if kind in (MASK, PRETRAIN):
        return masked_by_transformers(trainer, model)
    if kind == CLASSIFY:
        encoded = tokenizer([each["text"] for each in records], padding=True, return_tensors="pt")
        labels = {"labels": torch.tensor([model.config.label2id[each["label"]] for each in records])}
    elif kind == TAG:
        words = [each["tokens"] for each in records]
        encoded = tokenizer(words, is_split_into_words=True, padding=True, return_tensors="pt")
        owners = [encoded.word_ids(row) for row in range(len(records))]
        ids = [
            [
                model.config.label2id[record["tags"][word]] if word is not None and word != before else IGNORED
                for before, word in zip([None, *row], row, strict=False)
            ]
            for row, record in zip(owners, records, strict=True)
        ]
        labels = {"labels": torch.tensor(ids)}
    else:
        return {"loss": float(np.mean([answer_loss(model, tokenizer, record) for record in records]))}
    with torch.no_grad():
        output = model(**encoded, **labels)
    scored = labels["labels"] != IGNORED
    right = (output.logits.argmax(-1) == labels["labels"])[scored]
    return {"loss": output.loss.item(), "accuracy": right.float().mean().item()}


def answer_loss(model, tokenizer, record):
    """The loss of an answer of one token, in a row without padding."""
    torch = require("torch")
    encoded = tokenizer(record["question"], record["context"], return_tensors="pt")
    place = torch.tensor([encoded.char_to_token(0, record["answers"]["answer_start"][0], 1)])
    with torch.no_grad():
        return model(**encoded, start_positions=place, end_positions=place).loss.item()


def chosen_by_transformers(model, tokenizer, records):
    """The loss and the accuracy of rows, each for itself, as they may have different numbers of choices."""
    torch = require("torch")
    losses, right = [], []
    for record in records:
        texts = [record["text"]] * len(record["choices"])
        encoded = tokenizer(texts, record["choices"], padding=True, return_tensors="pt")
        with torch.no_grad():
            label = torch.tensor([record["label"]])
            output = model(**{name: array[None] for name, array in encoded.items()}, labels=label)
        losses.append(output.loss.item())
        right.append(output.logits.argmax().item() == record["label"])
    return {"loss": np.mean(losses), "accuracy": np.mean(right)}


def masked_by_transformers(trainer, model):
    """The losses of the texts in the rows that are evaluated, each for itself."""
    torch = require("torch")
    entropy = torch.nn.CrossEntropyLoss(reduction="none")
    found = {"words": [], "follows": []}
    for batch in trainer._held_out.all():
        arrays = {name: np.asarray(array) for name, array in batch.arrays.items()}
        places = [(row, 1 + s) for row, ids in enumerate(arrays["segment_ids"]) for s in range(ids.max())]
        for row, segment in places:
            inside = (row, arrays["segment_ids"][row] == segment)
            ids, types, labels = (
                torch.tensor(arrays[name][inside][None], dtype=torch.long)
                for name in ("input_ids", "token_type_ids", "labels")
            )
            with torch.no_grad():
                output = model(input_ids=ids, token_type_ids=types)
            logits = output.logits if "logits" in output else output.prediction_logits
            found["words"] += entropy(logits[labels != IGNORED], labels[labels != IGNORED]).tolist()
            if "next_sentence_label" in arrays:
                label = torch.tensor([int(arrays["next_sentence_label"][row, segment - 1])])
                found["follows"] += entropy(output.seq_relationship_logits, label).tolist()
    return {"loss": sum(float(np.mean(losses)) for losses in found.values() if losses)}


def sentence_numbers(kind, trainer, folder):
    """The metrics of the saved model by sentence-transformers."""
    model = require("sentence_transformers").SentenceTransformer(str(folder), device="cpu")
    columns = trainer.task.columns[:2]
    first, second = (
        model.encode([each[column] for each in trainer._evaluation.records], normalize_embeddings=True)
        for column in columns
    )
    if kind == RANK:
        scores = first @ second.T
        ranks = (scores >= np.diag(scores)[:, None]).sum(1)
        return {"mrr": (1 / ranks).mean()}
    scores = [each["score"] / 5 for each in trainer._evaluation.records]
    return {"loss": np.square((first * second).sum(-1) - scores).mean()}


BY_TORCH = {CLASSIFY, TAG, ANSWER, MASK, PRETRAIN, CHOOSE}
CHANGES = {
    COMPARE: {"task": {"scale": 5.0}},
    RANK: {"task": {"dims": [16, 8]}},
    MASK: {"run": {"accumulate": 2}},
    PRETRAIN: {"run": {"accumulate": 2}},
}
SLOW = (ANSWER, MASK, PRETRAIN, RANK, CHOOSE)


@pytest.mark.parametrize("kind", [pytest.param(kind, marks=[pytest.mark.slow] * (kind in SLOW)) for kind in KINDS])
def test_a_task_is_learnt_and_others_find_the_same_numbers(tables, kind, one_device):
    trainer = trainer_of(settings_of(tables(kind, **CHANGES.get(kind, {}))))
    report = trainer.run()
    folder = Path(report.model).parent
    losses = [line["loss"] for line in lines(folder)]
    assert min(losses[-2:]) < 0.7 * losses[0]
    assert (report.steps, report.total_steps) == (40, 40)
    best, greater = trainer.task.best
    evaluations, epoch = lines(folder, "eval"), trainer.batches.steps_per_epoch
    assert [line["step"] for line in evaluations] == sorted({*range(epoch, 41, epoch), 40})
    found = [line[best] for line in evaluations]
    assert report.metrics[best] == (max(found) if greater else min(found))
    assert report.step_saved == evaluations[found.index(report.metrics[best])]["step"]
    assert json.loads((folder / "report.json").read_text())["metrics"] == report.metrics
    assert not (folder / "bad_rows.jsonl").exists()
    numbers = (transformers_numbers if kind in BY_TORCH else sentence_numbers)(kind, trainer, folder / "model")
    for name, value in numbers.items():
        np.testing.assert_allclose(report.metrics[name], value, rtol=1e-4, err_msg=name)


def test_what_is_learnt_is_used(tables, tmp_path, one_device):
    """The model that a run leaves gives answers, and is where the next one goes on from."""
    report = trained(without(tables(), "eval"))
    assert report.metrics == {}
    again = tables(run={"output": str(tmp_path / "next"), "steps": 1}, optimizer={"learning_rate": 0.0})
    again["model"] = {"name": str(report.model)}
    found = bertjax.TextClassification.from_pretrained(report.model)([each["text"] for each in rows(CLASSIFY, 20, 1)])
    right = [each.label == row["label"] for each, row in zip(found, rows(CLASSIFY, 20, 1), strict=True)]
    assert trained(again).metrics["accuracy"] == np.mean(right)
    path = Path(again["data"]["train"][0])
    path.write_text(path.read_text() + "a bird,bird\n")
    with pytest.raises(InputError, match="its label is 'bird', expected one of 'cat', 'dog'"):
        trained(again)


def rolled(tables, stop_after=(), **run):
    """What a run ends with that is stopped after so many steps, once or several times."""
    tables = tables | {"run": tables["run"] | run}
    for steps in stop_after:
        report = trained(tables, StopAfter(steps))
        assert not report.is_done
    report = trained(tables)
    assert report.is_done
    return weights(report.model), report


def test_a_run_that_is_stopped_ends_as_one_that_is_not(tables, tmp_path, one_device):
    given = tables(run={"steps": 12, "accumulate": 2, "evaluate_every": 4, "checkpoint_every": 3, "save": "last"})
    whole, first = rolled(given, output=str(tmp_path / "whole"))
    # Where an evaluation is due, and where nothing is.
    stopped, second = rolled(given, (4, 3), output=str(tmp_path / "stopped"))
    assert stopped == whole
    assert (first.metrics, first.step_saved) == (second.metrics, second.step_saved)
    evaluations = [lines(tmp_path / name, "eval") for name in ("whole", "stopped")]
    assert [line["step"] for line in evaluations[0]] == [4, 8, 12]
    assert [line | {"seconds": 0} for line in evaluations[0]] == [line | {"seconds": 0} for line in evaluations[1]]


def test_a_run_stopped_at_its_last_step_is_done(tables, one_device):
    given = tables(run={"steps": 3})
    report = trained(given, StopAfter(3))
    assert report.is_done
    assert report.metrics["loss"] == lines(given["run"]["output"], "eval")[-1]["loss"]
    before = weights(report.model)
    again = trained(given)
    assert (again, weights(again.model)) == (report, before)


def test_a_trainer_without_a_file_of_settings(tables, one_device):
    """Of one's own examples; and run() may be called again, to go on."""
    made = trainer_of(settings_of(tables(run={"steps": 4})))
    trainer = Trainer(made.model, made.task, made.batches.examples, made._options, optimizer=AdamW())
    assert not trainer.run(StopAfter(2)).is_done
    report = trainer.run()
    assert (report.is_done, report.metrics) == (True, {})


COMMAND = """
import os, random, signal, sys, threading
from bertjax.cli import main
from bertjax.training import loop

steps, seconds = int(sys.argv.pop(1)), float(sys.argv.pop(1))
train_step = loop.train_step

def counting(*args, **options):
    step, left = train_step(*args, **options), [steps]

    def counted(*given):
        left[0] -= 1
        if left[0] == 0:
            threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGKILL)).start()
        return step(*given)

    return counted

loop.train_step, loop.plot_curves = counting, lambda folder: None
main()
"""


def command(config, steps=0, seconds=0.0, cache=""):
    """`bertjax train`, which after so many steps, and then some seconds, is killed; 0 for never."""
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    environment |= (
        {"JAX_COMPILATION_CACHE_DIR": cache, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"} if cache else {}
    )
    arguments = [sys.executable, "-c", COMMAND, str(steps), str(seconds), "train", str(config)]
    return subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def toml(tables):
    """Tables as a file says them."""
    parts = []
    for name, options in tables.items():
        values = (
            f"{key} = {{{', '.join(f'{k} = {json.dumps(v)}' for k, v in value.items())}}}"
            if isinstance(value, dict)
            else f"{key} = {json.dumps(value)}"
            for key, value in options.items()
        )
        parts.append("\n".join([f"[{name}]", *values]))
    return "\n".join(parts)


def kill_often(tables, folder, times, steps, cache=""):
    """Kills runs after a random number of steps, and compares what they end with to one that was not killed."""
    config, rng, killed = folder / "config.toml", random.Random(times), 0
    output = {name: str(folder / name) for name in ("whole", "other")}
    config.write_text(toml(tables | {"run": tables["run"] | {"output": output["whole"], "steps": steps}}))
    said, errors = (process := command(config, cache=cache)).communicate()
    assert process.returncode == 0, errors
    config.write_text(config.read_text().replace(output["whole"], output["other"]))
    while killed < times:
        process = command(config, rng.randint(2, max(2, 2 * steps // times)), rng.choice([0.0, 0.02, 0.1]), cache)
        _, errors = process.communicate()
        assert process.returncode in (0, -signal.SIGKILL), errors
        if process.returncode == 0:
            break
        killed += 1
    again, errors = (process := command(config, cache=cache)).communicate()
    assert process.returncode == 0, errors
    assert weights(folder / "other" / "model") == weights(folder / "whole" / "model")
    assert again.replace(output["other"], output["whole"]) == said
    logs = [[line | {"seconds": 0} for line in lines(output[name], "eval")] for name in output]
    assert logs[0] == logs[1]
    assert not [path for path in (folder / "other").rglob("*") if path.suffix in (".tmp", ".damaged")]
    return killed


KILLED = {"batch_size": 8, "accumulate": 2, "checkpoint_every": 2, "evaluate_every": 7, "log_every": 1, "save": "last"}


def test_a_run_killed_at_random_steps_ends_bit_equal(tables, tmp_path, cache):
    assert kill_often(without(tables(run=KILLED), "eval"), tmp_path, 3, 24, cache) == 3


@pytest.mark.slow
@pytest.mark.timeout(1800)  # a dozen starts of a process that imports JAX and compiles
@pytest.mark.parametrize("kind", [CLASSIFY, MASK, RANK])
def test_a_run_killed_at_ten_random_steps_ends_bit_equal(tables, tmp_path, kind):
    assert kill_often(tables(kind, run=KILLED), tmp_path, 10, 60) >= 5


@pytest.mark.slow
def test_a_command_that_is_terminated_can_be_repeated(tables, tmp_path):
    config, output = tmp_path / "config.toml", tmp_path / "out"
    config.write_text(toml(tables(run={"steps": 3000, "log_every": 1, "evaluate_every": 3000})))
    process = command(config)
    while not (output / "metrics.jsonl").exists() or not lines(output):
        assert process.poll() is None, process.stderr.read()
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate()
    assert process.returncode == 75, errors
    assert "finishing the step in hand" in errors
    assert errors.splitlines()[-1].endswith(" of 3000 steps; the same command goes on")
    step = lines(output)[-1]["step"]
    assert f"stopped after {step} of" in errors
    assert (output / "checkpoints" / str(step)).is_dir()


def curve(tables, monkeypatch=None, devices=None, **changes):
    """The losses of a run, by step, on so many devices."""
    given = {name: tables[name] | changes.get(name, {}) for name in tables}
    if devices is not None:
        found = jax.devices()[:devices]
        with monkeypatch.context() as patch:
            patch.setattr(jax, "devices", lambda *_: found)
            trained(given)
    else:
        trained(given)
    output = given["run"]["output"]
    return [line["loss"] for line in lines(output)], lines(output, "eval")[-1]


SHORT = {"steps": 8, "log_every": 1, "evaluate_every": 4}


SHARDINGS = [
    (CLASSIFY, "full"),
    *((kind, "replicated") for kind in KINDS),
    *((kind, "full") for kind in (RANK, ANSWER)),
]


@pytest.mark.parametrize(
    ("kind", "sharding"), [SHARDINGS[0], *(pytest.param(*each, marks=pytest.mark.slow) for each in SHARDINGS[1:])]
)
def test_eight_devices_learn_what_one_does(tables, tmp_path, monkeypatch, caplog, kind, sharding):
    given = tables(
        kind, run=SHORT, optimizer={"learning_rate": 1e-3, "eps": 1e-6}, task=CHANGES.get(kind, {}).get("task", {})
    )
    if "config" in given["model"]:
        given["model"] |= {"config": NO_DROPOUT}
    expected, measured = curve(given, monkeypatch, 1)
    with caplog.at_level("INFO", "bertjax.training"):
        losses, found = curve(given, run={"output": str(tmp_path / "eight"), "sharding": sharding})
    assert "MB on each of 8 devices" in caplog.text
    np.testing.assert_allclose(losses, expected, rtol=2e-5)
    assert measured.keys() == found.keys()
    np.testing.assert_allclose(found["loss"], measured["loss"], rtol=2e-5)


def test_packed_training_is_that_of_a_text_in_each_row(tables, tmp_path, monkeypatch, one_device):
    given = tables(run=SHORT, model={"config": NO_DROPOUT}, optimizer={"learning_rate": 1e-3, "eps": 1e-6})
    packed, measured = curve(given)
    fill = [line["fill"] for line in lines(given["run"]["output"])]
    monkeypatch.setattr(ClassifyTexts, "alone", True)
    alone, found = curve(given, run={"output": str(tmp_path / "alone")})
    assert min(fill) > 2 * max(line["fill"] for line in lines(tmp_path / "alone"))
    np.testing.assert_allclose(alone, packed, rtol=2e-5)
    np.testing.assert_allclose(found["loss"], measured["loss"], rtol=2e-5)


def test_the_seed_decides(tables, tmp_path, one_device):
    given = without(tables(run=SHORT), "eval")
    ends = [rolled(given, output=str(tmp_path / f"{number}"), seed=seed)[0] for number, seed in enumerate((0, 0, 1))]
    assert ends[0] == ends[1] != ends[2]


@pytest.mark.parametrize("kind", [CLASSIFY, pytest.param(RANK, marks=pytest.mark.slow)])
def test_longer_texts_may_be_evaluated_than_learnt_from(tables, tmp_path, kind, one_device):
    """Rows to evaluate are longer then, and hold more texts."""
    given = tables(kind, run={"steps": 1}, optimizer={"learning_rate": 0.0})
    records = list(rows(kind, 20, 1))
    records[0]["text" if kind == CLASSIFY else "passage"] = "cat " * 88
    write(Path(given["data"]["eval"][0]), records)
    found = trained(given).metrics
    other = given["run"] | {"output": str(tmp_path / "other"), "row_length": 96}
    for name, value in trained(given | {"run": other}).metrics.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-5)


def test_another_run_in_the_folder_is_refused(tables, one_device):
    given = tables(run={"steps": 2})
    trained(given)
    with pytest.raises(JobError, match=r"holds a run with optimizer.learning_rate = 0.003, now 0.1; name another outp"):
        trained(given | {"optimizer": given["optimizer"] | {"learning_rate": 0.1}})
    with pytest.raises(JobError, match=r"holds a run with run.steps = 2, now 3"):
        trained(given | {"run": given["run"] | {"steps": 3}})
    with pytest.raises(JobError, match=r"holds a run with lora.rank = None, now 8"):
        trained(given | {"lora": {}})
    # What changes nothing that is learnt may be another.
    trained(given | {"run": given["run"] | {"log_every": 1, "keep": 1, "save": "last"}})
    for name in ("train", "eval"):
        path = Path(given["data"][name][0])
        before = path.read_text()
        path.write_text(before.replace("sat", "ran"))
        with pytest.raises(JobError, match="holds a run with other data"):
            trained(given)
        path.write_text(before)
    trained(given)


def test_a_run_that_diverges_says_so_and_leaves_its_checkpoints(tables, one_device):
    given = without(tables(run={"steps": 20, "checkpoint_every": 1, "keep": 20}), "eval")
    given["optimizer"] = {"learning_rate": 1e30, "schedule": "constant", "warmup_steps": 2}
    with pytest.raises(TrainingError, match=r"of step \d+ is (nan|inf): the run has diverged, and the checkpoints"):
        trained(given)
    trainer = trainer_of(settings_of(given))
    like = new_state(trainer.model, trainer._optimizer)
    with Checkpoints(Path(given["run"]["output"]) / "checkpoints") as checkpoints:
        state = checkpoints.restore(like)
    assert state.step >= 1
    assert all(bool(np.isfinite(leaf).all()) for leaf in jax.tree.leaves(state.params))
    assert not (Path(given["run"]["output"]) / "model").exists()


def test_the_best_and_the_last(tables, tmp_path, one_device):
    """With a rate that is much too high at the end, the best state is an earlier one."""
    given = tables(run={"steps": 12, "evaluate_every": 3, "best": "loss"})
    given["optimizer"] = {"learning_rate": 0.3, "schedule": "constant", "warmup_steps": 12}
    first, best = rolled(given)
    second, last = rolled(given, output=str(tmp_path / "last"), save="last")
    losses = [line["loss"] for line in lines(tmp_path / "out", "eval")]
    assert best.metrics["loss"] == min(losses) < losses[-1] == last.metrics["loss"]
    assert best.step_saved == 3 * (1 + int(np.argmin(losses))) < last.step_saved == 12
    assert first != second
    with pytest.raises(ConfigError, match=r"run.best is 'f2', and the metrics are loss, accuracy, f1"):
        rolled(given, output=str(tmp_path / "f2"), best="f2")


@pytest.mark.slow
def test_less_of_an_error_is_better(tables, one_device):
    given = tables(task={"problem": "regression"}, run={"steps": 12, "evaluate_every": 4, "best": "mean_squared_error"})
    for [path] in (given["data"]["train"], given["data"]["eval"]):
        write(Path(path), [each | {"label": NOUNS.index(each["label"]) / 2} for each in rows(CLASSIFY, 24)])
    report = trained(given)
    found = [line["mean_squared_error"] for line in lines(given["run"]["output"], "eval")]
    assert report.metrics["mean_squared_error"] == min(found) < max(found)
    assert json.loads((report.model / "config.json").read_text())["problem_type"] == "regression"


def test_lora_leaves_an_adapter_and_a_merged_model(tables, tmp_path, one_device):
    base = trained(without(tables(run={"steps": 2, "output": str(tmp_path / "base")}), "eval")).model
    given = tables(run={"steps": 20}, lora={"rank": 4, "alpha": 8, "targets": ["query", "intermediate"]})
    given["model"] = {"name": str(base)}
    report = trained(given)
    losses = [line["loss"] for line in lines(given["run"]["output"])]
    assert losses[-1] < losses[0]
    merged = merge_lora(load_adapter(from_pretrained(base), tmp_path / "out" / "adapter"))
    model = from_pretrained(report.model)
    before, after, wanted = (bertjax.functional(each)[1] for each in (from_pretrained(base), model, merged))
    jax.tree.map(np.testing.assert_array_equal, after, wanted)
    same = jax.tree.map(lambda a, b: bool((a == b).all()), before, after)
    layers = same["bert"]["encoder"]["layers"]
    assert not layers["attention"]["query"]["kernel"]
    assert not same["classifier"]["kernel"]
    assert layers["attention"]["key"]["kernel"]
    assert same["bert"]["embeddings"]["word_embeddings"]["embedding"]
    config = json.loads((tmp_path / "out" / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(base)


def test_bad_rows_stop_a_run_or_are_left_out(tables, tmp_path, one_device):
    given = tables(run={"steps": 2}, task={"labels": [*NOUNS[:3]]})
    bad = [
        (data, f"row {row}")
        for data, count, seed in (("train", 40, 0), ("eval", 20, 1))
        for row, each in enumerate(rows(CLASSIFY, count, seed))
        if each["label"] == "tree"
    ]
    with pytest.raises(InputError, match=rf"{len(bad)} bad row\(s\): .*bad_rows.jsonl names them all; data.on_bad = "):
        trained(given)
    trained(given | {"data": given["data"] | {"on_bad": "skip"}})
    named = [json.loads(line) for line in (tmp_path / "out" / "bad_rows.jsonl").read_text().splitlines()]
    assert [(Path(each["file"]).stem, each["place"]) for each in named] == bad
    assert all(each["reason"].startswith("its label is 'tree', expected one of 'cat', 'dog', 'mat'") for each in named)
    skip = given["data"] | {"on_bad": "skip"}
    with pytest.raises(InputError, match=r"data.train has no example that can be used"):
        trained(given | {"data": skip, "task": given["task"] | {"labels": ["x"]}})


@pytest.mark.slow
def test_bfloat16(tables, one_device):
    report = trained(tables(model={"dtype": "bfloat16"}))
    losses = [line["loss"] for line in lines(report.model.parent)]
    assert min(losses[-2:]) < 0.7 * losses[0]
    assert {array.dtype.name for array in jax.tree.leaves(bertjax.functional(from_pretrained(report.model))[1])} == {
        "float32"
    }


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"model": {"name": "x"}}, ConfigError, "needs a name, .* or a preset"),
        ({"model": {"preset": "gigantic"}}, ConfigError, "unknown preset 'gigantic'"),
        ({"model": {"pooling": "mean"}}, ConfigError, "pooling has no meaning for text-classification"),
        ({"data": {"columns": {"tokens": "x"}}}, ConfigError, "data.columns has 'tokens'; text-classification reads t"),
        ({"data": {"columns": {"text": "body"}}}, InputError, "no column 'body'"),
        ({"task": {"max_length": 97}}, ConfigError, "task.max_length is 97, expected 3 to 96"),
        ({"run": {"batch_size": 9, "accumulate": 2}}, ConfigError, "can't be divided into 2 parts"),
        ({"optimizer": {"freeze": ["head"]}}, ConfigError, "freeze: the model has no 'head'"),
    ],
)
def test_settings_that_do_not_fit(tables, changes, error, message):
    with pytest.raises(error, match=message):
        trainer_of(settings_of(tables(**changes)))


@pytest.mark.parametrize(
    ("kind", "columns"), [(CLASSIFY, {"pair": "text"}), (ANSWER, {}), (CHOOSE, {}), (PRETRAIN, {}), (CLASSIFY, {})]
)
def test_a_model_with_one_type_of_tokens_does_not_learn_from_pairs(tables, kind, columns):
    given = tables(kind, model={"config": TINY | {"type_vocab_size": 1}}, data={"columns": columns})
    if kind == CLASSIFY and not columns:
        assert trainer_of(settings_of(given)).model.config.type_vocab_size == 1
        return
    with pytest.raises(ConfigError, match=r"one type of tokens \(type_vocab_size is 1\), so it can't read two texts"):
        trainer_of(settings_of(given))


@pytest.mark.parametrize("remat", [False, True])
@pytest.mark.parametrize("platform", ["cpu", "gpu"])
def test_layers_are_unrolled_on_gpus_but_where_they_are_computed_again(tables, monkeypatch, platform, remat):
    monkeypatch.setattr(jax, "default_backend", lambda: platform)
    encoder = trainer_of(settings_of(tables(model={"remat": remat}))).model.bert.encoder
    assert encoder.unroll == (encoder.num_layers if platform == "gpu" and not remat else 1)
    assert encoder.num_layers > 1


@pytest.mark.parametrize("option", [{"remat": True}, {"tokenizer": "x"}, {"config": {"vocab_size": 3}}])
def test_settings_that_sentence_models_do_not_have(tables, option):
    with pytest.raises(ConfigError, match=f"ranking goes on from a name, without {next(iter(option))}"):
        trainer_of(settings_of(tables(RANK, model=option)))
