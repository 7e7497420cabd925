# SPDX-License-Identifier: Apache-2.0
"""Layers read from the model that transformers builds, on the meta device, from a checkpoint's config."""

from collections import defaultdict
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn
from torch.nn.utils import parametrize
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ..layers.base import LipschitzModule
from .layer_info import LayerInfo, conv_arguments
from .layers_from_names import attention_head_size, magnitude_dim
from .meta_model import build_meta_model, input_sizes
from .normalisation import describe_normalisation
from .source import Checkpoint


_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_MATRICES = (nn.Linear, Conv1D, nn.Embedding)
_ORIGINAL = ".parametrizations.weight.original"


@dataclass
class FromModel:
    """What the model told: its layers, why other tensors are none, remarks, and its class."""

    layers: list[LayerInfo] = field(default_factory=list)
    rest: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    architecture: str | None = None


def layers_from_model(
    checkpoint: Checkpoint, names: list[str], image_size: int | tuple[int, int] | None = None
) -> FromModel:
    """Describe the tensors that fit the model of config.json.

    Args:
        checkpoint: headers and config are read.
        names: tensors to describe, all of a plain floating dtype.
        image_size: as in `describe`.

    Raises:
        ValueError: an `image_size` was given and the model does not accept it.
    """
    found = FromModel()
    try:
        meta = build_meta_model(checkpoint)
    except ValueError as error:
        found.notes.append(f"layers are described by names and shapes: {error}")
        return found
    found.architecture = type(meta.model).__name__
    readable = set(names)
    tensor_of = {key: name for key, name in meta.tensor_of.items() if name in readable}
    reachable = tensor_of | _aliases(meta.model, tensor_of)
    sizes = input_sizes(meta.model, image_size, found.notes)
    owners = _owner_configs(meta.model)
    seen: dict[str, str] = {}
    for path, module in meta.model.named_modules():
        if isinstance(module, LipschitzModule):
            layer = _own_layer(path, module, tensor_of)
        else:
            parent = meta.model.get_submodule(path.rpartition(".")[0])
            layer = _layer(path, module, reachable, sizes.get(path), (parent, owners[path]))
        if layer is None:
            _remember_parameters(path, module, tensor_of, found.rest)
            continue
        if layer.weight in seen:
            # the same table twice is one layer; an embedding that is also the last matrix is two
            if seen[layer.weight] == layer.kind:
                continue
            layer = replace(layer, tied=True, name=path)
        seen.setdefault(layer.weight, layer.kind)
        found.layers.append(layer)
    matched = set(meta.tensor_of.values())
    strangers = sum(name not in matched for name in checkpoint.names)
    if strangers:
        found.notes.append(
            f"{strangers} tensors do not fit {found.architecture} as config.json describes it, or are merged and "
            "split on loading: they are described by names and shapes"
        )
    return found


def _aliases(model: PreTrainedModel, tensor_of: dict[str, str]) -> dict[str, str]:
    """Keys of tied parameters whose tensor is stored under another key."""
    groups: dict[int, list[str]] = defaultdict(list)
    for key, parameter in model.named_parameters(remove_duplicate=False):
        groups[id(parameter)].append(key)
    aliases: dict[str, str] = {}
    for keys in groups.values():
        stored = [tensor_of[key] for key in keys if key in tensor_of]
        if stored:
            aliases |= {key: stored[0] for key in keys if key not in tensor_of}
    return aliases


def _owner_configs(model: PreTrainedModel) -> dict[str, Any]:
    """Module path -> config of the innermost model around it: towers have their own heads and widths."""
    configs: dict[str, Any] = {}
    for path, module in model.named_modules():
        own = getattr(module, "config", None) if isinstance(module, PreTrainedModel) else None
        configs[path] = own if own is not None else configs[path.rpartition(".")[0]]
    return configs


def _stored_path(name: str) -> str:
    return name.partition(_ORIGINAL)[0].removesuffix(".weight")


