"""Pruning, fewer bits, sparse formats and sparse convolutions: known answers, references, invariants, bad input."""

import copy
from functools import partial

import lightning as L
import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.sparse import csr_matrix
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import prune
from torch.utils.data import DataLoader, TensorDataset
from torchvision.models import vgg16

from leantrain.measure.cost import count_macs, count_parameters
from leantrain.measure.timing import PairedTiming, paired_timing
from leantrain.techniques import pruning_bitwidth as pb
from leantrain.training import ImageClassifier

BOTH = pytest.mark.parametrize("direct", [pb.DirectConv2d, pb.ShiftedCSRConv2d])


def small_net(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Flatten(),
        nn.Linear(8 * 6 * 6, 4),
    )  # fmt: skip


def batches(seed=1):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(48, 1, 8, 8, generator=generator)
    return DataLoader(TensorDataset(x, torch.randint(0, 4, (48,), generator=generator)), batch_size=8)


def fit(module, epochs=3, **options):
    quiet = dict.fromkeys(("logger", "enable_progress_bar", "enable_model_summary"), False)
    options = {"enable_checkpointing": False, **quiet, **options}
    trainer = L.Trainer(max_epochs=epochs, accelerator="cpu", deterministic=True, **options)
    trainer.fit(module, batches(), batches(2))
    return trainer


# ---------------------------------------------------------------------------------------------------------- masks


def test_masks_agree_with_torch_in_both_scopes():
    model = small_net()
    weights = pb.prunable(model)
    assert list(weights) == ["0", "3", "6"]
    for scope in ("global", "layer"):
        other = copy.deepcopy(model)
        parameters = [(other[int(name)], "weight") for name in weights]
        if scope == "global":
            prune.global_unstructured(parameters, prune.L1Unstructured, amount=0.7)
        else:
            for module, name in parameters:
                prune.l1_unstructured(module, name, amount=0.7)
        masks = pb.magnitude_masks(weights, 0.7, scope=scope)
        for name, (module, _) in zip(weights, parameters, strict=True):
            assert torch.equal(masks[name], module.weight_mask.bool())


@settings(max_examples=30, deadline=None)
@given(sparsity=st.floats(0, 0.99), seed=st.integers(0, 99))
def test_the_sparsity_is_met_to_a_weight_and_the_largest_stay(sparsity, seed):
    generator = torch.Generator().manual_seed(seed)
    weights = {"a": torch.randn(7, 11, generator=generator), "b": torch.randn(5, 3, 2, 2, generator=generator)}
    masks = pb.magnitude_masks(weights, sparsity)
    total, left = 7 * 11 + 60, sum(int(m.sum()) for m in masks.values())
    assert abs((total - left) - sparsity * total) <= 0.5
    stay = torch.cat([w.abs()[masks[n]] for n, w in weights.items()])
    go = torch.cat([w.abs()[~masks[n]] for n, w in weights.items()])
    assert not len(go) or not len(stay) or float(stay.min()) >= float(go.max())


def test_masks_only_grow_even_if_a_pruned_weight_has_become_large():
    weights = {"a": torch.tensor([1.0, 2.0, 3.0, 4.0])}
    kept = pb.magnitude_masks(weights, 0.25)
    weights["a"][0] = 9.0
    assert pb.magnitude_masks(weights, 0.5, kept=kept)["a"].tolist() == [False, False, True, True]
    assert pb.magnitude_masks(weights, 0.0, kept=kept)["a"].tolist() == [False, True, True, True]


def test_a_sparsity_for_each_layer():
    weights = {"a": torch.arange(1.0, 11.0), "b": torch.arange(1.0, 11.0)}
    masks = pb.magnitude_masks(weights, {"a": 0.2, "b": 0.9})
    assert [int(m.sum()) for m in masks.values()] == [8, 1]


