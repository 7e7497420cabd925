# SPDX-License-Identifier: Apache-2.0
"""Accuracy of an image classifier before and after rescaling its layers to a spectral norm of at most C.

    python scripts/benchmarks/rescaled_accuracy.py --model resnet20 --data path/to/cifar10 --num_images 8000

MODEL is a transformers image classifier with its image processor (`scripts/convert_cifar_resnet.py` makes one of the
bare weights of a CIFAR ResNet). Each variant is written with `rescale_checkpoint`, loaded again by its class and run;
printed are the largest certified norm, the accuracy, on how many images it agrees with the original, and the largest
difference of logits once the common factor is taken out. Exits with 1 if `preserve_logits` changes a prediction.
"""

import json
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm
from transformers import AutoImageProcessor, AutoModelForImageClassification, HfArgumentParser

import hf_lip
from hf_lip.checkpoints.rescale import rescale_checkpoint
from hf_lip.data import load_image_dataset


VARIANTS: dict[str, dict[str, Any]] = {
    "preserve-logits": {"preserve_logits": True},
    "preserve-logits sr": {"preserve_logits": True, "mode": "sr"},
    "sn": {"mode": "sn"},
    "sr": {"mode": "sr"},
    "fold-bn": {"fold_bn": True, "to": 1e6},
    "fold-bn sn": {"fold_bn": True, "mode": "sn"},
    "fold-bn sr": {"fold_bn": True, "mode": "sr"},
}


@dataclass
class AccuracyArguments:
    model: str = field(metadata={"help": "Folder or Hub id of an image classifier."})
    data: str = field(metadata={"help": "Data set, as in the training script: a folder of parquet files, a Hub id."})
    split: str = field(default="test", metadata={"help": "Split of the data set."})
    num_images: int | None = field(default=None, metadata={"help": "First images only; default: all."})
    to: float = field(default=1.0, metadata={"help": "C: largest norm allowed."})
    variants: list[str] = field(default_factory=lambda: list(VARIANTS), metadata={"help": "Which to measure."})
    batch_size: int = field(default=200, metadata={"help": "Images a forward."})
    output: str | None = field(default=None, metadata={"help": "JSON file for the results."})


@torch.no_grad()
def logits_of(folder: str | Path, dataset: Any, batch_size: int, name: str) -> Tensor:
    """Logits (N, classes) in float64 of a checkpoint on all images."""
    model = AutoModelForImageClassification.from_pretrained(folder).eval()
    processor = AutoImageProcessor.from_pretrained(folder)
    found = []
    for start in tqdm(range(0, len(dataset), batch_size), desc=name, file=sys.stderr):
        images = dataset[start : start + batch_size]["image"]
        # grey images of floats, such as the digits, have no axis for channels
        images = [image if isinstance(image, Image.Image) else np.atleast_3d(image) for image in images]
        found.append(model(**processor(images=images, return_tensors="pt")).logits.double())
    return torch.cat(found)


def main() -> int:
    kinds: Any = AccuracyArguments
    (args,) = HfArgumentParser(kinds).parse_args_into_dataclasses()
    if unknown := [name for name in args.variants if name not in VARIANTS]:
        raise SystemExit(f"--variants: unknown {', '.join(unknown)}; there are {', '.join(VARIANTS)}.")
    dataset = load_image_dataset(args.data, args.split)
    if args.num_images is not None:
        dataset = dataset.select(range(min(args.num_images, len(dataset))))
    labels = torch.tensor(dataset["label"])
    original = logits_of(args.model, dataset, args.batch_size, "original")
    results: dict[str, Any] = {
        "model": Path(args.model).name,
        "hf_lip": hf_lip.__version__,
        "num_images": len(dataset),
        "to": args.to,
        "original": {"accuracy": (original.argmax(dim=1) == labels).double().mean().item()},
    }
    print(f"{'variant':20} {'largest norm':>12} {'accuracy':>9} {'agrees':>8}  logits differ by")
    broken = False
    with tempfile.TemporaryDirectory() as work:
        for index, name in enumerate(args.variants):
            folder = Path(work) / str(index)
            report = rescale_checkpoint(args.model, folder, **{"to": args.to, **VARIANTS[name]})
            if index == 0:
                results["original"]["largest_norm"] = report.largest_before
                accuracy = results["original"]["accuracy"]
                print(f"{'original':20} {report.largest_before:12.6g} {accuracy:9.4%} {1.0:8.2%}  0")
            logits = logits_of(folder, dataset, args.batch_size, name) * 2.0 ** (report.logits_exponent or 0)
            same = logits.argmax(dim=1) == original.argmax(dim=1)
            row = {
                "largest_norm": report.largest_after,
                "accuracy": (logits.argmax(dim=1) == labels).double().mean().item(),
                "agreement": same.double().mean().item(),
                "logits_exponent": report.logits_exponent,
                "largest_difference": (logits - original).abs().max().item(),
            }
            results[name] = row
            broken |= name.startswith("preserve-logits") and not bool(same.all())
            print(
                f"{name:20} {row['largest_norm']:12.9g} {row['accuracy']:9.4%} {row['agreement']:8.2%}  "
                f"{row['largest_difference']:.3g}"
            )
    if args.output is not None:
        Path(args.output).write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    return int(broken)


if __name__ == "__main__":
    sys.exit(main())
