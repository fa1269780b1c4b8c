"""What the commands share: options, errors in one line, texts read from files and answers written to them."""

import codecs
import contextlib
import errno
import json
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, BinaryIO

import click
import numpy as np
from click.core import ParameterSource
from tqdm import tqdm

from bertjax.atomic import atomic_file
from bertjax.errors import BertjaxError, InputError, SourceError

#: Exit status of a job that is not done: it was asked to end, or others are still at it. EX_TEMPFAIL of sysexits.h.
NOT_DONE = 75
MODEL_HELP = "A folder with a model's files, or a repository on the Hugging Face Hub."


def hub_options(command: Callable) -> Callable:
    """Adds the options on where a model comes from."""
    for option in (
        click.option("--ignore-field", "ignore", multiple=True, metavar="NAME", help="A field of config.json that "
                     "bertjax does not know and that you know to have no effect. Repeatable."),
        click.option("--offline", "local_files_only", is_flag=True, help="Use the Hub's cache, ask nobody."),
        click.option("--revision", metavar="REV", help="For the Hub: a branch, a tag or a commit."),
    ):  # fmt: skip
        command = option(command)
    return command


def printable(text: str) -> str:
    """A text without what would control the terminal: names of tensors and files may come from anyone."""
    return "".join(each if each.isprintable() or each == "\n" else repr(each)[1:-1] for each in text)


class Command(click.Command):
    """Reports errors in one line, with a traceback only on request."""

    def invoke(self, ctx: click.Context) -> Any:
        """Runs the command."""
        # Ended by a signal, a command still removes its temporary files, which an unhandled signal would leave.
        for number in (signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) is signal.SIG_DFL:
                signal.signal(number, lambda number, _: sys.exit(128 + number))
        try:
            return super().invoke(ctx)
        except (BertjaxError, OSError) as error:
            _drop_unwritten_output()
            # A reader that stops reading, such as `head`, is no error; click ends the process quietly.
            if ctx.find_root().params.get("debug") or getattr(error, "errno", None) == errno.EPIPE:
                raise
            raise click.ClickException(printable(" ".join(str(error).split("\n")))) from None


def _drop_unwritten_output() -> None:
    # Python writes what standard output still holds as the process ends, and if that fails again, it ends with a status
    # of its own (120) and a message that says nothing of the command.
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def refuse_options(*names: str, because: str) -> None:
    """Refuses options of the running command that would have no effect.

    Args:
        names: the parameters, as the command calls them.
        because: when they have one, for the message.
    """
    context = click.get_current_context()
    for parameter in context.command.params:
        if parameter.name in names and context.get_parameter_source(parameter.name) is ParameterSource.COMMANDLINE:
            raise click.UsageError(f"{parameter.opts[-1]} {because}")


def check_sources(files: Sequence[Path], given: Sequence[str], field: str | None = None) -> None:
    """Refuses files that are not there, and a command that was given no texts or two kinds of them."""
    if given and files:
        raise click.UsageError("pass texts with --text, or files, not both")
    if given and field is not None:
        raise click.UsageError("--field applies to files and standard input, not to --text")
    for file in files:
        if str(file) != "-" and not file.exists():
            raise SourceError(f"{file}: no such file; to pass a text itself, use --text")
        if file.is_dir():
            raise SourceError(f"{file}: is a folder, expected a file of texts")
    if not given and not files and (sys.stdin is None or sys.stdin.isatty()):
        raise click.UsageError("no texts: name files, pass --text, or pipe texts in")


def check_output(output: Path | None, *suffixes: str) -> None:
    """Refuses an output file that can't be written, before anything is loaded or computed."""
    if output is not None and output.suffix not in suffixes:
        raise click.UsageError(f"-o {output}: expected a name that ends in {' or '.join(suffixes)}")
    if output is not None and not output.parent.is_dir():
        raise SourceError(f"{output}: can't be written (there is no folder {output.parent})")


def read_texts(files: Sequence[Path], field: str | None = None) -> Iterator[str]:
    """Yields a text for each line of all files in turn or, with `field`, of standard input's or their JSON lines.

    Raises:
        SourceError: a file can't be read.
        InputError: a line is no text; says the file and the line.
    """
    for line, where in _lines(files):
        yield _decode(line, where) if field is None else _field(_record(line, where), field, where)


