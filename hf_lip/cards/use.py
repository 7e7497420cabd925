# SPDX-License-Identifier: Apache-2.0
"""What a card says about using the model: code, intended use and limits."""

from collections.abc import Mapping, Sequence
from typing import Any

from .figures import Evaluation


__all__ = ["how_to_use", "intended_use"]


def how_to_use(config: Mapping[str, Any], name: str, evaluations: Sequence[Evaluation]) -> str:
    """A few lines of Python."""
    where = name if "/" in name else f"path/to/{name}"
    install = "Needs the package: `pip install hf_lip`."
    if evaluations[0].task == "text-generation":
        code = (
            "import hf_lip  # registers the model\n"
            "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
            f'model = AutoModelForCausalLM.from_pretrained("{where}")\n'
            f'tokenizer = AutoTokenizer.from_pretrained("{where}")\n'
        )
        return f"{install}\n\n```python\n{code}```"
    smoothed = next((one for one in evaluations if "sigma" in one.figures[0].arguments), None)
    options = ""
    if smoothed is not None:
        how = smoothed.figures[0].arguments
        options = f', method="{how["method"]}", sigma={how["sigma"]:g}, n0={how["n0"]}, n={how["n"]}'
        options += f", alpha={how['alpha']:g}"
    code = (
        "import hf_lip  # registers the model and the task\n"
        "from transformers import pipeline\n\n"
        f'certify = pipeline("certify", model="{where}"{options})\n'
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
