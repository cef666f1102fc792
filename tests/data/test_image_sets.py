"""Batches: what they hold, what they depend on, and what they must not depend on."""

from __future__ import annotations

import hashlib
import pickle
import random
import struct
from collections.abc import Callable
from pathlib import Path

import lightning as L
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch import nn

from leantrain.data import image_sets, images
from leantrain.data.cifar import read_batch
from leantrain.data.errors import CorruptData, MissingData
from leantrain.data.image_sets import ImageData, random_crop_flip, stratified_order

CIFAR_MEAN = np.array([0.4914, 0.4822, 0.4465])[:, None, None]
CIFAR_STD = np.array([0.2470, 0.2435, 0.2616])[:, None, None]


def batches(data: ImageData, seed: int = 0, epoch: int = 0) -> list[tuple[torch.Tensor, torch.Tensor]]:
    data.set_seed(seed)
    data.set_epoch(epoch)
    return list(data.train_dataloader())


def same(a: list, b: list) -> bool:
    return len(a) == len(b) and all(
        torch.equal(p, q) for x, y in zip(a, b, strict=True) for p, q in zip(x, y, strict=True)
    )


def to_pixels(x: torch.Tensor) -> np.ndarray:
    """Normalised CIFAR-10 images back as they are stored."""
    return np.rint((x.numpy() * CIFAR_STD + CIFAR_MEAN) * 255).astype(np.uint8)


# --- the sets -------------------------------------------------------------------------------------------------------


def test_digits_are_the_known_ones_split_in_proportion():
    data = images("digits", batch_size=100)
    assert (data.name, data.num_classes, data.shape) == ("digits", 10, (1, 8, 8))
    assert (data.train_size, data.val_size) == (1437, 360)
    assert len(data.train_dataloader()) == 14
    assert len(data.val_dataloader()) == 4
    val = list(data.val_dataloader())
    assert [len(y) for _, y in val] == [100, 100, 100, 60]
    x, y = torch.cat([x for x, _ in val]), torch.cat([y for _, y in val])
    assert x.dtype == torch.float32
    assert y.dtype == torch.int64
    assert x.shape == (360, 1, 8, 8)
    assert x.min() == 0
    assert x.max() == 1
    assert set((x * 16).unique().tolist()) == set(range(17))
    assert all(34 <= n <= 38 for n in y.bincount(minlength=10).tolist())


def test_digits_train_and_validation_are_together_the_whole_set():
    from sklearn.datasets import load_digits

    data = images("digits", batch_size=1)
    rows = [
        x.mul(16).byte().numpy().tobytes()
        for loader in (data.train_dataloader(), data.val_dataloader())
        for x, _ in loader
    ]
    assert sorted(rows) == sorted(image.astype(np.uint8).tobytes() for image in load_digits().images)


def test_cifar_batches_hold_the_files_images(fake_cifar):
    train_x, train_y, val_x, val_y = fake_cifar
    data = images("cifar10", batch_size=50)
    assert (data.num_classes, data.shape, data.train_size, data.val_size) == (10, (3, 32, 32), 100, 20)
    ((x, y),) = data.val_dataloader()
    assert np.array_equal(y, val_y)
    expected = (val_x / 255 - CIFAR_MEAN) / CIFAR_STD
    assert np.abs(x.numpy() - expected).max() < 1e-5
    got = {
        (image.tobytes(), int(label))
        for x, y in data.train_dataloader()
        for image, label in zip(to_pixels(x), y, strict=True)
    }
    assert got == {(image.tobytes(), int(label)) for image, label in zip(train_x, train_y, strict=True)}
    assert set(data.checksums) == {f"cifar-10-batches-py/data_batch_{i}" for i in range(1, 6)} | {
        "cifar-10-batches-py/test_batch"
    }


def test_mnist_is_read_from_idx_files(lay_down):
    rng = np.random.default_rng(0)
    contents, arrays = {}, {}
    for part, count in (("train", 30), ("t10k", 10)):
        x, y = rng.integers(0, 256, (count, 28, 28), dtype=np.uint8), rng.integers(0, 10, count, dtype=np.uint8)
        arrays[part] = x, y
        contents[f"MNIST/raw/{part}-images-idx3-ubyte"] = struct.pack(">4I", 2051, count, 28, 28) + x.tobytes()
        contents[f"MNIST/raw/{part}-labels-idx1-ubyte"] = struct.pack(">2I", 2049, count) + y.tobytes()
    lay_down("mnist", contents)
    ((x, y),) = images("mnist").val_dataloader()
    assert np.array_equal(y, arrays["t10k"][1])
    assert np.abs(x[:, 0].numpy() - (arrays["t10k"][0] / 255 - 0.1307) / 0.3081).max() < 1e-5


