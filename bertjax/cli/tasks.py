"""`bertjax fill-mask`, `classify`, `tag`, `answer`, `rank`, `next-sentence` and `sparse`: a line in, an answer out."""

import dataclasses
import itertools
import json
from collections.abc import Callable, Iterable
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
    read_documents,
    read_records,
    read_texts,
    refuse_options,
    report,
)
from bertjax.cli.corpus import job_options, runs_as_job

_FILES = click.argument("files", nargs=-1, type=click.Path(allow_dash=True, path_type=Path))
_COLUMN = click.option("-f", "--field", metavar="NAME", help="The column that holds the text; without --out, a field "
                       "of JSON lines. Default with --out: the only column of texts.")  # fmt: skip
_FIELD = click.option("-f", "--field", metavar="NAME", help="Read JSON lines, and take the text from this field.")
_TEXT = click.option("-t", "--text", "given", multiple=True, metavar="TEXT", help="A text, instead of a file. "
                     "Repeatable.")  # fmt: skip

_MAX_LENGTH = click.option("--max-length", type=click.IntRange(1), metavar="N", help="The most tokens that are read "
                           "together. Default: the model's own limit.")  # fmt: skip


def _task_options(command: Callable) -> Callable:
    """Adds the options that every task has."""
    for option in (
        hub_options,
        click.option("--tokenizer-normalizer", type=click.Choice(["tokenizer.json", "tokenizer_config.json"]),
                     help="Which file to believe where the two disagree."),
        click.option("--dtype", type=click.Choice(["float32", "bfloat16", "float16", "int8"]), default="float32",
                     show_default=True, help="Precision of the matrix products; sums and scores are float32. In int8, "
                     "weights are quantised while they are loaded."),
        click.option("-o", "--output", type=click.Path(dir_okay=False, path_type=Path), metavar="FILE",
                     help="A .jsonl file to write; it appears whole or not at all. Default: standard output."),
        click.option("-m", "--model", required=True, metavar="MODEL", help=MODEL_HELP),
    ):  # fmt: skip
        command = option(command)
    return command


def _run(
    task: Any,
    inputs: Iterable[Any],
    output: Path | None,
    options: dict[str, Any] | None = None,
    as_json: Callable[[Any], Any] = lambda answer: answer,
) -> None:
    """Answers inputs as they come, a JSON line each, so that memory does not grow with their number."""
    windows = report(task.stream(inputs, **options or {}), lambda window: len(window.answers))
    with opened_output(output) as file:
        for window in windows:
            for answer in window.answers:
                _write(file, as_json(answer))


def _columns(*names: str | None) -> list[str] | None:
    """The columns that are named, or None."""
    return [name for name in names if name is not None] or None


def _write(file: BinaryIO, answer: Any) -> None:
    line = json.dumps(answer, default=dataclasses.asdict, ensure_ascii=False)
    file.write(line.encode() + b"\n")


@click.command("fill-mask", cls=Command, short_help="Guess the words behind [MASK].")
@_task_options
@_MAX_LENGTH
@_FIELD
@_TEXT
@click.option("--top-k", type=click.IntRange(1), default=5, show_default=True, metavar="N", help="How many words.")
@click.option("--target", "targets", multiple=True, metavar="WORD", help="Choose among these words only. Repeatable.")
@_FILES
def fill_mask(
    model: str, output: Path | None, field: str | None, given: tuple[str, ...], files: tuple[Path, ...],
    top_k: int, targets: tuple[str, ...], **load_options: Any,
) -> None:  # fmt: skip
    """Guesses the words behind the mask token, one text a line of FILES, in order.

    The answer to a text is a JSON line: the likeliest words, or a list of them for each of several masks.

    \b
    bertjax fill-mask -m google-bert/bert-base-uncased -t "Paris is the [MASK] of France."
    """
    check_sources(files, given, field)
    check_output(output, ".jsonl")
    from bertjax.tasks.fill_mask import FillMask

    task = FillMask.from_pretrained(model, **load_options)
    texts = given or read_texts(files, field)
    _run(task, texts, output, {"top_k": top_k, "targets": targets or None})


@click.command(cls=Command, short_help="Label texts, or pairs of texts.")
@_task_options
@_MAX_LENGTH
@_COLUMN
@click.option("--pair-field", metavar="NAME", help="With --field: the second text of a pair.")
@_TEXT
@click.option("--top-k", type=click.IntRange(0), default=1, show_default=True, metavar="N", help="How many labels, "
              "the likeliest first; 0 gives all.")  # fmt: skip
@click.option("--function-to-apply", type=click.Choice(["softmax", "sigmoid", "none"]), help="How scores are made of "
              "logits. Default: as the model's configuration implies.")  # fmt: skip
