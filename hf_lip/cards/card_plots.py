# SPDX-License-Identifier: Apache-2.0
"""The plots of a card, drawn from the same files as its tables."""

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from ..metrics import average_certified_radius, certified_accuracy
from ..plots import plot_certified_accuracy
from ..smoothing.log_analysis import read_published_log
from ..smoothing.logs import TSV_NAME
from .figures import Evaluation, Figure
from .result_tables import binomial_interval


if TYPE_CHECKING:
    from matplotlib.axes import Axes

CURVE_NAME = "card_certified_accuracy.png"
DEPTH_NAME = "card_accuracy_by_depth.png"
# plot -> what it shows
PLOTS = {CURVE_NAME: "Certified accuracy against the l2 radius", DEPTH_NAME: "Exact match by depth"}
# text in the PNG: the hash of the figures that it shows
_SOURCE = "hf_lip figures sha256"

__all__ = ["CURVE_NAME", "DEPTH_NAME", "PLOTS", "is_plot_of", "write_plots"]


def write_plots(folder: Path, evaluations: Sequence[Evaluation], title: str) -> list[Path]:
    """Write the plots that the evaluations give rise to, and remove those of an earlier card that they do not.

    Certified accuracy is the exact step function where the log of a certification lies beside its summary, otherwise
    the measured points with 95 % intervals.

    Returns:
        The files written.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: a log that does not give the figures of its summary.
    """
    drawn = {
        CURVE_NAME: _certified_accuracy(folder, evaluations, title),
        DEPTH_NAME: _accuracy_by_depth(evaluations, title),
    }
    written = []
    for name, axes in drawn.items():
        if axes is None:
            (folder / name).unlink(missing_ok=True)
        else:
            _save(axes, folder / name, _digest(evaluations))
            written.append(folder / name)
    return written


def is_plot_of(path: Path, evaluations: Sequence[Evaluation]) -> bool:
    """Whether a plot says that it was drawn from these figures."""
    with Image.open(path) as image:
        return bool(image.info.get(_SOURCE) == _digest(evaluations))


def _digest(evaluations: Sequence[Evaluation]) -> str:
    figures = [(one.file, figure.key, figure.value) for one in evaluations for figure in one.figures]
    return hashlib.sha256(json.dumps(figures).encode()).hexdigest()


def _certified_accuracy(folder: Path, evaluations: Sequence[Evaluation], title: str) -> "Axes | None":
    certified = [one for one in evaluations if _certified(one)]
    logged = [one for one in certified if (folder / one.file).with_name(TSV_NAME).is_file()]
    axes: Axes | None = None
    for one in logged:
        radii, correct = _read_log(folder, one)
        axes = plot_certified_accuracy(radii, correct, ax=axes, title=title, label=_label(one))
    for one in certified if axes is None else []:
        axes = _measured_points(axes, one, title)
    return axes


def _read_log(folder: Path, evaluation: Evaluation) -> tuple[Any, Any]:
    """Radii and whether right, of a log that gives the figures of its summary."""
    path = (folder / evaluation.file).with_name(TSV_NAME)
    log = read_published_log(path)
    if log.radius is None:
        raise ValueError(f"{path} holds predictions without radii, {evaluation.file} certificates: certify again.")
    for figure in evaluation.figures:
        if figure.metric == "certified_accuracy":
            found = certified_accuracy(log.radius, log.correct, figure.arguments["eps"])
        elif figure.metric == "average_certified_radius":
            found = average_certified_radius(log.radius, log.correct)
        else:
            continue
        if abs(found - figure.value) > 1e-9:
            raise ValueError(
                f"{path} gives {figure.name} = {found!r}, {evaluation.file} says {figure.value!r}: they are of "
                "different runs, certify again."
            )
    return log.radius, log.correct


def _measured_points(axes: "Axes | None", evaluation: Evaluation, title: str) -> "Axes":
    axes = _new_axes(title) if axes is None else axes
    clean = next(figure for figure in evaluation.figures if figure.metric == "accuracy")
    points = [(0.0, clean), *((figure.arguments["eps"], figure) for figure in _certified(evaluation))]
    _with_intervals(axes, points, _label(evaluation))
    axes.set_xlabel("l2 radius (pixels in [0, 1]); at 0 clean accuracy")
    axes.set_ylabel("certified accuracy (%)")
    return axes


def _accuracy_by_depth(evaluations: Sequence[Evaluation], title: str) -> "Axes | None":
    tracking = [one for one in evaluations if one.kind == "tracking"]
    if not tracking:
        return None
    axes = _new_axes(title)
    # the first kind of depth is what the task is about
    column = next(figure.key[-3] for figure in tracking[0].figures if "depth" in figure.arguments)
    for one in tracking:
        figures = [figure for figure in one.figures if figure.key[-3:-2] == (column,)]
        points = [(figure.arguments["depth"], 100.0 * figure.value) for figure in figures]
        depths, shares = zip(*(point for point in points if point[0] >= 0))
        axes.plot(depths, shares, marker="o", markersize=3.0, linewidth=1.0, label=one.name)
    axes.set_xlabel(column.removeprefix("by_").replace("_", " "))
    axes.set_ylabel("exact match (%)")
    axes.legend(loc="lower left")
    return axes


def _with_intervals(axes: "Axes", points: Sequence[tuple[float, Figure]], label: str) -> None:
    shares, below, above = [], [], []
    for _, figure in points:
        low, high = binomial_interval(figure.value, figure.count or 1, 0.95)
        shares.append(100.0 * figure.value)
        below.append(100.0 * (figure.value - low))
        above.append(100.0 * (high - figure.value))
    # no line: between the radii nothing was measured
    axes.errorbar([at for at, _ in points], shares, yerr=[below, above], fmt="o", capsize=3.0, label=label)
    axes.legend(loc="upper right")


def _certified(evaluation: Evaluation) -> list[Figure]:
    return [figure for figure in evaluation.figures if figure.metric == "certified_accuracy"]


def _label(evaluation: Evaluation) -> str:
    how = evaluation.figures[0].arguments
    return f"smoothed, sigma {how['sigma']:g}" if "sigma" in how else f"{evaluation.data}, {evaluation.split}"


def _new_axes(title: str) -> "Axes":
    try:
        from matplotlib.figure import Figure as Canvas
    except ImportError as error:
        raise ImportError('Plots need matplotlib: pip install "hf_lip[demo]".') from error
    axes = Canvas(figsize=(6.4, 4.2), layout="constrained").add_subplot()
    axes.set_ylim(0.0, 101.0)
    axes.grid(alpha=0.3)
    axes.set_title(title)
    return axes


def _save(axes: "Axes", path: Path, digest: str) -> None:
    staging = path.with_name(f".{os.getpid()}.{path.name}")
    try:
        figure: Any = axes.get_figure(root=True)
        figure.savefig(staging, dpi=150, metadata={_SOURCE: digest})
        os.replace(staging, path)
    finally:
        staging.unlink(missing_ok=True)
