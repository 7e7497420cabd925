# SPDX-License-Identifier: Apache-2.0
"""Metrics of certified classification as plain functions on arrays, in float64.

`radii` (N,) are certified l2 radii in pixels of [0, 1], `correct` (N,) says whether the prediction is the label. An
image without a certificate has radius 0, an abstention is moreover not correct, as in Cohen et al. 2019. NaN is an
error everywhere: it is what a diverged model computes.

`compute_certification_metrics` is for `transformers.Trainer(compute_metrics=...)`; `metric_path` gives the folders for
`evaluate.load`.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray


# the radii at which deterministic certificates are compared since Trockman and Kolter 2021
STANDARD_RADII: dict[str, float] = {"36/255": 36 / 255, "72/255": 72 / 255, "108/255": 108 / 255, "1.0": 1.0}

_MODULES = Path(__file__).parent / "evaluate_modules"

__all__ = [
    "STANDARD_RADII",
    "abstention_rate",
    "average_certified_radius",
    "certification_metrics",
    "certified_accuracy",
    "certified_accuracy_curve",
    "certified_accuracy_envelope",
    "compute_certification_metrics",
    "metric_path",
    "probability_distribution",
]


def certified_accuracy(radii: ArrayLike, correct: ArrayLike, eps: float) -> float:
    """Fraction of all images that are `correct` with `radii > eps`, strictly: a ball is open at its radius.

    At `eps = 0` an image with radius exactly 0 does not count; clean accuracy is the mean of `correct`.

    Raises:
        ValueError: empty or unequal arrays, radii that are NaN, infinite or negative, `correct` that is neither True
            nor False, `eps` negative or not finite.
    """
    radius, right = _validated(radii, correct)
    threshold = float(eps)
    if not np.isfinite(threshold) or threshold < 0:
        raise ValueError(f"`eps` must be a finite radius >= 0 (l2, pixels in [0, 1]), got {eps}.")
    return float(np.mean(right & (radius > threshold)))


def certified_accuracy_curve(
    radii: ArrayLike, correct: ArrayLike, eps: ArrayLike | None = None
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Certified accuracy as a function of the radius.

    Args:
        eps: radii (M,) at which to evaluate; by default the exact corners of the step function, that is 0 and every
            distinct radius of a correct image.

    Returns:
        `(eps, accuracy)`, both (M,) float64.

    Raises:
        ValueError: as `certified_accuracy`.
    """
    radius, right = _validated(radii, correct)
    certified = np.sort(radius[right])
    if eps is None:
        grid = np.unique(np.concatenate([[0.0], certified]))
    else:
        grid = np.asarray(eps, dtype=np.float64).reshape(-1)
        if grid.size == 0 or not np.all(np.isfinite(grid)) or np.any(grid < 0):
            raise ValueError("`eps` must hold finite radii >= 0 (l2, pixels in [0, 1]) and not be empty.")
    above = certified.size - np.searchsorted(certified, grid, side="right")
    return grid, above / radius.size


def certified_accuracy_envelope(
    runs: Mapping[Any, tuple[ArrayLike, ArrayLike]], eps: ArrayLike | None = None
) -> tuple[NDArray[np.float64], NDArray[np.float64], list[Any]]:
    """Best of several runs at every radius, such as one run for every sigma: the usual table of smoothing papers.

    No classifier has this curve: which run is best differs from radius to radius. Compare it with envelopes only.

    Args:
        runs: name -> (radii, correct), on the same images.
        eps: radii (M,); by default 0 and every distinct radius of a correct image.

    Returns:
        `(eps, accuracy, names)`: (M,), (M,) and the name of the best run at each radius, the first of equals.

    Raises:
        ValueError: as `certified_accuracy_curve`; no runs, or runs with different numbers of images.
    """
    sizes = {name: np.asarray(correct).size for name, (_, correct) in runs.items()}
    if not runs or len(set(sizes.values())) > 1:
        raise ValueError(f"`runs` must hold runs on the same images, got numbers of images {sizes}.")
    if eps is None:
        eps = np.unique(np.concatenate([certified_accuracy_curve(*run)[0] for run in runs.values()]))
    curves = [certified_accuracy_curve(radii, correct, eps) for radii, correct in runs.values()]
    accuracies = np.stack([accuracy for _, accuracy in curves])
    names = list(runs)
    return curves[0][0], accuracies.max(axis=0), [names[best] for best in accuracies.argmax(axis=0)]


