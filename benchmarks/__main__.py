"""bertjax beside other libraries: python -m benchmarks COMMAND; see --help."""

import functools
import itertools
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click
import numpy as np

from benchmarks import harness, reports, timing, workloads
from benchmarks.harness import Case, Plan
from benchmarks.peers import PEERS
from benchmarks.workloads import Sizes

_PROBES = ("matmul (jax)", "matmul (torch)")
_DTYPES = ("float32", "bfloat16", "int8")
_FILE = click.Path(exists=True, dir_okay=False, path_type=Path)
_FOLDER = click.Path(exists=True, file_okay=False, path_type=Path)


def peers_of(task: str) -> list[str]:
    """The peers that a task is compared on, in the order of their turns."""
    return [name for name, peer in PEERS.items() if task in peer.loaders]


def _check_device(context: click.Context, _: click.Parameter, device: str) -> str:
    if device == "gpu" and timing.gpu_name() is None:
        click.echo("no GPU here: nothing to measure")
        context.exit(0)
    return device


def shared(task: str) -> Callable:
    """The options that every comparison has."""
    options = [
        click.option("--peer", "peers", multiple=True, type=click.Choice(peers_of(task)), help="Default: all of them."),
        click.option(
            "--dtype", "dtypes", multiple=True, default=["float32"], show_default=True,
            type=click.Choice(_DTYPES), help="Several are compared in the same run.",
        ),
        click.option(
            "--device", type=click.Choice(["cpu", "gpu"]), default="cpu", show_default=True, callback=_check_device
        ),
        click.option("--threads", type=click.IntRange(1), help="Threads for each peer; default: all cores."),
        click.option("--rounds", type=click.IntRange(1), default=5, show_default=True, help="Rounds to measure."),
        click.option("--burn-in", type=click.IntRange(1), default=1, show_default=True, help="Rounds before."),
        click.option("--python", "pythons", multiple=True, help="PEER=INTERPRETER of a peer's own environment."),
        click.option("--save", "name", help="Write text, JSON and a plot to benchmarks/results under this name."),
    ]  # fmt: skip
    return lambda function: functools.reduce(lambda wrapped, option: option(wrapped), reversed(options), function)


def run(
    task: str,
    title: str,
    model: Path,
    make_cases: Callable[[Plan], tuple[list[Case], str]],
    reference: str,
    *,
    peers: Sequence[str],
    dtypes: Sequence[str],
    device: str,
    threads: int | None,
    rounds: int,
    burn_in: int,
    pythons: Sequence[str],
    name: str | None,
    unit: str,
    probes: bool = True,
) -> dict[str, Any]:
    """One comparison from beginning to end; prints its report and returns what was found.

    Args:
        task: what the peers do; see `peers.Peer.loaders`.
        title: the report's title.
        model: a model's folder.
        make_cases: makes the cases, and a sentence on them for the report.
        reference: the peer that the others have to agree with.
        peers, dtypes, device, threads, rounds, burn_in, pythons, name: the options of `shared`.
        unit: what the plot shows; see `reports.UNITS`.
        probes: whether matmuls are timed beside.
    """
    with tempfile.TemporaryDirectory() as folder:
        plan = Plan(
            task=task,
            model=model.resolve(),
            device=device,
            threads=threads or os.cpu_count(),
            pythons=dict(_pair(each) for each in pythons),
            exported=workloads.cache(),
            folder=Path(folder),
            rounds=rounds,
            burn_in=burn_in,
            probe_size=workloads.PROBE_SIZE[device],
        )
        cases, about = make_cases(plan)
        wanted = [(peer, dtype, task) for dtype in dtypes for peer in peers or peers_of(task)]
        wanted += [(probe, dtype, "probe") for dtype in dtypes for probe in _PROBES if probes]
        starts, rows = compare(plan, wanted, cases, reference)
    found = {
        "title": title,
        "task": task,
        "model": timing.model_name(model),
        "device": device,
        "dtypes": list(dtypes),
        "threads": plan.threads,
        "rounds": rounds,
        "burn_in": burn_in,
        "probe_size": plan.probe_size,
        "reference": reference,
        "unit": unit,
        "machine": timing.machine(),
        "command": timing.command(sys.argv[1:]),
        "about": about,
        "starts": starts,
        "rows": rows,
    }
    publish(found, name)
    return found


