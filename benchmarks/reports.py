"""What was measured, as tables for the terminal and as a plot."""

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import timing
from benchmarks.workloads import NOMINAL_TFLOPS

Row = Mapping[str, Any]

_NOTE = """\
Every peer has a process of its own and {threads} threads; they take turns (A B A B ...). Times are medians of {rounds}
rounds (least to largest) after {burn_in} of burn-in; ratios are medians of the ratios, round by round. "bertjax is"
says how many times as fast bertjax is at the same dtype, "own float32" how many times as fast a peer is as itself in
float32. Compiling is the first call less a later one. Tokens are real ones, without padding; FLOP/s come from the
formula, L (8 d^2 + 4 d i + 4 s d) per token. "of matmul" is their fraction of the faster of two libraries' {probe}-row
square matmuls at that dtype in the same rounds. "off by" is the largest difference from {reference} in float32 or, for
a shorter dtype, one less the least cosine. Memory is the largest resident size of the process in that case, mapped
files included."""


def report(found: Mapping[str, Any]) -> str:
    """A measured result as Markdown."""
    title = f"# {found['title']}, {found['model']}, {', '.join(found['dtypes'])}, {found['device']}"
    settings = {name: found[name] for name in ("threads", "rounds", "burn_in", "reference")}
    note = _NOTE.format(probe=found["probe_size"], **settings)
    head = [title, timing.describe_machine(found["machine"]), f"`{found['command']}`", found["about"], note]
    parts = [*head, timing.table(start_rows(found["starts"])), absences(found["starts"])]
    for case in dict.fromkeys(row["case"] for row in found["rows"]):
        rows = [row for row in found["rows"] if row["case"] == case]
        parts += [f"## {case}", timing.table(case_rows(rows, found["machine"].get("gpu")))]
    return "\n\n".join(part for part in parts if part)


def start_rows(starts: Sequence[Row]) -> list[list[str]]:
    """How every peer that was asked for started."""
    rows = [["peer", "dtype", "import", "load", "memory to load", "versions of its own"]]
    for start in starts:
        cells = ["absent", "-", "-", "-"]
        if "absent" not in start:
            versions = ", ".join(f"{name} {version}" for name, version in start["other_versions"].items())
            memory = f"{start['load_memory'] / 1e9:.2f} GB"
            cells = [f"{start['import_s']:.1f} s", f"{start['load_s']:.1f} s", memory, versions or "-"]
        rows.append([start["peer"], start["dtype"], *cells])
    return rows


def absences(starts: Sequence[Row]) -> str:
    """Why peers are absent, a line each."""
    return "\n".join(
        f"- {each['peer']} {each['dtype']} is absent: {each['absent']}" for each in starts if "absent" in each
    )


def case_rows(rows: Sequence[Row], gpu: str | None = None) -> list[list[str]]:
    """The table of one case, the header first."""
    header = "peer,dtype,first call,compiling,a call,texts/s,tokens/s,GFLOP/s,of matmul"
    nominal = nominal_flops(gpu)
    columns = header.split(",") + (["of nominal"] if nominal else [])
    columns += ["bertjax is", "own float32", "off by", "memory"]
    table = [columns]
    for row in rows:
        if "failed" in row:
            table.append([row["peer"], row["dtype"], f"failed: {row['failed']}", *["-"] * (len(columns) - 3)])
            continue
        seconds = statistics.median(row["seconds"])
        rates = ["-", "-"] if row["probe"] else [f"{row['texts'] / seconds:.1f}", f"{row['tokens'] / seconds:.0f}"]
        times = [_time(row["first_s"]), _time(row["compile_s"]), _times(row["seconds"])]
        cells = [row["peer"], row["dtype"], *times, *rates]
        cells += [f"{row['flops'] / seconds / 1e9:.0f}" if row["flops"] else "-", _fraction(row, rows)]
        if nominal:
            bfloat16 = row["dtype"] == "bfloat16" and row["flops"]
            cells.append(f"{row['flops'] / seconds / nominal:.0%}" if bfloat16 else "-")
        table.append([*cells, _against(row, rows), _own_float32(row, rows), _difference(row), _memory(row)])
    return table


def nominal_flops(gpu: str | None) -> float | None:
    """A GPU's dense bfloat16 peak in FLOP/s as its maker states it, or None if it is not in the table."""
    names = (name for name in NOMINAL_TFLOPS if all(part in (gpu or "") for part in name.split()))
    name = next(names, None)
    return None if name is None else NOMINAL_TFLOPS[name] * 1e12


