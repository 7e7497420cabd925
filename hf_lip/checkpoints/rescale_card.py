# SPDX-License-Identifier: Apache-2.0
"""The model card of a rescaled checkpoint: norms before and after, settings, how to make and to load it."""

from pathlib import Path

from huggingface_hub import ModelCardData

from ..card_text import CARD_NAME, card_text, kept_metadata, markdown_table, rounded_up
from .rescale_report import REPORT_NAME, RescaledLayer, RescaleReport


KEPT = ("license", "license_name", "license_link", "pipeline_tag", "library_name", "language", "datasets")


def write_card(report: RescaleReport, original: Path, folder: Path) -> None:
    """Write README.md into `folder`.

    Args:
        report: of the rescaling.
        original: folder of the original, whose card's licence, task, library and language are taken over.
        folder: to write to.
    """
    dtypes = ", ".join(sorted({layer.dtype for layer in report.layers}))
    explanation = (
        f"Norms are l2 operator norms, rounded up here; `{REPORT_NAME}` has all digits, both ends of each proved "
        'interval and the sha256 of the files. "norm after" was measured on the bytes of this checkpoint, in '
        f'{dtypes}, with bounds on all rounding. A size of "all" means that the bound holds for every image size.'
    )
    notes = "\n".join(f"- {note}" for note in _notes(report))
    parts = [
        f"# {report.source}, norms at most {report.settings.to:g}",
        _summary(report),
        _table(report),
        explanation,
        "## How it was made",
        _how(report),
        notes,
    ]
    (folder / CARD_NAME).write_text(card_text(_card_data(report, original), parts), encoding="utf-8")


def _table(report: RescaleReport) -> str:
    folded = any(layer.folded is not None for layer in report.layers)
    middle = ["with batch norm"] if folded else []
    header = ["layer", "shape", "size", "norm before", *middle, "norm after", "factor"]
    return markdown_table(header, [_row(layer, folded) for layer in report.layers])


def _card_data(report: RescaleReport, original: Path) -> ModelCardData:
    kept = kept_metadata(original / CARD_NAME, KEPT)
    if report.commit is not None:
        kept["base_model"] = report.source
        kept["base_model_relation"] = "finetune"
    return ModelCardData(**{"library_name": "transformers", **kept, "tags": ["hf_lip", "spectral-norm"]})


def _summary(report: RescaleReport) -> str:
    settings = report.settings
    mode = "one factor a layer" if settings.mode == "sn" else "one factor an output channel"
    text = (
        f"A rescaled copy of `{report.source}`: the certified spectral norm of each of the {len(report.layers)} "
        f"layers below is at most {settings.to:g} (largest before: {rounded_up(report.largest_before)}, after: "
        f"{rounded_up(report.largest_after)}; {report.num_changed} layers changed, {mode})."
    )
    if report.logits_exponent is None:
        return f"{text} The network computes something else than the original."
    exact = "up to the rounding of the folded batch norms, " if settings.fold_bn else ""
    proof = "" if report.scales_read_from == "model" else " if the notes below are right about the order of its layers"
    return (
        f"{text} Scales were moved and not lost: {exact}the logits are the original's divided by "
        f"2^{report.logits_exponent}, so that predictions are the same{proof}."
    )


def _row(layer: RescaledLayer, folded: bool) -> list[str]:
    smallest, largest = layer.factors
    factor = f"{largest:.4g}" if smallest == largest else f"{smallest:.4g} to {largest:.4g}"
    size = "" if not layer.kind.startswith("conv") else "x".join(map(str, layer.input_size or ("all",)))
    middle = [rounded_up(layer.folded.upper) if layer.folded is not None else ""] if folded else []
    cells = [f"`{layer.name}`", "x".join(map(str, layer.shape)), size, rounded_up(layer.before.upper), *middle]
    return [*cells, rounded_up(layer.after.upper), factor]


def _how(report: RescaleReport) -> str:
    settings = report.settings
    commit = f" at commit `{report.commit}`" if report.commit else ""
    given = [
        f"mode `{settings.mode}`", f"to {settings.to:g}", f"layers {', '.join(settings.layers) or 'all'}",
        *(["batch norms folded"] if settings.fold_bn else []),
        *(["logits preserved"] if settings.preserve_logits else []),
        *(["small norms enlarged"] if settings.enlarge else ["layers within the limit left as they were"]),
        *([f"{settings.num_iterations} iterations"] if settings.mode == "sr" else []),
    ]  # fmt: skip
    text = f"From `{report.source}`{commit}: {', '.join(given)}."
    return text if report.command is None else f"{text}\n\n    {report.command}"


def _notes(report: RescaleReport) -> list[str]:
    notes = list(report.notes)
    if not report.settings.preserve_logits:
        notes.append("Biases are the original's.")
    if report.not_rescaled:
        notes.append(f"{len(report.not_rescaled)} other weights were left as they are; the report says why.")
    if report.left_out:
        notes.append(f"Not copied: {', '.join(report.left_out)}.")
    return notes
