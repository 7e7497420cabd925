# SPDX-License-Identifier: Apache-2.0
"""The parts of a card: its metadata, what was generated, and what somebody wrote by hand between two marks.

    <!-- hf_lip:begin notes -->
    ... kept by `hf-lip card --overwrite` ...
    <!-- hf_lip:end notes -->

A last comment holds the hash of all that is not between marks, so that text that was changed there is noticed and not
lost.
"""

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..card_text import split_metadata


# where they stand in a card
HAND_WRITTEN = ("description", "notes")

_BLOCK = re.compile(r"<!-- hf_lip:begin (?P<name>\w+) -->\n(?P<text>.*?)<!-- hf_lip:end (?P=name) -->", re.DOTALL)
_MARK = re.compile(r"<!-- hf_lip:(?:begin|end)\b[^>]*-->")
_SEAL = re.compile(r"<!-- hf_lip:generated sha256=(?P<digest>[0-9a-f]{64}) -->\n?\Z")

__all__ = ["HAND_WRITTEN", "Card", "hand_written_block", "parse_card", "sealed"]


@dataclass(frozen=True)
class Card:
    """A card taken apart.

    Attributes:
        metadata: of the front matter.
        generated: the text without metadata, seal and what is between marks (the marks stay).
        written: what is between marks, by name.
        seal: hash that the generated text had when it was written; None if the card is not of this package.
    """

    metadata: Mapping[str, Any]
    generated: str
    written: Mapping[str, str]
    seal: str | None

    @property
    def untouched(self) -> bool:
        """Whether the generated text is as it was written."""
        return self.seal == _digest(self.generated)


def parse_card(text: str, source: str) -> Card:
    """Take a card apart.

    Raises:
        ValueError: metadata that are no YAML mapping, or marks that do not pair.
    """
    text = text.replace("\r\n", "\n")
    metadata, text = split_metadata(text, source)
    seal = _SEAL.search(text)
    body = text[: seal.start()] if seal else text
    written = {}
    for block in _BLOCK.finditer(body):
        if block["name"] in written or _MARK.search(block["text"]):
            raise ValueError(f"{source} has the mark 'hf_lip:begin {block['name']}' twice.")
        written[block["name"]] = block["text"].strip("\n")
    generated = _BLOCK.sub(lambda block: hand_written_block(block["name"], ""), body)
    if len(_MARK.findall(body)) != 2 * len(written):
        raise ValueError(
            f"{source} has a mark without its pair: a section that is to be kept begins with "
            "'<!-- hf_lip:begin notes -->' and ends with '<!-- hf_lip:end notes -->', each on a line of its own."
        )
    return Card(metadata, generated, written, seal["digest"] if seal else None)


def hand_written_block(name: str, text: str) -> str:
    """A hand-written section with its marks."""
    inside = f"{text}\n" if text else ""
    return f"<!-- hf_lip:begin {name} -->\n{inside}<!-- hf_lip:end {name} -->"


def sealed(text: str, source: str) -> str:
    """The text of a card with the hash of what was generated."""
    digest = _digest(parse_card(text, source).generated)
    return f"{text.rstrip()}\n\n<!-- hf_lip:generated sha256={digest} -->\n"


def _digest(generated: str) -> str:
    lines = [line.rstrip() for line in generated.strip().split("\n")]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()
