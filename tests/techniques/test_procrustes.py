"""Tests of DropBack: plain SGD when off, a masked step written out, the budget, the stream's known values, resuming."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from leantrain.techniques.procrustes import DropBack, initial_rate, stream_select, top_threshold, zero_share


def net(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(6 * 16, 10))


def batches(count: int, seed: int = 1) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(16, 1, 6, 6, generator=generator), torch.randint(0, 10, (16,), generator=generator))
        for _ in range(count)
    ]


def train(model: nn.Module, optimizer: torch.optim.Optimizer, data: list) -> None:
    for x, y in data:
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()


def parameters(model: nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()])


@pytest.mark.parametrize("options", [{}, {"momentum": 0.9}, {"momentum": 0.9, "weight_decay": 1e-2}])
@pytest.mark.parametrize("decay", [1.0, 0.9])
def test_with_the_full_budget_it_is_sgd_to_the_last_bit(options, decay):
    ours, theirs = net(), net()
    train(ours, DropBack(ours.parameters(), lr=0.1, keep=1.0, decay=decay, **options), batches(12))
    train(theirs, torch.optim.SGD(theirs.parameters(), lr=0.1, **options), batches(12))
    assert torch.equal(parameters(ours), parameters(theirs))


def test_with_no_budget_the_weights_are_the_decayed_initial_ones():
    model = net()
    first = copy.deepcopy(model.state_dict())
    optimizer = DropBack(model.parameters(), lr=0.1, keep=0.0, decay=0.5)
    for step, batch in enumerate(batches(30)):
        train(model, optimizer, [batch])
        for name in ("0.weight", "4.weight"):
            expected = first[name] * (0.5**step if 0.5**step >= 1e-7 else 0.0)
            assert torch.equal(model.state_dict()[name], expected)
    assert zero_share(model) == 100.0
    assert not torch.equal(model.state_dict()["4.bias"], first["4.bias"])  # outside the budget


@pytest.mark.parametrize("decay_tracked", [False, True])
@pytest.mark.parametrize("include_1d", [False, True])
def test_the_step_equals_a_masked_step_written_out(include_1d, decay_tracked):
    """NumPy in float64, all weights in one vector: the update, the score, a full sort, the reset."""
    model = net().double()
    keep, decay, lr, wd = 0.2, 0.8, 0.05, 1e-2
    names = [n for n, p in model.named_parameters() if include_1d or p.ndim >= 2]
    mine = {n: p.detach().numpy().copy() for n, p in model.named_parameters()}
    initial = {n: mine[n].copy() for n in names}
    k = round(keep * sum(initial[n].size for n in names))
    optimizer = DropBack(
        model.parameters(),
        lr=lr,
        keep=keep,
        decay=decay,
        weight_decay=wd,
        decay_tracked=decay_tracked,
        include_1d=include_1d,
    )
    for step, (x, y) in enumerate(batches(80)):
        reference = net().double()
        reference.load_state_dict(model.state_dict())
        with torch.no_grad():
            for n, p in reference.named_parameters():
                p.copy_(torch.from_numpy(mine[n]))
        F.cross_entropy(reference(x.double()), y).backward()
        rate = decay**step if decay**step >= 1e-7 else 0.0
        before = 0.0 if step == 0 else decay ** (step - 1) if decay ** (step - 1) >= 1e-7 else 0.0
        for n, p in reference.named_parameters():
            moved = mine[n] + (rate - before) * initial[n] if decay_tracked and step and n in names else mine[n]
            # PyTorch's gradient is that at the weights before the initial part decays.
            mine[n] = moved - lr * (p.grad.numpy() + wd * moved)
        scores = np.concatenate([np.abs(mine[n] - rate * initial[n]).reshape(-1) for n in names])
        kept = np.zeros(scores.size, dtype=bool)
        kept[np.argsort(scores)[scores.size - k :]] = True
        place = 0
        for n in names:
            mask = kept[place : place + mine[n].size].reshape(mine[n].shape)
            mine[n] = np.where(mask, mine[n], rate * initial[n])
            place += mine[n].size
        train(model, optimizer, [(x.double(), y)])
        for n, p in model.named_parameters():
            np.testing.assert_allclose(p.detach().numpy(), mine[n], rtol=1e-9, atol=1e-12)
    nonzero = sum(int((p != 0).sum()) for n, p in model.named_parameters() if n in names)
    assert nonzero == k


@pytest.mark.parametrize("decay", [1.0, 0.7])
def test_no_more_than_the_budget_differs_from_the_initial_weights(decay):
    model = net()
    optimizer = DropBack(model.parameters(), lr=0.1, keep=0.1, decay=decay)
    assert sum(int(optimizer.tracked(w).sum()) for w in optimizer.weights) == 0
    for batch in batches(60):
        train(model, optimizer, [batch])
        assert sum(int(optimizer.tracked(w).sum()) for w in optimizer.weights) <= optimizer.budget
    if decay < 1:  # the initial weights are gone: as many non-zeros as the budget allows, and no copy is kept
        assert sum(int((w != 0).sum()) for w in optimizer.weights) == optimizer.budget
        assert not any("initial" in optimizer.state[w] for w in optimizer.weights)
    else:
        assert zero_share(model) < 1


def test_momentum_of_untracked_weights_is_reset():
    model = net()
    optimizer = DropBack(model.parameters(), lr=0.1, keep=0.1, decay=0.5, momentum=0.9)
    train(model, optimizer, batches(40))
    for weight in optimizer.weights:
        buffer = optimizer.state[weight]["momentum_buffer"]
        assert not buffer[~optimizer.tracked(weight)].any()
        assert buffer[optimizer.tracked(weight)].any()


@pytest.mark.parametrize("selection", ["topk", "stream"])
@pytest.mark.parametrize("cut", [5, 45])  # before and after the initial weights are gone
def test_a_resumed_run_equals_an_uninterrupted_one(selection, cut, tmp_path):
    options = {"keep": 0.1, "decay": 0.6, "selection": selection, "momentum": 0.5, "beta": 1e-3}
    data = batches(60)
    whole = net()
    straight = DropBack(whole.parameters(), lr=0.1, **options)
    train(whole, straight, data)
    part = net()
    optimizer = DropBack(part.parameters(), lr=0.1, **options)
    train(part, optimizer, data[:cut])
    torch.save([part.state_dict(), optimizer.state_dict()], tmp_path / "state.pt")
    weights, state = torch.load(tmp_path / "state.pt", weights_only=True)
    again = net(seed=9)
    again.load_state_dict(weights)
    # Another learning rate and threshold, so that loading must have taken effect.
    resumed = DropBack(again.parameters(), lr=7.0, threshold=0.5, **options)
    resumed.load_state_dict(state)
    train(again, resumed, data[cut:])
    assert torch.equal(parameters(again), parameters(whole))
    assert (resumed.steps, resumed.threshold, resumed.rate) == (straight.steps, straight.threshold, straight.rate)
    unresumed = net(seed=9)
    unresumed.load_state_dict(weights)
    train(unresumed, DropBack(unresumed.parameters(), lr=0.1, **options), data[cut:])
    assert not torch.equal(parameters(unresumed), parameters(whole))


@pytest.mark.parametrize("options", [{}, {"selection": "stream"}])
def test_memory_format_changes_nothing_but_rounding(options):
    plain, last = net(), net().to(memory_format=torch.channels_last)
    one = DropBack(plain.parameters(), lr=0.1, keep=0.3, decay=0.9, **options)
    two = DropBack(last.parameters(), lr=0.1, keep=0.3, decay=0.9, **options)
    data = batches(3)
    train(plain, one, data)
    train(last, two, [(x.contiguous(memory_format=torch.channels_last), y) for x, y in data])
    assert torch.allclose(parameters(plain), parameters(last), atol=1e-5)


def test_initial_weights_decay_to_an_exact_zero_where_repeated_multiplication_would_not():
    assert initial_rate(0, 0.9) == 1.0
    assert initial_rate(152, 0.9) == pytest.approx(0.9**152)
    assert initial_rate(153, 0.9) == 0.0  # the first below 1e-7
    rates = 0.1 * np.power(0.9, np.arange(1200, dtype=np.float64))
    single = rates.astype(np.float32)
    assert int(np.argmax(single == 0)) == 965
    assert int(np.argmax(single < np.finfo(np.float32).tiny)) == 808
    value = np.float32(0.1)
    for _ in range(5000):
        value = np.float32(value * np.float32(0.9))
    assert value > 0
    assert float(value) == pytest.approx(6e-45, rel=0.1)


TABLE = {  # |N(0, 1)|, its 0.9-quantile is 1.6449: mean, relative spread, share kept
    1e-2: (1.646, 0.036, 0.1005),
    1e-3: (1.645, 0.012, 0.1001),
    1e-4: (1.644, 0.006, 0.1003),
}


@pytest.mark.parametrize("beta", TABLE)
def test_the_stream_finds_the_quantile(beta):
    mean, spread, kept = TABLE[beta]
    scores = np.abs(np.random.default_rng(0).standard_normal(4_000_000)).astype(np.float32)
    estimates, q, hits = [], 1.6449, 0
    for part in np.array_split(scores, 4000):
        tracked, q = stream_select(part, q, 0.9, beta=beta)
        hits += int(tracked.sum())
        estimates.append(q)
    assert np.mean(estimates) == pytest.approx(mean, rel=0.006)
    assert np.std(estimates) / np.mean(estimates) == pytest.approx(spread, rel=0.5)
    assert hits / scores.size == pytest.approx(kept, rel=0.02)


@pytest.mark.parametrize(("start", "samples"), [(1e-2, 14_000), (1e-6, 23_000)])
def test_how_long_the_stream_needs_from_far_below(start, samples):
    scores = np.abs(np.random.default_rng(1).standard_normal(2 * samples)).astype(np.float32)
    q, needed = start, 0
    for part in np.array_split(scores, 2 * samples // 100):
        _, q = stream_select(part, q, 0.9, beta=1e-3)
        needed += len(part)
        if abs(q / 1.6449 - 1) < 0.05:
            break
    assert needed == pytest.approx(samples, rel=0.2)


def by_hand(scores: np.ndarray, q: float, tau: float, beta: float, width: int) -> tuple[list[bool], float]:
    tracked: list[bool] = []
    for first in range(0, len(scores), width):
        together = scores[first : first + width]
        # A score at the threshold itself may fall to either side, for the sums are rounded in another order.
        assume(all(abs(x - q) > 1e-9 * q for x in together))
        tracked += [bool(x > q) for x in together]
        q *= np.mean([1 + beta * tau if x > q else 1 - beta * (1 - tau) for x in together])
    return tracked, float(q)


@settings(max_examples=60, deadline=None)
@given(
    scores=st.lists(st.floats(0, 10, width=32), min_size=1, max_size=40),
    q=st.floats(1e-6, 5),
    tau=st.floats(0.05, 0.99),
    beta=st.floats(1e-5, 0.9),
    width=st.integers(1, 5),
)
def test_the_stream_equals_the_rule_by_hand(scores, q, tau, beta, width):
    values = np.array(scores, dtype=np.float32)
    expected, end = by_hand(values, q, tau, beta, width)
    tracked, estimate = stream_select(values, q, tau, beta=beta, per_cycle=width)
    assert estimate == pytest.approx(end, rel=1e-9)
    assert estimate > 0
    assert tracked.tolist() == expected


@pytest.mark.parametrize("width", [1, 4])
def test_the_stream_scales_with_the_scores(width):
    scores = np.abs(np.random.default_rng(2).standard_normal(5000))
    one, q = stream_select(scores, 0.3, 0.9, beta=1e-3, per_cycle=width)
    two, scaled = stream_select(1024 * scores, 1024 * 0.3, 0.9, beta=1e-3, per_cycle=width)
    assert scaled == 1024 * q
    assert (one == two).all()


@settings(max_examples=60, deadline=None)
@given(scores=st.lists(st.floats(0, 5, width=32), min_size=1, max_size=30), data=st.data())
def test_the_exact_threshold_lets_no_more_through_than_the_budget(scores, data):
    keep = data.draw(st.integers(0, len(scores)))
    tensor = torch.tensor(scores)
    above = int((tensor > top_threshold(tensor, keep)).sum())
    assert above <= keep
    if len(set(scores)) == len(scores):
        assert above == keep


def test_the_stream_keeps_about_the_budget_in_training():
    model = nn.Sequential(nn.Flatten(), nn.Linear(36, 200), nn.ReLU(), nn.Linear(200, 10))
    optimizer = DropBack(model.parameters(), lr=0.1, keep=0.2, decay=0.8, selection="stream", beta=1e-3)
    train(model, optimizer, batches(150))
    nonzero = sum(int((w != 0).sum()) for w in optimizer.weights)
    assert nonzero / optimizer.total == pytest.approx(0.2, abs=0.02)
    assert optimizer.threshold > 0


def test_the_step_of_the_estimate_depends_on_the_size():
    small, large = nn.Linear(10, 10), nn.Linear(400, 300)
    assert DropBack(small.parameters()).beta == 1e-4
    assert DropBack(large.parameters()).beta == 1e-5
    assert DropBack(large.parameters(), beta=0.3).beta == 0.3


def test_a_closure_is_evaluated_before_the_selection():
    model = nn.Linear(20, 10)
    optimizer = DropBack(model.parameters(), lr=0.1, keep=0.1, decay=0.1)

    def closure() -> float:
        optimizer.zero_grad()
        loss = model(torch.ones(4, 20)).square().sum()
        loss.backward()
        return float(loss.detach())

    losses = [optimizer.step(closure) for _ in range(12)]
    assert losses[0] is not None
    assert int((model.weight != 0).sum()) == 20


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"keep": -0.1}, "keep is -0.1"),
        ({"keep": 1.1}, "keep is 1.1"),
        ({"keep": float("nan")}, "keep is nan"),
        ({"decay": 0.0}, "decay is 0.0"),
        ({"decay": 1.1}, "decay is 1.1"),
        ({"selection": "sort"}, "selection is 'sort'"),
        ({"beta": 1.0}, r"beta is 1\.0"),
        ({"beta": 0.0}, r"beta is 0\.0"),
        ({"threshold": 0.0}, "never leaves 0"),
        ({"threshold": float("inf")}, "threshold is inf"),
        ({"per_cycle": 0}, "per_cycle is 0"),
        ({"lr": -1.0}, "learning rate"),
    ],
)
def test_bad_hyperparameters_are_refused_by_name(options, message):
    with pytest.raises(ValueError, match=message):
        DropBack(nn.Linear(3, 3).parameters(), **options)


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match="keep is 4"):
        top_threshold(torch.rand(3), 4)
    with pytest.raises(ValueError, match=r"quantile is 1\.0"):
        stream_select(np.ones(3, np.float32), 1.0, 1.0, beta=0.1)
    with pytest.raises(ValueError, match="dtype int64"):
        stream_select(np.ones(3, np.int64), 1.0, 0.5, beta=0.1)
    with pytest.raises(ValueError, match="step is -1"):
        initial_rate(-1, 0.9)
    with pytest.raises(TypeError):
        DropBack(nn.Linear(3, 3).parameters(), budget=3)  # type: ignore[call-arg]
    embedding = nn.Embedding(5, 3, sparse=True)
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(ValueError, match="dense gradients"):
        DropBack(embedding.parameters(), keep=0.5).step()
