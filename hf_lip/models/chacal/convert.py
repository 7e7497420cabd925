# SPDX-License-Identifier: Apache-2.0
"""A pre-trained softmax checkpoint made into one with chained attention."""

import tempfile
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.utils import cached_file

from .converted import (
    ChacalGPT2Config,
    ChacalGPT2LMHeadModel,
    ChacalLlamaConfig,
    ChacalLlamaForCausalLM,
    ChacalQwen2Config,
    ChacalQwen2ForCausalLM,
)


CONVERTED: dict[str, tuple[Any, Any]] = {
    "gpt2": (ChacalGPT2Config, ChacalGPT2LMHeadModel),
    "llama": (ChacalLlamaConfig, ChacalLlamaForCausalLM),
    "qwen2": (ChacalQwen2Config, ChacalQwen2ForCausalLM),
}
TOKENIZER_FILES = ("tokenizer_config.json", "tokenizer.json", "vocab.json", "tokenizer.model")


@dataclass(frozen=True)
class ConversionReport:
    """What `convert_attention` wrote.

    Attributes:
        model_type: of the new checkpoint.
        num_layers: layers that are chained now.
        largest_difference: of the logits of the two models on random tokens, in float32; rounding only at gamma = 0.
        largest_logit: of the original on these tokens, for scale.
        tokenizer: True if one was copied.
    """

    model_type: str
    num_layers: int
    largest_difference: float
    largest_logit: float
    tokenizer: bool


@torch.no_grad()
def convert_attention(
    model: str | Path,
    out: str | Path,
    *,
    gamma: Any = 0.0,
    gamma_learnable: bool = False,
    diagonal: str = "strict",
    normalize: bool = False,
    revision: str | None = None,
    num_tokens: int = 64,
) -> ConversionReport:
    """Write the checkpoint `model`, with its weights as they are and chained attention, into the folder `out`.

    With `gamma=0` the logits are those of the original; training then raises the discount (chacal section 5). Both
    models are run on the same random tokens, and at `gamma=0` nothing is written if they differ by more than rounding.

    Args:
        model: folder or Hub id of a causal language model: Llama, Qwen2 without sliding windows, GPT-2.
        out: a new or empty folder.
        gamma: the discount to start at, as `chain_gamma`.
        gamma_learnable, diagonal, normalize: as `chain_gamma_learnable`, `chain_diagonal` and `chain_normalize`.
        revision: branch, tag or commit of a Hub repository.
        num_tokens: length of the random sequences, at most the positions of the model.

    Raises:
        ValueError: for another architecture, settings out of range, or logits that differ at `gamma=0`.
        FileExistsError: if `out` holds files.
    """
    out = Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise FileExistsError(f"`out`={out} exists and is not an empty folder: choose another.")
    config = AutoConfig.from_pretrained(model, revision=revision)
    chained_config = chained_config_of(
        config, gamma=gamma, gamma_learnable=gamma_learnable, diagonal=diagonal, normalize=normalize
    )
    model_class = CONVERTED[config.model_type][1]
    length = min(num_tokens, config.max_position_embeddings)
    tokens = torch.randint(0, config.vocab_size, (2, length), generator=torch.Generator().manual_seed(0))
    before = AutoModelForCausalLM.from_pretrained(model, revision=revision, dtype=torch.float32).eval()(tokens).logits
    load = partial(model_class.from_pretrained, model, revision=revision, config=chained_config)
    after = load(dtype=torch.float32).eval()(tokens).logits
    difference, largest = float((after - before).abs().max()), float(before.abs().max())
    unchanged = not any(map(any, chained_config.spread_gamma(gamma)))
    if unchanged and difference > 1e-4 * max(largest, 1.0):
        raise ValueError(
            f"At `gamma`=0 the logits differ from those of the original by {difference:.3g} where the largest is "
            f"{largest:.3g}: this {config.model_type} has a setting that chained attention does not have. Nothing was "
            "written."
        )
    tokenizer = _tokenizer(model, revision)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as folder:
        written = Path(folder) / out.name
        load(dtype="auto").save_pretrained(written)
        if tokenizer is not None:
            tokenizer.save_pretrained(written)
        written.replace(out)  # over an empty folder too, and in one step
    return ConversionReport(
        chained_config.model_type, chained_config.num_hidden_layers, difference, largest, tokenizer is not None
    )


def chained_config_of(config: Any, *, gamma: Any, gamma_learnable: bool, diagonal: str, normalize: bool) -> Any:
    """The config of the chained model with the weights of an ordinary one.

    Raises:
        ValueError: for another architecture, sliding windows or settings out of range.
    """
    if config.model_type not in CONVERTED:
        raise ValueError(
            f"`model` is of type {config.model_type!r}; attention can be converted for {', '.join(sorted(CONVERTED))}."
        )
    if getattr(config, "use_sliding_window", False):
        raise ValueError(
            "`model` uses sliding windows, which chains cannot follow: set `use_sliding_window` to False."
        )
    fields = {name: value for name, value in config.to_dict().items() if name not in ("model_type", "architectures")}
    fields |= {"chain_gamma": gamma, "chain_gamma_learnable": gamma_learnable}
    fields |= {"chain_diagonal": diagonal, "chain_normalize": normalize}
    return CONVERTED[config.model_type][0].from_dict(fields)


def _tokenizer(model: str | Path, revision: str | None) -> Any:
    """The tokenizer beside the model, or None if it has none."""
    for name in TOKENIZER_FILES:
        if cached_file(model, name, revision=revision, _raise_exceptions_for_missing_entries=False) is not None:
            return AutoTokenizer.from_pretrained(model, revision=revision)
    return None
