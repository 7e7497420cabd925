# SPDX-License-Identifier: Apache-2.0
"""torch.export, torch.compile and ONNX: the same logits, and of the certified classifier the same radii."""

import json

import pytest
import torch
from torch.export import Dim
from transformers import AutoModelForImageClassification

from hf_lip.models.lipschitz_vision.export_lipschitz_vision import export_certified
from hf_lip.ops.chain_naive import naive_forward
from hf_lip.ops.chain_onnx import products_forward

from .tiny import chacal, lipschitz, pixels, tokens


NETWORKS = {
    "cpl": {"block_type": "cpl"},
    "circular": {"block_type": "cpl", "padding_mode": "circular", "activation": "maxmin"},
    "sll": {"block_type": "sll", "dense_size": 30, "head_type": "spectral", "hidden_act": "tanh"},
    "aol": {"block_type": "aol", "downsample_type": "unshuffle", "image_std": [0.5, 0.25]},
    "sr": {"block_type": "sr", "activation": "householder", "head_type": "truncation", "dense_size": 9},
}


def parametrised(cases: dict, quick: tuple[str, ...]):
    """All of the cases, those that are not among the quick ones with -m slow: tracing takes seconds."""
    marks = {name: () if name in quick else pytest.mark.slow for name in cases}
    return pytest.mark.parametrize(
        "fields", [pytest.param(fields, id=name, marks=marks[name]) for name, fields in cases.items()]
    )


DECODERS = {
    "mixed": {},
    "keep": {"diagonal": "keep", "layer_types": None},
    "normalised, grouped": {"normalize": True, "num_key_value_heads": 2},
    "no rope, learnt": {"use_rope": False, "gamma_learnable": True},
}
PLAIN = {"output_certified_radius": False}


@parametrised(NETWORKS, ("circular",))
def test_torch_export_of_logits(tmp_path, fields):
    model = lipschitz(**fields)
    shapes = {"pixel_values": {0: Dim.DYNAMIC}, "output_certified_radius": None}
    program = torch.export.export(model, (pixels(),), PLAIN, dynamic_shapes=shapes)
    torch.export.save(program, tmp_path / "logits.pt2")
    loaded = torch.export.load(tmp_path / "logits.pt2").module()
    x = pixels(7)
    assert torch.equal(loaded(x, **PLAIN).logits, model(x, **PLAIN).logits)


@parametrised(NETWORKS, ("circular", "sll"))
def test_torch_export_of_radii(tmp_path, fields):
    model = lipschitz(**fields)
    torch.export.save(export_certified(model), tmp_path / "certified.pt2")
    program = torch.export.load(tmp_path / "certified.pt2").module()
    for x in (pixels(7), pixels(1)):
        expected, got = model(x), program(x)
        assert set(got) == {"logits", "certified_radius", "lipschitz_constant"}
        for name, tensor in got.items():
            assert torch.equal(tensor, expected[name]), name
    assert got["certified_radius"].dtype == torch.float64


def test_exported_radii_of_pixels_that_have_none_are_zero():
    x = pixels()
    expected = lipschitz()(x).certified_radius
    x[0, 0, 3, 3], x[1, 1, 0, 0], x[2, 0, 0, 0] = torch.nan, 1.001, -0.001
    got = export_certified(lipschitz()).module()(x)["certified_radius"]
    assert torch.equal(got[:3], torch.zeros(3, dtype=torch.float64))
    assert torch.equal(got[3:], expected[3:])
    assert (expected > 0).all()


def test_an_exported_program_keeps_its_own_weights():
    model, x = lipschitz(), pixels()
    expected = model(x)
    program = export_certified(model).module()
    with torch.no_grad():
        model.classifier.weight.mul_(3.0)
        model.lipschitz_vision.neck.blocks[0].layer.weight.mul_(3.0)
    assert torch.equal(program(x)["logits"], expected.logits)
    assert torch.equal(program(x)["certified_radius"], expected.certified_radius)
    # and the constants of the changed weights are those of the next export
    assert torch.equal(export_certified(model).module()(x)["lipschitz_constant"], model(x).lipschitz_constant)


def test_what_has_no_certificate_is_not_exported_with_radii(tmp_path):
    model = lipschitz()
    with pytest.raises(ValueError, match="export_certified"):
        torch.export.export(model, (pixels(),))
    with pytest.raises(ValueError, match="training mode"):
        export_certified(model.train())
    model = lipschitz()
    model.lipschitz_vision.neck.register_forward_hook(lambda module, args, out: 2.0 * out)
    with pytest.raises(ValueError, match="not what the model was built with"):
        export_certified(model)
    # a false certificate beside the weights is found before its constants get into a graph
    lipschitz().save_pretrained(tmp_path)
    path = tmp_path / "lipschitz_certificate.json"
    stated = json.loads(path.read_text())
    path.write_text(json.dumps({**stated, "feature_constant": 0.5 * stated["feature_constant"]}))
    with pytest.raises(ValueError, match="the certificate is false"):
        export_certified(AutoModelForImageClassification.from_pretrained(tmp_path))


