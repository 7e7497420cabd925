# SPDX-License-Identifier: Apache-2.0
"""Noise without floating point: the exact law of round(grid (x + sigma z)) for images on a grid such as k/255.

Rounding noisy pixels to the grid and clipping them to [-k, k + 1], k = max(1, int(6 sigma)), are made the first steps
of the base classifier. Smoothing it with real Gaussian noise then is, for an image on the grid, the same as adding a
random integer D with P(D <= j) = Phi((j + 1/2) / (sigma grid)) to its integer pixels; D is drawn with exactly these
probabilities, by comparing random bits with the thresholds to as many digits as it takes. No float rounding is left
that could fake votes. Source: Voracek and Hein, Sound Randomized Smoothing in Floating-Point Arithmetics (ICLR 2023).
"""

import threading
from itertools import pairwise
from typing import Any

import mpmath  # type: ignore[import-untyped]
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hf_lip.smoothing.noise import PhiloxStreams, check_words
from hf_lip.smoothing.radii import check_sigma


# bits of a first look: they decide all but a few values
_LOOK = 16
_BUCKETS = 1 << _LOOK
_UNDECIDED = np.iinfo(np.int16).min
# values that are looked up together, few enough for a second-level cache
_CHUNK = 1 << 16

__all__ = ["GridNoise"]


