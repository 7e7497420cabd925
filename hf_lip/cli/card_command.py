# SPDX-License-Identifier: Apache-2.0
"""`hf-lip card`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.box import SIMPLE
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from hf_lip.cli.console import errors_as_one_line, progress_bar, wide_console


if TYPE_CHECKING:
    from hf_lip.cards import CardCheck

_WRITE, _CHECK = "Write", "Check"


def card(
    folder: Annotated[
        Path, typer.Argument(metavar="DIR", help="Folder with a model and results.json or summary.json.")
    ],
    check: Annotated[
        bool,
        typer.Option("--check", help="Check the card that is there instead: exit code 1 if a number does not hold."),
    ] = False,
    name: Annotated[
        str | None, typer.Option(help="Name of the model, owner/name on the Hub.", rich_help_panel=_WRITE)
    ] = None,
    license_id: Annotated[
        str | None, typer.Option("--license", help="Such as apache-2.0.", rich_help_panel=_WRITE)
    ] = None,
    tags: Annotated[list[str] | None, typer.Option("--tag", help="More tags.", rich_help_panel=_WRITE)] = None,
    datasets: Annotated[
        list[str] | None, typer.Option("--dataset", help="Id of a data set on the Hub.", rich_help_panel=_WRITE)
    ] = None,
    overwrite: Annotated[
        bool,
        typer.Option(
            "--overwrite",
            help="Replace a card of this command; its hand-written sections stay.",
            rich_help_panel=_WRITE,
        ),
    ] = False,
    plot: Annotated[bool, typer.Option("--plot/--no-plot", help="Draw the plots.", rich_help_panel=_WRITE)] = True,
    again: Annotated[
        bool,
        typer.Option(
            "--evaluate-again",
            help="First run the evaluation of results.json again, on all examples, and put its figures and the hash "
            "of the weights there: for weights that are not those of the file.",
            rich_help_panel=_WRITE,
        ),
    ] = False,
    data: Annotated[
        str | None, typer.Option(help="Place of the data, if not as in the files.", rich_help_panel=_CHECK)
    ] = None,
    limit: Annotated[
        int | None, typer.Option(help="Check on LIMIT examples, evenly spread.", rich_help_panel=_CHECK)
    ] = None,
    stride: Annotated[int, typer.Option(help="Check on every STRIDE-th example.", rich_help_panel=_CHECK)] = 1,
    rerun: Annotated[
        bool, typer.Option("--rerun/--no-rerun", help="Run the evaluation again.", rich_help_panel=_CHECK)
    ] = True,
    device: Annotated[
        str | None, typer.Option(help="Such as cpu or cuda:0; default: a GPU, if any.", rich_help_panel=_CHECK)
    ] = None,
    batch_size: Annotated[int | None, typer.Option(help="Examples a forward pass.", rich_help_panel=_CHECK)] = None,
) -> None:
    """Write a model card whose numbers come from results.json and summary.json alone, or check one.

    The files have to be of the weights in the folder, by their hash. Text between the marks of the sections
    description and notes is written by hand and kept; a number there that no file holds is refused.

    Figures of papers may stand beside the measured ones, in a column of their own: published.json in the folder
    holds a list of {"source": "Araujo et al. 2023, table 1", "values": {"clean accuracy": 0.712},
    "remark": "1,000 epochs there, 20 here."}, values as fractions of 1 under the names that the card gives the
    measured figures; "file" and "name" choose the evaluation where there are several.

    --check compares every number of the card with the files, verifies the certificate, and runs the evaluation again:
    on all examples figures have to be the same, on a sample they have to lie in its 99.9 % intervals.
    """
    given: dict[str, Any] = {"--name": name, "--license": license_id, "--tag": tags, "--dataset": datasets}
    given |= {"--overwrite": overwrite, "--evaluate-again": again}
    where: dict[str, Any] = {"--data": data, "--device": device, "--batch-size": batch_size}
    of_check: dict[str, Any] = {"--limit": limit, "--stride": stride != 1, "--no-rerun": not rerun}
    with errors_as_one_line():
        for option, value in (given if check else of_check).items():
            if value:
                other = "without" if check else "with"
                raise ValueError(f"`{option}` is for `hf-lip card` {other} --check: leave it out.")
        for option, value in where.items():
            if value and not (check or again):
                raise ValueError(f"`{option}` is for `hf-lip card` with --check or --evaluate-again: leave it out.")
        import transformers

        transformers.utils.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
        if check:
            settings = {"limit": limit, "stride": stride, "device": device, "batch_size": batch_size, "rerun": rerun}
            _check(folder, data, settings)
            return
        from hf_lip.cards import UnmeasuredNumberError, write_card

        if again:
            _evaluate_again(folder, data, {"device": device, "batch_size": batch_size})
        try:
            path = write_card(
                folder, name=name, license=license_id, tags=tags or (), datasets=datasets or (), overwrite=overwrite,
                plot=plot,
            )  # fmt: skip
        except UnmeasuredNumberError as error:
            Console(stderr=True).print(f"Error: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
            raise typer.Exit(1) from error
        console = wide_console()
        console.print(f"Wrote {path}", markup=False, highlight=False, soft_wrap=True)


def _check(folder: Path, data: str | None, settings: dict[str, Any]) -> None:
    import datasets

    from hf_lip.cards import check_card

    datasets.disable_progress_bars()
    with progress_bar() as bar:
        task = bar.add_task("Evaluating", total=None)
        found = check_card(
            folder,
            data=data,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
            **settings,
        )
    _print(found, wide_console())
    if not found.ok:
        raise typer.Exit(1)


def _evaluate_again(folder: Path, data: str | None, settings: dict[str, Any]) -> None:
    import datasets

    from hf_lip.cards import evaluate_again

    datasets.disable_progress_bars()
    with progress_bar() as bar:
        task = bar.add_task("Evaluating", total=None)
        found = evaluate_again(
            folder,
            data=data,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
            **settings,
        )
    console = wide_console()
    for name, former, value in found.changed:
        line = f"{name}: {former:.6g} before, {value:.6g} now"
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    kept = "still" if found.same_run else "no longer, as it is of other weights,"
    console.print(
        f"Wrote {folder / 'results.json'}, which {kept} says how the model was trained.",
        markup=False, highlight=False, soft_wrap=True,
    )  # fmt: skip


def _print(check: "CardCheck", console: Console) -> None:
    if check.figures:
        table = Table(title=escape(check.folder), title_justify="left", box=SIMPLE)
        for column in ("figure", "on the card", "found", "may be", ""):
            table.add_column(column, justify="left" if column in ("figure", "") else "right")
        where = None
        for figure in check.figures:
            if figure.where != where:
                where = figure.where
                table.add_row(f"[bold]{escape(where)}[/bold]", "", "", "", escape(figure.examples))
            low, high = _text(figure.lowest, figure.share), _text(figure.highest, figure.share)
            table.add_row(
                escape(figure.name),
                _text(figure.stated, figure.share),
                _text(figure.found, figure.share),
                low if low == high else f"{low} to {high}",
                "" if figure.reproduced else "[red]not reproduced[/red]",
            )
        console.print(table)
    for line in check.notes:
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    if check.ok:
        console.print(f"CHECKED: every number of the card in {check.folder} holds.", highlight=False, soft_wrap=True)
        return
    console.print(f"NOT CONFIRMED: {check.folder}", style="red", markup=False, highlight=False, soft_wrap=True)
    for line in check.problems:
        console.print(f"  - {line}", style="red", markup=False, highlight=False, soft_wrap=True)


def _text(value: float, share: bool) -> str:
    return f"{100.0 * min(max(value, 0.0), 1.0):.2f} %" if share else f"{value:.6g}"
