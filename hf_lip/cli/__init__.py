# SPDX-License-Identifier: Apache-2.0
"""The command line `hf-lip`. torch and transformers are imported inside the commands, so that `--help` is quick."""

from importlib.metadata import PackageNotFoundError, version
from typing import Annotated

import typer

from hf_lip.cli.card_command import card
from hf_lip.cli.certify_command import certify
from hf_lip.cli.convert_attention_command import convert_attention
from hf_lip.cli.push_command import push
from hf_lip.cli.report_command import report
from hf_lip.cli.rescale_command import rescale
from hf_lip.cli.spectrum_command import spectrum
from hf_lip.cli.track_command import track
from hf_lip.cli.verify_command import verify


app = typer.Typer(
    name="hf-lip",
    help="Networks whose behaviour can be proved: certify images, verify checkpoints.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _version(show: bool) -> None:
    if not show:
        return
    packages = []
    for package in ("hf_lip", "torch", "transformers"):
        try:
            packages.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            packages.append(f"{package} (not installed as a package)")
    typer.echo(", ".join(packages))
    raise typer.Exit


@app.callback()
def _main(
    show_version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the versions and exit.")
    ] = False,
) -> None:
    pass


app.command()(card)
app.command()(certify)
app.command()(convert_attention)
app.command()(push)
app.command()(report)
app.command()(rescale)
app.command()(spectrum)
app.command()(track)
app.command()(verify)
