"""The recipe for small data: known answers of every ingredient, the switched-off recipe bit for bit, the clock."""

from __future__ import annotations

import copy
import time
from dataclasses import replace

import lightning as L
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from leantrain.data import images
from leantrain.techniques.hardware_aware_resnet9 import (
    GhostBatchNorm2d,
    Recipe,
    SmallDataClassifier,
    TimeBudget,
    centralise_gradients,
    displaced,
    meta_gradient,
    mirrored,
    patch_whitening,
    rate_factor,
    sam_gradient,
    sharpness,
)
from leantrain.training import AirbenchNet, ResNet9, frozen_statistics

QUIET = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
IMPROVED = Recipe(whitening=True, celu=0.3, label_smoothing=0.2, weight_decay=5e-4)


def correlated_images(count: int = 40, channels: int = 3, dtype: torch.dtype = torch.float64) -> Tensor:
    noise = torch.randn(count, channels, 12, 12, dtype=dtype, generator=torch.Generator().manual_seed(0))
    smooth = F.avg_pool2d(noise, 3, stride=1)
    return smooth + 0.5 * smooth.mean(1, keepdim=True) + 0.3


def parameter(*values: float) -> nn.Parameter:
    return nn.Parameter(torch.tensor(values, dtype=torch.float64))


def bowl(w: nn.Parameter, *curvatures: float):
    """Clears and fills the gradient of half the quadratic form with a diagonal."""

    def gradient() -> Tensor:
        w.grad = None
        loss = (torch.tensor(curvatures, dtype=w.dtype) * w.square()).sum() / 2
        loss.backward()
        return loss.detach()

    return gradient


# ---------------------------------------------------------------- whitening


def moments_after(filters: Tensor, x: Tensor) -> Tensor:
    y = F.conv2d(x, filters).transpose(0, 1).flatten(1)
    return y @ y.T / (y.shape[1] - 1)


@pytest.mark.parametrize("kernel", [1, 2, 3])
def test_whitened_patches_are_uncorrelated_and_of_unit_power(kernel: int) -> None:
    x = correlated_images()
    filters = patch_whitening(x, kernel=kernel, eps=0.0)
    assert filters.shape == (3 * kernel**2, 3, kernel, kernel)
    torch.testing.assert_close(moments_after(filters, x), torch.eye(len(filters), dtype=x.dtype), atol=1e-6, rtol=0)


def test_eps_damps_weak_directions_and_filters_fall_in_power() -> None:
    x = correlated_images(600)  # more than one chunk
    power = moments_after(patch_whitening(x, eps=1e-2), x)
    patches = F.unfold(x, 3).transpose(1, 2).reshape(-1, 27)
    eigenvalues = torch.linalg.eigvalsh(patches.T @ patches / (len(patches) - 1)).flip(0)
    torch.testing.assert_close(power, torch.diag(eigenvalues / (eigenvalues + 1e-2)), atol=1e-7, rtol=0)


def test_filters_have_one_sign() -> None:
    filters = patch_whitening(correlated_images(dtype=torch.float32)).flatten(1)
    assert filters.dtype == torch.float32
    assert (filters.gather(1, filters.abs().argmax(1, keepdim=True)) > 0).all()


