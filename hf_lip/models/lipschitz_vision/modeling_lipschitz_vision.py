# SPDX-License-Identifier: Apache-2.0
"""1-Lipschitz image networks: normalisation, stages of certified blocks, dense neck, linear head.

Every part is a node with a certified bound; the network's constant is the product over the nodes, in the order in
which `forward` runs them. In training the fast rescalings act; in evaluation the stored ones, which `certify` checks
in float64.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers.backbone_utils import BackboneMixin, filter_output_hidden_states
from transformers.modeling_outputs import BackboneOutput, BaseModelOutputWithPoolingAndNoAttention
from transformers.processing_utils import Unpack
from transformers.utils import ModelOutput, TransformersKwargs
from transformers.utils.generic import can_return_tuple
from transformers.utils.output_capturing import capture_outputs

from ...layers.base import LipschitzModule, RescaledModule, product_up
from ...layers.heads import HEADS, ClassifierHead, certified_radius
from ...layers.residual import ResidualLayer
from ...layers.shape import InputNormalization
from ..certificate import LipschitzCertificate, weights_sha256
from ..certified_model import CertifiedPreTrainedModel, package_versions
from .blocks_lipschitz_vision import LipschitzVisionNeck, LipschitzVisionStage, Nodes, build_stages
from .configuration_lipschitz_vision import LipschitzVisionConfig


@dataclass
class LipschitzImageClassifierOutput(ModelOutput):
    """
    Output of an image classifier with a certificate.

    Args:
        loss (`torch.FloatTensor` of shape `(1,)`, *optional*): when `labels` are given.
        logits (`torch.FloatTensor` of shape `(batch_size, num_labels)`).
        certified_radius (`torch.DoubleTensor` of shape `(batch_size,)`, *optional*): radius, l2 on pixels in [0, 1],
            inside which the label of `logits` cannot change. Absent in training mode.
        lipschitz_constant (`torch.DoubleTensor` of shape `(batch_size,)`, *optional*): certified bound of pixels ->
            logits, l2 to l2; the same for every image, and one each since pipelines take batches apart.
        hidden_states (`tuple(torch.FloatTensor)`, *optional*): stem and stages.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    certified_radius: Tensor | None = None
    lipschitz_constant: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None


class LipschitzVisionPreTrainedModel(CertifiedPreTrainedModel):
    config: LipschitzVisionConfig
    base_model_prefix = "lipschitz_vision"
    main_input_name = "pixel_values"
    input_modalities = ["image"]  # noqa: RUF012
    supports_gradient_checkpointing = True
    _no_split_modules = ["LipschitzVisionBlock"]  # noqa: RUF012
    _can_record_outputs = {"hidden_states": LipschitzVisionStage}  # noqa: RUF012

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, ResidualLayer):
            module.initial_bias = self.config.initial_bias
        if isinstance(module, LipschitzModule) and hasattr(module, "reset_parameters"):
            module.reset_parameters()  # type: ignore[operator]

    def checkpointable(self, hidden_states: Tensor) -> Tensor:
        """What gradient checkpointing needs where no parameter comes before the first block: reentrant checkpoints
        give its weights no gradient unless its input takes one."""
        wanted = self.training and torch.is_grad_enabled() and not hidden_states.requires_grad
        if wanted and any(getattr(module, "gradient_checkpointing", False) for module in self.modules()):
            return hidden_states.detach().requires_grad_()
        return hidden_states

    def check_pixel_values(self, pixel_values: Tensor) -> None:
        """Raise unless `pixel_values` is a non-empty floating-point batch of the model's image shape."""
        expected = (self.config.num_channels, self.config.image_size, self.config.image_size)
        if not isinstance(pixel_values, Tensor) or not pixel_values.is_floating_point():
            kind = pixel_values.dtype if isinstance(pixel_values, Tensor) else type(pixel_values).__name__
            raise TypeError(
                f"`pixel_values` must be a floating-point tensor of pixels in [0, 1], got {kind}: divide 8-bit pixels "
                "by "
                "255, or use the model's image processor."
            )
        if pixel_values.ndim != 4 or tuple(pixel_values.shape[1:]) != expected:
            raise ValueError(
                f"`pixel_values` must have shape (batch, {', '.join(map(str, expected))}), got "
                f"{tuple(pixel_values.shape)}. The certificate holds for this size: use the model's image processor."
            )
        if pixel_values.shape[0] == 0:
            raise ValueError("`pixel_values` is an empty batch: pass at least one image.")


