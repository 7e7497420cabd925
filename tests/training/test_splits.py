# SPDX-License-Identifier: Apache-2.0
import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from hf_lip.training import to_float_pixels
from hf_lip.training.splits import Split, read_split


def image_dataset(size=(6, 6), names=("cat", "dog", "eel"), count=9):
    generator = np.random.default_rng(0)
    images = [Image.fromarray(generator.integers(0, 256, (*size, 3), dtype=np.uint8)) for _ in range(count)]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=list(names))})
    labels = [index % len(names) for index in range(count)]
    return datasets.Dataset.from_dict({"image": images, "label": labels}, features=features)


def test_bytes_are_kept_exactly():
    dataset = image_dataset()
    split = read_split(dataset, ["cat", "dog", "eel"], num_channels=3, image_size=6, progress=False)
    assert split.images.dtype == torch.uint8
    first = torch.from_numpy(np.asarray(dataset[0]["image"]).copy()).permute(2, 0, 1)
    assert torch.equal(split.images[0], first)
    assert split.labels.tolist() == [0, 1, 2] * 3


def test_labels_are_numbered_by_the_names_of_the_model():
    split = read_split(image_dataset(), ["eel", "ant", "dog", "cat"], num_channels=3, image_size=6, progress=False)
    assert split.labels.tolist() == [3, 2, 0] * 3
    with pytest.raises(ValueError, match=r"\['eel'\] are not among the 2 classes"):
        read_split(image_dataset(), ["cat", "dog"], num_channels=3, image_size=6, progress=False)


def test_a_class_without_images_may_be_unknown():
    dataset = image_dataset().filter(lambda row: row["label"] < 2)
    assert len(read_split(dataset, ["cat", "dog"], num_channels=3, image_size=6, progress=False).labels) == 6


def test_limit_takes_a_random_part_by_seed():
    names = ["cat", "dog", "eel"]

    def subset(seed, limit=4):
        options = {"num_channels": 3, "image_size": 6, "progress": False}
        return read_split(image_dataset(), names, limit=limit, seed=seed, **options).images

    assert len(subset(0)) == 4
    assert torch.equal(subset(0), subset(0))
    assert any(not torch.equal(subset(0), subset(seed)) for seed in (1, 2))
    assert len(subset(0, limit=100)) == 9


def test_other_sizes_are_an_error_unless_resized():
    dataset = image_dataset(size=(8, 6))
    names = dataset.features["label"].names
    with pytest.raises(ValueError, match="8x6 pixels, expected 6x6"):
        read_split(dataset, names, num_channels=3, image_size=6, progress=False)
    split = read_split(dataset, names, num_channels=1, image_size=4, resize=True, progress=False)
    expected = dataset[0]["image"].convert("L").resize((4, 4), Image.Resampling.BILINEAR)
    assert torch.equal(split.images[0, 0], torch.from_numpy(np.asarray(expected).copy()))
    assert split.labels.tolist() == [0, 1, 2] * 3


def test_hold_out_splits_without_overlap():
    numbers = torch.arange(10.0)[:, None, None, None] / 10
    held_out, rest = Split(numbers, torch.arange(10), ["x"] * 10).hold_out(0.3, seed=0)
    assert len(held_out.labels) == 3
    assert sorted(held_out.labels.tolist() + rest.labels.tolist()) == list(range(10))
    assert torch.equal(held_out.images[:, 0, 0, 0] * 10, held_out.labels.float())
    with pytest.raises(ValueError, match="empty part"):
        Split(numbers, torch.arange(10), ["x"] * 10).hold_out(0.01, seed=0)


@pytest.mark.parametrize("as_bytes", [False, True], ids=["float32", "uint8"])
def test_channel_means(as_bytes):
    images = torch.randint(0, 256, (1500, 2, 3, 3), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    split = Split(images if as_bytes else images / 255, torch.zeros(1500), ["x"])
    expected = to_float_pixels(images).double().mean(dim=(0, 2, 3)).tolist()
    assert split.channel_means() == pytest.approx(expected, abs=6e-7)
