r"""CLARS: a layer's rate from its weights and from how much the gradients of single samples disagree.

Paper: Huo, Gu, Huang, "Large Batch Training Does Not Need Warmup", arXiv 2002.01576. CLARS stands for complete
layer-wise adaptive rate scaling.

LARS gives each layer the rate :math:`\eta\,\lVert w_k\rVert / \lVert \nabla_k f\rVert`, and still needs a warm-up.
CLARS divides by the mean norm :math:`a_k` of the gradients of small samples instead. Early in training these point in
all directions: their mean is short while each is long, so the step is short; as they begin to agree the rate rises
by itself, in each layer at its own time.

With the batch gradient :math:`g_k`, weight decay :math:`\lambda` and momentum :math:`\mu`, step t is

.. math::

    a_k &= \frac1n \sum_{j=1}^n \lVert \nabla_k f_{b_j}(w_t) \rVert_2, \qquad d_k = g_k + \lambda w_k, \\
    r_k &= \min\Big(0.1,\ \eta\,\frac{\lVert w_k\rVert}{\lVert d_k\rVert + \epsilon}
           \cdot \frac{\lVert d_k\rVert}{a_k + \epsilon}\Big), \\
    v_k &\leftarrow \mu v_k + d_k, \qquad w_k \leftarrow w_k - \gamma_t\, r_k\, v_k .

The form is that of the authors' released code, which estimates :math:`a_k` from micro-batches :math:`b_j` of eight
samples; the cap of 0.1 is from there too. :class:`LARS` is the same without the second factor and the cap.

The variance factor :meth:`GradientNorms.variance_factor`, the mean squared norm over the squared norm of the mean, is
what both rates are about: over the same samples :math:`\lVert g_k\rVert \le a_k`, and the quotient is about
:math:`M_k^{-1/2}`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from leantrain.training.batch_statistics import frozen_statistics
from leantrain.training.image_classifier import ImageClassifier

__all__ = [
    "CLARS",
    "LARS",
    "GradientNorms",
    "LargeBatchClassifier",
    "extra_cost",
    "layer_groups",
    "micro_batch_norms",
    "polynomial_factor",
    "sample_norms",
]

Loss = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class GradientNorms:
    """Norms of the gradients of small samples, for each parameter tensor.

    Attributes:
        mean: Mean of the norms, a_k in the paper's notation; 0-d tensors.
        mean_square: Mean of the squared norms.
        of_mean: Norm of the mean of the gradients; at most `mean`.
    """

    mean: dict[nn.Parameter, Tensor]
    mean_square: dict[nn.Parameter, Tensor]
    of_mean: dict[nn.Parameter, Tensor]

    def variance_factor(self, parameter: nn.Parameter) -> float:
        """Mean squared norm over the squared norm of the mean: 1 if all samples agree; infinite if they cancel.

        Raises:
            ValueError: If the tensor was not measured.
        """
        if parameter not in self.mean:
            raise ValueError("this parameter was not among those that were measured")
        square = float(self.of_mean[parameter]) ** 2
        return float(self.mean_square[parameter]) / square if square > 0 else math.inf


def micro_batch_norms(
    model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], loss: Loss = F.cross_entropy
) -> GradientNorms:
    """Gradient norms of micro-batches, by one backward pass each.

    The model runs in the mode that it is in. The running statistics of batch normalisation, ``.grad`` and PyTorch's
    random numbers stay as they were.

    Args:
        model: Maps inputs to what `loss` takes.
        batches: Inputs and targets; at least one pair. A micro-batch of one sample gives the paper's quantity where
            the model knows no batch; larger ones average some of the noise away: a_k falls by the root of their size
            if the gradients are independent noise, by nothing if they agree.
        loss: Mean loss of a micro-batch from the model's output and the targets.

    Raises:
        ValueError: If there is no micro-batch, or one is empty.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    norms: list[Tensor] = []
    totals = [torch.zeros_like(p) for p in parameters]
    with frozen_statistics(model), _own_randomness(parameters):
        for x, y in batches:
            if not len(y):
                raise ValueError("a micro-batch is empty")
            value = loss(model(x), y)
            gradients = torch.autograd.grad(value, parameters, allow_unused=True, materialize_grads=True)
            norms.append(torch.stack([torch.linalg.vector_norm(g) for g in gradients]))
            for total, g in zip(totals, gradients, strict=True):
                total.add_(g.detach())
    if not norms:
        raise ValueError("there is no micro-batch, so no norm can be estimated: give at least one")
    means = [torch.linalg.vector_norm(total) / len(norms) for total in totals]
    return _collected(parameters, torch.stack(norms), means)


