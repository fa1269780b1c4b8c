"""`bertjax embed`."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, BinaryIO

import click

from bertjax.cli.common import (
    MODEL_HELP,
    Command,
    check_sources,
    hub_options,
    opened_output,
    read_texts,
    refuse_options,
    report,
)
from bertjax.cli.corpus import job_options, runs_as_job


@click.command(cls=Command, short_help="Turn texts into vectors.")
@click.option("-m", "--model", required=True, metavar="MODEL", help=MODEL_HELP)
@click.option("-f", "--field", metavar="NAME", help="The column that holds the text; without --out, a field of JSON "
              "lines. Default with --out: the only column of texts.")  # fmt: skip
@click.option("-t", "--text", "given", multiple=True, metavar="TEXT", help="A text to embed, instead of a file. "
              "Repeatable.")  # fmt: skip
@click.option("--vectors", type=click.Choice(["float32", "float16", "int8", "binary"]), default="float32",
              show_default=True, help="With --out: what vectors are stored as. int8 has 256 steps between the ends "
              "that a sample of the corpus has in each dimension; binary has eight dimensions in a byte.")  # fmt: skip
@click.option("--format", type=click.Choice(["parquet", "npy"]), default="parquet", show_default=True, help="With "
              "--out: what to write, Parquet, or arrays of vectors alone.")  # fmt: skip
@job_options
@click.option("--prompt", metavar="TEXT", help="Put this before every text; it wins over --prompt-name.")
@click.option("--prompt-name", metavar="NAME", help="Put this one of the model's own prompts before every text.")
@click.option("--pooling", multiple=True, metavar="MODE", help="How token vectors become one: cls, max, mean, "
              "mean_sqrt_len_tokens, weightedmean or lasttoken. Needed where the model does not say. Repeatable: the "
              "vectors are concatenated.")  # fmt: skip
@click.option("--normalize", is_flag=True, help="Scale the vectors to unit length.")
@click.option("--truncate-dim", type=click.IntRange(1), metavar="N", help="Keep only the first N numbers.")
@click.option("--max-seq-length", type=click.IntRange(1), metavar="N", help="Cut texts at N tokens, at most as "
              "many as the model has positions. Default: the model's own limit.")  # fmt: skip
@click.option("--dtype", type=click.Choice(["float32", "bfloat16", "float16", "int8"]), default="float32",
              show_default=True, help="Precision of the matrix products; sums and vectors are float32. In int8, "
              "weights are quantised while they are loaded.")  # fmt: skip
@click.option("--tokenizer-normalizer", type=click.Choice(["tokenizer.json", "tokenizer_config.json"]), help="Which "
              "file to believe where the two disagree.")  # fmt: skip
@hub_options
@click.argument("inputs", nargs=-1, type=click.Path(allow_dash=True, path_type=Path))
def embed(
    model: str,
    field: str | None,
    given: tuple[str, ...],
    vectors: str,
    prompt: str | None,
    prompt_name: str | None,
    pooling: tuple[str, ...],
    normalize: bool,
    truncate_dim: int | None,
    inputs: tuple[Path, ...],
    **options: Any,
) -> None:
    """Turns texts into vectors, in order.

    With --out, INPUTS are files, folders and patterns (Parquet, Arrow, Feather, JSON lines, CSV, text; lines also as
    .gz and .zst), and the folder DIR gets a row for each of theirs, in files of --shard-rows rows. A job that ended
    early, however it did, goes on when the same command is given again; several may work on one folder. Ended by
    SIGTERM or Ctrl-C, it finishes the file in hand first, and its exit status is 75; the second time it ends at once.

    Without --out, INPUTS are text files with one text a line (a blank line is an empty text) or, with --field, JSON
    lines; or texts come from --text or standard input. Vectors go to standard output as JSON lines.

    The line on standard error at the end counts tokens with [CLS] and [SEP]; fill is the share of computed positions
    that were not padding.

    \b
    bertjax embed -m MODEL corpus/ --field body --id url --out vectors
    bertjax embed -m MODEL 'articles-*.jsonl.gz' --field text --vectors int8 --out vectors
    bertjax embed -m MODEL texts.txt --format npy --out vectors
    bertjax embed -m MODEL -t "a text" -t "another"
    cat texts.txt | bertjax embed -m MODEL > vectors.jsonl
    """
    settings = {"prompt": prompt, "prompt_name": prompt_name, "normalize_embeddings": normalize}
    settings["truncate_dim"] = truncate_dim

    def work(**options: Any) -> Any:
        from bertjax.corpus import SentenceVectors

        return SentenceVectors(model, vectors=vectors, pooling=pooling or None, **settings, **options)

    if runs_as_job(inputs, field and [field], work, options, only_jobs=["format"]):
        return
    # Everything that can be refused without loading a model is refused first.
    refuse_options("vectors", because="goes with --out")
    check_sources(inputs, given, field)
    from bertjax.embedder import SentenceEncoder

    encoder = SentenceEncoder.from_pretrained(model, pooling=pooling or None, **options)
    windows = encoder.encode_stream(iter(given) if given else read_texts(inputs, field), **settings)
    with opened_output(None) as file:
        _write_jsonl(file, report(windows, lambda window: len(window.vectors)))


def _write_jsonl(file: BinaryIO, windows: Iterable[Any]) -> None:
    for window in windows:
        for vector in window.vectors:
            # By way of str, a float32 is written with the digits that it has and no more.
            file.write(json.dumps([float(str(number)) for number in vector]).encode() + b"\n")
