# SPDX-License-Identifier: Apache-2.0
"""What the conformance modules share: skips with reasons, tiny inputs, and upstream's tests under our own rules."""

import copy
import unittest
from unittest.mock import patch

import torch
from transformers import PreTrainedModel

from hf_lip.layers.base import RescaledModule
from hf_lip.models.certified_model import CertifiedPreTrainedModel
from hf_lip.models.chacal.cache_chacal import ChainedDynamicLayer, ChainedStaticLayer
from hf_lip.models.chacal.interface import ChainedCacheLayer

from .upstream import load


def leave_out(reasons: dict[str, str]):
    """Class decorator: skip the named tests with their reasons. A name that upstream does not know is an error."""

    def decorate(cls):
        for name, reason in reasons.items():
            if not hasattr(cls, name):
                raise AttributeError(f"{name} is no test of {cls.__name__}: remove it from the list.")
            setattr(cls, name, unittest.skip(reason)(lambda self: None))
        return cls

    return decorate


def generation_tests(**reasons: str) -> dict[str, str]:
    """Those of the reasons that are for tests which are here: the source distribution leaves the generation tests
    out, a checkout has them."""
    return {name: reason for name, reason in reasons.items() if hasattr(load().GenerationTesterMixin, name)}


def pixels(batch_size: int, num_channels: int, image_size: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.rand(batch_size, num_channels, image_size, image_size, generator=generator)


def tokens(batch_size: int, length: int, vocab_size: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    # 0, 1 and 2 are the special tokens
    return torch.randint(3, vocab_size, (batch_size, length), generator=generator)


def check_chained_cache(test, batch_size, past_key_values, seq_length, config) -> None:
    """In the place of upstream's check of a cache: chained layers hold Z, with a head for each query head."""
    assert len(past_key_values.layers) == config.num_hidden_layers
    heads = config.num_attention_heads
    key_heads = getattr(config, "num_key_value_heads", heads)
    size = config.hidden_size // heads
    for layer in past_key_values.layers:
        chained = isinstance(layer, (ChainedCacheLayer, ChainedDynamicLayer, ChainedStaticLayer))
        assert layer.keys.shape == (batch_size, key_heads, seq_length, size)
        assert layer.values.shape == (batch_size, heads if chained else key_heads, seq_length, size)


def library_loading():
    """`from_pretrained` of the library itself, which initialises what is missing: ours refuses that, and the tests
    that need it then say whether our `_init_weights` could."""
    return patch.object(CertifiedPreTrainedModel, "from_pretrained", PreTrainedModel.__dict__["from_pretrained"])


def loading_with_new_head():
    """Our `from_pretrained` with a new head allowed, as ours has to be asked."""
    ours = CertifiedPreTrainedModel.__dict__["from_pretrained"].__func__

    def from_pretrained(cls, *args, **kwargs):
        return ours(cls, *args, **{"ignore_mismatched_sizes": True, **kwargs})

    return patch.object(CertifiedPreTrainedModel, "from_pretrained", classmethod(from_pretrained))


class StrictVisionTests:
    """For the mixins of an image model whose loading is strict and whose pixels are normalised inside."""

    def test_can_init_all_missing_weights(self):
        # a loaded model is in evaluation mode, for which our layers write their certified rescaling; a new one is not
        with library_loading(), patch.object(RescaledModule, "freeze_if_stale", lambda module: None):
            super().test_can_init_all_missing_weights()

    def test_model_weights_reload_no_missing_tied_weights(self):
        with library_loading():
            super().test_model_weights_reload_no_missing_tied_weights()

    def test_correct_missing_keys(self):
        with loading_with_new_head():
            super().test_correct_missing_keys()

    def test_can_load_ignoring_mismatched_shapes(self):
        # upstream makes initial weights small by every field with `_std` in its name, and `image_std` is no such field
        with patch("tests.test_modeling_common._config_zero_init", copy.deepcopy):
            super().test_can_load_ignoring_mismatched_shapes()

    def test_config(self):
        self.config_tester.run_common_tests()

    def _prepare_config_and_inputs_for_retain_grad_hidden_states_attentions(self):
        config, inputs = self.model_tester.prepare_config_and_inputs_for_common()
        # the first hidden state can be a function of the pixels alone
        return config, {"pixel_values": inputs["pixel_values"].requires_grad_()}

    def test_hidden_states_output(self):
        config, inputs = self.model_tester.prepare_config_and_inputs_for_common()
        for model_class in self.all_model_classes:
            model = model_class(config).eval()
            outputs = model(**inputs, output_hidden_states=True)
            assert tuple(tuple(state.shape[1:]) for state in outputs.hidden_states) == self.model_tester.hidden_shapes
            by_config = copy.deepcopy(config)
            by_config.output_hidden_states = True
            assert len(model_class(by_config).eval()(**inputs).hidden_states) == len(outputs.hidden_states)
            assert model(**inputs).hidden_states is None
