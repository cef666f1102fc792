"""Clips of moving digits: what they show, what they hide, and that they are the same everywhere; bad input."""

from __future__ import annotations

import hashlib
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chi2_contingency
from sklearn.datasets import load_digits

from leantrain.data import MovingDigits, images, moving_digits, overlap
from leantrain.data.registry import DataSet
from leantrain.data.video_sets import DIRECTIONS, roll_images, velocities

CLEAN = MovingDigits(noise=0.0)


def key(tensor: torch.Tensor) -> str:
    return hashlib.sha256(tensor.contiguous().numpy().tobytes()).hexdigest()


@given(st.integers(1, 4), st.integers(2, 6), st.integers(2, 6), st.integers(1, 5), st.integers(0, 1000))
@settings(max_examples=40, deadline=None)
def test_rolling_is_rolling(count, height, width, frames, seed):
    draws = torch.Generator().manual_seed(seed)
    pictures = torch.rand(count, height, width, generator=draws)
    start, velocity = torch.randint(-9, 9, (2, count, 2), generator=draws)
    got = roll_images(pictures, start, velocity, frames)
    for i in range(count):
        for t in range(frames):
            shift = (start[i] + t * velocity[i]).tolist()
            assert torch.equal(got[i, t], torch.roll(pictures[i], shift, dims=(0, 1)))


@pytest.mark.parametrize("recipe", [CLEAN, MovingDigits(5, 26, 3, (1, 2), noise=0.0)])
def test_without_noise_a_frame_is_the_first_one_rolled_by_the_velocity(recipe):
    clips = recipe.clips("val", 50)
    steps = velocities(recipe.speeds)[clips.y]
    whole = load_digits().images
    for i in range(50):
        digit = np.kron(whole[clips.source[i]] / 16, np.ones((recipe.scale, recipe.scale)))
        torus = torch.zeros(recipe.side, recipe.side)
        torus[: len(digit), : len(digit)] = torch.from_numpy(digit)
        assert torch.equal(clips.x[i, 0, 0], torch.roll(torus, clips.start[i].tolist(), dims=(0, 1)))
        for t in range(recipe.frames):
            moved = torch.roll(clips.x[i, 0, 0], (t * steps[i]).tolist(), dims=(0, 1))
            assert torch.equal(clips.x[i, t, 0], moved)


def test_the_classes_are_eight_directions_at_each_speed():
    assert len(set(DIRECTIONS)) == 8
    assert velocities((1, 2)).tolist() == [list(d) for d in DIRECTIONS] + [[2 * a, 2 * b] for a, b in DIRECTIONS]
    clips = CLEAN.clips("train", 600)
    assert clips.x.shape == (600, 8, 1, 12, 12)
    assert clips.x.dtype == torch.float32
    assert clips.y.bincount().tolist() == [75] * 8
    assert MovingDigits(side=16, speeds=(1, 2)).clips("val", 33).y.bincount().tolist() == [3] + [2] * 15


@pytest.mark.parametrize("t", [0, 1, 5])
def test_over_all_starts_a_frame_shows_the_same_pictures_in_every_class(t):
    """The proof that no single frame tells the class, by going through all of the torus."""
    picture = torch.rand(5, 4, generator=torch.Generator().manual_seed(0))
    starts = torch.cartesian_prod(torch.arange(5), torch.arange(4))
    shown = []
    for velocity in velocities((1, 2)):
        frames = roll_images(picture.expand(20, -1, -1), starts, velocity.expand(20, -1), t + 1)[:, t]
        shown.append(sorted(frame.numpy().tobytes() for frame in frames))
    assert all(one == shown[0] for one in shown)
    assert len(set(shown[0])) == 20


def test_digit_and_start_are_drawn_without_regard_to_the_class():
    clips = replace(CLEAN, frames=1).clips("train", 8000)
    for drawn in (clips.start[:, 0], clips.start[:, 1], torch.from_numpy(load_digits().target)[clips.source]):
        table = torch.zeros(8, int(drawn.max()) + 1)
        table.index_put_((clips.y, drawn), torch.ones(8000), accumulate=True)
        assert chi2_contingency(table.numpy()).pvalue > 0.01
    assert clips.start.min() == 0
    assert clips.start.max() == 11
    # All starting rows alike: 8000 draws over 12 rows.
    assert abs(clips.start[:, 0].bincount() - 8000 / 12).max() < 100


def test_training_and_validation_clips_show_different_digits():
    whole = load_digits().images
    train, val = (CLEAN.clips(split, 2000) for split in ("train", "val"))
    assert not set(train.source.tolist()) & set(val.source.tolist())
    assert overlap(whole[train.source.unique()], whole[val.source.unique()]) == []
    assert len(train.source.unique()) > 1000
    # The split is that of the images.
    shown = {x.mul(16).byte().numpy().tobytes() for x, _ in images("digits", batch_size=1).val_dataloader()}
    assert {whole[i].astype(np.uint8).tobytes() for i in val.source.unique().tolist()} <= shown


