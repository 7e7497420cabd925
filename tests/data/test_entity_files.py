# SPDX-License-Identifier: Apache-2.0
import gzip
import json
import zipfile
from pathlib import Path

import numpy as np
import pytest

from hf_lip.data import BoxesTask, load_babi, load_boxes, load_propara, tracking_dataset
from tests.data.solvers import boxes_answer, boxes_depths


SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"


# boxes


def record_of(row):
    """A row in the layout of the release's files."""
    return {
        "sentence": f"{row['prompt']} {row['answer']}.",
        "sentence_masked": f"{row['prompt']} <extra_id_0> .",
        "masked_content": f"<extra_id_0> {row['answer']}",
        "sample_id": row["sample_id"],
        "numops": row["numops"],
        "numops_by_op": row["numops_by_op"],
    }


@pytest.fixture(scope="module")
def generated():
    return tracking_dataset(BoxesTask(move_contents=True, num_operations=6), 3)


def write_lines(path, records):
    text = "".join(json.dumps(record) + "\n" for record in records).encode()
    path.write_bytes(gzip.compress(text) if path.suffix == ".gz" else text)
    return path


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.gz"])
def test_boxes_files_give_the_rows_of_the_generator(tmp_path, generated, name):
    path = write_lines(tmp_path / name, map(record_of, generated))
    loaded = load_boxes(path)
    assert list(loaded) == list(generated)
    assert loaded.features == generated.features


def test_boxes_folders_by_split(tmp_path, generated):
    records = [record_of(row) for row in generated]
    for number, name in enumerate(("train-t5.jsonl.gz", "dev-t5.jsonl.gz", "test.jsonl"), 1):
        write_lines(tmp_path / name, records[:number])
    write_lines(tmp_path / "contest.jsonl", records[:9])
    assert [len(load_boxes(tmp_path, split)) for split in ("train", "validation", "test")] == [1, 2, 3]
    with pytest.raises(ValueError, match="`split` must be one of train"):
        load_boxes(tmp_path)
    write_lines(tmp_path / "test-other.jsonl", records[:1])
    with pytest.raises(ValueError, match="several files"):
        load_boxes(tmp_path, "test")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="named test"):
        load_boxes(tmp_path / "empty", "test")


def changed(**fields):
    return lambda record: record.update(fields)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda record: record.pop("numops"), "the field 'numops' is missing"),
        (changed(sample_id="7"), "`sample_id` must be int"),
        (changed(numops=True), "`numops` must be int, got bool"),
        (changed(sentence=None), "`sentence` must be str"),
        (changed(sentence="Box 0 is empty. Box 0 is empty."), "is not `sentence`"),
        (changed(masked_content="is empty"), "<extra_id_0>"),
        (changed(numops=4), "operations on Box"),
        (changed(numops_by_op={"move": 9}), "operations on Box"),
    ],
)
def test_malformed_boxes_lines_are_named(tmp_path, generated, change, message):
    records = [record_of(row) for row in generated]
    change(records[4])
    with pytest.raises(ValueError, match=message) as caught:
        load_boxes(write_lines(tmp_path / "rows.jsonl", records))
    assert "line 5" in str(caught.value)


@pytest.mark.parametrize(
    ("text", "answer", "message"),
    [
        ("Box 0 contains the cup, Box 1 is empty.", "is empty", "lead to 'contains the cup'"),
        ("Box 0 contains the cup, Box 1 is empty. Drop the cup.", "is empty", "none of the operations"),
        ("Box 0 contains the cup, Box 2 is empty.", "contains the cup", "what Box 1 contains"),
        ("Box 0 contains the cup, Box 1 contains the cup.", "contains the cup", "named twice"),
        ("Box 0 contains the cup, Box 1 is empty. Remove the map from Box 0.", "is empty", "can not be done"),
        ("Box 0 contains the cup, Box 1 is empty. Move the cup from Box 0 to Box 7.", "is empty", "Box 7 of 2"),
        ("Container A contains the cup.", "contains the cup", "what Box 0 contains"),
    ],
)
def test_boxes_texts_that_do_not_add_up(tmp_path, text, answer, message):
    row = {"prompt": f"{text} Box 0", "answer": answer, "sample_id": 0, "numops": 0, "numops_by_op": {}}
    with pytest.raises(ValueError, match=message):
        load_boxes(write_lines(tmp_path / "rows.jsonl", [record_of(row)]))


