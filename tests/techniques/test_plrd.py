"""Families of models: counts of real models, chained truncation, the two ways of decomposing again, bad input."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

from leantrain.low_rank.factors import decompose, decompose_model, factors_of, reconstruct, svd_factors
from leantrain.measure.cost import count_parameters
from leantrain.techniques.plrd import (
    FactoredEmbedding,
    factor_tied_embedding,
    family_members,
    family_ranks,
    lower_ranks,
    lowered,
    plain_linears,
)


def llama():
    with torch.device("meta"):
        return LlamaForCausalLM(LlamaConfig())


def mistral():
    with torch.device("meta"):
        return MistralForCausalLM(MistralConfig(sliding_window=None))


def in_layers(name, layer):
    return "layers" in name or name.startswith("transformer.h")


# Worked out beforehand: parent, compression, ranks in the order of a layer's matrices, parameters in billions.
FAMILIES = [
    (llama, 4 / 3, [1536] * 4 + [2238] * 3, 5.118),
    (llama, 2.0, [1024] * 4 + [1492] * 3, 3.500),
    (llama, 2.5, [819] * 4 + [1194] * 3, 2.853),
    (llama, 4.0, [512] * 4 + [746] * 3, 1.881),
    (mistral, 4 / 3, [1536, 614, 614, 1536] + [2389] * 3, 5.496),
    (mistral, 2.0, [1024, 409, 409, 1024] + [1592] * 3, 3.750),
    (mistral, 2.5, [819, 327, 327, 819] + [1274] * 3, 3.053),
]


@pytest.mark.parametrize(("build", "compression", "expected", "billions"), FAMILIES)
def test_members_of_large_parents(build, compression, expected, billions):
    model = build()
    (ranks,) = family_ranks(model, [compression], in_layers)
    assert [rank for name, rank in ranks.items() if ".layers.0." in name] == expected
    decompose_model(model, ranks)
    assert count_parameters(model) / 1e9 == pytest.approx(billions, abs=6e-4)


@pytest.mark.parametrize(
    ("compression", "expected", "millions"),
    [(2, [288, 192, 307, 307], 81.95), (4, [144, 96, 153, 153], 60.68), (8, [72, 48, 76, 76], 50.05)],
)
def test_members_of_gpt2(compression, expected, millions):
    with torch.device("meta"):
        model = plain_linears(GPT2LMHeadModel(GPT2Config()))
    assert count_parameters(model) == 124_439_808
    (ranks,) = family_ranks(model, [compression], in_layers)
    assert [rank for name, rank in ranks.items() if ".h.0." in name] == expected
    decompose_model(model, ranks)
    assert count_parameters(model) / 1e6 == pytest.approx(millions, abs=0.006)


def tiny_gpt2():
    torch.manual_seed(0)
    sizes = {"n_embd": 48, "n_layer": 2, "n_head": 4, "vocab_size": 60, "n_positions": 32}
    return GPT2LMHeadModel(GPT2Config(**sizes)).eval()


def test_plain_linears_compute_the_same():
    model, tokens = tiny_gpt2(), torch.randint(0, 60, (2, 16))
    before = model(tokens).logits
    plain = plain_linears(model)
    assert type(plain.transformer.h[0].attn.c_attn) is nn.Linear
    assert plain.transformer.h[0].attn.c_attn.weight.shape == (144, 48)
    torch.testing.assert_close(plain(tokens).logits, before, atol=1e-5, rtol=1e-5)


def test_full_rank_keeps_the_logits_and_the_parent():
    model, tokens = plain_linears(tiny_gpt2()), torch.randint(0, 60, (2, 16))
    parent = copy.deepcopy(model)
    linears = [(n, m) for n, m in model.named_modules() if type(m) is nn.Linear and n != "lm_head"]
    member = lower_ranks(copy.deepcopy(model), {name: min(layer.weight.shape) for name, layer in linears})
    torch.testing.assert_close(member(tokens).logits, parent(tokens).logits, atol=1e-4, rtol=1e-4)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), parent.parameters(), strict=True))
    assert member.lm_head.weight is member.transformer.wte.weight


@pytest.mark.parametrize("again", ["product", "second"])
@given(st.integers(3, 10), st.integers(3, 10), st.data())
@settings(max_examples=25, deadline=None)
def test_chained_truncation_is_direct_truncation(again, inputs, outputs, data):
    high = data.draw(st.integers(2, min(inputs, outputs)))
    low = data.draw(st.integers(1, high))
    torch.manual_seed(data.draw(st.integers(0, 1000)))
    layer = nn.Linear(inputs, outputs).double()
    pair = decompose(layer, high)
    first, second = lowered(pair.first.weight.T, pair.second.weight.T, low, again)
    torch.testing.assert_close((first @ second).T, reconstruct(decompose(layer, low)), atol=1e-9, rtol=1e-7)


@given(st.integers(0, 1000), st.integers(1, 5))
@settings(max_examples=25, deadline=None)
def test_after_training_the_product_is_never_worse(seed, rank):
    """Training is a perturbation of both factors here."""
    generator = torch.Generator().manual_seed(seed)
    first, second = (torch.randn(*shape, generator=generator).double() for shape in ((9, 6), (6, 8)))
    target = first @ second
    errors = {}
    for again in ("product", "second"):
        a, b = lowered(first, second, rank, again)
        errors[again] = float((target - a @ b).norm())
    best = torch.linalg.svdvals(target)[rank:].norm()
    assert errors["product"] == pytest.approx(float(best), rel=1e-9)
    assert errors["product"] <= errors["second"] * (1 + 1e-12)


def test_a_family_keeps_two_layers_each():
    model = plain_linears(tiny_gpt2())
    family = family_ranks(model, (2.0, 4.0, 8.0), in_layers)
    tokens, sizes = torch.randint(0, 60, (1, 8)), []
    for ranks in family:
        lower_ranks(model, ranks)
        sizes.append(count_parameters(model))
        linears = [m for n, m in model.named_modules() if type(m) is nn.Linear and n != "lm_head"]
        assert len(linears) == 2 * 2 * 4
        assert torch.isfinite(model(tokens).logits).all()
    assert sizes == sorted(sizes, reverse=True)


def test_a_member_loads_into_a_fresh_one():
    family = family_ranks(plain_linears(tiny_gpt2()), (2.0, 4.0), in_layers)
    member = plain_linears(tiny_gpt2())
    for ranks in family:
        lower_ranks(member, ranks)
    fresh = decompose_model(plain_linears(tiny_gpt2()), family[-1])
    fresh.load_state_dict(member.state_dict())
    tokens = torch.randint(0, 60, (1, 8))
    assert torch.equal(fresh.eval()(tokens).logits, member.eval()(tokens).logits)


def test_biases_and_types_are_kept():
    pair = decompose_model(nn.Sequential(nn.Linear(8, 6).to(torch.bfloat16)), {"0": 4})
    bias = pair[0].second.bias.clone()
    lower_ranks(pair, {"0": 2})
    assert torch.equal(pair[0].second.bias, bias)
    assert {p.dtype for p in pair.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda m: lower_ranks(m, {"0": 5}), "rank=5 for layer '0'"),
        (lambda m: lower_ranks(m, {"0": 0}), "rank=0"),
        (lambda m: lower_ranks(m, {"7": 2}), "'7'"),
        (lambda m: lower_ranks(m, {"1": 2}), "no pair"),
        (lambda m: lower_ranks(m, {"0": 2}, again="both"), "again='both'"),
        (lambda m: family_ranks(m, []), "compressions"),
        (lambda m: family_ranks(m, [2.0, 2.0]), "above the one before"),
        (lambda m: family_ranks(m, [0.0]), "compression=0"),
    ],
)
def test_bad_input_is_named(call, named):
    model = decompose_model(nn.Sequential(nn.Linear(8, 8), nn.Conv2d(4, 4, 3)), {"0": 4, "1": (2, 2)})
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=named):
        call(model)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_members_come_one_after_the_other_and_leave_the_parent_alone():
    """The recovery is any code: here plain steps towards the parent's own outputs."""
    torch.manual_seed(0)
    parent = nn.Sequential(nn.Linear(24, 24), nn.Tanh(), nn.Linear(24, 24))
    before, inputs = copy.deepcopy(parent.state_dict()), torch.randn(64, 24)
    family, errors, seen = family_ranks(parent, (1.5, 3.0, 6.0)), [], []

    def error(model):
        return nn.functional.mse_loss(model(inputs), parent(inputs).detach())

    def recover(member):
        seen.append(member)
        optimiser = torch.optim.Adam(member.parameters(), lr=1e-2)
        errors.append([error(member).item()])
        for _ in range(30):
            optimiser.zero_grad()
            error(member).backward()
            optimiser.step()
        errors[-1].append(error(member).item())

    members = family_members(parent, family, recover)
    assert not seen, "nothing happens before a member is asked for"
    members = list(members)
    assert [id(member) for member in members] == [id(member) for member in seen]
    assert [{name: pair.rank for name, pair in factors_of(member).items()} for member in members] == family
    assert all(after < cut for cut, after in errors)
    assert all(torch.equal(before[name], value) for name, value in parent.state_dict().items())
    kept = [reconstruct(member[0]).detach() for member in members]
    chained = lowered(members[1][0].first.weight.T, members[1][0].second.weight.T, family[2]["0"])
    assert not torch.allclose((chained[0] @ chained[1]).T.float(), kept[2], atol=1e-3), "the last one was trained on"
    direct = next(family_members(parent, family[2:], lambda member: None))
    assert not torch.allclose(reconstruct(direct[0]), kept[2], atol=1e-3), "a later member carries what was learnt"


