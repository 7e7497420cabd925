# SPDX-License-Identifier: Apache-2.0
"""`hf-lip certify` by smoothing: methods, logs, offline certificates, denoisers."""

import json

import pytest
import torch
from PIL import Image

from hf_lip.smoothing.logs import read_log
from hf_lip.smoothing.procedures import certify_counts

from .test_cli import model_folder, read_tsv, resnet_folder, run  # noqa: F401 (fixtures)


SMALL = ("--sigma", "0.5", "--n0", "10", "--n", "200", "--limit", "4", "--device", "cpu")


def without_time(path):
    return [{**row, "time": ""} for row in read_tsv(path)]


def records(folder):
    return [record.result() for record in read_log(folder / "counts.jsonl")[1]]


def test_what_a_smoothing_run_writes(resnet_folder, tmp_path):  # noqa: F811
    result = run("certify", resnet_folder, "--method", "cpm", *SMALL, "--stride", "100", "--out", tmp_path)
    assert result.exit_code == 0, result.output
    names = {"counts.jsonl", "certificates.tsv", "summary.json", "certified_accuracy.png", "probabilities.png"}
    assert {path.name for path in tmp_path.iterdir()} == names
    rows, found = read_tsv(tmp_path / "certificates.tsv"), records(tmp_path)
    assert [int(row["idx"]) for row in rows] == [0, 100, 200, 300]
    settings = read_log(tmp_path / "counts.jsonl")[0]
    assert (settings["method"], settings["indices"], settings["num_images"]) == ("cpm", "0:301:100", 4)
    assert settings["base"].startswith("float32, ")
    assert settings["noise"] == "float64"
    for record in found:
        decision = certify_counts("cpm", record["selection_counts"], record["counts"], sigma=0.5, alpha=0.001)
        assert (record["predict"], record["radius"]) == (decision.predict, decision.radius)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["images"] == [0, 100, 200, 300]
    assert sum(summary["p_lower_distribution"]["shares"]) == pytest.approx(1.0)
    assert set(summary["certified_accuracy_lower_bound"]) == set(summary["certified_accuracy"])
    with Image.open(tmp_path / "probabilities.png") as plot:
        assert plot.size == (960, 540)
    for text in ("noisy copies per image", "noise float64", "base classifier float32", "less what chance can add"):
        assert text in result.output


def test_certificates_from_counts_need_no_model(resnet_folder, tmp_path):  # noqa: F811
    log, out = tmp_path / "log", tmp_path / "out"
    assert run("certify", resnet_folder, "--method", "mono", *SMALL, "--out", log).exit_code == 0
    arguments = ("--method", "bonferroni", "--alpha", "0.01", "--out", out)
    result = run("certify", "--from-counts", log / "counts.jsonl", *arguments)
    assert result.exit_code == 0, result.output
    direct = tmp_path / "direct"
    assert run("certify", resnet_folder, *SMALL, *arguments[:4], "--out", direct).exit_code == 0
    assert without_time(out / "certificates.tsv") == without_time(direct / "certificates.tsv")
    summaries = [json.loads((folder / "summary.json").read_text()) for folder in (out, direct)]
    assert summaries[0]["certified_accuracy"] == summaries[1]["certified_accuracy"]
    assert (summaries[0]["settings"]["method"], summaries[0]["settings"]["alpha"]) == ("bonferroni", 0.01)
    result = run("certify", "--from-counts", log / "counts.jsonl", "--method", "mono", "--out", log)
    assert result.exit_code == 2
    assert "holds a log of its own: give another folder" in result.output


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--budget", "adaptive"), "adaptive sampling, which stopped at numbers of samples that the votes chose"),
        (("--predict",), "holds predictions"),
        (("--method", "lvm", "--score-map", "softmax(t=1.0)"), "holds soft scores and no votes"),
    ],
)
def test_logs_from_which_nothing_follows(resnet_folder, tmp_path, options, message):  # noqa: F811
    log = tmp_path / "log"
    result = run("certify", resnet_folder, "--method", "mono", *SMALL, *options, "--out", log)
    assert result.exit_code == 0, result.output
    result = run("certify", "--from-counts", log / "counts.jsonl", "--method", "mono", "--out", tmp_path / "out")
    assert result.exit_code == 2
    assert message in result.output
    assert not (tmp_path / "out" / "certificates.tsv").exists()


