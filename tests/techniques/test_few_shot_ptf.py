"""Inherited rows, their lengths and what they leave alone; stored features against the whole detector."""

from __future__ import annotations

import math
from functools import partial

import lightning as L
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from leantrain.data import DigitScenes, digit_scenes
from leantrain.measure import count_parameters
from leantrain.techniques import few_shot_ptf as ptf
from leantrain.techniques.few_shot_ptf import (
    BaseTraining,
    BoxPredictor,
    CosineLinear,
    Episode,
    average_precision,
    class_means,
    detect,
    encode,
    fine_tune,
    frozen_detector,
    inherited_rows,
    length_factor,
    small_detector,
    standard_detector,
    start_predictor,
    steps_to_reach,
    transfer_loss,
    views_of,
)
from leantrain.training import Diverged

STARTS = ["random", "unit length", "inherited", "raw mean", "cosine", "imprinted"]
BASE, CLASSES, DIM = 4, 6, 16


@pytest.fixture(scope="module")
def data():
    return digit_scenes(DigitScenes(side=64, sizes=(16, 28), novel=(8, 9)), batch_size=4, train_size=8, val_size=4)


@pytest.fixture(scope="module")
def detector(data):
    """A detector that has seen a few batches, so that its norms and boxes are not those of the start."""
    torch.manual_seed(0)
    model = small_detector(
        8, side=64, widths=(8, 8, 16, 16), dim=32, anchors=(16, 28), proposals=20, score_threshold=0.0
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for images, targets in [*data.train_dataloader()] * 2:
        optimizer.zero_grad()
        sum(model(images, targets).values()).backward()
        optimizer.step()
    return frozen_detector(model)


@pytest.fixture(scope="module")
def episode(detector, data):
    return Episode.of(detector, data.shots(2, 0), 10, views=2)


def means_of(seed: int, rows: int = CLASSES) -> torch.Tensor:
    return torch.rand(rows, DIM, generator=torch.Generator().manual_seed(seed)) + 0.1


def base_of(seed: int) -> BoxPredictor:
    torch.manual_seed(seed)
    return BoxPredictor(DIM, BASE)


# ---------------------------------------------------------------- lengths


@given(st.integers(0, 10**6), st.floats(0.01, 100.0))
@settings(max_examples=30, deadline=None)
def test_where_means_are_rows_times_a_number_the_rule_gives_the_rows_back(seed, factor):
    draws = torch.Generator().manual_seed(seed)
    rows = torch.randn(5, DIM, generator=draws, dtype=torch.float64)
    v = torch.randn(3, DIM, generator=draws, dtype=torch.float64)
    assert torch.allclose(inherited_rows(rows, factor * rows, factor * rows), rows, rtol=1e-12)
    assert torch.allclose(inherited_rows(rows, factor * rows, factor * v), v, rtol=1e-12)


@given(st.integers(0, 10**6), st.floats(0.01, 100.0))
@settings(max_examples=30, deadline=None)
def test_one_factor_for_all(seed, factor):
    draws = torch.Generator().manual_seed(seed)
    rows, means, novel = (torch.randn(n, DIM, generator=draws, dtype=torch.float64) for n in (5, 5, 3))
    made = inherited_rows(rows, means, novel)
    scaled = means * length_factor(rows, means)
    assert scaled.norm(dim=1).mean() == pytest.approx(rows.norm(dim=1).mean().item(), rel=1e-9)
    assert torch.allclose(F.cosine_similarity(made, novel), torch.ones(3, dtype=torch.float64))
    ratio = made.norm(dim=1) / novel.norm(dim=1)
    assert torch.allclose(ratio, ratio[:1].expand(3))
    assert torch.allclose(inherited_rows(rows, factor * means, factor * novel), made, rtol=1e-10)


def test_means_of_classes():
    z = torch.arange(12.0).reshape(6, 2)
    labels = torch.tensor([2, 1, 2, 3, 1, 2])
    by_hand = torch.stack([z[labels == c].mean(dim=0) for c in (1, 2, 3)])
    assert torch.allclose(class_means(z, labels, 3), by_hand)
    order = torch.tensor([5, 3, 0, 1, 4, 2])
    assert torch.allclose(class_means(z[order], labels[order], 3), by_hand), "the order does not matter"
    assert torch.equal(class_means(z[:1], torch.tensor([1]), 1)[0], z[0]), "one shot, one view"


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda: class_means(torch.ones(2, 3), torch.tensor([1, 3]), 3), "at least one shot of each class"),
        (lambda: class_means(torch.ones(2, 3), torch.tensor([1, 4]), 3), "class from 1 to 3"),
        (lambda: class_means(torch.ones(2, 3), torch.tensor([0, 1]), 1), "and no others"),
        (lambda: class_means(torch.ones(0, 3), torch.ones(0, dtype=torch.long), 2), "at least one shot"),
        (lambda: class_means(torch.ones(2, 3), torch.tensor([1]), 1), r"expected \(N, d\) and \(N,\)"),
        (lambda: length_factor(torch.ones(0, 3), torch.ones(0, 3)), "B at least 1"),
        (lambda: length_factor(torch.ones(2, 3), torch.ones(2, 4)), r"\(2, 4\)"),
        (lambda: length_factor(torch.ones(2, 3), torch.zeros(2, 3)), "are zero"),
        (lambda: start_predictor("warm", base_of(0), means_of(0)), "start='warm'"),
        (lambda: start_predictor("random", base_of(0), means_of(0)[:, 1:]), "6, 15"),
        (lambda: start_predictor("random", base_of(0), means_of(0, BASE - 1)), "at least 4 rows"),
        (lambda: BoxPredictor(0, 3), "dim=0"),
        (lambda: small_detector(0, side=64), "classes=0"),
        (lambda: small_detector(3, side=64, widths=(8, 8)), r"widths=\(8, 8\)"),
        (lambda: views_of([], 0), "count=0"),
        (lambda: steps_to_reach([0, 1], [1.0], 1.0), "2 steps and 1 values"),
    ],
)
def test_bad_input_is_named(call, named):
    with pytest.raises(ValueError, match=named):
        call()


