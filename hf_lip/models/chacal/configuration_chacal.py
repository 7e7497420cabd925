# SPDX-License-Identifier: Apache-2.0
"""Configuration of the chacal family."""

from typing import Any

from huggingface_hub.dataclasses import strict
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_rope_utils import RopeParameters

from ...ops.chain import DIAGONALS
from ..shim import InstalledSettings
from .gamma_chacal import check_learnable, spread_gamma


LAYER_TYPES = ("chained_attention", "full_attention")


@strict
class ChacalConfig(InstalledSettings, PreTrainedConfig):
    r"""
    Configuration of a decoder with chained attention (Fagnou et al., EMNLP 2024): pre-norm blocks laid out and named
    as in Llama, so that with `gamma=0`, or `layer_types` of `"full_attention"` only, it is that architecture.

    Args:
        vocab_size (`int`, *optional*, defaults to 32000): number of tokens.
        hidden_size (`int`, *optional*, defaults to 512): width of the residual stream.
        intermediate_size (`int`, *optional*): width of the gated MLP; `None` is 8/3 of `hidden_size`, rounded to 8.
        num_hidden_layers (`int`, *optional*, defaults to 8): blocks.
        num_attention_heads (`int`, *optional*, defaults to 8): query heads.
        num_key_value_heads (`int`, *optional*): heads of keys and values; `None` is one for each query head. Z is
            cached for every query head, whatever this is.
        head_dim (`int`, *optional*): features of a head; `None` is `hidden_size / num_attention_heads`.
        hidden_act (`str`, *optional*, defaults to `"silu"`): activation of the MLP.
        max_position_embeddings (`int`, *optional*, defaults to 2048): longest sequence with rotary positions.
        initializer_range (`float`, *optional*, defaults to 0.02): standard deviation of the initial weights.
        rms_norm_eps (`float`, *optional*, defaults to 1e-6): added to the mean square in the norms.
        use_cache (`bool`, *optional*, defaults to `True`): return keys and Z for decoding.
        tie_word_embeddings (`bool`, *optional*, defaults to `False`): one matrix for input and output tokens.
        attention_bias, mlp_bias (`bool`, *optional*, defaults to `False`): biases of the projections.
        attention_dropout (`float`, *optional*, defaults to 0.0): on the weights of `full_attention` layers only; in a
            chain it would break the discount (chacal 2.3).
        residual_dropout (`float`, *optional*, defaults to 0.0): on what each block adds.
        use_rope (`bool`, *optional*, defaults to `True`): rotary positions; without them the model knows the order of
            the tokens from the causal mask alone, and any length can be run.
        rope_parameters (`dict`, *optional*): as in Llama.
        gamma (`float` or `list`, *optional*, defaults to 0.9): discount of the chains: one number, or for each layer a
            number or a list with one for each head. 0 is ordinary attention. `strict`: [-1, 1), `keep`: [0, 1).
        gamma_learnable (`bool`, *optional*, defaults to `False`): one trained discount for each head, started at
            `gamma`, 0 included (tanh of a parameter, with `keep` not below 0).
        diagonal (`str`, *optional*, defaults to `"strict"`): `strict` leaves the diagonal out of the solve, `keep`
            solves with it.
        normalize (`bool`, *optional*, defaults to `False`): divide outputs by the row sums of the operator, in place
            of multiplying by 1 - gamma. With `keep` the two are the same.
        layer_types (`list[str]`, *optional*): `chained_attention` or `full_attention` for each layer; `None` chains
            all of them.
        chunk_size (`int`, *optional*, defaults to 128): rows solved at a time; changes the speed only.
    """

    model_type = "chacal"
    keys_to_ignore_at_inference = ["past_key_values"]  # noqa: RUF012

    vocab_size: int = 32000
    hidden_size: int = 512
    intermediate_size: int | None = None
    num_hidden_layers: int = 8
    num_attention_heads: int = 8
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    hidden_act: str = "silu"
    max_position_embeddings: int = 2048
    initializer_range: int | float = 0.02
    rms_norm_eps: int | float = 1e-6
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 2
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    attention_dropout: int | float = 0.0
    residual_dropout: int | float = 0.0
    use_rope: bool = True
    rope_parameters: RopeParameters | dict | None = None
    gamma: int | float | list | tuple = 0.9
    gamma_learnable: bool = False
    diagonal: str = "strict"
    normalize: bool = False
    layer_types: list[str] | tuple[str, ...] | None = None
    chunk_size: int = 128

    def __post_init__(self, **kwargs):
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.head_dim is None and self.num_attention_heads > 0:
            self.head_dim = self.hidden_size // self.num_attention_heads
        if self.intermediate_size is None:
            self.intermediate_size = -(-8 * self.hidden_size // 24) * 8
        if self.layer_types is None:
            self.layer_types = ["chained_attention"] * self.num_hidden_layers
        self.layer_types = list(self.layer_types)
        if isinstance(self.gamma, tuple):
            self.gamma = [list(entry) if isinstance(entry, tuple) else entry for entry in self.gamma]
        super().__post_init__(**kwargs)

    def gamma_of_layer(self, layer_idx: int) -> list[float]:
        """The discounts of a layer, one for each query head."""
        return self.spread_gamma(self.gamma)[layer_idx]

    def spread_gamma(self, gamma: Any) -> list[list[float]]:
        """One discount for each layer and head, from a number or from a list with a number or a list for each layer.

        Raises:
            ValueError: if the lengths do not fit or a discount is outside its range.
        """
        layers, heads = self.num_hidden_layers, self.num_attention_heads
        return spread_gamma(gamma, layers, heads, self.diagonal, self.normalize)

    def validate_diagonal(self):
        if self.diagonal not in DIAGONALS:
            raise ValueError(f"`diagonal` must be one of {', '.join(DIAGONALS)}, got {self.diagonal!r}.")

    def validate_gamma(self):
        if self.diagonal not in DIAGONALS:
            return  # said by validate_diagonal
        spread = self.spread_gamma(self.gamma)
        for index, values in enumerate(spread):
            if self.gamma_learnable and self.layer_types[index : index + 1] == ["chained_attention"]:
                check_learnable(values)

    def validate_layer_type(self):
        if len(self.layer_types) != self.num_hidden_layers:
            raise ValueError(
                f"`layer_types` needs one entry for each of {self.num_hidden_layers} layers, got "
                f"{len(self.layer_types)}."
            )
        for name in self.layer_types:
            if name not in LAYER_TYPES:
                raise ValueError(f"`layer_types` must hold {' or '.join(LAYER_TYPES)}, got {name!r}.")

    def validate_architecture(self):
        sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
        for name in (*sizes, "num_key_value_heads", "head_dim", "max_position_embeddings", "chunk_size"):
            if getattr(self, name) is None or getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at least 1, got {getattr(self, name)}.")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"`num_attention_heads`={self.num_attention_heads} must be a multiple of `num_key_value_heads`="
                f"{self.num_key_value_heads}."
            )
        if self.use_rope and self.head_dim % 2:
            raise ValueError(f"`head_dim` must be even with rotary positions, got {self.head_dim}.")
        for name in ("attention_dropout", "residual_dropout"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise ValueError(f"`{name}` must lie in [0, 1), got {getattr(self, name)}.")


__all__ = ["ChacalConfig"]
