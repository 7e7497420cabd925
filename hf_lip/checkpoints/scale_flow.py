# SPDX-License-Identifier: Apache-2.0
"""Where the scale of a layer goes: which batch norms, biases and logits have to answer for a divided weight.

A network runs once on the meta device, where it costs nothing, under a dispatch mode that sees each of its operations.
Each value gets a form: the weights by whose divisors it is divided when weights are. ReLU, pooling, means and views
are positively homogeneous and pass the form on; products add forms; sums need equal ones; batch norm in eval mode,
(x - mean) / sqrt(var + eps) * w + b, takes any form up, since mean and w can be scaled and eps stands beside the
variance only. Every other operation needs a value that carries no divisor; weights that would break this are stuck.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel

from .layers import LayerInfo
from .meta_model import MetaModel


# weight tensor -> how many times its divisor divides a value
Form = Mapping[str, int]
Size = int | tuple[int, int]
NOTHING: Form = {}
DEFAULT_IMAGE_SIZE = 224
# linear maps whose whole weight is one tensor
SCALED_KINDS = ("linear", "conv", "conv_transpose", "embedding")

# one argument carries the form, the others are indices
_PASS = {
    *("relu", "relu_", "leaky_relu", "leaky_relu_", "abs", "neg", "mean", "sum", "amax", "amin", "linalg_vector_norm"),
    *("max_pool2d_with_indices", "max_pool3d_with_indices", "avg_pool1d", "avg_pool2d", "avg_pool3d"),
    *("adaptive_avg_pool1d", "_adaptive_avg_pool2d", "_adaptive_avg_pool3d", "adaptive_max_pool2d"),
    *("adaptive_max_pool3d", "upsample_nearest1d", "upsample_nearest2d", "upsample_nearest3d", "upsample_bilinear2d"),
    *("reflection_pad1d", "reflection_pad2d", "replication_pad1d", "replication_pad2d", "view", "_unsafe_view"),
    *("reshape", "permute", "transpose", "t", "squeeze", "unsqueeze", "expand", "slice", "select", "narrow", "unbind"),
    *("split", "split_with_sizes", "flip", "roll", "repeat", "clone", "alias", "detach", "_to_copy", "pixel_shuffle"),
    *("pixel_unshuffle", "index", "index_select", "gather", "embedding"),
}
_EQUAL = {"add", "add_", "sub", "sub_", "cat", "stack", "maximum", "minimum", "copy_"}
_PRODUCT = {"mul", "mul_", "mm", "bmm", "_prelu_kernel"}
_PRODUCT_AND_SUM = {"convolution", "addmm", "baddbmm"}
_BATCH_NORM = {"native_batch_norm", "_native_batch_norm_legit_no_training", "_batch_norm_no_update"}
_REASONS = {
    "gelu": "GELU follows, and gelu(s x) is not s gelu(x)",
    "silu": "SiLU follows, and silu(s x) is not s silu(x)",
    "sigmoid": "a sigmoid follows, which is not positively homogeneous",
    "tanh": "tanh follows, which is not positively homogeneous",
    "hardtanh": "a clipped activation follows, and its limits do not scale",
    "_softmax": "a softmax reads it (attention), which is not positively homogeneous",
    "native_layer_norm": "layer norm follows: it divides by sqrt(variance + eps), and eps does not scale",
    "native_group_norm": "group norm follows: it divides by sqrt(variance + eps), and eps does not scale",
}
for _name, _same in {"_safe_softmax": "_softmax", "hardtanh_": "hardtanh", "silu_": "silu"}.items():
    _REASONS[_name] = _REASONS[_same]
_BRANCHES = "it reaches a sum or a concatenation whose other branch does not carry its scale, such as an identity skip"
_NORM_ELSEWHERE = "the weight of its batch norm is used in another place too"
_NOT_LOGITS = "its scale reaches the outputs, and they are not logits, of which only the argmax counts"


@dataclass(frozen=True)
class ScaleFlow:
    """What has to change with the divisors of the weights so that the logits change by a common factor only.

    Attributes:
        biases: bias tensor -> form of the output it is added to; it is divided by the same.
        norms: weight tensor of a batch norm -> form of its input; its running mean is divided by it, its weight
            multiplied.
        followers: weight -> weight of the batch norm that alone reads the layer's output; there each channel may have
            its own divisor, and there `--fold-bn` folds.
        stuck: weight -> why no divisor but 1 keeps the function.
        logits: form of the logits.
        source: "model" if read off the network itself, "names" if inferred from names and what the user stated.
    """

    biases: dict[str, Form]
    norms: dict[str, Form]
    followers: dict[str, str]
    stuck: dict[str, str]
    logits: Form
    source: str

    def reason(self, weight: str) -> str:
        """Why this weight cannot be divided, "" if it can."""
        carried = any(weight in form for form in (*self.norms.values(), self.logits))
        if weight in self.stuck or carried:
            return self.stuck.get(weight, "")
        if self.source == "names":
            return "no batch norm that belongs to it could be told from the names, and no chain was stated"
        return "the forward pass does not use it in a way that can be followed"


@dataclass
class _Trace(TorchDispatchMode):
    """Follows one forward pass. Tensors are kept alive, so that their ids stay theirs."""

    weights: dict[int, str]
    biases: dict[int, str]
    norms: dict[int, str]
    forms: dict[int, Form] = field(default_factory=dict)
    alive: list[Tensor] = field(default_factory=list)
    readers: dict[int, int] = field(default_factory=dict)
    made_by: dict[int, str] = field(default_factory=dict)
    bias_forms: dict[str, Form] = field(default_factory=dict)
    norm_forms: dict[str, Form] = field(default_factory=dict)
    norm_inputs: dict[str, list[int]] = field(default_factory=dict)
    stuck: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__init__()

    def form(self, value: Any) -> Form:
        name = self.weights.get(id(value))
        form = {name: 1} if name is not None else self.forms.get(id(value), NOTHING)
        return {weight: count for weight, count in form.items() if weight not in self.stuck}

    def stop(self, forms: Iterable[Form], reason: str) -> None:
        for form in forms:
            for weight in form:
                self.stuck.setdefault(weight, reason)

    def agree(self, first: Form, second: Form, reason: str) -> Form:
        """Their common form; weights that the two carry differently are stuck."""
        different = [name for name in {*first, *second} if first.get(name, 0) != second.get(name, 0)]
        self.stop([dict.fromkeys(different, 1)], reason)
        return {name: count for name, count in first.items() if name not in different}

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = func(*args, **(kwargs or {}))
        operands = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        outputs = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        self.alive += [*operands, *outputs]
        for operand in operands:
            self.readers[id(operand)] = self.readers.get(id(operand), 0) + 1
        name = func.overloadpacket.__name__
        if name == "_to_copy" and not outputs[0].is_floating_point():
            name = "a cast to integers"
        elif (kwargs or {}).get("rounding_mode") is not None:
            name = "a rounding division"
        form = self.combine(name, args, operands)
        if func._schema.is_mutable and operands:
            form = self.agree(form, self.form(operands[0]), _BRANCHES)
        for output in outputs:
            # the places of maxima do not move with a scale
            self.forms[id(output)] = form if output.is_floating_point() else NOTHING
        return result

    def combine(self, name: str, args: tuple, operands: list[Tensor]) -> Form:
        """Form of the result of one operation."""
        if name in _BATCH_NORM:
            return self.batch_norm(args)
        biases = [operand for operand in operands if id(operand) in self.biases]
        rest = [operand for operand in operands if id(operand) not in self.biases]
        forms = [self.form(operand) for operand in rest]
        # numbers among the operands of a sum do not scale; those of a product do no harm
        number = name in ("add", "add_", "sub", "sub_") and any(isinstance(other, (int, float)) for other in args[:2])
        padding = name == "constant_pad_nd" and (len(args) < 3 or args[2] == 0)
        if name in _PRODUCT_AND_SUM:
            # the summand comes first in one kind and last in the other
            summand = forms[2:] if name == "convolution" else forms[:-2]
            form = self.add_forms(forms[:2] if name == "convolution" else forms[-2:])
            form = self.agree(form, summand[0], _BRANCHES) if summand else form
        elif name in _PRODUCT:
            form = self.add_forms(forms)
        elif name in ("div", "div_") and len(args) == 2 and forms:
            form = self.add_forms([forms[0], *({key: -n for key, n in form.items()} for form in forms[1:])])
        elif (name in _PASS or padding) and forms:
            self.stop(forms[1:], "the network uses it in a way that is not a linear map of its input")
            form = forms[0]
        elif name in _EQUAL and forms and not number:
            form = forms[0]
            for other in forms[1:]:
                form = self.agree(form, other, _BRANCHES)
        else:
            reason = f"{name.strip('_')} follows, which is not known to be positively homogeneous"
            self.stop(forms, _REASONS.get(name, reason))
            form = NOTHING
        for bias in biases:
            self.adapt(bias, form if name in _PRODUCT_AND_SUM | _EQUAL else NOTHING)
        for norm in {self.norms[id(operand)] for operand in operands if id(operand) in self.norms}:
            # a weight that does not only multiply the normalised values is not to be changed
            self.norm_forms[norm] = self.agree(self.norm_forms.get(norm, NOTHING), NOTHING, _NORM_ELSEWHERE)
        return form

    @staticmethod
    def add_forms(forms: Iterable[Form]) -> Form:
        total: dict[str, int] = {}
        for form in forms:
            for name, count in form.items():
                total[name] = total.get(name, 0) + count
        return {name: count for name, count in total.items() if count}

    def adapt(self, bias: Tensor, form: Form) -> None:
        name = self.biases[id(bias)]
        known = self.bias_forms.get(name, form)
        self.bias_forms[name] = self.agree(known, form, "its bias is added at places of different scales")

    def batch_norm(self, args: tuple) -> Form:
        value, weight = args[0], args[1]
        form = self.form(value)
        name = self.norms.get(id(weight))
        if name is None:
            self.stop([form], "the batch norm behind it has no weight of its own that could take up its scale")
            return NOTHING
        known = self.norm_forms.get(name, form)
        self.norm_forms[name] = self.agree(known, form, "its batch norm is used at places of different scales")
        self.norm_inputs.setdefault(name, []).append(id(value))
        return NOTHING


@torch.no_grad()
def trace_scale_flow(meta: MetaModel, layers: list[LayerInfo], image_size: Size | None = None) -> ScaleFlow:
    """Follow the scales of a network through one forward pass.

    Args:
        meta: the network without memory.
        layers: of the same network, tied ones included or not.
        image_size: of the images it is run on; default: the config's, else 224.

    Raises:
        ValueError: the forward pass does not run on the meta device, or its inputs are not known.
    """
    model = meta.model
    norms = {layer.weight for layer in layers if layer.kind == "batch_norm"}
    weights = {layer.weight for layer in layers if layer.kind in SCALED_KINDS}
    biases = {layer.bias for layer in layers if layer.kind in SCALED_KINDS and layer.bias is not None}
    parameters = dict(model.named_parameters(remove_duplicate=False))
    stored = {id(parameters[key]): name for key, name in meta.tensor_of.items() if key in parameters}
    trace = _Trace(
        weights={key: name for key, name in stored.items() if name in weights},
        biases={key: name for key, name in stored.items() if name in biases},
        norms={key: name for key, name in stored.items() if name in norms},
    )
    hooks = _record_makers(model, trace)
    try:
        with trace:
            output = model(**_inputs(model, image_size))
    # whatever a model raises over tensors without data
    except Exception as error:
        message = " ".join(str(error).split())
        raise ValueError(f"the forward pass of {type(model).__name__} cannot be followed ({message})") from error
    finally:
        for hook in hooks:
            hook.remove()
    logits = getattr(output, "logits", None)
    form = NOTHING if logits is None else trace.form(logits)
    if logits is None:
        trace.stop([trace.form(leaf) for leaf in tree_leaves(output) if isinstance(leaf, Tensor)], _NOT_LOGITS)
    return _finished(trace, form)


def _inputs(model: PreTrainedModel, image_size: Size | None) -> dict[str, Tensor]:
    """Inputs of the smallest kind, on the meta device."""
    config: Any = model.config
    if model.main_input_name == "pixel_values":
        wanted = image_size or getattr(config, "image_size", None) or DEFAULT_IMAGE_SIZE
        height, width = (wanted, wanted) if isinstance(wanted, int) else tuple(wanted)
        frames = [config.num_frames] if isinstance(getattr(config, "num_frames", None), int) else []
        shape = (1, *frames, getattr(config, "num_channels", None) or 3, height, width)
        return {"pixel_values": torch.empty(shape, device="meta")}
    if model.main_input_name != "input_ids":
        raise ValueError(f"its input {model.main_input_name} is of no known shape")
    tokens = torch.empty((1, 8), dtype=torch.long, device="meta")
    inputs = {"input_ids": tokens}
    return inputs | {"decoder_input_ids": tokens} if getattr(config, "is_encoder_decoder", False) else inputs


def _record_makers(model: nn.Module, trace: _Trace) -> list[Any]:
    """Hooks that note which layer made a tensor."""

    def note(module: nn.Module, args: Any, output: Any) -> None:
        if isinstance(output, Tensor):
            trace.made_by[id(output)] = trace.weights[id(module.weight)]

    owners = [module for module in model.modules() if id(getattr(module, "weight", None)) in trace.weights]
    return [module.register_forward_hook(note) for module in owners]


def _finished(trace: _Trace, logits: Form) -> ScaleFlow:
    def live(form: Form) -> Form:
        return {name: count for name, count in form.items() if name not in trace.stuck}

    made = list(trace.made_by.values())
    followers = {}
    for norm, values in trace.norm_inputs.items():
        weight = trace.made_by.get(values[0])
        alone = len(values) == 1 and trace.readers.get(values[0]) == 1
        # a layer that is called twice would need both of its batch norms
        if weight is not None and alone and made.count(weight) == 1:
            followers[weight] = norm
    return ScaleFlow(
        biases={name: live(form) for name, form in trace.bias_forms.items()},
        norms={name: live(form) for name, form in trace.norm_forms.items()},
        followers=followers,
        stuck=dict(trace.stuck),
        logits=live(logits),
        source="model",
    )
