# SPDX-License-Identifier: Apache-2.0
"""Tables of measured figures."""

from collections.abc import Sequence

from scipy.stats import beta

from ..card_text import markdown_table
from .figures import Evaluation, Figure
from .published import PublishedResult


_CONFIDENCE = 0.95
# shares of more answers than this are printed with two decimals
_ONE_DECIMAL = 1000
# so many depths are all stated
_ALL_DEPTHS = 20

__all__ = ["binomial_interval", "by_depth_table", "figure_text", "percent", "results_table", "shown_figures"]


def results_table(evaluation: Evaluation, published: Sequence[PublishedResult]) -> str:
    """The figures of an evaluation without those by depth, with binomial intervals, published ones beside them."""
    figures = [figure for figure in evaluation.figures if "depth" not in figure.arguments]
    # questions on one text are not independent: no binomial interval for them
    third = {"tracking": ["of"], "language": []}.get(evaluation.kind, ["95 % interval"])
    rows = []
    for figure in figures:
        row = [figure.name, figure_text(figure.value, figure.count)]
        if evaluation.kind == "tracking":
            row.append(f"{figure.count:,}")
        elif third:
            row.append(_interval_text(figure))
        row += [
            figure_text(result.values[figure.name], figure.count and 1) if figure.name in result.values else ""
            for result in published
        ]
        rows.append(row)
    return markdown_table(["", "measured", *third, *("published" for _ in published)], rows)


def by_depth_table(evaluation: Evaluation, column: str) -> str:
    """Exact match by one kind of depth, with the least layers of softmax attention where they are known."""
    figures = [figure for figure in shown_figures(evaluation) if figure.key[-3:-2] == (column,)]
    least = ["minimal_layers" in figure.arguments for figure in figures]
    header = [column.removeprefix("by_").replace("_", " "), "exact match", "answers"]
    rows = []
    for figure in figures:
        depth = figure.arguments["depth"]
        row = ["none" if depth < 0 else str(depth), figure_text(figure.value, figure.count), f"{figure.count:,}"]
        rows.append([*row, str(figure.arguments.get("minimal_layers", ""))] if any(least) else row)
    return markdown_table([*header, *(["least layers of softmax attention"] if any(least) else [])], rows)


def shown_figures(evaluation: Evaluation) -> list[Figure]:
    """The figures that a card states. Of many depths those are 2^k - 1 and 2^k, the last one, and the one with the
    lowest exact match."""
    shown = []
    columns: dict[str, list[Figure]] = {}
    for figure in evaluation.figures:
        if "depth" in figure.arguments:
            columns.setdefault(figure.key[-3], []).append(figure)
        else:
            shown.append(figure)
    for figures in columns.values():
        if len(figures) > _ALL_DEPTHS:
            marked = {2**power - less for power in range(32) for less in (0, 1)}
            lowest = min(figures, key=lambda figure: figure.value)
            figures = [
                figure
                for figure in figures
                if figure.arguments["depth"] in {-1, *marked} or figure is figures[-1] or figure is lowest
            ]
        shown += figures
    return shown


def figure_text(value: float, count: int | None) -> str:
    """A figure as it is printed: a share (`count` is given) in per cent, another number with four digits."""
    return f"{value:.4g}" if count is None else percent(value, count)


def percent(share: float, count: int) -> str:
    """A share of `count` answers in per cent."""
    return f"{100.0 * share:.{1 if count <= _ONE_DECIMAL else 2}f} %"


def binomial_interval(share: float, count: float, confidence: float) -> tuple[float, float]:
    """Clopper-Pearson interval of a probability from the share of `count` independent trials, which need not be whole
    numbers where trials stand for groups."""
    tail, right = (1.0 - confidence) / 2.0, share * count
    low = float(beta.ppf(tail, right, count - right + 1.0)) if right > 0.0 else 0.0
    high = float(beta.ppf(1.0 - tail, right + 1.0, count - right)) if right < count else 1.0
    return low, high


def _interval_text(figure: Figure) -> str:
    if figure.count is None:
        return ""
    low, high = binomial_interval(figure.value, figure.count, _CONFIDENCE)
    return f"{percent(low, 1).removesuffix(' %')} to {percent(high, 1)}"
