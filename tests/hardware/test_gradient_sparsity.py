"""Tests of gradient output sparsity: exactness of skipping, counts by loops, loads, redistribution, energy, input."""

from __future__ import annotations

from itertools import product as every

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from leantrain.hardware import gradient_sparsity as gs
from leantrain.hardware.energy import AccessEnergy
from leantrain.hardware.trace import Trace
from leantrain.hardware.workloads import PRODUCTS, Layer, layers_of

SHAPES = [
    Layer("plain", "conv", 3, 5, (3, 3), (1, 1), (1, 1), in_size=(5, 6), out_size=(5, 6)),
    Layer("strided", "conv", 20, 24, (3, 3), (2, 2), (1, 1), in_size=(9, 8), out_size=(5, 4)),
    Layer("uneven", "conv", 8, 12, (3, 2), (1, 2), (1, 0), (2, 1), groups=2, in_size=(9, 8), out_size=(7, 4)),
    Layer("depthwise", "conv", 18, 18, (3, 3), (1, 1), (1, 1), groups=18, in_size=(5, 6), out_size=(5, 6)),
    Layer("pointwise", "conv", 33, 16, (1, 1), (2, 2), in_size=(7, 7), out_size=(4, 4)),
    Layer("stride over kernel", "conv", 4, 6, (2, 2), (3, 3), in_size=(8, 9), out_size=(3, 3)),
]
EACH_SHAPE = pytest.mark.parametrize("layer", SHAPES, ids=lambda layer: layer.name)


def batch(seed: int = 0, *, channels: int = 3, size: int = 16, count: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, channels, size, size, generator=generator), torch.arange(count) % 10