@parametrised(DECODERS, ("mixed",))
def test_torch_export_of_chacal(fields):
    model = chacal(**fields)
    shapes = {"input_ids": {0: Dim.DYNAMIC, 1: Dim.DYNAMIC}, "use_cache": None}
    inputs = {"input_ids": tokens(), "use_cache": False}
    program = torch.export.export(model, (), inputs, dynamic_shapes=shapes).module()
    # shorter, and longer than a block of the solve
    for ids in (tokens(3, 5), tokens(1, 100)):
        got = program(input_ids=ids, use_cache=False).logits
        torch.testing.assert_close(got, model(ids).logits, rtol=0, atol=1e-6)


def onnx_logits(tmp_path, model, inputs: dict, other: dict, shapes: dict):
    """Logits of ONNX Runtime for `other`, of a model exported with `inputs`."""
    pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    shapes = {name: shapes.get(name) for name in inputs}
    program = torch.onnx.export(model, (), kwargs=inputs, dynamic_shapes=shapes, dynamo=True, verbose=False)
    program.save(tmp_path / "model.onnx")
    options = runtime.SessionOptions()
    options.intra_op_num_threads = 1
    session = runtime.InferenceSession(tmp_path / "model.onnx", options, providers=["CPUExecutionProvider"])
    assert len(session.get_outputs()) == 1
    assert {entry.name for entry in session.get_inputs()} == set(other)
    return torch.from_numpy(session.run(None, {name: tensor.numpy() for name, tensor in other.items()})[0])


@parametrised(NETWORKS, ("circular",))
def test_onnx_of_the_lipschitz_classifier(tmp_path, fields):
    model, x = lipschitz(**fields), pixels(7)
    shapes = {"pixel_values": {0: Dim.DYNAMIC}}
    got = onnx_logits(tmp_path, model, {"pixel_values": pixels(), **PLAIN}, {"pixel_values": x}, shapes)
    torch.testing.assert_close(got, model(x, **PLAIN).logits, rtol=0, atol=1e-5)


@parametrised(DECODERS, ("mixed",))
def test_onnx_of_chacal(tmp_path, fields):
    model = chacal(**fields)
    inputs = {"input_ids": tokens(), "attention_mask": left_padding(2, 24, 5), "use_cache": False}
    shapes = {name: {0: Dim.DYNAMIC, 1: Dim.DYNAMIC} for name in ("input_ids", "attention_mask")}
    other = {"input_ids": tokens(3, 70), "attention_mask": left_padding(3, 70, 9)}
    got = onnx_logits(tmp_path, model, inputs, other, shapes)
    torch.testing.assert_close(got[:, 9:], model(**other).logits[:, 9:], rtol=0, atol=2e-5)
    torch.testing.assert_close(got[1:], model(**other).logits[1:], rtol=0, atol=2e-5)


def left_padding(batch: int, length: int, padding: int) -> torch.Tensor:
    mask = torch.ones(batch, length, dtype=torch.long)
    mask[0, :padding] = 0
    return mask


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("length", [1, 2, 3, 64, 65])
def test_products_are_the_triangular_solve(length, strict):
    query, key, value = torch.randn(3, 2, 4, length, 8, dtype=torch.float64)
    gamma = torch.tensor([0.999, 0.5, 0.0, -1.0 if strict else 0.9], dtype=torch.float64)
    mask = torch.ones(2, length, dtype=torch.bool)
    mask[0, : length // 3] = False
    numbers = (torch.arange(length) // 20).expand(2, -1)
    for key_mask, segments in ((None, None), (mask, None), (None, numbers)):
        bias = None if key_mask is None else torch.where(key_mask, 0.0, -1e30)
        got = products_forward(query, key, value, gamma, 0.7, strict, bias, segments)
        expected = naive_forward(query, key, value, gamma, 0.7, strict, key_mask, segments)
        for ours, reference in zip(got, expected):
            torch.testing.assert_close(ours, reference, rtol=1e-9, atol=1e-9)


@parametrised(NETWORKS, ("aol",))
def test_compiles_in_one_graph(fields):
    torch.compiler.reset()
    model, x = lipschitz(**fields), pixels()
    expected = model(x, **PLAIN).logits
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, **PLAIN).logits, expected, rtol=0, atol=1e-6)


@parametrised(NETWORKS, ())
def test_inductor_on_the_lipschitz_classifier(fields):
    torch.compiler.reset()
    model, x = lipschitz(**fields), pixels()
    expected = model(x)
    compiled = torch.compile(model)
    output = compiled(x)
    torch.testing.assert_close(output.logits, expected.logits, rtol=0, atol=1e-5)
    torch.testing.assert_close(output.certified_radius, expected.certified_radius)
    plain = torch.compile(model, fullgraph=True)(x, **PLAIN).logits
    torch.testing.assert_close(plain, expected.logits, rtol=0, atol=1e-5)


@parametrised(DECODERS, ())
def test_inductor_on_chacal(fields):
    torch.compiler.reset()
    model, ids = chacal(**fields), tokens()
    compiled = torch.compile(model, fullgraph=True)
    outputs, expected = compiled(ids, labels=ids, use_cache=False), model(ids, labels=ids, use_cache=False)
    torch.testing.assert_close(outputs.logits, expected.logits, rtol=0, atol=1e-5)
    outputs.loss.backward()
    got = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    expected.loss.backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(got[name], p.grad, rtol=1e-3, atol=1e-5)
