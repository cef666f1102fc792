"""Procrustes: a dataflow in which only rows can be uneven, and half-tiles that are paired to level them.

The paper is Yang et al. (2020). A training step is three products, and each has one sparse operand: the weights in
forward and dgrad, the input activations in wgrad. An array of 16 x 16 processing elements takes lines of that operand
(filters, input channels, samples) along its rows; along its columns lies what all lines meet alike (samples, or output
channels). So the elements of a row do the same work, and only rows can differ. A *working set* gives each row one
tile and ends when the densest row is done. Half-tile balancing cuts each tile in two and pairs the densest half with
the sparsest, the second with the last but one, and so on.

Weights, and the activations of wgrad, are kept as compressed blocks: a bit mask, a pointer and the values that are not
zero, so that any block can be read without those before it, also transposed.

`simulate` counts cycles, stalls, accesses and energy of a trace; `compute` makes the numbers that the array would make,
element by element, and its own count of cycles. The training algorithm is in `leantrain.techniques.procrustes`.

Tile sizes, the order of the blocks and everything about energy are our choices. Padding counts as work, as it does in
`Layer.macs`; memory keeps up.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from leantrain.hardware.energy import AccessEnergy
from leantrain.hardware.lowering import Operand
from leantrain.hardware.reports import read_products
from leantrain.hardware.trace import LayerTrace, Packed, Trace
from leantrain.hardware.workloads import PRODUCTS, Layer, Product
from leantrain.kernels import compiled, thread_count

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from torch import nn

__all__ = [
    "NETWORKS",
    "SPARSE_SIDE",
    "Balance",
    "CompressedBlocks",
    "Computed",
    "MaskStatistics",
    "Pairing",
    "Procrustes",
    "Tiles",
    "access_energy",
    "at_depth",
    "balance",
    "budget_densities",
    "build",
    "compress",
    "compute",
    "cycle_report",
    "densenet_bc",
    "draw_pairing",
    "input_masks",
    "mask_report",
    "mask_statistics",
    "pair_halves",
    "random_tiles",
    "random_trace",
    "random_weights",
    "read_masks",
    "read_report",
    "simulate",
    "summarise",
    "tiles",
    "value_check",
    "vgg_s",
    "wide_resnet",
]

#: The operand whose zeros a product skips.
SPARSE_SIDE: dict[Product, Operand] = {"forward": "weight", "dgrad": "weight", "wgrad": "input"}

#: Non-zeros of half-tiles, (working sets, 2 x rows); row i has the halves i and i + rows before they are balanced.
Loads = NDArray[np.int64]

#: Working sets that are sorted side by side.
_BLOCK = 64
#: Bytes of a mask that are not worth a second thread.
_ALONE = 1 << 22
#: Bytes of a mask that are unpacked at once.
_CHUNK = 1 << 26


@dataclass(frozen=True)
class Procrustes:
    """The configuration of the accelerator.

    Attributes:
        rows: Rows of the array; each takes lines of the sparse operand.
        columns: Columns of the array.
        tile: Values of the sparse operand that a row takes in a working set, zeros included; an even number.
        pointwise_tile: The same for the weights of 1x1 kernels and linear layers.
        cut: Where a tile is cut in halves. "lines": the tile holds two lines, each half is one of them. "inside": the
            tile holds one line, and its halves are two parts of it.
        register_words: Words in the registers of an element; a tile must fit.
        buffer_kib: Size of the global buffer.
        pointer_bits: Bits of the pointer of a compressed block.
        bits: Width of a value, 16 or 32.
        frequency_mhz: Clock.
    """

    rows: int = 16
    columns: int = 16
    tile: int = 144
    pointwise_tile: int = 64
    cut: Literal["lines", "inside"] = "lines"
    register_words: int = 256
    buffer_kib: int = 128
    pointer_bits: int = 20
    bits: int = 32
    frequency_mhz: float = 500.0

    def __post_init__(self) -> None:
        ranges = {"rows": 256, "columns": 256, "tile": 1 << 16, "pointwise_tile": 1 << 16}
        ranges |= {"register_words": 1 << 16, "buffer_kib": 1 << 20, "pointer_bits": 32}
        for field, most in ranges.items():
            value = getattr(self, field)
            if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= most:
                raise ValueError(f"{field} is {value!r}; expected a whole number from 1 to {most}")
        for field in ("tile", "pointwise_tile"):
            if getattr(self, field) % 2:
                raise ValueError(f"{field} is {getattr(self, field)}; a tile is cut in two halves, so it must be even")
            if getattr(self, field) > self.register_words:
                raise ValueError(f"{field} is {getattr(self, field)}; the registers hold {self.register_words} words")
        if self.cut not in ("lines", "inside"):
            raise ValueError(f"cut is {self.cut!r}; expected 'lines' or 'inside'")
        if self.bits not in (16, 32):
            raise ValueError(f"bits is {self.bits}; expected 16 or 32")
        if not 0 < self.frequency_mhz < float("inf"):
            raise ValueError(f"frequency_mhz is {self.frequency_mhz}; expected a positive number")

    def seconds(self, cycles: float) -> float:
        """Time of so many cycles at the configured clock."""
        return cycles / (self.frequency_mhz * 1e6)

    @property
    def macs_per_cycle(self) -> int:
        """Multipliers of the accelerator, one an element."""
        return self.rows * self.columns

    @property
    def lines_per_set(self) -> int:
        """Lines of the sparse operand that a working set takes."""
        return self.rows * (2 if self.cut == "lines" else 1)

    def half(self, layer: Layer, product: Product) -> tuple[int, int]:
        """What a half-tile holds: channels of the line, and values of each that lie side by side.

        Of weights these are whole kernels, at least one; of the activations of wgrad, at least 8 channels, and as many
        positions of each as fit.
        """
        taps = layer.kernel[0] * layer.kernel[1]
        if product == "wgrad":
            positions = max(1, min(layer.in_size[0] * layer.in_size[1], self.tile // 2 // 8))
            channels = max(1, self.tile // 2 // positions)
            return channels, max(1, self.tile // 2 // channels)
        if taps == 1:
            return self.pointwise_tile // 2, 1
        channels = max(1, self.tile // 2 // taps)
        if 2 * channels * taps > self.register_words:
            raise ValueError(
                f"layer {layer.name!r}: two kernels of {taps} weights do not fit in {self.register_words} words"
            )
        return channels, taps


@compiled
def _count_blocks(mask: NDArray[np.bool_], block: int, counts: NDArray[np.int64]) -> None:
    """Non-zeros of each run of `block` values; (L, D) booleans to (L, ceil(D / block)) counts."""
    lines, length = mask.shape
    for line in range(lines):
        for number in range(counts.shape[1]):
            total = np.int64(0)
            for i in range(number * block, min(length, (number + 1) * block)):
                total += np.int64(mask[line, i])
            counts[line, number] = total


@lru_cache(maxsize=8)
def _sorting_network(size: int) -> NDArray[np.int64]:
    """Places that Batcher's odd-even merge sort compares and exchanges, (comparisons, 2); `size` is a power of two."""
    compared = []
    run = 1
    while run < size:
        gap = run
        while gap:
            for first in range(gap % run, size - gap, 2 * gap):
                for i in range(first, min(first + gap, size - gap)):
                    if i // (2 * run) == (i + gap) // (2 * run):
                        compared.append((i, i + gap))
            gap //= 2
        run *= 2
    return np.array(compared, dtype=np.int64).reshape(-1, 2)


