# SPDX-License-Identifier: Apache-2.0
"""Exact match by depth as an `evaluate` module: `evaluate.load(hf_lip.metric_path("entity_tracking_exact_match"))`."""

from typing import Any

import datasets
import evaluate

from hf_lip.tracking_metrics import entity_tracking_exact_match


_DESCRIPTION = """
Exact match of entity tracking: the share of right answers, of all, of every depth (number of state changes or of
hops), and the share of whole states, such as all boxes of a world after a step.
"""

_KWARGS_DESCRIPTION = """
Args:
    predictions: answers, as texts or as token ids (a number or a list of numbers a sequence).
    references: the right answers, of the same form; token ids of -100 are no answers and do not count.
    depths: depth of every answer, integers of the form of `references`, -1 for none.
    states: the state that each answer belongs to, any hashable names.
    kind: `equal`, or for Boxes `contents`: answers such as "contains the cup and the map" are compared as sets.

Returns:
    `exact_match`; with `depths` also `exact_match_at_depth_D` for each depth; with `states` `whole_state_accuracy`.

Raises:
    ValueError: lists of different lengths or without an answer, missing entries or NaN, depths that are no integers.
"""

_CITATION = """
@inproceedings{fagnou2024chain,
    title={Chain and Causal Attention for Efficient Entity Tracking},
    author={Fagnou, Erwan and Caillon, Paul and Delattre, Blaise and Allauzen, Alexandre},
    booktitle={Empirical Methods in Natural Language Processing},
    year={2024}
}
"""


class EntityTrackingExactMatch(evaluate.Metric):
    def _info(self) -> evaluate.MetricInfo:
        # float64 for ids: integers could not hold the NaN that is to be reported
        ids = datasets.Value("float64")
        kinds = (datasets.Value("string"), ids, datasets.List(ids))
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_KWARGS_DESCRIPTION,
            features=[datasets.Features({"predictions": kind, "references": kind}) for kind in kinds],
        )

    def compute(self, *, predictions: Any = None, references: Any = None, **kwargs: Any) -> dict[str, float] | None:
        """As `evaluate.Metric.compute`, with an error for no predictions."""
        # evaluate chooses among the forms by the first entry
        if predictions is not None and len(predictions) == 0:
            raise ValueError("`predictions` is empty: there is no answer to compare.")
        return super().compute(predictions=predictions, references=references, **kwargs)

    def _compute(
        self, predictions: Any, references: Any, depths: Any = None, states: Any = None, kind: str = "equal"
    ) -> dict[str, float]:
        answers: Any = kind
        return entity_tracking_exact_match(predictions, references, depths=depths, states=states, kind=answers)
