# SPDX-License-Identifier: Apache-2.0
"""Accuracy by depth: of tokens, of whole answers as greedy decoding gives them, of sets, of whole states."""

import pytest
import torch
from accelerate import Accelerator

from hf_lip import ChacalConfig, ChacalForCausalLM
from hf_lip.data import (
    BoxesTask,
    ChainsTask,
    TrackingCollator,
    embed_statements,
    encode_answers,
    tracking_dataset,
    tracking_tokenizer,
)
from hf_lip.tracking_metrics import exact_match_by_depth, exact_matches, predicted_tokens, whole_state_accuracy
from hf_lip.training.sequence_evaluation import EvaluationSet, describe, evaluate_tracking, generated_rows
from hf_lip.training.sequence_objective import SequenceObjective
from hf_lip.training.sequence_questions import encode_texts, packed_batch
from hf_lip.training.sequence_tasks import TrackingArguments


def tiny(vocab_size, **changes):
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    return ChacalForCausalLM(ChacalConfig(vocab_size=vocab_size, pad_token_id=0, **{**sizes, **changes}))


@pytest.fixture(scope="module")
def boxes():
    """A model that has learnt some of the answers of small worlds, tokenizer, task, rows, the evaluation of them."""
    torch.manual_seed(0)
    arguments = TrackingArguments(task="boxes", eval_samples=12)
    task = BoxesTask(num_boxes=2, max_objects=2, num_operations=2, objects=("cup", "map", "pen", "hat"))
    tokenizer = tracking_tokenizer(task.vocabulary())
    texts = encode_texts(list(tracking_dataset(task, 24)), tokenizer, ("sample_id",))
    batch = packed_batch([(text.ids, text.questions) for text in texts])
    model = tiny(len(tokenizer), initializer_range=0.1)
    objective, count = SequenceObjective(model), (batch["labels"] != -100).sum()
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(60):
        objective(batch, count).backward()
        optimizer.step()
        optimizer.zero_grad()
    rows = generated_rows(task, arguments)
    chosen = EvaluationSet.of_texts("test", encode_texts(rows, tokenizer, ("sample_id",)), arguments, 20)
    return model.eval(), tokenizer, task, rows, chosen


@pytest.fixture(scope="module")
def answers(boxes):
    """Greedy answers to the rows, by `generate` on separate prompts."""
    model, tokenizer, task, rows, _ = boxes
    encoded = encode_answers(tracking_dataset(task, 12, "test"), tokenizer)
    assert encoded["prompt"] == [row["prompt"] for row in rows]
    prompts = TrackingCollator(padding_side="left", prompts_only=True)(
        [encoded[place] for place in range(len(encoded))]
    )
    out = model.generate(**prompts, max_new_tokens=16, do_sample=False)[:, prompts["input_ids"].shape[1] :]
    return [tokenizer.decode(ids[: (ids == 2).nonzero()[0, 0]] if 2 in ids else ids) for ids in out]


class TestAnswers:
    def test_accuracies_are_those_of_greedy_decoding(self, boxes, answers):
        model, _, _, rows, chosen = boxes
        found = evaluate_tracking(model, chosen, Accelerator(cpu=True))
        truths = [row["answer"] for row in rows]
        right = exact_matches(answers, truths)
        # a model that answers all or nothing would show nothing
        assert 0.1 < right.mean() < 0.95
        assert (found["accuracy"], found["num_examples"]) == (pytest.approx(right.mean()), len(rows))
        for name in ("numops", "implicit_hops", "num_moves", "step"):
            expected = exact_match_by_depth(answers, truths, [row[name] for row in rows])
            assert {int(depth): score["accuracy"] for depth, score in found[f"by_{name}"].items()} == {
                depth: pytest.approx(score.accuracy) for depth, score in expected.items()
            }
            assert sum(score["num_examples"] for score in found[f"by_{name}"].values()) == len(rows)
        states = [(row["sample_id"], row["step"]) for row in rows]
        assert found["whole_state_accuracy"] == pytest.approx(whole_state_accuracy(answers, truths, states))
        assert found["num_states"] == len(set(states))

    def test_with_a_tokenizer_sets_are_compared(self, boxes, answers):
        model, tokenizer, _, rows, chosen = boxes
        truths = [row["answer"] for row in rows]
        found = evaluate_tracking(model, chosen, Accelerator(cpu=True), tokenizer)
        assert found["accuracy"] == pytest.approx(exact_matches(answers, truths, kind="contents").mean())

    def test_an_answer_in_another_order_is_the_same_set(self, boxes):
        _, tokenizer, _, rows, _ = boxes
        arguments = TrackingArguments(task="boxes")
        two = [row for row in rows if "and" in row["answer"]]
        words = two[0]["answer"].split()
        learnt, turned = two[:1], [{**two[0], "answer": f"contains the {words[5]} and the {words[2]}"}]
        own = tiny(len(tokenizer), initializer_range=0.1)
        batch = packed_batch([(text.ids, text.questions) for text in encode_texts(learnt, tokenizer, ("sample_id",))])
        optimizer = torch.optim.AdamW(own.parameters(), lr=5e-3)
        for _ in range(30):
            SequenceObjective(own)(batch, torch.tensor(1.0)).backward()
            optimizer.step()
            optimizer.zero_grad()
        chosen = EvaluationSet.of_texts("test", encode_texts(turned, tokenizer, ("sample_id",)), arguments, 20)
        assert evaluate_tracking(own.eval(), chosen, Accelerator(cpu=True))["accuracy"] == 0
        assert evaluate_tracking(own.eval(), chosen, Accelerator(cpu=True), tokenizer)["accuracy"] == 1


def test_dense_accuracy_is_that_of_tokens_by_hops():
    arguments = TrackingArguments(num_state_changes=[1, 5], eval_samples=9)
    task, _ = arguments.tasks()
    assert isinstance(task, ChainsTask)
    model = tiny(4 + len(task.vocabulary()), use_rope=False).eval()
    rows = generated_rows(task, arguments)
    found = evaluate_tracking(model, EvaluationSet.of_rows("test", rows, arguments, 4), Accelerator(cpu=True))
    right, sequences = {}, []
    for row in rows:
        with torch.no_grad():
            embeds = embed_statements(model.get_input_embeddings(), torch.tensor([row["statement_ids"]]))
            guesses = predicted_tokens(model(inputs_embeds=embeds).logits)[0].tolist()
        hits = [(hop, guess == label) for hop, guess, label in zip(row["hops"], guesses, row["labels"]) if hop >= 0]
        for hop, hit in hits:
            right.setdefault(hop, []).append(hit)
        sequences.append(all(hit for _, hit in hits))
    assert {int(hop): (score["accuracy"], score["num_examples"]) for hop, score in found["by_hops"].items()} == {
        hop: (pytest.approx(sum(hits) / len(hits)), len(hits)) for hop, hits in sorted(right.items())
    }
    assert [score["minimal_layers"] for score in found["by_hops"].values()] == [0, 1, 2, 2, 3, 3]
    assert found["num_states"] == 9
    assert found["whole_state_accuracy"] == sum(sequences) / 9


def test_the_line_of_a_log_has_bands_that_need_equal_layers():
    score = {"accuracy": 1.0, "num_examples": 2}
    metrics = {
        "accuracy": 0.9,
        "by_hops": {"-1": score, "0": score, "2": score, "3": {"accuracy": 0.5, "num_examples": 6}},
    }
    assert describe(metrics, "hops") == (
        "90.00  -1: 100.0 (least 100.0)  0: 100.0 (least 100.0)  2-3: 62.5 (least 50.0)"
    )
