r"""Adan: an adaptive optimiser with Nesterov momentum, without a second gradient.

Paper: Xie, Zhou, Li, Lin, Yan, "Adan: Adaptive Nesterov Momentum Algorithm for Faster Optimizing Deep Models",
arXiv 2208.06677.

Nesterov's method takes its gradient at a point extrapolated along the momentum, which costs a second evaluation.
Adan replaces that gradient by the present one plus a multiple of its change since the last step,
:math:`g_k + \beta_2 (g_k - g_{k-1})`, and keeps three running averages: of the gradient (:math:`m`), of its change
(:math:`v`) and of the squared Nesterov gradient (:math:`n`). The update adds the first two and divides by the root
of the third.

With :math:`d_k = g_k - g_{k-1}`, :math:`d_1 = 0` and :math:`m_0 = v_0 = n_0 = 0`, step :math:`k = 1, 2, \dots` is

.. math::

    m_k &= \beta_1 m_{k-1} + (1-\beta_1) g_k, \qquad v_k = \beta_2 v_{k-1} + (1-\beta_2) d_k, \\
    n_k &= \beta_3 n_{k-1} + (1-\beta_3) (g_k + \beta_2 d_k)^2, \\
    u_k &= \eta \Big(\frac{m_k}{1-\beta_1^k} + \beta_2 \frac{v_k}{1-\beta_2^k}\Big)
           \Big/ \Big(\sqrt{n_k / (1-\beta_3^k)} + \epsilon\Big), \\
    \theta_k &= (\theta_{k-1} - u_k) / (1 + \eta\lambda) \quad\text{(proximal decay)}, \qquad
    \theta_k = (1 - \eta\lambda)\,\theta_{k-1} - u_k \quad\text{(no_prox)}.

The decay factors :math:`\beta_i` are Adam's kind (near 1); the paper prints their complements :math:`1 - \beta_i`.
The form is that of the authors' released code, which starts the averages at zero and corrects their bias, where
Algorithm 1 of the paper starts them from the first gradients.

:class:`Adan` is a `torch.optim.Optimizer` and needs nothing else of this project. In Lightning, return it from
`configure_optimizers`. With :math:`\beta_2 = 0` it is Adam (and, with ``no_prox``, AdamW) to the last bit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from numbers import Real
from typing import Any, Self

import torch
from torch import Tensor
from torch.optim import Optimizer

__all__ = ["Adan", "Coefficients", "adan_update", "adan_update_foreach"]

_STATE = ("exp_avg", "exp_avg_diff", "exp_avg_sq", "neg_prev_grad")


@dataclass(frozen=True)
class Coefficients:
    """The scalars of one step: everything in the update that is the same for all tensors of a group.

    Attributes:
        beta1: Decay of the gradient average, in [0, 1).
        beta2: Decay of the average of gradient differences, and weight of the difference, in [0, 1).
        beta3: Decay of the average of squares, in [0, 1).
        eps: Added to the root of the bias-corrected average of squares.
        momentum: Step size of the gradient average, lr / (1 - beta1^k).
        difference: Step size of the difference average, lr beta2 / (1 - beta2^k).
        root: Bias correction of the denominator, sqrt(1 - beta3^k).
        decay: The product lr x weight decay.
        no_prox: Whether decay multiplies before the update instead of dividing after it.
    """

    beta1: float
    beta2: float
    beta3: float
    eps: float
    momentum: float
    difference: float
    root: float
    decay: float
    no_prox: bool

    @classmethod
    def of(cls, group: dict[str, Any]) -> Self:
        """Coefficients of step ``group["step"]`` (from 1) of a parameter group."""
        beta1, beta2, beta3 = group["betas"]
        k, lr = group["step"], float(group["lr"])
        return cls(
            beta1=beta1,
            beta2=beta2,
            beta3=beta3,
            eps=group["eps"],
            momentum=lr / (1 - beta1**k),
            difference=lr * beta2 / (1 - beta2**k),
            root=math.sqrt(1 - beta3**k),
            decay=lr * group["weight_decay"],
            no_prox=group["no_prox"],
        )


def adan_update(
    param: Tensor, grad: Tensor, m: Tensor, v: Tensor, n: Tensor, neg_prev_grad: Tensor, c: Coefficients
) -> None:
    """Update one tensor and its state in place; `grad` is only read.

    Args:
        param: The parameter, any shape, floating point.
        grad: Its (clipped) gradient, of the same shape and dtype.
        m: Average of gradients.
        v: Average of gradient differences.
        n: Average of squared Nesterov gradients.
        neg_prev_grad: Minus the previous gradient on entry, minus `grad` on return. In between it serves as the
            only work space, so that the step allocates nothing.
        c: The scalars of this step.
    """
    buffer = neg_prev_grad.add_(grad)  # d = g - g_prev
    m.lerp_(grad, 1 - c.beta1)
    v.mul_(c.beta2).add_(buffer, alpha=1 - c.beta2)
    buffer.mul_(c.beta2).add_(grad)  # the Nesterov gradient, g + beta2 d
    n.mul_(c.beta3).addcmul_(buffer, buffer, value=1 - c.beta3)

    denominator = torch.sqrt(n, out=buffer).div_(c.root).add_(c.eps)
    if c.no_prox:
        param.mul_(1 - c.decay)
    param.addcdiv_(m, denominator, value=-c.momentum)
    if c.beta2 > 0:
        param.addcdiv_(v, denominator, value=-c.difference)
    if not c.no_prox:
        param.div_(1 + c.decay)
    torch.neg(grad, out=buffer)


def adan_update_foreach(
    params: list[Tensor],
    grads: list[Tensor],
    m: list[Tensor],
    v: list[Tensor],
    n: list[Tensor],
    neg_prev_grads: list[Tensor],
    c: Coefficients,
) -> None:
    """:func:`adan_update` for lists of tensors of one device and dtype, with one call per operation.

    On an accelerator this replaces thousands of small kernels by a few large ones. The order of operations, hence
    every bit of the result on a CPU, is that of :func:`adan_update`.
    """
    buffers = neg_prev_grads
    torch._foreach_add_(buffers, grads)
    torch._foreach_lerp_(m, grads, 1 - c.beta1)
    torch._foreach_mul_(v, c.beta2)
    torch._foreach_add_(v, buffers, alpha=1 - c.beta2)
    torch._foreach_mul_(buffers, c.beta2)
    torch._foreach_add_(buffers, grads)
    torch._foreach_mul_(n, c.beta3)
    torch._foreach_addcmul_(n, buffers, buffers, value=1 - c.beta3)

    torch._foreach_copy_(buffers, n)
    torch._foreach_sqrt_(buffers)
    torch._foreach_div_(buffers, c.root)
    torch._foreach_add_(buffers, c.eps)
    if c.no_prox:
        torch._foreach_mul_(params, 1 - c.decay)
    torch._foreach_addcdiv_(params, m, buffers, value=-c.momentum)
    if c.beta2 > 0:
        torch._foreach_addcdiv_(params, v, buffers, value=-c.difference)
    if not c.no_prox:
        torch._foreach_div_(params, 1 + c.decay)
    torch._foreach_copy_(buffers, grads)
    torch._foreach_neg_(buffers)


class Adan(Optimizer):
    r"""Adan, with proximal weight decay, optional global gradient clipping and optional restarts.

    State: four tensors per parameter tensor (``exp_avg``, ``exp_avg_diff``, ``exp_avg_sq`` and ``neg_prev_grad``),
    twice Adam's two. It is kept in float32 for bfloat16 and float16 parameters, and in the parameter's own dtype
    otherwise; a checkpoint restores it in that dtype.

    The step count belongs to the parameter group, as in the authors' code, and advances when at least one tensor of
    the group has a gradient. Consequence: a tensor that gets its first gradient at step k > 1 starts from zero
    averages but is bias-corrected as if it had been averaged for k steps, so its first updates are smaller than
    intended. Give tensors that join late (a layer that is unfrozen) a group of their own.

    A tensor without gradient is left alone: no update, no decay, no state. Its next difference is taken against the
    last gradient that it had.

    Args:
        params: Parameters, named parameters, or dictionaries of parameter groups. Real floating point only: complex
            parameters are refused.
        lr: Step size :math:`\eta \ge 0`; a float, or a tensor of one element that is read at each step (which waits
            for the device). Adan wants a larger one than AdamW.
        betas: Decay factors (gradient, gradient difference, squares), each in [0, 1).
        eps: Added to the root in the denominator, >= 0. With 0, an element whose gradients have all been zero becomes
            NaN, as in Adam.
        weight_decay: :math:`\lambda \ge 0`.
        max_grad_norm: Clip the gradient, over all groups together, to this Euclidean norm; 0 switches clipping off.
            The clipped gradient is what the averages and the next difference see. Unlike the authors' code, this
            does **not** change ``p.grad``: a norm logged after the step is the unclipped one. Clipping waits for the
            device once a step, and holds one copy of the gradients while it is in force.
        no_prox: Decay by :math:`1 - \eta\lambda` before the update, as AdamW does, instead of dividing by
            :math:`1 + \eta\lambda` after it.
        foreach: Whether to update many tensors with one call. None chooses as torch does: only when all tensors are
            ordinary ones on a CUDA device. On a CPU the loop over tensors keeps each tensor in the cache and is the
            faster one.
        restart_condition: Called after each step as ``restart_condition(k, path_length)``, where k counts the steps
            since the last start (from 1) and `path_length` is :math:`\sum_t \lVert\theta_t-\theta_{t-1}\rVert^2`
            over those steps, each squared norm weighted by :math:`\sqrt{n_t / (1-\beta_3^t)}`. If it returns True,
            :meth:`restart` is called. A rule of the kind that the paper analyses is
            ``lambda k, path_length: k * path_length > R**2``. Costs a copy of the parameters per step. It is not part
            of `state_dict`; the path length is.

    Raises:
        ValueError: A hyperparameter is out of range, not a number, or differs between groups where it may not; a
            parameter is complex.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]] | Iterable[tuple[str, Tensor]],
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float, float] = (0.98, 0.92, 0.99),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        max_grad_norm: float = 0.0,
        no_prox: bool = False,
        foreach: bool | None = None,
        restart_condition: Callable[[int, float], bool] | None = None,
    ) -> None:
        if restart_condition is not None and not callable(restart_condition):
            raise ValueError(f"restart_condition is {restart_condition!r}: give a function (k, path_length) -> bool")
        self.restart_condition = restart_condition
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "max_grad_norm": max_grad_norm,
            "no_prox": no_prox,
            "foreach": foreach,
        }
        _check(defaults)
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, which starts at step 0; its own values override the defaults.

        Raises:
            ValueError: A value is out of range, `max_grad_norm` is not that of the other groups, or a parameter is
                complex. The optimiser is then as it was.
        """
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            _check(group)
            if group["max_grad_norm"] != self.param_groups[0]["max_grad_norm"]:
                raise ValueError(
                    f"max_grad_norm is {group['max_grad_norm']} in a group and {self.param_groups[0]['max_grad_norm']} "
                    "in the first: the norm is taken over all groups, so set it once, for the optimiser"
                )
            for i, p in enumerate(group["params"]):
                if not p.is_floating_point():
                    raise ValueError(f"parameter {i} has dtype {p.dtype}: Adan takes real floating-point tensors only")
        except ValueError:
            self.param_groups.pop()
            raise
        group["step"] = 0
        group["path_length"] = 0.0

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "restart_condition": self.restart_condition}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state, copying its tensors.

        torch would cast the float32 state of a half-precision parameter to half precision, and share the tensors
        of `state_dict` where no cast is needed; both would change the run that continues.
        """
        super().load_state_dict(state_dict)
        ids = (i for group in state_dict["param_groups"] for i in group["params"])
        params = (p for group in self.param_groups for p in group["params"])
        for i, p in zip(ids, params, strict=True):
            for name in _STATE:
                if name in self.state.get(p, {}):
                    saved = state_dict["state"][i][name]
                    self.state[p][name] = saved.detach().to(p.device, _state_dtype(p), copy=True)

    def restart(self) -> None:
        """Forget all averages and previous gradients, and count steps from 0 again; the parameters stay."""
        for group in self.param_groups:
            group["step"] = 0
            group["path_length"] = 0.0
            for p in group["params"]:
                self.state.pop(p, None)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step.

        Args:
            closure: Evaluates the loss and its gradients anew, with gradients enabled; called once, before the step.

        Returns:
            What `closure` returned, or None.

        Raises:
            RuntimeError: A gradient is sparse. Nothing has been changed then.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        active = [[p for p in group["params"] if p.grad is not None] for group in self.param_groups]
        _refuse_sparse(active)
        scale = self._clip_factor(active)
        for group, params in zip(self.param_groups, active, strict=True):
            if params:
                group["step"] += 1
                before = [p.clone() for p in params] if self.restart_condition else []
                self._update(group, params, scale)
                if self.restart_condition:
                    group["path_length"] += self._path_length(
                        params, before, math.sqrt(1 - group["betas"][2] ** group["step"])
                    )
        if self.restart_condition and any(active):
            steps = max(group["step"] for group in self.param_groups)
            if self.restart_condition(steps, sum(group["path_length"] for group in self.param_groups)):
                self.restart()
        return loss

    def _update(self, group: dict[str, Any], params: list[Tensor], scale: float) -> None:
        c = Coefficients.of(group)
        foreach = group["foreach"] if group["foreach"] is not None else _on_cuda(params)
        batches: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
        for p in params:
            batches.setdefault((p.device, p.dtype), []).append(p)
        for batch in batches.values():
            for some in [batch] if foreach else [[p] for p in batch]:
                self._update_batch(some, scale, c, foreach)

    def _update_batch(self, params: list[Tensor], scale: float, c: Coefficients, foreach: bool) -> None:
        dtype = _state_dtype(params[0])
        grads = [_gradient(p).to(dtype) for p in params]
        if scale != 1.0:
            grads = list(torch._foreach_mul(grads, scale))
        states = [self._state(p, g) for p, g in zip(params, grads, strict=True)]
        masters = [p.to(dtype) for p in params]
        lists = [[state[name] for state in states] for name in _STATE]
        m, v, n, neg_prev_grads = lists
        if foreach:
            adan_update_foreach(masters, grads, m, v, n, neg_prev_grads, c)
        else:
            adan_update(masters[0], grads[0], m[0], v[0], n[0], neg_prev_grads[0], c)
        if dtype != params[0].dtype:
            torch._foreach_copy_(params, masters)

    def _state(self, p: Tensor, grad: Tensor) -> dict[str, Tensor]:
        state = self.state[p]
        if not state:
            for name in _STATE[:3]:
                state[name] = torch.zeros_like(grad, memory_format=torch.preserve_format)
            state["neg_prev_grad"] = grad.neg()
        return state

    def _clip_factor(self, active: list[list[Tensor]]) -> float:
        limit = self.param_groups[0]["max_grad_norm"]
        params = [p for params in active for p in params]
        if limit == 0 or not params:
            return 1.0
        norms = [torch.linalg.vector_norm(_gradient(p), dtype=_state_dtype(p)).to(params[0].device) for p in params]
        norm = float(torch.linalg.vector_norm(torch.stack([x.double() for x in norms])))
        return min(1.0, limit / (norm + self.param_groups[0]["eps"]))

    def _path_length(self, params: list[Tensor], before: list[Tensor], root: float) -> float:
        moves = (
            ((p - old).to(_state_dtype(p)).square() * self.state[p]["exp_avg_sq"].sqrt()).sum()
            for p, old in zip(params, before, strict=True)
        )
        return sum(float(move) for move in moves) / root


