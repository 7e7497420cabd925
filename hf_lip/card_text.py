# SPDX-License-Identifier: Apache-2.0
"""Pieces of Markdown that every card of the package is made of."""

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]
from huggingface_hub import ModelCard, ModelCardData


CARD_NAME = "README.md"

_METADATA = re.compile(r"\A---\r?\n(?P<yaml>.*?)\r?\n---\r?\n", re.DOTALL)

__all__ = ["CARD_NAME", "card_text", "kept_metadata", "markdown_table", "rounded_up", "split_metadata"]


def rounded_up(value: float, digits: int = 6) -> str:
    """So many digits, never below the value: an upper bound stays one when it is printed."""
    text = f"{value:.{digits}g}"
    return text if float(text) >= value else f"{value * (1 + 10.0 ** (1 - digits)):.{digits}g}"


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table in Markdown; cells may hold Markdown, and bars, which are escaped."""
    lines = [f"| {' | '.join(header)} |", f"|{' --- |' * len(header)}"]
    cells = ([cell.replace("|", "\\|") for cell in row] for row in rows)
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in cells)])


def card_text(data: ModelCardData, parts: Iterable[str]) -> str:
    """A whole card: the metadata, then the parts that are not empty."""
    body = "\n\n".join(part for part in parts if part)
    return str(ModelCard(f"---\n{data.to_yaml()}\n---\n\n{body}\n"))


def split_metadata(text: str, source: str) -> tuple[dict[str, Any], str]:
    """The metadata of a card, empty if it has none, and the rest of its text.

    Args:
        source: named in errors.

    Raises:
        ValueError: metadata that are no YAML mapping.
    """
    found = _METADATA.match(text)
    if found is None:
        return {}, text
    try:
        metadata = yaml.safe_load(found["yaml"]) or {}
    except yaml.YAMLError as error:
        raise ValueError(f"The metadata of {source} are not valid YAML ({error}).") from error
    if not isinstance(metadata, dict):
        raise ValueError(f"The metadata of {source} must be a mapping of names to values.")
    return metadata, text[found.end() :]


def kept_metadata(path: Path, names: Iterable[str]) -> dict[str, Any]:
    """Those entries of a card's metadata that have one of the names; nothing where there is no card.

    A card with damaged metadata has nothing to keep.
    """
    if not path.is_file():
        return {}
    try:
        data, _ = split_metadata(path.read_text(encoding="utf-8"), str(path))
    except ValueError:
        return {}
    return {name: data[name] for name in names if name in data}
