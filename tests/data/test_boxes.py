# SPDX-License-Identifier: Apache-2.0
import gzip
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from hf_lip.data import BoxesTask, load_boxes, tracking_dataset, tracking_tokenizer, unknown_words
from hf_lip.data.box_world import BoxWorld, Operation, parse_contents, parse_description, parse_operation
from hf_lip.data.boxes import OBJECTS
from hf_lip.tracking_metrics import exact_match
from tests.data.solvers import (
    boxes_after,
    boxes_answer,
    boxes_depths,
    guess_initial,
    guess_last_named,
    guess_last_sentence,
    split_question,
)


SHARED = Path(__file__).resolve().parents[3] / "shared" / "data" / "boxes"

TASKS = {
    "base": BoxesTask(),
    "move-contents": BoxesTask(move_contents=True),
    "contents-only": BoxesTask(operations={"contents": 1}, num_operations=24),
    "mixed": BoxesTask(operations={"contents": 3, "move": 1, "put": 1, "remove": 1}, num_operations=20, num_boxes=4),
    "small": BoxesTask(num_boxes=3, max_objects=1, expected_objects=0.6, num_operations=6, objects=("a1", "b", "c")),
}


@pytest.mark.parametrize("name", TASKS)
def test_an_independent_replay_agrees(name):
    task = TASKS[name]
    rows = list(tracking_dataset(task, 6, "test"))
    assert len(rows) == 6 * task.num_boxes * (task.num_operations + 1)
    for row in rows:
        assert row["answer"] == boxes_answer(row["prompt"])
        assert (row["numops"], row["num_moves"], row["implicit_hops"]) == boxes_depths(row["prompt"])
        assert sum(row["numops_by_op"].values()) == row["numops"]
        text, box = split_question(row["prompt"])
        assert (box, text.count(".") - 1) == (row["box"], row["step"])
        contents = boxes_after(text)
        assert max(len(names) for names in contents.values()) <= task.max_objects
        assert len({name for names in contents.values() for name in names}) == sum(map(len, contents.values()))


def test_rows_ask_every_box_after_every_step():
    rows = tracking_dataset(TASKS["base"], 2)
    assert [(row["sample_id"], row["step"], row["box"]) for row in rows] == [
        (world, step, box) for world in range(2) for step in range(13) for box in range(7)
    ]
    last = tracking_dataset(BoxesTask(query_steps="last"), 2)
    assert list(last) == [row for row in rows if row["step"] == 12]
    some = tracking_dataset(BoxesTask(queries_per_world=5), 3)
    assert Counter(some["sample_id"]) == {0: 5, 1: 5, 2: 5}
    every = [str(row) for row in tracking_dataset(TASKS["base"], 3)]
    assert all(str(row) in every for row in some)


@pytest.mark.parametrize("name", TASKS)
def test_the_vocabulary_covers_the_text(name):
    task = TASKS[name]
    tokenizer = tracking_tokenizer(task.vocabulary())
    for row in tracking_dataset(task, 3):
        assert unknown_words(tokenizer, f"{row['prompt']} {row['answer']}") == []


def test_splits_share_no_vector_of_initial_counts():
    counts = {}
    for split in ("train", "validation", "test"):
        rows = tracking_dataset(BoxesTask(num_operations=0), 150, split)
        sizes = [len(parse_contents(answer)) for answer in rows["answer"]]
        counts[split] = {tuple(sizes[start : start + 7]) for start in range(0, len(sizes), 7)}
    assert not counts["train"] & counts["test"]
    assert not counts["train"] & counts["validation"]
    assert not counts["validation"] & counts["test"]


def shares(values):
    counts = Counter(int(value) for value in values)
    return {value: count / counts.total() for value, count in counts.items()}


def close(found, expected, tolerance):
    return all(abs(found.get(key, 0.0) - share) <= tolerance for key, share in expected.items())


