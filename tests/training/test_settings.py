"""The file of settings: what is refused and by what words, and that the documentation says all and is itself a file."""

import dataclasses
import json
import tomllib

import pytest

from bertjax.errors import ConfigError, SourceError
from bertjax.training import AdamW, LoRA
from bertjax.training.settings import Settings, describe, documentation, read_settings, settings_of

LEAST = {
    "model": {"name": "a"},
    "task": {"kind": "masked-lm"},
    "data": {"train": ["a.txt"]},
    "run": {"output": "out"},
}
# How the documentation shows what has to be filled in.
NEEDED = {"kind": '"masked-lm"', "train": '["a.txt"]', "output": '"out"'}


def changed(table, **options):
    return {**LEAST, table: LEAST.get(table, {}) | options}


def test_what_is_not_said_has_its_default():
    settings = settings_of(LEAST)
    assert (settings.run.epochs, settings.model.dtype, settings.lora) == (3.0, "float32", None)
    assert settings.optimizer == AdamW()


def test_values_become_what_options_are():
    settings = settings_of(
        changed("run", epochs=2)
        | {"optimizer": {"clip_norm": 2, "warmup_steps": 0.1, "freeze": "embeddings"}}
        | {"lora": {"rank": 2, "alpha": 3, "targets": ["key"]}}
    )
    assert type(settings.run.epochs) is float
    assert settings.optimizer == AdamW(clip_norm=2.0, warmup_steps=0.1, freeze=("embeddings",))
    assert type(settings.optimizer.clip_norm) is float
    assert type(settings_of(LEAST | {"optimizer": {"warmup_steps": 3}}).optimizer.warmup_steps) is int
    assert settings.lora == LoRA(rank=2, alpha=3.0, targets=("key",))
    assert settings_of(changed("data", train="a.txt")).data.train == ("a.txt",)
    assert settings_of(changed("task", kind="text-classification", problem="regression")).task.problem == "regression"


@pytest.mark.parametrize(
    ("tables", "message"),
    [
        (LEAST | {"modell": {}}, "'modell' is not among the tables; did you mean model?"),
        (LEAST | {"zzz": {}}, "'zzz' is not among the tables; tables: model, task, data, run, optimizer, lora"),
        (changed("run", batchsize=3), r"'batchsize' is not among the options of \[run\]; did you mean batch_size\?"),
        (changed("lora", r=3), r"'r' is not among the options of \[lora\]; options of \[lora\]: rank, alpha, targets"),
        (changed("run", epochs="3"), "run.epochs is '3', expected a number"),
        (changed("run", batch_size=3.0), "run.batch_size is 3.0, expected a whole number"),
        (changed("run", batch_size=True), "run.batch_size is True, expected a whole number"),
        (changed("model", remat=1), "model.remat is 1, expected true or false"),
        (changed("model", name=1), "model.name is 1, expected a text"),
        (changed("model", config=1), r"model.config is 1, expected a table: \[model.config\]"),
        (changed("model", fresh=1), "model.fresh is 1, expected a list"),
        (changed("data", train=[1]), "data.train is 1, expected a text"),
        (changed("data", columns={"text": 1}), "data.columns is 1, expected a text"),
        (changed("task", kind="tagging"), "task.kind is 'tagging', expected one of 'text-classification', 'token"),
        (changed("task", problem="x"), "task.problem is 'x', expected one of 'single_label_classification', 'multi_l"),
        (changed("run", save="first"), "run.save is 'first', expected one of 'best', 'last'"),
        (LEAST | {"run": 3}, r"run is 3, expected a table: \[run\]"),
        (LEAST | {"run": {}}, r"\[run\] has no output: the folder of the run"),
        ({"model": {}}, r"no table \[task\]; `bertjax train --options` shows"),
        (LEAST | {"optimizer": {"learning_rate": -1}}, r"\[optimizer\] learning_rate is -1.0, expected a number of 0"),
        (LEAST | {"lora": {"rank": 0}}, r"\[lora\] rank is 0, expected a positive integer"),
        (changed("run", log_every=0), r"\[run\] log_every is 0, expected a positive integer"),
        (changed("run", keep=0), r"\[run\] keep is 0"),
        (changed("run", seed=-1), r"\[run\] seed is -1, expected an integer of at least 0"),
        (changed("run", epochs=0), r"\[run\] epochs is 0.0, expected a number above 0"),
        (changed("run", epochs=float("inf")), r"\[run\] epochs is inf"),
        (changed("task", doc_stride=3), r"doc_stride is of question-answering, and has no meaning for masked-lm"),
        (changed("task", kind="similarity", scale=0), r"\[task\] scale is 0.0, expected a number above 0"),
        (changed("task", kind="ranking", dims=[0]), r"\[task\] dims is 0, expected a positive integer"),
    ],
)
def test_what_is_refused(tables, message):
    with pytest.raises(ConfigError, match=message):
        settings_of(tables)


def test_errors_of_a_file_name_it(tmp_path):
    path = tmp_path / "a.toml"
    with pytest.raises(SourceError, match=r"a.toml: can't be read"):
        read_settings(path)
    for content in (b"[model", b"\xff"):
        path.write_bytes(content)
        with pytest.raises(ConfigError, match=r"a.toml: not TOML"):
            read_settings(path)
    path.write_text("[modle]")
    with pytest.raises(ConfigError, match=r"a.toml: 'modle' .* did you mean model"):
        read_settings(path)


def filled(text):
    for name, value in NEEDED.items():
        assert text.count(f"# {name} =\n") == 1
        text = text.replace(f"# {name} =\n", f"{name} = {value}\n")
    return text


def test_the_documentation_is_a_file_of_settings(tmp_path):
    path = tmp_path / "a.toml"
    path.write_text(documentation())
    with pytest.raises(ConfigError, match=r"\[task\] has no kind"):
        read_settings(path)
    path.write_text(filled(documentation()))
    assert read_settings(path) == dataclasses.replace(settings_of(LEAST), model=read_settings(path).model)
    assert read_settings(path).model == dataclasses.replace(settings_of(LEAST).model, name=None)
    # With what is used only if it is there.
    lines = filled(documentation()).splitlines()
    start = lines.index("# [lora]")
    lines[start:] = [line.removeprefix("# ") if "[" in line or " = " in line else line for line in lines[start:]]
    path.write_text("\n".join(lines))
    assert read_settings(path).lora == LoRA()


def test_the_documentation_has_every_option_with_its_text():
    lines = documentation().splitlines()
    for table in dataclasses.fields(Settings):
        kind = {"optimizer": AdamW, "lora": LoRA}.get(table.name, table.type)
        said = describe(kind)
        assert {field.name for field in dataclasses.fields(kind)} == set(said)
        start = next(place for place, line in enumerate(lines) if line.removeprefix("# ") == f"[{table.name}]")
        for field in dataclasses.fields(kind):
            place = next(
                n for n in range(start, len(lines)) if lines[n].removeprefix("# ").startswith(f"{field.name} =")
            )
            assert lines[place - 1].removesuffix(" Needed.") == f"# {said[field.name]}"
            assert len(said[field.name]) > 3
            start = place
    assert tomllib.loads(documentation())["run"]["save"] == "best"


def test_settings_are_json():
    settings = settings_of(LEAST | {"lora": {}})
    assert settings_of({k: strip(v) for k, v in json.loads(json.dumps(settings.to_json())).items()}) == settings


def strip(table):
    """TOML has no null."""
    return {name: value for name, value in table.items() if value is not None}
