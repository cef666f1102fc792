r"""Ranks of a decomposition, before anything is decomposed.

A matrix with :math:`C` inputs and :math:`S` outputs becomes two factors of rank :math:`R` with :math:`R(C+S)` weights
in place of :math:`CS`. A convolution with :math:`k` kernel positions (9 for a 3x3 kernel) becomes three with
:math:`C r_1 + k\,r_1 r_2 + r_2 S` weights in place of :math:`k\,CS` (Tucker-2). A compression :math:`\alpha` asks
for at most :math:`1/\alpha` of the weights. Hajimolahoseini and others (arXiv 2407.20266) solve that for the rank:

.. math::

    R = \Big\lfloor \frac{CS}{\alpha(C+S)} \Big\rfloor, \qquad
    r_1 = \Big\lfloor \tfrac12 \Big( -\frac{C+\beta S}{\beta k}
          + \sqrt{\frac{(C+\beta S)^2}{\beta^2 k^2} + \frac{4CS}{\beta\alpha}} \Big) \Big\rfloor
    \ \text{ with } r_2 = \beta r_1 .
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

__all__ = ["energy_rank", "pair_size", "svd_rank", "triple_size", "tucker_ranks"]


def _check_shape(inputs: int, outputs: int, positions: int = 1) -> None:
    for name, value in (("inputs", inputs), ("outputs", outputs), ("positions", positions)):
        if value < 1:
            raise ValueError(f"{name}={value}: expected 1 or more")


def _check_compression(compression: float) -> None:
    if not (math.isfinite(compression) and compression > 0):
        raise ValueError(f"compression={compression}: expected a finite number above 0, such as 2 for half the weights")


def pair_size(inputs: int, outputs: int, rank: int) -> int:
    """Weights of the two factors of a matrix.

    Args:
        inputs: Inputs of the layer, C.
        outputs: Outputs of the layer, S.
        rank: Rank of the factors.

    Returns:
        R (C + S).
    """
    return rank * (inputs + outputs)


def triple_size(inputs: int, outputs: int, positions: int, ranks: tuple[int, int]) -> int:
    """Weights of the three factors of a convolution.

    Args:
        inputs: Input channels, C.
        outputs: Output channels, S.
        positions: Kernel positions, 9 for a 3x3 kernel.
        ranks: Channels into and out of the core.

    Returns:
        C r1 + k r1 r2 + r2 S.
    """
    first, second = ranks
    return inputs * first + positions * first * second + second * outputs


def svd_rank(inputs: int, outputs: int, compression: float) -> int:
    """The largest rank whose two factors have at most 1/compression of the weights.

    Args:
        inputs: Inputs of the layer, C; at least 1.
        outputs: Outputs of the layer, S; at least 1.
        compression: Above 0; 2 asks for half the weights.

    Returns:
        A rank of at most min(C, S); 0 if even rank 1 has too many weights.

    Raises:
        ValueError: If a size or the compression is out of range.
    """
    _check_shape(inputs, outputs)
    _check_compression(compression)
    rank = int(inputs * outputs / (compression * (inputs + outputs)))
    return min(rank, inputs, outputs)


def tucker_ranks(inputs: int, outputs: int, positions: int, compression: float, ratio: float = 1.0) -> tuple[int, int]:
    """The largest ranks whose three factors have at most 1/compression of the weights.

    Args:
        inputs: Input channels, C; at least 1.
        outputs: Output channels, S; at least 1.
        positions: Kernel positions, 9 for a 3x3 kernel; at least 1.
        compression: Above 0; 2 asks for half the weights.
        ratio: The second rank over the first, beta; above 0.

    Returns:
        Both ranks, at most C and S, rounded down; 0 if even rank 1 has too many weights.

    Raises:
        ValueError: If a size, the compression or the ratio is out of range.
    """
    _check_shape(inputs, outputs, positions)
    _check_compression(compression)
    if not (math.isfinite(ratio) and ratio > 0):
        raise ValueError(f"ratio={ratio}: expected a finite number above 0")
    linear = (inputs + ratio * outputs) / (ratio * positions)
    root = 0.5 * (-linear + math.sqrt(linear**2 + 4 * inputs * outputs / (ratio * compression)))
    # A root that is a whole number may come out a hair below it.
    first = int(root + 1e-9 * max(root, 1.0))
    return min(first, inputs), min(int(ratio * first), outputs)


def energy_rank(singular_values: Sequence[float], energy: float) -> int:
    """The smallest rank that keeps a share of the energy, the sum of squared singular values.

    Args:
        singular_values: In falling order, none below 0.
        energy: Share to keep, above 0 and at most 1.

    Returns:
        A rank of at least 1.

    Raises:
        ValueError: If there are no values, they do not fall, or the share is out of range.
    """
    values = [float(value) for value in singular_values]
    if not values or values[-1] < 0 or any(a < b for a, b in pairwise(values)):
        raise ValueError("singular_values: expected at least one, in falling order, none below 0")
    if not 0 < energy <= 1:
        raise ValueError(f"energy={energy}: expected a share above 0 and at most 1")
    total = math.fsum(value**2 for value in values)
    kept = 0.0
    for rank, value in enumerate(values, start=1):
        kept += value**2
        if kept >= energy * total:
            return rank
    return len(values)
