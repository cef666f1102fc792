"""Scenes with boxes: what they show, which classes are where, the same for a seed; what is wrong is named."""

from __future__ import annotations

import hashlib
from dataclasses import replace

import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from sklearn.datasets import load_digits
from torchvision.ops import box_iou

from leantrain.cli import main
from leantrain.data import CorruptData, DigitScenes, MissingData, digit_scenes, labelled_pictures
from leantrain.data import detection_sets as sets
from leantrain.data.registry import dataset

SMALL = DigitScenes(side=64, sizes=(16, 28), objects=(1, 3))


def equal(a, b) -> bool:
    return torch.equal(a[0], b[0]) and all(torch.equal(a[1][name], b[1][name]) for name in ("boxes", "labels"))


def flat(batches):
    return [(image, target) for images, targets in batches for image, target in zip(images, targets, strict=True)]


def test_scenes_are_images_with_boxes_inside():
    for image, target in digit_scenes(SMALL).scenes("test", 30):
        boxes = target["boxes"]
        assert image.shape == (3, 64, 64)
        assert image.dtype == boxes.dtype == torch.float32
        assert target["labels"].dtype == torch.int64
        assert 1 <= len(boxes) == len(target["labels"]) <= 3
        assert image.min() >= 0
        assert image.max() <= 1
        assert (boxes[:, :2] >= 0).all()
        assert (boxes[:, 2:] <= 64).all()
        sides = boxes[:, 2:] - boxes[:, :2]
        assert (sides > 0).all()
        assert (sides <= 28).all()
        assert (box_iou(boxes, boxes).fill_diagonal_(0) <= 0.05 + 1e-6).all()


def test_the_box_is_the_extent_of_the_digit():
    """A square stamp on a ground of its own: what differs from the ground lies in the box, and reaches its edges."""
    stamp, draws = torch.zeros(8, 8), torch.Generator()
    stamp[2:6, 2:6] = 1
    quiet = replace(SMALL, noise=0.0)
    for seed in range(5):
        image, target = quiet.scene([stamp], [3], draws.manual_seed(seed))
        (ground, _) = quiet.scene([], [], draws.manual_seed(seed))
        changed = ((image - ground).abs().sum(dim=0) > 0).nonzero()
        left, top, right, bottom = target["boxes"][0].int().tolist()
        assert changed.min(dim=0).values.tolist() >= [top, left]
        assert changed.max(dim=0).values.tolist() <= [bottom - 1, right - 1]
        assert (
            changed.max(dim=0).values - changed.min(dim=0).values + 1 - torch.tensor([bottom - top, right - left])
        ).abs().max() <= 1
        assert target["labels"].tolist() == [3]


def test_base_scenes_hold_no_new_digit_and_all_classes_come():
    data = digit_scenes(SMALL, batch_size=10, train_size=60, val_size=20)
    assert data.classes == ("0", "1", "2", "3", "4", "5", "6", "7", "8", "9")
    assert data.base == 7
    for loader, size in ((data.train_dataloader(), 60), (data.val_dataloader(), 20)):
        scenes = flat(loader)
        assert len(scenes) == size
        labels = torch.cat([target["labels"] for _, target in scenes])
        assert labels.min() >= 1
        assert labels.max() <= 7
    assert set(torch.cat([t["labels"] for _, t in data.scenes("test", 60)]).tolist()) == set(range(1, 11))
    other = digit_scenes(replace(SMALL, novel=(0, 3)))
    assert other.classes == ("1", "2", "4", "5", "6", "7", "8", "9", "0", "3")


def test_shots_are_k_of_each_class_alone():
    data = digit_scenes(SMALL)
    shots = data.shots(3, 5)
    assert [target["labels"].tolist() for _, target in shots] == [[c] for c in range(1, 11) for _ in range(3)]
    assert all(equal(a, b) for a, b in zip(shots, data.shots(3, 5), strict=True))
    assert not any(equal(a, b) for a, b in zip(shots, data.shots(3, 6), strict=True))
    with pytest.raises(ValueError, match="k=0"):
        data.shots(0, 1)


def test_train_and_test_are_made_of_different_digit_images(monkeypatch):
    whole, seen = load_digits().images / 16, {"train": set(), "test": set()}

    def watch(self, stamps, labels, draws):
        seen[split].update(stamp.numpy().tobytes() for stamp in stamps)
        return torch.zeros(3, 64, 64), {"boxes": torch.zeros(len(labels), 4), "labels": torch.tensor(labels)}

    monkeypatch.setattr(DigitScenes, "scene", watch)
    data = digit_scenes(SMALL, batch_size=50, train_size=1500, val_size=300)
    split = "train"
    list(data.train_dataloader()), data.shots(10, 0), data.scenes("val", 100)
    split = "test"
    list(data.val_dataloader()), data.scenes("test", 500)
    assert not seen["train"] & seen["test"]
    assert len(seen["train"]) > 800
    assert seen["test"] <= {image.astype("float32").tobytes() for image in whole}


