"""Adan against its equations, against timm's implementation, and against Adam where it must be Adam."""

from __future__ import annotations

import copy
import io
import math
from collections.abc import Callable

import numpy as np
import pytest
import timm.optim
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from leantrain.techniques.adan import Adan, Coefficients, adan_update

BETAS = (0.98, 0.92, 0.99)
PATHS = pytest.mark.parametrize("foreach", [False, True], ids=["single", "foreach"])
CURVATURE = torch.tensor([1.0, 10.0], dtype=torch.float64)


def reference(
    gradient: Callable[[np.ndarray], np.ndarray],
    theta: np.ndarray,
    steps: int,
    *,
    lr: float = 1e-3,
    betas: tuple[float, float, float] = BETAS,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    no_prox: bool = False,
    max_grad_norm: float = 0.0,
    norm_dtype: type = np.float64,
    restart_after: int = 0,
    literal: bool = False,
) -> list[np.ndarray]:
    """The equations in float64; `literal` follows the paper's Algorithm 1 (no bias correction)."""
    b1, b2, b3 = betas
    theta = np.array(theta, dtype=np.float64)
    m = v = n = np.zeros_like(theta)
    previous, k, path = None, 0, []
    for number in range(1, steps + 1):
        g = gradient(theta)
        if max_grad_norm:
            norm = np.sqrt(norm_dtype(np.sum(g**2))) + norm_dtype(eps)
            g = g * float(min(norm_dtype(1), norm_dtype(max_grad_norm) / norm))
        k += 1
        d = np.zeros_like(g) if previous is None else g - previous
        nesterov = g + b2 * d
        if literal and previous is None:
            m, v, n = g, np.zeros_like(g), g**2
        elif literal and k == 2:
            m, v, n = b1 * m + (1 - b1) * g, d, b3 * n + (1 - b3) * nesterov**2
        else:
            m, v, n = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * d, b3 * n + (1 - b3) * nesterov**2
        c1, c2, c3 = (1.0, 1.0, 1.0) if literal else (1 - b1**k, 1 - b2**k, 1 - b3**k)
        update = lr * (m / c1 + b2 * v / c2) / (np.sqrt(n) / np.sqrt(c3) + eps)
        decay = lr * weight_decay
        theta = (1 - decay) * theta - update if no_prox else (theta - update) / (1 + decay)
        previous = g
        path.append(theta)
        if number == restart_after:
            m = v = n = np.zeros_like(theta)
            previous, k = None, 0
    return path


def quadratic_gradient(theta: np.ndarray) -> np.ndarray:
    return np.array([1.0, 10.0]) * theta


def descend(optimiser: Adan, p: Tensor, steps: int) -> list[Tensor]:
    """Minimise 0.5 (x1^2 + 10 x2^2) and return the iterates."""
    path = []
    for _ in range(steps):
        p.grad = CURVATURE.to(p.dtype) * p.detach()
        optimiser.step()
        path.append(p.detach().clone())
    return path


def ones(*shape: int, dtype: torch.dtype = torch.float64) -> nn.Parameter:
    return nn.Parameter(torch.ones(shape, dtype=dtype))


def feed(optimiser: torch.optim.Optimizer, params: list[nn.Parameter], gradients: list[list[Tensor]]) -> None:
    for step in gradients:
        for p, g in zip(params, step, strict=True):
            p.grad = g.clone()
        optimiser.step()


def random_gradients(shapes: list[tuple[int, ...]], steps: int, seed: int = 0) -> list[list[Tensor]]:
    rng = torch.Generator().manual_seed(seed)
    return [[torch.randn(s, generator=rng, dtype=torch.float64) for s in shapes] for _ in range(steps)]


# ------------------------------------------------------------------ known answers, float64