# ---------------------------------------------------------------- starts


@pytest.mark.parametrize("start", STARTS)
def test_all_that_was_trained_is_copied_to_the_bit(start):
    base, means = base_of(1), means_of(1)
    made = start_predictor(start, base, means)
    assert torch.equal(made.cls_score.weight[: BASE + 1], base.cls_score.weight)
    assert torch.equal(made.bbox_pred.weight, base.bbox_pred.weight)
    assert torch.equal(made.bbox_pred.bias, base.bbox_pred.bias)
    assert made.classes == CLASSES
    if start not in ("cosine", "imprinted"):
        assert torch.equal(made.cls_score.bias[: BASE + 1], base.cls_score.bias)
        assert made.cls_score.bias[BASE + 1 :].tolist() == [0.0, 0.0]
    assert all(p.requires_grad and p.grad is None for p in made.parameters())
    made.cls_score.weight.data.zero_()
    assert base.cls_score.weight.abs().sum() > 0, "a copy"


def test_the_new_rows_of_each_start():
    base, means = base_of(2), means_of(2)
    rows = {
        start: start_predictor(start, base, means, seed=3).cls_score.weight[BASE + 1 :].detach() for start in STARTS
    }
    factor = base.cls_score.weight[1:].norm(dim=1).mean() / means[:BASE].norm(dim=1).mean()
    assert torch.allclose(rows["inherited"], means[BASE:] * factor)
    assert torch.equal(rows["raw mean"], means[BASE:])
    assert torch.allclose(rows["unit length"].norm(dim=1), torch.ones(2))
    assert torch.allclose(rows["unit length"], rows["imprinted"])
    assert torch.equal(rows["random"], rows["cosine"])
    assert torch.equal(rows["random"], start_predictor("random", base, means, seed=3).cls_score.weight[BASE + 1 :])
    assert not torch.equal(rows["random"], start_predictor("random", base, means, seed=4).cls_score.weight[BASE + 1 :])
    wide = start_predictor("random", base, means_of(2, 4000)).cls_score.weight[BASE + 1 :]
    assert wide.std().item() == pytest.approx(0.01, rel=0.02)


