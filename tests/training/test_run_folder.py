# SPDX-License-Identifier: Apache-2.0
import json

import pytest

from hf_lip.training.run_folder import (
    STATE_NAME,
    checkpoint_folder,
    checkpoint_state,
    find_checkpoint,
    finish_checkpoint,
    list_checkpoints,
    prune_checkpoints,
    publish_checkpoint,
    unfinished_folder,
    write_json,
)


def write_checkpoint(output_dir, step, content="{}"):
    folder = unfinished_folder(output_dir, step)
    folder.mkdir(parents=True)
    (folder / STATE_NAME).write_text(content)
    return publish_checkpoint(output_dir, step)


def test_checkpoints_are_listed_by_number_and_only_when_whole(tmp_path):
    for step in (100, 20, 3):
        write_checkpoint(tmp_path, step)
    unfinished_folder(tmp_path, 200).mkdir()
    (tmp_path / "checkpoint-300").mkdir()
    (tmp_path / "checkpoint-best").mkdir()
    assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint-3", "checkpoint-20", "checkpoint-100"]
    assert find_checkpoint(tmp_path, "latest").name == "checkpoint-100"
    assert find_checkpoint(tmp_path, str(tmp_path / "checkpoint-20")).name == "checkpoint-20"


def test_resuming_from_nothing_something_broken_or_another_run_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match="no whole checkpoint"):
        find_checkpoint(tmp_path / "absent", "latest")
    (tmp_path / "checkpoint-7").mkdir()
    with pytest.raises(FileNotFoundError, match="not a whole checkpoint"):
        find_checkpoint(tmp_path, str(tmp_path / "checkpoint-7"))
    other = write_checkpoint(tmp_path / "other", 5)
    with pytest.raises(ValueError, match="pickles"):
        find_checkpoint(tmp_path, str(other))


def test_publishing_again_replaces(tmp_path):
    write_checkpoint(tmp_path, 4, "old")
    write_checkpoint(tmp_path, 4, "new")
    assert (checkpoint_folder(tmp_path, 4) / STATE_NAME).read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-4"]


def test_pruning_keeps_the_newest_and_clears_remains(tmp_path):
    for step in (1, 2, 10):
        write_checkpoint(tmp_path, step)
    unfinished_folder(tmp_path, 11).mkdir()
    (tmp_path / "model.safetensors").write_text("kept")
    prune_checkpoints(tmp_path, 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-10", "checkpoint-2", "model.safetensors"]
    with pytest.raises(ValueError, match="`keep`"):
        prune_checkpoints(tmp_path, 0)


def test_json_is_replaced_whole_and_has_no_nan(tmp_path):
    path = tmp_path / "results.json"
    write_json(path, {"a": 1})
    with pytest.raises(ValueError, match="JSON"):
        write_json(path, {"a": float("nan")})
    assert json.loads(path.read_text()) == {"a": 1}
    write_json(path, {"a": [1.5]})
    assert json.loads(path.read_text()) == {"a": [1.5]}


def test_a_run_goes_on_with_its_own_arguments_and_options_that_came_later_unset(tmp_path):
    unfinished_folder(tmp_path, 3).mkdir(parents=True)
    begun = {"learning_rate": 0.1, "betas": (0.9, 0.99), "questions": 0, "share": None}
    finish_checkpoint(tmp_path, 3, {"step": 3}, begun, 2, keep=1)
    folder = find_checkpoint(tmp_path, "latest")
    assert checkpoint_state(folder, {**begun, "later": None, "also_later": False}, 2) == {"step": 3}
    for changed in ({"learning_rate": 0.2}, {"questions": None}, {"share": 0}, {"later": True}, {"later": 0}):
        with pytest.raises(ValueError, match=f"other arguments; resume it with {{'{next(iter(changed))}'"):
            checkpoint_state(folder, {**begun, **changed}, 2)
    with pytest.raises(ValueError, match="written by 2 processes and this run has 1"):
        checkpoint_state(folder, begun, 1)
