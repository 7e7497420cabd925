# SPDX-License-Identifier: Apache-2.0
import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

from hf_lip.data import dataset_to_tensors, image_to_tensor, load_image_dataset


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    # generated arrow files go into the test's folder
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def png_rows(num_rows, mode="RGB", size=6, seed=0):
    rng = np.random.default_rng(seed)
    shape = (size, size, 3) if mode == "RGB" else (size, size)
    return [Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8)) for _ in range(num_rows)]


def make_dataset(num_rows=4, image="img", label="label", labels=None, feature=None):
    feature = datasets.ClassLabel(names=["cat", "dog"]) if feature is None else feature
    labels = [row % 2 for row in range(num_rows)] if labels is None else labels
    features = datasets.Features({image: datasets.Image(), label: feature, "idx": datasets.Value("int32")})
    rows = {image: png_rows(num_rows), label: labels, "idx": list(range(num_rows))}
    return datasets.Dataset.from_dict(rows, features=features)


# digits


def test_digits_split_is_fixed_and_stratified():
    train, test = load_image_dataset("digits", "train"), load_image_dataset("digits", "test")
    assert (len(train), len(test)) == (1347, 450)
    # from scikit-learn's split with seed 0
    assert list(test["label"])[:8] == [2, 0, 4, 9, 4, 1, 2, 4]
    counts = np.bincount(test["label"], minlength=10)
    assert counts.min() >= 43
    assert counts.max() <= 46
    assert test.features["label"].names == [str(digit) for digit in range(10)]


def test_digits_pixels_are_exact_sixteenths():
    images, labels = dataset_to_tensors(
        load_image_dataset("digits", "test"), image_size=8, num_channels=1, progress=False
    )
    assert images.shape == (450, 1, 8, 8)
    assert images.dtype == torch.float32
    assert labels.dtype == torch.int64
    assert torch.equal((images * 16).round() / 16, images)
    assert (images.min().item(), images.max().item()) == (0.0, 1.0)
    every = {tuple((row / 16).astype(np.float32).ravel()) for row in load_digits().images}
    assert all(tuple(image.ravel().tolist()) in every for image in images[:20])


def test_digits_keep_their_floats_through_save_to_disk(tmp_path):
    load_image_dataset("digits", "test").select(range(5)).save_to_disk(tmp_path / "saved")
    saved = datasets.load_from_disk(tmp_path / "saved")
    expected, _ = dataset_to_tensors(
        load_image_dataset("digits", "test"), image_size=8, num_channels=1, limit=5, progress=False
    )
    images, _ = dataset_to_tensors(saved, image_size=8, num_channels=1, progress=False)
    assert torch.equal(images, expected)


# files


def test_parquet_folder_by_file_names(tmp_path):
    dataset = make_dataset(6)
    dataset.select(range(4)).to_parquet(tmp_path / "train-00000-of-00002.parquet")
    dataset.select(range(4, 5)).to_parquet(tmp_path / "train-00001-of-00002.parquet")
    dataset.select(range(5, 6)).to_parquet(tmp_path / "test-00000-of-00001.parquet")
    train, test = load_image_dataset(tmp_path, "train"), load_image_dataset(str(tmp_path), "test")
    assert (len(train), len(test)) == (5, 1)
    assert set(train.column_names) == {"image", "label", "idx"}
    assert train.features["label"].names == ["cat", "dog"]
    assert list(train["idx"]) == [0, 1, 2, 3, 4]
    images, labels = dataset_to_tensors(train, image_size=6, num_channels=3, progress=False)
    assert torch.equal(images[1], torch.from_numpy(np.asarray(png_rows(2)[1]).transpose(2, 0, 1) / np.float32(255)))
    assert labels.tolist() == [0, 1, 0, 1, 0]


def test_one_parquet_file_is_the_split_of_its_name(tmp_path):
    make_dataset().to_parquet(tmp_path / "test-00000-of-00001.parquet")
    make_dataset().to_parquet(tmp_path / "flowers.parquet")
    assert len(load_image_dataset(tmp_path / "test-00000-of-00001.parquet", "test")) == 4
    with pytest.raises(ValueError, match=r"no split 'train': its splits are \['test'\]"):
        load_image_dataset(tmp_path / "test-00000-of-00001.parquet", "train")
    assert len(load_image_dataset(tmp_path / "flowers.parquet", "train")) == 4


def test_saved_dataset_and_dataset_dict(tmp_path):
    make_dataset().save_to_disk(tmp_path / "one")
    datasets.DatasetDict(train=make_dataset(4), test=make_dataset(2)).save_to_disk(tmp_path / "many")
    assert len(load_image_dataset(tmp_path / "one", "train")) == 4
    assert len(load_image_dataset(tmp_path / "many", "test")) == 2
    with pytest.raises(ValueError, match=r"no split 'validation': its splits are \['test', 'train'\]"):
        load_image_dataset(tmp_path / "many", "validation")


