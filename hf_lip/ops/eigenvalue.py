# SPDX-License-Identifier: Apache-2.0
"""Proved intervals of the largest eigenvalue of many positive semi-definite matrices at once.

Lower end: a Rayleigh quotient, found by Lanczos steps. Upper end: the lower end times 1 + tolerance, if a Cholesky
factorisation of upper * I - A runs to completion; by Rump ("Verification of positive definiteness", BIT 2006; error
bound of Demmel 1989, Higham 2002 theorem 10.3) this proves

    largest eigenvalue of A <= upper + gamma / (1 - gamma) * trace(upper * I - A).

One factorisation costs a fraction of one matrix product, which makes this several times cheaper than eigenvalue
routines, power iterations or Gram iterations, and unlike them it is a proof.
"""

import torch
from torch import Tensor

from .cholesky import not_positive_definite
from .rounding import UNIT_ROUNDOFF, gamma


# the least shift that is tried: positive, and negligible for matrices scaled to about 1
_FLOOR = 2.0**-600
# matrices a round that Lanczos steps are spent on, for each maximum that is sought
_CANDIDATES = 8
_FIRST_STEPS, _MOST_STEPS = 12, 96


def _lanczos(matrices: Tensor, num_steps: int) -> Tensor:
    """Approximate top eigenvectors (N, c) of (N, c, c), from one start vector for all."""
    count, side = matrices.shape[:2]
    generator = torch.Generator(device="cpu").manual_seed(0)
    start = torch.randn(side, generator=generator, dtype=torch.float64, device="cpu").to(matrices.dtype)
    vector = (start / torch.linalg.vector_norm(start)).expand(count, side)
    basis, diagonal, beside = [], [], []
    for _ in range(min(num_steps, side)):
        basis.append(vector)
        image = torch.einsum("nij,nj->ni", matrices, vector)
        diagonal.append((vector.conj() * image).sum(dim=-1).real)
        rows = torch.stack(basis, dim=1)
        for _ in range(2):
            image = image - torch.einsum("nk,nkj->nj", torch.einsum("nkj,nj->nk", rows.conj(), image), rows)
        length = torch.linalg.vector_norm(image, dim=-1)
        beside.append(length)
        vector = image / length.clamp_min(1e-300)[:, None]
    projected = torch.diag_embed(torch.stack(diagonal, dim=1))
    if len(basis) > 1:
        off = torch.diag_embed(torch.stack(beside[:-1], dim=1), 1)
        projected = projected + off + off.mT
    top = torch.linalg.eigh(projected).eigenvectors[..., -1]
    return torch.einsum("nk,nkj->nj", top.to(rows.dtype), rows)


def top_eigenvectors(matrices: Tensor, num_steps: int) -> Tensor:
    """Unit vectors (N, c) near the top eigenvectors of the Hermitian (N, c, c), by an eigensolver for c <= steps."""
    if matrices.shape[-1] <= num_steps:
        return torch.linalg.eigh(matrices).eigenvectors[..., -1]
    return _lanczos(matrices, num_steps)


def rayleigh_lower_bounds(matrices: Tensor, vectors: Tensor) -> Tensor:
    """Proved lower bounds (N,) of the largest eigenvalues: Rayleigh quotients minus their rounding errors."""
    side = matrices.shape[-1]
    image = torch.einsum("nij,nj->ni", matrices, vectors)
    squares = vectors.abs().square().sum(dim=-1)
    quotient = (vectors.conj() * image).sum(dim=-1).real / squares
    # |v|^T |A| |v| <= |A|_F |v|^2
    slack = gamma(8 * (side + 8)) * torch.linalg.matrix_norm(matrices)
    # beyond these, or NaN, squares may have lost their digits
    usable = (squares > 2.0**-300) & (squares < 2.0**300)
    return torch.where(usable, quotient - slack, torch.zeros_like(quotient)).clamp_min(0.0)


