"""Paired timing: arms run in turn on the same machine, compared repeat by repeat.

Two absolute times from different moments compare the machine with itself as much as they compare the arms.
Here every repeat runs all arms one after the other, so that a slow moment wrongs them alike, and the ratio
is taken inside each repeat. The median over repeats ignores the occasional hiccup.
"""

from __future__ import annotations

import gc
import math
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import pandas as pd

from leantrain.measure.statistics import Estimate, median_interval

__all__ = ["PairedTiming", "paired_timing"]

MIN_REPEATS = 3


@dataclass(frozen=True, eq=False)
class PairedTiming:
    """Times of several arms, measured in turn.

    Args:
        seconds: One column per arm, one row per repeat; seconds of wall time, above 0.
        order: For every repeat, the arms in the order in which they ran.

    Raises:
        ValueError: If a time is not a finite number above 0.
    """

    seconds: pd.DataFrame
    order: tuple[tuple[str, ...], ...] = ()

    def __post_init__(self) -> None:
        for arm in self.seconds.columns:
            for repeat, time_taken in enumerate(self.seconds[arm]):
                if not (math.isfinite(time_taken) and time_taken > 0):
                    raise ValueError(
                        f"arm {arm!r} took {time_taken} s in repeat {repeat}: a time must be above 0; "
                        "give the arm more work per call"
                    )

    def median(self, arm: str) -> float:
        """Median time of an arm.

        Args:
            arm: Name of the arm.

        Returns:
            Seconds per call.

        Raises:
            ValueError: If there is no such arm.
        """
        return float(self.seconds[self._known(arm)].median())

    def ratio(self, arm: str, baseline: str, level: float = 0.95) -> Estimate:
        """How long an arm takes relative to the baseline: below 1, it is faster.

        Args:
            arm: Name of the arm.
            baseline: Name of the arm that it is compared with.
            level: Confidence level of the interval.

        Returns:
            Median of ``seconds[arm] / seconds[baseline]`` over the repeats, with the interval of
            `leantrain.measure.statistics.median_interval`.

        Raises:
            ValueError: If there is no such arm or `level` is out of range.
        """
        ratios = self.seconds[self._known(arm)] / self.seconds[self._known(baseline)]
        return median_interval(ratios, level)

    def table(self, baseline: str) -> pd.DataFrame:
        """All arms against the baseline, with the times beside every ratio.

        Args:
            baseline: Name of the arm that the others are compared with.

        Returns:
            One row per arm, with the columns ``arm``, ``median_s`` (seconds per call), ``ratio`` (to the baseline),
            ``low`` and ``high`` (its interval) and ``n`` (repeats).

        Raises:
            ValueError: If there is no such arm.
        """
        rows = []
        for arm in self.seconds.columns:
            ratio = self.ratio(arm, baseline)
            rows.append(
                {
                    "arm": arm,
                    "median_s": self.median(arm),
                    "ratio": ratio.value,
                    "low": ratio.low,
                    "high": ratio.high,
                    "n": ratio.n,
                }
            )
        return pd.DataFrame(rows)

    def _known(self, arm: str) -> str:
        if arm not in self.seconds.columns:
            raise ValueError(f"there is no arm {arm!r}; the arms are {', '.join(map(repr, self.seconds.columns))}")
        return arm


def paired_timing(
    arms: Mapping[str, Callable[[], object]],
    repeats: int = 15,
    warmup: int = 2,
    *,
    clock: Callable[[], float] = time.perf_counter,
) -> PairedTiming:
    """Time several functions in turn: A B C, then B C A, then C A B, and so on.

    The garbage collector is off while the arms run, and afterwards as it was before. If CUDA is in use, all
    queued work is waited for before the clock is read.

    Args:
        arms: Name to function; each function does one unit of work and takes no argument. A single arm is
            allowed: it has times, and the ratio 1 to itself.
        repeats: How often every arm is timed, at least 3. From 6 on, a 95 % interval of the ratio exists.
        warmup: How often every arm runs before the first timed repeat, at least 0.
        clock: Returns the time in seconds; never goes backwards.

    Returns:
        The times and the order in which they were taken.

    Raises:
        ValueError: If there is no arm, or `repeats` or `warmup` is too small, or an arm takes no time at all.

    Example:
        >>> timing = paired_timing({"short": lambda: sum(range(10_000)), "long": lambda: sum(range(40_000))})
        >>> timing.ratio("long", "short").low > 1
        True
    """
    if not arms:
        raise ValueError("arms is empty: give at least one function to time, as {name: function}")
    if repeats < MIN_REPEATS:
        raise ValueError(f"repeats must be at least {MIN_REPEATS} for a median to mean anything, got {repeats}")
    if warmup < 0:
        raise ValueError(f"warmup must be 0 or more, got {warmup}")
    names = list(arms)
    for _ in range(warmup):
        for name in names:
            arms[name]()
    order = tuple(tuple(names[r % len(names) :] + names[: r % len(names)]) for r in range(repeats))
    rows = []
    was_enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        for turn in order:
            row = {}
            for name in turn:
                _finish_queued_work()
                start = clock()
                arms[name]()
                _finish_queued_work()
                row[name] = clock() - start
            rows.append(row)
    finally:
        if was_enabled:
            gc.enable()
    return PairedTiming(pd.DataFrame(rows, columns=names), order)


def _finish_queued_work() -> None:
    """Wait for the GPU; without importing torch, since who has not imported it has queued nothing."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        torch.cuda.synchronize()
