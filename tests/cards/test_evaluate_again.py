# SPDX-License-Identifier: Apache-2.0
"""Results of other weights, or of which nobody knows of which weights they are, are measured again."""

import json

import pytest
from safetensors.torch import load_file, save_file

import hf_lip
from hf_lip.cards import check_card, evaluate_again, write_card
from hf_lip.checkpoints.stored_weights import stored_weights_sha256

from .runs import copied, edit_json


def results_of(folder):
    return json.loads((folder / "results.json").read_text())


def test_a_file_from_before_hashes_keeps_what_it_says_of_the_training(digits):
    before = results_of(digits)
    edit_json(digits / "results.json", lambda results: results.pop("weights_sha256"))
    with pytest.raises(ValueError, match="evaluate again with `hf-lip card --evaluate-again digits`"):
        write_card(digits, overwrite=True)
    done = evaluate_again(digits, device="cpu")
    assert (done.changed, done.same_run) == ([], True)
    after = results_of(digits)
    again = after.pop("evaluated_again")
    assert after == before
    assert set(again["hardware"]) == set(before["hardware"])
    assert again["hardware"]["dtype"] == "float64"
    write_card(digits, overwrite=True)
    assert "Evaluated again on " in (digits / "README.md").read_text()
    assert check_card(digits, device="cpu").ok


def test_other_weights_have_other_figures_and_another_training(digits):
    before = results_of(digits)
    model = hf_lip.LipschitzVisionForImageClassification.from_pretrained(digits)
    model.get_parameter("classifier.bias").data[3] += 0.05
    model.save_pretrained(digits)
    with pytest.raises(ValueError, match="its figures are of another model"):
        write_card(digits, overwrite=True)
    done = evaluate_again(digits, device="cpu")
    assert not done.same_run
    assert "clean accuracy" in {name for name, _, _ in done.changed}
    after = results_of(digits)
    assert after["weights_sha256"] == stored_weights_sha256(digits) != before["weights_sha256"]
    assert after["clean_accuracy"] < before["clean_accuracy"]
    assert after["arguments"] == before["arguments"]
    assert not {"command", "history", "seconds", "hardware", "versions", "epochs"} & set(after)
    write_card(digits, overwrite=True)
    text = (digits / "README.md").read_text()
    assert "## Training" not in text
    assert check_card(digits, device="cpu").ok


def test_a_file_without_a_hash_whose_figures_are_not_reproduced(digits):
    edit_json(digits / "results.json", lambda results: results.pop("weights_sha256"))
    edit_json(digits / "results.json", lambda results: results.update(clean_accuracy=0.5))
    done = evaluate_again(digits, device="cpu")
    assert not done.same_run
    assert "command" not in results_of(digits)


def test_entity_tracking(chains_run, tmp_path):
    folder = copied(chains_run, tmp_path)
    before = results_of(folder)
    tensors = load_file(folder / "model.safetensors")
    name = next(name for name in tensors if "embed" in name)
    tensors[name] = tensors[name].flip(0).contiguous()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    assert not evaluate_again(folder, device="cpu").same_run
    after = results_of(folder)
    assert after["evaluations"]["test"]["num_examples"] == before["evaluations"]["test"]["num_examples"]
    assert after["evaluations"] != before["evaluations"]
    write_card(folder, overwrite=True)
    assert check_card(folder, device="cpu").ok


def test_nothing_to_evaluate(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"has no results.json, which says what was evaluated"):
        evaluate_again(tmp_path)
