# SPDX-License-Identifier: Apache-2.0
"""Runs a base classifier on noisy copies: batches of one shape, noise drawn ahead by threads, votes counted in place.

Every batch has the same number of rows, and a draw's row follows from its number alone: draw d of a phase lies in row
(d + offset) % batch_size, where the offset is 0 for the estimation samples. Short batches are filled up with rows that
are ignored. A draw thus meets the same kernels in the same place however the images are spread over processes and
wherever a run was taken up again, and gives the same vote. Another batch size, device or number of threads of torch
can change the rounding of a model's kernels, and with it the vote of a draw whose two largest logits are that close.
"""

import math
import os
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hf_lip.ops.simplex import ScoreMap
from hf_lip.smoothing.noise import Noise
from hf_lip.smoothing.samples import Moments


SELECTION, ESTIMATION, CALIBRATION = 0, 1, 2
# rows that one thread fills at a time
_ROWS_PER_TASK = 8
# values of a batch up to which workers run one each: activations are a few dozen times as many
_LARGEST_WORKER_BATCH = 1 << 21

__all__ = [
    "CALIBRATION",
    "ESTIMATION",
    "SELECTION",
    "Rows",
    "Sampler",
    "ScoreSums",
    "Votes",
    "draws_of",
    "packed_draws",
]


Tally = TypeVar("Tally", "Votes", "ScoreSums")


@dataclass(frozen=True)
class Rows:
    """Neighbouring rows of a batch: draws first_draw, first_draw + 1, ... of one image and phase.

    `image` is what the noise's `prepare` returned, `index` the image's position in its data set, by which its noise is
    keyed; `start` is the first row.
    """

    image: NDArray[Any]
    index: int
    phase: int
    first_draw: int
    num_draws: int
    start: int = 0

    @property
    def place(self) -> slice:
        return slice(self.start, self.start + self.num_draws)


def draws_of(
    image: NDArray[Any],
    index: int,
    phase: int,
    num_draws: int,
    batch_size: int,
    *,
    start: int = 0,
    stop: int | None = None,
) -> Iterator[list[Rows]]:
    """Batches with the draws of one image, from the batch that begins with draw `start` to that with `stop` - 1."""
    for first in range(start, num_draws if stop is None else stop, batch_size):
        yield [Rows(image, index, phase, first, min(batch_size, num_draws - first))]


def packed_draws(
    images: Sequence[tuple[int, NDArray[Any], int]], phase: int, num_draws: int, batch_size: int
) -> Iterator[list[Rows]]:
    """Batches with `num_draws` draws of each of several images, one image behind the other without a gap.

    Args:
        images: (place, image, index): the place, 0, 1, ... in a fixed group of images, decides the rows; images of
            the group may be left out, and leave their rows empty.
    """
    batches: dict[int, list[Rows]] = {}
    for place, image, index in images:
        first = 0
        while first < num_draws:
            batch, start = divmod(place * num_draws + first, batch_size)
            count = min(num_draws - first, batch_size - start)
            batches.setdefault(batch, []).append(Rows(image, index, phase, first, count, start))
            first += count
    return (batches[batch] for batch in sorted(batches))


class Votes:
    """Votes of the image `index`, counted where the logits are; reading them is the only synchronisation."""

    def __init__(self, index: int, num_classes: int, device: torch.device) -> None:
        self.index = index
        # the last place counts rows with NaN or infinite logits
        self._state = torch.zeros(num_classes + 1, dtype=torch.int64, device=device)

    def add(self, logits: Tensor) -> None:
        """Count the largest of each row of (k, num_classes); ties go to the first."""
        votes = logits.argmax(dim=1)
        self._state[:-1].scatter_add_(0, votes, torch.ones_like(votes))
        self._state[-1] += _broken_rows(logits)

    def counts(self) -> NDArray[np.int64]:
        """(num_classes,) so far; a `ValueError` if a row was not finite."""
        state = self._state.cpu().numpy()
        _require_finite(int(state[-1]), self.index)
        return state[:-1].copy()


