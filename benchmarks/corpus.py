"""A corpus from files to files: memory over time, and the rate beside encoding the same texts in memory.

    python -m benchmarks.corpus memory [--rows N] [--save NAME]
    python -m benchmarks.corpus rate MODEL [--texts FILE] [--rows N] [--rounds N] [--dtype DTYPE] [--save NAME]

`memory` makes rows of a few words and a tiny random model, and runs a job over them in a process of its own that looks
at its memory all the time; then it checks that row i is output i and that the counts are exact. `rate` has one process,
in which two things take turns, each first every other time: a job from Parquet to Parquet, which plans and compiles
anew, and `SentenceEncoder.encode` of texts that are in memory, by a model that is loaded and compiled. Vectors are
compared first.
"""

import json
import shutil
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import click
import numpy as np

from benchmarks import timing, workloads

_WORDS = [f"word{index}" for index in range(2000)]
_EVERY_SECONDS = 0.2
# Texts of the part that is not measured.
_FIRST = 500
_COLUMN = "text"


def work() -> None:
    """A worker: runs jobs, or encodes in memory, as it is asked to."""
    state: dict[str, Any] = {}

    def handle(request: dict[str, Any]) -> dict[str, Any]:
        return {"job": run_job, "encode": encode}[request.pop("do")](state, **request)

    timing.answer_requests(handle)


def run_job(
    state: dict[str, Any], inputs: str, out: str, model: str, dtype: str, carried: str | None, shards: list[int] | None
) -> dict[str, Any]:
    """Runs a job into a new folder; says what it counted and took, and how much memory was held when."""
    from bertjax.corpus import Job, SentenceVectors, run

    shutil.rmtree(out, ignore_errors=True)
    seen, done = [], threading.Event()

    def watch() -> None:
        while not done.wait(_EVERY_SECONDS):
            seen.append(timing.memory())

    watcher = threading.Thread(target=watch)
    watcher.start()
    begin = time.perf_counter()
    summary = run(Job(inputs, out, SentenceVectors(model, dtype=dtype), text=_COLUMN, id=carried), shards)
    seconds = time.perf_counter() - begin
    done.set()
    watcher.join()
    return {**summary.to_json(), "seconds": seconds, "load": summary.seconds.get("load", 0.0), "memory": seen}


def encode(state: dict[str, Any], inputs: str, out: str, model: str, dtype: str, rows: int | None) -> dict[str, Any]:
    """Encodes the texts of a Parquet file in memory; the model and the texts are read at the first call."""
    import pyarrow.parquet as pq

    from bertjax import SentenceEncoder

    if not state:
        state["encoder"] = SentenceEncoder.from_pretrained(model, dtype=dtype)
        state["texts"] = pq.read_table(inputs)[_COLUMN].to_pylist()
        state["encoder"].warm_up()
    begin = time.perf_counter()
    vectors = state["encoder"].encode(state["texts"][:rows])
    seconds = time.perf_counter() - begin
    np.save(out, vectors)
    return {"seconds": seconds}


def write_tiny_model(folder: Path) -> Path:
    """A random BERT of two layers of 32, and a vocabulary of whole words."""
    from flax import nnx

    from bertjax import BertConfig, SentenceEncoder, SentenceModel, Tokenizer
    from bertjax.model import BertModel
    from bertjax.sentence_files import SentenceSpec

    vocab = folder / "vocab.txt"
    vocab.write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *_WORDS]) + "\n")
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    config = BertConfig(vocab_size=5 + len(_WORDS), max_position_embeddings=128, **sizes)
    model = SentenceModel(BertModel(config, add_pooling_layer=False, rngs=nnx.Rngs(0)))
    encoder = SentenceEncoder(model, Tokenizer.from_vocab(vocab), SentenceSpec(folder, pooling=("mean",)))
    encoder.save_pretrained(folder / "model")
    return folder / "model"


def write_rows(path: Path, rows: int) -> int:
    """Rows of 0 to 12 words with an id; returns how many tokens they have, [CLS] and [SEP] included."""
    rng, tokens = np.random.default_rng(0), 0
    with open(path, "w") as file:
        for row in range(rows):
            words = rng.integers(0, len(_WORDS), rng.integers(0, 13))
            tokens += 2 + len(words)
            file.write(json.dumps({"id": row, _COLUMN: " ".join(_WORDS[word] for word in words)}) + "\n")
    return tokens


