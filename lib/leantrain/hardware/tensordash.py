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

from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import numba
import numpy as np
import pandas as pd
from numpy.typing import NDArray

from leantrain.hardware.energy import TENSORDASH_FP32, AccessEnergy, CorePower
from leantrain.hardware.lowering import (
    SIDES,
    Operand,
    StreamSet,
    Words,
    operand_vectors,
    pack_lanes,
    stream_sets,
    streams,
)
from leantrain.hardware.reports import read_products
from leantrain.hardware.trace import LayerTrace, Trace
from leantrain.hardware.workloads import PRODUCTS, Layer, Product
from leantrain.kernels import compiled, thread_count

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = [
    "Moves",
    "Schedule",
    "TensorDash",
    "cycle_report",
    "dense_cycles",
    "draw_cycle",
    "random_streams",
    "read_report",
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
#: Lanes that an option may reach to either side.
_REACH = 3
#: Fewer steps than this are not worth a second thread.
_ALONE = 1 << 18
#: Streams that advance side by side in one block of the fast kernel.
_BLOCK = 256


@dataclass(frozen=True)
class TensorDash:
    """The configuration of the accelerator.

    Attributes:
        lanes: Multipliers of a processing element; the kernels and the levels are for 16.
        depth: Steps in a staging buffer: the current one and those ahead; 1 is the dense element.
        priority: Order in which a lane tries its options, "paper" (own lane first, our reading) or "dnnsim" (the
            authors' public simulator). Options deeper than the staging buffer are left out.
        rows: Processing elements of a tile that take different streams of the scheduled operand, and advance together.
        columns: Processing elements of a row; they share its stream.
        tiles: Tiles.
        frequency_mhz: Clock.
        options: Options as (step, lane offset), in order of priority, in place of those of `priority`. The first must
            be (0, 0): a lane whose own pair is effectual takes it.
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
        if self.lanes != 16:
            raise ValueError(
                f"lanes is {self.lanes!r}; the scheduler's levels are for 16 lanes, so only 16 is possible"
            )
        for field, most in (("depth", 16), ("rows", 256), ("columns", 65536), ("tiles", 65536)):
            value = getattr(self, field)
            if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= most:
                raise ValueError(f"{field} is {value!r}; expected a whole number from 1 to {most}")
        if not 0 < self.frequency_mhz < float("inf"):
            raise ValueError(f"frequency_mhz is {self.frequency_mhz}; expected a positive number")
        if self.priority not in ("paper", "dnnsim"):
            raise ValueError(f"priority is {self.priority!r}; expected 'paper' or 'dnnsim'")
        if not self.lane_options or self.lane_options[0] != (0, 0):
            raise ValueError(f"options start with {self.lane_options[:1]}; the first must be (0, 0)")
        if len(set(self.lane_options)) != len(self.lane_options):
            raise ValueError("an option is given twice")
        for step, offset in self.lane_options:
            if not 0 <= step < self.depth:
                raise ValueError(f"option ({step}, {offset}) is outside a staging buffer of depth {self.depth}")
            if step == 0 and offset != 0:
                raise ValueError(f"option (0, {offset}) takes the current pair of another lane; use step 1 or more")
            if abs(offset) > _REACH:
                raise ValueError(f"option ({step}, {offset}) reaches {abs(offset)} lanes; the muxes reach {_REACH}")
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

    def seconds(self, cycles: float) -> float:
        """Time of so many cycles at the configured clock."""
        return cycles / (self.frequency_mhz * 1e6)

    @property
    def macs_per_cycle(self) -> int:
        """Multipliers of the accelerator."""
        return self.lanes * self.rows * self.columns * self.tiles


def _take_turned(staged: Words, free: Words, level: int, right: int, left: int) -> None:
    """Give each free lane of a level the staged pair that lies `right` lanes above it, in every stream.

    Bits are turned around the ring of 16 lanes, right + left = 16 (or 0 and 0). The two shifts are literal numbers at
    every call, for only then do 16-bit vector instructions come out of this loop.
    """
    for s in range(staged.size):
        pairs = staged[s]
        turned = np.uint16(pairs >> np.uint16(right)) | np.uint16(pairs << np.uint16(left))
        taken = np.uint16(turned & free[s] & level)
        free[s] = free[s] ^ taken
        back = np.uint16(taken << np.uint16(right)) | np.uint16(taken >> np.uint16(left))
        staged[s] = pairs & ~np.uint16(back)


_inlined = numba.njit(nogil=True, inline="always")(_take_turned)


@compiled
def _take(staged: Words, free: Words, level: int, offset: int) -> None:
    """One option of one level, for all streams of a block: the pair in lane + `offset`, at most 3 to either side."""
    if offset == 0:
        _inlined(staged, free, level, 0, 0)
    elif offset == 1:
        _inlined(staged, free, level, 1, 15)
    elif offset == 2:
        _inlined(staged, free, level, 2, 14)
    elif offset == 3:
        _inlined(staged, free, level, 3, 13)
    elif offset == -1:
        _inlined(staged, free, level, 15, 1)
    elif offset == -2:
        _inlined(staged, free, level, 14, 2)
    elif offset == -3:
        _inlined(staged, free, level, 13, 3)


@compiled
def _advance_blocks(
    words: Words,
    first: int,
    last: int,
    slots: int,
    depth: int,
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
    window = np.zeros((depth, width), np.uint16)
    free = np.zeros(width, np.uint16)
    rest = np.zeros(width, np.uint16)
    advance = np.zeros(width, np.uint16)
    held = np.zeros(width, np.uint16)
    idle = np.zeros(width, np.int32)
    reach = np.zeros(width, np.int32)
    lockstep = np.zeros(width, np.int32)
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
            free[s] = ~window[0, s]
            window[0, s] = 0
        for level in levels:
            for option in range(1, option_steps.size):
                _take(window[option_steps[option]], free, level, option_offsets[option])
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


@compiled
def _advance_lanes(
    words: Words,
    depth: int,
    levels: NDArray[np.int64],
    option_steps: NDArray[np.int64],
    option_offsets: NDArray[np.int64],
    moves: NDArray[np.int64],
    starts: NDArray[np.int64],
) -> int:
    """Run one tile group, lane by lane, and log which pair each lane took; returns the number of cycles.

    `levels` holds one level a row, filled up with -1. `moves` (steps, rows, 16) receives step * 16 + lane of the pair
    that a lane took, or -1; `starts` (steps,) the step at the head of the staging buffer.
    """
    rows, steps = words.shape
    left = np.zeros((rows, steps + depth, 16), np.bool_)
    for row in range(rows):
        for step in range(steps):
            for lane in range(16):
                left[row, step, lane] = (words[row, step] >> lane) & 1
    head = 0
    cycle = 0
    while head < steps:
        starts[cycle] = head
        together = depth
        for row in range(rows):
            for level in range(levels.shape[0]):
                for lane in levels[level]:
                    if lane < 0:
                        break
                    moves[cycle, row, lane] = -1
                    for option in range(option_steps.size):
                        step = head + option_steps[option]
                        source = (lane + option_offsets[option]) % 16
                        if left[row, step, source]:
                            left[row, step, source] = False
                            moves[cycle, row, lane] = step * 16 + source
                            break
            empty = 0
            while empty < depth and not left[row, head + empty].any():
                empty += 1
            together = min(together, empty)
        head += together
        cycle += 1
    return cycle


@dataclass(frozen=True)
class Moves:
    """What the scheduler of one tile did, cycle by cycle.

    Attributes:
        cycles: Cycles that the group took.
        steps: Steps of its streams, the cycles of the dense element.
        start: Step at the head of the staging buffers in each cycle, (cycles,).
        taken: step * 16 + lane of the pair that each lane multiplied, -1 for none, (cycles, rows, lanes).
    """

    cycles: int
    steps: int
    start: NDArray[np.int64]
    taken: NDArray[np.int64]

    def table(self) -> pd.DataFrame:
        """One row a multiplication: cycle, row, lane, and the step and lane that the pair came from."""
        cycle, row, lane = np.nonzero(self.taken >= 0)
        pair = self.taken[cycle, row, lane]
        return pd.DataFrame({"cycle": cycle, "row": row, "lane": lane, "from_step": pair // 16, "from_lane": pair % 16})

    def multiply(self, first: NDArray, second: NDArray, row: int = 0) -> float:
        """Add up the products of a row's scheduled pairs, in the order in which the lanes made them.

        Args:
            first: One operand, (steps, 16).
            second: The other operand, (steps, 16).
            row: The row whose moves to follow.
        """
        if first.shape != (self.steps, 16) or second.shape != first.shape:
            raise ValueError(f"operands have shapes {first.shape} and {second.shape}; expected ({self.steps}, 16)")
        pairs = self.taken[:, row][self.taken[:, row] >= 0]
        return float(sum((first.reshape(-1)[pairs] * second.reshape(-1)[pairs]).tolist()))


@dataclass(frozen=True)
class Schedule:
    """Cycles and idle multipliers of many tile groups; an idle multiplier is counted once a cycle.

    Attributes:
        cycles: Cycles of each group, (groups,).
        idle: Multipliers without work in each row, (groups, rows).
        reach: Those idle although work was staged that none of their options reached.
        lockstep: Those idle with nothing left in the buffer, in a cycle before which the row had to wait for another.
    """

    cycles: NDArray[np.int64]
    idle: NDArray[np.int64]
    reach: NDArray[np.int64]
    lockstep: NDArray[np.int64]


def draw_cycle(axes: Axes, words: Words, moves: Moves, cycle: int, *, row: int = 0, depth: int = 3) -> None:
    """Draw the staging buffer of one row in one cycle, and which pair each multiplier took, from the log of the moves.

    Args:
        axes: Where to draw.
        words: Non-zero bits of the tile group, (rows, steps), that the moves were made for.
        moves: The log.
        cycle: The cycle, from 0.
        row: The row.
        depth: Steps in the staging buffer.
    """
    from matplotlib.patches import Rectangle

    head = int(moves.start[cycle])
    before = moves.taken[:cycle, row]
    gone = set(before[before >= 0].tolist())
    for ahead in range(depth):
        for lane in range(16):
            step = head + ahead
            work = step < moves.steps and bool(words[row, step] >> lane & 1)
            fresh = work and step * 16 + lane not in gone
            face = "#c9d8ea" if fresh else "#f1f1f1" if work else "white"
            axes.add_patch(
                Rectangle((lane - 0.42, ahead + 0.58), 0.84, 0.84, facecolor=face, edgecolor="#9a9a9a", lw=0.7)
            )
    for lane, pair in enumerate(moves.taken[cycle, row].tolist()):
        axes.plot(lane, -0.35, "o", markersize=11, color="#0566aa" if pair >= 0 else "white", markeredgecolor="#202225")
        if pair < 0:
            continue
        ahead, source = pair // 16 - head + 1, pair % 16
        # A pair from beyond the end of the ring enters from the nearer side.
        shift = source - lane - 16 * round((source - lane) / 16)
        arrow = {"arrowstyle": "-|>", "color": "#0566aa" if (ahead, shift) == (1, 0) else "#a00119", "lw": 1.2}
        axes.annotate("", xy=(lane, -0.05), xytext=(lane + shift, ahead), arrowprops=arrow, annotation_clip=False)
    axes.set(xlim=(-1.6, 16.6), ylim=(-0.8, depth + 0.6), xticks=range(0, 16, 5), yticks=[-0.35, *range(1, depth + 1)])
    axes.set_yticklabels(["multipliers", *(f"step {head + ahead}" for ahead in range(depth))])
    axes.grid(visible=False)
    axes.spines[["left", "bottom"]].set_visible(False)
    axes.tick_params(length=0)


def _checked(words: Words, config: TensorDash) -> Words:
    words = np.ascontiguousarray(words)
    if words.dtype != np.uint16:
        raise ValueError(f"words have dtype {words.dtype}; expected uint16, one bit a lane")
    if words.ndim != 3 or 0 in words.shape:
        raise ValueError(f"words have shape {words.shape}; expected (groups, rows, steps), none of them empty")
    if words.shape[1] != config.rows:
        raise ValueError(f"words hold {words.shape[1]} rows a group; the configuration has {config.rows}")
    return words


def schedule(words: Words, config: TensorDash | None = None, *, threads: int | None = None) -> Schedule:
    """Run tile groups through the scheduler, hundreds of streams side by side.

    Args:
        words: Non-zero bits of the scheduled operand, (groups, rows, steps); lane 0 is the lowest bit.
        config: The accelerator; the default one if left out.
        threads: Threads to use; by default one a processor, at most `OMP_NUM_THREADS`.

    Returns:
        Cycles and idle multipliers of each group. A dense element takes `steps` cycles.

    Raises:
        ValueError: If the words have another type or shape, or a stream is empty.
    """
    config = config or TensorDash()
    words = _checked(words, config)
    groups = len(words)
    cycles = np.zeros(groups, dtype=np.int64)
    counters = np.zeros((groups, config.rows, 3), dtype=np.int64)
    levels = np.array([sum(1 << lane for lane in level) for level in config.lane_levels], dtype=np.uint16)
    option_steps, option_offsets = (np.array(column) for column in zip(*config.lane_options, strict=True))
    slots = max(1, _BLOCK // config.rows)

    def run(first: int, last: int) -> None:
        side_by_side = min(slots, last - first)
        _advance_blocks(
            words, first, last, side_by_side, config.depth, levels, option_steps, option_offsets, cycles, counters
        )

    workers = threads or thread_count()
    share = -(-groups // workers)
    if workers == 1 or words.size < _ALONE or groups <= 2 * slots:
        run(0, groups)
    else:
        with ThreadPoolExecutor(workers) as pool:
            list(pool.map(lambda first: run(first, min(first + share, groups)), range(0, groups, share)))
    return Schedule(cycles, counters[..., 0], counters[..., 1], counters[..., 2])


def schedule_moves(words: Words, config: TensorDash | None = None) -> Moves:
    """Run one tile group through the scheduler and log every move; the slow, plain form of `schedule`.

    Args:
        words: Non-zero bits of the scheduled operand, (rows, steps).
        config: The accelerator; the default one if left out.
    """
    config = config or TensorDash()
    words = _checked(np.asarray(words)[None], config)[0]
    widest = max(len(level) for level in config.lane_levels)
    levels = np.full((len(config.lane_levels), widest), -1, dtype=np.int64)
    for number, level in enumerate(config.lane_levels):
        levels[number, : len(level)] = level
    option_steps, option_offsets = (np.array(column) for column in zip(*config.lane_options, strict=True))
    steps = words.shape[1]
    moves = np.full((steps, config.rows, 16), -1, dtype=np.int64)
    starts = np.zeros(steps, dtype=np.int64)
    cycles = _advance_lanes(words, config.depth, levels, option_steps, option_offsets, moves, starts)
    return Moves(cycles, steps, starts[:cycles], moves[:cycles])


def random_streams(sparsity: float, *, groups: int, rows: int, steps: int, seed: int = 0) -> Words:
    """Streams in which every value is zero with the same probability, independently.

    Args:
        sparsity: Probability of a zero, 0 to 1.
        groups: Tile groups.
        rows: Streams of a group.
        steps: Steps of a stream.
        seed: Seed of the generator.

    Returns:
        Words (groups, rows, steps).
    """
    if not 0 <= sparsity <= 1:
        raise ValueError(f"sparsity is {sparsity}; expected 0 to 1")
    generator = np.random.default_rng(seed)
    words = np.zeros((groups, rows, steps), dtype=np.uint16)
    for lane in range(16):
        words |= (generator.random(words.shape, dtype=np.float32) >= sparsity).astype(np.uint16) << np.uint16(lane)
    return words


def _passes(streams_of: StreamSet, config: TensorDash) -> tuple[int, int]:
    """Tile groups of a set of streams, and how often each runs."""
    groups = streams_of.batches * -(-streams_of.streams // config.rows)
    return groups, -(-streams_of.partners // config.columns) * streams_of.partner_batches * streams_of.repeats


def dense_cycles(
    layer: Layer, product: Product, config: TensorDash | None = None, *, batch: int = 1, side: Operand | None = None
) -> float:
    """Cycles of a product on the accelerator without TensorDash, all tiles sharing the work evenly.

    Args:
        layer: The layer.
        product: The product.
        config: The accelerator; the default one if left out.
        batch: Images, or samples of a linear layer.
        side: The operand that lies along the rows of a tile; by default the first of `SIDES[product]`.
    """
    config = config or TensorDash()
    total = 0
    for streams_of in stream_sets(layer, product, side or SIDES[product][0], lanes=config.lanes, batch=batch):
        groups, passes = _passes(streams_of, config)
        total += groups * passes * streams_of.steps
    return total / config.tiles


def simulate(
    trace: Trace | LayerTrace,
    config: TensorDash | None = None,
    *,
    products: Iterable[Product] = PRODUCTS,
    access: AccessEnergy | None = None,
    power: CorePower = TENSORDASH_FP32,
    bits: int = 32,
    minibatch: int | None = None,
    threads: int | None = None,
) -> pd.DataFrame:
    """Run the traced products of every layer and count cycles, idle multipliers, accesses and energy.

    For each product the operand with the larger share of zeros is scheduled. Tiles share the tile groups evenly.

    Args:
        trace: The operands of a network, or of one layer.
        config: The accelerator; the default one if left out.
        products: The products to run; a layer without an input gradient has no dgrad.
        access: Relative energy of an access.
        power: Power of the cores.
        bits: Width of a value, 16 or 32; a wider value costs in proportion.
        minibatch: Samples that share one transfer of the weights from and to DRAM; by default those of the trace.
        threads: Threads to use.

    Returns:
        One row a layer and product: layer, kind, product, side, sparsity (of the scheduled operand), macs,
        dense_cycles, cycles, ideal_cycles (if any lane could take any later pair of its stream), speedup, ideal,
        utilisation; the multiplier slots `slots` = used + reach + window + lockstep + empty_rows (idle because the
        buffer held no reachable pair, no pair, no pair while the row waited, or because the row had no stream); and
        energies in units of one 16-bit multiply-accumulate: core_dense, core, scratchpad, buffer, dram.

    Raises:
        ValueError: If `bits` is neither 16 nor 32, or `minibatch` is not positive.
    """
    if bits not in (16, 32):
        raise ValueError(f"bits is {bits}; expected 16 or 32")
    if minibatch is not None and minibatch < 1:
        raise ValueError(f"minibatch is {minibatch}; expected at least 1")
    config, access = config or TensorDash(), access or AccessEnergy()
    wanted = set(products)
    rows = []
    for entry in (trace,) if isinstance(trace, LayerTrace) else trace.layers:
        for product in entry.layer.products:
            if product in wanted:
                counts = _simulate_product(entry, product, config, threads)
                share = entry.batch / (minibatch or entry.batch)
                rows.append(counts | _energies(entry, product, counts, config, access, power, bits / 16, share))
    return pd.DataFrame(rows)


def _simulate_product(entry: LayerTrace, product: Product, config: TensorDash, threads: int | None) -> dict[str, Any]:
    layer = entry.layer
    # `max` keeps the first of equals, and SIDES names the activations or gradients first.
    side = max(SIDES[product], key=lambda operand: entry.masks[operand].sparsity)
    sets = stream_sets(layer, product, side, lanes=config.lanes, batch=entry.batch)
    slots = dict.fromkeys(("used", "reach", "window", "lockstep", "empty_rows"), 0)
    cycles = ideal = 0
    for chunk in streams(layer, product, side, entry.masks[side].mask(), rows=config.rows, lanes=config.lanes):
        _, passes = _passes(sets[chunk.phase], config)
        result = schedule(chunk.words, config, threads=threads)
        filled = np.arange(config.rows)[None, :] < chunk.filled[:, None]
        counted = {name: int(getattr(result, name)[filled].sum()) for name in ("idle", "reach", "lockstep")}
        work = np.bitwise_count(chunk.words).sum(axis=2, dtype=np.int64)
        row_slots = config.lanes * result.cycles
        if not np.array_equal(row_slots[:, None] - result.idle, work):
            raise RuntimeError(f"layer {layer.name!r}, {product}: scheduled and non-zero pairs differ; this is a bug")
        cycles += passes * int(result.cycles.sum())
        ideal += passes * int(np.maximum(1, -(-work.max(axis=1) // config.lanes)).sum())
        slots["used"] += passes * int(work.sum())
        slots["reach"] += passes * counted["reach"]
        slots["lockstep"] += passes * counted["lockstep"]
        slots["window"] += passes * (counted["idle"] - counted["reach"] - counted["lockstep"])
        slots["empty_rows"] += passes * int((row_slots * (config.rows - chunk.filled)).sum())
    dense = dense_cycles(layer, product, config, batch=entry.batch, side=side)
    total = sum(slots.values())
    return {
        "layer": layer.name,
        "kind": layer.kind,
        "product": product,
        "side": side,
        "sparsity": entry.masks[side].sparsity,
        "macs": layer.macs * entry.batch,
        "dense_cycles": dense,
        "cycles": cycles / config.tiles,
        "ideal_cycles": ideal / config.tiles,
        "speedup": dense * config.tiles / cycles,
        "ideal": dense * config.tiles / ideal,
        "utilisation": slots["used"] / total,
        "slots": total,
        **slots,
    }


def _energies(
    entry: LayerTrace,
    product: Product,
    counts: dict[str, Any],
    config: TensorDash,
    access: AccessEnergy,
    power: CorePower,
    unit: float,
    weight_share: float,
) -> dict[str, float]:
    """Energies of a product. Memory is accessed alike with and without TensorDash.

    Our accounting: a staging refill reads 16 values from a scratchpad; a tile group's scheduled streams come from the
    shared buffer once and stay beside the tile for all passes; the partners come from it once a pass, for all tiles at
    once; every output is written to the buffer once; DRAM moves both operands in and the output out once, the weights
    and their gradient once a minibatch.
    """
    side: Operand = counts["side"]
    scratchpad = buffer = 0
    for streams_of in stream_sets(entry.layer, product, side, lanes=config.lanes, batch=entry.batch):
        groups, passes = _passes(streams_of, config)
        values = streams_of.steps * config.lanes
        scratchpad += groups * passes * (config.rows + config.columns) * values
        buffer += groups * streams_of.repeats * config.rows * values
        buffer += -(-groups // config.tiles) * passes * config.columns * values
        outputs = streams_of.partner_batches * streams_of.partners * streams_of.repeats
        buffer += streams_of.batches * streams_of.streams * outputs
    # Two of the three tensors are a product's operands; the third has the shape of its output.
    sizes = {operand: mask.size for operand, mask in entry.masks.items()}
    dram = sizes["input"] + sizes["grad_output"] + weight_share * sizes["weight"]
    core = unit * access.mac * config.macs_per_cycle
    return {
        "core_dense": core * counts["dense_cycles"],
        "core": core * counts["cycles"] / power.power_ratio,
        "scratchpad": unit * access.scratchpad * scratchpad,
        "buffer": unit * access.buffer * buffer,
        "dram": unit * access.dram * dram,
    }


_COUNTS = [
    "macs",
    "dense_cycles",
    "cycles",
    "ideal_cycles",
    "slots",
    "used",
    "reach",
    "window",
    "lockstep",
    "empty_rows",
]
_SUMS = [*_COUNTS, "core_dense", "core", "scratchpad", "buffer", "dram"]


def summarise(frame: pd.DataFrame, by: Sequence[str] = ()) -> pd.DataFrame:
    """Sum the rows of `simulate`, and form the ratios from the sums: never the mean of the layers' ratios.

    Args:
        frame: What `simulate` returned; columns such as network or epoch may have been added.
        by: Columns to group by; none sums everything into one row.

    Returns:
        One row a group with the sums of the counts and energies, and speedup, ideal, utilisation, core_efficiency and
        total_efficiency (energy of the dense accelerator over TensorDash, cores alone and with memory).
    """
    groups = frame.groupby(list(by), sort=False, observed=True)[_SUMS].sum() if by else frame[_SUMS].sum().to_frame().T
    memory = groups[["scratchpad", "buffer", "dram"]].sum(axis=1)
    result = groups.assign(
        speedup=groups["dense_cycles"] / groups["cycles"],
        ideal=groups["dense_cycles"] / groups["ideal_cycles"],
        utilisation=groups["used"] / groups["slots"],
        core_efficiency=groups["core_dense"] / groups["core"],
        total_efficiency=(groups["core_dense"] + memory) / (groups["core"] + memory),
    )
    return result.reset_index(drop=not by)


def value_check(
    layer: Layer,
    config: TensorDash | None = None,
    *,
    sparsity: float = 0.6,
    batch: int = 2,
    samples: int = 8,
    seed: int = 0,
) -> pd.DataFrame:
    """Compute output values from the scheduler's moves, and compare them with PyTorch's.

    The operands are small integers held in float64, so that every order of addition gives the same sum, to the bit.

    Args:
        layer: The layer.
        config: The accelerator; only its scheduler matters.
        sparsity: Share of zeros in all three operands.
        batch: Images, or samples of a linear layer.
        samples: Output values to compute for each product.
        seed: Seed of the operands and of the choice of values.

    Returns:
        One row a value: product, side (the operand that was scheduled), scheduled and expected sums, macs that the
        dense element makes and those that were scheduled.
    """
    import torch
    from torch.nn import functional as F

    one_row = replace(config or TensorDash(), rows=1)
    generator = np.random.default_rng(seed)

    def integers(*shape: int) -> torch.Tensor:
        values = generator.integers(1, 9, shape) * generator.choice([-1, 1], shape)
        return torch.tensor(np.where(generator.random(shape) < sparsity, 0, values), dtype=torch.float64)

    image = layer.batch_as_image(batch) if layer.kind == "linear" else layer
    images = 1 if layer.kind == "linear" else batch
    x = integers(images, image.in_channels, *image.in_size).requires_grad_()
    w = integers(*image.weight_shape).requires_grad_()
    out = F.conv2d(x, w, None, image.stride, image.padding, image.dilation, image.groups)
    gy = integers(*out.shape)
    tensors: dict[Operand, NDArray] = {
        "input": x.detach().numpy(),
        "weight": w.detach().numpy(),
        "grad_output": gy.numpy(),
    }
    # The gradient of the weights is that of the first image, so that one stream makes one value.
    (gx,) = torch.autograd.grad(out, x, gy, retain_graph=True)
    first = torch.zeros_like(gy)
    first[0] = gy[0]
    (gw,) = torch.autograd.grad(out, w, first)
    expected = {"forward": out.detach().numpy(), "dgrad": gx.numpy(), "wgrad": gw.numpy()[None]}
    rows = []
    for product in PRODUCTS:
        for number in range(samples):
            index = tuple(int(generator.integers(size)) for size in expected[product].shape)
            operands = operand_vectors(image, product, tensors, index)
            side = number % 2
            total, made = 0.0, 0
            if operands[0].size:
                moves = schedule_moves(pack_lanes(operands[side] != 0).T, one_row)
                total, made = moves.multiply(*operands), int((moves.taken >= 0).sum())
            want = float(expected[product][index])
            row = (product, SIDES[product][side], total, want, operands[0].size, made)
            rows.append(dict(zip(("product", "side", "scheduled", "expected", "macs", "made"), row, strict=True)))
    return pd.DataFrame(rows)


def cycle_report(trace: Trace, configs: Mapping[str, TensorDash], *, minibatch: int | None = None) -> dict[str, float]:
    """What a training run logs of a trace: the sums of `summarise` for each product and configuration.

    Args:
        trace: The trace.
        configs: Name -> accelerator.
        minibatch: See `simulate`.

    Returns:
        Numbers by "configuration/product/quantity"; "configuration/all/slowest" is the smallest speed-up of any product
        of any layer. `read_report` makes a table of them again.
    """
    report: dict[str, float] = {}
    for name, config in configs.items():
        frame = simulate(trace, config, minibatch=minibatch)
        for row in summarise(frame, ["product"]).to_dict("records"):
            report |= {f"{name}/{row['product']}/{quantity}": float(row[quantity]) for quantity in _SUMS}
        report[f"{name}/all/slowest"] = float(frame["speedup"].min())
    return report


def read_report(frame: pd.DataFrame, keep: Sequence[str] = ("arm", "seed", "epoch")) -> pd.DataFrame:
    """Turn the columns that `cycle_report` logged into a tidy table.

    Args:
        frame: A table with columns named "configuration/product/quantity" beside others.
        keep: Columns to keep.

    Returns:
        One row a row of `frame`, configuration and product: the kept columns, config, product, and the quantities,
        ready for `summarise`.
    """
    return read_products(frame, keep, _SUMS, "R4/forward/cycles")
