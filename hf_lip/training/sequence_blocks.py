# SPDX-License-Identifier: Apache-2.0
"""Text cut into blocks of equal length: from memory in a random order, or from a stream as it comes."""

from collections import deque
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from .sequence_questions import Batch
from .sequence_text import encode_documents


_BLOCKS = 3

__all__ = ["StreamBlocks", "TextBlocks", "block_batch"]


def block_batch(blocks: Sequence[NDArray[np.int32]]) -> Batch:
    """Blocks of n + 1 tokens as `input_ids` (B, n) and `targets` (B, n), the token after each."""
    ids = torch.from_numpy(np.stack(blocks).astype(np.int64))
    return {"input_ids": ids[:, :-1].contiguous(), "targets": ids[:, 1:].contiguous()}


class TextBlocks:
    """Blocks of a text in memory, as `Samples` of `StepBatches`.

    Every epoch cuts the text at other places and takes the blocks in another order. A block shares its last token
    with the next one: there it is read, here it is predicted.

    Args:
        ids: (N,) tokens.
        block_size: tokens of a block.

    Raises:
        ValueError: a text shorter than a batch.
    """

    def __init__(self, ids: NDArray[np.int32], block_size: int, seed: int, batch_size: int) -> None:
        self.ids, self.block_size, self.seed, self.batch_size = ids, block_size, seed, batch_size
        # one block less than there is room for leaves room to move the cuts
        self.num_blocks = max((len(ids) - block_size) // block_size, min((len(ids) - 1) // block_size, 1))
        self.steps_per_epoch = self.num_blocks // batch_size
        if self.steps_per_epoch == 0:
            raise ValueError(
                f"--train_batch_size is {batch_size} blocks of --block_size {block_size}, more than the training text "
                f"of {len(ids)} tokens has: make one of them smaller, or give more text."
            )
        self._cut: tuple[int, int, NDArray[np.int64]] | None = None

    def draw(self, step: int, progress: float, places: range) -> list[Any]:
        epoch, position = divmod(step, self.steps_per_epoch)
        first, order = self._epoch(epoch)
        starts = [first + self.block_size * int(order[position * self.batch_size + place]) for place in places]
        return [self.ids[start : start + self.block_size + 1] for start in starts]

    def length(self, sample: Any) -> int:
        return len(sample)

    def collate(self, samples: Sequence[Any]) -> Batch:
        return block_batch(samples)

    def _epoch(self, epoch: int) -> tuple[int, NDArray[np.int64]]:
        if self._cut is None or self._cut[0] != epoch:
            rng = np.random.default_rng([self.seed, _BLOCKS, epoch])
            room = min(len(self.ids) - 1 - self.num_blocks * self.block_size, self.block_size - 1)
            self._cut = epoch, int(rng.integers(room + 1)), rng.permutation(self.num_blocks)
        return self._cut[1:]


class StreamBlocks:
    """Blocks of a streamed data set, in its order; after its end it begins again.

    Every process reads the whole stream and takes its share of each step's blocks, so the data do not depend on the
    number of processes. The position after a step (`epoch`, whole `documents` read in it, `tokens` of the next one) is
    all that a resumed run needs: documents before it are skipped, not tokenised.

    Args:
        dataset: a `datasets.IterableDataset`.
        column: of the texts.
        num_steps, batch_size, num_micro_batches, process_index, num_processes: as for `StepBatches`.
    """

    def __init__(
        self,
        dataset: Any,
        column: str,
        tokenizer: PreTrainedTokenizerBase,
        block_size: int,
        num_steps: int,
        batch_size: int,
        *,
        num_micro_batches: int = 1,
        process_index: int = 0,
        num_processes: int = 1,
    ) -> None:
        self.pace = None
        self.dataset, self.column, self.tokenizer, self.block_size = dataset, column, tokenizer, block_size
        self.num_steps, self.batch_size, self.num_micro_batches = num_steps, batch_size, num_micro_batches
        self.process_index, self.num_processes = process_index, num_processes

    def __len__(self) -> int:
        return self.num_steps

    def from_step(
        self, step: int, position: dict[str, int] | None, num_workers: int
    ) -> Iterator[tuple[list[Batch], dict[str, int] | None]]:
        """The micro-batches of every step from `step` on, and the position after it.

        Raises:
            ValueError: workers, an entry that is no text, or a stream without any text.
        """
        if num_workers > 0:
            # in a worker `datasets` shuffles differently: the data would depend on the number of workers
            raise ValueError(f"--num_workers must be 0 with --streaming, which is read in order, got {num_workers}.")
        start = {"epoch": 0, "documents": 0, "tokens": 0} if position is None else position
        blocks = self._blocks(start)
        for _ in range(step, self.num_steps):
            drawn = []
            for place in range(self.batch_size):
                block, after = next(blocks)
                if place % self.num_processes == self.process_index:
                    drawn.append(block)
            count = len(drawn) // self.num_micro_batches
            yield [block_batch(drawn[first : first + count]) for first in range(0, len(drawn), count)], after

    def _blocks(self, position: dict[str, int]) -> Iterator[tuple[NDArray[np.int32], dict[str, int]]]:
        """Blocks with the position after each."""
        pieces: deque[tuple[dict[str, int], NDArray[np.int32]]] = deque()
        documents = self._documents(position)
        ready = 0
        while True:
            while ready < self.block_size + 1:
                piece = next(documents)
                pieces.append(piece)
                ready += len(piece[1])
            block = np.empty(self.block_size + 1, dtype=np.int32)
            filled = 0
            for _, ids in pieces:
                part = ids[: self.block_size + 1 - filled]
                block[filled : filled + len(part)] = part
                filled += len(part)
                if filled == len(block):
                    break
            # the last token is also the first of the next block
            ready -= self.block_size
            left = self.block_size
            while left:
                place, ids = pieces.popleft()
                taken = min(left, len(ids))
                left -= taken
                if taken < len(ids):
                    pieces.appendleft(({**place, "tokens": place["tokens"] + taken}, ids[taken:]))
            yield block, pieces[0][0]

    def _documents(self, position: dict[str, int]) -> Iterator[tuple[dict[str, int], NDArray[np.int32]]]:
        """Token ids from a position on, and where they begin."""
        epoch, number, dropped = position["epoch"], position["documents"], position["tokens"]
        while True:
            self.dataset.set_epoch(epoch)
            found = number > 0
            # not `dataset.skip`, which leaves a shuffled stream in the order of another epoch
            for row in islice(self.dataset, number, None):
                text = row.get(self.column)
                if not isinstance(text, str):
                    raise ValueError(
                        f"--dataset has {text!r} in the column {self.column!r} of document {number}, which is no text."
                    )
                (ids,) = encode_documents([text], self.tokenizer, argument="--dataset")
                if len(ids) > dropped:
                    yield {"epoch": epoch, "documents": number, "tokens": dropped}, ids[dropped:]
                    found = True
                number, dropped = number + 1, 0
            if not found:
                raise ValueError("--dataset has no text: the stream ended before its first token.")
            epoch, number = epoch + 1, 0
