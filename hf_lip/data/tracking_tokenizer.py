# SPDX-License-Identifier: Apache-2.0
"""Words of the entity-tracking tasks as tokens, questions with answers as training rows, and rows as batches."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from tokenizers import Regex, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Sequence as PreTokenizers
from tokenizers.pre_tokenizers import Split, WhitespaceSplit
from tokenizers.processors import TemplateProcessing
from torch import Tensor
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast


if TYPE_CHECKING:
    import datasets


SPECIAL_TOKENS = ("<pad>", "<bos>", "<eos>", "<unk>")
PAD_ID, BOS_ID, EOS_ID, UNK_ID = range(len(SPECIAL_TOKENS))
# what a loss skips, as in torch and transformers
IGNORED = -100

_MARKS = r"[.,;:?!>=]"
_WORD = re.compile(rf"{_MARKS}|[^\s.,;:?!>=]+")
_SEQUENCES = ("input_ids", "statement_ids", "labels", "hops")

__all__ = [
    "IGNORED",
    "SPECIAL_TOKENS",
    "TrackingCollator",
    "add_words",
    "encode_answers",
    "tracking_tokenizer",
    "unknown_words",
    "words_of",
]


def words_of(texts: Iterable[str]) -> list[str]:
    """The different words and punctuation marks of texts, sorted: a vocabulary for `tracking_tokenizer`."""
    return sorted({word for text in texts for word in _WORD.findall(text)})


def tracking_tokenizer(vocabulary: Iterable[str]) -> PreTrainedTokenizerFast:
    """One token a word, after the special tokens `<pad>` 0, `<bos>` 1, `<eos>` 2 and `<unk>` 3, in the given order.

    `<bos>` is put first, as the place where attention that looks nowhere can rest; `<eos>` is not added. Punctuation
    marks are words of their own. `save_pretrained`, `AutoTokenizer.from_pretrained` and the Hub work as ever.

    Args:
        vocabulary: `task.vocabulary()`, or `words_of(texts)`.

    Raises:
        ValueError: no word, a word twice, or one that is a special token or is no single word.
    """
    words = list(vocabulary)
    if not words:
        raise ValueError("`vocabulary` is empty: give the words of the task, or `words_of(texts)`.")
    for word in words:
        if word in SPECIAL_TOKENS or _WORD.fullmatch(word) is None:
            raise ValueError(f"`vocabulary` holds {word!r}, which is not one word: use `words_of(texts)`.")
    tokens = {token: index for index, token in enumerate((*SPECIAL_TOKENS, *words))}
    if len(tokens) != len(SPECIAL_TOKENS) + len(words):
        twice = sorted({word for word in words if words.count(word) > 1})
        raise ValueError(f"`vocabulary` holds words twice: {', '.join(twice[:5])}.")
    tokenizer = Tokenizer(WordLevel(tokens, unk_token="<unk>"))
    tokenizer.pre_tokenizer = PreTokenizers([WhitespaceSplit(), Split(Regex(_MARKS), behavior="isolated")])
    tokenizer.post_processor = TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", BOS_ID)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        clean_up_tokenization_spaces=False,
    )


def add_words(tokenizer: PreTrainedTokenizerBase, words: Iterable[str]) -> list[str]:
    """Gives a word-level tokenizer tokens for the words that it does not know, after those that it has.

    Returns:
        The new words. A model needs as many tokens: `model.resize_token_embeddings(len(tokenizer))`.

    Raises:
        ValueError: a tokenizer of another kind, or a word that is none.
    """
    if not (tokenizer.is_fast and isinstance(tokenizer.backend_tokenizer.model, WordLevel)):
        raise ValueError("Only a tokenizer of whole words takes new ones: others split the words they do not know.")
    known = tokenizer.get_vocab()
    new = [word for word in dict.fromkeys(words) if word not in known]
    for word in new:
        if _WORD.fullmatch(word) is None:
            raise ValueError(f"`words` holds {word!r}, which is not one word: use `words_of(texts)`.")
    tokens = tokenizer.backend_tokenizer.get_vocab(with_added_tokens=False)
    tokens |= {word: len(tokenizer) + place for place, word in enumerate(new)}
    tokenizer.backend_tokenizer.model = WordLevel(tokens, unk_token=tokenizer.unk_token)
    return new


def unknown_words(tokenizer: PreTrainedTokenizerBase, text: str) -> list[str]:
    """The words of a text that a word-level tokenizer does not know, in the order of their first use."""
    known = tokenizer.get_vocab()
    return [word for word in dict.fromkeys(_WORD.findall(text)) if word not in known]


def encode_answers(
    dataset: "datasets.Dataset | datasets.IterableDataset",
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int | None = None,
) -> "datasets.Dataset | datasets.IterableDataset":
    """Adds `input_ids` and `labels` for training a causal language model on the columns `prompt` and `answer`.

    `input_ids` (int32) are `<bos>` (where the tokenizer has one), prompt, answer, `<eos>`; `labels` are the same with
    -100 before the answer, to be shifted by the model as ever. The other columns are kept.

    Args:
        max_length: positions that the model has; longer rows are an error, as cutting them would lose the answer.

    Raises:
        ValueError: no column `prompt` or `answer`, a tokenizer without `<eos>`, an empty prompt or answer, words that
            the tokenizer does not know (all are named), or a row longer than `max_length`.
    """
    if tokenizer.eos_token_id is None:
        raise ValueError("`tokenizer` has no end of sequence, so an answer could not end: set its `eos_token`.")
    columns = dataset.column_names
    for name in ("prompt", "answer"):
        if columns is not None and name not in columns:
            raise ValueError(f"`dataset` has no column {name!r}, its columns are {columns}: use rows in text form.")
    import datasets

    numbers = datasets.List(datasets.Value("int32"))
    # a stream may not know its features yet
    known = dataset.features
    features = known and datasets.Features({**known, "input_ids": numbers, "labels": numbers})
    arguments = {"tokenizer": tokenizer, "max_length": max_length}
    if isinstance(dataset, datasets.IterableDataset):
        return dataset.map(_encode_batch, batched=True, fn_kwargs=arguments, features=features)
    # in memory: a file in the cache would be found again by a later call with another tokenizer of the same look
    return dataset.map(_encode_batch, batched=True, fn_kwargs=arguments, features=features, keep_in_memory=True)


@dataclass(frozen=True)
class TrackingCollator:
    """Pads rows to a batch of tensors: `input_ids` or `statement_ids`, `attention_mask`, `labels` and `hops`.

    Sequences are int64 (B, n), `statement_ids` (B, n, 3); labels are padded with -100 and hops with -1.

    Args:
        pad_token_id: `tokenizer.pad_token_id`; 0 in this package's tokenizers.
        padding_side: `right` for training, `left` for `generate`.
        prompts_only: cut every row before its answer (its first label), for `generate`: only `input_ids` and
            `attention_mask` are returned.
        extra_columns: integer columns to return as well, as (B,) tensors, such as `numops`; others are left out.
        pad_to_multiple_of: pad the length to a multiple of it.
    """

    pad_token_id: int = PAD_ID
    padding_side: Literal["left", "right"] = "right"
    prompts_only: bool = False
    extra_columns: Sequence[str] = ()
    pad_to_multiple_of: int | None = None

    def __post_init__(self) -> None:
        if self.padding_side not in ("left", "right"):
            raise ValueError(f"`padding_side` must be 'left' or 'right', got {self.padding_side!r}.")
        if self.pad_to_multiple_of is not None and self.pad_to_multiple_of < 1:
            raise ValueError(f"`pad_to_multiple_of` must be at least 1, got {self.pad_to_multiple_of}.")

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """Raises ValueError for no rows, rows that are not encoded, or `prompts_only` without an answer to cut."""
        if not rows:
            raise ValueError("`rows` is empty: collate at least one row.")
        present = [name for name in _SEQUENCES if name in rows[0]]
        if present[:1] not in (["input_ids"], ["statement_ids"]):
            raise ValueError(f"Rows with the columns {sorted(rows[0])} are not encoded: call `encode_answers` first.")
        sequences = {name: [torch.as_tensor(row[name], dtype=torch.int64) for row in rows] for name in present}
        first = present[0]
        if self.prompts_only:
            if first != "input_ids" or "labels" not in sequences:
                raise ValueError("`prompts_only` needs `input_ids` and `labels`: call `encode_answers` on text rows.")
            sequences = {
                first: [_before_answer(*pair) for pair in zip(sequences[first], sequences["labels"], strict=True)]
            }
        fillers = {"labels": IGNORED, "hops": -1}
        batch = {name: self._padded(parts, fillers.get(name, self.pad_token_id)) for name, parts in sequences.items()}
        batch["attention_mask"] = self._padded(
            [torch.ones(len(ids), dtype=torch.int64) for ids in sequences[first]], 0
        )
        for name in self.extra_columns:
            batch[name] = torch.tensor([int(row[name]) for row in rows])
        return batch

    def _padded(self, parts: list[Tensor], value: int) -> Tensor:
        length = max(len(part) for part in parts)
        if self.pad_to_multiple_of is not None:
            length = -(-length // self.pad_to_multiple_of) * self.pad_to_multiple_of
        out = torch.full((len(parts), length, *parts[0].shape[1:]), value)
        for row, part in zip(out, parts, strict=True):
            if self.padding_side == "right":
                row[: len(part)] = part
            else:
                row[length - len(part) :] = part
        return out


def _before_answer(input_ids: Tensor, labels: Tensor) -> Tensor:
    answered = torch.nonzero(labels != IGNORED)
    if len(answered) == 0:
        raise ValueError("A row has no label, so no answer to cut: `prompts_only` needs rows of `encode_answers`.")
    return input_ids[: int(answered[0])]


def _encode_batch(
    rows: Mapping[str, list[Any]], tokenizer: PreTrainedTokenizerBase, max_length: int | None
) -> dict[str, Any]:
    before = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    # for byte-pair tokenizers a word inside a text begins with its space
    texts = rows["prompt"], [f" {answer}" for answer in rows["answer"]]
    parts = [tokenizer(column, add_special_tokens=False)["input_ids"] for column in texts]
    unknown = tokenizer.unk_token_id
    input_ids, labels = [], []
    for prompt, answer, text, reply in zip(*parts, rows["prompt"], rows["answer"], strict=True):
        if unknown is not None and unknown != tokenizer.eos_token_id and (unknown in prompt or unknown in answer):
            words = ", ".join(unknown_words(tokenizer, f"{text} {reply}"))
            raise ValueError(f"Words that the tokenizer does not know: {words}. Build it from the words of the data.")
        if not prompt or not answer:
            raise ValueError(f"An empty {'answer' if prompt else 'prompt'}: every row needs a question and an answer.")
        ids = [*before, *prompt, *answer, tokenizer.eos_token_id]
        if max_length is not None and len(ids) > max_length:
            raise ValueError(
                f"A row has {len(ids)} tokens, more than `max_length` {max_length}: make the samples shorter, or give "
                "the model more positions."
            )
        input_ids.append(ids)
        labels.append([IGNORED] * (len(before) + len(prompt)) + ids[len(before) + len(prompt) :])
    return {"input_ids": input_ids, "labels": labels}
