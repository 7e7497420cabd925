# SPDX-License-Identifier: Apache-2.0
import zipfile
from pathlib import Path

import numpy as np
import pytest

from hf_lip.metrics import average_certified_radius
from hf_lip.smoothing.intervals import clopper_pearson_lower
from hf_lip.smoothing.log_analysis import (
    attainable_radii,
    consistent_alphas,
    read_published_log,
    unattainable_rows,
    vote_ranges,
)
from hf_lip.smoothing.radii import mono_radius


ARCHIVE = Path(__file__).parents[3] / "shared" / "data" / "certify_logs" / "certify_logs.zip"
needs_logs = pytest.mark.skipif(not ARCHIVE.is_file(), reason="the published logs are not there")
N = 100_000
CIFAR, IMAGENET = "cohen2019/certify/cifar10/resnet110/", "cohen2019/certify/imagenet/resnet50/"

# lvm-rs.md 6.4: rows, alpha, abstentions, ACR, largest radius and its rows, correct with radius >= 0, .25, .5, ...
COHEN = {
    CIFAR + "noise_0.12/test/sigma_0.12": (500, 0.001, 19, 0.2701, 0.457, 156, "407 293 0 0 0 0 0 0 0"),
    CIFAR + "noise_0.25/test/sigma_0.25": (500, 0.01, 43, 0.4289, 0.978, 65, "374 300 214 133 0 0 0 0 0"),
    CIFAR + "noise_0.50/test/sigma_0.50": (500, 0.01, 83, 0.5375, 1.96, 9, "326 273 207 160 117 47 0 0 0"),
    CIFAR + "noise_1.00/test/sigma_1.00": (500, 0.01, 145, 0.5417, 3.56, 1, "236 196 170 139 108 70 50 24 10"),
    IMAGENET + "noise_0.25/test/sigma_0.25": (427, 0.01, 38, 0.4765, 0.978, 122, "285 248 211 160 0 0 0 0 0"),
    IMAGENET + "noise_0.50/test/sigma_0.50": (500, 0.01, 82, 0.7325, 1.96, 88, "286 259 229 212 186 143 0 0 0"),
    IMAGENET + "noise_1.00/test/sigma_1.00": (500, 0.01, 148, 0.8752, 3.91, 38, "218 203 189 177 163 130 97 74 61"),
}
# idx, label, predict, radius, correct (range of votes) of the first rows
FIRST_ROWS = {
    CIFAR
    + "noise_0.12/test/sigma_0.12": "0,3,-1,0.0,0 ; 20,7,7,0.0734,1 (73383-73409) ; 40,4,4,0.405,1 (99981-99981)",
    CIFAR + "noise_0.25/test/sigma_0.25": "0,3,3,0.378,1 (93630-93679) ; 20,7,-1,0.0,0 ; 40,4,4,0.341,1 (91547-91609)",
    CIFAR + "noise_0.50/test/sigma_0.50": "0,3,3,0.486,1 (83697-83745) ; 20,7,7,0.413,1 (79829-79884)"
    " ; 40,4,4,0.312,1 (73662-73726)",
    CIFAR + "noise_1.00/test/sigma_1.00": "0,3,-1,0.0,0 ; 20,7,-1,0.0,0 ; 40,4,-1,0.0,0",
    IMAGENET + "noise_0.25/test/sigma_0.25": "0,0,0,0.165,1 (74794-74921) ; 100,2,2,0.978,1 (100000-100000)"
    " ; 200,4,395,0.0504,0 (58345-58359)",
    IMAGENET + "noise_0.50/test/sigma_0.50": "0,0,394,0.0125,0 (51362-51369) ; 100,2,2,1.86,1 (99997-99997)"
    " ; 200,4,-1,0.0,0",
    IMAGENET + "noise_1.00/test/sigma_1.00": "0,0,-1,0.0,0 ; 100,2,2,1.35,1 (91279-91437) ; 200,4,-1,0.0,0",
}


def published(name):
    with zipfile.ZipFile(ARCHIVE) as archive:
        return read_published_log(archive.read(name).decode().splitlines())


def salman_logs():
    if not ARCHIVE.is_file():
        return []
    with zipfile.ZipFile(ARCHIVE) as archive:
        return sorted(name for name in archive.namelist() if name.startswith("salman2019/") and "sigma_" in name)


def sigma_of(name):
    return float(name.rpartition("sigma_")[2])