def test_a_box_that_is_not_there(tmp_path):
    row = {"prompt": "Box 0 is empty. Box 3", "answer": "is empty", "sample_id": 0, "numops": 0, "numops_by_op": {}}
    with pytest.raises(ValueError, match="Box 3 is asked for"):
        load_boxes(write_lines(tmp_path / "rows.jsonl", [record_of(row)]))


@pytest.mark.parametrize("load", [load_boxes, load_propara])
def test_unreadable_files(tmp_path, load):
    with pytest.raises(FileNotFoundError, match="does not exist"):
        load(tmp_path / "nowhere.jsonl")
    path = tmp_path / "rows.jsonl"
    for content in (b"", b"\n \n"):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="is empty"):
            load(path)
    for content, message in [(b"{broken\n", "line 1: not JSON"), (b"[1]\n", "a JSON list"), (b"\xff\xfe\n", "UTF-8")]:
        path.write_bytes(content)
        with pytest.raises(ValueError, match=message):
            load(path)
    packed = tmp_path / "rows.jsonl.gz"
    whole = gzip.compress(b'{"a": 1}\n' * 50)
    for content in (b"plain text", whole[: len(whole) // 2]):
        packed.write_bytes(content)
        with pytest.raises(ValueError, match="gzipped"):
            load(packed)


@pytest.mark.skipif(not (SHARED / "boxes").is_dir(), reason="needs ../shared/data/boxes")
def test_the_shared_boxes_file():
    rows = load_boxes(SHARED / "boxes", "validation")
    assert len(rows) == 20_020
    assert len(set(rows["sample_id"])) == 220
    for row in rows.select(range(0, 20_020, 40)):
        assert row["answer"] == boxes_answer(row["prompt"])
        assert (row["numops"], row["num_moves"], row["implicit_hops"]) == boxes_depths(row["prompt"])
    moves = np.array(rows["num_moves"])
    # ChaCAL spec 4.2, of another draw
    assert np.mean(moves[moves >= 0] == 0) == pytest.approx(0.77, abs=0.02)


# bAbI

STORY = """1 Mary moved to the bathroom.
2 John went to the hallway.
3 Where is Mary? \tbathroom\t1
4 Mary got the milk there.
5 What is Mary carrying?\tmilk,apple\t4 1
1 Sandra travelled to the office.
2 Where is Sandra?\toffice\t1
"""


def babi_zip(path, files):
    with zipfile.ZipFile(path, "w") as archive:
        for name, text in files.items():
            archive.writestr(name, text)
    return path


def test_babi_questions(tmp_path):
    files = {f"tasks/en/qa{task}_a-task_{split}.txt": STORY for task in (1, 11) for split in ("train", "test")}
    packed = babi_zip(tmp_path / "babi.zip", files)
    file = tmp_path / "tasks" / "qa1_a-task_train.txt"
    file.parent.mkdir()
    # as written on another system
    file.write_bytes(STORY.replace("\n", "\r\n").encode())
    for source in (packed, tmp_path, file):
        rows = list(load_babi(source, 1))
        assert [row["answer"] for row in rows] == ["bathroom", "milk,apple", "office"]
        assert rows[1] == {
            "prompt": "Mary moved to the bathroom. John went to the hallway. Mary got the milk there. "
            "What is Mary carrying?",
            "answer": "milk,apple",
            "task": 1,
            "story_id": 0,
            "question_id": 1,
            "sentences": ["Mary moved to the bathroom.", "John went to the hallway.", "Mary got the milk there."],
            "supporting_facts": [2, 0],
        }
        assert (rows[2]["story_id"], rows[2]["question_id"], rows[2]["sentences"]) == (
            1,
            0,
            [STORY.split("\n")[5][2:]],
        )
    assert len(load_babi(packed, 11, "test")) == 3


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("Mary moved.\n", "line 1: 'Mary moved.' is not a number"),
        ("1 Mary moved.\n\n", "line 2: '' is not a number"),
        ("2 Mary moved.\n", "number 2 follows 0"),
        ("1 Mary moved.\n3 John moved.\n", "number 3 follows 1"),
        ("1 Mary moved.\n2 Where?\tthere\n", "line 2: a question needs"),
        ("1 Mary moved.\n2 Where?\t\t1\n", "line 2: a question needs"),
        ("1 Mary moved.\n2 Where?\tthere\tone\n", "line 2: a question needs"),
        ("1 Mary moved.\n2 Where?\tthere\t2\n", "supporting fact 2 is no statement"),
        ("1 Mary moved.\n", "no question"),
        ("", "is not a number"),
    ],
)
def test_malformed_babi_files(tmp_path, text, message):
    path = tmp_path / "qa1_a-task_train.txt"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        load_babi(path, 1)