@pytest.mark.parametrize(
    ("head", "content", "message"),
    [
        (struct.pack(">2I", 2051, 3), b"abc", "not an idx file"),
        (struct.pack(">2I", 2049, 4), b"abc", "promises"),
        (b"\0\0", b"", "not an idx file"),
    ],
)
def test_damaged_idx_files_are_named(lay_down, head, content, message):
    images_file = struct.pack(">4I", 2051, 3, 28, 28) + bytes(3 * 784)
    files = {f"MNIST/raw/{part}-images-idx3-ubyte": images_file for part in ("train", "t10k")}
    labels = {f"MNIST/raw/{part}-labels-idx1-ubyte": head + content for part in ("train", "t10k")}
    lay_down("mnist", files | labels)
    with pytest.raises(CorruptData, match=f"train-labels-idx1-ubyte: .*{message}"):
        images("mnist")


def test_a_label_out_of_range_is_named(lay_down, cifar_bytes):
    x = np.zeros((3, 3, 32, 32), np.uint8)
    contents = {f"cifar-10-batches-py/data_batch_{i}": cifar_bytes(x, [0, 1, 2]) for i in (1, 2, 3, 5)}
    contents["cifar-10-batches-py/data_batch_4"] = cifar_bytes(x, [0, 1, 10])
    lay_down("cifar10", contents | {"cifar-10-batches-py/test_batch": cifar_bytes(x, [0, 1, 2])})
    with pytest.raises(CorruptData, match="data_batch_4: row 2 has the label 10"):
        images("cifar10")


@pytest.mark.parametrize("name", ["cifar10", "mnist", "imagenet"])
def test_missing_sets_are_not_replaced(name):
    with pytest.raises(MissingData, match="Terms: "):
        images(name)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "cifar100"}, "unknown image set 'cifar100'; the image sets are digits, mnist, cifar10, imagenet"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"train_size": 0}, "train_size must be 1 to 1437 or None, got 0"),
        ({"train_size": 1438}, "train_size must be 1 to 1437"),
        ({"val_size": -1}, "val_size must be 1 to 360"),
        ({"split_seed": -1}, "split_seed must be 0 to"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        images(**{"name": "digits", **options})


def test_bad_seeds_and_epochs_are_refused():
    data = images("digits")
    for seed in (-1, 2**63):
        with pytest.raises(ValueError, match="seed must be 0 to"):
            data.set_seed(seed)
    with pytest.raises(ValueError, match="epoch must be at least 0"):
        data.set_epoch(-1)


# --- the CIFAR-10 reader -------------------------------------------------------------------------------------------


def test_the_reader_agrees_with_unpickling(tmp_path, cifar_bytes):
    rng = np.random.default_rng(1)
    content = cifar_bytes(rng.integers(0, 256, (300, 3, 32, 32), dtype=np.uint8), rng.integers(0, 10, 300).tolist())
    (tmp_path / "data_batch_1").write_bytes(content)
    expected = pickle.loads(content, encoding="bytes")
    x, y = read_batch(tmp_path / "data_batch_1")
    assert np.array_equal(x.reshape(300, -1), expected[b"data"])
    assert y.tolist() == expected[b"labels"]


class Evil:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable, tuple]:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("protocol", range(6))
def test_a_malicious_pickle_is_refused_and_not_run(tmp_path, protocol):
    harm = tmp_path / "harm"
    content = pickle.dumps({"labels": [1], "data": Evil(harm)}, protocol)
    pickle.loads(content)
    assert harm.exists(), "the test's own pickle does no harm"
    harm.unlink()
    (tmp_path / "data_batch_1").write_bytes(content)
    with pytest.raises(CorruptData, match="data_batch_1: not a"):
        read_batch(tmp_path / "data_batch_1")
    assert not harm.exists()


