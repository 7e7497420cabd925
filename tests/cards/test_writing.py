# SPDX-License-Identifier: Apache-2.0
"""What a card states, and what of it is kept."""

import json

import pytest
from huggingface_hub import ModelCard
from PIL import Image

from hf_lip.card_text import rounded_up
from hf_lip.cards import UnmeasuredNumberError, check_card, write_card
from hf_lip.cards.run_text import hardware_text

from .runs import edit, edit_json, insert


def test_what_a_card_states(digits, digits_run):
    results = json.loads((digits_run / "results.json").read_text())
    certificate = json.loads((digits_run / "lipschitz_certificate.json").read_text())
    card = ModelCard.load(digits / "README.md")
    data = card.data.to_dict()
    assert (data["license"], data["library_name"], data["pipeline_tag"]) == (
        "apache-2.0", "transformers", "image-classification",
    )  # fmt: skip
    assert data["tags"] == ["hf_lip", "certified-robustness", "lipschitz"]
    stated = {result.metric_name: result for result in card.data.eval_results}
    assert {result.metric_value for result in stated.values()} == {
        results["clean_accuracy"], results["noisy_accuracy"], *results["certified_accuracy"].values(),
        results["average_certified_radius"],
    }  # fmt: skip
    at_36 = stated["certified accuracy at 36/255"]
    assert at_36.metric_type == "certified_accuracy"
    assert at_36.metric_value == results["certified_accuracy"]["36/255"]
    assert at_36.metric_args == {
        "eps": 36 / 255, "norm": "l2", "pixels": "[0, 1]", "method": "lipschitz", "num_images": 450,
        "source": "results.json: certified_accuracy, 36/255",
    }  # fmt: skip
    for name, value in (
        ("clean accuracy", "clean_accuracy"),
        ("accuracy under Gaussian noise of 0.05", "noisy_accuracy"),
    ):
        assert f"| {name} | {100 * results[value]:.1f} % |" in card.text
    for part in (
        *("```bash\n", "--dense_hidden_size 16", "digits, train: 1,347 images"),
        f"Hardware and time: {hardware_text(results['hardware'])}, one process, {results['seconds']:.1f} s (",
        *("torch ", certificate["weights_sha256"], "hf-lip verify ."),
        *(f"at most {rounded_up(certificate['lipschitz_constant'])}", "hf-lip card --check .", "## Intended use"),
        *("](card_certified_accuracy.png)", r"certified \|\|T^-1/2 K\|\|"),
    ):
        assert part in card.text, part
    with Image.open(digits / "card_certified_accuracy.png") as plot:
        assert plot.size == (960, 630)
    assert not list(digits.glob(".*"))


def test_a_card_is_a_function_of_its_files(digits):
    before = (digits / "README.md").read_bytes()
    write_card(digits, overwrite=True)
    assert (digits / "README.md").read_bytes() == before


def test_commands_do_not_tell_of_the_machine(digits):
    edit_json(
        digits / "results.json",
        lambda results: results.update(command="train.py --dataset /home/me/data/digits --lr ~/x ../y"),
    )
    write_card(digits, overwrite=True)
    text = (digits / "README.md").read_text()
    assert "python scripts/train.py --dataset digits --lr x y" in text
    assert "/home/me" not in text


def test_hand_written_sections_are_kept(digits):
    insert(digits, "description", "A small one.\n\nIt has *two* blocks.")
    insert(digits, "notes", "- Trained for the tests.")
    assert check_card(digits, rerun=False).ok
    edit_json(digits / "results.json", lambda results: results["hardware"].update(cpu="Old laptop", gpu="A GPU"))
    write_card(digits, overwrite=True, tags=["small"])
    text = (digits / "README.md").read_text()
    assert "<!-- hf_lip:begin description -->\nA small one.\n\nIt has *two* blocks.\n<!-- hf_lip:end" in text
    assert "- Trained for the tests." in text
    assert "Hardware and time: A GPU, Old laptop with " in text
    data = ModelCard(text).data.to_dict()
    assert data["tags"][-1] == "small"
    assert data["license"] == "apache-2.0"
    write_card(digits, overwrite=True)
    assert "- small\n" in (digits / "README.md").read_text()


def test_hand_written_numbers_have_to_be_measured(digits):
    results = json.loads((digits / "results.json").read_text())
    clean = results["clean_accuracy"]
    right = f"Clean {100 * clean:.1f} %, that is {round(450 * clean)} of 450, or {clean:.3f}; certified at 36/255."
    insert(digits, "notes", right)
    assert check_card(digits, rerun=False).ok
    write_card(digits, overwrite=True)
    insert(digits, "notes", "Better than all others: 99.93 % and 449 of 450.")
    check = check_card(digits, rerun=False)
    assert len(check.problems) == 1
    assert "notes: the hand-written text states what no results file holds: 99.93 %" in check.problems[0]
    with pytest.raises(UnmeasuredNumberError, match=r"99.93 % in .*; 449 of 450 in"):
        write_card(digits, overwrite=True)


def test_text_that_would_be_lost(digits):
    with pytest.raises(FileExistsError, match="give --overwrite"):
        write_card(digits)
    edit(digits / "README.md", lambda text: text.replace("## Use", "My words.\n\n## Use"))
    with pytest.raises(FileExistsError, match="changed outside of its hand-written sections"):
        write_card(digits, overwrite=True)
    assert "My words." in (digits / "README.md").read_text()


def test_cards_of_another_hand(digits):
    path = digits / "README.md"
    results = json.loads((digits / "results.json").read_text())
    path.write_text(f"# Mine\n\nClean accuracy {100 * results['clean_accuracy']:.1f} %.\n")
    with pytest.raises(FileExistsError, match="was not written by `hf-lip card`"):
        write_card(digits, overwrite=True)
    check = check_card(digits, rerun=False)
    assert check.ok
    assert any("not written by `hf-lip card`" in note for note in check.notes)
    path.write_text("# Mine\n\nClean accuracy 99.93 %.\n")
    assert "99.93 %" in check_card(digits, rerun=False).problems[0]


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda text: text.replace("<!-- hf_lip:end notes -->", ""), "mark without its pair"),
        (lambda text: text.replace("hf_lip:begin notes", "hf_lip:begin description"), "without its pair|twice"),
        (lambda text: text.replace("model-index:", "model-index: ["), "not valid YAML"),
        (lambda text: f"---\n- a\n---\n{text}", "must be a mapping"),
    ],
)
def test_damaged_cards(digits, change, problem):
    edit(digits / "README.md", change)
    with pytest.raises(ValueError, match=problem):
        write_card(digits, overwrite=True)
    assert not check_card(digits, rerun=False).ok


@pytest.mark.parametrize("hardware", ["one old laptop", {"cpu": "AMD"}])
def test_hardware_that_no_run_wrote(digits, hardware):
    edit_json(digits / "results.json", lambda results: results.update(hardware=hardware))
    with pytest.raises(ValueError, match="is of no run of hf_lip"):
        write_card(digits, overwrite=True)
