# SPDX-License-Identifier: Apache-2.0
"""Generator of the Boxes task, written from the rules of the release (Kim and Schuster 2023; ChaCAL spec 4.2)."""

import bisect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from hf_lip.data.box_samples import BoxesSample, rows_of_sample
from hf_lip.data.box_world import OPERATIONS, Operation
from hf_lip.data.generation import check_integer
from hf_lip.data.tracking_tokenizer import words_of


if TYPE_CHECKING:
    import datasets


_NOUNS = """
anchor apple arrow axe badge ball banana basket bell belt blanket bottle bowl bracelet brick broom brush bucket
button cable cake camera candle card carpet carrot chain chair cheese clock coat coin comb compass cork cup
curtain diary doll drum egg envelope fan feather flag flute fork glass globe glove hammer hat helmet hook iron
jacket jar kettle key kite knife ladder lamp leaf lemon letter lock map mask medal mirror mug nail necklace
needle notebook onion orange paper pear pen pencil piano pillow pin pipe plate pot purse puzzle radio ribbon
ring rope ruler saw scarf shell shoe spoon
"""
# one hundred everyday nouns
OBJECTS = tuple(_NOUNS.split())

_WORDS = words_of(["Box contains is empty the and nothing Move contents of to Remove from Put into . ,"])

# of all weights: rarer kinds could be refused for minutes
_SMALLEST_WEIGHT = 1e-3

__all__ = ["OBJECTS", "BoxesTask", "boxes_features"]


def boxes_features() -> "datasets.Features":
    """Columns of Boxes rows, generated or read by `load_boxes`; each row asks for one box after one step.

    `prompt` (the text, then "Box 3"), `answer` ("contains the cup and the map" or "is empty"), `sample_id` (the
    world), `step` (operations told, from 0), `box`; `numops` (operations that changed the box, by all kinds and in
    `numops_by_op`), `num_moves` (moves since an object of the answer was put, or since the start) and `implicit_hops`
    (of these, moves told as "the contents" since the object was last named), both the largest over the objects and -1
    for an empty box, whose answer no object leads to.
    """
    import datasets

    number, text = datasets.Value("int32"), datasets.Value("string")
    columns = {"prompt": text, "answer": text, "sample_id": datasets.Value("int64")}
    columns |= dict.fromkeys(("step", "box", "numops", "num_moves", "implicit_hops"), number)
    return datasets.Features({**columns, "numops_by_op": dict.fromkeys(("move", "remove", "put"), number)})


