# SPDX-License-Identifier: Apache-2.0
"""What an evaluation that is run again gives, and when a stated figure counts as reproduced."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray
from scipy.stats import t as student

from .figures import Evaluation, Figure
from .result_tables import binomial_interval


# of a sample's intervals, of all figures of an evaluation together
CONFIDENCE = 0.999
# relative, of means of numbers that are not votes, float64 on the same images
EXACT_MEAN = 1e-6

Item = TypeVar("Item")
Progress = Callable[[int, int], None]

__all__ = ["CONFIDENCE", "Found", "Judgement", "Request", "Rerun", "data_named", "evenly_spread", "found_in", "judge"]


@dataclass(frozen=True)
class Request:
    """How to evaluate again.

    Attributes:
        data: place of the data, None for where they were.
        limit, stride: every `stride`-th example, at most `limit` of them, evenly spread; all by default.
        device: such as "cpu" or "cuda:0".
        batch_size: examples a forward pass; None for the evaluation's own choice.
        progress: called with the numbers of examples done and to do.
    """

    data: str | None = None
    limit: int | None = None
    stride: int = 1
    device: str = "cpu"
    batch_size: int | None = None
    progress: Progress | None = None

    def __post_init__(self) -> None:
        for name in ("limit", "stride", "batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"`{name}` must be at least 1, got {value}.")


@dataclass(frozen=True)
class Found:
    """A figure measured again: of `count` answers to `independent` independent samples.

    `deviation` is the standard deviation over the samples of a mean that is no share.
    """

    value: float
    count: int
    independent: int
    deviation: float | None = None


@dataclass(frozen=True)
class Rerun:
    """Figures by their keys in the file, and what they were measured on.

    Attributes:
        complete: whether on all the examples of the card.
        tolerance: for a complete one: share of answers that may differ, because other hardware rounds otherwise.
        examples: in words, such as "450 images".
        wider: figures with a tolerance of their own.
    """

    found: Mapping[tuple[str, ...], Found]
    complete: bool
    tolerance: float
    examples: str
    wider: Mapping[tuple[str, ...], float] = field(default_factory=dict)


@dataclass(frozen=True)
class Judgement:
    """Whether a stated figure is reproduced, and the interval in which it had to lie."""

    reproduced: bool
    lowest: float
    highest: float


def judge(figure: Figure, rerun: Rerun) -> Judgement | None:
    """Compare a stated figure with the one found; None if the sample holds nothing to compare it with.

    On all examples a share may differ by the tolerance, and by one answer where that is less, but not at all where the
    tolerance is 0; a mean by the same relative tolerance, at least 1e-6. On a sample a share has to lie in the
    sample's Clopper-Pearson interval, a mean in its t interval. The intervals of all figures together have a
    confidence of 99.9 %: a right card fails in one check of a thousand.
    """
    tail = (1.0 - CONFIDENCE) / max(len(rerun.found), 1)
    tolerance = rerun.wider.get(figure.key, rerun.tolerance)
    found = rerun.found.get(figure.key)
    if found is None:
        return None
    if rerun.complete:
        if figure.count is not None:
            room = math.ceil(tolerance * figure.count) / figure.count + 1e-9
        else:
            room = max(tolerance, EXACT_MEAN) * max(abs(found.value), abs(figure.value))
        low, high = found.value - room, found.value + room
    elif figure.count is not None:
        low, high = binomial_interval(found.value, min(found.independent, found.count), 1.0 - tail)
    else:
        if found.deviation is None or found.independent < 2:
            return None
        reach = float(student.ppf(1.0 - tail / 2.0, found.independent - 1))
        room = reach * found.deviation / math.sqrt(found.independent) + EXACT_MEAN * abs(found.value)
        low, high = found.value - room, found.value + room
    return Judgement(low <= figure.value <= high, low, high)


def found_in(columns: Mapping[tuple[str, ...], NDArray]) -> dict[tuple[str, ...], Found]:
    """The means of columns with one entry for each independent example."""
    found = {}
    for key, values in columns.items():
        numbers = np.asarray(values, dtype=np.float64)
        deviation = float(numbers.std(ddof=1)) if len(numbers) > 1 else None
        found[key] = Found(float(numbers.mean()), len(numbers), len(numbers), deviation)
    return found


def evenly_spread(items: Sequence[Item], request: Request) -> list[Item]:
    """Every `stride`-th item, and of those `limit`, evenly spread: data are often sorted by class."""
    chosen = list(items[:: request.stride])
    if request.limit is None or request.limit >= len(chosen):
        return chosen
    return [chosen[(place * len(chosen)) // request.limit] for place in range(request.limit)]


@contextmanager
def data_named(evaluation: Evaluation) -> Iterator[None]:
    """Adds to errors about data that are not there how to say where they are."""
    try:
        yield
    except (FileNotFoundError, ValueError) as error:
        raise type(error)(
            f"{error} ({evaluation.file} was measured on {evaluation.data!r}: give its place with --data.)"
        ) from error
