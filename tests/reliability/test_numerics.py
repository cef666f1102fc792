"""Odd tensors, odd batches, damaged weights: what the optimisers, losses and stores make of them."""

from __future__ import annotations

import os
import pickle
import random
import signal
import time
from functools import partial

import lightning as L
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from leantrain.techniques.adan import Adan
from leantrain.techniques.clars import CLARS, LARS, layer_groups
from leantrain.techniques.procrustes import DropBack
from leantrain.training import ImageClassifier, WeightStore, next_token_loss

OPTIMISERS = {
    "Adan": partial(Adan, lr=0.01),
    "Adan, one by one": partial(Adan, lr=0.01, foreach=False),
    "LARS": partial(LARS, lr=1.0),
    "CLARS": partial(CLARS, lr=1.0),
    "DropBack": partial(DropBack, lr=0.1, keep=0.5),
    "DropBack of all": partial(DropBack, lr=0.1, keep=0.5, include_1d=True),
}


def quiet_trainer(**options):
    quiet = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    return L.Trainer(accelerator="cpu", num_sanity_val_steps=0, **{**dict.fromkeys(quiet, False), **options})


# ---------------------------------------------------------------- tensors


@pytest.mark.parametrize("make", OPTIMISERS.values(), ids=OPTIMISERS)
def test_tensors_without_elements_dimensions_or_gradients(make):
    torch.manual_seed(0)
    scalar, empty, matrix, vector, frozen, unused = (
        nn.Parameter(torch.randn(shape)) for shape in ((), (0, 3), (4, 4), (3,), (2, 2), (2, 2))
    )
    frozen.requires_grad_(False)
    everything = [scalar, empty, matrix, vector, frozen, unused]
    before = [p.detach().clone() for p in everything]
    optimizer = make(everything)
    for _ in range(3):
        optimizer.zero_grad()
        sum(((p - 1) ** 2).sum() for p in (scalar, empty, matrix, vector)).backward()
        if isinstance(optimizer, CLARS):
            optimizer.see({p: p.grad.norm() for p in everything if p.grad is not None})
        optimizer.step()
    for p, old in zip(everything, before, strict=True):
        assert torch.isfinite(p).all()
        assert p.shape == old.shape
    for p, old in ((frozen, before[4]), (unused, before[5])):
        # Without a gradient DropBack still lets an initial weight decay: that is its budget, not an update.
        if not isinstance(optimizer, DropBack) or p is frozen:
            assert torch.equal(p, old)
    for p, old in ((scalar, before[0]), (vector, before[3])):
        assert not torch.equal(p, old)


@pytest.mark.parametrize("make", OPTIMISERS.values(), ids=OPTIMISERS)
def test_a_weight_that_two_layers_share_is_held_once(make):
    first, second = nn.Linear(3, 3), nn.Linear(3, 3)
    second.weight = first.weight
    optimizer = make(nn.Sequential(first, second).parameters())
    held = [p for group in optimizer.param_groups for p in group["params"]]
    assert sum(p is first.weight for p in held) == 1


def test_clars_goes_on_where_it_stopped(tmp_path):
    def net(seed):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 2))

    def train(model, optimizer, steps):
        for step in steps:
            optimizer.zero_grad()
            generator = torch.Generator().manual_seed(step)
            model(torch.randn(8, 5, generator=generator)).square().sum().backward()
            optimizer.see({p: 2 * p.grad.norm() for p in model.parameters()})
            optimizer.step()

    whole = net(0)
    train(whole, CLARS(layer_groups(whole), lr=1.0), range(6))
    part = net(0)
    optimizer = CLARS(layer_groups(part), lr=1.0)
    train(part, optimizer, range(3))
    torch.save([part.state_dict(), optimizer.state_dict()], tmp_path / "state.pt")
    weights, state = torch.load(tmp_path / "state.pt", weights_only=True)
    again = net(9)
    again.load_state_dict(weights)
    # Another rate, so that loading must have taken effect.
    resumed = CLARS(layer_groups(again), lr=7.0)
    resumed.load_state_dict(state)
    train(again, resumed, range(3, 6))
    for a, b in zip(whole.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)


