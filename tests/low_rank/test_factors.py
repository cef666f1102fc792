"""Decomposed layers: exactness at full rank, known errors, an independent library, model surgery, freezing."""

import copy

import pytest
import tensorly
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tensorly.decomposition import partial_tucker
from torch import nn
from torchvision.models import resnet50

from leantrain.low_rank.factors import (
    SVDPair,
    TuckerTriple,
    choose_ranks,
    decompose,
    decompose_model,
    dense_size,
    factored_size,
    factors_of,
    is_decomposable,
    merge,
    reconstruct,
    svd_factors,
    train_part,
    tucker_factors,
)

LAYERS = {
    "linear": (lambda: nn.Linear(24, 16), (3, 24)),
    "no bias": (lambda: nn.Linear(16, 24, bias=False), (3, 16)),
    "tokens": (lambda: nn.Linear(24, 16), (2, 5, 24)),
    "1x1": (lambda: nn.Conv2d(12, 20, 1), (2, 12, 7, 6)),
    "1x1 strided, padded": (lambda: nn.Conv2d(12, 20, 1, stride=2, padding=1), (2, 12, 7, 6)),
    "3x3": (lambda: nn.Conv2d(12, 10, 3, padding=1), (2, 12, 7, 6)),
    "3x3 strided, dilated": (lambda: nn.Conv2d(8, 10, 3, stride=2, dilation=2, padding=2), (2, 8, 11, 9)),
    "1x3 reflected": (lambda: nn.Conv2d(8, 6, (1, 3), padding=(0, 1), padding_mode="reflect"), (2, 8, 5, 6)),
    "5x5 same": (lambda: nn.Conv2d(6, 6, 5, padding="same", bias=False), (1, 6, 9, 9)),
}


def full_rank(layer):
    outputs, inputs = layer.weight.shape[:2]
    return min(inputs, outputs) if layer.weight[0, 0].numel() == 1 else (inputs, outputs)