def test_every_start_has_the_same_parameters_and_one_box_for_all_classes():
    base, means = base_of(0), means_of(0)
    made = {start: start_predictor(start, base, means) for start in STARTS}
    assert {count_parameters(made[s]) for s in STARTS[:4]} == {(CLASSES + 1) * (DIM + 1) + 4 * (DIM + 1)}
    scores, deltas = made["inherited"](torch.rand(3, DIM))
    assert scores.shape == (3, CLASSES + 1)
    assert torch.equal(deltas.reshape(3, CLASSES + 1, 4), deltas[:, None, :4].expand(3, CLASSES + 1, 4))


@given(st.integers(0, 10**6))
@settings(max_examples=20, deadline=None)
def test_new_rows_lower_the_old_probabilities_and_keep_their_order(seed):
    base = base_of(seed % 1000)
    made = start_predictor("inherited", base, means_of(seed))
    z = 5 * means_of(seed + 1, 9)
    before, after = base(z)[0].softmax(dim=1), made(z)[0].softmax(dim=1)[:, : BASE + 1]
    assert (after < before).all()
    assert torch.allclose(after / after.sum(dim=1, keepdim=True), before, atol=1e-5)


def test_the_cosine_classifier_sees_directions_alone():
    torch.manual_seed(0)
    layer, z = CosineLinear(DIM, 5, tau=20.0), torch.randn(7, DIM)
    scores = layer(z)
    assert scores.abs().max() <= 20
    assert torch.allclose(layer(3 * z), scores, atol=1e-5)
    layer.weight.data *= torch.rand(5, 1) + 0.5
    assert torch.allclose(layer(z), scores, atol=1e-5)
    one = torch.randn(1, DIM)
    means = torch.cat([means_of(0)[:BASE], F.normalize(one, dim=1)])
    made = start_predictor("imprinted", base_of(0), means)
    assert made(one)[0][0, -1].item() == pytest.approx(20.0, rel=1e-5)


# ---------------------------------------------------------------- the frozen detector


def test_stored_features_give_the_whole_detectors_output(detector, data):
    scenes = data.scenes("test", 5)
    kept = {name: tensor.clone() for name, tensor in detector.state_dict().items()}
    stored = encode(detector, scenes, train=False, batch_size=2)
    mine = detect(detector.roi_heads, detector.roi_heads.box_predictor, stored)
    assert sum(len(one["boxes"]) for one in mine) > 20
    for (image, _), one in zip(scenes, mine, strict=True):
        (whole,) = detector([image])
        for name in ("boxes", "labels", "scores"):
            assert torch.allclose(one[name].float(), whole[name].detach().float(), atol=2e-4)
    after = detector.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in kept.items()), "norms and weights as they were"
    assert not detector.training
    assert all(p.grad is None and not p.requires_grad for p in detector.parameters())


def test_without_new_classes_the_output_is_the_same_to_the_bit(detector, data):
    stored = encode(detector, data.scenes("test", 3), train=False)
    base = detector.roi_heads.box_predictor
    for start in ("inherited", "random", "unit length"):
        made = start_predictor(start, base, torch.rand(8, 32))
        for one, two in zip(
            detect(detector.roi_heads, base, stored), detect(detector.roi_heads, made, stored), strict=True
        ):
            assert all(torch.equal(one[name], two[name]) for name in one)


def test_the_stored_loss_is_torchvisions_on_the_same_sample(detector, data, episode):
    """torchvision's own training pass of the RoI heads, from the same state of the random numbers."""
    scenes = views_of(data.shots(2, 0), 2)[:4]
    heads = detector.roi_heads
    images, targets = detector.transform([image for image, _ in scenes], [dict(target) for _, target in scenes])
    maps = {"0": detector.backbone(images.tensors)}
    proposals, _ = detector.rpn(images, maps)
    base = heads.box_predictor
    made = episode.start("inherited")
    heads.box_predictor, heads.training = made, True
    try:
        torch.manual_seed(5)
        _, losses = heads(maps, proposals, images.image_sizes, targets)
    finally:
        heads.box_predictor, heads.training = base, False
    mine = transfer_loss(heads, made, episode.regions[:4], seed=5)
    assert mine.item() == pytest.approx((losses["loss_classifier"] + losses["loss_box_reg"]).item(), rel=1e-4)


