# SPDX-License-Identifier: Apache-2.0
"""Rules by which the Lipschitz bounds of a network's parts are joined, every operation rounded up.

Layers in a row multiply, branches that are added add. A convolution or linear layer with the batch norm behind it is
one affine map. What a class does in its own `forward` is known only if `RULES` has it.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..layers.base import LipschitzModule
from ..ops.rounding import gamma, up
from ..spectral.norms import spectral_norms
from .elementary import elementary_bound
from .layer_info import conv_arguments
from .shapes import Shapes, UnknownCompositionError


_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_AFFINE = (nn.Linear, *_CONVOLUTIONS, *_TRANSPOSED)
_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_NORMALISATIONS = (*_BATCH_NORMS, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)


@dataclass(frozen=True)
class BoundPart:
    """A part of a network with a bound of its Lipschitz constant; `inside` are the parts it was made from."""

    name: str
    kind: str
    bound: float
    proof: str
    inside: tuple["BoundPart", ...] = ()


@dataclass
class Node:
    """A part before its affine layers are measured: `index` points to one of these, `combine` says how to join."""

    name: str
    kind: str
    proof: str
    combine: Callable[..., float] | None = None
    inside: list["Node"] = field(default_factory=list)
    bound: float | None = None
    index: int | None = None
    slack: float = 0.0


def bound_product(bounds: Iterable[float]) -> float:
    """Product of non-negative floats, rounded up; factors of 1 cost nothing."""
    product = 1.0
    for bound in bounds:
        if bound != 1.0:
            product = bound if product == 1.0 else up(product * bound)
    return product


def bound_sum(bounds: Iterable[float]) -> float:
    """Sum of non-negative floats, rounded up."""
    total = 0.0
    for bound in bounds:
        total = bound if total == 0.0 else up(total + bound)
    return total


# class -> its parts as one node; a subclass with the same forward has to be registered itself
Rule = Callable[["Composer", str, Any], Node]
RULES: dict[type[nn.Module], Rule] = {}
# model class -> remark on the unit of its input
ARCHITECTURES: dict[type[nn.Module], str] = {}


class Composer:
    """Builds the tree of parts; `RULES` say for each class how its parts follow each other."""

    def __init__(self, shapes: Shapes):
        self.shapes = shapes
        self.items: list[tuple[Any, Any, dict[str, Any]]] = []

    def part(self, name: str, module: nn.Module) -> Node:
        """The part that a module is.

        Raises:
            UnknownCompositionError: no rule for its class.
        """
        if isinstance(module, LipschitzModule):
            return Node(name, type(module).__name__, module.proof, bound=module.lipschitz_bound())
        rule = RULES.get(type(module))
        if rule is not None:
            return rule(self, name, module)
        if isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward:
            return self.chain(name, self.sequence(name, module))
        if type(module) in _AFFINE:
            return self.affine(name, module)
        if type(module) in _NORMALISATIONS:
            return self._leaf(name, module, module, None, {})
        known = elementary_bound(module, self.shapes.input_of(name, module))
        if known is None:
            models = ", ".join(cls.__name__ for cls in ARCHITECTURES)
            raise UnknownCompositionError(
                f"{name or 'the model'} is a {type(module).__name__}, whose composition is not known: there is no "
                f"global bound. Known are Sequential, torch's layers, {models}."
            )
        return Node(name, type(module).__name__, known[1], bound=known[0])

    def sequence(self, name: str, modules: nn.Sequential | nn.ModuleList) -> list[Node]:
        """Parts of modules that run one after the other, batch norms joined to the affine layer before them."""
        prefix = f"{name}." if name else ""
        nodes: list[Node] = []
        children = list(modules.named_children())
        index = 0
        while index < len(children):
            key, module = children[index]
            follower = children[index + 1][1] if index + 1 < len(children) else None
            if follower is not None and self._joins(module, follower, prefix + key):
                nodes.append(self.affine(prefix + key, module, follower))
                index += 2
                continue
            nodes.append(self.part(prefix + key, module))
            index += 1
        return nodes

    def _joins(self, module: nn.Module, norm: nn.Module, name: str) -> bool:
        """Whether a batch norm scales the output channels of an affine layer."""
        if type(module) not in _AFFINE or type(norm) not in _BATCH_NORMS or norm.running_var is None:
            return False
        # behind a linear layer, the channels of a batch norm are features only where nothing stands between
        return type(module) is not nn.Linear or len(self.shapes.input_of(name, module)) == 1

    def affine_or_chain(self, name: str, layer_name: str, module: nn.Module, norm_name: str, norm: nn.Module) -> Node:
        """A layer and the normalisation behind it, as one affine map where it is one."""
        if self._joins(module, norm, layer_name):
            return self.affine(layer_name, module, norm)
        return self.chain(name, [self.part(layer_name, module), self.part(norm_name, norm)])

    def affine(self, name: str, module: Any, norm: Any = None) -> Node:
        """A linear layer or convolution, its batch norm folded in."""
        size = None
        arguments: dict[str, Any] = {}
        if type(module) is not nn.Linear:
            size = self.shapes.spatial_input_of(name, module)
            arguments = conv_arguments(module)
        weight = module.weight.detach()
        if not torch.isfinite(weight).all():
            raise ValueError(f"{name} holds NaN or infinite weights, no bound exists.")
        slack = 0.0
        if norm is not None:
            weight, slack = folded_weight(name, module, norm)
        kind = type(module).__name__ + ("" if norm is None else " with batch norm")
        return self._leaf(name, module, weight, size, arguments, slack, kind)

    def _leaf(
        self,
        name: str,
        module: nn.Module,
        item: Any,
        size: Any,
        arguments: dict[str, Any],
        slack: float = 0.0,
        kind: str | None = None,
    ) -> Node:
        self.items.append((item, size, arguments))
        return Node(name, kind or type(module).__name__, "", index=len(self.items) - 1, slack=slack)

    def chain(self, name: str, nodes: list[Node]) -> Node:
        """Parts in a row; those with the constant 1, such as ReLU, are left out beside others."""
        nodes = [node for node in nodes if node.bound != 1.0] or nodes[:1]
        return nodes[0] if len(nodes) == 1 else Node(name, "chain", "product of its parts", bound_product, nodes)

    def residual(self, name: str, branch: Node, shortcut: Node) -> Node:
        """branch(x) + shortcut(x)."""
        return Node(name, "residual", "sum of branch and shortcut", bound_sum, [branch, shortcut])

    def measure(self, roots: list[Node], rtol: float) -> list[BoundPart]:
        """Norms of all affine layers at once, then the tree with its bounds."""
        norms = spectral_norms(self.items, rtol=rtol)

        def finish(node: Node) -> BoundPart:
            inside = tuple(finish(part) for part in node.inside)
            proof, bound = node.proof, node.bound
            if node.index is not None:
                norm = norms[node.index]
                if not norm.certified:
                    raise ValueError(f"The norm of {node.name} is not certified ({norm.method}).")
                proof, bound = norm.method, norm.upper if node.slack == 0.0 else up(norm.upper + node.slack)
            elif node.combine is not None:
                bound = node.combine(part.bound for part in inside)
            assert bound is not None
            return BoundPart(node.name, node.kind, bound, proof, inside)

        return [finish(root) for root in roots]


def folded_weight(name: str, module: Any, norm: Any) -> tuple[Tensor, float]:
    """diag(w / sqrt(var + eps)) K in float64, and a bound, in operator norm, on its distance from the exact one."""
    variance = norm.running_var.detach().double()
    scale = torch.ones_like(variance) if norm.weight is None else norm.weight.detach().double()
    if not (torch.isfinite(scale).all() and torch.isfinite(variance).all() and (variance + norm.eps > 0).all()):
        raise ValueError(f"The batch norm behind {name} has NaN, infinite or negative statistics, no bound exists.")
    scale = scale / (variance + norm.eps).sqrt()
    weight = module.weight.detach().double()
    ones = [1] * (weight.ndim - 2)
    if isinstance(module, _TRANSPOSED):
        # (in, out / groups, *k): the output channel is the group's, then the column
        parts = weight.reshape(module.groups, -1, *weight.shape[1:])
        weight = (parts * scale.view(module.groups, 1, -1, *ones)).reshape(weight.shape)
    else:
        weight = weight * scale.view(-1, 1, *ones)
    # an operator's norm is at most the number of taps times the Frobenius norm of its kernel, whatever the padding
    taps = math.prod(weight.shape[2:])
    return weight, up(2 * gamma(8) * taps * float(torch.linalg.vector_norm(weight)))
