# SPDX-License-Identifier: Apache-2.0
"""Questions that share a text: the tokens, losses and gradients of separate rows, and no question sees another."""

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from hf_lip import ChacalConfig, ChacalForCausalLM
from hf_lip.data import BoxesTask, encode_answers, tracking_dataset, tracking_tokenizer
from hf_lip.models.chacal.converted import ChacalLlamaConfig, ChacalLlamaForCausalLM
from hf_lip.training.sequence_objective import SequenceObjective, sequence_logits
from hf_lip.training.sequence_questions import encode_texts, packed_batch, row_batch
from hf_lip.training.sequence_text import byte_tokenizer


TASK = BoxesTask(num_boxes=3, num_operations=3, operations={"contents": 1.0, "put": 1.0})
TOKENIZER = tracking_tokenizer(TASK.vocabulary())
SIZES = {
    **{"vocab_size": len(TOKENIZER), "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4},
    **{"intermediate_size": 48, "initializer_range": 0.2, "pad_token_id": 0, "max_position_embeddings": 96},
}


def rows(num_worlds=3):
    return list(tracking_dataset(TASK, num_worlds))


def pairs(every=1):
    return [(text.ids, text.questions[::every]) for text in encode_texts(rows(), TOKENIZER, ("sample_id",))]


def made_models():
    mixed = ["full_attention", "chained_attention"]
    yield "mixed", lambda: ChacalForCausalLM(ChacalConfig(**SIZES, layer_types=mixed, gamma_learnable=True))
    yield "keep", lambda: ChacalForCausalLM(ChacalConfig(**SIZES, diagonal="keep", num_key_value_heads=2))
    yield "normalized, no positions", lambda: ChacalForCausalLM(ChacalConfig(**SIZES, normalize=True, use_rope=False))
    yield "llama", lambda: LlamaForCausalLM(LlamaConfig(**SIZES))
    yield "converted", lambda: ChacalLlamaForCausalLM(ChacalLlamaConfig(**SIZES, chain_gamma=0.8))
    gpt2 = {"vocab_size": len(TOKENIZER), "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 96}
    dropouts = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    yield "gpt2", lambda: GPT2LMHeadModel(GPT2Config(**gpt2, **dropouts))


MODELS = dict(made_models())


class TestEncoding:
    def test_rows_are_those_of_encode_answers(self):
        expected = encode_answers(tracking_dataset(TASK, 3), TOKENIZER)
        texts = encode_texts(rows(), TOKENIZER, ("sample_id",))
        assert [len(text.questions) for text in texts] == [12, 12, 12]
        found = [[*text.ids[: q.seen], *q.ids] for text in texts for q in text.questions]
        assert found == [row["input_ids"] for row in expected]
        labels = [row["labels"] for row in expected]
        assert [
            [-100] * (len(row) - q.num_answer) for row, q in zip(found, (q for t in texts for q in t.questions))
        ] == [[label for label in row if label == -100] for row in labels]
        batch = row_batch([(text.ids, text.questions) for text in texts])
        for ids, answers, row in zip(batch["input_ids"], batch["labels"], expected):
            assert ids[: len(row["input_ids"])].tolist() == row["input_ids"]
            assert answers[: len(row["labels"])].tolist() == row["labels"]
            assert set(answers[len(row["labels"]) :].tolist()) <= {-100}

    def test_other_tokenizers_give_the_same_rows_as_encode_answers(self):
        tokenizer = byte_tokenizer()
        texts = encode_texts(rows(1), tokenizer, ("sample_id",))
        expected = encode_answers(tracking_dataset(TASK, 1), tokenizer)
        found = [[*text.ids[: q.seen], *q.ids] for text in texts for q in text.questions]
        assert found == [row["input_ids"] for row in expected]

    def test_questions_share_nearly_all_of_their_text(self):
        (text, *_) = encode_texts(rows(1), TOKENIZER, ("sample_id",))
        assert max(len(question.ids) - question.num_answer for question in text.questions) <= 2
        assert text.longest() == max(
            len(row["input_ids"]) for row in encode_answers(tracking_dataset(TASK, 1), TOKENIZER)
        )

    @pytest.mark.parametrize(
        ("row", "message"),
        [
            ({"prompt": "Box 0 contains the zebra .", "answer": "is empty"}, "does not know: zebra"),
            ({"prompt": "Box 0", "answer": "contains the zebra"}, "does not know: zebra"),
            ({"prompt": "Box 0", "answer": " "}, "empty answer"),
            ({"prompt": "", "answer": "is empty"}, "empty prompt"),
        ],
    )
    def test_bad_rows_are_refused(self, row, message):
        with pytest.raises(ValueError, match=message):
            encode_texts([{**row, "sample_id": 0}], TOKENIZER, ("sample_id",))

    def test_no_rows_are_refused(self):
        with pytest.raises(ValueError, match="no question"):
            encode_texts([], TOKENIZER, ("sample_id",))


class TestPacking:
    @pytest.mark.parametrize("build", MODELS.values(), ids=MODELS.keys())
    def test_loss_and_gradients_are_those_of_separate_rows(self, build):
        model = build().train()
        objective, count = SequenceObjective(model), torch.tensor(50.0)
        found = []
        for batch in (row_batch(pairs(2)), packed_batch(pairs(2))):
            model.zero_grad()
            loss = objective(batch, count)
            loss.backward()
            found.append((loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters()}))
        torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-5, atol=1e-5)
        for key, gradient in found[0][1].items():
            torch.testing.assert_close(
                found[1][1][key], gradient, rtol=1e-3, atol=2e-5, msg=lambda m, key=key: f"{key}: {m}"
            )

    @pytest.mark.parametrize("build", MODELS.values(), ids=MODELS.keys())
    def test_texts_may_have_different_numbers_of_questions(self, build):
        model = build().eval()
        (first, several), (second, others), *_ = pairs()
        texts = [(first, several[:1]), (second, others[:4]), (first, several[1:3])]
        with torch.no_grad():
            packed, rows = (sequence_logits(model, make(texts)) for make in (packed_batch, row_batch))
        for (_, question), row, alone in zip([(i, q) for i, qs in texts for q in qs], packed, rows, strict=True):
            count, length = question.seen, len(question.ids)
            torch.testing.assert_close(row[:length], alone[count : count + length], rtol=0, atol=1e-5)

    def test_questions_see_neither_each_other_nor_what_comes_after_them(self):
        model = ChacalForCausalLM(ChacalConfig(**SIZES)).eval()
        batch = packed_batch(pairs())
        with torch.no_grad():
            before = sequence_logits(model, batch)
            early = int(batch["seen"].argmin())
            changed = {**batch, "input_ids": batch["input_ids"].clone(), "text_ids": batch["text_ids"].clone()}
            others = torch.arange(len(before)) != early
            changed["input_ids"][others] = 7
            seen, text = int(batch["seen"][early]), int(batch["text"][early])
            changed["text_ids"][text, seen:] = 9
            after = sequence_logits(model, changed)
        assert torch.equal(after[early], before[early])
        assert not torch.equal(after[others], before[others])

    def test_a_text_is_cut_after_the_last_question_on_it(self):
        (ids, questions), *_ = pairs()
        batch = packed_batch([(ids, questions[:3])])
        assert batch["text_ids"].shape[1] == max(question.seen for question in questions[:3]) < len(ids)
