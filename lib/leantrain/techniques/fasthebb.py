r"""FastHebb: Hebbian learning of whole batches in a few matrix products.

Paper: Lagani, Gennaro, Fassold and Amato, "FastHebb: Scaling Hebbian Training of Deep Neural Networks to ImageNet
Level", SISAP 2022, arXiv 2207.03172.

A layer of K neurons with weights :math:`w_i \in \mathbb R^D` sees N patches :math:`x_n`. Every neuron moves towards
what it answers to, and away from what is explained already:

.. math::

    \Delta w_i = \sum_n a_{ni} \Big( x_n - \rho_{ni} \Big), \qquad
    \rho_{ni} = w_i \ \text{(soft winner-takes-all)}, \quad
    \rho_{ni} = \sum_{j \le i} r_{nj} w_j \ \text{(principal components)} .

Here :math:`a = c \cdot g` is the gate g (who may learn from which patch) times a weight c that averages the batch.
Evaluated as it stands, the sum has N K D terms, each of which is written to memory. Sum over the patches first, and
nothing of that size is left; with :math:`L` the lower triangle of ones,

.. math::

    \Delta W_\text{SWTA} = A^\top X - \operatorname{diag}(A^\top 1)\, W, \qquad
    \Delta W_\text{HPCA} = A^\top X - \big[(A^\top R) \odot L\big]\, W .

The functions `patch_by_patch`, `grouped`, `merged` and `unfold_free` compute the same numbers, slowest first.

>>> layer = HebbianConv2d(3, 8, 5, rule="hpca")
>>> images = torch.randn(4, 3, 12, 12)
>>> tuple(layer(images).shape), tuple(layer.weight.grad.shape)  # in training, a pass leaves -dW as gradient
((4, 8, 8, 8), (8, 3, 5, 5))
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast, get_args

import lightning as L
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.grad import conv2d_weight

from leantrain.data.seeded import Loader, SeededData
from leantrain.training import Diverged

__all__ = [
    "IMAGENET",
    "SMALL",
    "Aggregation",
    "Form",
    "HebbianConv2d",
    "HebbianLinear",
    "HebbianNet",
    "HebbianPretraining",
    "LayerShape",
    "Passes",
    "RelativeNorm",
    "Rule",
    "Stage",
    "Whitening",
    "aggregation_weights",
    "cheapest_block",
    "grouped",
    "layer_shapes",
    "merged",
    "patch_by_patch",
    "readout",
    "set_hebbian",
    "swta_gate",
    "unfold_free",
]

#: Soft winner-takes-all, or Hebbian principal component analysis.
Rule = Literal["swta", "hpca"]
#: How the sum over patches is evaluated.
Form = Literal["patch", "grouped", "merged", "unfold-free"]
#: Average over the batch: each neuron's patches in proportion to their gates, or all patches alike.
Aggregation = Literal["gate", "mean"]

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": torch.relu,
    "tanh": torch.tanh,
    "identity": lambda x: x,
}
_BLOCK = 128  # neurons; matrix products of this height run at full speed on processors and GPUs


def swta_gate(cosine: Tensor, temperature: float = 0.02) -> Tensor:
    r"""Who wins a patch: the softmax over the neurons of :math:`((1 + \cos)/2)^2 / T`.

    Args:
        cosine: Cosine between patch and neuron, ``(N, K)`` or ``(B, K, H, W)``, -1 to 1.
        temperature: T, above 0; near 0 a single neuron wins.

    Returns:
        Gates of the same shape, 0 to 1, that sum to 1 over the neurons.

    Raises:
        ValueError: If the temperature is not above 0.
    """
    if not temperature > 0:
        raise ValueError(f"temperature must be above 0, got {temperature}")
    return torch.softmax(((1 + cosine) / 2).square() / temperature, dim=1)


def aggregation_weights(gate: Tensor, how: Aggregation) -> Tensor:
    r"""The weights c with which a batch of updates is averaged.

    Args:
        gate: ``(N, K)`` or ``(B, K, H, W)``.
        how: `gate`: :math:`|g_{ni}| / \sum_m |g_{mi}|`, and 0 for a neuron whose gates are all 0; `mean`: 1/N.

    Returns:
        Weights of the same shape.

    Raises:
        ValueError: If there is no patch, or no such average.
    """
    if how not in get_args(Aggregation):
        raise ValueError(f"how={how!r}: expected one of {', '.join(get_args(Aggregation))}")
    patches = gate.numel() // max(1, gate.shape[1])
    if patches == 0:
        raise ValueError("there is no patch to learn from: the batch is empty")
    if how == "mean":
        return torch.full_like(gate, 1 / patches)
    size = gate.abs()
    total = size.sum(dim=[d for d in range(gate.ndim) if d != 1], keepdim=True)
    return size / torch.where(total > 0, total, torch.ones_like(total))


def patch_by_patch(x: Tensor, w: Tensor, a: Tensor, r: Tensor | None = None) -> Tensor:
    """The definition: one patch after the other.

    Args:
        x: Patches ``(N, D)``.
        w: Weights ``(K, D)``.
        a: Gate times aggregation weight, ``(N, K)``.
        r: Coefficients of the reconstruction, ``(N, K)``; None for soft winner-takes-all, where each neuron
            reconstructs a patch by its own weights.

    Returns:
        The update, ``(K, D)``, to be added to the weights times a learning rate.
    """
    delta = torch.zeros_like(w)
    for n in range(len(x)):
        reconstruction = w if r is None else torch.cumsum(r[n, :, None] * w, dim=0)
        delta += a[n, :, None] * (x[n] - reconstruction)
    return delta


def grouped(x: Tensor, w: Tensor, a: Tensor, r: Tensor | None = None, *, group: int = 8) -> Tensor:
    """The update as code before FastHebb had it: all single updates of a few neurons at once, then their average.

    It holds tensors of ``(N, group, D)``.

    Args:
        x: Patches ``(N, D)``.
        w: Weights ``(K, D)``.
        a: Gate times aggregation weight, ``(N, K)``.
        r: Coefficients of the reconstruction, ``(N, K)``, or None.
        group: Neurons at once, at least 1.

    Returns:
        The update, ``(K, D)``.

    Raises:
        ValueError: If the group is empty.
    """
    if group < 1:
        raise ValueError(f"group must be at least 1, got {group}")
    delta, before = torch.empty_like(w), torch.zeros_like(x)
    for start in range(0, len(w), group):
        part = slice(start, start + group)
        if r is None:
            reconstruction = w[part].expand(len(x), -1, -1)
        else:
            reconstruction = before[:, None] + torch.cumsum(r[:, part, None] * w[part], dim=1)
            before = reconstruction[:, -1].clone()
        delta[part] = (a[:, part, None] * (x[:, None] - reconstruction)).sum(dim=0)
    return delta


def cheapest_block(patches: int, inputs: int, neurons: int) -> int:
    """How many neurons `merged` takes at once for the fewest multiplications.

    The formula of the paper multiplies K x K matrices, N K² + K² D multiplications beyond the N K D that nobody saves.
    In blocks of b neurons it is N K D + b K (N + D), which is less for wide layers that see few patches.

    Args:
        patches: N.
        inputs: D.
        neurons: K.

    Returns:
        K, for all at once, or a block of 128.
    """
    whole = neurons**2 * (patches + inputs)
    blocks = patches * neurons * inputs + _BLOCK * neurons * (patches + inputs)
    return neurons if neurons <= _BLOCK or whole <= blocks else _BLOCK


def merged(x: Tensor, w: Tensor, a: Tensor, r: Tensor | None = None, *, block: int | None = None) -> Tensor:
    """FastHebb: the sum over the patches taken first, in matrix products.

    Args:
        x: Patches ``(N, D)``.
        w: Weights ``(K, D)``.
        a: Gate times aggregation weight, ``(N, K)``.
        r: Coefficients of the reconstruction, ``(N, K)``, or None.
        block: Neurons at once; K is the paper's formula. None takes what `cheapest_block` says. In blocks, what
            earlier neurons reconstruct is subtracted from the patches before the next block learns.

    Returns:
        The update, ``(K, D)``.

    Raises:
        ValueError: If the block is empty.
    """
    if block is not None and block < 1:
        raise ValueError(f"block must be at least 1, got {block}")
    if r is None:
        return a.T @ x - a.sum(dim=0)[:, None] * w
    block = cheapest_block(len(x), w.shape[1], len(w)) if block is None else block
    if block >= len(w):
        return a.T @ x - (a.T @ r).tril() @ w
    delta, rest = torch.empty_like(w), x.clone()
    for start in range(0, len(w), block):
        part = slice(start, start + block)
        own = a[:, part].T
        delta[part] = own @ rest - (own @ r[:, part]).tril() @ w[part]
        rest.addmm_(r[:, part], w[part], alpha=-1)
    return delta


def unfold_free(
    x: Tensor, w: Tensor, a: Tensor, r: Tensor | None = None, *, stride: int = 1, padding: int = 0
) -> Tensor:
    """The merged update of a convolution without its patches: they are never laid out in memory.

    The product of gates and patches is the gradient of a convolution with respect to its kernel.

    Args:
        x: Images ``(B, C, H, W)``.
        w: Kernels ``(K, C, h, w)``.
        a: Gate times aggregation weight, ``(B, K, H', W')``.
        r: Coefficients of the reconstruction, ``(B, K, H', W')``, or None.
        stride: Of the convolution.
        padding: Zeros on each side.

    Returns:
        The update, ``(K, C, h, w)``.
    """
    towards = conv2d_weight(x, w.shape, a, stride=stride, padding=padding)
    gates = a.transpose(0, 1).flatten(1)
    if r is None:
        return towards - gates.sum(dim=1).view(-1, 1, 1, 1) * w
    mix = (gates @ r.transpose(0, 1).flatten(1).T).tril()
    return towards - (mix @ w.flatten(1)).view_as(w)


class HebbianConv2d(nn.Module):
    """A convolution that learns from its own inputs and outputs.

    In training mode a pass leaves the negative update in ``weight.grad``, so that a plain SGD step applies it, and its
    output has no gradient. In evaluation mode, and after `set_hebbian` with False, it is an ordinary convolution
    without bias, followed by its activation.

    Args:
        in_channels: C.
        out_channels: K neurons.
        kernel_size: h = w.
        rule: What is learnt. `swta` answers with ReLU(w x / |w|), `hpca` with f(w x).
        stride: Of the convolution.
        padding: Zeros on each side; they are patches too, and a competition among neurons notices them.
        form: How the update is evaluated; all forms agree to rounding.
        aggregation: Average over the batch; by default `gate` for `swta` and `mean` for `hpca`.
        temperature: Of the competition in `swta`, above 0.
        activation: The function f.
        group: Neurons at once in the form `grouped`.

    Attributes:
        weight: ``(K, C, h, w)``.
        hebbian: Whether passes in training mode learn.

    Raises:
        ValueError: If a name is unknown or a number out of range.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        *,
        rule: Rule,
        stride: int = 1,
        padding: int = 0,
        form: Form = "merged",
        aggregation: Aggregation | None = None,
        temperature: float = 0.02,
        activation: Literal["relu", "tanh", "identity"] = "relu",
        group: int = 8,
    ) -> None:
        super().__init__()
        if rule not in get_args(Rule) or form not in get_args(Form):
            raise ValueError(
                f"rule={rule!r}, form={form!r}: expected {' or '.join(get_args(Rule))}, {', '.join(get_args(Form))}"
            )
        if min(in_channels, out_channels, kernel_size, stride, group) < 1 or padding < 0:
            raise ValueError(
                f"channels {in_channels} to {out_channels}, kernel {kernel_size}, stride {stride}, group {group}, "
                f"padding {padding}: expected positive numbers, and padding of 0 or more"
            )
        if not temperature > 0:
            raise ValueError(f"temperature must be above 0, got {temperature}")
        if activation not in _ACTIVATIONS:
            raise ValueError(f"activation={activation!r}: expected one of {', '.join(_ACTIVATIONS)}")
        self.rule, self.form, self.temperature, self.group = rule, form, temperature, group
        self.aggregation: Aggregation = aggregation or ("gate" if rule == "swta" else "mean")
        self.stride, self.padding, self.activation = stride, padding, activation
        self.hebbian = True
        inputs = in_channels * kernel_size**2
        # Neurons of length 1 on average: the length that principal components end up with.
        self.weight = nn.Parameter(torch.randn(out_channels, in_channels, kernel_size, kernel_size) / math.sqrt(inputs))

    def forward(self, x: Tensor) -> Tensor:
        """Answers ``(B, K, H', W')`` to images ``(B, C, H, W)``, and in training mode the update as gradient."""
        if self.training and self.hebbian:
            y, delta = self.update(x)
            self.weight.grad = -delta
            return y
        self._check(x)
        weight: Tensor = self.weight
        if self.rule == "swta":
            weight = F.normalize(weight.flatten(1), dim=1).view_as(weight)
        return _ACTIVATIONS[self.activation](F.conv2d(x, weight, stride=self.stride, padding=self.padding))

    @torch.no_grad()
    def update(self, x: Tensor) -> tuple[Tensor, Tensor]:
        r"""The layer's answers and the update that it learns from them.

        Args:
            x: Images ``(B, C, H, W)``.

        Returns:
            Answers ``(B, K, H', W')``, and :math:`\Delta W` ``(K, C, h, w)``. That of `hpca` is divided by
            :math:`\sqrt D`, as in the authors' code.

        Raises:
            ValueError: If the images do not fit the layer or there is none.
        """
        self._check(x)
        w, size = self.weight, self.weight.shape[-1]
        across = (x.shape[-2] + 2 * self.padding - size) // self.stride + 1
        if self.form == "unfold-free":
            drive = F.conv2d(x, w, stride=self.stride, padding=self.padding)
            y, a, r = self._gates(drive, self._lengths(x))
            delta = unfold_free(x, w, a, r, stride=self.stride, padding=self.padding)
        else:
            patches = F.unfold(x, size, stride=self.stride, padding=self.padding).transpose(1, 2).flatten(0, 1)
            flat = w.flatten(1)
            y, a, r = self._gates(patches @ flat.T, patches.norm(dim=1, keepdim=True))
            if self.form == "patch":
                delta = patch_by_patch(patches, flat, a, r)
            elif self.form == "grouped":
                delta = grouped(patches, flat, a, r, group=self.group)
            else:
                delta = merged(patches, flat, a, r)
            delta = delta.view_as(w)
            y = y.view(len(x), -1, len(w)).transpose(1, 2).unflatten(2, (across, -1))
        return y, delta if self.rule == "swta" else delta / math.sqrt(w[0].numel())

    def _gates(self, drive: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Answers, gates times aggregation weights, and reconstruction; neurons are the second axis of all."""
        f = _ACTIVATIONS[self.activation]
        if self.rule == "hpca":
            y = f(drive)
            return y, y * aggregation_weights(y, self.aggregation), y
        norm = self.weight.flatten(1).norm(dim=1).clamp_min(1e-12).view(1, -1, *[1] * (drive.ndim - 2))
        # A patch of zeros is at a right angle to everything.
        gate = swta_gate(drive / (norm * lengths.clamp_min(1e-12)), self.temperature)
        return f(drive / norm), gate * aggregation_weights(gate, self.aggregation), None

    def _lengths(self, x: Tensor) -> Tensor:
        """The length of each patch, ``(B, 1, H', W')``."""
        squares = x.square().sum(dim=1, keepdim=True)
        return F.conv2d(squares, torch.ones_like(self.weight[:1, :1]), stride=self.stride, padding=self.padding).sqrt()

    def _check(self, x: Tensor) -> None:
        channels, size = self.weight.shape[1], self.weight.shape[-1]
        if x.ndim != 4 or x.shape[1] != channels or len(x) == 0:
            raise ValueError(f"images of shape {tuple(x.shape)}: expected (B, {channels}, H, W) with B of at least 1")
        if min(x.shape[2:]) + 2 * self.padding < size:
            raise ValueError(f"images of {x.shape[2]} x {x.shape[3]} pixels are smaller than the kernel, {size}")


class HebbianLinear(HebbianConv2d):
    """A fully connected layer that learns from its own inputs and outputs.

    Args:
        in_features: D.
        out_features: K.
        rule: As in `HebbianConv2d`, and so are the options.
        form: As there; `unfold-free` is `merged`, since there is nothing to unfold.
        aggregation: As there.
        temperature: As there.
        activation: As there.
        group: As there.

    Attributes:
        weight: ``(K, D, 1, 1)``.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        rule: Rule,
        form: Form = "merged",
        aggregation: Aggregation | None = None,
        temperature: float = 0.02,
        activation: Literal["relu", "tanh", "identity"] = "relu",
        group: int = 8,
    ) -> None:
        super().__init__(
            in_features,
            out_features,
            1,
            rule=rule,
            form="merged" if form == "unfold-free" else form,
            aggregation=aggregation,
            temperature=temperature,
            activation=activation,
            group=group,
        )

    def forward(self, x: Tensor) -> Tensor:
        """Answers ``(B, K)`` to features ``(B, D)``."""
        return super().forward(x[:, :, None, None]).flatten(1)


