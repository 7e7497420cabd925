# SPDX-License-Identifier: Apache-2.0
"""Which of many Hermitian matrices are positive definite: Cholesky factorisations, spread over the cores.

LAPACK's own threads pay for large matrices only, and cost time for small ones; scipy's wrappers hold the interpreter's
lock. So the routine is called through its address, which scipy publishes for this, from a few threads at once.
"""

import ctypes
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

import torch
from scipy.linalg import cython_lapack
from threadpoolctl import ThreadpoolController
from torch import Tensor


# below this side torch's batched factorisation beats single calls
_BATCHED_SIDE = 24
# from this side on LAPACK's own threads pay, which below it lose more to torch's idling threads than they gain
_THREADED_SIDE = 3072


@cache
def _routine(name: str) -> Any:
    """potrf(uplo, n, a, lda, info) of LAPACK, callable without the interpreter's lock."""
    api = ctypes.pythonapi
    api.PyCapsule_GetName.restype, api.PyCapsule_GetName.argtypes = ctypes.c_char_p, [ctypes.py_object]
    api.PyCapsule_GetPointer.restype = ctypes.c_void_p
    api.PyCapsule_GetPointer.argtypes = [ctypes.py_object, ctypes.c_char_p]
    capsule = cython_lapack.__pyx_capi__[name]
    integer = ctypes.POINTER(ctypes.c_int)
    prototype = ctypes.CFUNCTYPE(None, ctypes.c_char_p, integer, ctypes.c_void_p, integer, integer)
    return prototype(api.PyCapsule_GetPointer(capsule, api.PyCapsule_GetName(capsule)))


@cache
def _libraries() -> ThreadpoolController:
    return ThreadpoolController()


def _factorise(matrices: Tensor) -> list[bool]:
    """Overwrite (N, c, c) by factors, one call each; True where the matrix is not positive definite."""
    routine = _routine("zpotrf" if matrices.is_complex() else "dpotrf")
    count, side = matrices.shape[:2]
    size, info = ctypes.c_int(side), ctypes.c_int(0)
    stride = side * side * matrices.element_size()
    failed = []
    for index in range(count):
        # LAPACK reads the transpose, which is as definite as the matrix: its upper triangle is our lower one
        routine(b"U", size, matrices.data_ptr() + index * stride, size, info)
        failed.append(info.value != 0)
    return failed


def not_positive_definite(matrices: Tensor) -> Tensor:
    """Mask (N,) of the Hermitian matrices whose Cholesky factorisation breaks down; the matrices are destroyed.

    Args:
        matrices: (N, c, c) float64 or complex128 on the cpu, contiguous; NaN counts as breaking down.
    """
    count, side = matrices.shape[:2]
    if side == 1:
        # not greater than: NaN fails
        return ~(matrices[:, 0, 0].real > 0)
    if side <= _BATCHED_SIDE:
        factors, info = torch.linalg.cholesky_ex(matrices)
        return (info != 0) | _last_pivot_fails(factors)
    if not matrices.is_contiguous():
        raise ValueError("matrices must be contiguous.")
    workers = min(torch.get_num_threads(), count)
    if side >= _THREADED_SIDE:
        failed = _factorise(matrices)
    elif workers == 1:
        with _libraries().limit(limits=1):
            failed = _factorise(matrices)
    else:
        with _libraries().limit(limits=1), ThreadPoolExecutor(workers) as pool:
            parts = pool.map(_factorise, matrices.tensor_split(workers))
            failed = [flag for part in parts for flag in part]
    return torch.tensor(failed, dtype=torch.bool, device="cpu") | _last_pivot_fails(matrices)


def _last_pivot_fails(factors: Tensor) -> Tensor:
    # some builds of LAPACK let NaN pass; it spreads to every later pivot
    return ~(factors[:, -1, -1].real > 0)
