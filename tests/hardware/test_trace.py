"""Tests of trace capture: against autograd, in-place operations, rounding, bounds, files, and a run left unchanged."""

from __future__ import annotations

import json
from functools import partial

import lightning as L
import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from leantrain.hardware.trace import Packed, Trace, TraceCallback, TracedClassifier, capture
from leantrain.training import ImageClassifier


def small(inplace: bool = False) -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Conv2d(2, 5, 3, padding=1),
        nn.ReLU(inplace=inplace),
        nn.Conv2d(5, 6, 3, stride=2),
        nn.ReLU(inplace=inplace),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(6, 4),
    )


class Residual(nn.Module):
    """In-place addition and a functional in-place ReLU right behind a convolution."""

    def __init__(self, inplace: bool) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.first, self.second, self.inplace = nn.Conv2d(2, 2, 3, padding=1), nn.Conv2d(2, 2, 1), inplace

    def forward(self, x):
        y = self.first(x)
        z = self.second(F.relu(y))
        if self.inplace:
            z += x
            return F.relu_(z).flatten(1)
        return F.relu(z + x).flatten(1)


def batch(n: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(n, 2, 6, 6, generator=generator).relu(), torch.arange(n) % 4


def record(model: nn.Module, n: int = 5, **options) -> Trace:
    x, y = batch(n)
    with capture(model, **options) as recorder:
        F.cross_entropy(model(x), y).backward()
    return recorder.trace({"seed": 0})


def test_masks_are_those_of_autograd():
    model = small()
    trace = record(model, values=True)
    x, y = batch()
    # The same pass again, with every intermediate kept and asked for its gradient.
    kept, h = [], x
    for module in model:
        h = module(h)
        kept.append(h)
    inputs = [x, kept[1], kept[5]]
    outputs = [kept[0], kept[2], kept[6]]
    gradients = torch.autograd.grad(F.cross_entropy(h, y), outputs)
    assert [entry.layer.name for entry in trace.layers] == ["0", "2", "6"]
    for entry, value, gradient, module in zip(
        trace.layers, inputs, gradients, (model[0], model[2], model[6]), strict=True
    ):
        expected = {"input": value, "grad_output": gradient, "weight": module.weight}
        for name, tensor in expected.items():
            array = tensor.detach().numpy()
            assert (entry.masks[name].mask() == (array != 0)).all()
            assert entry.masks[name].nonzero == np.count_nonzero(array)
            assert entry.masks[name].sparsity == pytest.approx((array == 0).mean())
            assert (entry.values[name] == array).all()
    assert 0.2 < trace.layers[1].masks["grad_output"].sparsity < 1
    assert trace.layers[0].layer.needs_dgrad is False


@pytest.mark.parametrize("build", [small, Residual])
def test_in_place_operations_do_not_change_the_trace(build):
    plain, inplace = record(build(inplace=False)), record(build(inplace=True))
    for one, other in zip(plain.layers, inplace.layers, strict=True):
        for name in one.masks:
            assert (one.masks[name].bits == other.masks[name].bits).all(), (one.layer.name, name)


def test_samples_and_layers_are_chosen():
    model = small()
    whole, part = record(model), record(model, samples=2, layers=["2"])
    assert [entry.layer.name for entry in part.layers] == ["2"]
    assert part.layers[0].batch == 2
    for name in ("input", "grad_output"):
        assert (part.layers[0].masks[name].mask() == whole.layers[1].masks[name].mask()[:2]).all()


def test_a_linear_layer_over_tokens_is_a_1x1_convolution_over_positions():
    model = nn.Linear(6, 3)
    x = torch.randn(4, 7, 6)
    with capture(model, values=True) as recorder:
        model(x).square().sum().backward()
    entry = recorder.trace().layers[0]
    assert (entry.layer.kind, entry.layer.in_size, entry.layer.out_size) == ("conv", (7, 1), (7, 1))
    assert entry.batch == 4
    assert entry.layer.macs == 7 * 6 * 3
    assert entry.masks["grad_output"].shape == (4, 3, 7, 1)
    assert entry.values["weight"].shape == entry.layer.weight_shape == (3, 6, 1, 1)
    image = torch.from_numpy(entry.values["input"])
    assert (image == x.movedim(-1, 1)[..., None]).all()
    with capture(model) as recorder, pytest.raises(ValueError, match=r"expected \(N, C\) or \(N, T, C\)"):
        model(torch.randn(2, 3, 4, 6))


def test_zero_means_zero_after_rounding():
    model = nn.Linear(4, 2, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[-0.0, 0.0, 1e-42, 1.0], [1e-30, 1.0, 1.0, 1.0]]))

    def masks(precision):
        with capture(model, precision=precision) as recorder:
            model(torch.tensor([[1.0, -0.0, 1e-42, 2.0]])).sum().backward()
        return {name: packed.mask().tolist() for name, packed in recorder.trace().layers[0].masks.items()}

    assert masks("float32")["weight"] == [[False, False, True, True], [True] * 4]
    assert masks("bfloat16")["weight"] == [[False, False, False, True], [True] * 4]
    assert masks("float32")["input"] == [[True, False, True, True]]
    assert masks("bfloat16")["input"] == [[True, False, False, True]]


