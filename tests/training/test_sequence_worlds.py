# SPDX-License-Identifier: Apache-2.0
"""Training texts of Boxes: curriculum, names, questions."""

import re
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from hf_lip.data import BoxesTask, tracking_dataset, tracking_tokenizer
from hf_lip.data.box_samples import BoxesSample, as_last_named, object_names, rows_of_sample
from hf_lip.data.generation import split_of
from hf_lip.training.sequence_tasks import TrackingArguments
from hf_lip.training.sequence_worlds import BoxTexts, worlds_of_rows


TASK = BoxesTask(num_boxes=4, num_operations=6)
TOKENIZER = tracking_tokenizer(TASK.vocabulary())
FILES = {"task": "boxes", "boxes_train": "x", "boxes_eval": ["y"]}


def of_files(batch_size=4, worlds=12, **changes):
    rows = list(tracking_dataset(TASK, worlds))
    arguments = TrackingArguments(**FILES, **{"questions_per_text": 5, **changes})
    return BoxTexts(arguments, TOKENIZER, 3, batch_size, worlds_of_rows(rows)), rows


def generated(batch_size=4, **changes):
    sizes = {"num_boxes": 4, "num_operations": 6, "questions_per_text": 5}
    arguments = TrackingArguments(task="boxes", **{**sizes, **changes})
    return BoxTexts(arguments, TOKENIZER, 3, batch_size)


def questions(drawn):
    return [question for _, several in drawn for question in several]


def described(sample):
    ids, _ = sample
    words = TOKENIZER.convert_ids_to_tokens(ids.tolist())[1:]
    # the longest prompt ends with its question
    text = " ".join(words).rpartition(" .")[0]
    return BoxesSample.of_text(re.sub(r" ([.,])", r"\1", text))


def sizes(drawn):
    return [(len(sample.contents), len(sample.operations)) for sample in map(described, drawn)]


class TestWorlds:
    def test_rows_of_files_give_their_worlds(self):
        samples, rows = of_files()
        assert len(samples.worlds) == 12
        texts = {row["prompt"].rpartition(" Box ")[0] for row in rows if row["step"] == 6}
        assert {BoxesSample.of_text(text) for text in texts} == set(samples.worlds)

    def test_questions_and_answers_are_the_rows_of_the_files(self):
        samples, rows = of_files()
        known = {(row["sample_id"], row["step"], row["box"]): row for row in rows}
        for _, question in ((s, q) for step in range(3) for s in samples.draw(step, 0.5, range(4)) for q in s[1]):
            row = known[question.row["sample_id"], question.row["step"], question.row["box"]]
            assert question.row == row
            answer = TOKENIZER.decode(question.ids[len(question.ids) - question.num_answer : -1])
            assert answer.split() == row["answer"].split()

    def test_an_epoch_has_every_world_once_in_an_order_of_its_own(self):
        samples, _ = of_files()
        assert samples.steps_per_epoch == 3
        epochs = [
            [
                q.row["sample_id"]
                for step in range(first, first + 3)
                for q in questions(samples.draw(step, 1.0, range(4)))
            ]
            for first in (0, 3)
        ]
        orders = [list(dict.fromkeys(epoch)) for epoch in epochs]
        assert [sorted(order) for order in orders] == [list(range(12))] * 2
        assert orders[0] != orders[1]
        assert set(Counter(epochs[0]).values()) == {5}

    def test_generated_worlds_are_fresh_and_depend_on_step_and_place_alone(self):
        samples = generated()
        drawn = samples.draw(2, 0.5, range(4))
        assert samples.steps_per_epoch is None
        alone = [samples.draw(2, 0.5, range(place, place + 1))[0] for place in range(4)]
        assert list(map(described, alone)) == list(map(described, drawn))
        others = {described(one) for step in (0, 1, 3) for one in samples.draw(step, 0.5, range(4))}
        assert not others & set(map(described, drawn))

    @pytest.mark.parametrize("asked", [0, 1])
    def test_zero_makes_rows_of_generated_questions(self, asked):
        samples = generated(questions_per_text=asked)
        drawn = samples.draw(0, 1.0, range(4))
        assert [len(several) for _, several in drawn] == [1] * 4
        assert ("text_ids" in samples.collate(drawn)) == bool(asked)

    def test_a_batch_larger_than_the_data_is_refused(self):
        with pytest.raises(ValueError, match="--train_batch_size is 13, more than the 12 samples"):
            of_files(batch_size=13)


