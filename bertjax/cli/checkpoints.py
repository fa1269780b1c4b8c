"""`bertjax info` and `bertjax convert`."""

import sys
from pathlib import Path
from typing import Any

import click

from bertjax.cli.common import Command, hub_options, printable, refuse_options

# Everything that takes a while to import (jax, flax) is imported by the command that needs it, so that --help and
# mistyped options answer at once.

_prefix_option = click.option("--prefix", metavar="NAME", help="What stands before the encoder's tensor names, for a "
                              "file that holds several encoders.")  # fmt: skip


@click.command(cls=Command, short_help="Show what a model is.")
@click.argument("model")
@click.option("--parameters", "list_parameters", is_flag=True, help="List every parameter with its shape.")
@_prefix_option
@hub_options
def info(model: str, **options: Any) -> None:
    """Shows what MODEL is: its sizes, its parameters, how it makes sentence vectors."""
    from bertjax.reports import describe

    click.echo(printable(describe(model, **options)))


@click.command(cls=Command, short_help="Turn a checkpoint of any format into another, with proof.")
@click.argument("source")
@click.argument("target", type=click.Path(path_type=Path), required=False)
@click.option("--to", type=click.Choice(["safetensors", "msgpack", "orbax"]), default="safetensors", show_default=True,
              help="What to write: safetensors for transformers, msgpack for FlaxBert, or an Orbax checkpoint of "
              "bertjax's parameter tree.")  # fmt: skip
@click.option("--dtype", type=click.Choice(["float32", "bfloat16", "float16"]), help="Cast the weights. Default: keep "
              "every tensor's own dtype, and its bytes.")  # fmt: skip
@click.option("--max-shard-size", metavar="SIZE", help="Divide safetensors into files of at most this size, such as "
              "5GB. Default: as SOURCE is divided, if its names are kept, or one file.")  # fmt: skip
@click.option("--standard-names", is_flag=True, help="Write the tensor names that transformers itself writes, without "
              "repetitions and buffers. Default: the names of SOURCE.")  # fmt: skip
@click.option("--untie", is_flag=True, help="Keep a decoder that differs from the word embeddings, though the config "
              "ties the two.")  # fmt: skip
@_prefix_option
@click.option("--certificate", "certify", type=click.Path(dir_okay=False, path_type=Path), metavar="FILE",
              help="Read what was written again, and write an account of every tensor to FILE.")  # fmt: skip
@click.option("--check", type=click.Path(exists=True, dir_okay=False, path_type=Path), metavar="FILE", help="Convert "
              "nothing: compare a folder, in the place of SOURCE, with the certificate of its conversion.")  # fmt: skip
@click.option("--force", is_flag=True, help="Replace TARGET if it is a model's folder.")
@hub_options
def convert(source: str, target: Path | None, check: Path | None, **options: Any) -> None:
    """Reads the checkpoint SOURCE, checks it, writes it to the folder TARGET, and says what became of every tensor.

    SOURCE is a folder, a file of weights in it, the prefix of a TensorFlow checkpoint, or a repository on the Hub. It
    may hold safetensors, PyTorch pickles (.bin), FlaxBert's msgpack, a TensorFlow 1 or an Orbax checkpoint. No code in
    it is ever run. Names, dtypes and numbers of all tensors are kept; the tokenizer and the sentence-transformers
    modules are copied, Dense weights as safetensors. TARGET appears whole or not at all.

    \b
    bertjax convert old-checkpoint/ new-checkpoint/
    bertjax convert uncased_L-12_H-768_A-12/bert_model.ckpt bert-base/
    bertjax convert model/ flax/ --to msgpack --certificate flax.json
    bertjax convert --check flax.json flax/
    """
    if check is not None:
        if target is not None:
            raise click.UsageError("--check takes one folder, the one that was converted to")
        refuse_options(*options, because="does not go with --check, which goes with no other option")
        from bertjax.convert import certificate

        click.echo(certificate.check(check, Path(source)))
        return
    if target is None:
        raise click.UsageError("missing argument TARGET, the folder to make")
    from bertjax.conversion import convert_checkpoint

    conversion = convert_checkpoint(source, target, progress=sys.stderr.isatty(), **options)
    click.echo(printable(conversion.summary()))
    if options["certify"] is not None:
        click.echo(f"certificate {options['certify']}")
