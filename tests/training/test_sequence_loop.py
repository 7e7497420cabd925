# SPDX-License-Identifier: Apache-2.0
"""Schedules, optimiser, arguments, models and discounts of sequence runs."""

import math
from itertools import pairwise

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

from hf_lip import ChacalConfig, ChacalForCausalLM
from hf_lip.models.chacal.converted import ChacalLlamaConfig, ChacalLlamaForCausalLM
from hf_lip.training.schedules import constant, cosine, linear, with_warmup
from hf_lip.training.sequence_arguments import SequenceModelArguments, SequenceTrainingArguments, run_identity
from hf_lip.training.sequence_loop import make_optimizers
from hf_lip.training.sequence_models import build_model, gamma_schedule


TINY = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 24}
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def build(**changes):
    return build_model(SequenceModelArguments(**{**TINY, **changes}), 40, 32, SPECIAL, use_rope=True)


class TestSchedules:
    @pytest.mark.parametrize("schedule", [cosine, linear, constant])
    def test_warm_up_then_decay(self, schedule):
        values = [with_warmup(schedule, progress / 100, share=0.2) for progress in range(101)]
        assert values[0] == 0
        assert values[10] == pytest.approx(0.5)
        assert values[20] == 1 == max(values)
        assert values[60] == pytest.approx(schedule(0.5))
        assert values[100] == pytest.approx(schedule(1.0), abs=1e-12)
        assert all(first >= second for first, second in pairwise(values[20:]))

    def test_they_are_those_of_transformers(self):
        from transformers import get_cosine_schedule_with_warmup, get_linear_schedule_with_warmup

        for schedule, theirs in ((cosine, get_cosine_schedule_with_warmup), (linear, get_linear_schedule_with_warmup)):
            optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
            scheduler = theirs(optimizer, 30, 100)
            for step in range(101):
                assert with_warmup(schedule, step / 100, share=0.3) == pytest.approx(
                    scheduler.get_last_lr()[0], abs=1e-12
                )
                optimizer.step()
                scheduler.step()

    def test_no_warm_up_and_nothing_else(self):
        assert with_warmup(cosine, 0.0, share=0.0) == 1.0
        assert with_warmup(cosine, 0.5, share=1.0) == 0.5
        assert with_warmup(cosine, 1.0, share=1.0) == 1.0
        for wrong in (-0.1, 1.1, math.nan):
            with pytest.raises(ValueError, match="`share`"):
                with_warmup(cosine, 0.5, share=wrong)
            with pytest.raises(ValueError, match="`progress`"):
                linear(wrong)


def test_weight_decay_is_for_matrices():
    model = build(gamma=[0.5], gamma_learnable=True)
    (adamw,) = make_optimizers(model, SequenceTrainingArguments(weight_decay=0.3, learning_rate=0.1))
    groups = adamw.param_groups
    assert [group["weight_decay"] for group in groups] == [0.3, 0.0, 0.0]
    assert [{parameter.dim() for parameter in group["params"]} for group in groups] == [{2}, {1}, {1}]
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))
    assert [group["peak"] for group in groups] == [0.1] * 3
    (adamw,) = make_optimizers(model, SequenceTrainingArguments(learning_rate=0.1, gamma_learning_rate=0.5))
    assert [group["peak"] for group in adamw.param_groups] == [0.1, 0.1, 0.5]
    with pytest.raises(ValueError, match="--gamma_learning_rate is of learnt discounts"):
        make_optimizers(build(gamma=[0.5]), SequenceTrainingArguments(gamma_learning_rate=0.5))


