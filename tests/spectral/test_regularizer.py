# SPDX-License-Identifier: Apache-2.0
"""The penalty on spectral norms: its values against explicit operators, its gradient, its use in training."""

import copy
import math

import pytest
import torch
from torch import nn
from transformers import (
    GPT2Config,
    GPT2Model,
    ResNetConfig,
    ResNetForImageClassification,
    ViTConfig,
    ViTForImageClassification,
)
from transformers.pytorch_utils import Conv1D

from hf_lip.spectral.regularizer import LARGEST_GRID, LipschitzRegularizer


# module, image size
LAYERS = {
    "linear": (lambda: nn.Linear(5, 9), (5,)),
    "transformers conv1d": (lambda: Conv1D(6, 4), (4,)),
    "conv": (lambda: nn.Conv2d(3, 4, 3, padding=1), (3, 6, 7)),
    "no padding": (lambda: nn.Conv2d(3, 4, 3), (3, 6, 6)),
    "stride": (lambda: nn.Conv2d(2, 5, 3, stride=2, padding=1), (2, 8, 8)),
    "uneven stride": (lambda: nn.Conv2d(2, 3, (3, 2), stride=(3, 1), padding=(1, 0)), (2, 7, 5)),
    "groups": (lambda: nn.Conv2d(6, 4, 3, padding=1, groups=2), (6, 5, 5)),
    "depthwise": (lambda: nn.Conv2d(5, 10, 3, padding=1, groups=5), (5, 6, 6)),
    "dilation": (lambda: nn.Conv2d(2, 3, 3, padding=2, dilation=2), (2, 9, 8)),
    "dilation and stride": (lambda: nn.Conv2d(2, 3, 3, padding=2, dilation=2, stride=2), (2, 9, 9)),
    "same, even kernel": (lambda: nn.Conv2d(2, 3, 4, padding="same"), (2, 7, 7)),
    "valid": (lambda: nn.Conv2d(2, 3, 2, padding="valid"), (2, 5, 5)),
    "circular": (lambda: nn.Conv2d(2, 3, 3, padding=1, padding_mode="circular"), (2, 6, 6)),
    "reflect": (lambda: nn.Conv2d(2, 3, 3, padding=1, padding_mode="reflect"), (2, 6, 6)),
    "patches": (lambda: nn.Conv2d(3, 8, 4, stride=4), (3, 8, 8)),
    "kernel larger than the image": (lambda: nn.Conv2d(2, 2, 5, padding=2), (2, 3, 3)),
    "one dimension": (lambda: nn.Conv1d(3, 2, 5, padding=2, groups=1), (3, 11)),
    "three dimensions": (lambda: nn.Conv3d(2, 2, 3, padding=1, stride=(1, 2, 1)), (2, 4, 5, 3)),
    "transposed": (lambda: nn.ConvTranspose2d(4, 2, 3, stride=2, padding=1, output_padding=1), (4, 4, 4)),
    "transposed groups": (lambda: nn.ConvTranspose2d(4, 6, 3, padding=1, groups=2), (4, 5, 5)),
    "image larger than the grid": (lambda: nn.Conv1d(2, 2, 3, padding=1), (2, 3 * LARGEST_GRID)),
}


def explicit_norm(module, shape):
    """Norm of the linear part, from its action on every unit image."""
    module = copy.deepcopy(module).double().eval()
    eye = torch.eye(math.prod(shape), dtype=torch.float64).view(-1, *shape)
    with torch.no_grad():
        matrix = (module(eye) - module(torch.zeros_like(eye[:1]))).flatten(1)
    return torch.linalg.matrix_norm(matrix, ord=2).item()


def tiny_resnet():
    torch.manual_seed(0)
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[2, 2], num_labels=3, layer_type="basic")
    return ResNetForImageClassification(config)


@pytest.mark.parametrize("name", LAYERS)
def test_norm_is_at_least_the_explicit_one_and_near_it(name):
    make, shape = LAYERS[name]
    module = make()
    regularizer = LipschitzRegularizer(module, example_inputs=torch.zeros(1, *shape), num_iterations=10, target=1e-3)
    exact = explicit_norm(module, shape)
    (norm,) = regularizer.norm_estimates().values()
    assert exact * (1 - 1e-5) <= norm
    # reflection counts the padding's own norm; a small image lies on a torus twice as large
    assert norm <= exact * {"reflect": 3.0, "kernel larger than the image": 2.0}.get(name, 1.25)
    assert regularizer().item() == pytest.approx(norm - 1e-3, rel=1e-4)


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("mode", ["hinge", "log", "mean"])
def test_gradient_against_finite_differences(name, mode):
    make, shape = LAYERS[name]
    module = make()
    regularizer = LipschitzRegularizer(
        module, example_inputs=torch.zeros(1, *shape), mode=mode, target=1e-3, num_iterations=5
    )
    value = regularizer()
    value.backward()
    direction = torch.randn_like(module.weight)
    step = 1e-3 * module.weight.norm() / direction.norm()
    values = []
    for sign in (1.0, -1.0):
        with torch.no_grad():
            module.weight += sign * step * direction
            values.append(regularizer())
            module.weight -= sign * step * direction
    expected = (values[0] - values[1]) / (2 * step)
    found = (module.weight.grad * direction).sum()
    assert found.item() == pytest.approx(expected.item(), rel=0.03, abs=0.03 * value.item())
    assert found.item() != 0.0


