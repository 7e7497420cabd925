# SPDX-License-Identifier: Apache-2.0
"""`hf-lip track`."""

import json
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.box import SIMPLE
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from hf_lip.cli.console import errors_as_one_line, wide_console


if TYPE_CHECKING:
    from hf_lip.pipelines.track import TrackedAnswer

# heads and answer tokens beyond this are left out of the plot: their means stay
_PLOT_ROWS = 40


def track(
    model: Annotated[str, typer.Argument(help="Folder or Hub id of a causal language model with chained layers.")],
    text: Annotated[str, typer.Argument(help='Text that the model is to go on from, such as "5 > v3 ; v3 ?".')],
    layer: Annotated[int | None, typer.Option(help="Layer to look at; default: every chained layer.")] = None,
    head: Annotated[int | None, typer.Option(help="Head to look at; default: all of them together.")] = None,
    by: Annotated[
        str, typer.Option(help="contribution (norms of what tokens added) | weight (effective weights): the order.")
    ] = "contribution",
    top: Annotated[int, typer.Option(help="Tokens listed for each token of the answer.")] = 5,
    rollout: Annotated[bool, typer.Option(help="Add an estimate through all layers, attention rollout.")] = False,
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer.")] = 16,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a Hub repository.")] = None,
    json_out: Annotated[Path | None, typer.Option("--json", help="File for everything, unrounded.")] = None,
    plot: Annotated[Path | None, typer.Option(help="File for a plot of text and weights, such as a.png.")] = None,
) -> None:
    """Answer a text with a chained language model, and say what in the text each token of the answer came from."""
    with errors_as_one_line():
        if by not in ("contribution", "weight"):
            raise ValueError(f"`--by` must be 'contribution' or 'weight', got {by!r}.")
        if top < 1:
            raise ValueError(f"`--top` must be at least 1, got {top}.")
        if plot is not None and find_spec("matplotlib") is None:
            raise ImportError('The plot needs matplotlib: pip install "hf_lip[demo]".')
        for option, path in (("--json", json_out), ("--plot", plot)):
            if path is not None and path.is_dir():
                raise ValueError(f"`{option}` {str(path)!r} is a folder: give a file.")
        if plot is not None and not plot.suffix:
            raise ValueError(f"`--plot` {str(plot)!r} has no suffix, which chooses the format: name it such as a.png.")

        import transformers

        import hf_lip  # noqa: F401, registers the models

        # a config is read here, not debugged: its warnings are for those who train the model
        transformers.utils.logging.set_verbosity_error()
        from hf_lip.pipelines.track import load_tracking_model
        from hf_lip.pipelines.track import track as track_answer

        found = track_answer(*load_tracking_model(model, revision), text, max_new_tokens=max_new_tokens)
        layers = found.chosen_layers(layer)
        heads = found.provenance.layers[0].query.shape[1]
        if head is not None and not 0 <= head < heads:
            raise ValueError(f"`--head` must lie in [0, {heads - 1}], got {head}.")
        _print(found, layers, head, by, top, rollout)
        if json_out is not None:
            from hf_lip.models.certificate import write_text_atomically

            json_out.parent.mkdir(parents=True, exist_ok=True)
            write_text_atomically(json_out, json.dumps(_content(found, model, layers, rollout), indent=1) + "\n")
            _wrote(json_out)
        if plot is not None:
            _plot(found, layers, head, by, plot)
            _wrote(plot)


def _wrote(path: Path) -> None:
    Console().print(f"Wrote {path}", markup=False, highlight=False, soft_wrap=True)


def _values(found: "TrackedAnswer", measure: str, layer: int, head: int | None) -> Any:
    """(answer tokens, n) of one head, or of all together."""
    return found.values(measure, layer) if head is None else found.values(measure, layer, per_head=True)[:, head]


def _print(found: "TrackedAnswer", layers: list[int], head: int | None, by: str, top: int, rollout: bool) -> None:
    console = wide_console()
    end = "" if found.ended else ", cut off"
    line = f"{found.answer!r} (probability {found.probability:.4f}, {len(found.answer_tokens)} tokens{end})"
    console.print("Answer:", escape(line), highlight=False, soft_wrap=True)
    estimate = found.provenance.rollout_estimate()[0] if rollout else None
    for layer in layers:
        values = {measure: _values(found, measure, layer, head) for measure in ("weight", "contribution")}
        for number in found.explained:
            row = {measure: part[number] for measure, part in values.items()}
            if estimate is not None:
                row["rollout (estimate)"] = estimate[number]
            _print_table(console, found, _title(found, layer, head, number), row, by, top)
            _print_text(console, found, number, row[by], top)


