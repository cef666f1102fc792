r"""A recipe for ten minutes and 5,000 images: whitened patches, label smoothing, SAM, centralised gradients, and more.

Paper: Awad, Hajimolahoseini, Lim, Gosal, Ahmed, Liu, Deng, "Improving ResNet-9 Generalization Trained on Small
Datasets", arXiv 2309.03965; the authors' entry to the competition on hardware-aware efficient training (ICLR 2021).

A small residual network on few images overfits long before its time is over. The recipe gives it inputs that are
easy to learn from (a frozen first layer that whitens 3x3 patches), targets and units that keep it from being too sure
(label smoothing, CELU, weight decay), and gradients that lead to flat minima (sharpness-aware minimisation, SAM;
centralised gradients; a step that must help the next batch as well).

The pieces stand alone in plain PyTorch:

- :func:`patch_whitening`: eigenvectors :math:`v_i/\sqrt{\lambda_i+\epsilon}` of the patches' second moments as filters;
- :func:`sam_gradient`: the gradient at :math:`w + \rho\, g/\lVert g\rVert`, applied at :math:`w`;
- :func:`meta_gradient`: :math:`\nabla L_1(w) + \beta\,\nabla L_2(w - \alpha \nabla L_1(w))`, to first order;
- :func:`centralise_gradients`: the mean over all dimensions but the first is subtracted;
- :class:`GhostBatchNorm2d`, :func:`rate_factor`, :func:`mirrored`, :class:`TimeBudget`.

:class:`Recipe` switches them, and :class:`SmallDataClassifier` trains with them. With all switches off it is SGD with
Nesterov momentum on the cross-entropy, to the last bit. The paper's text names the ingredients; sizes that it leaves
open follow the authors' released entry or are our choice, and their docstrings say which.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import lightning as L
import torch
from lightning.pytorch.core.optimizer import LightningOptimizer
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from leantrain.training.batch_statistics import frozen_statistics
from leantrain.training.image_classifier import ImageClassifier
from leantrain.training.resnet9 import ResNet9

__all__ = [
    "GhostBatchNorm2d",
    "Recipe",
    "SmallDataClassifier",
    "TimeBudget",
    "centralise_gradients",
    "displaced",
    "meta_gradient",
    "mirrored",
    "patch_whitening",
    "rate_factor",
    "sam_gradient",
    "sharpness",
]

_CHUNK = 250  # images whose patches are in memory at a time


def patch_whitening(images: Tensor, *, kernel: int = 3, eps: float = 1e-2) -> Tensor:
    r"""Filters that whiten the patches of images.

    With the patches as rows of :math:`P`, :math:`\Sigma = P^T P / (n - 1)` (no mean is removed) and
    :math:`\Sigma = V \Lambda V^T`, filter i is :math:`v_i / \sqrt{\lambda_i + \epsilon}`. As a convolution they give
    uncorrelated channels of power :math:`\lambda_i / (\lambda_i + \epsilon)`. Kernel and `eps` are those of the
    authors' entry.

    Args:
        images: Training images ``(N, c, H, W)``, normalised and not augmented.
        kernel: Side k of a patch, 1 to the images' sides.
        eps: Added to the eigenvalues; keeps noise in weak directions from being blown up. Not negative.

    Returns:
        ``(c k k, c, k, k)``, by falling eigenvalue; the largest element of each is positive.

    Raises:
        ValueError: If an argument is out of range, there are fewer patches than a patch has elements, or `eps` is 0
            and some direction is empty.
    """
    if images.ndim != 4 or not 1 <= kernel <= min(images.shape[-2:]):
        raise ValueError(f"cannot cut patches of {kernel}x{kernel} from images of shape {tuple(images.shape)}")
    if not 0 <= eps < math.inf:
        raise ValueError(f"eps must be a finite number, at least 0, got {eps}")
    channels = images.shape[1]
    size = channels * kernel**2
    count = len(images) * (images.shape[2] - kernel + 1) * (images.shape[3] - kernel + 1)
    if count < size:
        raise ValueError(f"{count} patches are fewer than the {size} elements of one: give more images")
    moments = torch.zeros(size, size, dtype=torch.float64, device=images.device)
    for some in images.split(_CHUNK):
        windows = some.unfold(2, kernel, 1).unfold(3, kernel, 1)  # (n, c, h, w, k, k)
        columns = windows.permute(1, 4, 5, 0, 2, 3).reshape(size, -1)
        moments += columns @ columns.T
    values, vectors = torch.linalg.eigh(moments / (count - 1))
    values, vectors = values.flip(0).clamp(min=0), vectors.flip(1).T
    if eps == 0 and values[-1] <= size * torch.finfo(images.dtype).eps * values[0]:
        raise ValueError("some direction of the patches is empty and cannot be whitened with eps 0: give a larger eps")
    largest = vectors.gather(1, vectors.abs().argmax(1, keepdim=True))
    filters = vectors * largest.sign() / (values + eps).sqrt()[:, None]
    return filters.to(images.dtype).reshape(size, channels, kernel, kernel)


class GhostBatchNorm2d(nn.BatchNorm2d):
    """Batch normalisation over parts of the batch, which adds noise as a small batch does.

    Sample n belongs to part n modulo `splits`. The running statistics are the means over the parts; evaluation uses
    them as usual. With one split it is `nn.BatchNorm2d` to the last bit.

    Args:
        num_features: Channels.
        splits: Parts of a batch, at least 1; the authors' entry has 16.
        learn_scale: Whether the scale is trained; the entry fixes it at 1.

    Raises:
        ValueError: If `splits` is less than 1; in training, if a batch cannot be split evenly.
    """

    def __init__(self, num_features: int, splits: int = 16, *, learn_scale: bool = False) -> None:
        if splits < 1:
            raise ValueError(f"splits must be at least 1, got {splits}")
        super().__init__(num_features)
        self.splits = splits
        self.weight.requires_grad_(learn_scale)

    def forward(self, x: Tensor) -> Tensor:
        """Normalise `(B, C, H, W)`."""
        if not self.training or self.splits == 1:
            return super().forward(x)
        batch, channels, *sides = x.shape
        if batch % self.splits:
            raise ValueError(f"a batch of {batch} cannot be split into {self.splits} equal parts")
        parts = x.reshape(batch // self.splits, self.splits * channels, *sides)
        buffers = [cast(Tensor, buffer) for buffer in (self.running_mean, self.running_var)]
        means, variances = (buffer.repeat(self.splits) for buffer in buffers)
        y = F.batch_norm(
            parts,
            means if self.track_running_stats else None,
            variances if self.track_running_stats else None,
            self.weight.repeat(self.splits),
            self.bias.repeat(self.splits),
            training=True,
            momentum=cast(float, self.momentum),
            eps=self.eps,
        )
        if self.track_running_stats:
            with torch.no_grad():
                for buffer, of_parts in zip(buffers, (means, variances), strict=True):
                    buffer.copy_(of_parts.view(self.splits, channels).mean(0))
                cast(Tensor, self.num_batches_tracked).add_(1)
        return y.reshape(x.shape)


def centralise_gradients(params: Iterable[Tensor]) -> None:
    """Subtract from each gradient, in place, its mean over all dimensions but the first.

    Each output channel's gradient then sums to zero. Tensors of fewer than two dimensions, and those without gradient,
    are left alone. Weight decay is not part of what is centralised here (the authors of the method centralise the sum
    of both).
    """
    with torch.no_grad():
        for p in params:
            if p.grad is not None and p.ndim >= 2:
                p.grad.sub_(p.grad.mean(dim=tuple(range(1, p.ndim)), keepdim=True))


@contextmanager
def displaced(params: Sequence[Tensor], shifts: Sequence[Tensor]) -> Iterator[None]:
    """Move parameters inside a ``with`` block; after it they are what they were, to the last bit.

    Args:
        params: The parameters.
        shifts: What is added to each.
    """
    before = [p.detach().clone() for p in params]
    with torch.no_grad():
        for p, shift in zip(params, shifts, strict=True):
            p.add_(shift)
    # Under autocast PyTorch keeps the half-precision copy of each weight until the context ends, so a second pass in
    # the same context would run with the weights of the first.
    torch.clear_autocast_cache()
    try:
        yield
    finally:
        with torch.no_grad():
            for p, old in zip(params, before, strict=True):
                p.copy_(old)
        torch.clear_autocast_cache()


def sam_gradient(
    gradient: Callable[[], Tensor],
    params: Iterable[Tensor],
    rho: float = 0.05,
    *,
    again: Callable[[], Tensor] | None = None,
) -> Tensor:
    r"""Leave in ``.grad`` the gradient at the steepest point nearby, :math:`w + \rho\, g / \lVert g \rVert_2`.

    Sharpness-aware minimisation in its standard form: one norm over all parameters. An optimiser step at :math:`w`
    with this gradient is a SAM step. It costs two forward and two backward passes.

    Args:
        gradient: Clears and fills the gradients at the present weights and returns the loss.
        params: All parameters that are trained.
        rho: Radius, not negative; 0 gives the plain gradient.
        again: What is called at the displaced weights; by default `gradient` a second time.

    Returns:
        What `gradient` returned.

    Raises:
        ValueError: If `rho` is negative or not finite, or no parameter got a gradient.
    """
    _not_negative("rho", rho)
    loss = gradient()
    active = [p for p in params if p.grad is not None]
    if not active:
        raise ValueError("no parameter got a gradient, so there is no direction to go")
    slopes = [p.grad.detach() for p in active if p.grad is not None]
    norm = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(g) for g in slopes]))
    scale = torch.where(norm > 0, rho / norm, 0.0)
    with displaced(active, [scale * g for g in slopes]):
        (again or gradient)()
    return loss


def sharpness(gradient: Callable[[], Tensor], params: Iterable[Tensor], rho: float = 0.05) -> float:
    r"""How much the loss rises on the way to :math:`w + \rho\, g / \lVert g \rVert_2`.

    Args:
        gradient: Clears and fills the gradients at the present weights and returns the loss.
        params: All parameters that are trained.
        rho: Radius, not negative.

    Raises:
        ValueError: If `rho` is negative or not finite, or no parameter got a gradient.
    """
    risen: list[Tensor] = []

    def again() -> Tensor:
        risen.append(gradient())
        return risen[-1]

    loss = sam_gradient(gradient, params, rho, again=again)
    return float(risen[-1]) - float(loss)


def meta_gradient(
    first: Callable[[], Tensor], second: Callable[[], Tensor], params: Iterable[Tensor], alpha: float, beta: float = 1.0
) -> Tensor:
    r"""Leave in ``.grad`` the sum :math:`\nabla L_1(w) + \beta\,\nabla L_2(w')`, :math:`w' = w - \alpha\nabla L_1(w)`.

    A step that helps one batch shall also help another: learning to learn with each batch as a task. The second
    derivative of :math:`L_1` that the chain rule brings into the second term is left out.

    The paper names meta-learning without a formula that we could read; this form is our choice.

    Args:
        first: Clears and fills the gradients for the first batch at the present weights and returns the loss.
        second: The same for the second batch.
        params: All parameters that are trained.
        alpha: Length of the step in between, not negative.
        beta: Weight of the second batch, not negative; 0 gives the gradient of the first.

    Returns:
        What `first` returned.

    Raises:
        ValueError: If a number is negative or not finite.
    """
    _not_negative("alpha", alpha)
    _not_negative("beta", beta)
    loss = first()
    if beta == 0:
        return loss
    active = [p for p in params if p.grad is not None]
    slopes = [p.grad.detach().clone() for p in active if p.grad is not None]
    with displaced(active, [-alpha * g for g in slopes]):
        second()
    for p, slope in zip(active, slopes, strict=True):
        p.grad = slope if p.grad is None else p.grad.mul_(beta).add_(slope)
    return loss


def rate_factor(
    progress: float, *, start: float = 0.0, peak: float = 0.2, floor: float = 0.1, hold: float = 0.01
) -> float:
    """Share of the peak learning rate: a line up, a line down, then constant.

    The defaults are the authors' schedule over 200 epochs: from 0 to the peak in the first fifth, to a tenth of it two
    epochs before the end.

    Args:
        progress: Share of the run that is over, 0 to 1; by steps or by the clock.
        start: Factor at the beginning, 0 to 1.
        peak: Where the factor is 1, above 0 and below ``1 - hold``.
        floor: Factor at the end, 0 to 1.
        hold: Share of the run at the end that stays at the floor, at least 0.

    Raises:
        ValueError: If an argument is out of range.

    Example:
        >>> [round(rate_factor(epoch / 200), 5) for epoch in (0, 10, 40, 100, 198)]
        [0.0, 0.25, 1.0, 0.65823, 0.1]
    """
    if not 0 <= progress <= 1:
        raise ValueError(f"progress is a share of the run, 0 to 1, got {progress}")
    if not (0 <= start <= 1 and 0 <= floor <= 1):
        raise ValueError(f"start and floor are shares of the peak, 0 to 1, got {start} and {floor}")
    if not 0 < peak < 1 - hold <= 1:
        raise ValueError(f"the peak must come after the start and before the hold, got peak={peak} and hold={hold}")
    if progress < peak:
        return start + (1 - start) * progress / peak
    return 1 - (1 - floor) * min((progress - peak) / (1 - hold - peak), 1.0)


def mirrored(model: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Mean of the logits of images `(B, C, H, W)` and of their mirror images."""
    return (model(x) + model(x.flip(-1))) / 2