QUADRATIC = {
    "no decay, x1": (0, {}, [0.900000001, 0.800773159188, 0.702129460066, 0.604238049246, 0.507386785802]),
    "no decay, x2": (1, {}, [0.9000000001, 0.800773157318, 0.702129457174, 0.604238045290, 0.507386780753]),
    "proximal": (
        0,
        {"weight_decay": 0.5},
        [0.857142858095, 0.722573125989, 0.595548182397, 0.476017181719, 0.364132161322],
    ),
    "no_prox": (
        0,
        {"weight_decay": 0.5, "no_prox": True},
        [0.850000001, 0.709223293067, 0.576825931923, 0.452766714210, 0.337244812749],
    ),
}


@PATHS
@pytest.mark.parametrize("case", QUADRATIC)
def test_known_trajectory_on_a_quadratic(case: str, foreach: bool) -> None:
    coordinate, options, expected = QUADRATIC[case]
    p = ones(2)
    path = descend(Adan([p], lr=0.1, foreach=foreach, **options), p, 5)
    assert [float(x[coordinate]) for x in path] == pytest.approx(expected, rel=0, abs=6e-13)


@PATHS
def test_known_trajectory_with_clipping(foreach: bool) -> None:
    p = ones(2)
    path = [float(x[0]) for x in descend(Adan([p], lr=0.1, max_grad_norm=1.0, foreach=foreach), p, 5)]
    # Made with the authors' code, which takes the norm in float32; ours takes it in float64 here.
    published = [0.90000001005, 0.80000002009, 0.70000003040, 0.60000004043, 0.50000005017]
    assert path == pytest.approx(published, rel=0, abs=4e-10)
    options = {"lr": 0.1, "max_grad_norm": 1.0}
    in_float32 = reference(quadratic_gradient, np.ones(2), 5, norm_dtype=np.float32, **options)
    assert [x[0] for x in in_float32] == pytest.approx(published, rel=0, abs=6e-12)
    assert path == pytest.approx([x[0] for x in reference(quadratic_gradient, np.ones(2), 5, **options)], abs=1e-14)


@PATHS
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"weight_decay": 0.5},
        {"weight_decay": 0.5, "no_prox": True},
        {"max_grad_norm": 1.0, "eps": 1e-3},
        {"betas": (0.5, 0.3, 0.7)},
    ],
)
def test_forty_steps_follow_the_equations(options: dict, foreach: bool) -> None:
    p = ones(2)
    path = torch.stack(descend(Adan([p], lr=0.1, foreach=foreach, **options), p, 40)).numpy()
    expected = np.stack(reference(quadratic_gradient, np.ones(2), 40, lr=0.1, **options))
    np.testing.assert_allclose(path, expected, rtol=0, atol=1e-14)


@PATHS
def test_known_moments(foreach: bool) -> None:
    p = ones(2)
    optimiser = Adan([p], lr=0.1, foreach=foreach)
    moments: dict[str, list[float]] = {"exp_avg": [], "exp_avg_diff": [], "exp_avg_sq": []}
    for _ in range(5):
        descend(optimiser, p, 1)
        for name, values in moments.items():
            values.append(float(optimiser.state[p][name][0]))
    near = {"rel": 0, "abs": 6e-13}
    assert moments["exp_avg"] == pytest.approx(
        [0.02, 0.03760000002, 0.052863463203, 0.065848783141, 0.076616568463], **near
    )
    assert moments["exp_avg_diff"] == pytest.approx(
        [0.0, -0.00799999992, -0.015298147271, -0.021965791419, -0.028039840971], **near
    )
    assert moments["exp_avg_sq"] == pytest.approx(
        [0.01, 0.016428640031, 0.021298035688, 0.024822876833, 0.02721843772], **near
    )


@PATHS
def test_known_answer_for_prescribed_gradients(foreach: bool) -> None:
    p = nn.Parameter(torch.tensor(0.5, dtype=torch.float64))
    optimiser = Adan([p], lr=0.01, foreach=foreach)
    path = []
    for g in [1.0, -0.5, 0.25, 2.0, -1.0]:
        feed(optimiser, [p], [[torch.tensor(g, dtype=torch.float64)]])
        path.append(p.item())
    expected = [0.4900000001, 0.493159003587, 0.492894911855, 0.488255814763, 0.488533745397]
    assert path == pytest.approx(expected, abs=6e-13)