def test_shared_weights_stand_once_and_layers_can_be_left_out():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3), nn.BatchNorm1d(3))
    model[1].weight = model[0].weight
    assert list(pb.prunable(model)) == ["0"]
    assert list(pb.prunable(small_net(), skip=["0", "6"])) == ["3"]


# ------------------------------------------------------------------------------------------------- while training


def classifier(pruning=None, momentum=0.9, seed=0):
    optimizer = partial(torch.optim.SGD, lr=0.05, momentum=momentum, weight_decay=0.01)
    if pruning is None:
        return ImageClassifier(small_net(seed), optimizer, num_classes=4)
    return pb.PruningClassifier(small_net(seed), optimizer, pruning=pruning, num_classes=4)


class Watch(L.Callback):
    """The masks after every step, and whether the weights obey them; runs after the pruning's own hook."""

    def __init__(self, pruning):
        self.pruning, self.shares, self.obeyed, self.grew = pruning, [], True, True
        self.before = {}

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        weights, masks = pb.prunable(pl_module.model), self.pruning.masks
        self.obeyed &= all(not weights[name][~mask].any() for name, mask in masks.items())
        self.grew &= all(not (masks[name] & ~mask).any() for name, mask in self.before.items())
        self.before = {name: mask.clone() for name, mask in masks.items()}
        self.shares.append(pb.sparsity_of(weights))


