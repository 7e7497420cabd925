# SPDX-License-Identifier: Apache-2.0
"""Scale flow of networks whose code is not at hand: what names suggest and what the user states.

Nothing here is proved: pairs of a layer and its batch norm are told from their names, a chain is the user's word.
"""

import re

from .layers import LayerInfo
from .scale_flow import Form, ScaleFlow
from .source import Checkpoint


# last part of a layer's path -> last part of its batch norm's
_PARTNERS = (
    (re.compile(r"conv(\d*)"), (r"bn\1", r"norm\1", r"batch_norm\1", r"batchnorm\1")),
    (re.compile(r"(?:fc|linear|dense)(\d*)"), (r"bn\1", r"norm\1")),
    (re.compile(r"convolution"), ("normalization",)),
)
_HEAD = re.compile(r"(fc|linear|classifier|head|logits|last_linear)(\.\d+)?")


def follower_candidates(path: str) -> list[str]:
    """Paths where the batch norm of a layer of this path is looked for."""
    parent, _, leaf = path.rpartition(".")
    if leaf.isdigit():
        leaves = [str(int(leaf) + 1)]
    else:
        leaves = [match.expand(name) for rule, names in _PARTNERS if (match := rule.fullmatch(leaf)) for name in names]
    return [f"{parent}.{name}" if parent else name for name in leaves]


def named_scale_flow(checkpoint: Checkpoint, layers: list[LayerInfo], chain: tuple[str, ...] = ()) -> ScaleFlow:
    """The scale flow that names suggest.

    Args:
        checkpoint: for shapes.
        layers: as described from the names.
        chain: paths of layers in the order in which they are applied, the last giving the logits, with nothing but
            positively homogeneous operations (ReLU, LeakyReLU, pooling, flattening) and batch norms between them.
            Without it, the only linear layer is taken for the last if it is called like one (fc, classifier, head).

    Raises:
        ValueError: a path in `chain` is no layer, or appears twice.
    """
    by_path = {layer.name: layer for layer in layers}
    linear = [layer for layer in layers if layer.kind in ("linear", "conv", "conv_transpose")]
    followers, odd = _followers(checkpoint, by_path, linear)
    stuck: dict[str, str] = {}
    if odd is not None:
        followers = {}
        stuck = {layer.weight: odd for layer in linear}
    _check_chain(chain, {layer.name for layer in linear})
    order = [by_path[path] for path in chain]
    if not chain:
        heads = [layer for layer in linear if layer.kind == "linear"]
        if len(heads) == 1 and _HEAD.fullmatch(heads[0].name) is not None:
            order = heads
    biases: dict[str, Form] = {}
    norms: dict[str, Form] = {}
    carried: dict[str, int] = {}
    for layer in order:
        stuck.pop(layer.weight, None)
        carried = {**carried, layer.weight: 1}
        if layer.bias is not None:
            biases[layer.bias] = carried
        if layer.weight in followers:
            norms[followers[layer.weight]] = carried
            carried = {}
    for layer in linear:
        if layer not in order and layer.weight in followers:
            norms[followers[layer.weight]] = {layer.weight: 1}
            if layer.bias is not None:
                biases[layer.bias] = {layer.weight: 1}
    return ScaleFlow(biases, norms, followers, stuck, carried, "names")


def _check_chain(chain: tuple[str, ...], known: set[str]) -> None:
    for path in chain:
        if path not in known:
            raise ValueError(
                f"`chain` names {path!r}, which is no linear layer or convolution of the checkpoint. There are: "
                f"{', '.join(sorted(known)[:20])}."
            )
        if chain.count(path) > 1:
            raise ValueError(f"`chain` names {path!r} twice: a layer whose output returns to it is no chain.")


def _followers(
    checkpoint: Checkpoint, by_path: dict[str, LayerInfo], linear: list[LayerInfo]
) -> tuple[dict[str, str], str | None]:
    """Weight -> batch norm's weight; and why the names cannot be trusted, if so."""
    followers: dict[str, str] = {}
    taken: set[str] = set()
    for layer in linear:
        for path in follower_candidates(layer.name):
            norm = by_path.get(path)
            if norm is None or norm.kind != "batch_norm" or norm.weight in taken:
                continue
            outputs = checkpoint.shape(layer.weight)[0]
            if checkpoint.shape(norm.weight) != (outputs,):
                odd = (
                    f"{norm.name} has {checkpoint.shape(norm.weight)[0]} channels and {layer.name} {outputs} outputs, "
                    "so batch norms seem to stand before their convolutions here, and names cannot pair them"
                )
                return {}, odd
            followers[layer.weight] = norm.weight
            taken.add(norm.weight)
            break
    return followers, None