@PATHS
def test_known_answer_after_a_restart(foreach: bool) -> None:
    p = ones(2)
    optimiser = Adan([p], lr=0.1, foreach=foreach)
    descend(optimiser, p, 3)
    optimiser.restart()
    assert optimiser.param_groups[0]["step"] == 0
    assert not optimiser.state
    path = [float(x[0]) for x in descend(optimiser, p, 3)]
    assert path == pytest.approx([0.602129461490, 0.503678742821, 0.406565804566], abs=6e-13)
    assert path == pytest.approx(
        [x[0] for x in reference(quadratic_gradient, np.ones(2), 6, lr=0.1, restart_after=3)[3:]], abs=1e-14
    )


def test_reference_knows_the_papers_literal_form() -> None:
    path = reference(quadratic_gradient, np.ones(2), 5, lr=0.1, literal=True)
    expected = [0.900000001, 0.80924233861, 0.718580737888, 0.628140482422, 0.538050880822]
    assert [x[0] for x in path] == pytest.approx(expected, abs=6e-12)
    bias_corrected = reference(quadratic_gradient, np.ones(2), 5, lr=0.1)
    assert abs(path[1][0] - bias_corrected[1][0]) > 1e-3  # negative control: the two forms differ


# ------------------------------------------------------------------ independent reference


def network() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.GELU(), nn.Flatten(), nn.LayerNorm(144), nn.Linear(144, 10))


def train(optimiser: torch.optim.Optimizer, model: nn.Module, steps: int, clip: float = 0.0) -> Tensor:
    rng = torch.Generator().manual_seed(5)
    x = torch.rand(64, 1, 8, 8, generator=rng)
    y = torch.randint(0, 10, (64,), generator=rng)
    for step in range(steps):
        rows = slice(16 * (step % 4), 16 * (step % 4) + 16)
        optimiser.zero_grad()
        nn.functional.cross_entropy(model(x[rows]), y[rows]).backward()
        if clip:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimiser.step()
    return torch.cat([p.detach().flatten() for p in model.parameters()])


@PATHS
@pytest.mark.parametrize("no_prox", [False, True], ids=["prox", "no_prox"])
def test_fifty_steps_of_a_network_equal_timms(foreach: bool, no_prox: bool) -> None:
    settings_ = {"lr": 1e-2, "weight_decay": 0.02, "no_prox": no_prox, "foreach": foreach}
    ours, theirs = network(), network()
    a = train(Adan(ours.parameters(), **settings_), ours, 50)
    b = train(timm.optim.Adan(theirs.parameters(), **settings_), theirs, 50)
    start = torch.cat([p.detach().flatten() for p in network().parameters()])
    assert (a - start).abs().max() > 0.05  # the network did move
    assert torch.equal(a, b)


@PATHS
def test_clipping_equals_clipping_outside(foreach: bool) -> None:
    ours, theirs = network(), network()
    a = train(Adan(ours.parameters(), lr=1e-2, max_grad_norm=0.5, foreach=foreach), ours, 30)
    b = train(timm.optim.Adan(theirs.parameters(), lr=1e-2, foreach=False), theirs, 30, clip=0.5)
    torch.testing.assert_close(a, b, rtol=0, atol=2e-5)  # torch adds 1e-6 to the norm, we add eps
    unclipped = network()
    assert (train(Adan(unclipped.parameters(), lr=1e-2), unclipped, 30) - a).abs().max() > 1e-3


# ------------------------------------------------------------------ invariants

SHAPES = [(3, 4), (5,), (), (2, 0), (1, 1, 2)]


@PATHS
def test_without_differences_it_is_adam_to_the_last_bit(foreach: bool) -> None:
    ours = [ones(*s) for s in SHAPES]
    theirs = [ones(*s) for s in SHAPES]
    gradients = random_gradients(SHAPES, 20)
    feed(Adan(ours, lr=0.03, betas=(0.9, 0.0, 0.99), foreach=foreach), ours, gradients)
    feed(torch.optim.Adam(theirs, lr=0.03, betas=(0.9, 0.99), foreach=foreach), theirs, gradients)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@PATHS
