# SPDX-License-Identifier: Apache-2.0
"""Image classification data sets with columns `image` and `label`, and images as tensors in [0, 1]."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from rich.progress import track
from torch import Tensor


# `datasets` brings pandas and pyarrow: imported where it is used, so that importing the package stays quick
if TYPE_CHECKING:
    import datasets


_IMAGE_NAMES = ("image", "img", "images", "pixel_values")
_LABEL_NAMES = ("label", "labels")
_SPLIT_NAMES = ("train", "test", "validation")
_IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
# (P, 1): stored in another way, same colours; every other change of channels alters what a radius speaks of
_EXACT_CONVERSIONS = {"P": "RGB", "1": "L"}

__all__ = ["dataset_to_tensors", "image_to_tensor", "load_image_dataset"]


def load_image_dataset(
    source: str | Path,
    split: str,
    *,
    image_column: str | None = None,
    label_column: str | None = None,
    name: str | None = None,
) -> "datasets.Dataset":
    """One split of an image classification data set, columns renamed to `image` and `label` (a `ClassLabel`).

    Other columns are kept. Integer labels become a `ClassLabel` named by their number, strings one sorted by name.

    Args:
        source: one of
            - `"digits"`: scikit-learn's 1,797 digits, stratified 75/25 split with seed 0 (450 test images), pixels
              exactly value/16 as an (8, 8) float32 array;
            - a folder with parquet files named by split (`train-*.parquet`, `test-*`, `validation-*`), or a single
              parquet file (its split is the one its name says, else `train`);
            - a folder written by `save_to_disk`;
            - a folder of images, one subfolder a class (`imagefolder`, optionally `train/`, `test/` above it);
            - the id of a data set on the Hugging Face Hub.
        split: `train`, `test`, `validation`, or another split the source has.
        image_column: column with the images; by default the only image column, or one named `image` or `img`.
        label_column: column with the labels; by default `label`, `labels`, or the only `ClassLabel` column.
        name: configuration of a Hub data set.

    Raises:
        FileNotFoundError: `source` looks like a path that does not exist, or a folder without images or parquet.
        ValueError: unknown source, missing split or column (those present are listed), labels absent or outside
            their classes, empty data set.
    """
    dataset = _load_split(str(source), split, name)
    if len(dataset) == 0:
        raise ValueError(f"The split {split!r} of `source` {str(source)!r} is empty: choose a split with images.")
    image_column = _find_image_column(dataset, image_column)
    label_column = _find_label_column(dataset, label_column)
    dataset = _rename(_rename(dataset, image_column, "image"), label_column, "label")
    return _with_class_label(dataset)


def image_to_tensor(
    image: Any, *, image_size: int | tuple[int, int] | None = None, num_channels: int | None = None
) -> Tensor:
    """One image as a float32 tensor (C, H, W) in [0, 1].

    uint8 pixels are divided by 255; floating point pixels must already lie in [0, 1]. Arrays and tensors may be
    (C, H, W), (H, W, C) or (H, W); where both ends could be the channels they are read as (C, H, W).

    Args:
        image: a PIL image, an array, a tensor or nested lists of floats.
        image_size: expected height and width; no image is resized here.
        num_channels: expected number of channels; no channel is added or dropped here.

    Raises:
        TypeError: not an image, or integers other than uint8.
        ValueError: wrong shape, size or channels, pixels outside [0, 1], NaN or infinite pixels.
    """
    pixels = _channels_first(image, num_channels)
    if 0 in pixels.shape:
        raise ValueError(f"`image` has no pixels (shape {tuple(pixels.shape)}).")
    if num_channels is not None and pixels.shape[0] != num_channels:
        remedy = " (for a PIL image: image.convert('RGB') or image.convert('L'))" if num_channels in (1, 3) else ""
        raise ValueError(
            f"`image` has {pixels.shape[0]} channels (shape {tuple(pixels.shape)}), expected {num_channels}: "
            f"convert it first{remedy}."
        )
    if image_size is not None:
        size = (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)
        if tuple(pixels.shape[1:]) != size:
            raise ValueError(
                f"`image` is {pixels.shape[1]}x{pixels.shape[2]} pixels, expected {size[0]}x{size[1]}: resize or crop "
                "it first; radii then are in units of the resized pixels."
            )
    if pixels.dtype == np.uint8:
        return torch.from_numpy(np.ascontiguousarray(pixels, dtype=np.float32)) / 255.0
    return torch.from_numpy(_checked_floats(pixels))


def dataset_to_tensors(
    dataset: "datasets.Dataset",
    *,
    image_size: int | tuple[int, int],
    num_channels: int,
    limit: int | None = None,
    progress: bool = True,
) -> tuple[Tensor, Tensor]:
    """A data set of `load_image_dataset` in memory: images (N, C, H, W) float32 in [0, 1] and labels (N,) int64.

    Args:
        limit: take the first `limit` images only.

    Raises:
        ValueError: as `image_to_tensor`, with the position of the image; `limit` below 1.
    """
    for column in ("image", "label"):
        if column not in dataset.column_names:
            raise ValueError(
                f"`dataset` has no column {column!r}, only {dataset.column_names}: use load_image_dataset"
            )
    if limit is not None:
        if limit < 1:
            raise ValueError(f"`limit` must be at least 1, got {limit}.")
        dataset = dataset.select(range(min(limit, len(dataset))))
    images = []
    rows = dataset.select_columns(["image"])
    for index, row in enumerate(track(rows, "Reading images", disable=not progress, transient=True)):
        try:
            images.append(image_to_tensor(row["image"], image_size=image_size, num_channels=num_channels))
        except (TypeError, ValueError) as error:
            raise type(error)(f"image {index}: {error}") from error
    if not images:
        raise ValueError("`dataset` is empty: there is no image to read.")
    return torch.stack(images), torch.from_numpy(_labels(dataset).astype(np.int64))


def _load_split(source: str, split: str, name: str | None) -> "datasets.Dataset":
    import datasets

    if source == "digits":
        return _load_digits(split)
    path = Path(source).expanduser()
    if path.exists():
        return _load_local(path, split)
    if path.is_absolute() or source.startswith((".", "~")) or path.suffix == ".parquet" or source.count("/") > 1:
        raise FileNotFoundError(f"`source` {source!r} does not exist: check the path.")
    try:
        return datasets.load_dataset(source, name, split=split)
    except (datasets.exceptions.DatasetNotFoundError, ConnectionError) as error:
        raise ValueError(
            f"Unknown `source` {source!r}: not 'digits', not a local file or folder, not found on the Hub ({error})."
        ) from error
    except ValueError as error:
        # an unknown split or configuration; the message of datasets lists those present
        raise ValueError(f"`source` {source!r}, `split` {split!r}: {error}") from error


def _load_digits(split: str) -> "datasets.Dataset":
    _require_split("digits", split, ("train", "test"))
    import datasets

    try:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split
    except ImportError as error:
        raise ImportError('The digits data need scikit-learn: pip install "hf_lip[demo]".') from error
    digits = load_digits()
    labels = digits.target.astype(np.int64)
    train, test = train_test_split(np.arange(len(labels)), test_size=0.25, random_state=0, stratify=labels)
    rows = train if split == "train" else test
    features = datasets.Features(
        {
            "image": datasets.Array2D(shape=(8, 8), dtype="float32"),
            "label": datasets.ClassLabel(names=[str(digit) for digit in range(10)]),
        }
    )
    # sixteenths are exact in float32; 8-bit images would round them
    pixels = (digits.images[rows] / 16.0).astype(np.float32)
    dataset = datasets.Dataset.from_dict({"image": pixels, "label": labels[rows]}, features=features)
    return dataset.with_format("numpy", columns=["image"], output_all_columns=True)


def _load_local(path: Path, split: str) -> "datasets.Dataset":
    import datasets

    if path.is_file():
        if path.suffix != ".parquet":
            raise ValueError(f"`source` {str(path)!r} is a file but not parquet: give a .parquet file or a folder.")
        return _load_parquet(path, [path], split)
    if (path / "dataset_dict.json").exists():
        splits = datasets.load_from_disk(str(path))
        _require_split(str(path), split, tuple(splits))
        return splits[split]
    if (path / "state.json").exists():
        dataset = datasets.load_from_disk(str(path))
        _require_split(str(path), split, (str(dataset.split) if dataset.split is not None else "train",))
        return dataset
    files = sorted(path.glob("*.parquet")) or sorted(path.glob("data/*.parquet"))
    if files:
        return _load_parquet(path, files, split)
    if not any(file.suffix.lower() in _IMAGE_SUFFIXES for file in path.rglob("*")):
        raise FileNotFoundError(
            f"`source` {str(path)!r} holds no parquet file, no image and no data set written by save_to_disk."
        )
    splits = datasets.load_dataset("imagefolder", data_dir=str(path))
    _require_split(str(path), split, tuple(splits))
    return splits[split]


def _load_parquet(source: Path, files: list[Path], split: str) -> "datasets.Dataset":
    import datasets

    by_split: dict[str, list[str]] = {}
    for file in files:
        found = re.match(rf"({'|'.join(_SPLIT_NAMES)})(?![A-Za-z0-9])", file.stem)
        if found is None and len(files) > 1:
            raise ValueError(
                f"Cannot tell the split of {file.name!r} in `source` {str(source)!r}: name the files train-*.parquet, "
                "test-*.parquet and validation-*.parquet, or give one file."
            )
        by_split.setdefault(found.group(1) if found else "train", []).append(str(file))
    _require_split(str(source), split, tuple(by_split))
    try:
        return datasets.load_dataset("parquet", data_files={split: by_split[split]}, split=split)
    except (ValueError, datasets.exceptions.DatasetGenerationError) as error:
        if "corresponds to no data" in str(error):
            raise ValueError(
                f"The split {split!r} of `source` {str(source)!r} is empty: choose a split with images."
            ) from error
        raise ValueError(
            f"Cannot read {', '.join(by_split[split])} as parquet ({error.__cause__ or error}): fetch the file again."
        ) from error


def _require_split(source: str, split: str, present: Sequence[str]) -> None:
    if split not in present:
        raise ValueError(f"`source` {source!r} has no split {split!r}: its splits are {sorted(present)}.")


def _find_image_column(dataset: "datasets.Dataset", column: str | None) -> str:
    import datasets

    if column is not None:
        if column not in dataset.column_names:
            raise ValueError(
                f"`image_column` {column!r} is not in the data set, its columns are {dataset.column_names}"
            )
        return column
    typed = [key for key, feature in dataset.features.items() if isinstance(feature, datasets.Image)]
    if len(typed) == 1:
        return typed[0]
    named = [key for key in _IMAGE_NAMES if key in dataset.column_names]
    if not named:
        raise ValueError(f"No image column found among {dataset.column_names}: name it with `image_column`.")
    return named[0]


def _find_label_column(dataset: "datasets.Dataset", column: str | None) -> str:
    import datasets

    if column is not None:
        if column not in dataset.column_names:
            raise ValueError(
                f"`label_column` {column!r} is not in the data set, its columns are {dataset.column_names}"
            )
        return column
    named = [key for key in _LABEL_NAMES if key in dataset.column_names]
    typed = [key for key, feature in dataset.features.items() if isinstance(feature, datasets.ClassLabel)]
    if named:
        return named[0]
    if len(typed) == 1:
        return typed[0]
    raise ValueError(f"The data set has no labels: no label column among {dataset.column_names}. Use `label_column`.")


def _rename(dataset: "datasets.Dataset", column: str, target: str) -> "datasets.Dataset":
    if column == target:
        return dataset
    if target in dataset.column_names:
        dataset = dataset.remove_columns(target)
    return dataset.rename_column(column, target)


def _with_class_label(dataset: "datasets.Dataset") -> "datasets.Dataset":
    import datasets

    feature = dataset.features["label"]
    if isinstance(feature, datasets.ClassLabel):
        num_classes = feature.num_classes
    elif isinstance(feature, datasets.Value) and feature.dtype in ("string", "large_string"):
        if any(label is None for label in dataset["label"]):
            raise ValueError("Some labels are absent (None): drop those rows, or use a labelled split.")
        return dataset.class_encode_column("label")
    elif isinstance(feature, datasets.Value) and "int" in feature.dtype:
        num_classes = max(int(_labels(dataset).max()) + 1, 1)
    else:
        raise ValueError(f"Labels must be class numbers or strings, the column 'label' is {feature}.")
    labels = _labels(dataset)
    wrong = np.flatnonzero((labels < 0) | (labels >= num_classes))
    if wrong.size:
        raise ValueError(
            f"Unknown label {int(labels[wrong[0]])} at row {int(wrong[0])}: labels must lie in 0..{num_classes - 1} "
            "(-1 marks a split published without labels)."
        )
    if not isinstance(feature, datasets.ClassLabel):
        names = [str(label) for label in range(num_classes)]
        dataset = dataset.cast_column("label", datasets.ClassLabel(names=names))
    return dataset


def _labels(dataset: "datasets.Dataset") -> np.ndarray:
    labels = dataset.select_columns(["label"]).with_format("arrow")[:]["label"].to_pylist()
    if any(label is None for label in labels):
        raise ValueError("Some labels are absent (None): drop those rows, or use a labelled split.")
    return np.asarray(labels)


def _channels_first(image: Any, num_channels: int | None) -> np.ndarray:
    if isinstance(image, Image.Image):
        pixels = np.asarray(image.convert(_EXACT_CONVERSIONS.get(image.mode, image.mode)))
        pixels = pixels[None] if pixels.ndim == 2 else np.moveaxis(pixels, 2, 0)
    elif isinstance(image, Tensor):
        pixels = image.detach().cpu().to(torch.float32 if image.is_floating_point() else image.dtype).numpy()
    elif isinstance(image, (np.ndarray, list, tuple)):
        pixels = np.asarray(image)
    else:
        raise TypeError(f"`image` must be a PIL image, an array or a tensor, got {type(image).__name__}.")
    if pixels.dtype != np.uint8 and not np.issubdtype(pixels.dtype, np.floating):
        raise TypeError(
            f"`image` holds {pixels.dtype} pixels: pass uint8 in 0..255, or floating point pixels in [0, 1] "
            "(divide by the largest possible value)."
        )
    if pixels.ndim not in (2, 3):
        raise ValueError(
            f"`image` must have shape (C, H, W), (H, W, C) or (H, W), got {tuple(pixels.shape)}: "
            "pass one image at a time, or a list of images."
        )
    if pixels.ndim == 2:
        return pixels[None]
    wanted = (1, 3, 4) if num_channels is None else (num_channels,)
    # an image with the wrong channels is told so, in the layout that it most probably has
    for channels in (wanted, (1, 2, 3, 4)):
        if pixels.shape[0] not in channels and pixels.shape[2] in channels:
            return np.moveaxis(pixels, 2, 0)
        if pixels.shape[0] in channels:
            break
    return pixels


def _checked_floats(pixels: np.ndarray) -> np.ndarray:
    if not np.all(np.isfinite(pixels)):
        raise ValueError("`image` has NaN or infinite pixels: repair it before certifying.")
    low, high = float(pixels.min()), float(pixels.max())
    if low < 0.0 or high > 1.0:
        raise ValueError(
            f"`image` has pixels in [{low:g}, {high:g}], outside [0, 1]: scale to [0, 1] (or pass uint8) "
            "and do not normalise, the model does."
        )
    # a copy: the tensor must not share memory with the caller's array
    return np.array(pixels, dtype=np.float32, order="C")
