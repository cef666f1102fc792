"""FastHebb: all forms of the update agree; the rules do what they are known to do; bad input is named."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from leantrain.data import images
from leantrain.experiment import Experiment, final
from leantrain.measure.peak import peak_bytes
from leantrain.techniques.fasthebb import (
    IMAGENET,
    SMALL,
    HebbianConv2d,
    HebbianLinear,
    HebbianNet,
    HebbianPretraining,
    Passes,
    RelativeNorm,
    Stage,
    Whitening,
    aggregation_weights,
    cheapest_block,
    grouped,
    layer_shapes,
    merged,
    patch_by_patch,
    readout,
    set_hebbian,
    swta_gate,
    unfold_free,
)

F64 = torch.float64
FORMS = ("patch", "grouped", "merged", "unfold-free")


def case(n, k, d, seed=0, dtype=F64):
    """Patches, weights, and gates of either sign, so that nothing leans on their being positive."""
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(*s, generator=generator, dtype=dtype) for s in ((n, d), (k, d), (n, k), (n, k)))


def by_definition(x, w, a, r):
    """The double sum over patches and neurons in NumPy, written from the equation alone."""
    x, w, a = x.double().numpy(), w.double().numpy(), a.double().numpy()
    delta = np.zeros_like(w)
    for n in range(len(x)):
        for i in range(len(w)):
            seen = w[i] if r is None else sum(r[n, j].item() * w[j] for j in range(i + 1))
            delta[i] += a[n, i] * (x[n] - seen)
    return torch.from_numpy(delta)


def off(found, expected):
    """Largest difference, relative to the largest number."""
    return float((found - expected).abs().max() / expected.abs().max().clamp_min(1e-300))


@given(st.integers(1, 12), st.integers(1, 14), st.integers(1, 12), st.booleans(), st.integers(0, 1000))
@settings(max_examples=40, deadline=None)
def test_all_forms_are_the_double_sum(n, k, d, principal, seed):
    x, w, a, r = case(n, k, d, seed)
    r = r if principal else None
    expected = by_definition(x, w, a, r)
    assert off(patch_by_patch(x, w, a, r), expected) < 1e-12
    for group in {1, 3, 8, k}:
        assert off(grouped(x, w, a, r, group=group), expected) < 1e-12, group
    for block in (1, 2, 5, k, None):
        assert off(merged(x, w, a, r, block=block), expected) < 1e-12, block


@pytest.mark.parametrize(("n", "k", "d"), [(1, 1, 1), (1, 7, 3), (9, 1, 5), (3, 20, 4), (6, 5, 5), (4, 300, 6)])
@pytest.mark.parametrize("principal", [True, False])
def test_edges_of_the_shapes_and_single_precision(n, k, d, principal):
    x, w, a, r = case(n, k, d, dtype=torch.float32)
    r = r if principal else None
    expected = patch_by_patch(*(t if t is None else t.double() for t in (x, w, a, r)))
    for found in (patch_by_patch(x, w, a, r), grouped(x, w, a, r), merged(x, w, a, r), merged(x, w, a, r, block=7)):
        assert off(found.double(), expected) < 1e-4


def test_blocks_are_chosen_where_they_save():
    assert cheapest_block(50176, 75, 96) == 96
    assert cheapest_block(576, 1728, 256) == 256
    assert cheapest_block(64, 2304, 4096) == 128
    assert cheapest_block(50176, 75, 4096) == 128


@given(
    st.sampled_from(["swta", "hpca"]),
    st.integers(1, 3),
    st.integers(0, 2),
    st.integers(1, 4),
    st.integers(1, 5),
    st.integers(1, 9),
    st.integers(0, 1000),
)
@settings(max_examples=40, deadline=None)
def test_all_forms_of_a_layer_agree(rule, stride, padding, kernel, batch, neurons, seed):
    torch.manual_seed(seed)
    x, found = torch.randn(batch, 2, 6, 7, dtype=F64), {}
    weight = torch.randn(neurons, 2, kernel, kernel, dtype=F64)
    for form in FORMS:
        layer = HebbianConv2d(2, neurons, kernel, rule=rule, stride=stride, padding=padding, form=form).double()
        layer.weight.data.copy_(weight)
        found[form] = layer.update(x)
        # The answers are those of the ordinary pass.
        torch.testing.assert_close(found[form][0], layer.eval()(x).detach(), atol=1e-12, rtol=1e-12)
    for form in FORMS[1:]:
        torch.testing.assert_close(found[form][1], found["patch"][1], atol=1e-12, rtol=1e-10)


def test_a_kernel_as_large_as_the_map_is_a_linear_layer():
    torch.manual_seed(0)
    x = torch.randn(5, 3, 4, 4, dtype=F64)
    for rule in ("swta", "hpca"):
        conv, flat = HebbianConv2d(3, 6, 4, rule=rule).double(), HebbianLinear(48, 6, rule=rule).double()
        flat.weight.data.copy_(conv.weight.data.view_as(flat.weight))
        torch.testing.assert_close(flat(x.flatten(1)), conv(x).flatten(1))
        torch.testing.assert_close(flat.weight.grad.flatten(1), conv.weight.grad.flatten(1))


def test_one_neuron_is_ojas_rule():
    x, w, _, _ = case(40, 1, 6)
    y = x @ w.T
    expected = (y * x).mean(0) - y.square().mean() * w[0]
    torch.testing.assert_close(merged(x, w, y / len(x), y)[0], expected)


def test_linear_neurons_become_the_principal_components_in_order():
    torch.manual_seed(0)
    spread = torch.tensor([3, 2.4, 1.9, 1.5, 1, 0.7, 0.5, 0.3], dtype=F64)
    turn = torch.linalg.qr(torch.randn(8, 8, dtype=F64))[0]
    w = torch.randn(4, 8, dtype=F64) / 8**0.5
    for _ in range(2000):
        x = (torch.randn(256, 8, dtype=F64) * spread) @ turn.T
        y = x @ w.T
        w += 0.01 * merged(x, w, y / len(x), y)
    assert (F.normalize(w, dim=1) * turn.T[:4]).sum(1).abs().min() > 0.99
    assert (w @ w.T - torch.eye(4, dtype=F64)).abs().max() < 0.05


def test_hard_winners_move_to_the_mean_of_their_patches():
    """Near temperature 0 with the aggregation by gates, a step of 1 is a step of k-means."""
    torch.manual_seed(0)
    x, w = F.normalize(torch.randn(60, 5, dtype=F64)), F.normalize(torch.randn(4, 5, dtype=F64))
    gate = swta_gate(x @ w.T, 1e-9)
    winner = torch.cdist(x, w).argmin(1)
    assert torch.equal(gate.argmax(1), winner)
    moved = w + merged(x, w, gate * aggregation_weights(gate, "gate"))
    for neuron in range(4):
        torch.testing.assert_close(moved[neuron], x[winner == neuron].mean(0))


def test_nothing_moves_when_all_patches_are_the_neuron():
    layer = HebbianConv2d(2, 1, 2, rule="swta").double()
    x = layer.weight.data[:1].repeat(3, 1, 1, 1)
    assert layer.update(x)[1].abs().max() < 1e-15


def test_order_of_patches_and_of_neurons():
    x, w, a, r = case(10, 6, 5)
    mixed, swapped = torch.randperm(10), torch.tensor([3, 1, 5, 0, 4, 2])
    for coefficients in (None, r):
        some = coefficients[mixed] if coefficients is not None else None
        torch.testing.assert_close(merged(x[mixed], w, a[mixed], some), merged(x, w, a, coefficients))
    torch.testing.assert_close(merged(x, w[swapped], a[:, swapped]), merged(x, w, a)[swapped])
    whole = merged(x, w, a, r)
    other = merged(x, w[swapped], a[:, swapped], r[:, swapped])
    assert off(other, whole[swapped]) > 0.1, "principal components have an order"
    assert off(a.T @ x - (a.T @ r) @ w, whole) > 0.1, "without the triangle it is the subspace rule"


@pytest.mark.parametrize("rule", ["swta", "hpca"])
@pytest.mark.parametrize("aggregation", ["gate", "mean"])
def test_a_batch_twice_is_the_batch(rule, aggregation):
    torch.manual_seed(0)
    layer = HebbianConv2d(2, 5, 3, rule=rule, aggregation=aggregation).double()
    x = torch.randn(3, 2, 6, 6, dtype=F64)
    torch.testing.assert_close(layer.update(torch.cat([x, x]))[1], layer.update(x)[1])


def test_gates_and_averages():
    gate = swta_gate(torch.tensor([[1.0, 0.0, -1.0]], dtype=F64), 0.5)
    powers = [math.exp(q / 0.5) for q in (1, 0.25, 0)]
    torch.testing.assert_close(gate[0], torch.tensor([p / sum(powers) for p in powers], dtype=F64))
    g = torch.tensor([[1.0, 0.0], [3.0, 0.0]])
    assert aggregation_weights(g, "gate").tolist() == [[0.25, 0.0], [0.75, 0.0]], "no division by zero"
    assert aggregation_weights(g, "mean").tolist() == [[0.5, 0.5], [0.5, 0.5]]
    maps = torch.rand(2, 3, 4, 5)
    torch.testing.assert_close(aggregation_weights(maps, "gate").sum((0, 2, 3)), torch.ones(3))


def test_a_silent_layer_and_an_empty_patch_give_finite_updates():
    layer = HebbianConv2d(1, 3, 2, rule="hpca")
    assert torch.equal(layer.update(torch.zeros(2, 1, 4, 4))[1], torch.zeros_like(layer.weight))
    for form in FORMS:
        layer = HebbianConv2d(1, 3, 2, rule="swta", form=form)
        assert layer.update(torch.zeros(2, 1, 4, 4))[1].isfinite().all()


def test_the_step_of_principal_components_is_divided_by_the_root_of_their_size():
    torch.manual_seed(0)
    layer = HebbianLinear(16, 3, rule="hpca", activation="identity").double()
    x = torch.randn(7, 16, dtype=F64)
    w = layer.weight.detach().flatten(1)
    y = x @ w.T
    expected = (y.T @ x - (y.T @ y).tril() @ w) / 7 / 4
    torch.testing.assert_close(layer.update(x[:, :, None, None])[1].flatten(1), expected)


def test_learning_happens_in_training_mode_only_and_keeps_no_graph():
    layer, x = HebbianConv2d(2, 4, 3, rule="hpca"), torch.randn(2, 2, 5, 5, requires_grad=True)
    assert not layer(x).requires_grad
    torch.testing.assert_close(layer.weight.grad, -layer.update(x)[1])
    layer.weight.grad = None
    assert layer.eval()(x).requires_grad
    assert layer.weight.grad is None
    assert set_hebbian(layer.train(), False)(x).requires_grad
    assert layer.weight.grad is None


def test_relative_norm_is_batch_norm_times_the_relative_spread():
    torch.manual_seed(0)
    x = torch.randn(16, 3, 4, 4, dtype=F64) * torch.tensor([1.0, 2.0, 5.0], dtype=F64).view(1, 3, 1, 1) + 1
    norm, plain = RelativeNorm(3).double(), nn.BatchNorm2d(3, affine=False).double()
    var = x.var((0, 2, 3), correction=0)
    scale = ((var + 1e-5) / (var.mean() + 1e-5)).sqrt().view(1, 3, 1, 1)
    torch.testing.assert_close(norm(x), plain(x) * scale)
    for _ in range(300):
        norm(x)
    torch.testing.assert_close(norm.eval()(x), plain(x) * scale, atol=1e-6, rtol=1e-6)
    # Its gradient goes through the batch's own statistics.
    assert torch.autograd.gradcheck(RelativeNorm(2).double(), torch.randn(4, 2, dtype=F64, requires_grad=True))


def test_whitening():
    torch.manual_seed(0)
    mix = torch.randn(3, 3, dtype=F64)
    pixels = torch.einsum("ij,njhw->nihw", mix, torch.randn(50, 3, 6, 6, dtype=F64)) + 2
    white = Whitening.fit(pixels, kernel=1, eps=0.0)(pixels)
    flat = white.transpose(0, 1).flatten(1)
    torch.testing.assert_close(flat @ flat.T / flat.shape[1], torch.eye(3, dtype=F64))
    smooth = F.avg_pool2d(torch.randn(200, 1, 14, 14, dtype=F64), 3, 1)
    found = Whitening.fit(smooth, kernel=5, eps=1e-3)(smooth)

    def neighbours(x):
        return torch.corrcoef(torch.stack([x[..., 1:].flatten(), x[..., :-1].flatten()]))[0, 1].item()

    assert neighbours(smooth) > 0.6
    assert abs(neighbours(found)) < 0.15


def test_the_papers_layers():
    small = [(s.patches, s.inputs, s.neurons) for s in layer_shapes(SMALL, (3, 32, 32), 64)]
    assert small == [(50176, 75, 96), (9216, 864, 128), (6400, 1152, 192), (576, 1728, 256), (64, 2304, 4096)]
    large = layer_shapes(IMAGENET, (3, 210, 210), 32)
    assert [s.patches for s in large[:4]] == [1331712, 139392, 131072, 28800]
    assert [(s.patches, s.inputs, s.neurons) for s in large[7:]] == [(288, 3456, 512), (32, 4608, 4096)]
    with torch.device("meta"):
        net = HebbianNet(IMAGENET, in_shape=(3, 210, 210), num_classes=1000, rule="hpca").eval()
        assert net(torch.empty(2, 3, 210, 210)).shape == (2, 1000)
        assert net.blocks[8][1].weight.shape == (4096, 4608, 1, 1)


def test_a_network_trained_in_four_forms_is_one_network():
    torch.manual_seed(0)
    x, weights = torch.rand(6, 1, 12, 12, dtype=F64), []
    for form in FORMS:
        torch.manual_seed(1)
        stages = (Stage(4, 3, 2), Stage(6, 3))
        net = HebbianNet(stages, in_shape=(1, 12, 12), num_classes=3, rule="hpca", hidden=8, form=form).double()
        step = torch.optim.SGD([m.weight for m in net.modules() if isinstance(m, HebbianConv2d)], lr=0.1)
        for _ in range(4):
            net.outputs(x)
            step.step()
        weights.append(torch.cat([p.detach().flatten() for p in net.parameters()]))
    for other in weights[1:]:
        torch.testing.assert_close(other, weights[0], atol=1e-13, rtol=1e-11)


def test_fine_tuning_reaches_every_weight():
    torch.manual_seed(0)
    net = HebbianNet((Stage(4, 3), Stage(5, 3)), in_shape=(1, 8, 8), num_classes=3, rule="swta", hidden=6, dropout=0.0)
    set_hebbian(net, False)
    F.cross_entropy(net(torch.rand(8, 1, 8, 8)), torch.arange(8) % 3).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in net.parameters())


def test_pretraining_in_lightning_moves_the_layers_and_not_the_classifier():
    data = images("digits", batch_size=50, train_size=200, val_size=50)
    kept = {}

    def build(seed):
        net = HebbianNet((Stage(8, 3),), in_shape=data.shape, num_classes=10, rule="hpca", hidden=0)
        kept["before"] = {name: tensor.clone() for name, tensor in net.state_dict().items()}
        return HebbianPretraining(net, lr=0.1)

    def after(module):
        kept["after"] = module.model.state_dict()
        return {}

    frame = Experiment({"hpca": build}, data, [0], 2, after=after).run(progress=False)
    assert list(frame["epoch"]) == [1, 2]
    assert final(frame, "update").iloc[0, 0] > 0
    moved = {name for name in kept["after"] if not torch.equal(kept["after"][name], kept["before"][name])}
    assert "blocks.0.0.weight" in moved
    assert not any(name.startswith("classifier") for name in moved)


def test_a_step_that_is_too_large_is_called_diverged():
    data = images("digits", batch_size=50, train_size=500, val_size=50)

    def build(seed):
        net = HebbianNet((Stage(8, 3),), in_shape=data.shape, num_classes=10, rule="hpca", hidden=0)
        return HebbianPretraining(net, lr=1e9)

    frame = Experiment({"hpca": build}, data, [0], 3).run(progress=False)
    assert bool(frame["diverged"].iloc[-1])


def test_passes_are_the_epochs_one_after_the_other():
    data = images("digits", batch_size=20, train_size=40, val_size=50)
    data.set_seed(3)
    apart = []
    for epoch in range(3):
        data.set_epoch(epoch)
        apart += [y for _, y in data.train_dataloader()]
    joined = Passes(images("digits", batch_size=20, train_size=40, val_size=50), 3)
    joined.set_seed(3)
    found = [y for _, y in joined.train_dataloader()]
    assert len(joined.train_dataloader()) == len(found) == 6
    assert all(torch.equal(a, b) for a, b in zip(apart, found, strict=True))
    assert not torch.equal(torch.cat(found[:2]), torch.cat(found[2:4])), "every pass has its own order"
    assert sum(len(y) for _, y in joined.val_dataloader()) == 50
    assert joined.fingerprint not in (data.fingerprint, Passes(data, 4).fingerprint)


def test_readout_of_separable_and_of_random_features():
    torch.manual_seed(0)
    y = torch.arange(200) % 4
    x = F.one_hot(y, 4).double() + 0.05 * torch.randn(200, 4, dtype=F64)
    assert readout((x[:100], y[:100]), (x[100:], y[100:]), 4) == 100.0
    noise = torch.randn(400, 4, dtype=F64)
    assert readout((noise[:200], y), (noise[200:], y), 4) < 45
    with pytest.raises(ValueError, match="4 samples"):
        readout((x[:4], y[:4]), (x, y), 4)


def test_peak_bytes_counts_what_is_alive_together():
    x = torch.empty(1000, device="meta")

    def loop():
        for _ in range(5):
            y = x * 2
            del y

    assert peak_bytes(loop) == 4000
    assert peak_bytes(lambda: [x * 2 for _ in range(5)]) == 20000
    assert peak_bytes(lambda: x.view(10, 100).T[:5]) == 0, "views of what was there"
    assert peak_bytes(lambda: (x * 2).view(10, 100).sum(0)) == 4400


def test_merging_saves_memory():
    n, k, d = 6400, 192, 1152
    x, w, a = (torch.empty(*s, device="meta") for s in ((n, d), (k, d), (n, k)))
    materialised = n * 8 * d * 4
    assert peak_bytes(lambda: grouped(x, w, a, a)) > 2 * materialised
    assert peak_bytes(lambda: merged(x, w, a, a)) < 0.02 * materialised


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda: HebbianConv2d(3, 4, 3, rule="hpca")(torch.zeros(2, 2, 5, 5)), r"expected \(B, 3, H, W\)"),
        (lambda: HebbianConv2d(3, 4, 3, rule="hpca")(torch.zeros(0, 3, 5, 5)), "at least 1"),
        (lambda: HebbianConv2d(3, 4, 3, rule="hpca")(torch.zeros(2, 3, 2, 5)), "smaller than the kernel"),
        (lambda: HebbianConv2d(3, 4, 3, rule="oja"), "rule='oja'"),
        (lambda: HebbianConv2d(3, 4, 3, rule="hpca", form="fast"), "form='fast'"),
        (lambda: HebbianConv2d(3, 0, 3, rule="hpca"), "3 to 0"),
        (lambda: HebbianConv2d(3, 4, 3, rule="swta", temperature=0.0), "temperature"),
        (lambda: HebbianConv2d(3, 4, 3, rule="hpca", activation="gelu"), "activation='gelu'"),
        (lambda: HebbianConv2d(3, 4, 3, rule="hpca", aggregation="sum")(torch.zeros(2, 3, 5, 5)), "how='sum'"),
        (lambda: swta_gate(torch.zeros(1, 2), -1.0), "temperature"),
        (lambda: aggregation_weights(torch.zeros(0, 3), "mean"), "empty"),
        (lambda: grouped(torch.zeros(1, 2), torch.zeros(1, 2), torch.zeros(1, 1), group=0), "group"),
        (lambda: merged(torch.zeros(1, 2), torch.zeros(1, 2), torch.zeros(1, 1), block=0), "block"),
        (lambda: layer_shapes(SMALL, (3, 12, 12), 1), "too small"),
        (lambda: HebbianNet((), in_shape=(1, 8, 8), num_classes=2, rule="hpca"), "0 stages"),
        (lambda: RelativeNorm(0), "channels=0"),
        (lambda: Passes(images("digits", train_size=20), 0), "passes"),
        (lambda: Whitening.fit(torch.zeros(1, 1, 4, 4), kernel=2), "kernel=2"),
        (
            lambda: HebbianPretraining(
                HebbianNet((Stage(2, 3),), in_shape=(1, 8, 8), num_classes=2, rule="hpca"), lr=-1.0
            ),
            "lr must be above 0",
        ),
    ],
)
def test_bad_input_is_named(call, named):
    with pytest.raises(ValueError, match=named):
        call()


def test_unfold_free_against_the_definition():
    torch.manual_seed(0)
    x, w = torch.randn(2, 2, 5, 6, dtype=F64), torch.randn(4, 2, 3, 3, dtype=F64)
    patches = F.unfold(x, 3, stride=2, padding=1).transpose(1, 2).flatten(0, 1)
    a, r = (torch.randn(2, 4, 3, 3, dtype=F64) for _ in range(2))
    flat = [t.permute(0, 2, 3, 1).flatten(0, 2) for t in (a, r)]
    expected = by_definition(patches, w.flatten(1), *flat).view_as(w)
    torch.testing.assert_close(unfold_free(x, w, a, r, stride=2, padding=1), expected)