def test_without_differences_and_prox_it_is_adamw_to_the_last_bit(foreach: bool) -> None:
    ours, theirs = [ones(*s) for s in SHAPES], [ones(*s) for s in SHAPES]
    gradients = random_gradients(SHAPES, 20)
    adan = Adan(ours, lr=0.03, betas=(0.9, 0.0, 0.99), weight_decay=0.1, no_prox=True, foreach=foreach)
    feed(adan, ours, gradients)
    adamw = torch.optim.AdamW(theirs, lr=0.03, betas=(0.9, 0.99), weight_decay=0.1, foreach=foreach)
    feed(adamw, theirs, gradients)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@PATHS
@given(
    g=st.floats(-1e3, 1e3).filter(lambda x: abs(x) > 1e-3),
    lr=st.floats(1e-5, 0.1),
    betas=st.tuples(*[st.floats(0, 0.999)] * 3),
)
@settings(max_examples=40, deadline=None)
def test_a_constant_gradient_moves_by_lr_each_step(
    foreach: bool, g: float, lr: float, betas: tuple[float, float, float]
) -> None:
    p = nn.Parameter(torch.zeros(2, dtype=torch.float64))
    optimiser = Adan([p], lr=lr, betas=betas, eps=0.0, foreach=foreach)
    feed(optimiser, [p], [[torch.full((2,), g, dtype=torch.float64)]] * 7)
    assert p.tolist() == pytest.approx([-7 * lr * math.copysign(1, g)] * 2, rel=1e-10)


def test_eps_stands_outside_the_root() -> None:
    p = nn.Parameter(torch.zeros((), dtype=torch.float64))
    feed(Adan([p], lr=0.01), [p], [[torch.tensor(3.0, dtype=torch.float64)]])
    assert p.item() == pytest.approx(-0.01 * 3 / (3 + 1e-8), rel=1e-15)


@PATHS
@given(exponent=st.integers(-20, 20), factor=st.floats(1e-3, 1e3), seed=st.integers(0, 2**31 - 1))
@example(exponent=0, factor=1000.0, seed=0)
@settings(max_examples=30, deadline=None)
def test_without_eps_the_scale_of_the_gradient_does_not_matter(
    foreach: bool, exponent: int, factor: float, seed: int
) -> None:
    gradients = random_gradients([(4,)], 8, seed)

    def run(scale: float) -> Tensor:
        p = ones(4)
        scaled = [[g * scale for g in step] for step in gradients]
        feed(Adan([p], lr=0.1, eps=0.0, weight_decay=0.1, foreach=foreach), [p], scaled)
        return p.detach()

    torch.testing.assert_close(run(factor), run(1.0), rtol=0, atol=1e-13)
    assert torch.equal(run(4.0**exponent), run(1.0))  # a power of four scales every intermediate value exactly


@given(
    shapes=st.lists(st.lists(st.integers(0, 4), max_size=3).map(tuple), min_size=1, max_size=6),
    weight_decay=st.sampled_from([0.0, 0.1]),
    no_prox=st.booleans(),
    clip=st.sampled_from([0.0, 0.5]),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]),
    seed=st.integers(0, 2**31 - 1),
)
@example(shapes=[(), (0,), (2, 0, 3)], weight_decay=0.1, no_prox=False, clip=0.5, dtype=torch.float32, seed=0)
@settings(max_examples=60, deadline=None)
def test_foreach_equals_single(
    shapes: list[tuple[int, ...]],
    weight_decay: float,
    no_prox: bool,
    clip: float,
    dtype: torch.dtype,
    seed: int,
) -> None:
    gradients = [[g.to(dtype) for g in step] for step in random_gradients(shapes, 4, seed)]
    results = []
    for foreach in (False, True):
        params = [ones(*s, dtype=dtype) for s in shapes]
        options = {
            "weight_decay": weight_decay,
            "no_prox": no_prox,
            "max_grad_norm": clip,
            "foreach": foreach,
        }
        feed(Adan(params, lr=0.03, **options), params, gradients)
        results.append(params)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@PATHS
