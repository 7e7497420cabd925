# SPDX-License-Identifier: Apache-2.0
"""Writing the card of a folder: metadata with a model index, text, plots."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from ..card_text import CARD_NAME, card_text, kept_metadata
from ..models.certificate import write_text_atomically
from .body import CardSource, body_parts, read_source
from .card_plots import PLOTS, write_plots
from .held_numbers import StatedNumber, numbers_in, unheld_numbers
from .result_tables import shown_figures
from .sections import HAND_WRITTEN, Card, parse_card, sealed


# what is taken over from the card that is there
_KEPT = ("license", "license_name", "license_link", "language", "datasets", "base_model", "tags", "thumbnail")

__all__ = [
    "UnmeasuredNumberError",
    "describe_unmeasured",
    "eval_results",
    "metadata_of",
    "name_of",
    "unmeasured",
    "write_card",
]


class UnmeasuredNumberError(ValueError):
    """A card states a number that nobody measured."""


def write_card(
    folder: str | Path,
    *,
    name: str | None = None,
    license: str | None = None,
    tags: Sequence[str] = (),
    datasets: Sequence[str] = (),
    overwrite: bool = False,
    plot: bool = True,
) -> Path:
    """Write README.md and its plots into the folder of a model.

    Every figure comes from `results.json` of the training scripts and `summary.json` of `hf-lip certify` (in the
    folder or in a subfolder), every constant from `lipschitz_certificate.json`; `published.json` may hold figures of
    papers to be shown beside them. Sections between the marks `<!-- hf_lip:begin description -->` (or `notes`) and
    `<!-- hf_lip:end description -->` are written by hand and kept.

    Args:
        folder: of a model that `save_pretrained` wrote.
        name: of the model; "owner/name" if it is on the Hub. Default: that of the card that is there, or the folder's.
        license, tags, datasets: metadata; what the card that is there has is kept where nothing is given.
        overwrite: replace a card of this command.
        plot: draw certified accuracy against the radius, or exact match by depth (needs matplotlib); if False, plots
            of an earlier card are removed.

    Returns:
        The path of the card.

    Raises:
        FileNotFoundError: no model, or nothing measured.
        FileExistsError: there is a card, and no `overwrite`; or it was not written by this command, or changed outside
            of its hand-written sections, so that replacing it would lose text.
        UnmeasuredNumberError: a hand-written section has a result that no file holds.
        ValueError: damaged files, or figures of other weights.
        ImportError: matplotlib is not installed.
    """
    source = read_source(folder)
    path = source.folder / CARD_NAME
    old = _card_to_replace(path, overwrite)
    written = old.written if old is not None else {}
    name = name or (name_of(old.metadata) if old is not None else None) or source.folder.resolve().name
    refused = [number for text in written.values() for number in unmeasured(text, source)]
    if refused:
        raise UnmeasuredNumberError(f"{path}: {describe_unmeasured(refused)}")
    if plot:
        write_plots(source.folder, source.evaluations, name)
    else:
        for old_plot in PLOTS:
            (source.folder / old_plot).unlink(missing_ok=True)
    source = replace(source, plots=[file for file in PLOTS if (source.folder / file).is_file()])
    data = metadata_of(source, name, kept_metadata(path, _KEPT), license, tags, datasets)
    text = card_text(data, body_parts(source, name, written))
    write_text_atomically(path, sealed(text, CARD_NAME))
    return path


def unmeasured(text: str, source: CardSource) -> list[StatedNumber]:
    """Numbers of a hand-written text that look like results and that no file of the folder holds."""
    figures = source.figures
    shares = [figure.value for figure in figures if figure.count is not None]
    others = [leaf for one in source.evaluations for leaf in numbers_in(one.content)]
    others += [figure.arguments["eps"] for figure in figures if "eps" in figure.arguments]
    for result in source.published:
        shares += [value for value in result.values.values() if value <= 1.0]
        others += numbers_in({"values": result.values, "source": result.source, "remark": result.remark})
    if source.certificate is not None:
        others += numbers_in(vars(source.certificate))
    return unheld_numbers(text, shares, others)


def describe_unmeasured(numbers: Sequence[StatedNumber]) -> str:
    """What is wrong, and what to do."""
    listing = "; ".join(f"{number.text}{' %' if number.percent else ''} in {number.line!r}" for number in numbers[:5])
    more = f" and {len(numbers) - 5} more" if len(numbers) > 5 else ""
    return (
        f"the hand-written text states what no results file holds: {listing}{more}. Evaluate it, leave it out, or put "
        "a published figure with its source into published.json."
    )


def eval_results(source: CardSource, datasets: Sequence[str] = ()) -> list[EvalResult]:
    """The model index: one entry for every figure that is shown, with its place in the files among the arguments.

    Args:
        datasets: ids on the Hub; the only one, if there is one, is the type of the data set.
    """
    return [
        EvalResult(
            task_type=evaluation.task,
            dataset_type=datasets[0] if len(datasets) == 1 else evaluation.data,
            dataset_name=evaluation.data,
            dataset_split=evaluation.split,
            metric_type=figure.metric,
            metric_name=figure.name,
            metric_value=figure.value,
            metric_args={**figure.arguments, "source": evaluation.source_of(figure)},
        )
        for evaluation in source.evaluations
        for figure in shown_figures(evaluation)
    ]


def name_of(metadata: Mapping[str, Any]) -> str | None:
    """The model's name in the model index of a card."""
    index = metadata.get("model-index")
    named = isinstance(index, list) and bool(index) and isinstance(index[0], Mapping)
    return index[0].get("name") if named else None  # type: ignore[index]


