# SPDX-License-Identifier: Apache-2.0
"""`pipeline("certify")`: class and certified l2 radius of images, for any image classification model."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset
from transformers import Pipeline

from hf_lip.data.images import image_to_tensor
from hf_lip.pipelines.transforms import image_of_input, pixel_transform
from hf_lip.smoothing.certify import certify_mono, check_num_samples
from hf_lip.smoothing.intervals import check_alpha
from hf_lip.smoothing.radii import check_sigma


METHODS = ("auto", "lipschitz", "mono")
RADIUS_UNIT = "l2, pixels in [0, 1]"
_DEFAULT_NOISE_BATCH = 256

__all__ = ["METHODS", "RADIUS_UNIT", "CertifyPipeline", "CertifySettings"]


@dataclass(frozen=True)
class CertifySettings:
    """Arguments of a call, validated. What they mean is said at [`CertifyPipeline.__call__`]."""

    method: str = "auto"
    sigma: float = 0.25
    n0: int = 100
    n: int = 10_000
    alpha: float = 0.001
    seed: int = 0
    progress: bool | Callable[[int], None] = False

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ValueError(f"Unknown `method` {self.method!r}: choose one of {', '.join(METHODS)}.")
        check_sigma(self.sigma)
        check_alpha(self.alpha)
        for name, least in (("n0", 1), ("n", 1), ("seed", 0)):
            _check_integer(name, getattr(self, name), least)
        if self.seed >= 2**64:
            raise ValueError(f"`seed` must be below 2**64, got {self.seed}.")
        check_num_samples(self.n, self.alpha)

    @classmethod
    def from_arguments(cls, arguments: dict[str, Any]) -> "CertifySettings":
        """Settings from keyword arguments; an unknown one is a `TypeError`."""
        known = [field.name for field in fields(cls)]
        unknown = sorted(set(arguments) - set(known))
        if unknown:
            raise TypeError(f"Unknown argument {unknown[0]!r} of pipeline('certify'): known are {', '.join(known)}.")
        return cls(**arguments)


class CertifyPipeline(Pipeline):
    """Certified image classification.

    ```python
    import hf_lip
    from transformers import pipeline

    certify = pipeline("certify", model="path/to/checkpoint")
    certify("image.png")  # {"label": "7", "radius": 0.41, "method": "lipschitz", ...}
    certify(["a.png", "b.png"], method="mono", sigma=0.25, n=100_000, batch_size=1000)
    ```

    Keyword arguments of a call can also be given to `pipeline(...)` as defaults. The model is put into evaluation
    mode. Do not save the pipeline object (`save_pretrained` would copy its code into the checkpoint): save the model
    and the image processor.
    """

    # False: never loaded; None: loaded if it is there
    _load_processor = False  # type: ignore[assignment]
    _load_image_processor = None
    _load_video_processor = False  # type: ignore[assignment]
    _load_feature_extractor = False  # type: ignore[assignment]
    _load_tokenizer = False  # type: ignore[assignment]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._call_defaults: dict[str, Any] = {}
        super().__init__(*args, **kwargs)
        self.model.eval()

    @property
    def settings(self) -> CertifySettings:
        """Settings of a call without arguments."""
        return CertifySettings.from_arguments(self._call_defaults)

    @property
    def method(self) -> str:
        """Method of a call without arguments, `auto` resolved."""
        return self._resolve_method(self.settings.method)

    def _sanitize_parameters(self, **parameters: Any) -> tuple[dict, dict, dict]:
        # called once by the base class, with what `pipeline(...)` was given: checked now, used in every call
        CertifySettings.from_arguments(parameters)
        self._call_defaults = parameters
        return {}, {}, {}

    def __call__(  # type: ignore[override]
        self, inputs: Any, *, batch_size: int | None = None, num_workers: int | None = None, **kwargs: Any
    ) -> Any:
        """Certify one image, a list, a data set or a generator of images.

        Images are PIL images, paths, arrays or tensors with pixels in [0, 1] ((C, H, W), (H, W, C) or (H, W); uint8
        is divided by 255), or rows with an `image` or `img`. A list gives a list; a `datasets.Dataset`, a torch data
        set or a generator gives an iterator that certifies as it is read.

        Args:
            inputs: the images.
            batch_size: images a forward pass for `lipschitz` (default 1), noisy copies a forward pass for `mono`
                (default 256).
            num_workers: processes that read the images, as in a `DataLoader`.
            method (`str`, *optional*, defaults to `"auto"`): `lipschitz`, the deterministic certificate of a model
                that has one; `mono`, CERTIFY of Cohen et al. 2019 for any model; `auto`, the first where the model
                has it, else the second. The arguments below are for `mono`.
            sigma (`float`, *optional*, defaults to 0.25): standard deviation of the noise, in units of pixels in
                [0, 1]. The noise is added to the original image, before the image processor's resize and normalise.
            n0 (`int`, *optional*, defaults to 100): noisy copies that choose the class.
            n (`int`, *optional*, defaults to 10,000): noisy copies that bound its probability. The literature's
                tables use 100,000, which takes ten times as long for radii up to a fifth larger.
            alpha (`float`, *optional*, defaults to 0.001): probability that an image's certificate is wrong.
            seed (`int`, *optional*, defaults to 0): same seed, same counts, whatever the batch size. The noise is
                keyed by the seed and the position of the image in `inputs`.
            progress (`bool` or callable, *optional*, defaults to `False`): show a bar, or call with the number of
                images (`lipschitz`) or noisy copies (`mono`) done.

        Returns:
            For each image a dict of plain Python values: `label`, `label_id` and `score` (`None` on abstention;
            the score is the softmax for `lipschitz` and the share of votes for `mono`), `radius` (l2; within it the
            network's, for `mono` the smoothed network's, class is constant; 0.0 on abstention), `radius_unit`,
            `abstained`, `method`, `sigma`, `n0`, `n`, `alpha`, `p_lower`, `p_upper_other`, `counts` (votes of the n
            copies), `score_map`, `seed`, `dtype`; what does not apply is `None`.

        Raises:
            TypeError: an unknown argument, or an input that is no image.
            ValueError: an argument out of range, `n` too small ever to certify, no images, pixels that are NaN or
                outside [0, 1], wrong channels or size, `lipschitz` for a model without a certificate.
            FileNotFoundError: a path without a file.
        """
        settings = CertifySettings.from_arguments({**self._call_defaults, **kwargs})
        method = self._resolve_method(settings.method)
        batch_size = self._batch_size if batch_size is None else batch_size
        if batch_size is None:
            batch_size = _DEFAULT_NOISE_BATCH if method == "mono" else 1
        _check_integer("batch_size", batch_size, 1)
        num_workers = self._num_workers if num_workers is None else num_workers
        self.model.eval()

        def run(items: Dataset, total: int | None, single: bool = False) -> Iterator[dict[str, Any]]:
            parameters = {"settings": settings, "method": method, "single": single}
            return self._run(items, total, batch_size, num_workers or 0, parameters)

        if isinstance(inputs, (str, Path, Mapping, Tensor, np.ndarray, Image.Image)):
            return next(run(_Items([inputs], self, method, single=True), 1, single=True))
        if isinstance(inputs, (list, tuple)):
            _check_not_empty(len(inputs))
            return list(run(_Items(inputs, self, method), len(inputs)))
        if hasattr(inputs, "__len__") and hasattr(inputs, "__getitem__"):
            _check_not_empty(len(inputs))
            return run(_Items(inputs, self, method), len(inputs))
        if isinstance(inputs, Iterable):
            return run(_Stream(inputs, self, method), None)
        raise TypeError(
            f"`inputs` must be an image (PIL, path, array, tensor, row) or several, got {type(inputs).__name__}."
        )

    def _run(
        self, items: Dataset, total: int | None, batch_size: int, num_workers: int, parameters: dict[str, Any]
    ) -> Iterator[dict[str, Any]]:
        settings, method = parameters["settings"], parameters["method"]
        smoothing = method == "mono"
        loader: DataLoader = DataLoader(
            items, batch_size=1 if smoothing else batch_size, num_workers=num_workers, collate_fn=_collate
        )
        units = settings.n0 + settings.n if smoothing else 1
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        done = 0
        with Progress(*columns, disable=settings.progress is not True, transient=True) as bar:
            task = bar.add_task(
                "Noisy copies" if smoothing else "Images", total=None if total is None else total * units
            )
            advance = settings.progress if callable(settings.progress) else partial(bar.advance, task)
            for batch in loader:
                outputs = self.forward(
                    batch, settings=settings, method=method, noise_batch=batch_size, advance=advance
                )
                done += len(batch["index"])
                if not smoothing:
                    advance(len(batch["index"]))
                for row in range(len(batch["index"])):
                    yield self.postprocess({key: value[row] for key, value in outputs.items()}, **parameters)
        _check_not_empty(done)

    def preprocess(self, item: Any, method: str = "auto", index: int = 0) -> dict[str, Any]:  # type: ignore[override]
        """Pixels (C, H, W) float32 in [0, 1] of one input, at its own size; the image processor comes later."""
        config = self.model.config
        image = image_of_input(item)
        pixels = image_to_tensor(image, num_channels=getattr(config, "num_channels", None))
        expected = getattr(config, "image_size", None)
        if expected is not None:
            size = (expected, expected) if isinstance(expected, int) else tuple(expected)
            if tuple(pixels.shape[1:]) != size:
                self._check_resizing(tuple(pixels.shape[1:]), size, self._resolve_method(method))
        return {"pixel_values": pixels, "index": index}

    def _check_resizing(self, size: tuple[int, ...], expected: tuple[int, ...], method: str) -> None:
        sizes = f"`image` is {size[0]}x{size[1]} pixels where the model takes {expected[0]}x{expected[1]}"
        if not any(getattr(self.image_processor, step, None) for step in ("do_resize", "do_center_crop")):
            raise ValueError(f"{sizes}: resize it first, or pass an `image_processor` that resizes (method='mono').")
        if method == "lipschitz":
            raise ValueError(
                f"{sizes}. Resizing changes the unit of the radius, so method='lipschitz' refuses it: resize the "
                "image yourself, and the radius is in pixels of the resized image; or use method='mono'."
            )

    def _forward(  # type: ignore[override]
        self,
        model_inputs: dict[str, Any],
        settings: CertifySettings,
        method: str,
        noise_batch: int = _DEFAULT_NOISE_BATCH,
        advance: Callable[[int], None] | None = None,
    ) -> dict[str, Any]:
        pixel_values = model_inputs["pixel_values"]
        if method == "lipschitz":
            output = self.model(pixel_values=pixel_values, output_certified_radius=True)
            return {"logits": output.logits, "certified_radius": output.certified_radius}
        result = certify_mono(
            self._base_classifier(tuple(pixel_values.shape[-2:])),
            pixel_values[0],
            sigma=settings.sigma,
            n0=settings.n0,
            n=settings.n,
            alpha=settings.alpha,
            num_classes=int(self.model.config.num_labels or 0),
            seed=settings.seed,
            index=int(model_inputs["index"][0]),
            batch_size=noise_batch,
            progress=advance,
        )
        return {"result": [result]}

    def postprocess(  # type: ignore[override]
        self, model_outputs: dict[str, Any], settings: CertifySettings, method: str, single: bool = False
    ) -> dict[str, Any]:
        if method == "lipschitz":
            return self._lipschitz_result(model_outputs["logits"], model_outputs["certified_radius"])
        result = model_outputs["result"]
        label_id = None if result.abstained else result.predict
        return {
            "label": self._label(label_id),
            "label_id": label_id,
            "score": None if result.abstained else result.counts[result.candidate] / settings.n,
            "radius": float(result.radius),
            "radius_unit": RADIUS_UNIT,
            "abstained": result.abstained,
            "method": method,
            "sigma": float(settings.sigma),
            "n0": int(settings.n0),
            "n": int(settings.n),
            "alpha": float(settings.alpha),
            "p_lower": float(result.p_lower),
            # the one-class bound: all other classes together have at most the rest
            "p_upper_other": 1.0 - float(result.p_lower),
            "counts": list(result.counts),
            "score_map": "hardmax",
            "seed": int(settings.seed),
            "dtype": _dtype_name(self.model.dtype),
        }

    def _lipschitz_result(self, logits: Tensor, radius: Tensor) -> dict[str, Any]:
        if not torch.isfinite(logits).all() or not torch.isfinite(radius):
            raise ValueError("The model returned NaN or infinite logits or radii: check its weights.")
        label_id = int(logits.argmax())
        result: dict[str, Any] = dict.fromkeys(("sigma", "n0", "n", "alpha", "p_lower", "p_upper_other", "counts"))
        return {
            "label": self._label(label_id),
            "label_id": label_id,
            "score": float(logits.double().softmax(dim=-1)[label_id]),
            "radius": float(radius),
            "radius_unit": RADIUS_UNIT,
            "abstained": False,
            "method": "lipschitz",
            **result,
            "score_map": None,
            "seed": None,
            "dtype": _dtype_name(logits.dtype),
        }

    def _base_classifier(self, size: tuple[int, ...]) -> Callable[[Tensor], Tensor]:
        model, device, dtype = self.model, self.device, self.model.dtype
        arguments = {"output_certified_radius": False} if _has_certificate(model) else {}
        expected = getattr(model.config, "image_size", None)
        # these models take pixels in [0, 1]: a processor is needed for another size only
        plain = _has_certificate(model) and size == (expected, expected)
        transform = pixel_transform(None if plain else self.image_processor)

        def base_classifier(noisy: Tensor) -> Tensor:
            pixel_values = transform(noisy.to(device)).to(dtype)
            return model(pixel_values=pixel_values, **arguments).logits

        return base_classifier

    def _resolve_method(self, method: str) -> str:
        if method == "auto":
            return "lipschitz" if _has_certificate(self.model) else "mono"
        if method == "lipschitz" and not _has_certificate(self.model):
            raise ValueError(
                f"`method`='lipschitz' needs a model with a certificate (model_type 'lipschitz_vision'), "
                f"{type(self.model).__name__} has none: use method='mono'."
            )
        return method

    def _label(self, label_id: int | None) -> str | None:
        if label_id is None:
            return None
        names: Mapping[Any, str] = self.model.config.id2label or {}
        return str(names.get(label_id, label_id))


class _Items(Dataset):
    """Preprocessed items of a sequence."""

    def __init__(self, inputs: Any, pipe: CertifyPipeline, method: str, single: bool = False) -> None:
        self.inputs, self.pipe, self.method, self.single = inputs, pipe, method, single

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return _preprocess(self.pipe, self.inputs[index], self.method, index, name_position=not self.single)


class _Stream(IterableDataset):
    """Preprocessed items of an iterable, in order."""

    def __init__(self, inputs: Iterable, pipe: CertifyPipeline, method: str) -> None:
        self.inputs, self.pipe, self.method = inputs, pipe, method

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for index, item in enumerate(self.inputs):
            yield _preprocess(self.pipe, item, self.method, index, name_position=True)


def _preprocess(pipe: CertifyPipeline, item: Any, method: str, index: int, name_position: bool) -> dict[str, Any]:
    try:
        return pipe.preprocess(item, method=method, index=index)
    except (FileNotFoundError, TypeError, ValueError) as error:
        if not name_position:
            raise
        raise type(error)(f"Image {index} of `inputs`: {error}") from error


def _collate(items: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "pixel_values": torch.stack([item["pixel_values"] for item in items]),
        "index": [item["index"] for item in items],
    }


def _has_certificate(model: Any) -> bool:
    return hasattr(model, "certify")


def _dtype_name(dtype: torch.dtype | None) -> str:
    return str(dtype).removeprefix("torch.")


def _check_not_empty(count: int) -> None:
    if count == 0:
        raise ValueError("`inputs` is empty: pass at least one image.")


def _check_integer(name: str, value: Any, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise TypeError(f"`{name}` must be an integer, got {value!r}.")
    if value < least:
        raise ValueError(f"`{name}` must be at least {least}, got {value}.")
