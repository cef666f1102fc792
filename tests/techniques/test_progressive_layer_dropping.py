"""Progressive layer dropping: schedules at known points, equality with the plain stack, what is skipped, surgery."""

from __future__ import annotations

import copy
import math
import pickle
from functools import partial

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.models import VisionTransformer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader

from leantrain.measure import count_macs, count_parameters, saved_activation_bytes
from leantrain.techniques.progressive_layer_dropping import (
    KeepSchedule,
    LayerDropping,
    ProgressiveStack,
    SwitchableBlock,
    forward_macs,
    pre_ln_bert,
    theta,
)
from leantrain.training.masked_language_model import MaskedLanguageModel

FULL = KeepSchedule(limit=0.5, gamma=math.inf)
DIM, HEADS = 16, 2


def small_stack(depth: int = 6, dropout: float = 0.0, seed: int = 0) -> ProgressiveStack:
    torch.manual_seed(3)
    return ProgressiveStack(*(SwitchableBlock(DIM, HEADS, 2.0, dropout=dropout) for _ in range(depth)), seed=seed)


def tokens(batch: int = 2, count: int = 5, dim: int = DIM) -> Tensor:
    return torch.randn(batch, count, dim, generator=torch.Generator().manual_seed(1))


class Plain(nn.Module):
    """A PreLN block written a second time, with the parameters of a switchable one."""

    def __init__(self, block: SwitchableBlock) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        b = self.block
        y = F.layer_norm(x, x.shape[-1:], b.norm1.weight, b.norm1.bias, 1e-12)
        parts = (y @ b.qkv.weight.T + b.qkv.bias).split(x.shape[-1], dim=-1)
        q, k, v = (p.unflatten(-1, (b.heads, -1)).transpose(1, 2) for p in parts)
        weights = (q @ k.transpose(2, 3) / q.shape[-1] ** 0.5).softmax(-1)
        y = (weights @ v).transpose(1, 2).flatten(2) @ b.proj.weight.T + b.proj.bias
        h = x + scale * y
        y = F.layer_norm(h, x.shape[-1:], b.norm2.weight, b.norm2.bias, 1e-12)
        first, _, second = b.mlp
        y = y @ first.weight.T + first.bias
        y = 0.5 * y * (1 + torch.erf(y / 2**0.5))
        return h + scale * (y @ second.weight.T + second.bias)


# ---------------------------------------------------------------- the schedules


def test_theta_at_known_points() -> None:
    expected = {0: 1.0, 100: 0.952419, 500: 0.803265, 1000: 0.683940, 2000: 0.567668, 5000: 0.503369}
    for step, value in expected.items():
        assert theta(step, 0.5, 0.001) == pytest.approx(value, abs=5e-7)


@given(st.floats(0, 0.99), st.floats(1e-6, 0.1), st.integers(0, 50))
def test_theta_starts_at_one_and_falls_towards_the_limit(limit: float, gamma: float, step: int) -> None:
    assert theta(0, limit, gamma) == 1
    assert limit < theta(step + 1, limit, gamma) < theta(step, limit, gamma) <= 1
    assert theta(10**9, limit, gamma) == pytest.approx(limit, abs=1e-12)


def test_theta_without_decay_and_without_delay() -> None:
    assert theta(10**6, 0.5, 0.0) == 1
    assert theta(0, 0.5, math.inf) == theta(9, 0.5, math.inf) == 0.5
    assert theta(10**6, 1.0, 0.01) == 1


def test_keep_probabilities_of_both_ways_to_count_the_blocks() -> None:
    first = FULL.keep(0, 12)
    assert first == pytest.approx([1 - i / 24 for i in range(12)])
    assert first[0] == 1
    assert first[-1] == pytest.approx(0.541667, abs=5e-7)
    last = KeepSchedule(0.5, math.inf, first_kept=False).keep(0, 12)
    assert last[0] == pytest.approx(0.958333, abs=5e-7)
    assert last[-1] == 0.5


@pytest.mark.parametrize(
    ("limit", "first_kept", "first_out"),
    [(0.5, 9.25, 8.75), (0.6, 9.80, 9.40), (0.7, 10.35, 10.05), (0.8, 10.90, 10.70), (0.9, 11.45, 11.35)],
)
def test_mean_depth_of_twelve_blocks(limit: float, first_kept: float, first_out: float) -> None:
    for counted, expected in ((True, first_kept), (False, first_out)):
        for shape in ("linear", "uniform"):
            schedule = KeepSchedule(limit, math.inf, shape, counted)  # type: ignore[arg-type]
            assert schedule.mean_depth(0, 12) == pytest.approx(expected)


