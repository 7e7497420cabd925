# SPDX-License-Identifier: Apache-2.0
import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hf_lip.smoothing.logs import LOG_NAME, PARTS_NAME, TSV_NAME, ImageRecord, PartLog, RunLog, read_log, tsv_text


ROOT = Path(__file__).resolve().parents[2]
SETTINGS = {"model": "m", "method": "mono", "sigma": 0.25, "score_map": None, "indices": [0, 3, 6]}


def record(idx, seconds=0.5, **changes):
    fields = {
        "idx": idx,
        "label": 1,
        "predict": 1,
        "radius": 0.1 + 0.2,
        "correct": True,
        "p_lower": 0.9,
        "p_upper_other": 0.1,
        "candidate": 1,
        "method": "mono",
        "n": 100,
        "selection_counts": [1, 9],
        "counts": [10, 90],
        "details": {"bounds": 1},
        "image": "0123456789abcdef",
        "time": seconds,
    }
    return ImageRecord(**{**fields, **changes})


def write(folder, indices, rank=0, settings=SETTINGS, resume=False, **changes):
    with RunLog(folder, settings, resume=resume), PartLog(folder, settings, rank) as part:
        for idx in indices:
            part.append(record(idx, **changes))


def part_of(folder, rank=0):
    return folder / PARTS_NAME / f"rank-{rank:05d}.jsonl"


# a run


def test_a_finished_run(tmp_path):
    with RunLog(tmp_path, SETTINGS) as log:
        assert log.records == {}
        with PartLog(tmp_path, SETTINGS, 0) as part:
            for idx in (6, 0, 3):
                part.append(record(idx))
        assert [entry.idx for entry in log.finish([0, 3, 6])] == [0, 3, 6]
    assert sorted(path.name for path in tmp_path.iterdir()) == [TSV_NAME, LOG_NAME]
    settings, records = read_log(tmp_path / LOG_NAME)
    assert settings == SETTINGS
    assert records == [record(0), record(3), record(6)]
    lines = (tmp_path / TSV_NAME).read_text().splitlines()
    assert lines[0].split("\t") == ["idx", "label", "predict", "radius", "correct", "time"]
    # all digits of the radius
    assert lines[2].split("\t") == ["3", "1", "1", "0.30000000000000004", "1", "0.500000"]


def test_processes_and_order_do_not_change_the_log(tmp_path):
    write(tmp_path / "one", [0, 3, 6])
    with RunLog(tmp_path / "two", SETTINGS) as log:
        for rank, indices in ((0, [6]), (1, [3, 0])):
            with PartLog(tmp_path / "two", SETTINGS, rank) as part:
                for idx in indices:
                    part.append(record(idx))
        log.finish([0, 3, 6])
    with RunLog(tmp_path / "one", SETTINGS, resume=True) as log:
        log.finish([0, 3, 6])
    for name in (LOG_NAME, TSV_NAME):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_a_run_is_not_finished_while_images_are_missing(tmp_path):
    with RunLog(tmp_path, SETTINGS) as log:
        with PartLog(tmp_path, SETTINGS, 0) as part:
            part.append(record(3))
        with pytest.raises(RuntimeError, match="2 images have no record, the first is 0: resume"):
            log.finish([0, 3, 6])
    assert [entry.idx for entry in read_log(tmp_path / LOG_NAME)[1]] == [3]


def test_predictions_have_no_radius_column():
    text = tsv_text([record(0, radius=None, p_lower=None), record(1, predict=-1, correct=False, radius=None)])
    assert text.splitlines()[0] == "idx\tlabel\tpredict\tcorrect\ttime"
    assert text.splitlines()[2] == "1\t1\t-1\t0\t0.500000"


# interruptions


@pytest.mark.parametrize("cut", [1, 30, 200])
def test_a_torn_last_line_is_dropped_and_its_image_done_again(tmp_path, cut):
    write(tmp_path, [0, 3])
    with open(part_of(tmp_path), "ab") as file:
        file.write(record(6).to_json().encode()[:cut])
    with RunLog(tmp_path, SETTINGS, resume=True) as log:
        assert sorted(log.records) == [0, 3]
        with PartLog(tmp_path, SETTINGS, 0) as part:
            part.append(record(6))
        assert len(log.finish([0, 3, 6])) == 3


