"""Cold starts: process start to first vector, and loading a BERT-base, beside the torch libraries.

    python -m benchmarks.start MODEL [--rounds 5] [--save NAME]

Every start is a new process; the libraries take turns (A B A B ...), after one turn that is not counted and leaves all
files in the page cache. Memory is the most that the process held beyond what it held when the imports were done and,
for bertjax, the backend was up, as a multiple of the weights' file.
"""

import os
import time
import warnings
from pathlib import Path
from typing import Any

import click
import numpy as np

from benchmarks import timing
from benchmarks.workloads import random_checkpoint

#: What is compared in each measurement: ours, then theirs.
LIBRARIES = {"first vector": ("bertjax", "sentence-transformers"), "load": ("bertjax", "torch")}


def first_vector(library: str, model: str) -> dict[str, Any]:
    """Loads a sentence encoder and embeds one text; times are since the process was started."""
    started = float(os.environ["BENCHMARK_STARTED"])
    if library == "bertjax":
        from bertjax import SentenceEncoder

        loaded = SentenceEncoder.from_pretrained(model)
        loaded_s = time.time() - started
        vector = loaded.encode("A first text.")
    else:
        warnings.simplefilter("ignore")
        from sentence_transformers import SentenceTransformer

        reference = SentenceTransformer(model, device="cpu")
        loaded_s = time.time() - started
        vector = reference.encode("A first text.", show_progress_bar=False)
    first_s = time.time() - started
    return {"loaded_s": loaded_s, "seconds": first_s, "memory": timing.peak_memory(), "result": vector[:8].tolist()}


def load(library: str, model: str) -> dict[str, Any]:
    """Loads an encoder, the library being imported already, and reads each of its parameters once."""
    if library == "bertjax":
        import jax

        from bertjax import BertModel
        from bertjax.model import functional

        jax.devices()
        call = BertModel.from_pretrained
    else:
        warnings.simplefilter("ignore")
        from transformers import BertModel

        call = BertModel.from_pretrained
    before = timing.memory()
    timing.forget_peak()
    begin = time.perf_counter()
    loaded = call(model)
    # Weights that are only mapped are not loaded: each of them is read once, by both.
    arrays = jax.tree.leaves(functional(loaded)[1]) if library == "bertjax" else list(loaded.parameters())
    largest = max(float(np.asarray(each if library == "bertjax" else each.detach()).max()) for each in arrays)
    seconds = time.perf_counter() - begin
    size = sum(file.stat().st_size for file in Path(model).glob("*.safetensors"))
    memory = (timing.peak_memory() - before) / size
    return {"seconds": seconds, "memory": memory, "size": size, "result": [largest]}


def measure(what: str, model: str, rounds: int) -> dict[str, list[dict]]:
    """A new process for every library in every round; the first round is not counted."""
    found = {library: [] for library in LIBRARIES[what]}
    for number in range(rounds + 1):
        for library, turns in found.items():
            started = {"BENCHMARK_STARTED": repr(time.time())}
            worker = timing.Worker("benchmarks.start", "--work", what, library, model, environment=started)
            answer = worker.ask()
            worker.close()
            if number:
                turns.append(answer)
    return found


def agree(what: str, turns: dict[str, list[dict]]) -> None:
    """Raises `ClickException` unless both libraries found the same."""
    ours, theirs = (np.array(turns[library][0]["result"]) for library in LIBRARIES[what])
    if np.abs(ours - theirs).max() > 1e-5:
        raise click.ClickException(f"{what}: the results differ: {ours} and {theirs}")


def rows_of(what: str, turns: dict[str, list[dict]]) -> list[list[str]]:
    """Rows of the table for one measurement: seconds and memory of both libraries and their ratio."""
    ours, theirs = LIBRARIES[what]

    def row(name: str, key: str, unit: str, scale: float = 1.0) -> list[str]:
        values = {library: [turn[key] for turn in turns[library]] for library in (ours, theirs)}
        cells = [f"{timing.shown(values[library], scale)} {unit}" for library in (ours, theirs)]
        if theirs == "torch":  # the column's head names the other one
            cells[1] += f" ({theirs})"
        return [name, *cells, f"{timing.ratios(values[ours], values[theirs])['median']:.2f}"]

    if what == "first vector":
        names = "process start to loaded", "process start to first vector", "peak memory, first vector"
        return [
            row(names[0], "loaded_s", "s"),
            row(names[1], "seconds", "s"),
            row(names[2], "memory", "GB", scale=1e-9),
        ]
    size = turns[ours][0]["size"] / 1e6
    return [row(f"load {size:.0f} MB of float32", "seconds", "s"), row("memory of loading", "memory", "x the file")]


def report(found: dict[str, Any]) -> str:
    """What was measured, for a person to read."""
    rows = [["", "bertjax", "sentence-transformers", "ratio"]]
    for what in LIBRARIES:
        rows += rows_of(what, found[what])
    return "\n".join(
        [
            f"# Cold starts, {found['model']} and a BERT-base with random weights",
            "",
            timing.describe_machine(found["machine"]),
            "",
            f"`{found['command']}`",
            "",
            f"Medians (least to largest) of {found['rounds']} rounds of new processes that took turns; a ratio is the",
            "median of the ratios, round by round. Files are in the page cache.",
            "",
            timing.table(rows),
        ]
    )


@click.command()
@click.argument("model", type=click.Path(exists=True, file_okay=False))
@click.option("--rounds", default=5, show_default=True, help="How many turns each library gets.")
@click.option("--save", "name", help="Write the result to benchmarks/results under this name.")
def main(model: str, rounds: int, name: str | None) -> None:
    """Compares starts of bertjax with sentence-transformers' on MODEL, and loading with transformers'."""
    folders = {"first vector": model, "load": str(random_checkpoint("base"))}
    found: dict[str, Any] = {what: measure(what, folder, rounds) for what, folder in folders.items()}
    for what in folders:
        agree(what, found[what])
    found |= {
        "machine": timing.machine(),
        "command": f"python -m benchmarks.start MODEL --rounds {rounds}",
        "model": timing.model_name(Path(model)),
        "rounds": rounds,
    }
    click.echo(report(found))
    if name:
        click.echo(f"written to {timing.save(name, report(found), found)}")


if __name__ == "__main__":
    import sys

    if sys.argv[1:2] == ["--work"]:
        kind, library, folder = sys.argv[2:]
        # Done at once, not when asked: the clock runs from the process's start.
        answer = {"first vector": first_vector, "load": load}[kind](library, folder)
        timing.answer_requests(lambda _: answer)
    else:
        main(prog_name="python -m benchmarks.start")