@dataclass(frozen=True, kw_only=True)
class BoxesTask:
    """Boxes: initial contents, then operations; asked is what a box contains. Columns: `boxes_features`.

    Every box starts with Poisson(`expected_objects`) objects, at most `max_objects`. An operation has a kind drawn by
    weight and boxes drawn uniformly; one that can not be done is drawn anew with its kind. `move` and `remove` take a
    random subset (a fair coin an object, not all tails), `contents` takes all and is told without naming them, `put`
    brings Poisson(`expected_put`) objects, at least one, from outside. Where the boxes get stuck (no operation of the
    given kinds can be done) the world is drawn anew. Splits share no vector of initial counts. Take five boxes or
    more: three have so few that a model learned those of training by heart (92 % right there, 64 % in the test).

    The defaults are the release's base form. There the answer follows from where each object was last named, so it
    tests no long chains. `move_contents=True` is its form of that name. For depth let most operations be `contents`,
    as `operations={"contents": 1}`: only following every move finds the answer.

    Rates at which trivial guesses are right, of rows with `numops` > 0, in the base form and in 24 operations of
    `contents` alone: "is empty" 0.31 and 0.36; the initial contents of the box 0.04 and 0.11; what the last sentence
    on the box says of it 0.46 and 0.36; every object where it was last named 1.00 and 0.11. An emptied box is told by
    one sentence: on rows with two implicit hops or more none of these is right in more than 0.12.

    Args:
        num_boxes: boxes, numbered from 0.
        num_operations: operations of a world.
        max_objects: capacity of a box.
        expected_objects, expected_put: Poisson means.
        operations: weights of the kinds `move`, `contents`, `remove`, `put`.
        move_contents: tell a `move` of all objects of a box as "the contents" too.
        objects: names, single words, at least num_boxes * max_objects.
        query_steps: ask after `every` step, the start included, or after the `last` one.
        queries_per_world: ask this many of a world's questions, drawn without replacement; None for all, in order.

    Raises:
        ValueError: a number out of range, unknown operations, or too few, repeated or unusable objects.
    """

    num_boxes: int = 7
    num_operations: int = 12
    max_objects: int = 3
    expected_objects: float = 2.0
    expected_put: float = 1.0
    operations: Mapping[str, float] | tuple[tuple[str, float], ...] = (("move", 1.0), ("remove", 1.0), ("put", 1.0))
    move_contents: bool = False
    objects: tuple[str, ...] = OBJECTS
    query_steps: Literal["every", "last"] = "every"
    queries_per_world: int | None = None

    def __post_init__(self) -> None:
        check_integer("num_boxes", self.num_boxes, 2)
        check_integer("num_operations", self.num_operations, 0)
        check_integer("max_objects", self.max_objects, 1)
        for name in ("expected_objects", "expected_put"):
            if not 0.0 < getattr(self, name) < math.inf:
                raise ValueError(f"`{name}` must be positive and finite, got {getattr(self, name)}.")
        pairs = self.operations.items() if isinstance(self.operations, Mapping) else self.operations
        weights = {str(kind): float(weight) for kind, weight in pairs}
        if not set(weights) <= set(OPERATIONS):
            raise ValueError(f"`operations` must be weights of {', '.join(OPERATIONS)}, got {weights}.")
        total = sum(weights.values())
        if not 0.0 < total < math.inf or any(
            weight != 0.0 and not weight >= _SMALLEST_WEIGHT * total for weight in weights.values()
        ):
            raise ValueError(
                f"`operations` must be weights of at least {_SMALLEST_WEIGHT:g} of their sum, or 0, got {weights}."
            )
        # a dictionary can not be hashed
        object.__setattr__(self, "operations", tuple(weights.items()))
        object.__setattr__(self, "objects", tuple(self.objects))
        numbers = {str(box) for box in range(self.num_boxes)}
        wrong = [name for name in self.objects if not name.isalnum() or name in {*_WORDS, *numbers}]
        if wrong or len(set(self.objects)) != len(self.objects):
            raise ValueError(
                "`objects` must be different single words of letters and digits that the sentences do not use, "
                f"got {wrong[:5] or 'one of them twice'}."
            )
        if len(self.objects) < self.num_boxes * self.max_objects:
            raise ValueError(
                f"`objects` has {len(self.objects)} names, fewer than {self.num_boxes} boxes can hold: give at least "
                f"{self.num_boxes * self.max_objects}."
            )
        if self.query_steps not in ("every", "last"):
            raise ValueError(f"`query_steps` must be 'every' or 'last', got {self.query_steps!r}.")
        if self.queries_per_world is not None:
            check_integer("queries_per_world", self.queries_per_world, 1, self.num_queries())

    @property
    def _weights(self) -> tuple[tuple[str, float], ...]:
        # as `__post_init__` left them
        return tuple(self.operations)  # type: ignore[arg-type]

    def num_queries(self) -> int:
        """Questions that can be asked of a world: every box after every step, or after the last."""
        return self.num_boxes * (self.num_operations + 1 if self.query_steps == "every" else 1)

    def vocabulary(self) -> list[str]:
        return [*_WORDS, *(str(box) for box in range(self.num_boxes)), *self.objects]

    def features(self) -> "datasets.Features":
        return boxes_features()

    def sample(self, rng: np.random.Generator, accept: Callable[[bytes], bool]) -> BoxesSample | None:
        """The key is how many objects every box has at the start."""
        counts = np.minimum(rng.poisson(self.expected_objects, self.num_boxes), self.max_objects).tolist()
        if not accept(",".join(map(str, counts)).encode()):
            return None
        names = [self.objects[place] for place in rng.permutation(len(self.objects)).tolist()]
        boxes = [[names.pop() for _ in range(count)] for count in counts]
        return self._with_operations(boxes, names, rng)

    def sample_from(self, contents: Sequence[Sequence[str]], rng: np.random.Generator) -> BoxesSample | None:
        """A world whose boxes have some contents at the start; None where it gets stuck."""
        inside = {name for box in contents for name in box}
        outside = [name for name in self.objects if name not in inside]
        return self._with_operations([list(box) for box in contents], outside, rng)

    def rows(self, sample: BoxesSample, index: int, rng: np.random.Generator) -> Iterator[dict[str, Any]]:
        first_step = 0 if self.query_steps == "every" else self.num_operations
        places = rng.permutation(self.num_queries())[: self.queries_per_world].tolist()
        questions = {(first_step + place // self.num_boxes, place % self.num_boxes) for place in places}
        return rows_of_sample(sample, questions, index)

    def _with_operations(
        self, boxes: list[list[str]], outside: list[str], rng: np.random.Generator
    ) -> BoxesSample | None:
        contents = tuple(tuple(sorted(box)) for box in boxes)
        operations = []
        for _ in range(self.num_operations):
            if not self._can_go_on(boxes, outside):
                return None
            operations.append(self._operation(boxes, outside, rng))
        return BoxesSample(contents, tuple(operations))

    def _can_go_on(self, boxes: list[list[str]], outside: list[str]) -> bool:
        """Whether one of the kinds with weight can be done."""
        counts = sorted(map(len, boxes))
        some, room = counts[-1] > 0, counts[0] < self.max_objects
        smallest = next((place for place, count in enumerate(counts) if count), None)
        # the smallest box that is not empty, into the smallest other one
        joined = smallest is not None and counts[smallest] + counts[0 if smallest else 1] <= self.max_objects
        possible = {"move": some and room, "contents": joined, "remove": some, "put": room and bool(outside)}
        return any(weight > 0 and possible[kind] for kind, weight in self._weights)

    def _operation(self, boxes: list[list[str]], outside: list[str], rng: np.random.Generator) -> Operation:
        """Draws until an operation can be done, and does it."""
        kinds, weights = zip(*self._weights, strict=True)
        ends = (np.cumsum(weights) / sum(weights)).tolist()
        while True:
            kind = kinds[bisect.bisect_right(ends, rng.random(), hi=len(ends) - 1)]
            box = int(rng.integers(len(boxes)))
            operation = self._put(boxes, outside, box, rng) if kind == "put" else self._take(kind, boxes, box, rng)
            if operation is None:
                continue
            source = outside if operation.source is None else boxes[operation.source]
            target = outside if operation.target is None else boxes[operation.target]
            for name in list(source) if operation.kind == "contents" else operation.objects:
                source.remove(name)
                target.append(name)
            return operation

    def _put(self, boxes: list[list[str]], outside: list[str], box: int, rng: np.random.Generator) -> Operation | None:
        count = int(rng.poisson(self.expected_put))
        if not 1 <= count <= min(self.max_objects - len(boxes[box]), len(outside)):
            return None
        places = rng.permutation(len(outside))[:count].tolist()
        return Operation("put", tuple(sorted(outside[place] for place in places)), target=box)

    def _take(self, kind: str, boxes: list[list[str]], box: int, rng: np.random.Generator) -> Operation | None:
        """A move, a move of the contents or a removal."""
        names = sorted(boxes[box])
        if not names:
            return None
        if kind == "contents":
            taken = tuple(names)
        else:
            # 1 .. 2**n - 1: every subset but the empty one
            subset = int(rng.integers(1, 2 ** len(names)))
            taken = tuple(name for place, name in enumerate(names) if subset >> place & 1)
        if kind == "remove":
            return Operation(kind, taken, source=box)
        target = (box + int(rng.integers(1, len(boxes)))) % len(boxes)
        if len(boxes[target]) + len(taken) > self.max_objects:
            return None
        if kind == "contents" or (self.move_contents and len(taken) == len(names)):
            return Operation("contents", source=box, target=target)
        return Operation("move", taken, source=box, target=target)