@needs_logs
@pytest.mark.parametrize("name", list(COHEN))
def test_cohens_certificates(name):
    rows, alpha, abstained, acr, largest, num_largest, counts = COHEN[name]
    log = published(name)
    assert len(log.idx) == rows
    assert log.abstained.sum() == abstained
    assert average_certified_radius(log.radius, log.correct) == pytest.approx(acr, abs=6e-5)
    assert (log.radius.max(), (log.radius == largest).sum()) == (largest, num_largest)
    radii = (0, 0.25, 0.5, 0.75, 1, 1.5, 2, 2.5, 3)
    assert [int((log.correct & (log.radius >= r)).sum()) for r in radii] == [int(text) for text in counts.split()]
    # images 0, 20, 40, ... of CIFAR-10, 0, 100, 200, ... of ImageNet
    assert np.array_equal(log.idx, (20 if "cifar" in name else 100) * np.arange(rows))
    assert 10 < np.median(log.seconds) < 200
    # the only alpha of the two for which every printed radius can be had
    assert consistent_alphas(log, n=N, sigma=sigma_of(name)) == (alpha,)


@needs_logs
@pytest.mark.parametrize("name", list(FIRST_ROWS))
def test_first_rows_and_their_votes(name):
    log = published(name)
    ranges = vote_ranges(log, n=N, sigma=sigma_of(name), alpha=COHEN[name][1])
    for row, text in enumerate(FIRST_ROWS[name].split(" ; ")):
        values, _, votes = text.partition(" (")
        fields = (log.idx[row], log.label[row], log.predict[row], log.printed[row], int(log.correct[row]))
        assert ",".join(map(str, fields)) == values
        if votes:
            assert f"{ranges[row, 0]}-{ranges[row, 1]})" == votes
        else:
            # an abstention: any number of votes below the smallest that certifies, 50,490 and 50,369
            assert ranges[row].tolist() == [0, {0.001: 50_489, 0.01: 50_368}[COHEN[name][1]]]


@needs_logs
@pytest.mark.parametrize("name", list(COHEN))
def test_printed_radii_are_reproduced_from_their_votes(name):
    sigma, alpha = sigma_of(name), COHEN[name][1]
    log = published(name)
    ranges = vote_ranges(log, n=N, sigma=sigma, alpha=alpha)
    certified = ~log.abstained
    for votes in ranges[certified].T:
        radii = mono_radius(clopper_pearson_lower(votes, N, alpha), sigma)
        printed = [text for text, there in zip(log.printed, certified) if there]
        assert [f"{radius:.3}" for radius in radii] == printed


@needs_logs
def test_acr_at_the_stated_alpha():
    # lvm-rs.md 3.1: the radii of the logs at alpha = .01 taken back to .001
    for name, expected in [
        (CIFAR + "noise_0.25/test/sigma_0.25", 0.4232),
        (CIFAR + "noise_0.50/test/sigma_0.50", 0.5332),
        (CIFAR + "noise_1.00/test/sigma_1.00", 0.5389),
        (IMAGENET + "noise_0.25/test/sigma_0.25", 0.4680),
        (IMAGENET + "noise_0.50/test/sigma_0.50", 0.7198),
        (IMAGENET + "noise_1.00/test/sigma_1.00", 0.8643),
    ]:
        log = published(name)
        votes = np.floor(vote_ranges(log, n=N, sigma=sigma_of(name), alpha=0.01).mean(axis=1))
        radii = np.where(log.abstained, 0.0, attainable_radii(N, sigma_of(name), 0.001)[votes.astype(int)])
        assert average_certified_radius(radii, log.correct) == pytest.approx(expected, abs=5e-4)


@needs_logs
def test_cohens_predictions():
    for n, abstained, correct in [(100, 46, 330), (10_000, 5, 345)]:
        log = published(f"cohen2019/predict/imagenet/resnet50/noise_0.25/test/N_{n}")
        assert (len(log.idx), log.abstained.sum(), log.correct.sum()) == (500, abstained, correct)
        assert log.radius is None
        first = zip(log.idx[:3], log.label[:3], log.predict[:3], log.correct[:3])
        assert [tuple(map(int, row)) for row in first] == [(0, 0, 0, 1), (100, 2, 2, 1), (200, 4, 395, 0)]


