# SPDX-License-Identifier: Apache-2.0
"""Questions on texts as token ids: the questions on one text share what their prompts have in common.

The 91 questions on a world of Boxes are asked after beginnings of one text. A decoder is causal, so keys and values of
the longest prompt serve them all: it is run once, and every question continues from the place where its own prompt
departs, seeing what lies before that place and nothing of other questions. The loss is that of separate rows, at a
tenth of their tokens.
"""

import bisect
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers.models import WordLevel
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ..data.tracking_tokenizer import IGNORED, unknown_words


Batch = dict[str, Tensor]

__all__ = ["Batch", "Question", "SharedText", "encode_texts", "packed_batch", "row_batch"]


@dataclass(frozen=True)
class Question:
    """What a question adds to the text it shares.

    Attributes:
        seen: tokens of the shared text before it, at least one.
        ids: the rest of the prompt (one token or more), the answer and `<eos>`.
        num_answer: how many of them are supervised, at the end.
        row: the row of the data, for its depths and its answer.
    """

    seen: int
    ids: NDArray[np.int64]
    num_answer: int
    row: Mapping[str, Any]


@dataclass(frozen=True)
class SharedText:
    """Token ids (T,) of the longest prompt, and the questions."""

    ids: NDArray[np.int64]
    questions: tuple[Question, ...]

    def longest(self) -> int:
        """Tokens of the longest row."""
        return max(question.seen + len(question.ids) for question in self.questions)


def encode_texts(
    rows: Iterable[Mapping[str, Any]], tokenizer: PreTrainedTokenizerBase, key: Sequence[str]
) -> list[SharedText]:
    """Groups rows with `prompt` and `answer` by the columns `key`, in the order of their first rows.

    A row is `<bos>` (where the tokenizer has one), prompt, answer, `<eos>`, as `hf_lip.data.encode_answers` gives it.

    Raises:
        ValueError: no row, no end of sequence, an empty prompt or answer, or words that the tokenizer does not know.
    """
    if tokenizer.eos_token_id is None:
        raise ValueError("The tokenizer has no end of sequence, so an answer could not end: set its `eos_token`.")
    groups: dict[Any, list[Mapping[str, Any]]] = {}
    for row in rows:
        groups.setdefault(tuple(row[name] for name in key), []).append(row)
    if not groups:
        raise ValueError("There is no question: the data are empty.")
    return [_encode_group(group, tokenizer) for group in groups.values()]


def packed_batch(texts: Sequence[tuple[NDArray[np.int64], Sequence[Question]]]) -> Batch:
    """Questions that continue from shared texts.

    Returns:
        `text_ids` (W, T), right-padded; `text` (R,), which of them a question continues; `seen` (R,), how many of its
        tokens; `input_ids` and `labels` (R, n), right-padded, labels -100 before the answer and after it.
    """
    used = [max(question.seen for question in questions) for _, questions in texts]
    text_ids = torch.zeros(len(texts), max(used), dtype=torch.int64)
    for row, (ids, _), count in zip(text_ids, texts, used, strict=True):
        row[:count] = torch.from_numpy(ids[:count])
    questions = [question for _, several in texts for question in several]
    batch = _padded([question.ids for question in questions], [question.num_answer for question in questions])
    batch["text_ids"] = text_ids
    batch["text"] = torch.tensor([place for place, (_, several) in enumerate(texts) for _ in several])
    batch["seen"] = torch.tensor([question.seen for question in questions])
    return batch


def row_batch(texts: Sequence[tuple[NDArray[np.int64], Sequence[Question]]]) -> Batch:
    """The same questions as separate rows: `input_ids` and `labels` (R, n), right-padded."""
    pairs = [(ids, question) for ids, questions in texts for question in questions]
    rows = [np.concatenate([ids[: question.seen], question.ids]) for ids, question in pairs]
    return _padded(rows, [question.num_answer for _, question in pairs])


