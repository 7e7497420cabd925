# SPDX-License-Identifier: Apache-2.0
"""Evaluating the weights in a folder again, for results.json: where its figures are of other weights, or do not say of
which."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..checkpoints.stored_weights import stored_weights_sha256
from ..models.certificate import CERTIFICATE_NAME, LipschitzCertificate
from ..training.run_folder import write_json
from ..training.run_record import hardware, versions
from .check import rerun_evaluation
from .evaluations import RESULTS_NAME, read_evaluations
from .figures import Figure, read_json_object
from .reruns import Request, judge


# what is true of the run that made the weights, and of no others
_OF_TRAINING = (
    *("epochs", "stopped_early", "steps", "train_samples", "train_samples_seen", "train_samples_per_second"),
    *("train_tokens_seen", "seconds", "cpu_seconds", "num_processes", "device", "hardware", "command", "versions"),
    *("history", "layer_norm_estimates", "gamma"),
)

__all__ = ["EvaluatedAgain", "evaluate_again"]


@dataclass(frozen=True)
class EvaluatedAgain:
    """What `evaluate_again` did.

    Attributes:
        changed: (name, former value, value now) of the figures that are others now.
        same_run: whether the file still says how the weights were trained.
    """

    changed: list[tuple[str, float, float]]
    same_run: bool


def evaluate_again(
    folder: str | Path,
    *,
    data: str | None = None,
    device: str | None = None,
    batch_size: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> EvaluatedAgain:
    """Measure the figures of results.json again, on all examples, and write them with the hash of the weights.

    What the file says of the training stays only if it is of these weights: it has their hash, or it has none and all
    of its figures are reproduced. The machine, versions and seconds of this evaluation are added.

    Args:
        folder: with the model and its results.json.
        data: place of the data set, for where it is not as in the file.
        device: such as "cpu" or "cuda:0"; default: a GPU where there is one.
        batch_size: examples a forward pass.
        progress: called with the numbers of examples done and to do.

    Raises:
        FileNotFoundError: no results.json, or data that are not where they were.
        ValueError: damaged files, or data of another size.
    """
    place = Path(folder).expanduser()
    path = place / RESULTS_NAME
    if not path.is_file():
        raise FileNotFoundError(
            f"{place} has no {RESULTS_NAME}, which says what was evaluated: train with one of the scripts, or run "
            "`hf-lip certify`."
        )
    content = read_json_object(path)
    device = device or ("cuda:0" if torch.cuda.is_available() else "cpu")
    request = Request(data, device=device, batch_size=batch_size, progress=progress)
    digest, started = stored_weights_sha256(place), time.perf_counter()
    changed: list[tuple[str, float, float]] = []
    reproduced = True
    for evaluation in read_evaluations(place):
        if evaluation.file != RESULTS_NAME:
            continue
        rerun = rerun_evaluation(place, evaluation, request)
        named = {figure.key: figure for figure in evaluation.figures}
        for key, found in rerun.found.items():
            figure = named.get(key) or Figure("", ", ".join(key), 0.0, key)
            former = _replace(content, key, found.value)
            if former is not None and former != found.value:
                changed.append((figure.name, former, found.value))
        judgements = [judge(figure, rerun) for figure in evaluation.figures]
        reproduced &= all(judgement is not None and judgement.reproduced for judgement in judgements)
    stated = content.get("weights_sha256")
    same_run = stated == digest or (stated is None and reproduced)
    if not same_run:
        content = {name: value for name, value in content.items() if name not in _OF_TRAINING}
    if "lipschitz_constant" in content:
        holds = (place / CERTIFICATE_NAME).is_file()
        content["lipschitz_constant"] = LipschitzCertificate.load(place).lipschitz_constant if holds else None
    content["weights_sha256"] = digest
    content["evaluated_again"] = {
        "hardware": hardware(device, "float64" if "lipschitz_constant" in content else "float32"),
        "versions": versions(),
        "seconds": round(time.perf_counter() - started, 3),
    }
    write_json(path, content)
    return EvaluatedAgain(changed, same_run)


def _replace(content: dict[str, Any], key: tuple[str, ...], value: float) -> float | None:
    """Put a figure where the file has it; returns the former one, None where there is none."""
    part: Any = content
    for name in key[:-1]:
        if not isinstance(part, dict) or name not in part:
            return None
        part = part[name]
    if not isinstance(part, dict) or key[-1] not in part:
        return None
    former, part[key[-1]] = float(part[key[-1]]), value
    return former
