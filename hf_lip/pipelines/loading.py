# SPDX-License-Identifier: Apache-2.0
"""What the front ends load before they certify: the pipeline, and a data set in the model's classes."""

from pathlib import Path
from typing import Any

from transformers import pipeline

from hf_lip.data.images import load_image_dataset
from hf_lip.pipelines.settings import CertifySettings


__all__ = ["calibration_images", "chosen_indices", "load_certify_pipeline", "load_labelled_images"]


def load_certify_pipeline(
    model: str, device: str | None, settings: dict[str, Any], *, revision: str | None = None
) -> Any:
    """`pipeline("certify")` for a folder or Hub id, with call defaults that are checked before anything is loaded.

    Args:
        revision: of the Hub repository: branch, tag or commit, from which model and image processor come.

    Raises:
        FileNotFoundError: `model` looks like a path that does not exist.
        ValueError, TypeError: settings out of range, a revision of a folder.
        ValueError, OSError: what `from_pretrained` says, such as weights that do not fit their certificate.
    """
    CertifySettings.from_arguments(settings)
    if not Path(model).exists() and (model.startswith((".", "/", "~")) or model.count("/") > 1):
        raise FileNotFoundError(f"`MODEL` {model!r} does not exist: give the folder of a checkpoint, or a Hub id.")
    if revision is not None and Path(model).exists():
        raise ValueError(f"`--revision` {revision!r} is of a Hub repository, and {model!r} is a folder: leave it out.")
    source = {} if revision is None else {"revision": revision}
    build: Any = pipeline
    return build("certify", model=model, device=device, **source, **settings)


def load_labelled_images(
    data: str, split: str, config: Any, *, name: str | None, image_column: str | None, label_column: str | None
) -> tuple[Any, list[int]]:
    """A data set with a column `image`, and its labels as the model numbers its classes.

    Raises:
        ValueError: labels beyond the model's classes; else as `load_image_dataset`.
    """
    dataset = load_image_dataset(data, split, image_column=image_column, label_column=label_column, name=name)
    labels = [int(label) for label in dataset["label"]]
    names = list(dataset.features["label"].names)
    model_names = [str(config.id2label.get(number, number)) for number in range(config.num_labels)]
    if names != model_names and sorted(names) == sorted(model_names):
        # the same classes in another order: the names say which is which
        labels = [model_names.index(names[label]) for label in labels]
    if max(labels) >= config.num_labels:
        raise ValueError(
            f"Unknown label {max(labels)}: the model has {config.num_labels} classes, the data set {len(names)}; "
            "choose data of the model's classes."
        )
    return dataset.select_columns(["image"]), labels


def chosen_indices(num_images: int, stride: int, limit: int | None) -> list[int]:
    """Every `stride`-th image, at most `limit` of them.

    Raises:
        ValueError: a number below 1.
    """
    for option, value in (("stride", stride), ("limit", limit)):
        if value is not None and value < 1:
            raise ValueError(f"`--{option}` must be at least 1, got {value}.")
    return list(range(0, num_images, stride))[:limit]


def calibration_images(data: str, split: str, count: int, **columns: str | None) -> list[Any]:
    """`count` images evenly spread over a split, or all of it if it has fewer. Errors as `load_image_dataset`."""
    dataset = load_image_dataset(data, split, **columns)
    return list(dataset.select(range(0, len(dataset), max(1, len(dataset) // count)))["image"])[:count]