def test_zero_learning_rate_leaves_parameters_alone(foreach: bool) -> None:
    p = ones(3)
    optimiser = Adan([p], lr=0.0, weight_decay=0.5, foreach=foreach)
    feed(optimiser, [p], random_gradients([(3,)], 3))
    assert torch.equal(p.detach(), torch.ones(3, dtype=torch.float64))
    assert optimiser.state[p]["exp_avg"].abs().sum() > 0


@PATHS
def test_zero_gradients_give_no_update(foreach: bool) -> None:
    p = ones(3)
    feed(Adan([p], lr=0.1, foreach=foreach), [p], [[torch.zeros(3, dtype=torch.float64)]] * 3)
    assert torch.equal(p.detach(), torch.ones(3, dtype=torch.float64))


@PATHS
@pytest.mark.parametrize("clip", [0.0, 0.1])
def test_the_gradient_itself_is_not_changed(foreach: bool, clip: float) -> None:
    p = ones(3)
    optimiser = Adan([p], lr=0.1, max_grad_norm=clip, foreach=foreach)
    gradients = random_gradients([(3,)], 3)
    for step in gradients:
        feed(optimiser, [p], [step])
        assert p.grad is not None
        assert torch.equal(p.grad, step[0])


def test_the_norm_is_taken_over_all_groups() -> None:
    a, b = ones(1), ones(1)
    optimiser = Adan([{"params": [a]}, {"params": [b], "lr": 0.2}], lr=0.1, max_grad_norm=1.0)
    feed(optimiser, [a, b], [[torch.tensor([3.0]).double(), torch.tensor([4.0]).double()]])
    assert optimiser.state[a]["neg_prev_grad"].item() == pytest.approx(-0.6, rel=1e-8)
    assert optimiser.state[b]["neg_prev_grad"].item() == pytest.approx(-0.8, rel=1e-8)


# ------------------------------------------------------------------ which tensors take part


@PATHS
def test_parameters_without_gradient_are_untouched(foreach: bool) -> None:
    used, unused, frozen = ones(2), ones(2), ones(2)
    frozen.requires_grad_(False)
    optimiser = Adan([used, unused, frozen], lr=0.1, weight_decay=0.5, foreach=foreach)
    used.grad = torch.ones(2, dtype=torch.float64)
    optimiser.step()
    assert not torch.equal(used.detach(), torch.ones(2, dtype=torch.float64))
    for p in (unused, frozen):
        assert torch.equal(p.detach(), torch.ones(2, dtype=torch.float64))
        assert p not in optimiser.state


def test_a_step_without_any_gradient_does_nothing() -> None:
    p = ones(2)
    optimiser = Adan([p], restart_condition=lambda k, path_length: True)
    assert optimiser.step() is None
    assert optimiser.param_groups[0]["step"] == 0
    assert torch.equal(p.detach(), torch.ones(2, dtype=torch.float64))


@PATHS
def test_shared_weights_are_updated_once(foreach: bool) -> None:
    layer = nn.Linear(3, 3, bias=False, dtype=torch.float64)
    tied = nn.Sequential(layer, layer)
    before = layer.weight.detach().clone()
    optimiser = Adan(tied.parameters(), lr=0.1, foreach=foreach)
    tied(torch.ones(1, 3, dtype=torch.float64)).sum().backward()
    sign = layer.weight.grad.sign()  # type: ignore[union-attr]
    optimiser.step()
    torch.testing.assert_close(layer.weight.detach(), before - 0.1 * sign, rtol=0, atol=1e-7)


@PATHS
def test_a_tensor_that_joins_late_is_corrected_with_the_groups_count(foreach: bool) -> None:
    early, late, alone = ones(1), ones(1), ones(1)
    optimiser = Adan([{"params": [early, late]}, {"params": [alone]}], lr=0.1, eps=0.0, foreach=foreach)
    g = torch.ones(1, dtype=torch.float64)
    for step in range(10):
        early.grad = g
        late.grad, alone.grad = (g, g) if step == 9 else (None, None)
        optimiser.step()
    expected = 0.1 * (0.02 / (1 - 0.98**10)) / math.sqrt(0.01 / (1 - 0.99**10))
    assert 1 - late.item() == pytest.approx(expected, rel=1e-12)
    assert 1 - alone.item() == pytest.approx(0.1, rel=1e-12)  # a group of its own counts its own steps