def test_statistics_are_those_of_the_rules():
    """Against the figures regenerated with the public generator, ChaCAL spec 4.2."""
    rows = tracking_dataset(replace(TASKS["base"], queries_per_world=40), 150, "test")
    total = 90_090
    expected = {0: 35_533, 1: 26_265, 2: 16_290, 3: 8_081, 4: 2_901, 5: 786, 6: 202}
    assert close(shares(rows["numops"]), {key: count / total for key, count in expected.items()}, 0.025)
    assert np.mean([answer == "is empty" for answer in rows["answer"]]) == pytest.approx(0.26, abs=0.02)
    words = [len(f"{row['prompt']} {row['answer']}".split()) for row in rows]
    assert np.mean(words) == pytest.approx(108, abs=3)
    assert 170 < max(words) < 215
    moves = [moves for moves in rows["num_moves"] if moves >= 0]
    assert close(shares(moves), {0: 0.770, 1: 0.197, 2: 0.030, 3: 0.003}, 0.035)
    # every operation of the base form names its objects
    assert set(rows["implicit_hops"]) == {-1, 0}
    rows = tracking_dataset(replace(TASKS["move-contents"], queries_per_world=40), 150, "test")
    hops = [hops for hops in rows["implicit_hops"] if hops >= 0]
    assert close(shares(hops), {0: 0.893, 1: 0.100, 2: 0.0065}, 0.015)


def operations_of(prompts):
    """{world: [operation sentences]} of the last questions."""
    return [split_question(prompt)[0].removesuffix(".").split(". ") for prompt in prompts]


