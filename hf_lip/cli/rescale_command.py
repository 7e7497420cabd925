# SPDX-License-Identifier: Apache-2.0
"""`hf-lip rescale`."""

import shlex
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.box import SIMPLE
from rich.markup import escape
from rich.table import Table

from hf_lip.cli.console import errors_as_one_line, progress_bar, wide_console


if TYPE_CHECKING:
    from hf_lip.checkpoints.rescale_report import Interval, RescaleReport


def rescale(
    model: Annotated[str, typer.Argument(help="Checkpoint: folder, safetensors file or Hub id.")],
    out: Annotated[Path, typer.Option(help="Folder to be made; nothing is overwritten.")],
    mode: Annotated[str, typer.Option(help="sn: one factor a layer | sr: one factor an output channel.")] = "sn",
    to: Annotated[float, typer.Option(help="C: the largest spectral norm allowed.")] = 1.0,
    layers: Annotated[
        list[str] | None,
        typer.Option(help="Only layers, or tensors, whose name matches, such as 'encoder.*'; may be repeated."),
    ] = None,
    fold_bn: Annotated[
        bool, typer.Option("--fold-bn", help="First multiply layers by the batch norms that follow them.")
    ] = False,
    preserve_logits: Annotated[
        bool,
        typer.Option(
            "--preserve-logits",
            help="Divide by powers of two (norms end in (C/2, C]) and move the divisors on, through ReLU, pooling and "
            "linear layers, into batch norms, biases and the logits, which are divided by one power of two: all "
            "predictions stay. Where they can go is read off the network if transformers can build it; otherwise "
            "pairs such as conv1/bn1 are told from names, and --chain states the order of layers.",
        ),
    ] = False,
    enlarge: Annotated[
        bool, typer.Option("--enlarge", help="Scale smaller norms up to C too; by default they are left alone.")
    ] = False,
    iterations: Annotated[
        int, typer.Option(help="sr: 1 is AOL, more comes closer to C; memory of kernels grows fourfold a step.")
    ] = 1,
    chain: Annotated[
        str | None,
        typer.Option(
            help="Layers in the order of the forward pass, comma separated, the last giving the logits, with nothing "
            "but ReLU, LeakyReLU, pooling, flattening and batch norms between them. Only for networks whose code "
            "is not known; it is taken on trust.",
        ),
    ] = None,
    bn_eps: Annotated[
        float | None, typer.Option(help="--fold-bn: eps of the batch norms, where it is not known.")
    ] = None,
    image_size: Annotated[
        int | None,
        typer.Option(
            help="Side of the model's images; default: its config's. Without any, norms are bounds for all sizes, "
            "which take longer for wide convolutions."
        ),
    ] = None,
    rtol: Annotated[
        float, typer.Option(help="Relative width of the norms; more is quicker and ends further below C.")
    ] = 1e-3,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of the Hub repository.")] = None,
    push_to: Annotated[
        str | None, typer.Option(help="Hub repository to upload the folder to, in one commit; new or empty.")
    ] = None,
    private: Annotated[bool, typer.Option("--private", help="--push-to: make the repository private.")] = False,
) -> None:
    """Write a copy of a checkpoint whose layers have certified spectral norms of at most C.

    The norms are measured again on the new files, in their dtype, and are upper bounds. Biases, names, dtypes and
    shards stay as they are. Divided weights make another network, unless --preserve-logits.
    """
    console = wide_console()
    with errors_as_one_line():
        from huggingface_hub.utils import disable_progress_bars
        from transformers.utils import logging

        from hf_lip.checkpoints.rescale import rescale_checkpoint
        from hf_lip.checkpoints.source import Checkpoint
        from hf_lip.hub import push_folder, require_pushable

        disable_progress_bars()
        logging.set_verbosity_error()
        settings: dict[str, Any] = {
            "mode": mode,
            "to": to,
            "layers": tuple(layers or ()),
            "fold_bn": fold_bn,
            "preserve_logits": preserve_logits,
            "enlarge": enlarge,
            "num_iterations": iterations,
            "chain": tuple(part.strip() for part in chain.split(",")) if chain is not None else (),
            "bn_eps": bn_eps,
            "image_size": image_size,
            "rtol": rtol,
        }
        if push_to is not None:
            require_pushable(push_to, new=True)
            if Checkpoint.open(model, revision=revision).config is None:
                raise ValueError(
                    f"`--push-to` publishes checkpoints with their config, and there is no config.json beside the "
                    f"weights of {model!r}: leave it out."
                )
        elif private:
            raise ValueError("`--private` is of the repository of `--push-to`: give that too.")
        with progress_bar() as bar:
            task = bar.add_task("Rescaling", total=None)
            report = rescale_checkpoint(
                model,
                out,
                revision=revision,
                command=_command(model, settings, revision),
                progress=lambda done, total, _: bar.update(task, completed=done, total=total),
                **settings,
            )
        _print(report, console)
        console.print(f"Wrote {out}", markup=False, highlight=False, soft_wrap=True)
        if push_to is not None:
            message = "Upload a rescaled checkpoint with certified norms"
            pushed = push_folder(out, push_to, private=True if private else None, commit_message=message)
            console.print(f"Pushed {pushed.url}", markup=False, highlight=False, soft_wrap=True)


