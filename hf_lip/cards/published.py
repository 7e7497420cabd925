# SPDX-License-Identifier: Apache-2.0
"""Figures of papers, which a card shows beside the measured ones, with their source.

`published.json` holds a list of objects:

    [{"source": "Araujo et al. 2023, arXiv 2303.03169, table 1", "values": {"clean accuracy": 0.712},
      "remark": "1,000 epochs there, 20 here.", "file": "results.json"}]

`values` are shares as fractions of 1 (and the ACR, perplexity) by the names the card gives the measured figures. They
are never taken for measured: they stand in a column of their own and not in the model index.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .figures import Evaluation


PUBLISHED_NAME = "published.json"

__all__ = ["PUBLISHED_NAME", "PublishedResult", "read_published"]


@dataclass(frozen=True)
class PublishedResult:
    """Figures of one source, to be compared with those of one evaluation (`file`, `name`)."""

    source: str
    values: Mapping[str, float]
    remark: str
    file: str
    name: str


def read_published(folder: Path, evaluations: Sequence[Evaluation]) -> list[PublishedResult]:
    """The published figures of a folder; none if it has no `published.json`.

    Raises:
        ValueError: another layout, no source, a figure that was not measured here, or a value that is no number.
    """
    path = folder / PUBLISHED_NAME
    if not path.is_file():
        return []
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid JSON ({error}).") from error
    if not isinstance(content, list):
        raise ValueError(f"{path} must hold a list of objects with `source` and `values`.")
    return [_result(path, place, entry, evaluations) for place, entry in enumerate(content)]


def _result(path: Path, place: int, entry: Any, evaluations: Sequence[Evaluation]) -> PublishedResult:
    where = f"{path}, entry {place}"
    if not isinstance(entry, dict) or not isinstance(entry.get("values"), dict) or not entry["values"]:
        raise ValueError(f"{where}: expected an object with `source` and `values`.")
    source = entry.get("source")
    if not isinstance(source, str) or not source.strip():
        raise ValueError(f"{where} has no `source`: say where the figures were published.")
    known = {"source", "values", "remark", "file", "name"}
    if not known >= set(entry):
        raise ValueError(f"{where} has unknown entries {sorted(set(entry) - known)}: known are {sorted(known)}.")
    file, name = entry.get("file", evaluations[0].file), entry.get("name", "")
    beside = [one for one in evaluations if one.file == file and (not name or one.name == name)]
    if not beside:
        raise ValueError(f"{where}: there is no evaluation {name or file!r} to stand beside.")
    measured = {figure.name for figure in beside[0].figures}
    for figure, value in entry["values"].items():
        if figure not in measured:
            raise ValueError(
                f"{where}: {figure!r} was not measured here; {beside[0].where} has {', '.join(sorted(measured))}."
            )
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < math.inf:
            raise ValueError(f"{where}: {figure!r} must be a number of at least 0, got {value!r}.")
    return PublishedResult(source.strip(), entry["values"], str(entry.get("remark", "")), file, beside[0].name)
