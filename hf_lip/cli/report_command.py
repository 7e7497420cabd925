# SPDX-License-Identifier: Apache-2.0
"""`hf-lip report`."""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.box import SIMPLE
from rich.markup import escape
from rich.table import Table

from hf_lip.cli.certify_command import check_output, parse_radii
from hf_lip.cli.console import errors_as_one_line, wide_console
from hf_lip.metrics import (
    abstention_rate,
    average_certified_radius,
    certified_accuracy,
    certified_accuracy_envelope,
    probability_distribution,
)


_RADII = "0,0.25,0.5,0.75,1.0,1.5,2.0"


@dataclass(frozen=True)
class _Run:
    """A log's columns; `alphas` are those it was made with or can have been made with, None where unknown."""

    name: str
    indices: list[int]
    radii: np.ndarray
    correct: np.ndarray
    predict: np.ndarray
    p_lower: list[float] | None
    alphas: tuple[float, ...] | None

    def summary(self, thresholds: dict[str, float]) -> dict[str, Any]:
        return {
            "name": self.name,
            "num_images": len(self.indices),
            "images": self.indices,
            "accuracy": float(self.correct.mean()),
            "certified_accuracy": {
                name: certified_accuracy(self.radii, self.correct, eps) for name, eps in thresholds.items()
            },
            "average_certified_radius": average_certified_radius(self.radii, self.correct),
            "abstention_rate": abstention_rate(self.predict == -1),
            "p_lower_distribution": None if self.p_lower is None else probability_distribution(self.p_lower),
            "consistent_alphas": None if self.alphas is None else list(self.alphas),
        }


def report(
    logs: Annotated[
        list[Path],
        typer.Argument(help="counts.jsonl of `hf-lip certify`, or tab separated logs with Cohen's columns."),
    ],
    out: Annotated[Path, typer.Option(help="Folder for report.json and certified_accuracy.png.")] = Path(
        "hf-lip-report"
    ),
    radii: Annotated[str, typer.Option(help="Radii of the table, comma separated; fractions allowed.")] = _RADII,
    n: Annotated[int, typer.Option(help="Samples behind published logs, to find their alpha.")] = 100_000,
    sigma: Annotated[
        float | None, typer.Option(help="Noise of published logs; default: as in the file name, sigma_0.25.")
    ] = None,
) -> None:
    """Compare certification logs: certified accuracy, ACR, abstentions, their alpha, and the best at every radius."""
    with errors_as_one_line():
        thresholds = parse_radii(radii)
        check_output(out)
        runs = [_read(path, n, sigma) for path in logs]
        _write(runs, thresholds, out)


def _read(path: Path, n: int, sigma: float | None) -> _Run:
    if path.suffix == ".jsonl":
        return _read_own(path)
    from hf_lip.smoothing.log_analysis import consistent_alphas, read_published_log

    log = read_published_log(path)
    if log.radius is None:
        raise ValueError(f"{path} holds predictions without radii: give logs of certificates.")
    named = re.search(r"sigma_(\d+(?:\.\d+)?)", path.name)
    sigma = float(named[1]) if sigma is None and named else sigma
    alphas = None if sigma is None else consistent_alphas(log, n=n, sigma=sigma)
    # folders name the training and the split, the file the noise
    return _Run("/".join(path.parts[-3:]), log.idx.tolist(), log.radius, log.correct, log.predict, None, alphas)


def _read_own(path: Path) -> _Run:
    from hf_lip.smoothing.logs import read_log

    settings, records = read_log(path)
    radii = [record.radius for record in records if record.radius is not None]
    if not records or len(radii) < len(records):
        raise ValueError(f"{path} holds no certificates: give logs of finished or running certifications.")
    bounds = [record.p_lower for record in records if record.p_lower is not None]
    name = f"{Path(settings['model']).name}, {settings['method']}, sigma {settings['sigma']}"
    return _Run(
        name,
        [record.idx for record in records],
        np.array(radii),
        np.array([record.correct for record in records]),
        np.array([record.predict for record in records]),
        bounds if len(bounds) == len(records) else None,
        (settings["alpha"],),
    )


def _write(runs: list[_Run], thresholds: dict[str, float], out: Path) -> None:
    from hf_lip.models.certificate import write_text_atomically
    from hf_lip.plots import plot_certified_accuracy, plot_envelope

    console = wide_console()
    table = Table("log", "images", *map(escape, thresholds), "ACR", "abstained", "alpha", box=SIMPLE)
    summaries = [run.summary(thresholds) for run in runs]
    for summary in summaries:
        alphas = summary["consistent_alphas"]
        table.add_row(
            escape(summary["name"]),
            str(summary["num_images"]),
            *(f"{100 * share:.2f}" for share in summary["certified_accuracy"].values()),
            f"{summary['average_certified_radius']:.4f}",
            f"{100 * summary['abstention_rate']:.2f}",
            "?" if alphas is None else " or ".join(map(str, alphas)) or "none fits",
        )
    content: dict[str, Any] = {"runs": summaries}
    # a curve for each log, also of two logs with one name
    curves = {f"{run.name} #{k}" if k else run.name: (run.radii, run.correct) for k, run in _numbered(runs)}
    path = out / "certified_accuracy.png"
    if len(runs) > 1 and len({tuple(run.indices) for run in runs}) == 1:
        eps, accuracy, names = certified_accuracy_envelope(curves, list(thresholds.values()))
        table.add_row("envelope", str(len(runs[0].indices)), *(f"{100 * share:.2f}" for share in accuracy), "", "", "")
        content["envelope"] = {"radii": eps.tolist(), "certified_accuracy": accuracy.tolist(), "best": names}
        plot_envelope(curves, path=path)
    else:
        ax = None
        for name, (radii, correct) in curves.items():
            ax = plot_certified_accuracy(radii, correct, ax=ax, label=name, path=path)
    console.print(table)
    write_text_atomically(out / "report.json", json.dumps(content, indent=2) + "\n")
    for file in (out / "report.json", path):
        console.print(f"Wrote {file}", markup=False, highlight=False, soft_wrap=True)


def _numbered(runs: list[_Run]) -> list[tuple[int, _Run]]:
    """Each run with the number of earlier ones of its name."""
    names = [run.name for run in runs]
    return [(names[:place].count(run.name), run) for place, run in enumerate(runs)]
