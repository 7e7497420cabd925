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
    text_ids, ids, seen = batch["text_ids"], batch["input_ids"], batch["seen"]
    cache: Cache = (
        ChainedCache(model.config) if model.config._attn_implementation == NAME else DynamicCache(config=model.config)
    )
    model.base_model(input_ids=text_ids, past_key_values=cache, use_cache=True)
    cache.batch_select_indices(batch["text"])
    places = torch.arange(text_ids.shape[1], device=ids.device)
    mask = torch.cat([places < seen[:, None], torch.ones_like(ids, dtype=torch.bool)], 1).long()
    positions = seen[:, None] + torch.arange(ids.shape[1], device=ids.device)
    # positions of the padding after a short question may lie beyond those that the model has
    positions = torch.minimum(positions, positions[:, :1] + _lengths(batch)[:, None] - 1)
    return part(input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True)


def _lengths(batch: Batch) -> Tensor:
    """Tokens of each question (R,): to the last label."""
    supervised = batch["labels"] != IGNORED
    places = torch.arange(supervised.shape[1], device=supervised.device)
    return (supervised * (places + 1)).amax(1)