@given(st.integers(1, 40), st.floats(0.01, 1), st.integers(0, 10_000), st.booleans())
def test_linear_and_uniform_spend_the_same_and_depth_costs_probability(
    depth: int, limit: float, step: int, first_kept: bool
) -> None:
    linear = KeepSchedule(limit, 1e-3, "linear", first_kept)
    uniform = KeepSchedule(limit, 1e-3, "uniform", first_kept)
    p, q = linear.keep(step, depth), uniform.keep(step, depth)
    assert all(0 < x <= 1 for x in (*p, *q))
    assert list(p) == sorted(p, reverse=True)
    assert len(set(q)) == 1
    assert sum(p) == pytest.approx(sum(q))


def test_mean_depth_of_a_run() -> None:
    # The mean of theta over a long run with gamma T = 100 is 0.505, with gamma T = 10 it is 0.550.
    for decay, mean in ((100, 0.505), (10, 0.55)):
        steps = 20_000
        depth = KeepSchedule(0.5, decay / steps).mean_depth_of_run(steps, 12)
        assert depth == pytest.approx(12 - (1 - mean) * 5.5, abs=2e-3)
    assert KeepSchedule(1.0, 0.1).mean_depth_of_run(7, 12) == 12


def test_a_limit_of_zero_is_legal_while_the_first_block_is_kept() -> None:
    assert KeepSchedule(0.0, math.inf).keep(0, 4) == (1, 0.75, 0.5, 0.25)
    assert KeepSchedule(0.0, 0.1).keep(10, 4)[-1] == pytest.approx(1 - 0.75 * (1 - math.exp(-1)))
    with pytest.raises(ValueError, match="block 3 of 4 would never run"):
        KeepSchedule(0.0, math.inf, first_kept=False).keep(0, 4)


@pytest.mark.parametrize("limit", [-0.1, 1.1, math.nan])
def test_a_limit_out_of_range_is_refused(limit: float) -> None:
    for build in (partial(KeepSchedule, limit), partial(theta, 0, limit, 0.1), partial(LayerDropping, limit)):
        with pytest.raises(ValueError, match="keep limit"):
            build()


def test_other_numbers_out_of_range_are_refused() -> None:
    for gamma in (-1e-9, math.nan):
        with pytest.raises(ValueError, match="decay"):
            KeepSchedule(0.5, gamma)
    with pytest.raises(ValueError, match="negative, got -1"):
        theta(-1, 0.5, 0.1)
    with pytest.raises(ValueError, match="depth 0"):
        FULL.keep(0, 0)
    with pytest.raises(ValueError, match="got 0"):
        FULL.mean_depth_of_run(0, 12)
    with pytest.raises(ValueError, match="'square'"):
        KeepSchedule(over_depth="square")  # type: ignore[arg-type]


# ---------------------------------------------------------------- the block


@pytest.mark.parametrize("scale", [1.0, 1.6])
def test_the_block_is_pre_ln_with_both_branches_scaled(scale: float) -> None:
    block = SwitchableBlock(DIM, HEADS, 2.0, dropout=0.0).double()
    x = tokens().double()
    torch.testing.assert_close(block(x, branch_scale=scale), Plain(block)(x, scale), atol=1e-12, rtol=0)


def test_gradients_are_those_of_finite_differences() -> None:
    block = SwitchableBlock(4, 2, 1.0, dropout=0.0).double()
    x = tokens(1, 3, 4).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda t: block(t, branch_scale=1.7), (x,))


def test_masks_and_causality() -> None:
    x = tokens().double()
    changed = x.clone()
    changed[:, 3:] *= -1  # a constant would vanish in the norm
    encoder, decoder = SwitchableBlock(DIM, HEADS, dropout=0.0), SwitchableBlock(DIM, HEADS, dropout=0.0, causal=True)
    encoder, decoder = encoder.double(), decoder.double()
    mask = torch.ones(5, 5, dtype=torch.bool).tril()
    for run in (lambda t: encoder(t, mask), decoder, lambda t: ProgressiveStack(encoder).double()(t, mask)):
        torch.testing.assert_close(run(x)[:, :3], run(changed)[:, :3])
        assert not torch.allclose(run(x)[:, 3:], run(changed)[:, 3:])
    assert not torch.allclose(encoder(x)[:, :3], encoder(changed)[:, :3])


