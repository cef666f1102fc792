"""Tests of TensorDash: a second scheduler written differently, known answers, conservation, bounds, bad input."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from leantrain.hardware.energy import TENSORDASH_FP32, AccessEnergy
from leantrain.hardware.tensordash import (
    TensorDash,
    cycle_report,
    dense_cycles,
    random_streams,
    read_report,
    schedule,
    schedule_moves,
    simulate,
    summarise,
    value_check,
)
from leantrain.hardware.trace import LayerTrace, Packed, Trace, capture
from leantrain.hardware.workloads import PRODUCTS, Layer, network, plain_cnn

SHAPES = [
    Layer("strided", "conv", 20, 24, (3, 3), (2, 2), (1, 1), in_size=(9, 8), out_size=(5, 4)),
    Layer("uneven", "conv", 8, 12, (3, 2), (1, 2), (1, 0), (2, 1), groups=2, in_size=(9, 8), out_size=(7, 4)),
    Layer("depthwise", "conv", 18, 18, (3, 3), (1, 1), (1, 1), groups=18, in_size=(5, 6), out_size=(5, 6)),
    Layer("pointwise", "conv", 33, 16, (1, 1), (2, 2), in_size=(7, 7), out_size=(4, 4)),
    Layer("linear", "linear", 37, 21),
]


def by_hand(rows: list[list[int]], depth: int, priority: str) -> int:
    """The scheduler once more: sets of pending pairs, lanes visited in the order 0, 5, 10, 1, 6, 11, ..."""
    pending = [{(t, i) for t, word in enumerate(row) for i in range(16) if word >> i & 1} for row in rows]
    reach = {
        "paper": [(0, 0), (1, 0), (2, 0), (1, -1), (1, 1), (2, -2), (2, 2), (1, -3)],
        "dnnsim": [(0, 0), (1, -1), (1, 0), (1, 1), (1, 3), (2, -2), (2, 0), (2, 2)],
    }[priority]
    now, cycles, length = 0, 0, len(rows[0])
    while now < length:
        horizon = now + depth
        for todo in pending:
            for lane in sorted(range(16), key=lambda i: (i % 5 if i < 15 else 5, i)):
                wishes = [(now + s, (lane + o) % 16) for s, o in reach if s < depth]
                todo.discard(next((wish for wish in wishes if wish in todo), (-1, -1)))
        now = min(min((t for t, _ in todo), default=horizon) for todo in pending)
        now = min(now, horizon)
        cycles += 1
    return cycles


@st.composite
def tiles(draw):
    rows = draw(st.integers(1, 3))
    steps = draw(st.integers(1, 12))
    word = st.one_of(st.just(0), st.just(0xFFFF), st.integers(0, 0xFFFF), st.integers(0, 15).map(lambda i: 1 << i))
    return draw(st.lists(st.lists(word, min_size=steps, max_size=steps), min_size=rows, max_size=rows))


@settings(max_examples=200, deadline=None)
@given(rows=tiles(), depth=st.integers(1, 3), priority=st.sampled_from(["paper", "dnnsim"]))
def test_both_kernels_agree_with_the_scheduler_by_hand(rows, depth, priority):
    config = TensorDash(rows=len(rows), depth=depth, priority=priority)
    words = np.array(rows, dtype=np.uint16)
    expected = by_hand(rows, depth, priority)
    moves, fast = schedule_moves(words, config), schedule(words[None], config)
    assert moves.cycles == expected
    assert fast.cycles.tolist() == [expected]
    # Conservation: every effectual pair is multiplied once, no other pair ever.
    for row, words_of_row in enumerate(words):
        pairs = np.flatnonzero((words_of_row[:, None] >> np.arange(16)) & 1)
        taken = moves.taken[:, row]
        assert sorted(taken[taken >= 0].tolist()) == pairs.tolist()
        assert 16 * expected - fast.idle[0, row] == pairs.size
    steps = words.shape[1]
    assert -(-steps // depth) <= expected <= steps
    assert (fast.reach + fast.lockstep <= fast.idle).all()


@pytest.mark.parametrize(
    ("pattern", "repeat", "paper", "dnnsim", "shallow"),
    [
        ([0xFFFF, 0, 0], 1, 1, 1, 2),
        ([0, 0xFFFF, 0], 1, 1, 1, 2),
        ([0x0001, 0xFFFF, 0], 1, 2, 2, 2),
        ([0x00FF, 0xFF00, 0], 1, 1, 2, 2),
        ([0x5555, 0xAAAA, 0], 2, 2, 2, 3),
        ([0xFF00], 6, 5, 4, 5),
        ([0x0001], 6, 2, 2, 3),
        ([0x1111], 12, 4, 4, 6),
        ([0x00FF], 12, 11, 9, 12),
        ([0], 7, 3, 3, 4),
        ([0xFFFF], 7, 7, 7, 7),
    ],
)
def test_known_answers(pattern, repeat, paper, dnnsim, shallow):
    words = np.array([pattern * repeat], dtype=np.uint16)
    configs = [TensorDash(rows=1), TensorDash(rows=1, priority="dnnsim"), TensorDash(rows=1, depth=2)]
    assert [schedule_moves(words, c).cycles for c in configs] == [paper, dnnsim, shallow]
    assert [int(schedule(words[None], c).cycles[0]) for c in configs] == [paper, dnnsim, shallow]


@pytest.mark.parametrize(("rows", "depth"), [(1, 3), (3, 3), (4, 2), (16, 3), (256, 3), (4, 5)])
def test_blocked_kernel_equals_the_plain_one_cycle_for_cycle(rows, depth):
    # More groups than a block has slots, so that finished slots take new groups; the densities differ between groups.
    config = TensorDash(rows=rows, depth=depth)
    groups = 2 * (256 // rows) + 3
    words = np.concatenate(
        [random_streams(s, groups=groups, rows=rows, steps=29, seed=7) for s in (0.0, 0.5, 0.9, 1.0)]
    )
    plain = [schedule_moves(group, config).cycles for group in words]
    for threads in (1, 3):
        assert schedule(words, config, threads=threads).cycles.tolist() == plain


TABLE = {  # speed-up on independent random zeros, streams without end
    0.1: (1.100, 1.091, 1.084, 1.078, 1.074, 1.102, 1.058),
    0.3: (1.353, 1.323, 1.298, 1.275, 1.257, 1.364, 1.209),
    0.5: (1.730, 1.655, 1.596, 1.550, 1.513, 1.698, 1.408),
    0.6: (1.985, 1.880, 1.802, 1.737, 1.679, 1.911, 1.513),
    0.8: (2.752, 2.591, 2.436, 2.282, 2.148, 2.465, 1.931),
    0.9: (2.983, 2.967, 2.933, 2.887, 2.787, 2.919, 1.998),
    0.99: (3.000, 3.000, 3.000, 3.000, 3.000, 3.000, 2.000),
}
CONFIGS = [TensorDash(rows=r) for r in (1, 2, 4, 8, 16)] + [TensorDash(priority="dnnsim"), TensorDash(depth=2)]


@pytest.mark.parametrize("sparsity", TABLE)
def test_random_streams_reach_the_values_of_endless_ones(sparsity):
    # 64 streams of 1800 steps: the spread between seeds is about 0.3 %, the end of a stream costs less than 0.2 %.
    for config, expected in zip(CONFIGS, TABLE[sparsity], strict=True):
        words = random_streams(sparsity, groups=64 // config.rows, rows=config.rows, steps=1800, seed=1)
        assert 1800 / schedule(words, config).cycles.mean() == pytest.approx(expected, rel=0.01)


def test_rows_in_lockstep():
    words = random_streams(0.6, groups=20, rows=1, steps=50, seed=3)
    alone = schedule(words, TensorDash(rows=1))
    same = schedule(np.repeat(words, 4, axis=1), TensorDash(rows=4))
    assert same.cycles.tolist() == alone.cycles.tolist()
    assert not same.lockstep.any()
    empty = np.concatenate([words, np.zeros_like(words)], axis=1)
    assert schedule(empty, TensorDash(rows=2)).cycles.tolist() == alone.cycles.tolist()
    mixed = random_streams(0.6, groups=20, rows=4, steps=50, seed=4)
    turned = schedule(mixed[:, ::-1], TensorDash(rows=4))
    assert turned.cycles.tolist() == schedule(mixed, TensorDash(rows=4)).cycles.tolist()
    assert schedule(mixed, TensorDash(rows=4)).lockstep.any()


@pytest.mark.parametrize("rows", [1, 4])
def test_dense_and_empty_streams(rows):
    config = TensorDash(rows=rows)
    dense = schedule(random_streams(0.0, groups=3, rows=rows, steps=31), config)
    assert (dense.cycles == 31).all()
    assert not dense.idle.any()
    assert (schedule(random_streams(1.0, groups=3, rows=rows, steps=31), config).cycles == 11).all()


@pytest.mark.parametrize(
    ("name", "forward", "dgrad", "wgrad"),
    [
        ("alexnet", 236281, 144684, 170062),
        ("vgg16", 3838464, 3725568, 3774528),
        ("resnet18", 573760, 420096, 489232),
        ("resnet50", 1133248, 979584, 1082128),
        ("squeezenet1_0", 378218, 160021.5, 215796.5),
        ("densenet121", 818096, 664432, 718832),
    ],
)
def test_dense_cycles_of_the_convolutions_at_full_size(name, forward, dgrad, wgrad):
    layers = [layer for layer in network(name) if layer.kind == "conv"]
    cycles = {p: sum(dense_cycles(layer, p) for layer in layers if p in layer.products) for p in PRODUCTS}
    assert cycles == {"forward": forward, "dgrad": dgrad, "wgrad": wgrad}


@pytest.mark.parametrize("layer", SHAPES, ids=lambda layer: layer.name)
@pytest.mark.parametrize("priority", ["paper", "dnnsim"])
def test_values_from_the_moves_equal_autograd(layer, priority):
    frame = value_check(layer, TensorDash(priority=priority), batch=3, samples=12, seed=5)
    assert (frame["scheduled"] == frame["expected"]).all()
    assert frame["expected"].ne(0).mean() > 0.4  # the check is not about zeros
    assert (frame["made"] < frame["macs"]).mean() > 0.6
    assert set(frame["side"]) == {"input", "weight", "grad_output"}


def test_value_check_can_fail(monkeypatch):
    import leantrain.hardware.tensordash as module

    right = module._advance_lanes

    def wrong(words, *rest):
        cycles = right(words, *rest)
        rest[4][0, 0, 0] = -1  # forget one product
        return cycles

    monkeypatch.setattr(module, "_advance_lanes", wrong)
    frame = value_check(SHAPES[0], sparsity=0.0, samples=4)
    assert (frame["scheduled"] != frame["expected"]).any()


def traced(layer: Layer, *, batch: int, zeros: tuple[float, float, float], seed: int = 0) -> LayerTrace:
    generator = np.random.default_rng(seed)
    linear = layer.kind == "linear"
    shapes = {
        "input": (batch, layer.in_channels) + (() if linear else layer.in_size),
        "weight": layer.weight_shape[:2] if linear else layer.weight_shape,
        "grad_output": (batch, layer.out_channels) + (() if linear else layer.out_size),
    }
    return LayerTrace(
        layer,
        {n: Packed.of(generator.random(s) >= z) for (n, s), z in zip(shapes.items(), zeros, strict=True)},  # type: ignore[misc]
    )


def rows_met(layer: Layer, product: str, axis: int, tap: int) -> int:
    """Positions along an axis at which a kernel tap is used, padding included."""
    if product == "forward":
        return layer.out_size[axis]
    reached = (i + layer.padding[axis] - tap * layer.dilation[axis] for i in range(layer.in_size[axis]))
    return sum(place % layer.stride[axis] == 0 for place in reached)


@pytest.mark.parametrize("layer", SHAPES, ids=lambda layer: layer.name)
@pytest.mark.parametrize("zeros", [(0.7, 0.1, 0.5), (0.2, 0.9, 0.3), (0.8, 0.4, 0.6)])
def test_simulated_work_is_the_count_of_non_zero_products(layer, zeros):
    """The work that the scheduler reports against a count by autograd: masks for values, ones on the other side."""
    entry = traced(layer, batch=3, zeros=zeros)
    config = TensorDash(rows=4, columns=1, tiles=1)
    frame = simulate(entry, config).set_index("product")
    image, images = (layer.batch_as_image(3), 1) if layer.kind == "linear" else (layer, 3)
    masks = {name: torch.tensor(packed.mask(), dtype=torch.float64) for name, packed in entry.masks.items()}
    if layer.kind == "linear":
        masks = {n: m[:, :, None, None] if n == "weight" else m.T[None, :, :, None] for n, m in masks.items()}

    def work(x, w, gy):
        x, w = x.clone().requires_grad_(), w.clone().requires_grad_()
        out = F.conv2d(x, w, None, image.stride, image.padding, image.dilation, image.groups)
        gx, gw = torch.autograd.grad(out, (x, w), gy)
        return {"forward": out.sum().item(), "dgrad": gx.sum().item(), "wgrad": gw.sum().item()}

    for product in PRODUCTS:
        side = frame.loc[product, "side"]
        tensors = {n: m if n == side else torch.ones_like(m) for n, m in masks.items()}
        expected = work(tensors["input"], tensors["weight"], tensors["grad_output"])[product]
        # A value of these sides is streamed at the border of the image too, where its partner is padding.
        if side == "weight":
            expected = sum(
                masks["weight"][:, :, r, c].sum().item()
                * images
                * rows_met(image, product, 0, r)
                * rows_met(image, product, 1, c)
                for r in range(image.kernel[0])
                for c in range(image.kernel[1])
            )
        elif product == "wgrad" and side == "grad_output":
            expected = masks["grad_output"].sum().item() * np.prod(image.weight_shape[1:])
        assert frame.loc[product, "used"] == expected
        sparsity = {n: entry.masks[n].sparsity for n in entry.masks}
        assert frame.loc[product, "sparsity"] == sparsity[side]
    parts = frame[["used", "reach", "window", "lockstep", "empty_rows"]].sum(axis=1)
    assert (parts == frame["slots"]).all()
    assert np.allclose(frame["slots"], frame["cycles"] * config.macs_per_cycle)
    assert (frame["speedup"] >= 1).all()
    assert (frame["speedup"] <= 3 + 3 / frame["cycles"]).all()


def test_side_with_more_zeros_is_scheduled_and_activations_win_a_tie():
    layer = Layer("a", "conv", 16, 16, in_size=(4, 4), out_size=(4, 4))
    frame = simulate(traced(layer, batch=1, zeros=(0.0, 0.0, 0.0))).set_index("product")
    assert frame["side"].to_dict() == {"forward": "input", "dgrad": "grad_output", "wgrad": "grad_output"}
    frame = simulate(traced(layer, batch=1, zeros=(0.5, 0.9, 0.1))).set_index("product")
    assert frame["side"].to_dict() == {"forward": "weight", "dgrad": "weight", "wgrad": "input"}


def test_energy_of_a_layer_counted_by_hand():
    # 16 -> 16 channels, 1x1, 4x4 positions, dense: 4 tile groups of 4 windows, 4 passes of 4 columns, 1 step.
    layer = Layer("a", "conv", 16, 16, in_size=(4, 4), out_size=(4, 4))
    access = AccessEnergy(dram=100, buffer=10, scratchpad=2, mac=1)
    entry = traced(layer, batch=1, zeros=(0, 0, 0))
    row = simulate(entry, TensorDash(tiles=2), access=access, bits=16, products=["forward"]).iloc[0]
    assert row["dense_cycles"] == row["cycles"] == 4 * 4 / 2
    assert row["core_dense"] == layer.macs
    assert row["core"] == pytest.approx(layer.macs * 14205.4 / 13957.3)
    assert row["scratchpad"] == 2 * (4 * 4 * (4 + 4) * 16)
    # Streams: 4 groups x 4 rows x 16. Partners: 2 shared groups x 4 passes x 4 columns x 16. Outputs: 256.
    assert row["buffer"] == 10 * (256 + 512 + 256)
    assert row["dram"] == 100 * (256 + 256 + 256)
    wide = simulate(entry, TensorDash(tiles=2), access=access, bits=32, minibatch=4, products=["forward"]).iloc[0]
    assert wide["core_dense"] == 2 * layer.macs
    assert wide["dram"] == 2 * 100 * (256 + 256 + 256 / 4)


def test_core_power_adds_up():
    assert TENSORDASH_FP32.total("area_mm2", "sparse") == pytest.approx(33.44, abs=0.011)
    assert TENSORDASH_FP32.total("area_mm2", "dense") == pytest.approx(30.80, abs=0.011)
    assert TENSORDASH_FP32.total("power_mw", "sparse") == pytest.approx(14205, abs=0.5)
    assert TENSORDASH_FP32.total("power_mw", "dense") == pytest.approx(13957, abs=0.5)
    assert TENSORDASH_FP32.power_ratio == pytest.approx(0.9825, abs=1e-4)
    with pytest.raises(ValueError, match="design is 'both'"):
        TENSORDASH_FP32.total("power_mw", "both")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="buffer is -1"):
        AccessEnergy(buffer=-1)


def test_summary_sums_cycles_and_the_report_round_trips():
    model = plain_cnn(in_channels=1, image_size=8, widths=((8,), (16,)), hidden=16)
    torch.manual_seed(0)
    with capture(model) as recorder:
        F.cross_entropy(model(torch.rand(5, 1, 8, 8)), torch.arange(5)).backward()
    trace = recorder.trace()
    frame = simulate(trace)
    total = summarise(frame).iloc[0]
    assert total["speedup"] == frame["dense_cycles"].sum() / frame["cycles"].sum()
    assert total["total_efficiency"] < total["core_efficiency"] < total["speedup"]
    report = cycle_report(trace, {"R4": TensorDash(), "R1": TensorDash(rows=1)})
    assert report["R4/all/slowest"] == frame["speedup"].min()
    import pandas as pd

    table = read_report(pd.DataFrame([{"arm": "a", "seed": 0, "epoch": 1, **report}]))
    assert len(table) == 6
    again = summarise(table[table["config"] == "R4"]).iloc[0]
    assert again["speedup"] == pytest.approx(total["speedup"], rel=1e-12)
    with pytest.raises(ValueError, match="no columns of a cycle report"):
        read_report(pd.DataFrame([{"arm": "a", "seed": 0, "epoch": 1}]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lanes": 8}, "lanes is 8"),
        ({"depth": 0}, "depth is 0"),
        ({"depth": 2.0}, "depth is 2.0"),
        ({"rows": 0}, "rows is 0"),
        ({"rows": True}, "rows is True"),
        ({"columns": -1}, "columns is -1"),
        ({"tiles": 0}, "tiles is 0"),
        ({"frequency_mhz": float("nan")}, "frequency_mhz is nan"),
        ({"priority": "mine"}, "priority is 'mine'"),
        ({"options": ()}, "options start with"),
        ({"options": ((1, 0),)}, "options start with"),
        ({"options": ((0, 0), (3, 0))}, "outside a staging buffer of depth 3"),
        ({"options": ((0, 0), (0, 1))}, "current pair of another lane"),
        ({"options": ((0, 0), (1, 4))}, "reaches 4 lanes"),
        ({"options": ((0, 0), (1, 1), (1, 1))}, "twice"),
        ({"levels": (tuple(range(15)),)}, "each lane from 0 to 15 once"),
        ({"levels": (tuple(range(16)),)}, "can both take the pair"),
        ({"options": ((0, 0), (1, 3), (1, -2))}, "lanes 0 and 5 of one level"),
    ],
)
def test_bad_configurations_are_refused_by_name(options, message):
    with pytest.raises(ValueError, match=message):
        TensorDash(**options)


def test_time_of_cycles():
    assert TensorDash().seconds(3_838_464) == pytest.approx(7.677e-3, rel=1e-3)
    assert TensorDash().macs_per_cycle == 4096


def test_threads_leave_the_pools_of_numba_and_torch_alone(monkeypatch):
    """Asking Numba for its threads starts its pool and changes how many PyTorch uses."""
    import numba

    def refuse():
        raise AssertionError("Numba's thread pool was started")

    monkeypatch.setattr(numba, "get_num_threads", refuse)
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    words = random_streams(0.5, groups=3000, rows=4, steps=50)
    assert schedule(words).cycles.tolist() == schedule(words, threads=1).cycles.tolist()


def test_levels_without_conflict_are_accepted():
    one_by_one = TensorDash(rows=1, levels=tuple((lane,) for lane in range(16)))
    words = random_streams(0.5, groups=4, rows=1, steps=40)
    assert [schedule_moves(w, one_by_one).cycles for w in words] == schedule(words, one_by_one).cycles.tolist()


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match="none of them empty"):
        schedule(np.zeros((1, 4, 0), dtype=np.uint16))
    with pytest.raises(ValueError, match="dtype int64"):
        schedule(np.zeros((1, 4, 2), dtype=np.int64))
    with pytest.raises(ValueError, match="2 rows a group"):
        schedule(np.zeros((1, 2, 2), dtype=np.uint16))
    with pytest.raises(ValueError, match=r"sparsity is 1\.5"):
        random_streams(1.5, groups=1, rows=1, steps=1)
    with pytest.raises(ValueError, match="bits is 8"):
        simulate(Trace((), "float32"), bits=8)
    with pytest.raises(ValueError, match="minibatch is 0"):
        simulate(Trace((), "float32"), minibatch=0)
    with pytest.raises(ValueError, match="expected \\(2, 16\\)"):
        schedule_moves(np.ones((4, 2), dtype=np.uint16)).multiply(np.zeros((3, 16)), np.zeros((3, 16)))
