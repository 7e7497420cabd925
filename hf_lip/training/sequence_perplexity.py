# SPDX-License-Identifier: Apache-2.0
"""Perplexity of a whole text: every token but the first is predicted once, from windows of one length."""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from accelerate.utils import gather_object
from numpy.typing import NDArray
from torch.nn import functional as F
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..data.tracking_tokenizer import IGNORED
from .sequence_questions import Batch


if TYPE_CHECKING:
    from accelerate import Accelerator

__all__ = ["EvaluationText", "measure_perplexity"]


@dataclass(frozen=True)
class EvaluationText:
    """A text to evaluate on.

    Attributes:
        batches: `input_ids` and `targets` (B, n), the targets -100 where a token is context only.
        num_characters, num_bytes: of the predicted text (UTF-8).
    """

    batches: list[Batch]
    num_characters: int
    num_bytes: int

    @classmethod
    def of_ids(
        cls,
        ids: NDArray[np.int32],
        text: str | None,
        tokenizer: PreTrainedTokenizerBase,
        *,
        window: int,
        stride: int,
        batch_size: int,
    ) -> "EvaluationText":
        """Windows of `window` tokens every `stride` tokens; of a later window the last `stride` are predicted.

        Args:
            ids: (N,) tokens.
            text: what they were made from; None where it was cut: it is then decoded from them.

        Raises:
            ValueError: fewer than two tokens.
        """
        if len(ids) < 2:
            raise ValueError(f"The text to evaluate on has {len(ids)} tokens, and two are needed: give more text.")
        rows = []
        predicted = 1
        for start in range(0, len(ids) - 1, stride):
            end = min(start + window, len(ids) - 1)
            if end < predicted:
                break
            targets = np.full(window, IGNORED, dtype=np.int64)
            targets[predicted - 1 - start : end - start] = ids[predicted : end + 1]
            inputs = np.zeros(window, dtype=np.int64)
            inputs[: end - start] = ids[start:end]
            rows.append((inputs, targets))
            predicted = end + 1
        batches = []
        for first in range(0, len(rows), batch_size):
            part = rows[first : first + batch_size]
            arrays = [np.stack([row[place] for row in part]) for place in (0, 1)]
            batches.append({"input_ids": torch.from_numpy(arrays[0]), "targets": torch.from_numpy(arrays[1])})
        whole = str(tokenizer.decode(ids.tolist(), skip_special_tokens=True)) if text is None else text
        unpredicted = str(tokenizer.decode([int(ids[0])], skip_special_tokens=True))
        whole_bytes, unpredicted_bytes = (len(part.encode("utf-8", "replace")) for part in (whole, unpredicted))
        return cls(batches, len(whole) - len(unpredicted), whole_bytes - unpredicted_bytes)


@torch.no_grad()
def measure_perplexity(model: PreTrainedModel, text: EvaluationText, accelerator: "Accelerator") -> dict[str, Any]:
    """Perplexity of a model in evaluation mode, the windows shared among the processes.

    Returns:
        `loss` (nats a token), `perplexity` (of a token), `bits_per_character`, `bits_per_byte`, `num_tokens`.

    Raises:
        RuntimeError: a loss that is not finite, or whose exponential is not.
    """
    own: list[tuple[int, float, int]] = []
    for place in range(accelerator.process_index, len(text.batches), accelerator.num_processes):
        batch = {name: tensor.to(accelerator.device) for name, tensor in text.batches[place].items()}
        logits = model(input_ids=batch["input_ids"], use_cache=False).logits
        losses = F.cross_entropy(logits.flatten(0, 1).float(), batch["targets"].flatten(), reduction="none")
        own.append((place, float(losses.double().sum()), int((batch["targets"] != IGNORED).sum())))
    parts = sorted(gather_object(own))
    # summed in one order, whatever process had which windows
    nats, count = math.fsum(part[1] for part in parts), sum(part[2] for part in parts)
    loss = nats / count
    if not loss < 700.0:
        raise RuntimeError(f"The model has diverged: its loss on the text to evaluate on is {loss} nats a token.")
    return {
        "loss": loss,
        "perplexity": math.exp(loss),
        "bits_per_character": nats / math.log(2) / max(text.num_characters, 1),
        "bits_per_byte": nats / math.log(2) / max(text.num_bytes, 1),
        "num_tokens": count,
    }
