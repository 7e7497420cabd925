# SPDX-License-Identifier: Apache-2.0
"""The model of a checkpoint's config on the meta device: no memory, no weights, the sizes of everything inside.

No code but that of installed packages is run: `auto_map` entries are never followed.
"""

import copy
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import CONFIG_MAPPING, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
from transformers.initialization import no_init_weights
from transformers.models.auto import modeling_auto

from .source import Checkpoint


_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_DEFAULT_IMAGE_SIZE = 224


@dataclass
class MetaModel:
    """A model without memory and what of a checkpoint fits it.

    Attributes:
        model: on the meta device, in evaluation mode.
        tensor_of: parameter or buffer name of the model -> name of the stored tensor, where the shapes agree.
    """

    model: PreTrainedModel
    tensor_of: dict[str, str]


def _model_class(config: Any, architecture: str | None) -> type[PreTrainedModel]:
    """The class of that name which an Auto class has for this config; without a name the base model."""
    known: dict[str | None, type[PreTrainedModel]] = {}
    for auto in vars(modeling_auto).values():
        mapping: Any = getattr(auto, "_model_mapping", None)
        if mapping is not None and type(config) in mapping:
            classes = mapping[type(config)]
            classes = classes if isinstance(classes, (list, tuple)) else (classes,)
            known |= {cls.__name__: cls for cls in classes}
            if auto is modeling_auto.AutoModel:
                known[None] = classes[0]
    if architecture not in known:
        raise ValueError(f"transformers has no model class {architecture!r} for {type(config).__name__}")
    return known[architecture]


def build_meta_model(checkpoint: Checkpoint) -> MetaModel:
    """Build the model of config.json without memory and match the stored tensors to it.

    Raises:
        ValueError: no config.json, a model that the installed packages do not know, or one that cannot be built from
            its config; the text says which.
    """
    content = checkpoint.config
    if content is None:
        raise ValueError("there is no config.json")
    kind = content.get("model_type")
    if not isinstance(kind, str) or kind not in CONFIG_MAPPING:
        raise ValueError(f"config.json names no model that transformers knows (model_type {kind!r})")
    architectures = content.get("architectures") or [None]
    try:
        config = CONFIG_MAPPING[kind].from_dict(dict(content))
        model_class = _model_class(config, architectures[0])
        with torch.device("meta"), no_init_weights():
            model = model_class(config)
        # part of the initialisation that was skipped
        model.tie_weights()
    # whatever a model's constructor raises over a config that does not fit it
    except Exception as error:
        message = " ".join(str(error).split())
        raise ValueError(f"the model of config.json could not be built ({type(error).__name__}: {message})") from error
    model.eval()
    return MetaModel(model, _match(checkpoint, model))


def _match(checkpoint: Checkpoint, model: PreTrainedModel) -> dict[str, str]:
    """Model key -> stored tensor, by the renamings that `from_pretrained` itself applies."""
    state = model.state_dict()
    conversions = get_model_conversion_mapping(model)
    renamings = [entry for entry in conversions if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in conversions if isinstance(entry, WeightConverter)]
    found: dict[str, str] = {}
    for name in checkpoint.names:
        key, converted = rename_source_key(name, renamings, converters, model.base_model_prefix, state)
        if key not in state:
            key, converted = rename_source_key(name, [], [], model.base_model_prefix, state)
        # a tensor that is merged or split on loading is not the weight of one layer
        if key in state and converted is None and tuple(state[key].shape) == checkpoint.shape(name):
            found.setdefault(key, name)
    return found


def _image_readers(model: PreTrainedModel) -> Iterator[PreTrainedModel]:
    """The outermost models whose input is an image."""
    inside: list[str] = []
    for path, module in model.named_modules():
        reads = isinstance(module, PreTrainedModel) and module.main_input_name == "pixel_values"
        if reads and not any(outer == "" or path.startswith(f"{outer}.") for outer in inside):
            inside.append(path)
            yield module


def input_sizes(
    model: PreTrainedModel, image_size: int | tuple[int, int] | None, notes: list[str]
) -> dict[str, tuple[int, ...]]:
    """Spatial input sizes of the convolutions, by one forward pass on the meta device.

    Args:
        model: on the meta device.
        image_size: height and width of its images; default: the config's, else 224.
        notes: what the reader should know is appended.

    Returns:
        module path -> size, for the convolutions that were met and whose size is the same at every call.

    Raises:
        ValueError: an `image_size` was given and the model does not accept it.
    """
    convolutions: dict[nn.Module, str] = {
        module: path for path, module in model.named_modules() if isinstance(module, _CONVOLUTIONS)
    }
    readers = list(_image_readers(model))
    if not readers and image_size is not None:
        raise ValueError(f"`input_size` was given, but {type(model).__name__} reads no images: leave it out.")
    if not convolutions:
        return {}
    seen: dict[str, set[tuple[int, ...]]] = defaultdict(set)

    def remember(module: nn.Module, inputs: tuple[Any, ...]) -> None:
        dims = len(module.kernel_size)  # type: ignore[arg-type]
        seen[convolutions[module]].add(tuple(inputs[0].shape[-dims:]))

    hooks = [module.register_forward_pre_hook(remember) for module in convolutions]
    try:
        for reader in readers:
            _run(reader, image_size, notes)
    finally:
        for hook in hooks:
            hook.remove()
    return {path: next(iter(sizes)) for path, sizes in seen.items() if len(sizes) == 1}


def _run(reader: PreTrainedModel, image_size: int | tuple[int, int] | None, notes: list[str]) -> None:
    """One forward pass of a model that reads images, on the meta device."""
    config = reader.config
    wanted = image_size if image_size is not None else getattr(config, "image_size", None)
    if wanted is None:
        wanted = _DEFAULT_IMAGE_SIZE
        notes.append(f"input size {wanted} x {wanted} assumed: the config of {type(reader).__name__} states none")
    height, width = (wanted, wanted) if isinstance(wanted, int) else tuple(wanted)
    channels = getattr(config, "num_channels", None) or 3
    shape: tuple[int, ...] = (1, channels, height, width)
    frames = getattr(config, "num_frames", None)
    if isinstance(frames, int):
        shape = (1, frames, *shape[1:])
    try:
        with torch.no_grad():
            reader(pixel_values=torch.empty(shape, device="meta"))
    # whatever the model raises over inputs of this shape
    except Exception as error:
        message = (
            f"{type(reader).__name__} does not run on pixel_values of shape {shape} ({' '.join(str(error).split())})"
        )
        if image_size is not None:
            raise ValueError(f"`input_size`: {message}.") from error
        notes.append(f"{message}: where it stopped, sizes are not known and convolutions are bounded for all sizes")


def materialise(module: nn.Module, tensors: dict[str, torch.Tensor]) -> nn.Module:
    """A copy of one meta module on the CPU, in evaluation mode, that holds these tensors (leaf name -> values)."""
    copied = copy.deepcopy(module).to_empty(device="cpu").eval()
    copied.load_state_dict(tensors, assign=True)
    return copied