def _layer(
    path: str,
    module: nn.Module,
    tensor_of: dict[str, str],
    size: tuple[int, ...] | None,
    around: tuple[nn.Module, Any],
) -> LayerInfo | None:
    """The layer that a module is, None where it is none or its weight is not stored; `around` are the module that
    holds it and the config of its model."""
    prefix = f"{path}." if path else ""
    if isinstance(module, nn.MultiheadAttention):
        return _packed_attention(prefix, module, tensor_of)
    bias = tensor_of.get(f"{prefix}bias")
    normalisation = describe_normalisation(module)
    if normalisation is not None:
        stored = {leaf: tensor_of[prefix + leaf] for leaf in normalisation.leaves if prefix + leaf in tensor_of}
        weight = stored.pop("weight", None) or stored.pop("running_var", None)
        if weight is None:
            return None
        stored.pop("bias", None)
        return LayerInfo(
            _stored_path(weight).removesuffix(".running_var"), weight, bias, normalisation.kind,
            arguments=normalisation.arguments, source="model", others=tuple(stored.values()), module=module,
            unknown=normalisation.unknown,
        )  # fmt: skip
    if not isinstance(module, (*_CONVOLUTIONS, *_TRANSPOSED, *_MATRICES)):
        return None
    others: tuple[str, ...] = ()
    dim = None
    unknown = _deviations(module)
    if parametrize.is_parametrized(module, "weight"):
        weight, magnitude = (tensor_of.get(f"{path}{_ORIGINAL}{index}") for index in (1, 0))
        applied: Any = module.parametrizations["weight"]  # type: ignore[index]
        # of torch's parametrisations only this one can be evaluated from what is stored
        if weight is None or magnitude is None or [type(one).__name__ for one in applied] != ["_WeightNorm"]:
            return None
        dim = magnitude_dim(tuple(applied.original0.shape), tuple(applied.original1.shape))
        if dim is None:
            return None
        others = (magnitude,)
    else:
        weight = tensor_of.get(f"{prefix}weight")
        if weight is None:
            return None
    common: dict[str, Any] = {
        "name": _stored_path(weight), "weight": weight, "bias": bias, "source": "model", "unknown": unknown,
        "others": others, "magnitude_dim": dim, "module": module,
    }  # fmt: skip
    if isinstance(module, _MATRICES):
        kind = "embedding" if isinstance(module, nn.Embedding) else "linear"
        transposed = isinstance(module, Conv1D)
        rows = module.weight.shape[1 if transposed else 0]
        # the model's own name: renamed checkpoints call their projections otherwise
        sizes = (attention_head_size(told, path, rows) for told in around)
        head_size = None if kind == "embedding" else next((found for found in sizes if found is not None), None)
        return LayerInfo(kind=kind, transposed_weight=transposed, head_size=head_size, **common)
    kind = "conv_transpose" if isinstance(module, _TRANSPOSED) else "conv"
    if size is None:
        common["unknown"] = (*unknown, "input size")
    return LayerInfo(kind=kind, arguments=conv_arguments(module), input_size=size, **common)


def _packed_attention(prefix: str, module: nn.MultiheadAttention, tensor_of: dict[str, str]) -> LayerInfo | None:
    weight = tensor_of.get(f"{prefix}in_proj_weight")
    if weight is None:
        return None
    name = weight.removesuffix("_weight")
    return LayerInfo(
        name, weight, tensor_of.get(f"{prefix}in_proj_bias"), "linear", source="model", head_size=module.head_dim,
        module=module,
    )  # fmt: skip


def _deviations(module: nn.Module) -> tuple[str, ...]:
    """A class that computes something of its own may use its weight in another way than its base class."""
    base = next(cls for cls in (*_CONVOLUTIONS, *_TRANSPOSED, *_MATRICES) if isinstance(module, cls))
    for method in ("forward", "_conv_forward"):
        if hasattr(base, method) and getattr(type(module), method) is not getattr(base, method):
            return (f"how {type(module).__name__} uses its weight",)
    return ()


def _own_layer(path: str, module: LipschitzModule, tensor_of: dict[str, str]) -> LayerInfo | None:
    """A layer of hf_lip: 1-Lipschitz as a whole, its weight is rescaled before it is used."""
    prefix = f"{path}."
    stored = {leaf: tensor_of[prefix + leaf] for leaf in module.state_dict() if prefix + leaf in tensor_of}
    if not stored or set(stored) != set(module.state_dict()):
        return None
    leaf = "weight" if "weight" in stored else next(iter(stored))
    weight = stored.pop(leaf)
    bias = stored.pop("bias", None)
    return LayerInfo(
        weight.removesuffix(f".{leaf}"), weight, bias, "lipschitz", source="model", others=tuple(stored.values()),
        module=module,
    )  # fmt: skip


def _remember_parameters(path: str, module: nn.Module, tensor_of: dict[str, str], rest: dict[str, str]) -> None:
    own = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
    for leaf, _ in own:
        key = f"{path}.{leaf}" if path else leaf
        if key in tensor_of:
            rest[tensor_of[key]] = f"`{leaf}` of {type(module).__name__}, which is no layer with a norm known here"
