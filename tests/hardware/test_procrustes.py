"""Tests of the Procrustes emulator: values against PyTorch, cycles counted twice, known tables, bounds, bad input."""

from __future__ import annotations

import itertools

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from leantrain.hardware import procrustes as pc
from leantrain.hardware.procrustes import Procrustes
from leantrain.hardware.trace import LayerTrace, Packed, Trace, capture
from leantrain.hardware.workloads import PRODUCTS, Layer, layers_of, plain_cnn
from leantrain.techniques.procrustes import DropBack, stream_select

SHAPES = [
    Layer("plain", "conv", 40, 72, (3, 3), (1, 1), (1, 1), in_size=(6, 7), out_size=(6, 7)),
    Layer("strided", "conv", 20, 24, (3, 3), (2, 2), (1, 1), in_size=(9, 8), out_size=(5, 4)),
    Layer("uneven", "conv", 8, 12, (3, 2), (1, 2), (1, 0), (2, 1), groups=2, in_size=(9, 8), out_size=(7, 4)),
    Layer("depthwise", "conv", 18, 18, (3, 3), (1, 1), (1, 1), groups=18, in_size=(5, 6), out_size=(5, 6)),
    Layer("pointwise", "conv", 33, 16, (1, 1), (2, 2), in_size=(7, 7), out_size=(4, 4)),
    Layer("linear", "linear", 137, 21),
]


def masks_of(layer: Layer, *, batch: int, weight: float, inputs: float, seed: int = 0) -> LayerTrace:
    generator = np.random.default_rng(seed)
    linear = layer.kind == "linear"
    shapes = {
        "weight": layer.weight_shape[:2] if linear else layer.weight_shape,
        "input": (batch, layer.in_channels) if linear else (batch, layer.in_channels, *layer.in_size),
    }
    kept = {"weight": weight, "input": inputs}
    return LayerTrace(layer, {n: Packed.of(generator.random(s) < kept[n]) for n, s in shapes.items()})


@pytest.mark.parametrize("cut", ["lines", "inside"])
@pytest.mark.parametrize("layer", SHAPES, ids=lambda layer: layer.name)
def test_values_equal_pytorch_and_both_counts_of_cycles_agree(layer, cut):
    # 35 samples: more than the array is wide, and not a multiple of it.
    table = pc.value_check(layer, Procrustes(cut=cut), batch=35, density=0.2)
    assert table["product"].tolist() == list(PRODUCTS)
    assert (table["equal"] == table["values"]).all()
    assert np.allclose(table["cycles"], table["computed_cycles"], rtol=1e-12)
    assert np.allclose(table["unbalanced_cycles"], table["computed_unbalanced"], rtol=1e-12)
    assert (table["made"] < table["macs"]).all()