def test_wrong_babi_sources(tmp_path):
    packed = babi_zip(tmp_path / "babi.zip", {"en/qa1_a_train.txt": STORY, "hn/qa1_a_train.txt": STORY})
    with pytest.raises(ValueError, match="several files of task 1"):
        load_babi(packed, 1)
    with pytest.raises(FileNotFoundError, match="no file like qa2_"):
        load_babi(packed, 2)
    with pytest.raises(ValueError, match="`split`"):
        load_babi(packed, 1, "dev")
    with pytest.raises(FileNotFoundError, match="does not exist"):
        load_babi(tmp_path / "nowhere", 1)
    broken = tmp_path / "broken.zip"
    broken.write_bytes(packed.read_bytes()[:-40])
    with pytest.raises(ValueError, match="as a zip"):
        load_babi(broken, 1)


@pytest.mark.skipif(not (SHARED / "babi").is_dir(), reason="needs ../shared/data/babi")
def test_the_shared_babi_archive():
    path = SHARED / "babi" / "babi_en_v1.1.zip"
    sizes = {(task, split): len(load_babi(path, task, split)) for task in (1, 3, 8, 19) for split in ("train", "test")}
    assert {size for (_, split), size in sizes.items() if split == "train"} == {1000}
    # task 3 asks where things are, so the answer is a word of the story
    assert all(row["answer"] in row["prompt"] for row in load_babi(path, 3, "test"))


# ProPara

PARAGRAPH = {
    "para_id": "12",
    "sentence_texts": ["Rain falls.", "It runs off."],
    "participants": ["rain", "ice"],
    "states": [["?", "ground", "river"], ["-", "-", "-"]],
}


def test_propara_questions(tmp_path):
    rows = list(load_propara(write_lines(tmp_path / "grids.v1.dev.jsonl.gz", [PARAGRAPH]).parent, "validation"))
    assert [(row["participant"], row["step"], row["answer"], row["num_state_changes"]) for row in rows] == [
        ("rain", 0, "?", 0),
        ("rain", 1, "ground", 1),
        ("rain", 2, "river", 2),
        ("ice", 0, "-", 0),
        ("ice", 1, "-", 0),
        ("ice", 2, "-", 0),
    ]
    assert rows[0]["prompt"] == "Step 1: Rain falls. Step 2: It runs off. Where is rain before step 1?"
    assert rows[2]["prompt"] == "Step 1: Rain falls. Step 2: It runs off. Where is rain after step 2?"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"states": [["?", "ground", "river"]]}, "1 rows for 2 participants"),
        ({"states": [["?", "ground"], ["-", "-", "-"]]}, "'rain' has 2 states, 2 sentences need one more"),
        ({"states": [["?", 3, "river"], ["-", "-", "-"]]}, "are not texts"),
        ({"states": "none"}, "`states` must be list"),
        ({"participants": []}, "`participants`"),
        ({"sentence_texts": ["Rain falls.", ""]}, "`sentence_texts`"),
        ({"para_id": 12}, "`para_id` must be str"),
    ],
)
def test_malformed_propara_lines(tmp_path, change, message):
    path = write_lines(tmp_path / "grids.jsonl", [PARAGRAPH, {**PARAGRAPH, **change}])
    with pytest.raises(ValueError, match=message) as caught:
        load_propara(path)
    assert "line 2" in str(caught.value)


@pytest.mark.skipif(not (SHARED / "propara").is_dir(), reason="needs ../shared/data/propara")
def test_the_shared_propara_grids():
    rows = load_propara(SHARED / "propara", "validation")
    assert len(set(rows["para_id"])) == 43
    assert len(set(zip(rows["para_id"], rows["participant"]))) == 175


def test_layouts_are_not_mixed_up(tmp_path, generated):
    boxes = write_lines(tmp_path / "boxes.jsonl", [record_of(generated[0])])
    grids = write_lines(tmp_path / "grids.jsonl", [PARAGRAPH])
    with pytest.raises(ValueError, match="the field 'para_id' is missing"):
        load_propara(boxes)
    with pytest.raises(ValueError, match="the field 'sentence' is missing"):
        load_boxes(grids)
