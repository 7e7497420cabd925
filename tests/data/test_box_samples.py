# SPDX-License-Identifier: Apache-2.0
"""Samples of Boxes, and the smaller worlds inside them."""

import numpy as np
import pytest

from hf_lip.data import BoxesTask, tracking_dataset
from hf_lip.data.box_samples import (
    BoxesSample,
    as_last_named,
    boxes_row,
    object_names,
    renamed_sample,
    rows_of_sample,
)
from hf_lip.data.box_world import BoxWorld
from hf_lip.data.boxes import OBJECTS


TASKS = [BoxesTask(), BoxesTask(num_boxes=4, num_operations=9, operations={"move": 1, "contents": 2, "put": 1})]
TEXT = (
    "Box 0 contains the cup and the map, Box 1 is empty, Box 2 contains the key. Move the cup from Box 0 to Box 1. "
    "Move the contents of Box 2 to Box 0. Remove the cup from Box 1. Put the cup into Box 2."
)


def samples(task, count=40):
    rng = np.random.default_rng(3)
    drawn = (task.sample(rng, lambda key: True) for _ in range(count))
    return [sample for sample in drawn if sample is not None]


def every_question(sample):
    return {(step, box) for step in range(len(sample.operations) + 1) for box in range(len(sample.contents))}


def told(sample):
    world = BoxWorld(sample.contents)
    for operation in sample.operations:
        world.apply(operation)
    return world.text()


@pytest.mark.parametrize("task", TASKS, ids=["base", "contents"])
def test_a_text_gives_its_sample_back(task):
    for sample in samples(task):
        assert BoxesSample.of_text(told(sample)) == sample


def test_num_changes_are_the_numops_of_the_rows():
    for sample in samples(TASKS[1]):
        changes = sample.num_changes()
        for row in rows_of_sample(sample, every_question(sample), 0):
            assert changes[row["step"], row["box"]] == row["numops"]


def test_rows_are_those_asked_for_in_order():
    sample = BoxesSample.of_text(TEXT)
    rows = list(rows_of_sample(sample, {(4, 2), (0, 1), (2, 0)}, 7))
    assert [(row["sample_id"], row["step"], row["box"], row["answer"]) for row in rows] == [
        (7, 0, 1, "is empty"),
        (7, 2, 0, "contains the key and the map"),
        (7, 4, 2, "contains the cup"),
    ]
    assert rows[-1]["prompt"] == f"{TEXT} Box 2"


def test_renaming_changes_names_and_nothing_else():
    sample = BoxesSample.of_text(TEXT)
    renamed = renamed_sample(sample, {"cup": "zebra", "map": "apple"})
    assert told(renamed) == (
        "Box 0 contains the apple and the zebra, Box 1 is empty, Box 2 contains the key. "
        "Move the zebra from Box 0 to Box 1. Move the contents of Box 2 to Box 0. Remove the zebra from Box 1. "
        "Put the zebra into Box 2."
    )
    assert object_names([sample, renamed]) == ["apple", "cup", "key", "map", "zebra"]


def test_the_generator_names_its_objects():
    assert set(object_names(samples(TASKS[0]))) == set(OBJECTS)


def test_rows_of_the_generator_are_rows_of_its_samples():
    rows = list(tracking_dataset(BoxesTask(num_operations=3, query_steps="last"), 5))
    for row in rows:
        sample = BoxesSample.of_text(row["prompt"].rpartition(" Box ")[0])
        assert list(rows_of_sample(sample, {(3, row["box"])}, row["sample_id"])) == [row]
    world = BoxWorld(sample.contents)
    assert boxes_row(world, 0, 0)["step"] == 0


def test_answers_in_the_order_of_the_text():
    rows = list(rows_of_sample(BoxesSample.of_text(TEXT), {(0, 0), (1, 0), (2, 0), (3, 1)}, 0))
    # the key, which comes by "the contents", is named last where it was at first: after the map
    assert [as_last_named(row)["answer"] for row in rows] == [
        "contains the cup and the map",
        "contains the map",
        "contains the map and the key",
        "is empty",
    ]
    assert [{**as_last_named(row), "answer": row["answer"]} for row in rows] == rows
    put = BoxesSample.of_text(
        "Box 0 contains the pen, Box 1 is empty. Put the cup into Box 0. Put the axe into Box 0."
    )
    (row,) = rows_of_sample(put, {(2, 0)}, 0)
    assert row["answer"] == "contains the axe and the cup and the pen"
    assert as_last_named(row)["answer"] == "contains the pen and the cup and the axe"
