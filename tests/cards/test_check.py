# SPDX-License-Identifier: Apache-2.0
"""A check confirms a right card and finds whatever is not so."""

import shutil

import pytest
from safetensors.torch import load_file, save_file

from hf_lip.cards import check_card, write_card
from hf_lip.cards.figures import Figure
from hf_lip.cards.reruns import Found, Request, Rerun, evenly_spread, judge
from hf_lip.checkpoints.stored_weights import stored_weights_sha256

from .runs import change_index, edit, edit_json


def test_the_evaluation_gives_the_same_again(digits):
    seen = []
    check = check_card(digits, device="cpu", progress=lambda done, total: seen.append((done, total)))
    assert check.ok, check.problems
    assert len(check.figures) == 7
    shares = [figure for figure in check.figures if figure.share]
    assert [figure.found for figure in shares] == [figure.stated for figure in shares]
    # certificates come in float64 and have to be the same; the logits under noise do not
    assert [figure.name for figure in shares if figure.highest - figure.lowest > 1e-3] == [
        "accuracy under Gaussian noise of 0.05"
    ]
    assert {figure.examples for figure in check.figures} == {"all 450 images"}
    assert any("The certificate holds: constant" in note for note in check.notes)
    assert seen[-1] == (450, 450)


def test_a_sample_confirms_within_its_interval(digits):
    check = check_card(digits, limit=60, device="cpu")
    assert check.ok, check.problems
    assert {figure.examples for figure in check.figures} == {"60 of 450 images"}
    assert all(figure.lowest <= figure.stated <= figure.highest for figure in check.figures)
    # every third image, and of these 150 all
    assert {one.examples for one in check_card(digits, stride=3, device="cpu").figures} == {"150 of 450 images"}


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda text: text.replace("| clean accuracy | ", "| clean accuracy | 1"), "line that its files do not give"),
        (lambda text: text.replace("\n## Use", "\nIt is right for 99.9 % of images.\n\n## Use"), "99.9 %"),
        (lambda text: text.replace("at most 1", "at most 0.9", 1), "line that its files do not give"),
        (lambda text: text.replace("sha256 `", "sha256 `0", 1), "line that its files do not give"),
        (lambda text: text.replace("--dense_hidden_size 16", "--dense_hidden_size 64"), "dense_hidden_size 64"),
        (lambda text: "".join(line for line in text.splitlines(True) if "at 72/255 |" not in line), "lacks a line"),
    ],
)
def test_numbers_that_were_changed_in_the_text(digits, change, problem):
    edit(digits / "README.md", change)
    check = check_card(digits, rerun=False)
    assert not check.ok
    assert problem in " ".join(check.problems)


def test_swapped_lines_are_found(digits):
    def swap(text):
        rows = [line for line in text.splitlines(True) if line.startswith("| certified accuracy at")]
        assert len(rows) == 4
        return text.replace("".join(rows), "".join(reversed(rows)))

    edit(digits / "README.md", swap)
    assert "in another order" in " ".join(check_card(digits, rerun=False).problems)


def test_changed_words_are_only_noted(digits):
    edit(digits / "README.md", lambda text: text.replace("For research on data", "Just for research on data"))
    check = check_card(digits, rerun=False)
    assert check.ok
    assert any("Words of the generated text were changed" in note for note in check.notes)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (
            lambda metrics: metrics[0].update(value=0.999),
            "states clean accuracy = 0.999, results.json: clean_accuracy is",
        ),
        (lambda metrics: metrics.append({"type": "accuracy", "value": 0.999}), "0.999, which no results file holds"),
        (lambda metrics: metrics.pop(), "The model index lacks results.json: average_certified_radius"),
        (lambda metrics: metrics[0].pop("value"), "not in the Hub's layout"),
    ],
)
def test_numbers_that_were_changed_in_the_index(digits, change, problem):
    change_index(digits, change)
    check = check_card(digits, rerun=False)
    assert problem in " ".join(check.problems)


def test_numbers_that_nobody_measured_are_not_reproduced(digits):
    """The file and the card agree, and the model does not."""

    def improve(results):
        results["clean_accuracy"] = 449 / 450
        results["certified_accuracy"]["36/255"] = 448 / 450
        results["average_certified_radius"] *= 1.5

    edit_json(digits / "results.json", improve)
    write_card(digits, overwrite=True)
    assert check_card(digits, rerun=False).ok
    check = check_card(digits, device="cpu")
    wrong = {figure.name for figure in check.figures if not figure.reproduced}
    assert wrong == {"clean accuracy", "certified accuracy at 36/255", "average certified radius (ACR)"}
    assert len(check.problems) == 3
    assert "not reproduced" in check.problems[0]
    # a sample is enough for what is far off
    assert not check_card(digits, device="cpu", limit=150).ok


