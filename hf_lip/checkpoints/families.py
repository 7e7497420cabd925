# SPDX-License-Identifier: Apache-2.0
"""How the modules of known model classes follow each other: transformers' ResNets, and the models of hf_lip."""

from typing import Any

from torch import nn
from transformers.models.resnet import modeling_resnet as resnet

from ..models.cifar_resnet import modeling_cifar_resnet as cifar
from ..models.lipschitz_vision.modeling_lipschitz_vision import LipschitzVisionForImageClassification
from .composer import ARCHITECTURES, RULES, BoundPart, Composer, Node
from .elementary import mean_over_pixels


_NORMALISED = "distances between pixel_values as the model takes them, after the image processor's normalisation"
_PIXELS = "distances between images with pixels in [0, 1]; the normalisation inside the model is counted"

# models that prove their own constant
CERTIFIED: tuple[type[nn.Module], ...] = (LipschitzVisionForImageClassification,)

ARCHITECTURES |= {
    LipschitzVisionForImageClassification: _PIXELS,
    cifar.CifarResNetForImageClassification: _PIXELS,
    resnet.ResNetForImageClassification: _NORMALISED,
}


def certified_parts(model: Any) -> tuple[float, tuple[BoundPart, ...]]:
    """Constant and entries of the certificate that the model proves for its weights as they are."""
    certificate = model.compute_certificate()
    parts = (BoundPart(layer["name"], layer["kind"], layer["bound"], layer["method"]) for layer in certificate.layers)
    return certificate.lipschitz_constant, tuple(parts)


def _path(name: str, *parts: str) -> str:
    return ".".join(part for part in (name, *parts) if part)


def _resnet_convolution(composer: Composer, name: str, module: Any) -> Node:
    """ResNetConvLayer and ResNetShortCut: convolution, batch norm, and in the former an activation."""
    convolution = composer.affine_or_chain(
        name, _path(name, "convolution"), module.convolution, _path(name, "normalization"), module.normalization
    )
    if not hasattr(module, "activation"):
        return convolution
    return composer.chain(name, [convolution, composer.part(_path(name, "activation"), module.activation)])


def _resnet_block(composer: Composer, name: str, module: Any) -> Node:
    """activation(layer(x) + shortcut(x))."""
    branch = composer.part(_path(name, "layer"), module.layer)
    shortcut = composer.part(_path(name, "shortcut"), module.shortcut)
    total = composer.residual(name, branch, shortcut)
    return composer.chain(name, [total, composer.part(_path(name, "activation"), module.activation)])


def _resnet_classifier(composer: Composer, name: str, module: Any) -> Node:
    base = _path(name, "resnet")
    embedder = module.resnet.embedder
    nodes = [
        composer.part(_path(base, "embedder.embedder"), embedder.embedder),
        composer.part(_path(base, "embedder.pooler"), embedder.pooler),
    ]
    for index, stage in enumerate(module.resnet.encoder.stages):
        nodes += composer.sequence(_path(base, f"encoder.stages.{index}.layers"), stage.layers)
    nodes.append(composer.part(_path(base, "pooler"), module.resnet.pooler))
    nodes += composer.sequence(_path(name, "classifier"), module.classifier)
    return composer.chain(name, nodes)


def _cifar_shortcut(composer: Composer, name: str, module: Any) -> Node:
    return Node(name, type(module).__name__, "every stride-th pixel, zero channels appended", bound=1.0)


def _cifar_block(composer: Composer, name: str, module: Any) -> Node:
    """relu(shortcut(x) + bn2(conv2(relu(bn1(conv1(x))))))."""
    pairs = [
        composer.affine_or_chain(
            name, _path(name, f"conv{index}"), getattr(module, f"conv{index}"), _path(name, f"bn{index}"),
            getattr(module, f"bn{index}"),
        )
        for index in (1, 2)
    ]  # fmt: skip
    branch = composer.chain(name, pairs)
    return composer.residual(name, branch, composer.part(_path(name, "shortcut"), module.shortcut))


def _cifar_classifier(composer: Composer, name: str, module: Any) -> Node:
    nodes = [
        composer.part(_path(name, "normalization"), module.normalization),
        composer.affine_or_chain(name, _path(name, "conv1"), module.conv1, _path(name, "bn1"), module.bn1),
    ]
    for stage in module.stage_names:
        nodes += composer.sequence(_path(name, stage), getattr(module, stage))
    last = _path(name, module.stage_names[-1])
    _, height, width = composer.shapes.output_of(last, getattr(module, module.stage_names[-1]))
    pooling = mean_over_pixels(height, width)
    nodes.append(Node(_path(name, "pooling"), "mean over all pixels", "1 / sqrt(H W)", bound=pooling))
    nodes.append(composer.part(_path(name, "linear"), module.linear))
    return composer.chain(name, nodes)


RULES |= {
    resnet.ResNetConvLayer: _resnet_convolution,
    resnet.ResNetShortCut: _resnet_convolution,
    resnet.ResNetBasicLayer: _resnet_block,
    resnet.ResNetBottleNeckLayer: _resnet_block,
    resnet.ResNetForImageClassification: _resnet_classifier,
    cifar.CifarResNetShortcut: _cifar_shortcut,
    cifar.CifarResNetBlock: _cifar_block,
    cifar.CifarResNetForImageClassification: _cifar_classifier,
}
