# SPDX-License-Identifier: Apache-2.0
"""`hf-lip convert-attention`."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from hf_lip.cli.console import errors_as_one_line


def convert_attention(
    model: Annotated[str, typer.Argument(help="Folder or Hub id of a Llama, Qwen2 or GPT-2 language model.")],
    out: Annotated[Path, typer.Option(help="New folder for the converted checkpoint.")],
    gamma: Annotated[float, typer.Option(help="Discount to start at; 0 keeps the model's function.")] = 0.0,
    learnable_gamma: Annotated[
        bool, typer.Option("--learnable-gamma", help="Train one discount a head, started at --gamma.")
    ] = False,
    diagonal: Annotated[str, typer.Option(help="strict | keep.")] = "strict",
    normalize: Annotated[bool, typer.Option(help="Divide by row sums in place of multiplying by 1 - gamma.")] = False,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a Hub repository.")] = None,
) -> None:
    """Turn a pre-trained softmax checkpoint into one with chained attention, its weights as they are."""
    with errors_as_one_line():
        import hf_lip  # noqa: F401, registers what is written
        from hf_lip.models.chacal.convert import convert_attention as convert

        report = convert(
            model,
            out,
            gamma=gamma,
            gamma_learnable=learnable_gamma,
            diagonal=diagonal,
            normalize=normalize,
            revision=revision,
        )
        console = Console()
        console.print(
            f"Wrote {out}: {report.model_type}, {report.num_layers} chained layers, gamma {gamma:g}"
            f"{', learnt from there' if learnable_gamma else ''}.",
            markup=False,
            highlight=False,
            soft_wrap=True,
        )
        console.print(
            f"Largest difference of the logits from the original: {report.largest_difference:.3g} (largest logit "
            f"{report.largest_logit:.3g}).",
            highlight=False,
            soft_wrap=True,
        )