@pytest.mark.parametrize(
    ("x", "options", "named"),
    [
        (torch.zeros(1, 3, 5, 5), {}, "9 patches are fewer than the 27"),
        (torch.zeros(3, 5, 5), {}, "shape"),
        (torch.zeros(9, 3, 2, 5), {}, "3x3"),
        (torch.zeros(9, 3, 5, 5), {"kernel": 0}, "0x0"),
        (torch.zeros(9, 3, 5, 5), {"eps": -1.0}, "eps"),
        (torch.ones(9, 3, 5, 5), {"eps": 0.0}, "empty"),
    ],
)
def test_bad_patches_are_named(x: Tensor, options: dict, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        patch_whitening(x, **options)


# ---------------------------------------------------------------- units, targets, gradients


def test_label_smoothing_at_a_known_point() -> None:
    logits, target = torch.tensor([[2.0, 0.0, -1.0, 0.5]], dtype=torch.float64), torch.tensor([0])
    log_p = logits.log_softmax(1)
    by_hand = -(0.8 * log_p[0, 0] + 0.2 * log_p.mean())
    assert by_hand.item() == pytest.approx(0.667349582390, abs=1e-12)
    assert F.cross_entropy(logits, target, label_smoothing=0.2).item() == pytest.approx(by_hand.item(), abs=1e-15)
    assert torch.equal(F.cross_entropy(logits, target, label_smoothing=0.0), F.cross_entropy(logits, target))


def test_celu_at_known_points() -> None:
    net = IMPROVED.network(4)
    unit = next(m for m in net.modules() if isinstance(m, nn.CELU))
    values = unit(torch.tensor([-1.0, -0.1, 0.5], dtype=torch.float64))
    assert values.tolist() == pytest.approx([-0.289297801996, -0.085040606828, 0.5], abs=1e-12)


def test_centralised_gradients_at_a_known_point() -> None:
    w, bias = nn.Parameter(torch.zeros(2, 3, 2)), nn.Parameter(torch.zeros(3))
    w.grad, bias.grad = torch.arange(12.0).view(2, 3, 2), torch.arange(3.0)
    for _ in range(2):  # the second time changes nothing
        centralise_gradients([w, bias, nn.Parameter(torch.zeros(2, 2))])
        assert torch.equal(w.grad.flatten(1), torch.arange(-2.5, 3.5).expand(2, 6))
    assert torch.equal(bias.grad, torch.arange(3.0))


@given(st.lists(st.integers(1, 4), min_size=2, max_size=4), st.integers(0, 1000))
@settings(max_examples=25, deadline=None)
def test_centralising_is_the_projection_off_the_constants(shape: list[int], seed: int) -> None:
    w = nn.Parameter(torch.zeros(shape, dtype=torch.float64))
    g = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    w.grad = g.clone()
    centralise_gradients([w])
    assert w.grad.flatten(1).sum(1).abs().max() < 1e-12
    removed = (g - w.grad).flatten(1)
    torch.testing.assert_close(removed, removed[:, :1].expand_as(removed), atol=1e-12, rtol=0)


# ---------------------------------------------------------------- SAM


def test_sam_at_known_points() -> None:
    w = parameter(1, 1)
    sgd = torch.optim.SGD([w], lr=0.01)
    expected = [
        (0.989950248140, 0.895024814049),
        (0.979995777916, 0.800552639020),
        (0.970135066201, 0.715534422778),
    ]
    for values in expected:
        sam_gradient(bowl(w, 1, 10), [w], 0.05)
        sgd.step()
        assert w.tolist() == pytest.approx(values, abs=1e-12)


def test_sam_looks_from_the_radius_and_leaves_nothing_behind() -> None:
    v, w, idle = parameter(1.0), parameter(1.0), parameter(3.0)
    seen = []

    def gradient() -> Tensor:
        seen.append((v.item(), w.item(), idle.item()))
        v.grad = w.grad = None
        loss = (v.square().sum() + 10 * w.square().sum()) / 2
        loss.backward()
        return loss.detach()

    loss = sam_gradient(gradient, [v, w, idle], 0.05)
    shift = torch.tensor(seen[1]) - torch.tensor(seen[0])
    assert shift.tolist() == pytest.approx([0.004975185951, 0.049751859510, 0.0], abs=1e-7)
    assert (v.item(), w.item(), idle.item()) == seen[0] == (1.0, 1.0, 3.0)
    assert loss == 5.5
    assert v.grad.item() == pytest.approx(seen[1][0], abs=1e-15)


def test_a_radius_of_zero_is_plain_sgd_to_the_last_bit() -> None:
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 1)), torch.randn(9, 5)
    twin = copy.deepcopy(net)

    def gradient_of(model: nn.Module):
        def gradient() -> Tensor:
            model.zero_grad()
            loss = model(x).square().mean()
            loss.backward()
            return loss.detach()

        return gradient

    for _ in range(3):
        sam_gradient(gradient_of(net), net.parameters(), 0.0)
        gradient_of(twin)()
        for model in (net, twin):
            torch.optim.SGD(model.parameters(), lr=0.1).step()
    assert all(torch.equal(p, q) for p, q in zip(net.parameters(), twin.parameters(), strict=True))