def _padded(rows: Sequence[NDArray[np.int64]], num_answers: Sequence[int]) -> Batch:
    # a causal model does not see the padding after a row: it needs no mask
    length = max(map(len, rows))
    ids = np.zeros((len(rows), length), dtype=np.int64)
    labels = np.full_like(ids, IGNORED)
    for place, (row, count) in enumerate(zip(rows, num_answers, strict=True)):
        ids[place, : len(row)] = row
        labels[place, len(row) - count : len(row)] = row[-count:]
    return {"input_ids": torch.from_numpy(ids), "labels": torch.from_numpy(labels)}


def _encode_group(rows: list[Mapping[str, Any]], tokenizer: PreTrainedTokenizerBase) -> SharedText:
    longest = max((row["prompt"] for row in rows), key=len)
    bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    encoding = tokenizer([longest], add_special_tokens=False, return_offsets_mapping=tokenizer.is_fast)
    text = [*bos, *encoding["input_ids"][0]]
    # for byte-pair tokenizers a word inside a text begins with its space
    answers = tokenizer([f" {row['answer']}" for row in rows], add_special_tokens=False)["input_ids"]
    if tokenizer.is_fast and isinstance(tokenizer.backend_tokenizer.model, WordLevel):
        # words do not depend on what comes before them: only the ends are read
        ends = [end for _, end in encoding["offset_mapping"][0]]
        shared = [_common_words(row["prompt"], longest) for row in rows]
        seen = [len(bos) + bisect.bisect_right(ends, count) for count in shared]
        tails = [row["prompt"][count:] for row, count in zip(rows, shared, strict=True)]
        rests = tokenizer(tails, add_special_tokens=False)["input_ids"]
    else:
        prompts = tokenizer([row["prompt"] for row in rows], add_special_tokens=False)["input_ids"]
        seen, rests = [], []
        for prompt in ([*bos, *ids] for ids in prompts):
            count = min(_common(prompt, text), len(prompt) - 1)
            seen.append(count)
            rests.append(prompt[count:])
    questions = []
    for row, count, rest, answer in zip(rows, seen, rests, answers, strict=True):
        _check_words(tokenizer, row, [*text[:count], *rest], answer)
        ids = np.array([*rest, *answer, tokenizer.eos_token_id], dtype=np.int64)
        questions.append(Question(count, ids, len(answer) + 1, row))
    if min(seen) < 1:
        raise ValueError("Prompts on one text have no first token in common: give the tokenizer a `bos_token`.")
    return SharedText(np.array(text, dtype=np.int64), tuple(questions))


def _check_words(
    tokenizer: PreTrainedTokenizerBase, row: Mapping[str, Any], prompt: list[int], answer: list[int]
) -> None:
    for name, ids in (("prompt", prompt), ("answer", answer)):
        if not row[name].strip() or not ids:
            raise ValueError(f"An empty {name}: every row needs a question and an answer.")
    unknown = tokenizer.unk_token_id
    if unknown is not None and unknown != tokenizer.eos_token_id and (unknown in prompt or unknown in answer):
        words = ", ".join(unknown_words(tokenizer, f"{row['prompt']} {row['answer']}"))
        raise ValueError(
            f"Words that the tokenizer does not know: {words}. Build it from the words of the data, or add them to it "
            "(train_entity_tracking.py --add_words)."
        )


def _common_words(prompt: str, longest: str) -> int:
    """Characters of the longest common beginning that ends before the last word of the prompt."""
    last = prompt.rstrip().rfind(" ")
    low, high = 0, max(last, 0)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if prompt.startswith(longest[:middle]) else (low, middle - 1)
    # back to a space in both texts
    while low > 0 and not (prompt[low] == " " and longest[low : low + 1] in (" ", "")):
        low -= 1
    return low


def _common(first: list[int], second: list[int]) -> int:
    size = min(len(first), len(second))
    differing = np.flatnonzero(np.array(first[:size]) != np.array(second[:size]))
    return int(differing[0]) if differing.size else size
