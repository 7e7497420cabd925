# SPDX-License-Identifier: Apache-2.0
"""Chained attention: what it refuses."""

import pytest
import torch

from hf_lip.ops.chain import chained_attention, effective_weights, naive_chained_attention

from .test_chain import random_inputs


@pytest.mark.parametrize(
    ("gamma", "options", "message"),
    [
        (1.0, {"diagonal": "keep"}, r"\[0, 1\)"),
        (-0.1, {"diagonal": "keep"}, r"\[0, 1\)"),
        (1.0, {}, "normalize=True"),
        (1.5, {"normalize": True}, r"\(-1, 1\]"),
        (-1.0, {"normalize": True}, r"\(-1, 1\]"),
        (float("nan"), {}, r"\[-1, 1\)"),
        (torch.tensor([0.1, 0.2, 1.3]), {}, r"1\.29"),
        (torch.tensor([0.1, 0.2]), {}, "shape"),
        (0.5, {"diagonal": "none"}, "diagonal"),
        (0.5, {"backend": "cuda"}, "backend"),
        (0.5, {"chunk_size": 0}, "chunk_size"),
        (0.5, {"key_mask": torch.ones(2, 5)}, "key_mask"),
        (0.5, {"segment_ids": torch.ones(2, 5)}, "segment_ids"),
        (0.5, {"past_key": torch.ones(2, 3, 1, 8)}, "together"),
        (0.5, {"past_key": torch.ones(2, 1, 1, 8), "past_chained": torch.ones(2, 3, 1, 8)}, "past_key"),
    ],
)
def test_bad_arguments(gamma, options, message):
    with pytest.raises(ValueError, match=message):
        chained_attention(*random_inputs(), gamma, **options)


@pytest.mark.parametrize("name", ["query", "key", "value"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_inputs_that_are_not_finite(name, bad):
    tensors = dict(zip(("query", "key", "value"), random_inputs()))
    tensors[name][0, 1, 3, 2] = bad
    for function in (chained_attention, naive_chained_attention):
        with pytest.raises(ValueError, match=f"`{name}` holds NaN"):
            function(**tensors, gamma=0.5)


def test_shapes_that_do_not_fit():
    query, key, value = random_inputs()
    with pytest.raises(ValueError, match="multiple of the key heads"):
        chained_attention(query, key[:, :2], value[:, :2], 0.5)
    with pytest.raises(ValueError, match="batch, heads, tokens, features"):
        chained_attention(query[0], key, value, 0.5)
    with pytest.raises(ValueError, match="at least one token"):
        chained_attention(query[:, :, :0], key[:, :, :0], value[:, :, :0], 0.5)
    for row in (37, -38, 1.0, True):
        with pytest.raises(ValueError, match="rows"):
            effective_weights(query, key, 0.5, [row])
    with pytest.raises(ValueError, match="gamma"):
        effective_weights(query, key, 1.5, [0])
    with pytest.raises(ValueError, match="segment_ids"):
        effective_weights(query, key, 0.5, [0], segment_ids=torch.ones(2, 5))
    query[0, 0, 0, 0] = float("nan")
    with pytest.raises(ValueError, match="NaN"):
        effective_weights(query, key, 0.5, [0])