class TestCurriculum:
    def drawn_sizes(self, samples, progress, steps=12):
        return [size for step in range(steps) for size in sizes(samples.draw(step, progress, range(4)))]

    @pytest.mark.parametrize("make", [generated, lambda **changes: of_files(**changes)[0]], ids=["generated", "files"])
    def test_worlds_grow_in_boxes_and_operations(self, make):
        samples = make(curriculum="grow", curriculum_share=0.5, questions_per_text=28)
        # texts end with the last step asked for: all are
        assert set(self.drawn_sizes(samples, 0.0)) == {(2, 0)}
        early = Counter(self.drawn_sizes(samples, 0.35))
        # half of them the largest
        assert set(early) == {(2, 0), (2, 1), (2, 2), (3, 3)}
        assert 20 <= early[3, 3] <= 34

    @pytest.mark.parametrize("make", [generated, lambda **changes: of_files(**changes)[0]], ids=["generated", "files"])
    def test_half_of_the_worlds_are_whole_from_its_end_on(self, make):
        samples = make(curriculum="grow", curriculum_share=0.5, questions_per_text=28)
        for progress in (0.5, 1.0):
            sizes = Counter(self.drawn_sizes(samples, progress))
            assert {(2, 0), (2, 1), (3, 3), (4, 6)} <= set(sizes)
            assert 18 <= sizes[4, 6] <= 36

    def test_small_worlds_have_the_names_of_the_files_and_are_never_the_same(self):
        samples, _ = of_files(curriculum="grow")
        drawn = [described(one) for step in range(6) for one in samples.draw(step, 0.4, range(4))]
        assert set(object_names(drawn)) <= set(object_names(samples.worlds))
        assert len({one for one in drawn if one.operations}) == sum(bool(one.operations) for one in drawn)

    @pytest.mark.parametrize("make", [generated, lambda **changes: of_files(**changes)[0]], ids=["generated", "files"])
    def test_the_smallest_worlds_have_every_kind_of_operation(self, make):
        samples = make(curriculum="grow", questions_per_text=28)
        # two boxes, one operation
        drawn = [described(one) for step in range(30) for one in samples.draw(step, 0.2, range(4))]
        kinds = Counter(one.operations[0].kind for one in drawn if one.operations)
        assert min(kinds[kind] for kind in ("move", "remove", "put")) > 8

    def test_small_worlds_have_all_initial_counts_and_whole_ones_those_of_their_split(self):
        samples = generated(batch_size=64, curriculum="grow", curriculum_share=0.5)
        counts = {}
        for progress in (0.0, 0.45, 0.5):
            drawn = [described(one) for step in range(4) for one in samples.draw(step, progress, range(64))]
            counts[progress] = {tuple(map(len, one.contents)) for one in drawn}
        assert len(counts[0.0]) == 16
        for key in (",".join(map(str, vector)) for progress in (0.45, 0.5) for vector in counts[progress]):
            assert key.count(",") < 3 or split_of(key.encode(), samples.arguments.split_seed) == "train"

    def test_worlds_of_all_boxes_have_initial_counts_of_the_files(self):
        samples, _ = of_files(curriculum="grow", questions_per_text=28)
        known = {tuple(map(len, world.contents)) for world in samples.worlds}
        drawn = [described(one) for step in range(40) for one in samples.draw(step, 1.0, range(4))]
        smaller = [one for one in drawn if len(one.contents) == 4 and len(one.operations) < 6]
        assert len(smaller) > 3
        assert {tuple(map(len, one.contents)) for one in smaller} <= known

    def test_files_with_few_objects_need_no_rules_without_one(self):
        text = "Box 0 contains the cup, Box 1 is empty. Move the cup from Box 0 to Box 1."
        worlds = [BoxesSample.of_text(text)] * 2
        drawn = BoxTexts(TrackingArguments(**FILES), TOKENIZER, 0, 2, worlds).draw(0, 0.0, range(2))
        assert {len(several) for _, several in drawn} == {4}
        with pytest.raises(ValueError, match="`objects` has 1 names"):
            BoxTexts(TrackingArguments(**FILES, curriculum="grow"), TOKENIZER, 0, 2, worlds)

    def test_worlds_that_get_stuck_are_an_error_and_no_endless_search(self):
        samples = generated(curriculum="grow", boxes_operations=["contents=1"], expected_objects=1e-12)
        with pytest.raises(ValueError, match="its worlds get stuck"):
            samples.draw(0, 0.3, range(4))

    def test_without_one_worlds_are_whole(self):
        assert set(self.drawn_sizes(generated(questions_per_text=28), 0.0, steps=2)) == {(4, 6)}

    def test_operations_grow_geometrically(self):
        arguments = TrackingArguments(**FILES, curriculum="grow", curriculum_share=0.5)
        shares = (0.0, 0.125, 0.25, 0.375, 0.5, 1.0)
        sizes = [arguments.world_size(7, 15, arguments.grown(share)) for share in shares]
        assert sizes == [(2, 0), (2, 1), (3, 3), (5, 7), (7, 15), (7, 15)]
        later = replace(arguments, curriculum_power=2.0)
        assert later.world_size(7, 15, later.grown(0.25)) == (2, 1)
        wide = replace(arguments, curriculum_boxes=5)
        assert [wide.world_size(7, 15, wide.grown(share)) for share in shares[:4]] == [(5, 0), (5, 1), (6, 3), (7, 7)]

    def test_the_smallest_worlds_may_have_all_boxes(self):
        drawn = self.drawn_sizes(generated(curriculum="grow", curriculum_boxes=4, questions_per_text=4), 0.1, steps=4)
        assert {boxes for boxes, _ in drawn} == {4}
        assert max(operations for _, operations in drawn) < 6

    @pytest.mark.parametrize("wrong", [{"curriculum_boxes": 1, "curriculum": "grow"}, {"curriculum_boxes": 3}])
    def test_boxes_of_a_curriculum_that_can_not_be(self, wrong):
        with pytest.raises(ValueError, match="--curriculum_boxes must be at least 2, and needs --curriculum grow"):
            TrackingArguments(task="boxes", **wrong)


