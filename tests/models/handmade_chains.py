# SPDX-License-Identifier: Apache-2.0
"""A language model with hand-made weights that answers "5 > v3 ; v3 > v7 ; v7 ?" by hard pointers, at every depth.

Layer 0, ordinary attention, copies the last token and the one before it to every token. Layer 1, chained: "?" points
to the place where the asked variable was written, and such a place to the one where the variable that it copies was
written. The place after a literal holds it as its value and points to <bos>, whose value is nothing.
"""

import torch

from hf_lip.data import ChainsTask, tracking_tokenizer
from hf_lip.models.chacal.configuration_chacal import ChacalConfig
from hf_lip.models.chacal.modeling_chacal import ChacalForCausalLM


TASK = ChainsTask(num_entities=2, num_state_changes=(0, 5), form="text")
GAMMA = 0.9
SIZE, THETA = 64, 1e6  # features of a head; those below 8 turn fast, those from 16 on hardly
GATE, SINK = 30, 31


def handmade_model(**options):
    """The model, in evaluation mode, and its tokenizer."""
    tokenizer = tracking_tokenizer(TASK.vocabulary())
    words = tokenizer.get_vocab()
    count = len(tokenizer)
    const, last, before, answer = count, count + 1, 2 * count + 1, 3 * count + 1
    literals = [words[str(value)] for value in range(TASK.num_values)]
    variables = [words[word] for word in TASK.vocabulary() if word.startswith("v")]
    width = answer + len(literals)
    config = ChacalConfig(
        vocab_size=count,
        hidden_size=width,
        intermediate_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        head_dim=SIZE,
        layer_types=["full_attention", "chained_attention"],
        gamma=GAMMA,
        max_position_embeddings=64,
        rope_parameters={"rope_type": "default", "rope_theta": THETA},
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        **options,
    )
    model = ChacalForCausalLM(config).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" not in name:
                weight.zero_()
        model.model.embed_tokens.weight[:, :count] = torch.eye(count)
        model.model.embed_tokens.weight[:, const] = 1.0
        first, second = (layer.self_attn for layer in model.model.layers)
        # what the norm makes of one: two ones in the stream of the first layer, four in that of the second
        scales = (width / 2) ** 0.5, (width / 4) ** 0.5
        angles = THETA ** (-torch.arange(8) / (SIZE // 2))
        for head, (distance, place) in enumerate(((1, last), (2, before))):
            start = head * SIZE
            first.q_proj.weight[start : start + 8, const] = 20.0 * (distance * angles).cos()
            first.q_proj.weight[start + SIZE // 2 : start + SIZE // 2 + 8, const] = -20.0 * (distance * angles).sin()
            first.k_proj.weight[start : start + 8, const] = 1.0
            first.v_proj.weight[start : start + count, :count] = torch.eye(count)
            first.o_proj.weight[place : place + count, start : start + count] = torch.eye(count) / scales[0]
        for number, variable in enumerate(variables):
            second.q_proj.weight[16 + number, [last + variable, before + variable]] = 30.0
            second.k_proj.weight[16 + number, variable] = 1.0
        second.q_proj.weight[GATE, const] = 30.0
        second.k_proj.weight[GATE, last + words[">"]] = 1.0
        second.q_proj.weight[SINK, [before + literal for literal in literals]] = 90.0
        second.k_proj.weight[SINK, words["<bos>"]] = 1.0
        for value, literal in enumerate(literals):
            second.v_proj.weight[value, before + literal] = 1.0
            second.o_proj.weight[answer + value, value] = 1.0 / scales[1]
            model.lm_head.weight[literal, answer + value] = 1e3
        model.lm_head.weight[words["<eos>"], last + words["?"]] = 1e4
    return model, tokenizer


def written_places(prompt: str) -> list[int]:
    """Token numbers, <bos> first, of the places where the asked variable and all those on its chain were written, the
    asked one first; the literal is two tokens before the last."""
    tokens = ["<bos>", *prompt.split()]
    written = {tokens[place]: place for place in range(3, len(tokens)) if tokens[place - 1] == ">"}
    places = [written[tokens[-2]]]
    while tokens[places[-1] - 2] in written:
        places.append(written[tokens[places[-1] - 2]])
    return places
