# SPDX-License-Identifier: Apache-2.0
"""Cards of smoothed classifiers, entity tracking and language models."""

import json
from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from transformers import AutoTokenizer

from hf_lip.cards import check_card, write_card
from hf_lip.cards.evaluations import read_evaluations
from hf_lip.cards.image_reruns import _smoothing_arguments
from hf_lip.cards.reruns import Request
from hf_lip.cards.tracking_reruns import _questions, tracking_arguments
from hf_lip.data import BoxesTask
from hf_lip.training.sequence_evaluation import EvaluationSet, generated_rows
from hf_lip.training.sequence_questions import encode_texts

from ..scripts.test_train_entity_tracking import boxes_file
from .runs import copied, edit_json, trained


def test_certificates_by_smoothing(smoothed_run, tmp_path):
    folder = copied(smoothed_run, tmp_path)
    summary = json.loads((folder / "sigma-0.5" / "summary.json").read_text())
    card = ModelCard.load(folder / "README.md")
    assert {"certified-robustness", "randomized-smoothing"} < set(card.data.tags)
    result = next(one for one in card.data.eval_results if one.metric_type == "certified_accuracy")
    for name, value in {"sigma": 0.5, "n": 200, "n0": 20, "alpha": 0.001, "seed": 0, "num_images": 8}.items():
        assert result.metric_args[name] == value
    assert result.metric_args["source"].startswith("sigma-0.5/summary.json: certified_accuracy")
    assert "wrong with probability at most 0.001" in card.text
    assert 'method="cpm", sigma=0.5, n0=20, n=200' in card.text
    check = check_card(folder, device="cpu")
    assert check.ok, check.problems
    assert {figure.examples for figure in check.figures} == {"all 8 images"}
    assert check_card(folder, device="cpu", limit=4).ok

    def improve(content):
        content["clean_accuracy"] = 1.0
        content["certified_accuracy"] = dict.fromkeys(summary["certified_accuracy"], 7 / 8)

    edit_json(folder / "sigma-0.5" / "summary.json", improve)
    with pytest.raises(ValueError, match="they are of different runs"):
        write_card(folder, overwrite=True)
    (folder / "sigma-0.5" / "certificates.tsv").unlink()
    write_card(folder, overwrite=True)
    assert not check_card(folder, device="cpu").ok
    edit_json(folder / "sigma-0.5" / "summary.json", lambda one: one["settings"].update(weights_sha256="0" * 64))
    with pytest.raises(ValueError, match="certify these weights"):
        check_card(folder, device="cpu", limit=1)


def test_settings_of_a_smoothing_run_are_those_of_the_pipeline():
    names = ("method", "mode", "sigma", "n0", "n", "alpha", "seed", "budget", "rtol", "target_radius", "randomized")
    settings = {**dict.fromkeys(names), "method": "lvm", "score_map": "softmax(t=2.0)", "lipschitz": None}
    settings |= {"noise": "exact, grid 1/256, clipped to [-1, 2]", "base": "bfloat16, channels_last, compiled"}
    found = _smoothing_arguments(settings, "summary.json")
    expected = {"score_map": "softmax(t=2.0)", "sound_noise": 256, "dtype": "bfloat16", "compile": True}
    assert {name: found[name] for name in expected} == expected
    assert not found["lipschitz_aware"]
    aware = _smoothing_arguments({**settings, "lipschitz": 1.2, "noise": "float64", "base": "float64"}, "")
    assert (aware["lipschitz_aware"], aware["dtype"], aware["sound_noise"]) == (True, None, False)
    with pytest.raises(ValueError, match="with a denoiser"):
        _smoothing_arguments({**settings, "base": "float32, denoised by UNet"}, "summary.json")


