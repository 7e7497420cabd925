# SPDX-License-Identifier: Apache-2.0
"""The image classifier to train and its image processor: a checkpoint, or an architecture from scratch.

The classes of this package take pixels in [0, 1] and normalise inside. For all others the image processor's own steps
(resize, scale, normalise) come between the pixels and the model, after the noise if there is any; a model that starts
from scratch gets a processor with the mean and standard deviation of the training images.
"""

import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoImageProcessor, AutoModelForImageClassification, PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from ..models.certified_model import STAGING_PREFIX, CertifiedPreTrainedModel, replace_files
from ..models.cifar_resnet.configuration_cifar_resnet import CifarResNetConfig
from ..models.lipschitz_vision.configuration_lipschitz_vision import LipschitzVisionConfig
from ..models.lipschitz_vision.image_processing_pil_lipschitz_vision import LipschitzVisionImageProcessorPil
from .arguments import ModelArguments
from .splits import Split


# they take pixels in [0, 1] and normalise inside
OWN_CONFIGS = (LipschitzVisionConfig, CifarResNetConfig)

__all__ = ["ModelPlan", "plan_model", "save_model"]


@dataclass
class ModelPlan:
    """What is known of a model before the images are read.

    Attributes:
        config: without measured normalisation constants.
        names: classes, in the order of the logits.
        num_channels, image_size, resize: how to read the images; see `read_split`.
        model: of a checkpoint, else None.
        image_processor: of a checkpoint that is not of this package, else None.
        image_mean, image_std: asked for, None where they are to be measured.
    """

    config: Any
    names: list[str]
    num_channels: int
    image_size: int
    resize: bool
    model: Any = None
    image_processor: Any = None
    image_mean: list[float] | None = None
    image_std: list[float] | None = None

    @property
    def own(self) -> bool:
        return isinstance(self.config, OWN_CONFIGS)

    def finish(self, train: Split) -> tuple[Any, Any]:
        """Model and image processor, normalisation constants measured on the training images where none are given."""
        config, lipschitz = self.config, isinstance(self.config, LipschitzVisionConfig)
        if self.model is None:
            mean = train.channel_means() if self.image_mean is None else self.image_mean
            std = self.image_std
            if std is None and not lipschitz:
                # a channel that never varies is left as it is
                std = [value or 1.0 for value in train.channel_deviations()]
            if self.own:
                config.image_mean = mean
                config.image_std = config.image_std if std is None else std
            else:
                size = {"height": self.image_size, "width": self.image_size}
                self.image_processor = ViTImageProcessorPil(size=size, image_mean=mean, image_std=std)
            self.model = AutoModelForImageClassification.from_config(config)
        if self.own:
            size = {"height": config.image_size, "width": config.image_size}
            options: dict[str, Any] = {"size": size, "num_channels": config.num_channels}
            self.image_processor = LipschitzVisionImageProcessorPil(**options)
        return self.model, self.image_processor


def plan_model(args: ModelArguments, names: list[str], image_shape: tuple[int, ...]) -> ModelPlan:
    """Make or load what can be made or loaded without looking at more than one image.

    Args:
        names: classes of the data set.
        image_shape: (C, H, W) of its first image.

    Raises:
        ValueError: an unknown architecture or field, a checkpoint whose classes are not those of the data, images
            that are not square and no `image_size`.
    """
    if args.model_name_or_path is not None:
        return _plan_of_checkpoint(args, names, image_shape)
    channels, size = args.num_channels or image_shape[0], _side(args, image_shape)
    labels = {"id2label": dict(enumerate(names)), "label2id": {name: label for label, name in enumerate(names)}}
    shape = {"num_channels": channels, "image_size": size, **labels}
    overrides = args.overrides()
    if args.config_name is not None:
        config = AutoConfig.from_pretrained(args.config_name)
        _require_classifier(config, args.config_name)
        # the classes by their names: `num_labels` follows
        _override(config, {name: value for name, value in {**shape, **overrides}.items() if hasattr(config, name)})
        _require_fields(config, overrides)
    elif args.architecture in (None, "lipschitz_vision"):
        fields = {**shape, **args.config_fields(), **overrides}
        config = LipschitzVisionConfig.from_size(args.size, **fields) if args.size else LipschitzVisionConfig(**fields)
    elif args.architecture == "cifar_resnet":
        config = CifarResNetConfig.from_depth(args.depth or 20, args.width_multiplier or 1, **{**shape, **overrides})
    else:
        config = _config_of_type(str(args.architecture), shape, overrides)
    return ModelPlan(
        config,
        names,
        num_channels=getattr(config, "num_channels", channels),
        image_size=config.image_size if isinstance(config, OWN_CONFIGS) else size,
        resize=args.image_size is not None or args.num_channels is not None,
        image_mean=overrides.get("image_mean", args.image_mean),
        image_std=overrides.get("image_std", args.image_std),
    )