def test_a_block_of_bert_base_has_its_parameters() -> None:
    with torch.device("meta"):
        assert count_parameters(SwitchableBlock(768, 12)) == 7_087_872
        bert = pre_ln_bert(30_522)
    assert count_parameters(bert.encoder) == 85_054_464


def test_the_formula_counts_what_the_model_multiplies() -> None:
    with torch.device("meta"):
        bert = pre_ln_bert(30_522)
        ids = torch.zeros(2, 128, dtype=torch.int64)
        # Two texts: the counter leaves out products with a single vector.
        whole, encoder = count_macs(bert, ids) // 2, count_macs(bert.encoder, torch.empty(2, 128, 768)) // 2
    parts = forward_macs(768, 128, 30_522, predicted=1.0)
    assert encoder == 12 * parts["block"]
    assert whole == 12 * parts["block"] + parts["head"]
    few = forward_macs(768, 128, 30_522)
    assert few["head"] / (12 * few["block"] + few["head"]) == pytest.approx(0.04, abs=0.005)


@pytest.mark.parametrize(
    ("arguments", "options", "named"),
    [
        ((10, 3), {}, "10 and 3"),
        ((0, 1), {}, "0 and 1"),
        ((8, 2, 0.0), {}, "got 0.0 for width 8"),
        ((8, 2), {"dropout": 1.0}, "got 1.0"),
    ],
)
def test_a_block_refuses_impossible_sizes(arguments: tuple, options: dict, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        SwitchableBlock(*arguments, **options)


# ---------------------------------------------------------------- the stack


def training_losses(model: nn.Module, stack: ProgressiveStack | None, schedule: KeepSchedule | None) -> list[float]:
    torch.manual_seed(11)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    losses = []
    for t in range(6):
        if stack is not None and schedule is not None:
            stack.begin_step(t, schedule.keep(t, len(stack)))
        loss = model(tokens()).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_switched_off_it_is_the_plain_stack_bit_for_bit_with_dropout_on() -> None:
    stack = small_stack(dropout=0.3)
    plain = nn.Sequential(*copy.deepcopy(list(stack)))
    off = KeepSchedule(limit=1.0, gamma=0.1)
    assert training_losses(stack, stack, off) == training_losses(plain, None, None)
    for ours, theirs in zip(stack.parameters(), plain.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_coins_leave_pytorchs_and_pythons_random_numbers_alone() -> None:
    import random

    stack = small_stack()
    stack.begin_step(4, FULL.keep(0, 6))
    torch.manual_seed(5)
    random.seed(5)
    expected = torch.rand(1), random.random()
    torch.manual_seed(5)
    random.seed(5)
    stack(tokens())
    assert not all(stack.gates), "this step drops something, else it would prove nothing"
    assert (torch.rand(1), random.random()) == expected


def test_in_evaluation_all_blocks_run_unscaled() -> None:
    stack = small_stack().eval()
    plain = nn.Sequential(*copy.deepcopy(list(stack))).eval()
    stack.begin_step(3, [0.5] * 6)
    assert torch.equal(stack(tokens()), plain(tokens()))
    assert stack.gates == (True,) * 6


def test_a_dropped_block_is_not_called_gets_no_gradient_and_is_not_updated() -> None:
    stack = small_stack(dropout=0.1)
    optimizer = torch.optim.AdamW(stack.parameters(), 0.1, weight_decay=0.5)
    calls = [0] * 6
    for i, block in enumerate(stack):
        block.register_forward_hook(lambda *_, i=i: calls.__setitem__(i, calls[i] + 1))
    stack(tokens()).square().mean().backward()  # all run: moments and weight decay are under way
    optimizer.step()
    optimizer.zero_grad()
    before = copy.deepcopy(stack.state_dict())
    stack.begin_step(1, [1, 0, 1, 0, 0, 1])
    stack(tokens()).square().mean().backward()
    optimizer.step()
    assert calls == [2, 1, 2, 1, 1, 2]
    for i, block in enumerate(stack):
        ran = i in (0, 2, 5)
        for name, parameter in block.named_parameters():
            assert (parameter.grad is not None) == ran
            assert torch.equal(parameter, before[f"{i}.{name}"]) != ran


def test_a_dropped_block_costs_neither_multiplications_nor_memory() -> None:
    stack = small_stack()
    x = tokens()

    def cost(keep: list[float]) -> tuple[int, int]:
        stack.begin_step(0, keep)
        macs = count_macs(stack, x)
        stack.begin_step(0, keep)
        return macs, saved_activation_bytes(lambda: stack(x))

    full, half = cost([1.0] * 6), cost([1.0, 0.0] * 3)
    assert 2 * half[0] == full[0]
    assert half[1] < 0.6 * full[1]


def test_the_scale_is_that_of_the_blocks_own_coin() -> None:
    """With probabilities p a linear residual stack ends at the product of 1 + w / p over the blocks that ran."""

    class Growth(nn.Module):
        def forward(self, x: Tensor, *, branch_scale: float = 1.0) -> Tensor:
            return x + branch_scale * 0.25 * x

    stack = ProgressiveStack(*(Growth() for _ in range(12)))
    keep = FULL.keep(0, 12)
    for step in range(5):
        stack.begin_step(step, keep)
        out = stack(torch.ones(3, dtype=torch.float64))
        expected = math.prod(1 + 0.25 / p for p, ran in zip(keep, stack.gates, strict=True) if ran)
        torch.testing.assert_close(out, torch.full((3,), expected, dtype=torch.float64))


class Affine(nn.Module):
    """x + Ax, a residual block that knows nothing of scales."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(4, 4, bias=False).double()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.a(x)


def test_the_mean_over_coins_is_the_full_output_and_with_the_next_blocks_scale_it_is_not() -> None:
    torch.manual_seed(0)
    block, x, p, following = Affine(), torch.randn(4, dtype=torch.float64), 0.6, 0.55
    stack = ProgressiveStack(block)
    full, draws = block(x) - x, 20_000
    total = torch.zeros_like(x)
    with torch.no_grad():
        for step in range(draws):
            stack.begin_step(step, [p])
            total += stack(x) - x
    mean = total / draws
    error = full.abs() * math.sqrt((1 - p) / p / draws)
    assert ((mean - full).abs() < 3 * error).all()
    # Dividing by the next block's probability instead makes the branch p / p' times as large: 9 % here, far outside.
    released = mean * p / following
    assert ((released - full).abs() > 3 * error).all()
    torch.testing.assert_close(released / full, torch.full_like(full, p / following), atol=0.02, rtol=0)


def test_a_block_without_a_scale_is_scaled_as_a_whole() -> None:
    torch.manual_seed(0)
    stack, x = ProgressiveStack(Affine(), Affine()), torch.randn(3, 4, dtype=torch.float64)
    stack.begin_step(0, [1.0, 1e-9])
    assert torch.equal(stack(x), stack[0](x))
    step = next(t for t in range(100) if random_gates(stack, t, [1.0, 0.5])[1])
    stack.begin_step(step, [1.0, 0.5])
    first = stack[0](x)
    torch.testing.assert_close(stack(x), first + 2 * (stack[1](first) - first))


def random_gates(stack: ProgressiveStack, step: int, keep: list[float]) -> tuple[bool, ...]:
    stack.begin_step(step, keep)
    return stack.throw(step)


def test_depth_has_the_expected_mean_and_spread() -> None:
    stack = small_stack(12)
    stack.begin_step(0, FULL.keep(0, 12))
    depths = torch.tensor([sum(stack.throw(t)) for t in range(2000)], dtype=torch.float64)
    assert depths.mean() == pytest.approx(9.25, abs=0.1)
    assert depths.std() == pytest.approx(1.37, abs=0.07)
    kept = torch.tensor([stack.throw(t) for t in range(2000)], dtype=torch.float64).mean(0)
    torch.testing.assert_close(kept, torch.tensor(FULL.keep(0, 12), dtype=torch.float64), atol=0.04, rtol=0)


def test_coins_depend_on_seed_step_and_micro_batch_alone() -> None:
    first, second, other = small_stack(12), small_stack(12), small_stack(12, seed=1)
    for stack in (first, second, other):
        stack.begin_step(0, FULL.keep(0, 12))
    steps = range(50)
    assert [first.throw(t) for t in steps] == [second.throw(t) for t in reversed(steps)][::-1]
    assert [first.throw(t) for t in steps] != [other.throw(t) for t in steps]
    assert [first.throw(t, 0) for t in steps] != [first.throw(t, 1) for t in steps]
    assert len({first.throw(t) for t in steps}) > 40


def test_every_forward_of_a_step_throws_its_own_coins() -> None:
    stack = small_stack(12)
    stack.begin_step(7, FULL.keep(0, 12))
    seen = []
    for _ in range(4):
        stack(tokens())
        seen.append(stack.gates)
    assert seen == [stack.throw(7, m) for m in range(4)]
    assert len(set(seen)) > 1
    stack.begin_step(7, FULL.keep(0, 12), micro_batch=2)
    stack(tokens())
    assert stack.gates == seen[2]


def test_a_stack_without_any_block_that_runs_is_the_identity_and_trains_the_rest() -> None:
    model = pre_ln_bert(20, max_length=5, dim=DIM, depth=3, heads=HEADS)
    model.encoder.begin_step(0, [0.0] * 3)
    loss = model(torch.arange(10).view(2, 5)).square().mean()
    loss.backward()
    assert math.isfinite(loss.item())
    assert model.encoder.gates == (False,) * 3
    assert model.tokens.weight.grad is not None
    assert all(p.grad is None for p in model.encoder.parameters())


def test_checkpointed_blocks_give_the_same_gradient() -> None:
    class Checkpointed(nn.Module):
        def __init__(self, block: nn.Module) -> None:
            super().__init__()
            self.block = block

        def forward(self, x: Tensor, *, branch_scale: float = 1.0) -> Tensor:
            return checkpoint(self.block, x, branch_scale=branch_scale, use_reentrant=False)

    plain = small_stack()
    saving = ProgressiveStack(*(Checkpointed(b) for b in copy.deepcopy(list(plain))))
    grads = []
    for stack in (plain, saving):
        stack.begin_step(2, FULL.keep(0, 6))
        stack(tokens()).square().mean().backward()
        grads.append([p.grad for p in stack.parameters()])
    assert not all(plain.gates)
    for a, b in zip(*grads, strict=True):
        assert (a is None and b is None) or torch.equal(a, b)


def test_weights_move_between_a_stack_and_a_plain_sequence_and_a_stack_can_be_copied() -> None:
    stack = small_stack()
    plain = nn.Sequential(*copy.deepcopy(list(stack)))
    assert stack.state_dict().keys() == plain.state_dict().keys()
    plain.load_state_dict(stack.state_dict())
    stack.begin_step(2, FULL.keep(0, 6))
    for other in (copy.deepcopy(stack), pickle.loads(pickle.dumps(stack))):
        assert other.keep == stack.keep
        assert torch.equal(other.train()(tokens()), copy.deepcopy(stack)(tokens()))


def test_a_timm_vision_transformer_takes_the_stack_and_gives_its_own_output_in_evaluation() -> None:
    torch.manual_seed(0)
    vit = VisionTransformer(
        img_size=8, patch_size=4, in_chans=1, num_classes=3, embed_dim=24, depth=5, num_heads=2
    ).eval()
    x = torch.randn(2, 1, 8, 8)
    expected, names = vit(x), list(vit.state_dict())
    vit.blocks = ProgressiveStack(*vit.blocks)
    assert torch.equal(vit(x), expected)
    assert list(vit.state_dict()) == names
    vit.train()
    assert torch.equal(vit(x), expected)
    vit.blocks.begin_step(1, [1, 0, 0, 0, 0])
    vit(x).sum().backward()
    assert [b.attn.qkv.weight.grad is not None for b in vit.blocks] == [True, False, False, False, False]


def test_a_stack_refuses_what_it_cannot_do() -> None:
    with pytest.raises(ValueError, match="at least one block"):
        ProgressiveStack()
    stack = small_stack()
    with pytest.raises(ValueError, match=r"expected 6 keep probabilities.*got 2"):
        stack.begin_step(0, [1.0, 1.0])
    for wrong in (-0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match="from 0 to 1"):
            stack.begin_step(0, [wrong] * 6)
    with pytest.raises(ValueError, match=r"Linear maps \(2, 4\) to \(2, 3\)"):
        ProgressiveStack(nn.Linear(4, 3))(torch.ones(2, 4))


@settings(max_examples=40, deadline=None)
@given(st.lists(st.booleans(), min_size=1, max_size=6), st.integers(1, 3), st.integers(1, 4))
def test_dropping_is_leaving_blocks_out(gates: list[bool], batch: int, count: int) -> None:
    stack = small_stack(len(gates)).double()
    x = tokens(batch, count).double()
    stack.begin_step(0, [float(g) for g in gates])
    expected = x
    for block, runs in zip(stack, gates, strict=True):
        expected = Plain(block)(expected) if runs else expected
    torch.testing.assert_close(stack(x), expected, atol=1e-11, rtol=0)


# ---------------------------------------------------------------- in a training run


class Recorder(L.Callback):
    def __init__(self) -> None:
        self.keeps: list[tuple[float, ...]] = []
        self.gates: list[tuple[bool, ...]] = []
        self.losses: list[float] = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        self.keeps.append(pl_module.model.encoder.keep)
        self.gates.append(pl_module.model.encoder.gates)
        self.losses.append(float(outputs["loss"]))


def language_model(*callbacks: L.Callback, depth: int = 6) -> MaskedLanguageModel:
    torch.manual_seed(0)
    model = pre_ln_bert(30, max_length=8, dim=DIM, depth=depth, heads=HEADS, seed=4)
    return MaskedLanguageModel(
        model, partial(torch.optim.AdamW, lr=1e-2), vocab_size=30, mask_id=0, callbacks=callbacks
    )


def fit(module: L.LightningModule, epochs: int = 2, checkpoint: str | None = None, **options: object) -> L.Trainer:
    texts = torch.randint(1, 30, (20, 8), generator=torch.Generator().manual_seed(0))
    trainer = L.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )
    torch.manual_seed(1)
    trainer.fit(module, DataLoader(texts, batch_size=4), DataLoader(texts, batch_size=10), ckpt_path=checkpoint)
    return trainer


def test_the_callback_follows_the_schedule_over_the_run() -> None:
    seen = Recorder()
    dropping = LayerDropping(limit=0.5, decay=10.0)
    trainer = fit(language_model(dropping, seen))
    assert dropping.schedule == KeepSchedule(0.5, 1.0)  # 10 updates
    assert seen.keeps == [KeepSchedule(0.5, 1.0).keep(t, 6) for t in range(10)]
    kept = sum(map(sum, seen.gates[5:])) / 5
    assert trainer.callback_metrics["kept_blocks"].item() == pytest.approx(kept)
    assert kept < 6


def test_micro_batches_of_one_update_share_probabilities_but_not_coins() -> None:
    seen = Recorder()
    dropping = LayerDropping(limit=0.0, decay=math.inf)
    fit(language_model(dropping, seen, depth=12), epochs=1, accumulate_grad_batches=5)
    assert len(set(seen.keeps)) == 1
    assert len(set(seen.gates)) > 1


def test_switched_off_the_run_is_the_baselines_bit_for_bit() -> None:
    off, without = Recorder(), Recorder()
    fit(language_model(LayerDropping(limit=1.0), off))
    fit(language_model(without))
    assert off.losses == without.losses


def test_a_resumed_run_throws_the_coins_of_an_uninterrupted_one(tmp_path) -> None:
    whole, part, rest = Recorder(), Recorder(), Recorder()
    fit(language_model(LayerDropping(), whole))

    class Stop(L.Callback):
        def on_train_epoch_end(self, trainer, pl_module) -> None:
            trainer.save_checkpoint(tmp_path / "half.ckpt")
            trainer.should_stop = True

    fit(language_model(LayerDropping(), part, Stop()), min_epochs=1)
    fit(language_model(LayerDropping(), rest), checkpoint=str(tmp_path / "half.ckpt"))
    assert part.gates + rest.gates == whole.gates
    assert part.gates != rest.gates


def test_a_module_without_a_stack_is_refused() -> None:
    module = language_model(LayerDropping())
    module.model.encoder = nn.Sequential(*module.model.encoder)
    with pytest.raises(ValueError, match="MaskedLanguageModel holds no ProgressiveStack"):
        fit(module)


def test_an_impossible_schedule_fails_before_the_first_step() -> None:
    seen = Recorder()
    with pytest.raises(ValueError, match="would never run"):
        fit(language_model(LayerDropping(0.0, math.inf, first_kept=False), seen))
    assert not seen.gates
