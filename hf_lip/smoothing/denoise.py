# SPDX-License-Identifier: Apache-2.0
"""Denoised smoothing: a denoiser in front of a classifier that was never trained with noise.

Salman et al., Denoised Smoothing (NeurIPS 2020); with one step of a diffusion model Carlini et al., (Certified!!)
Adversarial Robustness for Free! (ICLR 2023). The denoiser is a part of the base classifier: any deterministic one is
allowed, and the certificate of the whole holds whatever its quality.
"""

import math
from collections.abc import Callable
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from hf_lip.smoothing.radii import check_sigma


Prediction = Literal["epsilon", "sample", "v_prediction"]

__all__ = ["DiffusionDenoiser", "Prediction", "noise_timestep"]


def noise_timestep(alphas_cumprod: Tensor, sigma: float) -> int:
    """First step whose noise is at least that of pixels in [0, 1] with standard deviation `sigma`.

    Diffusion models see 2 x - 1, whose noise has standard deviation 2 sigma; at step t they expect
    sqrt((1 - abar_t) / abar_t) times the image's scale. Rounding up asks for slightly more denoising than needed.

    Args:
        alphas_cumprod: abar (T,), decreasing from nearly 1.

    Raises:
        ValueError: `sigma` not positive, a schedule that is no decreasing sequence in (0, 1], or one whose last step
            has less noise than that.
    """
    check_sigma(sigma)
    abar = torch.as_tensor(alphas_cumprod, dtype=torch.float64).flatten().cpu()
    if abar.numel() == 0 or not ((abar > 0.0) & (abar <= 1.0)).all() or (abar.diff() > 0.0).any():
        raise ValueError("`alphas_cumprod` must be a decreasing sequence of numbers in (0, 1].")
    enough = torch.nonzero(torch.sqrt((1.0 - abar) / abar) >= 2.0 * sigma).flatten()
    if len(enough) == 0:
        largest = 0.5 * math.sqrt((1.0 - float(abar[-1])) / float(abar[-1]))
        raise ValueError(f"`sigma`={sigma} is more noise than the diffusion model has seen, at most {largest:.4g}.")
    return int(enough[0])


class DiffusionDenoiser(nn.Module):
    """One step of a diffusion model as a denoiser of pixels in [0, 1]: predicted clean image, clipped to [0, 1].

    Args:
        model: maps (sqrt(abar_t) (2 x - 1 + 2 sigma z), t (B,)) to its prediction, of the input's shape; an output
            object with `sample` (as in diffusers) will do, and further channels, such as a learned variance, are cut.
        alphas_cumprod: abar (T,) of its training.
        sigma: standard deviation of the noise in the pixels.
        prediction: what the model predicts: the noise "epsilon", the clean image "sample", or "v_prediction".

    Raises:
        ValueError: as `noise_timestep`; an unknown `prediction`.
    """

    def __init__(
        self,
        model: Callable[[Tensor, Tensor], Any],
        alphas_cumprod: Tensor,
        sigma: float,
        prediction: Prediction = "epsilon",
    ) -> None:
        super().__init__()
        if prediction not in get_args(Prediction):
            raise ValueError(f"`prediction` must be one of {', '.join(get_args(Prediction))}, got {prediction!r}.")
        self.timestep = noise_timestep(alphas_cumprod, sigma)
        abar = float(torch.as_tensor(alphas_cumprod, dtype=torch.float64).flatten()[self.timestep])
        self.signal, self.noise = math.sqrt(abar), math.sqrt(1.0 - abar)
        self.sigma, self.prediction, self.model = sigma, prediction, model

    @property
    def excess_noise(self) -> float:
        """How much more noise than 2 sigma the model expects, relative: the price of whole steps."""
        return self.noise / self.signal / (2.0 * self.sigma) - 1.0

    def forward(self, noisy: Tensor) -> Tensor:
        """Noisy pixels (B, C, H, W) -> denoised pixels (B, C, H, W) in [0, 1]."""
        scaled = self.signal * (2.0 * noisy - 1.0)
        steps = torch.full((len(noisy),), self.timestep, device=noisy.device)
        output = self.model(scaled, steps)
        output = getattr(output, "sample", output)[:, : noisy.shape[1]]
        if self.prediction == "epsilon":
            clean = (scaled - self.noise * output) / self.signal
        elif self.prediction == "v_prediction":
            clean = self.signal * scaled - self.noise * output
        else:
            clean = output
        return (0.5 * clean + 0.5).clamp(0.0, 1.0)

    def extra_repr(self) -> str:
        return f"sigma={self.sigma}, timestep={self.timestep}, prediction={self.prediction}"