class RelativeNorm(nn.Module):
    r"""Batch normalisation that keeps how the variances of the channels compare.

    It is batch normalisation times :math:`\sqrt{(\sigma_c^2 + \epsilon) / (\overline{\sigma^2} + \epsilon)}`: every
    channel loses its mean, and all are divided by one common scale. Principal components stay large or small.

    Args:
        channels: C.
        momentum: Share of a new batch in the running statistics, above 0, at most 1.
        eps: Added to variances.
    """

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, channels: int, momentum: float = 0.1, eps: float = 1e-5) -> None:
        super().__init__()
        if channels < 1 or not 0 < momentum <= 1 or not eps > 0:
            raise ValueError(f"channels={channels}, momentum={momentum}, eps={eps}: expected positive, momentum <= 1")
        self.momentum, self.eps = momentum, eps
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        """Normalise ``(B, C)`` or ``(B, C, H, W)``."""
        mean, var = self.running_mean, self.running_var
        if self.training:
            var, mean = torch.var_mean(x, dim=[d for d in range(x.ndim) if d != 1], correction=0)
            with torch.no_grad():
                self.running_mean.lerp_(mean, self.momentum)
                self.running_var.lerp_(var, self.momentum)
        shape = (1, -1, *[1] * (x.ndim - 2))
        return (x - mean.view(shape)) * (var.mean() + self.eps).rsqrt()


