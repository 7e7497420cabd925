# SPDX-License-Identifier: Apache-2.0
"""What `hf-lip certify` prints."""

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table


def print_summary(summary: dict[str, Any], files: list[Path]) -> None:
    """The table of a report, the small print, and the files written."""
    console = Console()
    alpha = summary["settings"].get("alpha")
    title = f"{summary['model']} on {summary['data']} ({summary['split']}, {summary['num_images']} images)"
    table = Table("", summary["method"], title=escape(title), title_justify="left")
    table.columns[1].justify = "right"
    clean = "clean accuracy" if alpha is None else "accuracy of the smoothed classifier (abstentions are wrong)"
    table.add_row(clean, _percent(summary["clean_accuracy"]))
    for name, accuracy in summary.get("certified_accuracy", {}).items():
        table.add_row(f"certified accuracy at {escape(name)}", _percent(accuracy))
    for name, bound in summary.get("certified_accuracy_lower_bound", {}).items():
        table.add_row(f"... less what chance can add, at {escape(name)}", _percent(bound))
    table.add_row("abstentions", _percent(summary["abstention_rate"]))
    if "average_certified_radius" in summary:
        table.add_row("average certified radius (ACR)", f"{summary['average_certified_radius']:.4f}")
    if summary.get("lipschitz_constant") is not None:
        table.add_row("certified Lipschitz constant", f"{summary['lipschitz_constant']:.9g}")
    if alpha is not None:
        table.add_row("noisy copies per image", f"{summary['samples_per_image']:,.0f}")
        table.add_row("seconds per image", f"{summary['seconds_per_image']:.3f}")
    table.add_row("time", f"{summary['seconds']:.2f} s")
    console.print(table)
    console.print(f"Radii are {summary['radius_unit']}.", markup=False, highlight=False)
    if alpha is not None:
        console.print(_small_print(summary["settings"]), markup=False, highlight=False, soft_wrap=True)
    for file in files:
        console.print(f"Wrote {file}", markup=False, highlight=False, soft_wrap=True)


def _percent(share: float) -> str:
    return f"{100 * share:.2f} %"


def _small_print(settings: dict[str, Any]) -> str:
    what = "prediction" if settings["mode"] == "predict" else "certificate"
    samples = f"n={settings['n']}" if settings["mode"] == "predict" else f"n0={settings['n0']}, n={settings['n']}"
    least = " at most" if settings["budget"] == "adaptive" else ""
    scores = "" if settings["score_map"] == "hardmax" else f", scores {settings['score_map']}"
    return (
        f"Smoothing with sigma={settings['sigma']}, {samples}{least}, noise {settings['noise']}{scores}, base "
        f"classifier {settings['base']}: each {what} is of the smoothed classifier and wrong with probability at most "
        f"{settings['alpha']}."
    )