def test_members_without_training_are_those_of_the_parent():
    model = plain_linears(tiny_gpt2())
    family = family_ranks(model, (2.0, 4.0), in_layers)
    *_, last = family_members(model, family, lambda member: None)
    once = lower_ranks(copy.deepcopy(model), family[-1])
    tokens = torch.randint(0, 60, (1, 8))
    torch.testing.assert_close(last(tokens).logits, once(tokens).logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("ranks", [[48], [20], [20, 7]])
def test_a_factored_embedding_is_that_of_the_truncated_matrix(ranks):
    model, tokens = plain_linears(tiny_gpt2()), torch.randint(0, 60, (2, 16))
    reference = copy.deepcopy(model)
    left, right = svd_factors(model.lm_head.weight.T, ranks[-1])
    with torch.no_grad():
        reference.transformer.wte.weight.copy_((left @ right).T)
    assert factor_tied_embedding(model, ranks[0]) is model
    for rank in ranks[1:]:
        lower_ranks(model, {"lm_head": rank})
    assert isinstance(model.transformer.wte, FactoredEmbedding)
    assert model.transformer.wte.pair is model.lm_head, "one pair in both places"
    torch.testing.assert_close(model(tokens).logits, reference(tokens).logits, atol=1e-4, rtol=1e-4)
    assert count_parameters(model) == count_parameters(reference) - 60 * 48 + ranks[-1] * (60 + 48)
    model(tokens).logits.sum().backward()
    assert model.lm_head.first.weight.grad.abs().sum() > 0


def test_a_member_with_a_factored_embedding_writes_the_same_text_after_loading():
    member = lower_ranks(factor_tied_embedding(plain_linears(tiny_gpt2()), 30), {"transformer.h.0.mlp.c_fc": 9})
    fresh = lower_ranks(factor_tied_embedding(plain_linears(tiny_gpt2()), 30), {"transformer.h.0.mlp.c_fc": 9})
    with torch.no_grad():
        for weight in fresh.parameters():
            weight.add_(1.0)
    fresh.load_state_dict(member.state_dict())
    tokens = torch.randint(0, 60, (1, 4))
    options = {"max_new_tokens": 6, "do_sample": False, "attention_mask": torch.ones_like(tokens), "pad_token_id": 0}
    assert torch.equal(fresh.generate(tokens, **options), member.generate(tokens, **options))


def test_gpt2_at_four_with_its_embedding():
    with torch.device("meta"):
        model = plain_linears(GPT2LMHeadModel(GPT2Config()))
    first, second = family_ranks(model, [2, 4], in_layers)
    factor_tied_embedding(lower_ranks(model, first), 378)
    assert count_parameters(model) / 1e6 == pytest.approx(62.64, abs=0.006)
    lower_ranks(model, {**second, "lm_head": 189})
    assert count_parameters(model) / 1e6 == pytest.approx(31.73, abs=0.006)


def test_an_embedding_of_its_own_is_not_factored():
    with pytest.raises(ValueError, match="no embedding that shares its weight"):
        factor_tied_embedding(llama(), 8)
    model = tiny_gpt2()
    with pytest.raises(ValueError, match="rank=49"):
        factor_tied_embedding(model, 49)
    assert isinstance(model.transformer.wte, nn.Embedding)


def test_a_pair_of_convolutions_is_refused():
    """It would come back as linear layers."""
    model = decompose_model(nn.Sequential(nn.Conv2d(8, 8, 1)), {"0": 4})
    with pytest.raises(ValueError, match="no pair of linear layers"):
        lower_ranks(model, {"0": 2})
    assert isinstance(model[0].first, nn.Conv2d)
