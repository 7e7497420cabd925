# SPDX-License-Identifier: Apache-2.0
from collections import Counter

import pytest

from hf_lip.data import PermutationsTask, encode_answers, tracking_dataset, tracking_tokenizer
from tests.data.solvers import FIRST_WORD, arrange


@pytest.mark.parametrize(("moves", "number"), [("all", 120), ("even", 60), ("swaps", 10)])
def test_a_simulator_finds_every_state(moves, number):
    task = PermutationsTask(num_moves=(1, 9), moves=moves)
    words = task.vocabulary()
    used = set()
    for row in tracking_dataset(task, 150):
        told = [words[token - FIRST_WORD] for token in row["input_ids"][1:-1]]
        states = [words[label - FIRST_WORD] for label in row["labels"][2:]]
        assert states == [arrange(told[: place + 1]) for place in range(len(told))]
        assert row["hops"] == [-1, -1, *range(1, len(told) + 1)]
        assert row["num_state_changes"] == len(told)
        used |= set(told)
    assert len(words) == 120
    assert number * 0.9 <= len(used) <= number


def test_text_rows():
    task = PermutationsTask(num_moves=(2, 6), form="text")
    dataset = tracking_dataset(task, 50)
    for row in dataset:
        *moves, end = row["prompt"].split()
        assert end == "="
        assert row["answer"] == arrange(moves)
    encoded = encode_answers(dataset, tracking_tokenizer(task.vocabulary()))
    # the answer and <eos>
    assert all(sum(label != -100 for label in row["labels"]) == 2 for row in encoded)


def test_the_convention_of_the_documentation():
    assert arrange(["21034"]) == "21034"
    assert arrange(["21034", "10234"]) == "12034"


@pytest.mark.parametrize(("moves", "states"), [("all", 120), ("even", 60)])
def test_states_can_not_be_guessed(moves, states):
    """The most frequent state, the last move, and the product of the last two moves."""
    task = PermutationsTask(num_moves=3, moves=moves)
    right, reached, count = Counter(), Counter(), 3000
    for row in tracking_dataset(task, count):
        words = task.vocabulary()
        told = [words[token - FIRST_WORD] for token in row["input_ids"][1:-1]]
        state = words[row["labels"][-1] - FIRST_WORD]
        reached[state] += 1
        right["last move"] += state == told[-1]
        right["first move"] += state == told[0]
        right["last two moves"] += state == arrange(told[-2:])
    right["majority"] = reached.most_common(1)[0][1]
    for guess, number in right.items():
        # five standard deviations of a count whose mean is count / states
        assert number < count / states + 5 * (count / states) ** 0.5, guess


def test_two_swaps_are_undone_at_a_rate_of_one_in_ten():
    task = PermutationsTask(num_moves=(2, 2), moves="swaps", num_elements=5)
    words = task.vocabulary()
    # one hundred words of two swaps, of which a split has a part: all splits together give the rate
    rows = {
        tuple(row["input_ids"]): words[row["labels"][-1] - FIRST_WORD]
        for split in ("train", "validation", "test")
        for row in tracking_dataset(task, 400, split)
    }
    assert len(rows) == 100
    assert sum(state == "01234" for state in rows.values()) == 10


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_elements": 8}, "`num_elements` must be an integer in 2..7"),
        ({"num_elements": True}, "`num_elements`"),
        ({"num_moves": 0}, "`num_moves`"),
        ({"moves": "rotations"}, "`moves`"),
        ({"form": "long"}, "`form`"),
        ({"num_elements": 2, "moves": "even"}, "three elements"),
    ],
)
def test_bad_input(arguments, message):
    with pytest.raises(ValueError, match=message):
        PermutationsTask(**arguments)
