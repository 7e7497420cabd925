# SPDX-License-Identifier: Apache-2.0
import inspect
import json
import math

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageClassification, pipeline
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

import hf_lip
from hf_lip import LipschitzVisionConfig, LipschitzVisionForImageClassification
from hf_lip.pipelines import CertifyPipeline
from hf_lip.smoothing import clopper_pearson_lower, gaussian_noise, mono_radius


FIELDS = {
    *("label", "label_id", "score", "radius", "radius_unit", "abstained", "method", "sigma", "n0", "n", "alpha"),
    *("p_lower", "p_upper_other", "counts", "score_map", "seed", "dtype", "base", "noise", "details"),
}
SMALL = {"method": "mono", "sigma": 0.5, "n0": 20, "n": 200}


@pytest.fixture(scope="module")
def lipschitz_model():
    torch.manual_seed(0)
    config = LipschitzVisionConfig.from_size(
        "tiny", image_size=8, num_channels=3, id2label={0: "a", 1: "b", 2: "c", 3: "d"}
    )
    return LipschitzVisionForImageClassification(config).eval()


@pytest.fixture
def certify(resnet):
    return pipeline("certify", model=resnet, device="cpu", **SMALL)


# smoothing


def test_result_of_mono(certify, images):
    result = certify(images[0])
    assert set(result) == FIELDS
    assert json.loads(json.dumps(result)) == result
    assert result["method"] == "mono"
    assert result["radius_unit"] == "l2, pixels in [0, 1]"
    assert (result["sigma"], result["n0"], result["n"], result["alpha"], result["seed"]) == (0.5, 20, 200, 0.001, 0)
    assert sum(result["counts"]) == 200
    assert len(result["counts"]) == 4
    assert result["dtype"] == "float32"
    if not result["abstained"]:
        count = result["counts"][result["label_id"]]
        assert result["label"] == f"LABEL_{result['label_id']}"
        assert result["score"] == count / 200
        assert result["p_lower"] == clopper_pearson_lower(count, 200, 0.001)
        assert result["p_upper_other"] == 1 - result["p_lower"]
        assert result["radius"] == mono_radius(result["p_lower"], 0.5)


@pytest.mark.parametrize("name", ["resnet", "vit"])
def test_votes_are_the_models_own_on_the_documented_noise(name, images, request):
    model = request.getfixturevalue(name)
    results = pipeline("certify", model=model, device="cpu")(list(images), **SMALL, seed=11)
    for index, result in enumerate(results):
        noise = gaussian_noise((3, 8, 8), seed=11, index=index, first_draw=0, num_draws=200, phase=1)
        noisy = torch.from_numpy((images[index].double().numpy() + 0.5 * noise).astype(np.float32))
        with torch.no_grad():
            votes = model(pixel_values=noisy).logits.argmax(dim=1).bincount(minlength=4)
        assert result["counts"] == votes.tolist()
    # a test of counts needs votes that differ
    assert any(max(result["counts"]) < 200 for result in results)


def test_noise_is_added_before_resize_and_normalise(vit):
    processor = ViTImageProcessorPil(size={"height": 8, "width": 8}, image_mean=[0.4] * 3, image_std=[0.2] * 3)
    image = torch.rand(3, 12, 16, generator=torch.Generator().manual_seed(3))
    result = pipeline("certify", model=vit, image_processor=processor, device="cpu")(image, **SMALL)
    noise = gaussian_noise((3, 12, 16), seed=0, index=0, first_draw=0, num_draws=200, phase=1)
    noisy = torch.from_numpy((image.double().numpy() + 0.5 * noise).astype(np.float32))
    resized = torch.nn.functional.interpolate(noisy, size=(8, 8), mode="bilinear", antialias=True)
    with torch.no_grad():
        votes = vit(pixel_values=(resized - 0.4) / 0.2).logits.argmax(dim=1).bincount(minlength=4)
    assert result["counts"] == votes.tolist()