def sample_norms(
    model: nn.Module, x: Tensor, y: Tensor, loss: Loss = F.cross_entropy, *, chunk: int = 64
) -> GradientNorms:
    """Gradient norms of single samples, exactly, all of a chunk in one pass (`torch.func.vmap` over `grad`).

    ``.grad`` and PyTorch's random numbers stay as they were.

    Args:
        model: Maps inputs `(B, ...)` to what `loss` takes, each sample by itself.
        x: Inputs of n samples, at least one.
        y: Their targets.
        loss: Mean loss of a batch from the model's output and the targets.
        chunk: Samples whose gradients are in memory at a time, at least 1. Each is as large as the model.

    Raises:
        ValueError: If there is no sample, or the model normalises over the batch, so that a sample has no gradient of
            its own.
    """
    if not len(y):
        raise ValueError("there is no sample, so no norm can be measured: give at least one")
    if chunk < 1:
        raise ValueError(f"chunk must be at least 1, got {chunk}")
    if any(isinstance(m, _BatchNorm) and m.training for m in model.modules()):
        raise ValueError(
            "the model normalises over the batch, so a sample has no gradient of its own: use micro_batch_norms"
        )
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    detached = {name: p.detach() for name, p in named.items()}

    def of_one(weights: dict[str, Tensor], sample: Tensor, target: Tensor) -> Tensor:
        return loss(functional_call(model, weights, (sample[None],)), target[None])

    per_sample = vmap(grad(of_one), in_dims=(None, 0, 0), randomness="different")
    parameters = list(named.values())
    norms: list[Tensor] = []
    totals = [torch.zeros_like(p) for p in parameters]
    with _own_randomness(parameters):
        for some, targets in zip(x.split(chunk), y.split(chunk), strict=True):
            gradients = list(per_sample(detached, some, targets).values())
            norms.append(torch.stack([torch.linalg.vector_norm(g.flatten(1), dim=1) for g in gradients], dim=1))
            for total, g in zip(totals, gradients, strict=True):
                total.add_(g.sum(0))
    means = [torch.linalg.vector_norm(total) / len(y) for total in totals]
    return _collected(parameters, torch.cat(norms), means)


class _LayerwiseRate(Optimizer):
    """Momentum SGD whose rate is multiplied, for each tensor, by a ratio of the present step."""

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float,
        *,
        eta: float,
        momentum: float,
        weight_decay: float,
        eps: float,
    ) -> None:
        super().__init__(
            params,
            {
                "lr": lr,
                "eta": eta,
                "momentum": momentum,
                "weight_decay": weight_decay,
                "eps": eps,
                "layerwise": True,
            },
        )

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; its own values override the defaults.

        Raises:
            ValueError: If a value is out of range. The optimiser is then as it was.
        """
        super().add_param_group(param_group)
        try:
            _check(self.param_groups[-1])
        except ValueError:
            self.param_groups.pop()
            raise

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step.

        Args:
            closure: Evaluates the loss and its gradients anew; called once, before the step.

        Returns:
            What `closure` returned, or None.

        Raises:
            ValueError: If the optimiser lacks a norm that it needs. Nothing has been changed then.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._ready()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                d = p.grad.add(p, alpha=group["weight_decay"]) if group["weight_decay"] else p.grad
                state = self.state[p]
                if "momentum_buffer" not in state:
                    state["momentum_buffer"] = d.clone()
                else:
                    state["momentum_buffer"].mul_(group["momentum"]).add_(d)
                # The ratio multiplies the buffer from outside: old momentum is not rescaled when it changes.
                if group["layerwise"]:
                    state["ratio"] = self._ratio(p, d, group)
                    p.sub_(group["lr"] * state["ratio"] * state["momentum_buffer"])
                else:
                    p.add_(state["momentum_buffer"], alpha=-group["lr"])
        return loss

    def ratios(self) -> dict[Tensor, float]:
        """The ratio r_k of the last step, for each tensor that had one."""
        return {p: float(state["ratio"]) for p, state in self.state.items() if "ratio" in state}

    def _ready(self) -> None:
        """Raise if a norm is missing; plain LARS needs none."""

    def _ratio(self, p: Tensor, d: Tensor, group: dict[str, Any]) -> Tensor:
        raise NotImplementedError


class LARS(_LayerwiseRate):
    r"""Layer-wise adaptive rate scaling, :math:`r_k = \eta\,\lVert w_k\rVert / (\lVert d_k\rVert + \epsilon)`.

    It has the order of operations of :class:`CLARS`, so that a comparison is about the ratio alone. Libraries put the
    ratio into the gradient before the momentum; both agree while ratios do not change.

    Args:
        params: Parameters or groups, see :func:`layer_groups`. A group with ``layerwise`` False takes plain
            momentum SGD steps.
        lr: Global rate :math:`\gamma \ge 0`; in the tens, because ratios are small.
        eta: Trust coefficient :math:`\eta \ge 0`.
        momentum: :math:`\mu`, at least 0 and below 1.
        weight_decay: :math:`\lambda \ge 0`, also for tensors that are not scaled.
        eps: Added to the norm in the denominator, >= 0.

    Where the weights or d are all zero the ratio is 1.

    Raises:
        ValueError: If a hyperparameter is out of range.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float,
        *,
        eta: float = 0.001,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        eps: float = 1e-6,
    ) -> None:
        super().__init__(params, lr, eta=eta, momentum=momentum, weight_decay=weight_decay, eps=eps)

    def _ratio(self, p: Tensor, d: Tensor, group: dict[str, Any]) -> Tensor:
        weight, gradient = torch.linalg.vector_norm(p), torch.linalg.vector_norm(d)
        usual = group["eta"] * weight / (gradient + group["eps"])
        return torch.where((weight > 0) & (gradient > 0), usual, 1.0)


