# SPDX-License-Identifier: Apache-2.0
"""Entity tracking from files: Boxes (jsonl), bAbI (numbered text, alone or in a zip) and ProPara (grids, jsonl).

Every row has a `prompt` and an `answer`, so that `encode_answers` prepares it for training. A file is read whole and
checked line by line: what is not as its layout says is an error that names the line.
"""

import gzip
import json
import re
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_lip.data.box_samples import BoxesSample, boxes_row
from hf_lip.data.box_world import BoxWorld, parse_contents
from hf_lip.data.boxes import boxes_features


if TYPE_CHECKING:
    import datasets


_SENTINEL = "<extra_id_0>"
_SPLIT_NAMES = {"train": ("train",), "validation": ("validation", "dev", "valid"), "test": ("test",)}
_BABI_NAME = re.compile(r"qa(?P<task>\d+)_[^/]*_(?P<split>train|test|valid)\.txt")
_BABI_LINE = re.compile(r"(?P<number>\d+) (?P<text>\S.*)")

__all__ = ["load_babi", "load_boxes", "load_propara"]


def load_boxes(path: str | Path, split: str | None = None) -> "datasets.Dataset":
    """Boxes examples, with the columns of `boxes_features`.

    Every text is replayed: `step`, `num_moves` and `implicit_hops` come from the replay, and an example whose answer
    or `numops` are not what its operations lead to is an error. The release's base and `move_contents` forms are read.

    Args:
        path: a `.jsonl` or `.jsonl.gz` file with the fields `sentence`, `sentence_masked`, `masked_content`,
            `sample_id`, `numops`, `numops_by_op`, or a folder of such files with names like `train-t5.jsonl.gz`.
        split: of a folder: `train`, `validation` (a file named dev or validation) or `test`.

    Raises:
        FileNotFoundError: `path` does not exist, or the folder has no file of the split.
        ValueError: an unreadable or empty file, or a line that is not such an example; the message names the line.
    """
    import datasets

    file = _find_file(path, split, ".jsonl")
    rows, worlds = [], _Replays()
    for place, record in _json_lines(file):
        try:
            rows.append(_boxes_example(record, worlds))
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{place}: {_reason(error)}") from error
    return datasets.Dataset.from_list(rows, features=boxes_features())


def load_babi(path: str | Path, task: int, split: str = "train") -> "datasets.Dataset":
    """Questions of a bAbI task (Weston et al. 2015).

    Columns: `prompt` (the story so far, without earlier questions, then the question), `answer` (several are joined
    by commas, as in the file), `task`, `story_id`, `question_id` (in the story), `sentences` (of the story so far) and
    `supporting_facts` (places in `sentences`, from 0).

    Args:
        path: the zip archive, a folder with `qa1_single-supporting-fact_train.txt` and its like at any depth, or such
            a file (`task` and `split` are then to agree with its name).
        task: 1 to 20.
        split: `train`, `validation` (in distributions that have one) or `test`.

    Raises:
        FileNotFoundError: `path` does not exist, or holds no file of the task and split.
        ValueError: several such files (languages or sizes: give the inner folder), an unreadable or empty file, a line
            that is not numbered as it should be, or a supporting fact that is no statement before its question.
    """
    import datasets

    if split not in _SPLIT_NAMES:
        raise ValueError(f"`split` must be one of {', '.join(_SPLIT_NAMES)}, got {split!r}.")
    name, lines = _babi_lines(Path(path).expanduser(), task, split)
    rows = list(_babi_questions(name, lines, task))
    if not rows:
        raise ValueError(f"{name} has no question: it is empty, or not in the bAbI text layout.")
    text, number = datasets.Value("string"), datasets.Value("int32")
    columns = {"prompt": text, "answer": text, "task": number, "story_id": number, "question_id": number}
    lists = {"sentences": datasets.List(text), "supporting_facts": datasets.List(number)}
    return datasets.Dataset.from_list(rows, features=datasets.Features({**columns, **lists}))


def load_propara(path: str | Path, split: str | None = None) -> "datasets.Dataset":
    """Questions on the state-change grids of ProPara (Dalvi et al. 2018): where is a participant after a step?

    The prompt holds the whole paragraph, as the task gives it: "Step 1: Plants die. Step 2: ... Where is plants after
    step 2?" ("before step 1" for step 0). Columns: `prompt`, `answer` (a place, `-` does not exist, `?` unknown),
    `para_id`, `participant`, `step` (from 0), `num_state_changes` (changes of the participant up to the step).
    (`para_id`, `step`) is a whole state.

    Args:
        path: a `.jsonl` or `.jsonl.gz` file with the fields `para_id`, `sentence_texts`, `participants`, `states`, or
            a folder of such files with names like `grids.v1.dev.jsonl.gz`.
        split: of a folder: `train`, `validation` (a file named dev or validation) or `test`.

    Raises:
        FileNotFoundError, ValueError: as `load_boxes`.
    """
    import datasets

    file = _find_file(path, split, ".jsonl")
    rows: list[dict[str, Any]] = []
    for place, record in _json_lines(file):
        try:
            rows.extend(_propara_questions(record))
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{place}: {_reason(error)}") from error
    text, number = datasets.Value("string"), datasets.Value("int32")
    columns = {"prompt": text, "answer": text, "para_id": text, "participant": text}
    return datasets.Dataset.from_list(
        rows, features=datasets.Features({**columns, "step": number, "num_state_changes": number})
    )


