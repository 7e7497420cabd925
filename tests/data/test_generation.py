# SPDX-License-Identifier: Apache-2.0
import pickle

import datasets
import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from hf_lip.data import (
    BoxesTask,
    ChainsTask,
    PermutationsTask,
    RandomChainsTask,
    TrackingCollator,
    encode_answers,
    tracking_dataset,
    tracking_tokenizer,
)
from hf_lip.data.generation import split_of


TASKS = {
    "chains": ChainsTask(num_entities=2, num_state_changes=(0, 3)),
    "chains-text": ChainsTask(num_entities=2, num_state_changes=(0, 3), form="text"),
    "random-chains": RandomChainsTask(num_statements=6),
    "random-chains-text": RandomChainsTask(num_statements=6, form="text"),
    "permutations": PermutationsTask(num_elements=3, num_moves=(1, 5)),
    "permutations-text": PermutationsTask(num_elements=3, num_moves=(1, 5), form="text"),
    "boxes": BoxesTask(num_boxes=3, num_operations=2),
    "boxes-contents": BoxesTask(num_boxes=4, num_operations=5, operations={"contents": 1}, queries_per_world=4),
}


def content(row):
    """What a model sees of a row."""
    return str({name: row[name] for name in ("prompt", "statement_ids", "input_ids") if name in row})


@pytest.mark.parametrize("name", TASKS)
def test_a_sample_depends_on_its_index_alone(name):
    task = TASKS[name]
    long = list(tracking_dataset(task, 12, "test", seed=3))
    short = list(tracking_dataset(task, 5, "test", seed=3))
    assert long[: len(short)] == short
    assert list(tracking_dataset(task, 12, "test", seed=4)) != long
    assert list(tracking_dataset(task, 12, "train", seed=3)) != long
    assert len({row["sample_id"] for row in long}) == 12


@pytest.mark.parametrize("name", TASKS)
def test_a_stream_gives_the_rows_of_the_data_set(name):
    task = TASKS[name]
    rows = list(tracking_dataset(task, 7, "train"))
    stream = tracking_dataset(task, 7, "train", streaming=True)
    assert list(stream) == rows
    sharded = tracking_dataset(task, 7, "train", streaming=True, num_shards=3)
    assert sharded.num_shards == 3
    assert sorted(map(str, sharded)) == sorted(map(str, rows))
    assert stream.features == tracking_dataset(task, 1, "train").features == task.features()


def test_an_endless_stream_resumes_where_it_was():
    task = TASKS["boxes"]
    rows = list(tracking_dataset(task, 3))
    stream = tracking_dataset(task, None, streaming=True)
    iterator = iter(stream)
    begun = [next(iterator) for _ in range(25)]
    state = stream.state_dict()
    again = tracking_dataset(task, None, streaming=True)
    again.load_state_dict(state)
    resumed = iter(again)
    assert begun + [next(resumed) for _ in range(len(rows) - 25)] == rows


def test_workers_share_the_shards():
    stream = tracking_dataset(TASKS["permutations"], 8, streaming=True, num_shards=2)
    rows = [int(row["sample_id"]) for row in DataLoader(stream, batch_size=None, num_workers=2)]
    assert sorted(rows) == list(range(8))


@pytest.mark.parametrize("name", TASKS)
def test_splits_share_nothing(name):
    task = TASKS[name]
    # different seeds and sizes, as the data sets of a project have
    parts = [
        {content(row) for row in tracking_dataset(task, size, split, seed=seed)}
        for seed, (split, size) in enumerate([("train", 60), ("validation", 30), ("test", 60)])
    ]
    assert not parts[0] & parts[1]
    assert not parts[0] & parts[2]
    assert not parts[1] & parts[2]


def test_shares_of_the_splits():
    names = [split_of(str(key).encode(), 2255) for key in range(20_000)]
    shares = {name: names.count(name) / len(names) for name in set(names)}
    assert shares == pytest.approx({"train": 0.45, "validation": 0.10, "test": 0.45}, abs=0.012)
    assert names != [split_of(str(key).encode(), 2256) for key in range(20_000)]


@pytest.mark.parametrize("name", TASKS)
def test_tasks_travel_to_workers(name):
    task = TASKS[name]
    copy = pickle.loads(pickle.dumps(task))
    assert copy == task
    assert list(tracking_dataset(copy, 3)) == list(tracking_dataset(task, 3))


@pytest.mark.parametrize("name", TASKS)
def test_rows_become_padded_batches(name):
    task = TASKS[name]
    dataset = tracking_dataset(task, 6)
    tokenizer = tracking_tokenizer(task.vocabulary())
    if "prompt" in dataset.column_names:
        dataset = encode_answers(dataset, tokenizer)
    rows = [dataset[index] for index in range(6)]
    batch = TrackingCollator(tokenizer.pad_token_id)(rows)
    ids = batch.get("input_ids", batch.get("statement_ids"))
    assert all(value.dtype == torch.int64 for value in batch.values())
    assert int(ids.max()) < len(tokenizer)
    assert tokenizer.unk_token_id not in ids
    assert batch["labels"].shape == batch["attention_mask"].shape == ids.shape[:2]
    assert bool((batch["labels"] != -100).any(dim=1).all())
    assert not bool(((batch["labels"] != -100) & (batch["attention_mask"] == 0)).any())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_samples": 0}, "`num_samples` must be at least 1"),
        ({"num_samples": None}, "streaming=True"),
        ({"num_samples": 2, "split": "dev"}, "train, validation, test"),
        ({"num_samples": 2, "seed": -1}, "`seed`"),
        ({"num_samples": 2, "split_seed": 1.5}, "`split_seed`"),
        ({"num_samples": 2, "num_shards": 2}, "without `streaming`"),
        ({"num_samples": 2, "num_shards": 3, "streaming": True}, "fewer shards"),
    ],
)
def test_bad_input(arguments, message):
    with pytest.raises(ValueError, match=message):
        tracking_dataset(TASKS["permutations"], **arguments)


def test_a_task_too_small_to_be_split_says_so():
    # two samples in all, so that three splits can not all have one
    task = PermutationsTask(num_elements=2, num_moves=1)
    keys = [np.array([move]).astype("<i4").tobytes() for move in range(2)]
    missing = ({"train", "validation", "test"} - {split_of(key, 2255) for key in keys}).pop()
    with pytest.raises(ValueError, match="too few different samples"):
        tracking_dataset(task, 1, missing)


def test_data_sets_in_memory_leave_no_files(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    task = TASKS["boxes"]
    encode_answers(tracking_dataset(task, 2), tracking_tokenizer(task.vocabulary()))
    assert list(tmp_path.iterdir()) == []
