# SPDX-License-Identifier: Apache-2.0
"""How close smoothing comes to the bare forward pass of its network, what the public reference reaches, and memory.

    python scripts/benchmarks/certify.py --model runs/resnet20 --reference path/to/locuslab/smoothing/code
    python scripts/benchmarks/certify.py --memory_only --memory_samples 100000 --memory_size 224

Every round measures all loops one after the other, each at all batch sizes, and takes the best batch of each; ratios
are medians over the rounds, so that a change of the machine's load between rounds does not enter them. Measure on a
machine that does nothing else. The reference runs the model as it comes (float32, batch norm as layers), as its own
code does; the lines that name CUDA, and two SciPy and statsmodels functions that are gone or not needed, are replaced
when it is imported.
"""

import json
import statistics
import subprocess
import sys
import time
import types
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForImageClassification, HfArgumentParser

import hf_lip
from hf_lip.pipelines.base_classifier import BaseClassifier
from hf_lip.smoothing import GaussianNoise, GridNoise, Sampler, SmoothingSettings, certify_images
from hf_lip.smoothing.engine import ESTIMATION, draws_of


@dataclass
class Arguments:
    model: str | None = field(default=None, metadata={"help": "Folder or Hub id; default: a ResNet-20 at random."})
    image_size: int = field(default=32, metadata={"help": "Side of the image."})
    batch_sizes: list[int] = field(default_factory=lambda: [64, 128, 256, 400], metadata={"help": "To try."})
    dtypes: list[str] = field(default_factory=lambda: ["float32", "bfloat16"], metadata={"help": "Of the network."})
    samples: int = field(default=6400, metadata={"help": "Noisy copies of each measurement, at least."})
    rounds: int = field(default=5, metadata={"help": "Rounds over all loops."})
    images: int = field(default=2, metadata={"help": "Whole certificates, n0 = 100 and n = SAMPLES."})
    sigma: float = field(default=0.25, metadata={"help": "Noise level, pixels in [0, 1]."})
    threads: int | None = field(default=None, metadata={"help": "Threads of torch; default: as it chooses."})
    reference: str | None = field(default=None, metadata={"help": "Folder with core.py of locuslab/smoothing."})
    compile: bool = field(default=False, metadata={"help": "Also measure compiled graphs."})
    memory: bool = field(default=False, metadata={"help": "Measure peak memory too; minutes."})
    memory_only: bool = field(default=False, metadata={"help": "Measure peak memory and nothing else."})
    memory_samples: int = field(default=100_000, metadata={"help": "Samples of the larger run."})
    memory_size: int = field(default=224, metadata={"help": "Side of its image."})


def load_model(args: Arguments) -> Any:
    if args.model is not None:
        return AutoModelForImageClassification.from_pretrained(args.model).eval()
    torch.manual_seed(0)
    config = AutoConfig.for_model("cifar_resnet", num_labels=10, image_size=args.image_size)
    return AutoModelForImageClassification.from_config(config).eval()


def load_reference(folder: str, device: torch.device) -> Any:
    """`Smooth` of locuslab's core.py, made to run today."""
    source = (Path(folder) / "core.py").read_text(encoding="utf-8")
    changes = {
        "device='cuda'": "device=batch.device",
        "from scipy.stats import norm, binom_test": "from scipy.stats import norm, binomtest",
        "from statsmodels.stats.proportion import proportion_confint\n": "",
    }
    for old, new in changes.items():
        if old not in source:
            raise ValueError(f"{folder}/core.py has no {old!r}: it is not the file this benchmark knows.")
        source = source.replace(old, new)
    module = types.ModuleType("locuslab_core")
    exec(compile(source, str(Path(folder) / "core.py"), "exec"), module.__dict__)
    return module.Smooth


def seconds(run: Callable[[], None], device: torch.device) -> float:
    start = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


