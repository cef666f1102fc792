"""Adversarial training: bounds, known worst cases, an independent reference, the generator's gradient, bad input."""

from __future__ import annotations

import copy
import math
from functools import cache, partial

import lightning as L
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from leantrain.measure.cost import count_macs, count_parameters
from leantrain.techniques import fgsm_sdi as sdi


def network(seed=0, classes=4):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(2, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(6 * 16, classes)
    )


def pictures(count=32, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(count, 2, 4, 4, generator=generator), torch.randint(0, 4, (count,), generator=generator)


def trained():
    """A network that has learned something: the class is the quadrant with the most light."""
    model, x, y = _learn()
    return copy.deepcopy(model), x, y


@cache
def _learn():
    model = network()
    x = torch.rand(256, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    y = F.avg_pool2d(x.mean(1, keepdim=True), 2).flatten(1).argmax(1)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(80):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    model.zero_grad()
    return model.eval(), x, y


# ------------------------------------------------------------------------------------------------------------ losses


@pytest.mark.parametrize("truth", [0.3, 0.5, 1.0])
def test_the_smoothed_loss_is_the_one_against_the_soft_target(truth):
    torch.manual_seed(0)
    logits, y = torch.randn(7, 10, dtype=torch.float64), torch.randint(0, 10, (7,))
    target = torch.full((7, 10), (1 - truth) / 9, dtype=torch.float64)
    target[range(7), y] = truth
    assert torch.allclose(target.sum(1), torch.ones(7, dtype=torch.float64))
    expected = -(target * logits.log_softmax(1)).sum(1).mean()
    torch.testing.assert_close(sdi.smoothed_cross_entropy(logits, y, truth), expected)
    if truth == 1.0:
        torch.testing.assert_close(expected, F.cross_entropy(logits, y))
    if truth == 0.5:
        torch.testing.assert_close(expected, F.cross_entropy(logits, y, label_smoothing=0.5 * 10 / 9))


def test_the_margin_loss():
    logits = torch.tensor([[3.0, 1.0, 2.5], [0.0, 4.0, 1.0]])
    assert sdi.cw_loss(logits, torch.tensor([0, 2])).item() == pytest.approx((2.5 - 3.0) + (4.0 - 1.0))


# ----------------------------------------------------------------------------------------------------------- attacks


@settings(max_examples=25, deadline=None)
@given(epsilon=st.floats(0, 0.4), alpha=st.floats(0, 0.6), seed=st.integers(0, 20))
def test_no_perturbation_leaves_the_cube(epsilon, alpha, seed):
    model, (x, y) = network(seed).eval(), pictures(8, seed)
    torch.manual_seed(seed)
    for start in (0.0, sdi.random_start(x, epsilon)):
        delta = sdi.one_step(model, x, y, start, epsilon=epsilon, alpha=alpha)
        assert float(delta.abs().max()) <= epsilon + 1e-7
    delta = sdi.pgd(model, x, y, epsilon=epsilon, steps=3, step_size=alpha)
    assert float(delta.abs().max()) <= epsilon + 1e-7
    assert float((x + delta).min()) >= 0
    assert float((x + delta).max()) <= 1


def test_one_step_is_the_worst_case_of_a_linear_classifier():
    torch.manual_seed(0)
    linear = nn.Sequential(nn.Flatten(), nn.Linear(32, 2)).double()
    x, y = pictures(16)[0].double(), torch.arange(16) % 2
    epsilon = 0.07
    delta = sdi.one_step(linear, x, y, 0.0, epsilon=epsilon, alpha=epsilon)
    rise = epsilon * (linear[1].weight[1] - linear[1].weight[0]).abs().sum()
    gap = linear(x + delta) - linear(x)
    wrong, right = gap.gather(1, 1 - y[:, None]), gap.gather(1, y[:, None])
    torch.testing.assert_close((wrong - right).squeeze(1), rise.expand(16))
    # Many steps cannot find more, nor can a start elsewhere.
    for start in ("zero", "random"):
        how = {"valid": False, "stop_at_success": False, "start": start}
        many = sdi.pgd(linear, x, y, epsilon=epsilon, steps=40, step_size=0.01, **how)
        torch.testing.assert_close(many, delta)


def test_attacks_leave_the_model_and_its_gradients_alone():
    model, x, y = trained()
    before = copy.deepcopy(model.state_dict())
    sdi.pgd(model, x, y, epsilon=0.1, restarts=2)
    sdi.one_step(model, x, y, 0.0, epsilon=0.1, alpha=0.1)
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(a, b) for a, b in zip(before.values(), model.state_dict().values(), strict=True))
    assert not x.requires_grad


def test_attacks_with_and_without_strength():
    model, x, y = trained()
    clean = sdi.adversarial_accuracy(model, x, y)
    assert clean > 95
    assert sdi.adversarial_accuracy(model, x, y, sdi.pgd(model, x, y, epsilon=0.0)) == clean
    torch.manual_seed(0)
    noise = sdi.pgd(model, x, y, epsilon=0.1, steps=0)
    torch.manual_seed(0)
    assert torch.equal(noise, (x + sdi.random_start(x, 0.1)).clamp(0, 1) - x)

    def under(**how):
        return sdi.adversarial_accuracy(model, x, y, sdi.pgd(model, x, y, **how))

    short = under(epsilon=0.1, steps=1, step_size=0.1, start="zero")
    many = under(epsilon=0.1, steps=20, step_size=0.02)
    margin = under(epsilon=0.1, steps=20, step_size=0.02, loss=sdi.cw_loss)
    assert many <= short + 1 < clean
    assert margin == pytest.approx(many, abs=5)
    # No masked gradients: more steps find more, a larger cube leaves nothing, and corners at random find less.
    assert under(epsilon=0.5, steps=40, step_size=0.05) == 0
    corners = sdi.corner_search(model, x, y, epsilon=0.1, queries=50)
    assert 100 * float(corners.float().mean()) > many


def test_restarts_keep_the_strongest_and_successes_are_not_moved():
    model, x, y = trained()
    once = [sdi.adversarial_accuracy(model, x, y, sdi.pgd(model, x, y, epsilon=0.08, steps=2)) for _ in range(3)]
    torch.manual_seed(0)
    best = sdi.pgd(model, x, y, epsilon=0.08, steps=2, restarts=5, stop_at_success=False)
    assert sdi.adversarial_accuracy(model, x, y, best) <= min(once)
    wrong = (y + 1) % 4  # nearly all misclassified, so nearly nothing moves
    missed = model(x).argmax(1) != wrong
    moved = sdi.pgd(model, x, wrong, epsilon=0.1, steps=5, start="zero")
    assert not moved[missed].any()
    assert moved[~missed].any() or missed.all()


@pytest.mark.parametrize("steps", [1, 10])
def test_many_steps_agree_with_the_adversarial_robustness_toolbox(steps):
    from art.attacks.evasion import ProjectedGradientDescent
    from art.estimators.classification import PyTorchClassifier

    model, x, y = trained()
    wrapped = PyTorchClassifier(model, nn.CrossEntropyLoss(), (2, 4, 4), 4, clip_values=(0.0, 1.0))
    theirs = ProjectedGradientDescent(
        wrapped, norm=np.inf, eps=0.1, eps_step=0.025, max_iter=steps, num_random_init=0, batch_size=256, verbose=False
    ).generate(x.numpy(), y.numpy())
    ours = x + sdi.pgd(model, x, y, epsilon=0.1, steps=steps, step_size=0.025, start="zero", stop_at_success=False)
    # Signs of gradients near zero may differ by rounding.
    assert ((ours - torch.from_numpy(theirs)).abs() < 1e-6).double().mean() > 0.999


def test_strong_attacks_find_what_ours_finds():
    small, x, y = trained()
    # Squares need larger images: every pixel four times.
    model, x, y = nn.Sequential(nn.AvgPool2d(2), small).eval(), F.interpolate(x[:64], scale_factor=2), y[:64]
    ours = sdi.adversarial_accuracy(model, x, y, sdi.pgd(model, x, y, epsilon=0.1, steps=40, step_size=0.01))
    state = np.random.get_state()[1].copy()  # noqa: NPY002
    found = sdi.strong_survivors(model, x, y, epsilon=0.1, steps=20, queries=200)
    assert np.array_equal(state, np.random.get_state()[1])  # noqa: NPY002
    assert list(found) == ["apgd-ce", "apgd-dlr", "square"]
    share = {name: 100 * float(alive.float().mean()) for name, alive in found.items()}
    together = 100 * float(torch.stack(list(found.values())).all(0).float().mean())
    assert share["apgd-ce"] == pytest.approx(ours, abs=5)
    assert share["square"] >= together
    assert not model.training


def test_collapse_is_a_gap_of_more_than_fifteen_points():
    assert not sdi.collapsed(40.0, 25.0)
    assert sdi.collapsed(40.1, 25.0)
    assert not sdi.collapsed(20.0, 25.0)


# --------------------------------------------------------------------------------------------------------- generator


def test_the_generator_has_the_known_size_and_stays_inside():
    generator = sdi.StartGenerator()
    assert count_parameters(generator) == 79_173
    with torch.device("meta"):
        macs = count_macs(sdi.StartGenerator(), torch.empty(1, 3, 32, 32), torch.empty(1, 3, 32, 32))
    assert macs / 1e6 == pytest.approx(80.8, abs=0.1)
    x = torch.rand(4, 3, 8, 8)
    start = generator.start(x, torch.randint(-1, 2, x.shape).float(), epsilon=0.1).detach()
    assert start.shape == x.shape
    assert float(start.abs().max()) < 0.1
    assert generator.double().start(x.double(), x.double(), epsilon=0.1).dtype is torch.float64


def test_a_generator_that_says_nothing_leaves_fgsm_and_no_step_leaves_the_start():
    model, (x, y) = network().eval(), pictures()
    generator = sdi.StartGenerator(2, 4).eval()
    signs = sdi.signed_gradient(model, x, y)
    start = generator.start(x, signs, epsilon=0.1)
    assert torch.equal(sdi.one_step(model, x, y, start, epsilon=0.1, alpha=0.0), start)
    with torch.no_grad():
        generator.last[1].weight.zero_()
        generator.last[1].bias.zero_()
    silent = generator.start(x, signs, epsilon=0.1)
    assert not silent.any()
    for alpha in (0.05, 0.1):
        with_it = sdi.one_step(model, x, y, silent, epsilon=0.1, alpha=alpha)
        assert torch.equal(with_it, alpha * signs)


def test_gradient_reaches_the_start_only_where_it_disagrees_with_the_sign():
    model, (x, y) = network().eval(), pictures()
    start = (0.09 * (2 * torch.rand(x.shape, generator=torch.Generator().manual_seed(0)) - 1)).requires_grad_()
    delta = sdi.one_step(model, x, y, start, epsilon=0.1, alpha=0.1)
    (gradient,) = torch.autograd.grad(delta.sum(), start)
    sign = sdi.signed_gradient(model, x + start.detach(), y)
    assert torch.equal(gradient != 0, start.detach() * sign < 0)

    class Told(sdi.StartGenerator):
        """Says what it is told, but has parameters."""

        def forward(self, images, signs):
            return 0.0 * super().forward(images, signs) + self.told * self.gain

    generator = Told(2, 4)
    generator.gain = nn.Parameter(torch.ones(()))
    for told, reached in ((1.0, False), (-1.0, True)):
        # The sign at the start itself, which hardly differs from that at the image for so small a start.
        generator.told = told * 1e-6 * sdi.signed_gradient(model, x, y)
        sdi.generator_gradients(model, generator, x, y, sdi.signed_gradient(model, x, y), epsilon=0.1, alpha=0.1)
        assert (abs(float(generator.gain.grad)) > 0) == reached
    assert all(p.grad is None for p in model.parameters())


def test_the_generator_climbs_the_loss_of_a_fixed_classifier():
    model, x, y = trained()
    torch.manual_seed(0)
    generator = sdi.StartGenerator(2, 8).train()
    optimizer = torch.optim.Adam(generator.parameters(), lr=3e-3)
    signs = sdi.signed_gradient(model, x, y)
    losses = []
    for _ in range(40):
        losses.append(sdi.generator_gradients(model, generator, x, y, signs, epsilon=0.15, alpha=0.15))
        optimizer.step()
    assert np.mean(losses[-5:]) > np.mean(losses[:5])


# ---------------------------------------------------------------------------------------------------------- training


def classifier(start, *, epsilon=0.1, seed=0, **options):
    torch.manual_seed(seed)
    generator = sdi.StartGenerator(2, 4) if start == "learned" else None
    optimizer = partial(torch.optim.SGD, lr=0.05, momentum=0.9)
    model = sdi.PixelModel(network(seed), (0.5, 0.4), (0.25, 0.2))
    return sdi.AdversarialClassifier(model, optimizer, start=start, epsilon=epsilon, generator=generator, **options)


def fit(module, epochs=2, batch=8, limit=1.0):
    x, y = pictures(36)
    x = (x - torch.tensor([0.5, 0.4]).view(1, 2, 1, 1)) / torch.tensor([0.25, 0.2]).view(1, 2, 1, 1)
    data = DataLoader(TensorDataset(x, y), batch_size=batch)
    quiet = dict.fromkeys(("logger", "enable_progress_bar", "enable_model_summary", "enable_checkpointing"), False)
    torch.manual_seed(0)
    trainer = L.Trainer(max_epochs=epochs, accelerator="cpu", deterministic=True, num_sanity_val_steps=0, **quiet)
    trainer.fit(module, data, data)
    return trainer


def weights(module):
    return [v.clone() for v in module.model.state_dict().values()]


@pytest.mark.parametrize("start", ["zero", "random", "learned", "many"])
def test_a_cube_of_size_zero_is_plain_training_to_the_bit(start):
    plain, attacked = classifier("none"), classifier(start, epsilon=0.0, alpha=0.1, every=2)
    fit(plain)
    fit(attacked)
    for a, b in zip(weights(plain), weights(attacked), strict=True):
        assert torch.equal(a, b)


def test_the_attack_changes_what_is_learned_and_statistics_can_be_recorded():
    runs = {start: classifier(start) for start in ("none", "zero", "random", "learned", "many")}
    for module in runs.values():
        fit(module, epochs=1)
    first = {name: weights(module)[0] for name, module in runs.items()}
    names = list(first)
    assert not any(torch.equal(first[a], first[b]) for i, a in enumerate(names) for b in names[:i])
    tracked = {}
    for every_pass in (False, True):
        module = classifier("zero", all_statistics=every_pass)
        fit(module, epochs=1)
        tracked[every_pass] = int(module.model.network[1].num_batches_tracked)
    assert tracked == {False: 5, True: 10}


@pytest.mark.parametrize(("every", "expected"), [(1, 5), (2, 3), (20, 1)])
def test_the_generator_is_updated_every_so_many_batches(every, expected):
    module = classifier("learned", every=every)
    trainer = fit(module, epochs=1)
    assert module.generator_updates == expected == math.ceil(5 / every)
    assert trainer.global_step == 5 + expected
    assert not module.generator.training


def test_the_step_in_training_is_the_one_that_the_paper_describes():
    """One batch by hand: the generator is updated first, and the classifier learns from the new start."""
    module = classifier("learned", every=1, truth=0.5, all_statistics=True, warmup=0.0, drops=())
    model, generator = copy.deepcopy(module.model).train(), copy.deepcopy(module.generator).train()
    fit(module, epochs=1, batch=36)
    x, y = pictures(36)
    x = model.pixels((x - model.mean) / model.std)
    target = torch.full((36, 4), 0.5 / 3)
    target[range(36), y] = 0.5

    def loss(z):
        return -(target * model(z).log_softmax(1)).sum(1).mean()

    def sign_at(z):
        leaf = z.detach().requires_grad_()
        return torch.autograd.grad(F.cross_entropy(model(leaf), y), leaf)[0].sign()

    signs = sign_at(x)
    z = 0.1 * torch.tanh(generator(x, signs))
    adversary = torch.optim.Adam(generator.parameters(), lr=1e-3, weight_decay=5e-4)
    up = -loss(x + (z + 0.1 * sign_at(x + z)).clamp(-0.1, 0.1))
    gradients = torch.autograd.grad(up, list(generator.parameters()))
    for parameter, gradient in zip(generator.parameters(), gradients, strict=True):
        parameter.grad = gradient
    adversary.step()
    for a, b in zip(module.generator.parameters(), generator.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)
    generator.eval()
    z = 0.1 * torch.tanh(generator(x, signs)).detach()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    loss(x + (z + 0.1 * sign_at(x + z)).clamp(-0.1, 0.1)).backward()
    optimizer.step()
    for a, b in zip(module.model.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)


def test_validation_attacks_every_few_epochs_and_after_the_last():
    class Keep(L.Callback):
        seen = []

        def on_train_epoch_end(self, trainer, pl_module):
            self.seen.append({name: float(v) for name, v in trainer.callback_metrics.items()})

    module, keep = classifier("zero", attack_every=2, steps=3), Keep()
    module.configure_callbacks = lambda: [keep]
    fit(module, epochs=5)
    assert [math.isnan(row["val_pgd"]) for row in keep.seen] == [True, False, True, False, False]
    assert all(math.isnan(row["val_pgd"]) == math.isnan(row["val_fgsm"]) for row in keep.seen)
    last = keep.seen[-1]
    module.eval()
    x, y = pictures(36)
    assert last["val_accuracy"] == pytest.approx(sdi.adversarial_accuracy(module.model, x, y), abs=1e-3)
    delta = sdi.one_step(module.model, x, y, 0.0, epsilon=0.1, alpha=0.1)
    stepped = sdi.adversarial_accuracy(module.model, x, y, (x + delta).clamp(0, 1) - x)
    assert last["val_fgsm"] <= last["val_accuracy"]
    assert last["val_fgsm"] == pytest.approx(stepped, abs=3)


def test_pixels_go_there_and_back():
    model = sdi.PixelModel(nn.Identity(), (0.5, 0.4), (0.25, 0.2))
    x = pictures()[0]
    torch.testing.assert_close(model.pixels(model(x)), x)
    assert torch.equal(sdi.PixelModel(nn.Identity(), (0.5, 0.4), (0.25, 0.2), normalise=False)(x), x)


def test_the_schedule():
    factors = [sdi.stepped_factor(step, 10, 0.2, (0.8, 0.9)) for step in range(10)]
    assert factors == pytest.approx([1 / 3, 2 / 3, 1, 1, 1, 1, 1, 1, 0.1, 0.01])


def test_a_run_that_ends_early_follows_the_long_schedule():
    rates = {}

    class Keep(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            rates.setdefault(pl_module.schedule_epochs, []).append(trainer.optimizers[0].param_groups[0]["lr"])

    for epochs, schedule in ((4, None), (2, 4)):
        module = classifier("none", drops=(0.5,), schedule_epochs=schedule)
        module.configure_callbacks = lambda: [Keep()]
        fit(module, epochs=epochs)
    assert rates[4] == rates[None][:10]


def test_costs_and_sizes():
    assert sdi.step_cost("learned") == pytest.approx(7.367, abs=1e-3)
    assert sdi.step_cost("learned", every=1) - sdi.step_cost("learned", every=10**9) == pytest.approx(4.436, abs=1e-3)
    assert sdi.step_cost("many", steps=7) == 17
    with torch.device("meta"):
        model = sdi.cifar_resnet18()
        macs = count_macs(model, torch.empty(1, 3, 32, 32))
    assert count_parameters(model) == 11_173_962
    assert macs / 1e6 == pytest.approx(555.4, abs=0.1)


# --------------------------------------------------------------------------------------------------------- bad input

X, Y = pictures(4)
MODEL = network().eval()
ATTACKS = {
    "one_step": lambda x=X, epsilon=0.1, alpha=0.1: sdi.one_step(MODEL, x, Y, 0.0, epsilon=epsilon, alpha=alpha),
    "pgd": lambda x=X, epsilon=0.1, alpha=0.1: sdi.pgd(MODEL, x, Y, epsilon=epsilon, step_size=alpha),
}


@pytest.mark.parametrize("attack", ATTACKS)
@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"x": X + 0.5}, r"in \[0, 1\]"),
        ({"x": X - 0.5}, r"in \[0, 1\]"),
        ({"x": X[0]}, r"expected \(B, C, H, W\)"),
        ({"epsilon": -0.1}, "epsilon is -0.1"),
        ({"epsilon": math.nan}, "epsilon is nan"),
        ({"alpha": -0.1}, "the step is -0.1"),
    ],
)
def test_bad_attacks_are_named(attack, wrong, named):
    with pytest.raises(ValueError, match=named):
        ATTACKS[attack](**wrong)


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda: sdi.smoothed_cross_entropy(torch.zeros(1, 3), Y[:1] % 3, 0.0), "truth is 0.0"),
        (lambda: sdi.pgd(MODEL, X, Y, epsilon=0.1, steps=-1), "steps is -1"),
        (lambda: sdi.pgd(MODEL, X, Y, epsilon=0.1, restarts=0), "restarts is 0"),
        (lambda: sdi.corner_search(MODEL, X, Y, epsilon=0.1, queries=0), "queries is 0"),
        (lambda: sdi.strong_survivors(MODEL, X, Y, epsilon=0.1, attacks=["fab"]), r"\['fab'\]"),
        (lambda: sdi.strong_survivors(MODEL, X, Y, epsilon=0.0), "must be above 0"),
        (lambda: sdi.strong_survivors(MODEL, X, Y, epsilon=0.1), "6 pixels a side"),
        (lambda: sdi.strong_survivors(network().train(), X, Y, epsilon=0.1), "evaluation mode"),
        (lambda: sdi.StartGenerator(0), "channels is 0"),
        (lambda: sdi.StartGenerator(3)(X, X), r"expected both \(B, 3, H, W\)"),
        (lambda: sdi.PixelModel(MODEL, (0.5,), (0.0,)), "std above 0"),
        (lambda: sdi.PixelModel(MODEL, (0.5,), (1.0, 1.0)), "one of each a channel"),
        (lambda: classifier("first"), "start is 'first'"),
        (lambda: classifier("zero", epsilon=-1.0), "epsilon is -1.0"),
        (lambda: classifier("zero", alpha=-1.0), "alpha is -1.0"),
        (lambda: classifier("zero", truth=1.5), "truth is 1.5"),
        (lambda: classifier("learned", every=0), "every is 0"),
        (lambda: classifier("zero", steps=0), "steps is 0"),
        (lambda: classifier("zero", schedule_epochs=0), "schedule_epochs is 0"),
        (lambda: classifier("zero", warmup=1.0), "warmup=1.0"),
        (lambda: classifier("zero", generator_rate=math.nan), "generator_rate is nan"),
        (lambda: sdi.step_cost("first"), "start is 'first'"),
        (lambda: sdi.step_cost("learned", every=0), "every=0"),
        (lambda: sdi.step_cost("many", steps=-1), "steps=-1"),
        (lambda: sdi.random_start(X, -0.1), "epsilon is -0.1"),
        (lambda: sdi.adversarial_accuracy(MODEL, X[:0], Y[:0]), "x is empty"),
        (lambda: sdi.strong_survivors(network(classes=2).eval(), X, Y % 2, epsilon=0.1, attacks=["apgd-dlr"]), "three"),
    ],
)
def test_bad_input_is_named(call, named):
    with pytest.raises(ValueError, match=named):
        call()


def test_a_generator_belongs_to_the_learned_start_only():
    model, optimizer = sdi.PixelModel(network()), partial(torch.optim.SGD, lr=0.1)
    with pytest.raises(ValueError, match="`learned` needs one"):
        sdi.AdversarialClassifier(model, optimizer, start="learned", epsilon=0.1)
    with pytest.raises(ValueError, match="`learned` needs one"):
        sdi.AdversarialClassifier(model, optimizer, start="zero", epsilon=0.1, generator=sdi.StartGenerator(2))


def test_a_loss_that_is_no_number_ends_the_run():
    from leantrain.training import Diverged

    module = classifier("zero")
    with torch.no_grad():
        module.model.network[0].weight.fill_(math.inf)
    with pytest.raises(Diverged):
        fit(module, epochs=1)
