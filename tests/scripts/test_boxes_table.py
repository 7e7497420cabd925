# SPDX-License-Identifier: Apache-2.0
"""The table of Boxes must say what the runs in it measured, and put each run where it belongs."""

import json

import pytest

from .runs import ROOT, loaded_script
from .sequence_runs import run_script


BOXES = [
    *("--task", "boxes", "--num_boxes", 3, "--num_operations", 3, "--eval_num_operations", 4, "--hidden_size", 16),
    *("--max_steps", 4, "--train_batch_size", 4, "--eval_samples", 6, "--warmup_steps", 1, "--curriculum", "grow"),
]


@pytest.fixture(scope="module")
def script():
    with loaded_script(ROOT / "scripts" / "benchmarks" / "boxes_table.py") as module:
        yield module


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("boxes")
    for name, words in {
        "softmax-2": ["--attention", "softmax", "--num_hidden_layers", 2],
        "mixed-seed1": ["--layer_types", "full", "chained", "--seed", 1],
        "mixed-seed0": ["--layer_types", "full", "chained", "--seed", 0],
        "longer": ["--attention", "softmax", "--max_steps", 5],
    }.items():
        run_script("train_entity_tracking", folder / name, *BOXES, *words)
    return folder


def test_figures_are_those_of_the_runs(script, runs, capsys):
    names = ("softmax-2", "mixed-seed1", "mixed-seed0")
    script.main(["--runs", *(str(runs / name) for name in names), "--out", str(runs / "table")])
    results = json.loads((runs / "table" / "results.json").read_text())
    assert set(results["sets"]) == {"test", "extrapolation"}
    measured = {name: json.loads((runs / name / "results.json").read_text())["evaluations"] for name in names}
    for name, rows in results["sets"].items():
        assert (runs / "table" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        mixed, softmax = rows
        assert (mixed["model"], mixed["seeds"]) == ("1 softmax + 1 chained", [0, 1])
        assert (softmax["model"], softmax["seeds"]) == ("2 softmax", [0])
        assert softmax["all"]["by_seed"] == [measured["softmax-2"][name]["accuracy"]]
        assert mixed["all"]["by_seed"] == [measured[f"mixed-seed{seed}"][name]["accuracy"] for seed in (0, 1)]
        assert mixed["all"]["num_examples"] == 2 * softmax["all"]["num_examples"]
        for depth, share in softmax["by_depth"].items():
            assert share["accuracy"] == pytest.approx(measured["softmax-2"][name]["by_numops"][depth]["accuracy"])
            assert share["interval"][0] <= share["accuracy"] <= share["interval"][1]
        total = sum(share["num_examples"] for share in softmax["by_depth"].values())
        assert total == softmax["all"]["num_examples"]
    assert "1 softmax + 1 chained (2)" in capsys.readouterr().out


def test_runs_that_can_not_be_compared_are_refused(script, runs, tmp_path):
    with pytest.raises(ValueError, match="different numbers of steps"):
        script.main(["--runs", str(runs / "softmax-2"), str(runs / "longer"), "--out", str(tmp_path)])
    with pytest.raises(ValueError, match=r"has no results\.json"):
        script.main(["--runs", str(tmp_path), "--out", str(tmp_path)])
    (tmp_path / "results.json").write_text('{"task": "chains"}')
    with pytest.raises(ValueError, match="no run of --task boxes"):
        script.main(["--runs", str(tmp_path), "--out", str(tmp_path)])
