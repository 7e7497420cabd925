# SPDX-License-Identifier: Apache-2.0
"""Certified accuracy as an `evaluate` module: `evaluate.load(hf_lip.metric_path("certified_accuracy"))`."""

from collections.abc import Mapping
from typing import Any

import datasets
import evaluate

from hf_lip.metrics import certification_metrics


_DESCRIPTION = """
Certified accuracy: the share of images whose predicted class is right and cannot be changed by any change of the
pixels, in [0, 1], whose l2 norm is at most `eps`.
"""

_KWARGS_DESCRIPTION = """
Args:
    predictions: predicted classes, -1 for an abstention.
    references: true classes.
    radii: certified l2 radii in pixels of [0, 1], 0 for an abstention.
    eps: a radius; or a mapping of names to radii, by default 36/255, 72/255, 108/255 and 1.0.

Returns:
    For one radius `certified_accuracy`. For several `certified_accuracy_at_NAME` for each, `clean_accuracy`,
    `average_certified_radius` and `abstention_rate`.

Raises:
    ValueError: lists of different lengths or without entries, NaN, negative or infinite radii, classes that are no
        class numbers.
"""

_CITATION = """
@inproceedings{trockman2021orthogonalizing,
    title={Orthogonalizing Convolutional Layers with the Cayley Transform},
    author={Trockman, Asher and Kolter, J. Zico},
    booktitle={International Conference on Learning Representations},
    year={2021}
}
"""


class CertifiedAccuracy(evaluate.Metric):
    def _info(self) -> evaluate.MetricInfo:
        # float64 throughout: integers could not hold the NaN that is to be reported
        columns = {name: datasets.Value("float64") for name in ("predictions", "references", "radii")}
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_KWARGS_DESCRIPTION,
            features=datasets.Features(columns),
        )

    def _compute(
        self, predictions: Any, references: Any, radii: Any, eps: float | Mapping[str, float] | None = None
    ) -> dict[str, float]:
        if eps is None or isinstance(eps, Mapping):
            return certification_metrics(predictions, references, radii, eps)
        figures = certification_metrics(predictions, references, radii, {"eps": eps})
        return {"certified_accuracy": figures["certified_accuracy_at_eps"]}
