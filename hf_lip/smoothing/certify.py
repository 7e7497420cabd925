# SPDX-License-Identifier: Apache-2.0
"""Certification and prediction by randomized smoothing: samples from the engine, statistics from the procedures.

The certificate is about the smoothed classifier g(x) = argmax_k E[s_k(F(x + N(0, sigma^2 I)))], s the score map (the
vote of the largest logit for mono, bonferroni and cpm), never about F itself: with probability at least 1 - alpha over
the noise of one image, the image is abstained from, or gets g(x) and a radius within which g is constant.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from hf_lip.smoothing.adaptive import AdaptiveRule, Stop
from hf_lip.smoothing.betting import BettingAccumulator
from hf_lip.smoothing.engine import ESTIMATION, SELECTION, Rows, Sampler, ScoreSums, draws_of, packed_draws
from hf_lip.smoothing.lipschitz_radii import lipschitz_two_class_radius
from hf_lip.smoothing.noise import GaussianNoise, Noise, check_words
from hf_lip.smoothing.predict import predict_counts, predict_moments
from hf_lip.smoothing.procedures import certify_counts, certify_moments
from hf_lip.smoothing.samples import ABSTAIN, Decision, Moments
from hf_lip.smoothing.settings import SmoothingSettings


__all__ = ["SmoothingResult", "certify_image", "certify_images", "predict_images"]


@dataclass(frozen=True)
class SmoothingResult:
    """One image's result.

    Attributes:
        predict: class, or -1 (`ABSTAIN`).
        radius: l2 radius in units of the image's values, 0.0 on abstention; the ball is open. None for a prediction.
        p_lower, p_upper_other: bounds of the mean score of `candidate` and of every other class, which hold together
            with probability 1 - alpha. None for a prediction.
        candidate: class chosen on the selection samples; None for a prediction.
        method: procedure of the bounds, or "predict".
        score: mean score (share of votes) of `candidate`, or of `predict`, over the n samples.
        n: estimation samples used.
        selection_counts: votes (num_classes,) of the n0 selection samples; None for soft scores and predictions.
        counts: votes (num_classes,) of the n estimation samples; None for soft scores.
        details: further numbers of the procedure.
    """

    predict: int
    radius: float | None
    p_lower: float | None
    p_upper_other: float | None
    candidate: int | None
    method: str
    score: float
    n: int
    selection_counts: tuple[int, ...] | None
    counts: tuple[int, ...] | None
    details: dict[str, Any]

    @property
    def abstained(self) -> bool:
        return self.predict == ABSTAIN


def certify_images(
    sampler: Sampler, settings: SmoothingSettings, images: Sequence[tuple[int, int, Tensor]]
) -> Iterator[tuple[int, SmoothingResult]]:
    """Certify a group of images whose selection samples share batches.

    Args:
        sampler: with the noise of `settings`.
        images: (place, index, image): the place 0, 1, ... in the group decides the rows of the selection samples, so
            that what a draw gives does not depend on which images of the group are there; the index keys the noise.

    Returns:
        (index, result) of the images in their order, each as soon as it is done.

    Raises:
        ValueError: an image that the noise can not use, logits that are not finite or of a wrong shape.
    """
    prepared = [(place, _prepared(sampler, image, index), index) for place, index, image in images]
    batches: list[list[Rows]] = []
    # a batch has images of one shape
    for shape in dict.fromkeys(image.shape for _, image, _ in prepared):
        same = [entry for entry in prepared if entry[1].shape == shape]
        batches += packed_draws(same, SELECTION, settings.n0, sampler.batch_size)
    if settings.method == "betting":
        scores: dict[int, list[NDArray[np.float64]]] = {index: [] for _, _, index in prepared}
        for index, part in _scores(sampler, settings, batches):
            scores[index].append(part)
        for _, image, index in prepared:
            yield index, _certify_by_betting(sampler, settings, image, index, np.concatenate(scores[index]))
        return
    if settings.method == "lvm":
        sums = sampler.tally(batches, lambda index: ScoreSums(index, settings.score_map))
        for _, image, index in prepared:
            yield index, _certify_moments(sampler, settings, image, index, sums[index].moments())
        return
    selection = sampler.votes(batches)
    for _, image, index in prepared:
        certify = _certify_adaptively if settings.budget == "adaptive" else _certify_votes
        yield index, certify(sampler, settings, image, index, selection[index])


def predict_images(
    sampler: Sampler, settings: SmoothingSettings, images: Sequence[tuple[int, int, Tensor]]
) -> Iterator[tuple[int, SmoothingResult]]:
    """PREDICT of Cohen et al. 2019, section 3.2.2, from n samples: the class of g, wrong with probability <= alpha.

    Use the settings (map, noise) and the base classifier of the certificates: others are another g. `n0`, `budget` and
    what belongs to radii have no effect. Arguments, result and errors as `certify_images`.
    """
    for _, index, image in images:
        prepared = _prepared(sampler, image, index)
        batches = draws_of(prepared, index, ESTIMATION, settings.n, sampler.batch_size)
        counts = None
        if settings.soft:
            moments = sampler.tally(batches, lambda index: ScoreSums(index, settings.score_map))[index].moments()
            predict, mean = predict_moments(moments, settings.alpha), moments.mean
        else:
            counts = sampler.votes(batches)[index]
            predict, mean = predict_counts(counts, settings.alpha), counts / counts.sum()
        score = float(mean.max())
        yield (
            index,
            SmoothingResult(predict, None, None, None, None, "predict", score, settings.n, None, _plain(counts), {}),
        )


def certify_image(
    base_classifier: Callable[[Tensor], Tensor],
    image: Tensor,
    settings: SmoothingSettings,
    *,
    num_classes: int,
    index: int = 0,
    batch_size: int = 64,
    noise: Noise | None = None,
    progress: Callable[[int], None] | None = None,
) -> SmoothingResult:
    """Certify one image with a function as base classifier, on the CPU.

    Args:
        base_classifier: maps noisy images (batch_size, *image.shape) float32 to logits (batch_size, num_classes); it
            must be deterministic and treat every row for itself.
        image: one image without noise, any shape, usually (C, H, W) in [0, 1].
        index: position of the image in its data set, which keys its noise.
        batch_size: noisy images a forward pass.
        noise: by default [`hf_lip.smoothing.noise.GaussianNoise`].
        progress: called with the number of noisy images done since the last call.

    Raises:
        ValueError: as `certify_images`, or a number out of range.
    """
    check_words(index=index)
    noise = GaussianNoise(settings.sigma, settings.seed) if noise is None else noise
    with Sampler(base_classifier, noise, num_classes=num_classes, batch_size=batch_size, progress=progress) as sampler:
        return next(iter(certify_images(sampler, settings, [(0, index, image)])))[1]


def _prepared(sampler: Sampler, image: Tensor, index: int) -> NDArray[Any]:
    try:
        return sampler.noise.prepare(image)
    except ValueError as error:
        raise ValueError(f"Image {index}: {error}") from error


def _certify_votes(
    sampler: Sampler, settings: SmoothingSettings, image: NDArray[Any], index: int, selection: NDArray[np.int64]
) -> SmoothingResult:
    batches = draws_of(image, index, ESTIMATION, settings.n, sampler.batch_size)
    counts = sampler.votes(batches)[index]
    method: Any = settings.method
    decision = certify_counts(
        method,
        selection,
        counts,
        sigma=settings.sigma,
        alpha=settings.alpha,
        randomized_seed=(settings.seed, index) if settings.randomized else None,
    )
    return _result_of_votes(decision, selection, counts)


def _certify_adaptively(
    sampler: Sampler, settings: SmoothingSettings, image: NDArray[Any], index: int, selection: NDArray[np.int64]
) -> SmoothingResult:
    """Looks at the sample numbers that the rule asks for, which do not depend on the batch size."""
    method: Any = settings.method
    rule = AdaptiveRule(
        selection,
        n=settings.n,
        sigma=settings.sigma,
        alpha=settings.alpha,
        method=method,
        rtol=settings.rtol,
        target_radius=settings.target_radius,
    )
    votes, look = sampler.new_votes(index), rule.first_look
    drawn = counted = 0
    # rows of the last batch that are behind the look: they are counted for the next one
    rest: Tensor | None = None
    while True:
        if rest is not None:
            count = min(len(rest), look - counted)
            votes.add(rest[:count])
            rest, counted = rest[count:], counted + count
        if counted < look:
            batches = draws_of(image, index, ESTIMATION, settings.n, sampler.batch_size, start=drawn, stop=look)
            for (rows,), logits in sampler.run(batches):
                count = min(rows.num_draws, look - counted)
                votes.add(logits[:count])
                rest, counted = logits[count : rows.num_draws], counted + count
                drawn = rows.first_draw + rows.num_draws
        counts = votes.counts()
        outcome = rule.update(counts)
        if isinstance(outcome, Stop):
            return _result_of_votes(outcome.decision, selection, counts, stopped=outcome.reason)
        look = outcome.next_look


def _scores(
    sampler: Sampler, settings: SmoothingSettings, batches: Iterable[list[Rows]]
) -> Iterator[tuple[int, NDArray[np.float64]]]:
    """(index of the image, scores (k, num_classes)) of every run of rows."""
    for rows, logits in sampler.run(batches):
        for part in rows:
            yield part.index, ScoreSums(part.index, settings.score_map).add(logits[part.place]).cpu().numpy()


def _certify_by_betting(
    sampler: Sampler, settings: SmoothingSettings, image: NDArray[Any], index: int, selection: NDArray[np.float64]
) -> SmoothingResult:
    bets = BettingAccumulator(
        selection, n=settings.n, sigma=settings.sigma, alpha=settings.alpha, lipschitz=settings.lipschitz
    )
    total = 0.0
    batches = draws_of(image, index, ESTIMATION, settings.n, sampler.batch_size)
    for _, scores in _scores(sampler, settings, batches):
        bets.update(scores)
        total += float(scores[:, bets.candidate].sum())
    return _result(_with_score_error(bets.decision(), settings), total / settings.n, settings.n)


def _certify_moments(
    sampler: Sampler, settings: SmoothingSettings, image: NDArray[Any], index: int, selection: Moments
) -> SmoothingResult:
    batches = draws_of(image, index, ESTIMATION, settings.n, sampler.batch_size)
    moments = sampler.tally(batches, lambda index: ScoreSums(index, settings.score_map))[index].moments()
    decision = certify_moments(
        selection, moments, sigma=settings.sigma, alpha=settings.alpha, lipschitz=settings.lipschitz
    )
    decision = _with_score_error(decision, settings)
    return _result(decision, float(moments.mean[decision.candidate]), moments.n)


def _with_score_error(decision: Decision, settings: SmoothingSettings) -> Decision:
    """The bounds are of the mean of the computed scores; `lipschitz` belongs to scores up to `score_error` away."""
    error = settings.score_error
    if settings.lipschitz is None or error == 0.0:
        return decision
    lower, upper = max(0.0, decision.p_lower - error), min(1.0, decision.p_upper_other + error)
    radius = float(lipschitz_two_class_radius(lower, upper, settings.sigma, settings.lipschitz))
    return replace(
        decision,
        predict=decision.candidate if radius > 0.0 else ABSTAIN,
        radius=radius,
        p_lower=lower,
        p_upper_other=upper,
        details={**decision.details, "score_error": error},
    )


def _result_of_votes(
    decision: Decision, selection: NDArray[np.int64], counts: NDArray[np.int64], **details: Any
) -> SmoothingResult:
    n = int(counts.sum())
    score = float(counts[decision.candidate]) / n
    return replace(
        _result(decision, score, n),
        selection_counts=_plain(selection),
        counts=_plain(counts),
        details={**decision.details, **details},
    )


def _result(decision: Decision, score: float, n: int) -> SmoothingResult:
    return SmoothingResult(
        decision.predict,
        decision.radius,
        decision.p_lower,
        decision.p_upper_other,
        decision.candidate,
        decision.method,
        score,
        n,
        None,
        None,
        decision.details,
    )


def _plain(counts: NDArray[np.int64] | None) -> tuple[int, ...] | None:
    return None if counts is None else tuple(counts.tolist())
