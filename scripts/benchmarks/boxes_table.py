# SPDX-License-Identifier: Apache-2.0
"""Boxes: right answers by how many operations changed the box asked for, chained attention against softmax stacks.

Train the models alike, then compare what they measured of themselves; every set that the runs were evaluated on is a
table of its own:

    python scripts/train_entity_tracking.py $RECIPE --layer_types full chained --gamma 0.9 --diagonal keep \
        --output_dir runs/boxes-1+1
    for layers in 2 4 5; do
        python scripts/train_entity_tracking.py $RECIPE --attention softmax --num_hidden_layers $layers \
            --output_dir runs/boxes-softmax-$layers
    done
    python scripts/benchmarks/boxes_table.py --runs runs/boxes-* --out boxes

with RECIPE as in train_entity_tracking.py: files of the data set, or generated worlds that take depth (with --gamma
0.99, and here `--by implicit_hops`). Runs with the same layers are seeds of one model. Written to --out: results.json
and a curve for each set. Intervals are Clopper-Pearson's, 95 %, of all seeds together.
"""

import json
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any, Literal

import numpy as np
from rich.console import Console
from rich.table import Table
from scipy.stats import binomtest
from transformers import HfArgumentParser

from hf_lip.models.certificate import write_text_atomically
from hf_lip.training.finished_run import finished_run


# rarer depths are left to results.json
MIN_EXAMPLES = 20


@dataclass
class BoxesArguments:
    runs: list[str] = field(metadata={"help": "Folders of train_entity_tracking.py --task boxes."})
    out: str = field(metadata={"help": "Folder of the results."})
    by: Literal["numops", "implicit_hops", "num_moves", "step"] = field(
        default="numops", metadata={"help": "What makes a question deep."}
    )


def main(argv: list[str] | None = None) -> None:
    kinds: Any = BoxesArguments
    (args,) = HfArgumentParser(kinds).parse_args_into_dataclasses(argv)
    runs = [finished_run(Path(folder), "boxes") for folder in args.runs]
    sets = list(runs[0]["evaluations"])
    if any(list(run["evaluations"]) != sets for run in runs):
        raise ValueError("The runs were evaluated on different sets: compare runs with the same --boxes_eval.")
    if any(run["steps"] != runs[0]["steps"] for run in runs):
        raise ValueError("The runs have different numbers of steps: compare runs that were trained alike.")
    ordered = sorted(runs, key=lambda run: ("chained" not in run["model"], run["model"], run["seed"]))
    models = [(name, list(group)) for name, group in groupby(ordered, key=lambda run: run["model"])]
    results = {
        "by": args.by,
        "steps": runs[0]["steps"],
        "sets": {name: [model_results(model, seeds, name, args.by) for model, seeds in models] for name in sets},
    }
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    write_text_atomically(out / "results.json", json.dumps(results, indent=2) + "\n")
    for name, rows in results["sets"].items():
        show(name, rows, args.by, results["steps"])
        draw(name, rows, args.by, out / f"{name}.png")


def model_results(model: str, runs: list[dict[str, Any]], name: str, by: str) -> dict[str, Any]:
    found = [run["evaluations"][name] for run in runs]
    depths = sorted({int(depth) for one in found for depth in one[f"by_{by}"]})
    return {
        "model": model,
        "seeds": [run["seed"] for run in runs],
        "num_parameters": runs[0]["num_parameters"],
        "cpu_seconds": [run["cpu_seconds"] for run in runs],
        "all": pooled(found),
        "whole_state_accuracy": float(np.mean([one["whole_state_accuracy"] for one in found])),
        "by_depth": {depth: pooled([one[f"by_{by}"].get(str(depth)) for one in found]) for depth in depths},
    }


def pooled(scores: list[dict[str, Any] | None]) -> dict[str, Any]:
    """Right answers of all seeds together, with their interval."""
    known = [score for score in scores if score is not None]
    total = sum(score["num_examples"] for score in known)
    right = sum(round(score["accuracy"] * score["num_examples"]) for score in known)
    interval = binomtest(right, total).proportion_ci()
    return {
        "accuracy": right / total,
        "interval": [float(interval.low), float(interval.high)],
        "num_examples": total,
        "by_seed": [score["accuracy"] for score in known],
    }


def show(name: str, rows: list[dict[str, Any]], by: str, steps: int) -> None:
    table = Table(title=f"{name}: exact match (%) by {by}, {steps} steps, {rows[0]['all']['num_examples']} answers")
    depths = shown_depths(rows)
    for title in ("model", "all", *map(str, depths), "whole states", "parameters", "CPU s"):
        table.add_column(title, justify="left" if title == "model" else "right")
    for row in rows:
        shares = [row["all"], *(row["by_depth"][depth] for depth in depths)]
        table.add_row(
            f"{row['model']} ({len(row['seeds'])})",
            *(f"{100 * share['accuracy']:.2f}" for share in shares),
            f"{100 * row['whole_state_accuracy']:.2f}",
            f"{row['num_parameters']:,}",
            f"{np.mean(row['cpu_seconds']):.0f}",
        )
    Console(width=150).print(table)


def shown_depths(rows: list[dict[str, Any]]) -> list[int]:
    by_depth = rows[0]["by_depth"]
    return [depth for depth in by_depth if by_depth[depth]["num_examples"] >= MIN_EXAMPLES * len(rows[0]["seeds"])]


def draw(name: str, rows: list[dict[str, Any]], by: str, path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.0, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    ax = figure.subplots()
    depths = shown_depths(rows)
    for row in rows:
        shares = [row["by_depth"][depth] for depth in depths]
        middle, low, high = (
            100 * np.array(values)
            for values in (
                [share["accuracy"] for share in shares],
                [share["interval"][0] for share in shares],
                [share["interval"][1] for share in shares],
            )
        )
        style = {"linewidth": 2.5, "color": "black"} if "chained" in row["model"] else {"linewidth": 1.2}
        (line,) = ax.plot(depths, middle, marker="o", markersize=3, label=row["model"], **style)
        ax.fill_between(depths, low, high, color=line.get_color(), alpha=0.15, linewidth=0)
    ax.set_xlabel(by)
    ax.set_ylabel("exact match (%)")
    ax.set_ylim(0.0, 101.0)
    ax.set_title(name)
    ax.legend(fontsize=8, loc="lower left")
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    main()
