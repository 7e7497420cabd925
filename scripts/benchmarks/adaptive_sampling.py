# SPDX-License-Identifier: Apache-2.0
"""Samples that adaptive sampling needs against a fixed number, simulated on published certification logs.

    python scripts/benchmarks/adaptive_sampling.py --logs path/to/certify_logs.zip

The probability of each image's class is reconstructed from its printed radius, at the alpha that the log is consistent
with; both ways of sampling are then simulated at `--alpha`. Abstentions are taken as probability 0.45. "limit" is what
a rule would need at least that knew every probability beforehand and took a single look at full alpha, for the same
loss of ACR.
"""

import sys
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from transformers import HfArgumentParser

from hf_lip.smoothing.adaptive_simulation import simulate_adaptive
from hf_lip.smoothing.intervals import clopper_pearson_lower
from hf_lip.smoothing.log_analysis import PublishedLog, consistent_alphas, read_published_log, vote_ranges
from hf_lip.smoothing.radii import mono_radius


_ABSTAINED = 0.45


@dataclass
class SamplingArguments:
    logs: str = field(metadata={"help": "Zip file or folder with logs named sigma_*, in Cohen's columns."})
    match: str = field(default="cohen2019/certify", metadata={"help": "Only logs with this in their path."})
    n: int = field(default=100_000, metadata={"help": "Samples of the log and of the fixed budget."})
    n0: int = field(default=1000, metadata={"help": "Selection samples of the adaptive runs; they are counted."})
    alpha: float = field(default=0.001, metadata={"help": "Failure probability of the simulated certificates."})
    rtol: float = field(default=0.02, metadata={"help": "Tolerance of the adaptive rule."})
    targets: list[float] = field(
        default_factory=lambda: [1.0, 2.0, 3.0], metadata={"help": "Target radii in units of sigma."}
    )
    repeats: int = field(default=4, metadata={"help": "Simulated runs of each image."})
    seed: int = field(default=0, metadata={"help": "Seed of the simulated votes."})


def main() -> int:
    kinds: Any = SamplingArguments
    (args,) = HfArgumentParser(kinds).parse_args_into_dataclasses()
    table = Table(title=f"samples of {args.n:,} against adaptive, alpha={args.alpha}, n0={args.n0} included")
    for name in ("log", "ACR", f"rtol={args.rtol}", "loss of ACR", "limit", *(f"R={r:g}s" for r in args.targets)):
        table.add_column(name, justify="left" if name == "log" else "right")
    logs = list(published_logs(Path(args.logs), args.match))
    if not logs:
        print(f"No log named sigma_* with {args.match!r} in its path lies in {args.logs}.", file=sys.stderr)
        return 1
    for path, log in logs:
        table.add_row(path, *log_row(log, float(path.rpartition("sigma_")[2]), args))
    Console(width=160).print(table)
    print("R=...s: that radius only, in sigma; in brackets the images (%) certified by a fixed n / adaptively.")
    return 0


def published_logs(path: Path, match: str) -> Iterator[tuple[str, PublishedLog]]:
    """(path inside, log) of all logs named sigma_*."""
    if path.is_dir():
        files = {str(file.relative_to(path)): file for file in path.rglob("sigma_*")}
        yield from ((name, read_published_log(file)) for name, file in sorted(files.items()) if match in name)
        return
    with zipfile.ZipFile(path) as archive:
        for name in sorted(archive.namelist()):
            if match in name and name.rpartition("/")[2].startswith("sigma_"):
                yield name, read_published_log(archive.read(name).decode().splitlines())


def log_row(log: PublishedLog, sigma: float, args: SamplingArguments) -> list[str]:
    """One line of the table."""
    alphas = consistent_alphas(log, n=args.n, sigma=sigma)
    if len(alphas) != 1:
        raise ValueError(f"The log fits {alphas or 'no'} alpha at n={args.n}: give the `--n` it was made with.")
    votes = vote_ranges(log, n=args.n, sigma=sigma, alpha=alphas[0]).mean(axis=1)
    # unanimous votes leave the probability open: half a vote less
    p = np.where(log.abstained, _ABSTAINED, np.minimum(votes, args.n - 0.5) / args.n)
    p, correct = np.tile(p, args.repeats), np.tile(log.correct, args.repeats)
    fixed = _radii(np.random.default_rng(args.seed).binomial(args.n, p), args.n, args.alpha)
    acr = float((fixed * correct).mean())
    shares = np.stack([p, 0.5 * (1.0 - p), 0.5 * (1.0 - p)], axis=1)
    common: dict[str, Any] = {"n0": args.n0, "n": args.n, "sigma": 1.0, "alpha": args.alpha, "seed": args.seed + 1}
    run = simulate_adaptive(shares, rtol=args.rtol, **common)
    loss = 1.0 - float((run.radius * correct * (run.candidate == 0)).mean()) / acr
    limit = _limit(p, correct, acr * (1.0 - loss), args)
    cells = [f"{acr * sigma:.4f}", f"{args.n / (run.samples.mean() + args.n0):.1f}x", f"{loss:.2%}", f"{limit:.1f}x"]
    for target in args.targets:
        run = simulate_adaptive(shares, target_radius=target, **{**common, "n0": 100})
        certified = (run.radius >= target) & (run.candidate == 0)
        factor = args.n / (run.samples.mean() + 100)
        cells.append(f"{factor:.0f}x ({(fixed >= target).mean():.1%} / {certified.mean():.1%})")
    return cells


def _limit(p: NDArray[np.float64], correct: NDArray[np.bool_], acr: float, args: SamplingArguments) -> float:
    """Least mean number of single-look samples, by a price of samples, whose ACR at the expected votes is `acr`."""
    grid = np.unique(np.geomspace(16, args.n, 80).astype(np.int64))
    radii = np.stack([_radii(np.floor(p * n + 0.5), n, args.alpha) for n in grid])
    low, high = 1e-9, 1.0
    for _ in range(50):
        price = np.sqrt(low * high)
        chosen = (radii - price * grid[:, None]).argmax(axis=0)
        enough = (radii[chosen, np.arange(len(p))] * correct).mean() >= acr
        low, high = (price, high) if enough else (low, price)
    chosen = (radii - low * grid[:, None]).argmax(axis=0)
    return float(args.n / grid[chosen].mean())


def _radii(votes: NDArray[Any], n: int, alpha: float) -> NDArray[np.float64]:
    return np.asarray(mono_radius(clopper_pearson_lower(votes, n, alpha), 1.0))


if __name__ == "__main__":
    sys.exit(main())
