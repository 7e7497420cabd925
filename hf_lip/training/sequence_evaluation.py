# SPDX-License-Identifier: Apache-2.0
"""Accuracy of entity tracking by depth.

An answer counts as right if every one of its tokens, `<eos>` included, is the most probable one after the prompt and
the answer's earlier tokens. That is so exactly where greedy decoding gives the answer token for token.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from accelerate.utils import gather_object
from numpy.typing import NDArray
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..data.generation import TrackingTask
from ..data.tracking_tokenizer import IGNORED
from ..tracking_metrics import (
    exact_match_by_depth,
    exact_matches,
    minimal_layers,
    predicted_tokens,
    whole_state_accuracy,
)
from .sequence_batches import dense_batch
from .sequence_objective import sequence_logits
from .sequence_questions import Batch, SharedText, packed_batch
from .sequence_tasks import TrackingArguments, sample_rows


if TYPE_CHECKING:
    from accelerate import Accelerator

Columns = dict[str, NDArray[np.int64]]

# depths that are lengths of chains, for which Theorem 1 gives the layers
CHAINED_DEPTHS = ("hops", "num_state_changes", "implicit_hops")

__all__ = ["EvaluationSet", "describe", "evaluate_tracking", "generated_rows"]


@dataclass(frozen=True)
class EvaluationSet:
    """What is asked of a model at each evaluation.

    Attributes:
        name: in results and logs.
        batches: each with columns (N,) of its answers, in the order of the labels: depths, and under `_state` the
            number of the state that an answer belongs to, where answers share states.
        depth_names: the columns to report by.
        dense: every label is an answer; else all labels of a row are one.
    """

    name: str
    batches: list[tuple[Batch, Columns]]
    depth_names: tuple[str, ...]
    dense: bool

    @classmethod
    def of_rows(
        cls, name: str, rows: Sequence[dict[str, Any]], arguments: TrackingArguments, batch_size: int
    ) -> "EvaluationSet":
        """Dense rows, those of like length together; a state is a whole sequence."""
        ordered = sorted(rows, key=lambda row: len(row["labels"]))
        batches = []
        for start in range(0, len(ordered), batch_size):
            batch = dense_batch(ordered[start : start + batch_size])
            hops = batch.pop("hops").numpy()
            sequence = np.broadcast_to(start + np.arange(len(hops))[:, None], hops.shape)
            answered = batch["labels"].numpy() != IGNORED
            batches.append((batch, {"hops": hops[answered], "_state": sequence[answered]}))
        return cls(name, batches, arguments.depth_names, True)

    @classmethod
    def of_texts(
        cls, name: str, texts: Sequence[SharedText], arguments: TrackingArguments, batch_size: int
    ) -> "EvaluationSet":
        """Texts with all their questions, about `batch_size` questions in a batch."""
        states: dict[Any, int] = {}
        batches = []
        for part in _parts(sorted(texts, key=lambda text: len(text.ids)), batch_size):
            rows = [question.row for text in part for question in text.questions]
            columns = {depth: np.array([row[depth] for row in rows]) for depth in arguments.depth_names}
            if arguments.state_key:
                keys = [tuple(row[column] for column in arguments.state_key) for row in rows]
                columns["_state"] = np.array([states.setdefault(key, len(states)) for key in keys])
            batches.append((packed_batch([(text.ids, text.questions) for text in part]), columns))
        return cls(name, batches, arguments.depth_names, False)


def generated_rows(task: TrackingTask, arguments: TrackingArguments) -> list[dict[str, Any]]:
    """Rows of `--eval_samples` samples of the split `--eval_split`."""
    options: dict[str, Any] = {"seed": arguments.eval_seed, "split_seed": arguments.split_seed}
    indices = range(arguments.eval_samples)
    rows = [row for index in indices for row in sample_rows(task, index, arguments.eval_split, **options)]
    return arguments.ordered_answers(rows)


@torch.no_grad()
def evaluate_tracking(
    model: PreTrainedModel,
    chosen: EvaluationSet,
    accelerator: "Accelerator",
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> dict[str, Any]:
    """Accuracy of a model in evaluation mode, the batches shared among the processes.

    Args:
        tokenizer: given, an answer that is not the reference token for token is generated to its end, and is right if
            it names the same set of objects (the metric of Boxes).

    Returns:
        `accuracy`, `num_examples`, `whole_state_accuracy` with `num_states` (of dense tasks: whole sequences) where
        answers share states, and `by_<depth>`: for every depth `accuracy`, `num_examples` and, where the depth is the
        length of a chain, `minimal_layers` of softmax attention (Theorem 1).
    """
    own: list[tuple[NDArray[np.int64], Columns]] = []
    for batch, columns in chosen.batches[accelerator.process_index :: accelerator.num_processes]:
        on_device = {name: tensor.to(accelerator.device) for name, tensor in batch.items()}
        predicted = predicted_tokens(sequence_logits(model, on_device)).cpu().numpy()
        labels = batch["labels"].numpy()
        hits, answered = predicted == labels, labels != IGNORED
        right = hits[answered] if chosen.dense else (hits | ~answered).all(axis=1)
        if tokenizer is not None and not right.all():
            wrong = np.flatnonzero(~right)
            right[wrong] = _same_objects(model, batch, wrong, tokenizer, accelerator.device)
        own.append((right.astype(np.int64), columns))
    parts = gather_object(own)
    right = np.concatenate([part for part, _ in parts])
    columns = {name: np.concatenate([columns[name] for _, columns in parts]) for name in parts[0][1]}
    truth = np.ones_like(right)
    found: dict[str, Any] = {"accuracy": float(right.mean()), "num_examples": len(right)}
    if "_state" in columns:
        states = columns["_state"].tolist()
        found["whole_state_accuracy"] = whole_state_accuracy(right, truth, states)
        found["num_states"] = len(set(states))
    for name in chosen.depth_names:
        found[f"by_{name}"] = {
            str(depth): {"accuracy": score.accuracy, "num_examples": score.num_examples}
            | ({"minimal_layers": minimal_layers(depth)} if name in CHAINED_DEPTHS and depth >= 0 else {})
            for depth, score in exact_match_by_depth(right, truth, columns[name]).items()
        }
    return found


def _same_objects(
    model: Any, batch: Batch, rows: NDArray[np.int64], tokenizer: PreTrainedTokenizerBase, device: torch.device
) -> NDArray[np.bool_]:
    """Whether greedy answers to some questions of a packed batch name the objects of the references."""
    prompts, references = [], []
    for row in rows.tolist():
        ids, labels = batch["input_ids"][row], batch["labels"][row]
        answered = torch.nonzero(labels != IGNORED)[:, 0]
        prompts.append(torch.cat([batch["text_ids"][batch["text"][row], : batch["seen"][row]], ids[: answered[0]]]))
        references.append(labels[answered])
    length = max(map(len, prompts))
    input_ids = torch.zeros(len(prompts), length, dtype=torch.int64)
    mask = torch.zeros_like(input_ids)
    for place, prompt in enumerate(prompts):
        input_ids[place, length - len(prompt) :] = prompt
        mask[place, length - len(prompt) :] = 1
    limit = 2 * max(map(len, references))
    given = {"input_ids": input_ids.to(device), "attention_mask": mask.to(device)}
    # 0 where an answer has ended: no answer holds it, and one without an end is wrong
    end = tokenizer.eos_token_id
    out = model.generate(**given, max_new_tokens=limit, do_sample=False, eos_token_id=end, pad_token_id=0)
    answers = [ids if end in ids else [] for ids in out[:, length:].tolist()]
    texts = [tokenizer.decode(ids[: ids.index(end)] if ids else []) for ids in answers]
    truths = [tokenizer.decode(reference[:-1]) for reference in references]
    return exact_matches(texts, truths, kind="contents")


def describe(metrics: dict[str, Any], depth_name: str) -> str:
    """One line: accuracy, and by bands of depth that need the same number of layers."""
    bands: dict[int, list[float]] = {}
    for depth, score in metrics[f"by_{depth_name}"].items():
        band = bands.setdefault(int(depth).bit_length() if int(depth) >= 0 else -1, [0.0, 0.0, 1.0])
        band[0] += score["accuracy"] * score["num_examples"]
        band[1] += score["num_examples"]
        band[2] = min(band[2], score["accuracy"])
    words = [f"{100 * metrics['accuracy']:.2f}"]
    for layers, (right, count, least) in sorted(bands.items()):
        low, high = 2 ** max(layers - 1, 0) if layers > 0 else layers, 2**layers - 1 if layers > 0 else layers
        name = str(low) if low == high else f"{low}-{high}"
        words.append(f"{name}: {100 * right / count:.1f} (least {100 * least:.1f})")
    return "  ".join(words)


def _parts(texts: Sequence[SharedText], batch_size: int) -> Iterable[list[SharedText]]:
    """Texts in batches of about `batch_size` questions: at least one text."""
    part: list[SharedText] = []
    count = 0
    for text in texts:
        if part and count + len(text.questions) > batch_size:
            yield part
            part, count = [], 0
        part.append(text)
        count += len(text.questions)
    if part:
        yield part
