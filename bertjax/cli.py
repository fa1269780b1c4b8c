"""The `bertjax` command."""

import codecs
import contextlib
import errno
import json
import signal
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import click
import numpy as np
from click.core import ParameterSource
from tqdm import tqdm

from bertjax import __version__
from bertjax.atomic import atomic_file
from bertjax.errors import BertjaxError, InputError, SourceError

# Everything that takes a while to import (jax, flax) is imported by the command that needs it, so that --help and
# mistyped options answer at once.

_MODEL_HELP = "A folder with a model's files, or a repository on the Hugging Face Hub."


def _hub_options(command: Callable) -> Callable:
    for option in (
        click.option("--ignore-field", "ignore", multiple=True, metavar="NAME", help="A field of config.json that "
                     "bertjax does not know and that you know to have no effect. Repeatable."),
        click.option("--offline", "local_files_only", is_flag=True, help="Use the Hub's cache, ask nobody."),
        click.option("--revision", metavar="REV", help="For the Hub: a branch, a tag or a commit."),
    ):  # fmt: skip
        command = option(command)
    return command


_prefix_option = click.option("--prefix", metavar="NAME", help="What stands before the encoder's tensor names, for a "
                              "file that holds several encoders.")  # fmt: skip


def _printable(text: str) -> str:
    """A text without what would control the terminal: names of tensors and files may come from anyone."""
    return "".join(each if each.isprintable() or each == "\n" else repr(each)[1:-1] for each in text)


class _Command(click.Command):
    """Reports errors in one line, with a traceback only on request."""

    def invoke(self, ctx: click.Context) -> Any:
        # Ended by a signal, a command still removes its temporary files, which an unhandled signal would leave.
        for number in (signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) is signal.SIG_DFL:
                signal.signal(number, lambda number, _: sys.exit(128 + number))
        try:
            return super().invoke(ctx)
        except (BertjaxError, OSError) as error:
            # A reader that stops reading, such as `head`, is no error; click ends the process quietly.
            if ctx.find_root().params.get("debug") or getattr(error, "errno", None) == errno.EPIPE:
                raise
            raise click.ClickException(_printable(" ".join(str(error).split("\n")))) from None


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, "-V", "--version")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def main(debug: bool) -> None:
    """BERT on JAX: embed texts, look into checkpoints, convert them.

    \b
    bertjax embed --model sentence-transformers/all-MiniLM-L6-v2 texts.txt -o vectors.npy
    bertjax info sentence-transformers/all-MiniLM-L6-v2
    bertjax convert old-checkpoint/ new-checkpoint/
    """


@main.command(cls=_Command, short_help="Turn texts into vectors.")
@click.option("-m", "--model", required=True, metavar="MODEL", help=_MODEL_HELP)
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
@_hub_options
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
    if given and files:
        raise click.UsageError("pass texts with --text, or files, not both")
    if given and field is not None:
        raise click.UsageError("--field applies to files and standard input, not to --text")
    if output is not None and output.suffix not in (".npy", ".jsonl"):
        raise click.UsageError(f"-o {output}: expected a name that ends in .npy or .jsonl")
    if output is not None and not output.parent.is_dir():
        raise SourceError(f"{output}: can't be written (there is no folder {output.parent})")
    for file in files:
        if str(file) != "-" and not file.exists():
            raise SourceError(f"{file}: no such file; to embed a text given here, use --text")
        if file.is_dir():
            raise SourceError(f"{file}: is a folder, expected a file of texts")
    if not given and not files and (sys.stdin is None or sys.stdin.isatty()):
        raise click.UsageError("no texts: name files, pass --text, or pipe texts in")
    from bertjax.embedder import SentenceEncoder

    encoder = SentenceEncoder.from_pretrained(model, pooling=pooling or None, **load_options)
    windows = encoder.encode_windows(
        iter(given) if given else _read_texts(files or (Path("-"),), field),
        prompt_name=prompt_name,
        prompt=prompt,
        normalize_embeddings=normalize,
        truncate_dim=truncate_dim,
    )
    _write_vectors(_report(windows), encoder.output_dimension(truncate_dim), output)