class Whitening(nn.Module):
    """A convolution that whitens images: the rows for the middle pixel of the ZCA of their patches.

    ZCA of whole images is nearly the same everywhere in an image and reaches a few pixels far. This keeps the one
    filter, instead of one for each pixel.

    Args:
        filters: ``(C, C, k, k)``, see `fit`.
        mean: Of each channel, ``(C,)``.
    """

    filters: Tensor
    mean: Tensor

    def __init__(self, filters: Tensor, mean: Tensor) -> None:
        super().__init__()
        self.register_buffer("filters", filters)
        self.register_buffer("mean", mean)

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the filters and the mean: networks with the same one see the same images."""
        content = torch.cat([self.filters.flatten(), self.mean]).cpu().contiguous()
        return hashlib.sha256(content.view(torch.uint8).numpy().tobytes()).hexdigest()

    @classmethod
    def fit(cls, images: Tensor, kernel: int = 5, eps: float = 1e-2) -> Whitening:
        """Learn the filters from images.

        Args:
            images: ``(N, C, H, W)``.
            kernel: Odd size k of the patches.
            eps: Added to the patches' variances, in units of their mean.

        Raises:
            ValueError: If the kernel is even or larger than an image, or eps is negative.
        """
        if kernel < 1 or kernel % 2 == 0 or kernel > min(images.shape[2:]) or eps < 0:
            raise ValueError(f"kernel={kernel}, eps={eps}: expected an odd kernel within the image, eps of 0 or more")
        mean = images.mean(dim=(0, 2, 3))
        centred = images - mean.view(1, -1, 1, 1)
        channels = images.shape[1]
        size = channels * kernel**2
        total, count = torch.zeros(size, size, dtype=torch.float64), 0
        for part in centred.split(256):
            patches = F.unfold(part, kernel).transpose(1, 2).flatten(0, 1)
            total += (patches.T @ patches).double()
            count += len(patches)
        values, vectors = torch.linalg.eigh(total / count)
        scale = (values.clamp_min(0) + eps * values.mean()).rsqrt()
        whole = (vectors * scale) @ vectors.T
        middle = torch.arange(channels) * kernel**2 + kernel**2 // 2
        return cls(whole[middle].view(channels, channels, kernel, kernel).to(images.dtype), mean)

    def forward(self, x: Tensor) -> Tensor:
        """Whitened images ``(B, C, H, W)``; beyond the border the image is mirrored."""
        pad = self.filters.shape[-1] // 2
        centred = x - self.mean.view(1, -1, 1, 1)
        return F.conv2d(F.pad(centred, (pad, pad, pad, pad), mode="reflect") if pad else centred, self.filters)


@dataclass(frozen=True)
class Stage:
    """A convolution, and the pooling behind it.

    Attributes:
        channels: Neurons.
        kernel: Size of the kernel; there is no padding.
        pool: Size and stride of the max pooling; 1 for none.
    """

    channels: int
    kernel: int
    pool: int = 1


#: The convolutions of the authors' networks, for images of 32 x 32 and of 210 x 210 pixels.
SMALL = (Stage(96, 5, 2), Stage(128, 3), Stage(192, 3, 2), Stage(256, 3))
IMAGENET = (
    Stage(96, 7, 3), Stage(128, 3), Stage(192, 3, 2), Stage(192, 3), Stage(256, 3, 2), Stage(256, 3), Stage(384, 3, 2),
    Stage(512, 3),
)  # fmt: skip


@dataclass(frozen=True)
class LayerShape:
    """What a layer's update costs depends on these.

    Attributes:
        name: Such as `conv1`.
        patches: N, of a whole batch.
        inputs: D.
        neurons: K.
    """

    name: str
    patches: int
    inputs: int
    neurons: int


def layer_shapes(
    stages: Sequence[Stage], in_shape: tuple[int, int, int], batch: int, hidden: int = 4096
) -> list[LayerShape]:
    """The shapes of a network's layers.

    Args:
        stages: The convolutions.
        in_shape: ``(C, H, W)`` of an image.
        batch: Images at once.
        hidden: Neurons of the fully connected layer; 0 for none.

    Raises:
        ValueError: If an image is too small for the network.

    Example:
        >>> [(s.patches, s.inputs, s.neurons) for s in layer_shapes(SMALL, (3, 32, 32), 64)][1]
        (9216, 864, 128)
    """
    channels, height, width = in_shape
    shapes = []
    for number, stage in enumerate(stages, start=1):
        height, width = height - stage.kernel + 1, width - stage.kernel + 1
        if min(height, width) < stage.pool:
            raise ValueError(f"images of shape {in_shape} are too small for {len(stages)} stages: none is left")
        shapes.append(LayerShape(f"conv{number}", batch * height * width, channels * stage.kernel**2, stage.channels))
        channels, height, width = stage.channels, height // stage.pool, width // stage.pool
    if hidden:
        shapes.append(LayerShape(f"fc{len(stages) + 1}", batch, channels * height * width, hidden))
    return shapes


class HebbianNet(nn.Module):
    """A network of Hebbian layers with a linear classifier on top.

    Every layer is followed by its pooling and a normalisation without parameters; from the second layer on that is
    `RelativeNorm`.

    Args:
        stages: The convolutions.
        in_shape: ``(C, H, W)`` of an image.
        num_classes: Logits.
        rule: What the layers learn.
        hidden: Neurons of a fully connected layer behind the convolutions; 0 for none.
        form: How updates are evaluated.
        dropout: Share of features that the classifier loses in training, at least 0, below 1.
        whitening: What is done to the images first; None for nothing.
        temperature: Of the competition in `swta`.

    Raises:
        ValueError: If the images are too small or a number is out of range.
    """

    def __init__(
        self,
        stages: Sequence[Stage],
        *,
        in_shape: tuple[int, int, int],
        num_classes: int,
        rule: Rule,
        hidden: int = 4096,
        form: Form = "merged",
        dropout: float = 0.5,
        whitening: Whitening | None = None,
        temperature: float = 0.02,
    ) -> None:
        super().__init__()
        if not stages or num_classes < 1 or hidden < 0:
            raise ValueError(f"{len(stages)} stages, {num_classes} classes, hidden={hidden}: expected at least one")
        shapes = layer_shapes(stages, in_shape, 1, hidden)
        self.whitening: nn.Module = nn.Identity() if whitening is None else whitening
        self.blocks, channels = nn.ModuleList(), in_shape[0]
        for place, stage in enumerate(stages):
            layer = HebbianConv2d(channels, stage.channels, stage.kernel, rule=rule, form=form, temperature=temperature)
            norm = RelativeNorm(stage.channels) if place else nn.BatchNorm2d(stage.channels, affine=False)
            pool = nn.MaxPool2d(stage.pool) if stage.pool > 1 else nn.Identity()
            self.blocks.append(nn.Sequential(layer, pool, norm))
            channels = stage.channels
        if hidden:
            inputs = shapes[-1].inputs
            layer = HebbianLinear(inputs, hidden, rule=rule, form=form, temperature=temperature)
            self.blocks.append(nn.Sequential(nn.Flatten(), layer, RelativeNorm(hidden)))
        side = _side(stages, in_shape)
        self.classifier = nn.Sequential(
            nn.Flatten(), nn.Dropout(dropout), nn.Linear(hidden or channels * side[0] * side[1], num_classes)
        )

    def outputs(self, x: Tensor) -> list[Tensor]:
        """The output of every layer, normalised: ``(B, K, H, W)``, and ``(B, hidden)`` at last."""
        x = self.whitening(x)
        found = []
        for block in self.blocks:
            x = block(x)
            found.append(x)
        return found

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``(B, num_classes)`` of images ``(B, C, H, W)``."""
        return self.classifier(self.outputs(x)[-1])


