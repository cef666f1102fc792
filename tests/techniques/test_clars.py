"""CLARS: the toy problem's known numbers, both estimators against plain loops, LARS against timm's, invariants."""

from __future__ import annotations

import copy
import math
from functools import partial

import lightning as L
import pytest
import timm.optim
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from leantrain.data import images
from leantrain.techniques.clars import (
    CLARS,
    LARS,
    GradientNorms,
    LargeBatchClassifier,
    extra_cost,
    layer_groups,
    micro_batch_norms,
    polynomial_factor,
    sample_norms,
)

QUIET = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}

# ---------------------------------------------------------------- the toy problem: f_i = (w2 (w1 x_i) - y_i)^2 / 2

X = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0], [2.0, -1.0]], dtype=torch.float64)
Y = torch.tensor([[1.0], [2.0], [0.0], [1.0]], dtype=torch.float64)


def half_square(output: Tensor, target: Tensor) -> Tensor:
    return (output - target).square().mean() / 2


def toy() -> nn.Sequential:
    model = nn.Sequential(nn.Linear(2, 1, bias=False), nn.Linear(1, 1, bias=False)).double()
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[0.5, -0.5]]))
        model[1].weight.fill_(2.0)
    return model


def single_samples() -> list[tuple[Tensor, Tensor]]:
    return [(X[i : i + 1], Y[i : i + 1]) for i in range(4)]


def backward(model: nn.Module) -> float:
    model.zero_grad()
    loss = half_square(model(X), Y)
    loss.backward()
    return loss.item()


def ways(model: nn.Module) -> dict[str, GradientNorms]:
    return {
        "micro-batches of one": micro_batch_norms(model, single_samples(), half_square),
        "samples": sample_norms(model, X, Y, half_square, chunk=3),
    }


def test_norms_of_the_toy_at_known_points() -> None:
    model = toy()
    first, second = model.parameters()
    for norms in ways(model).values():
        assert norms.mean[first].item() == pytest.approx(3.736067977500, abs=1e-12)
        assert norms.mean[second].item() == pytest.approx(1.125, abs=1e-12)
        assert norms.of_mean[first].item() == pytest.approx(3.201562118716, abs=1e-12)
        assert norms.of_mean[second].item() == pytest.approx(1.125, abs=1e-12)
        assert norms.variance_factor(first) == pytest.approx(2.829268292683, abs=1e-12)
        assert norms.variance_factor(second) == pytest.approx(2.222222222222, abs=1e-12)
    backward(model)
    assert first.grad.tolist() == [[2.0, -2.5]]
    assert second.grad.tolist() == [[1.125]]


def test_ratios_of_the_toy_at_known_points() -> None:
    for optimizer, eta, expected in [
        (LARS, 0.001, (0.000220863052, 0.001777777778)),
        (CLARS, 0.01, (0.001892649667, 0.017777777778)),
    ]:
        model = toy()
        built = optimizer(model.parameters(), lr=1.0, eta=eta, eps=0.0)
        if isinstance(built, CLARS):
            built.see(ways(model)["samples"].mean)
        backward(model)
        built.step()
        assert list(built.ratios().values()) == pytest.approx(expected, abs=1e-12)


def test_three_steps_of_clars_at_known_points() -> None:
    model = toy()
    first, second = model.parameters()
    optimizer = CLARS(model.parameters(), lr=1.0, eta=0.01, momentum=0.9, eps=0.0)
    expected = [
        ((0.001892649667, 0.017777777778), (0.496214700667, -0.495268375834), 1.98, 1.583749282655),
        ((0.001926626098, 0.018084577697), (0.489050632645, -0.486237166430), 1.941967863207, 1.508803728004),
        ((0.001993695955, 0.018690695752), (0.478852776034, -0.473197037071), 1.887401847992, 1.408976713338),
    ]
    for ratios, w1, w2, loss in expected:
        optimizer.see(micro_batch_norms(model, single_samples(), half_square).mean)
        backward(model)
        optimizer.step()
        assert list(optimizer.ratios().values()) == pytest.approx(ratios, abs=1e-12)
        assert first.flatten().tolist() == pytest.approx(w1, abs=1e-12)
        assert second.item() == pytest.approx(w2, abs=1e-12)
        assert half_square(model(X), Y).item() == pytest.approx(loss, abs=1e-12)


# ---------------------------------------------------------------- the estimators


def small_net(*, dropout: float = 0.0, norm: bool = False) -> nn.Sequential:
    torch.manual_seed(0)
    norms = [nn.BatchNorm2d(4)] if norm else []
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), *norms, nn.Tanh(), nn.Dropout(dropout), nn.Flatten(), nn.Linear(144, 10)
    ).train()


