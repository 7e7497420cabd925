# SPDX-License-Identifier: Apache-2.0
"""Metrics of certified classification as plain functions on arrays, in float64.

`radii` (N,) are certified l2 radii in pixels of [0, 1] (NaN: no certificate), `correct` (N,) says whether the
prediction is the label. An abstention is passed as `correct = False` and radius 0, as in Cohen et al. 2019.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray


# the radii at which deterministic certificates are compared since Trockman and Kolter 2021
STANDARD_RADII: dict[str, float] = {"36/255": 36 / 255, "72/255": 72 / 255, "108/255": 108 / 255, "1.0": 1.0}

__all__ = [
    "STANDARD_RADII",
    "abstention_rate",
    "average_certified_radius",
    "certified_accuracy",
    "certified_accuracy_curve",
    "certified_accuracy_envelope",
    "evaluate_metric",
    "probability_distribution",
]


def certified_accuracy(radii: ArrayLike, correct: ArrayLike, eps: float) -> float:
    """Fraction of all images that are `correct` with `radii > eps`, strictly: a ball is open at its radius.

    At `eps = 0` an image with radius exactly 0 does not count; clean accuracy is the mean of `correct`. A NaN radius
    counts as not certified.

    Raises:
        ValueError: empty or unequal arrays, negative or infinite radii, `eps` negative or not finite.
    """
    radius, right = _validated(radii, correct)
    threshold = float(eps)
    if not np.isfinite(threshold) or threshold < 0:
        raise ValueError(f"`eps` must be a finite radius >= 0 (l2, pixels in [0, 1]), got {eps}.")
    # a comparison with NaN is False: no certificate
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
    certified = np.sort(radius[right & ~np.isnan(radius)])
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


def evaluate_metric(eps: Mapping[str, float] | None = None) -> Any:
    """The metrics of this module as an `evaluate.Metric`, for `add_batch(predictions=, references=, radii=)`.

    `compute()` returns `clean_accuracy`, `certified_accuracy_at_NAME` for every entry of `eps` (by default
    `STANDARD_RADII`), `average_certified_radius` and `abstention_rate`. A prediction of -1 is an abstention.

    Raises:
        ImportError: evaluate is not installed.
    """
    import datasets
    import evaluate

    thresholds = dict(STANDARD_RADII if eps is None else eps)

    class CertifiedAccuracy(evaluate.Metric):
        def _info(self) -> Any:
            kinds = {"predictions": "int64", "references": "int64", "radii": "float64"}
            return evaluate.MetricInfo(
                description=evaluate_metric.__doc__ or "",
                citation="",
                features=datasets.Features({name: datasets.Value(kind) for name, kind in kinds.items()}),
            )

        def _compute(self, predictions: Any, references: Any, radii: Any) -> dict[str, float]:
            correct = np.asarray(predictions) == np.asarray(references)
            return {
                "clean_accuracy": float(correct.mean()),
                **{f"certified_accuracy_at_{k}": certified_accuracy(radii, correct, v) for k, v in thresholds.items()},
                "average_certified_radius": average_certified_radius(radii, correct),
                "abstention_rate": abstention_rate(np.asarray(predictions) == -1),
            }

    return CertifiedAccuracy()


def average_certified_radius(radii: ArrayLike, correct: ArrayLike) -> float:
    """ACR of Zhai et al. 2020: mean over all images of radius * 1[correct]; a NaN radius counts as 0.

    Raises:
        ValueError: as `certified_accuracy`.
    """
    radius, right = _validated(radii, correct)
    return float(np.mean(np.where(right & ~np.isnan(radius), radius, 0.0)))


def abstention_rate(abstained: ArrayLike) -> float:
    """Fraction of images on which the certifier abstained; `abstained` (N,) holds booleans.

    Raises:
        ValueError: empty array.
    """
    flags = np.asarray(abstained).reshape(-1).astype(bool)
    if flags.size == 0:
        raise ValueError("`abstained` is empty: certify at least one image.")
    return float(np.mean(flags))


def _validated(radii: ArrayLike, correct: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    radius = np.asarray(radii, dtype=np.float64).reshape(-1)
    right = np.asarray(correct).reshape(-1)
    if radius.size == 0:
        raise ValueError("`radii` is empty: certify at least one image.")
    if right.size != radius.size:
        raise ValueError(f"`radii` and `correct` must be equally long, got {radius.size} and {right.size}.")
    if np.any(radius < 0) or np.any(np.isinf(radius)):
        raise ValueError("`radii` must be finite and >= 0; give abstentions radius 0 and `correct = False`.")
    return radius, right.astype(bool)
