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

    def test_worlds_grow_in_boxes_then_in_operations(self):
        arguments = TrackingArguments(
            task="boxes", num_boxes=4, num_operations=6, curriculum="grow", curriculum_power=2.0, questions_per_text=9
        )
        samples = GeneratedSamples(arguments, 5, 3, tracking_tokenizer(arguments.tasks()[0].vocabulary()))
        rows = [
            [question.row for _, questions in samples.draw(step, progress, range(3)) for question in questions]
            for step, progress in enumerate((0.05, 0.35, 0.6, 1.0))
        ]
        sizes = [(1 + max(row["box"] for row in part), max(row["step"] for row in part)) for part in rows]
        # the square of the share of the 8 changes: two boxes more, six operations
        assert sizes == [(2, 0), (4, 1), (4, 6), (4, 6)]
        assert [len(part) for part in rows] == [6, 24, 27, 27]


def file_texts(questions, batch_size=4, worlds=6, **options):
    task = BoxesTask(num_boxes=2, num_operations=2)
    tokenizer = tracking_tokenizer(task.vocabulary())
    texts = encode_texts(list(tracking_dataset(task, worlds)), tokenizer, ("sample_id",))
    return FileTexts(texts, questions, 0, batch_size, **options)


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

    def test_questions_of_later_steps_wait(self):
        samples = file_texts(questions=4, last_step=lambda progress: round(2 * progress))
        for progress in (0.0, 0.5, 1.0):
            drawn = samples.draw(0, progress, range(4))
            steps = [question.row["step"] for _, questions in drawn for question in questions]
            assert max(steps) == 2 * progress
            assert len(steps) == (8 if progress == 0.0 else 16)

    @pytest.mark.parametrize("questions", [0, 3])
    def test_names_of_a_text_and_its_answers_become_others_in_the_same_order(self, questions):
        task = BoxesTask(num_boxes=2, num_operations=2)
        tokenizer = tracking_tokenizer(task.vocabulary())
        tokens = tokenizer.convert_tokens_to_ids(list(task.objects))
        plain, renamed = file_texts(questions), file_texts(questions, renamed=tokens)
        names = []
        for step in (0, 1):
            for old, new in zip(plain.draw(step, 1.0, range(4)), renamed.draw(step, 1.0, range(4)), strict=True):
                before = np.concatenate([old[0], *(question.ids for question in old[1])])
                after = np.concatenate([new[0], *(question.ids for question in new[1])])
                pairs = set(zip(before.tolist(), after.tolist(), strict=True))
                # one name for another, all else as it was
                assert len(pairs) == len({first for first, _ in pairs}) == len({second for _, second in pairs})
                assert all((first in tokens) == (second in tokens) for first, second in pairs)
                assert all(first == second for first, second in pairs if first not in tokens)
                changed = sorted(pair for pair in pairs if pair[0] in tokens)
                assert [second for _, second in changed] == sorted(second for _, second in changed)
                names += changed
        assert sum(first != second for first, second in names) > 0.9 * len(names)
        # drawn anew for every text
        assert len(set(names)) > len({first for first, _ in names})

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
            (
                {"task": "boxes", "boxes_train": "x", "boxes_eval": ["y"], "curriculum": "grow"}
                | {"questions_per_text": 0},
                "leave out --questions_per_text 0",
            ),
            ({"task": "boxes", "rename_objects": True}, "--rename_objects is for worlds of files"),
            ({"curriculum": "grow", "curriculum_power": 0.0}, "--curriculum_power must be > 0"),
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
