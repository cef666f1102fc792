"""Scenes with boxes for few-shot detection: base classes with many labels, new classes with K labelled objects each.

Two kinds of set have one shape. `digit_scenes` pastes scikit-learn's digits onto textured grounds; `labelled_pictures`
reads pictures with Pascal VOC's xml files: blood cells (BCCD), or Pascal VOC itself.

A scene is an image, float32 ``(3, H, W)`` from 0 to 1, and a dictionary with `boxes`, float32 ``(n, 4)`` as left, top,
right, bottom in pixels, and `labels`, int64 ``(n,)``: 1 to B are the base classes, B + 1 and on the new ones, -1 an
object that counts neither as an object nor as background. That is what torchvision's detectors take.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import xml.etree.ElementTree as ET
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from torchvision.ops import box_iou
from torchvision.transforms.v2.functional import pil_to_tensor

from leantrain.data.digits import read_digits
from leantrain.data.errors import CorruptData, MissingData
from leantrain.data.fetch import folders, locate
from leantrain.data.image_sets import stratified_order
from leantrain.data.registry import dataset
from leantrain.data.seeded import SeededData, epoch_generator, train_batch_count
from leantrain.data.stamps import sha256_of

__all__ = [
    "DetectionBatch",
    "DetectionData",
    "DigitScenes",
    "Scene",
    "digit_scenes",
    "labelled_pictures",
    "located",
    "tree_sha256",
]

Scene = tuple[Tensor, dict[str, Tensor]]
DetectionBatch = tuple[list[Tensor], list[dict[str, Tensor]]]
IGNORED = -1

# The split of the set that `images("digits")` has too.
_TRAIN_DIGITS = 1437
_TRIES = 50  # places that are tried for an object


class DetectionData(SeededData):
    """Base scenes as batches, and the few shots and the test scenes of all classes.

    Training and validation batches, ``(images, targets)`` as two lists, hold scenes without any object of a new class.

    Attributes:
        classes: Names of the classes, the base classes first; the label of a class is its place, from 1.
        base: Number B of base classes.
    """

    def __init__(
        self,
        *,
        classes: Sequence[str],
        base: int,
        shots: Callable[[int, int], list[Scene]],
        scenes: Callable[[str, int], list[Scene]],
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self.classes, self.base = tuple(classes), base
        self._shots, self._scenes = shots, scenes

    def shots(self, k: int, seed: int) -> list[Scene]:
        """The few-shot set: K scenes for each class, base and new, with one labelled object in each.

        Args:
            k: K, at least 1.
            seed: Fixes the choice. Draws of different K are independent of each other.

        Returns:
            The scenes, class by class. Other objects of a scene have the label -1.

        Raises:
            ValueError: If K is out of range, or a class has fewer pictures.
        """
        if k < 1:
            raise ValueError(f"k={k}: every class needs at least one shot")
        return self._shots(k, seed)

    def scenes(self, split: Literal["val", "test"], count: int) -> list[Scene]:
        """Scenes with all classes labelled: `val` to choose settings, `test` to report.

        Args:
            split: `val` or `test`.
            count: How many; 0 for all of a set of pictures.

        Raises:
            ValueError: If there is no such split, or not as many scenes.
        """
        if split not in ("val", "test") or count < 0:
            raise ValueError(f"split={split!r}, count={count}: expected val or test, and a number of scenes")
        return self._scenes(split, count)


def _batches(scenes: Iterator[Scene], size: int) -> Iterator[DetectionBatch]:
    images: list[Tensor] = []
    targets: list[dict[str, Tensor]] = []
    for image, target in scenes:
        images.append(image)
        targets.append(target)
        if len(images) == size:
            yield images, targets
            images, targets = [], []
    if images:
        yield images, targets


# ---------------------------------------------------------------- digits on textured grounds


@dataclass(frozen=True)
class DigitScenes:
    """How scenes of digits are made.

    The ground is the sum of three fields of random colours, of few, more and many cells, enlarged smoothly, and noise.
    A digit is enlarged bicubically and blended in with one bright or dark colour, its grey value being the opacity.

    Attributes:
        side: Height and width of a scene in pixels.
        objects: Least and largest number of digits in a scene.
        sizes: Least and largest side of a digit in pixels, before it is cut to its extent.
        novel: The new digits; the others are the base classes.
        noise: Standard deviation of the noise, at least 0; pixels are 0 to 1.

    Raises:
        ValueError: If a number is out of range.
    """

    side: int = 128
    objects: tuple[int, int] = (1, 3)
    sizes: tuple[int, int] = (24, 48)
    novel: tuple[int, ...] = (7, 8, 9)
    noise: float = 0.05

    def __post_init__(self) -> None:
        fits = 8 <= self.sizes[0] <= self.sizes[1] <= self.side and 1 <= self.objects[0] <= self.objects[1]
        known = set(self.novel) < set(range(10)) and len(set(self.novel)) == len(self.novel)
        if not (fits and known and self.noise >= 0):
            raise ValueError(
                f"{self}: expected sizes from 8 pixels to the side, at least one object, different digits as new "
                "classes with some left over, and noise of at least 0"
            )

    @property
    def digits(self) -> tuple[int, ...]:
        """The digits in the order of their labels: base classes, then new ones."""
        return tuple(d for d in range(10) if d not in self.novel) + self.novel

    def scene(self, stamps: Sequence[Tensor], labels: Sequence[int], draws: torch.Generator) -> Scene:
        """Make a scene of given digits.

        Args:
            stamps: Grey values 0 to 1, ``(8, 8)`` each.
            labels: Their labels.
            draws: Where ground, places, sizes and colours come from.

        Returns:
            The scene. A digit that finds no free place is left out, the first never is.
        """
        image = self._ground(draws)
        boxes, kept = torch.empty(0, 4), []  # type: ignore[var-annotated]
        for stamp, label in zip(stamps, labels, strict=True):
            size = int(torch.randint(self.sizes[0], self.sizes[1] + 1, (), generator=draws))
            alpha = F.interpolate(stamp[None, None], size=(size, size), mode="bicubic", align_corners=False)[0, 0]
            rows, columns = (alpha.clamp_(0, 1) > 0.25).nonzero().T
            top, left = int(rows.min()), int(columns.min())
            alpha = alpha[top : int(rows.max()) + 1, left : int(columns.max()) + 1]
            height, width = alpha.shape
            colour = 0.3 * torch.rand(3, generator=draws) + 0.7 * torch.randint(2, (), generator=draws)
            for _ in range(_TRIES):
                y = int(torch.randint(self.side - height + 1, (), generator=draws))
                x = int(torch.randint(self.side - width + 1, (), generator=draws))
                box = torch.tensor([[x, y, x + width, y + height]], dtype=torch.float32)
                if not len(boxes) or box_iou(box, boxes).max() <= 0.05:
                    part = image[:, y : y + height, x : x + width]
                    part.lerp_(colour[:, None, None].expand_as(part), alpha.expand_as(part))
                    boxes, kept = torch.cat([boxes, box]), [*kept, label]
                    break
        return image, {"boxes": boxes, "labels": torch.tensor(kept)}

    def _ground(self, draws: torch.Generator) -> Tensor:
        image = torch.full((3, self.side, self.side), 0.5)
        for part, weight in ((16, 0.5), (8, 0.3), (4, 0.2)):
            cells = max(1, self.side // part)
            field = torch.rand(1, 3, cells, cells, generator=draws) - 0.5
            image += weight * F.interpolate(field, size=(self.side, self.side), mode="bilinear", align_corners=False)[0]
        return (image + self.noise * torch.randn(image.shape, generator=draws)).clamp_(0, 1)


def digit_scenes(
    recipe: DigitScenes | None = None, *, batch_size: int = 8, train_size: int = 1000, val_size: int = 100
) -> DetectionData:
    """Scenes of digits; training and few-shot scenes are made of other digit images than validation and test scenes.

    Every epoch shows new scenes. The few-shot set has one scene for each shot, with that digit alone.

    Args:
        recipe: How they are made; by default that of :class:`DigitScenes`.
        batch_size: Scenes in a batch, at least 1.
        train_size: Base scenes in an epoch.
        val_size: Base scenes that are validated on.

    Raises:
        CorruptData: If scikit-learn's arrays are not those that the registry knows.
        ValueError: If a number is out of range.
    """
    recipe = DigitScenes() if recipe is None else recipe
    if min(batch_size, train_size, val_size) < 1:
        raise ValueError(f"{batch_size=}, {train_size=}, {val_size=}: expected at least 1 of each")
    images, digits = (torch.from_numpy(array) for array in read_digits())
    order = stratified_order(digits, 0)
    splits = {"train": order[:_TRAIN_DIGITS], "test": order[_TRAIN_DIGITS:]}
    places = {split: [rows[digits[rows] == d] for d in recipe.digits] for split, rows in splits.items()}
    base = 10 - len(recipe.novel)

    def draw(split: str, label: int, draws: torch.Generator) -> Tensor:
        rows = places[split][label - 1]
        return images[rows[torch.randint(len(rows), (), generator=draws)], 0].float() / 16

    def make(split: str, count: int, classes: int, draws: torch.Generator) -> Iterator[Scene]:
        for _ in range(count):
            low, high = recipe.objects
            labels = torch.randint(
                1, classes + 1, (int(torch.randint(low, high + 1, (), generator=draws)),), generator=draws
            )
            yield recipe.scene([draw(split, int(y), draws) for y in labels], labels.tolist(), draws)

    def shots(k: int, seed: int) -> list[Scene]:
        draws = epoch_generator(seed, k, "shots of digits")
        labels = [label for label in range(1, 11) for _ in range(k)]
        return [recipe.scene([draw("train", label, draws)], [label], draws) for label in labels]

    def scenes(split: str, count: int) -> list[Scene]:
        return list(
            make("test" if split == "test" else "train", count, 10, epoch_generator(0, 0, f"digit scenes, {split}"))
        )

    def train_batches(seed: int, epoch: int) -> Iterator[DetectionBatch]:
        count = min(train_size, train_batch_count(train_size, batch_size) * batch_size)
        return _batches(make("train", count, base, epoch_generator(seed, epoch, "digit scenes")), batch_size)

    def val_batches() -> Iterator[DetectionBatch]:
        return _batches(make("test", val_size, base, epoch_generator(0, 0, "base scenes of digits")), batch_size)

    return DetectionData(
        name="digit-scenes",
        classes=[str(d) for d in recipe.digits],
        base=base,
        shots=shots,
        scenes=scenes,
        checksums=dataset("digits").checksums,
        batch_size=batch_size,
        sizes=(train_size, val_size),
        options=dataclasses.asdict(recipe),
        train_batches=train_batches,
        val_batches=val_batches,
    )


# ---------------------------------------------------------------- pictures with Pascal VOC's xml files


@dataclass(frozen=True)
class _Pictures:
    """Where the lists of a set lie, as (folder, list), and its classes, the new ones last."""

    train: tuple[tuple[str, str], ...]
    val: tuple[str, str]
    test: tuple[str, str]
    classes: tuple[str, ...]
    base: int


_PICTURES = {
    "bccd": _Pictures(
        (("BCCD", "train"),), ("BCCD", "val"), ("BCCD", "test"), classes=("RBC", "WBC", "Platelets"), base=2
    ),
    # The first of the three splits that few-shot detection uses. VOC 2012's validation pictures are held out.
    "voc": _Pictures(
        (("VOCdevkit/VOC2007", "trainval"), ("VOCdevkit/VOC2012", "train")),
        ("VOCdevkit/VOC2012", "val"),
        ("VOCdevkit/VOC2007", "test"),
        classes=(
            "aeroplane", "bicycle", "boat", "bottle", "car", "cat", "chair", "diningtable", "dog", "horse", "person",
            "pottedplant", "sheep", "train", "tvmonitor", "bird", "bus", "cow", "motorbike", "sofa",
        ),
        base=15,
    ),
}  # fmt: skip


@dataclass(frozen=True)
class _Picture:
    file: Path
    boxes: tuple[tuple[float, float, float, float], ...]
    labels: tuple[int, ...]

    def scene(self, size: int, labels: Sequence[int] | None = None, mirror: bool = False) -> Scene:
        """Decode it with its shorter side at `size` pixels."""
        try:
            with Image.open(self.file) as picture:
                width, height = picture.size
                factor = size / min(width, height)
                shape = (round(width * factor), round(height * factor))
                image = pil_to_tensor(picture.convert("RGB").resize(shape, Image.Resampling.BILINEAR)).float() / 255
        except OSError as error:
            raise CorruptData(f"{self.file}: cannot be read as a picture: {error}") from error
        boxes = torch.tensor(self.boxes).reshape(-1, 4) * factor
        if mirror:
            image = image.flip(2)
            boxes = torch.stack([shape[0] - boxes[:, 2], boxes[:, 1], shape[0] - boxes[:, 0], boxes[:, 3]], dim=1)
        return image, {"boxes": boxes, "labels": torch.tensor(self.labels if labels is None else labels)}


def labelled_pictures(
    name: Literal["bccd", "voc"],
    *,
    size: int,
    batch_size: int = 8,
    train_size: int | None = None,
    val_size: int | None = None,
    stand_in: bool = False,
) -> DetectionData:
    """Pictures with Pascal VOC's xml files, from the data folder; the data card says how they lie there.

    Base pictures are those without any object of a new class. In training batches, every second picture is mirrored, at
    random. Objects without area and those marked as difficult are left out.

    Args:
        name: `bccd`: blood cells, of which platelets are new. `voc`: Pascal VOC 2007 and 2012, bird, bus, cow,
            motorbike and sofa being new.
        size: Shorter side in pixels.
        batch_size: Pictures in a batch, at least 1.
        train_size: Pictures in an epoch; the base pictures come again where it is more than they are. None: each once.
        val_size: Base pictures that are validated on, the first of the list; None for all.
        stand_in: Random pictures with the set's classes, without reading any file: to try out a run.

    Raises:
        MissingData: If the pictures are not here; says how they must lie.
        CorruptData: If they are not those of the registry, or lists and xml files do not fit.
        ValueError: If a number is out of range or there is no such set.
    """
    if name not in _PICTURES:
        raise ValueError(f"name={name!r}: expected one of {', '.join(_PICTURES)}")
    if size < 16 or batch_size < 1 or min(train_size or 1, val_size or 1) < 1:
        raise ValueError(
            f"{size=}, {batch_size=}, {train_size=}, {val_size=}: expected 16 pixels, and at least 1 of each"
        )
    one = _PICTURES[name]
    if stand_in:
        return _stand_in(name, one, size, batch_size)
    home = located(name)
    lists: dict[str, list[_Picture]] = {
        split: [picture for folder, part in parts for picture in _listed(home / folder, part, one.classes)]
        for split, parts in (("train", one.train), ("val", (one.val,)), ("test", (one.test,)))
    }
    base, base_val = ([p for p in lists[split] if p.labels and max(p.labels) <= one.base] for split in ("train", "val"))
    if not base or not base_val:
        raise CorruptData(f"{dataset(name).title} has no pictures of base classes alone")
    count = len(base) if train_size is None else train_size
    base_val = base_val[:val_size]

    def train_batches(seed: int, epoch: int) -> Iterator[DetectionBatch]:
        draws = epoch_generator(seed, epoch, "pictures")
        order = torch.cat([torch.randperm(len(base), generator=draws) for _ in range(-(-count // len(base)))])
        kept = order[: min(count, train_batch_count(count, batch_size) * batch_size)].tolist()
        mirrored = torch.randint(2, (len(kept),), generator=draws).tolist()
        made = (base[place].scene(size, mirror=bool(turn)) for place, turn in zip(kept, mirrored, strict=True))
        return _batches(made, batch_size)

    def scenes(split: str, wanted: int) -> list[Scene]:
        if wanted > len(lists[split]):
            raise ValueError(f"count={wanted}: the split {split} has {len(lists[split])} pictures")
        return [picture.scene(size) for picture in lists[split][: wanted or None]]

    return DetectionData(
        name=name,
        classes=one.classes,
        base=one.base,
        shots=partial(_draw_shots, lists["train"], one.classes, size),
        scenes=scenes,
        checksums=dataset(name).checksums or {f"{name}, pictures and boxes": _digest(lists, home)},
        batch_size=batch_size,
        sizes=(count, len(base_val)),
        options={"size": size},
        train_batches=train_batches,
        val_batches=lambda: _batches((picture.scene(size) for picture in base_val), batch_size),
    )


def located(name: str) -> Path:
    """The folder that holds a set's folders; their files are checked where every copy of the set is the same.

    Args:
        name: A manual set of the registry.

    Raises:
        MissingData: If a folder is missing; says how they must lie.
        CorruptData: If the files of a folder are not those that the registry knows; names every such folder.
        ValueError: If there is no such set.
    """
    one = dataset(name)
    try:
        home = locate(name)
    except MissingData:
        lie = "".join(f"\n  {folders()[0] / path}" for path in one.folders)
        raise MissingData(
            f"{one.title} is not complete. It cannot be downloaded by this project. Get it from {one.home} and lay it "
            f"down as{lie}\n{one.card} says which files are in them."
        ) from None
    wrong = [
        f"{home / path}: SHA-256 over its files {digest}, expected {known}"
        for path, known in one.trees.items()
        if (digest := tree_sha256(home / path)) != known
    ]
    if wrong:
        advice = f"{one.title} is not what the registry knows; lay it down anew from {one.home}"
        raise CorruptData("\n".join([advice, *wrong]))
    return home


def tree_sha256(folder: Path) -> str:
    """SHA-256 over the names and contents of all files right in a folder, hidden ones left out.

    It is that of the lines ``<SHA-256 of the file>  <name>``, sorted by name, each with a line end: what
    ``sha256sum * | sha256sum`` prints in the folder under ``LC_ALL=C``.
    """
    files = sorted(path for path in folder.iterdir() if path.is_file() and not path.name.startswith("."))
    return hashlib.sha256("".join(f"{sha256_of(path)}  {path.name}\n" for path in files).encode()).hexdigest()


def _draw_shots(pictures: Sequence[_Picture], classes: Sequence[str], size: int, k: int, seed: int) -> list[Scene]:
    """K objects of each class, each from another picture of that class."""
    draws = epoch_generator(seed, k, "shots of pictures")
    order = torch.randperm(len(pictures), generator=draws).tolist()
    found = []
    for label, name in enumerate(classes, start=1):
        holding = [pictures[place] for place in order if label in pictures[place].labels][:k]
        if len(holding) < k:
            raise ValueError(f"k={k}: only {len(holding)} pictures hold a {name}")
        for picture in holding:
            own = [place for place, y in enumerate(picture.labels) if y == label]
            chosen = own[int(torch.randint(len(own), (), generator=draws))]
            labels = [label if place == chosen else IGNORED for place in range(len(picture.labels))]
            found.append(picture.scene(size, labels))
    return found


def _listed(folder: Path, split: str, classes: Sequence[str]) -> list[_Picture]:
    """The pictures of a list, with their boxes."""
    try:
        names = (folder / "ImageSets" / "Main" / f"{split}.txt").read_text(encoding="utf-8").split()
    except OSError as error:
        raise MissingData(f"{error}\nThe set's data card says which files are needed.") from error
    return [_read(folder, name, classes) for name in names]


def _read(home: Path, name: str, classes: Sequence[str]) -> _Picture:
    picture, notes = home / "JPEGImages" / f"{name}.jpg", home / "Annotations" / f"{name}.xml"
    if not picture.is_file():
        raise CorruptData(f"the lists name {name}, but there is no {picture}")
    boxes, labels = [], []
    try:
        for thing in ET.parse(notes).getroot().iter("object"):
            edges = (float(thing.findtext(f"bndbox/{key}", "")) for key in ("xmin", "ymin", "xmax", "ymax"))
            left, top, right, bottom = edges
            if thing.findtext("difficult", "0") != "1" and left < right and top < bottom:
                boxes.append((left, top, right, bottom))
                labels.append(1 + classes.index(thing.findtext("name", "")))
    except (OSError, ET.ParseError, ValueError) as error:
        raise CorruptData(f"{notes}: expected objects of {', '.join(classes)}, with a box each: {error}") from error
    return _Picture(picture, tuple(boxes), tuple(labels))


def _digest(lists: Mapping[str, Sequence[_Picture]], home: Path) -> str:
    rows = {s: [[p.file.relative_to(home).as_posix(), p.boxes, p.labels] for p in group] for s, group in lists.items()}
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()


def _stand_in(name: str, one: _Pictures, size: int, batch_size: int) -> DetectionData:
    shape = (3, size, size * 4 // 3)

    def make(labels: Sequence[int], draws: torch.Generator) -> Scene:
        corner = torch.rand(len(labels), 2, generator=draws) * size / 2
        boxes = torch.cat([corner, corner + size / 4], dim=1)
        return torch.rand(shape, generator=draws), {"boxes": boxes, "labels": torch.tensor(labels)}

    def several(count: int, classes: int) -> Iterator[Scene]:
        draws = epoch_generator(0, 0, "stand-in")
        return (make([1 + i % classes, 1 + (i + 1) % classes], draws) for i in range(count))

    return DetectionData(
        name=name,
        classes=one.classes,
        base=one.base,
        shots=lambda k, seed: [
            make([y], epoch_generator(seed, y, "shots")) for y in range(1, 1 + len(one.classes)) for _ in range(k)
        ],
        scenes=lambda split, count: list(several(count or 4, len(one.classes))),
        checksums={},
        batch_size=batch_size,
        sizes=(2 * batch_size, 2 * batch_size),
        options={"size": size, "stand_in": True},
        train_batches=lambda seed, epoch: _batches(several(2 * batch_size, one.base), batch_size),
        val_batches=lambda: _batches(several(2 * batch_size, one.base), batch_size),
    )