def test_sam_without_a_slope_stays_where_it_is() -> None:
    w = parameter(0, 0)
    sam_gradient(bowl(w, 1, 10), [w], 0.05)
    assert w.grad.tolist() == [0, 0]


def test_sharpness_of_a_bowl_is_its_rise_along_the_slope() -> None:
    """Along g / |g| = (1, 10) / sqrt(101) from (1, 1): rho |g| + rho^2 (1 + 10^3) / (2 * 101)."""
    w = parameter(1, 1)
    expected = 0.05 * 101**0.5 + 0.05**2 * 1001 / 202
    assert sharpness(bowl(w, 1, 10), [w], 0.05) == pytest.approx(expected, abs=1e-12)
    assert w.tolist() == [1, 1]


def test_the_second_pass_sees_the_displaced_weights_under_autocast() -> None:
    """Autocast keeps the half-precision weights of the first pass until it is told not to."""
    torch.manual_seed(0)
    layer, x = nn.Linear(8, 8), torch.randn(4, 8)
    with torch.autocast("cpu", torch.bfloat16):
        before = layer(x)
        with displaced(list(layer.parameters()), [torch.ones_like(p) for p in layer.parameters()]):
            inside = layer(x)
        after = layer(x)
    assert not torch.equal(before, inside)
    assert torch.equal(before, after)


def test_weights_come_back_when_a_pass_fails() -> None:
    w = parameter(1, 2)
    with pytest.raises(RuntimeError, match="inside"), displaced([w], [torch.ones(2)]):
        raise RuntimeError("inside")
    assert w.tolist() == [1, 2]


# ---------------------------------------------------------------- meta-learning


def test_meta_gradient_at_a_known_point() -> None:
    w = parameter(1, 1)
    loss = meta_gradient(bowl(w, 1, 2), bowl(w, 3, 1), [w], alpha=0.1)
    assert w.grad.tolist() == pytest.approx([3.7, 2.8], abs=1e-15)
    assert w.tolist() == [1, 1]
    assert loss == 1.5


def test_the_first_order_differs_from_the_exact_gradient_by_the_curvature() -> None:
    """That of L1(w) + L2(w - alpha grad L1(w)) is (3.43, 2.64) there; the factor 1 - alpha h1 is left out."""
    w, alpha = parameter(1, 1), 0.1
    h1, h2 = torch.tensor([1.0, 2.0]).double(), torch.tensor([3.0, 1.0]).double()
    ahead = w - alpha * h1 * w
    exact = torch.autograd.grad((h1 * w.square()).sum() / 2 + (h2 * ahead.square()).sum() / 2, w)[0]
    assert exact.tolist() == pytest.approx([3.43, 2.64], abs=1e-12)
    meta_gradient(bowl(w, 1, 2), bowl(w, 3, 1), [w], alpha)
    second = w.grad - h1
    torch.testing.assert_close(h1 + (1 - alpha * h1) * second, exact)


def test_beta_of_zero_asks_the_first_batch_only() -> None:
    w = parameter(1, 1)
    meta_gradient(bowl(w, 1, 2), lambda: pytest.fail("not needed"), [w], alpha=0.1, beta=0.0)
    assert w.grad.tolist() == [1, 2]


# ---------------------------------------------------------------- schedule, average, mirror


def test_the_schedule_of_the_entry_at_known_epochs() -> None:
    found = [rate_factor(epoch / 200) for epoch in (0, 10, 40, 100, 198, 200)]
    assert found == pytest.approx([0, 0.25, 1, 0.65823, 0.1, 0.1], abs=5e-6)


@given(st.floats(0, 1), st.floats(0, 1), st.floats(0.05, 0.8), st.floats(0, 0.1))
def test_the_schedule_stays_between_its_ends_and_the_peak(start: float, floor: float, peak: float, hold: float) -> None:
    options = {"start": start, "peak": peak, "floor": floor, "hold": hold}
    values = [rate_factor(i / 50, **options) for i in range(51)]
    assert min(start, floor) - 1e-12 <= min(values) <= max(values) <= 1
    assert values[0] == pytest.approx(start)
    assert values[-1] == pytest.approx(floor)
    assert rate_factor(peak, **options) == 1