def test_a_recipe_gives_the_same_bytes():
    one, two = MovingDigits().clips("train", 24), MovingDigits().clips("train", 24)
    assert key(one.x) == key(two.x)
    # Noise from integers and products of two numbers: the same on every machine.
    assert key(one.x) == "10a9eff0f01d78bb810f825055ca10dd4f4f077d372651d69b134f149cdc296b"
    assert key(MovingDigits(clip_seed=1).clips("train", 24).x) != key(one.x)
    assert key(MovingDigits().clips("val", 24).x) != key(one.x)


def test_the_noise_has_the_deviation_that_it_should():
    noise = (MovingDigits(noise=0.3).clips("train", 600).x - CLEAN.clips("train", 600).x).double()
    assert noise.mean().abs() < 1e-3
    assert noise.std() == pytest.approx(0.3, abs=1e-3)
    # Frames and pixels have noise of their own: neighbours do not go together.
    for axis in (1, 3, 4):
        ahead, behind = noise.narrow(axis, 1, noise.shape[axis] - 1), noise.narrow(axis, 0, noise.shape[axis] - 1)
        assert (ahead * behind).mean().abs() < 1e-3


def test_orders_show_the_same_frames():
    forward, shuffled, single = (MovingDigits(order=o).clips("val", 40) for o in ("forward", "shuffled", "single"))
    assert torch.equal(forward.y, shuffled.y)
    assert torch.equal(forward.y, single.y)
    assert torch.equal(single.x, forward.x[:, :1].expand_as(forward.x))
    moved = 0
    for i in range(40):
        assert sorted(key(frame) for frame in forward.x[i]) == sorted(key(frame) for frame in shuffled.x[i])
        moved += not torch.equal(forward.x[i], shuffled.x[i])
    assert moved >= 38


def test_batches_depend_on_seed_and_epoch_alone():
    data = moving_digits(batch_size=50, train_size=230, val_size=120)
    assert (data.name, data.num_classes, data.shape) == ("moving-digits", 8, (8, 1, 12, 12))
    assert (data.train_size, data.val_size, len(data.train_dataloader()), len(data.val_dataloader())) == (
        230,
        120,
        4,
        3,
    )

    def epoch(seed, number):
        data.set_seed(seed)
        data.set_epoch(number)
        return torch.cat([x for x, _ in data.train_dataloader()])

    first = epoch(3, 1)
    torch.manual_seed(123)
    assert torch.equal(first, epoch(3, 1))
    assert not torch.equal(first, epoch(3, 2))
    assert not torch.equal(first, epoch(4, 1))
    clips = MovingDigits().clips("val", 120)
    val = list(data.val_dataloader())
    assert torch.equal(torch.cat([x for x, _ in val]), clips.x)
    assert torch.equal(torch.cat([y for _, y in val]), clips.y)
    known = {key(x): int(y) for x, y in zip(MovingDigits().clips("train", 230).x, torch.arange(230) % 8, strict=True)}
    assert all(known[key(x)] == y for xs, ys in data.train_dataloader() for x, y in zip(xs, ys.tolist(), strict=True))


def test_the_fingerprint_sees_every_option():
    plain = moving_digits().fingerprint
    assert plain == moving_digits().fingerprint
    others = [replace(MovingDigits(), **{field: value}) for field, value in {
        "frames": 4, "side": 16, "speeds": (2,), "noise": 0.1, "order": "single", "clip_seed": 1
    }.items()]  # fmt: skip
    marks = {moving_digits(recipe).fingerprint for recipe in others}
    marks |= {moving_digits(batch_size=8).fingerprint, moving_digits(train_size=16).fingerprint}
    assert len(marks | {plain}) == len(others) + 3


def test_a_changed_source_is_refused(known):
    from leantrain.data.errors import CorruptData

    arrays = {"images": "0" * 64, "target": "0" * 64}
    known(DataSet("digits", "", "embedded", "", "", "", arrays=arrays))
    with pytest.raises(CorruptData, match="another scikit-learn"):
        moving_digits()


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda: MovingDigits(frames=0), "frames=0"),
        (lambda: MovingDigits(side=7), "side=7"),
        (lambda: MovingDigits(scale=2), "scale=2"),
        (lambda: MovingDigits(scale=0), "scale=0"),
        (lambda: MovingDigits(noise=-0.1), "noise"),
        (lambda: MovingDigits(noise=float("nan")), "noise"),
        (lambda: MovingDigits(order="back"), "order='back'"),
        (lambda: MovingDigits(clip_seed=-1), "clip_seed"),
        (lambda: MovingDigits(speeds=()), r"speeds=\(\)"),
        (lambda: MovingDigits(speeds=(1, 1)), "speeds"),
        (lambda: MovingDigits(speeds=(0,)), "speeds"),
        (lambda: MovingDigits(side=12, speeds=(6,)), "torus of 12"),
        (lambda: MovingDigits(side=12, speeds=(1, 13)), "torus of 12"),
        (lambda: CLEAN.clips("test", 100), "split='test'"),
        (lambda: CLEAN.clips("val", 7), "count=7"),
        (lambda: moving_digits(batch_size=0), "batch_size"),
    ],
)
def test_bad_input_is_named(call, named):
    with pytest.raises(ValueError, match=named):
        call()
