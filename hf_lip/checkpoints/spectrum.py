# SPDX-License-Identifier: Apache-2.0
"""Certified norms of every layer of a safetensors checkpoint, in memory of a few times the largest tensor."""

import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..models.certified_model import package_versions
from ..ops.interval import SpectralNorm
from ..ops.rounding import down, gamma, up
from ..spectral.norms import spectral_norms
from .composition import checkpoint_bound
from .layers import LayerInfo, describe
from .meta_model import materialise
from .source import Checkpoint
from .spectrum_report import HeadNorms, LayerSpectrum, SkippedTensor, SpectrumReport


# called as progress(done, total, what comes next): layers, then the bound of the whole network
Progress = Callable[[int, int, str], None]
# what is read at once, so that layers of equal shape can be worked on together, in float64 entries
_BATCH_ENTRIES = 2**23


@dataclass
class _Loaded:
    """A layer's operators: those of the layer itself, whose largest norm counts, then those of its heads.

    `slack` bounds how far a computed weight is from the exact one, in operator norm. `known` is set instead of
    operators where the layer states its own constant.
    """

    operators: list[tuple[Any, tuple[int, ...] | None, dict[str, Any]]] = field(default_factory=list)
    heads: list[tuple[Any, tuple[int, ...] | None, dict[str, Any]]] = field(default_factory=list)
    frobenius_norm: float | None = None
    slack: float = 0.0
    known: SpectralNorm | None = None


def spectrum(
    model: str | os.PathLike | Checkpoint,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    rtol: float = 1e-3,
    input_size: int | tuple[int, int] | None = None,
    progress: Progress | None = None,
) -> SpectrumReport:
    """Norms of all layers of a checkpoint, and a Lipschitz bound of the network where its composition is known.

    Args:
        model: a folder, a safetensors file or a Hub id (see `Checkpoint.open`), or an open checkpoint.
        revision, token: of a Hub repository.
        rtol: relative width (upper - lower) / upper asked of each interval.
        input_size: height and width of the model's images; default: the config's, else 224.
        progress: called as progress(done, total, name) before each batch of layers, before the bound of the whole
            network, which counts as one layer, and once at the end.

    Returns:
        The report. A layer whose weights have no norm (NaN, infinite, unsupported padding) is among its skipped
        tensors, with the reason.

    Raises:
        FileNotFoundError, ValueError, OSError: as `Checkpoint.open`; ValueError also for an `rtol` outside (0, 1) and
            for an `input_size` that the model does not accept.
    """
    if not 0.0 < rtol < 1.0:
        raise ValueError(f"`rtol` must be between 0 and 1, got {rtol!r}.")
    checkpoint = model if isinstance(model, Checkpoint) else Checkpoint.open(model, revision, token)
    description = describe(checkpoint, input_size)
    rest = dict(description.rest)
    rows: dict[int, LayerSpectrum] = {}
    done, total = 0, len(description.layers) + 1
    for batch in _batches(checkpoint, description.layers):
        if progress is not None:
            progress(done, total, description.layers[batch[0]].name)
        done += len(batch)
        found = _measure(checkpoint, [description.layers[index] for index in batch], rtol)
        for index, row in zip(batch, found):
            layer = description.layers[index]
            if isinstance(row, str):
                rest |= dict.fromkeys((layer.weight, *layer.others), row)
            else:
                rows[index] = replace(row, depth=index)
    by_weight = {row.weight: rows[index] for index, row in enumerate(description.layers) if index in rows}
    for index, layer in enumerate(description.layers):
        if layer.tied and layer.weight in by_weight:
            rows[index] = replace(
                by_weight[layer.weight], name=layer.name, kind=layer.kind, depth=index, num_parameters=0, tied=True
            )
    if progress is not None:
        progress(total - 1, total, "global bound")
    bound, reason = checkpoint_bound(checkpoint, input_size, rtol)
    if progress is not None:
        progress(total, total, "")
    biases = {layer.bias for layer in description.layers if layer.bias is not None}
    return SpectrumReport(
        model=str(checkpoint.folder if isinstance(model, Checkpoint) else model),
        architecture=description.architecture,
        rtol=rtol,
        layers=[rows[index] for index in sorted(rows)],
        skipped=[_skipped(checkpoint, name, rest[name]) for name in checkpoint.names if name in rest],
        notes=description.notes,
        num_parameters=sum(math.prod(checkpoint.shape(name)) for name in checkpoint.names),
        num_bias_parameters=sum(math.prod(checkpoint.shape(name)) for name in biases),
        global_bound=bound,
        no_global_bound=reason,
        versions=package_versions(),
    )


