# SPDX-License-Identifier: Apache-2.0
"""Accuracy by number of state changes: chained attention against softmax stacks, with the theorem's depth beside it.

Train the models, then evaluate them all on chains of one length, so that every depth has equally many answers:

    for seed in 0 1 2; do
        python scripts/train_entity_tracking.py $RECIPE --seed $seed --layer_types chained --gamma 0.99 \
            --diagonal keep --learning_rate 0.004 --output_dir runs/chained-1-seed$seed
        for layers in 1 2 3 4 5 6; do
            python scripts/train_entity_tracking.py $RECIPE --seed $seed --attention softmax \
                --num_hidden_layers $layers --learning_rate 0.001 --output_dir runs/softmax-$layers-seed$seed
        done
    done
    python scripts/benchmarks/depth_table.py --runs runs/* --num_state_changes 126 --trained 63 --out depth

with RECIPE="--task chains --num_state_changes 1 63 --eval_num_state_changes 64 126 --curriculum log --hidden_size 128
--num_attention_heads 1 --intermediate_size 512 --initializer_range 0.1 --train_batch_size 32 --max_steps 3000
--eval_samples 256 --cpu". Each kind has the better of these two rates: at 0.004 softmax stacks do not learn even one
change, at 0.001 the chained layer is less exact. Runs with the same layers are seeds of one model. Written to --out:
results.json and depth.png; vertical lines stand where ceil(log2(n + 1)), the layers of Theorem 1, grows by one.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, HfArgumentParser

import hf_lip  # noqa: F401  (registers the models)
from hf_lip.data import ChainsTask, embed_statements, tracking_dataset
from hf_lip.models.certificate import write_text_atomically
from hf_lip.tracking_metrics import exact_match_by_depth, minimal_layers, predicted_tokens
from hf_lip.training.finished_run import finished_run


@dataclass
class DepthArguments:
    runs: list[str] = field(metadata={"help": "Folders of train_entity_tracking.py --task chains (dense)."})
    out: str = field(metadata={"help": "Folder of the results."})
    num_state_changes: int = field(default=126, metadata={"help": "Changes of every entity of the test samples."})
    trained: int = field(default=63, metadata={"help": "Deepest chain of training, for the table."})
    samples: int = field(default=512, metadata={"help": "Test samples."})
    batch_size: int = field(default=32, metadata={"help": "Samples a forward pass."})
    seed: int = field(default=1, metadata={"help": "Of the test samples, which training does not see."})


def main(argv: list[str] | None = None) -> None:
    kinds: Any = DepthArguments
    (args,) = HfArgumentParser(kinds).parse_args_into_dataclasses(argv)
    runs = [read_run(Path(folder)) for folder in args.runs]
    tasks = {run["task"] for run in runs}
    if len(tasks) > 1:
        raise ValueError("The runs have different vocabularies: compare runs of one task.")
    samples = test_samples(runs[0], args)
    for run in tqdm(runs, desc="models"):
        run["accuracy"] = accuracies(run, samples, args.batch_size).tolist()
    results = {
        "num_state_changes": args.num_state_changes,
        "trained": args.trained,
        "answers_per_depth": len(samples[0]) * int(runs[0]["task"][0]),
        "models": [model_results(name, list(group), args) for name, group in by_model(runs)],
    }
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    write_text_atomically(out / "results.json", json.dumps(results, indent=2) + "\n")
    draw(results, out / "depth.png")
    show(results)


def read_run(folder: Path) -> dict[str, Any]:
    """Folder, name of the model, seed and task of a run.

    Raises:
        ValueError: a folder of another kind.
    """
    results = finished_run(folder, "chains")
    arguments = results["arguments"]
    if arguments["form"] == "text":
        raise ValueError(f"{folder} is no run of --task chains with one token a statement.")
    entities, values = arguments["num_entities"] or 2, arguments["num_values"] or 10
    variables = (results["vocab_size"] - 5 - values) // 2
    return {
        "folder": folder, "name": results["model"], "seed": results["seed"], "steps": results["steps"],
        "cpu_seconds": results["cpu_seconds"], "num_parameters": results["num_parameters"],
        "task": (entities, values, variables),
    }  # fmt: skip


def test_samples(run: dict[str, Any], args: DepthArguments) -> tuple[torch.Tensor, torch.Tensor, NDArray[np.int64]]:
    """`statement_ids`, `labels` and `hops` of the test samples, which all have one length."""
    entities, values, variables = run["task"]
    task = ChainsTask(
        num_entities=entities, num_values=values, num_variables=variables, num_state_changes=args.num_state_changes
    )
    rows: Any = tracking_dataset(task, args.samples, "test", seed=args.seed)
    columns = [np.array(rows[name]) for name in ("statement_ids", "labels", "hops")]
    return torch.from_numpy(columns[0]).long(), torch.from_numpy(columns[1]).long(), columns[2]


@torch.inference_mode()
def accuracies(run: dict[str, Any], samples: tuple[Any, Any, Any], batch_size: int) -> NDArray[np.float64]:
    """Share of right answers at every depth from 0."""
    statement_ids, labels, hops = samples
    model = AutoModelForCausalLM.from_pretrained(run["folder"]).eval()
    embedding = model.get_input_embeddings()
    predicted = []
    for ids in statement_ids.split(batch_size):
        predicted.append(predicted_tokens(model(inputs_embeds=embed_statements(embedding, ids)).logits))
    scores = exact_match_by_depth(torch.cat(predicted), labels, hops)
    return np.array([scores[depth].accuracy for depth in range(len(scores))])


def by_model(runs: list[dict[str, Any]]) -> Iterable[tuple[str, Any]]:
    ordered = sorted(runs, key=lambda run: ("chained" not in run["name"], run["name"], run["seed"]))
    return groupby(ordered, key=lambda run: run["name"])


def model_results(name: str, runs: list[dict[str, Any]], args: DepthArguments) -> dict[str, Any]:
    curves = np.array([run["accuracy"] for run in runs])
    return {
        "model": name,
        "seeds": [run["seed"] for run in runs],
        "steps": sorted({run["steps"] for run in runs}),
        "num_parameters": runs[0]["num_parameters"],
        "cpu_seconds": [run["cpu_seconds"] for run in runs],
        # the worst depth of the worst seed
        "least_trained": float(curves[:, 1 : args.trained + 1].min()),
        "least_beyond": float(curves[:, args.trained + 1 :].min()) if args.trained < curves.shape[1] - 1 else None,
        "bands": {
            f"{low}-{high}": {"mean": float(part.mean()), "by_seed": part.mean(axis=1).tolist()}
            for low, high in bands(curves.shape[1] - 1)
            for part in [curves[:, low : high + 1]]
        },
        "accuracy_by_depth": curves.tolist(),
    }


def bands(deepest: int) -> list[tuple[int, int]]:
    """Depths that need equally many layers by the theorem."""
    return [(2**k, min(2 ** (k + 1) - 1, deepest)) for k in range(minimal_layers(deepest))]


def show(results: dict[str, Any]) -> None:
    table = Table(title=f"accuracy (%) by state changes, {results['answers_per_depth']} answers a depth and seed")
    names = bands(results["num_state_changes"])
    table.add_column("model")
    for low, high in names:
        table.add_column(f"{low}-{high}\n(L_min {minimal_layers(low)})", justify="right")
    table.add_column(f"least\nto {results['trained']}", justify="right")
    table.add_column("CPU s", justify="right")
    for row in results["models"]:
        cells = [f"{100 * row['bands'][f'{low}-{high}']['mean']:.2f}" for low, high in names]
        seconds = f"{np.mean(row['cpu_seconds']):.0f}"
        title = f"{row['model']} ({len(row['seeds'])} seeds)"
        table.add_row(title, *cells, f"{100 * row['least_trained']:.2f}", seconds)
    Console(width=140).print(table)


def draw(results: dict[str, Any], path: Path) -> None:
    """Means over the seeds with their range, over the number of state changes."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.0, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    ax = figure.subplots()
    depths = np.arange(results["num_state_changes"] + 1)
    for row in results["models"]:
        curves = 100 * np.array(row["accuracy_by_depth"])
        style = {"linewidth": 2.5, "color": "black"} if "chained" in row["model"] else {"linewidth": 1.2}
        (line,) = ax.plot(depths[1:], curves.mean(axis=0)[1:], label=row["model"], **style)
        ax.fill_between(
            depths[1:], curves.min(axis=0)[1:], curves.max(axis=0)[1:], color=line.get_color(), alpha=0.15, linewidth=0
        )
    for low, _ in bands(results["num_state_changes"]):
        ax.axvline(low, color="grey", linewidth=0.6, linestyle=":")
        ax.annotate(f"L≥{minimal_layers(low)}", (low, 2.0), fontsize=7, color="grey")
    ax.axvline(results["trained"] + 0.5, color="grey", linewidth=1.0, linestyle="--")
    ax.annotate(" beyond training", (results["trained"] + 0.5, 12.0), fontsize=7, color="grey")
    ax.set_xscale("log", base=2)
    ax.set_xlabel("state changes to follow")
    ax.set_ylabel("right answers (%)")
    ax.set_ylim(0.0, 101.0)
    ax.legend(fontsize=8, loc="lower left")
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    main()