@pytest.mark.parametrize("batch_size", [1, 33, 199, 1000])
def test_same_counts_for_any_batch_size(certify, images, batch_size):
    # 199 leaves a last batch of one copy
    expected = certify(list(images), batch_size=64)
    assert certify(list(images), batch_size=batch_size) == expected
    assert certify(list(images), batch_size=batch_size, seed=1) != expected


def test_noise_is_keyed_by_position(certify, images):
    both = certify([images[0], images[0]])
    assert both[0] == certify(images[0])
    assert both[1]["counts"] != both[0]["counts"]


def test_abstention(resnet, images):
    # almost no signal is left: no class has a majority that 60 votes can prove
    results = pipeline("certify", model=resnet, device="cpu")(
        list(images), method="mono", sigma=0.5, n0=1, n=10, alpha=0.001, seed=5
    )
    abstained = [result for result in results if result["abstained"]]
    assert abstained
    for result in abstained:
        assert (result["label"], result["label_id"], result["score"], result["radius"]) == (None, None, None, 0.0)


# the deterministic certificate


def test_result_of_lipschitz(lipschitz_model, images):
    certify = pipeline("certify", model=lipschitz_model, device="cpu")
    results = certify(list(images), batch_size=2)
    with torch.no_grad():
        output = lipschitz_model(pixel_values=images)
    for result, logits, radius in zip(results, output.logits, output.certified_radius, strict=True):
        assert set(result) == FIELDS
        assert json.loads(json.dumps(result)) == result
        assert result["method"] == "lipschitz"
        assert result["label_id"] == int(logits.argmax())
        assert result["label"] == "abcd"[result["label_id"]]
        assert result["radius"] == pytest.approx(float(radius), rel=1e-9)
        assert result["score"] == pytest.approx(float(logits.double().softmax(0).max()))
        assert not result["abstained"]
        missing = ("sigma", "n0", "n", "alpha", "p_lower", "p_upper_other", "counts", "score_map", "seed")
        assert all(result[field] is None for field in missing)


def test_smoothing_of_a_lipschitz_model(lipschitz_model, images):
    result = pipeline("certify", model=lipschitz_model, device="cpu")(images[0], **SMALL)
    noise = gaussian_noise((3, 8, 8), seed=0, index=0, first_draw=0, num_draws=200, phase=1)
    noisy = torch.from_numpy((images[0].double().numpy() + 0.5 * noise).astype(np.float32))
    with torch.no_grad():
        logits = lipschitz_model(pixel_values=noisy, output_certified_radius=False).logits
    assert result["counts"] == logits.argmax(dim=1).bincount(minlength=4).tolist()


def test_auto_chooses_by_the_model(lipschitz_model, resnet, images):
    assert pipeline("certify", model=lipschitz_model, device="cpu")(images[0])["method"] == "lipschitz"
    assert pipeline("certify", model=resnet, device="cpu")(images[0], n0=10, n=10)["method"] == "mono"


@pytest.mark.usefixtures("auto_image_processor")
def test_from_a_folder_with_its_image_processor(lipschitz_model, images, tmp_path):
    lipschitz_model.save_pretrained(tmp_path)
    hf_lip.LipschitzVisionImageProcessor(size={"height": 8, "width": 8}, num_channels=3).save_pretrained(tmp_path)
    certify = pipeline("certify", model=str(tmp_path), device="cpu")
    assert isinstance(certify, CertifyPipeline)
    assert certify.image_processor is not None
    assert certify(images[0]) == pipeline("certify", model=lipschitz_model, device="cpu")(images[0])
    # the same class in the ordinary pipeline
    picture = Image.fromarray((images[0].permute(1, 2, 0).numpy() * 255).astype(np.uint8))
    scores = pipeline("image-classification", model=str(tmp_path), device="cpu")(picture)
    assert scores[0]["label"] == certify(picture)["label"]


