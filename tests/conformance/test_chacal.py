# SPDX-License-Identifier: Apache-2.0
"""Transformers' common tests on the chacal family."""

import unittest
from unittest.mock import patch

import torch

from hf_lip.models.chacal.configuration_chacal import ChacalConfig
from hf_lip.models.chacal.modeling_chacal import (
    ChacalForCausalLM,
    ChacalForSequenceClassification,
    ChacalForTokenClassification,
    ChacalModel,
)

from .common import check_chained_cache, generation_tests, leave_out, tokens
from .upstream import MARKS, load


pytestmark = MARKS
upstream = load()

LEFT_OUT = generation_tests(
    test_custom_4d_attention_mask=(
        "chained attention solves a triangular system over causal attention and takes padding masks and packed "
        "sequences; a mask of its own for each pair of tokens is refused with an error"
    )
)


class ChacalTester:
    """Tiny config and inputs, as the mixins ask for them."""

    batch_size, seq_length = 3, 7
    vocab_size, hidden_size, num_hidden_layers = 99, 32, 2
    num_attention_heads = num_key_value_heads = 4
    layer_types = ("chained_attention", "chained_attention")
    overrides: dict = {}  # noqa: RUF012
    is_training = True

    def get_config(self):
        return ChacalConfig(
            vocab_size=self.vocab_size,
            hidden_size=self.hidden_size,
            intermediate_size=37,
            num_hidden_layers=self.num_hidden_layers,
            num_attention_heads=self.num_attention_heads,
            num_key_value_heads=self.num_key_value_heads,
            max_position_embeddings=512,
            layer_types=self.layer_types,
            pad_token_id=0,
            num_labels=3,
            **self.overrides,
        )

    def prepare_config_and_inputs_for_common(self):
        input_ids = tokens(self.batch_size, self.seq_length, self.vocab_size)
        return self.get_config(), {"input_ids": input_ids, "attention_mask": torch.tril(torch.ones_like(input_ids))}


class GroupedMixedTester(ChacalTester):
    num_key_value_heads = 2
    layer_types = ("chained_attention", "full_attention")
    overrides = {"gamma": 0.7, "gamma_learnable": True, "tie_word_embeddings": True}  # noqa: RUF012


@leave_out(LEFT_OUT)
class ChacalModelTest(upstream.ModelTesterMixin, upstream.GenerationTesterMixin, unittest.TestCase):
    all_model_classes = (
        ChacalModel,
        ChacalForCausalLM,
        ChacalForSequenceClassification,
        ChacalForTokenClassification,
    )
    test_can_init_all_missing_weights_before_2023 = True
    maker = ChacalTester

    def setUp(self):
        self.model_tester = self.maker()
        self.config_tester = upstream.ConfigTester(self, config_class=ChacalConfig, hidden_size=32)

    def test_config(self):
        self.config_tester.run_common_tests()

    def test_retain_grad_hidden_states_attentions(self):
        # the solve makes no attention matrix: what `output_attentions` returns is computed beside it, and the output
        # is no function of it
        with patch.object(type(self), "has_attentions", False):
            super().test_retain_grad_hidden_states_attentions()

    def attention_mask_padding_matches_padding_free_with_position_ids(self, *args, **kwargs):
        # packing needs no attention backend of the library, which chained layers do not call
        with patch.object(ChacalForCausalLM, "_supports_attention_backend", True):
            super().attention_mask_padding_matches_padding_free_with_position_ids(*args, **kwargs)


class GroupedMixedModelTest(ChacalModelTest):
    """Grouped heads, both kinds of layers, trained discounts, tied embeddings."""

    maker = GroupedMixedTester

    _check_past_key_values_for_generate = check_chained_cache
