# SPDX-License-Identifier: Apache-2.0
"""Devices, precisions and quantisation: the same logits, and a certificate for what really runs or none."""

import json

import pytest
import torch
from accelerate import cpu_offload, dispatch_model
from transformers import AutoModelForCausalLM, AutoModelForImageClassification
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from hf_lip import LipschitzCertificate

from .tiny import chacal, lipschitz, pixels, tokens


OFFLOADED = {
    "lipschitz_vision.stem": "cpu",
    "lipschitz_vision.stages.0": "disk",
    "lipschitz_vision.stages.1": "cpu",
    "lipschitz_vision.neck": "disk",
    "classifier": "cpu",
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    lipschitz().save_pretrained(folder / "lipschitz")
    chacal().save_pretrained(folder / "chacal")
    return folder


def test_device_map_auto_on_the_cpu(saved):
    x, ids = pixels(), tokens()
    model = AutoModelForImageClassification.from_pretrained(saved / "lipschitz", device_map="auto")
    expected = lipschitz()(x)
    output = model(x)
    assert torch.equal(output.logits, expected.logits)
    assert torch.equal(output.certified_radius, expected.certified_radius)
    decoder = AutoModelForCausalLM.from_pretrained(saved / "chacal", device_map="auto")
    assert torch.equal(decoder(ids).logits, chacal()(ids).logits)


def test_offload_to_disk_gives_logits_and_no_radius(saved, tmp_path):
    x = pixels()
    model = AutoModelForImageClassification.from_pretrained(
        saved / "lipschitz", device_map=OFFLOADED, offload_folder=str(tmp_path)
    )
    expected = lipschitz()(x, output_certified_radius=False).logits
    torch.testing.assert_close(model(x, output_certified_radius=False).logits, expected)
    for refused in (lambda: model(x), model.certify):
        with pytest.raises(ValueError, match="is offloaded"):
            refused()


def test_offload_of_a_model_in_memory(saved, tmp_path):
    x, model = pixels(), lipschitz()
    before = model(x)
    cpu_offload(model, execution_device=torch.device("cpu"))
    torch.testing.assert_close(model(x, output_certified_radius=False).logits, before.logits, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="is offloaded"):
        model(x)
    decoder, ids = chacal(), tokens()
    expected = decoder(ids).logits
    cpu_offload(decoder, execution_device=torch.device("cpu"))
    torch.testing.assert_close(decoder(ids).logits, expected)


def test_hooks_that_move_inputs_to_devices_keep_the_certificate():
    x, model = pixels(), lipschitz()
    before = model(x)
    places = dict.fromkeys(OFFLOADED, "cpu")
    dispatched = dispatch_model(model, places, force_hooks=True)
    assert "forward" in vars(dispatched.classifier)
    assert torch.equal(dispatched(x).certified_radius, before.certified_radius)
    # but not what is put around a module below such a hook
    plain = dispatched.classifier._old_forward
    dispatched.classifier._old_forward = lambda features: 10.0 * plain(features)
    with pytest.raises(ValueError, match="not what the model was built with"):
        dispatched(x)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("block_type", ["cpl", "sll", "aol", "sr"])
def test_casts_are_certified_for_the_cast_weights(tmp_path, dtype, block_type):
    model, x = lipschitz(block_type), pixels()
    first = model.certify()
    model.save_pretrained(tmp_path)
    cast = model.to(dtype)
    assert model.certificate is None
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path, dtype=dtype)
    for low in (cast, loaded):
        output = low(x)
        certificate = low.certificate
        assert certificate.dtype == str(dtype).removeprefix("torch.")
        assert certificate.weights_sha256 != first.weights_sha256
        assert_covers_the_jacobian(low, x, certificate.lipschitz_constant)
        # the radius is for the logits as handed out
        assert output.logits.dtype == torch.promote_types(dtype, torch.float32)
        assert output.certified_radius.max() > 0
    # rescalings rounded up for the dtype, not to nearest as a cast does
    assert loaded.certificate.feature_constant <= cast.certificate.feature_constant * (1 + 1e-6)