def test_hooks_are_gone_and_the_gradients_untouched():
    model, twin = small(), small()
    x, y = batch()
    record(model)
    F.cross_entropy(twin(x), y).backward()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad)
    with pytest.raises(RuntimeError, match="stop"), capture(model):
        raise RuntimeError("stop")
    assert not any(module._forward_hooks or module._backward_hooks for module in model.modules())


def test_bad_passes_are_refused_by_name():
    x, _ = batch()
    with pytest.raises(ValueError, match=r"layers \['9'\] are no convolutions"):
        record(small(), layers=["9"])
    with pytest.raises(ValueError, match="samples is 0"):
        record(small(), samples=0)
    with pytest.raises(ValueError, match="precision is 'int8'"):
        record(small(), precision="int8")
    with pytest.raises(ValueError, match="passes 100 bytes at layer '2'"):
        record(small(), limit_bytes=100)
    model = small()
    with capture(model) as recorder:
        model(x)
    with pytest.raises(ValueError, match="layer '0' has no grad_output"):
        recorder.trace()
    with pytest.raises(ValueError, match="layer '0' ran twice"), capture(model):
        model(x), model(x)
    for bad in (float("nan"), float("inf")):
        model = small()
        with torch.no_grad():
            model[2].weight[0, 0, 0, 0] = bad
        with pytest.raises(ValueError, match="the weight of layer '2' holds NaN or infinity"), capture(model):
            model(x)
    model = small()
    with pytest.raises(ValueError, match="the grad_output of layer '6' holds NaN"), capture(model):
        (model(x).sum() * float("nan")).backward()


def test_a_saved_trace_is_the_same_trace(tmp_path):
    trace = record(small(), values=True, precision="bfloat16")
    trace.save(tmp_path / "traces" / "one")
    again = Trace.load(tmp_path / "traces" / "one")
    assert (again.precision, again.notes, again.bytes) == ("bfloat16", {"seed": 0}, trace.bytes)
    for one, other in zip(trace.layers, again.layers, strict=True):
        assert one.layer == other.layer
        for name in one.masks:
            assert (one.masks[name].mask() == other.masks[name].mask()).all()
            assert (one.values[name] == other.values[name]).all()
    assert sorted(path.name for path in (tmp_path / "traces").iterdir()) == ["one.json", "one.safetensors"]


def test_a_damaged_trace_is_refused(tmp_path):
    path = tmp_path / "one"
    record(small()).save(path)
    content = bytearray(path.with_suffix(".safetensors").read_bytes())
    content[-1] ^= 1
    path.with_suffix(".safetensors").write_bytes(bytes(content))
    with pytest.raises(ValueError, match="does not match the checksum"):
        Trace.load(path)
    manifest = json.loads(path.with_suffix(".json").read_text())
    path.with_suffix(".json").write_text(json.dumps(manifest | {"format": 99}))
    with pytest.raises(ValueError, match="format 99"):
        Trace.load(path)


