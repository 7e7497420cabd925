# SPDX-License-Identifier: Apache-2.0
"""The base classifier of smoothing: a copy of a model, made fast for batches of noisy pixels.

A smoothing certificate speaks of the base classifier that ran, so everything here is allowed as long as it also serves
in prediction: batch norm folded into convolutions, channels_last, bfloat16 or float16 weights and activations, a
compiled graph. `description` says what was done.
"""

import copy
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from transformers import PreTrainedModel

from hf_lip.models.certificate import weights_sha256


DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

__all__ = ["DTYPES", "BaseClassifier", "CertifiedBase", "fold_batch_norms"]


class BaseClassifier:
    """Noisy pixels (B, C, H, W) float32 in the unit of [0, 1] -> logits (B, num_labels).

    The model is copied and prepared at the first call, for images of that call's shape, and is then frozen: what is
    done to the model later has no effect.

    Args:
        model: in evaluation mode.
        transform: from pixels to what the model takes, see `pixel_transform`.
        device: to run on.
        dtype: one of `DTYPES` for weights and activations; None leaves the model's own.
        compiled: run a `torch.compile`d graph for one batch size.
        denoiser: maps noisy pixels to cleaner ones; runs first, in its own dtype.
        arguments: further keyword arguments of the model.

    Raises:
        ValueError: an unknown `dtype`; at the first call a model whose rows influence each other.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        transform: Callable[[Tensor], Tensor],
        *,
        device: torch.device,
        dtype: str | None = None,
        compiled: bool = False,
        denoiser: Callable[[Tensor], Tensor] | None = None,
        arguments: dict[str, Any] | None = None,
    ) -> None:
        if dtype is not None and dtype not in DTYPES:
            raise ValueError(f"`dtype` must be one of {', '.join(DTYPES)}, got {dtype!r}.")
        self.transform, self.device, self.compiled, self.denoiser = transform, device, compiled, denoiser
        self.dtype = model.dtype if dtype is None else DTYPES[dtype]
        self.weights_sha256 = weights_sha256(model.state_dict())
        if isinstance(denoiser, nn.Module):
            denoiser.eval().to(device)
        self._arguments = arguments or {}
        self._source = model
        self._forward: Callable[[Tensor], Tensor] = self._prepare_and_run
        self._notes: list[str] = []

    @property
    def description(self) -> str:
        """What runs, for results and logs; complete after the first call."""
        return ", ".join([str(self.dtype).removeprefix("torch."), *self._notes])

    def __call__(self, noisy: Tensor) -> Tensor:
        return self._forward(noisy)

    def _prepare_and_run(self, noisy: Tensor) -> Tensor:
        notes = [] if self.denoiser is None else [f"denoised by {_name(self.denoiser)}"]
        layout = torch.contiguous_format
        # outside of inference mode, whose tensors could not be changed any more
        with torch.inference_mode(False), torch.no_grad():
            network = copy.deepcopy(self._source).eval().requires_grad_(False).to(self.device)
            probe = torch.rand((3, *noisy.shape[1:]), generator=torch.Generator().manual_seed(0)).to(self.device)
            pixels = self._pixels(probe).to(network.dtype)
            folded = fold_batch_norms(network, lambda: network(pixel_values=pixels, **self._arguments).logits)
            if folded:
                notes.append(f"{folded} batch norms folded")
            self._require_rows_apart(network, pixels)
            network.to(self.dtype)
            if any(isinstance(module, nn.Conv2d) for module in network.modules()):
                layout = torch.channels_last
                network.to(memory_format=layout)
                notes.append("channels_last")

        def forward(batch: Tensor) -> Tensor:
            pixel_values = self._pixels(batch).to(self.dtype, memory_format=layout)
            logits: Tensor = network(pixel_values=pixel_values, **self._arguments).logits
            return logits

        if self.compiled:
            notes.append("compiled")
        self._notes = notes
        del self._source
        self._forward = torch.compile(forward, dynamic=False) if self.compiled else forward
        return self._forward(noisy)

    def _pixels(self, noisy: Tensor) -> Tensor:
        return self.transform(noisy if self.denoiser is None else self.denoiser(noisy))

    def _require_rows_apart(self, network: nn.Module, pixels: Tensor) -> None:
        """A class that depends on the other images of a batch is no function of the image: nothing to certify."""
        together = network(pixel_values=pixels, **self._arguments).logits.float()
        others = network(pixel_values=torch.cat([pixels[:1], 1.0 - pixels[1:]]), **self._arguments).logits.float()
        scale = float(together.abs().max())
        if float((together[0] - others[0]).abs().max()) > 1e-2 * scale + 1e-6:
            raise ValueError(
                f"The logits of {type(network).__name__} for one image change with the other images of its batch "
                "(batch statistics?): such a model has no certificate."
            )


class CertifiedBase:
    """A network with a certificate as a base classifier whose Lipschitz constant holds for what is computed.

    Noisy pixels are first clipped to [0, 1], which is 1-Lipschitz, as the network's constants and its bound on
    rounding errors are proved for such pixels; then it runs in float64.

    Args:
        model: one that can `certify()`; it is copied.
        device: to run on, with float64.
    """

    dtype = torch.float64
    description = "float64, pixels clipped to [0, 1]"

    def __init__(self, model: Any, device: torch.device) -> None:
        self.device = device
        self.weights_sha256 = weights_sha256(model.state_dict())
        self._network = copy.deepcopy(model).eval().requires_grad_(False).double().to(device)
        certificate = self._network.certify()
        self.lipschitz_constant: float = certificate.lipschitz_constant
        self.logit_error: float = certificate.evaluation_error

    def __call__(self, noisy: Tensor) -> Tensor:
        logits: Tensor = self._network(
            pixel_values=noisy.clamp(0.0, 1.0).double(), output_certified_radius=False
        ).logits
        return logits

    def score_constants(self, factor: float, num_classes: int) -> tuple[float, float]:
        """Lipschitz constant of every class's score, and a bound on what a computed score is off.

        Args:
            factor: bound of the l2 norm of a score's gradient with respect to the logits.
        """
        up = 1.0 + 2.0**-50
        # the score map itself computes in float64, to some units in the last place of numbers up to 1
        error = factor * math.sqrt(num_classes) * self.logit_error * up + num_classes * 2.0**-45
        return factor * self.lipschitz_constant * up, error


def fold_batch_norms(network: nn.Module, run: Callable[[], Tensor]) -> int:
    """Fold every BatchNorm2d whose only input is the output of one Conv2d into that convolution, in place.

    Pairs are found by watching one run, so that no naming or order of modules is assumed; a convolution whose output
    is also used elsewhere is found out by comparing the outputs before and after, and then nothing is folded.

    Args:
        network: in evaluation mode.
        run: runs it on some input and returns its output.

    Returns:
        Number of batch norms folded.
    """
    pairs = _conv_bn_pairs(network, run)
    if not pairs:
        return 0
    before = run()
    saved = [(conv, norm, copy.deepcopy(conv)) for conv, norm in pairs]
    for conv, norm in pairs:
        fused = fuse_conv_bn_eval(conv, norm)
        conv.weight, conv.bias = fused.weight, fused.bias
    names = {norm: name for name, norm in network.named_modules()}
    for _, norm in pairs:
        network.set_submodule(names[norm], nn.Identity())
    after = run()
    if float((after - before).abs().max()) <= 1e-2 * float(before.abs().max()) + 1e-6:
        return len(pairs)
    for conv, norm, original in saved:
        conv.weight, conv.bias = original.weight, original.bias
        network.set_submodule(names[norm], norm)
    return 0


def _conv_bn_pairs(network: nn.Module, run: Callable[[], Tensor]) -> list[tuple[nn.Conv2d, nn.BatchNorm2d]]:
    """Pairs in which each module ran once and the batch norm's input was the convolution's output itself."""
    made: dict[int, tuple[nn.Conv2d, Tensor]] = {}
    pairs: list[tuple[nn.Conv2d, nn.BatchNorm2d]] = []
    runs: dict[nn.Module, int] = {}

    def after(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        runs[module] = runs.get(module, 0) + 1
        if isinstance(module, nn.Conv2d):
            # the tensor is kept, so that no other gets its id
            made[id(output)] = (module, output)
        elif id(inputs[0]) in made:
            pairs.append((made[id(inputs[0])][0], module))  # type: ignore[arg-type]

    kinds = (nn.Conv2d, nn.BatchNorm2d)
    hooks = [module.register_forward_hook(after) for module in network.modules() if type(module) in kinds]
    try:
        run()
    finally:
        for hook in hooks:
            hook.remove()
    convs = [conv for conv, _ in pairs]
    return [
        (conv, norm)
        for conv, norm in pairs
        if runs[conv] == runs[norm] == 1 and convs.count(conv) == 1 and norm.track_running_stats and not norm.training
    ]


def _name(function: Any) -> str:
    return str(getattr(function, "__name__", type(function).__name__))