@click.option("-l", "--candidate-label", "candidate_labels", multiple=True, metavar="LABEL", help="Choose among these "
              "labels, through a model of natural-language inference (zero-shot). Repeatable.")  # fmt: skip
@click.option("--hypothesis-template", default="This example is {}.", show_default=True, metavar="TEXT",
              help="With --candidate-label: what is claimed of a text, with {} for the label.")  # fmt: skip
@click.option("--multi-label", is_flag=True, help="With --candidate-label: several labels may apply.")
@job_options
@_FILES
def classify(
    model: str, output: Path | None, field: str | None, pair_field: str | None, given: tuple[str, ...],
    files: tuple[Path, ...], top_k: int, function_to_apply: str | None, candidate_labels: tuple[str, ...],
    hypothesis_template: str, multi_label: bool, **load_options: Any,
) -> None:  # fmt: skip
    """Labels texts, one a line of FILES, in order; with --field and --pair-field, pairs of texts.

    The answer to a text is a JSON line with label and score, a list of them unless --top-k is 1, or, with
    --candidate-label, the labels with their scores. With --out, FILES may be Parquet, Arrow, JSON lines or CSV, too,
    and the folder DIR gets a row for each of theirs, with columns label and score.

    \b
    bertjax classify -m MODEL reviews.txt
    bertjax classify -m MODEL --field premise --pair-field hypothesis pairs.jsonl
    bertjax classify -m NLI-MODEL -l sport -l politics news.txt
    bertjax classify -m MODEL reviews/ --field body --id url --out labels
    """
    if pair_field is not None and (field is None or candidate_labels):
        raise click.UsageError("--pair-field goes with --field, and not with --candidate-label")
    if candidate_labels and load_options["out"] is not None:
        raise click.UsageError("--candidate-label does not go with --out")
    if candidate_labels:
        refuse_options("top_k", "function_to_apply", because="does not go with --candidate-label")
    else:
        refuse_options("multi_label", "hypothesis_template", because="goes with --candidate-label")

    def work(**options: Any) -> Any:
        from bertjax.corpus import Labels

        settings = {"top_k": top_k or None, "function_to_apply": function_to_apply, "pair": pair_field is not None}
        return Labels(model=model, **settings, **options)

    if runs_as_job(files, _columns(field, pair_field), work, load_options):
        return
    check_sources(files, given, field)
    check_output(output, ".jsonl")
    if given:
        inputs: Iterable[Any] = given
    else:
        inputs = read_texts(files, field) if pair_field is None else read_records(files, field, pair_field)
    if candidate_labels:
        from bertjax.tasks.zero_shot import ZeroShotClassification

        options = {"candidate_labels": candidate_labels, "hypothesis_template": hypothesis_template}
        task = ZeroShotClassification.from_pretrained(model, **load_options)
        _run(task, inputs, output, options | {"multi_label": multi_label})
        return
    from bertjax.tasks.classification import TextClassification

    task = TextClassification.from_pretrained(model, **load_options)
    _run(task, inputs, output, {"top_k": top_k or None, "function_to_apply": function_to_apply})


@click.command(cls=Command, short_help="Find and label the entities in texts.")
@_task_options
@_MAX_LENGTH
@_COLUMN
@_TEXT
@click.option("--aggregation-strategy", type=click.Choice(["none", "simple", "first", "average", "max"]),
              default="simple", show_default=True, help="How tokens become entities.")  # fmt: skip
@click.option("--ignore-label", "ignore_labels", multiple=True, default=("O",), show_default=True, metavar="LABEL",
              help="A label that is no entity. Repeatable.")  # fmt: skip
@click.option("--stride", type=click.IntRange(0), metavar="N", help="How many tokens the windows over a long text "
              "share.")  # fmt: skip
@job_options
@_FILES
def tag(
    model: str, output: Path | None, field: str | None, given: tuple[str, ...], files: tuple[Path, ...],
    aggregation_strategy: str, ignore_labels: tuple[str, ...], stride: int | None, **load_options: Any,
) -> None:  # fmt: skip
    """Finds and labels the entities in texts, one a line of FILES, in order.

    The answer to a text is a JSON line: a list of entities, whose start and end count characters of the text. Texts
    longer than the model are read in windows, to their end. With --out, FILES may be Parquet, Arrow, JSON lines or CSV,
    too, and the folder DIR gets a row for each of theirs, with the column entities.

    \b
    bertjax tag -m dslim/bert-base-NER -t "Ada Lovelace lived in London."
    bertjax tag -m dslim/bert-base-NER news/ --field body --id url --out entities
    """
    options = {"aggregation_strategy": aggregation_strategy, "ignore_labels": ignore_labels, "stride": stride}

    def work(**load_options: Any) -> Any:
        from bertjax.corpus import Entities

        return Entities(model=model, **options, **load_options)

    if runs_as_job(files, _columns(field), work, load_options):
        return
    check_sources(files, given, field)
    check_output(output, ".jsonl")
    from bertjax.tasks.token_classification import TokenClassification

    task = TokenClassification.from_pretrained(model, **load_options)
    _run(task, given or read_texts(files, field), output, options)


