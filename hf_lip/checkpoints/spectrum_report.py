# SPDX-License-Identifier: Apache-2.0
"""What `spectrum` found: one row a layer, totals, everything that was left out and why, as JSON."""

import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from decimal import ROUND_CEILING, ROUND_FLOOR, Context
from typing import Any

from .composition import GlobalBound


FORMAT = "hf_lip/spectrum"
FORMAT_VERSION = 1


def above(value: float, digits: int = 6) -> str:
    """Decimal text of a number that is not below it."""
    return f"{Context(prec=digits, rounding=ROUND_CEILING).create_decimal_from_float(value):g}"


def below(value: float, digits: int = 6) -> str:
    """Decimal text of a number that is not above it."""
    return f"{Context(prec=digits, rounding=ROUND_FLOOR).create_decimal_from_float(value):g}"


@dataclass(frozen=True)
class HeadNorms:
    """Norms of the heads of a query, key or value projection, each the block of rows of one head.

    `lower` and `upper` bound the largest of them; a fused projection has the heads of all three.
    """

    count: int
    lower: float
    upper: float


@dataclass(frozen=True)
class LayerSpectrum:
    """One layer with its norm: lower <= norm <= upper, as proved where `certified`.

    For a linear layer the norm is the l2 operator norm; the other kinds (see `linear`) have a Lipschitz constant, of
    which `upper` is a bound.

    Attributes:
        name, kind, source, unknown, input_size: as in `LayerInfo`.
        depth: position in the network, from 0.
        linear: whether the layer is a linear map.
        shape, dtype: of the stored weight.
        num_parameters: entries of the stored weights, biases not counted; 0 for a tied layer.
        lower, upper, method, certified, reason: as in `SpectralNorm`.
        frobenius_norm: of the weight as a matrix or kernel; None where no such matrix exists.
        stable_rank: (frobenius_norm / upper)^2, hence at most the true one; for a convolution per output position.
        heads: of attention's projections.
        tied: the weight is that of another layer, too.
    """

    name: str
    kind: str
    depth: int
    linear: bool
    shape: tuple[int, ...]
    dtype: str
    num_parameters: int
    lower: float
    upper: float
    method: str
    certified: bool
    reason: str | None
    source: str
    unknown: tuple[str, ...]
    input_size: tuple[int, ...] | None
    frobenius_norm: float | None
    heads: HeadNorms | None
    tied: bool = False

    @property
    def relative_width(self) -> float:
        """(upper - lower) / upper, 0 for the norm 0."""
        if self.upper == 0.0:
            return 0.0
        return math.inf if math.isinf(self.upper) else (self.upper - self.lower) / self.upper

    @property
    def stable_rank(self) -> float | None:
        if self.frobenius_norm is None or self.upper == 0.0 or math.isinf(self.upper):
            return None
        return (self.frobenius_norm / self.upper) ** 2


