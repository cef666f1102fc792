"""Lowering: how the three products of a layer become streams of operands for a processing element.

Every output value of a product is one dot product. A processing element reads its two vectors in steps of `lanes`
values; the vector of one operand, cut into steps, is a *stream*. An accelerator that skips zeros looks at the stream of
one operand, the *scheduled side*, and meets every stream with several partners, the streams of the other operand:

| product | output | sides | a stream of the first side | order of the reduction |
| --- | --- | --- | --- | --- |
| forward | O | input, weight | the window of one output position | kernel row, kernel column, channel block |
| dgrad | input gradient | grad_output, weight | the window of one input position | the same, over output channels |
| wgrad | weight gradient | grad_output, input | one output channel | output positions, row by row |

The zeros that a stride would insert between output gradients are not streamed: dgrad falls into stride x stride
*phases* of input positions, each of which uses only the kernel taps that meet a gradient. Padding and the channels
that fill up the last block are streamed as zeros. Images are lowered one at a time; a linear layer is a 1x1
convolution whose positions are the samples of the batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from leantrain.hardware.workloads import Layer, Product

__all__ = [
    "SIDES",
    "Operand",
    "Chunk",
    "Phase",
    "StreamSet",
    "TileSource",
    "Words",
    "operand_vectors",
    "pack_lanes",
    "phases",
    "stream_sets",
    "streams",
]

#: The tensors of a layer.
Operand = Literal["input", "weight", "grad_output"]

#: The two operands of each product; the first is scheduled when both have the same share of zeros.
SIDES: dict[Product, tuple[Operand, Operand]] = {
    "forward": ("input", "weight"),
    "dgrad": ("grad_output", "weight"),
    "wgrad": ("grad_output", "input"),
}

#: Non-zero bits of the lanes of one step; lane 0 is the lowest bit.
Words = NDArray[np.uint16]

#: Steps held at once while a layer is lowered; 2 bytes each.
_CHUNK_STEPS = 1 << 22


@dataclass(frozen=True)
class Phase:
    """The positions of an output image that use the same kernel taps.

    Attributes:
        positions: Flat indices of the output positions, (P,), row by row.
        taps: Kernel row and column of each tap, (T, 2), in the order of the reduction.
        source: For each position and tap the flat index of the value it reads in an image that has one more row and
            one more column of zeros at the end, (P, T); taps that fall outside point into that margin.
    """

    positions: NDArray[np.int64]
    taps: NDArray[np.int64]
    source: NDArray[np.int64]


@dataclass(frozen=True)
class StreamSet:
    """How many streams a product has and how often each is run; a product with phases has several sets.

    Attributes:
        batches: Independent batches of streams; streams of different batches never share a tile.
        streams: Streams in a batch.
        partner_batches: Batches of streams of the other operand that each stream meets; kept apart in the same way.
        partners: Streams in such a batch.
        repeats: How often the whole is done with the same scheduled operand (the images, for weights).
        steps: Steps of a stream.
    """

    batches: int
    streams: int
    partner_batches: int
    partners: int
    repeats: int
    steps: int


class PhaseStreams(NamedTuple):
    """The streams of one phase of a product, both operands; see `TileSource`.

    Attributes:
        batches: Independent batches, images times channel groups.
        first: Streams of the first side of `SIDES` in a batch.
        second: Streams of the second side in a batch, each of which meets each of the first.
        steps: Steps of a stream.
    """

    batches: int
    first: int
    second: int
    steps: int


class Chunk(NamedTuple):
    """Some of the streams of a product, in the tile groups that run together.

    Attributes:
        phase: Index of their set in `stream_sets`.
        words: Non-zero bits, (groups, rows, steps).
        filled: Rows of each group that hold a stream, (groups,); the rest are zeros.
    """

    phase: int
    words: Words
    filled: NDArray[np.int64]


def _check_side(product: Product, side: Operand) -> None:
    if product not in SIDES:
        raise ValueError(f"product is {product!r}; expected one of {', '.join(SIDES)}")
    if side not in SIDES[product]:
        raise ValueError(f"side of {product} is {side!r}; expected one of {', '.join(SIDES[product])}")


def pack_lanes(mask: NDArray[np.bool_], lanes: int = 16) -> Words:
    """Pack the last axis of a mask into words of `lanes` bits, filling up the last word with zeros.

    Args:
        mask: (..., D) booleans.
        lanes: Bits of a word, 1 to 16; lane 0 is the lowest bit.

    Returns:
        (..., ceil(D / lanes)) words.
    """
    if mask.dtype != np.bool_:
        raise ValueError(f"mask has dtype {mask.dtype}; expected bool")
    if not 1 <= lanes <= 16:
        raise ValueError(f"lanes is {lanes}; expected 1 to 16, the bits of a word")
    *front, length = mask.shape
    blocks = -(-length // lanes)
    padded = np.zeros((*front, blocks, 16), dtype=np.bool_)
    if length == blocks * lanes:
        padded[..., :lanes] = mask.reshape(*front, blocks, lanes)
    else:
        full = length // lanes
        padded[..., :full, :lanes] = mask[..., : full * lanes].reshape(*front, full, lanes)
        padded[..., full, : length - full * lanes] = mask[..., full * lanes :]
    return np.packbits(padded, axis=-1, bitorder="little").view("<u2")[..., 0]


def _axis_taps(
    product: Product, layer: Layer, axis: int
) -> list[tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]]:
    """Along one axis: for each phase its positions (P,), taps (T,) and sources (P, T)."""
    kernel, stride, pad = layer.kernel[axis], layer.stride[axis], layer.padding[axis]
    dilation, size_in, size_out = layer.dilation[axis], layer.in_size[axis], layer.out_size[axis]
    taps = np.arange(kernel)
    if product != "dgrad":
        positions = np.arange(size_out)
        source = positions[:, None] * stride - pad + taps[None, :] * dilation
        return [(positions, taps, np.where((source < 0) | (source >= size_in), size_in, source))]
    found = []
    for phase in range(stride):
        positions = np.arange(size_in)[(np.arange(size_in) + pad) % stride == phase]
        # Rotated kernel: the last tap first, so that a window is read from its top left corner.
        hits = taps[::-1][(taps[::-1] * dilation) % stride == phase]
        source = (positions[:, None] + pad - hits[None, :] * dilation) // stride
        found.append((positions, hits, np.where((source < 0) | (source >= size_out), size_out, source)))
    return found


@lru_cache(maxsize=256)
def phases(layer: Layer, product: Product) -> tuple[Phase, ...]:
    """The index tables of a product: which value each output position reads at each kernel tap.

    For "forward" and "wgrad" there is one phase, over the output positions, that reads the input. For "dgrad" the
    phases cover the input positions and read the output gradient; a phase without taps (its gradients are zero
    whatever the operands) is left out. The tables of the layers last asked for are kept; do not write into them.
    """
    width = (layer.in_size if product != "dgrad" else layer.out_size)[1] + 1
    row_length = (layer.out_size if product != "dgrad" else layer.in_size)[1]
    result = []
    for rows, row_taps, row_source in _axis_taps(product, layer, 0):
        for columns, column_taps, column_source in _axis_taps(product, layer, 1):
            count, taps = rows.size * columns.size, row_taps.size * column_taps.size
            if count == 0 or taps == 0:
                continue
            source = row_source[:, None, :, None] * width + column_source[None, :, None, :]
            grid = np.meshgrid(row_taps, column_taps, indexing="ij")
            result.append(
                Phase(
                    positions=(rows[:, None] * row_length + columns[None, :]).reshape(count),
                    taps=np.stack(grid, axis=-1).reshape(taps, 2),
                    source=source.reshape(count, taps),
                )
            )
    return tuple(result)


def stream_sets(layer: Layer, product: Product, side: Operand, *, lanes: int = 16, batch: int = 1) -> list[StreamSet]:
    """Count the streams of a product without looking at any data; see `StreamSet`.

    Args:
        layer: The layer.
        product: The product.
        side: The scheduled operand, one of `SIDES[product]`.
        lanes: Values of a step.
        batch: Images, or samples of a linear layer.
    """
    _check_side(product, side)
    if batch < 1 or lanes < 1:
        raise ValueError(f"batch is {batch} and lanes is {lanes}; both must be at least 1")
    if layer.kind == "linear":
        layer, batch = layer.batch_as_image(batch), 1
    ins, outs = layer.in_channels // layer.groups, layer.out_channels // layer.groups
    images = batch * layer.groups
    if product == "wgrad":
        steps = -(-layer.out_size[0] * layer.out_size[1] // lanes)
        taps = layer.kernel[0] * layer.kernel[1]
        if side == "grad_output":
            return [StreamSet(images, outs, taps, ins, 1, steps)]
        return [StreamSet(images * taps, ins, 1, outs, 1, steps)]
    reduced, other = (ins, outs) if product == "forward" else (outs, ins)
    sets = []
    for phase in phases(layer, product):
        steps = len(phase.taps) * -(-reduced // lanes)
        if side == "weight":
            sets.append(StreamSet(layer.groups, other, 1, len(phase.positions), batch, steps))
        else:
            sets.append(StreamSet(images, len(phase.positions), 1, other, 1, steps))
    return sets


def _as_image(layer: Layer, tensors: Mapping[str, NDArray]) -> tuple[Layer, dict[str, NDArray]]:
    """Check the shapes of a layer's tensors and bring those of a linear layer into the form of a convolution's."""
    shapes: dict[str, tuple[int, ...]] = {
        "input": (layer.in_channels, *layer.in_size),
        "grad_output": (layer.out_channels, *layer.out_size),
        "weight": layer.weight_shape,
    }
    batches = {len(tensor) for name, tensor in tensors.items() if name != "weight"}
    if len(batches) > 1:
        raise ValueError(f"layer {layer.name!r}: input and output gradient have different batches, {sorted(batches)}")
    result = {}
    for name, tensor in tensors.items():
        expected = shapes[name]
        if layer.kind == "linear":
            expected = expected[:2] if name == "weight" else expected[:1]
        given = tensor.shape if name == "weight" else tensor.shape[1:]
        if given != expected or 0 in tensor.shape:
            raise ValueError(f"layer {layer.name!r}: {name} has shape {tensor.shape}; expected (batch,) + {expected}")
        if layer.kind == "linear":
            result[name] = tensor[:, :, None, None] if name == "weight" else tensor.T[None, :, :, None]
        else:
            result[name] = tensor
    return (layer.batch_as_image(batches.pop()) if layer.kind == "linear" and batches else layer), result


def _blocks_last(tensor: NDArray[np.bool_], groups: int, lanes: int) -> Words:
    """(N, C, H, W) to words (N * groups, (H + 1) * (W + 1), blocks), with a margin of zeros at the end of each axis."""
    images, channels, height, width = tensor.shape
    words = pack_lanes(
        tensor.reshape(images, groups, channels // groups, height, width).transpose(0, 1, 3, 4, 2), lanes
    )
    padded = np.zeros((images, groups, height + 1, width + 1, words.shape[-1]), dtype=np.uint16)
    padded[:, :, :height, :width] = words
    return padded.reshape(images * groups, (height + 1) * (width + 1), -1)


def _grouped(phase: int, words: Words, rows: int) -> Chunk:
    """(batches, streams, steps) to (tile groups, rows, steps); the last group of a batch is filled up with zeros."""
    batches, count, steps = words.shape
    groups = -(-count // rows)
    if count != groups * rows:
        padded = np.zeros((batches, groups * rows, steps), dtype=np.uint16)
        padded[:, :count] = words
        words = padded
    filled = np.full((batches, groups), rows, dtype=np.int64)
    filled[:, -1] = count - (groups - 1) * rows
    return Chunk(phase, np.ascontiguousarray(words).reshape(batches * groups, rows, steps), filled.reshape(-1))


def _weight_streams(
    weight: NDArray[np.bool_], layer: Layer, product: Product, taps: NDArray[np.int64], lanes: int
) -> Words:
    """Words (groups, streams, steps) of the weights of one phase."""
    kept = weight[:, :, taps[:, 0], taps[:, 1]]  # (K, C / groups, T)
    kept = kept.reshape(layer.groups, -1, *kept.shape[1:])
    order = (0, 1, 3, 2) if product == "forward" else (0, 2, 3, 1)
    words = pack_lanes(kept.transpose(order), lanes)
    return words.reshape(*words.shape[:2], -1)


def streams(
    layer: Layer,
    product: Product,
    side: Operand,
    mask: NDArray[np.bool_],
    *,
    rows: int,
    lanes: int = 16,
    chunk_steps: int = _CHUNK_STEPS,
) -> Iterator[Chunk]:
    """Lower the scheduled operand of a product to the streams of tiles with `rows` rows.

    Memory is bounded: the streams come in chunks of about `chunk_steps` steps (one tile group at least).

    Args:
        layer: The layer.
        product: The product.
        side: The scheduled operand, one of `SIDES[product]`.
        mask: True where the operand is not zero: (N, C, H, W) for "input", (N, K, OH, OW) for "grad_output",
            (K, C / groups, kh, kw) for "weight"; (N, C), (N, K) and (K, C) for a linear layer.
        rows: Streams that share a tile; those of one group belong to one image and one channel group.
        lanes: Values of a step, 1 to 16.
        chunk_steps: Bound on the steps held at once.

    Yields:
        The streams, chunk after chunk.
    """
    _check_side(product, side)
    if rows < 1 or chunk_steps < 1:
        raise ValueError(f"rows is {rows} and chunk_steps is {chunk_steps}; both must be at least 1")
    layer, tensors = _as_image(layer, {side: mask})
    mask = tensors[side]
    if product == "wgrad":
        yield from _position_streams(layer, side, mask, rows, lanes, chunk_steps)
        return
    if side == "weight":
        for number, phase in enumerate(phases(layer, product)):
            yield _grouped(number, _weight_streams(mask, layer, product, phase.taps, lanes), rows)
        return
    blocks = _blocks_last(mask, layer.groups, lanes)
    for number, phase in enumerate(phases(layer, product)):
        count, steps = len(phase.positions), len(phase.taps) * blocks.shape[-1]
        positions = count if count * steps <= chunk_steps else max(rows, chunk_steps // steps // rows * rows)
        images = max(1, chunk_steps // (steps * min(positions, count)))
        for first in range(0, count, positions):
            source = phase.source[first : first + positions]
            for image in range(0, len(blocks), images):
                windows = blocks[image : image + images].take(source, axis=1)
                yield _grouped(number, windows.reshape(*windows.shape[:2], steps), rows)


def _position_streams(
    layer: Layer, side: Operand, mask: NDArray[np.bool_], rows: int, lanes: int, chunk_steps: int
) -> Iterator[Chunk]:
    """The streams of wgrad, along the output positions."""
    images, channels, height, width = mask.shape
    per_group = channels // layer.groups
    values = mask.reshape(images * layer.groups, per_group, height * width)
    taps = 1
    if side == "input":
        padded = np.zeros((images * layer.groups, per_group, height + 1, width + 1), dtype=np.bool_)
        padded[:, :, :height, :width] = mask.reshape(images * layer.groups, per_group, height, width)
        values = padded.reshape(images * layer.groups, per_group, -1)
        source = phases(layer, "wgrad")[0].source.T  # (T, P)
        taps = len(source)
    steps = -(-layer.out_size[0] * layer.out_size[1] // lanes)
    # Unless all channels fit, a chunk holds a multiple of the rows, so that no tile group is cut in two.
    fits = per_group * taps * steps <= chunk_steps
    at_once = per_group if fits else max(rows, chunk_steps // (steps * taps) // rows * rows)
    batches = max(1, chunk_steps // (steps * taps * min(at_once, per_group)))
    for first in range(0, per_group, at_once):
        for image in range(0, len(values), batches):
            part = values[image : image + batches, first : first + at_once]
            if side == "input":
                part = part.take(source, axis=2).swapaxes(1, 2)  # (batches, T, channels, P)
                part = part.reshape(-1, *part.shape[2:])
            yield _grouped(0, pack_lanes(part, lanes), rows)


def operand_vectors(
    layer: Layer, product: Product, tensors: Mapping[Operand, NDArray], index: tuple[int, ...], *, lanes: int = 16
) -> tuple[NDArray, NDArray]:
    """The two vectors whose dot product is one output value of a product, in the order of the streams.

    Args:
        layer: The layer.
        product: The product.
        tensors: Values of both operands of the product, with the shapes of `streams`.
        index: Index of the output value: (image, k, row, column) of the output, (image, c, row, column) of the input's
            gradient, (image, k, c, kernel row, kernel column) of one image's share of the weights' gradient. For a
            linear layer the image is 0 and the row is the sample.
        lanes: Values of a step.

    Returns:
        The operands in the order of `SIDES[product]`, each (steps, lanes), filled up with zeros.
    """
    for side in SIDES[product]:
        if side not in tensors:
            raise ValueError(f"{product} needs the operands {' and '.join(SIDES[product])}; {side} is missing")
    layer, images = _as_image(layer, {side: tensors[side] for side in SIDES[product]})
    ins, outs = layer.in_channels // layer.groups, layer.out_channels // layer.groups

    def with_margin(name: str, image: int, first: int, count: int) -> NDArray:
        values = images[name][image, first : first + count]
        padded = np.zeros((count, values.shape[1] + 1, values.shape[2] + 1), dtype=values.dtype)
        padded[:, :-1, :-1] = values
        return padded.reshape(count, -1)

    if product == "wgrad":
        image, k, c, row, column = index
        phase = phases(layer, "wgrad")[0]
        tap = row * layer.kernel[1] + column
        first = images["grad_output"][image, k].reshape(-1)
        second = with_margin("input", image, k // outs * ins + c, 1)[0, phase.source[:, tap]]
        return _steps(first[None], lanes), _steps(second[None], lanes)
    image, channel, row, column = index
    row_length = (layer.out_size if product == "forward" else layer.in_size)[1]
    group = channel // (outs if product == "forward" else ins)
    reduced = ins if product == "forward" else outs
    for phase in phases(layer, product):
        place = np.flatnonzero(phase.positions == row * row_length + column)
        if place.size:
            break
    else:
        return np.zeros((0, lanes)), np.zeros((0, lanes))
    data = with_margin(SIDES[product][0], image, group * reduced, reduced)[:, phase.source[place[0]]]
    weight = images["weight"][:, :, phase.taps[:, 0], phase.taps[:, 1]]
    own = weight[channel] if product == "forward" else weight[group * outs : (group + 1) * outs, channel % ins]
    return _steps(data.T, lanes), _steps(own.T, lanes)


def _steps(values: NDArray, lanes: int) -> NDArray:
    """(T, D) values to (T * ceil(D / lanes), lanes), each tap filled up with zeros."""
    taps, length = values.shape
    blocks = -(-length // lanes)
    filled = np.zeros((taps, blocks * lanes), dtype=values.dtype)
    filled[:, :length] = values
    return filled.reshape(taps * blocks, lanes)


class TileSource:
    """The values of both operands of a product, one tile at a time; nothing larger than a tile is built.

    A tile pairs some streams of the first side with some of the second. Unlike `streams`, which looks at one operand,
    the input's streams of "wgrad" are numbered through all channels and kernel taps, the tap fastest.

    Args:
        layer: The layer.
        product: The product.
        tensors: Both operands of the product, with the shapes of `streams`, of any data type.
        lanes: Values of a step.

    Attributes:
        phases: The streams of each phase.
    """

    def __init__(self, layer: Layer, product: Product, tensors: Mapping[Operand, NDArray], *, lanes: int = 8) -> None:
        for side in SIDES[product]:
            if side not in tensors:
                raise ValueError(f"{product} needs the operands {' and '.join(SIDES[product])}; {side} is missing")
        if lanes < 1:
            raise ValueError(f"lanes is {lanes}; expected at least 1")
        self._layer, self._tensors = _as_image(layer, {side: tensors[side] for side in SIDES[product]})
        self._product, self._lanes = product, lanes
        self._ins = self._layer.in_channels // self._layer.groups
        self._outs = self._layer.out_channels // self._layer.groups
        self._phases = phases(self._layer, product)
        batches = len(self._tensors[SIDES[product][0]]) * self._layer.groups
        if product == "wgrad":
            steps = -(-self._layer.out_size[0] * self._layer.out_size[1] // lanes)
            taps = self._layer.kernel[0] * self._layer.kernel[1]
            self.phases = [PhaseStreams(batches, self._outs, self._ins * taps, steps)]
        else:
            reduced, other = (self._ins, self._outs) if product == "forward" else (self._outs, self._ins)
            blocks = -(-reduced // lanes)
            self.phases = [PhaseStreams(batches, len(p.positions), other, len(p.taps) * blocks) for p in self._phases]

    def operands(
        self, phase: int, batch: int, first: NDArray[np.int64], second: NDArray[np.int64]
    ) -> tuple[NDArray, NDArray]:
        """The values of one tile.

        Args:
            phase: Index of the phase.
            batch: Index of the batch in its phase.
            first: Indices of the streams of the first side, (F,).
            second: Indices of the streams of the second side, (S,).

        Returns:
            The streams of both sides, (F, steps, lanes) and (S, steps, lanes), filled up with zeros.
        """
        image, group = divmod(batch, self._layer.groups)
        outs = slice(group * self._outs, (group + 1) * self._outs)
        ins = slice(group * self._ins, (group + 1) * self._ins)
        table = self._phases[phase]
        if self._product == "wgrad":
            gradient = self._tensors["grad_output"][image, outs][first].reshape(len(first), -1)
            channel, tap = np.divmod(second, table.source.shape[1])
            window = _gather(self._tensors["input"][image, ins][channel], table.source[:, tap].T[:, None])[:, 0]
            return self._cut(gradient[:, None]), self._cut(window[:, None])
        data = self._tensors[SIDES[self._product][0]][image, ins if self._product == "forward" else outs]
        windows = _gather(data, np.broadcast_to(table.source[first], (len(data), len(first), len(table.taps))))
        weight = self._tensors["weight"][outs]
        if self._product == "forward":
            own = weight[second][:, :, table.taps[:, 0], table.taps[:, 1]].transpose(0, 2, 1)
        else:
            own = weight[:, second][:, :, table.taps[:, 0], table.taps[:, 1]].transpose(1, 2, 0)
        return self._cut(windows.transpose(1, 2, 0)), self._cut(own)

    def outputs(
        self, phase: int, batch: int, first: NDArray[np.int64], second: NDArray[np.int64]
    ) -> tuple[NDArray[np.int64], ...]:
        """Where the output values of a tile belong, as an index into the output of the product.

        Args:
            phase: Index of the phase.
            batch: Index of the batch in its phase.
            first: Indices of the streams of the first side, (F,).
            second: Indices of the streams of the second side, (S,).

        Returns:
            Index arrays that broadcast to (F, S): (image, k, row, column) of the output, (image, c, row, column) of the
            input's gradient, (image, k, c, kernel row, kernel column) of one image's share of the weights' gradient.
            For a linear layer the image is 0 and the row is the sample.
        """
        image, group = (np.array(index) for index in divmod(batch, self._layer.groups))
        table = self._phases[phase]
        if self._product == "wgrad":
            channel, tap = np.divmod(second, table.source.shape[1])
            kernel_row, kernel_column = np.divmod(tap, self._layer.kernel[1])
            return image, (group * self._outs + first)[:, None], channel, kernel_row, kernel_column
        other, size = (
            (self._outs, self._layer.out_size) if self._product == "forward" else (self._ins, self._layer.in_size)
        )
        row, column = np.divmod(table.positions[first][:, None], size[1])
        return image, group * other + second, row, column

    def _cut(self, values: NDArray) -> NDArray:
        """(F, T, D) values to (F, T * ceil(D / lanes), lanes)."""
        count, taps, length = values.shape
        blocks = -(-length // self._lanes)
        filled = np.zeros((count, taps, blocks * self._lanes), dtype=values.dtype)
        filled[:, :, :length] = values
        return filled.reshape(count, taps * blocks, self._lanes)


def _gather(images: NDArray, source: NDArray[np.int64]) -> NDArray:
    """Values of (C, H, W) at (C, P, T) places, flat indices of an image with one more row and column of zeros."""
    channels, height, width = images.shape
    row, column = np.divmod(source, width + 1)
    inside = (row < height) & (column < width)
    flat = np.where(inside, row * width + column, 0)
    found = np.take_along_axis(images.reshape(channels, -1), flat.reshape(channels, -1), axis=1).reshape(source.shape)
    return np.where(inside, found, np.zeros((), images.dtype))
