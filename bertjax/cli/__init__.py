"""The `bertjax` command."""

import click

from bertjax import __version__
from bertjax.cli.checkpoints import convert, info
from bertjax.cli.export import export
from bertjax.cli.tasks import COMMANDS
from bertjax.cli.train import train
from bertjax.cli.vectors import embed


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, "-V", "--version")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def main(debug: bool) -> None:
    """BERT on JAX: embed texts, use BERT's heads on them, look into checkpoints, convert them.

    \b
    bertjax embed --model sentence-transformers/all-MiniLM-L6-v2 texts.txt > vectors.jsonl
    bertjax fill-mask --model google-bert/bert-base-uncased --text "Paris is the [MASK] of France."
    bertjax info sentence-transformers/all-MiniLM-L6-v2
    bertjax convert old-checkpoint/ new-checkpoint/
    """


for command in (embed, *COMMANDS, info, convert, export, train):
    main.add_command(command)
