# SPDX-License-Identifier: Apache-2.0
"""Independent check of a saved `lipschitz_vision` checkpoint: does its certificate hold for the bytes on disk?

Shares no code with the layers or the model and uses neither torch nor transformers: the three files are read, every
tensor is cast to float64, each node of the declared graph gets a bound from its own rule (`verify_rules`), and what
the certificate states is compared with it (`verify_certificate`). Source: lipschitz-layers section 5.5.

What is checked, and how strictly:

- each stated layer bound, head norm, pair distance and total is at least the recomputed float64 value minus 1e-9
  relative. That covers rounding and nothing else: eigenvalues of these sizes are good to about 1e-13 in float64.
  The constants in the report are inflated upper bounds (`verify_rules.operator_norm`), so they hold as they stand.
- `feature_constant` is the product of the stated layers and `lipschitz_constant` that times the head norm: not below
  by more than 1e-12 relative (rounding of the products), not above by more than 1e-9.
- a change of the weights that leaves every statement true, such as a kernel scaled by 1.01 inside an SLL layer whose
  lambda stays under 1, is left to the hash, unless the layer's entry states `lambda_max`; then that is compared too.
- `evaluation_error` is not proved here. It has to be finite and at least 2^-53 F max_i ||w_i|| sqrt(C H W) / 2: one
  rounding of the change of a logit from the middle of the pixel box to its corner that the constants themselves allow.
  Any error bound that is derived from the constants of the network is above that.

`preprocessor_config.json` is not read: radii are for the tensor `pixel_values` that the model is given.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from .verify_certificate import CERTIFICATE_FILE, UNIT, Comparison
from .verify_files import CONFIG_FILE, Reasons, read_config, read_json, read_weights, weights_hash
from .verify_rules import PRODUCT_ROUNDING, Recomputed, recompute


@dataclass(frozen=True)
class VerifiedNode:
    """One row of the report. `bound` is the recomputed upper bound, `stated_bound` what the certificate says."""

    name: str
    kind: str
    bound: float
    stated_bound: float | None
    method: str


@dataclass(frozen=True)
class VerificationReport:
    """Result of `verify_checkpoint`. Constants are None where a refusal came before they could be computed.

    `lipschitz_constant` (pixels to logits), `feature_constant`, `head_norm` and `max_pair_distance` are recomputed
    upper bounds in l2; the `stated_*` are the certificate's. `weights_sha256` is that of the file.
    """

    folder: str
    reasons: list[str]
    nodes: list[VerifiedNode]
    lipschitz_constant: float | None = None
    feature_constant: float | None = None
    head_norm: float | None = None
    max_pair_distance: float | None = None
    stated_lipschitz_constant: float | None = None
    stated_feature_constant: float | None = None
    stated_head_norm: float | None = None
    stated_max_pair_distance: float | None = None
    evaluation_error: float | None = None
    unit: str = UNIT
    head_rule: str | None = None
    weights_sha256: str | None = None

    @property
    def ok(self) -> bool:
        """Whether the certificate holds for the bytes on disk."""
        return not self.reasons

    def table(self) -> list[tuple[str, str, str, str, str]]:
        """Rows (node, kind, bound, stated bound, method) of strings; the first row is the header."""
        rows = [("node", "kind", "bound", "stated", "method")]
        for node in self.nodes:
            rows.append((node.name, node.kind, _text(node.bound), _text(node.stated_bound), node.method))
        return rows

    def summary(self) -> list[str]:
        """One line per constant, then the verdict and its reasons."""
        pairs = {
            "feature constant": (self.feature_constant, self.stated_feature_constant),
            "head norm": (self.head_norm, self.stated_head_norm),
            "largest pair distance": (self.max_pair_distance, self.stated_max_pair_distance),
            "lipschitz constant": (self.lipschitz_constant, self.stated_lipschitz_constant),
        }
        lines = [
            f"{name}: {_text(value)} recomputed, {_text(stated)} stated" for name, (value, stated) in pairs.items()
        ]
        lines.append(
            f"unit: {self.unit}; head rule: {self.head_rule or '-'}; evaluation error: {_text(self.evaluation_error)}"
        )
        lines.append(f"weights sha256: {self.weights_sha256 or '-'}")
        if self.ok:
            return [
                *lines,
                f"VERIFIED: the constants hold for the bytes in {self.folder} (the evaluation error is checked for "
                "plausibility here and proved by the model before its first radius)",
            ]
        return [*lines, f"NOT VERIFIED: {self.folder}", *(f"  - {reason}" for reason in self.reasons)]

    def format(self) -> str:
        """Plain text: the table of nodes, the constants, the verdict and its reasons."""
        rows = self.table()
        widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]
        return "\n".join([*lines, "", *self.summary()])


def _text(value: float | None) -> str:
    return "-" if value is None else f"{value:.9g}"


def verify_checkpoint(
    folder: str | Path, *, progress: Callable[[int, int, str], None] | None = None
) -> VerificationReport:
    """Recompute the constants of a checkpoint from its bytes and compare them with its certificate.

    Args:
        folder: holds config.json, model.safetensors (or its shards with an index) and lipschitz_certificate.json.
        progress: called as progress(done, total, name) before each node and once at the end.

    Returns:
        A report whose `ok` is true only if every check passed; otherwise `reasons` says what did not.

    Raises:
        FileNotFoundError: if `folder` is not a folder.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"`folder` {str(folder)!r} is not a folder: give the one `save_pretrained` wrote.")
    reasons = Reasons()
    config = reasons.attempt(read_json, folder / CONFIG_FILE, "save the model with `save_pretrained`")
    certificate = reasons.attempt(
        read_json, folder / CERTIFICATE_FILE, "call `model.certify()`, then save the model again"
    )
    tensors = reasons.attempt(read_weights, folder)
    sha256 = None if tensors is None else weights_hash(tensors)
    fields = None if config is None else reasons.attempt(read_config, config)
    found = None
    if fields is not None and tensors is not None:
        found = recompute(fields, tensors, reasons, progress)
    comparison = Comparison(certificate or {}, found, reasons)
    if certificate is not None:
        comparison.compare_entries(sha256)
        if fields is not None:
            comparison.compare_config(config, fields)
        comparison.compare_dtype(tensors or {})
        comparison.compare_layers()
        comparison.compare_head(fields)
        comparison.compare_totals()
    return _report(folder, reasons, found, comparison, sha256)