def _skipped(checkpoint: Checkpoint, name: str, reason: str) -> SkippedTensor:
    shape = checkpoint.shape(name)
    return SkippedTensor(name, shape, checkpoint.stored_dtype(name), math.prod(shape), reason)


def _entries(checkpoint: Checkpoint, layer: LayerInfo) -> int:
    return sum(math.prod(checkpoint.shape(name)) for name in layer.tensors)


def _batches(checkpoint: Checkpoint, layers: list[LayerInfo]) -> Iterator[list[int]]:
    """Indices of the layers to read together: equal shapes beside each other, no more than fits."""
    own = [index for index, layer in enumerate(layers) if not layer.tied]
    own.sort(key=lambda index: (layers[index].kind, checkpoint.shape(layers[index].weight), index))
    batch: list[int] = []
    entries = 0
    for index in own:
        size = _entries(checkpoint, layers[index])
        if batch and entries + size > _BATCH_ENTRIES:
            yield batch
            batch, entries = [], 0
        batch.append(index)
        entries += size
    if batch:
        yield batch


def _measure(checkpoint: Checkpoint, layers: list[LayerInfo], rtol: float) -> list[LayerSpectrum | str]:
    """A row for each layer, or the reason why it has no norm."""
    loaded = [_load_or_reason(checkpoint, layer) for layer in layers]
    operators = [one for entry in loaded if isinstance(entry, _Loaded) for one in (*entry.operators, *entry.heads)]
    try:
        norms = spectral_norms(operators, rtol=rtol)
    except (ValueError, TypeError) as error:
        if len(layers) > 1:
            # one of them has no norm: find out which
            return [row for layer in layers for row in _measure(checkpoint, [layer], rtol)]
        return [str(error)]
    left = iter(norms)
    rows: list[LayerSpectrum | str] = []
    for layer, entry in zip(layers, loaded):
        if isinstance(entry, str):
            rows.append(entry)
            continue
        own = [next(left) for _ in entry.operators]
        heads = [next(left) for _ in entry.heads]
        norm = entry.known if entry.known is not None else _largest(own)
        rows.append(_row(checkpoint, layer, entry, norm, heads))
    return rows


def _largest(norms: list[SpectralNorm]) -> SpectralNorm:
    """Of several blocks, of which an input meets one at a time or each its own part."""
    if len(norms) == 1:
        return norms[0]
    top = max(norms, key=lambda norm: norm.upper)
    return SpectralNorm(
        max(norm.lower for norm in norms), top.upper, top.method, all(norm.certified for norm in norms), top.reason
    )


def _row(
    checkpoint: Checkpoint, layer: LayerInfo, entry: _Loaded, norm: SpectralNorm, heads: list[SpectralNorm]
) -> LayerSpectrum:
    lower, upper = norm.lower, norm.upper
    if entry.slack > 0.0:
        lower, upper = down(max(0.0, lower - entry.slack)), up(upper + entry.slack)
    certified, reason = norm.certified, norm.reason
    if layer.kind == "batch_norm" and layer.unknown:
        lower, reason = 0.0, "eps is not known"
    if layer.kind != "lipschitz" and _is_foreign_normalisation(layer):
        certified, reason = False, f"{type(layer.module).__name__} was recognised by running it, which is no proof"
    largest = _largest(heads) if heads else None
    return LayerSpectrum(
        name=layer.name,
        kind=layer.kind,
        depth=0,
        linear=layer.linear,
        shape=checkpoint.shape(layer.weight),
        dtype=str(checkpoint.dtype(layer.weight)).removeprefix("torch."),
        num_parameters=_entries(checkpoint, layer) - (math.prod(checkpoint.shape(layer.bias)) if layer.bias else 0),
        lower=lower,
        upper=upper,
        method=norm.method,
        certified=certified,
        reason=reason,
        source=layer.source,
        unknown=layer.unknown,
        input_size=layer.input_size,
        frobenius_norm=entry.frobenius_norm,
        heads=None if largest is None else HeadNorms(len(heads), largest.lower, largest.upper),
    )


def _is_foreign_normalisation(layer: LayerInfo) -> bool:
    normalises = layer.kind.endswith("_norm")
    return normalises and layer.module is not None and not type(layer.module).__module__.startswith("torch.")


