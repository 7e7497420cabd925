# SPDX-License-Identifier: Apache-2.0
"""Evaluating entity tracking again, as train_entity_tracking.py did."""

from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from transformers import AutoModelForCausalLM, AutoTokenizer

from ..data import load_babi, load_boxes, load_propara
from ..training.sequence_evaluation import EvaluationSet, evaluate_tracking
from ..training.sequence_questions import encode_texts
from ..training.sequence_tasks import TrackingArguments, sample_rows
from .figures import Evaluation, take
from .reruns import Found, Request, Rerun, data_named, evenly_spread


# a network in float32 on another machine: one answer in a thousand may turn
_FLOAT32 = 0.001
# of the second evaluation of generated samples
_SECOND = "extrapolation"

__all__ = ["rerun_tracking", "tracking_arguments"]


def rerun_tracking(folder: Path, evaluation: Evaluation, request: Request) -> Rerun:
    """One evaluation of the script's results.

    Raises:
        FileNotFoundError, ValueError: data files that are not where they were, or others.
    """
    arguments = _with_data(tracking_arguments(evaluation), request, evaluation)
    given = take(evaluation.content, ("arguments",), evaluation.file)
    batch_size = request.batch_size or int(given.get("eval_batch_size") or 64)
    chosen, samples, total = _questions(folder, arguments, evaluation, batch_size, request)
    complete = samples == total
    if complete:
        # other data can have words that the model does not know
        count = sum(len(columns[chosen.depth_names[0]]) for _, columns in chosen.batches)
        _require_same_size({evaluation.figures[0].key: count}, evaluation)
    accelerator = Accelerator(cpu=request.device == "cpu")
    model = AutoModelForCausalLM.from_pretrained(folder, use_safetensors=True, dtype="float32")
    judge = _tokenizer(folder) if arguments.eval_generate else None
    metrics = evaluate_tracking(model.to(accelerator.device).eval(), chosen, accelerator, judge)
    found = _found(metrics, ("evaluations", evaluation.name), samples)
    if complete:
        _require_same_size({key: one.count for key, one in found.items()}, evaluation)
    examples = f"all {total:,} samples" if complete else f"{samples:,} of {total:,} samples"
    return Rerun(found, complete, _FLOAT32, examples)


def tracking_arguments(evaluation: Evaluation) -> TrackingArguments:
    """What the model was trained and evaluated on."""
    given = take(evaluation.content, ("arguments",), evaluation.file)
    known = {field.name for field in fields(TrackingArguments)}
    return TrackingArguments(**{name: value for name, value in given.items() if name in known})


def _with_data(arguments: TrackingArguments, request: Request, evaluation: Evaluation) -> TrackingArguments:
    """The arguments with the data where they are now."""
    if request.data is None or arguments.generated:
        return arguments
    if arguments.task != "boxes":
        return replace(arguments, data_path=request.data)
    place = Path(request.data)
    mine = [path for path in arguments.boxes_eval or [] if _name(path) == evaluation.name]
    return replace(arguments, boxes_eval=[str(place / Path(mine[0]).name if place.is_dir() and mine else place)])


def _questions(
    folder: Path, arguments: TrackingArguments, evaluation: Evaluation, batch_size: int, request: Request
) -> tuple[EvaluationSet, int, int]:
    """The questions to ask, on how many samples (sequences, worlds, texts), and how many the card's are on."""
    name = evaluation.name
    if not arguments.generated:
        rows = arguments.ordered_answers(_file_rows(arguments, evaluation))
        texts = encode_texts(rows, _tokenizer(folder), arguments.text_key)
        part = evenly_spread(texts, request)
        return EvaluationSet.of_texts(name, part, arguments, batch_size), len(part), len(texts)
    first, second = arguments.tasks()
    task: Any = second if name == _SECOND else first
    indices = evenly_spread(range(arguments.eval_samples), request)
    options = {"seed": arguments.eval_seed, "split_seed": arguments.split_seed}
    rows = [row for index in indices for row in sample_rows(task, index, arguments.eval_split, **options)]
    if arguments.dense:
        questions = EvaluationSet.of_rows(name, rows, arguments, batch_size)
    else:
        texts = encode_texts(arguments.ordered_answers(rows), _tokenizer(folder), arguments.text_key)
        questions = EvaluationSet.of_texts(name, texts, arguments, batch_size)
    return questions, len(indices), arguments.eval_samples


def _file_rows(arguments: TrackingArguments, evaluation: Evaluation) -> list[dict[str, Any]]:
    """The rows of the evaluation, without those that the model was trained on."""
    split = arguments.eval_split
    with data_named(evaluation):
        if arguments.task == "boxes":
            paths = arguments.boxes_eval or []
            # one that was moved has its own name
            mine = paths if len(paths) == 1 else [path for path in paths if _name(path) == evaluation.name]
            return load_boxes(mine[0], split).to_list()
        place = str(arguments.data_path)
        if arguments.task == "propara":
            return load_propara(place, split).to_list()
        rows = load_babi(place, int(arguments.babi_task or 0), split).to_list()
    return [{**row, "num_supporting_facts": len(row["supporting_facts"])} for row in rows]


def _tokenizer(folder: Path) -> Any:
    return AutoTokenizer.from_pretrained(folder)


def _name(path: str) -> str:
    return Path(path).name.partition(".")[0]


def _found(metrics: Mapping[str, Any], key: tuple[str, ...], samples: int) -> dict[tuple[str, ...], Found]:
    found = {(*key, "accuracy"): Found(metrics["accuracy"], metrics["num_examples"], samples)}
    if "num_states" in metrics:
        value, count = metrics["whole_state_accuracy"], metrics["num_states"]
        found[(*key, "whole_state_accuracy")] = Found(value, count, samples)
    for column, scores in metrics.items():
        if column.startswith("by_"):
            for depth, score in scores.items():
                place = (*key, column, depth, "accuracy")
                found[place] = Found(score["accuracy"], score["num_examples"], samples)
    return found


def _require_same_size(counts: Mapping[tuple[str, ...], int], evaluation: Evaluation) -> None:
    for figure in evaluation.figures:
        if counts.get(figure.key, figure.count) != figure.count:
            raise ValueError(
                f"{figure.name}: the data have {counts[figure.key]:,} answers, {evaluation.where} is of "
                f"{figure.count:,}: give the data it was measured on with `--data`."
            )