class CLARS(LARS):
    r"""Complete layer-wise adaptive rate scaling, see the equations at the head of the module.

    Before each :meth:`step`, or before some of them, hand over the norms :math:`a_k` by :meth:`see`. Once seen, they
    serve until the next ones come.

    Args:
        params: As for :class:`LARS`.
        lr: Global rate :math:`\gamma \ge 0`.
        eta: :math:`\eta \ge 0`; ten times that of LARS, which is about what the second factor takes away.
        momentum: :math:`\mu`, at least 0 and below 1.
        weight_decay: :math:`\lambda \ge 0`.
        eps: Added to norms in denominators, >= 0.
        max_ratio: Largest ratio; `math.inf` for none.

    Where the weights or d are all zero, the first factor is 1.

    Raises:
        ValueError: If a hyperparameter is out of range.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float,
        *,
        eta: float = 0.01,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        eps: float = 1e-6,
        max_ratio: float = 0.1,
    ) -> None:
        if not max_ratio > 0:
            raise ValueError(f"max_ratio must be positive, got {max_ratio}")
        self.max_ratio = max_ratio
        super().__init__(params, lr, eta=eta, momentum=momentum, weight_decay=weight_decay, eps=eps)

    def see(self, norms: Mapping[nn.Parameter, Tensor]) -> None:
        """Take the mean gradient norms :math:`a_k` that the coming steps divide by.

        Args:
            norms: Tensor -> mean norm, not negative; such as :attr:`GradientNorms.mean`. Tensors that the optimiser
                does not hold are left out.
        """
        for group in self.param_groups:
            for p in group["params"]:
                if group["layerwise"] and p in norms:
                    self.state[p]["mean_norm"] = torch.as_tensor(norms[p], device=p.device).detach()

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "max_ratio": self.max_ratio}

    def _ready(self) -> None:
        for number, group in enumerate(self.param_groups):
            for p in group["params"]:
                if group["layerwise"] and p.grad is not None and "mean_norm" not in self.state.get(p, {}):
                    raise ValueError(
                        f"a tensor of shape {tuple(p.shape)} in group {number} has no mean gradient norm: call see() "
                        "before step(), with the norms of all tensors that are scaled"
                    )

    def _ratio(self, p: Tensor, d: Tensor, group: dict[str, Any]) -> Tensor:
        quotient = torch.linalg.vector_norm(d) / (self.state[p]["mean_norm"] + group["eps"])
        return (super()._ratio(p, d, group) * quotient).clamp(max=self.max_ratio)


def layer_groups(model: nn.Module, plain_rate: float | None = None) -> list[dict[str, Any]]:
    """Parameter groups for LARS and CLARS: tensors of one dimension take plain steps.

    Biases and the scales of normalisations have no norm that says anything about their step. At the rates in the tens
    that the other tensors need, a plain step must have a rate of its own.

    Args:
        model: Its trainable parameters are grouped.
        plain_rate: Rate of the tensors of fewer than two dimensions; None for the optimiser's.

    Returns:
        At most two groups, of which the second has ``layerwise`` False. `torch.optim.SGD` takes them too.
    """
    trainable = [p for p in model.parameters() if p.requires_grad]
    plain: dict[str, Any] = {"params": [p for p in trainable if p.ndim < 2], "layerwise": False}
    if plain_rate is not None:
        plain["lr"] = plain_rate
    groups = [{"params": [p for p in trainable if p.ndim >= 2], "layerwise": True}, plain]
    return [group for group in groups if group["params"]]


def polynomial_factor(step: int, total_steps: int, warmup_steps: int = 0, power: float = 2.0) -> float:
    """Share of the peak rate at a step (the first is 0): a line up if there is a warm-up, then a polynomial down.

    Args:
        step: Steps already taken, at least 0; from `total_steps` on the factor is 0.
        total_steps: Length of the run, at least 1.
        warmup_steps: Steps before the peak, at least 0 and below `total_steps`.
        power: Exponent of the decay, positive; 2 in the authors' code.

    Raises:
        ValueError: If an argument is out of range.

    Example:
        >>> [polynomial_factor(step, 4) for step in range(5)]
        [1.0, 0.5625, 0.25, 0.0625, 0.0]
        >>> [polynomial_factor(step, 6, warmup_steps=2) for step in range(3)]
        [0.3333333333333333, 0.6666666666666666, 1.0]
    """
    if step < 0 or total_steps < 1 or not 0 <= warmup_steps < total_steps or not 0 < power < math.inf:
        raise ValueError(
            "a schedule needs step >= 0, total_steps >= 1, a warm-up shorter than the run and a positive power, got "
            f"step={step}, total_steps={total_steps}, warmup_steps={warmup_steps}, power={power}"
        )
    if step < warmup_steps:
        return (step + 1) / (warmup_steps + 1)
    return (1 - min((step - warmup_steps) / (total_steps - warmup_steps), 1.0)) ** power


def extra_cost(batch_size: int, micro_batches: int = 64, micro_size: int = 8) -> float:
    """Samples that the estimate of a_k passes through the model, over those of the batch.

    Raises:
        ValueError: If a number is less than 1.

    Example:
        >>> extra_cost(16_384), extra_cost(512)
        (0.03125, 1.0)
    """
    for name, size in {"batch_size": batch_size, "micro_batches": micro_batches, "micro_size": micro_size}.items():
        if size < 1:
            raise ValueError(f"{name} must be at least 1, got {size}")
    return micro_batches * micro_size / batch_size


class LargeBatchClassifier(ImageClassifier):
    """Train an image classifier with large batches: accumulated gradients, a polynomial schedule, norms for CLARS.

    Args:
        model: Maps images ``(B, C, H, W)`` to logits ``(B, num_classes)``.
        optimizer: Builds the optimiser from the groups of :func:`layer_groups`, such as ``partial(CLARS, lr=20.0)`` or
            ``partial(torch.optim.SGD, lr=0.4, momentum=0.9)``. If it is a :class:`CLARS`, the norms are estimated.
        num_classes: Number of classes, at least 2.
        physical_batch: Images in one pass, at least 1. The gradient of a batch is put together from such parts; batch
            normalisation sees the parts.
        accumulate: Batches of the data module, all of one size, that make one large batch, at least 1. What remains
            at the end of an epoch makes no step.
        micro_batches: Number n of micro-batches for the estimate, at least 1.
        micro_size: Images in a micro-batch, at least 1; 1 measures single samples exactly. They are the first of the
            last batch, which comes in random order.
        refresh: The norms are estimated anew every so many steps, at least 1.
        warmup_epochs: Length of the warm-up, at least 0; 0 for none.
        plain_rate: See :func:`layer_groups`.
        channels_last: See :class:`~leantrain.training.ImageClassifier`.

    Attributes:
        step_losses: Training loss of each large batch so far, before its step.

    Raises:
        ValueError: If a number is out of range; in training, if a batch is smaller than the micro-batches together.
        Diverged: In training, if the loss is infinite or not a number.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Callable[[list[dict[str, Any]]], Optimizer],
        *,
        num_classes: int,
        physical_batch: int = 250,
        accumulate: int = 1,
        micro_batches: int = 8,
        micro_size: int = 8,
        refresh: int = 1,
        warmup_epochs: float = 0.0,
        plain_rate: float | None = None,
        channels_last: bool = False,
    ) -> None:
        super().__init__(model, optimizer, num_classes=num_classes, channels_last=channels_last)
        sizes = {"physical_batch": physical_batch, "accumulate": accumulate, "refresh": refresh}
        for name, size in {**sizes, "micro_batches": micro_batches, "micro_size": micro_size}.items():
            if size < 1:
                raise ValueError(f"{name} must be at least 1, got {size}")
        if not 0 <= warmup_epochs < math.inf:
            raise ValueError(f"warmup_epochs must be a finite number, at least 0, got {warmup_epochs}")
        self.automatic_optimization = False
        self.physical_batch, self.accumulate = physical_batch, accumulate
        self.micro_batches, self.micro_size, self.refresh = micro_batches, micro_size, refresh
        self.warmup_epochs = warmup_epochs
        self.plain_rate = plain_rate
        self.step_losses: list[float] = []
        self._mean_loss = 0.0

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """The optimiser over the groups, and its schedule over the whole run.

        Raises:
            ValueError: If the trainer has no end, or the warm-up is as long as the run.
        """
        epochs = self.trainer.max_epochs
        if self.trainer.estimated_stepping_batches == math.inf or not epochs or epochs < 1:
            raise ValueError("the schedule needs the length of the run: give the Trainer max_epochs")
        steps = epochs * (int(self.trainer.num_training_batches) // self.accumulate)
        if not steps:
            raise ValueError(
                f"an epoch has fewer than the {self.accumulate} batches that make a step: accumulate fewer"
            )
        warmup = round(self.warmup_epochs * steps / epochs)
        if warmup >= steps:
            raise ValueError(f"a warm-up of {self.warmup_epochs} epochs does not end before the run's {epochs}")
        optimizer = self.build_optimizer(layer_groups(self.model, self.plain_rate))
        schedule = LambdaLR(optimizer, lambda step: polynomial_factor(step, steps, warmup))
        return {"optimizer": optimizer, "lr_scheduler": schedule}

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Add to the gradient of a large batch; when that is complete, look at the small ones and take the step.

        Returns:
            The mean loss of this batch, a scalar without gradient.

        Raises:
            Diverged: If the loss is infinite or not a number.
            ValueError: If the batch is smaller than the micro-batches together.
        """
        x, y = batch
        optimizer = cast(LightningOptimizer, self.optimizers())
        if batch_idx % self.accumulate == 0:
            optimizer.zero_grad()
            self._mean_loss = 0.0
        mean = torch.zeros((), device=x.device)
        for part in zip(x.split(self.physical_batch), y.split(self.physical_batch), strict=True):
            loss = super().training_step(part, batch_idx) * (len(part[1]) / len(y))
            self.manual_backward(loss / self.accumulate)
            mean = mean + loss.detach()
        self._mean_loss += float(mean) / self.accumulate
        if (batch_idx + 1) % self.accumulate == 0:
            inner = optimizer.optimizer
            if isinstance(inner, CLARS) and self.global_step % self.refresh == 0:
                inner.see(self.gradient_norms(x, y).mean)
            optimizer.step()
            cast(LambdaLR, self.lr_schedulers()).step()
            self.step_losses.append(self._mean_loss)
        return mean

    def gradient_norms(self, x: Tensor, y: Tensor) -> GradientNorms:
        """Gradient norms of the first micro-batches of a batch.

        Args:
            x: Images ``(B, C, H, W)``.
            y: Classes ``(B,)``.

        Raises:
            ValueError: If there are fewer images than the micro-batches need.
        """
        wanted = self.micro_batches * self.micro_size
        if len(y) < wanted:
            raise ValueError(
                f"{self.micro_batches} micro-batches of {self.micro_size} need {wanted} images, the batch has {len(y)}"
            )
        x, y = x[:wanted], y[:wanted]
        if self.channels_last:
            x = x.contiguous(memory_format=torch.channels_last)
        if self.micro_size == 1:
            return sample_norms(self.model, x, y)
        pairs = zip(x.split(self.micro_size), y.split(self.micro_size), strict=True)
        return micro_batch_norms(self.model, pairs, _in_single_precision)


def _in_single_precision(logits: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), y)


def _collected(parameters: list[nn.Parameter], norms: Tensor, of_mean: list[Tensor]) -> GradientNorms:
    """Put norms `(n, tensors)` and the norms of the mean gradients beside their tensors."""
    mean, mean_square = norms.mean(0), norms.square().mean(0)
    return GradientNorms(
        mean=dict(zip(parameters, mean.unbind(), strict=True)),
        mean_square=dict(zip(parameters, mean_square.unbind(), strict=True)),
        of_mean=dict(zip(parameters, of_mean, strict=True)),
    )


def _own_randomness(parameters: list[nn.Parameter]) -> Any:
    devices = sorted({p.device.index or 0 for p in parameters if p.device.type == "cuda"})
    return torch.random.fork_rng(devices=devices)


def _check(group: dict[str, Any]) -> None:
    for name in ("lr", "eta", "weight_decay", "eps"):
        if not 0 <= group[name] < math.inf:
            raise ValueError(f"{name} must be a finite number, at least 0, got {group[name]}")
    if not 0 <= group["momentum"] < 1:
        raise ValueError(f"momentum must be at least 0 and below 1, got {group['momentum']}")
