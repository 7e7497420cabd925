# SPDX-License-Identifier: Apache-2.0
"""Which tensors of a checkpoint are the weights of which layers.

Where transformers can build the model of config.json, it is built on the meta device (no memory, no weights) and asked
for kinds, strides, paddings and, by one forward pass there, image sizes. Tensors that do not fit, and checkpoints
without such a config, are read by names and shapes; what these do not tell is listed with each layer.
"""

from dataclasses import dataclass

from .layer_info import LayerInfo
from .layers_from_model import layers_from_model
from .layers_from_names import layers_from_names
from .source import Checkpoint


__all__ = ["Description", "LayerInfo", "describe", "describe_layers"]

# the other types have no value of their own: quantised tensors need scales that are kept elsewhere
PLAIN_FLOATS = ("F64", "F32", "BF16", "F16")


@dataclass(frozen=True)
class Description:
    """Layers of a checkpoint in the order of its depth; every tensor is in a layer or has a reason why not.

    Attributes:
        layers: tied layers included.
        rest: tensor name -> why it belongs to no layer.
        notes: what the reader should know: why a model could not be built, which sizes were assumed.
        architecture: the class that was built on the meta device, None where there is none.
    """

    layers: list[LayerInfo]
    rest: dict[str, str]
    notes: list[str]
    architecture: str | None = None


def unread_dtype(checkpoint: Checkpoint, name: str) -> str | None:
    """Why the stored values of a tensor cannot be interpreted, None where they can."""
    code = checkpoint.stored_dtype(name)
    if code in PLAIN_FLOATS:
        return None
    if name.endswith("num_batches_tracked"):
        return "a counter"
    return f"stored as {code}: integers and quantised values cannot be interpreted without what is kept beside them"


def describe(checkpoint: Checkpoint, image_size: int | tuple[int, int] | None = None) -> Description:
    """Every tensor of a checkpoint, as part of a layer or with the reason why it is of none.

    Args:
        checkpoint: only headers and config are read.
        image_size: height and width of the model's input, for the sizes of convolutions; default: the config's, else
            224.

    Raises:
        ValueError: an `image_size` was given and the model does not accept it.
    """
    rest: dict[str, str] = {}
    readable = []
    for name in checkpoint.names:
        reason = unread_dtype(checkpoint, name)
        if reason is None and 0 in checkpoint.shape(name):
            reason = "has no entries"
        if reason is None:
            readable.append(name)
        else:
            rest[name] = reason
    found = layers_from_model(checkpoint, readable, image_size)
    taken = {tensor for layer in found.layers for tensor in layer.tensors}
    named = layers_from_names(checkpoint, [name for name in readable if name not in taken], found.rest)
    notes = list(found.notes)
    if image_size is not None and found.architecture is None:
        notes.append(
            "the input size was not used: without the model, the sizes inside the network are not known, and "
            "convolutions are bounded for all sizes"
        )
    if any(layer.kind == "conv" for layer in named.layers):
        notes.append(
            "convolutions described by names: the interval is that of the kernel with stride 1 on images of any "
            "size; its upper end holds for every stride, dilation, number of groups, zero padding and for the "
            "transposed convolution, its lower end need not"
        )
    return Description([*found.layers, *named.layers], rest | named.rest, notes, found.architecture)


def describe_layers(checkpoint: Checkpoint, image_size: int | tuple[int, int] | None = None) -> list[LayerInfo]:
    """The layers of a checkpoint in the order of its depth, each stored weight once.

    Arguments and errors as `describe`, which also lists tied layers and the tensors that belong to no layer.
    """
    return [layer for layer in describe(checkpoint, image_size).layers if not layer.tied]
