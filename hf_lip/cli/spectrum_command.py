# SPDX-License-Identifier: Apache-2.0
"""`hf-lip spectrum`."""

import os
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.box import SIMPLE
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from hf_lip.cli.console import errors_as_one_line, progress_bar, wide_console


if TYPE_CHECKING:
    from hf_lip.checkpoints.spectrum_report import LayerSpectrum, SpectrumReport

_REASONS_SHOWN = 8


def spectrum(
    model: Annotated[str, typer.Argument(help="Folder, safetensors file or Hub id of a checkpoint.")],
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a Hub repository.")] = None,
    rtol: Annotated[float, typer.Option(help="Relative width asked of each norm's interval.")] = 1e-3,
    input_size: Annotated[
        str | None, typer.Option(help="Size of the model's images, such as 224 or 224x160; default: the config's.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for spectrum.json and spectrum.png.")] = Path("hf-lip-spectrum"),
    top: Annotated[int, typer.Option(help="Rows of the table; 0 for all.")] = 20,
    sort: Annotated[str, typer.Option(help="norm (largest first) | depth (order of the network).")] = "norm",
) -> None:
    """Certified spectral norms of every layer of any safetensors checkpoint: table, JSON and plot."""
    with errors_as_one_line():
        size = _parse_size(input_size)
        if top < 0:
            raise ValueError(f"`--top` must not be negative, got {top}.")
        if sort not in ("norm", "depth"):
            raise ValueError(f"`--sort` must be 'norm' or 'depth', got {sort!r}.")
        _check_output(out)

        import transformers

        from hf_lip.checkpoints.source import Checkpoint
        from hf_lip.checkpoints.spectrum import spectrum as measure
        from hf_lip.models.certificate import write_text_atomically
        from hf_lip.plots import plot_spectrum

        # what a config states is read, not run: its warnings are for those who load the model
        transformers.utils.logging.set_verbosity_error()
        with progress_bar() as bar:
            files = bar.add_task("Files", total=None)
            checkpoint = Checkpoint.open(
                model, revision, progress=lambda done, total, name: bar.update(files, completed=done, total=total)
            )
            layers = bar.add_task("Layers", total=None)
            report = measure(
                checkpoint,
                rtol=rtol,
                input_size=size,
                progress=lambda done, total, name: bar.update(layers, completed=done, total=total),
            )
        report = replace(report, model=model)
        write_text_atomically(out / "spectrum.json", report.to_json())
        plot_spectrum(report.layers, path=out / "spectrum.png", title=Path(model).name)
        _print(report, sort, top)
        for file in ("spectrum.json", "spectrum.png"):
            Console().print(f"Wrote {out / file}", markup=False, highlight=False, soft_wrap=True)


def _parse_size(text: str | None) -> int | tuple[int, int] | None:
    if text is None:
        return None
    match = re.fullmatch(r"([1-9]\d*)(?:\s*[x,]\s*([1-9]\d*))?", text.strip())
    if match is None:
        raise ValueError(f"`--input-size` must be one size or HEIGHTxWIDTH, such as 224 or 224x160, got {text!r}.")
    return int(match[1]) if match[2] is None else (int(match[1]), int(match[2]))


def _check_output(out: Path) -> None:
    """Fail before the work rather than after."""
    from importlib.util import find_spec

    if find_spec("matplotlib") is None:
        raise ImportError('The plot needs matplotlib: pip install "hf_lip[demo]".')
    if out.exists() and not out.is_dir():
        raise ValueError(f"`--out` {str(out)!r} is a file: give a folder.")
    out.mkdir(parents=True, exist_ok=True)
    if not os.access(out, os.W_OK):
        raise ValueError(f"`--out` {str(out)!r} cannot be written to: choose another folder.")


def _print(report: "SpectrumReport", sort: str, top: int) -> None:
    console = wide_console()
    ordered = report.sorted_layers(sort)
    for linear, title in ((True, "spectral norms"), (False, "Lipschitz constants of layers that are not linear")):
        rows = [layer for layer in ordered if layer.linear == linear]
        if rows:
            _print_table(console, f"{report.model}: {title}", rows, top)
    reasons = Counter(tensor.reason for tensor in report.skipped)
    if reasons:
        console.print("Tensors without a norm:", highlight=False)
    for reason, count in reasons.most_common(_REASONS_SHOWN):
        example = next(tensor.name for tensor in report.skipped if tensor.reason == reason)
        names = example if count == 1 else f"{count} tensors such as {example}"
        console.print(f"  - {escape(names)}: {escape(reason)}", highlight=False, soft_wrap=True)
    if len(reasons) > _REASONS_SHOWN:
        left = sum(reasons.values()) - sum(count for _, count in reasons.most_common(_REASONS_SHOWN))
        console.print(f"  - {left} more, listed in spectrum.json", highlight=False)
    for line in report.summary():
        console.print(escape(line), highlight=False, soft_wrap=True)


def _print_table(console: Console, title: str, rows: "list[LayerSpectrum]", top: int) -> None:
    shown = rows[:top] if top else rows
    table = Table(title=escape(title), title_justify="left", box=SIMPLE)
    for column in ("layer", "kind", "shape"):
        table.add_column(column, no_wrap=True)
    for column in ("norm <=", "norm >=", "stable rank", "largest head"):
        table.add_column(column, no_wrap=True, justify="right")
    table.add_column("remarks")
    for layer in shown:
        table.add_row(*(escape(cell) for cell in _cells(layer)))
    console.print(table)
    if len(shown) < len(rows):
        console.print(f"{len(rows) - len(shown)} more layers are in spectrum.json.", highlight=False)


def _cells(layer: "LayerSpectrum") -> tuple[str, ...]:
    from hf_lip.checkpoints.spectrum_report import above, below

    remarks = [f"{part} not known" for part in (", ".join(layer.unknown),) if part]
    if not layer.certified:
        remarks.append("not certified")
    rank = ""
    if layer.linear and layer.stable_rank is not None:
        # of a convolution: for each pixel of its output
        rank = below(layer.stable_rank, 4) + (" / px" if layer.kind.startswith("conv") else "")
    return (
        layer.name + (" (tied)" if layer.tied else ""),
        layer.kind.replace("_", " "),
        "x".join(map(str, layer.shape)),
        above(layer.upper),
        below(layer.lower),
        rank,
        "" if layer.heads is None else f"{above(layer.heads.upper)} of {layer.heads.count}",
        "; ".join(remarks),
    )