class Loops:
    """What is compared: name -> samples/s at a batch size."""

    def __init__(self, args: Arguments, device: torch.device) -> None:
        self.args, self.device = args, device
        self.model = load_model(args).to(device)
        generator = torch.Generator().manual_seed(0)
        channels = int(getattr(self.model.config, "num_channels", 3))
        shape = (channels, args.image_size, args.image_size)
        self.image = torch.randint(0, 256, shape, generator=generator).float() / 255
        self.loops: dict[str, Callable[[int], None]] = {}
        self.add_forward("plain model, forward", self.plain)
        if args.reference is not None:
            smooth = load_reference(args.reference, device)(self.plain, int(self.model.config.num_labels), args.sigma)
            x = self.image.to(device)
            self.loops["reference, sampling"] = lambda size: smooth._sample_noise(x, self.count(size), size)
        self.bases: dict[str, Any] = {}
        for dtype in args.dtypes:
            for compiled in (False, True) if args.compile else (False,):
                base = BaseClassifier(self.model, lambda pixels: pixels, device=device, dtype=dtype, compiled=compiled)
                name = f"{dtype}{', compiled' if compiled else ''}"
                self.bases[name] = base
                self.add_forward(f"{name}, forward", base)
                self.loops[f"{name}, sampling"] = self.sampling(base, GaussianNoise(args.sigma, 0))
                self.loops[f"{name}, sampling, sound noise"] = self.sampling(base, GridNoise(args.sigma, 0))

    def plain(self, pixels: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.model(pixel_values=pixels).logits
        return logits

    def count(self, size: int) -> int:
        """Samples of one measurement: whole batches."""
        return -(-self.args.samples // size) * size

    def add_forward(self, name: str, network: Callable[[torch.Tensor], torch.Tensor]) -> None:
        def run(size: int) -> None:
            batch = self.image.to(self.device).repeat(size, 1, 1, 1)
            with torch.inference_mode():
                for _ in range(self.count(size) // size):
                    network(batch)

        self.loops[name] = run

    def sampling(self, base: Any, noise: Any) -> Callable[[int], None]:
        def run(size: int) -> None:
            with self.sampler(base, noise, size) as sampler:
                sampler.votes(draws_of(noise.prepare(self.image), 0, ESTIMATION, self.count(size), size))

        return run

    def sampler(self, base: Any, noise: Any, size: int) -> Sampler:
        """As `pipeline("certify")` makes it."""
        classes, workers = int(self.model.config.num_labels), 1 if base.compiled else torch.get_num_threads()
        return Sampler(base, noise, num_classes=classes, batch_size=size, device=self.device, workers=workers)

    def certificates(self, base: Any, size: int) -> float:
        """Images a second of whole certificates."""
        settings = SmoothingSettings(sigma=self.args.sigma, n0=100, n=self.args.samples)

        def run() -> None:
            with self.sampler(base, GaussianNoise(self.args.sigma, 0), size) as sampler:
                list(certify_images(sampler, settings, [(k, k, self.image) for k in range(self.args.images)]))

        return self.args.images / seconds(run, self.device)


def measure(args: Arguments, device: torch.device) -> dict[str, Any]:
    loops = Loops(args, device)
    rates: dict[str, list[float]] = {name: [] for name in loops.loops}
    best: dict[str, list[int]] = {name: [] for name in loops.loops}
    for _ in range(args.rounds):
        for name, loop in loops.loops.items():
            by_size = {}
            for size in args.batch_sizes:
                # the first call of a shape sets kernels up
                loop_once(loops, loop, size)
                by_size[size] = loops.count(size) / seconds(lambda loop=loop, size=size: loop(size), device)  # type: ignore[misc]
            winner = max(by_size, key=lambda size: by_size[size])
            rates[name].append(by_size[winner])
            best[name].append(winner)
    results: dict[str, Any] = {
        "samples_per_second": {name: statistics.median(values) for name, values in rates.items()},
        "best_batch": {name: statistics.mode(values) for name, values in best.items()},
        "ratios": {},
    }
    for name in rates:
        if "sampling" not in name or name.startswith("reference"):
            continue
        others = [f"{name.split(', sampling')[0]}, forward", "plain model, forward", "reference, sampling"]
        for other in filter(rates.__contains__, others):
            ratio = statistics.median(a / b for a, b in zip(rates[name], rates[other]))
            results["ratios"][f"{name} / {other}"] = ratio
    results["images_per_second"] = {
        f"{name}, n0=100, n={args.samples}": loops.certificates(base, results["best_batch"][f"{name}, sampling"])
        for name, base in loops.bases.items()
    }
    results["base"] = {name: base.description for name, base in loops.bases.items()}
    return results


def loop_once(loops: Loops, loop: Callable[[int], None], size: int) -> None:
    samples, loops.args.samples = loops.args.samples, 1
    loop(size)
    loops.args.samples = samples


def peak_memory(samples: int, size: int) -> float:
    """MiB of a process that samples so many copies of an image, over those before its first batch."""
    script = (
        "import resource, torch\n"
        "from hf_lip.smoothing import GaussianNoise, Sampler\n"
        "from hf_lip.smoothing.engine import ESTIMATION, draws_of\n"
        "torch.manual_seed(0)\n"
        "network = torch.nn.Sequential(torch.nn.AvgPool2d(8), torch.nn.Flatten(), torch.nn.LazyLinear(1000))\n"
        f"noise, image = GaussianNoise(0.25, 0), torch.rand(3, {size}, {size})\n"
        "network(image[None])\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "with Sampler(network, noise, num_classes=1000, batch_size=64, workers=torch.get_num_threads()) as sampler:\n"
        f"    sampler.votes(draws_of(noise.prepare(image), 0, ESTIMATION, {samples}, 64))\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)\n"
    )
    output = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True).stdout
    # kilobytes, but bytes on macOS
    return float(output) / (1024.0 if sys.platform != "darwin" else 1024.0**2)


def main() -> None:
    kinds: Any = Arguments
    (args,) = HfArgumentParser(kinds).parse_args_into_dataclasses()
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    results: dict[str, Any] = {
        "hf_lip": hf_lip.__version__,
        "torch": torch.__version__,
        "device": str(device),
        "threads": torch.get_num_threads(),
    }
    if not args.memory_only:
        results |= measure(args, device)
        for name, rate in results["samples_per_second"].items():
            print(f"{name:45s} {rate:9.0f} samples/s at batch {results['best_batch'][name]}")
        for name, ratio in results["ratios"].items():
            print(f"{name:75s} {ratio:6.3f}")
        for name, rate in results["images_per_second"].items():
            print(f"{name:45s} {rate:9.3f} images/s")
    if args.memory or args.memory_only:
        few = 1000
        peaks = {samples: peak_memory(samples, args.memory_size) for samples in (few, args.memory_samples)}
        results["peak_mebibytes"] = {f"n={samples}": peak for samples, peak in peaks.items()}
        for samples, peak in peaks.items():
            print(f"peak memory at {args.memory_size}x{args.memory_size}, n = {samples:7d}: {peak:8.1f} MiB")
    print(json.dumps(results))


if __name__ == "__main__":
    main()