def test_predictions(resnet_folder, tmp_path):  # noqa: F811
    result = run("certify", resnet_folder, "--method", "mono", "--predict", *SMALL, "--out", tmp_path)
    assert result.exit_code == 0, result.output
    assert list(read_tsv(tmp_path / "certificates.tsv")[0]) == ["idx", "label", "predict", "correct", "time"]
    assert "each prediction is of the smoothed classifier" in result.output
    assert "certified accuracy" not in result.output
    assert all(record["method"] == "predict" and sum(record["counts"]) == 200 for record in records(tmp_path))


@pytest.mark.parametrize("method", ["lvm", "betting"])
def test_soft_scores_with_a_calibrated_map(resnet_folder, tmp_path, method):  # noqa: F811
    result = run("certify", resnet_folder, "--method", method, "--calibrate", "3", *SMALL, "--out", tmp_path)
    assert result.exit_code == 0, result.output
    score_map = read_log(tmp_path / "counts.jsonl")[0]["score_map"]
    assert score_map.startswith(("softmax(t=", "sparsemax(t="))
    # the map that was found, given by name, is the same run
    again = run(
        "certify", resnet_folder, "--method", method, "--score-map", score_map, *SMALL, "--out", tmp_path / "b"
    )
    assert again.exit_code == 0, again.output
    assert records(tmp_path / "b") == records(tmp_path)


def test_the_deterministic_method_does_not_write_over_a_log(model_folder, tmp_path):  # noqa: F811
    assert run("certify", model_folder, "--method", "mono", *SMALL, "--out", tmp_path).exit_code == 0
    before = (tmp_path / "certificates.tsv").read_text()
    result = run("certify", model_folder, "--limit", "4", "--device", "cpu", "--out", tmp_path)
    assert result.exit_code == 2
    assert "holds the log of a smoothing run" in result.output
    assert (tmp_path / "certificates.tsv").read_text() == before
    options = ("--limit", "4", "--device", "cpu", "--out", tmp_path, "--overwrite")
    assert run("certify", model_folder, *options).exit_code == 0
    assert not (tmp_path / "counts.jsonl").exists()


def test_a_lipschitz_model_with_its_constant(model_folder, tmp_path):  # noqa: F811
    soft = ("--method", "lvm", "--score-map", "softmax(t=1.0)", *SMALL)
    for name, options in (("plain", ()), ("aware", ("--lipschitz-aware",))):
        result = run("certify", model_folder, *soft, *options, "--out", tmp_path / name)
        assert result.exit_code == 0, result.output
    settings, found = read_log(tmp_path / "aware" / "counts.jsonl")
    assert settings["base"] == "float64, pixels clipped to [0, 1]"
    assert settings["lipschitz"] > 0.0
    assert all(record.details["lipschitz"] == settings["lipschitz"] for record in found)
    assert all(0.0 < record.details["score_error"] < 1e-6 for record in found)


def test_sound_noise_and_low_precision(resnet_folder, tmp_path):  # noqa: F811
    options = ("--method", "mono", *SMALL, "--sound-noise", "--grid", "256", "--dtype", "bfloat16")
    result = run("certify", resnet_folder, *options, "--out", tmp_path)
    assert result.exit_code == 0, result.output
    settings = read_log(tmp_path / "counts.jsonl")[0]
    assert settings["noise"] == "exact, grid 1/256, clipped to [-3, 4]"
    assert settings["base"].startswith("bfloat16, ")
    result = run("certify", resnet_folder, "--method", "mono", *SMALL, "--sound-noise", "--out", tmp_path / "b")
    assert result.exit_code == 2
    assert "Image 0: `image` has pixels that are not k/255" in result.output


def halve(noisy):
    """A denoiser for the test."""
    return 0.5 * noisy


