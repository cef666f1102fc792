"""TensorDash: a processing element that fills the slots of zero products with later work (Mahmoud et al., 2020).

A dense element multiplies 16 operand pairs a step, the zeros too. TensorDash holds the next steps in a small staging
buffer and lets every multiplier (lane) choose among eight pairs of it; a combinational scheduler makes the choices,
lane after lane in six levels, and the buffer moves on by as many steps as have run empty, up to its depth.

The module has the scheduler twice: `schedule_moves`, one tile at a time with a log of every move, and `schedule`, which
runs hundreds of streams side by side and counts cycles. `simulate` takes the traced operands of a network in training
through the three products of each of its layers and returns a tidy table. All kernels are compiled by Numba.

The order of the five lookaside options, the sign of the farthest, and everything about memory are our choices.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal

import numba
import numpy as np
import pandas as pd
from numpy.typing import NDArray

from leantrain.hardware.energy import TENSORDASH_FP32, AccessEnergy, CorePower
from leantrain.hardware.lowering import SIDES, Operand, StreamSet, Words, operand_vectors, stream_sets, streams
from leantrain.hardware.trace import LayerTrace, Trace
from leantrain.hardware.workloads import PRODUCTS, Layer, Product

__all__ = [
    "Moves",
    "Schedule",
    "TensorDash",
    "dense_cycles",
    "random_streams",
    "schedule",
    "schedule_moves",
    "simulate",
    "summarise",
    "value_check",
]

#: Our order of the options: the lane's own column first, then its neighbours.
_PAPER = ((0, 0), (1, 0), (2, 0), (1, -1), (1, 1), (2, -2), (2, 2), (1, -3))
#: The order of the authors' public simulator: by step, then by lane.
_DNNSIM = ((0, 0), (1, -1), (1, 0), (1, 1), (1, 3), (2, -2), (2, 0), (2, 2))

#: Lanes 0, 5, 10 choose first, then 1, 6, 11, and so on; no two lanes of a level share an option.
_LEVELS = ((0, 5, 10), (1, 6, 11), (2, 7, 12), (3, 8, 13), (4, 9, 14), (15,))
#: Streams that advance side by side in one block of the fast kernel.
_BLOCK = 256


@dataclass(frozen=True)
class TensorDash:
    """The configuration of the accelerator.

    Attributes:
        lanes: Multipliers of a processing element, 2 to 16.
        depth: Steps in a staging buffer: the current one and those ahead; 1 is the dense element.
        priority: Order in which a lane tries its options, "paper" (own lane first, our reading) or "dnnsim" (the
            authors' public simulator). Options deeper than the staging buffer are left out.
        rows: Processing elements of a tile that take different streams of the scheduled operand, and advance together.
        columns: Processing elements of a row; they share its stream.
        tiles: Tiles.
        frequency_mhz: Clock.
        options: Options as (step, lane offset), in order of priority, in place of those of `priority`. The first must be
            (0, 0): a lane whose own pair is effectual takes it.
        levels: Lanes that choose at the same time, level after level. Two lanes of a level must not share an option.
    """

    lanes: int = 16
    depth: int = 3
    priority: Literal["paper", "dnnsim"] = "paper"
    rows: int = 4
    columns: int = 4
    tiles: int = 16
    frequency_mhz: float = 500.0
    options: tuple[tuple[int, int], ...] | None = None
    levels: tuple[tuple[int, ...], ...] | None = None

    def __post_init__(self) -> None:
        for field, most in (("lanes", 16), ("depth", 16), ("rows", 256), ("columns", 65536), ("tiles", 65536)):
            value = getattr(self, field)
            least = 2 if field == "lanes" else 1
            if not isinstance(value, int) or not least <= value <= most:
                raise ValueError(f"{field} is {value!r}; expected a whole number from {least} to {most}")
        if not 0 < self.frequency_mhz < float("inf"):
            raise ValueError(f"frequency_mhz is {self.frequency_mhz}; expected a positive number")
        if self.priority not in ("paper", "dnnsim"):
            raise ValueError(f"priority is {self.priority!r}; expected 'paper' or 'dnnsim'")
        if self.levels is None and self.lanes != 16:
            raise ValueError(f"lanes is {self.lanes}, but the default levels are for 16 lanes; give levels as well")
        if not self.lane_options or self.lane_options[0] != (0, 0):
            raise ValueError(f"options start with {self.lane_options[:1]}; the first must be (0, 0)")
        if len(set(self.lane_options)) != len(self.lane_options):
            raise ValueError("an option is given twice")
        for step, offset in self.lane_options:
            if not 0 <= step < self.depth:
                raise ValueError(f"option ({step}, {offset}) is outside a staging buffer of depth {self.depth}")
            if step == 0 and offset != 0:
                raise ValueError(f"option (0, {offset}) takes a current pair from its own lane; use step 1 or more")
        self._check_levels()

    def _check_levels(self) -> None:
        seen = sorted(lane for level in self.lane_levels for lane in level)
        if seen != list(range(self.lanes)):
            raise ValueError(f"levels hold the lanes {seen}; expected each lane from 0 to {self.lanes - 1} once")
        for level in self.lane_levels:
            owner: dict[tuple[int, int], int] = {}
            for lane in level:
                for step, offset in self.lane_options:
                    place = (step, (lane + offset) % self.lanes)
                    if owner.setdefault(place, lane) != lane:
                        raise ValueError(f"lanes {owner[place]} and {lane} of one level can both take the pair {place}")

    @property
    def lane_options(self) -> tuple[tuple[int, int], ...]:
        """The options of a lane as (step, lane offset), in order of priority."""
        if self.options is not None:
            return self.options
        order = _PAPER if self.priority == "paper" else _DNNSIM
        return tuple(option for option in order if option[0] < self.depth)

    @property
    def lane_levels(self) -> tuple[tuple[int, ...], ...]:
        """The levels of the scheduler, each a tuple of lanes."""
        if self.levels is not None:
            return self.levels
        return _LEVELS

    @property
    def macs_per_cycle(self) -> int:
        """Multipliers of the accelerator."""
        return self.lanes * self.rows * self.columns * self.tiles


def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile with Numba, and keep the machine code on disk where a folder for it can be written."""
    try:
        return numba.njit(nogil=True, cache=True)(function)
    except RuntimeError:  # no folder for the cache, as in a read-only installation
        return numba.njit(nogil=True)(function)


@_compiled
def _advance_blocks(
    words: Words,
    first: int,
    last: int,
    slots: int,
    depth: int,
    lanes: int,
    levels: NDArray[np.uint16],
    option_steps: NDArray[np.int64],
    option_offsets: NDArray[np.int64],
    cycles: NDArray[np.int64],
    counters: NDArray[np.int64],
) -> None:
    """Run the tile groups `first` to `last` in `slots` slots side by side; a slot that is done takes the next group.

    Every inner loop runs over the streams of all slots, so that the compiler turns it into vector instructions. Within
    a level the lanes choose at once: an option is one rotation of a step's bits against the free lanes.
    """
    rows, steps = words.shape[1], words.shape[2]
    width = slots * rows
    full = np.uint16((1 << lanes) - 1)
    window = np.zeros((depth, width), np.uint16)
    free = np.zeros(width, np.uint16)
    rest = np.zeros(width, np.uint16)
    advance = np.zeros(width, np.uint16)
    held = np.zeros(width, np.uint16)
    idle = np.zeros(width, np.int64)
    reach = np.zeros(width, np.int64)
    lockstep = np.zeros(width, np.int64)
    group = np.full(slots, -1, np.int64)
    position = np.zeros(slots, np.int64)
    spent = np.zeros(slots, np.int64)
    waiting = first
    for slot in range(slots):
        if waiting < last:
            group[slot] = waiting
            for row in range(rows):
                for step in range(min(depth, steps)):
                    window[step, slot * rows + row] = words[waiting, row, step]
            waiting += 1
    active = min(slots, last - first)
    while active > 0:
        # Option (0, 0): every lane whose own pair is effectual takes it, so the current step empties.
        for s in range(width):
            free[s] = full & ~window[0, s]
            window[0, s] = 0
        for level in levels:
            for option in range(1, option_steps.size):
                right = np.uint64(option_offsets[option]) & np.uint64(15)
                left = np.uint64(lanes - option_offsets[option]) & np.uint64(15)
                staged = window[option_steps[option]]
                for s in range(width):
                    pairs = staged[s]
                    seen = np.uint16(np.uint16(pairs >> right) | np.uint16(pairs << left))
                    taken = np.uint16(seen & free[s] & level)
                    free[s] = free[s] ^ taken
                    back = np.uint16(np.uint16(taken << right) | np.uint16(taken >> left))
                    staged[s] = pairs & ~np.uint16(back & full)
        # How far each stream could move on by itself.
        for s in range(width):
            advance[s] = 1
            rest[s] = 1
        for step in range(1, depth):
            for s in range(width):
                rest[s] = rest[s] & np.uint16(window[step, s] == 0)
                advance[s] = advance[s] + rest[s]
        for s in range(width):
            count = free[s]
            count = np.uint16(count - ((count >> np.uint16(1)) & np.uint16(0x5555)))
            count = np.uint16((count & np.uint16(0x3333)) + ((count >> np.uint16(2)) & np.uint16(0x3333)))
            count = np.uint16((count + (count >> np.uint16(4))) & np.uint16(0x0F0F))
            free[s] = np.uint16((count + (count >> np.uint16(8))) & np.uint16(0x1F))
        for s in range(width):
            idle[s] += free[s]
            reach[s] += free[s] * (np.uint16(1) - rest[s])
            lockstep[s] += free[s] * (rest[s] & held[s])
        for slot in range(slots):
            if group[slot] < 0:
                continue
            start = slot * rows
            together = advance[start]
            for s in range(start, start + rows):
                together = min(together, advance[s])
            spent[slot] += 1
            position[slot] += together
            at = position[slot]
            if at < steps:
                for row in range(rows):
                    s = start + row
                    held[s] = advance[s] > together
                    for step in range(depth):
                        if step + together < depth:
                            window[step, s] = window[step + together, s]
                        elif at + step < steps:
                            window[step, s] = words[group[slot], row, at + step]
                        else:
                            window[step, s] = 0
                continue
            done = group[slot]
            cycles[done] = spent[slot]
            for row in range(rows):
                s = start + row
                counters[done, row, 0] = idle[s]
                counters[done, row, 1] = reach[s]
                counters[done, row, 2] = lockstep[s]
                idle[s] = reach[s] = lockstep[s] = 0
                held[s] = 0
                for step in range(depth):
                    window[step, s] = 0
            spent[slot] = 0
            position[slot] = 0
            if waiting < last:
                group[slot] = waiting
                for row in range(rows):
                    for step in range(min(depth, steps)):
                        window[step, start + row] = words[waiting, row, step]
                waiting += 1
            else:
                group[slot] = -1
                active -= 1
