# SPDX-License-Identifier: Apache-2.0
"""What a finished run of train_entity_tracking.py left, for tables that compare runs."""

import json
from itertools import groupby
from pathlib import Path
from typing import Any


__all__ = ["finished_run"]


def finished_run(folder: Path, task: str) -> dict[str, Any]:
    """results.json of a run on a task, with `model`, its layers in words ("1 softmax + 1 chained"), and `seed`.

    Raises:
        ValueError: a folder without results, or of another task.
    """
    file = folder / "results.json"
    if not file.exists():
        raise ValueError(f"{folder} has no results.json: give folders of finished runs.")
    results = json.loads(file.read_text(encoding="utf-8"))
    if results.get("task") != task:
        raise ValueError(f"{folder} is no run of --task {task}.")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    kinds = ["softmax" if kind == "full_attention" else "chained" for kind in config["layer_types"]]
    model = " + ".join(f"{len(list(group))} {kind}" for kind, group in groupby(kinds))
    return results | {"model": model, "seed": results["arguments"]["seed"]}