def test_batches_depend_on_seed_and_epoch_alone():
    data = digit_scenes(SMALL, batch_size=4, train_size=10, val_size=3)

    def epoch(seed, number):
        data.set_seed(seed)
        data.set_epoch(number)
        return flat(data.train_dataloader())

    first = epoch(1, 0)
    assert len(first) == 8, "a short last batch is dropped"
    torch.manual_seed(9)
    assert all(equal(a, b) for a, b in zip(first, epoch(1, 0), strict=True))
    assert not any(equal(a, b) for a, b in zip(first, epoch(1, 1), strict=True))
    assert not any(equal(a, b) for a, b in zip(first, epoch(2, 0), strict=True))
    assert len(flat(digit_scenes(SMALL, batch_size=4, train_size=3).train_dataloader())) == 3
    marks = {digit_scenes(recipe).fingerprint for recipe in (SMALL, DigitScenes(), replace(SMALL, novel=(1,)))}
    assert len(marks) == 3


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda: DigitScenes(side=20), "side=20"),
        (lambda: DigitScenes(sizes=(4, 30)), r"sizes=\(4, 30\)"),
        (lambda: DigitScenes(objects=(0, 2)), r"objects=\(0, 2\)"),
        (lambda: DigitScenes(novel=(3, 3)), r"novel=\(3, 3\)"),
        (lambda: DigitScenes(novel=tuple(range(10))), "with some left over"),
        (lambda: DigitScenes(noise=-0.1), "noise=-0.1"),
        (lambda: digit_scenes(SMALL, batch_size=0), "batch_size=0"),
        (lambda: digit_scenes(SMALL).scenes("train", 3), "split='train'"),
        (lambda: digit_scenes(SMALL).scenes("test", -1), "count=-1"),
        (lambda: labelled_pictures("coco", size=64), "name='coco'"),
        (lambda: labelled_pictures("bccd", size=4), "size=4"),
    ],
)
def test_bad_input_is_named(call, named):
    with pytest.raises(ValueError, match=named):
        call()


# ---------------------------------------------------------------- pictures


def note(objects) -> str:
    parts = [
        f"<object><name>{name}</name><difficult>{hard}</difficult><bndbox><xmin>{a}</xmin><ymin>{b}</ymin><xmax>{c}</xmax>"
        f"<ymax>{d}</ymax></bndbox></object>"
        for name, (a, b, c, d), hard in objects
    ]
    return f"<annotation><filename>x.jpg</filename>{''.join(parts)}</annotation>"


CELL, WHITE, PLATELET = ("RBC", (10, 20, 50, 60), 0), ("WBC", (60, 0, 120, 60), 0), ("Platelets", (2, 2, 12, 12), 0)
PICTURES = {
    "train": {
        "a": [CELL, WHITE],
        "b": [CELL, PLATELET],
        "c": [WHITE],
        "d": [PLATELET, WHITE, ("RBC", (5, 5, 5, 9), 0)],
    },
    "val": {"e": [CELL], "f": [CELL, PLATELET]},
    "test": {"g": [CELL, WHITE, PLATELET], "h": [("WBC", (0, 0, 9, 9), 1)]},
}


@pytest.fixture
def cells(project, known):
    """BCCD's layout with eight pictures of 160 x 120 pixels, brighter from left to right."""
    home = project / "data" / "BCCD"
    for folder in ("Annotations", "ImageSets/Main", "JPEGImages"):
        (home / folder).mkdir(parents=True)
    ramp = torch.arange(160).repeat(120, 1).byte().numpy()
    for split, pictures in PICTURES.items():
        (home / "ImageSets/Main" / f"{split}.txt").write_text("".join(f"{name}\n" for name in pictures))
        for name, objects in pictures.items():
            (home / "Annotations" / f"{name}.xml").write_text(note(objects))
            Image.fromarray(ramp).save(home / "JPEGImages" / f"{name}.jpg", quality=95)

    def sign():
        trees = {folder: sets.tree_sha256(project / "data" / folder) for folder in dataset("bccd").folders}
        known(replace(dataset("bccd"), trees=trees))

    sign()
    return home, sign


def test_pictures_are_read_with_their_boxes(cells):
    data = labelled_pictures("bccd", size=60, batch_size=2)
    assert (data.classes, data.base, data.train_size, data.val_size) == (("RBC", "WBC", "Platelets"), 2, 2, 1)
    assert set(data.checksums) == {"BCCD/Annotations", "BCCD/ImageSets/Main", "BCCD/JPEGImages"}
    first, second = data.scenes("test", 0)
    assert first[0].shape == (3, 60, 80)
    assert first[1]["labels"].tolist() == [1, 2, 3]
    assert first[1]["boxes"].tolist() == [[5, 10, 25, 30], [30, 0, 60, 30], [1, 1, 6, 6]]
    assert second[1]["boxes"].shape == (0, 4), "difficult objects are left out"
    assert len(data.scenes("test", 1)) == 1
    with pytest.raises(ValueError, match="count=3: the split test has 2"):
        data.scenes("test", 3)