def _report(
    folder: Path, reasons: Reasons, found: Recomputed | None, comparison: Comparison, sha256: str | None
) -> VerificationReport:
    nodes = []
    for node in [] if found is None else found.nodes:
        if found is not None and (bound := found.bounds.get(node.name)) is not None:
            stated = comparison.stated_layers.get(node.name)
            nodes.append(VerifiedNode(node.name, node.kind, bound.upper, stated, bound.method))
    head = None if found is None else found.head
    feature = None if found is None else found.feature_constant()
    total = None
    if feature is not None and head is not None:
        # a factor of exactly 1 needs no room for rounding
        room = 1.0 if 1.0 in (feature.upper, head.upper) else 1.0 + PRODUCT_ROUNDING
        total = feature.upper * head.upper * room
    return VerificationReport(
        folder=str(folder),
        reasons=list(reasons),
        nodes=nodes,
        lipschitz_constant=total,
        feature_constant=None if feature is None else feature.upper,
        head_norm=None if head is None else head.upper,
        max_pair_distance=None if head is None else head.pair_distance.upper,
        stated_lipschitz_constant=comparison.stated.get("lipschitz_constant"),
        stated_feature_constant=comparison.stated.get("feature_constant"),
        stated_head_norm=comparison.stated.get("norm"),
        stated_max_pair_distance=comparison.stated.get("max_pair_distance"),
        evaluation_error=comparison.stated.get("evaluation_error"),
        head_rule=comparison.head_rule,
        weights_sha256=sha256,
    )
