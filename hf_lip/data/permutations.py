# SPDX-License-Identifier: Apache-2.0
"""Tracking a permutation of a few elements: the word problem of S5, A5 and their kin, and swaps as in DeltaFormer."""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from hf_lip.data.generation import check_integer, check_range
from hf_lip.data.tracking_tokenizer import BOS_ID, EOS_ID, IGNORED, SPECIAL_TOKENS


if TYPE_CHECKING:
    import datasets


__all__ = ["PermutationsTask"]


@dataclass(frozen=True, kw_only=True)
class PermutationsTask:
    """A row of elements is rearranged by a sequence of moves; the answer is how they lie.

    A word such as 21034 is an arrangement, or a move: "put at place i the element that lies at place 21034[i]". The
    state starts as 01234 and after the move m is state'[i] = state[m[i]].

    What can be guessed without following the moves: after two or more moves of `all` (`even`) the state is uniform
    over the 120 (60) permutations, whatever is known of all but one of the moves. After n `swaps` it has the parity
    of n and tends to uniform over those 60, but slowly: after two swaps, the one more frequent state (no change) is
    right at a rate of one in ten.

    Columns of a row, one row a sample:

    - `form="dense"`: one token a move and an answer after each. `input_ids` (n + 2,) int32: `<bos>`, n moves, `<eos>`;
      `labels` (n + 2,): the state after each move, at the place where a causal language model looks for it (move i,
      counted from 0, is token i + 1 and its label is entry i + 2), -100 elsewhere; `hops` (n + 2,): the number of
      moves behind each label, -1 elsewhere.
    - `form="text"`: `prompt` "21034 10234 =" and `answer` "12034", for `encode_answers`.

    and in both `num_state_changes` (moves; one of `all` may be 01234, which changes nothing but has to be read),
    `sample_id`.

    Args:
        num_elements: elements, 2 to 7; the vocabulary has num_elements! words.
        num_moves: moves of a sample, or an inclusive range of which each sample draws one uniformly.
        moves: `all` permutations, the `even` ones (A5 for five elements) or `swaps` of two elements, drawn uniformly.
        form: `dense` or `text`.

    Raises:
        ValueError: a number out of range, or `even` moves of two elements, of which there is one only.
    """

    num_elements: int = 5
    num_moves: int | tuple[int, int] = (1, 32)
    moves: Literal["all", "even", "swaps"] = "all"
    form: Literal["dense", "text"] = "dense"

    def __post_init__(self) -> None:
        check_integer("num_elements", self.num_elements, 2, 7)
        check_range("num_moves", self.num_moves, 1)
        if self.moves not in ("all", "even", "swaps"):
            raise ValueError(f"`moves` must be 'all', 'even' or 'swaps', got {self.moves!r}.")
        if self.form not in ("dense", "text"):
            raise ValueError(f"`form` must be 'dense' or 'text', got {self.form!r}.")
        if len(self._choices) < 2 and self.moves == "even":
            raise ValueError("`moves` is 'even', and two elements have no even move: use three elements or more.")

    @cached_property
    def _permutations(self) -> NDArray[np.int64]:
        return np.array(list(itertools.permutations(range(self.num_elements))))

    @cached_property
    def _choices(self) -> NDArray[np.int64]:
        every = self._permutations
        if self.moves == "all":
            return np.arange(len(every))
        if self.moves == "swaps":
            return np.flatnonzero((every != np.arange(self.num_elements)).sum(axis=1) == 2)
        pairs = itertools.combinations(range(self.num_elements), 2)
        inversions = sum((every[:, i] > every[:, j]).astype(np.int64) for i, j in pairs)
        return np.flatnonzero(np.asarray(inversions) % 2 == 0)

    @cached_property
    def _numbers(self) -> dict[bytes, int]:
        return {row.tobytes(): number for number, row in enumerate(self._permutations)}

    def vocabulary(self) -> list[str]:
        """The permutations in lexicographic order, and `=` in text form."""
        words = ["".join(map(str, row)) for row in self._permutations.tolist()]
        return [*words, "="] if self.form == "text" else words

    def features(self) -> "datasets.Features":
        import datasets

        number = datasets.Value("int32")
        columns: dict[str, Any] = {"prompt": datasets.Value("string"), "answer": datasets.Value("string")}
        if self.form == "dense":
            columns = {name: datasets.List(number) for name in ("input_ids", "labels", "hops")}
        return datasets.Features({**columns, "num_state_changes": number, "sample_id": datasets.Value("int64")})

    def sample(self, rng: np.random.Generator, accept: Callable[[bytes], bool]) -> NDArray[np.int64] | None:
        """(n,) numbers of moves in the vocabulary. The key is all moves, in order: a longer sequence may begin with
        one of another split."""
        low, high = check_range("num_moves", self.num_moves, 1)
        sample = rng.choice(self._choices, size=int(rng.integers(low, high + 1)))
        return sample if accept(sample.astype("<i4").tobytes()) else None

    def rows(self, sample: NDArray[np.int64], index: int, rng: np.random.Generator) -> Iterator[dict[str, Any]]:
        state, states = np.arange(self.num_elements), []
        for move in self._permutations[sample]:
            state = state[move]
            states.append(self._numbers[state.tobytes()])
        count = {"num_state_changes": len(states), "sample_id": index}
        if self.form == "text":
            words = ["".join(map(str, row)) for row in self._permutations[[*sample, states[-1]]].tolist()]
            yield {"prompt": " ".join([*words[:-1], "="]), "answer": words[-1], **count}
            return
        first = len(SPECIAL_TOKENS)
        yield {
            "input_ids": [BOS_ID, *(first + sample).tolist(), EOS_ID],
            "labels": [IGNORED, IGNORED, *(first + state for state in states)],
            "hops": [-1, -1, *range(1, len(states) + 1)],
            **count,
        }
