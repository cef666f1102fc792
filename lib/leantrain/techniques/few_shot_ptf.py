r"""Efficient few-shot object detection: knowledge inheritance with adaptive length re-scaling.

Ze Yang, Chi Zhang, Ruibo Li, Yi Xu, Guosheng Lin: Efficient Few-Shot Object Detection via Knowledge Inheritance (IEEE
Transactions on Image Processing 32, 2023; arXiv 2203.12224).

A two-stage detector scores a region's features $z \in \mathbb R^d$ for class c by $w_c^\top z + b_c$. To teach it new
classes from K labelled objects each, the pretrain-transfer framework (PTF) appends a row for every new class and
fine-tunes. Knowledge inheritance starts such a row from the mean feature of the class's few objects, brought to the
right length:

.. math::
    w_c = \bar w_c \cdot \frac{\frac1{|C_b|} \sum_{b \in C_b} \lVert w_b \rVert}
                              {\frac1{|C_b|} \sum_{b \in C_b} \lVert \bar w_b \rVert}

The factor is that of the base classes, whose trained rows $w_b$ and mean features $\bar w_b$ are both known (adaptive
length re-scaling). Rows of base classes and background are copied, biases of new classes are 0.

`inherited_rows` and `start_predictor` are the technique. What follows is a detector to use it in (torchvision's Faster
R-CNN), base training, and fine-tuning. Backbone, region proposals and box head stay frozen in fine-tuning, so the
features of all regions are computed once (`encode`), and steps and evaluations of the predictor alone are exact and
cheap.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics.detection import MeanAveragePrecision
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.models.detection.faster_rcnn import TwoMLPHead
from torchvision.models.detection.roi_heads import RoIHeads, fastrcnn_loss
from torchvision.ops import MultiScaleRoIAlign

from leantrain.training.diverged import Diverged
from leantrain.training.scheduled import ScheduledModule

__all__ = [
    "BaseTraining",
    "BoxPredictor",
    "CosineLinear",
    "Episode",
    "Regions",
    "Start",
    "average_precision",
    "class_means",
    "detect",
    "encode",
    "fine_tune",
    "frozen_detector",
    "inherited_rows",
    "length_factor",
    "objects_of",
    "small_detector",
    "standard_detector",
    "start_predictor",
    "steps_to_reach",
    "transfer_loss",
    "views_of",
]

#: What the rows of new classes start from; `cosine` and `imprinted` have a cosine classifier.
Start = Literal["random", "unit length", "inherited", "raw mean", "cosine", "imprinted"]
Scene = tuple[Tensor, Mapping[str, Tensor]]

# ---------------------------------------------------------------- the technique


def class_means(features: Tensor, labels: Tensor, classes: int) -> Tensor:
    """Mean feature of each class, over all views of its objects.

    Args:
        features: ``(N, d)``.
        labels: 1 to `classes`, int64 ``(N,)``.
        classes: Number C of classes.

    Returns:
        ``(C, d)``; row c - 1 belongs to class c.

    Raises:
        ValueError: If a class has no object, or features and labels do not fit.
    """
    if features.ndim != 2 or labels.shape != features.shape[:1]:
        raise ValueError(f"features {tuple(features.shape)}, labels {tuple(labels.shape)}: expected (N, d) and (N,)")
    counts = torch.bincount(labels, minlength=classes + 1) if len(labels) else torch.zeros(classes + 1)
    if len(counts) > classes + 1 or counts[0] or (counts[1:] == 0).any():
        raise ValueError(
            f"objects of the classes 0 to {len(counts) - 1}: {counts.tolist()}; expected at least one shot of each "
            f"class from 1 to {classes}, and no others"
        )
    sums = torch.zeros(classes, features.shape[1], dtype=features.dtype, device=features.device)
    return sums.index_add_(0, labels - 1, features) / counts[1:, None].to(features)


def length_factor(base_rows: Tensor, base_means: Tensor) -> Tensor:
    """Adaptive length re-scaling: mean length of the base rows over mean length of the base classes' mean features.

    Args:
        base_rows: Trained rows of the classifier, without background, ``(B, d)``.
        base_means: Mean features of the same classes in the few-shot set, ``(B, d)``.

    Returns:
        A scalar.

    Raises:
        ValueError: If there is no base class, the shapes differ, or all means are zero.
    """
    if base_rows.shape != base_means.shape or base_rows.ndim != 2 or not len(base_rows):
        raise ValueError(
            f"base rows {tuple(base_rows.shape)}, base means {tuple(base_means.shape)}: "
            "expected (B, d) twice, B at least 1"
        )
    length = base_means.norm(dim=1).mean()
    if not length > 0:
        raise ValueError("the base classes' mean features are zero: their length tells nothing about the right one")
    return base_rows.norm(dim=1).mean() / length


def inherited_rows(base_rows: Tensor, base_means: Tensor, novel_means: Tensor) -> Tensor:
    """Rows for new classes: their mean features, all times one factor, so that their relative lengths stay.

    Args:
        base_rows: ``(B, d)``, see `length_factor`.
        base_means: ``(B, d)``.
        novel_means: Mean features of the new classes, ``(N, d)``.

    Returns:
        ``(N, d)``.
    """
    return novel_means * length_factor(base_rows, base_means)


class CosineLinear(nn.Linear):
    """A classifier by angle: ``tau`` times the cosine between features and row, without a bias.

    Args:
        dim: d.
        classes: Rows.
        tau: Scale, above 0.
    """

    def __init__(self, dim: int, classes: int, tau: float = 20.0) -> None:
        super().__init__(dim, classes, bias=False)
        self.tau = tau

    def forward(self, z: Tensor) -> Tensor:
        """``(N, d)`` to ``(N, classes)``, from ``-tau`` to ``tau``."""
        return self.tau * F.linear(F.normalize(z, dim=1), F.normalize(self.weight, dim=1))


class BoxPredictor(nn.Module):
    """The last layer of a Faster R-CNN: scores of background and C classes, and one box for all classes.

    torchvision expects a box for each class; it gets the same one for each, which makes the regression class-agnostic.

    Args:
        dim: d, features of a region.
        classes: C, without background.
        cosine: Whether the classifier is a `CosineLinear`.
    """

    def __init__(self, dim: int, classes: int, *, cosine: bool = False) -> None:
        super().__init__()
        if dim < 1 or classes < 1:
            raise ValueError(f"dim={dim}, classes={classes}: expected at least 1 of each")
        self.cls_score = CosineLinear(dim, classes + 1) if cosine else nn.Linear(dim, classes + 1)
        self.bbox_pred = nn.Linear(dim, 4)

    @property
    def classes(self) -> int:
        """C, without background, which is row 0."""
        return self.cls_score.out_features - 1

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Features ``(N, d)`` to scores ``(N, 1 + C)`` and box deltas ``(N, 4 (1 + C))``."""
        return self.cls_score(z), self.bbox_pred(z).repeat(1, self.classes + 1)


