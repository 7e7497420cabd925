# SPDX-License-Identifier: Apache-2.0
"""Memory of caches that grow: a token of decoding is written where it belongs, and what is held is not copied."""

import torch
from torch import Tensor


# room for more tokens, as a share of those held, and at least
_SHARE, _LEAST = 8, 32

__all__ = ["TokenMemory"]


class TokenMemory:
    """One tensor (B, heads, n, features) that grows along the tokens, in place where no gradients are recorded.

    Whoever holds an earlier state may go back to it: the memory is written on only from where it ends, and a tensor
    that is not its newest state (cropped, reordered, set from outside) is copied to new memory first.

    Args:
        max_tokens: None, or the tokens to make room for at once.
    """

    def __init__(self, max_tokens: int | None = None):
        self.max_tokens = max_tokens
        self._memory: Tensor | None = None
        self._newest: Tensor | None = None  # what `extended` returned last

    def extended(self, held: Tensor | None, new: Tensor) -> Tensor:
        """`held` (None or empty: nothing yet) and `new` after it, joined along the tokens."""
        count = 0 if held is None or held.numel() == 0 else held.shape[2]
        if held is None or count == 0:
            held = new[:, :, :0]
        if torch.is_grad_enabled() or held.dtype != new.dtype or torch.compiler.is_compiling():
            # autograd refuses memory written on after it was read, and a compiled graph plans its memory itself
            return torch.cat([held, new], 2)
        total = count + new.shape[2]
        memory = self._memory
        if memory is None or held is not self._newest or total > memory.shape[2] or self._is_locked(memory):
            room = max(total // _SHARE, _LEAST)
            capacity = total + room if self.max_tokens is None else max(self.max_tokens, total)
            memory = new.new_empty(*new.shape[:2], capacity, new.shape[3])
            memory[:, :, :count] = held
            self._memory = memory
        memory[:, :, count:total] = new
        self._newest = memory[:, :, :total]
        return self._newest

    def clear(self) -> None:
        """Give the memory back."""
        self._memory = self._newest = None

    @staticmethod
    def _is_locked(memory: Tensor) -> bool:
        """Whether it was made in inference mode and can not be written on here, outside of it."""
        return memory.is_inference() and not torch.is_inference_mode_enabled()
