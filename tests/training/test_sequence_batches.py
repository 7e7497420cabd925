# SPDX-License-Identifier: Apache-2.0
"""Training data as functions of the step: whatever the processes, micro-batches, workers and resumes."""

import itertools

import numpy as np
import pytest
import torch

from hf_lip.data import BoxesTask, ChainsTask, PermutationsTask, RandomChainsTask, tracking_dataset, tracking_tokenizer
from hf_lip.data.generation import split_of
from hf_lip.training.sequence_batches import FileTexts, GeneratedSamples, StepBatches, dense_batch
from hf_lip.training.sequence_questions import encode_texts
from hf_lip.training.sequence_tasks import TrackingArguments, sample_rows


class TestSamples:
    @pytest.mark.parametrize(
        "task",
        [ChainsTask(num_state_changes=(1, 5)), PermutationsTask(form="text"), BoxesTask(num_operations=2)],
        ids=["chains", "permutations", "boxes"],
    )
    def test_rows_are_those_of_tracking_dataset(self, task):
        expected = list(tracking_dataset(task, 4, "validation", seed=3))
        found = [row for index in range(4) for row in sample_rows(task, index, "validation", seed=3, split_seed=2255)]
        assert found == expected

    def test_a_task_that_can_not_be_split_is_refused(self):
        # two samples in three splits
        one = RandomChainsTask(num_statements=1, num_values=2)
        splits = ("train", "validation", "test")
        empty = [split for split in splits if not list(self.drawn(one, split))]
        assert empty
        with pytest.raises(ValueError, match=f"too few different samples to be split|split '{empty[0]}'"):
            sample_rows(one, 0, empty[0], seed=0, split_seed=0)

    def drawn(self, task, split):
        rng = np.random.default_rng(0)
        for _ in range(50):
            if task.sample(rng, lambda key: split_of(key, 0) == split) is not None:
                yield True

    def test_dense_rows_are_padded_to_the_longest(self):
        rows = [
            row
            for index in range(3)
            for row in sample_rows(ChainsTask(num_state_changes=(1, 9)), index, "train", seed=0, split_seed=0)
        ]
        batch = dense_batch(rows)
        for place, row in enumerate(rows):
            count = len(row["labels"])
            assert batch["statement_ids"][place, :count].tolist() == row["statement_ids"]
            assert batch["labels"][place, :count].tolist() == row["labels"]
            assert set(batch["labels"][place, count:].tolist()) <= {-100}


def generated(**changes):
    arguments = TrackingArguments(**{"num_state_changes": [1, 7], **changes})
    return GeneratedSamples(arguments, 5, 12, None)


def sequences(batch):
    """The supervised tokens of each row, whatever its padding."""
    return sorted(tuple(row[row != -100].tolist()) for row in batch["labels"])