def test_resizing_is_refused_where_it_changes_the_unit(lipschitz_model):
    processor = hf_lip.LipschitzVisionImageProcessor(size={"height": 8, "width": 8}, num_channels=3)
    large = torch.rand(3, 16, 16)
    certify = pipeline("certify", model=lipschitz_model, image_processor=processor, device="cpu")
    with pytest.raises(ValueError, match=r"16x16 pixels where the model takes 8x8\. Resizing changes the unit"):
        certify(large)
    assert certify(large, **SMALL)["method"] == "mono"
    with pytest.raises(ValueError, match="resize it first"):
        pipeline("certify", model=lipschitz_model, device="cpu")(large, **SMALL)


# inputs


def test_kinds_of_inputs(certify, images, tmp_path):
    array = (images[0].permute(1, 2, 0).numpy() * 255).round().astype(np.uint8)
    pil = Image.fromarray(array)
    pil.save(tmp_path / "image.png")
    expected = certify(pil)
    for item in (
        *(array, array.transpose(2, 0, 1), torch.from_numpy(array), array / np.float32(255), {"image": pil}),
        *({"img": pil, "label": 0}, tmp_path / "image.png", str(tmp_path / "image.png")),
    ):
        assert certify(item) == expected
    assert certify([pil, pil])[0] == expected
    assert certify((pil,)) == [expected]


def test_data_sets_and_generators_are_read_lazily(certify, images):
    rows = [Image.fromarray((image.permute(1, 2, 0).numpy() * 255).astype(np.uint8)) for image in images]
    expected = certify(rows)
    features = datasets.Features({"img": datasets.Image(), "label": datasets.Value("int64")})
    dataset = datasets.Dataset.from_dict({"img": rows, "label": [0, 1, 2]}, features=features)
    read = []

    def generator():
        for row in rows:
            read.append(row)
            yield row

    for inputs in (dataset, dataset.to_iterable_dataset(), generator()):
        results = certify(inputs)
        assert inspect.isgenerator(results)
        assert list(results) == expected
    assert list(certify(dataset, num_workers=1)) == expected
    read.clear()
    next(certify(generator()))
    assert len(read) == 1


def test_grey_images():
    config = LipschitzVisionConfig.from_size("tiny", image_size=8, num_channels=1, num_labels=3)
    certify = pipeline("certify", model=LipschitzVisionForImageClassification(config), device="cpu")
    assert certify(np.random.default_rng(0).random((8, 8)))["method"] == "lipschitz"


# the pipeline object


def test_defaults_of_the_object_and_of_the_call(resnet, images):
    certify = pipeline("certify", model=resnet, device="cpu", **SMALL, seed=3, batch_size=50)
    assert certify(images[0])["seed"] == 3
    assert certify(images[0], seed=4)["seed"] == 4
    # a call does not change the defaults
    assert certify(images[0])["seed"] == 3
    assert (certify.method, certify.settings.n) == ("mono", 200)


def test_documented_defaults(resnet):
    settings = pipeline("certify", model=resnet, device="cpu").settings
    assert (settings.sigma, settings.n0, settings.n, settings.alpha, settings.seed) == (0.25, 100, 10_000, 0.001, 0)


def test_a_model_in_training_mode_is_evaluated(resnet, images):
    expected = CertifyPipeline(model=resnet, device="cpu", task="certify")(images[0], **SMALL)
    certify = CertifyPipeline(model=resnet, device="cpu", task="certify")
    resnet.train()
    assert certify(images[0], **SMALL) == expected
    assert not resnet.training


def test_progress_callback_and_bar(certify, lipschitz_model, images):
    done = []
    certify(list(images), batch_size=64, progress=done.append)
    assert sum(done) == 3 * 220
    done.clear()
    deterministic = pipeline("certify", model=lipschitz_model, device="cpu")
    deterministic(list(images), batch_size=2, progress=done.append)
    assert done == [2, 1]
    deterministic(list(images), progress=True)
    assert certify(images[0]) is not None


