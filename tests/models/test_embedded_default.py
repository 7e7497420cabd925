# SPDX-License-Identifier: Apache-2.0
"""The embedded checkpoint: small, sound, as good as its card says, and attacked."""

import json

import pytest
import torch
from transformers import AutoModelForImageClassification, pipeline

from hf_lip import verify_checkpoint
from hf_lip.assets import DEFAULT_MODEL_DIR
from hf_lip.audit import l2_pgd
from hf_lip.cards import check_card
from hf_lip.data import dataset_to_tensors, load_image_dataset
from hf_lip.metrics import STANDARD_RADII, average_certified_radius, certified_accuracy


@pytest.fixture(scope="module")
def digits():
    return dataset_to_tensors(load_image_dataset("digits", "test"), image_size=8, num_channels=1, progress=False)


@pytest.fixture(scope="module")
def model():
    return AutoModelForImageClassification.from_pretrained(DEFAULT_MODEL_DIR)


def test_files_are_whole_and_small():
    size = (DEFAULT_MODEL_DIR / "model.safetensors").stat().st_size
    assert size < 500_000
    report = verify_checkpoint(DEFAULT_MODEL_DIR)
    assert report.ok, report.reasons


def test_the_card_tells_the_numbers_of_the_model(model, digits):
    images, labels = digits
    with torch.no_grad():
        output = model(images)
    correct = (output.logits.argmax(dim=1) == labels).numpy()
    radii = output.certified_radius.numpy()
    stored = json.loads((DEFAULT_MODEL_DIR / "results.json").read_text())
    assert len(labels) == stored["eval_samples"] == 450
    assert correct.mean() == pytest.approx(stored["clean_accuracy"])
    for name, eps in STANDARD_RADII.items():
        assert certified_accuracy(radii, correct, eps) == pytest.approx(stored["certified_accuracy"][name])
    assert average_certified_radius(radii, correct) == pytest.approx(stored["average_certified_radius"], rel=1e-6)
    # written by `hf-lip card` from this file, and measured again
    assert "<!-- hf_lip:generated sha256=" in (DEFAULT_MODEL_DIR / "README.md").read_text()
    check = check_card(DEFAULT_MODEL_DIR, device="cpu")
    assert check.ok, check.problems
    assert len(check.figures) == 6
    card = (DEFAULT_MODEL_DIR / "README.md").read_text()
    assert stored["command"].split("train_image_classifier.py ")[1].split() == (
        card.split("train_image_classifier.py ")[1].split("```")[0].replace("\\\n", " ").split()
    )


def test_attacks_find_nothing_inside_and_much_outside(model, digits):
    images, _ = digits
    with torch.no_grad():
        output = model(images)
    certified = output.certified_radius > 0
    images, radii = images[certified], output.certified_radius[certified]
    labels = output.logits.argmax(dim=1)[certified]

    def logits_of(pixels):
        return model(pixels, output_certified_radius=False).logits

    model.requires_grad_(False)
    inside = l2_pgd(logits_of, images, labels, 0.999 * radii, num_steps=60, num_restarts=2)
    outside = l2_pgd(logits_of, images, labels, 1.5 * radii, num_steps=60, num_restarts=1)
    assert not inside.any()
    assert outside.float().mean() > 0.8


def test_pipeline_without_a_model(digits):
    images, labels = digits
    certify = pipeline("certify")
    results = certify([image.numpy() for image in images[:20]], batch_size=7)
    assert [result["label"] for result in results[:5]] == [str(int(label)) for label in labels[:5]]
    assert all(result["method"] == "lipschitz" for result in results)
    with torch.no_grad():
        expected = certify.model(images[:20]).certified_radius
    torch.testing.assert_close(torch.tensor([result["radius"] for result in results]), expected, check_dtype=False)
