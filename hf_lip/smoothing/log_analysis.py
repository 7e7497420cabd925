# SPDX-License-Identifier: Apache-2.0
"""What a published certification log can have come from: reads Cohen's and Salman's logs, inverts printed radii.

A log of `mono` certificates from n samples can print n + 1 radii only, one for each number of votes. Each printed
radius thus tells the votes up to a range, and an n, sigma or alpha for which some printed radius is out of reach is
not that of the log. (Most logs in the repository of Cohen et al. 2019 fit alpha = 0.01 and contradict the 0.001 of
their commands.)
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from hf_lip.smoothing.intervals import clopper_pearson_lower
from hf_lip.smoothing.radii import mono_radius
from hf_lip.smoothing.samples import ABSTAIN


_CERTIFY = ("idx", "label", "predict", "radius", "correct", "time")
_PREDICT = ("idx", "label", "predict", "correct", "time")
_CLOCK = re.compile(r"(?:(\d+) days?, )?(\d+):(\d\d):(\d\d(?:\.\d+)?)")

__all__ = [
    "PublishedLog",
    "attainable_radii",
    "consistent_alphas",
    "read_published_log",
    "unattainable_rows",
    "vote_ranges",
]


@dataclass(frozen=True)
class PublishedLog:
    """Columns of a log of N images.

    Attributes:
        idx, label, predict: (N,) int64; predict is -1 for abstentions.
        correct: (N,) bool, predict == label.
        seconds: (N,) float64 spent on each image.
        radius: (N,) float64 as printed, None for a log of predictions.
        printed: the radii's texts, None for a log of predictions.
    """

    idx: NDArray[np.int64]
    label: NDArray[np.int64]
    predict: NDArray[np.int64]
    correct: NDArray[np.bool_]
    seconds: NDArray[np.float64]
    radius: NDArray[np.float64] | None
    printed: tuple[str, ...] | None

    @property
    def abstained(self) -> NDArray[np.bool_]:
        """(N,) images without a class."""
        result: NDArray[np.bool_] = self.predict == ABSTAIN
        return result

    @property
    def radius_format(self) -> str:
        """Format of the printed radii: ".3" (three significant digits) or ".4f".

        Raises:
            ValueError: a log of predictions.
        """
        fixed = all(re.fullmatch(r"\d+\.\d{4}", text) for text in _printed(self))
        return ".4f" if fixed else ".3"


def read_published_log(source: str | Path | Iterable[str]) -> PublishedLog:
    """Read a log with Cohen's columns (tab separated): idx label predict radius correct time, or without radius.

    Args:
        source: path of the log, or its lines.

    Raises:
        ValueError: other columns, a line that does not have them, a `correct` that contradicts predict == label.
    """
    if isinstance(source, (str, Path)):
        source = Path(source).read_text(encoding="utf-8").splitlines()
    lines = [line.rstrip("\r\n") for line in source]
    header = tuple(lines[0].split("\t")) if lines else ()
    if header not in (_CERTIFY, _PREDICT):
        raise ValueError(f"The log must start with the columns {' '.join(_CERTIFY)} (tab separated), got {lines[:1]}.")
    rows = []
    for number, line in enumerate(lines[1:], start=2):
        if not line:
            continue
        fields = dict(zip(header, line.split("\t")))
        try:
            row = {name: int(fields[name]) for name in ("idx", "label", "predict", "correct")}
            seconds = _seconds(fields["time"])
            radius = float(fields.get("radius", "nan"))
        except (KeyError, ValueError) as error:
            raise ValueError(f"Line {number} of the log is no row of {' '.join(header)}: {line!r}.") from error
        if row["correct"] != int(row["predict"] == row["label"]):
            raise ValueError(f"Line {number} of the log has correct={row['correct']} against its classes: {line!r}.")
        rows.append((row, seconds, radius, fields.get("radius", "")))
    if not rows:
        raise ValueError("The log has no rows.")
    column = {name: np.array([row[name] for row, *_ in rows], dtype=np.int64) for name in rows[0][0]}
    certify = header == _CERTIFY
    return PublishedLog(
        column["idx"],
        column["label"],
        column["predict"],
        column["correct"].astype(bool),
        np.array([seconds for _, seconds, _, _ in rows]),
        np.array([radius for _, _, radius, _ in rows]) if certify else None,
        tuple(text for *_, text in rows) if certify else None,
    )


def attainable_radii(n: int, sigma: float, alpha: float) -> NDArray[np.float64]:
    """(n + 1,) `mono` radii of 0..n votes of n, ascending; 0 below the smallest number that certifies.

    Raises:
        ValueError: an argument out of range.
    """
    return np.asarray(mono_radius(_bounds(n, alpha), sigma))


def vote_ranges(log: PublishedLog, *, n: int, sigma: float, alpha: float) -> NDArray[np.int64]:
    """(N, 2) smallest and largest number of votes that prints each radius; (-1, -1) where none does.

    An abstention is printed as radius 0 and has every number of votes that does not certify.

    Raises:
        ValueError: a log of predictions, an argument out of range.
    """
    radii, style = attainable_radii(n, sigma, alpha), log.radius_format
    ranges = np.full((len(log.idx), 2), -1, dtype=np.int64)
    first = int(np.searchsorted(radii, 0.0, side="right"))
    known: dict[str, tuple[int, int]] = {}
    for row, (text, abstained) in enumerate(zip(_printed(log), log.abstained)):
        if abstained:
            ranges[row] = (0, first - 1) if float(text) == 0.0 else (-1, -1)
            continue
        if text not in known:
            known[text] = _votes_that_print(text, style, radii, first)
        ranges[row] = known[text]
    return ranges


def unattainable_rows(log: PublishedLog, *, n: int, sigma: float, alpha: float) -> NDArray[np.int64]:
    """Rows whose printed radius no number of votes gives. Arguments and errors as `vote_ranges`."""
    return np.flatnonzero(vote_ranges(log, n=n, sigma=sigma, alpha=alpha)[:, 0] < 0)


def consistent_alphas(
    log: PublishedLog, *, n: int, sigma: float, alphas: Sequence[float] = (0.001, 0.01)
) -> tuple[float, ...]:
    """Those of `alphas` for which every printed radius of the log is attainable. Errors as `vote_ranges`."""
    return tuple(alpha for alpha in alphas if not len(unattainable_rows(log, n=n, sigma=sigma, alpha=alpha)))


@lru_cache(maxsize=8)
def _bounds(n: int, alpha: float) -> NDArray[np.float64]:
    return np.asarray(clopper_pearson_lower(np.arange(n + 1), n, alpha))


def _votes_that_print(text: str, style: str, radii: NDArray[np.float64], first: int) -> tuple[int, int]:
    # candidates lie within a unit of the last digit that is printed
    value = float(text)
    width = 1e-4 if style == ".4f" else 1e-2 * 10.0 ** np.floor(np.log10(max(value, 1e-12)))
    low, high = np.searchsorted(radii, [value - width, value + width])
    fits = [k for k in range(max(int(low), first), int(high)) if format(radii[k], style) == text]
    return (fits[0], fits[-1]) if fits else (-1, -1)


def _printed(log: PublishedLog) -> tuple[str, ...]:
    if log.printed is None:
        raise ValueError("This log holds predictions without radii: a log of certificates is needed.")
    return log.printed


def _seconds(text: str) -> float:
    match = _CLOCK.fullmatch(text)
    if match is None:
        return float(text)
    days, hours, minutes, seconds = match.groups()
    return 86_400.0 * int(days or 0) + 3600.0 * int(hours) + 60.0 * int(minutes) + float(seconds)
