r"""FGSM-SDI: one-step adversarial training whose step starts where a small generator says.

Paper: Jia, Zhang, Wu, Wang, Cao, "Boosting Fast Adversarial Training with Learnable Adversarial Initialization", IEEE
Transactions on Image Processing 2022, arXiv 2110.05007. Details are those of the authors' released code.

Adversarial training minimises the loss at the worst point of a cube around each image. One signed gradient step finds a
bad point cheaply, but a network can learn to be robust against this one step alone: *catastrophic overfitting*. Here a
generator :math:`g` sees the image :math:`x` and the sign :math:`s` of its gradient and says where the step starts,

.. math::

    z = \epsilon \tanh g([x, s]), \qquad
    \delta = \Pi_{[-\epsilon, \epsilon]}\bigl(z + \alpha \operatorname{sign} \nabla_{x'} L(f(x'), y)|_{x' = x+z}\bigr),

and is trained against the classifier :math:`f`: every :math:`k`-th batch :math:`\theta` goes up the loss
:math:`L(f(x + \delta), y)` that the classifier's weights go down. The sign has no derivative, so the gradient reaches
:math:`\theta` through the direct term :math:`z` and the clipping alone. With :math:`\alpha = \epsilon` the clipping is
open exactly where :math:`z` and the sign disagree.

Images are in [0, 1] everywhere here; the functions take any classifier of such images. `AdversarialClassifier` trains
with the start of the attack as its option: none, zero (FGSM), random (FGSM-RS), learned (FGSM-SDI), or many steps
(PGD).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any, Literal, get_args

import lightning as L
import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Adam, Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torchmetrics import MeanMetric

from leantrain.training.batch_statistics import frozen_statistics
from leantrain.training.diverged import Diverged

__all__ = [
    "MARGIN",
    "AdversarialClassifier",
    "PixelModel",
    "Start",
    "StartGenerator",
    "StrongAttack",
    "adversarial_accuracy",
    "cifar_resnet18",
    "collapsed",
    "corner_search",
    "cw_loss",
    "generator_gradients",
    "one_step",
    "pgd",
    "random_start",
    "signed_gradient",
    "smoothed_cross_entropy",
    "step_cost",
    "stepped_factor",
    "strong_survivors",
]

Start = Literal["none", "zero", "random", "learned", "many"]
Loss = Callable[[Tensor, Tensor], Tensor]
#: Public attacks of the Adversarial Robustness Toolbox: gradient steps of adapted length on two losses, and a search
#: that asks for outputs only.
StrongAttack = Literal["apgd-ce", "apgd-dlr", "square"]

#: Points by which the one-step accuracy must exceed the many-step accuracy for a run to count as collapsed.
MARGIN = 15.0


# ------------------------------------------------------------------------------------------------------------ losses


def smoothed_cross_entropy(logits: Tensor, y: Tensor, truth: float = 1.0) -> Tensor:
    r"""Cross-entropy against a target of `truth` for the true class and equal shares of the rest for the others.

    Args:
        logits: (B, C).
        y: (B,) classes.
        truth: :math:`\phi`, above 0 and at most 1; 1 is plain cross-entropy.

    Returns:
        The mean over the batch.

    Raises:
        ValueError: If `truth` is out of range.
    """
    _check_truth(truth)
    classes = logits.shape[1]
    return F.cross_entropy(logits, y, label_smoothing=(1 - truth) * classes / (classes - 1))


def cw_loss(logits: Tensor, y: Tensor) -> Tensor:
    """The margin by which the best wrong class is ahead (Carlini and Wagner), summed over the batch.

    Args:
        logits: (B, C).
        y: (B,) classes.
    """
    true = logits.gather(1, y[:, None]).squeeze(1)
    wrong = logits.scatter(1, y[:, None], -math.inf).amax(1)
    return (wrong - true).sum()


# ----------------------------------------------------------------------------------------------------------- attacks


def signed_gradient(model: nn.Module, x: Tensor, y: Tensor, loss: Loss = F.cross_entropy) -> Tensor:
    """The sign of the loss's gradient with respect to the images.

    The gradients of the model's parameters are not computed and not touched. Entries whose gradient is exactly zero
    have the sign 0.

    Args:
        model: Classifier of images, in the mode that it is in.
        x: (B, C, H, W) images.
        y: (B,) classes.
        loss: Of logits and classes, a scalar.

    Returns:
        (B, C, H, W) of -1, 0 and 1.
    """
    with torch.enable_grad():
        leaf = x.detach().clone().requires_grad_()
        return torch.autograd.grad(loss(_logits(model, leaf), y), leaf)[0].sign()


def random_start(x: Tensor, epsilon: float) -> Tensor:
    """A point of the cube of half-width `epsilon`, each entry uniform and independent, of the images' shape.

    Args:
        x: (B, C, H, W) images.
        epsilon: Half the width of the cube, at least 0.

    Raises:
        ValueError: If `epsilon` is negative or no number.
    """
    _check_sizes(epsilon=epsilon)
    return torch.empty_like(x).uniform_(-epsilon, epsilon) if epsilon > 0 else torch.zeros_like(x)


def one_step(model: nn.Module, x: Tensor, y: Tensor, start: Tensor | float, *, epsilon: float, alpha: float) -> Tensor:
    """A start, one signed step, and the way back into the cube: FGSM and its relatives.

    Args:
        model: Classifier of images in [0, 1].
        x: (B, C, H, W) images in [0, 1].
        y: (B,) classes.
        start: Where the step starts, of the images' shape or a number; gradients flow through it.
        epsilon: Half the width of the cube, at least 0.
        alpha: Length of the step, at least 0.

    Returns:
        The perturbation, (B, C, H, W), at most `epsilon` in size. It is not cut to images in [0, 1]: in training the
        authors do not either.

    Raises:
        ValueError: If a number is negative or an image is outside [0, 1].
    """
    _check_attack(x, epsilon, alpha)
    inside = torch.as_tensor(start, dtype=x.dtype, device=x.device)
    sign = signed_gradient(model, x + inside.detach(), y)
    return (inside + alpha * sign).clamp(-epsilon, epsilon)


def pgd(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    epsilon: float,
    steps: int = 10,
    step_size: float = 2 / 255,
    restarts: int = 1,
    start: Literal["random", "zero"] = "random",
    loss: Loss = F.cross_entropy,
    stop_at_success: bool = True,
    valid: bool = True,
) -> Tensor:
    """Many signed steps inside the cube.

    Args:
        model: Classifier of images in [0, 1].
        x: (B, C, H, W) images in [0, 1].
        y: (B,) classes.
        epsilon: Half the width of the cube, at least 0.
        steps: Steps, at least 0; with none the start itself is returned.
        step_size: Length of a step, at least 0.
        restarts: Starts that are tried for each image; the one with the largest cross-entropy is kept.
        start: A random point of the cube, or the image itself.
        loss: What the steps climb: of logits and classes, a scalar; `cw_loss` is another one.
        stop_at_success: Whether images that are misclassified already are no longer moved.
        valid: Whether the perturbed image must lie in [0, 1].

    Returns:
        The perturbation, (B, C, H, W).

    Raises:
        ValueError: If a number is out of range or an image is outside [0, 1].
    """
    _check_attack(x, epsilon, step_size)
    if steps < 0 or restarts < 1:
        raise ValueError(f"steps is {steps} and restarts is {restarts}; expected at least 0 and at least 1")

    def inside(delta: Tensor) -> Tensor:
        delta = delta.clamp(-epsilon, epsilon)
        return (x + delta).clamp(0, 1) - x if valid else delta

    strongest = torch.zeros_like(x)
    highest = x.new_full((len(x),), -math.inf)
    for _ in range(restarts):
        delta = inside(random_start(x, epsilon) if start == "random" else torch.zeros_like(x))
        for _ in range(steps):
            with torch.enable_grad():
                leaf = (x + delta).detach().requires_grad_()
                logits = _logits(model, leaf)
                gradient = torch.autograd.grad(loss(logits, y), leaf)[0]
            moved = inside(delta + step_size * gradient.sign())
            hit = logits.argmax(1) == y
            delta = torch.where(hit[:, None, None, None], moved, delta) if stop_at_success else moved
        if restarts == 1:
            return delta
        with torch.no_grad():
            reached = F.cross_entropy(_logits(model, x + delta), y, reduction="none")
        better = reached > highest
        strongest = torch.where(better[:, None, None, None], delta, strongest)
        highest = torch.where(better, reached, highest)
    return strongest


@torch.no_grad()
def corner_search(model: nn.Module, x: Tensor, y: Tensor, *, epsilon: float, queries: int) -> Tensor:
    """Which images keep their class at random corners of the cube: an attack that needs no gradient.

    If it finds more than an attack with gradients, the gradients are of no use and hide how weak the model is.

    Args:
        model: Classifier of images in [0, 1].
        x: (B, C, H, W) images in [0, 1].
        y: (B,) classes.
        epsilon: Half the width of the cube, at least 0.
        queries: Corners tried for each image, at least 1.

    Returns:
        (B,) booleans, True where every corner left the image correctly classified.

    Raises:
        ValueError: If a number is out of range or an image is outside [0, 1].
    """
    _check_attack(x, epsilon, 0.0)
    if queries < 1:
        raise ValueError(f"queries is {queries}; expected at least 1")
    alive = torch.ones(len(x), dtype=torch.bool, device=x.device)
    for _ in range(queries):
        corner = (x + epsilon * torch.empty_like(x).bernoulli_(0.5).mul_(2).sub_(1)).clamp(0, 1)
        alive &= _logits(model, corner).argmax(1) == y
    return alive


def strong_survivors(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    epsilon: float,
    attacks: Sequence[StrongAttack] = ("apgd-ce", "apgd-dlr", "square"),
    steps: int = 100,
    queries: int = 1000,
    seed: int = 0,
) -> dict[str, Tensor]:
    """Public attacks by others, from the Adversarial Robustness Toolbox; three of the four of AutoAttack.

    Args:
        model: Classifier of images in [0, 1], in evaluation mode.
        x: (B, C, H, W) images in [0, 1], float32.
        y: (B,) classes.
        epsilon: Half the width of the cube, above 0.
        attacks: Which ones, each run on all images.
        steps: Steps of those that use gradients.
        queries: Queries of `square`, which uses outputs only.
        seed: Of NumPy's random numbers, which the toolbox draws from; their state is put back.

    Returns:
        Attack -> (B,) booleans, True where the image is classified correctly before and after it.

    Raises:
        ValueError: If an attack is unknown, a number is out of range, the model is in training mode, the images are
            too small for `square`, or there are too few classes for `apgd-dlr`.
    """
    import numpy as np

    if unknown := set(attacks) - set(get_args(StrongAttack)):
        raise ValueError(f"unknown attacks {sorted(unknown)}; known are {', '.join(get_args(StrongAttack))}")
    _check_attack(x, epsilon, 0.0)
    if epsilon == 0 or steps < 1 or queries < 1 or model.training:
        raise ValueError("epsilon, steps and queries must be above 0, and the model in evaluation mode")
    if "square" in attacks and min(x.shape[2:]) < 6:
        raise ValueError(f"square needs images of at least 6 pixels a side, got {tuple(x.shape[2:])}: leave it out")
    classes = _logits(model, x[:1]).shape[1]
    if "apgd-dlr" in attacks and classes < 3:
        raise ValueError(f"apgd-dlr compares three classes, the model has {classes}: leave it out")
    from art.attacks.evasion import AutoProjectedGradientDescent, SquareAttack
    from art.estimators.classification import PyTorchClassifier

    wrapped = PyTorchClassifier(
        model, nn.CrossEntropyLoss(), tuple(x.shape[1:]), classes, clip_values=(0.0, 1.0),
        device_type="gpu" if x.is_cuda else "cpu",
    )  # fmt: skip
    shared = {"norm": np.inf, "eps": epsilon, "batch_size": len(x), "verbose": False}
    losses = {"apgd-ce": "cross_entropy", "apgd-dlr": "difference_logits_ratio"}
    state, survivors = np.random.get_state(), {}  # noqa: NPY002  # the toolbox uses the global state
    try:
        for attack in attacks:
            np.random.seed(seed)  # noqa: NPY002
            if attack == "square":
                made = SquareAttack(wrapped, max_iter=queries, **shared)
            else:
                gradual = {"eps_step": epsilon / 4, "max_iter": steps, "nb_random_init": 1}
                made = AutoProjectedGradientDescent(wrapped, loss_type=losses[attack], **gradual, **shared)
            adversarial = torch.from_numpy(made.generate(x.cpu().numpy(), y.cpu().numpy())).to(x)
            with torch.no_grad():
                survivors[attack] = (model(adversarial).argmax(1) == y) & (model(x).argmax(1) == y)
    finally:
        np.random.set_state(state)  # noqa: NPY002
    return survivors


def adversarial_accuracy(
    model: nn.Module, x: Tensor, y: Tensor, delta: Tensor | float = 0.0, *, batch_size: int = 512
) -> float:
    """Share of perturbed images that are classified correctly, in %.

    Args:
        model: Classifier of images in [0, 1].
        x: (B, C, H, W) images.
        y: (B,) classes.
        delta: The perturbation; 0 for the accuracy on clean images.
        batch_size: Images at a time.

    Raises:
        ValueError: If there are no images.
    """
    if not len(x):
        raise ValueError("x is empty: there is nothing to classify")
    moved = x + delta
    with torch.no_grad():
        hits = [
            int((_logits(model, a).argmax(1) == b).sum())
            for a, b in zip(moved.split(batch_size), y.split(batch_size), strict=True)
        ]
    return 100 * sum(hits) / len(x)


def collapsed(one_step_accuracy: float, many_step_accuracy: float, margin: float = MARGIN) -> bool:
    """Whether a network withstands one step but not many: the sign of catastrophic overfitting.

    Args:
        one_step_accuracy: Accuracy under FGSM, in %.
        many_step_accuracy: Accuracy under PGD, in %.
        margin: Points by which the first must exceed the second.
    """
    return one_step_accuracy - many_step_accuracy > margin


# --------------------------------------------------------------------------------------------------------- generator


class StartGenerator(nn.Module):
    r"""The generator of starts: images and signs of their gradients in, the start's shape before tanh out.

    A convolution of 3x3 from twice the image's channels, with normalisation and ReLU; a residual block of two
    convolutions, each behind a normalisation without scale and a PReLU; a normalisation and a convolution back to the
    image's channels. At width 64 and three channels it has 79,173 parameters.

    Args:
        channels: Channels of the images, at least 1.
        width: Channels inside, at least 1.

    Raises:
        ValueError: If a size is less than 1.

    Example:
        >>> generator = StartGenerator()
        >>> sum(p.numel() for p in generator.parameters())
        79173
        >>> generator.start(torch.rand(2, 3, 8, 8), torch.ones(2, 3, 8, 8), epsilon=0.1).abs().max() < 0.1
        tensor(True)
    """

    def __init__(self, channels: int = 3, width: int = 64) -> None:
        super().__init__()
        if channels < 1 or width < 1:
            raise ValueError(f"channels is {channels} and width is {width}; expected at least 1")
        self.channels = channels
        self.first = nn.Sequential(
            nn.Conv2d(2 * channels, width, 3, padding=1, bias=False), nn.BatchNorm2d(width, eps=1e-3), nn.ReLU()
        )
        self.block = nn.Sequential(*self._half(width), *self._half(width))
        self.last = nn.Sequential(nn.BatchNorm2d(width, affine=False), nn.Conv2d(width, channels, 3, padding=1))

    @staticmethod
    def _half(width: int) -> list[nn.Module]:
        convolution = nn.Conv2d(width, width, 3, padding=1)
        nn.init.xavier_uniform_(convolution.weight, gain=math.sqrt(2))
        return [nn.BatchNorm2d(width, affine=False), nn.PReLU(), convolution]

    def forward(self, images: Tensor, signs: Tensor) -> Tensor:
        """The start before tanh, (B, C, H, W).

        Args:
            images: (B, C, H, W).
            signs: (B, C, H, W), of -1, 0 and 1.

        Raises:
            ValueError: If the shapes do not fit.
        """
        if images.shape != signs.shape or images.ndim != 4 or images.shape[1] != self.channels:
            raise ValueError(
                f"images are {tuple(images.shape)} and signs {tuple(signs.shape)}; "
                f"expected both (B, {self.channels}, H, W)"
            )
        hidden = self.first(torch.cat([images, signs], dim=1))
        return self.last(hidden + self.block(hidden))

    def start(self, images: Tensor, signs: Tensor, *, epsilon: float) -> Tensor:
        """The start, each entry between minus and plus `epsilon`."""
        return epsilon * torch.tanh(_in_full(self(images.detach(), signs.detach())))


def generator_gradients(
    model: nn.Module, generator: StartGenerator, x: Tensor, y: Tensor, signs: Tensor, *, epsilon: float, alpha: float,
    truth: float = 1.0,
) -> float:  # fmt: skip
    """Give the generator's parameters the gradient that leads up the classifier's loss when an optimiser descends.

    The classifier's parameters and their gradients are not touched.

    Args:
        model: Classifier of images in [0, 1].
        generator: Its gradients are replaced.
        x: (B, C, H, W) images.
        y: (B,) classes.
        signs: Of the gradient at the images, see `signed_gradient`.
        epsilon: Half the width of the cube.
        alpha: Length of the step.
        truth: See `smoothed_cross_entropy`.

    Returns:
        The loss.
    """
    with torch.enable_grad():
        start = generator.start(x, signs, epsilon=epsilon)
        delta = one_step(model, x, y, start, epsilon=epsilon, alpha=alpha)
        loss = smoothed_cross_entropy(_logits(model, x + delta), y, truth)
        parameters = list(generator.parameters())
        for parameter, gradient in zip(parameters, torch.autograd.grad(-loss, parameters), strict=True):
            parameter.grad = gradient
    return float(loss.detach())


# ---------------------------------------------------------------------------------------------------------- training


class PixelModel(nn.Module):
    """A network for normalised images, as a classifier of images in [0, 1], in which attacks are measured.

    Args:
        network: Maps images ``(B, C, H, W)`` to logits.
        mean: Mean of each channel that the data set subtracts, one for each channel.
        std: Its divisor, positive.
        normalise: Whether the network gets normalised images; if not it gets those in [0, 1], as the authors' does.

    Raises:
        ValueError: If the numbers do not fit.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self, network: nn.Module, mean: Sequence[float] = (0.0,), std: Sequence[float] = (1.0,), normalise: bool = True
    ) -> None:
        super().__init__()
        if len(mean) != len(std) or not mean or min(std) <= 0:
            raise ValueError(f"mean={tuple(mean)}, std={tuple(std)}: expected one of each a channel, std above 0")
        self.network, self.normalise = network, normalise
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, -1, 1, 1), persistent=False)

    def forward(self, pixels: Tensor) -> Tensor:
        """Logits of images in [0, 1], (B, C, H, W)."""
        return self.network((pixels - self.mean) / self.std if self.normalise else pixels)

    def pixels(self, x: Tensor) -> Tensor:
        """Images in [0, 1] from those that a data set has normalised, (B, C, H, W)."""
        return (x * self.std + self.mean).clamp(0, 1)


