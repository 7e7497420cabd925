# SPDX-License-Identifier: Apache-2.0
"""Metrics of entity tracking as plain functions: exact match, by depth, and of whole states.

Predictions and references are equally long sequences of texts, or token ids of one shape, such as (B, n), where
a reference of -100 says that there is no answer. Depths are `numops`, `implicit_hops`, `num_state_changes` or the
`hops` of every token; -1 says that an answer has none.
"""

from collections.abc import Hashable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from hf_lip.data.box_world import parse_contents


_IGNORED = -100

__all__ = [
    "DepthScore",
    "compute_tracking_metrics",
    "entity_tracking_exact_match",
    "exact_match",
    "exact_match_by_depth",
    "exact_matches",
    "minimal_layers",
    "predicted_tokens",
    "whole_state_accuracy",
]


@dataclass(frozen=True)
class DepthScore:
    """Share of right answers among `num_examples` of one depth."""

    accuracy: float
    num_examples: int


def exact_matches(
    predictions: Any, references: Any, *, kind: Literal["equal", "contents"] = "equal"
) -> NDArray[np.bool_]:
    """Which predictions are right, (N,); entries whose reference is -100 are left out.

    Args:
        kind: `equal`: token ids, or texts, whose outer and repeated spaces do not matter. `contents`: the answers of
            Boxes, "contains the cup and the map", compared as sets of objects ("is empty" and "contains nothing" are
            the empty set); a prediction of another form is wrong.

    Raises:
        ValueError: nothing to compare, unequal lengths or shapes, an entry that is missing (None, NaN) or is neither
            text nor integer, texts against ids, an unknown kind, or a reference of `contents` that is no such answer.
    """
    return _compared(predictions, references, kind)[0]


def exact_match(predictions: Any, references: Any, *, kind: Literal["equal", "contents"] = "equal") -> float:
    """Share of right answers; as `exact_matches`, which see for the arguments and the errors."""
    return float(np.mean(exact_matches(predictions, references, kind=kind)))


def exact_match_by_depth(
    predictions: Any, references: Any, depths: Any, *, kind: Literal["equal", "contents"] = "equal"
) -> dict[int, DepthScore]:
    """Share of right answers of every depth that occurs, the smallest first.

    Args:
        depths: integers >= -1, of the shape of `references`.
        predictions, references, kind: as for `exact_matches`.

    Raises:
        ValueError: as `exact_matches`, and for depths of another length, NaN, fractions or numbers below -1.
    """
    right, answered = _compared(predictions, references, kind)
    numbers = np.asarray(depths if hasattr(depths, "__array__") else list(depths))
    if numbers.shape != answered.shape:
        raise ValueError(f"`depths` must have the shape of `references` {answered.shape}, got {numbers.shape}.")
    numbers = _integers("depths", numbers)[answered]
    if np.any(numbers < -1):
        raise ValueError(f"`depths` must be >= -1 (-1: none), got {int(numbers.min())}.")
    return {
        int(depth): DepthScore(float(np.mean(right[numbers == depth])), int(np.sum(numbers == depth)))
        for depth in np.unique(numbers)
    }


def whole_state_accuracy(
    predictions: Any,
    references: Any,
    states: Iterable[Hashable],
    *,
    kind: Literal["equal", "contents"] = "equal",
) -> float:
    """Share of states of which every answer is right, such as all seven boxes of a world after a step.

    Args:
        predictions, references, kind: as for `exact_matches`; one entry an answer, none of them -100.
        states: the state of each answer, such as `(sample_id, step)`.

    Raises:
        ValueError: as `exact_matches`, and for states of another length.
    """
    right = exact_matches(predictions, references, kind=kind)
    names = list(states)
    if len(names) != len(right):
        raise ValueError(f"`states` must name the state of each of {len(right)} answers, got {len(names)}.")
    all_right: dict[Hashable, bool] = {}
    for name, one in zip(names, right.tolist(), strict=True):
        all_right[name] = all_right.get(name, True) and one
    return sum(all_right.values()) / len(all_right)