@pytest.mark.parametrize("kind", ["chacal", "tied", "gpt2"])
def test_muon_is_for_the_matrices_of_the_layers(kind):
    model = {
        "chacal": lambda: build(gamma_learnable=True),
        "tied": lambda: build(tie_word_embeddings=True),
        "gpt2": lambda: GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=40)),
    }[kind]()
    arguments = SequenceTrainingArguments(learning_rate=0.1, muon_learning_rate=0.3, weight_decay=0.2)
    adamw, muon = make_optimizers(model, arguments)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    (group,) = muon.param_groups
    assert (group["peak"], group["weight_decay"]) == (0.3, 0.2)
    orthogonal = {names.pop(id(parameter)) for parameter in group["params"]}
    assert all(".layers." in name or ".h." in name for name in orthogonal)
    assert len(orthogonal) == (8 if kind == "gpt2" else 7 * model.config.num_hidden_layers)
    others = [parameter for entry in adamw.param_groups for parameter in entry["params"]]
    assert sorted(map(id, others)) == sorted(names)
    assert all(parameter.dim() == 1 or "layers" not in names[id(parameter)] for parameter in others)


class TestModels:
    def test_shorthands(self):
        config = build(layer_types=["full", "chained"], gamma=[0.3, 0.8], diagonal="keep").config
        assert config.layer_types == ["full_attention", "chained_attention"]
        assert (config.gamma, config.diagonal, config.use_rope) == ([0.3, 0.8], "keep", True)
        config = build(attention="softmax", num_hidden_layers=3, use_rope=False).config
        assert config.layer_types == ["full_attention"] * 3
        assert not config.use_rope
        assert (config.vocab_size, config.eos_token_id, config.num_attention_heads) == (40, 2, 2)

    def test_overrides_and_other_architectures(self):
        assert build(config_overrides=["hidden_act=gelu", "chunk_size=16"]).config.chunk_size == 16
        model = build(model_type="llama", num_hidden_layers=2, config_overrides=["num_key_value_heads=1"])
        assert isinstance(model, LlamaForCausalLM)
        assert (model.config.hidden_size, model.config.num_key_value_heads) == (16, 1)

    def test_a_checkpoint_is_taken_as_it_is(self, tmp_path):
        saved = build(gamma=[0.7]).to(torch.bfloat16)
        saved.save_pretrained(tmp_path)
        model = build_model(SequenceModelArguments(model_name_or_path=str(tmp_path)), 40, 32, {}, use_rope=False)
        assert model.dtype == torch.float32
        assert model.config.gamma == 0.7
        for name, tensor in saved.state_dict().items():
            assert torch.equal(tensor.float(), model.state_dict()[name])
        with pytest.raises(ValueError, match="has 40 tokens and the data 41"):
            build_model(SequenceModelArguments(model_name_or_path=str(tmp_path)), 41, 32, {}, use_rope=False)
        with pytest.raises(ValueError, match="longest sequence has 9999 tokens and --model_name_or_path gives 2048"):
            build_model(SequenceModelArguments(model_name_or_path=str(tmp_path)), 40, 9999, {}, use_rope=False)

    def test_positions(self):
        with pytest.raises(ValueError, match="has 32 tokens and --max_position_embeddings gives 31 positions"):
            build(max_position_embeddings=31)
        build(max_position_embeddings=31, use_rope=False)

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"layer_types": ["sliding"]}, "--layer_types must be words of full, softmax, chained"),
            ({"layer_types": ["full"], "attention": "chained"}, "exclude each other"),
            ({"layer_types": ["full"], "num_hidden_layers": 2}, "--num_hidden_layers is 2 and --layer_types has 1"),
            ({"gamma": [0.1, 0.2], "num_hidden_layers": 3}, "--gamma must be one number or 3"),
            ({"gamma": [1.5]}, "gamma"),
            ({"model_name_or_path": "x", "hidden_size": 128}, "--hidden_size cannot change"),
            ({"model_type": "llama", "diagonal": "keep"}, "--diagonal is an option of --model_type chacal"),
            ({"gamma_warmup_steps": 5}, "give --gamma"),
            ({"gamma_warmup_steps": 5, "gamma": [0.5], "gamma_learnable": True}, "exclude each other"),
            ({"config_overrides": ["gelu"]}, "--config_overrides takes name=value"),
            ({"config_overrides": ["hiden_size=3"]}, "--config_overrides hiden_size: the configuration of chacal"),
            ({"hidden_size": 0}, "--hidden_size must be > 0"),
        ],
    )
    def test_wrong_arguments_are_refused_with_their_name(self, changes, message):
        with pytest.raises(Exception, match=message) as caught:
            build(**changes)
        assert isinstance(caught.value, ValueError) or "gamma" in changes


