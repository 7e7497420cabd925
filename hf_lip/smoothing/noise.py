# SPDX-License-Identifier: Apache-2.0
"""Gaussian noise that depends on (seed, image index, phase, draw) only, never on how draws are batched.

The generator is counter based (Philox 4x64): the key is (seed, index), the counter starts at (0, 0, draw, phase), and
the two low counter words, 2**128 blocks, are the draw's own stream. Noise is drawn in float64, whose tail is not cut
where float32's is (5.77 sigma), and added in float64 before one rounding to float32: adding in float32 gives false
certificates.
"""

import threading
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hf_lip.smoothing.radii import check_sigma


__all__ = ["GaussianNoise", "Noise", "PhiloxStreams", "gaussian_noise", "noisy_copies"]

_MAX_WORD = 2**64 - 1


class Noise(Protocol):
    """How noisy copies of an image are made. Threads may call `fill` at once, each for rows of its own."""

    sigma: float

    @property
    def name(self) -> str:
        """For results and logs: two noises of one name and seed make the same copies."""

    def prepare(self, image: Tensor) -> NDArray[Any]:
        """What `fill` needs of an image, worked out once; a `ValueError` for an image that can not be used."""

    def fill(self, rows: NDArray[np.float32], image: NDArray[Any], *, index: int, first_draw: int, phase: int) -> None:
        """Write the noisy copies first_draw, first_draw + 1, ... into `rows` (k, *image.shape), in place."""


class PhiloxStreams:
    """One thread's generator, set to the stream of any (seed, index, phase, draw), all in 0..2**64 - 1.

    Setting the counter of one generator is many times as fast as making one for every draw.
    """

    def __init__(self) -> None:
        self.bits = np.random.Philox(key=np.zeros(2, dtype=np.uint64))
        self.generator = np.random.Generator(self.bits)
        self._state: Any = self.bits.state
        self._key, self._counter = self._state["state"]["key"], self._state["state"]["counter"]

    def select(self, seed: int, index: int, phase: int) -> None:
        """Choose whose draws `seek` goes to."""
        self._key[0], self._key[1], self._counter[3] = seed, index, phase

    def seek(self, draw: int, block: int = 0, lane: int = 0) -> None:
        """Go to a place of a draw's stream, by default its start: `block` counts four words of 64 bits, `lane` streams
        of 2**64 blocks."""
        counter = self._counter
        counter[0], counter[1], counter[2] = block, lane, draw
        self.bits.state = self._state


class GaussianNoise:
    """image + sigma z, z drawn and added in float64 and rounded once to float32.

    The values are not clipped to [0, 1]: clipping would be a part of the base classifier. The certificate takes the
    float64 draws for exact normal ones and the rounded sum for the exact one; for images on a grid,
    [`hf_lip.smoothing.exact_noise.GridNoise`] needs neither assumption.
    """

    name = "float64"

    def __init__(self, sigma: float, seed: int) -> None:
        check_sigma(sigma)
        check_words(seed=seed)
        self.sigma, self.seed = sigma, seed
        self._threads = threading.local()

    def prepare(self, image: Tensor) -> NDArray[np.float64]:
        """The image in float64; a `ValueError` if it has NaN or infinite values."""
        if not torch.isfinite(image).all():
            raise ValueError("`image` has NaN or infinite values: repair it before certifying.")
        return image.detach().cpu().to(torch.float64).numpy()

    def fill(self, rows: NDArray[np.float32], image: NDArray[Any], *, index: int, first_draw: int, phase: int) -> None:
        """See [`Noise.fill`]. One draw's values stay in the cache until they are rounded."""
        local = self._threads
        if getattr(local, "scratch", np.empty(0)).shape != image.shape:
            local.streams, local.scratch = PhiloxStreams(), np.empty(image.shape)
        streams, scratch = local.streams, local.scratch
        streams.select(self.seed, index, phase)
        for offset, row in enumerate(rows):
            streams.seek(first_draw + offset)
            streams.generator.standard_normal(out=scratch)
            np.multiply(scratch, self.sigma, out=scratch)
            np.add(scratch, image, out=row, casting="same_kind")


def gaussian_noise(
    shape: tuple[int, ...], *, seed: int, index: int, first_draw: int, num_draws: int, phase: int = 0
) -> NDArray[np.float64]:
    """Standard normal noise (num_draws, *shape) float64 of the draws first_draw, first_draw + 1, ...

    Args:
        shape: shape of one draw.
        seed: of the whole run, 0..2**64 - 1.
        index: position of the image, 0..2**64 - 1.
        first_draw: number of the first draw.
        phase: separates streams of one image that must be independent, such as selection and estimation.

    Raises:
        ValueError: a number that is negative or too large for 64 bits.
        TypeError: a number that is no integer.
    """
    check_words(seed=seed, index=index, first_draw=first_draw, phase=phase)
    noise = np.empty((num_draws, *shape), dtype=np.float64)
    streams = PhiloxStreams()
    streams.select(seed, index, phase)
    for row in range(num_draws):
        streams.seek(first_draw + row)
        streams.generator.standard_normal(out=noise[row])
    return noise


def noisy_copies(
    image: Tensor, *, sigma: float, seed: int, index: int, first_draw: int, num_draws: int, phase: int = 0
) -> Tensor:
    """image + sigma * noise, (num_draws, *image.shape) float32 on the CPU: what [`GaussianNoise`] makes.

    Errors as `gaussian_noise` and `GaussianNoise`.
    """
    check_words(index=index, first_draw=first_draw, phase=phase)
    noise = GaussianNoise(sigma, seed)
    rows = np.empty((num_draws, *image.shape), dtype=np.float32)
    noise.fill(rows, noise.prepare(image), index=index, first_draw=first_draw, phase=phase)
    return torch.from_numpy(rows)


def check_words(**words: Any) -> None:
    """Raise unless every keyword is an integer in 0..2**64 - 1, one word of a generator's key or counter."""
    for name, value in words.items():
        if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
            raise TypeError(f"`{name}` must be an integer, got {value!r}.")
        if not 0 <= value <= _MAX_WORD:
            raise ValueError(f"`{name}` must lie in 0..2**64 - 1, got {value}.")