@pytest.mark.parametrize("name", LAYERS)
def test_full_rank_is_the_layer(name):
    torch.manual_seed(0)
    build, shape = LAYERS[name]
    layer, x = build(), torch.randn(shape)
    factored = decompose(layer, full_rank(layer))
    torch.testing.assert_close(factored(x), layer(x), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(reconstruct(factored), layer.weight, atol=1e-5, rtol=1e-5)
    dense = merge(factored)
    assert type(dense) is type(layer)
    assert repr(dense) == repr(layer)
    torch.testing.assert_close(dense(x), layer(x), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", LAYERS)
def test_factors_compute_what_they_stand_for(name):
    """At any rank the factors are the dense layer with the reconstructed weight."""
    torch.manual_seed(1)
    build, shape = LAYERS[name]
    layer, x = build(), torch.randn(shape)
    factored = decompose(layer, 3 if isinstance(full_rank(layer), int) else (3, 2))
    torch.testing.assert_close(factored(x), merge(factored)(x), atol=1e-5, rtol=1e-5)
    sizes = sum(f.weight.numel() for f in factored)
    assert sizes == factored_size(layer, factored.rank)


@given(st.integers(2, 12), st.integers(2, 12), st.data())
@settings(max_examples=40, deadline=None)
def test_the_error_of_a_pair_is_the_discarded_singular_values(inputs, outputs, data):
    rank = data.draw(st.integers(1, min(inputs, outputs)))
    seed = data.draw(st.integers(0, 1000))
    matrix = torch.randn(inputs, outputs, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    first, second = svd_factors(matrix, rank)
    tail = torch.linalg.svdvals(matrix)[rank:].norm()
    torch.testing.assert_close((matrix - first @ second).norm(), tail, atol=1e-10, rtol=1e-10)
    torch.testing.assert_close(first.norm(), second.norm())


@pytest.mark.parametrize("ranks", [(4, 5), (7, 3), (12, 10)])
def test_tucker_factors_agree_with_tensorly(ranks):
    """The two alternate in another order from another start; both must arrive at the same error."""
    weight = torch.randn(10, 12, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    first, last, core = tucker_factors(weight, ranks, sweeps=60)
    ours = torch.einsum("qphw,cp,sq->schw", core, first, last)
    with tensorly.backend_context("pytorch"):
        (other_core, factors), _ = partial_tucker(
            weight, rank=[ranks[1], ranks[0]], modes=[0, 1], n_iter_max=200, tol=1e-12, init="svd"
        )
    theirs = torch.einsum("qphw,sq,cp->schw", other_core, *factors)
    torch.testing.assert_close((weight - ours).norm(), (weight - theirs).norm(), atol=1e-6, rtol=1e-6)


def test_sweeps_never_make_it_worse():
    weight = torch.randn(16, 14, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    errors = []
    for sweeps in range(5):
        first, last, core = tucker_factors(weight, (5, 6), sweeps)
        torch.testing.assert_close(first.T @ first, torch.eye(5, dtype=torch.float64))
        torch.testing.assert_close(last.T @ last, torch.eye(6, dtype=torch.float64))
        error = (weight - torch.einsum("qphw,cp,sq->schw", core, first, last)).norm()
        # Orthonormal factors: what is kept and what is lost make up the whole.
        torch.testing.assert_close(error**2 + core.norm() ** 2, weight.norm() ** 2)
        errors.append(float(error))
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < errors[0]


def test_gradients_pass_through_every_factor():
    torch.manual_seed(0)
    conv = decompose(nn.Conv2d(4, 5, 3, padding=1).double(), (3, 2))
    x = torch.randn(1, 4, 4, 4, dtype=torch.float64, requires_grad=True)
    names = [name for name, _ in conv.named_parameters()]

    def call(x, *parameters):
        return torch.func.functional_call(conv, dict(zip(names, parameters, strict=True)), x)

    assert torch.autograd.gradcheck(call, (x, *conv.parameters()))


@pytest.mark.parametrize("branches", [1, 2, 3])
def test_branches_keep_the_diagonal_blocks(branches):
    torch.manual_seed(0)
    layer = nn.Conv2d(12, 18, 3, padding=1)
    whole, cut = decompose(layer, (6, 12)), decompose(layer, (6, 12), branches=branches)
    assert cut.core.groups == branches
    mask = torch.block_diag(*[torch.ones(12 // branches, 6 // branches)] * branches)[..., None, None]
    dropped = (whole.core.weight * (1 - mask)).norm()
    lost = (reconstruct(whole) - reconstruct(cut)).norm()
    torch.testing.assert_close(lost, dropped, atol=1e-5, rtol=1e-5)
    x = torch.randn(2, 12, 5, 5)
    torch.testing.assert_close(cut(x), merge(cut)(x), atol=1e-5, rtol=1e-5)
    if branches == 1:
        assert torch.equal(cut(x), whole(x))


def test_type_layout_mode_and_device_are_kept():
    conv = nn.Conv2d(16, 16, 3, padding=1, bias=True).to(torch.bfloat16).to(memory_format=torch.channels_last).eval()
    thin = decompose(conv, (8, 8))
    assert {p.dtype for p in thin.parameters()} == {torch.bfloat16}
    assert thin.core.weight.is_contiguous(memory_format=torch.channels_last)
    assert not thin.training
    assert torch.equal(thin.last.bias, conv.bias)
    meta = decompose(nn.Conv2d(16, 8, 3, device="meta"), (4, 4))
    assert all(p.is_meta for p in meta.parameters())


def test_no_random_numbers_are_used_up():
    layer = nn.Conv2d(16, 16, 3)
    before = torch.get_rng_state()
    decompose(layer, (4, 4))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("layer", "rank", "named"),
    [
        (nn.Linear(8, 4), 0, "rank=0"),
        (nn.Linear(8, 4), 5, "1 to 4"),
        (nn.Linear(8, 4), (2, 2), r"rank=\(2, 2\)"),
        (nn.Conv2d(8, 4, 3), 2, "expected a pair"),
        (nn.Conv2d(8, 4, 3), (9, 2), r"\(8, 4\)"),
        (nn.Conv2d(8, 8, 3, groups=2), (2, 2), "2 groups"),
        (nn.ReLU(), 1, "ReLU"),
        (nn.Conv1d(8, 8, 1), 1, "Conv1d"),
    ],
)
def test_bad_layers_and_ranks_are_named(layer, rank, named):
    with pytest.raises(ValueError, match=named):
        decompose(layer, rank)


@pytest.mark.parametrize(("rank", "branches"), [((6, 4), 3), ((6, 4), 0)])
def test_branches_must_divide_the_ranks(rank, branches):
    with pytest.raises(ValueError, match=f"branches={branches}"):
        decompose(nn.Conv2d(8, 8, 3), rank, branches=branches)


def test_branches_of_a_model_are_those_of_its_triples():
    model = nn.Sequential(nn.Linear(16, 16), nn.Conv2d(16, 16, 3))
    decompose_model(model, {"0": 4, "1": (4, 8)}, branches=4)
    assert (model[0].rank, model[1].core.groups) == (4, 4)
    with pytest.raises(ValueError, match="branches=3"):
        decompose_model(nn.Sequential(nn.Conv2d(8, 8, 3)), {"0": (4, 4)}, branches=3)


def test_a_matrix_has_no_branches():
    with pytest.raises(ValueError, match="branches=2"):
        decompose(nn.Linear(8, 8), 4, branches=2)


def shrunk(model, ranks):
    before = sum(p.numel() for p in model.parameters())
    decompose_model(model, ranks)
    return 100 * (1 - sum(p.numel() for p in model.parameters()) / before)


def in_blocks(name, layer):
    return name.startswith("layer") and "downsample" not in name


def test_parameters_of_resnet50():
    """Counts worked out beforehand: blocks only, blocks and classifier, everything but the stem."""
    cases = {
        40.65: in_blocks,
        44.67: lambda name, layer: name == "fc" or in_blocks(name, layer),
        50.10: lambda name, layer: name != "conv1",
    }
    for expected, where in cases.items():
        with torch.device("meta"):
            model = resnet50()
        assert sum(p.numel() for p in model.parameters()) == 25_557_032
        assert shrunk(model, choose_ranks(model, compression=2, where=where)) == pytest.approx(expected, abs=0.005)


def test_ranks_of_vit_small():
    with torch.device("meta"):
        model = timm.create_model("vit_small_patch16_224")
    ranks = choose_ranks(model, compression=2, where=lambda name, layer: name.startswith("blocks"))
    assert [r for name, r in ranks.items() if name.startswith("blocks.0.")] == [144, 96, 153, 153]
    decompose_model(model, ranks)
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(11.41e6, abs=5e3)


def test_a_layer_that_would_grow_is_left_alone():
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 2))
    assert choose_ranks(model, compression=2) == {"0": 16}
    assert choose_ranks(model, compression=1) == {"1": 1}
    assert choose_ranks(model, compression=0.5) == {}
    assert choose_ranks(model, energy=1.0) == {}


def test_energy_keeps_what_it_promises():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(40, 30), nn.Conv2d(8, 12, 3))
    with torch.no_grad():  # falling spectra, as trained weights have
        for layer in model:
            flat = layer.weight.flatten(1)
            u, s, v = torch.linalg.svd(flat, full_matrices=False)
            layer.weight.copy_((u * s * 0.7 ** torch.arange(len(s)) @ v).reshape(layer.weight.shape))
    ranks = choose_ranks(model, energy=0.95)
    assert set(ranks) == {"0", "1"}
    weight, kept = model[0].weight.detach(), reconstruct(decompose(model[0], ranks["0"])).detach()
    assert 0.95 <= float(kept.norm() ** 2 / weight.norm() ** 2) < 1
    less = reconstruct(decompose(model[0], ranks["0"] - 1)).detach()
    assert float(less.norm() ** 2 / weight.norm() ** 2) < 0.95


def test_ranks_are_rounded_down_to_a_multiple():
    model = nn.ModuleDict({"a": nn.Linear(512, 512), "b": nn.Linear(64, 32), "c": nn.Conv2d(64, 64, 3)})
    assert choose_ranks(model, compression=2) == {"a": 128, "b": 10, "c": (38, 38)}
    assert choose_ranks(model, compression=2, multiple=32) == {"a": 128, "b": 10, "c": (32, 32)}


def test_tied_weights_are_left_alone():
    model = nn.ModuleDict({"embedding": nn.Embedding(50, 40), "body": nn.Linear(40, 40), "head": nn.Linear(40, 50)})
    model["head"].weight = model["embedding"].weight
    assert list(choose_ranks(model, compression=2)) == ["body"]


def test_subclasses_are_left_alone():
    attention = nn.MultiheadAttention(16, 2)
    assert not is_decomposable(attention.out_proj)
    assert choose_ranks(attention, compression=2) == {}


def test_a_layer_with_two_names_stays_one_layer():
    shared = nn.Linear(32, 32)
    model = nn.Sequential(shared, nn.ReLU(), shared)
    decompose_model(model, {"0": 4})
    assert model[0] is model[2]
    assert isinstance(model[2], SVDPair)


def test_surgery_changes_nothing_when_it_is_refused():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    before = copy.deepcopy(model.state_dict())
    for ranks, named in (({"0": 2, "2": 2}, "'2'"), ({"0": 2, "1": 9}, "rank=9")):
        with pytest.raises(ValueError, match=named):
            decompose_model(model, ranks)
    assert list(model.state_dict()) == list(before)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({}, "exactly one"),
        ({"compression": 2, "energy": 0.9}, "exactly one"),
        ({"compression": -1}, "compression=-1"),
        ({"energy": 2}, "energy=2"),
        ({"compression": 2, "multiple": 0}, "multiple=0"),
    ],
)
def test_bad_options_are_named(options, named):
    with pytest.raises(ValueError, match=named):
        choose_ranks(nn.Sequential(nn.Linear(8, 8)), **options)


def test_a_decomposed_model_saves_and_loads():
    model = nn.Sequential(nn.Linear(32, 32), nn.Conv2d(4, 4, 3))
    ranks = {"0": 4, "1": (2, 2)}
    saved = decompose_model(copy.deepcopy(model), ranks)
    again = decompose_model(model, ranks, sweeps=0)
    again.load_state_dict(saved.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(saved.parameters(), again.parameters(), strict=True))


def small():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(4, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 1), nn.Flatten(), nn.Linear(128, 3))
    return decompose_model(model, {"0": (3, 4), "2": 3, "4": 2})


@pytest.mark.parametrize("part", ["inner", "outer", None])
@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
def test_only_the_named_part_moves(part, optimizer):
    model, free = small(), small()
    train_part(model, part)
    steady = optimizer(model.parameters(), lr=0.01, weight_decay=0.1)
    before = copy.deepcopy(dict(model.named_parameters()))
    x, y = torch.randn(5, 4, 4, 4), torch.tensor([0, 1, 2, 0, 1])
    nn.functional.cross_entropy(model(x), y).backward()
    nn.functional.cross_entropy(free(x), y).backward()
    steady.step()
    inner = {"0.core.weight", "2.second.weight", "4.second.weight"}
    for (name, parameter), other in zip(model.named_parameters(), free.parameters(), strict=True):
        trained = part is None or name.endswith("bias") or (name in inner) == (part == "inner")
        assert torch.equal(parameter, before[name]) != trained, name
        assert (parameter.grad is not None) == trained
        assert (parameter in steady.state) == (trained and optimizer is torch.optim.AdamW)
        if trained:
            assert torch.equal(parameter.grad, other.grad)


def test_freezing_drops_gradients_that_are_there():
    model = small()
    model(torch.randn(1, 4, 4, 4)).sum().backward()
    train_part(model, "inner")
    assert model[0].first.weight.grad is None
    train_part(model, None)
    assert all(p.requires_grad for p in model.parameters())


def test_freezing_wants_a_decomposed_model():
    with pytest.raises(ValueError, match="no decomposed layer"):
        train_part(nn.Linear(2, 2), "inner")
    with pytest.raises(ValueError, match="part='both'"):
        train_part(small(), "both")


def test_factors_are_found_by_name():
    found = factors_of(small())
    assert {name: type(layer) for name, layer in found.items()} == {"0": TuckerTriple, "2": SVDPair, "4": SVDPair}
    assert dense_size(merge(found["0"])) == 4 * 8 * 9