def _card_to_replace(path: Path, overwrite: bool) -> Card | None:
    if not path.exists():
        return None
    card = parse_card(path.read_text(encoding="utf-8"), str(path))
    if card.seal is None:
        raise FileExistsError(
            f"{path} was not written by `hf-lip card`: move it away first. Its text can then be put between the marks "
            f"of the sections {' and '.join(HAND_WRITTEN)} of the new card, where it is kept."
        )
    if not overwrite:
        raise FileExistsError(f"{path} exists: give --overwrite, which keeps its hand-written sections.")
    if not card.untouched:
        raise FileExistsError(
            f"{path} was changed outside of its hand-written sections, and what was written there would be lost: move "
            f"it between the marks of {' or '.join(HAND_WRITTEN)}, or delete the file."
        )
    unknown = set(card.written) - set(HAND_WRITTEN)
    if unknown:
        raise FileExistsError(f"{path} has the unknown section {sorted(unknown)[0]!r}: use {', '.join(HAND_WRITTEN)}.")
    return card


def metadata_of(
    source: CardSource,
    name: str,
    kept: dict[str, Any],
    license_id: str | None,
    tags: Sequence[str],
    datasets: Sequence[str],
) -> ModelCardData:
    """The metadata of a card, with what is kept of an earlier one."""
    task = source.evaluations[0].task
    own = ["hf_lip"]
    if source.certificate is not None:
        own += ["certified-robustness", "lipschitz"]
    elif any("sigma" in figure.arguments for figure in source.figures):
        own += ["certified-robustness", "randomized-smoothing"]
    if any(one.kind == "tracking" for one in source.evaluations):
        own.append("entity-tracking")
    if "chained_attention" in (source.config.get("layer_types") or ()):
        own.append("chained-attention")
    kept_tags, kept_datasets = kept.pop("tags", []), kept.pop("datasets", [])
    ids = list(datasets) or ([kept_datasets] if isinstance(kept_datasets, str) else list(kept_datasets))
    ids = ids or _hub_ids(source)
    if license_id is not None:
        kept["license"] = license_id
    return ModelCardData(
        library_name="transformers",
        pipeline_tag=task,
        tags=list(dict.fromkeys([*own, *kept_tags, *tags])),
        datasets=ids or None,
        metrics=list(dict.fromkeys(figure.metric for figure in source.figures)),
        model_name=name,
        eval_results=eval_results(source, ids),
        **kept,
    )


def _hub_ids(source: CardSource) -> list[str]:
    """The data sets that were read from the Hub."""
    ids = []
    for evaluation in source.evaluations:
        arguments = evaluation.content.get("arguments", {})
        place = arguments.get("dataset", arguments.get("dataset_name", evaluation.content.get("data")))
        if isinstance(place, str) and re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", place) and not Path(place).exists():
            ids.append(place)
    return list(dict.fromkeys(ids))
