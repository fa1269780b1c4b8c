"""`bertjax export`."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from bertjax.cli.common import Command, hub_options, printable, read_texts
from bertjax.errors import InputError

if TYPE_CHECKING:
    import numpy as np

    from bertjax.embedder import SentenceEncoder


@click.command(cls=Command, short_help="Turn an encoder into a program that needs JAX and nothing else of this.")
@click.argument("model")
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("-l", "--length", "lengths", type=click.IntRange(1), multiple=True, metavar="N", help="Pad rows to N "
              "tokens. Repeatable: each row gets the shortest length that holds it, and texts are cut at the longest. "
              "Default: 32, 64, 128, ... up to the model's own limit.")  # fmt: skip
@click.option("--pooling", multiple=True, metavar="MODE", help="How token vectors become one: cls, max, mean, "
              "mean_sqrt_len_tokens, weightedmean or lasttoken. Needed where the model does not say. Repeatable: the "
              "vectors are concatenated.")  # fmt: skip
@click.option("--truncate-dim", type=click.IntRange(1), metavar="N", help="Keep only the first N numbers.")
@click.option("--normalize", is_flag=True, help="Scale the vectors to unit length.")
@click.option("--precision", type=click.Choice(["float32", "float16", "int8", "binary"]), default="float32",
              show_default=True, help="What the vectors are written as: int8 by the range that each number has in the "
              "texts of --calibration, binary as packed bits, a number's sign each.")  # fmt: skip
@click.option("--calibration", type=click.Path(exists=True, dir_okay=False, path_type=Path), metavar="FILE",
              help="For int8: a few thousand texts like those to come, one a line.")  # fmt: skip
@click.option("--dtype", type=click.Choice(["float32", "bfloat16", "float16", "int8"]), default="float32",
              show_default=True, help="Precision of the weights and the matrix products.")  # fmt: skip
@click.option("--tokenizer-normalizer", type=click.Choice(["tokenizer.json", "tokenizer_config.json"]), help="Which "
              "file to believe where the two disagree.")  # fmt: skip
@hub_options
def export(
    model: str,
    folder: Path,
    lengths: tuple[int, ...],
    pooling: tuple[str, ...],
    truncate_dim: int | None,
    normalize: bool,
    precision: str,
    calibration: Path | None,
    **load_options: Any,
) -> None:
    """Writes the encoder MODEL to FOLDER as a program that runs with JAX, without Flax and without bertjax.

    MODEL is a folder, or a repository on the Hub. FOLDER must not exist yet, and appears whole or not at all. It gets
    the program (encoder.jax_export: from token ids to vectors, for any batch, on CPU, CUDA and TPU),
    weights.safetensors, tokenizer.json, config.json, and load.py, which runs them and can be read in a minute. JAX
    promises to run the program with releases up to six months newer than the one that exported it.

    \b
    bertjax export sentence-transformers/all-MiniLM-L6-v2 minilm/
    bertjax export MODEL out/ --length 64 --length 256 --dtype bfloat16 --precision float16
    bertjax export MODEL out/ --truncate-dim 128 --normalize --precision int8 --calibration texts.txt
    cd out && python -c "from load import Encoder; print(Encoder().encode(['a text']))"
    """
    if (calibration is not None) != (precision == "int8"):
        raise click.UsageError("--precision int8 needs --calibration FILE, and nothing else does")
    from bertjax.embedder import SentenceEncoder
    from bertjax.export import export_folder, write_export

    options = {"truncate_dim": truncate_dim, "normalize": normalize}
    with export_folder(folder) as temporary:
        longest = max(lengths, default=None)
        encoder = SentenceEncoder.from_pretrained(
            model, pooling=pooling or None, max_seq_length=longest, **load_options
        )
        ranges = None if calibration is None else _ranges(encoder, calibration, **options)
        config = write_export(
            encoder, temporary, lengths=lengths or None, precision=precision, ranges=ranges, **options
        )
    click.echo(printable(_summary(folder, config)))


def _ranges(encoder: "SentenceEncoder", texts: Path, *, truncate_dim: int | None, normalize: bool) -> "np.ndarray":
    from bertjax.quantization import calibrate

    ranges = None
    windows = encoder.encode_stream(read_texts([texts]), truncate_dim=truncate_dim, normalize_embeddings=normalize)
    for window in windows:
        ranges = calibrate(window.vectors, ranges)
    if ranges is None:
        raise InputError(f"{texts}: there is no text in it, so that there is nothing to calibrate by")
    return ranges


def _summary(folder: Path, config: dict[str, Any]) -> str:
    width = f"{config['output_dtype']}[{config['output_width']}]"
    bits = f", {config['dimension']} bits packed" if config["precision"] == "binary" else ""
    sizes = [
        f"{name} {(folder / name).stat().st_size:,} bytes" for name in ("encoder.jax_export", "weights.safetensors")
    ]
    return "\n".join(
        [
            f"vectors  {width}{bits}, computed in {config['compute_dtype']}",
            f"lengths  {', '.join(map(str, config['lengths']))} tokens; longer texts lose their end",
            f"written  {folder}: {', '.join(sizes)}",
            f"runs on  {', '.join(config['platforms'])}; jax {config['versions']['jax']} or up to six months newer",
        ]
    )
