# SPDX-License-Identifier: Apache-2.0
"""hf_lip: transformers models whose behaviour can be proved.

Importing the package registers its models with the Auto classes and the task "certify" with `transformers.pipeline`.
"""

import importlib
from typing import Any


__version__ = "0.1.0"

# public name -> module that defines it
_PUBLIC = {
    "CertifyPipeline": "pipelines.certify",
    "ChacalConfig": "models.chacal.configuration_chacal",
    "ChacalModel": "models.chacal.modeling_chacal",
    "ChacalForCausalLM": "models.chacal.modeling_chacal",
    "ChacalForSequenceClassification": "models.chacal.modeling_chacal",
    "ChacalForTokenClassification": "models.chacal.modeling_chacal",
    "ChacalGPT2Config": "models.chacal.converted",
    "ChacalGPT2LMHeadModel": "models.chacal.converted",
    "ChacalLlamaConfig": "models.chacal.converted",
    "ChacalLlamaForCausalLM": "models.chacal.converted",
    "ChacalQwen2Config": "models.chacal.converted",
    "ChacalQwen2ForCausalLM": "models.chacal.converted",
    "GammaSchedule": "models.chacal.gamma_chacal",
    "chained_attention": "ops.chain",
    "effective_weights": "ops.chain",
    "convert_attention": "models.chacal.convert",
    "CifarResNetConfig": "models.cifar_resnet.configuration_cifar_resnet",
    "CifarResNetForImageClassification": "models.cifar_resnet.modeling_cifar_resnet",
    "CifarResNetModel": "models.cifar_resnet.modeling_cifar_resnet",
    "LipschitzCertificate": "models.certificate",
    "LipschitzRegularizer": "spectral.regularizer",
    "LipschitzVisionBackbone": "models.lipschitz_vision.modeling_lipschitz_vision",
    "LipschitzVisionConfig": "models.lipschitz_vision.configuration_lipschitz_vision",
    "LipschitzVisionForImageClassification": "models.lipschitz_vision.modeling_lipschitz_vision",
    "LipschitzVisionImageProcessor": "models.lipschitz_vision.image_processing_pil_lipschitz_vision",
    "LipschitzVisionImageProcessorPil": "models.lipschitz_vision.image_processing_pil_lipschitz_vision",
    "LipschitzVisionModel": "models.lipschitz_vision.modeling_lipschitz_vision",
    "Provenance": "models.chacal.provenance",
    "provenance": "models.chacal.provenance",
    "certified_accuracy": "metrics",
    "compute_certification_metrics": "metrics",
    "compute_tracking_metrics": "tracking_metrics",
    "metric_path": "metrics",
    "average_certified_radius": "metrics",
    "SpectralNorm": "ops.interval",
    "global_lipschitz_bound": "checkpoints.composition",
    "push_folder": "hub",
    "rescale_checkpoint": "checkpoints.rescale",
    "spectral_norm": "spectral.norms",
    "spectral_norms": "spectral.norms",
    "spectrum": "checkpoints.spectrum",
    "verify_checkpoint": "checkpoints.verify",
    "write_card": "cards.writer",
    "check_card": "cards.check",
}

__all__ = ["__version__", *sorted(_PUBLIC)]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_PUBLIC[name]}", __name__), name)


from .registration import register as _register  # noqa: E402


_register()
