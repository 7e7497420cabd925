# SPDX-License-Identifier: Apache-2.0
"""Generated data sets: samples that depend on (seed, split, index) only, and splits that share no sample."""

import hashlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np


# `datasets` brings pandas and pyarrow: imported where it is used, so that importing the package stays quick
if TYPE_CHECKING:
    import datasets


SPLITS = ("train", "validation", "test")
# the shares of the Boxes release: 45, 10 and 45 % (ChaCAL spec 4.2)
_UPPER_ENDS = (0.45, 0.55, 1.0)
# a split holds at least a tenth of all keys: 0.9**2000 < 1e-91
_MAX_DRAWS = 2000

__all__ = ["SPLITS", "TrackingTask", "split_of", "tracking_dataset"]


class TrackingTask(Protocol):
    """What `tracking_dataset` needs of a task; tasks are frozen dataclasses, so that workers can be sent them."""

    def vocabulary(self) -> list[str]:
        """Every word of the task, for `tracking_tokenizer`."""

    def features(self) -> "datasets.Features":
        """Columns of a row and their types."""

    def sample(self, rng: np.random.Generator, accept: Callable[[bytes], bool]) -> Any | None:
        """One sample whose key is accepted, or None where a draw was not. Splits share no key."""

    def rows(self, sample: Any, index: int, rng: np.random.Generator) -> Iterator[dict[str, Any]]:
        """The rows of a sample, in order; `index` is its number in the data set."""


def split_of(key: bytes, split_seed: int) -> str:
    """The split of a key: 45 % of all keys are of `train`, 10 % of `validation`, 45 % of `test`."""
    digest = hashlib.blake2b(key, digest_size=8, salt=split_seed.to_bytes(8, "little")).digest()
    place = int.from_bytes(digest, "little") / 2**64
    return SPLITS[sum(place >= end for end in _UPPER_ENDS[:-1])]


def tracking_dataset(
    task: TrackingTask,
    num_samples: int | None,
    split: str = "train",
    *,
    seed: int = 0,
    split_seed: int = 2255,
    streaming: bool = False,
    num_shards: int = 1,
) -> "datasets.Dataset | datasets.IterableDataset":
    """Rows of `num_samples` samples of a task.

    Sample i is a function of (task, split, seed, split_seed, i): a longer data set begins with the shorter one, and a
    stream gives the rows of the data set, in another order where it has several shards. Splits of one `split_seed`
    share no sample, whatever their seeds and lengths.

    Args:
        task: `ChainsTask`, `RandomChainsTask`, `PermutationsTask` or `BoxesTask`; it documents the columns.
        num_samples: sequences (of Boxes: worlds, which have several rows); None with `streaming` for an endless one.
        split: `train`, `validation` or `test`.
        seed: of the samples.
        split_seed: of the division into splits; keep it through a project.
        streaming: a `datasets.IterableDataset`, which generates as it is read, for a `datasets.Dataset` in memory.
        num_shards: parts of a stream, read by different workers; choose one that the number of workers divides.

    Raises:
        ValueError: an unknown split, a number out of range, or a task with too few different samples to be split.
    """
    import datasets

    if split not in SPLITS:
        raise ValueError(f"`split` must be one of {', '.join(SPLITS)}, got {split!r}.")
    for name, value in (("seed", seed), ("split_seed", split_seed)):
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 2**63:
            raise ValueError(f"`{name}` must be an integer in [0, 2**63), got {value!r}.")
    if num_samples is None and not streaming:
        raise ValueError("`num_samples` is None: give a number, or `streaming=True` for an endless stream.")
    if num_samples is not None and num_samples < 1:
        raise ValueError(f"`num_samples` must be at least 1, got {num_samples}.")
    if num_shards < 1 or (num_shards > 1 and not streaming):
        raise ValueError(f"`num_shards` must be at least 1, and 1 without `streaming`, got {num_shards}.")
    if num_samples is not None and num_shards > num_samples:
        raise ValueError(f"`num_shards` is {num_shards}, more than the {num_samples} samples: use fewer shards.")
    arguments: dict[str, Any] = {
        "task": task,
        "num_samples": num_samples,
        "split": split,
        "seed": seed,
        "split_seed": split_seed,
        "num_shards": num_shards,
    }
    if streaming:
        return datasets.IterableDataset.from_generator(
            _generate,
            features=task.features(),
            # a list among the arguments is what makes shards
            gen_kwargs={**arguments, "shards": list(range(num_shards))},
            split=datasets.NamedSplit(split),
        )
    # from_list, not from_generator: that one keeps a cache of files that a new version of the code would not renew
    rows = list(_generate(**arguments, shards=[0]))
    return datasets.Dataset.from_list(rows, features=task.features(), split=datasets.NamedSplit(split))


def check_range(name: str, value: int | tuple[int, int], smallest: int) -> tuple[int, int]:
    """`(low, high)` of a number or of an inclusive range.

    Raises:
        ValueError: not integers, the wrong way round, or below `smallest`.
    """
    ends = tuple(value) if isinstance(value, (tuple, list)) else (value, value)
    if len(ends) != 2 or any(isinstance(end, bool) or not isinstance(end, int) for end in ends):
        raise ValueError(f"`{name}` must be an integer or a pair (smallest, largest) of integers, got {value!r}.")
    if not smallest <= ends[0] <= ends[1]:
        raise ValueError(f"`{name}` must be >= {smallest}, the smaller first, got {value!r}.")
    return ends


def check_integer(name: str, value: int, smallest: int, largest: int | None = None) -> None:
    """Raise ValueError unless `value` is an integer of [smallest, largest]."""
    out = not isinstance(value, int) or isinstance(value, bool) or value < smallest
    if out or (largest is not None and value > largest):
        limits = f">= {smallest}" if largest is None else f"in {smallest}..{largest}"
        raise ValueError(f"`{name}` must be an integer {limits}, got {value!r}.")


def _generate(
    task: TrackingTask,
    num_samples: int | None,
    split: str,
    seed: int,
    split_seed: int,
    num_shards: int,
    shards: list[int],
) -> Iterator[dict[str, Any]]:
    for shard in shards:
        index = shard
        while num_samples is None or index < num_samples:
            rng = np.random.default_rng([seed, SPLITS.index(split), index])
            yield from task.rows(_sample_of(task, split, split_seed, rng), index, rng)
            index += num_shards


def _sample_of(task: TrackingTask, split: str, split_seed: int, rng: np.random.Generator) -> Any:
    for _ in range(_MAX_DRAWS):
        sample = task.sample(rng, lambda key: split_of(key, split_seed) == split)
        if sample is not None:
            return sample
    raise ValueError(
        f"{_MAX_DRAWS} samples of {task} and none that can be used in the split {split!r}: it has too few different "
        "samples to be split, or its operations can not go on; make it larger."
    )
