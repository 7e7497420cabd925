# SPDX-License-Identifier: Apache-2.0
"""The world of the Boxes task (Kim and Schuster 2023; ChaCAL spec 4.2): operations, sentences, depths."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass


OPERATIONS = ("move", "contents", "remove", "put")

_OBJECTS = r"the (?P<objects>\S+(?: and the \S+)*)"
_FORMS = {
    "contents": re.compile(r"Move the contents of Box (?P<source>\d+) to Box (?P<target>\d+)"),
    "move": re.compile(rf"Move {_OBJECTS} from Box (?P<source>\d+) to Box (?P<target>\d+)"),
    "remove": re.compile(rf"Remove {_OBJECTS} from Box (?P<source>\d+)"),
    "put": re.compile(rf"Put {_OBJECTS} into Box (?P<target>\d+)"),
}
_STATEMENT = re.compile(rf"Box (?P<box>\d+) (?:is empty|contains (?:nothing|{_OBJECTS}))")
_ANSWER = re.compile(rf"(?:is empty|contains (?:nothing|{_OBJECTS}))")

__all__ = ["OPERATIONS", "BoxWorld", "Operation", "parse_contents", "parse_description", "parse_operation"]


def parse_contents(text: str) -> frozenset[str] | None:
    """The objects of an answer such as "contains the cup and the map", "is empty" or "contains nothing".

    Spaces and a full stop at the end do not matter, nor does the order of the objects. None for any other text.
    """
    found = _ANSWER.fullmatch(" ".join(text.split()).removesuffix(".").rstrip())
    return None if found is None else frozenset(_objects(found))


@dataclass(frozen=True)
class Operation:
    """One of `OPERATIONS`; `contents` moves all that the source holds and names no object."""

    kind: str
    objects: tuple[str, ...] = ()
    source: int | None = None
    target: int | None = None

    def sentence(self) -> str:
        """Without a full stop; objects in alphabetical order."""
        names = _listed(self.objects)
        return {
            "contents": f"Move the contents of Box {self.source} to Box {self.target}",
            "move": f"Move {names} from Box {self.source} to Box {self.target}",
            "remove": f"Remove {names} from Box {self.source}",
            "put": f"Put {names} into Box {self.target}",
        }[self.kind]


def parse_operation(sentence: str) -> Operation:
    """The operation of a sentence without its full stop.

    Raises:
        ValueError: none of the four sentence forms.
    """
    for kind, form in _FORMS.items():
        found = form.fullmatch(sentence)
        if found is not None:
            boxes = {name: int(box) for name, box in found.groupdict().items() if name != "objects"}
            return Operation(kind, () if kind == "contents" else _objects(found), **boxes)
    raise ValueError(f"{sentence!r} is none of the operations Move, Move the contents, Remove, Put.")


def parse_description(sentence: str) -> list[tuple[str, ...]]:
    """The contents of boxes 0, 1, ... of "Box 0 contains the cup, Box 1 is empty", without its full stop.

    Raises:
        ValueError: another form, or boxes out of order.
    """
    contents = []
    for number, clause in enumerate(sentence.split(", ")):
        found = _STATEMENT.fullmatch(clause)
        if found is None or int(found["box"]) != number:
            raise ValueError(f"{clause!r} does not say what Box {number} contains.")
        contents.append(_objects(found))
    return contents


@dataclass
class _Record:
    """Of an object in a box: moves since it was put (or since the start), and those since it was last named."""

    num_moves: int = 0
    implicit_hops: int = 0


class BoxWorld:
    """Boxes, what they contain, and how it came there.

    Args:
        contents: the objects of every box.

    Raises:
        ValueError: no box, or an object named twice.
    """

    def __init__(self, contents: Sequence[Iterable[str]]) -> None:
        self._boxes = [{name: _Record() for name in names} for names in contents]
        self._counts = [dict.fromkeys(("move", "remove", "put"), 0) for _ in self._boxes]
        names = [name for box in contents for name in box]
        if not self._boxes or len(set(names)) != len(names):
            raise ValueError("The boxes are none, or an object is named twice.")
        self._initial = _described(self._boxes)
        self._told: list[str] = []

    def __len__(self) -> int:
        return len(self._boxes)

    def contents(self, box: int) -> list[str]:
        """Objects of a box, in alphabetical order."""
        return sorted(self._boxes[box])

    def text(self) -> str:
        """The initial contents and every operation, each with its full stop."""
        return " ".join(f"{sentence}." for sentence in (self._initial, *self._told))

    def answer(self, box: int) -> str:
        """ "contains the cup and the map" or "is empty"."""
        return _contains(self._boxes[box])

    def num_steps(self) -> int:
        """Operations so far."""
        return len(self._told)

    def numops_by_op(self, box: int) -> dict[str, int]:
        """How many moves, removals and puts changed a box."""
        return dict(self._counts[box])

    def depths(self, box: int) -> tuple[int, int]:
        """The largest number, over the objects of a box, of moves since it was put (or since the start), and of moves
        since the text last named it, which are all told as "the contents". (-1, -1) for an empty box.
        """
        records = self._boxes[box].values()
        moves = max((record.num_moves for record in records), default=-1)
        return moves, max((record.implicit_hops for record in records), default=-1)

    def apply(self, operation: Operation) -> None:
        """Carry out an operation.

        Raises:
            ValueError: it can not be carried out: a box that is not there or the same twice, an object that is not in
                the source or, to be put, already in a box, or nothing to move.
        """
        for box in (operation.source, operation.target):
            if box is not None and not 0 <= box < len(self._boxes):
                raise ValueError(f"{operation.sentence()!r} names Box {box} of {len(self._boxes)} boxes.")
        if operation.source == operation.target:
            raise ValueError(f"{operation.sentence()!r} moves from a box to itself.")
        source = {} if operation.source is None else self._boxes[operation.source]
        implicit = operation.kind == "contents"
        names = tuple(source) if implicit else operation.objects
        if operation.kind == "put":
            wrong = [name for name in names if any(name in box for box in self._boxes)]
        else:
            wrong = [name for name in names if name not in source]
        if wrong or not names or len(set(names)) != len(names):
            raise ValueError(f"{operation.sentence()!r} can not be done with {_described(self._boxes)!r}.")
        records = {name: source.pop(name) for name in names if operation.kind != "put"}
        if operation.target is not None:
            for name in names:
                record = records.get(name)
                moves = 0 if record is None else record.num_moves + 1
                hops = record.implicit_hops + 1 if record is not None and implicit else 0
                self._boxes[operation.target][name] = _Record(moves, hops)
        for box in (operation.source, operation.target):
            if box is not None:
                self._counts[box]["move" if implicit else operation.kind] += 1
        self._told.append(operation.sentence())


def _objects(found: re.Match[str]) -> tuple[str, ...]:
    return () if found["objects"] is None else tuple(found["objects"].split(" and the "))


def _listed(names: Iterable[str]) -> str:
    return " and ".join(f"the {name}" for name in sorted(names))


def _contains(names: Iterable[str]) -> str:
    listed = _listed(names)
    return f"contains {listed}" if listed else "is empty"


def _described(boxes: Sequence[Iterable[str]]) -> str:
    return ", ".join(f"Box {number} {_contains(names)}" for number, names in enumerate(boxes))
