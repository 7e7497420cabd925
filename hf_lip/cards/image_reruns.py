# SPDX-License-Identifier: Apache-2.0
"""Evaluating an image classifier again: as the training script did, and as `hf-lip certify` did."""

import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ..data.images import image_to_tensor, load_image_dataset
from ..pipelines.job import CertifyJob
from ..pipelines.loading import load_certify_pipeline
from ..pipelines.transforms import pixel_transform
from ..smoothing.settings import SOFT_METHODS
from ..training.augment import to_float_pixels
from ..training.noise import noisy_pixels
from ..training.splits import Split, read_split
from .figures import Evaluation, radius_of, take
from .reruns import Request, Rerun, data_named, evenly_spread, found_in


# a network in float32 on another machine: one image in a thousand may fall on the other side of a decision
_FLOAT32 = 0.001
# smoothing: so may votes, and with them the radius of an image
_SMOOTHED = 0.01
_IMAGES_PER_BATCH = 256
_OWN_SIZES = ("lipschitz_vision", "cifar_resnet")
_GRID = re.compile(r"exact, grid 1/(\d+),")

__all__ = ["rerun_certification", "rerun_classifier"]


def rerun_classifier(folder: Path, evaluation: Evaluation, request: Request) -> Rerun:
    """The final evaluation of train_image_classifier.py.

    Raises:
        FileNotFoundError, ValueError: the data are not where they were, or are others.
    """
    arguments = take(evaluation.content, ("arguments",), evaluation.file)
    pipe = load_certify_pipeline(str(folder), request.device, {})
    split, positions, total = _read(pipe.model, evaluation, arguments, request)
    columns = _measure(pipe, split, positions, evaluation, request, int(arguments.get("seed") or 0))
    certified = hasattr(pipe.model, "certify")
    examples = f"{len(positions):,} of {total:,} images" if len(positions) < total else f"all {total:,} images"
    # certificates come with float64, logits under noise do not
    wider: dict[tuple[str, ...], float] = {("noisy_accuracy",): _FLOAT32}
    return Rerun(found_in(columns), len(positions) == total, 0.0 if certified else _FLOAT32, examples, wider)


def rerun_certification(folder: Path, evaluation: Evaluation, request: Request) -> Rerun:
    """`hf-lip certify` or scripts/certify.py, with the same settings, seed and images.

    Raises:
        FileNotFoundError, ValueError: the data are not where they were, or are others; or the run was of other
            weights, or with a denoiser, which its summary does not hold.
    """
    content, settings = evaluation.content, take(evaluation.content, ("settings",), evaluation.file)
    smoothed = settings.get("sigma") is not None
    images = take(content, ("images",), evaluation.file)
    chosen = evenly_spread(images, request)
    columns = {name: settings.get(name) for name in ("name", "image_column", "label_column")}
    job = CertifyJob(
        model=str(folder),
        settings=_smoothing_arguments(settings, evaluation.file) if smoothed else {"method": "lipschitz"},
        source={"data": request.data or content["data"], "split": content["split"], **columns},
        batch_size=request.batch_size or (settings.get("batch_size") if smoothed else None),
        device=request.device,
    )
    with data_named(evaluation):
        job.settings.setdefault("score_map", None)
        job.load()
    if max(images) >= len(job.indices):
        raise ValueError(
            f"The data have {len(job.indices):,} images, {evaluation.file} is of image {max(images)} too: give the "
            "data it was measured on with `--data`."
        )
    job.indices = chosen
    with tempfile.TemporaryDirectory() as log:
        records = job.run(Path(log), progress=request.progress)
    assert records is not None
    used = job.used_settings.get("weights_sha256")
    if used != settings.get("weights_sha256"):
        raise ValueError(
            f"{evaluation.file} is of weights with sha256 {settings.get('weights_sha256')}, those in {folder} have "
            f"{used}: certify these weights."
        )
    right = np.array([record.correct for record in records])
    found: dict[tuple[str, ...], NDArray] = {
        ("clean_accuracy",): right,
        ("abstention_rate",): np.array([record.predict == -1 for record in records]),
    }
    if "certified_accuracy" in content:
        radii = np.array([record.radius for record in records], dtype=np.float64)
        found |= _certified_columns(right, radii, evaluation)
    complete = len(chosen) == len(images)
    examples = f"all {len(images):,} images" if complete else f"{len(chosen):,} of {len(images):,} images"
    return Rerun(found_in(found), complete, _SMOOTHED if smoothed else 0.0, examples)


