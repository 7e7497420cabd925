# SPDX-License-Identifier: Apache-2.0
"""The file that lets a published checkpoint be loaded without `import hf_lip`, with `trust_remote_code=True`.

It imports the classes of the installed package (hf-plugin 10.3): no copy of the code lies in the checkpoint, so none
goes stale. The `auto_map` that points to it is part of a published folder only, never of a config or of what
`save_pretrained` writes.
"""

import json
from pathlib import Path
from typing import Any

from transformers.utils import CONFIG_NAME, IMAGE_PROCESSOR_NAME


SHIM_NAME = "modeling_hf_lip.py"
IMAGE_PROCESSOR_CLASS = "LipschitzVisionImageProcessorPil"

# model_type -> (module to import from, {Auto class: class}); what registration.py registers, a test compares them
CLASSES: dict[str, tuple[str, dict[str, str]]] = {
    "lipschitz_vision": (
        "hf_lip",
        {
            "AutoConfig": "LipschitzVisionConfig",
            "AutoModel": "LipschitzVisionModel",
            "AutoModelForImageClassification": "LipschitzVisionForImageClassification",
            "AutoBackbone": "LipschitzVisionBackbone",
        },
    ),
    "cifar_resnet": (
        "hf_lip",
        {
            "AutoConfig": "CifarResNetConfig",
            "AutoModel": "CifarResNetModel",
            "AutoModelForImageClassification": "CifarResNetForImageClassification",
        },
    ),
    "chacal": (
        "hf_lip",
        {
            "AutoConfig": "ChacalConfig",
            "AutoModel": "ChacalModel",
            "AutoModelForCausalLM": "ChacalForCausalLM",
            "AutoModelForSequenceClassification": "ChacalForSequenceClassification",
            "AutoModelForTokenClassification": "ChacalForTokenClassification",
        },
    ),
    "chacal_llama": (
        "hf_lip",
        {"AutoConfig": "ChacalLlamaConfig", "AutoModelForCausalLM": "ChacalLlamaForCausalLM"},
    ),
    "chacal_qwen2": (
        "hf_lip",
        {"AutoConfig": "ChacalQwen2Config", "AutoModelForCausalLM": "ChacalQwen2ForCausalLM"},
    ),
    "chacal_gpt2": (
        "hf_lip",
        {"AutoConfig": "ChacalGPT2Config", "AutoModelForCausalLM": "ChacalGPT2LMHeadModel"},
    ),
}

TEXT = """# SPDX-License-Identifier: Apache-2.0
# The classes of this checkpoint are those of the installed package hf_lip, and nothing else is run.
from {module} import {names}  # noqa: F401
"""


def shim_files(folder: Path) -> dict[str, bytes]:
    """What a published folder has in place of its own files: the shim, and the configs that point to it.

    Args:
        folder: with a config.json, and maybe a preprocessor_config.json; nothing is written.

    Returns:
        Contents by name; empty for models that transformers knows by itself.

    Raises:
        ValueError: if one of the files is not a JSON object.
    """
    # adapters are saved without a config
    config = _read_object(folder / CONFIG_NAME) if (folder / CONFIG_NAME).is_file() else {}
    if config.get("model_type") not in CLASSES:
        return {}
    module, classes = CLASSES[config["model_type"]]
    names = list(classes.values())
    files = {CONFIG_NAME: _with_auto_map(config, classes)}
    if (folder / IMAGE_PROCESSOR_NAME).is_file():
        processor = _read_object(folder / IMAGE_PROCESSOR_NAME)
        # transformers writes the type without the suffix of its backend
        if processor.get("image_processor_type") == IMAGE_PROCESSOR_CLASS.removesuffix("Pil"):
            files[IMAGE_PROCESSOR_NAME] = _with_auto_map(processor, {"AutoImageProcessor": IMAGE_PROCESSOR_CLASS})
            names.append(IMAGE_PROCESSOR_CLASS)
    files[SHIM_NAME] = TEXT.format(module=module, names=", ".join(names)).encode()
    return files


def _read_object(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON ({error}): save the model again.") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a JSON object: save the model again.")
    return content


def _with_auto_map(content: dict[str, Any], classes: dict[str, str]) -> bytes:
    references = {auto: f"{Path(SHIM_NAME).stem}.{name}" for auto, name in classes.items()}
    return (json.dumps({**content, "auto_map": references}, indent=2, sort_keys=True) + "\n").encode()


def _is_ours(cls: type) -> bool:
    return cls.__module__.split(".")[0] == __name__.split(".")[0]


class InstalledCode:
    """Classes of this package: checkpoints refer to the installed code and carry no copy of it.

    Loading through the shim would otherwise mark the classes as remote code, and `save_pretrained` would copy the
    module that defines them, which fails on its imports.
    """

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = None) -> None:
        """Does nothing for the classes of the package; subclasses defined elsewhere are registered as usual."""
        if not _is_ours(cls):
            arguments = () if auto_class is None else (auto_class,)
            super().register_for_auto_class(*arguments)  # type: ignore[misc]


class InstalledSettings(InstalledCode):
    """Configs and image processors of this package."""

    def to_dict(self) -> dict[str, Any]:
        """As in transformers, without the `auto_map` of the repository it was loaded from, whose shim is not saved."""
        content = super().to_dict()  # type: ignore[misc]
        if _is_ours(type(self)):
            content.pop("auto_map", None)
        return content
