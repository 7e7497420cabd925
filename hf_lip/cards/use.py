# SPDX-License-Identifier: Apache-2.0
"""What a card says about using the model: code, intended use and limits."""

from collections.abc import Mapping, Sequence
from typing import Any

from ..training.sequence_tasks import TrackingArguments
from .figures import Evaluation
from .tracking_reruns import tracking_arguments


_CODE_OF_TEXTS = """\
import hf_lip  # registers the model
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{where}")
tokenizer = AutoTokenizer.from_pretrained("{where}")
text = "{text}"{remark}
inputs = tokenizer(text, return_tensors="pt")
found = model.generate(**inputs, max_new_tokens=32)
print(tokenizer.decode(found[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
"""
# in words that the data set and the generator share
_BOXES_TEXT = "Box 0 contains the letter and the key, Box 1 is empty. Move the key from Box 0 to Box 1. Box 1"
_CODE_OF_STEPS = """\
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import hf_lip  # registers the model
from hf_lip.data import {names}

model = AutoModelForCausalLM.from_pretrained("{where}")
tokenizer = AutoTokenizer.from_pretrained("{where}")
task = {task}
row = tracking_dataset(task, 1, "test")[0]
ids = torch.tensor([row["{column}"]])
found = model({inputs}).logits[0].argmax(-1)
# after every {step}: what it says, the answer found, the right one
for said, value, right in zip(row["{column}"][1:-1], found[1:-1].tolist(), row["labels"][2:]):
    print(tokenizer.decode(said), "|", tokenizer.decode([value]), tokenizer.decode([right]))
"""

__all__ = ["how_to_use", "intended_use"]


def how_to_use(config: Mapping[str, Any], name: str, evaluations: Sequence[Evaluation]) -> str:
    """A few lines of Python."""
    where = name if "/" in name else f"path/to/{name}"
    install = "Needs the package: `pip install hf_lip`."
    if evaluations[0].task == "text-generation":
        arguments = tracking_arguments(evaluations[0]) if evaluations[0].kind == "tracking" else None
        if arguments is not None and arguments.dense:
            return f"{install}\n\n```python\n{_code_of_steps(where, arguments)}```"
        boxes = arguments is not None and arguments.task == "boxes"
        code = _CODE_OF_TEXTS.format(
            where=where,
            text=_BOXES_TEXT if boxes else "...",
            remark="" if boxes else "  # a text, to be gone on from",
        )
        parts = [install, f"```python\n{code}```"]
        if "chained_attention" in config.get("layer_types", ()):
            track = f'hf-lip track {where} "{_BOXES_TEXT if boxes else "..."}" --plot why.png'
            parts.append(f"What in the text an answer was read from, over all hops:\n\n```bash\n{track}\n```")
        return "\n\n".join(parts)
    smoothed = next((one for one in evaluations if "sigma" in one.figures[0].arguments), None)
    given = f'"certify", model="{where}"'
    if smoothed is not None:
        how = smoothed.figures[0].arguments
        numbers = f"sigma={how['sigma']:g}, n0={how['n0']}, n={how['n']}, alpha={how['alpha']:g}"
        given = f'\n    {given},\n    method="{how["method"]}", {numbers},\n'
    code = (
        "import hf_lip  # registers the model and the task\n"
        "from transformers import pipeline\n\n"
        f"certify = pipeline({given})\n"
        'certify("image.png")  # {"label": ..., "radius": ..., "radius_unit": "l2, pixels in [0, 1]", ...}\n'
    )
    return f"{install}\n\n```python\n{code}```"


def intended_use(config: Mapping[str, Any], evaluations: Sequence[Evaluation], *, certified: bool) -> str:
    """What the model is for, and what its figures do not say."""
    data = ", ".join(dict.fromkeys(one.data for one in evaluations))
    lines = [f"For research on data such as it was evaluated on ({data}); the figures say nothing about other data."]
    if evaluations[0].task == "text-generation":
        lines.append("An answer may be wrong, and nothing here is certified.")
        return "\n".join(f"- {line}" for line in lines)
    lines.append("A radius says that the label does not change. It does not say that the label is right.")
    lines.append(
        "It holds for changes of the pixels in the l2 norm, not for other norms, nor for rotations, blur or other "
        "images of the same thing."
    )
    if certified:
        size = config.get("image_size")
        lines.append(
            f"Images of another size than {size} x {size} have to be resized first; the radius is then in the resized "
            "pixels."
        )
    elif any("sigma" in one.figures[0].arguments for one in evaluations):
        lines.append(
            "Certificates by smoothing are of the smoothed classifier, which needs many noisy copies of every image, "
            "and hold with the stated probability. The network by itself has none."
        )
    else:
        lines.append("No certificate was evaluated: the accuracy is that of clean images.")
    return "\n".join(f"- {line}" for line in lines)


def _code_of_steps(where: str, arguments: TrackingArguments) -> str:
    """For models that answer at every token, on a sample of their task."""
    task = arguments.tasks()[0]
    names, column, inputs, step = [type(task).__name__, "tracking_dataset"], "input_ids", "input_ids=ids", "move"
    if not arguments.ordered:
        # a statement is three words in one token, so it enters as an embedding
        names.append("embed_statements")
        column, step = "statement_ids", "statement"
        inputs = "inputs_embeds=embed_statements(model.get_input_embeddings(), ids)"
    made = str(task).replace("'", '"')
    return _CODE_OF_STEPS.format(
        where=where, names=", ".join(sorted(names)), task=made, column=column, inputs=inputs, step=step
    )