def test_weights_that_were_changed(digits):
    tensors = load_file(digits / "model.safetensors")
    tensors["classifier.bias"] += 0.25
    save_file(tensors, digits / "model.safetensors", {"format": "pt"})
    check = check_card(digits, device="cpu")
    assert len(check.problems) == 1
    assert "results.json is of weights with sha256 " in check.problems[0]
    assert "Evaluate these weights again with `hf-lip card --evaluate-again digits`" in check.problems[0]
    with pytest.raises(ValueError, match="figures are of another model"):
        write_card(digits, overwrite=True)
    # the file is made to fit: the certificate and the card still do not
    stored = stored_weights_sha256(digits)
    edit_json(digits / "results.json", lambda results: results.update(weights_sha256=stored))
    for verify, problem in ((True, "The certificate does not hold: "), (False, "it is of other weights")):
        assert problem in " ".join(check_card(digits, rerun=False, verify=verify).problems)
    check = check_card(digits, device="cpu")
    text = " ".join(check.problems)
    assert "The certificate does not hold: " in text
    # the hash of the file is on the card too
    assert "line that its files do not give: '- `model.safetensors`" in text
    assert any("was not run again" in note for note in check.notes)


def test_plots_of_other_figures(digits):
    shutil.copy(digits / "card_certified_accuracy.png", digits / "old.png")
    edit_json(digits / "results.json", lambda results: results.update(clean_accuracy=0.9))
    write_card(digits, overwrite=True)
    assert check_card(digits, rerun=False).ok
    shutil.move(digits / "old.png", digits / "card_certified_accuracy.png")
    check = check_card(digits, rerun=False)
    assert check.problems == [
        "card_certified_accuracy.png was not drawn from the figures of the files: write the card again."
    ]
    write_card(digits, overwrite=True, plot=False)
    assert not (digits / "card_certified_accuracy.png").exists()
    assert check_card(digits, rerun=False).ok


def test_nothing_was_measured(digits):
    (digits / "results.json").unlink()
    with pytest.raises(FileNotFoundError, match="nothing was measured that a card could state"):
        write_card(digits, overwrite=True)
    check = check_card(digits)
    assert not check.ok
    assert "nothing was measured" in check.problems[0]


def test_data_that_are_elsewhere(digits):
    edit_json(digits / "results.json", lambda results: results["arguments"].update(dataset="/gone/fashion"))
    write_card(digits, overwrite=True)
    with pytest.raises(FileNotFoundError, match="was measured on 'fashion': give its place with --data"):
        check_card(digits, device="cpu")
    assert check_card(digits, device="cpu", data="digits").ok
    edit_json(digits / "results.json", lambda results: results["arguments"].update(eval_split="train"))
    write_card(digits, overwrite=True)
    with pytest.raises(ValueError, match=r"The data have 1,347 images, .* is of 450"):
        check_card(digits, device="cpu", data="digits")


def test_when_a_figure_counts_as_reproduced():
    share = Figure("accuracy", "accuracy", 0.9, ("a",), count=1000)
    mean = Figure("perplexity", "perplexity", 20.0, ("a",))

    def judged(figure, found, complete, tolerance=0.0):
        return judge(figure, Rerun({("a",): found}, complete, tolerance, "")).reproduced

    assert judged(share, Found(0.9, 1000, 1000), True)
    assert not judged(share, Found(0.901, 1000, 1000), True)
    assert judged(share, Found(0.901, 1000, 1000), True, 0.001)
    assert not judged(share, Found(0.902, 1000, 1000), True, 0.001)
    assert judged(mean, Found(20.01, 9, 9), True, 0.001)
    assert not judged(mean, Found(20.1, 9, 9), True, 0.001)
    # of 100 images 81 is within the interval of 90 %, 70 is not
    assert judged(share, Found(0.81, 100, 100), False)
    assert not judged(share, Found(0.70, 100, 100), False)
    # the questions of four texts tell as much as four questions
    assert judged(share, Found(0.70, 100, 4), False)
    assert judged(mean, Found(22.0, 25, 25, 5.0), False)
    assert not judged(mean, Found(26.0, 25, 25, 5.0), False)
    # of many figures one may be further off by chance
    many = {(str(place),): Found(0.5, 10, 10) for place in range(200)}
    alone = judge(share, Rerun({("a",): Found(0.76, 100, 100)}, False, 0.0, ""))
    assert not alone.reproduced
    assert judge(share, Rerun({("a",): Found(0.76, 100, 100), **many}, False, 0.0, "")).reproduced
    assert judge(mean, Rerun({("a",): Found(20.0, 1, 1)}, False, 0.0, "")) is None
    assert judge(mean, Rerun({}, False, 0.0, "")) is None


def test_samples_are_evenly_spread():
    assert evenly_spread(range(10), Request()) == list(range(10))
    assert evenly_spread(range(10), Request(limit=3)) == [0, 3, 6]
    assert evenly_spread(range(10), Request(stride=3)) == [0, 3, 6, 9]
    assert evenly_spread(range(10), Request(stride=3, limit=2)) == [0, 6]
    for name in ("limit", "stride", "batch_size"):
        with pytest.raises(ValueError, match=f"`{name}` must be at least 1"):
            Request(**{name: 0})