@pytest.mark.parametrize("scope", ["global", "layer"])
def test_pruned_weights_stay_zero_under_momentum_and_decay(scope):
    pruning = pb.GradualPruning(0.9, ramp=0.5, every=3, scope=scope)
    watch, module = Watch(pruning), classifier(pruning)
    trainer = fit(module, epochs=4, callbacks=[watch])  # 24 steps, a ramp of 12
    assert watch.obeyed
    assert watch.grew
    weights = pb.prunable(module.model)
    expected = [pb.cubic_sparsity(step // 3 * 3 / 12, 0.9) for step in range(24)]
    total = sum(w.numel() for w in weights.values())
    assert np.abs(np.array(watch.shares) - expected).max() <= 3 / total
    assert float(trainer.callback_metrics["sparsity"]) == pytest.approx(90, abs=300 / total)
    if scope == "layer":
        for weight in weights.values():
            assert pb.sparsity_of({"": weight}) == pytest.approx(0.9, abs=1 / weight.numel())


def test_a_sparsity_of_zero_is_no_pruning_to_the_bit():
    plain, pruned = classifier(), classifier(pb.GradualPruning(0.0, ramp=0.5, every=1))
    fit(plain)
    fit(pruned)
    for a, b in zip(plain.parameters(), pruned.parameters(), strict=True):
        assert torch.equal(a, b)


def test_one_shot_and_layers_by_name():
    wanted = {"0": 0.5, "3": 0.75, "6": 0.0}
    pruning = pb.GradualPruning(wanted, ramp=0.0)
    watch, module = Watch(pruning), classifier(pruning)
    fit(module, epochs=1, callbacks=[watch])
    assert watch.shares[0] == watch.shares[-1] > 0
    for name, weight in pb.prunable(module.model).items():
        assert pb.sparsity_of({"": weight}) == pytest.approx(wanted[name], abs=1e-9)


def test_accumulated_gradients_count_as_one_step():
    pruning = pb.GradualPruning(0.8, ramp=1.0, every=1)
    fit(classifier(pruning), epochs=2, accumulate_grad_batches=3)
    assert pb.sparsity_of({n: m.float() for n, m in pruning.masks.items()}) == pytest.approx(0.8, abs=1e-3)


def test_a_run_that_is_resumed_ends_as_one_that_was_not(tmp_path):
    def make():
        pruning = pb.GradualPruning(0.9, ramp=0.75, every=2)
        return pruning, classifier(pruning)

    _, whole = make()
    fit(whole, epochs=4)
    _, first = make()
    trainer = fit(first, epochs=4, callbacks=[Stop()], default_root_dir=tmp_path)
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    pruning, second = make()
    L.Trainer(
        max_epochs=4, accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
        enable_checkpointing=False,
    ).fit(second, batches(), batches(2), ckpt_path=tmp_path / "half.ckpt", weights_only=False)  # fmt: skip
    assert pruning.masks
    for a, b in zip(whole.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)


class Stop(L.Callback):
    """Ends a run after two epochs whose schedule is laid over four."""

    def on_train_epoch_end(self, trainer, pl_module):
        trainer.should_stop = trainer.current_epoch == 1


def test_the_scan_leaves_the_model_alone_and_finds_the_layer_that_matters():
    torch.manual_seed(0)
    x = torch.randn(400, 8)
    y = (x[:, 0] > 0).long()
    model = nn.Sequential(nn.Linear(8, 8, bias=False), nn.Linear(8, 2, bias=False))
    with torch.no_grad():  # The first layer copies its input, with small weights that do nothing for the decision.
        model[0].weight.copy_(torch.eye(8) + 0.01 * torch.randn(8, 8) * (torch.arange(8) > 0))
        model[1].weight.copy_(torch.tensor([[-1.0] + [0.0] * 7, [1.0] + [0.001] * 7]))
    before = copy.deepcopy(model.state_dict())
    scan = pb.sensitivity_scan(model, lambda m: pb.accuracy(m, [(x, y)]), [0.5, 0.85, 0.95])
    assert all(torch.equal(a, b) for a, b in zip(before.values(), model.state_dict().values(), strict=True))
    assert list(scan.columns) == ["layer", "weights", "sparsity", "score", "drop"]
    # Of the first layer eight weights are needed, of the second a single one.
    assert pb.bearable(scan) == {"0": 0.85, "1": 0.95}
    assert pb.bearable(scan.assign(drop=5.0)) == {"0": 0.0, "1": 0.0}

    def fails(m):
        if float(m[0].weight[7, 7]) == 0:
            raise RuntimeError("no")
        return 0.0

    with pytest.raises(RuntimeError, match="no"):
        pb.sensitivity_scan(model, fails, [0.99])
    assert torch.equal(model[0].weight, before["0.weight"])


# ------------------------------------------------------------------------------------------------------- fewer bits


def test_the_linear_code_of_known_weights():
    weight = torch.tensor([[0.5, -1.27, 0.0, 1.0], [0.0, 0.0, 0.0, 0.0]], dtype=torch.float64)
    code = pb.linear_code(weight, 8)
    assert code.codes.tolist() == [[50, -127, 0, 100], [0, 0, 0, 0]]
    assert code.codes.dtype is torch.int8
    assert code.steps.tolist() == pytest.approx([0.01, 0.0])
    assert (code.decode() - weight).abs().max() < 1e-15


@settings(max_examples=40, deadline=None)
@given(bits=st.integers(2, 12), seed=st.integers(0, 99))
def test_no_weight_is_off_by_more_than_half_a_step_and_zeros_stay(bits, seed):
    weight = torch.randn(5, 3, 3, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    weight[weight.abs() < 0.5] = 0.0
    code = pb.linear_code(weight, bits)
    error = (code.decode() - weight).abs().flatten(1).amax(1)
    assert (error <= 0.5 * code.steps * (1 + 1e-12)).all()
    assert not code.decode()[weight == 0].any()
    assert int(code.codes.abs().max()) <= 2 ** (bits - 1) - 1


def test_many_bits_are_the_weight_itself():
    weight = torch.randn(4, 9)
    assert torch.equal(pb.linear_code(weight, 32).decode(), weight) or torch.allclose(
        pb.linear_code(weight, 32).decode(), weight, rtol=1e-7, atol=1e-9
    )
    few = torch.tensor([0.0, 0.5, -0.25, 0.5])
    assert torch.equal(pb.codebook(few, 8).decode(), few)


def test_the_codebook_is_k_means_among_the_weights_that_are_left():
    from sklearn.cluster import KMeans

    weight = 2 * torch.rand(16, 4, 3, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64) - 1
    weight[weight.abs() < 0.5] = 0.0
    code = pb.codebook(weight, 4)
    left = weight[weight != 0].numpy()[:, None]
    # Evenly spread with the gap around zero taken out.
    gap, negative = left[left > 0].min() - left[left < 0].max(), left[left < 0].max() - left.min()
    start = np.linspace(0, np.ptp(left) - gap, 15)
    start = (left.min() + start + np.where(start > negative, gap, 0))[:, None]
    known = KMeans(15, init=start, n_init=1, tol=0, max_iter=300).fit(left)
    assert np.allclose(np.sort(known.cluster_centers_.ravel()), code.values[1:].numpy(), atol=1e-9)
    assert float((code.decode() - weight).square().sum()) == pytest.approx(known.inertia_)
    assert not code.decode()[weight == 0].any()
    assert code.indices.dtype is torch.uint8
    assert int(code.indices.max()) < 16


def test_one_bit_is_a_sign_with_one_value_and_an_empty_weight_is_zeros():
    assert pb.codebook(torch.tensor([0.0, 1.0, 3.0]), 1).decode().tolist() == [0.0, 2.0, 2.0]
    assert not pb.codebook(torch.zeros(3, 3), 4).decode().any()


@pytest.mark.parametrize("kind", ["linear", "codebook"])
def test_quantised_models_keep_their_zeros_biases_and_norms(kind):
    model = small_net()
    weights = pb.prunable(model)
    pb.apply_masks(weights, pb.magnitude_masks(weights, 0.5))
    before, zeros = copy.deepcopy(model.state_dict()), pb.sparsity_of(weights)
    codes = pb.quantise_weights(model, 4, kind=kind, skip=["6"])
    assert list(codes) == ["0", "3"]
    assert pb.sparsity_of(weights) >= zeros
    for name, value in model.state_dict().items():
        changed = not torch.equal(value, before[name])
        assert changed == (name in ("0.weight", "3.weight")), name
    assert len(model[3].weight.unique()) <= (16 if kind == "codebook" else 8 * 15)


def test_inputs_are_rounded_to_levels_and_freed_again():
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.ReLU(), nn.Linear(2, 1, bias=False)).double().train()
    with torch.no_grad():
        model[0].weight.copy_(torch.eye(2))
        model[2].weight.copy_(torch.ones(1, 2))
    calibration = torch.tensor([[-1.27, 2.55]], dtype=torch.float64)
    handles = pb.quantise_inputs(model, [calibration])
    assert model.training
    # First layer: signed, 127 steps up to 2.55. Behind the ReLU: unsigned, 255 steps of 0.01.
    x = torch.tensor([[0.5, 9.0]], dtype=torch.float64)
    first = round(0.5 / (2.55 / 127)) * 2.55 / 127
    second = round(first / 0.01) * 0.01 + 2.55  # nine is cut off
    assert model(x).item() == pytest.approx(second, abs=1e-12)
    for handle in handles:
        handle.remove()
    assert model(x).item() == pytest.approx(9.5)


# ---------------------------------------------------------------------------------------------------------- storage


def test_byte_formulas_and_break_even():
    assert pb.csr_bytes(1000, 10, 4, 4) == 8044
    assert pb.csr_bytes(1000, 10, 1, 2) == 3044
    assert pb.bsr_bytes(6, 16, 64, 4, 4) == 6 * (1024 + 4) + 4 * 5
    assert pb.two_of_four_bytes(64, 4) == 136
    known = {(4, 4): 0.5, (4, 8): 2 / 3, (1, 2): 2 / 3, (2, 2): 0.5}
    for sizes, share in known.items():
        assert pb.break_even_sparsity(*sizes) == pytest.approx(share)
        rows, columns = 100, 10_000  # so large that the pointers do not count
        left = round((1 - share) * rows * columns)
        assert pb.csr_bytes(left, rows, *sizes) == pytest.approx(rows * columns * sizes[0], rel=1e-3)


@pytest.mark.parametrize("index", [np.int16, np.int32, np.int64])
def test_rows_go_there_and_back(index):
    conv = pb.prune_randomly(nn.Conv2d(6, 5, 3), 0.8)
    rows = pb.SparseRows.of(conv.weight, index)
    assert np.array_equal(rows.dense(), conv.weight.detach().flatten(1).numpy())
    assert len(rows.values) == int(conv.weight.count_nonzero()) == 5 * 6 * 9 - round(0.8 * 270)
    assert rows.nbytes == pb.csr_bytes(len(rows.values), 5, 4, np.dtype(index).itemsize)
    reference = csr_matrix(conv.weight.detach().flatten(1).numpy())
    assert np.array_equal(rows.columns, reference.indices)
    assert np.array_equal(rows.pointers, reference.indptr)


# ------------------------------------------------------------------------------------------------------ convolution


@BOTH
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize(
    ("kernel", "padding", "bias"), [(1, 0, True), (3, 1, True), (3, 0, False), (5, 2, False), ((1, 3), (2, 1), True)]
)
def test_direct_is_dense_in_double_precision(direct, kernel, padding, bias, threads, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    torch.manual_seed(0)
    conv = nn.Conv2d(5, 7, kernel, padding=padding, bias=bias, dtype=torch.float64)
    for sparsity in (0.0, 0.5, 0.9):
        pruned = pb.prune_randomly(conv, sparsity)
        assert (pruned.bias is None) == (not bias)
        for size in ((6, 5), (5, 9)):
            x = torch.randn(2, 5, *size, dtype=torch.float64)
            assert (direct(pruned)(x) - pruned(x)).abs().max() < 1e-12


@BOTH
def test_a_layer_of_zeros_gives_its_bias_and_tiles_meet(direct):
    torch.manual_seed(0)
    conv = nn.Conv2d(3, 4, 3, padding=1)
    with torch.no_grad():
        conv.weight.zero_()
    x = torch.randn(1, 3, 4, 4)
    assert torch.equal(direct(conv)(x), conv.bias.detach().view(1, 4, 1, 1).expand(1, 4, 4, 4))
    wide = pb.prune_randomly(nn.Conv2d(3, 4, 3, padding=1), 0.5)
    x = torch.randn(1, 3, 70, 50)  # four tiles, the last one shorter
    torch.testing.assert_close(direct(wide)(x), wide(x), atol=1e-5, rtol=1e-5)
    odd = x.permute(0, 1, 3, 2)  # not contiguous
    torch.testing.assert_close(direct(wide)(odd), wide(odd), atol=1e-5, rtol=1e-5)


def test_the_eight_bit_convolution_is_the_convolution_of_the_codes():
    if not hasattr(torch.ops, "onednn") or not hasattr(torch.ops.onednn, "qconv2d_pointwise"):
        pytest.skip("this build has no 8-bit convolution of oneDNN")
    torch.manual_seed(0)
    conv, x = nn.Conv2d(8, 6, 3, padding=1), torch.rand(2, 8, 7, 7)
    step, code = float(x.max()) / 255, pb.linear_code(conv.weight, 7)  # 7 bits: no processor overflows
    expected = F.conv2d((x / step).round() * step, code.decode(), conv.bias, padding=1)
    torch.testing.assert_close(pb.int8_convolution(conv, x, 7)(), expected, atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="negative"):
        pb.int8_convolution(conv, -x)


def test_integer_products_are_exact():
    generator = torch.Generator().manual_seed(0)
    a = torch.randint(-128, 128, (32, 64), generator=generator, dtype=torch.int8)
    b = torch.randint(-128, 128, (64, 24), generator=generator, dtype=torch.int8)
    assert torch.equal(torch._int_mm(a, b).long(), a.long() @ b.long())


# ------------------------------------------------------------------------------------------------- cost and timing


def test_the_cost_model_and_its_bound():
    model = pb.CostModel(dense_rate=100.0, sparse_rate=20.0, bandwidth=10.0)
    assert (model.handicap, model.break_even_sparsity) == (5.0, 0.8)
    assert model.sparse_seconds(1000.0, 0.8) == pytest.approx(10.0) == pytest.approx(1000.0 / model.dense_rate)
    assert model.sparse_seconds(1000.0, 0.99, moved=50.0) == 5.0
    assert pb.CostModel(1.0, 2.0).break_even_sparsity == 0.0


@pytest.mark.parametrize(
    ("ratios", "expected"),
    [
        ({0.8: 1.2, 0.9: 0.8}, 0.85),
        ({0.8: 1.5, 0.9: 1.2}, None),
        ({0.5: 0.9, 0.9: 0.3}, 0.5),
        ({0.5: 0.9, 0.7: 1.1, 0.9: 0.9}, 0.8),  # a fast one below a slow one does not count
    ],
)
def test_crossover(ratios, expected):
    assert pb.crossover(ratios) == (None if expected is None else pytest.approx(expected))


def test_timing_runs_the_layers_that_it_names(monkeypatch):
    seen = {}

    def spy(arms, repeats, warmup):
        seen.update({name: arm() for name, arm in arms.items()})
        return paired_timing(arms, repeats=repeats, warmup=warmup)

    if not torch.backends.mkldnn.is_available():
        pytest.skip("this build of PyTorch has no oneDNN")
    monkeypatch.setattr(pb, "paired_timing", spy)
    conv = nn.Conv2d(8, 8, 3, padding=1)
    timing = pb.time_convolution(
        conv, (1, 8, 6, 6), direct=[0.5], shifted=[0.5, 0.9], reduced=["bf16"], repeats=3
    )  # fmt: skip
    assert list(timing.seconds) == list(seen) == [
        "dense", "dense, channels-last", "dense, packed", "dense, bf16", "direct 0.5", "shifted 0.5", "shifted 0.9",
    ]  # fmt: skip
    times = pd.DataFrame({"dense": [1.0, 3.0, 2.0], "dense, channels-last": [1.5, 1.5, 1.5], "direct 0.5": [0.1] * 3})
    assert pb.dense_arm(PairedTiming(times)) == "dense, channels-last"
    close = partial(torch.testing.assert_close, atol=1e-5, rtol=1e-4)
    close(seen["dense, channels-last"], seen["dense"])
    close(seen["dense, packed"].to_dense(), seen["dense"])
    close(seen["direct 0.5"], seen["shifted 0.5"])
    close(seen["dense, bf16"].float(), seen["dense"], atol=0.05, rtol=0.05)
    assert (seen["shifted 0.9"] - seen["dense"]).abs().max() > 0.01


def test_the_networks_of_the_paper_have_the_known_sizes():
    with torch.device("meta"):
        model = vgg16()
        macs = count_macs(model, torch.empty(1, 3, 224, 224))
    convolutions = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    assert count_parameters(model) == 138_357_544
    assert sum(m.weight.numel() for m in convolutions) == 14_710_464
    assert round(macs / 1e6) == 15_470


# ------------------------------------------------------------------------------------------------------- bad input

WEIGHTS = {"a": torch.ones(4)}


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda: pb.prunable(nn.BatchNorm2d(3)), "no convolution"),
        (lambda: pb.prunable(small_net(), skip=["1"]), r"skip names \['1'\]"),
        (lambda: pb.cubic_sparsity(-0.1, 0.5), "progress is -0.1"),
        (lambda: pb.cubic_sparsity(0.1, 1.0), "sparsity is 1.0"),
        (lambda: pb.magnitude_masks(WEIGHTS, -0.1), "sparsity is -0.1"),
        (lambda: pb.magnitude_masks(WEIGHTS, {"b": 0.5}), r"\['b'\]"),
        (lambda: pb.magnitude_masks(WEIGHTS, 0.5, scope="row"), "scope is 'row'"),
        (lambda: pb.GradualPruning(1.0), "sparsity is 1.0"),
        (lambda: pb.GradualPruning({"a": float("nan")}), "sparsity is nan"),
        (lambda: pb.GradualPruning(0.5, ramp=1.1), "ramp is 1.1"),
        (lambda: pb.GradualPruning(0.5, every=0), "every is 0"),
        (lambda: pb.GradualPruning(0.5, scope="row"), "scope is 'row'"),
        (lambda: fit(classifier(pb.GradualPruning({"0": 0.5})), epochs=1), "the layers are"),
        (lambda: pb.accuracy(small_net(), []), "batches is empty"),
        (lambda: pb.linear_code(torch.ones(2, 2), 1), "bits is 1; expected 2 to 32"),
        (lambda: pb.codebook(torch.ones(2, 2), 17), "bits is 17"),
        (lambda: pb.codebook(torch.ones(2, 2), 4, sweeps=0), "sweeps is 0"),
        (lambda: pb.quantise_weights(small_net(), 8, kind="log"), "kind is 'log'"),
        (lambda: pb.quantise_inputs(small_net(), []), "batches is empty"),
        (lambda: pb.quantise_inputs(small_net(), [], bits=1), "bits is 1"),
        (lambda: pb.csr_bytes(-1, 2, 4, 4), "nonzeros is -1"),
        (lambda: pb.csr_bytes(1, 2, 4, 0), "index_bytes is 0"),
        (lambda: pb.bsr_bytes(1, 3, 16, 4, 4), "block is 3"),
        (lambda: pb.break_even_sparsity(0, 4), "value_bytes is 0"),
        (lambda: pb.SparseRows.of(torch.ones(1, 32_769), np.int16), "int16 counts to 32767"),
        (lambda: pb.CostModel(0.0, 1.0), "dense_rate is 0.0"),
        (lambda: pb.CostModel(1.0, 1.0).sparse_seconds(1.0, 1.0), "sparsity is 1.0"),
        (lambda: pb.crossover({}), "ratios is empty"),
        (lambda: pb.time_convolution(nn.Conv2d(1, 1, 1), (1, 1, 2, 2), reduced=["fp8"]), r"\['fp8'\]"),
    ],
)
def test_bad_input_is_named(call, named):
    with pytest.raises(ValueError, match=named):
        call()