class LipschitzVisionModel(LipschitzVisionPreTrainedModel):
    """Pixels in [0, 1] (B, C, H, W) -> `last_hidden_state` (B, C', H', W') and `pooler_output` (B, feature_size)."""

    def __init__(self, config: LipschitzVisionConfig):
        super().__init__(config)
        self.stem = InputNormalization(config.image_mean, config.image_std)
        self.stages = build_stages(config)
        self.neck = LipschitzVisionNeck(config)
        self.post_init()

    def nodes(self) -> Nodes:
        """Every part with its name, in the order of the forward pass."""
        yield "stem", self.stem
        for index, stage in enumerate(self.stages):
            for name, node in stage.nodes():  # type: ignore[operator]
                yield f"stages.{index}.{name}", node
        for name, node in self.neck.nodes():
            yield f"neck.{name}", node

    @can_return_tuple
    @capture_outputs(tie_last_hidden_states=False)
    def forward(
        self, pixel_values: Tensor, **kwargs: Unpack[TransformersKwargs]
    ) -> BaseModelOutputWithPoolingAndNoAttention:
        """Runs in the dtype of `pixel_values`; weights are cast to it exactly or upwards."""
        self.check_pixel_values(pixel_values)
        hidden_states = self.checkpointable(self.stem(pixel_values))
        for stage in self.stages:
            hidden_states = stage(hidden_states)
        return BaseModelOutputWithPoolingAndNoAttention(
            last_hidden_state=hidden_states, pooler_output=self.neck(hidden_states)
        )


class LipschitzVisionBackbone(BackboneMixin, LipschitzVisionPreTrainedModel):
    """Feature maps of `stem`, `stage1`, ..., each 1 / min(std)-Lipschitz in the pixels as far as its blocks are."""

    has_attentions = False
    _keys_to_ignore_on_load_unexpected = [r"neck\.", r"^classifier\."]  # noqa: RUF012

    def __init__(self, config: LipschitzVisionConfig):
        super().__init__(config)
        self.num_features = [config.num_channels, *config.hidden_sizes]
        self.stem = InputNormalization(config.image_mean, config.image_std)
        self.stages = build_stages(config)
        self.post_init()

    @can_return_tuple
    @filter_output_hidden_states
    @capture_outputs(tie_last_hidden_states=False)
    def forward(self, pixel_values: Tensor, **kwargs: Unpack[TransformersKwargs]) -> BackboneOutput:
        self.check_pixel_values(pixel_values)
        hidden_states = self.checkpointable(self.stem(pixel_values))
        maps = [hidden_states]
        for stage in self.stages:
            hidden_states = stage(hidden_states)
            maps.append(hidden_states)
        selected = tuple(feature for name, feature in zip(self.stage_names, maps) if name in self.out_features)
        return BackboneOutput(feature_maps=selected)  # type: ignore[arg-type]


