r"""Several techniques in one training run of a vision transformer.

A study of this book. A :class:`Stack` says what is switched on; all off, it is plain training. Most techniques take one
place of a run and leave the others, so that they can be stacked as their chapters have them:

=====================================  ==================================================
technique                              what it takes
=====================================  ==================================================
SkipViT                                the list of blocks
GQKVA                                  the attention layers, but for the one that SkipViT asks
low rank, frozen in turns              the MLPs, and which of their factors train
progressive layer dropping             the list of blocks, or with SkipViT those that tokens bypass
SwiftLearn                             the samples
Adan, CLARS                            the optimiser
sharpness-aware, centralised gradient  the gradient (and with them, smoothed labels)
=====================================  ==================================================

:class:`StackedClassifier` trains with a stack, for a number of epochs or, with a
:class:`~leantrain.techniques.hardware_aware_resnet9.TimeBudget`, for a number of seconds. Its learning rate then
follows the clock.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields
from functools import partial
from typing import Any, Literal, cast, get_args

import lightning as L
import torch
from lightning.pytorch.core.optimizer import LightningOptimizer
from timm.models import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import AdamW, Optimizer
from torch.utils.data import TensorDataset

from leantrain.data.image_sets import images
from leantrain.low_rank.factors import choose_ranks, decompose_model
from leantrain.techniques.adan import Adan
from leantrain.techniques.clars import CLARS, layer_groups, micro_batch_norms
from leantrain.techniques.gqkva import group_attention
from leantrain.techniques.hardware_aware_resnet9 import TimeBudget, centralise_gradients, sam_gradient
from leantrain.techniques.lrd_rank_freeze import FactorFreezing
from leantrain.techniques.progressive_layer_dropping import LayerDropping, ProgressiveStack
from leantrain.techniques.skipvit import skip_tokens
from leantrain.techniques.swiftlearn import ActiveData, SwiftLearn
from leantrain.training.batch_statistics import frozen_statistics
from leantrain.training.image_classifier import ImageClassifier
from leantrain.training.schedules import warmup_cosine_factor

__all__ = ["SWITCHES", "Stack", "StackedClassifier", "active_images", "stacked"]

OptimizerName = Literal["adamw", "adan", "clars"]

#: What each technique changes in a plain stack.
SWITCHES: dict[str, dict[str, Any]] = {
    "SkipViT": {"drop_ratio": 0.55},
    "GQKVA": {"grouping": "GQKVA-3.2"},
    "SwiftLearn": {"keep": 0.5},
    "layer dropping": {"limit": 0.5},
    "low rank": {"compression": 2.0},
    "Adan": {"optimizer": "adan"},
    "CLARS": {"optimizer": "clars"},
    "sharpness-aware": {"rho": 0.05, "centralise": True, "label_smoothing": 0.1},
}

_TICKS = 100_000  # of the schedule, which counts in whole steps


@dataclass(frozen=True)
class Stack:
    """What is switched on. The defaults are plain training with AdamW.

    Attributes:
        drop_ratio: SkipViT's share of the patches that bypass blocks, at least 0 and below 1; 0 for none.
        split: Block before which these patches leave, at least 1.
        rejoin: Block before which they are back, at least `split`.
        grouping: GQKVA's variant for the model's number of heads; empty for plain attention.
        keep: SwiftLearn's share of the samples that stay, above 0 and at most 1; 1 for all.
        warmup: SwiftLearn's epochs on all samples.
        refresh: SwiftLearn's epochs between two choices, 0 for a single one.
        limit: Keep limit of progressive layer dropping, 0 to 1; 1 for none.
        compression: By how much the MLPs are compressed, at least 1; 1 for not at all. Their factors train in turns.
        optimizer: `adamw`, `adan` or `clars`.
        plain_rate: Rate of biases and norms under CLARS, over that of the other tensors.
        rho: Radius of the sharpness-aware step, at least 0; 0 for none.
        centralise: Whether gradients are centralised.
        label_smoothing: Share of the target spread over all classes, at least 0 and below 1.

    Raises:
        ValueError: If the optimiser is unknown, or a number is one that no technique would refuse by itself.
    """

    drop_ratio: float = 0.0
    split: int = 1
    rejoin: int = 3
    grouping: str = ""
    keep: float = 1.0
    warmup: int = 2
    refresh: int = 2
    limit: float = 1.0
    compression: float = 1.0
    optimizer: OptimizerName = "adamw"
    plain_rate: float = 0.005
    rho: float = 0.0
    centralise: bool = False
    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        if self.optimizer not in get_args(OptimizerName):
            raise ValueError(f"optimizer={self.optimizer!r}: expected one of {', '.join(get_args(OptimizerName))}")
        if not self.compression >= 1:
            raise ValueError(f"compression={self.compression}: expected 1 (none) or more")

    @property
    def drops_layers(self) -> bool:
        """Whether blocks are dropped at random."""
        return self.limit < 1

    def apply(self, model: VisionTransformer, seed: int = 0) -> VisionTransformer:
        """Switch on, in place, what changes the model.

        The order matters. Grouped attention does not say how much the class token attends to a patch, so the block that
        scores the tokens keeps its own. And SkipViT, which wants whole blocks, comes last.

        Args:
            model: A fresh timm vision transformer that classifies by its class token, before an optimiser is made.
            seed: Seed of the coins that drop layers.

        Returns:
            The same model.

        Raises:
            ValueError: If a technique refuses the model.
        """
        blocks = list(model.blocks.children())
        if self.grouping:
            scorers = blocks[self.split - 1 : self.split] if self.drop_ratio else []
            own = [scorer.attn for scorer in scorers]
            group_attention(model, self.grouping)
            for scorer, attention in zip(scorers, own, strict=True):
                scorer.attn = attention
        if self.compression > 1:
            ranks = choose_ranks(model, compression=self.compression, where=lambda name, layer: ".mlp." in name)
            decompose_model(model, ranks)
        split, rejoin = self.split, self.rejoin
        if self.drops_layers and self.drop_ratio:
            inner = ProgressiveStack(*blocks[split:rejoin], seed=seed)
            model.blocks = nn.Sequential(*blocks[:split], inner, *blocks[rejoin:])
            rejoin = split + 1
        elif self.drops_layers:
            model.blocks = ProgressiveStack(*blocks, seed=seed)
        if self.drop_ratio:
            skip_tokens(model, split=split, rejoin=rejoin, drop_ratio=self.drop_ratio)
        return model

    def callbacks(self) -> list[L.Callback]:
        """What is switched on beside the model and the step."""
        found: list[L.Callback] = []
        if self.keep < 1:
            found.append(SwiftLearn(self.keep, self.warmup, refresh=self.refresh))
        if self.drops_layers:
            # Among the bypassed blocks alone, the first may be dropped too: tokens have other ways past it.
            found.append(LayerDropping(self.limit, first_kept=not self.drop_ratio))
        if self.compression > 1:
            found.append(FactorFreezing("sequential"))
        return found

    def build_optimizer(self, groups: list[dict[str, Any]], rate: float, weight_decay: float) -> Optimizer:
        """The optimiser.

        Args:
            groups: Parameter groups, for CLARS those of `layer_groups`.
            rate: Peak learning rate.
            weight_decay: Of AdamW and Adan; CLARS has none here.
        """
        if self.optimizer == "clars":
            return CLARS(groups, rate)
        kind: Callable[..., Optimizer] = Adan if self.optimizer == "adan" else AdamW
        return kind(groups, lr=rate, weight_decay=weight_decay)


def stacked(techniques: Iterable[str], **settings: Any) -> Stack:
    """The stack in which these techniques are switched on.

    Args:
        techniques: Names in :data:`SWITCHES`.
        settings: Other fields of the stack, and other strengths for what is switched on: those of a technique that is
            off have no effect.

    Raises:
        ValueError: If a name is unknown, or two techniques want the same place.

    Example:
        >>> stacked(["GQKVA", "Adan"]).optimizer
        'adan'
    """
    changed: dict[str, Any] = {}
    owner: dict[str, str] = {}
    for name in techniques:
        if name not in SWITCHES:
            raise ValueError(f"unknown technique {name!r}; known are {', '.join(SWITCHES)}")
        for what, value in SWITCHES[name].items():
            if what in changed:
                raise ValueError(f"{owner[what]} and {name} both take the place of the {what}: choose one")
            changed[what], owner[what] = value, name
    strengths = {what for switch in SWITCHES.values() for what in switch}
    known = {field.name for field in fields(Stack)}
    if strangers := sorted(set(settings) - known):
        raise ValueError(f"a stack has no setting {', '.join(strangers)}; it has {', '.join(sorted(known))}")
    return Stack(**changed | {k: v for k, v in settings.items() if k not in strengths or k in changed})


class StackedClassifier(ImageClassifier):
    """Train a vision transformer with a stack of techniques, by epochs or by the clock.

    Args:
        model: A fresh timm vision transformer; the stack changes it.
        stack: What is switched on.
        rate: Peak learning rate; a warm-up and a cosine are laid over the run.
        num_classes: Number of classes, at least 2.
        weight_decay: Of AdamW and Adan, on tensors of two dimensions and more.
        budget: Ends the run; None for a run that ends with its last epoch. It comes before all other callbacks, so
            that it does not take the time of a measurement of all samples for that of a batch.
        micro_batches: Number of small samples from which CLARS estimates its norms.
        micro_size: Images in each.
        seed: Seed of the coins that drop layers.

    Attributes:
        stack: What is switched on.
        passes: Gradients computed so far, that of CLARS's small samples not counted.

    Raises:
        ValueError: If a number is out of range, or layers are to be dropped in a run by the clock.
        Diverged: In training, if the loss is infinite or not a number.
    """

    def __init__(
        self,
        model: VisionTransformer,
        stack: Stack,
        *,
        rate: float,
        num_classes: int,
        weight_decay: float = 0.05,
        warmup_fraction: float = 0.1,
        budget: TimeBudget | None = None,
        micro_batches: int = 2,
        micro_size: int = 8,
        seed: int = 0,
    ) -> None:
        if budget is not None and stack.drops_layers:
            raise ValueError(
                "the schedule of layer dropping counts steps, and a run by the clock does not know how many it has: "
                "drop no layers, or give no budget"
            )
        super().__init__(
            stack.apply(model, seed),
            partial(stack.build_optimizer, rate=rate, weight_decay=weight_decay),
            num_classes=num_classes,
            warmup_fraction=warmup_fraction,
            label_smoothing=stack.label_smoothing,
        )
        self.automatic_optimization = False
        self.stack = stack
        self.budget = budget
        self.micro_batches, self.micro_size = micro_batches, micro_size
        self.rate = rate
        self.passes = 0
        self._steps = math.inf
        if stack.drops_layers:
            self.model.register_forward_pre_hook(self._same_coins)

    def configure_callbacks(self) -> list[L.Callback]:
        """The budget first, then those of the techniques."""
        return [*([] if self.budget is None else [self.budget]), *self.stack.callbacks()]

    def parameter_groups(self) -> list[dict[str, Any]]:
        """The trainable parameters as the optimiser wants them."""
        if self.stack.optimizer == "clars":
            return layer_groups(self.model, self.stack.plain_rate * self.rate)
        return super().parameter_groups()

    def configure_optimizers(self) -> Optimizer:
        """The optimiser of the stack.

        Raises:
            ValueError: If the run has neither a last epoch nor a budget.
        """
        self._steps = self.trainer.estimated_stepping_batches
        if self.budget is None and self._steps == math.inf:
            raise ValueError("the schedule needs the length of the run: give the Trainer max_epochs, or a budget")
        optimizer = self.build_optimizer(self.parameter_groups())
        for group in optimizer.param_groups:
            group["peak"] = group["lr"]
        return optimizer

    @property
    def progress(self) -> float:
        """Share of the run that is over, by the clock if there is a budget, else by steps; 0 to 1."""
        return min(self.global_step / self._steps, 1.0) if self.budget is None else self.budget.progress

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """One step with all that is switched on.

        Args:
            batch: Images ``(B, C, H, W)`` and classes ``(B,)``.
            batch_idx: Number of the batch in its epoch; unused.

        Returns:
            The loss before the step, a scalar without gradient.

        Raises:
            Diverged: If the loss is infinite or not a number.
        """
        optimizer = cast(LightningOptimizer, self.optimizers())
        factor = warmup_cosine_factor(round(_TICKS * self.progress), _TICKS, self.warmup_fraction)
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * factor
        trained = [p for p in self.model.parameters() if p.requires_grad]
        first, again = partial(self._gradient, batch, batch_idx), partial(self._gradient, batch, None)
        loss = sam_gradient(first, trained, self.stack.rho, again=again) if self.stack.rho else first()
        if self.stack.centralise:
            centralise_gradients(trained)
        if isinstance(optimizer.optimizer, CLARS):
            x, y = (part[: self.micro_batches * self.micro_size].split(self.micro_size) for part in batch)
            optimizer.optimizer.see(micro_batch_norms(self.model, zip(x, y, strict=True)).mean)
        optimizer.step()
        return loss.detach()

    def _gradient(self, batch: tuple[Tensor, Tensor], batch_idx: int | None) -> Tensor:
        """Fill the gradients; without a number nothing is recorded."""
        self.zero_grad()
        self.passes += 1
        if batch_idx is not None:
            loss = super().training_step(batch, batch_idx)
        else:
            with frozen_statistics(self.model):
                loss = F.cross_entropy(self._logits(batch[0]), batch[1], label_smoothing=self.label_smoothing)
        self.manual_backward(loss)
        return loss

    def _same_coins(self, model: nn.Module, inputs: Any) -> None:
        """All passes of a step go through the same blocks: a second gradient would else be that of another network."""
        for part in model.modules():
            if isinstance(part, ProgressiveStack) and self.training:
                part.begin_step(self.global_step, part.keep)


def active_images(
    name: str,
    *,
    batch_size: int,
    train_size: int | None = None,
    val_size: int | None = None,
    stand_in: bool = False,
) -> ActiveData:
    """An image set whose training samples can be chosen, so that all arms get their batches in the same way.

    Its images are not augmented: a sample is the same whenever it is looked at.

    Args:
        name: See :func:`leantrain.data.images`.
        batch_size: Images in a batch.
        train_size: Training images; None for all.
        val_size: Validation images; None for all.
        stand_in: See :func:`leantrain.data.images`.

    Attributes of the result: besides its own, `num_classes` and `shape` of the source are at `source`.
    """
    options: Mapping[str, Any] = {"train_size": train_size, "val_size": val_size, "stand_in": stand_in}
    source = images(name, batch_size=batch_size, **options)
    whole = source if stand_in else images(name, batch_size=source.train_size, **options)
    samples = [torch.cat(parts) for parts in zip(*whole.train_dataloader(), strict=True)]
    return ActiveData(source, TensorDataset(*samples), batch_size=batch_size)