class _Replays:
    """The world of a text. The examples of a step follow each other: only the last one is kept."""

    def __init__(self) -> None:
        self._text = ""
        self._world: BoxWorld | None = None

    def world(self, text: str) -> BoxWorld:
        if self._world is None or text != self._text:
            sample = BoxesSample.of_text(text)
            world = BoxWorld(sample.contents)
            for operation in sample.operations:
                world.apply(operation)
            self._text, self._world = text, world
        return self._world


def _boxes_example(record: dict[str, Any], worlds: _Replays) -> dict[str, Any]:
    sentence, masked = _field(record, "sentence", str), _field(record, "sentence_masked", str)
    target = _field(record, "masked_content", str)
    answer = target.removeprefix(_SENTINEL).strip()
    if not target.startswith(_SENTINEL) or masked.count(_SENTINEL) != 1:
        raise ValueError(f"`sentence_masked` and `masked_content` must have {_SENTINEL} in the answer's place.")
    if masked.replace(f"{_SENTINEL} .", f"{answer}.") != sentence:
        raise ValueError("`sentence_masked` with `masked_content` put in is not `sentence`.")
    text, found, box = masked.removesuffix(f" {_SENTINEL} .").rpartition(" Box ")
    if not found or not box.isdecimal():
        raise ValueError("`sentence_masked` does not end with the box that is asked for.")
    world = worlds.world(text)
    if int(box) >= len(world):
        raise ValueError(f"Box {box} is asked for, the text has {len(world)} boxes.")
    row = boxes_row(world, int(box), _field(record, "sample_id", int))
    if parse_contents(answer) != parse_contents(row["answer"]):
        raise ValueError(f"the operations lead to {row['answer']!r}, `masked_content` says {answer!r}.")
    by_op = _field(record, "numops_by_op", dict)
    if _field(record, "numops", int) != row["numops"] or by_op != row["numops_by_op"]:
        raise ValueError(
            f"the text has {row['numops']} operations on Box {box} ({row['numops_by_op']}), the fields say "
            f"{record['numops']} ({by_op})."
        )
    return row


def _babi_lines(path: Path, task: int, split: str) -> tuple[str, list[str]]:
    """Name and lines of the file of a task and split."""
    if not path.exists():
        raise FileNotFoundError(f"`path` {str(path)!r} does not exist: check the path.")
    if path.is_dir():
        names = [str(file.relative_to(path)) for file in path.rglob("*.txt")]
        chosen = _babi_file(path, names, task, split)
        return str(path / chosen), _read_text(path / chosen)
    if path.suffix == ".zip":
        try:
            with zipfile.ZipFile(path) as archive:
                chosen = _babi_file(path, archive.namelist(), task, split)
                return f"{path}:{chosen}", _lines(archive.read(chosen))
        # RuntimeError: encrypted, or (its child NotImplementedError) compressed in a way that Python has not
        except (zipfile.BadZipFile, zlib.error, EOFError, UnicodeDecodeError, RuntimeError) as error:
            raise ValueError(f"Cannot read {str(path)!r} as a zip of text files ({error}): fetch it again.") from error
    return str(path), _read_text(path.parent / _babi_file(path, [path.name], task, split))


def _babi_file(path: Path, names: list[str], task: int, split: str) -> str:
    chosen = []
    for name in names:
        found = _BABI_NAME.fullmatch(name.rpartition("/")[2])
        if found is not None and int(found["task"]) == task and found["split"] in _SPLIT_NAMES[split]:
            chosen.append(name)
    if not chosen:
        raise FileNotFoundError(f"`path` {str(path)!r} has no file like qa{task}_*_{split}.txt: check task and split.")
    if len(chosen) > 1:
        raise ValueError(f"`path` {str(path)!r} has several files of task {task}: give the folder of one of {chosen}.")
    return chosen[0]


