# SPDX-License-Identifier: Apache-2.0
"""Finds calls of deprecated functions that come from this project, and not from the libraries it uses.

Libraries mostly attribute a warning to themselves, and transformers often only logs it. So the call stack decides: the
first frame outside the library that warns is the caller.
"""

import logging
import re
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from transformers.utils import logging as transformers_logging


ROOT = Path(__file__).resolve().parents[1]
CATEGORIES = (DeprecationWarning, FutureWarning, PendingDeprecationWarning)
LOGGED = re.compile(r"deprecated|will be removed in|is going to be removed", re.IGNORECASE)
# what stands between a caller and the function that warns
BETWEEN = ("warnings", "logging", "functools", "contextlib", "typing_extensions", "importlib", "_frozen_importlib")
# parts of a library that call others of the same library on their own account
INNER = {
    "torch/_dynamo/": "tracing",
    "torch/_functorch/": "tracing",
    "transformers/generation/candidate_generator.py": "assisted decoding",
}
BETWEEN_PATHS = ("torch/nn/modules/module.py", "torch/utils/_contextlib.py", "transformers/utils/deprecation.py")


def package_of(frame: FrameType) -> str | None:
    """Top-level package of a frame's module, "" for the project's own code, None for those looked through."""
    path = frame.f_code.co_filename
    if path == __file__ or path.endswith(BETWEEN_PATHS):
        return None
    if Path(path).is_relative_to(ROOT) and "site-packages" not in path:
        return ""
    for part, name in INNER.items():
        if part in path:
            return name
    package = str(frame.f_globals.get("__name__", "")).split(".")[0]
    return None if package in BETWEEN else package


def caller(frame: FrameType | None) -> str | None:
    """Where in this project the function that warns was called, or None if a library called it."""
    warning = None
    while frame is not None:
        package = package_of(frame)
        if package == "":
            return f"{Path(frame.f_code.co_filename).relative_to(ROOT)}:{frame.f_lineno}"
        if package is not None and warning is None:
            warning = package
        # another library, or the body of a module that is being imported
        if package not in (None, warning) or (package is not None and frame.f_code.co_name == "<module>"):
            return None
        frame = frame.f_back
    return None


class DeprecationHandler(logging.Handler):
    def __init__(self, found: list[str]):
        super().__init__(logging.WARNING)
        self.found = found

    def emit(self, record: logging.LogRecord) -> None:
        message = record.getMessage()
        if LOGGED.search(message):
            place = caller(sys._getframe(1))
            if place is not None:
                self.found.append(f"{place} logs: {message}")


@contextmanager
def deprecated_calls() -> Iterator[list[str]]:
    """Fills the list with the deprecated calls that this project makes inside the context."""
    found: list[str] = []
    plain_warn = warnings.warn

    def warn(message, category=None, stacklevel=1, *args, **kwargs):
        kind = type(message) if isinstance(message, Warning) else (category or UserWarning)
        if issubclass(kind, CATEGORIES):
            place = caller(sys._getframe(1))
            if place is not None:
                found.append(f"{place} warns: {message}")
        # one frame more than the caller thinks
        plain_warn(message, category, stacklevel + 1, *args, **kwargs)

    handler = DeprecationHandler(found)
    logger = transformers_logging.get_logger("transformers")
    # what was said once before is said again, and what an earlier command silenced is heard
    transformers_logging.warning_once.cache_clear()
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity(min(verbosity, logging.WARNING))
    logger.addHandler(handler)
    warnings.warn = warn
    try:
        yield found
    finally:
        warnings.warn = plain_warn
        logger.removeHandler(handler)
        transformers_logging.set_verbosity(verbosity)
