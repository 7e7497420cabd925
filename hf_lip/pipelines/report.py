# SPDX-License-Identifier: Apache-2.0
"""Reports of certification runs: a summary ready for JSON, plots, and certificates computed again from a log."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hf_lip.metrics import (
    abstention_rate,
    average_certified_radius,
    certified_accuracy,
    probability_distribution,
)
from hf_lip.models.certificate import write_text_atomically
from hf_lip.pipelines.settings import RADIUS_UNIT
from hf_lip.plots import plot_certified_accuracy, plot_probabilities
from hf_lip.smoothing.intervals import dataset_lower_bound
from hf_lip.smoothing.logs import ImageRecord
from hf_lip.smoothing.procedures import certify_counts_batch


# failure probability of the statement about the whole data set, beside that of the single certificates
_RHO = 0.001

__all__ = ["recertify", "summarise", "write_report"]


def summarise(
    records: Sequence[ImageRecord], thresholds: dict[str, float], *, alpha: float | None = None
) -> dict[str, Any]:
    """Figures of a run over all its images, abstentions counted as wrong.

    Args:
        records: of the run.
        thresholds: name -> radius of the certified accuracies.
        alpha: failure probability of each certificate, for smoothing.

    Returns:
        Plain Python values. With `alpha` also, for every threshold, a lower bound of the certified accuracy that
        allows for false certificates and holds with probability 1 - 0.001; the distribution of the lower bounds of pA;
        and the samples used. Predictions have no radii, and nothing that comes of them.
    """
    correct = np.array([record.correct for record in records])
    summary: dict[str, Any] = {
        "method": "/".join(sorted({record.method for record in records})),
        "num_images": len(records),
        "clean_accuracy": float(correct.mean()),
        "abstention_rate": abstention_rate([record.predict == -1 for record in records]),
        "radius_unit": RADIUS_UNIT,
        "seconds": float(sum(record.time for record in records)),
        "seconds_per_image": float(np.mean([record.time for record in records])),
        "images": [record.idx for record in records],
    }
    radii = [record.radius for record in records if record.radius is not None]
    if len(radii) == len(records):
        accuracies = {name: certified_accuracy(radii, correct, eps) for name, eps in thresholds.items()}
        summary["certified_accuracy"] = accuracies
        summary["average_certified_radius"] = average_certified_radius(radii, correct)
        if alpha is not None:
            summary["certified_accuracy_lower_bound"] = {
                name: dataset_lower_bound(accuracy, len(records), alpha, _RHO) for name, accuracy in accuracies.items()
            }
    bounds = [record.p_lower for record in records if record.p_lower is not None]
    if bounds:
        summary["p_lower_distribution"] = probability_distribution(bounds)
    if alpha is not None:
        summary["samples_per_image"] = float(np.mean([record.n for record in records]))
    return summary


def write_report(out: Path, records: Sequence[ImageRecord], summary: dict[str, Any], title: str) -> list[Path]:
    """`summary.json`, and for certificates `certified_accuracy.png` and (with probabilities) `probabilities.png`.

    Returns:
        The files written.

    Raises:
        ImportError: matplotlib is not installed.
    """
    written = [out / "summary.json"]
    write_text_atomically(written[0], json.dumps(summary, indent=2, allow_nan=False) + "\n")
    correct = [record.correct for record in records]
    if "certified_accuracy" in summary:
        written.append(out / "certified_accuracy.png")
        radii: Any = [record.radius for record in records]
        plot_certified_accuracy(radii, correct, path=written[-1], title=title, label=summary["method"])
    if "p_lower_distribution" in summary:
        written.append(out / "probabilities.png")
        bounds: Any = [record.p_lower for record in records]
        plot_probabilities(bounds, correct, path=written[-1], title=title)
    return written


def recertify(
    settings: dict[str, Any], records: Sequence[ImageRecord], *, method: str, alpha: float
) -> list[ImageRecord]:
    """Certificates of another procedure for votes, or another alpha, from the votes of a log, without the model.

    Choose method and alpha before looking at results: the best of several is not covered by alpha.

    Args:
        settings, records: of `read_log`.
        method: "mono", "bonferroni", "cpm" or "auto".
        alpha: failure probability of one certificate.

    Raises:
        ValueError: a log of predictions, of soft scores, or of adaptive sampling, whose votes were stopped at a moment
            of their own choosing; an unknown method; `alpha` out of range.
    """
    if settings["mode"] != "certify":
        raise ValueError("The log holds predictions: they have no selection votes to certify from.")
    if settings["budget"] != "fixed":
        raise ValueError(
            "The log is of adaptive sampling, which stopped at numbers of samples that the votes chose: procedures "
            "for a fixed number do not hold for it."
        )
    selection = [record.selection_counts for record in records if record.selection_counts is not None]
    counts = [record.counts for record in records if record.counts is not None]
    if not len(selection) == len(counts) == len(records):
        raise ValueError("The log holds soft scores and no votes: certify again with a method of votes.")
    kind: Any = method
    decisions = certify_counts_batch(kind, selection, counts, sigma=settings["sigma"], alpha=alpha)
    return [
        dataclasses.replace(
            record,
            predict=decision.predict,
            radius=decision.radius,
            correct=decision.predict == record.label,
            p_lower=decision.p_lower,
            p_upper_other=decision.p_upper_other,
            candidate=decision.candidate,
            method=decision.method,
            details=decision.details,
        )
        for record, decision in zip(records, decisions)
    ]