@BOTH
@pytest.mark.parametrize(
    ("conv", "named"),
    [
        (nn.Conv2d(2, 2, 3, stride=2), "stride is"),
        (nn.Conv2d(2, 2, 3, dilation=2), "dilation is"),
        (nn.Conv2d(2, 2, 3, groups=2), "groups is 2"),
        (nn.Conv2d(2, 2, 3, padding="same"), "padding is 'same'"),
        (nn.Conv2d(2, 2, 3, padding=1, padding_mode="reflect"), "reflect"),
        (nn.Conv2d(2, 2, 3).half(), "float16"),
    ],
)
def test_layers_that_the_direct_path_does_not_take(direct, conv, named):
    with pytest.raises(ValueError, match=named):
        direct(conv)


def test_places_that_32_bits_cannot_count():
    with pytest.raises(ValueError, match="more places than int32"):
        pb.DirectConv2d(nn.Conv2d(2, 2, 3))._stretched(2**15, 2**16)


@BOTH
def test_inputs_that_the_direct_path_does_not_take(direct):
    layer = direct(nn.Conv2d(2, 2, 3))
    for x, named in (
        (torch.zeros(1, 3, 4, 4), r"expected \(B, 2, H, W\)"),
        (torch.zeros(2, 4, 4), r"expected \(B, 2, H, W\)"),
        (torch.zeros(1, 2, 4, 4).double(), "float64"),
        (torch.zeros(1, 2, 2, 4), "below the kernel's size"),
    ):
        with pytest.raises(ValueError, match=named):
            layer(x)
