# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: RUF009  (`option` returns `dataclasses.field`)
"""Entity-tracking tasks of a training run: generated, or read from files."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from ..data import BoxesTask, ChainsTask, PermutationsTask, RandomChainsTask, load_babi, load_boxes, load_propara
from ..data.box_samples import as_last_named
from ..data.generation import SPLITS, TrackingTask, split_of
from .arguments import option, require
from .sequence_arguments import named_values
from .sequence_pace import Pace


GENERATED = ("chains", "random_chains", "permutations", "boxes")
TASKS = (*GENERATED, "babi", "propara")
# columns that name the text that questions share, and those that name a whole state
TEXT_KEYS = {"boxes": ("sample_id",), "babi": ("task", "story_id"), "propara": ("para_id",)}
STATE_KEYS = {"boxes": ("sample_id", "step"), "propara": ("para_id", "step")}
DEPTHS = {
    "boxes": ("numops", "implicit_hops", "num_moves", "step"),
    "babi": ("num_supporting_facts",),
    "propara": ("num_state_changes", "step"),
}
_MAX_DRAWS = 2000

__all__ = ["GENERATED", "TrackingArguments", "sample_rows", "split_sample"]


@dataclass
class TrackingArguments:
    """The task. Options of other tasks than the chosen one must be left out."""

    task: Literal["chains", "random_chains", "permutations", "boxes", "babi", "propara"] = option(
        "chains", "Generated, or read from files: boxes (with --boxes_train), babi, propara (with --data_path)."
    )
    form: Literal["dense", "text"] | None = option(
        None, "chains, random_chains, permutations: one token a statement, or words. Default: dense."
    )
    num_state_changes: list[int] | None = option(
        None,
        "chains, permutations: changes (moves) of a sample, a number or the smallest and the largest. "
        "Default: 1 63 (permutations: 1 32).",
    )
    eval_num_state_changes: list[int] | None = option(None, "The same of a second evaluation, of longer samples.")
    num_entities: int | None = option(None, "chains: entities. Default: 2.")
    num_values: int | None = option(None, "chains, random_chains: literal values. Default: 10.")
    num_variables: int | None = option(None, "chains, random_chains: names. Default: as many as the samples need.")
    curriculum: Literal["none", "grow", "log"] = option(
        "none",
        "chains, permutations, boxes: which changes (boxes: operations) a training sample has: uniformly drawn; up "
        "to a largest number that grows to its end over --curriculum_share of training, for boxes geometrically and "
        "with the boxes, from --curriculum_boxes on; all of a step the same, drawn log-uniformly (not for boxes).",
    )
    curriculum_share: float = option(0.6, "grow: share of training after which all lengths are drawn.")
    curriculum_power: float = option(
        1.0, "grow: the largest number grows as this power of the time; above 1 it stays longer with the shortest."
    )
    curriculum_loss: float | None = option(
        None,
        "grow: go on early, as soon as the mean loss of recent steps (nats a token) is below this. 0.08 is a "
        "good value for boxes with --answer_order text.",
    )
    curriculum_boxes: int | None = option(
        None, "boxes, grow: boxes of the smallest worlds; take all of them where nothing is taken out. Default: 2."
    )
    constant_length: bool = option(
        False, "chains with a curriculum: as many entities as give every sample about the same number of statements."
    )
    num_statements: int | None = option(None, "random_chains: statements of a sample. Default: 20.")
    eval_num_statements: int | None = option(None, "random_chains: the same of a second evaluation.")
    literal_probability: float | None = option(None, "random_chains: of a new chain. Default: 0.1.")
    previous_probability: float | None = option(None, "random_chains: of copying the last statement. Default: 0.75.")
    num_elements: int | None = option(None, "permutations: elements, 2 to 7. Default: 5.")
    moves: Literal["all", "even", "swaps"] | None = option(None, "permutations: which moves. Default: all.")
    num_boxes: int | None = option(None, "boxes, generated: boxes; splits of fewer than five are unlike. Default: 7.")
    num_operations: int | None = option(None, "boxes, generated: operations of a world. Default: 12.")
    eval_num_operations: int | None = option(None, "boxes, generated: the same of a second evaluation.")
    max_objects: int | None = option(None, "boxes, generated: capacity of a box. Default: 3.")
    expected_objects: float | None = option(None, "boxes, generated: Poisson mean at the start. Default: 2.")
    expected_put: float | None = option(None, "boxes, generated: Poisson mean of a put. Default: 1.")
    boxes_operations: list[str] | None = option(
        None, "boxes, generated: weights: move=1 contents=2 remove=1 put=1. Default: move, remove and put alike."
    )
    move_contents: bool = option(False, "boxes, generated: tell a move of all objects as 'the contents'.")
    query_steps: Literal["every", "last"] | None = option(None, "boxes, generated: when to ask. Default: every step.")
    boxes_train: str | None = option(None, "boxes: jsonl(.gz) file or folder to train on, in place of the generator.")
    boxes_eval: list[str] | None = option(None, "boxes: files to evaluate on, each named by its file name.")
    rename_objects: bool = option(
        False,
        "boxes, from files: give the objects of a text other names of the data each time: a thousand worlds can be "
        "learnt by heart.",
    )
    fresh_operations: bool = option(
        False,
        "boxes, from files: begin with the contents of a text and go on with operations drawn by the rules, others "
        "each time: the operations of a thousand worlds can be learnt by heart too.",
    )
    answer_order: Literal["alphabet", "text"] | None = option(
        None,
        "boxes: order of the objects in an answer, which does not matter for the exact match of sets: the data's, or "
        "that in which the text names them last, which is learnt sooner. Also of the evaluation. Default: alphabet.",
    )
    changed_weight: float | None = option(
        None, "boxes: how much likelier a question on a box that operations changed is asked than another. Default: 1."
    )
    data_path: str | None = option(None, "babi: zip or folder; propara: folder of jsonl(.gz) files.")
    babi_task: int | None = option(None, "babi: 1 to 20.")
    eval_split: Literal["validation", "test"] = option("test", "Split to evaluate on, generated or of a folder.")
    questions_per_text: int | None = option(
        None,
        "Tasks with several questions on a text (boxes, babi, propara): ask so many of them, drawn anew each "
        "time, in one pass over the text. 0: every question is a sequence of its own. Default: 16.",
    )
    eval_generate: bool = option(
        False, "boxes: generate the answers that are not the reference token for token, and compare sets of objects."
    )
    eval_samples: int = option(512, "Generated tasks: samples of each evaluation (boxes: worlds).")
    add_words: bool = option(
        False, "With --model_name_or_path: words of the task that the checkpoint does not know become new tokens."
    )
    split_seed: int = option(2255, "Generated tasks: of the division into splits; keep it through a project.")
    eval_seed: int = option(0, "Generated tasks: of the evaluation samples.")

    def __post_init__(self) -> None:
        generated_boxes = (
            *("num_boxes", "num_operations", "eval_num_operations", "max_objects", "expected_objects"),
            *("expected_put", "boxes_operations", "move_contents", "query_steps"),
        )
        changes = ("num_state_changes", "eval_num_state_changes")
        of_task = {
            "chains": ("form", *changes, "num_entities", "num_values", "num_variables", "constant_length"),
            "random_chains": (
                *("form", "num_statements", "eval_num_statements", "num_values", "num_variables"),
                *("literal_probability", "previous_probability"),
            ),
            "permutations": ("form", *changes, "num_elements", "moves"),
            "boxes": (
                *("boxes_train", "boxes_eval", "rename_objects", "fresh_operations"),
                *("questions_per_text", "changed_weight", "answer_order", "curriculum_boxes"),
                *generated_boxes,
            ),
            "babi": ("data_path", "babi_task", "questions_per_text"),
            "propara": ("data_path", "questions_per_text"),
        }
        own = set(of_task[self.task])
        for name in sorted(set().union(*of_task.values()) - own):
            if getattr(self, name) not in (None, False):
                raise ValueError(f"--{name} is no option of --task {self.task}.")
        require(self, "eval_samples curriculum_share curriculum_power curriculum_loss changed_weight", "> 0")
        require(self, "questions_per_text split_seed eval_seed", ">= 0")
        known = {"none": TASKS, "grow": ("chains", "permutations", "boxes"), "log": ("chains", "permutations")}
        if self.task not in known[self.curriculum]:
            raise ValueError(f"--curriculum {self.curriculum} is no option of --task {self.task}.")
        if self.boxes_train and not self.questions:
            chosen = {
                "curriculum grow": self.curriculum == "grow",
                "rename_objects": self.rename_objects,
                "fresh_operations": self.fresh_operations,
                "changed_weight": self.changed_weight is not None,
            }
            for name in (name for name, given in chosen.items() if given):
                raise ValueError(f"--{name} makes new texts: leave out --questions_per_text 0, which asks the files'.")
        if self.curriculum_loss is not None and self.curriculum != "grow":
            raise ValueError("--curriculum_loss needs --curriculum grow.")
        if self.curriculum_boxes is not None and (self.curriculum != "grow" or self.curriculum_boxes < 2):
            raise ValueError("--curriculum_boxes must be at least 2, and needs --curriculum grow.")
        if self.curriculum_share > 1:
            raise ValueError(f"--curriculum_share must be at most 1, got {self.curriculum_share}.")
        if self.constant_length and self.curriculum != "log":
            raise ValueError("--constant_length needs --curriculum log.")
        for name in ("num_state_changes", "eval_num_state_changes"):
            ends = getattr(self, name)
            if ends is not None and (len(ends) > 2 or ends[0] < 0 or ends[-1] < ends[0]):
                raise ValueError(f"--{name} must be a number or the smallest and the largest, got {ends}.")
        if self.eval_generate and self.task != "boxes":
            raise ValueError("--eval_generate compares sets of objects: it is for --task boxes.")
        if self.boxes_train:
            wrong = [name for name in generated_boxes if getattr(self, name) not in (None, False)]
            if wrong:
                raise ValueError(f"--{wrong[0]} is for generated worlds: leave it out with --boxes_train.")
            if not self.boxes_eval:
                raise ValueError("--boxes_train needs files to evaluate on: give --boxes_eval.")
        else:
            for name in (name for name in ("rename_objects", "fresh_operations") if getattr(self, name)):
                raise ValueError(f"--{name} is for worlds of files (--boxes_train): generated ones are all new.")
        if self.add_words and self.dense:
            raise ValueError("--add_words is for texts: a dense task has the words of its checkpoint.")
        if self.task in ("babi", "propara") and not self.data_path:
            raise ValueError(f"--task {self.task} needs --data_path.")
        if self.task == "babi" and self.babi_task is None:
            raise ValueError("--task babi needs --babi_task, 1 to 20.")
        if self.generated:
            self.tasks()

    @property
    def generated(self) -> bool:
        """Whether samples are made rather than read."""
        return self.task in GENERATED and not self.boxes_train

    @property
    def dense(self) -> bool:
        """Whether every token is a statement with an answer."""
        return self.task in ("chains", "random_chains", "permutations") and self.form != "text"

    @property
    def ordered(self) -> bool:
        """Whether the model must know the order of the tokens: statements that name what they read need not tell."""
        return not (self.dense and self.task in ("chains", "random_chains"))

    @property
    def questions(self) -> int:
        """Questions on a text in one pass; 0 for rows of their own."""
        if self.task not in TEXT_KEYS:
            return 0
        return 16 if self.questions_per_text is None else self.questions_per_text

    @property
    def text_key(self) -> tuple[str, ...]:
        return TEXT_KEYS.get(self.task, ("sample_id",))

    @property
    def state_key(self) -> tuple[str, ...]:
        """Columns that name a whole state; none where there is one answer to a state."""
        return STATE_KEYS.get(self.task, ())

    @property
    def depth_names(self) -> tuple[str, ...]:
        """Columns by which accuracy is reported."""
        return ("hops",) if self.dense else DEPTHS.get(self.task, ("num_state_changes",))

    def ordered_answers(self, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Rows with their answers in the order of --answer_order."""
        return list(map(as_last_named, rows)) if self.answer_order == "text" else rows

    def changes(self) -> tuple[int, int]:
        """The smallest and the largest number of state changes of a training sample."""
        ends = self.num_state_changes or ([1, 63] if self.task == "chains" else [1, 32])
        return ends[0], ends[-1]

    def tasks(self) -> tuple[TrackingTask, TrackingTask | None]:
        """The generator, and the one of the second evaluation or None; both have one vocabulary.

        Raises:
            ValueError: an argument out of range.
        """
        first = self._task(self.changes(), self.num_statements, self.num_operations)
        second = None
        if self.eval_num_state_changes is not None:
            ends = self.eval_num_state_changes
            second = self._task((ends[0], ends[-1]), None, None)
        elif self.eval_num_statements is not None:
            second = self._task(self.changes(), self.eval_num_statements, None)
        elif self.eval_num_operations is not None:
            second = self._task(self.changes(), None, self.eval_num_operations)
        return first, second

    def task_of_step(self, task: TrackingTask, progress: float, drawn: float) -> TrackingTask:
        """The generator of a training step, by the curriculum.

        Args:
            task: the generator without one.
            progress: share of training done.
            drawn: a uniform number of the step, in [0, 1).
        """
        if self.curriculum == "none":
            return task
        low, high = self.changes()
        if self.curriculum == "grow":
            return _with_changes(task, (low, self.reached(low, high, progress)))
        smallest = max(low, 1)
        # every whole number between has its share of the logarithmic scale
        count = int(smallest * ((high + 1) / smallest) ** drawn)
        changed = _with_changes(task, min(max(count, smallest), high))
        if self.constant_length and isinstance(changed, ChainsTask):
            changed = replace(changed, num_entities=max(2, (changed.num_entities * (high + 1)) // (count + 1)))
        return changed

    def grown(self, progress: float) -> float:
        """How far a curriculum is at some share of training, in [0, 1]."""
        if self.curriculum == "none":
            return 1.0
        return min(progress / self.curriculum_share, 1.0) ** self.curriculum_power

    def world_size(self, num_boxes: int, num_operations: int, grown: float) -> tuple[int, int]:
        """Boxes and operations of the largest worlds of training, `grown` in [0, 1] as far as a curriculum is.

        The operations grow geometrically: the first few take a model as long to learn as all others together.
        """
        if grown >= 1.0:
            return num_boxes, num_operations
        operations = round((num_operations + 1) ** grown) - 1
        return min(num_boxes, (self.curriculum_boxes or 2) + max(operations - 1, 0) // 2), operations

    def pace(self) -> Pace | None:
        """The pace of a curriculum that depends on what was learnt, None for others."""
        if self.curriculum_loss is None:
            return None
        return Pace(self.curriculum_loss, self.curriculum_share, self.curriculum_power)

    def reached(self, low: int, high: int, progress: float) -> int:
        """The largest number of changes that `--curriculum grow` asks for at some share of training."""
        return low + round((high - low) * self.grown(progress))

    def load(self) -> tuple[list[dict[str, Any]], dict[str, list[dict[str, Any]]]]:
        """Rows to train on, and rows of the evaluations by name, from files."""
        if self.task == "boxes":
            assert self.boxes_train is not None
            assert self.boxes_eval is not None
            train = load_boxes(self.boxes_train, "train").to_list()
            named = {path.rstrip("/").rpartition("/")[2].partition(".")[0]: path for path in self.boxes_eval}
            sets = {name: load_boxes(path, self.eval_split).to_list() for name, path in named.items()}
            return self.ordered_answers(train), {name: self.ordered_answers(rows) for name, rows in sets.items()}
        assert self.data_path is not None
        if self.task == "propara":
            return (
                load_propara(self.data_path, "train").to_list(),
                {self.eval_split: load_propara(self.data_path, self.eval_split).to_list()},
            )
        assert self.babi_task is not None
        parts = [load_babi(self.data_path, self.babi_task, name).to_list() for name in ("train", self.eval_split)]
        for row in (row for part in parts for row in part):
            row["num_supporting_facts"] = len(row["supporting_facts"])
        return parts[0], {self.eval_split: parts[1]}

    def _task(self, changes: tuple[int, int], num_statements: int | None, num_operations: int | None) -> TrackingTask:
        shared = {"form": self.form or "dense"}
        if self.task == "permutations":
            given: dict[str, Any] = {"num_elements": self.num_elements, "moves": self.moves, "num_moves": changes}
            return PermutationsTask(**shared, **_known(given))  # type: ignore[arg-type]
        if self.task == "boxes":
            names = ("num_boxes", "max_objects", "expected_objects", "expected_put", "query_steps")
            given = {name: getattr(self, name) for name in names}
            given["num_operations"] = num_operations
            given["operations"] = named_values("boxes_operations", self.boxes_operations) or None
            return BoxesTask(move_contents=self.move_contents, **_known(given))
        given = {"num_values": self.num_values}
        if self.task == "random_chains":
            given |= {name: getattr(self, name) for name in ("literal_probability", "previous_probability")}
            given["num_statements"] = num_statements
            most = max(20 if self.num_statements is None else self.num_statements, self.eval_num_statements or 0)
            given["num_variables"] = most if self.num_variables is None else self.num_variables
            return RandomChainsTask(**shared, **_known(given))  # type: ignore[arg-type]
        entities = 2 if self.num_entities is None else self.num_entities
        deepest = max(self.changes()[1], *(self.eval_num_state_changes or [0]))
        most = entities * (1 + deepest)
        given |= {
            "num_entities": entities,
            "num_state_changes": changes,
            "num_variables": most if self.num_variables is None else self.num_variables,
        }
        return ChainsTask(**shared, **_known(given))  # type: ignore[arg-type]


def sample_rows(task: TrackingTask, index: int, split: str, *, seed: int, split_seed: int) -> list[dict[str, Any]]:
    """The rows of sample `index`, as `hf_lip.data.tracking_dataset` has them.

    Raises:
        ValueError: a task with too few different samples to be split.
    """
    sample, rng = split_sample(task, index, split, seed=seed, split_seed=split_seed)
    return list(task.rows(sample, index, rng))


def split_sample(
    task: TrackingTask, index: int, split: str, *, seed: int, split_seed: int
) -> tuple[Any, np.random.Generator]:
    """Sample `index` of a split, and the random numbers that go on to choose its rows.

    Raises:
        ValueError: as `sample_rows`.
    """
    rng = np.random.default_rng([seed, SPLITS.index(split), index])
    return accepted_sample(task, rng, lambda key: split_of(key, split_seed) == split), rng


def accepted_sample(task: TrackingTask, rng: np.random.Generator, accept: Callable[[bytes], bool]) -> Any:
    """A sample whose key is accepted, such as those of one split.

    Raises:
        ValueError: none was found in many draws.
    """
    for _ in range(_MAX_DRAWS):
        sample = task.sample(rng, accept)
        if sample is not None:
            return sample
    raise ValueError(
        f"{_MAX_DRAWS} samples of {task} and none that can be used: it has too few different samples to be split, or "
        "its worlds get stuck; make it larger."
    )


def _with_changes(task: TrackingTask, changes: int | tuple[int, int]) -> TrackingTask:
    if isinstance(task, PermutationsTask):
        return replace(task, num_moves=changes)
    assert isinstance(task, ChainsTask)
    return replace(task, num_state_changes=changes)


def _known(given: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in given.items() if value is not None}