def _babi_questions(name: str, lines: list[str], task: int) -> Iterator[dict[str, Any]]:
    sentences: list[str] = []
    # line number of a statement -> its place in `sentences`
    places: dict[int, int] = {}
    story, question, last = -1, 0, 0
    for index, line in enumerate(lines, 1):
        found = _BABI_LINE.fullmatch(line.strip())
        if found is None:
            raise ValueError(f"{name}, line {index}: {line[:60]!r} is not a number and a sentence.")
        number = int(found["number"])
        if number == 1:
            sentences, places, story, question, last = [], {}, story + 1, 0, 0
        if number != last + 1:
            raise ValueError(f"{name}, line {index}: number {number} follows {last}, a story counts up from 1.")
        last = number
        fields = [field.strip() for field in found["text"].split("\t")]
        if len(fields) == 1:
            places[number] = len(sentences)
            sentences.append(fields[0])
            continue
        if len(fields) != 3 or not all(fields) or not all(fact.isdecimal() for fact in fields[2].split()):
            raise ValueError(f"{name}, line {index}: a question needs an answer and line numbers, separated by tabs.")
        facts = [int(fact) for fact in fields[2].split()]
        missing = [fact for fact in facts if fact not in places]
        if missing:
            raise ValueError(
                f"{name}, line {index}: supporting fact {missing[0]} is no statement before the question."
            )
        yield {
            "prompt": " ".join([*sentences, fields[0]]),
            "answer": fields[1],
            "task": task,
            "story_id": story,
            "question_id": question,
            "sentences": list(sentences),
            "supporting_facts": [places[fact] for fact in facts],
        }
        question += 1


def _propara_questions(record: dict[str, Any]) -> Iterator[dict[str, Any]]:
    para_id = _field(record, "para_id", str)
    sentences, participants = _strings(record, "sentence_texts"), _strings(record, "participants")
    states = _field(record, "states", list)
    if len(states) != len(participants):
        raise ValueError(f"`states` has {len(states)} rows for {len(participants)} participants.")
    told = " ".join(f"Step {step}: {sentence}" for step, sentence in enumerate(sentences, 1))
    for participant, places in zip(participants, states, strict=True):
        if not isinstance(places, list) or not all(isinstance(place, str) and place.strip() for place in places):
            raise ValueError(f"the states of {participant!r} are not texts.")
        if len(places) != len(sentences) + 1:
            raise ValueError(f"{participant!r} has {len(places)} states, {len(sentences)} sentences need one more.")
        changes = 0
        for step, place in enumerate(places):
            changes += step > 0 and place != places[step - 1]
            when = f"after step {step}" if step else "before step 1"
            yield {
                "prompt": f"{told} Where is {participant} {when}?",
                "answer": place,
                "para_id": para_id,
                "participant": participant,
                "step": step,
                "num_state_changes": changes,
            }


def _find_file(path: str | Path, split: str | None, suffix: str) -> Path:
    file = Path(path).expanduser()
    if not file.exists():
        raise FileNotFoundError(f"`path` {str(path)!r} does not exist: check the path.")
    if file.is_file():
        return file
    if split not in _SPLIT_NAMES:
        raise ValueError(f"`path` is a folder, so `split` must be one of {', '.join(_SPLIT_NAMES)}, got {split!r}.")
    pattern = re.compile(rf"(?:.*[-_.])?(?:{'|'.join(_SPLIT_NAMES[split])})[-_.].*")
    files = [entry for end in (suffix, f"{suffix}.gz") for entry in sorted(file.glob(f"*{end}"))]
    files = [entry for entry in files if pattern.fullmatch(entry.name)]
    if not files:
        raise FileNotFoundError(f"`path` {str(path)!r} has no {suffix} or {suffix}.gz file named {split}.")
    if len(files) > 1:
        names = ", ".join(entry.name for entry in files)
        raise ValueError(f"`path` {str(path)!r} has several files of the split {split!r} ({names}): give one of them.")
    return files[0]


def _read_text(file: Path) -> list[str]:
    try:
        data = file.read_bytes()
        return _lines(gzip.decompress(data) if file.suffix == ".gz" else data)
    except (gzip.BadGzipFile, zlib.error, EOFError, UnicodeDecodeError) as error:
        kind = "gzipped UTF-8 text" if file.suffix == ".gz" else "UTF-8 text"
        raise ValueError(f"Cannot read {str(file)!r} as {kind} ({error}): fetch the file again.") from error


def _lines(data: bytes) -> list[str]:
    # not splitlines, which also ends lines at characters that JSON texts may hold
    return data.decode("utf-8-sig").removesuffix("\n").split("\n")


def _json_lines(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """`(place for messages, object)` of every line."""
    lines = _read_text(file)
    if not any(line.strip() for line in lines):
        raise ValueError(f"{str(file)!r} is empty: there is no line to read.")
    for number, line in enumerate(lines, 1):
        place = f"{file}, line {number}"
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{place}: not JSON ({error}).") from error
        if not isinstance(record, dict):
            raise ValueError(f"{place}: a JSON {type(record).__name__}, not an object with fields.")
        yield place, record


def _field(record: dict[str, Any], name: str, kind: type) -> Any:
    value = record[name]
    if not isinstance(value, kind) or isinstance(value, bool):
        raise TypeError(f"`{name}` must be {kind.__name__}, got {type(value).__name__}.")
    return value


def _strings(record: dict[str, Any], name: str) -> list[str]:
    values = _field(record, name, list)
    if not values or not all(isinstance(value, str) and value.strip() for value in values):
        raise ValueError(f"`{name}` must be a list of texts, at least one and none of them empty.")
    return values


def _reason(error: Exception) -> str:
    return f"the field {error} is missing." if isinstance(error, KeyError) else str(error)