@main.command(cls=_Command, short_help="Show what a model is.")
@click.argument("model")
@click.option("--parameters", "list_parameters", is_flag=True, help="List every parameter with its shape.")
@_prefix_option
@_hub_options
def info(model: str, **options: Any) -> None:
    """Shows what MODEL is: its sizes, its parameters, how it makes sentence vectors."""
    from bertjax.reports import describe

    click.echo(_printable(describe(model, **options)))


@main.command(cls=_Command, short_help="Turn a checkpoint of any format into another, with proof.")
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
@_hub_options
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
        given = click.get_current_context().get_parameter_source
        if any(given(name) is ParameterSource.COMMANDLINE for name in options):
            raise click.UsageError("--check goes with no other option")
        from bertjax.convert import certificate

        click.echo(certificate.check(check, Path(source)))
        return
    if target is None:
        raise click.UsageError("missing argument TARGET, the folder to make")
    from bertjax.conversion import convert_checkpoint

    conversion = convert_checkpoint(source, target, progress=sys.stderr.isatty(), **options)
    click.echo(_printable(conversion.summary()))
    if options["certify"] is not None:
        click.echo(f"certificate {options['certify']}")


def _read_texts(files: Iterable[Path], field: str | None) -> Iterator[str]:
    """Yields the texts of all files in turn; says the file and line of what can't be read."""
    for file in files:
        name = "standard input" if str(file) == "-" else str(file)
        with _open(file) as lines:
            # Bytes are split at line feeds only; str would split at form feeds and other rare characters as well.
            for number, line in enumerate(lines, start=1):
                if number == 1:
                    line = line.removeprefix(codecs.BOM_UTF8)
                yield _text(line.rstrip(b"\r\n"), field, f"{name}:{number}")


def _open(file: Path) -> AbstractContextManager[Iterable[bytes]]:
    if str(file) == "-":
        return contextlib.nullcontext(sys.stdin.buffer)
    try:
        return open(file, "rb")
    except OSError as problem:
        raise SourceError(f"{file}: can't be read ({problem.strerror})") from None


def _text(line: bytes, field: str | None, where: str) -> str:
    """The text of one line of input."""
    try:
        text = line.decode()
        if field is None:
            return text
        record = json.loads(text)
    except UnicodeDecodeError as problem:
        raise InputError(f"{where}: not UTF-8 text ({problem.reason} at byte {problem.start} of the line)") from None
    except (ValueError, RecursionError) as problem:
        raise InputError(f"{where}: not a line of JSON ({problem})") from None
    if not isinstance(record, dict) or field not in record:
        raise InputError(f"{where}: a JSON object with a field {field!r} was expected")
    found = record[field]
    # JSON can spell half of a surrogate pair, which is no text.
    if not isinstance(found, str) or any("\ud800" <= character <= "\udfff" for character in found):
        raise InputError(f"{where}: field {field!r} is {json.dumps(found)[:80]}, expected a text")
    return found


def _write_vectors(windows: Iterator[Any], dimension: int, output: Path | None) -> None:
    """Writes vectors as they come, so that memory does not grow with the number of texts."""
    if output is None:
        _write_jsonl(sys.stdout.buffer, windows)
        return
    with atomic_file(output) as temporary, open(temporary, "r+b") as file:
        if output.suffix == ".npy":
            _write_npy(file, windows, dimension)
        else:
            _write_jsonl(file, windows)


def _write_jsonl(file: Any, windows: Iterable[Any]) -> None:
    for window in windows:
        for vector in window.vectors:
            # By way of str, a float32 is written with the digits that it has and no more.
            file.write(json.dumps([float(str(number)) for number in vector]).encode() + b"\n")
    file.flush()


def _write_npy(file: Any, windows: Iterable[Any], dimension: int) -> None:
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


def _report(windows: Iterable[Any]) -> Iterator[Any]:
    """Passes windows through; shows progress, and a summary at the end."""
    texts = tokens = truncated = positions = 0
    with tqdm(unit="text", delay=2.0, disable=None, file=sys.stderr) as bar:
        for window in windows:
            yield window
            bar.update(len(window.vectors))
            texts += len(window.vectors)
            tokens += window.tokens
            truncated += int(window.truncated.sum())
            positions += window.positions
    fill = f"{tokens / positions:.1%} fill" if positions else "no positions"
    click.echo(f"{texts:,} text(s), {tokens:,} tokens, {fill}, {truncated:,} truncated", err=True)
