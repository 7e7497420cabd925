# SPDX-License-Identifier: Apache-2.0
"""Checking a card: are its numbers those of the evaluation's files, does the certificate hold, and does the evaluation
give the same figures again?"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..card_text import CARD_NAME, card_text
from ..checkpoints.stored_weights import stored_weights_sha256
from ..checkpoints.verify import verify_checkpoint
from .body import CardSource, body_parts, read_source
from .card_plots import is_plot_of
from .figures import Evaluation, Figure
from .reruns import Request, Rerun, judge
from .result_tables import shown_figures
from .sections import Card, parse_card, sealed
from .writer import describe_unmeasured, metadata_of, name_of, unmeasured


# hashes are numbers too
_TOKEN = re.compile(r"[0-9a-f]{64}|\d[\d.,]*(?:[eE][+-]?\d+)?")
_LINES_SHOWN = 5

__all__ = ["CardCheck", "CheckedFigure", "check_card", "rerun_evaluation"]


@dataclass(frozen=True)
class CheckedFigure:
    """A figure that was measured again.

    Attributes:
        where: the file, and the evaluation in it.
        name: such as "certified accuracy at 36/255".
        stated, found: the value on the card and the one found now.
        lowest, highest: the interval in which the stated value had to lie.
        share: whether it is a fraction of 1.
        examples: what it was measured on now, in words.
        reproduced: whether it lies there.
    """

    where: str
    name: str
    stated: float
    found: float
    lowest: float
    highest: float
    share: bool
    examples: str
    reproduced: bool


@dataclass(frozen=True)
class CardCheck:
    """Result of `check_card`; `ok` if nothing speaks against the card.

    Attributes:
        folder: of the card.
        figures: those measured again.
        problems: why the card does not hold.
        notes: what else there is to know, such as how exact the check was.
    """

    folder: str
    figures: list[CheckedFigure] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        return not self.problems


def check_card(
    folder: str | Path,
    *,
    data: str | None = None,
    limit: int | None = None,
    stride: int = 1,
    device: str | None = None,
    batch_size: int | None = None,
    rerun: bool = True,
    verify: bool = True,
    progress: Callable[[int, int], None] | None = None,
) -> CardCheck:
    """Check the card of a folder against its files, and its files against the model.

    1. Every number of the generated text and of the model index is the one that the files give; every number of the
       hand-written sections that looks like a result is in the files.
    2. The Lipschitz certificate holds for the weights, computed again from the files (`hf_lip.verify_checkpoint`).
    3. The evaluations are run again: on all examples a share may differ by the tolerance of the evaluation (nothing
       for deterministic certificates, which run in float64), on a sample the figures have to lie in intervals that
       hold with 99.9 % for all of them together.

    Args:
        folder: with the card, the model and the files of the evaluations.
        data: place of the data set, for where it is not as in the files.
        limit, stride: check on every `stride`-th example, and on at most `limit`, evenly spread; by default on all.
        device: such as "cpu" or "cuda:0"; default: a GPU where there is one.
        batch_size: examples a forward pass.
        rerun: leave out 3 if False.
        verify: leave out 2 if False; then the certificate is only compared with the weights' hash.
        progress: called with the numbers of examples done and to do.

    Raises:
        FileNotFoundError: no card, or data that are not where they were.
        ValueError: arguments out of range, or data of another size than the card's.
    """
    place = Path(folder).expanduser()
    path = place / CARD_NAME
    if not path.is_file():
        raise FileNotFoundError(f"{place} has no {CARD_NAME} to check: `hf-lip card {place.name}` writes one.")
    device = device or ("cuda:0" if torch.cuda.is_available() else "cpu")
    request = Request(data, limit, stride, device, batch_size, progress)
    check = CardCheck(str(place))
    try:
        card = parse_card(path.read_text(encoding="utf-8"), CARD_NAME)
        source = read_source(place)
    except (FileNotFoundError, ValueError) as error:
        check.problems.append(str(error))
        return check
    _check_numbers(card, source, check)
    _check_plots(source, check)
    held = _check_certificate(source, check, verify)
    if rerun and held:
        for evaluation in source.evaluations:
            _run_again(place, evaluation, request, check)
    elif rerun:
        check.notes.append("The evaluation was not run again, as the certificate does not hold for these weights.")
    return check


def _check_numbers(card: Card, source: CardSource, check: CardCheck) -> None:
    texts = list(card.written.items())
    if card.seal is None:
        check.notes.append("The card was not written by `hf-lip card`: all of its text is taken as written by hand.")
        texts.append(("the text", card.generated))
    else:
        _compare_generated(card, source, check)
    for name, text in texts:
        refused = unmeasured(text, source)
        if refused:
            check.problems.append(f"{name}: {describe_unmeasured(refused)}")
    _compare_index(card, source, check)


def _compare_generated(card: Card, source: CardSource, check: CardCheck) -> None:
    """Numbers of the generated text, in order, against those of the text that the files give now."""
    name = name_of(card.metadata) or source.folder.resolve().name
    data = metadata_of(source, name, {}, None, (), ())
    expected = parse_card(sealed(card_text(data, body_parts(source, name, {})), CARD_NAME), CARD_NAME).generated
    if _TOKEN.findall(card.generated) != _TOKEN.findall(expected):
        given = {line.strip() for line in expected.splitlines()}
        lines = [line.strip() for line in card.generated.splitlines()]
        foreign = [line for line in lines if _TOKEN.search(line) and line not in given]
        mine = set(lines)
        missing = [line.strip() for line in expected.splitlines() if line.strip() not in mine and _TOKEN.search(line)]
        for line in foreign[:_LINES_SHOWN]:
            check.problems.append(f"The card has a line that its files do not give: {line!r}.")
        for line in missing[:_LINES_SHOWN]:
            check.problems.append(f"The card lacks a line that its files give: {line!r}.")
        if not foreign and not missing:
            check.problems.append("The card has the lines that its files give in another order.")
    elif not card.untouched:
        check.notes.append("Words of the generated text were changed by hand, its numbers were not.")


def _compare_index(card: Card, source: CardSource, check: CardCheck) -> None:
    """The model index against the figures of the files."""
    held = {one.source_of(figure): figure for one in source.evaluations for figure in one.figures}
    values = {figure.value for figure in held.values()}
    seen = set()
    for name, value, place in _stated_metrics(card.metadata, check):
        if place in held:
            seen.add(place)
            if held[place].value != value:
                check.problems.append(f"The model index states {name} = {value!r}, {place} is {held[place].value!r}.")
        elif card.seal is not None or value not in values:
            # in a card of another hand the value itself has to be one that was measured
            check.problems.append(f"The model index states {name} = {value!r}, which no results file holds.")
    if card.seal is not None:
        shown = [one.source_of(figure) for one in source.evaluations for figure in shown_figures(one)]
        missing = [place for place in shown if place not in seen]
        check.problems.extend(f"The model index lacks {place}." for place in missing[:_LINES_SHOWN])


def _stated_metrics(metadata: Mapping[str, Any], check: CardCheck) -> list[tuple[str, Any, str | None]]:
    """Name, value and place in the files of every metric of a model index."""
    stated = []
    try:
        for model in metadata.get("model-index") or []:
            for result in model["results"]:
                for metric in result["metrics"]:
                    arguments = metric.get("args") or {}
                    stated.append((str(metric.get("name", metric["type"])), metric["value"], arguments.get("source")))
    except (KeyError, TypeError, AttributeError) as error:
        check.problems.append(f"The model index of the card is not in the Hub's layout ({error!r}).")
    return stated


def _check_plots(source: CardSource, check: CardCheck) -> None:
    for name in source.plots:
        if not is_plot_of(source.folder / name, source.evaluations):
            check.problems.append(f"{name} was not drawn from the figures of the files: write the card again.")


def _check_certificate(source: CardSource, check: CardCheck, verify: bool) -> bool:
    if source.certificate is None:
        return True
    if not verify:
        stored = stored_weights_sha256(source.folder)
        if source.certificate.weights_sha256 != stored:
            check.problems.append("The certificate does not hold: it is of other weights.")
            return False
        check.notes.append("The certificate is of these weights. It was not computed again.")
        return True
    report = verify_checkpoint(source.folder)
    if report.ok:
        check.notes.append(
            f"The certificate holds: constant {report.lipschitz_constant:.9g}, computed again from the files."
        )
    check.problems.extend(f"The certificate does not hold: {reason}" for reason in report.reasons)
    return report.ok


def _run_again(folder: Path, evaluation: Evaluation, request: Request, check: CardCheck) -> None:
    rerun = rerun_evaluation(folder, evaluation, request)
    check.notes.append(f"{evaluation.where}: evaluated again on {rerun.examples}, {_rule(rerun)}.")
    left_out = []
    for figure in evaluation.figures:
        judgement = judge(figure, rerun)
        if judgement is None:
            left_out.append(figure.name)
            continue
        found = rerun.found[figure.key]
        check.figures.append(_checked(evaluation, figure, found.value, judgement, rerun))
        if not judgement.reproduced:
            check.problems.append(
                f"{evaluation.where}: {figure.name} is {figure.value!r} on the card and {found.value!r} on "
                f"{rerun.examples}: not reproduced."
            )
    if left_out:
        check.notes.append(f"{evaluation.where}: the sample holds nothing to check {_some(left_out)} with.")


def rerun_evaluation(folder: Path, evaluation: Evaluation, request: Request) -> Rerun:
    """An evaluation of a folder again, by what it was of.

    Raises:
        FileNotFoundError, ValueError: the data are not where they were, or are others.
    """
    # each brings much with it that the others do not need
    if evaluation.kind == "tracking":
        from .tracking_reruns import rerun_tracking

        return rerun_tracking(folder, evaluation, request)
    if evaluation.kind == "language":
        from .language_reruns import rerun_language_model

        return rerun_language_model(folder, evaluation, request)
    from .image_reruns import rerun_certification, rerun_classifier

    again = rerun_classifier if evaluation.kind == "classifier" else rerun_certification
    return again(folder, evaluation, request)


def _checked(evaluation: Evaluation, figure: Figure, found: float, judgement: Any, rerun: Rerun) -> CheckedFigure:
    return CheckedFigure(
        evaluation.where,
        figure.name,
        figure.value,
        found,
        judgement.lowest,
        judgement.highest,
        figure.count is not None,
        rerun.examples,
        judgement.reproduced,
    )


def _rule(rerun: Rerun) -> str:
    if not rerun.complete:
        return "figures have to lie in the sample's intervals (99.9 % for all together)"
    if rerun.tolerance == 0.0:
        return "shares have to be the same, the ACR to 1e-6"
    return f"{100 * rerun.tolerance:g} % of the answers (and one of few) may differ, and other figures by as much"


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"{', '.join(names[:3])}{more}"
