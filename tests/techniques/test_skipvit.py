"""SkipViT: counts at the paper's size, the baseline to the last bit, routing, the score, gradients, errors."""

from __future__ import annotations

import copy
import pickle
import re

import pytest
import timm
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.layers import Attention
from timm.models import VisionTransformer
from torch import Tensor, nn

from leantrain.measure import count_macs, count_parameters
from leantrain.techniques.gqkva import group_attention
from leantrain.techniques.skipvit import (
    SkipBlocks,
    block_macs,
    class_attention,
    gather_tokens,
    kept_patches,
    most_attended,
    restore_tokens,
    skip_tokens,
)

DIM, HEADS, DEPTH, PATCHES = 24, 3, 5, 16
KEPT = 7  # of 16 patches at a drop ratio of 0.55

VIT_SMALL = {0: 4.599, 1: 4.384, 2: 4.169, 3: 3.954, 4: 3.740, 5: 3.525, 6: 3.310}  # blocks bypassed: 10^9 MACs


def tiny_vit(**options: object) -> VisionTransformer:
    """A model whose class token looks at something: timm's own start attends to all tokens alike."""
    torch.manual_seed(0)
    sizes = {"img_size": 8, "patch_size": 2, "in_chans": 1, "num_classes": 10, "embed_dim": DIM}
    model = VisionTransformer(**{**sizes, "depth": DEPTH, "num_heads": HEADS, **options})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape))
    return model


def images(batch: int = 3) -> Tensor:
    return torch.randn(batch, 1, 8, 8, generator=torch.Generator().manual_seed(1))


def tokens(batch: int = 3, count: int = 1 + PATCHES, dim: int = DIM) -> Tensor:
    return torch.randn(batch, count, dim, generator=torch.Generator().manual_seed(2))


def embedded(model: VisionTransformer, x: Tensor) -> Tensor:
    """What enters the first block."""
    return model.norm_pre(model.patch_drop(model._pos_embed(model.patch_embed(x))))


def attention_matrix(attention: Attention, x: Tensor) -> Tensor:
    """All weights, (B, h, N, N), by timm's own unfused arithmetic."""
    seen = []
    attention = copy.deepcopy(attention)
    attention.fused_attn = False
    attention.attn_drop.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    attention(x)
    return seen[0]


# ---------------------------------------------------------------- counts at the paper's size


@pytest.mark.parametrize("count", VIT_SMALL)
def test_vit_small_counts(count: int) -> None:
    with torch.device("meta"):
        model = skip_tokens(timm.create_model("vit_small_patch16_224"), split=5, rejoin=5 + count)
        # Two images: the counter leaves out products with a single vector, which the head's would be.
        macs = count_macs(model, torch.empty(2, 3, 224, 224)) / 2
    assert count_parameters(model) == 22_050_664
    assert macs / 1e9 == pytest.approx(VIT_SMALL[count], rel=0.001)
    patches, head = 196 * 3 * 16 * 16 * 384, 384 * 1000
    formula = patches + (12 - count) * block_macs(197, 384) + count * block_macs(89, 384) + head
    # q, W_K^T q, and its product with all tokens
    score = 384 * 384 + 384 * 384 + 6 * 197 * 384 if count else 0
    assert macs == formula + score
    assert score < 0.01 * block_macs(197, 384)


def test_block_macs_of_vit_small() -> None:
    assert block_macs(197, 384) / 1e6 == pytest.approx(378.4, abs=0.05)
    assert block_macs(89, 384) / 1e6 == pytest.approx(163.6, abs=0.05)
    assert block_macs(10, 8, mlp_ratio=2.0) == 4 * 10 * 64 + 2 * 100 * 8 + 2 * 10 * 128


@pytest.mark.parametrize(("patches", "ratio", "kept"), [(196, 0.55, 88), (64, 0.55, 29), (16, 0.55, 7), (9, 0.0, 9)])
def test_number_of_kept_patches(patches: int, ratio: float, kept: int) -> None:
    assert kept_patches(patches, ratio) == kept