def _config_of_type(model_type: str, shape: dict[str, Any], overrides: dict[str, Any]) -> PreTrainedConfig:
    try:
        plain = AutoConfig.for_model(model_type)
    except ValueError as error:
        raise ValueError(f"--architecture {model_type!r} is no model type that transformers knows.") from error
    _require_classifier(plain, model_type)
    _require_fields(plain, overrides)
    known = {name: value for name, value in shape.items() if hasattr(plain, name)}
    return type(plain)(**{**known, **overrides})


def _override(config: Any, values: dict[str, Any]) -> None:
    for name, value in values.items():
        setattr(config, name, value)


def _require_fields(config: Any, overrides: dict[str, Any]) -> None:
    unknown = [name for name in overrides if not hasattr(config, name)]
    if unknown:
        raise ValueError(f"--config_overrides {unknown[0]}: {type(config).__name__} has no such field.")


def _require_classifier(config: Any, source: str) -> None:
    if type(config) not in MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING:
        raise ValueError(f"{source!r} ({config.model_type}) has no image classifier in transformers.")


def _side(args: ModelArguments, image_shape: tuple[int, ...]) -> int:
    _, height, width = image_shape
    if args.image_size is None and height != width:
        raise ValueError(f"The first image is {height}x{width}, not square: give --image_size to resize.")
    return args.image_size or height


def _plan_of_checkpoint(args: ModelArguments, names: list[str], image_shape: tuple[int, ...]) -> ModelPlan:
    source = str(args.model_name_or_path)
    config = AutoConfig.from_pretrained(source)
    _require_classifier(config, source)
    own = isinstance(config, OWN_CONFIGS)
    if own and args.image_size is not None:
        raise ValueError("--image_size cannot change the architecture of the checkpoint --model_name_or_path.")
    had = [config.id2label[label] for label in range(config.num_labels)]
    options: dict[str, Any] = {}
    if args.ignore_mismatched_sizes and not set(names) <= set(had):
        had, options = names, {"ignore_mismatched_sizes": True}
    elif len(had) == len(names) and all(name == f"LABEL_{label}" for label, name in enumerate(had)):
        # nobody gave the classes names
        had = names
    config.id2label, config.label2id = dict(enumerate(had)), {name: label for label, name in enumerate(had)}
    if not own:
        options |= {"dtype": torch.float32, "use_safetensors": True}
    model, info = AutoModelForImageClassification.from_pretrained(
        source, config=config, output_loading_info=True, **options
    )
    if info["missing_keys"] and not args.ignore_mismatched_sizes:
        raise ValueError(
            f"The weights in {source} lack {', '.join(sorted(info['missing_keys'])[:5])}: to start these from random "
            "values, a new head for instance, give --ignore_mismatched_sizes."
        )
    return ModelPlan(
        model.config,
        had,
        num_channels=getattr(config, "num_channels", image_shape[0]),
        image_size=config.image_size if own else _side(args, image_shape),
        resize=own or args.image_size is not None,
        model=model,
        image_processor=None if own else AutoImageProcessor.from_pretrained(source),
    )


def save_model(model: Any, image_processor: Any, folder: Path) -> None:
    """Weights, configuration, certificate where the model has one, image processor; whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    if isinstance(model, CertifiedPreTrainedModel):
        model.save_pretrained(folder)
        image_processor.save_pretrained(folder)
        return
    staging = Path(tempfile.mkdtemp(dir=folder, prefix=STAGING_PREFIX))
    try:
        model.save_pretrained(staging)
        image_processor.save_pretrained(staging)
        replace_files(staging, folder)
    finally:
        # renamed away if all went well
        shutil.rmtree(staging, ignore_errors=True)
