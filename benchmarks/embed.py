"""Text to vectors, bertjax beside sentence-transformers: load, first vector, throughput, memory.

    python -m benchmarks.embed MODEL [--texts FILE] [--dtype float32|bfloat16] [--save NAME]

Both libraries embed the same texts in the same run, in processes of their own that take turns (A B A B ...). Their
vectors are compared before anything is timed. Texts are the lines of a file, or else the paragraphs of Python's own
language reference, which everybody has.
"""

import importlib.util
import os
import tempfile
import time
import warnings
from pathlib import Path
from pydoc_data.topics import topics

import click
import numpy as np

from benchmarks import timing

LIBRARIES = ("bertjax", "sentence-transformers")


def load(library: str, model: str, dtype: str):
    """Returns a function from a list of texts to float32 [texts, dim]."""
    if library == "bertjax":
        from bertjax import SentenceEncoder

        encoder = SentenceEncoder.from_pretrained(model, dtype=dtype)
        return lambda texts: encoder.encode(texts, show_progress_bar=False)
    warnings.simplefilter("ignore")
    import torch
    from sentence_transformers import SentenceTransformer

    kwargs = {"dtype": getattr(torch, dtype)}
    reference = SentenceTransformer(model, device="cpu", model_kwargs=kwargs)
    return lambda texts: reference.encode(texts, show_progress_bar=False).astype(np.float32)


def work(library: str, model: str, dtype: str) -> None:
    """A worker: loads at once, then encodes what it is asked to."""
    begin = time.time()
    encode = load(library, model, dtype)
    loaded = time.time()
    encode(["A first text."])
    first = time.time()
    start = {
        "load_s": loaded - begin,
        "first_vector_s": first - float(os.environ["BENCHMARK_STARTED"]),
        "start_memory": timing.peak_memory(),
    }

    def handle(request):
        if "texts" not in request:
            return start
        begin = time.perf_counter()
        vectors = encode(request["texts"])
        seconds = time.perf_counter() - begin
        if "vectors" in request:
            np.save(request["vectors"], vectors)
        return {"seconds": seconds, "memory": timing.peak_memory()}

    timing.answer_requests(handle)


def new_worker(library: str, model: str, dtype: str) -> timing.Worker:
    """Starts a worker, which learns when it was started."""
    os.environ["BENCHMARK_STARTED"] = repr(time.time())
    return timing.Worker("benchmarks.embed", "--work", library, model, "--dtype", dtype)


def measure_starts(model: str, dtype: str, rounds: int) -> dict[str, list[dict]]:
    """Starts each library anew, in turn, and asks for its first vector."""
    starts = {library: [] for library in LIBRARIES}
    for _ in range(rounds):
        for library in LIBRARIES:
            worker = new_worker(library, model, dtype)
            starts[library].append(worker.ask())
            worker.close()
    return starts


def measure_throughput(model: str, dtype: str, texts: list[str], rounds: int, folder: Path) -> dict:
    """Encodes the same texts with each library in turn; the first turn compares vectors and is not counted."""
    workers = {library: new_worker(library, model, dtype) for library in LIBRARIES}
    for library, worker in workers.items():
        worker.ask()
        worker.ask(texts=texts, vectors=str(folder / f"{library}.npy"))
    ours, theirs = (np.load(folder / f"{library}.npy") for library in LIBRARIES)
    cosine = (ours * theirs).sum(1) / np.linalg.norm(ours, axis=1) / np.linalg.norm(theirs, axis=1)
    difference = {"largest_difference": float(np.abs(ours - theirs).max()), "least_cosine": float(cosine.min())}
    turns = {library: [] for library in LIBRARIES}
    for _ in range(rounds):
        for library, worker in workers.items():
            turns[library].append(worker.ask(texts=texts))
    for worker in workers.values():
        worker.close()
    return {"parity": difference, "turns": turns}


def count_tokens(model: str, texts: list[str]) -> int:
    """How many real tokens the texts have, as the model takes them: cut at its limit, special tokens included."""
    from bertjax import SentenceEncoder

    encoder = SentenceEncoder.from_pretrained(model)
    return sum(map(len, encoder.tokenizer(texts, max_length=encoder.max_seq_length).input_ids))