def test_a_torn_first_line_is_an_empty_log(tmp_path):
    write(tmp_path, [])
    part_of(tmp_path).write_bytes(part_of(tmp_path).read_bytes()[:20])
    with pytest.raises(ValueError, match="killed before its first image"):
        read_log(part_of(tmp_path))
    with RunLog(tmp_path, SETTINGS, resume=True) as log:
        assert log.records == {}


def test_a_kill_between_collecting_and_deleting_leaves_no_doubles(tmp_path):
    write(tmp_path, [0, 3])
    saved = part_of(tmp_path).read_bytes()
    with RunLog(tmp_path, SETTINGS, resume=True):
        assert not part_of(tmp_path).exists()
    part_of(tmp_path).write_bytes(saved)
    with RunLog(tmp_path, SETTINGS, resume=True) as log:
        assert sorted(log.records) == [0, 3]


def test_what_a_kill_left_of_a_file_is_cleared_away(tmp_path):
    write(tmp_path, [0])
    (tmp_path / f".{LOG_NAME}.123").write_text("half")
    with RunLog(tmp_path, SETTINGS, resume=True) as log:
        log.finish([0])
    assert sorted(path.name for path in tmp_path.iterdir()) == [TSV_NAME, LOG_NAME]


def test_resuming_a_finished_run_changes_nothing_but_what_is_missing(tmp_path):
    with RunLog(tmp_path, SETTINGS) as log:
        with PartLog(tmp_path, SETTINGS, 0) as part:
            part.append(record(0))
        log.finish([0])
    before = (tmp_path / LOG_NAME).read_bytes()
    with RunLog(tmp_path, SETTINGS, resume=True) as log:
        assert sorted(log.records) == [0]
        log.finish([0])
    assert (tmp_path / LOG_NAME).read_bytes() == before
    assert not (tmp_path / PARTS_NAME).exists()


WRITER = """
import sys
from pathlib import Path
sys.path.insert(0, {tests!r})
from test_logs import SETTINGS, record
from hf_lip.smoothing.logs import PartLog, RunLog
folder = Path({folder!r})
with RunLog(folder, SETTINGS, resume=True) as log, PartLog(folder, SETTINGS, 0) as part:
    print("open", flush=True)
    idx = max(log.records, default=-1)
    while True:
        idx += 1
        part.append(record(idx))
"""


def start_writer(folder, **options):
    script = WRITER.format(tests=str(ROOT / "tests" / "smoothing"), folder=str(folder))
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-c", script],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


def test_kill_9_loses_and_repeats_nothing(tmp_path):
    writer = start_writer(tmp_path)
    try:
        assert writer.stdout.readline() == "open\n", writer.stderr.read()
        deadline = time.monotonic() + 60
        while part_of(tmp_path).stat().st_size < 3000:
            assert time.monotonic() < deadline
            time.sleep(0.001)
        # a second run is refused while the first writes
        with pytest.raises(RuntimeError, match="Another run writes to"):
            RunLog(tmp_path, SETTINGS, resume=True)
    finally:
        writer.send_signal(signal.SIGKILL)
        writer.communicate()
    with RunLog(tmp_path, SETTINGS, resume=True) as log:
        assert len(log.records) > 5
        assert sorted(log.records) == list(range(len(log.records)))


def test_a_full_disk_is_a_clear_error_and_loses_nothing(tmp_path):
    resource = pytest.importorskip("resource")
    limit = 4000
    writer = start_writer(tmp_path, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)))
    _, errors = writer.communicate(timeout=120)
    assert writer.returncode == 1
    assert "there is no space left" in errors
    assert "all images before this one are kept" in errors
    # no half line is left behind
    assert part_of(tmp_path).read_bytes().endswith(b"}\n")
    assert limit - 400 < part_of(tmp_path).stat().st_size <= limit
    with RunLog(tmp_path, SETTINGS, resume=True) as log:
        assert len(log.records) > 5
        with PartLog(tmp_path, SETTINGS, 0) as part:
            part.append(record(len(log.records)))
        assert len(log.finish([])) == len(log.records) + 1