@torch.no_grad()
def start_predictor(start: Start, base: BoxPredictor, means: Tensor, *, seed: int = 0) -> BoxPredictor:
    """A predictor for base and new classes, before fine-tuning.

    Background row, base rows, their biases and the regressor are copied. For the new rows:

    - `random`: drawn from a normal distribution with deviation 0.01, the PTF baseline;
    - `inherited`: mean features, re-scaled by `length_factor`; `unit length`: brought to length 1; `raw mean`: as they
      are;
    - `cosine`: random, under a cosine classifier, as in TFA; `imprinted`: the mean direction of the features, under
      one.

    Args:
        start: Which.
        base: The trained predictor of B base classes.
        means: Mean features of all C classes, the base classes first, ``(C, d)``, from `class_means`. For `imprinted`,
            means of features that were brought to length 1.
        seed: Of the random rows.

    Raises:
        ValueError: If there is no such start, there are fewer classes than base classes, or the features do not fit.
    """
    if start not in get_args(Start):
        raise ValueError(f"start={start!r}: expected one of {', '.join(get_args(Start))}")
    dim, count = base.cls_score.in_features, base.classes
    if means.ndim != 2 or means.shape[1] != dim or len(means) < count:
        raise ValueError(f"means {tuple(means.shape)}: expected at least {count} rows of {dim} features")
    rows = base.cls_score.weight.detach()
    base_means, novel = means[:count], means[count:]
    if start in ("random", "cosine"):
        draws = torch.Generator().manual_seed(seed)
        novel = 0.01 * torch.randn(novel.shape, generator=draws).to(rows)
    elif start == "inherited":
        novel = inherited_rows(rows[1:], base_means, novel)
    elif start in ("unit length", "imprinted"):
        novel = F.normalize(novel, dim=1)
    made = BoxPredictor(dim, len(means), cosine=start in ("cosine", "imprinted")).to(rows)
    made.bbox_pred.load_state_dict(base.bbox_pred.state_dict())
    made.cls_score.weight.copy_(torch.cat([rows, novel]))
    if made.cls_score.bias is not None:
        made.cls_score.bias.zero_()[: count + 1] = base.cls_score.bias
    return made