def test_a_mirror_symmetric_image_needs_one_view() -> None:
    torch.manual_seed(0)
    net = ResNet9(4).eval()
    half = torch.randn(2, 3, 8, 4)
    symmetric = torch.cat([half, half.flip(-1)], dim=-1)
    with torch.no_grad():
        assert torch.equal(mirrored(net, symmetric), net(symmetric))
        x = torch.randn(2, 3, 8, 8)
        torch.testing.assert_close(mirrored(net, x), mirrored(net, x.flip(-1)))
        assert not torch.allclose(mirrored(net, x), net(x))


# ---------------------------------------------------------------- ghost batch normalisation


def test_one_ghost_is_batch_normalisation_to_the_last_bit() -> None:
    x = torch.randn(6, 3, 4, 4)
    ghost, plain = GhostBatchNorm2d(3, 1), nn.BatchNorm2d(3)
    assert torch.equal(ghost(x), plain(x))
    assert torch.equal(ghost.running_var, plain.running_var)


def test_ghosts_are_normalised_apart_and_recorded_together() -> None:
    x = torch.randn(6, 3, 4, 4)
    ghost, parts = GhostBatchNorm2d(3, 2), [nn.BatchNorm2d(3), nn.BatchNorm2d(3)]
    y = ghost(x)
    for part, norm in enumerate(parts):
        torch.testing.assert_close(y[part::2], norm(x[part::2]))
    for name in ("running_mean", "running_var"):
        both = torch.stack([getattr(norm, name) for norm in parts])
        torch.testing.assert_close(getattr(ghost, name), both.mean(0))
    assert ghost.num_batches_tracked == 1
    plain = nn.BatchNorm2d(3).eval()
    plain.load_state_dict(ghost.state_dict())
    assert torch.equal(ghost.eval()(x), plain(x))


def test_ghosts_record_nothing_while_statistics_are_frozen() -> None:
    x, ghost = torch.randn(6, 3, 4, 4), GhostBatchNorm2d(3, 2)
    with frozen_statistics(ghost):
        y = ghost(x)
    assert ghost.num_batches_tracked == 0
    assert torch.equal(ghost.running_mean, torch.zeros(3))
    assert torch.equal(y, ghost(x))


def test_ghosts_fix_the_scale_and_leave_the_known_number_of_parameters() -> None:
    with torch.device("meta"):
        net = replace(IMPROVED, ghosts=16).network(64)
    assert sum(p.numel() for p in net.parameters() if p.requires_grad) == 6_570_880


# ---------------------------------------------------------------- the whole recipe


def train(classifier: SmallDataClassifier, *, epochs: int | None = 1, batches: int = 4, seed: int = 0, **options):
    data = images("digits", batch_size=16, train_size=16 * batches, val_size=40)
    data.set_seed(seed)
    trainer = L.Trainer(max_epochs=epochs or -1, accelerator="cpu", num_sanity_val_steps=0, **QUIET, **options)
    trainer.fit(classifier, datamodule=data)
    return trainer


def classifier(recipe: Recipe, **options) -> SmallDataClassifier:
    torch.manual_seed(0)
    return SmallDataClassifier(recipe.network(4, in_chans=1), recipe, **options)


def weights(module: SmallDataClassifier) -> Tensor:
    return torch.cat([t.detach().flatten().double() for t in module.model.state_dict().values()])


def digits_pixels(count: int = 64) -> Tensor:
    data = images("digits", batch_size=count, train_size=count)
    return next(iter(data.train_dataloader()))[0]


def test_switched_off_it_is_nesterov_sgd_to_the_last_bit() -> None:
    module = classifier(Recipe())
    net = copy.deepcopy(module.model).train()
    train(module, epochs=2)
    data = images("digits", batch_size=16, train_size=64, val_size=40)
    data.set_seed(0)
    sgd = torch.optim.SGD(net.parameters(), lr=0.25, momentum=0.9, nesterov=True)
    step = 0
    for epoch in range(2):
        data.set_epoch(epoch)
        for x, y in data.train_dataloader():
            sgd.param_groups[0]["lr"] = 0.25 * rate_factor((step + 0.5) / 8, floor=0.0, hold=0.0)
            sgd.zero_grad()
            F.cross_entropy(net(x), y).backward()
            sgd.step()
            step += 1
    twin = classifier(Recipe())
    twin.model = net
    assert torch.equal(weights(module), weights(twin))


