# SPDX-License-Identifier: Apache-2.0
"""`hf-lip card` and `hf-lip card --check`, on the embedded network."""

import json
import shutil

import pytest
import yaml
from typer.testing import CliRunner

from hf_lip.assets import DEFAULT_MODEL_DIR
from hf_lip.cli import app


def run(*arguments):
    words = [str(argument) for argument in arguments]
    return CliRunner().invoke(app, ["card", *words], env={"COLUMNS": "200", "NO_COLOR": "1"})


@pytest.fixture
def folder(tmp_path):
    """The embedded network without its card."""
    folder = tmp_path / "digits"
    shutil.copytree(DEFAULT_MODEL_DIR, folder)
    (folder / "README.md").unlink()
    return folder


def test_write_then_check(folder):
    result = run(
        folder, "--name", "owner/digits-sll", "--license", "apache-2.0", "--tag", "demo", "--dataset", "a/digits"
    )
    assert result.exit_code == 0, result.output
    assert f"Wrote {folder / 'README.md'}" in result.output
    text = (folder / "README.md").read_text()
    metadata = yaml.safe_load(text.split("---\n")[1])
    assert (metadata["license"], metadata["datasets"], metadata["tags"][-1]) == ("apache-2.0", ["a/digits"], "demo")
    assert metadata["model-index"][0]["name"] == "owner/digits-sll"
    assert metadata["model-index"][0]["results"][0]["dataset"]["type"] == "a/digits"
    assert "# digits-sll\n" in text
    assert 'model="owner/digits-sll"' in text
    result = run("--check", folder, "--device", "cpu")
    assert result.exit_code == 0, result.output
    stated = json.loads((folder / "results.json").read_text())
    row = next(line for line in result.output.splitlines() if line.strip().startswith("clean accuracy"))
    assert row.split()[2:] == [f"{100 * stated['clean_accuracy']:.2f}", "%"] * 3
    assert "The certificate holds: constant 1.23" in result.output
    assert "evaluated again on all 450 images" in result.output
    assert f"CHECKED: every number of the card in {folder} holds." in result.output


def test_a_number_nobody_measured(folder):
    assert run(folder, "--no-plot").exit_code == 0
    assert not (folder / "card_certified_accuracy.png").exists()
    path = folder / "README.md"
    path.write_text(path.read_text().replace("| 98.7 % |", "| 99.7 % |"))
    result = run("--check", folder, "--no-rerun")
    assert result.exit_code == 1
    assert "NOT CONFIRMED" in result.output
    assert "The card has a line that its files do not give: '| clean accuracy | 99.7 % |" in result.output
    path.unlink()
    assert run(folder, "--no-plot").exit_code == 0
    path.write_text(path.read_text().replace("begin notes -->\n", "begin notes -->\nOn other data 97.77 %.\n"))
    result = run(folder, "--overwrite")
    assert result.exit_code == 1
    assert "states what no results file holds: 97.77 %" in result.output


def test_weights_that_are_not_those_of_the_results(folder):
    path = folder / "results.json"
    results = json.loads(path.read_text())
    path.write_text(json.dumps({**results, "weights_sha256": "0" * 64}))
    result = run(folder)
    assert result.exit_code == 2
    assert "results.json is of weights with sha256 0000000000000000..., those in " in result.output
    assert "Evaluate these weights again with `hf-lip card --evaluate-again digits`" in result.output
    assert not (folder / "README.md").exists()
    result = run(folder, "--evaluate-again", "--device", "cpu", "--no-plot")
    assert result.exit_code == 0, result.output
    assert "results.json, which no longer, as it is of other weights, says how the model was trained." in result.output
    assert f"Wrote {folder / 'README.md'}" in result.output
    assert json.loads(path.read_text())["weights_sha256"] == results["weights_sha256"]
    assert run("--check", folder, "--device", "cpu").exit_code == 0


def test_help_says_how_papers_stand_beside_the_measured_figures():
    text = " ".join(run("--help").output.split())
    for words in ("published.json", '"source"', '"values": {"clean accuracy": 0.712}', "fractions of 1", '"remark"'):
        assert words in text


def test_a_number_that_is_not_reproduced(folder):
    results = json.loads((folder / "results.json").read_text())
    (folder / "results.json").write_text(json.dumps({**results, "clean_accuracy": 449 / 450}))
    assert run(folder, "--no-plot").exit_code == 0
    result = run("--check", folder, "--device", "cpu")
    assert result.exit_code == 1
    assert "not reproduced" in next(line for line in result.output.splitlines() if "clean accuracy" in line)
    assert "results.json: clean accuracy is 0.9977777777777778 on the card and 0.9866666666666667 on" in result.output


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--check", "--overwrite"), "`--overwrite` is for `hf-lip card` without --check"),
        (("--check", "--license", "mit"), "`--license` is for `hf-lip card` without --check"),
        (("--limit", "3"), "`--limit` is for `hf-lip card` with --check"),
        (("--data", "digits"), "`--data` is for `hf-lip card` with --check or --evaluate-again"),
        (("--check", "--evaluate-again"), "`--evaluate-again` is for `hf-lip card` without --check"),
        (("--no-rerun",), "`--no-rerun` is for `hf-lip card` with --check"),
        (("--check",), "has no README.md to check"),
        (("--check", "--limit", "0"), "has no README.md to check"),
    ],
)
def test_options_that_do_not_fit(folder, words, message):
    result = run(folder, *words)
    assert result.exit_code == 2
    assert message in result.output


def test_data_that_are_elsewhere_and_numbers_out_of_range(folder):
    assert run(folder, "--no-plot").exit_code == 0
    result = run("--check", folder, "--data", folder / "none")
    assert result.exit_code == 2
    assert "was measured on 'digits': give its place with --data" in result.output
    for option in ("--limit", "--stride", "--batch-size"):
        result = run("--check", folder, option, "0")
        assert result.exit_code == 2
        assert "must be at least 1, got 0" in result.output
    assert run(folder).exit_code == 2
    assert "give --overwrite" in run(folder).output
