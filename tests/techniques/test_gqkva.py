"""GQKVA: counts at the paper's sizes, equality with timm and with tied heads, gradients, surgery, errors."""

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

from leantrain.measure import count_macs, count_parameters, saved_activation_bytes
from leantrain.techniques.gqkva import (
    GroupedAttention,
    Variant,
    attend,
    block_macs,
    group_attention,
    head_pairs,
    parameters_saved,
    variant,
    variants,
)

DIM, HEADS = 48, 6
NAMES = [v.name for v in variants(HEADS)]

VIT_SMALL = {  # name: parameters, multiply-accumulates of one 224-pixel image in 10^9
    "MHA": (22_050_664, 4.599),
    "GKVA-3": (21_163_624, 4.425),
    "GKVA-2": (20_867_944, 4.366),
    "MKVA": (20_572_264, 4.308),
    "GQA-3": (20_276_584, 4.250),
    "GQA-2": (19_685_224, 4.134),
    "MQA": (19_093_864, 4.018),
    "GQKVA-2.3": (19_093_864, 4.018),
    "GQKVA-3.2": (18_798_184, 3.960),
}


def grouped(name: str, dim: int = DIM, heads: int = HEADS, **options: bool) -> GroupedAttention:
    v = variant(name, heads)
    return GroupedAttention(dim, heads, v.n_q, v.n_kv, v.pairing, **options)


def tiny_vit(**options: object) -> VisionTransformer:
    return VisionTransformer(
        img_size=8, patch_size=2, in_chans=1, num_classes=10, embed_dim=DIM, depth=2, num_heads=HEADS, **options
    )


def full_size(model: str, name: str) -> VisionTransformer:
    with torch.device("meta"):
        return group_attention(timm.create_model(model), name)


def tokens(batch: int = 2, count: int = 5, dim: int = DIM) -> Tensor:
    return torch.randn(batch, count, dim, generator=torch.Generator().manual_seed(1))


def randomise(module: nn.Module) -> None:
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))


# ---------------------------------------------------------------- the variants


def test_names_of_the_nine_variants_of_six_heads() -> None:
    assert sorted(NAMES) == sorted(VIT_SMALL)


def test_pairs_of_every_kind() -> None:
    assert variant("MHA", 4).pairs == ((0, 0), (1, 1), (2, 2), (3, 3))
    assert variant("MQA", 4).pairs == ((0, 0), (1, 0), (2, 0), (3, 0))
    assert variant("MKVA", 4).pairs == ((0, 0), (0, 1), (0, 2), (0, 3))
    assert variant("GQA-2", 4).pairs == ((0, 0), (1, 0), (2, 1), (3, 1))
    assert variant("GKVA-2", 4).pairs == ((0, 0), (0, 1), (1, 2), (1, 3))
    assert variant("GQKVA-2.3", 6).pairs == ((0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2))


@pytest.mark.parametrize("heads", [2, 3, 5, 7])
def test_a_prime_number_of_heads_has_only_the_extremes(heads: int) -> None:
    assert [v.name for v in variants(heads)] == ["MHA", "MKVA", "MQA"]


def test_one_head_cannot_share() -> None:
    assert [v.name for v in variants(1)] == ["MHA"]


@given(st.integers(1, 48))
def test_every_variant_has_as_many_different_pairs_as_heads_and_uses_all_projections(heads: int) -> None:
    found = variants(heads)
    assert len({v.name for v in found}) == len(found)
    for v in found:
        assert len(v.pairs) == len(set(v.pairs)) == heads
        assert {i for i, _ in v.pairs} == set(range(v.n_q))
        assert {j for _, j in v.pairs} == set(range(v.n_kv))
        assert variant(v.name, heads) == v