def test_harm_inside_a_true_batch_is_refused(tmp_path, cifar_bytes):
    content = cifar_bytes(np.zeros((2, 3, 32, 32), np.uint8), [0, 1])
    evil = content.replace(b"cnumpy.core.multiarray\n_reconstruct\n", b"cos\nsystem\n")
    (tmp_path / "data_batch_1").write_bytes(evil)
    with pytest.raises(CorruptData, match="os system"):
        read_batch(tmp_path / "data_batch_1")


@pytest.mark.parametrize("change", ["cut", "empty", "more labels", "noise", "page"])
def test_a_damaged_batch_is_refused(tmp_path, cifar_bytes, change):
    content = cifar_bytes(np.zeros((2, 3, 32, 32), np.uint8), [0, 1])
    (tmp_path / "data_batch_1").write_bytes(
        {
            "cut": content[:3000],
            "empty": b"",
            "more labels": content.replace(b"K\x00K\x01e", b"K\x00K\x01K\x01e"),
            "noise": bytes(range(256)),
            "page": b"<html></html>",
        }[change]
    )
    with pytest.raises(CorruptData, match="data_batch_1"):
        read_batch(tmp_path / "data_batch_1")


# --- order and augmentation ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("augment", [False, True])
def test_two_arms_see_bit_identical_batches(fake_cifar, augment):
    one, other = (images("cifar10", batch_size=16, augment=augment) for _ in range(2))
    torch.manual_seed(1)
    first = batches(one, seed=5, epoch=3)
    torch.manual_seed(2)
    other.set_seed(5)
    other.set_epoch(3)
    second = []
    for batch in other.train_dataloader():
        nn.Dropout()(torch.rand(7))
        second.append(batch)
    assert same(first, second)


def test_the_loader_leaves_the_global_generators_alone(fake_cifar):
    data = images("cifar10", batch_size=16, augment=True)
    torch.manual_seed(0)
    random.seed(0)
    before = torch.get_rng_state(), random.getstate()
    batches(data)
    list(data.val_dataloader())
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]


@pytest.mark.parametrize("augment", [False, True])
def test_seeds_and_epochs_differ_and_return(fake_cifar, augment):
    data = images("cifar10", batch_size=16, augment=augment)
    seen = {
        hashlib.sha256(torch.cat([x for x, _ in batches(data, s, e)]).numpy().tobytes()).hexdigest()
        for s in (0, 1, 2**62)
        for e in range(4)
    }
    assert len(seen) == 12
    assert same(batches(data, 0, 1), batches(data, 0, 1))
    # A seed shifted by one epoch is not another seed's order.
    assert not same(batches(data, 0, 1), batches(data, 1, 0))


def test_a_new_seed_begins_at_epoch_zero(fake_cifar):
    data = images("cifar10", batch_size=16)
    first = batches(data, 4)
    data.set_epoch(9)
    data.set_seed(4)
    assert same(first, list(data.train_dataloader()))


def test_every_epoch_is_a_permutation(fake_cifar):
    data = images("cifar10", batch_size=20)
    every = sorted(image.tobytes() for image in fake_cifar[0])
    for epoch in range(3):
        assert sorted(image.tobytes() for x, _ in batches(data, 0, epoch) for image in to_pixels(x)) == every


def test_only_a_short_training_batch_is_dropped_unless_it_is_the_only_one(fake_cifar):
    assert [len(y) for _, y in batches(images("cifar10", batch_size=30))] == [30, 30, 30]
    assert [len(y) for _, y in batches(images("cifar10", batch_size=50))] == [50, 50]
    assert [len(y) for _, y in batches(images("cifar10", batch_size=500))] == [100]
    assert [len(y) for _, y in images("cifar10", batch_size=15).val_dataloader()] == [15, 5]
    assert len(images("cifar10", batch_size=15).val_dataloader()) == 2


def test_an_image_is_cropped_alike_in_batches_of_any_size(fake_cifar):
    big, small = images("cifar10", batch_size=100, augment=True), images("cifar10", batch_size=10, augment=True)
    together = torch.cat([x for x, _ in batches(small, 3, 2)])
    assert torch.equal(batches(big, 3, 2)[0][0], together)


