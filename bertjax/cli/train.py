"""`bertjax train`: a run of training as a file of settings says."""

import contextlib
import logging
import sys
from collections.abc import Iterator
from pathlib import Path

import click

from bertjax.cli.common import NOT_DONE, Command, stopping


@click.command(cls=Command)
@click.argument("config", required=False, type=click.Path(dir_okay=False, path_type=Path))
@click.option("--options", "show_options", is_flag=True, help="Show every option of CONFIG with its default, and end.")
def train(config: Path | None, show_options: bool) -> None:
    """Train a model as CONFIG says, a TOML file, or go on with a run that was ended.

    \b
    [model]
    name = "google-bert/bert-base-uncased"
    [task]
    kind = "token-classification"
    [data]
    train = ["train.conll"]
    eval = ["dev.conll"]
    [run]
    output = "runs/entities"
    [optimizer]
    learning_rate = 5e-5

    The same command goes on where the last checkpoint is, to the parameters that a run without an end would have had.
    SIGTERM and Ctrl-C finish the step in hand and write a checkpoint; the exit status is 75 then. The model is in
    OUTPUT/model, for PyTorch, too.
    """
    if show_options:
        from bertjax.training.settings import documentation

        click.echo(documentation(), nl=False)
        return
    if config is None:
        raise click.UsageError("name a file of settings, or pass --options to see what it may say")
    from bertjax.training.settings import read_settings
    from bertjax.training.setup import trainer_of

    settings = read_settings(config)
    with _speaking(), stopping("finishing the step in hand") as stop:
        report = trainer_of(settings).run(stop)
    steps = f"{report.steps} of {report.total_steps} steps"
    if not report.is_done:
        click.echo(f"{settings.run.output}: stopped after {steps}; the same command goes on", err=True)
        sys.exit(NOT_DONE)
    found = "".join(f"; {name} {value:.4f}" for name, value in report.metrics.items())
    click.echo(f"{report.model}: the state after {report.step_saved} of {report.total_steps} steps{found}")


@contextlib.contextmanager
def _speaking() -> Iterator[None]:
    """Shows what a run logs of itself on standard error, with the time: where that is no terminal, there is no bar."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%Y-%m-%d %H:%M:%S"))
    logger = logging.getLogger("bertjax.training")
    before = logger.level, logger.handlers, logger.propagate
    # Libraries that a run uses have handlers of their own for whatever is logged, and would say it all again.
    logger.setLevel(logging.INFO)
    logger.handlers, logger.propagate = [handler], False
    try:
        yield
    finally:
        logger.setLevel(before[0])
        logger.handlers, logger.propagate = before[1:]