@click.command(cls=Command, short_help="Find the answers to questions in documents.")
@_task_options
@click.option("-q", "--question", metavar="TEXT", help="One question, to each of FILES as a whole. Default: FILES "
              "are JSON lines, each with a question and its context.")  # fmt: skip
@click.option("--question-field", default="question", show_default=True, metavar="NAME", help="Field of a question.")
@click.option("--context-field", default="context", show_default=True, metavar="NAME", help="Field of a context.")
@click.option("-t", "--text", "given", multiple=True, metavar="TEXT", help="With --question: a document, instead of a "
              "file. Repeatable.")  # fmt: skip
@click.option("--top-k", type=click.IntRange(1), default=1, show_default=True, metavar="N", help="How many answers.")
@click.option("--doc-stride", type=click.IntRange(0), metavar="N", help="How many tokens the windows over a document "
              "share.")  # fmt: skip
@click.option("--max-answer-len", type=click.IntRange(1), default=15, show_default=True, metavar="N",
              help="The longest answer in tokens.")  # fmt: skip
@click.option("--max-seq-len", type=click.IntRange(1), metavar="N", help="The length of a window in tokens, question "
              "and special tokens included.")  # fmt: skip
@click.option("--handle-impossible-answer", is_flag=True, help="Let the empty answer, that there is none, compete.")
@_FILES
def answer(
    model: str, output: Path | None, question: str | None, question_field: str, context_field: str,
    given: tuple[str, ...], files: tuple[Path, ...], top_k: int, doc_stride: int | None, max_answer_len: int,
    max_seq_len: int | None, handle_impossible_answer: bool, **load_options: Any,
) -> None:  # fmt: skip
    """Finds the answers to questions in documents of any length.

    The answer to a question is a JSON line, a list of them if --top-k is more than 1: the text, where it starts and
    ends in the document, in characters, and its score.

    \b
    bertjax answer -m MODEL -q "Who wrote the first program?" history.txt
    bertjax answer -m MODEL squad.jsonl -o answers.jsonl
    """
    check_sources(files, given)
    check_output(output, ".jsonl")
    if question is None:
        refuse_options("given", because="goes with --question")
    else:
        refuse_options("question_field", "context_field", because="does not go with --question")
    from bertjax.tasks.question_answering import QuestionAnswering

    task = QuestionAnswering.from_pretrained(model, **load_options)
    if question is None:
        inputs: Iterable[Any] = read_records(files, question_field, context_field)
    else:
        inputs = zip(itertools.repeat(question), given or read_documents(files), strict=False)
    options = {"doc_stride": doc_stride, "max_seq_len": max_seq_len}
    options = {name: value for name, value in options.items() if value is not None}
    options |= {"top_k": top_k, "max_answer_len": max_answer_len, "handle_impossible_answer": handle_impossible_answer}
    _run(task, inputs, output, options)


@click.command(cls=Command, short_help="Rank passages for a query, with a cross-encoder.")
@_task_options
@_MAX_LENGTH
@click.option("-q", "--query", metavar="TEXT", help="Rank the passages, one a line of FILES, for this query. Default: "
              "FILES are JSON lines, each with a query and a passage, and each pair gets a score.")  # fmt: skip
@click.option("-f", "--field", metavar="NAME", help="With --query: read JSON lines, and take the passage from this "
              "field. Without: the field that holds the query.  [default: query]")  # fmt: skip
@click.option("--pair-field", metavar="NAME", default="passage", show_default=True, help="Without --query: the field "
              "that holds the passage.")  # fmt: skip