def test_ignored_objects_are_neither_shots_nor_background(detector, data):
    image, target = data.scenes("test", 30)[
        next(i for i, (_, t) in enumerate(data.scenes("test", 30)) if len(t["labels"]) == 3)
    ]
    labels = target["labels"].clone()
    labels[1:] = -1
    (full,) = encode(detector, [(image, target)], train=True)
    (some,) = encode(detector, [(image, {"boxes": target["boxes"], "labels": labels})], train=True)
    z, found = ptf.objects_of([some])
    assert found.tolist() == labels[:1].tolist()
    assert torch.equal(z[0], full.z[-3])
    assert ((some.labels == -1) == ((full.labels > 0) & (some.labels != full.labels))).all()
    assert (some.labels == -1).sum() >= 2
    rows = torch.cat(detector.roi_heads.subsample([some.labels]))
    assert (some.labels[rows] >= 0).all()


def test_the_means_are_those_of_the_objects_own_boxes(detector, data, episode):
    scenes = views_of(data.shots(2, 0), 2)
    images, targets = detector.transform([i for i, _ in scenes], [dict(t) for _, t in scenes])
    maps = {"0": detector.backbone(images.tensors)}
    heads = detector.roi_heads
    z = heads.box_head(heads.box_roi_pool(maps, [t["boxes"] for t in targets], images.image_sizes))
    labels = torch.cat([t["labels"] for t in targets])
    assert torch.allclose(episode.means(), class_means(z, labels, 10), atol=1e-5)
    unit = episode.means(unit=True)
    assert torch.allclose(unit, class_means(F.normalize(z, dim=1), labels, 10), atol=1e-5)


def test_fine_tuning_moves_the_predictor_alone_and_sees_the_same_for_every_start(detector, episode):
    kept = {name: tensor.clone() for name, tensor in detector.state_dict().items()}
    made = episode.start("inherited")
    first = {name: tensor.clone() for name, tensor in made.state_dict().items()}
    torch.manual_seed(1)
    state = torch.random.get_rng_state()
    seen = [step for step, _ in fine_tune(episode.heads, made, episode.regions, at=[0, 2, 5], rate=0.01, batch_size=3)]
    assert seen == [0, 2, 5]
    assert torch.equal(torch.random.get_rng_state(), state), "the global random numbers stay as they were"
    assert all(not torch.equal(made.state_dict()[name], tensor) for name, tensor in first.items())
    assert all(torch.equal(detector.state_dict()[name], tensor) for name, tensor in kept.items())
    again = episode.start("inherited")
    list(fine_tune(episode.heads, again, episode.regions, at=[5], rate=0.01, batch_size=3))
    assert all(torch.equal(again.state_dict()[name], made.state_dict()[name]) for name in first)


def test_an_episode_measures_at_every_wanted_step_and_a_diverged_run_is_a_miss(episode, detector, data):
    scored = encode(detector, data.scenes("test", 4), train=False)
    rows = episode.run("inherited", scored, at=[0, 2], rate=0.01, batch_size=2)
    assert [row["step"] for row in rows] == [0, 2]
    assert all(0 <= row[part] <= 100 and not row["diverged"] for row in rows for part in ("base", "novel"))
    assert rows[0] | {"step": 0} == {
        "step": 0,
        **episode.precision(episode.start("inherited"), scored),
        "diverged": False,
    }
    broken = episode.run("inherited", scored, at=[0, 40], rate=1e38, batch_size=2)
    assert broken[1] == {"step": 40, "base": 0.0, "novel": 0.0, "diverged": True}
    with pytest.raises(Diverged):
        list(fine_tune(episode.heads, episode.start("random"), episode.regions, at=[40], rate=1e38))


@pytest.mark.parametrize(
    "options", [{"at": []}, {"at": [2, 1]}, {"at": [-1]}, {"rate": 0.0}, {"momentum": 1.0}, {"regions": []}]
)
def test_fine_tuning_refuses_bad_input(episode, options):
    given = {"at": [1], "rate": 0.1, "regions": episode.regions} | options
    with pytest.raises(ValueError, match="expected rising steps"):
        list(fine_tune(episode.heads, episode.start("random"), given.pop("regions"), **given))


