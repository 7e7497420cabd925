# SPDX-License-Identifier: Apache-2.0
"""`hf-lip report`."""

import json
import zipfile
from pathlib import Path

import pytest
from PIL import Image

from hf_lip.smoothing.logs import PartLog, RunLog

from .smoothing.test_logs import record
from .test_cli import run


SHARED = Path(__file__).resolve().parents[2] / "shared" / "data" / "certify_logs" / "certify_logs.zip"


def own_log(folder, sigma, radii):
    settings = {"model": "runs/resnet", "method": "mono", "sigma": sigma, "alpha": 0.001}
    with RunLog(folder, settings) as log:
        with PartLog(folder, settings, 0) as part:
            for idx, radius in enumerate(radii):
                part.append(record(idx, radius=radius, predict=1 if radius else -1, correct=radius > 0.0))
        log.finish(range(len(radii)))
    return folder / "counts.jsonl"


def test_logs_side_by_side_with_their_envelope(tmp_path):
    logs = [own_log(tmp_path / "a", 0.25, [0.1, 0.6, 0.6]), own_log(tmp_path / "b", 1.0, [0.0, 0.0, 2.1])]
    result = run("report", *logs, "--out", tmp_path / "out", "--radii", "0,0.5,1.0")
    assert result.exit_code == 0, result.output
    content = json.loads((tmp_path / "out" / "report.json").read_text())
    assert [entry["name"] for entry in content["runs"]] == ["resnet, mono, sigma 0.25", "resnet, mono, sigma 1.0"]
    assert content["runs"][0]["certified_accuracy"] == pytest.approx({"0": 1.0, "0.5": 2 / 3, "1.0": 0.0})
    assert content["runs"][1]["average_certified_radius"] == pytest.approx(0.7)
    assert content["runs"][1]["abstention_rate"] == pytest.approx(2 / 3)
    assert content["runs"][0]["images"] == [0, 1, 2]
    assert content["envelope"]["certified_accuracy"] == pytest.approx([1.0, 2 / 3, 1 / 3])
    assert content["envelope"]["best"] == [*["resnet, mono, sigma 0.25"] * 2, "resnet, mono, sigma 1.0"]
    with Image.open(tmp_path / "out" / "certified_accuracy.png") as plot:
        assert plot.size == (960, 630)
    assert "envelope" in result.output


def test_logs_of_other_images_have_no_envelope(tmp_path):
    logs = [own_log(tmp_path / "a", 0.25, [0.1, 0.6]), own_log(tmp_path / "b", 0.25, [0.5, 0.4, 0.2])]
    result = run("report", *logs, "--out", tmp_path / "out")
    assert result.exit_code == 0, result.output
    content = json.loads((tmp_path / "out" / "report.json").read_text())
    assert "envelope" not in content
    assert [entry["num_images"] for entry in content["runs"]] == [2, 3]


def test_a_published_log_is_read_and_its_alpha_found(tmp_path):
    # votes 93,654 and 91,578 of 100,000, sigma 0.25, alpha 0.01, as in the first rows of a published log
    (tmp_path / "sigma_0.25").write_text(
        "idx\tlabel\tpredict\tradius\tcorrect\ttime\n0\t3\t3\t0.378\t1\t15.4\n20\t7\t-1\t0.0\t0\t15.5\n"
        "40\t4\t4\t0.978\t1\t0:00:15.4\n"
    )
    result = run("report", tmp_path / "sigma_0.25", "--out", tmp_path / "out")
    assert result.exit_code == 0, result.output
    (entry,) = json.loads((tmp_path / "out" / "report.json").read_text())["runs"]
    # 0.978 is the largest radius at alpha = 0.01, and out of reach at 0.001
    assert entry["consistent_alphas"] == [0.01]
    assert entry["average_certified_radius"] == pytest.approx((0.378 + 0.978) / 3)


@pytest.mark.skipif(not SHARED.exists(), reason="needs the published logs")
def test_the_envelope_of_published_logs(tmp_path):
    with zipfile.ZipFile(SHARED) as archive:
        archive.extractall(tmp_path)
    folder = tmp_path / "cohen2019" / "certify" / "cifar10" / "resnet110"
    logs = [folder / f"noise_{sigma}" / "test" / f"sigma_{sigma}" for sigma in ("0.12", "0.25", "0.50", "1.00")]
    result = run("report", *logs, "--out", tmp_path / "out", "--radii", "0,0.25,0.5,0.75,1.0,1.5,2.0,2.5,3.0")
    assert result.exit_code == 0, result.output
    content = json.loads((tmp_path / "out" / "report.json").read_text())
    assert [entry["consistent_alphas"] for entry in content["runs"]] == [[0.001], [0.01], [0.01], [0.01]]
    acr = [round(entry["average_certified_radius"], 4) for entry in content["runs"]]
    assert acr == [0.2701, 0.4289, 0.5375, 0.5417]
    # the best of lvm-rs.md 3.1 in each column, which counts printed radii of exactly 1.0 as well
    expected = [0.814, 0.6, 0.428, 0.32, 0.234, 0.14, 0.1, 0.048, 0.02]
    assert content["envelope"]["certified_accuracy"] == pytest.approx(expected, abs=0.0021)
    assert [name[6:10] for name in content["envelope"]["best"][:4]] == ["0.12", "0.25", "0.25", "0.50"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("idx\tlabel\n", "The log must start with the columns"),
        ("idx\tlabel\tpredict\tcorrect\ttime\n0\t1\t1\t1\t2.0\n", "holds predictions without radii"),
    ],
)
def test_files_that_are_no_logs_of_certificates(tmp_path, text, message):
    (tmp_path / "log.tsv").write_text(text)
    result = run("report", tmp_path / "log.tsv", "--out", tmp_path / "out")
    assert result.exit_code == 2
    assert message in result.output
    result = run("report", tmp_path / "nothing.tsv", "--out", tmp_path / "out")
    assert result.exit_code == 2
    assert "No such file" in result.output