def stepped_factor(step: int, total: int, warmup: float, drops: Sequence[float]) -> float:
    """Share of the peak learning rate: a linear warm-up, then constant with a tenth left after each drop.

    Args:
        step: Steps taken.
        total: Steps of the run.
        warmup: Share of the run that warms up.
        drops: Shares of the run after which the rate falls to a tenth.
    """
    rising = min(1.0, (step + 1) / (warmup * total + 1))
    return rising * 0.1 ** sum(step >= drop * total for drop in drops)


class AdversarialClassifier(L.LightningModule):
    r"""Train a classifier on perturbed images, with the start of the attack as the option.

    =========== ================================== ======================================= ===================
    `start`     method                             where the step starts                   step, by default
    =========== ================================== ======================================= ===================
    `none`      plain training                     --                                      --
    `zero`      FGSM                               at the image                            epsilon
    `random`    FGSM-RS                            uniform in the cube                     1.25 epsilon
    `learned`   FGSM-SDI                           where the generator says                epsilon
    `many`      PGD training                       uniform in the cube                     2/255, `steps` times
    =========== ================================== ======================================= ===================

    Logged after an epoch: ``train_loss``; ``val_accuracy`` on clean images; ``val_fgsm`` and ``val_pgd``, under one
    step and under `steps` steps of the attack with `epsilon`, every `attack_every` epochs and after the last, else NaN.
    All in %. The attacks on validation images stay inside [0, 1], those in training do not, as in the authors' code.

    The optimisers are stepped by the module itself, so Lightning's `global_step` counts updates of the generator too.

    Args:
        model: The classifier of images in [0, 1].
        optimizer: Builds the classifier's optimiser from parameter groups; its rate is the peak of the schedule.
        start: Where the attack starts, see the table.
        epsilon: Half the width of the cube, in units of the pixels' range, at least 0.
        alpha: Length of the step, at least 0; None for the method's own.
        steps: Steps of `many`, and of the attack on validation images.
        step_size: Length of these steps.
        truth: :math:`\phi` of the smoothed loss, above 0 and at most 1.
        every: :math:`k`, batches between two updates of the generator, at least 1.
        generator: The generator of `learned`, else None.
        generator_rate: Rate of the generator's Adam; its weight decay is 5e-4.
        warmup: Share of the run that warms up.
        drops: Shares of the run after which the rate falls to a tenth.
        schedule_epochs: Epochs that the schedule is laid over, if the run ends before it; None for the run's own.
        all_statistics: Whether batch normalisation also records the attack's passes, as the authors' code does.
        attack_every: Epochs between two attacks on the validation images.
        channels_last: Whether images and weights are kept in the channels-last memory format.

    Raises:
        ValueError: If a number is out of range, or a generator is missing or has no use; in training, if images are
            outside [0, 1].
        Diverged: In training, if the loss is infinite or not a number.
    """

    def __init__(
        self,
        model: PixelModel,
        optimizer: Callable[[list[dict[str, Any]]], Optimizer],
        *,
        start: Start,
        epsilon: float,
        alpha: float | None = None,
        steps: int = 10,
        step_size: float = 2 / 255,
        truth: float = 1.0,
        every: int = 20,
        generator: StartGenerator | None = None,
        generator_rate: float = 1e-3,
        warmup: float = 0.2,
        drops: Sequence[float] = (0.8,),
        schedule_epochs: int | None = None,
        all_statistics: bool = False,
        attack_every: int = 1,
        channels_last: bool = False,
    ) -> None:
        super().__init__()
        if start not in get_args(Start):
            raise ValueError(f"start is {start!r}; expected one of {', '.join(get_args(Start))}")
        if (generator is not None) != (start == "learned"):
            raise ValueError(f"start is {start!r} and generator is {type(generator).__name__}: `learned` needs one")
        _check_sizes(epsilon=epsilon, alpha=alpha or 0.0, step_size=step_size, generator_rate=generator_rate)
        _check_truth(truth)
        counts = {"every": every, "steps": steps, "attack_every": attack_every, "schedule_epochs": schedule_epochs}
        for name, count in counts.items():
            if count is not None and count < 1:
                raise ValueError(f"{name} is {count}; expected at least 1")
        if not 0 <= warmup < 1 or not all(0 < drop <= 1 for drop in drops):
            raise ValueError(f"warmup={warmup}, drops={tuple(drops)}: expected shares of the run")
        self.automatic_optimization = False
        self.model = model.to(memory_format=torch.channels_last) if channels_last else model
        self.generator = generator
        self.build_optimizer = optimizer
        self.start: Start = start
        self.epsilon = epsilon
        self.alpha = alpha if alpha is not None else (1.25 if start == "random" else 1.0) * epsilon
        self.steps, self.step_size, self.truth, self.every = steps, step_size, truth, every
        self.generator_rate, self.warmup, self.drops = generator_rate, warmup, tuple(drops)
        self.schedule_epochs = schedule_epochs
        self.all_statistics, self.attack_every, self.channels_last = all_statistics, attack_every, channels_last
        self.generator_updates = 0
        # NaN, which says that an epoch was not attacked, must go through to the mean.
        self._val = nn.ModuleDict({name: MeanMetric(nan_strategy="disable") for name in ("accuracy", "fgsm", "pgd")})

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Perturb a batch, update the generator if it is its turn, and update the classifier.

        Args:
            batch: Images ``(B, C, H, W)`` as the data set has normalised them, and their classes ``(B,)``.
            batch_idx: Number of the batch in its epoch.

        Raises:
            Diverged: If the loss is infinite or not a number.
        """
        x, y = self._images(batch[0]), batch[1]
        optimizers = self.optimizers()
        optimizer, *rest = optimizers if isinstance(optimizers, list) else [optimizers]
        with nullcontext() if self.all_statistics else frozen_statistics(self.model):
            delta = self._perturbation(x, y, batch_idx, rest)
        loss = smoothed_cross_entropy(_logits(self.model, x + delta), y, self.truth)
        if not torch.isfinite(loss):
            raise Diverged(self.global_step, loss.item())
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()
        self.lr_schedulers().step()  # type: ignore[union-attr]
        self.log("train_loss", loss.detach(), on_step=False, on_epoch=True, batch_size=len(y))

    def _perturbation(self, x: Tensor, y: Tensor, batch_idx: int, rest: list[Any]) -> Tensor:
        cube: dict[str, float] = {"epsilon": self.epsilon, "alpha": self.alpha}
        if self.start == "none":
            return torch.zeros_like(x)
        if self.start == "zero":
            return one_step(self.model, x, y, 0.0, **cube)
        if self.start == "random":
            return one_step(self.model, x, y, random_start(x, self.epsilon), **cube)
        if self.generator is None:
            return pgd(
                self.model, x, y, epsilon=self.epsilon, steps=self.steps, step_size=self.step_size,
                stop_at_success=False, valid=False,
            )  # fmt: skip
        signs = signed_gradient(self.model, x, y)
        if batch_idx % self.every == 0:
            self.generator.train()
            generator_gradients(self.model, self.generator, x, y, signs, truth=self.truth, **cube)
            rest[0].step()
            self.generator_updates += 1
        self.generator.eval()
        with torch.no_grad():
            start = self.generator.start(x, signs, epsilon=self.epsilon)
        return one_step(self.model, x, y, start, **cube)

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Count hits on clean images and, if it is time, on images under one step and under many.

        Args:
            batch: Images ``(B, C, H, W)`` as the data set has normalised them, and their classes ``(B,)``.
            batch_idx: Number of the batch; unused.
        """
        # Lightning validates in inference mode, in which there are no gradients; its tensors must be copied out.
        with torch.inference_mode(False), torch.enable_grad():
            x, y = self._images(batch[0].clone()), batch[1].clone()
            found = {"accuracy": adversarial_accuracy(self.model, x, y), "fgsm": math.nan, "pgd": math.nan}
            last = self.trainer.max_epochs is not None and self.current_epoch + 1 >= self.trainer.max_epochs
            if last or (self.current_epoch + 1) % self.attack_every == 0:
                size = self.epsilon
                one = pgd(self.model, x, y, epsilon=size, steps=1, step_size=size, start="zero")
                many = pgd(self.model, x, y, epsilon=size, steps=self.steps, step_size=self.step_size)
                found["fgsm"] = adversarial_accuracy(self.model, x, y, one)
                found["pgd"] = adversarial_accuracy(self.model, x, y, many)
        for name, value in found.items():
            self._val[name].update(torch.full((len(y),), value, device=y.device))

    def on_validation_epoch_end(self) -> None:
        """Log the three accuracies over all validation images."""
        for name, metric in self._val.items():
            self.log(f"val_{name}", metric.compute())  # type: ignore[operator]
            metric.reset()  # type: ignore[operator]

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """The classifier's optimiser with its schedule, and the generator's, whose rate is constant.

        Raises:
            ValueError: If the trainer has no end, so that no schedule can be laid over it.
        """
        total = self.trainer.estimated_stepping_batches
        if total == float("inf"):
            raise ValueError("the schedule needs the length of the run: give the Trainer max_epochs or max_steps")
        if self.schedule_epochs is not None:
            if not self.trainer.max_epochs or self.trainer.max_epochs < 1:
                raise ValueError("schedule_epochs is set, so the Trainer needs max_epochs")
            total = total * self.schedule_epochs / self.trainer.max_epochs
        optimizer = self.build_optimizer([{"params": [p for p in self.model.parameters() if p.requires_grad]}])
        factor = partial(stepped_factor, total=int(total), warmup=self.warmup, drops=self.drops)
        made: dict[str, Any] = {"optimizer": optimizer, "lr_scheduler": LambdaLR(optimizer, factor)}
        if self.generator is None:
            return made
        adversary = Adam(self.generator.parameters(), lr=self.generator_rate, weight_decay=5e-4)
        return made, {"optimizer": adversary}  # type: ignore[return-value]

    def _images(self, x: Tensor) -> Tensor:
        pixels = self.model.pixels(x)
        return pixels.contiguous(memory_format=torch.channels_last) if self.channels_last else pixels


