# SPDX-License-Identifier: Apache-2.0
"""From what a user hands in to pixels in [0, 1], and from noisy pixels to what a model takes.

Randomized smoothing adds its noise to the pixels of the original image. The deterministic steps of an image processor
(resize, crop, scale, normalise) then belong to the base classifier and are applied here, in torch, to noisy batches.
"""

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from torch.nn.functional import interpolate


_IMAGE_KEYS = ("image", "img")
# PIL's numbers and torchvision's names of the filters; lanczos, box and hamming have no equal in torch
_FILTERS: dict[int | str, str] = {
    0: "nearest-exact",
    2: "bilinear",
    3: "bicubic",
    "nearest": "nearest-exact",
    "nearest-exact": "nearest-exact",
    "bilinear": "bilinear",
    "bicubic": "bicubic",
}
_KNOWN_STEPS = {"do_resize", "do_center_crop", "do_rescale", "do_normalize", "do_convert_rgb"}
_STEP_METHODS = ("preprocess", "_preprocess", "process_image", "resize", "center_crop", "rescale", "normalize")
_LIBRARY_MODULES = ("transformers.image_processing_backends", "transformers.image_processing_utils")

__all__ = ["image_of_input", "pixel_transform"]


def image_of_input(item: Any) -> Any:
    """The image in one input: a path is opened, a data set row gives its `image` or `img`; the rest is returned as is.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a URL, a file that is no image, a row without an image.
    """
    if isinstance(item, Mapping):
        keys = [key for key in _IMAGE_KEYS if key in item]
        if not keys:
            raise ValueError(
                f"A dict must be a row with an 'image' or 'img', this one has {sorted(map(str, item))}: rename the "
                "column, or choose a split of a DatasetDict."
            )
        item = item[keys[0]]
    if not isinstance(item, (str, Path)):
        return item
    if str(item).startswith(("http://", "https://")):
        raise ValueError(f"{item!r} is a URL: download the image and pass its path.")
    path = Path(item).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"No image file at {str(item)!r}: check the path.")
    try:
        with Image.open(path) as image:
            return ImageOps.exif_transpose(image)
    except UnidentifiedImageError as error:
        raise ValueError(f"{str(item)!r} is not an image that Pillow can read: convert it to PNG or JPEG.") from error


def pixel_transform(image_processor: Any | None) -> Callable[[Tensor], Tensor]:
    """The deterministic part of an image processor as a function of pixels (B, C, H, W) in [0, 1], noise included.

    Resize, centre crop, rescale and normalise are read from the processor's attributes and done in float32 without
    rounding to 8 bits, as noisy pixels are no 8-bit image. Without a processor the pixels pass unchanged.

    Raises:
        ValueError: the processor does something else (another `do_*` step, its own code, a filter or a form of size
            that torch does not have): the base classifier would not be the model that the user means.
    """
    if image_processor is None:
        return _identity
    convnext = type(image_processor).__name__.startswith("ConvNextImageProcessor")
    # the processor of this package resizes and scales by its attributes, and checks what is checked here too
    own = type(image_processor).__module__.startswith("hf_lip.")
    _refuse_unknown_steps(image_processor, own_code_known=convnext or own)
    steps: list[Callable[[Tensor], Tensor]] = []
    if image_processor.do_resize:
        steps.append(_convnext_resize(image_processor) if convnext else _resize(image_processor))
    if getattr(image_processor, "do_center_crop", None):
        size = _size_dict(image_processor.crop_size)
        steps.append(lambda pixels: _center_crop(pixels, size["height"], size["width"]))
    # processors scale from 0..255
    scale = 255.0 * (float(image_processor.rescale_factor) if image_processor.do_rescale else 1.0)
    if not math.isclose(scale, 1.0, rel_tol=1e-9):
        steps.append(lambda pixels: pixels * scale)
    if image_processor.do_normalize:
        steps.append(_normalise(image_processor.image_mean, image_processor.image_std))

    def transform(pixels: Tensor) -> Tensor:
        for step in steps:
            pixels = step(pixels)
        return pixels

    return transform


def _identity(pixels: Tensor) -> Tensor:
    return pixels