class TestGammaSchedule:
    def test_from_scratch_it_rises_from_zero(self):
        model = build(num_hidden_layers=2, gamma=[0.4, 0.8], gamma_warmup_steps=4)
        schedule = gamma_schedule(
            model, SequenceModelArguments(num_hidden_layers=2, gamma=[0.4, 0.8], gamma_warmup_steps=4)
        )
        seen = []
        for step in range(6):
            schedule(step)
            seen.append([layer[0] for layer in model.get_gamma()])
        torch.testing.assert_close(
            torch.tensor(seen[:5]), torch.tensor([[0.1, 0.2], [0.2, 0.4], [0.3, 0.6], [0.4, 0.8], [0.4, 0.8]])
        )
        schedule(1)
        assert model.config.gamma[1] == [pytest.approx(0.4)] * 2

    def test_of_a_converted_checkpoint_it_starts_where_it_is(self, tmp_path):
        sizes = {**TINY, "vocab_size": 40, "num_hidden_layers": 2}
        ChacalLlamaForCausalLM(ChacalLlamaConfig(**sizes, chain_gamma=0.2)).save_pretrained(tmp_path)
        arguments = SequenceModelArguments(model_name_or_path=str(tmp_path), gamma=[0.6], gamma_warmup_steps=2)
        model = build_model(arguments, 40, 32, {}, use_rope=True)
        schedule = gamma_schedule(model, arguments)
        schedule(0)
        assert model.config.chain_gamma == [pytest.approx(0.4)] * 2
        schedule(1)
        assert model.config.chain_gamma == [0.6, 0.6]
        once = SequenceModelArguments(model_name_or_path=str(tmp_path), gamma=[0.5])
        model = build_model(once, 40, 32, {}, use_rope=True)
        gamma_schedule(model, once)(0)
        assert model.config.chain_gamma == [0.5, 0.5]

    @pytest.mark.parametrize("kind", ["llama", "converted", "chacal"])
    def test_discounts_of_a_checkpoint_are_trained_from_where_they_are_set(self, tmp_path, kind):
        sizes = {**TINY, "vocab_size": 40, "num_hidden_layers": 2}
        saved = {
            "llama": lambda: LlamaForCausalLM(LlamaConfig(**sizes)),
            "converted": lambda: ChacalLlamaForCausalLM(ChacalLlamaConfig(**sizes, chain_gamma=0.2)),
            "chacal": lambda: ChacalForCausalLM(ChacalConfig(**sizes, gamma=0.2)),
        }[kind]()
        saved.save_pretrained(tmp_path)
        words = {"model_name_or_path": str(tmp_path), "gamma_learnable": True}
        if kind == "llama":
            words |= {"attention": "chained", "diagonal": "keep"}
        for gamma, expected in ((None, 0.0 if kind == "llama" else 0.2), ([0.0], 0.0), ([0.5], 0.5)):
            arguments = SequenceModelArguments(**words, gamma=gamma)
            model = build_model(arguments, 40, 32, {}, use_rope=True)
            gamma_schedule(model, arguments)(0)
            torch.testing.assert_close(torch.tensor(model.get_gamma()), torch.full((2, 2), expected))
            trained = [p for name, p in model.named_parameters() if name.endswith("gamma.weight")]
            assert [p.shape for p in trained] == [(2,), (2,)]
            (adamw,) = make_optimizers(model, SequenceTrainingArguments(output_dir="x"))
            *_, gammas = adamw.param_groups
            assert {id(p) for p in trained} == {id(p) for p in gammas["params"]}
            assert gammas["weight_decay"] == 0.0
        if kind == "llama":
            assert (model.config.model_type, model.config.chain_diagonal) == ("chacal_llama", "keep")

    def test_what_can_not_be_converted_is_refused(self, tmp_path):
        sizes = {**TINY, "vocab_size": 40, "num_hidden_layers": 1}
        ChacalForCausalLM(ChacalConfig(**sizes)).save_pretrained(tmp_path / "chacal")
        MistralForCausalLM(MistralConfig(**sizes)).save_pretrained(tmp_path / "mistral")
        for name, words, message in (
            ("chacal", {"attention": "chained"}, "is a chacal, which has chained attention: leave it out"),
            ("mistral", {"attention": "chained"}, "can be converted for gpt2, llama, qwen2"),
            ("mistral", {"gamma_learnable": True}, "--gamma_learnable is for chained attention"),
        ):
            arguments = SequenceModelArguments(model_name_or_path=str(tmp_path / name), **words)
            with pytest.raises(ValueError, match=message):
                build_model(arguments, 40, 8, {}, use_rope=True)
        for words in ({"diagonal": "keep"}, {"attention": "softmax"}, {"normalize": True}):
            with pytest.raises(ValueError, match=f"--{next(iter(words))} cannot change the architecture"):
                SequenceModelArguments(model_name_or_path=str(tmp_path / "mistral"), **words)

    def test_what_can_not_be_scheduled_is_refused(self, tmp_path):
        LlamaForCausalLM(LlamaConfig(**TINY, vocab_size=40, num_hidden_layers=1)).save_pretrained(tmp_path / "llama")
        ChacalForCausalLM(
            ChacalConfig(**TINY, vocab_size=40, num_hidden_layers=1, gamma=0.5, gamma_learnable=True)
        ).save_pretrained(tmp_path / "trained")
        config = ChacalLlamaConfig(**TINY, vocab_size=40, num_hidden_layers=1, chain_gamma_learnable=True)
        ChacalLlamaForCausalLM(config).save_pretrained(tmp_path / "converted")
        sizes = {**TINY, "vocab_size": 40, "num_hidden_layers": 1}
        ChacalForCausalLM(ChacalConfig(**sizes, gamma=[[0.1, 0.2]])).save_pretrained(tmp_path / "heads")
        for name, message in (
            ("llama", "convert it with --attention chained, or .* `hf-lip convert-attention`"),
            ("trained", "the checkpoint trains its discounts"),
            ("converted", "the checkpoint trains its discounts"),
            ("heads", "one for each head"),
        ):
            words = {"model_name_or_path": str(tmp_path / name), "gamma": [0.5], "gamma_warmup_steps": 2}
            with pytest.raises(ValueError, match=message):
                gamma_schedule(
                    build_model(SequenceModelArguments(**words), 40, 8, {}, use_rope=True),
                    SequenceModelArguments(**words),
                )
        model = build(gamma=[0.5])
        for gamma in ([1.2], [0.1, 0.2, 0.3]):
            words = SequenceModelArguments(gamma=[0.5], gamma_warmup_steps=2)
            words.gamma = gamma
            with pytest.raises(ValueError, match="gamma"):
                gamma_schedule(model, words)


