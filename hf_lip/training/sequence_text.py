# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: RUF009  (`option` returns `dataclasses.field`)
"""Text for language modelling: its arguments, its tokenizers, and documents from files and data sets."""

import gzip
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer, decoders
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from .arguments import option, require


# `datasets` brings pandas and pyarrow: imported where it is used, so that importing the package stays quick
if TYPE_CHECKING:
    import datasets

SPECIAL_TOKENS = ("<pad>", "<bos>", "<eos>")

__all__ = [
    "TextArguments",
    "byte_tokenizer",
    "character_tokenizer",
    "choose_tokenizer",
    "encode_documents",
    "load_text_dataset",
    "read_text",
    "text_column",
]


@dataclass
class TextArguments:
    """Text to train on and to evaluate on: files, or a data set."""

    train_file: list[str] | None = option(None, "Text files (UTF-8, plain or .gz), each one document.")
    eval_file: list[str] | None = option(None, "Text files to evaluate on. Default: the end of the training text.")
    dataset: str | None = option(None, "In place of files: a data set of the Hub, or a folder that `datasets` reads.")
    dataset_config: str | None = option(None, "Configuration of a Hub data set.")
    train_split: str = option("train", "dataset: split to train on.")
    eval_split: str = option("validation", "dataset: split to evaluate on.")
    text_column: str | None = option(None, "dataset: column of the texts; found by itself where there is one.")
    streaming: bool = option(False, "dataset: read the training split as it is used.")
    shuffle_buffer: int = option(
        0, "streaming: documents among which the next one is drawn; 0 for the stream's order."
    )
    eval_share: float = option(0.05, "train_file without eval_file: the share of the text, at its end, held out.")
    max_eval_tokens: int | None = option(None, "Evaluate on the first so many tokens.")
    tokenizer: str | None = option(
        None,
        "'bytes', 'chars' (those of the training files), a folder or a Hub id. Default: the checkpoint's, or bytes.",
    )
    block_size: int = option(256, "Tokens of a training sequence and of an evaluation window.")
    eval_stride: int | None = option(
        None,
        "Tokens from one evaluation window to the next; those that windows share are context of the later one. "
        "Default: block_size, windows that share none.",
    )

    def __post_init__(self) -> None:
        require(self, "block_size max_eval_tokens eval_stride", "> 0")
        require(self, "shuffle_buffer", ">= 0")
        require(self, "eval_share", "in [0, 1)")
        if (self.train_file is None) == (self.dataset is None):
            raise ValueError("Give the text to train on: either --train_file or --dataset.")
        if self.dataset is None:
            wrong = [name for name in ("dataset_config", "text_column", "streaming") if getattr(self, name)]
            if wrong:
                raise ValueError(f"--{wrong[0]} is an option of --dataset.")
            if self.eval_file is None and self.eval_share == 0:
                raise ValueError("There is nothing to evaluate on: give --eval_file, or --eval_share above 0.")
        elif self.tokenizer == "chars":
            raise ValueError("--tokenizer chars needs to read all text first: use it with --train_file, or use bytes.")
        if self.shuffle_buffer and not self.streaming:
            raise ValueError("--shuffle_buffer is an option of --streaming.")
        if self.eval_stride is not None and self.eval_stride > self.block_size:
            raise ValueError(
                f"--eval_stride is {self.eval_stride}, above --block_size {self.block_size}: tokens would be left out."
            )


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte of UTF-8, after `<pad>` 0, `<bos>` 1 and `<eos>` 2: any text can be written."""
    return _merge_free(sorted(ByteLevel.alphabet()), by_bytes=True)


def character_tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """One token a character that occurs in the texts, sorted, after `<pad>` 0, `<bos>` 1 and `<eos>` 2.

    Raises:
        ValueError: texts without any character.
    """
    characters = sorted(set().union(*map(set, texts)))
    if not characters:
        raise ValueError("The text is empty: there is no character to make a tokenizer of.")
    return _merge_free(characters, by_bytes=False)


def choose_tokenizer(name: str | None, checkpoint: str | None, texts: Sequence[str]) -> PreTrainedTokenizerBase:
    """The tokenizer that `--tokenizer` names; without a name that of the checkpoint, or bytes."""
    if name == "bytes" or (name is None and checkpoint is None):
        return byte_tokenizer()
    if name == "chars":
        return character_tokenizer(texts)
    return AutoTokenizer.from_pretrained(checkpoint if name is None else name)


def read_text(path: str | Path) -> str:
    """The text of a file, plain or gzipped.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is not UTF-8, not gzipped, or empty.
    """
    file = Path(path).expanduser()
    if not file.is_file():
        raise FileNotFoundError(f"Text file {str(path)!r} does not exist: check the path.")
    try:
        data = file.read_bytes()
        text = (gzip.decompress(data) if file.suffix == ".gz" else data).decode("utf-8-sig")
    except (gzip.BadGzipFile, zlib.error, EOFError, UnicodeDecodeError) as error:
        kind = "gzipped UTF-8 text" if file.suffix == ".gz" else "UTF-8 text"
        raise ValueError(f"Cannot read {str(path)!r} as {kind} ({error}): fetch it again.") from error
    if not text.strip():
        raise ValueError(f"Text file {str(path)!r} is empty: there is nothing to read.")
    return text


def load_text_dataset(arguments: TextArguments, split: str, *, streaming: bool) -> Any:
    """A split of `--dataset`.

    Raises:
        ValueError: no such split.
    """
    import datasets

    assert arguments.dataset is not None
    try:
        return datasets.load_dataset(arguments.dataset, arguments.dataset_config, split=split, streaming=streaming)
    except ValueError as error:
        raise ValueError(f"--dataset {arguments.dataset!r}, split {split!r}: {error}") from error


def text_column(dataset: "datasets.Dataset | datasets.IterableDataset", wanted: str | None) -> str:
    """The column of the texts: the wanted one, `text`, or the only one of strings.

    Raises:
        ValueError: there is none, or several.
    """
    columns = dataset.column_names or sorted(next(iter(dataset), {}))
    if wanted is not None:
        if wanted not in columns:
            raise ValueError(f"--text_column {wanted!r} is no column of --dataset, whose columns are {columns}.")
        return wanted
    if "text" in columns:
        return "text"
    first: Any = next(iter(dataset), {})
    texts = [name for name in columns if isinstance(first.get(name), str)]
    if len(texts) != 1:
        raise ValueError(f"--dataset has no one column of texts among {columns}: name it with --text_column.")
    return texts[0]


def encode_documents(
    documents: Iterable[str], tokenizer: PreTrainedTokenizerBase, *, argument: str, close: bool = True
) -> Iterator[NDArray[np.int32]]:
    """Token ids of each document, without `<bos>`, with `<eos>` at the end where the tokenizer has one.

    Args:
        argument: named in errors.
        close: add `<eos>`.

    Raises:
        ValueError: characters that the tokenizer does not know.
    """
    end = [tokenizer.eos_token_id] if close and tokenizer.eos_token_id is not None else []
    for document in documents:
        # a long text is meant to be cut into blocks: the tokenizer's warning about its length says nothing
        ids = tokenizer(document, add_special_tokens=False, verbose=False)["input_ids"]
        if len(ids) < len(document):
            _check_characters(document, tokenizer, argument)
        yield np.array([*ids, *end], dtype=np.int32)


def _check_characters(document: str, tokenizer: PreTrainedTokenizerBase, argument: str) -> None:
    """Raise where characters have been dropped: a BPE without merges, bytes and an unknown token does it silently."""
    if not isinstance(tokenizer, PreTrainedTokenizerFast) or tokenizer.backend_tokenizer.pre_tokenizer is not None:
        return
    model = tokenizer.backend_tokenizer.model
    if not isinstance(model, BPE) or model.unk_token or model.byte_fallback:
        return
    unknown = sorted(set(document) - set(tokenizer.get_vocab()))
    if unknown:
        shown = ", ".join(map(repr, unknown[:10]))
        raise ValueError(
            f"{argument} has characters that the tokenizer does not know: {shown}. Use --tokenizer bytes."
        )


def _merge_free(alphabet: Sequence[str], *, by_bytes: bool) -> PreTrainedTokenizerFast:
    tokens = {token: index for index, token in enumerate((*SPECIAL_TOKENS, *alphabet))}
    tokenizer = Tokenizer(BPE(vocab=tokens, merges=[]))
    if by_bytes:
        tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer.decoder = decoders.ByteLevel()
    else:
        tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        clean_up_tokenization_spaces=False,
    )
