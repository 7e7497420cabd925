# SPDX-License-Identifier: Apache-2.0
"""Denoisers by name, for the command line: a diffusion model of the Hub, or a Python function."""

import importlib
from collections.abc import Callable
from pathlib import Path

from torch import Tensor

from hf_lip.smoothing.denoise import DiffusionDenoiser


__all__ = ["load_denoiser"]


def load_denoiser(source: str, sigma: float) -> Callable[[Tensor], Tensor]:
    """A denoiser of pixels in [0, 1] with noise of standard deviation `sigma`.

    Args:
        source: `package.module:name` of a module or function, which is imported; or a folder or Hub id of an
            unconditional diffusion pipeline of diffusers (such as google/ddpm-cifar10-32), of which one step is used.

    Raises:
        ImportError: diffusers, or the named module, is not installed.
        ValueError: no such name, or a pipeline without a network of pixels, or more noise than it has seen.
        OSError: no such folder or repository.
    """
    module, _, name = source.partition(":")
    if name and not Path(source).exists():
        try:
            denoiser = getattr(importlib.import_module(module), name)
        except AttributeError as error:
            raise ValueError(f"`denoiser` {source!r}: module {module!r} has no {name!r}.") from error
        if not callable(denoiser):
            raise ValueError(f"`denoiser` {source!r} is no module or function of noisy pixels.")
        result: Callable[[Tensor], Tensor] = denoiser
        return result
    try:
        from diffusers import DDPMPipeline  # type: ignore[import-not-found]
    except ImportError as error:
        raise ImportError("A diffusion model as `denoiser` needs diffusers: pip install diffusers.") from error
    pipe = DDPMPipeline.from_pretrained(source, use_safetensors=True)
    abar, prediction = pipe.scheduler.alphas_cumprod, pipe.scheduler.config.prediction_type
    return DiffusionDenoiser(pipe.unet.requires_grad_(False), abar, sigma, prediction)