class LipschitzVisionForImageClassification(LipschitzVisionPreTrainedModel):
    """Image classifier that answers with a certified radius.

    In evaluation mode `forward` runs in float64 and returns, beside the logits, the l2 radius in pixel units inside
    which the label cannot change, from the per-pair constants of the head (lipschitz-layers section 5.1). With
    `output_certified_radius=False`, and in training mode, it runs in the dtype of the weights and returns logits only.
    """

    accepts_loss_kwargs = False

    def __init__(self, config: LipschitzVisionConfig):
        super().__init__(config)
        if config.num_labels < 2:
            raise ValueError(
                f"`num_labels` must be at least 2 for a classifier with a margin, got {config.num_labels}."
            )
        self.num_labels = config.num_labels
        self.lipschitz_vision = LipschitzVisionModel(config)
        self.classifier: ClassifierHead = HEADS[config.head_type](config.feature_size, config.num_labels)
        # what the modules were built from: the config can be written to later
        self._architecture = config.architecture()
        self._certified: LipschitzCertificate | None = None
        self._stated_in: str | None = None
        self._certified_state: tuple = ()
        self._pair_distances: Tensor | None = None
        self.post_init()
        self._structure = self.structure()

    def nodes(self) -> Nodes:
        """Every part in front of the head, with its name in the checkpoint."""
        for name, node in self.lipschitz_vision.nodes():
            yield f"lipschitz_vision.{name}", node

    @property
    def certificate(self) -> LipschitzCertificate | None:
        """The certificate, if there is one and no tensor or module was replaced, cast or written to since."""
        if self._certified is None or self.unfit_tensor() is not None:
            return None
        return self._certified if self._certified_state == (self.structure(), *self.tensor_state()) else None

    def attach_certificate(self, certificate: LipschitzCertificate, source: str | None = None) -> None:
        """Keep a certificate for the weights as they are now. One read from `source` is only stated: it is proved
        afresh, and refused if false, before the first radius is issued."""
        self._certified = certificate
        self._stated_in = source
        self._certified_state = (self.structure(), *self.tensor_state())
        self._pair_distances = self.classifier.pair_distances()

    def certify(self, progress: bool = False) -> LipschitzCertificate:
        """Prove the constants of the evaluation-mode function in float64 and keep the result as `certificate`.

        Args:
            progress: show a progress bar over the layers.

        Raises:
            ValueError: if a weight is not finite, offloaded, sharded or quantised, or if the config or a module was
                changed after the model was built.
        """
        certificate = self.compute_certificate(progress)
        self.attach_certificate(certificate)
        return certificate

    @torch.no_grad()
    def compute_certificate(self, progress: bool = False) -> LipschitzCertificate:
        """As `certify`, without keeping the result."""
        self.require_plain_tensors()
        self.require_structure(self._structure)
        if self.config.architecture() != self._architecture:
            raise ValueError("The config was changed after the model was built from it: build a new model from it.")
        self.freeze()
        config = self.config
        pixels = config.image_size**2
        norm, error, constant = 1.0, 0.0, 1.0
        layers = []
        for name, node in self.progress_over(list(self.nodes()), progress):
            bound = node.lipschitz_bound()
            if isinstance(node, InputNormalization):
                norm, error = node.input_bounds(pixels)
            else:
                norm, error = node.propagate(norm, error, bound)
            constant = product_up(constant, bound)
            layers.append({"name": name, "kind": type(node).__name__, "bound": bound, "method": node.proof})
        head = self.classifier
        head_norm = head.lipschitz_bound()
        layers.append({"name": "classifier", "kind": type(head).__name__, "bound": head_norm, "method": head.proof})
        return LipschitzCertificate(
            model_type=config.model_type,
            lipschitz_constant=product_up(constant, head_norm),
            feature_constant=constant,
            head={
                "type": config.head_type,
                "rule": "per_pair_all_classes",
                "norm": head_norm,
                "max_pair_distance": float(head.pair_distances().max()),
            },
            evaluation_error=head.logit_error(norm, error),
            input_shape=[config.num_channels, config.image_size, config.image_size],
            dtype=str(self.dtype).removeprefix("torch."),
            weights_sha256=weights_sha256(self.state_dict()),
            architecture=config.architecture(),
            layers=layers,
            versions=package_versions(),
        )

    @torch.compiler.disable
    def proved_certificate(self, pixel_values: Tensor) -> LipschitzCertificate:
        """The certificate of the weights as they are now, for images that may have a radius. Never part of a compiled
        graph, which would go on with the constants of the weights it was traced with."""
        self.check_pixel_range(pixel_values)
        for name, module in self.named_modules():
            if isinstance(module, RescaledModule) and module.training:
                raise ValueError(
                    f"{name} is in training mode, where it is not certified: call `model.eval()`, or pass "
                    "`output_certified_radius=False`."
                )
        return self.prove()

    def prove(self) -> LipschitzCertificate:
        """The certificate of the weights as they are now, proved in this process.

        Raises:
            ValueError: if the certificate read from the checkpoint states less than what is proved.
        """
        certificate, source = self.certificate, self._stated_in
        if certificate is None:
            return self.certify()
        if source is not None:
            proved = self.compute_certificate()
            certificate.require_covers(proved, source)
            self.attach_certificate(proved)
            return proved
        return certificate

    def check_pixel_range(self, pixel_values: Tensor) -> None:
        """Raise on NaN, infinite or out-of-range pixels: their radius would be in another unit."""
        if not torch.isfinite(pixel_values).all():
            raise ValueError("`pixel_values` holds NaN or infinite values.")
        low, high = pixel_values.min().item(), pixel_values.max().item()
        if low < 0.0 or high > 1.0:
            raise ValueError(
                f"`pixel_values` must lie in [0, 1], got [{low:.4g}, {high:.4g}]: radii are in that unit. Divide "
                "8-bit pixels by 255; for the logits of other inputs (noise, attacks) pass "
                "`output_certified_radius=False`."
            )

    def certified_outputs(
        self, pixel_values: Tensor, certificate: LipschitzCertificate, **kwargs: Unpack[TransformersKwargs]
    ) -> tuple[BaseModelOutputWithPoolingAndNoAttention, Tensor, Tensor]:
        """Features, logits and radii, evaluated in float64. The certificate must be that of the weights as is."""
        with torch.autocast(pixel_values.device.type, enabled=False):
            outputs = self.lipschitz_vision(pixel_values.double(), **kwargs)
            logits = self.classifier(outputs.pooler_output)
        out_dtype = torch.promote_types(self.dtype, torch.float32)
        _, radius = certified_radius(
            logits,
            self._pair_distances,
            certificate.feature_constant,
            certificate.evaluation_error,
            output_roundoff=torch.finfo(out_dtype).eps / 2,
            head_norm=certificate.head["norm"],
        )
        return outputs, logits.to(out_dtype), radius

    @can_return_tuple
    def forward(
        self,
        pixel_values: Tensor,
        labels: Tensor | None = None,
        output_certified_radius: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> LipschitzImageClassifierOutput:
        """
        Args:
            pixel_values: (B, C, H, W), pixels in [0, 1].
            labels: (B,) class indices; adds the cross-entropy loss.
            output_certified_radius: default True in evaluation mode (float64), not available in training mode.
        """
        certified = not self.training if output_certified_radius is None else output_certified_radius
        if certified and self.training:
            raise ValueError("`output_certified_radius` needs evaluation mode: call `model.eval()` first.")
        if certified and torch.compiler.is_exporting():
            raise ValueError(
                "A radius needs its certificate checked at every call, which an exported graph does not do: use "
                "`export_certified` of hf_lip.models.lipschitz_vision.export_lipschitz_vision, or pass "
                "`output_certified_radius=False`."
            )
        self.check_pixel_values(pixel_values)
        if certified:
            certificate = self.proved_certificate(pixel_values)
            outputs, logits, radius = self.certified_outputs(pixel_values, certificate, **kwargs)
            constant = torch.full_like(radius, certificate.lipschitz_constant)
        else:
            outputs = self.lipschitz_vision(pixel_values.to(self.dtype), **kwargs)
            logits = self.classifier(outputs.pooler_output)
            radius = constant = None
        loss = None
        if labels is not None:
            if not torch.compiler.is_compiling() and (labels.min() < 0 or labels.max() >= self.num_labels):
                raise ValueError(
                    f"`labels` must lie in [0, {self.num_labels - 1}], got [{labels.min().item()}, "
                    f"{labels.max().item()}]: "
                    "set `num_labels` of the config to the number of classes in the data."
                )
            loss = self.loss_function(labels=labels, pooled_logits=logits, config=self.config)
        return LipschitzImageClassifierOutput(
            loss=loss,
            logits=logits,
            certified_radius=radius,
            lipschitz_constant=constant,
            hidden_states=outputs.hidden_states,
        )


__all__ = [
    "LipschitzImageClassifierOutput",
    "LipschitzVisionBackbone",
    "LipschitzVisionForImageClassification",
    "LipschitzVisionModel",
    "LipschitzVisionPreTrainedModel",
]
