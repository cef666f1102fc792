"""FastMIM: histograms against scikit-image and a loop, masks, losses, models, transfer and training."""

from __future__ import annotations

import copy
import itertools
import math
from functools import partial

import lightning as L
import numpy as np
import pytest
import scipy.ndimage
import skimage.feature
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.layers import DropPath
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from leantrain.data import images
from leantrain.measure import count_macs, count_parameters, saved_activation_bytes
from leantrain.techniques.fastmim import (
    FastMIM,
    FineTuning,
    MaskedAutoencoder,
    Pretraining,
    full_size,
    group_cells,
    hide,
    hog,
    layer_decayed,
    masked_mean,
    patches,
    random_mask,
    resize,
    swin_encoder,
    transfer,
    ungroup_cells,
    vit_encoder,
)

F64 = torch.float64


def small_vit(size=16, **options):
    return vit_encoder(**{"image_size": size, "patch_size": 4, "dim": 16, "depth": 2, "heads": 2, **options})


def small_swin(size=32, window=2):
    return swin_encoder(image_size=size, window=window, dim=8, depths=(1, 1), heads=(1, 2))


def small_mim(**options):
    return FastMIM(small_vit(), **{"cell": 2, "decoder_width": 16, "decoder_heads": 2, **options})


# ---------------------------------------------------------------- histograms


