"""Estimates: a measured value together with the interval that says how well it is known.

Every number that the book compares with a paper's number is an `Estimate`. Counts are exact; means over
seeds carry Student's t interval; medians, which timings use, carry an interval from order statistics that
assumes nothing about the shape of the distribution.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

__all__ = ["Estimate", "mean_interval", "median_interval", "paired_difference"]


@dataclass(frozen=True)
class Estimate:
    """A measured value with its interval.

    Args:
        value: The measured value; finite.
        low: Lower end of the interval, at most `value`.
        high: Upper end of the interval, at least `value`.
        n: Number of independent measurements behind the value; at least 1.
        level: Confidence level that the interval was built for, between 0 and 1 exclusive.
        method: How the interval was made: ``"exact"``, ``"single"`` (one measurement, so the interval says
            nothing), ``"t"``, ``"order statistic"``, or a sentence where neither fits.

    Raises:
        ValueError: If a number is not finite, the value lies outside its interval, or `n` or `level` is out
            of range.

    Example:
        >>> print(Estimate(1.234, 1.2, 1.26, n=5))
        1.234 [1.200, 1.260] (n=5)
        >>> print(Estimate.exact(22050664))
        22050664
    """

    value: float
    low: float
    high: float
    n: int
    level: float = 0.95
    method: str = ""

    def __post_init__(self) -> None:
        for name in ("value", "low", "high"):
            if not math.isfinite(getattr(self, name)):
                raise ValueError(f"{name} must be a finite number, got {getattr(self, name)}")
        if not self.low <= self.value <= self.high:
            raise ValueError(
                f"an interval must contain its value: expected low <= value <= high, "
                f"got {self.low} <= {self.value} <= {self.high}"
            )
        if self.n < 1:
            raise ValueError(f"n counts measurements and must be at least 1, got {self.n}")
        _check_level(self.level)

    @classmethod
    def exact(cls, value: float) -> Estimate:
        """A value that was counted or computed, not sampled: the interval is the value itself.

        Args:
            value: The value; finite.

        Returns:
            The estimate with ``low == high == value``, ``n=1`` and ``method="exact"``.
        """
        return cls(value, value, value, n=1, method="exact")

    def __str__(self) -> str:
        """The value with four significant digits, its interval to the same decimal place, and n."""
        if self.method == "exact" and float(self.value).is_integer():
            return f"{self.value:.0f}"
        largest = max(abs(self.value), abs(self.low), abs(self.high))
        magnitude = math.floor(math.log10(largest)) if largest > 0 else 0
        spec = f".{max(0, 3 - magnitude)}f" if magnitude >= -4 else ".3e"
        # "z" prints a small negative number that rounds to nothing as 0, not as -0.
        value, low, high = (format(number, "z" + spec) for number in (self.value, self.low, self.high))
        return value if self.method == "exact" else f"{value} [{low}, {high}] (n={self.n})"


def mean_interval(x: ArrayLike, level: float = 0.95) -> Estimate:
    r"""Mean of independent measurements with Student's t interval.

    The interval is $\bar x \pm t_{n-1}\, s / \sqrt n$, with the sample standard deviation $s$ ($n-1$ in the
    denominator). It holds exactly for normal data and approximately for others.

    Args:
        x: One measurement per seed, shape ``(n,)``, ``n >= 1``, finite.
        level: Confidence level, between 0 and 1 exclusive.

    Returns:
        The estimate, with ``method="t"``. One measurement alone has no spread: its interval is the value itself
        and its method is ``"single"``.

    Raises:
        ValueError: If `x` is empty, not one-dimensional or not finite, or `level` is out of range.

    Example:
        >>> print(mean_interval([96.0, 96.5, 97.0]))
        96.50 [95.26, 97.74] (n=3)
    """
    from scipy.stats import t

    sample = _sample(x, "x")
    _check_level(level)
    n = len(sample)
    mean = float(sample.mean())
    if n == 1:
        return Estimate(mean, mean, mean, n=1, level=level, method="single")
    half = float(t.ppf((1 + level) / 2, n - 1) * sample.std(ddof=1) / math.sqrt(n))
    return Estimate(mean, mean - half, mean + half, n=n, level=level, method="t")


def paired_difference(a: ArrayLike, b: ArrayLike, level: float = 0.95) -> Estimate:
    """Mean of the differences ``a - b`` of paired measurements, with Student's t interval over the pairs.

    Args:
        a: One measurement per seed, shape ``(n,)``.
        b: The other arm's measurements, shape ``(n,)``, in the same order of seeds. Pairs are made by
            position; two pandas Series with the same labels in a different order are refused.
        level: Confidence level, between 0 and 1 exclusive.

    Returns:
        The estimate of the mean difference; see `mean_interval`.

    Raises:
        ValueError: If the lengths or the order of labels differ, or an argument is invalid in the sense of
            `mean_interval`.

    Example:
        >>> print(paired_difference([3.0, 5.0, 7.0], [1.0, 3.0, 5.0]))
        2.000 [2.000, 2.000] (n=3)
    """
    first, second = _sample(a, "a"), _sample(b, "b")
    if len(first) != len(second):
        raise ValueError(
            f"paired measurements need one value of each arm per seed: got {len(first)} values in a and "
            f"{len(second)} in b; a diverged run must be given a value, not left out"
        )
    labels_a, labels_b = _labels(a), _labels(b)
    if labels_a and labels_b and labels_a != labels_b and set(labels_a) == set(labels_b):
        raise ValueError(
            f"a and b carry the same labels in a different order: {labels_a} and {labels_b}; "
            "sort both by seed, pairs are made by position"
        )
    return mean_interval(first - second, level)


def median_interval(x: ArrayLike, level: float = 0.95) -> Estimate:
    r"""Median with a distribution-free interval between two order statistics.

    With $x_{(1)} \le \dots \le x_{(n)}$, the interval $[x_{(k)}, x_{(n+1-k)}]$ misses the median with probability
    $2\,P(\mathrm{Bin}(n, 1/2) < k)$ for a continuous distribution, and with no more for any other. The
    largest $k$ that keeps the level is taken, so the coverage is at least `level`.

    Args:
        x: Independent measurements, shape ``(n,)``, ``n >= 1``, finite.
        level: Confidence level, between 0 and 1 exclusive.

    Returns:
        The estimate, with ``method="order statistic"``. When even the smallest and the largest measurement
        do not reach the level (``n < 6`` for 0.95), they are the interval nonetheless and `method` states the
        coverage that they do reach. One measurement alone has the method ``"single"``.

    Raises:
        ValueError: If `x` is empty, not one-dimensional or not finite, or `level` is out of range.

    Example:
        >>> median_interval([1.0, 2.0, 3.0]).method
        'minimum to maximum, which covers 75.0 % only'
    """
    from scipy.stats import binom

    sample = np.sort(_sample(x, "x"))
    _check_level(level)
    n = len(sample)
    median = float(np.median(sample))
    if n == 1:
        return Estimate(median, median, median, n=1, level=level, method="single")
    misses = 2 * binom.cdf(np.arange(n // 2), n, 0.5)  # of the interval from the k-th smallest, k = 1, 2, ...
    k = int((misses <= 1 - level).sum())
    method = "order statistic"
    if k == 0:
        k, method = 1, f"minimum to maximum, which covers {100 * (1 - misses[0]):.1f} % only"
    return Estimate(median, float(sample[k - 1]), float(sample[n - k]), n=n, level=level, method=method)


def _check_level(level: float) -> None:
    if not 0 < level < 1:
        raise ValueError(f"level must lie between 0 and 1, such as 0.95, got {level}")


def _sample(x: ArrayLike, name: str) -> NDArray[np.float64]:
    sample = np.asarray(x, dtype=np.float64)
    if sample.ndim != 1 or sample.size == 0:
        raise ValueError(f"{name} must be a list of at least one measurement, got shape {sample.shape}")
    if not np.isfinite(sample).all():
        raise ValueError(
            f"{name} must be finite, got {sample.tolist()}; a diverged run counts as a miss: give it the "
            "worst value of the metric"
        )
    return sample


def _labels(x: object) -> list[object]:
    """The labels of a pandas Series, without importing pandas; empty for anything else."""
    index = getattr(x, "index", None)
    return list(index) if index is not None and not callable(index) else []