def test_a_missing_gradient_keeps_the_last_one_for_the_difference() -> None:
    p, other = ones(1), ones(1)
    optimiser = Adan([p, other])
    for g in (1.0, None, 3.0):
        p.grad = None if g is None else torch.tensor([g], dtype=torch.float64)
        other.grad = torch.ones(1, dtype=torch.float64)
        optimiser.step()
    assert optimiser.state[p]["exp_avg_diff"].item() == pytest.approx(0.08 * 2.0, rel=1e-12)


def test_state_is_four_tensors() -> None:
    p = ones(7, 3, dtype=torch.float32)
    optimiser = Adan([p])
    feed(optimiser, [p], [[torch.ones(7, 3)]])
    state = optimiser.state[p]
    assert sum(t.numel() * t.element_size() for t in state.values()) == 4 * 21 * 4
    assert len({t.untyped_storage().data_ptr() for t in [*state.values(), p.grad, p]}) == 6


# ------------------------------------------------------------------ dtypes


@PATHS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_parameters_have_float32_state(dtype: torch.dtype, foreach: bool) -> None:
    p, master = ones(50, dtype=dtype), ones(50, dtype=torch.float32)
    optimiser = Adan([p], lr=0.01, foreach=foreach, max_grad_norm=1.0)
    for step in random_gradients([(50,)], 5):
        half = step[0].to(dtype)
        feed(optimiser, [p], [[half]])
    assert p.dtype == dtype
    assert {t.dtype for t in optimiser.state[p].values()} == {torch.float32}
    reference_ = Adan([master], lr=0.01, max_grad_norm=1.0)
    feed(reference_, [master], [[step[0].to(dtype).float()] for step in random_gradients([(50,)], 5)])
    for name, tensor in optimiser.state[p].items():
        assert torch.equal(tensor, reference_.state[master][name])
    resolution = torch.finfo(dtype).eps
    torch.testing.assert_close(p.detach().float(), master.detach(), rtol=0, atol=5 * resolution)


def test_mixed_dtypes_in_one_group() -> None:
    def run(foreach: bool) -> list[Tensor]:
        params = [ones(3, dtype=d) for d in (torch.float32, torch.bfloat16, torch.float64, torch.float32)]
        gradients = [[torch.full((3,), 0.3, dtype=p.dtype) for p in params]] * 3
        feed(Adan(params, lr=0.1, foreach=foreach), params, gradients)
        return [p.detach() for p in params]

    assert all(torch.equal(a, b) for a, b in zip(run(False), run(True), strict=True))
    torch.testing.assert_close(run(True)[2], torch.full((3,), 0.7, dtype=torch.float64), rtol=0, atol=1e-6)


# ------------------------------------------------------------------ restart


def test_restart_condition_sees_the_weighted_path_and_restarts() -> None:
    seen: list[tuple[int, float]] = []
    radius = 0.5

    def condition(k: int, path_length: float) -> bool:
        seen.append((k, path_length))
        return k * path_length > radius**2

    p = ones(2)
    path = [np.ones(2)] + [x.numpy() for x in descend(Adan([p], lr=0.1, restart_condition=condition), p, 8)]
    n, previous, length, k, restarts = np.zeros(2), None, 0.0, 0, 0
    for number, (k_seen, length_seen) in enumerate(seen):
        g = quadratic_gradient(path[number])
        d = 0 if previous is None else g - previous
        k += 1
        n = 0.99 * n + 0.01 * (g + 0.92 * d) ** 2
        length += float(np.sum((path[number + 1] - path[number]) ** 2 * np.sqrt(n / (1 - 0.99**k))))
        assert (k_seen, length_seen) == (k, pytest.approx(length, rel=1e-12))
        previous = g
        if k * length > radius**2:
            n, previous, length, k, restarts = np.zeros(2), None, 0.0, 0, restarts + 1
    assert len(seen) == 8
    assert restarts >= 2


