# SPDX-License-Identifier: Apache-2.0
"""Logs of certification runs that survive a kill at any moment, and from which certificates can be computed again.

`counts.jsonl` is the log: a first line with the settings of the run, then one line an image with its votes.
`certificates.tsv` holds the columns of Cohen et al. 2019 for tools that read those. While a run goes on, each process
appends to a file of its own in `unfinished/`, one synced write an image; a line cut off by a kill is dropped and its
image done again. The finished log lists the images in the order of their index, so that it is the same, but for the
times, for any number of processes and interruptions.
"""

import dataclasses
import errno
import json
import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from hf_lip.models.certificate import write_text_atomically


LOG_NAME, TSV_NAME, PARTS_NAME = "counts.jsonl", "certificates.tsv", "unfinished"
TSV_COLUMNS = ("idx", "label", "predict", "radius", "correct", "time")
FORMAT, FORMAT_VERSION = "hf_lip/certify_log", 1

__all__ = [
    "LOG_NAME",
    "PARTS_NAME",
    "TSV_COLUMNS",
    "TSV_NAME",
    "ImageRecord",
    "PartLog",
    "RunLog",
    "read_log",
    "tsv_text",
]


@dataclasses.dataclass(frozen=True)
class ImageRecord:
    """One image of a run.

    Attributes:
        idx: position in the split of the data set, which keys the noise.
        label: true class, -1 where unknown.
        predict: certified class, -1 on abstention.
        radius: l2, pixels in [0, 1]; None for predictions without a radius.
        correct: predict == label.
        p_lower, p_upper_other, candidate, method: of the decision, None for predictions.
        n: estimation samples used.
        selection_counts, counts: votes; None for soft scores.
        details: further numbers of the procedure.
        image: first 16 hex digits of the sha256 of the pixels.
        time: wall seconds.
    """

    idx: int
    label: int
    predict: int
    radius: float | None
    correct: bool
    p_lower: float | None
    p_upper_other: float | None
    candidate: int | None
    method: str
    n: int
    selection_counts: list[int] | None
    counts: list[int] | None
    details: dict[str, Any]
    image: str
    time: float

    @classmethod
    def from_json(cls, line: str) -> "ImageRecord":
        """A `ValueError` unless the line holds exactly the fields."""
        content = json.loads(line)
        names = {field.name for field in dataclasses.fields(cls)}
        if not isinstance(content, dict) or set(content) != names:
            raise ValueError(f"not a record with the fields {', '.join(sorted(names))}")
        return cls(**content)

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), allow_nan=False)

    def result(self) -> dict[str, Any]:
        """All fields but the time: equal for one image in all runs with the same settings."""
        content = dataclasses.asdict(self)
        del content["time"]
        return content


def read_log(path: str | os.PathLike) -> tuple[dict[str, Any], list[ImageRecord]]:
    """Settings and records of a log file; a last line that was cut off is left out.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not such a log, or a broken line that is not the last.
    """
    header, records = _parse(Path(path))
    if header is None:
        raise ValueError(f"{path} holds no whole line: the run was killed before its first image.")
    return header, records


def tsv_text(records: Iterable[ImageRecord]) -> str:
    """Cohen's columns, with all digits of the radius: printing fewer could round it up. No radius column for
    predictions, as in Cohen's logs of PREDICT."""
    records = list(records)
    columns = [name for name in TSV_COLUMNS if name != "radius" or any(r.radius is not None for r in records)]
    lines = ["\t".join(columns)]
    for record in records:
        values = {**record.result(), "radius": repr(record.radius), "time": f"{record.time:.6f}"}
        values["correct"] = int(record.correct)
        lines.append("\t".join(str(values[name]) for name in columns))
    return "\n".join(lines) + "\n"


class PartLog:
    """One process's records of an unfinished run. Every append is on the disk when it returns."""

    def __init__(self, folder: Path, settings: Mapping[str, Any], rank: int) -> None:
        self.path = folder / PARTS_NAME / f"rank-{rank:05d}.jsonl"
        self._lock = _locked(self.path.with_suffix(".lock"), folder)
        self._file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
        self._size = 0
        self._write(_header(settings))

    def __enter__(self) -> "PartLog":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def append(self, record: ImageRecord) -> None:
        """Add one image.

        Raises:
            OSError: the disk is full or broken. The records before this one are kept.
        """
        self._write(record.to_json())

    def close(self) -> None:
        os.close(self._file)
        self._lock.release()

    def _write(self, line: str) -> None:
        data = (line + "\n").encode()
        try:
            written = 0
            while written < len(data):
                written += os.pwrite(self._file, data[written:], self._size + written)
            os.fsync(self._file)
        except OSError as error:
            # half a line would be dropped when the log is read; gone now, it takes no space either
            os.ftruncate(self._file, self._size)
            full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
            reason = "there is no space left" if full else "writing failed"
            raise OSError(
                error.errno,
                f"{reason} ({error.strerror}); all images before this one are kept, take the run up again once it is "
                "mended",
                str(self.path),
            ) from error
        self._size += len(data)