def test_entity_tracking(chains_run, tmp_path):
    folder = copied(chains_run, tmp_path)
    results = json.loads((folder / "results.json").read_text())
    card = ModelCard.load(folder / "README.md")
    assert card.data.pipeline_tag == "text-generation"
    assert {"entity-tracking", "chained-attention"} < set(card.data.tags)
    at_2 = results["evaluations"]["test"]["by_hops"]["2"]
    stated = {result.metric_args["source"]: result for result in card.data.eval_results}
    result = stated["results.json: evaluations, test, by_hops, 2, accuracy"]
    assert (result.metric_type, result.metric_value) == ("exact_match", at_2["accuracy"])
    assert (result.metric_args["depth"], result.metric_args["num_examples"]) == (2, at_2["num_examples"])
    assert f"| 2 | {100 * at_2['accuracy']:.1f} % | {at_2['num_examples']} |" in card.text
    assert "### chains, extrapolation" in card.text
    assert (folder / "card_accuracy_by_depth.png").is_file()
    assert not (folder / "card_certified_accuracy.png").exists()
    check = check_card(folder, device="cpu")
    assert check.ok, check.problems
    assert len(check.figures) == len(stated) > 10
    sample = check_card(folder, device="cpu", limit=8)
    assert sample.ok, sample.problems
    assert {figure.examples for figure in sample.figures} == {"8 of 40 samples"}

    def improve(content):
        content["evaluations"]["test"]["by_hops"]["2"]["accuracy"] = 1.0

    edit_json(folder / "results.json", improve)
    write_card(folder, overwrite=True)
    check = check_card(folder, device="cpu")
    assert [figure.name for figure in check.figures if not figure.reproduced] == ["exact match, hops 2"]
    edit_json(folder / "results.json", lambda content: content["arguments"].update(eval_seed=7, num_entities=3))
    with pytest.raises(ValueError, match=r"give the\s+data it was measured on"):
        check_card(folder, device="cpu")


def test_the_code_of_a_card_runs(chains_run, tmp_path, monkeypatch, capsys):
    folder = copied(chains_run, tmp_path, plot=False)
    card = (folder / "README.md").read_text()
    assert "hf-lip card --check .\n" in card
    code = card.partition("```python\n")[2].partition("```")[0]
    assert f'"path/to/{folder.name}"' in code
    capsys.readouterr()
    exec(code.replace("path/to/", f"{tmp_path}/"), {})
    lines = capsys.readouterr().out.splitlines()
    # the first statement of a chain is read from nothing
    assert "none" in lines[0]
    assert all(line.count("|") == 1 for line in lines)
    edit_json(folder / "results.json", lambda content: content["arguments"].update(form="text"))
    write_card(folder, plot=False, overwrite=True)
    card = (folder / "README.md").read_text()
    assert f'hf-lip track path/to/{folder.name} "..."' in card
    code = card.partition("```python\n")[2].partition("```")[0]
    words = "w0 none 5"
    exec(code.replace("path/to/", f"{tmp_path}/").replace('"..."', f'"{words}"'), {})
    assert capsys.readouterr().out.strip()


def test_entity_tracking_of_files(tmp_path):
    """Two evaluations, whose files are later in another folder."""
    files = tmp_path / "files"
    files.mkdir()
    sizes = {"train": 6, "validation": 4, "test": 5}
    train, dev, test = (
        str(boxes_file(files / f"{split}-t5.jsonl.gz", worlds, split=split)) for split, worlds in sizes.items()
    )
    words = ["--task", "boxes", "--boxes_train", train, "--boxes_eval", dev, test, "--hidden_size", "16", "--cpu"]
    words += ["--max_steps", "3", "--warmup_steps", "1", "--train_batch_size", "6"]
    folder = trained("train_entity_tracking", words, tmp_path / "boxes")
    write_card(folder, plot=False)
    text = (folder / "README.md").read_text()
    assert "### boxes, validation-t5," in text
    assert " validation-t5.jsonl.gz test-t5.jsonl.gz " in text.replace(" \\\n   ", "")
    assert str(tmp_path) not in text
    files.rename(tmp_path / "moved")
    with pytest.raises(FileNotFoundError, match="give its place with --data"):
        check_card(folder, device="cpu")
    check = check_card(folder, device="cpu", data=str(tmp_path / "moved"))
    assert check.ok, check.problems
    assert {figure.examples for figure in check.figures} == {"all 4 samples", "all 5 samples"}