def test_a_condition_that_never_holds_changes_nothing() -> None:
    p, q = ones(2), ones(2)
    a = descend(Adan([p], lr=0.1, restart_condition=lambda k, path_length: False), p, 10)
    b = descend(Adan([q], lr=0.1), q, 10)
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


# ------------------------------------------------------------------ the torch.optim interface


@PATHS
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_state_dict_round_trip_continues_the_same_run(dtype: torch.dtype, foreach: bool) -> None:
    options = {"weight_decay": 0.1, "max_grad_norm": 5.0, "foreach": foreach}
    p = ones(2, dtype=dtype)
    optimiser = Adan([p], lr=0.1, restart_condition=lambda k, path_length: k > 100, **options)
    descend(optimiser, p, 3)
    file = io.BytesIO()
    torch.save({"model": p.detach(), "optimiser": optimiser.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    straight = descend(optimiser, p, 4)

    q = nn.Parameter(saved["model"].clone())
    other = Adan(
        [q], lr=0.7, restart_condition=lambda k, path_length: k > 100
    )  # other values: loading must replace them
    fresh = nn.Parameter(saved["model"].clone())
    blank = Adan([fresh], lr=0.1, **options)
    descend(blank, fresh, 4)
    other.load_state_dict(saved["optimiser"])
    resumed = descend(other, q, 4)
    assert all(torch.equal(a, b) for a, b in zip(straight, resumed, strict=True))
    assert other.param_groups[0]["path_length"] == optimiser.param_groups[0]["path_length"] > 0
    for name, tensor in optimiser.state[p].items():
        assert torch.equal(other.state[q][name], tensor)
    assert not torch.equal(blank.state[fresh]["exp_avg"], optimiser.state[p]["exp_avg"])  # negative control


def test_loading_does_not_share_tensors() -> None:
    p, q = ones(2), ones(2)
    a, b = Adan([p], lr=0.1), Adan([q], lr=0.1)
    descend(a, p, 2)
    b.load_state_dict(a.state_dict())
    before = a.state[p]["exp_avg"].clone()
    descend(b, q, 1)
    assert torch.equal(a.state[p]["exp_avg"], before)


def test_a_copy_keeps_the_restart_condition() -> None:
    p = ones(2)
    optimiser = Adan([p], lr=0.1, restart_condition=_always)
    twin = copy.deepcopy(optimiser)
    q = twin.param_groups[0]["params"][0]
    q.grad = torch.ones(2, dtype=torch.float64)
    twin.step()
    assert twin.param_groups[0]["step"] == 0
    assert not twin.state


def _always(k: int, path_length: float) -> bool:
    return True


def test_closure_is_called_once_with_gradients_enabled() -> None:
    p = ones(2)
    optimiser = Adan([p], lr=0.1)
    calls = []

    def closure() -> Tensor:
        calls.append(torch.is_grad_enabled())
        optimiser.zero_grad()
        loss = 0.5 * (CURVATURE * p**2).sum()
        loss.backward()
        return loss

    with torch.no_grad():
        loss = optimiser.step(closure)
    assert calls == [True]
    assert float(loss.detach()) == 5.5
    assert p[0].item() == pytest.approx(0.900000001, abs=1e-12)


def test_learning_rate_as_a_tensor_follows_a_schedule() -> None:
    def run(lr: float | Tensor, foreach: bool) -> list[Tensor]:
        p = ones(2)
        optimiser = Adan([p], lr=lr, foreach=foreach)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda k: 1 / (1 + k))
        path = []
        for _ in range(4):
            path += descend(optimiser, p, 1)
            schedule.step()
        return path

    expected = run(0.1, False)
    for foreach in (False, True):
        for a, b in zip(run(torch.tensor(0.1, dtype=torch.float64), foreach), expected, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-15)


def test_named_parameters_and_added_groups() -> None:
    model = nn.Linear(2, 1)
    optimiser = Adan(model.named_parameters(), lr=0.1)
    extra = ones(2, dtype=torch.float32)
    model(torch.ones(1, 2)).sum().backward()
    optimiser.step()
    optimiser.add_param_group({"params": [("extra", extra)], "lr": 0.5})
    extra.grad = torch.ones(2)
    optimiser.step()
    assert extra[0].item() == pytest.approx(0.5, abs=1e-6)  # its own first step, at its own rate
    assert [group["step"] for group in optimiser.param_groups] == [2, 1]


def test_the_update_function_alone_makes_the_step() -> None:
    group = {"betas": BETAS, "lr": 0.1, "eps": 1e-8, "weight_decay": 0.0, "no_prox": False, "step": 1}
    p, g = torch.ones(2, dtype=torch.float64), torch.tensor([1.0, 10.0], dtype=torch.float64)
    m, v, n = (torch.zeros(2, dtype=torch.float64) for _ in range(3))
    previous = -g
    adan_update(p, g, m, v, n, previous, Coefficients.of(group))
    assert p.tolist() == pytest.approx([0.900000001, 0.9000000001], abs=1e-13)
    assert previous.tolist() == [-1.0, -10.0]


# ------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -1e-3}, "lr is -0.001"),
        ({"lr": float("nan")}, "lr is nan"),
        ({"lr": float("inf")}, "lr is inf"),
        ({"lr": "1e-3"}, "lr is '1e-3'"),
        ({"lr": torch.ones(2)}, "shape"),
        ({"lr": torch.tensor(-1.0)}, "lr is -1.0"),
        ({"eps": -1e-8}, "eps"),
        ({"weight_decay": -0.1}, "weight_decay"),
        ({"weight_decay": float("nan")}, "weight_decay"),
        ({"max_grad_norm": -1.0}, "max_grad_norm"),
        ({"max_grad_norm": float("nan")}, "max_grad_norm"),
        ({"betas": (1.0, 0.92, 0.99)}, "betas"),
        ({"betas": (0.98, -0.1, 0.99)}, "betas"),
        ({"betas": (0.98, 0.92, float("nan"))}, "betas"),
        ({"betas": (0.9, 0.999)}, "three decay factors"),
        ({"foreach": "yes"}, "foreach"),
        ({"restart_condition": 3}, "restart_condition"),
    ],
)
def test_bad_hyperparameters_are_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Adan([ones(2)], **options)
    if "restart_condition" not in options:
        with pytest.raises(ValueError, match=message):
            Adan([{"params": [ones(2)], **options}])


