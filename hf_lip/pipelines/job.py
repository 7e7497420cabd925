# SPDX-License-Identifier: Apache-2.0
"""A whole certification of a data set, as `hf-lip certify` and `scripts/certify.py` run it."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hf_lip.checkpoints.stored_weights import stored_weights_sha256
from hf_lip.models.certificate import weights_sha256, write_text_atomically
from hf_lip.pipelines.dataset_run import DatasetRun, Processes
from hf_lip.pipelines.denoisers import load_denoiser
from hf_lip.pipelines.loading import calibration_images, chosen_indices, load_certify_pipeline, load_labelled_images
from hf_lip.pipelines.report import summarise
from hf_lip.pipelines.settings import CertifySettings
from hf_lip.smoothing.logs import LOG_NAME, TSV_NAME, ImageRecord, tsv_text
from hf_lip.smoothing.settings import SOFT_METHODS
from hf_lip.training.run_record import hardware, public_path, versions


_IMAGES_PER_BATCH = 64
_CALIBRATION_DRAWS = 100

__all__ = ["CertifyJob"]


@dataclass
class CertifyJob:
    """What to certify and how. `load` it, then `run` it.

    Attributes:
        model: folder or Hub id.
        settings: keyword arguments of `CertifySettings`; `denoiser` and a calibrated `score_map` are put in by `load`.
        source: `data`, `split`, `name`, `image_column` and `label_column` of the data set.
        model_name: for the log and the summary.
        denoiser: see `load_denoiser`.
        calibrate: number of images of `calibrate_split` on which the score map of soft methods is chosen.
        limit, stride: see `chosen_indices`.
        batch_size: images (lipschitz, default 64) or noisy copies (default: the pipeline's) a forward pass.
        device: as of `pipeline`.
        revision: of a Hub repository.
    """

    model: str
    settings: dict[str, Any]
    source: dict[str, Any]
    model_name: str | None = None
    denoiser: str | None = None
    calibrate: int | None = None
    calibrate_split: str = "train"
    limit: int | None = None
    stride: int = 1
    batch_size: int | None = None
    device: Any = None
    revision: str | None = None
    pipe: Any = field(default=None, init=False)
    method: str = field(default="", init=False)
    indices: list[int] = field(default_factory=list, init=False)
    # settings of the log, or of the deterministic method
    used_settings: dict[str, Any] = field(default_factory=dict, init=False)

    def load(self) -> None:
        """Model, data and, where asked for, denoiser and score map.

        Raises:
            ValueError, TypeError, OSError, ImportError: what does not fit, said before any certificate.
        """
        settings = self.settings
        chosen_indices(0, self.stride, self.limit)
        if self.batch_size is not None and self.batch_size < 1:
            raise ValueError(f"`batch_size` must be at least 1, got {self.batch_size}.")
        soft = settings["method"] in SOFT_METHODS
        if soft and (settings["score_map"] is None) == (self.calibrate is None):
            raise ValueError(
                f"method {settings['method']!r} needs one score map for all images: give --score-map, such as "
                "'softmax(t=1.0)', or --calibrate with a number of images to choose it on."
            )
        if self.calibrate is not None and self.calibrate < 1:
            raise ValueError(f"`--calibrate` must be at least 1, got {self.calibrate}.")
        if not soft and self.calibrate is not None:
            raise ValueError(f"--calibrate is for soft scores (lvm, betting), not for method {settings['method']!r}.")
        # any map stands for the one to be found
        checked = dict(settings)
        if self.calibrate is not None:
            checked["score_map"] = "softmax(t=1.0)"
        CertifySettings.from_arguments(checked)
        if self.denoiser is not None:
            settings["denoiser"] = checked["denoiser"] = load_denoiser(self.denoiser, settings["sigma"])
        self.pipe = load_certify_pipeline(self.model, self.device, checked, revision=self.revision)
        self.method = self.pipe.method
        columns = {key: self.source[key] for key in ("name", "image_column", "label_column")}
        data, split = self.source["data"], self.source["split"]
        self._dataset, self._labels = load_labelled_images(data, split, self.pipe.model.config, **columns)
        self.indices = chosen_indices(len(self._labels), self.stride, self.limit)
        if self.calibrate is not None:
            images = calibration_images(data, self.calibrate_split, self.calibrate, **columns)
            settings["score_map"] = self.pipe.calibrate(images, draws=_CALIBRATION_DRAWS, batch_size=self.batch_size)

    @property
    def copies(self) -> int:
        """Units of progress: noisy copies at most, images for the deterministic method."""
        if self.method == "lipschitz":
            return len(self.indices)
        selection = 0 if self.settings["mode"] == "predict" else self.settings["n0"]
        return len(self.indices) * (self.settings["n"] + selection)

    def run(
        self,
        out: Path,
        *,
        resume: bool = False,
        overwrite: bool = False,
        processes: Processes | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> list[ImageRecord] | None:
        """Certify and log; see [`hf_lip.pipelines.dataset_run.DatasetRun.run`]. The deterministic method, which takes
        seconds, has no log to resume: it writes `certificates.tsv` when it is done."""
        if self.method == "lipschitz":
            if (out / LOG_NAME).exists() and not overwrite:
                raise ValueError(f"{out} holds the log of a smoothing run: overwrite it, or choose another folder.")
            self.used_settings = {"method": self.settings["method"]}
            records = self._run_lipschitz(progress)
            (out / LOG_NAME).unlink(missing_ok=True)
            write_text_atomically(out / TSV_NAME, tsv_text(records))
            return records
        settings = CertifySettings.from_arguments(self.settings)
        source = {**self._names(), "name": self.source["name"]}
        run = DatasetRun(
            self.pipe, settings, self.method, self._dataset, self._labels, self.indices,
            source=source, batch_size=self.batch_size,
        )  # fmt: skip
        records_or_none = run.run(out, resume=resume, overwrite=overwrite, processes=processes, progress=progress)
        self.used_settings = run.header
        return records_or_none

    def summary(self, records: list[ImageRecord], thresholds: dict[str, float]) -> dict[str, Any]:
        """The report's figures with what they are of, without paths of this machine."""
        constant = None
        if hasattr(self.pipe.model, "certify"):
            certificate = self.pipe.model.certificate or self.pipe.model.certify()
            constant = float(certificate.lipschitz_constant)
        smoothing = self.method != "lipschitz"
        return {
            **self._names(),
            **({} if self.revision is None else {"revision": self.revision}),
            "weights_sha256": self._weights_sha256(),
            **summarise(records, thresholds, alpha=self.settings["alpha"] if smoothing else None),
            "lipschitz_constant": constant,
            "settings": self.used_settings,
            "hardware": hardware(self.pipe.device, self._dtype()),
            "versions": versions("torch", "transformers", "numpy", "scipy"),
        }

    def _names(self) -> dict[str, Any]:
        """Of model and data."""
        names = {"model": self.model_name or self.model, "data": self.source["data"]}
        return {**{key: public_path(name) for key, name in names.items()}, "split": self.source["split"]}

    def _weights_sha256(self) -> str:
        """Of the files in a folder; of the tensors in memory where files of a repository may have changed since."""
        if Path(self.model).is_dir():
            return stored_weights_sha256(self.model)
        return weights_sha256(self.pipe.model.state_dict())

    def _dtype(self) -> str:
        """In which the network ran."""
        if self.method == "lipschitz":
            return "float64"
        return str(self.settings.get("dtype") or self.pipe.model.dtype)

    def _run_lipschitz(self, progress: Callable[[int, int], None] | None) -> list[ImageRecord]:
        batch_size, total = self.batch_size or _IMAGES_PER_BATCH, len(self.indices)
        done = 0

        def advance(count: int) -> None:
            nonlocal done
            done += count
            if progress is not None:
                progress(done, total)

        results, arrivals = [], [time.perf_counter()]
        dataset = self._dataset.select(self.indices)
        for result in self.pipe(dataset, batch_size=batch_size, progress=advance):
            results.append(result)
            arrivals.append(time.perf_counter())
        records = []
        for place, (index, result) in enumerate(zip(self.indices, results)):
            # images of one batch arrive together: each is given an equal share of the batch's time
            start = place - place % batch_size
            end = min(start + batch_size, total)
            label = self._labels[index]
            records.append(
                ImageRecord(
                    idx=index,
                    label=label,
                    predict=result["label_id"],
                    radius=result["radius"],
                    correct=result["label_id"] == label,
                    p_lower=None,
                    p_upper_other=None,
                    candidate=None,
                    method="lipschitz",
                    n=0,
                    selection_counts=None,
                    counts=None,
                    details={},
                    image="",
                    time=(arrivals[end] - arrivals[start]) / (end - start),
                )
            )
        return records