def test_without_a_size_convolutions_are_bounded_for_every_size():
    module = nn.Conv2d(2, 3, 3, padding=1, stride=2)
    (norm,) = LipschitzRegularizer(module, num_iterations=10).norm_estimates().values()
    for size in (3, 8, 15):
        assert explicit_norm(module, (2, size, size)) <= norm * (1 + 1e-5)
    assert norm <= 1.1 * explicit_norm(module, (2, 15, 15))


def test_modes_are_what_they_say():
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    for layer, norm in zip(model, (0.5, 2.0, 3.0)):
        with torch.no_grad():
            layer.weight.copy_(torch.diag(torch.tensor([norm, 0.1, 0.0, 0.0])))
    assert LipschitzRegularizer(model)().item() == pytest.approx(1.0 + 2.0, abs=1e-4)
    assert LipschitzRegularizer(model, target=2.5)().item() == pytest.approx(0.5, abs=1e-4)
    assert LipschitzRegularizer(model, mode="log")().item() == pytest.approx(math.log(6), abs=1e-4)
    assert LipschitzRegularizer(model, mode="mean")().item() == pytest.approx(5.5 / 3, abs=1e-4)


def test_below_the_target_value_and_gradient_are_zero():
    model = tiny_resnet()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.01)
    regularizer = LipschitzRegularizer(model, 16)
    value = regularizer()
    assert value.item() == 0.0
    assert not value.requires_grad
    # near the target the norms are computed, and still cost nothing
    worst = max(regularizer.norm_estimates().values())
    value = LipschitzRegularizer(model, 16, target=1.05 * worst)()
    value.backward()
    assert value.item() == 0.0
    assert all(parameter.grad is None or not parameter.grad.any() for parameter in model.parameters())


def test_equal_shapes_are_one_batch_and_each_layer_keeps_its_own_norm():
    model = tiny_resnet()
    regularizer = LipschitzRegularizer(model, 32)
    assert len(regularizer._stacks) < len(regularizer.layers)
    norms = regularizer.norm_estimates()
    for name, norm in norms.items():
        alone = LipschitzRegularizer(model, 32, layers=name).norm_estimates()[name]
        assert norm == pytest.approx(alone, rel=1e-5)
    assert LipschitzRegularizer(model, 32, mode="mean")().item() == pytest.approx(
        sum(norms.values()) / len(norms), rel=1e-5
    )


def test_stacks_are_no_larger_than_allowed(monkeypatch):
    model = tiny_resnet()
    expected = LipschitzRegularizer(model, 32)
    monkeypatch.setattr("hf_lip.spectral.regularizer.LARGEST_STACK", 1)
    split = LipschitzRegularizer(model, 32)
    assert [len(stack.layers) for stack in split._stacks] == [1] * len(split.layers)
    assert split().item() == pytest.approx(expected().item(), rel=1e-5)


@pytest.mark.parametrize(
    ("model", "inputs"),
    [
        (ViTForImageClassification(ViTConfig(hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
                                             intermediate_size=32, image_size=8, patch_size=4)), {}),
        (GPT2Model(GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=20)), {}),
    ],
    ids=["vit", "gpt2"],
)  # fmt: skip
def test_other_architectures(model, inputs):
    regularizer = LipschitzRegularizer(model, target=0.05, **inputs)
    value = regularizer()
    value.backward()
    parameters = dict(model.named_parameters())
    for name in regularizer.layers:
        assert parameters[f"{name}.weight"].grad.abs().sum() > 0
    for name, norm in regularizer.norm_estimates().items():
        weight = parameters[f"{name}.weight"].detach().flatten(1)
        assert norm >= torch.linalg.matrix_norm(weight, ord=2).item() * (1 - 1e-5)


def saved_bytes(regularizer):
    """Bytes that a call keeps for its backward pass."""
    kept = []

    def pack(tensor):
        kept.append(tensor.numel() * tensor.element_size())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        regularizer()
    return sum(kept)


def test_memory_depends_neither_on_iterations_nor_on_the_image():
    model = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1))
    needed = {
        (size, iterations): saved_bytes(LipschitzRegularizer(model, size, target=0.01, num_iterations=iterations))
        for size in (8, 32)
        for iterations in (1, 8)
    }
    assert len(set(needed.values())) == 1
    assert 0 < needed[8, 1] < 40 * sum(parameter.numel() * 4 for parameter in model.parameters())