def statistics(rows):
    """Shares of the operations, of how many objects they name, of objects a box, and of sentence forms."""
    rows = rows.filter(lambda row: row["step"] == 12 and row["box"] == 0)
    kinds, named, initial, forms = [], {"Move": [], "Remove": [], "Put": []}, [], set()
    by_half = {0: [], 1: []}
    for text in operations_of(rows["prompt"]):
        description, *operations = text
        initial += [len(names) for names in parse_description(description)]
        assert len(operations) == 12
        for place, sentence in enumerate(operations):
            words = sentence.split()
            kinds.append(words[0])
            by_half[place // 6].append(words[0])
            # objects in alphabetical order
            objects = [words[index + 1] for index, word in enumerate(words) if word == "the"]
            assert objects == sorted(objects)
            named[words[0]].append(len(objects))
            shape = ["_" if word in objects else "#" if word.isdecimal() else word for word in words]
            forms.add(" ".join(shape))
    parts = {"kinds": kinds, "initial": initial, "first half": by_half[0], "second half": by_half[1], **named}
    return {
        name: {key: count / len(part) for key, count in Counter(part).items()} for name, part in parts.items()
    }, forms


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs ../shared/data/boxes")
def test_statistics_are_those_of_the_shared_file(tmp_path):
    # of 13 x 7 lines a world, the one of step 12 and box 0
    lines = gzip.decompress((SHARED / "dev-t5.jsonl.gz").read_bytes()).splitlines(keepends=True)[84::91]
    (tmp_path / "dev.jsonl").write_bytes(b"".join(lines))
    theirs, their_forms = statistics(load_boxes(tmp_path / "dev.jsonl"))
    ours, our_forms = statistics(tracking_dataset(replace(TASKS["base"], query_steps="last"), 220, "train"))
    assert their_forms == our_forms
    assert set(ours) == set(theirs)
    for name in ours:
        # 220 worlds each: 2640 operations, 1540 boxes, about 640 puts
        assert close(ours[name], theirs[name], 0.07 if name == "Put" else 0.055), (name, ours[name], theirs[name])


def rates(rows):
    """How often each trivial guess is right."""
    guesses = {
        "is empty": lambda prompt: "is empty",
        "initial": guess_initial,
        "last sentence": guess_last_sentence,
        "last named": guess_last_named,
    }
    prompts, answers = rows["prompt"][:], rows["answer"][:]
    return {
        name: exact_match([guess(prompt) for prompt in prompts], answers, kind="contents")
        for name, guess in guesses.items()
    }


def is_changed(row):
    return row["numops"] > 0


def test_guesses_are_right_at_the_stated_rates():
    changed = tracking_dataset(replace(TASKS["base"], queries_per_world=20), 100).filter(is_changed)
    expected = {"is empty": 0.31, "initial": 0.04, "last sentence": 0.46, "last named": 1.0}
    assert rates(changed) == pytest.approx(expected, abs=0.04)
    changed = tracking_dataset(replace(TASKS["contents-only"], queries_per_world=20), 100).filter(is_changed)
    expected = {"is empty": 0.36, "initial": 0.11, "last sentence": 0.36, "last named": 0.11}
    assert rates(changed) == pytest.approx(expected, abs=0.05)
    deep = changed.filter(lambda row: row["implicit_hops"] >= 2)
    assert len(deep) > 0.4 * len(changed)
    assert max(rates(deep).values()) < 0.16


def test_longer_worlds_are_deeper():
    depths = [
        np.mean(
            tracking_dataset(BoxesTask(operations={"contents": 1}, num_operations=n, query_steps="last"), 40)[column]
        )
        for column in ("numops", "implicit_hops")
        for n in (4, 12, 48)
    ]
    assert depths[:3] == sorted(depths[:3])
    assert depths[3:] == sorted(depths[3:])
    assert depths[2] > 8
    assert depths[5] > 3


def test_one_sentence_of_each_kind():
    world = BoxWorld([["cup", "map"], [], ["key"]])
    assert world.text() == "Box 0 contains the cup and the map, Box 1 is empty, Box 2 contains the key."
    told = [
        (Operation("contents", source=0, target=1), "Move the contents of Box 0 to Box 1", (1, 1)),
        (Operation("contents", source=1, target=0), "Move the contents of Box 1 to Box 0", (2, 2)),
        (Operation("move", ("map", "cup"), 0, 1), "Move the cup and the map from Box 0 to Box 1", (3, 0)),
        (Operation("remove", ("cup",), 1), "Remove the cup from Box 1", (3, 0)),
        (Operation("put", ("cup",), target=1), "Put the cup into Box 1", (3, 0)),
    ]
    for operation, sentence, depths in told:
        assert operation.sentence() == sentence
        assert parse_operation(sentence).sentence() == sentence
        world.apply(operation)
        assert world.depths(0 if operation.target == 0 else 1) == depths
    assert world.depths(0) == (-1, -1)
    assert world.numops_by_op(1) == {"move": 3, "remove": 1, "put": 1}
    assert world.answer(1) == "contains the cup and the map"


@pytest.mark.parametrize(
    "operation",
    [
        Operation("move", ("cup",), 0, 3),
        Operation("move", ("cup",), 0, 0),
        Operation("move", ("key",), 0, 1),
        Operation("remove", ("key", "key"), 2),
        Operation("put", ("key",), target=1),
        Operation("contents", source=1, target=0),
        Operation("put", (), target=1),
    ],
    ids=lambda operation: operation.kind,
)
def test_impossible_operations(operation):
    world = BoxWorld([["cup", "map"], [], ["key"]])
    with pytest.raises(ValueError, match="Box"):
        world.apply(operation)
    # nothing was done by halves
    assert [world.contents(box) for box in range(3)] == [["cup", "map"], [], ["key"]]
    assert world.num_steps() == 0


def test_contents_of_answers():
    assert parse_contents("contains the cup and the map") == parse_contents(" contains  the map and the cup .")
    assert parse_contents("is empty.") == parse_contents("contains nothing") == frozenset()
    for text in (
        "",
        "contains",
        "contains the",
        "contains cup",
        "contains the cup and map",
        "the cup",
        "is empty box",
    ):
        assert parse_contents(text) is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_boxes": 1}, "`num_boxes`"),
        ({"num_operations": -1}, "`num_operations`"),
        ({"expected_objects": float("nan")}, "`expected_objects`"),
        ({"expected_put": 0.0}, "`expected_put`"),
        ({"operations": {"swap": 1}}, "move, contents, remove, put"),
        ({"operations": {"move": 0}}, "of their sum"),
        ({"operations": {"move": float("nan")}}, "of their sum"),
        ({"operations": {"move": -1, "put": 3}}, "of their sum"),
        ({"operations": {"move": 1, "put": 1e-6}}, "of their sum"),
        ({"objects": ("cup",)}, "at least 21"),
        ({"objects": (*OBJECTS, "two words")}, "'two words'"),
        ({"objects": (*OBJECTS, "and")}, "'and'"),
        ({"objects": (*OBJECTS, OBJECTS[0])}, "twice"),
        ({"query_steps": "first"}, "`query_steps`"),
        ({"queries_per_world": 92}, "in 1..91"),
    ],
)
def test_bad_input(arguments, message):
    with pytest.raises(ValueError, match=message):
        BoxesTask(**arguments)


def test_operations_that_can_not_go_on_say_so():
    # nothing comes back, so fifty removals can not be done
    with pytest.raises(ValueError, match="can not go on"):
        tracking_dataset(BoxesTask(operations={"remove": 1}, num_operations=50), 1)