@pytest.mark.parametrize(
    ("patches", "ratio", "named"),
    [(0, 0.5, "0"), (16, -0.1, "-0.1"), (16, 1.0, "1.0"), (16, float("nan"), "nan"), (4, 0.99, "none of 4")],
)
def test_numbers_that_make_no_sense_are_named(patches: int, ratio: float, named: str) -> None:
    with pytest.raises(ValueError, match=re.escape(named)):
        kept_patches(patches, ratio)


@pytest.mark.parametrize("sizes", [(0, 8, 4.0), (3, 0, 4.0), (3, 8, 0.0), (3, 8, float("nan"))])
def test_sizes_of_a_block_must_be_positive(sizes: tuple) -> None:
    with pytest.raises(ValueError, match="positive"):
        block_macs(*sizes)


# ---------------------------------------------------------------- switched off


@pytest.mark.parametrize("settings", [{"split": 2, "rejoin": 2}, {"split": 1, "rejoin": 4, "drop_ratio": 0.0}])
def test_switched_off_it_is_the_baseline_to_the_last_bit(settings: dict) -> None:
    plain, skip = tiny_vit(), skip_tokens(tiny_vit(), **settings)
    expected, got = plain(images()), skip(images())
    assert torch.equal(got, expected)
    assert skip.blocks.kept is None
    expected.square().sum().backward()
    got.square().sum().backward()
    assert all(torch.equal(p.grad, q.grad) for p, q in zip(plain.parameters(), skip.parameters(), strict=True))


def test_switched_off_the_full_vit_small_is_the_baseline_to_the_last_bit() -> None:
    torch.manual_seed(0)
    model, x = timm.create_model("vit_small_patch16_224").eval(), torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        expected = model(x)
        skip_tokens(model, split=5, rejoin=8)
        assert not torch.equal(model(x), expected)
        model.blocks.skipping = False
        assert torch.equal(model(x), expected)


def test_no_parameter_is_added_renamed_changed_or_drawn() -> None:
    model = tiny_vit()
    before = dict(model.named_parameters())
    values = {name: p.detach().clone() for name, p in before.items()}
    torch.manual_seed(5)
    expected = torch.rand(())
    torch.manual_seed(5)
    assert skip_tokens(model, split=2, rejoin=4) is model
    assert torch.equal(torch.rand(()), expected)
    after = dict(model.named_parameters())
    assert list(after) == list(before)
    assert all(after[name] is before[name] and torch.equal(after[name], values[name]) for name in before)
    model.load_state_dict(tiny_vit().state_dict())
    tiny_vit().load_state_dict(model.state_dict())


# ---------------------------------------------------------------- routing


@settings(max_examples=50, deadline=None)
@given(st.data())
def test_taking_and_putting_back_is_the_identity(data: st.DataObject) -> None:
    batch, count = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 9))
    rows = st.lists(st.integers(0, count - 1), min_size=1, max_size=count, unique=True)
    size = len(first := data.draw(rows))
    more = st.lists(st.integers(0, count - 1), min_size=size, max_size=size, unique=True)
    index = torch.tensor([first, *(data.draw(more) for _ in range(batch - 1))])
    x = torch.randn(batch, count, 3)
    taken = gather_tokens(x, index)
    for image, row in enumerate(index.tolist()):
        assert torch.equal(taken[image], x[image, row])
    assert torch.equal(restore_tokens(x, index, taken), x)
    replaced = restore_tokens(x, index, taken + 1)
    changed = torch.zeros(batch, count).scatter(1, index, 1.0)
    torch.testing.assert_close(replaced, x + changed.unsqueeze(-1))


def test_putting_back_leaves_its_input_and_keeps_its_precision() -> None:
    full, index = torch.zeros(1, 3, 2), torch.tensor([[1]])
    out = restore_tokens(full, index, torch.ones(1, 1, 2, dtype=torch.bfloat16))
    assert out.dtype == torch.float32
    assert full.abs().max() == 0
    assert out[0, 1].tolist() == [1, 1]


def test_with_blocks_that_do_nothing_all_tokens_come_through() -> None:
    nothing = [nn.Identity() for _ in range(4)]
    x = tokens()
    blocks = SkipBlocks(nothing, split=1, rejoin=3, drop_ratio=0.5, select="random")
    assert torch.equal(blocks(x), x)
    assert blocks.kept.shape == (3, 8)