def entity_tracking_exact_match(
    predictions: Any,
    references: Any,
    *,
    depths: Any = None,
    states: Iterable[Hashable] | None = None,
    kind: Literal["equal", "contents"] = "equal",
) -> dict[str, float]:
    """All figures of a table of entity tracking.

    Args:
        predictions, references, kind: as for `exact_matches`.
        depths: as for `exact_match_by_depth`.
        states: as for `whole_state_accuracy`.

    Returns:
        `exact_match`; with `depths` also `exact_match_at_depth_D` for each depth D that occurs, the smallest first,
        without -1; with `states` also `whole_state_accuracy`.

    Raises:
        ValueError: as those three.
    """
    figures = {"exact_match": exact_match(predictions, references, kind=kind)}
    if depths is not None:
        scores = exact_match_by_depth(predictions, references, depths, kind=kind)
        figures |= {f"exact_match_at_depth_{depth}": score.accuracy for depth, score in scores.items() if depth >= 0}
    if states is not None:
        figures["whole_state_accuracy"] = whole_state_accuracy(predictions, references, states, kind=kind)
    return figures


def compute_tracking_metrics(
    eval_prediction: Any, *, causal: bool = True, per: Literal["token", "row"] = "token"
) -> dict[str, float]:
    """`compute_metrics` of `transformers.Trainer` for models that answer with tokens or classes.

    ```python
    Trainer(model=ChacalForCausalLM(config), compute_metrics=compute_tracking_metrics, ...)
    of_tokens = partial(compute_tracking_metrics, causal=False)
    Trainer(model=ChacalForTokenClassification(config), compute_metrics=of_tokens, ...)
    ```

    With `TrainingArguments(label_names=["labels", "hops"])` there is a figure for every depth. What Trainer keeps of
    all logits is smaller with `preprocess_logits_for_metrics=lambda logits, labels: predicted_tokens(logits)`.

    Args:
        eval_prediction: its `predictions` are logits (B, n, vocabulary) or (B, classes), or token ids of the shape of
            the labels; its `label_ids` are the labels, -100 where there is no answer, or (labels, depths).
        causal: logits (B, n, vocabulary) are of the next token, as those of a causal language model.
        per: `token`: every label is an answer. `row`: an answer is all labels of a row, such as a text and its end;
            it is right where all are, which is so exactly where greedy generation gives it. Depths are then (B,).

    Returns:
        As `entity_tracking_exact_match`; `Trainer` puts `eval_` before the names.

    Raises:
        ValueError: NaN logits, shapes that do not fit, an unknown `per`, else as `entity_tracking_exact_match`.
    """
    if per not in ("token", "row"):
        raise ValueError(f"`per` must be 'token' or 'row', got {per!r}.")
    labels, depths = eval_prediction.label_ids, None
    if isinstance(labels, tuple):
        if len(labels) != 2:
            raise ValueError(f"`label_ids` must be labels or (labels, depths), got {len(labels)} arrays.")
        labels, depths = labels
    outputs = eval_prediction.predictions
    outputs = np.asarray(outputs[0] if isinstance(outputs, (tuple, list)) else outputs)
    if outputs.dtype.kind == "f":
        outputs = _chosen(outputs, causal)
    labels = np.asarray(labels)
    if per == "row":
        right, answered = _compared(outputs, labels, "equal")
        wrong = np.zeros(answered.shape, dtype=bool)
        wrong[answered] = ~right
        rows = tuple(range(1, wrong.ndim))
        outputs = (~wrong.any(axis=rows)).astype(np.int64)
        labels = np.where(answered.any(axis=rows), 1, _IGNORED)
    return entity_tracking_exact_match(outputs, labels, depths=depths)


def predicted_tokens(logits: Tensor) -> Tensor:
    """What a causal model predicts for every token: logits (B, n, vocabulary) -> ids (B, n), aligned with labels.

    Entry i is the choice made at token i - 1. Nothing predicts entry 0: it is -1, which no label is.

    Raises:
        ValueError: logits of another shape, or NaN.
    """
    if logits.dim() != 3:
        raise ValueError(f"`logits` must have shape (B, n, vocabulary), got {tuple(logits.shape)}.")
    if bool(torch.isnan(logits).any()):
        raise ValueError("`logits` has NaN: the model has diverged, or its input had NaN.")
    return nn.functional.pad(logits[:, :-1].argmax(dim=-1), (1, 0), value=-1)


