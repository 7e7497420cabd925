# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from torch.nn import functional as F

from hf_lip.training import ImageBatches, compact_pixels, crop_and_flip, epoch_generator, to_float_pixels


def numbered_images(count, size=4, channels=2):
    """Images whose every pixel tells which image it belongs to."""
    return (torch.arange(count) / count)[:, None, None, None].expand(count, channels, size, size).contiguous()


@pytest.mark.parametrize(("padding_mode", "torch_mode"), [("zeros", "constant"), ("reflect", "reflect")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.uint8], ids=["float32", "uint8"])
def test_crop_and_flip_equals_padding_and_slicing(padding_mode, torch_mode, dtype):
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(1, 256, (9, 3, 5, 7), generator=generator).to(dtype)
    shifts = torch.randint(-2, 3, (9, 2), generator=generator)
    flips = torch.rand(9, generator=generator) < 0.5
    assert flips.any()
    assert not flips.all()
    padded = F.pad(images.float(), (2, 2, 2, 2), mode=torch_mode)
    expected = []
    for image, (down, right), flip in zip(padded, shifts.tolist(), flips):
        crop = image[:, 2 + down : 7 + down, 2 + right : 9 + right]
        expected.append(crop.flip(-1) if flip else crop)
    moved = crop_and_flip(images, shifts, flips, padding_mode=padding_mode)
    assert moved.dtype == dtype
    torch.testing.assert_close(moved.float(), torch.stack(expected), rtol=0, atol=0)


def test_crop_and_flip_refuses_what_it_cannot_pad():
    images, flips = torch.zeros(1, 1, 3, 3), torch.tensor([False])
    with pytest.raises(ValueError, match="`padding_mode`"):
        crop_and_flip(images, torch.zeros(1, 2, dtype=torch.int64), flips, padding_mode="replicate")
    with pytest.raises(ValueError, match="shifts below the image size"):
        crop_and_flip(images, torch.tensor([[3, 0]]), flips, padding_mode="reflect")


def test_compact_pixels_is_lossless():
    from_bytes = torch.arange(256).reshape(1, 1, 16, 16).float() / 255
    assert compact_pixels(from_bytes).dtype == torch.uint8
    assert torch.equal(to_float_pixels(compact_pixels(from_bytes)), from_bytes)
    sixteenths = torch.arange(16).reshape(1, 1, 4, 4) / 16
    assert compact_pixels(sixteenths) is sixteenths


def test_epoch_generator_depends_on_every_argument():
    def draw(*arguments):
        return torch.randint(2**31, (1,), generator=epoch_generator(*arguments)).item()

    draws = [draw(0, 0, "order"), draw(1, 0, "order"), draw(0, 1, "order"), draw(0, 0, "crop"), draw(10, 1, "order")]
    assert len(set(draws)) == 5
    assert draw(0, 1, "order") == draws[2]


class TestImageBatches:
    def make(self, count=22, batch_size=6, **kwargs):
        return ImageBatches(numbered_images(count), torch.arange(count), batch_size=batch_size, **kwargs)

    def test_an_epoch_shows_no_image_twice_and_labels_follow_images(self):
        batches = self.make()
        assert batches.steps_per_epoch == 3
        seen = []
        for step in range(3):
            images, labels = batches.batch(0, step)
            torch.testing.assert_close(images[:, 0, 0, 0], labels / 22)
            seen += labels.tolist()
        assert len(set(seen)) == 18

    def test_epochs_and_seeds_are_shuffled_anew(self):
        orders = [
            tuple(batches.batch(epoch, 0)[1].tolist())
            for batches in (self.make(seed=0), self.make(seed=1))
            for epoch in (0, 1)
        ]
        assert len(set(orders)) == 4

    def test_any_order_of_asking_gives_the_same_batches(self):
        first, second = (self.make(seed=3, crop_padding=1, horizontal_flip=True) for _ in range(2))
        forward = {(e, s): first.batch(e, s) for e in range(2) for s in range(3)}
        for (epoch, step), (images, labels) in reversed(forward.items()):
            again = second.batch(epoch, step)
            assert torch.equal(again[0], images)
            assert torch.equal(again[1], labels)

    def test_processes_share_the_global_batch(self):
        batches = self.make(crop_padding=1, horizontal_flip=True)
        images, labels = batches.batch(1, 2)
        parts = [batches.batch(1, 2, process_index=rank, num_processes=2) for rank in range(2)]
        for rank, (part_images, part_labels) in enumerate(parts):
            assert torch.equal(part_images, images[rank::2])
            assert torch.equal(part_labels, labels[rank::2])

    def test_augmentation_moves_and_flips_at_random(self):
        ramp = torch.arange(64.0).reshape(1, 1, 8, 8).expand(200, 1, 8, 8) / 64
        batches = ImageBatches(ramp, torch.zeros(200, dtype=torch.int64), batch_size=200, crop_padding=1)
        images, _ = batches.batch(0, 0)
        # nine shifts, each an image of its own
        assert len(torch.unique(images.flatten(1), dim=0)) == 9
        batches = ImageBatches(ramp, torch.zeros(200, dtype=torch.int64), batch_size=200, horizontal_flip=True)
        mirrored = (batches.batch(0, 0)[0][:, 0, 0, 0] > 0).float().mean().item()
        assert 0.35 < mirrored < 0.65

    def test_bytes_come_out_as_floats(self):
        batches = ImageBatches(torch.full((2, 1, 2, 2), 255, dtype=torch.uint8), torch.zeros(2).long(), batch_size=2)
        images, _ = batches.batch(0, 0)
        assert images.dtype == torch.float32
        assert torch.equal(images, torch.ones(2, 1, 2, 2))

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"batch_size": 23}, "`batch_size` must lie in 1..22"),
            ({"batch_size": 0}, "`batch_size`"),
            ({"crop_padding": -1}, "`crop_padding`"),
        ],
    )
    def test_bad_arguments_are_named(self, change, message):
        with pytest.raises(ValueError, match=message):
            self.make(**change)

    def test_uneven_shares_and_steps_outside_the_epoch_are_errors(self):
        with pytest.raises(ValueError, match="multiple of the 4 processes"):
            self.make().batch(0, 0, num_processes=4)
        with pytest.raises(ValueError, match="`step`"):
            self.make().batch(0, 3)
        with pytest.raises(ValueError, match="equally many"):
            ImageBatches(numbered_images(3), torch.arange(2), batch_size=1)