def probability_distribution(p_lower: ArrayLike, num_bins: int = 20) -> dict[str, Any]:
    """How the lower bounds of the class probabilities pA (N,) are spread: report it beside the ACR.

    Rare images with probabilities near 1 can make any ACR (arXiv 2410.06895); the distribution shows them.

    Returns:
        `edges` (num_bins + 1,) and `shares` (num_bins,) of a histogram over [0, 1], `quantiles` {"0.1": ..., "0.9"}.

    Raises:
        ValueError: an empty array, values outside [0, 1] or NaN, `num_bins` below 1.
    """
    values = np.asarray(p_lower, dtype=np.float64).reshape(-1)
    if values.size == 0 or not np.all((values >= 0.0) & (values <= 1.0)):
        raise ValueError("`p_lower` must hold probabilities in [0, 1] and not be empty.")
    if num_bins < 1:
        raise ValueError(f"`num_bins` must be at least 1, got {num_bins}.")
    counts, edges = np.histogram(values, bins=num_bins, range=(0.0, 1.0))
    tenths = [tenth / 10 for tenth in range(1, 10)]
    return {
        "edges": edges.tolist(),
        "shares": (counts / values.size).tolist(),
        "quantiles": {str(share): float(np.quantile(values, share)) for share in tenths},
    }


def average_certified_radius(radii: ArrayLike, correct: ArrayLike) -> float:
    """ACR of Zhai et al. 2020: mean over all images of radius * 1[correct].

    Raises:
        ValueError: as `certified_accuracy`.
    """
    radius, right = _validated(radii, correct)
    return float(np.mean(np.where(right, radius, 0.0)))


def abstention_rate(abstained: ArrayLike) -> float:
    """Fraction of images on which the certifier abstained; `abstained` (N,) holds booleans.

    Raises:
        ValueError: empty array, or values that are neither True nor False.
    """
    flags = _booleans("abstained", abstained)
    if flags.size == 0:
        raise ValueError("`abstained` is empty: certify at least one image.")
    return float(np.mean(flags))


def certification_metrics(
    predictions: ArrayLike, references: ArrayLike, radii: ArrayLike, eps: Mapping[str, float] | None = None
) -> dict[str, float]:
    """All figures of a table of certified accuracy.

    Args:
        predictions: class of each image (N,), -1 for an abstention.
        references: true class (N,).
        radii: certified radii (N,); 0 for abstentions.
        eps: name -> radius of the certified accuracies; by default `STANDARD_RADII`.

    Returns:
        `clean_accuracy`, `certified_accuracy_at_NAME` for every entry of `eps`, `average_certified_radius` and
        `abstention_rate`.

    Raises:
        ValueError: as `certified_accuracy`; classes that are NaN or no integers, or references below 0.
    """
    guesses, truths = _classes("predictions", predictions), _classes("references", references)
    if guesses.size != truths.size:
        raise ValueError(f"`predictions` and `references` must be equally long, got {guesses.size} and {truths.size}.")
    if truths.size and truths.min() < 0:
        raise ValueError(f"`references` holds {truths.min()}: every image needs its class, a number >= 0.")
    correct = guesses == truths
    thresholds = STANDARD_RADII if eps is None else eps
    return {
        # first, as it checks that there is something to average
        "average_certified_radius": average_certified_radius(radii, correct),
        "clean_accuracy": float(correct.mean()),
        **{f"certified_accuracy_at_{name}": certified_accuracy(radii, correct, at) for name, at in thresholds.items()},
        "abstention_rate": abstention_rate(guesses == -1),
    }


