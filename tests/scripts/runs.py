# SPDX-License-Identifier: Apache-2.0
"""Arguments of quick training runs, images made for them, and what they leave behind."""

import contextlib
import importlib.util
import os
import sys
from pathlib import Path

import datasets
import numpy as np
from PIL import Image


ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "scripts" / "train_image_classifier.py"
SMALL_MLP = [
    *("--cpu", "--depths", "0", "--hidden_sizes", "1", "--pool_size", "1"),
    *("--dense_size", "32", "--num_dense_layers", "2", "--dense_hidden_size", "16"),
]
# 240 images in batches of 24 are 10 steps an epoch; 67 images fill no batch of 16 on two processes
SMALL_DATA = [
    *("--max_train_samples", "240", "--max_eval_samples", "67"),
    *("--train_batch_size", "24", "--eval_batch_size", "16"),
]


@contextlib.contextmanager
def loaded_script(path):
    """A script as a module; `HfArgumentParser` looks up the types of its arguments in `sys.modules`."""
    name = f"{Path(path).stem}_script"
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
        yield module
    finally:
        del sys.modules[name]


def subprocess_environment():
    return {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "PYTHONUNBUFFERED": "1",
    }


def weights(folder):
    return (Path(folder) / "model.safetensors").read_bytes()


def made_images(folder, splits, size=(8, 8), names=("dark", "light")):
    """A parquet folder of noisy grey-level images that a classifier can tell apart."""
    generator = np.random.default_rng(0)
    folder.mkdir()
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=list(names))})
    for split, count in splits.items():
        labels = [index % len(names) for index in range(count)]
        noise = generator.integers(0, 80, (count, *size, 3))
        pixels = (noise + 120 * np.array(labels, dtype=np.int64).reshape(-1, 1, 1, 1)).astype(np.uint8)
        rows = {"image": [Image.fromarray(image) for image in pixels], "label": labels}
        datasets.Dataset.from_dict(rows, features=features).to_parquet(str(folder / f"{split}-0.parquet"))
    return folder
