# SPDX-License-Identifier: Apache-2.0
"""Time and accuracy of spectral norms: this package against power iteration, SVD, Gram iteration and other packages.

    python scripts/benchmarks/spectral_norm.py
    python scripts/benchmarks/spectral_norm.py --models resnet50 vit --shapes none
    python scripts/benchmarks/spectral_norm.py --lip4conv path/to/lip4conv --orthogonium path --torchlip path

For every shape each method is called once to warm up, then `--rounds` times in turn with the others; the table gives
medians, their ratio to ours, the relative error against the exact value (float64 SVD of all Fourier blocks; for zero
padding the norm of the operator itself, by Lanczos steps to convergence), and which methods came out below it. Paths
are folders that hold the package or its modules; nothing of them is installed.
"""

import contextlib
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from transformers import (
    HfArgumentParser,
    ResNetConfig,
    ResNetForImageClassification,
    ViTConfig,
    ViTForImageClassification,
)

import hf_lip
from hf_lip.ops import conv_frequency_blocks, gram_iteration
from hf_lip.ops.conv import conv_spectral_norm
from hf_lip.ops.conv_operator import ConvArguments, stretch_lower_bound


SHAPES: dict[str, tuple[tuple[int, ...], int | None, dict[str, Any]]] = {
    "64x64x3x3@32": ((64, 64, 3, 3), 32, {}),
    "256x256x3x3@16": ((256, 256, 3, 3), 16, {}),
    "512x512x3x3@7": ((512, 512, 3, 3), 7, {}),
    "64x3x7x7@224/2": ((64, 3, 7, 7), 224, {"stride": 2}),
    "depthwise96x7x7@56": ((96, 1, 7, 7), 56, {"groups": 96}),
    "dense768x3072": ((768, 3072), None, {}),
}


@dataclass
class BenchmarkArguments:
    shapes: list[str] = field(
        default_factory=lambda: list(SHAPES), metadata={"help": f"Of {', '.join(SHAPES)}; or none."}
    )
    models: list[str] = field(default_factory=list, metadata={"help": "resnet50, vit: all layers, random weights."})
    modes: list[str] = field(default_factory=lambda: ["circular", "zeros"], metadata={"help": "Paddings."})
    rounds: int = field(default=5, metadata={"help": "Timed calls of each method."})
    rtol: float = field(default=1e-3, metadata={"help": "Relative width asked of our interval."})
    threads: int | None = field(default=None, metadata={"help": "Threads of torch; default: its own choice."})
    device: str = field(default="cpu", metadata={"help": "cpu or cuda: where weights and the other methods are."})
    seed: int = field(default=0, metadata={"help": "Seed of the weights."})
    lip4conv: str | None = field(default=None, metadata={"help": "Folder with the papers' bounds.py."})
    orthogonium: str | None = field(default=None, metadata={"help": "Folder that holds the package orthogonium."})
    torchlip: str | None = field(default=None, metadata={"help": "Folder that holds the package deel.torchlip."})
    peers_on_models: bool = field(default=False, metadata={"help": "Also time the papers' code on --models: minutes."})
    out: str | None = field(default=None, metadata={"help": "JSON file for the figures."})


@dataclass
class Case:
    """One operator: a convolution at one size and padding, or a matrix."""

    name: str
    layer: nn.Conv2d | nn.Linear
    size: int | None
    mode: str

    @property
    def weight(self) -> Tensor:
        return self.layer.weight.detach()

    @property
    def options(self) -> dict[str, Any]:
        assert isinstance(self.layer, nn.Conv2d)
        layer = self.layer
        return {"stride": layer.stride, "padding": layer.padding, "padding_mode": self.mode, "groups": layer.groups}


