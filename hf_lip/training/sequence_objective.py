# SPDX-License-Identifier: Apache-2.0
"""The loss of a batch, and what a model predicts for it."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache

from ..data.chains import embed_statements
from ..data.tracking_tokenizer import IGNORED
from ..models.chacal.attention import ChainContext
from ..models.chacal.interface import NAME, ChainedCache
from ..models.chacal.modeling_chacal import ChacalForCausalLM
from .sequence_questions import Batch


__all__ = ["SequenceObjective", "next_tokens", "sequence_logits"]


class SequenceObjective(nn.Module):
    """The cross-entropy of a batch, for wrappers (distributed training, autocast) to take as one module."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: Batch, num_labels: Tensor) -> Tensor:
        """Sum of the losses of the supervised tokens, divided by `num_labels`, those of the whole step."""
        targets = next_tokens(batch)
        supervised = targets != IGNORED
        if isinstance(self.model, ChacalForCausalLM):
            # padding and prompts need no logits
            hidden = _run(self.model.model, self.model, batch).last_hidden_state
            logits = self.model.lm_head(hidden[supervised])
        else:
            logits = sequence_logits(self.model, batch)[supervised]
        return F.cross_entropy(logits.float(), targets[supervised], reduction="sum") / num_labels


def next_tokens(batch: Batch) -> Tensor:
    """What is to be predicted after each token (B, n), -100 for nothing: `targets`, or `labels` one place earlier."""
    return batch["targets"] if "targets" in batch else F.pad(batch["labels"][:, 1:], (0, 1), value=IGNORED)


def sequence_logits(model: PreTrainedModel, batch: Batch) -> Tensor:
    """Logits (B, n, vocabulary) of the tokens of a batch, to be compared with `labels` one place later.

    Args:
        batch: has `statement_ids`, `input_ids`, or `input_ids` that continue from `text_ids` (see `packed_batch`).
    """
    return _run(model, model, batch).logits


def _run(part: nn.Module, model: PreTrainedModel, batch: Batch) -> Any:
    """Output of `part`, which is the model or its decoder without the head."""
    if "statement_ids" in batch:
        table: Any = model.get_input_embeddings()
        embeds = embed_statements(table, batch["statement_ids"])
        return part(inputs_embeds=embeds, use_cache=False)
    if "text_ids" not in batch:
        return part(input_ids=batch["input_ids"], use_cache=False)
    if isinstance(model, ChacalForCausalLM):
        return _run_beside(part, model, batch)
    text_ids, ids, seen = batch["text_ids"], batch["input_ids"], batch["seen"]
    cache: Cache = (
        ChainedCache(model.config) if model.config._attn_implementation == NAME else DynamicCache(config=model.config)
    )
    model.base_model(input_ids=text_ids, past_key_values=cache, use_cache=True)
    cache.batch_select_indices(batch["text"])
    places = torch.arange(text_ids.shape[1], device=ids.device)
    mask = torch.cat([places < seen[:, None], torch.ones_like(ids, dtype=torch.bool)], 1).long()
    return part(
        input_ids=ids,
        attention_mask=mask,
        position_ids=_positions(batch),
        past_key_values=cache,
        use_cache=True,
    )


def _run_beside(part: nn.Module, model: PreTrainedModel, batch: Batch) -> Any:
    """The same for our own models, which need no copy of a text for each of its questions: they are one row of tokens
    after it, kept apart by masks."""
    text_ids, ids, seen, text = batch["text_ids"], batch["input_ids"], batch["seen"], batch["text"]
    (num_texts, num_places), (num_questions, length), device = text_ids.shape, ids.shape, ids.device
    counts = torch.bincount(text, minlength=num_texts)
    most = int(counts.max())
    # questions follow each other text by text
    column = torch.arange(num_questions, device=device) - (counts.cumsum(0) - counts)[text]
    place = text * most + column

    def spread(values: Tensor) -> Tensor:
        """(R, ...) to (W, questions of a text, ...), zeros for those that a text does not have."""
        shape = (num_texts * most, *values.shape[1:])
        return values.new_zeros(shape).index_copy(0, place, values).unflatten(0, (num_texts, most))

    cache = DynamicCache(config=model.config)
    model.base_model(input_ids=text_ids, past_key_values=cache, use_cache=True)
    past_seen = spread(seen).repeat_interleave(length, 1)
    segments = torch.arange(most, device=device).repeat_interleave(length).expand(num_texts, -1)
    own = (segments.unsqueeze(-1) == segments.unsqueeze(-2)).tril()
    of_text = torch.arange(num_places, device=device) < past_seen.unsqueeze(-1)
    output = part(
        input_ids=spread(ids).flatten(1),
        attention_mask={
            "full_attention": torch.cat([of_text, own], 2).unsqueeze(1),
            "chained_attention": ChainContext(num_places, segments=segments, past_seen=past_seen),
        },
        position_ids=spread(_positions(batch)).flatten(1),
        past_key_values=cache,
        use_cache=True,
    )
    name = "logits" if part is model else "last_hidden_state"
    output[name] = output[name].unflatten(1, (most, length)).flatten(0, 1).index_select(0, place)
    return output


def _positions(batch: Batch) -> Tensor:
    """Of the tokens of each question, which goes on after what it has seen of its text."""
    seen, length = batch["seen"], batch["input_ids"].shape[1]
    positions = seen[:, None] + torch.arange(length, device=seen.device)
    # positions of the padding after a short question may lie beyond those that the model has
    return torch.minimum(positions, positions[:, :1] + _lengths(batch)[:, None] - 1)


def _lengths(batch: Batch) -> Tensor:
    """Tokens of each question (R,): to the last label."""
    supervised = batch["labels"] != IGNORED
    places = torch.arange(supervised.shape[1], device=supervised.device)
    return (supervised * (places + 1)).amax(1)