def pixels(count: int = 12) -> tuple[Tensor, Tensor]:
    data = images("digits", batch_size=count, train_size=count)
    return next(iter(data.train_dataloader()))


def test_samples_agree_with_one_backward_pass_each() -> None:
    model, (x, y) = small_net(), pixels()
    found = sample_norms(model, x, y, chunk=5)
    each = []
    for i in range(len(y)):
        model.zero_grad()
        F.cross_entropy(model(x[i : i + 1]), y[i : i + 1]).backward()
        each.append([p.grad.clone() for p in model.parameters()])
    for place, p in enumerate(model.parameters()):
        gradients = torch.stack([g[place] for g in each]).flatten(1)
        torch.testing.assert_close(found.mean[p], gradients.norm(dim=1).mean())
        torch.testing.assert_close(found.mean_square[p], gradients.square().sum(1).mean())
        torch.testing.assert_close(found.of_mean[p], gradients.mean(0).norm())


def test_micro_batches_of_all_samples_measure_the_batch_gradient() -> None:
    model, (x, y) = small_net(), pixels()
    found = micro_batch_norms(model, [(x, y)])
    F.cross_entropy(model(x), y).backward()
    for p in model.parameters():
        torch.testing.assert_close(found.mean[p], p.grad.norm())
        assert found.variance_factor(p) == pytest.approx(1.0)


@pytest.mark.parametrize("size", [1, 2, 3, 4, 6, 12])
def test_the_mean_of_norms_is_never_below_the_norm_of_the_mean(size: int) -> None:
    model, (x, y) = small_net(), pixels()
    found = micro_batch_norms(model, zip(x.split(size), y.split(size), strict=True))
    single = sample_norms(model, x, y)
    for p in model.parameters():
        assert found.of_mean[p] <= found.mean[p] * (1 + 1e-6)
        assert found.mean[p] <= single.mean[p] * (1 + 1e-6), "averaging within micro-batches shortens them"
        torch.testing.assert_close(found.of_mean[p], single.of_mean[p])


def test_identical_samples_agree() -> None:
    model, (x, y) = small_net(), pixels(1)
    found = sample_norms(model, x.expand(6, 1, 8, 8), y.expand(6))
    for p in model.parameters():
        torch.testing.assert_close(found.mean[p], found.of_mean[p])
        assert found.variance_factor(p) == pytest.approx(1.0, rel=1e-5)


def test_cancelling_gradients_have_no_finite_factor() -> None:
    p = nn.Parameter(torch.zeros(1))
    zero, one = torch.zeros(()), torch.ones(())
    assert GradientNorms({p: one}, {p: one}, {p: zero}).variance_factor(p) == math.inf
    with pytest.raises(ValueError, match="not among those"):
        GradientNorms({}, {}, {}).variance_factor(p)


def test_the_estimate_leaves_everything_as_it_was() -> None:
    model, (x, y) = small_net(dropout=0.5, norm=True), pixels()
    F.cross_entropy(model(x), y).backward()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    gradients = [p.grad.clone() for p in model.parameters()]
    state = torch.get_rng_state()
    micro_batch_norms(model, zip(x.split(4), y.split(4), strict=True))
    sample_norms(model.eval(), x, y)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), gradients, strict=True))


def test_estimators_name_what_they_cannot_measure() -> None:
    model, (x, y) = small_net(norm=True), pixels()
    with pytest.raises(ValueError, match="use micro_batch_norms"):
        sample_norms(model, x, y)
    with pytest.raises(ValueError, match="at least one"):
        micro_batch_norms(model, [])
    with pytest.raises(ValueError, match="empty"):
        micro_batch_norms(model, [(x[:0], y[:0])])
    with pytest.raises(ValueError, match="at least one"):
        sample_norms(small_net(), x[:0], y[:0])
    with pytest.raises(ValueError, match="chunk"):
        sample_norms(small_net(), x, y, chunk=0)


# ---------------------------------------------------------------- the optimisers


def matrix(*rows: tuple[float, ...]) -> nn.Parameter:
    return nn.Parameter(torch.tensor(rows, dtype=torch.float64))


def one_step(optimizer: LARS, p: nn.Parameter, gradient: Tensor, norm: float | None = None) -> float:
    p.grad = gradient
    if isinstance(optimizer, CLARS):
        optimizer.see({p: gradient.norm() if norm is None else torch.tensor(norm, dtype=torch.float64)})
    optimizer.step()
    return optimizer.ratios().get(p, 1.0)


