r"""OREPA: a block of many branches that is one convolution at every training step.

Paper: Hu, Feng, Hua, Lai, Huang, Gong and Hua, "Online Convolutional Re-parameterization", CVPR 2022, arXiv 2204.00826.

Blocks with parallel branches train to better networks than single convolutions and are folded into one for inference.
In training each branch runs on feature maps, because each ends in a batch normalisation, which is not linear in the
weights. OREPA takes these norms out, ends every branch in a scaling vector :math:`\gamma_j` instead, and puts one norm
behind the sum. What is left inside is linear, so that the kernel

.. math::

    W = \sum_j \operatorname{diag}(\gamma_j)\, W_j, \qquad y = \mathrm{BN}(W * x),

can be made from the branches' weights in every forward pass, and a single convolution runs on the feature maps. The
cost of the branches no longer depends on the batch or on the size of the maps.

Beside the block stand those that it is compared with: the diverse-branch block (`DiverseBranch`), the block of RepVGG
(`RepVGGBlock`), and the six branches of OREPA with a norm each (`NormedBranches`). `convert` puts any of them into a
ResNet, `deploy` folds them into plain convolutions.

>>> block = OREPA(16, 32, 3, stride=2)
>>> x = torch.randn(2, 16, 8, 8)
>>> tuple(block(x).shape), tuple(block.kernel().shape)
((2, 32, 4, 4), (32, 16, 3, 3))
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import combinations
from typing import Any, Literal, cast, get_args

import torch
from timm.models.resnet import BasicBlock, ResNet
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = [
    "BRANCHES",
    "OREPA",
    "DeepStem",
    "DiverseBranch",
    "Kind",
    "NormedBranches",
    "OREPA1x1",
    "RepVGGBlock",
    "blocks_of",
    "branch_similarity",
    "compose_kernels",
    "convert",
    "deploy",
    "fold_norm",
    "frequency_prior",
    "make_block",
    "narrow_resnet18",
]

#: What stands in the place of a convolution and its norm.
Kind = Literal["plain", "dbb", "orepa", "orepa-fused", "orepa-unscaled", "normed-branches", "repvgg", "repvgg-orepa"]
#: The six branches of a block.
BRANCHES = ("KxK", "average", "prior", "1x1-KxK", "1x1", "separable")
#: Their first scalings.
_SCALES = (0.25, 0.25, 0.0, 0.5, 1.0, 0.5)
_EXPANSION = 8  # of the depthwise convolution in the last branch


def frequency_prior(channels: int, kernel: int) -> Tensor:
    r"""The constant cosine patterns of the third branch.

    Args:
        channels: O; the first half of the patterns runs over rows, the other over columns.
        kernel: K.

    Returns:
        :math:`\Phi` ``(O, K, K)`` with :math:`\cos(\pi (h + 1/2)(c + 1) / K)`, or with the column and
        :math:`c - O/2` in the second half.
    """
    c = torch.arange(channels, dtype=torch.float64)
    place = torch.arange(kernel, dtype=torch.float64) + 0.5
    rows = c < channels / 2
    number = torch.where(rows, c + 1, c + 1 - channels / 2)
    waves = torch.cos(math.pi * number[:, None] * place / kernel)
    vertical = waves[:, :, None].expand(-1, -1, kernel)
    return torch.where(rows[:, None, None], vertical, waves[:, None, :]).float()


def compose_kernels(first: Tensor, second: Tensor) -> Tensor:
    r"""The kernel of two convolutions in a row without padding between them.

    :math:`W[o, i] = \sum_t W_2[o, t] \circledast W_1[t, i]`, with the true convolution of the kernels. Deep-learning
    libraries correlate instead of convolving, so the second kernel is turned by 180 degrees.

    Args:
        first: Applied first, ``(T, I, K1, K1)``.
        second: Applied to its output, ``(O, T, K2, K2)``.

    Returns:
        ``(O, I, K1 + K2 - 1, K1 + K2 - 1)``.
    """
    reach = second.shape[-1] - 1
    return F.conv2d(first.transpose(0, 1), second.flip(-1, -2), padding=reach).transpose(0, 1)


def fold_norm(kernel: Tensor, norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """Fold a batch normalisation, in evaluation mode, into the convolution before it.

    Args:
        kernel: ``(O, I, K, K)`` of a convolution without bias.
        norm: What follows it.

    Returns:
        Kernel and bias.
    """
    std = (cast(Tensor, norm.running_var) + norm.eps).sqrt()
    weight, bias = (norm.weight, norm.bias) if norm.affine else (torch.ones_like(std), torch.zeros_like(std))
    return kernel * (weight / std).view(-1, 1, 1, 1), bias - cast(Tensor, norm.running_mean) * weight / std


def _check(inputs: int, outputs: int, kernel: int, stride: int, padding: int | None, groups: int) -> int:
    """The padding, after all numbers were found to be in range."""
    if min(inputs, outputs, kernel, stride, groups) < 1 or inputs % groups or outputs % groups:
        raise ValueError(
            f"channels {inputs} to {outputs}, kernel {kernel}, stride {stride}, groups {groups}: expected positive "
            "numbers, and groups that divide the channels"
        )
    if kernel % 2 == 0:
        raise ValueError(f"kernel {kernel}: expected an odd size")
    if padding is not None and padding != kernel // 2:
        raise ValueError(
            f"padding {padding}: expected {kernel // 2}, half the kernel, so that the branches fit together"
        )
    return kernel // 2


def _kaiming(*shape: int, slope: float = 0.0) -> nn.Parameter:
    weight = torch.empty(*shape)
    nn.init.kaiming_uniform_(weight, a=slope)
    return nn.Parameter(weight)


class OREPA(nn.Module):
    """Six linear branches, squeezed into one convolution in every pass, and one norm.

    Args:
        in_channels: I.
        out_channels: O.
        kernel_size: K, odd.
        stride: Of the convolution.
        padding: K // 2; None takes it.
        groups: g; as in the authors' code the inner width of the branch 1x1-KxK is I up to four groups, else 2I.
        scaling: Whether the branches end in learnt scalings. Without, they are added as they are.
        fused: Whether the kernel's gradients are computed by a function of our own, which keeps nothing but the
            weights, or by autograd, which keeps scaled copies of the larger ones. The squeezed kernel itself is kept
            by the convolution in both cases.
        norm: Whether a batch normalisation follows.
        branches: Which branches there are; all by default.
        init_scale: Factor on the first weights of every branch; 1 is the released code's. The six add up to about
            eleven times the variance that PyTorch gives a convolution, with which a norm makes for small steps.
        slope: Kaiming's a; the variant for RepVGG has 1.

    Attributes:
        scale: The scalings, ``(branches, O)``, or None.

    Raises:
        ValueError: If a number is out of range, or there is no branch or an unknown one.
    """

    prior: Tensor
    identity: Tensor

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 3,
        *,
        stride: int = 1,
        padding: int | None = None,
        groups: int = 1,
        scaling: bool = True,
        fused: bool = False,
        norm: bool = True,
        branches: Sequence[str] = BRANCHES,
        init_scale: float = 1.0,
        slope: float = 0.0,
    ) -> None:
        super().__init__()
        self.padding = _check(in_channels, out_channels, kernel_size, stride, padding, groups)
        if not branches or not set(branches) <= set(BRANCHES) or not init_scale > 0:
            raise ValueError(
                f"branches {list(branches)}: expected some of {', '.join(BRANCHES)}; "
                f"init_scale {init_scale}: expected above 0"
            )
        self.channels, self.size, self.stride, self.groups = (in_channels, out_channels), kernel_size, stride, groups
        self.fused = fused
        self.branches = tuple(b for b in BRANCHES if b in branches)
        own, k = in_channels // groups, kernel_size
        middle = in_channels * (1 if groups <= 4 else 2)
        shapes = {
            "KxK": (out_channels, own, k, k),
            "average": (out_channels, own, 1, 1),
            "prior": (out_channels, own, 1, 1),
            "1x1-KxK": (out_channels, middle // groups, k, k),
            "1x1": (out_channels, own, 1, 1),
            "separable": (out_channels, _EXPANSION * own, 1, 1),
        }
        self.weights = nn.ParameterDict({_key(b): _kaiming(*shapes[b], slope=slope) for b in self.branches})
        if "1x1-KxK" in self.branches:
            self.weights["inner"] = nn.Parameter(torch.zeros(middle, own))
        if "separable" in self.branches:
            self.weights["depthwise"] = _kaiming(_EXPANSION * in_channels, 1, k, k, slope=slope)
        with torch.no_grad():
            for name, weight in self.weights.items():
                # The last branch is a product of two.
                weight.mul_(init_scale**0.5 if name in ("separable", "depthwise") else init_scale)
        self.register_buffer("prior", frequency_prior(out_channels, k), persistent=False)
        self.register_buffer("identity", torch.eye(own).repeat(middle // own, 1), persistent=False)
        first = torch.tensor([_SCALES[BRANCHES.index(b)] for b in self.branches])
        self.scale = nn.Parameter(first[:, None].repeat(1, out_channels)) if scaling else None
        self.bn = nn.BatchNorm2d(out_channels) if norm else None

    def kernel(self) -> Tensor:
        """The squeezed kernel, ``(O, I/g, K, K)``, with gradients for the weights and scalings of all branches."""
        if self.fused:
            names = sorted(self.weights)
            options = (self.branches, tuple(names), self.groups, self.prior, self.identity)
            return _Squeeze.apply(options, self.scale, *(self.weights[name] for name in names))
        return _add(self.scaled_kernels())

    def scaled_kernels(self) -> list[Tensor]:
        """The branches' kernels with their scalings, each ``(O, I/g, K, K)``."""
        return self._kernels(_scalings(self.branches, self.scale))

    def branch_kernels(self) -> list[Tensor]:
        """The kernels W_j of the branches before their scalings, each ``(O, I/g, K, K)``."""
        return self._kernels(_scalings(self.branches, None))

    def _kernels(self, scales: dict[str, Tensor | float]) -> list[Tensor]:
        w, g, k = self.weights, self.groups, self.size
        kernels = []
        for branch in self.branches:
            # Scaled before they grow: most of a branch's last weights are smaller than its kernel.
            weight = w[_key(branch)] * scales[branch]
            if branch == "average":
                weight = weight.expand(-1, -1, k, k) / k**2
            elif branch == "prior":
                weight = weight * self.prior[:, None]
            elif branch == "1x1":
                weight = F.pad(weight, [k // 2] * 4)
            elif branch == "1x1-KxK":
                inner = (w["inner"] + self.identity).unflatten(0, (g, -1))
                weight = torch.einsum("gothw,gti->goihw", weight.unflatten(0, (g, -1)), inner).flatten(0, 1)
            elif branch == "separable":
                wide = w["depthwise"].view(g, self.channels[0] // g, _EXPANSION, k, k)
                spread = weight.view(g, self.channels[1] // g, -1, _EXPANSION)
                weight = torch.einsum("goie,giehw->goihw", spread, wide).flatten(0, 1)
            kernels.append(weight)
        return kernels

    def on_maps(self, x: Tensor) -> list[Tensor]:
        """The branches as layers on feature maps, before scalings: what the squeezed kernel replaces.

        Args:
            x: ``(B, I, H, W)``.

        Returns:
            One ``(B, O, H/s, W/s)`` for each branch.
        """
        w, g, pad, s = self.weights, self.groups, self.padding, self.stride
        found = []
        for branch in self.branches:
            weight = w[_key(branch)]
            if branch == "KxK":
                y = F.conv2d(x, weight, stride=s, padding=pad, groups=g)
            elif branch == "average":
                y = F.avg_pool2d(F.conv2d(x, weight, groups=g), self.size, s, pad)
            elif branch == "prior":
                y = F.conv2d(x, weight, groups=g)
                y = F.conv2d(y, self.prior[:, None], stride=s, padding=pad, groups=self.channels[1])
            elif branch == "1x1-KxK":
                y = F.conv2d(x, (w["inner"] + self.identity)[..., None, None], groups=g)
                y = F.conv2d(y, weight, stride=s, padding=pad, groups=g)
            elif branch == "1x1":
                y = F.conv2d(x, weight, stride=s, groups=g)
            else:
                y = F.conv2d(x, w["depthwise"], stride=s, padding=pad, groups=self.channels[0])
                y = F.conv2d(y, weight, groups=g)
            found.append(y)
        return found

    def forward(self, x: Tensor) -> Tensor:
        """``(B, I, H, W)`` to ``(B, O, H/s, W/s)``: one convolution, and the norm if there is one."""
        y = F.conv2d(x, self.kernel(), stride=self.stride, padding=self.padding, groups=self.groups)
        return y if self.bn is None else self.bn(y)

    def equivalent(self) -> tuple[Tensor, Tensor]:
        """Kernel and bias of the one convolution that the block is in evaluation mode."""
        kernel = self.kernel()
        return (kernel, kernel.new_zeros(len(kernel))) if self.bn is None else fold_norm(kernel, self.bn)


def _key(branch: str) -> str:
    """A branch's name as it may stand in a state dict."""
    return branch.replace("-", "_")


def _add(kernels: Sequence[Tensor]) -> Tensor:
    total = kernels[0]
    for kernel in kernels[1:]:
        total = total + kernel
    return total


class _Squeeze(torch.autograd.Function):
    """The squeezed kernel and its gradients, of which none needs more than the weights and the kernel's gradient G.

    A branch's kernel is a product with its weights, so the gradient of a scaling, <W_j, G>, is the inner product of the
    weights with their own gradient before scaling: no W_j is kept, and none is computed a second time.
    """

    @staticmethod
    def forward(ctx: Any, options: tuple[Any, ...], scale: Tensor | None, *weights: Tensor) -> Tensor:
        branches, names, g, prior, identity = options
        w = dict(zip(names, weights, strict=True))
        ctx.options = options
        ctx.save_for_backward(*(() if scale is None else (scale,)), *weights)
        ctx.scaled = scale is not None
        return _forward(branches, w, scale, g, prior, identity)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        branches, names, g, prior, identity = ctx.options
        saved = list(ctx.saved_tensors)
        scale = saved.pop(0) if ctx.scaled else None
        w = dict(zip(names, saved, strict=True))
        by_name, by_scale = _backward(branches, w, scale, g, prior, identity, grads[0])
        return None, by_scale, *(by_name[name] for name in names)


def _scalings(branches: Sequence[str], scale: Tensor | None) -> dict[str, Tensor | float]:
    if scale is None:
        return dict.fromkeys(branches, 1.0)
    return {branch: own.view(-1, 1, 1, 1) for branch, own in zip(branches, scale, strict=True)}


def _parts(w: dict[str, Tensor], g: int, identity: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """Q + I as ``(g, T/g, I/g)``, and the depthwise kernels as ``(g, I/g, E, K²)``."""
    inner = (w["inner"] + identity).unflatten(0, (g, -1)) if "inner" in w else None
    wide = None
    if "depthwise" in w:
        wide = w["depthwise"].view(g, w["depthwise"].shape[0] // (g * _EXPANSION), _EXPANSION, -1)
    return inner, wide


def _forward(
    branches: Sequence[str], w: dict[str, Tensor], scale: Tensor | None, g: int, prior: Tensor, identity: Tensor
) -> Tensor:
    scales = _scalings(branches, scale)
    (inner, wide), k, outputs = _parts(w, g, identity), prior.shape[-1], len(prior)
    own = identity.shape[1]
    kernel = w["KxK"] * scales["KxK"] if "KxK" in w else prior.new_zeros(outputs, own, k, k)
    for branch in branches:
        weight = w[_key(branch)]
        if branch == "average":
            kernel += weight * scales[branch] / k**2
        elif branch == "prior":
            kernel.addcmul_(weight * scales[branch], prior[:, None])
        elif branch == "1x1":
            kernel[..., k // 2, k // 2] += (weight * scales[branch])[..., 0, 0]
        elif branch == "1x1-KxK" and inner is not None:
            scaled = (weight * scales[branch]).unflatten(0, (g, -1))
            kernel += torch.einsum("gothw,gti->goihw", scaled, inner).flatten(0, 1)
        elif branch == "separable" and wide is not None:
            spread = (weight * scales[branch]).view(g, outputs // g, own, _EXPANSION)
            kernel += torch.einsum("goie,gieh->goih", spread, wide).reshape(outputs, own, k, k)
    return kernel


def _backward(
    branches: Sequence[str],
    w: dict[str, Tensor],
    scale: Tensor | None,
    g: int,
    prior: Tensor,
    identity: Tensor,
    grad: Tensor,
) -> tuple[dict[str, Tensor], Tensor | None]:
    scales = _scalings(branches, scale)
    (inner, wide), k, outputs, own = _parts(w, g, identity), prior.shape[-1], len(prior), identity.shape[1]
    flat, grouped = grad.reshape(g, outputs // g, own, -1), grad.unflatten(0, (g, -1))
    found: dict[str, Tensor] = {}
    raw: dict[str, Tensor] = {}  # gradient of a branch's last weights, before its scaling
    for branch in branches:
        weight = w[_key(branch)]
        if branch == "KxK":
            raw[branch] = grad
        elif branch == "average":
            raw[branch] = grad.mean(dim=(2, 3), keepdim=True)
        elif branch == "prior":
            raw[branch] = torch.einsum("oihw,ohw->oi", grad, prior)[..., None, None]
        elif branch == "1x1":
            raw[branch] = grad[..., k // 2, k // 2][..., None, None]
        elif branch == "1x1-KxK" and inner is not None:
            raw[branch] = torch.einsum("goihw,gti->gothw", grouped, inner).flatten(0, 1)
            scaled = (weight * scales[branch]).unflatten(0, (g, -1))
            found["inner"] = torch.einsum("gothw,goihw->gti", scaled, grouped).flatten(0, 1)
        elif branch == "separable" and wide is not None:
            raw[branch] = torch.einsum("goih,gieh->goie", flat, wide).reshape(weight.shape)
            spread = (weight * scales[branch]).view(g, outputs // g, own, _EXPANSION)
            found["depthwise"] = torch.einsum("goie,goih->gieh", spread, flat).reshape(w["depthwise"].shape)
        found[_key(branch)] = raw[branch] * scales[branch]
    if scale is None:
        return found, None
    return found, torch.stack([(w[_key(b)] * raw[b]).sum(dim=(1, 2, 3)) for b in branches])


class OREPA1x1(nn.Module):
    r"""The block in the place of a 1x1 convolution.

    :math:`W = \operatorname{diag}(\gamma_0) A + \operatorname{diag}(\gamma_1) B C`; of B and C, the factor on the
    smaller side starts as the identity.

    Args:
        in_channels: I.
        out_channels: O.
        stride: Of the convolution.
        groups: Must be 1.
        init_scale: Factor on the first weights, above 0.

    Raises:
        ValueError: If a number is out of range.
    """

    def __init__(
        self, in_channels: int, out_channels: int, *, stride: int = 1, groups: int = 1, init_scale: float = 1.0
    ) -> None:
        super().__init__()
        self.padding = _check(in_channels, out_channels, 1, stride, None, groups)
        if groups != 1 or not init_scale > 0:
            raise ValueError(f"groups={groups}, init_scale={init_scale}: expected 1 group, and above 0")
        self.stride, self.groups = stride, 1
        self.origin = _kaiming(out_channels, in_channels, 1, 1, slope=1.0)
        smaller = min(in_channels, out_channels)
        other = _kaiming(out_channels, in_channels, 1, 1, slope=1.0)
        with torch.no_grad():
            self.origin.mul_(init_scale)
            other.mul_(init_scale)
        eye = nn.Parameter(torch.eye(smaller)[..., None, None])
        self.outer, self.inner = (other, eye) if out_channels > in_channels else (eye, other)
        self.scale = nn.Parameter(torch.tensor([[1.0], [0.5]]).repeat(1, out_channels))
        self.bn = nn.BatchNorm2d(out_channels)

    def kernel(self) -> Tensor:
        """The squeezed kernel, ``(O, I, 1, 1)``."""
        first, second = self.scale[..., None, None, None].unbind(0)
        return self.origin * first + compose_kernels(self.inner, self.outer) * second

    def forward(self, x: Tensor) -> Tensor:
        """``(B, I, H, W)`` to ``(B, O, H/s, W/s)``."""
        return self.bn(F.conv2d(x, self.kernel(), stride=self.stride))

    def equivalent(self) -> tuple[Tensor, Tensor]:
        """Kernel and bias in evaluation mode."""
        return fold_norm(self.kernel(), self.bn)


class DeepStem(nn.Module):
    """A large kernel as three 3x3 blocks in a row, with nothing between them, and one norm.

    Args:
        in_channels: I.
        out_channels: O, also between the layers.
        stride: Of the one convolution.
        layers: Blocks in a row; n of them make a kernel of 2n + 1.
        init_scale: See `OREPA`.
        fused: See `OREPA`.

    Raises:
        ValueError: If a number is out of range.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        stride: int = 2,
        layers: int = 3,
        init_scale: float = 1.0,
        fused: bool = False,
    ) -> None:
        super().__init__()
        if layers < 1:
            raise ValueError(f"layers must be at least 1, got {layers}")
        self.stride, self.padding, self.groups = stride, layers, 1
        self.layers = nn.ModuleList(
            OREPA(out_channels if i else in_channels, out_channels, norm=False, init_scale=init_scale, fused=fused)
            for i in range(layers)
        )
        self.bn = nn.BatchNorm2d(out_channels)

    def kernel(self) -> Tensor:
        """The squeezed kernel, ``(O, I, 2n + 1, 2n + 1)``."""
        kernels = [cast(OREPA, layer).kernel() for layer in self.layers]
        whole = kernels[0]
        for kernel in kernels[1:]:
            whole = compose_kernels(whole, kernel)
        return whole

    def forward(self, x: Tensor) -> Tensor:
        """``(B, I, H, W)`` to ``(B, O, H/s, W/s)``."""
        return self.bn(F.conv2d(x, self.kernel(), stride=self.stride, padding=self.padding))

    def equivalent(self) -> tuple[Tensor, Tensor]:
        """Kernel and bias in evaluation mode."""
        return fold_norm(self.kernel(), self.bn)


class NormedBranches(nn.Module):
    """The six branches of OREPA on feature maps, each with a batch normalisation of its own.

    What the same branches cost if they are folded only after training.

    Args:
        in_channels: I.
        out_channels: O.
        kernel_size: K, odd.
        stride: Of the block.
        groups: As in `OREPA`.
        init_scale: As in `OREPA`.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 3,
        *,
        stride: int = 1,
        groups: int = 1,
        init_scale: float = 1.0,
    ) -> None:
        super().__init__()
        self.inside = OREPA(
            in_channels,
            out_channels,
            kernel_size,
            stride=stride,
            groups=groups,
            scaling=False,
            norm=False,
            init_scale=init_scale,
        )
        self.stride, self.padding, self.groups = stride, self.inside.padding, groups
        self.norms = nn.ModuleList(nn.BatchNorm2d(out_channels) for _ in BRANCHES)

    def forward(self, x: Tensor) -> Tensor:
        """``(B, I, H, W)`` to ``(B, O, H/s, W/s)``."""
        return _add([norm(y) for norm, y in zip(self.norms, self.inside.on_maps(x), strict=True)])

    def equivalent(self) -> tuple[Tensor, Tensor]:
        """Kernel and bias in evaluation mode."""
        pairs = [
            fold_norm(kernel, cast(nn.BatchNorm2d, norm))
            for kernel, norm in zip(self.inside.branch_kernels(), self.norms, strict=True)
        ]
        return _add([kernel for kernel, _ in pairs]), _add([bias for _, bias in pairs])


class _PaddedNorm(nn.Module):
    """A batch normalisation, and padding with what it makes of zero.

    With zeros instead, a later convolution would see another input at the border than its folded form does.
    """

    def __init__(self, channels: int, padding: int) -> None:
        super().__init__()
        self.norm, self.padding = nn.BatchNorm2d(channels), padding

    def of_zero(self) -> Tensor:
        n = self.norm
        return n.bias - cast(Tensor, n.running_mean) * n.weight / (cast(Tensor, n.running_var) + n.eps).sqrt()

    def forward(self, x: Tensor) -> Tensor:
        y = F.pad(self.norm(x), [self.padding] * 4)
        if not self.padding:
            return y
        border = self.of_zero().view(1, -1, 1, 1)
        inside = F.pad(torch.zeros_like(x[:1, :1]), [self.padding] * 4, value=1.0)
        return y + border * inside


class DiverseBranch(nn.Module):
    """The diverse-branch block: KxK, 1x1, 1x1 and average, 1x1 and KxK, each with its norms, on feature maps.

    Args:
        in_channels: I.
        out_channels: O.
        kernel_size: K, odd.
        stride: Of the block.
        groups: Must be 1.

    Raises:
        ValueError: If a number is out of range.
    """

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: int = 3, *, stride: int = 1, groups: int = 1
    ) -> None:
        super().__init__()
        self.padding = _check(in_channels, out_channels, kernel_size, stride, None, groups)
        if groups != 1:
            raise ValueError(f"groups={groups}: expected 1")
        self.size, self.stride, self.groups = kernel_size, stride, 1
        self.origin = nn.Conv2d(in_channels, out_channels, kernel_size, stride, self.padding, bias=False)
        self.point = nn.Conv2d(in_channels, out_channels, 1, stride, bias=False)
        self.before_average = nn.Conv2d(in_channels, out_channels, 1, bias=False)
        self.average_norm = _PaddedNorm(out_channels, self.padding)
        self.inner = nn.Parameter(torch.zeros(in_channels, in_channels, 1, 1))
        self.inner_norm = _PaddedNorm(in_channels, self.padding)
        self.outer = nn.Conv2d(in_channels, out_channels, kernel_size, stride, bias=False)
        self.norms = nn.ModuleList(nn.BatchNorm2d(out_channels) for _ in range(4))

    def _inner(self) -> Tensor:
        eye = torch.eye(len(self.inner), dtype=self.inner.dtype, device=self.inner.device)
        return self.inner + eye[..., None, None]

    def forward(self, x: Tensor) -> Tensor:
        """``(B, I, H, W)`` to ``(B, O, H/s, W/s)``."""
        averaged = F.avg_pool2d(self.average_norm(self.before_average(x)), self.size, self.stride)
        sequence = self.outer(self.inner_norm(F.conv2d(x, self._inner())))
        found = (self.origin(x), self.point(x), averaged, sequence)
        return _add([norm(y) for norm, y in zip(self.norms, found, strict=True)])

    def equivalent(self) -> tuple[Tensor, Tensor]:
        """Kernel and bias in evaluation mode."""
        k, outputs = self.size, self.origin.out_channels
        mean = torch.eye(outputs, dtype=self.inner.dtype, device=self.inner.device)[..., None, None] / k**2
        mean = mean.expand(-1, -1, k, k)
        found: list[tuple[Tensor, Tensor | None]] = [
            (self.origin.weight, None),
            (F.pad(self.point.weight, [k // 2] * 4), None),
        ]
        for first, inner, second in (
            (self.before_average.weight, self.average_norm.norm, mean),
            (self._inner(), self.inner_norm.norm, self.outer.weight),
        ):
            kernel, bias = fold_norm(first, inner)
            # Behind the padded norm the bias is a constant map: every tap of the second kernel sees it.
            found.append((compose_kernels(kernel, second), second.sum(dim=(2, 3)) @ bias))
        total, shift = [], []
        for (kernel, before), norm in zip(found, cast(Iterable[nn.BatchNorm2d], self.norms), strict=True):
            folded, own = fold_norm(kernel, norm)
            gain = norm.weight / (cast(Tensor, norm.running_var) + norm.eps).sqrt()
            total.append(folded)
            shift.append(own if before is None else own + gain * before)
        return _add(total), _add(shift)


class RepVGGBlock(nn.Module):
    """The block of RepVGG: KxK, 1x1 and, if the shape allows it, the identity, each with a norm.

    Args:
        in_channels: I.
        out_channels: O.
        kernel_size: K, odd.
        stride: Of the block.
        groups: Must be 1.
        inside: What the KxK branch is: a convolution, or OREPA without its 1x1 branch.
        init_scale: See `OREPA`.
        fused: See `OREPA`.

    Raises:
        ValueError: If a number is out of range.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 3,
        *,
        stride: int = 1,
        groups: int = 1,
        inside: Literal["convolution", "orepa"] = "convolution",
        init_scale: float = 1.0,
        fused: bool = False,
    ) -> None:
        super().__init__()
        self.padding = _check(in_channels, out_channels, kernel_size, stride, None, groups)
        if groups != 1 or inside not in ("convolution", "orepa"):
            raise ValueError(f"groups={groups}, inside={inside!r}: expected 1, and convolution or orepa")
        self.size, self.stride, self.groups = kernel_size, stride, 1
        if inside == "orepa":
            some = tuple(b for b in BRANCHES if b != "1x1")
            self.origin: nn.Module = OREPA(
                in_channels, out_channels, kernel_size, stride=stride, norm=False, branches=some, slope=1.0,
                init_scale=init_scale, fused=fused,
            )  # fmt: skip
        else:
            self.origin = nn.Conv2d(in_channels, out_channels, kernel_size, stride, self.padding, bias=False)
        self.origin_norm = nn.BatchNorm2d(out_channels)
        self.point = nn.Conv2d(in_channels, out_channels, 1, stride, bias=False)
        self.point_norm = nn.BatchNorm2d(out_channels)
        same = in_channels == out_channels and stride == 1
        self.identity_norm = nn.BatchNorm2d(out_channels) if same else None

    def forward(self, x: Tensor) -> Tensor:
        """``(B, I, H, W)`` to ``(B, O, H/s, W/s)``."""
        y = self.origin_norm(self.origin(x)) + self.point_norm(self.point(x))
        return y if self.identity_norm is None else y + self.identity_norm(x)

    def equivalent(self) -> tuple[Tensor, Tensor]:
        """Kernel and bias in evaluation mode."""
        around = [self.size // 2] * 4
        main = self.origin.kernel() if isinstance(self.origin, OREPA) else cast(Tensor, self.origin.weight)
        pairs = [
            fold_norm(main, self.origin_norm),
            fold_norm(F.pad(self.point.weight, around), self.point_norm),
        ]
        if self.identity_norm is not None:
            eye = torch.eye(len(main), dtype=main.dtype, device=main.device)[..., None, None]
            pairs.append(fold_norm(F.pad(eye, around), self.identity_norm))
        return _add([kernel for kernel, _ in pairs]), _add([bias for _, bias in pairs])


_Folding = OREPA | OREPA1x1 | DeepStem | NormedBranches | DiverseBranch | RepVGGBlock


def make_block(kind: Kind, conv: nn.Conv2d, *, init_scale: float = 1.0, deep_stem: bool = False) -> nn.Module | None:
    """A block of a kind for a convolution without bias and its norm.

    Args:
        kind: What to build. As in the authors' code, OREPA has a block for 1x1 convolutions; the other kinds leave
            them and those of 7x7 or more as they are.
        conv: Gives channels, kernel, stride, padding and groups.
        init_scale: See `OREPA`.
        deep_stem: Whether OREPA builds large kernels from 3x3 blocks too.

    Returns:
        The block with its norm, or None if the convolution stays.

    Raises:
        ValueError: If there is no such kind.
    """
    if kind not in get_args(Kind):
        raise ValueError(f"kind={kind!r}: expected one of {', '.join(get_args(Kind))}")
    inputs, outputs, size, stride = conv.in_channels, conv.out_channels, conv.kernel_size[0], conv.stride[0]
    ours = kind in ("orepa", "orepa-fused", "orepa-unscaled")
    fused = kind == "orepa-fused"
    if kind == "plain" or (size == 1 and not ours) or (size >= 7 and not (ours and deep_stem)):
        return None
    if size == 1:
        return OREPA1x1(inputs, outputs, stride=stride, groups=conv.groups, init_scale=init_scale)
    if size >= 7:
        return DeepStem(inputs, outputs, stride=stride, layers=size // 2, init_scale=init_scale, fused=fused)
    shape: dict[str, Any] = {"stride": stride, "groups": conv.groups}
    build: dict[str, Callable[[], nn.Module]] = {
        "dbb": lambda: DiverseBranch(inputs, outputs, size, **shape),
        "normed-branches": lambda: NormedBranches(inputs, outputs, size, init_scale=init_scale, **shape),
        "repvgg": lambda: RepVGGBlock(inputs, outputs, size, **shape),
        "repvgg-orepa": lambda: RepVGGBlock(inputs, outputs, size, inside="orepa", init_scale=init_scale, **shape),
    }
    if ours:
        return OREPA(
            inputs, outputs, size, scaling=kind != "orepa-unscaled", fused=fused, init_scale=init_scale, **shape
        )
    return build[kind]()


_PAIRS = (("conv1", "bn1"), ("conv2", "bn2"), ("conv3", "bn3"))


def convert(model: nn.Module, kind: Kind, *, init_scale: float = 1.0, deep_stem: bool = False) -> nn.Module:
    """Put blocks of a kind in the place of every convolution and norm of a ResNet of timm or torchvision.

    As in the authors' code, the 1x1 convolutions of shortcuts are replaced beside bottlenecks only.

    Args:
        model: Changed in place, and returned.
        kind: See `make_block`.
        init_scale: See `OREPA`.
        deep_stem: See `make_block`.
    """
    modules = list(model.modules())
    places: list[tuple[Any, str, str]] = [(parent, *pair) for parent in modules for pair in _PAIRS]
    places += [(m.downsample, "0", "1") for m in modules if hasattr(m, "conv3") and hasattr(m, "downsample")]
    for parent, conv_name, norm_name in places:
        if not isinstance(parent, _Folding):
            conv, norm = (getattr(parent, name, None) for name in (conv_name, norm_name))
            if isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
                block = make_block(kind, conv, init_scale=init_scale, deep_stem=deep_stem)
                if block is not None:
                    setattr(parent, conv_name, block)
                    setattr(parent, norm_name, nn.Identity())
    return model


@torch.no_grad()
def deploy(model: nn.Module) -> nn.Module:
    """Fold every block of this module into a plain convolution with a bias, for inference.

    Args:
        model: Changed in place unless it is a block itself. A second call changes nothing.

    Returns:
        The model, or the convolution that the block was.
    """
    if isinstance(model, _Folding):
        kernel, bias = model.equivalent()
        size = kernel.shape[-1]
        conv = nn.Conv2d(
            kernel.shape[1] * model.groups, len(kernel), size, model.stride, model.padding, groups=model.groups
        ).to(kernel)
        conv.weight.copy_(kernel)
        cast(Tensor, conv.bias).copy_(bias)
        return conv
    for name, child in model.named_children():
        setattr(model, name, deploy(child))
    return model


def blocks_of(model: nn.Module) -> Iterator[OREPA]:
    """All blocks with six branches in a model, in their order."""
    return (module for module in model.modules() if isinstance(module, OREPA))


@torch.no_grad()
def branch_similarity(block: OREPA) -> float:
    """How alike the branches are: the mean cosine between the kernels of two of them, -1 to 1.

    Kernels are taken before their scalings. A branch whose kernel is zero counts as at a right angle to the others.

    Args:
        block: With at least two branches.

    Raises:
        ValueError: If it has fewer.
    """
    kernels = [kernel.flatten() for kernel in block.branch_kernels()]
    if len(kernels) < 2:
        raise ValueError("a block with one branch has nothing to compare")
    cosines = [F.cosine_similarity(a, b, dim=0) for a, b in combinations(kernels, 2)]
    return float(torch.stack(cosines).mean())


def narrow_resnet18(
    *, in_chans: int, num_classes: int, width: int = 24, stem_stride: int = 1, blocks: Sequence[int] = (2, 2, 2, 2)
) -> ResNet:
    """A ResNet-18 for small images: its four stages, each as wide as asked, behind a 3x3 stem without pooling.

    Args:
        in_chans: Colour channels.
        num_classes: Logits.
        width: Channels of the first stage, an even number; every further stage doubles them.
        stem_stride: Stride of the stem; the further stages halve the map.
        blocks: Blocks in each of the four stages; the last stages may have none.

    Returns:
        timm's model, for images ``(B, in_chans, H, W)``.

    Raises:
        ValueError: If a number is out of range.
    """
    empty = [count == 0 for count in blocks]
    bad = width < 2 or width % 2 or len(empty) != 4 or empty != sorted(empty) or empty[0] or min(blocks) < 0
    if bad or min(in_chans, num_classes, stem_stride) < 1:
        raise ValueError(
            f"in_chans={in_chans}, num_classes={num_classes}, width={width}, stem_stride={stem_stride}, blocks="
            f"{tuple(blocks)}: expected positive numbers, an even width and four stages"
        )
    last = 4 - sum(empty)
    model = ResNet(
        BasicBlock,  # type: ignore[arg-type]  # timm means the class and says an instance
        layers=tuple(blocks),
        channels=tuple(width * 2 ** min(stage, last - 1) for stage in range(4)),  # an empty stage changes nothing
        in_chans=in_chans,
        num_classes=num_classes,
        stem_type="deep",
        stem_width=width // 2,
        zero_init_last=False,
    )
    stem = nn.Conv2d(in_chans, width, 3, stem_stride, 1, bias=False)
    nn.init.kaiming_normal_(stem.weight, mode="fan_out", nonlinearity="relu")
    model.set_submodule("conv1", stem)
    model.set_submodule("maxpool", nn.Identity())
    return model
