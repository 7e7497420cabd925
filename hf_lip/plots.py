# SPDX-License-Identifier: Apache-2.0
"""Plots. matplotlib's object-oriented interface and the Agg canvas only: no window, no global state."""

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike

from hf_lip.metrics import (
    STANDARD_RADII,
    average_certified_radius,
    certified_accuracy_curve,
    certified_accuracy_envelope,
)


if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from hf_lip.checkpoints.spectrum_report import LayerSpectrum

__all__ = ["plot_certified_accuracy", "plot_envelope", "plot_probabilities", "plot_spectrum"]


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


def plot_envelope(
    runs: Mapping[Any, tuple[ArrayLike, ArrayLike]],
    *,
    path: str | os.PathLike | None = None,
    title: str | None = None,
) -> "Axes":
    """Certified accuracy of several runs, such as one for every sigma, and the best of them at every radius.

    Args:
        runs: name -> (radii, correct), on the same images; the names go into the legend.
        path, title: as in `plot_certified_accuracy`.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: as `hf_lip.metrics.certified_accuracy_envelope`.
    """
    eps, accuracy, _ = certified_accuracy_envelope(runs)
    ax: Axes | None = None
    for name, (radii, correct) in runs.items():
        ax = plot_certified_accuracy(radii, correct, ax=ax, label=str(name), title=title)
    assert ax is not None
    ax.plot(eps, 100.0 * accuracy, drawstyle="steps-post", color="0.3", linewidth=2.5, alpha=0.4, label="envelope")
    ax.legend(loc="upper right")
    if path is not None:
        _save(ax, Path(path))
    return ax


def plot_probabilities(
    p_lower: ArrayLike, correct: ArrayLike, *, path: str | os.PathLike | None = None, title: str | None = None
) -> "Axes":
    """Histogram of the lower bounds of pA, the probability of the predicted class under noise, right and wrong apart.

    Args:
        p_lower: (N,), in [0, 1].
        correct: whether each prediction is right, (N,).
        path, title: as in `plot_certified_accuracy`.

    Raises:
        ImportError: matplotlib is not installed.
    """
    figure_class, canvas_class = _matplotlib()
    figure = figure_class(figsize=(6.4, 3.6), layout="constrained")
    canvas_class(figure)
    ax = figure.add_subplot()
    values, right = np.asarray(p_lower, dtype=np.float64), np.asarray(correct).astype(bool)
    ax.hist(
        [values[right], values[~right]],
        bins=20,
        range=(0.0, 1.0),
        stacked=True,
        label=[f"right ({int(right.sum())})", f"wrong or abstained ({int((~right).sum())})"],
        weights=[np.full(int(part.sum()), 100.0 / values.size) for part in (right, ~right)],
    )
    ax.axvline(0.5, color="0.6", linewidth=0.8, linestyle=":")
    ax.set_xlim(0.0, 1.0)
    ax.set_xlabel("lower bound of the class probability under noise")
    ax.set_ylabel("images (%)")
    ax.legend(loc="upper left")
    if title is not None:
        ax.set_title(title)
    if path is not None:
        _save(ax, Path(path))
    return ax


def plot_spectrum(
    layers: "Sequence[LayerSpectrum]",
    *,
    ax: "Axes | None" = None,
    path: str | os.PathLike | None = None,
    title: str | None = None,
) -> "Axes":
    """Spectral norms of linear layers against their depth, on a logarithmic scale, coloured by kind.

    Each layer is a point at the upper end of its interval, with a line down to the lower end. Norms that are 0 or not
    finite have no place on the scale; the legend says how many of a kind were left out.

    Args:
        layers: rows of a `SpectrumReport`; those that are not linear are left out.
        ax, path, title: as in `plot_certified_accuracy`.

    Returns:
        The axes; `.figure` is the figure.

    Raises:
        ImportError: matplotlib is not installed.
    """
    figure_class, canvas_class = _matplotlib()
    if ax is None:
        figure = figure_class(figsize=(8.0, 4.2), layout="constrained")
        canvas_class(figure)
        ax = figure.add_subplot()
    linear = [layer for layer in layers if layer.linear]
    for kind in sorted({layer.kind for layer in linear}):
        members = [layer for layer in linear if layer.kind == kind]
        shown = [layer for layer in members if 0.0 < layer.upper < math.inf]
        left_out = f", {len(members) - len(shown)} not shown" if len(shown) < len(members) else ""
        uppers = [layer.upper for layer in shown]
        widths = [layer.upper - layer.lower for layer in shown]
        ax.errorbar(
            [layer.depth for layer in shown], uppers, yerr=[widths, [0.0] * len(shown)], fmt="o", markersize=4.0,
            elinewidth=1.0, label=f"{kind.replace('_', ' ')} ({len(members)}{left_out})",
        )  # fmt: skip
    ax.set_yscale("log")
    ax.set_xlabel("depth (layers in the order of the network)")
    ax.set_ylabel("spectral norm")
    ax.axhline(1.0, color="0.6", linewidth=0.8, linestyle=":")
    ax.grid(alpha=0.3)
    if linear:
        ax.legend(loc="best", fontsize=8)
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
