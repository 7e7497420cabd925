# SPDX-License-Identifier: Apache-2.0
"""`pipeline("certify")`: class and certified l2 radius of images, for any image classification model."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
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
from hf_lip.models.certificate import weights_sha256
from hf_lip.ops.simplex import ScoreMap
from hf_lip.pipelines.settings import RADIUS_UNIT, CertifySettings
from hf_lip.pipelines.smoothing_runner import SmoothingRunner, has_certificate, make_base
from hf_lip.pipelines.transforms import image_of_input
from hf_lip.smoothing.certify import SmoothingResult


# 64 is best or close to it on CPUs, whose caches larger batches leave
_NOISE_BATCH = {"cpu": 64}
_NOISE_BATCH_ELSEWHERE = 512

__all__ = ["CertifyPipeline"]


class CertifyPipeline(Pipeline):
    """Certified image classification.

    ```python
    import hf_lip
    from transformers import pipeline

    certify = pipeline("certify", model="path/to/checkpoint")
    certify("image.png")  # {"label": "7", "radius": 0.41, "method": "lipschitz", ...}
    certify(["a.png", "b.png"], method="mono", sigma=0.25, n=100_000, dtype="bfloat16")
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
        self._base: tuple[Any, Any] = (None, None)
        super().__init__(*args, **kwargs)
        self.model.eval()

    @property
    def settings(self) -> CertifySettings:
        """Settings of a call without arguments."""
        return CertifySettings.from_arguments(self._call_defaults)

    @property
    def method(self) -> str:
        """Method of a call without arguments, `lipschitz` or one of smoothing."""
        return self._resolve_method(self.settings)

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
            batch_size: images a forward pass for `lipschitz` (default 1), noisy copies a forward pass for smoothing
                (default 64 on a CPU, else 512).
            num_workers: processes that read the images, as in a `DataLoader`.
            method (`str`, *optional*, defaults to `"auto"`): `lipschitz`, the deterministic certificate of a model
                that has one; by randomized smoothing of any model `mono` (CERTIFY of Cohen et al. 2019), `bonferroni`
                and `cpm` (two-class radii from votes), `lvm` and `betting` (two-class radii from soft scores); `auto`,
                the first where the model has it, else for each image the one of mono, bonferroni and cpm that its
                selection votes promise most of. The arguments below are for smoothing.
            mode (`str`, *optional*, defaults to `"certify"`): `predict` gives the class without a radius, from far
                fewer samples (PREDICT of Cohen et al.).
            sigma (`float`, *optional*, defaults to 0.25): standard deviation of the noise, in units of pixels in
                [0, 1]. The noise is added to the original image, before the image processor's resize and normalise.
            n0 (`int`, *optional*, defaults to 100): noisy copies that choose the class.
            n (`int`, *optional*, defaults to 10,000): noisy copies that bound its probability. The literature's
                tables use 100,000, which takes ten times as long for radii up to a fifth larger.
            alpha (`float`, *optional*, defaults to 0.001): probability that an image's certificate is wrong.
            seed (`int`, *optional*, defaults to 0): same seed, same votes: the noise is keyed by the seed, the
                position of the image in `inputs` and the number of the copy. A model that rounds a row in another way
                in batches of another size can turn the vote of a copy whose two largest logits are that close.
            budget (`str`, *optional*, defaults to `"fixed"`): `adaptive` stops sampling once the radius is within
                `rtol` (default 0.02) of what n samples could give, or once it is decided whether it exceeds
                `target_radius`; for votes.
            score_map (`str` or `ScoreMap`): for lvm and betting, such as `"softmax(t=2.0)"`; see `calibrate`. It
                defines the smoothed classifier: certify and predict with the same one.
            randomized (`bool`): randomised Clopper-Pearson bounds.
            lipschitz_aware (`bool`): lvm and betting with the radius for scores of proved Lipschitz constant, for
                models with a certificate; they run in float64 on noisy pixels clipped to [0, 1].
            sound_noise (`bool` or `int`): exactly distributed noise on the grid of 8-bit images, or on that of k/256,
                so that no float rounding can fake a certificate; rounding to the grid becomes part of the classifier.
            dtype (`str`): float32, bfloat16 or float16 for the network. The noise is not affected, the certificate is
                of the network in that precision.
            compile (`bool`): run a compiled graph.
            denoiser (module or function, *optional*): cleans noisy pixels before the classifier.
            progress (`bool` or callable, *optional*, defaults to `False`): show a bar, or call with the number of
                images (`lipschitz`) or noisy copies (smoothing) done.

        Returns:
            For each image a dict of plain Python values: `label`, `label_id` and `score` (`None` on abstention;
            the score is the softmax for `lipschitz`, the share of votes or the mean score for smoothing), `radius`
            (l2; within it the network's, for smoothing the smoothed network's, class is constant; 0.0 on abstention,
            `None` for predictions), `radius_unit`, `abstained`, `method`, `sigma`, `n0`, `n` (copies used), `alpha`,
            `p_lower`, `p_upper_other`, `counts` (votes of the n copies), `score_map`, `seed`, `dtype`, `base` (what
            was done to the network), `noise`, `details`; what does not apply is `None`.

        Raises:
            TypeError: an unknown argument, or an input that is no image.
            ValueError: an argument out of range, options that do not go together, `n` too small ever to certify, no
                images, pixels that are NaN or outside [0, 1], wrong channels or size, `lipschitz` for a model without
                a certificate, logits that are not finite.
            FileNotFoundError: a path without a file.
        """
        settings = CertifySettings.from_arguments({**self._call_defaults, **kwargs})
        method = self._resolve_method(settings)
        batch_size = self._batch_size if batch_size is None else batch_size
        if batch_size is None:
            batch_size = 1 if method == "lipschitz" else self.noise_batch
        _check_integer("batch_size", batch_size, 1)
        num_workers = self._num_workers if num_workers is None else num_workers
        self.model.eval()

        def run(items: Dataset, total: int | None, single: bool = False) -> Iterator[dict[str, Any]]:
            loading = {"num_workers": num_workers or 0}
            if method == "lipschitz":
                return self._run_lipschitz(items, total, settings, {**loading, "batch_size": batch_size})
            return self._run_smoothing(items, total, settings, method, batch_size, loading)

        if isinstance(inputs, (str, Path, Mapping, Tensor, np.ndarray, Image.Image)):
            return next(run(_Items([inputs], self, method, single=True), 1))
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

    def calibrate(self, images: Any, *, draws: int = 100, batch_size: int | None = None, **kwargs: Any) -> ScoreMap:
        """The score map for `lvm` and `betting` with these settings, to be given to later calls as `score_map`.

        Args:
            images: a list or data set of images that will not be certified, such as some of the training images.
            draws: noisy copies of each.
            kwargs: as in a call; `sigma`, `alpha`, `n`, `dtype` and what else makes the base classifier matter.

        Raises:
            ValueError, TypeError: as in a call.
        """
        # any map stands for the one to be found
        fixed = {"method": "lvm", "score_map": "softmax(t=1.0)", "mode": "certify"}
        settings = CertifySettings.from_arguments({**self._call_defaults, **kwargs, **fixed})
        self.model.eval()
        items = _Items(images, self, "lvm")
        pixels = [items[index]["pixel_values"] for index in range(len(items))]
        with self.runner(settings, "lvm", batch_size=batch_size) as runner:
            return runner.calibrate(pixels, draws)

    def runner(
        self, settings: CertifySettings, method: str, *, batch_size: int | None = None, progress: Any = None
    ) -> SmoothingRunner:
        """Smoothing of this model for those who bring indices of their own. The base classifier is kept for the next
        call as long as the model's weights and what the settings say about it stay the same."""
        key = (
            weights_sha256(self.model.state_dict()),
            settings.dtype,
            settings.compile,
            settings.lipschitz_aware,
            settings.denoiser,
            self.image_processor,
        )
        if self._base[0] != key:
            self._base = (key, make_base(self.model, self.image_processor, self.device, settings))
        return SmoothingRunner(
            self._base[1],
            int(self.model.config.num_labels or 0),
            settings,
            method,
            batch_size=self.noise_batch if batch_size is None else batch_size,
            progress=progress,
        )

    @property
    def noise_batch(self) -> int:
        """Default number of noisy copies a forward pass."""
        return _NOISE_BATCH.get(self.device.type, _NOISE_BATCH_ELSEWHERE)

    def _run_lipschitz(
        self, items: Dataset, total: int | None, settings: CertifySettings, loading: dict[str, Any]
    ) -> Iterator[dict[str, Any]]:
        done = 0
        with _progress_bar("Images", total, settings.progress) as advance:
            for batch in DataLoader(items, collate_fn=_stacked, **loading):
                outputs = self.forward(batch)
                done += len(batch["index"])
                advance(len(batch["index"]))
                for logits, radius in zip(outputs["logits"], outputs["certified_radius"]):
                    yield self.postprocess({"logits": logits, "certified_radius": radius})
        _check_not_empty(done)

    def _run_smoothing(
        self,
        items: Dataset,
        total: int | None,
        settings: CertifySettings,
        method: str,
        batch_size: int,
        loading: dict[str, Any],
    ) -> Iterator[dict[str, Any]]:
        done = 0
        units = settings.n + (settings.n0 if settings.mode == "certify" else 0)
        with (
            _progress_bar("Noisy copies", None if total is None else total * units, settings.progress) as advance,
            self.runner(settings, method, batch_size=batch_size, progress=advance) as runner,
        ):
            # a stream is not read ahead
            group = 1 if isinstance(items, IterableDataset) else runner.group_size
            for batch in DataLoader(items, batch_size=group, collate_fn=list, **loading):
                images = [(place, item["index"], item["pixel_values"]) for place, item in enumerate(batch)]
                for _, result in runner.run(images):
                    done += 1
                    yield self.smoothing_result(runner, result)
        _check_not_empty(done)

    def smoothing_result(self, runner: SmoothingRunner, result: SmoothingResult) -> dict[str, Any]:
        """What a call returns for one image."""
        label_id = None if result.abstained else result.predict
        return {"label": self._label(label_id), "label_id": label_id, **runner.describe(result)}

    def preprocess(self, item: Any, method: str = "auto", index: int = 0) -> dict[str, Any]:  # type: ignore[override]
        """Pixels (C, H, W) float32 in [0, 1] of one input, at its own size; the image processor comes later."""
        config = self.model.config
        image = image_of_input(item)
        pixels = image_to_tensor(image, num_channels=getattr(config, "num_channels", None))
        expected = getattr(config, "image_size", None)
        if expected is not None:
            size = (expected, expected) if isinstance(expected, int) else tuple(expected)
            if tuple(pixels.shape[1:]) != size:
                self._check_resizing(tuple(pixels.shape[1:]), size, method)
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

    def _forward(self, model_inputs: dict[str, Any]) -> dict[str, Any]:  # type: ignore[override]
        output = self.model(pixel_values=model_inputs["pixel_values"], output_certified_radius=True)
        return {"logits": output.logits, "certified_radius": output.certified_radius}

    def postprocess(self, model_outputs: dict[str, Any]) -> dict[str, Any]:  # type: ignore[override]
        logits, radius = model_outputs["logits"], model_outputs["certified_radius"]
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
            "dtype": str(logits.dtype).removeprefix("torch."),
            "base": None,
            "noise": None,
            "details": None,
        }

    def _resolve_method(self, settings: CertifySettings) -> str:
        if settings.method == "auto" and settings.mode == "certify" and has_certificate(self.model):
            return "lipschitz"
        if settings.method == "lipschitz" and not has_certificate(self.model):
            raise ValueError(
                f"`method`='lipschitz' needs a model with a certificate (model_type 'lipschitz_vision'), "
                f"{type(self.model).__name__} has none: use method='mono'."
            )
        return settings.method

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


def _stacked(items: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "pixel_values": torch.stack([item["pixel_values"] for item in items]),
        "index": [item["index"] for item in items],
    }


@contextmanager
def _progress_bar(
    description: str, total: int | None, progress: bool | Callable[[int], None]
) -> Iterator[Callable[[int], None]]:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, disable=progress is not True, transient=True) as bar:
        task = bar.add_task(description, total=total)
        yield progress if callable(progress) else partial(bar.advance, task)


def _check_not_empty(count: int) -> None:
    if count == 0:
        raise ValueError("`inputs` is empty: pass at least one image.")


def _check_integer(name: str, value: Any, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise TypeError(f"`{name}` must be an integer, got {value!r}.")
    if value < least:
        raise ValueError(f"`{name}` must be at least {least}, got {value}.")
