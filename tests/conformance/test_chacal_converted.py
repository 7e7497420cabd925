# SPDX-License-Identifier: Apache-2.0
"""Transformers' common tests on Llama, Qwen2 and GPT-2 with chained attention."""

import functools
import unittest
from unittest.mock import patch

import torch

from hf_lip.models.chacal.converted import (
    ChacalGPT2Config,
    ChacalGPT2LMHeadModel,
    ChacalLlamaConfig,
    ChacalLlamaForCausalLM,
    ChacalQwen2Config,
    ChacalQwen2ForCausalLM,
)
from hf_lip.models.chacal.interface import NAME

from .common import check_chained_cache, generation_tests, leave_out, tokens
from .upstream import MARKS, load


pytestmark = MARKS
upstream = load()

STATIC = "a `ChainedCache` grows: decoding from a static one is refused with an error"
LEFT_OUT = generation_tests(
    test_generate_from_inputs_embeds_with_static_cache=STATIC, test_generate_with_static_cache=STATIC
)


class LlamaTester:
    """Tiny config and inputs, as the mixins ask for them."""

    batch_size, seq_length = 3, 7
    vocab_size, hidden_size, num_hidden_layers = 99, 32, 2
    num_attention_heads, num_key_value_heads = 4, 2
    is_training = True
    config_class = ChacalLlamaConfig
    config_arguments = {"hidden_size": 32}  # noqa: RUF012

    def get_config(self):
        return self.config_class(
            vocab_size=self.vocab_size,
            hidden_size=self.hidden_size,
            intermediate_size=37,
            num_hidden_layers=self.num_hidden_layers,
            num_attention_heads=self.num_attention_heads,
            num_key_value_heads=self.num_key_value_heads,
            max_position_embeddings=512,
            pad_token_id=0,
            chain_gamma=0.8,
        )

    def prepare_config_and_inputs_for_common(self):
        input_ids = tokens(self.batch_size, self.seq_length, self.vocab_size)
        return self.get_config(), {"input_ids": input_ids, "attention_mask": torch.tril(torch.ones_like(input_ids))}


class Qwen2Tester(LlamaTester):
    config_class = ChacalQwen2Config


class GPT2Tester(LlamaTester):
    config_class = ChacalGPT2Config
    num_key_value_heads = 4
    config_arguments = {"n_embd": 36}  # noqa: RUF012

    def get_config(self):
        return ChacalGPT2Config(
            vocab_size=self.vocab_size,
            n_embd=self.hidden_size,
            n_layer=self.num_hidden_layers,
            n_head=self.num_attention_heads,
            n_inner=37,
            n_positions=512,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
            chain_gamma=0.8,
        )


def pin_attention(cls):
    """Class decorator: these tests set eager attention, with which our models would be ordinary ones. The choice is
    left where the config class has it."""
    for name in dir(cls):
        if name.startswith("test_assisted_decoding") and callable(getattr(cls, name)):
            setattr(cls, name, pinned(getattr(cls, name)))
    return cls


def pinned(test):
    @functools.wraps(test)
    def run(self):
        chosen = property(lambda config: NAME, lambda config, value: None)
        with patch.object(self.maker.config_class, "_attn_implementation", chosen):
            test(self)

    return run


@pin_attention
@leave_out(LEFT_OUT)
class ChacalLlamaModelTest(upstream.ModelTesterMixin, upstream.GenerationTesterMixin, unittest.TestCase):
    all_model_classes = (ChacalLlamaForCausalLM,)
    test_can_init_all_missing_weights_before_2023 = True
    maker = LlamaTester
    # the attention function makes no attention matrix
    has_attentions = False

    def setUp(self):
        self.model_tester = self.maker()
        self.config_tester = upstream.ConfigTester(
            self, config_class=self.maker.config_class, **self.maker.config_arguments
        )

    def test_config(self):
        self.config_tester.run_common_tests()

    _check_past_key_values_for_generate = check_chained_cache


@leave_out(LEFT_OUT)
class ChacalQwen2ModelTest(ChacalLlamaModelTest):
    all_model_classes = (ChacalQwen2ForCausalLM,)
    maker = Qwen2Tester


@leave_out(LEFT_OUT)
class ChacalGPT2ModelTest(ChacalLlamaModelTest):
    all_model_classes = (ChacalGPT2LMHeadModel,)
    # as upstream's own test of GPT-2, whose `_init_weights` is older than that rule
    test_can_init_all_missing_weights_before_2023 = False
    maker = GPT2Tester