def make_case(name: str, mode: str, device: str) -> Case:
    shape, size, options = SHAPES[name]
    if size is None:
        linear = nn.Linear(shape[1], shape[0], bias=False, device=device)
        nn.init.normal_(linear.weight, std=shape[1] ** -0.5)
        return Case(name, linear, None, "dense")
    groups = options.get("groups", 1)
    conv = nn.Conv2d(
        shape[1] * groups,
        shape[0],
        shape[2],
        stride=options.get("stride", 1),
        padding=shape[2] // 2,
        groups=groups,
        bias=False,
        padding_mode=mode,  # type: ignore[arg-type]
        device=device,
    )
    nn.init.normal_(conv.weight, std=(shape[1] * shape[2] * shape[3]) ** -0.5)
    return Case(name, conv, size, mode)


def blocks_of(case: Case, weight: Tensor) -> Tensor:
    """Fourier blocks (F, out, in) of all groups on the image's own torus, as the papers take it."""
    if case.size is None:
        return weight[None]
    kernels = weight.unflatten(0, (case.options["groups"], -1))
    stride = case.options["stride"]
    return torch.cat([conv_frequency_blocks(kernel, case.size, stride) for kernel in kernels])


def exact_norm(case: Case) -> float:
    """The norm in float64: SVD of the blocks, or for zero padding Lanczos steps on the operator until they stand."""
    weight = case.weight.double().cpu()
    if case.mode != "zeros":
        return max(torch.linalg.svdvals(part).max().item() for part in blocks_of(case, weight).split(64))
    assert case.size is not None
    options = case.options
    pads = tuple((p, p) for p in options["padding"])
    arguments = ConvArguments(pads, "zeros", options["stride"], (1, 1), options["groups"])
    previous, steps = 0.0, 64
    while True:
        value = stretch_lower_bound(weight, (case.size, case.size), arguments, 1, math.inf, steps)
        if value - previous <= 1e-6 * value or steps >= 1024:
            return value
        previous, steps = value, 2 * steps


def power_iteration(case: Case, tolerance: float) -> float:
    """Power iteration on the operator, until a step changes the value by less than a tenth of the tolerance."""
    weight = case.weight
    if case.size is None:
        vector = torch.randn(weight.shape[1], device=weight.device)

        def step(v: Tensor) -> tuple[Tensor, float]:
            image = weight @ (v / v.norm())
            return weight.T @ image, image.norm().item()
    else:
        layer = case.layer
        channels = weight.shape[1] * case.options["groups"]
        vector = torch.randn(1, channels, case.size, case.size, device=weight.device)

        def step(v: Tensor) -> tuple[Tensor, float]:
            point = (v / v.norm()).requires_grad_()
            image = layer(point)
            return torch.autograd.grad(image, point, image.detach())[0], image.norm().item()

    value = 0.0
    for _ in range(2000):
        vector, new = step(vector)
        if new - value <= 0.1 * tolerance * new:
            return new
        value = new
    return value


def torch_parametrization(case: Case, steps: int) -> float:
    """What torch's spectral_norm divides by: the norm of the kernel as a matrix, by `steps` power steps from noise."""
    weight = case.weight
    layer: Any = nn.Linear(weight[0].numel(), weight.shape[0], bias=False, device=weight.device)
    layer.weight.data.copy_(weight.flatten(1))
    # the constructor takes 15 steps of its own unless told
    parametrized: Any = parametrizations.spectral_norm(layer, n_power_iterations=steps)
    top = weight.flatten(1).norm() / parametrized.weight.norm()
    return top.item()


@contextlib.contextmanager
def on_cpu(active: bool) -> Iterator[None]:
    """The papers' code moves its tensors to a GPU; where there is none, it must leave them."""
    original = torch.Tensor.cuda
    if active:
        torch.Tensor.cuda = lambda self, *args, **kwargs: self  # type: ignore[method-assign]
    try:
        yield
    finally:
        torch.Tensor.cuda = original  # type: ignore[method-assign]