def test_unknown_hyperparameters_are_refused() -> None:
    with pytest.raises(TypeError, match="momentum"):
        Adan([ones(2)], momentum=0.9)  # type: ignore[call-arg]


@pytest.mark.parametrize(
    ("group", "message"),
    [
        ({"params": [ones(2)], "lr": -1.0}, "lr is -1.0"),
        ({"params": [ones(2)], "max_grad_norm": 3.0}, "once"),
        ({"params": [nn.Parameter(torch.ones(2, dtype=torch.complex64))]}, "complex64"),
    ],
)
def test_a_bad_group_leaves_the_optimiser_as_it_was(group: dict, message: str) -> None:
    optimiser = Adan([ones(2)])
    with pytest.raises(ValueError, match=message):
        optimiser.add_param_group(group)
    assert len(optimiser.param_groups) == 1


@PATHS
def test_sparse_gradients_are_refused_before_anything_changes(foreach: bool) -> None:
    table, dense = nn.Embedding(4, 2, sparse=True), ones(2, dtype=torch.float32)
    optimiser = Adan([dense, table.weight], foreach=foreach)
    (table(torch.tensor([1])).sum() + dense.sum()).backward()
    with pytest.raises(RuntimeError, match="sparse=False"):
        optimiser.step()
    assert torch.equal(dense.detach(), torch.ones(2))
    assert optimiser.param_groups[0]["step"] == 0
    assert not optimiser.state
