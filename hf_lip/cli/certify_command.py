# SPDX-License-Identifier: Apache-2.0
"""`hf-lip certify`."""

import json
import math
import os
import time
from dataclasses import dataclass
from fractions import Fraction
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from hf_lip.cli.console import errors_as_one_line, progress_bar
from hf_lip.metrics import STANDARD_RADII, abstention_rate, average_certified_radius, certified_accuracy


_TSV_COLUMNS = ("idx", "label", "predict", "radius", "correct", "time")
_IMAGES_PER_BATCH = 64


@dataclass(frozen=True)
class _Row:
    """One image's line: Cohen's columns; `predict` is -1 on abstention, `seconds` is wall time."""

    index: int
    label: int
    predict: int
    radius: float
    correct: bool
    seconds: float


def certify(
    model: Annotated[
        str | None, typer.Argument(help="Folder or Hub id of an image classifier; default: the embedded one.")
    ] = None,
    data: Annotated[
        str, typer.Option(help="'digits', a folder or file of parquet, a folder of images, or a Hub id.")
    ] = "digits",
    split: Annotated[str, typer.Option(help="Split of the data.")] = "test",
    method: Annotated[str, typer.Option(help="lipschitz | mono (randomized smoothing) | auto.")] = "auto",
    sigma: Annotated[float, typer.Option(help="mono: noise level, pixels in [0, 1].")] = 0.25,
    n0: Annotated[int, typer.Option(help="mono: noisy copies that choose the class.")] = 100,
    n: Annotated[int, typer.Option(help="mono: noisy copies that bound its probability.")] = 10_000,
    alpha: Annotated[float, typer.Option(help="mono: failure probability of one certificate.")] = 0.001,
    seed: Annotated[int, typer.Option(help="mono: seed of the noise.")] = 0,
    batch_size: Annotated[
        int | None, typer.Option(help="Images (lipschitz, default 64) or noisy copies (mono, default 256) a forward.")
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Certify the first LIMIT images only.")] = None,
    out: Annotated[
        Path, typer.Option(help="Folder for certificates.tsv, summary.json and certified_accuracy.png.")
    ] = Path("hf-lip-certify"),
    radii: Annotated[str, typer.Option(help="Radii of the table, comma separated; fractions allowed.")] = ",".join(
        STANDARD_RADII
    ),
    name: Annotated[str | None, typer.Option(help="Configuration of a Hub data set.")] = None,
    image_column: Annotated[str | None, typer.Option(help="Column with the images.")] = None,
    label_column: Annotated[str | None, typer.Option(help="Column with the labels.")] = None,
    device: Annotated[
        str | None, typer.Option(help="Such as cpu or cuda:0; default: a GPU where there is one.")
    ] = None,
) -> None:
    """Certify the images of a data set: table, TSV of all images, JSON summary and plot of certified accuracy."""
    with errors_as_one_line():
        thresholds = _parse_radii(radii)
        if limit is not None and limit < 1:
            raise ValueError(f"`--limit` must be at least 1, got {limit}.")
        settings = {"method": method, "sigma": sigma, "n0": n0, "n": n, "alpha": alpha, "seed": seed}
        pipe = _load_pipeline(model, device, settings)
        columns = {"image_column": image_column, "label_column": label_column, "name": name}
        dataset, labels = _load_data(data, split, limit, columns, pipe.model.config)
        _check_output(out)
        rows, used_method = _certify_all(pipe, dataset, labels, batch_size)
        summary = _summarise(rows, thresholds, pipe, used_method)
        summary = {
            "model": model or "embedded default",
            "data": data,
            "split": split,
            **summary,
            # for a deterministic certificate the smoothing arguments had no part
            "settings": settings if used_method == "mono" else {"method": method},
            "versions": {package: version(package) for package in ("torch", "transformers", "numpy", "scipy")},
        }
        _write(out, rows, summary)
        _print(summary, out)


def _parse_radii(text: str) -> dict[str, float]:
    thresholds = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        try:
            radius = float(Fraction(part.replace(" ", "")))
        except (ValueError, ZeroDivisionError, OverflowError) as error:
            raise ValueError(
                f"`--radii` holds {part!r}: give numbers or fractions, such as 36/255,0.5,1.0."
            ) from error
        if not (math.isfinite(radius) and radius >= 0.0):
            raise ValueError(f"`--radii` holds {part!r}: radii must be finite and >= 0.")
        thresholds[part] = radius
    if not thresholds:
        raise ValueError("`--radii` is empty: give numbers or fractions, such as 36/255,0.5,1.0.")
    return thresholds


def _check_output(out: Path) -> None:
    """Fail before hours of work rather than after."""
    from importlib.util import find_spec

    if find_spec("matplotlib") is None:
        raise ImportError('The plot needs matplotlib: pip install "hf_lip[demo]".')
    if out.exists() and not out.is_dir():
        raise ValueError(f"`--out` {str(out)!r} is a file: give a folder.")
    out.mkdir(parents=True, exist_ok=True)
    if not os.access(out, os.W_OK):
        raise ValueError(f"`--out` {str(out)!r} cannot be written to: choose another folder.")


def _load_pipeline(model: str | None, device: str | None, settings: dict[str, Any]) -> Any:
    import datasets
    import transformers
    from huggingface_hub.utils import disable_progress_bars

    import hf_lip  # noqa: F401 (registers the models and the task)
    from hf_lip.pipelines.certify import CertifySettings

    CertifySettings.from_arguments(settings)
    datasets.disable_progress_bars()
    disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    if model is None:
        from hf_lip.assets import DEFAULT_MODEL_DIR

        model = str(DEFAULT_MODEL_DIR)
    elif not Path(model).exists() and (model.startswith((".", "/", "~")) or model.count("/") > 1):
        raise FileNotFoundError(f"`MODEL` {model!r} does not exist: give the folder of a checkpoint, or a Hub id.")
    build: Any = transformers.pipeline
    return build("certify", model=model, device=device, **settings)


def _load_data(
    data: str, split: str, limit: int | None, columns: dict[str, str | None], config: Any
) -> tuple[Any, list[int]]:
    from hf_lip.data.images import load_image_dataset

    dataset = load_image_dataset(
        data, split, image_column=columns["image_column"], label_column=columns["label_column"], name=columns["name"]
    )
    if limit is not None:
        dataset = dataset.select(range(min(limit, len(dataset))))
    labels = [int(label) for label in dataset["label"]]
    names = list(dataset.features["label"].names)
    model_names = [str(config.id2label.get(number, number)) for number in range(config.num_labels)]
    if names != model_names and sorted(names) == sorted(model_names):
        # the same classes in another order: the names say which is which
        labels = [model_names.index(names[label]) for label in labels]
    if max(labels) >= config.num_labels:
        raise ValueError(
            f"Unknown label {max(labels)}: the model has {config.num_labels} classes, the data set {len(names)}; "
            "choose data of the model's classes."
        )
    return dataset.select_columns(["image"]), labels


def _certify_all(pipe: Any, dataset: Any, labels: list[int], batch_size: int | None) -> tuple[list[_Row], str]:
    method = pipe.method
    settings = pipe.settings
    if batch_size is None and method == "lipschitz":
        batch_size = _IMAGES_PER_BATCH
    units = settings.n0 + settings.n if method == "mono" else 1
    predictions: list[tuple[int, float]] = []
    arrivals = [time.perf_counter()]
    with progress_bar() as bar:
        task = bar.add_task("Noisy copies" if method == "mono" else "Images", total=len(labels) * units)
        for result in pipe(dataset, batch_size=batch_size, progress=lambda count: bar.advance(task, count)):
            predictions.append((-1 if result["abstained"] else result["label_id"], result["radius"]))
            arrivals.append(time.perf_counter())
    seconds = _seconds_per_image(arrivals, 1 if method == "mono" else batch_size or 1)
    rows = [
        _Row(index, label, predict, radius, predict == label, elapsed)
        for index, (label, (predict, radius), elapsed) in enumerate(zip(labels, predictions, seconds, strict=True))
    ]
    return rows, method


def _seconds_per_image(arrivals: list[float], batch_size: int) -> list[float]:
    """Images of one batch arrive together: each is given an equal share of the batch's time."""
    count = len(arrivals) - 1
    seconds = []
    for start in range(0, count, batch_size):
        end = min(start + batch_size, count)
        seconds += [(arrivals[end] - arrivals[start]) / (end - start)] * (end - start)
    return seconds


def _summarise(rows: list[_Row], thresholds: dict[str, float], pipe: Any, method: str) -> dict[str, Any]:
    radii = np.array([row.radius for row in rows])
    correct = np.array([row.correct for row in rows])
    constant = None
    if hasattr(pipe.model, "certify"):
        certificate = pipe.model.certificate or pipe.model.certify()
        constant = float(certificate.lipschitz_constant)
    return {
        "method": method,
        "num_images": len(rows),
        "clean_accuracy": float(correct.mean()),
        "certified_accuracy": {name: certified_accuracy(radii, correct, eps) for name, eps in thresholds.items()},
        "average_certified_radius": average_certified_radius(radii, correct),
        "abstention_rate": abstention_rate([row.predict == -1 for row in rows]),
        "lipschitz_constant": constant,
        "radius_unit": "l2, pixels in [0, 1]",
        "seconds": float(sum(row.seconds for row in rows)),
        "seconds_per_image": float(np.mean([row.seconds for row in rows])),
    }


def _write(out: Path, rows: list[_Row], summary: dict[str, Any]) -> None:
    from hf_lip.models.certificate import write_text_atomically
    from hf_lip.plots import plot_certified_accuracy

    lines = ["\t".join(_TSV_COLUMNS)]
    for row in rows:
        # all digits of the radius: printing fewer could round it up
        fields = (row.index, row.label, row.predict, repr(row.radius), int(row.correct), f"{row.seconds:.6f}")
        lines.append("\t".join(map(str, fields)))
    write_text_atomically(out / "certificates.tsv", "\n".join(lines) + "\n")
    write_text_atomically(out / "summary.json", json.dumps(summary, indent=2) + "\n")
    plot_certified_accuracy(
        [row.radius for row in rows],
        [row.correct for row in rows],
        path=out / "certified_accuracy.png",
        title=f"{Path(summary['model']).name} on {Path(summary['data']).name} ({summary['split']})",
        label=summary["method"],
    )


def _print(summary: dict[str, Any], out: Path) -> None:
    console = Console()
    smoothing = summary["method"] == "mono"
    title = f"{summary['model']} on {summary['data']} ({summary['split']}, {summary['num_images']} images)"
    table = Table("", summary["method"], title=escape(title), title_justify="left")
    table.columns[1].justify = "right"
    clean = "accuracy of the smoothed classifier (abstentions are wrong)" if smoothing else "clean accuracy"
    table.add_row(clean, f"{100 * summary['clean_accuracy']:.2f} %")
    for name, accuracy in summary["certified_accuracy"].items():
        table.add_row(f"certified accuracy at {escape(name)}", f"{100 * accuracy:.2f} %")
    table.add_row("abstentions", f"{100 * summary['abstention_rate']:.2f} %")
    table.add_row("average certified radius (ACR)", f"{summary['average_certified_radius']:.4f}")
    if summary["lipschitz_constant"] is not None:
        table.add_row("certified Lipschitz constant", f"{summary['lipschitz_constant']:.9g}")
    if smoothing:
        table.add_row("seconds per image", f"{summary['seconds_per_image']:.3f}")
    table.add_row("time", f"{summary['seconds']:.2f} s")
    console.print(table)
    console.print(f"Radii are {summary['radius_unit']}.", markup=False, highlight=False)
    if smoothing:
        settings = summary["settings"]
        console.print(
            f"Smoothing with sigma={settings['sigma']}, n0={settings['n0']}, n={settings['n']}: each certificate "
            f"is of the smoothed classifier and wrong with probability at most {settings['alpha']}.",
            markup=False, highlight=False, soft_wrap=True,
        )  # fmt: skip
    for file in ("certificates.tsv", "summary.json", "certified_accuracy.png"):
        console.print(f"Wrote {out / file}", markup=False, highlight=False, soft_wrap=True)
