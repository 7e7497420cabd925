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