@given(st.integers(-1, 13), st.integers(-1, 13), st.integers(-1, 13), st.sampled_from(["blocks", "grid"]))
def test_counts_give_different_pairs_or_an_error(heads: int, n_q: int, n_kv: int, pairing: str) -> None:
    try:
        pairs = head_pairs(heads, n_q, n_kv, pairing)
    except ValueError:
        return
    assert len(set(pairs)) == heads


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ((6, 4, 6, "blocks"), ("4", "6")),
        ((6, 6, 5, "blocks"), ("5", "6")),
        ((6, 3, 2, "blocks"), ("3", "2")),
        ((6, 3, 3, "grid"), ("3 * 3 = 9", "6")),
        ((6, 0, 6, "blocks"), ("n_q", "0")),
        ((6, 6, -1, "blocks"), ("n_kv", "-1")),
        ((0, 1, 1, "grid"), ("heads", "0")),
        ((6, 3, 2, "rows"), ("rows",)),
    ],
)
def test_counts_that_do_not_fit_are_named(arguments: tuple, named: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match=".*".join(map(re.escape, named))):
        head_pairs(*arguments)


@pytest.mark.parametrize("name", ["GQA-4", "GKVA-5", "GQKVA-2.2", "GQKVA-6.1", "GQA-0", "GQA-1", "mha", ""])
def test_unknown_variants_list_the_legal_ones(name: str) -> None:
    with pytest.raises(ValueError, match=r"GQKVA-3\.2") as error:
        variant(name, HEADS)
    assert repr(name) in str(error.value)


def test_a_variant_cannot_hold_counts_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match="2 \\* 2 = 4"):
        Variant("mine", 6, 2, 2, "grid")


def test_width_must_be_a_multiple_of_the_heads() -> None:
    with pytest.raises(ValueError, match="50 and 6"):
        GroupedAttention(50, 6, 6, 6, "blocks")
    with pytest.raises(ValueError, match="50 and 6"):
        parameters_saved(50, 6, 6, 6)
    with pytest.raises(ValueError, match="0 and 6"):
        block_macs(0, 6, 6, 6, 10)


# ---------------------------------------------------------------- counts at the paper's sizes


@pytest.mark.parametrize("name", VIT_SMALL)
def test_vit_small_counts(name: str) -> None:
    parameters, giga_macs = VIT_SMALL[name]
    model = full_size("vit_small_patch16_224", name)
    assert count_parameters(model) == parameters
    # Two images: the counter leaves out products with a single vector, which the head's would be.
    macs = count_macs(model, torch.empty(2, 3, 224, 224, device="meta")) // 2
    assert macs / 1e9 == pytest.approx(giga_macs, abs=0.001)
    v = variant(name, 6)
    assert parameters == 22_050_664 - 12 * parameters_saved(384, 6, v.n_q, v.n_kv)
    patches, head = 196 * 3 * 16 * 16 * 384, 384 * 1000
    assert macs == patches + 12 * sum(block_macs(384, 6, v.n_q, v.n_kv, 197).values()) + head


@pytest.mark.parametrize(
    ("model", "name", "parameters"),
    [
        ("vit_base_patch16_224", "MHA", 86_567_656),
        ("vit_base_patch16_224", "GQKVA-4.3", 71_212_264),
        ("vit_base_patch16_224", "GQKVA-6.2", 71_212_264),
        ("vit_tiny_patch16_224", "MHA", 5_717_416),
    ],
)
def test_other_sizes(model: str, name: str, parameters: int) -> None:
    assert count_parameters(full_size(model, name)) == parameters


@pytest.mark.parametrize(
    ("model", "name", "percent"),
    [
        ("vit_base_patch16_224", "MQA", 15.01),
        ("vit_tiny_patch16_224", "MQA", 10.37),
        ("vit_tiny_patch16_224", "MKVA", 5.18),
    ],
)
def test_other_reductions(model: str, name: str, percent: float) -> None:
    with torch.device("meta"):
        full = count_parameters(timm.create_model(model))
    assert 100 * (1 - count_parameters(full_size(model, name)) / full) == pytest.approx(percent, abs=0.005)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_the_formula_counts_what_the_module_saves(name: str, bias: bool) -> None:
    v = variant(name, HEADS)
    saved = count_parameters(grouped("MHA", qkv_bias=bias)) - count_parameters(grouped(name, qkv_bias=bias))
    assert saved == parameters_saved(DIM, HEADS, v.n_q, v.n_kv, bias)


