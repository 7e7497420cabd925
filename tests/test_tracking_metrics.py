# SPDX-License-Identifier: Apache-2.0
import math
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from hf_lip.data import BoxesTask, tracking_dataset
from hf_lip.tracking_metrics import (
    DepthScore,
    compute_tracking_metrics,
    entity_tracking_exact_match,
    exact_match,
    exact_match_by_depth,
    exact_matches,
    minimal_layers,
    predicted_tokens,
    whole_state_accuracy,
)


TRUTHS = ["contains the cup and the map", "is empty", "contains the key"]
GUESSES = ["contains the map and the cup .", "contains nothing", "contains the key and the cup"]


def test_hand_computed_values():
    assert exact_matches(GUESSES, TRUTHS, kind="contents").tolist() == [True, True, False]
    assert exact_match(GUESSES, TRUTHS, kind="contents") == pytest.approx(2 / 3)
    # as texts none is equal
    assert exact_match(GUESSES, TRUTHS) == 0.0
    assert exact_match([" is  empty"], ["is empty"]) == 1.0
    assert exact_match([3, 5, 5], [3, 4, 5]) == pytest.approx(2 / 3)


def test_a_prediction_of_another_form_is_wrong():
    for guess in ("", "contains", "contains the cup and", "the cup and the map", "is empty is empty", "cup map"):
        assert exact_match([guess], ["contains the cup and the map"], kind="contents") == 0.0


def test_by_depth():
    scores = exact_match_by_depth(GUESSES, TRUTHS, [0, -1, 0], kind="contents")
    assert scores == {-1: DepthScore(1.0, 1), 0: DepthScore(0.5, 2)}
    assert list(scores) == [-1, 0]


def test_tokens_without_an_answer_do_not_count():
    labels = torch.tensor([[-100, 4, 5], [-100, 6, -100]])
    guesses = torch.tensor([[9, 4, 4], [9, 6, 6]])
    hops = torch.tensor([[-1, 0, 1], [-1, 1, -1]])
    assert exact_match(guesses, labels) == pytest.approx(2 / 3)
    assert exact_match_by_depth(guesses, labels, hops) == {0: DepthScore(1.0, 1), 1: DepthScore(0.5, 2)}
    assert exact_match(guesses.tolist(), labels.tolist()) == pytest.approx(2 / 3)


def test_predictions_are_aligned_with_labels():
    logits = torch.nn.functional.one_hot(torch.tensor([[4, 7, 2], [3, 3, 5]]), 9).float()
    assert predicted_tokens(logits).tolist() == [[-1, 4, 7], [-1, 3, 3]]
    labels = torch.tensor([[-100, 4, 6], [-100, -100, 3]])
    assert exact_match(predicted_tokens(logits), labels) == pytest.approx(2 / 3)
    with pytest.raises(ValueError, match="shape"):
        predicted_tokens(logits[0])
    logits[1, 2, 0] = float("nan")
    with pytest.raises(ValueError, match="NaN"):
        predicted_tokens(logits)


def test_whole_states_need_every_answer():
    right = [1, 1, 1, 0, 1, 1]
    states = [(0, 0), (0, 0), (0, 1), (0, 1), (1, 0), (1, 0)]
    assert whole_state_accuracy(right, [1] * 6, states) == pytest.approx(2 / 3)


def test_columns_of_a_data_set():
    rows = tracking_dataset(BoxesTask(num_operations=3), 4)
    guesses = rows["answer"][:]
    # one box wrong, in one of the 16 states
    guesses[0] = "contains the nothing"
    states = zip(rows["sample_id"], rows["step"])
    assert whole_state_accuracy(guesses, rows["answer"], states, kind="contents") == 15 / 16
    scores = exact_match_by_depth(guesses, rows["answer"], rows["numops"], kind="contents")
    assert sum(score.num_examples for score in scores.values()) == len(rows)
    assert scores[0].accuracy == 1 - 1 / scores[0].num_examples
    assert all(score.accuracy == 1.0 for depth, score in scores.items() if depth)


def test_all_figures_of_a_table():
    figures = entity_tracking_exact_match(GUESSES, TRUTHS, depths=[0, -1, 0], states=[1, 2, 2], kind="contents")
    assert figures == {"exact_match": 2 / 3, "exact_match_at_depth_0": 0.5, "whole_state_accuracy": 0.5}
    assert entity_tracking_exact_match([1, 2], [1, 3]) == {"exact_match": 0.5}


LABELS = np.array([[-100, 4, 5], [-100, 6, -100], [-100, -100, -100]])
HOPS = np.array([[-1, 0, 1], [-1, 1, -1], [-100, -100, -100]])


def outputs(predictions, label_ids):
    return SimpleNamespace(predictions=predictions, label_ids=label_ids)