class TimeBudget(L.Callback):
    """Stop a run when its time is over, and keep the weights as they are then.

    The clock starts with the fit and stands still during validation. A run ends with the first batch after which the
    longest of the last five batches might no longer fit. So at most about one batch of time is left, and the limit is
    exceeded only if the last batch took longer than the five before it.

    Args:
        seconds: The limit, positive.
        clock: Returns seconds; another one than the computer's is for tests.

    Attributes:
        seconds: The limit.

    Raises:
        ValueError: If the limit is not positive and finite.
    """

    def __init__(self, seconds: float, *, clock: Callable[[], float] = time.perf_counter) -> None:
        if not 0 < seconds < math.inf:
            raise ValueError(f"a budget of {seconds} s is none: give a positive number of seconds")
        self.seconds = seconds
        self._clock = clock
        self._spent = 0.0
        self._since: float | None = None
        self._fitting = False
        self._batch_began = 0.0
        self._batches: deque[float] = deque(maxlen=5)  # more would let one stall early on end the run early

    @property
    def elapsed(self) -> float:
        """Seconds spent in training so far."""
        return self._spent + (0.0 if self._since is None else self._clock() - self._since)

    @property
    def progress(self) -> float:
        """Share of the budget that is spent, 0 to 1."""
        return min(self.elapsed / self.seconds, 1.0)

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Start the clock, if this is a fit."""
        if stage == "fit":
            self._spent, self._since, self._fitting = 0.0, self._clock(), True
            self._batch_began = 0.0
            self._batches.clear()

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Stop the clock."""
        self._spent, self._since = self.elapsed, None

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Let the clock run on, if the validation was part of a fit."""
        if self._fitting:
            self._since = self._clock()

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """The first batch begins."""
        self._batch_began = self.elapsed

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        """Stop the run, if another batch might not fit."""
        now = self.elapsed
        self._batches.append(now - self._batch_began)
        self._batch_began = now
        if now + max(self._batches) > self.seconds:
            trainer.should_stop = True

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Stop the clock for good."""
        self._spent, self._since, self._fitting = self.elapsed, None, False


