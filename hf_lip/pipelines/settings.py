# SPDX-License-Identifier: Apache-2.0
"""Arguments of `pipeline("certify")`, checked before any work."""

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

from torch import Tensor

from hf_lip.ops.simplex import ScoreMap
from hf_lip.pipelines.base_classifier import DTYPES
from hf_lip.smoothing.settings import SOFT_METHODS, Budget, SmoothingSettings


METHODS = ("auto", "lipschitz", "mono", "bonferroni", "cpm", "lvm", "betting")
MODES = ("certify", "predict")
RADIUS_UNIT = "l2, pixels in [0, 1]"
_EIGHT_BIT = 255

__all__ = ["METHODS", "MODES", "RADIUS_UNIT", "CertifySettings"]


@dataclass(frozen=True)
class CertifySettings:
    """Arguments of a call, validated. What they mean is said at [`CertifyPipeline.__call__`]."""

    method: str = "auto"
    mode: str = "certify"
    sigma: float = 0.25
    n0: int = 100
    n: int = 10_000
    alpha: float = 0.001
    seed: int = 0
    budget: Budget = "fixed"
    rtol: float = 0.02
    target_radius: float | None = None
    score_map: ScoreMap | str | None = None
    randomized: bool = False
    lipschitz_aware: bool = False
    sound_noise: bool | int = False
    dtype: str | None = None
    compile: bool = False
    denoiser: Callable[[Tensor], Tensor] | None = None
    progress: bool | Callable[[int], None] = False

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ValueError(f"Unknown `method` {self.method!r}: choose one of {', '.join(METHODS)}.")
        if self.mode not in MODES:
            raise ValueError(f"Unknown `mode` {self.mode!r}: choose one of {', '.join(MODES)}.")
        if self.mode == "predict" and self.method == "lipschitz":
            raise ValueError("`mode`='predict' is for smoothing: method='lipschitz' gives its prediction anyway.")
        if self.dtype is not None and self.dtype not in DTYPES:
            raise ValueError(f"Unknown `dtype` {self.dtype!r}: choose one of {', '.join(DTYPES)}.")
        if self.denoiser is not None and not callable(self.denoiser):
            raise TypeError(f"`denoiser` must be a module or a function of noisy pixels, got {self.denoiser!r}.")
        if self.lipschitz_aware:
            if self.method not in SOFT_METHODS:
                raise ValueError(
                    "`lipschitz_aware` needs soft scores, method lvm or betting: votes jump, no constant bounds them."
                )
            if self.dtype is not None or self.compile or self.denoiser is not None:
                raise ValueError(
                    "`lipschitz_aware` runs the certified network in float64: leave out dtype, compile and denoiser."
                )
        self.smoothing(self.method)

    @classmethod
    def from_arguments(cls, arguments: dict[str, Any]) -> "CertifySettings":
        """Settings from keyword arguments; an unknown one is a `TypeError`."""
        known = [field.name for field in fields(cls)]
        unknown = sorted(set(arguments) - set(known))
        if unknown:
            raise TypeError(f"Unknown argument {unknown[0]!r} of pipeline('certify'): known are {', '.join(known)}.")
        return cls(**arguments)

    def smoothing(self, method: str, *, lipschitz: float | None = None, score_error: float = 0.0) -> SmoothingSettings:
        """The part that smoothing takes, for a method of votes or scores ("lipschitz" is checked as "auto")."""
        score_map = self.score_map
        if isinstance(score_map, str):
            score_map = ScoreMap.parse(score_map)
        kind: Any = "auto" if method == "lipschitz" else method
        return SmoothingSettings(
            method=kind,
            sigma=self.sigma,
            n0=self.n0,
            n=self.n,
            alpha=self.alpha,
            seed=self.seed,
            budget=self.budget,
            rtol=self.rtol,
            target_radius=self.target_radius,
            score_map=ScoreMap() if score_map is None else score_map,
            randomized=self.randomized,
            lipschitz=lipschitz,
            score_error=score_error,
        )

    @property
    def grid(self) -> int | None:
        """Steps of exact noise between 0 and 1, None without `sound_noise`."""
        if self.sound_noise is True:
            return _EIGHT_BIT
        return None if self.sound_noise is False else self.sound_noise