class GridNoise:
    """Exactly distributed noise on the grid of the image; see the module. A [`hf_lip.smoothing.noise.Noise`].

    Args:
        sigma: standard deviation in units of pixels in [0, 1].
        seed: of the run.
        grid: steps between 0 and 1: 255 for 8-bit images, 256 for those of scikit-learn's digits. One for all images
            of a run, as it is a part of the classifier.

    Raises:
        ValueError: an argument out of range, or a noise that reaches over more than 32,000 steps.
    """

    def __init__(self, sigma: float, seed: int, grid: int = 255) -> None:
        check_sigma(sigma)
        check_words(seed=seed)
        check_words(grid=grid)
        k = max(1, int(6.0 * sigma))
        if not 0 < (k + 2) * grid <= 32_000:
            raise ValueError(
                f"`grid`={grid} with `sigma`={sigma} must be positive and make at most 32,000 steps, (6 sigma + 2) "
                "grid: use 255 for 8-bit images and a smaller `sigma`."
            )
        self.sigma, self.seed, self.grid = float(sigma), seed, grid
        self.lowest, self.highest = -k * grid, (k + 1) * grid
        # further out, an integer is clipped whatever the pixel was
        self._reach = (k + 1) * grid
        lower = np.array([self._threshold(j, 64) for j in range(-self._reach, 0)], dtype=np.uint64)
        self._thresholds = np.concatenate([lower, ~lower[::-1]])
        self._table = self._first_look()
        self._threads = threading.local()

    @property
    def name(self) -> str:
        return f"exact, grid 1/{self.grid}, clipped to [{self.lowest // self.grid}, {self.highest // self.grid}]"

    def prepare(self, image: Tensor) -> NDArray[np.int16]:
        """The integers grid * image, int16; a `ValueError` for pixels off the grid."""
        pixels = image.detach().cpu().to(torch.float32)
        integers = (pixels.double() * self.grid).round()
        on_grid = torch.equal(integers.float() / self.grid, pixels)
        if not (on_grid and integers.min() >= 0 and integers.max() <= self.grid):
            raise ValueError(
                f"`image` has pixels that are not k/{self.grid} with k in 0..{self.grid}, which this noise needs: "
                "pass 8-bit images as they are, before any resizing, name their own grid (256 for scikit-learn's "
                "digits), or certify without `sound_noise`."
            )
        return integers.to(torch.int16).numpy()

    def fill(self, rows: NDArray[np.float32], image: NDArray[Any], *, index: int, first_draw: int, phase: int) -> None:
        """See [`hf_lip.smoothing.noise.Noise.fill`]; the values are integer / grid, rounded once."""
        if not hasattr(self._threads, "streams"):
            self._threads.streams = PhiloxStreams()
        self._threads.streams.select(self.seed, index, phase)
        step = max(1, _CHUNK // image.size)
        for start in range(0, len(rows), step):
            part = rows[start : start + step]
            values = self._draws(len(part), image.size, first_draw + start).reshape(part.shape)
            values += image
            np.clip(values, self.lowest, self.highest, out=values)
            np.divide(values, np.float32(self.grid), out=part)

    def _draws(self, num_draws: int, size: int, first_draw: int) -> NDArray[np.int16]:
        """D (num_draws * size), clipped to the reach, of the draws that this thread has selected."""
        streams: PhiloxStreams = self._threads.streams
        words = -(-size * _LOOK // 64)
        bits = np.empty((num_draws, words), dtype="<u8")
        for row in range(num_draws):
            streams.seek(first_draw + row)
            bits[row] = streams.bits.random_raw(words)
        looks = bits.view("<u2")[:, :size].reshape(-1)
        noise: NDArray[np.int16] = self._table.take(looks, mode="clip")
        undecided = np.flatnonzero(noise == _UNDECIDED)
        ends = np.searchsorted(undecided, size * np.arange(num_draws + 1))
        further = np.empty(len(undecided), dtype=np.uint64)
        for row, (start, end) in enumerate(pairwise(ends)):
            # behind the blocks of the first looks
            streams.seek(first_draw + row, block=-(-words // 4))
            further[start:end] = streams.bits.random_raw(end - start)
        look = (looks[undecided].astype(np.uint64) << np.uint64(64 - _LOOK)) | (further >> np.uint64(_LOOK))
        place = np.searchsorted(self._thresholds, look)
        noise[undecided] = place - self._reach
        for tie in np.flatnonzero(self._thresholds[np.minimum(place, len(self._thresholds) - 1)] == look):
            row, column = divmod(int(undecided[tie]), size)
            streams.seek(first_draw + row, lane=1 + column)
            noise[undecided[tie]] = self._settle(int(look[tie]), streams)
        return noise

    def _settle(self, look: int, streams: PhiloxStreams) -> int:
        """D for a uniform number in [look, look + 1) / 2**64, an interval that holds a threshold, by further bits."""
        tied = [int(place) - self._reach for place in np.flatnonzero(self._thresholds == np.uint64(look))]
        bits = 64
        while True:
            look, bits = (look << 64) | int(streams.bits.random_raw()), bits + 64
            thresholds = {j: self._threshold(j, bits) for j in tied}
            value = min(tied) + sum(threshold < look for threshold in thresholds.values())
            tied = [j for j, threshold in thresholds.items() if threshold == look]
            if not tied:
                return value

    def _threshold(self, j: int, bits: int) -> int:
        """floor(2**bits P(D <= j)), for D without a clip."""
        if j >= 0:
            # P(D <= j) = 1 - P(D <= -j - 1), irrational
            return (1 << bits) - 1 - self._threshold(-j - 1, bits)
        # digits for the result and to spare
        with mpmath.workprec(bits + 64):
            cdf = mpmath.ncdf((mpmath.mpf(j) + 0.5) / (mpmath.mpf(self.sigma) * self.grid))
            return int(mpmath.floor(mpmath.ldexp(cdf, bits)))

    def _first_look(self) -> NDArray[np.int16]:
        """Value for every 16 bits that decide it, `_UNDECIDED` for the others."""
        edges = np.arange(_BUCKETS, dtype=np.uint64) << np.uint64(64 - _LOOK)
        last = edges + np.uint64((1 << (64 - _LOOK)) - 1)
        low = np.searchsorted(self._thresholds, edges, side="left")
        high = np.searchsorted(self._thresholds, last, side="right")
        return np.where(low == high, low - self._reach, _UNDECIDED).astype(np.int16)