SWITCHES = {
    "whitening": {"whitening": True},
    "celu": {"celu": 0.3},
    "smoothing": {"label_smoothing": 0.2},
    "decay": {"weight_decay": 5e-2},
    "centralise": {"centralise": True},
    "sam": {"rho": 0.05},
    "lazy sam": {"rho": 0.05, "sam_every": 3},
    "meta": {"meta": 1.0},
    "ghosts": {"ghosts": 4},
    "boost": {"bias_boost": 64.0},
    "lookahead": {"lookahead": True},
}


def test_every_switch_acts() -> None:
    def trained(recipe: Recipe) -> Tensor:
        module = classifier(recipe, images=digits_pixels() if recipe.whitening else None)
        train(module, batches=6)
        return module.model.eval()(digits_pixels()).detach()

    outputs = {name: trained(replace(Recipe(), **switch)) for name, switch in {"none": {}, **SWITCHES}.items()}
    names = list(outputs)
    for i, one in enumerate(names):
        for other in names[i + 1 :]:
            assert not torch.equal(outputs[one], outputs[other]), f"{one} trains as {other} does"


def test_sam_in_training_is_the_plain_loop_and_records_each_batch_once() -> None:
    recipe = Recipe(rho=0.05, centralise=True)
    module = classifier(recipe)
    net = copy.deepcopy(module.model).train()
    train(module, batches=3)
    data = images("digits", batch_size=16, train_size=48, val_size=40)
    sgd = torch.optim.SGD(net.parameters(), lr=0.25, momentum=0.9, nesterov=True)
    for step, (x, y) in enumerate(data.train_dataloader()):
        sgd.param_groups[0]["lr"] = 0.25 * recipe.factor((step + 0.5) / 3)
        slopes = torch.autograd.grad(F.cross_entropy(net(x), y), list(net.parameters()))
        norm = torch.cat([g.flatten() for g in slopes]).norm()
        away = copy.deepcopy(net)
        for p, g in zip(away.parameters(), slopes, strict=True):
            p.data += 0.05 * g / norm
        slopes = torch.autograd.grad(F.cross_entropy(away(x), y), list(away.parameters()))
        for p, g in zip(net.parameters(), slopes, strict=True):
            p.grad = g - g.flatten(1).mean(1).view(-1, *[1] * (g.ndim - 1)) if g.ndim > 1 else g
        sgd.step()
    expected = torch.cat([t.flatten().double() for t in net.state_dict().values()]).detach()
    torch.testing.assert_close(weights(module), expected, atol=2e-4, rtol=1e-4)
    tracked = [m.num_batches_tracked.item() for m in module.model.modules() if isinstance(m, nn.BatchNorm2d)]
    assert set(tracked) == {3}


def test_the_whitening_layer_is_filled_frozen_and_not_in_the_optimiser() -> None:
    pixels = digits_pixels()
    module = classifier(IMPROVED, images=pixels)
    trainer = train(module)
    assert torch.equal(module.model.whiten.weight, patch_whitening(pixels))
    assert not module.model.whiten.weight.requires_grad
    (optimizer,) = trainer.optimizers
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert id(module.model.whiten.weight) not in held
    assert len(held) == sum(p.requires_grad for p in module.model.parameters())


def test_filters_and_their_negatives_fill_a_layer_of_twice_as_many() -> None:
    pixels = torch.randn(8, 3, 9, 9)
    module = SmallDataClassifier(AirbenchNet(4), Recipe(), images=pixels, eps=5e-4)
    module.on_fit_start()
    filters = module.model.whiten.weight
    assert torch.equal(filters[:12], patch_whitening(pixels, kernel=2, eps=5e-4))
    assert torch.equal(filters[12:], -filters[:12])


@pytest.mark.parametrize("decay", [0.0, 1.0])
def test_the_average_follows_or_stays(decay: float) -> None:
    module = classifier(Recipe(average=decay, average_every=1))
    first = []

    class AfterOne(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, *_) -> None:
            first or first.append(weights(pl_module))

    train(module, callbacks=[AfterOne()])
    average = torch.cat([t.flatten().double() for t in module.averaged.module.state_dict().values()])
    floats = torch.cat([torch.full((t.numel(),), t.is_floating_point()) for t in module.model.state_dict().values()])
    wanted = weights(module) if decay == 0 else first[0]
    assert torch.equal(average[floats], wanted[floats])
    assert not torch.equal(weights(module), first[0])


