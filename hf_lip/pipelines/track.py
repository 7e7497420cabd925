# SPDX-License-Identifier: Apache-2.0
"""What in a text a language model's answer came from: the answer, and the provenance of each of its tokens."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from hf_lip.models.chacal.modeling_chacal import ChacalPreTrainedModel
from hf_lip.models.chacal.provenance import Provenance, provenance


__all__ = ["TrackedAnswer", "load_tracking_model", "track"]


@dataclass(frozen=True, eq=False)
class TrackedAnswer:
    """A greedy answer to a text, and where it came from.

    Attributes:
        text: the text that was read.
        tokens: the m tokens of the text and then those of the answer, the end of the sequence included, as strings.
        token_ids: their ids.
        spans: where each token of the text begins and ends in it, empty for special tokens; None if the tokenizer does
            not say.
        num_text_tokens: m.
        answer: the answer without special tokens.
        ended: whether the model ended it; else it was cut off.
        probabilities: of each token of the answer, given those before it.
        provenance: of the positions that the tokens of the answer were read from, m - 1 and on.
    """

    text: str
    tokens: tuple[str, ...]
    token_ids: tuple[int, ...]
    spans: tuple[tuple[int, int], ...] | None
    num_text_tokens: int
    answer: str
    ended: bool
    probabilities: tuple[float, ...]
    provenance: Provenance

    @property
    def probability(self) -> float:
        """Of the whole answer, its end included where the model ended it."""
        return float(torch.tensor(self.probabilities, dtype=torch.float64).prod())

    @property
    def answer_tokens(self) -> tuple[str, ...]:
        return self.tokens[self.num_text_tokens :]

    @property
    def explained(self) -> list[int]:
        """Numbers of the answer's tokens that say something: all but the end, unless there is nothing else."""
        count = len(self.answer_tokens) - (1 if self.ended else 0)
        return list(range(max(count, 1)))

    def chosen_layers(self, layer: int | None) -> list[int]:
        """The chained layers, or the one asked for, counted from the first.

        Raises:
            ValueError: if the model does not have it, or no layer is chained and none was asked for.
        """
        if layer is not None:
            self.provenance.layer(layer)
            return [layer % len(self.provenance.layers)]
        if not self.provenance.chained_layers:
            raise ValueError("The model has no chained layer: choose one of the others with `layer`.")
        return list(self.provenance.chained_layers)

    def values(self, measure: str, layer: int, *, per_head: bool = False) -> Tensor:
        """One measure of what each token read: (answer tokens, n), or (answer tokens, H, n) with `per_head`, where n
        leaves the last token of the answer out, as nothing read it.

        Args:
            measure: `weight`, the effective weights, exact; their mean over heads without `per_head`. `contribution`,
                the norms of the summands of the layer's output, exact, as shares of their sum over the tokens.
            layer: counted from the first; negative from the last.

        Raises:
            ValueError: for another measure, or a layer that the model does not have.
        """
        if measure == "weight":
            weights = self.provenance.weights(layer)[0].transpose(0, 1)
            return weights if per_head else weights.mean(1)
        if measure == "contribution":
            norms = self.provenance.contributions(layer, per_head=per_head)[0]
            norms = norms.transpose(0, 1) if per_head else norms
            sums = norms.sum(-1, keepdim=True)
            return norms / torch.where(sums == 0, torch.ones_like(sums), sums)
        raise ValueError(f"`measure` must be weight or contribution, got {measure!r}.")


def load_tracking_model(model: str, revision: str | None = None) -> tuple[Any, PreTrainedTokenizerBase]:
    """A causal language model with chained attention, in evaluation mode, and its tokenizer.

    Args:
        model: a folder or Hub id.
        revision: branch, tag or commit of a Hub repository.

    Raises:
        FileNotFoundError: `model` looks like a path that does not exist.
        OSError, ValueError: whatever transformers says of files that are missing or of another kind.
    """
    if not Path(model).exists() and (model.startswith((".", "/", "~")) or model.count("/") > 1):
        raise FileNotFoundError(f"`MODEL` {model!r} does not exist: give the folder of a checkpoint, or a Hub id.")
    tokenizer = AutoTokenizer.from_pretrained(model, revision=revision)
    return AutoModelForCausalLM.from_pretrained(model, revision=revision).eval(), tokenizer