class ScoreSums:
    """Moments of the scores of the image `index`, float64, kept where the logits are (Chan, Golub, LeVeque 1983)."""

    def __init__(self, index: int, score_map: ScoreMap) -> None:
        self.index, self.score_map, self.n = index, score_map, 0
        self._sums = self._squares = torch.empty(0)

    def add(self, logits: Tensor) -> Tensor:
        """Add the scores (k, num_classes) of logits, and return them; a `ValueError` for NaN or infinite ones."""
        _require_finite(int(_broken_rows(logits)), self.index)
        scores = self.score_map.apply(logits)
        sums = scores.sum(dim=0)
        squares = ((scores - sums / len(scores)) ** 2).sum(dim=0)
        if self.n:
            gap = self._sums / self.n - sums / len(scores)
            squares = squares + self._squares + gap * gap * (self.n * len(scores) / (self.n + len(scores)))
            sums = sums + self._sums
        self._sums, self._squares, self.n = sums, squares, self.n + len(scores)
        return scores

    def moments(self) -> Moments:
        """Of all rows so far, of which there must be one."""
        return Moments(self.n, self._sums.cpu().numpy(), self._squares.cpu().numpy())


def _broken_rows(logits: Tensor) -> Tensor:
    return (~torch.isfinite(logits)).any(dim=1).sum()


def _require_finite(num_broken: int, index: int) -> None:
    if num_broken:
        raise ValueError(
            f"Image {index}: the base classifier returned NaN or infinite logits for {num_broken} noisy copies, whose "
            "votes mean nothing: check its weights, or use another `dtype` (float16 overflows at 65,504)."
        )


@dataclass
class _Slot:
    """A batch in host memory, pinned where it goes to a GPU."""

    tensor: Tensor
    array: NDArray[np.float32]
    # when the copy to the device will have been read from here
    copied: Any = None


@dataclass
class _Started:
    """A batch under way: its noise is being drawn, or, in a worker, all of it is done there."""

    rows: list[Rows]
    slot: _Slot
    futures: list[Future]
    in_worker: bool


