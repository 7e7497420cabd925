# SPDX-License-Identifier: Apache-2.0
"""The metrics as `evaluate` modules, loaded from their folders without a network."""

import evaluate
import numpy as np
import pytest

from hf_lip.metrics import certification_metrics, certified_accuracy, metric_path
from hf_lip.tracking_metrics import entity_tracking_exact_match


NAN = float("nan")


@pytest.fixture
def load(tmp_path):
    def load(name):
        return evaluate.load(metric_path(name), cache_dir=str(tmp_path))

    return load


@pytest.fixture(scope="module")
def figures():
    rng = np.random.default_rng(0)
    predictions = rng.integers(-1, 3, 40)
    radii = np.where(predictions == -1, 0.0, rng.exponential(0.5, 40))
    return {"predictions": predictions, "references": rng.integers(0, 3, 40), "radii": radii}


def test_certified_accuracy(load, figures):
    metric = load("certified_accuracy")
    correct = figures["predictions"] == figures["references"]
    expected = certified_accuracy(figures["radii"], correct, 0.3)
    assert 0.0 < expected < 1.0
    assert metric.compute(**figures, eps=0.3) == {"certified_accuracy": expected}
    assert metric.compute(**figures) == certification_metrics(**figures)
    assert metric.compute(**figures, eps={"small": 0.1}) == certification_metrics(**figures, eps={"small": 0.1})
    for part in (slice(0, 25), slice(25, 40)):
        metric.add_batch(**{name: values[part] for name, values in figures.items()})
    assert metric.compute(eps=0.3) == {"certified_accuracy": expected}


def test_average_certified_radius(load, figures):
    expected = certification_metrics(**figures)["average_certified_radius"]
    assert load("average_certified_radius").compute(**figures) == {"average_certified_radius": expected}


def test_entity_tracking_exact_match(load):
    metric = load("entity_tracking_exact_match")
    texts = {
        "predictions": ["contains the map and the cup", "is empty"],
        "references": ["contains the cup and the map"],
    }
    texts["references"].append("contains the key")
    options = {"depths": [2, 1], "states": [(0, 1), (0, 1)], "kind": "contents"}
    assert metric.compute(**texts, **options) == {
        "exact_match": 0.5,
        "exact_match_at_depth_1": 0.0,
        "exact_match_at_depth_2": 1.0,
        "whole_state_accuracy": 0.0,
    }
    assert metric.compute(predictions=[3, 5, 7], references=[3, 4, -100]) == {"exact_match": 0.5}
    ids = {"predictions": np.array([[1, 2], [3, 4]]), "references": np.array([[1, -100], [1, 4]])}
    depths = [[0, -1], [1, 2]]
    assert metric.compute(**ids, depths=depths) == entity_tracking_exact_match(**ids, depths=depths)


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("certified_accuracy", ([], [], []), "empty"),
        ("certified_accuracy", ([1, 2], [1], [0.1]), "Mismatch in the number of predictions"),
        ("certified_accuracy", ([1, 2], [1, 2], [0.1]), "Mismatch in the number of"),
        ("certified_accuracy", ([NAN], [1], [0.1]), "`predictions` has nan"),
        ("certified_accuracy", ([1], [NAN], [0.1]), "`references` has nan"),
        ("certified_accuracy", ([1], [1], [NAN]), "`radii` .* got nan"),
        ("average_certified_radius", ([], [], []), "empty"),
        ("average_certified_radius", ([1], [1, 2], [0.1]), "Mismatch"),
        ("average_certified_radius", ([1], [1], [NAN]), "`radii` .* got nan"),
        ("entity_tracking_exact_match", ([], []), "`predictions` is empty"),
        ("entity_tracking_exact_match", ([-100], [-100]), "no answer"),
        ("entity_tracking_exact_match", (["a"], ["a", "b"]), "Mismatch"),
        ("entity_tracking_exact_match", ([NAN, 1.0], [1, 1]), "`predictions` has nan"),
        ("entity_tracking_exact_match", (["a", None], ["a", "b"]), "has None at entry 1"),
    ],
)
def test_bad_input(load, name, arguments, message):
    with pytest.raises(ValueError, match=message):
        load(name).compute(**dict(zip(("predictions", "references", "radii"), arguments)))


def test_bad_radius(load, figures):
    with pytest.raises(ValueError, match="`eps` must be a finite radius"):
        load("certified_accuracy").compute(**figures, eps=NAN)
