# SPDX-License-Identifier: Apache-2.0
"""The independent checker: honest checkpoints pass, each of a list of changes is caught."""

import ast
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

import hf_lip.checkpoints.verify
from hf_lip.checkpoints.verify import VerificationReport, verify_checkpoint

from .handmade_checkpoint import Checkpoint, effective, head_rows, honest_checkpoint, layers_of, operator, stated_norm


STAGE = "lipschitz_vision.stages.0.blocks.0.layer"
NECK = "lipschitz_vision.neck.blocks.0.layer"
WEIGHTED = [STAGE, "lipschitz_vision.stages.1.blocks.0.layer", NECK, "classifier"]


def refusal(checkpoint: Checkpoint, folder: Path) -> str:
    """The reasons, one a line; the hash belongs to the changed weights, so it is not what catches the change."""
    report = verify_checkpoint(checkpoint.save(folder))
    assert not report.ok
    text = "\n".join(report.reasons)
    assert "weights_sha256" not in text
    return text


def assert_verified(report: VerificationReport, checkpoint: Checkpoint) -> None:
    """Verified, with bounds above the exact norms of the operators, and not far above."""
    assert report.reasons == []
    config = checkpoint.config
    bounds = {node.name: node.bound for node in report.nodes}
    for prefix, _, _, side in layers_of(config):
        arrays = [checkpoint.array(f"{prefix}.layer.{name}") for name in ("weight", "rescaling")]
        applied = effective(config["block_type"], *arrays)
        exact, torus = (
            np.linalg.norm(operator(applied, side, config["padding_mode"]), 2),
            stated_norm(applied, side, config["padding_mode"]),
        )
        if config["block_type"] in ("cpl", "sll"):
            exact, torus = max(1.0, 2 * exact**2 - 1), max(1.0, 2 * torus**2 - 1)
        assert exact <= bounds[f"{prefix}.layer"]
        assert torus <= bounds[f"{prefix}.layer"] <= torus * (1 + 1e-8)
    rows = head_rows(checkpoint)
    assert report.head_norm is not None
    assert report.max_pair_distance is not None
    assert np.linalg.norm(rows, 2) <= report.head_norm * (1 + 1e-15)
    assert max(np.linalg.norm(a - b) for a in rows for b in rows) <= report.max_pair_distance
    assert report.lipschitz_constant == pytest.approx(checkpoint.certificate["lipschitz_constant"], rel=1e-7)
    assert report.lipschitz_constant >= checkpoint.certificate["lipschitz_constant"] * (1 - 1e-12)


@pytest.mark.parametrize("head_type", ["lln", "spectral", "truncation"])
@pytest.mark.parametrize("padding_mode", ["zeros", "circular"])
@pytest.mark.parametrize("block_type", ["cpl", "sll", "aol", "sr"])
def test_honest_checkpoint_is_verified(block_type, padding_mode, head_type, tmp_path):
    checkpoint = honest_checkpoint(block_type=block_type, padding_mode=padding_mode, head_type=head_type)
    assert_verified(verify_checkpoint(checkpoint.save(tmp_path)), checkpoint)


OTHER_CONFIGS = {
    "householder": {"activation": "householder", "block_type": "sr"},
    "relu-blocks": {"activation": "relu", "hidden_act": "softplus"},
    "unshuffle": {"downsample_type": "unshuffle"},
    "std-below-1": {"image_std": [0.5, 0.25]},
    "std-above-1": {"image_std": [2.0, 4.0]},
    "default-widths": {"conv_hidden_size": None, "dense_size": None, "dense_hidden_size": None},
    "wider-features": {"dense_size": 20},
    "no-conv": {"depths": [0, 0]},
    "kernel-1": {"kernel_size": 1},
    "kernel-5": {"kernel_size": 5, "depths": [1, 0]},
    "kernel-5-small-image": {"kernel_size": 5, "depths": [0, 1], "downsample_factors": [1, 4], "pool_size": 1},
    "two-labels": {"num_labels": 2},
}