# ---------------------------------------------------------------- what is computed


@pytest.mark.parametrize("qk_norm", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_mha_with_copied_weights_is_timms_attention(bias: bool, qk_norm: bool) -> None:
    theirs = Attention(DIM, HEADS, qkv_bias=bias, qk_norm=qk_norm, norm_layer=nn.LayerNorm)
    randomise(theirs)
    ours = GroupedAttention.from_attention(copy.deepcopy(theirs), "MHA")
    x, y = tokens().requires_grad_(), tokens().requires_grad_()
    expected, got = theirs(x), ours(y)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=0)
    expected.square().sum().backward()
    got.square().sum().backward()
    torch.testing.assert_close(y.grad, x.grad, atol=1e-5, rtol=1e-5)
    fused = torch.cat([ours.q.weight.grad, ours.k.weight.grad, ours.v.weight.grad])
    torch.testing.assert_close(fused, theirs.qkv.weight.grad, atol=1e-4, rtol=1e-5)


def loop_over_heads(layer: GroupedAttention, x: Tensor) -> Tensor:
    """The definition, head by head, without any of the module's own attention code."""
    d, heads = layer.head_dim, []
    for i, j in variant_pairs(layer):
        q = x @ layer.q.weight[i * d : (i + 1) * d].T + layer.q.bias[i * d : (i + 1) * d]
        k = x @ layer.k.weight[j * d : (j + 1) * d].T + layer.k.bias[j * d : (j + 1) * d]
        v = x @ layer.v.weight[j * d : (j + 1) * d].T + layer.v.bias[j * d : (j + 1) * d]
        heads.append((q @ k.transpose(1, 2) / d**0.5).softmax(-1) @ v)
    return torch.cat(heads, -1) @ layer.proj.weight.T + layer.proj.bias


