"""The curves of a run as a picture, from its log."""

import logging
import math
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from bertjax.atomic import atomic_file
from bertjax.training.log_lines import METRICS, RESERVED, read_lines

logger = logging.getLogger(__name__)

_PICTURE = "curves.png"


def plot_curves(folder: str | Path) -> Path | None:
    """Draws the curves of a log: losses, the metrics of evaluations, the learning rate.

    Args:
        folder: the run's folder.

    Returns:
        The picture's path; None where there is nothing to draw, or no way to, which is logged and no error.
    """
    folder = Path(folder)
    try:
        from matplotlib.figure import Figure
        from matplotlib.ticker import MaxNLocator
    except ImportError:
        logger.info("without matplotlib there is no %s: pip install 'bertjax[train]'", folder / _PICTURE)
        return None
    try:
        panels = _panels(read_lines((folder / METRICS).read_bytes()))
        if not panels:
            return None
        figure = Figure(figsize=(9, 0.6 + 2.4 * len(panels)), dpi=120, layout="constrained")
        figure.get_layout_engine().set(h_pad=0.1)
        axes = figure.subplots(len(panels), sharex=True, squeeze=False)[:, 0]
        for axis, (title, curves) in zip(axes, panels.items(), strict=True):
            _draw(axis, title, curves)
        axes[-1].set_xlabel("step")
        axes[-1].xaxis.set_major_locator(MaxNLocator(integer=True, steps=(1, 2, 5, 10)))
        axes[-1].xaxis.set_major_formatter("{x:,.0f}")
        with atomic_file(folder / _PICTURE) as temporary:
            figure.savefig(temporary, format="png")
    except OSError as problem:
        logger.warning("%s: can't be drawn (%s)", folder / _PICTURE, problem)
        return None
    return folder / _PICTURE


class _Curve(NamedTuple):
    """A metric of lines of a kind.

    Attributes:
        kind: "train", or the name of an evaluation.
        name: the metric's.
        points: [2, lines], steps and values; NaN where these are not finite.
    """

    kind: str
    name: str
    points: np.ndarray


def _panels(entries: list[dict[str, Any]]) -> dict[str, list[_Curve]]:
    """The curves that go together, by what they show."""
    found: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for entry in entries:
        for name in entry.keys() - {*RESERVED}:
            value = entry[name] if isinstance(entry[name], int | float) else math.nan
            found.setdefault((entry["kind"], name), []).append((entry["step"], value))
    panels: dict[str, list[_Curve]] = {"loss": [], "evaluation": []}
    for (kind, name), points in sorted(found.items(), key=lambda item: (item[0][0] != "train", item[0])):
        curve = _Curve(kind, name, np.array(points, np.float64).T)
        panel = _panel_of(curve)
        if panel is not None:
            panels.setdefault(panel, []).append(curve)
    # The learning rate comes first among the lines, and is looked at last.
    order = sorted(panels, key="learning rate".__eq__)
    return {name: panels[name] for name in order if panels[name]}


def _panel_of(curve: _Curve) -> str | None:
    if "loss" in curve.name:
        return "loss"
    if curve.kind == "train":
        return "learning rate" if curve.name == "learning_rate" else None
    # Most metrics are rates and correlations; what is larger needs an axis of its own.
    return "evaluation" if not (np.abs(curve.points[1]) > 1).any() else curve.name.replace("_", " ")


def _draw(axis: Any, title: str, curves: list[_Curve]) -> None:
    for curve in curves:
        steps, values = curve.points
        label = f"{curve.kind} {curve.name}".replace("_", " ").replace("$", r"\$")
        if curve.kind != "train":
            axis.plot(steps, values, marker="o", markersize=4, linewidth=1.5, label=label)
        elif title == "learning rate" or len(steps) < 10:
            axis.plot(steps, values, marker="o" if len(steps) == 1 else None, linewidth=1.5, label=label)
        else:
            raw = axis.plot(steps, values, linewidth=0.7, alpha=0.35)[0]
            axis.plot(steps, _smoothed(values), linewidth=1.8, color=raw.get_color(), label=f"{label}, smoothed")
    points = np.concatenate([curve.points for curve in curves], axis=1)
    wrong = points[0, np.isnan(points[1])]
    if wrong.size:  # along the lower edge, as they have no height
        below = {"transform": axis.get_xaxis_transform(), "clip_on": False}
        axis.plot(wrong, np.zeros_like(wrong), "rx", label="not finite", **below)
    _scale(axis, points[1, ~np.isnan(points[1])])
    axis.set_title(title, loc="left", fontsize="medium", fontweight="bold")
    axis.grid(alpha=0.3, linewidth=0.6)
    axis.spines[["top", "right"]].set_visible(False)
    if title != "learning rate":
        axis.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False, fontsize="small")


def _scale(axis: Any, values: np.ndarray) -> None:
    """A logarithmic axis for what falls to a small part of what it was; plain numbers along any."""
    if values.size > 1 and values.min() > 0 and np.divide(*np.percentile(values, (95, 5))) > 10:
        from matplotlib.ticker import LogLocator, NullFormatter

        axis.set_yscale("log")
        few = values.max() / values.min() < 1000  # powers of ten
        axis.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if few else (1.0,)))
        axis.yaxis.set_minor_formatter(NullFormatter())
    axis.yaxis.set_major_formatter("{x:.4g}")


def _smoothed(values: np.ndarray) -> np.ndarray:
    """Means of neighbours, weighted by a Gaussian as wide as a hundredth of all; NaN has no weight."""
    width = max(2.0, len(values) / 100)
    reach = math.ceil(3 * width)
    kernel = np.exp(-0.5 * np.square(np.arange(-reach, reach + 1) / width))
    there = np.isfinite(values)
    sums, weights = (
        np.convolve(each, kernel)[reach : reach + len(values)] for each in (np.where(there, values, 0.0), there)
    )
    return np.where(weights > 0, sums / np.maximum(weights, 1e-300), np.nan)
