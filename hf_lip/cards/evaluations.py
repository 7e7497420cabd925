# SPDX-License-Identifier: Apache-2.0
"""The evaluations in a folder: `results.json` of the training scripts, `summary.json` of `hf-lip certify` and
`scripts/certify.py`, in the folder or in its subfolders."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .figures import Evaluation, Figure, data_name, number, radius_of, read_json_object, share, take


RESULTS_NAME = "results.json"
SUMMARY_NAME = "summary.json"
# settings of a smoothing run that produce its figures
_SMOOTHING = ("sigma", "n0", "n", "alpha", "seed", "budget", "score_map", "noise", "base")
_RADII = {"norm": "l2", "pixels": "[0, 1]"}

__all__ = ["RESULTS_NAME", "SUMMARY_NAME", "read_evaluations"]


def read_evaluations(folder: Path) -> list[Evaluation]:
    """All evaluations of a folder, those of `results.json` first.

    Raises:
        FileNotFoundError: the folder holds none: nothing was measured.
        ValueError: a file that no evaluation of this package wrote, or a number in it that cannot have been measured.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"`folder` {str(folder)!r} is not a folder: give the one a training script wrote.")
    found: list[Evaluation] = []
    if (folder / RESULTS_NAME).is_file():
        found += _of_results(RESULTS_NAME, read_json_object(folder / RESULTS_NAME))
    for path in sorted([*folder.glob(SUMMARY_NAME), *folder.glob(f"*/{SUMMARY_NAME}")]):
        found.append(_of_summary(path.relative_to(folder).as_posix(), read_json_object(path)))
    if not found:
        raise FileNotFoundError(
            f"{folder} holds neither {RESULTS_NAME} nor {SUMMARY_NAME}: nothing was measured that a card could state. "
            "Train with one of the scripts, or run `hf-lip certify DIR --out DIR/certify`."
        )
    return found


def _of_results(file: str, content: dict[str, Any]) -> list[Evaluation]:
    if "evaluations" in content:
        return _of_tracking(file, content)
    if "evaluation" in content:
        return [_of_language_model(file, content)]
    if "clean_accuracy" in content:
        return [_of_classifier(file, content)]
    raise ValueError(
        f"{file} has neither clean_accuracy nor evaluations nor an evaluation: it is of no training script of hf_lip."
    )


def _of_classifier(file: str, content: dict[str, Any]) -> Evaluation:
    """Of train_image_classifier.py."""
    count = int(number(content, ("eval_samples",), file, least=1))
    arguments = take(content, ("arguments",), file)
    size: dict[str, Any] = {"num_images": count}
    if arguments.get("max_eval_samples") is not None:
        size |= {"max_eval_samples": arguments["max_eval_samples"], "seed": arguments.get("seed")}

    def of(key: tuple[str, ...]) -> tuple[float, tuple[str, ...]]:
        return share(content, key, count, file), key

    figures = [Figure("accuracy", "clean accuracy", *of(("clean_accuracy",)), size, count)]
    if "noisy_accuracy" in content:
        noise = {"noise_sd": number(content, ("noise_sd",), file), **size}
        name = f"accuracy under Gaussian noise of {noise['noise_sd']:g}"
        figures.append(Figure("accuracy", name, *of(("noisy_accuracy",)), noise, count))
    if "certified_accuracy" in content:
        figures += _certified(content, file, count, {**_RADII, "method": "lipschitz", **size})
    return Evaluation(file, "classifier", *_source(arguments, "dataset", "eval_split", file), tuple(figures), content)


def _of_summary(file: str, content: dict[str, Any]) -> Evaluation:
    """Of `hf-lip certify` and scripts/certify.py."""
    count = int(number(content, ("num_images",), file, least=1))
    settings = take(content, ("settings",), file)
    how: dict[str, Any] = {"method": take(content, ("method",), file)}
    smoothed = settings.get("sigma") is not None
    if smoothed:
        how |= {name: settings[name] for name in _SMOOTHING if settings.get(name) is not None}
    how["num_images"] = count
    value = share(content, ("clean_accuracy",), count, file)
    name = f"accuracy, smoothed with sigma {settings['sigma']:g}" if smoothed else "clean accuracy"
    figures = [Figure("accuracy", name, value, ("clean_accuracy",), how, count)]
    if "certified_accuracy" in content:
        figures += _certified(content, file, count, {**_RADII, **how})
    if smoothed:
        value = share(content, ("abstention_rate",), count, file)
        figures.append(Figure("abstention_rate", "abstentions", value, ("abstention_rate",), how, count))
    return Evaluation(file, "certification", *_source(content, "data", "split", file), tuple(figures), content)