def _title(found: "TrackedAnswer", layer: int, head: int | None, number: int) -> str:
    attention = found.provenance.layers[layer]
    heads = f"head {head}" if head is not None else f"all {attention.query.shape[1]} heads"
    token, probability = found.answer_tokens[number], found.probabilities[number]
    gammas = attention.gamma.tolist() if head is None else attention.gamma[head : head + 1].tolist()
    low, high = min(gammas), max(gammas)
    gamma = f"gamma {low:.3g}" + (f" to {high:.3g}" if low != high else "")
    kind = f"chained, {gamma}" if attention.layer_type == "chained_attention" else "ordinary attention"
    return f"{token!r} (probability {probability:.4f}), layer {layer} ({kind}), {heads}"


def _print_table(console: Console, found: "TrackedAnswer", title: str, row: dict[str, Any], by: str, top: int) -> None:
    console.print(Text(title, style="bold"), soft_wrap=True)
    table = Table(box=SIMPLE)
    table.add_column("position", justify="right")
    table.add_column("token", no_wrap=True)
    for measure in row:
        table.add_column(measure, justify="right")
    for position in _largest(row[by], top):
        cells = (f"{part[position]:.4f}" for part in row.values())
        table.add_row(str(position), escape(found.tokens[position]), *cells)
    console.print(table)


def _largest(values: Any, top: int) -> list[int]:
    """Positions of the `top` values largest in magnitude, zeros left out."""
    order = values.abs().argsort(descending=True, stable=True)[:top].tolist()
    return [position for position in order if values[position] != 0.0]


def _print_text(console: Console, found: "TrackedAnswer", number: int, values: Any, top: int) -> None:
    """The text: the tokens of the table underlined, those of half the largest value or more reversed."""
    magnitudes = values.abs()
    styles = {
        position: "bold reverse" if magnitudes[position] >= 0.5 * magnitudes.max() else "underline"
        for position in _largest(values, top)
    }
    read = Text()
    if found.spans is None:
        for position, token in enumerate(found.tokens[: found.num_text_tokens]):
            read.append(token, styles.get(position, ""))
            read.append(" ")
    else:
        read.append(found.text)
        for position, (start, stop) in enumerate(found.spans):
            if position in styles:
                read.stylize(styles[position], start, stop)
    for position in range(found.num_text_tokens, found.provenance.positions[number] + 1):
        read.append(" ")
        read.append(found.tokens[position], styles.get(position, "italic"))
    console.print(read, highlight=False, soft_wrap=True)


def _content(found: "TrackedAnswer", model: str, layers: list[int], rollout: bool) -> dict[str, Any]:
    provenance = found.provenance
    estimate = provenance.rollout_estimate()[0].tolist() if rollout else None
    shown = {
        layer: (provenance.weights(layer)[0], provenance.contributions(layer)[0], provenance.layers[layer])
        for layer in layers
    }
    answers = []
    for number, (position, probability) in enumerate(zip(provenance.positions, found.probabilities)):
        entry: dict[str, Any] = {
            "token": found.answer_tokens[number],
            "read_at": position,
            "probability": probability,
            "layers": [
                {
                    "layer": layer,
                    "type": attention.layer_type,
                    "gamma": attention.gamma.tolist(),
                    "effective_weights": weights[:, number].tolist(),
                    "contributions": norms[number].tolist(),
                }
                for layer, (weights, norms, attention) in shown.items()
            ],
        }
        if estimate is not None:
            entry["rollout_estimate"] = estimate[number]
        answers.append(entry)
    return {
        "format": "hf_lip/provenance",
        "format_version": 1,
        "model": model,
        "text": found.text,
        "tokens": list(found.tokens),
        "token_ids": list(found.token_ids),
        "num_text_tokens": found.num_text_tokens,
        "answer": found.answer,
        "ended": found.ended,
        "probability": found.probability,
        "answer_tokens": answers,
    }


def _plot(found: "TrackedAnswer", layers: list[int], head: int | None, by: str, path: Path) -> None:
    from hf_lip.plots import plot_provenance

    rows: dict[str, Any] = {}
    single: dict[str, Any] = {}
    for number in found.explained:
        token = "" if len(found.explained) == 1 else f"{found.answer_tokens[number]!r} "
        for layer in layers:
            name = f"{token}layer {layer}, {'all heads' if head is None else f'head {head}'}"
            rows[name] = single[name] = _values(found, by, layer, head)[number].numpy()
            if head is None:
                per_head = found.values(by, layer, per_head=True)[number]
                for index, values in enumerate(per_head):
                    rows[f"{token}layer {layer}, head {index}"] = values.numpy()
    title = f"{by} of each token to the answer {found.answer!r}"
    if len(rows) > _PLOT_ROWS:
        rows = single
        title += " (single heads with --layer and --head)"
    # what comes after the last position that was read from is not in question
    count = found.provenance.positions[found.explained[-1]] + 1
    rows = {name: values[:count] for name, values in rows.items()}
    plot_provenance(found.tokens[:count], rows, answer=found.num_text_tokens, path=path, title=title)