class RunLog:
    """The log of one run in a folder, held by one process at a time; others append through `PartLog`.

    Opening it collects what earlier, interrupted runs with the same settings have left in `records`.

    Args:
        folder: made if need be.
        settings: everything that decides the records, ready for JSON.
        resume: go on with the records that are there; else there must be none.
        overwrite: delete the records that are there.

    Raises:
        RuntimeError: another run writes to the folder.
        ValueError: other settings, records without `resume`, a file that is no log.
        OSError: the folder can not be written to.
    """

    def __init__(
        self, folder: str | os.PathLike, settings: Mapping[str, Any], *, resume: bool = False, overwrite: bool = False
    ) -> None:
        self.folder, self.settings = Path(folder), json.loads(json.dumps(settings, allow_nan=False))
        parts = self.folder / PARTS_NAME
        parts.mkdir(parents=True, exist_ok=True)
        self._lock = _locked(parts / "run.lock", self.folder)
        try:
            # what a kill has left of a file that was being written
            for name in (LOG_NAME, TSV_NAME):
                for staging in self.folder.glob(f".{name}.*"):
                    staging.unlink()
            if overwrite:
                for path in self._files():
                    path.unlink()
                (self.folder / TSV_NAME).unlink(missing_ok=True)
            elif not resume and self._files():
                raise ValueError(
                    f"{self.folder} holds the log of a run: resume it, overwrite it, or choose another folder."
                )
            self.records = self._collect()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        self._lock.release()

    def finish(self, indices: Iterable[int]) -> list[ImageRecord]:
        """Write the finished log and its TSV, atomically, and remove the parts.

        Raises:
            RuntimeError: an image of `indices` has no record.
        """
        records = self._collect()
        missing = sorted(set(indices) - set(records))
        if missing:
            raise RuntimeError(f"{len(missing)} images have no record, the first is {missing[0]}: resume the run.")
        ordered = [records[idx] for idx in sorted(records)]
        write_text_atomically(self.folder / TSV_NAME, tsv_text(ordered))
        shutil.rmtree(self.folder / PARTS_NAME)
        return ordered

    def _files(self) -> list[Path]:
        paths = [self.folder / LOG_NAME, *sorted((self.folder / PARTS_NAME).glob("rank-*.jsonl"))]
        return [path for path in paths if path.exists()]

    def _collect(self) -> dict[int, ImageRecord]:
        """Records of the log and all parts by index, moved into the log."""
        records: dict[int, ImageRecord] = {}
        parts = []
        for path in self._files():
            if path.name != LOG_NAME:
                # a process of a killed launcher may still be at work
                _locked(path.with_suffix(".lock"), self.folder).release()
                parts.append(path)
            header, found = _parse(path)
            if header is not None:
                _require_same(header, self.settings, path)
            for record in found:
                known = records.setdefault(record.idx, record)
                if known.result() != record.result():
                    raise ValueError(
                        f"{path} has another result for image {record.idx} than {self.folder}: the noise or the model "
                        "was not the same. Start a new log."
                    )
        lines = [_header(self.settings), *(records[idx].to_json() for idx in sorted(records))]
        write_text_atomically(self.folder / LOG_NAME, "\n".join(lines) + "\n")
        for path in parts:
            path.unlink()
        return records


def _header(settings: Mapping[str, Any]) -> str:
    return json.dumps({"format": FORMAT, "format_version": FORMAT_VERSION, "settings": settings}, allow_nan=False)


def _parse(path: Path) -> tuple[dict[str, Any] | None, list[ImageRecord]]:
    """Settings (None if not even the first line is whole) and records; what follows the last line end is left out."""
    data = path.read_bytes()
    lines = data[: data.rfind(b"\n") + 1].decode(errors="replace").splitlines()
    if not lines:
        return None, []
    try:
        first = json.loads(lines[0])
        known = first["format"] == FORMAT
    except (ValueError, TypeError, KeyError):
        known = False
    if not known:
        raise ValueError(f"{path} is not a log of hf_lip: its first line does not say {FORMAT!r}.")
    if first.get("format_version") != FORMAT_VERSION:
        raise ValueError(
            f"{path} has format_version {first.get('format_version')!r}, this version of hf_lip reads "
            f"{FORMAT_VERSION}."
        )
    records = []
    for number, line in enumerate(lines[1:], start=2):
        try:
            records.append(ImageRecord.from_json(line))
        except (ValueError, TypeError) as error:
            raise ValueError(
                f"Line {number} of {path} is broken ({error}): restore the file or start anew."
            ) from error
    return first["settings"], records


def _require_same(found: Mapping[str, Any], wanted: Mapping[str, Any], path: Path) -> None:
    names = sorted(name for name in {*found, *wanted} if found.get(name) != wanted.get(name))
    if names:
        differences = "; ".join(f"{name}: {found.get(name)!r} there, {wanted.get(name)!r} now" for name in names)
        raise ValueError(f"{path} was written with other settings ({differences}): use the same, or a new folder.")


def _locked(path: Path, folder: Path) -> FileLock:
    lock = FileLock(path)
    try:
        lock.acquire(blocking=False)
    except Timeout as error:
        raise RuntimeError(
            f"Another run writes to {folder}: wait until it has ended, or choose another folder."
        ) from error
    return lock