class EigenvalueIntervals:
    """The largest eigenvalue of each of several sets of matrices ("stacks": layers, say), as proved intervals.

    Args:
        num_stacks: number of maxima sought.
        tolerance: aimed relative width of the intervals.
    """

    def __init__(self, num_stacks: int, tolerance: float) -> None:
        self.tolerance = tolerance
        self.lower = torch.zeros(num_stacks, dtype=torch.float64, device="cpu")
        self.shift = torch.full((num_stacks,), _FLOOR, dtype=torch.float64, device="cpu")
        # index and vector of the matrix, among those of the last `include`, that raised the first stack's lower end
        self.witness: tuple[int, Tensor] | None = None
        self._side = 1
        self._complex = False

    def raise_lower(self, bounds: Tensor, owner: Tensor) -> None:
        """Take note of proved lower bounds (N,) of eigenvalues that belong to the stacks `owner` (N,)."""
        self.lower.scatter_reduce_(0, owner, bounds, "amax")
        self.shift = torch.maximum(self.shift, self.lower * (1 + self.tolerance))

    def include(self, matrices: Tensor, owner: Tensor) -> None:
        """Make the intervals hold for the Hermitian `matrices` (N, c, c), float64 or complex128, too.

        Only those whose factorisation fails are looked at more closely; each round raises the upper end of a stack.
        """
        side = matrices.shape[-1]
        self.witness = None
        if side == 1:
            # its own eigenvalue
            self.raise_lower(matrices[:, 0, 0].real.clamp_min(0.0), owner)
        pending = self.fails(matrices, self.shift[owner])
        # one of a few matrices is soon the one that counts
        steps = _FIRST_STEPS if len(matrices) > _CANDIDATES else 3 * _FIRST_STEPS
        widening = max(self.tolerance, 1e-12)
        while pending.numel():
            chosen = torch.cat([self._spread(pending[owner[pending] == stack]) for stack in owner[pending].unique()])
            vectors = top_eigenvectors(matrices[chosen], steps if steps < min(side, _MOST_STEPS) else side)
            before = self.shift.clone()
            bounds = rayleigh_lower_bounds(matrices[chosen], vectors)
            best = int(torch.where(owner[chosen] == 0, bounds, -1.0).argmax())
            if bounds[best] > self.lower[0]:
                self.witness = int(chosen[best]), vectors[best]
            self.raise_lower(bounds, owner[chosen])
            stuck = self.shift[owner[chosen]] <= before[owner[chosen]]
            if stuck.any():
                if steps >= min(side, _MOST_STEPS):
                    # the eigenvalue is reached and rounding still breaks the factorisation: widen the interval
                    widened = owner[chosen[stuck]].unique()
                    self.shift[widened] *= 1 + widening
                    widening *= 2
                steps *= 2
            pending = pending[self.fails(matrices[pending], self.shift[owner[pending]])]

    def fails(self, matrices: Tensor, shifts: Tensor) -> Tensor:
        """Indices of the matrices (N, c, c) for which shift * I - A fails a Cholesky factorisation."""
        # the proof of those that pass needs the largest side
        self._side, self._complex = max(matrices.shape[-1], self._side), self._complex or matrices.is_complex()
        shifted = -matrices
        shifted.diagonal(dim1=-2, dim2=-1).add_(shifts[:, None])
        return not_positive_definite(shifted).nonzero()[:, 0]

    @staticmethod
    def _spread(indices: Tensor) -> Tensor:
        if indices.numel() <= _CANDIDATES:
            return indices
        return indices[torch.arange(_CANDIDATES, device="cpu") * (indices.numel() - 1) // (_CANDIDATES - 1)]

    def proved_upper(self) -> Tensor:
        """Upper bounds (num_stacks,) of the largest eigenvalues of all matrices included."""
        return self.shift * (1 + shift_error(self._side, self._complex))


def shift_error(side: int, complex_entries: bool) -> float:
    """Relative amount by which a completed factorisation may overstate its shift."""
    return 2 * gamma((4 if complex_entries else 2) * (side + 2)) * side + 8 * UNIT_ROUNDOFF