def read_records(files: Sequence[Path], *fields: str) -> Iterator[tuple[str, ...]]:
    """Yields these fields of each of the JSON lines of all files in turn; for the errors see `read_texts`."""
    for line, where in _lines(files):
        record = _record(line, where)
        yield tuple(_field(record, field, where) for field in fields)


def read_documents(files: Sequence[Path]) -> Iterator[str]:
    """Yields each file, or standard input, as one text; for the errors see `read_texts`."""
    for file in files or (_STANDARD_INPUT,):
        with _open(file) as lines:
            yield _decode(b"".join(lines).removeprefix(codecs.BOM_UTF8), _name(file))


_STANDARD_INPUT = Path("-")


def _name(file: Path) -> str:
    return "standard input" if file == _STANDARD_INPUT else str(file)


def _lines(files: Sequence[Path]) -> Iterator[tuple[bytes, str]]:
    """Yields the lines of all files, or of standard input, and where each is."""
    for file in files or (_STANDARD_INPUT,):
        with _open(file) as lines:
            # Bytes are split at line feeds only; str would split at form feeds and other rare characters as well.
            for number, line in enumerate(lines, start=1):
                if number == 1:
                    line = line.removeprefix(codecs.BOM_UTF8)
                yield line.rstrip(b"\r\n"), f"{_name(file)}:{number}"


def _open(file: Path) -> AbstractContextManager[Iterable[bytes]]:
    if file == _STANDARD_INPUT:
        return contextlib.nullcontext(sys.stdin.buffer)
    try:
        return open(file, "rb")
    except OSError as problem:
        raise SourceError(f"{file}: can't be read ({problem.strerror})") from None


def _decode(data: bytes, where: str) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as problem:
        raise InputError(f"{where}: not UTF-8 text ({problem.reason} at byte {problem.start})") from None


def _record(line: bytes, where: str) -> dict[str, Any]:
    text = _decode(line, where)
    try:
        record = json.loads(text)
    except (ValueError, RecursionError) as problem:
        raise InputError(f"{where}: not a line of JSON ({problem})") from None
    if not isinstance(record, dict):
        raise InputError(f"{where}: {text[:80]} is no JSON object with fields")
    return record


def _field(record: dict[str, Any], field: str, where: str) -> str:
    if field not in record:
        raise InputError(f"{where}: a JSON object with a field {field!r} was expected")
    found = record[field]
    # JSON can spell half of a surrogate pair, which is no text.
    if not isinstance(found, str) or any("\ud800" <= character <= "\udfff" for character in found):
        raise InputError(f"{where}: field {field!r} is {json.dumps(found)[:80]}, expected a text")
    return found


@contextlib.contextmanager
def opened_output(output: Path | None) -> Iterator[BinaryIO]:
    """A file to write to, which appears whole or not at all, or standard output."""
    if output is None:
        yield sys.stdout.buffer
        sys.stdout.buffer.flush()
        return
    with atomic_file(output) as temporary, open(temporary, "r+b") as file:
        yield file


def report(windows: Iterable[Any], count: Callable[[Any], int]) -> Iterator[Any]:
    """Passes windows through; shows progress, and a summary at the end.

    Args:
        windows: each with numbers of tokens and positions, and which or how many texts were truncated.
        count: how many texts a window has.
    """
    texts = tokens = truncated = positions = 0
    with tqdm(unit="text", delay=2.0, disable=None, file=sys.stderr) as bar:
        for window in windows:
            yield window
            bar.update(count(window))
            texts += count(window)
            tokens += window.tokens
            truncated += int(np.sum(window.truncated))
            positions += window.positions
    fill = f"{tokens / positions:.1%} fill" if positions else "no positions"
    click.echo(f"{texts:,} text(s), {tokens:,} tokens, {fill}, {truncated:,} truncated", err=True)


@contextlib.contextmanager
def stopping(doing: str) -> Iterator[threading.Event]:
    """An event that SIGTERM, SIGINT or SIGHUP sets; the second one ends the process.

    Args:
        doing: what is still done after the first, for the message.
    """
    stop = threading.Event()

    def handle(number: int, _: Any) -> None:
        if stop.is_set():
            os._exit(128 + number)  # threads are at work that can't be interrupted
        stop.set()
        # Not by click: what was interrupted may be in the middle of writing to the same stream.
        os.write(2, f"\n{doing}; once more to end at once\n".encode())

    before = {number: signal.signal(number, handle) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