def test_nothing_is_left_in_the_model():
    model = tiny_resnet().train()
    model.resnet.encoder.stages[0].eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    attributes = [set(vars(module)) for module in model.modules()]
    regularizer = LipschitzRegularizer(model, 16)
    regularizer()
    assert modes == [module.training for module in model.modules()]
    assert attributes == [set(vars(module)) for module in model.modules()]
    assert all(not module._forward_hooks and not module._forward_pre_hooks for module in model.modules())
    after = model.state_dict()
    assert set(after) == set(before)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_autocast_half_precision_weights_and_compiled_models_give_the_same():
    model = tiny_resnet()
    expected = LipschitzRegularizer(model, 16)()
    with torch.autocast("cpu", torch.bfloat16):
        found = LipschitzRegularizer(model, 16)()
    assert found.dtype == torch.float32
    assert torch.equal(found, expected)
    compiled = torch.compile(model)
    assert torch.equal(LipschitzRegularizer(compiled, 16)(), expected)
    half = copy.deepcopy(model).bfloat16()
    regularizer = LipschitzRegularizer(half, 16)
    regularizer().backward()
    assert regularizer.norm_estimates()["classifier.1"] > 0
    assert half.classifier[1].weight.grad is None or half.classifier[1].weight.grad.dtype == torch.bfloat16
    torch.testing.assert_close(regularizer().float(), expected, rtol=0.02, atol=0.02)


def test_the_distributed_wrapper_is_looked_through(tmp_path):
    model = tiny_resnet()
    expected = LipschitzRegularizer(model, 16)()
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(model)
        regularizer = LipschitzRegularizer(wrapped, 16)
        assert regularizer.layers == LipschitzRegularizer(model, 16).layers
        loss = wrapped(torch.rand(2, 3, 16, 16), labels=torch.tensor([0, 1])).loss + regularizer()
        loss.backward()
        assert torch.equal(regularizer(), expected)
        assert all(parameter.grad is not None for parameter in model.parameters())
    finally:
        torch.distributed.destroy_process_group()


def test_every_k_calls_and_exact_resume():
    model = tiny_resnet()
    full = LipschitzRegularizer(model, 16)().item()
    regularizer = LipschitzRegularizer(model, 16, every=3)
    assert [regularizer().item() for _ in range(4)] == [pytest.approx(3 * full), 0.0, 0.0, pytest.approx(3 * full)]
    resumed = LipschitzRegularizer(model, 16, every=3)
    resumed.load_state_dict(regularizer.state_dict())
    with torch.no_grad():
        model.classifier[1].weight.add_(1.0)
    for _ in range(4):
        assert resumed().item() == regularizer().item()


def test_a_layer_that_grows_is_noticed():
    model = nn.Sequential(nn.Linear(30, 30, bias=False))
    with torch.no_grad():
        nn.init.orthogonal_(model[0].weight).mul_(0.5)
    regularizer = LipschitzRegularizer(model)
    assert regularizer().item() == 0.0
    direction = torch.zeros(30)
    direction[7] = 1.0
    with torch.no_grad():
        model[0].weight += 3 * torch.outer(direction, direction)
    values = [regularizer().item() for _ in range(4)]
    assert values[-1] > 1.5


def test_norms_fall_in_training():
    images, labels = torch.rand(32, 3, 16, 16), torch.arange(32) % 3
    largest = {}
    for weight in (0.0, 0.3):
        model = tiny_resnet().train()
        regularizer = LipschitzRegularizer(model, 16, layers="resnet.*")
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        start = max(regularizer.norm_estimates().values())
        for _ in range(80):
            loss = model(images, labels=labels).loss
            if weight:
                loss = loss + weight * regularizer()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        largest[weight] = max(regularizer.norm_estimates().values())
    assert start > 2.0
    assert largest[0.0] > 0.9 * start
    assert largest[0.3] < 1.2


def test_zero_weights_and_zero_layers_are_harmless():
    model = nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.Conv2d(3, 2, 3, padding=1))
    with torch.no_grad():
        model[0].weight.zero_()
    value = LipschitzRegularizer(model, 6, mode="mean")()
    value.backward()
    assert value.item() > 0
    assert model[0].weight.grad.isfinite().all()
    assert model[1].weight.grad.abs().sum() > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"mode": "square"}, "`mode` must be one of"),
        ({"target": 0.0}, "`target`"),
        ({"target": float("nan")}, "`target`"),
        ({"num_iterations": -1}, "`num_iterations`"),
        ({"num_iterations": 2.0}, "`num_iterations`"),
        ({"every": 0}, "`every`"),
        ({"input_size": 8, "example_inputs": torch.zeros(1, 3, 8, 8)}, "exclude each other"),
        ({"input_size": (8, 8, 8)}, "input_size"),
        ({"batch_norm": True}, "forward pass"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        LipschitzRegularizer(tiny_resnet(), **arguments)


def test_the_state_of_another_regularizer_is_refused():
    state = LipschitzRegularizer(tiny_resnet(), 16)
    state()
    with pytest.raises(ValueError, match="does not belong"):
        LipschitzRegularizer(nn.Linear(3, 3)).load_state_dict(state.state_dict())