@_TEXT
@click.option("--top-k", type=click.IntRange(1), metavar="N", help="With --query: only the best N.")
@job_options
@_FILES
def rank(
    model: str, output: Path | None, query: str | None, field: str | None, pair_field: str, given: tuple[str, ...],
    files: tuple[Path, ...], top_k: int | None, **load_options: Any,
) -> None:  # fmt: skip
    """Scores how well passages answer a query, by reading both together.

    With --query, the passages come back best first, a JSON line each with its number, score and text. Without, each
    pair's score is a line, in the order of the pairs. With --out, FILES may be Parquet, Arrow or CSV, too, and the
    folder DIR gets a row for each of their pairs, with the column score.

    \b
    bertjax rank -m cross-encoder/ms-marco-TinyBERT-L2-v2 -q "capital of France" passages.txt --top-k 3
    bertjax rank -m MODEL pairs.jsonl -o scores.jsonl
    bertjax rank -m MODEL pairs.parquet --field question --pair-field body --id id --out scores
    """
    if query is None:
        refuse_options("given", "top_k", because="goes with --query")
    else:
        refuse_options("pair_field", because="does not go with --query")
    if query is not None and load_options["out"] is not None:
        raise click.UsageError("--query does not go with --out, which scores the pairs of files and ranks nothing")

    def work(**options: Any) -> Any:
        from bertjax.corpus import PairScores

        return PairScores(model=model, **options)

    if runs_as_job(files, (field or "query", pair_field), work, load_options):
        return
    check_sources(files, given, field)
    check_output(output, ".jsonl")
    from bertjax.tasks.rank import CrossEncoder

    task = CrossEncoder.from_pretrained(model, **load_options)
    if query is None:
        _run(task, read_records(files, field or "query", pair_field), output)
        return
    passages = list(given or read_texts(files, field))
    with opened_output(output) as file:
        for ranked in task.rank(query, passages, top_k=top_k, return_documents=True):
            _write(file, ranked)


@click.command("next-sentence", cls=Command, short_help="Tell whether one text follows another.")
@_task_options
@_MAX_LENGTH
@click.option("-f", "--field", metavar="NAME", default="text", show_default=True, help="The field that holds a pair's "
              "first text.")  # fmt: skip
@click.option("--pair-field", metavar="NAME", default="text_pair", show_default=True, help="The field that holds the "
              "second.")  # fmt: skip
@_FILES
def next_sentence(
    model: str, output: Path | None, field: str, pair_field: str, files: tuple[Path, ...], **load_options: Any
) -> None:
    """Gives the probability that the second text of each pair follows the first; FILES are JSON lines.

    \b
    bertjax next-sentence -m google-bert/bert-base-uncased pairs.jsonl
    """
    check_sources(files, ())
    check_output(output, ".jsonl")
    from bertjax.tasks.next_sentence import NextSentence

    task = NextSentence.from_pretrained(model, **load_options)
    _run(task, read_records(files, field, pair_field), output)


@click.command(cls=Command, short_help="Turn texts into sparse vectors, with a SPLADE model.")
@_task_options
@_MAX_LENGTH
@_COLUMN
@_TEXT
@click.option("--max-active-dims", type=click.IntRange(1), metavar="N", help="Keep only the N largest weights.")
@click.option("--prompt", metavar="TEXT", help="Put this before every text; it wins over --prompt-name.")
@click.option("--prompt-name", metavar="NAME", help="Put this one of the model's own prompts before every text.")
@job_options
@_FILES
def sparse(
    model: str, output: Path | None, field: str | None, given: tuple[str, ...], files: tuple[Path, ...],
    max_active_dims: int | None, prompt: str | None, prompt_name: str | None, **load_options: Any,
) -> None:  # fmt: skip
    """Turns texts into sparse vectors over the vocabulary, one text a line of FILES, in order.

    The vector of a text is a JSON line with indices, tokens and values, the largest first. With --out, FILES may be
    Parquet, Arrow, JSON lines or CSV, too, and the folder DIR gets a row for each of theirs, with columns indices and
    values.

    \b
    bertjax sparse -m naver/splade-cocondenser-ensembledistil -t "BERT on JAX"
    bertjax sparse -m MODEL corpus/ --field body --id url --out sparse
    """
    options = {"max_active_dims": max_active_dims, "prompt": prompt, "prompt_name": prompt_name}

    def work(**load_options: Any) -> Any:
        from bertjax.corpus import SparseVectors

        return SparseVectors(model=model, **options, **load_options)

    if runs_as_job(files, _columns(field), work, load_options):
        return
    check_sources(files, given, field)
    check_output(output, ".jsonl")
    from bertjax.tasks.sparse import SparseEncoder

    task = SparseEncoder.from_pretrained(model, **load_options)
    texts = given or read_texts(files, field)

    def as_json(vector: Any) -> dict[str, Any]:
        order = np.argsort(-vector.values, kind="stable")
        tokens = [token for token, _ in task.decode(vector)]
        # By way of str, a float32 is written with the digits that it has and no more.
        values = [float(str(value)) for value in vector.values[order]]
        return {"indices": vector.indices[order].tolist(), "tokens": tokens, "values": values}

    _run(task, texts, output, options, as_json)


#: The commands, in the order in which the help lists them.
COMMANDS = (fill_mask, classify, tag, answer, rank, next_sentence, sparse)
