# SPDX-License-Identifier: Apache-2.0
"""The weights a rescaling is about, each once, and their certified norms."""

from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch import Tensor

from ..spectral.norms import spectral_norm
from .layers import Description, LayerInfo
from .rescale_report import Interval
from .scale_flow import SCALED_KINDS
from .source import Checkpoint


# rescaled unless patterns say otherwise; tables are looked up, and the norm of a lookup says little
_DEFAULT_KINDS = ("linear", "conv", "conv_transpose")


@dataclass(frozen=True)
class Target:
    """A stored weight and the layers that use it.

    Attributes:
        layer: the one whose outputs are the channels.
        uses: all of them.
        every_size: bound convolutions for every image size, as the size they will see is not known.
    """

    layer: LayerInfo
    uses: tuple[LayerInfo, ...]
    every_size: bool

    @property
    def tensor(self) -> str:
        return self.layer.weight

    def input_size(self, layer: LayerInfo) -> tuple[int, ...] | None:
        return None if self.every_size else layer.input_size

    def norm(self, weight: Tensor, rtol: float = 1e-3) -> Interval:
        """Certified interval, of a relative width of about `rtol`, of the largest norm among its uses.

        Raises:
            ValueError: entries that are not finite.
        """
        try:
            norms = [
                spectral_norm(weight, self.input_size(layer), rtol=rtol, **layer.arguments) for layer in self.uses
            ]
        except ValueError as error:
            raise ValueError(f"{self.tensor}: {error}") from error
        return Interval(max(norm.lower for norm in norms), max(norm.upper for norm in norms))


def find_targets(
    checkpoint: Checkpoint, description: Description, patterns: tuple[str, ...], every_size: bool
) -> tuple[list[Target], dict[str, str]]:
    """The weights to rescale, and the other weights with the reason why they are not.

    Args:
        checkpoint: for shapes.
        description: of its layers.
        patterns: of layer paths or tensor names, as in a shell; empty for all linear layers and convolutions.
        every_size: see `Target`.

    Raises:
        ValueError: a pattern matches nothing that can be rescaled, or there is nothing to rescale at all.
    """
    uses: dict[str, list[LayerInfo]] = {}
    for layer in description.layers:
        uses.setdefault(layer.weight, []).append(layer)
    reasons = {name: why for name, why in description.rest.items() if len(checkpoint.shape(name)) > 1}
    targets = []
    matched: set[str] = set()
    for tensor, layers in uses.items():
        found = {pattern for pattern in patterns if any(_matches(layer, pattern) for layer in layers)}
        reason = _why_not(layers) or ("not selected" if patterns and not found else None)
        if reason is None and not patterns and not any(layer.kind in _DEFAULT_KINDS for layer in layers):
            reason = f"{layers[0].kind.replace('_', ' ')}: rescaled only where `layers` names it"
        if reason is not None:
            if len(checkpoint.shape(tensor)) > 1:
                reasons[tensor] = reason
            continue
        matched |= found
        main = next((layer for layer in layers if layer.kind in _DEFAULT_KINDS), layers[0])
        targets.append(Target(main, tuple(layers), every_size))
    for pattern in patterns:
        if pattern not in matched:
            known = [f"{name} ({why})" for name, why in reasons.items() if fnmatchcase(name, pattern)]
            known = known or [target.layer.name for target in targets] or sorted(uses)
            raise ValueError(f"`layers` {pattern!r} matches nothing that can be rescaled. See: {_some(known)}.")
    if not targets:
        raise ValueError(
            "The checkpoint holds no linear layer or convolution that can be rescaled: "
            f"{_some([f'{name} ({why})' for name, why in reasons.items()])}."
        )
    return targets, reasons


def _some(names: list[str]) -> str:
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")


def _matches(layer: LayerInfo, pattern: str) -> bool:
    return fnmatchcase(layer.name, pattern) or fnmatchcase(layer.weight, pattern)


def _why_not(layers: list[LayerInfo]) -> str | None:
    """Why dividing this tensor does not divide the layer by the same."""
    for layer in layers:
        if layer.kind == "lipschitz":
            return "a layer of hf_lip: it rescales its weight itself and is 1-Lipschitz already"
        if layer.kind == "low_rank":
            return "a factor of a low-rank product: merge the adapter first"
        if layer.kind not in SCALED_KINDS:
            return f"{layer.kind.replace('_', ' ')}: no single linear map"
        if layer.magnitude_dim is not None:
            return "weight norm: the weight that acts is computed from two tensors; remove the weight norm first"
        own = next((text for text in layer.unknown if text.startswith("how ")), None)
        if own is not None:
            return f"{own} is not known"
    return None