def read_texts(file: Path | None, count: int) -> list[str]:
    """The first distinct texts of at least eight words."""
    if file is None:
        texts = [" ".join(part.split()) for name in sorted(topics) for part in topics[name].split("\n\n")]
    else:
        texts = [line.strip() for line in file.read_text().splitlines()]
    return [text for text in dict.fromkeys(texts) if len(text.split()) >= 8][:count]


def report(found: dict) -> str:
    """What was measured, for a person to read."""
    tokens, texts = found["tokens"], found["texts"]
    rows = [["", *LIBRARIES, "ratio"]]

    def row(name: str, unit: str, values: dict[str, list[float]]) -> None:
        ratios = [ours / theirs for ours, theirs in zip(*(values[library] for library in LIBRARIES), strict=True)]
        cells = [timing.spread(values[library]) for library in LIBRARIES]
        shown = [f"{cell['median']:.2f} ({cell['min']:.2f} to {cell['max']:.2f}) {unit}" for cell in cells]
        rows.append([name, *shown, f"{timing.spread(ratios)['median']:.2f}"])

    def of(measured: dict[str, list[dict]], key: str, convert=lambda value: value) -> dict[str, list[float]]:
        return {library: [convert(each[key]) for each in measured[library]] for library in LIBRARIES}

    row("load", "s", of(found["starts"], "load_s"))
    row("process start to first vector", "s", of(found["starts"], "first_vector_s"))
    row("peak memory, first vector", "GB", of(found["starts"], "start_memory", lambda value: value / 1e9))
    row("texts", "/s", of(found["turns"], "seconds", lambda value: texts / value))
    row("tokens", "/s", of(found["turns"], "seconds", lambda value: tokens / value))
    row("peak memory, whole run", "GB", of(found["turns"], "memory", lambda value: value / 1e9))
    return "\n".join(
        [
            f"# Text to vectors, {found['model']}, {found['dtype']}",
            "",
            timing.describe_machine(found["machine"]),
            "",
            f"`{found['command']}`",
            "",
            f"{texts} texts of {tokens / texts:.0f} tokens on average, from {found['source']}. Medians (least to",
            "largest) of runs that took turns; a ratio is the median of the ratios, turn by turn.",
            "",
            timing.table(rows),
            "",
            f"Before the timing, the vectors differed by at most {found['parity']['largest_difference']:.1e}; "
            f"the least cosine was {found['parity']['least_cosine']:.7f}.",
        ]
    )


@click.command()
@click.argument("model")
@click.option("--texts", "file", type=click.Path(exists=True, dir_okay=False, path_type=Path), help="A text a line.")
@click.option("--source", default="Python's language reference", help="What the texts are, for the report.")
@click.option("--count", default=1000, show_default=True, help="How many texts to embed.")
@click.option("--rounds", default=5, show_default=True, help="How many turns each library gets.")
@click.option("--dtype", type=click.Choice(["float32", "bfloat16"]), default="float32", show_default=True)
@click.option("--save", "name", help="Write the result to benchmarks/results under this name.")
def main(model: str, file: Path | None, source: str, count: int, rounds: int, dtype: str, name: str | None) -> None:
    """Compares bertjax with sentence-transformers on MODEL, a local folder."""
    if importlib.util.find_spec("sentence_transformers") is None:
        raise click.ClickException("sentence-transformers is needed for the comparison: pip install -e '.[bench]'")
    texts = read_texts(file, count)
    with tempfile.TemporaryDirectory() as folder:
        throughput = measure_throughput(model, dtype, texts, rounds, Path(folder))
    found = {
        "machine": timing.machine(),
        "command": f"python -m benchmarks.embed MODEL{f' --texts {file.name}' if file else ''} --count {count} "
        f"--rounds {rounds} --dtype {dtype}",
        "model": Path(model).name if Path(model).name != "model" else Path(model).parent.name,
        "dtype": dtype,
        "source": source,
        "texts": len(texts),
        "tokens": count_tokens(model, texts),
        "starts": measure_starts(model, dtype, rounds),
        **throughput,
    }
    click.echo(report(found))
    if name:
        click.echo(f"written to {timing.save(name, report(found), found)}")


if __name__ == "__main__":
    import sys

    if sys.argv[1:2] == ["--work"]:
        work(sys.argv[2], sys.argv[3], sys.argv[5])
    else:
        main(prog_name="python -m benchmarks.embed")
