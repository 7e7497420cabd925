# SPDX-License-Identifier: Apache-2.0
"""What a results file says of a run beside its figures: weights, command, machine, versions.

Results files are published with the model. They hold no path of the machine: of an absolute path, one from the home
folder, and one that leaves the folder of the run, the last part stays, which is what it is called elsewhere.
"""

import os
import platform
import re
import shlex
import sys
from collections.abc import Iterable, Mapping
from importlib.metadata import version
from pathlib import Path, PurePath, PureWindowsPath
from typing import Any

import torch

from .. import __version__


PACKAGES = ("torch", "transformers", "accelerate", "datasets", "safetensors")
_CPU_INFO = Path("/proc/cpuinfo")

__all__ = ["command_line", "hardware", "public_path", "public_value", "versions"]


def public_path(text: str) -> str:
    """The last part of a path of this machine; any other text as it is.

    >>> public_path("/data/cifar10/"), public_path("runs/a"), public_path("uoft-cs/cifar10"), public_path("../b")
    ('cifar10', 'runs/a', 'uoft-cs/cifar10', 'b')
    """
    path = PureWindowsPath(text) if re.match(r"[A-Za-z]:[\\/]|\\\\", text) else PurePath(text)
    if path.is_absolute() or text.startswith("~") or ".." in path.parts:
        return path.name or "path"
    return text


def public_value(value: Any) -> Any:
    """An argument without paths of this machine, those after `=` included; containers keep their form."""
    if isinstance(value, PurePath):
        return public_path(str(value))
    if isinstance(value, str):
        name, equals, end = value.partition("=")
        return f"{public_path(name)}={public_path(end)}" if equals and end else public_path(value)
    if isinstance(value, Mapping):
        return {name: public_value(part) for name, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [public_value(part) for part in value]
    return value


def command_line(argv: Iterable[str] | None = None, *, program: str | None = None, secret: str | None = None) -> str:
    """The command of this process, without its paths and without a token.

    Args:
        argv: the words after the program's name; None for those of the process.
        program: its name; None for that of the script that runs.
        secret: to be replaced by asterisks.
    """
    words = [program or Path(sys.argv[0]).name, *(sys.argv[1:] if argv is None else argv)]
    shown = (word.replace(secret, "***") if secret else word for word in words)
    return shlex.join(public_value(word) for word in shown)


def hardware(device: torch.device | str, dtype: torch.dtype | str, mixed_precision: str = "no") -> dict[str, Any]:
    """What the run computes on.

    Args:
        device: of the model.
        dtype: of its weights.
        mixed_precision: of training, such as "bf16".

    Returns:
        `cpu` and `gpu` (None on a CPU) by name, `cores` that the process may use, `torch_threads`, `dtype` and
        `mixed_precision`.
    """
    device = torch.device(device)
    available = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
    gpu = None
    if device.type == "cuda":
        gpu = torch.cuda.get_device_name(device)
    elif device.type != "cpu":
        gpu = device.type
    return {
        "cpu": _cpu_name(),
        "gpu": gpu,
        "cores": len(available),
        "torch_threads": torch.get_num_threads(),
        "dtype": str(dtype).removeprefix("torch."),
        "mixed_precision": mixed_precision,
    }


def versions(*packages: str) -> dict[str, str]:
    """Of Python, this package, and others; by default those that training depends on."""
    return {
        "python": platform.python_version(),
        "hf_lip": __version__,
        **{name: version(name) for name in packages or PACKAGES},
    }


def _cpu_name() -> str:
    """As the system calls it."""
    if _CPU_INFO.is_file():
        found = re.search(r"^model name\s*:\s*(.+)$", _CPU_INFO.read_text(encoding="utf-8"), re.MULTILINE)
        if found:
            return found[1].strip()
    return platform.processor() or platform.machine()
