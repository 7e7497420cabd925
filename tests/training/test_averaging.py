# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from torch import nn

from hf_lip.training import EvaluationCopy


def make_model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))


def test_without_decay_the_copy_has_the_current_weights_and_leaves_the_model_alone():
    model = make_model()
    evaluated = EvaluationCopy(model)
    model[0].weight.data.add_(1.0)
    model(torch.randn(8, 3))
    copy = evaluated.refresh(model)
    assert model.training
    assert not copy.training
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, copy.state_dict()[name]), name
    assert evaluated.state_dict() == {}


def test_average_follows_the_formula():
    model = nn.Linear(1, 1, bias=False)
    model.weight.data.fill_(1.0)
    evaluated = EvaluationCopy(model, decay=0.2)
    average = 1.0
    for step, value in enumerate([2.0, 3.0, 5.0, 8.0]):
        model.weight.data.fill_(value)
        evaluated.update(model, step)
        decay = min(0.2, (1 + step) / (10 + step))
        average = decay * average + (1 - decay) * value
    assert evaluated.refresh(model).weight.item() == pytest.approx(average, rel=1e-6)
    assert model.weight.item() == 8.0


def test_state_round_trip():
    model = make_model()
    first = EvaluationCopy(model, decay=0.9)
    model[0].weight.data.add_(1.0)
    first.update(model, 5)
    second = EvaluationCopy(make_model(), decay=0.9)
    second.load_state_dict(first.state_dict())
    assert torch.equal(first.refresh(model)[0].weight, second.refresh(model)[0].weight)
    with pytest.raises(ValueError, match="do not belong"):
        second.load_state_dict({"other": torch.zeros(1)})


@pytest.mark.parametrize("decay", [-0.1, 1.0])
def test_decay_must_lie_in_the_unit_interval(decay):
    with pytest.raises(ValueError, match="`decay`"):
        EvaluationCopy(make_model(), decay=decay)