@pytest.mark.parametrize("shape", [(1,), (3, 5), (2, 4, 2, 1)])
def test_packing_round_trips(shape):
    mask = np.random.default_rng(0).random(shape) > 0.5
    packed = Packed.of(mask)
    assert (packed.mask() == mask).all()
    assert packed.sparsity == pytest.approx(1 - mask.mean())


def fit(module: L.LightningModule, *callbacks: L.Callback, epochs: int = 3) -> L.Trainer:
    x, y = batch(24)
    trainer = L.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=list(callbacks),
    )
    trainer.fit(module, DataLoader(TensorDataset(x, y), batch_size=8))
    return trainer


def test_tracing_leaves_a_training_run_unchanged(tmp_path):
    sgd = partial(torch.optim.SGD, lr=0.1)
    plain = ImageClassifier(small(), sgd, num_classes=4)
    fit(plain)
    seen = []

    def report(trace: Trace) -> dict[str, float]:
        seen.append(trace)
        return {"zeros": trace.layers[1].masks["input"].sparsity}

    traced = TracedClassifier(small(), sgd, num_classes=4, report=report, samples=3)
    trainer = fit(traced)
    for p, q in zip(plain.parameters(), traced.parameters(), strict=True):
        assert torch.equal(p, q)
    assert [trace.notes["epoch"] for trace in seen] == [0, 1, 2]
    assert [trace.notes["step"] for trace in seen] == [3, 6, 9]
    assert seen[0].layers[0].batch == 3
    assert float(trainer.callback_metrics["zeros"]) == pytest.approx(seen[-1].layers[1].masks["input"].sparsity)


def test_callback_keeps_and_saves_the_chosen_epochs(tmp_path):
    tracer = TraceCallback(samples=2, epochs=[1], folder=tmp_path)
    fit(ImageClassifier(small(), partial(torch.optim.SGD, lr=0.1), num_classes=4), tracer)
    assert [trace.notes["epoch"] for trace in tracer.traces] == [1]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["epoch-001.json", "epoch-001.safetensors"]
    assert Trace.load(tmp_path / "epoch-001").layers[0].batch == 2


def test_a_failing_run_leaves_no_hooks():
    class Breaks(L.Callback):
        def on_after_backward(self, trainer, pl_module):
            raise RuntimeError("stop")

    module = ImageClassifier(small(), partial(torch.optim.SGD, lr=0.1), num_classes=4)

    class OneBatch(TraceCallback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            super().on_train_batch_start(trainer, pl_module, batch, trainer.num_training_batches - 1)

    with pytest.raises(RuntimeError, match="stop"):
        fit(module, OneBatch(), Breaks())
    assert not any(part._forward_hooks for part in module.modules())


def test_further_masks_of_the_input_are_kept_saved_and_checked(tmp_path):
    model = nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.ReLU(), nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(16, 2))
    x = torch.randn(5, 2, 4, 4)

    def large(values):
        return None if not values.requires_grad else values > 0.5

    with capture(model, samples=3, also={"large": large}) as recorder:
        model(x).sum().backward()
    trace = recorder.trace()
    assert [sorted(entry.extra) for entry in trace.layers] == [[], ["large"], ["large"]]
    hidden = torch.relu(model[0](x))[:3]
    assert (trace.layers[1].extra["large"].mask() == (hidden > 0.5).numpy()).all()
    assert trace.layers[2].extra["large"].shape == (3, 16)
    trace.save(tmp_path / "step")
    again = Trace.load(tmp_path / "step")
    assert (again.layers[1].extra["large"].mask() == trace.layers[1].extra["large"].mask()).all()
    assert again.layers[0].extra == {}
    assert again.bytes == trace.bytes
    with (
        pytest.raises(ValueError, match="mask 'large' of layer '0' is"),
        capture(model, also={"large": lambda values: values[:, :1] > 0}),
    ):
        model(x)
    with (
        pytest.raises(ValueError, match="passes 60 bytes"),
        capture(model, limit_bytes=60, also={"all": lambda v: v > 9}),
    ):
        model(x)