@torch.no_grad()
def track(model: Any, tokenizer: PreTrainedTokenizerBase, text: str, *, max_new_tokens: int = 16) -> TrackedAnswer:
    """Answer a text greedily, until the end of the sequence or `max_new_tokens`, and say what each token came from.

    The text is read as the tokenizer reads it, with the special tokens that it adds.

    Args:
        model: a causal language model with chained attention, in evaluation mode.
        tokenizer: its tokenizer.
        text: such as "5 > v3 ; v3 > v7 ; v7 ?".
        max_new_tokens: at most so many, and as many as the model has positions for.

    Raises:
        ValueError: for an empty text, words that the tokenizer does not know, a text longer than the positions of the
            model, a number below 1; and as `hf_lip.provenance`.
    """
    if max_new_tokens < 1:
        raise ValueError(f"`max_new_tokens` must be at least 1, got {max_new_tokens}.")
    ids, spans = _encode(tokenizer, text)
    limit = _positions(model)
    if limit is not None:
        if len(ids) > limit:
            raise ValueError(
                f"`text` has {len(ids)} tokens, but the model has {limit} positions: shorten it, or train a model "
                "with more."
            )
        # the last token of the answer is not read
        max_new_tokens = min(max_new_tokens, limit - len(ids) + 1)
    prompt = torch.tensor([ids], device=model.device)
    ends = _ends(model, tokenizer)
    whole = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=max_new_tokens,
        do_sample=False,
        num_beams=1,
        eos_token_id=ends or None,
        pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else (ends or [0])[0],
    )
    answer = whole[0, len(ids) :].tolist()
    found = provenance(model, whole[:, :-1], positions=range(len(ids) - 1, whole.shape[1] - 1))
    logits: Any = found.logits
    probabilities = logits[0].double().softmax(-1)[range(len(answer)), answer].tolist()
    all_ids = [*ids, *answer]
    return TrackedAnswer(
        text=text,
        tokens=tuple(_readable(tokenizer, token) for token in all_ids),
        token_ids=tuple(all_ids),
        spans=spans,
        num_text_tokens=len(ids),
        answer=_text(tokenizer, answer, skip_special_tokens=True).strip(),
        ended=answer[-1] in ends,
        probabilities=tuple(probabilities),
        provenance=found,
    )


def _encode(tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[list[int], tuple[tuple[int, int], ...] | None]:
    if not text.strip():
        raise ValueError("`text` is empty: give a text that ends where the answer is to begin.")
    encoded = tokenizer(text, return_offsets_mapping=tokenizer.is_fast)
    ids: list[int] = list(encoded["input_ids"])
    spans = tuple(tuple(span) for span in encoded["offset_mapping"]) if tokenizer.is_fast else None
    unknown = tokenizer.unk_token_id
    # byte-level tokenizers name their end of text as the unknown token, which they never need
    if unknown is not None and unknown != tokenizer.eos_token_id and unknown in ids:
        words = ""
        if spans is not None:
            pieces = [text[start:end] for (start, end), token in zip(spans, ids) if token == unknown]
            words = f": {', '.join(dict.fromkeys(pieces))}"
        raise ValueError(f"`text` has words that the tokenizer does not know{words}. Use those that it was made from.")
    if not ids:
        raise ValueError("`text` gives no token.")
    return ids, spans


def _positions(model: Any) -> int | None:
    """How many positions the model has; None if any number will do."""
    config = model.config.get_text_config(decoder=True)
    if isinstance(model, ChacalPreTrainedModel) and not config.use_rope:
        return None
    return getattr(config, "max_position_embeddings", None)


def _ends(model: Any, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    end = model.generation_config.eos_token_id
    end = tokenizer.eos_token_id if end is None else end
    return [] if end is None else [end] if isinstance(end, int) else list(end)


def _text(tokenizer: PreTrainedTokenizerBase, ids: list[int], **options: bool) -> str:
    return str(tokenizer.decode(ids, **options))


def _readable(tokenizer: PreTrainedTokenizerBase, token: int) -> str:
    """A token as it reads in a text; its own name where it is a byte or a space."""
    text = _text(tokenizer, [token], clean_up_tokenization_spaces=False)
    return text if text.strip() and "\ufffd" not in text else str(tokenizer.convert_ids_to_tokens(token))