def test_task_is_registered_for_the_auto_class():
    from transformers.pipelines import PIPELINE_REGISTRY

    _, task, _ = PIPELINE_REGISTRY.check_task("certify")
    assert task["impl"] is CertifyPipeline
    (loader,) = task["pt"]
    assert issubclass(loader, AutoModelForImageClassification)


# bad input


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"method": "magic"}, ValueError, "Unknown `method` 'magic': choose one of auto, lipschitz, mono"),
        ({"method": "lipschitz"}, ValueError, "ResNetForImageClassification has none: use method='mono'"),
        ({"sigma": 0.0}, ValueError, "`sigma`"),
        ({"sigma": -1.0}, ValueError, "`sigma`"),
        ({"sigma": math.nan}, ValueError, "`sigma`"),
        ({"alpha": 0.0}, ValueError, "`alpha`"),
        ({"alpha": 1.5}, ValueError, "`alpha`"),
        ({"n": 9}, ValueError, "n >= 10"),
        ({"n": 0}, ValueError, "`n`"),
        ({"n": 100.5}, TypeError, "`n` must be an integer"),
        ({"n0": 0}, ValueError, "`n0`"),
        ({"seed": -1}, ValueError, "`seed`"),
        ({"seed": 2**64}, ValueError, "`seed`"),
        ({"batch_size": 0}, ValueError, "`batch_size`"),
        ({"batch_size": 1.5}, TypeError, "`batch_size`"),
        ({"sigmas": 0.5}, TypeError, "Unknown argument 'sigmas'"),
    ],
)
def test_bad_arguments(certify, images, arguments, error, message):
    with pytest.raises(error, match=message):
        certify(images[0], **arguments)


def test_bad_arguments_are_found_when_the_pipeline_is_made(resnet):
    with pytest.raises(ValueError, match="`sigma`"):
        pipeline("certify", model=resnet, device="cpu", sigma=-1.0)


@pytest.mark.parametrize(
    ("item", "error", "message"),
    [
        (torch.full((3, 8, 8), math.nan), ValueError, "NaN or infinite pixels"),
        (torch.full((3, 8, 8), 2.0), ValueError, r"outside \[0, 1\]"),
        (torch.zeros(1, 8, 8), ValueError, "1 channels.*expected 3"),
        (Image.new("RGBA", (8, 8)), ValueError, "4 channels"),
        (torch.zeros(2, 3, 8, 8), ValueError, "one image at a time"),
        ("no/such/file.png", FileNotFoundError, "No image file"),
        ({"label": 1}, ValueError, "'image' or 'img'"),
        (7, TypeError, "`inputs` must be an image"),
        ([], ValueError, "`inputs` is empty"),
        ((), ValueError, "`inputs` is empty"),
        (datasets.Dataset.from_dict({"image": []}), ValueError, "`inputs` is empty"),
    ],
)
def test_bad_images(certify, item, error, message):
    with pytest.raises(error, match=message):
        certify(item)


def test_empty_generator(certify):
    with pytest.raises(ValueError, match="`inputs` is empty"):
        list(certify(item for item in []))


def test_a_bad_image_in_a_list_is_named(certify, images):
    with pytest.raises(ValueError, match="Image 1 of `inputs`: `image` has NaN"):
        certify([images[0], torch.full((3, 8, 8), math.nan)])


def test_wrong_size_without_a_processor(vit):
    with pytest.raises(ValueError, match="10x10 pixels where the model takes 8x8: resize it first"):
        pipeline("certify", model=vit, device="cpu")(torch.zeros(3, 10, 10), **SMALL)


def test_a_model_with_nan_weights_is_an_error(vit, images):
    broken = type(vit)(vit.config)
    with torch.no_grad():
        broken.classifier.weight.fill_(math.nan)
    with pytest.raises(ValueError, match="NaN or infinite logits"):
        pipeline("certify", model=broken, device="cpu")(images[0], **SMALL)
