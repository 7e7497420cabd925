# SPDX-License-Identifier: Apache-2.0
"""Make a transformers checkpoint from the bare weights of a CIFAR ResNet.

    python scripts/convert_cifar_resnet.py resnet20.safetensors resnet20
    hf-lip certify --model resnet20 ...

IN is a safetensors file, or a folder with one `model.safetensors`, whose tensors are named `conv1`, `bn1`,
`layer1.0.conv1`, ..., `linear`, as in the public checkpoints. Depth, widths, channels and classes are read from the
shapes. What shapes cannot tell (normalisation, class names, epsilon of batch norm) is taken from a `config.json`
beside the weights where its keys are called `image_mean`, `image_std`, `labels` and `bn_eps`, and may be given as
options. OUT gets config.json, model.safetensors and the image processor; it must not exist.

Pickled weights (.pt, .th) can run code when loaded and are refused: convert them with `safetensors.torch.save_file`
in an environment you trust.
"""

import argparse
import json
import re
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from hf_lip import LipschitzVisionImageProcessor
from hf_lip.models.cifar_resnet.configuration_cifar_resnet import CifarResNetConfig
from hf_lip.models.cifar_resnet.modeling_cifar_resnet import CifarResNetForImageClassification


def config_of_shapes(tensors: dict[str, Tensor], **fields: Any) -> CifarResNetConfig:
    """The configuration that tensors of these names and shapes belong to; `fields` are added.

    Raises:
        ValueError: they are not a CIFAR ResNet's.
    """
    stages: dict[int, set[int]] = {}
    for name in tensors:
        found = re.fullmatch(r"layer(\d+)\.(\d+)\.conv1\.weight", name)
        if found:
            stages.setdefault(int(found.group(1)), set()).add(int(found.group(2)))
    missing = [name for name in ("conv1.weight", "linear.weight") if name not in tensors]
    if missing or sorted(stages) != list(range(1, len(stages) + 1)):
        raise ValueError(
            f"IN holds no CIFAR ResNet: {missing or ['layer<stage>.<block>.conv1.weight']} not found among "
            f"{len(tensors)} tensors such as {sorted(tensors)[:3]}."
        )
    return CifarResNetConfig(
        **{
            "num_channels": tensors["conv1.weight"].shape[1],
            "num_blocks": [len(stages[stage]) for stage in sorted(stages)],
            "hidden_sizes": [tensors[f"layer{stage}.0.conv1.weight"].shape[0] for stage in sorted(stages)],
            "num_labels": tensors["linear.weight"].shape[0],
            **fields,
        }
    )


def convert(source: Path, target: Path, options: dict[str, Any]) -> CifarResNetForImageClassification:
    """Write the checkpoint `target` and return its model.

    Raises:
        FileExistsError, FileNotFoundError: `target` exists, `source` does not.
        ValueError: `source` is no safetensors file or no CIFAR ResNet.
    """
    weights = source / "model.safetensors" if source.is_dir() else source
    if target.exists():
        raise FileExistsError(f"OUT {target} exists already: name a new folder.")
    if not weights.is_file():
        raise FileNotFoundError(f"IN {weights} does not exist: give a safetensors file or a folder that holds one.")
    try:
        tensors = load_file(weights)
    except SafetensorError as error:
        raise ValueError(f"IN {weights} is truncated or not in the safetensors format ({error}).") from error
    beside = weights.with_name("config.json")
    described = json.loads(beside.read_text(encoding="utf-8")) if beside.is_file() else {}
    names = {"labels": "labels", "image_mean": "image_mean", "image_std": "image_std", "bn_eps": "batch_norm_eps"}
    fields = {ours: described[theirs] for theirs, ours in names.items() if theirs in described}
    fields |= {name: value for name, value in options.items() if value is not None}
    labels = fields.pop("labels", None)
    if labels is not None:
        if len(labels) != len(tensors.get("linear.weight", [])):
            raise ValueError(f"There are {len(labels)} labels for {len(tensors.get('linear.weight', []))} classes.")
        fields |= {"id2label": dict(enumerate(labels)), "label2id": {name: i for i, name in enumerate(labels)}}
    config = config_of_shapes(tensors, **fields)
    model: Any = CifarResNetForImageClassification(config)
    for name, buffer in model.named_buffers():
        # a counter that the public checkpoints leave out
        if name.endswith("num_batches_tracked"):
            tensors.setdefault(name, buffer)
    try:
        model.load_state_dict(tensors)
    except RuntimeError as error:
        raise ValueError(f"The tensors of IN do not fit a CIFAR ResNet: {error}") from error
    model.require_finite(str(weights))
    model.to(dtype=tensors["conv1.weight"].dtype).save_pretrained(target)
    size = {"height": config.image_size, "width": config.image_size}
    LipschitzVisionImageProcessor(size=size, num_channels=config.num_channels).save_pretrained(target)
    return model


def main(argv: list[str] | None = None) -> None:
    summary, _, rest = (__doc__ or "").partition("\n")
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=summary, epilog=rest, formatter_class=formatter)
    parser.add_argument("source", metavar="IN", type=Path, help="safetensors file, or folder with model.safetensors")
    parser.add_argument("target", metavar="OUT", type=Path, help="folder to write")
    parser.add_argument("--image_mean", type=float, nargs="+", help="per channel, in pixels of [0, 1]")
    parser.add_argument("--image_std", type=float, nargs="+", help="per channel, in pixels of [0, 1]")
    parser.add_argument("--image_size", type=int, help="side of the images the weights were trained on; default 32")
    parser.add_argument("--labels", nargs="+", help="names of the classes")
    options = vars(parser.parse_args(argv))
    source, target = options.pop("source"), options.pop("target")
    try:
        model = convert(source, target, options)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    print(f"ResNet-{model.config.depth}, {model.num_parameters():,} parameters, written to {target}")


if __name__ == "__main__":
    main()
