# SPDX-License-Identifier: Apache-2.0
"""Smoothing certificates of a data set: logged, resumable, shared among processes."""

import hashlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hf_lip.pipelines.certify import CertifyPipeline
from hf_lip.pipelines.settings import CertifySettings
from hf_lip.pipelines.smoothing_runner import SmoothingRunner
from hf_lip.smoothing.certify import SmoothingResult
from hf_lip.smoothing.logs import LOG_NAME, ImageRecord, PartLog, RunLog, read_log


__all__ = ["DatasetRun", "Processes"]


@dataclass(frozen=True)
class Processes:
    """This process among those that share a run; `wait` returns when all have called it."""

    rank: int = 0
    count: int = 1
    wait: Callable[[], None] = lambda: None


class DatasetRun:
    """One run over images of a data set.

    The images are handed out in groups that share selection batches, the same groups for any number of processes, so
    that a finished log is the same, but for the times, however the run was carried out.

    Args:
        pipe: model, image processor and device.
        settings: with a method of smoothing.
        method: as resolved by the pipeline.
        dataset: rows with an `image`.
        labels: (N,) true classes of all rows of `dataset`.
        indices: rows to certify, which also key the noise.
        source: what `dataset` is, for the log's settings.
        batch_size: noisy copies a forward pass; by default the pipeline's.
    """

    def __init__(
        self,
        pipe: CertifyPipeline,
        settings: CertifySettings,
        method: str,
        dataset: Any,
        labels: Sequence[int],
        indices: Sequence[int],
        *,
        source: dict[str, Any],
        batch_size: int | None = None,
    ) -> None:
        self.pipe, self.settings, self.method = pipe, settings, method
        self.dataset, self.labels, self.indices = dataset, labels, list(indices)
        self.batch_size = pipe.noise_batch if batch_size is None else batch_size
        self.source = source
        self.header: dict[str, Any] = {}
        if not self.indices:
            raise ValueError("There are no images to certify: choose other `indices`.")

    def run(
        self,
        folder: str | Path,
        *,
        resume: bool = False,
        overwrite: bool = False,
        processes: Processes | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> list[ImageRecord] | None:
        """Certify what is not yet in the folder's log.

        Args:
            folder: of the log; see [`hf_lip.smoothing.logs.RunLog`].
            resume, overwrite: as there.
            processes: the processes that share the run.
            progress: called with the numbers of noisy copies done and to do in this process, at most.

        Returns:
            All records in the order of their index; None in all processes but the first.

        Raises:
            RuntimeError: another run writes to the folder.
            ValueError: other settings than the log's, an image or model that can not be certified.
            OSError: the log can not be written. What was certified before is kept.
        """
        processes = processes or Processes()
        with self.pipe.runner(self.settings, self.method, batch_size=self.batch_size) as runner:
            header = self.header = self._header(runner)
            if processes.rank:
                # the first process puts the log in order
                processes.wait()
                self._certify(runner, Path(folder), header, processes, progress)
                processes.wait()
                return None
            with RunLog(folder, header, resume=resume, overwrite=overwrite) as log:
                processes.wait()
                self._certify(runner, Path(folder), header, processes, progress)
                processes.wait()
                return log.finish(self.indices)

    def _certify(
        self,
        runner: SmoothingRunner,
        folder: Path,
        header: dict[str, Any],
        processes: Processes,
        progress: Callable[[int, int], None] | None,
    ) -> None:
        done = {record.idx for record in read_log(folder / LOG_NAME)[1]}
        groups = list(self._groups(runner.group_size, processes, done))
        total = sum(len(group) for group in groups) * runner.copies_per_image
        finished = 0

        def report(count: int) -> None:
            nonlocal finished
            finished += count
            if progress is not None:
                progress(finished, total)

        report(0)
        runner.on_progress = report
        with PartLog(folder, header, processes.rank) as log:
            for group in groups:
                start = time.perf_counter()
                images = [(place, index, self._pixels(index)) for place, index in group]
                hashes = {index: _digest(pixels) for _, index, pixels in images}
                for index, result in runner.run(images):
                    now = time.perf_counter()
                    log.append(self._record(index, result, hashes[index], now - start))
                    start = now

    def _groups(self, size: int, processes: Processes, done: set[int]) -> Iterator[list[tuple[int, int]]]:
        """(place in the group, index) of this process's images that are not done."""
        for number, start in enumerate(range(0, len(self.indices), size)):
            group = list(enumerate(self.indices[start : start + size]))
            open_ones = [(place, index) for place, index in group if index not in done]
            if number % processes.count == processes.rank and open_ones:
                yield open_ones

    def _pixels(self, index: int) -> torch.Tensor:
        try:
            pixels: torch.Tensor = self.pipe.preprocess(self.dataset[index], self.method, index)["pixel_values"]
        except (TypeError, ValueError) as error:
            raise type(error)(f"Image {index}: {error}") from error
        return pixels

    def _record(self, index: int, result: SmoothingResult, digest: str, seconds: float) -> ImageRecord:
        label = int(self.labels[index])
        return ImageRecord(
            idx=index,
            label=label,
            predict=result.predict,
            radius=result.radius,
            correct=result.predict == label,
            p_lower=result.p_lower,
            p_upper_other=result.p_upper_other,
            candidate=result.candidate,
            method=result.method,
            n=result.n,
            selection_counts=None if result.selection_counts is None else list(result.selection_counts),
            counts=None if result.counts is None else list(result.counts),
            details=result.details,
            image=digest,
            time=seconds,
        )

    def _header(self, runner: SmoothingRunner) -> dict[str, Any]:
        """Everything that decides the records."""
        runner.warm_up(self._pixels(self.indices[0]))
        labels = np.asarray([self.labels[index] for index in self.indices], dtype=np.int64)
        smoothing = runner.smoothing
        return {
            **self.source,
            "weights_sha256": runner.base.weights_sha256,
            "indices": _index_text(self.indices),
            "num_images": len(self.indices),
            "labels_sha256": hashlib.sha256(labels.tobytes()).hexdigest(),
            "mode": self.settings.mode,
            "method": self.method,
            "sigma": smoothing.sigma,
            "n0": smoothing.n0,
            "n": smoothing.n,
            "alpha": smoothing.alpha,
            "seed": smoothing.seed,
            "budget": smoothing.budget,
            "rtol": smoothing.rtol,
            "target_radius": smoothing.target_radius,
            "score_map": str(smoothing.score_map),
            "randomized": smoothing.randomized,
            "lipschitz": smoothing.lipschitz,
            "noise": runner.noise.name,
            "base": runner.base.description,
            "batch_size": self.batch_size,
            "num_classes": runner.sampler.num_classes,
            "device": runner.sampler.device.type,
            "torch": torch.__version__,
        }


def _digest(pixels: torch.Tensor) -> str:
    return hashlib.sha256(pixels.numpy().tobytes()).hexdigest()[:16]


def _index_text(indices: Sequence[int]) -> str:
    """start:stop:step where the indices are such a range, else a hash."""
    step = indices[1] - indices[0] if len(indices) > 1 else 1
    if step > 0 and list(indices) == list(range(indices[0], indices[-1] + 1, step)):
        return f"{indices[0]}:{indices[-1] + 1}:{step}"
    return "sha256 " + hashlib.sha256(np.asarray(indices, dtype=np.int64).tobytes()).hexdigest()
