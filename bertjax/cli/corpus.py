"""Jobs over a corpus: the options, signals, and what is said at the end."""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import click

#: Exit status of a job that was asked to end and did; run again, it goes on. It is EX_TEMPFAIL of sysexits.h.
STOPPED = 75

#: The parameters that only a job has, apart from `out`.
JOB_OPTIONS = ("id", "keep", "format", "shard_rows", "on_bad", "engine")


def job_options(command: Callable) -> Callable:
    """Adds the options of a job over files."""
    for option in (
        click.option("--engine", type=click.Choice(["local", "ray"]), default="local", show_default=True, help="What "
                     "to run on: all devices of this machine, or actors of Ray: on the cluster that RAY_ADDRESS or "
                     "this machine belongs to, or else on one that is started here."),
        click.option("--on-bad", type=click.Choice(["stop", "skip"]), default="stop", show_default=True, help="What to "
                     "do with a row that has no text, is no UTF-8 or can't be parsed: stop, or leave its results null "
                     "and say why in DIR/_bad."),
        click.option("--shard-rows", type=click.IntRange(1), default=16384, show_default=True, metavar="N",
                     help="Rows of one file of the output."),
        click.option("--format", type=click.Choice(["parquet", "npy"]), default="parquet", show_default=True,
                     help="What to write: Parquet, or arrays of vectors alone."),
        click.option("--keep", multiple=True, metavar="COLUMN", help="Carry this column to the output. Repeatable."),
        click.option("--id", metavar="COLUMN", help="Carry this column to the output, in the place of row numbers."),
        click.option("--out", type=click.Path(file_okay=False, path_type=Path), metavar="DIR", help="Write to "
                     "this folder, as a job that can be resumed."),
    ):  # fmt: skip
        command = option(command)
    return command


def run_job(
    inputs: Sequence[Path],
    out: Path,
    field: str | None,
    work: Callable[[], Any],
    *,
    id: str | None,
    engine: str,
    **options: Any,
) -> None:
    """Runs a job to its end, or until a signal; says on standard error what it did.

    Args:
        inputs: files, folders and patterns.
        out: the folder to make.
        field: the column that holds the text, or None for the only one.
        work: makes the `bertjax.corpus.work.Work`.
        id: the column that takes the place of the row number.
        engine: "local" or "ray".
        **options: of `bertjax.corpus.Job`.
    """
    if not inputs or "-" in map(str, inputs):
        raise click.UsageError("--out takes files, folders or patterns, not standard input, which can't be resumed")
    from bertjax.corpus import Job, run

    if engine == "ray":
        from bertjax.corpus.on_ray import run_on_ray as run

    job = Job(tuple(map(str, inputs)), str(out), work(), text=field and (field,), id=id, **options)
    with _stopping() as stop:
        summary = run(job, stop=stop, show_progress_bar=None)
    _report(summary, out)
    if stop.is_set() and not summary.is_done:
        click.echo(f"stopped after {summary.shards} of {summary.num_shards} shards; the same command goes on", err=True)
        sys.exit(STOPPED)


def _report(summary: Any, out: Path) -> None:
    counts, seconds = summary.counts, summary.seconds
    stages = ", ".join(f"{name} {seconds[name]:.1f}" for name in seconds if name != "total")
    rate = f", {summary.rows_now / seconds['total']:,.0f} rows/s" if summary.rows_now else ""
    click.echo(
        f"{counts.rows:,} row(s), {counts.tokens:,} tokens, {counts.fill:.1%} fill, {counts.truncated:,} truncated, "
        f"{counts.empty:,} empty, {counts.bad:,} bad; in {seconds['total']:.1f} s ({stages}){rate}, "
        f"{summary.compiles} shapes compiled",
        err=True,
    )
    if not summary.is_done:
        left = summary.num_shards - summary.shards
        click.echo(f"{out}: {left} of {summary.num_shards} shards are not there yet", err=True)


@contextlib.contextmanager
def _stopping() -> Iterator[threading.Event]:
    """An event that SIGTERM, SIGINT or SIGHUP sets; the second one ends the process."""
    stop = threading.Event()

    def handle(number: int, _: Any) -> None:
        if stop.is_set():
            os._exit(128 + number)  # threads are at work that can't be interrupted
        stop.set()
        # Not by click: what was interrupted may be in the middle of writing to the same stream.
        os.write(2, b"\nfinishing the shard in hand; once more to end at once\n")

    before = {number: signal.signal(number, handle) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