def variant_pairs(layer: GroupedAttention) -> list[tuple[int, int]]:
    h, a, b = layer.num_heads, layer.n_q, layer.n_kv
    if a * b == h:
        return [(i, j) for i in range(a) for j in range(b)]
    return [(r // (h // a), r // (h // b)) for r in range(h)]


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_every_variant_is_a_loop_over_its_pairs(data: st.DataObject) -> None:
    heads = data.draw(st.integers(1, 12), "heads")
    chosen = data.draw(st.sampled_from(variants(heads)), "variant")
    count = data.draw(st.integers(1, 6), "tokens")
    layer = grouped(chosen.name, 4 * heads, heads).double()
    randomise(layer)
    x = tokens(data.draw(st.integers(1, 3), "batch"), count, 4 * heads).double()
    torch.testing.assert_close(layer(x), loop_over_heads(layer, x), atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("name", NAMES)
def test_sharing_is_tying_the_projections_of_multi_head_attention(name: str) -> None:
    shared, tied = grouped(name).double(), grouped("MHA").double()
    randomise(shared)
    tied.proj.load_state_dict(shared.proj.state_dict())
    index = dict(zip("qkv", ([i for i, _ in shared.pairs], *2 * [[j for _, j in shared.pairs]]), strict=True))

    def by_head(tensor: Tensor) -> Tensor:
        return tensor.unflatten(0, (-1, shared.head_dim))

    with torch.no_grad():
        for part, heads in index.items():
            for leaf in ("weight", "bias"):
                source = getattr(getattr(shared, part), leaf)
                getattr(getattr(tied, part), leaf).copy_(by_head(source)[heads].flatten(0, 1))
    x = tokens().double()
    torch.testing.assert_close(shared(x), tied(x), atol=1e-12, rtol=1e-12)
    for layer in (shared, tied):
        layer(x).pow(3).sum().backward()
    for part, heads in index.items():
        for leaf in ("weight", "bias"):
            copies = by_head(getattr(getattr(tied, part), leaf).grad)
            total = torch.zeros_like(by_head(getattr(getattr(shared, part), leaf).grad))
            total.index_add_(0, torch.tensor(heads), copies)
            torch.testing.assert_close(
                by_head(getattr(getattr(shared, part), leaf).grad), total, atol=1e-10, rtol=1e-10
            )


@pytest.mark.parametrize("name", ["GQA-3", "GQA-2", "MQA"])
def test_gqa_is_pytorchs_gqa(name: str) -> None:
    v = variant(name, HEADS)
    q = torch.randn(2, HEADS, 5, 8, dtype=torch.float64)
    k, value = torch.randn(2, 2, v.n_kv, 5, 8, dtype=torch.float64)
    expected = F.scaled_dot_product_attention(q, k, value, enable_gqa=True)
    torch.testing.assert_close(attend(q, k, value, v.pairs), expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize("name", NAMES)
def test_gradients_are_those_of_finite_differences(name: str) -> None:
    layer = grouped(name, 12).double()
    randomise(layer)
    x = tokens(1, 3, 12).double().requires_grad_()

    def attention(t: Tensor, w: Tensor) -> Tensor:
        return torch.func.functional_call(layer, {"q.weight": w}, (t,))

    assert torch.autograd.gradcheck(attention, (x, layer.q.weight))


@pytest.mark.parametrize("name", NAMES)
def test_masks_reach_every_head(name: str) -> None:
    layer = grouped(name).double()
    randomise(layer)
    x = tokens().double()
    changed = x.clone()
    changed[:, 3:] += 1
    for options in ({"is_causal": True}, {"attn_mask": torch.ones(5, 5, dtype=torch.bool).tril()}):
        torch.testing.assert_close(layer(x, **options)[:, :3], layer(changed, **options)[:, :3])
        assert not torch.allclose(layer(x, **options)[:, 3:], layer(changed, **options)[:, 3:])
    see_all = torch.zeros(5, 5, dtype=torch.float64)
    torch.testing.assert_close(layer(x, attn_mask=see_all), layer(x))


@pytest.mark.parametrize("name", NAMES)
def test_dropout_acts_in_training_only(name: str) -> None:
    v = variant(name, HEADS)
    layer = GroupedAttention(DIM, HEADS, v.n_q, v.n_kv, v.pairing, attn_drop=0.5)
    randomise(layer)
    x = tokens()
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    assert torch.equal(layer(x), layer(x))


def test_shared_keys_and_values_are_not_copied_for_the_backward_pass() -> None:
    x = tokens(4, 65)
    kept = {name: saved_activation_bytes(lambda n=name: grouped(n)(x)) for name in ("MHA", "MQA", "GQKVA-3.2")}
    one_head = x.nbytes // HEADS
    # Folded heads leave attention in another order than the output projection wants them: one copy, of h heads.
    assert kept["MHA"] - kept["MQA"] == (2 * 5 - HEADS) * one_head
    assert kept["MHA"] - kept["GQKVA-3.2"] == (3 + 2 * 4 - HEADS) * one_head


# ---------------------------------------------------------------- inside a vision transformer


@pytest.mark.parametrize("name", NAMES)
def test_surgery_leaves_everything_but_the_projections(name: str) -> None:
    model = tiny_vit(qk_norm=True, init_values=0.1)
    before = {n: p.detach().clone() for n, p in model.named_parameters() if ".attn.qkv." not in n}
    kept = {n: id(p) for n, p in model.named_parameters() if n in before}
    assert group_attention(model, name) is model
    after = {n: p for n, p in model.named_parameters() if not any(f".attn.{x}." in n for x in "qkv")}
    assert {n: id(p) for n, p in after.items()} == kept
    assert all(torch.equal(after[n], p) for n, p in before.items())
    assert sum(isinstance(m, GroupedAttention) for m in model.modules()) == 2


@pytest.mark.parametrize("name", NAMES)
def test_state_dict_round_trip(name: str) -> None:
    first, second = (group_attention(tiny_vit(), name).eval() for _ in range(2))
    x = torch.randn(2, 1, 8, 8)
    assert not torch.equal(first(x), second(x))
    second.load_state_dict(first.state_dict())
    assert torch.equal(first(x), second(x))


def test_switched_off_the_model_is_timms() -> None:
    torch.manual_seed(0)
    model = tiny_vit().eval()
    x = torch.randn(3, 1, 8, 8)
    expected = model(x)
    torch.testing.assert_close(group_attention(model, "MHA")(x), expected, atol=1e-5, rtol=0)


def test_surgery_draws_no_random_number_and_all_variants_start_alike() -> None:
    torch.manual_seed(0)
    models, following = {}, set()
    for name in NAMES:
        torch.manual_seed(0)
        models[name] = group_attention(tiny_vit(), name)
        following.add(torch.rand(()).item())
    assert len(following) == 1
    d = DIM // HEADS
    full = models["MHA"].blocks[0].attn
    for name in NAMES:
        layer = models[name].blocks[0].attn
        for r, (i, j) in reversed(list(enumerate(layer.pairs))):
            is_first = all((i, j) != pair and i != pair[0] for pair in layer.pairs[:r])
            if is_first:
                assert torch.equal(layer.q.weight[i * d : (i + 1) * d], full.q.weight[r * d : (r + 1) * d])
        assert layer.k.weight.std().item() == pytest.approx(0.02, rel=0.1)
        assert layer.q.bias.abs().max() == 0


def test_a_layer_alone_starts_like_timms() -> None:
    layer = grouped("GQKVA-3.2", 384)
    for linear in (layer.q, layer.k, layer.v, layer.proj):
        assert linear.weight.std().item() == pytest.approx(0.02, rel=0.05)
        assert linear.bias.abs().max() == 0


def test_precision_device_and_mode_are_kept() -> None:
    model = tiny_vit().double().eval()
    group_attention(model, "GQKVA-3.2")
    assert {p.dtype for p in model.parameters()} == {torch.float64}
    assert not any(m.training for m in model.modules())


def test_a_grouped_model_can_be_pickled_and_copied() -> None:
    model = group_attention(tiny_vit(), "GQKVA-3.2").eval()
    x = torch.randn(2, 1, 8, 8)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(x), model(x))


def test_a_grouped_model_learns() -> None:
    torch.manual_seed(0)
    model = group_attention(tiny_vit(), "GQKVA-3.2")
    x, y = torch.randn(8, 1, 8, 8), torch.arange(8)
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    for _ in range(40):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    assert (model(x).argmax(1) == y).all()


@pytest.mark.parametrize(
    ("options", "named"),
    [({"gated": True}, "gated"), ({"scale_norm": True}, "scale_norm"), ({"attn_head_dim": 4}, "width")],
)
def test_layers_that_compute_something_else_are_refused(options: dict, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        GroupedAttention.from_attention(Attention(DIM, HEADS, norm_layer=nn.LayerNorm, **options), "MHA")


def test_a_model_without_plain_attention_is_refused_and_left_as_it_was() -> None:
    with pytest.raises(ValueError, match="Linear"):
        group_attention(nn.Linear(2, 2), "MHA")  # type: ignore[arg-type]
    model = group_attention(tiny_vit(), "MQA")
    with pytest.raises(ValueError, match=r"block 0.*GroupedAttention"):
        group_attention(model, "MHA")
    untouched = tiny_vit()
    with pytest.raises(ValueError, match="GQA-4"):
        group_attention(untouched, "GQA-4")
    untouched.blocks[1].attn = grouped("MHA")
    with pytest.raises(ValueError, match="block 1"):
        group_attention(untouched, "MQA")
    assert type(untouched.blocks[0].attn) is Attention


def test_fused_weights_must_fit() -> None:
    with pytest.raises(ValueError, match="48 -> 144, got 48 -> 96"):
        grouped("MQA").load_fused_qkv(nn.Linear(48, 96))
    with pytest.raises(ValueError, match="bias"):
        grouped("MQA").load_fused_qkv(nn.Linear(48, 144, bias=False))
