# SPDX-License-Identifier: Apache-2.0
"""A new checkpoint whose linear layers and convolutions have certified spectral norms of at most C.

Spectral normalisation (one factor a layer) or spectral rescaling (one an output channel, arXiv 2402.00240). The norms
are measured again on what the new files hold, in their dtype: rounding may raise a norm, and then the layer is shrunk
a little more, until its certified upper bound is at most C. Tensors pass through memory one by one.
"""

import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from torch import Tensor
from transformers import PreTrainedModel

from ..models.certificate import CERTIFICATE_NAME
from .channel_factors import channel_factors, scale_channels
from .fold_batch_norm import fold_batch_norm
from .layers import Description, LayerInfo, describe
from .meta_model import MetaModel, build_meta_model
from .preserve_logits import Exponent, exponent_for, move_scales, powers_of_two, scale_exactly
from .rescale_card import write_card
from .rescale_report import REPORT_NAME, Interval, RescaledLayer, RescaleReport, RescaleSettings
from .rescale_targets import Target, find_targets
from .rewrite import WEIGHT_PATTERNS, CheckpointCopy, require_free
from .scale_flow import ScaleFlow, trace_scale_flow
from .scale_flow_names import named_scale_flow
from .source import Checkpoint


# called as progress(layers done, number of layers, name of the layer)
Progress = Callable[[int, int, str], None]
_ATTEMPTS = 20


def rescale_checkpoint(
    model: str | os.PathLike,
    out: str | os.PathLike,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    command: str | None = None,
    progress: Progress | None = None,
    **settings: Any,
) -> RescaleReport:
    """Write a copy of a checkpoint in which no selected layer has a certified spectral norm above C.

    Names, dtypes, shapes, shards and metadata stay; config, tokenizer and image processor are copied; a card and
    `rescale_report.json` are added. A `lipschitz_certificate.json` is left out, as it is for the old weights.

    Args:
        model: folder, safetensors file or Hub id, as in `Checkpoint.open`.
        out: folder to be made; it appears when it is complete, and nothing is ever overwritten.
        revision, token: of the Hub repository.
        command: command line to be stated in the card.
        progress: called as progress(done, total, name) before each layer and once at the end.
        settings: fields of `RescaleSettings`. Layers whose norm is at most C are left as they are unless `enlarge`.
            Biases are left too, but for `preserve_logits`.

    Returns:
        The report, norms before and after.

    Raises:
        FileExistsError: there is something at `out`.
        ValueError: settings out of range, nothing to rescale, weights that are not finite, a C too small for the
            dtype, or `preserve_logits` where scales cannot be moved; the text names the layer and the remedy.
        OSError: the disk is full or cannot be written to; nothing is left behind.
    """
    checked = RescaleSettings(**settings)
    require_free(Path(out).expanduser().absolute())
    checkpoint = Checkpoint.open(model, revision=revision, token=token)
    local = Path(model).expanduser().exists()
    commit = None if local else _fetch_other_files(str(model), checkpoint, token)
    description = describe(checkpoint, checked.image_size)
    try:
        meta, why = build_meta_model(checkpoint), ""
    except ValueError as error:
        meta, why = None, str(error)
    every_size = checked.image_size is None and not _states_image_size(meta)
    targets, not_rescaled = find_targets(checkpoint, description, checked.layers, every_size)
    # an assumed size serves to find the layers only
    notes = [note for note in description.notes if " assumed: " not in note]
    with CheckpointCopy(checkpoint, out) as copy:
        norms = {layer.weight: layer for layer in description.layers if layer.kind == "batch_norm"}
        work = _Rescaling(checkpoint, copy, checked, targets, norms)
        if checked.fold_bn or checked.preserve_logits:
            work.flow = _scale_flow(checkpoint, description, checked, meta or why, notes)
        rows = []
        for index, target in enumerate(targets):
            if progress is not None:
                progress(index, len(targets), target.layer.name)
            rows.append(work.rescale(target))
        if progress is not None:
            progress(len(targets), len(targets), "")
        logits_exponent = None
        if checked.preserve_logits and work.flow is not None:
            logits_exponent = move_scales(copy, work.flow, work.exponents, checkpoint.config or {})
        notes += _remarks(checkpoint, description, checked, rows)
        report = RescaleReport(
            source=Path(model).expanduser().resolve().name if local else str(model),
            commit=commit,
            settings=checked,
            layers=rows,
            not_rescaled=not_rescaled,
            logits_exponent=logits_exponent,
            scales_read_from=None if work.flow is None else work.flow.source,
            notes=notes,
            left_out=copy.left_out,
            files=copy.hashes(),
            command=command,
        )
        (copy.folder / REPORT_NAME).write_text(report.to_json(), encoding="utf-8")
        write_card(report, checkpoint.folder, copy.folder)
        copy.commit()
    return report


