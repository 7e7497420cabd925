# SPDX-License-Identifier: Apache-2.0
"""Chains of state changes: the task whose number of hops is set exactly (ChaCAL spec 3, its replacement).

A statement gives a new variable the value of an earlier variable ("v3 > v7") or a literal value ("5 > v3"); every
variable is written once. The value of a variable is found by walking back from statement to statement: as many hops as
state changes. By Theorem 1 of the paper softmax attention needs ceil(log2(hops + 1)) layers for the walk.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from hf_lip.data.generation import check_integer, check_range
from hf_lip.data.tracking_tokenizer import BOS_ID, EOS_ID, IGNORED, SPECIAL_TOKENS


if TYPE_CHECKING:
    import datasets


__all__ = ["ChainsTask", "RandomChainsTask", "Statements", "embed_statements"]

_NONE = -1


@dataclass(frozen=True)
class Statements:
    """n statements: int arrays (n,); -1 is none. `written`, `read` are variables, `literal` and `value` are values."""

    written: NDArray[np.int64]
    read: NDArray[np.int64]
    literal: NDArray[np.int64]
    value: NDArray[np.int64]
    hops: NDArray[np.int64]


def embed_statements(embedding: nn.Embedding, statement_ids: Tensor) -> Tensor:
    """The sum of the embeddings of a statement's three words: (B, n, 3) ids -> (B, n, d), for `inputs_embeds`.

    With `model.get_input_embeddings()` the three tables of the task are rows of the model's own, and saved with it.

    Raises:
        ValueError: `statement_ids` is not (B, n, 3).
    """
    if statement_ids.dim() != 3 or statement_ids.shape[-1] != 3:
        raise ValueError(f"`statement_ids` must have shape (B, n, 3), got {tuple(statement_ids.shape)}.")
    return embedding(statement_ids).sum(dim=-2)


@dataclass(frozen=True, kw_only=True)
class _Chains(ABC):
    """Rows and words that both chain tasks share. Either form is a row a sample, with the columns

    - `form="dense"`: one token a statement and an answer at every statement.
      `statement_ids` (n + 2, 3) int32: the words (written, read or none, literal or none) of `<bos>`, the n statements
      and `<eos>`, for `embed_statements`; `labels` (n + 2,): the value held after each statement as a token id, at the
      place where a causal language model looks for what it predicts there (statement i, counted from 0, is token i + 1
      and its label is entry i + 2, as the model shifts labels by one), -100 elsewhere; `hops` (n + 2,) of each label,
      -1 elsewhere.
    - `form="text"`: `prompt` "5 > v3 ; v3 > v7 ; v7 ?" and `answer` "5", for `encode_answers`.

    and in both `num_state_changes` (hops of the question; of the deepest statement in dense form), `num_entities`
    (chains, which is literals) and `sample_id`.
    """

    num_values: int = 10
    num_variables: int | None = None
    form: Literal["dense", "text"] = "dense"

    def __post_init__(self) -> None:
        check_integer("num_values", self.num_values, 2)
        if self.form not in ("dense", "text"):
            raise ValueError(f"`form` must be 'dense' or 'text', got {self.form!r}.")
        if self.num_variables is not None:
            check_integer("num_variables", self.num_variables, self._most_statements())

    @abstractmethod
    def _most_statements(self) -> int:
        """Statements of the longest sample, each with a variable of its own."""

    def _variables(self) -> int:
        return self._most_statements() if self.num_variables is None else self.num_variables

    def vocabulary(self) -> list[str]:
        """The words; in dense form w7 is variable 7 as written, r7 as read."""
        values = [str(value) for value in range(self.num_values)]
        names = range(self._variables())
        if self.form == "text":
            return [*values, ">", ";", "?", *(f"v{name}" for name in names)]
        return [*values, "none", *(f"w{name}" for name in names), *(f"r{name}" for name in names)]

    def features(self) -> "datasets.Features":
        import datasets

        number = datasets.Value("int32")
        columns: dict[str, Any] = {"prompt": datasets.Value("string"), "answer": datasets.Value("string")}
        if self.form == "dense":
            columns = {"statement_ids": datasets.List(datasets.List(number, length=3))}
            columns |= {"labels": datasets.List(number), "hops": datasets.List(number)}
        return datasets.Features(
            {**columns, "num_state_changes": number, "num_entities": number, "sample_id": datasets.Value("int64")}
        )

    def sample(self, rng: np.random.Generator, accept: Callable[[bytes], bool]) -> Statements | None:
        """The key is the statements, in order."""
        sample = self._draw(rng)
        key = np.stack([sample.written, sample.read, sample.literal]).astype("<i4").tobytes()
        return sample if accept(key) else None

    def rows(self, sample: Statements, index: int, rng: np.random.Generator) -> Iterator[dict[str, Any]]:
        row = {"num_entities": int(np.sum(sample.literal != _NONE)), "sample_id": index}
        if self.form == "text":
            asked = self._question(sample, rng)
            prompt = f"{_text(sample)} ; v{sample.written[asked]} ?"
            answer = str(sample.value[asked])
            yield {"prompt": prompt, "answer": answer, "num_state_changes": int(sample.hops[asked]), **row}
            return
        first = len(SPECIAL_TOKENS)
        none = first + self.num_values
        written = none + 1 + sample.written
        read = np.where(sample.read == _NONE, none, none + 1 + self._variables() + sample.read)
        literal = np.where(sample.literal == _NONE, none, first + sample.literal)
        ids = np.stack([written, read, literal], axis=1).tolist()
        yield {
            "statement_ids": [[BOS_ID, none, none], *ids, [EOS_ID, none, none]],
            "labels": [IGNORED, IGNORED, *(first + sample.value).tolist()],
            "hops": [-1, -1, *sample.hops.tolist()],
            "num_state_changes": int(sample.hops.max()),
            **row,
        }

    @abstractmethod
    def _draw(self, rng: np.random.Generator) -> Statements:
        """One sample."""

    @abstractmethod
    def _question(self, sample: Statements, rng: np.random.Generator) -> int:
        """The statement that a text asks for."""


@dataclass(frozen=True, kw_only=True)
class ChainsTask(_Chains):
    """Several entities, each with exactly `num_state_changes` changes: first the initial values, then the changes of
    all entities, in a random order that keeps each entity's own. Variables are drawn from all names without order.

    What can be guessed without following a chain is one of the initial values: right at a rate of 1/num_entities at
    every depth, as the values are distinct where there are enough of them.

    Args:
        num_entities: chains.
        num_state_changes: changes of every entity, or an inclusive range of which each sample draws one uniformly.
        num_values: literal values, the classes of the answer.
        num_variables: names in the vocabulary, by default as many as the longest sample needs. Give more where a
            longer task is to be tested with the same model: it needs names that were trained.
        form: `dense` or `text`; the text asks for the last state of one entity.

    Raises:
        ValueError: a number out of range, or fewer variables than statements.
    """

    num_entities: int = 4
    num_state_changes: int | tuple[int, int] = (1, 63)

    def __post_init__(self) -> None:
        check_integer("num_entities", self.num_entities, 2)
        check_range("num_state_changes", self.num_state_changes, 0)
        super().__post_init__()

    def _most_statements(self) -> int:
        return self.num_entities * (1 + check_range("num_state_changes", self.num_state_changes, 0)[1])

    def _draw(self, rng: np.random.Generator) -> Statements:
        low, high = check_range("num_state_changes", self.num_state_changes, 0)
        changes, entities = int(rng.integers(low, high + 1)), self.num_entities
        names = rng.permutation(self._variables())[: entities * (changes + 1)].reshape(entities, changes + 1)
        enough = entities <= self.num_values
        initial = (
            rng.permutation(self.num_values)[:entities] if enough else rng.integers(self.num_values, size=entities)
        )
        order = rng.permutation(np.repeat(np.arange(entities), changes))
        # how many changes of the same entity came before, itself included
        hops = np.zeros_like(order)
        for entity in range(entities):
            hops[order == entity] = np.arange(1, changes + 1)
        none = np.full(entities, _NONE)
        return Statements(
            written=np.concatenate([names[:, 0], names[order, hops]]),
            read=np.concatenate([none, names[order, hops - 1]]),
            literal=np.concatenate([initial, np.full(len(order), _NONE)]),
            value=np.concatenate([initial, initial[order]]),
            hops=np.concatenate([np.zeros(entities, dtype=np.int64), hops]),
        )

    def _question(self, sample: Statements, rng: np.random.Generator) -> int:
        return int(rng.choice(np.flatnonzero(sample.hops == sample.hops.max())))


@dataclass(frozen=True, kw_only=True)
class RandomChainsTask(_Chains):
    """The random graph of section 3: a statement is a literal with probability 0.1 (the first one always), else it
    copies the previous statement's variable with probability 0.75, or a uniformly drawn earlier one.

    Neighbouring chains share recent roots, so guessing is far easier than in `ChainsTask`: the value of the last
    literal is right at 0.82 of all statements, and at 0.73 of those eight hops or more away from theirs.

    Args:
        num_statements: statements of a sample.
        literal_probability: of a new chain.
        previous_probability: of copying the previous statement, where it copies.
        num_values, num_variables, form: as in `ChainsTask`; the text asks for a uniformly drawn statement.

    Raises:
        ValueError: a number out of range, or fewer variables than statements.
    """

    num_statements: int = 20
    literal_probability: float = 0.1
    previous_probability: float = 0.75

    def __post_init__(self) -> None:
        check_integer("num_statements", self.num_statements, 1)
        for name in ("literal_probability", "previous_probability"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ValueError(f"`{name}` must be in [0, 1], got {getattr(self, name)}.")
        super().__post_init__()

    def _most_statements(self) -> int:
        return self.num_statements

    def _draw(self, rng: np.random.Generator) -> Statements:
        length = self.num_statements
        written = rng.permutation(self._variables())[:length]
        literals = rng.integers(self.num_values, size=length)
        is_literal = rng.random(length) < self.literal_probability
        is_literal[0] = True
        previous = np.arange(length) - 1
        # statement 0 is a literal: its source is not used
        earlier = rng.integers(0, np.maximum(np.arange(length), 1))
        source = np.where(rng.random(length) < self.previous_probability, previous, earlier)
        value, hops = literals.copy(), np.zeros(length, dtype=np.int64)
        for index in np.flatnonzero(~is_literal):
            value[index], hops[index] = value[source[index]], hops[source[index]] + 1
        return Statements(
            written=written,
            read=np.where(is_literal, _NONE, written[source]),
            literal=np.where(is_literal, literals, _NONE),
            value=value,
            hops=hops,
        )

    def _question(self, sample: Statements, rng: np.random.Generator) -> int:
        return int(rng.integers(len(sample.written)))


def _text(sample: Statements) -> str:
    sources = [
        f"v{read}" if literal == _NONE else str(literal)
        for read, literal in zip(sample.read, sample.literal, strict=True)
    ]
    return " ; ".join(f"{source} > v{written}" for source, written in zip(sources, sample.written, strict=True))