class TestFreshOperations:
    def test_worlds_begin_as_those_of_the_files_and_go_on_by_the_rules(self):
        plain, _ = of_files()
        samples, _ = of_files(fresh_operations=True)
        goings_on = set()
        for step in range(6):
            drawn = [[described(one) for one in each.draw(step, 1.0, range(4))] for each in (plain, samples)]
            for old, new in zip(*drawn, strict=True):
                assert new.contents == old.contents
                assert len(new.operations) <= 6
                assert set(object_names([new])) <= set(samples.names)
                goings_on.add(new.operations)
                # raises at an operation that can not be done
                assert list(rows_of_sample(new, {(len(new.operations), 0)}, 0))
        assert len(goings_on) == 24
        assert not goings_on & {world.operations for world in samples.worlds}

    def test_of_a_curriculum_too(self):
        """Worlds of all boxes that are cut short begin as the files' too, smaller ones are made as ever."""
        options = {"curriculum": "grow", "curriculum_share": 1.0}
        plain, _ = of_files(**options)
        samples, _ = of_files(**options, fresh_operations=True)
        compared = 0
        for progress in (0.3, 0.9):
            for old, new in zip(*(each.draw(0, progress, range(4)) for each in (plain, samples)), strict=True):
                before, after = described(old), described(new)
                assert after.contents == before.contents
                compared += len(before.contents) == 4 and before.operations != after.operations
                assert len(before.contents) == 4 or before == after
        assert compared


