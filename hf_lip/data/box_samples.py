# SPDX-License-Identifier: Apache-2.0
"""Samples of Boxes: what the boxes contain at first and what is done to them."""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hf_lip.data.box_world import BoxWorld, Operation, parse_contents, parse_description, parse_operation


__all__ = [
    "BoxesSample",
    "as_last_named",
    "boxes_row",
    "object_names",
    "renamed_sample",
    "rows_of_sample",
]


@dataclass(frozen=True)
class BoxesSample:
    """Initial contents of the boxes, and the operations that follow."""

    contents: tuple[tuple[str, ...], ...]
    operations: tuple[Operation, ...]

    @classmethod
    def of_text(cls, text: str) -> "BoxesSample":
        """The sample that a text tells, which has its full stops.

        Raises:
            ValueError: a sentence of another form.
        """
        description, *operations = text.removesuffix(".").split(". ")
        return cls(tuple(parse_description(description)), tuple(map(parse_operation, operations)))

    def num_changes(self) -> NDArray[np.int64]:
        """How many operations changed each box by each step: (operations + 1, boxes), the `numops` of its rows."""
        changed = np.zeros((len(self.operations) + 1, len(self.contents)), dtype=np.int64)
        for step, operation in enumerate(self.operations, 1):
            changed[step, [box for box in (operation.source, operation.target) if box is not None]] = 1
        return changed.cumsum(0)


def boxes_row(world: BoxWorld, box: int, sample_id: int) -> dict[str, Any]:
    """The row that asks for a box of the world as it is."""
    by_op = world.numops_by_op(box)
    num_moves, implicit_hops = world.depths(box)
    return {
        "prompt": f"{world.text()} Box {box}",
        "answer": world.answer(box),
        "sample_id": sample_id,
        "step": world.num_steps(),
        "box": box,
        "numops": sum(by_op.values()),
        "num_moves": num_moves,
        "implicit_hops": implicit_hops,
        "numops_by_op": by_op,
    }


def rows_of_sample(
    sample: BoxesSample, questions: Collection[tuple[int, int]], sample_id: int
) -> Iterator[dict[str, Any]]:
    """The rows that ask, after some steps (0: before all operations), for some boxes, in this order.

    Args:
        questions: pairs of step and box.
    """
    world = BoxWorld(sample.contents)
    for step in range(len(sample.operations) + 1):
        if step:
            world.apply(sample.operations[step - 1])
        for box in range(len(sample.contents)):
            if (step, box) in questions:
                yield boxes_row(world, box, sample_id)


def renamed_sample(sample: BoxesSample, names: Mapping[str, str]) -> BoxesSample:
    """With other names for the objects; those it does not know stay."""

    def new(objects: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(sorted(names.get(name, name) for name in objects))

    operations = (replace(operation, objects=new(operation.objects)) for operation in sample.operations)
    return BoxesSample(tuple(map(new, sample.contents)), tuple(operations))


def object_names(samples: Collection[BoxesSample]) -> list[str]:
    """The objects of some samples, sorted."""
    groups = [group for one in samples for group in (*one.contents, *(each.objects for each in one.operations))]
    return sorted({name for group in groups for name in group})


def as_last_named(row: Mapping[str, Any]) -> dict[str, Any]:
    """The row with the objects of its answer in the order in which the prompt names them last."""
    names = parse_contents(row["answer"])
    if not names:
        return dict(row)
    words = row["prompt"].replace(",", " ").replace(".", " ").split()
    last = {word: place for place, word in enumerate(words)}
    return {**row, "answer": "contains " + " and ".join(f"the {name}" for name in sorted(names, key=last.__getitem__))}