def test_encoding_refuses_a_detector_in_training(data):
    model = small_detector(8, side=64, widths=(8, 8, 8, 8), dim=8)
    with pytest.raises(ValueError, match="frozen_detector"):
        encode(model, data.scenes("test", 1), train=False)


# ---------------------------------------------------------------- measures, training, real size


def test_average_precision_by_hand():
    box = torch.tensor([[0.0, 0.0, 10.0, 10.0]])
    truth = [{"boxes": box, "labels": torch.tensor([1])}, {"boxes": box, "labels": torch.tensor([2])}]
    found = [
        {"boxes": box, "scores": torch.tensor([0.9]), "labels": torch.tensor([1])},
        # Overlap 0.82 with the truth: a hit at 0.5 to 0.8, seven of the ten thresholds.
        {"boxes": torch.tensor([[0.0, 0.0, 8.2, 10.0]]), "scores": torch.tensor([0.9]), "labels": torch.tensor([2])},
    ]
    values = average_precision(found, truth, 4)
    assert values.tolist() == pytest.approx([100.0, 70.0, 0.0, 0.0], abs=1e-3)
    nothing = [{"boxes": torch.zeros(0, 4), "scores": torch.zeros(0), "labels": torch.zeros(0, dtype=torch.long)}] * 2
    assert average_precision(nothing, truth, 3).tolist() == [0, 0, 0]


def test_steps_to_reach():
    assert steps_to_reach([0, 5, 20], [1.0, 2.0, 3.0], 2.5) == 20
    assert steps_to_reach([0, 5, 20], [1.0, 2.0, 3.0], 0.5) == 1
    assert math.isinf(steps_to_reach([0, 5], [1.0, 2.0], 3.0))


def test_views_change_brightness_alone(data):
    scenes = data.shots(1, 0)[:3]
    views = views_of(scenes, 3, seed=2)
    assert len(views) == 9
    assert all(a is b for a, b in zip(views[:3], scenes, strict=True))
    for (image, target), (other, same) in zip([s for s in scenes for _ in range(2)], views[3:], strict=True):
        assert same is target
        dark = (image > 0.05) & (image < 0.7)
        ratio = (other / image)[dark]
        assert ratio.min() > 0.69
        assert ratio.max() < 1.31
        assert ratio.std() < 1e-3


@pytest.mark.slow
def test_base_training_learns_and_logs(data):
    torch.manual_seed(0)
    scenes = digit_scenes(DigitScenes(side=64, sizes=(16, 28), objects=(1, 1), novel=(8, 9)), train_size=64, val_size=8)
    model = small_detector(8, side=64, widths=(8, 16, 16, 16), dim=32, anchors=(16, 28), proposals=20)
    module = BaseTraining(model, partial(torch.optim.AdamW, lr=2e-3))
    trainer = L.Trainer(
        max_epochs=4, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, num_sanity_val_steps=0,
    )  # fmt: skip
    losses: list[float] = []
    module.on_train_epoch_end = lambda: losses.append(float(trainer.callback_metrics["train_loss"]))
    trainer.fit(module, datamodule=scenes)
    assert losses[-1] < 0.8 * losses[0]
    assert 0 <= trainer.callback_metrics["val_ap"].item() <= 100
    module.model.roi_heads.box_predictor.cls_score.weight.data.fill_(float("nan"))
    images, targets = next(iter(scenes.train_dataloader()))
    with pytest.raises(Diverged):
        module.train().training_step((images, targets), 0)


def test_the_standard_detector_has_the_papers_parts():
    with torch.device("meta"):
        model = standard_detector(15)
        shallow = standard_detector(15, network="resnet50")
    # torchvision's Faster R-CNN of 91 classes has 41,755,286 parameters and another last layer.
    heads = 91 * 1025 + 4 * 91 * 1025
    assert count_parameters(shallow) - count_parameters(shallow.roi_heads.box_predictor) == pytest.approx(
        41_755_286 - heads, abs=60_000
    ), "up to the scales and shifts of its norms"
    assert count_parameters(model) > count_parameters(shallow) + 18e6
    assert isinstance(model.roi_heads.box_predictor, BoxPredictor)
    assert isinstance(model.backbone.body.layer3[22].conv1, nn.Conv2d)