class TestSteps:
    def test_processes_and_micro_batches_share_the_samples_of_a_step(self):
        whole = sequences(StepBatches(generated(), 10, 12)[3][0])
        for processes, micro in itertools.product((1, 2, 3), (1, 2)):
            parts = [
                part
                for index in range(processes)
                for part in StepBatches(
                    generated(), 10, 12, num_micro_batches=micro, process_index=index, num_processes=processes
                )[3]
            ]
            assert len(parts) == processes * micro
            assert {len(part["labels"]) for part in parts} == {12 // (processes * micro)}
            assert sorted(row for part in parts for row in sequences(part)) == whole

    def test_micro_batches_hold_samples_of_like_length(self):
        lengths = [part["labels"].shape[1] for part in StepBatches(generated(), 10, 12, num_micro_batches=4)[0]]
        assert lengths == sorted(lengths)
        assert lengths[0] < lengths[-1]

    def test_a_later_start_and_workers_change_nothing(self):
        batches = StepBatches(generated(), 6, 12)
        every = [parts[0]["labels"] for parts, _ in batches.from_step(0, None, 0)]
        assert len(every) == 6
        for workers in (0, 2):
            later = [parts[0]["labels"] for parts, _ in batches.from_step(4, None, workers)]
            assert len(later) == 2
            assert all(torch.equal(*pair) for pair in zip(later, every[4:]))

    def test_steps_have_fresh_samples(self):
        batches = StepBatches(generated(), 4, 12)
        seen = [row for step in range(4) for row in sequences(batches[step][0])]
        assert len(set(seen)) > 40


class TestCurricula:
    def lengths(self, step, **changes):
        return [row["num_state_changes"] for row in generated(**changes).draw(step, (step + 1) / 10, range(12))]

    def test_grow_reaches_all_lengths_at_its_share(self):
        early = self.lengths(0, curriculum="grow", num_state_changes=[1, 63])
        late = self.lengths(5, curriculum="grow", num_state_changes=[1, 63])
        assert max(early) <= 11
        assert max(late) > 30

    def test_log_gives_every_sample_of_a_step_one_number(self):
        seen = []
        for step in range(40):
            (number,) = set(self.lengths(step, curriculum="log", num_state_changes=[1, 63]))
            seen.append(number)
        # a sixth of a logarithmic scale lies below 2 and a sixth above 32
        assert sum(number < 8 for number in seen) > 10
        assert max(seen) > 31

    def test_constant_length_gives_shorter_chains_more_entities(self):
        for step in range(10):
            rows = generated(curriculum="log", num_state_changes=[1, 15], constant_length=True).draw(
                step, (step + 1) / 10, range(12)
            )
            assert {len(row["labels"]) for row in rows} <= set(range(22, 35))


def file_texts(questions, batch_size=4, worlds=6):
    task = BoxesTask(num_boxes=2, num_operations=2)
    tokenizer = tracking_tokenizer(task.vocabulary())
    texts = encode_texts(list(tracking_dataset(task, worlds)), tokenizer, ("sample_id",))
    return FileTexts(texts, questions, 0, batch_size)


class TestFiles:
    def test_an_epoch_has_every_text_once_in_an_order_of_its_own(self):
        samples = file_texts(questions=2, batch_size=3)
        assert samples.steps_per_epoch == 2
        epochs = [[samples.draw(step, 0.5, range(3)) for step in (first, first + 1)] for first in (0, 2)]
        orders = [[pair[1][0].row["sample_id"] for part in epoch for pair in part] for epoch in epochs]
        assert [sorted(order) for order in orders] == [list(range(6))] * 2
        assert orders[0] != orders[1]
        asked = [
            {
                pair[1][0].row["sample_id"]: [(q.row["step"], q.row["box"]) for q in pair[1]]
                for part in epoch
                for pair in part
            }
            for epoch in epochs
        ]
        assert all(len(set(questions)) == 2 for epoch in asked for questions in epoch.values())
        assert asked[0] != asked[1]

    def test_zero_makes_every_question_a_sequence(self):
        samples = file_texts(questions=0)
        assert samples.steps_per_epoch == 9
        drawn = [samples.draw(step, 0.5, range(4)) for step in range(9)]
        rows = {(q.row["sample_id"], q.row["step"], q.row["box"]) for part in drawn for _, (q,) in part}
        assert len(rows) == 36
        assert "text_ids" not in samples.collate(drawn[0])

    def test_a_batch_larger_than_the_data_is_refused(self):
        with pytest.raises(ValueError, match="--train_batch_size is 7, more than the 6 samples"):
            file_texts(questions=2, batch_size=7)


class TestArguments:
    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"task": "boxes", "num_entities": 3}, "--num_entities is no option of --task boxes"),
            ({"task": "babi"}, "--task babi needs --data_path"),
            ({"task": "babi", "data_path": "x"}, "needs --babi_task"),
            ({"task": "boxes", "boxes_train": "x"}, "give --boxes_eval"),
            (
                {"task": "boxes", "boxes_train": "x", "boxes_eval": ["y"], "num_boxes": 3},
                "--num_boxes is for generated",
            ),
            ({"num_state_changes": [5, 2]}, "--num_state_changes must be a number or the smallest and the largest"),
            ({"num_entities": 0}, "`num_entities`"),
            ({"num_variables": 3}, "`num_variables`"),
            ({"curriculum": "log", "task": "random_chains"}, "--curriculum log is no option of --task random_chains"),
            ({"curriculum": "log", "task": "boxes"}, "--curriculum log is no option of --task boxes"),
            ({"task": "boxes", "rename_objects": True}, "--rename_objects is for worlds of files"),
            ({"task": "boxes", "fresh_operations": True}, "--fresh_operations is for worlds of files"),
            ({"curriculum": "grow", "curriculum_power": 0.0}, "--curriculum_power must be > 0"),
            ({"curriculum": "log", "curriculum_loss": 0.1}, "--curriculum_loss needs --curriculum grow"),
            ({"curriculum": "grow", "curriculum_loss": 0.0}, "--curriculum_loss must be > 0"),
            ({"constant_length": True}, "needs --curriculum log"),
            ({"curriculum": "grow", "curriculum_share": 2.0}, "at most 1"),
            ({"task": "boxes", "boxes_operations": ["fly=1"]}, "`operations` must be weights"),
            ({"task": "boxes", "boxes_operations": ["move"]}, "--boxes_operations takes name=value"),
            ({"eval_generate": True}, "--eval_generate compares sets"),
            ({"eval_samples": 0}, "--eval_samples must be > 0"),
        ],
    )
    def test_wrong_ones_are_refused_with_their_name(self, changes, message):
        with pytest.raises(ValueError, match=message):
            TrackingArguments(**changes)

    def test_both_evaluations_have_the_words_of_training(self):
        near, far = TrackingArguments(num_state_changes=[1, 3], eval_num_state_changes=[4, 9]).tasks()
        assert near.vocabulary() == far.vocabulary()
        assert np.max([row["num_state_changes"] for row in sample_rows(far, 0, "test", seed=0, split_seed=0)]) >= 4