@pytest.mark.parametrize("overrides", OTHER_CONFIGS.values(), ids=OTHER_CONFIGS)
def test_other_configurations_are_verified(overrides, tmp_path):
    checkpoint = honest_checkpoint(**overrides)
    assert_verified(verify_checkpoint(checkpoint.save(tmp_path)), checkpoint)


@pytest.mark.parametrize("block_type", ["cpl", "sll", "aol", "sr"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_weights_of_other_dtypes_are_read_exactly(dtype, block_type, tmp_path):
    """Rescalings rounded to nearest in bfloat16 make constants above 1; honestly stated, they are verified."""
    checkpoint = honest_checkpoint(dtype, block_type=block_type, lambda_max=block_type in ("cpl", "sll"))
    assert_verified(verify_checkpoint(checkpoint.save(tmp_path)), checkpoint)


def test_constants_of_large_and_small_weights(tmp_path):
    checkpoint = honest_checkpoint(torch.float64, block_type="aol")
    for name, factor in ((STAGE, 1e200), (NECK, 1e-200)):
        checkpoint.tensors[f"{name}.weight"] *= factor
        checkpoint.tensors[f"{name}.rescaling"] *= factor
    assert_verified(verify_checkpoint(checkpoint.save(tmp_path)), checkpoint)


@pytest.mark.parametrize("name", WEIGHTED)
@pytest.mark.parametrize("block_type", ["cpl", "sll", "aol", "sr"])
def test_kernel_scaled_by_1_percent_is_caught(block_type, name, tmp_path):
    checkpoint = honest_checkpoint(block_type=block_type, lambda_max=block_type == "sll")
    checkpoint.tensors[f"{name}.weight"] *= 1.01
    assert f" of {name}" in refusal(checkpoint, tmp_path)


def test_scaled_sll_kernel_with_slack_leaves_the_statement_true(tmp_path):
    """Without a stated lambda the certificate says L <= 1 only, which an explicit matrix shows to be true still."""
    checkpoint = honest_checkpoint(block_type="sll", depths=[0, 0])
    checkpoint.tensors[f"{NECK}.rescaling"] *= 1.5
    checkpoint.tensors[f"{NECK}.weight"] *= 1.01
    weight, rescaling = checkpoint.array(f"{NECK}.weight"), checkpoint.array(f"{NECK}.rescaling")
    assert np.linalg.norm(effective("sll", weight, rescaling), 2) < 1
    assert verify_checkpoint(checkpoint.save(tmp_path)).ok


def test_one_unit_in_the_last_place_too_low_is_caught(tmp_path):
    """The tolerance is for float64: a rescaling that is one float32 step too small already shows."""
    checkpoint = honest_checkpoint(depths=[0, 0])
    weight = checkpoint.array(f"{NECK}.weight")
    exact = torch.tensor(np.linalg.norm(weight, 2) ** 2)
    below = torch.nextafter(exact.float() * (1 - 2**-23), torch.tensor(0.0))
    checkpoint.tensors[f"{NECK}.rescaling"] = below.repeat(5)
    assert f"the bound of {NECK}" in refusal(checkpoint, tmp_path)


@pytest.mark.parametrize("name", WEIGHTED[:-1])
def test_rescaling_from_one_power_iteration_is_caught(name, tmp_path):
    checkpoint = honest_checkpoint()
    weight = checkpoint.array(f"{name}.weight")
    side = {f"{prefix}.layer": side for prefix, _, _, side in layers_of(checkpoint.config)}[name]
    matrix = operator(weight, side, "zeros")
    vector = matrix.T @ (matrix @ np.random.default_rng(1).normal(size=matrix.shape[1]))
    estimate = (np.linalg.norm(matrix @ vector) / np.linalg.norm(vector)) ** 2
    checkpoint.tensors[f"{name}.rescaling"] = torch.full((len(weight),), float(estimate))
    assert f"the bound of {name}" in refusal(checkpoint, tmp_path)


def add_batch_norm(checkpoint: Checkpoint) -> None:
    prefix = "lipschitz_vision.stages.0.blocks.0.norm"
    for name in ("weight", "bias", "running_mean", "running_var"):
        checkpoint.tensors[f"{prefix}.{name}"] = torch.ones(3)
    checkpoint.tensors[f"{prefix}.num_batches_tracked"] = torch.tensor(1)


def set_value(checkpoint: Checkpoint, name: str, value: float) -> None:
    checkpoint.tensors[name].view(-1)[0] = value


def lower(entries: dict, key: str) -> None:
    entries[key] *= 0.999


def rename_layer(checkpoint: Checkpoint) -> None:
    checkpoint.layer(STAGE)["name"] = "lipschitz_vision.stages.0.blocks.7.layer"


def drop_layer(checkpoint: Checkpoint, name: str) -> None:
    checkpoint.certificate["layers"].remove(checkpoint.layer(name))


# what is changed, config and certificate alike where both say it, and a part of the reason that must come
CHANGES: dict[str, tuple[Callable[[Checkpoint], object], str]] = {
    "reflect-padding": (lambda c: c.set_field(padding_mode="reflect"), "padding_mode is 'reflect'"),
    "replicate-padding": (lambda c: c.set_field(padding_mode="replicate"), "padding_mode is 'replicate'"),
    "std": (lambda c: c.set_field(image_std=[1.0, 0.25]), "the bound of lipschitz_vision.stem"),
    "std-zero": (lambda c: c.set_field(image_std=[1.0, 0.0]), "image_std must be positive"),
    "batch-norm": (add_batch_norm, "unexpected tensor lipschitz_vision.stages.0.blocks.0.norm.running_var"),
    "top-2-rule": (lambda c: c.certificate["head"].update(rule="top_2"), "head.rule is 'top_2'"),
    "block-type": (lambda c: c.set_field(block_type="orthogonal"), "block_type is 'orthogonal'"),
    "sll-vector": (lambda c: c.set_field(block_type="sll"), "unexpected tensor"),
    "activation": (lambda c: c.set_field(activation="gelu"), "activation is 'gelu'"),
    "hidden-act": (lambda c: c.set_field(hidden_act="maxmin"), "hidden_act is 'maxmin'"),
    "head-type": (lambda c: c.set_field(head_type="linear"), "head_type is 'linear'"),
    "pool-type": (lambda c: c.set_field(downsample_type="max"), "downsample_type is 'max'"),
    "pool-size": (lambda c: c.set_field(pool_size=3), "pool_size = 3 does not divide"),
    "even-kernel": (lambda c: c.set_field(kernel_size=2), "kernel_size must be odd"),
    "bool-size": (lambda c: c.set_field(pool_size=True), "pool_size is True"),
    "depth": (lambda c: c.set_field(depths=[1, 2]), "blocks.1.layer.weight is missing"),
    "huge-depth": (lambda c: c.set_field(depths=[1, 10**9]), "declares 1000000002 layers"),
    "huge-image": (lambda c: c.set_field(image_size=10**9), "image_size 1000000000 is above"),
    "unknown-field": (lambda c: c.certificate["architecture"].update(dilation=2), "unknown field 'dilation'"),
    "missing-field": (lambda c: c.certificate["architecture"].pop("kernel_size"), "'kernel_size' is missing"),
    "other-config": (lambda c: c.config.update(hidden_act="tanh"), "architecture.hidden_act is 'relu'"),
    "missing-tensor": (lambda c: c.tensors.pop(f"{NECK}.rescaling"), f"tensor {NECK}.rescaling is missing"),
    "shape": (lambda c: c.tensors.update({f"{NECK}.bias": torch.ones(4)}), f"{NECK}.bias has shape [4]"),
    "scalar-rescaling": (lambda c: c.tensors.update({f"{NECK}.rescaling": torch.ones(1)}), "has shape [1]"),
    "nan": (lambda c: set_value(c, f"{STAGE}.weight", math.nan), f"{STAGE}.weight holds NaN"),
    "infinity": (lambda c: set_value(c, f"{NECK}.bias", math.inf), f"{NECK}.bias holds NaN or infinite"),
    "zero-rescaling": (lambda c: set_value(c, f"{STAGE}.rescaling", 0.0), f"{STAGE}.rescaling: holds values"),
    "negative-rescaling": (lambda c: set_value(c, "classifier.rescaling", -1.0), "classifier.rescaling: holds values"),
    "integer-tensor": (lambda c: c.tensors.update({f"{NECK}.bias": torch.ones(5).int()}), "dtype int32"),
    "half-precision": (lambda c: c.tensors.update({f"{NECK}.weight": torch.ones(5, 6).half()}), "stored as float16"),
    "dtype": (lambda c: c.certificate.update(dtype="bfloat16"), "dtype is 'bfloat16', but"),
    "layer-bound": (lambda c: lower(c.layer(STAGE), "bound"), f"the bound of {STAGE}"),
    "negative-bound": (lambda c: c.layer(STAGE).update(bound=-1.0), f"the bound of {STAGE} must not be negative"),
    "no-op-bound": (lambda c: lower(c.layer("lipschitz_vision.neck.pool"), "bound"), "lipschitz_vision.neck.pool"),
    "nan-bound": (lambda c: c.layer(STAGE).update(bound=math.nan), f"the bound of {STAGE} must be a finite"),
    "huge-bound": (lambda c: c.layer(STAGE).update(bound=10**400), f"the bound of {STAGE} must be a finite"),
    "text-bound": (lambda c: c.layer(STAGE).update(bound="1"), f"the bound of {STAGE} must be a number"),
    "extra-layer": (lambda c: c.certificate["layers"].append({**c.layer(STAGE), "name": "x"}), "lists x"),
    "twice": (lambda c: c.certificate["layers"].append(c.layer(STAGE)), "a second time"),
    "renamed-layer": (rename_layer, f"does not list {STAGE}"),
    "missing-layer": (lambda c: drop_layer(c, NECK), f"does not list {NECK}"),
    "missing-pool": (
        lambda c: drop_layer(c, "lipschitz_vision.neck.pool"),
        "does not list lipschitz_vision.neck.pool",
    ),
    "missing-head": (lambda c: drop_layer(c, "classifier"), "does not list classifier"),
    "layer-entry": (lambda c: c.layer(STAGE).pop("method"), "must hold bound, kind, method, name"),
    "layer-extra": (lambda c: c.layer(STAGE).update(valid_for="x"), "must hold bound, kind, method, name"),
    "layers-type": (lambda c: c.certificate.update(layers={}), "layers must be a list"),
    "feature-constant": (lambda c: lower(c.certificate, "feature_constant"), "feature_constant"),
    "constant-lowered": (lambda c: lower(c.certificate, "lipschitz_constant"), "lipschitz_constant: feature_constant"),
    "constant-raised": (
        lambda c: c.certificate.update(lipschitz_constant=9.0),
        "lipschitz_constant: feature_constant",
    ),
    "constant-missing": (lambda c: c.certificate.pop("lipschitz_constant"), "lipschitz_constant is missing"),
    "head-norm": (lambda c: lower(c.certificate["head"], "norm"), "head.norm"),
    "pair-distance": (lambda c: lower(c.certificate["head"], "max_pair_distance"), "head.max_pair_distance"),
    "head-entries": (lambda c: c.certificate["head"].pop("norm"), "head must hold exactly"),
    "stated-head": (lambda c: c.certificate["head"].update(type="spectral"), "head.type is 'spectral'"),
    "error-negative": (lambda c: c.certificate.update(evaluation_error=-1e-9), "must not be negative"),
    "error-zero": (lambda c: c.certificate.update(evaluation_error=0.0), "one rounding of a logit"),
    "error-infinite": (lambda c: c.certificate.update(evaluation_error=math.inf), "evaluation_error must be a finite"),
    "unit": (lambda c: c.certificate.update(unit="l2, pixels in [0, 255]"), "unit must be"),
    "format": (lambda c: c.certificate.update(format="other"), "format must be"),
    "version": (lambda c: c.certificate.update(format_version=2), "format_version must be 1"),
    "version-type": (lambda c: c.certificate.update(format_version=True), "format_version must be 1"),
    "model-type": (lambda c: c.certificate.update(model_type="vit"), "model_type must be"),
    "input-shape": (lambda c: c.certificate.update(input_shape=[2, 4, 4]), "input_shape is [2, 4, 4]"),
    "unknown-entry": (lambda c: c.certificate.update(valid_for="x"), "unknown entry 'valid_for'"),
    "architecture": (lambda c: c.certificate.update(architecture=None), "architecture must be an object"),
}


@pytest.mark.parametrize(("change", "reason"), CHANGES.values(), ids=CHANGES)
def test_change_is_caught(change, reason, tmp_path):
    checkpoint = honest_checkpoint()
    change(checkpoint)
    assert reason in refusal(checkpoint, tmp_path)


@pytest.mark.parametrize("block_type", ["aol", "sr"])
def test_rescaling_along_the_other_axis_is_caught(block_type, tmp_path):
    checkpoint = honest_checkpoint(block_type=block_type)
    checkpoint.set_field(block_type="sr" if block_type == "aol" else "aol")
    assert "the bound of lipschitz_vision" in refusal(checkpoint, tmp_path)


def test_larger_image_is_caught(tmp_path):
    """The same kernels on a finer torus have larger norms; the neck is shrunk so that only the convolutions notice."""
    checkpoint = honest_checkpoint(block_type="aol", image_size=4, pool_size=1)
    checkpoint.set_field(image_size=20, pool_size=5)
    checkpoint.certificate["input_shape"] = [2, 20, 20]
    assert f"the bound of {STAGE}" in refusal(checkpoint, tmp_path)


def test_certificate_of_other_weights_is_caught_by_the_hash(tmp_path):
    checkpoint = honest_checkpoint()
    checkpoint.rehash()
    checkpoint.tensors[f"{STAGE}.bias"] += 1.0
    report = verify_checkpoint(checkpoint.save(tmp_path, rehash=False))
    assert len(report.reasons) == 1
    assert "belongs to other weights" in report.reasons[0]


def test_missing_folder_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match="not a folder"):
        verify_checkpoint(tmp_path / "nowhere")


def test_report_prints_nodes_constants_and_reasons(tmp_path):
    checkpoint = honest_checkpoint()
    calls = []
    report = verify_checkpoint(str(checkpoint.save(tmp_path)), progress=lambda *call: calls.append(call))
    assert [node.name for node in report.nodes] == [name for _, _, name in calls[:-1]]
    assert calls[-1] == (len(report.nodes), len(report.nodes), "")
    text = report.format()
    assert "VERIFIED: the constants hold" in text
    assert all(node.name in text for node in report.nodes)
    assert report.weights_sha256 == checkpoint.certificate["weights_sha256"]
    lower(checkpoint.layer(STAGE), "bound")
    text = verify_checkpoint(checkpoint.save(tmp_path)).format()
    assert "NOT VERIFIED" in text
    assert f"  - lipschitz_certificate.json: the bound of {STAGE} is stated as 0.999" in text


def test_checker_shares_no_code_with_what_it_checks():
    folder = Path(hf_lip.checkpoints.verify.__file__).parent
    allowed = {"collections", "dataclasses", "hashlib", "json", "math", "numpy", "pathlib", "typing"}
    for path in folder.glob("verify*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.level:
                assert node.level == 1
                assert str(node.module).startswith("verify_")
            elif isinstance(node, ast.ImportFrom | ast.Import):
                names = [node.module] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
                assert {str(name).split(".")[0] for name in names} <= allowed
