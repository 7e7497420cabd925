# SPDX-License-Identifier: Apache-2.0
"""Certified Lipschitz bound of a whole network, where it is known how its layers are composed."""

from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from .composer import ARCHITECTURES, BoundPart, Composer, bound_product
from .exact_class import is_plain
from .families import CERTIFIED, certified_parts
from .meta_model import build_meta_model
from .shapes import Shapes, UnknownCompositionError
from .source import Checkpoint


_DEFAULT_IMAGE_SIZE = 224

__all__ = [
    "BoundPart",
    "GlobalBound",
    "UnknownCompositionError",
    "checkpoint_bound",
    "global_lipschitz_bound",
    "known_architectures",
]


@dataclass(frozen=True)
class GlobalBound:
    """Certified l2 to l2 Lipschitz bound of a network in evaluation mode, input to logits.

    It holds for the real function that the stored numbers define; the rounding of a float forward pass is not in it.

    Attributes:
        upper: the bound; the product, rounded up, of those of `parts`.
        parts: in the order of the forward pass.
        assumptions: what it holds for.
        input_shape: of one input, without the batch.
    """

    upper: float
    parts: tuple[BoundPart, ...]
    assumptions: tuple[str, ...]
    input_shape: tuple[int, ...]


def known_architectures() -> list[str]:
    """Names of the model classes whose composition is known."""
    return [cls.__name__ for cls in ARCHITECTURES]


def global_lipschitz_bound(
    model: nn.Module, input_size: int | tuple[int, ...] | None = None, *, rtol: float = 1e-3
) -> GlobalBound:
    """Certified l2 to l2 Lipschitz bound of a network in evaluation mode, from its input to its logits.

    Args:
        model: loaded and in evaluation mode: a Sequential of known layers, a transformers or hf_lip image classifier
            of a class in `known_architectures()`.
        input_size: for an image classifier the height and width of its images (default: its config's, else 224); for
            other modules the shape of one input, (channels, height, width) or (features,).
        rtol: relative width asked of each layer's norm.

    Raises:
        UnknownCompositionError: a module whose forward pass is not known; the text names it.
        ValueError: training mode, weights that are missing or not finite, an input that does not fit.
    """
    modes = [name for name, module in model.named_modules() if module.training]
    if modes:
        raise ValueError(f"{modes[0] or 'the model'} is in training mode, where no bound holds: call `model.eval()`.")
    for name, module in model.named_modules():
        if not is_plain(module):
            raise UnknownCompositionError(
                f"{name or 'the model'} ({type(module).__name__}) has hooks or parametrised weights, whose effect is "
                "not known: remove them (`torch.nn.utils.parametrize.remove_parametrizations`)."
            )
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_meta and tensor.is_floating_point():
            raise ValueError(f"{name} is on the meta device and has no values: load the weights first.")
    shape, assumptions = _input_shape(model, input_size)
    if type(model) in CERTIFIED:
        size = getattr(model.config, "image_size", None)
        if shape[1:] != (size, size):
            raise ValueError(f"`input_size`: the model is built and certified for {size} x {size}, got {shape[1:]}.")
        upper, parts = certified_parts(model)
        return GlobalBound(upper, parts, assumptions, shape)
    composer = Composer(Shapes.of(model, shape))
    root = composer.part("", model)
    parts = tuple(composer.measure(root.inside if root.combine is bound_product else [root], rtol))
    return GlobalBound(bound_product(part.bound for part in parts), parts, assumptions, shape)


def _input_shape(model: Any, input_size: int | tuple[int, ...] | None) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """Shape of one input and what the bound holds for."""
    rounding = "the real function of the stored weights; the rounding of a float forward pass is not included"
    if not isinstance(model, PreTrainedModel):
        if not isinstance(input_size, (tuple, list)):
            raise ValueError(
                "`input_size` must be the shape of one input, such as (3, 32, 32) or (64,), for a module "
                f"without a config; got {input_size!r}."
            )
        return tuple(input_size), (f"inputs of shape {tuple(input_size)}", rounding)
    config = model.config
    given = input_size if input_size is not None else getattr(config, "image_size", None) or _DEFAULT_IMAGE_SIZE
    height, width = (given, given) if isinstance(given, int) else tuple(given)
    sizes = f"images of {height} x {width}"
    if input_size is None and getattr(config, "image_size", None) is None:
        sizes += ", assumed, as the config states no size"
    unit = ARCHITECTURES.get(type(model), "")
    return (config.num_channels, height, width), (sizes, *((unit,) if unit else ()), rounding)


def checkpoint_bound(
    checkpoint: Checkpoint, input_size: int | tuple[int, int] | None = None, rtol: float = 1e-3
) -> tuple[GlobalBound | None, str | None]:
    """The bound of a checkpoint's network, or why there is none. The network is loaded only if its class is known."""
    names = ", ".join(known_architectures())
    try:
        meta = build_meta_model(checkpoint)
    except ValueError as error:
        return None, f"the composition of the layers is not known: {error}"
    model = meta.model
    if type(model) not in ARCHITECTURES:
        return None, f"the composition of {type(model).__name__} is not known here (known are {names})"
    used = set(meta.tensor_of.values())
    strangers = [name for name in checkpoint.names if name not in used]
    wanted = {key for key, tensor in model.state_dict().items() if tensor.is_floating_point()}
    missing = sorted(wanted - set(meta.tensor_of))
    if strangers or missing:
        text = f"{(strangers or missing)[0]} {'is not part of it' if strangers else 'is not stored'}"
        return None, f"the tensors do not fit {type(model).__name__}: {text}"
    state = {key: checkpoint.tensor(name) for key, name in meta.tensor_of.items()}
    model.load_state_dict(state, strict=False, assign=True)
    try:
        return global_lipschitz_bound(model, input_size, rtol=rtol), None
    except ValueError as error:
        return None, str(error)