def check_rows(out: Path, inputs: Path, model: Path, rows: int) -> None:
    """Raises `AssertionError` unless ids are 0, 1, ..., and rows taken at random have their own texts' vectors."""
    import pyarrow.parquet as pq

    from bertjax import SentenceEncoder

    table = pq.read_table(out)
    np.testing.assert_array_equal(table["id"].to_numpy(), np.arange(rows))
    chosen = sorted(np.random.default_rng(1).integers(0, rows, 500).tolist())
    with open(inputs) as file:
        lines = dict(enumerate(file))
    texts = [json.loads(lines[row])[_COLUMN] for row in chosen]
    found = np.stack(table["embedding"].take(chosen).to_numpy(zero_copy_only=False))
    np.testing.assert_allclose(found, SentenceEncoder.from_pretrained(model).encode(texts), rtol=0, atol=1e-5)


def tenths(values: list[int]) -> list[int]:
    """The greatest of each tenth of the values."""
    return [max(part) for part in map(list, np.array_split(values, 10)) if part]


@click.group()
def main() -> None:
    """Measures jobs over a corpus."""


@main.command()
@click.option("--rows", default=1_000_000, show_default=True, help="How many rows.")
@click.option("--save", "name", help="Write the result to benchmarks/results under this name.")
def memory(rows: int, name: str | None) -> None:
    """Memory over time, on short rows and a tiny model."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        model, inputs = write_tiny_model(folder), folder / "rows.jsonl"
        tokens = write_rows(inputs, rows)
        worker = timing.Worker("benchmarks.corpus", "--work")
        options = {"inputs": str(inputs), "out": str(folder / "out"), "model": str(model), "dtype": "float32"}
        answer = worker.ask(do="job", **options, carried="id", shards=None)
        worker.close()
        assert (answer["rows"], answer["tokens"], answer["bad"]) == (rows, tokens, 0)
        check_rows(folder / "out", inputs, model, rows)
    found = {"machine": timing.machine(), "command": f"python -m benchmarks.corpus memory --rows {rows}", **answer}
    show(name, report_memory(found), found)


def report_memory(found: dict[str, Any]) -> str:
    """What was measured, for a person to read."""
    seconds = ", ".join(f"{stage} {value:.1f}" for stage, value in found["last_run"]["seconds"].items())
    return "\n".join(
        [
            f"# A job over {found['rows']:,} short rows, a tiny model",
            "",
            timing.describe_machine(found["machine"]),
            "",
            f"`{found['command']}`",
            "",
            f"{found['tokens']:,} tokens, {found['empty']:,} empty texts, {found['fill']:.1%} fill, "
            f"{found['last_run']['compiles']} shapes, {found['shards']} shards; every id in its place, counts exact.",
            "",
            f"{found['rows'] / found['seconds']:,.0f} rows/s. Seconds at work in each stage: {seconds}.",
            "",
            memory_over_time(found["memory"]),
        ]
    )


def memory_over_time(seen: list[int]) -> str:
    """The memory that a job held, in bytes, as a sentence."""
    over_time = ", ".join(f"{value / 1e6:.0f}" for value in tenths(seen))
    return f"Memory of the process, the greatest in each tenth of the job's time, in MB: {over_time}."


@main.command()
@click.argument("model", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--texts", type=click.Path(exists=True, dir_okay=False, path_type=Path), help="A text a line, repeated "
              "as often as it takes. Default: Python's language reference.")  # fmt: skip
@click.option("--rows", default=20_000, show_default=True, help="How many rows.")
@click.option("--rounds", default=3, show_default=True, help="How many turns each gets.")
@click.option("--dtype", type=click.Choice(["float32", "bfloat16"]), default="float32", show_default=True)
@click.option("--save", "name", help="Write the result to benchmarks/results under this name.")
def rate(model: Path, texts: Path | None, rows: int, rounds: int, dtype: str, name: str | None) -> None:
    """The rate from files to files, beside encoding in memory."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        distinct = write_texts(folder / "texts.parquet", texts, rows)
        write_texts(folder / "first.parquet", texts, _FIRST)
        turns = take_turns(folder, model, rounds, dtype)
    command = f"python -m benchmarks.corpus rate MODEL --rows {rows} --rounds {rounds} --dtype {dtype}"
    found = {"machine": timing.machine(), "command": command, "model": timing.model_name(model), "dtype": dtype}
    found |= {"rows": rows, "distinct": distinct, **turns}
    show(name, report_rate(found), found)


