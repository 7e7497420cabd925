# SPDX-License-Identifier: Apache-2.0
"""What a card says of the runs behind its figures: commands, data, machine, time, versions."""

import shlex
from collections.abc import Mapping
from typing import Any

from ..training.run_record import public_value
from .figures import data_name


__all__ = ["certification_text", "describe_training", "hardware_text"]


def describe_training(results: Mapping[str, Any]) -> list[str]:
    """The command and the facts of a training run."""
    facts = []
    arguments = results.get("arguments", {})
    if "train_samples" in results:
        of = f"{data_name(arguments['dataset'])}, {arguments['train_split']}: " if "dataset" in arguments else ""
        facts.append(f"{of}{results['train_samples']:,} images")
    if "epochs" in results:
        facts.append(f"{results['epochs']:g} epochs")
    if "train_tokens_seen" in results:
        facts.append(f"{results['train_tokens_seen']:,} supervised tokens")
    if "steps" in results:
        facts.append(f"{results['steps']:,} steps")
    stopped = ", stopped before the planned end" if results.get("stopped_early") else ""
    lines = [f"Data and steps: {', '.join(facts)}{stopped}."] if facts else []
    if "seconds" in results:
        lines.append(f"Hardware and time: {_machine(results)}, {_processes(results)}, {_times(results)}.")
    if "versions" in results:
        lines.append(f"Versions: {', '.join(f'{name} {number}' for name, number in results['versions'].items())}.")
    return [f"```bash\n{_public_command(str(results['command']))}\n```", "\n".join(f"- {line}" for line in lines)]


def certification_text(summary: Mapping[str, Any]) -> str:
    """The command of a certification, where it ran, and how long."""
    if "command" not in summary:
        return ""
    ran = f" on {hardware_text(summary['hardware'])} in {_time(summary['seconds'])}" if "hardware" in summary else ""
    return f"\n\nRun{ran}:\n\n```bash\n{_public_command(str(summary['command']))}\n```"


def hardware_text(hardware: Mapping[str, Any]) -> str:
    """Such as "NVIDIA H100, AMD EPYC with 16 cores, 8 torch threads, float32 (bf16 in training)".

    Raises:
        ValueError: of another layout.
    """
    if not isinstance(hardware, Mapping) or not {"cpu", "gpu", "cores", "torch_threads", "dtype"} <= set(hardware):
        raise ValueError(f"`hardware` {hardware!r} is of no run of hf_lip: run the evaluation again.")
    threads = hardware["torch_threads"]
    parts = [
        *([hardware["gpu"]] if hardware["gpu"] else []),
        f"{hardware['cpu']} with {hardware['cores']} {'core' if hardware['cores'] == 1 else 'cores'}",
        f"{threads} torch {'thread' if threads == 1 else 'threads'}",
        hardware["dtype"] + (f" ({hardware['mixed_precision']} in training)" if _mixed(hardware) else ""),
    ]
    return ", ".join(parts)


def _mixed(hardware: Mapping[str, Any]) -> bool:
    return hardware.get("mixed_precision", "no") != "no"


def _machine(results: Mapping[str, Any]) -> str:
    if "hardware" in results:
        return hardware_text(results["hardware"])
    return str(results.get("device", "unknown device"))


def _processes(results: Mapping[str, Any]) -> str:
    count = results.get("num_processes", 1)
    return f"{count} processes" if count != 1 else "one process"


def _times(results: Mapping[str, Any]) -> str:
    if "cpu_seconds" not in results:
        return _time(results["seconds"])
    # every process counts its own
    whose = "" if results.get("num_processes", 1) == 1 else " of the first process"
    return f"{_time(results['seconds'])} ({_time(results['cpu_seconds'])} of CPU time{whose})"


def _time(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < 100.0 else f"{seconds:,.0f} s"


def _public_command(command: str) -> str:
    """The command in lines, without the folders of the machine it ran on."""
    words = [public_value(word) for word in shlex.split(command)]
    shown = ["python", f"scripts/{words[0]}", *words[1:]] if words[0].endswith(".py") else words
    lines, line = [], ""
    for word in map(shlex.quote, shown):
        # an option stays on the line of its value where there is room
        if line and len(line) + len(word) > 100:
            lines.append(line)
            line = f"    {word}"
        else:
            line = f"{line} {word}" if line else word
    return " \\\n".join([*lines, line])
