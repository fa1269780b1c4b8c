"""Jobs over a corpus: the options, signals, and what is said at the end."""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click

from bertjax.cli.common import NOT_DONE, refuse_options, stopping

_JOB_OPTIONS = ("id", "keep", "shard_rows", "on_bad", "engine")


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
        click.option("--keep", multiple=True, metavar="COLUMN", help="Carry this column to the output. Repeatable."),
        click.option("--id", metavar="COLUMN", help="Carry this column to the output, in the place of row numbers."),
        click.option("--out", type=click.Path(file_okay=False, path_type=Path), metavar="DIR", help="Write "
                     "to this folder, as a job from files to files that can be resumed."),
    ):  # fmt: skip
        command = option(command)
    return command


def runs_as_job(
    inputs: Sequence[Path],
    text: Sequence[str] | None,
    work: Callable[..., Any],
    options: dict[str, Any],
    only_jobs: Sequence[str] = (),
) -> bool:
    """Runs a command as a job, if it has --out, and says whether it did.

    Args:
        inputs: files, folders and patterns.
        text: the columns that hold the text, or None for the only one.
        work: makes the `bertjax.corpus.work.Work`, of what is left of the options.
        options: those of the command; the ones of jobs are taken out.
        only_jobs: more options of `bertjax.corpus.Job`, which only this command has.
    """
    job = {name: options.pop(name) for name in (*_JOB_OPTIONS, *only_jobs)}
    out = options.pop("out")
    if out is None:
        refuse_options(*_JOB_OPTIONS, *only_jobs, because="goes with --out")
        return False
    refuse_options("given", "output", because="does not go with --out, which goes from files to a folder")
    _run_job(inputs, out, text, lambda: work(**options), **job)
    return True


def _run_job(
    inputs: Sequence[Path],
    out: Path,
    text: Sequence[str] | None,
    work: Callable[[], Any],
    *,
    engine: str,
    **options: Any,
) -> None:
    """Runs a job to its end, or until a signal; says on standard error what it did."""
    if not inputs or "-" in map(str, inputs):
        raise click.UsageError("--out takes files, folders or patterns, not standard input, which can't be resumed")
    from bertjax.corpus import Job, run

    if engine == "ray":
        from bertjax.corpus.on_ray import run_on_ray as run

    job = Job(tuple(map(str, inputs)), str(out), work(), text=text and tuple(text), **options)
    with stopping("finishing the shard in hand") as stop:
        summary = run(job, stop=stop, show_progress_bar=None)
    _report(summary, out)
    if not summary.is_done:
        if stop.is_set():
            what = f"stopped after {summary.shards} of {summary.num_shards} shards; the same command goes on"
        else:
            what = f"others are at work on {summary.num_shards - summary.shards} of {summary.num_shards} shards"
        click.echo(f"{out}: {what}", err=True)
        sys.exit(NOT_DONE)


def _report(summary: Any, out: Path) -> None:
    counts, seconds = summary.counts, summary.seconds
    stages = ", ".join(f"{name} {seconds[name]:.1f}" for name in seconds if name != "total")
    rate = f", {summary.rows_now / seconds['total']:,.0f} rows/s" if summary.rows_now else ""
    click.echo(
        f"{counts.rows:,} row(s), {counts.tokens:,} tokens, {counts.fill:.1%} fill, {counts.truncated:,} truncated, "
        f"{counts.empty:,} empty, {counts.bad:,} bad; in {seconds['total']:.1f} s ({stages}){rate}, "
        f"{summary.compiles} shape(s) compiled",
        err=True,
    )