class TestNames:
    def test_names_are_exchanged_anew_each_time(self):
        plain, _ = of_files()
        samples, _ = of_files(rename_objects=True)
        pairs = Counter()
        for step in range(9):
            for old, new in zip(plain.draw(step, 1.0, range(4)), samples.draw(step, 1.0, range(4)), strict=True):
                before, after = (TOKENIZER.convert_ids_to_tokens(ids.tolist()) for ids in (old[0], new[0]))
                names = set(object_names(plain.worlds))
                assert [name for name in before if name not in names] == [name for name in after if name not in names]
                assert [name in names for name in before] == [name in names for name in after]
                pairs.update(zip(before, after, strict=True))
                described(new)
        exchanged = [pair for pair in pairs if pair[0] != pair[1]]
        assert len(exchanged) > 100
        assert {name for _, name in exchanged} <= set(object_names(plain.worlds))

    def test_answers_are_those_of_the_renamed_text(self):
        samples, _ = of_files(rename_objects=True, curriculum="grow")
        for progress in (0.1, 0.4, 1.0):
            for sample in samples.draw(0, progress, range(4)):
                for question in sample[1]:
                    ids, _ = sample
                    text = described((ids[: question.seen], ()))
                    assert len(text.operations) == question.row["step"]
                    answer = TOKENIZER.decode(question.ids[len(question.ids) - question.num_answer : -1])
                    assert answer.split() == question.row["answer"].split()


class TestQuestions:
    def test_answers_in_the_order_of_the_text(self):
        drawn = {order: of_files(answer_order=order)[0].draw(0, 1.0, range(4)) for order in (None, "text")}
        pairs = list(zip(questions(drawn[None]), questions(drawn["text"]), strict=True))
        assert all(sorted(one.ids.tolist()) == sorted(other.ids.tolist()) for one, other in pairs)
        assert 0.05 < np.mean([one.ids.tolist() != other.ids.tolist() for one, other in pairs]) < 0.6
        assert all(other.row["answer"] == as_last_named(one.row)["answer"] for one, other in pairs)

    def test_changed_boxes_are_asked_for_as_often_as_told(self):
        shares = {}
        for weight in (None, 8.0):
            samples = generated(changed_weight=weight, questions_per_text=2)
            rows = [q.row for step in range(60) for q in questions(samples.draw(step, 1.0, range(4)))]
            shares[weight] = np.mean([row["numops"] > 0 for row in rows])
        assert 0.4 < shares[None] < 0.75
        assert shares[8.0] > 0.85

    def test_the_last_step_alone(self):
        samples = generated(query_steps="last", questions_per_text=3)
        assert {q.row["step"] for q in questions(samples.draw(0, 1.0, range(4)))} == {6}

    def test_no_question_twice(self):
        samples = generated(questions_per_text=28)
        for _, several in samples.draw(0, 1.0, range(4)):
            assert len({(q.row["step"], q.row["box"]) for q in several}) == 28


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"curriculum": "grow"}, "--curriculum grow makes new texts: leave out --questions_per_text 0"),
        ({"rename_objects": True}, "--rename_objects makes new texts"),
        ({"fresh_operations": True}, "--fresh_operations makes new texts"),
        ({"changed_weight": 3.0}, "--changed_weight makes new texts"),
    ],
)
def test_new_texts_need_shared_questions(changes, message):
    with pytest.raises(ValueError, match=message):
        TrackingArguments(**FILES, questions_per_text=0, **changes)


def test_wrong_weights_are_refused():
    arguments = TrackingArguments(**FILES)
    with pytest.raises(ValueError, match="--changed_weight must be > 0"):
        replace(arguments, changed_weight=0.0)
    with pytest.raises(ValueError, match="--changed_weight is no option of --task chains"):
        TrackingArguments(changed_weight=2.0)
