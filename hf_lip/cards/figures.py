# SPDX-License-Identifier: Apache-2.0
"""What a card may state: figures that an evaluation measured and wrote into a JSON file, with what they are of."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path, PurePath
from typing import Any, Literal


Kind = Literal["classifier", "certification", "tracking", "language"]

__all__ = ["Evaluation", "Figure", "Kind", "data_name", "number", "radius_of", "read_json_object", "share", "take"]


@dataclass(frozen=True)
class Figure:
    """One measured number.

    Attributes:
        metric: type in the model index, such as `accuracy` or `exact_match`.
        name: such as "certified accuracy at 36/255".
        value: as in the file, shares as fractions of 1.
        key: where in the file, such as `("certified_accuracy", "36/255")`.
        arguments: what produced it, for the model index.
        count: for a share: of how many.
    """

    metric: str
    name: str
    value: float
    key: tuple[str, ...]
    arguments: dict[str, Any] = field(default_factory=dict)
    count: int | None = None


@dataclass(frozen=True)
class Evaluation:
    """Figures of one evaluation on one data set.

    Attributes:
        file: path in the folder of the card, with forward slashes.
        kind: what was evaluated, and so how it is evaluated again.
        name: of the evaluation in a file that has several, else empty.
        data: name of the data set, without its place.
        split: of the data.
        content: of the whole file.
    """

    file: str
    kind: Kind
    data: str
    split: str
    figures: tuple[Figure, ...]
    content: Mapping[str, Any]
    name: str = ""

    @property
    def task(self) -> str:
        return "image-classification" if self.kind in ("classifier", "certification") else "text-generation"

    def source_of(self, figure: Figure) -> str:
        """Where a figure stands in the files, such as "results.json: certified_accuracy, 36/255"."""
        return f"{self.file}: {', '.join(figure.key)}"

    @property
    def where(self) -> str:
        """The file, and the evaluation in it."""
        return f"{self.file}, {self.name}" if self.name else self.file


def read_json_object(path: Path) -> dict[str, Any]:
    """A JSON file that holds an object.

    Raises:
        ValueError: it is not one, or holds NaN.
    """

    def refuse(token: str) -> None:
        raise ValueError(f"{path} holds {token}: a number that nobody measured. Run the evaluation again.")

    try:
        content = json.loads(path.read_text(encoding="utf-8"), parse_constant=refuse)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid JSON ({error}): run the evaluation again.") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a JSON object: run the evaluation again.")
    return content


def take(content: Mapping[str, Any], key: tuple[str, ...], file: str) -> Any:
    """The entry at a path of keys.

    Raises:
        ValueError: it is missing.
    """
    found: Any = content
    for place, part in enumerate(key):
        if not isinstance(found, Mapping) or part not in found:
            raise ValueError(f"{file} has no {'.'.join(key[: place + 1])}: run the evaluation again.")
        found = found[part]
    return found


def number(content: Mapping[str, Any], key: tuple[str, ...], file: str, *, least: float = 0.0) -> float:
    """A finite number of at least `least`.

    Raises:
        ValueError: something else.
    """
    value = take(content, key, file)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not least <= value < math.inf:
        raise ValueError(f"{file} has {'.'.join(key)} = {value!r}, which must be a number of at least {least:g}.")
    return float(value)


def share(content: Mapping[str, Any], key: tuple[str, ...], count: int, file: str) -> float:
    """A share of `count` answers.

    Raises:
        ValueError: no number in [0, 1], or not the share of a whole number of answers.
    """
    value = number(content, key, file)
    if value > 1.0 or abs(value * count - round(value * count)) > 1e-6 * max(count, 1):
        raise ValueError(
            f"{file} has {'.'.join(key)} = {value!r}, which is no share of {count}: it was not measured on them."
        )
    return value


def radius_of(name: str) -> float:
    """The radius that a name such as "36/255" or "0.5" states.

    Raises:
        ValueError: it states none.
    """
    try:
        return float(Fraction(name))
    except (ValueError, ZeroDivisionError) as error:
        raise ValueError(f"{name!r} is no radius: expected a number or a fraction, such as 36/255.") from error


def data_name(source: str) -> str:
    """The name of a data set without its place: cards tell nothing of the machine they were made on."""
    return PurePath(source.rstrip("/")).name