def write_texts(path: Path, source: Path | None, rows: int) -> int:
    """Writes texts to a Parquet file; returns how many of them are distinct."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    texts = workloads.read_texts(source, rows)
    pq.write_table(pa.table({_COLUMN: [texts[row % len(texts)] for row in range(rows)]}), path)
    return len(texts)


def take_turns(folder: Path, model: Path, rounds: int, dtype: str) -> dict[str, Any]:
    """Runs a job and encodes in memory in turn, each first every other time; a first part of each is not measured."""
    # One process for both: they share a library, its threads and its allocator, so nothing but what they do differs.
    worker = timing.Worker("benchmarks.corpus", "--work")
    options = {"inputs": str(folder / "texts.parquet"), "model": str(model), "dtype": dtype}
    asked = {
        "job": {"do": "job", "out": str(folder / "out"), "carried": None, "shards": None, **options},
        "encode": {"do": "encode", "out": str(folder / "vectors.npy"), "rows": None, **options},
    }
    worker.ask(**asked["job"] | {"inputs": str(folder / "first.parquet")})
    worker.ask(**asked["encode"] | {"rows": _FIRST})
    turns: dict[str, list[Any]] = {"job": [], "encode": []}
    for number in range(rounds):
        for kind in list(turns)[:: 1 if number % 2 == 0 else -1]:
            turns[kind].append(worker.ask(**asked[kind]))
        if number == 0:
            difference = largest_difference(folder / "out", folder / "vectors.npy")
            assert difference < (1e-5 if dtype == "float32" else 0.1), difference
        click.echo(f"round {number + 1} of {rounds} done", err=True)
    worker.close()
    return {**turns, "difference": difference}


def largest_difference(out: Path, vectors: Path) -> float:
    """The largest difference between the numbers of a job and those of a .npy file."""
    import pyarrow.parquet as pq

    column = pq.read_table(out)["embedding"].combine_chunks()
    return float(np.abs(column.flatten().to_numpy().reshape(len(column), -1) - np.load(vectors)).max())


def report_rate(found: dict[str, Any]) -> str:
    """What was measured, for a person to read."""
    # The encoder is loaded before its turns, so a job's loading is not part of the comparison either.
    jobs = [turn["seconds"] - turn["load"] for turn in found["job"]]
    encoded = [turn["seconds"] for turn in found["encode"]]
    last = found["job"][-1]
    stages = ", ".join(f"{stage} {value:.1f}" for stage, value in last["last_run"]["seconds"].items())
    rows = [["", "s", "rows/s"]]
    for kind, seconds in (("files to files", jobs), ("in memory", encoded)):
        rows.append([kind, timing.shown(seconds), timing.shown([found["rows"] / value for value in seconds])])
    return "\n".join(
        [
            f"# {found['rows']:,} texts from files to files and in memory: {found['model']}, {found['dtype']}",
            "",
            timing.describe_machine(found["machine"]),
            "",
            f"`{found['command']}` ({found['distinct']:,} distinct texts)",
            "",
            "Medians (least to largest) of turns. Vectors differ by at most "
            f"{found['difference']:.1e}. A job loads its model each time, in {last['load']:.2f} s, which is left out.",
            "",
            timing.table(rows),
            "",
            f"Rate of files to files as a part of that in memory: {timing.shown(np.divide(encoded, jobs).tolist())}. "
            f"Fill {last['fill']:.1%}, {last['last_run']['compiles']} shapes. "
            f"Seconds at work in each stage of the last job: {stages}.",
            "",
            memory_over_time(last["memory"]),
        ]
    )


def show(name: str | None, report: str, found: dict[str, Any]) -> None:
    """Prints a result, and writes it if it has a name."""
    click.echo(report)
    if name:
        click.echo(f"written to {timing.save(name, report, found)}")


if __name__ == "__main__":
    work() if sys.argv[1:] == ["--work"] else main(prog_name="python -m benchmarks.corpus")