def peer_methods(args: BenchmarkArguments) -> dict[str, Callable[[Case], float]]:
    methods: dict[str, Callable[[Case], float]] = {}
    if args.lip4conv is not None:
        sys.path.insert(0, args.lip4conv)
        import bounds  # type: ignore[import-not-found]

        def lip4conv(case: Case) -> float:
            if case.size is None:
                return float(bounds.gram_iteration_on_matrix(case.weight.clone(), n_iter=6, return_time=False))
            with on_cpu(case.weight.device.type == "cpu"):
                return float(bounds.compute_delattre2023(case.weight, n=case.size, n_iter=6, return_time=False))

        methods["lip4conv Gram x6"] = lip4conv
    if args.orthogonium is not None:
        sys.path.insert(0, args.orthogonium)
        from orthogonium.layers.conv.singular_values.get_sv import get_conv_sv  # type: ignore[import-not-found]

        def orthogonium(case: Case) -> float:
            if case.size is None or case.mode != "circular":
                return math.nan
            found = get_conv_sv(case.layer, n_iter=6, return_stab_rank=False, imsize=case.size)
            return float(found)

        methods["orthogonium get_conv_sv x6"] = orthogonium
    if args.torchlip is not None:
        sys.path.insert(0, args.torchlip)
        from deel.torchlip import SpectralConv2d, SpectralLinear  # type: ignore[import-not-found]

        def torchlip(case: Case) -> float:
            """The factor by which its layer scales this kernel, Björck steps left out."""
            weight = case.weight
            if case.size is None:
                built = SpectralLinear(weight.shape[1], weight.shape[0], bias=False, eps_bjorck=None)
            elif case.options["groups"] > 1:
                return math.nan
            else:
                options = case.options
                built = SpectralConv2d(
                    weight.shape[1], weight.shape[0], weight.shape[2], stride=options["stride"],
                    padding=options["padding"], padding_mode=case.mode, bias=False, eps_bjorck=None,
                )  # fmt: skip
            target = built.parametrizations.weight.original if hasattr(built, "parametrizations") else built.weight
            target.data.copy_(weight)
            built.train()
            for _ in range(15):
                scaled = built.weight
            return float(weight.norm() / scaled.detach().norm())

        methods["deel-torchlip factor"] = torchlip
    return methods


def methods_of(args: BenchmarkArguments) -> dict[str, Callable[[Case], float]]:
    return {
        "ours (certified interval)": lambda case: our_norm(case, args.rtol).upper,
        "our Gram iteration x6": our_gram_iteration,
        "float32 FFT + svdvals": lambda case: torch.linalg.svdvals(blocks_of(case, case.weight)).max().item(),
        "power iteration to rtol": lambda case: power_iteration(case, args.rtol),
        "torch spectral_norm x1": lambda case: torch_parametrization(case, 1),
        "torch spectral_norm x15": lambda case: torch_parametrization(case, 15),
        **peer_methods(args),
    }


def our_norm(case: Case, rtol: float) -> hf_lip.SpectralNorm:
    return hf_lip.spectral_norm(case.layer, case.size, rtol=rtol)


def our_gram_iteration(case: Case) -> float:
    if case.size is None:
        return gram_iteration(case.weight, 6).item()
    return conv_spectral_norm(case.weight, case.size, num_iterations=6, **case.options).item()


def timed(call: Callable[[], float], device: str) -> tuple[float, float]:
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    value = call()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start, value


def measure(case: Case, args: BenchmarkArguments) -> dict[str, dict[str, float]]:
    methods = methods_of(args)
    seconds: dict[str, list[float]] = {name: [] for name in methods}
    values: dict[str, float] = {}
    for round_number in range(args.rounds + 1):
        for name, method in methods.items():
            torch.manual_seed(args.seed)
            elapsed, values[name] = timed(lambda method=method: method(case), args.device)  # type: ignore[misc]
            if round_number:
                seconds[name].append(elapsed)
    return {name: {"seconds": statistics.median(seconds[name]), "value": values[name]} for name in methods}


