"""What compiled kernels share: how they are compiled, and how many threads they use."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import numba

__all__ = ["compiled", "thread_count"]


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile with Numba, and keep the machine code on disk where a folder for it can be written."""
    try:
        return numba.njit(nogil=True, cache=True)(function)
    except RuntimeError:  # no folder for the cache, as in a read-only installation
        return numba.njit(nogil=True)(function)


def thread_count() -> int:
    """Processors at hand, at most `OMP_NUM_THREADS`.

    Numba's own count is not asked for: that starts Numba's thread pool and changes the number of OpenMP threads that
    PyTorch works with in the same process.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    allowed = os.environ.get("OMP_NUM_THREADS", "")
    return min(cores, int(allowed)) if allowed.isdigit() and int(allowed) else cores