def _certified(content: dict[str, Any], file: str, count: int, how: dict[str, Any]) -> list[Figure]:
    figures, smallest = [], 1.0
    radii = {name: radius_of(name) for name in take(content, ("certified_accuracy",), file)}
    for name, eps in sorted(radii.items(), key=lambda item: item[1]):
        key = ("certified_accuracy", name)
        value = share(content, key, count, file)
        if value > smallest:
            raise ValueError(f"{file} has certified accuracy growing with the radius at {name}: it was not measured.")
        smallest = value
        arguments = {"eps": eps, **how}
        figures.append(Figure("certified_accuracy", f"certified accuracy at {name}", value, key, arguments, count))
    name = "average_certified_radius"
    figures.append(Figure(name, "average certified radius (ACR)", number(content, (name,), file), (name,), how))
    return figures


def _of_tracking(file: str, content: dict[str, Any]) -> list[Evaluation]:
    """Of train_entity_tracking.py: one evaluation for each set of questions."""
    task = str(take(content, ("task",), file))
    found = []
    for name, scores in take(content, ("evaluations",), file).items():
        key = ("evaluations", name)
        count = int(number(content, (*key, "num_examples"), file, least=1))
        states = scores.get("num_states")
        how = {"task": task, "num_examples": count}
        value = share(content, (*key, "accuracy"), count, file)
        figures = [Figure("exact_match", "exact match", value, (*key, "accuracy"), how, count)]
        if states is not None:
            states = int(number(content, (*key, "num_states"), file, least=1))
            value = share(content, (*key, "whole_state_accuracy"), states, file)
            whole = {"task": task, "num_states": states}
            path = (*key, "whole_state_accuracy")
            figures.append(Figure("whole_state_accuracy", "whole states", value, path, whole, states))
        for column in (column for column in scores if column.startswith("by_")):
            figures += _by_depth(content, (*key, column), file, task)
        found.append(Evaluation(file, "tracking", task, name, tuple(figures), content, name))
    if not found:
        raise ValueError(f"{file} has no evaluations: run the script again.")
    return found


def _by_depth(content: dict[str, Any], key: tuple[str, ...], file: str, task: str) -> list[Figure]:
    figures = []
    depth_name = key[-1].removeprefix("by_")
    for depth in sorted(take(content, key, file), key=int):
        count = int(number(content, (*key, depth, "num_examples"), file, least=1))
        value = share(content, (*key, depth, "accuracy"), count, file)
        how = {"task": task, "depth_name": depth_name, "depth": int(depth), "num_examples": count}
        if "minimal_layers" in take(content, (*key, depth), file):
            how["minimal_layers"] = int(number(content, (*key, depth, "minimal_layers"), file))
        # of answers that have no depth
        shown = "none" if int(depth) < 0 else depth
        name = f"exact match, {depth_name.replace('_', ' ')} {shown}"
        figures.append(Figure("exact_match", name, value, (*key, depth, "accuracy"), how, count))
    return figures


def _of_language_model(file: str, content: dict[str, Any]) -> Evaluation:
    """Of train_causal_lm.py."""
    arguments = take(content, ("arguments",), file)
    how = {"num_tokens": int(number(content, ("evaluation", "num_tokens"), file, least=1))}
    how |= {name: arguments[name] for name in ("block_size", "eval_stride") if arguments.get(name) is not None}
    names = {"perplexity": "perplexity of a token", "bits_per_character": "bits a character"}
    names["bits_per_byte"] = "bits a byte"
    figures = [
        Figure(metric, name, number(content, ("evaluation", metric), file), ("evaluation", metric), how)
        for metric, name in names.items()
    ]
    if arguments.get("dataset") is not None:
        source = _source(arguments, "dataset", "eval_split", file)
    else:
        held_out = arguments.get("eval_file") is None
        files = take(arguments, ("train_file" if held_out else "eval_file",), file)
        split = f"the last {100 * arguments['eval_share']:g} % of the text" if held_out else "whole text"
        source = ", ".join(map(data_name, files)), split
    return Evaluation(file, "language", *source, tuple(figures), content)


def _source(arguments: Mapping[str, Any], data: str, split: str, file: str) -> tuple[str, str]:
    for name in (data, split):
        if not isinstance(arguments.get(name), str):
            raise ValueError(f"{file} does not say on which data it was measured ({name}): run the evaluation again.")
    return data_name(arguments[data]), arguments[split]