# --------------------------------------------------------------------------------------------------------------- cost


def step_cost(start: Start, *, steps: int = 10, generator: float = 80.8 / 555.4, every: int = 20) -> float:
    """What a training step costs, in forward passes of the classifier.

    A backward pass for the input alone counts as one forward pass, one for the weights too as two.

    Args:
        start: The method.
        steps: Steps of `many`.
        generator: A forward pass of the generator over one of the classifier; by default those of the paper's networks.
        every: Batches between two updates of the generator.

    Returns:
        Forward passes.

    Raises:
        ValueError: If the method is unknown or a number is out of range.

    >>> [round(step_cost(start), 1) for start in ("none", "zero", "random", "learned", "many")]
    [3, 5, 5, 7.4, 23]
    """
    if start not in get_args(Start):
        raise ValueError(f"start is {start!r}; expected one of {', '.join(get_args(Start))}")
    if steps < 0 or every < 1 or not 0 <= generator < math.inf:
        raise ValueError(f"steps={steps}, every={every}, generator={generator}: expected at least 0, 1 and 0")
    if start == "learned":
        return 7 + generator + (4 + 3 * generator) / every
    return {"none": 3, "zero": 5, "random": 5, "many": 3 + 2 * steps}[start]


def cifar_resnet18(num_classes: int = 10) -> nn.Module:
    """ResNet-18 for images of 32 pixels, as the paper trains: a stem of 3x3 without stride or pooling.

    Args:
        num_classes: Number of logits.

    >>> sum(p.numel() for p in cifar_resnet18().parameters())
    11173962
    """
    from timm.models import create_model

    model = create_model("resnet18", num_classes=num_classes)
    stem = nn.Conv2d(3, 64, 3, padding=1, bias=False)
    nn.init.kaiming_normal_(stem.weight, mode="fan_out", nonlinearity="relu")
    model.set_submodule("conv1", stem)
    model.set_submodule("maxpool", nn.Identity())
    return model


# ------------------------------------------------------------------------------------------------------------- checks


def _in_full(x: Tensor) -> Tensor:
    # Half precision is too coarse for a loss whose gradient's sign is asked for, and for a start inside a small cube.
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def _logits(model: nn.Module, x: Tensor) -> Tensor:
    logits: Tensor = model(x)
    return _in_full(logits)


def _check_truth(truth: float) -> None:
    if not 0 < truth <= 1:
        raise ValueError(f"truth is {truth}; expected above 0 and at most 1")


def _check_sizes(**sizes: float) -> None:
    for name, value in sizes.items():
        if not 0 <= value < math.inf:
            raise ValueError(f"{name} is {value}; expected at least 0")


def _check_attack(x: Tensor, epsilon: float, alpha: float) -> None:
    _check_sizes(**{"epsilon": epsilon, "the step": alpha})
    if x.ndim != 4:
        raise ValueError(f"x has shape {tuple(x.shape)}; expected (B, C, H, W)")
    low, high = (float(v) for v in torch.aminmax(x.detach()))
    if low < 0 or high > 1:
        raise ValueError(f"images go from {low:g} to {high:g}; attacks are measured on images in [0, 1]")