def print_case(case: Case, results: dict[str, dict[str, float]], exact: float, width: float) -> None:
    table = Table(
        title=f"{case.name} {case.mode}: norm {exact:.6g}, our interval {width:.1e} wide", title_justify="left"
    )
    for column in ("method", "ms", "time / ours", "value / exact - 1", "upper bound"):
        table.add_column(column, justify="left" if column in ("method", "upper bound") else "right")
    ours = results["ours (certified interval)"]["seconds"]
    for name, result in results.items():
        value = result["value"]
        if math.isnan(value):
            table.add_row(name, "-", "-", "-", "does not apply")
            continue
        excess = value / exact - 1
        result["excess"] = excess
        # the exact value itself is good to about 1e-6 for zero padding
        verdict = "yes" if excess >= (-1e-6 if case.mode == "zeros" else -1e-12) else "VIOLATED"
        cells = (f"{1e3 * result['seconds']:.1f}", f"{result['seconds'] / ours:.2f}", f"{excess:+.1e}")
        table.add_row(name, *cells, verdict)
    Console(width=120).print(table)


def model_items(name: str) -> list[tuple[nn.Module, tuple[int, ...] | None, dict[str, Any]]]:
    """All linear and convolutional layers of a stock architecture, random weights, with their image sizes at 224."""
    if name == "vit":
        model: nn.Module = ViTForImageClassification(ViTConfig())
    elif name == "resnet50":
        model = ResNetForImageClassification(ResNetConfig())
    else:
        raise ValueError(f"--models {name!r} must be resnet50 or vit.")
    items: list[tuple[nn.Module, tuple[int, ...] | None, dict[str, Any]]] = []

    def note(layer: nn.Module, inputs: tuple[Tensor, ...], _: Any) -> None:
        size = tuple(inputs[0].shape[2:]) if isinstance(layer, nn.Conv2d) else None
        items.append((layer, size, {}))

    for layer in model.modules():
        if isinstance(layer, (nn.Linear, nn.Conv2d)):
            layer.register_forward_hook(note)
    with torch.no_grad():
        model.eval()(torch.zeros(1, 3, 224, 224))
    return items


def measure_model(name: str, args: BenchmarkArguments) -> dict[str, float]:
    items = model_items(name)
    result = {}
    for attempt in range(2):
        start = time.perf_counter()
        norms = hf_lip.spectral_norms(items, rtol=args.rtol)
        result["seconds"] = time.perf_counter() - start
        if attempt == 0:
            print(f"{name}: first pass {result['seconds']:.2f} s")
    result["widest"] = max(norm.relative_width for norm in norms)
    result["median_width"] = statistics.median(norm.relative_width for norm in norms)
    print(
        f"{name}: {len(items)} layers in {result['seconds']:.2f} s; relative width median "
        f"{result['median_width']:.1e}, largest {result['widest']:.1e}"
    )
    if args.peers_on_models and args.lip4conv is not None:
        method = peer_methods(args)["lip4conv Gram x6"]
        start = time.perf_counter()
        for layer, size, _ in items:
            mode = "circular" if size else "dense"
            method(Case(name, layer, size[0] if size else None, mode))  # type: ignore[arg-type]
        result["lip4conv_seconds"] = time.perf_counter() - start
        print(f"{name}: lip4conv Gram x6 {result['lip4conv_seconds']:.1f} s")
    return result


def main() -> None:
    kinds: Any = BenchmarkArguments
    (args,) = HfArgumentParser(kinds, description=(__doc__ or "").split("\n")[0]).parse_args_into_dataclasses()
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    unknown = [name for name in args.shapes if name not in (*SHAPES, "none")]
    if unknown:
        raise ValueError(f"--shapes {unknown[0]!r} must be of {', '.join(SHAPES)}, or none.")
    report: dict[str, Any] = {"torch": torch.__version__, "threads": torch.get_num_threads(), "device": args.device}
    for name in args.shapes:
        for mode in args.modes if name != "none" else ():
            if SHAPES[name][1] is None and mode != args.modes[0]:
                continue
            torch.manual_seed(args.seed)
            case = make_case(name, mode, args.device)
            results = measure(case, args)
            exact = exact_norm(case)
            width = our_norm(case, args.rtol).relative_width
            print_case(case, results, exact, width)
            report[f"{name} {case.mode}"] = {"exact": exact, "our_width": width, "methods": results}
    for name in args.models:
        report[name] = measure_model(name, args)
    if args.out is not None:
        Path(args.out).write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
