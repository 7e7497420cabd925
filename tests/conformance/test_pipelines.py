# SPDX-License-Identifier: Apache-2.0
"""Transformers' pipeline tests on our models: tiny checkpoints are saved here in the place of those of the Hub."""

import json
import os
import tempfile
import unittest
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from hf_lip.models.chacal.converted import (
    ChacalGPT2LMHeadModel,
    ChacalLlamaForCausalLM,
    ChacalQwen2ForCausalLM,
)
from hf_lip.models.chacal.modeling_chacal import (
    ChacalForCausalLM,
    ChacalForSequenceClassification,
    ChacalForTokenClassification,
    ChacalModel,
)
from hf_lip.models.cifar_resnet.modeling_cifar_resnet import CifarResNetForImageClassification, CifarResNetModel
from hf_lip.models.lipschitz_vision.image_processing_pil_lipschitz_vision import LipschitzVisionImageProcessorPil
from hf_lip.models.lipschitz_vision.modeling_lipschitz_vision import (
    LipschitzVisionForImageClassification,
    LipschitzVisionModel,
)

from . import pipeline_tasks
from .upstream import MARKS, import_upstream, load


pytestmark = MARKS
load()

from .test_chacal import ChacalTester  # noqa: E402
from .test_chacal_converted import GPT2Tester, LlamaTester, Qwen2Tester  # noqa: E402
from .test_cifar_resnet import CifarResNetTester  # noqa: E402
from .test_lipschitz_vision import LipschitzVisionTester  # noqa: E402


WORDS = ["<pad>", "<s>", "</s>", "<unk>", "alpha", "beta", "gamma", "delta"]
TASKS = {
    "image-classification": (LipschitzVisionForImageClassification, CifarResNetForImageClassification),
    "image-feature-extraction": (LipschitzVisionModel, CifarResNetModel),
    "feature-extraction": (ChacalModel,),
    "text-generation": (
        ChacalForCausalLM,
        ChacalLlamaForCausalLM,
        ChacalQwen2ForCausalLM,
        ChacalGPT2LMHeadModel,
    ),
    "text-classification": (ChacalForSequenceClassification,),
    "token-classification": (ChacalForTokenClassification,),
}
TESTERS = {
    "chacal": ChacalTester,
    "chacal_gpt2": GPT2Tester,
    "chacal_llama": LlamaTester,
    "chacal_qwen2": Qwen2Tester,
    "cifar_resnet": CifarResNetTester,
    "lipschitz_vision": LipschitzVisionTester,
}
CHECKPOINTS = tempfile.TemporaryDirectory()


def is_image_task(task: str) -> bool:
    return task.startswith("image")


def write_summary(folder: Path) -> None:
    """The table of tiny models, which upstream reads on import."""
    processors = {True: ["LipschitzVisionImageProcessorPil"], False: []}
    tokenizers = {True: [], False: ["PreTrainedTokenizerFast"]}
    summary = {
        model.__name__: {
            "tokenizer_classes": tokenizers[is_image_task(task)],
            "processor_classes": processors[is_image_task(task)],
        }
        for task, classes in TASKS.items()
        for model in classes
    }
    (folder / "reports").mkdir()
    (folder / "reports" / "tiny_model_summary.json").write_text(json.dumps(summary), "utf-8")


write_summary(Path(CHECKPOINTS.name))
with patch.dict(os.environ, {"TRANSFORMERS_TINY_MODEL_PATH": CHECKPOINTS.name}):
    try:
        mixin = import_upstream("test_pipeline_mixin")
    except ModuleNotFoundError as error:
        if not str(error.name).startswith("tests.pipelines"):
            raise
        pytest.skip(
            f"In this version of transformers it needs {error.name}, which the source distribution leaves out.",
            allow_module_level=True,
        )
mixin.transformers_module = SimpleNamespace(
    LipschitzVisionImageProcessorPil=LipschitzVisionImageProcessorPil, PreTrainedTokenizerFast=PreTrainedTokenizerFast
)
for task in TASKS:
    name = "".join(part.capitalize() for part in task.split("-")) + "Tests"
    mixin.pipeline_test_mapping[task]["test"] = f"{pipeline_tasks.__name__}.{name}"


def only_our_tasks(cls):
    """Class decorator: without the tests of tasks that none of our models is for."""
    wanted = {"test_pipeline_" + task.replace("-", "_") for task in TASKS}
    for name in dir(cls):
        if name.startswith("test_pipeline_") and name.removesuffix("_fp16") not in wanted:
            setattr(cls, name, None)
    return cls


@only_our_tasks
class PipelineTest(mixin.PipelineTesterMixin, unittest.TestCase):
    pipeline_model_mapping = TASKS

    @classmethod
    def setUpClass(cls):
        torch.manual_seed(0)
        words = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, "<unk>"))
        words.pre_tokenizer = pre_tokenizers.Whitespace()
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=words, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
        )
        image_processor = LipschitzVisionImageProcessorPil(size={"height": 16, "width": 16})
        for task, classes in TASKS.items():
            for model_class in classes:
                kind = model_class.config_class.model_type
                config = TESTERS[kind]().get_config()
                if not is_image_task(task):
                    # every token that a model can generate has a word
                    config.vocab_size = len(WORDS)
                folder = Path(CHECKPOINTS.name) / kind / model_class.__name__
                model_class(config).save_pretrained(folder)
                (image_processor if is_image_task(task) else tokenizer).save_pretrained(folder)

    @classmethod
    def tearDownClass(cls):
        CHECKPOINTS.cleanup()
