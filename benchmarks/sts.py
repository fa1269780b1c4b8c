"""STS benchmark: how well cosines of sentence vectors rank human judgements of similarity.

    python -m benchmarks.sts MODEL FILE.csv [--dtype float32|bfloat16|int8]

FILE has sentence1, sentence2, score, a pair a line, without a header (github.com/PhilipMay/stsb-multi-mt has the STS
benchmark so). Prints Spearman's and Pearson's correlation, as MTEB defines them for STS.
"""

import csv
from pathlib import Path

import click
import numpy as np
from scipy import stats

from bertjax import SentenceEncoder


@click.command()
@click.argument("model")
@click.argument("file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option(
    "--dtype", type=click.Choice(["float32", "bfloat16", "float16", "int8"]), default="float32", show_default=True
)
def main(model: str, file: Path, dtype: str) -> None:
    """Scores MODEL on the pairs of FILE."""
    with open(file, newline="", encoding="utf-8") as lines:
        pairs = [(first, second, float(score)) for first, second, score in csv.reader(lines)]
    encoder = SentenceEncoder.from_pretrained(model, dtype=dtype)
    first, second = (encoder.encode([pair[i] for pair in pairs], normalize_embeddings=True) for i in (0, 1))
    cosines = np.sum(first.astype(np.float64) * second, axis=1)
    scores = [pair[2] for pair in pairs]
    spearman, pearson = stats.spearmanr(cosines, scores).statistic, stats.pearsonr(cosines, scores).statistic
    click.echo(f"{len(pairs)} pairs, {dtype}: Spearman {spearman:.4f}, Pearson {pearson:.4f}")


if __name__ == "__main__":
    main(prog_name="python -m benchmarks.sts")
