# SPDX-License-Identifier: Apache-2.0
"""`hf-lip verify`."""

from pathlib import Path
from typing import Annotated

import typer
from rich.box import SIMPLE
from rich.markup import escape
from rich.table import Table

from hf_lip.cli.console import errors_as_one_line, progress_bar, wide_console


def verify(
    folder: Annotated[Path, typer.Argument(help="Checkpoint folder with a lipschitz_certificate.json.")],
) -> None:
    """Recompute a checkpoint's Lipschitz constant from its files alone; exit code 1 if it does not hold."""
    console = wide_console()
    with errors_as_one_line():
        from hf_lip.checkpoints.verify import verify_checkpoint

        with progress_bar() as bar:
            task = bar.add_task("Verifying", total=None)
            report = verify_checkpoint(
                folder, progress=lambda done, total, node: bar.update(task, completed=done, total=total)
            )
        header, *nodes = report.table()
        table = Table(title=escape(str(folder)), title_justify="left", box=SIMPLE)
        for column in header:
            table.add_column(column, no_wrap=column != header[-1])
        for name, *cells in nodes:
            table.add_row(*(escape(cell) for cell in (name.removeprefix("lipschitz_vision."), *cells)))
        console.print(table)
        for line in report.summary():
            console.print(escape(line), style=None if report.ok else "red", soft_wrap=True, highlight=False)
    if not report.ok:
        raise typer.Exit(1)
