# SPDX-License-Identifier: Apache-2.0
"""`hf-lip certify`."""

import math
import os
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Any

import typer

from hf_lip.cli.certify_runs import certify_from_counts, certify_images
from hf_lip.cli.console import errors_as_one_line
from hf_lip.metrics import STANDARD_RADII


_SMOOTHING = "Smoothing"
_RUN = "Run"


def certify(
    context: typer.Context,
    model: Annotated[
        str | None, typer.Argument(help="Folder or Hub id of an image classifier; default: the embedded one.")
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of the Hub repository MODEL.")] = None,
    data: Annotated[
        str, typer.Option(help="'digits', a folder or file of parquet, a folder of images, or a Hub id.")
    ] = "digits",
    split: Annotated[str, typer.Option(help="Split of the data.")] = "test",
    method: Annotated[
        str,
        typer.Option(
            help="lipschitz (deterministic) | by smoothing: mono | bonferroni | cpm (votes), lvm | betting (soft "
            "scores) | auto: lipschitz where the model has it, else the best of mono, bonferroni and cpm."
        ),
    ] = "auto",
    predict: Annotated[
        bool, typer.Option("--predict", help="Classes of the smoothed classifier, without radii.")
    ] = False,
    sigma: Annotated[float, typer.Option(help="Noise level, pixels in [0, 1].", rich_help_panel=_SMOOTHING)] = 0.25,
    n0: Annotated[int, typer.Option(help="Noisy copies that choose the class.", rich_help_panel=_SMOOTHING)] = 100,
    n: Annotated[
        int, typer.Option(help="Noisy copies that bound its probability.", rich_help_panel=_SMOOTHING)
    ] = 10_000,
    alpha: Annotated[
        float, typer.Option(help="Failure probability of one certificate.", rich_help_panel=_SMOOTHING)
    ] = 0.001,
    seed: Annotated[int, typer.Option(help="Seed of the noise.", rich_help_panel=_SMOOTHING)] = 0,
    budget: Annotated[
        str, typer.Option(help="fixed | adaptive: stop when more samples gain little.", rich_help_panel=_SMOOTHING)
    ] = "fixed",
    target_radius: Annotated[
        float | None,
        typer.Option(
            help="adaptive: stop once it is decided whether the radius exceeds this.", rich_help_panel=_SMOOTHING
        ),
    ] = None,
    rtol: Annotated[
        float, typer.Option(help="adaptive: relative loss of radius to stop at.", rich_help_panel=_SMOOTHING)
    ] = 0.02,
    score_map: Annotated[
        str | None, typer.Option(help="lvm, betting: such as 'softmax(t=2.0)'.", rich_help_panel=_SMOOTHING)
    ] = None,
    calibrate: Annotated[
        int | None,
        typer.Option(help="lvm, betting: choose the score map on so many other images.", rich_help_panel=_SMOOTHING),
    ] = None,
    calibrate_split: Annotated[str, typer.Option(help="Split of those images.", rich_help_panel=_SMOOTHING)] = "train",
    randomized: Annotated[
        bool, typer.Option("--randomized", help="Randomised Clopper-Pearson bounds.", rich_help_panel=_SMOOTHING)
    ] = False,
    lipschitz_aware: Annotated[
        bool,
        typer.Option(
            "--lipschitz-aware", help="lvm, betting: use the model's proved constant.", rich_help_panel=_SMOOTHING
        ),
    ] = False,
    sound_noise: Annotated[
        bool,
        typer.Option("--sound-noise", help="Exact noise on the grid of the pixels.", rich_help_panel=_SMOOTHING),
    ] = False,
    grid: Annotated[
        int, typer.Option(help="--sound-noise: pixels are k/GRID; 256 for 'digits'.", rich_help_panel=_SMOOTHING)
    ] = 255,
    dtype: Annotated[
        str | None, typer.Option(help="float32 | bfloat16 | float16 for the network.", rich_help_panel=_SMOOTHING)
    ] = None,
    compiled: Annotated[
        bool, typer.Option("--compile", help="Run a compiled graph.", rich_help_panel=_SMOOTHING)
    ] = False,
    denoiser: Annotated[
        str | None,
        typer.Option(
            help="Diffusion pipeline (folder or Hub id), or package.module:name of a function, in front.",
            rich_help_panel=_SMOOTHING,
        ),
    ] = None,
    batch_size: Annotated[
        int | None,
        typer.Option(help="Images (lipschitz, default 64) or noisy copies (default 64, on a GPU 512) a forward."),
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Certify at most LIMIT images.")] = None,
    stride: Annotated[int, typer.Option(help="Certify every STRIDE-th image.")] = 1,
    out: Annotated[Path, typer.Option(help="Folder for the log, summary and plots.", rich_help_panel=_RUN)] = Path(
        "hf-lip-certify"
    ),
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the log in the folder.", rich_help_panel=_RUN)
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Delete the log in the folder first.", rich_help_panel=_RUN)
    ] = False,
    from_counts: Annotated[
        Path | None,
        typer.Option(help="Certify from the votes of this counts.jsonl, without a model.", rich_help_panel=_RUN),
    ] = None,
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
    """Certify the images of a data set: table, log of all images, JSON summary and plots of certified accuracy."""
    with errors_as_one_line():
        thresholds = parse_radii(radii)
        if from_counts is not None:
            check_output(out)
            certify_from_counts(from_counts, out, method, alpha, thresholds, given_words(context))
            return
        settings: dict[str, Any] = {
            **{"method": method, "mode": "predict" if predict else "certify", "sigma": sigma, "n0": n0, "n": n},
            **{"alpha": alpha, "seed": seed, "budget": budget, "rtol": rtol, "target_radius": target_radius},
            **{"score_map": score_map, "randomized": randomized, "lipschitz_aware": lipschitz_aware},
            **{"sound_noise": grid if sound_noise else False, "dtype": dtype, "compile": compiled},
        }
        source = {
            "data": data,
            "split": split,
            "name": name,
            "image_column": image_column,
            "label_column": label_column,
        }
        job: dict[str, Any] = {
            **{"model": model, "revision": revision, "device": device, "settings": settings, "source": source},
            **{"denoiser": denoiser, "calibrate": calibrate, "calibrate_split": calibrate_split},
            **{"limit": limit, "stride": stride, "batch_size": batch_size},
        }
        check_output(out)
        certify_images(job, out, thresholds, given_words(context), resume=resume, overwrite=overwrite)


def given_words(context: typer.Context) -> list[str]:
    """The command and the arguments that were given, as words."""
    words = [str(context.info_name)]
    for parameter in context.command.params:
        source = context.get_parameter_source(str(parameter.name))
        if source is None or source.name != "COMMANDLINE":
            continue
        value = context.params[str(parameter.name)]
        if parameter.param_type_name == "argument":
            words.append(str(value))
        else:
            words += [parameter.opts[0]] if value is True else [parameter.opts[0], str(value)]
    return words


def parse_radii(text: str) -> dict[str, float]:
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


def check_output(out: Path) -> None:
    """Fail before hours of work rather than after."""
    from importlib.util import find_spec

    if find_spec("matplotlib") is None:
        raise ImportError('The plot needs matplotlib: pip install "hf_lip[demo]".')
    if out.exists() and not out.is_dir():
        raise ValueError(f"`--out` {str(out)!r} is a file: give a folder.")
    out.mkdir(parents=True, exist_ok=True)
    if not os.access(out, os.W_OK):
        raise ValueError(f"`--out` {str(out)!r} cannot be written to: choose another folder.")