def compare(plan: Plan, wanted: Sequence[tuple[str, str, str]], cases: list[Case], reference: str) -> tuple[list, list]:
    """How the wanted peers started, and a row for each case and peer; see `harness.compare`."""
    try:
        expected = _references(plan, reference, cases, {PEERS[peer].gelu for peer, _, _ in wanted} | {None})
    except RuntimeError as error:
        raise click.ClickException(str(error)) from None
    with harness.entrants(plan, wanted) as group:
        rows = harness.compare(plan, group, cases, expected)
        starts = [{"peer": each.peer, "dtype": each.dtype} | each.start for each in group]
    return _with_other_versions(starts), rows


def publish(found: dict[str, Any], name: str | None) -> None:
    """Prints a report and, under a name, saves it with its plot."""
    click.echo(reports.report(found))
    if name:
        path = timing.save(name, reports.report(found), found)
        reports.plot(found, path.with_suffix(".png"))
        click.echo(f"\nwritten to {path}, .json and .png")


def _pair(option: str) -> tuple[str, str]:
    peer, equals, python = option.partition("=")
    if peer not in PEERS or not equals:
        raise click.BadParameter(f"{option!r} is not PEER=INTERPRETER, the peer being one of {', '.join(PEERS)}")
    return peer, python


def _references(plan: Plan, peer: str, cases: list[Case], gelus: set[str | None]) -> dict:
    """The reference's results for each GELU that some peer computes."""
    found = {}
    for gelu in gelus:
        model = plan.model if gelu is None else workloads.with_tanh_gelu(plan.model, plan.folder)
        found[gelu] = harness.references(plan, peer, cases, model, f"reference-{gelu}")
    return found