class PlusOne(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        self.tokens = x.shape[1]
        return x + 1


@pytest.mark.parametrize(("split", "rejoin"), [(1, 1), (1, 4), (2, 3), (3, 4), (4, 4)])
def test_kept_tokens_pass_all_blocks_and_the_others_bypass_theirs(split: int, rejoin: int) -> None:
    blocks = SkipBlocks([PlusOne() for _ in range(4)], split=split, rejoin=rejoin, drop_ratio=0.55, select="random")
    passed = blocks(torch.zeros(3, 1 + PATCHES, 1)).squeeze(-1)
    expected = torch.full((3, 1 + PATCHES), 4.0 - (rejoin - split))
    expected[:, 0] = 4.0
    if split < rejoin:
        expected.scatter_(1, blocks.kept + 1, 4.0)
    assert torch.equal(passed, expected)
    inside = [split <= place < rejoin for place in range(4)]
    assert [block.tokens for block in blocks.children()] == [1 + (KEPT if i else PATCHES) for i in inside]


@pytest.mark.parametrize("select", ["class attention", "inverted", "random"])
def test_skipped_tokens_come_back_bit_equal(select: str) -> None:
    model = skip_tokens(tiny_vit(), split=2, rejoin=4, select=select).eval()
    seen = {}
    model.blocks[4].register_forward_pre_hook(lambda module, inputs: seen.setdefault("rejoin", inputs[0]))
    model(images())
    before = _blocks_on(model, images(), 2)
    skipped = torch.ones(3, PATCHES, dtype=torch.bool).scatter(1, model.blocks.kept, False)
    assert torch.equal(seen["rejoin"][:, 1:][skipped], before[:, 1:][skipped])
    assert (seen["rejoin"][:, 1:][~skipped] != before[:, 1:][~skipped]).any(-1).all()
    assert (seen["rejoin"][:, 0] != before[:, 0]).any(-1).all()
    assert skipped.sum(1).tolist() == [PATCHES - KEPT] * 3


def _blocks_on(model: VisionTransformer, x: Tensor, count: int) -> Tensor:
    x = embedded(model, x)
    for block in list(model.blocks.children())[:count]:
        x = block(x)
    return x


def test_the_forward_pass_is_the_one_written_by_hand() -> None:
    model = skip_tokens(tiny_vit(), split=2, rejoin=4).eval()
    logits, x = model(images()), _blocks_on(model, images(), 1)
    score = attention_matrix(model.blocks[1].attn, model.blocks[1].norm1(x)).mean(1)[:, 0, 1:]
    x = model.blocks[1](x)
    rows = []
    for image in range(3):
        best = sorted(sorted(range(PATCHES), key=lambda j: -score[image, j].item())[:KEPT])
        assert model.blocks.kept[image].tolist() == best
        whole = x[image : image + 1].clone()
        part = whole[:, [0, *(j + 1 for j in best)]]
        for place in (2, 3):
            part = model.blocks[place](part)
        whole[:, [0, *(j + 1 for j in best)]] = part
        rows.append(model.forward_head(model.norm(model.blocks[4](whole))))
    torch.testing.assert_close(logits, torch.cat(rows), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("select", ["class attention", "inverted", "random"])
def test_kept_patches_are_in_order_and_different(select: str) -> None:
    model = skip_tokens(tiny_vit(), split=2, rejoin=4, select=select).eval()
    model(images(8))
    kept = model.blocks.kept
    assert kept.shape == (8, KEPT)
    assert (kept.diff(dim=1) > 0).all()
    assert kept.min() >= 0
    assert kept.max() < PATCHES


def test_inverted_keeps_what_the_method_skips() -> None:
    kept = {}
    for select in ("class attention", "inverted"):
        model = skip_tokens(tiny_vit(), split=2, rejoin=4, drop_ratio=0.5, select=select).eval()
        model(images())
        kept[select] = model.blocks.kept
    for a, b in zip(*kept.values(), strict=True):
        assert sorted([*a.tolist(), *b.tolist()]) == list(range(PATCHES))


def test_random_selection_is_uniform_and_new_every_time() -> None:
    torch.manual_seed(0)
    blocks = SkipBlocks([nn.Identity(), nn.Identity()], split=1, rejoin=2, drop_ratio=0.55, select="random")
    x = torch.zeros(4000, 1 + PATCHES, 1)
    blocks(x)
    first = blocks.kept
    share = F.one_hot(first, PATCHES).sum(1).double().mean(0)
    # Five standard deviations of a mean of 4000 draws
    assert (share - KEPT / PATCHES).abs().max() < 5 * (7 / 16 * 9 / 16 / 4000) ** 0.5
    blocks(x)
    assert not torch.equal(blocks.kept, first)


def test_one_image_does_not_depend_on_another() -> None:
    model, x = skip_tokens(tiny_vit(), split=2, rejoin=4).eval(), images(4)
    together = model(x)
    kept = model.blocks.kept
    for i in range(4):
        torch.testing.assert_close(model(x[i : i + 1]), together[i : i + 1], atol=1e-5, rtol=1e-5)
        assert torch.equal(model.blocks.kept[0], kept[i])


def test_rejoining_after_the_last_block_is_dropping_for_good() -> None:
    model = skip_tokens(tiny_vit(), split=2, rejoin=DEPTH).eval()
    logits = model(images())
    x = _blocks_on(model, images(), 2)
    index = F.pad(model.blocks.kept + 1, (1, 0))
    x = gather_tokens(x, index)
    for place in range(2, DEPTH):
        x = model.blocks[place](x)
    torch.testing.assert_close(model.forward_head(model.norm(x)), logits, atol=1e-5, rtol=1e-5)


def test_register_tokens_never_skip() -> None:
    model = skip_tokens(tiny_vit(reg_tokens=2), split=2, rejoin=4).eval()
    widths = []
    model.blocks[2].register_forward_pre_hook(lambda module, inputs: widths.append(inputs[0].shape[1]))
    before = _blocks_on(model, images(), 2)
    model.forward_features(images())
    assert widths == [3 + KEPT]
    assert before.shape[1] == 3 + PATCHES
    assert model.blocks.kept.max() < PATCHES


def test_the_number_kept_follows_the_size_of_the_image() -> None:
    model = skip_tokens(tiny_vit(dynamic_img_size=True), split=2, rejoin=4).eval()
    model(torch.randn(2, 1, 16, 16))
    assert model.blocks.kept.shape == (2, 64 - 35)


# ---------------------------------------------------------------- the score


@pytest.mark.parametrize("qk_norm", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_the_score_is_the_first_row_of_the_attention_matrix(bias: bool, qk_norm: bool) -> None:
    torch.manual_seed(3)
    layer = Attention(DIM, HEADS, qkv_bias=bias, qk_norm=qk_norm, norm_layer=nn.LayerNorm).double()
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.4)
    x = tokens().double()
    got = class_attention(layer, x)
    torch.testing.assert_close(got, attention_matrix(layer, x)[:, :, 0].mean(1), atol=1e-12, rtol=0)
    torch.testing.assert_close(got.sum(1), torch.ones(3).double(), atol=1e-12, rtol=0)
    assert got.std() > 0.001, "a flat row would make this test blind"
    assert not got.requires_grad


def test_permuting_the_patches_permutes_the_score() -> None:
    layer, x = tiny_vit().blocks[0].attn, tokens()
    order = torch.randperm(PATCHES, generator=torch.Generator().manual_seed(4))
    moved = torch.cat([x[:, :1], x[:, 1:][:, order]], dim=1)
    torch.testing.assert_close(class_attention(layer, moved)[:, 1:], class_attention(layer, x)[:, 1:][:, order])


def test_the_score_is_computed_in_32_bits_under_autocast() -> None:
    layer, x = tiny_vit().blocks[0].attn, tokens()
    expected = class_attention(layer, x)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(class_attention(layer, x), expected)
        assert torch.is_autocast_enabled("cpu")
    half = class_attention(copy.deepcopy(layer).bfloat16(), x.bfloat16())
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, expected, atol=0.02, rtol=0.1)


def test_the_score_reads_what_enters_its_block() -> None:
    model = skip_tokens(tiny_vit(), split=3, rejoin=4).eval()
    model(images())
    x = _blocks_on(model, images(), 2)
    score = class_attention(model.blocks[2].attn, model.blocks[2].norm1(x))[:, 1:]
    assert torch.equal(model.blocks.kept, most_attended(score, KEPT))


def test_equal_scores_go_by_index() -> None:
    score = torch.tensor([[0.0, 1.0, 0.0, 0.0, 1.0], [0.5] * 5])
    assert most_attended(score, 3).tolist() == [[0, 1, 4], [0, 1, 2]]


@pytest.mark.parametrize("options", [{"init_values": 0.5}, {"qk_norm": True}, {"pre_norm": True}, {"qkv_bias": False}])
def test_the_block_that_gives_the_score_computes_what_timms_does(options: dict) -> None:
    plain, skip = tiny_vit(**options), skip_tokens(tiny_vit(**options), split=DEPTH, rejoin=DEPTH)
    skip.blocks.rejoin = DEPTH + 1  # forces the path that parts and rejoins, with no block between
    assert torch.equal(skip(images()), plain(images()))
    assert skip.blocks.kept is not None


def test_stochastic_depth_falls_on_the_same_residuals_as_in_timm() -> None:
    plain = tiny_vit(drop_path_rate=0.5).train()
    skip = skip_tokens(tiny_vit(drop_path_rate=0.5).train(), split=DEPTH, rejoin=DEPTH)
    skip.blocks.rejoin = DEPTH + 1
    outputs = []
    for model in (plain, skip):
        torch.manual_seed(7)
        outputs.append(model(images()))
    assert torch.equal(*outputs)


# ---------------------------------------------------------------- gradients and training


def test_gradient_reaches_kept_and_skipped_patches() -> None:
    model = skip_tokens(tiny_vit(), split=2, rejoin=4)
    x = embedded(model, images()).detach().requires_grad_()
    model.forward_head(model.norm(model.blocks(x))).square().sum().backward()
    assert (x.grad.abs().sum(-1) > 0).all()


def test_the_bypass_is_the_identity_for_the_gradient() -> None:
    blocks = SkipBlocks([PlusOne() for _ in range(3)], split=1, rejoin=2, drop_ratio=0.5, select="random")
    x = tokens().requires_grad_()
    weight = torch.randn(x.shape)
    (blocks(x) * weight).sum().backward()
    assert torch.equal(x.grad, weight)


def test_gradients_are_those_of_finite_differences() -> None:
    model = skip_tokens(tiny_vit(embed_dim=6, depth=3, patch_size=4), split=1, rejoin=2, drop_ratio=0.5).double()
    x = images(1).double().requires_grad_()

    def logits(pixels: Tensor, weight: Tensor) -> Tensor:
        return torch.func.functional_call(model, {"blocks.1.attn.proj.weight": weight}, (pixels,))

    # The choice of tokens is piecewise constant: a step of 1e-6 does not cross its boundary here.
    assert torch.autograd.gradcheck(logits, (x, model.blocks[1].attn.proj.weight))


def test_the_score_sends_no_gradient() -> None:
    """With the choice frozen, every gradient stays as it is: nothing flows through the score."""
    model = skip_tokens(tiny_vit(), split=2, rejoin=4)
    model(images()).square().sum().backward()
    grads = [p.grad.clone() for p in model.parameters()]
    frozen = model.blocks.kept
    model.zero_grad()
    scores = torch.zeros(3, PATCHES).scatter(1, frozen, 1.0)
    model.blocks._score = lambda block, x: (block(x), scores)
    model(images()).square().sum().backward()
    for p, grad in zip(model.parameters(), grads, strict=True):
        torch.testing.assert_close(p.grad, grad, atol=1e-6, rtol=1e-5)


def test_under_bfloat16_it_runs_forward_and_backward() -> None:
    model = skip_tokens(tiny_vit(), split=2, rejoin=4)
    with torch.autocast("cpu", torch.bfloat16):
        half = model(images())
    half.float().square().sum().backward()
    assert all(torch.isfinite(p.grad).all() and p.grad.dtype == torch.float32 for p in model.parameters())
    torch.testing.assert_close(half.float(), model(images()), atol=0.5, rtol=0.2)


def test_a_model_with_the_bypass_learns() -> None:
    model = skip_tokens(tiny_vit(), split=2, rejoin=4)
    y, optimizer = torch.arange(8), torch.optim.AdamW(model.parameters(), 3e-3)
    for _ in range(40):
        optimizer.zero_grad()
        F.cross_entropy(model(images(8)), y).backward()
        optimizer.step()
    assert (model(images(8)).argmax(1) == y).all()


def test_it_can_be_copied_and_pickled() -> None:
    model = skip_tokens(tiny_vit(), split=2, rejoin=4).eval()
    expected = model(images())
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(images()), expected)


