# SPDX-License-Identifier: Apache-2.0
"""Layers read from the names and shapes of tensors alone, and what these cannot tell."""

import re
from dataclasses import dataclass, field
from typing import Any

from .layer_info import LayerInfo, natural_order
from .source import Checkpoint


# what the name of an embedding contains as a whole word
_EMBEDDING = re.compile(r"(^|[._])(embeds?|embeddings?|wte|wpe|tok)([._]|$)|(^|\.)shared$")
# a patch embedding or an embedding's projection is a dense map all the same
_PROJECTION = re.compile(r"(^|[._])(proj|projection|dense|linear|fc)\d*$")
_LORA = re.compile(r"^(?P<path>.*)\.lora_(?P<embedding>embedding_)?A(\.(?!weight$)[^.]+)?(?P<leaf>\.weight)?$")
_NORMALISATION = re.compile(r"(^|[._])(ln|norm|layernorm|layer_norm|rmsnorm|groupnorm|bn)(_?[a-z0-9]+)?$", re.I)
_FUSED_ATTENTION = {"c_attn", "qkv", "qkv_proj", "query_key_value", "Wqkv", "in_proj"}
_ATTENTION = {"q_proj", "k_proj", "v_proj", "query", "key", "value", "q_lin", "k_lin", "v_lin", "q", "k", "v"}
_CONV_UNKNOWN = ("stride", "padding", "dilation", "groups", "input size")
_EPS_KEYS = ("bn_eps", "batch_norm_eps", "batchnorm_eps")


@dataclass
class Named:
    """Layers found so far and tensors that belong to none."""

    layers: list[LayerInfo] = field(default_factory=list)
    rest: dict[str, str] = field(default_factory=dict)


def attention_head_size(config: Any, path: str, rows: int) -> int | None:
    """Rows per head of a query, key or value projection, None for other layers.

    Whatever the order of queries, keys, values and heads in a fused projection, `head_dim` neighbouring rows belong
    to one of the three and to one head.

    Args:
        config: mapping, transformers config or attention module, with the size or the number of heads.
        path: of the layer; its last part says what the layer is.
        rows: output size.
    """

    def read(*keys: str) -> int | None:
        for key in keys:
            value = config.get(key) if isinstance(config, dict) else getattr(config, key, None)
            if isinstance(value, int) and value > 0:
                return value
        return None

    if config is None or path.rsplit(".", 1)[-1] not in _ATTENTION | _FUSED_ATTENTION:
        return None
    heads = read("num_attention_heads", "n_head", "num_heads", "encoder_attention_heads")
    size = read("head_dim", "attention_head_size", "key_value_proj_dim", "d_kv")
    if size is None and heads is not None:
        width = read("hidden_size", "n_embd", "d_model")
        size = width // heads if width is not None and width % heads == 0 else None
    return size if size is not None and rows % size == 0 else None


def layers_from_names(checkpoint: Checkpoint, names: list[str], reasons: dict[str, str]) -> Named:
    """Describe tensors by name and shape.

    Args:
        checkpoint: for shapes and the config.
        names: tensors to describe, all of a plain floating dtype.
        reasons: what is known of tensors that turn out to belong to no layer.
    """
    found = Named()
    left = dict.fromkeys(sorted(names, key=natural_order))
    for rule in (_low_rank, _weight_norm, _batch_norm):
        rule(checkpoint, left, found)
    for name in [name for name in left if not name.endswith("bias")]:
        layer = _by_shape(checkpoint, name, left)
        if isinstance(layer, str):
            del left[name]
            found.rest[name] = reasons.get(name, layer)
            continue
        for tensor in layer.tensors:
            del left[tensor]
        found.layers.append(layer)
    for name in left:
        found.rest[name] = reasons.get(name, "a bias, which shifts and does not stretch")
    found.layers.sort(key=lambda layer: natural_order(layer.name))
    return found


def _bias(path: str, left: dict[str, None]) -> str | None:
    return f"{path}.bias" if f"{path}.bias" in left else None


def _low_rank(checkpoint: Checkpoint, left: dict[str, None], found: Named) -> None:
    """LoRA: A (rank, in) and B (out, rank) of one adapter."""
    for name in list(left):
        match = _LORA.match(name)
        if match is None or (match["leaf"] is None) == (match["embedding"] is None):
            continue
        partner = name.replace(".lora_embedding_A", ".lora_embedding_B").replace(".lora_A", ".lora_B")
        if partner not in left:
            found.rest[name] = f"half of a low-rank product: {partner} is missing"
            del left[name]
            continue
        right, product = checkpoint.shape(name), checkpoint.shape(partner)
        if len(right) != 2 or len(product) != 2 or product[1] != right[0]:
            # low-rank convolutions: the factors are listed as the kernels they are
            continue
        path = name.replace(".lora_embedding_A", ".lora").replace(".lora_A", ".lora").removesuffix(".weight")
        unknown = ("the factor lora_alpha / r, which is left out",)
        found.layers.append(LayerInfo(path, partner, None, "low_rank", unknown=unknown, others=(name,)))
        del left[name], left[partner]