@given(
    st.integers(1, 5), st.integers(1, 3), st.integers(1, 9), st.integers(1, 9), st.integers(0, 4), st.integers(0, 999)
)
def test_crop_and_flip_against_a_slow_reference(count, channels, height, width, pad, seed):
    rng = np.random.default_rng(seed)
    x = rng.integers(0, 256, (count, channels, height, width), dtype=np.uint8)
    top, left = rng.integers(0, 2 * pad + 1, (2, count))
    flip = rng.random(count) < 0.5
    expected = np.empty_like(x)
    for k in range(count):
        padded = np.zeros((channels, height + 2 * pad, width + 2 * pad), np.uint8)
        padded[:, pad : pad + height, pad : pad + width] = x[k]
        window = padded[:, top[k] : top[k] + height, left[k] : left[k] + width]
        expected[k] = window[:, :, ::-1] if flip[k] else window
    got = random_crop_flip(*(torch.from_numpy(a) for a in (x, top, left, flip)), pad)
    assert got.dtype == torch.uint8
    assert np.array_equal(got, expected)


def test_augmented_images_are_windows_of_their_originals(fake_cifar):
    train_x, train_y, *_ = fake_cifar
    data = images("cifar10", batch_size=100, augment=True)
    padded = np.pad(train_x, ((0, 0), (0, 0), (4, 4), (4, 4)))
    windows = {
        (flip, top, left, label, np.ascontiguousarray(cut[:, :, ::-1] if flip else cut).tobytes())
        for image, label in zip(padded, train_y.tolist(), strict=True)
        for top in range(9)
        for left in range(9)
        for cut in [image[:, top : top + 32, left : left + 32]]
        for flip in (False, True)
    }
    places = {(label, content): (flip, top, left) for flip, top, left, label, content in windows}
    drawn = []
    for epoch in range(10):
        ((x, y),) = batches(data, 0, epoch)
        drawn += [places[label, image.tobytes()] for image, label in zip(to_pixels(x), y.tolist(), strict=True)]
    flips, tops, lefts = (np.array(column) for column in zip(*drawn, strict=True))
    # 1,000 draws: each within five standard deviations of its expectation.
    assert abs(flips.mean() - 0.5) < 5 * 0.5 / 1000**0.5
    for offsets in (tops, lefts):
        counts = np.bincount(offsets, minlength=9)
        assert np.abs(counts - 1000 / 9).max() < 5 * (1000 * 8 / 81) ** 0.5


def test_digits_are_not_mirrored():
    data = images("digits", batch_size=1437, augment=True)
    ((x, _),) = batches(data)
    whole = {image.numpy().tobytes() for image in (batches(images("digits", batch_size=1437))[0][0] * 16).byte()}
    shifted = (x * 16).byte()
    # Digits shifted by (0, 0) are unchanged: one in nine, up to those with empty margins.
    unchanged = sum(image.numpy().tobytes() in whole for image in shifted)
    mirrored = sum(image.flip(-1).numpy().tobytes() in whole for image in shifted)
    assert unchanged > 100
    assert mirrored <= 3


def test_validation_is_never_augmented(fake_cifar):
    plain, augmented = images("cifar10"), images("cifar10", augment=True)
    augmented.set_seed(3)
    assert same(list(plain.val_dataloader()), list(augmented.val_dataloader()))


# --- choosing a part -----------------------------------------------------------------------------------------------


@given(st.lists(st.integers(0, 4), min_size=1, max_size=80), st.integers(0, 2**63 - 1))
def test_every_beginning_keeps_the_classes_in_proportion(labels, seed):
    y = torch.tensor(labels)
    order = stratified_order(y, seed)
    assert sorted(order.tolist()) == list(range(len(labels)))
    for n in range(1, len(labels) + 1):
        for label in set(labels):
            share = n * labels.count(label) / len(labels)
            assert abs(int((y[order[:n]] == label).sum()) - share) <= 2


