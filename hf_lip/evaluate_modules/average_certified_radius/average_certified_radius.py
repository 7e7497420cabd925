# SPDX-License-Identifier: Apache-2.0
"""The ACR as an `evaluate` module: `evaluate.load(hf_lip.metric_path("average_certified_radius"))`."""

from typing import Any

import datasets
import evaluate

from hf_lip.metrics import certification_metrics


_DESCRIPTION = """
Average certified radius (ACR): the mean over all images of the certified radius, 0 where the predicted class is wrong.
Read it beside certified accuracies: a few images with large radii can make any ACR (arXiv 2410.06895).
"""

_KWARGS_DESCRIPTION = """
Args:
    predictions: predicted classes, -1 for an abstention.
    references: true classes.
    radii: certified l2 radii in pixels of [0, 1], 0 for an abstention.

Returns:
    `average_certified_radius`, in the unit of the radii.

Raises:
    ValueError: lists of different lengths or without entries, NaN, negative or infinite radii, classes that are no
        class numbers.
"""

_CITATION = """
@inproceedings{zhai2020macer,
    title={MACER: Attack-free and Scalable Robust Training via Maximizing Certified Radius},
    author={Zhai, Runtian and Dan, Chen and He, Di and Zhang, Huan and Gong, Boqing and Ravikumar, Pradeep and
        Hsieh, Cho-Jui and Wang, Liwei},
    booktitle={International Conference on Learning Representations},
    year={2020}
}
"""


class AverageCertifiedRadius(evaluate.Metric):
    def _info(self) -> evaluate.MetricInfo:
        # float64 throughout: integers could not hold the NaN that is to be reported
        columns = {name: datasets.Value("float64") for name in ("predictions", "references", "radii")}
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_KWARGS_DESCRIPTION,
            features=datasets.Features(columns),
        )

    def _compute(self, predictions: Any, references: Any, radii: Any) -> dict[str, float]:
        figures = certification_metrics(predictions, references, radii, {})
        return {"average_certified_radius": figures["average_certified_radius"]}
