# SPDX-License-Identifier: Apache-2.0
"""`transformers.Trainer` trains the models as they are, with the metrics as its `compute_metrics`."""

from functools import partial

import pytest
import torch
from transformers import Trainer, TrainingArguments

import hf_lip
from hf_lip.data import PermutationsTask, TrackingCollator, dataset_to_tensors, load_image_dataset, tracking_dataset
from hf_lip.metrics import STANDARD_RADII, certification_metrics, compute_certification_metrics
from hf_lip.tracking_metrics import compute_tracking_metrics, predicted_tokens


IMAGE_FIGURES = {
    *("eval_clean_accuracy", "eval_average_certified_radius", "eval_abstention_rate"),
    *(f"eval_certified_accuracy_at_{name}" for name in STANDARD_RADII),
}


def arguments(folder, **options):
    return TrainingArguments(
        output_dir=str(folder),
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        per_device_train_batch_size=64,
        per_device_eval_batch_size=128,
        **options,
    )


def digits(split):
    images, labels = dataset_to_tensors(
        load_image_dataset("digits", split), image_size=8, num_channels=1, progress=False
    )
    return [{"pixel_values": image, "labels": label} for image, label in zip(images, labels.tolist())]


def test_trainer_trains_a_certified_classifier(tmp_path):
    config = hf_lip.LipschitzVisionConfig(
        block_type="sll", depths=[0], hidden_sizes=[1], pool_size=1, dense_size=64, num_dense_layers=2,
        dense_hidden_size=32, image_size=8, num_channels=1, num_labels=10,
    )  # fmt: skip
    held_out = digits("test")
    trainer = Trainer(
        model=hf_lip.LipschitzVisionForImageClassification(config),
        args=arguments(tmp_path, num_train_epochs=6, learning_rate=0.02, eval_strategy="epoch"),
        train_dataset=digits("train"),
        eval_dataset=held_out,
        compute_metrics=compute_certification_metrics,
    )
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    assert set(after) > IMAGE_FIGURES
    assert before["eval_clean_accuracy"] < 0.4
    assert after["eval_clean_accuracy"] > 0.85
    assert after["eval_clean_accuracy"] > after["eval_certified_accuracy_at_36/255"] > 0.4
    assert after["eval_average_certified_radius"] > before["eval_average_certified_radius"] + 0.1
    logged = [entry for entry in trainer.state.log_history if "eval_clean_accuracy" in entry]
    # after each epoch and at the end
    assert len(logged) == 7
    # the last epoch's figures are those of the model, which has batches of 128 and a rest of 66
    model = trainer.model.eval()
    with torch.no_grad():
        output = model(pixel_values=torch.stack([row["pixel_values"] for row in held_out]))
    labels = [row["labels"] for row in held_out]
    expected = certification_metrics(output.logits.argmax(dim=-1), labels, output.certified_radius)
    assert {f"eval_{name}": value for name, value in expected.items()} == {
        name: pytest.approx(after[name], rel=1e-9) for name in IMAGE_FIGURES
    }
    # saved by Trainer, certified on disk
    trainer.save_model(str(tmp_path / "saved"))
    assert hf_lip.verify_checkpoint(tmp_path / "saved").ok


TASK = PermutationsTask(num_elements=3, num_moves=(1, 4))
VOCABULARY = 4 + len(TASK.vocabulary())


def aligned(rows):
    """Labels of a token classifier, which answers at the token itself where a causal model predicts the next one."""
    batch = TrackingCollator()(rows)
    for name, filler in (("labels", -100), ("hops", -1)):
        batch[name] = torch.cat([batch[name][:, 1:], torch.full((len(rows), 1), filler)], dim=1)
    return batch


@pytest.mark.parametrize("kind", ["causal", "tokens"])
def test_trainer_trains_chained_attention(tmp_path, kind):
    config = hf_lip.ChacalConfig(
        vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, pad_token_id=0,
        num_labels=VOCABULARY,
    )  # fmt: skip
    options = {
        "causal": (hf_lip.ChacalForCausalLM, TrackingCollator(), compute_tracking_metrics),
        "tokens": (hf_lip.ChacalForTokenClassification, aligned, partial(compute_tracking_metrics, causal=False)),
    }
    model, collator, metrics = options[kind]
    shared = {
        "args": arguments(
            tmp_path, max_steps=80, learning_rate=0.005, label_names=["labels", "hops"], remove_unused_columns=False
        ),
        "train_dataset": tracking_dataset(TASK, 600, "train"),
        "eval_dataset": tracking_dataset(TASK, 150, "test"),
        "data_collator": collator,
        "compute_metrics": metrics,
    }
    trainer = Trainer(model=model(config), **shared)
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    assert {"eval_exact_match", *(f"eval_exact_match_at_depth_{depth}" for depth in range(1, 5))} <= set(after)
    assert before["eval_exact_match"] < 0.3
    assert after["eval_exact_match"] > 0.5
    # one move is read off, more are to be composed
    assert after["eval_exact_match_at_depth_1"] > 0.95
    assert after["eval_exact_match_at_depth_2"] > 0.25
    if kind == "causal":
        shared["preprocess_logits_for_metrics"] = lambda logits, labels: predicted_tokens(logits)
        slim = Trainer(model=trainer.model, **shared).evaluate()
        assert slim["eval_exact_match"] == after["eval_exact_match"]