def compute_certification_metrics(eval_prediction: Any) -> dict[str, float]:
    """`compute_metrics` of `transformers.Trainer` for image classifiers with a certificate, at `STANDARD_RADII`.

    ```python
    Trainer(model=LipschitzVisionForImageClassification(config), compute_metrics=compute_certification_metrics, ...)
    ```

    Args:
        eval_prediction: its `predictions` are the model's outputs `(logits (N, classes), certified_radius (N,), ...)`,
            its `label_ids` the classes (N,).

    Returns:
        As [`certification_metrics`]; `Trainer` puts `eval_` before the names.

    Raises:
        ValueError: outputs without radii, NaN logits, else as [`certification_metrics`].
    """
    outputs = eval_prediction.predictions
    if not isinstance(outputs, (tuple, list)) or len(outputs) < 2 or np.ndim(outputs[1]) != 1:
        raise ValueError(
            "`predictions` hold no radii: `compute_certification_metrics` is for models with a certificate "
            "(LipschitzVisionForImageClassification); for others use accuracy, and certify by smoothing."
        )
    logits = np.asarray(outputs[0])
    if logits.ndim != 2 or np.isnan(logits).any():
        raise ValueError(
            f"`logits` must be (N, classes) without NaN, got shape {logits.shape}: has training diverged?"
        )
    return certification_metrics(logits.argmax(axis=1), eval_prediction.label_ids, outputs[1])


def metric_path(name: str) -> str:
    """Folder of one of this package's metrics for `evaluate.load`, which then needs no network.

    ```python
    metric = evaluate.load(hf_lip.metric_path("certified_accuracy"))
    metric.compute(predictions=[3, 1], references=[3, 2], radii=[0.4, 0.1], eps=0.25)  # {"certified_accuracy": 0.5}
    ```

    Args:
        name: `certified_accuracy`, `average_certified_radius` or `entity_tracking_exact_match`.

    Raises:
        ValueError: another name.
    """
    names = sorted(path.stem for path in _MODULES.glob("*/*.py"))
    if name not in names:
        raise ValueError(f"Unknown metric {name!r}: the metrics of hf_lip are {', '.join(names)}.")
    return str(_MODULES / name)


def _validated(radii: ArrayLike, correct: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    radius = np.asarray(radii, dtype=np.float64).reshape(-1)
    right = _booleans("correct", correct)
    if radius.size == 0:
        raise ValueError("`radii` is empty: certify at least one image.")
    if right.size != radius.size:
        raise ValueError(f"`radii` and `correct` must be equally long, got {radius.size} and {right.size}.")
    if not np.all((radius >= 0) & (radius < math.inf)):
        place = int(np.flatnonzero(~((radius >= 0) & (radius < math.inf)))[0])
        raise ValueError(
            f"`radii` must be finite and >= 0, got {radius[place]} at entry {place}; give abstentions radius 0 and "
            "`correct = False`."
        )
    return radius, right


def _booleans(name: str, values: ArrayLike) -> NDArray[np.bool_]:
    given = np.asarray(values).reshape(-1)
    # bool(NaN) is True
    if given.dtype != bool and given.size and not np.isin(given, (0, 1)).all():
        raise ValueError(f"`{name}` must hold True or False, got {given[~np.isin(given, (0, 1))][0]}.")
    return given.astype(bool)


def _classes(name: str, values: ArrayLike) -> NDArray[np.int64]:
    given = np.asarray(values).reshape(-1)
    numbers = given.astype(np.float64) if given.dtype.kind in "iuf" else np.full(given.shape, math.nan)
    wrong = np.flatnonzero(~(numbers == np.round(numbers)) | (numbers < -1) | np.isinf(numbers))
    if wrong.size:
        raise ValueError(f"`{name}` has {given.tolist()[wrong[0]]} at entry {wrong[0]}, which is no class number.")
    return numbers.astype(np.int64)