def test_accuracy_counts_hits_and_knows_its_averages() -> None:
    module = classifier(Recipe(average=0.9))
    x = digits_pixels()
    y = module.model.eval()(x).argmax(1)
    assert module.accuracy([(x, y)]) == 100
    wrong = torch.where(torch.arange(64) < 16, (y + 1) % 10, y)
    assert module.accuracy([(x[:32], wrong[:32]), (x[32:], wrong[32:])]) == 75
    assert module.accuracy([(x, mirrored(module.model, x).argmax(1))], mirror=True) == 100
    assert module.accuracy([(x, y)], averaged=True) == 100
    assert not module.model.training
    with pytest.raises(ValueError, match="no images"):
        module.accuracy([])
    with pytest.raises(ValueError, match="no running average"):
        classifier(Recipe()).accuracy([(x, y)], averaged=True)


def test_lookahead_ends_at_its_slow_weights() -> None:
    module = classifier(Recipe(lookahead=True))
    trainer = train(module, batches=10)
    assert trainer.global_step == 10
    slow = torch.cat([t.flatten().double() for t in module._slow])
    floats = [t for t in module.model.state_dict().values() if t.is_floating_point()]
    assert torch.equal(torch.cat([t.flatten().double() for t in floats]), slow)


# ---------------------------------------------------------------- the clock


