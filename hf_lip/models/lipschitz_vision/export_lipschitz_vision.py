# SPDX-License-Identifier: Apache-2.0
"""Certified classifiers as exported programs, radii included."""

import copy

import torch
from torch import Tensor, nn

from .modeling_lipschitz_vision import LipschitzVisionForImageClassification


class FrozenClassifier(nn.Module):
    """A classifier together with the constants proved for its weights; nothing else may hold its tensors."""

    def __init__(self, model: LipschitzVisionForImageClassification):
        super().__init__()
        self.model = copy.deepcopy(model).requires_grad_(False)
        self.certificate = self.model.prove()

    def forward(self, pixel_values: Tensor) -> dict[str, Tensor]:
        _, logits, radius = self.model.certified_outputs(pixel_values, self.certificate)
        inside = ((pixel_values >= 0.0) & (pixel_values <= 1.0)).flatten(1).all(1)
        return {
            "logits": logits,
            "certified_radius": torch.where(inside, radius, torch.zeros_like(radius)),
            "lipschitz_constant": torch.full_like(radius, self.certificate.lipschitz_constant),
        }


def export_certified(model: LipschitzVisionForImageClassification) -> torch.export.ExportedProgram:
    """A classifier as a program for `torch.export.save`: pixels in [0, 1] (B, C, H, W) of float32 and any batch size
    -> `logits` (B, num_labels), `certified_radius` (B,) and `lipschitz_constant` (B,), as `model` returns them.

    The certificate is proved, and its constants become part of the program with a copy of the weights. They hold for
    the program as it is, run in float64: converted to another precision or format its radii are not proved. A program
    raises nothing: an image with NaN or with pixels outside [0, 1] gets radius 0.

    Raises:
        ValueError: as `model.certify()`, or if the model is in training mode.
    """
    if any(module.training for module in model.modules()):
        raise ValueError("`model` is in training mode, where it is not certified: call `model.eval()` first.")
    # finds a false certificate of the checkpoint; the copy is proved by itself
    model.prove()
    config = model.config
    # torch.export takes a batch of one for a constant
    example = torch.zeros(2, config.num_channels, config.image_size, config.image_size, device=model.device)
    shapes = {"pixel_values": {0: torch.export.Dim.DYNAMIC}}
    return torch.export.export(FrozenClassifier(model).eval(), (example,), dynamic_shapes=shapes)


__all__ = ["export_certified"]