def test_base_pictures_hold_no_new_class_and_are_mirrored_with_their_boxes(cells):
    data = labelled_pictures("bccd", size=120, batch_size=2, train_size=40)
    scenes = flat(data.train_dataloader())
    assert len(scenes) == 40, "base pictures come again"
    whole = {1: [10, 20, 50, 60], 2: [60, 0, 120, 60]}
    turned = 0
    for image, target in scenes:
        mirrored = bool(image[0, 0, 0] > image[0, 0, -1])
        turned += mirrored
        assert target["labels"].max() <= 2
        for label, box in zip(target["labels"].tolist(), target["boxes"].tolist(), strict=True):
            left, top, right, bottom = whole[label]
            assert box == ([160 - right, top, 160 - left, bottom] if mirrored else whole[label])
    assert 8 <= turned <= 32
    assert torch.cat([t["labels"] for _, t in flat(data.val_dataloader())]).tolist() == [1]


def test_a_shot_is_one_object_and_the_others_are_ignored(cells):
    data = labelled_pictures("bccd", size=60)
    shots = data.shots(2, 0)
    assert len(shots) == 6
    for place, (_, target) in enumerate(shots):
        labels = target["labels"]
        assert (labels == 1 + place // 2).sum() == 1
        assert ((labels == 1 + place // 2) | (labels == sets.IGNORED)).all()
    assert not equal(shots[0], shots[1]), "each from another picture"
    assert all(equal(a, b) for a, b in zip(shots, data.shots(2, 0), strict=True))
    with pytest.raises(ValueError, match="k=3: only 2 pictures hold a RBC"):
        data.shots(3, 0)


def test_stand_ins_read_no_file(project):
    data = labelled_pictures("voc", size=48, batch_size=3, stand_in=True)
    assert (len(data.classes), data.base, data.checksums) == (20, 15, {})
    assert [len(images) for images, _ in data.train_dataloader()] == [3, 3]
    assert max(int(t["labels"].max()) for _, t in flat(data.train_dataloader())) <= 15
    assert [t["labels"].tolist() for _, t in data.shots(1, 0)] == [[c] for c in range(1, 21)]
    assert data.scenes("test", 5)[0][0].shape == (3, 48, 64)


def test_what_is_missing_or_changed_is_named(project, cells):
    home, sign = cells
    notes = home / "Annotations" / "a.xml"
    notes.write_text(note([CELL]))
    with pytest.raises(CorruptData, match=r"BCCD/Annotations: SHA-256 over its files"):
        labelled_pictures("bccd", size=60)
    for text in (
        "<annotation>",
        note([("cell", (1, 1, 5, 5), 0)]),
        "<annotation><object><name>RBC</name></object></annotation>",
    ):
        notes.write_text(text)
        sign()
        with pytest.raises(CorruptData, match=r"a\.xml: expected objects of RBC, WBC, Platelets"):
            labelled_pictures("bccd", size=60)
    notes.write_text(note([CELL]))
    (home / "JPEGImages" / "c.jpg").write_bytes(b"no picture")
    sign()
    with pytest.raises(CorruptData, match=r"c\.jpg: cannot be read"):
        flat(labelled_pictures("bccd", size=60, train_size=8).train_dataloader())
    (home / "JPEGImages" / "c.jpg").unlink()
    sign()
    with pytest.raises(CorruptData, match="the lists name c"):
        labelled_pictures("bccd", size=60)
    (home / "ImageSets/Main/test.txt").unlink()
    (home / "ImageSets/Main/train.txt").write_text("b\n")
    sign()
    with pytest.raises(MissingData, match=r"test\.txt"):
        labelled_pictures("bccd", size=60)
    (home / "JPEGImages").rename(home / "pictures")
    with pytest.raises(MissingData, match=r"BCCD \(blood cells\) is not complete(.|\n)*data/cards/bccd\.md"):
        labelled_pictures("bccd", size=60)


def test_the_checksum_of_a_folder_is_that_of_its_list_of_checksums(tmp_path, cells):
    for name, content in (("b", b"two"), ("a", b"one"), (".hidden", b"x")):
        (tmp_path / name).write_bytes(content)
    lines = "".join(f"{hashlib.sha256(c).hexdigest()}  {n}\n" for n, c in (("a", b"one"), ("b", b"two")))
    assert sets.tree_sha256(tmp_path) == hashlib.sha256(lines.encode()).hexdigest()
    home, _ = cells
    assert CliRunner().invoke(main, ["data", "verify", "bccd"]).output == "bccd: verified\n"
    (home / "JPEGImages" / "more.jpg").write_bytes(b"")
    with pytest.raises(CorruptData, match="lay it down anew from https"):
        sets.located("bccd")
    assert CliRunner().invoke(main, ["data", "verify", "bccd"]).exit_code != 0


def test_a_set_needs_pictures_of_base_classes_alone(cells):
    home, sign = cells
    (home / "ImageSets/Main/train.txt").write_text("b\n")
    sign()
    with pytest.raises(CorruptData, match="no pictures of base classes alone"):
        labelled_pictures("bccd", size=60)