# what is refused


def test_a_process_that_outlived_its_run_keeps_others_out(tmp_path):
    log = RunLog(tmp_path, SETTINGS)
    part = PartLog(tmp_path, SETTINGS, 1)
    log.close()
    with pytest.raises(RuntimeError, match="Another run writes to"):
        RunLog(tmp_path, SETTINGS, resume=True)
    part.append(record(0))
    part.close()
    with RunLog(tmp_path, SETTINGS, resume=True) as log:
        assert sorted(log.records) == [0]


def test_two_processes_never_share_a_part(tmp_path):
    with PartLogs(tmp_path), pytest.raises(RuntimeError, match="Another run writes to"):
        PartLog(tmp_path, SETTINGS, 0)
    with pytest.raises(FileExistsError):
        PartLog(tmp_path, SETTINGS, 0)


class PartLogs:
    """One open part in a folder without a run."""

    def __init__(self, folder):
        (folder / PARTS_NAME).mkdir(parents=True)
        self.part = PartLog(folder, SETTINGS, 0)

    def __enter__(self):
        return self.part

    def __exit__(self, *exception):
        self.part.close()


def test_an_old_log_is_neither_overwritten_nor_continued_by_accident(tmp_path):
    write(tmp_path, [0])
    with pytest.raises(ValueError, match="holds the log of a run: resume it, overwrite it"):
        RunLog(tmp_path, SETTINGS)
    with pytest.raises(ValueError, match=r"other settings \(sigma: 0.25 there, 0.5 now\)"):
        RunLog(tmp_path, {**SETTINGS, "sigma": 0.5}, resume=True)
    assert [entry.idx for entry in read_log(part_of(tmp_path))[1]] == [0]
    with RunLog(tmp_path, {**SETTINGS, "sigma": 0.5}, overwrite=True) as log:
        assert log.records == {}


def test_results_that_contradict_are_refused(tmp_path):
    write(tmp_path, [0, 3])
    with RunLog(tmp_path, SETTINGS, resume=True), PartLog(tmp_path, SETTINGS, 0) as part:
        part.append(record(3, counts=[11, 89]))
    with pytest.raises(ValueError, match="another result for image 3"):
        RunLog(tmp_path, SETTINGS, resume=True)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("idx\tlabel\n1\t2\n", "is not a log of hf_lip"),
        ("[1]\n", "is not a log of hf_lip"),
        ('{"format": "hf_lip/certify_log", "format_version": 9, "settings": {}}\n', "format_version 9"),
        (
            '{"format": "hf_lip/certify_log", "format_version": 1, "settings": {}}\n{"idx": 1}\n',
            "Line 2 of .* is broken",
        ),
        ('{"format": "hf_lip/certify_log", "format_version": 1, "settings": {}}\n{"idx"\n', "Line 2 of .* is broken"),
    ],
)
def test_files_that_are_no_logs(tmp_path, text, message):
    (tmp_path / LOG_NAME).write_text(text)
    with pytest.raises(ValueError, match=message):
        read_log(tmp_path / LOG_NAME)
    with pytest.raises(ValueError, match=message):
        RunLog(tmp_path, SETTINGS, resume=True)
    assert (tmp_path / LOG_NAME).read_text() == text


def test_nan_never_enters_a_log(tmp_path):
    with pytest.raises(ValueError, match="not JSON compliant"):
        write(tmp_path, [0], radius=float("nan"))


def test_missing_log(tmp_path):
    with pytest.raises(FileNotFoundError):
        read_log(tmp_path / LOG_NAME)


def test_records_round_trip():
    assert ImageRecord.from_json(record(3).to_json()) == record(3)
    assert record(3, seconds=1.0).result() == record(3, seconds=2.0).result()
    assert set(json.loads(record(3).to_json())) == {field.name for field in dataclasses.fields(ImageRecord)}
