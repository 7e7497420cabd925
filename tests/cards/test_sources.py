# SPDX-License-Identifier: Apache-2.0
"""The files that a card is written from, and the numbers in them."""

import json
import shutil

import pytest

from hf_lip.card_text import kept_metadata, markdown_table, rounded_up
from hf_lip.cards import check_card, write_card
from hf_lip.cards.evaluations import read_evaluations
from hf_lip.cards.held_numbers import result_numbers

from .runs import edit, edit_json


def test_figures_of_another_model(digits):
    edit_json(digits / "results.json", lambda results: results.update(weights_sha256="0" * 64))
    with pytest.raises(ValueError, match=r"results.json is of weights with sha256 0000"):
        write_card(digits, overwrite=True)
    edit_json(digits / "results.json", lambda results: results.pop("weights_sha256"))
    with pytest.raises(ValueError, match=r"does not say of which weights its figures are \(weights_sha256\)"):
        write_card(digits, overwrite=True)
    edit_json(digits / "results.json", lambda results: results.update(lipschitz_constant=0.5))
    with pytest.raises(ValueError, match=r"results.json is of a model with the constant 0.5"):
        write_card(digits, overwrite=True)
    (digits / "lipschitz_certificate.json").unlink()
    with pytest.raises(ValueError, match="that proves it: save the model again"):
        write_card(digits, overwrite=True)


def test_published_figures_stand_beside_measured_ones(digits):
    entry = {"source": "A paper, arXiv 2303.03169, table 1", "values": {"clean accuracy": 0.712}, "remark": "Larger."}
    (digits / "published.json").write_text(json.dumps([entry]))
    write_card(digits, overwrite=True)
    text = (digits / "README.md").read_text()
    assert "|  | measured | 95 % interval | published |" in text
    assert "| 71.2 % |\n| accuracy under Gaussian" in text
    assert "Published: A paper, arXiv 2303.03169, table 1. Larger." in text
    assert "0.712" not in text
    assert check_card(digits, rerun=False).ok
    edit(digits / "README.md", lambda text: text.replace("| 71.2 % |", "| 61.2 % |"))
    assert not check_card(digits, rerun=False).ok


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("{", "not valid JSON"),
        ("{}", "must hold a list"),
        ("[{}]", "expected an object"),
        ('[{"values": {"clean accuracy": 0.5}}]', "has no `source`"),
        ('[{"source": "x", "values": {"perplexity": 0.5}}]', "'perplexity' was not measured here"),
        ('[{"source": "x", "values": {"clean accuracy": -1}}]', "must be a number"),
        ('[{"source": "x", "values": {"clean accuracy": 0.5}, "page": 3}]', "unknown entries"),
        ('[{"source": "x", "values": {"clean accuracy": 0.5}, "file": "a.json"}]', "no evaluation 'a.json'"),
    ],
)
def test_bad_published_figures(digits, content, problem):
    (digits / "published.json").write_text(content)
    with pytest.raises(ValueError, match=problem):
        write_card(digits, overwrite=True)


@pytest.mark.parametrize(
    ("key", "value", "problem"),
    [
        ("clean_accuracy", float("nan"), "NaN: a number that nobody measured"),
        ("clean_accuracy", "0.9", "must be a number"),
        ("clean_accuracy", 1.5, "no share of 450"),
        ("clean_accuracy", 0.9871, "no share of 450: it was not measured on them"),
        ("certified_accuracy", {"36/255": 0.5, "72/255": 0.8}, "growing with the radius at 72/255"),
        ("certified_accuracy", {"wide": 0.5}, "'wide' is no radius"),
        ("average_certified_radius", None, "must be a number"),
        ("eval_samples", 0, "must be a number of at least 1"),
        ("arguments", {}, "does not say on which data"),
    ],
)
def test_results_that_nobody_can_have_measured(digits_run, tmp_path, key, value, problem):
    content = json.loads((digits_run / "results.json").read_text())
    (tmp_path / "results.json").write_text(json.dumps({**content, key: value}))
    with pytest.raises(ValueError, match=problem):
        read_evaluations(tmp_path)


def test_folders_without_what_a_card_needs(digits_run, tmp_path):
    with pytest.raises(FileNotFoundError, match="is not a folder"):
        write_card(tmp_path / "none")
    with pytest.raises(FileNotFoundError, match=r"has no README.md to check"):
        check_card(tmp_path)
    for content, problem in (("[]", "must hold a JSON object"), ("{}", "of no training script"), ("{", "valid JSON")):
        (tmp_path / "results.json").write_text(content)
        with pytest.raises(ValueError, match=problem):
            write_card(tmp_path)
    shutil.copy(digits_run / "results.json", tmp_path)
    with pytest.raises(FileNotFoundError, match=r"no config.json"):
        write_card(tmp_path)
    shutil.copy(digits_run / "config.json", tmp_path)
    shutil.copy(digits_run / "lipschitz_certificate.json", tmp_path)
    with pytest.raises(FileNotFoundError, match="no safetensors weights"):
        write_card(tmp_path)


def test_which_numbers_look_like_results():
    text = (
        "Accuracy is 98.7 % and 95.3% (0.953), ResNet-110 on CIFAR-10, 8 x 8 pixels, 444 of 450 right, 5 percent.\n"
        "| a | 97.1 | 12 |\n"
        "`lr 0.3`, `99.9 %`, [x](http://a/1.5), https://a.b/2.5, arXiv 2410.06895, v2.0, Apache-2.0, torch 2.13.0.\n"
        "```\n0.777 33.3 %\n```\n12,345.6 s, 1,347 images."
    )
    found = [(number.text, number.percent) for number in result_numbers(text)]
    percentages = {"98.7", "95.3", "5", "99.9"}
    others = {"0.953", "444 of 450", "97.1", "12", "12,345.6"}
    assert sorted(found) == sorted([*((text, True) for text in percentages), *((text, False) for text in others)])


def test_pieces_of_markdown(tmp_path):
    assert rounded_up(1.0000001) == "1.00001"
    assert rounded_up(2.0) == "2"
    assert all(float(rounded_up(value, 3)) >= value for value in (1e-12, 0.12345, 0.9994, 123.46, 99999.0))
    assert markdown_table(("a", "b"), [("1", "|x|")]) == "| a | b |\n| --- | --- |\n| 1 | \\|x\\| |"
    path = tmp_path / "README.md"
    assert kept_metadata(path, ["license"]) == {}
    for text in ("no metadata", "---\na: [\n---\n", "---\n- license\n---\n"):
        path.write_text(text)
        assert kept_metadata(path, ["license"]) == {}
    path.write_text("---\nlicense: mit\nmodel-index: 3\n---\n")
    assert kept_metadata(path, ["license", "tags"]) == {"license": "mit"}