def gradients(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> list[torch.Tensor]:
    model.zero_grad(set_to_none=True)
    F.cross_entropy(model(x), y).backward()
    return [p.grad.clone() for p in model.parameters()]


def small(name: str, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return gs.build(name, image_size=16)


# Eligibility


@pytest.mark.parametrize(
    ("name", "function"),
    [
        ("relu", lambda x: F.relu(x)),
        ("relu in place", lambda x: F.relu_(x * 1)),
        ("relu and pool", lambda x: F.max_pool2d(F.relu(x), 3, 2, 1)),
        ("adaptive pool", lambda x: F.adaptive_max_pool2d(F.relu(x), 2)),
        ("two branches", lambda x: torch.cat([F.relu(x), F.max_pool2d(F.relu(-x), 3, 1, 1)], 1)),
        ("flattened", lambda x: F.relu(x).flatten(1)),
    ],
)
def test_outputs_of_a_relu_qualify(name, function):
    x = torch.randn(2, 3, 4, 4, requires_grad=True)
    out = function(x)
    assert torch.equal(gs.derivative_mask(out), out > 0)


@pytest.mark.parametrize(
    ("name", "function"),
    [
        ("network input", lambda x: x),
        ("sum", lambda x: F.relu(x) + F.relu(-x)),
        ("average", lambda x: F.avg_pool2d(F.relu(x), 2)),
        ("normalised", lambda x: F.batch_norm(F.relu(x), None, None, training=True)),
        ("convolved", lambda x: F.conv2d(F.relu(x), torch.ones(1, 3, 1, 1))),
        ("leaky", lambda x: F.leaky_relu(x)),
        ("clipped below minus one", lambda x: F.hardtanh(x)),
        ("one branch is linear", lambda x: torch.cat([F.relu(x), x * 1], 1)),
        ("cast", lambda x: F.relu(x).to(torch.bfloat16)),
        ("scaled", lambda x: F.relu(x) * 2),
        ("gelu", lambda x: F.gelu(x)),
    ],
)
def test_everything_else_does_not(name, function):
    assert gs.derivative_mask(function(torch.randn(2, 3, 4, 4, requires_grad=True))) is None


def test_relu6_has_a_second_dead_zone():
    x = torch.tensor([-1.0, 0.0, 2.0, 6.0, 9.0], requires_grad=True)
    out = F.relu6(x)
    mask = gs.derivative_mask(out)
    out.sum().backward()
    assert mask.tolist() == [False, False, True, False, False]
    assert torch.equal(mask, x.grad != 0)
    mixed = torch.cat([F.relu6(x), F.relu(x)])  # not all branches clip, so only the zeros count
    assert gs.derivative_mask(mixed).tolist() == [False, False, True, True, True] * 2


def test_an_overwritten_relu_output_is_noticed():
    out = F.relu(torch.randn(3, 3, requires_grad=True))
    with torch.no_grad():
        out.data[0, 0] = -1.0
    with pytest.raises(ValueError, match="overwritten"):
        gs.derivative_mask(out)


@pytest.mark.parametrize(
    ("name", "wrapped", "convolutions"),
    [("plain", 5, 6), ("plain-bn", 5, 6), ("residual", 8, 9), ("dense", 11, 12), ("separable", 8, 9)],
)
def test_all_but_the_first_convolution_of_the_small_networks_qualify(name, wrapped, convolutions):
    torch.manual_seed(0)
    model = gs.build(name, image_size=32)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    assert sum(isinstance(m, nn.Conv2d) for m in model.modules()) == convolutions
    assert len(gs.mask_convolutions(model, torch.randn(2, 3, 32, 32))) == wrapped
    assert all(module.training for module in model.modules())
    after = [value for key, value in model.state_dict().items()]
    assert all(torch.equal(a, b) for a, b in zip(before.values(), after, strict=True))


# Skipping changes nothing


@pytest.mark.parametrize("name", gs.SMALL)
@pytest.mark.parametrize("fill", [0.0, -1e30])
def test_garbage_in_the_skipped_gradients_changes_no_parameter_gradient(name, fill):
    x, y = batch()
    expected = gradients(small(name), x, y)
    model = small(name)
    assert gs.mask_convolutions(model, x, "overwrite", fill=fill)
    found = gradients(model, x, y)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_the_comparison_can_fail(monkeypatch):
    """One needed gradient overwritten is enough to be seen."""
    x, y = batch()
    expected = gradients(small("plain"), x, y)
    model = small("plain")
    gs.mask_convolutions(model, x, "overwrite", fill=0.5)
    true_mask = gs.derivative_mask

    def wrong(out: torch.Tensor) -> torch.Tensor | None:
        mask = true_mask(out)
        if mask is not None:
            mask.view(-1)[int(mask.view(-1).nonzero()[0])] = False
        return mask

    monkeypatch.setattr(gs, "derivative_mask", wrong)
    found = gradients(model, x, y)
    assert not all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("name", ["plain", "separable", "residual"])
def test_the_skipping_kernel_equals_itself_without_skipping_and_makes_the_counted_work(name):
    x, y = batch(count=2, size=8)
    nets = {}
    for skip in (True, False):
        torch.manual_seed(3)
        nets[skip] = gs.build(name, image_size=8)
        names = gs.mask_convolutions(nets[skip], x, skip=skip)
    found, expected = gradients(nets[True], x, y), gradients(nets[False], x, y)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    torch.manual_seed(3)
    plain = gs.build(name, image_size=8)
    for a, b in zip(found, gradients(plain, x, y), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-6)  # another order of additions
    counts = gs.mac_counts(gs.trace_step(plain, x, y, layers=names))
    counts = counts[counts["product"] == "dgrad"].set_index("layer")
    for layer in names:
        assert nets[True].get_submodule(layer).made == counts.loc[layer, "IN+OUT"]
        assert nets[False].get_submodule(layer).made == counts.loc[layer, "dense"]


def test_integers_leave_no_room_for_rounding():
    """Small integers in float64: the skipping kernel must give autograd's gradients to the last bit."""
    generator = torch.Generator().manual_seed(0)

    def net() -> nn.Sequential:
        model = nn.Sequential(
            nn.Conv2d(2, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, 8, 3, 2, 1, groups=2), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(8, 4, 3, padding=2, dilation=2), nn.ReLU(), nn.Conv2d(4, 3, 1),
        ).double()  # fmt: skip
        generator.manual_seed(1)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(torch.randint(-3, 4, parameter.shape, generator=generator))
        return model

    x = torch.randint(-4, 5, (2, 2, 9, 8), generator=generator).double()
    plain, masked = net(), net()
    assert len(gs.mask_convolutions(masked, x)) == 3
    for model in (plain, masked):
        model(x).sum().backward()
    pairs = list(zip(masked.parameters(), plain.parameters(), strict=True))
    assert all(torch.equal(a.grad, b.grad) for a, b in pairs)
    assert any(b.grad.abs().max() > 100 for _, b in pairs)


@pytest.mark.parametrize("method", ["skip", "overwrite"])
def test_gradcheck(method):
    torch.manual_seed(0)
    conv = gs.MaskedConv2d(nn.Conv2d(2, 3, 3, 2, 1).double(), method)
    x = torch.randn(1, 2, 5, 4, dtype=torch.float64)
    x = (x.sign() * (x.abs() + 0.1)).requires_grad_()  # away from the kink

    def function(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(conv, {"conv.weight": weight, "conv.bias": bias}, (F.relu(x),))

    assert torch.autograd.gradcheck(function, (x, conv.conv.weight, conv.conv.bias))


@pytest.mark.parametrize("before", [nn.AvgPool2d(1), nn.BatchNorm2d(3), nn.Identity(), nn.LeakyReLU()])
def test_a_layer_that_may_not_skip_refuses(before):
    model = nn.Sequential(before, gs.MaskedConv2d(nn.Conv2d(3, 2, 3)))
    with pytest.raises(ValueError, match="not from a ReLU"):
        model(torch.randn(1, 3, 5, 5, requires_grad=True))


def test_a_layer_without_an_input_gradient_is_a_plain_one():
    conv = nn.Conv2d(3, 2, 3)
    x = torch.randn(1, 3, 5, 5)
    assert torch.equal(gs.MaskedConv2d(conv)(x), conv(x))
    with torch.no_grad():
        assert torch.equal(gs.MaskedConv2d(conv)(x.requires_grad_()), conv(x))


@pytest.mark.parametrize(
    ("conv", "options", "message"),
    [
        (nn.Linear(2, 2), {}, "Linear"),
        (nn.Conv2d(1, 1, 3, padding=1, padding_mode="circular"), {}, "circular"),
        (nn.Conv2d(1, 1, 3, padding="same"), {}, "same"),
        (nn.Conv2d(1, 1, 3), {"method": "drop"}, "drop"),
        (nn.Conv2d(1, 1, 3), {"fill": float("nan")}, "finite"),
    ],
)
def test_bad_masked_convolutions(conv, options, message):
    with pytest.raises(ValueError, match=message):
        gs.MaskedConv2d(conv, **options)


# Counts


def count_by_loops(entry) -> dict[str, dict[str, int]]:
    """All (output position, channels, tap) tuples that do not read padding, one by one."""
    layer = entry.layer
    x, g = entry.masks["input"].mask(), entry.masks["grad_output"].mask()
    ins, outs = layer.in_channels // layer.groups, layer.out_channels // layer.groups
    total = {"dense": 0, "x": 0, "g": 0, "both": 0}
    for n, k, oh, ow in np.ndindex(g.shape):
        for c, r, s in np.ndindex(ins, *layer.kernel):
            h = oh * layer.stride[0] - layer.padding[0] + r * layer.dilation[0]
            w = ow * layer.stride[1] - layer.padding[1] + s * layer.dilation[1]
            if 0 <= h < layer.in_size[0] and 0 <= w < layer.in_size[1]:
                on, used = x[n, k // outs * ins + c, h, w], g[n, k, oh, ow]
                for name, counts in (("dense", True), ("x", on), ("g", used), ("both", on and used)):
                    total[name] += int(counts)
    d, of_x, of_g, both = total.values()
    side = min(of_x, of_g)
    return {
        "forward": {"dense": d, "IN": of_x, "OUT": d, "IN+OUT": of_x, "pairs": of_x},
        "dgrad": {"dense": d, "IN": of_g, "OUT": of_x, "IN+OUT": both, "pairs": of_g},
        "wgrad": {"dense": d, "IN": side, "OUT": d, "IN+OUT": side, "pairs": both},
    }


@EACH_SHAPE
def test_counts_equal_those_of_loops(layer):
    entry = gs.random_trace(layer, input_zeros=0.4, gradient_zeros=0.7, batch=2)
    counts = gs.mac_counts(entry).set_index("product")
    for product, expected in count_by_loops(entry).items():
        assert counts.loc[product, list(expected)].to_dict() == expected, product


@EACH_SHAPE
def test_counts_of_dense_and_empty_masks(layer):
    full = gs.mac_counts(gs.random_trace(layer, input_zeros=0, gradient_zeros=0))
    for name in (*gs.SCHEMES, "pairs"):
        assert full[name].tolist() == full["dense"].tolist()
    empty = gs.mac_counts(gs.random_trace(layer, input_zeros=1, gradient_zeros=0)).set_index("product")
    assert empty.loc["forward", "IN"] == empty.loc["dgrad", "OUT"] == empty.loc["wgrad", "IN"] == 0
    assert empty.loc["dgrad", "IN"] == empty.loc["dgrad", "dense"]
    barred = gs.mac_counts(gs.random_trace(layer, input_zeros=1, gradient_zeros=0, eligible=False))
    assert barred.set_index("product").loc["dgrad", "OUT"] == full["dense"].iloc[0]


def test_independent_masks_multiply():
    layer = Layer("large", "conv", 64, 64, (3, 3), (1, 1), (1, 1), in_size=(24, 24), out_size=(24, 24))
    dgrad = gs.mac_counts(gs.random_trace(layer, input_zeros=0.3, gradient_zeros=0.6)).set_index("product").loc["dgrad"]
    assert dgrad["IN"] / dgrad["dense"] == pytest.approx(0.4, abs=0.01)
    assert dgrad["OUT"] / dgrad["dense"] == pytest.approx(0.7, abs=0.01)
    assert dgrad["IN+OUT"] / dgrad["dense"] == pytest.approx(0.28, abs=0.01)
    assert dgrad["IN+OUT"] <= min(dgrad["IN"], dgrad["OUT"])


def test_a_linear_layer_is_counted_by_samples():
    entry = gs.random_trace(Layer("linear", "linear", 7, 5), batch=11, input_zeros=0.5, gradient_zeros=0.5)
    x, g = entry.masks["input"].mask(), entry.masks["grad_output"].mask()
    dgrad = gs.mac_counts(entry).set_index("product").loc["dgrad"]
    assert dgrad["IN+OUT"] == (x.sum(1) * g.sum(1)).sum()
    assert dgrad["dense"] == 11 * 35
    assert gs.simulate(entry)["made"].tolist() == gs.mac_counts(entry)["IN+OUT"].tolist()


@pytest.mark.parametrize(
    ("name", "gigamacs", "first"),
    [
        ("vgg16", 15.3466, 86.7),
        ("resnet18", 1.8136, 118.0),
        ("googlenet", 1.4974, 118.0),
        ("densenet121", 2.8331, 118.0),
        ("mobilenetv1", 0.5677, 10.8),
        ("alexnet", 0.6556, 70.3),
    ],
)
def test_the_full_size_networks_have_their_known_work(name, gigamacs, first):
    with torch.device("meta"):
        layers = [layer for layer in layers_of(gs.build(name, num_classes=1000), (3, 224, 224)) if layer.kind == "conv"]
    assert sum(layer.macs for layer in layers) / 1e9 == pytest.approx(gigamacs, abs=5e-5)
    assert layers[0].macs / 1e6 == pytest.approx(first, abs=0.05)
    assert [layer.needs_dgrad for layer in layers] == [False] + [True] * (len(layers) - 1)


def test_resnet18_at_full_size():
    """Factors that a separate script found for two images of noise; another draw of the noise must come near."""
    trace = gs.trace_full_size("resnet18", seed=1)
    counts = gs.mac_counts(trace)
    assert counts[counts["product"] == "dgrad"]["eligible"].all()
    sums = counts.groupby("product")[[*gs.SCHEMES]].sum()
    factor = {name: sums["dense"] / sums[name] for name in gs.SCHEMES}
    assert factor["IN"]["dgrad"] == pytest.approx(1.00, abs=0.005)
    assert factor["OUT"]["dgrad"] == factor["IN+OUT"]["dgrad"] == pytest.approx(1.69, abs=0.03)
    assert factor["IN"]["forward"] == factor["IN"]["wgrad"] == pytest.approx(1.61, abs=0.03)
    assert sums["dense"].sum() / sums["IN+OUT"].sum() == pytest.approx(1.64, abs=0.03)
    for redistribution, expected in (("none", 1.49), ("even", 1.70)):
        table = gs.simulate(trace, gs.PEArray(redistribution=redistribution), products=["dgrad"])
        assert gs.summarise(table)["speedup"].iloc[0] == pytest.approx(expected, abs=0.03)


@pytest.mark.parametrize("name", ["plain-bn", "residual", "separable"])
def test_batch_normalisation_leaves_no_zero_in_the_output_gradient(name):
    counts = gs.mac_counts(gs.trace_step(small(name), *batch()))
    dgrad = counts[(counts["product"] == "dgrad") & (counts["kind"] == "conv")]
    assert dgrad["IN"].tolist() == dgrad["dense"].tolist()
    assert (dgrad["OUT"] < dgrad["dense"]).all()
    assert dgrad["IN+OUT"].tolist() == dgrad["OUT"].tolist()


def test_behind_a_max_pool_at_most_a_quarter_of_the_gradients_is_left():
    trace = gs.trace_step(small("plain"), *batch())
    pooled = [entry for entry in trace.layers if entry.layer.kind == "conv"][1::2]
    assert [1 - entry.masks["grad_output"].sparsity <= 0.25 for entry in pooled] == [True, True]


def test_a_trace_keeps_its_masks_on_disk(tmp_path):
    trace = gs.trace_step(small("separable"), *batch())
    trace.save(tmp_path / "step")
    again = Trace.load(tmp_path / "step")
    assert gs.mac_counts(again).equals(gs.mac_counts(trace))


def test_a_mask_of_another_shape_is_refused():
    entry = gs.random_trace(SHAPES[0])
    other = gs.random_trace(SHAPES[1])
    mixed = type(entry)(entry.layer, {**entry.masks, "grad_output": other.masks["grad_output"]}, {}, entry.extra)
    with pytest.raises(ValueError, match="grad_output has shape"):
        gs.mac_counts(mixed)
    with pytest.raises(ValueError, match="needed has shape"):
        gs.simulate(type(entry)(entry.layer, entry.masks, {}, other.extra))


# The array


@EACH_SHAPE
@pytest.mark.parametrize("scheme", gs.SCHEMES)
def test_units_compute_autograds_values_with_the_counted_work_in_the_predicted_cycles(layer, scheme):
    table = gs.value_check(layer, gs.PEArray(scheme=scheme, lanes=16 if layer.in_channels > 8 else 4))
    assert table["equal"].tolist() == table["outputs"].tolist()
    assert table["made"].tolist() == table["counted"].tolist()
    assert table["busy"].tolist() == table["predicted"].tolist()
    assert scheme == "dense" or (table["made"] <= table["macs"]).all()


def test_value_check_can_fail(monkeypatch):
    exact = gs._run_windows

    def forgetful(values, *rest):
        values = values.copy()
        values.reshape(-1)[np.flatnonzero(values)[0]] = 0
        return exact(values, *rest)

    monkeypatch.setattr(gs, "_run_windows", forgetful)
    table = gs.value_check(SHAPES[0]).set_index("product")
    assert table.loc["forward", "equal"] < table.loc["forward", "outputs"]
    assert table.loc["wgrad", "equal"] == table.loc["wgrad", "outputs"]


@EACH_SHAPE
@pytest.mark.parametrize("packing", ["lane", "packed"])
def test_simulated_work_slots_and_bounds(layer, packing):
    entry = gs.random_trace(layer, input_zeros=0.45, gradient_zeros=0.6, batch=2)
    counted = gs.mac_counts(entry)
    for scheme in gs.SCHEMES:
        times = {}
        for how in ("none", "stealing", "even"):
            config = gs.PEArray(units=7, lanes=4, scheme=scheme, redistribution=how, packing=packing, transfer_start=3)
            table = gs.simulate(entry, config)
            assert table["made"].tolist() == counted[scheme].tolist()
            assert table["macs"].tolist() == counted["dense"].tolist()
            parts = table[["used", "lane", "unit", "transfer"]]
            np.testing.assert_allclose(parts.sum(axis=1), table["slots"])
            assert (parts >= 0).all(axis=None)
            assert (table["cycles"] >= table["ideal_cycles"] - 1e-9).all()
            np.testing.assert_allclose(table["slots"], table["cycles"] * config.macs_per_cycle)
            times[how] = table["cycles"]
        assert (times["even"] <= times["stealing"] + 1e-9).all()
        assert (times["stealing"] <= times["none"]).all()
        if scheme == "dense":
            assert times["none"].tolist() == table["dense_cycles"].tolist()


def test_dense_cycles_by_hand():
    # 16 channels fill the lanes once: each output takes its taps; nine units take four outputs of three channels each.
    layer = Layer("hand", "conv", 16, 3, (3, 3), (1, 1), (1, 1), in_size=(4, 3), out_size=(4, 3))
    taps = np.outer([2, 3, 3, 2], [2, 3, 2]).reshape(-1)
    pieces = np.tile(taps, 3).reshape(9, 4).sum(axis=1)
    assert gs.dense_cycles(layer, "forward", gs.PEArray(units=9)) == pieces.max()
    assert gs.dense_cycles(layer, "forward", gs.PEArray(units=1), batch=3) == 3 * 3 * taps.sum()
    # dgrad reduces three channels: one block as well; wgrad reduces 12, 9, 8 or 6 positions: one block.
    assert gs.dense_cycles(layer, "dgrad", gs.PEArray(units=1)) == 16 * taps.sum()
    assert gs.dense_cycles(layer, "wgrad", gs.PEArray(units=1)) == 16 * 3 * 9
    assert gs.dense_cycles(layer, "wgrad", gs.PEArray(units=1, lanes=8)) == 16 * 3 * (2 * 3 + 1 * 6)


def test_one_unit_has_nobody_to_share_with():
    entry = gs.random_trace(SHAPES[1], input_zeros=0.5, gradient_zeros=0.5)
    cycles = [
        gs.simulate(entry, gs.PEArray(units=1, redistribution=how))["cycles"].tolist()
        for how in ("none", "stealing", "even")
    ]
    assert cycles[0] == cycles[1] == cycles[2]


def test_packed_lanes_without_rounding_are_the_count():
    entry = gs.random_trace(SHAPES[1], input_zeros=0.5, gradient_zeros=0.5)
    config = gs.PEArray(lanes=1, packing="packed")  # one lane: nothing to round
    for product in PRODUCTS:
        counted = gs.mac_counts(entry).set_index("product").loc[product, "IN+OUT"]
        assert gs.output_loads(entry, product, config).sum() == counted


# Redistribution


def steal_by_lists(loads: list[list[int]], start: int, rate: int) -> int:
    """Redistribution once more: a list of outputs for each unit, and a clock that goes from event to event."""
    queues = [list(queue) for queue in loads]
    free_at = [0] * len(queues)  # when the unit can take its next output
    active = set(range(len(queues)))

    def end(unit: int) -> int:
        return free_at[unit] + sum(queues[unit])

    while active:
        now, thief = min((end(unit), unit) for unit in active)
        latest = max(end(unit) for unit in range(len(queues)))
        victim = next(unit for unit in range(len(queues)) if end(unit) == latest)
        while queues[victim] and free_at[victim] < now:
            free_at[victim] += queues[victim].pop(0)
        moved = len(queues[victim]) // 2
        stolen = queues[victim][len(queues[victim]) - moved :]
        cost = start + -(-moved // rate)
        if victim == thief or moved == 0 or now + cost + sum(stolen) >= latest:
            active.discard(thief)
            continue
        del queues[victim][len(queues[victim]) - moved :]
        queues[thief], free_at[thief] = stolen, now + cost
    return max(end(unit) for unit in range(len(queues)))


@settings(max_examples=150, deadline=None)
@given(
    loads=st.lists(st.integers(0, 30), min_size=1, max_size=120),
    units=st.integers(1, 9),
    start=st.integers(0, 20),
    rate=st.integers(1, 16),
    seed=st.integers(0, 5),
)
def test_redistribution_properties(loads, units, start, rate, seed):
    cycles = np.array(loads)
    needed = np.random.default_rng(seed).random(cycles.size) < 0.7
    config = gs.PEArray(units=units, redistribution="stealing", transfer_start=start, transfer_rate=rate)
    result = gs.redistribute(cycles, config, needed=needed, log=True)
    pieces = [cycles[a:b][needed[a:b]].tolist() for a, b in zip(*bounds(cycles.size, units), strict=True)]
    assert result.cycles == steal_by_lists(pieces, start, rate)
    assert result.alone == max(sum(piece) for piece in pieces)
    assert sum(map(sum, pieces)) / units <= result.cycles <= result.alone
    segments = result.segments()
    work = segments[segments["kind"] == "work"]
    done = [np.arange(row["first"], row["last"]) for row in work.to_dict("records")]
    assert sorted(np.concatenate([*done, np.array([], int)]).tolist()) == list(range(int(needed.sum())))
    assert segments["finish"].max() == result.cycles or result.cycles == 0
    for _, own in segments.groupby("unit"):
        assert (own["start"].to_numpy()[1:] >= own["finish"].to_numpy()[:-1]).all()
    assert len(result.events) == result.transfers
    assert result.events["cost"].sum() == result.transfer_cycles


def bounds(size: int, units: int) -> tuple[list[int], list[int]]:
    edges = [unit * size // units for unit in range(units + 1)]
    return edges[:-1], edges[1:]


def test_redistribution_by_hand():
    # Two units, eight outputs of ten cycles, the first four skipped: unit 0 takes two of unit 1's at once.
    cycles = np.full(8, 10)
    needed = np.arange(8) >= 4
    config = gs.PEArray(units=2, redistribution="stealing", transfer_start=4, transfer_rate=2)
    result = gs.redistribute(cycles, config, needed=needed, log=True)
    assert result.alone == 40
    assert result.events.values.tolist() == [[0, 0, 1, 2, 4, 5]]
    assert result.cycles == 25  # 5 cycles of transfer, then two outputs; unit 1 is done at 20
    even = gs.redistribute(cycles, gs.PEArray(units=2, redistribution="even"), needed=needed)
    assert even.cycles == 20
    slow = gs.PEArray(units=2, redistribution="stealing", transfer_start=19)
    assert gs.redistribute(cycles, slow, needed=needed).cycles == 40  # would not be done earlier, so nothing moves


def test_skipping_whole_channels_needs_redistribution():
    layer = Layer("dead", "conv", 64, 64, (3, 3), (1, 1), (1, 1), in_size=(16, 16), out_size=(16, 16))
    entry = gs.random_trace(layer, input_zeros=0, gradient_zeros=0)
    dead = entry.extra["needed"].mask().copy()
    dead[:, ::2] = False
    entry = type(entry)(layer, entry.masks, {}, {"needed": type(entry.extra["needed"]).of(dead)})
    speed = {}
    for how in ("none", "stealing", "even"):
        table = gs.simulate(entry, gs.PEArray(units=16, scheme="OUT", redistribution=how), products=["dgrad"])
        speed[how] = table["speedup"].iloc[0]
    # Sixteen units with four channels each lose half of their work alike; with 64 units half of them have nothing.
    assert speed["none"] == pytest.approx(2.0)
    for how in ("none", "stealing", "even"):
        table = gs.simulate(entry, gs.PEArray(units=64, scheme="OUT", redistribution=how), products=["dgrad"])
        speed[how] = table["speedup"].iloc[0]
    assert speed["none"] == 1.0
    assert speed["even"] == pytest.approx(2.0)
    assert 1.8 < speed["stealing"] < 2.0


# Tables


def test_energy_of_a_layer_by_hand():
    layer = Layer("hand", "conv", 2, 3, in_size=(4, 4), out_size=(4, 4))
    entry = gs.random_trace(layer, input_zeros=0.5, gradient_zeros=0.25, batch=2, seed=1)
    x, g = entry.masks["input"].nonzero, entry.masks["grad_output"].nonzero
    both = int((entry.masks["input"].mask().sum(1) * entry.masks["grad_output"].mask().sum(1)).sum())
    access = AccessEnergy(dram=100.0, buffer=10.0, scratchpad=2.0, mac=1.0)
    row = gs.simulate(entry, gs.PEArray(), products=["dgrad"], access=access, bits=16, minibatch=8).iloc[0]
    assert row["core_dense"] == 2 * 16 * 6
    assert row["core"] == row["made"] == both
    assert row["scratchpad"] == 2.0 * both * (2 + 4 / 16)
    assert row["buffer"] == 10.0 * (both * (1 + 4 / 16) + x)
    packed_x, packed_g = (64 + 20 * x) / 16, min(96, (96 + 20 * g) / 16)
    assert row["dram"] == pytest.approx(100.0 * (6 * 2 / 8 + packed_x + packed_g))
    assert row["memory_dense"] == pytest.approx(2.0 * 2 * 192 + 10.0 * (192 + 64) + 100.0 * (6 * 2 / 8 + 64 + 96))
    dense = gs.simulate(entry, gs.PEArray(scheme="dense"), access=access, bits=32)
    memory = dense[["scratchpad", "buffer", "dram"]].sum(axis=1)
    np.testing.assert_allclose(memory, dense["memory_dense"])
    np.testing.assert_allclose(dense["core"], dense["core_dense"])


def test_summary_sums_cycles_and_the_report_round_trips():
    trace = gs.trace_step(small("plain"), *batch())
    configs = {"IN+OUT": gs.PEArray(units=16), "even": gs.PEArray(units=16, redistribution="even")}
    frame = gs.simulate(trace, configs["even"])
    total = gs.summarise(frame)
    assert total["speedup"].iloc[0] == pytest.approx(frame["dense_cycles"].sum() / frame["cycles"].sum())
    assert total["speedup"].iloc[0] != pytest.approx(frame["speedup"].mean(), rel=1e-3)
    import pandas as pd

    report = pd.DataFrame([{"arm": "plain", "seed": 0, "epoch": 1} | gs.cycle_report(trace, configs)])
    long = gs.read_report(report).set_index(["config", "product"])
    convs = frame[frame["kind"] == "conv"]
    for product in PRODUCTS:
        expected = convs[convs["product"] == product]
        assert long.loc[("even", product), "cycles"] == pytest.approx(expected["cycles"].sum())
        assert long.loc[("even", product), "made"] == expected["made"].sum()
    layers = gs.read_layers(report)
    assert layers["layer"].tolist() == [entry.layer.name for entry in trace.layers if entry.layer.kind == "conv"]
    counts = gs.mac_counts(trace).set_index(["layer", "product"])
    for row in layers.iloc[1:].to_dict("records"):
        count = counts.loc[(row["layer"], "dgrad")]
        assert row["factor"] == pytest.approx(count["dense"] / count["IN+OUT"])
    assert np.isnan(layers["factor"].iloc[0])  # the first layer has no dgrad
    with pytest.raises(ValueError, match="no columns"):
        gs.read_layers(pd.DataFrame([{"arm": "a", "seed": 0, "epoch": 1}]))
    with pytest.raises(ValueError, match="no columns"):
        gs.read_report(pd.DataFrame([{"arm": "a", "seed": 0, "epoch": 1}]))


@pytest.mark.parametrize(("options", "message"), [
    ({"units": 0}, "units is 0"),
    ({"lanes": 2.0}, "lanes is 2.0"),
    ({"transfer_rate": 0}, "transfer_rate is 0"),
    ({"transfer_start": -1}, "transfer_start is -1"),
    ({"scheme": "in"}, "scheme is 'in'"),
    ({"redistribution": "half"}, "redistribution is 'half'"),
    ({"packing": "tight"}, "packing is 'tight'"),
])  # fmt: skip
def test_bad_configurations_are_refused_by_name(options, message):
    with pytest.raises(ValueError, match=message):
        gs.PEArray(**options)


def test_bad_input_is_refused():
    entry = gs.random_trace(SHAPES[0])
    with pytest.raises(ValueError, match="bits is 8"):
        gs.simulate(entry, bits=8)
    with pytest.raises(ValueError, match="minibatch is 0"):
        gs.simulate(entry, minibatch=0)
    with pytest.raises(ValueError, match="input_zeros is 2"):
        gs.random_trace(SHAPES[0], input_zeros=2)
    with pytest.raises(ValueError, match="batch is 0"):
        gs.random_trace(SHAPES[0], batch=0)
    with pytest.raises(ValueError, match="product is 'backward'"):
        gs.output_loads(entry, "backward")
    for cycles in (np.zeros((2, 2), int), np.zeros(0, int), np.array([-1]), np.array([0.5])):
        with pytest.raises(ValueError, match="cycles is"):
            gs.redistribute(cycles)
    with pytest.raises(ValueError, match="needed is"):
        gs.redistribute(np.ones(3, int), needed=np.ones(2, bool))
    with pytest.raises(ValueError, match="packing"):
        gs.value_check(SHAPES[0], gs.PEArray(packing="packed"))
    with pytest.raises(ValueError, match="'lenet' is unknown"):
        gs.build("lenet")
    with pytest.raises(ValueError, match="3 channels, not 1"):
        gs.build("resnet18", in_channels=1)
    with pytest.raises(ValueError, match="'plain' is not of full size"):
        gs.trace_full_size("plain")
    with pytest.raises(ValueError, match="outputs may be skipped"):
        gs.draw_products(np.empty((3, 3), object), gs.random_trace(SHAPES[0], eligible=False))


# Overlap of the zeros, training


@pytest.mark.parametrize("name", gs.SMALL)
def test_a_relu_that_is_off_passes_no_gradient(name):
    x, y = batch()
    model = small(name)
    with gs.watch_relus(model) as seen:
        F.cross_entropy(model(x), y).backward()
    table = seen.table()
    assert len(table) == sum(isinstance(m, nn.ReLU | nn.ReLU6) for m in model.modules())
    assert (table["both"] == table["zero_outputs"]).all()
    assert (table["zero_outputs"] > 0).all()
    assert seen.totals()["relu/both"] == table["both"].sum()


def test_overlap_counted_by_hand():
    model = nn.Sequential(nn.Conv2d(1, 1, 1, bias=False), nn.ReLU(inplace=True), nn.MaxPool2d(2))
    nn.init.ones_(model[0].weight)
    x = torch.tensor([[-1.0, 2.0, 5.0, 3.0], [1.0, -4.0, 6.0, -7.0]]).reshape(1, 1, 2, 4)
    with gs.watch_relus(model) as seen:
        model(x).sum().backward()
    row = seen.rows[0]
    assert (row["values"], row["zero_outputs"], row["zero_gradients"], row["both"]) == (8, 3, 6, 3)
    model(x).sum().backward()
    assert len(seen.rows) == 1  # the hooks are gone
    with pytest.raises(ValueError, match="no nn"), gs.watch_relus(nn.Linear(1, 1)):
        pass


def test_a_training_run_logs_both_tables():
    from functools import partial

    import lightning as L
    from torch.utils.data import DataLoader, TensorDataset

    x, y = batch(count=24)
    loader = DataLoader(TensorDataset(x, y), batch_size=8)

    def fit(kind):
        torch.manual_seed(0)
        model = gs.build("separable", image_size=16)
        adam = partial(torch.optim.AdamW, lr=1e-3)
        if kind == "traced":
            module = gs.SparsityClassifier(model, adam, num_classes=10, configs={"a": gs.PEArray(units=8)}, samples=2)
        else:
            from leantrain.training import ImageClassifier

            module = ImageClassifier(model, adam, num_classes=10)
        trainer = L.Trainer(
            max_epochs=1, logger=False, enable_checkpointing=False, enable_progress_bar=False,
            enable_model_summary=False, accelerator="cpu",
        )  # fmt: skip
        trainer.fit(module, loader, loader)
        return module, trainer.callback_metrics

    (traced, metrics), (plain, _) = fit("traced"), fit("plain")
    assert metrics["a/dgrad/made"] < metrics["a/dgrad/macs"]
    assert metrics["relu/both"] == metrics["relu/zero_outputs"] > 0
    for a, b in zip(traced.model.parameters(), plain.model.parameters(), strict=True):
        assert torch.equal(a, b), "tracing must not change the training"


def test_every_scheme_is_at_least_as_fast_as_dense_on_training_masks():
    trace = gs.trace_step(small("plain"), *batch())
    for scheme, how in every(gs.SCHEMES, ("none", "stealing", "even")):
        table = gs.simulate(trace, gs.PEArray(units=32, scheme=scheme, redistribution=how))
        assert (table["speedup"] >= 1).all()
        assert (table["speedup"] <= table["ideal"] + 1e-9).all()


def test_a_relu_that_runs_twice_is_seen_twice():
    relu = nn.ReLU(inplace=True)
    model = nn.Sequential(nn.Linear(4, 6), relu, nn.Linear(6, 5), relu)
    x = torch.randn(7, 4)
    with gs.watch_relus(model) as seen:
        model(x).sum().backward()
    hidden = torch.relu(model[0](x))
    assert [row["values"] for row in seen.rows] == [35, 42]
    assert [row["zero_outputs"] for row in seen.rows] == [
        int((torch.relu(model[2](hidden)) == 0).sum()),
        int((hidden == 0).sum()),
    ]