# ---------------------------------------------------------------- batches


@pytest.mark.parametrize(("count", "batch_size", "classes"), [(1, 1, 2), (5, 4, 2), (4, 2, 1)])
def test_one_image_a_short_last_batch_and_one_class(count, batch_size, classes):
    x, y = torch.randn(count, 1, 4, 4), torch.arange(count) % classes
    data = DataLoader(TensorDataset(x, y), batch_size=batch_size)
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 2))
    classifier = ImageClassifier(model, partial(torch.optim.SGD, lr=0.1), num_classes=2)
    trainer = quiet_trainer(max_epochs=1)
    trainer.fit(classifier, data, data)
    assert all(torch.isfinite(torch.as_tensor(value)) for value in trainer.callback_metrics.values())


def test_one_image_of_one_pixel_cannot_be_normalised_and_pytorch_says_so():
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        nn.BatchNorm2d(3).train()(torch.randn(1, 3, 1, 1))


def test_a_text_of_one_token_has_nothing_to_predict():
    with pytest.raises(ValueError, match="N of at least 2"):
        next_token_loss(torch.randn(2, 1, 5), torch.zeros(2, 1, dtype=torch.int64))


# ---------------------------------------------------------------- weights on disk


class Harm:
    """A pickle that runs a command when it is loaded."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


def test_harm_in_stored_weights_is_refused_and_not_run(tmp_path):
    store = WeightStore(tmp_path)
    number = store.save(nn.Linear(2, 2))
    file = tmp_path / f"{number:012x}.pt"
    marker = tmp_path / "harmed"
    for content in (pickle.dumps(Harm(marker)), None):
        if content is None:
            torch.save({"weight": Harm(marker)}, file)
        else:
            file.write_bytes(content)
        with pytest.raises(pickle.UnpicklingError):
            store.load(nn.Linear(2, 2), number)
        assert not marker.exists()


@pytest.mark.parametrize("size", [0, 10, 700])
@pytest.mark.xfail(
    strict=True,
    reason="a file of weights that breaks off is refused, but in PyTorch's words, which do not say to delete it: the "
    "store belongs to the code that published runs were measured with",
)
def test_weights_that_break_off_are_refused_with_what_to_do(tmp_path, size):
    store = WeightStore(tmp_path)
    number = store.save(nn.Linear(2, 2))
    file = tmp_path / f"{number:012x}.pt"
    file.write_bytes(file.read_bytes()[:size])
    with pytest.raises(ValueError, match="delete it"):
        store.load(nn.Linear(2, 2), number)


@pytest.mark.parametrize("size", [0, 10, 700])
def test_weights_that_break_off_are_never_loaded(tmp_path, size):
    store = WeightStore(tmp_path)
    number = store.save(nn.Linear(2, 2))
    file = tmp_path / f"{number:012x}.pt"
    file.write_bytes(file.read_bytes()[:size])
    model = nn.Linear(2, 2)
    before = model.weight.detach().clone()
    with pytest.raises((ValueError, RuntimeError, EOFError, pickle.UnpicklingError)):
        store.load(model, number)
    assert torch.equal(model.weight, before)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_death_while_weights_are_saved_leaves_whole_files_only(tmp_path):
    moments = random.Random(0)
    for _ in range(8):
        child = os.fork()
        if child == 0:
            try:
                store, model = WeightStore(tmp_path), nn.Linear(100, 100)
                for number in range(10_000):
                    with torch.no_grad():
                        model.bias.fill_(float(number))
                    store.save(model)
            finally:
                os._exit(0)
        time.sleep(moments.uniform(0.02, 0.2))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    files = list(tmp_path.glob("*.pt"))
    assert files, "the writers did write"
    for file in files:
        WeightStore(tmp_path).load(nn.Linear(100, 100), int(file.stem, 16))
