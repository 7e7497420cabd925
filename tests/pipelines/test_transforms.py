# SPDX-License-Identifier: Apache-2.0
import numpy as np
import pytest
import torch
from PIL import Image
from transformers.image_processing_backends import PilBackend
from transformers.models.convnext.image_processing_pil_convnext import ConvNextImageProcessorPil
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from hf_lip.pipelines.transforms import image_of_input, pixel_transform


# the processor rounds to 8 bits after each of two passes, then divides by the standard deviation 1/2
RESIZED = 3.1 / 255


def smooth_image(height, width):
    """8-bit image (H, W, 3) far from 0 and 255, where bicubic filters overshoot and 8-bit processors clip."""
    rows, columns = np.mgrid[0:height, 0:width]
    channels = [rows / height, columns / width, (rows + columns) / (height + width)]
    return ((0.25 + 0.5 * np.stack(channels, axis=-1)) * 255).round().astype(np.uint8)


@pytest.mark.parametrize(
    ("processor", "size", "tolerance"),
    [
        (ViTImageProcessorPil(do_resize=False), (9, 11), 1e-6),
        (ViTImageProcessorPil(do_resize=False, do_normalize=False), (9, 11), 1e-6),
        (ViTImageProcessorPil(do_resize=False, do_rescale=False, image_mean=[9] * 3, image_std=[6] * 3), (9, 9), 1e-5),
        (ViTImageProcessorPil(do_resize=False, rescale_factor=1 / 127.5), (9, 11), 1e-6),
        (ViTImageProcessorPil(size={"height": 20, "width": 12}), (9, 11), RESIZED),
        (ViTImageProcessorPil(size={"height": 5, "width": 4}), (16, 11), RESIZED),
        (ViTImageProcessorPil(size={"height": 20, "width": 12}, resample=3), (9, 11), RESIZED),
        (ViTImageProcessorPil(size={"height": 20, "width": 12}, resample=0), (9, 11), RESIZED),
        (ViTImageProcessorPil(size={"shortest_edge": 6}), (9, 12), RESIZED),
        (ViTImageProcessorPil(size={"shortest_edge": 12}, do_center_crop=True, crop_size=10), (9, 13), RESIZED),
        (ViTImageProcessorPil(do_resize=False, do_center_crop=True, crop_size=7), (9, 12), 1e-6),
        (ConvNextImageProcessorPil(size={"shortest_edge": 14}, image_std=[0.5] * 3), (20, 26), RESIZED),
        (ConvNextImageProcessorPil(size={"shortest_edge": 384}, image_std=[0.5] * 3), (40, 52), RESIZED),
    ],
    ids=[
        *("normalise", "rescale", "no-rescale", "other-scale", "enlarge", "shrink", "bicubic", "nearest"),
        *("shortest-edge", "resize-crop", "crop", "convnext", "convnext-384"),
    ],
)  # fmt: skip
def test_same_as_the_processor(processor, size, tolerance):
    image = smooth_image(*size)
    expected = processor(Image.fromarray(image), return_tensors="pt")["pixel_values"].float()
    pixels = torch.from_numpy(image.transpose(2, 0, 1)).float()[None] / 255
    actual = pixel_transform(processor)(pixels)
    assert actual.shape == expected.shape
    assert (actual - expected).abs().max() <= tolerance


def test_noisy_pixels_are_neither_clipped_nor_rounded():
    transform = pixel_transform(ViTImageProcessorPil(size={"height": 8, "width": 8}))
    pixels = torch.full((1, 3, 8, 8), 1.7)
    assert torch.allclose(transform(pixels), (pixels - 0.5) / 0.5)
    assert torch.allclose(transform(-pixels), (-pixels - 0.5) / 0.5)


def test_without_a_processor_pixels_pass_unchanged():
    pixels = torch.randn(2, 3, 4, 4)
    assert pixel_transform(None)(pixels) is pixels


class OwnStep(PilBackend):
    resample, size, do_resize, do_rescale, do_normalize = 2, {"height": 4, "width": 4}, True, True, False
    do_flip_channel_order = True


class OwnCode(PilBackend):
    resample, size, do_resize, do_rescale, do_normalize = 2, {"height": 4, "width": 4}, True, True, False

    def resize(self, image, size, **kwargs):
        return super().resize(image, size, **kwargs)


@pytest.mark.parametrize(
    ("processor", "message"),
    [
        (OwnStep(), "does do_flip_channel_order"),
        (OwnCode(), "has its own `resize`"),
        (ViTImageProcessorPil(do_pad=True, pad_size=9), "does do_pad"),
        (ViTImageProcessorPil(resample=1), "`image_processor.resample`"),
        (ViTImageProcessorPil(size={"shortest_edge": 4, "longest_edge": 8}), "`image_processor.size`"),
        (ConvNextImageProcessorPil(size={"height": 8, "width": 8}), "`image_processor.size`"),
    ],
    ids=["step", "code", "pad", "filter", "size", "convnext-size"],
)
def test_unknown_steps_are_errors(processor, message):
    with pytest.raises(ValueError, match=message):
        pixel_transform(processor)


def test_crop_larger_than_the_image():
    transform = pixel_transform(ViTImageProcessorPil(do_resize=False, do_center_crop=True, crop_size=10))
    with pytest.raises(ValueError, match="9x12 where the image processor crops 10x10"):
        transform(torch.zeros(1, 3, 9, 12))


def test_inputs(tmp_path):
    image = Image.fromarray(smooth_image(4, 5))
    image.save(tmp_path / "image.png")
    for item in (tmp_path / "image.png", str(tmp_path / "image.png"), {"image": tmp_path / "image.png"}):
        assert np.array_equal(np.asarray(image_of_input(item)), np.asarray(image))
    assert image_of_input(image) is image
    assert image_of_input({"img": image, "label": 1}) is image


def test_grey_files_stay_grey(tmp_path):
    Image.new("L", (4, 4)).save(tmp_path / "grey.png")
    assert image_of_input(tmp_path / "grey.png").mode == "L"


def test_bad_inputs(tmp_path):
    with pytest.raises(FileNotFoundError, match="No image file"):
        image_of_input("no/such/image.png")
    (tmp_path / "image.png").write_text("not an image")
    with pytest.raises(ValueError, match="not an image that Pillow can read"):
        image_of_input(tmp_path / "image.png")
    with pytest.raises(ValueError, match="is a URL"):
        image_of_input("https://example.org/image.png")
    with pytest.raises(ValueError, match=r"'image' or 'img'.*\['label'\]"):
        image_of_input({"label": 1})