def best_probe(row: Row, rows: Sequence[Row]) -> float | None:
    """FLOP/s of the faster matmul of the same dtype in the same case, or None if none was timed."""
    probes = [each for each in rows if each["probe"] and each["dtype"] == row["dtype"] and each.get("seconds")]
    return max((each["flops"] / statistics.median(each["seconds"]) for each in probes), default=None)


def find(rows: Sequence[Row], peer: str, dtype: str) -> Row | None:
    """The timed row of a peer in a dtype, or None."""
    return next((row for row in rows if (row["peer"], row["dtype"]) == (peer, dtype) and "failed" not in row), None)


def _fraction(row: Row, rows: Sequence[Row]) -> str:
    probe = best_probe(row, rows)
    if row["probe"] or probe is None or not row["flops"]:
        return "-"
    return f"{row['flops'] / statistics.median(row['seconds']) / probe:.0%}"


def _against(row: Row, rows: Sequence[Row]) -> str:
    ours = find(rows, "bertjax", row["dtype"])
    if ours is None or row["peer"] == "bertjax" or row["probe"]:
        return "-"
    return _ratio(timing.ratios(row["seconds"], ours["seconds"]))


def _own_float32(row: Row, rows: Sequence[Row]) -> str:
    own = find(rows, row["peer"], "float32")
    if own is None or own is row:
        return "-"
    return _ratio(timing.ratios(own["seconds"], row["seconds"]))


def _ratio(found: Mapping[str, float]) -> str:
    return f"{found['median']:.2f}x ({found['min']:.2f} to {found['max']:.2f})"


def _difference(row: Row) -> str:
    if "difference" not in row:
        return "-"
    return f"{row['difference']['largest' if row['dtype'] == 'float32' else 'cosine_distance']:.1e}"


def _memory(row: Row) -> str:
    device = f", {row['device_memory'] / 1e9:.2f} GB on the device" if row.get("device_memory") else ""
    return f"{row['memory'] / 1e9:.2f} GB{device}"


def _time(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1e3:.1f} ms"


def _times(seconds: Sequence[float]) -> str:
    scale, unit = (1, "s") if statistics.median(seconds) >= 1 else (1e3, "ms")
    return f"{timing.shown(seconds, scale)} {unit}"


#: What a plot shows, by the name that a result gives it: the amount of work a second, its unit, and a factor.
UNITS = {"flops": ("flops", "GFLOP/s", 1e-9), "tokens": ("tokens", "tokens/s", 1.0), "texts": ("texts", "texts/s", 1.0)}


def plot(found: Mapping[str, Any], path: Path) -> None:
    """Draws the rates of all peers, case by case, as a PNG; the bars' ends are the slowest and the fastest round."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    amount, unit, scale = UNITS[found["unit"]]
    rows = [row for row in found["rows"] if "failed" not in row and (not row["probe"] or amount == "flops")]
    cases = list(dict.fromkeys(row["case"] for row in rows))
    labels = list(dict.fromkeys((row["peer"], row["dtype"]) for row in rows))
    figure, axes = pyplot.subplots(figsize=(max(8, 1.2 * len(cases) * len(labels) ** 0.5 + 4), 5), layout="constrained")
    width = 0.85 / len(labels)
    for number, label in enumerate(labels):
        own = [(cases.index(row["case"]), row) for row in rows if (row["peer"], row["dtype"]) == label]
        heights = [[row[amount] * scale / of(row["seconds"]) for _, row in own] for of in (statistics.median, max, min)]
        errors = [[m - low for m, low in zip(heights[0], heights[1], strict=True)]]
        errors.append([high - m for m, high in zip(heights[0], heights[2], strict=True)])
        places = [case + (number - (len(labels) - 1) / 2) * width for case, _ in own]
        shade = {"alpha": 0.35, "hatch": "//"} if own[0][1]["probe"] else {}
        axes.bar(places, heights[0], width, yerr=errors, label=" ".join(label), error_kw={"linewidth": 0.8}, **shade)
    axes.set_xticks(range(len(cases)), cases)
    axes.set_ylabel(unit)
    axes.set_title(f"{found['title']}, {found['model']}, {found['device']}, {found['machine']['date']}")
    axes.legend(fontsize="small")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