def _refuse_unknown_steps(image_processor: Any, own_code_known: bool) -> None:
    name = type(image_processor).__name__
    remedy = "pass a model that takes pixels in [0, 1] and no image processor, or wrap these steps into the model."
    unknown = [key for key in dir(image_processor) if key.startswith("do_") and key not in _KNOWN_STEPS]
    unknown = [key for key in unknown if getattr(image_processor, key) is True]
    if getattr(image_processor, "rescale_offset", None):
        unknown.append("rescale_offset")
    if unknown:
        raise ValueError(f"`image_processor` {name} does {', '.join(unknown)}, unknown to smoothing: {remedy}")
    if own_code_known:
        return
    for method in _STEP_METHODS:
        owner = next((cls for cls in type(image_processor).__mro__ if method in cls.__dict__), None)
        if owner is not None and owner.__module__ not in _LIBRARY_MODULES:
            raise ValueError(f"`image_processor` {name} has its own `{method}`, unknown to smoothing: {remedy}")


def _size_dict(size: Any) -> dict[str, int]:
    if isinstance(size, int):
        return {"height": size, "width": size}
    return {key: int(value) for key, value in dict(size).items() if value is not None}


def _filter(image_processor: Any) -> str:
    resample = image_processor.resample
    key = getattr(resample, "value", resample)
    if key not in _FILTERS:
        raise ValueError(
            f"`image_processor.resample` is {resample!r}, which torch does not have: use nearest, bilinear or bicubic."
        )
    return _FILTERS[key]


def _resize(image_processor: Any) -> Callable[[Tensor], Tensor]:
    size, mode = _size_dict(image_processor.size), _filter(image_processor)
    if set(size) == {"height", "width"}:
        return lambda pixels: _interpolate(pixels, size["height"], size["width"], mode)
    if set(size) == {"shortest_edge"}:
        return lambda pixels: _interpolate(pixels, *_shortest_edge(pixels, size["shortest_edge"]), mode)
    raise ValueError(f"`image_processor.size` is {size}, known are height and width, or shortest_edge.")


def _convnext_resize(image_processor: Any) -> Callable[[Tensor], Tensor]:
    size, mode = _size_dict(image_processor.size), _filter(image_processor)
    if set(size) != {"shortest_edge"}:
        raise ValueError(f"`image_processor.size` is {size}, a ConvNext processor needs shortest_edge.")
    edge = size["shortest_edge"]

    def resize(pixels: Tensor) -> Tensor:
        if edge >= 384:
            return _interpolate(pixels, edge, edge, mode)
        larger = _shortest_edge(pixels, int(edge / image_processor.crop_pct))
        return _center_crop(_interpolate(pixels, *larger, mode), edge, edge)

    return resize


def _shortest_edge(pixels: Tensor, edge: int) -> tuple[int, int]:
    height, width = pixels.shape[-2:]
    if width <= height:
        return int(edge * height / width), edge
    return edge, int(edge * width / height)


def _interpolate(pixels: Tensor, height: int, width: int, mode: str) -> Tensor:
    if tuple(pixels.shape[-2:]) == (height, width):
        return pixels
    # antialiased as in PIL, where the filter widens when an image shrinks
    antialias = mode in ("bilinear", "bicubic")
    return interpolate(pixels, size=(height, width), mode=mode, antialias=antialias)


def _center_crop(pixels: Tensor, height: int, width: int) -> Tensor:
    top, left = (pixels.shape[-2] - height) // 2, (pixels.shape[-1] - width) // 2
    if top < 0 or left < 0:
        raise ValueError(
            f"`image` is {pixels.shape[-2]}x{pixels.shape[-1]} where the image processor crops {height}x{width}: "
            "pass a larger image."
        )
    return pixels[..., top : top + height, left : left + width]


def _normalise(mean: Any, std: Any) -> Callable[[Tensor], Tensor]:
    means, stds = torch.tensor(mean, dtype=torch.float32), torch.tensor(std, dtype=torch.float32)

    def normalise(pixels: Tensor) -> Tensor:
        shape = (1, -1, 1, 1)
        return (pixels - means.to(pixels.device).view(shape)) / stds.to(pixels.device).view(shape)

    return normalise