@compiled
def _balance_sets(loads: Loads, first: int, last: int, network: NDArray[np.int64], size: int, times: Loads) -> None:
    """Time of the working sets `first` to `last`: unbalanced, half-tile balanced, and perfectly level.

    Up to `_BLOCK` working sets are sorted side by side, by a network of comparisons that is the same for all, so that
    the compiler turns the innermost loops into vector instructions. Halves that are missing to a power of two are
    zeros, which a sort leaves at the start.
    """
    halves = loads.shape[1]
    rows = halves // 2
    order = np.zeros((size, _BLOCK), np.int32)
    total = np.zeros(_BLOCK, np.int32)
    longest = np.zeros(_BLOCK, np.int32)
    paired = np.zeros(_BLOCK, np.int32)
    for start in range(first, last, _BLOCK):
        width = min(_BLOCK, last - start)
        order[: size - halves] = 0
        for s in range(width):
            for half in range(halves):
                order[size - halves + half, s] = loads[start + s, half]
        total[:] = 0
        longest[:] = 0
        paired[:] = 0
        for row in range(size - halves, size - rows):
            for s in range(_BLOCK):
                both = order[row, s] + order[row + rows, s]
                longest[s] = max(longest[s], both)
                total[s] += both
        for i in range(len(network)):
            low, high = network[i, 0], network[i, 1]
            for s in range(_BLOCK):
                smaller = min(order[low, s], order[high, s])
                order[high, s] = max(order[low, s], order[high, s])
                order[low, s] = smaller
        for row in range(rows):
            for s in range(_BLOCK):
                paired[s] = max(paired[s], order[size - halves + row, s] + order[size - 1 - row, s])
        for s in range(width):
            times[start + s, 0] = longest[s]
            times[start + s, 1] = paired[s]
            times[start + s, 2] = (total[s] + rows - 1) // rows


class Balance(NamedTuple):
    """Times of many working sets, in non-zeros that the slowest row must process.

    Attributes:
        unbalanced: Each row keeps its own tile, (sets,).
        paired: Half-tiles are paired, (sets,).
        perfect: The work is spread evenly, rounded up, (sets,).
        total: Non-zeros of all rows, (sets,).
    """

    unbalanced: NDArray[np.int64]
    paired: NDArray[np.int64]
    perfect: NDArray[np.int64]
    total: NDArray[np.int64]


def balance(loads: NDArray[np.integer], *, threads: int | None = None) -> Balance:
    """How long working sets take with and without half-tile balancing.

    Args:
        loads: Non-zeros of each half-tile, (sets, 2 x rows); row i has the halves i and i + rows.
        threads: Threads to use.

    Raises:
        ValueError: If the halves are odd in number, or a load is negative.
    """
    if loads.ndim != 2 or loads.shape[1] < 2 or loads.shape[1] % 2:
        raise ValueError(f"loads have shape {loads.shape}; expected (sets, 2 x rows)")
    if loads.size and not 0 <= loads.min() <= loads.max() < 1 << 20:
        raise ValueError(f"the loads reach from {loads.min()} to {loads.max()}; expected 0 to {(1 << 20) - 1}")
    loads = np.ascontiguousarray(loads, dtype=np.int64)
    times = np.zeros((len(loads), 3), dtype=np.int64)
    size = 1 << (loads.shape[1] - 1).bit_length()
    network = _sorting_network(size)
    _in_shares(lambda i, j: _balance_sets(loads, i, j, network, size, times), len(loads), loads.nbytes, threads)
    return Balance(times[:, 0], times[:, 1], times[:, 2], loads.sum(axis=1))


