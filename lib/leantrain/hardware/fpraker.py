"""FPRaker: a processing element that multiplies term by term (Awad et al., 2021).

A bfloat16 significand is a short sum of signed powers of two, its *terms*. FPRaker takes one operand of each product
apart into terms, most significant first, and adds the other operand, shifted by each term in turn, to an accumulator:
zero bits cost nothing, and terms that fall below the accumulator's last bit end a lane's work early. An element works
on eight products, its *lanes*; the shifters see only a small window of positions, so lanes wait for one another. Eight
by eight elements make a tile, which is so much smaller than a tile of conventional units that 36 of them take the
area of 8.

The module has the element twice: `dot` follows one dot product with a log of every term, in plain form, for any
configuration; `run_tiles` runs whole tiles, all elements side by side, and returns cycles and values. `matmul` computes
matrix products with the emulated arithmetic, `simulate` takes the traced operands of a network in training through the
three products of its layers and returns a tidy table. All kernels are compiled by Numba.

What happens inside an element between two roundings, how the columns of a tile wait for one another, the order of the
work, and everything about memory are our reading or our choice.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import numpy as np
import pandas as pd
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from leantrain.hardware.energy import BFLOAT16_TILE, FPRAKER_TILE, AccessEnergy
from leantrain.hardware.lowering import SIDES, Operand, TileSource
from leantrain.hardware.reports import read_columns, read_products
from leantrain.hardware.trace import LayerTrace, Trace
from leantrain.hardware.workloads import NETWORKS, PRODUCTS, Layer, Product, build_network
from leantrain.kernels import compiled, thread_count

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = [
    "ENCODINGS",
    "VARIANTS",
    "Arithmetic",
    "Dot",
    "FPRaker",
    "TileRuns",
    "build_variant",
    "cycle_report",
    "dense_cycles",
    "dot",
    "draw_set",
    "draw_terms",
    "emulate",
    "exponent_bits",
    "from_bits",
    "matmul",
    "narrowest",
    "operand_table",
    "prune_by_magnitude",
    "quantise",
    "random_streams",
    "read_operands",
    "read_report",
    "recode",
    "run_tiles",
    "simulate",
    "summarise",
    "term_counts",
    "to_bits",
    "value_check",
]

#: bfloat16 values as their bit patterns.
Bits: TypeAlias = NDArray[np.uint16]

Encoding = Literal["naf", "booth", "ones"]
#: How a significand becomes terms: the non-adjacent form, radix-4 Booth digits, or its plain one bits.
ENCODINGS: tuple[Encoding, ...] = ("naf", "booth", "ones")

#: Exponent of a product that is zero, below all others.
_NONE = -(1 << 19)
#: In the fast kernel the lowest bit of a term's word weighs 2**-_DEEPEST of the unit of a product.
_DEEPEST = 18
#: Sets of tiles that are held at once: with 8 x 8 elements 0.4 kB each, and 1 kB for the check of the values.
_SETS_AT_ONCE = 1 << 13
#: Values of a group of exponents that share a base.
_GROUP = 32
_OPERANDS: tuple[Operand, ...] = ("input", "weight", "grad_output")


@dataclass(frozen=True)
class FPRaker:
    """The configuration of the accelerator, and of the conventional one that it is compared with.

    Attributes:
        lanes: Products that an element works on at a time, a *set*; 1 to 64.
        rows: Elements of a column; they share the serial operand, and each has its own stream of the parallel one.
        columns: Columns of a tile; the elements of a row share the parallel operand.
        tiles: Tiles of the accelerator.
        baseline_tiles: Tiles of conventional elements in the same area, which take one set a cycle.
        window: Positions beyond the cycle's base that a lane's shifter reaches; None for all.
        threshold: A term whose total shift is larger is out of bounds and ends its lane's work; None for no limit.
        fraction_bits: Fraction bits of the accumulator, 1 to 40.
        min_cycles: Least cycles of a set; 2 because two elements share one exponent block.
        run_ahead: Sets that a column may be ahead of the slowest one; None for no limit.
        chunk: Products after which the accumulator is added to an outer sum and cleared, a multiple of `lanes`; None
            for one chunk.
        rounding: Of each cycle's sum to the accumulator: "nearest" (ties to even) or "truncate" (towards zero).
        outer: Format of the outer sum, "float32" or "float64".
        encoding: How a significand becomes terms.
        frequency_mhz: Clock.
    """

    lanes: int = 8
    rows: int = 8
    columns: int = 8
    tiles: int = 36
    baseline_tiles: int = 8
    window: int | None = 3
    threshold: int | None = 12
    fraction_bits: int = 12
    min_cycles: int = 2
    run_ahead: int | None = 1
    chunk: int | None = 64
    rounding: Literal["nearest", "truncate"] = "nearest"
    outer: Literal["float32", "float64"] = "float32"
    encoding: Encoding = "naf"
    frequency_mhz: float = 600.0

    def __post_init__(self) -> None:
        for field, least, most, optional in (
            ("lanes", 1, 64, False),
            ("rows", 1, 256, False),
            ("columns", 1, 256, False),
            ("tiles", 1, 65536, False),
            ("baseline_tiles", 1, 65536, False),
            ("window", 0, 1024, True),
            ("threshold", 0, 1024, True),
            ("fraction_bits", 1, 40, False),
            ("min_cycles", 1, 64, False),
            ("run_ahead", 0, 1024, True),
            ("chunk", 1, 1 << 30, True),
        ):
            value = getattr(self, field)
            if value is None and optional:
                continue
            if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
                allowed = f"a whole number from {least} to {most}" + (" or None" if optional else "")
                raise ValueError(f"{field} is {value!r}; expected {allowed}")
        if self.chunk is not None and self.chunk % self.lanes:
            raise ValueError(f"chunk is {self.chunk}; expected a multiple of the {self.lanes} lanes or None")
        for field, choices in (
            ("rounding", ("nearest", "truncate")),
            ("outer", ("float32", "float64")),
            ("encoding", ENCODINGS),
        ):
            if getattr(self, field) not in choices:
                raise ValueError(f"{field} is {getattr(self, field)!r}; expected one of {', '.join(choices)}")
        if not 0 < self.frequency_mhz < float("inf"):
            raise ValueError(f"frequency_mhz is {self.frequency_mhz}; expected a positive number")

    def seconds(self, cycles: float) -> float:
        """Time of so many cycles at the configured clock."""
        return cycles / (self.frequency_mhz * 1e6)

    @property
    def macs_per_cycle(self) -> int:
        """Products that the conventional accelerator takes in a cycle."""
        return self.lanes * self.rows * self.columns * self.baseline_tiles

    @property
    def break_even(self) -> float:
        """Mean cycles of a set at which both accelerators are equally fast."""
        return self.tiles / self.baseline_tiles

    @property
    def _numbers(self) -> NDArray[np.int64]:
        """The configuration as the kernels take it; -1 for no limit."""
        sets = (1 << 40) if self.chunk is None else self.chunk // self.lanes
        limit, reach = (-1 if value is None else value for value in (self.threshold, self.window))
        exact = int(self.rounding == "nearest"), int(self.outer == "float32")
        return np.array([limit, self.fraction_bits, reach, sets, *exact], dtype=np.int64)

    @property
    def _fits_the_fast_kernel(self) -> bool:
        """Whether the sum of a cycle fits 32 bits: 8 of the factor, threshold + 2 of the term, and the lanes'."""
        return self.threshold is not None and self.threshold <= _DEEPEST - max(0, math.ceil(math.log2(self.lanes)) - 3)


def to_bits(values: ArrayLike) -> Bits:
    """Round to bfloat16, to the nearest with ties to even, and return the bit patterns; subnormals become zero.

    Args:
        values: Numbers that float32 holds.

    Raises:
        ValueError: If a value is NaN or infinite, or becomes infinite.
    """
    rounded = torch.tensor(np.asarray(values, dtype=np.float32)).to(torch.bfloat16)
    if not bool(torch.isfinite(rounded).all()):
        raise ValueError("the values hold NaN or infinity, or too large a number for bfloat16")
    bits = rounded.view(torch.int16).numpy().view(np.uint16)
    return np.where(bits & 0x7F80, bits, bits & 0x8000).astype(np.uint16)


def from_bits(bits: Bits) -> NDArray[np.float32]:
    """The values of bfloat16 bit patterns."""
    return (np.asarray(bits, dtype=np.uint32) << np.uint32(16)).view(np.float32)


def recode(significand: int, encoding: Encoding = "naf") -> list[tuple[int, int]]:
    """The terms of a significand, the most significant first.

    Args:
        significand: A whole number from 0 to 255; a bfloat16 significand with its hidden one, times 128.
        encoding: "naf", the non-adjacent form with the fewest terms; "booth", radix-4 Booth digits, each of which is
            one signed power of two; "ones", the plain bits.

    Returns:
        (sign, power) of each term: the sum of sign * 2**power is the significand.
    """
    if encoding not in ENCODINGS:
        raise ValueError(f"encoding is {encoding!r}; expected one of {', '.join(ENCODINGS)}")
    if not 0 <= significand <= 255:
        raise ValueError(f"significand is {significand}; expected a whole number from 0 to 255")
    found, rest, power = [], significand, 0
    if encoding == "booth":
        for place in range(0, 10, 2):
            triple = (significand << 1) >> place & 7
            digit = (0, 1, 1, 2, -2, -1, -1, 0)[triple]
            if digit:
                found.append((1 if digit > 0 else -1, place + abs(digit) - 1))
        return found[::-1]
    while rest:
        if rest % 2:
            sign = 2 - rest % 4 if encoding == "naf" else 1
            found.append((sign, power))
            rest -= sign
        rest //= 2
        power += 1
    return found[::-1]