class Clock:
    """A clock that a training step, and only that, moves on."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class Slow(SmallDataClassifier):
    """Each batch takes a second, each validation a hundred."""

    def __init__(self, clock: Clock, *args, **options) -> None:
        super().__init__(*args, **options)
        self.clock, self.states, self.rates = clock, [], []

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.rates.append(self.trainer.optimizers[0].param_groups[0]["lr"])
        self.states.append(weights(self))
        self.clock.now += 1.0
        return loss

    def validation_step(self, batch, batch_idx) -> None:
        super().validation_step(batch, batch_idx)
        self.clock.now += 100.0


def test_training_stops_within_a_batch_of_the_limit_and_keeps_the_last_state() -> None:
    clock = Clock()
    budget = TimeBudget(10.5, clock=clock)
    torch.manual_seed(0)
    module = Slow(clock, Recipe().network(4, in_chans=1), Recipe(), budget=budget)
    trainer = train(module, epochs=None, batches=4)
    assert trainer.global_step == 10, "an eleventh second would not have fitted"
    assert 9.5 <= budget.elapsed <= 10.5
    assert torch.equal(weights(module), module.states[-1])
    unseen = images("digits", batch_size=16, train_size=64, val_size=40).val_dataloader()
    shown = trainer.callback_metrics["val_accuracy"].item()
    assert shown == pytest.approx(module.accuracy(unseen)), "the last state was validated"
    expected = [0.25 * rate_factor(t / 10.5, floor=0.0, hold=0.0) for t in range(10)]
    assert module.rates == pytest.approx(expected), "the rate follows the clock"


def test_the_real_clock_is_obeyed_to_a_batch() -> None:
    durations = []

    class Watch(L.Callback):
        def on_train_batch_start(self, *_) -> None:
            self.since = time.perf_counter()

        def on_train_batch_end(self, *_) -> None:
            durations.append(time.perf_counter() - self.since)

    budget = TimeBudget(1.5)
    began = time.perf_counter()
    trainer = train(classifier(Recipe(), budget=budget), epochs=None, batches=60, callbacks=[Watch()])
    assert budget.elapsed <= time.perf_counter() - began
    assert trainer.global_step == len(durations) > 3
    # What lies between batches (loading, hooks) is granted a tenth of a second and as much as the batches themselves.
    slack = 0.1 + 2 * max(durations)
    assert 1.5 - slack <= budget.elapsed <= 1.5 + slack


def test_one_stall_does_not_end_a_run_early() -> None:
    clock = Clock()

    class Stalls(Slow):
        def training_step(self, batch, batch_idx):
            clock.now += 20.0 if self.global_step == 2 else 0.0
            return super().training_step(batch, batch_idx)

    torch.manual_seed(0)
    module = Stalls(clock, Recipe().network(4, in_chans=1), Recipe(), budget=TimeBudget(60.5, clock=clock))
    assert train(module, epochs=None, batches=4).global_step == 40
    assert module.budget.elapsed == 60, "the third step took 21 seconds, but that was long ago"


def test_a_validation_after_the_run_leaves_its_time_alone() -> None:
    clock = Clock()
    torch.manual_seed(0)
    module = Slow(clock, Recipe().network(4, in_chans=1), Recipe(), budget=TimeBudget(10.5, clock=clock))
    trainer = train(module, epochs=1, batches=4)
    assert module.budget.elapsed == 4
    unseen = images("digits", batch_size=16, train_size=64, val_size=40)
    trainer.validate(module, datamodule=unseen, verbose=False)
    clock.now += 1000
    assert module.budget.elapsed == 4


def test_epochs_end_a_run_before_its_budget() -> None:
    clock = Clock()
    torch.manual_seed(0)
    module = Slow(clock, Recipe().network(4, in_chans=1), Recipe(), budget=TimeBudget(1000.0, clock=clock))
    assert train(module, epochs=2, batches=4).global_step == 8
    assert module.budget.elapsed == 8
    assert module.budget.progress == 0.008


def test_a_run_needs_an_end() -> None:
    with pytest.raises(ValueError, match="max_epochs, or a budget"):
        train(classifier(Recipe()), epochs=None)


# ---------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"label_smoothing": 1.0}, "label_smoothing"),
        ({"label_smoothing": -0.1}, "label_smoothing"),
        ({"weight_decay": -1.0}, "weight_decay"),
        ({"rho": -0.1}, "rho"),
        ({"rho": float("nan")}, "rho"),
        ({"meta": -1.0}, "meta"),
        ({"sam_every": 0}, "sam_every"),
        ({"average": 1.5}, "average"),
        ({"average_every": 0}, "average_every"),
        ({"ghosts": 0}, "ghosts"),
        ({"celu": 0.0}, "celu"),
        ({"rate": 0.0}, "rate"),
        ({"bias_boost": 0.0}, "bias_boost"),
        ({"momentum": 1.0}, "momentum"),
        ({"peak": 0.0}, "peak"),
        ({"peak": 0.6, "hold": 0.4}, "peak"),
        ({"floor": 2.0}, "floor"),
    ],
)
def test_bad_recipes_are_named(options: dict, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        Recipe(**options)


def test_other_bad_input_is_named() -> None:
    w = parameter(1, 1)
    with pytest.raises(ValueError, match="rho"):
        sam_gradient(bowl(w, 1, 1), [w], -0.05)
    with pytest.raises(ValueError, match="no parameter got a gradient"):
        sam_gradient(lambda: torch.zeros(()), [parameter(1)], 0.05)
    for options in ({"alpha": -1.0}, {"alpha": 0.1, "beta": float("inf")}):
        with pytest.raises(ValueError, match=r"alpha|beta"):
            meta_gradient(bowl(w, 1, 1), bowl(w, 1, 1), [w], **options)
    with pytest.raises(ValueError, match="0 to 1"):
        rate_factor(1.1)
    with pytest.raises(ValueError, match="6 cannot be split into 4"):
        GhostBatchNorm2d(3, 4)(torch.zeros(6, 3, 2, 2))
    with pytest.raises(ValueError, match="splits"):
        GhostBatchNorm2d(3, 0)
    with pytest.raises(ValueError, match="positive number of seconds"):
        TimeBudget(0.0)
    with pytest.raises(ValueError, match="whiten"):
        SmallDataClassifier(Recipe().network(4), Recipe(), images=torch.zeros(9, 3, 8, 8))
    with pytest.raises(ValueError, match="must be 1 to"):
        images("digits", train_size=5000)


def test_a_batch_of_one_cannot_be_halved() -> None:
    module = classifier(Recipe(meta=1.0))
    data = DataLoader(TensorDataset(digits_pixels(2), torch.zeros(2, dtype=torch.int64)), batch_size=1)
    with pytest.raises(ValueError, match="halves the batch"):
        L.Trainer(max_epochs=1, accelerator="cpu", **QUIET).fit(module, data)