def assert_covers_the_jacobian(model, x, constant):
    """The norm of the derivative of the float64 function, at each image, is at most the constant."""

    def logits(image):
        return model.classifier(model.lipschitz_vision(image[None].double()).pooler_output)[0]

    for image in x:
        jacobian = torch.autograd.functional.jacobian(logits, image.double()).flatten(1)
        assert torch.linalg.matrix_norm(jacobian, 2).item() <= constant * (1 + 1e-9)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("diagonal", ["strict", "keep"])
def test_chacal_in_half_precision(tmp_path, dtype, diagonal):
    model, ids = chacal(diagonal=diagonal), tokens()
    model.save_pretrained(tmp_path)
    expected = model(ids).logits
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    for low in (loaded, model.to(dtype)):
        logits = low(ids).logits
        assert logits.dtype == dtype
        assert (logits.float() - expected).norm() <= 0.03 * expected.norm()
    generated = loaded.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert generated.shape == (2, 28)


class RoundedTensor(torch.Tensor):
    """Stands for the tensor subclasses in which quantisers keep weights: what is stored is not what is multiplied."""


@register_quantization_config("rounded")
class RoundedConfig(QuantizationConfigMixin):
    def __init__(self, quant_method="rounded", **kwargs):
        super().__init__(quant_method=quant_method)


@register_quantizer("rounded")
class RoundedQuantizer(HfQuantizer):
    requires_calibration = False

    def _process_model_before_weight_loading(self, model, **kwargs):
        return model

    def _process_model_after_weight_loading(self, model, **kwargs):
        for module in model.modules():
            if isinstance(getattr(module, "weight", None), torch.nn.Parameter):
                step = module.weight.detach().abs().max() / 7
                rounded = (module.weight.detach() / step).round() * step
                module.weight = torch.nn.Parameter(rounded.as_subclass(RoundedTensor))
        return model

    def is_serializable(self, *args, **kwargs):
        return False

    @property
    def is_trainable(self):
        return False


def test_quantised_weights_have_no_certificate(saved, tmp_path):
    x = pixels()
    model = AutoModelForImageClassification.from_pretrained(saved / "lipschitz", quantization_config=RoundedConfig())
    assert isinstance(model.classifier.weight, RoundedTensor)
    assert model.certificate is None
    assert model(x, output_certified_radius=False).logits.isfinite().all()
    for refused in (lambda: model(x), model.certify):
        with pytest.raises(ValueError, match="sharded or quantised"):
            refused()


def test_weights_rounded_in_place_are_certified_afresh():
    model, x = lipschitz(), pixels()
    before = model.certify()
    with torch.no_grad():
        for parameter in model.parameters():
            step = parameter.abs().max() / 7
            parameter.copy_((parameter / step).round() * step)
    model(x)
    after = model.certificate
    assert after.lipschitz_constant != before.lipschitz_constant
    assert_covers_the_jacobian(model, x, after.lipschitz_constant)


def test_integer_weights_have_no_certificate():
    model = lipschitz()
    model(pixels())
    weight = model.classifier.weight
    model.classifier.weight = torch.nn.Parameter((weight.detach() * 100).to(torch.int8), requires_grad=False)
    assert model.certificate is None
    with pytest.raises(ValueError, match=r"classifier\.weight is a Parameter of torch\.int8"):
        model(pixels())


def test_a_certificate_beside_other_weights_is_refused(saved, tmp_path):
    # what a cast or a quantiser leaves when it writes a folder without the package
    model = lipschitz()
    model.save_pretrained(tmp_path)
    certificate = json.loads((saved / "lipschitz" / "lipschitz_certificate.json").read_text())
    with torch.no_grad():
        model.classifier.weight.mul_(1.5)
    model.save_pretrained(tmp_path)
    LipschitzCertificate(**certificate).save(tmp_path)
    with pytest.raises(ValueError, match="sha256"):
        AutoModelForImageClassification.from_pretrained(tmp_path)