def hog_by_hand(image, cell, bins=9):
    """One channel, pixel by pixel, from the definition."""
    height, width = image.shape
    found = np.zeros((bins, height // cell, width // cell))

    def at(row, column):  # reflected, without repeating the border
        row, column = abs(row), abs(column)
        row = 2 * (height - 1) - row if row >= height else row
        column = 2 * (width - 1) - column if column >= width else column
        return image[row, column]

    for row, column in itertools.product(range(height), range(width)):
        gx = sum(w * (at(row + d, column - 1) - at(row + d, column + 1)) for d, w in ((-1, 1), (0, 2), (1, 1)))
        gy = sum(w * (at(row - 1, column + d) - at(row + 1, column + d)) for d, w in ((-1, 1), (0, 2), (1, 1)))
        angle = math.atan2(gx, gy)
        angle = angle + math.pi if angle < 0 else angle
        found[int(bins * angle / math.pi) % bins, row // cell, column // cell] += math.hypot(gx, gy)
    norms = np.sqrt((found**2).sum(0))
    return found / np.where(norms > 0, norms, 1)


def hog_of_skimage(image, cell, bins=9):
    """Scikit-image measures angles from the other axis, so the image is transposed, and its histograms back."""
    found = skimage.feature.hog(
        image.T, bins, (cell, cell), cells_per_block=(1, 1), block_norm="L2", feature_vector=False
    )
    return found[:, :, 0, 0].transpose(2, 1, 0)


@pytest.mark.parametrize(("height", "width", "cell", "bins"), [(16, 16, 8, 9), (24, 16, 4, 9), (12, 20, 2, 6)])
def test_hog_equals_scikit_image_on_central_differences(height, width, cell, bins):
    x = torch.randn(2, 3, height, width, dtype=F64, generator=torch.Generator().manual_seed(cell))
    found = hog(x, cell=cell, bins=bins, gradient="central")
    for b, c in itertools.product(range(2), range(3)):
        expected = hog_of_skimage(x[b, c].numpy(), cell, bins)
        np.testing.assert_allclose(found[b, c], expected, rtol=0, atol=1e-6)  # it adds cells up in single precision


def test_hog_equals_scikit_image_on_the_sobel_gradients_of_scipy(monkeypatch):
    """The same histograms with the gradients of the authors' code; only the gradients are put in its place."""

    def gradients(channel):
        return tuple(scipy.ndimage.sobel(channel, axis, mode="mirror") for axis in (0, 1))

    monkeypatch.setattr("skimage.feature._hog._hog_channel_gradient", gradients)
    x = torch.randn(1, 2, 32, 24, dtype=F64, generator=torch.Generator().manual_seed(0))
    found = hog(x, cell=8)
    for c in range(2):
        np.testing.assert_allclose(found[0, c], hog_of_skimage(x[0, c].numpy(), 8), rtol=0, atol=1e-6)


@pytest.mark.parametrize("cell", [2, 8])
def test_hog_equals_the_loop(cell):
    x = torch.randn(1, 2, 16, 24, dtype=F64, generator=torch.Generator().manual_seed(1))
    for c in range(2):
        np.testing.assert_allclose(hog(x, cell=cell)[0, c], hog_by_hand(x[0, c].numpy(), cell), rtol=0, atol=1e-12)


def ramp(of):
    i, j = torch.meshgrid(torch.arange(32.0), torch.arange(32.0), indexing="ij")
    return of(i, j)[None, None]


@pytest.mark.parametrize(
    ("of", "place"),
    [(lambda i, j: j, 4), (lambda i, j: i, 0), (lambda i, j: i + j, 2), (lambda i, j: j - i, 6)],
    ids=["columns", "rows", "sum", "difference"],
)
def test_known_bins_of_ramps(of, place):
    inner = hog(ramp(of))[0, 0, :, 1:3, 1:3]
    expected = torch.zeros(9)
    expected[place] = 1
    torch.testing.assert_close(inner, expected[:, None, None].expand_as(inner))


def test_known_sums_of_a_ramp():
    """Each pixel has a gradient of 8; at the border the reflection leaves none across it."""
    cells = hog(ramp(lambda i, j: j), normalise=False)[0, 0]
    assert cells[4, 1, 1] == 512
    assert cells[4, 0, 0] == 448
    assert cells.sum() == cells[4].sum()


def test_a_flat_image_has_no_orientation():
    flat = hog(torch.full((1, 3, 16, 16), 0.1234567))
    assert torch.equal(flat, torch.zeros(1, 3, 9, 2, 2))


@given(a=st.floats(0.1, 10), sign=st.sampled_from([-1, 1]), b=st.floats(-5, 5), seed=st.integers(0, 1000))
@settings(max_examples=20, deadline=None)
def test_neither_contrast_nor_brightness_matter(a, sign, b, seed):
    x = torch.rand(1, 2, 16, 16, dtype=F64, generator=torch.Generator().manual_seed(seed))
    torch.testing.assert_close(hog(sign * a * x + b), hog(x), atol=1e-6, rtol=0)


def test_channels_are_apart():
    x = torch.rand(2, 3, 16, 16, dtype=F64, generator=torch.Generator().manual_seed(0))
    assert torch.equal(hog(x.flip(1)), hog(x).flip(1))
    tokens = group_cells(hog(x), 2).unflatten(2, (4, 3, 9))
    assert torch.equal(group_cells(hog(x.flip(1)), 2).unflatten(2, (4, 3, 9)), tokens.flip(3))


def test_histograms_have_norm_one_and_mean_square_a_ninth():
    x = torch.rand(2, 3, 32, 32, dtype=F64, generator=torch.Generator().manual_seed(0))
    found = hog(x)
    torch.testing.assert_close(found.norm(dim=2), torch.ones(2, 3, 4, 4, dtype=F64))
    assert found.square().mean().item() == pytest.approx(1 / 9)


def test_half_precision_is_computed_in_single():
    x = torch.rand(1, 1, 16, 16, generator=torch.Generator().manual_seed(0)).bfloat16()
    found = hog(x)
    assert found.dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(hog(x.float()), found)


@pytest.mark.parametrize(("encoder", "size", "cell", "numbers"), [(small_vit, 16, 2, 108), (small_swin, 32, 2, 432)])
def test_as_many_numbers_a_token_as_in_the_paper(encoder, size, cell, numbers):
    """2 x 2 cells of 27 numbers for a block of a ViT, 4 x 4 for one of a Swin transformer, which is twice as large."""
    model = FastMIM(encoder(), cell=cell, decoder_width=16, decoder_heads=2)
    assert model.targets(torch.rand(2, 3, size, size)).shape == (2, 16, numbers)


def test_cells_of_a_token_are_those_of_its_place():
    x = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    cells = hog(x, cell=4)
    tokens = group_cells(cells, 2)
    torch.testing.assert_close(tokens[1, 5].unflatten(0, (2, 2, 3, 9)), cells[1, :, :, 2:4, 2:4].permute(2, 3, 0, 1))
    assert torch.equal(ungroup_cells(tokens, 2, 3), cells)


def test_normalised_patches():
    x = torch.rand(2, 3, 16, 16, dtype=F64, generator=torch.Generator().manual_seed(0))
    found, raw = patches(x, 4), patches(x, 4, normalise=False)
    assert found.shape == (2, 16, 48)
    torch.testing.assert_close(found.mean(2), torch.zeros(2, 16, dtype=F64))
    spread = raw.var(2)
    torch.testing.assert_close(found.var(2), spread / (spread + 1e-6))
    torch.testing.assert_close(raw[0, 6].view(4, 4, 3), x[0, :, 4:8, 8:12].permute(1, 2, 0))


# ---------------------------------------------------------------- masks and the loss


@given(
    batch=st.integers(1, 4),
    grid=st.integers(2, 9),
    ratio=st.sampled_from([0.0, 0.25, 0.5, 0.6, 0.75]),
    seed=st.integers(0, 99),
)
@settings(max_examples=40, deadline=None)
def test_every_image_keeps_the_same_number(batch, grid, ratio, seed):
    mask = random_mask(batch, grid, ratio, generator=torch.Generator().manual_seed(seed))
    kept = (~mask).flatten(1).sum(1)
    assert kept.tolist() == [math.floor(round(grid * grid * (1 - ratio), 6))] * batch


def test_a_ninth_tenth_of_a_hundred_leaves_ten():
    assert (~random_mask(1, 10, 0.9)).sum() == 10, "100 * (1 - 0.9) is 9.999... in floating point"


def test_masks_are_uniform():
    often = random_mask(4000, 4, 0.75, generator=torch.Generator().manual_seed(0)).float().mean(0)
    assert (often - 0.75).abs().max() < 0.03


def test_hidden_blocks_have_the_colour_and_the_others_stay():
    x, mask = torch.rand(2, 3, 16, 16), random_mask(2, 4, 0.75, generator=torch.Generator().manual_seed(0))
    colour = torch.tensor([1.0, 2.0, 3.0]).view(1, 3, 1, 1)
    wide = nn.functional.interpolate(mask[:, None].float(), scale_factor=4, mode="nearest")
    torch.testing.assert_close(hide(x, mask, colour), (1 - wide) * x + wide * colour, rtol=0, atol=0)
    assert torch.equal(hide(x, torch.zeros_like(mask), colour), x)


def test_without_a_mask_the_encoder_sees_the_image():
    torch.manual_seed(0)
    model, x = small_mim(mask_ratio=0.0), torch.rand(2, 3, 16, 16)
    seen = []
    model.encoder.patch_embed.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    loss = model(x)
    assert torch.equal(seen[0], x)
    assert loss == 0, "nothing is hidden"


def test_only_hidden_tokens_count():
    torch.manual_seed(0)
    predicted, target = torch.randn(2, 9, 5), torch.randn(2, 9, 5)
    mask = random_mask(2, 3, 0.75)
    loss = masked_mean(predicted, target, mask)
    by_hand = (predicted - target)[mask.flatten(1)].square().mean()
    torch.testing.assert_close(loss, by_hand)
    other = torch.where(mask.flatten(1)[..., None], predicted, 100.0)
    assert torch.equal(masked_mean(other, target, mask), loss)


def test_predicting_nothing_costs_a_ninth():
    torch.manual_seed(0)
    model = small_mim()
    nn.init.zeros_(model.decoder[-1].weight)
    nn.init.zeros_(model.decoder[-1].bias)
    x = torch.randn(2, 3, 16, 16)
    assert model(x).item() == pytest.approx(1 / 9, abs=1e-6)


@pytest.mark.parametrize("encoder", [small_vit, small_swin])
@pytest.mark.parametrize("target", ["hog", "pixel", "raw pixel"])
def test_gradients_reach_all_that_is_trained_and_not_the_target(encoder, target):
    torch.manual_seed(0)
    net = encoder()
    model = FastMIM(net, target=target, cell=2, decoder_width=16, decoder_heads=2)
    x = torch.rand(2, 3, model.image_size, model.image_size, requires_grad=True)
    assert not model.targets(x).requires_grad
    model(x).backward()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert all(p.grad is not None and p.grad.isfinite().all() for p in trained.values())
    assert model.mask_token.grad.abs().sum() > 0
    assert ("encoder.pos_embed" in trained) is False


def test_the_gradient_of_the_loss():
    torch.manual_seed(0)
    model = small_mim().double()
    x, mask = torch.randn(1, 3, 16, 16, dtype=F64), random_mask(1, 4, 0.5)
    weight = model.decoder[-1].bias

    def loss(colour, bias):
        parts = {"mask_token": colour, f"decoder.{len(model.decoder) - 1}.bias": bias}
        return torch.func.functional_call(model, parts, (x, mask))

    inputs = model.mask_token.detach().clone().requires_grad_(), weight.detach()[:].clone().requires_grad_()
    assert torch.autograd.gradcheck(loss, inputs, fast_mode=True)


def test_the_class_token_is_dropped_and_tokens_stand_in_place():
    """A change of one visible block changes the target of that token and of its neighbours only."""
    torch.manual_seed(0)
    model, x = small_mim(target="raw pixel"), torch.rand(1, 3, 16, 16)
    other = x.clone()
    other[..., 4:8, 8:12] += 1
    changed = (model.targets(x) != model.targets(other)).any(2)[0]
    assert changed.nonzero().flatten().tolist() == [6]
    mask = torch.zeros(1, 4, 4, dtype=torch.bool)
    assert model.predict(x, mask).shape == model.targets(x).shape


# ---------------------------------------------------------------- encoders, MAE and counts


def test_position_embeddings_are_fixed_and_tell_places_apart():
    encoder = small_vit()
    places = encoder.pos_embed[0, 1:]
    assert not encoder.pos_embed.requires_grad
    assert not encoder.pos_embed[0, 0].any()
    torch.testing.assert_close(places.square().sum(1), torch.full((16,), 8.0))
    assert torch.pdist(places).min() > 0.1


def test_first_weights_do_not_depend_on_resolution_or_target():
    states = []
    for size, target in ((16, "hog"), (24, "hog"), (16, "pixel")):
        torch.manual_seed(0)
        model = FastMIM(small_vit(size), target=target, cell=2, decoder_width=16, decoder_heads=2)
        last = f"decoder.{len(model.decoder) - 1}"
        states.append({k: v for k, v in model.state_dict().items() if "pos_embed" not in k and last not in k})
    for other in states[1:]:
        assert all(torch.equal(v, states[0][k]) for k, v in other.items())


def test_swin_windows_fit_without_padding():
    model = swin_encoder(image_size=64, window=2, dim=8, depths=(1, 1, 1), heads=(1, 1, 1))
    assert [block.window_size for stage in model.layers for block in stage.blocks] == [(2, 2)] * 3
    assert model(torch.rand(1, 3, 64, 64)).shape == (1, 32)


def test_mae_sees_only_visible_tokens():
    torch.manual_seed(0)
    model = MaskedAutoencoder(small_vit(), decoder_width=16, decoder_depth=1, decoder_heads=2)
    lengths = []
    model.encoder.blocks.register_forward_pre_hook(lambda module, args: lengths.append(args[0].shape[1]))
    x, mask = torch.rand(2, 3, 16, 16), random_mask(2, 4, 0.75)
    predicted = []
    model.decoder.register_forward_hook(lambda module, args, out: predicted.append(out[:, 1:].detach()))
    model(x, mask)
    assert lengths == [5], "four of sixteen, and the class token"
    hidden = mask.repeat_interleave(4, 1).repeat_interleave(4, 2).unsqueeze(1)
    model(torch.where(hidden, 7.0, x), mask)
    assert torch.equal(predicted[0], predicted[1]), "what is hidden has no influence"
    model(torch.where(hidden, x, x + 0.1), mask)
    assert not torch.allclose(predicted[1], predicted[2])


def test_mae_puts_tokens_back_in_their_places():
    """With an identity for a decoder, what comes out at a visible place is what went in there."""
    torch.manual_seed(0)
    model = MaskedAutoencoder(small_vit(depth=1), decoder_width=16, decoder_depth=1, decoder_heads=2)
    model.encoder.blocks, model.encoder.norm, model.embed = nn.Identity(), nn.Identity(), nn.Identity()
    seen = []
    model.decoder = nn.Identity()
    model.decoder.register_forward_hook(lambda module, args, out: seen.append(out.detach()))
    x, mask = torch.rand(1, 3, 16, 16), random_mask(1, 4, 0.75)
    with pytest.raises(RuntimeError):
        model(x, mask)  # widths of the loss do not fit: only the order matters here
    expected = model.encoder.patch_embed(x) + model.encoder.pos_embed[:, 1:]
    expected = torch.where(mask.flatten(1)[..., None], model.mask_token, expected) + model.places[:, 1:]
    torch.testing.assert_close(seen[0][:, 1:], expected)


#: Million parameters and billion operations of forward and backward pass, one image; counted independently.
COUNTS = {
    ("fastmim", "vit-b", 128): (86.7, 34.2),
    ("simmim", "vit-b", 224): (86.2, 105.8),
    ("mae", "vit-b", 224): (111.9, 58.3),
    ("fastmim", "swin-b", 128): (90.2, 30.2),
    ("simmim", "swin-b", 192): (89.9, 67.9),  # 3,072 pixels of 1,024 numbers each
}


@pytest.mark.slow
@pytest.mark.parametrize("name", COUNTS, ids=lambda name: "-".join(map(str, name)))
def test_counts_of_the_full_networks(name):
    with torch.device("meta"):
        model, x = full_size(*name), torch.empty(1, 3, name[2], name[2])
        parameters, operations = COUNTS[name]
        assert count_parameters(model) / 1e6 == pytest.approx(parameters, rel=0.01)
        assert 6 * count_macs(model, x) / 1e9 == pytest.approx(operations, rel=0.02)


def test_a_backward_pass_counts_two_forward_passes():
    """Also for the first layer, since the learnt colour lies before it."""
    with torch.device("meta"):
        model, x = small_mim(), torch.empty(2, 3, 16, 16)
        forward = 2 * count_macs(model, x)
        counter = FlopCounterMode(display=False)
        with sdpa_kernel(SDPBackend.MATH), counter:
            model(x).backward()
    assert counter.get_total_flops() == 3 * forward


def test_what_is_kept_falls_with_the_resolution():
    torch.manual_seed(0)
    kept = {}
    for size in (16, 32):
        model = FastMIM(small_vit(size), cell=2, decoder_width=16, decoder_heads=2)
        x = torch.rand(2, 3, size, size)
        kept[size] = saved_activation_bytes(lambda m=model, x=x: m(x))
    assert 3.5 < kept[32] / kept[16] < 4.5, "64 tokens against 16"


# ---------------------------------------------------------------- transfer


@pytest.mark.parametrize("encoder", [small_vit, small_swin])
def test_a_transfer_at_the_same_size_keeps_every_weight(encoder):
    torch.manual_seed(0)
    net = encoder()
    before = copy.deepcopy(net.state_dict())
    size = net.patch_embed.img_size[0]
    model = transfer(net, num_classes=5, image_size=size, window=None if encoder is small_vit else 2)
    assert model(torch.rand(2, 3, size, size)).shape == (2, 5)
    kept = {k: v for k, v in model.state_dict().items() if "head" not in k and not k.startswith(("norm.", "fc_norm."))}
    assert all(torch.equal(v, before[k]) for k, v in kept.items())
    assert {k for k in before if not k.startswith("norm.")} <= set(kept)
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items()), "the encoder stays as it is"


def test_position_embeddings_are_interpolated_and_then_trained():
    torch.manual_seed(0)
    net = small_vit()
    model = transfer(net, num_classes=5, image_size=28)
    assert model.pos_embed.shape == (1, 50, 16)
    assert model.pos_embed.requires_grad
    grid = net.pos_embed[:, 1:].view(1, 4, 4, 16).permute(0, 3, 1, 2)
    expected = nn.functional.interpolate(grid, (7, 7), mode="bicubic", align_corners=False, antialias=True)
    torch.testing.assert_close(model.pos_embed[:, 1:], expected.permute(0, 2, 3, 1).flatten(1, 2))


def test_a_transfer_to_larger_windows():
    torch.manual_seed(0)
    net = small_swin()
    model = transfer(net, num_classes=5, image_size=64, window=4)
    assert {block.window_size for stage in model.layers for block in stage.blocks} == {(4, 4)}
    assert model(torch.rand(2, 3, 64, 64)).shape == (2, 5)
    table = net.layers[0].blocks[0].attn.relative_position_bias_table
    wider = model.layers[0].blocks[0].attn.relative_position_bias_table
    assert (table.shape, wider.shape) == ((9, 1), (49, 1))
    torch.testing.assert_close(wider.view(7, 7)[3, 3], table.view(3, 3)[1, 1], atol=1e-4, rtol=0)


def test_stochastic_depth_grows_with_the_depth():
    model = transfer(small_vit(depth=3), num_classes=2, image_size=16, drop_path=0.2)
    rates = [b.drop_path1.drop_prob if isinstance(b.drop_path1, DropPath) else 0.0 for b in model.blocks]
    assert rates == pytest.approx([0.0, 0.1, 0.2])


def test_rates_fall_from_the_head_to_the_first_layer():
    model = transfer(small_vit(), num_classes=2, image_size=16)
    build = layer_decayed(model, torch.optim.AdamW, lr=0.1, weight_decay=0.05, decay=0.5)
    optimizer = build([])
    rate = {id(p): (g["lr"], g["weight_decay"]) for g in optimizer.param_groups for p in g["params"]}
    assert rate[id(model.head.weight)] == (pytest.approx(0.1), 0.05)
    assert rate[id(model.head.bias)][1] == 0
    first, second = (rate[id(block.mlp.fc1.weight)][0] for block in model.blocks)
    assert first == pytest.approx(second / 2)
    assert rate[id(model.patch_embed.proj.weight)][0] == pytest.approx(first / 2)
    assert len(rate) == len(list(model.parameters())), "every parameter once"


# ---------------------------------------------------------------- training


def trainer(epochs):
    return L.Trainer(
        max_epochs=epochs, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, num_sanity_val_steps=0,
    )  # fmt: skip


@pytest.fixture(scope="module")
def digits():
    return images("digits", batch_size=40, train_size=200, val_size=40)


@pytest.mark.filterwarnings("ignore")
def test_pretraining_learns_and_goes_through_its_resolutions(digits):
    torch.manual_seed(0)
    model = FastMIM(small_vit(12, in_chans=1), cell=2, decoder_width=16, decoder_heads=2)
    nothing = model(resize(next(iter(digits.val_dataloader()))[0], 12)).item()
    module = Pretraining(model, partial(torch.optim.AdamW, lr=5e-3), resolutions=[12, 16])
    sizes = []
    model.register_forward_pre_hook(lambda m, args: sizes.append(args[0].shape[-1]))
    run = trainer(6)
    run.fit(module, datamodule=digits)
    assert sizes == [12] * 18 + [16] * 18, "five training batches and one for validation in each of six epochs"
    assert run.callback_metrics["val_loss"].item() < 0.8 * nothing
    assert not any("pos_embed" in name for name, p in model.named_parameters() if p.requires_grad)


@pytest.mark.filterwarnings("ignore")
def test_masks_of_the_validation_do_not_depend_on_the_run(digits):
    torch.manual_seed(0)
    model = FastMIM(small_vit(8, in_chans=1), cell=2, decoder_width=16, decoder_heads=2)
    module, run, found = Pretraining(model, torch.optim.AdamW, resolutions=[8]), trainer(1), []
    for seed in (1, 2):
        torch.manual_seed(seed)
        found.append(run.validate(module, datamodule=digits, verbose=False)[0]["val_loss"])
    assert found[0] == found[1]


@pytest.mark.filterwarnings("ignore")
def test_fine_tuning_with_the_recipe(digits):
    torch.manual_seed(0)
    model = transfer(small_vit(8, in_chans=1), num_classes=10, image_size=16)
    kinds = []
    model.register_forward_pre_hook(lambda m, args: kinds.append(args[0].shape[-1]))
    build = layer_decayed(model, torch.optim.AdamW, lr=1e-3, weight_decay=0.05, decay=0.7)
    module = FineTuning(
        model, build, num_classes=10, image_size=16, mixup=0.8, cutmix=1.0, erase=0.25, label_smoothing=0.1
    )
    run = trainer(1)
    run.fit(module, datamodule=digits)
    assert set(kinds) == {16}
    assert math.isfinite(run.callback_metrics["train_loss"].item())


def test_mixing_gives_probabilities_and_leaves_validation_alone():
    torch.manual_seed(0)
    np.random.seed(0)  # noqa: NPY002, timm draws from it
    model = transfer(small_vit(8, in_chans=1), num_classes=10, image_size=8)
    module = FineTuning(model, torch.optim.AdamW, num_classes=10, image_size=8, mixup=0.8)
    module.trainer = type("Run", (), {"training": True})()
    x, y = torch.rand(4, 1, 8, 8), torch.arange(4)
    before = x.clone()
    mixed, share = module.on_after_batch_transfer((x, y), 0)
    torch.testing.assert_close(share.sum(1), torch.ones(4))
    weight = share[0, 0]
    torch.testing.assert_close(mixed[0], weight * x[0] + (1 - weight) * x[3])
    assert torch.equal(x, before)
    with pytest.raises(ValueError, match="3 images"):
        module.on_after_batch_transfer((x[:3], y[:3]), 0)
    module.trainer.training = False
    assert module.on_after_batch_transfer((x, y), 0)[1] is y


def test_resizing():
    x = torch.rand(2, 1, 8, 8)
    assert resize(x, 8) is x
    assert resize(x, 20).shape == (2, 1, 20, 20)
    flat = torch.full((1, 1, 8, 8), 0.3)
    torch.testing.assert_close(resize(flat, 5), torch.full((1, 1, 5, 5), 0.3))


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda: hog(torch.rand(3, 8, 8)), r"\(3, 8, 8\)"),
        (lambda: hog(torch.rand(1, 1, 1, 8), cell=1), "at least 2"),
        (lambda: hog(torch.rand(1, 1, 12, 8)), "cell 8"),
        (lambda: hog(torch.rand(1, 1, 8, 8), bins=0), "bins 0"),
        (lambda: hog(torch.rand(1, 1, 8, 8), gradient="prewitt"), "prewitt"),
        (lambda: random_mask(1, 4, 1.0), "mask ratio 1.0"),
        (lambda: random_mask(1, 4, -0.1), "mask ratio -0.1"),
        (lambda: random_mask(1, 2, 0.9), "leaves none"),
        (lambda: small_vit(18), "image_size 18"),
        (lambda: small_vit(dim=18), "dim 18"),
        (lambda: small_swin(32, 3), "window 3"),
        (lambda: small_swin(36, 2), "36 pixels"),
        (lambda: small_mim(target="edges"), "edges"),
        (lambda: small_mim(cell=3), "cell 3"),
        (lambda: small_mim(mask_ratio=1.0), "mask ratio 1.0"),
        (lambda: small_mim(decoder_depth=-1), "-1 blocks"),
        (lambda: small_mim(decoder_heads=3), "3 heads"),
        (lambda: small_mim()(torch.rand(1, 3, 16, 20)), "16, 20"),
        (lambda: small_mim()(torch.rand(1, 3, 20, 20)), "use resize"),
        (lambda: small_mim().set_resolution(18), "18 pixels"),
        (lambda: FastMIM(small_swin(), cell=2).set_resolution(64), "Swin"),
        (lambda: full_size("mae", "swin-b", 192), "mae"),
        (lambda: full_size("beit", "vit-b", 224), "beit"),
        (lambda: transfer(small_vit(), num_classes=2, image_size=18), "image_size 18"),
        (lambda: transfer(small_vit(), num_classes=0, image_size=16), "num_classes 0"),
        (lambda: transfer(small_vit(), num_classes=2, image_size=16, drop_path=1.0), "drop_path 1.0"),
        (lambda: transfer(small_swin(), num_classes=2, image_size=32, window=3), "window 3"),
        (lambda: layer_decayed(nn.Identity(), torch.optim.AdamW, lr=1, weight_decay=0, decay=0), "layer decay 0"),
        (lambda: Pretraining(small_mim(), torch.optim.AdamW, resolutions=[20]), "encoder takes"),
        (lambda: Pretraining(small_mim(), torch.optim.AdamW, resolutions=[]), "at least one"),
        (
            lambda: FineTuning(nn.Identity(), torch.optim.AdamW, image_size=8, num_classes=2, erase=2.0),
            "erase 2.0",
        ),
    ],
)  # fmt: skip
def test_bad_input_is_named(call, named):
    with pytest.raises(ValueError, match=named):
        call()


@pytest.mark.filterwarnings("ignore")
def test_more_resolutions_than_epochs(digits):
    module = Pretraining(
        FastMIM(small_vit(8, in_chans=1), cell=2, decoder_width=16, decoder_heads=2),
        torch.optim.AdamW,
        resolutions=[8, 12],
    )
    with pytest.raises(ValueError, match="2 resolutions in 1 epochs"):
        trainer(1).fit(module, datamodule=digits)