def _weight_norm(checkpoint: Checkpoint, left: dict[str, None], found: Named) -> None:
    """weight = g v / |v|, in torch's old and new spelling."""
    for name in list(left):
        if name.endswith(".weight_v"):
            path = name.removesuffix(".weight_v")
            magnitude = f"{path}.weight_g"
        elif name.endswith(".parametrizations.weight.original1"):
            path = name.removesuffix(".parametrizations.weight.original1")
            magnitude = f"{path}.parametrizations.weight.original0"
        else:
            continue
        if magnitude not in left:
            continue
        dim = magnitude_dim(checkpoint.shape(magnitude), checkpoint.shape(name))
        if dim is None:
            found.rest[name] = f"a direction whose magnitudes {magnitude} have another shape than weight norm's"
            del left[name]
            continue
        dims = len(checkpoint.shape(name))
        if dims not in (2, 3, 4, 5):
            continue
        kind, unknown = ("linear", ()) if dims == 2 else ("conv", _CONV_UNKNOWN)
        bias = _bias(path, left)
        found.layers.append(LayerInfo(path, name, bias, kind, unknown=unknown, others=(magnitude,), magnitude_dim=dim))
        for tensor in (name, magnitude, *((bias,) if bias else ())):
            del left[tensor]


def magnitude_dim(magnitude: tuple[int, ...], direction: tuple[int, ...]) -> int | None:
    """The dimension that weight norm leaves alone (-1: none), None if the shapes are not those of a weight norm."""
    if not magnitude or set(magnitude) == {1}:
        return -1
    kept = [dim for dim, size in enumerate(magnitude) if size > 1]
    if len(magnitude) == len(direction) and len(kept) == 1 and magnitude[kept[0]] == direction[kept[0]]:
        return kept[0]
    return None


def _batch_norm(checkpoint: Checkpoint, left: dict[str, None], found: Named) -> None:
    """Running statistics belong to batch norm and to nothing else."""
    config = checkpoint.config or {}
    eps = next((config[key] for key in _EPS_KEYS if isinstance(config.get(key), float)), None)
    for name in [name for name in left if name.endswith(".running_var")]:
        path = name.removesuffix(".running_var")
        weight = f"{path}.weight" if f"{path}.weight" in left else name
        stored = (f"{path}.running_mean", name)
        others = tuple(tensor for tensor in stored if tensor in left and tensor != weight)
        norm = LayerInfo(
            path, weight, _bias(path, left), "batch_norm",
            # without an eps in the denominator the norm can only be larger
            arguments={"eps": 0.0 if eps is None else eps}, others=others,
            unknown=("eps, taken as 0",) if eps is None else (),
        )  # fmt: skip
        found.layers.append(norm)
        for tensor in norm.tensors:
            del left[tensor]


def _by_shape(checkpoint: Checkpoint, name: str, left: dict[str, None]) -> LayerInfo | str:
    """The layer of one tensor, or why there is none."""
    shape = checkpoint.shape(name)
    path, _, leaf = name.rpartition(".")
    if leaf == "in_proj_weight" and len(shape) == 2:
        packed = f"{path}.in_proj_bias"
        size = attention_head_size(checkpoint.config, f"{path}.in_proj", shape[0])
        return LayerInfo(f"{path}.in_proj", name, packed if packed in left else None, "linear", head_size=size)
    if len(shape) == 3 and "experts" in name:
        return LayerInfo(name.removesuffix(".weight"), name, None, "experts", unknown=("which sides are in and out",))
    if leaf != "weight":
        return "what it is used for cannot be told from its name"
    bias = _bias(path, left)
    if len(shape) == 2:
        embedding = _EMBEDDING.search(path) is not None and _PROJECTION.search(path) is None
        kind = "embedding" if embedding else "linear"
        return LayerInfo(path, name, bias, kind, head_size=attention_head_size(checkpoint.config, path, shape[0]))
    if len(shape) in (3, 4, 5):
        return LayerInfo(path, name, bias, "conv", unknown=_CONV_UNKNOWN)
    if len(shape) == 1 and _NORMALISATION.search(path):
        return "a normalisation layer by its name: its constant depends on the kind and on eps, which need the model"
    return f"a weight with {len(shape)} dimensions, whose use cannot be told from its name"
