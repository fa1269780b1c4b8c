"""Conversion of a BERT-large, every format into every other: time beside copying the file, and peak memory.

    python -m benchmarks.convert [--rounds N] [--certificate] [--save NAME]

The checkpoint is random, in float32, 1.3 GB; it needs about 6 GB on the disk. Copying the source file and converting it
take turns (A B A B ...), each in a process of its own that has imported what it needs; both flush to the disk before
they are done. Pickles are made by torch, and left out where it is absent.
"""

import importlib.util
import itertools
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path

import click
import numpy as np

from benchmarks import timing

TARGETS = ("safetensors", "msgpack", "orbax")


def work() -> None:
    """A worker: copies or converts what it is asked to, once; says how long it took and its peak memory."""
    from bertjax import convert_checkpoint

    def handle(request):
        source, target = Path(request["source"]), Path(request["target"])
        begin = time.perf_counter()
        if request["to"] == "copy":
            copy(source, target)
        else:
            certify = target.with_suffix(".json") if request["certificate"] else None
            convert_checkpoint(source, target, to=request["to"], certify=certify)
        return {"seconds": time.perf_counter() - begin, "memory": timing.peak_memory()}

    timing.answer_requests(handle)


def copy(source: Path, target: Path) -> None:
    """Copies the weights of a folder, and flushes them to the disk."""
    target.mkdir()
    for path in weight_files(source):
        with open(shutil.copyfile(path, target / path.name), "rb") as file:
            os.fsync(file.fileno())


def weight_files(folder: Path) -> list[Path]:
    """The files of a folder that hold the weights."""
    return [path for path in folder.iterdir() if path.stat().st_size > 1e6]


def make_sources(folder: Path) -> dict[str, Path]:
    """Makes the same random checkpoint in every format; returns the folders by format."""
    from bertjax import BertConfig, convert_checkpoint
    from bertjax.convert import bert, targets
    from bertjax.convert.layout import Layout
    from bertjax.pretrained import abstract_model, write_config

    config, rng = BertConfig.preset("large"), np.random.default_rng(0)
    tree = {path: rng.random(shape, np.float32) for path, shape in abstract_model(config)[1].items()}
    made = {name: folder / name for name in ("safetensors", "msgpack")}
    made["safetensors"].mkdir()
    write_config(made["safetensors"], config.to_hf() | {"architectures": ["BertModel"]}, "float32")
    targets.write_torch(
        made["safetensors"], bert.tensors_of(bert.slots_of({p: a.shape for p, a in tree.items()}), tree), Layout()
    )
    del tree
    convert_checkpoint(made["safetensors"], made["msgpack"], to="msgpack")
    if importlib.util.find_spec("torch") is not None:
        import torch
        from safetensors.torch import load_file

        tensors = load_file(made["safetensors"] / "model.safetensors")
        for name, zipped in {"zip pickle": True, "legacy pickle": False}.items():
            made[name] = folder / name.replace(" ", "-")
            made[name].mkdir()
            shutil.copyfile(made["safetensors"] / "config.json", made[name] / "config.json")
            torch.save(tensors, made[name] / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
    return made


def measure(source: Path, target: Path, to: str, certificate: bool) -> dict[str, float]:
    """One copy or one conversion, in a new process."""
    worker = timing.Worker("benchmarks.convert", "--work")
    answer = worker.ask(source=str(source), target=str(target), to=to, certificate=certificate)
    worker.close()
    shutil.rmtree(target)
    return answer


def compare(made: dict[str, Path], folder: Path, rounds: int, certificate: bool) -> list[dict]:
    """Copies and converts in turn."""
    results = []
    for (source, path), to in itertools.product(made.items(), TARGETS):
        size = sum(file.stat().st_size for file in weight_files(path))
        turns = {"copy": [], "convert": []}
        for _ in range(rounds):
            turns["copy"].append(measure(path, folder / "out", "copy", False))
            turns["convert"].append(measure(path, folder / "out", to, certificate))
        results.append({"source": source, "target": to, "bytes": size, **turns})
        click.echo(f"{source} to {to} done", err=True)
    return results


def report(found: dict) -> str:
    """What was measured, for a person to read."""
    rows = [["from", "to", "copying", "converting", "speed of copying", "peak memory / file"]]
    for each in found["results"]:
        copied, converted = ([turn["seconds"] for turn in each[kind]] for kind in ("copy", "convert"))
        speed = timing.ratios(copied, converted)
        memory = max(turn["memory"] for turn in each["convert"]) / each["bytes"]
        shown = [f"{timing.shown(values)} s" for values in (copied, converted)]
        rows.append([each["source"], each["target"], *shown, f"{speed['median']:.2f}", f"{memory:.2f}"])
    certified = "with a certificate" if found["certificate"] else "without a certificate"
    size = found["results"][0]["bytes"] / 1e9
    return "\n".join(
        [
            f"# Conversion of a BERT-large of {size:.2f} GB, {certified}",
            "",
            timing.describe_machine(found["machine"]),
            "",
            f"`{found['command']}`",
            "",
            "Medians (least to largest) of turns; the speed is the median of the ratios, turn by turn. Peak memory is",
            "that of the whole process, with Python, jax and numpy; without a model it is about 0.2 GB.",
            "",
            timing.table(rows),
        ]
    )


@click.command()
@click.option("--rounds", default=3, show_default=True, help="How many turns each conversion gets.")
@click.option("--certificate", is_flag=True, help="Write a certificate, for which everything is read again and hashed.")
@click.option("--save", "name", help="Write the result to benchmarks/results under this name.")
def main(rounds: int, certificate: bool, name: str | None) -> None:
    """Compares conversion with copying."""
    with tempfile.TemporaryDirectory() as folder:
        results = compare(make_sources(Path(folder)), Path(folder), rounds, certificate)
    found = {
        "machine": timing.machine(),
        "command": f"python -m benchmarks.convert --rounds {rounds}{' --certificate' if certificate else ''}",
        "certificate": certificate,
        "results": results,
    }
    click.echo(report(found))
    if name:
        click.echo(f"written to {timing.save(name, report(found), found)}")


if __name__ == "__main__":
    work() if sys.argv[1:] == ["--work"] else main(prog_name="python -m benchmarks.convert")