def _with_other_versions(starts: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Starts with the versions in which a peer's environment differs from this one."""
    own = timing.versions()
    for start in starts:
        others = start.pop("versions", {})
        start["other_versions"] = {name: version for name, version in others.items() if own.get(name) != version}
    return starts


@click.group(help=__doc__)
def main() -> None:
    """All comparisons; the command line says which."""


@main.command()
@click.argument("model", type=_FOLDER, required=False)
@click.option("--size", type=click.Choice(["base", "large"]), default="base", show_default=True, help="Without MODEL.")
@click.option("--shape", "shapes", multiple=True, help="BATCHxLENGTH; default: by size and device.")
@shared("dense")
def dense(model: Path | None, size: str, shapes: Sequence[str], **options: Any) -> None:
    """Full batches of token ids to hidden states, of MODEL or of a BERT with random weights."""
    chosen = [workloads.parse_shape(shape) for shape in shapes] or workloads.DENSE_SHAPES[options["device"], size]
    folder = model or workloads.random_checkpoint(size)
    sizes = Sizes.of(folder)

    def make(plan: Plan) -> tuple[list[Case], str]:
        cases = []
        for batch, length in chosen:
            name = f"{batch}x{length}"
            ids = workloads.random_ids((batch, length), sizes.vocab)
            inputs = harness.write_inputs(plan.folder / name, [{"input_ids": ids}])
            flops = sizes.encoder_flops([length] * batch)
            cases.append(Case(name, inputs, tokens=batch * length, flops=flops, texts=batch))
        return cases, "Batches without padding, [batch x length] token ids to the last hidden state."

    run("dense", "Dense batches", folder, make, "torch", unit="flops", **options)


@main.command()
@click.argument("model", type=_FOLDER)
@click.option("--texts", "file", type=_FILE, help="A text a line, or a .csv of pairs; default: Python's documentation.")
@click.option("--source", help="What the texts are, for the report.")
@click.option("--count", type=click.IntRange(1), help="How many texts; default: by the device.")
@shared("text")
def embed(model: Path, file: Path | None, source: str | None, count: int | None, **options: Any) -> None:
    """Texts of mixed lengths to vectors, with a sentence-transformers MODEL."""
    count = count or workloads.TEXTS[options["device"]]
    texts = list(itertools.islice(itertools.cycle(workloads.read_texts(file, count)), count))

    def make(plan: Plan) -> tuple[list[Case], str]:
        case = _text_case(plan, "mixed lengths", [texts])
        name = source or (file.name if file else "Python's language reference")
        distinct = f" ({len(set(texts))} of them distinct)" if len(set(texts)) < len(texts) else ""
        return [case], f"{len(texts)} texts{distinct} of {case.tokens / len(texts):.0f} tokens on average, from {name}."

    run("text", "Text to vectors", model, make, "sentence-transformers", unit="tokens", **options)


@main.command()
@click.argument("model", type=_FOLDER)
@click.option("--texts", "file", type=_FILE, help="As in embed.")
@shared("text")
def latency(model: Path, file: Path | None, **options: Any) -> None:
    """One text at a time to a vector, with a sentence-transformers MODEL: short, medium and long texts."""
    texts = workloads.read_texts(file, 100_000, least_words=1)

    def make(plan: Plan) -> tuple[list[Case], str]:
        cases = []
        for name, words in {"short": 6, "medium": 40, "long": 160}.items():
            chosen = workloads.texts_near(texts, words, 10)
            cases.append(_text_case(plan, name, [[text] for text in chosen]))
        lengths = ", ".join(f"{case.name} {case.tokens:.0f}" for case in cases)
        return cases, f"One text a call, ten different ones in turn; tokens on average: {lengths}."

    run("text", "Single texts", model, make, "sentence-transformers", unit="texts", probes=False, **options)


def _text_case(plan: Plan, name: str, inputs: list[list[str]]) -> Case:
    """A case of calls with these texts, their tokens counted by sentence-transformers."""
    path = harness.write_inputs(plan.folder / name.replace(" ", "-"), inputs)
    entrant = harness.Entrant("sentence-transformers", "float32", plan)
    try:
        if entrant.absent:
            raise click.ClickException(f"sentence-transformers, the reference, {entrant.absent}")
        lengths = entrant.ask("lengths", inputs=str(path))["lengths"]
    finally:
        entrant.close()
    every = [length for call in lengths for length in call]
    flops = Sizes.of(plan.model).encoder_flops(every)
    return Case(name, path, tokens=sum(every) / len(inputs), flops=flops / len(inputs), texts=len(every) / len(inputs))


@main.command()
@click.argument("model", type=_FOLDER, required=False)
@click.option("--shape", "shapes", multiple=True, help="BATCHxLENGTH; default: by the device.")
@shared("train")
def train(model: Path | None, shapes: Sequence[str], **options: Any) -> None:
    """Steps of masked-language-model training with AdamW, of MODEL or of a BERT-base with random weights."""
    chosen = [workloads.parse_shape(shape) for shape in shapes] or workloads.TRAINING_SHAPES[options["device"]]
    folder = model or workloads.random_checkpoint("base")
    sizes = Sizes.of(folder)

    def make(plan: Plan) -> tuple[list[Case], str]:
        cases = []
        for shape in chosen:
            batches = [workloads.masked_batch(shape, sizes.vocab, seed) for seed in range(3)]
            path = harness.write_inputs(plan.folder / f"train-{shape[0]}x{shape[1]}", batches)
            flops = sizes.training_flops(*shape, int((batches[0]["labels"] != -100).sum()))
            tokens = int(np.prod(shape))
            cases.append(Case(f"{shape[0]}x{shape[1]}", path, tokens=tokens, flops=flops, texts=shape[0]))
        about = (
            "Forward, backward and AdamW on full batches, 15 % of the positions predicted, no dropout; parameters in "
            "float32. The losses of the first steps, three batches in turn, are what has to agree. FLOP/s count the "
            "head at the predicted positions only, and the backward pass as two forward ones."
        )
        return cases, about

    run("train", "Masked-language-model training", folder, make, "torch", unit="flops", **options)


@main.command("all")
@click.argument("model", type=_FOLDER)
@click.option("--texts", "file", type=_FILE, help="As in embed.")
@click.option("--source", help="As in embed.")
@click.option("--python", "pythons", multiple=True, help="PEER=INTERPRETER of a peer's own environment.")
@click.option("--device", type=click.Choice(["cpu", "gpu"]), default="cpu", show_default=True, callback=_check_device)
@click.option("--threads", type=click.IntRange(1), help="Threads for each peer; default: all cores.")
@click.option("--rounds", type=click.IntRange(1), default=5, show_default=True, help="Rounds to measure.")
@click.pass_context
def everything(
    context: click.Context, model: Path, file: Path | None, source: str | None, device: str, **options: Any
) -> None:
    """All of these, a report of each saved; MODEL, a sentence-transformers folder, is for those that read texts.

    On a CPU in float32, bfloat16 and int8, on a GPU in bfloat16.
    """
    options |= {"device": device}
    chosen = _DTYPES if device == "cpu" else ("bfloat16",)
    # The large model in one dtype at a time: all of its copies together need tens of gigabytes.
    for size, dtypes in (("base", chosen), *(("large", [dtype]) for dtype in chosen)):
        name = f"dense-{size}-{device}" + (f"-{dtypes[0]}" if len(dtypes) == 1 else "")
        context.invoke(dense, size=size, dtypes=dtypes, name=name, **options)
    context.invoke(embed, model=model, file=file, source=source, dtypes=chosen, name=f"embed-{device}", **options)
    context.invoke(latency, model=model, file=file, dtypes=chosen, name=f"latency-{device}", **options)
    context.invoke(train, dtypes=chosen[:2], name=f"train-{device}", **options)


if __name__ == "__main__":
    main(prog_name="python -m benchmarks")