def _command(model: str, settings: dict[str, Any], revision: str | None) -> str:
    """The command line without the paths of this machine: MODEL, mode, C and what is not the default."""
    from hf_lip.checkpoints.rescale_report import RescaleSettings

    source = Path(model).expanduser()
    words = ["hf-lip", "rescale", source.resolve().name if source.exists() else model]
    defaults = asdict(RescaleSettings())
    for name, value in {**settings, "revision": revision}.items():
        option = f"--{name.removeprefix('num_').replace('_', '-')}"
        if name not in ("mode", "to") and value == defaults.get(name):
            continue
        if name == "layers":
            words += [word for pattern in value for word in (option, pattern)]
        elif value is True:
            words.append(option)
        else:
            words += [option, ",".join(value) if name == "chain" else str(value)]
    return shlex.join([*words, "--out", "OUT"])


def _print(report: "RescaleReport", console: Any) -> None:
    folded = any(layer.folded is not None for layer in report.layers)
    table = Table(title=escape(f"{report.source}: norms of at most {report.settings.to:g}"), box=SIMPLE)
    table.title_justify = "left"
    for column in ("layer", "shape", "before", *(["with batch norm"] if folded else []), "after", "factor"):
        table.add_column(column, no_wrap=column != "layer", overflow="fold")
    for layer in report.layers:
        smallest, largest = layer.factors
        factor = f"{largest:.4g}" if smallest == largest else f"{smallest:.4g} to {largest:.4g}"
        middle = [_interval(layer.folded)] if folded else []
        shape = "x".join(map(str, layer.shape))
        table.add_row(escape(layer.name), shape, _interval(layer.before), *middle, _interval(layer.after), factor)
    console.print(table)
    lines = [
        f"Largest certified norm: {report.largest_before:.6g} before, {report.largest_after:.6g} after, measured on "
        f"the files; {report.num_changed} of {len(report.layers)} layers changed.",
    ]
    if report.not_rescaled:
        lines.append(f"{len(report.not_rescaled)} other weights were left as they are.")
    if report.logits_exponent is not None:
        proved = report.scales_read_from == "model"
        told = "read off the network" if proved else "told from names or stated, not proved"
        lines.append(f"The logits are the original's divided by 2^{report.logits_exponent} ({told}).")
    if report.left_out:
        lines.append(f"Not copied: {', '.join(report.left_out)}.")
    for line in [*lines, *report.notes]:
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def _interval(norm: "Interval | None") -> str:
    return "" if norm is None else f"{norm.lower:.5g} .. {norm.upper:.5g}"