def _side(stages: Sequence[Stage], in_shape: tuple[int, int, int]) -> tuple[int, int]:
    height, width = in_shape[1:]
    for stage in stages:
        height, width = (height - stage.kernel + 1) // stage.pool, (width - stage.kernel + 1) // stage.pool
    return height, width


def set_hebbian(model: nn.Module, on: bool) -> nn.Module:
    """Switch the Hebbian learning of all layers on, or off, for training by gradients.

    Args:
        model: Changed in place, and returned.
        on: Whether passes in training mode leave Hebbian updates.
    """
    for module in model.modules():
        if isinstance(module, HebbianConv2d):
            module.hebbian = on
    return model


class HebbianPretraining(L.LightningModule):
    """Train all layers at once, each on what comes from below, without labels and without a backward pass.

    An epoch logs `update`: the root mean square of the updates that the layers made, on average over layers and steps.

    Args:
        model: A `HebbianNet`; its classifier stays as it is.
        lr: Learning rate of plain SGD without momentum, above 0.

    Raises:
        ValueError: If the learning rate is not above 0.
        Diverged: In training, if an update is not finite.
    """

    def __init__(self, model: HebbianNet, lr: float) -> None:
        super().__init__()
        if not lr > 0:
            raise ValueError(f"lr must be above 0, got {lr}")
        self.automatic_optimization = False
        self.model = cast(HebbianNet, set_hebbian(model, True))
        self.lr = lr

    def training_step(self, batch: Sequence[Tensor], batch_idx: int) -> None:
        """One step of all layers.

        Args:
            batch: Images ``(B, C, H, W)`` first; what else is in it, is not looked at.
            batch_idx: Not used.
        """
        with torch.no_grad():
            self.model.outputs(batch[0])
        layers = [m for m in self.model.modules() if isinstance(m, HebbianConv2d)]
        update = torch.stack([cast(Tensor, m.weight.grad).square().mean().sqrt() for m in layers]).mean()
        if not torch.isfinite(update):
            raise Diverged(self.global_step, update.item())
        optimizer = cast(Any, self.optimizers())
        optimizer.step()
        optimizer.zero_grad()
        self.log("update", update, on_step=False, on_epoch=True, batch_size=len(batch[0]))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Plain SGD on the weights of the Hebbian layers."""
        layers = [m.weight for m in self.model.modules() if isinstance(m, HebbianConv2d)]
        return torch.optim.SGD(layers, lr=self.lr)


class Passes(L.LightningDataModule):
    """Several passes over a small set of images as one epoch, so that they are validated once.

    Args:
        data: Gives the images, in an order and with an augmentation of its own in each pass.
        passes: How many, at least 1.

    Raises:
        ValueError: If there is no pass.
    """

    def __init__(self, data: SeededData, passes: int) -> None:
        super().__init__()
        if passes < 1:
            raise ValueError(f"passes must be at least 1, got {passes}")
        self.data, self.passes = data, passes

    @property
    def fingerprint(self) -> str:
        """Of the images and the number of passes."""
        return hashlib.sha256(f"{self.data.fingerprint} {self.passes}".encode()).hexdigest()

    @property
    def checksums(self) -> dict[str, str]:
        """Those of the images."""
        return self.data.checksums

    def set_seed(self, seed: int) -> None:
        """Fix the order of the batches in all passes."""
        self.data.set_seed(seed)

    def train_dataloader(self) -> Loader:
        """The batches of all passes."""
        return Loader(self.passes * len(self.data.train_dataloader()), self._batches)

    def val_dataloader(self) -> Loader:
        """The validation batches, once."""
        return self.data.val_dataloader()

    def _batches(self) -> Iterator[Any]:
        for number in range(self.passes):
            self.data.set_epoch(number)
            yield from self.data.train_dataloader()


def readout(
    train: tuple[Tensor, Tensor],
    test: tuple[Tensor, Tensor],
    num_classes: int,
    penalties: Sequence[float] = (1e-3, 1e-2, 1e-1, 1.0),
) -> float:
    """How well a linear readout of features tells the classes: least squares on one-hot targets, with a ridge penalty.

    Features are standardised by those of the training part. The penalty is the one that does best on the last fifth
    of the training part, when fitted on the rest.

    Args:
        train: Features ``(N, F)`` and classes ``(N,)``.
        test: The same, for the accuracy.
        num_classes: Number of classes.
        penalties: Candidates, as multiples of N; each above 0.

    Returns:
        Accuracy in per cent, 0 to 100.

    Raises:
        ValueError: If there are fewer than five training samples or no penalty.
    """
    if len(train[0]) < 5 or not penalties or min(penalties) <= 0:
        raise ValueError(f"{len(train[0])} samples, penalties {list(penalties)}: expected at least 5, and above 0")
    mean, std = train[0].mean(dim=0), train[0].std(dim=0).clamp_min(1e-6)
    (x, y), (seen, labels) = (((part[0] - mean) / std, part[1]) for part in (train, test))

    def accuracy(fit: slice, penalty: float, inputs: Tensor, classes: Tensor) -> float:
        z, target = x[fit], F.one_hot(y[fit], num_classes).to(x.dtype)
        shift = target.mean(dim=0)
        gram = z.T @ z + penalty * len(z) * torch.eye(z.shape[1], dtype=z.dtype, device=z.device)
        weights = torch.linalg.solve(gram, z.T @ (target - shift))
        return 100 * float(((inputs @ weights + shift).argmax(dim=1) == classes).double().mean())

    cut = len(x) * 4 // 5
    best = max(penalties, key=lambda p: accuracy(slice(0, cut), p, x[cut:], y[cut:])) if len(penalties) > 1 else None
    return accuracy(slice(None), penalties[0] if best is None else best, seen, labels)
