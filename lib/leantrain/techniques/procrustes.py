r"""Procrustes, the training algorithm: only the weights that have moved most stay; the others decay to zero.

Paper: Yang, Ghasemazar, Ren, Golub, Lemieux, Lis, "Procrustes: a Dataflow and Accelerator for Sparse Deep Neural
Network Training", MICRO 2020, arXiv 2009.10976. The accelerator is in `leantrain.hardware.procrustes`.

Of :math:`N` weights, over all layers jointly, a budget of :math:`k` is *tracked*. Every step of SGD is followed by a
selection. With the share :math:`\rho_t = \lambda^t` of the initial weights :math:`W^{(0)}` that is left in step
:math:`t = 0, 1, \dots`,

.. math::

    s_i = |W_i - \rho_t W^{(0)}_i|, \qquad W_i \leftarrow \rho_t W^{(0)}_i \quad\text{where}\quad s_i \le \theta ,

where :math:`s_i` is the gradient that weight :math:`i` has accumulated. With :math:`\lambda = 1` this is DropBack, the
authors' earlier method: an untracked weight need not be stored, for it can be made again from the seed, but it is not
zero. With :math:`\lambda < 1` it becomes exactly zero once :math:`\rho_t` has underflown, and can be skipped.

The threshold :math:`\theta` is either the exact one, which needs all scores at once, or the estimate of a stream
(DUMIQUE), which needs one number and one pass. For the quantile :math:`\tau = 1 - k/N` every score :math:`x` moves it:

.. math::

    q \leftarrow q\,(1 + \beta\tau) \;\text{ if } x > q, \qquad
    q \leftarrow q\,(1 - \beta(1 - \tau)) \;\text{ otherwise},

and the weight is tracked if :math:`x > q` held before the move.

`DropBack` is a `torch.optim.SGD` with the selection after its step. Of this project it needs `kernels` alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.optim import SGD
from torch.optim.optimizer import ParamsT

from leantrain.kernels import compiled

__all__ = ["DropBack", "Selection", "initial_rate", "stream_select", "top_threshold", "zero_share"]

Selection = Literal["topk", "stream"]

#: Below this share the initial weights count as gone: untracked weights become exactly zero. Our choice; repeated
#: multiplication in single precision would never arrive at zero, only at the smallest denormal number.
_GONE = 1e-7


def initial_rate(step: int, decay: float) -> float:
    r"""The share :math:`\rho_t` of the initial weights that untracked weights still have; exactly 0 below 1e-7.

    Args:
        step: Number of the step, from 0.
        decay: :math:`\lambda`, above 0, at most 1.
    """
    if step < 0:
        raise ValueError(f"step is {step}; steps are counted from 0")
    _check_share("decay", decay, zero=False)
    rate = decay**step
    return rate if rate >= _GONE else 0.0


def top_threshold(scores: Tensor, keep: int) -> float:
    """The largest value that at most `keep` scores exceed: the `keep` + 1st largest of them.

    Args:
        scores: (N,) scores, at least 0.
        keep: Scores that may exceed it, 0 to N; ties at the threshold leave fewer.

    Returns:
        The threshold; below every score if `keep` is N.
    """
    if scores.ndim != 1 or not 0 <= keep <= scores.numel():
        raise ValueError(f"keep is {keep} of scores of shape {tuple(scores.shape)}; expected (N,) scores and 0 to N")
    place = scores.numel() - keep
    if place == 0:
        return -math.inf
    if scores.device.type == "cpu":  # several times as fast as torch's kthvalue
        return float(np.partition(scores.numpy(), place - 1)[place - 1])
    return float(torch.kthvalue(scores, place).values)


@compiled
def _stream(scores: NDArray[np.float32], q: float, up: float, down: float, tracked: NDArray[np.bool_]) -> float:
    """Compare each score with the estimate, note the result, and only then move the estimate."""
    for i in range(scores.size):
        above = scores[i] > q
        tracked[i] = above
        q *= up if above else down
    return q


@compiled
def _stream_by(
    scores: NDArray[np.float32], q: float, up: float, down: float, width: int, tracked: NDArray[np.bool_]
) -> float:
    """The same for `width` scores at once: all meet the same estimate, which moves by the mean of their factors."""
    for first in range(0, scores.size, width):
        last = min(first + width, scores.size)
        hits = 0
        for i in range(first, last):
            tracked[i] = scores[i] > q
            hits += tracked[i]
        q *= (hits * up + (last - first - hits) * down) / (last - first)
    return q


def stream_select(
    scores: NDArray[np.float32], threshold: float, quantile: float, *, beta: float, per_cycle: int = 1
) -> tuple[NDArray[np.bool_], float]:
    r"""Track the scores above a quantile that is estimated while they stream by (DUMIQUE).

    The rule multiplies, so the estimate stays positive and scales with the scores. It remembers about
    :math:`1 / (\beta(1-\tau))` scores on the way down and :math:`1 / (\beta\tau)` on the way up.

    Args:
        scores: (N,) scores, at least 0, in the order of the stream.
        threshold: The estimate before the first score, above 0: zero could not be left again.
        quantile: :math:`\tau`, the share of scores below the threshold, above 0 and below 1.
        beta: Step of the estimate, above 0 and below 1.
        per_cycle: Scores that are compared at once and whose moves are averaged.

    Returns:
        Which scores are tracked, (N,), and the estimate after the last one.

    Raises:
        ValueError: If an argument is out of range.
    """
    _check_stream(threshold, beta, per_cycle)
    if not 0 < quantile < 1:
        raise ValueError(f"quantile is {quantile}; expected above 0 and below 1")
    if scores.ndim != 1 or scores.dtype not in (np.float32, np.float64):
        raise ValueError(f"scores have shape {scores.shape} and dtype {scores.dtype}; expected (N,) floats")
    tracked = np.empty(scores.size, dtype=np.bool_)
    up, down = 1 + beta * quantile, 1 - beta * (1 - quantile)
    if per_cycle == 1:
        return tracked, float(_stream(scores, threshold, up, down, tracked))
    return tracked, float(_stream_by(scores, threshold, up, down, per_cycle, tracked))


class DropBack(SGD):
    r"""SGD within a budget of weights: DropBack, and with `decay` below 1 the algorithm of Procrustes.

    Args:
        params: Parameters or parameter groups. Tensors of fewer than two dimensions (biases, normalisation) are
            trained as usual and stay outside the budget, unless `include_1d`.
        lr: Learning rate.
        keep: Share of the weights to track, 0 to 1; the budget is rounded to whole weights. 1 is plain SGD.
        decay: :math:`\lambda`, what one step leaves of the initial value of untracked weights, above 0, at most 1.
        selection: "topk" for the exact threshold over all weights, "stream" for the estimate.
        beta: Step of the estimate, above 0 and below 1; by default 1e-4 below 100,000 weights and 1e-5 from there on.
        threshold: The estimate before the first step, above 0; later steps take it over from the one before.
        per_cycle: Scores that the estimate takes at once.
        momentum: SGD's momentum; that of an untracked weight is reset with it.
        weight_decay: SGD's weight decay.
        decay_tracked: Let the initial value of tracked weights decay as well, so that only what they have learned is
            left.
        include_1d: Count tensors of fewer than two dimensions in the budget.

    The state of a parameter is a copy of its initial value, `initial`, until that has decayed; the number of steps
    and the estimate are in the parameter groups, so that `state_dict` holds everything that the next step needs.

    Raises:
        ValueError: If a hyperparameter is out of range, or a gradient is sparse or a weight complex.

    Example:
        >>> layer = nn.Linear(32, 8)
        >>> optimizer = DropBack(layer.parameters(), lr=0.1, keep=0.25, decay=0.5)
        >>> for _ in range(30):
        ...     optimizer.zero_grad()
        ...     layer(torch.randn(16, 32)).square().sum().backward()
        ...     _ = optimizer.step()
        >>> int(layer.weight.count_nonzero())
        64
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 0.1,
        *,
        keep: float = 0.1,
        decay: float = 0.9,
        selection: Selection = "topk",
        beta: float | None = None,
        threshold: float = 1e-2,
        per_cycle: int = 1,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        decay_tracked: bool = False,
        include_1d: bool = False,
    ) -> None:
        _check_share("keep", keep, zero=True)
        _check_share("decay", decay, zero=False)
        if selection not in ("topk", "stream"):
            raise ValueError(f"selection is {selection!r}; expected 'topk' or 'stream'")
        _check_stream(threshold, 0.5 if beta is None else beta, per_cycle)
        super().__init__(params, lr, momentum=momentum, weight_decay=weight_decay)
        self.keep, self.decay, self.selection, self.per_cycle = float(keep), float(decay), selection, per_cycle
        self.decay_tracked, self.include_1d = decay_tracked, include_1d
        self.param_groups[0]["threshold"] = float(threshold)
        self.param_groups[0]["steps"] = 0
        self._given_beta = beta

    @property
    def weights(self) -> list[Tensor]:
        """The tensors that share the budget."""
        tensors = [p for group in self.param_groups for p in group["params"] if p.requires_grad]
        return [p for p in tensors if self.include_1d or p.ndim >= 2]

    @property
    def total(self) -> int:
        """N, the number of weights that share the budget."""
        return sum(p.numel() for p in self.weights)

    @property
    def budget(self) -> int:
        """k, the number of weights to track."""
        return round(self.keep * self.total)

    @property
    def beta(self) -> float:
        """Step of the threshold's estimate."""
        if self._given_beta is not None:
            return self._given_beta
        return 1e-4 if self.total < 100_000 else 1e-5

    @property
    def steps(self) -> int:
        """Steps taken so far."""
        return int(self.param_groups[0]["steps"])

    @property
    def rate(self) -> float:
        """The share of their initial value that untracked weights have after the last step."""
        return initial_rate(max(self.steps - 1, 0), self.decay)

    @property
    def threshold(self) -> float:
        """The threshold of the last step's selection; with a stream, the estimate after its last score."""
        return float(self.param_groups[0]["threshold"])

    @torch.no_grad()
    def tracked(self, weight: Tensor) -> Tensor:
        """Which weights of a tensor differ from what they would be untracked, as booleans of its shape.

        Args:
            weight: One of `weights`. Before the first step none of it is tracked; with the full budget all is.
        """
        if self.budget >= self.total:
            return torch.ones_like(weight, dtype=torch.bool)
        if self.steps == 0:
            return torch.zeros_like(weight, dtype=torch.bool)
        return weight != (self.state[weight]["initial"] * self.rate if self.rate else 0.0)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One step of SGD, then the selection.

        Args:
            closure: Evaluates the model again and returns the loss, if given.
        """
        weights = self.weights
        selecting = self.budget < self.total
        step, rate = self.steps, initial_rate(self.steps, self.decay)
        if selecting:
            self._prepare(weights, step, rate)
        loss = super().step(closure)
        self.param_groups[0]["steps"] = step + 1
        if selecting:
            self._select(weights, rate)
        return loss

    def _prepare(self, weights: list[Tensor], step: int, rate: float) -> None:
        """Keep the initial weights; let those of tracked weights decay if asked."""
        for weight in weights:
            if weight.is_complex() or (weight.grad is not None and weight.grad.is_sparse):
                raise ValueError("DropBack needs real weights and dense gradients")
            state = self.state[weight]
            if step == 0:
                state["initial"] = weight.clone(memory_format=torch.preserve_format)
            elif self.decay_tracked and "initial" in state:
                weight.add_(state["initial"], alpha=rate - initial_rate(step - 1, self.decay))

    def _select(self, weights: list[Tensor], rate: float) -> None:
        """Score all weights, find the threshold, and put the untracked ones back."""
        if rate == 0.0:
            for weight in weights:
                self.state[weight].pop("initial", None)
        baselines = [self.state[w]["initial"] * rate if rate else None for w in weights]
        scores = torch.cat(
            [(w if b is None else w - b).abs().reshape(-1) for w, b in zip(weights, baselines, strict=True)]
        )
        for weight, baseline, flat in zip(weights, baselines, self._kept(scores, weights), strict=True):
            kept = flat.view(weight.shape)
            if baseline is None:
                weight.masked_fill_(~kept, 0.0)
            else:
                weight.copy_(torch.where(kept, weight, baseline))
            momentum = self.state[weight].get("momentum_buffer")
            if momentum is not None:
                momentum.masked_fill_(~kept, 0.0)

    def _kept(self, scores: Tensor, weights: list[Tensor]) -> list[Tensor]:
        """Which weights are tracked from now on, one flat tensor a weight."""
        first = self.param_groups[0]
        if self.selection == "topk" or self.budget == 0:
            first["threshold"] = top_threshold(scores, self.budget)
            tracked = scores > first["threshold"]
        else:
            flat = scores.float().cpu().numpy()
            quantile = 1 - self.budget / self.total
            mask, first["threshold"] = stream_select(
                flat, self.threshold, quantile, beta=self.beta, per_cycle=self.per_cycle
            )
            tracked = torch.from_numpy(mask).to(scores.device)
        return list(tracked.split([w.numel() for w in weights]))


def zero_share(model: nn.Module) -> float:
    """The share of exact zeros, in %, among the weights of two or more dimensions of a model."""
    weights = [p for p in model.parameters() if p.ndim >= 2]
    return 100 * sum(int((p == 0).sum()) for p in weights) / sum(p.numel() for p in weights)


def _check_share(name: str, value: float, *, zero: bool) -> None:
    if not (0 <= value <= 1) or (value == 0 and not zero):
        raise ValueError(f"{name} is {value}; expected {'0 to 1' if zero else 'above 0, at most 1'}")


def _check_stream(threshold: float, beta: float, per_cycle: int) -> None:
    if not 0 < threshold < math.inf:
        raise ValueError(f"threshold is {threshold}; the multiplicative rule needs a positive start: it never leaves 0")
    if not 0 < beta < 1:
        raise ValueError(f"beta is {beta}; expected above 0 and below 1")
    if isinstance(per_cycle, bool) or not isinstance(per_cycle, int) or per_cycle < 1:
        raise ValueError(f"per_cycle is {per_cycle!r}; expected a whole number of at least 1")
