# SPDX-License-Identifier: Apache-2.0
"""What each task's pipeline is asked and must answer, in the form that upstream's `PipelineTesterMixin` calls.

Its own are in tests/pipelines, which the source distribution leaves out, and load images from the Hub.
"""

import unittest

import pytest
import torch
from PIL import Image
from transformers import pipeline


def image(seed: int) -> Image.Image:
    generator = torch.Generator().manual_seed(seed)
    return Image.fromarray(torch.randint(0, 256, (16, 16, 3), generator=generator, dtype=torch.uint8).numpy())


class TaskTests(unittest.TestCase):
    task: str

    def get_test_pipeline(
        self, model, tokenizer=None, image_processor=None, feature_extractor=None, processor=None, dtype="float32"
    ):
        made = pipeline(self.task, model=model, tokenizer=tokenizer, image_processor=image_processor, dtype=dtype)
        return made, self.examples()

    def examples(self) -> list:
        return ["alpha beta gamma", "delta alpha"]

    def run_pipeline_test(self, made, examples):
        one, several = made(examples[0]), made(examples)
        assert len(several) == len(examples)
        self.check(one, made.model)
        assert self.rounded(several[0]) == self.rounded(one)

    def check(self, answer, model):
        raise NotImplementedError

    def rounded(self, answer):
        """The answer, scores to five digits: a batch sums in another order."""
        if isinstance(answer, dict):
            return {key: self.rounded(value) for key, value in answer.items()}
        if isinstance(answer, (list, tuple)):
            return [self.rounded(value) for value in answer]
        return round(answer, 5) if isinstance(answer, float) else answer


class ImageClassificationTests(TaskTests):
    task = "image-classification"

    def examples(self):
        return [image(0), image(1)]

    def check(self, answer, model):
        assert {entry["label"] for entry in answer} == set(model.config.id2label.values())
        assert sum(entry["score"] for entry in answer) == pytest.approx(1.0, abs=1e-3)


class ImageFeatureExtractionTests(TaskTests):
    task = "image-feature-extraction"

    def examples(self):
        return [image(0), image(1)]

    def check(self, answer, model):
        assert torch.tensor(answer).shape[:2] == (1, model.config.hidden_sizes[-1])


class FeatureExtractionTests(TaskTests):
    task = "feature-extraction"

    def check(self, answer, model):
        assert torch.tensor(answer).shape == (1, 3, model.config.hidden_size)


class TextGenerationTests(TaskTests):
    task = "text-generation"

    def run_pipeline_test(self, made, examples):
        for options in ({"do_sample": False}, {"num_beams": 2, "do_sample": False}):
            answer = made(examples, max_new_tokens=3, **options)
            assert len(answer) == len(examples)
            for (entry,), prompt in zip(answer, examples):
                assert entry["generated_text"].startswith(prompt)
        answer = made(examples[0], max_new_tokens=3, do_sample=True, num_return_sequences=2, return_full_text=False)
        assert len(answer) == 2
        assert examples[0] not in answer[0]["generated_text"]


class TextClassificationTests(TaskTests):
    task = "text-classification"

    def run_pipeline_test(self, made, examples):
        every = made(examples, top_k=None)
        for answer in every:
            assert sum(entry["score"] for entry in answer) == pytest.approx(1.0, abs=1e-3)
        best = made(examples)
        assert self.rounded(best) == self.rounded([answer[0] for answer in every])


class TokenClassificationTests(TaskTests):
    task = "token-classification"

    def check(self, answer, model):
        assert [entry["word"] for entry in answer] == ["alpha", "beta", "gamma"]
        assert {entry["entity"] for entry in answer} <= set(model.config.id2label.values())
