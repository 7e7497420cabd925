# SPDX-License-Identifier: Apache-2.0
"""`pipeline("certify")` by smoothing: what the options do."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from transformers import pipeline

from hf_lip import LipschitzVisionConfig, LipschitzVisionForImageClassification
from hf_lip.ops.simplex import ScoreMap
from hf_lip.pipelines.dataset_run import DatasetRun, Processes
from hf_lip.pipelines.report import recertify, summarise
from hf_lip.smoothing import GridNoise
from hf_lip.smoothing.logs import read_log
from hf_lip.smoothing.predict import predict_counts
from hf_lip.smoothing.procedures import certify_counts


SMALL = {"sigma": 0.5, "n0": 20, "n": 300}
SOFT = {"score_map": "softmax(t=1.0)", **SMALL}


@pytest.fixture
def certify(resnet):
    return pipeline("certify", model=resnet, device="cpu", **SMALL)


@pytest.fixture(scope="module")
def lipschitz_model():
    torch.manual_seed(0)
    config = LipschitzVisionConfig.from_size("tiny", image_size=8, num_channels=3, num_labels=4)
    return LipschitzVisionForImageClassification(config).eval()


def eight_bit(images):
    return [(image * 255).round() / 255 for image in images]


@pytest.mark.parametrize("method", ["mono", "bonferroni", "cpm", "auto", "lvm", "betting"])
def test_every_method_gives_the_same_fields(certify, images, method):
    soft = {"score_map": ScoreMap("softmax", 1.0)} if method in ("lvm", "betting") else {}
    results = certify(list(images), method=method, **soft)
    for result in results:
        assert json.loads(json.dumps(result)) == result
        assert result["score_map"] == ("softmax(t=1.0)" if soft else "hardmax")
        assert (result["counts"] is None) == bool(soft)
        assert (result["n0"], result["n"], result["noise"], result["dtype"]) == (20, 300, "float64", "float32")
        assert result["base"].startswith("float32, 6 batch norms folded")
        assert 0.0 <= result["p_lower"] <= 1.0
        assert result["p_upper_other"] > 0.0
        if not soft:
            decision = certify_counts(result["method"], result["counts"], result["counts"], sigma=0.5, alpha=0.001)
            assert result["details"]["requested"] == method
            if result["method"] == "mono":
                assert result["p_lower"] == decision.p_lower
    assert {result["method"] for result in results} <= {method} | (
        {"mono", "bonferroni", "cpm"} if method == "auto" else set()
    )


def test_predictions_need_few_copies(certify, images):
    done = []
    for result, image in zip(certify(list(images), mode="predict", n=50), images, strict=True):
        assert result["label_id"] == (None if result["abstained"] else predict_counts(result["counts"], 0.001))
        assert (result["radius"], result["n0"], result["p_lower"], result["method"]) == (None, None, None, "predict")
        assert sum(result["counts"]) == 50
        assert certify(image, mode="predict", n=50, progress=done.append)["n"] == 50
    assert sum(done) == 150


def test_predictions_of_a_model_with_a_certificate_are_of_its_smoothed_classifier(lipschitz_model, images):
    certify = pipeline("certify", model=lipschitz_model, device="cpu")
    assert certify(images[0], mode="predict", n=50)["method"] == "predict"


def test_adaptive_sampling_and_its_progress(certify, images):
    done = []
    options = {"method": "mono", "budget": "adaptive", "rtol": 0.2, "n": 4000, "sigma": 1.0}
    results = certify(list(images), **options, progress=done.append)
    assert [result["n"] for result in results] == [sum(result["counts"]) for result in results]
    assert min(result["n"] for result in results) < 4000
    # what is saved counts as done
    assert sum(done) == 3 * 4020
    assert all("stopped" in result["details"] for result in results)


def test_sound_noise(certify, resnet, images):
    image = eight_bit(images)[0]
    result = certify(image, method="mono", sound_noise=True)
    assert result["noise"] == "exact, grid 1/255, clipped to [-3, 4]"
    noise, rows = GridNoise(0.5, 0), np.empty((300, 3, 8, 8), dtype=np.float32)
    noise.fill(rows, noise.prepare(image), index=0, first_draw=0, phase=1)
    with torch.no_grad():
        votes = resnet(pixel_values=torch.from_numpy(rows)).logits.argmax(1).bincount(minlength=4)
    assert result["counts"] == votes.tolist()
    with pytest.raises(ValueError, match="Image 0: `image` has pixels that are not k/255"):
        certify(images[0], method="mono", sound_noise=True)
    assert certify((images[0] * 256).round() / 256, method="mono", sound_noise=256)["noise"].startswith(
        "exact, grid 1/256"
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_threads_of_torch_do_not_change_votes(certify, images, dtype):
    options = {"method": "mono", "dtype": dtype, "n": 1000}
    expected = certify(list(images), **options)
    torch.set_num_threads(3)
    try:
        assert certify(list(images), **options) == expected
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(1)


def test_low_precision_is_said(certify, images):
    result = certify(images[0], method="mono", dtype="bfloat16")
    assert result["dtype"] == "bfloat16"
    assert result["base"].startswith("bfloat16, ")


def test_a_denoiser_in_front(certify, images):
    class Half(nn.Module):
        def forward(self, noisy):
            return 0.5 * noisy

    half = Half()
    result = certify(images[0], method="mono", denoiser=half)
    assert "denoised by Half" in result["base"]
    assert result["counts"] == certify(images[0], method="mono", denoiser=lambda noisy: 0.5 * noisy)["counts"]
    assert result["counts"] != certify(images[0], method="mono")["counts"]


def test_a_calibrated_score_map(certify, images):
    score_map = certify.calibrate(list(images), draws=30, sigma=0.5)
    assert isinstance(score_map, ScoreMap)
    assert not score_map.is_hard
    # the same images, settings and noise: the same map
    assert certify.calibrate(list(images), draws=30, sigma=0.5) == score_map
    result = certify(images[0], method="lvm", score_map=score_map)
    assert ScoreMap.parse(result["score_map"]) == score_map
    with pytest.raises(ValueError, match="images of its own"):
        certify.calibrate([])


@pytest.mark.parametrize("method", ["lvm", "betting"])
def test_the_proved_constant_of_the_base(lipschitz_model, images, method):
    certify = pipeline("certify", model=lipschitz_model, device="cpu", method=method, **{**SOFT, "n": 4000})
    aware = certify(images[0], lipschitz_aware=True)
    assert aware["base"] == "float64, pixels clipped to [0, 1]"
    assert aware["dtype"] == "float64"
    assert aware["details"]["lipschitz"] > 0.0
    assert 0.0 < aware["details"]["score_error"] < 1e-6


def test_the_base_classifier_follows_the_model(resnet, images):
    model = type(resnet)(resnet.config).eval()
    model.load_state_dict(resnet.state_dict())
    certify = pipeline("certify", model=model, device="cpu", method="mono", **SMALL)
    before = certify(images[0])
    kept = certify._base[1]
    assert certify(images[0]) == before
    assert certify._base[1] is kept
    with torch.no_grad():
        model.classifier[1].bias[2] += 100.0
    assert certify(images[0])["counts"] == [0, 0, 300, 0]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"mode": "guess"}, ValueError, "Unknown `mode` 'guess'"),
        ({"dtype": "int8"}, ValueError, "Unknown `dtype` 'int8'"),
        ({"method": "lvm"}, ValueError, "needs a soft `score_map`"),
        ({"method": "mono", "score_map": "softmax(t=1.0)"}, ValueError, "needs method lvm or betting"),
        ({"method": "lvm", "score_map": "softmax"}, ValueError, "is no score map"),
        ({"denoiser": 3}, TypeError, "`denoiser` must be a module or a function"),
        ({"method": "mono", "lipschitz_aware": True}, ValueError, "`lipschitz_aware` needs soft scores"),
        (
            {"method": "lvm", "score_map": "softmax(t=1.0)", "lipschitz_aware": True},
            ValueError,
            "needs a model with a certificate",
        ),
        (
            {"method": "lvm", "score_map": "softmax(t=1.0)", "lipschitz_aware": True, "dtype": "bfloat16"},
            ValueError,
            "leave out dtype",
        ),
        ({"sound_noise": 0}, ValueError, "`grid`"),
        ({"budget": "adaptive", "method": "mono", "target_radius": 100.0}, ValueError, "`target_radius`"),
    ],
)
def test_options_that_do_not_go_together(certify, images, arguments, error, message):
    with pytest.raises(error, match=message):
        certify(images[0], **arguments)


# data set runs


def dataset_run(certify, images, **options):
    settings = replace(certify.settings, method="cpm", **options)
    rows = [{"image": image} for image in images]
    return DatasetRun(certify, settings, "cpm", rows, [0, 1, 2], [0, 1, 2], source={"data": "made"}, batch_size=64)


def test_a_data_set_run_agrees_with_the_pipeline(certify, images, tmp_path):
    progress = []
    records = dataset_run(certify, images).run(tmp_path, progress=lambda done, total: progress.append((done, total)))
    for record, result in zip(records, certify(list(images), method="cpm", batch_size=64), strict=True):
        assert record.counts == result["counts"]
        assert record.radius == result["radius"]
        assert record.predict == (-1 if result["abstained"] else result["label_id"])
        assert record.time > 0.0
    assert progress[0] == (0, 960)
    assert progress[-1] == (960, 960)
    settings, _ = read_log(tmp_path / "counts.jsonl")
    assert (settings["data"], settings["indices"], settings["num_classes"]) == ("made", "0:3:1", 4)
    summary = summarise(records, {"0.1": 0.1}, alpha=0.001)
    assert summary["samples_per_image"] == 300
    assert summary["certified_accuracy_lower_bound"]["0.1"] <= summary["certified_accuracy"]["0.1"]
    # 20 selection samples: three images share a batch of 64, also where one of them is done already
    assert recertify(settings, records, method="cpm", alpha=0.001) == records


def test_shares_of_several_processes_are_the_whole(certify, images, tmp_path):
    whole = dataset_run(certify, images).run(tmp_path / "whole")
    folder = tmp_path / "parts"

    def others():
        """What the second process does between two of the first one's waits."""
        dataset_run(certify, images).run(folder, processes=Processes(1, 2))

    waits = []

    def wait():
        waits.append(0)
        if len(waits) == 1:
            others()

    records = dataset_run(certify, images).run(folder, processes=Processes(0, 2, wait))
    assert [record.result() for record in records] == [record.result() for record in whole]
    assert len(waits) == 2


def test_a_run_without_images(certify, images):
    with pytest.raises(ValueError, match="no images to certify"):
        DatasetRun(certify, certify.settings, "mono", [], [], [], source={})


def test_a_broken_image_is_named_and_the_others_are_kept(certify, images, tmp_path):
    broken = [images[0], images[1], torch.full((3, 8, 8), float("nan"))]
    run = dataset_run(certify, broken)
    run.batch_size = 20
    with pytest.raises(ValueError, match="Image 2: `image` has NaN"):
        run.run(tmp_path)
    run = dataset_run(certify, images)
    run.batch_size = 20
    assert len(run.run(tmp_path, resume=True)) == 3