def _read(
    model: Any, evaluation: Evaluation, arguments: Mapping[str, Any], request: Request
) -> tuple[Split, list[int], int]:
    """The chosen images, their positions in the evaluation, and how many images it had."""
    columns: dict[str, Any] = {name: arguments.get(name) for name in ("image_column", "label_column")}
    with data_named(evaluation):
        source = request.data or take(arguments, ("dataset",), evaluation.file)
        dataset = load_image_dataset(source, evaluation.split, name=arguments.get("dataset_config"), **columns)
    subset = arguments.get("max_eval_samples")
    total = len(dataset) if subset is None else min(int(subset), len(dataset))
    count = evaluation.figures[0].count
    if total != count:
        raise ValueError(
            f"The data have {total:,} images, {evaluation.file} is of {count:,}: give the data it was measured on "
            f"({evaluation.data!r}) with `--data`."
        )
    positions = evenly_spread(range(total), request)
    if subset is None:
        dataset = dataset.select(positions)
    channels, height, _ = image_to_tensor(dataset[0]["image"]).shape
    own = model.config.model_type in _OWN_SIZES
    size = model.config.image_size if own else arguments.get("image_size") or height
    split = read_split(
        dataset,
        [model.config.id2label[label] for label in range(model.config.num_labels)],
        num_channels=getattr(model.config, "num_channels", channels),
        image_size=size,
        resize=own or arguments.get("image_size") is not None or arguments.get("num_channels") is not None,
        limit=subset,
        seed=int(arguments.get("seed") or 0),
        progress=False,
    )
    if subset is not None:
        split = Split(split.images[positions], split.labels[positions], split.names)
    return split, positions, total


@torch.no_grad()
def _measure(
    pipe: Any, split: Split, positions: list[int], evaluation: Evaluation, request: Request, seed: int
) -> dict[tuple[str, ...], NDArray]:
    """One entry an image for every figure of the evaluation."""
    model, transform = pipe.model.eval(), pixel_transform(pipe.image_processor)
    certified = "certified_accuracy" in evaluation.content
    sd = evaluation.content.get("noise_sd")
    right, noisy_right, radii = [], [], []
    size = request.batch_size or _IMAGES_PER_BATCH
    for start in range(0, len(positions), size):
        part = slice(start, start + size)
        pixels = to_float_pixels(split.images[part]).to(model.device)
        labels = split.labels[part].to(model.device)
        output = model(pixel_values=transform(pixels))
        right.append((output.logits.argmax(dim=-1) == labels).cpu())
        if certified:
            radii.append(output.certified_radius.cpu())
        if sd is not None:
            noisy = transform(noisy_pixels(pixels, torch.tensor(positions[part]), sd=sd, seed=seed))
            plain = {"output_certified_radius": False} if hasattr(model, "certify") else {}
            noisy_right.append((model(pixel_values=noisy, **plain).logits.argmax(dim=-1) == labels).cpu())
        if request.progress is not None:
            request.progress(min(start + size, len(positions)), len(positions))
    columns: dict[tuple[str, ...], NDArray] = {("clean_accuracy",): torch.cat(right).numpy()}
    if noisy_right:
        columns["noisy_accuracy",] = torch.cat(noisy_right).numpy()
    if certified:
        columns |= _certified_columns(columns["clean_accuracy",], torch.cat(radii).numpy(), evaluation)
    return columns


def _certified_columns(right: NDArray, radii: NDArray, evaluation: Evaluation) -> dict[tuple[str, ...], NDArray]:
    columns: dict[tuple[str, ...], NDArray] = {
        ("certified_accuracy", name): right & (radii > radius_of(name))
        for name in evaluation.content["certified_accuracy"]
    }
    columns["average_certified_radius",] = np.where(right, radii, 0.0)
    return columns


def _smoothing_arguments(settings: Mapping[str, Any], file: str) -> dict[str, Any]:
    """Arguments of the pipeline from the settings that a run wrote down."""
    base = str(take(settings, ("base",), file))
    if "denoised by" in base:
        raise ValueError(f"{file} is of a run with a denoiser ({base}), which is not part of the model: not checked.")
    names = ("method", "mode", "sigma", "n0", "n", "alpha", "seed", "budget", "rtol", "target_radius", "randomized")
    arguments = {name: take(settings, (name,), file) for name in names}
    lipschitz_aware = settings.get("lipschitz") is not None
    grid = _GRID.match(str(settings.get("noise")))
    return {
        **arguments,
        "score_map": settings["score_map"] if arguments["method"] in SOFT_METHODS else None,
        "lipschitz_aware": lipschitz_aware,
        "sound_noise": int(grid[1]) if grid else False,
        "dtype": None if lipschitz_aware else base.partition(",")[0],
        "compile": "compiled" in base,
    }
