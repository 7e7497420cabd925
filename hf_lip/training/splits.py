# SPDX-License-Identifier: Apache-2.0
"""Splits of a small image data set, decoded once into memory."""

import math
from dataclasses import dataclass

import torch
from datasets import Dataset
from PIL import Image
from torch import Tensor

from ..data import dataset_to_tensors
from .augment import compact_pixels, epoch_generator, to_float_pixels


__all__ = ["Split", "read_split"]


@dataclass
class Split:
    """images (N, C, H, W), uint8 or float in [0, 1]; labels (N,) int64; names[label] is the class."""

    images: Tensor
    labels: Tensor
    names: list[str]

    def hold_out(self, share: float, seed: int) -> tuple["Split", "Split"]:
        """A random part of this share, and the rest.

        Raises:
            ValueError: one of the two would be empty.
        """
        order = torch.randperm(len(self.labels), generator=epoch_generator(seed, 0, "hold out"))
        count = round(share * len(order))
        if not 0 < count < len(order):
            raise ValueError(f"A share of {share} of {len(order)} images leaves an empty part.")
        held_out, rest = (Split(self.images[i], self.labels[i], self.names) for i in (order[:count], order[count:]))
        return held_out, rest

    def channel_means(self) -> list[float]:
        """Mean pixel of every channel, in [0, 1], to six digits."""
        sums = sum(to_float_pixels(part).sum(dim=(0, 2, 3), dtype=torch.float64) for part in self.images.split(1024))
        pixels = len(self.images) * self.images.shape[2] * self.images.shape[3]
        return [round(total / pixels, 6) for total in torch.as_tensor(sums).tolist()]

    def channel_deviations(self) -> list[float]:
        """Standard deviation of the pixels of every channel around its mean, in [0, 1], to six digits."""
        means = torch.tensor(self.channel_means(), dtype=torch.float64).view(-1, 1, 1)
        parts = (to_float_pixels(part).double() - means.to(part.device) for part in self.images.split(1024))
        sums = sum(part.square().sum(dim=(0, 2, 3)) for part in parts)
        pixels = len(self.images) * self.images.shape[2] * self.images.shape[3]
        return [round(math.sqrt(total / pixels), 6) for total in torch.as_tensor(sums).tolist()]


def read_split(
    dataset: Dataset,
    names: list[str],
    *,
    num_channels: int,
    image_size: int,
    resize: bool = False,
    limit: int | None = None,
    seed: int = 0,
    progress: bool = True,
) -> Split:
    """Decode a data set of `load_image_dataset`.

    Args:
        names: classes of the model; labels are numbered by their place in it.
        resize: convert and resize PIL images of other sizes, as the model's image processor does; radii then are in
            units of the resized pixels. Otherwise they are an error.
        limit: take a random part of this many images; not the first ones, as files are often sorted by class.

    Raises:
        ValueError: a label that is not in `names`, or an image that does not fit.
    """
    if limit is not None and limit < len(dataset):
        chosen = torch.randperm(len(dataset), generator=epoch_generator(seed, 0, "subset"))[:limit]
        dataset = dataset.select(chosen.sort().values.tolist())
    if resize and isinstance(dataset[0]["image"], Image.Image):
        mode = "L" if num_channels == 1 else "RGB"

        def fit(image: Image.Image) -> Image.Image:
            image = image if image.mode == mode else image.convert(mode)
            size = (image_size, image_size)
            return image if image.size == size else image.resize(size, Image.Resampling.BILINEAR)

        dataset = dataset.with_transform(
            lambda rows: {"image": [fit(image) for image in rows["image"]]}, columns=["image"], output_all_columns=True
        )
    images, labels = dataset_to_tensors(dataset, image_size=image_size, num_channels=num_channels, progress=progress)
    own_names = dataset.features["label"].names
    unknown = {own_names[label] for label in labels.unique().tolist()} - set(names)
    if unknown:
        raise ValueError(f"Labels {sorted(unknown)[:5]} are not among the {len(names)} classes that are trained.")
    places = torch.tensor([names.index(name) if name in names else -1 for name in own_names])
    return Split(compact_pixels(images), places[labels], names)