def test_answers_in_the_order_of_the_text_are_asked_for_again(tmp_path):
    """With a model that knows them: one that is always wrong would be as wrong in any order."""
    model = Path(__file__).parents[2] / "model_cards" / "chacal-boxes"
    known = tuple(sorted(set(BoxesTask().objects) & set(AutoTokenizer.from_pretrained(model).get_vocab())))
    task = BoxesTask(num_boxes=3, num_operations=3, objects=known)
    train, test = (
        str(boxes_file(tmp_path / f"{split}.jsonl.gz", 8, task=task, split=split)) for split in ("train", "test")
    )
    words = ["--task", "boxes", "--boxes_train", train, "--boxes_eval", test, "--answer_order", "text", "--cpu"]
    words += ["--model_name_or_path", str(model), "--max_steps", "1", "--learning_rate", "1e-9"]
    folder = trained("train_entity_tracking", [*words, "--train_batch_size", "2"], tmp_path / "boxes")
    assert json.loads((folder / "results.json").read_text())["evaluations"]["test"]["accuracy"] > 0.9
    write_card(folder, plot=False)
    check = check_card(folder, device="cpu", data=str(tmp_path))
    assert check.ok, check.problems


def test_generated_answers_in_the_order_of_the_text_are_asked_for_again(tmp_path):
    words = ["--task", "boxes", "--answer_order", "text", "--num_boxes", "3", "--num_operations", "3", "--cpu"]
    words += ["--max_steps", "1", "--train_batch_size", "2", "--hidden_size", "16", "--eval_samples", "8"]
    folder = trained("train_entity_tracking", words, tmp_path / "boxes")
    (evaluation,) = read_evaluations(folder)
    arguments = tracking_arguments(evaluation)
    asked, *_ = _questions(folder, arguments, evaluation, 64, Request())
    rows = generated_rows(arguments.tasks()[0], arguments)
    texts = encode_texts(rows, AutoTokenizer.from_pretrained(folder), arguments.text_key)
    wanted = EvaluationSet.of_texts("test", texts, arguments, 64)
    for (batch, _), (other, _) in zip(asked.batches, wanted.batches, strict=True):
        assert batch["labels"].equal(other["labels"])


def test_of_many_depths_some_are_shown(chains_run, tmp_path):
    folder = copied(chains_run, tmp_path)

    def deepen(content):
        scores = content["evaluations"]["test"]["by_hops"]
        for depth in range(-1, 41):
            accuracy = 0.1 if depth == 37 else 0.8
            scores[str(depth)] = {"accuracy": accuracy, "num_examples": 10, "minimal_layers": depth.bit_length()}

    edit_json(folder / "results.json", deepen)
    write_card(folder, overwrite=True)
    text = (folder / "README.md").read_text()
    rows = [
        line.split(" | ") for line in text.split("### chains, extrapolation")[0].splitlines() if " | 10 | " in line
    ]
    shown = ["none", "0", "1", "2", "3", "4", "7", "8", "15", "16", "31", "32", "37", "40"]
    assert [row[0].removeprefix("| ") for row in rows] == shown
    assert rows[-1][3] == "6 |"
    assert "More depths are in `results.json`" in text
    assert "exact match, hops none" in text
    assert "hops 33" not in text
    assert check_card(folder, rerun=False).ok


def test_language_model(text_run, story, tmp_path):
    folder = copied(text_run, tmp_path)
    results = json.loads((folder / "results.json").read_text())
    assert results["arguments"]["train_file"] == ["story.txt"]
    assert str(story.parent) not in (folder / "results.json").read_text()
    card = ModelCard.load(folder / "README.md")
    stated = {result.metric_type: result.metric_value for result in card.data.eval_results}
    measured = {name: results["evaluation"][name] for name in ("perplexity", "bits_per_character", "bits_per_byte")}
    assert stated == measured
    assert f"| perplexity of a token | {measured['perplexity']:.4g} |" in card.text
    assert "### story.txt, the last 30 % of the text" in card.text
    with pytest.raises(FileNotFoundError, match="give its place with --data"):
        check_card(folder, device="cpu")
    check = check_card(folder, device="cpu", data=str(story))
    assert check.ok, check.problems
    assert [figure.found for figure in check.figures] == pytest.approx(list(measured.values()), rel=1e-5)
    sample = check_card(folder, device="cpu", data=str(story), limit=6)
    assert sample.ok, sample.problems
    assert all(figure.lowest < figure.highest for figure in sample.figures)
    edit_json(folder / "results.json", lambda content: content["evaluation"].update(perplexity=1.5))
    write_card(folder, overwrite=True)
    assert not check_card(folder, device="cpu", data=str(story)).ok
    other = tmp_path / "other.txt"
    other.write_text("the cat sat on a mat. " * 20)
    with pytest.raises(ValueError, match=r"give the text it was measured on \('story.txt'\)"):
        check_card(folder, device="cpu", data=str(other))