def test_lars_agrees_with_timm_without_decay() -> None:
    """Timm's ratio has eta |w| / (|g| + decay |w| + eps), the same for no decay; it also sits inside the momentum."""
    torch.manual_seed(0)
    net, x, y = small_net(), *pixels()
    twin = copy.deepcopy(net)
    ours = LARS(net.parameters(), lr=20.0, eta=0.001, momentum=0.0, eps=1e-8)
    theirs = timm.optim.Lars(twin.parameters(), lr=20.0, trust_coeff=0.001, momentum=0.0, always_adapt=True)
    for _ in range(5):
        for model, optimizer in ((net, ours), (twin, theirs)):
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
    for p, q in zip(net.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q)


@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_with_all_tensors_plain_it_is_momentum_sgd_to_the_last_bit(decay: float, momentum: float) -> None:
    torch.manual_seed(0)
    net, (x, y) = small_net(), pixels()
    builders = [
        lambda params: torch.optim.SGD(params, lr=0.1, momentum=momentum, weight_decay=decay),
        lambda params: LARS(params, lr=0.1, momentum=momentum, weight_decay=decay),
        lambda params: CLARS(params, lr=0.1, momentum=momentum, weight_decay=decay),
    ]
    results = []
    for build in builders:
        model = copy.deepcopy(net)
        optimizer = build([{"params": list(model.parameters()), "layerwise": False}])
        for _ in range(4):
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
        results.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_agreeing_samples_make_clars_lars() -> None:
    gradient = torch.tensor([[0.3, -0.4], [1.2, 0.0]], dtype=torch.float64)
    p, q = matrix((1, 2), (3, 4)), matrix((1, 2), (3, 4))
    lars, clars = (kind([w], lr=1.0, eta=0.01, weight_decay=0.0, eps=0.0) for kind, w in ((LARS, p), (CLARS, q)))
    assert one_step(lars, p, gradient) == pytest.approx(one_step(clars, q, gradient))
    torch.testing.assert_close(p, q)


def test_the_momentum_is_not_rescaled_by_later_ratios() -> None:
    """The second step's ratio multiplies the whole buffer, of which nine tenths are the first gradient's."""
    p = matrix((3.0, 4.0))
    clars = CLARS([p], lr=1.0, eta=0.01, momentum=0.9, eps=0.0)
    g = torch.tensor([[0.0, 1.0]], dtype=torch.float64)
    one_step(clars, p, g, norm=2.0)
    assert p.tolist() == [[3.0, pytest.approx(4.0 - 0.025)]]
    length = p.norm().item()
    one_step(clars, p, g, norm=4.0)
    assert p.tolist() == [[3.0, pytest.approx(4.0 - 0.025 - 0.01 * length / 4 * 1.9)]]