@dataclass(frozen=True)
class Recipe:
    """Every switch of the recipe. The defaults are the baseline.

    Attributes:
        whitening: Whether a frozen whitening layer comes first.
        celu: Parameter alpha of the CELU units (the entry has 0.3); None for ReLU.
        ghosts: Parts of a batch that are normalised apart; None for plain batch normalisation.
        label_smoothing: Share of the target spread over all classes, at least 0 and below 1 (the entry has 0.2).
        weight_decay: L2 penalty of the SGD step, not negative (the entry has 5e-4).
        centralise: Whether gradients are centralised; with SAM, those of the second pass.
        rho: Radius of SAM, not negative; 0 switches it off.
        sam_every: SAM acts in every k-th step only ("lazy"), at least 1.
        meta: Weight beta of the meta-learning step, not negative; 0 switches it off. The two batches are the halves of
            the mini-batch, the step in between has the present learning rate, and the sum is divided by 1 + beta so
            that the rate keeps its meaning: our choice.
        average: Decay per step of a running average of weights and buffers, 0 to 1 (the entry has 0.99); None for none.
        average_every: The average is updated every so many steps, with `average` to that power (the entry has 5).
        lookahead: Whether the weights are drawn back to their average on the way, as in airbench94.
        rate: Peak learning rate for the mean loss, positive (the entry has 1.0 at batch 256).
        momentum: Nesterov momentum, above 0 and below 1.
        bias_boost: Biases of normalisations learn this many times faster and decay as many times less (the entry: 64).
        start: See :func:`rate_factor`.
        peak: See :func:`rate_factor`.
        floor: See :func:`rate_factor`.
        hold: See :func:`rate_factor`.

    Raises:
        ValueError: If a number is out of range.

    Example:
        >>> improved = Recipe(whitening=True, celu=0.3, label_smoothing=0.2, weight_decay=5e-4)
        >>> sum(p.numel() for p in improved.network(width=16).parameters())
        413673
    """

    whitening: bool = False
    celu: float | None = None
    ghosts: int | None = None
    label_smoothing: float = 0.0
    weight_decay: float = 0.0
    centralise: bool = False
    rho: float = 0.0
    sam_every: int = 1
    meta: float = 0.0
    average: float | None = None
    average_every: int = 5
    lookahead: bool = False
    rate: float = 0.25
    momentum: float = 0.9
    bias_boost: float = 1.0
    start: float = 0.0
    peak: float = 0.2
    floor: float = 0.0
    hold: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(f"label_smoothing must be at least 0 and below 1, got {self.label_smoothing}")
        for name in ("weight_decay", "rho", "meta"):
            _not_negative(name, getattr(self, name))
        for name in ("sam_every", "average_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.ghosts is not None and self.ghosts < 1:
            raise ValueError(f"ghosts must be at least 1 or None, got {self.ghosts}")
        if self.average is not None and not 0 <= self.average <= 1:
            raise ValueError(f"average is a decay, 0 to 1 or None, got {self.average}")
        for name in ("rate", "bias_boost", *(["celu"] if self.celu is not None else [])):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be positive and finite, got {getattr(self, name)}")
        if not 0 < self.momentum < 1:
            raise ValueError(f"momentum must be above 0 and below 1, got {self.momentum}")
        self.factor(0.0)

    def factor(self, progress: float) -> float:
        """The learning rate over its peak at a share of the run."""
        return rate_factor(progress, start=self.start, peak=self.peak, floor=self.floor, hold=self.hold)

    def network(self, width: int = 64, *, in_chans: int = 3, num_classes: int = 10) -> ResNet9:
        """The ResNet-9 of this recipe; its whitening layer is not yet filled."""
        activation: Callable[[], nn.Module] = nn.ReLU if self.celu is None else partial(nn.CELU, self.celu)
        norm: Callable[[int], nn.Module] = nn.BatchNorm2d
        if self.ghosts is not None:
            norm = partial(GhostBatchNorm2d, splits=self.ghosts)
        return ResNet9(
            width,
            in_chans=in_chans,
            num_classes=num_classes,
            whitening=self.whitening,
            activation=activation,
            norm=norm,
        )


class SmallDataClassifier(ImageClassifier):
    """Train an image classifier by a :class:`Recipe`, for a number of epochs, for a time, or for what ends first.

    Args:
        model: Maps images ``(B, C, H, W)`` to logits ``(B, num_classes)``.
        recipe: What is switched on. Its network is not built here: `model` may be any.
        num_classes: Number of classes, at least 2.
        images: Training images ``(N, C, H, W)``, normalised and not augmented. When the run starts, the convolution
            `model.whiten` is filled with their whitening filters, or with these and their negatives if it has twice as
            many. None leaves the layer as it is.
        eps: Of the filters, see :func:`patch_whitening`.
        budget: Ends the run by the clock. The learning rate follows the clock or the steps, whichever are further.
        channels_last: See :class:`~leantrain.training.ImageClassifier`.

    Attributes:
        averaged: The running average of the model (of its weights and buffers), or None.

    Raises:
        ValueError: If there are images but no layer `whiten` that fits; at the start of a run, if it has neither a
            last epoch nor a budget; in training, if a batch of one is to be halved for the meta-learning step.
    """

    def __init__(
        self,
        model: nn.Module,
        recipe: Recipe,
        *,
        num_classes: int = 10,
        images: Tensor | None = None,
        eps: float = 1e-2,
        budget: TimeBudget | None = None,
        channels_last: bool = False,
    ) -> None:
        optimizer = partial(torch.optim.SGD, lr=recipe.rate, momentum=recipe.momentum, nesterov=True)
        super().__init__(
            model,
            optimizer,
            num_classes=num_classes,
            label_smoothing=recipe.label_smoothing,
            channels_last=channels_last,
        )
        self.automatic_optimization = False
        self.recipe = recipe
        self.budget = budget
        self.eps = eps
        self._images = images
        if images is not None:
            _whitening_layer(model)
        self.averaged: AveragedModel | None = None
        if recipe.average is not None:
            decay = recipe.average**recipe.average_every
            self.averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay), use_buffers=True)
            self.averaged.requires_grad_(False)
        self._slow: list[Tensor] = []
        self._steps = math.inf

    def configure_callbacks(self) -> list[L.Callback]:
        """The budget, if there is one."""
        return [] if self.budget is None else [self.budget]

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """SGD over the model's trainable parameters.

        Raises:
            ValueError: If the run has neither a last epoch nor a budget.
        """
        self._steps = self.trainer.estimated_stepping_batches
        if self.budget is None and self._steps == math.inf:
            raise ValueError("the schedule needs the length of the run: give the Trainer max_epochs, or a budget")
        return self.build_optimizer(self.parameter_groups())

    def parameter_groups(self) -> list[dict[str, Any]]:
        """The trainable parameters, the biases of normalisations apart."""
        boosted = {id(m.bias) for m in self.model.modules() if isinstance(m, _BatchNorm) and m.bias is not None}
        trainable = [p for p in self.model.parameters() if p.requires_grad]
        rate, decay, boost = self.recipe.rate, self.recipe.weight_decay, self.recipe.bias_boost
        groups: list[dict[str, Any]] = [
            {"params": [p for p in trainable if id(p) not in boosted], "peak": rate, "weight_decay": decay},
            {"params": [p for p in trainable if id(p) in boosted], "peak": rate * boost, "weight_decay": decay / boost},
        ]
        return [group for group in groups if group["params"]]

    def on_fit_start(self) -> None:
        """Fill the whitening layer."""
        if self._images is not None:
            layer = _whitening_layer(self.model)
            filters = patch_whitening(self._images, kernel=int(layer.kernel_size[0]), eps=self.eps)
            self._images = None
            if layer.out_channels == 2 * len(filters):
                filters = torch.cat([filters, -filters])
            with torch.no_grad():
                layer.weight.copy_(filters)

    @property
    def progress(self) -> float:
        """Share of the run that is over in the middle of the coming step, by steps or by the clock."""
        by_steps = (self.global_step + 0.5) / self._steps
        by_clock = 0.0 if self.budget is None else self.budget.progress
        return min(max(by_steps, by_clock), 1.0)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """One step of the recipe on images ``(B, C, H, W)`` and classes ``(B,)``.

        Returns:
            The loss before the step, a scalar without gradient.

        Raises:
            Diverged: If the loss is infinite or not a number.
            ValueError: If a batch of one is to be halved for the meta-learning step.
        """
        recipe, step = self.recipe, self.global_step
        optimizer = cast(LightningOptimizer, self.optimizers())
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * recipe.factor(self.progress)
        first, again = partial(self._gradient, batch, batch_idx), partial(self._gradient, batch, None)
        if recipe.rho > 0 and step % recipe.sam_every == 0:
            loss = sam_gradient(first, self._trained(), recipe.rho, again=again)
        else:
            loss = first()
        if recipe.centralise:
            centralise_gradients(self._trained())
        optimizer.step()
        self._average(step + 1)
        return loss.detach()

    def on_train_end(self) -> None:
        """With `lookahead`, end at the average."""
        self._look_back(1.0)

    @torch.no_grad()
    def accuracy(
        self,
        batches: Iterable[tuple[Tensor, Tensor]],
        *,
        mirror: bool = False,
        averaged: bool = False,
        dtype: torch.dtype | None = None,
    ) -> float:
        """Share of the images that are classified rightly, in per cent.

        Args:
            batches: Images and classes.
            mirror: Whether to average the logits with those of the mirror images.
            averaged: Whether to ask the running average of the weights in place of the weights.
            dtype: Arithmetic of the passes under autocast; None for that of the weights.

        Raises:
            ValueError: If there is no running average, or there are no images.
        """
        if averaged and self.averaged is None:
            raise ValueError("there is no running average: give the recipe an `average`")
        model = self.averaged if averaged and self.averaged is not None else self.model
        mode, device = model.training, next(self.model.parameters()).device
        hits, count = 0, 0
        model.eval()
        with torch.autocast(device.type, dtype, enabled=dtype is not None):
            for images, y in batches:
                x = images.to(device)
                if self.channels_last:
                    x = x.contiguous(memory_format=torch.channels_last)
                logits = mirrored(model, x) if mirror else model(x)
                hits += int((logits.argmax(1) == y.to(device)).sum())
                count += len(y)
        model.train(mode)
        if not count:
            raise ValueError("no images were given")
        return 100 * hits / count

    def _trained(self) -> Iterator[nn.Parameter]:
        return (p for p in self.model.parameters() if p.requires_grad)

    def _gradient(self, batch: tuple[Tensor, Tensor], batch_idx: int | None) -> Tensor:
        """Fill the gradients by one pass, or by the meta-learning step's two; without a number nothing is recorded."""
        if self.recipe.meta == 0:
            return self._one_pass(batch, batch_idx)
        x, y = batch
        if len(y) < 2:
            raise ValueError("the meta-learning step halves the batch: give batches of two images or more")
        half = len(y) // 2
        first = partial(self._one_pass, (x[:half], y[:half]), batch_idx)
        second = partial(self._one_pass, (x[half:], y[half:]), None)
        alpha = self.recipe.rate * self.recipe.factor(self.progress)
        loss = meta_gradient(first, second, self._trained(), alpha, self.recipe.meta)
        for p in self._trained():
            if p.grad is not None:
                p.grad.div_(1 + self.recipe.meta)
        return loss

    def _one_pass(self, batch: tuple[Tensor, Tensor], batch_idx: int | None) -> Tensor:
        self.zero_grad()
        if batch_idx is not None:
            loss = super().training_step(batch, batch_idx)
        else:
            x, y = batch
            with frozen_statistics(self.model):
                logits = self(x)
            logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
            loss = F.cross_entropy(logits, y, label_smoothing=self.label_smoothing)
        self.manual_backward(loss)
        return loss

    def _average(self, step: int) -> None:
        if self.averaged is not None and step % self.recipe.average_every == 0:
            self.averaged.update_parameters(self.model)
        # As in airbench94: from three tenths of the run on, every fifth step, with a decay that grows with the cube.
        if self.recipe.lookahead and step % 5 == 0 and (progress := self.progress) > 0.3:
            self._look_back(0.95**5 * progress**3)

    def _look_back(self, decay: float) -> None:
        """Move the slow weights to the fast ones, except for a share, and put the fast ones there."""
        if not self.recipe.lookahead:
            return
        fast = [t.detach() for t in self.model.state_dict().values() if t.is_floating_point()]
        if not self._slow:
            self._slow = [t.clone() for t in fast]
        for slow, now in zip(self._slow, fast, strict=True):
            slow.lerp_(now, 1 - decay)
            now.copy_(slow)


def _whitening_layer(model: nn.Module) -> nn.Conv2d:
    layer = getattr(model, "whiten", None)
    if not isinstance(layer, nn.Conv2d):
        raise ValueError(
            f"{type(model).__name__} has no convolution `whiten`, so the images have no use: leave them out"
        )
    return layer


def _not_negative(name: str, value: float) -> None:
    if not 0 <= value < math.inf:
        raise ValueError(f"{name} must be a finite number, at least 0, got {value}")
