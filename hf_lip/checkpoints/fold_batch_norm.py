# SPDX-License-Identifier: Apache-2.0
"""Batch norms with running statistics folded into the layer before them, under the same tensor names.

The batch norm stays in place and becomes x -> x + shift: running mean 0, running variance 1, weight sqrt(1 + eps),
which cancels the eps of its denominator, and the folded bias. So the checkpoint loads into the same class.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.fusion import fuse_conv_bn_weights

from .layers import LayerInfo
from .source import Checkpoint


@dataclass(frozen=True)
class FoldedLayer:
    """The layer's weight in float64, and the other tensors that change with it, in float64, by name."""

    weight: Tensor
    others: dict[str, Tensor]


@dataclass(frozen=True)
class BatchNormNames:
    """The tensors of a batch norm that scales or folds touch."""

    weight: str
    bias: str
    mean: str
    var: str

    @classmethod
    def of(cls, checkpoint: Checkpoint, norm: LayerInfo) -> "BatchNormNames":
        """
        Raises:
            ValueError: the batch norm has no weight and bias of its own, or no statistics.
        """
        prefix = norm.weight.removesuffix("weight").removesuffix("running_var")
        names = cls(f"{prefix}weight", f"{prefix}bias", f"{prefix}running_mean", f"{prefix}running_var")
        missing = [name for name in (names.weight, names.bias, names.mean, names.var) if name not in checkpoint]
        if missing:
            raise ValueError(
                f"The batch norm {norm.name} does not store {', '.join(missing)}, so that nothing can be folded or "
                "moved into it: leave out `fold_bn` and `preserve_logits`."
            )
        return names


def batch_norm_eps(norm: LayerInfo, stated: float | None) -> float:
    """The eps of a batch norm: the model's, else what the user states.

    Raises:
        ValueError: neither is known.
    """
    if not norm.unknown:
        return norm.arguments["eps"]
    if stated is None:
        raise ValueError(
            f"The eps of the batch norm {norm.name} is not known without its model class: state it with `bn_eps` "
            "(torch's default is 1e-5)."
        )
    return stated


def fold_batch_norm(
    checkpoint: Checkpoint, layer: LayerInfo, norm: LayerInfo, stated_eps: float | None = None
) -> FoldedLayer:
    """Multiply a layer by its batch norm, in float64.

    Args:
        checkpoint: holds the tensors of both.
        layer: linear or convolution whose output the batch norm alone reads.
        norm: the batch norm.
        stated_eps: see `batch_norm_eps`.

    Raises:
        ValueError: eps is not known, tensors are missing, or statistics are negative or not finite.
    """
    names = BatchNormNames.of(checkpoint, norm)
    eps = batch_norm_eps(norm, stated_eps)
    weight, bias, mean, var = (
        checkpoint.tensor(name).double() for name in (names.weight, names.bias, names.mean, names.var)
    )
    if not all(torch.isfinite(tensor).all() for tensor in (weight, bias, mean, var)) or (var + eps <= 0).any():
        raise ValueError(f"The batch norm {norm.name} holds values that are not finite, or variances below -eps.")
    transposed = layer.transposed_weight or layer.kind == "conv_transpose"
    if transposed and layer.arguments.get("groups", 1) > 1:
        raise ValueError(f"{layer.name} is a transposed convolution with groups, which `fold_bn` does not fold.")
    own_bias = None if layer.bias is None else checkpoint.tensor(layer.bias).double()
    fused, shift = fuse_conv_bn_weights(
        checkpoint.tensor(layer.weight).double(), own_bias, mean, var, eps, weight, bias, transpose=transposed
    )
    others = {
        names.weight: torch.full_like(weight, math.sqrt(1.0 + eps)),
        names.bias: shift.data,
        names.mean: torch.zeros_like(mean),
        names.var: torch.ones_like(var),
    }
    if own_bias is not None and layer.bias is not None:
        # all of it is in the batch norm's bias now
        others[layer.bias] = torch.zeros_like(own_bias)
    return FoldedLayer(fused.data, others)
