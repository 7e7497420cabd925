# SPDX-License-Identifier: Apache-2.0
"""What is known of one layer of a checkpoint."""

import re
from dataclasses import dataclass, field
from typing import Any

from torch import nn


# layers that are not linear maps: they have a Lipschitz constant and no spectral norm
NONLINEAR_KINDS = ("layer_norm", "rms_norm", "group_norm", "lipschitz")


@dataclass(frozen=True)
class LayerInfo:
    """One layer with a stored weight.

    Attributes:
        name: path of the layer, as the checkpoint names its tensors.
        weight: name of the tensor; for "low_rank" the left factor B (out, rank).
        bias: name of its bias, if stored.
        kind: "linear", "low_rank" (B A), "experts" (a stack of matrices, of which each input meets one at a time),
            "conv", "conv_transpose" (1 to 3 dimensions), "embedding", "batch_norm"; and the `NONLINEAR_KINDS`:
            normalisation by the input's own statistics, and "lipschitz", the layers of hf_lip itself.
        arguments: of a convolution, keywords of `hf_lip.spectral_norm`; `eps` of a normalisation, and `offset`, which
            is added to its weight.
        input_size: spatial size of a convolution's input; None where it is not known or differs between calls.
        transposed_weight: the weight is stored as (in, out), as by transformers' Conv1D.
        source: "model" or "names".
        unknown: what could not be known.
        others: further tensors of the layer: the statistics of a batch norm, the right factor A, the magnitudes of a
            weight-normalised kernel.
        head_size: rows per head, for the query, key and value projections of attention.
        tied: the tensor also serves another layer, which is listed too.
        magnitude_dim: the weight is v of a weight norm g v / |v|, normed over all dimensions but this (-1: over all);
            g is in `others`.
        module: the layer itself, on the meta device.
    """

    name: str
    weight: str
    bias: str | None
    kind: str
    arguments: dict[str, Any] = field(default_factory=dict)
    input_size: tuple[int, ...] | None = None
    transposed_weight: bool = False
    source: str = "names"
    unknown: tuple[str, ...] = ()
    others: tuple[str, ...] = ()
    head_size: int | None = None
    tied: bool = False
    magnitude_dim: int | None = None
    module: nn.Module | None = field(default=None, repr=False, compare=False)

    @property
    def linear(self) -> bool:
        """Whether the layer is a linear map, up to its bias."""
        return self.kind not in NONLINEAR_KINDS

    @property
    def tensors(self) -> tuple[str, ...]:
        """All stored tensors of the layer."""
        return (self.weight, *((self.bias,) if self.bias else ()), *self.others)


def natural_order(name: str) -> list[tuple[int, int, str]]:
    """Sort key in which block 10 comes after block 9."""
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in re.split(r"(\d+)|\.", name) if part]


def conv_arguments(module: Any) -> dict[str, Any]:
    """Keywords of `hf_lip.spectral_norm` for a convolution of torch."""
    padding: Any = module.padding
    if padding == "valid":
        padding = tuple(0 for _ in module.kernel_size)
    elif padding == "same":
        totals = [step * (taps - 1) for step, taps in zip(module.dilation, module.kernel_size)]
        padding = tuple((total // 2, total - total // 2) for total in totals)
    arguments = {
        "stride": module.stride,
        "padding": padding,
        "padding_mode": module.padding_mode,
        "dilation": module.dilation,
        "groups": module.groups,
    }
    if module.transposed:
        arguments |= {"transposed": True, "output_padding": module.output_padding}
    return arguments