def _fetch_other_files(model: str, checkpoint: Checkpoint, token: str | bool | None) -> str:
    """Download tokenizer and image processor of the same commit; the snapshot's folder is named after it."""
    commit = checkpoint.folder.name
    snapshot_download(model, revision=commit, token=token, ignore_patterns=[*WEIGHT_PATTERNS, "*/*"])
    return commit


def _scale_flow(
    checkpoint: Checkpoint,
    description: Description,
    settings: RescaleSettings,
    meta: MetaModel | str,
    notes: list[str],
) -> ScaleFlow:
    """From the network itself, if it could be built (otherwise `meta` says why not) and runs without data, else from
    names."""
    if not settings.chain:
        try:
            if isinstance(meta, str):
                raise ValueError(meta)
            return trace_scale_flow(meta, description.layers, settings.image_size)
        except ValueError as error:
            notes.append(
                f"Which batch norm follows which layer was told from their names and is not proved, since {error}."
            )
    else:
        notes.append(f"The order of the layers is the user's statement: {', '.join(settings.chain)}.")
    return named_scale_flow(checkpoint, description.layers, settings.chain)


def _states_image_size(meta: MetaModel | None) -> bool:
    """Whether the config says which images the network, or a part of it, is for."""
    if meta is None:
        return False
    parts = [module for module in meta.model.modules() if isinstance(module, PreTrainedModel)]
    return any(getattr(part.config, "image_size", None) is not None for part in parts)


def _remarks(
    checkpoint: Checkpoint, description: Description, settings: RescaleSettings, rows: list[RescaledLayer]
) -> list[str]:
    notes = []
    if (checkpoint.folder / CERTIFICATE_NAME).exists():
        notes.append(f"{CERTIFICATE_NAME} was not copied: it is for the original weights.")
    normed = any(layer.kind == "batch_norm" for layer in description.layers)
    scaled = any(row.factors != (1.0, 1.0) for row in rows)
    if scaled and normed and not settings.preserve_logits and not settings.fold_bn:
        notes.append(
            "The statistics of the batch norms are those of the original network: estimate them anew on training "
            "data, or rescale with fold_bn or preserve_logits."
        )
    return notes


