# SPDX-License-Identifier: Apache-2.0
"""What a rescaling is asked to do, and what it did."""

import dataclasses
import json
import math
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any

from .. import __version__


REPORT_NAME = "rescale_report.json"
FORMAT = "hf_lip/rescale_report"
MODES = ("sn", "sr")


@dataclass(frozen=True)
class RescaleSettings:
    """Arguments of `rescale_checkpoint`, checked.

    Attributes:
        mode: "sn", one factor a layer, or "sr", one an output channel.
        to: C, the largest norm allowed.
        layers: patterns of layer or tensor names; empty for all linear layers and convolutions.
        fold_bn: fold batch norms into the layers before them first.
        preserve_logits: move scales on instead of dropping them.
        enlarge: also scale up, to C.
        num_iterations: of the spectral rescaling factors.
        chain: order of the layers, where the network's code is not at hand.
        bn_eps: eps of batch norms, likewise.
        image_size: of the model's input; None for the config's, or for bounds that hold for all sizes if it has none.
        rtol: relative width asked of the norms; norms end about that much below C.
    """

    mode: str = "sn"
    to: float = 1.0
    layers: tuple[str, ...] = ()
    fold_bn: bool = False
    preserve_logits: bool = False
    enlarge: bool = False
    num_iterations: int = 1
    chain: tuple[str, ...] = ()
    bn_eps: float | None = None
    image_size: int | tuple[int, int] | None = None
    rtol: float = 1e-3

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ValueError(f"`mode` must be 'sn' (one factor a layer) or 'sr' (one a channel), got {self.mode!r}.")
        if not (math.isfinite(self.to) and self.to > 0):
            raise ValueError(f"`to` must be a positive finite number, the largest norm allowed, got {self.to!r}.")
        if self.num_iterations < 1:
            raise ValueError(f"`num_iterations` must be at least 1, got {self.num_iterations}.")
        if self.bn_eps is not None and not (math.isfinite(self.bn_eps) and self.bn_eps >= 0):
            raise ValueError(f"`bn_eps` must be finite and not negative, got {self.bn_eps!r}.")
        if not 0 <= self.rtol < 1:
            raise ValueError(f"`rtol` must be in [0, 1), got {self.rtol!r}.")
        if self.chain and not (self.preserve_logits or self.fold_bn):
            raise ValueError("`chain` says where scales may move: it needs `preserve_logits`.")


@dataclass(frozen=True)
class Interval:
    """Proved ends of a spectral norm: lower <= norm <= upper."""

    lower: float
    upper: float


@dataclass(frozen=True)
class RescaledLayer:
    """One row of the report.

    Attributes:
        name: path of the layer.
        tensor: name of its weight.
        kind: as in `LayerInfo`.
        shape, dtype: of the tensor, before and after.
        before: certified norm of the original's stored weights.
        folded: the same with its batch norm folded in, None where none was.
        after: certified norm of the weights on disk in the new checkpoint.
        factors: smallest and largest factor of its channels, from `folded` (or `before`) to `after`.
        input_size: spatial size the norms belong to; None for all sizes.
        unknown: what of the layer could not be known; the norms are bounds whatever it is.
    """

    name: str
    tensor: str
    kind: str
    shape: tuple[int, ...]
    dtype: str
    before: Interval
    folded: Interval | None
    after: Interval
    factors: tuple[float, float]
    input_size: tuple[int, ...] | None
    unknown: tuple[str, ...] = ()


@dataclass(frozen=True)
class RescaleReport:
    """Result of `rescale_checkpoint`: for every layer listed, `after.upper` <= `settings.to`.

    Attributes:
        source: id of the Hub repository, or name of the folder.
        commit: of the Hub repository.
        settings: what was asked for.
        layers: in the order of the checkpoint's depth.
        not_rescaled: other weights -> why they were left as they are.
        logits_exponent: with `preserve_logits`, the logits are the original's divided by 2 ** logits_exponent.
        scales_read_from: "model" or "names": where it was read which batch norms and biases take scales up.
        notes: what a user should know.
        left_out: files of the original that were not copied.
        files: sha256 of the safetensors files.
        command: the command line, if there was one.
    """

    source: str
    commit: str | None
    settings: RescaleSettings
    layers: list[RescaledLayer]
    not_rescaled: dict[str, str]
    logits_exponent: int | None
    scales_read_from: str | None
    notes: list[str]
    left_out: list[str]
    files: dict[str, str] = field(default_factory=dict)
    command: str | None = None

    @property
    def largest_before(self) -> float:
        return max(layer.before.upper for layer in self.layers)

    @property
    def largest_after(self) -> float:
        return max(layer.after.upper for layer in self.layers)

    @property
    def num_changed(self) -> int:
        return sum(layer.folded is not None or layer.factors != (1.0, 1.0) for layer in self.layers)

    def to_dict(self) -> dict[str, Any]:
        content = dataclasses.asdict(self)
        packages = {package: version(package) for package in ("torch", "transformers", "safetensors")}
        totals = {"largest_norm_before": self.largest_before, "largest_norm_after": self.largest_after}
        return {"format": FORMAT, **content, **totals, "versions": {"hf_lip": __version__, **packages}}

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=2) + "\n"