# ---------------------------------------------------------------- detectors


def small_detector(
    classes: int,
    *,
    side: int,
    widths: Sequence[int] = (24, 48, 96, 96),
    dim: int = 256,
    anchors: Sequence[int] = (16, 24, 32, 48),
    proposals: int = 100,
    score_threshold: float = 0.01,
) -> FasterRCNN:
    """Torchvision's Faster R-CNN on a small backbone with one level of stride 8, for small images.

    Args:
        classes: C, without background.
        side: Shorter side of the images in pixels; they are not resized.
        widths: Channels of the four stages, two 3x3 convolutions each; the first three halve the map.
        dim: d.
        anchors: Sides of the anchors in pixels.
        proposals: Regions of an image that are classified.
        score_threshold: Detections below it are dropped.

    Raises:
        ValueError: If a number is out of range.
    """
    if len(widths) != 4 or min(classes, side, dim, proposals, *widths, *anchors) < 1:
        raise ValueError(f"{classes=}, {side=}, {widths=}, {dim=}, {anchors=}, {proposals=}: expected positive numbers")
    layers: list[nn.Module] = []
    before = 3
    for stage, width in enumerate(widths):
        for place in range(2):
            stride = 2 if stage < 3 and place == 0 else 1
            layers += [nn.Conv2d(before, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
            before = width
    backbone: Any = nn.Sequential(*layers)
    backbone.out_channels = before
    return FasterRCNN(
        backbone,
        min_size=side,
        max_size=10 * side,
        rpn_anchor_generator=AnchorGenerator((tuple(anchors),), ((0.5, 1.0, 2.0),)),
        rpn_pre_nms_top_n_train=4 * proposals,
        rpn_pre_nms_top_n_test=4 * proposals,
        rpn_post_nms_top_n_train=proposals,
        rpn_post_nms_top_n_test=proposals,
        rpn_batch_size_per_image=64,
        box_roi_pool=MultiScaleRoIAlign(["0"], 5, 2),
        box_head=TwoMLPHead(before * 25, dim),
        box_predictor=BoxPredictor(dim, classes),
        box_batch_size_per_image=64,
        box_score_thresh=score_threshold,
    )


def standard_detector(
    classes: int,
    *,
    side: int = 800,
    network: Literal["resnet50", "resnet101"] = "resnet101",
    score_threshold: float = 0.01,
) -> FasterRCNN:
    """Faster R-CNN on a ResNet with a feature pyramid, as in the paper, from random weights.

    Args:
        classes: C, without background.
        side: Shorter side of the images in pixels.
        network: The backbone.
        score_threshold: Detections below it are dropped.
    """
    backbone = resnet_fpn_backbone(backbone_name=network, weights=None, trainable_layers=5)
    return FasterRCNN(
        backbone,
        min_size=side,
        max_size=5 * side // 3,
        box_predictor=BoxPredictor(1024, classes),
        box_score_thresh=score_threshold,
    )


class BaseTraining(ScheduledModule):
    """Train a detector on base classes with torchvision's four losses.

    Logs ``train_loss``, and once an epoch ``val_ap``, the mean over classes of the average precision on the validation
    images, in per cent.

    Args:
        model: The detector.
        optimizer: Builds the optimiser from parameter groups.
        warmup_fraction: Share of the steps that warm up.
        clip: Largest norm of the gradient.
    """

    def __init__(
        self, model: FasterRCNN, optimizer: Any, *, warmup_fraction: float = 0.1, clip: float | None = 10.0
    ) -> None:
        super().__init__(model, optimizer, warmup_fraction=warmup_fraction, clip=clip)
        self._found: list[dict[str, Tensor]] = []
        self._truth: list[dict[str, Tensor]] = []

    def training_step(self, batch: tuple[list[Tensor], list[dict[str, Tensor]]], batch_idx: int) -> Tensor:
        """Sum of the losses of proposals and boxes.

        Raises:
            Diverged: If it is infinite or not a number.
        """
        images, targets = batch
        losses = self.model(images, targets)
        return self.checked(torch.stack(list(losses.values())).sum(), len(images))

    def validation_step(self, batch: tuple[list[Tensor], list[dict[str, Tensor]]], batch_idx: int) -> None:
        """Keep detections and truth of a batch."""
        images, targets = batch
        self._found += self.model(images)
        self._truth += targets

    def on_validation_epoch_end(self) -> None:
        """Log the average precision."""
        classes = cast(BoxPredictor, self.model.roi_heads.box_predictor).classes  # type: ignore[union-attr]
        self.log("val_ap", average_precision(self._found, self._truth, classes).mean())
        self._found, self._truth = [], []


# ---------------------------------------------------------------- fine-tuning on frozen features


@dataclass(frozen=True)
class Regions:
    """The regions of one image behind all frozen parts of a detector.

    Attributes:
        z: Features, ``(R, d)``.
        boxes: Proposals in pixels of the resized image, ``(R, 4)``.
        labels: Class of each region for training: 0 background, -1 ignored, int64 ``(R,)``.
        deltas: What the regressor should give, ``(R, 4)``.
        shape: Height and width of the resized image.
        truth: Boxes and labels of the image's objects, resized.
        own: Number of regions, the last ones, that are the objects' own boxes.
    """

    z: Tensor
    boxes: Tensor
    labels: Tensor
    deltas: Tensor
    shape: tuple[int, int]
    truth: dict[str, Tensor]
    own: int


def frozen_detector(model: FasterRCNN) -> FasterRCNN:
    """The detector in evaluation mode, without a parameter that requires a gradient: features can be computed once."""
    model.zero_grad()
    return cast(FasterRCNN, model.eval().requires_grad_(False))


@torch.no_grad()
def encode(model: FasterRCNN, scenes: Iterable[Scene], *, train: bool, batch_size: int = 8) -> list[Regions]:
    """Pass scenes through backbone, proposals, RoI pooling and box head.

    Args:
        model: A detector in evaluation mode.
        scenes: Images ``(3, H, W)`` and targets with `boxes` and `labels`.
        train: Whether the objects' own boxes are added to the proposals, as in torchvision's training.
        batch_size: Scenes that are computed at a time.

    Raises:
        ValueError: If the detector is in training mode, where its norms would change.
    """
    if model.training:
        raise ValueError("the detector is in training mode: call frozen_detector(model) first")
    heads, found = cast(RoIHeads, model.roi_heads), []
    rows = list(scenes)
    device = next(model.parameters()).device
    for start in range(0, len(rows), batch_size):
        part = rows[start : start + batch_size]
        given = [{name: tensor.to(device) for name, tensor in target.items()} for _, target in part]
        images, targets = model.transform([image.to(device) for image, _ in part], given)
        maps = model.backbone(images.tensors)
        maps = {"0": maps} if isinstance(maps, Tensor) else maps
        proposals, _ = model.rpn(images, maps)
        own = [len(t["boxes"]) if train else 0 for t in targets]
        if train:
            proposals = heads.add_gt_proposals(proposals, [t["boxes"] for t in targets])
        matched, labels = heads.assign_targets_to_proposals(
            proposals, [t["boxes"] for t in targets], [t["labels"] for t in targets]
        )
        truths = [t["boxes"][m] if len(t["boxes"]) else p for t, m, p in zip(targets, matched, proposals, strict=True)]
        deltas = heads.box_coder.encode(truths, proposals)
        features = heads.box_head(heads.box_roi_pool(maps, proposals, images.image_sizes)).split(
            [len(p) for p in proposals]
        )
        parts = zip(features, proposals, labels, deltas, images.image_sizes, targets, own, strict=True)
        found += [Regions(*one) for one in parts]
    return found


def objects_of(regions: Iterable[Regions]) -> tuple[Tensor, Tensor]:
    """Features and labels of the objects' own boxes, those with the label -1 left out.

    Args:
        regions: From `encode` with ``train=True``.

    Returns:
        ``(N, d)`` and ``(N,)``.
    """
    pairs = [(one.z[len(one.z) - one.own :], one.truth["labels"]) for one in regions]
    z, labels = (torch.cat(parts) for parts in zip(*pairs, strict=True))
    return z[labels > 0], labels[labels > 0]


def fine_tune(
    heads: RoIHeads,
    predictor: BoxPredictor,
    regions: Sequence[Regions],
    *,
    at: Sequence[int],
    rate: float,
    batch_size: int = 16,
    momentum: float = 0.9,
    seed: int = 0,
) -> Iterator[tuple[int, BoxPredictor]]:
    """Train a predictor on stored regions: torchvision's loss of classes and boxes, gradient descent with momentum.

    A step takes images at random and samples regions in each as `heads` does. All depends on the seed alone, so that
    two predictors see the same regions.

    Args:
        heads: Samples regions.
        predictor: Trained in place.
        regions: From `encode` with ``train=True``.
        at: Numbers of steps, rising, after which to look at the predictor.
        rate: Learning rate.
        batch_size: Images in a step, each drawn afresh.
        momentum: Of gradient descent.
        seed: Fixes all draws.

    Yields:
        The steps taken and the predictor, for each of `at`.

    Raises:
        Diverged: If the loss is infinite or not a number.
        ValueError: If a number is out of range.
    """
    if list(at) != sorted(set(at)) or not at or at[0] < 0 or not regions or not (rate > 0 and 0 <= momentum < 1):
        raise ValueError(
            f"{at=}, {rate=}, {momentum=}, {len(regions)} images: expected rising steps and positive numbers"
        )
    optimizer = torch.optim.SGD(predictor.parameters(), lr=rate, momentum=momentum)
    draws = torch.Generator().manual_seed(seed)
    for step in range(at[-1] + 1):
        if step in at:
            yield step, predictor
        if step == at[-1]:
            return
        chosen = [regions[i] for i in torch.randint(len(regions), (batch_size,), generator=draws).tolist()]
        loss = transfer_loss(heads, predictor, chosen, seed=int(torch.randint(2**31, (), generator=draws)))
        if not torch.isfinite(loss):
            raise Diverged(step, loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def transfer_loss(heads: RoIHeads, predictor: nn.Module, regions: Sequence[Regions], *, seed: int) -> Tensor:
    """Loss of classes and boxes on a sample of the regions of some images; both as torchvision has them."""
    with torch.random.fork_rng(devices=[]):  # torchvision's sampler draws from the global generator
        torch.manual_seed(seed)
        sampled = heads.subsample([one.labels for one in regions])
    z = torch.cat([one.z[rows] for one, rows in zip(regions, sampled, strict=True)])
    labels = [one.labels[rows] for one, rows in zip(regions, sampled, strict=True)]
    deltas = [one.deltas[rows] for one, rows in zip(regions, sampled, strict=True)]
    classes, boxes = fastrcnn_loss(*predictor(z), labels, deltas)
    return classes + boxes


@torch.no_grad()
def detect(heads: RoIHeads, predictor: nn.Module, regions: Sequence[Regions]) -> list[dict[str, Tensor]]:
    """Detections of stored images: boxes, labels and scores, as the whole detector gives them, in resized pixels.

    Args:
        heads: Those of the detector.
        predictor: Any predictor for its features.
        regions: From `encode` with ``train=False``.
    """
    scores, deltas = predictor(torch.cat([one.z for one in regions]))
    found = heads.postprocess_detections(scores, deltas, [one.boxes for one in regions], [one.shape for one in regions])
    return [{"boxes": b, "scores": s, "labels": y} for b, s, y in zip(*found, strict=True)]


def average_precision(
    found: Sequence[Mapping[str, Tensor]], truth: Sequence[Mapping[str, Tensor]], classes: int
) -> Tensor:
    """COCO's average precision of each class, over overlaps from 0.5 to 0.95, in per cent.

    Args:
        found: For each image `boxes`, `scores`, `labels`.
        truth: For each image `boxes`, `labels`.
        classes: C; labels are 1 to C.

    Returns:
        ``(C,)``; a class without an object or a detection has 0.
    """
    metric = MeanAveragePrecision(class_metrics=True)
    metric.warn_on_many_detections = False
    metric.update([dict(one) for one in found], [{k: one[k] for k in ("boxes", "labels")} for one in truth])
    result = metric.compute()
    values = torch.zeros(classes)
    of_class = result["map_per_class"].reshape(-1).clamp(min=0).float().cpu()  # -1 where a class has no object
    values[result["classes"].reshape(-1).long().cpu() - 1] = 100 * of_class
    return values


def views_of(scenes: Iterable[Scene], count: int, *, seed: int = 0) -> list[Scene]:
    """Each scene as it is, and at other brightness, by a factor of 0.7 to 1.3.

    Args:
        scenes: Images from 0 to 1, with targets.
        count: Views of each, at least 1; the first is the scene itself.
        seed: Of the factors.
    """
    if count < 1:
        raise ValueError(f"count={count}: expected at least one view of a scene")
    draws = torch.Generator().manual_seed(seed)
    rows = list(scenes)
    others = [
        ((image * (0.7 + 0.6 * torch.rand((), generator=draws))).clamp(0, 1), target)
        for image, target in rows
        for _ in range(count - 1)
    ]
    return rows + others


@dataclass(frozen=True)
class Episode:
    """A few-shot task: a frozen detector of base classes, and what it computes of the few shots.

    Attributes:
        heads: The detector's.
        base: Its trained predictor.
        regions: Those of all views of the shots.
        classes: C, base and new.
    """

    heads: RoIHeads
    base: BoxPredictor
    regions: list[Regions]
    classes: int

    @classmethod
    def of(cls, model: FasterRCNN, shots: Iterable[Scene], classes: int, *, views: int = 1, seed: int = 0) -> Episode:
        """Encode the shots.

        Args:
            model: From `frozen_detector`, trained on the base classes.
            shots: Scenes with K labelled objects of each class, base and new.
            classes: C.
            views: See `views_of`.
            seed: Of the views.
        """
        heads = cast(RoIHeads, model.roi_heads)
        regions = encode(model, views_of(shots, views, seed=seed), train=True)
        return cls(heads, cast(BoxPredictor, heads.box_predictor), regions, classes)

    def means(self, *, unit: bool = False) -> Tensor:
        """Mean features of all classes, ``(C, d)``; of features of length 1 if `unit`."""
        z, labels = objects_of(self.regions)
        return class_means(F.normalize(z, dim=1) if unit else z, labels, self.classes)

    def start(self, start: Start, *, seed: int = 0) -> BoxPredictor:
        """The predictor before fine-tuning, see `start_predictor`."""
        return start_predictor(start, self.base, self.means(unit=start == "imprinted"), seed=seed)

    def precision(self, predictor: nn.Module, scored: Sequence[Regions]) -> dict[str, float]:
        """Mean average precision on stored images, `base` and `novel` classes apart, in per cent."""
        values = average_precision(detect(self.heads, predictor, scored), [one.truth for one in scored], self.classes)
        count = self.base.classes
        return {"base": values[:count].mean().item(), "novel": values[count:].mean().item()}

    def run(
        self,
        start: Start,
        scored: Sequence[Regions],
        *,
        at: Sequence[int],
        rate: float,
        batch_size: int = 16,
        seed: int = 0,
    ) -> list[dict[str, Any]]:
        """Fine-tune from a start and measure on the way.

        Args:
            start: See `start_predictor`.
            scored: Images to measure on, from `encode` with ``train=False``.
            at: Numbers of steps, rising, after which to measure.
            rate: Learning rate.
            batch_size: Views in a step.
            seed: Fixes the random rows and the order of the views.

        Returns:
            A row for each of `at`: step, base, novel, diverged. After a run has diverged, its precision counts as 0.
        """
        rows: list[dict[str, Any]] = []
        tuning = fine_tune(
            self.heads, self.start(start, seed=seed), self.regions, at=at, rate=rate, batch_size=batch_size, seed=seed
        )
        try:
            for step, predictor in tuning:
                rows.append({"step": step, **self.precision(predictor, scored), "diverged": False})
        except Diverged:
            rows += [{"step": step, "base": 0.0, "novel": 0.0, "diverged": True} for step in at[len(rows) :]]
        return rows


def steps_to_reach(steps: Sequence[int], values: Sequence[float], level: float) -> float:
    """Steps after which a curve first reaches a level, at least 1; infinite if it never does.

    A curve that is there before the first step counts one step, so that ratios of steps stay finite.
    """
    if len(steps) != len(values) or not steps:
        raise ValueError(f"{len(steps)} steps and {len(values)} values: expected as many of each, at least one")
    return next((max(1.0, step) for step, value in zip(steps, values, strict=True) if value >= level), math.inf)
