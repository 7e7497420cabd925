# SPDX-License-Identifier: Apache-2.0
"""Measuring the perplexity of a language model again, as train_causal_lm.py did."""

import math
from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from ..data.tracking_tokenizer import IGNORED
from ..training.sequence_perplexity import EvaluationText
from ..training.sequence_text import TextArguments, encode_documents, load_text_dataset, read_text, text_column
from .figures import Evaluation, take
from .reruns import Found, Request, Rerun, data_named, evenly_spread


# relative, of a network in float32 on another machine
_FLOAT32 = 0.001

__all__ = ["rerun_language_model"]


def rerun_language_model(folder: Path, evaluation: Evaluation, request: Request) -> Rerun:
    """Perplexity over the windows of the text, or over some of them.

    Raises:
        FileNotFoundError, ValueError: text that is not where it was, or other text.
    """
    given = take(evaluation.content, ("arguments",), evaluation.file)
    known = {field.name for field in fields(TextArguments)}
    arguments = _with_data(TextArguments(**{k: v for k, v in given.items() if k in known}), request)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = _text(arguments, tokenizer, request.batch_size or int(given.get("eval_batch_size") or 64), evaluation)
    total = sum(int((batch["targets"] != IGNORED).sum()) for batch in text.batches)
    expected = int(take(evaluation.content, ("evaluation", "num_tokens"), evaluation.file))
    if total != expected:
        raise ValueError(
            f"The text has {total:,} tokens to predict, {evaluation.file} is of {expected:,}: give the text it was "
            f"measured on ({evaluation.data!r}) with `--data`."
        )
    model: Any = AutoModelForCausalLM.from_pretrained(folder, use_safetensors=True, dtype="float32")
    nats, counts = _window_losses(model.to(request.device).eval(), text, request)
    complete = int(counts.sum()) == total
    examples = f"all {total:,} tokens" if complete else f"{int(counts.sum()):,} of {total:,} tokens"
    return Rerun(_found(nats, counts, total, text), complete, _FLOAT32, examples)


def _with_data(arguments: TextArguments, request: Request) -> TextArguments:
    """The arguments with the text where it is now: a file, a folder with files of the same names, or a data set."""
    if request.data is None:
        return arguments
    if arguments.dataset is not None:
        return replace(arguments, dataset=request.data)
    place = Path(request.data).expanduser()

    def moved(paths: list[str] | None) -> list[str] | None:
        if paths is None:
            return None
        return [str(place / Path(path).name if place.is_dir() else place) for path in paths]

    return replace(arguments, train_file=moved(arguments.train_file), eval_file=moved(arguments.eval_file))


def _text(
    arguments: TextArguments, tokenizer: PreTrainedTokenizerBase, batch_size: int, evaluation: Evaluation
) -> EvaluationText:
    parts: list[NDArray[np.int32]] = []
    documents, count = [], 0
    with data_named(evaluation):
        for document in _documents(arguments):
            documents.append(document)
            parts += encode_documents([document], tokenizer, argument="--data")
            count += len(parts[-1])
            # a stream is read no further than the evaluation read it
            if arguments.max_eval_tokens is not None and count >= arguments.max_eval_tokens:
                break
    if not parts:
        raise ValueError(f"There is no text to evaluate on, {evaluation.file} was measured on {evaluation.data!r}.")
    ids = np.concatenate(parts)
    cut = arguments.max_eval_tokens is not None and len(ids) > arguments.max_eval_tokens
    return EvaluationText.of_ids(
        ids[: arguments.max_eval_tokens],
        None if cut else "".join(documents),
        tokenizer,
        window=arguments.block_size,
        stride=arguments.eval_stride or arguments.block_size,
        batch_size=batch_size,
    )


def _documents(arguments: TextArguments) -> Iterator[str]:
    """What the script evaluates on."""
    if arguments.dataset is not None:
        data = load_text_dataset(arguments, arguments.eval_split, streaming=arguments.streaming)
        column = text_column(data, arguments.text_column)
        yield from (row[column] for row in data if row[column] or arguments.streaming)
    elif arguments.eval_file is not None:
        yield from map(read_text, arguments.eval_file)
    else:
        train = [read_text(path) for path in arguments.train_file or []]
        yield train[-1][len(train[-1]) - round(arguments.eval_share * sum(map(len, train))) :]


@torch.no_grad()
def _window_losses(
    model: Any, text: EvaluationText, request: Request
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Loss in nats and number of predicted tokens of each of the chosen windows."""
    windows = [(batch, row) for batch in text.batches for row in range(len(batch["targets"]))]
    chosen = evenly_spread(windows, request)
    size = len(text.batches[0]["targets"])
    nats, counts = [], []
    for start in range(0, len(chosen), size):
        part = chosen[start : start + size]
        inputs, targets = (
            torch.stack([batch[name][row] for batch, row in part]).to(model.device)
            for name in ("input_ids", "targets")
        )
        logits = model(input_ids=inputs, use_cache=False).logits
        losses = F.cross_entropy(logits.transpose(1, 2).float(), targets, reduction="none", ignore_index=IGNORED)
        nats += losses.double().sum(dim=1).tolist()
        counts += (targets != IGNORED).sum(dim=1).tolist()
        if request.progress is not None:
            request.progress(min(start + size, len(chosen)), len(chosen))
    return np.array(nats), np.array(counts)


def _found(
    nats: NDArray[np.float64], counts: NDArray[np.int64], total: int, text: EvaluationText
) -> dict[tuple[str, ...], Found]:
    """The figures, with their standard deviations over windows.

    The loss is a ratio of sums over windows; to first order its deviation is that of (nats - loss tokens) / tokens,
    and that of the perplexity, its exponential, as many times larger.
    """
    loss, windows = float(nats.sum() / counts.sum()), len(nats)
    deviation = float(((nats - loss * counts) / counts.mean()).std(ddof=1)) if windows > 1 else None
    factors = {
        "loss": (loss, 1.0),
        "perplexity": (math.exp(loss), math.exp(loss)),
        "bits_per_character": _scaled(loss, total / math.log(2) / max(text.num_characters, 1)),
        "bits_per_byte": _scaled(loss, total / math.log(2) / max(text.num_bytes, 1)),
    }
    return {
        ("evaluation", name): Found(value, windows, windows, None if deviation is None else deviation * factor)
        for name, (value, factor) in factors.items()
    }


def _scaled(loss: float, factor: float) -> tuple[float, float]:
    return loss * factor, factor
