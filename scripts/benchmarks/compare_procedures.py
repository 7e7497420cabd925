# SPDX-License-Identifier: Apache-2.0
"""Every smoothing procedure on the same noisy copies of the same images: what each makes of equal samples.

    python scripts/benchmarks/compare_procedures.py --model runs/resnet20_sd025 --data uoft-cs/cifar10 --stride 16 \
        --sigma 0.25 --samples 10000 --dtype bfloat16 --out runs/compare025

One forward pass feeds them all: votes for mono, bonferroni, cpm, auto and adaptive sampling, scores of one map,
calibrated on training images, for lvm and betting. An interrupted run goes on where it stopped. Written to --out:
images.jsonl (one line an image), results.json (the table).
"""

import json
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from tqdm.auto import tqdm
from transformers import HfArgumentParser

from hf_lip.metrics import STANDARD_RADII, average_certified_radius, certified_accuracy
from hf_lip.models.certificate import write_text_atomically
from hf_lip.pipelines.loading import calibration_images, chosen_indices, load_certify_pipeline, load_labelled_images
from hf_lip.pipelines.settings import CertifySettings
from hf_lip.smoothing.adaptive import AdaptiveRule, Stop
from hf_lip.smoothing.betting import BettingAccumulator
from hf_lip.smoothing.engine import ESTIMATION, SELECTION, ScoreSums, draws_of
from hf_lip.smoothing.procedures import certify_counts, certify_moments
from hf_lip.smoothing.samples import Decision


_COUNT_METHODS = ("mono", "bonferroni", "cpm", "auto")
_CALIBRATION_DRAWS = 100


@dataclass
class CompareArguments:
    model: str = field(metadata={"help": "Folder or Hub id of an image classifier, trained with this noise."})
    data: str = field(metadata={"help": "Folder, parquet file or Hub id of a data set."})
    out: str = field(metadata={"help": "Folder of the results."})
    sigma: float = field(default=0.25, metadata={"help": "Noise level, pixels in [0, 1]."})
    n0: int = field(default=100, metadata={"help": "Selection samples."})
    samples: int = field(default=10_000, metadata={"help": "Estimation samples n."})
    alpha: float = field(default=0.001, metadata={"help": "Failure probability of one certificate."})
    rtol: float = field(default=0.02, metadata={"help": "Tolerance of adaptive sampling."})
    seed: int = field(default=0, metadata={"help": "Seed of the noise."})
    stride: int = field(default=1, metadata={"help": "Certify every STRIDE-th image."})
    limit: int | None = field(default=None, metadata={"help": "Certify at most LIMIT images."})
    calibrate: int = field(default=64, metadata={"help": "Images of --calibrate_split that choose the score map."})
    calibrate_split: str = field(default="train", metadata={"help": "Split of those images."})
    dtype: str | None = field(default=None, metadata={"help": "float32, bfloat16 or float16 for the network."})
    batch_size: int = field(default=128, metadata={"help": "Noisy copies a forward pass."})


def main(argv: list[str] | None = None) -> None:
    kinds: Any = CompareArguments
    (args,) = HfArgumentParser(kinds).parse_args_into_dataclasses(argv)
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    columns = {"name": None, "image_column": None, "label_column": None}
    arguments: dict[str, Any] = {
        "method": "lvm", "score_map": "softmax(t=1.0)", "sigma": args.sigma, "n0": args.n0, "n": args.samples,
        "alpha": args.alpha, "seed": args.seed, "dtype": args.dtype,
    }  # fmt: skip
    pipe = load_certify_pipeline(args.model, None, arguments)
    dataset, labels = load_labelled_images(args.data, "test", pipe.model.config, **columns)
    header = read_header(out, args)
    if header is None:
        images = calibration_images(args.data, args.calibrate_split, args.calibrate, **columns)
        score_map = pipe.calibrate(images, draws=_CALIBRATION_DRAWS, batch_size=args.batch_size)
        header = {**vars(args), "score_map": str(score_map)}
        write_text_atomically(out / "images.jsonl", json.dumps(header) + "\n")
    arguments["score_map"] = header["score_map"]
    records = read_records(out)
    done = {record["idx"] for record in records}
    settings = CertifySettings.from_arguments(arguments)
    indices = chosen_indices(len(labels), args.stride, args.limit)
    with (
        pipe.runner(settings, "lvm", batch_size=args.batch_size) as runner,
        open(out / "images.jsonl", "a", encoding="utf-8") as log,
    ):
        for index in tqdm([index for index in indices if index not in done], desc="images", mininterval=5.0):
            pixels = pipe.preprocess({"image": dataset[index]["image"]})["pixel_values"]
            record = {"idx": index, "label": labels[index], **compare(runner, pixels, index, args)}
            log.write(json.dumps(record) + "\n")
            log.flush()
            os.fsync(log.fileno())
            records.append(record)
    results = {**header, "command": " ".join(sys.argv[1:] if argv is None else argv), **tabulate(records, args)}
    write_text_atomically(out / "results.json", json.dumps(results, indent=2) + "\n")
    show(results)


def read_header(out: Path, args: CompareArguments) -> dict[str, Any] | None:
    """Settings of an interrupted run in the folder; a `ValueError` if they are others."""
    file = out / "images.jsonl"
    if not file.exists():
        return None
    header: dict[str, Any] = json.loads(file.read_text(encoding="utf-8").split("\n", 1)[0])
    changed = [key for key, value in vars(args).items() if key not in ("out", "limit") and header[key] != value]
    if changed:
        raise ValueError(f"{file} was made with another `--{changed[0]}`: choose another `--out`.")
    return header