@dataclass(frozen=True)
class SkippedTensor:
    """A stored tensor without a norm, and why."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    num_parameters: int
    reason: str


@dataclass(frozen=True)
class SpectrumReport:
    """Result of `spectrum`.

    Attributes:
        model: what was given: a folder, a file or a Hub id.
        architecture: model class that layer kinds were read from, None if they come from names and shapes.
        rtol: relative width that was asked of each interval.
        layers: in the order of the network's depth.
        skipped: tensors without a norm, in the order of the checkpoint.
        notes: what the reader should know.
        num_parameters: entries of all tensors.
        num_bias_parameters: entries of the biases of the layers, which shift and do not stretch.
        global_bound: certified Lipschitz bound of the whole network, None where it is not known.
        no_global_bound: why there is none, None if there is one.
        versions: of the packages.
    """

    model: str
    architecture: str | None
    rtol: float
    layers: list[LayerSpectrum]
    skipped: list[SkippedTensor]
    notes: list[str]
    num_parameters: int
    num_bias_parameters: int
    global_bound: GlobalBound | None
    no_global_bound: str | None
    versions: dict[str, str]

    @property
    def linear_layers(self) -> list[LayerSpectrum]:
        return [layer for layer in self.layers if layer.linear]

    @property
    def num_covered_parameters(self) -> int:
        """Entries of the weights that have a norm."""
        return sum(layer.num_parameters for layer in self.layers)

    @property
    def largest(self) -> LayerSpectrum | None:
        """The linear layer with the largest upper end, None if there is no linear layer."""
        return max(self.linear_layers, key=lambda layer: layer.upper, default=None)

    @property
    def log10_product_of_upper_bounds(self) -> float:
        """Decimal logarithm of the product of the upper ends of all linear layers, -inf if one is 0.

        It bounds the network only if that is nothing but these layers in a row with 1-Lipschitz maps between them;
        residual networks and attention are not.
        """
        uppers = [layer.upper for layer in self.linear_layers]
        return -math.inf if 0.0 in uppers else math.fsum(math.log10(upper) for upper in uppers)

    def sorted_layers(self, order: str = "norm") -> list[LayerSpectrum]:
        """Layers by falling upper end, linear ones first ("norm"), or as they follow in the network ("depth").

        Raises:
            ValueError: another order.
        """
        if order == "depth":
            return list(self.layers)
        if order == "norm":
            return sorted(self.layers, key=lambda layer: (not layer.linear, -layer.upper, layer.depth))
        raise ValueError(f"`sort` must be 'norm' or 'depth', got {order!r}.")

    def to_json(self) -> str:
        """JSON text; numbers that are not finite become null."""
        totals = {
            "num_layers": len(self.layers),
            "num_linear_layers": len(self.linear_layers),
            "num_parameters": self.num_parameters,
            "num_parameters_with_a_norm": self.num_covered_parameters,
            "num_bias_parameters": self.num_bias_parameters,
            "largest_linear_layer": None if self.largest is None else self.largest.name,
            "log10_product_of_upper_bounds_of_linear_layers": self.log10_product_of_upper_bounds,
        }
        content = {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "model": self.model,
            "architecture": self.architecture,
            "rtol": self.rtol,
            "totals": totals,
            "global_lipschitz_bound": None if self.global_bound is None else asdict(self.global_bound),
            "no_global_lipschitz_bound": self.no_global_bound,
            "layers": [
                {**asdict(layer), "relative_width": layer.relative_width, "stable_rank": layer.stable_rank}
                for layer in self.layers
            ],
            "skipped": [asdict(tensor) for tensor in self.skipped],
            "notes": self.notes,
            "versions": self.versions,
        }
        return json.dumps(_finite(content), indent=2, allow_nan=False) + "\n"

    def summary(self) -> Iterator[str]:
        """Totals and remarks, one line each."""
        kinds: dict[str, int] = {}
        for layer in self.layers:
            kinds[layer.kind] = kinds.get(layer.kind, 0) + 1
        counts = ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items(), key=lambda item: -item[1]))
        yield f"{len(self.layers)} layers ({counts or 'none'})"
        left = self.num_parameters - self.num_covered_parameters - self.num_bias_parameters
        yield (
            f"{self.num_parameters:,} stored numbers: {self.num_covered_parameters:,} in layers with a norm, "
            f"{self.num_bias_parameters:,} in their biases, {left:,} in neither"
        )
        if self.largest is not None:
            yield f"largest norm of a linear layer: {above(self.largest.upper)} ({self.largest.name})"
            yield (
                "product of the linear layers' upper bounds: "
                f"10^{self.log10_product_of_upper_bounds:.4g} (of the layers, not a bound of the network)"
            )
        uncertified = sum(not layer.certified for layer in self.layers)
        if uncertified:
            yield f"{uncertified} of the norms are not certified; spectrum.json says which and why"
        if self.global_bound is not None:
            yield f"certified global Lipschitz bound, l2 to l2: {above(self.global_bound.upper)}"
            yield from (f"  - {assumption}" for assumption in self.global_bound.assumptions)
        else:
            yield f"no global Lipschitz bound: {self.no_global_bound}"
        yield from (f"note: {note}" for note in self.notes)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(entry) for entry in value]
    return value