def test_imagefolder(tmp_path):
    for split in ("train", "test"):
        for number, image in enumerate(png_rows(4)):
            folder = tmp_path / split / ("cat" if number % 2 else "dog")
            folder.mkdir(parents=True, exist_ok=True)
            image.save(folder / f"{number}.png")
    dataset = load_image_dataset(tmp_path, "test")
    assert dataset.features["label"].names == ["cat", "dog"]
    images, labels = dataset_to_tensors(dataset, image_size=6, num_channels=3, progress=False)
    assert images.shape == (4, 3, 6, 6)
    assert labels.tolist() == [0, 0, 1, 1]


@pytest.mark.parametrize(
    ("feature", "labels", "names"),
    [
        (datasets.Value("int64"), [0, 2, 1, 0], ["0", "1", "2"]),
        (datasets.Value("string"), ["b", "a", "b", "c"], ["a", "b", "c"]),
    ],
    ids=["integers", "strings"],
)
def test_labels_become_classes(tmp_path, feature, labels, names):
    make_dataset(labels=labels, feature=feature).to_parquet(tmp_path / "train.parquet")
    dataset = load_image_dataset(tmp_path, "train")
    assert dataset.features["label"].names == names
    assert [names[label] for label in dataset["label"]] == [str(label) for label in labels]


def test_columns_by_name(tmp_path):
    make_dataset(image="photo", label="kind").to_parquet(tmp_path / "train.parquet")
    dataset = load_image_dataset(tmp_path, "train", image_column="photo", label_column="kind")
    assert {"image", "label"} <= set(dataset.column_names)
    # the sole image column and the sole class column are found without help
    assert load_image_dataset(tmp_path, "train").column_names == dataset.column_names


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"source": "/no/such/folder"}, FileNotFoundError, "does not exist"),
        ({"source": "digits", "split": "validation"}, ValueError, r"splits are \['test', 'train'\]"),
        ({"split": "test"}, ValueError, r"splits are \['train'\]"),
        ({"image_column": "photo"}, ValueError, r"`image_column` 'photo'.*\['img', 'label', 'idx'\]"),
        ({"label_column": "kind"}, ValueError, "`label_column` 'kind'"),
    ],
    ids=["path", "digits-split", "split", "image-column", "label-column"],
)
def test_bad_arguments(tmp_path, arguments, error, message):
    make_dataset().to_parquet(tmp_path / "train.parquet")
    with pytest.raises(error, match=message):
        load_image_dataset(**{"source": tmp_path, "split": "train", **arguments})


def test_bad_files(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="no parquet file, no image"):
        load_image_dataset(tmp_path / "empty", "train")
    (tmp_path / "data.csv").write_text("a,b\n")
    with pytest.raises(ValueError, match="not parquet"):
        load_image_dataset(tmp_path / "data.csv", "train")
    for name in ("a", "b"):
        make_dataset().to_parquet(tmp_path / "empty" / f"{name}.parquet")
    with pytest.raises(ValueError, match="Cannot tell the split of"):
        load_image_dataset(tmp_path / "empty", "train")


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        (make_dataset().remove_columns("label"), "no labels"),
        (make_dataset().remove_columns("img"), "No image column"),
        (make_dataset(labels=[0, 1, None, 0]), "absent"),
        (make_dataset(labels=[0, -1, 1, 0]), "Unknown label -1 at row 1"),
        (make_dataset(labels=[0.5, 1.0, 0.0, 0.0], feature=datasets.Value("float32")), "class numbers or strings"),
        (make_dataset(labels=["a", None, "b", "a"], feature=datasets.Value("string")), "absent"),
    ],
    ids=["no-labels", "no-images", "none", "minus-one", "floats", "none-string"],
)
def test_bad_contents(tmp_path, dataset, message):
    dataset.save_to_disk(tmp_path / "saved")
    with pytest.raises(ValueError, match=message):
        load_image_dataset(tmp_path / "saved", "train")


def test_empty_split(tmp_path):
    make_dataset(0).to_parquet(tmp_path / "train.parquet")
    with pytest.raises(ValueError, match="is empty"):
        load_image_dataset(tmp_path, "train")


def test_damaged_parquet(tmp_path):
    make_dataset().to_parquet(tmp_path / "train.parquet")
    content = (tmp_path / "train.parquet").read_bytes()
    (tmp_path / "train.parquet").write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match="fetch the file again"):
        load_image_dataset(tmp_path, "train")


