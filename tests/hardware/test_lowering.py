"""Tests of the lowering: against torch's unfold and autograd, against the operand vectors, counts, bad input."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from torch.nn import functional as F

from leantrain.hardware.lowering import SIDES, operand_vectors, pack_lanes, phases, stream_sets, streams
from leantrain.hardware.workloads import PRODUCTS, Layer

SHAPES = [
    Layer("plain", "conv", 20, 7, (3, 3), (1, 1), (1, 1), in_size=(6, 5), out_size=(6, 5)),
    Layer("strided", "conv", 5, 6, (3, 3), (2, 2), (1, 1), in_size=(9, 8), out_size=(5, 4)),
    Layer("wide stride", "conv", 3, 4, (2, 2), (3, 3), in_size=(8, 9), out_size=(3, 3)),
    Layer("uneven", "conv", 8, 12, (3, 2), (1, 2), (1, 0), (2, 1), groups=2, in_size=(9, 8), out_size=(7, 4)),
    Layer("dilated and strided", "conv", 4, 4, (3, 3), (2, 2), (2, 2), (2, 2), in_size=(8, 8), out_size=(4, 4)),
    Layer("depthwise", "conv", 6, 6, (3, 3), (1, 1), (1, 1), groups=6, in_size=(5, 6), out_size=(5, 6)),
    Layer("linear", "linear", 37, 21),
]
BATCH = 3


def operands(layer: Layer, seed: int = 0) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(seed)
    linear = layer.kind == "linear"
    shapes = {
        "input": (BATCH, layer.in_channels) + (() if linear else layer.in_size),
        "weight": layer.weight_shape[:2] if linear else layer.weight_shape,
        "grad_output": (BATCH, layer.out_channels) + (() if linear else layer.out_size),
    }
    return {name: generator.random(shape) > 0.4 for name, shape in shapes.items()}


def test_shapes_are_consistent_with_torch():
    for layer in SHAPES[:-1]:
        x, w = torch.zeros(1, layer.in_channels, *layer.in_size), torch.zeros(layer.weight_shape)
        out = F.conv2d(x, w, None, layer.stride, layer.padding, layer.dilation, layer.groups)
        assert tuple(out.shape[1:]) == (layer.out_channels, *layer.out_size)


@settings(max_examples=60, deadline=None)
@given(
    mask=arrays(np.bool_, st.tuples(st.integers(1, 3), st.integers(1, 40))),
    lanes=st.integers(1, 16),
)
def test_packed_lanes_hold_every_bit_once(mask, lanes):
    words = pack_lanes(mask, lanes)
    assert words.shape == (mask.shape[0], -(-mask.shape[1] // lanes))
    bits = ((words[..., None] >> np.arange(16)) & 1).astype(bool)
    assert not bits[..., lanes:].any()
    flat = bits[..., :lanes].reshape(mask.shape[0], -1)
    assert (flat[:, : mask.shape[1]] == mask).all()
    assert not flat[:, mask.shape[1] :].any()


def test_windows_of_the_forward_product_equal_unfold():
    layer = SHAPES[0]
    mask = operands(layer)["input"]
    chunks = list(streams(layer, "forward", "input", mask, rows=1))
    words = np.concatenate([chunk.words[:, 0] for chunk in chunks])
    # unfold gives (N, C * 9, positions), channel first; the streams have the taps first, then blocks of 16 channels.
    columns = F.unfold(torch.tensor(mask, dtype=torch.float32), (3, 3), padding=1).numpy()
    columns = columns.reshape(BATCH, 20, 9, 30).transpose(0, 3, 2, 1).reshape(-1, 9, 20) > 0
    assert (words == pack_lanes(columns).reshape(BATCH * 30, 18)).all()


@pytest.mark.parametrize("layer", SHAPES, ids=lambda layer: layer.name)
def test_dgrad_phases_hold_the_gradients_that_reach_each_position(layer):
    """The set bits of a position's stream against autograd's gradient of the input, masks as gradients, weights one."""
    if layer.kind == "linear":
        layer = layer.batch_as_image(BATCH)
    mask = torch.tensor(np.random.default_rng(1).random((1, layer.out_channels, *layer.out_size)) > 0.5).double()
    x = torch.zeros((1, layer.in_channels, *layer.in_size), dtype=torch.float64, requires_grad=True)
    w = torch.ones(layer.weight_shape, dtype=torch.float64)
    out = F.conv2d(x, w, None, layer.stride, layer.padding, layer.dilation, layer.groups)
    (gradient,) = torch.autograd.grad(out, x, mask)
    expected = gradient.numpy().reshape(layer.groups, -1, layer.in_size[0] * layer.in_size[1])[:, 0]
    found = np.zeros_like(expected)
    tables = phases(layer, "dgrad")
    counts = [
        np.bitwise_count(c.words).sum(axis=(1, 2))
        for c in streams(layer, "dgrad", "grad_output", mask.numpy() > 0, rows=1)
    ]
    for table, count in zip(tables, counts, strict=True):
        found[:, table.positions] = count.reshape(layer.groups, -1)
    assert (found == expected).all()
    # No zeros of dilation: every tap of a phase reads a real gradient somewhere.
    places = np.concatenate([table.positions for table in tables])
    assert len(set(places.tolist())) == len(places) <= layer.in_size[0] * layer.in_size[1]
    margin = layer.out_size[1] + 1
    for table in tables:
        inside = (table.source // margin < layer.out_size[0]) & (table.source % margin < layer.out_size[1])
        assert inside.any(axis=0).all()


@pytest.mark.parametrize("layer", SHAPES, ids=lambda layer: layer.name)
@pytest.mark.parametrize("product", PRODUCTS)
def test_streams_are_the_operand_vectors_of_the_outputs(layer, product):
    """Each stream, from the fast path, against the vector of one output value, from the plain path."""
    tensors = operands(layer)
    image = layer.batch_as_image(BATCH) if layer.kind == "linear" else layer
    images = 1 if layer.kind == "linear" else BATCH
    ins, outs = image.in_channels // image.groups, image.out_channels // image.groups
    row_length = (image.out_size if product == "forward" else image.in_size)[1]
    for number, side in enumerate(SIDES[product]):
        expected = set()
        for batch in range(images):
            for group in range(image.groups):
                if product == "wgrad":
                    taps = [(r, c) for r in range(image.kernel[0]) for c in range(image.kernel[1])]
                    places = [(batch, group * outs, c, *t) for c in range(ins) for t in taps]
                    places += [(batch, group * outs + k, 0, 0, 0) for k in range(outs)]
                else:
                    first = group * (outs if product == "forward" else ins)
                    channels = range(first, first + (outs if product == "forward" else ins))
                    spots = [divmod(int(p), row_length) for t in phases(image, product) for p in t.positions]
                    places = [(batch, c, *spot) for c in channels for spot in spots]
                vectors = (operand_vectors(layer, product, tensors, place)[number] for place in places)
                expected |= {pack_lanes(vector).tobytes() for vector in vectors}
        found = set()
        for chunk in streams(layer, product, side, tensors[side], rows=3, chunk_steps=50):
            for words, filled in zip(chunk.words, chunk.filled, strict=True):
                found |= {stream.tobytes() for stream in words[:filled]}
                assert not words[filled:].any()
        assert found == expected


@pytest.mark.parametrize("layer", SHAPES, ids=lambda layer: layer.name)
@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("chunk_steps", [1, 60, 1 << 22])
def test_chunks_hold_what_the_shape_promises(layer, rows, chunk_steps):
    tensors = operands(layer)
    for product in PRODUCTS:
        for side in SIDES[product]:
            sets = stream_sets(layer, product, side, batch=BATCH)
            groups, filled = [0] * len(sets), [0] * len(sets)
            total = 0
            for chunk in streams(layer, product, side, tensors[side], rows=rows, chunk_steps=chunk_steps):
                assert chunk.words.shape[1:] == (rows, sets[chunk.phase].steps)
                groups[chunk.phase] += len(chunk.words)
                filled[chunk.phase] += int(chunk.filled.sum())
                total += int(np.bitwise_count(chunk.words).sum())
            assert groups == [s.batches * -(-s.streams // rows) for s in sets]
            assert filled == [s.batches * s.streams for s in sets]
            whole = sum(
                int(np.bitwise_count(c.words).sum()) for c in streams(layer, product, side, tensors[side], rows=1)
            )
            assert total == whole


def test_bad_input_is_refused():
    layer = SHAPES[0]
    mask = operands(layer)["input"]
    with pytest.raises(ValueError, match="side of forward is 'grad_output'"):
        next(streams(layer, "forward", "grad_output", mask, rows=1))
    with pytest.raises(ValueError, match="product is 'backward'"):
        stream_sets(layer, "backward", "input")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="input has shape"):
        next(streams(layer, "forward", "input", mask[:, :3], rows=1))
    with pytest.raises(ValueError, match="input has shape"):
        next(streams(layer, "forward", "input", mask[:0], rows=1))
    with pytest.raises(ValueError, match="rows is 0"):
        next(streams(layer, "forward", "input", mask, rows=0))
    with pytest.raises(ValueError, match="dtype float64"):
        pack_lanes(np.ones((1, 4)))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="lanes is 17"):
        pack_lanes(mask, 17)
    with pytest.raises(ValueError, match="weight is missing"):
        operand_vectors(layer, "forward", {"input": mask}, (0, 0, 0, 0))
    tensors = operands(layer) | {"grad_output": operands(layer)["grad_output"][:1]}
    with pytest.raises(ValueError, match="different batches"):
        operand_vectors(layer, "wgrad", tensors, (0, 0, 0, 0, 0))
