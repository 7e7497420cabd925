# SPDX-License-Identifier: Apache-2.0
"""`hf-lip push`."""

from pathlib import Path
from typing import Annotated

import typer

from hf_lip.cli.console import errors_as_one_line, wide_console


def push(
    folder: Annotated[
        Path, typer.Argument(metavar="DIR", help="Folder that a training script or `save_pretrained` wrote.")
    ],
    repo: Annotated[str, typer.Argument(help="Repository on the Hub, 'owner/name' or 'name'; made if there is none.")],
    private: Annotated[
        bool, typer.Option("--private", help="Make the repository private; one that exists must be.")
    ] = False,
    revision: Annotated[
        str | None, typer.Option(help="Branch to push to; made if there is none. Default: main.")
    ] = None,
    message: Annotated[str | None, typer.Option(help="Commit message.")] = None,
    create_pr: Annotated[bool, typer.Option("--create-pr", help="Open a pull request instead.")] = False,
) -> None:
    """Publish a checkpoint on the Hub, in one commit: weights, config, certificate, card, plots, and the shim.

    The certificate is checked against the weights first, and the files on the Hub against the folder afterwards.
    DIR may be the output folder of transformers.Trainer, whose own push_to_hub leaves out the shim, without which the
    model loads only after `import hf_lip`.

    Needs the token of `hf auth login` or HF_TOKEN.
    """
    console = wide_console()
    with errors_as_one_line():
        from transformers.utils import logging

        from hf_lip.hub import push_folder

        logging.set_verbosity_error()
        report = push_folder(
            folder,
            repo,
            revision=revision,
            private=True if private else None,
            commit_message=message,
            create_pr=create_pr,
        )
    lines = [f"Pushed {len(report.files)} files to {report.repo}: {', '.join(report.files)}"]
    if report.left_out:
        lines.append(f"Left out: {', '.join(report.left_out)}")
    for line in [*lines, f"{report.url} holds what was sent, compared by hash."]:
        console.print(line, markup=False, highlight=False, soft_wrap=True)