@needs_logs
@pytest.mark.parametrize("name", salman_logs())
def test_salmans_certificates(name):
    log = published(name)
    sigma = sigma_of(name)
    assert len(log.idx) == (10_000 if "cifar10" in name else 500)
    # all of them are at alpha = .001, and none fits .01
    assert consistent_alphas(log, n=N, sigma=sigma) == (0.001,)
    assert len(unattainable_rows(log, n=N, sigma=sigma, alpha=0.01)) >= 81
    assert float(format(attainable_radii(N, sigma, 0.001)[-1], log.radius_format)) >= log.radius.max()
    ranges = vote_ranges(log, n=N, sigma=sigma, alpha=0.001)
    # more votes, larger radius
    order = np.argsort(log.radius, kind="stable")
    assert np.all(np.diff(ranges[order, 0]) >= 0)


@needs_logs
def test_there_are_22_of_salmans():
    assert len(salman_logs()) == 22


def test_saturated_radii():
    # lvm-rs.md 6.4: votes n, n - 1, ... at sigma = .25
    for alpha, expected in [(0.01, [0.978, 0.955, 0.941, 0.929, 0.920]), (0.001, [0.953, 0.935, 0.922, 0.913, 0.905])]:
        assert attainable_radii(N, 0.25, alpha)[:-6:-1] == pytest.approx(np.array(expected), abs=5e-4)


HEADER = "idx\tlabel\tpredict\tradius\tcorrect\ttime"


def test_a_small_log(tmp_path):
    lines = [
        HEADER,
        "0\t3\t3\t0.378\t1\t0:02:31.238689",
        "20\t7\t-1\t0.0\t0\t15.6",
        "40\t4\t5\t0.341\t0\t1 day, 1:00:00",
    ]
    log = read_published_log(lines)
    assert log.seconds.tolist() == pytest.approx([151.238689, 15.6, 90_000.0])
    assert log.correct.tolist() == [True, False, False]
    assert log.abstained.tolist() == [False, True, False]
    assert (log.radius_format, log.printed) == (".3", ("0.378", "0.0", "0.341"))
    path = tmp_path / "sigma_0.25"
    path.write_text("\r\n".join([*lines, ""]))
    assert read_published_log(path).printed == log.printed
    assert read_published_log(str(path)).idx.tolist() == [0, 20, 40]


def test_every_radius_of_a_simulated_log_is_attainable_and_an_invented_one_is_not():
    rng = np.random.default_rng(0)
    n, sigma, alpha = 1000, 0.5, 0.001
    votes = rng.integers(400, 1001, 200)
    radii = mono_radius(clopper_pearson_lower(votes, n, alpha), sigma)
    for style in (".3", ".4f"):
        rows = [f"{i}\t1\t{1 if r > 0 else -1}\t{format(r, style)}\t{int(r > 0)}\t1.0" for i, r in enumerate(radii)]
        log = read_published_log([HEADER, *rows])
        assert log.radius_format == style
        ranges = vote_ranges(log, n=n, sigma=sigma, alpha=alpha)
        assert np.all((ranges[:, 0] <= votes) & (votes <= ranges[:, 1]))
        assert consistent_alphas(log, n=n, sigma=sigma) == (0.001,)
        invented = read_published_log([HEADER, *rows, f"999\t1\t1\t{format(5.0, style)}\t1\t1.0"])
        assert unattainable_rows(invented, n=n, sigma=sigma, alpha=alpha).tolist() == [200]
        assert consistent_alphas(invented, n=n, sigma=sigma) == ()


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([], "must start with the columns"),
        (["a\tb"], "must start with the columns"),
        ([HEADER], "has no rows"),
        ([HEADER, "0\t3\t3\t0.378"], "Line 2"),
        ([HEADER, "0\t3\t3\tx\t1\t1.0"], "Line 2"),
        ([HEADER, "0\t3\t3\t0.3\t1\t1.0", "1\t3\t4\t0.3\t1\t1.0"], "Line 3 .* correct=1 against its classes"),
        ([HEADER, "0\t3\t3\t0.3\t1\tsoon"], "Line 2"),
    ],
)
def test_broken_logs(lines, message):
    with pytest.raises(ValueError, match=message):
        read_published_log(lines)


def test_predictions_have_no_radii_to_invert():
    log = read_published_log(["idx\tlabel\tpredict\tcorrect\ttime", "0\t3\t3\t1\t1.0"])
    with pytest.raises(ValueError, match="without radii"):
        consistent_alphas(log, n=100, sigma=0.5)