def test_compute_metrics_of_a_causal_model():
    chosen = np.array([[4, 7, 2], [6, 3, 5], [0, 0, 0]])
    logits = np.eye(9, dtype=np.float32)[chosen]
    expected = {"exact_match": 2 / 3, "exact_match_at_depth_0": 1.0, "exact_match_at_depth_1": 0.5}
    assert compute_tracking_metrics(outputs(logits, (LABELS, HOPS))) == pytest.approx(expected)
    ids = predicted_tokens(torch.from_numpy(logits)).numpy()
    assert compute_tracking_metrics(outputs(ids, (LABELS, HOPS))) == pytest.approx(expected)
    assert compute_tracking_metrics(outputs((logits, None), LABELS)) == {"exact_match": pytest.approx(2 / 3)}
    # a row is right where all of its tokens are; one without labels is no answer
    rows = partial(compute_tracking_metrics, per="row")
    assert rows(outputs(logits, LABELS)) == {"exact_match": 0.5}
    by_depth = {"exact_match": 0.5, "exact_match_at_depth_3": 0.0, "exact_match_at_depth_5": 1.0}
    assert rows(outputs(logits, (LABELS, np.array([3, 5, 7])))) == by_depth


def test_compute_metrics_of_classifiers():
    logits = np.eye(9)[[[0, 4, 5], [0, 6, 0], [1, 1, 1]]]
    assert compute_tracking_metrics(outputs(logits, LABELS), causal=False) == {"exact_match": 1.0}
    assert compute_tracking_metrics(outputs(logits[0], np.array([0, 4, 7]))) == {"exact_match": pytest.approx(2 / 3)}


def test_least_layers_of_the_theorem():
    expected = {0: 0, 1: 1, 2: 2, 3: 2, 4: 3, 7: 3, 8: 4, 15: 4, 16: 5, 31: 5, 32: 6, 63: 6, 64: 7, 127: 7}
    assert {changes: minimal_layers(changes) for changes in expected} == expected
    assert all(minimal_layers(n) == math.ceil(math.log2(n + 1)) for n in range(1, 2000))
    for wrong in (-1, 1.5):
        with pytest.raises(ValueError, match="integer >= 0"):
            minimal_layers(wrong)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: exact_match([], []), "no answer"),
        (lambda: exact_match([1], [-100]), "no answer"),
        (lambda: exact_match(["a"], ["a", "b"]), "equally long"),
        (lambda: exact_match([1, 2], [[1, 2]]), "equally long"),
        (lambda: exact_match([[1, 2], [3]], [[1, 2], [3]]), "`predictions` must be texts, or integers"),
        (lambda: exact_match([1.0, float("nan")], [1, 2]), "`predictions`.* nan"),
        (lambda: exact_match([1, 2], np.array([1.0, np.inf])), "`references`.* inf"),
        (lambda: exact_match([0.5], [1]), "no integer"),
        (lambda: exact_match(["a", None], ["a", "b"]), "has None at entry 1"),
        (lambda: exact_match(["a", float("nan")], ["a", "b"]), "has nan at entry 1"),
        (lambda: exact_match("ab", "ab"), "one text"),
        (lambda: exact_match([1], ["1"]), "both be token ids"),
        (lambda: exact_match([1], [1], kind="contents"), "both be texts"),
        (lambda: exact_match(["a"], ["a"], kind="contents"), "'a' at entry 0"),
        (lambda: exact_match(["a"], ["a"], kind="sets"), "`kind`"),
        (lambda: exact_match_by_depth(["a"], ["a"], [1, 2]), "`depths` must have the shape"),
        (lambda: exact_match_by_depth(["a"], ["a"], [float("nan")]), "`depths`.* nan"),
        (lambda: exact_match_by_depth(["a"], ["a"], [0.5]), "`depths`"),
        (lambda: exact_match_by_depth(["a"], ["a"], [None]), "`depths`.* None"),
        (lambda: exact_match_by_depth(["a"], ["a"], [-2]), ">= -1"),
        (lambda: whole_state_accuracy(["a"], ["a"], []), "`states`"),
        (lambda: whole_state_accuracy([], [], []), "no answer"),
        (lambda: entity_tracking_exact_match([], []), "no answer"),
        (lambda: entity_tracking_exact_match([1], [1, 2]), "equally long"),
        (lambda: entity_tracking_exact_match([math.nan], [1]), "`predictions`.* nan"),
        (lambda: compute_tracking_metrics(outputs(np.full((1, 3, 9), np.nan), LABELS[:1])), "has NaN"),
        (lambda: compute_tracking_metrics(outputs(np.full((1, 9), np.nan), [0])), "has NaN"),
        (lambda: compute_tracking_metrics(outputs(np.ones(3), LABELS[:1])), "must be logits"),
        (lambda: compute_tracking_metrics(outputs(LABELS[:2], LABELS[:1])), "equally long"),
        (lambda: compute_tracking_metrics(outputs(LABELS, (LABELS, HOPS, HOPS))), "got 3 arrays"),
        (lambda: compute_tracking_metrics(outputs(LABELS, LABELS), per="text"), "`per`"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()
