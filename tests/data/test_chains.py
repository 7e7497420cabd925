# SPDX-License-Identifier: Apache-2.0
from collections import Counter

import numpy as np
import pytest
import torch
from torch import nn

from hf_lip.data import (
    ChainsTask,
    RandomChainsTask,
    TrackingCollator,
    embed_statements,
    tracking_dataset,
    tracking_tokenizer,
)
from hf_lip.tracking_metrics import exact_match, predicted_tokens
from tests.data.solvers import FIRST_WORD, chain_value, chain_values, statements_of


TASKS = {
    "two-entities": {"num_entities": 2, "num_state_changes": 9},
    "many-entities": {"num_entities": 12, "num_state_changes": (0, 4)},
    "more-names": {"num_entities": 3, "num_state_changes": (1, 6), "num_variables": 50, "num_values": 5},
    "random": {"num_statements": 20},
    "random-deep": {"num_statements": 30, "literal_probability": 0.02, "previous_probability": 1.0},
}


def make(name, form):
    kind = RandomChainsTask if name.startswith("random") else ChainsTask
    return kind(form=form, **TASKS[name])


@pytest.mark.parametrize("name", TASKS)
def test_a_solver_finds_every_label_of_dense_rows(name):
    task = make(name, "dense")
    words = task.vocabulary()
    for row in tracking_dataset(task, 40):
        found = chain_values(statements_of(row, words))
        told = [(words[label - FIRST_WORD], hops) for label, hops in zip(row["labels"][2:], row["hops"][2:])]
        assert told == found
        assert row["labels"][:2] == [-100, -100]
        assert row["hops"][:2] == [-1, -1]
        assert row["num_state_changes"] == max(hops for _, hops in found)
        assert len(row["labels"]) == len(row["hops"]) == len(row["statement_ids"])


@pytest.mark.parametrize("name", TASKS)
def test_a_solver_finds_every_answer_of_text_rows(name):
    task = make(name, "text")
    known = set(task.vocabulary())
    for row in tracking_dataset(task, 40):
        assert chain_value(row["prompt"]) == (row["answer"], row["num_state_changes"])
        assert set(row["prompt"].split()) | {row["answer"]} <= known


def test_the_depth_and_the_entities_are_as_asked():
    task = ChainsTask(num_entities=3, num_state_changes=(2, 5))
    depths = Counter()
    for row in tracking_dataset(task, 200):
        changes = row["num_state_changes"]
        depths[changes] += 1
        # three chains, each with one statement of every depth
        assert Counter(row["hops"][2:]) == dict.fromkeys(range(changes + 1), 3)
        assert row["num_entities"] == 3
        assert len(row["statement_ids"]) == 3 * (changes + 1) + 2
        # the initial values come first
        assert row["hops"][2:5] == [0, 0, 0]
    assert set(depths) == {2, 3, 4, 5}
    assert min(depths.values()) > 30


def test_ids_are_those_of_the_tokenizer():
    for form in ("dense", "text"):
        task = ChainsTask(num_entities=2, num_state_changes=3, form=form)
        tokenizer = tracking_tokenizer(task.vocabulary())
        assert tokenizer.convert_tokens_to_ids(task.vocabulary()) == list(range(FIRST_WORD, len(tokenizer)))
    prompt = tracking_dataset(task, 1)[0]["prompt"]
    # <bos>, eight statements of three words, a mark after each, and the question
    assert len(tokenizer(prompt)["input_ids"]) == 1 + 8 * 3 + 8 + 2


def test_labels_stand_where_a_causal_model_looks_for_them():
    """A model that outputs at every token the value after this statement has no loss."""
    task = ChainsTask(num_entities=2, num_state_changes=(1, 4))
    words = task.vocabulary()
    rows = list(tracking_dataset(task, 4))
    batch = TrackingCollator()(rows)
    logits = torch.zeros(*batch["labels"].shape, FIRST_WORD + len(words))
    for scores, row in zip(logits, rows, strict=True):
        for place, (value, _) in enumerate(chain_values(statements_of(row, words)), 1):
            scores[place, FIRST_WORD + words.index(value)] = 50.0
    loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())
    assert loss < 1e-6
    assert exact_match(predicted_tokens(logits), batch["labels"]) == 1.0


def test_statement_embedding_is_the_sum_of_its_words():
    embedding = nn.Embedding(30, 4)
    ids = torch.randint(0, 30, (2, 5, 3))
    expected = torch.stack([embedding(ids[..., part]) for part in range(3)]).sum(dim=0)
    assert torch.allclose(embed_statements(embedding, ids), expected)
    with pytest.raises(ValueError, match=r"\(B, n, 3\)"):
        embed_statements(embedding, ids[..., :2])


def test_values_can_not_be_guessed():
    """Majority, the first, last and nearest initial values, and the value of the statement before."""
    task = ChainsTask(num_entities=4, num_state_changes=(1, 12))
    words = task.vocabulary()
    right, count = Counter(), 0
    for row in tracking_dataset(task, 400):
        found = [value for value, _ in chain_values(statements_of(row, words))]
        initial, changed = found[:4], found[4:]
        assert len(set(initial)) == 4
        for place, value in enumerate(changed, 4):
            count += 1
            right["always 0"] += value == "0"
            right["majority"] += value == Counter(initial + changed[: place - 4]).most_common(1)[0][0]
            right["first"] += value == initial[0]
            right["last"] += value == initial[-1]
            right["statement before"] += value == found[place - 1]
    assert count > 8000
    for guess, number in right.items():
        # 1/num_entities, to four standard deviations of answers that come in chains
        assert number / count < 0.25 + 0.035, guess


def test_random_chains_follow_section_3():
    task = RandomChainsTask()
    words = task.vocabulary()
    literals, previous, statements, last_right = 0, 0, 0, 0
    for row in tracking_dataset(task, 600):
        told = statements_of(row, words)
        values = chain_values(told)
        last = None
        for place, (_, read, literal) in enumerate(told):
            last = literal if literal != "none" else last
            last_right += values[place][0] == last
            if place:
                statements += 1
                literals += literal != "none"
                previous += read[1:] == told[place - 1][0][1:]
    assert literals / statements == pytest.approx(0.1, abs=0.015)
    # 0.9 of (0.75, or by chance the same place: the mean of 1/place over places 1 .. 19)
    by_chance = np.mean([1 / place for place in range(1, 20)])
    assert previous / statements == pytest.approx(0.9 * (0.75 + 0.25 * by_chance), abs=0.02)
    # as the documentation says
    assert last_right / (600 * 20) == pytest.approx(0.82, abs=0.02)


@pytest.mark.parametrize(
    ("kind", "arguments", "message"),
    [
        (ChainsTask, {"num_entities": 1}, "`num_entities`"),
        (ChainsTask, {"num_state_changes": (5, 2)}, "`num_state_changes`"),
        (ChainsTask, {"num_state_changes": 1.5}, "`num_state_changes`"),
        (ChainsTask, {"num_state_changes": (1, 2, 3)}, "pair"),
        (ChainsTask, {"num_values": 1}, "`num_values`"),
        (ChainsTask, {"num_variables": 10}, "`num_variables` must be an integer >= 256"),
        (ChainsTask, {"form": "words"}, "`form`"),
        (RandomChainsTask, {"num_statements": 0}, "`num_statements`"),
        (RandomChainsTask, {"literal_probability": float("nan")}, "`literal_probability`"),
        (RandomChainsTask, {"previous_probability": 1.1}, "`previous_probability`"),
    ],
)
def test_bad_input(kind, arguments, message):
    with pytest.raises(ValueError, match=message):
        kind(**arguments)