def test_it_stacks_with_grouped_attention_that_comes_second() -> None:
    model = group_attention(skip_tokens(tiny_vit(), split=2, rejoin=4, select="random"), "MQA").eval()
    model(images())
    assert model.blocks.kept.shape == (3, KEPT)


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"split": 0}, "split 0"),
        ({"split": 4, "rejoin": 3}, "split 4 and rejoin 3"),
        ({"rejoin": 6}, "5 blocks"),
        ({"drop_ratio": 1.0}, "1.0"),
        ({"drop_ratio": -0.1}, "-0.1"),
        ({"drop_ratio": float("nan")}, "nan"),
        ({"drop_ratio": 0.99}, "none of 16"),
        ({"select": "attention"}, "'attention'"),
    ],
)
def test_settings_out_of_range_are_named_and_leave_the_model(arguments: dict, named: str) -> None:
    model = tiny_vit()
    with pytest.raises(ValueError, match=re.escape(named)):
        skip_tokens(model, **{"split": 2, "rejoin": 4, **arguments})
    assert type(model.blocks) is nn.Sequential


def test_models_that_do_not_fit_are_refused() -> None:
    arguments = {"split": 2, "rejoin": 4}
    with pytest.raises(ValueError, match="Linear"):
        skip_tokens(nn.Linear(2, 2), **arguments)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="class token"):
        skip_tokens(tiny_vit(class_token=False, global_pool="avg"), **arguments)
    with pytest.raises(ValueError, match="'avg'"):
        skip_tokens(tiny_vit(global_pool="avg"), **arguments)
    with pytest.raises(ValueError, match="without a token skip"):
        skip_tokens(skip_tokens(tiny_vit(), **arguments), **arguments)
    with pytest.raises(ValueError, match=r"block 1 .* GroupedAttention"):
        skip_tokens(group_attention(tiny_vit(), "MQA"), **arguments)
    checkpointing = tiny_vit()
    checkpointing.set_grad_checkpointing()
    with pytest.raises(ValueError, match="checkpointing"):
        skip_tokens(checkpointing, **arguments)
    with pytest.raises(ValueError, match="class token"):
        SkipBlocks([nn.Identity()], split=1, rejoin=1, drop_ratio=0.5, select="random", prefix=0)


def test_paths_of_timm_that_would_pass_by_the_bypass_are_refused() -> None:
    model = skip_tokens(tiny_vit(), split=2, rejoin=4)
    with pytest.raises(TypeError, match="one by one"):
        model.forward_intermediates(images())
    with pytest.raises(TypeError, match="one by one"):
        model(images(), attn_mask=torch.zeros(1, 1, 17, 17))
    model.set_grad_checkpointing()
    with pytest.raises(TypeError, match="one by one"):
        model(images())


def test_the_blocks_can_still_be_looked_at() -> None:
    plain, skip = tiny_vit(), skip_tokens(tiny_vit(), split=2, rejoin=4)
    assert len(skip.blocks) == DEPTH
    assert type(skip.blocks[-1]) is type(plain.blocks[-1])
    assert "split=2, rejoin=4, drop_ratio=0.55, select='class attention'" in repr(skip)