def test_a_whole_sparse_training_step_equals_the_plain_masked_one():
    """Three products on the array, the update, the streamed selection; against autograd and `DropBack`."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 20, 3, padding=1, bias=False), nn.ReLU(), nn.Conv2d(20, 24, 3, padding=1, bias=False)
    ).double()
    layers = layers_of(model.float(), (3, 6, 6))
    model.double()
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(torch.rand_like(weight) < 0.2)
    options = {"keep": 0.2, "decay": 1e-9, "selection": "stream", "beta": 1e-3, "threshold": 1e-2}
    optimizer = DropBack(model.parameters(), lr=0.1, **options)
    optimizer.param_groups[0]["steps"] = 1  # the initial weights are gone
    x, target = torch.randn(5, 3, 6, 6).double(), torch.randn(5, 24, 6, 6).double()
    old = [w.detach().numpy().copy() for w in model.parameters()]

    first = pc.compute(layers[0], "forward", {"weight": old[0], "input": x.numpy()}).values
    hidden = np.maximum(first, 0)
    out = pc.compute(layers[1], "forward", {"weight": old[1], "input": hidden}).values
    grad_out = 2 * (out - target.numpy()) / out.size
    grads = [None, pc.compute(layers[1], "wgrad", {"input": hidden, "grad_output": grad_out}).values]
    back = pc.compute(layers[1], "dgrad", {"weight": old[1], "grad_output": grad_out}).values * (first > 0)
    grads[0] = pc.compute(layers[0], "wgrad", {"input": x.numpy(), "grad_output": back}).values
    moved = [w - 0.1 * g for w, g in zip(old, grads, strict=True)]
    scores = np.concatenate([np.abs(w).reshape(-1) for w in moved]).astype(np.float32)
    tracked, _ = stream_select(scores, 1e-2, 1 - optimizer.budget / optimizer.total, beta=1e-3)
    tracked = np.split(tracked, [old[0].size])

    loss = F.mse_loss(model(x), target)
    np.testing.assert_allclose(out, model(x).detach().numpy(), rtol=1e-12)
    loss.backward()
    optimizer.step()
    for weight, value, mask in zip(model.parameters(), moved, tracked, strict=True):
        packed = pc.compress(np.where(mask.reshape(value.shape), value, 0), 9)
        expected = weight.detach().numpy()
        np.testing.assert_allclose(packed.decode(), expected, rtol=1e-9, atol=1e-15)
        assert ((packed.decode() != 0) == (expected != 0)).all()
        assert packed.values.size == np.count_nonzero(expected)


@st.composite
def sets(draw):
    rows = draw(st.integers(1, 4))
    count = st.integers(0, 9)
    return draw(st.lists(st.lists(count, min_size=2 * rows, max_size=2 * rows), min_size=1, max_size=4))


@settings(max_examples=150, deadline=None)
@given(loads=sets())
def test_pairing_is_the_best_of_all_and_lies_between_its_bounds(loads):
    array = np.array(loads)
    result = pc.balance(array)
    for number, load in enumerate(loads):
        log = pc.pair_halves(load)
        rows = len(load) // 2
        assert result.unbalanced[number] == log.unbalanced.max() == max(load[i] + load[i + rows] for i in range(rows))
        assert result.paired[number] == log.paired.max()
        assert log.paired.sum() == log.unbalanced.sum() == sum(load) == result.total[number]
        assert sorted(log.pairs.reshape(-1).tolist()) == list(range(2 * rows))
        assert result.perfect[number] <= result.paired[number] <= result.unbalanced[number]
        assert result.perfect[number] == -(-sum(load) // rows)
        if rows <= 3:  # no way to deal two halves to each row has a smaller largest sum
            deals = itertools.permutations(load)
            assert result.paired[number] == min(max(map(sum, zip(d[::2], d[1::2], strict=True))) for d in deals)


@pytest.mark.parametrize("rows", [1, 3, 8, 16, 21])
def test_blocks_of_working_sets_equal_the_plain_form(rows):
    # More sets than a block holds, and not a multiple of it.
    loads = np.random.default_rng(rows).integers(0, 80, (150, 2 * rows))
    result = pc.balance(loads)
    logs = [pc.pair_halves(load) for load in loads]
    assert result.unbalanced.tolist() == [log.unbalanced.max() for log in logs]
    assert result.paired.tolist() == [log.paired.max() for log in logs]
    assert result.total.tolist() == loads.sum(axis=1).tolist()


def test_identical_tiles_gain_nothing_and_dense_ones_take_the_dense_time():
    same = pc.balance(np.full((3, 32), 7))
    assert (same.unbalanced == 14).all()
    assert (same.paired == 14).all()
    assert (same.perfect == 14).all()
    for layer, cut in itertools.product(SHAPES, ("lines", "inside")):
        frame = pc.simulate(masks_of(layer, batch=33, weight=1.0, inputs=1.0), Procrustes(cut=cut))
        assert (frame["unbalanced"] == 1).all()
        if cut == "lines":  # halves that both rows are free for cannot be had by cutting lines
            assert (frame["speedup"] == 1).all()
        assert (frame["ideal"] >= frame["speedup"]).all()
        assert (frame["speedup"] >= 1).all()


def test_known_working_set():
    log = pc.pair_halves([9, 1, 4, 0, 8, 2, 6, 3])
    assert log.unbalanced.tolist() == [17, 3, 10, 3]
    assert log.table()[["dense_load", "sparse_load", "after"]].to_numpy().tolist() == [
        [9, 0, 9],
        [8, 1, 9],
        [6, 2, 8],
        [4, 3, 7],
    ]
    result = pc.balance(np.array([[9, 1, 4, 0, 8, 2, 6, 3]]))
    assert (result.unbalanced[0], result.paired[0], result.perfect[0]) == (17, 9, 9)


TABLE = [  # density, tile, spread: largest over mean load unbalanced, paired, perfect; speed-up of the three
    (0.1, 144, 0.0, (1.463, 1.117, 1.033), (6.83, 8.95, 10)),
    (0.1, 576, 0.0, (1.227, 1.048, 1.008), (8.15, 9.54, 10)),
    (0.2, 144, 0.0, (1.303, 1.067, 1.016), (3.84, 4.69, 5)),
    (0.25, 288, 0.0, (1.183, 1.038, 1.007), (3.38, 3.86, 4)),
    (0.1, 144, 0.3, (1.811, 1.209, 1.033), (5.53, 8.29, 10)),
]


@pytest.mark.parametrize(("density", "tile", "spread", "ratios", "speedups"), TABLE)
def test_random_masks_reach_the_known_imbalance(density, tile, spread, ratios, speedups):
    loads = pc.random_tiles(density, sets=4000, tile=tile, spread=spread)
    result = pc.balance(loads)
    mean = result.total / 16
    for times, ratio in zip(result[:3], ratios, strict=True):
        assert (times / mean).mean() == pytest.approx(ratio, rel=0.006)
    for times, speedup in zip((result.unbalanced, result.paired, mean), speedups, strict=True):
        assert tile * len(loads) / times.sum() == pytest.approx(speedup, rel=0.008)


def test_threads_change_nothing():
    loads = pc.random_tiles(0.1, sets=20_000)
    one, three = pc.balance(loads, threads=1), pc.balance(loads, threads=3)
    assert all((a == b).all() for a, b in zip(one, three, strict=True))
    layer = Layer("large", "conv", 512, 1024, (3, 3), padding=(1, 1), in_size=(4, 4), out_size=(4, 4))
    entry = masks_of(layer, batch=32, weight=0.1, inputs=0.5)
    pd.testing.assert_frame_equal(pc.simulate(entry, threads=1), pc.simulate(entry, threads=3))


def test_shares_of_a_packed_mask_are_those_of_the_whole(monkeypatch):
    layer = Layer("odd", "conv", 5, 7, (3, 3), padding=(1, 1), in_size=(3, 3), out_size=(3, 3))
    entry = masks_of(layer, batch=37, weight=0.3, inputs=0.4)
    whole = pc.simulate(entry)
    monkeypatch.setattr(pc, "_CHUNK", 3 * 5 * 9)
    pd.testing.assert_frame_equal(pc.simulate(entry), whole)


@settings(max_examples=40, deadline=None)
@given(
    layer=st.sampled_from(SHAPES),
    batch=st.integers(1, 40),
    weight=st.floats(0, 1),
    inputs=st.floats(0, 1),
    cut=st.sampled_from(["lines", "inside"]),
)
def test_cycles_keep_their_bounds_and_slots_add_up(layer, batch, weight, inputs, cut):
    config = Procrustes(cut=cut)
    entry = masks_of(layer, batch=batch, weight=weight, inputs=inputs)
    frame = pc.simulate(entry, config)
    assert (frame["ideal_cycles"] <= frame["cycles"] + 1e-9).all()
    assert (frame["cycles"] <= frame["unbalanced_cycles"] + 1e-9).all()
    assert (frame["unbalanced_cycles"] <= frame["dense_cycles"] + 1e-9).all()
    parts = frame[["used", "lockstep", "empty_rows", "empty_columns"]]
    assert np.allclose(parts.sum(axis=1), frame["slots"])
    assert np.allclose(frame["slots"], 256 * frame["cycles"])
    if layer.groups == 1 or layer.groups % 16 == 0:
        assert (parts >= -1e-6 * frame["slots"].max() - 1e-9).all().all()
    assert (frame["used"] <= 256 * frame["cycles"] + 1e-6).all()
    expected = {"weight": entry.masks["weight"].nonzero / entry.masks["weight"].size}
    expected["input"] = entry.masks["input"].nonzero / entry.masks["input"].size
    assert np.allclose(frame["used"], frame["macs"] * frame["side"].map(expected))


def test_dense_cycles_follow_from_the_shape():
    # 64 filters, 64 channels, 32 samples: every tile is full, so the dense array has no idle element.
    layer = Layer("full", "conv", 64, 64, (3, 3), padding=(1, 1), in_size=(12, 12), out_size=(12, 12))
    frame = pc.simulate(masks_of(layer, batch=32, weight=0.1, inputs=0.5)).set_index("product")
    assert (frame["dense_cycles"] == layer.macs * 32 / 256).all()
    # 10 filters leave 6 of 16 rows without work in forward; 10 partners leave 6 of 16 columns in wgrad.
    layer = Layer("last", "linear", 64, 10)
    frame = pc.simulate(masks_of(layer, batch=32, weight=1, inputs=1)).set_index("product")
    assert frame.loc["forward", "dense_cycles"] == 64 * 2
    assert frame.loc["forward", "utilisation"] == 10 / 16
    assert frame.loc["wgrad", "empty_columns"] == 6 / 16 * frame.loc["wgrad", "slots"]


@pytest.mark.parametrize("density", [0.0, 0.1, 0.5, 1.0])
@pytest.mark.parametrize(("shape", "block"), [((6, 4, 3, 3), 9), ((5, 70), 32), ((3, 8, 5), 7)])
def test_compressed_blocks_round_trip_and_can_be_read_anywhere(shape, block, density):
    generator = np.random.default_rng(0)
    tensor = np.where(generator.random(shape) < density, generator.standard_normal(shape), 0).astype(np.float32)
    packed = pc.compress(tensor, block)
    assert packed.decode().dtype == tensor.dtype
    assert (packed.decode() == tensor).all()
    assert packed.values.size == np.count_nonzero(tensor)
    flat = tensor.reshape(shape[0], -1)
    per_line = -(-flat.shape[1] // block)
    for line, number in itertools.product(range(shape[0]), range(per_line)):
        part = flat[line, number * block : (number + 1) * block]
        assert (packed.read(line, number)[: len(part)] == part).all()
    bits = packed.values.size * 32 + shape[0] * per_line * (block + 20) + shape[0] * 32
    assert packed.stored_bits() == bits


def test_compressed_blocks_keep_special_values():
    tensor = np.array([[0.0, -0.0, 1e-45, np.inf, -np.inf, np.nan, 1e-45, 0.0, 3.0]], dtype=np.float32)
    packed = pc.compress(tensor, 4)
    assert packed.values.size == 6
    np.testing.assert_array_equal(packed.decode(), tensor)


def test_a_line_longer_than_its_pointers_is_refused():
    with pytest.raises(ValueError, match="4 bits reach fewer"):
        pc.compress(np.ones((2, 40)), 8, pointer_bits=4)


PARAMETERS = {  # parameters, multiply-accumulates of an image
    "VGG-S": (14_987_200, 313_463_808),
    "WRN-28-10": (36_479_194, 5_243_328_768),
    "ResNet-18": (11_689_512, 1_814_073_344),
    "MobileNetV2": (3_504_872, 300_774_272),
    "DenseNet-BC": (769_210, 287_929_692),
}


@pytest.mark.parametrize("name", pc.NETWORKS)
def test_networks_have_their_full_size(name):
    with torch.device("meta"):
        model = pc.build(name)
    layers = layers_of(model, pc.NETWORKS[name])
    found = sum(p.numel() for p in model.parameters()), sum(layer.macs for layer in layers)
    assert found == PARAMETERS[name]
    if name == "VGG-S":
        assert sum(int(np.prod(layer.weight_shape)) for layer in layers) == 14_977_728


def test_a_quarter_of_vgg_s_trains_on_small_images_of_any_depth():
    model = pc.vgg_s(0.25, in_channels=1)
    assert model(torch.zeros(2, 1, 32, 32)).shape == (2, 10)
    assert [layer.out_channels for layer in layers_of(model, (1, 32, 32))][-2:] == [128, 10]


def test_energy_of_a_layer_counted_by_hand():
    # 32 filters of 16 channels 3x3, 4x4 images, 16 samples, dense weights.
    layer = Layer("a", "conv", 16, 32, (3, 3), padding=(1, 1), in_size=(4, 4), out_size=(4, 4))
    access = pc.AccessEnergy(dram=100, buffer=10, scratchpad=2, mac=3)
    entry = masks_of(layer, batch=16, weight=1, inputs=1)
    frame = pc.simulate(entry, access=access, minibatch=32).set_index("product")
    weights, image_in, image_out, macs = 32 * 16 * 9, 16 * 16 * 16, 16 * 32 * 16, layer.macs * 16
    forward = frame.loc["forward"]
    assert forward["core"] == forward["core_dense"] == 3 * macs
    assert forward["scratchpad"] == 2 * 4 * macs
    # Weights once; inputs once, for one set of 32 filters; sums in and out for two blocks of 8 channels.
    assert forward["buffer_dense"] == 10 * (weights + image_in + 2 * 2 * image_out)
    assert forward["dram_dense"] == 100 * (weights / 2 + image_in + image_out)
    # Compressed: a mask bit a weight, a 20-bit pointer a kernel, a 32-bit base a filter.
    stored = weights + (weights + 32 * 16 * 20 + 32 * 32) / 32
    assert forward["dram"] == 100 * (stored / 2 + image_in + image_out)
    wgrad = frame.loc["wgrad"]
    # Output gradients once for each block of 8 channels; activations for each 16 filters; one set of samples.
    assert wgrad["buffer_dense"] == 10 * (2 * image_in + 2 * image_out + 2 * weights)
    assert wgrad["dram_dense"] == 100 * (2 * weights / 2 + image_in + image_out)
    assert wgrad["dram"] == 100 * (2 * stored / 2 + image_in + image_out)


def test_access_energies_follow_the_sizes():
    access = pc.access_energy()
    assert access.dram == 400
    assert access.mac == 4
    assert access.scratchpad == pytest.approx(2 * (1 + 5 * 0.5 / 99.5))
    assert access.buffer == pytest.approx(2 * (1 + 5 * 127.5 / 99.5))
    assert pc.access_energy(Procrustes(bits=16, register_words=256)).scratchpad == 1


def test_statistics_of_a_mask_are_found_again():
    layer = Layer("a", "conv", 256, 256, (3, 3), padding=(1, 1), in_size=(4, 4), out_size=(4, 4))
    for filters, channels in ((0.0, 0.0), (0.4, 0.0), (0.3, 0.5)):
        weight = pc.random_weights(layer, 0.1, filters=filters, channels=channels, seed=3)
        seen = Packed.of(np.random.default_rng(0).random((4, 256, 4, 4)) < 0.25)
        found = pc.mask_statistics(LayerTrace(layer, {"weight": Packed.of(weight), "input": seen}))
        assert found.density == pytest.approx(0.1, rel=0.02)
        assert found.filters == pytest.approx(filters, abs=0.06)
        assert found.channels == pytest.approx(channels, abs=0.06)
        assert found.inputs == pytest.approx(0.25, abs=0.01)


def test_densities_are_scaled_to_the_budget():
    with torch.device("meta"):
        layers = layers_of(pc.vgg_s(), (3, 32, 32))
    for keep in (0.05, 0.1, 0.5):
        densities = pc.budget_densities(layers, np.linspace(1, 0.05, 15).tolist(), keep)
        sizes = [np.prod(layer.weight_shape) for layer in layers]
        assert np.dot(sizes, densities) / sum(sizes) == pytest.approx(keep, rel=1e-6)
        assert max(densities) <= 1
        assert sorted(densities, reverse=True) == densities
    one = pc.MaskStatistics(0.5, 0.1, 0.2, 0.3)
    two = pc.MaskStatistics(0.1, 0.3, 0.2, 0.7)
    stretched = pc.at_depth([one, two], 4)
    assert [m.density for m in stretched] == pytest.approx([0.5, 0.4, 0.2, 0.1])
    assert pc.at_depth([one, two], 2) == [one, two]


def test_random_weights_have_their_density_even_where_some_lines_are_full():
    layer = Layer("a", "linear", 400, 300)
    mask = pc.random_weights(layer, 0.7, filters=0.8)
    assert mask.shape == (300, 400)
    assert mask.mean() == pytest.approx(0.7, abs=0.01)
    assert mask.mean(axis=1).max() == 1


def test_reports_round_trip_and_summaries_sum_cycles():
    model = plain_cnn(in_channels=1, image_size=8, widths=((8,), (16,)), hidden=16)
    torch.manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(torch.rand_like(weight) < 0.3)
    with capture(model) as recorder:
        F.cross_entropy(model(torch.rand(32, 1, 8, 8)), torch.arange(32) % 10).backward()
    trace = recorder.trace()
    frame = pc.simulate(trace)
    total = pc.summarise(frame).iloc[0]
    assert total["speedup"] == frame["dense_cycles"].sum() / frame["cycles"].sum()
    assert 1 <= total["unbalanced"] <= total["speedup"] <= total["ideal"]
    assert 0 <= total["imbalance"] <= total["imbalance_unbalanced"]
    report = pc.cycle_report(trace, {"a": Procrustes(), "b": Procrustes(cut="inside")}) | pc.mask_report(trace)
    logged = pd.DataFrame([{"arm": "x", "seed": 0, "epoch": 1, **report}])
    table = pc.read_report(logged)
    assert len(table) == 6
    again = pc.summarise(table[table["config"] == "a"]).iloc[0]
    assert again["speedup"] == pytest.approx(total["speedup"], rel=1e-12)
    assert again["total_efficiency"] == pytest.approx(total["total_efficiency"], rel=1e-12)
    masks = pc.read_masks(logged.iloc[0].to_dict())
    assert masks == [pc.mask_statistics(entry) for entry in trace.layers]
    with pytest.raises(ValueError, match="no columns of a mask report"):
        pc.read_masks({})
    with pytest.raises(ValueError, match="no columns of a cycle report"):
        pc.read_report(pd.DataFrame([{"arm": "a", "seed": 0, "epoch": 1}]))


def test_a_random_trace_has_the_masks_that_were_asked_for():
    model = plain_cnn(in_channels=1, image_size=8, widths=((8,), (16,)), hidden=16)
    layers = layers_of(model, (1, 8, 8))
    torch.manual_seed(0)
    seen = pc.input_masks(model, layers, 5, (1, 8, 8))
    trace = pc.random_trace(layers, seen, [pc.MaskStatistics(0.3, 0.0, 0.0, 1.0)] * len(layers))
    assert [entry.masks["input"].shape for entry in trace.layers] == [(5, 1, 8, 8), (5, 8, 4, 4), (5, 64), (5, 16)]
    assert [entry.masks["weight"].shape for entry in trace.layers] == [(8, 1, 3, 3), (16, 8, 3, 3), (16, 64), (10, 16)]
    assert trace.layers[2].masks["weight"].sparsity == pytest.approx(0.7, abs=0.05)
    assert seen[0].sparsity == 0
    assert 0 < seen[1].sparsity < 0.5  # half of the ReLUs are zero, fewer after max-pooling


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rows": 0}, "rows is 0"),
        ({"rows": True}, "rows is True"),
        ({"columns": 2.0}, r"columns is 2\.0"),
        ({"tile": 143}, "tile is 143"),
        ({"pointwise_tile": 7}, "pointwise_tile is 7"),
        ({"tile": 288}, "the registers hold 256"),
        ({"cut": "half"}, "cut is 'half'"),
        ({"bits": 8}, "bits is 8"),
        ({"pointer_bits": 0}, "pointer_bits is 0"),
        ({"frequency_mhz": float("nan")}, "frequency_mhz is nan"),
    ],
)
def test_bad_configurations_are_refused_by_name(options, message):
    with pytest.raises(ValueError, match=message):
        Procrustes(**options)


def test_bad_input_is_refused():
    layer = SHAPES[0]
    with pytest.raises(ValueError, match="weight has shape"):
        pc.tiles(layer, "forward", np.ones((3, 3), bool))
    with pytest.raises(ValueError, match=r"expected \(batch,\) \+ "):
        pc.tiles(layer, "wgrad", np.ones((2, 40, 6, 6), bool))
    with pytest.raises(ValueError, match="product is 'backward'"):
        pc.tiles(layer, "backward", np.ones(layer.weight_shape, bool))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="batch is 0"):
        pc.tiles(layer, "forward", np.ones(layer.weight_shape, bool), batch=0)
    wide = Layer("wide", "conv", 4, 4, (13, 13), in_size=(13, 13), out_size=(1, 1))
    with pytest.raises(ValueError, match="two kernels of 169 weights"):
        pc.tiles(wide, "forward", np.ones(wide.weight_shape, bool))
    with pytest.raises(ValueError, match=r"expected \(sets, 2 x rows\)"):
        pc.balance(np.ones((2, 3), dtype=int))
    with pytest.raises(ValueError, match="loads reach from -1 to 2"):
        pc.balance(np.array([[-1, 2]]))
    with pytest.raises(ValueError, match="2 x rows counts"):
        pc.pair_halves([1, 2, 3])
    with pytest.raises(ValueError, match="tile is 9"):
        pc.random_tiles(0.1, sets=1, tile=9)
    with pytest.raises(ValueError, match=r"density is 1\.5"):
        pc.random_tiles(1.5, sets=1)
    with pytest.raises(ValueError, match=r"density is -0\.1"):
        pc.random_weights(layer, -0.1)
    with pytest.raises(ValueError, match="its two operands"):
        pc.compute(layer, "forward", {"weight": np.ones(layer.weight_shape)})
    with pytest.raises(ValueError, match="network 'vgg' is unknown"):
        pc.build("vgg")
    with pytest.raises(ValueError, match="depth is 27"):
        pc.wide_resnet(27)
    with pytest.raises(ValueError, match="minibatch is 0"):
        pc.simulate(Trace((), "float32"), minibatch=0)
    with pytest.raises(ValueError, match="expected 0 to 1, as many"):
        pc.budget_densities([layer], [0.5, 0.5], 0.1)