def read_records(out: Path) -> list[dict[str, Any]]:
    """Whole lines; a torn last one is taken off."""
    text = (out / "images.jsonl").read_text(encoding="utf-8")
    whole = text[: text.rfind("\n") + 1]
    if whole != text:
        write_text_atomically(out / "images.jsonl", whole)
    return [json.loads(line) for line in whole.splitlines()[1:]]


def compare(runner: Any, pixels: Any, index: int, args: CompareArguments) -> dict[str, Any]:
    """Decisions of all procedures about one image, from one set of samples."""
    sampler, score_map = runner.sampler, runner.smoothing.score_map
    image = sampler.noise.prepare(pixels)
    common: dict[str, Any] = {"sigma": args.sigma, "alpha": args.alpha}
    first = ScoreSums(index, score_map)
    first_votes, first_scores = [], []
    for (rows,), logits in sampler.run(draws_of(image, index, SELECTION, args.n0, sampler.batch_size)):
        first_scores.append(first.add(logits[rows.place]).cpu().numpy())
        first_votes.append(logits[rows.place].argmax(dim=1).cpu().numpy())
    bets = BettingAccumulator(np.concatenate(first_scores), n=args.samples, **common)
    sums, votes = ScoreSums(index, score_map), []
    for (rows,), logits in sampler.run(draws_of(image, index, ESTIMATION, args.samples, sampler.batch_size)):
        bets.update(sums.add(logits[rows.place]).cpu().numpy())
        votes.append(logits[rows.place].argmax(dim=1).cpu().numpy())
    selection = np.bincount(np.concatenate(first_votes), minlength=sampler.num_classes)
    order = np.concatenate(votes)
    counts = np.bincount(order, minlength=sampler.num_classes)
    methods: dict[str, Any] = {m: certify_counts(m, selection, counts, **common) for m in _COUNT_METHODS}  # type: ignore[arg-type]
    methods["lvm"] = certify_moments(first.moments(), sums.moments(), **common)
    methods["betting"] = bets.decision()
    methods["adaptive"] = adapt(selection, order, sampler.num_classes, args)
    return {
        "selection_counts": selection.tolist(),
        "counts": counts.tolist(),
        "methods": {name: plain(decision) for name, decision in methods.items()},
        "adaptive_samples": int(methods["adaptive"].details["samples"]),
    }


def adapt(selection: Any, order: Any, num_classes: int, args: CompareArguments) -> Decision:
    """What adaptive sampling would have stopped at, had it drawn the same samples."""
    rule = AdaptiveRule(selection, n=args.samples, sigma=args.sigma, alpha=args.alpha, method="mono", rtol=args.rtol)
    look = rule.first_look
    while True:
        outcome = rule.update(np.bincount(order[:look], minlength=num_classes))
        if isinstance(outcome, Stop):
            return outcome.decision
        look = outcome.next_look


def plain(decision: Decision) -> dict[str, Any]:
    return {"predict": int(decision.predict), "radius": float(decision.radius), "p_lower": float(decision.p_lower)}


def tabulate(records: list[dict[str, Any]], args: CompareArguments) -> dict[str, Any]:
    """Accuracy, certified accuracy, ACR and abstentions of every procedure, and its radii against mono's."""
    if not records:
        raise ValueError("There are no images to compare on.")
    correct, radii = {}, {}
    for name in records[0]["methods"]:
        correct[name] = np.array([r["methods"][name]["predict"] == r["label"] for r in records])
        radii[name] = np.array([r["methods"][name]["radius"] for r in records])
    table = {}
    for name in radii:
        both = correct["mono"] & correct[name]
        ratio = radii[name][both] / radii["mono"][both]
        table[name] = {
            "accuracy": float(correct[name].mean()),
            "certified_accuracy": {
                key: certified_accuracy(radii[name], correct[name], eps) for key, eps in STANDARD_RADII.items()
            },
            "average_certified_radius": average_certified_radius(radii[name], correct[name]),
            "abstention_rate": float(np.mean([r["methods"][name]["predict"] == -1 for r in records])),
            "radius_over_mono": {
                "median": float(np.median(ratio)) if both.any() else None,
                "mean": float(ratio.mean()) if both.any() else None,
                "larger": float((radii[name] * correct[name] > radii["mono"] * correct["mono"]).mean()),
                "smaller": float((radii[name] * correct[name] < radii["mono"] * correct["mono"]).mean()),
            },
        }
    used = np.mean([r["adaptive_samples"] for r in records])
    return {
        "num_images": len(records),
        "procedures": table,
        "adaptive_samples": float(used),
        "adaptive_saving": float((args.samples + args.n0) / (used + args.n0)),
    }


def show(results: dict[str, Any]) -> None:
    title = (
        f"{results['num_images']} images, sigma {results['sigma']}, n = {results['samples']}, {results['score_map']}"
    )
    table = Table(title=title)
    for name in ("procedure", "accuracy", *STANDARD_RADII, "ACR", "abstained", "radius / mono", "larger", "smaller"):
        table.add_column(name, justify="left" if name == "procedure" else "right")
    for name, row in results["procedures"].items():
        ratio = row["radius_over_mono"]
        shares = [row["accuracy"], *row["certified_accuracy"].values()]
        table.add_row(
            name, *(f"{100 * share:.1f}" for share in shares), f"{row['average_certified_radius']:.4f}",
            f"{100 * row['abstention_rate']:.1f}", "-" if ratio["median"] is None else f"{ratio['median']:.3f}",
            f"{100 * ratio['larger']:.1f}", f"{100 * ratio['smaller']:.1f}",
        )  # fmt: skip
    Console(width=140).print(table)
    print(f"adaptive: {results['adaptive_samples']:.0f} samples an image, {results['adaptive_saving']:.2f}x fewer")


if __name__ == "__main__":
    main()