class TestTrainingArguments:
    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"max_steps": 0}, "--max_steps must be > 0"),
            ({"max_steps": 5, "num_train_epochs": 5}, "exclude each other"),
            ({"adam_betas": [0.9]}, "--adam_betas must be two numbers"),
            ({"learning_rate": math.nan}, "--learning_rate must be > 0"),
            ({"warmup_steps": -1}, "--warmup_steps must be >= 0"),
        ],
    )
    def test_wrong_ones_are_refused_with_their_name(self, changes, message):
        with pytest.raises(ValueError, match=message):
            SequenceTrainingArguments(**changes)

    def test_epochs_need_an_end(self):
        assert SequenceTrainingArguments(num_train_epochs=3).num_steps(7) == 21
        assert SequenceTrainingArguments().num_steps(None) == 1500
        with pytest.raises(ValueError, match="--num_train_epochs needs data that end"):
            SequenceTrainingArguments(num_train_epochs=3).num_steps(None)

    def test_what_changes_weights_is_part_of_a_run(self):
        identity = run_identity(SequenceTrainingArguments(), SequenceModelArguments())
        assert {"seed", "learning_rate", "max_steps", "gamma", "train_batch_size"} <= set(identity)
        assert not {"output_dir", "eval_steps", "logging_steps", "num_workers"} & set(identity)
