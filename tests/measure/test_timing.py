"""Paired timing with a clock of our own: exact ratios, order of the arms, clean-up, bad input."""

import gc
import math

import pandas as pd
import pytest

from leantrain.measure.timing import PairedTiming, paired_timing


class Machine:
    """A machine whose clock moves only while an arm works, at a speed that changes from repeat to repeat."""

    def __init__(self, slowness=(1.0,)):
        self.now, self.slowness, self.calls = 0.0, slowness, []

    def clock(self):
        return self.now

    def arm(self, name, seconds):
        def work():
            self.now += seconds * self.slowness[self.calls.count(name) % len(self.slowness)]
            self.calls.append(name)

        return work


def test_the_ratio_is_exact_although_the_machine_changes_its_speed():
    # Powers of two keep the sums of the clock free of rounding.
    machine = Machine(slowness=(1.0, 4.0, 0.5, 16.0, 1.0, 2.0, 8.0))
    arms = {"dense": machine.arm("dense", 1.0), "lean": machine.arm("lean", 0.75)}
    timing = paired_timing(arms, repeats=7, warmup=0, clock=machine.clock)
    ratio = timing.ratio("lean", "dense")
    assert (ratio.low, ratio.value, ratio.high, ratio.n) == (0.75, 0.75, 0.75, 7)
    assert timing.median("dense") == 2.0
    assert timing.median("lean") == 1.5
    assert list(timing.seconds["lean"]) == [0.75 * s for s in machine.slowness]


def test_the_ratio_is_the_median_of_ratios_and_not_the_ratio_of_medians():
    timing = PairedTiming(pd.DataFrame({"a": [1.0, 2.0, 9.0], "b": [1.0, 4.0, 3.0]}))
    assert timing.ratio("a", "b").value == 1.0  # of 1, 0.5 and 3; the medians' ratio would be 2 / 3


def test_the_arms_take_turns_and_every_arm_goes_first():
    machine = Machine()
    arms = {name: machine.arm(name, 1.0) for name in "ABC"}
    timing = paired_timing(arms, repeats=4, warmup=2, clock=machine.clock)
    assert timing.order == (("A", "B", "C"), ("B", "C", "A"), ("C", "A", "B"), ("A", "B", "C"))
    assert "".join(machine.calls) == "ABCABC" + "".join("".join(turn) for turn in timing.order)
    assert list(timing.seconds.columns) == ["A", "B", "C"]


def test_the_warm_up_is_not_timed():
    machine = Machine(slowness=(100.0, 100.0, 1.0, 1.0, 1.0))
    timing = paired_timing({"A": machine.arm("A", 1.0)}, repeats=3, warmup=2, clock=machine.clock)
    assert list(timing.seconds["A"]) == [1.0, 1.0, 1.0]


def test_the_table_carries_both_times_beside_every_ratio():
    machine = Machine()
    arms = {"dense": machine.arm("dense", 2.0), "lean": machine.arm("lean", 0.5)}
    table = paired_timing(arms, repeats=6, warmup=0, clock=machine.clock).table("dense")
    assert table.to_dict("records") == [
        {"arm": "dense", "median_s": 2.0, "ratio": 1.0, "low": 1.0, "high": 1.0, "n": 6},
        {"arm": "lean", "median_s": 0.5, "ratio": 0.25, "low": 0.25, "high": 0.25, "n": 6},
    ]


@pytest.mark.parametrize("enabled", [True, False])
@pytest.mark.parametrize("fails", [True, False])
def test_garbage_collection_is_off_inside_and_afterwards_as_it_was(enabled, fails):
    machine = Machine()
    seen = []

    def arm():
        seen.append(gc.isenabled())
        machine.now += 1.0
        if fails and len(seen) == 2:
            raise RuntimeError("out of luck")

    before = gc.isenabled()
    try:
        (gc.enable if enabled else gc.disable)()
        if fails:
            with pytest.raises(RuntimeError, match="out of luck"):
                paired_timing({"A": arm}, repeats=3, warmup=0, clock=machine.clock)
        else:
            paired_timing({"A": arm}, repeats=3, warmup=0, clock=machine.clock)
        assert gc.isenabled() == enabled
    finally:
        (gc.enable if before else gc.disable)()
    assert not any(seen)


@pytest.mark.parametrize(
    ("arms", "options", "message"),
    [
        ({}, {}, "arms is empty"),
        ({"A": int}, {"repeats": 2}, "repeats must be at least 3"),
        ({"A": int}, {"warmup": -1}, "warmup"),
        ({"A": int}, {"clock": lambda: 0.0}, "arm 'A' took 0.0 s in repeat 0"),
    ],
)
def test_bad_requests_are_refused(arms, options, message):
    with pytest.raises(ValueError, match=message):
        paired_timing(arms, **options)


@pytest.mark.parametrize("seconds", [-1.0, math.nan, math.inf])
def test_impossible_times_are_refused(seconds):
    with pytest.raises(ValueError, match="repeat 1"):
        PairedTiming(pd.DataFrame({"A": [1.0, seconds, 1.0]}))


def test_an_unknown_arm_is_named_with_the_known_ones():
    timing = PairedTiming(pd.DataFrame({"dense": [1.0], "lean": [1.0]}))
    for ask in (
        timing.median,
        timing.table,
        lambda arm: timing.ratio("lean", arm),
        lambda arm: timing.ratio(arm, "lean"),
    ):
        with pytest.raises(ValueError, match="no arm 'leen'; the arms are 'dense', 'lean'"):
            ask("leen")