def test_unknown_hub_id_is_a_clear_error(monkeypatch):
    def not_found(*args, **kwargs):
        raise datasets.exceptions.DatasetNotFoundError("Dataset 'owner/nothing' doesn't exist on the Hub")

    monkeypatch.setattr(datasets, "load_dataset", not_found)
    with pytest.raises(ValueError, match="Unknown `source` 'owner/nothing'"):
        load_image_dataset("owner/nothing", "train")


# images


@pytest.mark.parametrize(
    ("image", "shape"),
    [
        (Image.new("RGB", (5, 4)), (3, 4, 5)),
        (Image.new("L", (5, 4)), (1, 4, 5)),
        (Image.new("P", (5, 4)), (3, 4, 5)),
        (Image.new("1", (5, 4)), (1, 4, 5)),
        (np.zeros((4, 5), dtype=np.uint8), (1, 4, 5)),
        (np.zeros((8, 9, 3), dtype=np.uint8), (3, 8, 9)),
        (np.zeros((3, 4, 5)), (3, 4, 5)),
        (torch.zeros(3, 4, 5), (3, 4, 5)),
        (torch.zeros(8, 9, 1, dtype=torch.bfloat16), (1, 8, 9)),
        ([[0.0, 0.5], [1.0, 0.25]], (1, 2, 2)),
    ],
    ids=["RGB", "L", "P", "1", "HW", "HWC", "CHW", "tensor", "bf16-HWC", "lists"],
)
def test_kinds_of_images(image, shape):
    tensor = image_to_tensor(image)
    assert tuple(tensor.shape) == shape
    assert tensor.dtype == torch.float32


def test_pixel_values():
    values = np.arange(256, dtype=np.uint8).reshape(16, 16)
    assert torch.equal(image_to_tensor(values)[0], torch.arange(256.0).reshape(16, 16) / 255)
    floats = np.random.default_rng(0).random((3, 4, 4))
    assert np.array_equal(image_to_tensor(floats).numpy(), floats.astype(np.float32))


def test_the_tensor_is_a_copy():
    array = np.full((1, 2, 2), 0.5, dtype=np.float32)
    image_to_tensor(array).zero_()
    assert array.min() == 0.5


@pytest.mark.parametrize(
    ("image", "arguments", "error", "message"),
    [
        (np.full((1, 2, 2), np.nan), {}, ValueError, "NaN or infinite"),
        (torch.full((1, 2, 2), torch.inf), {}, ValueError, "NaN or infinite"),
        (np.full((1, 2, 2), 1.5), {}, ValueError, r"pixels in \[1.5, 1.5\], outside \[0, 1\]"),
        (torch.full((1, 2, 2), -0.01), {}, ValueError, r"outside \[0, 1\]"),
        (np.zeros((1, 2, 2), dtype=np.int64), {}, TypeError, "int64"),
        (np.zeros((2, 1, 2, 2)), {}, ValueError, "one image at a time"),
        (np.zeros((1, 0, 2)), {}, ValueError, "no pixels"),
        (Image.new("RGB", (4, 4)), {"num_channels": 1}, ValueError, "3 channels.*expected 1.*convert"),
        (Image.new("L", (4, 4)), {"num_channels": 3}, ValueError, "1 channels.*expected 3.*convert"),
        (Image.new("RGBA", (9, 9)), {"num_channels": 3}, ValueError, "4 channels"),
        (Image.new("RGB", (4, 5)), {"image_size": 4}, ValueError, "5x4 pixels, expected 4x4: resize"),
        (np.zeros((1, 4, 4)), {"image_size": (4, 6)}, ValueError, "4x4 pixels, expected 4x6"),
        (Image.new("I;16", (4, 4)), {}, TypeError, "uint16"),
        (object(), {}, TypeError, "must be a PIL image"),
    ],
)
def test_bad_images(image, arguments, error, message):
    with pytest.raises(error, match=message):
        image_to_tensor(image, **arguments)


def test_errors_of_a_data_set_name_the_image(tmp_path):
    dataset = make_dataset(image="image")
    with pytest.raises(ValueError, match="image 0: `image` is 6x6 pixels, expected 8x8"):
        dataset_to_tensors(dataset, image_size=8, num_channels=3, progress=False)
    with pytest.raises(ValueError, match="`limit`"):
        dataset_to_tensors(dataset, image_size=6, num_channels=3, limit=0, progress=False)
    with pytest.raises(ValueError, match="load_image_dataset"):
        dataset_to_tensors(make_dataset(), image_size=6, num_channels=3, progress=False)
    images, _ = dataset_to_tensors(dataset, image_size=6, num_channels=3, limit=3)
    assert len(images) == 3
