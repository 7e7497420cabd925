# SPDX-License-Identifier: Apache-2.0
"""The one place that talks to the registries of transformers. Safe to run twice."""

from transformers import (
    AutoBackbone,
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)
from transformers.pipelines import PIPELINE_REGISTRY
from transformers.utils import logging

from .assets import DEFAULT_MODEL_DIR
from .models.chacal.configuration_chacal import ChacalConfig
from .models.chacal.converted import (
    ChacalGPT2Config,
    ChacalGPT2LMHeadModel,
    ChacalLlamaConfig,
    ChacalLlamaForCausalLM,
    ChacalQwen2Config,
    ChacalQwen2ForCausalLM,
)
from .models.chacal.interface import register_attention
from .models.chacal.modeling_chacal import (
    ChacalForCausalLM,
    ChacalForSequenceClassification,
    ChacalForTokenClassification,
    ChacalModel,
)
from .models.cifar_resnet.configuration_cifar_resnet import CifarResNetConfig
from .models.cifar_resnet.modeling_cifar_resnet import CifarResNetForImageClassification, CifarResNetModel
from .models.lipschitz_vision.configuration_lipschitz_vision import LipschitzVisionConfig
from .models.lipschitz_vision.image_processing_pil_lipschitz_vision import LipschitzVisionImageProcessorPil
from .models.lipschitz_vision.modeling_lipschitz_vision import (
    LipschitzVisionBackbone,
    LipschitzVisionForImageClassification,
    LipschitzVisionModel,
)
from .pipelines.certify import CertifyPipeline
from .pipelines.checkpoint import CheckedAutoModel


logger = logging.get_logger(__name__)


def register() -> None:
    """Register every class of the package with the Auto classes, and the task "certify" with the pipelines."""
    AutoConfig.register("lipschitz_vision", LipschitzVisionConfig, exist_ok=True)
    AutoModel.register(LipschitzVisionConfig, LipschitzVisionModel, exist_ok=True)
    AutoModelForImageClassification.register(
        LipschitzVisionConfig, LipschitzVisionForImageClassification, exist_ok=True
    )
    AutoBackbone.register(LipschitzVisionConfig, LipschitzVisionBackbone, exist_ok=True)
    AutoConfig.register("cifar_resnet", CifarResNetConfig, exist_ok=True)
    AutoModel.register(CifarResNetConfig, CifarResNetModel, exist_ok=True)
    AutoModelForImageClassification.register(CifarResNetConfig, CifarResNetForImageClassification, exist_ok=True)
    AutoConfig.register("chacal", ChacalConfig, exist_ok=True)
    AutoModel.register(ChacalConfig, ChacalModel, exist_ok=True)
    AutoModelForCausalLM.register(ChacalConfig, ChacalForCausalLM, exist_ok=True)
    AutoModelForSequenceClassification.register(ChacalConfig, ChacalForSequenceClassification, exist_ok=True)
    AutoModelForTokenClassification.register(ChacalConfig, ChacalForTokenClassification, exist_ok=True)
    register_attention()
    for chained_config, model in (
        (ChacalLlamaConfig, ChacalLlamaForCausalLM),
        (ChacalQwen2Config, ChacalQwen2ForCausalLM),
        (ChacalGPT2Config, ChacalGPT2LMHeadModel),
    ):
        AutoConfig.register(chained_config.model_type, chained_config, exist_ok=True)
        AutoModelForCausalLM.register(chained_config, model, exist_ok=True)
    try:
        # both take pixels in [0, 1]: normalisation is a layer of the model
        for config in (LipschitzVisionConfig, CifarResNetConfig):
            AutoImageProcessor.register(
                config, image_processor_classes={"pil": LipschitzVisionImageProcessorPil}, exist_ok=True
            )
    except ImportError as error:
        # transformers 5.17 has no AutoImageProcessor at all without torchvision; our own class works without it
        logger.info(f"LipschitzVisionImageProcessor is not in AutoImageProcessor: {error}")
    PIPELINE_REGISTRY.register_pipeline(
        "certify",
        pipeline_class=CertifyPipeline,
        pt_model=CheckedAutoModel,
        # the embedded checkpoint: a local folder works as an id and needs no network
        default={"model": (str(DEFAULT_MODEL_DIR), "main")},
        type="image",
    )
