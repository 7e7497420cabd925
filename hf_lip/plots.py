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
    from matplotlib.figure import Figure

    from hf_lip.checkpoints.spectrum_report import LayerSpectrum

__all__ = ["plot_certified_accuracy", "plot_envelope", "plot_probabilities", "plot_provenance", "plot_spectrum"]

# most tokens of a text in one line of a provenance plot
_LINE = 48


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
        radii: certified radii (N,) in pixels of [0, 1], 0 where there is no certificate.
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


def plot_provenance(
    tokens: Sequence[str],
    rows: Mapping[str, ArrayLike],
    *,
    answer: int | None = None,
    path: str | os.PathLike | None = None,
    title: str | None = None,
) -> "Figure":
    """The tokens of a text, line after line, and above them how much of each an output was made of.

    Every line has one strip a row of values, coloured on one scale: from 0 to the largest value, or symmetrical about
    0 where there are negative ones. Lines are broken as in a text, so that hundreds of tokens stay readable.

    Args:
        tokens: (n,) strings; long ones are cut.
        rows: name -> values (n,), such as the mean of a layer's heads and each head of it.
        answer: number of tokens that belong to the text; those from there on are the answer's, and printed in bold.
        path: file to write, atomically; its suffix chooses the format.

    Returns:
        The figure; it has one axes a line of text.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: no token or row, or rows of another length.
    """
    figure_class, canvas_class = _matplotlib()
    names, values = list(rows), [np.asarray(row, dtype=np.float64) for row in rows.values()]
    if not tokens or not values or any(row.shape != (len(tokens),) for row in values):
        raise ValueError(
            f"`rows` must hold one value for each of {len(tokens)} tokens, and there must be some of each."
        )
    grid = np.stack(values)
    largest = float(np.abs(grid).max()) or 1.0
    lowest, colours = (-largest, "RdBu_r") if grid.min() < 0.0 else (0.0, "Blues")
    # lines of one length, as far as that goes
    wide = -(-len(tokens) // -(-len(tokens) // _LINE))
    starts = range(0, len(tokens), wide)
    height = 0.18 * len(names) + 0.75
    figure = figure_class(figsize=(2.2 + 0.24 * max(wide, 12), 0.7 + height * len(starts)), layout="constrained")
    canvas_class(figure)
    image: Any = None
    for line, start in enumerate(starts):
        ax = figure.add_subplot(len(starts), 1, line + 1)
        part = grid[:, start : start + wide]
        # the last line is filled up with nothing, so that its columns are as wide as the others
        filled = np.full((len(names), wide), np.nan)
        filled[:, : part.shape[1]] = part
        image = ax.imshow(filled, aspect="auto", cmap=colours, vmin=lowest, vmax=largest, interpolation="nearest")
        ax.set_yticks(range(len(names)), names, fontsize=7)
        ax.set_xticks(range(part.shape[1]), [_short(token) for token in tokens[start : start + wide]], rotation=90)
        for offset, label in enumerate(ax.get_xticklabels()):
            label.set_fontsize(7)
            label.set_parse_math(False)
            if answer is not None and start + offset >= answer:
                label.set_fontweight("bold")
        ax.set_xticks(np.arange(part.shape[1] + 1) - 0.5, minor=True)
        ax.set_yticks(np.arange(len(names) + 1) - 0.5, minor=True)
        ax.grid(which="minor", color="0.9", linewidth=0.4)
        ax.tick_params(which="both", length=0)
        ax.set_frame_on(False)
    figure.colorbar(image, ax=figure.axes, fraction=0.02, pad=0.01)
    if title is not None:
        figure.suptitle(title, fontsize=9, parse_math=False)
    if path is not None:
        _save(figure.axes[0], Path(path))
    return figure


def _short(token: str) -> str:
    text = " ".join(token.split()) or token
    return text if len(text) <= 12 else f"{text[:11]}…"


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