class Sampler:
    """Feeds a base classifier with noisy batches of one size, drawn by threads while it runs.

    Memory: two batches, or one more than there are workers, whatever the number of samples. Use as a context manager,
    or `close()` it: it owns threads.

    Args:
        base_classifier: maps noisy images (batch_size, *image.shape), float32 on `device`, to logits
            (batch_size, num_classes); deterministic, each row for itself. It may overwrite its argument.
        noise: the noise of the run.
        num_classes: number of logits.
        batch_size: rows of every batch.
        device: where the base classifier wants its batches.
        threads: that draw noise; by default as many as torch computes with on a CPU, at most 16 for a GPU.
        workers: batches that run at the same time on a CPU, each on one thread of torch. Small images gain by it, as
            their layers are too small to be shared among threads; larger ones run one batch at a time on all threads.
            The base classifier is then called from several threads, after a first batch alone.
        progress: called with the number of noisy copies done since the last call.

    Raises:
        ValueError: a number below 1.
    """

    def __init__(
        self,
        base_classifier: Callable[[Tensor], Tensor],
        noise: Noise,
        *,
        num_classes: int,
        batch_size: int,
        device: torch.device | str = "cpu",
        threads: int | None = None,
        workers: int = 1,
        progress: Callable[[int], None] | None = None,
    ) -> None:
        self.device = torch.device(device)
        if threads is None:
            threads = torch.get_num_threads() if self.device.type == "cpu" else min(16, os.cpu_count() or 1)
        numbers = {"batch_size": batch_size, "num_classes": num_classes, "threads": threads, "workers": workers}
        for name, value in numbers.items():
            if value < 1:
                raise ValueError(f"`{name}` must be at least 1, got {value}.")
        self.base_classifier, self.noise, self.progress = base_classifier, noise, progress
        self.num_classes, self.batch_size = num_classes, batch_size
        # threads of torch can be limited for one thread of Python with OpenMP only
        self.workers = workers if self.device.type == "cpu" and torch.backends.openmp.is_available() else 1
        self._pool = ThreadPoolExecutor(max(threads, self.workers), thread_name_prefix="noise")
        self._free: list[_Slot] = []
        self._warm = False

    def __enter__(self) -> "Sampler":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Let the threads go."""
        self._pool.shutdown()
        self._free = []

    def run(self, batches: Iterable[list[Rows]]) -> Generator[tuple[list[Rows], Tensor]]:
        """Pairs of a batch's rows and its logits (batch_size, num_classes), at least float32, on the device.

        The noise of a batch is drawn while the one before it runs; stopping early wastes what was started.

        Raises:
            ValueError: logits of a wrong shape.
        """
        source = iter(batches)
        started: deque[_Started] = deque()
        torch_threads = torch.get_num_threads()
        try:
            while True:
                while len(started) < self._depth and (rows := next(source, None)) is not None:
                    started.append(self._start(rows))
                if not started:
                    return
                batch = started.popleft()
                results = [future.result() for future in batch.futures]
                logits = results[0] if batch.in_worker else self._logits(batch.slot)
                self._free.append(batch.slot)
                self._warm = True
                if self.progress is not None:
                    self.progress(sum(part.num_draws for part in batch.rows))
                yield batch.rows, logits
        finally:
            # a slot may be filled again only when no thread writes to it any more
            wait([future for batch in started for future in batch.futures])
            self._free += [batch.slot for batch in started]
            if self._depth > 2:
                torch.set_num_threads(torch_threads)

    def tally(self, batches: Iterable[list[Rows]], make: Callable[[int], Tally]) -> dict[int, Tally]:
        """`make(index)` for the index of every image, with the logits of all its rows added."""
        tallies: dict[int, Tally] = {}
        for rows, logits in self.run(batches):
            for part in rows:
                if part.index not in tallies:
                    tallies[part.index] = make(part.index)
                tallies[part.index].add(logits[part.place])
        return tallies

    def votes(self, batches: Iterable[list[Rows]]) -> dict[int, NDArray[np.int64]]:
        """Votes (num_classes,) by the index of the image."""
        tallies = self.tally(batches, self.new_votes)
        return {index: tally.counts() for index, tally in tallies.items()}

    def new_votes(self, index: int) -> Votes:
        """No votes yet for an image."""
        return Votes(index, self.num_classes, self.device)

    @property
    def _depth(self) -> int:
        """Batches under way; the first one, alone, may set the base classifier up."""
        return 1 + self.workers if self._warm else 1

    def _start(self, rows: list[Rows]) -> _Started:
        shape = rows[0].image.shape
        slot = self._free_slot(shape)
        if self._warm and self.workers > 1 and self.batch_size * math.prod(shape) <= _LARGEST_WORKER_BATCH:
            return _Started(rows, slot, [self._pool.submit(self._work, rows, slot)], in_worker=True)
        futures = []
        for part in rows:
            for first in range(0, part.num_draws, _ROWS_PER_TASK):
                count = min(_ROWS_PER_TASK, part.num_draws - first)
                futures.append(self._pool.submit(self._fill, slot, part, first, count))
        return _Started(rows, slot, futures, in_worker=False)

    def _free_slot(self, shape: tuple[int, ...]) -> _Slot:
        self._free = [slot for slot in self._free if slot.array.shape[1:] == shape]
        if not self._free:
            tensor = torch.zeros(self.batch_size, *shape, pin_memory=self.device.type == "cuda")
            return _Slot(tensor, tensor.numpy())
        slot = self._free.pop(0)
        if slot.copied is not None:
            slot.copied.synchronize()
        return slot

    def _work(self, rows: list[Rows], slot: _Slot) -> Tensor:
        # for this thread of Python; `run` puts back what is not its own
        torch.set_num_threads(1)
        for part in rows:
            self._fill(slot, part, 0, part.num_draws)
        return self._logits(slot)

    def _fill(self, slot: _Slot, part: Rows, first: int, count: int) -> None:
        target = slot.array[part.start + first : part.start + first + count]
        self.noise.fill(target, part.image, index=part.index, first_draw=part.first_draw + first, phase=part.phase)

    def _logits(self, slot: _Slot) -> Tensor:
        with torch.inference_mode():
            batch = slot.tensor.to(self.device, non_blocking=True)
            if self.device.type == "cuda":
                slot.copied = torch.cuda.Event()
                slot.copied.record()
            logits = self.base_classifier(batch)
            if logits.ndim != 2 or logits.shape[0] != self.batch_size:
                raise ValueError(
                    f"The base classifier must return logits (B, num_classes) for B images, got shape "
                    f"{tuple(logits.shape)} for {self.batch_size} images."
                )
            if logits.shape[1] != self.num_classes:
                raise ValueError(
                    f"The base classifier returns {logits.shape[1]} classes, `num_classes` is {self.num_classes}."
                )
            return logits if logits.dtype == torch.float64 else logits.float()
