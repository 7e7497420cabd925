# SPDX-License-Identifier: Apache-2.0
"""Comparison of lipschitz_certificate.json with what the independent checker found in config and weights."""

import math
from collections.abc import Mapping
from typing import Any

from .verify_files import CONFIG_FILE, FLOAT_TYPES, MODEL, Reasons, StoredTensor, finite, parse_architecture
from .verify_rules import MARGIN, PRODUCT_ROUNDING, UNIT_ROUNDOFF, Recomputed


CERTIFICATE_FILE = "lipschitz_certificate.json"
HEAD_RULE = "per_pair_all_classes"
UNIT = "l2, pixels in [0, 1]"
_FIXED_ENTRIES = {
    "format": "hf_lip/lipschitz_certificate",
    "format_version": 1,
    "model_type": MODEL,
    "unit": UNIT,
}
_ENTRIES = {
    *_FIXED_ENTRIES,
    *("lipschitz_constant", "feature_constant", "head", "evaluation_error", "input_shape", "dtype"),
    *("weights_sha256", "architecture", "layers", "versions"),
}
_HEAD_ENTRIES = {"type", "rule", "norm", "max_pair_distance"}
_LAYER_ENTRIES = {"name", "kind", "bound", "method"}


class Comparison:
    """One certificate against one recomputation. Afterwards `stated` and `stated_layers` hold its readable numbers."""

    def __init__(self, certificate: Mapping[str, Any], found: Recomputed | None, reasons: Reasons):
        self.certificate = certificate
        self.found = found
        self.reasons = reasons
        self.stated: dict[str, float] = {}
        self.stated_layers: dict[str, float] = {}
        self.head_rule: str | None = None

    def require(self, condition: bool, reason: str) -> None:
        self.reasons.require(condition, f"{CERTIFICATE_FILE}: {reason}")

    def number(self, entries: Mapping[str, Any], key: str, where: str) -> float | None:
        """A finite number >= 0 of the certificate, or None with the reason noted."""
        try:
            value = finite(entries.get(key))
        except ValueError as error:
            self.require(False, f"{where} must be {error}, got {entries.get(key)!r}")
            return None
        self.require(value >= 0.0, f"{where} must not be negative, got {value}")
        return value

    def require_bound(self, stated: float | None, found: float | None, where: str) -> None:
        """The comparison rule: stated >= recomputed, up to 1e-9 relative for rounding."""
        if stated is not None and found is not None:
            self.require(
                stated >= found * (1.0 - MARGIN), f"{where} is stated as {stated!r}, but the weights give {found!r}"
            )

    def require_product(self, stated: float | None, product: float, where: str) -> None:
        """What the format defines as a product is that product: rounding below, 1e-9 relative above."""
        if stated is not None:
            low, high = product * (1.0 - PRODUCT_ROUNDING), product * (1.0 + MARGIN)
            self.require(low <= stated <= high, f"{where} is {product!r}, but it is stated as {stated!r}")

    def compare_entries(self, weights_sha256: str | None) -> None:
        """Names of the entries, the fixed ones, and the hash."""
        entries = self.certificate
        for key in sorted(_ENTRIES - set(entries)):
            self.require(False, f"{key} is missing")
        for key in sorted(set(entries) - _ENTRIES):
            self.require(False, f"unknown entry {key!r}, the checker cannot tell what it claims")
        for key, value in _FIXED_ENTRIES.items():
            found = entries.get(key, value)
            self.require(type(found) is type(value) and found == value, f"{key} must be {value!r}, got {found!r}")
        if weights_sha256 is not None:
            self.require(
                entries.get("weights_sha256") == weights_sha256,
                f"weights_sha256 is {entries.get('weights_sha256')!r}, the weights hash to {weights_sha256!r}; the "
                "certificate belongs to other weights, call `model.certify()` and save again",
            )

    def compare_config(self, config: Mapping[str, Any], fields: Mapping[str, Any]) -> None:
        """The architecture block field by field, and the input shape."""
        entries = self.certificate
        block = entries.get("architecture")
        self.require(isinstance(block, dict), "architecture must be an object")
        source = f"{CERTIFICATE_FILE} (architecture)"
        if isinstance(block, dict) and (stated := self.reasons.attempt(parse_architecture, block, source, True)):
            for key, value in fields.items():
                message = f"architecture.{key} is {stated[key]!r}, but {CONFIG_FILE} has {value!r}"
                self.require(stated[key] == value, message)
        shape = [fields["num_channels"], fields["image_size"], fields["image_size"]]
        found = entries.get("input_shape")
        self.require(found == shape, f"input_shape is {found!r}, but {CONFIG_FILE} makes it {shape}")
        dtype = entries.get("dtype")
        for key in ("dtype", "torch_dtype"):
            if config.get(key) is not None:
                self.require(dtype == config[key], f"dtype is {dtype!r}, but {CONFIG_FILE} has {config[key]!r}")

    def compare_dtype(self, tensors: Mapping[str, StoredTensor]) -> None:
        """The stated dtype is that of every weight; biases and rescalings may be wider."""
        dtype = self.certificate.get("dtype")
        self.require(dtype in FLOAT_TYPES, f"dtype {dtype!r} is not one of {', '.join(FLOAT_TYPES)}")
        for name, tensor in tensors.items():
            if name.endswith(".weight"):
                self.require(tensor.dtype == dtype, f"dtype is {dtype!r}, but {name} is stored as {tensor.dtype}")

    def compare_layers(self) -> None:
        """Every node once, with a bound that is not below the recomputed one."""
        layers = self.certificate.get("layers")
        nodes = {} if self.found is None else {node.name: node for node in self.found.nodes}
        self.require(isinstance(layers, list), "layers must be a list")
        for index, layer in enumerate(layers if isinstance(layers, list) else []):
            self._compare_layer(f"layers[{index}]", layer, set(nodes))
        for name, node in nodes.items():
            listed = name in self.stated_layers or node.optional
            self.require(listed, f"layers does not list {name} ({node.kind})")

    def _compare_layer(self, where: str, layer: Any, names: set[str]) -> None:
        if not isinstance(layer, dict) or not _LAYER_ENTRIES <= set(layer) <= _LAYER_ENTRIES | {"lambda_max"}:
            self.require(False, f"{where} must hold {', '.join(sorted(_LAYER_ENTRIES))}")
            return
        if not all(isinstance(layer[key], str) for key in ("name", "kind", "method")):
            self.require(False, f"name, kind and method of {where} must be strings")
            return
        name = layer["name"]
        self.require(name not in self.stated_layers, f"{where} lists {name} a second time")
        self.require(not names or name in names, f"{where} lists {name}, which the config does not have")
        found = None if self.found is None else self.found.bounds.get(name)
        bound = self.number(layer, "bound", f"the bound of {name}")
        if bound is not None:
            self.stated_layers[name] = bound
            self.require_bound(bound, None if found is None else found.value, f"the bound of {name}")
        if "lambda_max" in layer:
            largest = self.number(layer, "lambda_max", f"lambda_max of {name}")
            self.require_bound(largest, None if found is None else found.lambda_max, f"lambda_max of {name}")

    def compare_head(self, fields: Mapping[str, Any] | None) -> None:
        """The rule for radii, the norm of the head and the distances of its rows."""
        head = self.certificate.get("head")
        if not isinstance(head, dict) or set(head) != _HEAD_ENTRIES:
            self.require(False, f"head must hold exactly {', '.join(sorted(_HEAD_ENTRIES))}")
            return
        self.head_rule = head["rule"] if isinstance(head["rule"], str) else None
        self.require(
            head["rule"] == HEAD_RULE,
            f"head.rule is {head['rule']!r}; only {HEAD_RULE!r} is sound: the nearest class need not be the runner-up",
        )
        if fields is not None:
            expected = fields["head_type"]
            self.require(head["type"] == expected, f"head.type is {head['type']!r}, {CONFIG_FILE} has {expected!r}")
        for key in ("norm", "max_pair_distance"):
            if (value := self.number(head, key, f"head.{key}")) is not None:
                self.stated[key] = value
        if self.found is not None and (found := self.found.head) is not None:
            self.require_bound(self.stated.get("norm"), found.value, "head.norm")
            self.require_bound(
                self.stated.get("max_pair_distance"), found.pair_distance.value, "head.max_pair_distance"
            )
        if "classifier" in self.stated_layers:
            self.require_product(
                self.stated.get("norm"), self.stated_layers["classifier"], "head.norm: that layer's bound"
            )

    def compare_totals(self) -> None:
        """Products of what is stated, the same from the weights, and the evaluation error."""
        for key in ("feature_constant", "lipschitz_constant", "evaluation_error"):
            if (value := self.number(self.certificate, key, key)) is not None:
                self.stated[key] = value
        features, total = self.stated.get("feature_constant"), self.stated.get("lipschitz_constant")
        product = math.prod(bound for name, bound in self.stated_layers.items() if name != "classifier")
        self.require_product(features, product, "feature_constant: the product of the stated layers")
        if features is not None and "norm" in self.stated:
            product = features * self.stated["norm"]
            self.require_product(total, product, "lipschitz_constant: feature_constant times head.norm")
        constant = None if self.found is None else self.found.feature_constant()
        if self.found is None or self.found.head is None or constant is None:
            return
        self.require_bound(features, constant.value, "feature_constant")
        self.require_bound(total, constant.value * self.found.head.value, "lipschitz_constant")
        fields = self.found.fields
        half_diagonal = math.sqrt(fields["num_channels"]) * fields["image_size"] / 2.0
        smallest = UNIT_ROUNDOFF * constant.value * self.found.head.row_norm * half_diagonal
        error = self.stated.get("evaluation_error")
        if error is not None:
            self.require(
                error >= smallest, f"evaluation_error {error!r} is below {smallest!r}, one rounding of a logit"
            )