def test_a_balanced_set_is_kept_balanced_exactly():
    y = torch.arange(1000) % 10
    for n in (10, 50, 500):
        assert y[stratified_order(y, 3)[:n]].bincount().tolist() == [n // 10] * 10
    assert not torch.equal(stratified_order(y, 3), stratified_order(y, 4))


def test_parts_are_nested_and_depend_on_the_split_seed_only(fake_cifar):
    def chosen(size, split_seed=0, seed=0):
        data = images("cifar10", batch_size=1, train_size=size, split_seed=split_seed)
        return {to_pixels(x).tobytes() for x, _ in batches(data, seed)}

    assert len(chosen(30)) == 30
    assert chosen(30) < chosen(60)
    assert chosen(30, seed=8) == chosen(30)
    assert chosen(30, split_seed=1) != chosen(30)
    data = images("cifar10", val_size=10)
    assert data.val_size == 10
    assert torch.cat([y for _, y in data.val_dataloader()]).bincount().tolist() == [1] * 10


# --- stand-in data and fingerprints --------------------------------------------------------------------------------


@pytest.mark.parametrize("augment", [False, True])
@pytest.mark.parametrize("name", ["digits", "mnist", "cifar10", "imagenet"])
def test_stand_in_data_touches_no_file(name, augment, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("a file was touched")

    for module, attribute in [(image_sets, "locate"), (image_sets, "read_digits"), (Path, "open"), (Path, "stat")]:
        monkeypatch.setattr(module, attribute, refuse)
    data = images(name, batch_size=6, stand_in=True, augment=augment, train_size=10_000)
    shapes = {"digits": (1, 8, 8), "mnist": (1, 28, 28), "cifar10": (3, 32, 32), "imagenet": (3, 224, 224)}
    assert data.shape == shapes[name]
    assert data.num_classes == (1000 if name == "imagenet" else 10)
    assert data.checksums == {}
    for loader in (data.train_dataloader(), data.val_dataloader()):
        got = list(loader)
        assert len(got) == len(loader) == 2
        for x, y in got:
            assert x.shape == (6, *shapes[name])
            assert x.dtype == torch.float32
            assert x.std() > 0.1
            assert 0 <= int(y.min()) <= int(y.max()) < data.num_classes


def test_the_fingerprint_changes_with_every_option(fake_cifar):
    base = {"batch_size": 10, "train_size": 50, "val_size": 10, "augment": False, "split_seed": 0}
    changes = [{}, {"batch_size": 11}, {"train_size": 51}, {"val_size": 11}, {"augment": True}, {"split_seed": 1}]
    changes += [{"stand_in": True}]
    marks = [images("cifar10", **{**base, **change}).fingerprint for change in changes]
    assert len(set(marks)) == len(marks)
    assert images("cifar10", **base).fingerprint == marks[0]
    assert images("digits", **base).fingerprint not in marks


def test_the_fingerprint_is_of_the_data_and_not_of_seed_or_place(fake_cifar, project, monkeypatch):
    data = images("cifar10")
    before = data.fingerprint
    data.set_seed(4)
    data.set_epoch(2)
    assert data.fingerprint == before
    (project / "data").rename(project / "elsewhere")
    monkeypatch.setenv("LEANTRAIN_DATA", str(project / "elsewhere"))
    assert images("cifar10").fingerprint == before


def test_the_fingerprint_changes_with_the_files(fake_cifar, lay_down, cifar_bytes):
    before = images("cifar10").fingerprint
    x = np.zeros((2, 3, 32, 32), np.uint8)
    names = [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]
    lay_down("cifar10", {f"cifar-10-batches-py/{name}": cifar_bytes(x, [0, 1]) for name in names})
    assert images("cifar10", train_size=10, val_size=2).fingerprint != before


# --- under a Lightning trainer -------------------------------------------------------------------------------------


class Recorder(L.LightningModule):
    """Remembers what it was trained and validated on."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(1, 1)
        self.seen: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.validated: list[tuple[torch.Tensor, torch.Tensor]] = []

    def training_step(self, batch, batch_idx):
        self.seen.append(batch)
        return self.layer(batch[0].mean().view(1, 1)).sum()

    def validation_step(self, batch, batch_idx):
        self.validated.append(batch)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(data: ImageData, epochs: int, folder: Path, resume: Path | None = None) -> tuple[Recorder, L.Trainer]:
    module = Recorder()
    trainer = L.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        num_sanity_val_steps=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
    )
    trainer.fit(module, datamodule=data, ckpt_path=resume, weights_only=True)
    return module, trainer


@pytest.mark.filterwarnings("ignore")
def test_the_trainers_epochs_give_the_batches_also_after_a_resume(fake_cifar, tmp_path):
    def make():
        data = images("cifar10", batch_size=32, augment=True)
        data.set_seed(6)
        return data

    straight, _ = fit(make(), 3, tmp_path)
    expected = [batch for epoch in range(3) for batch in batches(make(), 6, epoch)]
    assert same(straight.seen, expected)
    assert same(straight.validated, 3 * list(make().val_dataloader()))
    data = make()
    first, trainer = fit(data, 2, tmp_path)
    trainer.save_checkpoint(tmp_path / "two.ckpt")
    resumed, _ = fit(make(), 3, tmp_path, resume=tmp_path / "two.ckpt")
    assert same(first.seen + resumed.seen, expected)
    # The same data module under a second trainer, as an experiment does for its next arm.
    data.set_seed(6)
    again, _ = fit(data, 1, tmp_path)
    assert same(again.seen, expected[:3])
    # And afterwards in a plain loop.
    data.set_epoch(2)
    assert same(list(data.train_dataloader()), expected[6:])


# --- pictures in folders -------------------------------------------------------------------------------------------


@pytest.fixture
def fake_imagenet(project, monkeypatch) -> Path:
    """Two classes, each with 6 training and 2 validation pictures of 40x30; one is grey."""
    spec = image_sets._SPECS["imagenet"]
    small = image_sets._Spec((3, 16, 16), 2, spec.scale, spec.mean, spec.std, spec.pad, spec.flip)
    monkeypatch.setitem(image_sets._SPECS, "imagenet", small)
    monkeypatch.setattr(image_sets, "_WORKERS", 0)
    rng = np.random.default_rng(0)
    folder = project / "data/imagenet"
    for part, count in (("train", 6), ("val", 2)):
        for label in ("n01", "n02"):
            (folder / part / label).mkdir(parents=True)
            for k in range(count):
                grey = part == "train" and k == 0
                pixels = rng.integers(0, 256, (30, 40) if grey else (30, 40, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / part / label / f"{k}.png")
    return folder


def test_pictures_are_decoded_resized_and_cut(fake_imagenet):
    data = images("imagenet", batch_size=3)
    assert (data.train_size, data.val_size, len(data.train_dataloader()), len(data.val_dataloader())) == (12, 4, 4, 2)
    val = list(data.val_dataloader())
    assert [y.tolist() for _, y in val] == [[0, 0, 1], [1]]
    spec = image_sets._SPECS["imagenet"]
    with Image.open(fake_imagenet / "val/n01/0.png") as picture:
        small = picture.resize((24, 18), Image.Resampling.BILINEAR).crop((4, 1, 20, 17))
    expected = (np.asarray(small).transpose(2, 0, 1) / 255 - np.array(spec.mean)[:, None, None]) / np.array(spec.std)[
        :, None, None
    ]
    assert np.abs(val[0][0][0].numpy() - expected).max() < 1e-5
    assert sorted(torch.cat([y for _, y in batches(data)]).tolist()) == [0] * 6 + [1] * 6


@pytest.mark.parametrize("augment", [False, True])
def test_pictures_do_not_depend_on_workers_or_global_generators(fake_imagenet, monkeypatch, augment):
    data = images("imagenet", batch_size=4, augment=augment)
    torch.manual_seed(1)
    first = batches(data, 2, 1)
    state = torch.get_rng_state()
    monkeypatch.setattr(image_sets, "_WORKERS", 2)
    torch.manual_seed(1)
    assert same(first, batches(data, 2, 1))
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(1)
    assert torch.equal(torch.get_rng_state(), state), "reading pictures drew from the global generator"
    assert not same(first, batches(data, 2, 2))
    assert not same(first, batches(data, 3, 1))


def test_pictures_are_known_by_their_list(fake_imagenet):
    before = images("imagenet")
    assert set(before.checksums) == {"imagenet/train, list of files", "imagenet/val, list of files"}
    (fake_imagenet / "train/n01/0.png").rename(fake_imagenet / "train/n01/9.png")
    after = images("imagenet")
    assert after.fingerprint != before.fingerprint
    assert images("imagenet", train_size=4).train_size == 4


def test_wrong_picture_folders_are_named(fake_imagenet):
    (fake_imagenet / "val/n02/1.png").write_bytes(b"not a picture")
    with pytest.raises(CorruptData, match=r"1\.png is not a readable picture"):
        list(images("imagenet").val_dataloader())
    (fake_imagenet / "val/n03").mkdir()
    with pytest.raises(MissingData, match="no pictures in class folders"):
        images("imagenet")
    (fake_imagenet / "val/n03/0.png").write_bytes((fake_imagenet / "val/n02/0.png").read_bytes())
    with pytest.raises(CorruptData, match="has 3 class folders, expected 2"):
        images("imagenet")
