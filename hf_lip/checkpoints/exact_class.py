# SPDX-License-Identifier: Apache-2.0
"""Whether a module computes what the code of its class says, and nothing else."""

from torch import nn
from torch.nn.utils import parametrize
from transformers.utils import output_capturing


def is_plain(module: nn.Module) -> bool:
    """No hooks that may change inputs or outputs, no parametrised weights, no forward of its own."""
    hooks = (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
    # transformers' recorders of hidden states look and change nothing
    changing = [hook for hook in hooks if getattr(hook, "__module__", "") != output_capturing.__name__]
    return not changing and not parametrize.is_parametrized(module) and "forward" not in vars(module)