@given(st.floats(1e-3, 1e3), st.integers(0, 99))
@settings(max_examples=25, deadline=None)
def test_scale_of_loss_and_of_weights(scale: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    w, g = torch.randn(2, 3, 2, dtype=torch.float64, generator=generator)
    options = {"lr": 1.0, "momentum": 0.0, "eps": 0.0, "max_ratio": math.inf}

    def stepped(weight: Tensor, gradient: Tensor) -> tuple[Tensor, float]:
        p = nn.Parameter(weight.clone())
        ratio = one_step(CLARS([p], **options), p, gradient, norm=1.7 * gradient.norm().item())
        return p.detach() - weight, ratio

    move, ratio = stepped(w, g)
    louder, _ = stepped(w, scale * g)
    torch.testing.assert_close(louder, move, rtol=1e-9, atol=1e-12)
    _, heavier = stepped(scale * w, g)
    assert heavier == pytest.approx(scale * ratio)


def test_the_ratio_is_capped_and_zero_weights_start_from_one() -> None:
    g = torch.tensor([[3.0, 4.0]], dtype=torch.float64)
    p = matrix((100.0, 0.0))
    assert one_step(CLARS([p], lr=0.0), p, g, norm=1e-3) == 0.1
    p = matrix((0.0, 0.0))
    assert one_step(CLARS([p], lr=0.0, eps=0.0, max_ratio=math.inf), p, g, norm=10.0) == pytest.approx(0.5)
    assert one_step(CLARS([p], lr=0.0), p, g, norm=10.0) == 0.1
    assert one_step(LARS([p], lr=0.0), p, g) == 1.0
    assert one_step(LARS([p], lr=0.0), matrix((1.0, 0.0)), torch.zeros(1, 2).double()) == 1.0


def test_a_missing_norm_is_named_and_nothing_has_moved() -> None:
    p, q = matrix((1.0, 2.0)), matrix((1.0, 2.0))
    p.grad, q.grad = torch.ones_like(p), torch.ones_like(q)
    optimizer = CLARS([{"params": [p]}, {"params": [q]}], lr=1.0)
    optimizer.see({p: torch.tensor(1.0)})
    with pytest.raises(ValueError, match=r"shape \(1, 2\) in group 1 has no mean gradient norm"):
        optimizer.step()
    assert p.tolist() == [[1, 2]]
    q.grad = None  # what has no gradient needs no norm
    optimizer.step()
    assert q.tolist() == [[1, 2]]


@pytest.mark.parametrize(
    "options",
    [
        {"lr": -1.0},
        {"lr": math.nan},
        {"eta": -0.1},
        {"momentum": 1.0},
        {"momentum": -0.1},
        {"weight_decay": -1.0},
        {"eps": -1e-9},
    ],
)
@pytest.mark.parametrize("kind", [LARS, CLARS])
def test_bad_hyperparameters_are_named(kind: type[LARS], options: dict) -> None:
    (name,) = options
    with pytest.raises(ValueError, match=name):
        kind([matrix((1.0,))], **{"lr": 1.0, **options})


def test_other_bad_input_is_named() -> None:
    with pytest.raises(ValueError, match="max_ratio"):
        CLARS([matrix((1.0,))], lr=1.0, max_ratio=0.0)
    optimizer = LARS([matrix((1.0,))], lr=1.0)
    with pytest.raises(ValueError, match="lr"):
        optimizer.add_param_group({"params": [matrix((2.0,))], "lr": -1.0})
    assert len(optimizer.param_groups) == 1
    for bad in ((-1, 4, 0), (0, 0, 0), (0, 4, 4)):
        with pytest.raises(ValueError, match="schedule"):
            polynomial_factor(*bad)
    with pytest.raises(ValueError, match="micro_size"):
        extra_cost(100, micro_size=0)


def test_groups_hold_every_trained_tensor_once() -> None:
    model = small_net(norm=True)
    model[0].weight.requires_grad_(False)
    matrices, vectors = layer_groups(model, 0.4)
    assert matrices["layerwise"] is True
    assert (vectors["layerwise"], vectors["lr"]) == (False, 0.4)
    assert [p.ndim for p in matrices["params"]] == [2]
    assert all(p.ndim == 1 for p in vectors["params"])
    assert len(matrices["params"] + vectors["params"]) == sum(p.requires_grad for p in model.parameters())
    assert "lr" not in layer_groups(model)[1]


@given(st.integers(1, 40), st.integers(0, 39))
def test_the_schedule_rises_to_one_and_falls_to_nothing(total: int, warmup: int) -> None:
    warmup = min(warmup, total - 1)
    values = [polynomial_factor(step, total, warmup) for step in range(total + 1)]
    assert values[warmup] == 1
    assert values[-1] == 0
    assert values[: warmup + 1] == sorted(values[: warmup + 1])
    assert values[warmup:] == sorted(values[warmup:], reverse=True)


# ---------------------------------------------------------------- in training


def train(module: LargeBatchClassifier, epochs: int = 2, batch_size: int = 64) -> LargeBatchClassifier:
    data = images("digits", batch_size=batch_size, train_size=128, val_size=40)
    data.set_seed(0)
    L.Trainer(max_epochs=epochs, accelerator="cpu", num_sanity_val_steps=0, **QUIET).fit(module, datamodule=data)
    return module


def large_batch(optimizer: partial, **options) -> LargeBatchClassifier:
    return LargeBatchClassifier(small_net(), optimizer, num_classes=10, **options)


def weights(module: LargeBatchClassifier) -> Tensor:
    return torch.cat([p.detach().flatten() for p in module.model.parameters()])


SGD = partial(torch.optim.SGD, lr=0.1, momentum=0.9)


def test_accumulation_is_one_large_batch() -> None:
    whole, parts = train(large_batch(SGD)), train(large_batch(SGD, physical_batch=25))
    torch.testing.assert_close(weights(whole), weights(parts), atol=1e-6, rtol=1e-4)
    assert whole.step_losses == pytest.approx(parts.step_losses, rel=1e-4)
    assert len(whole.step_losses) == 4


def test_batches_of_the_loader_make_one_large_batch() -> None:
    """Accumulated over two loader batches and in one piece; of five batches of an epoch the fifth makes no step."""
    halves = train(large_batch(SGD, accumulate=2), epochs=1, batch_size=32)
    whole = large_batch(SGD)
    data = images("digits", batch_size=32, train_size=128, val_size=40)
    data.set_seed(0)
    sgd = torch.optim.SGD(whole.model.parameters(), lr=0.1, momentum=0.9)
    batches = list(data.train_dataloader())
    for step in range(2):
        x, y = (torch.cat(parts) for parts in zip(*batches[2 * step : 2 * step + 2], strict=True))
        sgd.param_groups[0]["lr"] = 0.1 * polynomial_factor(step, 2)
        sgd.zero_grad()
        F.cross_entropy(whole.model(x), y).backward()
        sgd.step()
    torch.testing.assert_close(weights(halves), weights(whole), atol=1e-6, rtol=1e-4)
    assert len(train(large_batch(SGD, accumulate=2), batch_size=25).step_losses) == 4


def test_sgd_in_training_is_the_plain_loop() -> None:
    module = train(large_batch(SGD, warmup_epochs=0.5))
    model = small_net()
    sgd = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    data = images("digits", batch_size=64, train_size=128, val_size=40)
    data.set_seed(0)
    step = 0
    for epoch in range(2):
        data.set_epoch(epoch)
        for x, y in data.train_dataloader():
            sgd.param_groups[0]["lr"] = 0.1 * polynomial_factor(step, 4, 1)
            sgd.zero_grad()
            F.cross_entropy(model(x), y).backward()
            sgd.step()
            step += 1
    expected = torch.cat([p.detach().flatten() for p in model.parameters()])
    assert torch.equal(weights(module), expected)


def test_clars_in_training_is_the_plain_loop() -> None:
    module = train(large_batch(partial(CLARS, lr=10.0), micro_batches=4, micro_size=8, plain_rate=0.05), epochs=1)
    model = small_net()
    clars = CLARS(layer_groups(model, 0.05), lr=10.0)
    data = images("digits", batch_size=64, train_size=128, val_size=40)
    data.set_seed(0)
    for step, (x, y) in enumerate(data.train_dataloader()):
        for group, peak in zip(clars.param_groups, (10.0, 0.05), strict=True):
            group["lr"] = peak * polynomial_factor(step, 2)
        norms = {p: torch.zeros(()) for p in model.parameters()}
        for i in range(4):
            model.zero_grad()
            F.cross_entropy(model(x[8 * i : 8 * i + 8]), y[8 * i : 8 * i + 8]).backward()
            norms = {p: norm + p.grad.norm() / 4 for p, norm in norms.items()}
        clars.see(norms)
        model.zero_grad()
        F.cross_entropy(model(x), y).backward()
        clars.step()
    expected = torch.cat([p.detach().flatten() for p in model.parameters()])
    torch.testing.assert_close(weights(module), expected, atol=1e-6, rtol=1e-4)


def test_norms_are_refreshed_when_they_are_due() -> None:
    seen = []

    class Watched(CLARS):
        def see(self, norms) -> None:
            seen.append(float(sum(norms.values())))
            super().see(norms)

    train(large_batch(partial(Watched, lr=0.0), micro_batches=8, micro_size=1, plain_rate=0.0))
    often, seen = seen, []
    module = large_batch(partial(Watched, lr=0.0), micro_batches=8, micro_size=1, plain_rate=0.0, refresh=3)
    train(module)
    assert len(often) == 4
    # Frozen weights: the norms of a batch are the same however long ago the last estimate was.
    assert seen == [often[0], often[3]]


def test_bad_training_options_are_named() -> None:
    for name in ("physical_batch", "accumulate", "micro_batches", "micro_size", "refresh"):
        with pytest.raises(ValueError, match=name):
            large_batch(SGD, **{name: 0})
    with pytest.raises(ValueError, match="warmup_epochs"):
        large_batch(SGD, warmup_epochs=-1.0)
    with pytest.raises(ValueError, match="does not end before"):
        train(large_batch(SGD, warmup_epochs=2.0))
    with pytest.raises(ValueError, match="accumulate fewer"):
        train(large_batch(SGD, accumulate=3))
    with pytest.raises(ValueError, match="need 72 images, the batch has 64"):
        train(large_batch(partial(CLARS, lr=1.0), micro_batches=9))
    with pytest.raises(ValueError, match="max_epochs"):
        train(large_batch(SGD), epochs=-1)


def test_the_estimate_is_a_small_share_of_a_large_batch() -> None:
    assert extra_cost(16_384) == 0.03125
    assert extra_cost(512) == 1.0
    assert extra_cost(2000, micro_batches=8) == 0.032
