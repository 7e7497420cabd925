# SPDX-License-Identifier: Apache-2.0
"""Image processor of the lipschitz_vision family: pixels in [0, 1] and nothing else. Needs Pillow, not torchvision."""

import numpy as np
from PIL import Image
from transformers.feature_extraction_utils import BatchFeature
from transformers.image_processing_backends import PilBackend
from transformers.image_utils import PILImageResampling, SizeDict
from transformers.processing_utils import ImagesKwargs

from ..shim import InstalledSettings


class LipschitzVisionImageProcessorKwargs(ImagesKwargs, total=False):
    num_channels: int


class LipschitzVisionImageProcessorPil(InstalledSettings, PilBackend):
    """Images -> `pixel_values` (B, C, H, W) in [0, 1].

    8-bit images are divided by 255; floating-point arrays must lie in [0, 1] already and are passed on. Normalisation
    is a layer of the model, so that radii stay in pixel units. An image of another size than `size` is resized, and
    then the radius is in pixels of the resized image.

    Args:
        size: {"height", "width"} of the model's input.
        num_channels: 1 (grey) or 3 (RGB); PIL images are converted.
    """

    valid_kwargs = LipschitzVisionImageProcessorKwargs
    model_input_names = ["pixel_values"]  # noqa: RUF012
    resample = PILImageResampling.BILINEAR
    size = {"height": 32, "width": 32}  # noqa: RUF012
    num_channels = 3
    do_resize = True
    do_rescale = True
    rescale_factor = 1 / 255
    do_normalize = False

    def process_image(self, image, num_channels: int | None = None, **kwargs) -> np.ndarray:  # type: ignore[override]
        channels = self.num_channels if num_channels is None else num_channels
        if isinstance(image, Image.Image):
            image = image.convert("L" if channels == 1 else "RGB")
        array = super().process_image(image, **kwargs)
        if array.shape[0] != channels:
            raise ValueError(
                f"The image has {array.shape[0]} channels and the model takes `num_channels`={channels}: convert it, "
                "or pass a PIL image, which is converted."
            )
        return array

    def _preprocess(  # type: ignore[override]
        self,
        images: list[np.ndarray],
        do_resize: bool,
        size: SizeDict,
        resample: "PILImageResampling | None",
        do_rescale: bool,
        rescale_factor: float,
        return_tensors=None,
        **kwargs,
    ) -> BatchFeature:
        processed = []
        for image in images:
            if do_resize and image.shape[-2:] != (size.height, size.width):
                image = self.resize(image=image, size=size, resample=resample)
            if not np.issubdtype(image.dtype, np.floating):
                if do_rescale:
                    image = self.rescale(image, rescale_factor)
            elif not np.isfinite(image).all() or image.min() < 0 or image.max() > 1:
                raise ValueError(
                    f"Floating-point `images` must lie in [0, 1], got [{image.min():.4g}, {image.max():.4g}]: divide "
                    "by 255 or pass 8-bit images."
                )
            processed.append(image.astype(np.float32))
        return BatchFeature(data={"pixel_values": processed}, tensor_type=return_tensors)


# the name without the suffix is what transformers writes into preprocessor_config.json
LipschitzVisionImageProcessor = LipschitzVisionImageProcessorPil

__all__ = ["LipschitzVisionImageProcessor", "LipschitzVisionImageProcessorPil"]
