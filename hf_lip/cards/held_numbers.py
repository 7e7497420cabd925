# SPDX-License-Identifier: Apache-2.0
"""Which numbers of a text look like results, and whether a number that was measured stands behind each."""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any


_NUMBER = r"\d+(?:,\d{3})*(?:\.\d+)?(?:[eE][+-]?\d+)?"
# "CIFAR-10", "v2.0", "1.2.3" and "10.1007/x" are names
_ALONE = rf"(?<![\w.,/-])(?P<number>{_NUMBER})(?![\w/]|[.,]\d)"
_PERCENT = re.compile(rf"{_ALONE}\s*(?:%|\\%|percent\b|per cent\b|percentage points?\b)")
_DECIMAL = re.compile(_ALONE)
_OF = re.compile(r"(?<![\w.,/-])(?P<right>\d+(?:,\d{3})*)\s*(?:/|of|out of)\s*(?P<all>\d+(?:,\d{3})*)(?![\w.,/-]*\w)")
_FENCE = re.compile(r"^(```|~~~).*?^\1", re.DOTALL | re.MULTILINE)
_CODE = re.compile(r"`[^`\n]*`")
# link targets and bare addresses are no statements
_ADDRESS = re.compile(r"\]\([^)]*\)|https?://\S+|\barXiv[: ]\s*\d{4}\.\d{4,5}(?:v\d+)?", re.IGNORECASE)
_INTEGER_CELL = re.compile(r"\|\s*(?P<number>\d+(?:,\d{3})*)\s*(?=\|)")
# what says nothing of the finished run
_BESIDE = ("history", "versions", "images")

__all__ = ["StatedNumber", "numbers_in", "result_numbers", "unheld_numbers"]


@dataclass(frozen=True)
class StatedNumber:
    """A number of a text: as printed, its value, whether it is a percentage, and the line it stands in."""

    text: str
    value: float
    percent: bool
    line: str

    @property
    def unit(self) -> float:
        """One unit of the last digit that is printed."""
        digits = self.text.split("e")[0].split("E")[0].partition(".")[2]
        exponent = re.search(r"[eE]([+-]?\d+)", self.text)
        return 10.0 ** (-len(digits) + (int(exponent[1]) if exponent else 0))


def result_numbers(text: str) -> Iterator[StatedNumber]:
    """The numbers of a text by hand that look like results: percentages, decimals, shares such as "441 of 450", and
    numbers in tables. Code and addresses are left out, but for percentages in code."""
    for line in _FENCE.sub("", text).splitlines():
        line = _ADDRESS.sub("", line)
        plain = _CODE.sub("", line)
        taken = set()
        for match in _PERCENT.finditer(line):
            taken.add(match.start("number"))
            yield _stated(match["number"], True, line)
        for match in _OF.finditer(plain):
            right, count = (float(match[part].replace(",", "")) for part in ("right", "all"))
            if 0.0 < right <= count:
                yield StatedNumber(match[0], right / count, False, line.strip())
        for match in _DECIMAL.finditer(plain):
            if "." in match["number"] and not _PERCENT.match(plain, match.start()):
                yield _stated(match["number"], False, line)
        if plain.lstrip().startswith("|"):
            yield from (_stated(match["number"], False, line) for match in _INTEGER_CELL.finditer(plain))


def numbers_in(content: Mapping[str, Any]) -> list[float]:
    """All numbers of a results file that describe the finished run: measured, chosen, or in its command."""
    return [leaf for key, value in content.items() if key not in _BESIDE for leaf in _leaves(value)]


def unheld_numbers(text: str, shares: Iterable[float], others: Iterable[float]) -> list[StatedNumber]:
    """Numbers of a hand-written text that look like results and that no file holds.

    Args:
        text: the text.
        shares: measured shares, as fractions of 1. A percentage has to be one of them.
        others: what any other number may be; shares printed without a percent sign as well.

    Returns:
        The numbers that are not held to all digits that are printed.
    """
    percentages = [100.0 * value for value in shares]
    anything = [*others, *shares, *percentages]
    found = []
    for stated in result_numbers(text):
        # a share such as "441 of 450" is exact
        room = 0.5000001 * stated.unit if re.fullmatch(_NUMBER, stated.text) else 1e-9
        held = percentages if stated.percent else anything
        if not any(abs(value - stated.value) <= room for value in held):
            found.append(stated)
    return found


def _stated(text: str, percent: bool, line: str) -> StatedNumber:
    return StatedNumber(text, float(text.replace(",", "")), percent, line.strip())


def _leaves(value: Any) -> Iterator[float]:
    if isinstance(value, Mapping):
        for name, part in value.items():
            # the radii and depths that figures are of
            yield from _leaves(str(name))
            yield from _leaves(part)
    elif isinstance(value, (list, tuple)):
        for part in value:
            yield from _leaves(part)
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        yield float(value)
    elif isinstance(value, str):
        yield from (float(number) for number in re.findall(r"(?<![\w.])\d+(?:\.\d+)?(?![\w.])", value))
