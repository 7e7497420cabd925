# SPDX-License-Identifier: Apache-2.0
"""Small image data sets held in memory, shuffled and augmented on tensors.

Every random choice is a function of (seed, epoch, position of the image), so a batch can be asked for in any order, by
any number of processes and after any interruption, and is the same.
"""

import hashlib

import torch
from torch import Tensor


__all__ = ["ImageBatches", "compact_pixels", "crop_and_flip", "epoch_generator", "to_float_pixels"]


def epoch_generator(seed: int, epoch: int, purpose: str, device: torch.device | str = "cpu") -> torch.Generator:
    """Generator whose stream depends on seed, epoch and purpose; neighbouring seeds and epochs are unrelated."""
    digest = hashlib.sha256(f"{seed}/{epoch}/{purpose}".encode()).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def compact_pixels(images: Tensor) -> Tensor:
    """uint8 copy of float images in [0, 1] if `to_float_pixels` gives back every pixel exactly, else the images."""
    as_bytes = (images * 255.0).round().to(torch.uint8)
    exact = all(
        torch.equal(to_float_pixels(part), whole) for part, whole in zip(as_bytes.split(1024), images.split(1024))
    )
    return as_bytes if exact else images


def to_float_pixels(images: Tensor) -> Tensor:
    """float32 pixels in [0, 1]: uint8 is divided by 255, floating point is passed through."""
    return images.float() / 255.0 if images.dtype == torch.uint8 else images.float()


def crop_and_flip(images: Tensor, shifts: Tensor, flips: Tensor, *, padding_mode: str = "zeros") -> Tensor:
    """Move each image by whole pixels, then mirror it: a random crop of the padded image, without the padded copy.

    Args:
        images: (B, C, H, W), any dtype.
        shifts: (B, 2) integers; row r, column c of the result is pixel (r + shifts[0], c + shifts[1]) of the image.
        flips: (B,) booleans, left-right mirror of the shifted image.
        padding_mode: what lies outside the image: `zeros` (black) or `reflect`.

    Raises:
        ValueError: unknown `padding_mode`, or reflection by a shift that is not smaller than the image.
    """
    if padding_mode not in ("zeros", "reflect"):
        raise ValueError(f"`padding_mode` must be 'zeros' or 'reflect', got {padding_mode!r}.")
    batch, channels, height, width = images.shape
    device = images.device
    rows = torch.arange(height, device=device) + shifts[:, :1].to(device)
    columns = torch.arange(width, device=device) + shifts[:, 1:].to(device)
    columns = torch.where(flips.to(device)[:, None], columns.flip(1), columns)
    inside = None
    if padding_mode == "reflect":
        if shifts.numel() and int(shifts.abs().max()) >= min(height, width):
            raise ValueError(f"`padding_mode` 'reflect' needs shifts below the image size {height}x{width}.")
        rows, columns = _reflect(rows, height), _reflect(columns, width)
    else:
        row_inside, column_inside = (rows >= 0) & (rows < height), (columns >= 0) & (columns < width)
        inside = (row_inside[:, :, None] & column_inside[:, None, :])[:, None]
        rows, columns = rows.clamp(0, height - 1), columns.clamp(0, width - 1)
    index = torch.arange(batch, device=device)[:, None, None, None]
    channel = torch.arange(channels, device=device)[None, :, None, None]
    moved = images[index, channel, rows[:, None, :, None], columns[:, None, None, :]]
    return moved if inside is None else moved * inside.to(moved.dtype)


def _reflect(index: Tensor, size: int) -> Tensor:
    return (size - 1) - ((size - 1) - index.abs()).abs()


class ImageBatches:
    """Training batches by number, from images in memory.

    The global batch of (epoch, step) holds `batch_size` images; process p of P gets every P-th of them, so that runs
    with different P see the same global batches. An epoch drops the images that do not fill its last batch; each epoch
    is shuffled anew, so they differ.

    Args:
        images: (N, C, H, W), uint8 or float in [0, 1]; batches live on its device.
        labels: (N,) int64.
        batch_size: images of one optimiser step, over all processes.
        crop_padding: largest shift of the random crop in pixels; 0 for none.
        crop_padding_mode: `zeros` or `reflect`.
        horizontal_flip: mirror half of the images.

    Raises:
        ValueError: no images, unequal lengths, a batch larger than the data, or invalid augmentation.
    """

    def __init__(
        self,
        images: Tensor,
        labels: Tensor,
        *,
        batch_size: int,
        seed: int = 0,
        crop_padding: int = 0,
        crop_padding_mode: str = "zeros",
        horizontal_flip: bool = False,
    ) -> None:
        if len(images) == 0 or len(images) != len(labels):
            raise ValueError(
                f"`images` ({len(images)}) and `labels` ({len(labels)}) must be equally many, at least one."
            )
        if not 0 < batch_size <= len(images):
            raise ValueError(f"`batch_size` must lie in 1..{len(images)} (the number of images), got {batch_size}.")
        if crop_padding < 0:
            raise ValueError(f"`crop_padding` must be >= 0, got {crop_padding}.")
        self.images, self.labels = images, labels
        self.batch_size = batch_size
        self.seed = seed
        self.crop_padding, self.crop_padding_mode = crop_padding, crop_padding_mode
        self.horizontal_flip = horizontal_flip
        self._drawn_epoch: int | None = None

    @property
    def steps_per_epoch(self) -> int:
        return len(self.images) // self.batch_size

    def batch(self, epoch: int, step: int, *, process_index: int = 0, num_processes: int = 1) -> tuple[Tensor, Tensor]:
        """Images (batch_size / P, C, H, W) float32 in [0, 1] and labels of one process's share of a global batch.

        Raises:
            ValueError: `step` outside the epoch, or a batch that the processes cannot share evenly.
        """
        if not 0 <= step < self.steps_per_epoch:
            raise ValueError(f"`step` must lie in 0..{self.steps_per_epoch - 1}, got {step}.")
        if self.batch_size % num_processes:
            raise ValueError(f"`batch_size` {self.batch_size} must be a multiple of the {num_processes} processes.")
        if self._drawn_epoch != epoch:
            self._draw(epoch)
        whole = self._order[step * self.batch_size : (step + 1) * self.batch_size]
        index = whole[process_index::num_processes]
        on_device = index.to(self.images.device)
        images, labels = self.images[on_device], self.labels[on_device]
        if self.crop_padding or self.horizontal_flip:
            shifts, flips = self._shifts[index], self._flips[index]
            images = crop_and_flip(images, shifts, flips, padding_mode=self.crop_padding_mode)
        return to_float_pixels(images), labels

    def _draw(self, epoch: int) -> None:
        size, reach = len(self.images), self.crop_padding
        self._order = torch.randperm(size, generator=epoch_generator(self.seed, epoch, "order"))
        generator = epoch_generator(self.seed, epoch, "augmentation")
        self._shifts = torch.randint(-reach, reach + 1, (size, 2), generator=generator)
        flips = torch.rand(size, generator=generator) < 0.5
        self._flips = flips if self.horizontal_flip else torch.zeros_like(flips)
        self._drawn_epoch = epoch
