"""`bertjax embed`."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, BinaryIO

import click
import numpy as np

from bertjax.cli.common import (
    MODEL_HELP,
    Command,
    check_output,
    check_sources,
    hub_options,
    opened_output,
    read_texts,
    report,
)


@click.command(cls=Command, short_help="Turn texts into vectors.")
@click.option("-m", "--model", required=True, metavar="MODEL", help=MODEL_HELP)
@click.option("-o", "--output", type=click.Path(dir_okay=False, path_type=Path), metavar="FILE", help="Where to write "
              "the vectors: .npy (a float32 array, a row a text) or .jsonl (a line a text). Default: JSON lines on "
              "standard output.")  # fmt: skip
@click.option("-f", "--field", metavar="NAME", help="Read JSON lines, and take the text from this field.")
@click.option("-t", "--text", "given", multiple=True, metavar="TEXT", help="A text to embed, instead of a file. "
              "Repeatable.")  # fmt: skip
@click.option("--prompt", metavar="TEXT", help="Put this before every text; it wins over --prompt-name.")
@click.option("--prompt-name", metavar="NAME", help="Put this one of the model's own prompts before every text.")
@click.option("--pooling", multiple=True, metavar="MODE", help="How token vectors become one: cls, max, mean, "
              "mean_sqrt_len_tokens, weightedmean or lasttoken. Needed where the model does not say. Repeatable: the "
              "vectors are concatenated.")  # fmt: skip
@click.option("--normalize", is_flag=True, help="Scale the vectors to unit length.")
@click.option("--truncate-dim", type=click.IntRange(1), metavar="N", help="Keep only the first N numbers.")
@click.option("--max-seq-length", type=click.IntRange(1), metavar="N", help="Cut texts at N tokens, at most as "
              "many as the model has positions. Default: the model's own limit.")  # fmt: skip
@click.option("--dtype", type=click.Choice(["float32", "bfloat16", "float16"]), default="float32", show_default=True,
              help="Precision of the matrix products; sums and vectors are float32.")  # fmt: skip
@click.option("--tokenizer-normalizer", type=click.Choice(["tokenizer.json", "tokenizer_config.json"]), help="Which "
              "file to believe where the two disagree.")  # fmt: skip
@hub_options
@click.argument("files", nargs=-1, type=click.Path(allow_dash=True, path_type=Path))
def embed(
    model: str,
    output: Path | None,
    field: str | None,
    given: tuple[str, ...],
    prompt: str | None,
    prompt_name: str | None,
    pooling: tuple[str, ...],
    normalize: bool,
    truncate_dim: int | None,
    files: tuple[Path, ...],
    **load_options: Any,
) -> None:
    """Turns texts into vectors, one a line of FILES, in order.

    FILES are text files with one text a line (a blank line is an empty text) or, with --field, JSON lines. Without
    FILES or --text, or for the file "-", texts come from standard input. A file named by -o appears whole or not at
    all. JSON lines are arrays of numbers, one a text. The line on standard error at the end counts tokens with
    [CLS] and [SEP]; fill is the share of computed positions that were not padding.

    \b
    bertjax embed -m MODEL texts.txt -o vectors.npy
    bertjax embed -m MODEL --field body articles.jsonl -o vectors.npy
    bertjax embed -m MODEL -t "a text" -t "another"
    cat texts.txt | bertjax embed -m MODEL > vectors.jsonl
    """
    # Everything that can be refused without loading a model is refused first.
    check_sources(files, given, field)
    check_output(output, ".npy", ".jsonl")
    from bertjax.embedder import SentenceEncoder

    encoder = SentenceEncoder.from_pretrained(model, pooling=pooling or None, **load_options)
    windows = encoder.encode_stream(
        iter(given) if given else read_texts(files, field),
        prompt_name=prompt_name,
        prompt=prompt,
        normalize_embeddings=normalize,
        truncate_dim=truncate_dim,
    )
    windows = report(windows, lambda window: len(window.vectors))
    # Written as they come, so that memory does not grow with the number of texts.
    with opened_output(output) as file:
        if output is not None and output.suffix == ".npy":
            _write_npy(file, windows, encoder.output_dimension(truncate_dim))
        else:
            _write_jsonl(file, windows)


def _write_jsonl(file: BinaryIO, windows: Iterable[Any]) -> None:
    for window in windows:
        for vector in window.vectors:
            # By way of str, a float32 is written with the digits that it has and no more.
            file.write(json.dumps([float(str(number)) for number in vector]).encode() + b"\n")


def _write_npy(file: BinaryIO, windows: Iterable[Any], dimension: int) -> None:
    """Writes a .npy file whose number of rows is known only at the end.

    numpy pads the header so that the first axis can grow in place.
    """

    def header(rows: int) -> None:
        file.seek(0)
        fields = {"descr": "<f4", "fortran_order": False, "shape": (rows, dimension)}
        np.lib.format.write_array_header_1_0(file, fields)

    header(0)
    rows = 0
    for window in windows:
        file.write(np.ascontiguousarray(window.vectors, "<f4").data)
        rows += len(window.vectors)
    header(rows)
