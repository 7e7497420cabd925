# SPDX-License-Identifier: Apache-2.0
"""Gaussian noise that depends on (seed, image index, phase, draw) only, never on how draws are batched.

The generator is counter based (Philox 4x64): the key is (seed, index), the counter starts at (0, 0, draw, phase), and
the two low counter words, 2**128 blocks, are the draw's own stream. Noise is drawn in float64, whose tail is not cut
where float32's is (5.77 sigma), and added in float64 before one rounding to float32: adding in float32 gives false
certificates.
"""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


__all__ = ["gaussian_noise", "noisy_copies"]

_MAX_WORD = 2**64 - 1


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
    for name, value in (("seed", seed), ("index", index), ("first_draw", first_draw), ("phase", phase)):
        if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
            raise TypeError(f"`{name}` must be an integer, got {value!r}.")
        if not 0 <= value <= _MAX_WORD:
            raise ValueError(f"`{name}` must lie in 0..2**64 - 1, got {value}.")
    noise = np.empty((num_draws, *shape), dtype=np.float64)
    bits = np.random.Philox(key=np.array([seed, index], dtype=np.uint64))
    generator = np.random.Generator(bits)
    # setting the counter of one generator is seven times as fast as a generator for every draw
    state: Any = bits.state
    for row in range(num_draws):
        state["state"]["counter"] = np.array([0, 0, first_draw + row, phase], dtype=np.uint64)
        bits.state = state
        generator.standard_normal(out=noise[row])
    return noise


def noisy_copies(
    image: Tensor, *, sigma: float, seed: int, index: int, first_draw: int, num_draws: int, phase: int = 0
) -> Tensor:
    """image + sigma * noise, (num_draws, *image.shape) float32 on the CPU, added in float64 and rounded once.

    The values are not clipped to [0, 1]: clipping would be a part of the base classifier.
    Errors as `gaussian_noise`.
    """
    noise = gaussian_noise(
        tuple(image.shape), seed=seed, index=index, first_draw=first_draw, num_draws=num_draws, phase=phase
    )
    noise *= sigma
    noise += image.detach().cpu().to(torch.float64).numpy()
    return torch.from_numpy(noise.astype(np.float32))
