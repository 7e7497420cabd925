# SPDX-License-Identifier: Apache-2.0
"""The table of accuracy by depth must say what the runs in it do, and put each run where it belongs."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from hf_lip.data import ChainsTask, embed_statements, tracking_dataset

from .runs import ROOT, loaded_script
from .sequence_runs import run_script


CHAINS = [
    *("--task", "chains", "--num_state_changes", 1, 3, "--num_values", 4, "--hidden_size", 32, "--max_steps", 40),
    *("--train_batch_size", 16, "--eval_samples", 8, "--warmup_steps", 4, "--initializer_range", 0.1),
    *("--eval_num_state_changes", 4, 5),
]
CHAINED = ["--layer_types", "chained", "--gamma", 0.9, "--diagonal", "keep"]


@pytest.fixture(scope="module")
def script():
    with loaded_script(ROOT / "scripts" / "benchmarks" / "depth_table.py") as module:
        yield module


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("depth")
    for name, words in {
        "softmax-2": ["--attention", "softmax", "--num_hidden_layers", 2],
        "chained-seed1": [*CHAINED, "--seed", 1],
        "chained-seed0": [*CHAINED, "--seed", 0],
    }.items():
        run_script("train_entity_tracking", folder / name, *CHAINS, *words)
    return folder


def test_every_accuracy_is_that_of_the_model(script, runs):
    names = ("softmax-2", "chained-seed1", "chained-seed0")
    arguments = ["--num_state_changes", "5", "--trained", "3", "--samples", "20", "--batch_size", "7", "--seed", "3"]
    script.main(["--runs", *(str(runs / name) for name in names), *arguments, "--out", str(runs / "table")])
    results = json.loads((runs / "table" / "results.json").read_text())
    assert (runs / "table" / "depth.png").read_bytes().startswith(b"\x89PNG")
    assert results["answers_per_depth"] == 40
    chained, softmax = results["models"]
    assert (chained["model"], chained["seeds"]) == ("1 chained", [0, 1])
    assert (softmax["model"], softmax["seeds"]) == ("2 softmax", [0])

    task = ChainsTask(num_entities=2, num_values=4, num_variables=12, num_state_changes=5)
    rows = tracking_dataset(task, 20, "test", seed=3)
    for name, curve in (
        ("chained-seed0", chained["accuracy_by_depth"][0]),
        ("chained-seed1", chained["accuracy_by_depth"][1]),
        ("softmax-2", softmax["accuracy_by_depth"][0]),
    ):
        model = AutoModelForCausalLM.from_pretrained(runs / name).eval()
        right, asked = [0] * 6, [0] * 6
        for row in rows:
            ids = torch.tensor([row["statement_ids"]])
            with torch.inference_mode():
                logits = model(inputs_embeds=embed_statements(model.get_input_embeddings(), ids)).logits[0]
            for place, (label, hops) in enumerate(zip(row["labels"], row["hops"], strict=True)):
                if place > 0 and label >= 0:
                    asked[hops] += 1
                    right[hops] += int(logits[place - 1].argmax()) == label
        assert asked == [40] * 6
        assert curve == pytest.approx([share / 40 for share in right])
    assert chained["least_trained"] == min(min(curve[1:4]) for curve in chained["accuracy_by_depth"])
    assert chained["least_beyond"] == min(min(curve[4:]) for curve in chained["accuracy_by_depth"])
    assert list(chained["bands"]) == ["1-1", "2-3", "4-5"]
    first, second = chained["accuracy_by_depth"]
    assert chained["bands"]["2-3"]["by_seed"] == pytest.approx([sum(first[2:4]) / 2, sum(second[2:4]) / 2])


def test_other_folders_and_mixed_tasks_are_refused(script, runs, tmp_path):
    out = ["--out", str(tmp_path / "table")]
    with pytest.raises(ValueError, match=r"no results\.json"):
        script.main(["--runs", str(tmp_path), *out])
    run_script("train_entity_tracking", tmp_path / "other", *CHAINS, *CHAINED, "--num_entities", 3, "--max_steps", 5)
    with pytest.raises(ValueError, match="different vocabularies"):
        script.main(["--runs", str(runs / "softmax-2"), str(tmp_path / "other"), *out])
    words = ["--form", "text", "--num_state_changes", 1, "--hidden_size", 32, "--max_steps", 1, "--eval_samples", 2]
    run_script("train_entity_tracking", tmp_path / "text", *words)
    with pytest.raises(ValueError, match="one token a statement"):
        script.main(["--runs", str(tmp_path / "text"), *out])
    assert not (tmp_path / "table").exists()
