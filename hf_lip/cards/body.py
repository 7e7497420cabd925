# SPDX-License-Identifier: Apache-2.0
"""The text of a card, a function of the files in its folder alone: the same files give the same text anywhere."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

from ..card_text import markdown_table, rounded_up
from ..checkpoints.stored_weights import stored_weights_sha256
from ..models.certificate import CERTIFICATE_NAME, LipschitzCertificate
from .card_plots import PLOTS
from .evaluations import RESULTS_NAME, read_evaluations
from .figures import Evaluation, Figure, read_json_object
from .published import PublishedResult, read_published
from .result_tables import by_depth_table, results_table, shown_figures
from .run_text import certification_text, describe_training, hardware_text
from .sections import hand_written_block
from .tracking_reruns import tracking_arguments
from .use import how_to_use, intended_use


CONFIG_NAME = "config.json"

__all__ = ["CardSource", "body_parts", "read_source"]


@dataclass(frozen=True)
class CardSource:
    """Everything a card is written from.

    Attributes:
        config: of the model.
        evaluations: in the order of their sections.
        certificate: None for models without one.
        published: figures of papers, to be shown beside the measured ones.
        weights: sha256 of every file of weights.
        plots: files of `PLOTS` that are there.
    """

    folder: Path
    config: Mapping[str, Any]
    evaluations: Sequence[Evaluation]
    certificate: LipschitzCertificate | None
    published: Sequence[PublishedResult]
    weights: Mapping[str, str]
    plots: Sequence[str]

    @property
    def figures(self) -> list[Figure]:
        return [figure for evaluation in self.evaluations for figure in evaluation.figures]

    @property
    def training(self) -> Mapping[str, Any] | None:
        """The results of the training script, which say how the model was made; None for those that do not."""
        made = [one.content for one in self.evaluations if one.kind != "certification"]
        return made[0] if made and "command" in made[0] else None


def read_source(folder: str | Path) -> CardSource:
    """Read what a folder holds.

    Raises:
        FileNotFoundError: no such folder, no config, no evaluation.
        ValueError: a file that is damaged, numbers that cannot have been measured, figures of other weights.
    """
    folder = Path(folder).expanduser()
    evaluations = read_evaluations(folder)
    if not (folder / CONFIG_NAME).is_file():
        raise FileNotFoundError(f"{folder} has no {CONFIG_NAME}: give the folder that holds the model.")
    config = read_json_object(folder / CONFIG_NAME)
    certificate = LipschitzCertificate.load(folder) if (folder / CERTIFICATE_NAME).is_file() else None
    certified = [one for one in evaluations if "lipschitz_constant" in one.content]
    for one in certified:
        stated = one.content["lipschitz_constant"]
        if certificate is None and stated is not None:
            raise ValueError(
                f"{one.file} states lipschitz_constant {stated!r}, and {folder} has no {CERTIFICATE_NAME} that proves "
                "it: save the model again with `save_pretrained`."
            )
        if certificate is not None and abs(stated - certificate.lipschitz_constant) > 1e-6 * stated:
            raise ValueError(
                f"{one.file} is of a model with the constant {stated!r}, {CERTIFICATE_NAME} in {folder} states "
                f"{certificate.lipschitz_constant!r}: evaluate these weights again."
            )
    names = sorted(path.name for path in folder.glob("*.safetensors"))
    if not names:
        raise FileNotFoundError(f"{folder} has no safetensors weights: give the folder that holds the model.")
    _require_same_weights(folder, evaluations)
    return CardSource(
        folder,
        config,
        evaluations,
        certificate,
        read_published(folder, evaluations),
        {name: _sha256(folder / name) for name in names},
        [name for name in PLOTS if (folder / name).is_file()],
    )


def _require_same_weights(folder: Path, evaluations: Sequence[Evaluation]) -> None:
    """Raise unless every file says that it is of the weights in the folder."""
    stored = stored_weights_sha256(folder)
    for one in evaluations:
        settings = one.content.get("settings")
        stated = one.content.get("weights_sha256") or (settings or {}).get("weights_sha256")
        again = f"`hf-lip certify {folder.name}`"
        if one.file == RESULTS_NAME:
            again = f"`hf-lip card --evaluate-again {folder.name}`"
        if stated is None:
            raise ValueError(
                f"{one.file} does not say of which weights its figures are (weights_sha256): evaluate again with "
                f"{again}, which does."
            )
        if stated != stored:
            raise ValueError(
                f"{one.file} is of weights with sha256 {stated[:16]}..., those in {folder} have {stored[:16]}...: its "
                f"figures are of another model. Evaluate these weights again with {again}."
            )


def body_parts(source: CardSource, name: str, written: Mapping[str, str]) -> list[str]:
    """The card without its metadata: paragraphs, tables and headings in order.

    Args:
        name: of the model; the id of a repository, if it has an owner.
        written: the hand-written sections.
    """
    training = source.training
    parts = [
        f"# {PurePath(name).name}",
        _summary(source),
        hand_written_block("description", written.get("description", "")),
        "## Results",
        *(part for evaluation in source.evaluations for part in _results(evaluation, source.published)),
        *(f"![{PLOTS[plot]}]({plot})" for plot in source.plots),
        "## Use",
        how_to_use(source.config, name, source.evaluations),
        *(["## Training", *describe_training(training)] if training is not None else []),
        "## Certificate" if source.certificate is not None else "## Weights",
        *_proof(source),
        "## Intended use and limits",
        intended_use(source.config, source.evaluations, certified=source.certificate is not None),
        hand_written_block("notes", written.get("notes", "")),
        "## Check this card",
        _how_to_check(source),
    ]
    return [part for part in parts if part]


def _summary(source: CardSource) -> str:
    training, kind = source.training or {}, source.config.get("model_type", "model")
    size = f", {training['num_parameters']:,} parameters" if "num_parameters" in training else ""
    if source.certificate is not None:
        block = source.certificate.architecture.get("block_type")
        return (
            f"An image classifier (`{kind}`, blocks of type `{block}`{size}) with a proved Lipschitz constant. With "
            "every prediction comes a radius: no change of the pixels whose l2 norm stays below it can change the "
            "label."
        )
    if source.evaluations[0].task == "image-classification":
        smoothed = any("sigma" in figure.arguments for figure in source.figures)
        use = ", certified by randomized smoothing" if smoothed else ""
        return f"An image classifier (`{kind}`{size}){use}."
    layers = source.config.get("layer_types") or []
    chained = sum(layer == "chained_attention" for layer in layers)
    what = f", {chained} of {len(layers)} layers with chained attention" if chained else ""
    return f"A causal language model (`{kind}`{size}{what})."


def _results(evaluation: Evaluation, published: Sequence[PublishedResult]) -> list[str]:
    mine = [result for result in published if result.file == evaluation.file and result.name == evaluation.name]
    parts = [f"### {_of_what(evaluation)}"]
    if evaluation.kind == "tracking":
        parts += [_what_is_right(evaluation), results_table(evaluation, mine)]
        columns = dict.fromkeys(figure.key[-3] for figure in evaluation.figures if len(figure.key) > 3)
        parts += [by_depth_table(evaluation, column) for column in columns]
        if len(shown_figures(evaluation)) < len(evaluation.figures):
            parts.append(
                f"More depths are in `{evaluation.file}`; among those above is the one with the lowest value."
            )
    else:
        parts.append(results_table(evaluation, mine))
    parts += [f"Published: {result.source}. {result.remark}".strip() for result in mine]
    return [*parts, _explanation(evaluation)]


def _what_is_right(evaluation: Evaluation) -> str:
    if evaluation.content.get("arguments", {}).get("eval_generate"):
        return "An answer is right if greedy decoding names the objects of the reference."
    return "An answer is right if all of its tokens are the most probable ones: greedy decoding gives it."


def _of_what(evaluation: Evaluation) -> str:
    figure = evaluation.figures[0]
    unit = "images" if evaluation.task == "image-classification" else "answers"
    count = f", {figure.count:,} {unit}" if figure.count is not None else ""
    how = figure.arguments
    smoothed = f", smoothed with sigma {how['sigma']:g}" if "sigma" in how else ""
    by = f" (`{evaluation.file}`)" if evaluation.kind == "certification" else ""
    return f"{evaluation.data}, {evaluation.split}{count}{smoothed}{by}"


def _explanation(evaluation: Evaluation) -> str:
    how = evaluation.figures[0].arguments
    text = f"From `{evaluation.file}`."
    if evaluation.kind == "certification" and "sigma" in how:
        text += (
            f" Randomized smoothing, method `{how['method']}`, sigma {how['sigma']:g}, n0 = {how['n0']:,}, n = "
            f"{how['n']:,}, seed {how['seed']}, base classifier {how['base']}: the certificates are of the smoothed "
            f"classifier, each is wrong with probability at most {how['alpha']:g}, and abstentions count as wrong."
        )
    if any(figure.metric == "certified_accuracy" for figure in evaluation.figures):
        text += (
            " Certified accuracy: right, and no change of the pixels in [0, 1] with an l2 norm up to the radius "
            "changes the label."
        )
    if "max_eval_samples" in how:
        text += f" The images are a random part of the split, seed {how['seed']}."
    if evaluation.kind == "language":
        text += (
            f" {how['num_tokens']:,} tokens, each predicted once, from windows of {how['block_size']} tokens, one "
            f"every {how.get('eval_stride', how['block_size'])}."
        )
    if evaluation.task == "image-classification":
        text += " Intervals (Clopper-Pearson) are for other images of the same kind."
    if "evaluated_again" in evaluation.content:
        text += f" Evaluated again on {hardware_text(evaluation.content['evaluated_again']['hardware'])}."
    if evaluation.kind == "certification":
        text += certification_text(evaluation.content)
    return text


def _proof(source: CardSource) -> list[str]:
    hashes = "\n".join(f"- `{name}`: sha256 `{digest}`" for name, digest in source.weights.items())
    certificate = source.certificate
    if certificate is None:
        return [hashes]
    kinds: dict[str, int] = {}
    for layer in certificate.layers:
        kinds[str(layer["method"])] = kinds.get(str(layer["method"]), 0) + 1
    methods = markdown_table(
        ("how a bound was proved", "nodes"), [(method, str(count)) for method, count in kinds.items()]
    )
    facts = (
        f"- Lipschitz constant from pixels to logits, l2 to l2: at most {rounded_up(certificate.lipschitz_constant)}",
        f"- of the features before the head: at most {rounded_up(certificate.feature_constant)}",
        f"- rounding of a logit in evaluation: at most {rounded_up(certificate.evaluation_error, 3)}, taken off every "
        "margin",
        f"- weights in {certificate.dtype}, sha256 of the tensors `{certificate.weights_sha256}`",
    )
    return [
        f"`{CERTIFICATE_NAME}` states for these weights, as stored:",
        "\n".join((*facts, hashes)),
        methods,
        "The constant is the product over the nodes, computed in float64 with bounds on all rounding. A change of the "
        "weights voids it: `from_pretrained` refuses weights of another hash. To compute it again from the files "
        "alone, by code that shares nothing with the model:",
        "```bash\nhf-lip verify .\n```",
    ]


def _how_to_check(source: CardSource) -> str:
    files = ", ".join(dict.fromkeys(f"`{one.file}`" for one in source.evaluations))
    generated = all(one.kind == "tracking" and tracking_arguments(one).generated for one in source.evaluations)
    data = "" if generated else " --data path/to/data"
    return (
        f"All figures were written by the evaluation into {files}; nothing here was typed in. To evaluate the model "
        "again and compare every figure:\n\n"
        f"```bash\nhf-lip card --check .{data}\n```"
    )


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