@lru_cache(maxsize=3)
def _tables(encoding: Encoding) -> tuple[NDArray[np.int64], NDArray[np.uint32]]:
    """Terms of all significands: (256, 9, 2) shifts and signs, ended by shift 99; (3, 256) words, minus, counts.

    The shift of a term is 7 - power, -1 to 7. Significands below 128 do not occur and have no terms.
    """
    terms = np.zeros((256, 9, 2), dtype=np.int64)
    terms[:, :, 0] = 99
    words = np.zeros((3, 256), dtype=np.uint32)
    for significand in range(128, 256):
        for number, (sign, power) in enumerate(recode(significand, encoding)):
            terms[significand, number] = 7 - power, sign
            words[0, significand] |= np.uint32(1 << (power + _DEEPEST - 7))
            words[1, significand] |= np.uint32(sign < 0) << np.uint32(power + _DEEPEST - 7)
            words[2, significand] += 1
    return terms, words


@lru_cache(maxsize=3)
def _count_table(encoding: Encoding) -> NDArray[np.uint8]:
    """Terms of every bfloat16 bit pattern."""
    bits = np.arange(1 << 16)
    return np.where(bits & 0x7F80, _tables(encoding)[1][2][(bits & 127) | 128], 0).astype(np.uint8)


def term_counts(bits: Bits, encoding: Encoding = "naf") -> NDArray[np.uint8]:
    """Number of terms of each value, 0 to 8; a zero has none."""
    return _count_table(encoding)[bits]


@compiled
def _round_off(value: int, bits: int, nearest: int) -> int:
    """`value` / 2**bits as a whole number: to the nearest, ties to even, or cut off towards zero."""
    if bits <= 0:
        return value << -bits
    if bits > 62:
        return 0
    if nearest:
        return (value + ((1 << (bits - 1)) - 1) + ((value >> bits) & 1)) >> bits
    return value >> bits if value >= 0 else -(-value >> bits)


@compiled
def _magnitude(value: int) -> int:
    """Position of the highest bit of |value|, which is not zero and below 2**53."""
    return int((np.float64(value).view(np.int64) >> 52) & 0x7FF) - 1023


@compiled
def _follow(
    serial: Bits,
    parallel: Bits,
    terms: NDArray[np.int64],
    numbers: NDArray[np.int64],
    spent: NDArray[np.int64],
    counters: NDArray[np.int64],
    shifts: NDArray[np.int64],
    held: NDArray[np.float64],
) -> tuple[float, int]:
    """One element through its sets, one lane after the other: the plain form, for any window and threshold.

    The sum of a cycle is formed in double precision. That is exact unless terms some 40 positions apart meet in it,
    which only a configuration without a threshold lets happen.
    """
    limit, fraction, reach, chunk, nearest, single = numbers
    steps, lanes = serial.shape
    exponent, term = np.zeros(lanes, np.int64), np.zeros(lanes, np.int64)
    accumulator, unit, outer, cycle, highest = 0, 0, 0.0, 0, _NONE
    for step in range(steps):
        largest = _NONE
        for lane in range(lanes):
            a, b = np.int64(serial[step, lane]), np.int64(parallel[step, lane])
            present = (a >> 7) & 255 != 0 and (b >> 7) & 255 != 0
            exponent[lane] = ((a >> 7) & 255) + ((b >> 7) & 255) - 254 if present else _NONE
            term[lane] = 0 if present else 8
            largest = max(largest, exponent[lane])
        highest = max(highest, largest)
        if accumulator != 0:  # move it to the exponent of the largest of it and the products
            largest = max(largest, unit - fraction + _magnitude(accumulator))
            accumulator = _round_off(accumulator, largest - unit, nearest)
        unit = largest
        for lane in range(lanes):
            if exponent[lane] != _NONE:
                counters[0] += np.sum(terms[(serial[step, lane] & 127) | 128, :, 0] < 99)
        while True:
            base = 1 << 30
            for lane in range(lanes):
                shift = terms[(serial[step, lane] & 127) | 128, term[lane], 0] + largest - exponent[lane]
                if term[lane] == 8 or shift >= 99 + largest - exponent[lane] or (limit >= 0 and shift > limit):
                    term[lane] = 8  # no terms left, or this one and all later ones are out of bounds
                else:
                    base = min(base, shift)
            if base == 1 << 30:
                break
            total = 0.0
            for lane in range(lanes):
                if term[lane] == 8:
                    continue
                counters[2] += 1
                a, b = np.int64(serial[step, lane]), np.int64(parallel[step, lane])
                shift = terms[(a & 127) | 128, term[lane], 0] + largest - exponent[lane]
                if shifts.size:
                    shifts[cycle, lane] = shift
                if reach >= 0 and shift - base > reach:
                    continue  # wait: beyond the window
                sign = -1.0 if (a ^ b) >> 15 else 1.0
                total += sign * terms[(a & 127) | 128, term[lane], 1] * math.ldexp(float((b & 127) | 128), base - shift)
                counters[1] += 1
                term[lane] += 1
                if shifts.size:
                    shifts[cycle, lanes + lane] = 1
            value = accumulator + math.ldexp(total, fraction - 7 - base)
            accumulator = int(np.rint(value) if nearest else np.trunc(value))
            spent[step] += 1
            if shifts.size:
                held[cycle] = math.ldexp(float(accumulator), unit - fraction)
            cycle += 1
        if (step + 1) % chunk == 0 or step + 1 == steps:
            outer += math.ldexp(float(accumulator), unit - fraction)
            if single:
                outer = float(np.float32(outer))
            accumulator = 0
    return outer, highest