def _load_or_reason(checkpoint: Checkpoint, layer: LayerInfo) -> _Loaded | str:
    try:
        return _load(checkpoint, layer)
    except ValueError as error:
        return str(error)


def _frobenius(weight: Tensor) -> float:
    return float(torch.linalg.vector_norm(weight, dtype=torch.float64))


def _load(checkpoint: Checkpoint, layer: LayerInfo) -> _Loaded:
    weight = checkpoint.tensor(layer.weight)
    if layer.kind == "lipschitz":
        return _Loaded(known=_own_constant(checkpoint, layer))
    if layer.kind.endswith("_norm"):
        return _Loaded([(_normalisation(checkpoint, layer, weight), None, {})])
    if layer.kind == "low_rank":
        right = checkpoint.tensor(layer.others[0])
        gram = (weight.double().mT @ weight.double()) @ (right.double() @ right.double().mT)
        return _Loaded([((weight, right), None, {})], frobenius_norm=math.sqrt(max(0.0, float(gram.trace()))))
    if layer.kind == "experts":
        return _Loaded([(matrix, None, {}) for matrix in weight], frobenius_norm=_frobenius(weight))
    slack = 0.0
    if layer.magnitude_dim is not None:
        weight, slack = _weight_normed(weight, checkpoint.tensor(layer.others[0]), layer.magnitude_dim)
    loaded = _Loaded(frobenius_norm=_frobenius(weight), slack=slack)
    if layer.kind in ("conv", "conv_transpose"):
        loaded.operators = [(weight, layer.input_size, layer.arguments)]
        return loaded
    matrix = weight.mT if layer.transposed_weight else weight
    loaded.operators = [(matrix, None, {})]
    if layer.head_size is not None:
        loaded.heads = [(block, None, {}) for block in matrix.split(layer.head_size)]
    return loaded


def _weight_normed(direction: Tensor, magnitude: Tensor, dim: int) -> tuple[Tensor, float]:
    """g v / |v| in float64 and a bound, in operator norm, on its distance from the exact one."""
    v, g = direction.double(), magnitude.double()
    axes = [axis for axis in range(v.ndim) if axis != dim]
    lengths = torch.linalg.vector_norm(v, dim=axes, keepdim=True)
    if not (lengths > 0).all():
        raise ValueError("weight norm divides by the norm of a direction that is zero, no bound exists.")
    weight = v * (g.reshape(lengths.shape) if g.numel() == lengths.numel() else g) / lengths
    # an operator's norm is at most the number of taps times the Frobenius norm of its kernel, whatever the padding
    taps = math.prod(weight.shape[2:])
    rounding = gamma(v[0].numel() * v.shape[0] + 8) if dim == -1 else gamma(v.numel() // v.shape[dim] + 8)
    return weight, up(2.0 * rounding * taps * _frobenius(weight))


def _normalisation(checkpoint: Checkpoint, layer: LayerInfo, weight: Tensor) -> nn.Module:
    """torch's own module with the layer's weight, which the norm is taken of."""
    eps = layer.arguments["eps"]
    if layer.kind == "batch_norm":
        variance = next(name for name in (layer.weight, *layer.others) if name.endswith("running_var"))
        norm: Any = nn.BatchNorm1d(weight.numel(), eps=eps)
        norm.running_var = checkpoint.tensor(variance).double()
        if layer.weight == variance:
            weight = torch.ones_like(weight)
    elif layer.kind == "group_norm":
        norm = nn.GroupNorm(layer.arguments["num_groups"], weight.numel(), eps=eps)
    elif layer.kind == "rms_norm":
        norm = nn.RMSNorm(weight.numel(), eps=eps)
    else:
        norm = nn.LayerNorm(weight.numel(), eps=eps)
    if offset := layer.arguments.get("offset", 0.0):
        added = weight.double() + offset
        weight = torch.nextafter(added, torch.full_like(added, math.inf).copysign(added))
    norm.weight = nn.Parameter(weight.double(), requires_grad=False)
    return norm.eval()


def _own_constant(checkpoint: Checkpoint, layer: LayerInfo) -> SpectralNorm:
    """The certified bound of one of the package's layers, for the tensors as stored."""
    module: Any = layer.module
    prefix = layer.name + "."
    tensors = {name.removeprefix(prefix): checkpoint.tensor(name) for name in layer.tensors}
    copied: Any = materialise(module, tensors)
    return SpectralNorm(0.0, copied.lipschitz_bound(), copied.proof, True)