def _in_shares(run: Any, count: int, size: int, threads: int | None) -> None:
    """Call `run(first, last)` on shares of `count`, in threads if the work is large."""
    workers = threads or thread_count()
    if workers == 1 or size < _ALONE or count < workers:
        run(0, count)
        return
    share = -(-count // workers)
    with ThreadPoolExecutor(workers) as pool:
        list(pool.map(lambda first: run(first, min(first + share, count)), range(0, count, share)))


@dataclass(frozen=True)
class Pairing:
    """How one working set is balanced, step by step.

    Attributes:
        loads: Non-zeros of each half-tile, (2 x rows,); row i has the halves i and i + rows at first.
        order: The halves from the sparsest to the densest, (2 x rows,).
        pairs: The halves of each row after pairing, (rows, 2); the denser one first.
    """

    loads: NDArray[np.int64]
    order: NDArray[np.int64]
    pairs: NDArray[np.int64]

    @property
    def unbalanced(self) -> NDArray[np.int64]:
        """Load of each row before, (rows,)."""
        return self.loads.reshape(2, -1).sum(axis=0)

    @property
    def paired(self) -> NDArray[np.int64]:
        """Load of each row after, (rows,)."""
        return self.loads[self.pairs].sum(axis=1)

    def table(self) -> pd.DataFrame:
        """One row an array row: its load before, the two halves that it gets, their loads, and its load after."""
        return pd.DataFrame(
            {
                "row": np.arange(len(self.pairs)),
                "before": self.unbalanced,
                "dense_half": self.pairs[:, 0],
                "sparse_half": self.pairs[:, 1],
                "dense_load": self.loads[self.pairs[:, 0]],
                "sparse_load": self.loads[self.pairs[:, 1]],
                "after": self.paired,
            }
        )


def pair_halves(loads: Sequence[int] | NDArray[np.integer]) -> Pairing:
    """Balance one working set, and log every step; the slow, plain form of `balance`.

    Args:
        loads: Non-zeros of each half-tile, (2 x rows,).
    """
    given = np.asarray(loads, dtype=np.int64)
    if given.ndim != 1 or given.size < 2 or given.size % 2 or given.min() < 0:
        raise ValueError(f"loads are {loads!r:.80}; expected 2 x rows counts of at least 0")
    order = np.argsort(given, kind="stable")
    return Pairing(given, order, np.stack([order[::-1], order], axis=1)[: given.size // 2])


def draw_pairing(axes: Axes, pairing: Pairing, step: Literal["tiles", "sorted", "paired"]) -> None:
    """Draw one step of half-tile balancing from its log.

    Args:
        axes: Where to draw.
        pairing: The log.
        step: "tiles": the rows as the working set comes; "sorted": the halves in order, with the pairs joined;
            "paired": the rows after pairing.
    """
    rows, loads = len(pairing.pairs), pairing.loads
    dark, light = "#0566aa", "#ed9419"
    if step == "sorted":
        place = np.argsort(pairing.order)
        colours = [dark if i >= rows else light for i in range(2 * rows)]
        axes.bar(range(2 * rows), loads[pairing.order], color=colours, width=0.85)
        for dense, sparse in pairing.pairs[:: max(1, rows // 4)].tolist():
            style = {"arrowstyle": "-", "connectionstyle": "arc3,rad=-0.35", "color": "#777777", "lw": 1.0}
            ends = [(place[half], loads[half]) for half in (sparse, dense)]
            axes.annotate("", xy=ends[1], xytext=ends[0], arrowprops=style)
        axes.set(xlabel="half-tile, in order of its load", ylabel="non-zeros", ylim=(0, 1.45 * max(loads.max(), 1)))
        return
    halves = np.stack([np.arange(rows), np.arange(rows) + rows], axis=1) if step == "tiles" else pairing.pairs
    below, above = loads[halves[:, 0]], loads[halves[:, 1]]
    axes.bar(range(rows), below, color=dark, width=0.8)
    axes.bar(range(rows), above, bottom=below, color=dark if step == "tiles" else light, width=0.8)
    axes.bar(range(rows), np.zeros(rows), bottom=below, width=0.8, edgecolor="white", linewidth=1.2)
    mean, longest = loads.sum() / rows, (below + above).max()
    axes.axhline(longest, color="#a00119", linewidth=1.4)
    axes.axhline(mean, color="#202225", linewidth=1.2, linestyle="--")
    axes.set(xlabel="row of the array", ylabel="non-zeros", xticks=range(0, rows, 5))


class Tiles(NamedTuple):
    """The working sets of a product, and what each of their non-zeros costs.

    Attributes:
        loads: Non-zeros of each half-tile, (sets, 2 x rows).
        sizes: The same with the zeros counted: the loads of the dense accelerator.
        reuse: Products that an element makes with one value, each a cycle.
        passes: How often all sets run, with other partners along the columns.
        partners: Partners along the columns in all passes together, at most passes x columns.
        work: Products with non-zeros that all elements make together.
    """

    loads: Loads
    sizes: Loads
    reuse: float
    passes: int
    partners: float
    work: float


def _block_counts(mask: NDArray[np.bool_], channels: int, side: int, threads: int | None) -> Loads:
    """Non-zeros of blocks of `channels` x `side` values; (L, C, D) booleans to (L, channel blocks, side blocks)."""
    lines, count, length = mask.shape
    flat = np.ascontiguousarray(mask).reshape(lines * count, length)
    runs = np.zeros((lines * count, -(-length // side)), dtype=np.int64)
    _in_shares(lambda i, j: _count_blocks(flat[i:j], side, runs[i:j]), len(flat), flat.nbytes, threads)
    edges = np.arange(0, count, channels)
    return np.add.reduceat(runs.reshape(lines, count, -1), edges, axis=1)


def _weight_lines(layer: Layer, product: Product, weight: NDArray) -> NDArray:
    """Weights as (lines, channels, taps): lines are filters in forward, input channels in dgrad."""
    taps = layer.kernel[0] * layer.kernel[1]
    outs, ins = layer.out_channels // layer.groups, layer.in_channels // layer.groups
    if product == "forward":
        return weight.reshape(layer.out_channels, ins, taps)
    swapped = weight.reshape(layer.groups, outs, ins, taps).swapaxes(1, 2)
    return swapped.reshape(layer.in_channels, outs, taps)


def _sets(counts: Loads, config: Procrustes) -> Loads:
    """Counts (lines, blocks) to working sets (sets, 2 x rows); missing lines and blocks have no work."""
    lines, blocks = counts.shape
    per_set = config.lines_per_set
    parts = 1 if config.cut == "lines" else 2
    padded = np.zeros((-(-lines // per_set) * per_set, -(-blocks // parts) * parts), dtype=np.int64)
    padded[:lines, :blocks] = counts
    cut = padded.reshape(-1, per_set, padded.shape[1] // parts, parts)
    return cut.transpose(0, 2, 3, 1).reshape(-1, 2 * config.rows)


def _sizes(shape: tuple[int, int, int], channels: int, side: int) -> Loads:
    """Sizes of the blocks of lines of the given shape, (lines, blocks)."""

    def cut(length: int, block: int) -> NDArray[np.int64]:
        return np.diff(np.minimum(np.arange(-(-length // block) + 1) * block, length))

    return np.tile(np.outer(cut(shape[1], channels), cut(shape[2], side)).reshape(1, -1), (shape[0], 1))


def _checked_shape(layer: Layer, side: Operand, shape: tuple[int, ...]) -> None:
    expected: tuple[int, ...] = layer.weight_shape if side == "weight" else (layer.in_channels, *layer.in_size)
    if layer.kind == "linear":
        expected = expected[:2] if side == "weight" else expected[:1]
    given = shape if side == "weight" else shape[1:]
    if given != expected or 0 in shape:
        lead = "" if side == "weight" else "(batch,) + "
        raise ValueError(f"layer {layer.name!r}: {side} has shape {shape}; expected {lead}{expected}")


def tiles(
    layer: Layer,
    product: Product,
    mask: NDArray[np.bool_] | Packed,
    config: Procrustes | None = None,
    *,
    batch: int = 1,
    threads: int | None = None,
) -> Tiles:
    """Lower the sparse operand of a product to working sets.

    Memory is bounded: the mask of an input is unpacked in shares of at most 64 MiB (one sample at least), a byte a
    value; that of the weights as a whole.

    Args:
        layer: The layer.
        product: The product.
        mask: True where the sparse operand is not zero: weights (K, C / groups, R, S), or (K, C) of a linear layer;
            for wgrad the input, (N, C, H, W) or (N, C).
        config: The accelerator; the default one if left out.
        batch: Samples; for wgrad it is that of the mask.
        threads: Threads to use.
    """
    config = config or Procrustes()
    if product not in PRODUCTS:
        raise ValueError(f"product is {product!r}; expected one of {', '.join(PRODUCTS)}")
    if batch < 1:
        raise ValueError(f"batch is {batch}; expected at least 1")
    _checked_shape(layer, SPARSE_SIDE[product], mask.shape)
    if product == "wgrad":
        return _activation_tiles(layer, mask, config, threads)
    half = config.half(layer, product)
    positions = layer.out_size[0] * layer.out_size[1]
    lines = _weight_lines(layer, product, mask.mask() if isinstance(mask, Packed) else mask)
    counts = _block_counts(lines, *half, threads).reshape(len(lines), -1)
    sizes = _sizes(lines.shape, *half)
    work = int(counts.sum()) * positions * batch
    passes = -(-batch // config.columns)
    return Tiles(_sets(counts, config), _sets(sizes, config), positions, passes, batch, work)


def _activation_tiles(layer: Layer, mask: NDArray[np.bool_] | Packed, config: Procrustes, threads: int | None) -> Tiles:
    """Samples lie along the rows, the filters of a group along the columns.

    Groups with few filters lie side by side in the columns: then the elements of a row differ, and the row takes as
    long as the densest of them.
    """
    samples, groups = mask.shape[0], layer.groups
    outs, ins, length = layer.out_channels // groups, layer.in_channels // groups, layer.in_size[0] * layer.in_size[1]
    half = config.half(layer, "wgrad")
    beside = _groups_beside(layer, config)
    taken = -(-groups // beside)
    at_once = max(1, _CHUNK // (groups * ins * length))
    parts, nonzero = [], 0
    for first in range(0, samples, at_once):
        share = _samples(mask, first, min(first + at_once, samples))
        counts = _block_counts(share.reshape(len(share) * groups, ins, length), *half, threads)
        nonzero += int(counts.sum())
        padded = np.zeros((len(share), taken * beside, *counts.shape[1:]), dtype=np.int64)
        padded[:, :groups] = counts.reshape(len(share), groups, *counts.shape[1:])
        densest = padded.reshape(len(share), taken, beside, -1).max(axis=2)
        parts.append(densest.reshape(len(share), -1))
    sizes = np.tile(_sizes((samples, ins, length), *half), (1, taken))
    reuse = layer.kernel[0] * layer.kernel[1] * layer.out_size[0] * layer.out_size[1] / length
    # The last groups may fill fewer columns: partners are those of the sets on average.
    partners = outs * groups / taken
    passes = -(-outs // config.columns)
    loads, dense = _sets(np.concatenate(parts), config), _sets(sizes, config)
    return Tiles(loads, dense, reuse, passes, partners, nonzero * outs * reuse)


def _groups_beside(layer: Layer, config: Procrustes) -> int:
    """Channel groups whose filters share the columns in wgrad."""
    return max(1, min(config.columns // (layer.out_channels // layer.groups), layer.groups))


def _samples(mask: NDArray[np.bool_] | Packed, first: int, last: int) -> NDArray[np.bool_]:
    """Some samples of a mask; a packed one is unpacked no further than needed."""
    if not isinstance(mask, Packed):
        return mask[first:last]
    size = int(np.prod(mask.shape[1:]))
    start = first * size // 8
    bits = np.unpackbits(mask.bits[start : -(-last * size // 8)], bitorder="little")
    skip = first * size - 8 * start
    return bits[skip : skip + (last - first) * size].view(np.bool_).reshape(last - first, *mask.shape[1:])


def access_energy(config: Procrustes | None = None) -> AccessEnergy:
    """Relative energy of an access to a value of the configured width; the unit is a 16-bit multiplication.

    Our model: DRAM 200; a memory of x KiB 1 + 5 (x - 0.5) / 99.5; both in proportion to the width; a multiplication
    in proportion to its square.
    """
    config = config or Procrustes()
    wide = config.bits / 16

    def memory(kib: float) -> float:
        return wide * (1 + 5 * (kib - 0.5) / 99.5)

    registers = config.register_words * config.bits / 8 / 1024
    return AccessEnergy(dram=200 * wide, buffer=memory(config.buffer_kib), scratchpad=memory(registers), mac=wide**2)


def simulate(
    trace: Trace | LayerTrace,
    config: Procrustes | None = None,
    *,
    products: Iterable[Product] = PRODUCTS,
    access: AccessEnergy | None = None,
    minibatch: int | None = None,
    threads: int | None = None,
) -> pd.DataFrame:
    """Run the products of every layer and count cycles, stalls, accesses and energy.

    Args:
        trace: The operands of a network, or of one layer; the masks of the weights and of the input are looked at.
        config: The accelerator; the default one if left out.
        products: The products to run; a layer without an input gradient has no dgrad.
        access: Relative energy of an access; `access_energy(config)` if left out.
        minibatch: Samples that share one transfer of the weights from and to DRAM; by default those of the trace.
        threads: Threads to use.

    Returns:
        One row a layer and product: layer, kind, product, side, sparsity (of that operand), macs, dense_cycles, cycles
        (half-tiles paired), unbalanced_cycles, ideal_cycles (perfectly level), speedup, unbalanced, ideal (dense cycles
        over each), utilisation; the multiplier slots `slots` = used + lockstep (waiting for the densest row) +
        empty_rows + empty_columns (no tile, no partner); working_sets, with the sums over them of largest over mean
        load less one, `excess` and `excess_unbalanced`, and how many stay below a tenth, `level_sets`; and energies of
        the sparse and the dense accelerator in units of one 16-bit multiplication: core, scratchpad, buffer, dram,
        and the same names with _dense.

    Raises:
        ValueError: If `minibatch` is not positive, or a mask does not fit its layer.
    """
    if minibatch is not None and minibatch < 1:
        raise ValueError(f"minibatch is {minibatch}; expected at least 1")
    config = config or Procrustes()
    access = access or access_energy(config)
    wanted = set(products)
    rows = []
    for entry in (trace,) if isinstance(trace, LayerTrace) else trace.layers:
        for product in entry.layer.products:
            if product in wanted:
                counts = _simulate_product(entry, product, config, threads)
                share = entry.batch / (minibatch or entry.batch)
                rows.append(counts | _energies(entry, product, counts, config, access, share))
    return pd.DataFrame(rows)


def _simulate_product(entry: LayerTrace, product: Product, config: Procrustes, threads: int | None) -> dict[str, Any]:
    layer, side = entry.layer, SPARSE_SIDE[product]
    cut = tiles(layer, product, entry.masks[side], config, batch=entry.batch, threads=threads)
    times = balance(cut.loads, threads=threads)
    dense = balance(cut.sizes, threads=threads).unbalanced
    each = cut.reuse * cut.passes
    occupied = np.minimum((cut.sizes > 0).sum(axis=1), config.rows)
    slots = each * config.macs_per_cycle * float(times.paired.sum())
    full = slots * cut.partners / (cut.passes * config.columns)  # of columns that have a partner
    in_rows = each * config.macs_per_cycle / config.rows * float((times.paired * occupied).sum())
    empty_rows = slots - in_rows
    empty_columns = in_rows * (1 - full / slots) if slots else 0.0
    mean = np.maximum(times.total / occupied, 1e-300)
    working = times.total > 0
    excess = {
        name: np.where(working, time / mean - 1, 0.0)
        for name, time in (("excess", times.paired), ("excess_unbalanced", times.unbalanced))
    }
    cycles = {
        "dense_cycles": each * float(dense.sum()),
        "cycles": each * float(times.paired.sum()),
        "unbalanced_cycles": each * float(times.unbalanced.sum()),
        "ideal_cycles": each * float(times.perfect.sum()),
    }
    return {
        "layer": layer.name,
        "kind": layer.kind,
        "product": product,
        "side": side,
        "sparsity": entry.masks[side].sparsity,
        "macs": layer.macs * entry.batch,
        **cycles,
        "speedup": _over(cycles["dense_cycles"], cycles["cycles"]),
        "unbalanced": _over(cycles["dense_cycles"], cycles["unbalanced_cycles"]),
        "ideal": _over(cycles["dense_cycles"], cycles["ideal_cycles"]),
        "utilisation": cut.work / slots if slots else 0.0,
        "slots": slots,
        "used": cut.work,
        "lockstep": slots - cut.work - empty_rows - empty_columns,
        "empty_rows": empty_rows,
        "empty_columns": empty_columns,
        "working_sets": len(times.total),
        "excess": float(excess["excess"].sum()),
        "excess_unbalanced": float(excess["excess_unbalanced"].sum()),
        "level_sets": int((excess["excess"] < 0.1).sum()),
    }


def _over(dense: float, cycles: float) -> float:
    return dense / cycles if cycles else float("inf")


def _stored_words(layer: Layer, nonzero: float, config: Procrustes) -> float:
    """Words that the weights take as compressed blocks: the values, and a mask and a pointer a block."""
    filters, length = layer.out_channels, int(np.prod(layer.weight_shape[1:]))
    blocks = filters * -(-length // _weight_block(layer, config))
    return nonzero + (blocks * (_weight_block(layer, config) + config.pointer_bits) + filters * 32) / config.bits


def _weight_block(layer: Layer, config: Procrustes) -> int:
    """Weights of a compressed block: one kernel, or the half-tile of 1x1 kernels."""
    taps = layer.kernel[0] * layer.kernel[1]
    return taps if taps > 1 else config.pointwise_tile // 2


def _energies(
    entry: LayerTrace,
    product: Product,
    counts: dict[str, Any],
    config: Procrustes,
    access: AccessEnergy,
    weight_share: float,
) -> dict[str, float]:
    """Energies of a product on both accelerators.

    Our accounting: a multiply-accumulate reads its two operands and its partial sum from the registers and writes the
    sum back; the sparse accelerator makes those with non-zeros only. The global buffer hands the sparse operand to the
    rows once a pass, the other operand once a working set, and takes partial sums in and out once a working set. DRAM
    moves the two operands and the output once, the weights once a minibatch; wgrad reads the old weights and writes
    the new ones. Weights move compressed in the sparse accelerator, everything else moves dense in both.
    """
    layer, batch = entry.layer, entry.batch
    weight, image_in = entry.masks["weight"], entry.masks["input"].size
    image_out = batch * layer.out_channels * layer.out_size[0] * layer.out_size[1]
    stored = {"": _stored_words(layer, weight.nonzero, config), "_dense": float(weight.size)}
    work = {"": counts["used"], "_dense": float(counts["macs"])}
    channels = config.half(layer, product)[0] * (1 if config.cut == "lines" else 2)
    ins, outs = layer.in_channels // layer.groups, layer.out_channels // layer.groups
    if product == "wgrad":
        partners = image_out * -(-ins // channels)
        sums = 2 * weight.size * -(-batch // config.lines_per_set)
    else:
        lines, reduced = (layer.out_channels, ins) if product == "forward" else (layer.in_channels, outs)
        read, made = (image_in, image_out) if product == "forward" else (image_out, image_in)
        partners = read * max(1, -(-lines // layer.groups // config.lines_per_set))
        sums = 2 * made * -(-reduced // channels)
    result: dict[str, float] = {}
    for name in ("", "_dense"):
        weights = stored[name] * weight_share
        passes = -(-batch // config.columns) if product != "wgrad" else -(-outs // config.columns)
        sparse_operand = stored[name] * passes if product != "wgrad" else image_in * passes
        moved = weights * (2 if product == "wgrad" else 1) + image_in + image_out
        result |= {
            f"core{name}": access.mac * work[name],
            f"scratchpad{name}": access.scratchpad * 4 * work[name],
            f"buffer{name}": access.buffer * (sparse_operand + partners + sums),
            f"dram{name}": access.dram * moved,
        }
    return result


_ENERGIES = ["core", "scratchpad", "buffer", "dram"]
_SUMS = [
    "macs",
    "dense_cycles",
    "cycles",
    "unbalanced_cycles",
    "ideal_cycles",
    "slots",
    "used",
    "lockstep",
    "empty_rows",
    "empty_columns",
    "working_sets",
    "excess",
    "excess_unbalanced",
    "level_sets",
    *_ENERGIES,
    *(f"{name}_dense" for name in _ENERGIES),
]


def summarise(frame: pd.DataFrame, by: Sequence[str] = ()) -> pd.DataFrame:
    """Sum the rows of `simulate`, and form the ratios from the sums: never the mean of the layers' ratios.

    Args:
        frame: What `simulate` returned; columns such as network or epoch may have been added.
        by: Columns to group by; none sums everything into one row.

    Returns:
        One row a group with the sums, and speedup, unbalanced, ideal, utilisation; imbalance and
        imbalance_unbalanced, the mean over working sets of largest over mean load less one, in %; level, the share of
        working sets below 10 %, in %; core_efficiency and total_efficiency (energy of the dense accelerator over
        that of Procrustes, multipliers alone and with all memory).
    """
    groups = frame.groupby(list(by), sort=False, observed=True)[_SUMS].sum() if by else frame[_SUMS].sum().to_frame().T
    result = groups.assign(
        speedup=groups["dense_cycles"] / groups["cycles"],
        unbalanced=groups["dense_cycles"] / groups["unbalanced_cycles"],
        ideal=groups["dense_cycles"] / groups["ideal_cycles"],
        utilisation=groups["used"] / groups["slots"],
        imbalance=100 * groups["excess"] / groups["working_sets"],
        imbalance_unbalanced=100 * groups["excess_unbalanced"] / groups["working_sets"],
        level=100 * groups["level_sets"] / groups["working_sets"],
        core_efficiency=groups["core_dense"] / groups["core"],
        total_efficiency=groups[[f"{e}_dense" for e in _ENERGIES]].sum(axis=1) / groups[_ENERGIES].sum(axis=1),
    )
    return result.reset_index(drop=not by)


def cycle_report(trace: Trace, configs: Mapping[str, Procrustes], *, minibatch: int | None = None) -> dict[str, float]:
    """What a training run logs of a trace: the sums of `summarise` for each product and configuration.

    Args:
        trace: The trace.
        configs: Name -> accelerator.
        minibatch: See `simulate`.

    Returns:
        Numbers by "configuration/product/quantity". `read_report` makes a table of them again.
    """
    report: dict[str, float] = {}
    for name, config in configs.items():
        for row in summarise(simulate(trace, config, minibatch=minibatch), ["product"]).to_dict("records"):
            report |= {f"{name}/{row['product']}/{quantity}": float(row[quantity]) for quantity in _SUMS}
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
    return read_products(frame, keep, _SUMS, "balanced/forward/cycles")


@dataclass(frozen=True)
class CompressedBlocks:
    """A tensor as compressed sparse blocks: for each a bit mask, a pointer to its values, and the values, packed.

    Attributes:
        shape: Shape of the tensor; its first axis holds the lines (filters, samples).
        block: Values of a block, zeros included.
        masks: Whether each value of each block is not zero, (blocks, block).
        pointers: Place of each block's first value, counted from the first value of its line, (blocks,).
        bases: Place of each line's first value, (lines,).
        values: The values that are not zero, line after line.
    """

    shape: tuple[int, ...]
    block: int
    masks: NDArray[np.bool_]
    pointers: NDArray[np.int64]
    bases: NDArray[np.int64]
    values: NDArray

    def read(self, line: int, number: int) -> NDArray:
        """One block with its zeros, (block,), found by its pointer alone."""
        per_line = len(self.masks) // len(self.bases)
        index = line * per_line + number
        block = np.zeros(self.block, dtype=self.values.dtype)
        mask = self.masks[index]
        first = self.bases[line] + self.pointers[index]
        block[mask] = self.values[first : first + np.count_nonzero(mask)]
        return block

    def decode(self) -> NDArray:
        """The tensor again."""
        lines = len(self.bases)
        dense = np.zeros(self.masks.shape, dtype=self.values.dtype)
        dense[self.masks] = self.values
        return dense.reshape(lines, -1)[:, : int(np.prod(self.shape[1:]))].reshape(self.shape)

    def stored_bits(self, bits: int = 32, pointer_bits: int = 20) -> int:
        """Bits of the values, the masks, the pointers and the bases."""
        return self.values.size * bits + self.masks.size + len(self.pointers) * pointer_bits + len(self.bases) * 32


def compress(tensor: NDArray, block: int, *, pointer_bits: int = 20) -> CompressedBlocks:
    """Pack a tensor into compressed blocks along its lines.

    Args:
        tensor: (lines, ...) values; whatever compares unequal to zero is kept, so that -0.0 comes back as 0.0.
        block: Values of a block; the last block of a line is filled up with zeros.
        pointer_bits: Bits of a pointer.

    Raises:
        ValueError: If the tensor is empty, or a line holds more values than a pointer can reach.
    """
    if tensor.ndim < 2 or 0 in tensor.shape or block < 1:
        raise ValueError(f"tensor has shape {tensor.shape} and block is {block}; expected (lines, ...) and at least 1")
    lines = len(tensor)
    flat = tensor.reshape(lines, -1)
    blocks = -(-flat.shape[1] // block)
    padded = np.zeros((lines, blocks * block), dtype=tensor.dtype)
    padded[:, : flat.shape[1]] = flat
    padded = padded.reshape(lines, blocks, block)
    masks = padded != 0
    counts = masks.sum(axis=2)
    pointers = np.cumsum(counts, axis=1) - counts
    if pointers.max() >= 1 << pointer_bits:
        raise ValueError(f"a line holds {pointers.max()} values before its last block; {pointer_bits} bits reach fewer")
    totals = counts.sum(axis=1)
    return CompressedBlocks(
        shape=tensor.shape,
        block=block,
        masks=masks.reshape(-1, block),
        pointers=pointers.reshape(-1),
        bases=np.cumsum(totals) - totals,
        values=padded[masks],
    )


@compiled
def _multiply_weights(
    entries: NDArray[np.int64],
    values: NDArray[np.float64],
    image: NDArray[np.float64],
    grad: NDArray[np.float64],
    geometry: NDArray[np.int64],
    backward: bool,
) -> None:
    """Each weight (k, c, r, s) that is not zero meets every position of every sample, in the order of `entries`.

    Forward: the image is read and the output `grad` gathers the sums; backward: the other way round.
    """
    kh, kw, sh, sw, ph, pw, dh, dw, ins, outs = geometry
    for number in range(entries.size):
        entry, value = entries[number], values[number]
        tap = entry % (kh * kw)
        k, c = entry // (ins * kh * kw), entry // (kh * kw) % ins
        channel = k // outs * ins + c
        for n in range(image.shape[0]):
            for p in range(grad.shape[2]):
                h = p * sh - ph + tap // kw * dh
                if h < 0 or h >= image.shape[2]:
                    continue
                for q in range(grad.shape[3]):
                    w = q * sw - pw + tap % kw * dw
                    if w < 0 or w >= image.shape[3]:
                        continue
                    if backward:
                        image[n, channel, h, w] += value * grad[n, k, p, q]
                    else:
                        grad[n, k, p, q] += value * image[n, channel, h, w]


@compiled
def _multiply_inputs(
    entries: NDArray[np.int64],
    values: NDArray[np.float64],
    image_shape: tuple[int, int, int, int],
    grad: NDArray[np.float64],
    weight_grad: NDArray[np.float64],
    geometry: NDArray[np.int64],
) -> None:
    """Each activation (n, c, h, w) that is not zero meets the filters of its group at every tap."""
    kh, kw, sh, sw, ph, pw, dh, dw, ins, outs = geometry
    _, channels, height, width = image_shape
    for number in range(entries.size):
        entry, value = entries[number], values[number]
        w, h = entry % width, entry // width % height
        channel, n = entry // (width * height) % channels, entry // (width * height * channels)
        first = channel // ins * outs
        for r in range(kh):
            p = h + ph - r * dh
            if p < 0 or p % sh or p // sh >= grad.shape[2]:
                continue
            for s in range(kw):
                q = w + pw - s * dw
                if q < 0 or q % sw or q // sw >= grad.shape[3]:
                    continue
                for k in range(first, first + outs):
                    weight_grad[k, channel % ins, r, s] += value * grad[n, k, p // sh, q // sw]


@dataclass(frozen=True)
class Computed:
    """What the array computes of one product, and how long it takes.

    Attributes:
        values: The output, or the gradient of the input or of the weights, float64.
        cycles: Cycles with paired half-tiles, counted working set by working set.
        unbalanced_cycles: Cycles if every row keeps its tile.
        entries: Values that were not zero and so were processed.
        log: The pairing of each working set.
    """

    values: NDArray[np.float64]
    cycles: float
    unbalanced_cycles: float
    entries: int
    log: list[Pairing]


def compute(
    layer: Layer, product: Product, operands: Mapping[Operand, NDArray], config: Procrustes | None = None
) -> Computed:
    """Compute a product the way the array does, value by value, from compressed blocks.

    The sparse operand is compressed, read back block by block (in dgrad transposed, kernel by kernel), dealt to the
    rows half-tile by half-tile as the pairing says, and each of its values meets all its partners. It is the slow,
    plain counterpart of `simulate`, written apart from it.

    Args:
        layer: The layer.
        product: The product.
        operands: The two operands of the product by name: (N, C, H, W), (K, C / groups, R, S), (N, K, OH, OW), or
            two-dimensional for a linear layer.
        config: The accelerator; the default one if left out.

    Raises:
        ValueError: If an operand is missing or does not fit the layer.
    """
    config = config or Procrustes()
    needed: dict[Product, tuple[Operand, Operand]] = {
        "forward": ("weight", "input"),
        "dgrad": ("weight", "grad_output"),
        "wgrad": ("input", "grad_output"),
    }
    if product not in needed or not set(needed[product]) <= set(operands):
        raise ValueError(f"{product!r} with {sorted(operands)}; a product needs its two operands: {needed}")
    side, partner = needed[product]
    _checked_shape(layer, side, operands[side].shape)
    tensors = {name: _as_four(np.asarray(operands[name], dtype=np.float64)) for name in (side, partner)}
    values, places = _read_back(layer, product, tensors[side], config)
    chosen: list[NDArray] = []
    log, waiting = [], np.zeros(2)
    for halves in _dealt(layer, product, values.shape, config):
        kept = [[(values[part] != 0, part) for part in half] for half in halves]
        pairing = pair_halves([max((int(mask.sum()) for mask, _ in half), default=0) for half in kept])
        log.append(pairing)
        waiting += pairing.paired.max(), pairing.unbalanced.max()
        for half in pairing.pairs.reshape(-1).tolist():
            chosen += [np.stack([places[part][mask], values[part][mask]]) for mask, part in kept[half]]
    entries = np.concatenate([np.zeros((2, 0)), *chosen], axis=1)
    positions = layer.out_size[0] * layer.out_size[1]
    if product == "wgrad":
        per_value = layer.kernel[0] * layer.kernel[1] * positions / (layer.in_size[0] * layer.in_size[1])
        waiting *= per_value * -(-layer.out_channels // layer.groups // config.columns)
    else:
        waiting *= positions * -(-len(tensors[partner]) // config.columns)
    result = _multiplied(layer, product, tensors[partner], len(tensors["input"]) if side == "input" else 0, entries)
    return Computed(result, float(waiting[0]), float(waiting[1]), entries.shape[1], log)


def _as_four(tensor: NDArray) -> NDArray[np.float64]:
    """float64, with the two image axes that tensors of a linear layer lack."""
    tensor = np.ascontiguousarray(tensor, dtype=np.float64)
    return tensor.reshape(*tensor.shape, 1, 1) if tensor.ndim == 2 else tensor


def _read_back(
    layer: Layer, product: Product, tensor: NDArray[np.float64], config: Procrustes
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Compress the sparse operand and read it block by block; its values and flat indices as (lines, channels, side).

    For wgrad the lines are samples, or (samples x groups) channels apart; see `_dealt`.
    """
    places = np.arange(tensor.size).reshape(tensor.shape)
    if product == "wgrad":
        side = config.half(layer, product)[1]
        maps = tensor.reshape(len(tensor) * layer.in_channels, -1)
        packed = compress(maps, side, pointer_bits=config.pointer_bits)
        runs = len(packed.masks) // len(maps)
        read = np.stack([np.concatenate([packed.read(i, j) for j in range(runs)]) for i in range(len(maps))])
        shape = (len(tensor), layer.in_channels, maps.shape[1])
        return read[:, : maps.shape[1]].reshape(shape), places.reshape(shape)
    block, taps = _weight_block(layer, config), layer.kernel[0] * layer.kernel[1]
    packed = compress(tensor, block, pointer_bits=config.pointer_bits)
    outs, ins = layer.out_channels // layer.groups, layer.in_channels // layer.groups

    def kernel(k: int, c: int) -> NDArray:
        """The kernel that joins channel c of its group to filter k."""
        return packed.read(k, c) if taps > 1 else packed.read(k, c // block)[c % block][None]

    if product == "forward":
        lines = [[kernel(k, c) for c in range(ins)] for k in range(layer.out_channels)]
    else:
        filters = [range(c // ins * outs, (c // ins + 1) * outs) for c in range(layer.in_channels)]
        lines = [[kernel(k, c % ins) for k in mine] for c, mine in enumerate(filters)]
    return np.array(lines), _weight_lines(layer, product, places)


def _dealt(
    layer: Layer, product: Product, shape: tuple[int, ...], config: Procrustes
) -> Iterator[list[list[tuple[Any, ...]]]]:
    """For each working set and each of its half-tiles the places of its values in (lines, channels, side).

    In wgrad a half-tile has several parts if groups share the columns: one for each.
    """
    lines, channels, length = shape
    size, side = config.half(layer, product)
    beside, groups = (_groups_beside(layer, config), layer.groups) if product == "wgrad" else (1, 1)
    ins = channels // groups
    blocks = [
        [
            (slice(g * ins + c, g * ins + min(c + size, ins)), slice(i, i + side))
            for g in range(first, min(first + beside, groups))
        ]
        for first in range(0, groups, beside)
        for c in range(0, ins, size)
        for i in range(0, length, side)
    ]
    parts = 1 if config.cut == "lines" else 2
    for first in range(0, lines, config.lines_per_set):
        for number in range(0, len(blocks), parts):
            yield [
                [(line, *where) for where in blocks[block]] if line < lines and block < len(blocks) else []
                for block in range(number, number + parts)
                for line in range(first, first + config.lines_per_set)
            ]


def _multiplied(
    layer: Layer, product: Product, partner: NDArray[np.float64], samples: int, entries: NDArray[np.float64]
) -> NDArray[np.float64]:
    """The sums of a product from the values of the sparse operand, (2, E) flat indices and values."""
    outs, ins = layer.out_channels // layer.groups, layer.in_channels // layer.groups
    sizes = (*layer.kernel, *layer.stride, *layer.padding, *layer.dilation, ins, outs)
    geometry, places = np.array(sizes, dtype=np.int64), entries[0].astype(np.int64)
    image_shape = (samples or len(partner), layer.in_channels, *layer.in_size)
    if product == "wgrad":
        result = np.zeros(layer.weight_shape)
        _multiply_inputs(places, entries[1], image_shape, partner, result, geometry)
    elif product == "dgrad":
        result = np.zeros(image_shape)
        _multiply_weights(places, entries[1], result, partner, geometry, True)
    else:
        result = np.zeros((len(partner), layer.out_channels, *layer.out_size))
        _multiply_weights(places, entries[1], partner, result, geometry, False)
    return result[..., 0, 0] if layer.kind == "linear" else result


def value_check(
    layer: Layer,
    config: Procrustes | None = None,
    *,
    density: float = 0.1,
    batch: int = 2,
    seed: int = 0,
) -> pd.DataFrame:
    """Compute all three products of a layer on the emulated array, and compare every value with PyTorch's.

    The operands are small integers held in float64, so that every order of addition gives the same sum, to the bit.

    Args:
        layer: The layer.
        config: The accelerator; the default one if left out.
        density: Share of the weights that are not zero; of the inputs half are.
        batch: Samples.
        seed: Seed of the operands.

    Returns:
        One row a product: values, how many are equal, macs of the dense array and those made, and the cycles that
        `compute` and `simulate` count.
    """
    import torch
    from torch.nn import functional as F

    config = config or Procrustes()
    generator = np.random.default_rng(seed)

    def integers(kept: float, *shape: int) -> NDArray[np.float64]:
        values = generator.integers(1, 9, shape) * generator.choice([-1, 1], shape)
        return np.where(generator.random(shape) < kept, values, 0).astype(np.float64)

    x = integers(0.5, batch, layer.in_channels, *layer.in_size)
    weight = integers(density, *layer.weight_shape)
    gy = integers(1.0, batch, layer.out_channels, *layer.out_size)
    tx, tw = torch.tensor(x, requires_grad=True), torch.tensor(weight, requires_grad=True)
    out = F.conv2d(tx, tw, None, layer.stride, layer.padding, layer.dilation, layer.groups)
    gx, gw = torch.autograd.grad(out, (tx, tw), torch.tensor(gy))
    expected: dict[Product, NDArray] = {"forward": out.detach().numpy(), "dgrad": gx.numpy(), "wgrad": gw.numpy()}
    operands: dict[Operand, NDArray] = {"input": x, "weight": weight, "grad_output": gy}
    if layer.kind == "linear":
        operands = {name: value[..., 0, 0] for name, value in operands.items()}
        expected = {product: value[..., 0, 0] for product, value in expected.items()}
    masks = {name: Packed.of(value != 0) for name, value in operands.items()}
    frame = simulate(LayerTrace(layer, masks), config).set_index("product")
    rows = []
    for product in layer.products:
        made = compute(layer, product, operands, config)
        equal = int((made.values == expected[product]).sum())
        simulated = frame.loc[product, ["used", "cycles", "unbalanced_cycles"]].to_dict()
        row = {"product": product, "values": made.values.size, "equal": equal, "macs": layer.macs * batch}
        rows.append(
            row
            | {"made": simulated["used"], "cycles": simulated["cycles"], "computed_cycles": made.cycles}
            | {"unbalanced_cycles": simulated["unbalanced_cycles"], "computed_unbalanced": made.unbalanced_cycles}
        )
    return pd.DataFrame(rows)


def random_tiles(
    density: float,
    *,
    sets: int,
    tile: int = 144,
    rows: int = 16,
    spread: float = 0.0,
    cut: str = "inside",
    seed: int = 0,
) -> Loads:
    """Half-tiles of random masks, to be balanced.

    Args:
        density: Probability that a value is not zero, 0 to 1.
        sets: Working sets.
        tile: Values of a tile, an even number.
        rows: Rows of the array.
        spread: Standard deviation of the logarithm of a line's density around the mean.
        cut: "inside": both halves of a tile are of one line, and share its density; "lines": each is a line.
        seed: Seed of the generator.

    Returns:
        Loads (sets, 2 x rows), for `balance`.
    """
    if not 0 <= density <= 1:
        raise ValueError(f"density is {density}; expected 0 to 1")
    if tile < 2 or tile % 2:
        raise ValueError(f"tile is {tile}; expected an even number: it is cut in two halves")
    if spread < 0:
        raise ValueError(f"spread is {spread}; expected at least 0")
    generator = np.random.default_rng(seed)
    lines = generator.standard_normal((sets, rows if cut == "inside" else 2 * rows))
    factors = np.exp(spread * lines - spread**2 / 2)
    if cut == "inside":
        factors = np.tile(factors, (1, 2))
    return generator.binomial(tile // 2, np.minimum(density * factors, 1.0))


@dataclass(frozen=True)
class MaskStatistics:
    """What is kept of a trained mask to draw others like it at another size.

    Attributes:
        density: Share of the weights that are not zero.
        filters: Spread between filters: standard deviation of the logarithm of their densities, chance taken off.
        channels: The same between input channels.
        inputs: Share of the layer's input activations that are not zero.
    """

    density: float
    filters: float
    channels: float
    inputs: float


def mask_statistics(entry: LayerTrace) -> MaskStatistics:
    """Measure the masks of a layer; see `MaskStatistics`."""
    mask = entry.masks["weight"].mask()
    mask = mask.reshape(*mask.shape[:2], -1)
    spreads = []
    for axes in ((1, 2), (0, 2)):
        share = mask.mean(axis=axes)
        mean, size = float(share.mean()), mask.size / len(share)
        beyond = float(share.var()) - mean * (1 - mean) / size
        spreads.append(float(np.sqrt(np.log1p(max(beyond, 0.0) / mean**2))) if mean else 0.0)
    return MaskStatistics(float(mask.mean()), spreads[0], spreads[1], 1 - entry.masks["input"].sparsity)


def mask_report(trace: Trace) -> dict[str, float]:
    """The mask statistics of every layer, as numbers that a training run logs: "masks/0/density" and so on."""
    report: dict[str, float] = {}
    for number, entry in enumerate(trace.layers):
        report |= {f"masks/{number}/{name}": value for name, value in asdict(mask_statistics(entry)).items()}
    return report


def read_masks(row: Mapping[str, Any]) -> list[MaskStatistics]:
    """Turn what `mask_report` logged, one row of a table, into the statistics of the layers again."""
    names = [field.name for field in fields(MaskStatistics)]
    found: list[MaskStatistics] = []
    while f"masks/{len(found)}/density" in row:
        found.append(MaskStatistics(**{name: float(row[f"masks/{len(found)}/{name}"]) for name in names}))
    if not found:
        raise ValueError("the row has no columns of a mask report, such as 'masks/0/density'")
    return found


def at_depth(measured: Sequence[MaskStatistics], count: int) -> list[MaskStatistics]:
    """Statistics for a network of `count` layers, taken from those of another at the same relative depth."""
    if not measured or count < 1:
        raise ValueError(f"{len(measured)} layers were measured and {count} asked for; both must be at least 1")
    have = (np.arange(len(measured)) + 0.5) / len(measured)
    want = (np.arange(count) + 0.5) / count
    columns = {
        field.name: np.interp(want, have, [getattr(m, field.name) for m in measured])
        for field in fields(MaskStatistics)
    }
    return [MaskStatistics(**{name: float(column[i]) for name, column in columns.items()}) for i in range(count)]


def budget_densities(layers: Sequence[Layer], densities: Sequence[float], keep: float) -> list[float]:
    """Scale the densities of layers by one factor, so that all layers together keep a share of their weights.

    Args:
        layers: The layers.
        densities: Relative density of each; none goes above 1.
        keep: Share of all weights to keep, 0 to 1.
    """
    if not 0 <= keep <= 1 or len(layers) != len(densities) or min(densities) <= 0:
        raise ValueError(f"keep is {keep}, layers {len(layers)}, densities {len(densities)}; expected 0 to 1, as many")
    sizes = np.array([np.prod(layer.weight_shape) for layer in layers], dtype=np.float64)
    relative, low, high = np.array(densities, dtype=np.float64), 0.0, 1.0 / min(densities)
    for _ in range(60):
        middle = (low + high) / 2
        enough = (sizes * np.minimum(1, middle * relative)).sum() >= keep * sizes.sum()
        low, high = (low, middle) if enough else (middle, high)
    return np.minimum(1, high * relative).tolist()


def random_weights(
    layer: Layer, density: float, *, filters: float = 0.0, channels: float = 0.0, seed: int = 0
) -> NDArray[np.bool_]:
    """A random mask of a layer's weights.

    Args:
        layer: The layer.
        density: Share of ones, 0 to 1.
        filters: Spread between filters; see `MaskStatistics`.
        channels: Spread between input channels.
        seed: Seed of the generator.

    Returns:
        Booleans of the weights' shape, two-dimensional for a linear layer.
    """
    if not 0 <= density <= 1 or filters < 0 or channels < 0:
        raise ValueError(f"density is {density}, spreads {filters} and {channels}; expected 0 to 1 and at least 0")
    generator = np.random.default_rng(seed)
    outs, ins = layer.weight_shape[:2]
    shares = np.exp(filters * generator.standard_normal(outs))[:, None]
    shares = shares * np.exp(channels * generator.standard_normal(ins))[None]
    chance = shares / shares.mean() * density
    for _ in range(20):  # what is cut off above 1 goes to the others
        chance = np.minimum(chance * (density / max(chance.mean(), 1e-300)), 1.0)
    draws = generator.random(layer.weight_shape, dtype=np.float32)
    mask = draws < chance[:, :, None, None].astype(np.float32)
    return mask.reshape(outs, ins) if layer.kind == "linear" else mask


def input_masks(model: nn.Module, layers: Sequence[Layer], batch: int, shape: Sequence[int]) -> list[Packed]:
    """The zero masks of the layers' inputs while a batch of noise passes forward through a model in training mode.

    Args:
        model: The model whose layers these are.
        layers: As `layers_of` returns them.
        batch: Images.
        shape: Shape of an image.

    Returns:
        One mask a layer.
    """
    import torch

    found: dict[str, Packed] = {}
    modules, handles = dict(model.named_modules()), []
    for layer in layers:

        def note(module: nn.Module, args: tuple[Any, ...], name: str = layer.name) -> None:
            found[name] = Packed.of((args[0] != 0).numpy())

        handles.append(modules[layer.name].register_forward_pre_hook(note))
    try:
        with torch.no_grad():
            model.train()(torch.randn(batch, *shape))
    finally:
        for handle in handles:
            handle.remove()
    return [found[layer.name] for layer in layers]


def random_trace(
    layers: Sequence[Layer], inputs: Sequence[Packed], masks: Sequence[MaskStatistics], *, seed: int = 0
) -> Trace:
    """A trace with random weight masks of given statistics and given input masks, for `simulate`."""
    entries = []
    for number, (layer, seen, like) in enumerate(zip(layers, inputs, masks, strict=True)):
        weight = random_weights(
            layer, like.density, filters=like.filters, channels=like.channels, seed=seed * 1000 + number
        )
        entries.append(LayerTrace(layer, {"input": seen, "weight": Packed.of(weight)}))
    return Trace(tuple(entries), "float32", {"seed": seed})


def vgg_s(width: float = 1.0, *, in_channels: int = 3, num_classes: int = 10, hidden: int | None = None) -> nn.Module:
    """VGG-S for images of 32 x 32: 13 convolutions with batch normalisation, and two linear layers, without biases.

    At width 1 it has 14,987,200 parameters and makes 313,463,808 multiply-accumulates an image.

    Args:
        width: Factor on all widths.
        in_channels: Channels of the image.
        num_classes: Outputs.
        hidden: Units between the linear layers; 512 times the width by default.
    """
    from torch import nn

    parts: list[nn.Module] = []
    channels = in_channels
    for stage, depth in ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3)):
        for _ in range(depth):
            out = max(1, round(stage * width))
            parts += [nn.Conv2d(channels, out, 3, padding=1, bias=False), nn.BatchNorm2d(out), nn.ReLU()]
            channels = out
        parts.append(nn.MaxPool2d(2))
    units = hidden or channels
    head = [nn.Flatten(), nn.Linear(channels, units, bias=False), nn.BatchNorm1d(units), nn.ReLU()]
    return nn.Sequential(*parts, *head, nn.Linear(units, num_classes, bias=False))


def wide_resnet(depth: int = 28, widen: int = 10, *, num_classes: int = 10) -> nn.Module:
    """A wide residual network of pre-activation blocks for images of 32 x 32, WRN-depth-widen.

    WRN-28-10 has 36,479,194 parameters and makes 5,243,328,768 multiply-accumulates an image.

    Args:
        depth: Convolutions along the main path plus one; 6 n + 4.
        widen: Factor on the widths 16, 32, 64.
        num_classes: Outputs.
    """
    from torch import Tensor, nn
    from torch.nn import functional as F

    if (depth - 4) % 6 or depth < 10 or widen < 1:
        raise ValueError(f"depth is {depth} and widen {widen}; expected a depth of 6 n + 4 and at least 1")

    class Block(nn.Module):
        """Two 3x3 convolutions, each after batch normalisation and ReLU, and a shortcut."""

        def __init__(self, channels: int, out: int, stride: int) -> None:
            super().__init__()
            self.norm1, self.norm2 = nn.BatchNorm2d(channels), nn.BatchNorm2d(out)
            self.conv1 = nn.Conv2d(channels, out, 3, stride, 1, bias=False)
            self.conv2 = nn.Conv2d(out, out, 3, 1, 1, bias=False)
            self.shortcut = nn.Conv2d(channels, out, 1, stride, bias=False) if channels != out else None

        def forward(self, x: Tensor) -> Tensor:
            active = F.relu(self.norm1(x))
            around = x if self.shortcut is None else self.shortcut(active)
            return around + self.conv2(F.relu(self.norm2(self.conv1(active))))

    parts: list[nn.Module] = [nn.Conv2d(3, 16, 3, padding=1, bias=False)]
    channels = 16
    for stage, base in enumerate((16, 32, 64)):
        for number in range((depth - 4) // 6):
            parts.append(Block(channels, base * widen, 2 if stage and not number else 1))
            channels = base * widen
    parts += [nn.BatchNorm2d(channels), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return nn.Sequential(*parts, nn.Linear(channels, num_classes))


def densenet_bc(depth: int = 100, growth: int = 12, *, num_classes: int = 10) -> nn.Module:
    """DenseNet-BC for images of 32 x 32, from torchvision's blocks. Which DenseNet the paper takes is not known to us.

    Args:
        depth: 6 n + 4; each of the three blocks has n bottleneck layers.
        growth: Channels that each layer adds.
        num_classes: Outputs.
    """
    from torch import nn
    from torchvision.models import DenseNet

    if (depth - 4) % 6 or depth < 10 or growth < 1:
        raise ValueError(f"depth is {depth} and growth {growth}; expected a depth of 6 n + 4 and at least 1")
    model = DenseNet(growth, ((depth - 4) // 6,) * 3, 2 * growth, num_classes=num_classes)
    model.features.conv0 = nn.Conv2d(3, 2 * growth, 3, padding=1, bias=False)
    model.features.pool0 = nn.Identity()
    return model


#: The five networks, with the shape of their images.
NETWORKS: dict[str, tuple[int, int, int]] = {
    "VGG-S": (3, 32, 32),
    "WRN-28-10": (3, 32, 32),
    "DenseNet-BC": (3, 32, 32),
    "ResNet-18": (3, 224, 224),
    "MobileNetV2": (3, 224, 224),
}


def build(name: str) -> nn.Module:
    """One of `NETWORKS` at full size, randomly initialised."""
    from torchvision.models import get_model

    if name not in NETWORKS:
        raise ValueError(f"network {name!r} is unknown; expected one of {', '.join(NETWORKS)}")
    if name == "VGG-S":
        return vgg_s()
    if name == "WRN-28-10":
        return wide_resnet()
    if name == "DenseNet-BC":
        return densenet_bc()
    return get_model({"ResNet-18": "resnet18", "MobileNetV2": "mobilenet_v2"}[name], weights=None)
