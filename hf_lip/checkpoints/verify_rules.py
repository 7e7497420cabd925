# SPDX-License-Identifier: Apache-2.0
"""The rules of the independent checker: what a `lipschitz_vision` config declares and the constant of each node.

Only numpy, float64, and the numbers stored on disk. Nothing here is shared with `hf_lip.ops`, `hf_lip.layers` or
`hf_lip.models`: a mistake there must not be repeated here. A node without a rule is refused; there is no default of 1.
Source of the rules: lipschitz-layers sections 1.2, 2.1, 5.3 and 5.5; gram-iteration sections 2 and 3.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .verify_files import CONFIG_FILE, FLOAT_TYPES, MODEL, Reasons, Refusal, StoredTensor


UNIT_ROUNDOFF = 2.0**-53
# relative; dominates what LAPACK loses at these sizes, see `operator_norm`
MARGIN = 1e-9
# relative; rounding of a product of up to 4000 factors
PRODUCT_ROUNDING = 1e-12
_ENTRIES_PER_BATCH = 2**21


@dataclass(frozen=True)
class Bound:
    """`value` is the float64 result, good to rounding; `upper` is inflated so that the exact number is below it."""

    value: float
    upper: float
    method: str = ""
    lambda_max: float | None = None


def _torus_symbols(kernel: np.ndarray, side: int) -> Iterator[np.ndarray]:
    """Blocks sum_t K_t exp(-2 pi i f.t / side) of a kernel (a, b, kh, kw) at every frequency f of a torus.

    Batches of shape (F, a, b); the torus has side x side positions. A real kernel has conjugate blocks at f and -f, so
    half of the frequencies is enough.
    """
    rows, columns, height, width = kernel.shape
    angle = 2.0 * np.pi * np.arange(side) / side
    roots = np.cos(angle) - 1j * np.sin(angle)
    taps = kernel.reshape(rows * columns, height * width).T
    half = side // 2 + 1
    step = max(1, _ENTRIES_PER_BATCH // (rows * columns + height * width))
    for start in range(0, side * half, step):
        first, second = np.divmod(np.arange(start, min(start + step, side * half)), half)
        # exact integers: the argument of the root of unity carries no rounding
        powers = first[:, None, None] * np.arange(height)[:, None] + second[:, None, None] * np.arange(width)
        phases = roots[powers % side].reshape(-1, height * width)
        yield (phases @ taps).reshape(-1, rows, columns)


def operator_norm(weight: np.ndarray, torus: int | None = None) -> Bound:
    """Spectral norm of a matrix (a, b), or of the circular convolution with a kernel (a, b, k, k) on torus x torus.

    Largest eigenvalue of the Gram matrix of the smaller side, at every frequency for a convolution. `upper` adds

    - (4 (d + 2) + 8 r) u ||A||_F^2 to the eigenvalue, for the product over the inner dimension d (Higham, section 3.5)
      and the backward error of the symmetric solver on an r x r matrix (LAPACK Users' Guide, section 4.7),
    - 2 (k^2 + 24) k u ||K||_F to the norm, for the roundings of the entries and of the roots of unity,
    - a relative 1e-9, which at r, d <= 8192 alone exceeds every rounding error that is observed (about 1e-14).
    """
    scale = float(np.abs(weight).max(initial=0.0))
    if scale == 0.0:
        return Bound(0.0, 0.0)
    # without the common scale, squares of very small or very large weights would leave the range of float64
    unit = weight / scale
    taps = 1 if torus is None else weight.shape[2] * weight.shape[3]
    eigenvalue = frobenius = 0.0
    for blocks in [unit[None]] if torus is None else _torus_symbols(unit, torus):
        if blocks.shape[1] > blocks.shape[2]:
            blocks = blocks.conj().swapaxes(1, 2)
        gram = blocks @ blocks.conj().swapaxes(1, 2)
        try:
            eigenvalue = max(eigenvalue, float(np.linalg.eigvalsh(gram)[:, -1].max()))
        except np.linalg.LinAlgError as error:
            raise Refusal(f"the eigenvalue solver failed ({error})") from error
        frobenius = max(frobenius, float(np.trace(gram, axis1=1, axis2=2).real.max()))
    small, large = sorted(weight.shape[:2])
    slack = (4 * (large + 2) + 8 * small) * UNIT_ROUNDOFF * frobenius
    entries = 2 * (taps + 24) * math.sqrt(taps) * UNIT_ROUNDOFF * float(np.linalg.norm(unit))
    upper = math.sqrt(eigenvalue + slack) * (1.0 + MARGIN) + entries
    return Bound(math.sqrt(eigenvalue) * scale, upper * scale)


def _divided(name: str, weight: np.ndarray, divisor: np.ndarray, axis: int) -> np.ndarray:
    """The weight divided by one positive number per channel of `axis`."""
    shape = [1] * weight.ndim
    shape[axis] = -1
    with np.errstate(over="ignore"):
        result = weight / divisor.reshape(shape)
    if not np.isfinite(result).all():
        raise Refusal(f"{name}.rescaling: too small, the rescaled weight is not finite in float64")
    return result


def _positive_rescaling(name: str, tensors: Mapping[str, np.ndarray]) -> np.ndarray:
    rescaling = tensors[f"{name}.rescaling"]
    if not (rescaling > 0).all():
        raise Refusal(f"{name}.rescaling: holds values that are not positive (smallest {rescaling.min():g})")
    return rescaling


def _where(torus: int | None) -> str:
    return "dense" if torus is None else f"{torus} x {torus} torus frequencies"


def _residual_rule(name: str, torus: int | None) -> Callable[[Mapping[str, np.ndarray]], Bound]:
    """x - 2 K^T (act(K x + b) / T): L = max(1, 2 lambda - 1) with lambda = ||T^-1/2 K||^2 of the stored T."""

    def rule(tensors: Mapping[str, np.ndarray]) -> Bound:
        rescaling = _positive_rescaling(name, tensors)
        norm = operator_norm(_divided(name, tensors[f"{name}.weight"], np.sqrt(rescaling), 0), torus)
        largest, upper = norm.value * norm.value, norm.upper * norm.upper
        method = f"max(1, 2 lambda - 1), lambda = ||T^-1/2 K||^2 <= {upper:.9g}, {_where(torus)}"
        return Bound(max(1.0, 2.0 * largest - 1.0), max(1.0, 2.0 * upper - 1.0), method, largest)

    return rule


def _linear_rule(name: str, torus: int | None, axis: int) -> Callable[[Mapping[str, np.ndarray]], Bound]:
    """Norm of the weight divided by the rescaling along `axis` (0 output, 1 input)."""

    def rule(tensors: Mapping[str, np.ndarray]) -> Bound:
        effective = _divided(name, tensors[f"{name}.weight"], _positive_rescaling(name, tensors), axis)
        norm = operator_norm(effective, torus)
        side = "input" if axis else "output"
        return Bound(norm.value, norm.upper, f"norm of W / R along the {side} axis, {_where(torus)}")

    return rule


def _fixed_rule(value: float, method: str) -> Callable[[Mapping[str, np.ndarray]], Bound]:
    # a division is correctly rounded, the margin covers it; an exact 1 stays 1
    upper = value if value == 1.0 else value * (1.0 + MARGIN)
    return lambda tensors: Bound(value, upper, method)


@dataclass(frozen=True)
class HeadBound(Bound):
    """Norm of the effective head, largest distance of two of its rows over all pairs, largest row norm."""

    pair_distance: Bound = Bound(0.0, 0.0)
    row_norm: float = 0.0


def _truncation_rule(num_labels: int) -> Callable[[Mapping[str, np.ndarray]], Bound]:
    # two rows of the identity
    distance = math.sqrt(2.0) if num_labels > 1 else 0.0
    bound = HeadBound(
        1.0, 1.0, "keeps coordinates", pair_distance=Bound(distance, distance * (1.0 + MARGIN)), row_norm=1.0
    )
    return lambda tensors: bound


def _head_rule(tensors: Mapping[str, np.ndarray]) -> Bound:
    """f_i = w_i . x + b_i with the effective rows w_i; all pairs i < j are visited."""
    rows = _divided("classifier", tensors["classifier.weight"], _positive_rescaling("classifier", tensors), 0)
    norm = operator_norm(rows)
    row_norm = float(np.linalg.norm(rows, axis=1).max())
    distances = [float(np.linalg.norm(rows[i + 1 :] - rows[i], axis=1).max()) for i in range(len(rows) - 1)]
    distance = max(distances, default=0.0)
    pair_distance = Bound(distance, distance * (1.0 + MARGIN) + 4.0 * UNIT_ROUNDOFF * row_norm)
    method = "norm of the rows divided by the rescaling, dense"
    return HeadBound(norm.value, norm.upper, method, pair_distance=pair_distance, row_norm=row_norm)


@dataclass(frozen=True)
class Node:
    """One node of the declared graph. `optional`: a no-op that a certificate may leave out of its list."""

    name: str
    kind: str
    rule: Callable[[Mapping[str, np.ndarray]], Bound]
    optional: bool = False


@dataclass
class Graph:
    """Nodes in order, shapes of the tensors they need, and tensors that are allowed but unused in evaluation."""

    nodes: list[Node]
    shapes: dict[str, tuple[int, ...]]
    unused: set[str]
    architecture: Mapping[str, Any]

    def fixed(self, name: str, kind: str, method: str, optional: bool = False) -> None:
        self.nodes.append(Node(name, kind, _fixed_rule(1.0, method), optional))

    def block(self, prefix: str, channels: int, hidden: int, side: int | None) -> None:
        """A weighted layer and its activation; `side` is the image side of a convolution, None for a dense layer."""
        fields, layer = self.architecture, f"{prefix}.layer"
        block_type, kernel = fields["block_type"], fields["kernel_size"]
        torus = None
        if side is not None:
            # a zero-padded convolution is a part of the circular one on n + k // 2 positions (gram-iteration, 3.4);
            # a 1 x 1 kernel has the same block at every frequency
            torus = 1 if kernel == 1 else side + (kernel // 2 if fields["padding_mode"] == "zeros" else 0)
        residual = block_type in ("cpl", "sll")
        rows = hidden if residual else channels
        self.shapes[f"{layer}.weight"] = (rows, channels) if side is None else (rows, channels, kernel, kernel)
        self.shapes[f"{layer}.bias"] = (rows,)
        # aol divides the input side, the others the output side; in = out for the linear layers
        self.shapes[f"{layer}.rescaling"] = (rows,)
        shape = "dense" if side is None else "conv"
        rule = _residual_rule(layer, torus) if residual else _linear_rule(layer, torus, int(block_type == "aol"))
        self.nodes.append(Node(layer, f"{block_type} {shape}", rule))
        if block_type == "cpl":
            self.unused.add(f"{layer}.power_iteration_vector")
        if block_type == "sll":
            self.unused.add(f"{layer}.log_q")
        activation = fields["activation"] or (None if residual else "maxmin")
        if activation == "householder":
            self.shapes[f"{prefix}.activation.theta"] = (channels // 2,)
        if activation is not None:
            methods = {
                "relu": "slopes in [0, 1]",
                "maxmin": "permutes",
                "householder": "continuous, pieces orthogonal",
            }
            self.fixed(f"{prefix}.activation", activation, methods[activation])


def walk(fields: Mapping[str, Any]) -> Graph:
    """The graph that a parsed config declares, node by node, with the shape of every tensor it needs.

    Raises:
        Refusal: a downsampling or pooling factor does not divide the image.
    """
    graph = Graph([], {}, set(), fields)
    smallest = min(fields["image_std"])
    stem = Node(f"{MODEL}.stem", "input normalisation", _fixed_rule(1.0 / smallest, "max 1 / image_std"))
    graph.nodes.append(stem)
    side, channels = fields["image_size"], fields["num_channels"]
    for i, (width, depth, factor) in enumerate(
        zip(fields["hidden_sizes"], fields["depths"], fields["downsample_factors"])
    ):
        stage = f"{MODEL}.stages.{i}"
        side = _divide_side(side, factor, f"downsample_factors[{i}]")
        if fields["downsample_type"] == "unshuffle":
            channels *= factor**2
            graph.fixed(f"{stage}.downsample", "pixel unshuffle", "permutes", factor == 1)
        else:
            graph.fixed(f"{stage}.downsample", "sum pool", f"disjoint windows, sum / {factor}", factor == 1)
        graph.fixed(f"{stage}.channels", "channels", "appends zeros or drops channels", width == channels)
        channels = width
        for j in range(depth):
            graph.block(f"{stage}.blocks.{j}", channels, fields["conv_hidden_size"] or channels, side)
    pool = fields["pool_size"]
    side = _divide_side(side, pool, "pool_size")
    graph.fixed(f"{MODEL}.neck.pool", "sum pool", f"disjoint windows, sum / {pool}", pool == 1)
    graph.fixed(f"{MODEL}.neck.flatten", "flatten", "permutes", optional=True)
    flattened = channels * side**2
    features = fields["dense_size"] or flattened
    graph.fixed(f"{MODEL}.neck.channels", "features", "appends zeros or drops features", features == flattened)
    for j in range(fields["num_dense_layers"]):
        graph.block(f"{MODEL}.neck.blocks.{j}", features, fields["dense_hidden_size"] or features, None)
    _add_head(graph, features)
    return graph


def _divide_side(side: int, factor: int, name: str) -> int:
    if side % factor:
        raise Refusal(f"{CONFIG_FILE}: {name} = {factor} does not divide the image side of {side} it is applied to")
    return side // factor


def _add_head(graph: Graph, features: int) -> None:
    head, labels = graph.architecture["head_type"], graph.architecture["num_labels"]
    rule: Callable[[Mapping[str, np.ndarray]], Bound] = _head_rule
    if head == "truncation":
        if labels > features:
            raise Refusal(f"{CONFIG_FILE}: head_type truncation needs {labels} features, there are {features}")
        rule = _truncation_rule(labels)
    else:
        graph.shapes["classifier.weight"] = (labels, features)
        graph.shapes["classifier.bias"] = (labels,)
        graph.shapes["classifier.rescaling"] = (labels if head == "lln" else 1,)
    graph.nodes.append(Node("classifier", f"{head} head", rule))


class _Float64Tensors(Mapping[str, np.ndarray]):
    """Casts on access, so that one tensor at a time is held in float64."""

    def __init__(self, tensors: Mapping[str, StoredTensor]):
        self.tensors = tensors

    def __getitem__(self, name: str) -> np.ndarray:
        return self.tensors[name].float64()

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)


@dataclass
class Recomputed:
    """What config and weights give by themselves; empty or None where a refusal came first."""

    fields: Mapping[str, Any]
    nodes: list[Node] = field(default_factory=list)
    bounds: dict[str, Bound] = field(default_factory=dict)
    head: HeadBound | None = None

    def feature_constant(self) -> Bound | None:
        """Product over all nodes but the head, if every node has a bound."""
        if self.head is None or len(self.bounds) < len(self.nodes):
            return None
        factors = [bound for name, bound in self.bounds.items() if name != "classifier"]
        value, upper = (math.prod(factor.value for factor in factors), math.prod(factor.upper for factor in factors))
        return Bound(value, upper if upper == 1.0 else upper * (1.0 + PRODUCT_ROUNDING))


def recompute(
    fields: Mapping[str, Any],
    tensors: Mapping[str, StoredTensor],
    reasons: Reasons,
    progress: Callable[[int, int, str], None] | None,
) -> Recomputed:
    """Walk the declared graph and bound every node from the stored tensors; what is refused goes to `reasons`."""
    result = Recomputed(fields)
    graph = reasons.attempt(_match_tensors, fields, tensors, reasons)
    if graph is None:
        return result
    result.nodes = graph.nodes
    arrays = _Float64Tensors(tensors)
    for done, node in enumerate(graph.nodes):
        if progress is not None:
            progress(done, len(graph.nodes), node.name)
        if (bound := reasons.attempt(node.rule, arrays)) is not None:
            result.bounds[node.name] = bound
        if isinstance(bound, HeadBound):
            result.head = bound
    if progress is not None:
        progress(len(graph.nodes), len(graph.nodes), "")
    return result


def _match_tensors(fields: Mapping[str, Any], tensors: Mapping[str, StoredTensor], reasons: Reasons) -> Graph | None:
    """The graph, if the file holds exactly the tensors it needs, with their shapes and finite values."""
    layers = sum(fields["depths"]) + fields["num_dense_layers"]
    if layers > len(tensors):
        raise Refusal(f"{CONFIG_FILE}: declares {layers} layers, but the weights hold {len(tensors)} tensors only")
    graph = walk(fields)
    before = len(reasons)
    for name, shape in graph.shapes.items():
        if name not in tensors:
            reasons.append(f"weights: tensor {name} is missing")
        elif (found := tensors[name].shape) != shape:
            reasons.append(f"{tensors[name].file}: {name} has shape {list(found)}, not {list(shape)}")
    for name, tensor in tensors.items():
        if name not in graph.shapes and name not in graph.unused:
            reasons.append(f"{tensor.file}: unexpected tensor {name}, no rule says what it does to the function")
        elif tensor.dtype not in FLOAT_TYPES:
            reasons.append(f"{tensor.file}: {name} has dtype {tensor.dtype}, not a floating-point type")
        elif not np.isfinite(tensor.float64()).all():
            reasons.append(f"{tensor.file}: {name} holds NaN or infinite values")
    return graph if len(reasons) == before else None