def minimal_layers(num_state_changes: int) -> int:
    """ceil(log2(n + 1)): the least layers of softmax attention that can follow n state changes (ChaCAL, Theorem 1).

    It holds in the paper's model, where a token reads one other token a layer.

    Raises:
        ValueError: a negative number or a fraction.
    """
    if num_state_changes != int(num_state_changes) or num_state_changes < 0:
        raise ValueError(f"`num_state_changes` must be an integer >= 0, got {num_state_changes}.")
    # exact where a logarithm of floats is not
    return int(num_state_changes).bit_length()


def _chosen(logits: NDArray[Any], causal: bool) -> NDArray[np.int64]:
    """Token ids or classes of logits, in the places of their labels."""
    if causal and logits.ndim == 3:
        return predicted_tokens(torch.from_numpy(logits)).numpy()
    if logits.ndim not in (2, 3):
        raise ValueError(f"`predictions` must be logits (B, n, vocabulary) or (B, classes), got {logits.shape}.")
    if np.isnan(logits).any():
        raise ValueError("`logits` has NaN: the model has diverged, or its input had NaN.")
    return logits.argmax(axis=-1)


def _compared(predictions: Any, references: Any, kind: str) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """`(right, answered)`: which answers are right (N,), and which entries are answers, in the shape of all."""
    guesses, truths = _entries("predictions", predictions), _entries("references", references)
    if guesses.shape != truths.shape:
        raise ValueError(
            f"`predictions` and `references` must be equally long, got shapes {guesses.shape} and {truths.shape}."
        )
    if kind not in ("equal", "contents"):
        raise ValueError(f"`kind` must be 'equal' or 'contents', got {kind!r}.")
    if guesses.dtype != truths.dtype or (kind == "contents" and truths.dtype != object):
        raise ValueError("`predictions` and `references` must both be texts, or (kind 'equal') both be token ids.")
    answered = np.full(truths.shape, True) if truths.dtype == object else truths != _IGNORED
    if not answered.any():
        raise ValueError("`references` holds no answer: it is empty, or all of it is -100.")
    if truths.dtype != object:
        return guesses[answered] == truths[answered], answered
    if kind == "equal":
        right = [" ".join(guess.split()) == " ".join(truth.split()) for guess, truth in zip(guesses, truths)]
        return np.array(right), answered
    sets = [parse_contents(truth) for truth in truths]
    if None in sets:
        place = sets.index(None)
        raise ValueError(
            f"`references` has {truths[place]!r} at entry {place}: with `kind` 'contents' it must be "
            "'contains the ...' or 'is empty'."
        )
    return np.array([parse_contents(guess) == truth for guess, truth in zip(guesses, sets)]), answered


def _entries(name: str, values: Any) -> NDArray[Any]:
    """Texts as an (N,) array of objects, token ids as an int64 array."""
    if isinstance(values, (str, bytes)):
        raise ValueError(f"`{name}` is one text: give a sequence of texts.")
    given = values if hasattr(values, "__array__") else list(values)
    texts = [isinstance(value, str) for value in given]
    if any(texts):
        if not all(texts):
            place = texts.index(False)
            raise ValueError(
                f"`{name}` has {given[place]!r} at entry {place}, which is no text: every answer must be."
            )
        entries = np.empty(len(given), dtype=object)
        entries[:] = list(given)
        return entries
    try:
        return _integers(name, np.asarray(given))
    except ValueError as error:
        raise ValueError(f"`{name}` must be texts, or integers in equally long rows: {error}") from error


def _integers(name: str, values: NDArray[Any]) -> NDArray[np.int64]:
    numbers = values.astype(np.float64) if values.dtype.kind in "iuf" else np.full(values.shape, np.nan)
    wrong = np.flatnonzero(~np.isfinite(numbers) | (numbers != np.round(numbers)))
    if wrong.size:
        raise ValueError(f"`{name}` has {values.ravel().tolist()[wrong[0]]} at entry {wrong[0]}, which is no integer.")
    return numbers.astype(np.int64)
