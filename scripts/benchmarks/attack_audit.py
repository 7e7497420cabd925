# SPDX-License-Identifier: Apache-2.0
"""Attack every certificate of a model: l2 PGD just inside each image's certified radius, and well outside of it.

    python scripts/benchmarks/attack_audit.py --model runs/fashion --data path/to/fashion_mnist --num_images 1000

Inside, no label may change: the script exits with 1 if one does. At three times the radius many do, which shows that
the attack works. Attacks run in float32, without clipping to [0, 1] (stronger) and with it.
"""

import json
import sys
import time
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from tqdm.auto import tqdm
from transformers import AutoModelForImageClassification, HfArgumentParser

import hf_lip
from hf_lip.audit import l2_pgd
from hf_lip.data import dataset_to_tensors, load_image_dataset


@dataclass
class AuditArguments:
    model: str = field(metadata={"help": "Folder or Hub id of a lipschitz_vision classifier."})
    data: str = field(default="digits", metadata={"help": "Data set, as in the training script."})
    split: str = field(default="test", metadata={"help": "Split of the data set."})
    num_images: int = field(default=1000, metadata={"help": "Certified images to attack."})
    num_steps: int = field(default=200, metadata={"help": "PGD steps."})
    num_restarts: int = field(default=3, metadata={"help": "Restarts; the first starts at the image."})
    factors: list[float] = field(default_factory=lambda: [0.999, 3.0], metadata={"help": "Multiples of each radius."})
    clipping: Literal["both", "no", "yes"] = field(
        default="both", metadata={"help": "Also, or only, keep the attacked pixels in [0, 1]."}
    )
    batch_size: int = field(default=500, metadata={"help": "Images attacked at once."})
    seed: int = field(default=0, metadata={"help": "Seed of the random starts."})


def main() -> int:
    kinds: Any = AuditArguments
    (args,) = HfArgumentParser(kinds).parse_args_into_dataclasses()
    model = AutoModelForImageClassification.from_pretrained(args.model)
    dataset = load_image_dataset(args.data, args.split)
    images, _ = dataset_to_tensors(
        dataset, image_size=model.config.image_size, num_channels=model.config.num_channels, progress=False
    )
    radii, predictions = [], []
    with torch.no_grad():
        for batch in images.split(args.batch_size):
            output = model(batch)
            radii.append(output.certified_radius)
            predictions.append(output.logits.argmax(dim=1))
    radius, prediction = torch.cat(radii), torch.cat(predictions)
    chosen = torch.nonzero(radius > 0).flatten()[: args.num_images]
    images, radius, prediction = images[chosen], radius[chosen], prediction[chosen]

    def logits_of(pixels: torch.Tensor) -> torch.Tensor:
        return model(pixels, output_certified_radius=False).logits

    model.requires_grad_(False)
    results: dict = {
        "model": args.model,
        "hf_lip": hf_lip.__version__,
        "num_images": len(chosen),
        "num_steps": args.num_steps,
        "num_restarts": args.num_restarts,
        "median_radius": radius.median().item(),
        "changed": {},
    }
    start = time.perf_counter()
    inside_changed = 0
    for factor in args.factors:
        for clip in {"both": (False, True), "no": (False,), "yes": (True,)}[args.clipping]:
            changed = 0
            batches = list(range(0, len(chosen), args.batch_size))
            for begin in tqdm(batches, desc=f"{factor} x radius{', clipped' if clip else ''}", file=sys.stderr):
                part = slice(begin, begin + args.batch_size)
                changed += int(
                    l2_pgd(
                        logits_of,
                        images[part],
                        prediction[part],
                        factor * radius[part],
                        num_steps=args.num_steps,
                        num_restarts=args.num_restarts,
                        clip=clip,
                        seed=args.seed,
                    ).sum()
                )
            name = f"{factor} x radius, {'pixels kept in [0, 1]' if clip else 'unclipped'}"
            results["changed"][name] = changed
            inside_changed += changed if factor < 1 else 0
            print(f"{name:45s} {changed:6d} of {len(chosen)} labels changed")
    results["seconds"] = round(time.perf_counter() - start, 1)
    print(json.dumps(results))
    return 1 if inside_changed else 0


if __name__ == "__main__":
    sys.exit(main())