@compiled
def _run_side_by_side(
    serial: Bits,
    parallel: Bits,
    pairs: NDArray[np.int64],
    filled: NDArray[np.int64],
    words: NDArray[np.uint32],
    numbers: NDArray[np.int64],
    spent: NDArray[np.int16],
    counters: NDArray[np.int64],
    outputs: NDArray[np.float64],
) -> int:
    """Run tiles, all elements of a tile side by side; every inner loop runs over them and becomes vector code.

    A lane's remaining terms are the bits of a word, the most significant highest, shifted right by the distance of its
    product's exponent to the largest one: what falls off at the low end is out of bounds. The highest bit of the union
    of an element's lanes is the base of its cycle; the lanes with a bit in the window below it fire.
    """
    threshold, fraction, reach, chunk, nearest, single = numbers
    columns, steps, lanes = serial.shape[1:]
    if reach < 0:
        reach = 30
    most = columns * parallel.shape[1]
    pending = np.zeros((lanes, most), np.uint32)
    negative = np.zeros((lanes, most), np.uint32)
    factor = np.zeros((lanes, most), np.int32)
    exponent = np.zeros((lanes, most), np.int32)
    word = np.zeros((lanes, columns), np.uint32)
    minus = np.zeros((lanes, columns), np.uint32)
    sign = np.zeros(columns, np.int32)
    column_exponent = np.zeros(columns, np.int32)
    row_exponent = np.zeros(parallel.shape[1], np.int32)
    row_factor = np.zeros(parallel.shape[1], np.int32)
    largest = np.zeros(most, np.int32)
    union = np.zeros(most, np.uint32)
    window = np.zeros(most, np.uint32)
    total = np.zeros(most, np.int32)
    busy = np.zeros(most, np.int32)
    fired = np.zeros(most, np.int32)
    cycles = np.zeros(most, np.int16)
    accumulator = np.zeros(most, np.int64)
    unit = np.zeros(most, np.int64)
    outer = np.zeros(most, np.float64)
    below = 7 + threshold - fraction
    highest = _NONE
    for tile in range(len(pairs)):
        block, partner = pairs[tile]
        width, height = filled[tile]
        size = width * height
        accumulator[:] = 0
        outer[:] = 0.0
        for step in range(steps):
            # Exponents of the products, factors, and the largest exponent of each element.
            for p in range(size):
                largest[p] = _NONE
                cycles[p] = 0
                busy[p] = 0
                fired[p] = 0
                union[p] = 0
            recoded = 0
            for lane in range(lanes):
                present = 0
                for row in range(height):
                    bits = np.int32(parallel[partner, row, step, lane])
                    power = (bits >> 7) & 255
                    value = (bits & 127) | 128
                    present += power != 0
                    row_exponent[row] = power - 254 if power else 2 * _NONE
                    row_factor[row] = 0 if power == 0 else -value if bits >> 15 else value
                for column in range(width):
                    bits = np.int32(serial[block, column, step, lane])
                    power = (bits >> 7) & 255
                    significand = (bits & 127) | 128 if power else 0
                    recoded += int(present * np.int64(words[2, significand]))
                    word[lane, column] = words[0, significand]
                    minus[lane, column] = words[1, significand]
                    column_exponent[column] = power if power else 2 * _NONE
                    sign[column] = -1 if bits >> 15 else 1
                for column in range(width):
                    power, side = column_exponent[column], sign[column]
                    for row in range(height):
                        exponent[lane, column * height + row] = row_exponent[row] + power
                        factor[lane, column * height + row] = side * row_factor[row]
                for p in range(size):
                    largest[p] = max(largest[p], exponent[lane, p])
            # The accumulator moves to the exponent of the largest of it and the products.
            for p in range(size):
                highest = max(highest, int(largest[p]))
                held = accumulator[p]
                if held != 0:
                    top = unit[p] - fraction + _magnitude(held)
                    largest[p] = max(largest[p], top)
                    accumulator[p] = _round_off(held, largest[p] - unit[p], nearest)
                unit[p] = largest[p]
            for lane in range(lanes):
                for column in range(width):
                    own, own_minus = word[lane, column], minus[lane, column]
                    for p in range(column * height, (column + 1) * height):
                        pending[lane, p] = own
                        negative[lane, p] = own_minus
                for p in range(size):
                    distance = np.int32(largest[p] - exponent[lane, p] + (_DEEPEST - threshold))
                    shift = np.uint32(min(distance, np.int32(31)))
                    bits_ = np.uint32(pending[lane, p] >> shift)
                    pending[lane, p] = bits_
                    negative[lane, p] = np.uint32(negative[lane, p] >> shift)
                    union[p] |= bits_
            # The cycles.
            working = True
            while working:
                some = np.uint32(0)
                for p in range(size):
                    bits_ = union[p]
                    some |= bits_
                    cycles[p] += np.int16(bits_ != 0)
                    bits_ |= np.uint32(bits_ >> np.uint32(1))
                    bits_ |= np.uint32(bits_ >> np.uint32(2))
                    bits_ |= np.uint32(bits_ >> np.uint32(4))
                    bits_ |= np.uint32(bits_ >> np.uint32(8))
                    bits_ |= np.uint32(bits_ >> np.uint32(16))
                    window[p] = bits_ & ~np.uint32(bits_ >> np.uint32(reach + 1))
                    total[p] = 0
                    union[p] = 0
                working = some != 0
                if not working:
                    break
                for lane in range(lanes):
                    for p in range(size):
                        left = pending[lane, p]
                        seen = np.uint32(left & window[p])
                        seen |= np.uint32(seen >> np.uint32(1))
                        seen |= np.uint32(seen >> np.uint32(2))
                        if reach > 3:
                            seen |= np.uint32(seen >> np.uint32(4))
                            seen |= np.uint32(seen >> np.uint32(8))
                            seen |= np.uint32(seen >> np.uint32(16))
                        term = np.uint32(seen & ~np.uint32(seen >> np.uint32(1)))
                        signed = np.int32(np.int32(term) - np.int32(2) * np.int32(term & negative[lane, p]))
                        total[p] += np.int32(factor[lane, p] * signed)
                        busy[p] += np.int32(left != 0)
                        fired[p] += np.int32(term != 0)
                        left ^= term
                        pending[lane, p] = left
                        union[p] |= left
                if below > 0 and nearest:
                    half = (1 << (below - 1)) - 1
                    for p in range(size):
                        value_ = (accumulator[p] << below) + total[p]
                        accumulator[p] = (value_ + half + ((value_ >> below) & 1)) >> below
                else:
                    for p in range(size):
                        if below > 0:
                            accumulator[p] = _round_off((accumulator[p] << below) + total[p], below, 0)
                        else:
                            accumulator[p] += np.int64(total[p]) << -below
            if (step + 1) % chunk == 0 or step + 1 == steps:
                for p in range(size):
                    part = math.ldexp(float(accumulator[p]), unit[p] - fraction)
                    outer[p] = np.float32(outer[p] + part) if single else outer[p] + part
                    accumulator[p] = 0
            counters[tile, 0] += recoded
            for p in range(size):
                counters[tile, 1] += fired[p]
                counters[tile, 2] += busy[p]
            if spent.size:
                for p in range(size):
                    spent[tile, step, p // height, p % height] = cycles[p]
        for p in range(size):
            outputs[tile, p // height, p % height] = outer[p]
    return highest


@compiled
def _run_one_by_one(
    serial: Bits,
    parallel: Bits,
    pairs: NDArray[np.int64],
    filled: NDArray[np.int64],
    terms: NDArray[np.int64],
    numbers: NDArray[np.int64],
    spent: NDArray[np.int16],
    counters: NDArray[np.int64],
    outputs: NDArray[np.float64],
) -> int:
    """Run tiles, one element after the other, for the configurations that `_run_side_by_side` cannot hold."""
    steps = serial.shape[2]
    cycles = np.zeros(steps, np.int64)
    shifts, held = np.zeros((0, 0), np.int64), np.zeros(0, np.float64)
    highest = _NONE
    for tile in range(len(pairs)):
        block, partner = pairs[tile]
        for column in range(filled[tile, 0]):
            for row in range(filled[tile, 1]):
                cycles[:] = 0
                a, b = serial[block, column], parallel[partner, row]
                value, top = _follow(a, b, terms, numbers, cycles, counters[tile], shifts, held)
                outputs[tile, column, row] = value
                highest = max(highest, top)
                if spent.size:
                    for step in range(steps):
                        spent[tile, step, column, row] = cycles[step]
    return highest


@compiled
def _synchronise(
    spent: NDArray[np.int16], filled: NDArray[np.int64], least: int, ahead: int, cycles: NDArray[np.int64]
) -> None:
    """Time of each tile: a column takes the time of its slowest row, and may be `ahead` sets before the slowest."""
    tiles, steps = spent.shape[:2]
    finish = np.zeros(spent.shape[2], np.int64)
    last = np.zeros(max(ahead, 0) + 1, np.int64)
    for tile in range(tiles):
        width, height = filled[tile]
        finish[:] = 0
        last[:] = 0
        for step in range(steps):
            slot = step % len(last)
            wait = last[slot] if ahead >= 0 else 0
            last[slot] = 0
            for column in range(width):
                slowest = least
                for row in range(height):
                    slowest = max(slowest, spent[tile, step, column, row])
                finish[column] = max(finish[column], wait) + slowest
                last[slot] = max(last[slot], finish[column])
        cycles[tile] = finish.max()


@dataclass(frozen=True)
class Dot:
    """One dot product on one element, with the log of its cycles.

    Attributes:
        value: What the element returns.
        cycles: Cycles of each set, without the least time of a set, (sets,).
        shift: Shift of each lane's next term in each cycle, -99 where the lane has none, (all cycles, lanes). The shift
            counts from the largest exponent of the set, and so can be -1.
        fired: Whether the lane fired, (all cycles, lanes); a lane with a term that did not fire waited.
        held: Accumulator after each cycle, (all cycles,).
        terms: Terms of the pairs whose factors are both not zero.
        out_of_bounds: Those of them that were dropped.
    """

    value: float
    cycles: NDArray[np.int64]
    shift: NDArray[np.int64]
    fired: NDArray[np.bool_]
    held: NDArray[np.float64]
    terms: int
    out_of_bounds: int

    def table(self) -> pd.DataFrame:
        """One row a fired term: set, cycle (from 0, in all), lane, shift."""
        cycle, lane = np.nonzero(self.fired)
        sets = np.repeat(np.arange(len(self.cycles)), self.cycles)
        return pd.DataFrame({"set": sets[cycle], "cycle": cycle, "lane": lane, "shift": self.shift[cycle, lane]})


def _checked(bits: NDArray, axes: str) -> Bits:
    bits = np.ascontiguousarray(bits)
    if bits.dtype != np.uint16:
        raise ValueError(f"operand has dtype {bits.dtype}; expected uint16, see to_bits")
    if bits.ndim != len(axes.split(", ")) or 0 in bits.shape:
        raise ValueError(f"operand has shape {bits.shape}; expected ({axes}), none of them empty")
    if bool(((bits & 0x7F80) == 0x7F80).any()):
        raise ValueError("operand holds NaN or infinity")
    return bits


def _no_overflow(highest: int) -> None:
    if highest > 127:
        raise ValueError(f"a product has the exponent {highest}; more than 127 overflows, scale the operands")


def dot(serial: ArrayLike, parallel: ArrayLike, config: FPRaker | None = None) -> Dot:
    """Follow one dot product through one element, cycle by cycle; the slow, plain form of `run_tiles`.

    Args:
        serial: The operand that is recoded, (products,) numbers, rounded to bfloat16; filled up with zeros to sets.
        parallel: The other operand, (products,).
        config: The accelerator; the default one if left out.

    Raises:
        ValueError: If the operands differ in length, are empty, hold NaN or infinity, or a product overflows.
    """
    config = config or FPRaker()
    operands = [to_bits(operand) for operand in (serial, parallel)]
    if operands[0].ndim != 1 or operands[0].shape != operands[1].shape or not operands[0].size:
        raise ValueError(
            f"operands have shapes {operands[0].shape} and {operands[1].shape}; expected (products,) twice"
        )
    sets = -(-operands[0].size // config.lanes)
    a, b = (np.pad(o, (0, sets * config.lanes - o.size)).reshape(sets, config.lanes) for o in operands)
    cycles, counters = np.zeros(sets, dtype=np.int64), np.zeros(3, dtype=np.int64)
    log = np.full((sets * config.lanes * 8, 2 * config.lanes), -99, dtype=np.int64)
    held = np.zeros(len(log))
    value, highest = _follow(a, b, _tables(config.encoding)[0], config._numbers, cycles, counters, log, held)
    _no_overflow(highest)
    log, held = log[: cycles.sum()], held[: cycles.sum()]
    fired = log[:, config.lanes :] == 1
    return Dot(value, cycles, log[:, : config.lanes], fired, held, int(counters[0]), int(counters[0] - counters[1]))


@dataclass(frozen=True)
class TileRuns:
    """What tiles did; the cycles of a set are those in which at least one lane of an element had a term.

    Attributes:
        cycles: Time of each tile, (tiles,).
        spent: Cycles of each set in each element, (tiles, sets, columns, rows); before the least time of a set and
            before elements wait for one another.
        values: What each element returns, (tiles, columns, rows).
        filled: Columns and rows that hold work, (tiles, 2).
        terms: Terms of the pairs whose factors are both not zero, (tiles,).
        fired: Those that were processed; the rest was out of bounds.
        busy: Lane-cycles in which a lane had a term, fired or waiting for the window.
    """

    cycles: NDArray[np.int64]
    spent: NDArray[np.int16]
    values: NDArray[np.float64]
    filled: NDArray[np.int64]
    terms: NDArray[np.int64]
    fired: NDArray[np.int64]
    busy: NDArray[np.int64]


def run_tiles(
    serial: Bits,
    parallel: Bits,
    config: FPRaker | None = None,
    *,
    filled: NDArray[np.int64] | None = None,
    threads: int | None = None,
) -> TileRuns:
    """Run tiles to the end of their streams.

    Args:
        serial: The operand that is recoded, (tiles, columns, sets, lanes).
        parallel: The other operand, (tiles, rows, sets, lanes).
        config: The accelerator; the default one if left out. The arrays may hold fewer rows and columns than it has.
        filled: Columns and rows of each tile that hold work, (tiles, 2); all by default.
        threads: Threads to use; by default one a processor, at most `OMP_NUM_THREADS`.

    Raises:
        ValueError: If shapes or types do not fit, or a product overflows.
    """
    config = config or FPRaker()
    serial, parallel = _checked(serial, "tiles, columns, sets, lanes"), _checked(parallel, "tiles, rows, sets, lanes")
    tiles, columns, sets, lanes = serial.shape
    if parallel.shape != (tiles, parallel.shape[1], sets, lanes) or lanes != config.lanes:
        raise ValueError(
            f"operands have shapes {serial.shape} and {parallel.shape}; expected (tiles, columns, sets, lanes) and "
            f"(tiles, rows, sets, lanes) with {config.lanes} lanes"
        )
    rows = parallel.shape[1]
    if columns > config.columns or rows > config.rows:
        raise ValueError(f"{columns} columns and {rows} rows; the tile has {config.columns} and {config.rows}")
    full = np.tile(np.array([columns, rows], dtype=np.int64), (tiles, 1))
    filled = full if filled is None else np.ascontiguousarray(filled, dtype=np.int64)
    if filled.shape != full.shape or (filled < 1).any() or (filled > full).any():
        raise ValueError(f"filled must be {full.shape} whole numbers from 1 to the columns and rows of the operands")
    pairs = np.repeat(np.arange(tiles)[:, None], 2, axis=1)
    spent = np.zeros((tiles, sets, columns, rows), dtype=np.int16)
    counters, values = _run(serial, parallel, pairs, filled, config, spent, threads)
    cycles = np.zeros(tiles, dtype=np.int64)
    ahead = -1 if config.run_ahead is None else config.run_ahead
    _synchronise(spent, filled, config.min_cycles, ahead, cycles)
    return TileRuns(cycles, spent, values, filled, counters[:, 0], counters[:, 1], counters[:, 2])


def _run(
    serial: Bits,
    parallel: Bits,
    pairs: NDArray[np.int64],
    filled: NDArray[np.int64],
    config: FPRaker,
    spent: NDArray[np.int16],
    threads: int | None,
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Run pairs of blocks in the kernel that fits, spread over threads: counters and values."""
    terms, words = _tables(config.encoding)
    numbers = config._numbers
    counters = np.zeros((len(pairs), 3), dtype=np.int64)
    values = np.zeros((len(pairs), serial.shape[1], parallel.shape[1]))

    def run(first: int, last: int) -> int:
        part = slice(first, last)
        rest = (numbers, spent[part], counters[part], values[part])
        if config._fits_the_fast_kernel:
            return _run_side_by_side(serial, parallel, pairs[part], filled[part], words, *rest)
        return _run_one_by_one(serial, parallel, pairs[part], filled[part], terms, *rest)

    share = max(1, -(-len(pairs) // (threads or thread_count())))
    starts = range(0, len(pairs), share)
    if len(starts) == 1:
        tops = [run(0, len(pairs))]
    else:
        with ThreadPoolExecutor(len(starts)) as pool:
            tops = list(pool.map(lambda first: run(first, min(first + share, len(pairs))), starts))
    _no_overflow(max(tops))
    return counters, values


def random_streams(
    sparsity: float,
    *,
    groups: int,
    rows: int,
    steps: int,
    lanes: int = 8,
    seed: int = 0,
    bits: int | None = None,
    relu: bool = False,
) -> Bits:
    """Streams of independent normal values, or of such values on uniform levels.

    Args:
        sparsity: Probability of a zero, 0 to 1, besides those of `relu` and of rounding to levels.
        groups: Tile groups.
        rows: Streams of a group.
        steps: Sets of a stream.
        lanes: Values of a set.
        seed: Seed of the generator.
        bits: None for values of full precision; 2 to 8 for whole levels that reach to three standard deviations, from
            0 to 2**bits - 1 behind a ReLU, else from -(2**(bits - 1) - 1) to 2**(bits - 1) - 1.
        relu: Whether negative values are set to zero.

    Returns:
        bfloat16 patterns, (groups, rows, steps, lanes).
    """
    if not 0 <= sparsity <= 1:
        raise ValueError(f"sparsity is {sparsity}; expected 0 to 1")
    if bits is not None and not 2 <= bits <= 8:
        raise ValueError(f"bits is {bits}; expected None or a whole number from 2 to 8")
    generator = np.random.default_rng(seed)
    values = generator.standard_normal((groups, rows, steps, lanes), dtype=np.float32)
    if relu:
        values = np.maximum(values, 0)
    if bits is not None:
        top = (1 << bits) - 1 if relu else (1 << (bits - 1)) - 1
        values = np.rint(values.clip(-3, 3) / 3 * top)
    return to_bits(np.where(generator.random(values.shape, dtype=np.float32) < sparsity, np.float32(0), values))


def exponent_bits(bits: Bits, axis: int = 1, *, zero_flags: bool = False) -> int:
    """Bits that the exponents of a tensor take when stored as differences to a base.

    Groups of 32 values along the channels (the last of a row may be shorter) keep the first exponent in 8 bits, a width
    in 3 bits, and the difference of every value to the base in that width, signed. Widths are 0 to 6; differences that
    need more are not worth it, and the group keeps its exponents as they are. The exponent of a zero is 0.

    Args:
        bits: bfloat16 patterns.
        axis: The channels.
        zero_flags: Store one bit a value that marks zeros, and only the exponents of the others.
    """
    exponents = np.moveaxis(((np.asarray(bits) >> np.uint16(7)) & np.uint16(255)).astype(np.uint8), axis, -1)
    lines = exponents.reshape(-1, exponents.shape[-1])
    total = 0
    for first in range(0, lines.shape[1], _GROUP):
        group = lines[:, first : first + _GROUP].astype(np.int16)
        counted = (group != 0) if zero_flags else np.ones_like(group, dtype=np.bool_)
        values = counted.sum(axis=1)
        base = np.take_along_axis(group, counted.argmax(axis=1)[:, None], axis=1)
        difference = np.where(counted, group - base, 0)
        # A signed number d fits w bits if -2**(w - 1) <= d < 2**(w - 1): w - 1 bits for d, or for -d - 1 below zero.
        reach = np.maximum(difference, -difference - 1).max(axis=1)
        width = np.where((difference == 0).all(axis=1), 0, np.frexp(reach.astype(np.float64))[1] + 1)
        cost = np.where(width > 6, 3 + 8 * values, 11 + width * values)
        total += int(np.where(values > 0, cost, 3).sum()) + (group.size if zero_flags else 0)
    return total


@dataclass(frozen=True)
class _Prepared:
    """A layer's trace in bfloat16, and what does not depend on the accelerator."""

    entry: LayerTrace
    bits: Mapping[Operand, Bits]
    exponents: Mapping[Operand, int]

    @classmethod
    def of(cls, entry: LayerTrace) -> _Prepared:
        missing = [operand for operand in _OPERANDS if operand not in entry.values]
        if missing:
            raise ValueError(
                f"layer {entry.layer.name!r} was traced without values of {', '.join(missing)}; "
                "capture with values=True"
            )
        bits = {operand: to_bits(entry.values[operand]) for operand in _OPERANDS}
        return cls(entry, bits, {operand: exponent_bits(bits[operand]) for operand in _OPERANDS})


def _prepare(trace: Trace | LayerTrace) -> list[_Prepared]:
    return [_Prepared.of(entry) for entry in ((trace,) if isinstance(trace, LayerTrace) else trace.layers)]


def operand_table(trace: Trace | LayerTrace, encoding: Encoding = "naf") -> pd.DataFrame:
    """What the operands of the layers are made of, whatever the accelerator.

    Args:
        trace: The operands of a network, or of one layer, with values.
        encoding: How a significand becomes terms.

    Returns:
        One row a layer and operand: layer, operand, values, zeros, terms (all counts); exponent_bits with base and
        differences and flagged_bits with flags for zeros as well, against 8 bits a value; term_sparsity (one minus the
        mean number of terms over 8) and exponent_ratio.
    """
    return _operands(_prepare(trace), encoding)


def _operands(layers: Iterable[_Prepared], encoding: Encoding = "naf") -> pd.DataFrame:
    rows = []
    for layer in layers:
        for operand, bits in layer.bits.items():
            rows.append(
                {
                    "layer": layer.entry.layer.name,
                    "operand": operand,
                    "values": bits.size,
                    "zeros": int(np.count_nonzero(bits & 0x7F80 == 0)),
                    "terms": int(term_counts(bits, encoding).sum(dtype=np.int64)),
                    "exponent_bits": layer.exponents[operand],
                    "flagged_bits": exponent_bits(bits, zero_flags=True),
                }
            )
    return _with_shares(pd.DataFrame(rows))


_OPERAND_SUMS = ["values", "zeros", "terms", "exponent_bits", "flagged_bits"]


def _with_shares(frame: pd.DataFrame) -> pd.DataFrame:
    return frame.assign(
        sparsity=frame["zeros"] / frame["values"],
        term_sparsity=1 - frame["terms"] / (8 * frame["values"]),
        exponent_ratio=frame["exponent_bits"] / (8 * frame["values"]),
        flagged_ratio=frame["flagged_bits"] / (8 * frame["values"]),
    )


def dense_cycles(layer: Layer, product: Product, config: FPRaker | None = None, *, batch: int = 1) -> float:
    """Cycles of a product on the conventional accelerator, all tiles sharing the work evenly.

    Args:
        layer: The layer.
        product: The product.
        config: The accelerator; the default one if left out.
        batch: Images, or samples of a linear layer.
    """
    config = config or FPRaker()
    shapes: dict[Operand, tuple[int, ...]] = {
        "input": (batch, layer.in_channels, *layer.in_size),
        "weight": layer.weight_shape,
        "grad_output": (batch, layer.out_channels, *layer.out_size),
    }
    if layer.kind == "linear":
        shapes = {name: shape[:2] for name, shape in shapes.items()}
    empty = {name: np.broadcast_to(np.uint16(0), shape) for name, shape in shapes.items()}
    source = TileSource(layer, product, empty, lanes=config.lanes)
    return sum(count * steps for _, count, steps in _tiles_of(source, True, config)) / config.baseline_tiles


def _tiles_of(source: TileSource, first_serial: bool, config: FPRaker) -> list[tuple[tuple[int, int], int, int]]:
    """For each phase: blocks of the serial and of the parallel side, tiles, and sets of a tile."""
    found = []
    for streams in source.phases:
        serial, parallel = (streams.first, streams.second) if first_serial else (streams.second, streams.first)
        blocks = -(-serial // config.columns), -(-parallel // config.rows)
        found.append((blocks, streams.batches * blocks[0] * blocks[1], streams.steps))
    return found


_COUNTS = [
    "macs",
    "sets",
    "dense_cycles",
    "cycles",
    "ideal_cycles",
    "slots",
    "useful",
    "no_terms",
    "shift_range",
    "inter_pe",
    "exponent",
    "empty",
    "term_slots",
    "zero_terms",
    "partner_zero",
    "out_of_bounds",
]
_ENERGIES = ["core_dense", "core", "buffer", "dram", "dram_compressed"]
_SUMS = [*_COUNTS, "variance", *_ENERGIES]


def simulate(
    trace: Trace | LayerTrace,
    config: FPRaker | None = None,
    *,
    products: Iterable[Product] = PRODUCTS,
    samples: int | None = 32,
    seed: int = 0,
    access: AccessEnergy | None = None,
    minibatch: int | None = None,
    threads: int | None = None,
) -> pd.DataFrame:
    """Run the traced products of every layer and count cycles, lane-cycles by cause, terms and energy.

    For each product the operand with the larger share of zero terms is serial. Tiles share the work evenly. Where a
    product has more than `samples` tiles, so many are drawn without replacement and every count is scaled by the sets
    of all tiles over those of the drawn ones; `error` is the standard error of the cycles. Memory: about 20 MB beside
    the trace and its copy in bfloat16.

    Args:
        trace: The operands of a network, or of one layer, with values.
        config: The accelerator; the default one if left out.
        products: The products to run; a layer without an input gradient has no dgrad.
        samples: Tiles to draw for each layer and product, at least 2; None runs all.
        seed: Seed of the draw.
        access: Relative energy of an access.
        minibatch: Samples that share one transfer of the weights from and to DRAM; by default those of the trace.
        threads: Threads to use.

    Returns:
        One row a layer and product: layer, kind, product, side (the serial operand), sparsity and term_sparsity (of
        it), macs, tiles, sampled, sets, dense_cycles, cycles, error (relative) and variance, ideal_cycles (if no
        element waited for another), speedup, ideal, utilisation, value_error (norm of the difference of the emulated
        values to those of float64 over the norm of these, in the drawn tiles); lane-cycles `slots` = useful + no_terms
        + shift_range + inter_pe + exponent + empty (elements without a stream); term_slots, 8 a product, = useful +
        zero_terms + partner_zero + out_of_bounds; and energies in units of one bfloat16 multiply-accumulate:
        core_dense, core, buffer, dram, dram_compressed (exponents as differences to a base).

    Raises:
        ValueError: If the trace has no values, or `samples` or `minibatch` is too small.
    """
    if minibatch is not None and minibatch < 1:
        raise ValueError(f"minibatch is {minibatch}; expected at least 1")
    if samples is not None and samples < 2:
        raise ValueError(f"samples is {samples}; expected at least 2, for the error, or None")
    return _simulate(
        _prepare(trace), config or FPRaker(), set(products), samples, seed, access or AccessEnergy(), minibatch, threads
    )


def _simulate(
    layers: Iterable[_Prepared],
    config: FPRaker,
    products: set[Product],
    samples: int | None,
    seed: int,
    access: AccessEnergy,
    minibatch: int | None,
    threads: int | None,
) -> pd.DataFrame:
    rows = []
    for layer in layers:
        means = {side: float(term_counts(bits, config.encoding).mean()) for side, bits in layer.bits.items()}
        share = layer.entry.batch / (minibatch or layer.entry.batch)
        for product in layer.entry.layer.products:
            if product in products:
                side = min(SIDES[product], key=lambda operand: means[operand])  # the first of equals
                counts = _simulate_product(layer, product, side, config, samples, seed, threads)
                counts["term_sparsity"] = 1 - means[side] / 8
                rows.append(counts | _energies(layer, counts, config, access, share))
    return pd.DataFrame(rows)


def _blocks(
    source: TileSource, first_serial: bool, config: FPRaker, chosen: NDArray[np.int64]
) -> Iterator[tuple[Bits, Bits, NDArray[np.int64], list[tuple[int, int, NDArray[np.int64], NDArray[np.int64]]]]]:
    """The operands of the chosen tiles, some thousand sets at a time: serial, parallel, filled, and the streams."""
    start = 0
    for phase, (blocks, count, steps) in enumerate(_tiles_of(source, first_serial, config)):
        here = chosen[(chosen >= start) & (chosen < start + count)] - start
        start += count
        streams = source.phases[phase]
        lengths = (streams.first, streams.second) if first_serial else (streams.second, streams.first)
        at_once = max(1, _SETS_AT_ONCE // steps)
        for group in (here[i : i + at_once] for i in range(0, len(here), at_once)):
            serial = np.zeros((len(group), config.columns, steps, config.lanes), dtype=np.uint16)
            parallel = np.zeros((len(group), config.rows, steps, config.lanes), dtype=np.uint16)
            filled = np.zeros((len(group), 2), dtype=np.int64)
            places = []
            for number, tile in enumerate(group.tolist()):
                rest, other = divmod(tile, blocks[1])
                batch, own = divmod(rest, blocks[0])
                columns = np.arange(own * config.columns, min((own + 1) * config.columns, lengths[0]))
                rows = np.arange(other * config.rows, min((other + 1) * config.rows, lengths[1]))
                places.append((phase, batch, *((columns, rows) if first_serial else (rows, columns))))
                sides = source.operands(*places[-1])
                a, b = sides if first_serial else sides[::-1]
                serial[number, : len(a)], parallel[number, : len(b)] = a, b
                filled[number] = len(a), len(b)
            yield serial, parallel, filled, places


def _simulate_product(
    prepared: _Prepared,
    product: Product,
    side: Operand,
    config: FPRaker,
    samples: int | None,
    seed: int,
    threads: int | None,
) -> dict[str, Any]:
    layer, bits = prepared.entry.layer, prepared.bits
    first_serial = side == SIDES[product][0]
    source = TileSource(layer, product, {name: bits[name] for name in SIDES[product]}, lanes=config.lanes)
    phases = _tiles_of(source, first_serial, config)
    tiles = sum(count for _, count, _ in phases)
    all_sets = sum(count * steps for _, count, steps in phases)
    chosen = np.arange(tiles)
    if samples is not None and samples < tiles:
        generator = np.random.default_rng([seed, zlib.crc32(layer.name.encode()), PRODUCTS.index(product)])
        chosen = np.sort(generator.choice(tiles, samples, replace=False, shuffle=False))
    sums = dict.fromkeys(
        ("useful", "no_terms", "shift_range", "inter_pe", "exponent", "empty", "term_slots", "terms", "recoded"), 0
    )
    cycles, sets, ideal, wrong, right = [], [], 0.0, 0.0, 0.0
    for serial, parallel, filled, _ in _blocks(source, first_serial, config, chosen):
        runs = run_tiles(serial, parallel, config, filled=filled, threads=threads)
        steps, elements = serial.shape[2], filled.prod(axis=1)
        inside = (np.arange(config.columns)[None, :, None] < filled[:, :1, None]) & (
            np.arange(config.rows)[None, None, :] < filled[:, 1:, None]
        )
        own = runs.spent.sum(axis=1, dtype=np.int64)
        least = np.maximum(runs.spent, config.min_cycles).sum(axis=1, dtype=np.int64)
        own, least = (np.where(inside, time, 0).sum(axis=(1, 2)) for time in (own, least))
        lanes = config.lanes
        sums["useful"] += int(runs.fired.sum())
        sums["shift_range"] += int((runs.busy - runs.fired).sum())
        sums["no_terms"] += int((lanes * own - runs.busy).sum())
        sums["exponent"] += int(lanes * (least - own).sum())
        sums["inter_pe"] += int(lanes * (elements * runs.cycles - least).sum())
        sums["empty"] += int(lanes * ((config.rows * config.columns - elements) * runs.cycles).sum())
        sums["term_slots"] += int(8 * lanes * steps * elements.sum())
        sums["terms"] += int(runs.terms.sum())
        each = term_counts(serial, config.encoding).sum(axis=(1, 2, 3), dtype=np.int64)
        sums["recoded"] += int((each * filled[:, 1]).sum())
        ideal += float((least / elements).sum())
        cycles.append(runs.cycles)
        sets.append(np.full(len(runs.cycles), steps))
        exact = np.einsum("tcsl,trsl->tcr", *(from_bits(o).astype(np.float64) for o in (serial, parallel)))
        wrong += float(((runs.values - exact) ** 2).sum())
        right += float((exact**2).sum())
    spent, length = np.concatenate(cycles), np.concatenate(sets)
    scale = all_sets / int(length.sum())
    rest = spent - length * (spent.sum() / length.sum())
    spread = (1 - len(chosen) / tiles) * len(chosen) * float((rest**2).sum()) / max(1, len(chosen) - 1)
    total = scale * float(spent.sum())
    dense = all_sets / config.baseline_tiles
    slots = {
        name: scale * sums[name] for name in ("useful", "no_terms", "shift_range", "inter_pe", "exponent", "empty")
    }
    return {
        "layer": layer.name,
        "kind": layer.kind,
        "product": product,
        "side": side,
        "sparsity": float(np.mean(bits[side] & 0x7F80 == 0)),
        "term_sparsity": 0.0,
        "macs": layer.macs * prepared.entry.batch,
        "tiles": tiles,
        "sampled": len(chosen),
        "sets": all_sets,
        "dense_cycles": dense,
        "cycles": total / config.tiles,
        "error": math.sqrt(spread) / float(spent.sum()),
        "variance": (scale * math.sqrt(spread) / config.tiles) ** 2,
        "ideal_cycles": scale * ideal / config.tiles,
        "speedup": dense * config.tiles / total,
        "ideal": dense * config.tiles / (scale * ideal),
        "utilisation": slots["useful"] / sum(slots.values()),
        "value_error": math.sqrt(wrong / right) if right else 0.0,
        "slots": sum(slots.values()),
        **slots,
        "term_slots": scale * sums["term_slots"],
        "zero_terms": scale * (sums["term_slots"] - sums["recoded"]),
        "partner_zero": scale * (sums["recoded"] - sums["terms"]),
        "out_of_bounds": scale * (sums["terms"] - sums["useful"]),
    }


def _energies(
    layer: _Prepared, counts: dict[str, Any], config: FPRaker, access: AccessEnergy, weight_share: float
) -> dict[str, float]:
    """Energies of a product, in units of one bfloat16 multiply-accumulate of the conventional accelerator.

    Our accounting: a tile reads the values of its columns and rows from the shared buffer once a set, alike in both
    accelerators; DRAM moves both operands in and the output out once, the weights and their gradient once a minibatch.
    """
    power = (config.tiles * FPRAKER_TILE.total("power_mw")) / (config.baseline_tiles * BFLOAT16_TILE.total("power_mw"))
    core = access.mac * config.macs_per_cycle
    # Two of the three tensors are the operands of a product; the third has the shape of its output.
    shares: dict[Operand, float] = {"input": 1.0, "grad_output": 1.0, "weight": weight_share}
    plain = sum(share * layer.bits[name].size for name, share in shares.items())
    packed = sum(share * (layer.bits[name].size + layer.exponents[name] / 8) / 2 for name, share in shares.items())
    return {
        "core_dense": core * counts["dense_cycles"],
        "core": core * counts["cycles"] * power,
        "buffer": access.buffer * counts["sets"] * config.lanes * (config.rows + config.columns),
        "dram": access.dram * plain,
        "dram_compressed": access.dram * packed,
    }


def summarise(frame: pd.DataFrame, by: Sequence[str] = ()) -> pd.DataFrame:
    """Sum the rows of `simulate`, and form the ratios from the sums: never the mean of the layers' ratios.

    Args:
        frame: What `simulate` returned; columns such as network or epoch may have been added.
        by: Columns to group by; none sums everything into one row.

    Returns:
        One row a group with the sums of the counts and energies, and speedup, ideal, utilisation, error (relative
        standard error of the cycles, from the draw of the tiles), core_efficiency and total_efficiency (energy of the
        conventional accelerator over FPRaker, cores alone, and with memory, whose exponents FPRaker compresses).
    """
    groups = frame.groupby(list(by), sort=False, observed=True)[_SUMS].sum() if by else frame[_SUMS].sum().to_frame().T
    dense = groups["core_dense"] + groups["buffer"] + groups["dram"]
    result = groups.assign(
        speedup=groups["dense_cycles"] / groups["cycles"],
        ideal=groups["dense_cycles"] / groups["ideal_cycles"],
        utilisation=groups["useful"] / groups["slots"],
        error=np.sqrt(groups["variance"]) / groups["cycles"],
        core_efficiency=groups["core_dense"] / groups["core"],
        total_efficiency=dense / (groups["core"] + groups["buffer"] + groups["dram_compressed"]),
    )
    return result.reset_index(drop=not by)


def narrowest(
    trace: Trace | LayerTrace,
    config: FPRaker | None = None,
    *,
    widths: Sequence[int] = (4, 5, 6, 7, 8, 9, 10, 11, 12),
    tolerance: float = 2**-9,
    samples: int = 8,
    seed: int = 0,
) -> pd.DataFrame:
    """The narrowest accumulator of each layer and product that keeps its values within a tolerance.

    Accumulator width and threshold go together: fewer fraction bits drop more terms. The tolerance bounds
    `value_error`, and its default is half a unit in the last place of a bfloat16 result.

    Args:
        trace: The operands of a network, or of one layer, with values.
        config: The accelerator whose `threshold` and `fraction_bits` are replaced.
        widths: Fraction bits to try, ascending.
        tolerance: Largest `value_error`; the widest accumulator is taken where none keeps it.
        samples: Tiles to draw for each layer and product.
        seed: Seed of the draw.

    Returns:
        The rows of `simulate` at the chosen widths, with the column width.
    """
    if not widths or list(widths) != sorted(set(widths)):
        raise ValueError(f"widths are {list(widths)}; expected different whole numbers in ascending order")
    config = config or FPRaker()
    layers, access = _prepare(trace), AccessEnergy()
    tried = []
    for width in widths:
        narrow = replace(config, threshold=width, fraction_bits=width)
        tried.append(_simulate(layers, narrow, set(PRODUCTS), samples, seed, access, None, None).assign(width=width))
    chosen = []
    for place in range(len(tried[0])):
        rows = [frame.iloc[[place]] for frame in tried]
        chosen.append(next((row for row in rows if row["value_error"].iloc[0] <= tolerance), rows[-1]))
    return pd.concat(chosen, ignore_index=True)


def value_check(
    layer: Layer,
    config: FPRaker | None = None,
    *,
    sparsity: float = 0.3,
    batch: int = 2,
    samples: int = 4,
    seed: int = 0,
) -> pd.DataFrame:
    """Compute output values on emulated tiles, and compare them with PyTorch's.

    The operands are whole numbers from -8 to 8: chunks of 64 products fit the accumulator of the default configuration,
    so that its sums are exact, and every term must be applied once and none dropped.

    Args:
        layer: The layer.
        config: The accelerator.
        sparsity: Share of zeros in all three operands.
        batch: Images, or samples of a linear layer.
        samples: Tiles to run for each product and serial side.
        seed: Seed of the operands and of the choice of tiles.

    Returns:
        One row a value: product, side (the serial operand), emulated and expected.
    """
    config = config or FPRaker()
    generator = np.random.default_rng(seed)

    def integers(*shape: int) -> Tensor:
        values = generator.integers(1, 9, shape) * generator.choice([-1, 1], shape)
        return torch.tensor(np.where(generator.random(shape) < sparsity, 0, values), dtype=torch.float64)

    image = layer.batch_as_image(batch) if layer.kind == "linear" else layer
    images = 1 if layer.kind == "linear" else batch
    x = integers(images, image.in_channels, *image.in_size).requires_grad_()
    w = integers(*image.weight_shape).requires_grad_()
    out = F.conv2d(x, w, None, image.stride, image.padding, image.dilation, image.groups)
    gy = integers(*out.shape)
    (gx,) = torch.autograd.grad(out, x, gy, retain_graph=True)
    # A tile makes one image's share of the gradient of the weights.
    gw = torch.stack(
        [torch.autograd.grad(out, w, gy * (torch.arange(images) == i)[:, None, None, None], retain_graph=True)[0]
         for i in range(images)]
    )  # fmt: skip
    tensors: dict[Operand, NDArray] = {
        "input": x.detach().numpy(),
        "weight": w.detach().numpy(),
        "grad_output": gy.numpy(),
    }
    expected = {"forward": out.detach().numpy(), "dgrad": gx.numpy(), "wgrad": gw.numpy()}
    frames = []
    for product in PRODUCTS:
        source = TileSource(image, product, {n: to_bits(tensors[n]) for n in SIDES[product]}, lanes=config.lanes)
        for first_serial, side in zip((True, False), SIDES[product], strict=True):
            tiles = sum(count for _, count, _ in _tiles_of(source, first_serial, config))
            chosen = np.sort(generator.choice(tiles, min(samples, tiles), replace=False))
            for serial, parallel, filled, places in _blocks(source, first_serial, config, chosen):
                runs = run_tiles(serial, parallel, config, filled=filled)
                for values, (columns, rows), place in zip(runs.values, filled, places, strict=True):
                    want = expected[product][source.outputs(*place)]
                    found = values[:columns, :rows]
                    found = (found if first_serial else found.T).ravel()
                    frames.append(
                        pd.DataFrame({"product": product, "side": side, "emulated": found, "expected": want.ravel()})
                    )
    return pd.concat(frames, ignore_index=True)


def cycle_report(
    trace: Trace, configs: Mapping[str, FPRaker], *, samples: int | None = 32, minibatch: int | None = None
) -> dict[str, float]:
    """What a training run logs of a trace: the sums of `summarise` and of `operand_table`.

    Args:
        trace: The trace, with values.
        configs: Name -> accelerator.
        samples: See `simulate`.
        minibatch: See `simulate`.

    Returns:
        Numbers by "configuration/product/quantity" and by "operands/operand/quantity"; `read_report` and
        `read_operands` make tables of them again.
    """
    layers = _prepare(trace)
    report: dict[str, float] = {}
    for name, config in configs.items():
        frame = _simulate(layers, config, set(PRODUCTS), samples, 0, AccessEnergy(), minibatch, None)
        for row in summarise(frame, ["product"]).to_dict("records"):
            report |= {f"{name}/{row['product']}/{quantity}": float(row[quantity]) for quantity in _SUMS}
    sums = _operands(layers).groupby("operand", sort=False)[_OPERAND_SUMS].sum()
    for operand, row in sums.iterrows():
        report |= {f"operands/{operand}/{quantity}": float(row[quantity]) for quantity in _OPERAND_SUMS}
    return report


def read_report(frame: pd.DataFrame, keep: Sequence[str] = ("arm", "seed", "epoch")) -> pd.DataFrame:
    """Turn the columns that `cycle_report` logged of the products into a tidy table.

    Args:
        frame: A table with columns named "configuration/product/quantity" beside others.
        keep: Columns to keep.

    Returns:
        One row a row of `frame`, configuration and product: the kept columns, config, product, and the quantities,
        ready for `summarise`.
    """
    return read_products(frame, keep, _SUMS, "FPRaker/forward/cycles")


def read_operands(frame: pd.DataFrame, keep: Sequence[str] = ("arm", "seed", "epoch")) -> pd.DataFrame:
    """Turn the columns that `cycle_report` logged of the operands into a tidy table.

    Args:
        frame: A table with columns named "operands/operand/quantity" beside others.
        keep: Columns to keep.

    Returns:
        One row a row of `frame` and operand, with the sums and shares of `operand_table`.
    """
    names = [column for column in frame.columns if column.startswith("operands/")]
    wide = read_columns(frame, keep, names, ["table", "operand", "quantity"], "FPRaker/forward/cycles")
    return _with_shares(wide.drop(columns="table"))


def matmul(
    serial: ArrayLike, parallel: ArrayLike, config: FPRaker | None = None, *, threads: int | None = None
) -> NDArray[np.float64]:
    """Matrix product on emulated elements, to the last bit what they would return.

    Args:
        serial: (M, K) numbers, rounded to bfloat16 and recoded; K is filled up with zeros to whole sets.
        parallel: (N, K) numbers, rounded to bfloat16.
        config: The accelerator; the default one if left out.
        threads: Threads to use.

    Returns:
        `serial` times the transpose of `parallel`, (M, N).

    Raises:
        ValueError: If the shapes do not fit, a value is NaN or infinite, or a product overflows.
    """
    config = config or FPRaker()
    a, b = to_bits(serial), to_bits(parallel)
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1] or 0 in (*a.shape, *b.shape):
        raise ValueError(
            f"operands have shapes {a.shape} and {b.shape}; expected (M, K) and (N, K), none of them empty"
        )
    sets = -(-a.shape[1] // config.lanes)

    def blocks(bits: Bits, size: int) -> Bits:
        count = -(-len(bits) // size)
        padded = np.zeros((count * size, sets * config.lanes), dtype=np.uint16)
        padded[: len(bits), : bits.shape[1]] = bits
        return padded.reshape(count, size, sets, config.lanes)

    columns, rows = blocks(a, config.columns), blocks(b, config.rows)
    pairs = np.stack(np.meshgrid(np.arange(len(columns)), np.arange(len(rows)), indexing="ij"), axis=-1).reshape(-1, 2)
    sizes = np.minimum([config.columns, config.rows], [len(a), len(b)] - pairs * [config.columns, config.rows])
    nothing = np.zeros((len(pairs), 0, 0, 0), dtype=np.int16)
    _, values = _run(columns, rows, pairs, np.ascontiguousarray(sizes), config, nothing, threads)
    whole = values.reshape(len(columns), len(rows), config.columns, config.rows).transpose(0, 2, 1, 3)
    return whole.reshape(len(columns) * config.columns, -1)[: len(a), : len(b)]


@dataclass(frozen=True)
class Arithmetic:
    """How the matrix products of a network in training are computed.

    Attributes:
        kind: "float32"; "bfloat16", operands and results rounded to bfloat16 and sums in float32; "exact", the same
            with the sums of emulated elements; "chunked", fast and close: the sum of each chunk in float32, then
            rounded to a grid of 2**-grid_bits times the product of the norms of the chunk's operands. The grid is the
            pessimistic side: its error is no smaller than that of the elements.
        config: The accelerator.
        grid_bits: Bits of the grid of "chunked".
    """

    kind: Literal["float32", "bfloat16", "exact", "chunked"] = "exact"
    config: FPRaker = FPRaker()
    grid_bits: int = 12

    def __post_init__(self) -> None:
        if self.kind not in ("float32", "bfloat16", "exact", "chunked"):
            raise ValueError(f"kind is {self.kind!r}; expected one of float32, bfloat16, exact, chunked")
        if not 1 <= self.grid_bits <= 40:
            raise ValueError(f"grid_bits is {self.grid_bits}; expected 1 to 40")

    def __call__(self, a: Tensor, b: Tensor) -> Tensor:
        """`a` (M, K) times the transpose of `b` (N, K), in float32."""
        if self.kind == "float32":
            return a @ b.T
        a, b = a.to(torch.bfloat16).float(), b.to(torch.bfloat16).float()
        return self.sums(a, b).to(torch.bfloat16).float()

    def sums(self, a: Tensor, b: Tensor) -> Tensor:
        """The same for operands that bfloat16 holds, before the result is rounded to it."""
        if self.kind in ("float32", "bfloat16"):
            return a @ b.T
        if self.kind == "exact":
            return torch.from_numpy(matmul(a.numpy(), b.numpy(), self.config)).float()
        length = self.config.chunk or a.shape[1]
        chunks = -(-a.shape[1] // length)
        a, b = (F.pad(o, (0, chunks * length - o.shape[1])).reshape(len(o), chunks, length) for o in (a, b))
        grid = torch.einsum("mc,nc->cmn", a.norm(dim=2), b.norm(dim=2)).mul_(2.0**-self.grid_bits).clamp_(min=1e-38)
        return torch.bmm(a.transpose(0, 1), b.permute(1, 2, 0)).div_(grid).round_().mul_(grid).sum(0)


class _Product(torch.autograd.Function):
    """`x` (M, K) times the transpose of `w` (N, K); all three products of training in the given arithmetic."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, arithmetic: Arithmetic) -> Tensor:
        ctx.save_for_backward(x, w)
        ctx.arithmetic = arithmetic
        return arithmetic(x, w)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, w = ctx.saved_tensors
        (gy,) = gradients
        gx = ctx.arithmetic(gy, w.T.contiguous()) if ctx.needs_input_grad[0] else None
        gw = ctx.arithmetic(gy.T.contiguous(), x.T.contiguous()) if ctx.needs_input_grad[1] else None
        return gx, gw, None


class _EmulatedLinear(nn.Linear):
    """A linear layer whose matrix products are computed in a given arithmetic; the bias is added in float32."""

    arithmetic: Arithmetic

    def forward(self, x: Tensor) -> Tensor:
        """(..., C) to (..., K)."""
        y = _Product.apply(x.reshape(-1, x.shape[-1]), self.weight, self.arithmetic)
        y = y.reshape(*x.shape[:-1], self.out_features)
        return y if self.bias is None else y + self.bias


class _EmulatedConv2d(nn.Conv2d):
    """A convolution as a matrix product of its windows, in a given arithmetic.

    The gradient of the input is summed over the channels in that arithmetic, and over the kernel taps in float32.
    """

    arithmetic: Arithmetic

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to (B, K, OH, OW)."""
        padding = (int(self.padding[0]), int(self.padding[1]))  # `emulate` refuses words
        windows = F.unfold(x, self.kernel_size, self.dilation, padding, self.stride)  # (B, C kh kw, P)
        size = [
            (x.shape[2 + i] + 2 * padding[i] - self.dilation[i] * (self.kernel_size[i] - 1) - 1) // self.stride[i] + 1
            for i in range(2)
        ]
        flat = windows.transpose(1, 2).reshape(-1, windows.shape[1])
        y = _Product.apply(flat, self.weight.flatten(1), self.arithmetic)
        y = y.reshape(len(x), -1, self.out_channels).transpose(1, 2).reshape(len(x), self.out_channels, *size)
        return y if self.bias is None else y + self.bias[:, None, None]


def emulate(model: nn.Module, arithmetic: Arithmetic) -> nn.Module:
    """Let every convolution and linear layer of a model compute in a given arithmetic, forward and backward.

    The layers are replaced by ones that share their parameters, in place. With "float32" nothing is changed.

    Args:
        model: The model; on the processor, not on a GPU.
        arithmetic: The arithmetic.

    Raises:
        ValueError: If a convolution has groups, or pads with a word or with something other than zeros.
    """
    if arithmetic.kind == "float32":
        return model
    for name, module in list(model.named_modules()):
        new: _EmulatedLinear | _EmulatedConv2d
        if type(module) is nn.Linear:
            new = _EmulatedLinear(module.in_features, module.out_features, module.bias is not None)
        elif type(module) is nn.Conv2d:
            if module.groups != 1 or isinstance(module.padding, str) or module.padding_mode != "zeros":
                raise ValueError(f"layer {name!r}: only convolutions without groups and with numbers as padding")
            fields = (module.kernel_size, module.stride, module.padding, module.dilation)
            kernel, stride, padding, dilation = ((field[0], field[1]) for field in fields)
            new = _EmulatedConv2d(
                module.in_channels, module.out_channels, kernel, stride, padding, dilation, bias=module.bias is not None
            )
        else:
            continue
        new.weight, new.bias, new.arithmetic = module.weight, module.bias, arithmetic
        parent, _, own = name.rpartition(".")
        setattr(model.get_submodule(parent), own, new)
    return model


class _Levels(torch.autograd.Function):
    """Round to whole multiples of a step between two bounds; the gradient passes inside the bounds."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, step: Tensor, low: int, high: int) -> Tensor:
        places = x / step
        ctx.save_for_backward((places >= low) & (places <= high))
        return places.round().clamp(low, high) * step

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        (inside,) = ctx.saved_tensors
        return gradients[0] * inside, None, None, None


class _WeightLevels(nn.Module):
    """Weights on 2**bits - 1 symmetric levels; the step is a power of two, the outer level near 2.5 deviations."""

    def __init__(self, bits: int) -> None:
        super().__init__()
        self.top = 2 ** (bits - 1) - 1

    def forward(self, weight: Tensor) -> Tensor:
        """Any shape, unchanged."""
        step = torch.exp2(torch.log2(2.5 * weight.detach().std() / self.top).round())
        return _Levels.apply(weight, step, -self.top, self.top)


class _ClippedReLU(nn.Module):
    """ReLU with a learned clip, on 2**bits levels whose step is a power of two."""

    def __init__(self, bits: int) -> None:
        super().__init__()
        self.top = 2**bits - 1
        self.clip = nn.Parameter(torch.tensor(4.0))

    def forward(self, x: Tensor) -> Tensor:
        """Any shape, unchanged."""
        clipped = torch.minimum(F.relu(x), self.clip)  # the clip learns where values reach it
        step = torch.exp2(torch.log2(self.clip.detach() / self.top).round())
        return _Levels.apply(clipped, step, 0, self.top)


def quantise(model: nn.Module, bits: int = 4) -> nn.Module:
    """Train a network on few levels: weights and activations on uniform levels, straight-through gradients, in place.

    Every ReLU becomes one with a learned clip. The first and the last layer keep their full-precision weights. Steps
    are powers of two, so that a level in bfloat16 is a small whole number and has few terms.

    Args:
        model: The model; its ReLUs must be modules.
        bits: 2 to 8.
    """
    from torch.nn.utils import parametrize

    if not 2 <= bits <= 8:
        raise ValueError(f"bits is {bits}; expected 2 to 8")
    layers = [module for module in model.modules() if isinstance(module, nn.Conv2d | nn.Linear)]
    for layer in layers[1:-1]:
        parametrize.register_parametrization(layer, "weight", _WeightLevels(bits))
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.ReLU):
            parent, _, own = name.rpartition(".")
            setattr(model.get_submodule(parent), own, _ClippedReLU(bits))
    return model


def prune_by_magnitude(model: nn.Module, fraction: float) -> nn.Module:
    """Fix the smallest weights of every layer but the first at zero, for the whole of training, in place.

    Args:
        model: The model; its convolutions and linear layers are pruned.
        fraction: Share of zeros, at least 0 and below 1.
    """
    from torch.nn.utils import prune

    if not 0 <= fraction < 1:
        raise ValueError(f"fraction is {fraction}; expected at least 0 and below 1")
    for module in [module for module in model.modules() if isinstance(module, nn.Conv2d | nn.Linear)][1:]:
        prune.l1_unstructured(module, "weight", fraction)
    return model


#: The networks of the chapter: one stack of convolutions, as it is and in three variants.
VARIANTS = ("plain", "plain-bn", "four-bit-plain", "pruned-plain")


def build_variant(name: str, *, in_channels: int = 3, image_size: int = 32, num_classes: int = 10) -> nn.Module:
    """A network by its name, randomly initialised.

    Args:
        name: A name that `workloads.build_network` knows; or "four-bit-" and such a name, for weights and activations
            on 4-bit levels; or "pruned-" and such a name, for the smallest 80 % of the weights fixed at zero.
        in_channels: Channels of the image.
        image_size: Height and width of the image.
        num_classes: Outputs.

    Raises:
        ValueError: If the name is unknown.
    """
    change, base = "", name
    for prefix in ("four-bit-", "pruned-"):
        if name.startswith(prefix):
            change, base = prefix, name.removeprefix(prefix)
    if base not in NETWORKS:
        known = ", ".join(NETWORKS)
        raise ValueError(
            f"network {name!r} is unknown; expected one of {known}, or four-bit- or pruned- and one of them"
        )
    model = build_network(base, in_channels=in_channels, image_size=image_size, num_classes=num_classes)
    if change == "four-bit-":
        return quantise(model)
    return prune_by_magnitude(model, 0.8) if change == "pruned-" else model


def draw_terms(axes: Axes, values: Sequence[float], encoding: Encoding = "naf") -> None:
    """Draw significands as bits and as signed powers of two, one value a line.

    Args:
        axes: Where to draw.
        values: Numbers that are not zero; rounded to bfloat16.
        encoding: How a significand becomes terms.
    """
    from matplotlib.patches import Rectangle

    labels = []
    for line, bits in enumerate(to_bits(values).tolist()):
        if not bits & 0x7F80:
            raise ValueError(f"value {values[line]} is zero in bfloat16 and has no significand")
        significand = (bits & 127) | 128
        exponent = ((bits >> 7) & 255) - 127
        terms = {power: sign for sign, power in recode(significand, encoding)}
        for power in range(8, -1, -1):
            for offset, text, on in (
                (0, str(significand >> power & 1) if power < 8 else "", significand >> power & 1),
                (11, {1: "+1", -1: "−1"}.get(terms.get(power, 0), ""), power in terms),
            ):
                colour = "#f4f4f4" if not on else "#c9d8ea" if offset == 0 or terms[power] > 0 else "#f0b8bf"
                place = (offset + 8 - power - 0.46, line - 0.36)
                axes.add_patch(Rectangle(place, 0.92, 0.72, facecolor=colour, edgecolor="#9a9a9a", lw=0.7))
                axes.text(offset + 8 - power, line, text, ha="center", va="center", fontsize=9)
        sign = "-" if bits >> 15 else ""
        scale = rf" \cdot 2^{{{exponent}}}" if exponent else ""
        labels.append(f"${sign}{significand / 128:g}{scale}$")
        axes.text(20.1, line, f"{len(terms)} terms" if len(terms) > 1 else "1 term", va="center", fontsize=10)
    ticks = [offset + 8 - power for offset in (0, 11) for power in range(8, -1, -1)]
    axes.set(xlim=(-0.7, 22), ylim=(len(labels) - 0.4, -0.6), xticks=ticks, yticks=range(len(labels)))
    axes.set_xticklabels([f"$2^{{{power - 7}}}$" for _ in range(2) for power in range(8, -1, -1)], fontsize=8)
    axes.set_yticklabels(labels)
    axes.grid(visible=False)
    axes.spines[["left", "bottom"]].set_visible(False)
    axes.tick_params(length=0)


def draw_set(axes: Axes, log: Dot, number: int = 0) -> None:
    """Draw what the lanes of an element do in the cycles of one set, from the log.

    Args:
        axes: Where to draw.
        log: The log of a dot product.
        number: The set.
    """
    from matplotlib.patches import Rectangle

    if not 0 <= number < len(log.cycles):
        raise ValueError(f"number is {number}; the dot product has {len(log.cycles)} sets")
    first = int(log.cycles[:number].sum())
    cycles, lanes = int(log.cycles[number]), log.shift.shape[1]
    looks = {"fired": ("#0566aa", "white", ""), "waits": ("#f6d9ae", "#202225", "//"), "done": ("white", "#9a9a9a", "")}
    for cycle in range(cycles):
        for lane in range(lanes):
            shift = int(log.shift[first + cycle, lane])
            state = "done" if shift == -99 else "fired" if log.fired[first + cycle, lane] else "waits"
            face, ink, hatch = looks[state]
            axes.add_patch(
                Rectangle(
                    (cycle + 0.54, lane - 0.42), 0.92, 0.84, facecolor=face, edgecolor="#9a9a9a", lw=0.7, hatch=hatch
                )
            )
            if state != "done":
                box = {"facecolor": face, "edgecolor": "none", "pad": 1.5}
                axes.text(cycle + 1, lane, f"{shift}", ha="center", va="center", color=ink, fontsize=10, bbox=box)
    axes.set(xlim=(0.4, cycles + 0.6), ylim=(lanes - 0.4, -0.6), xticks=range(1, cycles + 1), yticks=range(lanes))
    axes.set(xlabel="cycle of the set", ylabel="lane")
    axes.grid(visible=False)
    axes.spines[["left", "bottom"]].set_visible(False)
    axes.tick_params(length=0)
