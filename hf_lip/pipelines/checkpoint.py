# SPDX-License-Identifier: Apache-2.0
"""How `pipeline("certify", model=...)` loads a checkpoint that it is given by name."""

from typing import Any, NoReturn

from transformers import AutoModelForImageClassification


__all__ = ["CheckedAutoModel"]


class CheckedAutoModel(AutoModelForImageClassification):
    """`AutoModelForImageClassification` whose errors reach the user of `pipeline` as they are.

    `transformers.pipeline` answers an error of `from_pretrained` by loading in float32, for which the certificate
    beside weights in another dtype is not checked but computed afresh, and at last with one error that holds the
    tracebacks of all attempts. So nothing is raised where it looks: whatever it does next with the model does.
    """

    @classmethod
    def from_pretrained(cls, *arguments: Any, **settings: Any) -> Any:
        """A model; or, in the place of one that cannot be loaded, what raises the error when it is used."""
        # only safetensors: pickled weights can run code
        settings["use_safetensors"] = True
        try:
            # by its own name, under which repositories refer to their code
            return AutoModelForImageClassification.from_pretrained(*arguments, **settings)
        except (OSError, ValueError, TypeError, RuntimeError) as error:
            return _NotLoaded(error)


class _NotLoaded:
    def __init__(self, error: Exception):
        self._error = error

    def __getattr__(self, name: str) -> NoReturn:
        raise self._error
