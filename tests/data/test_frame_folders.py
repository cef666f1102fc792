"""UCF-101 from folders of frames: which are shown, alike for all of a clip; what is missing or wrong is named."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from leantrain.data import CorruptData, MissingData, ucf101
from leantrain.data.frame_folders import FrameFolders, segment_places


def write_clip(folder: Path, levels: list[int], size: tuple[int, int] = (20, 14)) -> Path:
    """A clip whose frames are even grey, of given levels."""
    folder.mkdir(parents=True)
    for number, level in enumerate(levels):
        Image.new("RGB", size, (level,) * 3).save(folder / f"{number:03}.jpg")
    return folder


@pytest.fixture
def laid_down(project):
    """101 classes, of which two have clips; one training clip each, and one test clip."""
    home = project / "data" / "ucf101"
    classes = [f"Class{number:03}" for number in range(101)]
    for name, clip, levels in [
        (classes[3], "v_a_g01_c01", [10, 20, 30, 40]),
        (classes[7], "v_b_g01_c01", [50, 60, 70, 80]),
        (classes[7], "v_b_g02_c01", [90, 100, 110, 120]),
    ]:
        write_clip(home / "frames" / name / clip, levels)
    lists = home / "ucfTrainTestlist"
    lists.mkdir()
    (lists / "classInd.txt").write_text("".join(f"{n + 1} {name}\r\n" for n, name in enumerate(classes)))
    (lists / "trainlist01.txt").write_text("Class003/v_a_g01_c01.avi 4\r\nClass007/v_b_g01_c01.avi 8\r\n")
    (lists / "testlist01.txt").write_text("Class007/v_b_g02_c01.avi\r\n")
    return home


def levels(x: torch.Tensor) -> list[int]:
    """Mean grey level of every frame of a normalised clip (T, 3, H, W)."""
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    return ((x.mean(dim=(2, 3)) * std + mean) * 255).mean(dim=1).round().int().tolist()


@given(st.integers(1, 300), st.integers(1, 64), st.integers(0, 1000))
def test_one_frame_of_each_segment(count, frames, seed):
    within = torch.rand(frames, generator=torch.Generator().manual_seed(seed))
    for drawn in (None, within):
        places = segment_places(count, frames, drawn)
        assert len(places) == frames
        assert places == sorted(places)
        for number, place in enumerate(places):
            assert int(number * count / frames) <= place <= min(count - 1, int((number + 1) * count / frames))
    assert segment_places(count, count) == list(range(count))


def test_clips_are_read_with_their_classes(laid_down):
    data = ucf101(batch_size=2, frames=2, size=12)
    assert (data.num_classes, data.shape, data.train_size, data.val_size) == (101, (2, 3, 12, 12), 2, 1)
    assert set(data.checksums) == {"ucf101/train 01, list of clips", "ucf101/test 01, list of clips"}
    ((x, y),) = data.val_dataloader()
    assert x.shape == (1, 2, 3, 12, 12)
    assert y.tolist() == [7]
    # The middles of two segments of four frames.
    assert levels(x[0]) == [100, 120]
    ((x, y),) = data.train_dataloader()
    assert sorted(y.tolist()) == [3, 7]
    for clip, label in zip(x, y.tolist(), strict=True):
        first, last = levels(clip)
        assert first in ((10, 20) if label == 3 else (50, 60))
        assert last in ((30, 40) if label == 3 else (70, 80))


def test_all_frames_of_a_clip_are_cut_and_mirrored_alike(tmp_path):
    folder = tmp_path / "clip"
    folder.mkdir()
    ramp = Image.fromarray(torch.arange(40).mul(6).byte().repeat(30, 1).numpy())
    for number in range(3):
        ramp.save(folder / f"{number}.jpg", quality=95)
    seeds = torch.arange(20)
    shown = [FrameFolders([(folder, 0)] * 20, 3, 14, seeds)[i][0] for i in range(20)]
    assert all(clip.shape == (3, 3, 14, 14) and clip.dtype == torch.uint8 for clip in shown)
    assert all(torch.equal(clip[0], clip[1]) and torch.equal(clip[0], clip[2]) for clip in shown)
    rising = [bool(clip[0, 0, 0, -1] > clip[0, 0, 0, 0]) for clip in shown]
    assert 4 <= sum(rising) <= 16, "about half are mirrored"
    assert len({clip.numpy().tobytes() for clip in shown}) > 10, "cut at random places"
    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    assert torch.equal(FrameFolders([(folder, 0)] * 20, 3, 14, seeds)[3][0], shown[3])
    assert torch.equal(torch.random.get_rng_state(), before)


def test_fewer_clips_and_stand_ins(laid_down):
    assert ucf101(train_size=1).train_size == 1
    with pytest.raises(ValueError, match="val_size must be 1 to 1"):
        ucf101(val_size=2)
    data = ucf101(batch_size=2, frames=3, size=9, stand_in=True)
    batches = list(data.train_dataloader())
    assert [tuple(x.shape) for x, _ in batches] == [(2, 3, 3, 9, 9)] * 2
    assert data.checksums == {}
    assert all(y.min() >= 0 and y.max() < 101 for _, y in batches)
    assert data.fingerprint != ucf101(batch_size=2, frames=3, size=9).fingerprint


def test_what_is_missing_is_named(project, laid_down):
    (laid_down / "ucfTrainTestlist/testlist01.txt").unlink()
    with pytest.raises(MissingData, match=r"testlist01.*\n.*<class>/<clip>/<frame>"):
        ucf101()
    (laid_down / "frames").rename(laid_down / "videos")
    with pytest.raises(MissingData, match=r"UCF-101 is not complete(.|\n)*<class>/<clip>/<frame>"):
        ucf101()


def test_what_is_wrong_is_named(laid_down):
    lists = laid_down / "ucfTrainTestlist"
    (lists / "testlist01.txt").write_text("Class007/v_b_g09_c01.avi\n")
    with pytest.raises(CorruptData, match=r"testlist01\.txt names Class007/v_b_g09_c01\.avi"):
        ucf101()
    (lists / "testlist01.txt").write_text("../frames/v_b_g02_c01.avi\n")
    with pytest.raises(CorruptData, match=r"testlist01\.txt names"):
        ucf101()
    (lists / "classInd.txt").write_text("1 Class000\n")
    with pytest.raises(CorruptData, match="names 1 classes"):
        ucf101()


def test_frames_that_do_not_fit_are_refused(tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(CorruptData, match="holds no frames"):
        FrameFolders([(empty, 0)], 2, 8)[0]
    mixed = write_clip(tmp_path / "mixed", [1, 2])
    Image.new("RGB", (9, 9)).save(mixed / "000.jpg")
    with pytest.raises(CorruptData, match="cannot be read as one clip"):
        FrameFolders([(mixed, 0)], 2, 8)[0]
    (mixed / "001.jpg").write_bytes(b"no picture")
    with pytest.raises(CorruptData, match="cannot be read as one clip"):
        FrameFolders([(mixed, 0)], 2, 8)[0]


@pytest.mark.parametrize("options", [{"split": 4}, {"frames": 0}, {"size": 0}, {"batch_size": 0}, {"split_seed": -1}])
def test_bad_input_is_named(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        ucf101(**options, stand_in=True)