def _gradient(p: Tensor) -> Tensor:
    if p.grad is None:
        raise RuntimeError("a parameter lost its gradient during the step")
    return p.grad


def _state_dtype(p: Tensor) -> torch.dtype:
    return torch.float32 if p.dtype in (torch.bfloat16, torch.float16) else p.dtype


def _on_cuda(params: list[Tensor]) -> bool:
    return all(type(p) in (Tensor, torch.nn.Parameter) and p.device.type == "cuda" for p in params)


def _refuse_sparse(active: list[list[Tensor]]) -> None:
    for i, params in enumerate(active):
        for p in params:
            if _gradient(p).layout != torch.strided:
                raise RuntimeError(
                    f"a gradient of group {i}, for a parameter of shape {tuple(p.shape)}, is sparse: Adan needs dense "
                    "gradients; use sparse=False in the embedding, or torch.optim.SparseAdam for that parameter"
                )


def _check(group: dict[str, Any]) -> None:
    lr, betas = group["lr"], group["betas"]
    if isinstance(lr, Tensor) and lr.numel() != 1:
        raise ValueError(f"lr is a tensor of shape {tuple(lr.shape)}: give a number or a tensor of one element")
    values = {name: group[name] for name in ("eps", "weight_decay", "max_grad_norm")}
    values["lr"] = float(lr) if isinstance(lr, Tensor) else lr
    for name, value in values.items():
        if not (isinstance(value, Real) and math.isfinite(value) and float(value) >= 0):
            raise ValueError(f"{name} is {value!r}: it must be a finite number, at least 0")
    if len(betas) != 3 or not all(0 <= beta < 1 for beta in betas):
        raise ValueError(
            f"betas are {betas!r}: give three decay factors in [0, 1), near 1 (the paper prints 1 minus these)"
        )
    if group["foreach"] not in (None, True, False):
        raise ValueError(f"foreach is {group['foreach']!r}: it must be True, False or None")
