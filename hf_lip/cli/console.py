# SPDX-License-Identifier: Apache-2.0
"""What every command shares: one-line errors, progress bars, consoles."""

from collections.abc import Iterator
from contextlib import contextmanager

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)


@contextmanager
def errors_as_one_line() -> Iterator[None]:
    """What the user can mend, as one red line and exit code 2; anything else is a bug and keeps its traceback."""
    from safetensors import SafetensorError

    try:
        yield
    except (ValueError, TypeError, OSError, ImportError, RuntimeError, SafetensorError) as error:
        # typer's own Exit and Abort are RuntimeErrors
        if isinstance(error, (typer.Exit, typer.Abort)):
            raise
        message = " ".join(str(error).split()) or type(error).__name__
        Console(stderr=True).print(f"Error: {message}", style="red", markup=False, highlight=False, soft_wrap=True)
        raise typer.Exit(2) from error


def progress_bar() -> Progress:
    columns: tuple[ProgressColumn, ...] = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    console = Console(stderr=True)
    columns += (TextColumn("left"), TimeRemainingColumn())
    # without a terminal a bar could only leave blank lines in a log
    return Progress(*columns, console=console, transient=True, disable=not console.is_terminal)


def wide_console() -> Console:
    """A console whose rows stay on one line where there is no terminal: a pipe or a file has no width."""
    console = Console()
    return console if console.is_terminal else Console(width=160)
