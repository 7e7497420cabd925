# SPDX-License-Identifier: Apache-2.0
"""Plots. matplotlib's object-oriented interface and the Agg canvas only: no window, no global state."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike

from hf_lip.metrics import STANDARD_RADII, average_certified_radius, certified_accuracy_curve


if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["plot_certified_accuracy"]


def plot_certified_accuracy(
    radii: ArrayLike,
    correct: ArrayLike,
    *,
    ax: "Axes | None" = None,
    path: str | os.PathLike | None = None,
    title: str | None = None,
    label: str | None = None,
) -> "Axes":
    """Certified accuracy against the l2 radius, the exact step function, with the usual radii marked.

    Args:
        radii: certified radii (N,) in pixels of [0, 1], NaN where there is none.
        correct: whether each prediction is right, (N,).
        ax: axes to draw into, for several curves in one plot; by default a new figure.
        path: file to write, atomically; its suffix chooses the format.
        label: of the curve in the legend; the average certified radius is added to it.

    Returns:
        The axes; `.figure` is the figure.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: as `hf_lip.metrics.certified_accuracy`.
    """
    figure_class, canvas_class = _matplotlib()
    eps, accuracy = certified_accuracy_curve(radii, correct)
    acr = average_certified_radius(radii, correct)
    right = 0.1 if ax is None else ax.get_xlim()[1]
    if ax is None:
        figure = figure_class(figsize=(6.4, 4.2), layout="constrained")
        canvas_class(figure)
        ax = figure.add_subplot()
        _decorate(ax)
    # between two corners the fraction above a radius stays what it is at the left one
    (line,) = ax.plot(
        eps, 100.0 * accuracy, drawstyle="steps-post", label=f"{label or 'certified accuracy'} (ACR {acr:.3f})"
    )
    clean = 100.0 * float(np.mean(np.asarray(correct).astype(bool)))
    ax.plot([0.0], [clean], marker="o", color=line.get_color(), clip_on=False)
    ax.set_xlim(0.0, max(right, 1.05 * float(eps[-1])))
    ax.legend(loc="upper right")
    if title is not None:
        ax.set_title(title)
    if path is not None:
        _save(ax, Path(path))
    return ax


def _decorate(ax: "Axes") -> None:
    ax.set_xlabel("l2 radius (pixels in [0, 1])")
    ax.set_ylabel("certified accuracy (%)")
    ax.set_ylim(0.0, 100.0)
    ax.grid(alpha=0.3)
    for radius in STANDARD_RADII.values():
        ax.axvline(radius, color="0.6", linewidth=0.8, linestyle=":")
    # on an axis of their own, where neither curves nor the legend can cover the names
    names = ax.secondary_xaxis("top")
    names.set_xticks(list(STANDARD_RADII.values()), list(STANDARD_RADII), rotation=90, fontsize=7, color="0.4")
    names.tick_params(length=0)


def _save(ax: "Axes", path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    staging = path.with_name(f".{os.getpid()}.{path.name}")
    try:
        figure: Any = ax.get_figure(root=True)
        figure.savefig(staging, dpi=150)
        os.replace(staging, path)
    finally:
        staging.unlink(missing_ok=True)


def _matplotlib() -> tuple[type, type]:
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('Plots need matplotlib: pip install "hf_lip[demo]".') from error
    return Figure, FigureCanvasAgg