def test_a_denoiser_by_name(resnet_folder, tmp_path, monkeypatch):  # noqa: F811
    options = ("--method", "mono", *SMALL)
    result = run("certify", resnet_folder, *options, "--denoiser", f"{__name__}:halve", "--out", tmp_path / "a")
    assert result.exit_code == 0, result.output
    assert "denoised by halve" in read_log(tmp_path / "a" / "counts.jsonl")[0]["base"]
    assert run("certify", resnet_folder, *options, "--out", tmp_path / "b").exit_code == 0
    assert records(tmp_path / "a") != records(tmp_path / "b")
    for name, message in (
        (f"{__name__}:nothing", "has no 'nothing'"),
        (f"{__name__}:SMALL", "is no module or function"),
    ):
        result = run("certify", resnet_folder, *options, "--denoiser", name, "--out", tmp_path / "c")
        assert result.exit_code == 2
        assert message in result.output


def test_a_diffusion_pipeline_as_denoiser(resnet_folder, tmp_path):  # noqa: F811
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    unet = diffusers.UNet2DModel(
        sample_size=8, in_channels=1, out_channels=1, layers_per_block=1, block_out_channels=(8,), norm_num_groups=4,
        down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",),
    )  # fmt: skip
    diffusers.DDPMPipeline(unet, diffusers.DDPMScheduler()).save_pretrained(tmp_path / "ddpm")
    options = ("--method", "mono", *SMALL, "--limit", "1", "--denoiser", tmp_path / "ddpm")
    result = run("certify", resnet_folder, *options, "--out", tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert "denoised by DiffusionDenoiser" in read_log(tmp_path / "out" / "counts.jsonl")[0]["base"]


def test_resume_and_overwrite(resnet_folder, tmp_path):  # noqa: F811
    options = ("--method", "mono", *SMALL, "--out", tmp_path)
    assert run("certify", resnet_folder, *options).exit_code == 0
    expected = (tmp_path / "certificates.tsv").read_text()
    result = run("certify", resnet_folder, *options)
    assert result.exit_code == 2
    assert "holds the log of a run: resume it, overwrite it, or choose another folder" in result.output
    # nothing is left to do: also the times stay
    assert run("certify", resnet_folder, *options, "--resume").exit_code == 0
    assert (tmp_path / "certificates.tsv").read_text() == expected
    result = run("certify", resnet_folder, *options, "--resume", "--seed", "1")
    assert result.exit_code == 2
    assert "other settings (seed: 0 there, 1 now)" in result.output
    result = run("certify", resnet_folder, *options, "--overwrite", "--seed", "1")
    assert result.exit_code == 0, result.output
    assert read_log(tmp_path / "counts.jsonl")[0]["seed"] == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--method", "lvm"), "give --score-map, such as 'softmax(t=1.0)', or --calibrate"),
        (("--method", "lvm", "--calibrate", "2", "--score-map", "softmax(t=1.0)"), "give --score-map"),
        (("--method", "mono", "--calibrate", "2"), "--calibrate is for soft scores"),
        (("--method", "lvm", "--calibrate", "0"), "`--calibrate` must be at least 1"),
        (("--method", "lvm", "--score-map", "softmax"), "is no score map"),
        (("--method", "mono", "--budget", "endless"), "`budget` must be 'fixed' or 'adaptive'"),
        (("--method", "mono", "--target-radius", "0.5"), "needs `budget`='adaptive'"),
        (("--method", "mono", "--dtype", "int8"), "Unknown `dtype` 'int8'"),
        (("--method", "mono", "--stride", "0"), "`--stride` must be at least 1"),
        (("--method", "mono", "--lipschitz-aware"), "needs soft scores"),
        (
            ("--method", "lvm", "--score-map", "softmax(t=1.0)", "--lipschitz-aware"),
            "needs a model with a certificate",
        ),
        (("--method", "lipschitz", "--predict"), "`mode`='predict' is for smoothing"),
        (("--method", "mono", "--denoiser", "no.such.module:name"), "No module named 'no'"),
        (("--from-counts", "no/such/log.jsonl"), "No such file"),
    ],
)
def test_errors_are_one_line(resnet_folder, tmp_path, options, message):  # noqa: F811
    result = run("certify", resnet_folder, *options, "--out", tmp_path / "out", "--device", "cpu", "--n", "100")
    assert result.exit_code == 2
    lines = [line for line in result.output.splitlines() if line.strip()]
    assert len(lines) == 1
    assert lines[0].startswith("Error: ")
    assert message in lines[0]
    assert not list(tmp_path.rglob("*.tsv"))