@dataclass
class _Rescaling:
    """One run over the layers."""

    checkpoint: Checkpoint
    copy: CheckpointCopy
    settings: RescaleSettings
    targets: list[Target]
    batch_norms: dict[str, LayerInfo]
    flow: ScaleFlow | None = None

    def __post_init__(self) -> None:
        self.exponents: dict[str, Exponent] = {}

    def rescale(self, target: Target) -> RescaledLayer:
        """Fold, rescale, write and measure one layer; all norms are of what the copy's file holds."""
        weight, before = self.measure(target)
        folded = None
        if self.settings.fold_bn and self.flow is not None and target.tensor in self.flow.followers:
            self.fold(target.layer, self.batch_norms[self.flow.followers[target.tensor]])
            weight, folded = self.measure(target)
        start = after = folded or before
        factors = torch.ones(1, dtype=torch.float64)
        if math.isinf(start.upper):
            raise ValueError(f"The norm of {target.layer.name} overflows float64: divide its weights first.")
        if start.upper > self.settings.to or (self.settings.enlarge and start.upper > 0):
            if self.settings.preserve_logits:
                after, factors = self.divide_by_powers_of_two(target, weight, start)
            else:
                after, factors = self.scale(target, weight, start)
        return RescaledLayer(
            name=target.layer.name,
            tensor=target.tensor,
            kind=target.layer.kind,
            shape=self.checkpoint.shape(target.tensor),
            dtype=str(weight.dtype).removeprefix("torch."),
            before=before,
            folded=folded,
            after=after,
            factors=(factors.min().item(), factors.max().item()),
            input_size=target.input_size(target.layer),
            unknown=target.layer.unknown,
        )

    def measure(self, target: Target) -> tuple[Tensor, Interval]:
        """The weight as it lies in the copy's file, and its certified norm."""
        weight = self.copy.read(target.tensor)
        return weight, target.norm(weight, self.settings.rtol)

    def fold(self, layer: LayerInfo, norm: LayerInfo) -> None:
        folded = fold_batch_norm(self.checkpoint, layer, norm, self.settings.bn_eps)
        for name, value in {layer.weight: folded.weight, **folded.others}.items():
            rounded = value.to(self.checkpoint.dtype(name))
            if not torch.isfinite(rounded).all():
                raise ValueError(f"{name} overflows {rounded.dtype} once {norm.name} is folded into {layer.name}.")
            self.copy.write(name, rounded)

    def channel_factors(self, target: Target, weight: Tensor) -> Tensor:
        """Factors, one a channel, that bring a layer to a norm of at most C but for rounding."""
        factors = self.settings.to / channel_factors(weight, target.layer, self.settings.num_iterations)
        return factors if self.settings.enlarge else factors.clamp(max=1.0)

    def scale(self, target: Target, weight: Tensor, start: Interval) -> tuple[Interval, Tensor]:
        """Shrink until the bound of what is on disk is at most C."""
        limit = self.settings.to
        if self.settings.mode == "sn":
            factors = torch.tensor(limit / start.upper, dtype=torch.float64)
        else:
            factors = self.channel_factors(target, weight)
        # room for the rounding to come: a fraction of that of one value, as roundings cancel; more where that fails
        margin = torch.finfo(weight.dtype).eps / 16
        factors = factors * (1.0 - margin)
        for _ in range(_ATTEMPTS):
            scaled = scale_channels(weight.double(), target.layer, factors).to(weight.dtype)
            if not torch.isfinite(scaled).all() or not scaled.any():
                raise ValueError(
                    f"{target.tensor} cannot have a norm of {limit:g} in {weight.dtype}: its values would leave the "
                    "range of the type. Choose another `to`, or convert the checkpoint to float32 first."
                )
            self.copy.write(target.tensor, scaled)
            _, after = self.measure(target)
            if after.upper <= limit:
                return after, factors
            factors = factors * (limit / after.upper * (1.0 - margin))
            margin = min(4 * margin, 0.5)
        raise ValueError(
            f"{target.tensor} could not be brought to a norm of {limit:g} in {weight.dtype}: choose another `to`."
        )

    def divide_by_powers_of_two(self, target: Target, weight: Tensor, start: Interval) -> tuple[Interval, Tensor]:
        """Divide by a power of two, or each channel by its own where a batch norm takes them up."""
        assert self.flow is not None
        exponent: Exponent
        if self.settings.mode == "sr" and target.tensor in self.flow.followers:
            exponent = exponent_for(1.0 / self.channel_factors(target, weight), 1.0)
        else:
            exponent = exponent_for(torch.tensor(start.upper, dtype=torch.float64), self.settings.to)
        reason = self.flow.reason(target.tensor)
        if not exponent.any() or (reason and start.upper <= self.settings.to):
            return start, torch.ones(1, dtype=torch.float64)
        if reason:
            raise ValueError(self.immovable(target, start, reason))
        for _ in range(_ATTEMPTS):
            factors = powers_of_two(-exponent)
            exact = scale_channels(weight.double(), target.layer, factors)
            self.copy.write(target.tensor, scale_exactly(target.tensor, exact, weight.dtype))
            _, after = self.measure(target)
            if after.upper <= self.settings.to:
                self.exponents[target.tensor] = exponent
                return after, factors
            exponent = exponent + 1
        raise ValueError(f"{target.tensor} could not be brought to a norm of {self.settings.to:g}.")

    def immovable(self, target: Target, start: Interval, reason: str) -> str:
        """Why the scale of a layer has nowhere to go, and what to do."""
        assert self.flow is not None
        others = sum(bool(self.flow.reason(other.tensor)) for other in self.targets) - 1
        more = f" {others} more of the selected layers cannot be divided either." if others else ""
        return (
            f"`preserve_logits` cannot divide {target.layer.name}, whose norm is up to {start.upper:.4g}: {reason}. "
            "A scale can move on through ReLU, pooling and linear layers up to a batch norm or to the logits, because "
            f"f(s x) = s f(x) there for s > 0, and through nothing else.{more} Leave such layers out with `layers`, "
            "allow a larger `to`, rescale without `preserve_logits`, or, where the network's code is not known here, "
            "state the order of its layers with `chain`."
        )
